//! Layers as they come, and as somebody who means harm makes them.

use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

/// A tar of (kind, name, content or target), written as given: `tar::Builder` would refuse the
/// names that these tests are about.
fn archive(entries: &[(tar::EntryType, &str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, name, content) in entries {
        let mut header = tar::Header::new_gnu();
        let link = matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link);
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        if link {
            header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
        }
        let data = if link { "" } else { content };
        header.set_entry_type(*kind);
        header.set_mode(if *kind == tar::EntryType::Directory {
            0o755
        } else {
            0o640
        });
        header.set_size(data.len() as u64);
        header.set_mtime(1_000_000);
        header.set_uid(rustix::process::geteuid().as_raw().into());
        header.set_gid(rustix::process::getegid().as_raw().into());
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(data.as_bytes());
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

use tar::EntryType::{Directory as D, Link as H, Regular as F, Symlink as S};

#[test]
fn layers_lie_over_each_other_and_whiteouts_remove() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let lower = archive(&[
        (D, "etc/", ""),
        (F, "etc/keep", "keep"),
        (F, "etc/gone", "gone"),
        (D, "opq/", ""),
        (F, "opq/old", "old"),
        (D, "tree/", ""),
        (D, "tree/a/", ""),
        (F, "tree/a/b", "b"),
        (S, "lib", "usr/lib"),
        (D, "usr/lib/", ""),
        (F, "file", "file"),
    ]);
    let upper = archive(&[
        (F, "etc/.wh.gone", ""),
        (F, "opq/new", "new"),
        (F, "opq/.wh..wh..opq", ""),
        (F, ".wh.tree", ""),
        (F, "lib/added", "by a link that stays inside"),
        (H, "hard", "etc/keep"),
        (D, "file/", ""),
        (F, "file/now", "a directory"),
    ]);
    layer::unpack(lower.as_slice(), root).unwrap();
    layer::unpack(upper.as_slice(), root).unwrap();

    let names = |path: &str| -> Vec<String> {
        let mut all: Vec<_> = fs::read_dir(root.join(path))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        all.sort();
        all
    };
    assert_eq!(names("etc"), ["keep"]);
    assert_eq!(names("opq"), ["new"]);
    assert_eq!(names(""), ["etc", "file", "hard", "lib", "opq", "usr"]);
    assert_eq!(names("usr/lib"), ["added"]);
    let keep = fs::metadata(root.join("etc/keep")).unwrap();
    assert_eq!((keep.nlink(), keep.mtime()), (2, 1_000_000));
    assert_eq!(keep.permissions().mode() & 0o7777, 0o640);
}

#[test]
fn a_hostile_layer_is_refused_and_touches_nothing_outside() {
    let outside = tempfile::tempdir().unwrap();
    let out = outside.path().to_str().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let secret = format!("{out}/secret");
    let hostile: &[&[(tar::EntryType, &str, &str)]] = &[
        &[(F, "/etc/evil", "x")],
        &[(F, "../evil", "x")],
        &[(F, "a/../../evil", "x")],
        &[(H, "hard", &secret)],
        &[(H, "hard", "../secret")],
        &[(F, ".wh...", "")],
        &[(F, ".wh.", "")],
    ];
    for entries in hostile {
        let dir = tempfile::tempdir().unwrap();
        let error = layer::unpack(archive(entries).as_slice(), dir.path()).unwrap_err();
        assert!(
            error.to_string().contains("refused"),
            "{entries:?}: {error}"
        );
    }
    // A link that leads out leads, on the way to a file, to the same name inside, or nowhere.
    let dir = tempfile::tempdir().unwrap();
    let through = archive(&[(S, "link", out), (F, "link/evil", "x")]);
    let error = layer::unpack(through.as_slice(), dir.path()).unwrap_err();
    assert!(error.to_string().contains("refused"), "{error}");
    let inside = dir.path().join(out.trim_start_matches('/'));
    fs::create_dir_all(&inside).unwrap();
    layer::unpack(through.as_slice(), dir.path()).unwrap();
    assert!(inside.join("evil").exists());
    assert!(!outside.path().join("evil").exists());
    // And an entry that replaces a link does not write through it.
    let replace = archive(&[(S, "f", &secret), (F, "f", "changed")]);
    layer::unpack(replace.as_slice(), dir.path()).unwrap();
    assert_eq!(
        fs::read_to_string(outside.path().join("secret")).unwrap(),
        "secret"
    );
}

fn write_blob(dir: &Path, bytes: &[u8]) -> (String, usize) {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    fs::write(dir.join("blobs/sha256").join(&hex), bytes).unwrap();
    (format!("sha256:{hex}"), bytes.len())
}

fn layout(dir: &Path) -> String {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&archive(&[(F, "hello", "world")])).unwrap();
    let (layer, layer_len) = write_blob(dir, &gzip.finish().unwrap());
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []},
        "config": {"Entrypoint": ["/bin/e"], "Cmd": ["c"], "Env": ["A=b"], "User": "web",
                   "WorkingDir": "/w"},
    });
    let (config, config_len) = write_blob(dir, config.to_string().as_bytes());
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                   "digest": config, "size": config_len},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": layer, "size": layer_len}],
    });
    let (manifest, manifest_len) = write_blob(dir, manifest.to_string().as_bytes());
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json",
                       "digest": manifest, "size": manifest_len}],
    });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    layer
}

