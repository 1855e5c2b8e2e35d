//! Mounts of a container of `koya-runtime`, where runc has rules of its own.

use crate::oci::{Runtime, bundle, mount_options, text};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

crate::trials!(
    memory_begins_as_what_it_covers,
    a_dev_may_be_read_only,
    a_read_only_mount_keeps_what_its_source_has,
    mounts_have_mapped_users,
    overlays_are_mounted_by_the_host,
    only_rbind_takes_what_is_mounted_below
);

fn make(directory: &Path, mode: u32) -> Result<()> {
    fs::create_dir_all(directory)?;
    Ok(fs::set_permissions(
        directory,
        fs::Permissions::from_mode(mode),
    )?)
}

fn add_mount(config: &mut Value, mount: Value) {
    if let Some(mounts) = config["mounts"].as_array_mut() {
        mounts.push(mount);
    }
}

fn tmpfs(at: &str, options: &[&str]) -> Value {
    json!({"destination": at, "type": "tmpfs", "source": "tmpfs", "options": options})
}

/// opencontainers/runc 3952, 3991, 4401 and 4971.
fn memory_begins_as_what_it_covers() -> Result<()> {
    let script = "stat -c %a /over /said /new/one; stat -c %a:%u /copied /copied/sub; cat /copied/sub/file; \
                  readlink /copied/link; touch /copied/sub/more; cat /copied/under/deep";
    let bundle = bundle(script, |config| {
        config["root"]["readonly"] = false.into();
        add_mount(config, tmpfs("/over", &["nosuid", "rprivate"]));
        add_mount(config, tmpfs("/said", &["mode=0700"]));
        add_mount(config, tmpfs("/new/one", &[]));
        add_mount(
            config,
            tmpfs("/copied", &["rw", "noexec", "size=1m", "tmpcopyup"]),
        );
        add_mount(config, tmpfs("/copied/under", &["tmpcopyup"]));
        add_mount(config, tmpfs("/set/a/b", &["ro"]));
    })?;
    let root = bundle.join("rootfs");
    make(&root.join("over"), 0o1710)?;
    make(&root.join("said"), 0o755)?;
    make(&root.join("copied"), 0o751)?;
    make(&root.join("copied/sub"), 0o701)?;
    make(&root.join("copied/under"), 0o755)?;
    make(&root.join("set"), 0o7755)?;
    chown(root.join("copied/sub"), Some(7), Some(8))?;
    fs::write(root.join("copied/sub/file"), "content\n")?;
    fs::write(root.join("copied/under/deep"), "deep\n")?;
    std::os::unix::fs::symlink("/nowhere", root.join("copied/link"))?;
    let runtime = Runtime::koya()?;
    let said = runtime.ok(&["run", "--bundle", text(&bundle)?, "mounts-m"])?;
    let lines: Vec<_> = said.lines().collect();
    let expected = [
        "1710", "700", "1777", "751:0", "701:7", "content", "/nowhere", "deep",
    ];
    ensure!(lines == expected, "{said}");
    ensure!(!root.join("copied/sub/more").exists(), "it was no copy");
    for made in ["set/a", "set/a/b"] {
        let mode = root.join(made).metadata()?.mode() & 0o7777;
        ensure!(mode == 0o2755, "{made}: {mode:o}");
    }
    // More data than the tmpfs may have.
    fs::write(root.join("copied/large"), vec![7; 2 << 20])?;
    let full = runtime.call(&["run", "--bundle", text(&bundle)?, "mounts-f"])?;
    let error = String::from_utf8_lossy(&full.stderr);
    ensure!(
        !full.status.success() && error.contains("tmpcopyup of /copied"),
        "{error}"
    );
    ensure!(error.contains("/large"), "{error}");
    ensure!(
        fs::read_dir(&runtime.root)?.next().is_none(),
        "something is left"
    );
    Ok(())
}

