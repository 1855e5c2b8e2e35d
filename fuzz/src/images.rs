//! Images: each is unpacked or rejected, and nothing outside its root changes.

use crate::directories::{Contents, Directory};
use crate::input::Input;
use koya_image::{Image, Limits, Options};
use std::fs;
use std::io::Write;
use std::path::Path;

/// Number of kinds of images (first byte of an input).
const KINDS: u8 = 8;

/// The last byte of a block that gets a header's checksum: the fuzzer would hardly find one.
const SEAL: u8 = 1;

/// Directories of an image.
static PLAN: Contents = Contents {
    name: "images",
    changing: &["image", "root", "scratch"],
    set_up: |dir| fs::write(dir.join("outside"), "outside"),
    fill: |_| Ok(()),
};

/// An image of the kind in the first byte: an index, a manifest, a configuration, a whole archive, or a layer that is
/// uncompressed, compressed here, or compressed in the input.
pub fn image_files(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    let dir = Directory::take(&PLAN);
    let at = |name: &str| dir.at(name);
    let mut path = at("image");
    let write =
        |name: &str, bytes: &[u8]| fs::write(at("image").join(name), bytes).expect("a file");
    let manifest = br#"[{"Config":"c","Layers":["l"]}]"#;
    match kind % KINDS {
        0 => write("index.json", rest),
        1 => write("manifest.json", rest),
        2 => {
            write("c", rest);
            write("l", &[0; 1024]);
            write("manifest.json", manifest);
        }
        3 => {
            path = at("image/archive");
            fs::write(&path, sealed(rest)).expect("a file");
        }
        kind => {
            write("c", b"{}");
            write("l", &layer(kind, rest));
            write("manifest.json", manifest);
        }
    }
    unpack(&path, &at("scratch"), &at("root"));
    let mut names: Vec<_> = fs::read_dir(dir.path())
        .expect("the directory")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["image", "outside", "root", "scratch"]);
    let outside = fs::read(at("outside")).expect("the file");
    assert_eq!(outside, b"outside");
}

/// Layers with entries and compressions chosen by the input, over a root that is not empty.
///
/// # Panics
/// If anything outside the root changes, or the host cannot create a directory.
pub fn image_layers(data: &[u8]) {
    let mut input = Input::new(data);
    let dir = Directory::take(&PLAN);
    let at = |name: &str| dir.at(name);
    let mut names = Vec::new();
    for number in 0..=input.byte() % 3 {
        let (packing, entries) = (input.byte() % 3 + 4, input.byte() % 8);
        let mut blocks = Vec::new();
        for _ in 0..entries {
            blocks.extend(entry(&mut input));
        }
        let name = format!("l{number}");
        fs::write(at("image").join(&name), layer(packing, &blocks)).expect("a file");
        names.push(name);
    }
    let manifest = serde_json::json!([{"Config": "c", "Layers": names}]);
    fs::write(at("image/manifest.json"), manifest.to_string()).expect("a file");
    fs::write(at("image/c"), "{}").expect("a file");
    unpack(&at("image"), &at("scratch"), &at("root"));
    let outside = fs::read(at("outside")).expect("the file");
    assert_eq!(outside, b"outside");
    let mut beside: Vec<_> = fs::read_dir(dir.path())
        .expect("the directory")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    beside.sort();
    assert_eq!(beside, ["image", "outside", "root", "scratch"]);
}

/// A header and its data.
fn entry(input: &mut Input<'_>) -> Vec<u8> {
    const NAMES: [&str; 14] = [
        "a",
        "a/b",
        "a/b/c",
        "b",
        "b/../a",
        "../outside",
        ".wh.a",
        "a/.wh.b",
        "a/.wh..wh..opq",
        "/b",
        "./a/",
        ".",
        "c/d/e",
        "",
    ];
    const LINKS: [&str; 9] = ["a", "b", "/", "..", "../outside", "../..", "a/b", "/a", ""];
    const RECORDS: [&str; 12] = [
        "path=a/b\n",
        "path=../outside\n",
        "linkpath=/\n",
        "size=5\n",
        "size=99999999999999\n",
        "uid=1000\n",
        "mtime=1.5\n",
        "mtime=-1\n",
        "SCHILY.xattr.user.a=b\n",
        "GNU.sparse.map=0,1,9,4294967\n",
        "GNU.sparse.major=1\n",
        "hdrcharset=BINARY\n",
    ];
    let kind = input.pick(b"0001222255567xgLKSV34");
    let mut content = match kind {
        b'x' | b'g' => {
            let mut records = String::new();
            for _ in 0..=input.byte() % 3 {
                let record = input.pick(&RECORDS);
                // The length includes its own digits.
                let len = record.len() + if record.len() < 7 { 2 } else { 3 };
                records += &format!("{len} {record}");
            }
            records.into_bytes()
        }
        b'L' | b'K' => input.pick(&NAMES).as_bytes().to_vec(),
        b'0' => input.bytes(40).to_vec(),
        _ => Vec::new(),
    };
    let name = input.pick(&NAMES);
    let mut block = header(kind, name, input.pick(&LINKS), content.len());
    let odd = input.byte();
    if odd >= 200 {
        // One byte of the header is changed: a number may become base 256.
        block[100 + usize::from(odd % 64)] = input.byte();
    }
    block[100..107].copy_from_slice(format!("{:07o}", input.word() & 0o7777).as_bytes());
    content = filled(&content);
    [block, content].concat()
}

