//! The watches of one resource in several namespaces --> one watch, as the engine knows it.
//!
//! Takes what each of them hears and the engine's orders to list anew; gives inputs as one watch would. Must never give
//! a list before every namespace has delivered its own: what is not named in a list is gone.
//!
//! At first, and when the engine wants a new list, nothing is handed on until every namespace has listed: so that list is
//! never older than what was handed on before. A namespace that lists anew by itself later is compared with what it had,
//! and only the difference is handed on: one that can't be read then does not stop the others. Where one watch is enough,
//! none of this is on the way.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use crate::engine::io::{Input, KubeInput, Object, Registration, Resource, WatchProblem};
use crate::model::pod::{Node, Pod};

use super::watch::{self as kube_watch, Sink, Watching};

/// Inputs that may wait here: the watches are slowed down beyond that.
const WAITING: usize = 256;

/// Watches a resource in each of the namespaces; ends only when the engine is gone.
pub async fn run(
    resource: Resource,
    namespaces: Vec<Arc<str>>,
    watching: Watching,
    inputs: mpsc::Sender<Input>,
    mut orders: watch::Receiver<u64>,
) {
    let (sender, mut parts) = mpsc::channel(WAITING);
    let rounds = watch::Sender::new(0);
    let mut merge = Merge::new(resource, namespaces.len());
    for (part, namespace) in namespaces.into_iter().enumerate() {
        let watching = Watching {
            sink: Sink::Part(part, sender.clone()),
            ..watching.clone()
        };
        let round = rounds.subscribe();
        tokio::spawn(kube_watch::run(resource, Some(namespace), watching, round));
    }
    let mut out = Vec::new();
    loop {
        let round = tokio::select! {
            Ok(()) = orders.changed() => {
                let number = *orders.borrow_and_update();
                Some(merge.order(number))
            }
            Some((part, input)) = parts.recv() => merge.take(part, input, &mut out),
            else => return,
        };
        if let Some(round) = round {
            rounds.send_replace(round);
        }
        for input in out.drain(..) {
            if inputs.send(Input::Kube(input)).await.is_err() {
                return;
            }
        }
    }
}

/// What is known of one namespace.
#[derive(Debug, Default)]
struct Part {
    /// It lists in this round, or has done so.
    current: bool,
    /// It has delivered a list in this round.
    complete: bool,
    /// A list is under way.
    listing: bool,
    /// The objects of a list, until they are handed on.
    listed: HashMap<Box<str>, Object>,
    /// What was handed on and stands.
    known: HashMap<Box<str>, Known>,
    /// The resource version that it has reached.
    position: u64,
    /// Why it can't be watched.
    broken: Option<WatchProblem>,
}

/// What is needed of an object to say that it is gone.
#[derive(Debug)]
struct Known {
    version: u64,
    /// Namespace and name, where an object is told by them.
    name: Option<(String, String)>,
}

/// The merged watch; pure.
#[derive(Debug)]
struct Merge {
    resource: Resource,
    parts: Vec<Part>,
    /// All parts list anew at least as often as this was counted up.
    round: u64,
    /// The newest relist that the engine ordered.
    ordered: u64,
    /// Not all parts are complete in this round: nothing is handed on.
    waiting: bool,
    /// The engine takes the watch for broken.
    told: bool,
}

impl Merge {
    fn new(resource: Resource, parts: usize) -> Self {
        Self {
            resource,
            parts: (0..parts).map(|_| Part::default()).collect(),
            round: 0,
            ordered: 0,
            waiting: true,
            told: false,
        }
    }

    /// The engine wants a new list; gives the round that every part is to list for.
    fn order(&mut self, number: u64) -> u64 {
        self.ordered = number;
        self.begin()
    }

    fn begin(&mut self) -> u64 {
        self.round += 1;
        self.waiting = true;
        for part in &mut self.parts {
            part.current = false;
            part.complete = false;
            part.listing = false;
            part.listed.clear();
        }
        self.round
    }

