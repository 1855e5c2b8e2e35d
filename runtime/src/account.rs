//! Users of a container, looked up in its own `/etc/passwd` and `/etc/group`. These files are not trusted: any text is
//! parsed, and symbolic links cannot lead out of the root.

use crate::Error;
use crate::container_config::Volume;
use koya_protocol::MAX_ACCOUNTS;
use koya_rootfs::{Rootfs, read};
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::os::fd::OwnedFd;
use std::path::Path;

/// The contents of `/etc/passwd` and `/etc/group`; empty if missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Accounts {
    pub(crate) passwd: String,
    pub(crate) groups: String,
}

impl Accounts {
    /// Reads them from a root file system on the host.
    pub(crate) fn read(rootfs: &Path) -> Self {
        Self {
            passwd: within(rootfs, "etc/passwd"),
            groups: within(rootfs, "etc/group"),
        }
    }

    /// Replaces the files that volumes mount over.
    pub(crate) fn with(self, volumes: &[Volume]) -> Self {
        Self {
            passwd: mounted(volumes, "/etc/passwd").unwrap_or(self.passwd),
            groups: mounted(volumes, "/etc/group").unwrap_or(self.groups),
        }
    }
}

/// A user, resolved to numbers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

impl Account {
    /// Resolves `USER[:GROUP]` in the container's files. Digits are always a number, even if a user has that name: the files
    /// are part of the image, and must not redefine user 1000.
    ///
    /// # Errors
    /// The user or group that the container lacks.
    pub(crate) fn find(accounts: &Accounts, text: &str) -> Result<Self, Error> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (text, None),
        };
        let user = if user.is_empty() { "0" } else { user };
        let id = number_in(user)?;
        // name:password:uid:gid:comment:home:shell
        let entry = accounts
            .passwd
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .filter(|fields| fields.len() >= 4)
            .find(|fields| match id {
                Some(id) => number(fields[2]) == Some(id),
                None => fields[0] == user,
            });
        let (uid, own, home) = match &entry {
            Some(fields) => {
                let uid =
                    number(fields[2]).ok_or_else(|| unknown(format!("proper user {user}")))?;
                let home = fields.get(5).filter(|home| !home.is_empty());
                (uid, number(fields[3]).unwrap_or(0), *home.unwrap_or(&"/"))
            }
            None => {
                let uid = id.ok_or_else(|| unknown(format!("user {user}")))?;
                // Root's as well: what Docker, runc and crun set for users without an entry.
                (uid, 0, "/")
            }
        };
        let name = entry.as_ref().map(|fields| fields[0]);
        let (gid, groups) = match group {
            Some(group) => (group_named(accounts, group)?, Vec::new()),
            None => (own, groups_of(accounts, name)),
        };
        Ok(Self {
            uid,
            gid,
            groups: groups.into_iter().filter(|group| *group != gid).collect(),
            home: home.to_owned(),
        })
    }
}

fn unknown(what: String) -> Error {
    Error::invalid("user", format!("the container has no {what}"))
}

fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|number| *number != u32::MAX)
}

/// The ID of a user or group if the text is a number.
///
/// # Errors
/// If the number is out of range.
fn number_in(text: &str) -> Result<Option<u32>, Error> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    let wrong = || Error::invalid("user", format!("{text} is no number of a user or group"));
    number(text).map(Some).ok_or_else(wrong)
}

/// The lines of /etc/group (name:password:gid:member,member), each with its group ID.
fn groups(accounts: &Accounts) -> impl Iterator<Item = (Vec<&str>, u32)> {
    let lines = accounts.groups.lines();
    let fields = lines.map(|line| line.split(':').collect::<Vec<_>>());
    fields.filter_map(|fields| {
        let number = fields.get(2).and_then(|text| number(text))?;
        Some((fields, number))
    })
}

/// The ID of a group, given as a name or a number.
///
/// # Errors
/// The group that the container lacks.
pub(crate) fn group_named(accounts: &Accounts, group: &str) -> Result<u32, Error> {
    if let Some(number) = number_in(group)? {
        return Ok(number);
    }
    let found = groups(accounts).find(|(fields, _)| fields[0] == group);
    let (_, number) = found.ok_or_else(|| unknown(format!("group {group}")))?;
    Ok(number)
}

/// The groups with this member.
fn groups_of(accounts: &Accounts, name: Option<&str>) -> Vec<u32> {
    let has = |fields: &[&str]| {
        let members = fields.get(3).unwrap_or(&"");
        members.split(',').any(|member| Some(member) == name)
    };
    let found = groups(accounts).filter(|(fields, _)| has(fields));
    found.map(|(_, number)| number).collect()
}

/// Contents of a file that a volume provides: the deepest volume around the path counts, and of several at one path the
/// last.
fn mounted(volumes: &[Volume], path: &str) -> Option<String> {
    let around = |volume: &&Volume| Path::new(path).starts_with(&volume.destination);
    let depth = |volume: &&Volume| volume.destination.components().count();
    let volume = volumes.iter().filter(around).max_by_key(depth)?;
    let rest = Path::new(path).strip_prefix(&volume.destination).ok()?;
    Some(match rest.as_os_str().is_empty() {
        // The path was given by the user, so symbolic links in it are followed.
        true => text(openat(
            CWD,
            &volume.source,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )),
        false => within(&volume.source, rest),
    })
}

