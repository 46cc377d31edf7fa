//! Who may write where, and how much: the administrator's policy file.
//!
//! Takes the file's text, gives rules that are asked for every registration, and the limits of each
//! namespace. Must never grant more than a rule says: a rule grants only what all four of its lists
//! name, and what no rule grants is refused.
//!
//! ```yaml
//! rules:
//!   - namespaces: ["*"]                        # names; `*` stands for any characters
//!     formats: [Json]
//!     prefixes: ["/services/{namespace}/"]     # what stands before the service in a key
//!     services: ["*"]                          # names; all when left out
//!   - namespaces: [shop]
//!     formats: [Plain]
//!     prefixes: ["", "/teams/{namespace}/*"]   # no prefix at all; any prefix below one
//!     services: ["{namespace}.*"]
//! limits:
//!   - namespaces: [shop]                       # the first entry that names a namespace counts for it
//!     registrations: 20
//!     endpoints: 2000
//!     endpointsPerRegistration: 500
//! massRemovals:
//!   - namespaces: [shop]                       # the same
//!     percent: 30
//!     leastPods: 10
//!     holdSeconds: 300
//! ```

use std::collections::BTreeSet;

use serde::Deserialize;

use crate::api::FormatType;
use crate::model::names;

/// The most registrations of a namespace where the policy says nothing: each has a scope that is
/// watched, and a lease.
pub const DEFAULT_REGISTRATIONS: u32 = 500;
/// The most endpoints of a namespace where the policy says nothing: some 30 MB in etcd with records of
/// usual size, 400 MB with the longest metadata that is taken.
pub const DEFAULT_ENDPOINTS: u32 = 50_000;
/// The most endpoints of a registration where the policy says nothing: twice the largest that is
/// measured (10,000), so that all of its pods can be replaced at once.
pub const DEFAULT_ENDPOINTS_PER_REGISTRATION: u32 = 20_000;

/// The share of a registration's pods that may go at once where the policy says nothing, in percent. At the same
/// share load balancers stop to believe their health checks (the panic threshold of Envoy).
pub const DEFAULT_MASS_PERCENT: u8 = 50;
/// As many pods have to go at once where the policy says nothing: fewer are what one node or one small
/// Deployment loses on any day.
pub const DEFAULT_MASS_LEAST_PODS: u32 = 5;
/// The longest hold: an endpoint that nobody looked at for a day is no endpoint.
pub const MAX_HOLD_SECONDS: u32 = 86_400;

/// What `{namespace}` is written as.
const NAMESPACE: &str = "{namespace}";

/// The rules in force. The default is what holds without a file: each namespace may use the format
/// Json below its own `/services/<namespace>/`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping with the members `rules` and, if wanted, `limits` and `massRemovals`"
)]
pub struct Policy {
    /// Each of them grants; none takes away.
    pub rules: Vec<Rule>,
    /// How much a namespace may have; the first entry that names it counts.
    #[serde(default)]
    pub limits: Vec<LimitsRule>,
    /// When much of a registration goes at once; the first entry that names a namespace counts.
    #[serde(default)]
    pub mass_removals: Vec<MassRemovalsRule>,
}

/// When much of a registration goes at once in some namespaces, and what becomes of the rest.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "massRemovals: a mapping with the members `namespaces` and, if wanted, `percent`, `leastPods` and `holdSeconds`"
)]
pub struct MassRemovalsRule {
    /// The namespaces that it is for.
    pub namespaces: Vec<NamespacePattern>,
    /// The share of a registration's pods of which more has to go, in percent.
    #[serde(default)]
    pub percent: Percent,
    /// The number of pods of which at least as many have to go.
    #[serde(default = "default_least_pods")]
    pub least_pods: u32,
    /// For how long the records of what else goes are held; 0: not at all.
    #[serde(default)]
    pub hold_seconds: HoldSeconds,
}

fn default_least_pods() -> u32 {
    DEFAULT_MASS_LEAST_PODS
}

/// A share, from 0 to 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u32")]
pub struct Percent(u8);

/// A time, from 0 to [`MAX_HOLD_SECONDS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u32")]
pub struct HoldSeconds(u32);

impl Default for Percent {
    fn default() -> Self {
        Self(DEFAULT_MASS_PERCENT)
    }
}

impl TryFrom<u32> for Percent {
    type Error = String;

    fn try_from(number: u32) -> Result<Self, String> {
        match u8::try_from(number) {
            Ok(percent) if percent <= 100 => Ok(Self(percent)),
            _ => Err(format!("{number} is no share in percent: 0 to 100")),
        }
    }
}

