//! What is wanted and what stands in etcd --> what is to be done next.
//!
//! Takes the records that are wanted, the news of the mirror and the answers of etcd, gives one step at a time. Pure: reads no
//! clock, and does no IO. Must never put a key that another writer has, put one without a comparison of what it replaces, or
//! take an outcome for certain that is not.
//!
//! A key is ours when it stands on a lease that this process granted, or was seen on one and has had no other creation since
//! (somebody altered it by hand). That is forgotten with the lease: then another etcd may be there, whose revisions mean
//! something else.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::State;
use super::instance::Group;
use crate::format::Format;
use crate::model::etcd::{
    Answer, Compare, Event, Failure, FailureKind, Key, KeyValue, LeaseId, News, Op, Range, Refusal,
    Request, Revision, Txn,
};

/// A key that somebody keeps altering is put back once in this time (ms), as the operator does.
const REST: u64 = 1_000;

/// The first and the longest pause (ms) after an outcome that is unknown: another session may be there by then.
const AGAIN_FIRST: u64 = 50;
const AGAIN_LAST: u64 = 2_000;

/// The same after a refusal: a person has to do something first.
const REFUSED_FIRST: u64 = 1_000;
const REFUSED_LAST: u64 = 30_000;

/// The pause (ms) before a keepalive that was not answered is sent again.
const KEEP_AGAIN: u64 = 200;

/// What is to be done.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    /// Ask etcd, and tell [`Core::answered`] with the same ticket.
    Ask(Ticket, Request),
    /// Nothing before this time; `None`: before something is heard.
    Wait(Option<u64>),
}

/// What a request was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ticket {
    Grant(u32, LeaseId),
    Revoke(u32, LeaseId),
    Read { unit: u64, epoch: u64 },
    Put { unit: u64, epoch: u64 },
    Delete { unit: u64, epoch: u64 },
}

/// How far a lease is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lease {
    None,
    /// Whether it was granted is not known.
    Asked(LeaseId),
    Granted(LeaseId),
}

/// What fails, how often in a row, and when it is tried again.
#[derive(Debug, Default)]
struct Trouble {
    not_before: u64,
    failures: u32,
    why: Option<Why>,
}

#[derive(Clone, Debug, PartialEq)]
enum Why {
    /// It passes by itself.
    Away(String),
    Refused(String),
}

impl Trouble {
    fn note(&mut self, failure: &Failure, now: u64) {
        let (first, last, why) = match failure.kind {
            FailureKind::Refused(_) => (
                REFUSED_FIRST,
                REFUSED_LAST,
                Why::Refused(failure.message.clone()),
            ),
            FailureKind::NoSpace => (
                REFUSED_FIRST,
                AGAIN_LAST,
                Why::Away(format!(
                    "etcd is out of space: compact and defragment it, or raise its quota, and disarm the alarm ({})",
                    failure.message
                )),
            ),
            FailureKind::Unknown => (AGAIN_FIRST, AGAIN_LAST, Why::Away(failure.message.clone())),
        };
        let pause = first.saturating_mul(1 << self.failures.min(16)).min(last);
        self.not_before = now + pause;
        self.failures += 1;
        self.why = Some(why);
    }
}

/// A lease and what is put on it.
#[derive(Debug)]
struct Slot {
    lease: Lease,
    /// How many records it may hold.
    room: usize,
    /// When it is to be kept alive.
    keep: u64,
    keeping: bool,
    trouble: Trouble,
}

/// What is known of a key in etcd.
#[derive(Clone, Debug, PartialEq)]
enum Seen {
    Unknown,
    Absent,
    There(KeyValue),
}

#[derive(Debug)]
struct Entry {
    key: Key,
    value: Box<[u8]>,
    seen: Seen,
    /// What is older than this is known.
    revision: Revision,
    /// The create revision under which the key stood on a lease of ours.
    remembered: Option<Revision>,
}

