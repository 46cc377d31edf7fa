//! Template: key and value of one's own making, for what no other format writes.
//!
//! Takes templates of minijinja and endpoints, gives records, or says why there is none. Must never let a template
//! read anything but the endpoint, take more than a bounded time and memory, write a key outside of its scope, or
//! write a record that does not tell its own address: by that the operator knows what a key stands for.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value, context};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::{Discovered, Place, ReadError, Record, is_address, sky_dns};
use crate::model::endpoint::{Endpoint, Family, Protocol, Target};

/// The most instructions that a template may take; a usual one takes some twenty.
const FUEL: u64 = 10_000;
/// The most bytes of a key: the longest prefix, service and two names of pods.
const MAX_KEY: usize = 1_024;
/// The most bytes of a value, and of what a filter takes or gives: eight times the most metadata.
const MAX_VALUE: usize = 64 * 1_024;
/// The most characters of an expression or statement: what is nested deeper than these allow could take more
/// stack than there is.
const MAX_BLOCK: usize = 256;
/// What `urlencode` leaves as it is (RFC 3986, section 2.3).
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');
/// The statements that a template may have. None of them gives a name to a text of its own making, which could
/// be doubled again and again.
const STATEMENTS: [&str; 5] = ["if", "elif", "else", "endif", "endfor"];

/// What a registration says of its records.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The template of the key.
    pub key: String,
    /// The template of the value.
    pub value: String,
    /// The value has to be JSON.
    pub json: bool,
    /// The TTL of the leases in seconds.
    pub ttl: i64,
    /// The labels that are copied, sorted.
    pub labels: Vec<String>,
    /// The annotations that are copied, sorted.
    pub annotations: Vec<String>,
}

/// Templates that are ready to be filled in.
#[derive(Clone)]
pub struct Template {
    source: Arc<Source>,
    environment: Arc<Environment<'static>>,
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl PartialEq for Template {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Eq for Template {}

impl Hash for Template {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.source.hash(state);
    }
}

impl Template {
    /// Reads the templates.
    ///
    /// # Errors
    ///
    /// Says which can't be read, and what to write.
    pub fn new(source: Source) -> Result<Self, String> {
        let mut environment = Environment::empty();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_fuel(Some(FUEL));
        environment.add_filter("tojson", |value: Value| {
            bounded(serde_json::to_string(&value).unwrap_or_default())
        });
        environment.add_filter("urlencode", |text: String| {
            bounded(utf8_percent_encode(&text, ENCODED).to_string())
        });
        environment.add_filter("dns_label", |text: String| {
            sky_dns::label(&text.to_lowercase()).into_owned()
        });
        environment.add_filter("reverse_dns", |text: String| {
            let labels: Vec<&str> = text.rsplit('.').collect();
            labels.join("/")
        });
        environment.add_filter("sha256", |text: String| super::sha256(&text));
        environment.add_filter("lower", |text: String| bounded(text.to_lowercase()));
        for (name, template) in [("key", &source.key), ("value", &source.value)] {
            check_blocks(template)
                .and_then(|()| {
                    environment
                        .add_template_owned(name, template.clone())
                        .map_err(|error| said(&error))
                })
                .map_err(|why| format!("template.{name} can't be read: {why}"))?;
        }
        Ok(Self {
            source: Arc::new(source),
            environment: Arc::new(environment),
        })
    }

    /// The record of an endpoint.
    ///
    /// # Errors
    ///
    /// Says why there is none, and what to write.
    pub(super) fn record(&self, place: &Place<'_>, endpoint: &Endpoint) -> Result<Record, String> {
        let key = self.fill("key", MAX_KEY, endpoint)?;
        let value = self.fill("value", MAX_VALUE, endpoint)?;
        let scope = format!("{}{}/", place.prefix, endpoint.service);
        let Some(below) = key.strip_prefix(&scope) else {
            return Err(format!(
                "template.key gives {key:?}, which does not begin with prefix and service: begin it with {scope:?}"
            ));
        };
        let odd = |segment: &str| matches!(segment, "" | "." | "..");
        if below.split('/').any(odd) || below.chars().any(char::is_control) {
            return Err(format!(
                "template.key gives {key:?}: write no segment that is empty, `.` or `..`, and no control characters"
            ));
        }
        if self.source.json
            && let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(&value)
        {
            return Err(format!(
                "template.value gives no JSON ({error}): write texts with `|tojson`, for example `{{\"addr\":{{{{ addr|tojson }}}}}}`"
            ));
        }
        let socket = SocketAddr::new(endpoint.target.ip, endpoint.target.port);
        if find(below, &value) != Some(socket) {
            return Err(format!(
                "the record does not tell the address {socket}, by which it is known: write `{{{{ addr }}}}` into the last segment of template.key or into template.value, before any other address"
            ));
        }
        Ok(Record {
            key,
            value: value.into_bytes(),
            targets: vec![endpoint.target],
        })
    }

