//! Writes Kubernetes Events on registrations.
//!
//! Takes announcements of the engine; gives Events of `events.k8s.io/v1`. Must never hold up the
//! engine or be relied on: Events are for people and are dropped when they can't be written.
//!
//! kube's own recorder is not used since it needs the whole of kube-runtime for one request.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::admin::metrics::Metrics;
use crate::engine::io::EventType;

use super::client::KubeClient;
use super::{GROUP, KIND, LogLimit, VERSION, explain};

/// Events that wait to be written; an announcement beyond them is dropped and counted.
const QUEUE: usize = 256;

/// An Event is not worth a longer wait.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The longest note that the API server takes, in bytes.
const MAX_NOTE: usize = 1024;

/// The longest `reportingInstance` that the API server takes, in bytes.
const MAX_INSTANCE: usize = 128;

/// Something to tell on a registration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// The object's namespace.
    pub namespace: String,
    /// The object's name.
    pub name: String,
    /// The object's UID.
    pub uid: String,
    /// How it is shown.
    pub event_type: EventType,
    /// A documented reason in CamelCase.
    pub reason: &'static str,
    /// What a person can act on.
    pub message: String,
}

/// Takes announcements without ever waiting.
#[derive(Clone, Debug)]
pub struct Announcer {
    queue: mpsc::Sender<Announcement>,
    metrics: Metrics,
}

impl Announcer {
    /// The announcer, and what [`run`] takes.
    #[must_use]
    pub fn new(metrics: Metrics) -> (Self, mpsc::Receiver<Announcement>) {
        let (queue, announcements) = mpsc::channel(QUEUE);
        (Self { queue, metrics }, announcements)
    }

    /// Carries out [`crate::engine::io::Effect::Announce`]; drops it when too many wait.
    pub fn announce(&self, announcement: Announcement) {
        if self.queue.try_send(announcement).is_err() {
            self.metrics.events_dropped.inc();
        }
    }
}

/// Writes announcements one after the other until the announcer is gone. `instance` names this
/// replica, e.g. its pod.
pub async fn run(
    client: KubeClient,
    mut announcements: mpsc::Receiver<Announcement>,
    instance: String,
    metrics: Metrics,
) {
    let mut log = LogLimit::new();
    while let Some(announcement) = announcements.recv().await {
        let written = timeout(TIMEOUT, write(&client, &announcement, &instance)).await;
        let said = match written {
            Ok(Ok(())) => continue,
            Ok(Err(said)) => said,
            Err(_) => format!("no answer within {} s", TIMEOUT.as_secs()),
        };
        metrics.events_dropped.inc();
        if let Some(more) = log.pass(std::time::Instant::now()) {
            tracing::warn!(
                more,
                "an Event was not written: {said}; the verb create on events of events.k8s.io is \
                 granted by the ClusterRole in deploy/"
            );
        }
    }
}

async fn write(
    client: &KubeClient,
    announcement: &Announcement,
    instance: &str,
) -> Result<(), String> {
    let path = format!(
        "/apis/events.k8s.io/v1/namespaces/{}/events",
        announcement.namespace
    );
    let body = event(announcement, instance, Timestamp::now()).to_string();
    let request = http::Request::post(path)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(body.into_bytes())
        .map_err(|error| error.to_string())?;
    client
        .current()
        .request_text(request)
        .await
        .map(drop)
        .map_err(|error| explain(&error))
}

fn event(announcement: &Announcement, instance: &str, now: Timestamp) -> serde_json::Value {
    json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {
            "name": name(&announcement.name, rand::random()),
            "namespace": announcement.namespace,
        },
        // The API server takes microseconds, always six digits of them.
        "eventTime": format!("{now:.6}"),
        "reportingController": format!("{GROUP}/operator"),
        "reportingInstance": cut(instance, MAX_INSTANCE),
        "action": "Register",
        "reason": announcement.reason,
        "type": match announcement.event_type {
            EventType::Normal => "Normal",
            EventType::Warning => "Warning",
        },
        "regarding": {
            "apiVersion": format!("{GROUP}/{VERSION}"),
            "kind": KIND,
            "namespace": announcement.namespace,
            "name": announcement.name,
            "uid": announcement.uid,
        },
        "note": cut(&announcement.message, MAX_NOTE),
    })
}

/// A name of its own for an Event, as client-go makes it: the object's, a dot, 16 hex digits. (The
/// API server refuses a `generateName` that ends with a dot.)
fn name(object: &str, unique: u64) -> String {
    /// The longest name of an object, in bytes.
    const MAX_NAME: usize = 253;
    /// The dot and the digits.
    const SUFFIX: usize = 17;
    let base = cut(object, MAX_NAME - SUFFIX).trim_end_matches(['.', '-']);
    format!("{base}.{unique:016x}")
}

/// At most so many bytes, whole characters.
fn cut(text: &str, bytes: usize) -> &str {
    text.get(..text.floor_char_boundary(bytes)).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announcement(message: &str) -> Announcement {
        Announcement {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            uid: "u1".to_owned(),
            event_type: EventType::Warning,
            reason: "KeyConflict",
            message: message.to_owned(),
        }
    }

    #[test]
    fn an_event_names_its_object_and_keeps_the_limits_of_the_api() {
        let now = Timestamp::from_second(1_700_000_000).unwrap();
        let event = event(&announcement(&"é".repeat(2_000)), &"i".repeat(500), now);
        assert_eq!(event["regarding"]["uid"], "u1");
        assert_eq!(event["type"], "Warning");
        assert_eq!(event["eventTime"], "2023-11-14T22:13:20.000000Z");
        assert_eq!(event["note"].as_str().unwrap().len(), MAX_NOTE);
        assert_eq!(event["reportingInstance"].as_str().unwrap().len(), 128);
    }

    #[test]
    fn the_name_of_an_event_is_one_that_the_api_server_takes() {
        assert_eq!(name("web", 255), "web.00000000000000ff");
        let long = format!("{}.-{}", "a".repeat(235), "b".repeat(16));
        assert_eq!(long.len(), 253);
        assert_eq!(
            name(&long, 1),
            format!("{}.0000000000000001", "a".repeat(235))
        );
        assert_eq!(name(&"c".repeat(253), 1).len(), 253);
    }

    #[test]
    fn announcements_beyond_the_queue_are_dropped_and_counted() {
        let (metrics, _registry) = Metrics::new();
        let (announcer, announcements) = Announcer::new(metrics.clone());
        for _ in 0..QUEUE + 3 {
            announcer.announce(announcement("m"));
        }
        assert_eq!(announcements.len(), QUEUE);
        assert_eq!(metrics.events_dropped.get(), 3);
    }
}
