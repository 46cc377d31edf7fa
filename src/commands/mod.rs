//! The commands beside `run`, a file each: flags --> what is printed, and an exit code.
//!
//! Each takes its flags and prints to standard output what was asked for, to standard error what else is to be said. They must never
//! print what was not read, and share nothing with a running operator but its code.

pub mod completions;
pub mod diff;
pub mod discover;
pub mod doctor;
pub mod register;
pub mod tree;

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::accept::policy::Policy;
use crate::registry::connection::{Connection, Session, Settings, State};

/// A connection that answered within `timeout`.
///
/// # Errors
///
/// Settings that can't work, and an etcd that does not answer in time.
pub(crate) async fn connect(
    settings: Settings,
    timeout: Duration,
) -> Result<(Connection, Arc<Session>), String> {
    let connection = Connection::connect(settings)
        .await
        .map_err(|error| error.to_string())?;
    let ready = tokio::time::timeout(timeout, connection.ready()).await;
    match ready {
        Ok(session) => Ok((connection, session)),
        Err(_) => {
            let why = match &*connection.state().borrow() {
                State::Down(why) => why.to_string(),
                State::Connecting | State::Up(_) => "no answer".to_owned(),
            };
            Err(format!("etcd can't be reached: {why}"))
        }
    }
}

/// Reads a policy file; without one, what holds then.
///
/// # Errors
///
/// Names the flag, the file and what is wrong with it.
pub(crate) fn read_policy(path: Option<&Path>) -> Result<Policy, String> {
    let Some(path) = path else {
        return Ok(Policy::default());
    };
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string());
    text.and_then(|text| Policy::parse(&text).map_err(|error| error.to_string()))
        .map_err(|error| format!("--policy-file {}: {error}", path.display()))
}

/// Warnings go to standard error as the commands' own words do; the state of the connection they say themselves.
///
/// # Errors
///
/// When there is a log already.
pub(crate) fn start_log() -> Result<(), String> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::WARN)
        .with_target(false)
        .with_ansi(false)
        .without_time()
        .try_init()
        .map_err(|error| format!("can't start the log: {error}"))
}

/// Prints to standard output. Who reads through `head` has enough at some point.
///
/// # Errors
///
/// When it can't be written to.
pub(crate) fn print(text: &str) -> Result<(), String> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.map_err(|error| format!("can't print: {error}")),
    }
}

/// A text that anybody may have written, so that it can't move a terminal's cursor.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// `1 lease`, `2 leases`.
pub(crate) fn counted(number: usize, thing: &str) -> String {
    match number {
        1 => format!("1 {thing}"),
        _ => format!("{number} {thing}s"),
    }
}
