//! A Docker daemon inside a Koya container, in Debian's own packages: `docs/docker-in-koya.md`.

use super::{line, page};
use crate::debian::unpacked;
use crate::tool::{Background, koya, stdout, until_within};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::time::Duration;

/// The archive of a Debian with Docker.
pub(super) const TREE: &str = "KOYA_TEST_DEBIAN_DOCKER";
/// For the daemon's start and for a build, on an emulated CPU.
const LIMIT: Duration = Duration::from_secs(1200);
const PUBLISHED: &str = "127.0.0.1:18090";
const NAME: &str = "docker-inside";

/// As in the page, and a repository of packages served on `docker0`.
const START: &str = r#"
cd /sys/fs/cgroup && mkdir init
for process in $(cat cgroup.procs); do echo "$process" > init/cgroup.procs; done
sed 's/ / +/g; s/^/+/' cgroup.controllers > cgroup.subtree_control
containerd --root /var/lib/docker/containerd > /tmp/containerd.log 2>&1 &
dockerd --containerd /run/containerd/containerd.sock > /tmp/dockerd.log 2>&1 &
until docker version > /dev/null 2>&1; do sleep 1; kill -0 $! || { tail -n 30 /tmp/dockerd.log; exit 1; }; done
busybox httpd -p 172.17.0.1:8000 -h /repo
echo ready
wait
"#;

/// Two versions of a package, whose files replace each other in directories of lower layers, and an image to begin with.
const PREPARE: &str = r##"
set -e
rm -rf /repo /build; mkdir /repo
for version in 1.0 2.0; do
    mkdir -p /build/DEBIAN /build/usr/bin /build/usr/share/koya-hello/dir
    printf "Package: koya-hello\nVersion: $version\nArchitecture: all\nMaintainer: K <k@k>\nDescription: hello\n" > /build/DEBIAN/control
    printf "#!/bin/sh\necho hello $version\n" > /build/usr/bin/koya-hello; chmod 755 /build/usr/bin/koya-hello
    echo $version > /build/usr/share/koya-hello/dir/$version; ln -sf dir/$version /build/usr/share/koya-hello/now
    dpkg-deb --build /build /repo/$version.deb > /dev/null
    { cat /build/DEBIAN/control; echo Filename: ./$version.deb; echo Size: $(stat -c %s /repo/$version.deb)
      echo SHA256: $(sha256sum /repo/$version.deb | cut -d' ' -f1); echo; } >> /repo/Packages
    rm -r /build
done
echo driver=$(docker info --format '{{.Driver}} {{.CgroupVersion}}')
echo backing=$(stat -f -c %T /var/lib/docker)
tar -C / -c --exclude=./usr/share/doc --exclude=./usr/share/locale --exclude=./usr/share/man --exclude='./usr/bin/docker*' \
    --exclude='./usr/bin/con*' --exclude=./usr/bin/ctr --exclude=./usr/sbin/dockerd --exclude=./usr/sbin/runc \
    --exclude='./var/cache/*' --exclude='./var/lib/docker/*' --exclude=./boot ./bin ./sbin ./lib ./lib64 ./etc ./usr ./var \
    | docker import - debian:local > /dev/null
echo imported
"##;

const DOCKERFILE: &str = r#"FROM debian:local
RUN mkdir -p /tmp && chmod 1777 /tmp && rm -rf /etc/apt/sources.list.d && \
    echo 'deb [trusted=yes] http://172.17.0.1:8000 ./' > /etc/apt/sources.list && apt-get -q update
RUN apt-get -qy install koya-hello=1.0 && koya-hello
RUN apt-get -qy install koya-hello && mv /usr/share/koya-hello/dir /usr/share/koya-hello/moved
COPY given /srv/given
USER nobody
WORKDIR /srv
CMD echo "$(koya-hello) $(ls /usr/share/koya-hello | tr '\n' ' ')$(id -un) $(cat given)"
"#;