#[test]
fn a_layout_says_what_its_container_needs() {
    let dir = tempfile::tempdir().unwrap();
    layout(dir.path());
    let image = Image::open(dir.path(), Path::new("/nonexistent")).unwrap();
    assert_eq!(
        image.defaults(),
        Defaults {
            entrypoint: vec!["/bin/e".into()],
            command: vec!["c".into()],
            env: vec!["A=b".into()],
            user: "web".into(),
            workdir: Some("/w".into()),
        }
    );
    let root = tempfile::tempdir().unwrap();
    image.unpack(root.path()).unwrap();
    assert_eq!(
        fs::read_to_string(root.path().join("hello")).unwrap(),
        "world"
    );
}

#[test]
fn a_blob_that_is_not_its_digest_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let layer = layout(dir.path());
    let path = dir.path().join("blobs/sha256").join(&layer[7..]);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let image = Image::open(dir.path(), Path::new("/nonexistent")).unwrap();
    let root = tempfile::tempdir().unwrap();
    let error = image.unpack(root.path()).unwrap_err().to_string();
    assert!(error.contains(&layer), "{error}");
}

#[test]
fn what_docker_saves_is_read_from_a_tar() {
    let files = tempfile::tempdir().unwrap();
    let layer = archive(&[(F, "hello", "docker")]);
    let config = r#"{"architecture":"amd64","os":"linux","config":{"Cmd":["sh"]},"rootfs":{"type":"layers","diff_ids":[]}}"#;
    let manifest = r#"[{"Config":"c.json","RepoTags":null,"Layers":["l/layer.tar"]}]"#;
    let mut builder = tar::Builder::new(File::create(files.path().join("saved.tar")).unwrap());
    for (name, bytes) in [
        ("c.json", config.as_bytes()),
        ("manifest.json", manifest.as_bytes()),
        ("l/layer.tar", layer.as_slice()),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, bytes).unwrap();
    }
    builder.finish().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let image = Image::open(&files.path().join("saved.tar"), scratch.path()).unwrap();
    assert_eq!(image.defaults().command, ["sh"]);
    let root = tempfile::tempdir().unwrap();
    image.unpack(root.path()).unwrap();
    assert_eq!(
        fs::read_to_string(root.path().join("hello")).unwrap(),
        "docker"
    );
}

#[test]
fn compressed_layers_are_recognised_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let text = b"what was packed".repeat(1000);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&text).unwrap();
    // Two frames, and one between them that says nothing: seekable images have many.
    let (first, second) = text.split_at(5000);
    let frame = |part: &[u8]| {
        use ruzstd::encoding::{CompressionLevel, compress_to_vec};
        compress_to_vec(part, CompressionLevel::Fastest)
    };
    let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"any"].concat();
    let zstd = [frame(first), skipped, frame(second)];
    for (bytes, kind) in [
        (text.clone(), Compression::None),
        (gzip.finish().unwrap(), Compression::Gzip),
        (zstd.concat(), Compression::Zstd),
    ] {
        assert_eq!(Compression::of_bytes(bytes[..4].try_into().unwrap()), kind);
        let path = dir.path().join("layer");
        fs::write(&path, bytes).unwrap();
        let mut read = Vec::new();
        let mut reader = kind.reader(File::open(&path).unwrap());
        reader.read_to_end(&mut read).unwrap();
        assert!(read == text, "{kind:?}");
    }
    assert!(Compression::of_type(&MediaType::ImageManifest).is_err());
}
