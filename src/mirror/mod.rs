//! The operator's copy of what etcd holds under its prefixes.
//!
//! Takes snapshots, events of watches and answers of transactions, gives the keys that changed. A watch
//! may lag behind an answer: what an answer showed is never undone by an older event. Must never do IO,
//! read a clock, or know what is wanted.

pub mod leases;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::format::Format;
use crate::index::pods::Uid;
use crate::index::registrations::Stamp;
use crate::model::endpoint::Socket;
use crate::model::etcd::{Event, Key, KeyValue, LeaseId, Range, Revision};
use crate::model::maps::{HashMap, HashSet};

use leases::{Leases, SlotName};

/// A key as the mirror holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The value.
    pub value: Box<[u8]>,
    /// The lease; 0: none.
    pub lease: LeaseId,
    /// The revision at which it came into being.
    pub create_revision: Revision,
    /// The revision of its last change.
    pub mod_revision: Revision,
    /// It was seen under a lease of ours since it came into being.
    pub ours: bool,
    /// It was read from etcd, and not only answered to a write.
    pub read: bool,
    /// What it stands for, where it is ours and could be read.
    pub socket: Option<Socket>,
    /// The index's stamp of which this record was told to be as wanted; 0: of none.
    pub made_for: Stamp,
}

/// What this process knows of a record that it put, and need not read from the value.
#[derive(Clone, Copy, Debug)]
pub struct Made {
    /// What it stands for.
    pub socket: Option<Socket>,
    /// What it was made from.
    pub stamp: Stamp,
}

/// A key that changed, with the address of what stood there before.
#[derive(Debug, PartialEq, Eq)]
pub struct Changed {
    /// The key.
    pub key: Key,
    /// The address of the record that stood there.
    pub before: Option<Socket>,
    /// It was a read or an event that showed it, and not an answer to a write.
    pub read: bool,
}

/// A range that is followed.
#[derive(Debug)]
struct Followed {
    range: Range,
    /// Up to which revision it was delivered; 0: no snapshot yet.
    reached: Revision,
}

/// The mirror.
#[derive(Debug)]
pub struct Mirror {
    leases_prefix: String,
    records: HashMap<Key, Record>,
    /// Their keys in order: most look-ups are of one key, and a tree compares it with a dozen others each time.
    order: BTreeSet<Key>,
    /// Keys of which an answer knows more than the watch has delivered, and up to which revision.
    ahead: HashMap<Key, Revision>,
    leases: Leases,
    sockets: HashMap<Socket, SmallVec<[Key; 1]>>,
    /// What else a record stands for, beside its first address: few formats have such records.
    more_sockets: HashMap<Key, Vec<Socket>>,
    /// The records on a lease of which it is not known that they are ours, or what they stand for: the key
    /// of the lease may still tell it.
    untold: HashMap<LeaseId, BTreeSet<Key>>,
    /// Whose record stands at a key, where its value does not say; it goes with the next change of the key.
    pods: HashMap<Key, Uid>,
    /// What is followed, by its first key; ranges don't overlap.
    ranges: BTreeMap<Key, Followed>,
    /// Those of them that were not read since the watches broke: what is known of them may be of another etcd.
    unread: BTreeSet<Range>,
}

impl Mirror {
    /// An empty mirror; `leases_prefix` is where this cluster's slots stand, uid included.
    #[must_use]
    pub fn new(leases_prefix: String) -> Self {
        Self {
            leases_prefix,
            records: HashMap::default(),
            order: BTreeSet::new(),
            ahead: HashMap::default(),
            leases: Leases::default(),
            sockets: HashMap::default(),
            more_sockets: HashMap::default(),
            untold: HashMap::default(),
            pods: HashMap::default(),
            ranges: BTreeMap::new(),
            unread: BTreeSet::new(),
        }
    }

    // === what is asked ===

