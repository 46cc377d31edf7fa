//! SkyDns: `/{path}/{zone reversed}/{namespace}/{service}/_{protocol}/_{port}/{cluster}/{pod}/{v4|v6}` -> what
//! the plugin `etcd` of CoreDNS answers with.
//!
//! Takes and gives SkyDNS messages. Must never write a label that DNS can't hold or that CoreDNS takes for a
//! wildcard, nor a bracketed address, which it would answer as a CNAME.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::{Discovered, Place, ReadError, Record, family, is_address};
use crate::model::endpoint::{Endpoint, Protocol};
use crate::model::names;

/// The TTL of an answer where the settings name none, in seconds: CoreDNS answers with the time left on a lease
/// where that is less, but not below 30, so that 30 and less are answered as written.
pub const DEFAULT_TTL: u32 = 30;
/// The first segment where the settings name none: that of CoreDNS.
pub const DEFAULT_PATH: &str = "skydns";
/// The most characters of a name in DNS (RFC 1035, without the dot at its end).
const MAX_NAME: usize = 253;
/// The characters of a hash label: 32 hex digits, 128 bits.
const HASH_LABEL: usize = 32;

/// What the settings say beside the prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SkyDns {
    /// The TTL of an answer in seconds.
    pub ttl: u32,
}

impl Default for SkyDns {
    fn default() -> Self {
        Self { ttl: DEFAULT_TTL }
    }
}

/// `Service` of the package `msg` of CoreDNS' plugin `etcd`, in its order.
#[derive(Serialize)]
struct Written {
    host: IpAddr,
    port: u16,
    weight: u32,
    ttl: u32,
    targetstrip: u8,
}

/// What is read: host and port must be there.
#[derive(Deserialize)]
struct Read<'a> {
    #[serde(borrow)]
    host: Cow<'a, str>,
    port: u16,
    weight: Option<u32>,
}

/// The prefix that a path and a zone make: `/skydns/local/skydns/` for `skydns` and `skydns.local`.
#[must_use]
pub fn prefix(path: &str, zone: &str) -> String {
    let mut prefix = format!("/{path}/");
    for label in zone.rsplit('.') {
        prefix.push_str(label);
        prefix.push('/');
    }
    prefix
}

/// Whether a text can be a label: `any` is a wildcard of CoreDNS.
#[must_use]
pub fn is_label(text: &str) -> bool {
    names::is_dns_label(text) && text != "any"
}

/// A text as a label: itself if it is one, else a hash of it.
#[must_use]
pub(super) fn label(text: &str) -> Cow<'_, str> {
    if is_label(text) {
        return Cow::Borrowed(text);
    }
    let mut hash = super::sha256(text);
    hash.truncate(HASH_LABEL);
    Cow::Owned(hash)
}

/// Whether names fit into DNS as labels and as a whole.
///
/// # Errors
///
/// Says which does not, and what to write.
pub fn check<'a>(
    zone: &str,
    namespace: &str,
    service: &str,
    cluster: &str,
    ports: impl Iterator<Item = &'a str>,
) -> Result<(), String> {
    if !zone.split('.').all(is_label) || zone.len() > MAX_NAME {
        return Err(format!(
            "the zone {zone:?} can't be served: write a domain name in lower case, without a dot at its end and without a label `any`, for example `skydns.local`"
        ));
    }
    if !is_label(service) {
        return Err(format!(
            "the service name {service:?} can't be a label of DNS: write lower-case letters, digits and `-`, beginning and ending with a letter or digit, at most 63 characters, without dots, and not `any`"
        ));
    }
    for (what, name) in [("namespace", namespace), ("cluster", cluster)] {
        if name == "any" {
            return Err(format!(
                "the {what} has the name `any`, which CoreDNS takes for a wildcard: register in another format"
            ));
        }
    }
    let mut longest = 0;
    for port in ports {
        // With its underscore.
        if port.len() >= names::MAX_DNS_LABEL {
            return Err(format!(
                "the port name {port:?} is too long for a label of DNS with an underscore before it: write at most 62 characters"
            ));
        }
        longest = longest.max(port.len());
    }
    // `{pod}.{cluster}._{port}._{protocol}.{service}.{namespace}.{zone}`
    let length = names::MAX_DNS_LABEL
        + cluster.len()
        + longest
        + service.len()
        + namespace.len()
        + zone.len()
        + "._._sctp....".len();
    if length > MAX_NAME {
        return Err(format!(
            "the names of targets would have up to {length} characters, and DNS takes {MAX_NAME}: write a shorter zone, service or port name"
        ));
    }
    Ok(())
}

