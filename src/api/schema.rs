//! The parts of the schema that can't be derived: the selector and the lists of metadata names.
//!
//! Takes nothing, gives pieces of the CustomResourceDefinition. Must never hold a rule over
//! something without a bound: the API server estimates what each costs and refuses a definition
//! whose rules could cost too much.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use super::{
    MAX_LABEL_KEY, MAX_METADATA, MAX_METADATA_CHARS, MAX_SELECTOR, MAX_SELECTOR_VALUES,
    MAX_STATIC_VALUE,
};

/// The name of a label, as Kubernetes checks it (RE2).
const LABEL_KEY: &str =
    "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";

/// The rule for a text that is the name of a label or annotation.
fn label_key_rule() -> Value {
    json!([{
        "rule": format!("self.matches('{LABEL_KEY}')"),
        "message": "must be the name of a label or annotation, for example `version` or `app.kubernetes.io/version`",
    }])
}

/// A label selector that is not empty.
pub(super) fn selector(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "properties": {
            "matchLabels": {
                "description": "Labels that a pod must have with these values.",
                "type": "object",
                "maxProperties": MAX_SELECTOR,
                "x-kubernetes-validations": [{
                    "rule": format!("self.all(name, size(name) <= {MAX_LABEL_KEY} && name.matches('{LABEL_KEY}'))"),
                    "message": "the names in matchLabels must be those of labels, for example `app` or `app.kubernetes.io/name`",
                }],
                "additionalProperties": {
                    "type": "string",
                    "maxLength": 63,
                    "x-kubernetes-validations": [{
                        "rule": "self.matches('^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$')",
                        "message": "must be the value of a label: letters, digits, `-`, `_` and `.`, beginning and ending with a letter or digit, or empty",
                    }],
                },
            },
            "matchExpressions": {
                "description": "Expressions that a pod's labels must all meet.",
                "type": "array",
                "maxItems": MAX_SELECTOR,
                "x-kubernetes-list-type": "atomic",
                "items": {
                    "type": "object",
                    "required": ["key", "operator"],
                    "properties": {
                        "key": {
                            "description": "The name of the label.",
                            "type": "string",
                            "maxLength": MAX_LABEL_KEY,
                            "x-kubernetes-validations": label_key_rule(),
                        },
                        "operator": {
                            "description": "In and NotIn compare with values; Exists and DoesNotExist take none. NotIn and DoesNotExist match pods without the label, too.",
                            "type": "string",
                            "enum": ["In", "NotIn", "Exists", "DoesNotExist"],
                        },
                        "values": {
                            "description": "The values of In and NotIn.",
                            "type": "array",
                            "maxItems": MAX_SELECTOR_VALUES,
                            "x-kubernetes-list-type": "atomic",
                            "items": {"type": "string", "maxLength": 63},
                        },
                    },
                    "x-kubernetes-validations": [{
                        "rule": "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",
                        "message": "In and NotIn need at least one value, Exists and DoesNotExist take none",
                    }],
                },
            },
        },
        "x-kubernetes-validations": [{
            "rule": "(has(self.matchLabels) && size(self.matchLabels) > 0) || (has(self.matchExpressions) && size(self.matchExpressions) > 0)",
            "message": "selector must not be empty: write matchLabels or matchExpressions, for example `matchLabels: {app: web}`",
        }],
        "x-kubernetes-map-type": "atomic",
    })
}

/// Names of labels or annotations.
pub(super) fn label_keys(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": MAX_METADATA,
        "x-kubernetes-list-type": "set",
        "items": {
            "type": "string",
            "maxLength": MAX_LABEL_KEY,
            "x-kubernetes-validations": label_key_rule(),
        },
    })
}

/// Static entries.
pub(super) fn statics(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": MAX_METADATA,
        "additionalProperties": {"type": "string", "maxLength": MAX_STATIC_VALUE},
        "x-kubernetes-validations": [{
            "rule": format!(r"self.all(name, size(name) > 0 && size(name) <= {MAX_LABEL_KEY} && !name.matches(r'\p{{Cc}}'))"),
            "message": format!("the names in metadata.static must have 1 to {MAX_LABEL_KEY} characters, none of them a control character"),
        }, {
            "rule": format!("self.map(name, size(name) + size(self[name])).sum() <= {MAX_METADATA_CHARS}"),
            "message": format!("the names and values in metadata.static must have at most {MAX_METADATA_CHARS} characters together"),
        }],
    })
}
