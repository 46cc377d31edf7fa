//! Which lease is due for a keepalive, and when.
//!
//! Takes leases to keep and the answers to their keepalives, gives those that are due, the urgent
//! ones apart. Times are milliseconds of any clock that only moves forward. Pure: must never do IO
//! or read a clock.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use crate::model::etcd::LeaseId;

/// Leases with a shorter TTL (seconds) are urgent: the default election TTL is 5 s, and a burst
/// of 10,000 keepalives of records must not come before it. With a longer TTL a third of it is
/// far more than such a burst takes.
const URGENT_TTL: i64 = 15;

/// The TTL (seconds) to assume until an answer tells it: the shortest that a registration may ask for.
pub(super) const SHORTEST_TTL: i64 = 5;

/// A TTL that nobody has can't overflow the times; a day is the longest that may be asked for.
const LONGEST_TTL: i64 = 86_400 * 365;

/// A lease that was found while running may be old: its first keepalive comes within this
/// time (ms), spread, since many may be found at a time.
const FOUND_WITHIN: u64 = 1_000;

/// The queues of keepalives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Class {
    /// Short TTLs, the leader's own lease among them.
    Urgent,
    /// All others.
    Bulk,
}

/// What an answer told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// The lease lives on.
    Kept,
    /// The lease is gone, and it was one to be kept.
    Lost,
    /// The lease is not kept (any more).
    Nothing,
}

#[derive(Debug)]
struct Lease {
    /// In seconds.
    ttl: i64,
    due: u64,
    /// A keepalive is under way.
    sent: bool,
    /// The engine named it.
    named: bool,
    /// A key that names it was found.
    found: bool,
}

impl Lease {
    fn class(&self) -> Class {
        if self.ttl < URGENT_TTL {
            Class::Urgent
        } else {
            Class::Bulk
        }
    }

    fn kept(&self) -> bool {
        self.named || self.found
    }
}

/// All leases that are kept alive.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    leases: HashMap<LeaseId, Lease>,
    /// By time; an entry counts only while the lease is due at that very time.
    urgent: BinaryHeap<Reverse<(u64, LeaseId)>>,
    bulk: BinaryHeap<Reverse<(u64, LeaseId)>>,
    /// Leases of earlier processes without a first answer.
    fresh: HashSet<LeaseId>,
}

impl Schedule {
    /// The engine names a lease that it has just granted. A shorter TTL than the one known so far
    /// brings its turn forward.
    pub(super) fn keep(&mut self, id: LeaseId, ttl: i64, now: u64) {
        let due = now + period(id, ttl);
        let lease = self.entry(id, ttl, due);
        lease.named = true;
        if due < lease.due && !lease.sent {
            lease.ttl = clamp(ttl);
            self.set_due(id, due);
        }
    }

    /// A key that names the lease is there; `old`: it was there before it was watched, so the lease
    /// may be about to end.
    pub(super) fn found(&mut self, id: LeaseId, ttl: i64, old: bool, now: u64) {
        let due = if old {
            now
        } else {
            now + spread(id, FOUND_WITHIN.min(period(id, ttl)))
        };
        // One that this process named is known to live, whichever was heard first.
        if old && !self.leases.contains_key(&id) {
            self.fresh.insert(id);
        }
        self.entry(id, ttl, due).found = true;
    }

    /// No key names the lease any more. One that is kept all the same is looked at once: its key may
    /// have gone because the lease is gone.
    pub(super) fn unfound(&mut self, id: LeaseId, now: u64) {
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        lease.found = false;
        if lease.kept() && !lease.sent {
            self.set_due(id, now);
        }
        self.forget_unkept(id);
    }

