//! Snapshot and watch of the followed ranges.
//!
//! Takes [`Command`]s, gives [`News::Snapshot`], [`News::Events`], [`News::Progress`],
//! [`News::KeysSeen`], [`News::Refused`] and [`News::Broken`], in an order in which
//! they can be believed: all events up to a revision come before the progress that names it.
//! All ranges are watched over one stream. A stream that broke must never be resumed: every range
//! is read anew.

use std::collections::VecDeque;
use std::time::Duration;

use etcd_client::proto::PbWatchResponse;
use etcd_client::{Client, EventType, GetOptions, KvClient, WatchOptions, WatchRequestSender};
use futures::FutureExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::connection::{Connection, DEADLINE, Session, describe};
use super::failure::{MAX_MESSAGE, is_denied, is_of_connection, key_value, late, revision_of};
use super::follower::{Action, Follower, Read, ReadError, Response};
use crate::model::etcd::{Event, Key, KeyValue, News, Range, Revision};

/// Ranges that are read at the same time: enough to use a round trip well, few enough that the
/// pages of a big start fit into memory.
const READS: usize = 8;

/// How often progress is requested while it is awaited: etcd drops the request silently while a
/// watch lags behind, which takes it up to 100 ms to mend.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// A wake-up that comes this late says that the process itself did not run.
const STOPPED: Duration = Duration::from_millis(200);

/// The first and the longest pause between two streams that broke soon after they were made.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_LAST: Duration = Duration::from_secs(3);

/// A stream that lived so long was a good one.
const GOOD_STREAM: Duration = Duration::from_secs(5);

/// What the mirror is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Follow exactly these ranges.
    Follow(Vec<Range>),
    /// Report [`News::Progress`] as soon as all ranges are watched.
    AskProgress,
    /// Take a new snapshot of a range.
    Reread(Range),
}

/// How often the mirror does what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Silence after which progress is requested.
    pub quiet: Duration,
    /// How long the answer may take; with `quiet` less than a third of the shortest TTL.
    pub answer: Duration,
    /// How often the keys of all ranges are compared.
    pub audit: Duration,
    /// Keys read at a time.
    pub page: i64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            // Together 1.6 s: a third of the shortest TTL of 5 s.
            quiet: Duration::from_millis(700),
            answer: Duration::from_millis(900),
            audit: Duration::from_secs(300),
            // Some 300 KB of Json records; etcd answers it in a few milliseconds.
            page: 1000,
        }
    }
}

/// Why a stream ended.
enum End {
    /// The commands or the inputs are closed.
    Closed,
    /// It broke; whether the connection is to blame.
    Broken(String, bool),
}

/// What a task that reads has read.
enum Done {
    Records(u64, Read<KeyValue>),
    Keys(u64, Read<(Key, Revision)>),
}

/// Follows ranges until the commands or the inputs are closed.
pub async fn run<T: From<News>>(
    connection: Connection,
    mut commands: mpsc::Receiver<Command>,
    inputs: mpsc::Sender<T>,
    pace: Pace,
) {
    let mut follower = Follower::default();
    let mut failures = 0;
    loop {
        let session = tokio::select! {
            session = connection.ready(), if !follower.is_empty() => session,
            command = commands.recv() => {
                let Some(command) = command else { return };
                take(&mut follower, command);
                continue;
            }
        };
        let since = Instant::now();
        follower.connected();
        let end = stream(&session, &mut follower, &mut commands, &inputs, pace).await;
        follower.disconnected();
        let (reason, connection_failed) = match end {
            End::Closed => return,
            End::Broken(reason, connection_failed) => (reason, connection_failed),
        };
        if connection_failed {
            connection.failed(session.generation, &reason);
        }
        let reason = format!("{}: {reason}", session.endpoint);
        if inputs.send(News::Broken(reason).into()).await.is_err() {
            return;
        }
        if since.elapsed() >= GOOD_STREAM {
            failures = 0;
        }
        let full = BACKOFF_FIRST
            .saturating_mul(1 << u32::min(failures, 16))
            .min(BACKOFF_LAST);
        tokio::time::sleep(full.mul_f64(1.0 - rand::random::<f64>() / 2.0)).await;
        failures += 1;
    }
}

fn take(follower: &mut Follower, command: Command) {
    match command {
        Command::Follow(ranges) => follower.follow(ranges),
        Command::AskProgress => follower.ask_progress(),
        Command::Reread(range) => follower.reread(&range),
    }
}

fn broken(error: &etcd_client::Error) -> End {
    End::Broken(describe(error), is_of_connection(error))
}

fn options(range: &Range) -> WatchOptions {
    WatchOptions::new()
        .with_range(&*range.end)
        .with_progress_notify()
        .with_fragment()
}

/// When the stream was heard and asked.
struct Pulse {
    heard: Instant,
    /// Since when an answer is owed.
    owed: Option<Instant>,
    /// The last progress request.
    requested: Instant,
}

impl Pulse {
    fn owes(&mut self, now: Instant) {
        self.owed.get_or_insert(now);
    }
}

