//! One queue of the writer: its transactions go one after the other.
//!
//! Takes keys that need something, gives transactions, barriers and reads. The order of the states is
//! that of the model (`Idle`, `Wait`, `Unknown`, `Barrier`, `Read`). Must never have two transactions
//! under way.

use std::collections::VecDeque;

use crate::format::bundle_of;
use crate::index::pods::Uid;
use crate::index::registrations::Stamp;
use crate::mirror::leases::SlotName;
use crate::model::endpoint::Target;
use crate::model::etcd::{Key, LeaseId, Revision};
use crate::model::maps::HashMap;
use std::sync::Arc;

/// The number of lanes: enough that a second batch travels while the first one is written to disk,
/// few enough that a barrier for each is cheap. One more changes nothing that could be measured.
pub(super) const LANES: usize = 4;

/// What a transaction does at one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Write {
    /// Puts a record on a lease.
    Put {
        /// The lease.
        lease: LeaseId,
        /// The slot that the lease is for.
        slot: Arc<SlotName>,
        /// The key of the lease does not stand, as far as was known when it was sent: it is put, too.
        lease_key: bool,
        /// The value.
        value: Vec<u8>,
        /// What the record stands for; of one for all pods, what it did not stand for before.
        targets: Vec<Target>,
        /// The pod that it is for; `None`: all pods of the registration.
        uid: Option<Uid>,
        /// What of the index it was made from.
        stamp: Stamp,
    },
    /// Puts the key of the record's lease below `leases/` back.
    LeaseKey(LeaseId, Arc<SlotName>),
    /// Deletes the record.
    Delete,
}

/// What is in flight at a key, or of unknown outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flying {
    /// A record of this pod.
    Of(Uid),
    /// A record of all pods of a registration.
    OfAll,
    /// None that stands for an address.
    Other,
}

/// One key of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// The key.
    pub(super) key: Key,
    /// What is done there.
    pub(super) write: Write,
    /// The mod revision that the plan was made from.
    pub(super) planned_at: Revision,
    /// The create revision at that time.
    pub(super) created_at: Revision,
    /// It puts back what someone altered.
    pub(super) repair: bool,
}

/// What a lane is doing.
#[derive(Debug, Default)]
pub(super) enum State {
    /// Nothing is under way and every outcome is known.
    #[default]
    Idle,
    /// A transaction is under way. `then_unknown`: outcomes were unknown before it (a removal
    /// under NOSPACE).
    Wait {
        /// Its changes.
        batch: Vec<Change>,
        /// Whether the lane has to go through its barrier afterwards.
        then_unknown: bool,
        /// It deleted the mark instead of writing it.
        removal: bool,
    },
    /// The outcome of earlier transactions is unknown, or the mark is missing.
    Unknown,
    /// The mark is being put alone.
    Barrier,
    /// Keys of unknown outcome are being read.
    Read(Vec<Key>),
}

/// A lane.
#[derive(Debug, Default)]
pub(super) struct Lane {
    /// What it is doing.
    pub(super) state: State,
    /// The mod revision of its `seen` key, as known; 0: it does not stand.
    pub(super) seen: Revision,
    /// Keys of transactions whose outcome is unknown.
    pub(super) unknown: Vec<Change>,
    /// Not before this time (microseconds) is anything sent.
    pub(super) not_before: u64,
    /// The most operations of the next transaction: halved when one is refused for a key's sake; 0: as
    /// many as there may be.
    pub(super) most: usize,
    /// The most keys of the next reading, as for `most`.
    pub(super) most_read: usize,
    /// Waits before it tries again (microseconds), doubled with every failure.
    pub(super) backoff: u64,
    removals: VecDeque<Key>,
    others: VecDeque<Key>,
    /// What is queued, and whether among the removals.
    queued: HashMap<Key, bool>,
}

impl Lane {
    /// A key needs something; removals go first.
    pub(super) fn push(&mut self, key: Key, removal: bool) {
        match self.queued.insert(Arc::clone(&key), removal) {
            // What was queued to be put takes its turn among the removals now.
            None | Some(false) if removal => self.removals.push_back(key),
            None => self.others.push_back(key),
            Some(true) if !removal => {
                self.queued.insert(key, true);
            }
            Some(_) => {}
        }
    }

    /// A key that was taken and goes first again.
    pub(super) fn put_back(&mut self, key: Key, removal: bool) {
        if self.queued.insert(Arc::clone(&key), removal).is_none() {
            let queue = if removal {
                &mut self.removals
            } else {
                &mut self.others
            };
            queue.push_front(key);
        }
    }

    /// A key is taken out of its turn.
    pub(super) fn take(&mut self, key: &Key) {
        self.queued.remove(key);
    }

    /// The next key; removals only, or any.
    pub(super) fn pop(&mut self, removals_only: bool) -> Option<Key> {
        loop {
            let key = match self.removals.pop_front() {
                Some(key) => key,
                None if removals_only => return None,
                None => self.others.pop_front()?,
            };
            if self.queued.remove(&key).is_some() {
                return Some(key);
            }
        }
    }

    /// Whether a key is one of those whose outcome is unknown.
    #[must_use]
    pub(super) fn is_unknown(&self, key: &Key) -> bool {
        self.unknown.iter().any(|change| change.key == *key)
    }

    /// The number of keys that wait.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.queued.len()
    }

    /// Whether none waits.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        self.queued.is_empty()
    }

    /// Whether a transaction, a barrier or a read is under way.
    #[must_use]
    pub(super) fn is_busy(&self) -> bool {
        matches!(
            self.state,
            State::Wait { .. } | State::Barrier | State::Read(_)
        )
    }

    /// Whether every outcome is known.
    #[must_use]
    pub(super) fn is_known(&self) -> bool {
        matches!(
            self.state,
            State::Idle
                | State::Wait {
                    then_unknown: false,
                    ..
                }
        )
    }
}

/// Which lane a key goes through, always the same; keys that go in one transaction go through one lane.
#[must_use]
pub(super) fn lane_of(key: &[u8]) -> usize {
    // FNV-1a: the same in every process, so that a lane's marks stand for the same keys.
    let hash = bundle_of(key)
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    usize::try_from(hash % LANES as u64).unwrap_or(0)
}
