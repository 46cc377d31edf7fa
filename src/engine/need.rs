//! What each key needs, and when it is looked at again.
//!
//! Takes keys that may need something, gives them to their lanes. Remembers what the plan must not: what
//! was confirmed, what flaps, what was refused, what is waited for. Must never talk to etcd.

use std::collections::VecDeque;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::format::bundle_of;
use crate::index::Claim;
use crate::index::pods::Uid;
use crate::index::registrations::{RegistrationId, Standing};
use crate::mirror::leases::SlotName;
use crate::model::endpoint::{Protocol, Socket, Target};
use crate::model::maps::HashSet;
use crate::plan::{Need, Put, is_needed_still, put, put_aggregate, stands};

use super::Engine;
use super::io::Effect;
use super::lane::{Flying, lane_of};
use super::report::Problem;
use crate::model::etcd::{Key, LeaseId, Range};

/// A key that was read back as it was wanted.
#[derive(Debug)]
pub(super) struct Confirmed {
    pub(super) registration: RegistrationId,
    /// It stands so now.
    pub(super) standing: bool,
    /// Someone else altered it since; it is put back.
    pub(super) drifted: bool,
    /// When it was put back last, in microseconds.
    pub(super) repaired: u64,
}

/// A key that etcd refuses for its own sake.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) until: u64,
    pub(super) wait: u64,
    /// It was a removal that was refused; one after a refused put is tried at once.
    pub(super) removal: bool,
}

/// What a lane does at a key.
#[derive(Debug)]
pub(super) enum Due {
    /// Puts its record.
    Put(Box<Put>),
    /// Puts the key of its record's lease.
    LeaseKey(LeaseId, Arc<SlotName>),
    /// Deletes its record.
    Delete,
}

/// How often a pod came back of late.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// When it came back, the newest last; at most five.
    times: VecDeque<u64>,
    /// Not before this time is it added again.
    hold_until: u64,
    last: u64,
}

/// "A pod that has come back five times within 10 s is added again only after 1 s of rest" (design, section 8).
const TURNS: usize = 5;
const TURNS_MICROS: u64 = 10_000_000;
const REST_MICROS: u64 = 1_000_000;
/// What someone alters is put back at most once a second per key (design, section 8).
const REPAIR_MICROS: u64 = 1_000_000;
/// The first and the longest wait of a key that etcd refuses.
const HELD_MICROS: u64 = 1_000_000;
const HELD_MOST_MICROS: u64 = 60_000_000;

impl Engine {
    /// Looks at a key: notes what it needs and queues it. `received`: when the change of Kubernetes
    /// came in that is the cause.
    pub(super) fn look(&mut self, key: &Key, received: Option<u64>) {
        let need = self.need_now(key);
        if self.note_whose(key, &need)
            && let Some(socket) = self.mirror.get(key).and_then(|record| record.socket)
        {
            // Without a change in etcd: what the pod wants elsewhere may have waited for the address.
            self.look_at_socket(socket, |other| other == key);
        }
        self.note_confirmed(key, &need, received);
        self.note_problems(key, &need);
        let writes = match &need {
            Need::Put(_) => Some(false),
            Need::Delete => Some(true),
            Need::LeaseKey(..) => None,
            Need::Wait(_) => return,
            Need::Foreign(_) => {
                self.look_at_foreign(key);
                return;
            }
            Need::Nothing | Need::Right(_) | Need::Keep => {
                self.note_propagation(key, &need);
                return;
            }
        };
        if let (Some(received), Some(removal)) = (received, writes) {
            match self.pending.get(key) {
                Some((_, known)) if *known == removal => {}
                _ => {
                    self.pending.insert(Arc::clone(key), (received, removal));
                }
            }
        }
        let first = match &need {
            Need::Put(claim) => self.takes_away(key, *claim),
            _ => writes == Some(true),
        };
        // One that is in flight waits there: its lane sends nothing before the outcome is known.
        if self.leads()
            && let Some(lane) = self.lanes.get_mut(lane_of(key))
        {
            lane.push(Arc::clone(key), first);
        }
    }

