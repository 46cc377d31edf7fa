//! The state of a watch stream: which range is how far.
//!
//! Takes what is to be followed and what etcd says, gives what is to be asked of etcd and handed
//! on, in order. Pure: must never do IO or read a clock.
//!
//! A range is watched from *now* first and read afterwards, at a revision that is not older; events
//! up to that revision are dropped. That gives what a watch from the snapshot's revision + 1 gives,
//! but nothing can be compacted in between, and etcd (since 3.5.10) answers progress requests: it
//! keeps silent while the start revision of any watch lies in the future.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use super::failure::is_of_login;
use crate::model::etcd::{
    Event, Failure, FailureKind, Key, KeyValue, News, Range, Refusal, Revision,
};

/// The id in responses that belong to no single watch.
const NO_WATCH: i64 = -1;

/// The first and the longest pause, in ms, before a range that can't be had is tried again: a
/// grant by an administrator should be seen soon, and a missing one cost nothing.
const RETRY_FIRST: u64 = 1_000;
const RETRY_LAST: u64 = 30_000;

/// What is to be done.
#[derive(Debug, PartialEq)]
pub(super) enum Action {
    /// Create a watch of the range from now on; responses come in the order of these.
    Create(Range),
    /// Cancel a watch.
    Cancel(i64),
    /// Read the range; [`Follower::read`] with the same token follows.
    Read(u64, Range),
    /// Read the keys and mod revisions of the range; [`Follower::keys_read`] follows.
    ReadKeys(u64, Range),
    /// Request progress.
    AskProgress,
    /// Hand on.
    Give(News),
    /// The stream is of no more use.
    Break(String),
}

/// A response of the stream.
#[derive(Debug, Default)]
pub(super) struct Response {
    pub(super) revision: Revision,
    pub(super) watch: i64,
    pub(super) created: bool,
    pub(super) canceled: bool,
    /// The watch was canceled because its next revision was compacted.
    pub(super) compacted: bool,
    pub(super) reason: String,
    /// More of the same follows.
    pub(super) fragment: bool,
    pub(super) events: Vec<Event>,
}

/// Why a range could not be read.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The user may not read it.
    Denied(String),
    /// Anything else.
    Failed(String),
}

/// What a read of a range gave.
pub(super) type Read<T> = Result<(Revision, Vec<T>), ReadError>;

#[derive(Debug)]
enum Stage {
    /// There is no stream.
    Away,
    /// The watch was asked for.
    Creating(u64),
    /// The watch stands, the snapshot is being read.
    Reading {
        token: u64,
        watch: i64,
        /// The snapshot must not be older.
        since: Revision,
        /// Events that came meanwhile.
        held: Vec<Event>,
    },
    /// The snapshot was handed on; events after it are handed on as they come.
    Watching { watch: i64, from: Revision },
    /// To be tried again at this time.
    Waiting(u64),
}

#[derive(Debug)]
struct Followed {
    stage: Stage,
    /// Failures in a row.
    failures: u32,
    /// The refusal that was handed on last.
    refused: Option<String>,
}

impl Followed {
    fn new() -> Self {
        Self {
            stage: Stage::Away,
            failures: 0,
            refused: None,
        }
    }

    fn watch(&self) -> Option<i64> {
        match self.stage {
            Stage::Reading { watch, .. } | Stage::Watching { watch, .. } => Some(watch),
            Stage::Away | Stage::Creating(_) | Stage::Waiting(_) => None,
        }
    }
}

/// A comparison of a range's keys that is under way.
#[derive(Debug)]
struct Audit {
    token: u64,
    range: Range,
    /// The keys that changed since it began, with the revision of their last change.
    changed: HashMap<Key, Revision>,
    /// What was read; handed on once the watch is known to have come as far.
    seen: Option<(Revision, Vec<(Key, Revision)>)>,
}