/// A header without its checksum.
fn header(kind: u8, name: &str, link: &str, size: usize) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..107].copy_from_slice(b"0000644");
    block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    block[156] = kind;
    block[157..157 + link.len()].copy_from_slice(link.as_bytes());
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[511] = SEAL;
    block
}

fn filled(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn layer(kind: u8, rest: &[u8]) -> Vec<u8> {
    match kind {
        4 => sealed(rest),
        5 => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(&sealed(rest)).expect("memory");
            gzip.finish().expect("memory")
        }
        6 => {
            use ruzstd::encoding::{CompressionLevel, compress_to_vec};
            compress_to_vec(&*sealed(rest), CompressionLevel::Fastest)
        }
        _ => rest.to_vec(),
    }
}

fn unpack(path: &Path, scratch: &Path, root: &Path) {
    let options = Options {
        tag: None,
        limits: Limits {
            total: 1 << 20,
            entries: 300,
            ..Limits::default()
        },
    };
    if let Ok(image) = Image::open(path, scratch, &options) {
        image.defaults();
        image.unpack(root).ok();
    }
}

/// Computes the checksums of an archive's headers.
fn sealed(data: &[u8]) -> Vec<u8> {
    let mut out = data.to_vec();
    for block in out.chunks_exact_mut(512).filter(|block| block[511] == SEAL) {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A layer of these blocks in each compression.
    fn in_each(layer: &[u8]) -> [Vec<u8>; 3] {
        [4, 5, 6].map(|kind| [&[kind], layer].concat())
    }

    #[test]
    fn known_images() {
        let pax = b"30 GNU.sparse.map=0,1,9,4294967\n";
        let layers = [
            [header(b'2', "l", "/", 0), header(b'0', "l/outside", "", 0)].concat(),
            [
                header(b'2', "l", "../..", 0),
                header(b'0', "l/.wh.outside", "", 0),
            ]
            .concat(),
            [
                header(b'2', "l", "..", 0),
                header(b'0', "l/.wh..wh..opq", "", 0),
            ]
            .concat(),
            header(b'1', "h", "../outside", 0),
            header(b'0', "../outside", "", 0),
            [header(b'1', "a", "b", 0), header(b'1', "b", "a", 0)].concat(),
            [
                header(b'x', "p", "", pax.len()),
                filled(pax),
                header(b'0', "s", "", 1),
                filled(b"x"),
            ]
            .concat(),
            header(b'0', "f", "", 0o77777777777),
            header(b'x', "f", "", 0o77777777777),
            vec![0; 1024],
        ];
        for input in layers.iter().flat_map(|layer| in_each(layer)) {
            image_files(&input);
        }
        let documents: [&[u8]; 5] = [
            b"\0{\"manifests\":[{\"digest\":\"sha256:..\",\"size\":1}]}",
            b"\x01[{\"Config\":\"../outside\",\"Layers\":[\"../outside\"]}]",
            b"\x02{\"rootfs\":{\"diff_ids\":[\"sha256:\"]}}",
            b"\x07\x1f\x8b\x08\0\0\0\0\0\0\0",
            b"\x07\x28\xb5\x2f\xfd\xff\xff\xff\xff",
        ];
        documents.into_iter().for_each(image_files);
    }

    #[test]
    fn random_layers() {
        crate::tests::random(400, image_layers);
    }

    #[test]
    fn random_images() {
        crate::tests::random(400, |data| {
            image_files(data);
            // Random blocks are rarely headers: these are more often.
            for kind in [3, 4] {
                let mut blocks = vec![kind];
                for (at, byte) in data.iter().enumerate().take(6) {
                    let kinds = b"0123456xgLKS7";
                    let names = [
                        "a",
                        "a/b",
                        "b/../a",
                        ".wh.a",
                        "a/.wh..wh..opq",
                        "/",
                        "c/d/e",
                    ];
                    let pick = |list: usize| usize::from(*byte) % list;
                    let name = names[(pick(names.len()) + at) % names.len()];
                    let link = names[pick(names.len())];
                    let size = pick(40);
                    blocks.extend(header(kinds[pick(kinds.len())], name, link, size));
                    blocks.extend(filled(data.get(at..at + size).unwrap_or_default()));
                }
                image_files(&blocks);
            }
        });
    }
}
