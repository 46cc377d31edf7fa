//! A model of etcd, for exactly the requests that the engine makes.
//!
//! Takes requests and the time, gives answers and the log of all changes: what a watcher on everything
//! sees, in order. Must never be kinder than etcd: a lease that ends takes all its keys in one revision,
//! a transaction that names a lease that is not there does nothing at all. `real_etcd` plays the same
//! operations on a real one and compares.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use etcd_registrar::model::etcd::{
    Answer, Compare, Event, Failure, FailureKind, Key, KeyValue, LeaseId, Op, Range, Refusal,
    Request, Revision, Txn,
};

/// What etcd takes of compares, and of operations a branch.
const MOST_OPERATIONS: usize = 128;

/// Who changed something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Author {
    /// A process of the operator.
    Process(usize),
    /// A person or another program.
    Hand,
    /// A lease ended by itself.
    Expiry,
}

/// One change of one key.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) revision: Revision,
    pub(crate) author: Author,
    /// By the end of a lease, and not by a transaction.
    pub(crate) by_lease: bool,
    pub(crate) key: Key,
    pub(crate) before: Option<KeyValue>,
    pub(crate) after: Option<KeyValue>,
}

#[derive(Clone, Debug)]
struct Lease {
    ttl: i64,
    ends: u64,
}

/// What a snapshot brings back.
#[derive(Clone, Debug)]
struct Saved {
    revision: Revision,
    keys: BTreeMap<Key, KeyValue>,
    leases: BTreeMap<LeaseId, Lease>,
}

/// At which revision a restored etcd goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GoesOn {
    /// Where it was when it was saved.
    Back,
    /// Above that, and below what it had come to since: other programs wrote meanwhile.
    Between,
    /// Above all that was ever seen (`--bump-revision`).
    Above,
}

/// One etcd.
#[derive(Debug)]
pub(crate) struct Etcd {
    pub(crate) revision: Revision,
    keys: BTreeMap<Key, KeyValue>,
    leases: BTreeMap<LeaseId, Lease>,
    log: Vec<Change>,
    /// Up to this revision the history is gone.
    pub(crate) compacted: Revision,
    saved: Option<Saved>,
    /// The alarm NOSPACE is raised.
    pub(crate) full: bool,
}

impl Etcd {
    pub(crate) fn new() -> Self {
        Self {
            revision: 1,
            keys: BTreeMap::new(),
            leases: BTreeMap::new(),
            log: Vec::new(),
            compacted: 0,
            saved: None,
            full: false,
        }
    }

    // === what is asked ===

