//! Lanes, slots and leases: how a need becomes a transaction, and what its answer means.
//!
//! Takes keys from the lanes, gives requests to etcd. Must never send what is not fenced (revokes aside,
//! which cannot be), and never a second transaction of a lane before the first one's outcome is known.

use std::collections::BTreeSet;
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use crate::format::{Bundle, Format, Rules, bundle_of};
use crate::mirror::leases::SlotName;
use crate::mirror::{Changed, Made};
use crate::model::endpoint::{Socket, Target};
use crate::plan::{Need, need, put};

use super::io::Effect;
use super::lane::{Change, Flying, LANES, State, Write, lane_of};
use super::need::Due;
use super::report::Problem;
use super::{Ask, Engine};
use crate::model::etcd::{
    Answer, Compare, Failure, FailureKind, Key, KeyValue, LeaseId, Op, Refusal, Request, Revision,
    Txn,
};

/// The most operations of a transaction (design, section 8): etcd takes 128, of which the fence, the
/// mark and its comparison need some.
const OPERATIONS: usize = 120;
/// The most bytes of keys and values of a transaction (design, section 8); etcd takes 1.5 MiB.
const BYTES: usize = 512 * 1024;
/// The first and the longest wait of a lane whose transactions fail.
const BACKOFF_MICROS: u64 = 20_000;
const BACKOFF_MOST_MICROS: u64 = 2_000_000;
/// A barrier under NOSPACE is a try whether there is space again.
const NO_SPACE_MICROS: u64 = 1_000_000;
/// A lease of this term that is empty is kept for a while, so that a pod that comes back finds one.
const EMPTY_MICROS: u64 = 10_000_000;
/// The most leases that are asked for at once; etcd takes each through its log.
const REVOKES_AT_ONCE: usize = 32;

/// What goes in one transaction and on one lease: mostly one key.
type Group = SmallVec<[(Key, Due); 1]>;

impl Engine {
    /// Sends what can be sent.
    pub(super) fn pump(&mut self) {
        if !self.leads() || self.blind() || self.mirror.get(&self.keys.owner).is_none() {
            return;
        }
        let now = self.now.monotonic;
        for at in 0..LANES {
            let Some(lane) = self.lanes.get(at) else {
                continue;
            };
            let rested = lane.not_before <= now;
            match (&lane.state, lane.is_empty()) {
                (State::Idle, false) if self.no_space => {
                    self.send_batch(at, true);
                    if let Some(lane) = self.lanes.get_mut(at)
                        && rested
                        && matches!(lane.state, State::Idle)
                    {
                        // Nothing to remove: its barrier finds out whether there is space again.
                        lane.state = State::Unknown;
                    }
                }
                (State::Idle, false) if rested => self.send_batch(at, false),
                (State::Unknown, empty) => {
                    if self.no_space && !empty {
                        self.send_batch(at, true);
                    }
                    let Some(lane) = self.lanes.get(at) else {
                        continue;
                    };
                    if rested && matches!(lane.state, State::Unknown) {
                        self.send_barrier(at);
                    }
                }
                _ => {}
            }
        }
    }

    fn send_batch(&mut self, at: usize, removals_only: bool) {
        // One operation is the mark's.
        let most = match self.lanes.get(at).map_or(0, |lane| lane.most) {
            0 => OPERATIONS - 1,
            halved => halved.min(OPERATIONS - 1),
        };
        let mut batch: Vec<Change> = Vec::new();
        let mut lease_keys: BTreeSet<LeaseId> = BTreeSet::new();
        let mut bytes = 0usize;
        let mut skipped: Vec<Key> = Vec::new();
        let mut full: Option<Arc<SlotName>> = None;
        while batch.len() + lease_keys.len() < most && bytes < BYTES {
            let Some(key) = self
                .lanes
                .get_mut(at)
                .and_then(|lane| lane.pop(removals_only))
            else {
                break;
            };
            if let Some(slot) = &full
                && self.would_stand_on(&key, slot)
            {
                // In a burst most keys wait for a lease: what they need is seen when it is there.
                self.wait_for_slot(&Arc::clone(slot), key);
                continue;
            }
            let Some(due) = self.due(&key) else { continue };
            if removals_only && !matches!(due, Due::Delete) {
                skipped.push(key);
                continue;
            }
            let bundle = self.bundle(&key, &due);
            if bundle == Bundle::Alone && !batch.is_empty() {
                let removal = matches!(due, Due::Delete);
                if let Some(lane) = self.lanes.get_mut(at) {
                    lane.put_back(key, removal);
                }
                break;
            }
            let (group, beside) = if bundle == Bundle::Together {
                self.group(key, due, removals_only)
            } else {
                (smallvec![(key, due)], None)
            };
            if let Err(slot) =
                self.add_to_batch(group, beside, &mut batch, &mut lease_keys, &mut bytes)
            {
                full = Some(slot);
            }
            if bundle == Bundle::Alone && !batch.is_empty() {
                break;
            }
        }
        for key in skipped {
            if let Some(lane) = self.lanes.get_mut(at) {
                lane.push(key, false);
            }
        }
        if batch.is_empty() {
            return;
        }
        let txn = self.transaction(at, &batch, removals_only);
        if let Some(lane) = self.lanes.get_mut(at) {
            let then_unknown = matches!(lane.state, State::Unknown);
            lane.state = State::Wait {
                batch,
                then_unknown,
                removal: removals_only,
            };
        }
        self.ask(Ask::Lane(at), Request::Txn(txn));
    }

