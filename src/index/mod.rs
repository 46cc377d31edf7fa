//! Pods, nodes and registrations --> who wants which key.
//!
//! Takes what the watches of Kubernetes deliver, gives the set of keys whose wanted record may have
//! changed, and for each key the record that is wanted. An event of a pod touches only the registrations
//! of its namespace. Must never know what stands in etcd, and never do IO or read a clock.

mod bound;
pub mod pods;
pub mod registrations;

use std::collections::BTreeSet;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::accept::policy::{Limits, Policy};
use crate::accept::{AcceptSettings, Accepted, AddressKind, Refusal, accept};
use crate::api::{ServiceRegistrationStatus, reason};
use crate::engine::io::Registration;
use crate::format::{Aggregate, Entry, Place, Record};
use crate::mirror::leases::SlotName;
use crate::model::endpoint::{Endpoint, Target};
use crate::model::etcd::Key;
use crate::model::maps::HashMap;
use crate::model::pod::{Node, Pod};

use bound::{Bound, PodPlace, RegistrationPlace};
use pods::{PodId, Pods, StoredPod, Uid};
use registrations::{
    AggregateRecord, Beyond, Member, RegistrationId, Seniority, Stamp, Standing,
    StoredRegistration, endpoints, endpoints_of_a_pod,
};

/// Who wants a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The registration.
    pub registration: RegistrationId,
    /// The pod; `None`: all pods of the registration, in one record.
    pub pod: Option<PodId>,
}

/// An endpoint in a record for all pods.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// What is written of it.
    pub entry: Entry<'a>,
    /// The pod.
    pub pod: PodId,
    /// Its UID.
    pub uid: Uid,
    /// When it was created, in seconds since 1970.
    pub created: i64,
}

/// What a change may have changed; gathered over one step of the engine.
#[derive(Debug, Default)]
pub struct Touched {
    /// Keys whose wanted record may be another now.
    pub keys: Vec<Key>,
    /// Targets that somebody began or ceased to want.
    pub targets: Vec<Target>,
    /// Registrations whose counts or standing may be others now.
    pub registrations: BTreeSet<RegistrationId>,
    /// The statuses that registrations were delivered with.
    pub statuses: Vec<(RegistrationId, Option<Box<ServiceRegistrationStatus>>)>,
    /// Pods that became wanted by a registration (true) or stopped being so (false).
    pub turned: Vec<(RegistrationId, Uid, bool)>,
    /// Pods that a registration still selects and of which nothing is wanted any more, since they are not ready.
    pub unready: Vec<Unready>,
    /// Pods of which a registration wants nothing, and that changed: some are not selected any more, or are gone.
    pub unwanted: Vec<(RegistrationId, Uid)>,
    /// Registrations that are gone.
    pub removed: Vec<(RegistrationId, Arc<str>)>,
    /// Registrations that are not accepted and keep what they had, and may have lost a pod of it.
    pub kept: BTreeSet<Arc<str>>,
}

/// A pod that stopped being ready and is still there, neither being deleted nor finished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unready {
    /// The registration, which still selects it.
    pub registration: RegistrationId,
    /// The pod.
    pub uid: Uid,
    /// The keys that were wanted for it.
    pub keys: SmallVec<[Key; 1]>,
    /// What these stood for.
    pub targets: SmallVec<[Target; 1]>,
}

#[derive(Debug)]
struct Namespace {
    pods: Vec<PodId>,
    registrations: Vec<RegistrationId>,
    /// Which of the registrations are served.
    served: Bound<RegistrationPlace>,
    /// Which pods, of those that are within the limits of their registrations, are registered.
    endpoints: Bound<PodPlace>,
}

impl Namespace {
    fn new(limits: Limits) -> Self {
        Self {
            pods: Vec::new(),
            registrations: Vec::new(),
            served: Bound::new(limits.registrations),
            endpoints: Bound::new(limits.endpoints),
        }
    }
}

/// The index.
#[derive(Debug)]
pub struct Index {
    settings: AcceptSettings,
    policy: Policy,
    /// The namespaces that are watched; empty: all.
    watched: BTreeSet<String>,
    pods: Pods,
    zones: HashMap<Box<str>, (Box<str>, u32)>,
    namespaces: HashMap<Arc<str>, Namespace>,
    registrations: Vec<Option<StoredRegistration>>,
    free: Vec<RegistrationId>,
    by_name: HashMap<Arc<str>, RegistrationId>,
    claims: HashMap<Key, SmallVec<[Claim; 1]>>,
    targets: HashMap<Target, SmallVec<[Claim; 1]>>,
    epoch: u32,
    last_stamp: Stamp,
}

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

impl Index {
    /// An empty index.
    #[must_use]
    pub fn new(settings: AcceptSettings, policy: Policy) -> Self {
        Self {
            settings,
            policy,
            watched: BTreeSet::new(),
            pods: Pods::default(),
            zones: HashMap::default(),
            namespaces: HashMap::default(),
            registrations: Vec::new(),
            free: Vec::new(),
            by_name: HashMap::default(),
            claims: HashMap::default(),
            targets: HashMap::default(),
            epoch: 0,
            last_stamp: 0,
        }
    }

    // === what is asked ===

    /// The pods.
    #[must_use]
    pub fn pods(&self) -> &Pods {
        &self.pods
    }

    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The same, of these namespaces alone; empty: of all.
    #[must_use]
    pub fn of_namespaces(mut self, namespaces: &BTreeSet<String>) -> Self {
        self.watched.clone_from(namespaces);
        self
    }

    /// Whether the namespace of a registration (`namespace/name`) is watched: else nothing is known of it, not even that
    /// it is gone.
    #[must_use]
    pub fn watches(&self, registration: &str) -> bool {
        self.watched.is_empty()
            || registration
                .split_once('/')
                .is_some_and(|(namespace, _)| self.watched.contains(namespace))
    }

    /// How much a namespace may have.
    #[must_use]
    pub fn limits(&self, namespace: &str) -> Limits {
        self.policy.limits(namespace)
    }

    /// The registration of that number.
    #[must_use]
    pub fn registration(&self, id: RegistrationId) -> Option<&StoredRegistration> {
        self.registrations.get(id as usize)?.as_ref()
    }

    /// The registration `namespace/name`.
    #[must_use]
    pub fn find(&self, full_name: &str) -> Option<RegistrationId> {
        self.by_name.get(full_name).copied()
    }