impl TryFrom<u32> for HoldSeconds {
    type Error = String;

    fn try_from(number: u32) -> Result<Self, String> {
        if number <= MAX_HOLD_SECONDS {
            Ok(Self(number))
        } else {
            Err(format!(
                "{number} s is too long for a hold: at most {MAX_HOLD_SECONDS}"
            ))
        }
    }
}

/// When much of a registration goes at once, and what becomes of the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MassRemovals {
    /// More than this share of a registration's pods, in percent.
    pub percent: u8,
    /// And at least as many pods.
    pub least_pods: u32,
    /// For how many seconds the records of what else goes are held; 0: not at all.
    pub hold_seconds: u32,
}

/// How much each of some namespaces may have.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "limits: a mapping with the members `namespaces` and, if wanted, `registrations`, `endpoints` and `endpointsPerRegistration`"
)]
pub struct LimitsRule {
    /// The namespaces that it is for.
    pub namespaces: Vec<NamespacePattern>,
    /// The most registrations of a namespace.
    #[serde(default = "default_registrations")]
    pub registrations: u32,
    /// The most endpoints of all registrations of a namespace.
    #[serde(default = "default_endpoints")]
    pub endpoints: u32,
    /// The most endpoints of one registration.
    #[serde(default = "default_endpoints_per_registration")]
    pub endpoints_per_registration: u32,
}

fn default_registrations() -> u32 {
    DEFAULT_REGISTRATIONS
}

fn default_endpoints() -> u32 {
    DEFAULT_ENDPOINTS
}

fn default_endpoints_per_registration() -> u32 {
    DEFAULT_ENDPOINTS_PER_REGISTRATION
}

/// How much one namespace may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most registrations.
    pub registrations: u32,
    /// The most endpoints of all registrations.
    pub endpoints: u32,
    /// The most endpoints of one registration.
    pub endpoints_per_registration: u32,
}

/// A rule grants what all of its lists name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a rule: a mapping with the members `namespaces`, `formats`, `prefixes` and, if wanted, `services`"
)]
pub struct Rule {
    /// The namespaces that it is for.
    pub namespaces: Vec<NamespacePattern>,
    /// The formats that they may use.
    pub formats: Vec<FormatType>,
    /// What may stand before the service in a key.
    pub prefixes: Vec<PrefixPattern>,
    /// The names of the services.
    #[serde(default = "any_service")]
    pub services: Vec<ServicePattern>,
}

fn any_service() -> Vec<ServicePattern> {
    vec![ServicePattern("*".to_owned())]
}

/// A namespace's name, in which `*` stands for any characters.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct NamespacePattern(String);

/// A service's name, in which `*` stands for any characters and `{namespace}` for the namespace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct ServicePattern(String);

/// A prefix, in which `{namespace}` stands for the namespace. It is granted exactly as it stands
/// there, the empty one too; one that ends with `/*` grants itself and every prefix below it, and
/// `*` alone any prefix.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PrefixPattern(String);

