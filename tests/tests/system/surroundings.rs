//! A container's environment, compared with other engines: streams that can be opened, host name, working directory, limits,
//! devices.

use crate::tool::{
    Background, architecture, busybox, koya, run, run_in, saved_image, scratch, sh, stdout,
};
use anyhow::{Result, ensure};
use std::fs;
use std::os::unix::fs::MetadataExt;

crate::trials![
    streams_can_be_opened_by_every_user,
    localhost_and_the_containers_name_are_known,
    a_roots_own_files_stay,
    options_of_other_engines_have_their_effect,
    a_missing_working_directory_is_made_for_the_user,
    a_working_directory_in_a_mount_is_made,
    a_read_only_root_gets_its_working_directory,
    limits_are_an_engines,
    limits_can_be_set,
    a_privileged_container_has_the_guests_devices,
    a_volume_that_cannot_be_one_is_refused_by_name,
    volumes_go_where_links_lead,
    devices_as_volumes_are_the_guests,
    a_whole_dev_is_left_as_it_is,
];

const BOTH: &str = "echo out > /dev/stdout; echo err > /dev/stderr";

fn streams_can_be_opened_by_every_user() -> Result<()> {
    for user in ["0", "web", "1000:1000"] {
        let output = run(&["-u", user], &["sh", "-c", BOTH])?;
        ensure!(
            output.stdout == b"out\n" && output.stderr == b"err\n",
            "{user}: {output:?}"
        );
        let output = run(&["-t", "-u", user], &["sh", "-c", BOTH])?;
        let said = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        ensure!(said == "out\nerr\n", "{user} with a terminal: {output:?}");
    }
    let container = Background::start("streams-user", &[], &["sleep", "1000"])?;
    for user in ["0", "1000:1000"] {
        let output = container.exec(&["-u", user], &["sh", "-c", BOTH])?;
        ensure!(
            output.stdout == b"out\n" && output.stderr == b"err\n",
            "exec {user}: {output:?}"
        );
        let output = container.exec(&["-t", "-u", user], &["sh", "-c", BOTH])?;
        let said = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        ensure!(said == "out\nerr\n", "exec -t {user}: {output:?}");
    }
    // Devices of others keep their owner.
    let owner = stdout(container.exec(&["-u", "1000"], &["stat", "-c", "%u", "/dev/null"])?)?;
    ensure!(owner == "0", "/dev/null is {owner}'s");
    Ok(())
}

