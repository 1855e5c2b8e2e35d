//! Who a container's user is, by the container's own databases. They are the container's, and not
//! trusted: any text is parsed, and no link in the tree leads out of it.

use crate::Error;
use koya_protocol::MAX_ACCOUNTS;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat, openat2};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::Path;

/// The text of `/etc/passwd` and `/etc/group`; empty where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Accounts {
    pub(crate) passwd: String,
    pub(crate) groups: String,
}

impl Accounts {
    /// Those of a root file system on the host.
    pub(crate) fn read(rootfs: &Path) -> Self {
        Self {
            passwd: database(rootfs, "etc/passwd"),
            groups: database(rootfs, "etc/group"),
        }
    }
}

/// A user as numbers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

impl Account {
    /// `USER[:GROUP]` by the container's own databases.
    ///
    /// # Errors
    /// Which user or group the container does not have.
    pub(crate) fn find(accounts: &Accounts, text: &str) -> Result<Self, Error> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (text, None),
        };
        let user = if user.is_empty() { "0" } else { user };
        let Accounts { passwd, groups } = accounts;
        // name:password:uid:gid:comment:home:shell
        let entry = passwd
            .lines()
            .map(|l| l.split(':').collect::<Vec<_>>())
            .find(|f| f.len() >= 6 && (f[0] == user || f[2] == user));
        let unknown = |what| Error::invalid("user", format!("the container has no {what}"));
        let number = |text: &str| text.parse::<u32>().ok().filter(|n| *n != u32::MAX);
        let (uid, mut gid, home, name) = match &entry {
            Some(f) => (
                number(f[2]).ok_or_else(|| unknown(format!("proper user {user}")))?,
                number(f[3]).unwrap_or(0),
                f[5].to_owned(),
                Some(f[0]),
            ),
            None => {
                let uid = number(user).ok_or_else(|| unknown(format!("user {user}")))?;
                let home = if uid == 0 { "/root" } else { "/" };
                (uid, 0, home.to_owned(), None)
            }
        };
        let mut additional = Vec::new();
        // name:password:gid:member,member
        for fields in groups.lines().map(|l| l.split(':').collect::<Vec<_>>()) {
            let Some(number) = fields.get(2).and_then(|g| number(g)) else {
                continue;
            };
            let member = fields
                .get(3)
                .is_some_and(|m| m.split(',').any(|m| Some(m) == name));
            if group.is_none() && member && number != gid {
                additional.push(number);
            }
            if group == Some(fields[0]) {
                gid = number;
            }
        }
        if let Some(group) = group {
            let by_name = groups.lines().any(|l| l.split(':').next() == Some(group));
            if !by_name {
                gid = number(group).ok_or_else(|| unknown(format!("group {group}")))?;
            }
        }
        Ok(Self {
            uid,
            gid,
            groups: additional,
            home,
        })
    }
}

/// A file of the container, read without leaving its root by a link.
fn database(rootfs: &Path, name: &str) -> String {
    let read = || -> std::io::Result<String> {
        let root = openat(CWD, rootfs, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        // Looked at before it is opened: opening a device node acts on the host's device, and
        // containers can make some.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let found = openat2(root, name, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode);
        if kind != FileType::RegularFile {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
        let mut text = Vec::new();
        file.take(MAX_ACCOUNTS).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    read().unwrap_or_default()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A root file system with users.
    pub(crate) fn rootfs() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(
            dir.path().join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/var/www:/bin/false\n",
        )
        .unwrap();
        std::fs::write(
            dir.path().join("etc/group"),
            "root:x:0:\nweb:x:33:\nlog:x:40:web,x\n",
        )
        .unwrap();
        dir
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let dir = rootfs();
        let web = Account::find(&Accounts::read(dir.path()), "web").unwrap();
        assert_eq!(
            (web.uid, web.gid, web.groups.as_slice()),
            (33, 33, &[40][..])
        );
        assert_eq!(web.home, "/var/www");
        assert_eq!(
            Account::find(&Accounts::read(dir.path()), "33").unwrap(),
            web
        );
        let mixed = Account::find(&Accounts::read(dir.path()), "web:log").unwrap();
        assert_eq!((mixed.uid, mixed.gid, mixed.groups.len()), (33, 40, 0));
        assert_eq!(
            Account::find(&Accounts::read(dir.path()), "1000:50")
                .unwrap()
                .gid,
            50
        );
        assert_eq!(
            Account::find(&Accounts::read(dir.path()), "").unwrap().home,
            "/root"
        );
        // An empty group is none.
        assert_eq!(
            Account::find(&Accounts::read(dir.path()), "33:").unwrap(),
            web
        );
        assert!(Account::find(&Accounts::read(dir.path()), "nobody").is_err());
        assert!(Account::find(&Accounts::read(dir.path()), "4294967295").is_err());
    }

    #[test]
    fn a_password_file_that_is_a_link_out_of_the_root_is_not_read() {
        let dir = rootfs();
        let secret = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(secret.path(), "web:x:1:1::/:\n").unwrap();
        let passwd = dir.path().join("etc/passwd");
        std::fs::remove_file(&passwd).unwrap();
        std::os::unix::fs::symlink(secret.path(), &passwd).unwrap();
        assert!(Account::find(&Accounts::read(dir.path()), "web").is_err());
        // Nor is anything that is no file: this would wait for ever.
        std::fs::remove_file(&passwd).unwrap();
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(CWD, &passwd, FileType::Fifo, mode, 0).unwrap();
        assert!(Account::find(&Accounts::read(dir.path()), "web").is_err());
    }
}