/// The daemon uses overlay2 on the block volume, builds an image from a repository's packages, and runs it with limits and
/// published ports.
pub(super) fn a_daemon_runs_inside() -> Result<()> {
    super::load_modules()?;
    let root = unpacked(TREE)?;
    fs::copy("/bin/busybox", root.join("usr/bin/busybox"))
        .context("busybox-static is not installed")?;
    fs::write(root.join("root/start.sh"), START)?;
    fs::create_dir_all(root.join("root/context"))?;
    fs::write(root.join("root/context/Dockerfile"), DOCKERFILE)?;
    fs::write(root.join("root/context/given"), "given")?;
    let root = root.display().to_string();
    let volume = "/var/lib/docker:size=20g";
    let options = [
        &["--privileged", "--memory", "2g", "--net", "user"][..],
        &["-p", "127.0.0.1:18090:80", "--block-volume", volume],
        &["--tmpfs", "/run", "--tmpfs", "/tmp", "--rootfs", &root],
    ];
    let mut run = koya(["run", "-d", "--name", NAME]);
    run.args(options.concat())
        .args(["--", "sh", "/root/start.sh"]);
    stdout(run.output()?)?;
    let outer = Background { name: NAME.into() };
    until_within(LIMIT, "the daemon", || {
        Ok((outer.said()?.lines().last() == Some("ready")).then_some(()))
    })
    .with_context(|| format!("it said {:?}", outer.said()))?;
    let sh = |script: &str| -> Result<String> {
        let done = outer.exec(&[], &["sh", "-c", script])?;
        stdout(done).with_context(|| {
            outer.exec(&[], &["tail", "/tmp/dockerd.log"]).map_or_else(
                |error| format!("{error:#}"),
                |log| String::from_utf8_lossy(&log.stdout).into_owned(),
            )
        })
    };
    let said = sh(PREPARE)?;
    ensure!(line(&said, "driver")? == "overlay2 2", "{said}");
    ensure!(line(&said, "backing")?.starts_with("ext"), "{said}");
    let said = sh("cd /root/context; DOCKER_BUILDKIT=0 docker build -q -t built . 2>&1")?;
    ensure!(
        said.lines()
            .last()
            .is_some_and(|id| id.starts_with("sha256:")),
        "{said}"
    );
    let said = sh("docker run --rm -m 128m built")?;
    ensure!(said == "hello 2.0 moved now nobody given", "{said}");
    let said = sh(
        "docker run --rm -m 64m --cpus 0.5 --pids-limit 40 built sh -c \
                   'cd /sys/fs/cgroup; echo $(cat memory.max cpu.max pids.max)'",
    )?;
    ensure!(said == "67108864 50000 100000 40", "{said}");
    let killed = sh(
        "docker run --name full -m 32m --memory-swap 32m built tail /dev/zero; \
                     echo $? $(docker inspect -f '{{.State.OOMKilled}}' full)",
    )?;
    ensure!(killed == "137 true", "{killed}");

    // A container's page: through the port that Docker publishes, and the one that Koya does.
    sh("mkdir -p /www; echo pong > /www/index.html; docker network create named > /dev/null
        docker run -d --name web --network named -p 80:80 -v /www:/www -v /usr/bin/busybox:/busybox built \
        /busybox httpd -f -p 80 -h /www")
        .or_else(|_| sh("docker logs web 2>&1; docker ps -a"))?;
    until_within(LIMIT, "the page", || {
        let said = page(PUBLISHED).unwrap_or_default();
        Ok(said.ends_with("pong\n").then_some(()))
    })?;
    // Docker's name server, in the guest's own network namespaces.
    let said = sh(
        "docker run --rm --network named -v /usr/bin/busybox:/busybox:ro built /busybox nslookup -type=a web",
    )?;
    ensure!(said.contains("Name:\tweb"), "{said}");
    drop(outer);
    let left = stdout(koya(["ps", "--quiet"]).output()?)?;
    ensure!(!left.contains(NAME), "{left}");
    Ok(())
}