/// `docker run` has had these options for years.
fn options_of_other_engines_have_their_effect() -> Result<()> {
    let root = scratch("habits")?;
    busybox(&root)?;
    let own = scratch("habits-volume")?;
    fs::write(own.join("file"), "of the host")?;
    fs::write(root.join("etc/hosts"), "192.0.2.9\told\n")?;
    fs::write(root.join("etc/resolv.conf"), "nameserver 192.0.2.9\n")?;
    let volume = format!("type=bind,source={},target=/v,readonly", own.display());
    let options = [
        ["--add-host", "db:10.1.2.3"],
        ["--dns", "192.0.2.53"],
        ["--dns-search", "a.example"],
        ["--dns-option", "ndots:3"],
        ["--group-add", "4321"],
        ["--shm-size", "1m"],
        ["--pids-limit", "20"],
        ["--sysctl", "net.core.somaxconn=77"],
        ["--sysctl", "kernel.msgmax=4321"],
        ["--device", "/dev/fuse:/dev/own:rw"],
        ["--mount", &volume],
        ["--mount", "type=tmpfs,target=/t,tmpfs-size=2m"],
    ];
    let script = "grep -c old /etc/hosts; grep db /etc/hosts; cat /etc/resolv.conf; id -G; \
        df -k /dev/shm /t | awk 'NR > 1 {print $2}'; cat /sys/fs/cgroup/pids.max; \
        cat /proc/sys/net/core/somaxconn /proc/sys/kernel/msgmax; exec 5<>/dev/own && echo opened; \
        cat /v/file; echo; touch /v/x 2>/dev/null || echo read-only";
    let said = stdout(run_in(
        &root,
        options.as_flattened(),
        &["sh", "-c", script],
    )?)?;
    let wanted = "0\n10.1.2.3\tdb\nnameserver 192.0.2.53\nsearch a.example\noptions ndots:3\n0 4321\n\
        1024\n2048\n20\n77\n4321\nopened\nof the host\nread-only";
    ensure!(said == wanted, "{said:?}");
    // The root's own files are covered, not changed.
    ensure!(fs::read_to_string(root.join("etc/hosts"))?.contains("old"));
    let refused = run_in(&root, &["--device", "/dev/sda"], &["true"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        refused.status.code() == Some(125) && said.contains("/dev/sda is not one of"),
        "{said}"
    );
    Ok(())
}

/// Most images do not contain these files.
fn localhost_and_the_containers_name_are_known() -> Result<()> {
    let script = "cat /etc/hosts /etc/hostname; hostname";
    let mut root = std::path::PathBuf::new();
    for options in [
        &["--hostname", "inside"][..],
        &["--hostname", "inside", "--read-only"],
    ] {
        root = scratch("hosts")?;
        busybox(&root)?;
        let said = stdout(run_in(&root, options, &["sh", "-c", script])?)?;
        ensure!(said.contains("127.0.0.1\tlocalhost\n"), "{said}");
        ensure!(
            said.ends_with("127.0.1.1\tinside\ninside\ninside"),
            "{said}"
        );
    }
    // The root itself is not changed.
    for name in ["hosts", "hostname", "resolv.conf"] {
        let file = root.join("etc").join(name);
        ensure!(
            file.metadata().map_or(0, |data| data.len()) == 0,
            "{} was written",
            file.display()
        );
    }
    // The host's name servers, except those reachable only from the host.
    let all = fs::read_to_string("/etc/resolv.conf")?;
    let servers = all.lines().filter(|line| {
        line.starts_with("nameserver") && !line.contains(" 127.") && !line.ends_with("::1")
    });
    let wanted = servers.collect::<Vec<_>>().join("\n");
    let said = stdout(run_in(
        &root,
        &[],
        &["grep", "nameserver", "/etc/resolv.conf"],
    )?)?;
    ensure!(said == wanted && !said.is_empty(), "{said}");
    // Changes by a container are visible only in it.
    let write = "echo 192.0.2.1 other >> /etc/hosts && grep -c . /etc/hosts";
    ensure!(stdout(run_in(&root, &[], &["sh", "-c", write])?)? == "4");
    ensure!(stdout(run_in(&root, &[], &["sh", "-c", "grep -c . /etc/hosts"])?)? == "3");
    Ok(())
}

fn a_roots_own_files_stay() -> Result<()> {
    let root = scratch("own-hosts")?;
    busybox(&root)?;
    fs::write(root.join("etc/hosts"), "192.0.2.1 own\n")?;
    std::os::unix::fs::symlink("/nowhere/hostname", root.join("etc/hostname"))?;
    let said = stdout(run_in(
        &root,
        &[],
        &["sh", "-c", "cat /etc/hosts; readlink /etc/hostname"],
    )?)?;
    ensure!(said == "192.0.2.1 own\n/nowhere/hostname", "{said}");
    // The target of a link becomes a mount point, and its file is not written.
    ensure!(fs::read(root.join("nowhere/hostname"))?.is_empty());
    // A link into a mount leads to the file there.
    let options = ["--tmpfs", "/nowhere", "--hostname", "inside"];
    let said = stdout(run_in(&root, &options, &["cat", "/etc/hostname"])?)?;
    ensure!(said == "inside", "{said}");
    // Nor is the file of a volume at this path.
    let own = scratch("own-volume")?.join("hosts");
    fs::write(&own, "a volume's\n")?;
    let volume = format!("{}:/etc/hosts", own.display());
    ensure!(sh(&["-v", &volume], "cat /etc/hosts")? == "a volume's");
    Ok(())
}

const WHERE: &str = "pwd; stat -c %u:%g:%a .; touch here && echo written";

fn a_missing_working_directory_is_made_for_the_user() -> Result<()> {
    let root = scratch("workdir")?;
    busybox(&root)?;
    let options = ["-w", "/made/by/the/runtime", "-u", "33:33"];
    let said = stdout(run_in(&root, &options, &["sh", "-c", WHERE])?)?;
    ensure!(said == "/made/by/the/runtime\n33:33:755\nwritten", "{said}");
    ensure!(root.join("made").metadata()?.uid() == 0);
    // Working directory of an image.
    let dir = scratch("workdir-image")?;
    let config = |digest: &str| {
        format!(
            r#"{{"architecture":"{}","os":"linux","config":{{"WorkingDir":"/srv/not/there"}},
                "rootfs":{{"type":"layers","diff_ids":["sha256:{digest}"]}}}}"#,
            architecture()
        )
    };
    let image = saved_image(&dir, None, config)?;
    let mut command = koya(["run", "--image"]);
    let said = stdout(command.arg(image).args(["--", "pwd"]).output()?)?;
    ensure!(said == "/srv/not/there", "{said}");
    Ok(())
}

