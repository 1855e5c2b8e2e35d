//! Effects of seccomp filters in the guest, under `koya-runtime`.

use crate::oci::{Runtime, bundle, text};
use anyhow::{Result, ensure};
use serde_json::json;

crate::trials!(a_filter_compares_what_its_mask_leaves);

/// Default profiles have such a rule for clone(2)'s namespace flags.
fn a_filter_compares_what_its_mask_leaves() -> Result<()> {
    let runtime = Runtime::koya()?;
    let script = "cd /dev/shm; touch a; chmod 4755 a && echo allowed; chmod 755 a 2>/dev/null || echo denied; \
                  chmod 4700 a; stat -c %a a";
    let filtered = |script: &str| {
        bundle(script, |config| {
            let set_user = 0o4000;
            // arm64 has no chmod(2).
            let rules = [("chmod", 1), ("fchmodat", 2)].map(|(name, index)| {
                let mode = json!({"index": index, "op": "SCMP_CMP_MASKED_EQ", "value": set_user,
                    "valueTwo": 0});
                json!({"names": [name], "action": "SCMP_ACT_ERRNO", "args": [mode]})
            });
            config["linux"]["seccomp"] =
                json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules});
        })
    };
    let all = "allowed\ndenied\n4700";
    let first = runtime.ok(&["run", "--bundle", text(&filtered(script)?)?, "seccomp-m"])?;
    ensure!(first.trim() == all, "{first}");
    let long = filtered("exec sleep 1000")?;
    runtime.ok(&["run", "-d", "--bundle", text(&long)?, "seccomp-l"])?;
    let added = runtime.ok(&["exec", "seccomp-l", "sh", "-c", script])?;
    ensure!(added.trim() == all, "{added}");
    runtime.ok(&["delete", "--force", "seccomp-l"])?;
    Ok(())
}