    /// What the lane does about a key now, or nothing and when to look again.
    pub(super) fn due(&mut self, key: &Key) -> Option<Due> {
        let need = self.need_now(key);
        let now = self.now.monotonic;
        let later = match &need {
            Need::Put(claim) => {
                let resting = claim
                    .pod
                    .and_then(|pod| self.index.pods().get(pod))
                    .and_then(|pod| self.turns.get(&pod.uid))
                    .map_or(0, |turns| turns.hold_until);
                let absent = self.mirror.get(key).is_none();
                if absent && resting > now {
                    self.pending.remove(key);
                    resting
                } else {
                    self.not_before(key)
                }
            }
            Need::LeaseKey(..) => self.not_before(key),
            Need::Delete => self
                .held
                .get(key)
                .filter(|held| held.removal)
                .map_or(0, |held| held.until),
            Need::Foreign(_) => {
                self.look_at_foreign(key);
                return None;
            }
            Need::Nothing | Need::Right(_) | Need::Keep | Need::Wait(_) => return None,
        };
        if later > now {
            self.at(later, Arc::clone(key));
            return None;
        }
        if self.frozen() && !self.puts_back(key, &need) {
            return None;
        }
        if matches!(need, Need::Delete)
            && is_needed_still(&self.index, &self.mirror, key, |new| self.leaves(new))
        {
            // Looked at again when what is in flight has landed.
            return None;
        }
        match need {
            Need::Put(claim) if claim.pod.is_none() => self.aggregate_due(key, claim),
            Need::Put(claim) => {
                let put = put(&self.index, &self.mirror, key, claim)?;
                let sockets = put.targets.iter().map(Target::socket);
                if !put
                    .uid
                    .is_some_and(|uid| self.address_is_free_in_flight(key, uid, sockets))
                {
                    // Looked at again when what is in flight has landed.
                    return None;
                }
                let turn = self.turn(key, claim.registration);
                if turn > now {
                    self.at(turn, Arc::clone(key));
                    return None;
                }
                Some(Due::Put(Box::new(put)))
            }
            Need::LeaseKey(lease, slot) => Some(Due::LeaseKey(lease, slot)),
            Need::Delete => Some(Due::Delete),
            _ => None,
        }
    }

    /// The same for a record of all pods, which is put seldom enough, but at once where an endpoint is gone.
    fn aggregate_due(&mut self, key: &Key, claim: Claim) -> Option<Due> {
        let now = self.now.monotonic;
        let standing = self.mirror.get(key).map(|r| (r.mod_revision, r.made_for));
        let takes_away = self.takes_away(key, claim);
        let turn = self.pace.aggregate_turn(key, takes_away, now);
        if turn > now {
            if self.pace.aggregate_waits(key, turn, now) {
                self.at(turn, Arc::clone(key));
            }
            return None;
        }
        let mut rested = None;
        let put = put_aggregate(&self.index, &self.mirror, key, claim, |part| {
            let turns = self.turns.get(&part.uid);
            if let Some(turns) = turns.filter(|turns| turns.hold_until > now) {
                rested = rested.max(Some(turns.hold_until));
                return false;
            }
            // Looked at again when what is in flight has landed.
            let socket = std::iter::once(part.entry.target.socket());
            self.address_is_free_in_flight(key, part.uid, socket)
        })?;
        if let Some(rested) = rested {
            self.at(rested, Arc::clone(key));
        }
        if stands(&self.mirror, key, &put) {
            if let Some((at, _)) = standing.filter(|_| put.stamp != 0) {
                self.mirror.note_made(key, at, put.stamp);
                self.look(key, None);
            }
            return None;
        }
        if !takes_away {
            let turn = self.turn(key, claim.registration);
            if turn > now {
                self.at(turn, Arc::clone(key));
                return None;
            }
        }
        Some(Due::Put(Box::new(put)))
    }

    /// Whether a record of all pods may have an endpoint that is gone.
    fn takes_away(&self, key: &Key, claim: Claim) -> bool {
        claim.pod.is_none()
            && self
                .mirror
                .get(key)
                .is_some_and(|record| self.index.may_have_lost(claim, key, record.made_for))
    }

    /// When the namespace of a registration may put one more record.
    fn turn(&mut self, key: &Key, registration: RegistrationId) -> u64 {
        let now = self.now.monotonic;
        let Some(stored) = self.index.registration(registration) else {
            return now;
        };
        // What stands beside an address goes with it.
        if bundle_of(key).len() < key.len()
            && stored
                .serving()
                .is_some_and(|a| a.format.lead_of(key).is_some())
        {
            return now;
        }
        let endpoints = self.index.limits(&stored.namespace).endpoints;
        self.pace.turn(key, &stored.namespace, endpoints, now)
    }

