//! The task behind a registration: what the handle wants --> etcd; what etcd says --> the state.
//!
//! Takes orders of the handle, carries what [`Core`] wants to etcd and what etcd answers to it. Must never decide anything about a
//! key, nor let a keepalive wait for a write.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::core::{Core, Step, Ticket};
use super::instance::Group;
use super::{CloseError, State};
use crate::model::etcd::{Answer, Failure, LeaseId, News, Range, Request};
use crate::registry::ask::{ask, keep_alive};
use crate::registry::connection::{self, Connection, DEADLINE};
use crate::registry::mirror::{self, Command, Pace};

/// News that wait for the driver, which never waits itself.
const NEWS: usize = 64;

/// Commands that wait for the mirror: what is more waits in the driver.
const COMMANDS: usize = 8;

/// After how long a silent watch is asked whether it stands. That etcd is away is noticed sooner by the keepalives.
const QUIET: Duration = Duration::from_secs(2);

/// What the handle wants.
#[derive(Debug)]
pub(super) enum Order {
    /// Exactly these records, by an update of this number.
    Want(u64, Vec<Group>),
    /// None, and no lease either.
    Close(oneshot::Sender<Result<(), CloseError>>),
}

/// What the handle sees.
#[derive(Debug, PartialEq)]
pub(super) struct Told {
    pub(super) state: State,
    /// The update that it tells of.
    pub(super) update: u64,
}

/// Runs until it is closed, or the handle is gone: then the leases are left to expire.
pub(super) async fn run(
    connection: Connection,
    ttl: Duration,
    groups: Vec<Group>,
    mut orders: mpsc::UnboundedReceiver<Order>,
    told: watch::Sender<Told>,
) {
    let (commands, to_mirror) = mpsc::channel(COMMANDS);
    let (sender, mut news) = mpsc::channel::<News>(NEWS);
    let pace = Pace {
        quiet: QUIET,
        answer: DEADLINE,
        ..Pace::default()
    };
    tokio::spawn(mirror::run(connection.clone(), to_mirror, sender, pace));
    let mut state = connection.state();
    let start = Instant::now();
    let now = || u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut core = Core::new(i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX));
    core.want(groups);
    let mut writes = FuturesUnordered::new();
    let mut keeps = FuturesUnordered::new();
    let mut followed = BTreeSet::new();
    let mut rereads: Vec<Range> = Vec::new();
    let mut update = 0;
    let mut open = true;
    let mut closers: Vec<oneshot::Sender<Result<(), CloseError>>> = Vec::new();
    let mut given_up: Option<Instant> = None;
    loop {
        for (slot, lease) in core.due(now()) {
            keeps.push(keep(connection.clone(), slot, lease));
        }
        let mut wake = core.next_keep();
        if writes.is_empty() {
            match core.next(now(), lease_id) {
                Step::Ask(ticket, request) => {
                    writes.push(write(connection.clone(), ticket, request))
                }
                Step::Wait(until) => wake = wake.into_iter().chain(until).min(),
            }
        }
        let state_now = core.state();
        tell(&told, update, &state_now);
        let over = given_up.is_some_and(|until| until <= Instant::now());
        if core.is_closed() || over {
            let result = if over {
                Err(not_closed(state_now))
            } else {
                Ok(())
            };
            for closer in closers {
                let _ = closer.send(result.clone());
            }
            return;
        }
        let ranges = core.ranges();
        let wake = wake.map(|at| start + Duration::from_millis(at));
        let until = wake.into_iter().chain(given_up).min();
        tokio::select! {
            order = orders.recv(), if open => match order {
                Some(Order::Want(number, groups)) => {
                    update = number;
                    core.want(groups);
                }
                Some(Order::Close(closer)) => {
                    core.close();
                    closers.push(closer);
                    // By then the leases have ended by themselves, unless etcd stood still.
                    given_up.get_or_insert(Instant::now() + ttl);
                }
                // While it is closed it goes on without its handle.
                None if given_up.is_none() => return,
                None => open = false,
            },
            Some(heard) = news.recv() => rereads.extend(core.heard(heard)),
            Some((ticket, request, answer)) = writes.next() => {
                core.answered(ticket, &request, answer, now());
            }
            Some((slot, lease, answer)) = keeps.next() => core.kept(slot, lease, answer, now()),
            permit = commands.reserve(), if ranges != followed || !rereads.is_empty() => match permit {
                Ok(permit) if ranges != followed => {
                    permit.send(Command::Follow(ranges.iter().cloned().collect()));
                    followed = ranges;
                }
                Ok(permit) => if let Some(range) = rereads.pop() {
                    permit.send(Command::Reread(range));
                },
                Err(_) => return,
            },
            Ok(()) = state.changed() => {
                let down = match &*state.borrow_and_update() {
                    connection::State::Down(why) => Some(why.to_string()),
                    connection::State::Connecting | connection::State::Up(_) => None,
                };
                core.connection(down);
            }
            () = sleep_until(until.unwrap_or(start)), if until.is_some() => {}
        }
    }
}

fn not_closed(state: State) -> CloseError {
    let why = match state {
        State::Waiting(Some(why)) | State::Refused(why) => why,
        _ => "etcd did not answer".to_owned(),
    };
    CloseError { why }
}

async fn write(
    connection: Connection,
    ticket: Ticket,
    request: Request,
) -> (Ticket, Request, Result<Answer, Failure>) {
    let answer = ask(&connection, request.clone(), DEADLINE).await;
    (ticket, request, answer)
}

async fn keep(
    connection: Connection,
    slot: u32,
    lease: LeaseId,
) -> (u32, LeaseId, Result<bool, Failure>) {
    let answer = keep_alive(&connection, lease, DEADLINE).await;
    (slot, lease, answer)
}

/// A lease of which nobody else can know.
fn lease_id() -> LeaseId {
    // etcd takes positive ones, and chooses one itself for 0.
    rand::random_range(1..=LeaseId::MAX)
}

fn tell(told: &watch::Sender<Told>, update: u64, state: &State) {
    told.send_if_modified(|known| {
        let differs = known.state != *state || known.update != update;
        if differs {
            *known = Told {
                state: state.clone(),
                update,
            };
        }
        differs
    });
}
