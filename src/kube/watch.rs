//! Carries bytes between a [`Session`] and the API server: one task for each resource.
//!
//! Takes a client and orders to list anew; gives [`Input::Kube`] through a bounded channel, which
//! slows the reading down when the engine is behind. Must never decide what an answer means: that
//! is the session's, which is tested without IO.
//!
//! kube's own `watcher` is not used since it hides the resource versions of lists and bookmarks.

use std::sync::Arc;
use std::time::Duration;

use http::header::{ACCEPT, CONTENT_TYPE};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::admin::metrics::Metrics;
use crate::engine::io::{Input, KubeInput, Resource, WatchProblem};

use super::answer::Answer;
use super::client::KubeClient;
use super::session::{Ask, End, Flow, Session, backoff};
use super::wire::{Encoding, read_refusal};
use super::{Heard, LogLimit, explain};

/// Objects a page, as kubectl and client-go ask for.
const PAGE_LIMIT: u32 = 500;

/// How long a watch lasts, in seconds, less than twice that with jitter: a half-open connection is
/// noticed by its end, and three watches a minute cost an API server nothing.
const WATCH_SECONDS: f64 = 30.0;

/// The timeout asked for with a streaming list, which may take long in a large cluster; once the
/// list is complete, the stream is ended from here as early as any other watch.
const LIST_SECONDS: u64 = 300;

/// The API server ends a watch itself; one that is still open so long after has lost it.
const GRACE: Duration = Duration::from_secs(5);

/// The longest wait for the first byte of an answer. Consistent reads wait up to 3 s in the API
/// server for its cache, and a loaded one takes a while.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// The longest pause within a list: its objects are there and only have to be sent.
const LIST_PAUSE: Duration = Duration::from_secs(15);

/// So many failures in a row are told: with the backoff that is about a second.
const FAILURES_THAT_LAST: u32 = 4;

/// A buffer that grew above this for one list or object is given back.
const KEPT_BYTES: usize = 1 << 20;

/// Orders to list anew; only the newest of a resource counts.
#[derive(Debug)]
pub struct Relists {
    pods: watch::Sender<u64>,
    nodes: watch::Sender<u64>,
    registrations: watch::Sender<u64>,
}

impl Relists {
    /// No orders yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            pods: watch::Sender::new(0),
            nodes: watch::Sender::new(0),
            registrations: watch::Sender::new(0),
        }
    }

    /// Carries out [`crate::engine::io::Effect::Relist`].
    pub fn order(&self, resource: Resource, number: u64) {
        self.of(resource).send_replace(number);
    }

    /// What [`run`] takes.
    #[must_use]
    pub fn subscribe(&self, resource: Resource) -> watch::Receiver<u64> {
        self.of(resource).subscribe()
    }

    fn of(&self, resource: Resource) -> &watch::Sender<u64> {
        match resource {
            Resource::Pods => &self.pods,
            Resource::Nodes => &self.nodes,
            Resource::Registrations => &self.registrations,
        }
    }
}

impl Default for Relists {
    fn default() -> Self {
        Self::new()
    }
}

/// Where what a watch hears goes.
#[derive(Clone)]
pub enum Sink {
    /// To the engine: the only watch of its resource.
    Engine(mpsc::Sender<Input>),
    /// To [`super::merge::run`], as the part of that number.
    Part(usize, mpsc::Sender<(usize, KubeInput)>),
}

impl Sink {
    async fn send(&self, input: KubeInput) -> Result<(), Gone> {
        match self {
            Self::Engine(inputs) => inputs.send(Input::Kube(input)).await.map_err(|_| Gone),
            Self::Part(part, parts) => parts.send((*part, input)).await.map_err(|_| Gone),
        }
    }
}

/// What all watches share.
#[derive(Clone)]
pub struct Watching {
    /// The connection.
    pub client: KubeClient,
    /// Where what was heard goes.
    pub sink: Sink,
    /// Told of every line that is received.
    pub heard: Heard,
    /// Counts lists, restarts and objects that were not understood.
    pub metrics: Metrics,
}