/// What stands before the service.
pub(super) fn base(prefix: &str, namespace: &str) -> String {
    format!("{prefix}{namespace}/")
}

/// The key of an endpoint.
pub(super) fn key(place: &Place<'_>, endpoint: &Endpoint) -> String {
    format!(
        "{}{}/{}/_{}/_{}/{}/{}/{}",
        place.prefix,
        endpoint.namespace,
        endpoint.service,
        endpoint.target.protocol.lower(),
        endpoint.port_name,
        endpoint.cluster,
        label(&endpoint.pod),
        family(endpoint.target.ip)
    )
}

/// The record of an endpoint.
pub(super) fn record(place: &Place<'_>, endpoint: &Endpoint, ttl: u32) -> Record {
    let written = Written {
        host: endpoint.target.ip,
        port: endpoint.target.port,
        weight: endpoint.weight,
        ttl,
        // So that A and AAAA of the service are answered without the last label of the key.
        targetstrip: 1,
    };
    Record {
        key: key(place, endpoint),
        // Numbers and text into memory: there is nothing that could fail.
        value: serde_json::to_vec(&written).unwrap_or_default(),
        targets: vec![endpoint.target],
    }
}

const SHAPE: ReadError = ReadError::KeyShape(
    "/{path}/{zone reversed}/{namespace}/{service}/_{protocol}/_{port}/{cluster}/{pod}/{v4|v6}",
);

/// The segments below the prefix.
fn segments(below: &str) -> Option<[&str; 7]> {
    let mut segments = below.split('/');
    let mut next = || segments.next().filter(|segment| !segment.is_empty());
    let found = [
        next()?,
        next()?,
        next()?,
        next()?,
        next()?,
        next()?,
        next()?,
    ];
    segments.next().is_none().then_some(found)
}

/// What a record tells. What stands in the key and in the value must agree.
pub(super) fn read(below: &str, value: &[u8]) -> Result<Discovered, ReadError> {
    let [namespace, service, protocol, port, cluster, pod, last] = segments(below).ok_or(SHAPE)?;
    let protocol = Protocol::ALL
        .into_iter()
        .find(|known| protocol.strip_prefix('_') == Some(known.lower()))
        .ok_or(SHAPE)?;
    let port_name = port
        .strip_prefix('_')
        .filter(|name| names::is_dns_label(name))
        .ok_or(SHAPE)?;
    if !names::is_dns_label(namespace) || !names::is_dns_label(cluster) {
        return Err(SHAPE);
    }
    let read: Read<'_> = serde_json::from_slice(value)
        .map_err(|error| ReadError::Value(format!("a message of SkyDNS: {error}")))?;
    let socket = read
        .host
        .parse::<IpAddr>()
        .ok()
        .map(|ip| SocketAddr::new(ip, read.port));
    if socket.is_some_and(|socket| family(socket.ip()) != last) {
        return Err(ReadError::Mismatch("family"));
    }
    if !is_address(&read.host) {
        return Err(ReadError::Value(
            "a message with an address in `host`".to_owned(),
        ));
    }
    Ok(Discovered {
        address: socket.map_or_else(
            || format!("{}:{}", read.host, read.port),
            |socket| socket.to_string(),
        ),
        socket,
        protocol: Some(protocol),
        port_name: Some(port_name.to_owned()),
        cluster: Some(cluster.to_owned()),
        namespace: Some(namespace.to_owned()),
        service: service.to_owned(),
        pod: Some(pod.to_owned()),
        weight: read.weight,
        ..Discovered::default()
    })
}

/// The fifth segment, if there are seven.
pub(super) fn cluster_of(below: &[u8]) -> Option<&str> {
    let [_, _, _, _, cluster, _, _] = segments(std::str::from_utf8(below).ok()?)?;
    Some(cluster).filter(|cluster| names::is_dns_label(cluster))
}
