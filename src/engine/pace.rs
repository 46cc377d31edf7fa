//! How fast the records of a namespace may be put.
//!
//! Takes the puts that are about to be sent, gives those that have to wait and until when. One tenant who
//! changes a registration, labels or readiness all the time must not keep etcd busy for the others. Must
//! never hold up a removal, and never read a clock.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::model::etcd::Key;
use crate::model::maps::HashMap;

/// All of a namespace's endpoints can be put so often at once: a registration that is moved puts each once,
/// and a wiped etcd may come right after.
const AT_ONCE: u64 = 2;
/// The fewest puts at once, so that a small limit slows down nobody who replaces his pods.
const LEAST_AT_ONCE: u64 = 1_000;
/// After that, all of them can be put once in so many seconds.
const ROUND_SECONDS: u64 = 60;
/// The fewest puts a second, for the same reason as [`LEAST_AT_ONCE`]; etcd takes ten thousands.
const LEAST_PER_SECOND: u64 = 100;
const SECOND: u64 = 1_000_000;
/// A record of all pods is put so often in any second (design, section 8).
const AGGREGATE_PUTS: usize = 10;
/// What takes no endpoint away leaves half of them to what does, so that who is gone is gone at once.
const AGGREGATE_PAUSE: u64 = 2 * SECOND / AGGREGATE_PUTS as u64;

/// The puts of all namespaces.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// When each namespace would have put all that it was let put, at its rate alone (microseconds).
    namespaces: HashMap<Arc<str>, u64>,
    /// Keys that wait for their turn, and whose they are.
    waiting: HashMap<Key, (u64, Arc<str>)>,
    /// How many of them each namespace has.
    counts: HashMap<Arc<str>, usize>,
    /// Records of all pods that were put within the last second.
    aggregates: HashMap<Key, Puts>,
}

/// The last puts of a record of all pods.
#[derive(Debug, Default)]
struct Puts {
    /// When they were sent, the newest last; at most [`AGGREGATE_PUTS`].
    times: VecDeque<u64>,
    /// When it is looked at again.
    waits: u64,
}

impl Pace {
    /// When a record may be put: now, or at the time that is given. `endpoints` is the limit of the namespace.
    pub(super) fn turn(
        &mut self,
        key: &Key,
        namespace: &Arc<str>,
        endpoints: u32,
        now: u64,
    ) -> u64 {
        if let Some((turn, _)) = self.waiting.get(key) {
            let turn = *turn;
            if turn <= now {
                self.forget(key);
            }
            return turn;
        }
        let endpoints = u64::from(endpoints);
        let per_second = (endpoints / ROUND_SECONDS).max(LEAST_PER_SECOND);
        let at_once = (endpoints * AT_ONCE).max(LEAST_AT_ONCE);
        let each = SECOND / per_second;
        let spent = match self.namespaces.get_mut(namespace) {
            Some(spent) => spent,
            None => self.namespaces.entry(Arc::clone(namespace)).or_default(),
        };
        *spent = (*spent).max(now) + each;
        let turn = spent.saturating_sub(at_once * each);
        if turn <= now {
            return now;
        }
        let waits = (turn, Arc::clone(namespace));
        self.waiting.insert(Arc::clone(key), waits);
        *self.counts.entry(Arc::clone(namespace)).or_default() += 1;
        turn
    }

    /// When a record of all pods may be put: now, or at the time that is given.
    pub(super) fn aggregate_turn(&self, key: &Key, takes_away: bool, now: u64) -> u64 {
        let Some(puts) = self.aggregates.get(key) else {
            return now;
        };
        let full = puts.times.len() == AGGREGATE_PUTS;
        let oldest = puts.times.front().filter(|_| full);
        let newest = puts.times.back().filter(|_| !takes_away);
        let turn = oldest.map_or(0, |at| at + SECOND);
        now.max(turn)
            .max(newest.map_or(0, |at| at + AGGREGATE_PAUSE))
    }

    /// It waits until then. Whether it did not until as early a time.
    pub(super) fn aggregate_waits(&mut self, key: &Key, turn: u64, now: u64) -> bool {
        let puts = self.aggregates.entry(Key::clone(key)).or_default();
        let sooner = puts.waits <= now || turn < puts.waits;
        if sooner {
            puts.waits = turn;
        }
        sooner
    }

    /// A record of all pods is put.
    pub(super) fn aggregate_written(&mut self, key: &Key, now: u64) {
        let puts = self.aggregates.entry(Key::clone(key)).or_default();
        if puts.times.len() == AGGREGATE_PUTS {
            puts.times.pop_front();
        }
        puts.times.push_back(now);
        puts.waits = 0;
    }

    /// How many records of a namespace wait for their turn.
    pub(super) fn waiting(&self, namespace: &str) -> usize {
        self.counts.get(namespace).copied().unwrap_or(0)
    }

