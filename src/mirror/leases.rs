//! Slots as etcd knows them: the keys below `leases/`.
//!
//! Takes what stands there, gives what each lease is for and how much stands on it. Must never grant,
//! revoke or keep anything.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::model::etcd::{LeaseId, Revision};
use crate::model::maps::HashMap;

/// What a slot is for; the value of its key below `leases/`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SlotName {
    /// `namespace/name` of the registration. Not its UID: one that is deleted and made anew while
    /// nobody looks keeps its records without an event.
    pub registration: Arc<str>,
    /// The narrowest prefix that holds the registration's records of all clusters.
    pub scope: Arc<str>,
    /// The TTL in seconds.
    pub ttl: i64,
    /// The name of the format, to read the records even when the registration is gone.
    pub format: Arc<str>,
    /// The prefix that was granted.
    pub prefix: Arc<str>,
    /// The service's name in the registry.
    pub service: Arc<str>,
}

/// A lease of ours.
#[derive(Clone, Debug, Default)]
pub struct Lease {
    /// What it is for; `None` when its key below `leases/` can't be read or was not seen yet.
    pub name: Option<Arc<SlotName>>,
    /// Whether its key below `leases/` stands.
    pub key_stands: bool,
    /// The create revision of that key.
    pub create_revision: Revision,
    /// Records in the mirror that are attached to it.
    pub records: u32,
    /// It was granted by this process in this term.
    pub own: bool,
}

/// All leases that anything of ours stands on or below `leases/`.
#[derive(Debug, Default)]
pub struct Leases(HashMap<LeaseId, Lease>);

impl Leases {
    /// The lease of that id.
    #[must_use]
    pub fn get(&self, id: LeaseId) -> Option<&Lease> {
        self.0.get(&id)
    }

    /// Whether a record on this lease is ours.
    #[must_use]
    pub fn is_ours(&self, id: LeaseId) -> bool {
        self.0
            .get(&id)
            .is_some_and(|lease| lease.key_stands || lease.own)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (LeaseId, &Lease)> {
        self.0.iter().map(|(id, lease)| (*id, lease))
    }

    pub(super) fn entry(&mut self, id: LeaseId) -> &mut Lease {
        self.0.entry(id).or_default()
    }

    pub(super) fn get_mut(&mut self, id: LeaseId) -> Option<&mut Lease> {
        self.0.get_mut(&id)
    }

    /// Forgets a lease that nothing reminds of.
    pub(super) fn tidy(&mut self, id: LeaseId) {
        if self
            .0
            .get(&id)
            .is_some_and(|lease| !lease.key_stands && !lease.own && lease.records == 0)
        {
            self.0.remove(&id);
        }
    }

    pub(super) fn end_term(&mut self) {
        self.0.retain(|_, lease| {
            lease.own = false;
            lease.key_stands || lease.records > 0
        });
    }
}
