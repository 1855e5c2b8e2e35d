//! Layers with hand-written expected trees: cases that umoci refuses and other engines accept, and hostile ones.

use super::writer::{GNU, Item, Tar, dir, file, hardlink, item, record, sparse, symlink};
use super::*;
use crate::Limits;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

/// Unpacks layers of a layout.
fn stack(layers: &[Vec<u8>]) -> Result<tempfile::TempDir, Error> {
    let layout = Layout::new();
    layout.index(&[layout.plain(layers)]);
    unpack(layout.path()).map(|(root, _)| root)
}

fn one(items: &[Item]) -> Result<tempfile::TempDir, Error> {
    stack(&[Tar::of(items)])
}

fn names(root: &tempfile::TempDir) -> Vec<String> {
    let all = snapshot::of(root.path());
    let names = all.keys().map(|path| path.to_str().unwrap().to_owned());
    names.filter(|name| !name.is_empty()).collect()
}

#[test]
fn a_global_header_is_passed_over_and_makes_no_file() {
    let global = Item {
        data: [record("comment", b"0123"), record("uid", b"77")].concat(),
        ..item(b'g', "pax_global_header")
    };
    let root = one(&[global, file("f", "x")]).unwrap();
    assert_eq!(names(&root), ["f"]);
    let own = rustix::process::geteuid().as_raw();
    assert_eq!(fs::metadata(root.path().join("f")).unwrap().uid(), own);
}

#[test]
fn hard_links_may_come_before_their_targets() {
    let items = [
        hardlink("a/first", "a/second"),
        hardlink("a/second", "b/file"),
        hardlink("gone/link", "b/file"),
        file(".wh.gone", ""),
        hardlink("later", "b/file"),
        file("later", "a file of its own"),
        file("b/file", "text"),
    ];
    let root = one(&items).unwrap();
    assert_eq!(
        fs::metadata(root.path().join("a/first")).unwrap().nlink(),
        4
    );
    assert_eq!(fs::metadata(root.path().join("later")).unwrap().nlink(), 1);
    for items in [
        vec![hardlink("a", "b"), hardlink("b", "a")],
        vec![hardlink("a", "nowhere")],
        vec![hardlink("a", "a")],
        vec![file("a", "x"), hardlink("a", "a")],
    ] {
        assert!(
            refusal(one(&items)).contains("which is not there"),
            "{items:?}"
        );
    }
    assert!(refusal(one(&[dir("d"), hardlink("a", "d")])).contains("directory"));
    assert!(refusal(one(&[hardlink("a", "/")])).contains("root"));
}

#[test]
fn sparse_files_of_the_old_form_have_their_holes() {
    let mut tar = Tar::default();
    let size = 3 << 30;
    let parts: Vec<(u64, &[u8])> = (0..6).map(|n| (n << 28, &b"part"[..])).collect();
    sparse(&mut tar, "old", "old", size, &parts);
    sparse(&mut tar, "1.0", "new", 1 << 40, &[((1 << 40) - 4, b"tail")]);
    let root = stack(&[tar.end()]).unwrap();
    for (name, wanted) in [("old", size), ("new", 1 << 40)] {
        let data = fs::metadata(root.path().join(name)).unwrap();
        assert_eq!(data.len(), wanted);
        assert!(data.blocks() < 2048, "{name} has {} blocks", data.blocks());
    }
}

#[test]
fn what_aufs_kept_for_itself_is_left_out() {
    let root = one(&[
        dir(".wh..wh.plnk"),
        file(".wh..wh.plnk/70.1", "x"),
        file(".wh..wh.aufs", ""),
        file("f", "x"),
    ])
    .unwrap();
    assert_eq!(names(&root), ["f"]);
}

#[test]
fn no_entry_gets_out_of_the_root() {
    let outside = tempfile::tempdir().unwrap();
    let out = outside.path().to_str().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    fs::create_dir(outside.path().join("dir")).unwrap();
    let secret = format!("{out}/secret");
    let up = "../".repeat(40);
    let lower = Tar::of(&[
        symlink("link", out),
        symlink("up", &format!("{up}{}", &out[1..])),
        symlink("file", &secret),
        symlink("loop", "loop"),
    ]);
    let upper = Tar::of(&[
        file("link/new", "x"),
        file("up/new2", "x"),
        file("file", "replaced"),
        file(&format!("{up}{}/new3", &out[1..]), "x"),
        file(&format!("{out}/new4"), "x"),
        file("link/.wh.secret", ""),
        file("up/.wh..wh..opq", ""),
        dir("link/dir"),
    ]);
    let before = snapshot::of(outside.path());
    let root = stack(&[lower.clone(), upper]).unwrap();
    assert_eq!(snapshot::of(outside.path()), before);
    for name in ["new", "new2", "new3", "new4"] {
        assert!(root.path().join(&out[1..]).join(name).exists(), "{name}");
    }
    // A hard link does not reach files of the host.
    let error = refusal(stack(&[
        lower.clone(),
        Tar::of(&[hardlink("hard", "link/secret")]),
    ]));
    assert!(error.contains("which is not there"), "{error}");
    assert!(refusal(stack(&[lower, Tar::of(&[file("loop/f", "x")])])).contains("links"));
}