/// Lists and watches a resource of one namespace, or of all; ends only when the engine is gone.
///
/// A panic-free loop of: wait as long as the failures so far demand, ask what the session says,
/// hand on what it makes of the answer. An order to list anew drops the request under way.
pub async fn run(
    resource: Resource,
    namespace: Option<Arc<str>>,
    watching: Watching,
    mut orders: watch::Receiver<u64>,
) {
    let mut task = Task {
        session: Session::new(resource, namespace),
        watching,
        buffer: Vec::new(),
        inputs: Vec::new(),
        lists: 0,
        not_understood: 0,
        log: LogLimit::new(),
        trouble: LogLimit::new(),
        in_trouble: false,
    };
    loop {
        sleep(backoff(task.session.failures(), rand::random())).await;
        task.session.relist(*orders.borrow_and_update());
        // What a dropped request had not delivered yet is not missed: a list replaces all of it.
        task.inputs.clear();
        let asked = tokio::select! {
            asked = task.ask() => asked,
            Ok(()) = orders.changed() => Ok(()),
        };
        if asked.is_err() {
            return;
        }
    }
}

/// The engine takes no more inputs.
struct Gone;

struct Task {
    session: Session,
    watching: Watching,
    /// One line or page, reused.
    buffer: Vec<u8>,
    /// What the session gave and the engine has not taken yet.
    inputs: Vec<KubeInput>,
    /// Lists that the metric knows of.
    lists: u64,
    /// Objects not understood that the metric knows of.
    not_understood: u64,
    log: LogLimit,
    trouble: LogLimit,
    /// The log says that this watch does not work.
    in_trouble: bool,
}

impl Task {
    /// Asks once and hands on all that follows from it.
    async fn ask(&mut self) -> Result<(), Gone> {
        let began = Instant::now();
        let ask = self.session.next_ask();
        let end = match &ask {
            Ask::StreamList => self.stream(None).await?,
            Ask::Watch(version) => self.stream(Some(*version)).await?,
            Ask::Page(token) => {
                let token = token.as_deref().map(|token| format!("&continue={token}"));
                let query = format!("limit={PAGE_LIMIT}{}", token.unwrap_or_default());
                match self.body(&query).await {
                    Ok(encoding) => {
                        self.session.page(encoding, &self.buffer, &mut self.inputs);
                        None
                    }
                    Err(end) => Some(end),
                }
            }
            Ask::Check => match self.body("limit=1").await {
                Ok(encoding) => {
                    self.session
                        .checked(encoding, &self.buffer, &mut self.inputs);
                    None
                }
                Err(end) => Some(end),
            },
        };
        if let Some(end) = end {
            self.ended(end, began.elapsed()).await;
        }
        self.deliver().await?;
        if self.buffer.capacity() > KEPT_BYTES {
            self.buffer = Vec::new();
        }
        Ok(())
    }

    async fn ended(&mut self, end: End, lasted: Duration) {
        let resource = self.session.resource();
        tracing::debug!(?resource, ?end, ?lasted, "a request of a watch ended");
        if !matches!(end, End::Closed { due: true } | End::Aged) {
            self.watching.metrics.watch_restarted(resource);
        }
        // The credentials may have been rotated, or the API server moved, on disk.
        let reload = match &end {
            End::Refused(refusal) => refusal.code == 401,
            End::Failed(_) => true,
            _ => false,
        };
        self.session.ended(end, lasted, &mut self.inputs);
        if reload && let Err(error) = self.watching.client.reload().await {
            tracing::warn!(%error, "the configuration for Kubernetes can't be read again");
        }
    }

    /// Reads a stream line by line until it ends; `None`: a line of it said what is next.
    async fn stream(&mut self, from: Option<u64>) -> Result<Option<End>, Gone> {
        let lifetime = Duration::from_secs_f64(WATCH_SECONDS * (1.0 + rand::random::<f64>()));
        let (query, asked) = match from {
            Some(version) => (format!("&resourceVersion={version}"), lifetime),
            // Without a resource version the list is a consistent one.
            None => (
                "&sendInitialEvents=true&resourceVersionMatch=NotOlderThan".to_owned(),
                Duration::from_secs(LIST_SECONDS),
            ),
        };
        let asked = Duration::from_secs(asked.as_secs());
        let query = format!(
            "watch=true&allowWatchBookmarks=true&timeoutSeconds={}{query}",
            asked.as_secs()
        );
        let began = Instant::now();
        let mut answer = match self.open(&query).await {
            Ok(answer) => answer,
            Err(end) => return Ok(Some(end)),
        };
        self.session.opened(&mut self.inputs);
        self.deliver().await?;
        // The end of a watch is known from the start, that of a list only once it is complete.
        let mut deadline = from.map(|_| began + asked + GRACE);
        loop {
            let until = deadline.unwrap_or_else(|| Instant::now() + LIST_PAUSE);
            match timeout_at(until, answer.event(&mut self.buffer)).await {
                Err(_) if from.is_none() && deadline.is_some() => return Ok(Some(End::Aged)),
                Err(_) => return Ok(Some(End::Silent)),
                Ok(Err(error)) => return Ok(Some(End::Broke(error.to_string()))),
                Ok(Ok(false)) => {
                    // A second, since the API server counts from a little later.
                    let due = began.elapsed() + Duration::from_secs(1) >= asked;
                    return Ok(Some(End::Closed { due }));
                }
                Ok(Ok(true)) => self.watching.heard.now(),
            }
            let flow = self
                .session
                .line(answer.encoding, &self.buffer, &mut self.inputs);
            self.deliver().await?;
            if flow == Flow::Drop {
                return Ok(None);
            }
            if deadline.is_none() && !self.session.listing() {
                deadline = Some(Instant::now() + lifetime);
            }
        }
    }

