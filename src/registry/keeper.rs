//! Keeps leases alive.
//!
//! Takes [`Command`]s and what stands below `leases/<uid>/` and in `owner`, gives
//! [`Input::LeaseLost`]. It runs on every replica, on a connection of its own, and asks neither the
//! engine nor Kubernetes: must never wait for either, and never write or revoke anything.
//!
//! Keepalives go over a few streams: one for short TTLs, so that the leader's own lease waits for
//! no other, and up to [`BULK_LANES`] for the rest. etcd answers the requests of a stream one after the
//! other, so the first that is unanswered is the one that etcd is at.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Error, LeaseClient, LeaseKeeper};
use futures::FutureExt;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until, timeout};

use super::ask::speaks_of_lease;
use super::connection::{Connection, Session, State, describe};
use super::failure::{is_denied, late};
use super::mirror::{self, Pace};
use super::schedule::{Class, SHORTEST_TTL, Schedule, Told};
use crate::engine::io::Input;
use crate::model::etcd::{Event, Key, KeyValue, LeaseId, News, Range};

/// How long a keepalive may stay unanswered: less than a third of the shortest TTL of 5 s.
const ANSWER_DEADLINE: Duration = Duration::from_millis(1_500);

/// Streams for leases that are not urgent. A member that does not lead passes each keepalive on
/// to the leader and waits, so that one stream would be slow with thousands of leases.
const BULK_LANES: usize = 3;

/// Keepalives under way on a stream. The deadline counts from the sending, so what etcd works off
/// one by one must not be sent all at once. Below the 100 that the client's queue takes.
const WINDOW: usize = 64;

/// Answers between the streams and the keeper; more of them wait in the streams.
const EVENTS: usize = 256;

/// Inputs between the keeper's mirror and the keeper, and commands the other way.
const MIRROR_QUEUE: usize = 64;

/// The TTL of the owner's lease in seconds, until an answer tells it.
const OWNER_TTL: i64 = 60;

/// What the keeper is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Keep this lease (TTL in seconds) alive, whether a key names it or not.
    Keep(LeaseId, i64),
    /// Keep it no longer, unless a key names it.
    Release(LeaseId),
    /// Whether anything is kept alive at all.
    Keeping(bool),
    /// The UID under which this cluster's leases stand.
    Cluster(String),
}

/// The keys that name leases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    owner: Key,
    leases: String,
    /// Only leases of registrations in these namespaces are kept alive; empty: all.
    namespaces: BTreeSet<String>,
}

impl Names {
    /// Of the cluster of this name; `registrar_prefix` ends in a slash. Only leases of registrations in these namespaces
    /// are kept alive; without any, those of all.
    #[must_use]
    pub fn new(registrar_prefix: &str, cluster: &str, namespaces: BTreeSet<String>) -> Self {
        Self {
            namespaces,
            owner: format!("{registrar_prefix}{cluster}/owner")
                .into_bytes()
                .into(),
            leases: format!("{registrar_prefix}{cluster}/leases/"),
        }
    }

    /// The namespace of a lease that is nobody's to keep alive any more: no operator watches what stands on it. One
    /// whose value can't be read is kept.
    fn foreign<'a>(&self, lease: &'a KeyValue) -> Option<&'a str> {
        #[derive(serde::Deserialize)]
        struct Of<'a> {
            registration: &'a str,
        }
        if self.namespaces.is_empty() {
            return None;
        }
        let of: Of<'a> = serde_json::from_slice(&lease.value).ok()?;
        let (namespace, _) = of.registration.split_once('/')?;
        (!self.namespaces.contains(namespace)).then_some(namespace)
    }

    fn owner(&self) -> Range {
        let mut end = self.owner.to_vec();
        end.push(0);
        Range {
            start: self.owner.clone(),
            end: end.into(),
        }
    }

    fn leases(&self, uid: &str) -> Range {
        Range::prefix(format!("{}{uid}/", self.leases).as_bytes())
    }
}