/// The ranges that are followed over one stream.
#[derive(Debug, Default)]
pub(super) struct Follower {
    ranges: BTreeMap<Range, Followed>,
    connected: bool,
    /// Creations that were not answered yet, oldest first; etcd answers in order.
    creating: VecDeque<(u64, Range)>,
    watches: HashMap<i64, Range>,
    /// Snapshots that are being read.
    reading: HashMap<u64, Range>,
    /// The first parts of responses that came in fragments.
    fragments: HashMap<i64, Vec<Event>>,
    tokens: u64,
    /// Somebody wants to know how far the watches are.
    asked: bool,
    audits: VecDeque<Range>,
    audit: Option<Audit>,
    actions: Vec<Action>,
}

impl Follower {
    /// What is to be done since it was asked last, in order.
    pub(super) fn actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether the stream owes an answer or has a watch that can answer a progress request.
    pub(super) fn expects(&self) -> bool {
        !self.creating.is_empty() || !self.watches.is_empty()
    }

    /// Whether progress was asked for or is awaited by an audit, and every range could report it.
    pub(super) fn wants_progress(&self) -> bool {
        let audit = self.audit.as_ref().is_some_and(|a| a.seen.is_some());
        (self.asked || audit) && self.settled() && !self.watches.is_empty()
    }

    /// When the next range that waits is to be tried again.
    pub(super) fn next_retry(&self) -> Option<u64> {
        self.ranges
            .values()
            .filter_map(|followed| match followed.stage {
                Stage::Waiting(until) if self.connected => Some(until),
                _ => None,
            })
            .min()
    }

    /// A stream stands: everything begins anew.
    pub(super) fn connected(&mut self) {
        self.connected = true;
        let ranges: Vec<_> = self.ranges.keys().cloned().collect();
        for range in ranges {
            self.create(&range);
        }
    }

    /// The stream is gone.
    pub(super) fn disconnected(&mut self) {
        self.connected = false;
        self.creating.clear();
        self.watches.clear();
        self.reading.clear();
        self.fragments.clear();
        self.audits.clear();
        self.audit = None;
        self.actions.clear();
        for followed in self.ranges.values_mut() {
            followed.stage = Stage::Away;
        }
    }

    /// Follows exactly these ranges.
    pub(super) fn follow(&mut self, ranges: Vec<Range>) {
        let wanted: HashSet<_> = ranges.into_iter().collect();
        let dropped: Vec<_> = self
            .ranges
            .keys()
            .filter(|range| !wanted.contains(range))
            .cloned()
            .collect();
        for range in dropped {
            if let Some(followed) = self.ranges.remove(&range)
                && let Some(watch) = followed.watch()
            {
                self.cancel(watch);
            }
            self.drop_audit(&range);
        }
        for range in wanted {
            if !self.ranges.contains_key(&range) {
                self.ranges.insert(range.clone(), Followed::new());
                if self.connected {
                    self.create(&range);
                }
            }
        }
        // What is waited for may have been held up by a range that is gone.
        if self.wants_progress() {
            self.actions.push(Action::AskProgress);
        }
    }

    /// [`News::Progress`] is wanted.
    pub(super) fn ask_progress(&mut self) {
        self.asked = true;
        if self.wants_progress() {
            self.actions.push(Action::AskProgress);
        }
    }

    /// Takes a new snapshot of a range; one that is under way or to come is as good.
    pub(super) fn reread(&mut self, range: &Range) {
        self.drop_audit(range);
        self.tokens += 1;
        let token = self.tokens;
        if let Some(followed) = self.ranges.get_mut(range)
            && let Stage::Watching { watch, from } = followed.stage
        {
            followed.stage = Stage::Reading {
                token,
                watch,
                since: from,
                held: Vec::new(),
            };
            self.reading.insert(token, range.clone());
            self.actions.push(Action::Read(token, range.clone()));
        }
    }

