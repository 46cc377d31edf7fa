//! Free ports on 127.0.0.1.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::sync::Mutex;

use crate::error::{Error, Result};

/// Below the range that Linux takes the ports of outgoing connections from (32768 and up), so that a component that was
/// stopped finds its port still free when it comes back.
const RANGE: std::ops::Range<u16> = 12000..32000;

static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// A port that nobody listens on, and that this process has not given out before.
///
/// Another process may still take it first, so that whoever starts a component tries again with another port then.
pub fn free_port() -> Result<u16> {
    let mut given = GIVEN
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let size = u32::from(RANGE.end - RANGE.start);
    // Processes start at different places, so that they rarely try the same port.
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.subsec_nanos());
    let start = std::process::id().wrapping_mul(7919).wrapping_add(nanos);
    for offset in 0..size {
        let port = RANGE.start + (start.wrapping_add(offset) % size) as u16;
        if !given.contains(&port) && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            given.insert(port);
            return Ok(port);
        }
    }
    Err(Error::new(
        "ports",
        format!("no free port on 127.0.0.1 in {RANGE:?}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_port_is_given_twice() {
        let ports: BTreeSet<u16> = (0..50).map(|_| free_port().unwrap()).collect();
        assert_eq!(ports.len(), 50);
    }
}
