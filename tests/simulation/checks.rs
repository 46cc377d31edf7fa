//! What must hold after every step, over the record of a watcher.
//!
//! Takes requests as they are sent and changes as etcd makes them, panics where a promise is broken. It
//! knows what no process knows: the true state of Kubernetes and of etcd. Must never judge by what an
//! operator believes.

use std::collections::{BTreeMap, BTreeSet};

use etcd_registrar::model::etcd::{Compare, Key, KeyValue, LeaseId, Op, Request, Txn};
use etcd_registrar::model::pod::Pod;

use crate::expected::{Wanted, nodes, without_zone};
use crate::model_etcd::{Author, Change, Etcd, show};
use crate::model_kube::Kube;
use crate::oracle::{Known, Oracle, POLICIES, Standing};
use crate::world::{CLUSTER_UIDS, Knobs, REGISTRAR, Sent, Slot, Term, is_record, slot, uid};

/// The mark of a lane: pods, registrations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Mark {
    pods: u64,
    registrations: u64,
}

impl Mark {
    fn read(value: &[u8]) -> Self {
        let value: serde_json::Value = serde_json::from_slice(value).expect("a mark is JSON");
        let member = |name: &str| value.get(name).and_then(serde_json::Value::as_u64);
        Self {
            pods: member("pods").expect("the pods of a mark"),
            registrations: member("registrations").expect("the registrations of a mark"),
        }
    }

    fn max(self, other: Self) -> Self {
        Self {
            pods: self.pods.max(other.pods),
            registrations: self.registrations.max(other.registrations),
        }
    }
}

/// What is remembered for the checks.
#[derive(Debug)]
pub(crate) struct Checks {
    several: bool,
    hands: bool,
    /// The shape of transactions is not looked at: what they do has to show what is wrong with them.
    pub(crate) shapeless: bool,
    /// One process sees it all.
    one_process: bool,
    records_may_expire: bool,
    /// Leases whose key a hand took away while nobody led, and nobody put back: a leader who never saw it can't know that
    /// what stands there is ours, and leaves it alone.
    disowned: BTreeSet<LeaseId>,
    /// What the applied transactions of each lane were planned from, in this term.
    acted: BTreeMap<Key, Mark>,
    /// And those of all lanes in earlier terms.
    before: Mark,
    /// The lane of the transaction that was applied last, and what its plan was made from.
    lane: Option<Key>,
    known: Option<Known>,
    /// What records were put from.
    put_at: BTreeMap<Key, Known>,
    /// What each lease that ever had a key below `leases/` was for.
    slots: BTreeMap<LeaseId, Slot>,
    /// Keys that came into being by a hand, as they were when etcd was saved.
    foreign_saved: BTreeSet<Key>,
    /// Pods whose records were deleted by someone who knew that they had left, by lane: what another
    /// lane was told to put before may still come.
    removed: BTreeMap<Key, BTreeSet<String>>,
    /// The same, in earlier terms.
    removed_before: BTreeSet<String>,
    /// Keys that came into being by a hand.
    foreign: BTreeSet<Key>,
    /// Records that nobody has a reason to touch.
    settled: BTreeMap<Key, KeyValue>,
    /// When a pod with an address changed last.
    addresses: BTreeMap<String, u64>,
    /// Which pods have had an address.
    users: BTreeMap<String, BTreeSet<String>>,
    /// When a registration changed last.
    registrations: u64,
    put: bool,
    /// How much was seen, so that a test can tell that it tested something.
    pub(crate) puts: usize,
    pub(crate) deletes: usize,
    pub(crate) settled_keys: usize,
    pub(crate) waited_for_new_key: usize,
}

impl Checks {
    pub(crate) fn new(knobs: &Knobs) -> Self {
        Self {
            several: knobs.replicas > 1,
            hands: knobs.hands > 0,
            shapeless: false,
            one_process: knobs.replicas == 1 && knobs.crashes + knobs.handovers == 0,
            records_may_expire: knobs.records_may_expire,
            disowned: BTreeSet::new(),
            acted: BTreeMap::new(),
            before: Mark::default(),
            lane: None,
            known: None,
            put_at: BTreeMap::new(),
            slots: BTreeMap::new(),
            foreign_saved: BTreeSet::new(),
            removed: BTreeMap::new(),
            removed_before: BTreeSet::new(),
            foreign: BTreeSet::new(),
            settled: BTreeMap::new(),
            addresses: BTreeMap::new(),
            users: BTreeMap::new(),
            registrations: 0,
            put: false,
            puts: 0,
            deletes: 0,
            settled_keys: 0,
            waited_for_new_key: 0,
        }
    }

