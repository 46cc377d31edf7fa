//! The registration library: addresses of a process outside Kubernetes --> records in etcd, for as long as it runs.
//!
//! Takes where etcd is and what is to be registered ([`Instance`]), gives a [`Registration`]: records as the operator writes them,
//! on a lease that is kept alive. Must never overwrite or delete a key of another writer, end the process, or block a thread.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use etcd_registrar::registration::{Instance, Registrar, Settings};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let registrar = Registrar::connect(Settings {
//!     endpoints: vec!["http://127.0.0.1:2379".to_owned()],
//!     ..Settings::default()
//! })
//! .await?;
//! // /services/shop/web/vm/10.0.0.5:8080
//! let web = Instance::new("vm", "shop", "web", "10.0.0.5:8080".parse()?)?;
//! let registration = registrar.register(Duration::from_secs(15), [web.clone()])?;
//! registration.registered().await;
//! // The value changes in place.
//! registration.update([web.weight(50)?])?;
//! // Gone at once. Without it, the record stays until its lease ends.
//! registration.close().await?;
//! # Ok(())
//! # }
//! ```
//!
//! What stands in etcd is watched: a record whose lease was lost, that somebody deleted or altered, is written again. A key that
//! another writer has is left alone ([`State::Conflict`]), and taken when it is free. Each put is a transaction that compares what
//! it replaces, and one whose outcome is not known is read back before anything else is done.

mod core;
mod driver;
mod instance;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};

use crate::registry::connection::Connection;
use driver::{Order, Told};
use instance::keys_of;

pub use crate::format::Format;
pub use crate::model::endpoint::Protocol;
pub use crate::registry::connection::{ConnectError, Settings};
pub use instance::{Instance, InstanceError};

/// The shortest and the longest TTL of a lease in seconds: those of a ServiceRegistration.
const TTL: std::ops::RangeInclusive<u64> = 5..=86_400;

/// How far a registration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Not everything stands as it should, or that is not known while etcd is away, and why, where that is known. What stands
    /// already stays at least until its lease ends.
    Waiting(Option<String>),
    /// Every key stands as it should, and none that should not: etcd said so.
    Registered,
    /// Another writer has a key. It is left alone, and taken when it is free; the other keys are registered.
    Conflict {
        /// The key.
        key: String,
        /// Whose it is, as far as it tells.
        owner: String,
    },
    /// etcd refuses, and why. It is tried again; usually a person has to do something first.
    Refused(String),
    /// It was closed, or the runtime has ended.
    Closed,
}

/// What can't be registered so.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RegistrationError {
    /// An instance can't be registered, or two of them not beside each other.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// The TTL is none.
    #[error("the TTL {0:?} can't be used: write whole seconds from 5 s to 86400 s")]
    Ttl(Duration),
    /// The registration was closed.
    #[error("the registration was closed")]
    Closed,
}

/// Why a registration was not taken out of etcd. Its records go when their lease ends.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the records could not be removed, and go when their lease ends: {why}")]
pub struct CloseError {
    /// What etcd or the connection said.
    pub why: String,
}

/// A connection to etcd, for any number of registrations. Clones share it; it ends with the last of them and of the
/// [`Registration`]s that came from it.
#[derive(Clone, Debug)]
pub struct Registrar {
    connection: Connection,
}

impl Registrar {
    /// Checks the settings and connects in the background, within a runtime of tokio.
    ///
    /// # Errors
    ///
    /// Settings that can't work: a malformed URL, a file that is missing. That etcd does not answer is none:
    /// [`Registration::state`] says it, and it is tried again for ever.
    pub async fn connect(settings: Settings) -> Result<Self, ConnectError> {
        let connection = Connection::connect(settings).await?;
        Ok(Self { connection })
    }