    /// Adds to a batch what goes together, on one lease; or gives the slot for which there is none yet, and
    /// the keys wait for it.
    fn add_to_batch(
        &mut self,
        group: Group,
        beside: Option<LeaseId>,
        batch: &mut Vec<Change>,
        lease_keys: &mut BTreeSet<LeaseId>,
        bytes: &mut usize,
    ) -> Result<(), Arc<SlotName>> {
        let slot = group.iter().find_map(|(_, due)| match due {
            Due::Put(put) => Some(Arc::clone(&put.slot)),
            _ => None,
        });
        let mut lease = None;
        if let Some(slot) = &slot {
            let puts = group.iter().filter(|(_, due)| matches!(due, Due::Put(_)));
            let puts = u32::try_from(puts.count()).unwrap_or(u32::MAX);
            // What goes together and is right already decides where the others stand.
            lease = beside
                .and_then(|beside| self.slots.take_on(beside, slot, puts))
                .or_else(|| self.slots.take(&self.mirror, slot, capacity(slot), puts));
            if lease.is_none() {
                for (key, _) in group {
                    self.wait_for_slot(slot, key);
                }
                return Err(Arc::clone(slot));
            }
        }
        for (key, due) in group {
            let write = match due {
                Due::Put(put) => {
                    let Some(lease) = lease else { continue };
                    let lease_key = !self
                        .mirror
                        .leases()
                        .get(lease)
                        .is_some_and(|known| known.key_stands);
                    if lease_key {
                        lease_keys.insert(lease);
                    }
                    *bytes += put.value.len();
                    Write::Put {
                        lease,
                        slot: put.slot,
                        lease_key,
                        value: put.value,
                        targets: put.targets,
                        uid: put.uid,
                        stamp: put.stamp,
                    }
                }
                Due::LeaseKey(lease, slot) => {
                    lease_keys.insert(lease);
                    Write::LeaseKey(lease, slot)
                }
                Due::Delete => Write::Delete,
            };
            *bytes += 2 * key.len();
            let standing = self.mirror.get(&key);
            let drifted = self.confirmed.get(&key).is_some_and(|known| known.drifted);
            let change = Change {
                repair: drifted && !matches!(write, Write::Delete),
                planned_at: standing.map_or(0, |record| record.mod_revision),
                created_at: standing.map_or(0, |record| record.create_revision),
                key,
                write,
            };
            self.fly(&change);
            batch.push(change);
        }
        Ok(())
    }

    /// What the format of a record asks of its transaction.
    fn bundle(&self, key: &Key, due: &Due) -> Bundle {
        let slot = match due {
            Due::Put(put) => Some(&put.slot),
            Due::LeaseKey(..) => None,
            Due::Delete => self
                .mirror
                .get(key)
                .and_then(|record| self.mirror.leases().get(record.lease)?.name.as_ref()),
        };
        slot.map_or(Bundle::Free, |slot| rules(slot).bundle)
    }

    /// What goes together with a key, and the lease where a part of it stands right already. Nothing, if a part
    /// of it can't go now: that part brings the others when it can.
    fn group(&mut self, key: Key, due: Due, removals_only: bool) -> (Group, Option<LeaseId>) {
        let mut keys: Vec<Key> = vec![Arc::clone(&key)];
        let prefix = [bundle_of(&key), b"/"].concat();
        let standing = self.mirror.below(&prefix).map(|(other, _)| other);
        keys.extend(standing.cloned());
        if let Due::Put(put) = &due {
            for target in &put.targets {
                let wanted = self.index.keys_at(put.claim.registration, target).iter();
                keys.extend(wanted.filter(|other| other.starts_with(&prefix)).cloned());
            }
        }
        keys.sort_unstable();
        keys.dedup();
        let lead = match &due {
            Due::Put(put) => Format::by_name(&put.slot.format).and_then(|f| f.lead_of(&key)),
            _ => None,
        };
        let mut found: Group = smallvec![(key, due)];
        let mut right = Vec::new();
        for other in keys {
            let Some((first, _)) = found.first() else {
                break;
            };
            if other == *first {
                continue;
            }
            match need(&self.index, &self.mirror, &other) {
                Need::Right(claim) => right.push((other, claim)),
                Need::Put(_) | Need::Delete => match self.due(&other) {
                    Some(due) if !removals_only || matches!(due, Due::Delete) => {
                        if let Some(lane) = self.lanes.get_mut(lane_of(&other)) {
                            lane.take(&other);
                        }
                        found.push((other, due));
                    }
                    _ => return (Group::new(), None),
                },
                // Nothing stands beside an address that does not stand there.
                _ if lead.as_deref() == Some(&*other) => return (Group::new(), None),
                // What others wrote there, or nobody wants, is no part of it.
                _ => {}
            }
        }
        // The part that is right decides about the lease; or follows, where nothing can be put on that any more.
        let mut beside = None;
        let slot = found.iter().find_map(|(_, due)| match due {
            Due::Put(put) => Some(Arc::clone(&put.slot)),
            _ => None,
        });
        for (other, claim) in right {
            let lease = self.mirror.get(&other).map(|record| record.lease);
            let usable = |lease: &LeaseId| {
                let name = self.mirror.leases().get(*lease)?.name.as_ref()?;
                Some(self.slots.is_usable(*lease) && Some(name) == slot.as_ref())
            };
            if lease.as_ref().and_then(usable) == Some(true) {
                beside = lease;
            } else if slot.is_some()
                && !self.flying.contains_key(&other)
                && let Some(put) = put(&self.index, &self.mirror, &other, claim)
            {
                found.push((other, Due::Put(Box::new(put))));
            }
        }
        // Those that tell the address before those that stand beside it.
        found.sort_by(|(a, _), (b, _)| a.cmp(b));
        (found, beside)
    }

