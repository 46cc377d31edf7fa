//! What an answer of etcd holds, and what an error of it says.
//!
//! Takes answers and errors of the client, gives what they mean: whether etcd refused, and whether another endpoint
//! or a new login could help. Must never take an outcome for certain that is not.

use std::time::Duration;

use etcd_client::Error;
use tonic::{Code, Status};

use crate::model::etcd::{FailureKind, KeyValue, Refusal, Revision};

/// The largest answer that is read. One that reads whole ranges may be larger than the 4 MiB that
/// gRPC takes by default, and a watch response can hold many values of up to 1.5 MiB.
pub(super) const MAX_MESSAGE: usize = 64 << 20;

pub(super) fn late(endpoint: &str, deadline: Duration) -> String {
    format!("{endpoint}: no answer within {} ms", deadline.as_millis())
}

/// A key and its value as everything else takes them, without copying the bytes.
pub(super) fn key_value(kv: etcd_client::proto::PbKeyValue) -> KeyValue {
    KeyValue {
        key: kv.key.into(),
        value: kv.value.into(),
        lease: kv.lease,
        create_revision: kv.create_revision,
        mod_revision: kv.mod_revision,
    }
}

/// The texts are those of etcd's `api/v3rpc/rpctypes/error.go`, from 3.4 to 3.6. A refusal is
/// certain only in etcd's (or its gRPC library's) own words: a proxy on the way may answer with
/// the same codes after it has passed the request on.
pub(super) fn kind(status: &Status) -> FailureKind {
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