/// Runs one stream to its end.
async fn stream<T: From<News>>(
    session: &Session,
    follower: &mut Follower,
    commands: &mut mpsc::Receiver<Command>,
    inputs: &mpsc::Sender<T>,
    pace: Pace,
) -> End {
    let start = Instant::now();
    let milliseconds = |now: Instant| now.duration_since(start).as_millis() as u64;
    let mut actions: VecDeque<Action> = follower.actions().into();
    let first = match actions.pop_front() {
        Some(Action::Create(range)) => range,
        // Ranges were dropped while the connection was made.
        _ => return End::Broken("there is nothing to watch".to_owned(), false),
    };
    let mut client = session
        .client
        .watch_client()
        .max_decoding_message_size(MAX_MESSAGE);
    let opened = timeout(DEADLINE, client.watch(&*first.start, Some(options(&first)))).await;
    let (mut sender, mut responses) = match opened {
        Ok(Ok(stream)) => stream.split(),
        Ok(Err(error)) => return broken(&error),
        Err(_) => return End::Broken(late("a new watch", DEADLINE), true),
    };
    let kv = session
        .client
        .kv_client()
        .max_decoding_message_size(MAX_MESSAGE);

    let mut outgoing = VecDeque::new();
    let mut to_read = VecDeque::new();
    let mut reads = JoinSet::new();
    let now = Instant::now();
    let mut audit = now + pace.audit;
    let mut pulse = Pulse {
        heard: now,
        owed: Some(now),
        requested: now,
    };
    loop {
        actions.extend(follower.actions());
        while let Some(action) = actions.pop_front() {
            match action {
                Action::Give(news) => {
                    if inputs.send(news.into()).await.is_err() {
                        return End::Closed;
                    }
                }
                Action::Break(reason) => return End::Broken(reason, true),
                Action::Read(..) | Action::ReadKeys(..) => to_read.push_back(action),
                Action::Create(_) | Action::Cancel(_) | Action::AskProgress => {
                    outgoing.push_back(action);
                }
            }
        }
        while reads.len() < READS
            && let Some(action) = to_read.pop_front()
        {
            spawn_read(&mut reads, action, kv.clone(), pace.page);
        }
        // Only as many as the stream takes at once: with thousands of ranges etcd stops reading
        // when its answers are not read.
        while sender.0.capacity() > 0
            && let Some(action) = outgoing.pop_front()
        {
            if let Err(error) = request(&mut sender, action, &mut pulse).await {
                return broken(&error);
            }
        }

        let wake = wake(follower, &pulse, pace, start).min(audit);
        let room = sender.0.clone();
        tokio::select! {
            message = responses.message() => {
                if let Err(end) = heard(message, follower, &mut pulse, milliseconds(Instant::now())) {
                    return end;
                }
            }
            Some(done) = reads.join_next(), if !reads.is_empty() => match done {
                Ok(Done::Records(token, read)) => {
                    follower.read(token, read, milliseconds(Instant::now()));
                }
                Ok(Done::Keys(token, read)) => follower.keys_read(token, read),
                Err(error) => return End::Broken(format!("a read ended early: {error}"), false),
            },
            command = commands.recv() => match command {
                Some(command) => take(follower, command),
                None => return End::Closed,
            },
            // Sent at the next turn.
            _ = room.reserve(), if !outgoing.is_empty() => {}
            () = sleep_until(wake) => {
                let now = Instant::now();
                // What has arrived counts, however late it is looked at.
                if let Some(message) = responses.message().now_or_never() {
                    if let Err(end) = heard(message, follower, &mut pulse, milliseconds(now)) {
                        return end;
                    }
                    continue;
                }
                if follower.next_retry().is_some() {
                    follower.retry(milliseconds(now));
                }
                if now >= audit {
                    audit = now + pace.audit;
                    follower.audit();
                }
                if !follower.expects() {
                    pulse.owed = None;
                    pulse.heard = now;
                    continue;
                }
                match pulse.owed {
                    Some(since) if now >= since + pace.answer => {
                        if now.duration_since(wake) < STOPPED {
                            let reason = format!("the watch is silent for {} ms", now.duration_since(pulse.heard).as_millis());
                            return End::Broken(reason, true);
                        }
                        // etcd had no chance to be heard.
                        pulse.owed = Some(now);
                        outgoing.push_back(Action::AskProgress);
                    }
                    _ if now >= pulse.requested + ASK_AGAIN
                        && (follower.wants_progress()
                            || pulse.owed.is_some()
                            || now >= pulse.heard + pace.quiet) =>
                    {
                        outgoing.push_back(Action::AskProgress);
                    }
                    _ => {}
                }
            }
        }
    }
}

/// When the stream is to be looked at next although nothing comes.
fn wake(follower: &Follower, pulse: &Pulse, pace: Pace, start: Instant) -> Instant {
    let mut wake = pulse.heard + pace.quiet;
    if let Some(since) = pulse.owed {
        // Requests that etcd dropped are repeated before the stream is given up.
        wake = (since + pace.answer).min(pulse.requested + pace.answer / 3);
    }
    if follower.wants_progress() {
        wake = wake.min(pulse.requested + ASK_AGAIN);
    }
    if let Some(retry) = follower.next_retry() {
        wake = wake.min(start + Duration::from_millis(retry));
    }
    wake
}

