//! Writes archives header by header, including invalid ones.

/// A tar archive under construction.
#[derive(Clone, Default)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

/// An entry with arbitrary properties.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) kind: u8,
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) data: Vec<u8>,
    /// Size in the header, if it differs from that of the data.
    pub(crate) size: Option<u64>,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: u64,
    pub(crate) device: (u32, u32),
    pub(crate) pax: Vec<(String, Vec<u8>)>,
    pub(crate) magic: &'static [u8; 8],
}

pub(crate) const USTAR: &[u8; 8] = b"ustar\x0000";
pub(crate) const GNU: &[u8; 8] = b"ustar  \0";
pub(crate) const V7: &[u8; 8] = &[0; 8];

pub(crate) fn item(kind: u8, name: &str) -> Item {
    Item {
        kind,
        name: name.into(),
        link: Vec::new(),
        data: Vec::new(),
        size: None,
        mode: if kind == b'5' { 0o755 } else { 0o644 },
        uid: rustix::process::geteuid().as_raw().into(),
        gid: rustix::process::getegid().as_raw().into(),
        mtime: 1_000_000,
        device: (0, 0),
        pax: Vec::new(),
        magic: USTAR,
    }
}

pub(crate) fn file(name: &str, data: impl AsRef<[u8]>) -> Item {
    Item {
        data: data.as_ref().to_vec(),
        ..item(b'0', name)
    }
}

pub(crate) fn dir(name: &str) -> Item {
    item(b'5', name)
}

pub(crate) fn symlink(name: &str, target: &str) -> Item {
    link(b'2', name, target)
}

pub(crate) fn hardlink(name: &str, target: &str) -> Item {
    link(b'1', name, target)
}

fn link(kind: u8, name: &str, target: &str) -> Item {
    Item {
        link: target.into(),
        ..item(kind, name)
    }
}

impl Item {
    pub(crate) fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.into(), value.as_ref().to_vec()));
        self
    }
}

/// `LENGTH KEY=VALUE\n`
pub(crate) fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
    let mut length = rest.len() + 1;
    while length.to_string().len() + rest.len() != length {
        length = rest.len() + length.to_string().len();
    }
    [length.to_string().as_bytes(), &rest].concat()
}

/// Writes a number in octal, or in base 256 if it does not fit.
fn number(field: &mut [u8], value: u64) {
    let text = format!("{value:0width$o}", width = field.len() - 1);
    if text.len() < field.len() {
        field[..text.len()].copy_from_slice(text.as_bytes());
        return;
    }
    let bytes = value.to_be_bytes();
    for (at, byte) in field.iter_mut().rev().enumerate() {
        *byte = *bytes.iter().rev().nth(at).unwrap_or(&0);
    }
    field[0] |= 0x80;
}

pub(crate) fn header(item: &Item) -> [u8; 512] {
    let mut block = [0; 512];
    let put = |block: &mut [u8; 512], at: usize, most: usize, bytes: &[u8]| {
        let len = bytes.len().min(most);
        block[at..at + len].copy_from_slice(&bytes[..len]);
    };
    put(&mut block, 0, 100, &item.name);
    number(&mut block[100..108], item.mode.into());
    number(&mut block[108..116], item.uid);
    number(&mut block[116..124], item.gid);
    number(
        &mut block[124..136],
        item.size.unwrap_or(item.data.len() as u64),
    );
    number(&mut block[136..148], item.mtime);
    block[156] = item.kind;
    put(&mut block, 157, 100, &item.link);
    put(&mut block, 257, 8, item.magic);
    if item.magic != V7 {
        number(&mut block[329..337], item.device.0.into());
        number(&mut block[337..345], item.device.1.into());
    }
    seal(&mut block);
    block
}

