//! Confinement of a container under containerd, by users, AppArmor profile and limits, in the guest and on the host.

use crate::daemon::{Containerd, RUNTIME, ended};
use crate::tool::{scratch, shared_rootfs, stdout, until};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::process::Command;

/// A configuration with a user namespace and process limits.
pub(crate) fn users_are_mapped(containerd: &Containerd) -> Result<()> {
    let spec = stdout(containerd.ctr(["oci", "spec"]).output()?)?;
    let mut spec: serde_json::Value = serde_json::from_str(&spec)?;
    spec["root"] = serde_json::json!({"path": shared_rootfs()});
    let script =
        "id -u; cat /proc/self/uid_map; ulimit -Sn; ulimit -Hn; ls /sys/kernel | head -n 1";
    spec["process"]["args"] = serde_json::json!(["/bin/sh", "-c", script]);
    spec["process"]["env"] = serde_json::json!(["PATH=/bin"]);
    let limit = serde_json::json!({"type": "RLIMIT_NOFILE", "soft": 777, "hard": 888});
    spec["process"]["rlimits"] = serde_json::json!([limit]);
    // Two ranges; `podman run --userns keep-id` has three.
    let mapping = serde_json::json!([{"containerID": 0, "hostID": 10000, "size": 1000},
        {"containerID": 1000, "hostID": 20000, "size": 64536}]);
    let linux = &mut spec["linux"];
    linux["uidMappings"] = mapping.clone();
    linux["gidMappings"] = mapping;
    let namespaces = linux["namespaces"]
        .as_array_mut()
        .context("no namespaces")?;
    namespaces.push(serde_json::json!({"type": "user"}));
    linux["cgroupsPath"] = serde_json::json!(format!("/{}/users", containerd.group));
    let config = containerd.dir.join("users.json");
    fs::write(&config, spec.to_string())?;
    let mut ctr = containerd.ctr(["run", "--runtime", RUNTIME, "--rm", "--config"]);
    let said = stdout(ctr.arg(&config).arg("users").output()?)?;
    let words: Vec<&str> = said.split_whitespace().collect();
    ensure!(
        words[..9]
            == [
                "0", "0", "10000", "1000", "1000", "20000", "64536", "777", "888"
            ],
        "{said}"
    );
    ensure!(words.len() == 10, "no sysfs: {said}");
    containerd.nothing_is_left()
}

/// The threads that serve the guest have the container's profile on the host, and the profile's denials apply to the guest.
pub(crate) fn an_apparmor_profile_holds(containerd: &Containerd) -> Result<()> {
    let profile = format!("koya-test-{}", containerd.number);
    let shared = scratch("apparmor")?;
    for name in ["allowed", "denied"] {
        fs::write(shared.join(name), name)?;
    }
    // The relevant rules of the container engines' default profile, and one file: by its path within its file system, since
    // the mount of a share is not attached anywhere.
    let text = format!(
        "profile {profile} flags=(attach_disconnected,mediate_deleted) {{\n\
         file,\nnetwork,\ncapability,\nsignal,\ndeny mount,\ndeny /**/denied r,\n}}\n"
    );
    let file = containerd.dir.join("profile");
    fs::write(&file, text)?;
    let securityfs = std::path::Path::new("/sys/kernel/security/apparmor");
    if !securityfs.exists() {
        let mut mount = Command::new("mount");
        mount.args(["-t", "securityfs", "securityfs", "/sys/kernel/security"]);
        stdout(mount.output()?)?;
    }
    let parser = |action: &str| {
        let mut parser = Command::new("apparmor_parser");
        parser.args([action, "--skip-cache"]).arg(&file).output()
    };
    stdout(parser("--replace")?)?;

    let mount = format!(
        "type=bind,src={},dst=/data,options=rbind:rw",
        shared.display()
    );
    let options = [
        "--detach",
        "--apparmor-profile",
        &profile,
        "--mount",
        &mount,
    ];
    let script = "cat /data/allowed; cat /data/denied 2>&1; sleep 600";
    let mut run = containerd.run(&options, "confined", &["sh", "-c", script]);
    stdout(run.output()?)?;
    let shim = containerd.shim_of("confined")?.context("no shim")?;
    let (mut inside, mut outside) = (Vec::new(), Vec::new());
    for thread in fs::read_dir(format!("/proc/{shim}/task"))? {
        let thread = thread?.path();
        let name = fs::read_to_string(thread.join("comm"))?.trim().to_owned();
        let label = fs::read_to_string(thread.join("attr/apparmor/current"))?;
        match label.trim() == format!("{profile} (enforce)") {
            true => inside.push(name),
            false => outside.push(name),
        }
    }
    for guests in ["koya-vcpu0", "koya-loop", "koya-fs"] {
        let is_it = |name: &String| name.starts_with(guests);
        ensure!(
            inside.iter().any(is_it) && !outside.iter().any(is_it),
            "{guests}: with the profile {inside:?}, without {outside:?}"
        );
    }
    ensure!(outside.iter().any(|name| name == "koya-rpc"), "{outside:?}");
    let mut exec = containerd.ctr(["task", "exec", "--exec-id", "e", "confined"]);
    let (code, text) = ended(&exec.args(["cat", "/data/allowed"]).output()?);
    ensure!(code == Some(0) && text == "allowed", "{code:?} {text}");
    let mut exec = containerd.ctr(["task", "exec", "--exec-id", "f", "confined"]);
    let (code, text) = ended(&exec.args(["cat", "/data/denied"]).output()?);
    ensure!(
        code == Some(1) && text.contains("Permission denied"),
        "{code:?} {text}"
    );
    let kill = ["task", "kill", "-s", "KILL", "confined"];
    stdout(containerd.ctr(kill).output()?)?;
    containerd.wait_for("confined", "STOPPED")?;
    containerd.remove("confined")?;
    stdout(parser("--remove")?)?;

    let options = ["--rm", "--apparmor-profile", &profile];
    let mut run = containerd.run(&options, "unknown", &["true"]);
    let (code, text) = ended(&run.output()?);
    let named = text.contains("AppArmor") && text.contains(&profile);
    ensure!(code != Some(0) && named, "{code:?} {text}");
    fs::remove_dir_all(shared)?;
    containerd.nothing_is_left()
}