/// Keys that go in one transaction.
#[derive(Debug)]
struct Unit {
    id: u64,
    slot: u32,
    format: Format,
    prefix: String,
    entries: Vec<Entry>,
    wanted: bool,
    /// When it may be put again.
    rested: u64,
    /// A transaction was sent, and whether it was applied is not known: read before anything else is done.
    doubtful: bool,
    /// A put may be applied late: the key is followed on, also when it is not there.
    lingers: bool,
    trouble: Trouble,
}

/// What a unit needs.
enum Need {
    Nothing,
    Read,
    Put,
    Delete,
}

/// The keys of one registration.
#[derive(Debug)]
pub(super) struct Core {
    ttl: i64,
    units: Vec<Unit>,
    slots: BTreeMap<u32, Slot>,
    numbers: u64,
    /// All leases that this process asked for.
    own: HashSet<LeaseId>,
    /// Rises when the watch breaks: what was asked before tells nothing of what is seen after.
    epoch: u64,
    /// Why the keys are not watched, while they are not.
    away: Option<String>,
    /// Why there is no connection, while there is none.
    down: Option<String>,
    closing: bool,
    closed: bool,
}

impl Core {
    /// `ttl` is in seconds.
    pub(super) fn new(ttl: i64) -> Self {
        Self {
            ttl,
            units: Vec::new(),
            slots: BTreeMap::new(),
            numbers: 0,
            own: HashSet::new(),
            epoch: 0,
            away: None,
            down: None,
            closing: false,
            closed: false,
        }
    }

    /// Exactly these are wanted from now on.
    pub(super) fn want(&mut self, groups: Vec<Group>) {
        for unit in &mut self.units {
            unit.wanted = false;
        }
        for group in groups {
            let same = |unit: &&mut Unit| {
                let known = unit.entries.iter().map(|entry| &entry.key);
                known.eq(group.records.iter().map(|(key, _)| key))
            };
            if let Some(unit) = self.units.iter_mut().find(same) {
                unit.wanted = true;
                unit.format = group.format;
                unit.prefix = group.prefix;
                for (entry, (_, value)) in unit.entries.iter_mut().zip(group.records) {
                    if entry.value != value {
                        entry.value = value;
                        unit.rested = 0;
                    }
                }
                continue;
            }
            let slot = self.slot_for(&group);
            self.numbers += 1;
            let entries = group.records.into_iter().map(|(key, value)| Entry {
                key,
                value,
                seen: Seen::Unknown,
                revision: 0,
                remembered: None,
            });
            self.units.push(Unit {
                id: self.numbers,
                slot,
                format: group.format,
                prefix: group.prefix,
                entries: entries.collect(),
                wanted: true,
                rested: 0,
                doubtful: false,
                lingers: false,
                trouble: Trouble::default(),
            });
        }
        self.tidy();
    }

    /// A lease with room for so many records, as the format has it.
    fn slot_for(&mut self, group: &Group) -> u32 {
        let room = group.format.rules().records_per_lease;
        for (number, slot) in &self.slots {
            let taken: usize = self
                .units
                .iter()
                .filter(|unit| unit.slot == *number)
                .map(|unit| unit.entries.len())
                .sum();
            if slot.room == room && taken + group.records.len() <= room {
                return *number;
            }
        }
        let number = self.slots.last_key_value().map_or(0, |(last, _)| last + 1);
        self.slots.insert(
            number,
            Slot {
                lease: Lease::None,
                room,
                keep: 0,
                keeping: false,
                trouble: Trouble::default(),
            },
        );
        number
    }

    /// Leave nothing behind: put back what was altered by hand, and revoke the leases.
    pub(super) fn close(&mut self) {
        self.closing = true;
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// The keys that are to be watched.
    pub(super) fn ranges(&self) -> BTreeSet<Range> {
        self.entries().map(|entry| range_of(&entry.key)).collect()
    }

    fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.units.iter().flat_map(|unit| &unit.entries)
    }

