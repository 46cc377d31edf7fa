//! Plain: `{prefix}{service}/{address}` -> `{address}`.
//!
//! Takes and gives what go-zero, go-kit, confd and most hand-written registries read. Must never
//! write anything but the address: these readers take any value for one.

use std::fmt::Write as _;
use std::net::IpAddr;

use super::{Discovered, Place, ReadError, Record, is_address, service_and_last};
use crate::model::endpoint::Endpoint;

/// As the golden record has it.
pub(super) const DEFAULT_PREFIX: &str = "/";

/// The longest `[address]:port`: 39 characters of IPv6, brackets, colon, five digits.
pub(super) const MAX_HOST_PORT: usize = 47;

/// `{prefix}{service}/{address}`, and where the address begins in it.
pub(super) fn key(place: &Place<'_>, endpoint: &Endpoint) -> (String, usize) {
    let start = place.prefix.len() + endpoint.service.len() + 1;
    let mut key = String::with_capacity(start + MAX_HOST_PORT);
    key.push_str(place.prefix);
    key.push_str(&endpoint.service);
    key.push('/');
    push_host_port(&mut key, endpoint);
    (key, start)
}

/// Appends `host:port`.
pub(super) fn push_host_port(text: &mut String, endpoint: &Endpoint) {
    let (ip, port) = endpoint.target.socket();
    match ip {
        IpAddr::V4(ip) => {
            for (at, octet) in ip.octets().into_iter().enumerate() {
                if at > 0 {
                    text.push('.');
                }
                push_decimal(text, octet.into());
            }
        }
        IpAddr::V6(ip) => {
            // Writing to a String can't fail.
            let _ = write!(text, "[{ip}]");
        }
    }
    text.push(':');
    push_decimal(text, port);
}

/// Without the machinery of `fmt`: each key and value has some such numbers.
fn push_decimal(text: &mut String, number: u16) {
    if number > 9 {
        push_decimal(text, number / 10);
    }
    text.extend(char::from_digit(u32::from(number % 10), 10));
}

/// The record of an endpoint.
pub(super) fn record(place: &Place<'_>, endpoint: &Endpoint) -> Record {
    let (key, start) = key(place, endpoint);
    let value = key.as_bytes().get(start..).unwrap_or_default().to_vec();
    Record {
        key,
        value,
        targets: vec![endpoint.target],
    }
}

/// What a record tells. The last segment of the key can be anything: go-zero's own publisher
/// writes a lease id there.
pub(super) fn read(below: &str, value: &[u8]) -> Result<Discovered, ReadError> {
    let (service, _) = service_and_last(below)?;
    let address = std::str::from_utf8(value)
        .ok()
        .filter(|address| is_address(address))
        .ok_or_else(|| ReadError::Value("an address".to_owned()))?;
    Ok(Discovered {
        socket: address.parse().ok(),
        address: address.to_owned(),
        service: service.to_owned(),
        ..Discovered::default()
    })
}
