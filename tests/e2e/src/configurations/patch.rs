//! Changes to a specification, written as JSON.

use serde_json::Value;

/// Objects are merged, `null` removes, everything else replaces. A name that ends in `+` adds to the
/// array of the name before it.
pub(super) fn apply(target: &mut Value, changes: &Value) {
    let Value::Object(changes) = changes else {
        *target = changes.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(target) = target else {
        return;
    };
    for (name, change) in changes {
        if change.is_null() {
            target.remove(name);
        } else if let (Some(name), Value::Array(more)) = (name.strip_suffix('+'), change) {
            let array = target.entry(name).or_insert_with(|| Value::Array(vec![]));
            if let Value::Array(array) = array {
                array.extend(more.iter().cloned());
            }
        } else {
            apply(target.entry(name).or_insert(Value::Null), change);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn changes_merge_remove_replace_and_add() {
        let mut spec = json!({"a": {"b": 1, "c": 2}, "list": [1], "gone": 3, "whole": [1, 2]});
        let changes =
            json!({"a": {"c": 4, "d": [5]}, "list+": [2], "gone": null, "whole": [3], "new+": [6]});
        apply(&mut spec, &changes);
        assert_eq!(
            spec,
            json!({"a": {"b": 1, "c": 4, "d": [5]}, "list": [1, 2], "whole": [3], "new": [6]})
        );
    }
}
