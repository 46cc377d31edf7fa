//! A ServiceRegistration and the policy --> an accepted registration, or why not; pure.
//!
//! Takes a spec as the API server holds it, gives a form of it that the rest of the operator can
//! rely on. Must never rely on what the API server has checked: an object can be older than the
//! rules of the definition. Must never accept a registration whose records could stand among the
//! operator's own keys, or where the policy does not let them.

pub mod policy;

use std::collections::BTreeSet;

use crate::api::reason;
use crate::api::{
    Address, AddressFamily, FormatType, MAX_KEY_TEMPLATE, MAX_LABEL_KEY, MAX_LEASE_TTL_SECONDS,
    MAX_METADATA, MAX_METADATA_CHARS, MAX_PORTS, MAX_STATIC_VALUE, MAX_VALUE_TEMPLATE, MAX_WEIGHT,
    MIN_LEASE_TTL_SECONDS, MetadataSpec, Port, PortProtocol, ServiceRegistrationSpec, ValueType,
};
use crate::format::sky_dns::SkyDns;
use crate::format::template::Template;
use crate::format::traefik::Kind;
use crate::format::{Format, Place, apisix, kratos, sky_dns, template};
use crate::model::endpoint::{Family, Protocol};
use crate::model::names;
use crate::model::selector::Selector;

use policy::Policy;

/// What the operator was started with, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcceptSettings {
    /// `--cluster-name`; a DNS label.
    pub cluster_name: String,
    /// `--registrar-prefix`: where the operator's own keys stand.
    pub registrar_prefix: String,
}

/// Whose address is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AddressKind {
    /// The pod's.
    Pod,
    /// Its node's, with the hostPort of the port.
    Host,
}

/// A port of an accepted registration.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AcceptedPort {
    /// Its name in the registry, and that of the container port where there is no number.
    pub name: String,
    /// Its number; `None`: that of the container port of this name.
    pub number: Option<u16>,
    /// The protocol.
    pub protocol: Protocol,
    /// The scheme for formats that write URLs; empty when none is named.
    pub scheme: String,
}

/// A registration that is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The service's name in the registry.
    pub service: String,
    /// The pods.
    pub selector: Selector,
    /// The ports, in the order of the spec; names are unique.
    pub ports: Vec<AcceptedPort>,
    /// The families to register; empty: the pod's primary one.
    pub families: Vec<Family>,
    /// Whose address.
    pub address: AddressKind,
    /// How endpoints are written.
    pub format: Format,
    /// The prefix of the keys; empty or ending with a slash.
    pub prefix: String,
    /// The narrowest prefix that holds the records of this service of all clusters.
    pub scope: String,
    /// The TTL of the leases in seconds.
    pub ttl: i64,
    /// The weight, 1 to 65535.
    pub weight: u32,
    /// The labels of the pod to copy, sorted.
    pub labels: Vec<String>,
    /// The annotations of the pod to copy, sorted.
    pub annotations: Vec<String>,
    /// What is the same for every endpoint, sorted by name.
    pub statics: Vec<(String, String)>,
    /// Pods that are not ready count, too.
    pub publish_not_ready: bool,
    /// What is registered stays, and nothing changes.
    pub suspend: bool,
}

/// Why a registration is not served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// A reason of the condition `Accepted`, of [`crate::api::reason`].
    pub reason: &'static str,
    /// What to write instead, or which rule would allow it.
    pub message: String,
}

fn invalid(message: impl ToString) -> Refusal {
    Refusal {
        reason: reason::INVALID,
        message: message.to_string(),
    }
}

