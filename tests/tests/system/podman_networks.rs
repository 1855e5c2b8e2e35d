//! podman with `koya-runtime`: bridge networks by netavark, and `podman play kube`.

use crate::docker::{PAGE, load_modules, page};
use crate::podman::{Podman, allow_devices_in_pods};
use crate::tool::until;
use anyhow::{Context, Result, ensure};
use std::fs;

crate::trials!(
    containers_have_podmans_networks,
    networks_come_and_go_while_a_container_runs,
    a_kubernetes_file_is_played,
);

/// Shell script of a web server with a page of one line.
fn serve(line: &str) -> String {
    format!("mkdir /www; echo {line} > /www/index.html; exec httpd -f -p 80 -h /www")
}

fn containers_have_podmans_networks() -> Result<()> {
    load_modules()?;
    let podman = Podman::new()?;
    let network = "koya-test-net";
    let create = ["network", "create", "--subnet", "10.94.0.0/24", network];
    podman.ok(&create)?;
    let own = ["--name", "web", "--network", network];
    let port = ["--publish", "18091:80", "bb", "sh", "-c", &serve("pong")];
    podman.ok(&[&["run", "-d"], &own[..], &port].concat())?;
    let answers = |address: &str| {
        Ok((page(address).unwrap_or_default())
            .ends_with("pong\n")
            .then_some(()))
    };
    until("its address to answer", || answers("10.94.0.2:80"))?;
    until("its port to answer", || answers("127.0.0.1:18091"))?;
    let script = format!(
        "{PAGE}; grep ^nameserver /etc/resolv.conf | head -n 1
         page $(nslookup -type=a web | sed -n 's/^Address: //p')"
    );
    let words = ["run", "--rm", "--network", network, "bb", "sh", "-c"];
    let said = podman.ok(&[&words[..], &[&script]].concat())?;
    ensure!(said == "nameserver 10.94.0.1\npong", "{said}");
    podman.ok(&["rm", "--force", "--time", "0", "web"])?;
    podman.ok(&["network", "rm", network])?;
    Ok(())
}

fn networks_come_and_go_while_a_container_runs() -> Result<()> {
    load_modules()?;
    let podman = Podman::new()?;
    let [first, second] = ["koya-first", "koya-second"];
    podman.ok(&["network", "create", "--subnet", "10.96.0.0/24", first])?;
    podman.ok(&["network", "create", "--subnet", "10.97.0.0/24", second])?;
    let own = ["run", "-d", "--name", "web", "--network", first];
    podman.ok(&[&own[..], &["bb", "sh", "-c", &serve("pong")]].concat())?;
    let answers = |address: &str| {
        let said = page(address).unwrap_or_default();
        Ok(said.ends_with("pong\n").then_some(()))
    };
    let inside = |script: &str| podman.ok(&["exec", "web", "sh", "-c", script]);
    until("its address to answer", || answers("10.96.0.2:80"))?;
    // An interface that stays is not touched.
    let index = "cat /sys/class/net/eth0/ifindex";
    let before = inside(index)?;
    for _ in 0..2 {
        podman.ok(&["network", "connect", second, "web"])?;
        // podman does not assign an address again at once.
        let of = |property: &str| {
            let format =
                format!("{{{{(index .NetworkSettings.Networks \"{second}\").{property}}}}}");
            podman.ok(&["inspect", "--format", &format, "web"])
        };
        let address = of("IPAddress")? + ":80";
        until("the new address to answer", || answers(&address))?;
        let outside = of("MacAddress")?;
        let own = inside("cat /sys/class/net/eth1/address")?;
        ensure!(own == outside, "{own} is not {outside}");
        podman.ok(&["network", "disconnect", second, "web"])?;
        until("the interface to vanish", || {
            let names = inside("echo /sys/class/net/*")?;
            Ok((!names.contains("eth1")).then_some(()))
        })?;
        until("the first address to answer", || answers("10.96.0.2:80"))?;
    }
    ensure!(inside(index)? == before, "eth0 was replaced");
    podman.ok(&["network", "reload", "web"])?;
    until("its address to answer again", || answers("10.96.0.2:80"))?;
    until("its route to be there again", || {
        let routes = inside("ip route")?;
        Ok(routes.contains("default via 10.96.0.1").then_some(()))
    })?;
    podman.ok(&["network", "disconnect", first, "web"])?;
    until("the last interface to vanish", || {
        let names = inside("echo /sys/class/net/*")?;
        Ok((!names.contains("eth")).then_some(()))
    })?;
    podman.ok(&["rm", "--force", "--time", "0", "web"])?;
    for network in [first, second] {
        podman.ok(&["network", "rm", network])?;
    }
    Ok(())
}

/// A pod of two containers with common settings of pods, and a deployment.
const FILE: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: texts}
data: {greeting: hello, line.txt: from the map}
---
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  restartPolicy: Never
  volumes:
  - {name: texts, configMap: {name: texts}}
  - {name: host, hostPath: {path: HOST, type: Directory}}
  containers:
  - name: web
    image: localhost/bb
    command: [sh, -c, 'echo $GREETING; mkdir /www; cp /texts/line.txt /www/index.html; exec httpd -f -p 80 -h /www']
    env: [{name: GREETING, valueFrom: {configMapKeyRef: {name: texts, key: greeting}}}]
    ports: [{containerPort: 80, hostPort: 18092}]
    volumeMounts: [{name: texts, mountPath: /texts}]
    resources: {limits: {memory: 64Mi, cpu: 500m}}
  - name: side
    image: localhost/bb
    command: [sh, -c, 'until nc 127.0.0.1 80 < /dev/null; do sleep 1; done; echo there > /host/told; exec sleep 1000']
    volumeMounts: [{name: host, mountPath: /host}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: d}
spec:
  selector: {matchLabels: {app: d}}
  template:
    metadata: {labels: {app: d}}
    spec:
      containers:
      - {name: c, image: localhost/bb, command: [sleep, "1000"]}
"#;

fn a_kubernetes_file_is_played() -> Result<()> {
    load_modules()?;
    let podman = Podman::new()?;
    let host = podman.dir.join("host");
    fs::create_dir(&host)?;
    let file = podman.dir.join("pod.yaml");
    fs::write(&file, FILE.replace("HOST", &host.display().to_string()))?;
    let file = file.to_str().context("a path in UTF-8")?;
    podman.ok(&["play", "kube", "--start=false", file])?;
    allow_devices_in_pods()?;
    let pods = podman.ok(&["pod", "ps", "--format", "{{.Name}}"])?;
    for pod in pods.lines() {
        podman.ok(&["pod", "start", pod])?;
    }
    until("what its container says over the pod's loopback", || {
        Ok(fs::read_to_string(host.join("told")).ok())
    })?;
    until("its port to answer", || {
        let said = page("127.0.0.1:18092").unwrap_or_default();
        Ok(said.ends_with("from the map").then_some(()))
    })?;
    let said = podman.ok(&["logs", "p-web"])?;
    ensure!(said == "hello", "{said}");
    let limits = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
    let said = podman.ok(&["exec", "p-web", "sh", "-c", limits])?;
    ensure!(said == "67108864\n50000 100000", "{said}");
    let format = ["ps", "--format", "{{.Names}} {{.Status}}"];
    let listed = podman.ok(&format)?;
    let up = listed.lines().filter(|line| line.contains(" Up "));
    ensure!(up.count() == 5, "{listed}");
    podman.ok(&["play", "kube", "--down", file])?;
    let left = podman.ok(&["ps", "--all", "--quiet"])?;
    ensure!(left.is_empty(), "left: {left}");
    Ok(())
}
