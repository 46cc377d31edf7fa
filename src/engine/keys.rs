//! The operator's own keys in etcd (design, section 5).
//!
//! Takes the prefix, the cluster's name and its UID, gives keys. Must never be used for records.

use std::sync::Arc;

use crate::model::etcd::{Key, LeaseId};

/// The names of the keys below `/registrar/<cluster>/`.
#[derive(Clone, Debug)]
pub struct OwnKeys {
    /// `/registrar/<cluster>/`.
    pub prefix: String,
    /// The key that holds the UID of the cluster that has the name.
    pub owner: Key,
    /// The election.
    pub leader: Key,
    /// Below it, one key for each live replica that does not lead.
    pub waiting: String,
    /// Below it, one folder for each UID.
    pub all_leases: String,
    /// Below it, one key for each slot of this cluster; empty while the UID is unknown.
    pub leases: String,
    /// Below it, one key for each lane.
    pub seen: String,
}

impl OwnKeys {
    /// The keys of a cluster whose UID is not known yet.
    #[must_use]
    pub fn new(registrar_prefix: &str, cluster: &str) -> Self {
        let prefix = format!("{registrar_prefix}{cluster}/");
        Self {
            owner: key(&format!("{prefix}owner")),
            leader: key(&format!("{prefix}leader")),
            waiting: format!("{prefix}waiting/"),
            all_leases: format!("{prefix}leases/"),
            leases: String::new(),
            seen: format!("{prefix}seen/"),
            prefix,
        }
    }

    /// The same, for a cluster of this UID.
    pub fn set_uid(&mut self, uid: &str) {
        self.leases = format!("{}{uid}/", self.all_leases);
    }

    /// The key of a slot: the lease's id in 16 hex digits.
    #[must_use]
    pub fn lease(&self, id: LeaseId) -> Key {
        key(&format!("{}{id:016x}", self.leases))
    }

    /// The key of a lane's mark.
    #[must_use]
    pub fn seen(&self, lane: usize) -> Key {
        key(&format!("{}{lane}", self.seen))
    }

    /// The key of a replica that waits.
    #[must_use]
    pub fn waiting(&self, nonce: &str) -> Key {
        key(&format!("{}{nonce}", self.waiting))
    }
}

fn key(text: &str) -> Key {
    Arc::from(text.as_bytes())
}
