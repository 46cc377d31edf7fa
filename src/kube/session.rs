//! The state of one list+watch: what was heard --> inputs for the engine and what to ask next.
//!
//! Takes lines, pages and the ends of requests; gives [`KubeInput`]s and the next [`Ask`]. Pure: no
//! tokio, no clock, no IO, so that every fault is a script in a test. Must never let an error, a
//! refusal or a partial list look like a finished list.
//!
//! ```text
//!            +--- 410, 404, any doubt, a relist ---+
//!            v                                     |
//! List --(bookmark "initial-events-end" / last page)--> Watch <--> Check
//! ```

use std::sync::Arc;
use std::time::Duration;

use crate::engine::io::{KubeInput, Resource, WatchProblem};

use super::wire::{self, Encoding, Item, Line, Refusal, WireError};

/// A stream that lasted this long counts as success, so that the next attempt need not wait.
const STEADY: Duration = Duration::from_secs(5);

/// What to ask the API server next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// A watch that begins with all objects, consistently.
    StreamList,
    /// The page of a consistent list that this token continues; `None`: the first page.
    Page(Option<String>),
    /// A watch from this resource version on.
    Watch(u64),
    /// A consistent list of one object, for its resource version alone.
    Check,
}

/// How a request or stream ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The API server refused it.
    Refused(Refusal),
    /// There was no answer.
    Failed(String),
    /// The API server ended the stream; `due`: because the time that was asked for was over.
    Closed {
        /// The time that was asked for was over.
        due: bool,
    },
    /// The connection broke.
    Broke(String),
    /// Nothing came for longer than a healthy API server is silent.
    Silent,
    /// The stream was ended from here, since it was asked for with too long a timeout.
    Aged,
}

/// What to do with the stream after a line of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Read on.
    Read,
    /// Drop it and do what [`Session::next_ask`] says.
    Drop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A consistent list has to be asked for, or its first objects are awaited.
    List,
    /// The pages of a list with this resource version are read.
    Pages(u64),
    /// The list is complete; changes follow.
    Watch,
    /// The watch ended oddly: is what the API server holds older than what was seen (a restored
    /// backup)? A watch from a future resource version would be silent instead of failing.
    Check,
}

/// Where the API server has the objects of a resource, of one namespace or of all.
#[must_use]
pub fn list_path(resource: Resource, namespace: Option<&str>) -> String {
    let (group, plural) = match resource {
        Resource::Pods => ("/api/v1", "pods"),
        Resource::Nodes => ("/api/v1", "nodes"),
        Resource::Registrations => ("/apis/etcd-registrar.io/v1alpha1", "serviceregistrations"),
    };
    match namespace {
        None => format!("{group}/{plural}"),
        Some(namespace) => format!("{group}/namespaces/{namespace}/{plural}"),
    }
}

/// One list+watch.
#[derive(Clone, Debug)]
pub struct Session {
    resource: Resource,
    /// Only of this namespace; `None`: of all.
    namespace: Option<Arc<str>>,
    phase: Phase,
    /// Whether the API server is believed to have streaming lists.
    streaming: bool,
    /// The token of the next page, in [`Phase::Pages`].
    token: Option<String>,
    /// The newest resource version that was delivered since the last complete list.
    position: u64,
    /// The newest relist that was ordered.
    ordered: u64,
    /// The newest relist that was ordered when the current list was asked for.
    taken: u64,
    /// Failures in a row; the delay before the next attempt grows with it.
    failures: u32,
    /// The last answer was a success, so that the next request need not wait.
    advanced: bool,
    /// `Broken` was said and nothing since that shows that the watch works again.
    broken: bool,
    /// Lists begun, for the metric.
    lists: u64,
    /// Objects that were not understood, for the metric, and the last one, for the log.
    not_understood: (u64, Option<String>),
}

