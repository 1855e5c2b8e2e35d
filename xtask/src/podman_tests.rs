//! `cargo xtask podman-tests`: podman's own system tests (bats) with `koya-runtime`, or with another runtime for comparison,
//! as root, under a systemd that starts nothing else, and without the internet.

use crate::arch::Arch;
use crate::bats::{self, BatsArgs, Files, Project, copy, pack};
use crate::{cache, demo, setup};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

const PACKAGES: [(&str, &str); 5] = [
    ("buildah", "makes containers that podman does not know"),
    ("catatonit", "is what podman runs in pods and for --init"),
    ("netcat-openbsd", "talks to containers for them"),
    ("procps", "is what they look for processes with"),
    ("socat", "makes terminals for them"),
];

/// Tag of the tests' image in its registry, which is also stored in a file in it.
const TAG: &str = "20220615";

/// Files that are in their own image, or what they have more than ours.
const IMAGE_FILES: [(&str, &str); 5] = [
    (
        "etc/passwd",
        "bin:x:1:1:bin:/bin:/bin/false\nmail:x:8:12:mail:/var/mail:/bin/false\n\
         nobody:x:65534:65534:nobody:/:/bin/false\n",
    ),
    (
        "etc/group",
        "bin:x:1:root,bin\nmail:x:12:mail\nping:x:999:\nnobody:x:65534:\n",
    ),
    ("etc/os-release", "ID=koya-test\nVERSION_ID=1\n"),
    ("etc/services", "http 80/tcp\n"),
    ("etc/issue", "Koya's image for podman's tests\n"),
];

/// Modification time of that file, which a test checks.
const CHANGED: &str = "@1600000000";

/// Replacement for the program of a pod's infra container: prints its name and waits.
const PAUSE: &str = "#!/bin/sh
echo \"Confirmed: testimage pause invoked as $0\"
while :; do sleep 0.1; done
";

/// Changes to the tests, by file, text and replacement: times that are too short for an emulated host, in which a command takes
/// seconds; a message of the C library of their own image; and the name of the runtime where they are about what crun has.
const CHANGES: &[(&str, &str, &str)] = &[
    ("helpers.bash", "_timeout=${3:-5}", "_timeout=${3:-60}"),
    ("helpers.bash", "_timeout=${2:-5}", "_timeout=${2:-60}"),
    ("helpers.bash", "{0..5}", "{0..30}"),
    ("helpers.bash", "{0..20}", "{0..60}"),
    ("030-run.bats", "$IMAGE sleep 4", "$IMAGE sleep 40"),
    ("030-run.bats", "-le 14", "-le 60"),
    ("032-sig-proxy.bats", "timeout=5", "timeout=60"),
    ("035-logs.bats", "sleep 10;echo d", "sleep 50;echo d"),
    ("040-ps.bats", "PODMAN_TIMEOUT=5", "PODMAN_TIMEOUT=60"),
    ("040-ps.bats", "RUN sleep 30", "RUN sleep 300"),
    ("040-ps.bats", "-le 10", "-le 90"),
    ("040-ps.bats", "sleep 5", "sleep 30"),
    ("045-start.bats", "sleep 20", "sleep 200"),
    ("050-stop.bats", "-le 14", "-le 60"),
    ("050-stop.bats", "-le 2", "-le 18"),
    ("050-stop.bats", "-le 5", "-le 50"),
    ("050-stop.bats", "stop -t 20", "stop -t 60"),
    ("050-stop.bats", "timeout=5", "timeout=60"),
    ("050-stop.bats", "--time=5", "--time=20"),
    ("050-stop.bats", "sleep 20", "sleep 200"),
    ("050-stop.bats", "sleep 40", "sleep 200"),
    ("050-stop.bats", "sleep 60", "sleep 200"),
    ("055-rm.bats", "IMAGE sleep 5", "IMAGE sleep 60"),
    ("055-rm.bats", "sleep 3;", "sleep 30;"),
    (
        "055-rm.bats",
        "$rand $IMAGE sleep 30",
        "$rand $IMAGE sleep 300",
    ),
    (
        "080-pause.bats",
        "\"[3456]\"",
        "\"\\([3-9]\\|[1-9][0-9]\\)\"",
    ),
    ("130-kill.bats", "read -t 5", "read -t 60"),
    (
        "170-run-userns.bats",
        "!= \"crun\"",
        "!= @(crun|koya-runtime)",
    ),
    (
        "200-pod.bats",
        "nc: bind: Address in use",
        "nc: bind: Address already in use",
    ),
    ("220-healthcheck.bats", "sleep 2", "sleep 15"),
    ("220-healthcheck.bats", "sleep 5", "sleep 60"),
    (
        "260-sdnotify.bats",
        "!= \"crun\"",
        "!= @(crun|koya-runtime)",
    ),
    (
        "450-interactive.bats",
        "timeout 10 socat",
        "timeout 120 socat",
    ),
    ("500-networking.bats", "timeout 5 curl", "timeout 10 curl"),
    ("500-networking.bats", "--max-time 3", "--max-time 20"),
    (
        "500-networking.bats",
        "run curl -s",
        "run curl --retry 20 --retry-delay 1 --retry-connrefused -s",
    ),
    (
        "500-networking.bats",
        "--retry 2",
        "--retry 20 --retry-delay 1 --retry-connrefused",
    ),
    ("500-networking.bats", "nc -w 1", "nc -w 9"),
];