    pub(crate) fn get(&self, key: &[u8]) -> Option<&KeyValue> {
        self.keys.get(key)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &KeyValue> {
        self.keys.values()
    }

    pub(crate) fn range(&self, range: &Range) -> Vec<KeyValue> {
        self.keys
            .range::<[u8], _>((Bound::Included(&*range.start), Bound::Excluded(&*range.end)))
            .map(|(_, kv)| kv.clone())
            .collect()
    }

    pub(crate) fn below(&self, prefix: &str) -> Vec<KeyValue> {
        self.range(&Range::prefix(prefix.as_bytes()))
    }

    pub(crate) fn lives(&self, lease: LeaseId) -> bool {
        self.leases.contains_key(&lease)
    }

    pub(crate) fn leases(&self) -> BTreeSet<LeaseId> {
        self.leases.keys().copied().collect()
    }

    pub(crate) fn keys_of(&self, lease: LeaseId) -> Vec<Key> {
        self.keys
            .values()
            .filter(|kv| kv.lease == lease)
            .map(|kv| Arc::clone(&kv.key))
            .collect()
    }

    /// All changes so far.
    pub(crate) fn log(&self) -> &[Change] {
        &self.log
    }

    /// The changes after one revision, up to another.
    pub(crate) fn changes(&self, after: Revision, up_to: Revision) -> &[Change] {
        let from = self.log.partition_point(|change| change.revision <= after);
        let to = self.log.partition_point(|change| change.revision <= up_to);
        self.log.get(from..to).unwrap_or(&[])
    }

    /// What a watch of a range delivers for these revisions.
    pub(crate) fn events(&self, range: &Range, after: Revision, up_to: Revision) -> Vec<Event> {
        self.changes(after, up_to)
            .iter()
            .filter(|change| range.contains(&change.key))
            .map(|change| match &change.after {
                Some(kv) => Event::Put(kv.clone()),
                None => Event::Delete(Arc::clone(&change.key), change.revision),
            })
            .collect()
    }

    // === what changes it ===

    pub(crate) fn request(
        &mut self,
        request: &Request,
        now: u64,
        author: Author,
    ) -> Result<Answer, Failure> {
        match request {
            Request::Txn(txn) => self.transaction(txn, author),
            Request::Grant(..) if self.full => Err(no_space()),
            Request::Grant(id, ttl) => {
                if self.leases.contains_key(id) {
                    return Err(refused(Refusal::LeaseExists));
                }
                let ends = now + seconds(*ttl);
                self.leases.insert(*id, Lease { ttl: *ttl, ends });
                Ok(Answer::Granted)
            }
            Request::Revoke(id) => {
                if !self.lives(*id) {
                    return Err(refused(Refusal::LeaseNotFound));
                }
                self.end_lease(*id, author);
                Ok(Answer::Revoked)
            }
            Request::LeaseKeys(id) => Ok(match self.leases.get(id) {
                None => Answer::LeaseKeys(-1, Vec::new()),
                Some(lease) => {
                    let left = lease.ends.saturating_sub(now) / 1_000_000;
                    let left = i64::try_from(left).unwrap_or(i64::MAX);
                    Answer::LeaseKeys(left, self.keys_of(*id))
                }
            }),
        }
    }

    fn transaction(&mut self, txn: &Txn, author: Author) -> Result<Answer, Failure> {
        for (what, count) in [
            ("compares", txn.compares.len()),
            ("then", txn.then.len()),
            ("otherwise", txn.otherwise.len()),
        ] {
            assert!(
                count <= MOST_OPERATIONS,
                "a transaction with {count} {what}: etcd refuses it"
            );
        }
        for branch in [&txn.then, &txn.otherwise] {
            let mut changed = BTreeSet::new();
            for op in branch {
                if let Op::Put(key, ..) | Op::Delete(key) = op {
                    assert!(
                        changed.insert(Arc::clone(key)),
                        "a transaction changes {} twice: etcd refuses it",
                        show(key)
                    );
                }
            }
        }
        let puts = |op: &Op| matches!(op, Op::Put(..));
        if self.full && (txn.then.iter().any(puts) || txn.otherwise.iter().any(puts)) {
            return Err(no_space());
        }
        let succeeded = txn.compares.iter().all(|compare| self.holds(compare));
        let branch = if succeeded { &txn.then } else { &txn.otherwise };
        for op in branch {
            if let Op::Put(_, _, lease) = op
                && *lease != 0
                && !self.lives(*lease)
            {
                return Err(refused(Refusal::LeaseNotFound));
            }
        }
        let next = self.revision + 1;
        let mut reads = Vec::with_capacity(branch.len());
        for op in branch {
            let mut found = Vec::new();
            match op {
                Op::Put(key, value, lease) => {
                    self.set(key, Some((value.clone(), *lease)), next, author, false);
                    self.revision = next;
                }
                Op::Delete(key) => {
                    if self.keys.contains_key(key) {
                        self.set(key, None, next, author, false);
                        self.revision = next;
                    }
                }
                Op::Get(key) => found.extend(self.keys.get(key).cloned()),
                Op::GetRange(range) => found = self.range(range),
            }
            reads.push(found);
        }
        Ok(Answer::Txn {
            succeeded,
            revision: self.revision,
            reads,
        })
    }

    fn holds(&self, compare: &Compare) -> bool {
        match compare {
            Compare::CreateRevision(key, revision) => {
                self.keys.get(key).map_or(0, |kv| kv.create_revision) == *revision
            }
            Compare::ModRevision(key, revision) => {
                self.keys.get(key).map_or(0, |kv| kv.mod_revision) == *revision
            }
            // A comparison with the value of a key that does not stand fails, whatever the value.
            Compare::Value(key, value) => self.keys.get(key).is_some_and(|kv| kv.value == *value),
            Compare::Nothing(range) => self.range(range).is_empty(),
        }
    }

    fn set(
        &mut self,
        key: &Key,
        value: Option<(Box<[u8]>, LeaseId)>,
        revision: Revision,
        author: Author,
        by_lease: bool,
    ) {
        let before = self.keys.remove(key);
        let after = value.map(|(value, lease)| KeyValue {
            key: Arc::clone(key),
            value,
            lease,
            create_revision: before.as_ref().map_or(revision, |kv| kv.create_revision),
            mod_revision: revision,
        });
        if let Some(kv) = &after {
            self.keys.insert(Arc::clone(key), kv.clone());
        }
        self.log.push(Change {
            revision,
            author,
            by_lease,
            key: Arc::clone(key),
            before,
            after,
        });
    }

    fn end_lease(&mut self, id: LeaseId, author: Author) {
        self.leases.remove(&id);
        let keys = self.keys_of(id);
        if keys.is_empty() {
            return;
        }
        self.revision += 1;
        for key in keys {
            self.set(&key, None, self.revision, author, true);
        }
    }

    /// Leases whose time is over end, each in a revision of its own.
    pub(crate) fn expire(&mut self, now: u64) {
        let over: Vec<LeaseId> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.ends <= now)
            .map(|(id, _)| *id)
            .collect();
        for id in over {
            self.end_lease(id, Author::Expiry);
        }
    }