impl Session {
    /// A session that has seen nothing, of one namespace or of all.
    #[must_use]
    pub fn new(resource: Resource, namespace: Option<Arc<str>>) -> Self {
        Self {
            resource,
            namespace,
            phase: Phase::List,
            streaming: true,
            token: None,
            position: 0,
            ordered: 0,
            taken: 0,
            failures: 0,
            advanced: true,
            broken: false,
            lists: 0,
            not_understood: (0, None),
        }
    }

    /// What is watched.
    #[must_use]
    pub fn resource(&self) -> Resource {
        self.resource
    }

    /// Where the API server has it: the path of the list.
    #[must_use]
    pub fn path(&self) -> String {
        list_path(self.resource, self.namespace.as_deref())
    }

    /// How many failures in a row the next request has to wait for, see [`backoff`]; 0: none. A
    /// step that worked (a check, a page) is followed by the next at once, yet only a watch or a
    /// list that worked makes the failures before it forgotten.
    #[must_use]
    pub fn failures(&self) -> u32 {
        if self.advanced { 0 } else { self.failures }
    }

    /// A list is under way or due.
    #[must_use]
    pub fn listing(&self) -> bool {
        matches!(self.phase, Phase::List | Phase::Pages(_))
    }

    /// How many lists were begun.
    #[must_use]
    pub fn lists(&self) -> u64 {
        self.lists
    }

    /// How many objects were not understood, and the last of them if it was not asked for yet.
    pub fn take_not_understood(&mut self) -> (u64, Option<String>) {
        (self.not_understood.0, self.not_understood.1.take())
    }

    /// A new list is wanted. Gives true when the request under way has to be dropped for it.
    pub fn relist(&mut self, number: u64) -> bool {
        if number <= self.ordered {
            return false;
        }
        self.ordered = number;
        self.begin_list();
        true
    }

    /// What to ask next; to be called once before each request.
    pub fn next_ask(&mut self) -> Ask {
        match self.phase {
            Phase::List => {
                self.taken = self.ordered;
                if self.streaming {
                    Ask::StreamList
                } else {
                    Ask::Page(None)
                }
            }
            Phase::Pages(_) => Ask::Page(self.token.clone()),
            Phase::Watch => Ask::Watch(self.position),
            Phase::Check => Ask::Check,
        }
    }

    /// A stream was accepted by the API server; its lines follow.
    pub fn opened(&mut self, out: &mut Vec<KubeInput>) {
        match self.phase {
            Phase::List => self.list_started(out),
            Phase::Watch if self.broken => {
                // Says that the watch works again, truthfully: it stands where it stood.
                self.broken = false;
                out.push(KubeInput::Bookmark {
                    resource: self.resource,
                    resource_version: self.position,
                });
            }
            Phase::Pages(_) | Phase::Watch | Phase::Check => {}
        }
    }

    /// A line of the stream.
    pub fn line(&mut self, encoding: Encoding, line: &[u8], out: &mut Vec<KubeInput>) -> Flow {
        match wire::read_line(self.resource, encoding, line) {
            Ok(Line::Applied(item, version)) => self.change(item, version, out, KubeInput::Applied),
            Ok(Line::Deleted(item, version)) => self.change(item, version, out, KubeInput::Deleted),
            Ok(Line::Bookmark {
                resource_version,
                list_end,
            }) => self.bookmark(resource_version, list_end, out),
            Ok(Line::Error(refusal)) => {
                self.refused(&refusal, out);
                Flow::Drop
            }
            Err(error) => {
                self.doubt(&error, out);
                Flow::Drop
            }
        }
    }

    /// A page of a list was read to its end.
    pub fn page(&mut self, encoding: Encoding, body: &[u8], out: &mut Vec<KubeInput>) {
        let page = match wire::read_page(self.resource, encoding, body) {
            Ok(page) => page,
            Err(error) => return self.doubt(&error, out),
        };
        match self.phase {
            Phase::List => self.list_started(out),
            // All pages of one list have one resource version; else they are not one list.
            Phase::Pages(version) if version == page.resource_version => {}
            Phase::Pages(_) | Phase::Watch | Phase::Check => {
                return self.cut_short("its pages have different resource versions", out);
            }
        }
        for item in page.items {
            if let Some(object) = self.understood(item) {
                out.push(KubeInput::Applied(object));
            }
        }
        self.advanced = true;
        self.token = page.next;
        if self.token.is_some() {
            self.phase = Phase::Pages(page.resource_version);
        } else {
            self.list_done(page.resource_version, out);
        }
    }

