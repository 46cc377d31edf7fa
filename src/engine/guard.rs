//! Whether much of a registration goes at once although its pods are still there.
//!
//! Takes pods that want nothing any more and are neither deleted nor finished, gives whether too many of their
//! registration went of late, and remembers which of their records are held. A failing network of kubelets or a
//! broken probe looks like that; a deleted pod never does. Must never read a clock, and must forget a hold as soon
//! as its pod or somebody's wish ends it.

use std::collections::BTreeSet;

use smallvec::SmallVec;

use crate::accept::policy::MassRemovals;
use crate::index::pods::Uid;
use crate::index::registrations::RegistrationId;
use crate::index::{Touched, Unready};
use crate::model::endpoint::Target;
use crate::model::maps::HashMap;
use crate::plan::{Need, is_in_the_way, named_pod, need};

use super::Engine;
use super::io::Now;
use crate::model::etcd::Key;

/// What goes within this time goes at once. What breaks for all pods at the same moment is seen over some seconds:
/// a probe looks every 10 s by default, kubelets renew the leases of their nodes every 10 s, and the node controller
/// looks at these every 5 s.
pub(super) const WINDOW_MICROS: u64 = 15 * SECOND;
const SECOND: u64 = 1_000_000;

/// A pod that went of late, or whose records are held.
#[derive(Debug)]
struct Lost {
    /// When it went.
    went: u64,
    /// The same, in seconds since 1970.
    went_unix: i64,
    /// What is held of it.
    held: SmallVec<[Key; 1]>,
    targets: SmallVec<[Target; 1]>,
}

/// What a registration lost.
#[derive(Debug, Default)]
struct Losses {
    pods: HashMap<Uid, Lost>,
    /// Those of them that went within the window, the first of them first.
    recent: BTreeSet<(u64, Uid)>,
    /// It was told that many went, and since then the window was never empty.
    told: bool,
}

/// Many pods of a registration went at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mass {
    /// How many.
    pub(super) pods: usize,
    /// Of how many.
    pub(super) of: usize,
    /// It is told for the first time.
    pub(super) new: bool,
}

/// A record that is held, and until when.
#[derive(Clone, Copy, Debug)]
pub(super) struct HeldRecord<'a> {
    pub(super) registration: RegistrationId,
    pub(super) uid: Uid,
    /// When its pod went, in microseconds.
    pub(super) went: u64,
    /// What the records of the pod stand for.
    pub(super) targets: &'a [Target],
}

/// All losses of late. At most one entry for each pod that is there and not wanted.
#[derive(Debug, Default)]
pub(super) struct Guard {
    registrations: HashMap<RegistrationId, Losses>,
    held: HashMap<Key, (RegistrationId, Uid)>,
}

impl Guard {
    /// A pod went. `wanted`: how many of the registration are wanted still, those included that go in the same step
    /// and were not told of yet.
    pub(super) fn went(
        &mut self,
        unready: &Unready,
        wanted: usize,
        rule: MassRemovals,
        now: Now,
    ) -> Option<Mass> {
        self.forget(unready.registration, unready.uid);
        let losses = self.registrations.entry(unready.registration).or_default();
        losses.forget_old(now.monotonic);
        let lost = Lost {
            went: now.monotonic,
            went_unix: now.unix,
            held: SmallVec::new(),
            targets: unready.targets.clone(),
        };
        losses.pods.insert(unready.uid, lost);
        losses.recent.insert((now.monotonic, unready.uid));
        let pods = losses.recent.len();
        let of = wanted + losses.pods.len();
        let many = pods >= rule.least_pods as usize && pods * 100 > usize::from(rule.percent) * of;
        many.then(|| Mass {
            pods,
            of,
            new: !std::mem::replace(&mut losses.told, true),
        })
    }

    /// Holds a record of a pod that went.
    pub(super) fn hold(&mut self, registration: RegistrationId, uid: Uid, key: &Key) {
        // Two pods of a registration may want one key.
        self.forget_key(key);
        let losses = self.registrations.get_mut(&registration);
        if let Some(lost) = losses.and_then(|losses| losses.pods.get_mut(&uid)) {
            lost.held.push(Key::clone(key));
            self.held.insert(Key::clone(key), (registration, uid));
        }
    }

    /// A pod is wanted again, or left: it is no loss. Gives the records that were held.
    pub(super) fn forget(&mut self, registration: RegistrationId, uid: Uid) -> SmallVec<[Key; 1]> {
        let Some(losses) = self.registrations.get_mut(&registration) else {
            return SmallVec::new();
        };
        let Some(lost) = losses.pods.remove(&uid) else {
            return SmallVec::new();
        };
        losses.recent.remove(&(lost.went, uid));
        for key in &lost.held {
            self.held.remove(key);
        }
        lost.held
    }