    /// Compares the keys of every range that is watched, one after the other.
    pub(super) fn audit(&mut self) {
        // One that has not come to its end is not overtaken by the next.
        if self.audits.is_empty() && self.audit.is_none() {
            self.audits = self
                .ranges
                .iter()
                .filter(|(_, followed)| matches!(followed.stage, Stage::Watching { .. }))
                .map(|(range, _)| range.clone())
                .collect();
            self.next_audit();
        }
    }

    fn next_audit(&mut self) {
        self.audit = None;
        while let Some(range) = self.audits.pop_front() {
            if matches!(
                self.ranges.get(&range).map(|followed| &followed.stage),
                Some(Stage::Watching { .. })
            ) {
                self.tokens += 1;
                self.actions
                    .push(Action::ReadKeys(self.tokens, range.clone()));
                self.audit = Some(Audit {
                    token: self.tokens,
                    range,
                    changed: HashMap::new(),
                    seen: None,
                });
                return;
            }
        }
    }

    fn drop_audit(&mut self, range: &Range) {
        if self.audit.as_ref().is_some_and(|a| a.range == *range) {
            self.next_audit();
        }
    }

    /// Tries ranges again whose time has come.
    pub(super) fn retry(&mut self, now: u64) {
        let due: Vec<_> = self
            .ranges
            .iter()
            .filter(|(_, followed)| matches!(followed.stage, Stage::Waiting(until) if until <= now))
            .map(|(range, _)| range.clone())
            .collect();
        for range in due {
            self.create(&range);
        }
    }

    /// The stream said something.
    pub(super) fn response(&mut self, response: Response, now: u64) {
        if response.created {
            self.created(&response, now);
        } else if response.canceled {
            self.canceled(&response, now);
        } else if response.events.is_empty() && !response.fragment {
            // The periodic ones for a single watch carry its id; they only show life.
            if response.watch == NO_WATCH {
                self.progress(response.revision);
            } else if let Some(events) = self.fragments.remove(&response.watch) {
                self.events(response.watch, events);
            }
        } else {
            let mut events = self.fragments.remove(&response.watch).unwrap_or_default();
            events.extend(response.events);
            if response.fragment {
                self.fragments.insert(response.watch, events);
            } else {
                self.events(response.watch, events);
            }
        }
    }

    fn create(&mut self, range: &Range) {
        if let Some(followed) = self.ranges.get_mut(range) {
            self.tokens += 1;
            followed.stage = Stage::Creating(self.tokens);
            self.creating.push_back((self.tokens, range.clone()));
            self.actions.push(Action::Create(range.clone()));
        }
    }

    fn cancel(&mut self, watch: i64) {
        self.watches.remove(&watch);
        self.fragments.remove(&watch);
        self.actions.push(Action::Cancel(watch));
    }

    fn created(&mut self, response: &Response, now: u64) {
        let Some((creation, range)) = self.creating.pop_front() else {
            return self.give_up("etcd created a watch that nobody had asked for".to_owned());
        };
        let current = self.ranges.get_mut(&range).filter(
            |followed| matches!(followed.stage, Stage::Creating(token) if token == creation),
        );
        match (current, response.canceled) {
            (Some(followed), false) => {
                self.tokens += 1;
                followed.stage = Stage::Reading {
                    token: self.tokens,
                    watch: response.watch,
                    since: response.revision,
                    held: Vec::new(),
                };
                self.watches.insert(response.watch, range.clone());
                self.reading.insert(self.tokens, range.clone());
                self.actions.push(Action::Read(self.tokens, range));
            }
            (Some(_), true) => self.refused(&range, &response.reason, now),
            // It was dropped meanwhile.
            (None, false) => self.actions.push(Action::Cancel(response.watch)),
            (None, true) => {}
        }
    }

    fn canceled(&mut self, response: &Response, now: u64) {
        // One that is not known was canceled by us.
        let Some(range) = self.watches.remove(&response.watch) else {
            return;
        };
        self.fragments.remove(&response.watch);
        self.drop_audit(&range);
        if response.compacted {
            self.create(&range);
        } else {
            self.refused(&range, &response.reason, now);
        }
    }