    fn fill(&self, name: &str, most: usize, endpoint: &Endpoint) -> Result<String, String> {
        let mut text = Bounded {
            bytes: Vec::new(),
            most,
        };
        let all: BTreeMap<String, String> = endpoint.metadata.iter().cloned().collect();
        let mut labels = all.clone();
        labels.retain(|name, _| self.source.labels.iter().any(|known| known == name));
        let mut annotations = all.clone();
        annotations.retain(|name, _| self.source.annotations.iter().any(|known| known == name));
        let values = context! {
            cluster => &endpoint.cluster,
            namespace => &endpoint.namespace,
            service => &endpoint.service,
            pod => &endpoint.pod,
            uid => &endpoint.uid,
            node => &endpoint.node,
            zone => &endpoint.zone,
            host => endpoint.target.ip.to_string(),
            addr => endpoint.target.host_port(),
            port => endpoint.target.port,
            port_name => &endpoint.port_name,
            protocol => endpoint.target.protocol.as_str(),
            scheme => &endpoint.scheme,
            family => Family::of(endpoint.target.ip).as_str(),
            weight => endpoint.weight,
            ttl => self.source.ttl,
            labels => labels,
            annotations => annotations,
            metadata => all,
        };
        self.environment
            .get_template(name)
            .and_then(|template| template.render_captured_to(values, &mut text))
            .map_err(|error| {
                if text.bytes.len() >= text.most {
                    format!("template.{name} gives more than {most} bytes")
                } else {
                    format!("template.{name} can't be filled in: {}", said(&error))
                }
            })?;
        String::from_utf8(text.bytes).map_err(|error| error.to_string())
    }

    /// Tries the templates with two pods on these ports and families.
    ///
    /// # Errors
    ///
    /// Says what can't be filled in, or which endpoints would have one key.
    pub fn check(
        &self,
        place: &Place<'_>,
        namespace: &str,
        service: &str,
        cluster: &str,
        ports: &[(&str, Option<u16>, Protocol, &str)],
        families: &[Family],
    ) -> Result<(), String> {
        let names = self.source.labels.iter().chain(&self.source.annotations);
        let mut seen: Vec<(String, Target)> = Vec::new();
        for pod in 0..2u8 {
            for (at, (port_name, number, protocol, scheme)) in (1u16..).zip(ports) {
                for family in families {
                    let ip: IpAddr = match family {
                        Family::V4 => [192, 0, 2, pod + 1].into(),
                        Family::V6 => [0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(pod) + 1].into(),
                    };
                    let endpoint = Endpoint {
                        target: Target {
                            ip,
                            port: number.unwrap_or(at),
                            protocol: *protocol,
                        },
                        port_name: (*port_name).to_owned(),
                        scheme: (*scheme).to_owned(),
                        cluster: cluster.to_owned(),
                        namespace: namespace.to_owned(),
                        service: service.to_owned(),
                        pod: format!("{service}-{pod}"),
                        uid: format!("0b9e1c1e-4a52-4f0a-9c0e-8f6f1e0d7c1{pod}"),
                        node: "node".into(),
                        zone: "zone".into(),
                        weight: 100,
                        metadata: names
                            .clone()
                            .map(|name| (name.clone(), "x".into()))
                            .collect(),
                    };
                    let record = self.record(place, &endpoint)?;
                    if let Some((_, other)) = seen.iter().find(|(key, _)| *key == record.key) {
                        return Err(format!(
                            "template.key gives {:?} for two endpoints, {other} and {}: write `{{{{ addr }}}}` into it, or what else tells pods, ports and families apart",
                            record.key, endpoint.target
                        ));
                    }
                    seen.push((record.key, endpoint.target));
                }
            }
        }
        Ok(())
    }
}

/// What minijinja says of a template, in one line.
fn said(error: &Error) -> String {
    let hint = match error.kind() {
        ErrorKind::UndefinedError => {
            "; labels and annotations have to be listed under `metadata` of the registration"
        }
        ErrorKind::OutOfFuel => "; write one that does less",
        _ => "",
    };
    let detail = error.detail().map(|detail| format!(": {detail}"));
    let line = error.line().map(|line| format!(" in line {line}"));
    format!(
        "{}{}{}{hint}",
        error.kind(),
        detail.unwrap_or_default(),
        line.unwrap_or_default()
    )
}

/// What a filter gives, if it is not too long: filters can be chained.
fn bounded(text: String) -> Result<String, Error> {
    if text.len() > MAX_VALUE {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "a filter gives too long a text",
        ));
    }
    Ok(text)
}

