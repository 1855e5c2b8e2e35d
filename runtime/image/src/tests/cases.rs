//! Bug reports of other engines: docs/cases.md has the list.

use super::writer::{Item, Tar, dir, file, item};
use super::*;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

const KINDS: [&str; 3] = [OCI_MANIFEST, OCI_CONFIG, OCI_LAYER];

/// A manifest for this machine, of an image with a file that identifies it.
fn image(layout: &Layout, which: &str, more: Value) -> Value {
    let layer = Tar::of(&[file("which", which)]);
    layout.manifest(KINDS, &[(layer.clone(), &layer)], more)
}

fn which(layout: &Layout, tag: Option<&str>) -> Result<String, Error> {
    let options = Options {
        tag: tag.map(str::to_owned),
        ..Options::default()
    };
    let (root, _) = unpack_with(layout.path(), &options)?;
    Ok(fs::read_to_string(root.path().join("which")).unwrap())
}

/// The output of `cosign save` (sigstore/cosign 1040): signatures look like images without a platform.
#[test]
fn signatures_saved_with_an_image_are_no_images() {
    let layout = Layout::new();
    let signed = image(&layout, "image", json!({}));
    let like_an_image = |kind: &str| {
        let payload = kind.as_bytes().to_vec();
        let kinds = [OCI_MANIFEST, OCI_CONFIG, kind];
        let bare = json!({"architecture": "", "os": "", "created": "0001-01-01T00:00:00Z"});
        layout.manifest(kinds, &[(payload.clone(), &payload)], bare)
    };
    let marked = |mut manifest: Value, kind: &str| {
        manifest["annotations"] = json!({"kind": format!("dev.cosignproject.cosign/{kind}")});
        manifest
    };
    let signatures = like_an_image("application/vnd.dev.cosign.simplesigning.v1+json");
    let statements = like_an_image("application/vnd.dsse.envelope.v1+json");
    layout.index(&[
        marked(signed, "image"),
        marked(signatures.clone(), "sigs"),
        marked(statements, "atts"),
    ]);
    assert_eq!(which(&layout, None).unwrap(), "image");
    layout.index(&[signatures]);
    let said = refusal(which(&layout, None));
    assert!(said.contains("simplesigning"), "{said}");
}

/// sigstore/cosign 4695: referrers of an image are in the index beside it, with a configuration that is not an image's.
#[test]
fn what_refers_to_an_image_is_no_image() {
    let layout = Layout::new();
    let signed = image(&layout, "image", json!({}));
    let artifact = |config: &str, more: Value| {
        let mut manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "subject": signed,
            "config": layout.blob(config, b"{}"), "layers": [layout.blob("application/json", b"[]")]});
        for (key, value) in more.as_object().unwrap() {
            manifest[key] = value.clone();
        }
        layout.blob(OCI_MANIFEST, manifest.to_string().as_bytes())
    };
    let kind = json!({"artifactType": "application/vnd.dev.sigstore.bundle.v0.3+json"});
    // A tar of an artifact is not a layer either.
    let packed =
        json!({"artifactType": "application/vnd.chart", "layers": [layout.blob(OCI_LAYER, b"")]});
    let mut others = vec![
        artifact("application/vnd.oci.empty.v1+json", kind),
        artifact("application/vnd.oci.empty.v1+json", json!({})),
        artifact("application/vnd.cncf.helm.config.v1+json", packed),
    ];
    // An artifact with a configuration that is not JSON, and is missing.
    let blob = json!({"mediaType": "text/plain", "digest": digest(b"nowhere"), "size": 7});
    others.push(artifact(
        "text/plain",
        json!({"artifactType": "text/plain", "config": blob}),
    ));
    layout.index(&[vec![signed], others].concat());
    assert_eq!(which(&layout, None).unwrap(), "image");
}