    /// How many records wait for their turn.
    pub(super) fn all_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// A key does not wait any more.
    pub(super) fn forget(&mut self, key: &Key) {
        if let Some((_, namespace)) = self.waiting.remove(key)
            && let Some(count) = self.counts.get_mut(&namespace)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&namespace);
            }
        }
    }

    /// Forgets namespaces that have not put more than their rate, and turns that nobody took.
    pub(super) fn sweep(&mut self, now: u64) {
        self.namespaces.retain(|_, spent| *spent > now);
        self.aggregates.retain(|_, puts| {
            puts.times.back().is_some_and(|at| at + SECOND > now) || puts.waits > now
        });
        let late: Vec<Key> = self
            .waiting
            .iter()
            .filter(|(_, (turn, _))| turn + SECOND < now)
            .map(|(key, _)| Arc::clone(key))
            .collect();
        for key in late {
            self.forget(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u64) -> Key {
        number.to_be_bytes().as_slice().into()
    }

    /// Lets a namespace put as much as it may until a time.
    fn put_until(pace: &mut Pace, name: &Arc<str>, endpoints: u32, from: u64, to: u64) -> u64 {
        let (mut now, mut put) = (from, 0);
        while now < to {
            let turn = pace.turn(&key(put), name, endpoints, now);
            if turn <= now {
                put += 1;
            } else {
                now = turn;
            }
        }
        put
    }

    #[test]
    fn all_endpoints_twice_at_once_and_then_once_a_minute() {
        let shop: Arc<str> = "shop".into();
        let mut pace = Pace::default();
        assert_eq!(put_until(&mut pace, &shop, 60_000, 0, 1), 120_000);
        let put = put_until(&mut pace, &shop, 60_000, 1, 60 * SECOND);
        assert!((59_990..=60_000).contains(&put), "{put}");
        // Others are not concerned, and small limits leave room.
        let other: Arc<str> = "other".into();
        let put = put_until(&mut pace, &other, 10, 0, SECOND);
        assert!((1_095..=1_100).contains(&put), "{put}");
        // What was not used comes back, but no more than all of it.
        pace.sweep(1_000 * SECOND);
        let day = 86_400 * SECOND;
        assert_eq!(put_until(&mut pace, &shop, 60_000, day, day + 1), 120_000);
    }

    #[test]
    fn a_record_of_all_pods_is_put_ten_times_a_second_and_what_takes_away_comes_first() {
        let mut pace = Pace::default();
        let key = key(1);
        assert_eq!(pace.aggregate_turn(&key, false, 5), 5);
        pace.aggregate_written(&key, 5);
        assert_eq!(pace.aggregate_turn(&key, false, 6), 5 + AGGREGATE_PAUSE);
        for at in 6..15 {
            assert_eq!(pace.aggregate_turn(&key, true, at), at);
            pace.aggregate_written(&key, at);
        }
        for takes_away in [true, false] {
            assert_eq!(pace.aggregate_turn(&key, takes_away, 15), 5 + SECOND);
        }
        let late = 5 + SECOND;
        pace.aggregate_written(&key, late);
        assert_eq!(pace.aggregate_turn(&key, true, late), 6 + SECOND);
        // It is looked at again once, unless it may go sooner.
        assert!(pace.aggregate_waits(&key, late + 20, late));
        assert!(!pace.aggregate_waits(&key, late + 20, late + 1));
        assert!(pace.aggregate_waits(&key, late + 10, late + 2));
        assert!(pace.aggregate_waits(&key, late + 30, late + 10));
        pace.sweep(late + SECOND - 1);
        assert_eq!(pace.aggregates.len(), 1);
        pace.sweep(late + SECOND);
        assert!(pace.aggregates.is_empty());
    }

    #[test]
    fn who_waits_keeps_the_turn_and_is_counted() {
        let shop: Arc<str> = "shop".into();
        let mut pace = Pace::default();
        let put = put_until(&mut pace, &shop, 1, 0, 1);
        // The one that found no room.
        assert_eq!((pace.waiting("shop"), pace.all_waiting()), (1, 1));
        let turn = pace.turn(&key(put), &shop, 1, 1);
        assert!(turn > 1);
        assert_eq!(pace.turn(&key(put), &shop, 1, 2), turn);
        assert!(pace.turn(&key(put + 1), &shop, 1, 2) > turn);
        assert_eq!(pace.waiting("shop"), 2);
        assert_eq!(pace.turn(&key(put), &shop, 1, turn), turn);
        assert_eq!(pace.waiting("shop"), 1);
        pace.sweep(turn + 3 * SECOND);
        assert_eq!((pace.waiting("shop"), pace.all_waiting()), (0, 0));
    }
}