    /// The fence, the lane's mark, and each key at the revision that it was planned from.
    fn transaction(&self, at: usize, batch: &[Change], removal: bool) -> Txn {
        let seen_key = self.keys.seen(at);
        let seen = self.lanes.get(at).map_or(0, |lane| lane.seen);
        let mut compares = self.fence();
        compares.reserve_exact(batch.len() + 1);
        let mut then = Vec::with_capacity(batch.len() + 2);
        if removal {
            // Without space only what cannot grow is let through; the mark goes, since it is not written.
            then.push(Op::Delete(Arc::clone(&seen_key)));
        } else {
            compares.push(Compare::ModRevision(Arc::clone(&seen_key), seen));
            then.push(Op::Put(
                Arc::clone(&seen_key),
                self.mark(),
                self.session.owner_lease.unwrap_or(0),
            ));
        }
        let mut lease_keys: BTreeSet<LeaseId> = BTreeSet::new();
        for change in batch {
            let (lease, slot) = match &change.write {
                Write::Put {
                    lease,
                    slot,
                    lease_key: true,
                    ..
                }
                | Write::LeaseKey(lease, slot) => (*lease, slot),
                Write::Put { .. } | Write::Delete => continue,
            };
            // Before the first record of the lease.
            if lease_keys.insert(lease) {
                then.push(Op::Put(self.keys.lease(lease), slot_value(slot), lease));
            }
        }
        let mut otherwise = Vec::with_capacity(batch.len() + 3);
        otherwise.extend([
            Op::Get(Arc::clone(&self.keys.leader)),
            Op::Get(Arc::clone(&self.keys.owner)),
            Op::Get(seen_key),
        ]);
        for change in batch {
            compares.push(Compare::ModRevision(
                Arc::clone(&change.key),
                change.planned_at,
            ));
            match &change.write {
                Write::Put { lease, value, .. } => {
                    then.push(Op::Put(
                        Arc::clone(&change.key),
                        value.as_slice().into(),
                        *lease,
                    ));
                }
                Write::Delete => then.push(Op::Delete(Arc::clone(&change.key))),
                Write::LeaseKey(..) => {}
            }
            otherwise.push(Op::Get(Arc::clone(&change.key)));
        }
        Txn {
            compares,
            then,
            otherwise,
        }
    }

    /// How much of Kubernetes the plan was made from.
    fn mark(&self) -> Box<[u8]> {
        serde_json::to_vec(&self.kube.mark())
            .unwrap_or_default()
            .into()
    }

    /// Puts the mark alone: after it no earlier transaction of the lane can apply.
    fn send_barrier(&mut self, at: usize) {
        let key = self.keys.seen(at);
        let Some(lease) = self.session.owner_lease else {
            return;
        };
        let seen = self.lanes.get(at).map_or(0, |lane| lane.seen);
        let mut compares = self.fence();
        compares.push(Compare::ModRevision(Arc::clone(&key), seen));
        let txn = Txn {
            compares,
            then: vec![Op::Put(Arc::clone(&key), self.mark(), lease)],
            otherwise: vec![
                Op::Get(Arc::clone(&self.keys.leader)),
                Op::Get(Arc::clone(&self.keys.owner)),
                Op::Get(key),
            ],
        };
        if let Some(lane) = self.lanes.get_mut(at) {
            lane.state = State::Barrier;
        }
        self.ask(Ask::Lane(at), Request::Txn(txn));
    }

    /// Reads keys of unknown outcome.
    fn send_read(&mut self, at: usize) {
        let Some(lane) = self.lanes.get_mut(at) else {
            return;
        };
        let keys: Vec<Key> = lane
            .unknown
            .iter()
            .take(match lane.most_read {
                0 => OPERATIONS,
                halved => halved,
            })
            .map(|change| Arc::clone(&change.key))
            .collect();
        let then = keys.iter().map(|key| Op::Get(Arc::clone(key))).collect();
        lane.state = State::Read(keys);
        self.ask(
            Ask::Lane(at),
            Request::Txn(Txn {
                then,
                ..Txn::default()
            }),
        );
    }

    /// What the answer to a lane's request means.
    pub(super) fn lane_answered(&mut self, at: usize, mut answer: Result<Answer, Failure>) {
        if self.blind() && answer.is_ok() {
            // Of which etcd it is can't be told: the barrier finds out, once everything was read anew.
            answer = Err(Failure {
                kind: FailureKind::Unknown,
                message: "the watches broke meanwhile".into(),
            });
        }
        let Some(lane) = self.lanes.get_mut(at) else {
            return;
        };
        match std::mem::take(&mut lane.state) {
            State::Wait {
                batch,
                then_unknown,
                removal,
            } => {
                self.batch_answered(at, batch, then_unknown, removal, answer);
            }
            State::Barrier => self.barrier_answered(at, answer),
            State::Read(keys) => self.read_answered(at, &keys, answer),
            // The term in which it was asked is over.
            other @ (State::Idle | State::Unknown) => lane.state = other,
        }
    }

