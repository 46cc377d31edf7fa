//! Writes statuses of registrations by server-side apply.
//!
//! Takes statuses of the engine, of which only the newest of an object counts; gives patches of the
//! status subresource. Must never hold up the engine, and never write anything but what it was given.
//!
//! **Field managers.** The leader applies whole statuses as `etcd-registrar`. A replica that knows
//! of no leader applies the condition `Ready` alone as `etcd-registrar-ready`: applied under the
//! leader's name, a status with one condition would remove every field that the leader had set.
//! Conditions are a list map, so only that entry changes hands. Both force: the newest word counts,
//! and the leader's next whole status takes the entry back. What the second manager still owns then
//! (the entry's type) demands only that `Ready` is in every whole status: one without it is refused
//! with 422, since an entry of which nothing but the type is left is not valid.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

use crate::admin::metrics::Metrics;
use crate::api::ServiceRegistrationStatus;

use super::client::KubeClient;
use super::session::backoff;
use super::{GROUP, KIND, LogLimit, PLURAL, VERSION, code, explain};

/// The field manager of whole statuses.
pub const MANAGER: &str = "etcd-registrar";
/// The field manager of the condition `Ready` alone.
pub const READY_MANAGER: &str = "etcd-registrar-ready";

/// Requests at a time: enough to write 1,000 statuses in a few seconds, too few to be throttled
/// by the API server's priority and fairness.
const CONCURRENT: usize = 4;

/// A patch without an answer is tried again after this.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A status to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Patch {
    /// The object's namespace.
    pub namespace: String,
    /// The object's name.
    pub name: String,
    /// The object's UID. The API server does not check it on the status subresource (seen on
    /// 1.36), so a later object of the same name may be given this status for a moment, until the
    /// engine sees it and writes the right one.
    pub uid: String,
    /// The whole status.
    pub status: Box<ServiceRegistrationStatus>,
    /// Only the condition `Ready` is to be written.
    pub ready_only: bool,
}

/// Namespace and name.
type Name = (String, String);

/// Statuses that wait to be written, one an object; clones share it.
#[derive(Clone, Debug, Default)]
pub struct StatusQueue {
    waiting: Arc<Mutex<Waiting>>,
    changed: Arc<Notify>,
}

impl StatusQueue {
    /// Nothing waits.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Carries out [`crate::engine::io::Effect::PatchStatus`]: replaces what waits for the object,
    /// also a whole status by the condition `Ready` alone: who no longer leads has no say in it.
    pub fn submit(&self, patch: Patch) {
        self.with(|waiting| waiting.submit(patch, Instant::now()));
        self.changed.notify_one();
    }

    /// How many objects have a status that waits or is being written.
    #[must_use]
    pub fn len(&self) -> usize {
        self.with(|waiting| waiting.objects.len())
    }

