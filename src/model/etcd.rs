//! What is asked of etcd and what it tells: plain data, carried by `registry`.

/// A key in etcd; always valid UTF-8 where it is ours, but others may write any bytes.
pub type Key = std::sync::Arc<[u8]>;

/// The id of a lease; 0 is none.
pub type LeaseId = i64;

/// A revision of etcd; 0 is none.
pub type Revision = i64;

/// A key with its value, as etcd holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: Key,
    /// The value.
    pub value: Box<[u8]>,
    /// The lease that it is attached to; 0 is none.
    pub lease: LeaseId,
    /// The revision at which the key came into being.
    pub create_revision: Revision,
    /// The revision of its last change.
    pub mod_revision: Revision,
}

/// A half-open range of keys, `start <= key < end`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Range {
    /// The first key.
    pub start: Key,
    /// The first key that does not belong to it.
    pub end: Key,
}

impl Range {
    /// All keys that begin with `prefix`, which must not be empty or all 0xff bytes.
    #[must_use]
    pub fn prefix(prefix: &[u8]) -> Self {
        let mut end = prefix.to_vec();
        while let Some(last) = end.pop() {
            if last < 0xff {
                end.push(last + 1);
                break;
            }
        }
        Self {
            start: prefix.into(),
            end: end.into(),
        }
    }

    /// Whether the key lies in the range.
    #[must_use]
    pub fn contains(&self, key: &[u8]) -> bool {
        *self.start <= *key && key < &*self.end
    }
}

/// A comparison of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key's create revision; 0: there is no such key.
    CreateRevision(Key, Revision),
    /// The key's mod revision; 0: there is no such key.
    ModRevision(Key, Revision),
    /// The key's value.
    Value(Key, Box<[u8]>),
    /// No key stands in the range.
    Nothing(Range),
}

/// An operation of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes a key; lease 0 attaches it to none.
    Put(Key, Box<[u8]>, LeaseId),
    /// Deletes a key.
    Delete(Key),
    /// Reads a key.
    Get(Key),
    /// Reads a range.
    GetRange(Range),
}

/// A transaction; at most 128 compares and 128 operations a branch, as etcd takes them.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Txn {
    /// All of them must hold for `then`.
    pub compares: Vec<Compare>,
    /// What is done when they hold.
    pub then: Vec<Op>,
    /// What is done when one does not.
    pub otherwise: Vec<Op>,
}

/// A request to etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// A transaction.
    Txn(Txn),
    /// Grants a lease with a chosen id and a TTL in seconds. That the id exists already is
    /// an [`Refusal::LeaseExists`].
    Grant(LeaseId, i64),
    /// Revokes a lease and deletes its keys. An unknown lease is a [`Refusal::LeaseNotFound`].
    Revoke(LeaseId),
    /// The keys that are attached to a lease.
    LeaseKeys(LeaseId),
}

/// What etcd answered to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The answer to a transaction.
    Txn {
        /// Whether `then` was done, else `otherwise`.
        succeeded: bool,
        /// The revision of etcd after it.
        revision: Revision,
        /// One entry for each operation of the branch that was done, in order; what a read
        /// found, empty for puts and deletes.
        reads: Vec<Vec<KeyValue>>,
    },
    /// The lease was granted.
    Granted,
    /// The lease was revoked.
    Revoked,
    /// The remaining TTL in seconds (-1: no such lease) and the keys of a lease.
    LeaseKeys(i64, Vec<Key>),
}

/// Why etcd certainly did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The user may not touch one of the keys.
    Permission,
    /// The request is larger than etcd takes, or has too many operations.
    TooLarge,
    /// A lease that is named is not there.
    LeaseNotFound,
    /// The lease that was to be granted is there already.
    LeaseExists,
    /// Anything else that is wrong with the request itself.
    Invalid,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// etcd refused and certainly did nothing.
    Refused(Refusal),
    /// etcd has no space left (alarm NOSPACE). The outcome counts as unknown.
    NoSpace,
    /// The outcome is unknown: etcd may have done it, may do it later, or never.
    Unknown,
}

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What is known of the outcome.
    pub kind: FailureKind,
    /// What etcd or the connection said, for a person; never holds a secret.
    pub message: String,
}

/// A change that a watch delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key was put.
    Put(KeyValue),
    /// The key was deleted (or its lease ended) at the revision.
    Delete(Key, Revision),
}

/// What following ranges of keys tells, in an order in which it can be believed: all events up to a revision
/// come before the progress that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// All that stands in a range that is followed, at a revision. The range is watched from
    /// the next revision on.
    Snapshot {
        /// The range.
        range: Range,
        /// The revision of the snapshot.
        revision: Revision,
        /// All keys of the range.
        records: Vec<KeyValue>,
    },
    /// Events of one watch, in order.
    Events {
        /// The range whose watch delivered them.
        range: Range,
        /// The revision of the last event; all of the range up to it were handed on. (That of
        /// etcd's response may be ahead of what its watch has delivered.)
        revision: Revision,
        /// The events.
        events: Vec<Event>,
    },
    /// All watches have delivered everything up to this revision.
    Progress(Revision),
    /// The keys and mod revisions of a range, read beside its watch to check it. All events up
    /// to `revision` were handed on before, and keys that changed later are left out. So each of
    /// these must be known with this mod revision, and a key that is known with a mod revision of at
    /// most `revision` and not named here is not in etcd. If that does not hold, the range has to be
    /// read again.
    KeysSeen {
        /// The range.
        range: Range,
        /// The revision of the read.
        revision: Revision,
        /// Its keys with their mod revisions.
        keys: Vec<(Key, Revision)>,
    },
    /// The watch of a range can't be had, for good or for now (e.g. a missing permission).
    Refused(Range, Failure),
    /// The watches broke; snapshots follow when etcd answers again.
    Broken(String),
}