    /// The engine names the lease no longer. One that a key names is kept on: records stand on it,
    /// whoever leads, and one that was revoked loses its key.
    pub(super) fn release(&mut self, id: LeaseId) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.named = false;
        }
        self.forget_unkept(id);
    }

    fn entry(&mut self, id: LeaseId, ttl: i64, due: u64) -> &mut Lease {
        if !self.leases.contains_key(&id) {
            let heap = if clamp(ttl) < URGENT_TTL {
                &mut self.urgent
            } else {
                &mut self.bulk
            };
            heap.push(Reverse((due, id)));
        }
        self.leases.entry(id).or_insert_with(|| Lease {
            ttl: clamp(ttl),
            due,
            sent: false,
            named: false,
            found: false,
        })
    }

    fn forget_unkept(&mut self, id: LeaseId) {
        if let Some(lease) = self.leases.get(&id)
            && !lease.kept()
        {
            self.fresh.remove(&id);
            self.leases.remove(&id);
        }
    }

    /// Takes the most overdue lease, to be sent now.
    pub(super) fn take(&mut self, class: Class, now: u64) -> Option<LeaseId> {
        let (due, id) = self.peek(class)?;
        if due > now {
            return None;
        }
        self.heap(class).pop();
        self.leases.get_mut(&id)?.sent = true;
        Some(id)
    }

    /// When the next keepalive is due.
    pub(super) fn next(&mut self, class: Class) -> Option<u64> {
        self.peek(class).map(|(due, _)| due)
    }

    fn heap(&mut self, class: Class) -> &mut BinaryHeap<Reverse<(u64, LeaseId)>> {
        match class {
            Class::Urgent => &mut self.urgent,
            Class::Bulk => &mut self.bulk,
        }
    }

    fn peek(&mut self, class: Class) -> Option<(u64, LeaseId)> {
        loop {
            let Reverse((due, id)) = *self.heap(class).peek()?;
            let valid = self.leases.get(&id).is_some_and(|lease| {
                lease.kept() && !lease.sent && lease.due == due && lease.class() == class
            });
            if valid {
                return Some((due, id));
            }
            self.heap(class).pop();
        }
    }

    fn set_due(&mut self, id: LeaseId, due: u64) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.sent = false;
            lease.due = due;
            let class = lease.class();
            self.heap(class).push(Reverse((due, id)));
        }
    }

    /// A keepalive was answered with this TTL (seconds); `None`: the lease lives, its TTL was not said.
    pub(super) fn answered(&mut self, id: LeaseId, ttl: Option<i64>, now: u64) -> Told {
        let Some(lease) = self.leases.get_mut(&id) else {
            return Told::Nothing;
        };
        let kept = lease.kept();
        self.fresh.remove(&id);
        if ttl.is_some_and(|ttl| ttl <= 0) {
            self.leases.remove(&id);
            return if kept { Told::Lost } else { Told::Nothing };
        }
        if let Some(ttl) = ttl {
            lease.ttl = clamp(ttl);
        }
        let due = now + period(id, lease.ttl);
        self.set_due(id, due);
        if kept { Told::Kept } else { Told::Nothing }
    }

    /// A keepalive that was sent will not be answered: it is due at once.
    pub(super) fn unanswered(&mut self, id: LeaseId, now: u64) {
        self.set_due(id, now);
    }

    /// A keepalive was refused for this lease's own sake: it is tried again in its turn, and is not waited for.
    pub(super) fn postpone(&mut self, id: LeaseId, now: u64) {
        self.fresh.remove(&id);
        if let Some(ttl) = self.leases.get(&id).map(|lease| lease.ttl) {
            self.set_due(id, now + period(id, ttl));
        }
    }

    /// Everything that is not under way is due now: time has passed without keepalives.
    pub(super) fn all_due(&mut self, now: u64) {
        let ids: Vec<_> = self
            .leases
            .iter()
            .filter(|(_, lease)| !lease.sent)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.set_due(id, now);
        }
    }

    /// How many leases of earlier processes have not had a first answer.
    pub(super) fn fresh(&self) -> usize {
        self.fresh.len()
    }

    /// The leases that are kept because a key names them.
    pub(super) fn all_found(&self) -> Vec<LeaseId> {
        self.leases
            .iter()
            .filter(|(_, lease)| lease.found)
            .map(|(id, _)| *id)
            .collect()
    }
}

fn clamp(ttl: i64) -> i64 {
    ttl.clamp(1, LONGEST_TTL)
}

/// The time (ms) from one keepalive to the next: three quarters to all of a third of the TTL
/// (seconds), so that leases that began together drift apart.
fn period(id: LeaseId, ttl: i64) -> u64 {
    let third = clamp(ttl).unsigned_abs() * 1_000 / 3;
    third - spread(id, third / 4)
}