    /// The answer to [`Ask::Check`].
    pub fn checked(&mut self, encoding: Encoding, body: &[u8], out: &mut Vec<KubeInput>) {
        match wire::read_list_version(encoding, body) {
            Ok(version) => {
                self.advanced = true;
                if version < self.position {
                    self.begin_list();
                } else {
                    self.phase = Phase::Watch;
                }
            }
            Err(error) => self.doubt(&error, out),
        }
    }

    /// The request or stream ended after it had lasted so long.
    pub fn ended(&mut self, end: End, lasted: Duration, out: &mut Vec<KubeInput>) {
        let said = match end {
            End::Refused(refusal) => return self.refused(&refusal, out),
            End::Failed(said) => return self.unreachable(&said, out),
            End::Closed { due: true } | End::Aged if self.phase == Phase::Watch => {
                self.failures = 0;
                self.advanced = true;
                return;
            }
            End::Closed { .. } => "the API server ended it early".to_owned(),
            End::Broke(said) => said,
            End::Silent => "the API server fell silent".to_owned(),
            End::Aged => "it took too long".to_owned(),
        };
        match self.phase {
            Phase::List | Phase::Pages(_) => self.cut_short(&said, out),
            Phase::Watch | Phase::Check => {
                if lasted >= STEADY {
                    self.failures = 0;
                } else {
                    self.failed();
                }
                self.phase = Phase::Check;
            }
        }
    }

    // === what follows from what was heard ===

    fn begin_list(&mut self) {
        self.phase = Phase::List;
        self.token = None;
    }

    fn list_started(&mut self, out: &mut Vec<KubeInput>) {
        self.lists += 1;
        out.push(KubeInput::ListStarted {
            resource: self.resource,
            relist: self.taken,
        });
    }

    fn list_done(&mut self, resource_version: u64, out: &mut Vec<KubeInput>) {
        self.phase = Phase::Watch;
        self.position = resource_version;
        self.failures = 0;
        self.broken = false;
        out.push(KubeInput::ListDone {
            resource: self.resource,
            resource_version,
        });
    }

    fn change(
        &mut self,
        item: Item,
        version: u64,
        out: &mut Vec<KubeInput>,
        input: fn(crate::engine::io::Object) -> KubeInput,
    ) -> Flow {
        if self.phase == Phase::Watch {
            if version < self.position {
                return self.backwards();
            }
            self.position = version;
        }
        self.failures = 0;
        if let Some(object) = self.understood(item) {
            out.push(input(object));
        }
        Flow::Read
    }

    fn bookmark(&mut self, version: u64, list_end: bool, out: &mut Vec<KubeInput>) -> Flow {
        match self.phase {
            Phase::List if list_end => self.list_done(version, out),
            Phase::List | Phase::Pages(_) | Phase::Check => {}
            Phase::Watch if version < self.position => return self.backwards(),
            Phase::Watch => {
                self.failures = 0;
                self.position = version;
                out.push(KubeInput::Bookmark {
                    resource: self.resource,
                    resource_version: version,
                });
            }
        }
        Flow::Read
    }

    /// Kubernetes was restored from a backup, or this is another one: only a list tells.
    fn backwards(&mut self) -> Flow {
        self.failed();
        self.begin_list();
        Flow::Drop
    }

    fn understood(&mut self, item: Item) -> Option<crate::engine::io::Object> {
        match item {
            Item::Read(object) => Some(object),
            Item::NotUnderstood(why) => {
                self.not_understood = (self.not_understood.0 + 1, Some(why));
                None
            }
        }
    }

    fn failed(&mut self) {
        self.advanced = false;
        self.failures = self.failures.saturating_add(1);
    }