    /// Nothing waits or is being written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn with<T>(&self, act: impl FnOnce(&mut Waiting) -> T) -> T {
        // Nothing in here panics half-way, so a poisoned lock still holds whole values.
        act(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Writes statuses for ever.
pub async fn run(client: KubeClient, queue: StatusQueue, metrics: Metrics) {
    let mut running = FuturesUnordered::new();
    let mut log = LogLimit::new();
    loop {
        while running.len() < CONCURRENT
            && let Some(patch) = queue.with(|waiting| waiting.take(Instant::now()))
        {
            let client = client.clone();
            running.push(async move {
                let result = write(&client, &patch).await;
                (patch, result)
            });
        }
        let due = queue.with(|waiting| waiting.next_due());
        let can_start = running.len() < CONCURRENT;
        tokio::select! {
            Some((patch, result)) = running.next() => {
                let verdict = judge(&result);
                if let Err(failure) = &result {
                    metrics.status_patch_errors.inc();
                    tell(&mut log, &patch, failure, verdict);
                } else {
                    metrics.status_patches.inc();
                }
                queue.with(|waiting| waiting.done(&patch, verdict, Instant::now(), rand::random()));
            }
            () = queue.changed.notified() => {}
            () = sleep_until(due.unwrap_or_else(Instant::now)), if can_start && due.is_some() => {}
        }
    }
}

fn tell(log: &mut LogLimit, patch: &Patch, failure: &Failure, verdict: Verdict) {
    let Patch {
        namespace, name, ..
    } = patch;
    let said = &failure.message;
    // An object that was deleted in the meantime is no fault.
    if failure.code == Some(404) {
        tracing::debug!("the status of {namespace}/{name} was not written: {said}");
        return;
    }
    let next = match verdict {
        Verdict::Again => "it is tried again",
        Verdict::Done => "it is not tried again before it changes",
    };
    let help = if failure.code == Some(403) {
        "; grant the verb patch on serviceregistrations/status, as the ClusterRole in deploy/ does"
    } else {
        ""
    };
    if let Some(more) = log.pass(std::time::Instant::now()) {
        tracing::warn!(
            more,
            "the status of {namespace}/{name} was not written: {said}; {next}{help}"
        );
    }
}

// === the request ===

/// Why a status was not written.
#[derive(Debug)]
struct Failure {
    code: Option<u16>,
    message: String,
}

/// What becomes of a status after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Written, or useless to try again.
    Done,
    /// To be tried again later.
    Again,
}

fn judge(result: &Result<(), Failure>) -> Verdict {
    let Err(failure) = result else {
        return Verdict::Done;
    };
    match failure.code {
        // Gone, or not acceptable: the same request can't succeed later.
        Some(400 | 404 | 413 | 422) => Verdict::Done,
        // Another object of this name, which has a status of its own (where the UID is checked).
        Some(409) if failure.message.contains("UID") => Verdict::Done,
        _ => Verdict::Again,
    }
}

async fn write(client: &KubeClient, patch: &Patch) -> Result<(), Failure> {
    let failure = |message: String| Failure {
        code: None,
        message,
    };
    let body = body(patch).map_err(|error| failure(error.to_string()))?;
    let manager = if patch.ready_only {
        READY_MANAGER
    } else {
        MANAGER
    };
    let path = format!(
        "/apis/{GROUP}/{VERSION}/namespaces/{}/{PLURAL}/{}/status?fieldManager={manager}&force=true",
        patch.namespace, patch.name
    );
    let request = http::Request::patch(path)
        // JSON is YAML; this type is what makes the patch a server-side apply.
        .header(http::header::CONTENT_TYPE, "application/apply-patch+yaml")
        .body(body.to_string().into_bytes())
        .map_err(|error| failure(error.to_string()))?;
    timeout(TIMEOUT, client.current().request_text(request))
        .await
        .map_err(|_| failure(format!("no answer within {} s", TIMEOUT.as_secs())))?
        .map(drop)
        .map_err(|error| Failure {
            code: code(&error),
            message: explain(&error),
        })
}

fn body(patch: &Patch) -> Result<Value, serde_json::Error> {
    let mut status = serde_json::to_value(&patch.status)?;
    if patch.ready_only {
        status = ready_alone(&status);
    }
    Ok(json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": KIND,
        "metadata": {
            "namespace": patch.namespace,
            "name": patch.name,
            "uid": patch.uid,
        },
        "status": status,
    }))
}

/// The condition `Ready` of a status, and nothing else of it.
fn ready_alone(status: &Value) -> Value {
    let ready: Vec<&Value> = status
        .get("conditions")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter(|condition| condition.get("type").is_some_and(|kind| kind == "Ready"))
        .collect();
    json!({ "conditions": ready })
}

// === what waits; without IO ===

#[derive(Debug, Default)]
struct Waiting {
    objects: HashMap<Name, Entry>,
    /// When an object may be written; may name objects that changed since, see [`Entry::turn`].
    turns: BinaryHeap<Reverse<(Instant, u64, Name)>>,
    /// Numbers the turns upwards.
    last_turn: u64,
}

#[derive(Debug)]
struct Entry {
    /// The newest status; `None` while only an older one is being written.
    newest: Option<Patch>,
    /// A request is under way; two at a time could overtake one another.
    running: bool,
    /// Failures in a row.
    failures: u32,
    /// The only turn that counts.
    turn: u64,
}

impl Waiting {
    fn submit(&mut self, patch: Patch, now: Instant) {
        let name = (patch.namespace.clone(), patch.name.clone());
        if let Some(entry) = self.objects.get_mut(&name) {
            // Keeps its turn: a failing object is not tried more often because it changes.
            entry.newest = Some(patch);
            return;
        }
        let turn = self.schedule(&name, now);
        self.objects.insert(
            name,
            Entry {
                newest: Some(patch),
                running: false,
                failures: 0,
                turn,
            },
        );
    }

    fn schedule(&mut self, name: &Name, at: Instant) -> u64 {
        self.last_turn += 1;
        self.turns.push(Reverse((at, self.last_turn, name.clone())));
        self.last_turn
    }

    fn next_due(&self) -> Option<Instant> {
        self.turns.peek().map(|Reverse((at, ..))| *at)
    }

    /// The status whose turn it is, longest waiting first.
    fn take(&mut self, now: Instant) -> Option<Patch> {
        while self.next_due().is_some_and(|at| at <= now) {
            let Some(Reverse((_, turn, name))) = self.turns.pop() else {
                break;
            };
            if let Some(entry) = self.objects.get_mut(&name)
                && entry.turn == turn
                && !entry.running
                && let Some(patch) = entry.newest.take()
            {
                entry.running = true;
                return Some(patch);
            }
        }
        None
    }