    pub(super) fn state(&self) -> State {
        if self.closed {
            return State::Closed;
        }
        let away = self.away.as_ref().filter(|_| !self.units.is_empty());
        if let Some(why) = self.down.as_ref().or(away) {
            return State::Waiting(Some(why.clone()));
        }
        let mut waiting = None;
        let mut refused = None;
        for unit in &self.units {
            if unit.wanted
                && let Some(taken) = unit.entries.iter().find_map(|entry| self.taken(entry))
            {
                return State::Conflict {
                    key: String::from_utf8_lossy(&taken.key).into_owned(),
                    owner: owner(unit, taken),
                };
            }
            if !matches!(self.need(unit), Need::Nothing) || !self.is_done(unit) {
                let slot = self.slots.get(&unit.slot);
                let why = unit.trouble.why.as_ref();
                match why.or_else(|| slot?.trouble.why.as_ref()) {
                    Some(Why::Refused(why)) => refused = Some(why.clone()),
                    Some(Why::Away(why)) => waiting = Some(Some(why.clone())),
                    None => waiting = waiting.or(Some(None)),
                }
            }
        }
        match (refused, waiting) {
            (Some(why), _) => State::Refused(why),
            (None, Some(why)) => State::Waiting(why),
            (None, None) => State::Registered,
        }
    }

    /// Whether etcd is known to hold what it should.
    fn is_done(&self, unit: &Unit) -> bool {
        unit.entries.iter().all(|entry| {
            if unit.wanted {
                self.stands(unit, entry)
            } else {
                entry.seen == Seen::Absent || self.taken(entry).is_some()
            }
        })
    }

    /// Whether the key stands as it should.
    fn stands(&self, unit: &Unit, entry: &Entry) -> bool {
        match &entry.seen {
            Seen::There(kv) => {
                kv.value == entry.value
                    && self.slots.get(&unit.slot).map(|slot| slot.lease)
                        == Some(Lease::Granted(kv.lease))
            }
            Seen::Unknown | Seen::Absent => false,
        }
    }

