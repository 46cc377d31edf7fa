//! Requests to etcd and what became of them.
//!
//! Takes [`Request`]s of the engine, gives exactly one [`Input::Answer`] to each, within a
//! deadline. Must never retry: what became of a request that failed is the engine's to find out.

use std::time::Duration;

use etcd_client::proto::PbTxnOpResponse;
use etcd_client::{
    Client, Compare as EtcdCompare, CompareOp, Error, GetOptions, LeaseGrantOptions,
    LeaseTimeToLiveOptions, PutOptions, Txn as EtcdTxn, TxnOp,
};
use tokio::sync::mpsc;

pub use super::connection::DEADLINE;
use super::connection::{Connection, State, describe};
use super::failure::{MAX_MESSAGE, is_of_connection, key_value, kind, late};
use crate::engine::io::Input;
use crate::model::etcd::{Answer, Compare, Failure, FailureKind, Op, Request, Txn};

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
            let answer = this.answer(request).await;
            // The engine is gone when the process ends; then nobody needs the answer.
            let _ = this.inputs.send(Input::Answer(number, answer)).await;
        });
    }

    async fn answer(&self, request: Request) -> Result<Answer, Failure> {
        let until = tokio::time::Instant::now() + self.deadline;
        let Ok(session) = tokio::time::timeout_at(until, self.connection.ready()).await else {
            let message = match &*self.connection.state().borrow() {
                State::Down(why) => why.to_string(),
                State::Connecting | State::Up(_) => "not connected to etcd yet".to_owned(),
            };
            return Err(unknown(message));
        };
        match tokio::time::timeout_at(until, send(&session.client, request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                if is_of_connection(&error) {
                    self.connection
                        .failed(session.generation, &describe(&error));
                }
                Err(failure(&error))
            }
            Err(_) => {
                let message = late(&session.endpoint, self.deadline);
                self.connection.failed(session.generation, &message);
                Err(unknown(message))
            }
        }
    }
}

/// Sends one request over a client and waits for its answer.
///
/// # Errors
///
/// What etcd or the connection said; no answer within the deadline is [`FailureKind::Unknown`].
pub async fn execute(
    client: &Client,
    request: Request,
    deadline: Duration,
) -> Result<Answer, Failure> {
    match tokio::time::timeout(deadline, send(client, request)).await {
        Ok(result) => result.map_err(|error| failure(&error)),
        Err(_) => Err(unknown(late("etcd", deadline))),
    }
}

fn unknown(message: String) -> Failure {
    Failure {
        kind: FailureKind::Unknown,
        message,
    }
}

async fn send(client: &Client, request: Request) -> Result<Answer, Error> {
    match request {
        Request::Txn(txn) => {
            let mut kv = client.kv_client().max_decoding_message_size(MAX_MESSAGE);
            let response = kv.txn(txn_request(txn)).await?.0;
            Ok(Answer::Txn {
                succeeded: response.succeeded,
                revision: response.header.map_or(0, |header| header.revision),
                reads: response
                    .responses
                    .into_iter()
                    .map(|op| match op.response {
                        Some(PbTxnOpResponse::ResponseRange(range)) => {
                            range.kvs.into_iter().map(key_value).collect()
                        }
                        _ => Vec::new(),
                    })
                    .collect(),
            })
        }
        Request::Grant(id, ttl) => {
            let options = LeaseGrantOptions::new().with_id(id);
            client.lease_client().grant(ttl, Some(options)).await?;
            Ok(Answer::Granted)
        }
        Request::Revoke(id) => {
            client.lease_client().revoke(id).await?;
            Ok(Answer::Revoked)
        }
        Request::LeaseKeys(id) => {
            let options = LeaseTimeToLiveOptions::new().with_keys();
            let response = client
                .lease_client()
                .time_to_live(id, Some(options))
                .await?
                .0;
            let keys = response.keys.into_iter().map(Into::into).collect();
            Ok(Answer::LeaseKeys(response.ttl, keys))
        }
    }
}

fn txn_request(txn: Txn) -> EtcdTxn {
    let compares: Vec<_> = txn.compares.into_iter().map(compare).collect();
    let then: Vec<_> = txn.then.into_iter().map(op).collect();
    let otherwise: Vec<_> = txn.otherwise.into_iter().map(op).collect();
    EtcdTxn::new()
        .when(compares)
        .and_then(then)
        .or_else(otherwise)
}

fn compare(compare: Compare) -> EtcdCompare {
    match compare {
        Compare::CreateRevision(key, revision) => {
            EtcdCompare::create_revision(&*key, CompareOp::Equal, revision)
        }
        Compare::ModRevision(key, revision) => {
            EtcdCompare::mod_revision(&*key, CompareOp::Equal, revision)
        }
        Compare::Value(key, value) => EtcdCompare::value(&*key, CompareOp::Equal, value),
        // Every key of the range must have version 0, and one that is there has at least 1. An
        // empty range compares as one key of version 0, so that it holds.
        Compare::Nothing(range) => {
            EtcdCompare::version(&*range.start, CompareOp::Equal, 0).with_range(&*range.end)
        }
    }
}

fn op(op: Op) -> TxnOp {
    match op {
        Op::Put(key, value, lease) => {
            TxnOp::put(&*key, value, Some(PutOptions::new().with_lease(lease)))
        }
        Op::Delete(key) => TxnOp::delete(&*key, None),
        Op::Get(key) => TxnOp::get(&*key, None),
        Op::GetRange(range) => TxnOp::get(
            &*range.start,
            Some(GetOptions::new().with_range(&*range.end)),
        ),
    }
}

/// What is known of a request that failed.
fn failure(error: &Error) -> Failure {
    Failure {
        kind: match error {
            Error::GRpcStatus(status) => kind(status),
            _ => FailureKind::Unknown,
        },
        message: describe(error),
    }
}