/// A policy file that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the policy can't be used: {0}")]
pub struct PolicyError(#[from] serde_yaml::Error);

impl Policy {
    /// Reads a policy file.
    ///
    /// # Errors
    ///
    /// Says the place, with line and column, and what is allowed there.
    pub fn parse(yaml: &str) -> Result<Self, PolicyError> {
        Ok(serde_yaml::from_str(yaml)?)
    }

    /// What the granted prefixes begin with, as far as that is the same for all namespaces; each once.
    #[must_use]
    pub fn beginnings(&self) -> BTreeSet<&str> {
        let prefixes = self.rules.iter().flat_map(|rule| &rule.prefixes);
        prefixes
            .map(|pattern| pattern.0.split(['*', '{']).next().unwrap_or_default())
            .collect()
    }

    /// Whether a namespace may use a format with this base (what stands before the service in its
    /// keys) for this service.
    #[must_use]
    pub fn grants(&self, namespace: &str, format: FormatType, base: &str, service: &str) -> bool {
        self.rules.iter().any(|rule| {
            rule.concerns(namespace, format)
                && rule.prefixes.iter().any(|p| p.matches(namespace, base))
                && rule.services.iter().any(|s| s.matches(namespace, service))
        })
    }

    /// How much a namespace may have.
    #[must_use]
    pub fn limits(&self, namespace: &str) -> Limits {
        let found = self.limits.iter().find(|entry| {
            entry
                .namespaces
                .iter()
                .any(|pattern| glob(&pattern.0, namespace))
        });
        found.map_or(
            Limits {
                registrations: DEFAULT_REGISTRATIONS,
                endpoints: DEFAULT_ENDPOINTS,
                endpoints_per_registration: DEFAULT_ENDPOINTS_PER_REGISTRATION,
            },
            |entry| Limits {
                registrations: entry.registrations,
                endpoints: entry.endpoints,
                endpoints_per_registration: entry.endpoints_per_registration,
            },
        )
    }

    /// When much of a registration goes at once in a namespace.
    #[must_use]
    pub fn mass_removals(&self, namespace: &str) -> MassRemovals {
        let found = self.mass_removals.iter().find(|entry| {
            entry
                .namespaces
                .iter()
                .any(|pattern| glob(&pattern.0, namespace))
        });
        found.map_or(
            MassRemovals {
                percent: DEFAULT_MASS_PERCENT,
                least_pods: DEFAULT_MASS_LEAST_PODS,
                hold_seconds: 0,
            },
            |entry| MassRemovals {
                percent: entry.percent.0,
                least_pods: entry.least_pods,
                hold_seconds: entry.hold_seconds.0,
            },
        )
    }

    /// What is granted to a namespace for a format: prefixes and services of each rule, for a
    /// message.
    pub(super) fn granted(
        &self,
        namespace: &str,
        format: FormatType,
    ) -> impl Iterator<Item = (String, String)> {
        self.rules
            .iter()
            .filter(move |rule| rule.concerns(namespace, format))
            .map(|rule| {
                (
                    listed(rule.prefixes.iter().map(|prefix| &prefix.0)),
                    listed(rule.services.iter().map(|service| &service.0)),
                )
            })
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            rules: vec![Rule {
                namespaces: vec![NamespacePattern("*".to_owned())],
                formats: vec![FormatType::Json],
                prefixes: vec![PrefixPattern("/services/{namespace}/".to_owned())],
                services: any_service(),
            }],
            limits: Vec::new(),
            mass_removals: Vec::new(),
        }
    }
}

impl Rule {
    fn concerns(&self, namespace: &str, format: FormatType) -> bool {
        self.formats.contains(&format)
            && self
                .namespaces
                .iter()
                .any(|pattern| glob(&pattern.0, namespace))
    }
}

/// How many names of a list a message repeats: a condition has to stay readable.
const SHOWN: usize = 8;

/// Names in quotes and brackets, as YAML takes them.
fn listed<'a>(mut names: impl Iterator<Item = &'a String>) -> String {
    let mut shown: Vec<String> = names
        .by_ref()
        .take(SHOWN)
        .map(|name| format!("{name:?}"))
        .collect();
    if names.next().is_some() {
        shown.push("...".to_owned());
    }
    format!("[{}]", shown.join(", "))
}

impl ServicePattern {
    fn matches(&self, namespace: &str, service: &str) -> bool {
        // A namespace is a DNS label: what it puts into the pattern is no `*`.
        glob(&self.0.replace(NAMESPACE, namespace), service)
    }
}

impl PrefixPattern {
    fn matches(&self, namespace: &str, base: &str) -> bool {
        let pattern = self.0.replace(NAMESPACE, namespace);
        match pattern.strip_suffix('*') {
            Some(above) => base.starts_with(above),
            None => base == pattern,
        }
    }
}

impl TryFrom<String> for NamespacePattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        // What a `*` stands for can be anything that a name may hold; `a` is.
        names::namespace(&text.replace('*', "a")).map_err(|error| {
            format!(
                "{text:?} is no pattern of a namespace (`*` stands for any characters): {error}"
            )
        })?;
        Ok(Self(text))
    }
}

impl TryFrom<String> for ServicePattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let example = text.replace(NAMESPACE, "a").replace('*', "a");
        names::service(&example).map_err(|error| {
            format!(
                "{text:?} is no pattern of a service (`*` stands for any characters, `{NAMESPACE}` for the namespace): {error}"
            )
        })?;
        Ok(Self(text))
    }
}

impl TryFrom<String> for PrefixPattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let example = text.replace(NAMESPACE, "a");
        let exact = example.strip_suffix('*').unwrap_or(&example);
        names::prefix(exact).map_err(|error| {
            format!(
                "{text:?} is no prefix that can be granted (it ends with a slash, with `/*` for all below it, or is empty; `{NAMESPACE}` stands for the namespace): {error}"
            )
        })?;
        Ok(Self(text))
    }
}

