//! Mapped users of a share: its files have other owners in the guest than on the host, as on an idmapped mount
//! (mount_setattr(2)). The server maps them itself, which needs neither a user namespace nor privileges, and works on all
//! file systems.

use rustix::io::Errno;

/// Maximum number of ranges, as in a user namespace (user_namespaces(7)).
const MAX_RANGES: usize = 340;

/// The owner that the guest is told for one that is not mapped. It is no ID: the guest's kernel shows its overflow user or
/// group (65534), permits no process to write as this owner, and has no root write such a file, as on an idmapped mount.
const NONE: u32 = u32::MAX;

/// The same in an access control list, where an invalid ID would make the list invalid: an ID that no process has.
const NOBODY: u32 = u32::MAX - 1;

/// A range of user or group IDs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// First ID of the files on the host.
    pub host: u32,
    /// First ID that the guest sees for them.
    pub guest: u32,
    /// Number of IDs, at least 1.
    pub count: u32,
}

/// Ranges of one kind of IDs, none of which overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ids(Vec<IdRange>);

impl Ids {
    fn new(ranges: Vec<IdRange>) -> Result<Self, String> {
        if ranges.is_empty() || ranges.len() > MAX_RANGES {
            let count = ranges.len();
            return Err(format!("{count} ranges of IDs, not 1 to {MAX_RANGES}"));
        }
        let end = |first: u32, range: &IdRange| u64::from(first) + u64::from(range.count);
        for (index, range) in ranges.iter().enumerate() {
            // The last number is none (-1).
            let most = end(range.host, range).max(end(range.guest, range));
            if range.count == 0 || most > u64::from(u32::MAX) {
                let IdRange { host, guest, count } = range;
                return Err(format!("{host} {guest} {count} is no range of IDs"));
            }
            let overlap = |first: u32, other: u32, with: &IdRange| {
                u64::from(first) < end(other, with) && u64::from(other) < end(first, range)
            };
            let overlaps = ranges[..index].iter().any(|other| {
                overlap(range.host, other.host, other) || overlap(range.guest, other.guest, other)
            });
            if overlaps {
                return Err("ranges of IDs overlap".into());
            }
        }
        Ok(Self(ranges))
    }

    fn guest(&self, id: u32) -> Option<u32> {
        self.0.iter().find_map(|range| {
            let offset = id.checked_sub(range.host)?;
            (offset < range.count).then(|| range.guest + offset)
        })
    }

    fn host(&self, id: u32) -> Option<u32> {
        self.0.iter().find_map(|range| {
            let offset = id.checked_sub(range.guest)?;
            (offset < range.count).then(|| range.host + offset)
        })
    }
}

/// The mapping of a share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedUsers {
    users: Ids,
    groups: Ids,
    /// Whether the mapping also applies to what is mounted below the shared directory.
    pub(super) recursive: bool,
}

impl MappedUsers {
    /// A mapping; `recursive` if it applies to what is mounted below the shared directory, too.
    ///
    /// # Errors
    /// The invalid range, or if some overlap.
    pub fn new(users: Vec<IdRange>, groups: Vec<IdRange>, recursive: bool) -> Result<Self, String> {
        Ok(Self {
            users: Ids::new(users).map_err(|why| format!("users: {why}"))?,
            groups: Ids::new(groups).map_err(|why| format!("groups: {why}"))?,
            recursive,
        })
    }

    /// The user that the guest sees.
    pub(super) fn guest_user(&self, id: u32) -> u32 {
        self.users.guest(id).unwrap_or(NONE)
    }

    /// The group that the guest sees.
    pub(super) fn guest_group(&self, id: u32) -> u32 {
        self.groups.guest(id).unwrap_or(NONE)
    }

    /// The user on the host.
    ///
    /// # Errors
    /// EOVERFLOW for one that is not mapped, as on an idmapped mount.
    pub(super) fn host_user(&self, id: u32) -> Result<u32, Errno> {
        self.users.host(id).ok_or(Errno::OVERFLOW)
    }

    /// The group on the host.
    ///
    /// # Errors
    /// EOVERFLOW for one that is not mapped.
    pub(super) fn host_group(&self, id: u32) -> Result<u32, Errno> {
        self.groups.host(id).ok_or(Errno::OVERFLOW)
    }

    /// The access control list that the guest sees.
    pub(super) fn guest_acl(&self, value: &mut [u8]) {
        for (tag, id) in acl_entries(value) {
            let mapped = match tag {
                ACL_USER => self.users.guest(u32::from_le_bytes(*id)),
                ACL_GROUP => self.groups.guest(u32::from_le_bytes(*id)),
                _ => continue,
            };
            *id = mapped.unwrap_or(NOBODY).to_le_bytes();
        }
    }

