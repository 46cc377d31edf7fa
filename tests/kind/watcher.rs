//! A client of etcd outside of the clusters, and one that records every event.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use etcd_client::{
    Certificate, Client, ConnectOptions, EventType, GetOptions, Identity, TlsOptions, WatchOptions,
};
use testbed::eventually;

use crate::world::SOON;

/// A client of etcd as root.
#[derive(Clone)]
pub(crate) struct Registry {
    pub(crate) endpoints: Vec<String>,
    options: ConnectOptions,
}

/// A runtime for one thing to be waited for.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

impl Registry {
    pub(crate) fn connect(folder: &Path, endpoints: Vec<String>) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
        let options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(2))
            .with_timeout(Duration::from_secs(5))
            .with_tls(
                TlsOptions::new()
                    .ca_certificate(Certificate::from_pem(read("ca.crt")))
                    .identity(Identity::from_pem(read("root.crt"), read("root.key"))),
            );
        Self { endpoints, options }
    }

    async fn client(&self) -> Result<Client, String> {
        // One that is stopped must not make the others fail, and a connection is only made when something is asked.
        let mut said = String::new();
        for endpoint in &self.endpoints {
            let failed = match Client::connect([endpoint], Some(self.options.clone())).await {
                Ok(mut client) => match client.status().await {
                    Ok(_) => return Ok(client),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            said = failed.to_string();
        }
        Err(said)
    }

    /// Keys and values below a prefix, in order, and the revision.
    fn read(&self, prefix: &str) -> Result<(Vec<(String, String)>, i64), String> {
        runtime().block_on(async {
            let mut client = self.client().await?;
            let options = GetOptions::new().with_prefix();
            let answer = client.get(prefix, Some(options)).await;
            let answer = answer.map_err(|error| error.to_string())?;
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let found = answer
                .kvs()
                .iter()
                .map(|kv| (text(kv.key()), text(kv.value())));
            Ok((
                found.collect(),
                answer.header().map_or(0, |header| header.revision()),
            ))
        })
    }

    pub(crate) fn keys(&self, prefix: &str) -> Result<Vec<String>, String> {
        Ok(self
            .read(prefix)?
            .0
            .into_iter()
            .map(|(key, _)| key)
            .collect())
    }

    pub(crate) fn revision(&self) -> i64 {
        eventually(SOON, "etcd to answer", || self.read("/revision"))
            .unwrap()
            .1
    }
}

/// An event.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// When it came in, by the clock that Kubernetes has, too.
    pub(crate) at: SystemTime,
    pub(crate) key: String,
    pub(crate) put: bool,
}

#[derive(Default)]
struct Notes {
    seen: Vec<Seen>,
    /// Up to here everything was seen.
    revision: i64,
}

/// Records every event below a prefix until the process ends, through losses of its connection.
pub(crate) struct Watcher {
    notes: Arc<Mutex<Notes>>,
    registry: Registry,
}

impl Watcher {
    pub(crate) fn start(registry: &Registry, prefix: &str) -> Self {
        let notes = Arc::new(Mutex::new(Notes {
            seen: Vec::new(),
            revision: registry.revision(),
        }));
        let (mine, from, prefix) = (Arc::clone(&notes), registry.clone(), prefix.to_owned());
        std::thread::spawn(move || {
            runtime().block_on(async {
                loop {
                    let _ = follow(&from, &prefix, &mine).await;
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            });
        });
        Self {
            notes,
            registry: registry.clone(),
        }
    }

    /// Every event so far, which are all that etcd had when it was asked.
    pub(crate) fn all(&self) -> Vec<Seen> {
        let now = self.registry.revision();
        eventually(Duration::from_secs(60), "the watcher to catch up", || {
            let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
            if notes.revision >= now {
                Ok(notes.seen.clone())
            } else {
                Err(format!("at {} of {now}", notes.revision))
            }
        })
        .unwrap_or_default()
    }

    /// Every event so far as it is known, also when etcd does not answer.
    pub(crate) fn known(&self) -> Vec<Seen> {
        let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.seen.clone()
    }

    /// How many there are; for [`Watcher::since`].
    pub(crate) fn position(&self) -> usize {
        self.all().len()
    }

    pub(crate) fn since(&self, position: usize) -> Vec<Seen> {
        self.all().split_off(position)
    }

    /// Waits for an event after a position.
    pub(crate) fn wait(&self, position: usize, key: &str, put: bool) -> Seen {
        let began = Instant::now();
        eventually(
            Duration::from_secs(120),
            &format!("{key}, put: {put}"),
            || {
                let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
                let mut later = notes.seen.iter().skip(position);
                later
                    .find(|seen| seen.key == key && seen.put == put)
                    .cloned()
                    .ok_or_else(|| format!("nothing for {} s", began.elapsed().as_secs()))
            },
        )
        .unwrap()
    }
}

async fn follow(from: &Registry, prefix: &str, notes: &Mutex<Notes>) -> Result<(), String> {
    let next = notes
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .revision
        + 1;
    let failed = |error: etcd_client::Error| error.to_string();
    let mut client = from.client().await?;
    let options = WatchOptions::new()
        .with_prefix()
        .with_progress_notify()
        .with_start_revision(next);
    let mut stream = client.watch(prefix, Some(options)).await.map_err(failed)?;
    loop {
        // Asks how far it is while nothing comes.
        let message = match tokio::time::timeout(Duration::from_millis(500), stream.message()).await
        {
            Ok(message) => message.map_err(failed)?.ok_or("the stream ended")?,
            Err(_) => {
                stream.request_progress().await.map_err(failed)?;
                continue;
            }
        };
        let at = SystemTime::now();
        let mut notes = notes.lock().unwrap_or_else(PoisonError::into_inner);
        for event in message.events() {
            if let Some(kv) = event.kv() {
                notes.seen.push(Seen {
                    at,
                    key: String::from_utf8_lossy(kv.key()).into_owned(),
                    put: event.event_type() == EventType::Put,
                });
            }
        }
        if let Some(header) = message.header() {
            notes.revision = notes.revision.max(header.revision());
        }
    }
}