/// Files whose containers have podman's default network. The others have none unless a test requests one, which is faster.
const ON_NETWORKS: &[&str] = &["030-run", "200-pod", "500-networking", "700-play"];

/// Preparation in the rig, whose files are discarded afterwards. Mounts are shared, as systemd has them: podman unmounts files of
/// a container with mapped users in another mount namespace. Storage is on a disk. Tests copy the runtime's program, which
/// then looks for the guest kernel where an installation has it.
const PREPARE: &str = "set -e
mount --make-rshared /
scratch=/run/scratch
mkdir -p $scratch/tmp $scratch/storage /var/lib/containers/storage /etc/containers/containers.conf.d
mount --bind $scratch/storage /var/lib/containers/storage
runtime=$(command -v \"$4\")
mkdir -p /usr/local/share
[ -e /usr/local/share/koya ] || ln -s \"$(dirname \"$runtime\")/../share/koya\" /usr/local/share/koya
cat > /etc/containers/storage.conf <<END
[storage]
driver = \"overlay\"
runroot = \"/run/containers/storage\"
graphroot = \"/var/lib/containers/storage\"
END
cat > /etc/containers/containers.conf.d/zz-tests.conf <<END
[containers]
netns = \"$6\"
log_driver = \"k8s-file\"
[engine]
runtime = \"$4\"
events_logger = \"file\"
runtime_supports_json = [\"crun\", \"runc\", \"koya-runtime\"]
runtime_supports_kvm = [\"koya-runtime\"]
[engine.runtimes]
$4 = [\"$runtime\"]
END
export TMPDIR=$scratch/tmp PODMAN_TIMEOUT=240
for kind in uid gid; do echo containers:1000000:1000000 >> /etc/sub$kind; done
ip link set lo up
modules=/run/koya-rig/modules
for module in $(cat $modules/docker); do busybox insmod $modules/$module || true; done
podman import --quiet --change 'WORKDIR /home/podman' \\
    --change 'CMD [\"/bin/echo\", \"This container is intended for podman CI testing\"]' \\
    --change 'LABEL created_by=test/system/build-testimage' --change 'LABEL created_at=2022-06-15T00:00:00Z' \\
    \"$1/testimage.tar\" \"$5\" >&2
";

/// Runs the file under systemd, with its journal, as the first process of a pid namespace: podman wants it for the control
/// groups of pods, health checks and logs. Besides, it only starts the bus that crun asks for it.
const UNDER_SYSTEMD: &str = "own=/run/koya-tests
mkdir -p $own /run/systemd/system/dbus.socket.d /run/systemd/system/dbus.service.d
for unit in socket service; do
    printf '[Unit]\\nDefaultDependencies=no\\n' > /run/systemd/system/dbus.$unit.d/alone.conf
done
export TESTS=\"$1\" FILE=\"$2\" FILTER=\"$3\"
export -p > $own/environment
mkfifo $own/out $own/err
cat > $own/run <<'END'
exec > /run/koya-tests/out 2> /run/koya-tests/err < /dev/null
. /run/koya-tests/environment
cd \"$TESTS\"
bats --tap ${FILTER:+--filter \"$FILTER\"} \"$FILE\" | cat
END
cat > /run/systemd/system/koya-tests.service <<END
[Unit]
DefaultDependencies=no
Wants=systemd-journald.service dbus.service
After=systemd-journald.service dbus.service
[Service]
Type=oneshot
ExecStart=/bin/sh $own/run
TimeoutStartSec=infinity
TasksMax=infinity
LimitNOFILE=1048576
END
env container=rig SYSTEMD_GENERATOR_PATH=/nonexistent unshare --pid --fork --mount-proc --propagation unchanged \\
    /lib/systemd/systemd --unit=koya-tests.service --show-status=no --log-target=null > /dev/null 2>&1 < /dev/null &
cat $own/err >&2 &
cat $own/out
";

#[derive(Args)]
pub(crate) struct PodmanTestsArgs {
    #[command(flatten)]
    bats: BatsArgs,
    /// Set the runtime for podman, a program on PATH: failures of other runtimes too are not Koya's
    #[arg(long, default_value = "koya-runtime")]
    runtime: String,
}

pub(crate) fn run(args: &PodmanTestsArgs) -> Result<()> {
    setup::ensure_these(&bats::PACKAGES)?;
    setup::ensure_these(&PACKAGES)?;
    let network = |file: &str| match ON_NETWORKS.contains(&file) {
        true => "private",
        false => "none",
    };
    let project = Project {
        name: &format!("podman-tests/{}", args.runtime),
        tests: tests(&args.bats.source)?,
        files: Files {
            run: UNDER_SYSTEMD,
            ..bats::BATS
        },
        script: PREPARE,
        further: &|file| {
            vec![
                args.runtime.clone(),
                format!("quay.io/libpod/testimage:{TAG}"),
                network(file).into(),
            ]
        },
    };
    project.run(&args.bats)
}

/// podman's tests, and the contents of their image.
fn tests(source: &Path) -> Result<PathBuf> {
    let system = source.join("test/system");
    let helpers = fs::read_to_string(system.join("helpers.bash"))
        .with_context(|| format!("{} is no checkout of podman", source.display()))?;
    if !helpers.contains(TAG) {
        bail!("these tests want another image: Debian 12 has podman 4.3.1");
    }
    let files = IMAGE_FILES
        .map(|(file, text)| [file, text].concat())
        .concat();
    let changes: Vec<_> = CHANGES
        .iter()
        .map(|(a, b, c)| [*a, b, c].concat())
        .collect();
    let dir = cache::ensure(
        "podman-tests",
        &cache::key([&helpers, PAUSE, &files, &changes.concat()]),
        |dir| {
            copy(&source.join("test"), dir)?;
            for (file, text, replacement) in CHANGES {
                let path = dir.join("test/system").join(file);
                let own = fs::read_to_string(&path)?;
                if !own.contains(text) {
                    bail!("{file} has no {text:?}");
                }
                fs::write(path, own.replace(text, replacement))?;
            }
            let rootfs = dir.join("rootfs");
            demo::make_busybox_rootfs(Arch::of_this_machine(), &rootfs)?;
            let home = rootfs.join("home/podman");
            fs::create_dir_all(&home)?;
            fs::write(home.join("pause"), PAUSE)?;
            fs::set_permissions(home.join("pause"), fs::Permissions::from_mode(0o755))?;
            let id = home.join("testimage-id");
            fs::write(&id, format!("{TAG}\n"))?;
            let mut touch = std::process::Command::new("touch");
            crate::proc::run(touch.arg("--date").arg(CHANGED).arg(&id))?;
            for (file, text) in IMAGE_FILES {
                let file = rootfs.join(file);
                fs::create_dir_all(file.parent().unwrap_or(&rootfs))?;
                let own = fs::read_to_string(&file).unwrap_or_default();
                fs::write(&file, own + text)?;
            }
            for directory in ["srv", "usr/bin", "var/mail"] {
                fs::create_dir_all(rootfs.join(directory))?;
            }
            for (link, target) in [
                ("bin/busybox-extras", "busybox"),
                ("etc/mtab", "../proc/mounts"),
                ("usr/bin/nsenter", "../../bin/busybox"),
            ] {
                symlink(target, rootfs.join(link))?;
            }
            fs::set_permissions(rootfs.join("tmp"), fs::Permissions::from_mode(0o1777))?;
            // The mode of the root in their own image, which a test checks.
            fs::set_permissions(&rootfs, fs::Permissions::from_mode(0o555))?;
            pack(&rootfs, &dir.join("test/system/testimage.tar"))
        },
    )?;
    Ok(dir.join("test/system"))
}
