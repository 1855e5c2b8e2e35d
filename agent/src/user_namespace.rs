//! User namespaces of exec processes.
//!
//! libcontainer enters all namespaces of the container except its user namespace. So an exec process begins as the agent's
//! root, and enters the user namespace as its last step, which gives it all capabilities there, before it becomes its user.

use oci_spec::runtime::{Process, User, UserBuilder};
use rustix::fs::{Gid, Uid};
use rustix::io;
use rustix::thread::{
    LinkNameSpaceType, move_into_link_name_space, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

/// The user namespace of a container, and the user of the process in it.
#[derive(Clone)]
pub(crate) struct UserNamespace {
    file: Arc<File>,
    user: User,
}

impl UserNamespace {
    /// Replaces the user of `process` by the agent's root, for [`enter`](Self::enter). `first` is the PID of the container's
    /// first process.
    ///
    /// # Errors
    /// If the process has ended.
    pub(crate) fn take(process: &mut Process, first: i32) -> std::io::Result<Self> {
        let file = File::open(format!("/proc/{first}/ns/user"))?;
        let user = process.user().clone();
        let mut root = UserBuilder::default().uid(0u32).gid(0u32);
        if let Some(umask) = user.umask() {
            root = root.umask(umask);
        }
        process.set_user(root.build().map_err(std::io::Error::other)?);
        Ok(Self {
            file: file.into(),
            user,
        })
    }

    /// Enters the namespace and becomes the user. The process has one thread, and keeps all capabilities in the namespace.
    ///
    /// # Errors
    /// If an ID is not mapped.
    pub(crate) fn enter(&self) -> io::Result<()> {
        move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::User))?;
        let groups = self.user.additional_gids().iter().flatten();
        let groups: Vec<_> = groups.map(|gid| Gid::from_raw(*gid)).collect();
        set_thread_groups(&groups)?;
        let (uid, gid) = (
            Uid::from_raw(self.user.uid()),
            Gid::from_raw(self.user.gid()),
        );
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_begins_as_root_and_keeps_its_umask() {
        let user = UserBuilder::default()
            .uid(7u32)
            .gid(8u32)
            .additional_gids(vec![9])
            .umask(0o27u32);
        let mut process = Process::default();
        process.set_user(user.build().unwrap());
        let own = i32::try_from(std::process::id()).unwrap();
        let taken = UserNamespace::take(&mut process, own).unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (0, 0));
        assert_eq!(process.user().additional_gids(), &None);
        assert_eq!(process.user().umask(), Some(0o27));
        assert_eq!((taken.user.uid(), taken.user.gid()), (7, 8));
        assert!(UserNamespace::take(&mut process, i32::MAX).is_err());
    }
}
