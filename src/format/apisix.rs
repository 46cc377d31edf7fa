//! Apisix: `{prefix}{cluster}.{namespace}.{service}.{port}` -> one upstream with all endpoints of a port.
//!
//! Takes the endpoints of all pods of a registration and gives one record for each port; takes one back apart. Must
//! never write a member that APISIX does not know: it would refuse the whole upstream.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Aggregate, Discovered, Entry, Place, ReadError, Record, is_address, known, sha256};
use crate::model::endpoint::{Endpoint, Protocol, Target};
use crate::model::names;

/// As the golden record has it: `upstreams` below the prefix of APISIX when it is given none.
pub(super) const DEFAULT_PREFIX: &str = "/apisix/upstreams/";
/// The end of a prefix: APISIX looks for upstreams nowhere else.
pub(super) const DIRECTORY: &str = "/upstreams/";

/// The schemes that an upstream can have.
pub const SCHEMES: [&str; 7] = ["http", "https", "grpc", "grpcs", "tcp", "udp", "tls"];

/// The most bytes of a value (design, section 8); etcd takes requests of 1.5 MiB.
pub const MAX_VALUE: usize = 1 << 20;

/// The most characters of an id that APISIX takes.
const MAX_ID: usize = 64;
/// So many of a longer one are kept; `-` and digits of its hash follow.
const KEPT: usize = 55;
const DIGITS: usize = 8;

/// The most characters of a cluster's name: with more, a shortened id would not hold all of it, and the keys of
/// clusters could not be told apart by what they begin with.
pub const MAX_CLUSTER: usize = KEPT - 1;

/// An upstream of APISIX without its nodes, in the order of the golden record.
#[derive(Serialize)]
struct Head<'a> {
    id: &'a str,
    name: &'a str,
    r#type: &'static str,
    scheme: &'a str,
    nodes: [(); 0],
}

#[derive(Serialize)]
struct WrittenNode<'a> {
    host: &'a str,
    port: u16,
    weight: u32,
    metadata: Metadata<'a>,
}

#[derive(Serialize)]
struct Metadata<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    zone: &'a str,
}

/// What is read: a list of nodes must be there, empty or not.
#[derive(Deserialize)]
struct Read<'a> {
    #[serde(borrow, default)]
    scheme: Cow<'a, str>,
    nodes: Vec<ReadNode<'a>>,
}

#[derive(Deserialize)]
struct ReadNode<'a> {
    #[serde(borrow)]
    host: Cow<'a, str>,
    port: u16,
    #[serde(default)]
    weight: Option<u32>,
    #[serde(default)]
    metadata: Option<BTreeMap<String, Value>>,
}

/// The id of an upstream, which is the last segment of its key.
fn id(aggregate: &Aggregate<'_>) -> String {
    let id = format!(
        "{}.{}.{}.{}",
        aggregate.cluster, aggregate.namespace, aggregate.service, aggregate.port_name
    );
    if id.len() <= MAX_ID {
        return id;
    }
    let hash = sha256(&id);
    let (head, hash) = (id.get(..KEPT), hash.get(..DIGITS));
    format!("{}-{}", head.unwrap_or(&id), hash.unwrap_or_default())
}

/// The key of an upstream.
pub(super) fn key(place: &Place<'_>, aggregate: &Aggregate<'_>) -> String {
    format!("{}{}", place.prefix, id(aggregate))
}

/// What the keys of a service and its ports begin with in one cluster. It ends with a dot: the port follows, unless ids
/// are shortened; then it ends where all of them are still the same.
pub(super) fn scope(prefix: &str, cluster: &str, namespace: &str, service: &str) -> String {
    let head = format!("{cluster}.{namespace}.{service}.");
    let kept = match head.get(..KEPT) {
        Some(kept) if head.len() > KEPT => kept.rfind('.').and_then(|dot| kept.get(..=dot)),
        _ => Some(&*head),
    };
    format!("{prefix}{}", kept.unwrap_or_default())
}

/// Whether a key may be one of an upstream.
pub(super) fn is_upstream(key: &[u8]) -> bool {
    let at = key.iter().rposition(|byte| *byte == b'/');
    at.and_then(|at| key.get(..=at))
        .is_some_and(|directory| directory.ends_with(DIRECTORY.as_bytes()))
}

