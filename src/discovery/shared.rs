//! What the driver of a connection and the handles of a list share.
//!
//! Takes what the driver hears of the list's range, gives snapshots, changes and the state to any number of
//! readers. Must never keep its lock while something is waited for, and never more for a slow reader than its list.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::set::{Change, Pending, Set};
use super::source::Source;
use super::{Snapshot, State};
use crate::model::etcd::{Event, Key, KeyValue, Range, Revision};

/// One list.
#[derive(Debug)]
pub(super) struct Shared {
    source: Source,
    range: Range,
    list: Mutex<List>,
    state: watch::Sender<State>,
}

#[derive(Debug)]
struct List {
    set: Set,
    /// Made when it is asked for, and kept until something changes.
    snapshot: Option<Snapshot>,
    /// When etcd confirmed the list last.
    confirmed: Option<Instant>,
    readers: BTreeMap<u64, Reader>,
    numbers: u64,
    /// There is no driver any more.
    ended: bool,
}

#[derive(Debug, Default)]
struct Reader {
    pending: Pending,
    waker: Option<Waker>,
}

impl Shared {
    pub(super) fn new(source: Source) -> Self {
        Self {
            range: source.range(),
            list: Mutex::new(List {
                set: Set::new(source.clone()),
                snapshot: None,
                confirmed: None,
                readers: BTreeMap::new(),
                numbers: 0,
                ended: false,
            }),
            source,
            state: watch::Sender::new(State::Waiting(None)),
        }
    }

    /// A panic elsewhere leaves a list that is whole: it is changed by calls that do not panic.
    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // === for the handles ===

    pub(super) fn source(&self) -> &Source {
        &self.source
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        let mut list = self.list();
        if let Some(snapshot) = &list.snapshot {
            return Arc::clone(snapshot);
        }
        let snapshot: Snapshot = list.set.endpoints().into();
        list.snapshot = Some(Arc::clone(&snapshot));
        snapshot
    }

    pub(super) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    pub(super) async fn wait_for_state(&self, wanted: impl FnMut(&State) -> bool) -> State {
        let mut state = self.state.subscribe();
        match state.wait_for(wanted).await {
            Ok(state) => state.clone(),
            // Not while `self` has the sender.
            Err(_) => std::future::pending().await,
        }
    }

    pub(super) fn age(&self) -> Option<Duration> {
        Some(self.list().confirmed?.elapsed())
    }

    pub(super) fn unreadable(&self) -> usize {
        self.list().set.unreadable()
    }

    pub(super) fn add_reader(&self) -> u64 {
        let mut list = self.list();
        list.numbers += 1;
        let number = list.numbers;
        let mut reader = Reader::default();
        for endpoint in list.set.endpoints() {
            reader.pending.note(&Change::Added(endpoint));
        }
        list.readers.insert(number, reader);
        number
    }

    pub(super) fn drop_reader(&self, number: u64) {
        self.list().readers.remove(&number);
    }

    /// What there is for a reader: never nothing. `None`: there will be nothing more.
    pub(super) fn poll_reader(
        &self,
        number: u64,
        context: &mut Context<'_>,
    ) -> Poll<Option<Vec<Change>>> {
        let mut list = self.list();
        let ended = list.ended;
        match list.readers.get_mut(&number) {
            Some(reader) if !reader.pending.is_empty() => Poll::Ready(Some(reader.pending.take())),
            Some(reader) if !ended => {
                reader.waker = Some(context.waker().clone());
                Poll::Pending
            }
            _ => Poll::Ready(None),
        }
    }

    // === for the driver ===

    pub(super) fn range(&self) -> &Range {
        &self.range
    }

    /// All that stands in the range.
    pub(super) fn read(&self, records: &[KeyValue]) {
        self.change(|set| set.snapshot(records));
        self.set_state(State::Live);
    }

    /// What the watch delivered.
    pub(super) fn events(&self, events: &[Event]) {
        self.change(|set| set.events(events));
    }

    /// etcd answered, and nothing else stands there.
    pub(super) fn confirm(&self) {
        if *self.state.borrow() == State::Live {
            self.list().confirmed = Some(Instant::now());
        }
    }

    /// Whether these are the keys that are known; also before the first snapshot, which is to come.
    pub(super) fn agrees(&self, revision: Revision, keys: &[(Key, Revision)]) -> bool {
        let list = self.list();
        !list.set.is_read() || list.set.agrees(revision, keys)
    }

    /// The list can't be read now. What is known stays.
    pub(super) fn away(&self, why: &str) {
        let state = if self.list().set.is_read() {
            State::Stale(why.to_owned())
        } else {
            State::Waiting(Some(why.to_owned()))
        };
        self.set_state(state);
    }

    /// There is no driver any more.
    pub(super) fn end(&self) {
        self.away("the runtime that the connection belonged to has ended");
        let mut list = self.list();
        list.ended = true;
        let wakers = wakers(&mut list);
        drop(list);
        wakers.into_iter().for_each(Waker::wake);
    }

    fn set_state(&self, state: State) {
        self.state.send_if_modified(|known| {
            let differs = *known != state;
            *known = state;
            differs
        });
    }

    fn change(&self, change: impl FnOnce(&mut Set)) {
        let mut list = self.list();
        change(&mut list.set);
        if list.set.is_read() {
            list.confirmed = Some(Instant::now());
        }
        let changes = list.set.changes();
        let skipped = list.set.skipped();
        let mut woken = Vec::new();
        if !changes.is_empty() {
            list.snapshot = None;
            for reader in list.readers.values_mut() {
                for change in &changes {
                    reader.pending.note(change);
                }
            }
            woken = wakers(&mut list);
        }
        drop(list);
        for skipped in skipped {
            tracing::warn!(
                key = skipped.key,
                "a record of the registry can't be read as {} and is left out: {}",
                self.source.format.name(),
                skipped.why
            );
        }
        woken.into_iter().for_each(Waker::wake);
    }
}

/// Who waits for what there is now.
fn wakers(list: &mut List) -> Vec<Waker> {
    list.readers
        .values_mut()
        .filter_map(|reader| reader.waker.take())
        .collect()
}
