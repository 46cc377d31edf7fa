//! Removes what a cluster has registered and frees its name.
//!
//! Takes a cluster's name, revokes its leases with their records and deletes its own keys. For a
//! person who knows that the cluster is gone: must never run while an operator leads there, and never
//! touch a lease that does not stand below the cluster's `leases/`. Can be repeated at any point.

use std::collections::{BTreeMap, BTreeSet};

use etcd_client::{Client, GetOptions};
use futures::stream::{self, StreamExt};
use thiserror::Error;

use super::failure::{MAX_MESSAGE, key_value};
use super::follower::ReadError;
use super::keeper::lease_of;
use super::mirror::{Pace, read_range};
use super::requests::{DEADLINE, execute};
use crate::model::etcd::{
    Answer, Compare, Failure, FailureKind, Key, KeyValue, LeaseId, Op, Range, Refusal, Request, Txn,
};

/// Leases that are revoked at a time; between these it is looked whether an operator has started.
const BATCH: usize = 64;

/// Revokes under way at a time: etcd writes them to its log together.
const PARALLEL: usize = 16;

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Leases, with all records on them.
    pub leases: usize,
    /// The cluster's own keys: `owner`, `waiting/`, `seen/`.
    pub keys: usize,
    /// Other UIDs that still hold the name: as its owner, or by leases.
    pub others: BTreeSet<String>,
}

/// Why nothing, or not all, was removed.
#[derive(Debug, Error)]
pub enum PurgeError {
    /// An operator of the cluster leads.
    #[error(
        "an operator of cluster {cluster:?} is running ({key} stands); stop it, wait for its election TTL to pass, and try again"
    )]
    OperatorRuns {
        /// The cluster's name.
        cluster: String,
        /// The leader key.
        key: String,
    },
    /// Leases of several clusters stand under the name.
    #[error(
        "several clusters have leases under the name {cluster:?}: {}; name the one to be removed: --uid", uids.join(", ")
    )]
    SeveralUids {
        /// The cluster's name.
        cluster: String,
        /// Their UIDs.
        uids: Vec<String>,
    },
    /// Nothing of the UID stands under the name, but something of others does.
    #[error(
        "nothing of UID {uid} stands under the name {cluster:?}, which is held by {}; check --uid", others.join(", ")
    )]
    OtherUid {
        /// The cluster's name.
        cluster: String,
        /// The UID that was to be removed.
        uid: String,
        /// The UIDs that hold the name.
        others: Vec<String>,
    },
    /// etcd did not do it.
    #[error(
        "{what}: {message}; what was removed until then stays removed, and it can be tried again"
    )]
    Etcd {
        /// What was tried.
        what: String,
        /// What etcd or the connection said.
        message: String,
    },
}

fn failed(what: &str, failure: Failure) -> PurgeError {
    PurgeError::Etcd {
        what: what.to_owned(),
        message: failure.message,
    }
}

