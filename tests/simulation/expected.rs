//! What has to stand in etcd, computed from scratch: naive loops over what Kubernetes holds.
//!
//! Takes the objects, gives the records. Must never use the index or the plan that it is compared with:
//! of the operator's code only `accept` and the bytes of a record are used.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use etcd_registrar::accept::policy::Policy;
use etcd_registrar::accept::{AcceptSettings, Accepted, AddressKind, accept};
use etcd_registrar::engine::io::Registration;
use etcd_registrar::format::{Aggregate, Entry, Place, Record};
use etcd_registrar::model::endpoint::{Endpoint, Family, Target};
use etcd_registrar::model::pod::Pod;

use crate::model_kube::Kube;

const ZONE: &str = "topology.kubernetes.io/zone";

/// A record that has to stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) value: String,
    /// `namespace/name` of the registration that it is for.
    pub(crate) registration: String,
    pub(crate) scope: String,
    pub(crate) ttl: i64,
    /// The pod; empty where one record is for all of them.
    pub(crate) uid: String,
    /// What it stands for, as `host:port`, and for which pod each.
    pub(crate) addresses: Vec<(String, String)>,
    /// The zone is not known now: one that stood in the record may still stand there.
    pub(crate) any_zone: bool,
    /// The registration is suspended: nothing is put or removed for it.
    pub(crate) suspended: bool,
}

/// What a registration is served as; `None`: it can't be read, or is refused.
pub(crate) fn accepted(
    registration: &Registration,
    policy: &Policy,
    settings: &AcceptSettings,
) -> Option<Accepted> {
    let spec = registration.spec.as_ref().ok()?;
    accept(
        &registration.namespace,
        &registration.name,
        spec,
        policy,
        settings,
    )
    .ok()
}

struct Want<'a> {
    registration: &'a Registration,
    accepted: Accepted,
    pod: &'a Pod,
    record: Record,
}

/// The records that have to stand, by their keys. What is not accepted wants nothing and keeps what it had
///; what is suspended wants all the same, but neither gets nor gives up anything.
pub(crate) fn expected(
    kube: &Kube,
    pods: &[&Pod],
    registrations: &[&Registration],
    policy: &Policy,
    settings: &AcceptSettings,
) -> BTreeMap<String, Wanted> {
    let mut wants: Vec<Want<'_>> = Vec::new();
    for registration in registrations {
        let Some(accepted) = accepted(registration, policy, settings) else {
            continue;
        };
        for pod in pods {
            let endpoints = endpoints(kube, registration, &accepted, pod, settings);
            let place = Place {
                prefix: &accepted.prefix,
            };
            for record in accepted.format.records(&place, &endpoints) {
                wants.push(Want {
                    registration,
                    accepted: accepted.clone(),
                    pod,
                    record,
                });
            }
        }
    }
    // Of two ready pods with one address the later created counts.
    let mut owners: BTreeMap<Target, (i64, &str)> = BTreeMap::new();
    for want in &wants {
        let claim = (want.pod.created, &*want.pod.uid);
        for target in &want.record.targets {
            let owner = owners.entry(*target).or_insert(claim);
            *owner = claim.max(*owner);
        }
    }
    // Of one record for all pods, each has a part.
    let owned = |target: &Target, uid: &str| owners.get(target).is_some_and(|(_, own)| *own == uid);
    let mut found: BTreeMap<String, Wanted> =
        aggregates(kube, pods, registrations, policy, settings, &owned);
    wants.retain(|want| !want.accepted.format.is_aggregate());
    wants.retain(|want| {
        want.record.targets.iter().all(|target| {
            owners
                .get(target)
                .is_some_and(|(_, uid)| **uid == *want.pod.uid)
        })
    });
    // Of two registrations that want one key the older wins, and so of two pods of one.
    let keys: BTreeSet<String> = wants.iter().map(|want| want.record.key.clone()).collect();
    for key in keys {
        let winner = wants
            .iter()
            .filter(|want| want.record.key == key)
            .min_by_key(|want| {
                (
                    want.registration.created,
                    &want.registration.namespace,
                    &want.registration.name,
                    want.pod.created,
                    &*want.pod.uid,
                )
            })
            .expect("somebody wants it");
        found.insert(
            key,
            Wanted {
                value: String::from_utf8(winner.record.value.clone()).expect("text"),
                registration: format!(
                    "{}/{}",
                    winner.registration.namespace, winner.registration.name
                ),
                scope: winner.accepted.scope.clone(),
                ttl: winner.accepted.ttl,
                uid: winner.pod.uid.to_string(),
                addresses: winner
                    .record
                    .targets
                    .iter()
                    .map(|target| (target.host_port(), winner.pod.uid.to_string()))
                    .collect(),
                any_zone: zone(kube, winner.pod).is_empty(),
                suspended: winner.accepted.suspend,
            },
        );
    }
    found
}

