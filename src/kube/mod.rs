//! The Kubernetes side: the watches, the probe, the status writer and events.
//!
//! Takes what the API server says and gives it to the engine as inputs; takes the engine's effects
//! and writes them. Must never decide anything about records, and never let an error look like an
//! empty list.
//!
//! | file | what |
//! |---|---|
//! | `client` | the connection, from a kubeconfig or the ServiceAccount |
//! | `wire` | JSON or protobuf to slim objects; pure |
//! | `session` | the state of one list+watch; pure |
//! | `answer` | the body of an answer, event by event |
//! | `watch` | carries bytes between a session and the API server |
//! | `merge` | the watches of several namespaces --> one; pure but for its channels |
//! | `lists` | requests that are made once: lists, for commands, and what the probe asks |
//! | `probe` | asks the API server when all else is quiet; whose cluster it is |
//! | `status` | writes statuses by server-side apply |
//! | `events` | writes Kubernetes Events |

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kube::client::AuthError;

mod answer;
pub mod client;
pub mod events;
pub mod lists;
pub mod merge;
pub mod probe;
pub mod session;
pub mod status;
pub mod watch;
pub mod wire;

/// The API group of the project.
pub const GROUP: &str = "etcd-registrar.io";
/// The version of the API.
pub const VERSION: &str = "v1alpha1";
/// The kind of a registration.
pub const KIND: &str = "ServiceRegistration";
/// The resource of the kind in a path.
pub const PLURAL: &str = "serviceregistrations";

/// When the API server was last heard; clones share it.
#[derive(Clone, Debug)]
pub struct Heard {
    start: Instant,
    /// Milliseconds since `start`.
    last: Arc<AtomicU64>,
}

impl Heard {
    /// Heard now, so that a starting process has time to ask.
    #[must_use]
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            last: Arc::new(AtomicU64::new(0)),
        }
    }

    /// The API server was heard just now.
    pub fn now(&self) {
        self.last.store(self.elapsed(), Ordering::Relaxed);
    }

    /// The time since it was last heard.
    #[must_use]
    pub fn silence(&self) -> Duration {
        Duration::from_millis(
            self.elapsed()
                .saturating_sub(self.last.load(Ordering::Relaxed)),
        )
    }

    fn elapsed(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Default for Heard {
    fn default() -> Self {
        Self::new()
    }
}

/// Lets one line a pause through to the log and counts the others.
#[derive(Debug)]
struct LogLimit {
    last: Option<Instant>,
    held_back: u64,
}

impl LogLimit {
    /// A fault of the API server hits all objects at once: one line in half a minute tells it.
    const PAUSE: Duration = Duration::from_secs(30);

    const fn new() -> Self {
        Self {
            last: None,
            held_back: 0,
        }
    }

    /// How many lines were held back before this one; `None`: hold this one back, too.
    fn pass(&mut self, now: Instant) -> Option<u64> {
        if self
            .last
            .is_some_and(|last| now.saturating_duration_since(last) < Self::PAUSE)
        {
            self.held_back += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.held_back))
    }
}

/// What a person can use of an error of kube: its sources too, where they say more.
pub(crate) fn explain(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return format!("{} (HTTP {})", status.message, status.code);
    }
    if let Some(said) = login_failed(error) {
        return said;
    }
    let mut said = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        let inner_said = inner.to_string();
        if !said.contains(&inner_said) {
            said = format!("{said}: {inner_said}");
        }
        source = inner.source();
    }
    said
}

/// What can be told of a program for tokens that failed. kube would repeat what it printed, and that may be
/// a token.
fn login_failed(error: &kube::Error) -> Option<String> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = source {
        let auth = match inner.downcast_ref::<kube::Error>() {
            Some(kube::Error::Auth(auth)) => Some(auth),
            _ => inner.downcast_ref::<AuthError>(),
        };
        match auth {
            Some(AuthError::AuthExecRun { cmd, out }) => {
                let status = out.status;
                return Some(format!(
                    "the program {cmd:?}, which the kubeconfig names for the login, failed ({status})"
                ));
            }
            Some(AuthError::AuthExecParse(_)) => {
                return Some(
                    "the program that the kubeconfig names for the login printed no ExecCredential"
                        .to_owned(),
                );
            }
            _ => source = inner.source(),
        }
    }
    None
}

/// The HTTP status code of an error, when the API server gave one.
fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_for_tokens_printed_is_not_shown() {
        let out = std::process::Command::new("sh")
            .args(["-c", "echo s3cret; echo s3cret >&2; exit 7"])
            .output()
            .unwrap();
        let failed = || AuthError::AuthExecRun {
            cmd: "get-token".into(),
            out: Box::new(out.clone()),
        };
        let wrapped = kube::Error::Service(Box::new(failed()));
        for error in [kube::Error::Auth(failed()), wrapped] {
            assert!(error.to_string().contains("s3cret"));
            let said = explain(&error);
            assert!(said.contains("get-token") && said.contains('7'), "{said}");
            assert!(!said.contains("s3cret"), "{said}");
        }
    }

    #[test]
    fn the_log_limit_counts_what_it_holds_back() {
        let mut limit = LogLimit::new();
        let start = Instant::now();
        assert_eq!(limit.pass(start), Some(0));
        assert_eq!(limit.pass(start), None);
        assert_eq!(limit.pass(start + LogLimit::PAUSE / 2), None);
        assert_eq!(limit.pass(start + LogLimit::PAUSE), Some(2));
    }
}