/// The format of a spec with its settings, checked against its ports.
fn format_of(spec: &ServiceRegistrationSpec, ports: &[AcceptedPort]) -> Result<Format, Refusal> {
    let (metadata, lease_ttl) = (&spec.metadata, spec.lease_ttl_seconds);
    let spec = &spec.format;
    if spec.sky_dns.is_some() && spec.type_ != FormatType::SkyDns {
        return Err(invalid(
            "skyDns has the settings of the format SkyDns alone: leave it out, or write `type: SkyDns`",
        ));
    }
    if spec.template.is_some() && spec.type_ != FormatType::Template {
        return Err(invalid(
            "template has the settings of the format Template alone: leave it out, or write `type: Template`",
        ));
    }
    Ok(match spec.type_ {
        FormatType::Json => Format::Json,
        FormatType::Plain => Format::Plain,
        FormatType::Grpc => Format::Grpc,
        FormatType::Kitex => Format::Kitex,
        FormatType::Hertz => Format::Hertz,
        FormatType::GoMicro => Format::GoMicro,
        FormatType::Kratos => {
            for (at, port) in ports.iter().enumerate() {
                let earlier = ports.iter().take(at).find(|p| p.scheme == port.scheme);
                if earlier.is_some() || !kratos::SCHEMES.contains(&&*port.scheme) {
                    return Err(invalid(format!(
                        "Kratos uses the first endpoint of each scheme, and port {} has the scheme {:?}: write one of its own for each port, `http`, `https`, `grpc` or `grpcs`, and register a second port of one scheme under a service of its own",
                        port.name, port.scheme
                    )));
                }
            }
            Format::Kratos
        }
        FormatType::Traefik => {
            let mut kinds = ports.iter().map(|p| Kind::of(p.protocol, &p.scheme));
            let first = kinds.next().flatten();
            match first {
                Some(kind) if kinds.all(|kind| kind == first) => Format::Traefik(kind),
                _ => {
                    return Err(invalid(
                        "the ports of a registration for Traefik are all of one kind: TCP with the scheme `http`, `https` or `h2c` for HTTP services, or all TCP, or all UDP, without a scheme; register others in a ServiceRegistration of their own",
                    ));
                }
            }
        }
        FormatType::Apisix => {
            for port in ports {
                let udp = port.scheme == "udp";
                let fits = match port.protocol {
                    Protocol::Tcp => !udp,
                    Protocol::Udp => udp,
                    Protocol::Sctp => false,
                };
                if !(fits && apisix::SCHEMES.contains(&&*port.scheme)) {
                    return Err(invalid(format!(
                        "port {} is {} and has the scheme {:?}: for APISIX write TCP and `http`, `https`, `grpc`, `grpcs`, `tcp` or `tls`, or UDP and `udp`",
                        port.name,
                        port.protocol.as_str(),
                        port.scheme
                    )));
                }
            }
            Format::Apisix
        }
        FormatType::Template => {
            let Some(settings) = &spec.template else {
                return Err(invalid(
                    "format Template needs templates: write for example `template: {key: 'web/{{ addr }}', value: '{{ addr }}'}`",
                ));
            };
            for (name, text, most) in [
                ("key", &settings.key, MAX_KEY_TEMPLATE),
                ("value", &settings.value, MAX_VALUE_TEMPLATE),
            ] {
                let length = text.chars().count();
                if length == 0 || length > most {
                    return Err(invalid(format!(
                        "template.{name} has {length} characters: write 1 to {most}"
                    )));
                }
            }
            let template = Template::new(template::Source {
                key: settings.key.clone(),
                value: settings.value.clone(),
                json: settings.value_type == ValueType::Json,
                ttl: lease_ttl.into(),
                labels: sorted(&metadata.labels),
                annotations: sorted(&metadata.annotations),
            });
            Format::Template(Some(template.map_err(invalid)?))
        }
        FormatType::SkyDns => {
            let Some(settings) = &spec.sky_dns else {
                return Err(invalid(
                    "format SkyDns needs the zone that CoreDNS serves: write for example `skyDns: {zone: skydns.local}`",
                ));
            };
            Format::SkyDns(SkyDns {
                ttl: within("skyDns.ttl", settings.ttl, 1, MAX_LEASE_TTL_SECONDS)?,
            })
        }
    })
}

