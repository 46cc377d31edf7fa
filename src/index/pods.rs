//! Pods, packed: what the index keeps of each, at some 200 bytes a pod.
//!
//! Takes parsed pods, gives stored ones by number. Must never keep a whole object or a string twice
//! that many pods share (namespaces, nodes, label sets, ports).

use std::hash::{BuildHasher, Hash, RandomState};
use std::net::IpAddr;
use std::sync::Arc;

use crate::model::endpoint::Family;
use crate::model::maps::{HashMap, HashSet};
use crate::model::pod::{ContainerPort, Pod};

/// The number of a pod in the index; given again after the pod has gone.
pub type PodId = u32;

/// A pod's UID in 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uid(u128);

type Labels = [(Box<str>, Box<str>)];

/// A pod as the index keeps it.
#[derive(Debug)]
pub struct StoredPod {
    /// The UID.
    pub uid: Uid,
    /// The name.
    pub name: Box<str>,
    /// The namespace.
    pub namespace: Arc<str>,
    /// The resource version.
    pub resource_version: u64,
    /// Seconds since 1970.
    pub created: i64,
    /// The node's name; empty while unscheduled.
    pub node: Arc<str>,
    /// Sorted by key.
    pub labels: Arc<Labels>,
    /// Sorted by key.
    pub annotations: Arc<Labels>,
    /// The ports of all containers.
    pub ports: Arc<[ContainerPort]>,
    /// Addresses of the node.
    pub host_ips: Arc<[IpAddr]>,
    primary: Option<IpAddr>,
    others: Box<[IpAddr]>,
    /// Being deleted, or finished: it never comes back.
    pub left: bool,
    /// The condition Ready is True.
    pub ready: bool,
    /// It has the node's network.
    pub host_network: bool,
    /// The list that named it last.
    pub(super) epoch: u32,
    /// Its place among the pods of the namespace.
    pub(super) place: u32,
}

impl StoredPod {
    /// The pod's addresses, the primary one first.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> + Clone + '_ {
        self.primary.into_iter().chain(self.others.iter().copied())
    }

    /// The value of a label.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        find(&self.labels, key)
    }

    /// The value of an annotation.
    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<&str> {
        find(&self.annotations, key)
    }

    /// Whether anything that a record or a count could show differs.
    pub(super) fn shows_the_same(&self, other: &Self) -> bool {
        self.uid == other.uid
            && self.node == other.node
            && self.labels == other.labels
            && self.annotations == other.annotations
            && self.ports == other.ports
            && self.host_ips == other.host_ips
            && self.primary == other.primary
            && self.others == other.others
            && self.left == other.left
            && self.ready == other.ready
            && self.host_network == other.host_network
    }
}

fn find<'a>(entries: &'a Labels, key: &str) -> Option<&'a str> {
    let at = entries.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
    entries.get(at).map(|(_, value)| &**value)
}

/// The first address of each wanted family, or the primary one when none is named.
pub(super) fn addresses(
    ips: impl Iterator<Item = IpAddr> + Clone,
    families: &[Family],
) -> Vec<IpAddr> {
    let mut usable = ips.filter(|ip| publishable(*ip));
    if families.is_empty() {
        return usable.next().into_iter().collect();
    }
    families
        .iter()
        .filter_map(|family| usable.clone().find(|ip| Family::of(*ip) == *family))
        .collect()
}

/// Whether a client elsewhere could mean this endpoint by the address: not loopback, link-local,
/// multicast, broadcast or unspecified.
#[must_use]
pub fn publishable(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(v4) => {
            !(v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_broadcast()
                || v4.is_unspecified())
        }
        IpAddr::V6(v6) => {
            !(v6.is_loopback()
                || v6.is_unicast_link_local()
                || v6.is_multicast()
                || v6.is_unspecified())
        }
    }
}

/// Values that many pods share, each kept once.
#[derive(Debug)]
struct Shared<T: ?Sized>(HashSet<Arc<T>>);

impl<T: ?Sized + Hash + Eq> Shared<T> {
    fn get<Q>(&mut self, value: Q) -> Arc<T>
    where
        Q: AsRef<T> + Into<Arc<T>>,
    {
        if let Some(known) = self.0.get(value.as_ref()) {
            return Arc::clone(known);
        }
        let new: Arc<T> = value.into();
        self.0.insert(Arc::clone(&new));
        new
    }

    fn sweep(&mut self) {
        self.0.retain(|value| Arc::strong_count(value) > 1);
    }
}

impl<T: ?Sized> Default for Shared<T> {
    fn default() -> Self {
        Self(HashSet::default())
    }
}

/// All pods, by number and by UID.
#[derive(Debug, Default)]
pub struct Pods {
    slots: Vec<Option<Box<StoredPod>>>,
    free: Vec<PodId>,
    by_uid: HashMap<Uid, PodId>,
    odd_uids: HashMap<Uid, Box<str>>,
    odd_hash: RandomState,
    strings: Shared<str>,
    labels: Shared<Labels>,
    ports: Shared<[ContainerPort]>,
    ips: Shared<[IpAddr]>,
    removed_since_sweep: usize,
}

/// Sharing tables are swept after as many removals, so that a cluster that changes its labels all the
/// time does not grow.
const SWEEP_AFTER: usize = 10_000;

