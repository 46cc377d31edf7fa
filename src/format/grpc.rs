//! Grpc: etcd's own `client/v3/naming`, the resolver of gRPC-Go, dialled as
//! `etcd:///{prefix}{service}`.
//!
//! Takes and gives what that package reads. Must never write an object as `Metadata`: grpc-go
//! panics on one (seen with 1.59).

use serde::{Deserialize, Serialize};

use super::plain::{MAX_HOST_PORT, key};
use super::{Discovered, Place, ReadError, Record, is_address, service_and_last};
use crate::model::endpoint::Endpoint;

/// As the golden record has it.
pub(super) const DEFAULT_PREFIX: &str = "";

/// `naming/endpoints/internal.Update` of etcd's Go client, in its order. The operation is always 0
/// (add): readers take it from the event.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(rename = "Op")]
    op: u8,
    #[serde(rename = "Addr")]
    addr: &'a str,
    #[serde(rename = "Metadata")]
    metadata: (),
}

/// What is read of it; `Metadata` can be any JSON and is left alone.
#[derive(Deserialize)]
struct Read<'a> {
    #[serde(rename = "Addr", borrow)]
    addr: std::borrow::Cow<'a, str>,
}

/// The record of an endpoint.
pub(super) fn record(place: &Place<'_>, endpoint: &Endpoint) -> Record {
    let (key, start) = key(place, endpoint);
    // 33 characters stand around the address.
    let mut value = Vec::with_capacity(MAX_HOST_PORT + 33);
    let written = Written {
        op: 0,
        addr: key.get(start..).unwrap_or_default(),
        metadata: (),
    };
    // Numbers and text into memory: there is nothing that could fail.
    let _ = serde_json::to_writer(&mut value, &written);
    Record {
        key,
        value,
        targets: vec![endpoint.target],
    }
}

/// What a record tells. The last segment of the key can be anything: the address is in the value.
pub(super) fn read(below: &str, value: &[u8]) -> Result<Discovered, ReadError> {
    let (service, _) = service_and_last(below)?;
    let read: Read<'_> = serde_json::from_slice(value).map_err(|error| {
        ReadError::Value(format!("an update of etcd's naming package: {error}"))
    })?;
    if !is_address(&read.addr) {
        return Err(ReadError::Value("one with an address in `Addr`".to_owned()));
    }
    Ok(Discovered {
        socket: read.addr.parse().ok(),
        address: read.addr.into_owned(),
        service: service.to_owned(),
        ..Discovered::default()
    })
}
