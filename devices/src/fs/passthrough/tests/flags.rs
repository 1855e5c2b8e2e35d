//! Flags of files, as shown by lsattr(1).

use super::*;
use crate::fs::wire::{FS_IOC_GETFLAGS, IoctlIn};
use std::path::Path;

/// libkrun/libkrun 867, containers/fuse-overlayfs 330: lsattr(1), and overlays that copy a file up.
#[test]
fn flags_of_files_are_the_hosts() {
    let f = fixture(0, false);
    let path = f.dir.path().join("file");
    std::fs::write(&path, "x").unwrap();
    let node = f.files.lookup(f.root, c"file").unwrap().nodeid;
    let ask = |nodeid, fh, cmd, out_size| {
        let arg = IoctlIn {
            fh,
            cmd,
            out_size,
            ..IoctlIn::default()
        };
        f.files.ioctl(nodeid, &arg)
    };
    let of_the_host = |path: &Path| {
        let flags = rustix::fs::ioctl_getflags(std::fs::File::open(path).unwrap());
        flags.map(|flags| flags.bits())
    };
    let file = f.files.open(node, &OpenIn::default()).unwrap().fh;
    assert_eq!(ask(node, file, FS_IOC_GETFLAGS, 4), of_the_host(&path));
    let directory = f.files.opendir(f.root).unwrap().fh;
    let expected = of_the_host(f.dir.path());
    assert_eq!(ask(f.root, directory, FS_IOC_GETFLAGS, 4), expected);
    // FS_IOC_SETFLAGS, and a reply of another size.
    assert_eq!(ask(node, file, 0x4008_6602, 0), Err(Errno::NOSYS));
    assert_eq!(ask(node, file, FS_IOC_GETFLAGS, 8), Err(Errno::NOSYS));
}