    /// What stands at a key.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<&Record> {
        self.records.get(key)
    }

    /// The mod revision of a key; 0 when it does not stand.
    #[must_use]
    pub fn mod_revision(&self, key: &[u8]) -> Revision {
        self.records
            .get(key)
            .map_or(0, |record| record.mod_revision)
    }

    /// Everything below a prefix, in order.
    pub fn below<'a>(
        &'a self,
        prefix: &[u8],
    ) -> impl Iterator<Item = (&'a Key, &'a Record)> + use<'a> {
        self.in_range(&Range::prefix(prefix))
    }

    /// Everything in a range, in order.
    pub fn in_range<'a>(
        &'a self,
        range: &Range,
    ) -> impl Iterator<Item = (&'a Key, &'a Record)> + use<'a> {
        self.ordered(range)
            .filter_map(|key| Some((key, self.records.get(key)?)))
    }

    fn ordered<'a>(&'a self, range: &Range) -> impl Iterator<Item = &'a Key> + use<'a> {
        self.order
            .range::<[u8], _>((Bound::Included(&*range.start), Bound::Excluded(&*range.end)))
    }

    /// Whether a reading of keys and revisions alone, at `revision`, shows something else. What came
    /// into being or changed later is left out.
    #[must_use]
    pub fn differs_from(
        &self,
        range: &Range,
        revision: Revision,
        keys: &[(Key, Revision)],
    ) -> bool {
        let missed = keys
            .iter()
            .any(|(key, at)| self.mod_revision(key) < *at && !self.ahead.contains_key(key));
        let seen: HashSet<&Key> = keys.iter().map(|(key, _)| key).collect();
        missed
            || self
                .in_range(range)
                .any(|(key, record)| record.mod_revision <= revision && !seen.contains(key))
    }

    /// The number of keys.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether nothing is mirrored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// The leases.
    #[must_use]
    pub fn leases(&self) -> &Leases {
        &self.leases
    }

    /// Our records that stand for an address and port, of whatever protocol.
    #[must_use]
    pub fn keys_at(&self, socket: &Socket) -> &[Key] {
        self.sockets.get(socket).map_or(&[], |keys| keys)
    }

    /// The addresses that a record of ours stands for.
    pub fn sockets_of(&self, key: &[u8]) -> impl Iterator<Item = Socket> {
        let first = self.get(key).and_then(|record| record.socket);
        let more = self.more_sockets.get(key).into_iter().flatten().copied();
        first.into_iter().chain(more)
    }

    /// The pod that a record stands for, as far as it was told by [`Mirror::note_pod`].
    #[must_use]
    pub fn pod_at(&self, key: &[u8]) -> Option<Uid> {
        self.pods.get(key).copied()
    }

    /// Whether a range that holds the key was read.
    #[must_use]
    pub fn covers(&self, key: &[u8]) -> bool {
        self.reached_for(key) > 0
    }

    /// Whether an answer told of the key what its watch has not delivered yet.
    #[must_use]
    pub fn is_ahead(&self, key: &[u8]) -> bool {
        self.ahead.contains_key(key)
    }

    /// Up to which revision the range that holds the key was delivered.
    fn reached_for(&self, key: &[u8]) -> Revision {
        self.ranges
            .range::<[u8], _>((Bound::Unbounded, Bound::Included(key)))
            .next_back()
            .filter(|(_, followed)| followed.range.contains(key))
            .map_or(0, |(_, followed)| followed.reached)
    }

    fn followed(&self, range: &Range) -> Option<&Followed> {
        self.ranges
            .get(&range.start)
            .filter(|followed| followed.range == *range)
    }

    fn followed_mut(&mut self, range: &Range) -> Option<&mut Followed> {
        self.ranges
            .get_mut(&range.start)
            .filter(|followed| followed.range == *range)
    }

    /// Whether everything that is followed was delivered up to a revision since the watches broke last, but for
    /// ranges that can't be read.
    #[must_use]
    pub fn reached(&self, revision: Revision, unreadable: impl Fn(&Range) -> bool) -> bool {
        let mut ranges = self.ranges.values().map(|followed| &followed.range);
        !self.ranges.is_empty()
            && ranges.all(|range| self.range_reached(range, revision) || unreadable(range))
    }

    /// Whether this one range was delivered up to a revision since the watches broke last.
    #[must_use]
    pub fn range_reached(&self, range: &Range, revision: Revision) -> bool {
        self.followed(range)
            .is_some_and(|followed| followed.reached >= revision)
            && !self.unread.contains(range)
    }

    // === what changes it ===

    /// Where this cluster's slots stand, once the UID is known. Before any snapshot only.
    pub fn set_leases_prefix(&mut self, prefix: String) {
        self.leases_prefix = prefix;
    }

    /// What is followed from now on. What no range holds any more is forgotten.
    pub fn follow(&mut self, ranges: &[Range], changed: &mut Vec<Changed>) {
        let old = std::mem::take(&mut self.ranges);
        for range in ranges {
            let known = old.get(&range.start).filter(|old| old.range == *range);
            let followed = Followed {
                range: range.clone(),
                reached: known.map_or(0, |old| old.reached),
            };
            self.ranges.insert(Arc::clone(&range.start), followed);
        }
        for Followed { range, .. } in old.values() {
            if self.followed(range).is_some() {
                continue;
            }
            self.unread.remove(range);
            let orphans: Vec<Key> = self
                .keys_in(range)
                .into_iter()
                .filter(|key| {
                    let mut followed = self.ranges.values();
                    !followed.any(|other| other.range.contains(key))
                })
                .collect();
            for key in orphans {
                self.ahead.remove(&key);
                self.set(&key, None, true, changed);
            }
        }
    }

    /// All that stands in a range at a revision.
    pub fn snapshot(
        &mut self,
        range: &Range,
        revision: Revision,
        records: Vec<KeyValue>,
        changed: &mut Vec<Changed>,
    ) {
        let Some(followed) = self.followed_mut(range) else {
            return;
        };
        // Behind what a watch had delivered: etcd was restored or wiped, and no answer from before counts.
        let went_back = revision < followed.reached;
        followed.reached = revision;
        self.unread.remove(range);
        self.ahead
            .retain(|key, known| !range.contains(key) || (*known > revision && !went_back));
        let mut gone: HashSet<Key> = self.keys_in(range).into_iter().collect();
        // Slots first, so that records are known for ours when they are looked at.
        let (slots, rest): (Vec<_>, Vec<_>) = records
            .into_iter()
            .partition(|kv| kv.key.starts_with(self.leases_prefix.as_bytes()));
        for kv in slots.into_iter().chain(rest) {
            gone.remove(&kv.key);
            if !self.ahead.contains_key(&kv.key) {
                let key = Arc::clone(&kv.key);
                self.set(&key, Some(kv), true, changed);
            }
        }
        for key in gone {
            if !self.ahead.contains_key(&key) {
                self.set(&key, None, true, changed);
            }
        }
    }

    /// What a watch delivered.
    pub fn events(
        &mut self,
        range: &Range,
        revision: Revision,
        events: Vec<Event>,
        changed: &mut Vec<Changed>,
    ) {
        let Some(followed) = self.followed_mut(range) else {
            return;
        };
        followed.reached = revision.max(followed.reached);
        for event in events {
            let (key, at, kv) = match event {
                Event::Put(kv) => (Arc::clone(&kv.key), kv.mod_revision, Some(kv)),
                Event::Delete(key, revision) => (key, revision, None),
            };
            if let Some(known) = self.ahead.get(&key).copied() {
                if at < known {
                    continue;
                }
                self.ahead.remove(&key);
                if kv.is_none() && self.get(&key).is_none() {
                    // The answer showed it already; now it was read.
                    changed.push(Changed {
                        key,
                        before: None,
                        read: true,
                    });
                    continue;
                }
            }
            self.set(&key, kv, true, changed);
        }
    }

    /// The watches broke. What answers told before, the next snapshots have too, unless etcd was restored: then
    /// an answer of the one before says nothing of this one, at whatever revision it goes on.
    pub fn broken(&mut self) {
        self.ahead.clear();
        let followed = self.ranges.values();
        self.unread = followed.map(|followed| followed.range.clone()).collect();
    }

    /// All watches have delivered everything up to a revision.
    pub fn progress(&mut self, revision: Revision) {
        for followed in self.ranges.values_mut() {
            if followed.reached > 0 {
                followed.reached = revision.max(followed.reached);
            }
        }
        self.ahead.retain(|_, known| *known > revision);
    }

    /// What an answer at `revision` showed of a key: by a read of it (`read`), or as the effect of a write.
    pub fn answer(
        &mut self,
        key: &Key,
        kv: Option<KeyValue>,
        revision: Revision,
        read: bool,
        changed: &mut Vec<Changed>,
    ) {
        self.answer_with(key, kv, revision, read, None, changed);
    }

    fn answer_with(
        &mut self,
        key: &Key,
        kv: Option<KeyValue>,
        revision: Revision,
        read: bool,
        made: Option<Made>,
        changed: &mut Vec<Changed>,
    ) {
        // A watch or a later answer may know more already.
        let known = self
            .ahead
            .get(key)
            .copied()
            .unwrap_or(0)
            .max(self.mod_revision(key));
        if known > revision {
            return;
        }
        if self.reached_for(key) >= revision {
            return;
        }
        self.ahead.insert(Arc::clone(key), revision);
        self.set_made(key, kv, read, made, changed);
    }

    /// A transaction of this process put a record.
    pub fn put(&mut self, key: &Key, kv: KeyValue, made: Made, changed: &mut Vec<Changed>) {
        let (revision, before) = (kv.mod_revision, changed.len());
        self.answer_with(key, Some(kv), revision, false, Some(made), changed);
        if changed.len() == before {
            // The watch was faster.
            self.note_made(key, revision, made.stamp);
        }
    }

    /// The record that came to stand at a key at this revision is what the index wanted at this stamp.
    pub fn note_made(&mut self, key: &[u8], at: Revision, stamp: Stamp) {
        if let Some(record) = self.records.get_mut(key)
            && record.mod_revision == at
        {
            record.made_for = stamp;
        }
    }

    /// The record that came to stand at a key at this revision is that of a pod: for formats whose values
    /// don't say so. Says whether it was that of another one.
    pub fn note_pod(&mut self, key: &Key, at: Revision, pod: Uid) -> bool {
        if self.mod_revision(key) != at || at == 0 || self.pods.get(key) == Some(&pod) {
            return false;
        }
        self.pods.insert(Arc::clone(key), pod).is_some()
    }

    /// A lease was granted by this process in this term.
    pub fn granted(&mut self, id: LeaseId, name: Arc<SlotName>) {
        let lease = self.leases.entry(id);
        lease.own = true;
        lease.name = Some(name);
    }

    /// A lease turned out lost, or was revoked: it is never used again.
    pub fn disown(&mut self, id: LeaseId) {
        if let Some(lease) = self.leases.get_mut(id) {
            lease.own = false;
        }
        self.leases.tidy(id);
    }

    /// The term is over: no lease is of one's own.
    pub fn end_term(&mut self) {
        self.leases.end_term();
    }

    fn keys_in(&self, range: &Range) -> Vec<Key> {
        self.ordered(range).cloned().collect()
    }

    fn set(&mut self, key: &Key, kv: Option<KeyValue>, read: bool, changed: &mut Vec<Changed>) {
        self.set_made(key, kv, read, None, changed);
    }

    fn set_made(
        &mut self,
        key: &Key,
        kv: Option<KeyValue>,
        read: bool,
        made: Option<Made>,
        changed: &mut Vec<Changed>,
    ) {
        let before = self
            .records
            .get(&**key)
            .map(|r| (r.lease, r.create_revision, r.ours, r.socket));
        match kv {
            None => {
                if before.is_none() {
                    return;
                }
                self.records.remove(&**key);
                self.order.remove(&**key);
            }
            Some(kv) => {
                if let Some(known) = self.records.get_mut(&**key)
                    && known.mod_revision == kv.mod_revision
                    && known.value == kv.value
                    && known.lease == kv.lease
                {
                    if read && !known.read {
                        known.read = true;
                        changed.push(Changed {
                            key: Arc::clone(key),
                            before: known.socket,
                            read,
                        });
                        self.tell_beside(key, changed);
                    }
                    return;
                }
                let seen_ours =
                    before.is_some_and(|(_, create, ours, _)| ours && create == kv.create_revision);
                let record = Record {
                    ours: seen_ours || self.leases.is_ours(kv.lease),
                    value: kv.value,
                    lease: kv.lease,
                    create_revision: kv.create_revision,
                    mod_revision: kv.mod_revision,
                    read,
                    socket: None,
                    made_for: made.map_or(0, |made| made.stamp),
                };
                self.records.insert(Arc::clone(key), record);
                if before.is_none() {
                    self.order.insert(Arc::clone(key));
                }
            }
        }
        self.pods.remove(key);
        changed.push(Changed {
            key: Arc::clone(key),
            before: before.and_then(|b| b.3),
            read,
        });
        if let Some((_, _, _, Some(socket))) = before {
            self.unlink(&socket, key);
        }
        let mut more = self.more_sockets.remove(key).unwrap_or_default();
        for socket in &more {
            self.unlink(socket, key);
        }
        if key.starts_with(self.leases_prefix.as_bytes()) {
            self.set_slot(key, changed);
        } else {
            let after = self.records.get(&**key).map(|record| record.lease);
            self.count(before.map(|b| b.0), after);
            self.link(key, made.and_then(|made| made.socket));
            let aggregate = self.link_more(key);
            if aggregate && let Some((_, _, _, Some(first))) = before {
                more.push(first);
            }
            self.tell_more(key, more, aggregate, read, changed);
            self.note_untold(key, before.map(|b| b.0));
        }
    }

    /// A record was read: other records of its further addresses may have waited for that.
    fn tell_beside(&self, key: &Key, changed: &mut Vec<Changed>) {
        let more = self.more_sockets.get(key).into_iter().flatten();
        for socket in more.filter(|socket| self.keys_at(socket).len() > 1) {
            changed.push(Changed {
                key: Arc::clone(key),
                before: Some(*socket),
                read: true,
            });
        }
    }

    /// Tells of the other addresses of a record. `before`: those that it had; of one for all pods, which may be
    /// thousands, only those are told that came or went.
    fn tell_more(
        &self,
        key: &Key,
        before: Vec<Socket>,
        aggregate: bool,
        read: bool,
        changed: &mut Vec<Changed>,
    ) {
        let after = self.more_sockets.get(key).map_or(&[][..], |more| more);
        let mut tell = |socket: &Socket| {
            changed.push(Changed {
                key: Arc::clone(key),
                before: Some(*socket),
                read,
            });
        };
        if !aggregate {
            before.iter().chain(after).for_each(tell);
            return;
        }
        let first = self.records.get(&**key).and_then(|record| record.socket);
        let before: HashSet<Socket> = before.into_iter().collect();
        let after: HashSet<Socket> = after.iter().copied().chain(first).collect();
        let mut told: Vec<&Socket> = before.symmetric_difference(&after).collect();
        told.sort_unstable();
        told.into_iter().for_each(&mut tell);
    }

    fn count(&mut self, before: Option<LeaseId>, after: Option<LeaseId>) {
        if before == after {
            return;
        }
        if let Some(id) = before.filter(|id| *id != 0) {
            if let Some(lease) = self.leases.get_mut(id) {
                lease.records = lease.records.saturating_sub(1);
            }
            self.leases.tidy(id);
        }
        if let Some(id) = after.filter(|id| *id != 0) {
            self.leases.entry(id).records += 1;
        }
    }

    /// Notes what one of our records stands for; `known`: what it was put for.
    fn link(&mut self, key: &Key, known: Option<Socket>) {
        let Some(record) = self.records.get(&**key).filter(|record| record.ours) else {
            return;
        };
        let Some(name) = self
            .leases
            .get(record.lease)
            .and_then(|lease| lease.name.as_ref())
        else {
            return;
        };
        let socket = known
            .or_else(|| socket_of(name, key, &record.value))
            .or_else(|| {
                let lead = Format::by_name(&name.format)?.lead_of(key)?;
                self.records.get(&*lead)?.socket
            });
        if let Some(record) = self.records.get_mut(&**key) {
            record.socket = socket;
        }
        if let Some(socket) = socket {
            self.sockets
                .entry(socket)
                .or_default()
                .push(Arc::clone(key));
        }
    }

    /// Notes what else one of our records stands for, beside its first address. Whether it is one for all pods.
    fn link_more(&mut self, key: &Key) -> bool {
        let Some(record) = self.records.get(&**key).filter(|record| record.ours) else {
            return false;
        };
        let name = self
            .leases
            .get(record.lease)
            .and_then(|lease| lease.name.as_ref());
        let Some((name, format)) = name
            .and_then(|name| Some((name, Format::by_name(&name.format)?)))
            .filter(|(_, format)| format.holds_several())
        else {
            return false;
        };
        let aggregate = format.is_aggregate();
        let Ok(found) = format.read_all(&name.prefix, key, &record.value) else {
            return aggregate;
        };
        let sockets = found.iter().filter_map(|found| found.socket);
        let mut more: Vec<Socket> = sockets
            .map(|socket| (socket.ip(), socket.port()))
            .filter(|socket| record.socket != Some(*socket))
            .collect();
        more.sort_unstable();
        more.dedup();
        for socket in &more {
            self.sockets
                .entry(*socket)
                .or_default()
                .push(Arc::clone(key));
        }
        if !more.is_empty() {
            self.more_sockets.insert(Arc::clone(key), more);
        }
        aggregate
    }

    fn unlink(&mut self, socket: &Socket, key: &Key) {
        if let Some(keys) = self.sockets.get_mut(socket) {
            keys.retain(|other| other != key);
            if keys.is_empty() {
                self.sockets.remove(socket);
            }
        }
    }

    /// A key below `leases/` changed.
    fn set_slot(&mut self, key: &Key, changed: &mut Vec<Changed>) {
        let Some(id) = lease_of(&self.leases_prefix, key) else {
            return;
        };
        let Some(record) = self.records.get(&**key) else {
            let Some(lease) = self.leases.get_mut(id) else {
                return;
            };
            lease.key_stands = false;
            let name = lease.name.clone().filter(|_| lease.records > 0);
            self.leases.tidy(id);
            // What stands on it wants the key back.
            for record_key in name
                .map(|name| self.keys_in(&Range::prefix(name.scope.as_bytes())))
                .unwrap_or_default()
            {
                if let Some(record) = self
                    .records
                    .get(&*record_key)
                    .filter(|record| record.lease == id)
                {
                    changed.push(Changed {
                        key: record_key,
                        before: record.socket,
                        read: true,
                    });
                }
            }
            return;
        };
        // Someone may have put it without its lease: then it says nothing about that lease's end.
        let name = serde_json::from_slice::<SlotName>(&record.value).ok();
        let create_revision = record.create_revision;
        let lease = self.leases.entry(id);
        lease.key_stands = true;
        lease.create_revision = create_revision;
        if lease.name.is_none() {
            lease.name = name.map(Arc::new);
        }
        // Two watches have no order: its records may have come first.
        let Some(name) = lease.name.clone() else {
            return;
        };
        let untold = self.untold.get(&id).into_iter().flatten();
        let in_scope: Vec<Key> = untold
            .filter(|key| key.starts_with(name.scope.as_bytes()))
            .cloned()
            .collect();
        for record_key in in_scope {
            let Some(record) = self.records.get_mut(&*record_key) else {
                continue;
            };
            record.ours = true;
            let before = record.socket;
            if before.is_none() {
                self.link(&record_key, None);
                let aggregate = self.link_more(&record_key);
                self.tell_more(&record_key, Vec::new(), aggregate, true, changed);
            }
            self.note_untold(&record_key, Some(id));
            changed.push(Changed {
                key: record_key,
                before,
                read: true,
            });
        }
    }

    /// Notes whether the key of its lease may still tell something of a record.
    fn note_untold(&mut self, key: &Key, lease_before: Option<LeaseId>) {
        if let Some(id) = lease_before
            && let Some(keys) = self.untold.get_mut(&id)
        {
            keys.remove(key);
            if keys.is_empty() {
                self.untold.remove(&id);
            }
        }
        if let Some(record) = self.records.get(&**key)
            && record.lease != 0
            && (!record.ours || record.socket.is_none())
        {
            let keys = self.untold.entry(record.lease).or_default();
            keys.insert(Arc::clone(key));
        }
    }
}

