//! Processes added by `koya-runtime exec`, and messages about processes, as with runc.

use crate::oci::{Runtime, bundle, text};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

crate::trials!(
    processes_are_added_where_users_are_mapped,
    an_added_process_waits_until_a_pause_is_over,
    a_process_that_is_added_at_the_end_fails_for_that,
    what_a_process_lacks_is_said_as_by_runc,
    what_podman_passes_to_crun_is_understood,
);

fn processes_are_added_where_users_are_mapped() -> Result<()> {
    let runtime = Runtime::koya()?;
    let mapped = bundle("exec sleep 1000", |config| {
        let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_534}]);
        config["linux"]["uidMappings"] = mapping.clone();
        config["linux"]["gidMappings"] = mapping;
        if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
            namespaces.push(json!({"type": "user"}));
        }
    })?;
    runtime.ok(&["run", "-d", "--bundle", text(&mapped)?, "exec-m"])?;
    let said = runtime.ok(&[
        "exec",
        "exec-m",
        "sh",
        "-c",
        "id -u; cat /proc/self/uid_map",
    ])?;
    let words: Vec<_> = said.split_whitespace().collect();
    ensure!(words == ["0", "0", "100000", "65534"], "{said}");
    let script = "id -u; echo opened > /dev/stdout";
    let said = runtime.ok(&["exec", "--user", "1000:1000", "exec-m", "sh", "-c", script])?;
    ensure!(said == "1000\nopened", "{said}");
    runtime.ok(&["delete", "--force", "exec-m"])?;
    Ok(())
}

/// containers/crun 1510 (the same of kill): whenever the container is killed, the process is killed or refused for that.
fn a_process_that_is_added_at_the_end_fails_for_that() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("exec sleep 1000", |_| ())?;
    for delay in [0, 200, 400, 800] {
        runtime.ok(&["run", "-d", "--bundle", text(&bundle)?, "exec-k"])?;
        let mut exec = runtime.command(&["exec", "exec-k", "sleep", "1000"]);
        let child = exec.stderr(Stdio::piped()).spawn()?;
        std::thread::sleep(Duration::from_millis(delay));
        runtime.ok(&["kill", "exec-k", "KILL"])?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        let is_refused = said.contains("cannot exec in a stopped container");
        ensure!(
            output.status.code() == Some(if is_refused { 255 } else { 137 }),
            "{delay} ms: {said}"
        );
        runtime.ok(&["delete", "--force", "exec-k"])?;
    }
    Ok(())
}

fn an_added_process_waits_until_a_pause_is_over() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("exec sleep 1000", |_| ())?;
    runtime.ok(&["run", "-d", "--bundle", text(&bundle)?, "exec-p"])?;
    runtime.ok(&["pause", "exec-p"])?;
    let mut exec = runtime.command(&["exec", "--ignore-paused", "exec-p", "echo", "ok"]);
    let mut child = exec.stdout(Stdio::piped()).spawn()?;
    // The process above waits at least as long as this refusal takes.
    let refused = runtime.call(&["exec", "exec-p", "true"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        refused.status.code() == Some(255) && said.contains("cannot exec in a paused container"),
        "{said}"
    );
    ensure!(child.try_wait()?.is_none(), "it did not wait");
    runtime.ok(&["resume", "exec-p"])?;
    let mut said = String::new();
    let out = child.stdout.take();
    out.context("no output")?.read_to_string(&mut said)?;
    ensure!(child.wait()?.success() && said == "ok\n", "{said:?}");
    runtime.ok(&["delete", "--force", "exec-p"])?;
    Ok(())
}