/// containers/buildah 1305, moby/moby 12745: only root could enter the container's root.
#[test]
fn the_root_is_open_whatever_the_callers_umask_is() {
    let unpacked = |items: &[Item]| {
        let layout = Layout::new();
        layout.index(&[layout.plain(&[Tar::of(items)])]);
        let (scratch, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let image = Image::open(layout.path(), scratch.path(), &Options::default()).unwrap();
        image.unpack(root.path()).unwrap();
        fs::metadata(root.path()).unwrap().mode() & 0o7777
    };
    assert_eq!(unpacked(&[file("a/b", "")]), 0o755);
    assert_eq!(unpacked(&[]), 0o755);
    let own = Item {
        mode: 0o711,
        ..dir("./")
    };
    assert_eq!(
        unpacked(&[own, file("a", "")]),
        0o711,
        "its own entry says so"
    );
}

/// containers/podman 9377: `ENTRYPOINT [""]` removes that of the base image.
#[test]
fn an_entrypoint_of_an_empty_word_is_none() {
    let entrypoint = |words: Value| {
        let layout = Layout::new();
        let config = json!({"config": {"Entrypoint": words, "Cmd": ["nginx", ""]}});
        layout.index(&[image(&layout, "", config)]);
        let defaults = unpack(layout.path()).unwrap().1.defaults();
        assert_eq!(defaults.command, ["nginx", ""]);
        defaults.entrypoint
    };
    assert!(entrypoint(json!([""])).is_empty());
    assert_eq!(entrypoint(json!(["", "x"])), ["", "x"]);
    assert_eq!(entrypoint(json!(["x", ""])), ["x", ""]);
}

/// skopeo 1287, h33333333/xray 4: documents as parsed by Go programs.
#[test]
fn documents_are_read_as_go_reads_them() {
    let layout = Layout::new();
    let config =
        json!({"config": {"cmd": ["x"], "Env": null, "labels": {"k": null}}, "ROOTFS": null});
    let mut manifest = image(&layout, "image", config);
    manifest["annotations"] = json!({"k": null});
    manifest["platform"]["os.version"] = Value::Null;
    layout.index(&[manifest]);
    let defaults = unpack(layout.path()).unwrap().1.defaults();
    assert_eq!(defaults.command, ["x"]);
    assert_eq!(defaults.labels["k"], "");
}

/// containers/crun 94: 32-bit images run here too; moby/buildkit 6843: one must not be preferred because it comes first.
#[test]
fn an_image_of_32_bits_is_taken_where_there_is_no_other() {
    if crate::choice::machine() != "amd64" {
        println!("not run: this is of amd64");
        return;
    }
    let layout = Layout::new();
    let named = |name: &str, architecture: &str| {
        let mut manifest = image(
            &layout,
            &format!("{name} {architecture}"),
            json!({"architecture": architecture}),
        );
        manifest["platform"] = json!({"os": "linux", "architecture": architecture});
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        manifest
    };
    layout.index(&[named("a", "386"), named("a", "amd64")]);
    assert_eq!(which(&layout, None).unwrap(), "a amd64");
    layout.index(&[named("a", "386"), named("a", "arm64")]);
    assert_eq!(which(&layout, None).unwrap(), "a 386");
    // With another name it is another image.
    layout.index(&[named("a", "amd64"), named("b", "i386")]);
    assert_eq!(which(&layout, Some("b")).unwrap(), "b i386");
    assert!(refusal(which(&layout, None)).contains("several images"));
}

/// moby/moby 35879: images with `VOLUME /` and `VOLUME .` could be built, but did not start.
#[test]
fn a_volume_that_is_the_root_changes_nothing() {
    let layout = Layout::new();
    let config = json!({"config": {"Volumes": {"/": {}, ".": {}, "": {}, "/data/..": {}}}});
    layout.index(&[image(&layout, "x", config)]);
    let (root, image) = unpack(layout.path()).unwrap();
    let before = snapshot::of(root.path());
    for volume in image.defaults().volumes {
        crate::make_directory(root.path(), &volume).unwrap();
    }
    assert_eq!(snapshot::of(root.path()), before);
}

/// PyO3/maturin 2576 and buildpacks/pack 184: reproducible builds give files odd times, Go's year 1
/// among them. The host's file system stores the closest time that it supports.
#[test]
fn times_that_no_file_system_has_are_no_failure() {
    let at = |name: &str, time: &str| file(name, "x").pax("mtime", time);
    let items = [
        at("year-1", "-62135596800"),
        at("year-9999", "253402300799.999999999"),
        at("ages", "9223372036854775807"),
        at("before", "-9223372036854775807.5"),
        Item {
            mtime: 1 << 40,
            ..item(b'5', "dir")
        },
    ];
    let layout = Layout::new();
    layout.index(&[layout.plain(&[Tar::of(&items)])]);
    let (root, _) = unpack(layout.path()).unwrap();
    assert_eq!(fs::read(root.path().join("ages")).unwrap(), b"x");
    assert!(fs::metadata(root.path().join("year-1")).unwrap().mtime() < 0);
}

/// Without root, on a file system without user attributes: a file that represents a device node could not be marked as
/// such.
#[test]
fn nodes_are_no_plain_files_where_they_cannot_be_kept() {
    const USER: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        eprintln!("only root can mount such a file system");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", dir.path(), "ramfs", flags, None).unwrap();
    std::os::unix::fs::chown(dir.path(), Some(USER), Some(USER)).unwrap();
    let path = dir.path().to_owned();
    let work = move || {
        let user = rustix::fs::Uid::from_raw(USER);
        // Only for this thread.
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        let layer = Tar::of(&[
            file("null", "lower"),
            item(b'3', "null"),
            item(b'6', "pipe"),
            Item {
                uid: 7,
                ..file("file", "text")
            },
        ]);
        let limits = crate::Limits::default();
        let mut unpacker = crate::layer::Unpacker::new(&path, &limits).unwrap();
        unpacker.layer(&layer[..], false, 1 << 20).unwrap();
        unpacker.finish().unwrap();
        let kind = |name| Some(fs::symlink_metadata(path.join(name)).ok()?.file_type());
        assert!(kind("null").is_none());
        assert!(kind("pipe").unwrap().is_fifo());
        assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "text");
    };
    let done = std::thread::spawn(work).join();
    let detach = rustix::mount::UnmountFlags::DETACH;
    rustix::mount::unmount(dir.path(), detach).unwrap();
    done.unwrap();
}