    /// All registrations with their numbers.
    pub fn registrations(&self) -> impl Iterator<Item = (RegistrationId, &StoredRegistration)> {
        self.registrations
            .iter()
            .enumerate()
            .filter_map(|(at, entry)| Some((u32::try_from(at).ok()?, entry.as_ref()?)))
    }

    /// The keys that are wanted by anyone.
    pub fn wanted_keys(&self) -> impl Iterator<Item = &Key> {
        self.claims.keys()
    }

    /// The number of keys that are wanted by anyone.
    #[must_use]
    pub fn wanted_count(&self) -> usize {
        self.claims.len()
    }

    /// The keys that a registration wants, of all its pods; of one process always in the same order.
    pub fn keys_of(&self, id: RegistrationId) -> impl Iterator<Item = &Key> {
        self.registration(id).into_iter().flat_map(|r| {
            let of_pods = r.members.iter().filter(|(_, m)| !m.in_aggregates);
            // Numbers are compared sooner than keys.
            let mut of_pods: Vec<(&PodId, &Member)> = of_pods.collect();
            of_pods.sort_unstable_by_key(|(pod, _)| **pod);
            let of_all = r.aggregates.iter().map(|aggregate| &aggregate.key);
            of_all.chain(of_pods.into_iter().flat_map(|(_, m)| m.keys.iter()))
        })
    }

    /// The keys that a registration wants for the pod that owns this target.
    pub fn keys_at(&self, id: RegistrationId, target: &Target) -> &[Key] {
        let Some(owner) = self.owner(target) else {
            return &[];
        };
        self.registration(id)
            .and_then(|r| r.members.get(&owner))
            .map_or(&[], |m| m.keys_for(target))
    }

    /// All keys of the cluster's own that are wanted for a target.
    pub fn keys_for<'a>(&'a self, target: &'a Target) -> impl Iterator<Item = &'a Key> {
        self.targets
            .get(target)
            .into_iter()
            .flatten()
            .filter_map(|claim| self.member(*claim))
            .flat_map(move |member| member.keys_for(target))
    }

    /// The pod that owns a target: of the pods that are wanted there the one that was created last.
    #[must_use]
    pub fn owner(&self, target: &Target) -> Option<PodId> {
        let claims = self.targets.get(target)?;
        if let [only] = claims.as_slice() {
            return only.pod;
        }
        claims
            .iter()
            .filter_map(|claim| {
                let id = claim.pod?;
                self.pods.get(id).map(|pod| ((pod.created, pod.uid), id))
            })
            .max()
            .map(|(_, id)| id)
    }

    /// Whether a registration selects a pod that is merely not ready and still has these addresses, and nobody else
    /// wants what they stand for.
    #[must_use]
    pub fn may_still_have(&self, id: RegistrationId, uid: Uid, targets: &[Target]) -> bool {
        let Some(pod) = self.pods.find(uid) else {
            return false;
        };
        let selecting = self
            .registration(id)
            .filter(|stored| stored.members.contains_key(&pod))
            .and_then(StoredRegistration::serving);
        let found = self.pods.get(pod).filter(|found| !found.ready);
        let (Some(accepted), Some(found)) = (selecting, found) else {
            return false;
        };
        targets.iter().all(|target| {
            let is_its = match accepted.address {
                AddressKind::Pod => found.ips().any(|ip| ip == target.ip),
                AddressKind::Host => found.host_ips.contains(&target.ip),
            };
            is_its && self.owner(target).is_none_or(|owner| owner == pod)
        })
    }

    /// Whether more than one want a key.
    #[must_use]
    pub fn is_contested(&self, key: &Key) -> bool {
        self.claims.get(key).is_some_and(|claims| claims.len() > 1)
    }

    /// Who wins a key, and the others that want it too.
    ///
    /// The older registration wins; of two pods of one registration the older, unless they share the
    /// target, which is the later one's.
    #[must_use]
    pub fn winner(&self, key: &Key) -> Option<(Claim, SmallVec<[Claim; 1]>)> {
        let claims = self.claims.get(key)?;
        if let [only] = claims.as_slice() {
            return self
                .owns_targets(*only, key)
                .then(|| (*only, SmallVec::new()));
        }
        let mut valid: SmallVec<[Claim; 1]> = claims
            .iter()
            .copied()
            .filter(|claim| self.owns_targets(*claim, key))
            .collect();
        valid.sort_by(|a, b| self.precedence(*a).cmp(&self.precedence(*b)));
        let mut claims = valid.into_iter();
        let first = claims.next()?;
        Some((first, claims.collect()))
    }

    /// Whether the pod of a claim owns every target that its record at the key stands for.
    fn owns_targets(&self, claim: Claim, key: &[u8]) -> bool {
        let Some(pod) = claim.pod else {
            // What other pods own is no part of it.
            return true;
        };
        let owns = |target: &Target| self.owner(target).is_none_or(|owner| owner == pod);
        let Some(member) = self.member(claim) else {
            return false;
        };
        if let Some(target) = member.target_of(key) {
            return owns(target);
        }
        member.targets.iter().all(owns)
            || self
                .record(claim, key, "")
                .is_some_and(|record| record.targets.iter().all(owns))
    }

    fn precedence(&self, claim: Claim) -> (Option<Seniority<'_>>, Option<(i64, Uid)>) {
        (
            self.registration(claim.registration)
                .map(StoredRegistration::seniority),
            claim
                .pod
                .and_then(|pod| self.pods.get(pod))
                .map(|pod| (pod.created, pod.uid)),
        )
    }

    fn member(&self, claim: Claim) -> Option<&Member> {
        self.registration(claim.registration)?
            .members
            .get(&claim.pod?)
    }

    /// As long as this is the same, so is the record that a claim wants at a key (for the same zone).
    #[must_use]
    pub fn stamp(&self, claim: Claim, key: &[u8]) -> Option<Stamp> {
        match claim.pod {
            Some(_) => self.member(claim).map(|member| member.stamp),
            None => self.aggregate(claim, key).map(|found| found.stamp),
        }
    }

    fn aggregate(&self, claim: Claim, key: &[u8]) -> Option<&AggregateRecord> {
        let stored = self.registration(claim.registration)?;
        stored.aggregates.iter().find(|known| *known.key == *key)
    }

    // === records for all pods ===