    fn batch_answered(
        &mut self,
        at: usize,
        batch: Vec<Change>,
        then_unknown: bool,
        removal: bool,
        answer: Result<Answer, Failure>,
    ) {
        match answer {
            Ok(Answer::Txn {
                succeeded: true,
                revision,
                ..
            }) => {
                self.numbers.transactions_done += 1;
                if let Some(lane) = self.lanes.get_mut(at) {
                    lane.seen = if removal { 0 } else { revision };
                    lane.state = if then_unknown || removal {
                        State::Unknown
                    } else {
                        State::Idle
                    };
                    lane.backoff = 0;
                    lane.most = if lane.most == 0 {
                        0
                    } else {
                        (lane.most * 2).min(OPERATIONS - 1)
                    };
                }
                if !removal {
                    self.set_no_space(false);
                }
                self.batch_done(batch, revision);
            }
            Ok(Answer::Txn {
                succeeded: false,
                revision,
                reads,
            }) => {
                self.numbers.transactions_compared += 1;
                let seen = self.note_fence(at, &reads, revision);
                if !self.leads() {
                    return;
                }
                let keys: Vec<Key> = batch.iter().map(|change| Arc::clone(&change.key)).collect();
                let now = self.now.monotonic;
                if let Some(lane) = self.lanes.get_mut(at) {
                    if !removal {
                        lane.seen = seen;
                    }
                    lane.state = if then_unknown || lane.seen == 0 {
                        State::Unknown
                    } else {
                        State::Idle
                    };
                    // What is in the way may take a moment to come by the watch.
                    lane.not_before = now + BACKOFF_MICROS / 4;
                }
                self.note_reads(&keys, reads.into_iter().skip(3).collect(), revision);
                self.landed(batch);
            }
            Err(Failure {
                kind: FailureKind::Refused(refusal),
                message,
            }) => {
                self.numbers.transactions_refused += 1;
                self.batch_refused(at, batch, then_unknown, refusal, &message);
            }
            failed => {
                match failed {
                    Err(Failure {
                        kind: FailureKind::NoSpace,
                        ..
                    }) => self.numbers.transactions_no_space += 1,
                    _ => self.numbers.transactions_unknown += 1,
                }
                if let Some(lane) = self.lanes.get_mut(at) {
                    for change in batch {
                        // A removal of a key whose outcome was unknown before it adds nothing.
                        if !lane.is_unknown(&change.key) {
                            lane.unknown.push(change);
                        }
                    }
                    lane.state = State::Unknown;
                }
                self.back_off(at);
                self.look_at_unknown(at);
            }
        }
    }

    /// The transaction was applied.
    fn batch_done(&mut self, mut batch: Vec<Change>, revision: Revision) {
        let mut changed: Vec<Changed> = Vec::with_capacity(batch.len());
        let mut shown: Vec<bool> = Vec::with_capacity(batch.len());
        for change in &mut batch {
            let before = changed.len();
            // What etcd did not do is no repair, and keeps no key waiting.
            if change.repair
                && let Some(confirmed) = self.confirmed.get_mut(&change.key)
            {
                confirmed.repaired = self.now.monotonic;
            }
            let kv = |value: Vec<u8>, lease| KeyValue {
                key: Arc::clone(&change.key),
                value: value.into(),
                lease,
                create_revision: if change.created_at == 0 {
                    revision
                } else {
                    change.created_at
                },
                mod_revision: revision,
            };
            match &mut change.write {
                Write::Put {
                    lease,
                    slot,
                    lease_key,
                    value,
                    targets,
                    uid,
                    stamp,
                } => {
                    let value = std::mem::take(value);
                    self.numbers.puts += 1;
                    if *lease_key {
                        self.note_slot(*lease, slot, revision, &mut changed);
                    }
                    let made = Made {
                        // Of several, the record's value tells which one it names.
                        socket: match targets.as_slice() {
                            [only] if uid.is_some() => Some(only.socket()),
                            _ => None,
                        },
                        stamp: *stamp,
                    };
                    self.mirror
                        .put(&change.key, kv(value, *lease), made, &mut changed);
                    if let Some(uid) = uid
                        && Format::by_name(&slot.format).is_some_and(|format| !format.names_pod())
                    {
                        self.mirror.note_pod(&change.key, revision, *uid);
                    }
                }
                Write::LeaseKey(lease, slot) => {
                    self.note_slot(*lease, slot, revision, &mut changed)
                }
                Write::Delete => {
                    self.numbers.removals += 1;
                    self.mirror
                        .answer(&change.key, None, revision, false, &mut changed);
                }
            }
            let mut new = changed.iter().skip(before);
            shown.push(new.any(|shown| shown.key == change.key));
        }
        self.settle(&batch);
        self.mirror_changed(changed);
        // Where a watch was faster, the answer changes nothing, and yet the key is in flight no longer.
        for (change, shown) in batch.iter().zip(&shown) {
            if !shown {
                self.look(&change.key, None);
            }
        }
        let mut shown = shown.into_iter();
        batch.retain(|change| shown.next() != Some(true) || !self.stands_for_that_alone(change));
        self.look_beside(&batch);
    }

