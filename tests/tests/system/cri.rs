//! Pods as the kubelet makes them, over the Container Runtime Interface of the real containerd: each test
//! with each version of containerd that Debian has.

use crate::daemon::{Containerd, IMAGE, Test, Use, trials_of};
use crate::tool::until;
use anyhow::{Context, Result, ensure};
use koya_test_cri::{Cri, v1};
use std::fs;
use std::path::PathBuf;

/// Every test, for each containerd.
pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    let tests: [Test; 2] = [
        ("a_pod_lives", a_pod_lives),
        ("pods_reach_each_other", pods_reach_each_other),
    ];
    trials_of("cri", Use::Cri, tests)
}

/// A pod, and the client that made it.
struct Pod<'a> {
    cri: &'a Cri,
    id: String,
    config: v1::PodSandboxConfig,
    logs: PathBuf,
}

impl<'a> Pod<'a> {
    fn start(
        cri: &'a Cri,
        containerd: &Containerd,
        name: &str,
        change: impl FnOnce(&mut v1::PodSandboxConfig),
    ) -> Result<Self> {
        let logs = containerd.dir.join(format!("logs-{name}"));
        fs::create_dir_all(&logs)?;
        let mut config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: logs.to_string_lossy().into_owned(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", containerd.group),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(v1::NamespaceOption {
                        pid: v1::NamespaceMode::Container as i32,
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        Ok(Self {
            id: cri.run_pod(&config, "koya")?,
            cri,
            config,
            logs,
        })
    }

    /// A container that runs, with what the kubelet would say of it.
    fn run(
        &self,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut v1::ContainerConfig),
    ) -> Result<String> {
        let mut config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(v1::ImageSpec {
                image: IMAGE.into(),
                ..Default::default()
            }),
            command: command.iter().map(|word| (*word).into()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(v1::LinuxContainerConfig {
                security_context: Some(v1::LinuxContainerSecurityContext {
                    namespace_options: Some(v1::NamespaceOption {
                        pid: v1::NamespaceMode::Container as i32,
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let id = self.cri.create(&self.id, &self.config, config)?;
        self.cri.start(&id)?;
        Ok(id)
    }

    /// What it said, by the log that the kubelet reads: without time, stream and mark.
    fn log(&self, name: &str) -> Result<String> {
        let text = fs::read_to_string(self.logs.join(format!("{name}.log")))?;
        let lines = text
            .lines()
            .map(|line| line.splitn(4, ' ').nth(3).unwrap_or(line));
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }

    fn wait_for_end(&self, container: &str) -> Result<v1::ContainerStatus> {
        until("its end", || {
            let status = self.cri.status(container)?;
            let has_ended = status.state() == v1::ContainerState::ContainerExited;
            Ok(has_ended.then_some(status))
        })
    }

    /// The output of a command that must succeed.
    fn exec(&self, container: &str, script: &str) -> Result<String> {
        let out = self.cri.exec_sync(container, &["sh", "-c", script])?;
        let stdout = String::from_utf8_lossy(&out.stdout).trim_end().to_owned();
        let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.exit_code == 0, "{}: {stdout} {stderr}", out.exit_code);
        Ok(stdout)
    }

    fn remove(self) -> Result<()> {
        self.cri.remove_pod(&self.id)
    }
}

/// How a container's own settings are reached.
fn linux(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerConfig {
    config.linux.get_or_insert_default()
}

fn a_pod_lives(containerd: &Containerd) -> Result<()> {
    let cri = Cri::connect(&containerd.socket())?;
    let pod = Pod::start(&cri, containerd, "life", |_| {})?;
    let script = "mkdir /www; echo pong > /www/index.html; echo serving; exec httpd -f -p 127.0.0.1:8080 -h /www";
    let web = pod.run("web", &["sh", "-c", script], |_| {})?;
    until("its log", || {
        Ok((pod.log("web")? == "serving").then_some(()))
    })?;

    // Containers of a pod talk over localhost, and have processes of their own.
    let script = "until wget -qO- http://127.0.0.1:8080/; do sleep 0.2; done; hostname; ls /www";
    let client = pod.run("client", &["sh", "-c", script], |_| {})?;
    let ended = pod.wait_for_end(&client)?;
    ensure!(ended.exit_code == 1, "{ended:?}");
    let said = pod.log("client")?;
    ensure!(said.starts_with("pong\nlife\n"), "{said}");
    cri.remove(&client)?;

    // A probe, and its failure.
    ensure!(pod.exec(&web, "cat /www/index.html")? == "pong");
    let out = cri.exec_sync(&web, &["sh", "-c", "echo no >&2; exit 5"])?;
    ensure!(out.exit_code == 5 && out.stderr == b"no\n", "{out:?}");
    // The same over the server's streams.
    let script = "read line; echo got $line; echo bad >&2; exit 3";
    let out = cri.exec(&web, &["sh", "-c", script], false, "typed\n")?;
    ensure!(
        out.stdout == "got typed\n" && out.stderr == "bad\n",
        "{out:?}"
    );
    ensure!(
        out.status.as_ref().is_some_and(|s| s.contains("\"3\"")),
        "{out:?}"
    );
    let out = cri.exec(
        &web,
        &["sh", "-c", "tty; read line; echo got $line"],
        true,
        "typed\n",
    )?;
    ensure!(
        out.stdout.contains("/dev/pts/") && out.stdout.contains("got typed"),
        "{out:?}"
    );

    let chat = pod.run("chat", &["cat"], |config| config.stdin = true)?;
    let out = cri.attach(&chat, "hello\n", |so_far| so_far.stdout.contains('\n'))?;
    ensure!(out.stdout == "hello\n", "{out:?}");

    let stats = cri.stats(&web)?;
    let memory = stats.memory.context("no memory")?;
    let used = memory.working_set_bytes.context("no working set")?.value;
    ensure!((100_000..100_000_000).contains(&used), "{used} bytes");
    let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds);
    ensure!(cpu.is_some_and(|cpu| cpu.value > 0), "{cpu:?}");

    let limits = v1::LinuxContainerResources {
        memory_limit_in_bytes: 80 << 20,
        ..Default::default()
    };
    cri.update(&web, limits)?;

    // The kubelet's way to the pod's own loopback.
    let answer = cri.forward(&pod.id, 8080, b"GET / HTTP/1.0\r\n\r\n")?;
    ensure!(answer.data.ends_with("pong\n"), "{answer:?}");
    let answer = cri.forward(&pod.id, 8081, b"GET / HTTP/1.0\r\n\r\n")?;
    ensure!(answer.data.is_empty(), "{answer:?}");

    // One that is added to look at another, and sees its processes.
    let debug = pod.run("debug", &["sh", "-c", "ps; exit 0"], |config| {
        let options = linux(config).security_context.get_or_insert_default();
        let options = options.namespace_options.get_or_insert_default();
        options.pid = v1::NamespaceMode::Target as i32;
        options.target_id = web.clone();
    })?;
    ensure!(pod.wait_for_end(&debug)?.exit_code == 0);
    ensure!(pod.log("debug")?.contains("httpd"), "{}", pod.log("debug")?);

    cri.stop(&chat, 1)?;
    ensure!(cri.status(&chat)?.exit_code == 137);
    cri.remove(&chat)?;
    pod.remove()?;
    containerd.nothing_is_left()
}

fn pods_reach_each_other(containerd: &Containerd) -> Result<()> {
    let cri = Cri::connect(&containerd.socket())?;
    let one = Pod::start(&cri, containerd, "one", |_| {})?;
    let script = "mkdir /www; echo of one > /www/index.html; exec httpd -f -p '[::]:80' -h /www";
    one.run("web", &["sh", "-c", script], |_| {})?;
    let network = cri.pod_status(&one.id)?.network.context("no network")?;
    let four = network.ip;
    let six = network
        .additional_ips
        .first()
        .context("no second address")?;
    let six = six.ip.clone();
    let two = Pod::start(&cri, containerd, "two", |config| {
        config.dns_config = Some(v1::DnsConfig {
            servers: vec!["192.0.2.53".into()],
            searches: vec!["pods.example".into()],
            ..Default::default()
        });
    })?;
    let sleep = two.run("sleep", &["sleep", "1000"], |_| {})?;
    let from = |address: &str| two.exec(&sleep, &format!("wget -qO- http://{address}/"));
    until("the server", || Ok(from(&four).ok()))?;
    ensure!(from(&four)? == "of one");
    ensure!(from(&format!("[{six}]"))? == "of one");
    let resolv = two.exec(&sleep, "cat /etc/resolv.conf")?;
    ensure!(
        resolv.contains("192.0.2.53") && resolv.contains("pods.example"),
        "{resolv}"
    );
    // From the host, as the kubelet's probes come.
    two.remove()?;
    one.remove()?;
    containerd.nothing_is_left()
}