    /// A frozen leader puts back what it had confirmed and changes nothing else.
    fn puts_back(&self, key: &Key, need: &Need) -> bool {
        match need {
            // One of all pods may be wanted otherwise because of a pod, and then stays as it is.
            Need::Put(claim) => self.confirmed.get(key).is_some_and(|known| {
                known.registration == claim.registration && (claim.pod.is_some() || known.drifted)
            }),
            Need::LeaseKey(..) => true,
            _ => false,
        }
    }

    fn not_before(&self, key: &Key) -> u64 {
        let held = self.held.get(key).map_or(0, |held| held.until);
        let repaired = self
            .confirmed
            .get(key)
            .filter(|confirmed| confirmed.drifted && confirmed.repaired > 0)
            .map_or(0, |confirmed| confirmed.repaired + REPAIR_MICROS);
        held.max(repaired)
    }

    /// etcd refused a key for its own sake: it waits, longer each time.
    pub(super) fn hold(&mut self, key: &Key, removal: bool) {
        let now = self.now.monotonic;
        let wait = self
            .held
            .get(key)
            .map_or(HELD_MICROS, |held| (held.wait * 2).min(HELD_MOST_MICROS));
        self.held.insert(
            Arc::clone(key),
            Held {
                until: now + wait,
                wait,
                removal,
            },
        );
        self.at(now + wait, Arc::clone(key));
    }

    /// Whether the removal of a key may be in flight, or of unknown outcome: what stands there may go yet.
    fn leaves(&self, key: &Key) -> bool {
        matches!(self.flying.get(key), Some(Flying::Other))
    }

    fn address_is_free_in_flight(
        &self,
        key: &Key,
        pod: Uid,
        mut sockets: impl Iterator<Item = Socket>,
    ) -> bool {
        sockets.all(|socket| {
            self.flying_sockets
                .get(&socket)
                .into_iter()
                .flatten()
                .filter(|other| *other != key)
                .all(|other| match self.flying.get(other) {
                    Some(Flying::Of(other)) => *other == pod,
                    Some(Flying::OfAll) => false,
                    Some(Flying::Other) | None => true,
                })
        })
    }

    /// Notes whose a record is that does not say so; says whether it was another pod's before.
    fn note_whose(&mut self, key: &Key, need: &Need) -> bool {
        let claim = match need {
            Need::Right(claim) => Some(*claim),
            // As right, but that the key of its lease was not read yet, or is to be put back.
            Need::LeaseKey(..) => self.index.winner(key).map(|(claim, _)| claim),
            _ => None,
        };
        if let Some(claim) = claim
            && let Some(id) = claim.pod
            && let Some(stamp) = self.index.stamp(claim, key)
            && let Some((at, made_for)) = self.mirror.get(key).map(|r| (r.mod_revision, r.made_for))
            && made_for != stamp
        {
            self.mirror.note_made(key, at, stamp);
            if let Some(stored) = self.index.registration(claim.registration)
                && stored.serving().is_some_and(|a| !a.format.names_pod())
                && let Some(pod) = self.index.pods().get(id)
            {
                // Once nobody wants the key any more, nothing else tells whose it was.
                return self.mirror.note_pod(key, at, pod.uid);
            }
        }
        false
    }

    fn note_confirmed(&mut self, key: &Key, need: &Need, received: Option<u64>) {
        let right = match need {
            Need::Right(claim) if self.mirror.get(key).is_some_and(|record| record.read) => {
                Some(claim.registration)
            }
            _ => None,
        };
        let known = self.confirmed.get(key);
        let repaired = known.map_or(0, |known| known.repaired);
        let before = known.map(|known| (known.registration, known.standing));
        match (right, before) {
            (Some(now), Some((then, true))) if now == then => return,
            (Some(registration), _) => {
                self.held.remove(key);
                self.confirmed.insert(
                    Arc::clone(key),
                    Confirmed {
                        registration,
                        standing: true,
                        drifted: false,
                        repaired,
                    },
                );
                self.count_registered(registration, 1);
            }
            (None, None) => return,
            (None, Some((_, standing))) => {
                let wanted = matches!(
                    need,
                    Need::Put(_) | Need::LeaseKey(..) | Need::Right(_) | Need::Wait(_)
                );
                if !wanted {
                    self.confirmed.remove(key);
                } else if let Some(known) = self.confirmed.get_mut(key) {
                    known.standing = false;
                    // What Kubernetes changed is no drift, and is not slowed down.
                    known.drifted = received.is_none() && (standing || known.drifted);
                }
            }
        }
        if let Some((registration, true)) = before {
            self.count_registered(registration, -1);
        }
    }