    fn refused(&mut self, range: &Range, reason: &str, now: u64) {
        // The token of a stream is that of its beginning: only a new stream has a new one.
        if is_of_login(reason) {
            return self.give_up(reason.to_owned());
        }
        let Some(followed) = self.ranges.get_mut(range) else {
            return;
        };
        let pause = RETRY_FIRST
            .saturating_mul(1 << followed.failures.min(16))
            .min(RETRY_LAST);
        followed.failures += 1;
        followed.stage = Stage::Waiting(now + pause);
        if followed.refused.as_deref() != Some(reason) {
            followed.refused = Some(reason.to_owned());
            let kind = if reason.contains("permission denied") {
                FailureKind::Refused(Refusal::Permission)
            } else {
                FailureKind::Unknown
            };
            let failure = Failure {
                kind,
                message: reason.to_owned(),
            };
            self.actions
                .push(Action::Give(News::Refused(range.clone(), failure)));
        }
        if self.wants_progress() {
            self.actions.push(Action::AskProgress);
        }
    }

    fn events(&mut self, watch: i64, mut events: Vec<Event>) {
        // One that was canceled by us may still have been on its way.
        let Some(range) = self.watches.get(&watch) else {
            return;
        };
        if let Some(audit) = self.audit.as_mut().filter(|audit| audit.range == *range) {
            for event in &events {
                audit.changed.insert(key(event).clone(), revision(event));
            }
        }
        match self
            .ranges
            .get_mut(range)
            .map(|followed| &mut followed.stage)
        {
            Some(Stage::Reading { held, .. }) => held.append(&mut events),
            Some(Stage::Watching { from, .. }) => {
                let from = *from;
                let range = range.clone();
                self.give_events(range, from, events);
            }
            _ => {}
        }
    }

    fn give_events(&mut self, range: Range, from: Revision, mut events: Vec<Event>) {
        events.retain(|event| revision(event) > from);
        // The header's revision may be ahead of what this watch has delivered.
        if let Some(last) = events.last().map(revision) {
            self.actions.push(Action::Give(News::Events {
                range,
                revision: last,
                events,
            }));
        }
    }

    /// The range was read.
    pub(super) fn read(&mut self, token: u64, read: Read<KeyValue>, now: u64) {
        let Some(range) = self.reading.remove(&token) else {
            return;
        };
        let Some(followed) = self.ranges.get_mut(&range) else {
            return;
        };
        // A later reading of the same range, or none, may be under way by now.
        let Stage::Reading {
            token: current,
            watch,
            since,
            held,
        } = &mut followed.stage
        else {
            return;
        };
        if *current != token {
            return;
        }
        match read {
            // Another member answered, or one that was restored.
            Ok((revision, _)) if revision < *since => {
                let reason =
                    format!("a read at revision {revision} is older than its watch at {since}");
                self.give_up(reason);
            }
            Ok((revision, records)) => {
                let held = std::mem::take(held);
                followed.stage = Stage::Watching {
                    watch: *watch,
                    from: revision,
                };
                followed.failures = 0;
                followed.refused = None;
                self.actions.push(Action::Give(News::Snapshot {
                    range: range.clone(),
                    revision,
                    records,
                }));
                self.give_events(range, revision, held);
                if self.wants_progress() {
                    self.actions.push(Action::AskProgress);
                }
            }
            Err(ReadError::Denied(reason)) => {
                let watch = *watch;
                self.cancel(watch);
                self.refused(&range, &reason, now);
            }
            Err(ReadError::Failed(reason)) => self.give_up(reason),
        }
    }