/// Removes the leases and keys of a cluster. `registrar_prefix` ends in a slash; `uid` may be left
/// out where leases of one UID only stand under the name. `progress` is told how many leases are done and
/// how many there are.
///
/// # Errors
///
/// An operator runs, the UID must be named, or etcd did not answer or refused, or holds nothing of the UID.
pub async fn purge(
    client: &Client,
    registrar_prefix: &str,
    cluster: &str,
    uid: Option<&str>,
    mut progress: impl FnMut(usize, usize),
) -> Result<Report, PurgeError> {
    let own = format!("{registrar_prefix}{cluster}/");
    let leader: Key = format!("{own}leader").into_bytes().into();
    let owner: Key = format!("{own}owner").into_bytes().into();
    let runs = || PurgeError::OperatorRuns {
        cluster: cluster.to_owned(),
        key: format!("{own}leader"),
    };
    if !read(client, "reading the leader key", Op::Get(leader.clone()))
        .await?
        .is_empty()
    {
        return Err(runs());
    }
    let owners = read(client, "reading the owner key", Op::Get(owner.clone())).await?;
    let owner_record = owners.first();

    let below = format!("{own}leases/");
    let mut leases = list(client, &below).await?;
    let uid = match uid {
        Some(uid) => Some(uid.to_owned()),
        None => {
            let mut uids: BTreeSet<String> = leases.keys().cloned().collect();
            if let Some(owner) = owner_record {
                uids.insert(String::from_utf8_lossy(&owner.value).into_owned());
            }
            if uids.len() > 1 {
                return Err(PurgeError::SeveralUids {
                    cluster: cluster.to_owned(),
                    uids: uids.into_iter().collect(),
                });
            }
            uids.pop_first()
        }
    };
    let mut report = Report::default();
    let own_keys = uid
        .as_ref()
        .and_then(|uid| leases.remove(uid))
        .unwrap_or_default();
    report.others = leases.into_keys().collect();
    let owner_uid = owner_record.map(|owner| String::from_utf8_lossy(&owner.value).into_owned());
    report.others.extend(
        owner_uid
            .clone()
            .filter(|owner| uid.as_ref() != Some(owner)),
    );
    if let Some(uid) = &uid
        && own_keys.is_empty()
        && owner_uid.as_ref() != Some(uid)
        && !report.others.is_empty()
    {
        return Err(PurgeError::OtherUid {
            cluster: cluster.to_owned(),
            uid: uid.clone(),
            others: report.others.into_iter().collect(),
        });
    }
    let total = own_keys.len();
    for batch in own_keys.chunks(BATCH) {
        if !read(client, "reading the leader key", Op::Get(leader.clone()))
            .await?
            .is_empty()
        {
            return Err(runs());
        }
        let mut running = stream::iter(batch)
            .map(|key| remove(client, key))
            .buffer_unordered(PARALLEL);
        while let Some(done) = running.next().await {
            done?;
            report.leases += 1;
            progress(report.leases, total);
        }
    }

    // The owner of another UID holds the name; its keys are not those that were meant.
    if owner_uid.is_some() && owner_uid != uid {
        return Ok(report);
    }
    let mut keys = Vec::new();
    for part in ["waiting/", "seen/"] {
        let range = Range::prefix(format!("{own}{part}").as_bytes());
        let found = read(client, "listing the cluster's keys", Op::GetRange(range)).await?;
        keys.extend(found.into_iter().map(|kv| kv.key));
    }
    keys.extend(owner_record.map(|owner| owner.key.clone()));
    for keys in keys.chunks(BATCH) {
        let txn = Txn {
            compares: vec![Compare::ModRevision(leader.clone(), 0)],
            then: keys.iter().cloned().map(Op::Delete).collect(),
            otherwise: Vec::new(),
        };
        match execute(client, Request::Txn(txn), DEADLINE).await {
            Ok(Answer::Txn {
                succeeded: true, ..
            }) => report.keys += keys.len(),
            Ok(_) => return Err(runs()),
            Err(failure) => return Err(failed("deleting the cluster's keys", failure)),
        }
    }
    if let Some(lease) = owner_record.map(|owner| owner.lease).filter(|id| *id != 0) {
        revoke(client, lease).await?;
    }
    Ok(report)
}

/// The keys below `leases/` by UID.
async fn list(client: &Client, below: &str) -> Result<BTreeMap<String, Vec<Key>>, PurgeError> {
    let kv = client.kv_client().max_decoding_message_size(MAX_MESSAGE);
    let options = GetOptions::new().with_keys_only();
    let range = Range::prefix(below.as_bytes());
    let (_, keys) = read_range(kv, &range, Pace::default().page, options, |kv| {
        key_value(kv).key
    })
    .await
    .map_err(|error| {
        let (ReadError::Denied(message) | ReadError::Failed(message)) = error;
        PurgeError::Etcd {
            what: format!("listing the keys below {below}"),
            message,
        }
    })?;
    let mut by_uid: BTreeMap<String, Vec<Key>> = BTreeMap::new();
    for key in keys {
        let rest = key.get(below.len()..).unwrap_or_default();
        let uid = rest.split(|byte| *byte == b'/').next().unwrap_or_default();
        by_uid
            .entry(String::from_utf8_lossy(uid).into_owned())
            .or_default()
            .push(key);
    }
    Ok(by_uid)
}

async fn read(client: &Client, what: &str, op: Op) -> Result<Vec<KeyValue>, PurgeError> {
    let txn = Txn {
        then: vec![op],
        ..Txn::default()
    };
    match execute(client, Request::Txn(txn), DEADLINE).await {
        Ok(Answer::Txn { reads, .. }) => Ok(reads.into_iter().flatten().collect()),
        Ok(_) => Ok(Vec::new()),
        Err(failure) => Err(failed(what, failure)),
    }
}

/// Revokes the lease that a key names, and deletes the key if it is still there.
async fn remove(client: &Client, key: &Key) -> Result<(), PurgeError> {
    if let Some(id) = lease_of(key) {
        revoke(client, id).await?;
    }
    // It goes with its lease, unless somebody has put it back without one.
    let txn = Txn {
        then: vec![Op::Delete(key.clone())],
        ..Txn::default()
    };
    match execute(client, Request::Txn(txn), DEADLINE).await {
        Ok(_) => Ok(()),
        Err(failure) => Err(failed("deleting a key below leases/", failure)),
    }
}

async fn revoke(client: &Client, id: LeaseId) -> Result<(), PurgeError> {
    match execute(client, Request::Revoke(id), DEADLINE).await {
        Ok(_) => Ok(()),
        Err(failure) if failure.kind == FailureKind::Refused(Refusal::LeaseNotFound) => Ok(()),
        Err(failure) => Err(failed(&format!("revoking lease {id:016x}"), failure)),
    }
}