    // === what Kubernetes does ===

    /// A pod changed: records of its addresses may change.
    pub(crate) fn pod_changes(&mut self, pod: &Pod, version: u64) {
        for ip in pod.ips.iter().chain(&pod.host_ips) {
            let ip = ip.to_string();
            self.settled.retain(|key, _| address(key) != ip);
            self.users
                .entry(ip.clone())
                .or_default()
                .insert(pod.uid.to_string());
            self.addresses.insert(ip, version);
        }
    }

    /// A registration changed: any record may.
    pub(crate) fn registration_changes(&mut self, version: u64) {
        self.settled.clear();
        self.registrations = version;
    }

    // === what an operator sends ===

    /// Every transaction that changes records is fenced.
    pub(crate) fn fenced(&self, txn: &Txn, cluster: &str) {
        if self.shapeless {
            return;
        }
        let leader = format!("{REGISTRAR}leader");
        let owner = format!("{REGISTRAR}owner");
        let created = txn.compares.iter().any(|compare| {
            matches!(compare, Compare::CreateRevision(key, at) if show(key) == leader && *at > 0)
        });
        let nonce = txn
            .compares
            .iter()
            .any(|compare| matches!(compare, Compare::Value(key, _) if show(key) == leader));
        let owned = txn.compares.iter().any(|compare| {
            matches!(compare, Compare::Value(key, uid)
                if show(key) == owner && **uid == *cluster.as_bytes())
        });
        assert!(created && nonce && owned, "a write without the fence");
        for op in &txn.then {
            if let Op::Put(key, ..) | Op::Delete(key) = op
                && is_record(key)
            {
                let compared = txn
                    .compares
                    .iter()
                    .any(|c| matches!(c, Compare::ModRevision(other, _) if other == key));
                assert!(compared, "{} is written and not compared", show(key));
            }
        }
    }

    /// A key is deleted by someone who knows all of Kubernetes: where the registration wants the same
    /// endpoint under another key, that one stands already.
    pub(crate) fn old_key_stays(
        &mut self,
        key: &str,
        wanted: &BTreeMap<String, Wanted>,
        etcd: &Etcd,
    ) {
        let Some(kv) = etcd.get(key.as_bytes()) else {
            return;
        };
        let Some(Slot { registration, .. }) = slot_of(kv, etcd) else {
            return;
        };
        if self.foreign.contains(key.as_bytes()) || wanted.contains_key(key) {
            return;
        }
        let ip = address(key.as_bytes());
        let uid = match uid(&kv.value) {
            Some(uid) => uid,
            // The format does not say: it is clear where only one pod ever had the address.
            // And one that did not see it stand as it was wanted can't tell.
            None => match self.users.get(&ip) {
                Some(users) if users.len() == 1 && self.one_process => {
                    users.first().cloned().unwrap_or_default()
                }
                _ => return,
            },
        };
        let address = key.rsplit('/').next().unwrap_or("").to_owned();
        let new: Vec<&String> = wanted
            .iter()
            .filter(|(_, found)| {
                let is_new = |(at, pod): &(String, String)| *at == address && *pod == uid;
                found.registration == registration && found.addresses.iter().any(is_new)
            })
            .map(|(other, _)| other)
            .collect();
        if new.is_empty() {
            return;
        }
        self.waited_for_new_key += 1;
        let stands = |other: &String| {
            let value = etcd.get(other.as_bytes()).map(|kv| show(&kv.value));
            value.is_some_and(|value| nodes(&value).is_none() || value.contains(&host(&address)))
        };
        assert!(
            new.into_iter().any(stands),
            "{key} is deleted before its successor stands"
        );
    }

    // === what etcd does ===

