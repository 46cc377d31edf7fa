//! What the benchmark sees for itself: a watch of etcd and a watch of pods, each on a thread of its own, which notes
//! the time before it does anything else with what came.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use etcd_client::{EventType, WatchOptions};
use etcd_registrar::engine::io::{Object, Resource};
use etcd_registrar::kube::client::{ClientOptions, KubeClient};
use etcd_registrar::kube::wire::{Encoding, Item, Line, read_line};
use futures::io::AsyncBufReadExt;
use tokio::sync::oneshot;

use crate::{Result, runtime};

/// How long anything that is waited for may take before the run is given up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The largest message of a watch: a burst may come in few of them.
const MESSAGE: usize = 256 << 20;

/// An event of etcd.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) at: Instant,
    pub(crate) key: String,
    /// Put, else deleted.
    pub(crate) put: bool,
    pub(crate) revision: i64,
}

/// A pod as the API server's watch delivered it.
#[derive(Clone, Debug)]
pub(crate) struct PodSeen {
    pub(crate) at: Instant,
    pub(crate) name: String,
    pub(crate) resource_version: u64,
}

/// A watch on a thread; it ends when this is dropped.
pub(crate) struct Observer<T> {
    seen: Receiver<T>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Observer<T> {
    /// Runs `watch`, which sends what it sees, and waits until it says that it stands.
    fn start<W, F>(watch: W) -> Result<Self>
    where
        W: FnOnce(Sender<T>, Sender<Result<()>>) -> F + Send + 'static,
        F: Future<Output = Result<()>>,
    {
        let (sender, seen) = channel();
        let (standing, stands) = channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let failed = standing.clone();
        let thread = std::thread::spawn(move || {
            let end = runtime().and_then(|runtime| {
                runtime.block_on(async {
                    tokio::select! {
                        end = watch(sender, standing) => end,
                        _ = stopped => Ok(()),
                    }
                })
            });
            if let Err(error) = end {
                eprintln!("bench: a watch ended: {error}");
                let _ = failed.send(Err(error));
            }
        });
        let observer = Self {
            seen,
            stop: Some(stop),
            thread: Some(thread),
        };
        stands
            .recv_timeout(PATIENCE)
            .map_err(|_| "a watch of the benchmark did not stand in time")??;
        Ok(observer)
    }

    /// The next one, waited for.
    pub(crate) fn next(&self, what: &str) -> Result<T> {
        self.seen
            .recv_timeout(PATIENCE)
            .map_err(|error| format!("waited {PATIENCE:?} for {what}: {error}").into())
    }

    /// The next one, if it comes until then.
    pub(crate) fn next_until(&self, deadline: Instant) -> Result<Option<T>> {
        match self
            .seen
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            Ok(seen) => Ok(Some(seen)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// What has come and was not taken yet.
    pub(crate) fn pending(&self) -> Vec<T> {
        self.seen.try_iter().collect()
    }
}

impl<T> Drop for Observer<T> {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Watches prefixes of etcd.
pub(crate) fn etcd(endpoint: &str, prefixes: &[&str]) -> Result<Observer<Change>> {
    let endpoint = endpoint.to_owned();
    let prefixes: Vec<String> = prefixes.iter().map(|prefix| (*prefix).to_owned()).collect();
    Observer::start(move |changes, standing| watch_etcd(endpoint, prefixes, changes, standing))
}

async fn watch_etcd(
    endpoint: String,
    prefixes: Vec<String>,
    changes: Sender<Change>,
    standing: Sender<Result<()>>,
) -> Result<()> {
    let client = etcd_client::Client::connect([endpoint], None).await?;
    let mut client = client.watch_client().max_decoding_message_size(MESSAGE);
    let mut left = prefixes.iter();
    let first = left.next().ok_or("no prefix to watch")?;
    let options = || Some(WatchOptions::new().with_prefix());
    let (mut sender, mut responses) = client.watch(first.as_str(), options()).await?.split();
    for prefix in left {
        sender.watch(prefix.as_str(), options()).await?;
    }
    let mut created = 0;
    while let Some(response) = responses.message().await? {
        let at = Instant::now();
        if response.created() {
            created += 1;
            if created == prefixes.len() {
                standing.send(Ok(()))?;
            }
        }
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            let change = Change {
                at,
                key: kv.key_str()?.to_owned(),
                put: event.event_type() == EventType::Put,
                revision: kv.mod_revision(),
            };
            if changes.send(change).is_err() {
                return Ok(());
            }
        }
    }
    Err("etcd ended the watch".into())
}

/// Watches the pods of a namespace; those that are there already come first.
pub(crate) fn pods(kubeconfig: &std::path::Path, namespace: &str) -> Result<Observer<PodSeen>> {
    let options = ClientOptions {
        kubeconfig: Some(kubeconfig.to_owned()),
        context: None,
    };
    let path = format!("/api/v1/namespaces/{namespace}/pods?watch=true");
    Observer::start(move |pods, standing| async move {
        let client = KubeClient::new(options).await?.current();
        let request = http::Request::get(path).body(Vec::new())?;
        let mut reader = Box::pin(client.request_stream(request).await?);
        standing.send(Ok(()))?;
        let mut line = Vec::new();
        loop {
            line.clear();
            if reader.read_until(b'\n', &mut line).await? == 0 {
                return Err("the API server ended the watch".into());
            }
            let at = Instant::now();
            if let Line::Applied(Item::Read(Object::Pod(pod)), resource_version) =
                read_line(Resource::Pods, Encoding::Json, &line)?
            {
                let seen = PodSeen {
                    at,
                    name: pod.name.into(),
                    resource_version,
                };
                if pods.send(seen).is_err() {
                    return Ok(());
                }
            }
        }
    })
}