fn host(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

/// A node as it is written, and what it is sorted by.
struct Written<A> {
    host: String,
    port: u16,
    age: A,
    bytes: Vec<u8>,
}

/// The value of an upstream, and how many of its nodes don't fit in: those that are the youngest, so that none that is
/// there has to make room for one that comes.
pub(super) fn value<'a, A: Ord>(
    aggregate: &Aggregate<'_>,
    nodes: impl IntoIterator<Item = (Entry<'a>, A)>,
) -> (Vec<u8>, usize) {
    let id = id(aggregate);
    let head = Head {
        id: &id,
        name: &id,
        r#type: "roundrobin",
        scheme: aggregate.scheme,
        nodes: [],
    };
    // Text into memory: there is nothing that could fail.
    let mut value = serde_json::to_vec(&head).unwrap_or_default();
    let end: Vec<u8> = value.split_off(value.len().saturating_sub(2));
    let mut written: Vec<Written<A>> = nodes
        .into_iter()
        .map(|(node, age)| {
            let host = host(node.target.ip);
            let bytes = serde_json::to_vec(&WrittenNode {
                host: &host,
                port: node.target.port,
                weight: node.weight,
                metadata: Metadata { zone: node.zone },
            });
            Written {
                host,
                port: node.target.port,
                age,
                bytes: bytes.unwrap_or_default(),
            }
        })
        .collect();
    let all = written.len();
    let room = MAX_VALUE.saturating_sub(value.len() + end.len());
    if written
        .iter()
        .map(|node| node.bytes.len() + 1)
        .sum::<usize>()
        > room + 1
    {
        written.sort_by(|a, b| a.age.cmp(&b.age));
        let mut used = 0;
        let fit = written.iter().take_while(|node| {
            used += node.bytes.len() + 1;
            used <= room + 1
        });
        let fit = fit.count();
        written.truncate(fit);
    }
    written.sort_by(|a, b| (&a.host, a.port).cmp(&(&b.host, b.port)));
    for (at, node) in written.iter().enumerate() {
        if at > 0 {
            value.push(b',');
        }
        value.extend(&node.bytes);
    }
    value.extend(end);
    (value, all - written.len())
}

fn aggregate_of(endpoint: &Endpoint) -> Aggregate<'_> {
    Aggregate {
        cluster: &endpoint.cluster,
        namespace: &endpoint.namespace,
        service: &endpoint.service,
        port_name: &endpoint.port_name,
        scheme: &endpoint.scheme,
    }
}

/// The endpoints of each key, in the order in which they come.
fn groups<'a>(place: &Place<'_>, endpoints: &'a [Endpoint]) -> Vec<(String, Vec<&'a Endpoint>)> {
    let mut found: Vec<(String, Vec<&Endpoint>)> = Vec::new();
    for endpoint in endpoints {
        let key = key(place, &aggregate_of(endpoint));
        match found.iter_mut().find(|(known, _)| *known == key) {
            Some((_, group)) => group.push(endpoint),
            None => found.push((key, vec![endpoint])),
        }
    }
    found
}

/// The keys of endpoints, of however many pods.
pub(super) fn keys(place: &Place<'_>, endpoints: &[Endpoint]) -> Vec<(String, Vec<Target>)> {
    groups(place, endpoints)
        .into_iter()
        .map(|(key, group)| (key, group.iter().map(|endpoint| endpoint.target).collect()))
        .collect()
}

/// The records of endpoints, of however many pods; those that come first are the oldest.
pub(super) fn records(place: &Place<'_>, endpoints: &[Endpoint]) -> Vec<Record> {
    groups(place, endpoints)
        .into_iter()
        .filter_map(|(key, group)| {
            let aggregate = aggregate_of(group.first()?);
            let nodes = group.iter().enumerate().map(|(age, endpoint)| {
                let node = Entry {
                    target: endpoint.target,
                    weight: endpoint.weight,
                    zone: &endpoint.zone,
                };
                (node, age)
            });
            Some(Record {
                key,
                value: value(&aggregate, nodes).0,
                targets: group.iter().map(|endpoint| endpoint.target).collect(),
            })
        })
        .collect()
}

/// What an id of ours tells; nothing of one that is shortened or another's.
fn parts(id: &str) -> Option<[&str; 4]> {
    let shortened = id.len() == MAX_ID
        && id.as_bytes().get(KEPT) == Some(&b'-')
        && id
            .bytes()
            .skip(KEPT + 1)
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let (cluster, rest) = id.split_once('.')?;
    let (namespace, rest) = rest.split_once('.')?;
    let (service, port) = rest.rsplit_once('.')?;
    let labels = [cluster, namespace, port];
    (!shortened && labels.into_iter().all(names::is_dns_label) && names::service(service).is_ok())
        .then_some([cluster, namespace, service, port])
}

/// What a record tells: one for each of its nodes, which may be none.
pub(super) fn read(below: &str, value: &[u8]) -> Result<Vec<Discovered>, ReadError> {
    if below.is_empty() || below.contains('/') {
        return Err(ReadError::KeyShape("{prefix}{id}"));
    }
    let read: Read<'_> = serde_json::from_slice(value).map_err(|error| {
        ReadError::Value(format!(
            "an upstream of APISIX with a list of nodes: {error}"
        ))
    })?;
    let parts = parts(below);
    let part = |at: usize| parts.and_then(|parts| parts.get(at).map(|part| (*part).to_owned()));
    let protocol = match &*read.scheme {
        "udp" => Protocol::Udp,
        _ => Protocol::Tcp,
    };
    read.nodes
        .into_iter()
        .map(|node| {
            let address = format!("{}:{}", node.host, node.port);
            if node.host.is_empty() || !is_address(&address) {
                return Err(ReadError::Value(
                    "an upstream whose nodes have hosts".into(),
                ));
            }
            let zone = node.metadata.as_ref().and_then(|told| told.get("zone"));
            Ok(Discovered {
                socket: address.parse::<SocketAddr>().ok(),
                address,
                protocol: Some(protocol),
                scheme: known(&*read.scheme),
                cluster: part(0),
                namespace: part(1),
                // Those of others, and shortened ones, can have any name.
                service: part(2).unwrap_or_else(|| below.to_owned()),
                port_name: part(3),
                zone: zone.and_then(Value::as_str).and_then(known),
                weight: node.weight,
                ..Discovered::default()
            })
        })
        .collect()
}

/// The first label of the id, if it is one of ours.
pub(super) fn cluster_of(below: &[u8]) -> Option<&str> {
    parts(std::str::from_utf8(below).ok()?).map(|[cluster, ..]| cluster)
}
