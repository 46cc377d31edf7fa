//! Waiting for a state instead of sleeping.

use std::fmt::Display;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How often a state is looked at while waiting for it.
const INTERVAL: Duration = Duration::from_millis(20);

/// Calls `check` until it gives a value, at most for `timeout`.
///
/// The error at the end says what was waited for, for how long, and what the last attempt said:
///
/// ```
/// # use std::time::Duration;
/// let value = testbed::eventually(Duration::from_secs(1), "a number", || Ok::<_, String>(7));
/// assert_eq!(value.unwrap(), 7);
/// ```
pub fn eventually<T, E: Display>(
    timeout: Duration,
    what: &str,
    mut check: impl FnMut() -> std::result::Result<T, E>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        let last = match check() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if start.elapsed() >= timeout {
            return Err(Error::new(
                "timeout",
                format!("waited {timeout:?} for {what}; last seen: {last}"),
            ));
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Checks for the whole of `duration` that `check` does not fail.
///
/// For what must *not* happen, such as a key that must not be deleted.
pub fn always<E: Display>(
    duration: Duration,
    what: &str,
    mut check: impl FnMut() -> std::result::Result<(), E>,
) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < duration {
        if let Err(error) = check() {
            return Err(Error::new(
                "invariant",
                format!("{what} did not hold after {:?}: {error}", start.elapsed()),
            ));
        }
        std::thread::sleep(INTERVAL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timeout_says_what_was_seen_last() {
        let error = eventually(Duration::from_millis(50), "three keys", || {
            Err::<(), _>("two keys")
        })
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("three keys") && error.contains("two keys"),
            "{error}"
        );
    }

    #[test]
    fn always_stops_at_the_first_failure() {
        let mut left = 2;
        let error = always(Duration::from_secs(5), "the key", || {
            left -= 1;
            if left == 0 { Err("gone") } else { Ok(()) }
        });
        assert!(error.unwrap_err().to_string().contains("gone"));
    }
}
