//! The task behind a connection: what is to be followed --> the mirror; its news --> the lists.
//!
//! Takes orders of the handles and the news of [`mirror::run`], gives each list what concerns its range. Must never wait for the
//! mirror while the mirror may wait for it, and never tell a list that it is empty but by a snapshot.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use super::shared::Shared;
use crate::model::etcd::{News, Range};
use crate::registry::connection::{ConnectError, Connection, Settings, State};
use crate::registry::mirror::{self, Command, Pace};

/// How often etcd is asked whether the lists are whole: a small request in two seconds for each process that reads, and a list
/// that is live is never older.
const CONFIRM: Duration = Duration::from_secs(2);

/// How long the answer may take, so that a connection that leads nowhere is noticed within four seconds.
const ANSWER: Duration = Duration::from_millis(1_500);

/// News that wait for the driver, which never waits itself.
const NEWS: usize = 64;

/// Commands that wait for the mirror; what is more waits in the driver.
const COMMANDS: usize = 8;

/// What the handles want.
#[derive(Debug)]
pub(super) enum Order {
    /// Follow a list.
    Follow(Arc<Shared>),
    /// The last handle of a list is gone.
    Drop(Arc<Shared>),
}

/// Connects and starts the tasks; they end when the orders are closed.
pub(super) async fn start(
    settings: Settings,
) -> Result<mpsc::UnboundedSender<Order>, ConnectError> {
    let connection = Connection::connect(settings).await?;
    let state = connection.state();
    let (commands, to_mirror) = mpsc::channel(COMMANDS);
    let (sender, news) = mpsc::channel::<News>(NEWS);
    let pace = Pace {
        quiet: CONFIRM,
        answer: ANSWER,
        ..Pace::default()
    };
    tokio::spawn(mirror::run(connection, to_mirror, sender, pace));
    let (orders, received) = mpsc::unbounded_channel();
    let driver = Driver {
        lists: Vec::new(),
        refused: HashMap::new(),
        why: None,
        outbox: VecDeque::new(),
    };
    tokio::spawn(driver.run(received, news, commands, state));
    Ok(orders)
}

struct Driver {
    lists: Vec<Arc<Shared>>,
    /// Ranges that can't be read, and why: it is told once.
    refused: HashMap<Range, String>,
    /// Why etcd can't be read, while it can't.
    why: Option<String>,
    outbox: VecDeque<Command>,
}

impl Driver {
    async fn run(
        mut self,
        mut orders: mpsc::UnboundedReceiver<Order>,
        mut news: mpsc::Receiver<News>,
        commands: mpsc::Sender<Command>,
        mut state: watch::Receiver<State>,
    ) {
        let mut confirm = tokio::time::interval(CONFIRM);
        confirm.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                order = orders.recv() => match order {
                    Some(Order::Follow(list)) => self.follow(list),
                    Some(Order::Drop(list)) => self.forget(&list),
                    None => return,
                },
                heard = news.recv() => match heard {
                    Some(heard) => self.heard(heard),
                    None => return,
                },
                permit = commands.reserve(), if !self.outbox.is_empty() => match permit {
                    Ok(permit) => if let Some(command) = self.outbox.pop_front() {
                        permit.send(command);
                    },
                    Err(_) => return,
                },
                changed = state.changed() => match changed {
                    Ok(()) => {
                        let down = match &*state.borrow_and_update() {
                            State::Down(why) => Some(why.to_string()),
                            State::Connecting | State::Up(_) => None,
                        };
                        match down {
                            Some(why) => self.away(why),
                            // The lists say what was last until they are read.
                            None => self.why = None,
                        }
                    }
                    Err(_) => return,
                },
                _ = confirm.tick() => {
                    if !self.lists.is_empty() && !self.outbox.contains(&Command::AskProgress) {
                        self.outbox.push_back(Command::AskProgress);
                    }
                }
            }
        }
    }

    fn follow(&mut self, list: Arc<Shared>) {
        let range = list.range().clone();
        let why = self.refused.get(&range).or(self.why.as_ref());
        if let Some(why) = why {
            list.away(why);
        }
        let followed = self.lists.iter().any(|other| *other.range() == range);
        self.lists.push(list);
        if followed {
            self.outbox.push_back(Command::Reread(range));
        } else {
            self.follow_all();
        }
    }

    fn forget(&mut self, list: &Arc<Shared>) {
        self.lists.retain(|other| !Arc::ptr_eq(other, list));
        if self.lists.iter().all(|other| other.range() != list.range()) {
            self.refused.remove(list.range());
            self.follow_all();
        }
    }

    fn follow_all(&mut self) {
        let ranges: BTreeSet<Range> = self.lists.iter().map(|list| list.range().clone()).collect();
        self.outbox
            .retain(|command| !matches!(command, Command::Follow(_)));
        // First, so that what is to be read again is followed.
        self.outbox
            .push_front(Command::Follow(ranges.into_iter().collect()));
    }

    fn heard(&mut self, news: News) {
        match news {
            News::Snapshot { range, records, .. } => {
                self.why = None;
                self.refused.remove(&range);
                for list in self.of(&range) {
                    list.read(&records);
                }
            }
            News::Events { range, events, .. } => {
                for list in self.of(&range) {
                    list.events(&events);
                }
            }
            News::Progress(_) => self.lists.iter().for_each(|list| list.confirm()),
            News::KeysSeen {
                range,
                revision,
                keys,
            } => {
                let agree = self.of(&range).all(|list| list.agrees(revision, &keys));
                if !agree {
                    tracing::warn!(
                        below = %String::from_utf8_lossy(&range.start),
                        "the list is not that of etcd: reading it again"
                    );
                    self.outbox.push_back(Command::Reread(range));
                }
            }
            News::Refused(range, failure) => {
                for list in self.of(&range) {
                    list.away(&failure.message);
                }
                self.refused.insert(range, failure.message);
            }
            News::Broken(why) => self.away(why),
        }
    }

    fn of<'a>(&'a self, range: &'a Range) -> impl Iterator<Item = &'a Arc<Shared>> {
        self.lists.iter().filter(move |list| list.range() == range)
    }

    fn away(&mut self, why: String) {
        for list in &self.lists {
            list.away(&why);
        }
        self.why = Some(why);
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        for list in &self.lists {
            list.end();
        }
    }
}