    /// Whether what was put is for one address, and the mirror shows it so: a change that it told was looked at with that
    /// address.
    fn stands_for_that_alone(&self, change: &Change) -> bool {
        match &change.write {
            Write::Put { targets, .. } => self
                .mirror
                .get(&change.key)
                .and_then(|record| record.socket)
                .is_some_and(
                    |socket| matches!(targets.as_slice(), [only] if only.socket() == socket),
                ),
            Write::Delete | Write::LeaseKey(..) => false,
        }
    }

    /// The key of a slot was written in a transaction, if it did not stand.
    fn note_slot(
        &mut self,
        lease: LeaseId,
        slot: &SlotName,
        revision: Revision,
        changed: &mut Vec<Changed>,
    ) {
        if self
            .mirror
            .leases()
            .get(lease)
            .is_some_and(|known| known.key_stands)
        {
            return;
        }
        let key = self.keys.lease(lease);
        let kv = KeyValue {
            key: Arc::clone(&key),
            value: slot_value(slot),
            lease,
            create_revision: revision,
            mod_revision: revision,
        };
        self.mirror.answer(&key, Some(kv), revision, false, changed);
    }

    /// etcd refused the transaction and did nothing.
    fn batch_refused(
        &mut self,
        at: usize,
        batch: Vec<Change>,
        then_unknown: bool,
        refusal: Refusal,
        message: &str,
    ) {
        if let Some(lane) = self.lanes.get_mut(at) {
            lane.state = if then_unknown {
                State::Unknown
            } else {
                State::Idle
            };
            // Split until the culprit is alone; the others go on.
            lane.most = (batch.len() / 2).max(1);
        }
        if refusal == Refusal::LeaseNotFound {
            let leases: BTreeSet<LeaseId> = batch
                .iter()
                .filter_map(|change| match &change.write {
                    Write::Put { lease, .. } | Write::LeaseKey(lease, _) => Some(*lease),
                    Write::Delete => None,
                })
                .collect();
            for lease in leases {
                self.ask(Ask::CheckLease(lease), Request::LeaseKeys(lease));
            }
            self.check_own_leases();
            self.back_off(at);
            self.landed(batch);
            return;
        }
        let bundles: BTreeSet<&[u8]> = batch.iter().map(|c| bundle_of(&c.key)).collect();
        if bundles.len() == 1 {
            // One key, or those that go together and can't be split.
            for alone in &batch {
                let key = Arc::clone(&alone.key);
                let registration = self.registration_of(&key, &alone.write);
                if let Some(registration) = registration {
                    self.set_problems(
                        &key,
                        vec![(registration, Problem::Refused(refusal, message.to_owned()))],
                    );
                }
                self.hold(&key, matches!(alone.write, Write::Delete));
            }
        }
        self.landed(batch);
    }

    fn barrier_answered(&mut self, at: usize, answer: Result<Answer, Failure>) {
        match answer {
            Ok(Answer::Txn {
                succeeded: true,
                revision,
                ..
            }) => {
                self.set_no_space(false);
                let Some(lane) = self.lanes.get_mut(at) else {
                    return;
                };
                lane.seen = revision;
                lane.backoff = 0;
                if lane.unknown.is_empty() {
                    lane.state = State::Idle;
                } else {
                    self.send_read(at);
                }
            }
            Ok(Answer::Txn {
                succeeded: false,
                revision,
                reads,
            }) => {
                let seen = self.note_fence(at, &reads, revision);
                if !self.leads() {
                    return;
                }
                if let Some(lane) = self.lanes.get_mut(at) {
                    // An earlier transaction did apply, or someone touched the mark: once more.
                    lane.seen = seen;
                    lane.state = State::Unknown;
                }
            }
            Ok(_) => self.unknown_again(at),
            Err(failure) => {
                self.unknown_again(at);
                if failure.kind == FailureKind::Refused(Refusal::LeaseNotFound) {
                    self.check_own_leases();
                }
            }
        }
    }

    fn unknown_again(&mut self, at: usize) {
        if let Some(lane) = self.lanes.get_mut(at) {
            lane.state = State::Unknown;
        }
        self.back_off(at);
    }

    fn read_answered(&mut self, at: usize, keys: &[Key], answer: Result<Answer, Failure>) {
        let Ok(Answer::Txn {
            revision, reads, ..
        }) = answer
        else {
            if let Err(Failure {
                kind: FailureKind::Refused(refusal),
                message,
            }) = answer
            {
                self.read_refused(at, keys, refusal, message);
            } else {
                self.unknown_again(at);
            }
            return;
        };
        self.note_reads(keys, reads, revision);
        let Some(lane) = self.lanes.get_mut(at) else {
            return;
        };
        let (read, rest): (Vec<Change>, Vec<Change>) = std::mem::take(&mut lane.unknown)
            .into_iter()
            .partition(|change| keys.contains(&change.key));
        let done = rest.is_empty();
        lane.unknown = rest;
        lane.state = State::Idle;
        self.landed(read);
        if !done {
            self.send_read(at);
        }
    }

