//! Label selectors: which pods a registration means.
//!
//! Takes the selector of a spec, gives a question that is asked of every pod event. Must never
//! match everything by mistake: an empty selector is refused.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use super::names;
use crate::api::{MAX_SELECTOR, MAX_SELECTOR_VALUES};

/// A selector that was checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Selector {
    /// All of them must hold; the ones that compare with one value come first: they are the usual
    /// ones and the cheapest.
    requirements: Box<[Requirement]>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Requirement {
    key: Box<str>,
    rule: Rule,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Rule {
    Is(Box<str>),
    In(Box<[Box<str>]>),
    NotIn(Box<[Box<str>]>),
    Exists,
    DoesNotExist,
}

impl Selector {
    /// Checks a selector of a spec.
    ///
    /// # Errors
    ///
    /// Says what to write when it is empty, names an unknown operator, or a label that can't be.
    pub fn parse(selector: &LabelSelector) -> Result<Self, String> {
        let labels = selector.match_labels.iter().flatten();
        let expressions = selector.match_expressions.as_deref().unwrap_or_default();
        if selector.match_labels.iter().flatten().count() > MAX_SELECTOR
            || expressions.len() > MAX_SELECTOR
        {
            return Err(format!(
                "selector has too many entries: write at most {MAX_SELECTOR} matchLabels and {MAX_SELECTOR} matchExpressions"
            ));
        }
        let mut requirements = Vec::new();
        for (key, value) in labels {
            names::label_key(key).map_err(|error| format!("selector.matchLabels: {error}"))?;
            names::label_value(value).map_err(|error| format!("selector.matchLabels: {error}"))?;
            requirements.push(Requirement {
                key: key.as_str().into(),
                rule: Rule::Is(value.as_str().into()),
            });
        }
        for (number, expression) in expressions.iter().enumerate() {
            let place = || format!("selector.matchExpressions[{number}]");
            names::label_key(&expression.key).map_err(|error| format!("{}: {error}", place()))?;
            let values = expression.values.as_deref().unwrap_or_default();
            if values.len() > MAX_SELECTOR_VALUES {
                return Err(format!(
                    "{} has too many values: write at most {MAX_SELECTOR_VALUES}",
                    place()
                ));
            }
            let owned = || values.iter().map(|value| value.as_str().into()).collect();
            let rule = match expression.operator.as_str() {
                "In" => Rule::In(owned()),
                "NotIn" => Rule::NotIn(owned()),
                "Exists" => Rule::Exists,
                "DoesNotExist" => Rule::DoesNotExist,
                other => {
                    return Err(format!(
                        "{}: there is no operator {other:?}: write In, NotIn, Exists or DoesNotExist",
                        place()
                    ));
                }
            };
            let takes_values = matches!(rule, Rule::In(_) | Rule::NotIn(_));
            if takes_values == values.is_empty() {
                return Err(format!(
                    "{}: In and NotIn need at least one value, Exists and DoesNotExist take none",
                    place()
                ));
            }
            requirements.push(Requirement {
                key: expression.key.as_str().into(),
                rule,
            });
        }
        if requirements.is_empty() {
            return Err(
                "selector must not be empty: write matchLabels or matchExpressions, for example `matchLabels: {app: web}`"
                    .to_owned(),
            );
        }
        Ok(Self {
            requirements: requirements.into(),
        })
    }

    /// Whether labels match; `get` gives the value of a label. As in Kubernetes, NotIn and
    /// DoesNotExist hold when the label is absent.
    pub fn matches<'a>(&self, get: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.requirements.iter().all(|requirement| {
            let found = get(&requirement.key);
            match &requirement.rule {
                Rule::Is(value) => found == Some(value),
                Rule::In(values) => found.is_some_and(|found| among(values, found)),
                Rule::NotIn(values) => found.is_none_or(|found| !among(values, found)),
                Rule::Exists => found.is_some(),
                Rule::DoesNotExist => found.is_none(),
            }
        })
    }
}

fn among(values: &[Box<str>], found: &str) -> bool {
    values.iter().any(|value| **value == *found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: serde_json::Value) -> Result<Selector, String> {
        Selector::parse(&serde_json::from_value(value).unwrap())
    }

    fn matches(selector: serde_json::Value, labels: &[(&str, &str)]) -> bool {
        parse(selector).unwrap().matches(|key| {
            labels
                .iter()
                .find(|(name, _)| *name == key)
                .map(|(_, value)| *value)
        })
    }

    fn expression(operator: &str, values: &[&str]) -> serde_json::Value {
        json!({"matchExpressions": [{"key": "tier", "operator": operator, "values": values}]})
    }

    #[test]
    fn operators_are_those_of_kubernetes() {
        let (front, back, none) = (&[("tier", "front")][..], &[("tier", "back")][..], &[][..]);
        for (selector, wanted) in [
            (
                json!({"matchLabels": {"tier": "front"}}),
                [true, false, false],
            ),
            (expression("In", &["front", "x"]), [true, false, false]),
            (expression("NotIn", &["front", "x"]), [false, true, true]),
            (expression("Exists", &[]), [true, true, false]),
            (expression("DoesNotExist", &[]), [false, false, true]),
        ] {
            let found = [front, back, none].map(|labels| matches(selector.clone(), labels));
            assert_eq!(found, wanted, "{selector}");
        }
    }

    #[test]
    fn an_empty_value_is_not_an_absent_label() {
        let selector = json!({"matchLabels": {"tier": ""}});
        assert!(matches(selector.clone(), &[("tier", "")]));
        assert!(!matches(selector, &[]));
        assert!(!matches(expression("DoesNotExist", &[]), &[("tier", "")]));
    }

    #[test]
    fn all_parts_must_hold() {
        let selector = json!({
            "matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "tier", "operator": "Exists"}],
        });
        assert!(matches(selector.clone(), &[("app", "web"), ("tier", "x")]));
        assert!(!matches(selector.clone(), &[("app", "web")]));
        assert!(!matches(selector, &[("tier", "x")]));
    }

    #[test]
    fn what_can_not_be_meant_is_refused() {
        for (selector, fragment) in [
            (json!({}), "must not be empty"),
            (
                json!({"matchLabels": {}, "matchExpressions": []}),
                "must not be empty",
            ),
            (expression("In", &[]), "need at least one value"),
            (expression("Exists", &["x"]), "take none"),
            (expression("Gt", &["1"]), "no operator \"Gt\""),
            (
                json!({"matchLabels": {"a b": "x"}}),
                "the label name \"a b\"",
            ),
            (
                json!({"matchLabels": {"a": "x y"}}),
                "the label value \"x y\"",
            ),
        ] {
            let message = parse(selector.clone()).unwrap_err();
            assert!(message.contains(fragment), "{selector}: {message}");
        }
    }
}