    /// What a part heard; gives the round that every part is to list for, if that is a new one.
    fn take(&mut self, number: usize, input: KubeInput, out: &mut Vec<KubeInput>) -> Option<u64> {
        let (round, waiting) = (self.round, self.waiting);
        let part = self.parts.get_mut(number)?;
        match input {
            KubeInput::ListStarted { relist, .. } => {
                if relist >= round {
                    part.current = true;
                    part.complete &= !waiting;
                    part.listing = true;
                    part.listed.clear();
                }
            }
            // Of a list or watch that was dropped for this round.
            KubeInput::Applied(_) | KubeInput::Deleted(_) | KubeInput::ListDone { .. }
                if !part.current => {}
            KubeInput::Applied(object) => {
                part.note(version(&object));
                if waiting || part.listing {
                    part.listed.insert(id(&object), object);
                } else {
                    part.known.insert(id(&object), Known::of(&object));
                    out.push(KubeInput::Applied(object));
                }
            }
            KubeInput::Deleted(object) => {
                part.note(version(&object));
                if waiting || part.listing {
                    part.listed.remove(&id(&object));
                } else {
                    part.known.remove(&id(&object));
                    out.push(KubeInput::Deleted(object));
                }
            }
            KubeInput::ListDone {
                resource_version, ..
            } => {
                part.broken = None;
                part.listing = false;
                part.complete = true;
                if !waiting && resource_version < part.position {
                    // Older than what was handed on: whether Kubernetes was restored is the engine's to judge.
                    return Some(self.begin());
                }
                part.position = resource_version;
                if !waiting {
                    part.compare(self.resource, out);
                    self.works(resource_version, out);
                } else if self.parts.iter().all(|part| part.complete) {
                    self.list(out);
                }
            }
            KubeInput::Bookmark {
                resource_version, ..
            } => {
                part.broken = None;
                part.note(resource_version);
                if !waiting {
                    self.works(resource_version, out);
                }
            }
            KubeInput::Broken { problem, .. } => {
                part.broken = Some(problem);
                if part.listing {
                    part.listing = false;
                    part.listed.clear();
                }
                if waiting || self.is_broken() {
                    self.told = true;
                    out.push(input);
                }
            }
            KubeInput::ClusterUid(_) | KubeInput::Answered => out.push(input),
        }
        None
    }

    /// A part works: so does the whole, unless another part is broken.
    fn works(&mut self, resource_version: u64, out: &mut Vec<KubeInput>) {
        if self.told && self.is_broken() {
            return;
        }
        self.told = false;
        out.push(KubeInput::Bookmark {
            resource: self.resource,
            resource_version,
        });
    }

    /// Every part is complete: one list of all.
    fn list(&mut self, out: &mut Vec<KubeInput>) {
        let resource = self.resource;
        self.waiting = false;
        self.told = false;
        out.push(KubeInput::ListStarted {
            resource,
            relist: self.ordered,
        });
        for part in &mut self.parts {
            part.known.clear();
            for (id, object) in part.listed.drain() {
                part.known.insert(id, Known::of(&object));
                out.push(KubeInput::Applied(object));
            }
        }
        // Up to there everything is known.
        let reached = self.parts.iter().map(|part| part.position).min();
        out.push(KubeInput::ListDone {
            resource,
            resource_version: reached.unwrap_or(0),
        });
    }

    /// Whether the whole is broken once it was complete. A namespace that the operator may no longer read (it may be
    /// gone, and its Role with it) stays as it was, and does not stop the others.
    fn is_broken(&self) -> bool {
        let forbidden = |part: &Part| part.broken == Some(WatchProblem::Forbidden);
        self.parts.iter().all(forbidden)
            || self
                .parts
                .iter()
                .any(|part| part.broken.is_some() && !forbidden(part))
    }
}

impl Part {
    fn note(&mut self, version: u64) {
        if self.complete && !self.listing {
            self.position = self.position.max(version);
        }
    }

    /// Hands on how a new list differs from what is known.
    fn compare(&mut self, resource: Resource, out: &mut Vec<KubeInput>) {
        let listed = std::mem::take(&mut self.listed);
        self.known.retain(|id, known| {
            let stands = listed.contains_key(id);
            if !stands {
                out.push(KubeInput::Deleted(known.object(resource, id)));
            }
            stands
        });
        for (id, object) in listed {
            let new = Known::of(&object);
            let old = self.known.insert(id, new);
            if old.is_none_or(|old| old.version != version(&object)) {
                out.push(KubeInput::Applied(object));
            }
        }
    }
}

