//! Json: `{prefix}{namespace}/{service}/{cluster}/{address}` -> everything that a client may want.
//!
//! Takes and gives whole endpoints. Must never change the order or the names of members: clients
//! and the golden records hold them; new ones may only be added, and readers ignore what they
//! don't know.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize, Serializer};

use super::plain::{MAX_HOST_PORT, push_host_port};
use super::{Discovered, Place, ReadError, Record, known};
use crate::model::endpoint::{Endpoint, Family, Protocol};
use crate::model::names;

/// As the golden record has it.
pub(super) const DEFAULT_PREFIX: &str = "/services/";

/// The characters of a record beside its texts and addresses: the members' names and punctuation
/// (220), port, protocol, family and weight (18 at most).
const FRAME: usize = 240;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    address: &'a str,
    host: &'a str,
    port: u16,
    port_name: &'a str,
    protocol: &'static str,
    scheme: &'a str,
    family: &'static str,
    cluster: &'a str,
    namespace: &'a str,
    service: &'a str,
    pod: &'a str,
    uid: &'a str,
    node: &'a str,
    zone: &'a str,
    weight: u32,
    #[serde(serialize_with = "pairs")]
    metadata: &'a [(String, String)],
}

/// Sorted pairs as a map.
fn pairs<S: Serializer>(pairs: &[(String, String)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().map(|(name, value)| (name, value)))
}

/// What is read: the address and the port must be there, all else can be left out.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Read<'a> {
    #[serde(borrow)]
    address: Cow<'a, str>,
    host: IpAddr,
    port: u16,
    #[serde(borrow, default)]
    port_name: Cow<'a, str>,
    #[serde(borrow, default)]
    protocol: Cow<'a, str>,
    #[serde(borrow, default)]
    scheme: Cow<'a, str>,
    #[serde(borrow, default)]
    cluster: Cow<'a, str>,
    #[serde(borrow, default)]
    namespace: Cow<'a, str>,
    #[serde(borrow, default)]
    service: Cow<'a, str>,
    #[serde(borrow, default)]
    pod: Cow<'a, str>,
    #[serde(borrow, default)]
    uid: Cow<'a, str>,
    #[serde(borrow, default)]
    node: Cow<'a, str>,
    #[serde(borrow, default)]
    zone: Cow<'a, str>,
    weight: Option<u32>,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
}

/// What stands before the service.
pub(super) fn base(prefix: &str, namespace: &str) -> String {
    let mut base = String::with_capacity(prefix.len() + namespace.len() + 64);
    base.push_str(prefix);
    base.push_str(namespace);
    base.push('/');
    base
}

/// The key of an endpoint, and where the address begins in it.
pub(super) fn key(place: &Place<'_>, endpoint: &Endpoint) -> (String, usize) {
    let names = [&endpoint.namespace, &endpoint.service, &endpoint.cluster];
    let start = place.prefix.len() + names.iter().map(|name| name.len() + 1).sum::<usize>();
    let mut key = String::with_capacity(start + MAX_HOST_PORT);
    key.push_str(place.prefix);
    for name in names {
        key.push_str(name);
        key.push('/');
    }
    push_host_port(&mut key, endpoint);
    (key, start)
}

/// The record of an endpoint.
pub(super) fn record(place: &Place<'_>, endpoint: &Endpoint) -> Record {
    let (key, start) = key(place, endpoint);
    let length = key.len() - start;
    let text: usize = [
        &endpoint.pod,
        &endpoint.uid,
        &endpoint.node,
        &endpoint.zone,
        &endpoint.port_name,
        &endpoint.scheme,
    ]
    .iter()
    .map(|text| text.len())
    .chain(endpoint.metadata.iter().map(|(k, v)| k.len() + v.len() + 6))
    .sum();
    let mut value = Vec::with_capacity(FRAME + start + 2 * length + text);
    let address = key.get(start..).unwrap_or_default();
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let written = Written {
        address,
        host: host.trim_matches(['[', ']']),
        port: endpoint.target.port,
        port_name: &endpoint.port_name,
        protocol: endpoint.target.protocol.as_str(),
        scheme: &endpoint.scheme,
        family: Family::of(endpoint.target.ip).as_str(),
        cluster: &endpoint.cluster,
        namespace: &endpoint.namespace,
        service: &endpoint.service,
        pod: &endpoint.pod,
        uid: &endpoint.uid,
        node: &endpoint.node,
        zone: &endpoint.zone,
        weight: endpoint.weight,
        metadata: &endpoint.metadata,
    };
    // Numbers, text and a map of text into memory: there is nothing that could fail.
    let _ = serde_json::to_writer(&mut value, &written);
    Record {
        key,
        value,
        targets: vec![endpoint.target],
    }
}

const SHAPE: ReadError = ReadError::KeyShape("{prefix}{namespace}/{service}/{cluster}/{address}");

/// What a record tells. What stands in the key and in the value must agree: else somebody altered
/// it, or it belongs to another prefix.
pub(super) fn read(below: &str, value: &[u8]) -> Result<Discovered, ReadError> {
    let mut segments = below.split('/');
    let (Some(namespace), Some(service), Some(cluster), Some(address), None) = (
        segments.next(),
        segments.next(),
        segments.next(),
        segments.next(),
        segments.next(),
    ) else {
        return Err(SHAPE);
    };
    if !names::is_dns_label(namespace)
        || names::service(service).is_err()
        || !names::is_dns_label(cluster)
    {
        return Err(SHAPE);
    }
    let read: Read<'_> = serde_json::from_slice(value)
        .map_err(|error| ReadError::Value(format!("an endpoint as JSON: {error}")))?;
    let agree = |told: &str, key: &str| told.is_empty() || told == key;
    if read.address != address {
        return Err(ReadError::Mismatch("address"));
    }
    if !agree(&read.cluster, cluster) {
        return Err(ReadError::Mismatch("cluster"));
    }
    if !agree(&read.namespace, namespace) {
        return Err(ReadError::Mismatch("namespace"));
    }
    if !agree(&read.service, service) {
        return Err(ReadError::Mismatch("service"));
    }
    let socket = SocketAddr::new(read.host, read.port);
    if address.parse() != Ok(socket) {
        return Err(ReadError::Mismatch("host or port"));
    }
    let protocol = match &*read.protocol {
        "" => None,
        text => Some(Protocol::parse(text).ok_or_else(|| {
            ReadError::Value("an endpoint with the protocol TCP, UDP or SCTP".to_owned())
        })?),
    };
    Ok(Discovered {
        address: address.to_owned(),
        socket: Some(socket),
        protocol,
        port_name: known(read.port_name),
        scheme: known(read.scheme),
        cluster: Some(cluster.to_owned()),
        namespace: Some(namespace.to_owned()),
        service: service.to_owned(),
        pod: known(read.pod),
        uid: known(read.uid),
        node: known(read.node),
        zone: known(read.zone),
        weight: read.weight,
        metadata: read.metadata.into_iter().collect(),
    })
}

/// The third segment, if there are four.
pub(super) fn cluster_of(below: &[u8]) -> Option<&str> {
    let mut segments = below.split(|byte| *byte == b'/');
    let cluster = segments.nth(2)?;
    segments.next()?;
    if segments.next().is_some() {
        return None;
    }
    std::str::from_utf8(cluster)
        .ok()
        .filter(|cluster| names::is_dns_label(cluster))
}