    /// Ends one lease, as if it had not been kept.
    pub(crate) fn end(&mut self, id: LeaseId) {
        if self.lives(id) {
            self.end_lease(id, Author::Expiry);
        }
    }

    /// Whether a watch from a revision would have to deliver what was compacted.
    pub(crate) fn is_gone(&self, from: Revision) -> bool {
        from < self.compacted
    }

    /// Drops the history up to a revision.
    pub(crate) fn compact(&mut self, revision: Revision) {
        self.compacted = self.compacted.max(revision);
    }

    /// Takes a snapshot.
    pub(crate) fn save(&mut self) {
        self.saved = Some(Saved {
            revision: self.revision,
            keys: self.keys.clone(),
            leases: self.leases.clone(),
        });
    }

    /// Becomes what was saved; says whether there was something. Leases have all of their time again, as
    /// after every start, and the log begins anew.
    pub(crate) fn restore(&mut self, goes_on: GoesOn, now: u64) -> bool {
        let Some(saved) = self.saved.clone() else {
            return false;
        };
        // Wiped since, it may have come to less than what a snapshot brings back: no etcd goes on below that.
        let newest = self.revision.max(saved.revision);
        self.revision = match goes_on {
            GoesOn::Back => saved.revision,
            GoesOn::Between => saved.revision.midpoint(newest),
            GoesOn::Above => newest + 1_000,
        };
        self.keys = saved.keys;
        self.leases = saved.leases;
        self.log.clear();
        self.compacted = self.revision;
        self.renew(now);
        true
    }

    /// Loses everything.
    pub(crate) fn wipe(&mut self) {
        let saved = self.saved.take();
        *self = Self {
            saved,
            full: self.full,
            ..Self::new()
        };
    }

    /// A new leader of etcd gives every lease all of its time.
    pub(crate) fn renew(&mut self, now: u64) {
        for lease in self.leases.values_mut() {
            lease.ends = now + seconds(lease.ttl);
        }
    }

    /// A keepalive; says whether there is such a lease.
    pub(crate) fn keep_alive(&mut self, id: LeaseId, now: u64) -> bool {
        let Some(lease) = self.leases.get_mut(&id) else {
            return false;
        };
        lease.ends = now + seconds(lease.ttl);
        true
    }
}

pub(crate) fn show(key: &[u8]) -> String {
    String::from_utf8_lossy(key).into_owned()
}

fn seconds(ttl: i64) -> u64 {
    u64::try_from(ttl).unwrap_or(0) * 1_000_000
}

fn refused(refusal: Refusal) -> Failure {
    Failure {
        kind: FailureKind::Refused(refusal),
        message: format!("{refusal:?}"),
    }
}

fn no_space() -> Failure {
    Failure {
        kind: FailureKind::NoSpace,
        message: "etcdserver: mvcc: database space exceeded".into(),
    }
}
