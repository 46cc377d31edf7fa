//! Names that become parts of keys: what they may hold, and what to write instead.
//!
//! Takes a text, gives `Ok` or a message for a person. Must never accept a text that would let a
//! key leave its prefix: no `/` in a name, no segment that is empty, `.` or `..`, no control
//! characters.

/// The most characters of a DNS label (RFC 1123).
pub const MAX_DNS_LABEL: usize = 63;
/// The most characters of a DNS subdomain as Kubernetes counts them.
pub const MAX_DNS_SUBDOMAIN: usize = 253;
/// The most characters of a prefix.
pub const MAX_PREFIX: usize = 256;
/// The most characters of a service's name: those of a DNS subdomain.
pub const MAX_SERVICE: usize = 253;
/// The most characters of a URL scheme.
pub const MAX_SCHEME: usize = 32;

/// How much of a wrong name a message repeats, in characters.
const SHOWN: usize = 80;

/// A name that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} {} can't be used: {rule}", shown(.name))]
pub struct NameError {
    /// What the name is of, e.g. "the service name".
    pub what: &'static str,
    /// The name as it was written.
    pub name: String,
    /// What to write.
    pub rule: &'static str,
}

/// The name in quotes, control characters escaped and too long ones cut.
fn shown(name: &str) -> String {
    if name.chars().nth(SHOWN).is_none() {
        return format!("{name:?}");
    }
    let cut: String = name.chars().take(SHOWN).collect();
    format!("{cut:?}... ({} characters)", name.chars().count())
}

/// A text that anybody may have written, cut to at most so many characters: what a status or message
/// repeats must not grow with it.
#[must_use]
pub fn shortened(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        None => text.to_owned(),
        Some(_) => {
            let cut: String = text.chars().take(most.saturating_sub(3)).collect();
            format!("{cut}...")
        }
    }
}

fn check(holds: bool, what: &'static str, name: &str, rule: &'static str) -> Result<(), NameError> {
    if holds {
        return Ok(());
    }
    Err(NameError {
        what,
        name: name.to_owned(),
        rule,
    })
}

const DNS_LABEL_RULE: &str = "write a DNS label: lower-case letters, digits and `-`, beginning and ending with a letter or digit, at most 63 characters";

/// Begins and ends with what `edge` takes, and holds only that and what `inner` takes.
fn edged(name: &str, edge: impl Fn(u8) -> bool, inner: &[u8]) -> bool {
    match name.as_bytes() {
        [] => false,
        bytes @ [first, .., last] => {
            edge(*first) && edge(*last) && bytes.iter().all(|b| edge(*b) || inner.contains(b))
        }
        [only] => edge(*only),
    }
}