/// The records for all pods of a registration, whether one is ready or not.
fn aggregates(
    kube: &Kube,
    pods: &[&Pod],
    registrations: &[&Registration],
    policy: &Policy,
    settings: &AcceptSettings,
    owned: &impl Fn(&Target, &str) -> bool,
) -> BTreeMap<String, Wanted> {
    let mut found: BTreeMap<String, (Seniority, Wanted)> = BTreeMap::new();
    for registration in registrations {
        let Some(accepted) = accepted(registration, policy, settings) else {
            continue;
        };
        let place = Place {
            prefix: &accepted.prefix,
        };
        for port in &accepted.ports {
            let aggregate = Aggregate {
                cluster: &settings.cluster_name,
                namespace: &registration.namespace,
                service: &accepted.service,
                port_name: &port.name,
                scheme: &port.scheme,
            };
            let Some(key) = accepted.format.aggregate_key(&place, &aggregate) else {
                continue;
            };
            let all = pods.iter().flat_map(|pod| {
                let endpoints = endpoints(kube, registration, &accepted, pod, settings);
                endpoints.into_iter().map(move |endpoint| (*pod, endpoint))
            });
            let of_port: Vec<(&Pod, Endpoint)> = all
                .filter(|(pod, endpoint)| {
                    endpoint.port_name == port.name && owned(&endpoint.target, &pod.uid)
                })
                .collect();
            let entries = of_port.iter().map(|(_, endpoint)| {
                let entry = Entry {
                    target: endpoint.target,
                    weight: endpoint.weight,
                    zone: &endpoint.zone,
                };
                (entry, 0)
            });
            let (value, beyond) = accepted
                .format
                .aggregate_value(&aggregate, entries)
                .expect("it has one");
            assert_eq!(beyond, 0);
            let by = (
                registration.created,
                registration.namespace.clone(),
                registration.name.clone(),
            );
            let wanted = Wanted {
                value: String::from_utf8(value).expect("text"),
                registration: format!("{}/{}", registration.namespace, registration.name),
                scope: accepted.scope.clone(),
                ttl: accepted.ttl,
                uid: String::new(),
                addresses: of_port
                    .iter()
                    .map(|(pod, e)| (e.target.host_port(), pod.uid.to_string()))
                    .collect(),
                any_zone: of_port.iter().any(|(pod, _)| zone(kube, pod).is_empty()),
                suspended: accepted.suspend,
            };
            if found.get(&key).is_none_or(|(other, _)| by < *other) {
                found.insert(key, (by, wanted));
            }
        }
    }
    let wanted = found.into_iter();
    wanted.map(|(key, (_, wanted))| (key, wanted)).collect()
}

/// When it was created, namespace and name: the least wins.
type Seniority = (i64, String, String);

/// A value as it is compared where any zone may stand in it.
pub(crate) fn without_zone(value: &str) -> String {
    // Where it is the only member of an object, that has none when the zone is not known.
    let value = &value.replace(r#""metadata":{}"#, r#""metadata":{"zone":""}"#);
    let mut parts = value.split("\"zone\":\"");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text.push_str("\"zone\":\"");
        text.push_str(part.split_once('"').map_or("", |(_, rest)| rest));
    }
    text
}

