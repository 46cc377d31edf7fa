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
use tonic::{Code, Status};

use super::connection::{Connection, State, describe};
use crate::engine::etcd::{
    Answer, Compare, Failure, FailureKind, KeyValue, Op, Refusal, Request, Revision, Txn,
};
use crate::engine::io::Input;

/// How long a request may take: less than a third of the default election TTL of 5 s, so that
/// a member that does not answer is left before the leader's lease ends.
pub const DEADLINE: Duration = Duration::from_millis(1500);

/// The largest answer that is read. One that reads whole ranges may be larger than the 4 MiB that
/// gRPC takes by default, and a watch response can hold many values of up to 1.5 MiB.
pub(super) const MAX_MESSAGE: usize = 64 << 20;

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

pub(super) fn late(endpoint: &str, deadline: Duration) -> String {
    format!("{endpoint}: no answer within {} ms", deadline.as_millis())
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

/// A key and its value as the engine takes them, without copying the bytes.
pub(super) fn key_value(kv: etcd_client::proto::PbKeyValue) -> KeyValue {
    KeyValue {
        key: kv.key.into(),
        value: kv.value.into(),
        lease: kv.lease,
        create_revision: kv.create_revision,
        mod_revision: kv.mod_revision,
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
pub(super) fn failure(error: &Error) -> Failure {
    Failure {
        kind: match error {
            Error::GRpcStatus(status) => kind(status),
            _ => FailureKind::Unknown,
        },
        message: describe(error),
    }
}

/// The texts are those of etcd's `api/v3rpc/rpctypes/error.go`, from 3.4 to 3.6. A refusal is
/// certain only in etcd's (or its gRPC library's) own words: a proxy on the way may answer with
/// the same codes after it has passed the request on.
fn kind(status: &Status) -> FailureKind {
    use FailureKind::{NoSpace, Refused, Unknown};
    let message = status.message();
    // The server's or this process's gRPC library refused the message unread or unsent.
    if message.starts_with("grpc: received message larger than max")
        || message.starts_with("Error, encoded message length too large")
    {
        return Refused(Refusal::TooLarge);
    }
    let Some(text) = message.strip_prefix("etcdserver: ") else {
        return Unknown;
    };
    match (status.code(), text) {
        (Code::PermissionDenied, _) => Refused(Refusal::Permission),
        (Code::InvalidArgument, "request is too large" | "too many operations in txn request") => {
            Refused(Refusal::TooLarge)
        }
        // These concern the login and not the request; they pass with a new one.
        (
            Code::InvalidArgument,
            "user name is empty"
            | "authentication failed, invalid user ID or password"
            | "revision of auth store is old",
        ) => Unknown,
        // Among them: duplicate key, empty key. All are found before anything is done.
        (Code::InvalidArgument, _) => Refused(Refusal::Invalid),
        (Code::OutOfRange, "too large lease TTL") => Refused(Refusal::Invalid),
        (Code::NotFound, "requested lease not found") => Refused(Refusal::LeaseNotFound),
        (Code::FailedPrecondition, "lease already exists") => Refused(Refusal::LeaseExists),
        (Code::ResourceExhausted, "mvcc: database space exceeded") => NoSpace,
        // No leader, leader changed, timed out, stopped, too many requests, not capable, a
        // learner, invalid token, corrupt: all may pass, and some after etcd has proposed it.
        _ => Unknown,
    }
}

/// Whether etcd said that the user may not touch a key.
pub(super) fn is_denied(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status)
        if kind(status) == FailureKind::Refused(Refusal::Permission))
}

/// Whether another endpoint or a new login could help.
pub(super) fn is_of_connection(error: &Error) -> bool {
    match error {
        Error::GRpcStatus(status) => match status.code() {
            // A new leader is being found; this member will know it as soon as another one.
            Code::Unavailable => status.message() != "etcdserver: leader changed",
            // This member shows that it is alive.
            Code::ResourceExhausted
            | Code::PermissionDenied
            | Code::NotFound
            | Code::AlreadyExists => false,
            Code::OutOfRange => false,
            Code::InvalidArgument => is_of_login(status.message()),
            Code::FailedPrecondition => {
                // A learner, or a member that has just started.
                status.message().contains("not supported for learner")
                    || status.message().contains("not capable")
            }
            _ => true,
        },
        Error::TransportError(_) | Error::IoError(_) | Error::EndpointError(_) => true,
        _ => false,
    }
}

/// Whether the text says that the login is missing, expired or outdated.
pub(super) fn is_of_login(text: &str) -> bool {
    [
        "invalid auth token",
        "user name is empty",
        "authentication failed",
        "revision of auth store is old",
    ]
    .iter()
    .any(|part| text.contains(part))
}

/// The revision of etcd at which an answer was given.
pub(super) fn revision_of(header: Option<&etcd_client::ResponseHeader>) -> Revision {
    header.map_or(0, etcd_client::ResponseHeader::revision)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(code: Code, message: &str) -> FailureKind {
        kind(&Status::new(code, message))
    }

    #[test]
    fn refusals_are_told_from_unknown_outcomes() {
        use FailureKind::{NoSpace, Refused, Unknown};
        for (code, message, expected) in [
            (
                Code::PermissionDenied,
                "etcdserver: permission denied",
                Refused(Refusal::Permission),
            ),
            (
                Code::InvalidArgument,
                "etcdserver: request is too large",
                Refused(Refusal::TooLarge),
            ),
            (
                Code::InvalidArgument,
                "etcdserver: too many operations in txn request",
                Refused(Refusal::TooLarge),
            ),
            (
                Code::ResourceExhausted,
                "grpc: received message larger than max (3 vs. 2)",
                Refused(Refusal::TooLarge),
            ),
            (
                Code::InvalidArgument,
                "etcdserver: duplicate key given in txn request",
                Refused(Refusal::Invalid),
            ),
            (
                Code::InvalidArgument,
                "etcdserver: key is not provided",
                Refused(Refusal::Invalid),
            ),
            (
                Code::NotFound,
                "etcdserver: requested lease not found",
                Refused(Refusal::LeaseNotFound),
            ),
            (
                Code::FailedPrecondition,
                "etcdserver: lease already exists",
                Refused(Refusal::LeaseExists),
            ),
            (
                Code::OutOfRange,
                "etcdserver: too large lease TTL",
                Refused(Refusal::Invalid),
            ),
            (
                Code::ResourceExhausted,
                "etcdserver: mvcc: database space exceeded",
                NoSpace,
            ),
            (
                Code::ResourceExhausted,
                "etcdserver: too many requests",
                Unknown,
            ),
            (Code::Unavailable, "etcdserver: leader changed", Unknown),
            (Code::Unavailable, "etcdserver: request timed out", Unknown),
            (
                Code::Unauthenticated,
                "etcdserver: invalid auth token",
                Unknown,
            ),
            (
                Code::InvalidArgument,
                "etcdserver: revision of auth store is old",
                Unknown,
            ),
            (
                Code::InvalidArgument,
                "etcdserver: user name is empty",
                Unknown,
            ),
            (Code::FailedPrecondition, "etcdserver: not capable", Unknown),
            // The same codes from a proxy on the way.
            (Code::PermissionDenied, "403 Forbidden", Unknown),
            (Code::InvalidArgument, "bad request", Unknown),
            (Code::Cancelled, "operation was canceled", Unknown),
        ] {
            assert_eq!(of(code, message), expected, "{code:?} {message}");
        }
    }

    #[test]
    fn the_connection_is_told_what_it_can_mend() {
        for (code, message, expected) in [
            (Code::Unavailable, "etcdserver: no leader", true),
            (Code::Unavailable, "tcp connect error", true),
            (Code::Unavailable, "etcdserver: leader changed", false),
            (Code::DeadlineExceeded, "", true),
            (
                Code::Unauthenticated,
                "etcdserver: invalid auth token",
                true,
            ),
            (
                Code::InvalidArgument,
                "etcdserver: revision of auth store is old",
                true,
            ),
            (
                Code::InvalidArgument,
                "etcdserver: duplicate key given in txn request",
                false,
            ),
            (
                Code::PermissionDenied,
                "etcdserver: permission denied",
                false,
            ),
            (
                Code::ResourceExhausted,
                "etcdserver: mvcc: database space exceeded",
                false,
            ),
            (
                Code::NotFound,
                "etcdserver: requested lease not found",
                false,
            ),
            (
                Code::FailedPrecondition,
                "etcdserver: lease already exists",
                false,
            ),
            (
                Code::FailedPrecondition,
                "etcdserver: rpc not supported for learner",
                true,
            ),
        ] {
            let error = Error::GRpcStatus(Status::new(code, message));
            assert_eq!(is_of_connection(&error), expected, "{code:?} {message}");
        }
    }
}
