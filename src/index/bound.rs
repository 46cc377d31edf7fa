//! Who is within a bound: the first of those that want a place, in an order that does not change.
//!
//! Takes places that come and go, gives those whose standing is another now. What is within is a function
//! of the set of places alone, so that a process that starts anew comes to the same. Must never know what
//! stands in etcd.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::pods::{PodId, Uid};
use super::registrations::RegistrationId;

/// Something that takes up room; the least comes first.
pub(super) trait Place: Ord + Clone {
    /// How much room.
    fn size(&self) -> u64;
}

/// The endpoints of a pod in a registration. What comes later never takes the place of what is there: an
/// endpoint is as old as the younger of its pod and its registration.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PodPlace {
    pub(super) since: i64,
    pub(super) registration_created: i64,
    pub(super) full_name: Arc<str>,
    pub(super) pod_created: i64,
    pub(super) uid: Uid,
    pub(super) endpoints: u32,
    pub(super) registration: RegistrationId,
    pub(super) pod: PodId,
}

impl Place for PodPlace {
    fn size(&self) -> u64 {
        self.endpoints.into()
    }
}

/// A registration in its namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RegistrationPlace {
    pub(super) created: i64,
    pub(super) name: Arc<str>,
    pub(super) registration: RegistrationId,
}

impl Place for RegistrationPlace {
    fn size(&self) -> u64 {
        1
    }
}

/// A bound and who wants to be within it. As long as all are, they are only counted.
#[derive(Debug)]
pub(super) struct Bound<P> {
    limit: u64,
    /// The room that those within take.
    used: u64,
    split: Option<Split<P>>,
}

#[derive(Debug)]
struct Split<P> {
    within: BTreeSet<P>,
    beyond: BTreeSet<P>,
}

impl<P> Default for Bound<P> {
    /// For the moment in which a bound is taken out of its place.
    fn default() -> Self {
        Self::new(0)
    }
}

impl<P> Bound<P> {
    /// A bound that nobody is in.
    pub(super) fn new(limit: u32) -> Self {
        Self {
            limit: limit.into(),
            used: 0,
            split: None,
        }
    }
}

impl<P: Place> Bound<P> {
    /// Whether a place that was added is within.
    pub(super) fn admits(&self, place: &P) -> bool {
        self.split
            .as_ref()
            .is_none_or(|split| split.within.contains(place))
    }

    /// Whether all that were added are within.
    pub(super) fn admits_all(&self) -> bool {
        self.split.is_none()
    }

    /// Adds places, and gives those, old and new ones, that are beyond now and were not before. `others`
    /// are all that were added before.
    pub(super) fn add(&mut self, new: Vec<P>, others: impl FnOnce() -> Vec<P>) -> Vec<P> {
        let more: u64 = new.iter().map(Place::size).sum();
        if self.split.is_none() && self.used + more > self.limit {
            self.split = Some(Split {
                within: others().into_iter().collect(),
                beyond: BTreeSet::new(),
            });
        }
        let Some(split) = &mut self.split else {
            self.used += more;
            return Vec::new();
        };
        let mut out = BTreeSet::new();
        for place in new {
            if split.beyond.first().is_some_and(|first| *first < place) {
                split.beyond.insert(place.clone());
                out.insert(place);
                continue;
            }
            self.used += place.size();
            split.within.insert(place);
            while self.used > self.limit
                && let Some(last) = split.within.pop_last()
            {
                self.used -= last.size();
                out.insert(last.clone());
                split.beyond.insert(last);
            }
        }
        out.into_iter().collect()
    }

    /// Removes a place, and gives those that are within now and were not before.
    pub(super) fn remove(&mut self, place: &P) -> Vec<P> {
        let mut within = Vec::new();
        match &mut self.split {
            None => self.used = self.used.saturating_sub(place.size()),
            Some(split) => {
                if split.within.remove(place) {
                    self.used -= place.size();
                } else {
                    split.beyond.remove(place);
                }
                while let Some(first) = split.beyond.pop_first() {
                    if self.used + first.size() > self.limit {
                        split.beyond.insert(first);
                        break;
                    }
                    self.used += first.size();
                    split.within.insert(first.clone());
                    within.push(first);
                }
                // Kept for a while: to make it anew at every change around the limit would cost too much.
                if split.beyond.is_empty() && self.used <= self.limit / 2 {
                    self.split = None;
                }
            }
        }
        within
    }

    /// Another limit. Who is within changes without being told; `all` are all that were added.
    pub(super) fn set_limit(&mut self, limit: u32, all: impl FnOnce() -> Vec<P>) {
        if u64::from(limit) != self.limit {
            *self = Self::new(limit);
            self.add(all(), Vec::new);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
    struct Numbered(u8, u64);

    impl Place for Numbered {
        fn size(&self) -> u64 {
            self.1
        }
    }

    /// From scratch: the longest beginning that has room.
    fn expected(places: &BTreeSet<Numbered>, limit: u64) -> BTreeSet<Numbered> {
        let mut used = 0;
        places
            .iter()
            .take_while(|place| {
                used += place.1;
                used <= limit
            })
            .cloned()
            .collect()
    }

    proptest! {
        #[test]
        fn whatever_comes_and_goes_the_first_are_within(
            limit in 0u32..20,
            steps in prop::collection::vec((0u8..12, prop::option::of(0u64..6)), 0..60),
        ) {
            let mut bound = Bound::new(limit);
            let mut all: BTreeSet<Numbered> = BTreeSet::new();
            let mut within: BTreeSet<Numbered> = BTreeSet::new();
            for (number, size) in steps {
                let known = all.iter().find(|place| place.0 == number).cloned();
                match (size, known) {
                    (Some(size), None) => {
                        let place = Numbered(number, size);
                        let others = all.iter().cloned().collect();
                        within.insert(place.clone());
                        for out in bound.add(vec![place.clone()], || others) {
                            prop_assert!(within.remove(&out), "{out:?} was beyond before");
                        }
                        all.insert(place);
                    }
                    (None, Some(place)) => {
                        all.remove(&place);
                        within.remove(&place);
                        for back in bound.remove(&place) {
                            prop_assert!(within.insert(back.clone()), "{back:?} was within before");
                        }
                    }
                    _ => {}
                }
                prop_assert_eq!(&within, &expected(&all, limit.into()));
                for place in &all {
                    prop_assert_eq!(bound.admits(place), within.contains(place));
                }
            }
            let mut at_once = Bound::new(limit);
            let out = at_once.add(all.iter().cloned().collect(), Vec::new);
            let within_at_once: BTreeSet<Numbered> =
                all.iter().filter(|place| !out.contains(place)).cloned().collect();
            prop_assert_eq!(within_at_once, within);
        }
    }

    #[test]
    fn another_limit_counts_at_once() {
        let all: Vec<Numbered> = (0..5).map(|number| Numbered(number, 1)).collect();
        let mut bound = Bound::new(9);
        assert!(bound.add(all.clone(), Vec::new).is_empty());
        bound.set_limit(2, || all.clone());
        let within: Vec<bool> = all.iter().map(|place| bound.admits(place)).collect();
        assert_eq!(within, [true, true, false, false, false]);
        bound.set_limit(5, || all.clone());
        assert!(all.iter().all(|place| bound.admits(place)));
    }
}
