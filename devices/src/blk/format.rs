//! Recognizes files that are not raw images: virtual disk containers, whose format the guest would see and destroy by
//! writing, and compressed files.
//!
//! This is only used to refuse files. Nothing is ever interpreted as another format because of its contents,
//! since a guest can write the first bytes of its own disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Sizes in bytes of the areas that contain signatures: the beginning of the file and the last sector.
const HEAD: usize = 512;
const TAIL: usize = 512;

/// A format, the offset of its signature within the area, and the signature.
type Signature = (&'static str, usize, &'static [u8]);

const HEAD_SIGNATURES: &[Signature] = &[
    ("a qcow2 image", 0, b"QFI\xfb"),
    ("a QED image", 0, b"QED\0"),
    ("a VHDX image", 0, b"vhdxfile"),
    ("a VHD (vpc) image", 0, b"conectix"),
    ("a VMDK image", 0, b"KDMV"),
    ("a VMDK image", 0, b"COWD"),
    ("a VMDK description", 0, b"# Disk DescriptorFile"),
    ("a VDI image", 64, b"\x7f\x10\xda\xbe"),
    ("a Parallels image", 0, b"WithoutFreeSpace"),
    ("a Parallels image", 0, b"WithouFreSpacExt"),
    ("a Bochs image", 0, b"Bochs Virtual HD Image"),
    ("compressed (gzip)", 0, b"\x1f\x8b\x08"),
    ("compressed (xz)", 0, b"\xfd7zXZ\0"),
    ("compressed (zstd)", 0, b"\x28\xb5\x2f\xfd"),
    ("compressed (lz4)", 0, b"\x04\x22\x4d\x18"),
    ("compressed (lzip)", 0, b"LZIP\x01"),
    ("compressed (zip)", 0, b"PK\x03\x04"),
    ("compressed (7z)", 0, b"7z\xbc\xaf\x27\x1c"),
];

/// Formats with a signature at the beginning of the last sector. A fixed VHD is a raw image followed by such
/// a sector, which is not part of the disk.
const TAIL_SIGNATURES: &[Signature] = &[
    ("a VHD (vpc) image", 0, b"conectix"),
    ("an Apple disk image", 0, b"koly"),
];

/// The format of a file, if it is one of these. A CD image (ISO 9660) is raw, like the file system of any
/// disk.
///
/// # Errors
/// If the file can't be read.
pub fn foreign_format(file: &File) -> io::Result<Option<&'static str>> {
    let mut head = [0; HEAD];
    read(file, &mut head, 0)?;
    let bzip2 = head.starts_with(b"BZh") && head[4..10] == *b"1AY&SY";
    if bzip2 {
        return Ok(Some("compressed (bzip2)"));
    }
    if let Some(found) = find(HEAD_SIGNATURES, &head) {
        return Ok(Some(found));
    }
    let Some(at) = file.metadata()?.len().checked_sub(TAIL as u64) else {
        return Ok(None);
    };
    let mut tail = [0; TAIL];
    read(file, &mut tail, at)?;
    Ok(find(TAIL_SIGNATURES, &tail))
}

fn find(signatures: &[Signature], bytes: &[u8]) -> Option<&'static str> {
    let mut signatures = signatures.iter();
    let found = signatures.find(|(_, at, signature)| bytes[*at..].starts_with(signature));
    found.map(|(name, ..)| *name)
}

/// Reads up to the end of the file.
fn read(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], at + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64, signatures: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        for (at, signature) in signatures {
            file.write_all_at(signature, *at).unwrap();
        }
        file
    }

    #[test]
    fn formats_are_recognized_by_their_signatures() {
        for (name, at, signature) in HEAD_SIGNATURES {
            let found = foreign_format(&file(1 << 20, &[(*at as u64, signature)])).unwrap();
            assert_eq!(found, Some(*name));
            // At another offset the same bytes are data.
            let found = foreign_format(&file(1 << 20, &[(*at as u64 + 4096, signature)])).unwrap();
            assert_eq!(found, None, "{name}");
        }
        let bzip2 = foreign_format(&file(4096, &[(0, b"BZh91AY&SY")])).unwrap();
        assert_eq!(bzip2, Some("compressed (bzip2)"));
        let fixed = foreign_format(&file((1 << 20) + 512, &[(1 << 20, b"conectix")])).unwrap();
        assert_eq!(fixed, Some("a VHD (vpc) image"));
    }

    #[test]
    fn disk_contents_are_raw() {
        for (at, signature) in [
            (32_769, &b"CD001"[..]),
            (510, b"\x55\xaa"),
            (0, b"LUKS\xba\xbe"),
            (1080, b"\x53\xef"),
            (257, b"ustar"),
            (0, b"BZh"),
        ] {
            assert_eq!(
                foreign_format(&file(1 << 20, &[(at, signature)])).unwrap(),
                None,
                "{signature:?}"
            );
        }
        for len in [0, 1, 511] {
            assert_eq!(foreign_format(&file(len, &[])).unwrap(), None);
        }
    }
}