    /// etcd refuses to read keys of unknown outcome: they are read in ever smaller parts, until the culprit
    /// is alone. It is given up for a while, which is safe: the barrier has passed, and its mod revision
    /// guards it.
    fn read_refused(&mut self, at: usize, keys: &[Key], refusal: Refusal, message: String) {
        let Some(lane) = self.lanes.get_mut(at) else {
            return;
        };
        if keys.len() > 1 {
            lane.most_read = (keys.len() / 2).max(1);
            self.send_read(at);
            return;
        }
        lane.most_read = 0;
        let (culprit, rest): (Vec<Change>, Vec<Change>) = std::mem::take(&mut lane.unknown)
            .into_iter()
            .partition(|change| keys.contains(&change.key));
        let done = rest.is_empty();
        lane.unknown = rest;
        lane.state = State::Idle;
        for change in &culprit {
            if let Some(id) = self.registration_of(&change.key, &change.write) {
                self.set_problems(
                    &change.key,
                    vec![(id, Problem::Refused(refusal, message.clone()))],
                );
            }
            self.hold(&change.key, matches!(change.write, Write::Delete));
        }
        self.landed(culprit);
        if !done {
            self.send_read(at);
        }
    }

    /// What a failed comparison read of leader, owner and mark; gives the mark's mod revision.
    fn note_fence(&mut self, at: usize, reads: &[Vec<KeyValue>], revision: Revision) -> Revision {
        let keys = [
            Arc::clone(&self.keys.leader),
            Arc::clone(&self.keys.owner),
            self.keys.seen(at),
        ];
        let seen = reads
            .get(2)
            .and_then(|found| found.first())
            .map_or(0, |kv| kv.mod_revision);
        self.note_reads(&keys, reads.iter().take(3).cloned().collect(), revision);
        self.control();
        seen
    }

    fn back_off(&mut self, at: usize) {
        let now = self.now.monotonic;
        let no_space = self.no_space;
        if let Some(lane) = self.lanes.get_mut(at) {
            lane.backoff = (lane.backoff * 2).clamp(BACKOFF_MICROS, BACKOFF_MOST_MICROS);
            let wait = if no_space {
                NO_SPACE_MICROS
            } else {
                lane.backoff
            };
            lane.not_before = now + wait;
        }
    }

    /// Without space, the removals among the keys of unknown outcome go on.
    fn look_at_unknown(&mut self, at: usize) {
        if !self.no_space {
            return;
        }
        let keys: Vec<Key> = self.lanes.get(at).map_or_else(Vec::new, |lane| {
            lane.unknown
                .iter()
                .map(|change| Arc::clone(&change.key))
                .collect()
        });
        for key in keys {
            self.look(&key, None);
        }
    }

    fn fly(&mut self, change: &Change) {
        if self.flying.contains_key(&change.key) {
            // A removal without space: what is unknown of the key stays so.
            return;
        }
        let mut flying = Flying::Other;
        if let Write::Put { targets, uid, .. } = &change.write {
            flying = uid.map_or(Flying::OfAll, Flying::Of);
            if uid.is_none() {
                self.pace.aggregate_written(&change.key, self.now.monotonic);
            }
            for socket in targets.iter().map(Target::socket) {
                self.flying_sockets
                    .entry(socket)
                    .or_default()
                    .push(Arc::clone(&change.key));
            }
        }
        self.flying.insert(Arc::clone(&change.key), flying);
    }

    /// The outcome of these changes is known: their keys are looked at again.
    fn landed(&mut self, batch: Vec<Change>) {
        self.settle(&batch);
        self.note_whose_stands(&batch);
        for change in &batch {
            self.look(&change.key, None);
        }
        self.look_beside(&batch);
    }

    /// What was put after all is the record of its pod: where the value does not say so, nothing else tells once
    /// nobody wants the key any more. Who wanted it when it was seen in the mirror has it already.
    pub(super) fn note_whose_stands(&mut self, batch: &[Change]) {
        for change in batch {
            let Write::Put {
                lease,
                slot,
                value,
                uid: Some(uid),
                ..
            } = &change.write
            else {
                continue;
            };
            let standing = self.mirror.get(&change.key).filter(|record| {
                record.made_for == 0
                    && record.mod_revision > change.planned_at
                    && record.lease == *lease
                    && *record.value == **value
            });
            if let Some(at) = standing.map(|record| record.mod_revision)
                && Format::by_name(&slot.format).is_some_and(|format| !format.names_pod())
            {
                self.mirror.note_pod(&change.key, at, *uid);
            }
        }
    }

    /// Nothing is in flight any more at these keys.
    fn settle(&mut self, batch: &[Change]) {
        let some_unknown = self.lanes.iter().any(|lane| !lane.unknown.is_empty());
        for change in batch {
            if some_unknown {
                let lane = self.lanes.get(lane_of(&change.key));
                if lane.is_some_and(|lane| lane.is_unknown(&change.key)) {
                    continue;
                }
            }
            self.flying.remove(&change.key);
            if let Write::Put { lease, targets, .. } = &change.write {
                self.slots.settle(*lease);
                for socket in targets.iter().map(Target::socket) {
                    if let Some(keys) = self.flying_sockets.get_mut(&socket) {
                        keys.retain(|key| *key != change.key);
                        if keys.is_empty() {
                            self.flying_sockets.remove(&socket);
                        }
                    }
                }
            }
        }
    }

