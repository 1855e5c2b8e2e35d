//! `linux.memoryPolicy` of a configuration, which is refused: an invalid one is told in runc's words before that. Its modes
//! and flags are those of set_mempolicy(2).

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeSet;

const WITHOUT_NODES: [&str; 2] = ["MPOL_DEFAULT", "MPOL_LOCAL"];
const WITH_NODES: [&str; 4] = [
    "MPOL_BIND",
    "MPOL_INTERLEAVE",
    "MPOL_PREFERRED_MANY",
    "MPOL_WEIGHTED_INTERLEAVE",
];
/// This mode may have nodes, or none.
const PREFERRED: &str = "MPOL_PREFERRED";
const FLAGS: [&str; 3] = [
    "MPOL_F_NUMA_BALANCING",
    "MPOL_F_RELATIVE_NODES",
    "MPOL_F_STATIC_NODES",
];
/// The kernel's highest number of a node (CONFIG_NODES_SHIFT is at most 10).
const LAST_NODE: u32 = 1023;

/// Checks the policy in the text of a configuration.
///
/// # Errors
/// The invalid part. The text itself is not checked.
pub(crate) fn check(text: &[u8]) -> Result<()> {
    // Hardly any has one, and parsing takes time.
    if !std::str::from_utf8(text).is_ok_and(|text| text.contains("\"memoryPolicy\"")) {
        return Ok(());
    }
    let config: Value = serde_json::from_slice(text).unwrap_or_default();
    let policy = &config["linux"]["memoryPolicy"];
    if !policy.is_object() {
        return Ok(());
    }
    let mode = policy["mode"].as_str().unwrap_or_default();
    let all = [&WITHOUT_NODES[..], &WITH_NODES, &[PREFERRED]];
    if !all.iter().any(|modes| modes.contains(&mode)) {
        bail!("invalid memory policy mode {mode:?}");
    }
    let text = policy["nodes"].as_str().unwrap_or_default();
    let nodes = nodes(text).with_context(|| format!("invalid memory policy nodes {text:?}"))?;
    for flag in policy["flags"].as_array().into_iter().flatten() {
        if !flag.as_str().is_some_and(|flag| FLAGS.contains(&flag)) {
            bail!("invalid memory policy flag {flag}");
        }
    }
    let count = nodes.len();
    if WITHOUT_NODES.contains(&mode) && count > 0 {
        bail!("memory policy mode requires 0 nodes but got {count}");
    }
    if WITH_NODES.contains(&mode) && count == 0 {
        bail!("memory policy mode requires at least one node but got 0");
    }
    Ok(())
}

/// Numbers and ranges of nodes, separated by commas.
fn nodes(text: &str) -> Result<BTreeSet<u32>> {
    let mut nodes = BTreeSet::new();
    for part in text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse()?, last.trim().parse()?);
        if first > last || last > LAST_NODE {
            bail!("{part:?} is no range of nodes");
        }
        nodes.extend(first..=last);
    }
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_wrong_is_told_in_runcs_words() {
        let said = |policy: Value| {
            let config = json!({"ociVersion": "1.2.0", "linux": {"memoryPolicy": policy}});
            let checked = check(config.to_string().as_bytes());
            checked.map_or_else(|error| format!("{error:#}"), |()| String::new())
        };
        for (policy, expected) in [
            (json!({}), "invalid memory policy mode \"\""),
            (
                json!({"mode": "INTERLEAVE", "nodes": "0"}),
                "invalid memory policy mode",
            ),
            (json!({"nodes": "0-7"}), "invalid memory policy mode"),
            (
                json!({"mode": "MPOL_PREFERRED", "nodes": "0", "flags": ["MPOL_F_RELATIVE_NODES", "badflag"]}),
                "invalid memory policy flag \"badflag\"",
            ),
            (
                json!({"mode": "MPOL_DEFAULT", "nodes": "0-7"}),
                "mode requires 0 nodes but got 8",
            ),
            (
                json!({"mode": "MPOL_BIND", "nodes": "0-9876543210", "flags": []}),
                "invalid memory policy nodes",
            ),
            (json!({"mode": "MPOL_BIND"}), "requires at least one node"),
        ] {
            let said = said(policy);
            assert!(said.contains(expected), "{said}");
        }
        assert_eq!(said(Value::Null), "");
        assert_eq!(said(json!({"mode": "MPOL_BIND", "nodes": "0,2-3"})), "");
        assert_eq!(said(json!({"mode": "MPOL_LOCAL"})), "");
        assert!(check(b"{}").is_ok() && check(b"\"memoryPolicy\"").is_ok());
    }
}
