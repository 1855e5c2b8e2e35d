//! Archives as written by programs, and truncated ones.

use super::*;
use crate::tests::writer::{GNU, Item, Tar, USTAR, V7, file, header, item, sparse};
use std::io::Seek;

impl Source for &[u8] {}

/// An entry and its data as stored.
type Whole = (Entry, Vec<u8>);

fn read(bytes: &[u8]) -> io::Result<(Vec<Whole>, Option<End>)> {
    let mut reader = Reader::new(bytes, 4096);
    let mut all = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut data = Vec::new();
        reader.read_to_end(&mut data)?;
        all.push((entry, data));
    }
    Ok((all, reader.end()))
}

#[test]
fn long_names_are_read_in_every_form() {
    let long = "d/".repeat(90) + "f";
    for magic in [USTAR, GNU] {
        let tar = Tar::of(&[Item {
            magic,
            link: long.clone().into(),
            ..item(b'2', &long)
        }]);
        let (all, end) = read(&tar).unwrap();
        assert_eq!((all.len(), end), (1, Some(End::Marked)));
        assert_eq!(all[0].0.name, long.as_bytes());
        assert_eq!(all[0].0.link, long.as_bytes());
    }
    // Only ustar has a prefix.
    let mut block = header(&file("name", ""));
    block[345..351].copy_from_slice(b"prefix");
    crate::tests::writer::seal(&mut block);
    assert_eq!(read(&block).unwrap().0[0].0.name, b"prefix/name");
}

#[test]
fn old_archives_have_directories_by_their_names() {
    let tar = Tar::of(&[
        Item {
            magic: V7,
            ..item(0, "d/")
        },
        Item {
            magic: V7,
            ..item(0, "f")
        },
    ]);
    let (all, _) = read(&tar).unwrap();
    assert_eq!(
        (all[0].0.kind, all[1].0.kind),
        (Kind::Directory, Kind::Regular)
    );
}

#[test]
fn links_have_no_data_whatever_their_size_is_said_to_be() {
    let link = Item {
        size: Some(7),
        link: b"f".to_vec(),
        ..item(b'1', "l")
    };
    let (all, _) = read(&Tar::of(&[link, file("f", "after")])).unwrap();
    assert_eq!(all[1].1, b"after");
}

#[test]
fn what_a_global_header_says_is_passed_over() {
    let comment = crate::tests::writer::record("comment", b"0123");
    let global = Item {
        data: comment,
        ..item(b'g', "pax_global_header")
    };
    let (all, _) = read(&Tar::of(&[global, file("f", "x")])).unwrap();
    assert_eq!(all.len(), 1);
}

#[test]
fn sparse_files_of_all_forms_are_whole() {
    for form in ["old", "0.0", "0.1", "1.0"] {
        for count in [0u64, 1, 4, 5, 60] {
            let part = [7u8; 300];
            let parts: Vec<_> = (0..count).map(|n| (n * 4096 + 100, &part[..])).collect();
            let size = count * 4096 + 5000;
            let mut tar = Tar::default();
            sparse(&mut tar, form, "f", size, &parts);
            tar.add(&file("after", "after"));
            let tar = tar.end();
            let mut reader = Reader::new(tar.as_slice(), 1 << 16);
            let entry = reader.next_entry().unwrap().unwrap();
            assert_eq!(
                (entry.name.as_slice(), entry.size),
                (&b"f"[..], size),
                "{form} {count}"
            );
            let mut out = tempfile::tempfile().unwrap();
            crate::layer::write_data(&mut reader, &entry, &mut out).unwrap();
            let mut found = Vec::new();
            out.rewind().unwrap();
            out.read_to_end(&mut found).unwrap();
            let mut wanted = vec![0; size as usize];
            parts
                .iter()
                .for_each(|(at, part)| wanted[*at as usize..][..300].copy_from_slice(part));
            assert!(found == wanted, "{form} {count}");
            assert_eq!(reader.next_entry().unwrap().unwrap().name, b"after");
        }
    }
}

#[test]
fn broken_sparse_maps_are_refused() {
    let numbers = |map: &str, size: &str| {
        let item = file("f", "12345")
            .pax("GNU.sparse.map", map)
            .pax("GNU.sparse.size", size);
        read(&Tar::of(&[item]))
    };
    assert!(numbers("0,2,7,3", "10").is_ok());
    for (map, size) in [
        ("0,2,1,3", "10"),
        ("7,3,0,2", "10"),
        ("0,2,8,3", "10"),
        ("0,2,7,2", "10"),
        ("0,5,1", "10"),
        ("0,5,18446744073709551615,1", "10"),
        ("0,2,9223372036854775807,3", "18446744073709551615"),
    ] {
        assert!(numbers(map, size).is_err(), "{map}");
    }
    let huge = file("f", [b"99999999999\n".as_slice(), &[0; 500]].concat());
    let huge = huge
        .pax("GNU.sparse.major", "1")
        .pax("GNU.sparse.minor", "0")
        .pax("GNU.sparse.realsize", "9");
    assert!(read(&Tar::of(&[huge])).is_err());
}

#[test]
fn a_cut_archive_is_known_wherever_it_is_cut() {
    let mut tar = Tar::default();
    tar.add(&Item {
        name: b"d/".repeat(80),
        ..file("", "some data")
    });
    sparse(&mut tar, "1.0", "s", 9000, &[(4096, b"part")]);
    sparse(
        &mut tar,
        "old",
        "o",
        9000,
        &[(1, b"a"), (3, b"b"), (5, b"c"), (7, b"d"), (9, b"e")],
    );
    let whole = tar.end();
    assert_eq!(read(&whole).unwrap().1, Some(End::Marked));
    for at in 0..whole.len() {
        if let Ok((_, end)) = read(&whole[..at]) {
            assert_eq!(end, Some(End::Unmarked), "cut at {at}");
            // Between entries, or in the end marker.
            assert!(at % 512 == 0, "cut at {at}");
        }
    }
}

#[test]
fn what_is_too_big_is_refused_before_it_is_read() {
    for kind in [b'x', b'g', b'L', b'K'] {
        let item = Item {
            size: Some(1 << 30),
            ..item(kind, "x")
        };
        let error = read(&header(&item)).unwrap_err().to_string();
        assert!(error.contains("extended header"), "{error}");
    }
    let item = Item {
        size: Some(u64::MAX >> 1),
        ..item(b'0', "x")
    };
    assert_eq!(
        read(&header(&item)).unwrap_err().kind(),
        io::ErrorKind::UnexpectedEof
    );
}
