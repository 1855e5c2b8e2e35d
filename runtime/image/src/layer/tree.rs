//! Record of the unpacked files: names touched by the current layer, which its own whiteouts do not affect, and final
//! attributes of directories.

use std::collections::BTreeMap;
use std::ffi::OsString;

/// Final attributes of a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Finish {
    pub(super) mode: u32,
    pub(super) mtime: (i64, u32),
}

/// A name in an image, explicit or implied.
#[derive(Default)]
pub(super) struct Node {
    /// The last layer, from 1, that contains it or something in it.
    layer: u32,
    /// The last layer whose whiteouts removed all entries of lower layers in it: the remaining ones belong to that layer,
    /// and another scan at each further whiteout would take forever.
    cleared: u32,
    pub(super) finish: Option<Finish>,
    pub(super) children: BTreeMap<OsString, Node>,
}

impl Node {
    fn find(&self, path: &[OsString]) -> Option<&Self> {
        path.iter()
            .try_fold(self, |node, name| node.children.get(name))
    }

    pub(super) fn is_of(&self, path: &[OsString], layer: u32) -> bool {
        self.find(path).is_some_and(|node| node.layer == layer)
    }

    /// Whether all entries of lower layers in it were removed before. Marks them as removed.
    pub(super) fn clear(&mut self, path: &[OsString], layer: u32) -> bool {
        let found = path
            .iter()
            .try_fold(self, |node, name| node.children.get_mut(name));
        found.is_some_and(|node| std::mem::replace(&mut node.cleared, layer) == layer)
    }

    /// Marks a name, and the directories on its path, as part of this layer.
    pub(super) fn touch(&mut self, path: &[OsString], layer: u32) -> &mut Self {
        self.layer = layer;
        path.iter().fold(self, |node, name| {
            let child = node.children.entry(name.clone()).or_default();
            child.layer = layer;
            child
        })
    }

    pub(super) fn remove(&mut self, path: &[OsString]) {
        let Some((name, parent)) = path.split_last() else {
            return;
        };
        let parent = parent
            .iter()
            .try_fold(self, |node, name| node.children.get_mut(name));
        if let Some(parent) = parent {
            parent.children.remove(name);
        }
    }

    /// Forgets everything except directories: the next layer's whiteouts apply to it.
    pub(super) fn prune(&mut self) {
        self.children.retain(|_, child| child.finish.is_some());
        self.children.values_mut().for_each(Self::prune);
    }
}
