//! OOM kills in containers, from `memory.events`, read whenever it changes (Documentation/admin-guide/cgroup-v2.rst,
//! inotify(7)).

use crate::cgroup;
use crate::sys;
use anyhow::{Context, Result};
use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init, remove_watch};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

/// Cheap to clone; only for the agent's main thread.
#[derive(Clone, Default)]
pub(crate) struct Ooms(Rc<Inner>);

#[derive(Default)]
struct Inner {
    inotify: RefCell<Option<Rc<AsyncFd<OwnedFd>>>>,
    containers: RefCell<HashMap<i32, Watched>>,
    /// Counts not reported to the host yet.
    news: RefCell<HashMap<String, u64>>,
    changed: Notify,
    opened: Notify,
}

struct Watched {
    id: String,
    kills: u64,
}

impl Ooms {
    /// Watches a container until it is forgotten.
    pub(crate) fn watch(&self, id: &str) -> Result<()> {
        let path = cgroup::directory(id).join("memory.events");
        let inotify = self.inotify()?;
        let number = add_watch(inotify.get_ref(), &path, WatchFlags::MODIFY);
        let number = number.with_context(|| format!("cannot watch {}", path.display()))?;
        let watched = Watched {
            id: id.into(),
            kills: 0,
        };
        self.0.containers.borrow_mut().insert(number, watched);
        Ok(())
    }

    fn inotify(&self) -> Result<Rc<AsyncFd<OwnedFd>>> {
        let mut inotify = self.0.inotify.borrow_mut();
        if let Some(inotify) = &*inotify {
            return Ok(inotify.clone());
        }
        let fd = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let new = Rc::new(sys::wait_readable(fd)?);
        *inotify = Some(new.clone());
        self.0.opened.notify_one();
        Ok(new)
    }

    pub(crate) fn forget(&self, id: &str) {
        let mut containers = self.0.containers.borrow_mut();
        let number = containers.iter().find(|(_, watched)| watched.id == id);
        if let Some(number) = number.map(|(number, _)| *number) {
            containers.remove(&number);
            if let Some(inotify) = &*self.0.inotify.borrow() {
                // The watch disappears with the group.
                remove_watch(inotify.get_ref(), number).ok();
            }
        }
        self.0.news.borrow_mut().remove(id);
    }

    /// Records events, forever.
    pub(crate) async fn run(self) -> Result<()> {
        // The inotify instance is created with the first container.
        self.0.opened.notified().await;
        let inotify = self.inotify()?;
        let mut buffer = [MaybeUninit::uninit(); 512];
        loop {
            let mut ready = inotify.readable().await?;
            let mut reader = Reader::new(inotify.get_ref(), &mut buffer);
            while let Ok(event) = reader.next() {
                self.look(event.wd());
            }
            ready.clear_ready();
        }
    }

    fn look(&self, number: i32) {
        let mut containers = self.0.containers.borrow_mut();
        let Some(watched) = containers.get_mut(&number) else {
            return;
        };
        let path = cgroup::directory(&watched.id).join("memory.events");
        let text = fs::read_to_string(path).unwrap_or_default();
        let kills = cgroup::keyed(&text).get("oom_kill").copied().unwrap_or(0);
        if kills > watched.kills {
            watched.kills = kills;
            self.0.news.borrow_mut().insert(watched.id.clone(), kills);
            self.0.changed.notify_one();
        }
    }

    /// Waits for the next container with OOM kills; returns its total.
    pub(crate) async fn next(&self) -> (String, u64) {
        loop {
            {
                let mut news = self.0.news.borrow_mut();
                if let Some(id) = news.keys().next().cloned()
                    && let Some(kills) = news.remove(&id)
                {
                    return (id, kills);
                }
            }
            self.0.changed.notified().await;
        }
    }
}