/// A number below `within` (or 0) that depends on the lease alone.
fn spread(id: LeaseId, within: u64) -> u64 {
    // Fibonacci hashing; ids are random, but those that others chose need not be.
    let hash = id.cast_unsigned().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    hash.checked_rem(within).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_granted_lease_is_due_within_a_third_of_its_ttl() {
        let mut schedule = Schedule::default();
        schedule.keep(7, 60, 1_000);
        let due = schedule.next(Class::Bulk).unwrap();
        assert!((16_000..=21_000).contains(&due), "{due}");
        assert_eq!(schedule.take(Class::Bulk, due - 1), None);
        assert_eq!(schedule.take(Class::Bulk, due), Some(7));
        // It is under way.
        assert_eq!(schedule.next(Class::Bulk), None);
        assert_eq!(schedule.answered(7, Some(60), due), Told::Kept);
        let next = schedule.next(Class::Bulk).unwrap();
        assert!((due + 15_000..=due + 20_000).contains(&next));
    }

    #[test]
    fn leases_of_another_process_are_due_at_once_and_drift_apart() {
        let mut schedule = Schedule::default();
        for id in 1..=1_000 {
            schedule.found(id, 60, true, 5);
        }
        assert_eq!(schedule.fresh(), 1_000);
        let mut times = HashSet::new();
        while let Some(id) = schedule.take(Class::Bulk, 5) {
            schedule.answered(id, Some(60), 5);
            times.insert(schedule.leases[&id].due);
        }
        assert_eq!(schedule.fresh(), 0);
        assert!(times.len() > 500, "{}", times.len());
    }

    #[test]
    fn a_lease_of_this_process_is_not_waited_for() {
        let mut schedule = Schedule::default();
        // Granted before the keeper has read for the first time, which then finds its key, too.
        schedule.keep(1, 60, 0);
        schedule.found(1, 60, true, 1);
        schedule.found(2, 60, false, 1);
        assert_eq!(schedule.fresh(), 0);
        schedule.found(3, 60, true, 1);
        assert_eq!(schedule.fresh(), 1);
    }

    #[test]
    fn short_ttls_have_a_queue_of_their_own() {
        let mut schedule = Schedule::default();
        schedule.found(1, 60, true, 0);
        schedule.found(2, 5, true, 0);
        assert_eq!(schedule.take(Class::Urgent, 0), Some(2));
        assert_eq!(schedule.take(Class::Urgent, 0), None);
        assert_eq!(schedule.take(Class::Bulk, 0), Some(1));
        // The TTL turns out to be another one.
        schedule.answered(1, Some(10), 0);
        assert_eq!(schedule.next(Class::Bulk), None);
        assert!(schedule.next(Class::Urgent).is_some());
    }

    #[test]
    fn a_lease_is_kept_while_it_is_named_or_found() {
        let mut schedule = Schedule::default();
        schedule.found(1, 60, true, 0);
        schedule.keep(1, 60, 0);
        schedule.unfound(1, 0);
        assert_eq!(schedule.take(Class::Bulk, 0), Some(1));
        schedule.answered(1, Some(60), 0);
        schedule.release(1);
        assert_eq!(schedule.next(Class::Bulk), None);
        assert!(schedule.leases.is_empty());
        schedule.found(2, 60, true, 0);
        schedule.unfound(2, 0);
        assert_eq!(schedule.next(Class::Bulk), None);
        assert!(schedule.leases.is_empty());
        assert_eq!(schedule.fresh(), 0);
    }

    #[test]
    fn a_released_lease_is_kept_while_its_key_stands() {
        let mut schedule = Schedule::default();
        schedule.keep(1, 60, 0);
        schedule.found(1, 60, false, 0);
        // A term is over; the records of the lease are as good as before.
        schedule.release(1);
        assert_eq!(schedule.take(Class::Bulk, 20_000), Some(1));
        assert_eq!(schedule.answered(1, Some(60), 20_000), Told::Kept);
        schedule.unfound(1, 20_001);
        assert_eq!(schedule.next(Class::Bulk), None);
        assert!(schedule.leases.is_empty());
    }

    #[test]
    fn a_lost_lease_is_told_once() {
        let mut schedule = Schedule::default();
        schedule.found(1, 60, true, 0);
        assert_eq!(schedule.take(Class::Bulk, 0), Some(1));
        assert_eq!(schedule.answered(1, Some(0), 1), Told::Lost);
        assert_eq!(schedule.answered(1, Some(0), 1), Told::Nothing);
        assert_eq!(schedule.fresh(), 0);
    }

    #[test]
    fn a_named_lease_whose_key_goes_is_looked_at_at_once() {
        let mut schedule = Schedule::default();
        schedule.keep(1, 60, 0);
        schedule.found(1, 60, false, 0);
        schedule.unfound(1, 7);
        assert_eq!(schedule.take(Class::Bulk, 7), Some(1));
    }

    #[test]
    fn what_was_not_answered_is_due_again() {
        let mut schedule = Schedule::default();
        schedule.found(1, 60, true, 0);
        schedule.take(Class::Bulk, 0);
        schedule.unanswered(1, 9);
        assert_eq!(schedule.next(Class::Bulk), Some(9));
        schedule.take(Class::Bulk, 9);
        schedule.postpone(1, 10);
        assert!(schedule.next(Class::Bulk).unwrap() >= 15_010);
        schedule.all_due(11);
        assert_eq!(schedule.take(Class::Bulk, 11), Some(1));
    }

    #[test]
    fn odd_ttls_do_no_harm() {
        let mut schedule = Schedule::default();
        schedule.found(1, -3, true, 0);
        schedule.found(i64::MIN, i64::MAX, true, 0);
        assert_eq!(schedule.take(Class::Urgent, 0), Some(1));
        assert_eq!(schedule.take(Class::Bulk, 0), Some(i64::MIN));
    }
}