    /// The keys of the range were read.
    pub(super) fn keys_read(&mut self, token: u64, read: Read<(Key, Revision)>) {
        let Some(audit) = self.audit.as_mut().filter(|audit| audit.token == token) else {
            return;
        };
        match read {
            Ok(seen) => {
                audit.seen = Some(seen);
                if self.wants_progress() {
                    self.actions.push(Action::AskProgress);
                }
            }
            // The stream has its own ways to notice that something is wrong.
            Err(_) => self.next_audit(),
        }
    }

    /// All watches have delivered everything up to this revision.
    fn progress(&mut self, revision: Revision) {
        if !self.settled() {
            return;
        }
        self.asked = false;
        self.actions.push(Action::Give(News::Progress(revision)));
        let reached = |audit: &mut Audit| {
            audit
                .seen
                .as_ref()
                .is_some_and(|(seen, _)| *seen <= revision)
        };
        if let Some(audit) = self.audit.take_if(reached) {
            if let Some((revision, mut keys)) = audit.seen {
                keys.retain(|(key, _)| audit.changed.get(key).is_none_or(|last| *last <= revision));
                self.actions.push(Action::Give(News::KeysSeen {
                    range: audit.range,
                    revision,
                    keys,
                }));
            }
            self.next_audit();
        }
    }

    /// Whether every range is watched, or refused for now.
    fn settled(&self) -> bool {
        self.connected
            && self.ranges.values().all(|followed| match followed.stage {
                Stage::Watching { .. } => true,
                // Nothing is known of a range that was refused; that was told. While it
                // is tried again, a stage of its own holds progress back for a moment.
                Stage::Waiting(_) => followed.refused.is_some(),
                Stage::Away | Stage::Creating(_) | Stage::Reading { .. } => false,
            })
    }

    fn give_up(&mut self, reason: String) {
        self.actions.push(Action::Break(reason));
    }
}

fn key(event: &Event) -> &Key {
    match event {
        Event::Put(kv) => &kv.key,
        Event::Delete(key, _) => key,
    }
}