/// The lease that a key below `leases/<uid>/` names: its last segment, 16 hexadecimal digits.
pub(super) fn lease_of(key: &[u8]) -> Option<LeaseId> {
    let (rest, hex) = key.split_at_checked(key.len().checked_sub(16)?)?;
    if rest.last() != Some(&b'/') || !hex.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let hex = std::str::from_utf8(hex).ok()?;
    let id = u64::from_str_radix(hex, 16).ok()?.cast_signed();
    (id != 0).then_some(id)
}

/// The member `ttl` of a key's value, in seconds. Without it the shortest TTL is assumed, and the
/// first answer tells the true one.
fn ttl_of(value: &[u8]) -> i64 {
    serde_json::from_slice::<serde_json::Value>(value)
        .ok()
        .and_then(|value| value.get("ttl")?.as_i64())
        .unwrap_or(SHORTEST_TTL)
}

/// Keeps leases alive until the commands are closed. `ready` becomes true when all leases that
/// were found at first have been kept alive once, and stays so.
pub async fn run(
    connection: Connection,
    names: Names,
    mut commands: mpsc::Receiver<Command>,
    inputs: mpsc::Sender<Input>,
    ready: watch::Sender<bool>,
) {
    let (mirror, mirror_commands) = mpsc::channel(MIRROR_QUEUE);
    let (found, mut seen) = mpsc::channel(MIRROR_QUEUE);
    tokio::spawn(mirror::run(
        connection.clone(),
        mirror_commands,
        found,
        Pace::default(),
    ));
    let (lane_events, mut answers) = mpsc::channel(EVENTS);
    let mut state = connection.state();
    let mut keeper = Keeper {
        names,
        start: Instant::now(),
        connection,
        mirror,
        lane_events,
        schedule: Schedule::default(),
        keeping: true,
        uid: None,
        owner_lease: 0,
        owner_read: false,
        leases_read: false,
        session: None,
        failed: 0,
        lanes: Vec::new(),
        serial: 0,
        lost: VecDeque::new(),
        left: HashSet::new(),
        told: BTreeSet::new(),
    };
    keeper.session = keeper.connection.current();
    keeper.follow().await;
    loop {
        keeper.send();
        if keeper.is_ready() {
            ready.send_if_modified(|ready| !std::mem::replace(ready, true));
        }
        let wake = keeper.wake();
        tokio::select! {
            command = commands.recv() => match command {
                Some(command) => keeper.command(command).await,
                None => return,
            },
            Some(input) = seen.recv() => keeper.seen(input).await,
            Some((serial, event)) = answers.recv() => keeper.lane_event(serial, event),
            Ok(()) = state.changed() => {
                keeper.session = match &*state.borrow_and_update() {
                    State::Up(session) if session.generation > keeper.failed => Some(Arc::clone(session)),
                    _ => None,
                };
            }
            // The engine may be busy; the keepalives do not wait for it.
            Ok(room) = inputs.reserve(), if !keeper.lost.is_empty() => {
                if let Some(id) = keeper.lost.pop_front() {
                    room.send(Input::LeaseLost(id));
                }
            }
            () = sleep_until(wake) => {
                // Answers that are here already count, however late they are looked at.
                while let Some(Some((serial, event))) = answers.recv().now_or_never() {
                    keeper.lane_event(serial, event);
                }
                keeper.overdue();
            }
        }
    }
}

/// What a lane says.
enum LaneEvent {
    /// The stream stands, and the lease that it was made with lives.
    Opened(LeaseKeeper),
    /// A keepalive was answered.
    Answer(LeaseId, i64),
    /// The stream could not be made, or it ended.
    Ended(Error),
}

