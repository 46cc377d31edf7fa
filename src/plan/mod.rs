//! What is wanted and what stands --> what is to be done at each key.
//!
//! Takes the index and the mirror, gives for one key what it needs. Must never remember anything, do IO
//! or read a clock: the same index and mirror give the same plan, whatever happened before.

pub mod ranges;
pub mod slots;

use std::sync::Arc;

use crate::accept::still_granted;
use crate::format::{Discovered, Format};
use crate::index::pods::{PodId, Uid};
use crate::index::registrations::{RegistrationId, Stamp, Standing};
use crate::index::{Claim, Index, Part};
use crate::mirror::leases::SlotName;
use crate::mirror::{Mirror, Record};
use crate::model::endpoint::{Protocol, Socket, Target};
use crate::model::etcd::{Key, LeaseId};
use crate::model::maps::HashMap;

/// What a key needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nobody wants it and nothing of ours stands there.
    Nothing,
    /// It stands as the claim wants it.
    Right(Claim),
    /// What stands is kept, though nobody may change it now (suspended, not accepted).
    Keep,
    /// The record that the claim wants is to be put; [`put`] makes it.
    Put(Claim),
    /// The record is right, but the key of its lease below `leases/` is gone.
    LeaseKey(LeaseId, Arc<SlotName>),
    /// The record is to be deleted.
    Delete,
    /// Something else has to happen first.
    Wait(Wait),
    /// What stands there is not ours.
    Foreign(Claim),
}

/// A record that is to be put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Put {
    /// Who wants it.
    pub claim: Claim,
    /// The value.
    pub value: Vec<u8>,
    /// The slot that it belongs on.
    pub slot: Arc<SlotName>,
    /// What it stands for; of a record for all pods, what that which stands there does not.
    pub targets: Vec<Target>,
    /// The pod; `None`: it is for all pods.
    pub uid: Option<Uid>,
    /// What of the index it was made from; 0: of a part of it, and the rest is to come.
    pub stamp: Stamp,
}

/// What a key waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The snapshot of its scope.
    Snapshot,
    /// Another pod's record of the same address has to go first.
    Address,
    /// The record that takes this one's place has to stand first.
    Successor,
}

/// What one key needs now.
#[must_use]
pub fn need(index: &Index, mirror: &Mirror, key: &Key) -> Need {
    let record = mirror.get(key);
    let Some((claim, _)) = index.winner(key) else {
        return match record {
            Some(record) if record.ours => stale(index, mirror, key, record),
            _ => Need::Nothing,
        };
    };
    let Some(stored) = index.registration(claim.registration) else {
        return Need::Nothing;
    };
    let Some(accepted) = stored.serving() else {
        return Need::Nothing;
    };
    if accepted.suspend {
        return if record.is_some() {
            Need::Keep
        } else {
            Need::Nothing
        };
    }
    if !mirror.covers(key) {
        return Need::Wait(Wait::Snapshot);
    }
    let Some(slot) = &stored.slot else {
        return Need::Nothing;
    };
    if let Some(record) = record {
        if !record.ours {
            return Need::Foreign(claim);
        }
        if is_as_wanted(index, mirror, claim, slot, key, record)
            && let Some(lease) = mirror.leases().get(record.lease)
            && lease
                .name
                .as_deref()
                .is_some_and(|name| same_slot(name, slot))
        {
            if lease.key_stands {
                return Need::Right(claim);
            }
            return Need::LeaseKey(
                record.lease,
                lease.name.clone().unwrap_or_else(|| Arc::clone(slot)),
            );
        }
    }
    let Some(pod) = claim.pod else {
        // Its key is no address, and what has to wait is left out of it.
        return Need::Put(claim);
    };
    let targets = index.targets_at(claim, key);
    if record
        .and_then(|record| record.socket)
        .is_some_and(|socket| targets.iter().all(|target| target.socket() != socket))
    {
        // A key never gets another address: some readers would keep the old one for ever.
        return Need::Delete;
    }
    let free = targets
        .iter()
        .all(|target| address_is_free(index, mirror, key, pod, target));
    if !free {
        // Two keys of a pod that lost its address would wait for each other.
        let another = |record| pod_of(index, mirror, key, record) != Some(pod);
        return if record.is_some_and(another) {
            Need::Delete
        } else {
            Need::Wait(Wait::Address)
        };
    }
    Need::Put(claim)
}