    fn refused(&mut self, refusal: &Refusal, out: &mut Vec<KubeInput>) {
        let listing = self.listing();
        match refusal.code {
            // An API server without streaming lists: the same is asked for in pages.
            400 | 422 if self.phase == Phase::List && self.streaming => self.streaming = false,
            410 if listing => self.cut_short(&refusal.to_string(), out),
            // What was to be continued is too old (so after every restart of the API server):
            // nothing is broken, a list is due, after the shortest pause.
            410 => {
                self.failures = 0;
                self.failed();
                self.begin_list();
            }
            401 | 403 => {
                self.failed();
                self.say(WatchProblem::Forbidden, self.forbidden(refusal), out);
                if listing {
                    self.begin_list();
                }
            }
            404 => {
                self.failed();
                self.begin_list();
                self.say(WatchProblem::Missing, self.missing(refusal), out);
            }
            // The resource version means nothing to this API server.
            400 | 422 => {
                self.failed();
                self.begin_list();
                self.say(WatchProblem::Unreachable, self.refusal(refusal), out);
            }
            _ => self.unreachable(&refusal.to_string(), out),
        }
    }

    fn unreachable(&mut self, said: &str, out: &mut Vec<KubeInput>) {
        self.failed();
        let message = format!("can't watch {}: {said}; it is tried again", self.plural());
        self.say(WatchProblem::Unreachable, message, out);
        match self.phase {
            Phase::List | Phase::Pages(_) => self.begin_list(),
            Phase::Watch | Phase::Check => self.phase = Phase::Check,
        }
    }

    fn cut_short(&mut self, said: &str, out: &mut Vec<KubeInput>) {
        self.failed();
        let message = format!(
            "the list of {} was cut short: {said}; it is read anew",
            self.plural()
        );
        self.say(WatchProblem::Unreachable, message, out);
        self.begin_list();
    }

    fn doubt(&mut self, error: &WireError, out: &mut Vec<KubeInput>) {
        self.failed();
        let message = format!(
            "can't read the {}: {error}; they are listed anew",
            self.plural()
        );
        self.say(WatchProblem::Unreachable, message, out);
        self.begin_list();
    }

    fn say(&mut self, problem: WatchProblem, message: String, out: &mut Vec<KubeInput>) {
        self.broken = true;
        out.push(KubeInput::Broken {
            resource: self.resource,
            problem,
            message,
        });
    }

    // === what a person reads ===

    /// The resource, and the namespace where it is of one.
    fn plural(&self) -> String {
        let plural = self.name();
        match &self.namespace {
            None => plural.to_owned(),
            Some(namespace) => format!("{plural} of namespace {namespace}"),
        }
    }

    fn name(&self) -> &'static str {
        match self.resource {
            Resource::Pods => "pods",
            Resource::Nodes => "nodes",
            Resource::Registrations => "serviceregistrations.etcd-registrar.io",
        }
    }

    fn forbidden(&self, refusal: &Refusal) -> String {
        let plural = self.plural();
        if refusal.code == 401 {
            return format!(
                "can't watch {plural}: the API server does not accept the credentials: {refusal}; \
                 check the kubeconfig or the token of the ServiceAccount"
            );
        }
        let name = self.name();
        match &self.namespace {
            None => format!(
                "can't watch {plural}: {refusal}; grant the verbs list and watch on {name} in all \
                 namespaces, as the ClusterRole in deploy/ does (kubectl apply -k deploy/), or name \
                 those to be watched with --namespace"
            ),
            Some(namespace) => format!(
                "can't watch {plural}: {refusal}; grant the verbs list and watch on {name} by a Role \
                 in the namespace {namespace} (docs/install.md), or take it out of --namespace"
            ),
        }
    }

    fn missing(&self, refusal: &Refusal) -> String {
        let plural = self.plural();
        match self.resource {
            Resource::Registrations => format!(
                "can't watch {plural}: their CustomResourceDefinition is missing: {refusal}; \
                 create it: etcd-registrar crd | kubectl apply -f -"
            ),
            Resource::Pods | Resource::Nodes => format!(
                "can't watch {plural}: {refusal}; check that the kubeconfig names an API server \
                 of Kubernetes"
            ),
        }
    }

    fn refusal(&self, refusal: &Refusal) -> String {
        format!(
            "can't watch {}: the API server refuses the request: {refusal}; they are listed anew",
            self.plural()
        )
    }
}