    /// A transaction passed its comparisons; etcd is as it left it.
    pub(crate) fn applied(&mut self, txn: &Txn, sent: &Sent, cluster: &str, etcd: &Etcd) {
        let left = &sent.left;
        self.lane = None;
        self.known = Some(sent.known);
        let leader = etcd.get(format!("{REGISTRAR}leader").as_bytes());
        let leader = leader.map(|kv| (show(&kv.value), kv.create_revision));
        let owner = etcd.get(format!("{REGISTRAR}owner").as_bytes());
        let owner = owner.map(|kv| show(&kv.value)).unwrap_or_default();
        let seen = format!("{REGISTRAR}seen/");
        let writes = |op: &Op| {
            matches!(op, Op::Put(key, ..) | Op::Delete(key)
                if is_record(key) || show(key).starts_with(&seen))
        };
        if txn.then.iter().any(writes) {
            assert!(
                leader.is_some() && leader == sent.term,
                "S1: p{} changes records or marks in its term {:?}, and the leader is {leader:?}",
                sent.process,
                sent.term
            );
            assert_eq!(
                owner, cluster,
                "S1: records or marks are changed by a cluster that does not have the name"
            );
        }
        for op in &txn.then {
            let Op::Put(key, value, _) = op else { continue };
            let text = show(key);
            if text == format!("{REGISTRAR}owner") {
                not_taken(&leader, sent, cluster, etcd);
            } else if text == format!("{REGISTRAR}leader") {
                for mark in std::mem::take(&mut self.acted).into_values() {
                    self.before = self.before.max(mark);
                }
                let removed = std::mem::take(&mut self.removed);
                self.removed_before.extend(removed.into_values().flatten());
            } else if text.starts_with(&format!("{REGISTRAR}seen/")) {
                let mark = Mark::read(value);
                let said = (mark.pods, mark.registrations);
                assert_eq!(
                    said,
                    (sent.known.pods, sent.known.registrations),
                    "S2: a mark is not what its writer was told of Kubernetes"
                );
                let known = self.acted.entry(key.clone()).or_default();
                *known = known.max(mark);
                self.lane = Some(key.clone());
            }
        }
        // Without space the mark is deleted instead of written.
        let mut marked = false;
        for op in &txn.then {
            if let Op::Put(key, ..) | Op::Delete(key) = op
                && show(key).starts_with(&seen)
            {
                marked = true;
                let removed = self.removed.entry(key.clone()).or_default();
                removed.extend(left.iter().cloned());
            }
        }
        if !marked {
            // Of no lane that anyone could tell: the next leader must know all the same.
            let nowhere = self.removed.entry(Key::from([])).or_default();
            nowhere.extend(left.iter().cloned());
        }
    }

    /// A request that is no transaction.
    pub(crate) fn other(&mut self, request: &Request) {
        if !matches!(request, Request::Txn(_)) {
            self.lane = None;
            self.known = None;
        }
    }

    /// etcd was saved.
    pub(crate) fn saved(&mut self) {
        self.foreign_saved = self.foreign.clone();
    }

    /// etcd is what was saved, or empty: from now on the promises are relative to what stands there.
    pub(crate) fn restored(&mut self, etcd: &Etcd) {
        self.acted = etcd
            .below(&format!("{REGISTRAR}seen/"))
            .into_iter()
            .map(|kv| (kv.key, Mark::read(&kv.value)))
            .collect();
        self.before = self
            .acted
            .values()
            .copied()
            .fold(Mark::default(), Mark::max);
        self.lane = None;
        self.known = None;
        self.removed.clear();
        self.removed_before.clear();
        self.settled.clear();
        self.put_at.clear();
        self.foreign = self
            .foreign_saved
            .iter()
            .filter(|key| etcd.get(key).is_some())
            .cloned()
            .collect();
    }

    /// One key changed.
    pub(crate) fn changed(
        &mut self,
        change: &Change,
        etcd: &Etcd,
        kube: &Kube,
        oracle: &mut Oracle,
    ) {
        let key = show(&change.key);
        if !is_record(&change.key) {
            if let Some(after) = &change.after
                && key.starts_with(&format!("{REGISTRAR}leases/"))
                && let Some(slot) = slot(&after.value)
            {
                self.slots.insert(after.lease, slot);
                self.disowned.remove(&after.lease);
            }
            if let (Author::Hand, Some(before), None) =
                (change.author, &change.before, &change.after)
                && key.starts_with(&format!("{REGISTRAR}leases/"))
                && etcd.get(format!("{REGISTRAR}leader").as_bytes()).is_none()
            {
                self.disowned.insert(before.lease);
            }
            if let (Author::Process(_), Some(before), Some(after)) =
                (change.author, &change.before, &change.after)
                && key.starts_with(&format!("{REGISTRAR}seen/"))
            {
                let (before, after) = (Mark::read(&before.value), Mark::read(&after.value));
                assert_eq!(before.max(after), after, "S2: the mark {key} goes back");
            }
            return;
        }
        match change.author {
            Author::Hand => {
                self.settled.remove(&change.key);
                self.put_at.remove(&change.key);
                if change.before.is_none() {
                    self.foreign.insert(change.key.clone());
                }
            }
            Author::Expiry => {
                let disowned = |kv: &KeyValue| self.disowned.contains(&kv.lease);
                assert!(
                    self.records_may_expire || change.before.as_ref().is_some_and(disowned),
                    "{key} expired although its lease was to be kept alive"
                );
            }
            Author::Process(_) => {
                assert!(
                    !self.foreign.contains(&change.key),
                    "{key} is not ours and was changed"
                );
                assert!(!change.by_lease, "lost: a revoke took the record {key}");
                self.justified(change, kube, oracle);
                match &change.after {
                    Some(after) => self.put(change, after, etcd, kube),
                    None => self.deletes += 1,
                }
            }
        }
        if change.after.is_none() {
            self.foreign.remove(&change.key);
            self.put_at.remove(&change.key);
        }
        self.check_settled(change);
    }