/// One stream of keepalives; dropping it closes the stream.
struct Lane {
    serial: u64,
    class: Class,
    generation: u64,
    /// `None` while the stream is being made.
    keeper: Option<LeaseKeeper>,
    /// What was sent and not answered, oldest first.
    sent: VecDeque<(LeaseId, Instant)>,
    task: AbortHandle,
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn lane(
    mut client: LeaseClient,
    first: LeaseId,
    serial: u64,
    events: mpsc::Sender<(u64, LaneEvent)>,
) {
    let opened = timeout(ANSWER_DEADLINE, client.keep_alive(first)).await;
    let (keeper, mut stream) = match opened {
        Ok(Ok(opened)) => opened,
        Ok(Err(error)) => {
            if speaks_of_lease(&error) {
                let _ = events.send((serial, LaneEvent::Answer(first, 0))).await;
            }
            let _ = events.send((serial, LaneEvent::Ended(error))).await;
            return;
        }
        Err(_) => {
            let error = Error::EndpointError(late("a keepalive", ANSWER_DEADLINE));
            let _ = events.send((serial, LaneEvent::Ended(error))).await;
            return;
        }
    };
    if events
        .send((serial, LaneEvent::Opened(keeper)))
        .await
        .is_err()
    {
        return;
    }
    let error = loop {
        match stream.message().await {
            Ok(Some(answer)) => {
                let event = LaneEvent::Answer(answer.id(), answer.ttl());
                if events.send((serial, event)).await.is_err() {
                    return;
                }
            }
            Ok(None) => {
                break Error::EndpointError("etcd ended the keepalive stream".to_owned());
            }
            Err(error) => break error,
        }
    };
    let _ = events.send((serial, LaneEvent::Ended(error))).await;
}

struct Keeper {
    names: Names,
    start: Instant,
    connection: Connection,
    mirror: mpsc::Sender<mirror::Command>,
    lane_events: mpsc::Sender<(u64, LaneEvent)>,
    schedule: Schedule,
    keeping: bool,
    /// Where the leases stand: told, or else what `owner` says.
    uid: Option<Uid>,
    /// The lease of the key `owner`; 0: none.
    owner_lease: LeaseId,
    owner_read: bool,
    leases_read: bool,
    /// The session for new streams.
    session: Option<Arc<Session>>,
    /// Up to this generation sessions are known not to work.
    failed: u64,
    lanes: Vec<Lane>,
    serial: u64,
    /// To be told to the engine.
    lost: VecDeque<LeaseId>,
    /// Leases that are left to expire: of namespaces that are not watched.
    left: HashSet<LeaseId>,
    /// Those namespaces, each told once.
    told: BTreeSet<String>,
}

#[derive(Debug, PartialEq)]
enum Uid {
    Told(String),
    Read(String),
}

impl Keeper {
    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    fn uid(&self) -> Option<&str> {
        match &self.uid {
            Some(Uid::Told(uid) | Uid::Read(uid)) => Some(uid),
            None => None,
        }
    }

    fn is_ready(&self) -> bool {
        self.owner_read && self.leases_read && self.schedule.fresh() == 0
    }

    async fn follow(&self) {
        let mut ranges = vec![self.names.owner()];
        ranges.extend(self.uid().map(|uid| self.names.leases(uid)));
        // The mirror ends only with the keeper.
        let _ = self.mirror.send(mirror::Command::Follow(ranges)).await;
    }

    async fn command(&mut self, command: Command) {
        let now = self.now();
        match command {
            Command::Keep(id, ttl) => self.schedule.keep(id, ttl, now),
            Command::Release(id) => self.schedule.release(id),
            Command::Keeping(keeping) => {
                if keeping && !self.keeping {
                    self.schedule.all_due(now);
                }
                self.keeping = keeping;
            }
            Command::Cluster(uid) => self.set_uid(Uid::Told(uid)).await,
        }
    }