/// The record of a [`Need::Put`] of one pod; `None`: it is wanted no longer.
#[must_use]
pub fn put(index: &Index, mirror: &Mirror, key: &Key, claim: Claim) -> Option<Put> {
    let slot = index.registration(claim.registration)?.slot.as_ref()?;
    let pod = claim.pod?;
    let zone = mirror
        .get(key)
        .filter(|record| record.ours)
        .map(|record| known_zone(index, claim, slot, key, record))
        .unwrap_or_default();
    let wanted = index.record(claim, key, &zone)?;
    Some(Put {
        claim,
        value: wanted.value,
        slot: Arc::clone(slot),
        targets: wanted.targets,
        uid: Some(index.pods().get(pod)?.uid),
        stamp: index.stamp(claim, key)?,
    })
}

/// The record of a [`Need::Put`] for all pods; `None`: it is wanted no longer. An endpoint that it does not hold yet is
/// left out as long as another pod's record has the address, or `may_join` says that it has to wait.
#[must_use]
pub fn put_aggregate(
    index: &Index,
    mirror: &Mirror,
    key: &Key,
    claim: Claim,
    mut may_join: impl FnMut(&Part<'_>) -> bool,
) -> Option<Put> {
    let stored = index.registration(claim.registration)?;
    let (slot, accepted) = (stored.slot.as_ref()?, stored.serving()?);
    let aggregate = index.aggregate_at(claim.registration, key)?;
    let mut stamp = index.stamp(claim, key)?;
    let mut parts: Vec<Part<'_>> = Vec::new();
    let mut targets: Vec<Target> = Vec::new();
    for part in index.parts(claim.registration, key) {
        let target = part.entry.target;
        // What it holds already stays, whoever else has the address.
        if !mirror.keys_at(&target.socket()).contains(key) {
            if !(address_is_free(index, mirror, key, part.pod, &target) && may_join(&part)) {
                stamp = 0;
                continue;
            }
            targets.push(target);
        }
        parts.push(part);
    }
    let unknown = parts.iter().any(|part| part.entry.zone.is_empty());
    let zones = unknown.then(|| zones_at(mirror, slot, key));
    let entries = parts.iter().map(|part| {
        let mut entry = part.entry;
        if entry.zone.is_empty()
            && let Some(zone) = zones.as_ref().and_then(|z| z.get(&entry.target.socket()))
        {
            entry.zone = zone;
        }
        (entry, (part.created, part.uid))
    });
    let (value, _) = accepted.format.aggregate_value(&aggregate, entries)?;
    Some(Put {
        claim,
        value,
        slot: Arc::clone(slot),
        targets,
        uid: None,
        stamp,
    })
}

/// The zones that stand in a record for all pods: an unknown one must not replace them. Its endpoints have no names and
/// are known by their addresses, which mostly say where their nodes are.
fn zones_at(mirror: &Mirror, slot: &SlotName, key: &Key) -> HashMap<Socket, String> {
    let record = mirror.get(key).filter(|record| record.ours);
    let found = record.and_then(|record| {
        let format = Format::by_name(&slot.format)?;
        format.read_all(&slot.prefix, key, &record.value).ok()
    });
    let told = found.into_iter().flatten();
    told.filter_map(|found| Some(((found.socket?.ip(), found.socket?.port()), found.zone?)))
        .collect()
}

/// Whether a record stands as a put would leave it.
#[must_use]
pub fn stands(mirror: &Mirror, key: &[u8], put: &Put) -> bool {
    mirror.get(key).is_some_and(|record| {
        let lease = mirror.leases().get(record.lease);
        *record.value == *put.value
            && lease
                .and_then(|lease| lease.name.as_ref())
                .is_some_and(|name| same_slot(name, &put.slot))
    })
}

/// Whether a record of ours is the one that a claim wants.
fn is_as_wanted(
    index: &Index,
    mirror: &Mirror,
    claim: Claim,
    slot: &SlotName,
    key: &Key,
    record: &Record,
) -> bool {
    // It was found to be so, and nothing that it is made from has changed.
    if record.made_for != 0 && index.stamp(claim, key) == Some(record.made_for) {
        return true;
    }
    if claim.pod.is_none() {
        // To make one takes long. Where something has changed, it is made when it is put, and maybe found to stand.
        return record.made_for == 0
            && put_aggregate(index, mirror, key, claim, |_| true)
                .is_some_and(|wanted| *record.value == *wanted.value);
    }
    let zone = known_zone(index, claim, slot, key, record);
    index
        .record(claim, key, &zone)
        .is_some_and(|wanted| *record.value == *wanted.value)
}

/// A record's lease is right for its registration, scope and TTL, whoever granted it.
fn same_slot(a: &SlotName, b: &SlotName) -> bool {
    a.registration == b.registration && a.scope == b.scope && a.ttl == b.ttl
}

/// The zone that stands in a record of the same pod: an unknown one must not replace it.
fn known_zone(index: &Index, claim: Claim, slot: &SlotName, key: &[u8], record: &Record) -> String {
    let Some(pod) = claim.pod.and_then(|pod| index.pods().get(pod)) else {
        return String::new();
    };
    if !index.zone(pod).is_empty() {
        return String::new();
    }
    let found = Format::by_name(&slot.format)
        .and_then(|format| format.read(&slot.prefix, key, &record.value).ok());
    found
        .filter(|found| match &found.uid {
            Some(uid) => *uid == index.pods().uid_text(pod.uid),
            // Without a UID it is known by its name and address.
            None => {
                found.pod.as_deref() == Some(&*pod.name)
                    && index.targets_at(claim, key).iter().any(|t| found.holds(t))
            }
        })
        .and_then(|found| found.zone)
        .unwrap_or_default()
}

fn read_uid(slot: &SlotName, key: &[u8], value: &[u8]) -> Option<String> {
    let format = Format::by_name(&slot.format).filter(Format::names_pod)?;
    format.read(&slot.prefix, key, value).ok()?.uid
}

/// Whether no other record of this cluster holds the target for another pod.
fn address_is_free(index: &Index, mirror: &Mirror, key: &Key, pod: PodId, target: &Target) -> bool {
    mirror
        .keys_at(&target.socket())
        .iter()
        .filter(|other| *other != key)
        .all(|other| {
            let Some(record) = mirror.get(other) else {
                return true;
            };
            if holder(index, mirror, other, record, target) == Some(pod) {
                return true;
            }
            !may_stand_for(mirror, other, record, target)
                || is_wanted_for_others(index, mirror, other, record, target)
        })
}

/// Whether a record of ours stands for a target, as far as it tells: not every format tells the protocol.
fn may_stand_for(mirror: &Mirror, key: &[u8], record: &Record, target: &Target) -> bool {
    let found = || {
        let slot = mirror.leases().get(record.lease)?.name.as_ref()?;
        let format = Format::by_name(&slot.format)?;
        format.read_all(&slot.prefix, key, &record.value).ok()
    };
    found().is_none_or(|found| found.iter().any(|found| found.holds(target)))
}

/// The pod that a record was written for, of those that stand for a target, where that can be told.
fn holder(
    index: &Index,
    mirror: &Mirror,
    key: &Key,
    record: &Record,
    target: &Target,
) -> Option<PodId> {
    let slot = mirror.leases().get(record.lease)?.name.as_ref()?;
    if Format::by_name(&slot.format)?.is_aggregate() {
        // It names no pods: what is wanted of it is that of the pod which has the address now.
        return index.owner_in(index.find(&slot.registration)?, target);
    }
    pod_of(index, mirror, key, record)
}

/// Whether a record that stands as it is wanted stands for other targets: not every format tells the
/// protocol.
fn is_wanted_for_others(
    index: &Index,
    mirror: &Mirror,
    key: &Key,
    record: &Record,
    target: &Target,
) -> bool {
    let wanted = || {
        let (claim, _) = index.winner(key)?;
        let slot = mirror.leases().get(record.lease)?.name.as_ref()?;
        index.record(claim, key, &known_zone(index, claim, slot, key, record))
    };
    wanted()
        .is_some_and(|wanted| *wanted.value == *record.value && !wanted.targets.contains(target))
}

/// The pod that a record was written for, where that can be told.
fn pod_of(index: &Index, mirror: &Mirror, key: &Key, record: &Record) -> Option<PodId> {
    let slot = mirror.leases().get(record.lease)?.name.clone()?;
    let uid = uid_of(index, mirror, &slot, key, record);
    let pod = uid.and_then(|uid| index.pods().find(uid));
    if pod.is_some() || read_uid(&slot, key, &record.value).is_some() {
        return pod;
    }
    // Nobody has said, or it was a pod's that is gone: it is the winner's if it is what the winner wants.
    let (claim, _) = index.winner(key)?;
    let pod = claim.pod?;
    let wanted = index.record(claim, key, "")?;
    if *wanted.value == *record.value {
        return Some(pod);
    }
    // Something else of it may have changed while nobody looked: it is known by its name and address.
    let found = Format::by_name(&slot.format)?
        .read(&slot.prefix, key, &record.value)
        .ok()?;
    let same = found.pod.as_deref() == index.pods().get(pod).map(|pod| &*pod.name)
        && wanted.targets.iter().any(|target| found.holds(target));
    (found.pod.is_some() && same).then_some(pod)
}

/// The pod that the record of ours at a key names, or was seen to stand for; `None`: nothing tells.
#[must_use]
pub fn named_pod(index: &Index, mirror: &Mirror, key: &[u8]) -> Option<Uid> {
    let record = mirror.get(key)?;
    let slot = mirror.leases().get(record.lease)?.name.as_ref()?;
    uid_of(index, mirror, slot, key, record)
}

/// Whether the record of ours at a key may stand for what a pod other than this one wants to be registered: not
/// every format tells the protocol.
#[must_use]
pub fn is_in_the_way(index: &Index, mirror: &Mirror, key: &[u8], pod: Uid) -> bool {
    let found = mirror.get(key).and_then(|record| {
        let slot = mirror.leases().get(record.lease)?.name.as_ref()?;
        let format = Format::by_name(&slot.format)?;
        let found = format.read_all(&slot.prefix, key, &record.value).ok()?;
        Some((record.socket?, found))
    });
    let Some((socket, found)) = found else {
        return false;
    };
    let id = index.pods().find(pod);
    Protocol::ALL.iter().any(|protocol| {
        let target = Target {
            ip: socket.0,
            port: socket.1,
            protocol: *protocol,
        };
        index.owner(&target).is_some_and(|owner| Some(owner) != id)
            && found.iter().any(|found| found.holds(&target))
    })
}

/// The pod that a record names, or that it was seen to stand for where the format has no room for a name.
fn uid_of(
    index: &Index,
    mirror: &Mirror,
    slot: &SlotName,
    key: &[u8],
    record: &Record,
) -> Option<Uid> {
    read_uid(slot, key, &record.value)
        .map(|uid| index.pods().uid(&uid))
        .or_else(|| mirror.pod_at(key))
}

/// What becomes of a record of ours that nobody wants.
fn stale(index: &Index, mirror: &Mirror, key: &Key, record: &Record) -> Need {
    let Some(slot) = mirror
        .leases()
        .get(record.lease)
        .and_then(|lease| lease.name.clone())
    else {
        // Its lease is not ours any more (someone put it anew): nobody's wish but ours made it.
        return Need::Delete;
    };
    if !index.watches(&slot.registration) {
        // Nobody here knows whether it is still wanted. Its lease is not kept alive (`registry::keeper`), and ends it.
        return Need::Keep;
    }
    let Some(id) = index.find(&slot.registration) else {
        return Need::Delete;
    };
    let Some(stored) = index.registration(id) else {
        return Need::Delete;
    };
    match &stored.standing {
        Standing::Serving(accepted) if accepted.suspend => Need::Keep,
        Standing::Serving(_) => {
            if moves(index, mirror, id, &slot, key, record, |_| false) {
                Need::Wait(Wait::Successor)
            } else {
                Need::Delete
            }
        }
        Standing::Kept { last, .. } => {
            let granted = Format::by_name(&slot.format).is_some_and(|format| {
                still_granted(
                    index.policy(),
                    &stored.namespace,
                    &format,
                    &slot.prefix,
                    &slot.service,
                )
            });
            let may_be_unready = last.as_ref().is_none_or(|last| last.publish_not_ready);
            if granted && !has_left(index, mirror, &slot, key, record, may_be_unready) {
                Need::Keep
            } else {
                Need::Delete
            }
        }
    }
}

/// Whether a record that nobody wants at its key has to stay because of a successor that does not stand, or that stands
/// but is `leaving`: its removal is under way.
#[must_use]
pub fn is_needed_still(
    index: &Index,
    mirror: &Mirror,
    key: &Key,
    leaving: impl Fn(&Key) -> bool,
) -> bool {
    let moving = || {
        let record = mirror.get(key).filter(|record| record.ours)?;
        let slot = mirror.leases().get(record.lease)?.name.clone()?;
        let id = index.find(&slot.registration)?;
        let accepted = index.registration(id)?.serving()?;
        let stale = index.winner(key).is_none() && !accepted.suspend;
        Some(stale && moves(index, mirror, id, &slot, key, record, leaving))
    };
    moving().unwrap_or(false)
}

/// Whether what a record stands for is wanted elsewhere by its registration, and does not stand there yet.
fn moves(
    index: &Index,
    mirror: &Mirror,
    id: RegistrationId,
    slot: &SlotName,
    key: &Key,
    record: &Record,
    leaving: impl Fn(&Key) -> bool,
) -> bool {
    if is_aggregate(slot) {
        return aggregate_awaits_successors(index, mirror, id, slot, key, record, leaving);
    }
    record.socket.is_some_and(|socket| {
        pod_of(index, mirror, key, record)
            .is_some_and(|pod| awaits_successor(index, mirror, id, key, pod, socket, leaving))
    })
}

fn is_aggregate(slot: &SlotName) -> bool {
    Format::by_name(&slot.format).is_some_and(|format| format.is_aggregate())
}

/// The same for all endpoints of a record for all pods. It can't lose a part of them: where one has gone, none waits.
fn aggregate_awaits_successors(
    index: &Index,
    mirror: &Mirror,
    id: RegistrationId,
    slot: &SlotName,
    key: &[u8],
    record: &Record,
    leaving: impl Fn(&Key) -> bool,
) -> bool {
    let found = Format::by_name(&slot.format)
        .and_then(|format| format.read_all(&slot.prefix, key, &record.value).ok());
    let mut awaits = false;
    for target in found.iter().flatten().filter_map(Discovered::target) {
        let Some(pod) = index.owner_in(id, &target) else {
            return false;
        };
        let socket = target.socket();
        awaits = awaits || awaits_successor(index, mirror, id, key, pod, socket, &leaving);
    }
    awaits
}

/// Whether the registration has a new record for the endpoint of the old one at `key` that does not stand yet: the new
/// key comes before the old one goes. (That of another pod waits in its turn until the old one is gone.)
fn awaits_successor(
    index: &Index,
    mirror: &Mirror,
    id: RegistrationId,
    key: &[u8],
    pod: PodId,
    socket: Socket,
    leaving: impl Fn(&Key) -> bool,
) -> bool {
    let may_come = |targets: &[Target]| {
        let mut targets = targets.iter();
        !targets.any(|target| another_moves(index, mirror, key, pod, target))
    };
    lacks_successor(index, mirror, id, pod, socket, leaving, may_come)
}

/// The same, of the new records whose targets are such.
fn lacks_successor(
    index: &Index,
    mirror: &Mirror,
    id: RegistrationId,
    pod: PodId,
    socket: Socket,
    leaving: impl Fn(&Key) -> bool,
    are_such: impl Fn(&[Target]) -> bool,
) -> bool {
    let targets = Protocol::ALL.map(|protocol| Target {
        ip: socket.0,
        port: socket.1,
        protocol,
    });
    targets
        .iter()
        .filter(|target| index.owner(target) == Some(pod))
        .flat_map(|target| index.keys_at(id, target))
        .any(|new| {
            let standing = mirror
                .get(new)
                .filter(|record| record.ours && record.read && !leaving(new));
            if let Some((claim, _)) = index.winner(new)
                && claim.pod.is_none()
            {
                // One that is as wanted without the endpoint is full.
                return claim.registration == id
                    && !standing.is_some_and(|record| {
                        mirror.keys_at(&socket).contains(new)
                            || record.made_for != 0
                                && index.stamp(claim, new) == Some(record.made_for)
                    });
            }
            standing.is_none()
                // One that another registration wins never comes; those of the pod's other endpoints
                // have predecessors of their own.
                && index.winner(new).is_some_and(|(claim, _)| {
                    claim.registration == id
                        && claim.pod == Some(pod)
                        && index.record(claim, new, "").is_some_and(|wanted| {
                            let mut targets = wanted.targets.iter();
                            targets.any(|target| target.socket() == socket)
                                && are_such(&wanted.targets)
                        })
                })
        })
}

/// Whether a record that another pod is about to leave is in the way of what comes for the old one at `key`, and the old
/// one in the way of what comes for that: two that move at once would wait for each other for ever.
fn another_moves(index: &Index, mirror: &Mirror, key: &[u8], pod: PodId, target: &Target) -> bool {
    mirror.keys_at(&target.socket()).iter().any(|other| {
        let moving = || {
            let record = mirror.get(other).filter(|record| record.ours)?;
            let holder = pod_of(index, mirror, other, record)?;
            let in_the_way = holder != pod && may_stand_for(mirror, other, record, target);
            if !in_the_way || index.winner(other).is_some() {
                return None;
            }
            let slot = mirror.leases().get(record.lease)?.name.as_ref()?;
            let id = index.find(&slot.registration)?;
            let old = mirror.get(key)?;
            let waits = |targets: &[Target]| {
                let mut targets = targets.iter();
                targets.any(|target| may_stand_for(mirror, key, old, target))
            };
            let leaving = |_: &Key| false;
            Some(lacks_successor(
                index,
                mirror,
                id,
                holder,
                target.socket(),
                leaving,
                waits,
            ))
        };
        moving().unwrap_or(false)
    })
}

/// Whether the pod that a record stands for is gone for good, or is not ready where it has to be.
fn has_left(
    index: &Index,
    mirror: &Mirror,
    slot: &SlotName,
    key: &[u8],
    record: &Record,
    may_be_unready: bool,
) -> bool {
    let Some(uid) = uid_of(index, mirror, slot, key, record) else {
        return false;
    };
    let pods = index.pods();
    pods.find(uid)
        .and_then(|id| pods.get(id))
        .is_none_or(|pod| pod.left || !(pod.ready || may_be_unready))
}
