//! Keys and values --> endpoints --> changes; pure.
//!
//! Takes snapshots and events of a range, gives the endpoints that stand there and what changed. Must never do IO or
//! read a clock, and never take an error for an empty list: only a snapshot or an event removes an endpoint.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use super::endpoint::{Endpoint, Id};
use super::source::Source;
use crate::format::ReadError;
use crate::model::etcd::{Event, Key, KeyValue, Revision};

/// What became of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is new.
    Added(Arc<Endpoint>),
    /// Its address is the same, and something else that its record tells is not.
    Changed {
        /// As it was.
        before: Arc<Endpoint>,
        /// As it is now.
        after: Arc<Endpoint>,
    },
    /// It is gone; as it was last.
    Removed(Arc<Endpoint>),
}

impl Change {
    /// The endpoint as it is now, or was last.
    #[must_use]
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        match self {
            Self::Added(endpoint)
            | Self::Changed {
                after: endpoint, ..
            }
            | Self::Removed(endpoint) => endpoint,
        }
    }
}

/// A record as it was read last.
#[derive(Debug)]
struct Held {
    revision: Revision,
    endpoints: Vec<Arc<Endpoint>>,
    /// Why it can't be read.
    problem: Option<String>,
}

/// A record that can't be read, and was none, or could be, until now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Skipped {
    /// Its key, for a person.
    pub(super) key: String,
    /// Why it can't be read.
    pub(super) why: String,
}

/// The endpoints of one source.
#[derive(Debug)]
pub(super) struct Set {
    source: Source,
    records: HashMap<Key, Held>,
    /// Whether a snapshot was read; events before it say nothing.
    read: bool,
    changes: Vec<Change>,
    skipped: Vec<Skipped>,
}

impl Set {
    pub(super) fn new(source: Source) -> Self {
        Self {
            source,
            records: HashMap::new(),
            read: false,
            changes: Vec::new(),
            skipped: Vec::new(),
        }
    }

    /// Whether a snapshot was read.
    pub(super) fn is_read(&self) -> bool {
        self.read
    }

    /// What changed since it was asked last.
    pub(super) fn changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// What was found since it was asked last that can't be read.
    pub(super) fn skipped(&mut self) -> Vec<Skipped> {
        std::mem::take(&mut self.skipped)
    }

    /// How many records can't be read.
    pub(super) fn unreadable(&self) -> usize {
        self.records
            .values()
            .filter(|held| held.problem.is_some())
            .count()
    }

    /// All endpoints, sorted by namespace, service, cluster, address and key.
    pub(super) fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        let mut all: Vec<Arc<Endpoint>> = self
            .records
            .values()
            .flat_map(|held| held.endpoints.iter().cloned())
            .collect();
        all.sort_unstable_by(|a, b| order(a).cmp(&order(b)));
        all
    }

    /// All that stands in the range.
    pub(super) fn snapshot(&mut self, records: &[KeyValue]) {
        self.read = true;
        let mut gone: HashSet<Key> = self.records.keys().cloned().collect();
        for record in records {
            gone.remove(&record.key);
            self.put(record);
        }
        for key in gone {
            self.delete(&key);
        }
    }

    /// What the watch of the range delivered.
    pub(super) fn events(&mut self, events: &[Event]) {
        if !self.read {
            return;
        }
        for event in events {
            match event {
                Event::Put(record) => self.put(record),
                Event::Delete(key, _) => self.delete(key),
            }
        }
    }

    /// Whether the keys that stand in the range at a revision are those that are known.
    pub(super) fn agrees(&self, revision: Revision, keys: &[(Key, Revision)]) -> bool {
        let known = self
            .records
            .values()
            .filter(|held| held.revision <= revision)
            .count();
        keys.len() == known
            && keys.iter().all(|(key, revision)| {
                self.records
                    .get(key)
                    .is_some_and(|held| held.revision == *revision)
            })
    }

    fn put(&mut self, record: &KeyValue) {
        let (endpoints, problem) = self.endpoints_of(record);
        let held = Held {
            revision: record.mod_revision,
            endpoints,
            problem,
        };
        let before = self.records.remove(&record.key);
        self.compare(
            before.as_ref().map_or(&[], |held| &held.endpoints),
            &held.endpoints,
        );
        if let Some(why) = &held.problem
            && before.and_then(|held| held.problem).as_ref() != Some(why)
        {
            self.skipped.push(Skipped {
                key: String::from_utf8_lossy(&record.key).into_owned(),
                why: why.clone(),
            });
        }
        self.records.insert(Arc::clone(&record.key), held);
    }

    fn delete(&mut self, key: &Key) {
        if let Some(held) = self.records.remove(key) {
            self.compare(&held.endpoints, &[]);
        }
    }

    /// The endpoints of a record that are looked for, or why it can't be read.
    fn endpoints_of(&self, record: &KeyValue) -> (Vec<Arc<Endpoint>>, Option<String>) {
        let source = &self.source;
        let told = source
            .format
            .read_all(&source.prefix, &record.key, &record.value);
        match told {
            Ok(told) => {
                let key: Arc<str> = String::from_utf8_lossy(&record.key).into();
                let mut endpoints: Vec<Arc<Endpoint>> = Vec::with_capacity(told.len());
                for told in told {
                    let endpoint = Endpoint::new(&key, told);
                    // A record may name one URL twice.
                    if source.wants(&endpoint)
                        && endpoints.iter().all(|other| other.id() != endpoint.id())
                    {
                        endpoints.push(Arc::new(endpoint));
                    }
                }
                (endpoints, None)
            }
            Err(ReadError::Beside) => (Vec::new(), None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        }
    }

    fn compare(&mut self, before: &[Arc<Endpoint>], after: &[Arc<Endpoint>]) {
        let find = |list: &[Arc<Endpoint>], id: &Id| list.iter().find(|e| e.id() == id).cloned();
        for endpoint in after {
            let after = Arc::clone(endpoint);
            match find(before, endpoint.id()) {
                None => self.changes.push(Change::Added(after)),
                Some(before) if *before != *after => {
                    self.changes.push(Change::Changed { before, after });
                }
                Some(_) => {}
            }
        }
        for endpoint in before {
            if find(after, endpoint.id()).is_none() {
                self.changes.push(Change::Removed(Arc::clone(endpoint)));
            }
        }
    }
}

