//! Sysctls of the container's network in configurations of `koya-runtime`.

use crate::oci::{Runtime, bundle, text};
use anyhow::{Result, ensure};
use serde_json::json;

crate::trials!(sysctls_of_the_network_are_set_or_refused);

fn sysctls_of_the_network_are_set_or_refused() -> Result<()> {
    let runtime = Runtime::koya()?;
    let script = "cat /proc/sys/net/core/somaxconn /proc/sys/net/ipv4/conf/lo/rp_filter";
    let own = bundle(script, |config| {
        config["linux"]["sysctl"] =
            json!({"net.core.somaxconn": "77", "net/ipv4/conf/lo/rp_filter": "2"});
    })?;
    let said = runtime.ok(&["run", "--bundle", text(&own)?, "sysctls-c"])?;
    ensure!(said.split_whitespace().eq(["77", "2"]), "{said}");
    let missing = bundle(script, |config| {
        config["linux"]["sysctl"] = json!({"net.none.such": "1"});
    })?;
    let refused = runtime.call(&["run", "--bundle", text(&missing)?, "sysctls-d"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    let is_named = said.contains("no sysctl net.none.such");
    ensure!(!refused.status.success() && is_named, "{refused:?}");
    // It may already be gone.
    runtime.call(&["delete", "--force", "sysctls-d"])?;
    Ok(())
}
