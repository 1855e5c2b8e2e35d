//! Hooks in a container's configuration, under containerd.

use crate::daemon::{Containerd, RUNTIME, ended};
use crate::tool::{busybox, scratch};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Runs a container with these hooks, and a control group named after it.
fn run(
    containerd: &Containerd,
    root: &Path,
    name: &str,
    hooks: Value,
) -> Result<(Option<i32>, String)> {
    let spec = crate::tool::stdout(containerd.ctr(["oci", "spec"]).output()?)?;
    let mut spec: Value = serde_json::from_str(&spec)?;
    spec["root"] = json!({"path": root});
    spec["process"]["args"] = json!([
        "/bin/sh",
        "-c",
        "cat /sys/class/net/*/address /hooked; sleep 1"
    ]);
    spec["process"]["env"] = json!(["PATH=/bin"]);
    spec["linux"]["cgroupsPath"] = json!(format!("/{}/{name}", containerd.group));
    spec["hooks"] = hooks;
    let config = containerd.dir.join("hooks.json");
    fs::write(&config, spec.to_string())?;
    let mut ctr: Command = containerd.ctr(["run", "--runtime", RUNTIME, "--rm", "--config"]);
    Ok(ended(&ctr.arg(&config).arg(name).output()?))
}

/// Hooks on the host may set up the container's network and files; `startContainer` hooks run in the guest. A failing hook
/// fails the start, and leaves nothing behind.
pub(crate) fn hooks_run(containerd: &Containerd) -> Result<()> {
    let (root, dir) = (scratch("hooks-root")?, scratch("hooks")?);
    busybox(&root)?;
    let log = dir.join("log");
    let at = log.display();
    let mac = "02:00:00:00:00:77";
    let hook = |script: String| json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]);
    let note = |kind: &str| {
        let links = "$(ip -o link | grep -c koya-hook)";
        format!(
            "s=$(cat); echo {kind} $(echo \"$s\" | grep -o '\"id\":\"[^\"]*') {links} >> {at}; "
        )
    };
    // Like Docker's hook: creates an interface on the host and moves it to the network namespace of the pid.
    let network = "pid=$(echo \"$s\" | sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); \
        ip link add koya-hook1 type veth peer name koya-hook2; \
        ip link set koya-hook1 address 02:00:00:00:00:77 netns $pid";
    let hooks = json!({
        "prestart": hook(note("prestart") + network),
        "createRuntime": hook(note("createRuntime")),
        "createContainer": hook(note("createContainer")),
        "poststart": hook(note("poststart")),
        "poststop": hook(note("poststop")),
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "echo in the guest > /hooked"]}],
    });
    let (code, text) = run(containerd, &root, "hooked", hooks)?;
    ensure!(code == Some(0), "{code:?} {text}");
    ensure!(text.contains(mac), "no interface of the hook's: {text}");
    ensure!(text.ends_with("in the guest"), "{text}");
    let said = fs::read_to_string(&log).context("no hook ran")?;
    let lines: Vec<_> = said.lines().collect();
    let expected = [
        ("prestart", 0),
        ("createRuntime", 1),
        // In the network namespace of the container, which has the other end.
        ("createContainer", 1),
        ("poststart", 1),
        ("poststop", 1),
    ];
    let expected = expected.map(|(kind, links)| format!("{kind} \"id\":\"hooked {links}"));
    ensure!(lines == expected, "{said}");
    containerd.nothing_is_left()?;

    fs::remove_file(&log)?;
    let hooks = json!({
        "prestart": hook(note("prestart") + "echo no address left >&2; exit 5"),
        "poststop": hook(note("poststop")),
    });
    let (code, text) = run(containerd, &root, "failed", hooks)?;
    ensure!(code != Some(0), "{text}");
    let wanted = "error running prestart hook #0: /bin/sh: exit status: 5: no address left";
    ensure!(text.contains(wanted), "{text}");
    let said = fs::read_to_string(&log)?;
    ensure!(
        said.lines().count() == 2 && said.contains("poststop"),
        "{said}"
    );
    containerd.nothing_is_left()
}
