//! Registrations as the index keeps them, and which endpoints of a pod one of them wants.
//!
//! Takes an accepted registration and a pod, gives endpoints or the reason why there is none. Must
//! never look at etcd.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::accept::{Accepted, AddressKind, Refusal};
use crate::api::MAX_METADATA_CHARS;
use crate::mirror::leases::SlotName;
use crate::model::endpoint::{Endpoint, Target};
use crate::model::etcd::Key;
use crate::model::maps::HashMap;
use crate::model::pod::ContainerPort;

use super::bound::{Bound, PodPlace};
use super::pods::{PodId, StoredPod, addresses};

/// The number of a registration in the index.
pub type RegistrationId = u32;

/// Tells apart what a pod meant to a registration at different times; never 0, and never given twice.
pub type Stamp = u64;

/// What orders two registrations that want one key: creation, namespace, name; the least comes first.
pub type Seniority<'a> = (i64, &'a str, &'a str);

/// What is to be done for a registration.
#[derive(Clone, Debug)]
pub enum Standing {
    /// It is accepted and served.
    Serving(Arc<Accepted>),
    /// It can't be read or is not accepted: what it had registered is kept.
    Kept {
        /// Why.
        refusal: Refusal,
        /// What was accepted last, if this process saw it.
        last: Option<Arc<Accepted>>,
    },
}

/// Which limit of the policy leaves a pod out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Beyond {
    /// `endpointsPerRegistration`.
    Registration,
    /// `endpoints` of the namespace.
    Namespace,
}

/// What one pod means to one registration.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Member {
    /// It is Ready, or need not be, and has not left.
    pub(super) ready: bool,
    /// Why it has no endpoint although it is ready.
    pub(super) lacks: bool,
    /// It would have endpoints, but a limit leaves it out.
    pub(super) beyond: Option<Beyond>,
    /// The keys that it wants.
    pub(super) keys: SmallVec<[Key; 1]>,
    /// The targets that these stand for.
    pub(super) targets: SmallVec<[Target; 1]>,
    /// Each key stands for the one target at its place. Of a pod with many ports and two addresses, a
    /// change of one then concerns no other.
    pub(super) one_each: bool,
    /// The keys are those of records for all pods: at the place of each target the one that it is a part of.
    pub(super) in_aggregates: bool,
    /// Another one whenever a record of it may be another.
    pub(super) stamp: Stamp,
}

impl Member {
    /// The keys of a target, as far as the format tells them apart.
    pub(super) fn keys_for(&self, target: &Target) -> &[Key] {
        match self.targets.iter().position(|known| known == target) {
            Some(at) if self.one_each => self.keys.get(at..=at).unwrap_or_default(),
            Some(_) => &self.keys,
            None => &[],
        }
    }

    /// The target of a key, if it is one alone.
    pub(super) fn target_of(&self, key: &[u8]) -> Option<&Target> {
        if !self.one_each {
            return None;
        }
        let at = self.keys.iter().position(|known| **known == *key)?;
        self.targets.get(at)
    }
}

/// A record that a registration wants for all of its pods, on one port.
#[derive(Debug)]
pub(super) struct AggregateRecord {
    pub(super) key: Key,
    /// Another one whenever the record may be another.
    pub(super) stamp: Stamp,
    /// That of the last change that may have taken an endpoint away.
    pub(super) lost: Stamp,
}

