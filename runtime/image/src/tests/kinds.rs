//! Formats of images, by the programs that write them.

use super::writer::{Item, Tar, file, hardlink, sparse, symlink};
use super::*;
use crate::Defaults;

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";

fn layers() -> Vec<Vec<u8>> {
    vec![
        Tar::of(&[file("a", "lower"), file("b", "lower")]),
        Tar::of(&[file("a", "upper"), file(".wh.b", "")]),
    ]
}

fn check(unpacked: Result<(tempfile::TempDir, Image), Error>) {
    let (root, _) = unpacked.unwrap_or_else(|e| panic!("{e}: {e:?}"));
    assert_eq!(fs::read_to_string(root.path().join("a")).unwrap(), "upper");
    assert!(!root.path().join("b").exists());
}

fn configuration(layers: &[Vec<u8>]) -> String {
    let ids: Vec<_> = layers.iter().map(|layer| digest(layer)).collect();
    json!({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": ids}})
    .to_string()
}

/// An image as saved by Docker before 25.0, with the files for old readers.
fn saved(layers: &[Vec<u8>], change: impl FnOnce(&mut Vec<Item>)) -> Vec<u8> {
    let config = configuration(layers);
    let config_name = format!("{}.json", &digest(config.as_bytes())[7..]);
    let mut items = Vec::new();
    let mut names = Vec::new();
    for (n, layer) in layers.iter().enumerate() {
        items.push(super::writer::dir(&format!("{n}/")));
        items.push(file(&format!("{n}/VERSION"), "1.0"));
        items.push(file(&format!("{n}/json"), "{}"));
        items.push(file(&format!("{n}/layer.tar"), layer));
        names.push(format!("{n}/layer.tar"));
    }
    let manifest = json!([{"Config": config_name, "RepoTags": ["some/image:1"], "Layers": names}]);
    items.push(file(&config_name, config));
    items.push(file("manifest.json", manifest.to_string()));
    items.push(file("repositories", r#"{"some/image":{"1":"1"}}"#));
    change(&mut items);
    Tar::of(&items)
}

#[test]
fn what_docker_saved_for_years() {
    let whole = saved(&layers(), |_| {});
    check(unpack_bytes(&whole));
    check(unpack_bytes(&gzip(&whole)));
    check(unpack_bytes(&zstd(&whole)));
    // A repeated layer is a link the second time.
    let twice = [layers(), layers()].concat();
    check(unpack_bytes(&saved(&twice, |items| {
        for (name, other) in [
            ("2/layer.tar", "../0/layer.tar"),
            ("3/layer.tar", "../1/layer.tar"),
        ] {
            let item = items
                .iter_mut()
                .find(|item| item.name == name.as_bytes())
                .unwrap();
            *item = symlink(name, other);
        }
    })));
    check(unpack_bytes(&saved(&layers(), |items| {
        items.push(hardlink("1/other", "1/layer.tar"));
        let item = items
            .iter_mut()
            .find(|item| item.name == b"manifest.json")
            .unwrap();
        let text = String::from_utf8(item.data.clone()).unwrap();
        item.data = text.replace("1/layer.tar", "1/other").into_bytes();
    })));
    // Compressed layers, as written by some programs.
    check(unpack_bytes(&saved(&layers(), |items| {
        let layers = items
            .iter_mut()
            .filter(|item| item.name.ends_with(b"layer.tar"));
        layers.for_each(|item| item.data = gzip(&item.data));
    })));
}

#[test]
fn an_archive_that_was_unpacked_or_packed_once_more() {
    let dir = tempfile::tempdir().unwrap();
    let whole = saved(&layers(), |items| {
        items
            .iter_mut()
            .for_each(|item| item.name = [b"./top/", &*item.name].concat());
    });
    check(unpack_bytes(&whole));
    let config = configuration(&layers());
    fs::write(dir.path().join("c.json"), config).unwrap();
    for (n, layer) in layers().iter().enumerate() {
        fs::write(dir.path().join(format!("{n}.tar")), layer).unwrap();
    }
    std::os::unix::fs::symlink("/1.tar", dir.path().join("link.tar")).unwrap();
    let manifest = json!([{"Config": "c.json", "RepoTags": null, "Layers": ["0.tar", "link.tar"]}]);
    fs::write(dir.path().join("manifest.json"), manifest.to_string()).unwrap();
    check(unpack(dir.path()));
}

#[test]
fn what_podman_saves() {
    let mut items = Vec::new();
    let mut names = Vec::new();
    for layer in layers() {
        let name = format!("{}.tar", &digest(&layer)[7..]);
        let old = digest(name.as_bytes())[7..].to_owned();
        // The link may come first.
        items.push(symlink(&format!("{old}/layer.tar"), &format!("../{name}")));
        items.push(file(&name, layer));
        names.push(format!("{old}/layer.tar"));
    }
    let config = configuration(&layers());
    items.push(file("sha256:config", &config));
    let manifest =
        json!([{"Config": "sha256:config", "RepoTags": ["localhost/a:latest"], "Layers": names}]);
    items.push(file("manifest.json", manifest.to_string()));
    check(unpack_bytes(&Tar::of(&items)));
}

#[test]
fn a_directory_as_skopeo_copies_it() {
    let dir = tempfile::tempdir().unwrap();
    let blob = |kind: &str, bytes: &[u8]| {
        let digest = digest(bytes);
        fs::write(dir.path().join(&digest[7..]), bytes).unwrap();
        json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
    };
    let config = blob(DOCKER_CONFIG, configuration(&layers()).as_bytes());
    let stored: Vec<_> = layers()
        .iter()
        .map(|layer| blob(DOCKER_LAYER, &gzip(layer)))
        .collect();
    let manifest = json!({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": config, "layers": stored});
    fs::write(dir.path().join("manifest.json"), manifest.to_string()).unwrap();
    fs::write(
        dir.path().join("version"),
        "Directory Transport Version: 1.1\n",
    )
    .unwrap();
    check(unpack(dir.path()));
    fs::write(
        dir.path()
            .join(&digest(configuration(&layers()).as_bytes())[7..]),
        "{}",
    )
    .unwrap();
    assert!(refusal(unpack(dir.path())).contains(" bytes, not "));
}

#[test]
fn links_that_lead_nowhere_or_round_are_refused() {
    let linked = |name: &str, target: &str| {
        let (name, target) = (name.to_owned(), target.to_owned());
        unpack_bytes(&saved(&layers(), move |items| {
            let item = items
                .iter_mut()
                .find(|item| item.name == name.as_bytes())
                .unwrap();
            *item = symlink(&name, &target);
        }))
    };
    assert!(refusal(linked("1/layer.tar", "../2/layer.tar")).contains("1/layer.tar is missing"));
    assert!(refusal(linked("1/layer.tar", "layer.tar")).contains("without end"));
    assert!(refusal(linked("1/layer.tar", "/etc/passwd")).contains("missing"));
}

#[test]
fn layouts_of_either_media_types() {
    for [kinds @ .., index] in [
        [OCI_MANIFEST, OCI_CONFIG, OCI_LAYER, OCI_INDEX],
        [DOCKER_MANIFEST, DOCKER_CONFIG, DOCKER_LAYER, DOCKER_LIST],
    ] {
        let layout = Layout::new();
        let [lower, upper] = layers().try_into().unwrap();
        let layers = [
            (gzip(&lower), lower.as_slice()),
            (zstd(&upper), upper.as_slice()),
        ];
        let mut manifest = layout.manifest(kinds, &layers, json!({}));
        layout.index(std::slice::from_ref(&manifest));
        check(unpack(layout.path()));
        check(unpack_bytes(&layout.archive()));
        check(unpack_bytes(&gzip(&layout.archive())));
        // A list for several platforms, with only the blobs for this machine, and an attestation.
        manifest["platform"] = json!({"architecture": "amd64", "os": "linux"});
        let missing = |platform: Value| {
            json!({"mediaType": kinds[0], "digest": digest(platform.to_string().as_bytes()),
                "size": 7, "platform": platform})
        };
        let mut attestation = missing(json!({"architecture": "unknown", "os": "unknown"}));
        attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
        let list = json!({"schemaVersion": 2, "mediaType": index, "manifests": [
            missing(json!({"architecture": "arm64", "os": "linux", "variant": "v8"})),
            attestation, manifest,
            missing(json!({"architecture": "amd64", "os": "windows"}))]});
        let list = layout.blob(index, list.to_string().as_bytes());
        let outer = json!({"schemaVersion": 2, "manifests": [list]});
        layout.index(&[layout.blob(OCI_INDEX, outer.to_string().as_bytes())]);
        check(unpack(layout.path()));
    }
}

#[test]
fn the_configuration_says_the_machine_where_the_index_does_not() {
    let layout = Layout::new();
    let [lower, upper] = layers().try_into().unwrap();
    let kinds = [OCI_MANIFEST, OCI_CONFIG, OCI_LAYER];
    let other = layout.manifest(kinds, &[(upper.clone(), &upper)], elsewhere());
    let own = layout.manifest(
        kinds,
        &[(lower.clone(), &lower), (upper.clone(), &upper)],
        json!({}),
    );
    layout.index(&[other.clone(), own]);
    check(unpack(layout.path()));
    layout.index(&[other]);
    let error = refusal(unpack(layout.path()));
    assert!(
        error.contains("nothing for linux/amd64") && error.contains("linux/s390x"),
        "{error}"
    );
}

#[test]
fn of_several_images_one_has_to_be_chosen() {
    let layout = Layout::new();
    let named = |n: u8, name: &str, key: &str| {
        let mut manifest = layout.plain(&[Tar::of(&[file("which", [n])])]);
        manifest["annotations"] = json!({key: name});
        manifest
    };
    let short = "org.opencontainers.image.ref.name";
    layout.index(&[
        named(b'1', "1.0", short),
        named(b'2', "docker.io/library/b:2.0", "io.containerd.image.name"),
        named(
            b'2',
            "docker.io/library/b:latest",
            "io.containerd.image.name",
        ),
    ]);
    let which = |tag: Option<&str>| {
        let options = Options {
            tag: tag.map(str::to_owned),
            ..Options::default()
        };
        let (root, _) = unpack_with(layout.path(), &options)?;
        Ok::<_, Error>(fs::read_to_string(root.path().join("which")).unwrap())
    };
    for (tag, found) in [
        ("1.0", "1"),
        ("b:2.0", "2"),
        ("2.0", "2"),
        ("b", "2"),
        ("docker.io/library/b:latest", "2"),
    ] {
        assert_eq!(which(Some(tag)).unwrap(), found, "{tag}");
    }
    let error = refusal(which(None));
    assert!(
        error.contains("--tag") && error.contains("1.0, docker.io/library/b:2.0"),
        "{error}"
    );
    assert!(refusal(which(Some("3.0"))).contains("no image"));
    // The same image with two names is one, and two images without names are two.
    layout.index(&[named(b'1', "a", short), named(b'1', "b", short)]);
    assert_eq!(which(None).unwrap(), "1");
    layout.index(&[layout.plain(&layers()), layout.plain(&layers()[..1])]);
    assert!(refusal(which(None)).contains("several images"));

    let mut items = Vec::new();
    let mut manifests = Vec::new();
    for n in ["1", "2"] {
        let layer = Tar::of(&[file("which", n)]);
        items.push(file(&format!("{n}.tar"), &layer));
        items.push(file(&format!("{n}.json"), configuration(&[layer])));
        manifests.push(json!({"Config": format!("{n}.json"), "RepoTags": [format!("image:{n}")], "Layers": [format!("{n}.tar")]}));
    }
    items.push(file("manifest.json", json!(manifests).to_string()));
    let archive = tempfile::NamedTempFile::new().unwrap();
    fs::write(archive.path(), Tar::of(&items)).unwrap();
    let options = Options {
        tag: Some("image:2".into()),
        ..Options::default()
    };
    let (root, _) = unpack_with(archive.path(), &options).unwrap();
    assert_eq!(fs::read_to_string(root.path().join("which")).unwrap(), "2");
    assert!(refusal(unpack(archive.path())).ends_with("it holds: image:1, image:2"));
}

#[test]
fn the_plainest_variant_of_a_machine_is_taken() {
    let layout = Layout::new();
    let variants = [Some("v3"), None, Some("v2")].map(|variant| {
        let mut manifest = layout.plain(&[Tar::of(&[file("which", variant.unwrap_or("v1"))])]);
        manifest["platform"] = json!({"os": "linux", "architecture": "amd64"});
        if let Some(variant) = variant {
            manifest["platform"]["variant"] = variant.into();
        }
        manifest
    });
    layout.index(&variants);
    let (root, _) = unpack(layout.path()).unwrap();
    assert_eq!(fs::read_to_string(root.path().join("which")).unwrap(), "v1");
}

#[test]
fn an_archive_that_is_cut_is_refused_wherever_it_is_cut() {
    let small = vec![Tar::of(&[file("a", "upper"), file("c", vec![b'x'; 3000])])];
    let plain = saved(&small, |_| {});
    for whole in [plain.clone(), gzip(&plain), zstd(&plain)] {
        check(unpack_bytes(&whole));
        let step = whole.len() / 150 + 1;
        let ends = [1, 512, 1024].map(|less| whole.len().saturating_sub(less));
        for at in (0..whole.len()).step_by(step).chain(ends) {
            let found = unpack_bytes(&whole[..at]);
            // Only the mark of the end is missing, whose first block is sufficient.
            let is_all = whole == plain && at % 512 == 0 && at + 1024 >= whole.len();
            assert_eq!(found.is_ok(), is_all, "cut at {at} of {}", whole.len());
        }
    }
}

#[test]
fn a_layer_that_is_cut_is_refused_wherever_it_is_cut() {
    let layer = Tar::of(&[file("a", "upper"), file("c", vec![b'x'; 3000])]);
    // Without any digest.
    let image = |stored: &[u8]| {
        let manifest = json!([{"Config": "c", "RepoTags": null, "Layers": ["l"]}]);
        let items = [
            file("l", stored),
            file("c", "{}"),
            file("manifest.json", manifest.to_string()),
        ];
        unpack_bytes(&Tar::of(&items))
    };
    for whole in [layer.clone(), gzip(&layer), zstd(&layer)] {
        check(image(&whole));
        for at in 0..whole.len() {
            if at % 7 == 0 || at + 20 > whole.len() {
                assert!(
                    image(&whole[..at]).is_err(),
                    "cut at {at} of {}",
                    whole.len()
                );
            }
        }
    }
    // With a digest, a cut between two entries is detected, and a missing end marker is accepted.
    let swap = |stored: Vec<u8>| {
        unpack_bytes(&saved(std::slice::from_ref(&layer), |items| {
            items
                .iter_mut()
                .filter(|item| item.name.ends_with(b"layer.tar"))
                .for_each(|item| item.data = stored.clone());
        }))
    };
    assert!(refusal(swap(layer[..1024].to_vec())).contains("not sha256:"));
    let unmarked = layer[..layer.len() - 1024].to_vec();
    check(unpack_bytes(&saved(&[unmarked], |_| {})));
}

#[test]
fn what_follows_the_end_counts_as_the_formats_have_it() {
    let layer = layers()[1].clone();
    let stored = |layer: Vec<u8>, stored: Vec<u8>| {
        let layout = Layout::new();
        layout.index(&[layout.manifest(
            [OCI_MANIFEST, OCI_CONFIG, OCI_LAYER],
            &[(stored, &layer)],
            json!({}),
        )]);
        unpack(layout.path())
    };
    // Any data may follow the end of an archive; it is included in the digest.
    let more = [layer.as_slice(), b"something else"].concat();
    check(stored(more.clone(), more));
    check(stored(layer.clone(), [gzip(&layer), vec![0; 700]].concat()));
    check(stored(
        layer.clone(),
        [gzip(&layer[..512]), gzip(&layer[512..])].concat(),
    ));
    let error = refusal(stored(
        layer.clone(),
        [gzip(&layer), b"garbage".to_vec()].concat(),
    ));
    assert!(error.contains("other bytes follow"), "{error}");
    let empty = vec![0; 1024];
    for (tar, compressed) in [
        (empty.clone(), gzip(&empty)),
        (empty.clone(), empty),
        (Vec::new(), Vec::new()),
    ] {
        assert!(stored(tar, compressed).is_ok());
    }
}

#[test]
fn every_digest_is_held_against_what_it_is_of() {
    let layout = Layout::new();
    let layer = layers()[1].clone();
    let manifest = layout.manifest(
        [OCI_MANIFEST, OCI_CONFIG, OCI_LAYER],
        &[(gzip(&layer), &layer)],
        json!({}),
    );
    layout.index(&[manifest]);
    check(unpack(layout.path()));
    for entry in fs::read_dir(layout.path().join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        for at in [0, bytes.len() / 2, bytes.len() - 1] {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1;
            fs::write(&path, wrong).unwrap();
            let error = refusal(unpack(layout.path()));
            assert!(error.contains(&name), "{error}");
        }
        fs::write(&path, [bytes.as_slice(), b" "].concat()).unwrap();
        assert!(refusal(unpack(layout.path())).contains(" bytes, not "));
        fs::remove_file(&path).unwrap();
        assert!(refusal(unpack(layout.path())).contains("is missing"));
        fs::write(&path, bytes).unwrap();
    }
    // A wrong digest of a layer's contents, and of a configuration by its name.
    let wrong = json!({"rootfs": {"type": "layers", "diff_ids": [digest(b"else")]}});
    layout.index(&[layout.manifest(
        [OCI_MANIFEST, OCI_CONFIG, OCI_LAYER],
        &[(layer.clone(), &layer)],
        wrong,
    )]);
    assert!(refusal(unpack(layout.path())).contains(&digest(b"else")));
    let two = json!({"rootfs": {"diff_ids": [digest(b"a"), digest(b"b")]}});
    layout.index(&[layout.manifest(
        [OCI_MANIFEST, OCI_CONFIG, OCI_LAYER],
        &[(layer.clone(), &layer)],
        two,
    )]);
    assert!(refusal(unpack(layout.path())).contains("of 2 layers"));
    let named = saved(&layers(), |items| {
        items
            .iter_mut()
            .filter(|item| item.name.ends_with(b".json"))
            .for_each(|item| {
                if item.name.len() > 64 {
                    item.data.push(b' ');
                }
            });
    });
    assert!(refusal(unpack_bytes(&named)).contains("not sha256:"));
}

#[test]
fn what_is_not_supported_is_named() {
    let layer = layers()[1].clone();
    let image = |kind: &str, stored: &[u8]| {
        let layout = Layout::new();
        let kinds = [OCI_MANIFEST, OCI_CONFIG, kind];
        layout.index(&[layout.manifest(kinds, &[(stored.to_vec(), &layer)], json!({}))]);
        refusal(unpack(layout.path()))
    };
    assert!(image("application/vnd.in-toto+json", &layer).contains("in-toto"));
    assert!(image(&format!("{OCI_LAYER}+gzip+encrypted"), &layer).contains("encrypted"));
    assert!(image(OCI_LAYER, b"\xfd7zXZ\0 and so on").contains("by xz"));
    assert!(image(OCI_LAYER, b"BZh91AY&SY").contains("by bzip2"));
    let layout = Layout::new();
    let mut manifest = layout.plain(&layers());
    manifest["digest"] = format!("blake3:{}", "0".repeat(64)).into();
    layout.index(&[manifest]);
    assert!(refusal(unpack(layout.path())).contains("not supported"));
    fs::write(
        layout.path().join("oci-layout"),
        r#"{"imageLayoutVersion":"2.0.0"}"#,
    )
    .unwrap();
    assert!(refusal(unpack(layout.path())).contains("2.0.0"));
    let old = Tar::of(&[file("repositories", "{}"), file("abc/json", "{}")]);
    assert!(refusal(unpack_bytes(&old)).contains("before 1.10"));
    assert!(refusal(unpack_bytes(&Tar::of(&[file("a", "x")]))).contains("neither index.json"));
    for text in [&b"text"[..], &[b'x'; 4096]] {
        assert!(refusal(unpack_bytes(text)).contains("no archive of an image"));
    }
}

#[test]
fn a_sparse_archive_and_one_from_a_pipe_are_read() {
    let [lower, upper] = layers().try_into().unwrap();
    let mut tar = Tar::default();
    let whole = saved(&[lower, upper.clone()], |items| {
        items.retain(|item| item.name != b"1/layer.tar")
    });
    tar.0 = whole[..whole.len() - 1024].to_vec();
    // The zeros at the end of the layer as a hole.
    let used = upper.len() - 1024;
    sparse(
        &mut tar,
        "1.0",
        "1/layer.tar",
        upper.len() as u64,
        &[(0, &upper[..used])],
    );
    let whole = tar.end();
    check(unpack_bytes(&whole));
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for bytes in [whole.clone(), gzip(&whole)] {
        let to = fifo.clone();
        let writer = std::thread::spawn(move || {
            let mut pipe = fs::File::options().write(true).open(to).unwrap();
            let (first, rest) = bytes.split_at(1);
            pipe.write_all(first).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(50));
            pipe.write_all(rest).unwrap();
        });
        check(unpack(&fifo));
        writer.join().unwrap();
    }
}

#[test]
fn an_image_says_what_its_container_needs() {
    let layout = Layout::new();
    let config = json!({"config": {
        "Entrypoint": ["/bin/e"], "Cmd": "a single text", "Env": ["A=b"], "User": "web:www",
        "WorkingDir": "/w", "StopSignal": "SIGRTMIN+3", "Volumes": {"/data": {}},
        "ExposedPorts": {"80/tcp": {}}, "Labels": {"by": "us"}, "Shell": ["/bin/sh", "-c"],
        "ArgsEscaped": true, "OnBuild": null}});
    layout.index(&[layout.manifest([OCI_MANIFEST, OCI_CONFIG, OCI_LAYER], &[], config)]);
    let (_, image) = unpack(layout.path()).unwrap();
    let wanted = Defaults {
        entrypoint: vec!["/bin/e".into()],
        command: vec!["a single text".into()],
        env: vec!["A=b".into()],
        user: "web:www".into(),
        workdir: Some("/w".into()),
        stop_signal: Some("SIGRTMIN+3".into()),
        volumes: vec!["/data".into()],
        ports: vec!["80/tcp".into()],
        labels: [("by".to_owned(), "us".to_owned())].into(),
    };
    assert_eq!(image.defaults(), wanted);
    let nothing = json!({"config": {"Entrypoint": null, "Cmd": [], "Env": null, "WorkingDir": "", "Volumes": null}});
    layout.index(&[layout.manifest([OCI_MANIFEST, OCI_CONFIG, OCI_LAYER], &[], nothing)]);
    assert_eq!(
        unpack(layout.path()).unwrap().1.defaults(),
        Defaults::default()
    );
}

#[test]
fn what_is_read_of_an_image_is_bounded_however_often_it_is_named() {
    // A configuration of 3 MiB, referenced by many manifests.
    let layout = Layout::new();
    let long = "x".repeat(3 << 20);
    let kinds = [OCI_MANIFEST, OCI_CONFIG, OCI_LAYER];
    let manifest = layout.manifest(kinds, &[], json!({"author": long}));
    layout.index(std::slice::from_ref(&manifest));
    unpack(layout.path()).unwrap();
    layout.index(&vec![manifest; 20]);
    let said = refusal(unpack(layout.path()));
    assert!(said.contains("bytes of manifests"), "{said}");

    // A layer that consists of padding except for its first bytes.
    let layout = Layout::new();
    let tar = Tar::of(&[file("a", "a")]);
    let mut stored = gzip(&tar);
    stored.resize(2 << 20, 0);
    let gzipped = "application/vnd.oci.image.layer.v1.tar+gzip";
    let kinds = [OCI_MANIFEST, OCI_CONFIG, gzipped];
    let manifest = layout.manifest(kinds, &[(stored, tar.as_slice())], json!({}));
    layout.index(&[manifest]);
    unpack(layout.path()).unwrap();
    let mut options = Options::default();
    options.limits.total = 1 << 20;
    let said = refusal(unpack_with(layout.path(), &options));
    assert!(said.contains("compressed bytes"), "{said}");
}
