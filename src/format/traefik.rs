//! Traefik: `{prefix}{http|tcp|udp}/services/{namespace}.{service}.{port}/loadbalancer/servers/{number}/...` -> the
//! members of one server, a key each.
//!
//! Takes and gives what the KV provider of Traefik 3 reads. Must never write another member, which would make it
//! drop its whole update, nor a server whose members stand on different leases.

use std::net::SocketAddr;

use sha2::{Digest, Sha256};

use super::{Discovered, Place, ReadError, Record, is_address, known};
use crate::model::endpoint::{Endpoint, Protocol, Target};
use crate::model::names;

/// As the golden record has it: the root key of Traefik's provider when it is given none.
pub(super) const DEFAULT_PREFIX: &str = "traefik/";

/// The schemes of a server that Traefik speaks HTTP with.
pub const SCHEMES: [&str; 3] = ["http", "https", "h2c"];

/// What kind of service Traefik makes of the records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Kind {
    /// With URLs and weights.
    #[default]
    Http,
    /// With addresses.
    Tcp,
    /// With addresses.
    Udp,
}

impl Kind {
    /// The kind of a port; `None`: Traefik has none for it.
    #[must_use]
    pub fn of(protocol: Protocol, scheme: &str) -> Option<Self> {
        match protocol {
            Protocol::Tcp if scheme.is_empty() => Some(Self::Tcp),
            Protocol::Tcp if SCHEMES.contains(&scheme) => Some(Self::Http),
            Protocol::Udp if scheme.is_empty() => Some(Self::Udp),
            _ => None,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }

    /// How many keys a server has.
    pub(super) fn keys(self) -> u32 {
        match self {
            Self::Http => 2,
            Self::Tcp | Self::Udp => 1,
        }
    }
}

/// The number of a server: the first four bytes of the hash of its address.
fn number(address: &str) -> u32 {
    let hash = Sha256::digest(address.as_bytes());
    hash.iter()
        .take(4)
        .fold(0, |number, byte| (number << 8) | u32::from(*byte))
}

/// What the keys of all servers of a service and its ports begin with. It ends with a dot: the port follows.
pub(super) fn scope(prefix: &str, kind: Kind, namespace: &str, service: &str) -> String {
    format!("{prefix}{}/services/{namespace}.{service}.", kind.as_str())
}

/// What the keys of a server begin with.
fn server(place: &Place<'_>, kind: Kind, endpoint: &Endpoint, address: &str) -> String {
    let mut key = scope(place.prefix, kind, &endpoint.namespace, &endpoint.service);
    key.push_str(&endpoint.port_name);
    key.push_str(SERVERS);
    key.push_str(&number(address).to_string());
    key.push('/');
    key
}

const SERVERS: &str = "/loadbalancer/servers/";

/// The keys of an endpoint; that with the address is the first.
pub(super) fn keys(
    place: &Place<'_>,
    kind: Kind,
    endpoint: &Endpoint,
) -> Vec<(String, Vec<Target>)> {
    let server = server(place, kind, endpoint, &endpoint.target.host_port());
    let members: &[&str] = match kind {
        Kind::Http => &["url", "weight"],
        Kind::Tcp | Kind::Udp => &["address"],
    };
    members
        .iter()
        .map(|member| (format!("{server}{member}"), vec![endpoint.target]))
        .collect()
}

/// The records of an endpoint, in the order of its keys.
pub(super) fn records(place: &Place<'_>, kind: Kind, endpoint: &Endpoint) -> Vec<Record> {
    let address = endpoint.target.host_port();
    let values = match kind {
        Kind::Http => vec![
            format!("{}://{address}", endpoint.scheme),
            endpoint.weight.to_string(),
        ],
        Kind::Tcp | Kind::Udp => vec![address],
    };
    keys(place, kind, endpoint)
        .into_iter()
        .zip(values)
        .map(|((key, targets), value)| Record {
            key,
            value: value.into_bytes(),
            targets,
        })
        .collect()
}

/// The part of a key that the members of one server share; the whole key where it is none of a server.
#[must_use]
pub(super) fn bundle(key: &[u8]) -> &[u8] {
    // This is asked of every key, and most end with a port.
    if !matches!(key.last(), Some(b'l' | b't' | b's')) {
        return key;
    }
    let Some(at) = key.iter().rposition(|byte| *byte == b'/') else {
        return key;
    };
    let (server, member) = key.split_at(at);
    if !matches!(member, b"/url" | b"/weight" | b"/address") {
        return key;
    }
    let digits = server
        .iter()
        .rev()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    match server.split_at(server.len() - digits) {
        (head, [_, ..]) if head.ends_with(SERVERS.as_bytes()) => server,
        _ => key,
    }
}

/// The key with the URL of the server whose weight stands at this key.
pub(super) fn lead_of(key: &[u8]) -> Option<Vec<u8>> {
    let server = bundle(key);
    (key.get(server.len()..)? == b"/weight").then(|| [server, b"/url"].concat())
}

const SHAPE: ReadError = ReadError::KeyShape(
    "{prefix}{http|tcp|udp}/services/{namespace}.{service}.{port}/loadbalancer/servers/{number}/{url|address}",
);

/// What a record tells. A weight stands beside the URL, and tells nothing of an endpoint alone.
pub(super) fn read(below: &str, value: &[u8]) -> Result<Discovered, ReadError> {
    let mut segments = below.split('/');
    let mut next = || segments.next().unwrap_or_default();
    let (kind, services, name, balancer, servers) = (next(), next(), next(), next(), next());
    let (_, member) = (next(), next());
    if services != "services"
        || !balancer.eq_ignore_ascii_case("loadbalancer")
        || servers != "servers"
        || segments.next().is_some()
    {
        return Err(SHAPE);
    }
    let (protocol, wanted) = match kind {
        "http" => (Protocol::Tcp, "url"),
        "tcp" => (Protocol::Tcp, "address"),
        "udp" => (Protocol::Udp, "address"),
        _ => return Err(SHAPE),
    };
    if member != wanted {
        return Err(ReadError::Beside);
    }
    let text = std::str::from_utf8(value).unwrap_or_default();
    let (scheme, address) = match text.split_once("://") {
        Some((scheme, rest)) if kind == "http" => {
            (scheme, rest.split('/').next().unwrap_or_default())
        }
        None if kind != "http" => ("", text),
        _ => ("", ""),
    };
    if !is_address(address) {
        return Err(ReadError::Value(
            "the URL or address of a server".to_owned(),
        ));
    }
    // Those of others can have any name.
    let parts = name
        .split_once('.')
        .and_then(|(namespace, rest)| Some((namespace, rest.rsplit_once('.')?)))
        .filter(|(namespace, (service, port))| {
            names::is_dns_label(namespace)
                && names::service(service).is_ok()
                && names::is_dns_label(port)
        });
    Ok(Discovered {
        socket: address.parse::<SocketAddr>().ok(),
        address: address.to_owned(),
        protocol: Some(protocol),
        scheme: known(scheme),
        port_name: parts.map(|(_, (_, port))| port.to_owned()),
        namespace: parts.map(|(namespace, _)| namespace.to_owned()),
        service: parts.map_or(name, |(_, (service, _))| service).to_owned(),
        ..Discovered::default()
    })
}