/// opencontainers/runc 3248.
fn a_dev_may_be_read_only() -> Result<()> {
    let runtime = Runtime::koya()?;
    for terminal in [false, true] {
        let script = "grep ' /dev ' /proc/mounts; echo x > /dev/made || echo refused; echo x > /dev/null && echo written; \
                      echo y > /dev/shm/made && cat /dev/shm/made; test -t 1 && echo z > /dev/console";
        let bundle = bundle(script, |config| {
            config["process"]["terminal"] = terminal.into();
            for options in mount_options(config, "/dev") {
                options.push("ro".into());
            }
        })?;
        let output = runtime.call(&["run", "--bundle", text(&bundle)?, "mounts-d"])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines: Vec<_> = said
            .lines()
            .filter(|line| !line.contains("made:"))
            .collect();
        let first = lines.first().copied().unwrap_or_default();
        ensure!(first.starts_with("tmpfs /dev tmpfs ro,nosuid"), "{said}");
        let rest: &[&str] = match terminal {
            true => &["refused", "written", "y", "z"],
            false => &["refused", "written", "y"],
        };
        ensure!(lines[1..] == *rest, "{said}");
    }
    Ok(())
}

/// docker's `bind-recursive=disabled`, podman's `bind-nonrecursive`.
fn only_rbind_takes_what_is_mounted_below() -> Result<()> {
    let runtime = Runtime::koya()?;
    let tree = crate::tool::scratch("mounts-below")?;
    let sub = tree.join("sub");
    fs::create_dir(&sub)?;
    fs::write(sub.join("covered"), "")?;
    let mounted = crate::tool::Mounted::at(&sub)?;
    fs::write(sub.join("mounted"), "")?;
    let script =
        "ls /flat/sub; ls /deep/sub; touch /flat/sub/new; mkdir /flat/dir && ls -d /deep/dir";
    let bundle = bundle(script, |config| {
        config["root"]["readonly"] = false.into();
        for (at, how) in [("/deep", "rbind"), ("/flat", "bind")] {
            let mount =
                json!({"destination": at, "type": "bind", "source": tree, "options": [how]});
            add_mount(config, mount);
        }
    })?;
    let said = runtime.ok(&["run", "--bundle", text(&bundle)?, "mounts-b"])?;
    let words: Vec<_> = said.split_whitespace().collect();
    let expected = ["covered", "mounted", "/deep/dir"];
    ensure!(words == expected, "{said}");
    drop(mounted);
    ensure!(sub.join("new").exists(), "the file is not on the host");
    Ok(())
}

/// A mount with its source in the container's own root is made last, and becomes read-only by a remount.
fn a_read_only_mount_keeps_what_its_source_has() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle(
        "grep -E ' /(data|own) ' /proc/mounts; echo x > /own/made || echo refused",
        |_| (),
    )?;
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["root"]["readonly"] = false.into();
    let flags = ["nosuid", "nodev", "noexec", "noatime"];
    add_mount(&mut config, tmpfs("/data", &flags));
    let source = bundle.join("rootfs/data");
    add_mount(
        &mut config,
        json!({"destination": "/own", "type": "bind", "source": source, "options": ["bind", "ro"]}),
    );
    fs::write(&path, config.to_string())?;
    let output = runtime.call(&["run", "--bundle", text(&bundle)?, "mounts-o"])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<_> = said.lines().collect();
    let options = |line: &str| line.split(' ').nth(3).unwrap_or_default().to_owned();
    ensure!(lines.len() == 3 && lines[2] == "refused", "{output:?}");
    for (line, access) in [(lines[0], "rw"), (lines[1], "ro")] {
        let options = options(line);
        let words: Vec<_> = options.split(',').collect();
        let has_all = flags.iter().all(|flag| words.contains(flag));
        ensure!(words[0] == access && has_all, "{said}");
    }
    Ok(())
}