    /// Registers these, together on one lease (but one for each key where the format asks for it: GoMicro), within a runtime of
    /// tokio. So long after a crash of this process the records go: `ttl`, in whole seconds.
    ///
    /// # Errors
    ///
    /// When the TTL can't be used, or the instances can't stand beside each other.
    pub fn register(
        &self,
        ttl: Duration,
        instances: impl IntoIterator<Item = Instance>,
    ) -> Result<Registration, RegistrationError> {
        if ttl.subsec_nanos() != 0 || !TTL.contains(&ttl.as_secs()) {
            return Err(RegistrationError::Ttl(ttl));
        }
        let instances: Vec<_> = instances.into_iter().collect();
        let groups = instance::groups(&instances)?;
        let asked = Mutex::new(Asked {
            update: 0,
            keys: keys_of(&groups),
        });
        let (orders, received) = mpsc::unbounded_channel();
        let (sender, told) = watch::channel(Told {
            state: State::Waiting(None),
            update: 0,
        });
        let connection = self.connection.clone();
        tokio::spawn(driver::run(connection, ttl, groups, received, sender));
        Ok(Registration {
            orders,
            told,
            asked,
        })
    }
}

/// Records that are kept in etcd. When it is dropped without [`Registration::close`], they stay until their lease ends, and nobody
/// keeps it alive.
#[derive(Debug)]
#[must_use = "the records are left to expire when it is dropped"]
pub struct Registration {
    orders: mpsc::UnboundedSender<Order>,
    told: watch::Receiver<Told>,
    asked: Mutex<Asked>,
}

/// What was asked for last.
#[derive(Debug)]
struct Asked {
    /// The number of the update: what is told of earlier ones says nothing any more.
    update: u64,
    keys: Vec<String>,
}

impl Registration {
    /// Registers exactly these from now on: others of this registration are removed, a value that differs is written. None may
    /// be given. The identity of an instance ([`Instance::uid`]) is that of its value: change a clone of the one that was given.
    ///
    /// # Errors
    ///
    /// When the instances can't stand beside each other, or it was closed. Then everything stays as it was.
    pub fn update(
        &self,
        instances: impl IntoIterator<Item = Instance>,
    ) -> Result<(), RegistrationError> {
        let instances: Vec<_> = instances.into_iter().collect();
        let groups = instance::groups(&instances)?;
        let mut asked = self.asked();
        let (update, keys) = (asked.update + 1, keys_of(&groups));
        self.orders
            .send(Order::Want(update, groups))
            .map_err(|_| RegistrationError::Closed)?;
        *asked = Asked { update, keys };
        Ok(())
    }

    /// How far it is.
    #[must_use]
    pub fn state(&self) -> State {
        if self.told.has_changed().is_err() {
            return State::Closed;
        }
        self.of(&self.told.borrow())
    }

    /// The state after the last update: what was told before it is none.
    fn of(&self, told: &Told) -> State {
        if told.update < self.asked().update {
            return State::Waiting(None);
        }
        told.state.clone()
    }

    /// A panic elsewhere leaves it whole: it is changed at once.
    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the state is another than this one, and gives it.
    pub async fn state_other_than(&self, known: &State) -> State {
        self.wait(|state| state != known).await
    }

    /// Waits until everything stands in etcd as it should, for as long as that takes: put it into a timeout where something
    /// else can be done. It returns, too, when the registration was closed.
    pub async fn registered(&self) {
        self.wait(|state| matches!(state, State::Registered | State::Closed))
            .await;
    }

    /// The keys that are to stand, sorted.
    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        self.asked().keys.clone()
    }

    /// Revokes the lease, and the records go with it. Other writers' keys stay. Once it was called, it goes on also when the
    /// future is dropped.
    ///
    /// # Errors
    ///
    /// When etcd did not do it within one TTL: then the records go by themselves.
    pub async fn close(&self) -> Result<(), CloseError> {
        let (sender, closed) = oneshot::channel();
        if self.orders.send(Order::Close(sender)).is_err() {
            // It was closed before.
            return Ok(());
        }
        closed.await.unwrap_or_else(|_| {
            let why = "the runtime that it belonged to has ended".to_owned();
            Err(CloseError { why })
        })
    }

    async fn wait(&self, wanted: impl Fn(&State) -> bool) -> State {
        let mut told = self.told.clone();
        match told.wait_for(|told| wanted(&self.of(told))).await {
            Ok(told) => self.of(&told),
            Err(_) => State::Closed,
        }
    }
}

/// The programs in the page have to compile.
#[cfg(doctest)]
#[doc = include_str!("../../docs/registration.md")]
struct Page;

/// And those in the page that shows what replaces the tutorials' programs.
#[cfg(doctest)]
#[doc = include_str!("../../docs/from-tutorials.md")]
struct Tutorials;