    /// An attempt ended.
    fn done(&mut self, patch: &Patch, verdict: Verdict, now: Instant, jitter: f64) {
        let name = (patch.namespace.clone(), patch.name.clone());
        let Some(entry) = self.objects.get_mut(&name) else {
            return;
        };
        entry.running = false;
        let delay = match verdict {
            Verdict::Done => {
                if entry.newest.is_none() {
                    self.objects.remove(&name);
                    return;
                }
                entry.failures = 0;
                Duration::ZERO
            }
            Verdict::Again => {
                entry.failures = entry.failures.saturating_add(1);
                // A newer status replaces the one that failed.
                entry.newest.get_or_insert_with(|| patch.clone());
                backoff(entry.failures, jitter)
            }
        };
        let turn = self.schedule(&name, now + delay);
        if let Some(entry) = self.objects.get_mut(&name) {
            entry.turn = turn;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patch(name: &str, uid: &str) -> Patch {
        Patch {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            uid: uid.to_owned(),
            status: Box::default(),
            ready_only: false,
        }
    }

    fn failed(code: Option<u16>, message: &str) -> Result<(), Failure> {
        Err(Failure {
            code,
            message: message.to_owned(),
        })
    }

    #[test]
    fn only_the_newest_status_of_an_object_is_written() {
        let mut waiting = Waiting::default();
        let now = Instant::now();
        waiting.submit(patch("web", "1"), now);
        waiting.submit(patch("web", "2"), now);
        waiting.submit(patch("api", "3"), now);
        assert_eq!(waiting.take(now), Some(patch("web", "2")));
        // While one is being written, the next of the same object waits for its end.
        waiting.submit(patch("web", "4"), now);
        assert_eq!(waiting.take(now), Some(patch("api", "3")));
        assert_eq!(waiting.take(now), None);
        waiting.done(&patch("web", "2"), Verdict::Done, now, 0.0);
        assert_eq!(waiting.take(now), Some(patch("web", "4")));
        waiting.done(&patch("web", "4"), Verdict::Done, now, 0.0);
        waiting.done(&patch("api", "3"), Verdict::Done, now, 0.0);
        assert!(waiting.objects.is_empty());
        assert_eq!(waiting.next_due(), None);
    }

    #[test]
    fn a_failed_status_is_tried_again_later_unless_a_newer_one_came() {
        let mut waiting = Waiting::default();
        let now = Instant::now();
        waiting.submit(patch("web", "1"), now);
        let taken = waiting.take(now).unwrap();
        waiting.done(&taken, Verdict::Again, now, 0.0);
        assert_eq!(waiting.take(now), None);
        let due = waiting.next_due().unwrap();
        assert_eq!(due - now, Duration::from_millis(50));
        // A newer one replaces it, and does not come earlier for that.
        waiting.submit(patch("web", "2"), now);
        assert_eq!(waiting.take(now), None);
        assert_eq!(waiting.take(due), Some(patch("web", "2")));
        waiting.submit(patch("web", "3"), due);
        waiting.done(&patch("web", "2"), Verdict::Again, due, 0.0);
        let later = waiting.next_due().unwrap();
        assert_eq!(later - due, Duration::from_millis(100));
        assert_eq!(waiting.take(later), Some(patch("web", "3")));
    }

    #[test]
    fn what_can_not_succeed_is_not_tried_again() {
        assert_eq!(judge(&Ok(())), Verdict::Done);
        assert_eq!(judge(&failed(Some(404), "not found")), Verdict::Done);
        assert_eq!(judge(&failed(Some(422), "invalid")), Verdict::Done);
        let uid = "Precondition failed: UID in precondition: a, UID in object meta: b";
        assert_eq!(judge(&failed(Some(409), uid)), Verdict::Done);
        assert_eq!(judge(&failed(Some(409), "modified")), Verdict::Again);
        assert_eq!(judge(&failed(Some(503), "away")), Verdict::Again);
        assert_eq!(judge(&failed(None, "refused")), Verdict::Again);
    }

    #[test]
    fn without_a_leader_the_condition_ready_alone_is_written() {
        let ready = json!({"type": "Ready", "status": "Unknown", "observedGeneration": 3});
        let status = json!({
            "observedGeneration": 3, "registered": 2,
            "conditions": [{"type": "Accepted", "status": "True"}, ready],
        });
        assert_eq!(ready_alone(&status), json!({"conditions": [ready]}));
        assert_eq!(ready_alone(&json!({})), json!({"conditions": []}));
    }

    #[test]
    fn a_patch_says_whose_status_it_is_and_nothing_else() {
        let body = body(&patch("web", "u1")).unwrap();
        assert_eq!(
            body["metadata"],
            json!({"namespace": "shop", "name": "web", "uid": "u1"})
        );
        assert_eq!(body["apiVersion"], "etcd-registrar.io/v1alpha1");
        let keys: Vec<_> = body.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["apiVersion", "kind", "metadata", "status"]);
    }
}