/// opencontainers/runc 4171.
fn what_a_process_lacks_is_said_as_by_runc() -> Result<()> {
    let runtime = Runtime::koya()?;
    let ambient = bundle("grep CapAmb /proc/self/status", |config| {
        let capabilities = &mut config["process"]["capabilities"];
        capabilities["inheritable"] = json!(["CAP_KILL"]);
        capabilities["ambient"] = json!(["CAP_KILL", "CAP_CHOWN"]);
    })?;
    let ran = runtime.call(&["run", "--bundle", text(&ambient)?, "exec-a"])?;
    let said = String::from_utf8_lossy(&ran.stderr);
    ensure!(
        said.contains("level=warning")
            && said.contains("can't raise ambient capability CAP_CHOWN: "),
        "{said}"
    );
    ensure!(!said.contains("CAP_KILL"), "{said}");
    ensure!(ran.stdout == b"CapAmb:\t0000000000000020\n", "{ran:?}");

    let broken = bundle("exec sleep 1000", |_| ())?;
    let script = broken.join("rootfs/run.sh");
    fs::write(&script, "#!/none foo\n")?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    runtime.ok(&["run", "-d", "--bundle", text(&broken)?, "exec-b"])?;
    let exec = runtime.call(&["exec", "exec-b", "/run.sh"])?;
    let said = String::from_utf8_lossy(&exec.stderr);
    let expected =
        "exec /run.sh: no such file or directory: its interpreter \"/none\" is not there\n";
    ensure!(!exec.status.success() && said == expected, "{said}");
    runtime.ok(&["delete", "--force", "exec-b"])?;

    // With a hook, which may bring the program, only the start fails. Docker 20.10 keeps a container that it can't delete at
    // once.
    let missing = bundle("", |config| {
        config["process"]["args"] = json!(["/none"]);
        config["hooks"] = json!({"createRuntime": [{"path": "/bin/true"}]});
    })?;
    let pid_file = missing.join("pid");
    let create = ["create", "--pid-file", text(&pid_file)?];
    runtime.ok(&[&create[..], &["--bundle", text(&missing)?, "exec-m"]].concat())?;
    let start = runtime.call(&["start", "exec-m"])?;
    let process = fs::read_to_string(format!("/proc/{}/stat", fs::read_to_string(&pid_file)?));
    let lives = process.is_ok_and(|stat| !stat.contains(") Z "));
    ensure!(!start.status.success() && !lives, "{start:?}");
    runtime.ok(&["delete", "exec-m"])?;
    Ok(())
}

/// `--cgroups=disabled`, `--group-add keep-groups`, and a configuration that is not in the bundle, nor needed afterwards
/// (opencontainers/runtime-spec, runtime.md: later changes do not affect a container). Its ID is one that runc takes, too.
fn what_podman_passes_to_crun_is_understood() -> Result<()> {
    let runtime = Runtime::koya()?;
    let bundle = bundle("exec sleep 1000", |config| {
        config["annotations"] = json!({"run.oci.keep_original_groups": "1"});
    })?;
    let (config, pid_file) = (bundle.join("other.json"), bundle.join("pid"));
    fs::rename(bundle.join("config.json"), &config)?;
    let create = [
        "--cgroup-manager",
        "disabled",
        "create",
        "--bundle",
        text(&bundle)?,
        "--config",
        text(&config)?,
        "--pid-file",
        text(&pid_file)?,
        ".exec+k",
    ];
    let mut child = Command::new("setpriv")
        .args(["--groups", "7,8", "koya-runtime", "--root"])
        .arg(&runtime.root)
        .args(create)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    ensure!(child.wait()?.success(), "it is not created");
    fs::remove_file(&config)?;
    runtime.ok(&["start", ".exec+k"])?;
    let pid = fs::read_to_string(&pid_file)?;
    let group = |of: &str| fs::read_to_string(format!("/proc/{of}/cgroup"));
    ensure!(group(&pid)? == group("self")?, "another control group");
    let script = "grep Groups /proc/1/status; id -G";
    let said = runtime.ok(&["exec", ".exec+k", "sh", "-c", script])?;
    let said: Vec<_> = said.split_whitespace().collect();
    ensure!(said == ["Groups:", "7", "8", "0", "7", "8"], "{said:?}");
    runtime.ok(&["delete", "--force", ".exec+k"])?;
    Ok(())
}
