//! What must hold after every step, over the record of a watcher.
//!
//! Takes requests as they are sent and changes as etcd makes them, panics where a promise is broken. It
//! knows what no process knows: the true state of Kubernetes and of etcd. Must never judge by what an
//! operator believes.

use std::collections::{BTreeMap, BTreeSet};

use etcd_registrar::engine::etcd::{Compare, Key, KeyValue, Op, Request, Txn};
use etcd_registrar::model::pod::Pod;

use crate::expected::{Wanted, without_zone};
use crate::model_etcd::{Author, Change, Etcd, show};
use crate::model_kube::Kube;
use crate::world::{CLUSTER_UID, Knobs, REGISTRAR, is_record, slot, uid};

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
    /// One process sees it all.
    one_process: bool,
    records_may_expire: bool,
    /// What the applied transactions of each lane were planned from, in this term.
    acted: BTreeMap<Key, Mark>,
    /// And those of all lanes in earlier terms.
    before: Mark,
    /// The lane of the transaction that was applied last.
    lane: Option<Key>,
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
            one_process: knobs.replicas == 1 && knobs.crashes + knobs.handovers == 0,
            records_may_expire: knobs.records_may_expire,
            acted: BTreeMap::new(),
            before: Mark::default(),
            lane: None,
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
    pub(crate) fn fenced(&self, txn: &Txn) {
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
                if show(key) == owner && **uid == *CLUSTER_UID.as_bytes())
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
        let Some((registration, ..)) = slot_of(kv, etcd) else {
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
        let last = |key: &str| key.rsplit('/').next().unwrap_or("").to_owned();
        let new: Vec<&String> = wanted
            .iter()
            .filter(|(other, found)| {
                found.registration == registration && found.uid == uid && last(other) == last(key)
            })
            .map(|(other, _)| other)
            .collect();
        if new.is_empty() {
            return;
        }
        self.waited_for_new_key += 1;
        assert!(
            new.iter().any(|other| etcd.get(other.as_bytes()).is_some()),
            "{key} is deleted before {new:?} stands"
        );
    }

    // === what etcd does ===

    /// A transaction passed its comparisons.
    pub(crate) fn applied(&mut self, txn: &Txn, left: &[String]) {
        self.lane = None;
        for op in &txn.then {
            let Op::Put(key, value, _) = op else { continue };
            let text = show(key);
            if text == format!("{REGISTRAR}leader") {
                for mark in std::mem::take(&mut self.acted).into_values() {
                    self.before = self.before.max(mark);
                }
                let removed = std::mem::take(&mut self.removed);
                self.removed_before.extend(removed.into_values().flatten());
            } else if text.starts_with(&format!("{REGISTRAR}seen/")) {
                let known = self.acted.entry(key.clone()).or_default();
                *known = known.max(Mark::read(value));
                self.lane = Some(key.clone());
            }
        }
        // Without space the mark is deleted instead of written.
        let seen = format!("{REGISTRAR}seen/");
        for op in &txn.then {
            if let Op::Put(key, ..) | Op::Delete(key) = op
                && show(key).starts_with(&seen)
            {
                let removed = self.removed.entry(key.clone()).or_default();
                removed.extend(left.iter().cloned());
            }
        }
    }

    /// A request that is no transaction.
    pub(crate) fn other(&mut self, request: &Request) {
        if !matches!(request, Request::Txn(_)) {
            self.lane = None;
        }
    }

    /// One key changed.
    pub(crate) fn changed(&mut self, change: &Change, etcd: &Etcd, kube: &Kube) {
        if !is_record(&change.key) {
            return;
        }
        let key = show(&change.key);
        match change.author {
            Author::Hand => {
                self.settled.remove(&change.key);
                if change.before.is_none() {
                    self.foreign.insert(change.key.clone());
                }
            }
            Author::Expiry => assert!(
                self.records_may_expire,
                "{key} expired although its lease was to be kept alive"
            ),
            Author::Process(_) => {
                assert!(
                    !self.foreign.contains(&change.key),
                    "{key} is not ours and was changed"
                );
                assert!(!change.by_lease, "a revoke took the record {key}");
                match &change.after {
                    Some(after) => self.put(change, after, etcd, kube),
                    None => self.deletes += 1,
                }
            }
        }
        if change.after.is_none() {
            self.foreign.remove(&change.key);
        }
        self.check_settled(change);
    }

    fn check_settled(&mut self, change: &Change) {
        if change.author == Author::Expiry {
            self.settled.remove(&change.key);
            return;
        }
        let Some(settled) = self.settled.get(&change.key) else {
            return;
        };
        let zone_only = change.after.as_ref().is_some_and(|after| {
            without_zone(&show(&after.value)) == without_zone(&show(&settled.value))
                && after.value != settled.value
        });
        assert!(
            zone_only,
            "{} changed although nothing had: {:?}",
            show(&change.key),
            change.after.as_ref().map(|kv| show(&kv.value))
        );
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
            let moved = before.lease != after.lease
                && (slot_of(before, etcd) != own || !etcd.lives(before.lease));
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
        for kv in etcd.all().filter(|kv| is_record(&kv.key)) {
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

fn slot_of(kv: &KeyValue, etcd: &Etcd) -> Option<(String, String, i64)> {
    let key = format!("{REGISTRAR}leases/{CLUSTER_UID}/{:016x}", kv.lease);
    slot(&etcd.get(key.as_bytes())?.value)
}

/// The address that a key ends in.
fn address(key: &[u8]) -> String {
    let key = show(key);
    let last = key.rsplit('/').next().unwrap_or("");
    let host = last.rsplit_once(':').map_or(last, |(host, _)| host);
    host.trim_matches(['[', ']']).to_owned()
}