/// Builders other than Docker's leave it as it was written.
#[test]
fn a_relative_working_directory_is_below_the_root() {
    let layout = Layout::new();
    let of = |directory: &str| {
        let config = json!({"config": {"WorkingDir": directory}});
        layout.index(&[image(&layout, "image", config)]);
        unpack(layout.path()).unwrap().1.defaults().workdir
    };
    assert_eq!(of("app/src"), Some("/app/src".into()));
    assert_eq!(of("/app"), Some("/app".into()));
    assert_eq!(of(""), None);
}

/// bootc-dev/ocidir-rs 21, bazel-contrib/rules_oci 439: blobs, or the whole directory of them, are links to a shared store.
/// Their content is verified, unlike that of files with a name of their own.
#[test]
fn blobs_may_be_in_a_store_outside_of_the_layout() {
    use std::os::unix::fs::symlink;
    let layout = Layout::new();
    let manifest = image(&layout, "shared", json!({}));
    layout.index(std::slice::from_ref(&manifest));
    let store = tempfile::tempdir().unwrap();
    let (own, shared) = (layout.path().join("blobs/sha256"), store.path().join("all"));
    fs::rename(&own, &shared).unwrap();
    symlink(&shared, &own).unwrap();
    assert_eq!(which(&layout, None).unwrap(), "shared");
    fs::remove_file(&own).unwrap();
    fs::create_dir(&own).unwrap();
    for blob in fs::read_dir(&shared).unwrap() {
        let blob = blob.unwrap();
        symlink(blob.path(), own.join(blob.file_name())).unwrap();
    }
    assert_eq!(which(&layout, None).unwrap(), "shared");
    // Neither another content nor another kind of file.
    let blob = layout.blob_path(manifest["digest"].as_str().unwrap());
    let size = manifest["size"].as_u64().unwrap() as usize;
    let other = store.path().join("other");
    fs::write(&other, " ".repeat(size)).unwrap();
    for (target, expected) in [
        (other.as_path(), "not sha256:"),
        (Path::new("/dev/null"), "regular"),
    ] {
        fs::remove_file(&blob).unwrap();
        symlink(target, &blob).unwrap();
        let said = refusal(which(&layout, None));
        assert!(said.contains(expected), "{said}");
    }
    let index = layout.path().join("index.json");
    fs::rename(&index, store.path().join("index.json")).unwrap();
    symlink(store.path().join("index.json"), &index).unwrap();
    assert!(
        which(&layout, None).is_err(),
        "an index of another directory"
    );
}