    /// The key, where another writer has it.
    fn taken<'a>(&self, entry: &'a Entry) -> Option<&'a KeyValue> {
        match &entry.seen {
            Seen::There(kv)
                if !self.own.contains(&kv.lease)
                    && entry.remembered != Some(kv.create_revision) =>
            {
                Some(kv)
            }
            _ => None,
        }
    }

    /// Whether the key is ours, and somebody took it from its lease.
    fn is_detached(&self, entry: &Entry) -> bool {
        match &entry.seen {
            Seen::There(kv) => !self.own.contains(&kv.lease) && self.taken(entry).is_none(),
            Seen::Unknown | Seen::Absent => false,
        }
    }

    fn need(&self, unit: &Unit) -> Need {
        if unit.entries.iter().any(|entry| entry.seen == Seen::Unknown) {
            return Need::Nothing;
        }
        if unit.doubtful {
            return Need::Read;
        }
        // Put back first: it then goes with its lease, which no other etcd has.
        if (self.closing || !unit.wanted)
            && unit.entries.iter().any(|entry| self.is_detached(entry))
        {
            return Need::Put;
        }
        if self.closing {
            return Need::Nothing;
        }
        if !unit.wanted {
            let ours = |entry: &Entry| matches!(&entry.seen, Seen::There(kv) if self.own.contains(&kv.lease));
            return if unit.entries.iter().any(ours) {
                Need::Delete
            } else {
                Need::Nothing
            };
        }
        let taken = unit.entries.iter().any(|entry| self.taken(entry).is_some());
        if taken || unit.entries.iter().all(|entry| self.stands(unit, entry)) {
            return Need::Nothing;
        }
        Need::Put
    }

    /// What is to be done now. One request is under way at a time; what is to go goes first.
    pub(super) fn next(&mut self, now: u64, random: impl Fn() -> LeaseId) -> Step {
        let mut wake: Option<u64> = None;
        let mut later = |at: u64| wake = Some(wake.map_or(at, |wake| wake.min(at)));
        let mut put: Option<&Unit> = None;
        for unit in &self.units {
            let need = self.need(unit);
            let mut earliest = unit.trouble.not_before;
            match need {
                Need::Nothing => continue,
                Need::Put if unit.wanted && !self.closing => {
                    earliest = earliest.max(unit.rested).max(self.lease_from(unit.slot));
                }
                Need::Put | Need::Read | Need::Delete => {}
            }
            if earliest > now {
                later(earliest);
                continue;
            }
            let (id, epoch) = (unit.id, self.epoch);
            match need {
                Need::Read => {
                    let request = Request::Txn(Txn {
                        then: gets(unit),
                        ..Txn::default()
                    });
                    return Step::Ask(Ticket::Read { unit: id, epoch }, request);
                }
                Need::Delete => {
                    return Step::Ask(Ticket::Delete { unit: id, epoch }, self.delete(unit));
                }
                Need::Put | Need::Nothing => put = put.or(Some(unit)),
            }
        }
        if let Some(unit) = put {
            let number = unit.slot;
            let lease = self
                .slots
                .get(&number)
                .map_or(Lease::None, |slot| slot.lease);
            let lease = match lease {
                Lease::Granted(lease) => {
                    let request = self.put(unit, lease);
                    let (unit, epoch) = (unit.id, self.epoch);
                    return Step::Ask(Ticket::Put { unit, epoch }, request);
                }
                // The same id again: that it is there already is an answer, too.
                Lease::Asked(lease) => lease,
                Lease::None => random(),
            };
            if let Some(slot) = self.slots.get_mut(&number) {
                slot.lease = Lease::Asked(lease);
            }
            self.own.insert(lease);
            return Step::Ask(
                Ticket::Grant(number, lease),
                Request::Grant(lease, self.ttl),
            );
        }
        for (number, slot) in &self.slots {
            let used = self.units.iter().any(|unit| unit.slot == *number);
            let (Lease::Asked(lease) | Lease::Granted(lease)) = slot.lease else {
                continue;
            };
            if used && !self.closing {
                continue;
            }
            if slot.trouble.not_before > now {
                later(slot.trouble.not_before);
                continue;
            }
            return Step::Ask(Ticket::Revoke(*number, lease), Request::Revoke(lease));
        }
        if self.closing && self.slots.values().all(|slot| slot.lease == Lease::None) {
            self.closed = true;
        }
        Step::Wait(wake)
    }

    /// When a lease that is not granted may be asked for.
    fn lease_from(&self, number: u32) -> u64 {
        match self.slots.get(&number) {
            Some(slot) if !matches!(slot.lease, Lease::Granted(_)) => slot.trouble.not_before,
            _ => 0,
        }
    }

    fn put(&self, unit: &Unit, lease: LeaseId) -> Request {
        let as_wanted = unit.wanted && !self.closing;
        let put = |entry: &Entry| match &entry.seen {
            // What is not wanted any more is only put back on its lease.
            Seen::There(kv) if !as_wanted => self
                .is_detached(entry)
                .then(|| Op::Put(entry.key.clone(), kv.value.clone(), lease)),
            _ if as_wanted && !self.stands(unit, entry) => {
                Some(Op::Put(entry.key.clone(), entry.value.clone(), lease))
            }
            _ => None,
        };
        Request::Txn(Txn {
            compares: compares(unit),
            then: unit.entries.iter().filter_map(put).collect(),
            otherwise: gets(unit),
        })
    }

    fn delete(&self, unit: &Unit) -> Request {
        let ours =
            |entry: &&Entry| matches!(&entry.seen, Seen::There(kv) if self.own.contains(&kv.lease));
        let ours = unit.entries.iter().filter(ours);
        Request::Txn(Txn {
            compares: compares(unit),
            then: ours.map(|entry| Op::Delete(entry.key.clone())).collect(),
            otherwise: gets(unit),
        })
    }

    /// What became of a request.
    pub(super) fn answered(
        &mut self,
        ticket: Ticket,
        request: &Request,
        answer: Result<Answer, Failure>,
        now: u64,
    ) {
        match ticket {
            Ticket::Grant(number, lease) => self.granted(number, lease, answer, now),
            Ticket::Revoke(number, lease) => self.revoked(number, lease, answer, now),
            Ticket::Read { unit, epoch }
            | Ticket::Put { unit, epoch }
            | Ticket::Delete { unit, epoch } => {
                let is_put = matches!(ticket, Ticket::Put { .. });
                self.transacted(unit, epoch, is_put, request, answer, now);
            }
        }
        self.tidy();
    }

    fn granted(&mut self, number: u32, lease: LeaseId, answer: Result<Answer, Failure>, now: u64) {
        let Some(slot) = self.slots.get_mut(&number) else {
            return;
        };
        match answer {
            Err(failure) if failure.kind != FailureKind::Refused(Refusal::LeaseExists) => {
                slot.trouble.note(&failure, now);
            }
            _ => {
                slot.lease = Lease::Granted(lease);
                slot.keep = now + self.ttl.unsigned_abs() * 1_000 / 3;
                slot.trouble = Trouble::default();
            }
        }
    }

    fn revoked(&mut self, number: u32, lease: LeaseId, answer: Result<Answer, Failure>, now: u64) {
        match answer {
            Err(failure) if failure.kind != FailureKind::Refused(Refusal::LeaseNotFound) => {
                if let Some(slot) = self.slots.get_mut(&number) {
                    slot.trouble.note(&failure, now);
                }
            }
            _ => self.lost(number, lease),
        }
    }

    fn transacted(
        &mut self,
        id: u64,
        epoch: u64,
        is_put: bool,
        request: &Request,
        answer: Result<Answer, Failure>,
        now: u64,
    ) {
        let current = epoch == self.epoch;
        let Some(unit) = self.units.iter_mut().find(|unit| unit.id == id) else {
            return;
        };
        match answer {
            Ok(Answer::Txn {
                succeeded,
                revision,
                reads,
            }) => {
                unit.trouble = Trouble::default();
                let Request::Txn(txn) = request else { return };
                if is_put && succeeded {
                    unit.rested = now + REST;
                }
                if !current {
                    return;
                }
                let done = if succeeded { &txn.then } else { &txn.otherwise };
                unit.doubtful = false;
                for (op, read) in done.iter().zip(reads) {
                    let (key, seen) = match op {
                        Op::Get(key) => {
                            let found = read.into_iter().next();
                            (key, found.map_or(Seen::Absent, Seen::There))
                        }
                        Op::Delete(key) => (key, Seen::Absent),
                        Op::Put(key, value, lease) => {
                            let kv = KeyValue {
                                key: key.clone(),
                                value: value.clone(),
                                lease: *lease,
                                // Told by the entry, where it was there before.
                                create_revision: revision,
                                mod_revision: revision,
                            };
                            (key, Seen::There(kv))
                        }
                        Op::GetRange(_) => continue,
                    };
                    let entry = unit.entries.iter_mut().find(|entry| entry.key == *key);
                    // The watch may have told more already.
                    if let Some(entry) = entry.filter(|entry| entry.revision <= revision) {
                        let is_put = matches!(op, Op::Put(..));
                        entry.see(seen, revision, is_put, &self.own);
                    }
                }
            }
            Ok(_) => {}
            Err(failure) => {
                if failure.kind == FailureKind::Refused(Refusal::LeaseNotFound) {
                    let number = unit.slot;
                    let lease = self.slots.get(&number).map(|slot| slot.lease);
                    if let Some(Lease::Granted(lease)) = lease {
                        self.lost(number, lease);
                    }
                    return;
                }
                if !matches!(failure.kind, FailureKind::Refused(_)) {
                    unit.doubtful = true;
                    unit.lingers |= is_put;
                }
                unit.trouble.note(&failure, now);
            }
        }
    }

    /// The leases that are to be kept alive now; [`Core::kept`] follows for each.
    pub(super) fn due(&mut self, now: u64) -> Vec<(u32, LeaseId)> {
        let mut found = Vec::new();
        for (number, slot) in &mut self.slots {
            if let Lease::Granted(lease) = slot.lease
                && !slot.keeping
                && slot.keep <= now
            {
                slot.keeping = true;
                found.push((*number, lease));
            }
        }
        found
    }

    /// When the next lease is to be kept alive.
    pub(super) fn next_keep(&self) -> Option<u64> {
        let granted = self
            .slots
            .values()
            .filter(|slot| !slot.keeping && matches!(slot.lease, Lease::Granted(_)));
        granted.map(|slot| slot.keep).min()
    }

    /// What became of a keepalive: whether the lease lives.
    pub(super) fn kept(
        &mut self,
        number: u32,
        lease: LeaseId,
        answer: Result<bool, Failure>,
        now: u64,
    ) {
        let Some(slot) = self.slots.get_mut(&number) else {
            return;
        };
        slot.keeping = false;
        if slot.lease != Lease::Granted(lease) {
            return;
        }
        match answer {
            Ok(true) => slot.keep = now + self.ttl.unsigned_abs() * 1_000 / 3,
            Ok(false) => self.lost(number, lease),
            Err(failure) => {
                slot.keep = now + KEEP_AGAIN;
                tracing::debug!(why = failure.message, "a lease could not be kept alive yet");
            }
        }
        self.tidy();
    }

    /// A lease is gone, and its keys are.
    fn lost(&mut self, number: u32, lease: LeaseId) {
        let Some(slot) = self.slots.get_mut(&number) else {
            return;
        };
        if !matches!(slot.lease, Lease::Asked(id) | Lease::Granted(id) if id == lease) {
            return;
        }
        slot.lease = Lease::None;
        slot.trouble = Trouble::default();
        for unit in self.units.iter_mut().filter(|unit| unit.slot == number) {
            for entry in &mut unit.entries {
                entry.remembered = None;
            }
        }
    }

    /// What the mirror tells.
    pub(super) fn heard(&mut self, news: News) -> Option<Range> {
        let own = &self.own;
        match news {
            News::Snapshot {
                range,
                revision,
                records,
            } => {
                self.away = None;
                for unit in &mut self.units {
                    for entry in &mut unit.entries {
                        // An answer of this epoch may be newer.
                        if range_of(&entry.key) == range && entry.revision <= revision {
                            let found = records.iter().find(|kv| kv.key == entry.key).cloned();
                            let seen = found.map_or(Seen::Absent, Seen::There);
                            entry.see(seen, revision, false, own);
                            if matches!(unit.trouble.why, Some(Why::Refused(_))) {
                                unit.trouble = Trouble::default();
                            }
                        }
                    }
                }
            }
            News::Events { events, .. } => {
                for event in events {
                    let (key, revision, seen) = match event {
                        Event::Put(kv) => (kv.key.clone(), kv.mod_revision, Seen::There(kv)),
                        Event::Delete(key, revision) => (key, revision, Seen::Absent),
                    };
                    let entries = self.units.iter_mut().flat_map(|unit| &mut unit.entries);
                    for entry in entries.filter(|entry| entry.key == key) {
                        // Before the first read, events tell nothing that it will not.
                        if entry.seen != Seen::Unknown && entry.revision < revision {
                            entry.see(seen.clone(), revision, false, own);
                        }
                    }
                }
            }
            News::KeysSeen {
                range,
                revision,
                keys,
            } => {
                let agrees = self
                    .entries()
                    .filter(|e| range_of(&e.key) == range)
                    .all(|entry| {
                        let there = keys.iter().find(|(key, _)| *key == entry.key);
                        match (&entry.seen, there) {
                            (Seen::Unknown, _) => true,
                            _ if entry.revision > revision => true,
                            (Seen::There(kv), Some((_, seen))) => kv.mod_revision == *seen,
                            (Seen::Absent, None) => true,
                            _ => false,
                        }
                    });
                return (!agrees).then_some(range);
            }
            News::Refused(range, failure) => {
                for unit in &mut self.units {
                    if unit.entries.iter().any(|e| range_of(&e.key) == range) {
                        unit.trouble.why = Some(Why::Refused(failure.message.clone()));
                    }
                }
            }
            News::Broken(why) => self.away(why),
            News::Progress(_) => {}
        }
        self.tidy();
        None
    }

    /// Whether there is a connection, and if not, why.
    pub(super) fn connection(&mut self, down: Option<String>) {
        self.down = down;
    }

    /// etcd can't be watched: what stands there is not known, nor which etcd it will be.
    fn away(&mut self, why: String) {
        self.away = Some(why);
        self.epoch += 1;
        for entry in self.units.iter_mut().flat_map(|unit| &mut unit.entries) {
            entry.seen = Seen::Unknown;
            entry.revision = 0;
        }
        for slot in self.slots.values_mut() {
            slot.keep = 0;
        }
    }

    /// Forgets keys that are not wanted and not there, and leases that are gone.
    fn tidy(&mut self) {
        let Self {
            units, own, slots, ..
        } = self;
        units.retain(|unit| {
            let gone = |entry: &Entry| match &entry.seen {
                Seen::Unknown => false,
                Seen::Absent => true,
                Seen::There(kv) => {
                    !own.contains(&kv.lease) && entry.remembered != Some(kv.create_revision)
                }
            };
            unit.wanted || unit.doubtful || unit.lingers || !unit.entries.iter().all(gone)
        });
        slots.retain(|number, slot| {
            slot.lease != Lease::None || units.iter().any(|unit| unit.slot == *number)
        });
    }
}