    /// The access control list on the host.
    ///
    /// # Errors
    /// EOVERFLOW for users and groups that are not mapped.
    pub(super) fn host_acl(&self, value: &mut [u8]) -> Result<(), Errno> {
        for (tag, id) in acl_entries(value) {
            let mapped = match tag {
                ACL_USER => self.host_user(u32::from_le_bytes(*id))?,
                ACL_GROUP => self.host_group(u32::from_le_bytes(*id))?,
                _ => continue,
            };
            *id = mapped.to_le_bytes();
        }
        Ok(())
    }
}

/// Entries of an access control list for users and groups by ID (include/uapi/linux/posix_acl.h).
const ACL_USER: u16 = 0x02;
const ACL_GROUP: u16 = 0x08;

/// Sizes in the extended attribute with a list (include/uapi/linux/posix_acl_xattr.h): a version, then the entries, each with
/// a tag, permissions and an ID.
const ACL_HEADER: usize = 4;
const ACL_ENTRY: usize = 8;

fn acl_entries(value: &mut [u8]) -> impl Iterator<Item = (u16, &mut [u8; 4])> {
    let entries = value.get_mut(ACL_HEADER..).unwrap_or_default();
    entries.chunks_exact_mut(ACL_ENTRY).filter_map(|entry| {
        let (tag, id) = entry.split_first_chunk_mut::<2>()?;
        Some((u16::from_le_bytes(*tag), id.last_chunk_mut()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(host: u32, guest: u32, count: u32) -> IdRange {
        IdRange { host, guest, count }
    }

    #[test]
    fn ids_are_mapped_both_ways() {
        let users = vec![range(0, 100_000, 10), range(50, 7, 1)];
        let mapped = MappedUsers::new(users, vec![range(5, 6, 1)], false).unwrap();
        assert_eq!(mapped.guest_user(9), 100_009);
        assert_eq!(mapped.guest_user(10), NONE);
        assert_eq!(mapped.guest_user(50), 7);
        assert_eq!(mapped.guest_group(5), 6);
        assert_eq!(mapped.guest_group(6), NONE);
        assert_eq!(mapped.host_user(100_000), Ok(0));
        assert_eq!(mapped.host_user(7), Ok(50));
        assert_eq!(mapped.host_user(0), Err(Errno::OVERFLOW));
        assert_eq!(mapped.host_group(6), Ok(5));
    }

    #[test]
    fn ranges_are_valid() {
        let one = || vec![range(0, 0, 1)];
        let said = |users| MappedUsers::new(users, one(), false).unwrap_err();
        assert!(said(vec![]).contains("0 ranges"));
        assert!(said(vec![range(0, 0, 1); 341]).contains("341 ranges"));
        assert!(said(vec![range(0, 0, 0)]).contains("no range"));
        assert!(said(vec![range(u32::MAX, 0, 1)]).contains("no range"));
        assert!(said(vec![range(0, 0, 5), range(4, 10, 1)]).contains("overlap"));
        assert!(said(vec![range(0, 10, 5), range(9, 14, 1)]).contains("overlap"));
        assert!(MappedUsers::new(vec![range(0, 0, u32::MAX)], one(), true).is_ok());
        let groups = MappedUsers::new(one(), vec![], false);
        assert!(groups.unwrap_err().starts_with("groups"));
    }

    #[test]
    fn lists_are_mapped() {
        let mapped = MappedUsers::new(vec![range(1, 11, 1)], vec![range(2, 22, 1)], false).unwrap();
        let entry = |tag: u16, id: u32| {
            let mut entry = [tag.to_le_bytes(), 7u16.to_le_bytes()].concat();
            entry.extend(id.to_le_bytes());
            entry
        };
        let list = |user, group| {
            let mut list = 2u32.to_le_bytes().to_vec();
            list.extend(entry(0x01, u32::MAX));
            list.extend(entry(ACL_USER, user));
            list.extend(entry(ACL_GROUP, group));
            list
        };
        let mut shown = list(1, 2);
        mapped.guest_acl(&mut shown);
        assert_eq!(shown, list(11, 22));
        mapped.host_acl(&mut shown).unwrap();
        assert_eq!(shown, list(1, 2));
        assert_eq!(mapped.host_acl(&mut list(1, 2)), Err(Errno::OVERFLOW));
        let mut others = list(3, 4);
        mapped.guest_acl(&mut others);
        assert_eq!(others, list(NOBODY, NOBODY));
        // A guest sends what it likes.
        mapped.guest_acl(&mut [1, 2]);
        mapped.host_acl(&mut [0; 9]).unwrap();
    }
}