impl Pods {
    /// The pod of that number.
    #[must_use]
    pub fn get(&self, id: PodId) -> Option<&StoredPod> {
        self.slots.get(id as usize)?.as_deref()
    }

    pub(super) fn get_mut(&mut self, id: PodId) -> Option<&mut StoredPod> {
        self.slots.get_mut(id as usize)?.as_deref_mut()
    }

    /// The number of the pod with that UID.
    #[must_use]
    pub fn find(&self, uid: Uid) -> Option<PodId> {
        self.by_uid.get(&uid).copied()
    }

    /// The number of pods.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_uid.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_uid.is_empty()
    }

    /// All pods with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (PodId, &StoredPod)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(at, pod)| Some((u32::try_from(at).ok()?, pod.as_deref()?)))
    }

    /// The UID in 16 bytes. Kubernetes writes UUIDs; anything else is hashed and its text kept.
    #[must_use]
    pub fn uid(&self, text: &str) -> Uid {
        parse_uuid(text).unwrap_or_else(|| {
            let high = self.odd_hash.hash_one(("high", text));
            let low = self.odd_hash.hash_one(("low", text));
            Uid(u128::from(high) << 64 | u128::from(low))
        })
    }

    /// The UID as Kubernetes wrote it.
    #[must_use]
    pub fn uid_text(&self, uid: Uid) -> String {
        if let Some(text) = self.odd_uids.get(&uid) {
            return text.to_string();
        }
        let digit = |four: u8| char::from_digit(u32::from(four), 16).unwrap_or_default();
        let mut text = String::with_capacity(36);
        for (at, byte) in uid.0.to_be_bytes().into_iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                text.push('-');
            }
            text.push(digit(byte >> 4));
            text.push(digit(byte & 0xf));
        }
        text
    }

    /// Packs a parsed pod.
    pub(super) fn pack(&mut self, pod: Pod) -> Box<StoredPod> {
        let uid = self.uid(&pod.uid);
        if parse_uuid(&pod.uid).is_none() {
            self.odd_uids.insert(uid, pod.uid);
        }
        let mut ips = pod.ips.into_iter();
        Box::new(StoredPod {
            uid,
            name: pod.name,
            namespace: self.strings.get(pod.namespace),
            resource_version: pod.resource_version,
            created: pod.created,
            node: self.strings.get(pod.node),
            labels: self.labels.get(pod.labels),
            annotations: self.labels.get(pod.annotations),
            ports: self.ports.get(pod.ports),
            host_ips: self.ips.get(pod.host_ips),
            primary: ips.next(),
            others: ips.collect(),
            left: pod.deleting || pod.finished,
            ready: pod.ready,
            host_network: pod.host_network,
            epoch: 0,
            place: 0,
        })
    }

    pub(super) fn insert(&mut self, pod: Box<StoredPod>) -> PodId {
        let uid = pod.uid;
        let id = if let Some(id) = self.free.pop() {
            if let Some(slot) = self.slots.get_mut(id as usize) {
                *slot = Some(pod);
            }
            id
        } else {
            self.slots.push(Some(pod));
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        };
        self.by_uid.insert(uid, id);
        id
    }

    pub(super) fn replace(&mut self, id: PodId, pod: Box<StoredPod>) {
        if let Some(slot) = self.slots.get_mut(id as usize) {
            *slot = Some(pod);
        }
    }

    pub(super) fn remove(&mut self, id: PodId) -> Option<Box<StoredPod>> {
        let pod = self.slots.get_mut(id as usize)?.take()?;
        self.by_uid.remove(&pod.uid);
        self.odd_uids.remove(&pod.uid);
        self.free.push(id);
        self.removed_since_sweep += 1;
        if self.removed_since_sweep >= SWEEP_AFTER {
            self.removed_since_sweep = 0;
            self.strings.sweep();
            self.labels.sweep();
            self.ports.sweep();
            self.ips.sweep();
        }
        Some(pod)
    }
}

fn parse_uuid(text: &str) -> Option<Uid> {
    let bytes = text.as_bytes();
    if bytes.len() != 36 {
        return None;
    }
    let mut value = 0u128;
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 8 | 13 | 18 | 23) {
            if *byte != b'-' {
                return None;
            }
            continue;
        }
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            _ => return None,
        };
        value = value << 4 | u128::from(digit);
    }
    Some(Uid(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_is_written_as_it_was_read() {
        let mut pods = Pods::default();
        for text in [
            "0b9e4c3a-1111-4222-8333-0123456789ab",
            "odd",
            "0B9E4C3A-1111-4222-8333-0123456789AB",
        ] {
            let packed = pods.pack(Pod {
                uid: text.into(),
                ..Pod::default()
            });
            let uid = packed.uid;
            pods.insert(packed);
            assert_eq!(pods.uid_text(uid), text);
            assert_eq!(pods.uid(text), uid);
        }
    }

    #[test]
    fn only_addresses_that_mean_something_elsewhere_are_published() {
        for bad in [
            "127.0.0.1",
            "169.254.1.1",
            "224.0.0.1",
            "0.0.0.0",
            "::1",
            "fe80::1",
            "ff02::1",
            "::",
            "::ffff:127.0.0.1",
        ] {
            assert!(!publishable(bad.parse().unwrap()), "{bad}");
        }
        for good in ["10.0.0.1", "fd00::3", "192.168.1.1", "2001:db8::1"] {
            assert!(publishable(good.parse().unwrap()), "{good}");
        }
    }
}
