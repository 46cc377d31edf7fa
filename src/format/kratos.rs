//! Kratos: `{prefix}{service}/{cluster}.{namespace}.{pod}.{v4|v6}` -> one instance with all of its ports.
//!
//! Takes all endpoints of a pod and gives one record for each family; takes one back apart. Must never
//! write an instance without endpoints: its readers would keep what they had.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{Discovered, Place, ReadError, Record, family, is_address, known, metadata_version};
use crate::model::endpoint::{Endpoint, Family, Target};
use crate::model::names;

/// As the golden record has it: that of Kratos' registry when it is given none.
pub(super) const DEFAULT_PREFIX: &str = "/microservices/";

/// The schemes that the transports of Kratos look for.
pub const SCHEMES: [&str; 4] = ["http", "https", "grpc", "grpcs"];

/// `ServiceInstance` of Kratos' package `registry`, in its order.
#[derive(Serialize)]
struct Written<'a> {
    id: &'a str,
    name: &'a str,
    version: &'a str,
    metadata: Metadata<'a>,
    endpoints: Vec<String>,
}

/// Sorted by name, as the members of a map are.
#[derive(Serialize)]
struct Metadata<'a> {
    cluster: &'a str,
    namespace: &'a str,
    pod: &'a str,
    weight: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    zone: &'a str,
}

/// What is read: one endpoint must be there, all else can be left out.
#[derive(Deserialize)]
struct Read<'a> {
    #[serde(borrow, default)]
    version: Cow<'a, str>,
    metadata: Option<BTreeMap<String, String>>,
    endpoints: Vec<String>,
}

/// The endpoints of one family, and their key with the place where the id begins.
type Instance<'a> = (String, usize, Vec<&'a Endpoint>);

/// A pod has at most one address of each family.
fn instances<'a>(place: &Place<'_>, endpoints: &'a [Endpoint]) -> Vec<Instance<'a>> {
    let mut found: Vec<Instance<'a>> = Vec::with_capacity(2);
    for wanted in [Family::V4, Family::V6] {
        let group: Vec<&Endpoint> = endpoints
            .iter()
            .filter(|endpoint| Family::of(endpoint.target.ip) == wanted)
            .collect();
        let Some(first) = group.first() else { continue };
        let start = place.prefix.len() + first.service.len() + 1;
        let key = format!(
            "{}{}/{}.{}.{}.{}",
            place.prefix,
            first.service,
            first.cluster,
            first.namespace,
            first.pod,
            family(first.target.ip)
        );
        found.push((key, start, group));
    }
    found
}

fn targets(group: &[&Endpoint]) -> Vec<Target> {
    let mut targets: Vec<Target> = Vec::with_capacity(group.len());
    for endpoint in group {
        if !targets.contains(&endpoint.target) {
            targets.push(endpoint.target);
        }
    }
    targets
}

/// The keys of a pod.
pub(super) fn keys(place: &Place<'_>, endpoints: &[Endpoint]) -> Vec<(String, Vec<Target>)> {
    instances(place, endpoints)
        .into_iter()
        .map(|(key, _, group)| (key, targets(&group)))
        .collect()
}

/// The records of a pod.
pub(super) fn records(place: &Place<'_>, endpoints: &[Endpoint]) -> Vec<Record> {
    instances(place, endpoints)
        .into_iter()
        .filter_map(|(key, start, group)| {
            let first = *group.first()?;
            let written = Written {
                id: key.get(start..)?,
                name: &first.service,
                version: metadata_version(first),
                metadata: Metadata {
                    cluster: &first.cluster,
                    namespace: &first.namespace,
                    pod: &first.pod,
                    weight: first.weight.to_string(),
                    zone: &first.zone,
                },
                endpoints: group
                    .iter()
                    .map(|endpoint| {
                        format!("{}://{}", endpoint.scheme, endpoint.target.host_port())
                    })
                    .collect(),
            };
            let value = serde_json::to_vec(&written).ok()?;
            Some(Record {
                key,
                value,
                targets: targets(&group),
            })
        })
        .collect()
}

const SHAPE: ReadError = ReadError::KeyShape("{prefix}{service}/{id}");

/// What a record tells: one for each of its endpoints, never none.
pub(super) fn read(below: &str, value: &[u8]) -> Result<Vec<Discovered>, ReadError> {
    let Some((service, id)) = below.split_once('/') else {
        return Err(SHAPE);
    };
    if service.is_empty() || id.is_empty() {
        return Err(SHAPE);
    }
    let read: Read<'_> = serde_json::from_slice(value)
        .map_err(|error| ReadError::Value(format!("an instance of Kratos: {error}")))?;
    let mut metadata = read.metadata.unwrap_or_default();
    let mut member = |name: &str| metadata.remove(name).and_then(known);
    let (cluster, namespace, pod) = (member("cluster"), member("namespace"), member("pod"));
    let (weight, zone) = (member("weight"), member("zone"));
    if let Some(version) = known(read.version) {
        metadata.insert("version".into(), version);
    }
    let metadata: Vec<(String, String)> = metadata.into_iter().collect();
    let found: Vec<Discovered> = read
        .endpoints
        .iter()
        .filter_map(|url| {
            let (scheme, rest) = url.split_once("://")?;
            // A query may say whether the port is secure.
            let address = rest
                .split(['/', '?'])
                .next()
                .filter(|text| is_address(text))?;
            Some(Discovered {
                socket: address.parse::<SocketAddr>().ok(),
                address: address.to_owned(),
                scheme: known(scheme),
                service: service.to_owned(),
                cluster: cluster.clone(),
                namespace: namespace.clone(),
                pod: pod.clone(),
                zone: zone.clone(),
                weight: weight.as_deref().and_then(|weight| weight.parse().ok()),
                metadata: metadata.clone(),
                ..Discovered::default()
            })
        })
        .collect();
    if found.is_empty() {
        return Err(ReadError::Value(
            "an instance with a URL in `endpoints`".to_owned(),
        ));
    }
    Ok(found)
}

/// The first label of the id, if it is one of ours.
pub(super) fn cluster_of(below: &[u8]) -> Option<&str> {
    let (_, id) = std::str::from_utf8(below).ok()?.split_once('/')?;
    let (cluster, rest) = id.split_once('.')?;
    let (_, rest) = rest.split_once('.')?;
    let (_, family) = rest.rsplit_once('.')?;
    (matches!(family, "v4" | "v6") && names::is_dns_label(cluster)).then_some(cluster)
}
