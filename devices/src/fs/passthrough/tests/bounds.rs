//! Numbers that only a malicious guest sends.

use super::*;
use rustix::fs::{SeekFrom, seek};

/// pwritev2(2) writes at the descriptor's position if the offset is -1.
#[test]
fn offsets_beyond_those_of_files_are_refused() {
    let f = fixture(0, false);
    std::fs::write(f.dir.path().join("x"), "four").unwrap();
    let node = f.files.lookup(f.root, c"x").unwrap().nodeid;
    let both = OpenIn {
        flags: OFlags::RDWR.bits(),
        open_flags: 0,
    };
    let fh = f.files.open(node, &both).unwrap().fh;
    let handle = f.files.handle(fh, node).unwrap();
    seek(&handle.file, SeekFrom::Start(1)).unwrap();
    let mut bytes = *b"abc";
    let slice = vm_memory::VolatileSlice::from(&mut bytes[..]);
    for offset in [u64::MAX, u64::MAX - 1, 1 << 63] {
        let (write, read) = (
            WriteIn {
                fh,
                offset,
                size: 3,
                ..WriteIn::default()
            },
            ReadIn {
                fh,
                offset,
                size: 3,
                ..ReadIn::default()
            },
        );
        let written = f.files.write(node, &write, &[slice]);
        assert_eq!(written, Err(Errno::INVAL), "{offset:#x}");
        let read = f.files.read(node, &read, &[slice]);
        assert_eq!(read, Err(Errno::INVAL), "{offset:#x}");
    }
    let text = std::fs::read(f.dir.path().join("x")).unwrap();
    assert_eq!(text, b"four");
}