impl Known {
    fn of(object: &Object) -> Self {
        Self {
            version: version(object),
            name: match object {
                Object::Registration(found) => Some((found.namespace.clone(), found.name.clone())),
                Object::Pod(_) | Object::Node(_) => None,
            },
        }
    }

    /// The object as far as it is needed to say that it is gone.
    fn object(&self, resource: Resource, id: &str) -> Object {
        match resource {
            Resource::Pods => Object::Pod(Pod {
                uid: id.into(),
                resource_version: self.version,
                ..Pod::default()
            }),
            Resource::Nodes => Object::Node(Node {
                name: id.into(),
                resource_version: self.version,
                ..Node::default()
            }),
            Resource::Registrations => {
                let (namespace, name) = self.name.clone().unwrap_or_default();
                Object::Registration(Box::new(Registration {
                    namespace,
                    name,
                    uid: id.to_owned(),
                    generation: 0,
                    resource_version: self.version,
                    created: 0,
                    deleting: true,
                    spec: Err("it is gone".to_owned()),
                    status: None,
                }))
            }
        }
    }
}

fn id(object: &Object) -> Box<str> {
    match object {
        Object::Pod(pod) => pod.uid.clone(),
        Object::Node(node) => node.name.clone(),
        Object::Registration(registration) => registration.uid.as_str().into(),
    }
}

