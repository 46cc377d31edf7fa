//! Kitex and Hertz: `{prefix}{service}/{address}` -> address, weight and tags.
//!
//! Takes and gives what the etcd registries of both frameworks read. Must never write a weight of 0,
//! which they take for 10, and no metadata that they don't know.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::plain::{MAX_HOST_PORT, key};
use super::{Discovered, Place, ReadError, Record, is_address, known, service_and_last};
use crate::model::endpoint::{Endpoint, Protocol};

/// As the golden record has it.
pub(super) const KITEX_PREFIX: &str = "kitex/registry-etcd/";
/// As the golden record has it; the client of Hertz can be given no other.
pub(super) const HERTZ_PREFIX: &str = "hertz/registry-etcd/";

/// The characters of a record beside its texts and address: names and punctuation (106), network and
/// weight (9 at most).
const FRAME: usize = 120;

#[derive(Serialize)]
struct Written<'a> {
    network: &'static str,
    address: &'a str,
    weight: u32,
    tags: Tags<'a>,
}

/// Sorted by name, as the members of a map are.
#[derive(Serialize)]
struct Tags<'a> {
    cluster: &'a str,
    namespace: &'a str,
    pod: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    zone: &'a str,
}

/// What is read: the address must be there, all else can be left out.
#[derive(Deserialize)]
struct Read<'a> {
    #[serde(borrow, default)]
    network: Cow<'a, str>,
    #[serde(borrow)]
    address: Cow<'a, str>,
    weight: Option<u32>,
    tags: Option<BTreeMap<String, String>>,
}

/// The record of an endpoint.
pub(super) fn record(place: &Place<'_>, endpoint: &Endpoint) -> Record {
    let (key, start) = key(place, endpoint);
    let text: usize = [
        &endpoint.cluster,
        &endpoint.namespace,
        &endpoint.pod,
        &endpoint.zone,
    ]
    .iter()
    .map(|text| text.len())
    .sum();
    let mut value = Vec::with_capacity(FRAME + MAX_HOST_PORT + text);
    let written = Written {
        network: endpoint.target.protocol.lower(),
        address: key.get(start..).unwrap_or_default(),
        weight: endpoint.weight,
        tags: Tags {
            cluster: &endpoint.cluster,
            namespace: &endpoint.namespace,
            pod: &endpoint.pod,
            zone: &endpoint.zone,
        },
    };
    // Numbers and text into memory: there is nothing that could fail.
    let _ = serde_json::to_writer(&mut value, &written);
    Record {
        key,
        value,
        targets: vec![endpoint.target],
    }
}

/// What a record tells. The last segment of the key can be anything: the address is in the value.
pub(super) fn read(below: &str, value: &[u8]) -> Result<Discovered, ReadError> {
    let (service, _) = service_and_last(below)?;
    let read: Read<'_> = serde_json::from_slice(value)
        .map_err(|error| ReadError::Value(format!("an instance of Kitex or Hertz: {error}")))?;
    if !is_address(&read.address) {
        return Err(ReadError::Value(
            "an instance with an address in `address`".to_owned(),
        ));
    }
    let mut tags = read.tags.unwrap_or_default();
    let mut tag = |name: &str| tags.remove(name).and_then(known);
    Ok(Discovered {
        socket: read.address.parse().ok(),
        address: read.address.into_owned(),
        protocol: Protocol::ALL
            .into_iter()
            .find(|protocol| protocol.lower() == read.network),
        service: service.to_owned(),
        cluster: tag("cluster"),
        namespace: tag("namespace"),
        pod: tag("pod"),
        zone: tag("zone"),
        weight: read.weight,
        metadata: tags.into_iter().collect(),
        ..Discovered::default()
    })
}
