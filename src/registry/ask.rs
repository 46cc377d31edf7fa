//! One request to etcd and what became of it.
//!
//! Takes a request and a client or a connection, gives its answer within a deadline. Must never retry: what became of a
//! request that failed is for the caller to find out.

use std::time::Duration;

use etcd_client::proto::PbTxnOpResponse;
use etcd_client::{
    Client, Compare as EtcdCompare, CompareOp, Error, GetOptions, LeaseGrantOptions,
    LeaseTimeToLiveOptions, PutOptions, Txn as EtcdTxn, TxnOp,
};
use tokio::time::{Instant, timeout_at};

use super::connection::{Connection, DEADLINE, State, describe};
use super::failure::{MAX_MESSAGE, is_of_connection, key_value, kind, late};
use crate::model::etcd::{Answer, Compare, Failure, FailureKind, LeaseId, Op, Request, Txn};

/// Sends one request over the session that there is, which is told where it does not work.
///
/// # Errors
///
/// What etcd or the connection said; no answer within the deadline, which includes waiting for a session, is
/// [`FailureKind::Unknown`].
pub async fn ask(
    connection: &Connection,
    request: Request,
    deadline: Duration,
) -> Result<Answer, Failure> {
    over(connection, deadline, async |client| {
        send(client, request).await
    })
    .await
}

/// Keeps a lease alive once; gives whether it lives.
///
/// # Errors
///
/// As for [`ask`].
pub async fn keep_alive(
    connection: &Connection,
    lease: LeaseId,
    deadline: Duration,
) -> Result<bool, Failure> {
    over(connection, deadline, async |client| {
        match client.lease_client().keep_alive(lease).await {
            Ok(_) => Ok(true),
            Err(error) if speaks_of_lease(&error) => Ok(false),
            Err(error) => Err(error),
        }
    })
    .await
}

/// Whether a stream of keepalives could not be made because its first lease is gone (see `LeaseClient::keep_alive`).
pub(super) fn speaks_of_lease(error: &Error) -> bool {
    matches!(error, Error::LeaseKeepAliveError(text) if text == "lease not found")
}

/// The seconds that are left on a lease, and its TTL; `None`: there is no such lease.
pub type Remaining = Option<(i64, i64)>;

/// How long a lease goes on without a keepalive.
///
/// # Errors
///
/// As for [`execute`].
pub async fn remaining(client: &Client, lease: LeaseId) -> Result<Remaining, Failure> {
    let mut leases = client.lease_client();
    match tokio::time::timeout(DEADLINE, leases.time_to_live(lease, None)).await {
        Ok(Ok(told)) => Ok((told.ttl() >= 0).then(|| (told.ttl(), told.granted_ttl()))),
        Ok(Err(error)) => Err(failure(&error)),
        Err(_) => Err(unknown(late("etcd", DEADLINE))),
    }
}

async fn over<T>(
    connection: &Connection,
    deadline: Duration,
    work: impl AsyncFnOnce(&Client) -> Result<T, Error>,
) -> Result<T, Failure> {
    let until = Instant::now() + deadline;
    let Ok(session) = timeout_at(until, connection.ready()).await else {
        let message = match &*connection.state().borrow() {
            State::Down(why) => why.to_string(),
            State::Connecting | State::Up(_) => "not connected to etcd yet".to_owned(),
        };
        return Err(unknown(message));
    };
    match timeout_at(until, work(&session.client)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => {
            if is_of_connection(&error) {
                connection.failed(session.generation, &describe(&error));
            }
            Err(failure(&error))
        }
        Err(_) => {
            let message = late(&session.endpoint, deadline);
            connection.failed(session.generation, &message);
            Err(unknown(message))
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