    /// A record is held no longer: it is gone, or wanted.
    pub(super) fn forget_key(&mut self, key: &Key) {
        if let Some((registration, uid)) = self.held.remove(key) {
            let losses = self.registrations.get_mut(&registration);
            if let Some(lost) = losses.and_then(|losses| losses.pods.get_mut(&uid)) {
                lost.held.retain(|held| held != key);
            }
        }
    }

    /// A registration is gone or has another spec. Gives the records that were held for it.
    pub(super) fn forget_registration(&mut self, registration: RegistrationId) -> Vec<Key> {
        let losses = self.registrations.remove(&registration);
        let lost = losses.into_iter().flat_map(|losses| losses.pods);
        let mut keys: Vec<Key> = lost.flat_map(|(_, lost)| lost.held).collect();
        for key in &keys {
            self.held.remove(key);
        }
        keys.sort_unstable();
        keys
    }

    /// Forgets what went too long ago and is not held.
    pub(super) fn sweep(&mut self, now: u64) {
        self.registrations.retain(|_, losses| {
            losses.forget_old(now);
            !losses.pods.is_empty()
        });
    }

    /// Whether nothing is held at all.
    pub(super) fn holds_nothing(&self) -> bool {
        self.held.is_empty()
    }

    /// The number of records that are held.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// All keys that are held, in order.
    pub(super) fn keys(&self) -> Vec<Key> {
        let mut keys: Vec<Key> = self.held.keys().cloned().collect();
        keys.sort_unstable();
        keys
    }

    /// A pod that went of late, or of which something is held.
    pub(super) fn of_pod(&self, registration: RegistrationId, uid: Uid) -> Option<HeldRecord<'_>> {
        let lost = self.registrations.get(&registration)?.pods.get(&uid)?;
        Some(HeldRecord {
            registration,
            uid,
            went: lost.went,
            targets: &lost.targets,
        })
    }

    /// The record that is held at a key.
    pub(super) fn at(&self, key: &Key) -> Option<HeldRecord<'_>> {
        let (registration, uid) = *self.held.get(key)?;
        self.of_pod(registration, uid)
    }

    /// What of a registration is held, each with when its pod went, in seconds since 1970.
    pub(super) fn of(&self, registration: RegistrationId) -> impl Iterator<Item = (&Key, i64)> {
        let losses = self.registrations.get(&registration);
        let lost = losses.into_iter().flat_map(|losses| losses.pods.values());
        lost.flat_map(|lost| lost.held.iter().map(|key| (key, lost.went_unix)))
    }
}

impl Losses {
    fn forget_old(&mut self, now: u64) {
        while let Some((went, uid)) = self.recent.first().copied() {
            if now.saturating_sub(went) < WINDOW_MICROS {
                break;
            }
            self.recent.pop_first();
            if self.pods.get(&uid).is_some_and(|lost| lost.held.is_empty()) {
                self.pods.remove(&uid);
            }
        }
        self.told &= !self.recent.is_empty();
    }
}

impl Engine {
    /// Notes which pods went, came back or left, before their keys are looked at. Gives the records that are held no
    /// longer.
    pub(super) fn note_losses(&mut self, touched: &Touched) -> Vec<Key> {
        let mut free: Vec<Key> = Vec::new();
        for (id, _) in &touched.removed {
            free.extend(self.guard.forget_registration(*id));
        }
        for (id, uid, wanted) in &touched.turned {
            if *wanted {
                free.extend(self.guard.forget(*id, *uid));
            }
        }
        for (id, uid) in &touched.unwanted {
            let gone = self
                .guard
                .of_pod(*id, *uid)
                .is_some_and(|lost| !self.index.may_still_have(*id, *uid, lost.targets));
            if gone {
                free.extend(self.guard.forget(*id, *uid));
            }
        }
        // Those of a list go all at once.
        let mut not_told: HashMap<RegistrationId, usize> = HashMap::default();
        for unready in &touched.unready {
            *not_told.entry(unready.registration).or_default() += 1;
        }
        for unready in &touched.unready {
            let rest = not_told.entry(unready.registration).or_default();
            *rest = rest.saturating_sub(1);
            let rest = *rest;
            self.note_loss(unready, rest);
        }
        free
    }

