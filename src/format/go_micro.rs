//! GoMicro: `/micro/registry/{service}/{cluster}.{namespace}.{pod}.{port}.{v4|v6}` -> a service with one node.
//!
//! Takes and gives what the etcd registry of go-micro (v4, v5) reads. Its watcher reads only the first event of a
//! response, so that each record must have a transaction and a lease of its own.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Discovered, Place, ReadError, Record, family, is_address, known, metadata_version};
use crate::model::endpoint::Endpoint;
use crate::model::names;

/// The client can be given no other.
pub(super) const PREFIX: &str = "/micro/registry/";

/// `Service` of go-micro's package `registry`, in its order.
#[derive(Serialize)]
struct Written<'a> {
    name: &'a str,
    version: &'a str,
    metadata: (),
    endpoints: (),
    nodes: [Node<'a>; 1],
}

#[derive(Serialize)]
struct Node<'a> {
    metadata: Metadata<'a>,
    id: &'a str,
    address: &'a str,
}

#[derive(Serialize)]
struct Metadata<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    zone: &'a str,
}

/// What is read: a node with an address must be there.
#[derive(Deserialize)]
struct Read<'a> {
    #[serde(borrow, default)]
    version: Cow<'a, str>,
    nodes: Vec<ReadNode>,
}

#[derive(Deserialize)]
struct ReadNode {
    metadata: Option<BTreeMap<String, String>>,
    address: String,
}

/// The key of an endpoint, and where the id begins in it.
pub(super) fn key(place: &Place<'_>, endpoint: &Endpoint) -> (String, usize) {
    let key = format!(
        "{}{}/{}.{}.{}.{}.{}",
        place.prefix,
        endpoint.service,
        endpoint.cluster,
        endpoint.namespace,
        endpoint.pod,
        endpoint.port_name,
        family(endpoint.target.ip)
    );
    (key, place.prefix.len() + endpoint.service.len() + 1)
}

/// The record of an endpoint.
pub(super) fn record(place: &Place<'_>, endpoint: &Endpoint) -> Record {
    let (key, start) = key(place, endpoint);
    let written = Written {
        name: &endpoint.service,
        version: metadata_version(endpoint),
        metadata: (),
        endpoints: (),
        nodes: [Node {
            metadata: Metadata {
                zone: &endpoint.zone,
            },
            id: key.get(start..).unwrap_or_default(),
            address: &endpoint.target.host_port(),
        }],
    };
    // Text into memory: there is nothing that could fail.
    let value = serde_json::to_vec(&written).unwrap_or_default();
    Record {
        key,
        value,
        targets: vec![endpoint.target],
    }
}

/// Cluster, namespace, pod and port of an id of ours: all but the pod are DNS labels.
fn parts(id: &str) -> Option<[&str; 4]> {
    let (cluster, rest) = id.split_once('.')?;
    let (namespace, rest) = rest.split_once('.')?;
    let (rest, family) = rest.rsplit_once('.')?;
    let (pod, port) = rest.rsplit_once('.')?;
    let labels = [cluster, namespace, port];
    (matches!(family, "v4" | "v6")
        && labels.into_iter().all(names::is_dns_label)
        && !pod.is_empty())
    .then_some([cluster, namespace, pod, port])
}

/// What a record tells. The id of others can be anything.
pub(super) fn read(below: &str, value: &[u8]) -> Result<Discovered, ReadError> {
    let (service, id) = super::service_and_last(below)?;
    let read: Read<'_> = serde_json::from_slice(value)
        .map_err(|error| ReadError::Value(format!("a service of go-micro: {error}")))?;
    let Some(node) = read
        .nodes
        .into_iter()
        .next()
        .filter(|node| is_address(&node.address))
    else {
        return Err(ReadError::Value(
            "a service with an address in its first node".to_owned(),
        ));
    };
    let mut metadata = node.metadata.unwrap_or_default();
    let zone = metadata.remove("zone").and_then(known);
    if let Some(version) = known(read.version) {
        metadata.insert("version".into(), version);
    }
    let parts = parts(id);
    let part = |at: usize| parts.and_then(|parts| parts.get(at).map(|part| (*part).to_owned()));
    Ok(Discovered {
        socket: node.address.parse().ok(),
        address: node.address,
        service: service.to_owned(),
        cluster: part(0),
        namespace: part(1),
        pod: part(2),
        port_name: part(3),
        zone,
        metadata: metadata.into_iter().collect(),
        ..Discovered::default()
    })
}

/// The first label of the id, if it is one of ours.
pub(super) fn cluster_of(below: &[u8]) -> Option<&str> {
    let (_, id) = std::str::from_utf8(below).ok()?.split_once('/')?;
    parts(id).map(|[cluster, ..]| cluster)
}
