//! virtio-fs under load, with every cache policy: fsx, which checks each byte read against its own copy, and stress-ng's
//! file-system stressors with their own checks.
//!
//! `KOYA_TEST_TORTURE` is the total time in seconds (default 20). stress-ng needs half a minute on an emulated machine, so
//! it is included from 120 seconds on.

use crate::tool::{run_in, scratch, stdout};
use anyhow::{Context, Result, ensure};
use std::path::Path;

crate::trials![files_hold_under_torture];

const POLICIES: [&str; 4] = ["auto", "never", "always", "writeback"];

/// Small and large files; every operation of fsx. Each run has its own seed, so a failure can be reproduced with the printed
/// command.
const SMALL: &str = "flen = 1048576\n[weights]\nclose_open = 1\ninvalidate = 1\nfsync = 0.5\n\
    fdatasync = 0.5\npunch_hole = 3\nposix_fallocate = 3\nsendfile = 5\nposix_fadvise = 2\n\
    copy_file_range = 5\n";
const LARGE: &str = "flen = 10000000\n[opsize]\nmax = 1300000\n[weights]\nclose_open = 1\n\
    mapread = 3\nmapwrite = 3\ncopy_file_range = 3\npunch_hole = 1\n";

const SCRIPT: &str = r#"
bad=0 running= fsx=
for seed in 1 2 3; do
    config=small; [ $seed = 2 ] && config=large
    mkdir p$seed
    /media/fsx -f $config.toml -S $seed$SEED -P p$seed p$seed/file > p$seed/log 2>&1 &
    running="$running $!:p$seed:143" fsx="$fsx $!"
done
mkdir stress
# Its open-stressor takes all that there are, and others would find none.
ulimit -n 2048
[ $SECONDS_EACH -ge 30 ] && stress-ng --temp-path stress --timeout $SECONDS_EACH --verify \
    --access 1 --chmod 1 --chown 1 --dentry 1 --dir 1 --fallocate 1 --flock 1 --getdent 1 --hdd 1 \
    --iomix 1 --link 1 --lockf 1 --mknod 1 --open 1 --rename 1 --symlink 1 --utime 1 --xattr 1 \
    --fstat 1 --seek 1 --hdd-bytes 8M --iomix-bytes 8M --seek-size 8M --fallocate-bytes 16M \
    > stress/log 2>&1 &
[ $SECONDS_EACH -ge 30 ] && running="$running $!:stress:0"
# The time is that of the work: a host under load takes seconds to start a program.
for seed in 1 2 3; do
    tries=0
    until [ -e p$seed/file ] || [ $((tries += 1)) = 300 ]; do sleep 0.2; done
done
sleep $SECONDS_EACH
kill $fsx
for one in $running; do
    IFS=: read -r pid name expected <<X
$one
X
    wait $pid; status=$?
    if [ $status != $expected ]; then
        bad=1; echo "$name ended with $status:" >&2; tail -n 40 $name/log >&2
    fi
done
sha256sum p?/file
exit $bad
"#;

fn files_hold_under_torture() -> Result<()> {
    let seconds: u64 = match std::env::var("KOYA_TEST_TORTURE") {
        Ok(text) => text.parse().context("KOYA_TEST_TORTURE is no number")?,
        Err(_) => 20,
    };
    let fsx = std::env::var("KOYA_TEST_FSX")
        .context("KOYA_TEST_FSX names no directory; `cargo xtask test` makes one")?;
    for (seed, policy) in POLICIES.into_iter().enumerate() {
        let dir = scratch(&format!("torture-{policy}"))?;
        std::fs::write(dir.join("small.toml"), SMALL)?;
        std::fs::write(dir.join("large.toml"), LARGE)?;
        let files = format!("{}:/mnt", dir.display());
        let tools = format!("{fsx}:/media:ro");
        let each = format!("SECONDS_EACH={}", (seconds / POLICIES.len() as u64).max(1));
        let options = [
            "--read-only",
            "--cache",
            policy,
            "--memory",
            "512m",
            "--tmpfs",
            "/tmp",
            "--workdir",
            "/mnt",
            "-v",
            &files,
            "-v",
            &tools,
            "--env",
            &each,
            "--env",
            &format!("SEED={seed}"),
        ];
        let guest = stdout(run_in(Path::new("/"), &options, &["sh", "-c", SCRIPT])?)
            .with_context(|| format!("under --cache {policy}"))?;
        let host = std::process::Command::new("sh")
            .args(["-c", "sha256sum p?/file"])
            .current_dir(&dir)
            .output()?;
        ensure!(stdout(host)? == guest, "the host has other bytes: {guest}");
        std::fs::remove_dir_all(&dir)?;
    }
    Ok(())
}
