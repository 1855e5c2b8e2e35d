//! What has been unpacked so far: which names the current layer touched, which its own whiteouts leave
//! alone, and what directories are to be like once nothing is put into them any more.

use std::collections::BTreeMap;
use std::ffi::OsString;

/// What a directory gets at the end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Finish {
    pub(super) mode: u32,
    pub(super) mtime: (i64, u32),
}

/// A name that an image has or implies.
#[derive(Default)]
pub(super) struct Node {
    /// The last layer, from 1, that has it or something in it.
    layer: u32,
    /// The last layer whose whiteouts removed all of lower layers in it: what is there now is of that
    /// layer, and looking again at each further whiteout would take for ever.
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

    /// Whether all of lower layers was to be removed from it before. It counts as removed from now on.
    pub(super) fn clear(&mut self, path: &[OsString], layer: u32) -> bool {
        let found = path
            .iter()
            .try_fold(self, |node, name| node.children.get_mut(name));
        found.is_some_and(|node| std::mem::replace(&mut node.cleared, layer) == layer)
    }

    /// The name is of this layer, and so are the directories on the way to it.
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

    /// Forgets what is no directory: the next layer's whiteouts apply to it.
    pub(super) fn prune(&mut self) {
        self.children.retain(|_, child| child.finish.is_some());
        self.children.values_mut().for_each(Self::prune);
    }
}