/// The prefix of a spec, checked against its format.
fn prefix_of(spec: &ServiceRegistrationSpec, format: &Format) -> Result<String, Refusal> {
    let prefix = match (&spec.prefix, &spec.format.sky_dns) {
        (Some(_), Some(_)) => {
            return Err(invalid(
                "the prefix of format SkyDns is made from its path and zone: leave `prefix` out",
            ));
        }
        (None, Some(settings)) => {
            let path = &settings.path;
            if names::service(path).is_err() || path.contains('.') {
                return Err(invalid(format!(
                    "the path {path:?} can't be used: write one segment of letters, digits, `_` and `-`, beginning and ending with a letter or digit, for example `skydns`"
                )));
            }
            sky_dns::prefix(path, &settings.zone)
        }
        (Some(prefix), None) => prefix.clone(),
        (None, None) => format.default_prefix().to_owned(),
    };
    names::prefix(&prefix).map_err(invalid)?;
    format.check_prefix(&prefix).map_err(invalid)?;
    Ok(prefix)
}

/// The inverse of [`format_of`].
fn type_of(format: &Format) -> FormatType {
    match format {
        Format::Json => FormatType::Json,
        Format::Plain => FormatType::Plain,
        Format::Grpc => FormatType::Grpc,
        Format::Kitex => FormatType::Kitex,
        Format::Hertz => FormatType::Hertz,
        Format::Kratos => FormatType::Kratos,
        Format::SkyDns(_) => FormatType::SkyDns,
        Format::GoMicro => FormatType::GoMicro,
        Format::Traefik(_) => FormatType::Traefik,
        Format::Apisix => FormatType::Apisix,
        Format::Template(_) => FormatType::Template,
    }
}

/// Whether the policy lets a namespace have records of this format, prefix and service: of a
/// registration that is not accepted any more, too.
#[must_use]
pub fn still_granted(
    policy: &Policy,
    namespace: &str,
    format: &Format,
    prefix: &str,
    service: &str,
) -> bool {
    let base = format.base(prefix, namespace);
    policy.grants(namespace, type_of(format), &base, service)
}

/// Checks a spec against the rules of the API, of its format, and of the policy.
///
/// # Errors
///
/// The first rule that it breaks.
pub fn accept(
    namespace: &str,
    name: &str,
    spec: &ServiceRegistrationSpec,
    policy: &Policy,
    settings: &AcceptSettings,
) -> Result<Accepted, Refusal> {
    names::cluster(&settings.cluster_name).map_err(invalid)?;
    names::namespace(namespace).map_err(invalid)?;
    let service = spec.service.as_deref().unwrap_or(name);
    names::service(service).map_err(invalid)?;
    let selector = Selector::parse(&spec.selector).map_err(invalid)?;
    let ports = ports(&spec.ports)?;
    let format = format_of(spec, &ports)?;
    numbers(&ports, &format)?;
    if let Some(dns) = &spec.format.sky_dns {
        let ports = ports.iter().map(|port| &*port.name);
        let cluster = &settings.cluster_name;
        sky_dns::check(&dns.zone, namespace, service, cluster, ports).map_err(invalid)?;
    }
    if format.is_aggregate() && settings.cluster_name.len() > apisix::MAX_CLUSTER {
        return Err(invalid(format!(
            "the ids of APISIX have no room for the cluster's name {:?}: start the operator with a --cluster-name of at most {} characters, or write another format",
            settings.cluster_name,
            apisix::MAX_CLUSTER
        )));
    }
    let prefix = &*prefix_of(spec, &format)?;
    let ttl = within(
        "leaseTTLSeconds",
        spec.lease_ttl_seconds,
        MIN_LEASE_TTL_SECONDS,
        MAX_LEASE_TTL_SECONDS,
    )?;
    let weight = within("weight", spec.weight, 1, MAX_WEIGHT)?;
    metadata(&spec.metadata)?;
    let families = families(spec);
    if let Format::Template(Some(template)) = &format {
        let ports: Vec<_> = ports
            .iter()
            .map(|port| (&*port.name, port.number, port.protocol, &*port.scheme))
            .collect();
        let families = match families.as_slice() {
            [] => &[Family::V4][..],
            wanted => wanted,
        };
        let cluster = &settings.cluster_name;
        template
            .check(
                &Place { prefix },
                namespace,
                service,
                cluster,
                &ports,
                families,
            )
            .map_err(invalid)?;
    }

    let scope = format.scope_in(prefix, &settings.cluster_name, namespace, service);
    if meets(&scope, &settings.registrar_prefix) {
        return Err(Refusal {
            reason: reason::RESERVED_PREFIX,
            message: format!(
                "the records would stand below {scope:?}, but {:?} is for the operator's own keys: write another prefix or service",
                settings.registrar_prefix
            ),
        });
    }
    let base = format.base(prefix, namespace);
    if !policy.grants(namespace, spec.format.type_, &base, service) {
        return Err(not_granted(
            namespace,
            spec.format.type_,
            &base,
            service,
            policy,
        ));
    }

    Ok(Accepted {
        service: service.to_owned(),
        selector,
        ports,
        families,
        address: match spec.address {
            Address::Pod => AddressKind::Pod,
            Address::Host => AddressKind::Host,
        },
        format,
        prefix: prefix.to_owned(),
        scope,
        ttl: i64::from(ttl),
        weight,
        labels: sorted(&spec.metadata.labels),
        annotations: sorted(&spec.metadata.annotations),
        statics: spec.metadata.statics.clone().into_iter().collect(),
        publish_not_ready: spec.publish_not_ready,
        suspend: spec.suspend,
    })
}