    /// Whether a record for all pods that was made at a stamp may have an endpoint that is gone.
    #[must_use]
    pub fn may_have_lost(&self, claim: Claim, key: &[u8], made_for: Stamp) -> bool {
        self.aggregate(claim, key)
            .is_some_and(|found| made_for < found.lost)
    }

    /// The pod that owns a target, if a registration wants that of it.
    #[must_use]
    pub fn owner_in(&self, id: RegistrationId, target: &Target) -> Option<PodId> {
        let owner = self.owner(target)?;
        let member = self.registration(id)?.members.get(&owner)?;
        member.targets.contains(target).then_some(owner)
    }

    /// The endpoints of a record for all pods: of each target that of the pod that owns it.
    pub fn parts(&self, id: RegistrationId, key: &[u8]) -> impl Iterator<Item = Part<'_>> {
        let stored = self.registration(id);
        let serving = stored.and_then(|stored| Some((stored, stored.serving()?)));
        let members = serving.into_iter().flat_map(|(stored, accepted)| {
            let members = stored.members.iter();
            members.map(move |(pod, member)| (accepted, *pod, member))
        });
        let of_all = members.filter(|(_, _, member)| member.in_aggregates);
        of_all.flat_map(move |(accepted, id, member)| {
            let targets = member.keys.iter().zip(&member.targets);
            targets.filter_map(move |(at, target)| {
                if **at != *key || self.owner(target) != Some(id) {
                    return None;
                }
                let pod = self.pods.get(id)?;
                Some(Part {
                    entry: Entry {
                        target: *target,
                        weight: accepted.weight,
                        zone: self.zone(pod),
                    },
                    pod: id,
                    uid: pod.uid,
                    created: pod.created,
                })
            })
        })
    }

    /// What the record for all pods at a key is for.
    #[must_use]
    pub fn aggregate_at(&self, id: RegistrationId, key: &[u8]) -> Option<Aggregate<'_>> {
        let stored = self.registration(id)?;
        let accepted = stored.serving()?;
        let at = stored.aggregates.iter().position(|a| *a.key == *key)?;
        let port = accepted.ports.get(at)?;
        Some(Aggregate {
            cluster: &self.settings.cluster_name,
            namespace: &stored.namespace,
            service: &accepted.service,
            port_name: &port.name,
            scheme: &port.scheme,
        })
    }

    /// The keys of the records for all pods that an accepted registration wants, in the order of its ports.
    fn aggregate_keys(&self, namespace: &str, accepted: &Accepted) -> Vec<Key> {
        let place = Place {
            prefix: &accepted.prefix,
        };
        let ports = accepted.ports.iter();
        let keys = ports.filter_map(|port| {
            let aggregate = Aggregate {
                cluster: &self.settings.cluster_name,
                namespace,
                service: &accepted.service,
                port_name: &port.name,
                scheme: &port.scheme,
            };
            accepted.format.aggregate_key(&place, &aggregate)
        });
        keys.map(|key| Key::from(key.as_bytes())).collect()
    }

    /// Claims exactly these keys for all pods of a registration.
    fn set_aggregates(&mut self, id: RegistrationId, keys: Vec<Key>, touched: &mut Touched) {
        let Some(Some(stored)) = self.registrations.get_mut(id as usize) else {
            return;
        };
        if keys.is_empty() && stored.aggregates.is_empty() {
            return;
        }
        let claim = Claim {
            registration: id,
            pod: None,
        };
        for old in std::mem::take(&mut stored.aggregates) {
            release(&mut self.claims, &old.key, claim);
            touched.keys.push(old.key);
        }
        for key in &keys {
            self.claims.entry(Arc::clone(key)).or_default().push(claim);
            touched.keys.push(Arc::clone(key));
        }
        self.last_stamp += 1;
        let stamp = self.last_stamp;
        if let Some(Some(stored)) = self.registrations.get_mut(id as usize) {
            let new = keys.into_iter().map(|key| AggregateRecord {
                key,
                stamp,
                lost: stamp,
            });
            stored.aggregates = new.collect();
        }
    }

    /// The records for all pods at these keys may be others. `lost`: they may have lost an endpoint.
    fn change_aggregates(&mut self, id: RegistrationId, keys: &[Key], lost: bool) {
        self.last_stamp += 1;
        let stamp = self.last_stamp;
        if let Some(Some(stored)) = self.registrations.get_mut(id as usize) {
            for aggregate in &mut stored.aggregates {
                if keys.contains(&aggregate.key) {
                    aggregate.stamp = stamp;
                    if lost {
                        aggregate.lost = stamp;
                    }
                }
            }
        }
    }

    /// What the record that a claim of one pod wants at a key stands for.
    #[must_use]
    pub fn targets_at(&self, claim: Claim, key: &[u8]) -> SmallVec<[Target; 1]> {
        match self.member(claim).and_then(|member| member.target_of(key)) {
            Some(target) => SmallVec::from_elem(*target, 1),
            None => self
                .record(claim, key, "")
                .map(|record| record.targets.into())
                .unwrap_or_default(),
        }
    }

    /// The record that a claim of one pod wants at a key; `zone` stands in where the pod's is not known.
    #[must_use]
    pub fn record(&self, claim: Claim, key: &[u8], zone: &str) -> Option<Record> {
        let accepted = self.registration(claim.registration)?.serving()?;
        let pod = self.pods.get(claim.pod?)?;
        let known = self.zone(pod);
        let zone = if known.is_empty() { zone } else { known };
        let only = self.member(claim).and_then(|member| member.target_of(key));
        let found = self.endpoints(accepted, pod, zone, only).ok()?;
        let place = Place {
            prefix: &accepted.prefix,
        };
        accepted
            .format
            .records(&place, &found)
            .into_iter()
            .find(|record| record.key.as_bytes() == key)
    }

    /// The zone of a pod: its label, else its node's; empty when unknown.
    #[must_use]
    pub fn zone<'a>(&'a self, pod: &'a StoredPod) -> &'a str {
        pod.label(ZONE_LABEL)
            .or_else(|| self.zones.get(&*pod.node).map(|(zone, _)| &**zone))
            .unwrap_or("")
    }

    fn endpoints(
        &self,
        accepted: &Accepted,
        pod: &StoredPod,
        zone: &str,
        only: Option<&Target>,
    ) -> Result<Vec<Endpoint>, String> {
        let uid = self.pods.uid_text(pod.uid);
        let cluster = &self.settings.cluster_name;
        endpoints(accepted, cluster, pod, &uid, zone, only)
    }

    // === what changes it: pods ===

    /// A pod was listed, added or modified. One that is older than what is known is ignored, unless
    /// `older_too` (Kubernetes was restored from a backup).
    pub fn apply_pod(&mut self, pod: Pod, older_too: bool, touched: &mut Touched) {
        let mut packed = self.pods.pack(pod);
        packed.epoch = self.epoch;
        let id = match self.pods.find(packed.uid) {
            Some(id) => {
                let Some(known) = self.pods.get_mut(id) else {
                    return;
                };
                if packed.resource_version < known.resource_version && !older_too {
                    known.epoch = packed.epoch;
                    return;
                }
                packed.place = known.place;
                // A pod is created once; its place among the others hangs on it.
                packed.created = known.created;
                // A pod that left stays gone, whatever an old view says.
                packed.left = packed.left || (known.left && !older_too);
                let same = known.shows_the_same(&packed);
                self.pods.replace(id, packed);
                if same {
                    return;
                }
                id
            }
            None => {
                let namespace = Arc::clone(&packed.namespace);
                let members = Self::namespace(&mut self.namespaces, &self.policy, namespace);
                packed.place = u32::try_from(members.pods.len()).unwrap_or(u32::MAX);
                let id = self.pods.insert(packed);
                members.pods.push(id);
                id
            }
        };
        self.refresh_pod(id, touched);
    }

    /// A pod was deleted.
    pub fn delete_pod(&mut self, uid: &str, touched: &mut Touched) {
        if let Some(id) = self.pods.find(self.pods.uid(uid)) {
            self.remove_pod(id, touched);
        }
    }

    fn remove_pod(&mut self, id: PodId, touched: &mut Touched) {
        let Some(pod) = self.pods.get(id) else { return };
        let (namespace, place) = (Arc::clone(&pod.namespace), pod.place);
        let members = Self::namespace(&mut self.namespaces, &self.policy, Arc::clone(&namespace));
        let registrations = members.registrations.clone();
        for registration in registrations {
            self.leave(registration, id, touched);
            if let Some(stored) = self.registration(registration)
                && matches!(stored.standing, Standing::Kept { .. })
            {
                touched.kept.insert(Arc::clone(&stored.full_name));
            }
        }
        if let Some(members) = self.namespaces.get_mut(&namespace) {
            if (place as usize) < members.pods.len() {
                members.pods.swap_remove(place as usize);
            }
            if let Some(moved) = members
                .pods
                .get(place as usize)
                .and_then(|m| self.pods.get_mut(*m))
            {
                moved.place = place;
            }
            if members.pods.is_empty() && members.registrations.is_empty() {
                self.namespaces.remove(&namespace);
            }
        }
        self.pods.remove(id);
    }

    fn refresh_pod(&mut self, id: PodId, touched: &mut Touched) {
        let Some(pod) = self.pods.get(id) else { return };
        let Some(namespace) = self.namespaces.get(&pod.namespace) else {
            return;
        };
        for at in 0..namespace.registrations.len() {
            let Some(registration) = self
                .pods
                .get(id)
                .and_then(|pod| self.namespaces.get(&pod.namespace))
                .and_then(|namespace| namespace.registrations.get(at).copied())
            else {
                return;
            };
            if self.selects(registration, id) {
                self.join(registration, id, touched);
            } else {
                self.leave(registration, id, touched);
            }
        }
    }

    /// A pod counts for a registration from now on, or may count in another way.
    fn join(&mut self, registration: RegistrationId, id: PodId, touched: &mut Touched) {
        let member_already = self
            .registration(registration)
            .is_some_and(|stored| stored.members.contains_key(&id));
        let moved = if member_already {
            Vec::new()
        } else {
            self.take_place(registration, id)
        };
        let member = self.judge(registration, id);
        self.set_member(registration, id, Some(member), touched);
        self.judge_moved(moved, touched);
    }

    /// A pod does not count for a registration any more, if it did.
    fn leave(&mut self, registration: RegistrationId, id: PodId, touched: &mut Touched) {
        let member = self
            .registration(registration)
            .is_some_and(|stored| stored.members.contains_key(&id));
        let place = member.then(|| self.place(registration, id)).flatten();
        self.set_member(registration, id, None, touched);
        if let Some(place) = place {
            let moved = self.give_up_place(&place);
            self.judge_moved(moved, touched);
        }
    }

    /// Pods that a limit leaves out now, or does not any more.
    fn judge_moved(&mut self, moved: Vec<PodPlace>, touched: &mut Touched) {
        for place in moved {
            let (registration, pod) = (place.registration, place.pod);
            let counts = self
                .registration(registration)
                .is_some_and(|stored| stored.members.contains_key(&pod));
            if counts {
                let member = self.judge(registration, pod);
                self.set_member(registration, pod, Some(member), touched);
            }
        }
    }

    /// Whether a pod counts for a registration: ready or not, it holds its place.
    fn selects(&self, registration: RegistrationId, id: PodId) -> bool {
        let accepted = self
            .registration(registration)
            .and_then(StoredRegistration::serving);
        let (Some(accepted), Some(pod)) = (accepted, self.pods.get(id)) else {
            return false;
        };
        !pod.left && accepted.selector.matches(|key| pod.label(key))
    }

    /// What a pod that a registration selects means to it now.
    fn judge(&self, registration: RegistrationId, id: PodId) -> (Member, Option<String>) {
        let nothing = (Member::default(), None);
        let Some(accepted) = self
            .registration(registration)
            .and_then(StoredRegistration::serving)
        else {
            return nothing;
        };
        let Some(pod) = self.pods.get(id) else {
            return nothing;
        };
        let mut member = Member {
            ready: pod.ready,
            ..Member::default()
        };
        if !(pod.ready || accepted.publish_not_ready) {
            return (member, None);
        }
        member.beyond = self.beyond(registration, id);
        if member.beyond.is_some() {
            return (member, None);
        }
        let place = Place {
            prefix: &accepted.prefix,
        };
        let keys = self
            .endpoints(accepted, pod, self.zone(pod), None)
            .and_then(|found| accepted.format.keys(&place, &found));
        match keys {
            Ok(keys) if accepted.format.is_aggregate() => {
                member.one_each = true;
                member.in_aggregates = true;
                let shared = self.registration(registration).map(|r| &r.aggregates);
                for (key, targets) in keys {
                    let mut shared = shared.into_iter().flatten();
                    let key = match shared.find(|known| *known.key == *key.as_bytes()) {
                        Some(known) => Arc::clone(&known.key),
                        None => key.as_bytes().into(),
                    };
                    for target in targets {
                        member.one_each &= !member.targets.contains(&target);
                        member.keys.push(Arc::clone(&key));
                        member.targets.push(target);
                    }
                }
                (member, None)
            }
            Ok(keys) => {
                member.one_each = true;
                for (key, targets) in keys {
                    member.keys.push(key.as_bytes().into());
                    member.one_each &= targets.len() == 1;
                    for target in targets {
                        if member.targets.contains(&target) {
                            member.one_each = false;
                        } else {
                            member.targets.push(target);
                        }
                    }
                }
                (member, None)
            }
            // A pod without an address yet is nothing to speak of.
            Err(_) if pod.ips().next().is_none() => (member, None),
            Err(why) => {
                member.lacks = true;
                (member, Some(why))
            }
        }
    }

    // === limits ===

    fn namespace<'a>(
        namespaces: &'a mut HashMap<Arc<str>, Namespace>,
        policy: &Policy,
        name: Arc<str>,
    ) -> &'a mut Namespace {
        namespaces
            .entry(name)
            .or_insert_with_key(|name| Namespace::new(policy.limits(name)))
    }

    /// The place of a pod in a registration that is served.
    fn place(&self, registration: RegistrationId, id: PodId) -> Option<PodPlace> {
        let stored = self.registration(registration)?;
        let accepted = stored.serving()?;
        let pod = self.pods.get(id)?;
        Some(PodPlace {
            since: pod.created.max(stored.created),
            registration_created: stored.created,
            full_name: Arc::clone(&stored.full_name),
            pod_created: pod.created,
            uid: pod.uid,
            endpoints: endpoints_of_a_pod(accepted),
            registration,
            pod: id,
        })
    }

    /// The places of a registration's pods.
    fn places(&self, registration: RegistrationId) -> Vec<PodPlace> {
        let stored = self.registration(registration);
        let pods = stored.into_iter().flat_map(|stored| stored.members.keys());
        pods.filter_map(|pod| self.place(registration, *pod))
            .collect()
    }

    /// Those of them that are within its limit, and so in the bound of the namespace.
    fn admitted_places(&self, registration: RegistrationId) -> Vec<PodPlace> {
        let mut places = self.places(registration);
        if let Some(stored) = self.registration(registration) {
            places.retain(|place| stored.bound.admits(place));
        }
        places
    }

    /// The limit that leaves a pod out.
    fn beyond(&self, registration: RegistrationId, id: PodId) -> Option<Beyond> {
        let stored = self.registration(registration)?;
        let namespace = self.namespaces.get(&stored.namespace)?;
        if stored.bound.admits_all() && namespace.endpoints.admits_all() {
            return None;
        }
        let place = self.place(registration, id)?;
        if !stored.bound.admits(&place) {
            return Some(Beyond::Registration);
        }
        (!namespace.endpoints.admits(&place)).then_some(Beyond::Namespace)
    }

    /// Works on the bound of a namespace; the second argument gives what is in it already, but for one
    /// registration.
    fn with_endpoints<R>(
        &mut self,
        name: &Arc<str>,
        except: Option<RegistrationId>,
        work: impl FnOnce(&mut Bound<PodPlace>, &dyn Fn() -> Vec<PodPlace>) -> R,
    ) -> Option<R> {
        let namespace = self.namespaces.get_mut(name)?;
        let mut bound = std::mem::take(&mut namespace.endpoints);
        let others = || -> Vec<PodPlace> {
            let registrations = self.namespaces.get(name).map(|found| &found.registrations);
            registrations
                .into_iter()
                .flatten()
                .filter(|id| Some(**id) != except)
                .flat_map(|id| self.admitted_places(*id))
                .collect()
        };
        let result = work(&mut bound, &others);
        if let Some(namespace) = self.namespaces.get_mut(name) {
            namespace.endpoints = bound;
        }
        Some(result)
    }

    fn with_bound<R>(
        &mut self,
        registration: RegistrationId,
        work: impl FnOnce(&mut Bound<PodPlace>, &dyn Fn() -> Vec<PodPlace>) -> R,
    ) -> Option<R> {
        let stored = self
            .registrations
            .get_mut(registration as usize)?
            .as_mut()?;
        let mut bound = std::mem::take(&mut stored.bound);
        let result = work(&mut bound, &|| self.places(registration));
        if let Some(Some(stored)) = self.registrations.get_mut(registration as usize) {
            stored.bound = bound;
        }
        Some(result)
    }

    /// A pod that is about to count takes its place; gives all whose standing changed with it.
    fn take_place(&mut self, registration: RegistrationId, id: PodId) -> Vec<PodPlace> {
        let (Some(place), Some(namespace)) = (
            self.place(registration, id),
            self.registration(registration)
                .map(|stored| Arc::clone(&stored.namespace)),
        ) else {
            return Vec::new();
        };
        let own = vec![place.clone()];
        let mut moved = self
            .with_bound(registration, |bound, others| bound.add(own, others))
            .unwrap_or_default();
        let freed = self.with_endpoints(&namespace, None, |bound, others| {
            let mut changed = Vec::new();
            for out in moved.iter().filter(|out| **out != place) {
                changed.extend(bound.remove(out));
            }
            if !moved.contains(&place) {
                changed.extend(bound.add(vec![place.clone()], others));
            }
            changed
        });
        moved.extend(freed.into_iter().flatten());
        moved
    }

    /// A pod that does not count any more gives up its place; gives all whose standing changed with it.
    fn give_up_place(&mut self, place: &PodPlace) -> Vec<PodPlace> {
        let registration = place.registration;
        let Some(namespace) = self
            .registration(registration)
            .map(|stored| Arc::clone(&stored.namespace))
        else {
            return Vec::new();
        };
        let (was_within, mut moved) = self
            .with_bound(registration, |bound, _| {
                (bound.admits(place), bound.remove(place))
            })
            .unwrap_or_default();
        let next = moved.clone();
        let changed = self.with_endpoints(&namespace, None, |bound, others| {
            let mut changed = Vec::new();
            if was_within {
                changed.extend(bound.remove(place));
            }
            changed.extend(bound.add(next, others));
            changed
        });
        moved.extend(changed.into_iter().flatten());
        moved
    }

    fn set_member(
        &mut self,
        registration: RegistrationId,
        pod: PodId,
        new: Option<(Member, Option<String>)>,
        touched: &mut Touched,
    ) {
        let Some(stored) = self
            .registrations
            .get_mut(registration as usize)
            .and_then(Option::as_mut)
        else {
            return;
        };
        let old = stored.members.remove(&pod);
        if old.is_none() && new.is_none() {
            let gone = self.pods.get(pod).is_none_or(|pod| pod.left || !pod.ready);
            if gone && matches!(stored.standing, Standing::Kept { .. }) {
                touched.kept.insert(Arc::clone(&stored.full_name));
            }
            return;
        }
        touched.registrations.insert(registration);
        let Some(known) = self.pods.get(pod) else {
            return;
        };
        let was = old.as_ref().is_some_and(|member| !member.keys.is_empty());
        if let Some(old) = &old {
            stored.selected -= 1;
            stored.ready -= u32::from(old.ready);
            stored.count_beyond(old.beyond, -1);
            if old.lacks {
                stored.lacking.retain(|(name, _)| *name != known.name);
            }
        }
        let mut is = false;
        let mut new_member = None;
        if let Some((member, why)) = new {
            stored.selected += 1;
            stored.ready += u32::from(member.ready);
            stored.count_beyond(member.beyond, 1);
            if let Some(why) = why {
                stored.lacking.insert((known.name.clone(), why));
            }
            is = !member.keys.is_empty();
            new_member = Some(member);
        }
        if was != is {
            touched.turned.push((registration, known.uid, is));
            let by = if is { 1 } else { -1 };
            stored.pods_wanted = stored.pods_wanted.saturating_add_signed(by);
        }
        if let Some(old) = old.as_ref().filter(|_| !is) {
            touched.unwanted.push((registration, known.uid));
            if was
                && new_member
                    .as_ref()
                    .is_some_and(|new| !new.ready && new.beyond.is_none())
            {
                touched.unready.push(Unready {
                    registration,
                    uid: known.uid,
                    keys: old.keys.clone(),
                    targets: old.targets.clone(),
                });
            }
        }
        let claim = Claim {
            registration,
            pod: Some(pod),
        };
        self.note_parts(registration, old.as_ref(), new_member.as_ref());
        if let Some(old) = old {
            for target in &old.targets {
                touched.targets.push(*target);
                self.touch_target(target, touched);
                release(&mut self.targets, target, claim);
            }
            if !old.in_aggregates {
                for key in &old.keys {
                    release(&mut self.claims, key, claim);
                }
            }
            touched.keys.extend(old.keys);
        }
        if let Some(mut member) = new_member {
            self.last_stamp += 1;
            member.stamp = self.last_stamp;
            for key in &member.keys {
                if !member.in_aggregates {
                    self.claims.entry(Arc::clone(key)).or_default().push(claim);
                }
                touched.keys.push(Arc::clone(key));
            }
            let targets = member.targets.clone();
            if let Some(stored) = self
                .registrations
                .get_mut(registration as usize)
                .and_then(Option::as_mut)
            {
                stored.members.insert(pod, member);
            }
            for target in &targets {
                touched.targets.push(*target);
                self.targets.entry(*target).or_default().push(claim);
                self.touch_target(target, touched);
            }
        }
    }

    /// A pod is another part of the records for all pods of a registration.
    fn note_parts(&mut self, id: RegistrationId, old: Option<&Member>, new: Option<&Member>) {
        let old = old.filter(|member| member.in_aggregates);
        let new = new.filter(|member| member.in_aggregates);
        let Some(some) = old.or(new) else { return };
        let stays = |key: &Key, target: &Target| {
            new.is_some_and(|new| {
                let mut parts = new.keys.iter().zip(&new.targets);
                parts.any(|part| part == (key, target))
            })
        };
        let lost = old.is_some_and(|old| {
            let mut parts = old.keys.iter().zip(&old.targets);
            parts.any(|(key, target)| !stays(key, target))
        });
        let mut keys: Vec<Key> = some.keys.to_vec();
        if let (Some(_), Some(new)) = (old, new) {
            keys.extend(new.keys.iter().cloned());
        }
        self.change_aggregates(id, &keys, lost);
    }

    /// Where several want one target, who owns it may have changed, and with it their keys.
    fn touch_target(&mut self, target: &Target, touched: &mut Touched) {
        let several = self.targets.get(target).filter(|claims| claims.len() > 1);
        let Some(claims) = several.cloned() else {
            return;
        };
        touched.keys.extend(self.keys_for(target).cloned());
        for claim in claims {
            let member = self.member(claim).filter(|member| member.in_aggregates);
            if let Some(keys) = member.map(|member| member.keys.to_vec()) {
                self.change_aggregates(claim.registration, &keys, true);
            }
        }
    }

    // === what changes it: nodes ===

    /// A node was listed, added or modified.
    pub fn apply_node(&mut self, node: Node, touched: &mut Touched) {
        let epoch = self.epoch;
        let known = self.zones.get(&node.name).map_or("", |(zone, _)| zone);
        let changed = *known != *node.zone;
        let name = node.name.clone();
        self.zones.insert(node.name, (node.zone, epoch));
        if changed {
            self.refresh_node(&name, touched);
        }
    }

    /// A node was deleted.
    pub fn delete_node(&mut self, name: &str, touched: &mut Touched) {
        if self
            .zones
            .remove(name)
            .is_some_and(|(zone, _)| !zone.is_empty())
        {
            self.refresh_node(name, touched);
        }
    }

    fn refresh_node(&mut self, name: &str, touched: &mut Touched) {
        let on_node: Vec<PodId> = self
            .pods
            .iter()
            .filter(|(_, pod)| *pod.node == *name)
            .map(|(id, _)| id)
            .collect();
        for id in on_node {
            self.refresh_pod(id, touched);
        }
    }

    // === what changes it: registrations ===

    /// A registration was listed, added or modified. One that is older than what is known is ignored, unless
    /// `older_too`; also an earlier one of the same name that was deleted since.
    pub fn apply_registration(
        &mut self,
        object: Registration,
        older_too: bool,
        touched: &mut Touched,
    ) {
        let full_name = format!("{}/{}", object.namespace, object.name);
        if object.deleting {
            self.delete_registration(&full_name, &object.uid, touched);
            return;
        }
        let epoch = self.epoch;
        let known = self.by_name.get(&*full_name).copied();
        if let Some(stored) = known.and_then(|id| self.registrations.get_mut(id as usize)?.as_mut())
        {
            stored.epoch = epoch;
            if object.resource_version < stored.resource_version && !older_too {
                return;
            }
            if stored.uid != object.uid {
                // Deleted and made anew while we did not look.
                let known_uid = stored.uid.clone();
                self.delete_registration(&full_name, &known_uid, touched);
            }
        }
        let spec = object.spec.map(Box::new);
        let status = object.status.map(Box::new);
        if let Some(id) = self.by_name.get(&*full_name).copied() {
            let Some(stored) = self
                .registrations
                .get_mut(id as usize)
                .and_then(Option::as_mut)
            else {
                return;
            };
            stored.resource_version = object.resource_version;
            touched.statuses.push((id, status));
            touched.registrations.insert(id);
            if stored.generation == object.generation && stored.spec == spec {
                return;
            }
            stored.generation = object.generation;
            stored.spec = spec;
            self.rejudge(id, touched);
            return;
        }
        let full_name: Arc<str> = full_name.into();
        let namespace: Arc<str> = object.namespace.into();
        let stored = StoredRegistration {
            namespace: Arc::clone(&namespace),
            name: object.name.into(),
            full_name: Arc::clone(&full_name),
            uid: object.uid,
            generation: object.generation,
            resource_version: object.resource_version,
            created: object.created,
            standing: Standing::Kept {
                refusal: Refusal {
                    reason: reason::UNREADABLE,
                    message: String::new(),
                },
                last: None,
            },
            slot: None,
            aggregates: Vec::new(),
            spec,
            selected: 0,
            ready: 0,
            pods_wanted: 0,
            lacking: BTreeSet::new(),
            beyond_own_limit: 0,
            beyond_namespace_limit: 0,
            members: HashMap::default(),
            bound: Bound::new(0),
            epoch: self.epoch,
        };
        let id = if let Some(id) = self.free.pop() {
            if let Some(slot) = self.registrations.get_mut(id as usize) {
                *slot = Some(stored);
            }
            id
        } else {
            self.registrations.push(Some(stored));
            u32::try_from(self.registrations.len() - 1).unwrap_or(u32::MAX)
        };
        touched.statuses.push((id, status));
        self.by_name.insert(full_name, id);
        let own = self.registration_place(id);
        let members = Self::namespace(&mut self.namespaces, &self.policy, Arc::clone(&namespace));
        let mut served = std::mem::take(&mut members.served);
        let moved = served.add(own.into_iter().collect(), || {
            self.registration_places(&namespace)
        });
        let members = Self::namespace(&mut self.namespaces, &self.policy, namespace);
        members.served = served;
        members.registrations.push(id);
        self.rejudge(id, touched);
        for place in moved.iter().filter(|place| place.registration != id) {
            self.rejudge(place.registration, touched);
        }
    }

    fn registration_place(&self, id: RegistrationId) -> Option<RegistrationPlace> {
        self.registration(id).map(|stored| RegistrationPlace {
            created: stored.created,
            name: Arc::clone(&stored.name),
            registration: id,
        })
    }

    fn registration_places(&self, namespace: &str) -> Vec<RegistrationPlace> {
        let found = self.namespaces.get(namespace);
        let ids = found.into_iter().flat_map(|found| &found.registrations);
        ids.filter_map(|id| self.registration_place(*id)).collect()
    }

    /// A registration was deleted; one of that name with another UID is not meant.
    pub fn delete_registration(&mut self, full_name: &str, uid: &str, touched: &mut Touched) {
        let Some(id) = self.by_name.get(full_name).copied() else {
            return;
        };
        let Some(stored) = self.registration(id) else {
            return;
        };
        if stored.uid != uid {
            return;
        }
        let namespace = Arc::clone(&stored.namespace);
        touched.removed.push((id, Arc::clone(&stored.full_name)));
        let mut members: Vec<PodId> = stored.members.keys().copied().collect();
        members.sort_unstable();
        let places = self.admitted_places(id);
        for pod in members {
            self.set_member(id, pod, None, touched);
        }
        self.set_aggregates(id, Vec::new(), touched);
        let moved = self.with_endpoints(&namespace, Some(id), |bound, _| {
            let freed = places.iter().flat_map(|place| bound.remove(place));
            freed.collect::<Vec<PodPlace>>()
        });
        self.judge_moved(moved.unwrap_or_default(), touched);
        let place = self.registration_place(id);
        self.by_name.remove(full_name);
        if let Some(slot) = self.registrations.get_mut(id as usize) {
            *slot = None;
        }
        self.free.push(id);
        touched.registrations.remove(&id);
        if let Some(members) = self.namespaces.get_mut(&namespace) {
            members.registrations.retain(|other| *other != id);
            let next = place.map(|place| members.served.remove(&place));
            if members.pods.is_empty() && members.registrations.is_empty() {
                self.namespaces.remove(&namespace);
            }
            for place in next.into_iter().flatten() {
                self.rejudge(place.registration, touched);
            }
        }
    }

    /// The policy is another: every registration is judged by it.
    pub fn set_policy(&mut self, policy: Policy, touched: &mut Touched) {
        if policy == self.policy {
            return;
        }
        self.policy = policy;
        let names: Vec<Arc<str>> = self.namespaces.keys().cloned().collect();
        for name in names {
            let limits = self.policy.limits(&name);
            let registrations = self.registration_places(&name);
            self.with_endpoints(&name, None, |bound, all| {
                bound.set_limit(limits.endpoints, all);
            });
            if let Some(namespace) = self.namespaces.get_mut(&name) {
                namespace
                    .served
                    .set_limit(limits.registrations, || registrations);
            }
        }
        let all: Vec<RegistrationId> = self.by_name.values().copied().collect();
        for id in all {
            self.rejudge(id, touched);
        }
    }

    /// Accepts or refuses a registration anew and looks at every pod of its namespace.
    fn rejudge(&mut self, id: RegistrationId, touched: &mut Touched) {
        let places_before = self.admitted_places(id);
        let served = self.is_served(id);
        let Some(stored) = self
            .registrations
            .get_mut(id as usize)
            .and_then(Option::as_mut)
        else {
            return;
        };
        touched.registrations.insert(id);
        let limits = self.policy.limits(&stored.namespace);
        let verdict = match &stored.spec {
            _ if !served => Err(too_many(&stored.namespace, limits.registrations)),
            Ok(spec) => accept(
                &stored.namespace,
                &stored.name,
                spec,
                &self.policy,
                &self.settings,
            ),
            Err(why) => Err(Refusal {
                reason: reason::UNREADABLE,
                message: why.clone(),
            }),
        };
        stored.standing = match verdict {
            Ok(accepted) => Standing::Serving(Arc::new(accepted)),
            Err(refusal) => {
                let last = match &stored.standing {
                    Standing::Serving(accepted) => Some(Arc::clone(accepted)),
                    Standing::Kept { last, .. } => last.clone(),
                };
                Standing::Kept { refusal, last }
            }
        };
        let slot = stored.serving().map(|accepted| slot_name(stored, accepted));
        stored.slot = slot.map(Arc::new);
        stored.bound = Bound::new(limits.endpoints_per_registration);
        let mut pods: BTreeSet<PodId> = stored.members.keys().copied().collect();
        let namespace = Arc::clone(&stored.namespace);
        let serving = match &stored.standing {
            Standing::Serving(accepted) => Some(Arc::clone(accepted)),
            Standing::Kept { .. } => None,
        };
        let aggregates = serving.as_ref().map(|a| self.aggregate_keys(&namespace, a));
        self.set_aggregates(id, aggregates.unwrap_or_default(), touched);
        if serving.is_some()
            && let Some(namespace) = self.namespaces.get(&namespace)
        {
            pods.extend(namespace.pods.iter().copied());
        }
        let selected: BTreeSet<PodId> = pods
            .iter()
            .copied()
            .filter(|pod| self.selects(id, *pod))
            .collect();
        let mut places: Vec<PodPlace> = selected
            .iter()
            .filter_map(|pod| self.place(id, *pod))
            .collect();
        if let Some(Some(stored)) = self.registrations.get_mut(id as usize) {
            let out = stored.bound.add(places.clone(), Vec::new);
            if !out.is_empty() {
                places.retain(|place| stored.bound.admits(place));
            }
        }
        let moved = self.with_endpoints(&namespace, Some(id), |bound, others| {
            let mut moved = Vec::new();
            for place in &places_before {
                moved.extend(bound.remove(place));
            }
            moved.extend(bound.add(places, others));
            moved
        });
        let unready = touched.unready.len();
        for pod in pods {
            let member = selected.contains(&pod).then(|| self.judge(id, pod));
            self.set_member(id, pod, member, touched);
        }
        // What another spec or policy takes away, somebody wanted so.
        touched.unready.truncate(unready);
        let mut others: Vec<PodPlace> = moved.into_iter().flatten().collect();
        others.retain(|place| place.registration != id);
        self.judge_moved(others, touched);
    }

    /// Whether a registration is among those of its namespace that the limit lets be served.
    fn is_served(&self, id: RegistrationId) -> bool {
        let found = self
            .registration(id)
            .and_then(|stored| self.namespaces.get(&stored.namespace));
        found
            .zip(self.registration_place(id))
            .is_none_or(|(namespace, place)| namespace.served.admits(&place))
    }

    // === lists ===

    /// A list begins: what it does not name by its end is gone.
    pub fn begin_list(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// The list of pods that began at `epoch` is complete.
    pub fn end_pods(&mut self, epoch: u32, touched: &mut Touched) {
        let gone: Vec<PodId> = self
            .pods
            .iter()
            .filter(|(_, pod)| older(pod.epoch, epoch))
            .map(|(id, _)| id)
            .collect();
        for id in gone {
            self.remove_pod(id, touched);
        }
    }

    /// The list of nodes that began at `epoch` is complete.
    pub fn end_nodes(&mut self, epoch: u32, touched: &mut Touched) {
        let mut gone: Vec<Box<str>> = self
            .zones
            .iter()
            .filter(|(_, (_, seen))| older(*seen, epoch))
            .map(|(name, _)| name.clone())
            .collect();
        gone.sort_unstable();
        for name in gone {
            self.delete_node(&name, touched);
        }
    }

    /// The list of registrations that began at `epoch` is complete.
    pub fn end_registrations(&mut self, epoch: u32, touched: &mut Touched) {
        let gone: Vec<(Arc<str>, String)> = self
            .registrations()
            .filter(|(_, stored)| older(stored.epoch, epoch))
            .map(|(_, stored)| (Arc::clone(&stored.full_name), stored.uid.clone()))
            .collect();
        for (name, uid) in gone {
            self.delete_registration(&name, &uid, touched);
        }
    }

    /// The number of the newest list that began.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }
}