fn version(object: &Object) -> u64 {
    match object {
        Object::Pod(pod) => pod.resource_version,
        Object::Node(node) => node.resource_version,
        Object::Registration(registration) => registration.resource_version,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PODS: Resource = Resource::Pods;

    fn pod(uid: &str, resource_version: u64) -> Object {
        Object::Pod(Pod {
            uid: uid.into(),
            resource_version,
            ..Pod::default()
        })
    }

    fn started(relist: u64) -> KubeInput {
        KubeInput::ListStarted {
            resource: PODS,
            relist,
        }
    }

    fn done(resource_version: u64) -> KubeInput {
        KubeInput::ListDone {
            resource: PODS,
            resource_version,
        }
    }

    fn bookmark(resource_version: u64) -> KubeInput {
        KubeInput::Bookmark {
            resource: PODS,
            resource_version,
        }
    }

    fn broken(problem: WatchProblem) -> KubeInput {
        KubeInput::Broken {
            resource: PODS,
            problem,
            message: "no".to_owned(),
        }
    }

    fn applied(uid: &str, version: u64) -> KubeInput {
        KubeInput::Applied(pod(uid, version))
    }

    /// Hands the inputs over and gives what the engine is told, and the newest round.
    fn tell(merge: &mut Merge, inputs: Vec<(usize, KubeInput)>) -> (Vec<KubeInput>, Option<u64>) {
        let mut out = Vec::new();
        let mut round = None;
        for (part, input) in inputs {
            round = merge.take(part, input, &mut out).or(round);
        }
        (out, round)
    }

    fn complete() -> Merge {
        let mut merge = Merge::new(PODS, 2);
        tell(
            &mut merge,
            vec![
                (0, started(0)),
                (0, applied("a", 3)),
                (0, done(10)),
                (1, started(0)),
                (1, applied("b", 4)),
                (1, done(12)),
            ],
        );
        assert!(!merge.waiting);
        merge
    }

    #[test]
    fn a_list_comes_when_every_namespace_has_its_own_and_with_what_changed_meanwhile() {
        let mut merge = Merge::new(PODS, 2);
        let (told, _) = tell(
            &mut merge,
            vec![
                (0, started(0)),
                (0, applied("a", 3)),
                (0, applied("gone", 4)),
                (0, done(10)),
                (0, applied("a", 11)),
                (0, KubeInput::Deleted(pod("gone", 12))),
                (0, bookmark(15)),
                (1, started(0)),
                (1, applied("b", 5)),
            ],
        );
        assert_eq!(told, []);
        let (told, round) = tell(&mut merge, vec![(1, done(14))]);
        // Only up to the earlier of both is everything known.
        assert_eq!(
            told,
            [started(0), applied("a", 11), applied("b", 5), done(14)]
        );
        assert_eq!(round, None);
        let change = applied("b", 16);
        assert_eq!(tell(&mut merge, vec![(1, change)]).0, [applied("b", 16)]);
    }

    #[test]
    fn a_namespace_that_cannot_be_read_at_first_holds_the_list_back() {
        let mut merge = Merge::new(PODS, 2);
        let forbidden = broken(WatchProblem::Forbidden);
        let (told, _) = tell(
            &mut merge,
            vec![
                (0, started(0)),
                (0, applied("a", 3)),
                (0, done(10)),
                (1, forbidden.clone()),
                (0, bookmark(20)),
            ],
        );
        assert_eq!(told, [forbidden]);
    }

    #[test]
    fn one_that_lists_anew_hands_on_the_difference_and_a_list_cut_short_counts_for_nothing() {
        let mut merge = complete();
        let (told, round) = tell(
            &mut merge,
            vec![
                (1, applied("c", 13)),
                (1, started(0)),
                (1, applied("cut", 14)),
                (1, broken(WatchProblem::Forbidden)),
                (0, applied("a", 21)),
                (1, started(0)),
                (1, applied("c", 15)),
                (1, applied("d", 16)),
                (1, done(22)),
            ],
        );
        assert_eq!(round, None);
        let gone = KubeInput::Deleted(pod("b", 4));
        let (changes, end) = told.split_at(3);
        assert_eq!(changes, [applied("c", 13), applied("a", 21), gone]);
        let (end, last) = end.split_at(end.len() - 1);
        assert_eq!(last, [bookmark(22)]);
        assert!(end.len() == 2 && end.contains(&applied("c", 15)), "{end:?}");
        assert!(end.contains(&applied("d", 16)), "{end:?}");
        // What did not change is not handed on.
        let again = vec![
            (1, started(0)),
            (1, applied("c", 15)),
            (1, applied("d", 16)),
            (1, done(23)),
        ];
        assert_eq!(tell(&mut merge, again).0, [bookmark(23)]);
    }

    #[test]
    fn a_list_that_is_older_than_what_was_handed_on_makes_all_list_anew() {
        let mut merge = complete();
        let (told, round) = tell(
            &mut merge,
            vec![(1, bookmark(20)), (1, started(0)), (1, done(19))],
        );
        assert_eq!((told, round), (vec![bookmark(20)], Some(1)));
        assert!(merge.waiting);
    }

    #[test]
    fn a_registration_that_a_new_list_lacks_is_deleted_by_its_name() {
        let mut merge = Merge::new(Resource::Registrations, 1);
        let registration = Known {
            version: 3,
            name: Some(("shop".into(), "web".into())),
        }
        .object(Resource::Registrations, "uid");
        tell(
            &mut merge,
            vec![
                (0, started(0)),
                (0, KubeInput::Applied(registration.clone())),
                (0, done(10)),
            ],
        );
        let (told, _) = tell(&mut merge, vec![(0, started(0)), (0, done(11))]);
        assert_eq!(told.first(), Some(&KubeInput::Deleted(registration)));
    }

    #[test]
    fn an_order_of_the_engine_is_answered_by_lists_that_were_asked_for_after_it() {
        let mut merge = complete();
        assert_eq!(merge.order(7), 1);
        let (told, _) = tell(
            &mut merge,
            vec![
                (0, started(0)),
                (0, done(20)),
                (0, started(1)),
                (0, done(30)),
                (1, started(0)),
                (1, done(20)),
            ],
        );
        assert_eq!(told, []);
        let (told, _) = tell(&mut merge, vec![(1, started(1)), (1, done(31))]);
        assert_eq!(told, [started(7), done(30)]);
    }

    #[test]
    fn a_namespace_that_may_no_longer_be_read_stops_no_other_but_an_absent_api_server_does() {
        let mut merge = complete();
        let forbidden = broken(WatchProblem::Forbidden);
        assert_eq!(tell(&mut merge, vec![(1, forbidden.clone())]).0, []);
        // None can be read: that is said.
        assert_eq!(
            tell(&mut merge, vec![(0, forbidden.clone())]).0,
            [forbidden]
        );
        assert_eq!(tell(&mut merge, vec![(0, bookmark(20))]).0, [bookmark(20)]);
        let away = broken(WatchProblem::Unreachable);
        assert_eq!(tell(&mut merge, vec![(0, away)]).0.len(), 1);
        // A bookmark of one does not make the other work again.
        assert_eq!(tell(&mut merge, vec![(1, bookmark(21))]).0, []);
        assert_eq!(tell(&mut merge, vec![(0, bookmark(22))]).0, [bookmark(22)]);
    }
}