/// What endpoints are sorted by.
type Order<'a> = (
    Option<&'a str>,
    &'a str,
    Option<&'a str>,
    Option<SocketAddr>,
    &'a Id,
);

fn order(endpoint: &Endpoint) -> Order<'_> {
    (
        endpoint.namespace(),
        endpoint.service(),
        endpoint.cluster(),
        endpoint.socket(),
        endpoint.id(),
    )
}

/// An endpoint as a reader knows it, and as it is.
#[derive(Debug)]
struct Touched {
    known: Option<Arc<Endpoint>>,
    now: Option<Arc<Endpoint>>,
}

/// What a reader of changes has not been told yet, joined: however slow it is, it waits with at most one change for each
/// endpoint that it knows or that there is.
#[derive(Debug, Default)]
pub(super) struct Pending {
    touched: BTreeMap<Id, Touched>,
}

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.touched.is_empty()
    }

    /// Something changed.
    pub(super) fn note(&mut self, change: &Change) {
        let (before, after) = match change {
            Change::Added(endpoint) => (None, Some(endpoint)),
            Change::Changed { before, after } => (Some(before), Some(after)),
            Change::Removed(endpoint) => (Some(endpoint), None),
        };
        let id = change.endpoint().id();
        let known = match self.touched.remove(id) {
            Some(touched) => touched.known,
            None => before.cloned(),
        };
        if known.as_ref() != after {
            let now = after.cloned();
            self.touched.insert(id.clone(), Touched { known, now });
        }
    }

    /// All of it, in an order that suits who balances over the list and who keeps it by address: what is new comes before what
    /// is gone, so that the list is not empty in between, unless both have one address.
    pub(super) fn take(&mut self) -> Vec<Change> {
        let touched = std::mem::take(&mut self.touched);
        let new: HashSet<String> = touched
            .values()
            .filter(|touched| touched.known.is_none())
            .filter_map(|touched| touched.now.as_ref())
            .map(|endpoint| endpoint.address().to_owned())
            .collect();
        let mut ranked: Vec<(u8, Change)> = touched
            .into_values()
            .filter_map(|touched| {
                Some(match (touched.known, touched.now) {
                    (Some(before), None) if new.contains(before.address()) => {
                        (0, Change::Removed(before))
                    }
                    (None, Some(after)) => (1, Change::Added(after)),
                    (Some(before), Some(after)) => (2, Change::Changed { before, after }),
                    (Some(before), None) => (3, Change::Removed(before)),
                    (None, None) => return None,
                })
            })
            .collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.into_iter().map(|(_, change)| change).collect()
    }
}

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;