/// Whether a list number comes before another; numbers wrap around.
fn older(seen: u32, epoch: u32) -> bool {
    seen != epoch && epoch.wrapping_sub(seen) < u32::MAX / 2
}

/// More registrations than the policy lets a namespace have.
fn too_many(namespace: &str, most: u32) -> Refusal {
    Refusal {
        reason: reason::TOO_MANY_REGISTRATIONS,
        message: format!(
            "at most {most} ServiceRegistrations of a namespace are served, those that were created first, and namespace {namespace} has more: \
             delete some, or ask an administrator to raise `registrations` for this namespace under `limits` in the policy file"
        ),
    }
}

/// The slot that a registration's records belong on.
fn slot_name(stored: &StoredRegistration, accepted: &Accepted) -> SlotName {
    SlotName {
        registration: Arc::clone(&stored.full_name),
        scope: accepted.scope.as_str().into(),
        ttl: accepted.ttl,
        format: accepted.format.name().into(),
        prefix: accepted.prefix.as_str().into(),
        service: accepted.service.as_str().into(),
    }
}

fn release<K: std::hash::Hash + Eq>(
    map: &mut HashMap<K, SmallVec<[Claim; 1]>>,
    key: &K,
    claim: Claim,
) {
    if let Some(claims) = map.get_mut(key) {
        if let Some(at) = claims.iter().position(|other| *other == claim) {
            claims.swap_remove(at);
        }
        if claims.is_empty() {
            map.remove(key);
        }
    }
}

#[cfg(test)]
mod tests;