    /// What was written is what was wanted at what the writer knew, and what it took away was not; and no
    /// record goes that was wanted as it stood ever since it was put.
    fn justified(&mut self, change: &Change, kube: &Kube, oracle: &mut Oracle) {
        let key = show(&change.key);
        let known = self.known.expect("only transactions change records");
        let view = oracle.wanted(kube, known);
        let wanted = view.get(&key);
        let name_of = |kv: &KeyValue| self.slots.get(&kv.lease);
        let as_wanted = |wanted: &Wanted, kv: &KeyValue| {
            let slot = name_of(kv).is_some_and(|slot| {
                (&slot.registration, &slot.scope, slot.ttl)
                    == (&wanted.registration, &wanted.scope, wanted.ttl)
            });
            slot && without_zone(&show(&kv.value)) == without_zone(&wanted.value)
        };
        if let Some(after) = &change.after {
            // Of one for all pods, a part may wait for its address.
            let part = |wanted: &Wanted| {
                let is = nodes(&show(&after.value)).zip(nodes(&wanted.value));
                let had = change
                    .before
                    .as_ref()
                    .and_then(|kv| nodes(&show(&kv.value)));
                let whole = Wanted {
                    value: show(&after.value),
                    ..wanted.clone()
                };
                is.is_some_and(|(is, should)| {
                    let kept = had.iter().flatten().filter(|node| should.contains(*node));
                    is.is_subset(&should) && kept.cloned().collect::<BTreeSet<_>>().is_subset(&is)
                }) && as_wanted(&whole, after)
            };
            assert!(
                wanted.is_some_and(|wanted| {
                    !wanted.suspended && (as_wanted(wanted, after) || part(wanted))
                }),
                "S2: {key} was put as {:?} for {:?}, and at {known:?} wanted was {wanted:?}",
                show(&after.value),
                name_of(after),
            );
            let slot = name_of(after).expect("it has a slot");
            let namespace = slot.registration.split('/').next().unwrap_or("");
            let grants = POLICIES.get(known.policy).expect("a policy").grants;
            assert!(
                key.starts_with(&slot.scope) && grants(&slot.format, namespace, &key),
                "S5: {key} is not granted to {slot:?}"
            );
        }
        let Some(before) = &change.before else {
            self.put_at.insert(change.key.clone(), known);
            return;
        };
        if change.after.is_none() {
            assert!(
                !wanted.is_some_and(|wanted| as_wanted(wanted, before)),
                "lost: {key} was deleted, and at {known:?} it was wanted as it stood"
            );
            self.may_go(&key, before, wanted, kube, oracle, known);
        }
        // What one process put may look healthy to all, and not to one that is behind.
        if let Some(put) = self.put_at.get(&change.key).copied() {
            let same = change.after.as_ref().is_some_and(|after| {
                without_zone(&show(&after.value)) == without_zone(&show(&before.value))
            });
            let (_, specs_then) = kube.state_at(0, put.registrations);
            let (_, specs_now) = kube.state_at(0, kube.version);
            if !same && put.policy == known.policy && specs_then == specs_now {
                let mut versions = vec![put.pods];
                versions.extend(kube.pod_versions_after(put.pods));
                let healthy = versions.into_iter().all(|pods| {
                    let at = Known { pods, ..put };
                    let then = oracle.wanted(kube, at);
                    then.get(&key)
                        .is_some_and(|wanted| as_wanted(wanted, before))
                });
                assert!(
                    !healthy,
                    "lost: {key} was wanted as it stood ever since it was put at {put:?}, and was changed at {known:?}"
                );
            }
        }
        if change.after.is_some() {
            self.put_at.insert(change.key.clone(), known);
        }
    }