    async fn set_uid(&mut self, uid: Uid) {
        let old = self.uid.replace(uid);
        let old = old.map(|(Uid::Told(old) | Uid::Read(old))| old);
        if self.uid() == old.as_deref() {
            return;
        }
        // The leases of another UID are not this cluster's.
        let now = self.now();
        if old.is_some() {
            for id in self.schedule.all_found() {
                if id != self.owner_lease {
                    self.schedule.unfound(id, now);
                }
            }
        }
        self.leases_read = false;
        self.follow().await;
    }

    async fn seen(&mut self, input: Input) {
        let now = self.now();
        match input {
            Input::Etcd(News::Snapshot { range, records, .. }) if range == self.names.owner() => {
                self.owner_read = true;
                self.owner(records.first()).await;
            }
            Input::Etcd(News::Snapshot { range, records, .. }) if self.is_leases(&range) => {
                self.left.clear();
                let mut gone: HashSet<_> = self.schedule.all_found().into_iter().collect();
                gone.remove(&self.owner_lease);
                for record in &records {
                    if let Some(id) = self.lease_to_keep(record) {
                        gone.remove(&id);
                        self.schedule.found(id, ttl_of(&record.value), true, now);
                    }
                }
                for id in gone {
                    self.schedule.unfound(id, now);
                }
                self.leases_read = true;
            }
            Input::Etcd(News::Events { range, events, .. }) if range == self.names.owner() => {
                match events.last() {
                    Some(Event::Put(kv)) => self.owner(Some(kv)).await,
                    Some(Event::Delete(..)) => self.owner(None).await,
                    None => {}
                }
            }
            Input::Etcd(News::Events { range, events, .. }) if self.is_leases(&range) => {
                for event in events {
                    match event {
                        Event::Put(kv) => {
                            if let Some(id) = self.lease_to_keep(&kv) {
                                self.schedule.found(id, ttl_of(&kv.value), false, now);
                            }
                        }
                        Event::Delete(key, _) => {
                            if let Some(id) = lease_of(&key) {
                                self.left.remove(&id);
                                self.schedule.unfound(id, now);
                            }
                        }
                    }
                }
            }
            Input::Etcd(News::KeysSeen { range, keys, .. }) if self.is_leases(&range) => {
                let seen = keys.iter().filter_map(|(key, _)| lease_of(key)).count();
                let known = self.schedule.all_found().len();
                let owner = usize::from(self.owner_lease != 0);
                if seen + owner != known + self.left.len() {
                    // Rare enough that a needless reading costs nothing.
                    let _ = self.mirror.try_send(mirror::Command::Reread(range));
                }
            }
            Input::Etcd(News::Refused(range, failure)) => tracing::warn!(
                range = %String::from_utf8_lossy(&range.start),
                error = %failure.message,
                "the leases below this key can't be read, so they can't be kept alive: grant the etcd user access"
            ),
            Input::Etcd(News::Broken(why)) => {
                tracing::debug!(why, "the watch of the leases broke; it is made anew");
            }
            _ => {}
        }
    }

    /// The lease that a key names, where it is to be kept alive.
    fn lease_to_keep(&mut self, record: &KeyValue) -> Option<LeaseId> {
        let id = lease_of(&record.key)?;
        let Some(namespace) = self.names.foreign(record) else {
            return Some(id);
        };
        if self.told.insert(namespace.to_owned()) {
            tracing::warn!(
                namespace,
                "etcd has records of this namespace, which is not among --namespace: they are not kept alive, and \
                 end with their leases (spec.leaseTTLSeconds) unless another replica watches it; name it to keep them"
            );
        }
        self.left.insert(id);
        None
    }

    fn is_leases(&self, range: &Range) -> bool {
        self.uid()
            .is_some_and(|uid| self.names.leases(uid) == *range)
    }

