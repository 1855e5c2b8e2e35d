//! `cargo xtask podman-tests`: podman's own system tests (bats) with `koya-runtime`, or with another runtime for comparison,
//! as
//! root, without systemd and without the internet.

use crate::arch::Arch;
use crate::bats::{self, BatsArgs, Project, copy, pack};
use crate::{cache, demo, setup};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const PACKAGES: [(&str, &str); 2] = [
    ("catatonit", "is what podman runs in pods and for --init"),
    ("procps", "is what they look for processes with"),
];

/// Tag of the tests' image in its registry, which is also stored in a file in it.
const TAG: &str = "20220615";

/// Modification time of that file, which a test checks.
const CHANGED: &str = "@1600000000";

/// Replacement for the program of a pod's infra container: prints its name and waits.
const PAUSE: &str = "#!/bin/sh
echo \"Confirmed: testimage pause invoked as $0\"
while :; do sleep 0.1; done
";

/// Preparation in the rig, whose files are discarded afterwards. Containers have storage on a disk, and no network unless a
/// test requests one, which is faster.
const RUN: &str = "set -e
scratch=/run/scratch
mkdir -p $scratch/tmp /etc/containers/containers.conf.d
cat > /etc/containers/storage.conf <<END
[storage]
driver = \"overlay\"
runroot = \"/run/containers/storage\"
graphroot = \"$scratch/storage\"
END
cat > /etc/containers/containers.conf.d/zz-tests.conf <<END
[containers]
netns = \"none\"
[engine]
runtime = \"$4\"
cgroup_manager = \"cgroupfs\"
events_logger = \"file\"
runtime_supports_json = [\"crun\", \"runc\", \"koya-runtime\"]
runtime_supports_kvm = [\"koya-runtime\"]
[engine.runtimes]
$4 = [\"$(command -v \"$4\")\"]
END
export TMPDIR=$scratch/tmp PODMAN_TIMEOUT=240
ip link set lo up
modules=/run/koya-rig/modules
for module in $(cat $modules/docker); do busybox insmod $modules/$module || true; done
podman import --quiet --change 'WORKDIR /home/podman' \\
    --change 'CMD [\"/bin/echo\", \"This container is intended for podman CI testing\"]' \\
    --change 'LABEL created_by=test/system/build-testimage' --change 'LABEL created_at=2022-06-15T00:00:00Z' \\
    \"$1/testimage.tar\" \"$5\" >&2
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
    let project = Project {
        name: &format!("podman-tests/{}", args.runtime),
        tests: tests(&args.bats.source)?,
        files: bats::BATS,
        script: RUN,
        further: vec![
            args.runtime.clone(),
            format!("quay.io/libpod/testimage:{TAG}"),
        ],
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
    let dir = cache::ensure("podman-tests", &cache::key([&helpers, PAUSE, RUN]), |dir| {
        copy(&source.join("test"), dir)?;
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
        let etc = rootfs.join("etc");
        fs::write(etc.join("os-release"), "ID=koya-test\nVERSION_ID=1\n")?;
        for (file, more) in [
            (
                "passwd",
                "bin:x:1:1:bin:/bin:/bin/false\nmail:x:8:12:mail:/var/mail:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n",
            ),
            (
                "group",
                "bin:x:1:root,bin\nmail:x:12:mail\nnobody:x:65534:\n",
            ),
        ] {
            let own = fs::read_to_string(etc.join(file))?;
            fs::write(etc.join(file), own + more)?;
        }
        for directory in ["var/mail", "usr"] {
            fs::create_dir_all(rootfs.join(directory))?;
        }
        fs::set_permissions(rootfs.join("tmp"), fs::Permissions::from_mode(0o1777))?;
        // The mode of the root in their own image, which a test checks.
        fs::set_permissions(&rootfs, fs::Permissions::from_mode(0o555))?;
        pack(&rootfs, &dir.join("test/system/testimage.tar"))
    })?;
    Ok(dir.join("test/system"))
}