    /// Whether a record that its registration does not want may go: not where that is suspended, or can't be
    /// served and the pod is still ready.
    fn may_go(
        &self,
        key: &str,
        record: &KeyValue,
        wanted: Option<&Wanted>,
        kube: &Kube,
        oracle: &Oracle,
        known: Known,
    ) {
        let Some(slot) = self.slots.get(&record.lease) else {
            return;
        };
        let Some((registration, standing)) = oracle.registration(kube, known, &slot.registration)
        else {
            return;
        };
        // An older registration takes the key.
        if wanted.is_some_and(|wanted| wanted.registration != slot.registration) {
            return;
        }
        match standing {
            Standing::Served => {}
            Standing::Suspended => {
                panic!("lost: {key} was deleted, and {slot:?} is suspended at {known:?}")
            }
            Standing::Kept => {
                let Some(uid) = uid(&record.value) else {
                    return;
                };
                let pods = kube.pods_at(known.pods);
                let there = pods
                    .iter()
                    .any(|pod| *pod.uid == *uid && pod.ready && !pod.deleting && !pod.finished);
                let grants = POLICIES.get(known.policy).expect("a policy").grants;
                let granted = grants(&slot.format, &registration.namespace, key);
                assert!(
                    !there || !granted,
                    "lost: {key} was deleted, its pod is ready and {slot:?} is only not served at {known:?}"
                );
            }
        }
    }

    /// L1 of what is not served: nothing stays where its namespace may not write any more, or for a pod that has
    /// left.
    pub(crate) fn kept(&self, etcd: &Etcd, kube: &Kube, oracle: &mut Oracle, known: Known) {
        let wanted = oracle.wanted(kube, known);
        for kv in etcd.all().filter(|kv| is_record(&kv.key)) {
            let key = show(&kv.key);
            let Some(slot) = self.slots.get(&kv.lease) else {
                continue;
            };
            let found = oracle.registration(kube, known, &slot.registration);
            let Some((registration, Standing::Kept)) = found else {
                continue;
            };
            // Who wants it takes it when the address is free.
            if wanted.contains_key(&key) {
                continue;
            }
            let grants = POLICIES.get(known.policy).expect("a policy").grants;
            assert!(
                grants(&slot.format, &registration.namespace, &key),
                "L1: {key} of {slot:?} stays and is not granted"
            );
            if let Some(uid) = uid(&kv.value) {
                let there = kube.pods.get(&uid);
                assert!(
                    there.is_some_and(|pod| !pod.deleting && !pod.finished),
                    "L1: {key} of {slot:?} stays, and its pod has left"
                );
            }
        }
    }

    /// Whether a lease is one of a registration.
    pub(crate) fn is_on_slot_of(&self, lease: LeaseId, registration: &str) -> bool {
        self.slots
            .get(&lease)
            .is_some_and(|slot| slot.registration == registration)
    }

    fn check_settled(&mut self, change: &Change) {
        if change.author == Author::Expiry {
            self.settled.remove(&change.key);
            return;
        }
        let Some(settled) = self.settled.get_mut(&change.key) else {
            return;
        };
        let zone_only = change.after.as_ref().filter(|after| {
            without_zone(&show(&after.value)) == without_zone(&show(&settled.value))
                && after.value != settled.value
        });
        let Some(after) = zone_only else {
            panic!(
                "lost: {} changed although nothing had: {:?}",
                show(&change.key),
                change.after.as_ref().map(|kv| show(&kv.value))
            );
        };
        // A node may get its first zone back: that is one more change, and no put of what stands.
        after.clone_into(settled);
    }

    fn put(&mut self, change: &Change, after: &KeyValue, etcd: &Etcd, kube: &Kube) {
        let key = show(&change.key);
        self.puts += 1;
        self.put = true;
        assert!(after.lease != 0, "{key} was put without a lease");
        let own = slot_of(after, etcd);
        // A hand may take the lease's key while the put is on its way; it is put back.
        assert!(
            own.is_some() || self.hands,
            "{key} was put on lease {:016x}, which is not below leases/",
            after.lease
        );
        if let Some(before) = &change.before
            && before.value == after.value
        {
            // What goes together follows to the lease where all of it can stand.
            let together = own.as_ref().is_some_and(|slot| slot.format == "Traefik");
            let moved = before.lease != after.lease
                && (together || slot_of(before, etcd) != own || !etcd.lives(before.lease));
            assert!(moved, "{key} was put again as it stood");
        }
        let Some(uid) = uid(&after.value) else { return };
        let lane = self
            .lane
            .as_ref()
            .expect("a put writes the mark of its lane");
        let removed = self
            .removed
            .get(lane)
            .is_some_and(|pods| pods.contains(&uid));
        assert!(
            !removed && !self.removed_before.contains(&uid),
            "{key} was put for pod {uid}, whose records were deleted because it had left"
        );
        let acted = self.acted.get(lane).copied().unwrap_or_default();
        let known = acted.max(self.before).pods;
        if let Some(left) = kube.left_at(&uid) {
            assert!(
                left > known,
                "{key} was put for pod {uid}, which left at {left}, by lane {} after {known} was acted on",
                show(lane)
            );
        }
    }