    fn note_problems(&mut self, key: &Key, need: &Need) {
        let mut found: Vec<(RegistrationId, Problem)> = Vec::new();
        if self.index.is_contested(key)
            && let Some((winner, losers)) = self.index.winner(key)
        {
            let by = self
                .index
                .registration(winner.registration)
                .map(|r| r.full_name.to_string());
            for loser in losers {
                let problem = if loser.registration == winner.registration {
                    Problem::OtherPod
                } else {
                    Problem::OtherRegistration(by.clone().unwrap_or_default())
                };
                found.push((loser.registration, problem));
            }
        }
        if let Need::Foreign(claim) = need
            && self.checked.get(key).copied() == Some(self.mirror.mod_revision(key))
        {
            found.push((
                claim.registration,
                Problem::Foreign(self.foreign_owner(key)),
            ));
        }
        // A refusal of etcd stays until the key is right or not wanted.
        if matches!(need, Need::Put(_) | Need::Delete | Need::LeaseKey(..))
            && self.held.contains_key(key)
        {
            let refusals = self.problems.get(key).into_iter().flatten();
            found.extend(
                refusals
                    .filter(|(_, p)| matches!(p, Problem::Refused(..)))
                    .cloned(),
            );
        }
        self.set_problems(key, found);
    }

    /// What stands there is not ours, as far as the mirror knows: etcd is asked before that is declared.
    fn look_at_foreign(&mut self, key: &Key) {
        let Some(record) = self.mirror.get(key) else {
            return;
        };
        let known = self.checked.get(key).copied() == Some(record.mod_revision);
        if !known && self.leads() {
            self.check_foreign(key);
        }
    }

    /// A key needs nothing: a change of Kubernetes that was under way shows in the mirror, or is over.
    fn note_propagation(&mut self, key: &Key, need: &Need) {
        let Some((received, removal)) = self.pending.get(key).copied() else {
            return;
        };
        let record = self.mirror.get(key);
        // Its event is what counts, and comes after the answer or before.
        if !record.map_or(!self.mirror.is_ahead(key), |record| record.read) {
            return;
        }
        let done = match need {
            Need::Right(_) => !removal,
            Need::Nothing => removal && record.is_none(),
            _ => false,
        };
        self.pending.remove(key);
        if done && self.leads() {
            let took = self.now.monotonic.saturating_sub(received);
            self.effects.push(Effect::Propagated(took, removal));
        }
    }

    /// Looks at whatever is wanted or stands for an address, except at keys that were looked at anyway.
    pub(super) fn look_at_socket(&mut self, socket: Socket, except: impl Fn(&Key) -> bool) {
        let standing = self.mirror.keys_at(&socket).iter();
        let mut keys: SmallVec<[Key; 2]> = standing.filter(|key| !except(key)).cloned().collect();
        let targets = Protocol::ALL.map(|protocol| Target {
            ip: socket.0,
            port: socket.1,
            protocol,
        });
        for target in &targets {
            let wanted = self.index.keys_for(target);
            keys.extend(wanted.filter(|key| !except(key)).cloned());
        }
        keys.sort_unstable();
        keys.dedup();
        for key in keys {
            self.look(&key, None);
        }
    }

    /// A range was read anew: looks at every key of it that is wanted, and at what was under way there, which may show
    /// without an event.
    pub(super) fn look_at_range(&mut self, range: &Range) {
        let mut ids: Vec<RegistrationId> = self
            .by_scope
            .iter()
            .filter(|(scope, _)| range.contains(scope.as_bytes()))
            .flat_map(|(_, ids)| ids)
            .copied()
            .collect();
        ids.sort_unstable();
        let mut keys: Vec<Key> = ids
            .iter()
            .flat_map(|id| self.index.keys_of(*id))
            .cloned()
            .collect();
        let wanted: HashSet<&Key> = keys.iter().collect();
        let mut pending: Vec<Key> = self
            .pending
            .keys()
            .filter(|key| range.contains(key) && !wanted.contains(key))
            .cloned()
            .collect();
        pending.sort_unstable();
        keys.append(&mut pending);
        for key in keys {
            self.look(&key, None);
        }
    }