/// Sets the checksum of a header.
pub(crate) fn seal(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

impl Tar {
    pub(crate) fn of(items: &[Item]) -> Vec<u8> {
        let mut tar = Self::default();
        items.iter().for_each(|item| tar.add(item));
        tar.end()
    }

    pub(crate) fn add(&mut self, item: &Item) {
        let mut pax = item.pax.clone();
        let is_gnu = item.magic == GNU;
        for (long, kind, key) in [(&item.name, b'L', "path"), (&item.link, b'K', "linkpath")] {
            if long.len() > 100 && is_gnu {
                let data = [long.as_slice(), b"\0"].concat();
                self.block(&Item {
                    data,
                    magic: GNU,
                    ..self::item(kind, "././@LongLink")
                });
            } else if long.len() > 100 {
                pax.insert(0, (key.into(), long.clone()));
            }
        }
        if !pax.is_empty() {
            let data = pax
                .iter()
                .flat_map(|(key, value)| record(key, value))
                .collect();
            self.block(&Item {
                data,
                ..self::item(b'x', "PaxHeaders/x")
            });
        }
        self.block(item);
    }

    /// One header and its data.
    pub(crate) fn block(&mut self, item: &Item) {
        self.0.extend_from_slice(&header(item));
        self.data(&item.data);
    }

    pub(crate) fn data(&mut self, data: &[u8]) {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// A sparse file in each of the forms that GNU tar writes: "old", "0.0", "0.1", "1.0".
pub(crate) fn sparse(tar: &mut Tar, form: &str, name: &str, size: u64, parts: &[(u64, &[u8])]) {
    let data: Vec<u8> = parts.iter().flat_map(|(_, bytes)| bytes.to_vec()).collect();
    let mut pairs: Vec<(u64, u64)> = parts
        .iter()
        .map(|(at, bytes)| (*at, bytes.len() as u64))
        .collect();
    // GNU tar ends a map with an empty segment at the end.
    pairs.push((size, 0));
    let plain = file(name, &data);
    let size_text = size.to_string();
    match form {
        "old" => old_sparse(tar, name, size, &pairs, &data),
        "0.0" => {
            let mut item = plain
                .pax("GNU.sparse.size", &size_text)
                .pax("GNU.sparse.numblocks", pairs.len().to_string());
            for (at, length) in pairs {
                item = item
                    .pax("GNU.sparse.offset", at.to_string())
                    .pax("GNU.sparse.numbytes", length.to_string());
            }
            tar.add(&item);
        }
        "0.1" => {
            let map: Vec<String> = pairs
                .iter()
                .map(|(at, length)| format!("{at},{length}"))
                .collect();
            let item = Item {
                name: b"GNUSparseFile.0/x".to_vec(),
                ..plain
            };
            tar.add(
                &item
                    .pax("GNU.sparse.name", name)
                    .pax("GNU.sparse.size", &size_text)
                    .pax("GNU.sparse.numblocks", pairs.len().to_string())
                    .pax("GNU.sparse.map", map.join(",")),
            );
        }
        "1.0" => {
            let mut map = format!("{}\n", pairs.len());
            pairs
                .iter()
                .for_each(|(at, length)| map += &format!("{at}\n{length}\n"));
            let mut whole = map.into_bytes();
            whole.resize(whole.len().next_multiple_of(512), 0);
            whole.extend_from_slice(&data);
            let item = Item {
                data: whole,
                name: b"GNUSparseFile.0/x".to_vec(),
                ..plain
            };
            tar.add(
                &item
                    .pax("GNU.sparse.major", "1")
                    .pax("GNU.sparse.minor", "0")
                    .pax("GNU.sparse.name", name)
                    .pax("GNU.sparse.realsize", &size_text),
            );
        }
        _ => unreachable!("no form {form}"),
    }
}

fn old_sparse(tar: &mut Tar, name: &str, size: u64, pairs: &[(u64, u64)], data: &[u8]) {
    let mut block = header(&Item {
        kind: b'S',
        magic: GNU,
        size: Some(data.len() as u64),
        ..file(name, "")
    });
    // GNU has its own fields in the place of the POSIX prefix.
    number(&mut block[483..495], size);
    let (first, rest) = pairs.split_at(pairs.len().min(4));
    for (at, pair) in first.iter().enumerate() {
        number(&mut block[386 + at * 24..][..12], pair.0);
        number(&mut block[398 + at * 24..][..12], pair.1);
    }
    block[482] = u8::from(!rest.is_empty());
    seal(&mut block);
    tar.0.extend_from_slice(&block);
    let chunks: Vec<_> = rest.chunks(21).collect();
    for (index, chunk) in chunks.iter().enumerate() {
        let mut block = [0; 512];
        for (at, pair) in chunk.iter().enumerate() {
            number(&mut block[at * 24..][..12], pair.0);
            number(&mut block[at * 24 + 12..][..12], pair.1);
        }
        block[504] = u8::from(index + 1 < chunks.len());
        tar.0.extend_from_slice(&block);
    }
    tar.data(data);
}