    fn note_loss(&mut self, unready: &Unready, not_told: usize) {
        let Some(stored) = self.index.registration(unready.registration) else {
            return;
        };
        let mut rule = self.index.policy().mass_removals(&stored.namespace);
        if stored.serving().is_some_and(|a| a.format.is_aggregate()) {
            // Its record is one: it can't stand for some of the pods as they were.
            rule.hold_seconds = 0;
        }
        let wanted = stored.pods_wanted as usize + not_told;
        let Some(mass) = self.guard.went(unready, wanted, rule, self.now) else {
            return;
        };
        if rule.hold_seconds > 0 {
            let until = self.now.monotonic + hold_micros(rule);
            for key in &unready.keys {
                if self.stands_for(key, unready.registration, unready.uid) {
                    self.guard.hold(unready.registration, unready.uid, key);
                    self.at(until, Key::clone(key));
                }
            }
        }
        // Every replica sees it; one tells.
        if mass.new && self.leads() {
            self.numbers.mass_removals += 1;
            self.tell_mass_removal(unready.registration, mass, rule);
        }
    }

    /// Whether the record at a key is one of a registration, and of no other pod: that of the one that had the address
    /// before may stand there still.
    fn stands_for(&self, key: &Key, id: RegistrationId, uid: Uid) -> bool {
        if named_pod(&self.index, &self.mirror, key).is_some_and(|named| named != uid) {
            return false;
        }
        let lease = self.mirror.get(key).filter(|r| r.ours).map(|r| r.lease);
        let lease = lease.and_then(|lease| self.mirror.leases().get(lease));
        let name = lease.and_then(|lease| lease.name.as_ref());
        name.zip(self.index.registration(id))
            .is_some_and(|(name, stored)| name.registration == stored.full_name)
    }

    /// What a key needs; a removal that is held is not needed now.
    pub(super) fn need_now(&mut self, key: &Key) -> Need {
        let need = need(&self.index, &self.mirror, key);
        if self.guard.holds_nothing() {
            return need;
        }
        match need {
            Need::Delete if self.is_held(key) => {
                let lease = self.mirror.get(key).map_or(0, |record| record.lease);
                let slot = self.mirror.leases().get(lease);
                // Without its key nobody would keep the lease alive.
                return match slot.and_then(|slot| slot.name.clone().filter(|_| !slot.key_stands)) {
                    Some(name) => Need::LeaseKey(lease, name),
                    None => Need::Keep,
                };
            }
            Need::Delete => {
                let held = self.guard.at(key).map(|held| (held.registration, held.uid));
                if let Some((id, uid)) = held {
                    // What else was held of the pod goes with it.
                    let now = self.now.monotonic;
                    for other in self.guard.forget(id, uid) {
                        self.at(now, other);
                    }
                    self.report_due(id);
                }
            }
            // It is gone, or somebody wants it.
            _ => {
                let held = self.guard.at(key).map(|held| held.registration);
                self.guard.forget_key(key);
                if let Some(id) = held {
                    self.report_due(id);
                }
            }
        }
        need
    }

    /// Whether a record that nobody wants stays for a while: its pod is there and selected, has its address to itself,
    /// and went with too many others.
    fn is_held(&self, key: &Key) -> bool {
        let Some(held) = self.guard.at(key) else {
            return false;
        };
        let id = held.registration;
        let Some(stored) = self.index.registration(id) else {
            return false;
        };
        let rule = self.index.policy().mass_removals(&stored.namespace);
        held.went + hold_micros(rule) > self.now.monotonic
            && stored.serving().is_some()
            && self.index.winner(key).is_none()
            && self.index.may_still_have(id, held.uid, held.targets)
            && self.stands_for(key, id, held.uid)
            && !is_in_the_way(&self.index, &self.mirror, key, held.uid)
    }

    /// The policy may hold for another time now.
    pub(super) fn look_at_held(&mut self) {
        for key in self.guard.keys() {
            let until = self.guard.at(&key).and_then(|held| {
                let stored = self.index.registration(held.registration)?;
                let rule = self.index.policy().mass_removals(&stored.namespace);
                Some(held.went + hold_micros(rule))
            });
            if let Some(until) = until {
                self.at(until, Key::clone(&key));
            }
            self.look(&key, None);
        }
    }

    /// The keys of a registration that are held and were read, and when the last hold ends, in seconds since 1970.
    pub(super) fn held_of(&self, id: RegistrationId) -> Option<(u32, i64)> {
        let stored = self.index.registration(id)?;
        let rule = self.index.policy().mass_removals(&stored.namespace);
        let read = |key: &Key| self.mirror.get(key).is_some_and(|record| record.read);
        let went: Vec<i64> = self
            .guard
            .of(id)
            .filter(|(key, _)| read(key))
            .map(|(_, went)| went)
            .collect();
        let last = went.iter().max()?;
        let keys = u32::try_from(went.len()).unwrap_or(u32::MAX);
        Some((keys, last + i64::from(rule.hold_seconds)))
    }
}