fn lower(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

/// Whether this is a DNS label.
#[must_use]
pub fn is_dns_label(name: &str) -> bool {
    name.len() <= MAX_DNS_LABEL && edged(name, lower, b"-")
}

/// The name of a cluster: a DNS label.
///
/// # Errors
///
/// When it is none.
pub fn cluster(name: &str) -> Result<(), NameError> {
    check(is_dns_label(name), "the cluster name", name, DNS_LABEL_RULE)
}

/// The name of a namespace: a DNS label.
///
/// # Errors
///
/// When it is none.
pub fn namespace(name: &str) -> Result<(), NameError> {
    check(is_dns_label(name), "the namespace", name, DNS_LABEL_RULE)
}

/// The name of a port: a DNS label.
///
/// # Errors
///
/// When it is none.
pub fn port(name: &str) -> Result<(), NameError> {
    check(is_dns_label(name), "the port name", name, DNS_LABEL_RULE)
}

/// The name of a pod, or of what is registered in a pod's place: a DNS subdomain.
///
/// # Errors
///
/// When it is none.
pub fn pod(name: &str) -> Result<(), NameError> {
    check(
        name.len() <= MAX_DNS_SUBDOMAIN && edged(name, lower, b"-.") && !name.contains(".."),
        "the name",
        name,
        "write a DNS subdomain: lower-case letters, digits, `-` and `.`, beginning and ending with a letter or digit, at most 253 characters",
    )
}

/// The name of a service in the registry: one segment of a key. Upper case, `_` and `.` are in use
/// there (`user.rpc`, `helloworld.Greeter`).
///
/// # Errors
///
/// When it is none.
pub fn service(name: &str) -> Result<(), NameError> {
    check(
        name.len() <= MAX_SERVICE
            && edged(name, |b| b.is_ascii_alphanumeric(), b"._-")
            && !name.contains(".."),
        "the service name",
        name,
        "write letters, digits, `.`, `_` and `-`, beginning and ending with a letter or digit, without `/` and `..`, at most 253 characters",
    )
}

/// The prefix of keys: empty, or ending with a slash. Whether it may be empty or begin with a slash
/// is the format's to say.
///
/// # Errors
///
/// When a key below it could be misread or be taken for one of another prefix.
pub fn prefix(name: &str) -> Result<(), NameError> {
    const WHAT: &str = "the prefix";
    check(
        name.is_empty() || name.ends_with('/'),
        WHAT,
        name,
        "end it with a slash, for example `/services/`",
    )?;
    check(
        name.chars().count() <= MAX_PREFIX,
        WHAT,
        name,
        "write at most 256 characters",
    )?;
    check(
        !name.contains("//"),
        WHAT,
        name,
        "write one slash instead of two: no segment may be empty",
    )?;
    check(
        !name.split('/').any(|segment| matches!(segment, "." | "..")),
        WHAT,
        name,
        "write the whole path: no segment may be `.` or `..`",
    )?;
    check(
        !name.chars().any(char::is_control),
        WHAT,
        name,
        "leave out the control characters",
    )?;
    check(
        !name.contains(['*', '{', '}']),
        WHAT,
        name,
        "write the namespace or path itself: `*`, `{` and `}` are for the policy",
    )
}

/// The name of a label or annotation, as Kubernetes checks it.
///
/// # Errors
///
/// When it is none.
pub fn label_key(name: &str) -> Result<(), NameError> {
    let (domain, local) = match name.split_once('/') {
        Some((domain, local)) => (Some(domain), local),
        None => (None, name),
    };
    let domain_holds = domain.is_none_or(|domain| {
        domain.len() <= MAX_DNS_SUBDOMAIN
            && domain.split('.').all(|label| edged(label, lower, b"-"))
    });
    check(
        domain_holds
            && local.len() <= MAX_DNS_LABEL
            && edged(local, |b| b.is_ascii_alphanumeric(), b"-_."),
        "the label name",
        name,
        "write it as Kubernetes does, for example `version` or `app.kubernetes.io/version`",
    )
}

/// The value of a label, as Kubernetes checks it; it may be empty.
///
/// # Errors
///
/// When it is none.
pub fn label_value(value: &str) -> Result<(), NameError> {
    check(
        value.is_empty()
            || value.len() <= MAX_DNS_LABEL && edged(value, |b| b.is_ascii_alphanumeric(), b"-_."),
        "the label value",
        value,
        "write letters, digits, `-`, `_` and `.`, beginning and ending with a letter or digit, at most 63 characters",
    )
}

/// The scheme of a URL in lower case (RFC 3986, section 3.1).
///
/// # Errors
///
/// When it is none.
pub fn scheme(name: &str) -> Result<(), NameError> {
    let bytes = name.as_bytes();
    check(
        bytes.len() <= MAX_SCHEME
            && bytes.first().is_some_and(u8::is_ascii_lowercase)
            && bytes.iter().all(|b| lower(*b) || b"+.-".contains(b)),
        "the scheme",
        name,
        "write that of a URL in lower case, without `://`, for example `http`, at most 32 characters",
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_that_would_leave_their_place_are_refused() {
        for name in [
            "", ".", "..", "a/b", "a/", "/a", "a\0", "a\n", "a..b", ".a", "a.", "-a", "a-", "_a",
            "ä", "a b", "a%2f", "a\\b", "a*", "{a}",
        ] {
            assert!(service(name).is_err(), "{name:?}");
        }
        for name in ["web", "web.rpc", "helloworld.Greeter", "a", "a_b-c", "0"] {
            service(name).unwrap();
        }
        assert!(service(&"a".repeat(253)).is_ok());
        assert!(service(&"a".repeat(254)).is_err());
        for name in ["", "A", "a.b", "a_b", "-a", "a-", "a/b", "a\n", "é"] {
            assert!(cluster(name).is_err(), "{name:?}");
            assert!(namespace(name).is_err(), "{name:?}");
            assert!(port(name).is_err(), "{name:?}");
        }
        assert!(cluster(&"a".repeat(63)).is_ok());
        assert!(cluster(&"a".repeat(64)).is_err());
    }

    #[test]
    fn prefixes() {
        for name in ["", "/", "/services/", "services/", "a.b/...c/", "/ü/"] {
            prefix(name).unwrap();
        }
        for name in [
            "/services",
            "//",
            "/a//b/",
            "./",
            "../",
            "/./",
            "/../",
            "/a/../",
            "a\n/",
            "/\0/",
            "\u{85}/",
            "/*/",
            "/{namespace}/",
        ] {
            assert!(prefix(name).is_err(), "{name:?}");
        }
        assert!(prefix(&format!("{}/", "ü".repeat(255))).is_ok());
        assert!(prefix(&format!("{}/", "ü".repeat(256))).is_err());
    }

    #[test]
    fn labels() {
        for name in ["a", "version", "app.kubernetes.io/version", "A_b.c"] {
            label_key(name).unwrap();
        }
        for name in ["", "/a", "a/", "a/b/c", "A.io/x", "a..b/x", "-a", "a\n"] {
            assert!(label_key(name).is_err(), "{name:?}");
        }
        for value in ["", "a", "A_b.c-d"] {
            label_value(value).unwrap();
        }
        for value in ["-", "a b", "a/", "\n"] {
            assert!(label_value(value).is_err(), "{value:?}");
        }
    }

    #[test]
    fn what_others_wrote_is_cut() {
        assert_eq!(shortened("web", 5), "web");
        assert_eq!(shortened("öäüöä", 5), "öäüöä");
        assert_eq!(shortened("öäüöäü", 5), "öä...");
    }

    #[test]
    fn a_message_says_what_to_write_and_stays_short_and_printable() {
        let message = service("a/b\n").unwrap_err().to_string();
        assert_eq!(
            message,
            "the service name \"a/b\\n\" can't be used: write letters, digits, `.`, `_` and `-`, \
             beginning and ending with a letter or digit, without `/` and `..`, at most 253 characters"
        );
        let message = service(&"/".repeat(100_000)).unwrap_err().to_string();
        assert!(message.len() < 400, "{message}");
    }

    proptest! {
        /// Whatever is accepted stays one whole segment below its prefix.
        #[test]
        fn no_accepted_name_lets_a_key_leave_its_prefix(
            p in "([a-z./\n*]|\\PC){0,12}", n in "([a-zA-Z0-9./_\0-]|\\PC){0,12}",
        ) {
            if prefix(&p).is_err() || service(&n).is_err() {
                return Ok(());
            }
            let key = format!("{p}{n}/x");
            let below = key.strip_prefix(&p).unwrap();
            prop_assert_eq!(below.split('/').collect::<Vec<_>>(), vec![n.as_str(), "x"]);
            // The leading slash is part of a format and the one place where nothing may stand.
            let path = key.strip_prefix('/').unwrap_or(&key);
            for segment in path.split('/') {
                prop_assert!(!segment.is_empty() && segment != "." && segment != "..");
            }
            prop_assert!(!key.chars().any(char::is_control));
        }

        /// Two pairs of names never share a key or stand below one another.
        #[test]
        fn names_that_differ_have_keys_that_differ(a in "[a-z.]{1,4}", b in "[a-z.]{1,4}") {
            if service(&a).is_ok() && service(&b).is_ok() && a != b {
                let (a, b) = (format!("/s/{a}/"), format!("/s/{b}/"));
                prop_assert!(!a.starts_with(&b) && !b.starts_with(&a));
            }
        }
    }
}