/// In a mount, only the guest can create it.
fn a_working_directory_in_a_mount_is_made() -> Result<()> {
    let options = [
        "--tmpfs",
        "/scratch",
        "-w",
        "/scratch/deep/er",
        "-u",
        "33:33",
    ];
    let said = sh(&options, WHERE)?;
    ensure!(said == "/scratch/deep/er\n33:33:755\nwritten", "{said}");
    let read_only = [&["--read-only"], &options[..]].concat();
    ensure!(sh(&read_only, "pwd")? == "/scratch/deep/er");
    let data = scratch("workdir-volume")?;
    let volume = format!("{}:/data", data.display());
    let said = sh(&["-v", &volume, "-w", "/data/new", "-u", "33:33"], WHERE)?;
    ensure!(
        said == "/data/new\n33:33:755\nwritten" && data.join("new/here").exists(),
        "{said}"
    );
    Ok(())
}

fn a_read_only_root_gets_its_working_directory() -> Result<()> {
    let root = scratch("workdir-read-only")?;
    busybox(&root)?;
    let options = ["--read-only", "-w", "/made"];
    let said = stdout(run_in(&root, &options, &["pwd"])?)?;
    ensure!(said == "/made" && root.join("made").is_dir(), "{said}");
    Ok(())
}

const LIMITS: &str =
    "awk '/Max processes/ {print $3, $4} /Max open files/ {print $4, $5}' /proc/self/limits";

/// The guest's size does not limit the number of its users' processes.
fn limits_are_an_engines() -> Result<()> {
    for user in ["0", "1000:1000"] {
        let said = sh(&["-u", user, "--memory", "128m"], LIMITS)?;
        ensure!(
            said == "unlimited unlimited\n1048576 1048576",
            "{user}: {said}"
        );
    }
    let container = Background::start("limits", &[], &["sleep", "1000"])?;
    let said = stdout(container.exec(&["-u", "1000"], &["sh", "-c", LIMITS])?)?;
    ensure!(
        said == "unlimited unlimited\n1048576 1048576",
        "exec: {said}"
    );
    Ok(())
}

fn limits_can_be_set() -> Result<()> {
    let options = ["--ulimit", "nofile=64:128", "--ulimit", "nproc=50"];
    ensure!(sh(&options, LIMITS)? == "50 50\n64 128");
    // More than the default of the kernel's fs.nr_open.
    let said = sh(&["--ulimit", "nofile=1073741816"], LIMITS)?;
    ensure!(said.ends_with("1073741816 1073741816"), "{said}");
    let container = Background::start("limits-set", &options, &["sleep", "1000"])?;
    let said = stdout(container.exec(&[], &["sh", "-c", LIMITS])?)?;
    ensure!(said == "50 50\n64 128", "exec: {said}");
    for wrong in ["nofiles=5", "nofile=6:5"] {
        let refused = run(&["--ulimit", wrong], &["true"])?;
        ensure!(refused.status.code() == Some(125), "{wrong}: {refused:?}");
    }
    Ok(())
}

fn a_privileged_container_has_the_guests_devices() -> Result<()> {
    let script = "for d in fuse net/tun loop-control kmsg; do [ -c /dev/$d ] || echo no /dev/$d; done; \
        head -c 1 /dev/zero | wc -c; exec 3<> /dev/net/tun && echo opened; ls /dev/pts | head -n 1";
    let said = sh(&["--privileged"], script)?;
    ensure!(said.starts_with("1\nopened"), "{said}");
    // Without privileges, only the standard devices.
    ensure!(sh(&[], "ls /dev/fuse /dev/kmsg 2>/dev/null | wc -l")? == "0");
    // A container's disk has its usual name and mode.
    let disk = scratch("privileged-disk")?.join("disk");
    fs::File::create(&disk)?.set_len(1 << 20)?;
    let option = format!("{}:ro", disk.display());
    let said = sh(
        &["--privileged", "--disk", &option],
        "ls -l /dev/vda | cut -c1; cat /sys/block/vda/ro",
    )?;
    ensure!(said == "b\n1", "{said}");
    Ok(())
}

fn a_volume_that_cannot_be_one_is_refused_by_name() -> Result<()> {
    let socket = scratch("socket")?.join("s.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let refused = run(&["-v", &format!("{}:/s", socket.display())], &["true"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        refused.status.code() == Some(125) && said.contains("s.sock"),
        "{refused:?}"
    );
    Ok(())
}