#[test]
fn what_means_nothing_is_refused_by_name() {
    let deep = "d/".repeat(600) + "f";
    let long = "n".repeat(5000);
    let cases = [
        (vec![file(".wh.", "")], "a whiteout of no name"),
        (vec![file(".wh...", "")], "a whiteout of no name"),
        (vec![file(".wh.a/b", "")], "a whiteout has nothing in it"),
        (vec![file("", "x")], "the root must be a directory"),
        (vec![symlink("/", "x")], "the root must be a directory"),
        (vec![symlink("l", "")], "a link to nothing"),
        (vec![file("f", ""), file("f/g", "")], "is not a directory"),
        (vec![item(b'V', "volume")], "type 'V'"),
        (vec![file(&deep, "")], "directories deep"),
        (
            vec![Item {
                magic: GNU,
                ..file(&long, "")
            }],
            "a name of more than",
        ),
        (
            vec![file("f", "").pax("SCHILY.xattr.user.koya.x", "1")],
            "Koya",
        ),
    ];
    for (items, said) in cases {
        let error = refusal(one(&items));
        assert!(error.starts_with("image: layer 1: "), "{error}");
        assert!(
            error.contains(said) && !error.contains('\n'),
            "{error}, not {said}"
        );
    }
    if rustix::process::geteuid().is_root() {
        let error = refusal(one(&[file("f", "").pax("uid", "4294967295")]));
        assert!(error.contains("owner"), "{error}");
    }
}

#[test]
fn modes_and_times_of_directories_are_those_of_their_last_entries() {
    let shut = |mode| Item { mode, ..dir("d") };
    let lower = Tar::of(&[
        shut(0o500),
        file("d/a", "x"),
        dir("d/e"),
        file("d/e/f", "x"),
    ]);
    let upper = Tar::of(&[file("d/e/g", "x"), file("d/.wh.a", ""), file("new/f", "x")]);
    let root = stack(&[lower, upper]).unwrap();
    let at = |name: &str| fs::metadata(root.path().join(name)).unwrap();
    assert_eq!(
        (at("d").mode() & 0o7777, at("d").mtime()),
        (0o500, 1_000_000)
    );
    assert_eq!(
        (at("d/e").mode() & 0o7777, at("d/e").mtime()),
        (0o755, 1_000_000)
    );
    assert_eq!((at("new").mode() & 0o7777, at("new").mtime()), (0o755, 0));
    assert_eq!(names(&root), ["d", "d/e", "d/e/f", "d/e/g", "new", "new/f"]);
}

#[test]
fn device_nodes_have_numbers_that_exist() {
    if !rustix::process::geteuid().is_root() {
        println!("not run: device nodes need root");
        return;
    }
    let device = |number| Item {
        device: number,
        ..item(b'3', "null")
    };
    let root = one(&[device((1, 3))]).unwrap();
    let made = fs::metadata(root.path().join("null")).unwrap();
    assert!(made.file_type().is_char_device());
    assert_eq!(made.rdev(), rustix::fs::makedev(1, 3));
    assert!(refusal(one(&[device((1 << 12, 0))])).contains("there is no device"));
}

#[test]
fn a_whiteout_looks_once_at_what_its_own_layer_has() {
    // Would otherwise take a hundred million lookups.
    let mut items: Vec<_> = (0..2000).map(|n| file(&format!("d/{n}"), "")).collect();
    for _ in 0..25_000 {
        items.push(file("d/.wh..wh..opq", ""));
        items.push(file(".wh.d", ""));
    }
    items.push(file("d/last", ""));
    // CPU time, since other processes may run at the same time.
    let spent = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime).tv_sec;
    let began = spent();
    let root = stack(&[Tar::of(&[file("d/lower", "")]), Tar::of(&items)]).unwrap();
    assert_eq!(fs::read_dir(root.path().join("d")).unwrap().count(), 2001);
    assert!(spent() - began < 30, "{} s", spent() - began);
}

#[test]
fn a_path_with_too_many_symbolic_links_is_refused() {
    let round = "x/../".repeat(400);
    let mut items = vec![dir("x")];
    items.extend((0..30).map(|n| symlink(&format!("l{n}"), &format!("{round}l{}", n + 1))));
    items.push(file("l0/f", ""));
    assert!(refusal(one(&items)).contains("too many symbolic links"));
}

#[test]
fn what_is_more_than_the_limits_is_refused() {
    let layout = Layout::new();
    let layer = Tar::of(&[file("a", vec![0; 100_000]), file("b/c/d", "x")]);
    let layers = [(gzip(&layer), layer.as_slice())];
    layout.index(&[layout.manifest([OCI_MANIFEST, OCI_CONFIG, OCI_LAYER], &layers, json!({}))]);
    let with = |change: fn(&mut Limits)| {
        let mut options = Options::default();
        change(&mut options.limits);
        unpack_with(layout.path(), &options)
    };
    assert!(with(|limits| limits.entries = 4).is_ok());
    assert!(refusal(with(|limits| limits.entries = 3)).contains("more than 3 entries"));
    assert!(refusal(with(|limits| limits.total = 100_000)).contains("more than 100000 bytes"));
    assert!(refusal(with(|limits| limits.document = 100)).contains("up to 100 are read"));
    assert!(refusal(with(|limits| limits.layers = 0)).contains("up to 0 are read"));
    let long = Tar::of(&[file("f", "").pax("comment", vec![b'x'; 2 << 20])]);
    assert!(refusal(stack(&[long])).contains("an extended header of"));
}

#[test]
fn directories_are_made_inside_a_root() {
    let root = one(&[symlink("srv", "/var/srv"), file("etc", "x")]).unwrap();
    crate::make_directory(root.path(), Path::new("/srv/app/data")).unwrap();
    crate::make_directory(root.path(), Path::new("/srv/app")).unwrap();
    assert!(root.path().join("var/srv/app/data").is_dir());
    let made = fs::metadata(root.path().join("var/srv/app")).unwrap();
    assert_eq!(made.mode() & 0o7777, 0o755);
    assert!(crate::make_directory(root.path(), Path::new("/etc/x")).is_err());
}
