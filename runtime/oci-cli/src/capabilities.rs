//! Warnings about the capabilities of a process.

use serde_json::Value;

/// Warns about ambient capabilities that the kernel does not grant (capabilities(7)), like runc.
pub(crate) fn warn_of_ambient(capabilities: &Value) {
    for name in not_raised(capabilities) {
        log::warn!(
            "can't raise ambient capability {name}: operation not permitted: it is not both permitted and inheritable"
        );
    }
}

fn not_raised(capabilities: &Value) -> Vec<&str> {
    let of = |set: &str| {
        let names = capabilities[set].as_array().into_iter().flatten();
        names.filter_map(Value::as_str)
    };
    let has = |set: &str, name: &str| of(set).any(|known| known == name);
    let mut all: Vec<_> = of("ambient")
        .filter(|name| !(has("permitted", name) && has("inheritable", name)))
        .collect();
    all.sort_unstable();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ambient_capabilities_are_permitted_and_inheritable() {
        let capabilities = json!({
            "permitted": ["CAP_KILL", "CAP_CHOWN"],
            "inheritable": ["CAP_KILL", "CAP_SYSLOG"],
            "ambient": ["CAP_SYSLOG", "CAP_KILL", "CAP_CHOWN"],
        });
        assert_eq!(not_raised(&capabilities), ["CAP_CHOWN", "CAP_SYSLOG"]);
        assert!(not_raised(&Value::Null).is_empty());
    }
}
