//! The inputs and effects of the engine: all that passes between it and the tasks around it.

use crate::api::{ServiceRegistrationSpec, ServiceRegistrationStatus};
use crate::model::etcd::{Answer, Failure, LeaseId, News, Range, Request};
use crate::model::pod::{Node, Pod};

/// A point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Now {
    /// Microseconds of a clock that only moves forward.
    pub monotonic: u64,
    /// Seconds since 1970, for what a person reads only.
    pub unix: i64,
}

/// What the project watches in Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Resource {
    /// Pods of all namespaces.
    Pods,
    /// Nodes, for their zones.
    Nodes,
    /// ServiceRegistrations of all namespaces.
    Registrations,
}

/// A ServiceRegistration as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Registration {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.generation`.
    pub generation: i64,
    /// `metadata.resourceVersion` as a number.
    pub resource_version: u64,
    /// `metadata.creationTimestamp`, in seconds since 1970.
    pub created: i64,
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// The spec, or why it could not be read, for a person.
    pub spec: Result<ServiceRegistrationSpec, String>,
    /// The status as the API server holds it; `None` when there is none or it can't be read.
    pub status: Option<ServiceRegistrationStatus>,
}

/// An object that a watch delivered.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A pod.
    Pod(Pod),
    /// A node.
    Node(Node),
    /// A registration.
    Registration(Box<Registration>),
}

/// Why a watch of Kubernetes does not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchProblem {
    /// 403 or 401: a permission is missing.
    Forbidden,
    /// 404: the resource (its CRD) is missing.
    Missing,
    /// The API server can't be reached or answered with an error.
    Unreachable,
}

/// What the kube tasks tell the engine.
#[derive(Clone, Debug, PartialEq)]
pub enum KubeInput {
    /// The UID of the kube-system namespace (or of the operator's own one).
    ClusterUid(String),
    /// The API server answered a request, or a watch delivered something.
    Answered,
    /// A consistent list begins; its objects follow as `Applied`. `relist` is the newest
    /// [`Effect::Relist`] that was taken up before the list was asked for; 0: none.
    ListStarted {
        /// Of what.
        resource: Resource,
        /// The number of the newest relist taken up.
        relist: u64,
    },
    /// The object was listed, added or modified.
    Applied(Object),
    /// The object was deleted; it is given as it was last.
    Deleted(Object),
    /// The list is complete at this resource version; what it did not name is gone.
    ListDone {
        /// Of what.
        resource: Resource,
        /// The resource version of the list.
        resource_version: u64,
    },
    /// The watch has reached this resource version.
    Bookmark {
        /// Of what.
        resource: Resource,
        /// The resource version.
        resource_version: u64,
    },
    /// The watch or list failed; it is tried again.
    Broken {
        /// Of what.
        resource: Resource,
        /// In what way.
        problem: WatchProblem,
        /// What was said, for a person.
        message: String,
    },
}

/// What the tasks around the engine tell it.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// From the kube tasks.
    Kube(KubeInput),
    /// The policy file was read (`None`: there is none; the default policy).
    Policy(Box<crate::accept::policy::Policy>),
    /// The answer to [`Effect::Ask`] of that number.
    Answer(u64, Result<Answer, Failure>),
    /// From following etcd; after [`News::KeysSeen`] what does not agree is mended by [`Effect::Reread`].
    Etcd(News),
    /// A lease that was to be kept alive is gone (TTL 0).
    LeaseLost(LeaseId),
    /// SIGTERM: hand over.
    Shutdown,
    /// Time has passed; sent at least every 100 ms.
    Tick,
}

impl From<News> for Input {
    fn from(news: News) -> Self {
        Self::Etcd(news)
    }
}

/// How an event on an object is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventType {
    /// All is well.
    Normal,
    /// A person should look.
    Warning,
}

/// What the engine wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Ask etcd; the answer comes as [`Input::Answer`] with the same number, always.
    Ask(u64, Request),
    /// Follow exactly these ranges: snapshot and watch; drop all others.
    Follow(Vec<Range>),
    /// Take a new snapshot of a range that is followed.
    Reread(Range),
    /// Ask the watches how far they are; [`News::Progress`] follows.
    AskProgress,
    /// Keep this lease (TTL in seconds) alive, beside those that the keeper finds itself.
    Keep(LeaseId, i64),
    /// The lease need not be kept any longer, unless a key names it.
    Release(LeaseId),
    /// Whether the keeper keeps anything alive at all (`--max-staleness`).
    Keeping(bool),
    /// The UID under which this cluster's leases stand, for the keeper.
    Cluster(String),
    /// List the resource anew, consistently; numbered upwards.
    Relist(Resource, u64),
    /// Write a status.
    PatchStatus {
        /// The object's namespace.
        namespace: String,
        /// The object's name.
        name: String,
        /// The object's UID.
        uid: String,
        /// The whole status.
        status: Box<ServiceRegistrationStatus>,
        /// Only the condition `Ready` is this process's to set (no leader is known).
        ready_only: bool,
    },
    /// Record an event on a registration.
    Announce {
        /// The object's namespace.
        namespace: String,
        /// The object's name.
        name: String,
        /// The object's UID.
        uid: String,
        /// How it is shown.
        event_type: EventType,
        /// A documented reason in CamelCase.
        reason: &'static str,
        /// What a person can act on.
        message: String,
    },
    /// A change of a pod reached the mirror this many microseconds after it was received;
    /// true: a removal.
    Propagated(u64, bool),
    /// A line for the log.
    Log(tracing::Level, String),
    /// Handing over is done: end the process with exit code 0.
    Done,
    /// This process can't go on: end it with exit code 1 and this message.
    Fatal(String),
}