fn revision(event: &Event) -> Revision {
    match event {
        Event::Put(kv) => kv.mod_revision,
        Event::Delete(_, revision) => *revision,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(prefix: &str) -> Range {
        Range::prefix(prefix.as_bytes())
    }

    fn put(key: &str, revision: Revision) -> KeyValue {
        KeyValue {
            key: key.as_bytes().into(),
            value: Box::default(),
            lease: 1,
            create_revision: revision,
            mod_revision: revision,
        }
    }

    fn created(watch: i64, revision: Revision) -> Response {
        Response {
            revision,
            watch,
            created: true,
            ..Response::default()
        }
    }

    fn events(watch: i64, revisions: &[Revision], fragment: bool) -> Response {
        Response {
            revision: 1_000,
            watch,
            fragment,
            events: revisions
                .iter()
                .map(|r| Event::Put(put(&format!("a/{r}"), *r)))
                .collect(),
            ..Response::default()
        }
    }

    fn progress(revision: Revision) -> Response {
        Response {
            revision,
            watch: NO_WATCH,
            ..Response::default()
        }
    }

    /// A follower with `a/` watched by watch 0 from a snapshot at revision 10.
    fn watching() -> Follower {
        let mut follower = Follower::default();
        follower.follow(vec![range("a/")]);
        assert!(follower.actions().is_empty());
        follower.connected();
        assert_eq!(follower.actions(), [Action::Create(range("a/"))]);
        follower.response(created(0, 9), 0);
        let token = read_token(&mut follower);
        follower.read(token, Ok((10, vec![put("a/1", 3)])), 0);
        assert_eq!(
            follower.actions(),
            [Action::Give(News::Snapshot {
                range: range("a/"),
                revision: 10,
                records: vec![put("a/1", 3)],
            })]
        );
        follower
    }

    fn read_token(follower: &mut Follower) -> u64 {
        let actions = follower.actions();
        match actions.as_slice() {
            [Action::Read(token, _) | Action::ReadKeys(token, _)] => *token,
            other => panic!("{other:?}"),
        }
    }

    fn given(follower: &mut Follower) -> Vec<(Revision, usize)> {
        follower
            .actions()
            .into_iter()
            .map(|action| match action {
                Action::Give(News::Events {
                    revision, events, ..
                }) => (revision, events.len()),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn events_during_the_snapshot_follow_it() {
        let mut follower = Follower::default();
        follower.follow(vec![range("a/")]);
        follower.connected();
        follower.actions();
        follower.response(created(0, 5), 0);
        let token = read_token(&mut follower);
        follower.response(events(0, &[6, 7], false), 0);
        follower.response(events(0, &[8], false), 0);
        assert!(follower.actions().is_empty());
        follower.read(token, Ok((7, vec![])), 0);
        let actions = follower.actions();
        assert!(matches!(
            &actions[0],
            Action::Give(News::Snapshot { revision: 7, .. })
        ));
        assert_eq!(
            actions[1],
            Action::Give(News::Events {
                range: range("a/"),
                revision: 8,
                events: vec![Event::Put(put("a/8", 8))],
            })
        );
        assert_eq!(actions.len(), 2);
    }

    #[test]
    fn a_snapshot_older_than_its_watch_breaks_the_stream() {
        let mut follower = Follower::default();
        follower.follow(vec![range("a/")]);
        follower.connected();
        follower.actions();
        follower.response(created(0, 5), 0);
        let token = read_token(&mut follower);
        follower.read(token, Ok((4, vec![])), 0);
        assert!(matches!(follower.actions()[..], [Action::Break(_)]));
    }

    #[test]
    fn events_of_the_snapshot_are_not_given_twice() {
        let mut follower = watching();
        follower.response(events(0, &[9, 10], false), 0);
        assert!(follower.actions().is_empty());
        follower.response(events(0, &[10, 11], false), 0);
        assert_eq!(given(&mut follower), [(11, 1)]);
    }

    #[test]
    fn fragments_are_joined() {
        let mut follower = watching();
        follower.response(events(0, &[11, 11], true), 0);
        follower.response(events(0, &[11], true), 0);
        assert!(follower.actions().is_empty());
        follower.response(events(0, &[12], false), 0);
        assert_eq!(given(&mut follower), [(12, 4)]);
    }

    #[test]
    fn progress_waits_for_ranges_that_are_being_read() {
        let mut follower = watching();
        follower.ask_progress();
        assert_eq!(follower.actions(), [Action::AskProgress]);
        follower.follow(vec![range("a/"), range("b/")]);
        assert_eq!(follower.actions(), [Action::Create(range("b/"))]);
        follower.response(progress(12), 0);
        assert!(follower.actions().is_empty());
        follower.response(created(1, 12), 0);
        let token = read_token(&mut follower);
        follower.response(progress(12), 0);
        assert!(follower.actions().is_empty());
        follower.read(token, Ok((12, vec![])), 0);
        let actions = follower.actions();
        assert!(matches!(actions[0], Action::Give(News::Snapshot { .. })));
        assert_eq!(actions[1], Action::AskProgress);
        follower.response(progress(13), 0);
        assert_eq!(follower.actions(), [Action::Give(News::Progress(13))]);
        assert!(!follower.wants_progress());
    }

    #[test]
    fn a_dropped_range_is_canceled_and_silent() {
        let mut follower = watching();
        follower.follow(vec![range("b/")]);
        let actions = follower.actions();
        assert!(actions.contains(&Action::Cancel(0)));
        assert!(actions.contains(&Action::Create(range("b/"))));
        follower.response(events(0, &[11], false), 0);
        assert!(follower.actions().is_empty());
        // Dropped before it was created.
        follower.follow(vec![]);
        assert!(follower.actions().is_empty());
        follower.response(created(1, 10), 0);
        assert_eq!(follower.actions(), [Action::Cancel(1)]);
    }

    #[test]
    fn a_compacted_watch_is_read_anew_alone() {
        let mut follower = watching();
        follower.response(
            Response {
                watch: 0,
                canceled: true,
                compacted: true,
                ..Response::default()
            },
            0,
        );
        assert_eq!(follower.actions(), [Action::Create(range("a/"))]);
    }

    #[test]
    fn a_refused_range_is_told_once_and_tried_again() {
        let mut follower = watching();
        follower.follow(vec![range("a/"), range("b/")]);
        follower.ask_progress();
        follower.actions();
        let denied = || Response {
            watch: NO_WATCH,
            created: true,
            canceled: true,
            reason: "etcdserver: permission denied".to_owned(),
            ..Response::default()
        };
        follower.response(denied(), 100);
        let actions = follower.actions();
        assert!(matches!(
            &actions[0],
            Action::Give(News::Refused(
                _,
                Failure {
                    kind: FailureKind::Refused(Refusal::Permission),
                    ..
                }
            ))
        ));
        // It does not hold up the others.
        assert_eq!(actions[1], Action::AskProgress);
        assert_eq!(follower.next_retry(), Some(1_100));
        follower.retry(1_099);
        assert!(follower.actions().is_empty());
        follower.retry(1_100);
        assert_eq!(follower.actions(), [Action::Create(range("b/"))]);
        follower.response(denied(), 1_200);
        assert!(
            !follower
                .actions()
                .iter()
                .any(|a| matches!(a, Action::Give(_)))
        );
        assert_eq!(follower.next_retry(), Some(3_200));
    }

    #[test]
    fn an_expired_token_breaks_the_stream() {
        let mut follower = watching();
        follower.follow(vec![range("a/"), range("b/")]);
        follower.actions();
        follower.response(
            Response {
                watch: NO_WATCH,
                created: true,
                canceled: true,
                reason: "rpc error: etcdserver: invalid auth token".to_owned(),
                ..Response::default()
            },
            0,
        );
        assert!(matches!(follower.actions()[..], [Action::Break(_)]));
    }

    #[test]
    fn an_audit_leaves_out_what_changed_after_it() {
        let mut follower = watching();
        follower.audit();
        let token = read_token(&mut follower);
        follower.response(events(0, &[11, 14], false), 0);
        follower.actions();
        let keys = |r: &[Revision]| -> Vec<(Key, Revision)> {
            r.iter()
                .map(|r| (format!("a/{r}").into_bytes().into(), *r))
                .collect()
        };
        let mut seen = keys(&[1, 11]);
        // As it stood at revision 12, before it was put again at 14.
        seen.push((b"a/14".as_slice().into(), 2));
        follower.keys_read(token, Ok((12, seen)));
        assert_eq!(follower.actions(), [Action::AskProgress]);
        follower.response(progress(11), 0);
        assert_eq!(follower.actions(), [Action::Give(News::Progress(11))]);
        follower.response(progress(14), 0);
        assert_eq!(
            follower.actions(),
            [
                Action::Give(News::Progress(14)),
                Action::Give(News::KeysSeen {
                    range: range("a/"),
                    revision: 12,
                    keys: keys(&[1, 11]),
                })
            ]
        );
    }

    #[test]
    fn a_range_is_read_again_on_demand() {
        let mut follower = watching();
        follower.reread(&range("a/"));
        let token = read_token(&mut follower);
        follower.response(events(0, &[11, 12], false), 0);
        follower.read(token, Ok((11, vec![])), 0);
        let actions = follower.actions();
        assert!(matches!(
            actions[0],
            Action::Give(News::Snapshot { revision: 11, .. })
        ));
        assert!(matches!(
            actions[1],
            Action::Give(News::Events { revision: 12, .. })
        ));
    }

    #[test]
    fn a_new_stream_begins_anew() {
        let mut follower = watching();
        follower.disconnected();
        assert!(!follower.expects());
        follower.connected();
        assert_eq!(follower.actions(), [Action::Create(range("a/"))]);
    }
}
