//! Which lease a new record is attached to.
//!
//! Takes the leases that were granted in this term, gives one with room or says that one has to be
//! granted. Must never give out a lease of another term, of another registration, or one for which a
//! revoke was sent.

use std::sync::Arc;

use crate::mirror::Mirror;
use crate::mirror::leases::SlotName;
use crate::model::etcd::{Key, LeaseId};
use crate::model::maps::HashMap;

/// The leases that are granted for one slot.
#[derive(Debug, Default)]
struct Usable {
    ids: Vec<LeaseId>,
    /// The place of the one that was given last: those before it were full.
    last: usize,
}

/// The leases of one term.
#[derive(Debug, Default)]
pub struct Slots {
    usable: HashMap<Arc<SlotName>, Usable>,
    /// Records that are in flight to a lease, or of unknown outcome.
    reserved: HashMap<LeaseId, u32>,
    /// Leases that are being granted: for what, and the most records that they take.
    granting: HashMap<LeaseId, Arc<SlotName>>,
    /// Keys that wait for a lease.
    waiting: HashMap<Arc<SlotName>, Vec<Key>>,
}

impl Slots {
    /// A lease of this term with room for one more record; so many are now reserved on it. (What goes together
    /// stays together: the last lease may get more than it has room for.)
    pub fn take(
        &mut self,
        mirror: &Mirror,
        name: &Arc<SlotName>,
        capacity: u32,
        records: u32,
    ) -> Option<LeaseId> {
        let usable = self.usable.get_mut(name)?;
        let places = (usable.last..usable.ids.len()).chain(0..usable.last.min(usable.ids.len()));
        let (place, id) = places
            .filter_map(|place| Some((place, *usable.ids.get(place)?)))
            .find(|(_, id)| {
                let standing = mirror.leases().get(*id).map_or(0, |lease| lease.records);
                standing + self.reserved.get(id).copied().unwrap_or(0) < capacity
            })?;
        usable.last = place;
        *self.reserved.entry(id).or_default() += records;
        Some(id)
    }

    /// This lease, if it is one of this term for the slot; so many records are now reserved on it.
    pub fn take_on(&mut self, id: LeaseId, name: &Arc<SlotName>, records: u32) -> Option<LeaseId> {
        self.usable.get(name)?.ids.iter().find(|own| **own == id)?;
        *self.reserved.entry(id).or_default() += records;
        Some(id)
    }

    /// A reserved place became a record, or did not.
    pub fn settle(&mut self, id: LeaseId) {
        if let Some(count) = self.reserved.get_mut(&id) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.reserved.remove(&id);
            }
        }
    }

    /// Whether anything is in flight to a lease or of unknown outcome.
    #[must_use]
    pub fn is_reserved(&self, id: LeaseId) -> bool {
        self.reserved.contains_key(&id)
    }

    /// A key waits until there is a lease. Says how many have to be granted beyond those under way.
    pub fn wait(&mut self, name: &Arc<SlotName>, key: Key, capacity: u32) -> usize {
        let waiting = self.waiting.entry(Arc::clone(name)).or_default();
        waiting.push(key);
        let capacity = capacity.max(1) as usize;
        if waiting.len() % capacity != 1 % capacity {
            // There is room on the last lease that was counted.
            return 0;
        }
        let wanted = waiting.len().div_ceil(capacity);
        let under_way = self
            .granting
            .values()
            .filter(|other| *other == name)
            .count();
        wanted.saturating_sub(under_way)
    }

    /// A lease is being granted.
    pub fn granting(&mut self, id: LeaseId, name: Arc<SlotName>) {
        self.granting.insert(id, name);
    }

    /// What a lease that is being granted is for.
    #[must_use]
    pub fn is_granting(&self, id: LeaseId) -> Option<&Arc<SlotName>> {
        self.granting.get(&id)
    }

    /// A lease was granted: it can be used. Gives as many of the keys that waited as it takes; the others have leases
    /// under way.
    pub fn granted(&mut self, id: LeaseId, capacity: u32) -> Vec<Key> {
        let Some(name) = self.granting.remove(&id) else {
            return Vec::new();
        };
        let usable = self.usable.entry(Arc::clone(&name)).or_default();
        usable.ids.push(id);
        let Some(waiting) = self.waiting.get_mut(&name) else {
            return Vec::new();
        };
        let room = waiting.len().min(capacity.max(1) as usize);
        let keys = waiting.drain(..room).collect();
        if waiting.is_empty() {
            self.waiting.remove(&name);
        }
        keys
    }

    /// A lease will not be granted. Gives the keys that waited.
    pub fn not_granted(&mut self, id: LeaseId) -> Vec<Key> {
        self.granting
            .remove(&id)
            .and_then(|name| self.waiting.remove(&name))
            .unwrap_or_default()
    }

    /// A lease is lost, or a revoke is being sent for it: nothing is put on it any more.
    pub fn drop_lease(&mut self, id: LeaseId) {
        self.usable.retain(|_, usable| {
            usable.ids.retain(|other| *other != id);
            !usable.ids.is_empty()
        });
    }

    /// Whether a lease is one of this term that may take records.
    #[must_use]
    pub fn is_usable(&self, id: LeaseId) -> bool {
        self.usable.values().any(|usable| usable.ids.contains(&id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot() -> Arc<SlotName> {
        Arc::new(SlotName {
            registration: "shop/web".into(),
            scope: "/services/shop/web/".into(),
            ttl: 60,
            format: "Json".into(),
            prefix: "/services/".into(),
            service: "web".into(),
        })
    }

    #[test]
    fn a_lease_is_asked_for_as_often_as_needed_and_wakes_no_more_keys_than_it_takes() {
        for capacity in [1, 4] {
            let (mut slots, slot) = (Slots::default(), slot());
            let mut next = 0;
            let mut waited = 0;
            let mut wait = |slots: &mut Slots, keys: u64| {
                for key in 0..keys {
                    let key: Key = key.to_be_bytes().as_slice().into();
                    for _ in 0..slots.wait(&slot, key, capacity) {
                        next += 1;
                        slots.granting(next, Arc::clone(&slot));
                    }
                }
                next
            };
            let granted = wait(&mut slots, 10);
            assert_eq!(granted, i64::from(10u32.div_ceil(capacity)));
            // As many again: there is room on the last one for some of them.
            let granted = wait(&mut slots, 10);
            assert_eq!(granted, i64::from(20u32.div_ceil(capacity)));
            for lease in 1..=granted {
                let woken = slots.granted(lease, capacity);
                assert!(woken.len() <= capacity as usize, "{}", woken.len());
                waited += woken.len();
                assert!(slots.is_usable(lease));
            }
            assert_eq!(waited, 20);
            // Each that waits anew is for a lease of its own, however many were there.
            assert_eq!(wait(&mut slots, 1), granted + 1);
            assert_eq!(slots.not_granted(granted + 1).len(), 1);
        }
    }
}