    /// Looks at everything: at the start of a term, and when a frozen leader is live again.
    pub(super) fn look_at_all(&mut self) {
        let mut keys: Vec<Key> = self.index.wanted_keys().cloned().collect();
        for range in &self.followed {
            if *range.start == *self.keys.prefix.as_bytes() {
                continue;
            }
            keys.extend(
                self.mirror
                    .in_range(range)
                    .filter(|(_, record)| record.ours)
                    .map(|(key, _)| Arc::clone(key)),
            );
        }
        keys.sort_unstable();
        keys.dedup();
        for key in keys {
            self.look(&key, None);
        }
    }

    /// Looks at what the leases of a registration hold: its standing decides about stale records.
    pub(super) fn look_at_leases_of(&mut self, full_name: &str) {
        let scopes: Vec<(i64, Range)> = self
            .mirror
            .leases()
            .iter()
            .filter(|(_, lease)| lease.records > 0)
            .filter_map(|(id, lease)| Some((id, lease.name.clone()?)))
            .filter(|(_, name)| *name.registration == *full_name)
            .map(|(id, name)| (id, Range::prefix(name.scope.as_bytes())))
            .collect();
        let leases: HashSet<i64> = scopes.iter().map(|(id, _)| *id).collect();
        let ranges: std::collections::BTreeSet<Range> =
            scopes.into_iter().map(|(_, range)| range).collect();
        let mut keys: Vec<Key> = Vec::new();
        for range in &ranges {
            keys.extend(
                self.mirror
                    .in_range(range)
                    .filter(|(_, record)| record.ours && leases.contains(&record.lease))
                    .map(|(key, _)| Arc::clone(key)),
            );
        }
        for key in keys {
            self.look(&key, None);
        }
    }

    /// Registrations that are not accepted: the policy decides anew about what they keep.
    pub(super) fn look_at_kept(&mut self) {
        let kept: Vec<Arc<str>> = self
            .index
            .registrations()
            .filter(|(_, stored)| matches!(stored.standing, Standing::Kept { .. }))
            .map(|(_, stored)| Arc::clone(&stored.full_name))
            .collect();
        for name in kept {
            self.look_at_leases_of(&name);
        }
    }

    /// A pod that had left the registry is wanted again.
    pub(super) fn turned_wanted(&mut self, uid: Uid) {
        let now = self.now.monotonic;
        let Some(turns) = self.turns.get_mut(&uid) else {
            return;
        };
        if turns.last == now && !turns.times.is_empty() {
            // Another registration of the same pod.
            return;
        }
        turns.last = now;
        while turns
            .times
            .front()
            .is_some_and(|time| now.saturating_sub(*time) > TURNS_MICROS)
        {
            turns.times.pop_front();
        }
        turns.times.push_back(now);
        if turns.times.len() > TURNS {
            turns.times.pop_front();
        }
        if turns.times.len() == TURNS {
            turns.hold_until = now + REST_MICROS;
        }
    }

    /// A pod is wanted no longer: from now on its returns are counted.
    pub(super) fn turned_unwanted(&mut self, uid: Uid) {
        let now = self.now.monotonic;
        self.turns.entry(uid).or_default().last = now;
    }

    /// Forgets what lies far enough back.
    pub(super) fn sweep_needs(&mut self) {
        let now = self.now.monotonic;
        self.turns.retain(|_, turns| {
            let newest = turns.times.back().copied().unwrap_or(0).max(turns.last);
            now.saturating_sub(newest) <= TURNS_MICROS
        });
        self.pace.sweep(now);
        self.guard.sweep(now);
        self.held
            .retain(|_, held| now.saturating_sub(held.until) <= 2 * HELD_MOST_MICROS);
        let mirror = &self.mirror;
        self.checked
            .retain(|key, revision| mirror.mod_revision(key) == *revision);
    }
}