/// As on idmapped mounts, with and without a user namespace of the container; the same directory also as it is.
fn mounts_have_mapped_users() -> Result<()> {
    let runtime = Runtime::koya()?;
    let owners = |path: &Path| -> Result<(u32, u32)> {
        let found = fs::metadata(path)?;
        Ok((found.uid(), found.gid()))
    };
    let script = "cd /mapped; stat -c '%u:%g' old /plain/old; echo new > new; echo more >> old; chown 5:6 old; stat -c '%u:%g' old; \
                  chown 70000:6 old || echo refused; \
                  stat -c '%u' other; echo x >> other || echo denied; cat /plain/new";
    for (id, first, expected) in [
        (
            "mounts-u",
            100_000,
            "3:4 65534:65534 5:6 refused 65534 denied new",
        ),
        ("mounts-v", 0, "3:4 3:4 5:6 refused 65534 denied new"),
    ] {
        let bundle = bundle(script, |config| {
            let mapping = json!([{"containerID": 0, "hostID": first, "size": 65_536}]);
            let capabilities = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER"]);
            for set in ["bounding", "effective", "permitted"] {
                config["process"]["capabilities"][set] = capabilities.clone();
            }
            let mut mount = json!({"destination": "/mapped", "type": "bind", "source": "shared",
                "options": ["bind", "idmap"]});
            if first == 0 {
                mount["uidMappings"] = mapping.clone();
                mount["gidMappings"] = mapping;
            } else {
                config["linux"]["uidMappings"] = mapping.clone();
                config["linux"]["gidMappings"] = mapping;
                if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
                    namespaces.push(json!({"type": "user"}));
                }
            }
            add_mount(config, mount);
            let plain = json!({"destination": "/plain", "type": "bind", "source": "shared", "options": ["bind", "ro"]});
            add_mount(config, plain);
        })?;
        let shared = bundle.join("shared");
        make(&shared, 0o755)?;
        fs::write(shared.join("old"), "old\n")?;
        chown(shared.join("old"), Some(3), Some(4))?;
        fs::write(shared.join("other"), "other\n")?;
        chown(shared.join("other"), Some(90_000), Some(90_000))?;
        let output = runtime.call(&["run", "--bundle", text(&bundle)?, id])?;
        let said = String::from_utf8_lossy(&output.stdout);
        let words: Vec<_> = said.split_whitespace().collect();
        ensure!(words.join(" ") == expected, "{id}: {output:?}");
        ensure!(fs::read_to_string(shared.join("old"))? == "old\nmore\n");
        ensure!(owners(&shared.join("old"))? == (5, 6), "{id}: changed");
        ensure!(owners(&shared.join("new"))? == (0, 0), "{id}: new");
    }
    Ok(())
}

/// As podman requests them for images (without an upper directory) and for `:O`, here with crun's user namespace without
/// mappings, where root is the caller; and a link that is copied.
fn overlays_are_mounted_by_the_host() -> Result<()> {
    let runtime = Runtime::koya()?;
    let script = "cd /both; cat kept; echo more >> kept; rm gone; echo new > new; ls; touch /image/new || echo refused; \
                  ls /image; cat /proc/self/uid_map /proc/self/gid_map; readlink /a/link";
    let bundle = bundle(script, |config| {
        config["root"]["readonly"] = false.into();
        if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
            namespaces.push(json!({"type": "user"}));
        }
        // There is no such group.
        for options in mount_options(config, "/dev/pts") {
            options.retain(|option| option != "gid=5");
        }
    })?;
    for directory in ["lower", "upper", "work", "image", "below"] {
        make(&bundle.join(directory), 0o755)?;
    }
    for (file, content) in [
        ("lower/kept", "kept\n"),
        ("lower/gone", ""),
        ("image/of-it", ""),
    ] {
        fs::write(bundle.join(file), content)?;
    }
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let option = |name: &str, directory: &str| -> Result<String> {
        Ok(format!("{name}={}", text(&bundle.join(directory))?))
    };
    let both = [
        option("lowerdir", "lower")?,
        option("upperdir", "upper")?,
        option("workdir", "work")?,
        "private".into(),
    ];
    // Without an upper directory there are at least two.
    let image = format!(
        "{}:{}",
        option("lowerdir", "image")?,
        text(&bundle.join("below"))?
    );
    for (at, options) in [("/both", json!(both)), ("/image", json!([image]))] {
        let mount =
            json!({"destination": at, "type": "overlay", "source": "overlay", "options": options});
        add_mount(&mut config, mount);
    }
    std::os::unix::fs::symlink("nowhere", bundle.join("link"))?;
    let link = json!({"destination": "/a/link", "type": "bind", "source": "link",
        "options": ["rbind", "copy-symlink"]});
    add_mount(&mut config, link);
    fs::write(&path, config.to_string())?;
    let said = runtime.ok(&["run", "--bundle", text(&bundle)?, "mounts-l"])?;
    let words: Vec<_> = said.split_whitespace().collect();
    ensure!(
        words.join(" ") == "kept kept new refused of-it 0 0 1 0 0 1 nowhere",
        "{said}"
    );
    ensure!(fs::read_to_string(bundle.join("upper/kept"))? == "kept\nmore\n");
    ensure!(fs::read_to_string(bundle.join("upper/new"))? == "new\n");
    ensure!(fs::read_to_string(bundle.join("lower/kept"))? == "kept\n");
    Ok(())
}