/// Whether a template has only short expressions and no statements but those that can't make ever longer texts.
fn check_blocks(template: &str) -> Result<(), String> {
    let mut rest = template;
    loop {
        let openings = ["{{", "{%", "{#"].into_iter();
        let Some((at, opening)) = openings
            .filter_map(|opening| Some((rest.find(opening)?, opening)))
            .min()
        else {
            return Ok(());
        };
        let after = rest.get(at + opening.len()..).unwrap_or_default();
        let closing = match opening {
            "{{" => "}}",
            "{%" => "%}",
            _ => "#}",
        };
        // A comment has no texts; one that does not end is minijinja's to refuse.
        let end = if opening == "{#" {
            after.find(closing)
        } else {
            end_of(after, closing)
        };
        let block = after.get(..end.unwrap_or(after.len())).unwrap_or_default();
        rest = after.get(block.len()..).unwrap_or_default();
        if opening == "{#" {
            continue;
        }
        if block.chars().count() > MAX_BLOCK {
            return Err(format!(
                "an expression has more than {MAX_BLOCK} characters: write several short ones"
            ));
        }
        if without_texts(block).contains('*') {
            return Err("templates don't multiply: write no `*`".to_owned());
        }
        if opening == "{%" {
            check_statement(block)?;
        }
    }
}

fn check_statement(block: &str) -> Result<(), String> {
    let statement = block.trim_matches(['-', '+']);
    let words: Vec<&str> = statement.split_whitespace().collect();
    let is_name = |word: &str| {
        word.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    let fine = match words.as_slice() {
        ["for", name, "in", list] => is_name(name) && is_name(list),
        [first, ..] => STATEMENTS.contains(first),
        [] => false,
    };
    if fine {
        return Ok(());
    }
    Err(format!(
        "the statement `{{%{block}%}}` is not one of templates: write `if`, or `for name in metadata`"
    ))
}

/// The characters of a block that are not within quotes, with their places.
fn outside_texts(block: &str) -> impl Iterator<Item = (usize, char)> {
    let mut quote = None;
    let mut escaped = false;
    block.char_indices().filter(move |(_, c)| match quote {
        None => {
            quote = Some(*c).filter(|c| matches!(c, '\'' | '"'));
            quote.is_none()
        }
        Some(_) if escaped => {
            escaped = false;
            false
        }
        Some(open) => {
            escaped = *c == '\\';
            if *c == open {
                quote = None;
            }
            false
        }
    })
}

fn without_texts(block: &str) -> String {
    outside_texts(block).map(|(_, c)| c).collect()
}

/// Where a block ends: not within brackets.
fn end_of(after: &str, closing: &str) -> Option<usize> {
    let mut open = 0usize;
    outside_texts(after)
        .find(|(at, c)| {
            if open == 0
                && after
                    .get(*at..)
                    .is_some_and(|rest| rest.starts_with(closing))
            {
                return true;
            }
            match c {
                '(' | '[' | '{' => open += 1,
                ')' | ']' | '}' => open = open.saturating_sub(1),
                _ => {}
            }
            false
        })
        .map(|(at, _)| at)
}

/// Takes so many bytes and no more.
struct Bounded {
    bytes: Vec<u8>,
    most: usize,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.most {
            self.bytes.resize(self.most, b' ');
            return Err(io::Error::other("too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The address that a record tells: the first `host:port` in the last segment of its key, else in its value; else
/// the first address in its value with the number that follows the word `port`.
fn find(below: &str, value: &str) -> Option<SocketAddr> {
    let last = below.rsplit('/').next().unwrap_or_default();
    in_text(last)
        .or_else(|| in_text(value))
        .or_else(|| Some(SocketAddr::new(words(value).find_map(ip)?, port_in(value)?)))
}

/// What may be an address, with or without its port.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_ascii_hexdigit() || matches!(c, ':' | '.' | '[' | ']')))
}

fn ip(word: &str) -> Option<IpAddr> {
    let trimmed = || word.trim_matches([':', '.']).parse();
    word.parse().or_else(|_| trimmed()).ok()
}

fn in_text(text: &str) -> Option<SocketAddr> {
    words(text).find_map(|word| word.trim_matches([':', '.']).parse().ok())
}

fn port_in(value: &str) -> Option<u16> {
    let lower = value.to_ascii_lowercase();
    lower.match_indices("port").find_map(|(at, word)| {
        let rest = lower.get(at + word.len()..)?;
        let rest = rest.trim_start_matches(['"', '\'', ':', '=', ' ']);
        let digits = rest
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len());
        rest.get(..digits)?.parse().ok().filter(|port| *port > 0)
    })
}

/// What a record tells, whichever template it was made from: its address, where key or value hold one, and else
/// the value as it is.
pub(super) fn read(below: &str, value: &[u8]) -> Result<Discovered, ReadError> {
    let Some((service, rest)) = below.split_once('/') else {
        return Err(ReadError::KeyShape("{prefix}{service}/..."));
    };
    let value = std::str::from_utf8(value).map_err(|_| ReadError::Value("text".to_owned()))?;
    if service.is_empty() || rest.is_empty() {
        return Err(ReadError::KeyShape("{prefix}{service}/..."));
    }
    let socket = find(rest, value);
    let address = match socket {
        Some(socket) => socket.to_string(),
        None if is_address(value) => value.to_owned(),
        None => return Err(ReadError::Value("one with an address".to_owned())),
    };
    Ok(Discovered {
        socket,
        address,
        service: service.to_owned(),
        ..Discovered::default()
    })
}