/// In many images `/var/run` is a link to a `/run` that does not exist.
fn volumes_go_where_links_lead() -> Result<()> {
    let root = scratch("links")?;
    busybox(&root)?;
    fs::create_dir_all(root.join("var"))?;
    fs::remove_file(root.join("etc/resolv.conf")).ok();
    for (to, at) in [
        ("/run", "var/run"),
        ("../run/stub/resolv.conf", "etc/resolv.conf"),
    ] {
        std::os::unix::fs::symlink(to, root.join(at))?;
    }
    let own = scratch("links-volume")?;
    fs::write(own.join("token"), "secret\n")?;
    let directory = format!("{}:/var/run/secrets/one:ro", own.display());
    let file = format!("{}:/etc/resolv.conf", own.join("token").display());
    let script = "cat /run/secrets/one/token /run/stub/resolv.conf; readlink /etc/resolv.conf";
    for options in [&["--read-only"][..], &[]] {
        let options = [options, &["-v", &directory, "-v", &file]].concat();
        let said = stdout(run_in(&root, &options, &["sh", "-c", script])?)?;
        ensure!(
            said == "secret\nsecret\n../run/stub/resolv.conf",
            "{options:?}: {said}"
        );
    }
    Ok(())
}

fn node(at: &std::path::Path, major: u32, minor: u32) -> Result<()> {
    let mut mknod = std::process::Command::new("mknod");
    mknod.args(["-m", "666"]).arg(at).arg("c");
    stdout(
        mknod
            .args([major.to_string(), minor.to_string()])
            .output()?,
    )
    .map(drop)
}

/// As in pods: hostPath volumes of the type CharDevice.
fn devices_as_volumes_are_the_guests() -> Result<()> {
    let dir = scratch("nodes")?;
    let numbers = [
        ("tun", 10, 200),
        ("fuse", 10, 229),
        ("null", 1, 3),
        ("lost", 10, 231),
    ];
    for (name, major, minor) in numbers {
        node(&dir.join(name), major, minor)?;
    }
    fs::write(dir.join("file"), "a file\n")?;
    let volume = |name: &str, at: &str| format!("{}:{at}", dir.join(name).display());
    let volumes = [
        volume("tun", "/dev/net/tun"),
        volume("fuse", "/dev/fuse"),
        volume("null", "/etc/covered"),
        volume("file", "/dev/urandom"),
    ];
    let volumes: Vec<&str> = volumes.iter().flat_map(|volume| ["-v", volume]).collect();
    let script = "for d in net/tun fuse; do exec 3<> /dev/$d && echo $d; done; \
        [ -c /etc/covered ] && cat /etc/covered /dev/urandom; head -c 1 /dev/zero | wc -c";
    let said = sh(&[&["--privileged"], &volumes[..]].concat(), script)?;
    ensure!(said == "net/tun\nfuse\na file\n1", "{said}");
    // Without privileges the node exists too, but cannot be opened, as with other engines.
    let said = sh(
        &volumes,
        "[ -c /dev/net/tun ] && cat /etc/covered /dev/urandom",
    )?;
    ensure!(said == "a file", "{said}");
    let refused = run(&["-v", &volume("lost", "/dev/lost")], &["true"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    let wanted = "it is a device of the host, which a guest does not have";
    ensure!(
        refused.status.code() == Some(125) && said.contains(wanted) && said.contains("lost"),
        "{refused:?}"
    );
    Ok(())
}

fn a_whole_dev_is_left_as_it_is() -> Result<()> {
    let dev = scratch("whole-dev")?;
    for (name, minor) in [("null", 3), ("zero", 5), ("random", 8)] {
        node(&dev.join(name), 1, minor)?;
    }
    fs::create_dir(dev.join("pts"))?;
    std::os::unix::fs::symlink("/proc/self/fd", dev.join("fd"))?;
    fs::write(dev.join("mark"), "")?;
    let names = || -> Result<Vec<String>> {
        let all = fs::read_dir(&dev)?.map(|e| Ok(e?.file_name().to_string_lossy().into()));
        let mut all = all.collect::<Result<Vec<String>>>()?;
        all.sort();
        Ok(all)
    };
    let before = names()?;
    let script = "echo lost > /dev/null; head -c 1 /dev/zero | wc -c; cd /dev; echo *; cat /proc/sys/vm/max_map_count";
    for options in [&["--privileged"][..], &[]] {
        let volume = format!("{}:/dev", dev.display());
        let said = sh(&[options, &["-v", &volume]].concat(), script)?;
        ensure!(
            said == "1\nfd mark null pts random zero\n1048576",
            "{options:?}: {said}"
        );
        ensure!(names()? == before, "{:?}", names()?);
    }
    Ok(())
}