/// The id of the lease that a key below `leases/<uid>/` names, in hex.
#[must_use]
pub fn lease_of(leases_prefix: &str, key: &[u8]) -> Option<LeaseId> {
    let hex = std::str::from_utf8(key.strip_prefix(leases_prefix.as_bytes())?).ok()?;
    i64::from_str_radix(hex, 16).ok().filter(|id| *id > 0)
}

/// What a record of a slot stands for.
#[must_use]
pub fn socket_of(name: &SlotName, key: &[u8], value: &[u8]) -> Option<Socket> {
    let format = Format::by_name(&name.format)?;
    format
        .read(&name.prefix, key, value)
        .ok()?
        .socket
        .map(|socket| (socket.ip(), socket.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCOPE: &str = "/services/shop/web/";
    const KEY: &str = "/services/shop/web/east/10.1.2.3:8080";
    const VALUE: &str = r#"{"address":"10.1.2.3:8080","host":"10.1.2.3","port":8080,"portName":"http","protocol":"TCP","scheme":"","family":"IPv4","cluster":"east","namespace":"shop","service":"web","pod":"web-0","uid":"u","node":"n","zone":"","weight":100,"metadata":{}}"#;

    fn key(text: &str) -> Key {
        Arc::from(text.as_bytes())
    }

    fn kv(text: &str, lease: LeaseId, create: Revision, at: Revision) -> KeyValue {
        KeyValue {
            key: key(text),
            value: VALUE.as_bytes().into(),
            lease,
            create_revision: create,
            mod_revision: at,
        }
    }

    fn slot(at: Revision) -> KeyValue {
        let name = SlotName {
            registration: "shop/web".into(),
            scope: SCOPE.into(),
            ttl: 60,
            format: "Json".into(),
            prefix: "/services/".into(),
            service: "web".into(),
        };
        KeyValue {
            value: serde_json::to_vec(&name).unwrap().into(),
            ..kv("/registrar/east/leases/uid/0000000000000007", 7, at, at)
        }
    }

    fn mirror() -> (Mirror, Range, Range) {
        let mut mirror = Mirror::new("/registrar/east/leases/uid/".into());
        let (own, scope) = (
            Range::prefix(b"/registrar/east/"),
            Range::prefix(SCOPE.as_bytes()),
        );
        mirror.follow(&[own.clone(), scope.clone()], &mut Vec::new());
        (mirror, own, scope)
    }

    fn snapshot(mirror: &mut Mirror, range: &Range, at: Revision, records: Vec<KeyValue>) -> usize {
        let mut changed = Vec::new();
        mirror.snapshot(range, at, records, &mut changed);
        changed.len()
    }

    #[test]
    fn an_older_event_does_not_undo_an_answer() {
        let (mut mirror, _, scope) = mirror();
        snapshot(&mut mirror, &scope, 5, vec![]);
        let mut changed = Vec::new();
        mirror.answer(&key(KEY), Some(kv(KEY, 7, 8, 8)), 8, false, &mut changed);
        mirror.answer(&key(KEY), None, 10, false, &mut changed);
        mirror.events(&scope, 8, vec![Event::Put(kv(KEY, 7, 8, 8))], &mut changed);
        assert!(mirror.get(KEY.as_bytes()).is_none());
        mirror.events(&scope, 10, vec![Event::Delete(key(KEY), 10)], &mut changed);
        mirror.events(
            &scope,
            11,
            vec![Event::Put(kv(KEY, 7, 11, 11))],
            &mut changed,
        );
        assert_eq!(mirror.mod_revision(KEY.as_bytes()), 11);
    }

    #[test]
    fn an_answer_is_no_reading_until_the_watch_shows_it() {
        let (mut mirror, _, scope) = mirror();
        snapshot(&mut mirror, &scope, 5, vec![]);
        let mut changed = Vec::new();
        mirror.answer(&key(KEY), Some(kv(KEY, 7, 8, 8)), 8, false, &mut changed);
        assert!(!mirror.get(KEY.as_bytes()).unwrap().read);
        mirror.events(&scope, 8, vec![Event::Put(kv(KEY, 7, 8, 8))], &mut changed);
        assert!(mirror.get(KEY.as_bytes()).unwrap().read);
        assert!(changed.last().unwrap().read);
    }

    #[test]
    fn a_removal_is_shown_by_its_event_too() {
        let (mut mirror, _, scope) = mirror();
        snapshot(&mut mirror, &scope, 5, vec![kv(KEY, 7, 4, 4)]);
        let mut changed = Vec::new();
        mirror.answer(&key(KEY), None, 8, false, &mut changed);
        assert!(mirror.is_ahead(KEY.as_bytes()));
        changed.clear();
        mirror.events(&scope, 8, vec![Event::Delete(key(KEY), 8)], &mut changed);
        assert!(!mirror.is_ahead(KEY.as_bytes()));
        assert_eq!(changed.len(), 1);
        assert!(changed.first().unwrap().read);
    }

    #[test]
    fn only_what_the_key_of_a_lease_still_has_to_tell_is_remembered() {
        let (mut mirror, own, scope) = mirror();
        snapshot(&mut mirror, &own, 5, vec![]);
        snapshot(&mut mirror, &scope, 5, vec![]);
        let mut changed = Vec::new();
        mirror.events(&scope, 8, vec![Event::Put(kv(KEY, 7, 8, 8))], &mut changed);
        assert!(!mirror.get(KEY.as_bytes()).unwrap().ours);
        assert_eq!(mirror.untold.len(), 1);
        mirror.events(&own, 8, vec![Event::Put(slot(8))], &mut changed);
        assert!(mirror.get(KEY.as_bytes()).unwrap().ours);
        assert!(mirror.untold.is_empty());
        mirror.events(&scope, 9, vec![Event::Put(kv(KEY, 9, 8, 9))], &mut changed);
        assert!(mirror.untold.contains_key(&9));
        mirror.events(&scope, 10, vec![Event::Delete(key(KEY), 10)], &mut changed);
        assert!(mirror.untold.is_empty());
    }

    #[test]
    fn a_late_answer_does_not_undo_an_event() {
        let (mut mirror, _, scope) = mirror();
        snapshot(&mut mirror, &scope, 5, vec![]);
        let mut changed = Vec::new();
        mirror.events(&scope, 9, vec![Event::Put(kv(KEY, 7, 8, 9))], &mut changed);
        mirror.answer(&key(KEY), Some(kv(KEY, 7, 8, 8)), 8, false, &mut changed);
        assert_eq!(mirror.mod_revision(KEY.as_bytes()), 9);
        mirror.events(&scope, 10, vec![Event::Delete(key(KEY), 10)], &mut changed);
        mirror.answer(&key(KEY), Some(kv(KEY, 7, 8, 9)), 9, false, &mut changed);
        assert!(mirror.get(KEY.as_bytes()).is_none());
    }

    #[test]
    fn a_snapshot_from_before_an_answer_keeps_it_and_one_of_a_restored_etcd_does_not() {
        let (mut mirror, _, scope) = mirror();
        snapshot(&mut mirror, &scope, 5, vec![]);
        mirror.answer(&key(KEY), Some(kv(KEY, 7, 8, 8)), 8, false, &mut Vec::new());
        snapshot(&mut mirror, &scope, 7, vec![]);
        assert_eq!(mirror.mod_revision(KEY.as_bytes()), 8);
        snapshot(&mut mirror, &scope, 3, vec![]);
        assert!(mirror.get(KEY.as_bytes()).is_none());
        assert!(mirror.range_reached(&scope, 3) && !mirror.range_reached(&scope, 4));
    }

    #[test]
    fn an_answer_from_before_the_watches_broke_does_not_outlive_the_next_snapshot() {
        let (mut mirror, _, scope) = mirror();
        snapshot(&mut mirror, &scope, 7, vec![]);
        mirror.answer(&key(KEY), Some(kv(KEY, 7, 8, 8)), 8, false, &mut Vec::new());
        mirror.broken();
        // Restored to what it was just before, and nothing has changed since.
        snapshot(&mut mirror, &scope, 7, vec![]);
        assert!(mirror.get(KEY.as_bytes()).is_none());
    }

    #[test]
    fn a_record_is_ours_by_the_key_of_its_lease_in_whatever_order_they_come() {
        for slot_first in [true, false] {
            let (mut mirror, own, scope) = mirror();
            let mut steps: Vec<(&Range, KeyValue)> =
                vec![(&own, slot(4)), (&scope, kv(KEY, 7, 4, 4))];
            if !slot_first {
                steps.reverse();
            }
            for (range, found) in steps {
                snapshot(&mut mirror, range, 5, vec![found]);
            }
            let record = mirror.get(KEY.as_bytes()).unwrap();
            assert!(record.ours, "slot first: {slot_first}");
            let socket = record.socket.unwrap();
            assert_eq!(mirror.keys_at(&socket), [key(KEY)]);
            assert_eq!(mirror.leases().get(7).unwrap().records, 1);
        }
    }

    /// A slot of another format, and its scope as a range that is followed.
    fn other_slot(mirror: &mut Mirror, format: &str, prefix: &str, scope: &str) -> Range {
        let (own, range) = (
            Range::prefix(b"/registrar/east/"),
            Range::prefix(scope.as_bytes()),
        );
        mirror.follow(&[own.clone(), range.clone()], &mut Vec::new());
        let name = SlotName {
            registration: "shop/web".into(),
            scope: scope.into(),
            ttl: 60,
            format: format.into(),
            prefix: prefix.into(),
            service: "web".into(),
        };
        let found = KeyValue {
            value: serde_json::to_vec(&name).unwrap().into(),
            ..slot(4)
        };
        snapshot(mirror, &own, 5, vec![found]);
        range
    }

    #[test]
    fn a_record_of_several_endpoints_is_known_at_the_address_of_each() {
        for slot_first in [true, false] {
            let (mut mirror, _, _) = mirror();
            let record = KeyValue {
                value: br#"{"id":"x","endpoints":["http://10.1.2.3:80","grpc://10.1.2.3:90"]}"#
                    .as_slice()
                    .into(),
                ..kv("/microservices/web/x", 7, 4, 4)
            };
            let scope = "/microservices/web/";
            let prefix = "/microservices/";
            let range = Range::prefix(scope.as_bytes());
            if slot_first {
                other_slot(&mut mirror, "Kratos", prefix, scope);
                snapshot(&mut mirror, &range, 5, vec![record]);
            } else {
                mirror.follow(std::slice::from_ref(&range), &mut Vec::new());
                snapshot(&mut mirror, &range, 5, vec![record]);
                other_slot(&mut mirror, "Kratos", prefix, scope);
            }
            let sockets = [80, 90].map(|port| ([10, 1, 2, 3].into(), port));
            let at = key("/microservices/web/x");
            for socket in &sockets {
                assert_eq!(mirror.keys_at(socket), std::slice::from_ref(&at));
            }
            // Whoever waits for one of the addresses is told that it is free.
            let mut changed = Vec::new();
            mirror.events(&range, 8, vec![Event::Delete(at, 8)], &mut changed);
            for socket in &sockets {
                assert!(mirror.keys_at(socket).is_empty());
                assert!(changed.iter().any(|c| c.before == Some(*socket)));
            }
            assert!(mirror.more_sockets.is_empty());
        }
    }

    #[test]
    fn of_a_record_for_all_pods_only_the_addresses_are_told_that_came_or_went() {
        let (mut mirror, _, _) = mirror();
        let scope = "/apisix/upstreams/east.shop.web.";
        let range = other_slot(&mut mirror, "Apisix", "/apisix/upstreams/", scope);
        let at = key(&format!("{scope}http"));
        let socket = |last: u8| ([10, 0, 0, last].into(), 80);
        let upstream = |nodes: &[u8], revision| {
            let nodes = nodes
                .iter()
                .map(|n| format!(r#"{{"host":"10.0.0.{n}","port":80}}"#));
            let value = format!(r#"{{"nodes":[{}]}}"#, nodes.collect::<Vec<_>>().join(","));
            KeyValue {
                value: value.as_bytes().into(),
                ..kv(&format!("{scope}http"), 7, 4, revision)
            }
        };
        snapshot(&mut mirror, &range, 5, vec![upstream(&[1, 2, 3], 4)]);
        for last in 1..=3 {
            assert_eq!(mirror.keys_at(&socket(last)), std::slice::from_ref(&at));
        }
        let mut changed = Vec::new();
        let put = vec![Event::Put(upstream(&[2, 3, 4], 8))];
        mirror.events(&range, 8, put, &mut changed);
        let mut told: Vec<Option<Socket>> = changed.iter().map(|c| c.before).collect();
        told.sort_unstable();
        // The first is that of the key itself.
        assert_eq!(told, [1, 1, 4].map(|last| Some(socket(last))));
        assert!(mirror.keys_at(&socket(1)).is_empty());
        assert_eq!(mirror.keys_at(&socket(4)), std::slice::from_ref(&at));
        changed.clear();
        let put = vec![Event::Put(upstream(&[], 9))];
        mirror.events(&range, 9, put, &mut changed);
        assert!(mirror.get(&at).unwrap().ours && mirror.more_sockets.is_empty());
        assert!((1..=4).all(|last| mirror.keys_at(&socket(last)).is_empty()));
        assert!((2..=4).all(|last| changed.iter().any(|c| c.before == Some(socket(last)))));
    }

    #[test]
    fn what_stands_beside_an_address_stands_for_it_too() {
        let (mut mirror, _, _) = mirror();
        let scope = "traefik/http/services/shop.web.";
        let range = other_slot(&mut mirror, "Traefik", "traefik/", scope);
        let server = format!("{scope}http/loadbalancer/servers/1/");
        let member = |name: &str, value: &str| KeyValue {
            value: value.as_bytes().into(),
            ..kv(&format!("{server}{name}"), 7, 4, 4)
        };
        let members = vec![member("url", "http://10.1.2.3:80"), member("weight", "100")];
        snapshot(&mut mirror, &range, 5, members);
        assert_eq!(mirror.keys_at(&([10, 1, 2, 3].into(), 80)).len(), 2);
    }

    #[test]
    fn a_record_stays_ours_whatever_is_done_to_it_until_it_comes_into_being_anew() {
        let (mut mirror, own, scope) = mirror();
        snapshot(&mut mirror, &own, 5, vec![slot(4)]);
        snapshot(&mut mirror, &scope, 5, vec![kv(KEY, 7, 4, 4)]);
        let mut changed = Vec::new();
        mirror.events(&scope, 6, vec![Event::Put(kv(KEY, 0, 4, 6))], &mut changed);
        assert!(mirror.get(KEY.as_bytes()).unwrap().ours);
        assert_eq!(mirror.leases().get(7).unwrap().records, 0);
        mirror.events(&scope, 7, vec![Event::Delete(key(KEY), 7)], &mut changed);
        mirror.events(&scope, 8, vec![Event::Put(kv(KEY, 0, 8, 8))], &mut changed);
        assert!(!mirror.get(KEY.as_bytes()).unwrap().ours);
    }

    #[test]
    fn a_reading_of_keys_alone_shows_what_the_watch_missed() {
        let (mut mirror, _, scope) = mirror();
        snapshot(&mut mirror, &scope, 5, vec![kv(KEY, 7, 4, 4)]);
        assert!(!mirror.differs_from(&scope, 5, &[(key(KEY), 4)]));
        assert!(mirror.differs_from(&scope, 5, &[]));
        assert!(mirror.differs_from(&scope, 6, &[(key(KEY), 6)]));
        let other = key("/services/shop/web/east/10.1.2.4:8080");
        assert!(mirror.differs_from(&scope, 5, &[(key(KEY), 4), (other, 5)]));
    }
}