/// The families of a spec, each once.
fn families(spec: &ServiceRegistrationSpec) -> Vec<Family> {
    let mut families = Vec::new();
    for family in &spec.address_families {
        let family = match family {
            AddressFamily::IPv4 => Family::V4,
            AddressFamily::IPv6 => Family::V6,
        };
        if !families.contains(&family) {
            families.push(family);
        }
    }
    families
}

/// Whether keys below one of two prefixes can stand below the other. Both ways: keys of the
/// operator below a scope would be taken for records.
fn meets(scope: &str, registrar_prefix: &str) -> bool {
    // `/registrar` is meant as `/registrar/`; without it, `/registrar2/` would be reserved, too.
    let trimmed = registrar_prefix.trim_end_matches('/');
    let below = |text: &str, prefix: &str| {
        text.strip_prefix(prefix)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    // That of Traefik ends within a segment.
    scope.ends_with('.') && trimmed.starts_with(scope)
        || below(scope.trim_end_matches('/'), trimmed)
        || below(trimmed, scope.trim_end_matches('/'))
}

fn within(name: &str, value: i32, least: i32, most: i32) -> Result<u32, Refusal> {
    match u32::try_from(value) {
        Ok(number) if (least..=most).contains(&value) => Ok(number),
        _ => Err(invalid(format!(
            "{name} is {value}: write {least} to {most}"
        ))),
    }
}

fn sorted(names: &[String]) -> Vec<String> {
    names
        .iter()
        .cloned()
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect()
}

fn ports(ports: &[Port]) -> Result<Vec<AcceptedPort>, Refusal> {
    if ports.is_empty() || ports.len() > MAX_PORTS {
        return Err(invalid(format!(
            "ports has {} entries: write 1 to {MAX_PORTS}",
            ports.len()
        )));
    }
    let mut accepted: Vec<AcceptedPort> = Vec::with_capacity(ports.len());
    for port in ports {
        names::port(&port.name).map_err(invalid)?;
        let scheme = match &port.scheme {
            Some(scheme) => {
                names::scheme(scheme).map_err(invalid)?;
                scheme.clone()
            }
            None => String::new(),
        };
        let number = match port.port {
            Some(number) => Some(
                u16::try_from(number)
                    .ok()
                    .filter(|number| *number > 0)
                    .ok_or_else(|| {
                        invalid(format!(
                            "port {} has the number {number}: write 1 to 65535",
                            port.name
                        ))
                    })?,
            ),
            None => None,
        };
        for earlier in &accepted {
            if earlier.name == port.name {
                return Err(invalid(format!(
                    "two ports have the name {}: give each a name of its own",
                    port.name
                )));
            }
        }
        accepted.push(AcceptedPort {
            name: port.name.clone(),
            number,
            protocol: match port.protocol {
                PortProtocol::Tcp => Protocol::Tcp,
                PortProtocol::Udp => Protocol::Udp,
                PortProtocol::Sctp => Protocol::Sctp,
            },
            scheme,
        });
    }
    Ok(accepted)
}

/// Two ports with one number, where a key would not tell them apart.
fn numbers(ports: &[AcceptedPort], format: &Format) -> Result<(), Refusal> {
    if format.key_names_port() {
        return Ok(());
    }
    for (at, port) in ports.iter().enumerate() {
        let earlier = ports
            .iter()
            .take(at)
            .find(|earlier| port.number.is_some() && earlier.number == port.number);
        if let Some(earlier) = earlier {
            return Err(invalid(format!(
                "the ports {} and {} have one number, but a key of format {} holds no more than address and number: register each of them under a service of its own",
                earlier.name,
                port.name,
                format.name()
            )));
        }
    }
    Ok(())
}

fn metadata(metadata: &MetadataSpec) -> Result<(), Refusal> {
    for (what, count) in [
        ("labels", metadata.labels.len()),
        ("annotations", metadata.annotations.len()),
        ("static", metadata.statics.len()),
    ] {
        if count > MAX_METADATA {
            return Err(invalid(format!(
                "metadata.{what} has {count} entries: write at most {MAX_METADATA}"
            )));
        }
    }
    for name in metadata.labels.iter().chain(&metadata.annotations) {
        names::label_key(name).map_err(invalid)?;
    }
    for (name, value) in &metadata.statics {
        let length = name.chars().count();
        if length == 0 || length > MAX_LABEL_KEY || name.chars().any(char::is_control) {
            return Err(invalid(format!(
                "a name in metadata.static has {length} characters or a control character: write 1 to {MAX_LABEL_KEY} printable ones"
            )));
        }
        if value.chars().count() > MAX_STATIC_VALUE {
            return Err(invalid(format!(
                "the value of {name:?} in metadata.static is too long: write at most {MAX_STATIC_VALUE} characters"
            )));
        }
    }
    let chars: usize = metadata
        .statics
        .iter()
        .map(|(name, value)| name.chars().count() + value.chars().count())
        .sum();
    if chars > MAX_METADATA_CHARS {
        return Err(invalid(format!(
            "the names and values in metadata.static have {chars} characters together: write at most {MAX_METADATA_CHARS}"
        )));
    }
    // A record has one value for a name; which one would be chance.
    let mut labels = metadata.labels.iter();
    let mut annotations = metadata.annotations.iter();
    let twice = labels
        .find(|name| metadata.annotations.contains(name) || metadata.statics.contains_key(*name))
        .or_else(|| annotations.find(|name| metadata.statics.contains_key(*name)));
    match twice {
        Some(name) => Err(invalid(format!(
            "the name {name:?} stands in two of metadata.labels, metadata.annotations and metadata.static: write it in one of them"
        ))),
        None => Ok(()),
    }
}

/// How many rules a message repeats.
const SHOWN_RULES: usize = 3;

fn not_granted(
    namespace: &str,
    format: FormatType,
    base: &str,
    service: &str,
    policy: &Policy,
) -> Refusal {
    let granted: Vec<String> = policy
        .granted(namespace, format)
        .take(SHOWN_RULES)
        .map(|(prefixes, services)| format!("prefixes {prefixes} with services {services}"))
        .collect();
    let granted = if granted.is_empty() {
        "nothing".to_owned()
    } else {
        granted.join("; ")
    };
    // Debug quotes as YAML does: a service can be named `true` or `1.0`, a prefix can be empty.
    Refusal {
        reason: reason::NOT_GRANTED,
        message: format!(
            "the policy does not let namespace {namespace} write {format:?} records below {base:?} for the service {service:?}; \
             what it grants for this format: {granted}. An administrator can allow it with this rule in the policy file:\n\
             rules:\n- namespaces: [{namespace:?}]\n  formats: [{format:?}]\n  prefixes: [{base:?}]\n  services: [{service:?}]"
        ),
    }
}

#[cfg(test)]
mod tests;