    /// Other keys may have waited for the addresses of what was in flight, or for what becomes of a removal.
    fn look_beside(&mut self, batch: &[Change]) {
        for change in batch {
            let sockets: Vec<Socket> = match &change.write {
                Write::Put { targets, .. } => targets.iter().map(Target::socket).collect(),
                Write::Delete | Write::LeaseKey(..) => {
                    self.mirror.sockets_of(&change.key).collect()
                }
            };
            for socket in sockets {
                self.look_at_socket(socket, |key| *key == change.key);
            }
        }
    }

    /// etcd has no space, or has it again.
    pub(super) fn set_no_space(&mut self, no_space: bool) {
        if self.no_space == no_space {
            return;
        }
        self.no_space = no_space;
        let text = if no_space {
            "etcd has no space left (alarm NOSPACE): removals go on, nothing can be added. Compact and defragment it or raise its quota, then: etcdctl alarm disarm"
        } else {
            "etcd has space again"
        };
        self.log(tracing::Level::WARN, text.into());
        self.all_reports_due();
        for at in 0..LANES {
            self.look_at_unknown(at);
        }
    }

    // === leases ===

    /// Whether a new record is wanted at a key, and on this slot.
    fn would_stand_on(&self, key: &Key, slot: &Arc<SlotName>) -> bool {
        self.mirror.get(key).is_none()
            && self
                .index
                .winner(key)
                .and_then(|(claim, _)| self.index.registration(claim.registration))
                .and_then(|stored| stored.slot.as_ref())
                .is_some_and(|wanted| Arc::ptr_eq(wanted, slot))
    }

    fn wait_for_slot(&mut self, slot: &Arc<SlotName>, key: Key) {
        for _ in 0..self.slots.wait(slot, key, capacity(slot)) {
            let lease = self.random_lease();
            self.slots.granting(lease, Arc::clone(slot));
            self.ask(Ask::Grant(lease), Request::Grant(lease, slot.ttl));
        }
    }

    pub(super) fn grant_answered(&mut self, lease: LeaseId, answer: Result<Answer, Failure>) {
        let Some(slot) = self.slots.is_granting(lease).cloned() else {
            return;
        };
        let keys = match answer {
            Ok(_)
            | Err(Failure {
                kind: FailureKind::Refused(Refusal::LeaseExists),
                ..
            }) => {
                self.numbers.grants += 1;
                self.mirror.granted(lease, Arc::clone(&slot));
                self.scopes_dirty = true;
                self.effects.push(Effect::Keep(lease, slot.ttl));
                self.slots.granted(lease, capacity(&slot))
            }
            // The same id again, until the outcome is known: else a slow etcd would be filled with leases.
            Err(Failure {
                kind: FailureKind::Unknown,
                ..
            }) => {
                let again = self.now.monotonic + BACKOFF_MICROS * 10;
                self.grant_again.push((again, lease));
                return;
            }
            Err(failure) => {
                self.log(
                    tracing::Level::WARN,
                    format!("etcd grants no lease: {}", failure.message),
                );
                let keys = self.slots.not_granted(lease);
                let again = self.now.monotonic + BACKOFF_MICROS * 10;
                for key in keys {
                    self.at(again, key);
                }
                return;
            }
        };
        for key in keys {
            if let Some(lane) = self.lanes.get_mut(lane_of(&key)) {
                lane.push(key, false);
            }
        }
    }

