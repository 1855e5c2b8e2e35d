//! Pods over the Container Runtime Interface of the real containerd, as the kubelet creates them: each test with each
//! version of containerd in Debian.

use crate::daemon::{Containerd, Test, Use, trials_of};
use crate::pod::{Pod, linux};
use crate::tool::{ip, kill, until};
use crate::volumes::volumes_of_every_kind;
use anyhow::{Context, Result, ensure};
use koya_test_cri::{Cri, v1};
use std::fs;

/// Every test, for each containerd.
pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    let tests: [Test; 9] = [
        ("a_pod_lives", a_pod_lives),
        ("pods_reach_each_other", pods_reach_each_other),
        ("networks_of_other_kinds", networks_of_other_kinds),
        ("a_pod_has_room_and_limits", a_pod_has_room_and_limits),
        ("containers_share_processes", containers_share_processes),
        ("volumes_of_every_kind", volumes_of_every_kind),
        ("a_configuration_holds", a_configuration_holds),
        (
            "settings_and_annotations_count",
            settings_and_annotations_count,
        ),
        (
            "a_killed_sandbox_is_cleared_away",
            a_killed_sandbox_is_cleared_away,
        ),
    ];
    trials_of("cri", Use::Cri, tests)
}

fn a_pod_lives(containerd: &Containerd) -> Result<()> {
    let cri = Cri::connect(&containerd.socket())?;
    let pod = Pod::start(&cri, containerd, "life", |_| {})?;
    let script = "mkdir /www; echo pong > /www/index.html; echo serving; exec httpd -f -p 127.0.0.1:8080 -h /www";
    let web = pod.run("web", &["sh", "-c", script], |_| {})?;
    until("its log", || {
        Ok((pod.log("web")? == "serving").then_some(()))
    })?;

    // Containers of a pod share localhost, and have separate processes.
    let script = "until wget -qO- http://127.0.0.1:8080/; do sleep 0.2; done; hostname; ls /www";
    let client = pod.run("client", &["sh", "-c", script], |_| {})?;
    let ended = pod.wait_for_end(&client)?;
    ensure!(ended.exit_code == 1, "{ended:?}");
    let said = pod.log("client")?;
    ensure!(said.starts_with("pong\nlife\n"), "{said}");
    cri.remove(&client)?;

    // A probe, and a failing one.
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
    let limit = pod.exec(&web, "cat /sys/fs/cgroup/memory.max")?;
    ensure!(limit == (80 << 20).to_string(), "{limit}");

    // Port forwarding to the pod's loopback.
    let answer = cri.forward(&pod.id, 8080, b"GET / HTTP/1.0\r\n\r\n")?;
    ensure!(answer.data.ends_with("pong\n"), "{answer:?}");
    let answer = cri.forward(&pod.id, 8081, b"GET / HTTP/1.0\r\n\r\n")?;
    ensure!(answer.data.is_empty(), "{answer:?}");

    // A debug container, which sees the processes of another one.
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

/// Two pods: one fetches a page from the other, by each of its addresses.
fn reach(cri: &Cri, containerd: &Containerd) -> Result<()> {
    let one = Pod::start(cri, containerd, "one", |_| {})?;
    let script = "mkdir /www; echo of one > /www/index.html; exec httpd -f -p '[::]:80' -h /www";
    one.run("web", &["sh", "-c", script], |_| {})?;
    let network = cri.pod_status(&one.id)?.network.context("no network")?;
    let four = network.ip;
    let six = network.additional_ips.first();
    let six = six.context("no second address")?.ip.clone();
    let two = Pod::start(cri, containerd, "two", |config| {
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
    two.remove()?;
    one.remove()?;
    containerd.nothing_is_left()
}

fn pods_reach_each_other(containerd: &Containerd) -> Result<()> {
    reach(&Cri::connect(&containerd.socket())?, containerd)
}

/// Subinterfaces of another interface.
fn networks_of_other_kinds(containerd: &Containerd) -> Result<()> {
    let (master, other) = (
        format!("m{}", containerd.number),
        format!("n{}", containerd.number),
    );
    ip(&[
        "link", "add", &master, "type", "veth", "peer", "name", &other,
    ])?;
    ip(&["link", "set", &master, "up"])?;
    ip(&["link", "set", &other, "up"])?;
    for (kind, mode) in [("macvlan", "bridge"), ("ipvlan", "l2")] {
        containerd.set_network(&serde_json::json!({
            "type": kind, "master": master, "mode": mode,
        }))?;
        containerd.kill_and_start_again()?;
        let cri = Cri::connect(&containerd.socket())?;
        reach(&cri, containerd).context(kind)?;
    }
    ip(&["link", "del", &master]).map(drop)
}

fn a_pod_has_room_and_limits(containerd: &Containerd) -> Result<()> {
    let cri = Cri::connect(&containerd.socket())?;
    let limits = |mib: i64| v1::LinuxContainerResources {
        memory_limit_in_bytes: mib << 20,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        ..Default::default()
    };
    let pod = Pod::start(&cri, containerd, "sized", |config| {
        let linux = config.linux.get_or_insert_default();
        linux.resources = Some(limits(150));
    })?;
    let first = pod.run("first", &["sleep", "1000"], |config| {
        linux(config).resources = Some(limits(100));
    })?;
    let total = || -> Result<u64> {
        let kib = pod.exec(&first, "grep MemTotal /proc/meminfo | tr -dc 0-9")?;
        Ok(kib.parse::<u64>()? >> 10)
    };
    let at_first = total()?;
    ensure!((150..230).contains(&at_first), "{at_first} MiB at first");
    let bound = || -> Result<u64> {
        let path = containerd.groups().join(&pod.id).join("memory.max");
        Ok(fs::read_to_string(path)?.trim().parse::<u64>()? >> 20)
    };
    let room = 30..110;
    let has_room = |guest: u64| -> Result<()> {
        // A quarter is for the guest's page cache of shared files.
        let beyond = bound()?.checked_sub(guest + guest / 4);
        let fits = beyond.is_some_and(|beyond| room.contains(&beyond));
        ensure!(fits, "{} MiB on the host, {guest} in the guest", bound()?);
        Ok(())
    };
    has_room(at_first)?;

    // A second container, and a higher limit.
    let second = pod.run("second", &["sleep", "1000"], |config| {
        linux(config).resources = Some(limits(300));
    })?;
    let with_two = total()?;
    ensure!((400..520).contains(&with_two), "{with_two} MiB with two");
    has_room(with_two)?;
    cri.update(&second, limits(600))?;
    let raised = total()?;
    ensure!((700..850).contains(&raised), "{raised} MiB when raised");
    // A lower limit: in the container at once, in the guest's size later. More memory than the host's is refused, without
    // side effects.
    cri.update(&second, limits(500))?;
    let own = || pod.exec(&second, "cat /sys/fs/cgroup/memory.max");
    ensure!(own()? == (500 << 20).to_string(), "{}", own()?);
    until("memory to be given back", || {
        Ok((total()? < raised).then_some(()))
    })?;
    let refused = cri.update(&second, limits(900_000));
    ensure!(
        refused.is_err() && own()? == (500 << 20).to_string(),
        "{refused:?}"
    );
    cri.stop(&second, 0)?;
    cri.remove(&second)?;
    until("memory to be given back", || {
        Ok((total()? < 300).then_some(()))
    })?;

    // The guest enforces the limit, on this container only.
    let greedy = pod.run("greedy", &["sh", "-c", "exec tail /dev/zero"], |config| {
        linux(config).resources = Some(limits(50));
    })?;
    let ended = pod.wait_for_end(&greedy)?;
    ensure!(
        ended.exit_code == 137 && ended.reason == "OOMKilled",
        "{ended:?}"
    );
    ensure!(pod.exec(&first, "echo alive")? == "alive");
    let peak = fs::read_to_string(containerd.groups().join(&pod.id).join("memory.peak"));
    let peak = peak.unwrap_or_default().trim().parse::<u64>().unwrap_or(0) >> 20;
    eprintln!("cri: the most that the pod had on the host: {peak} MiB, with limits of 650 MiB");
    pod.remove()?;
    containerd.nothing_is_left()
}

fn containers_share_processes(containerd: &Containerd) -> Result<()> {
    let cri = Cri::connect(&containerd.socket())?;
    let shared = |options: &mut v1::NamespaceOption| options.pid = v1::NamespaceMode::Pod as i32;
    let pod = Pod::start(&cri, containerd, "shared", |config| {
        let linux = config.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        shared(security.namespace_options.get_or_insert_default());
    })?;
    let run = |name: &str, script: &str| {
        pod.run(name, &["sh", "-c", script], |config| {
            let security = linux(config).security_context.get_or_insert_default();
            shared(security.namespace_options.get_or_insert_default());
        })
    };
    let one = run("one", "exec sleep 1111")?;
    let two = run("two", "exec sleep 2222")?;
    let seen = pod.exec(&two, "ps -o pid,args")?;
    ensure!(
        seen.contains("sleep 1111") && seen.contains("sleep 2222"),
        "{seen}"
    );
    let first = seen.lines().find(|line| line.trim().starts_with("1 "));
    ensure!(first.is_some_and(|line| line.contains("pause")), "{seen}");
    // Processes left by a container end with it.
    let three = run("three", "sleep 3333 & exit 4")?;
    ensure!(pod.wait_for_end(&three)?.exit_code == 4);
    until("the rest of it to end", || {
        let seen = pod.exec(&two, "ps -o args")?;
        Ok((!seen.contains("sleep 3333")).then_some(()))
    })?;
    pod.exec(&two, "kill -9 $(pidof sleep | tr ' ' '\\n' | while read p; do grep -q 1111 /proc/$p/cmdline && echo $p; done)")?;
    ensure!(pod.wait_for_end(&one)?.exit_code == 137);
    let states = cri.status(&two)?.state();
    ensure!(states == v1::ContainerState::ContainerRunning);
    pod.remove()?;
    containerd.nothing_is_left()
}

/// Settings of a runtime handler, and annotations that its pods may set.
fn settings_and_annotations_count(containerd: &Containerd) -> Result<()> {
    let cri = Cri::connect(&containerd.socket())?;
    let start = |name: &str, key: &str, value: &str| {
        let annotation = (format!("io.koya.{key}"), value.to_owned());
        Pod::start_by("koya-set", &cri, containerd, name, |config| {
            config.annotations = [annotation].into();
        })
    };
    let pod = start("set", "memory_mib", "300")?;
    let one = pod.run("one", &["sleep", "1000"], |_| {})?;
    let total = pod.exec(&one, "grep MemTotal /proc/meminfo | tr -dc 0-9")?;
    let total = total.parse::<u64>()? >> 10;
    ensure!((300..310).contains(&total), "{total} MiB");
    ensure!(pod.exec(&one, "cat /proc/cmdline")?.contains("loglevel=3"));
    pod.remove()?;
    let refused = start("refused", "cpus", "2")
        .err()
        .context("it was taken")?;
    ensure!(
        format!("{refused:#}").contains("io.koya.cpus"),
        "{refused:#}"
    );
    containerd.nothing_is_left()
}

/// Kills the process of a pod and containerd; the kubelet's usual calls then clean up.
fn a_killed_sandbox_is_cleared_away(containerd: &Containerd) -> Result<()> {
    let cri = Cri::connect(&containerd.socket())?;
    let pod = Pod::start(&cri, containerd, "killed", |_| {})?;
    let one = pod.run("one", &["sleep", "1000"], |_| {})?;
    let shim = containerd.shim_of(&pod.id)?.context("no shim")?;
    kill(&shim)?;
    containerd.kill_and_start_again()?;
    let cri = Cri::connect(&containerd.socket())?;
    let pod = pod.by(&cri);
    ensure!(pod.wait_for_end(&one)?.exit_code != 0);
    pod.remove()?;
    containerd.nothing_is_left()?;
    let again = Pod::start(&cri, containerd, "killed", |_| {})?;
    again.remove()?;
    containerd.nothing_is_left()
}

/// The pod's security configuration is in effect in the guest.
fn a_configuration_holds(containerd: &Containerd) -> Result<()> {
    let cri = Cri::connect(&containerd.socket())?;
    let pod = Pod::start(&cri, containerd, "secure", |config| {
        let linux = config.linux.get_or_insert_default();
        let range = ("net.ipv4.ping_group_range".into(), "0 1000".into());
        linux.sysctls = [range].into();
    })?;
    let id = pod.run("secure", &["sleep", "1000"], |config| {
        let linux = linux(config);
        linux.resources = Some(v1::LinuxContainerResources {
            oom_score_adj: 700,
            unified: [("pids.max".into(), "77".into())].into(),
            ..Default::default()
        });
        let options = linux.security_context.get_or_insert_default();
        options.run_as_user = Some(v1::Int64Value { value: 33 });
        options.run_as_group = Some(v1::Int64Value { value: 33 });
        options.supplemental_groups = vec![40];
        options.no_new_privs = true;
        options.readonly_rootfs = true;
        options.capabilities = Some(v1::Capability {
            drop_capabilities: vec!["ALL".into()],
            add_capabilities: vec!["NET_BIND_SERVICE".into()],
            ..Default::default()
        });
        options.seccomp = Some(v1::SecurityProfile {
            profile_type: v1::security_profile::ProfileType::RuntimeDefault as i32,
            ..Default::default()
        });
        options.masked_paths = vec!["/proc/keys".into(), "/proc/acpi".into()];
        options.readonly_paths = vec!["/proc/sys".into()];
    })?;
    let status = pod.exec(&id, "cat /proc/self/status")?;
    let value = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        let words = line
            .into_iter()
            .flat_map(|line| line.split_whitespace().skip(1));
        words.collect::<Vec<_>>().join(" ")
    };
    for (name, wanted) in [
        ("Uid:", "33 33 33 33"),
        ("Gid:", "33 33 33 33"),
        ("CapBnd:", "0000000000000400"),
        ("NoNewPrivs:", "1"),
        ("Seccomp:", "2"),
    ] {
        ensure!(
            value(name) == wanted,
            "{name} {:?}, not {wanted}",
            value(name)
        );
    }
    ensure!(value("Groups:").contains("40"), "{}", value("Groups:"));
    let is = |script: &str, wanted: &str| {
        let said = pod.exec(&id, script)?;
        ensure!(said == wanted, "{script}: {said:?}");
        Ok(())
    };
    is("cat /proc/1/oom_score_adj", "700")?;
    is("cat /sys/fs/cgroup/pids.max", "77")?;
    is("cat /proc/sys/net/ipv4/ping_group_range", "0\t1000")?;
    is("touch /tmp/x 2>/dev/null || echo no", "no")?;
    is("wc -c < /proc/keys", "0")?;
    // The default profile: no new namespaces without privileges.
    is("unshare -U true 2>/dev/null || echo no", "no")?;
    pod.remove()?;
    containerd.nothing_is_left()
}