/// The delay before the next attempt after so many failures in a row; `jitter` is from 0 to 1.
///
/// Doubles from 50 ms (a restarted API server is back within seconds, and its pods should be seen
/// at once) to 5 s (so that many replicas do not keep an API server down), less up to half.
#[must_use]
pub fn backoff(failures: u32, jitter: f64) -> Duration {
    const FIRST: Duration = Duration::from_millis(50);
    const LONGEST: Duration = Duration::from_secs(5);
    /// 50 ms doubled seven times is above 5 s.
    const DOUBLINGS: u32 = 7;
    let Some(doublings) = failures.checked_sub(1) else {
        return Duration::ZERO;
    };
    let full = (FIRST * 2u32.pow(doublings.min(DOUBLINGS))).min(LONGEST);
    full.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::engine::io::Object;

    const NO_TIME: Duration = Duration::ZERO;

    fn pod(name: &str, version: u64) -> serde_json::Value {
        json!({"metadata": {"name": name, "namespace": "shop", "uid": name,
            "resourceVersion": version.to_string()}})
    }

    fn event(kind: &str, object: &serde_json::Value) -> Vec<u8> {
        json!({"type": kind, "object": object})
            .to_string()
            .into_bytes()
    }

    fn bookmark(version: u64, end: bool) -> Vec<u8> {
        let annotations = if end {
            json!({"k8s.io/initial-events-end": "true"})
        } else {
            json!({})
        };
        event(
            "BOOKMARK",
            &json!({"metadata": {"resourceVersion": version.to_string(), "annotations": annotations}}),
        )
    }

    fn refused(code: u16) -> End {
        End::Refused(Refusal {
            code,
            message: "said".to_owned(),
        })
    }

    fn page(version: u64, next: &str, names: &[&str]) -> Vec<u8> {
        let items: Vec<_> = names.iter().map(|name| pod(name, 1)).collect();
        json!({"metadata": {"resourceVersion": version.to_string(), "continue": next}, "items": items})
            .to_string()
            .into_bytes()
    }

    /// A word for each input, so that a script reads as one.
    fn words(inputs: &mut Vec<KubeInput>) -> Vec<String> {
        let name = |object: &Object| match object {
            Object::Pod(pod) => pod.name.to_string(),
            Object::Node(node) => node.name.to_string(),
            Object::Registration(registration) => registration.name.clone(),
        };
        inputs
            .drain(..)
            .map(|input| match input {
                KubeInput::ListStarted { relist, .. } => format!("started {relist}"),
                KubeInput::Applied(object) => format!("applied {}", name(&object)),
                KubeInput::Deleted(object) => format!("deleted {}", name(&object)),
                KubeInput::ListDone {
                    resource_version, ..
                } => format!("done {resource_version}"),
                KubeInput::Bookmark {
                    resource_version, ..
                } => format!("bookmark {resource_version}"),
                KubeInput::Broken { problem, .. } => format!("broken {problem:?}"),
                KubeInput::Answered => "answered".to_owned(),
                KubeInput::ClusterUid(uid) => format!("uid {uid}"),
            })
            .collect()
    }

    /// A session whose list is complete at 10.
    fn watching() -> (Session, Vec<KubeInput>) {
        let mut session = Session::new(Resource::Pods, None);
        let mut out = Vec::new();
        assert_eq!(session.next_ask(), Ask::StreamList);
        session.opened(&mut out);
        session.line(Encoding::Json, &event("ADDED", &pod("a", 5)), &mut out);
        assert_eq!(
            session.line(Encoding::Json, &bookmark(10, true), &mut out),
            Flow::Read
        );
        assert_eq!(words(&mut out), ["started 0", "applied a", "done 10"]);
        (session, out)
    }

    #[test]
    fn a_streaming_list_goes_over_into_its_watch() {
        let (mut session, mut out) = watching();
        assert!(!session.listing());
        session.line(Encoding::Json, &event("MODIFIED", &pod("a", 11)), &mut out);
        session.line(Encoding::Json, &event("DELETED", &pod("a", 12)), &mut out);
        session.line(Encoding::Json, &bookmark(20, false), &mut out);
        assert_eq!(words(&mut out), ["applied a", "deleted a", "bookmark 20"]);
        session.ended(End::Closed { due: true }, NO_TIME, &mut out);
        assert_eq!(session.next_ask(), Ask::Watch(20));
        session.opened(&mut out);
        assert_eq!(words(&mut out), [""; 0]);
        assert_eq!(session.failures(), 0);
    }

    #[test]
    fn a_partial_streaming_list_never_looks_finished() {
        for end in [
            End::Closed { due: true },
            End::Closed { due: false },
            End::Broke("reset".to_owned()),
            End::Silent,
            End::Aged,
            refused(410),
            refused(500),
            End::Failed("refused".to_owned()),
        ] {
            let mut session = Session::new(Resource::Pods, None);
            let mut out = Vec::new();
            session.next_ask();
            session.opened(&mut out);
            session.line(Encoding::Json, &event("ADDED", &pod("a", 5)), &mut out);
            // A bookmark without the mark of the end does not end it.
            session.line(Encoding::Json, &bookmark(7, false), &mut out);
            words(&mut out);
            session.ended(end.clone(), Duration::from_secs(60), &mut out);
            assert_eq!(words(&mut out), ["broken Unreachable"], "{end:?}");
            assert_eq!(session.next_ask(), Ask::StreamList, "{end:?}");
            assert_eq!(session.failures(), 1, "{end:?}");
        }
    }

    #[test]
    fn without_streaming_lists_pages_are_read_and_that_is_remembered() {
        for code in [400, 422] {
            let mut session = Session::new(Resource::Pods, None);
            let mut out = Vec::new();
            assert_eq!(session.next_ask(), Ask::StreamList);
            session.ended(refused(code), NO_TIME, &mut out);
            assert_eq!(words(&mut out), [""; 0]);
            assert_eq!(session.failures(), 0);
            assert_eq!(session.next_ask(), Ask::Page(None));
            session.page(Encoding::Json, &page(30, "t1", &["a", "b"]), &mut out);
            assert_eq!(words(&mut out), ["started 0", "applied a", "applied b"]);
            assert_eq!(session.next_ask(), Ask::Page(Some("t1".to_owned())));
            session.page(Encoding::Json, &page(30, "", &["c"]), &mut out);
            assert_eq!(words(&mut out), ["applied c", "done 30"]);
            assert_eq!(session.next_ask(), Ask::Watch(30));
            session.ended(refused(410), NO_TIME, &mut out);
            assert_eq!(session.next_ask(), Ask::Page(None));
        }
    }

    #[test]
    fn a_partial_list_of_pages_never_looks_finished() {
        let begun = || {
            let mut session = Session::new(Resource::Pods, None);
            let mut out = Vec::new();
            session.next_ask();
            session.ended(refused(422), NO_TIME, &mut out);
            session.next_ask();
            session.page(Encoding::Json, &page(30, "t1", &["a"]), &mut out);
            session.next_ask();
            words(&mut out);
            (session, out)
        };
        for (end, said) in [
            (refused(410), "broken Unreachable"),
            (refused(403), "broken Forbidden"),
            (refused(404), "broken Missing"),
            (refused(400), "broken Unreachable"),
            (End::Broke("reset".to_owned()), "broken Unreachable"),
            (End::Silent, "broken Unreachable"),
        ] {
            let (mut session, mut out) = begun();
            session.ended(end, NO_TIME, &mut out);
            assert_eq!(words(&mut out), [said]);
            assert_eq!(session.next_ask(), Ask::Page(None));
        }
        // Half a page, a page of another list, what is no page at all.
        let half = page(30, "", &["b"]);
        for body in [&half[..half.len() - 2], &page(31, "", &["b"]), b"ok"] {
            let (mut session, mut out) = begun();
            session.page(Encoding::Json, body, &mut out);
            assert_eq!(words(&mut out), ["broken Unreachable"]);
            assert_eq!(session.next_ask(), Ask::Page(None));
        }
    }

    #[test]
    fn a_broken_watch_is_resumed_unless_kubernetes_went_back() {
        for end in [
            End::Broke("reset".to_owned()),
            End::Closed { due: false },
            End::Silent,
        ] {
            let (mut session, mut out) = watching();
            session.line(Encoding::Json, &event("ADDED", &pod("b", 15)), &mut out);
            words(&mut out);
            session.ended(end, Duration::from_secs(20), &mut out);
            assert_eq!((session.failures(), words(&mut out).len()), (0, 0));
            assert_eq!(session.next_ask(), Ask::Check);
            session.checked(Encoding::Json, &page(15, "", &[]), &mut out);
            assert_eq!(session.next_ask(), Ask::Watch(15));
            session.ended(End::Broke("reset".to_owned()), NO_TIME, &mut out);
            assert_eq!(session.failures(), 1);
            session.next_ask();
            session.checked(Encoding::Json, &page(14, "", &[]), &mut out);
            assert_eq!(session.next_ask(), Ask::StreamList);
        }
    }

    #[test]
    fn a_watch_that_goes_back_is_listed_anew() {
        for line in [event("ADDED", &pod("b", 9)), bookmark(9, false)] {
            let (mut session, mut out) = watching();
            assert_eq!(session.line(Encoding::Json, &line, &mut out), Flow::Drop);
            assert_eq!(words(&mut out), [""; 0]);
            assert_eq!(session.next_ask(), Ask::StreamList);
        }
    }

    #[test]
    fn gone_leads_to_a_list_at_once_and_is_no_fault() {
        let gone = event("ERROR", &json!({"code": 410, "message": "too old"}));
        let (mut session, mut out) = watching();
        assert_eq!(session.line(Encoding::Json, &gone, &mut out), Flow::Drop);
        assert_eq!(words(&mut out), [""; 0]);
        assert_eq!(session.next_ask(), Ask::StreamList);
        let (mut session, mut out) = watching();
        session.ended(refused(410), NO_TIME, &mut out);
        assert_eq!(words(&mut out), [""; 0]);
        assert_eq!(session.next_ask(), Ask::StreamList);
    }

    #[test]
    fn an_outage_is_told_and_so_is_its_end() {
        let (mut session, mut out) = watching();
        session.ended(End::Broke("reset".to_owned()), NO_TIME, &mut out);
        for failures in 2..5 {
            assert_eq!(session.next_ask(), Ask::Check);
            session.ended(End::Failed("refused".to_owned()), NO_TIME, &mut out);
            assert_eq!(words(&mut out), ["broken Unreachable"]);
            assert_eq!(session.failures(), failures);
        }
        session.next_ask();
        session.checked(Encoding::Json, &page(10, "", &[]), &mut out);
        // What worked is gone on with at once; a watch that breaks again waits longer still.
        assert_eq!(session.failures(), 0);
        let mut again = session.clone();
        again.ended(End::Broke("reset".to_owned()), NO_TIME, &mut out);
        assert_eq!(again.failures(), 5);
        again.ended(refused(410), NO_TIME, &mut out);
        assert_eq!(again.failures(), 1);
        words(&mut out);
        assert_eq!(session.next_ask(), Ask::Watch(10));
        session.opened(&mut out);
        assert_eq!(words(&mut out), ["bookmark 10"]);
    }

    #[test]
    fn a_forbidden_list_is_no_empty_one() {
        for (code, word) in [(401, "credentials"), (403, "ClusterRole")] {
            let mut session = Session::new(Resource::Pods, None);
            let mut out = Vec::new();
            session.next_ask();
            session.ended(refused(code), NO_TIME, &mut out);
            let [
                KubeInput::Broken {
                    problem: WatchProblem::Forbidden,
                    message,
                    ..
                },
            ] = &out[..]
            else {
                panic!("{out:?}");
            };
            assert!(message.contains(word), "{message}");
            assert_eq!(session.next_ask(), Ask::StreamList);
        }
    }

    #[test]
    fn a_deleted_crd_is_no_empty_list() {
        let object = |version: u64| {
            json!({"metadata": {"name": "web", "namespace": "shop", "uid": "r",
                "resourceVersion": version.to_string()}, "spec": {}})
        };
        let mut session = Session::new(Resource::Registrations, None);
        let mut out = Vec::new();
        session.next_ask();
        session.opened(&mut out);
        session.line(Encoding::Json, &event("ADDED", &object(5)), &mut out);
        session.line(Encoding::Json, &bookmark(10, true), &mut out);
        session.line(Encoding::Json, &event("DELETED", &object(11)), &mut out);
        assert_eq!(
            words(&mut out),
            ["started 0", "applied web", "done 10", "deleted web"]
        );
        session.ended(End::Closed { due: false }, NO_TIME, &mut out);
        session.next_ask();
        session.ended(refused(404), NO_TIME, &mut out);
        let [KubeInput::Broken { message, .. }] = &out[..] else {
            panic!("{out:?}");
        };
        assert!(message.contains("CustomResourceDefinition"), "{message}");
        words(&mut out);
        // With the CRD back, only a list tells what there is.
        assert_eq!(session.next_ask(), Ask::StreamList);
    }

    #[test]
    fn a_relist_drops_everything_and_carries_its_number() {
        let (mut session, mut out) = watching();
        assert!(session.relist(3));
        assert!(!session.relist(3));
        assert!(!session.relist(2));
        assert_eq!(session.next_ask(), Ask::StreamList);
        // Ordered while the list is asked for: this one does not count for it.
        assert!(session.relist(4));
        assert_eq!(session.next_ask(), Ask::StreamList);
        session.opened(&mut out);
        session.line(Encoding::Json, &bookmark(12, true), &mut out);
        assert_eq!(words(&mut out), ["started 4", "done 12"]);
    }

    #[test]
    fn an_object_that_is_not_understood_moves_the_watch_on() {
        let (mut session, mut out) = watching();
        let mut odd = pod("odd", 17);
        odd["spec"] = json!("none");
        assert_eq!(
            session.line(Encoding::Json, &event("ADDED", &odd), &mut out),
            Flow::Read
        );
        assert_eq!(words(&mut out), [""; 0]);
        let (count, last) = session.take_not_understood();
        assert_eq!(count, 1);
        assert!(last.unwrap().starts_with("shop/odd"));
        assert_eq!(session.take_not_understood(), (1, None));
        session.ended(End::Aged, NO_TIME, &mut out);
        assert_eq!(session.next_ask(), Ask::Watch(17));
    }

    #[test]
    fn what_is_no_watch_event_leads_to_a_list() {
        let (mut session, mut out) = watching();
        assert_eq!(
            session.line(Encoding::Json, b"<html>", &mut out),
            Flow::Drop
        );
        assert_eq!(words(&mut out), ["broken Unreachable"]);
        assert_eq!(session.next_ask(), Ask::StreamList);
    }

    #[test]
    fn the_backoff_grows_from_50_ms_to_5_s() {
        assert_eq!(backoff(0, 0.5), Duration::ZERO);
        assert_eq!(backoff(1, 0.0), Duration::from_millis(50));
        assert_eq!(backoff(1, 1.0), Duration::from_millis(25));
        assert_eq!(backoff(3, 0.0), Duration::from_millis(200));
        assert_eq!(backoff(8, 0.0), Duration::from_secs(5));
        assert_eq!(backoff(u32::MAX, 0.0), Duration::from_secs(5));
    }
}
