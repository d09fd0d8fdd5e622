//! Changes to a container's limits while it runs.

use oci_spec::runtime::LinuxResources;
use serde_json::Value;

use super::{SpecError, read};
use crate::cgroup::limits;

/// Limits for which 0 is a value; for all others it stands for "not given", as in runc.
const ZERO_COUNTS: [&str; 2] = ["idle", "burst"];

/// The limits of a container after these changes, a `linux.resources` object as JSON. What it does
/// not give stays. Devices stay in any case, as under runc: orchestrators send the list that they
/// began with.
///
/// # Errors
///
/// For what is no such object, and for limits that cannot be had.
pub fn merge_resources(
    present: &LinuxResources,
    changes: &[u8],
) -> Result<LinuxResources, SpecError> {
    let failed = |source| SpecError::Json {
        what: "resources",
        source,
    };
    let changes: LinuxResources = read("resources", changes)?;
    let mut changes = serde_json::to_value(changes).map_err(failed)?;
    if let Value::Object(fields) = &mut changes {
        fields.remove("devices");
    }
    let mut merged = serde_json::to_value(present).map_err(failed)?;
    merge(&mut merged, changes);
    let merged = serde_json::from_value(merged).map_err(failed)?;
    limits::check(&merged)?;
    Ok(merged)
}

fn merge(into: &mut Value, changes: Value) {
    match (into, changes) {
        (Value::Object(into), Value::Object(changes)) => {
            for (key, change) in changes {
                let says_nothing = match &change {
                    Value::Null => true,
                    Value::String(text) => text.is_empty(),
                    Value::Number(number) => {
                        number.as_f64() == Some(0.0) && !ZERO_COUNTS.contains(&key.as_str())
                    }
                    _ => false,
                };
                if !says_nothing {
                    merge(into.entry(key).or_insert(Value::Null), change);
                }
            }
        }
        (into, change) => *into = change,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn merged(present: Value, changes: Value) -> Result<Value, SpecError> {
        let present: LinuxResources = serde_json::from_value(present).unwrap();
        let merged = merge_resources(&present, changes.to_string().as_bytes())?;
        Ok(serde_json::to_value(merged).unwrap())
    }

    #[test]
    fn what_is_not_given_stays() {
        let present = json!({
            "memory": {"limit": 100, "swap": 200}, "cpu": {"quota": 5, "period": 10, "idle": 1},
            "devices": [{"allow": false, "access": "rwm"}], "pids": {"limit": 5},
            "unified": {"memory.high": "7"},
        });
        let changes = json!({
            "memory": {"limit": 150, "swap": 0, "reservation": null}, "cpu": {"quota": 7, "cpus": ""},
            "devices": [{"allow": true, "access": "rwm"}], "unified": {"memory.min": "1"},
        });
        let all = merged(present, changes).unwrap();
        assert_eq!(all["memory"]["limit"], 150);
        assert_eq!(all["memory"]["swap"], 200);
        assert_eq!(all["cpu"], json!({"quota": 7, "period": 10, "idle": 1}));
        assert_eq!(all["devices"][0]["allow"], false);
        assert_eq!(all["pids"]["limit"], 5);
        assert_eq!(
            all["unified"],
            json!({"memory.high": "7", "memory.min": "1"})
        );
    }

    #[test]
    fn zero_is_a_value_for_some() {
        let all = merged(
            json!({"cpu": {"idle": 1, "shares": 9}}),
            json!({"cpu": {"idle": 0, "shares": 0}}),
        );
        assert_eq!(all.unwrap()["cpu"], json!({"idle": 0, "shares": 9}));
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        for changes in [
            json!({"memory": {"swap": 50}}),
            json!({"memory": {"kernel": 50}}),
            json!({"unknown": 1}),
            json!(7),
        ] {
            let present = json!({"memory": {"limit": 100}});
            assert!(merged(present, changes.clone()).is_err(), "{changes}");
        }
    }
}