    /// The key `owner` as it is now.
    async fn owner(&mut self, record: Option<&KeyValue>) {
        let lease = record.map_or(0, |kv| kv.lease);
        if lease != self.owner_lease {
            if self.owner_lease != 0 {
                self.schedule.unfound(self.owner_lease, self.now());
            }
            self.owner_lease = lease;
        }
        if lease != 0 {
            self.schedule.found(lease, OWNER_TTL, true, self.now());
        }
        if matches!(self.uid, Some(Uid::Told(_))) {
            return;
        }
        let uid = record
            .and_then(|kv| std::str::from_utf8(&kv.value).ok())
            .filter(|uid| !uid.is_empty() && !uid.contains('/'));
        // A removed owner is put back by the leader; until then the last one counts.
        if let Some(uid) = uid {
            self.set_uid(Uid::Read(uid.to_owned())).await;
        }
    }

    /// Sends what is due, as far as the streams take it.
    fn send(&mut self) {
        if !self.keeping {
            return;
        }
        for class in [Class::Urgent, Class::Bulk] {
            loop {
                let now = self.now();
                if self.schedule.next(class).is_none_or(|due| due > now) {
                    break;
                }
                let free = self
                    .lanes
                    .iter_mut()
                    .filter(|lane| {
                        lane.class == class && lane.keeper.is_some() && lane.sent.len() < WINDOW
                    })
                    .min_by_key(|lane| lane.sent.len());
                match free {
                    Some(lane) => {
                        let Some(id) = self.schedule.take(class, now) else {
                            break;
                        };
                        if !transmit(lane, id) {
                            // The stream has ended; its task says so.
                            self.schedule.unanswered(id, now);
                            break;
                        }
                    }
                    None => {
                        if !self.open(class, now) {
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Opens one more stream with the next lease that is due.
    fn open(&mut self, class: Class, now: u64) -> bool {
        let Some(session) = &self.session else {
            return false;
        };
        let mut of_class = self.lanes.iter().filter(|lane| lane.class == class);
        let limit = match class {
            Class::Urgent => 1,
            Class::Bulk => BULK_LANES,
        };
        // One at a time: the first is usually enough.
        if of_class.clone().count() >= limit || of_class.any(|lane| lane.keeper.is_none()) {
            return false;
        }
        let Some(first) = self.schedule.take(class, now) else {
            return false;
        };
        self.serial += 1;
        let task = tokio::spawn(lane(
            session.client.lease_client(),
            first,
            self.serial,
            self.lane_events.clone(),
        ));
        self.lanes.push(Lane {
            serial: self.serial,
            class,
            generation: session.generation,
            keeper: None,
            sent: VecDeque::from([(first, Instant::now())]),
            task: task.abort_handle(),
        });
        true
    }

    fn lane_event(&mut self, serial: u64, event: LaneEvent) {
        let now = self.now();
        // A lane that was closed may have said something before.
        let Some(index) = self.lanes.iter().position(|lane| lane.serial == serial) else {
            return;
        };
        let Some(lane) = self.lanes.get_mut(index) else {
            return;
        };
        match event {
            LaneEvent::Opened(keeper) => {
                let id = keeper.id();
                lane.keeper = Some(keeper);
                lane.sent.retain(|(sent, _)| *sent != id);
                self.schedule.answered(id, None, now);
            }
            LaneEvent::Answer(id, ttl) => {
                if let Some(at) = lane.sent.iter().position(|(sent, _)| *sent == id) {
                    lane.sent.remove(at);
                }
                if self.schedule.answered(id, Some(ttl), now) == Told::Lost {
                    self.lost.push_back(id);
                    if id == self.owner_lease {
                        self.owner_lease = 0;
                    }
                }
            }
            LaneEvent::Ended(error) => {
                let mut lane = self.lanes.swap_remove(index);
                if is_denied(&error)
                    && let Some((id, _)) = lane.sent.pop_front()
                {
                    // etcd refuses a keepalive when the user may not write one of the keys of the lease,
                    // and ends the stream with it.
                    tracing::warn!(
                        lease = %format_args!("{id:016x}"),
                        "etcd refuses to keep this lease alive: the user may not write all of its keys"
                    );
                    self.schedule.postpone(id, now);
                } else if !speaks_of_lease(&error) {
                    // Whatever it is, a race with its growing pauses comes before the next try.
                    self.fail(lane.generation, &describe(&error));
                }
                self.give_back(&lane);
            }
        }
    }

    /// What a closed lane had sent is due again.
    fn give_back(&mut self, lane: &Lane) {
        let now = self.now();
        for (id, _) in &lane.sent {
            self.schedule.unanswered(*id, now);
        }
    }

    /// A session does not work: no new streams over it, and those that it has are closed.
    fn fail(&mut self, generation: u64, why: &str) {
        self.failed = self.failed.max(generation);
        self.connection.failed(generation, why);
        if self
            .session
            .as_ref()
            .is_some_and(|session| session.generation <= self.failed)
        {
            self.session = None;
        }
        let (closed, lanes) = std::mem::take(&mut self.lanes)
            .into_iter()
            .partition(|lane| lane.generation <= generation);
        self.lanes = lanes;
        let closed: Vec<Lane> = closed;
        for lane in &closed {
            self.give_back(lane);
        }
    }

    /// Closes what has not answered in time.
    fn overdue(&mut self) {
        let now = Instant::now();
        let silent = self.lanes.iter().find(|lane| {
            lane.sent
                .front()
                .is_some_and(|(_, sent)| now >= *sent + ANSWER_DEADLINE)
        });
        if let Some(generation) = silent.map(|lane| lane.generation) {
            self.fail(generation, &late("a keepalive", ANSWER_DEADLINE));
        }
    }

    /// When something is to be done although nothing comes.
    fn wake(&mut self) -> Instant {
        // Any time that is far away: there is always something before it, or nothing to do.
        let mut wake = Instant::now() + Duration::from_secs(3_600);
        for lane in &self.lanes {
            if let Some((_, sent)) = lane.sent.front() {
                wake = wake.min(*sent + ANSWER_DEADLINE);
            }
        }
        let now = self.now();
        for class in [Class::Urgent, Class::Bulk] {
            // What is due and could not be sent waits for a stream and not for the time.
            if let Some(due) = self.schedule.next(class).filter(|due| *due > now)
                && self.keeping
            {
                wake = wake.min(self.start + Duration::from_millis(due));
            }
        }
        wake
    }
}

/// Sends a keepalive over a lane; false when its stream has ended.
fn transmit(lane: &mut Lane, id: LeaseId) -> bool {
    let Some(keeper) = &lane.keeper else {
        return false;
    };
    // The request's type has no public name; it is that of the channel.
    let mut request = empty(&keeper.sender);
    request.id = id;
    if keeper.sender.try_send(request).is_err() {
        return false;
    }
    lane.sent.push_back((id, Instant::now()));
    true
}

fn empty<T: Default>(_: &mpsc::Sender<T>) -> T {
    T::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_segment_names_the_lease() {
        assert_eq!(
            lease_of(b"/registrar/east/leases/u/00000000000000ff"),
            Some(255)
        );
        assert_eq!(
            lease_of(b"/registrar/east/leases/u/694d9cd85c2b1b0f"),
            Some(0x694d_9cd8_5c2b_1b0f)
        );
        for key in [
            &b"/registrar/east/leases/u/ff"[..],
            b"/registrar/east/leases/u/x00000000000000ff",
            b"/registrar/east/leases/u/+0000000000000ff",
            b"/registrar/east/leases/u/0000000000000000",
            b"",
        ] {
            assert_eq!(lease_of(key), None, "{}", String::from_utf8_lossy(key));
        }
    }

    #[test]
    fn a_ttl_that_cannot_be_read_is_taken_for_the_shortest() {
        assert_eq!(ttl_of(br#"{"ttl":60,"scope":"/a/"}"#), 60);
        assert_eq!(ttl_of(br#"{"ttl":"60"}"#), SHORTEST_TTL);
        assert_eq!(ttl_of(b"x"), SHORTEST_TTL);
    }
}
