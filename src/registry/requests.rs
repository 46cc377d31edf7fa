//! Requests to etcd and what became of them.
//!
//! Takes [`Request`]s of the engine, gives exactly one [`Input::Answer`] to each, within a
//! deadline. Must never retry: what became of a request that failed is the engine's to find out.

use std::time::Duration;

use tokio::sync::mpsc;

use super::ask::ask;
pub use super::ask::execute;
use super::connection::Connection;
pub use super::connection::DEADLINE;
use crate::engine::io::Input;
use crate::model::etcd::Request;

/// Carries requests, each in a task of its own, so that lanes do not wait for each other.
#[derive(Clone, Debug)]
pub struct Requests {
    connection: Connection,
    deadline: Duration,
    inputs: mpsc::Sender<Input>,
}

impl Requests {
    /// Requests over this connection, to be answered into `inputs`. `deadline` is usually
    /// [`DEADLINE`]; it includes waiting for a connection.
    #[must_use]
    pub fn new(connection: Connection, deadline: Duration, inputs: mpsc::Sender<Input>) -> Self {
        Self {
            connection,
            deadline,
            inputs,
        }
    }

    /// Sends a request; [`Input::Answer`] with the same number follows, exactly once. How many
    /// are under way at a time is the engine's to limit.
    pub fn ask(&self, number: u64, request: Request) {
        let this = self.clone();
        tokio::spawn(async move {
            let answer = ask(&this.connection, request, this.deadline).await;
            // The engine is gone when the process ends; then nobody needs the answer.
            let _ = this.inputs.send(Input::Answer(number, answer)).await;
        });
    }
}