/// The container's limit applies to its control group in the guest; the host's group has additional memory for the machine.
pub(crate) fn limits_hold_inside_and_outside(containerd: &Containerd) -> Result<()> {
    const LIMIT_MIB: u64 = 100;
    let bytes = (LIMIT_MIB << 20).to_string();
    let options = ["-d", "--memory-limit", &bytes];
    stdout(
        containerd
            .run(&options, "limited", &["sleep", "1000"])
            .output()?,
    )?;
    let exec = |id: &str, script: &str| stdout(containerd.exec("limited", id, script).output()?);
    let total = exec("total", "grep MemTotal /proc/meminfo | tr -dc 0-9")?;
    let total = total.parse::<u64>()? >> 10;
    ensure!(
        (LIMIT_MIB..LIMIT_MIB + 48).contains(&total),
        "{total} MiB in the guest"
    );
    let metrics = stdout(containerd.ctr(["task", "metrics", "limited"]).output()?)?;
    let line = metrics
        .lines()
        .find(|line| line.starts_with("memory.usage_limit"));
    ensure!(
        line.is_some_and(|line| line.trim_end().ends_with(&bytes)),
        "{metrics}"
    );
    let outside = fs::read_to_string(containerd.groups().join("limited/memory.max"))?;
    let outside = outside.trim().parse::<u64>()? >> 20;
    ensure!(
        (LIMIT_MIB + 32..LIMIT_MIB + 160).contains(&outside),
        "{outside} MiB on the host"
    );
    // Without a limit, the host's group has one all the same; neither group may swap.
    stdout(
        containerd
            .run(&["-d"], "free", &["sleep", "1000"])
            .output()?,
    )?;
    let free = fs::read_to_string(containerd.groups().join("free/memory.max"))?;
    let free = free.trim().parse::<u64>()? >> 20;
    ensure!((512..1024).contains(&free), "{free} MiB on the host");
    for name in ["limited", "free"] {
        // A kernel without swap does not have this file.
        let swap = containerd.groups().join(name).join("memory.swap.max");
        if swap.exists() {
            let swap = fs::read_to_string(swap)?;
            ensure!(swap.trim() == "0", "{name}: {swap}");
        }
    }
    stdout(containerd.ctr(["task", "rm", "-f", "free"]).output()?)?;
    containerd.remove("free")?;
    // At the limit, the guest kernel kills only the process that exceeds it.
    let greedy = "head -c 120m /dev/zero | tail > /dev/null; echo $?";
    let (code, text) = ended(&containerd.exec("limited", "greedy", greedy).output()?);
    ensure!(code == Some(0) && text.contains("137"), "{code:?} {text}");
    ensure!(exec("after", "echo alive")? == "alive");
    // The container has used its whole limit: memory beyond that on the host is the share of `overhead.podFixed`.
    let peak = fs::read_to_string(containerd.groups().join("limited/memory.peak"))?;
    let beyond = (peak.trim().parse::<u64>()? >> 20).checked_sub(LIMIT_MIB);
    let beyond = beyond.context("the container never had its limit")?;
    eprintln!(
        "containerd: at its limit of {LIMIT_MIB} MiB, {beyond} MiB beyond it on the host, which allows {}",
        outside - LIMIT_MIB
    );
    stdout(containerd.ctr(["task", "rm", "-f", "limited"]).output()?)?;
    containerd.remove("limited")?;
    containerd.nothing_is_left()?;
    let group = containerd.groups().join("limited");
    until("the group's end", || Ok((!group.exists()).then_some(())))
}