/// Whether a text matches a pattern, in which `*` stands for any characters or none. Takes time in
/// proportion to the product of both lengths at worst, and no memory.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(mut text) = text.strip_prefix(first) else {
        return false;
    };
    let (middle, last) = match rest.rsplit_once('*') {
        Some((middle, last)) => (Some(middle), last),
        None => (None, rest),
    };
    // The earliest place is always as good as a later one: what follows a `*` can be anything.
    for part in middle.into_iter().flat_map(|middle| middle.split('*')) {
        match text.split_once(part) {
            Some((_, after)) => text = after,
            None => return false,
        }
    }
    text.ends_with(last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WIDE: &str = r#"
rules:
  - namespaces: ["*"]
    formats: [Json]
    prefixes: ["/services/{namespace}/"]
  - namespaces: [shop, "team-*"]
    formats: [Plain, Grpc]
    prefixes: ["", "/teams/{namespace}/*"]
    services: ["{namespace}.*", web]
"#;

    #[test]
    fn rules_grant_what_all_of_their_lists_name() {
        let policy = Policy::parse(WIDE).unwrap();
        for (namespace, format, base, service, granted) in [
            ("shop", FormatType::Json, "/services/shop/", "any", true),
            ("shop", FormatType::Json, "/services/other/", "any", false),
            ("shop", FormatType::Json, "/services/shop/x/", "any", false),
            ("shop", FormatType::Plain, "", "web", true),
            ("shop", FormatType::Plain, "", "shop.rpc", true),
            ("shop", FormatType::Plain, "", "other.rpc", false),
            ("shop", FormatType::Plain, "/", "web", false),
            ("shop", FormatType::Grpc, "/teams/shop/", "web", true),
            ("shop", FormatType::Grpc, "/teams/shop/a/b/", "web", true),
            ("shop", FormatType::Grpc, "/teams/shop2/", "web", false),
            ("team-a", FormatType::Plain, "/teams/team-a/", "web", true),
            ("team-a", FormatType::Plain, "/teams/shop/", "web", false),
            ("team", FormatType::Plain, "", "web", false),
        ] {
            assert_eq!(
                policy.grants(namespace, format, base, service),
                granted,
                "{namespace} {format:?} {base:?} {service}"
            );
        }
        assert!(!Policy::parse("rules: []").unwrap().grants(
            "a",
            FormatType::Json,
            "/services/a/",
            "a"
        ));
    }

    #[test]
    fn the_default_is_each_namespace_below_its_own() {
        let policy = Policy::default();
        assert!(policy.grants("a", FormatType::Json, "/services/a/", "x"));
        assert!(!policy.grants("a", FormatType::Json, "/services/b/", "x"));
        assert!(!policy.grants("a", FormatType::Plain, "/services/a/", "x"));
        let written = r#"rules: [{namespaces: ["*"], formats: [Json], prefixes: ["/services/{namespace}/"]}]"#;
        assert_eq!(Policy::parse(written).unwrap(), policy);
    }

    #[test]
    fn of_mass_removals_the_first_entry_that_names_a_namespace_counts() {
        let yaml = r#"
rules: []
massRemovals:
  - namespaces: [shop]
    percent: 30
    holdSeconds: 300
  - namespaces: ["s*"]
    leastPods: 20
"#;
        let policy = Policy::parse(yaml).unwrap();
        for (namespace, percent, least_pods, hold_seconds) in
            [("shop", 30, 5, 300), ("sea", 50, 20, 0), ("team", 50, 5, 0)]
        {
            let expected = MassRemovals {
                percent,
                least_pods,
                hold_seconds,
            };
            assert_eq!(policy.mass_removals(namespace), expected, "{namespace}");
        }
    }

    #[test]
    fn a_malformed_file_is_reported_with_its_line_and_what_is_allowed() {
        for (yaml, fragments) in [
            ("", &["missing field `rules`"][..]),
            (
                "rulez: []",
                &["unknown field `rulez`, expected one of `rules`"],
            ),
            (
                "rules: []\nlimits: [{namespaces: [a], endpoint: 1}]",
                &[
                    "unknown field `endpoint`",
                    "`endpointsPerRegistration`",
                    "line 2",
                ],
            ),
            (
                "rules: []\nlimits: [{namespaces: [a], endpoints: -1}]",
                &["expected u32", "line 2"],
            ),
            (
                "rules: []\nmassRemovals: [{namespaces: [a], percent: 101}]",
                &["101 is no share in percent: 0 to 100", "line 2"],
            ),
            (
                "rules: []\nmassRemovals: [{namespaces: [a], holdSeconds: 86401}]",
                &["too long for a hold: at most 86400", "line 2"],
            ),
            (
                "rules: []\nlimits: [{endpoints: 1}]",
                &["missing field `namespaces`", "line 2"],
            ),
            (
                "rules:\n  - namespaces: [a]\n    formats: [Jsn]\n    prefixes: []",
                &["unknown variant `Jsn`", "`Json`, `Plain`, `Grpc`", "line 3"],
            ),
            (
                "rules:\n  - namespaces: [a]\n    formats: [Json]",
                &["missing field `prefixes`", "line 2"],
            ),
            (
                "rules:\n  - namespaces: [a]\n    formats: [Json]\n    prefix: [/a/]",
                &["unknown field `prefix`", "`prefixes`", "line 4"],
            ),
            (
                "rules:\n  - namespaces: [A]\n    formats: [Json]\n    prefixes: [/a/]",
                &["\"A\" is no pattern of a namespace", "line 2"],
            ),
            (
                "rules:\n  - namespaces: [\"{namespace}\"]\n    formats: [Json]\n    prefixes: [/a/]",
                &["no pattern of a namespace", "line 2"],
            ),
            (
                "rules:\n  - namespaces: [a]\n    formats: [Json]\n    prefixes: [/a]",
                &["\"/a\" is no prefix", "line 4"],
            ),
            (
                "rules:\n  - namespaces: [a]\n    formats: [Json]\n    prefixes: [\"/*/a/\"]",
                &["is no prefix", "line 4"],
            ),
            (
                "rules:\n  - namespaces: [a]\n    formats: [Json]\n    prefixes: [\"/{ns}/\"]",
                &["is no prefix", "line 4"],
            ),
            (
                "rules:\n  - namespaces: [a]\n    formats: [Json]\n    prefixes: [/a*]",
                &["is no prefix", "line 4"],
            ),
            (
                "rules:\n  - namespaces: [a]\n    formats: [Json]\n    prefixes: [/a/]\n    services: [a/b]",
                &["no pattern of a service", "line 5"],
            ),
            ("rules: [", &["line 2"]),
        ] {
            let message = Policy::parse(yaml).unwrap_err().to_string();
            for fragment in fragments {
                assert!(message.contains(fragment), "{yaml:?}: {message}");
            }
        }
    }

    #[test]
    fn any_prefix_can_be_granted() {
        let policy =
            Policy::parse("rules: [{namespaces: [a], formats: [Plain], prefixes: ['*']}]").unwrap();
        for base in ["", "/", "x/", "/services/b/"] {
            assert!(policy.grants("a", FormatType::Plain, base, "x"), "{base:?}");
        }
    }

    #[test]
    fn the_first_limits_that_name_a_namespace_count_and_what_they_leave_out_is_the_default() {
        let policy = Policy::parse(
            "rules: []\nlimits:\n- {namespaces: [shop], endpoints: 7}\n- {namespaces: ['s*', a], registrations: 1, endpointsPerRegistration: 2}",
        )
        .unwrap();
        let defaults = Policy::default().limits("any");
        let limits = |registrations, endpoints, endpoints_per_registration| Limits {
            registrations,
            endpoints,
            endpoints_per_registration,
        };
        assert_eq!(defaults, limits(500, 50_000, 20_000));
        assert_eq!(policy.limits("shop"), limits(500, 7, 20_000));
        assert_eq!(policy.limits("shops"), limits(1, 50_000, 2));
        assert_eq!(policy.limits("a"), limits(1, 50_000, 2));
        assert_eq!(policy.limits("b"), defaults);
    }

    /// The plain definition, exponential and obvious.
    fn slow_glob(pattern: &[u8], text: &[u8]) -> bool {
        match (pattern, text) {
            ([], _) => text.is_empty(),
            ([b'*', rest @ ..], _) => {
                slow_glob(rest, text)
                    || text
                        .split_first()
                        .is_some_and(|(_, t)| slow_glob(pattern, t))
            }
            ([p, rest @ ..], [t, more @ ..]) => p == t && slow_glob(rest, more),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn globs_are_what_they_are_defined_as(pattern in "[ab*]{0,7}", text in "[ab]{0,9}") {
            prop_assert_eq!(glob(&pattern, &text), slow_glob(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