/// Reads a file below the container's root, without following a link out of it.
fn within(root: &Path, name: impl AsRef<Path>) -> String {
    text(Rootfs::open(root).and_then(|root| root.find(name.as_ref())))
}

/// Contents of a file; empty if missing.
fn text(found: rustix::io::Result<OwnedFd>) -> String {
    let content = found.ok().and_then(|found| read(&found, MAX_ACCOUNTS).ok());
    let content = content.flatten().unwrap_or_default();
    String::from_utf8_lossy(&content).into_owned()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use rustix::fs::FileType;

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
        assert_eq!(
            Account::find(&Accounts::default(), "").unwrap().home,
            "/",
            "no account of root"
        );
        // An empty group counts as no group.
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
        // Only regular files are read: a FIFO would block forever.
        std::fs::remove_file(&passwd).unwrap();
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(CWD, &passwd, FileType::Fifo, mode, 0).unwrap();
        assert!(Account::find(&Accounts::read(dir.path()), "web").is_err());
    }

    fn accounts(passwd: &str, groups: &str) -> Accounts {
        Accounts {
            passwd: passwd.into(),
            groups: groups.into(),
        }
    }

    /// moby/moby 21436, CVE-2016-3697.
    #[test]
    fn a_number_is_a_number_even_if_somebody_is_called_so() {
        let accounts = accounts(
            "1000:x:0:0::/root:/bin/sh\nweb:x:33:33::/var/www:\n",
            "1000:x:0:\n50:x:0:web\n",
        );
        let found = Account::find(&accounts, "1000:50").unwrap();
        assert_eq!((found.uid, found.gid), (1000, 50));
        // Leading zeroes do not change the number.
        let found = Account::find(&accounts, "033").unwrap();
        assert_eq!((found.uid, found.home.as_str()), (33, "/var/www"));
        assert_eq!(found, Account::find(&accounts, "web").unwrap());
    }

    /// CVE-2026-46680 of containerd.
    #[test]
    fn a_number_that_is_too_large_is_no_name() {
        let names = ["4294967296", "99999999999999999999", "4294967295", "-1"];
        let lines = names.map(|name| format!("{name}:x:0:0::/root:/bin/sh\n"));
        let accounts = accounts(&lines.concat(), "4294967296:x:0:\n");
        for name in names {
            let error = Account::find(&accounts, name).unwrap_err().to_string();
            assert!(error.contains("no number of a user"), "{error}");
        }
        assert!(Account::find(&accounts, "5:4294967296").is_err());
    }

    /// containerd/containerd 11937.
    #[test]
    fn a_group_of_the_users_name_is_one_of_its_groups() {
        let accounts = accounts(
            "db:x:999:65534::/data/db:/usr/sbin/nologin\n",
            "nogroup:x:65534:\ndb:x:999:db\n",
        );
        let found = Account::find(&accounts, "db").unwrap();
        assert_eq!((found.gid, found.groups), (65534, vec![999]));
    }

    /// moby/sys 230: small images omit fields and contain empty lines.
    #[test]
    fn short_lines_are_lines() {
        let accounts = accounts(
            "\n#\n+\nroot:x:0\napp:x:7:8\nbare:x:9:9::\n",
            "\n:\napp::8\n",
        );
        let found = Account::find(&accounts, "app").unwrap();
        assert_eq!((found.uid, found.gid, found.home.as_str()), (7, 8, "/"));
        assert_eq!(Account::find(&accounts, "bare").unwrap().home, "/");
        assert_eq!(Account::find(&accounts, "bare:app").unwrap().gid, 8);
    }

    /// containers/podman 6953.
    #[test]
    fn a_user_of_a_mounted_file_is_found() {
        let dir = rootfs();
        let volumes = tempfile::tempdir().unwrap();
        let at = |name: &str| volumes.path().join(name);
        std::fs::create_dir(at("etc")).unwrap();
        std::fs::write(at("etc/group"), "staff:x:50:me\n").unwrap();
        std::fs::write(at("passwd"), "me:x:1234:1234::/home/me:/bin/sh\n").unwrap();
        std::os::unix::fs::symlink(at("passwd"), at("link")).unwrap();
        std::os::unix::fs::symlink(at("passwd"), at("etc/passwd")).unwrap();
        let find = |volumes: &[Volume], name| {
            let accounts = Accounts::read(dir.path()).with(volumes);
            Account::find(&accounts, name)
        };
        let file = Volume::new(at("link"), "/etc/passwd");
        let whole = Volume::new(at("etc"), "/etc/");
        assert_eq!(find(&[], "web").unwrap().uid, 33);
        let both = [file.clone(), whole.clone()];
        let found = find(&both, "me").unwrap();
        assert_eq!((found.uid, found.groups), (1234, vec![50]));
        assert!(find(&both, "web").is_err(), "it is covered");
        // The group file is still that of the root.
        assert_eq!(find(&[file], "me:log").unwrap().gid, 40);
        // A symbolic link in a directory volume is not followed out of it.
        assert!(find(&[whole], "me").is_err());
    }
}