    /// Asks again for leases of which it is not known whether they were granted.
    pub(super) fn grant_due(&mut self) {
        let now = self.now.monotonic;
        let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.grant_again)
            .into_iter()
            .partition(|(time, _)| *time <= now);
        self.grant_again = later;
        for (_, lease) in due {
            if let Some(ttl) = self.slots.is_granting(lease).map(|slot| slot.ttl) {
                self.ask(Ask::Grant(lease), Request::Grant(lease, ttl));
            }
        }
    }

    /// A lease is gone (TTL 0): nothing is put on it any more, and what stood on it is put anew as the
    /// watch shows it gone.
    pub(super) fn lease_lost(&mut self, lease: LeaseId) {
        self.slots.drop_lease(lease);
        self.mirror.disown(lease);
        self.effects.push(Effect::Release(lease));
        self.own_lease_lost(lease);
    }

    /// Once a second: empty leases, and what lies far enough back.
    pub(super) fn sweep(&mut self) {
        self.sweep_needs();
        if !self.leads()
            || self.frozen()
            || self.blind()
            || !self.lanes.iter().all(super::Lane::is_known)
        {
            return;
        }
        let super::Role::Leader(term) = &self.role else {
            return;
        };
        let now = self.now.monotonic;
        let mut empty: Vec<(LeaseId, bool)> = self
            .mirror
            .leases()
            .iter()
            .filter(|(id, lease)| {
                lease.records == 0
                    && (lease.own || (lease.key_stands && lease.create_revision < term.won_at))
                    && !self.slots.is_reserved(*id)
                    && !self.revoking.contains(id)
            })
            .filter_map(|(id, lease)| {
                let name = lease.name.as_ref()?;
                let serving = self
                    .index
                    .find(&name.registration)
                    .and_then(|found| self.index.registration(found))
                    .is_some_and(|stored| {
                        stored
                            .serving()
                            .is_some_and(|a| a.scope == *name.scope && a.ttl == name.ttl)
                    });
                self.mirror
                    .covers(name.scope.as_bytes())
                    .then_some((id, lease.own && serving))
            })
            .collect();
        empty.sort_unstable();
        let known: BTreeSet<LeaseId> = empty.iter().map(|(id, _)| *id).collect();
        self.empty_since.retain(|id, _| known.contains(id));
        let mut asked = 0;
        for (id, lingers) in empty {
            let since = *self.empty_since.entry(id).or_insert(now);
            if lingers && now.saturating_sub(since) < EMPTY_MICROS {
                continue;
            }
            if asked == REVOKES_AT_ONCE {
                break;
            }
            asked += 1;
            self.revoking.insert(id);
            self.ask(Ask::LeaseKeys(id), Request::LeaseKeys(id));
        }
    }

    /// What etcd said stands on a lease that is empty in the mirror.
    pub(super) fn lease_keys_answered(&mut self, lease: LeaseId, answer: Result<Answer, Failure>) {
        let own_key = self.keys.lease(lease);
        let known = self.lanes.iter().all(super::Lane::is_known);
        let still_empty = self
            .mirror
            .leases()
            .get(lease)
            .is_some_and(|found| found.records == 0)
            && !self.slots.is_reserved(lease)
            && known;
        match answer {
            Ok(Answer::LeaseKeys(ttl, _)) if ttl < 0 => {
                self.revoking.remove(&lease);
                self.lease_lost(lease);
                self.delete_orphan(&own_key);
            }
            Ok(Answer::LeaseKeys(_, keys))
                if still_empty
                    && self.leads()
                    && !self.frozen()
                    && !self.blind()
                    && keys.iter().all(|key| *key == own_key) =>
            {
                // From here on nothing is put on it, whatever becomes of the revoke.
                self.slots.drop_lease(lease);
                self.ask(Ask::Revoke(lease), Request::Revoke(lease));
            }
            _ => {
                self.revoking.remove(&lease);
            }
        }
    }

    /// The key of a lease that is gone still stands: someone put it without the lease.
    fn delete_orphan(&mut self, key: &Key) {
        let revision = self.mirror.mod_revision(key);
        if revision == 0 || !self.leads() || self.frozen() || self.blind() {
            return;
        }
        let mut compares = self.fence();
        compares.push(Compare::ModRevision(Arc::clone(key), revision));
        let txn = Txn {
            compares,
            then: vec![Op::Delete(Arc::clone(key))],
            otherwise: Vec::new(),
        };
        self.ask(Ask::Orphan, Request::Txn(txn));
    }

    pub(super) fn revoke_answered(&mut self, lease: LeaseId, answer: Result<Answer, Failure>) {
        self.revoking.remove(&lease);
        let gone = match answer {
            Ok(_) => true,
            Err(failure) => failure.kind == FailureKind::Refused(Refusal::LeaseNotFound),
        };
        if gone {
            self.numbers.revokes += 1;
            self.empty_since.remove(&lease);
            self.mirror.disown(lease);
            self.effects.push(Effect::Release(lease));
        }
    }

    // === conflicts ===

    /// Reads a key that seems not to be ours together with the key of its lease: two watches have no order.
    pub(super) fn check_foreign(&mut self, key: &Key) {
        let Some(record) = self.mirror.get(key) else {
            return;
        };
        let under_way = self
            .asks
            .values()
            .any(|ask| matches!(ask, Ask::Conflict(other, _) if other == key));
        if under_way {
            return;
        }
        let lease = record.lease;
        let then = vec![Op::Get(Arc::clone(key)), Op::Get(self.keys.lease(lease))];
        self.ask(
            Ask::Conflict(Arc::clone(key), lease),
            Request::Txn(Txn {
                then,
                ..Txn::default()
            }),
        );
    }

    /// What etcd said of a key in dispute, and of the key of the lease that it was on when that was asked.
    pub(super) fn conflict_answered(
        &mut self,
        key: &Key,
        lease: LeaseId,
        answer: Result<Answer, Failure>,
    ) {
        let now = self.now.monotonic;
        let Ok(Answer::Txn {
            revision, reads, ..
        }) = answer
        else {
            self.at(now + BACKOFF_MICROS * 10, Arc::clone(key));
            return;
        };
        if self.mirror.get(key).is_none() {
            return;
        }
        let mut reads = reads.into_iter();
        let (record, slot) = (
            reads.next().unwrap_or_default(),
            reads.next().unwrap_or_default(),
        );
        // On another lease by now: that one is asked about in its turn.
        if let Some(found) = record.first().filter(|found| found.lease == lease) {
            self.checked.insert(Arc::clone(key), found.mod_revision);
        }
        // The lease key first: it makes the record ours, if it does.
        let keys = [self.keys.lease(lease), Arc::clone(key)];
        self.note_reads(&keys, vec![slot, record], revision);
        self.look(key, None);
    }
}

fn slot_value(slot: &SlotName) -> Box<[u8]> {
    serde_json::to_vec(slot).unwrap_or_default().into()
}

fn rules(slot: &SlotName) -> Rules {
    Format::by_name(&slot.format).unwrap_or_default().rules()
}

/// The most records of a lease.
fn capacity(slot: &SlotName) -> u32 {
    u32::try_from(rules(slot).records_per_lease).unwrap_or(1)
}
