//! What file servers of several inputs share, and a file server that is not root.

use koya_devices::fs::Shares;
use koya_devices::fs::passthrough::{Options, Passthrough};
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;
use std::sync::OnceLock;

/// Keeps the directory mounted through which servers reopen descriptors, as another server of the process would: to unmount
/// it after each input takes the host a while.
pub(crate) fn keep_descriptors() {
    static SERVER: OnceLock<Passthrough> = OnceLock::new();
    SERVER.get_or_init(|| {
        let files = Passthrough::new(Shares::default(), Options::default());
        files.expect("a server")
    });
}

/// A user other than root, as whom this thread acts until this is dropped: then the owners of files are kept in attributes.
pub(crate) struct User;

impl User {
    pub(crate) const ID: u32 = 65_534;

    /// `None` if the host does not permit it.
    pub(crate) fn act() -> Option<Self> {
        Self::act_as(Self::ID).then_some(Self)
    }

    fn act_as(id: u32) -> bool {
        set_thread_res_uid(None::<Uid>, Uid::from_raw(id), None::<Uid>).is_ok()
    }

    /// Calls a function as root, which this thread is again meanwhile.
    pub(crate) fn without(user: Option<&Self>, work: impl FnOnce()) {
        if user.is_some() {
            assert!(Self::act_as(0), "root may act as root");
        }
        work();
        if user.is_some() {
            assert!(Self::act_as(Self::ID), "root may act as a user");
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        assert!(Self::act_as(0), "root may act as root again");
    }
}