    /// Reads a whole answer into the buffer.
    async fn body(&mut self, query: &str) -> Result<Encoding, End> {
        let mut answer = self.open(query).await?;
        self.buffer.clear();
        // Piece by piece, so that a pause is noticed however long the whole takes.
        while timeout(LIST_PAUSE, answer.piece(&mut self.buffer))
            .await
            .map_err(|_| End::Silent)?
            .map_err(|error| End::Broke(error.to_string()))?
        {
            self.watching.heard.now();
        }
        Ok(answer.encoding)
    }

    async fn open(&self, query: &str) -> Result<Answer, End> {
        let path = self.session.path();
        // Tokens of pages are base64 for URLs, so nothing in a query needs escapes.
        let request = http::Request::get(format!("{path}?{query}"))
            .header(ACCEPT, Encoding::accepted(self.session.resource()))
            .body(kube::client::Body::empty())
            .map_err(|error| End::Failed(error.to_string()))?;
        let client = self.watching.client.current();
        let failed =
            |what: String| End::Failed(format!("{}: {what}", self.watching.client.server()));
        let response = timeout(ANSWER_TIMEOUT, client.send(request))
            .await
            .map_err(|_| failed(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs())))?
            .map_err(|error| failed(explain(&error)))?;
        self.watching.heard.now();
        let code = response.status();
        let content_type = response.headers().get(CONTENT_TYPE);
        let encoding = Encoding::of(content_type.map_or("", |v| v.to_str().unwrap_or_default()));
        let mut answer = Answer::new(encoding, response.into_body());
        if code.is_success() {
            return Ok(answer);
        }
        let mut said = Vec::new();
        let whole = async { while matches!(answer.piece(&mut said).await, Ok(true)) {} };
        // What a person gets to read of it is worth no longer wait.
        let _ = timeout(LIST_PAUSE, whole).await;
        Err(End::Refused(read_refusal(code.as_u16(), encoding, &said)))
    }

    async fn deliver(&mut self) -> Result<(), Gone> {
        self.count();
        self.tell();
        for input in self.inputs.drain(..) {
            self.watching.sink.send(input).await?;
        }
        Ok(())
    }

    /// Says when this watch does not work, and when it works again.
    fn tell(&mut self) {
        for input in &self.inputs {
            match input {
                KubeInput::Broken {
                    problem, message, ..
                } => {
                    // A connection that is lost and back at once is everyday life.
                    let lasts = *problem != WatchProblem::Unreachable
                        || self.session.failures() >= FAILURES_THAT_LAST;
                    if lasts && let Some(more) = self.trouble.pass(std::time::Instant::now()) {
                        self.in_trouble = true;
                        tracing::warn!(more, "{message}");
                    }
                }
                KubeInput::ListDone { resource, .. } | KubeInput::Bookmark { resource, .. }
                    if self.in_trouble =>
                {
                    self.in_trouble = false;
                    tracing::info!(?resource, "the watch of Kubernetes works again");
                }
                _ => {}
            }
        }
    }

    fn count(&mut self) {
        let resource = self.session.resource();
        let lists = self.session.lists();
        if lists > self.lists {
            self.watching.metrics.listed(resource, lists - self.lists);
            self.lists = lists;
        }
        let (total, last) = self.session.take_not_understood();
        let Some(last) = last else { return };
        self.watching
            .metrics
            .unparsable(resource, total - self.not_understood);
        self.not_understood = total;
        if let Some(more) = self.log.pass(std::time::Instant::now()) {
            tracing::warn!(
                ?resource,
                object = last,
                more,
                "an object of Kubernetes is not understood and left out"
            );
        }
    }
}