impl Entry {
    /// What stands at the key at a revision.
    fn see(&mut self, mut seen: Seen, revision: Revision, is_put: bool, own: &HashSet<LeaseId>) {
        if let (Seen::There(new), Seen::There(old), true) = (&mut seen, &self.seen, is_put) {
            new.create_revision = old.create_revision;
        }
        self.remembered = match &seen {
            Seen::There(kv) if own.contains(&kv.lease) => Some(kv.create_revision),
            Seen::There(kv) => self
                .remembered
                .filter(|remembered| *remembered == kv.create_revision),
            Seen::Unknown | Seen::Absent => None,
        };
        self.seen = seen;
        self.revision = revision;
    }
}

/// The range of one key.
fn range_of(key: &Key) -> Range {
    let mut end = key.to_vec();
    end.push(0);
    Range {
        start: key.clone(),
        end: end.into(),
    }
}

fn gets(unit: &Unit) -> Vec<Op> {
    let entries = unit.entries.iter();
    entries.map(|entry| Op::Get(entry.key.clone())).collect()
}

fn compares(unit: &Unit) -> Vec<Compare> {
    let compare = |entry: &Entry| {
        let revision = match &entry.seen {
            Seen::There(kv) => kv.mod_revision,
            Seen::Unknown | Seen::Absent => 0,
        };
        Compare::ModRevision(entry.key.clone(), revision)
    };
    unit.entries.iter().map(compare).collect()
}

/// Whose a key is, as far as it tells.
fn owner(unit: &Unit, taken: &KeyValue) -> String {
    let mut parts = Vec::new();
    if let Ok(told) = unit.format.read(&unit.prefix, &taken.key, &taken.value) {
        let names = [
            ("cluster", told.cluster),
            ("pod", told.pod),
            ("uid", told.uid),
        ];
        for (what, name) in names {
            if let Some(name) = name {
                let name = crate::model::names::shortened(&name, 80);
                parts.push(format!("{what} {name:?}"));
            }
        }
    }
    parts.push(match taken.lease {
        0 => "without a lease".to_owned(),
        lease => format!("lease {lease:016x}"),
    });
    parts.join(", ")
}
