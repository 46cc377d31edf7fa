//! Commands that go on: what they print is read line by line, each with the time at which it came.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::{Error, Result};

/// Something that was printed, and when.
#[derive(Clone, Debug)]
pub(crate) struct Timed<T> {
    pub(crate) at: Instant,
    pub(crate) what: T,
}

/// Everything that a command has told so far.
pub(crate) struct Feed<T> {
    shared: Arc<Shared<T>>,
    child: Child,
    name: &'static str,
}

struct Shared<T> {
    told: Mutex<Vec<Timed<T>>>,
    more: Condvar,
}

impl<T> Shared<T> {
    fn told(&self) -> MutexGuard<'_, Vec<Timed<T>>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone + Send + 'static> Feed<T> {
    /// Starts a command; `parse` makes something of its lines.
    pub(crate) fn start(
        name: &'static str,
        command: &mut Command,
        mut parse: impl FnMut(&str) -> Option<T> + Send + 'static,
    ) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| Error::new(name, error))?;
        let Some(output) = child.stdout.take() else {
            return Err(Error::new(name, "has no output"));
        };
        let shared = Arc::new(Shared {
            told: Mutex::new(Vec::new()),
            more: Condvar::new(),
        });
        let to = Arc::clone(&shared);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(|line| line.ok()) {
                // Before parsing: the reader's own work is not to be counted.
                let at = Instant::now();
                if let Some(what) = parse(&line) {
                    to.told().push(Timed { at, what });
                    to.more.notify_all();
                }
            }
        });
        Ok(Self {
            shared,
            child,
            name,
        })
    }

    /// How much was told so far: what comes later is "since" this.
    pub(crate) fn mark(&self) -> usize {
        self.shared.told().len()
    }

    /// What was told since a mark.
    pub(crate) fn since(&self, mark: usize) -> Vec<Timed<T>> {
        self.shared.told().get(mark..).unwrap_or_default().to_vec()
    }

    /// Waits until `enough` makes something of what was told since a mark.
    pub(crate) fn wait<R>(
        &self,
        mark: usize,
        timeout: Duration,
        what: &str,
        mut enough: impl FnMut(&[Timed<T>]) -> Option<R>,
    ) -> Result<R> {
        let end = Instant::now() + timeout;
        let mut told = self.shared.told();
        loop {
            let since = told.get(mark..).unwrap_or_default();
            if let Some(found) = enough(since) {
                return Ok(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let count = since.len();
                return Err(Error::new(
                    self.name,
                    format!("waited {timeout:?} for {what}; {count} events came"),
                ));
            }
            told = self
                .shared
                .more
                .wait_timeout(told, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl<T> Drop for Feed<T> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An event of `etcdctl watch`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KeyEvent {
    Put(String),
    Delete(String),
}

/// Reads what `etcdctl watch` prints: three lines an event, its type, the key and the value.
#[derive(Default)]
pub(crate) struct KeyEvents {
    type_: Option<String>,
    key: Option<String>,
}

impl KeyEvents {
    /// The event that ends with this line. It is complete with its key, so the value is skipped.
    pub(crate) fn line(&mut self, line: &str) -> Option<KeyEvent> {
        let Some(type_) = &self.type_ else {
            self.type_ = Some(line.to_owned());
            return None;
        };
        if self.key.take().is_some() {
            // This line is the value.
            self.type_ = None;
            return None;
        }
        self.key = Some(line.to_owned());
        match type_.as_str() {
            "PUT" => Some(KeyEvent::Put(line.to_owned())),
            _ => Some(KeyEvent::Delete(line.to_owned())),
        }
    }
}

/// What the API server says of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodState {
    pub(crate) name: String,
    pub(crate) address: String,
    /// Ready, and not being deleted.
    pub(crate) ready: bool,
}

impl PodState {
    /// From an event of a watch.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let event: Value = serde_json::from_str(line).ok()?;
        let pod = event.get("object")?;
        let deleted = event.get("type").is_some_and(|kind| kind == "DELETED")
            || pod.pointer("/metadata/deletionTimestamp").is_some();
        let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
        let ready = conditions.into_iter().flatten().any(|condition| {
            condition.get("type").is_some_and(|kind| kind == "Ready")
                && condition
                    .get("status")
                    .is_some_and(|status| status == "True")
        });
        Some(Self {
            name: pod.pointer("/metadata/name")?.as_str()?.to_owned(),
            address: pod
                .pointer("/status/podIP")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned(),
            ready: ready && !deleted,
        })
    }
}

/// The fewest ready pods at any moment of a list of events.
pub(crate) fn fewest_ready(events: &[Timed<PodState>], from: usize) -> usize {
    let mut ready: BTreeMap<&str, bool> = BTreeMap::new();
    let mut fewest = usize::MAX;
    for (index, event) in events.iter().enumerate() {
        ready.insert(&event.what.name, event.what.ready);
        if index + 1 >= from {
            fewest = fewest.min(ready.values().filter(|ready| **ready).count());
        }
    }
    fewest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etcdctl_tells_three_lines_an_event() {
        let mut events = KeyEvents::default();
        let text = "PUT\n/a/1\n{\"x\":1}\nDELETE\n/a/1\n\nPUT\n/a/2\nPUT\n";
        let found: Vec<_> = text.lines().filter_map(|line| events.line(line)).collect();
        assert_eq!(
            found,
            [
                KeyEvent::Put("/a/1".into()),
                KeyEvent::Delete("/a/1".into()),
                KeyEvent::Put("/a/2".into())
            ]
        );
    }

    #[test]
    fn a_pod_being_deleted_is_not_ready() {
        let pod = |meta: &str, status: &str| {
            format!(
                r#"{{"type":"MODIFIED","object":{{"metadata":{{"name":"p"{meta}}},"status":{{"podIP":"10.0.0.1","conditions":[{{"type":"Ready","status":"{status}"}}]}}}}}}"#
            )
        };
        let ready = |line: &str| PodState::parse(line).unwrap().ready;
        assert!(ready(&pod("", "True")));
        assert!(!ready(&pod("", "False")));
        assert!(!ready(&pod(
            r#","deletionTimestamp":"2026-01-01T00:00:00Z""#,
            "True"
        )));
        assert_eq!(PodState::parse("no JSON"), None);
    }

    #[test]
    fn the_fewest_ready_pods_are_counted_from_a_moment_on() {
        let event = |name: &str, ready| Timed {
            at: Instant::now(),
            what: PodState {
                name: name.into(),
                address: String::new(),
                ready,
            },
        };
        let events = [
            event("a", true),
            event("b", true),
            event("c", true),
            event("a", false),
        ];
        assert_eq!(fewest_ready(&events, 2), 2);
        assert_eq!(fewest_ready(&events, 0), 1);
    }
}