    /// No two pods hold one address, whoever looks whenever.
    pub(crate) fn one_owner(&mut self, etcd: &Etcd) {
        if !std::mem::take(&mut self.put) {
            return;
        }
        let mut owners: BTreeMap<String, String> = BTreeMap::new();
        for kv in etcd.all().filter(|kv| is_record(&kv.key)) {
            let Ok(value) = serde_json::from_slice::<serde_json::Value>(&kv.value) else {
                continue;
            };
            let (Some(uid), false) = (uid(&kv.value), self.foreign.contains(&kv.key)) else {
                continue;
            };
            let target = format!(
                "{} {}",
                value.get("address").expect("address"),
                value.get("protocol").expect("protocol")
            );
            let other = owners.entry(target.clone()).or_insert(uid.clone());
            assert_eq!(*other, uid, "two pods hold {target}");
        }
    }

    /// Everything is as it should be and nothing is under way.
    pub(crate) fn settle(&mut self, etcd: &Etcd) {
        let mark = etcd
            .below(&format!("{REGISTRAR}seen/"))
            .iter()
            .map(|kv| Mark::read(&kv.value))
            .fold(Mark::default(), Mark::max);
        // What the next leader must know: only that is what it can be blamed for.
        if self.several && self.registrations > mark.registrations {
            return;
        }
        // Where the key does not end with the address, it can't be told here what may change it.
        let by_address = |kv: &&KeyValue| {
            let slot = self.slots.get(&kv.lease);
            is_record(&kv.key) && !slot.is_some_and(|slot| UNTOLD.contains(&&*slot.format))
        };
        let records: Vec<&KeyValue> = etcd.all().filter(by_address).collect();
        for kv in records {
            let changed = self.addresses.get(&address(&kv.key)).copied().unwrap_or(0);
            if self.several && changed > mark.pods {
                continue;
            }
            if self.settled.insert(kv.key.clone(), kv.clone()).is_none() {
                self.settled_keys += 1;
            }
        }
    }
}

/// The name is not taken while another cluster has leases under it, or someone else leads.
fn not_taken(leader: &Option<Term>, sent: &Sent, cluster: &str, etcd: &Etcd) {
    let own = format!("{REGISTRAR}leases/{cluster}/");
    let others: Vec<String> = etcd
        .below(&format!("{REGISTRAR}leases/"))
        .iter()
        .map(|kv| show(&kv.key))
        .filter(|key| !key.starts_with(&own))
        .collect();
    assert!(
        others.is_empty(),
        "a name is taken whose cluster still has leases: {others:?}"
    );
    assert!(
        leader.is_none() || *leader == sent.term,
        "a name is taken under which {leader:?} leads"
    );
}

fn slot_of(kv: &KeyValue, etcd: &Etcd) -> Option<Slot> {
    slot(&lease_key(kv.lease, etcd)?.value)
}

/// The key of a lease below `leases/`, of whichever cluster.
pub(crate) fn lease_key(lease: LeaseId, etcd: &Etcd) -> Option<&KeyValue> {
    CLUSTER_UIDS.iter().find_map(|uid| {
        let key = format!("{REGISTRAR}leases/{uid}/{lease:016x}");
        etcd.get(key.as_bytes())
    })
}

/// The formats whose keys don't end with the address.
const UNTOLD: [&str; 3] = ["Traefik", "GoMicro", "Apisix"];

/// How a node of a record for all pods begins that stands for an address.
fn host(address: &str) -> String {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
    format!(r#"{{"host":"{host}","port":{port},"#)
}

/// The address that a key ends in.
fn address(key: &[u8]) -> String {
    let key = show(key);
    let last = key.rsplit('/').next().unwrap_or("");
    let host = last.rsplit_once(':').map_or(last, |(host, _)| host);
    host.trim_matches(['[', ']']).to_owned()
}