/// The nodes of a record for all pods, without their zones; nothing of another record.
pub(crate) fn nodes(value: &str) -> Option<BTreeSet<String>> {
    let value: serde_json::Value = serde_json::from_str(value).ok()?;
    value.get("type").filter(|kind| *kind == "roundrobin")?;
    let nodes = value.get("nodes")?.as_array()?.iter();
    let mut nodes: Vec<serde_json::Value> = nodes.cloned().collect();
    for node in &mut nodes {
        node.as_object_mut()?.remove("metadata");
    }
    Some(nodes.iter().map(ToString::to_string).collect())
}

fn zone(kube: &Kube, pod: &Pod) -> String {
    if let Some(zone) = label(pod, ZONE) {
        return zone.to_owned();
    }
    kube.nodes
        .get(&*pod.node)
        .map(|node| node.zone.to_string())
        .unwrap_or_default()
}

fn label<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.labels
        .iter()
        .find(|(name, _)| **name == *key)
        .map(|(_, value)| &**value)
}

fn endpoints(
    kube: &Kube,
    registration: &Registration,
    accepted: &Accepted,
    pod: &Pod,
    settings: &AcceptSettings,
) -> Vec<Endpoint> {
    let here = *registration.namespace == *pod.namespace;
    let counts = pod.ready || accepted.publish_not_ready;
    if !here
        || pod.deleting
        || pod.finished
        || !counts
        || !accepted.selector.matches(|key| label(pod, key))
    {
        return Vec::new();
    }
    let ips = addresses(accepted, pod);
    let mut metadata: BTreeMap<String, String> = BTreeMap::new();
    for name in &accepted.labels {
        if let Some(value) = label(pod, name) {
            metadata.insert(name.clone(), value.to_owned());
        }
    }
    metadata.extend(accepted.statics.iter().cloned());
    let mut endpoints = Vec::new();
    for port in &accepted.ports {
        let declared = pod.ports.iter().find(|declared| {
            declared.protocol == port.protocol
                && port.number.map_or(*declared.name == *port.name, |number| {
                    declared.port == number
                })
        });
        let own = port.number.or(declared.map(|declared| declared.port));
        let on_node = declared
            .map(|declared| declared.host_port)
            .filter(|number| *number != 0);
        let number = match accepted.address {
            AddressKind::Host if !pod.host_network => on_node,
            AddressKind::Host | AddressKind::Pod => own,
        };
        // One port that a pod lacks leaves it out.
        let (Some(number), Some(_)) = (number, own) else {
            return Vec::new();
        };
        for ip in &ips {
            endpoints.push(Endpoint {
                target: Target {
                    ip: *ip,
                    port: number,
                    protocol: port.protocol,
                },
                port_name: port.name.clone(),
                scheme: port.scheme.clone(),
                cluster: settings.cluster_name.clone(),
                namespace: pod.namespace.to_string(),
                service: accepted.service.clone(),
                pod: pod.name.to_string(),
                uid: pod.uid.to_string(),
                node: pod.node.to_string(),
                zone: zone(kube, pod),
                weight: accepted.weight,
                metadata: metadata.clone().into_iter().collect(),
            });
        }
    }
    endpoints
}

fn addresses(accepted: &Accepted, pod: &Pod) -> Vec<IpAddr> {
    let of = match accepted.address {
        AddressKind::Pod => &pod.ips,
        AddressKind::Host => &pod.host_ips,
    };
    let usable: Vec<IpAddr> = of
        .iter()
        .copied()
        .filter(|ip| !ip.is_loopback() && !ip.to_string().starts_with("fe80:"))
        .collect();
    if accepted.families.is_empty() {
        return usable.first().copied().into_iter().collect();
    }
    let mut found = Vec::new();
    for family in &accepted.families {
        found.extend(
            usable
                .iter()
                .find(|ip| Family::of(**ip) == *family)
                .copied(),
        );
    }
    found
}