async fn request(
    sender: &mut WatchRequestSender,
    action: Action,
    pulse: &mut Pulse,
) -> Result<(), etcd_client::Error> {
    let now = Instant::now();
    match action {
        Action::Create(range) => {
            pulse.owes(now);
            sender.watch(&*range.start, Some(options(&range))).await
        }
        Action::Cancel(watch) => sender.cancel(watch).await,
        Action::AskProgress => {
            pulse.owes(now);
            pulse.requested = now;
            sender.request_progress().await
        }
        Action::Read(..) | Action::ReadKeys(..) | Action::Give(_) | Action::Break(_) => Ok(()),
    }
}

/// What [`etcd_client::WatchResponseStream::message`] gives.
type Message = Result<Option<etcd_client::WatchResponse>, etcd_client::Error>;

fn heard(
    message: Message,
    follower: &mut Follower,
    pulse: &mut Pulse,
    now: u64,
) -> Result<(), End> {
    match message {
        Ok(Some(message)) => {
            pulse.heard = Instant::now();
            pulse.owed = None;
            follower.response(response(message.0), now);
            Ok(())
        }
        Ok(None) => Err(End::Broken("etcd ended the watch stream".to_owned(), true)),
        Err(error) => Err(broken(&error)),
    }
}

fn response(message: PbWatchResponse) -> Response {
    Response {
        revision: message.header.map_or(0, |header| header.revision),
        watch: message.watch_id,
        created: message.created,
        canceled: message.canceled,
        compacted: message.compact_revision != 0,
        reason: message.cancel_reason,
        fragment: message.fragment,
        events: message
            .events
            .into_iter()
            .filter_map(|event| {
                let deleted = event.r#type == EventType::Delete as i32;
                let kv = event.kv?;
                Some(if deleted {
                    Event::Delete(kv.key.into(), kv.mod_revision)
                } else {
                    Event::Put(key_value(kv))
                })
            })
            .collect(),
    }
}

fn spawn_read(reads: &mut JoinSet<Done>, action: Action, kv: KvClient, page: i64) {
    match action {
        Action::Read(token, range) => {
            reads.spawn(async move {
                let read = read_range(kv, &range, page, GetOptions::new(), key_value).await;
                Done::Records(token, read)
            });
        }
        Action::ReadKeys(token, range) => {
            reads.spawn(async move {
                let options = GetOptions::new().with_keys_only();
                let read = read_range(kv, &range, page, options, |kv| {
                    (kv.key.into(), kv.mod_revision)
                })
                .await;
                Done::Keys(token, read)
            });
        }
        _ => {}
    }
}

/// All that stands in a range, at one revision.
///
/// # Errors
///
/// What etcd or the connection said.
pub async fn read(client: &Client, range: &Range) -> Result<(Revision, Vec<KeyValue>), String> {
    let kv = client.kv_client().max_decoding_message_size(MAX_MESSAGE);
    let page = Pace::default().page;
    read_range(kv, range, page, GetOptions::new(), key_value)
        .await
        .map_err(|(ReadError::Denied(why) | ReadError::Failed(why))| why)
}

/// Reads a range page by page at the revision of the first page.
pub(super) async fn read_range<T>(
    mut kv: KvClient,
    range: &Range,
    page: i64,
    options: GetOptions,
    convert: impl Fn(etcd_client::proto::PbKeyValue) -> T,
) -> Read<T> {
    let mut page = page;
    let mut revision: Revision = 0;
    let mut start = range.start.to_vec();
    let mut read = Vec::new();
    loop {
        let mut options = options.clone().with_range(&*range.end).with_limit(page);
        if revision != 0 {
            // The content at a revision that a quorum has answered from is the same everywhere.
            options = options.with_revision(revision).with_serializable();
        }
        let response = match timeout(DEADLINE, kv.get(start.clone(), Some(options))).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) if is_denied(&error) => {
                return Err(ReadError::Denied(describe(&error)));
            }
            Ok(Err(error)) => {
                let text = describe(&error);
                if page > 1 && text.contains("decoded message length too large") {
                    // Very large values: take fewer at a time.
                    page = (page / 8).max(1);
                    continue;
                }
                if revision != 0 && text.contains("required revision has been compacted") {
                    revision = 0;
                    start = range.start.to_vec();
                    read.clear();
                    continue;
                }
                return Err(ReadError::Failed(text));
            }
            Err(_) => return Err(ReadError::Failed(late("a read", DEADLINE))),
        };
        if revision == 0 {
            revision = revision_of(response.header());
        }
        let response = response.0;
        let next = response.kvs.last().map(|kv| {
            // The first possible key after the last one.
            let mut next = kv.key.clone();
            next.push(0);
            next
        });
        read.extend(response.kvs.into_iter().map(&convert));
        match next {
            Some(next) if response.more => start = next,
            _ => return Ok((revision, read)),
        }
    }
}
