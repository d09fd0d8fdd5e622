//! Finds what a typed reading of JSON left out.

use serde_json::Value;

/// Path of the first key of `input` that carries something and is not in `kept`, which is what
/// typed structures made of `input`, as JSON again.
///
/// Only keys are compared: a value that a structure does not know fails to be read at all. Sets
/// may change their order, so arrays are compared element by element only if they hold objects.
pub fn first_lost(input: &Value, kept: &Value) -> Option<String> {
    lost(input, kept).map(|mut path| {
        path.reverse();
        path.concat().trim_start_matches('.').to_owned()
    })
}

/// Segments of the path, innermost first.
fn lost(input: &Value, kept: &Value) -> Option<Vec<String>> {
    match (input, kept) {
        (Value::Object(input), Value::Object(kept)) => input.iter().find_map(|(key, value)| {
            let path = match kept.get(key) {
                Some(kept) => lost(value, kept),
                None if is_empty(value) => None,
                None => Some(vec![]),
            };
            pushed(path, format!(".{key}"))
        }),
        (Value::Array(input), Value::Array(kept)) => {
            let pairs = input.iter().zip(kept);
            let mut pairs = pairs.enumerate();
            pairs.find_map(|(index, (input, kept))| pushed(lost(input, kept), format!("[{index}]")))
        }
        (Value::Object(_) | Value::Array(_), Value::Null) if !is_empty(input) => Some(vec![]),
        _ => None,
    }
}

fn pushed(path: Option<Vec<String>>, segment: String) -> Option<Vec<String>> {
    path.map(|mut path| {
        path.push(segment);
        path
    })
}

/// Whether a value says no more than its absence would.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(value) => value.as_f64() == Some(0.0),
        Value::String(value) => value.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.values().all(is_empty),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nothing_is_lost_when_all_keys_are_kept() {
        let input = json!({"a": [{"b": 1}], "caps": ["X", "Y"], "none": null, "empty": {"x": ""}});
        let kept = json!({"a": [{"b": 1, "extra": 2}], "caps": ["Y", "X"]});
        assert_eq!(first_lost(&input, &kept), None);
    }

    #[test]
    fn the_path_of_a_lost_key_is_told() {
        let input = json!({"linux": {"devices": [{"path": "/a"}, {"path": "/b", "new": 1}]}});
        let kept = json!({"linux": {"devices": [{"path": "/a"}, {"path": "/b"}]}});
        let lost = first_lost(&input, &kept);
        assert_eq!(lost.as_deref(), Some("linux.devices[1].new"));
    }

    #[test]
    fn false_and_zero_are_as_good_as_absent() {
        assert_eq!(first_lost(&json!({"x": false, "y": 0}), &json!({})), None);
        assert_eq!(
            first_lost(&json!({"x": true}), &json!({})).as_deref(),
            Some("x")
        );
    }
}
