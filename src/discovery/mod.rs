//! The discovery library: a service or a prefix --> the live list of its endpoints.
//!
//! Takes where etcd is and what is looked for ([`Source`]), gives endpoints: as a snapshot, as a stream of changes, or as a
//! balanced gRPC channel. Must never take an error for an empty list, end the process, or block a thread.
//!
//! ```no_run
//! use etcd_registrar::discovery::{Discovery, Settings, Source};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let discovery = Discovery::connect(Settings {
//!     endpoints: vec!["http://127.0.0.1:2379".to_owned()],
//!     ..Settings::default()
//! })
//! .await?;
//! let web = discovery.follow(Source::service("shop", "web")?);
//! web.ready().await;
//! for endpoint in &*web.snapshot() {
//!     println!("{} in {}", endpoint.url(), endpoint.zone().unwrap_or("?"));
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A list is read and then watched from the revision after. When the watch breaks, for whatever reason (a lost connection, a
//! compaction, an etcd that was wiped or restored), the list is read anew and compared. While etcd does not answer, the
//! list stays as it was last, and [`Service::age`] says how old that is. What a *reachable* etcd holds is believed, also
//! when it holds nothing.

mod balance;
mod driver;
mod endpoint;
mod set;
mod shared;
mod source;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::sync::mpsc;

use driver::Order;
use shared::Shared;

pub use crate::format::Format;
pub use crate::registry::connection::{ConnectError, Settings};
pub use endpoint::{Endpoint, Id};
pub use set::Change;
pub use source::{Source, SourceError};

/// How far a list can be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing was read yet, and why, where that is known. The list is empty because nothing is known.
    Waiting(Option<String>),
    /// The list is that of etcd.
    Live,
    /// The list is that of [`Service::age`] ago, and why it is not read now.
    Stale(String),
}

/// One connection to etcd, over which any number of lists are followed. Clones share it; it ends with the last of them and of
/// the [`Service`]s that came from it.
#[derive(Clone, Debug)]
pub struct Discovery {
    orders: mpsc::UnboundedSender<Order>,
}

impl Discovery {
    /// Checks the settings and connects in the background, within a runtime of tokio.
    ///
    /// # Errors
    ///
    /// Settings that can't work: a malformed URL, a file that is missing. That etcd does not answer is none:
    /// [`Service::state`] says it, and it is tried again for ever.
    pub async fn connect(settings: Settings) -> Result<Self, ConnectError> {
        Ok(Self {
            orders: driver::start(settings).await?,
        })
    }

    /// Follows what a source names.
    #[must_use]
    pub fn follow(&self, source: Source) -> Service {
        let shared = Arc::new(Shared::new(source));
        // The driver ends before its handles only with the runtime; then the list stays as it is.
        let _ = self.orders.send(Order::Follow(Arc::clone(&shared)));
        Service(Arc::new(Held {
            orders: self.orders.clone(),
            shared,
        }))
    }

    /// Follows a service in the default format, of all clusters: [`Source::service`].
    ///
    /// # Errors
    ///
    /// When namespace or service can't be names.
    pub fn service(&self, namespace: &str, service: &str) -> Result<Service, SourceError> {
        Ok(self.follow(Source::service(namespace, service)?))
    }

    /// Follows all services below a prefix: [`Source::prefix`].
    ///
    /// # Errors
    ///
    /// When the prefix can't be one of the format.
    pub fn prefix(&self, format: Format, prefix: &str) -> Result<Service, SourceError> {
        Ok(self.follow(Source::prefix(format, prefix)?))
    }
}

/// What the handles of a list share; the driver has the list alone, and is told when the last handle is gone.
#[derive(Debug)]
struct Held {
    orders: mpsc::UnboundedSender<Order>,
    shared: Arc<Shared>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.orders.send(Order::Drop(Arc::clone(&self.shared)));
    }
}

/// The live list of a source. Clones share it; it is followed until the last of them is dropped.
#[derive(Clone, Debug)]
pub struct Service(Arc<Held>);

/// A list as it was at one moment; cheap to clone.
pub type Snapshot = Arc<[Arc<Endpoint>]>;

impl Service {
    /// What is followed.
    #[must_use]
    pub fn source(&self) -> &Source {
        self.0.shared.source()
    }

    /// The endpoints as they are known now, sorted by namespace, service, cluster and address. Without a change since the last
    /// call it costs a counter; after one, a pointer for each endpoint.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.0.shared.snapshot()
    }

    /// Waits until the list was read once; later it returns at once, also while etcd is away. It waits for as long as that takes:
    /// put it into a timeout where something else can be done.
    pub async fn ready(&self) {
        self.0
            .shared
            .wait_for_state(|state| !matches!(state, State::Waiting(_)))
            .await;
    }

    /// Whether the list is that of etcd, and if not, why.
    #[must_use]
    pub fn state(&self) -> State {
        self.0.shared.state()
    }

    /// Waits until the state is another than this one, and gives it.
    pub async fn state_other_than(&self, known: &State) -> State {
        self.0.shared.wait_for_state(|state| state != known).await
    }

    /// How long ago etcd confirmed the list; `None`: it was never read. While the list is live, that is up to some two seconds; it
    /// grows while etcd is away.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        self.0.shared.age()
    }

    /// How many records stand there that can't be read in the format. Each is named in a warning once.
    #[must_use]
    pub fn unreadable(&self) -> usize {
        self.0.shared.unreadable()
    }

    /// What changes from now on. The endpoints that are known already come first, as added: who begins with an empty list and
    /// applies all changes has the list. What happens faster than it is taken is joined, so that a slow reader
    /// costs no more memory than the list, and sees what became of it.
    #[must_use]
    pub fn changes(&self) -> Changes {
        Changes {
            number: self.0.shared.add_reader(),
            taken: std::collections::VecDeque::new(),
            service: self.clone(),
        }
    }
}

/// A stream of changes of one list. It ends only with the runtime.
#[derive(Debug)]
pub struct Changes {
    number: u64,
    /// Taken from the list, to be given one by one.
    taken: std::collections::VecDeque<Change>,
    service: Service,
}

impl Changes {
    /// The next change. Can be dropped at any time without losing one.
    pub async fn next(&mut self) -> Option<Change> {
        std::future::poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }
}

impl Stream for Changes {
    type Item = Change;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Change>> {
        if self.taken.is_empty() {
            match self.service.0.shared.poll_reader(self.number, context) {
                Poll::Ready(Some(changes)) => self.taken = changes.into(),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(self.taken.pop_front())
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.service.0.shared.drop_reader(self.number);
    }
}

/// The programs in the page have to compile.
#[cfg(doctest)]
#[doc = include_str!("../../docs/discovery.md")]
struct Page;