fn hold_micros(rule: MassRemovals) -> u64 {
    u64::from(rule.hold_seconds) * SECOND
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::pods::Pods;

    const RULE: MassRemovals = MassRemovals {
        percent: 50,
        least_pods: 3,
        hold_seconds: 60,
    };

    fn at(monotonic: u64) -> Now {
        Now {
            monotonic,
            unix: 1_000 + i64::try_from(monotonic / SECOND).unwrap(),
        }
    }

    fn pod(number: u32) -> Unready {
        Unready {
            registration: 1,
            uid: Pods::default().uid(&format!("00000000-0000-4000-8000-{number:012}")),
            keys: SmallVec::from_elem(key(number), 1),
            targets: SmallVec::new(),
        }
    }

    fn key(number: u32) -> Key {
        number.to_be_bytes().as_slice().into()
    }

    #[test]
    fn more_than_the_share_and_at_least_so_many_within_the_window() {
        let mut guard = Guard::default();
        // Of ten, five are half and no more.
        for number in 0..5 {
            let wanted = 9 - number as usize;
            let time = at(u64::from(number) * SECOND);
            assert_eq!(
                guard.went(&pod(number), wanted, RULE, time),
                None,
                "{number}"
            );
        }
        let mass = |new| {
            Some(Mass {
                pods: 6,
                of: 10,
                new,
            })
        };
        assert_eq!(guard.went(&pod(5), 4, RULE, at(5 * SECOND)), mass(true));
        // It is told once, and a pod counts once however often it goes.
        assert_eq!(guard.went(&pod(5), 4, RULE, at(6 * SECOND)), mass(false));

        // Of two all go: too few to speak of.
        let mut guard = Guard::default();
        assert_eq!(guard.went(&pod(0), 1, RULE, at(0)), None);
        assert_eq!(guard.went(&pod(1), 0, RULE, at(0)), None);
    }

    #[test]
    fn what_went_slowly_or_came_back_or_left_does_not_count() {
        let mut guard = Guard::default();
        for number in 0..6 {
            let time = at(u64::from(number) * (WINDOW_MICROS / 2));
            let wanted = 9 - number as usize;
            assert_eq!(
                guard.went(&pod(number), wanted, RULE, time),
                None,
                "{number}"
            );
        }
        guard.sweep(100 * SECOND);
        assert!(guard.registrations.is_empty());

        for number in 0..20 {
            assert_eq!(guard.went(&pod(number), 5, RULE, at(0)), None, "{number}");
            guard.forget(1, pod(number).uid);
        }
        assert!(
            guard
                .registrations
                .values()
                .all(|losses| losses.pods.is_empty() && losses.recent.is_empty())
        );
    }

    #[test]
    fn a_new_window_is_told_again() {
        let mut guard = Guard::default();
        let mut told = 0;
        for round in 0..2 {
            for number in 0..4 {
                let mass = guard.went(
                    &pod(number),
                    3 - number as usize,
                    RULE,
                    at(round * WINDOW_MICROS),
                );
                told += usize::from(mass.is_some_and(|mass| mass.new));
            }
        }
        assert_eq!(told, 2);
    }

    #[test]
    fn a_hold_outlives_the_window_and_ends_with_its_pod_or_registration() {
        let mut guard = Guard::default();
        for number in 0..4 {
            guard.went(&pod(number), 3 - number as usize, RULE, at(2 * SECOND));
            guard.hold(1, pod(number).uid, &key(number));
        }
        guard.sweep(2 * WINDOW_MICROS);
        assert_eq!(guard.len(), 4);
        assert!(guard.of(1).all(|(_, went)| went == 1_002));
        assert_eq!(guard.at(&key(2)).map(|held| held.went), Some(2 * SECOND));

        assert_eq!(guard.forget(1, pod(2).uid).as_slice(), [key(2)]);
        assert!(guard.at(&key(2)).is_none() && guard.of_pod(1, pod(2).uid).is_none());
        guard.forget_key(&key(1));
        assert_eq!(guard.of(1).count(), 2);
        assert_eq!(guard.forget_registration(1), [key(0), key(3)]);
        assert!(guard.holds_nothing() && guard.of(1).next().is_none());
        guard.sweep(3 * WINDOW_MICROS);
        assert!(guard.registrations.is_empty());
    }
}