/// A registration.
#[derive(Debug)]
pub struct StoredRegistration {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `namespace/name`, the name that its leases carry.
    pub full_name: Arc<str>,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.generation`.
    pub generation: i64,
    /// `metadata.resourceVersion`.
    pub resource_version: u64,
    /// `metadata.creationTimestamp`, seconds since 1970.
    pub created: i64,
    /// What is to be done for it.
    pub standing: Standing,
    /// The slot that its records belong on, while it is served.
    pub slot: Option<Arc<SlotName>>,
    /// The records for all pods, one for each port, of formats that have such.
    pub(super) aggregates: Vec<AggregateRecord>,
    /// The spec as it was read, to be accepted again under a new policy.
    pub(super) spec: Result<Box<crate::api::ServiceRegistrationSpec>, String>,
    /// Pods that the selector matches and that have not finished.
    pub selected: u32,
    /// Those of them that are ready.
    pub ready: u32,
    /// Pods of which something is wanted.
    pub pods_wanted: u32,
    /// Names of pods that are ready and have no endpoint, with the reason.
    pub lacking: BTreeSet<(Box<str>, String)>,
    /// Pods that the limit of a registration leaves out.
    pub beyond_own_limit: u32,
    /// Pods that the limit of the namespace leaves out.
    pub beyond_namespace_limit: u32,
    pub(super) members: HashMap<PodId, Member>,
    /// Which of its pods are within the limit of a registration.
    pub(super) bound: Bound<PodPlace>,
    pub(super) epoch: u32,
}

impl StoredRegistration {
    /// What is accepted and served now.
    #[must_use]
    pub fn serving(&self) -> Option<&Arc<Accepted>> {
        match &self.standing {
            Standing::Serving(accepted) => Some(accepted),
            Standing::Kept { .. } => None,
        }
    }

    pub(super) fn count_beyond(&mut self, beyond: Option<Beyond>, by: i32) {
        let count = match beyond {
            Some(Beyond::Registration) => &mut self.beyond_own_limit,
            Some(Beyond::Namespace) => &mut self.beyond_namespace_limit,
            None => return,
        };
        *count = count.saturating_add_signed(by);
    }

    /// What orders two registrations that want one key: the older comes first.
    #[must_use]
    pub fn seniority(&self) -> Seniority<'_> {
        (self.created, &self.namespace, &self.name)
    }
}

/// The most endpoints of a pod. A family that a pod does not have counts too, so that an address that comes
/// later finds room.
pub(super) fn endpoints_of_a_pod(accepted: &Accepted) -> u32 {
    let families = accepted.families.len().max(1);
    u32::try_from(accepted.ports.len() * families).unwrap_or(u32::MAX)
}

/// The endpoints of a pod, or why a ready pod has none.
pub(super) fn endpoints(
    accepted: &Accepted,
    cluster: &str,
    pod: &StoredPod,
    uid: &str,
    zone: &str,
    only: Option<&Target>,
) -> Result<Vec<Endpoint>, String> {
    let ips: Vec<IpAddr> = match accepted.address {
        AddressKind::Pod => addresses(pod.ips(), &accepted.families),
        AddressKind::Host => addresses(pod.host_ips.iter().copied(), &accepted.families),
    };
    if ips.is_empty() {
        return Err("has no address that can be published".into());
    }
    let metadata = metadata(accepted, pod);
    let mut found = Vec::with_capacity(ips.len() * accepted.ports.len());
    for port in &accepted.ports {
        let declared = pod.ports.iter().find(|declared: &&ContainerPort| {
            declared.protocol == port.protocol
                && match port.number {
                    Some(number) => declared.port == number,
                    None => *declared.name == *port.name,
                }
        });
        let container_port = match (port.number, declared) {
            (Some(number), _) => number,
            (None, Some(declared)) => declared.port,
            (None, None) => {
                return Err(format!(
                    "has no container port named {:?} with protocol {}",
                    port.name,
                    port.protocol.as_str()
                ));
            }
        };
        let number = match accepted.address {
            AddressKind::Pod => container_port,
            AddressKind::Host if pod.host_network => container_port,
            AddressKind::Host => match declared {
                Some(declared) if declared.host_port != 0 => declared.host_port,
                _ => return Err(format!("has no hostPort for port {:?}", port.name)),
            },
        };
        for ip in &ips {
            let target = Target {
                ip: *ip,
                port: number,
                protocol: port.protocol,
            };
            if only.is_some_and(|only| *only != target) {
                continue;
            }
            found.push(Endpoint {
                target,
                port_name: port.name.clone(),
                scheme: port.scheme.clone(),
                cluster: cluster.to_owned(),
                namespace: pod.namespace.to_string(),
                service: accepted.service.clone(),
                pod: pod.name.to_string(),
                uid: uid.to_owned(),
                node: pod.node.to_string(),
                zone: zone.to_owned(),
                weight: accepted.weight,
                metadata: metadata.clone(),
            });
        }
    }
    Ok(found)
}

fn metadata(accepted: &Accepted, pod: &StoredPod) -> Vec<(String, String)> {
    let mut entries: Vec<(String, String)> = Vec::new();
    let labels = accepted.labels.iter().map(|key| (key, pod.label(key)));
    let annotations = accepted
        .annotations
        .iter()
        .map(|key| (key, pod.annotation(key)));
    for (key, value) in labels.chain(annotations) {
        if let Some(value) = value {
            entries.push((key.clone(), value.to_owned()));
        }
    }
    entries.extend(accepted.statics.iter().cloned());
    // Of one name the last counts: what the registration says itself beats what pods say.
    entries.reverse();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    entries.dedup_by(|next, kept| next.0 == kept.0);
    let chars = |name: &str, value: &str| name.chars().count() + value.chars().count();
    let statics = accepted.statics.iter();
    let mut left = statics.fold(MAX_METADATA_CHARS, |left, (name, value)| {
        left.saturating_sub(chars(name, value))
    });
    entries.retain(|(name, value)| {
        if accepted.statics.iter().any(|(known, _)| known == name) {
            return true;
        }
        let fits = chars(name, value) <= left;
        if fits {
            left -= chars(name, value);
        }
        fits
    });
    entries
}
