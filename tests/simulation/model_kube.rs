//! A model of Kubernetes: objects, resource versions, and the log that watches deliver.
//!
//! Takes changes, gives lists (also what an old cache would list) and the events after a resource
//! version, and what was true at any. Must never let an object change without a new resource version.

use std::collections::BTreeMap;

use etcd_registrar::api::ServiceRegistrationStatus;
use etcd_registrar::engine::io::{Object, Registration, Resource};
use etcd_registrar::model::pod::{Node, Pod};

/// An event of a watch.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Applied(Object),
    Deleted(Object),
}

impl Event {
    pub(crate) fn object(&self) -> &Object {
        match self {
            Self::Applied(object) | Self::Deleted(object) => object,
        }
    }
}

/// What an object was, from which resource version on; `None`: gone.
type Versions = Vec<(u64, Option<Object>)>;

/// What the API server holds.
#[derive(Debug)]
pub(crate) struct Kube {
    pub(crate) version: u64,
    /// By UID.
    pub(crate) pods: BTreeMap<String, Pod>,
    /// By name.
    pub(crate) nodes: BTreeMap<String, Node>,
    /// By `namespace/name`.
    pub(crate) registrations: BTreeMap<String, Registration>,
    log: Vec<(u64, Event)>,
    /// Every object, by resource and name, with what it was from which resource version on.
    history: BTreeMap<(Resource, String), Versions>,
    /// The resource versions at which a pod changed.
    pod_versions: Vec<u64>,
    /// And a registration, but for its status.
    spec_versions: Vec<u64>,
    /// At which resource version a pod left (was deleted, began to terminate, or finished).
    left: BTreeMap<String, u64>,
    next_uid: u64,
}

impl Kube {
    pub(crate) fn new() -> Self {
        Self {
            version: 1,
            pods: BTreeMap::new(),
            nodes: BTreeMap::new(),
            registrations: BTreeMap::new(),
            log: Vec::new(),
            history: BTreeMap::new(),
            pod_versions: Vec::new(),
            spec_versions: Vec::new(),
            left: BTreeMap::new(),
            next_uid: 1,
        }
    }

    /// A UID that no object has had.
    pub(crate) fn new_uid(&mut self) -> String {
        let number = self.next_uid;
        self.next_uid += 1;
        // Not in the order of creation, so that nothing can rely on it.
        let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        format!("{:08x}-0000-4000-8000-{:012x}", mixed >> 32, number)
    }

    /// When a pod left, if it did.
    pub(crate) fn left_at(&self, uid: &str) -> Option<u64> {
        self.left.get(uid).copied()
    }

    pub(crate) fn put_pod(&mut self, mut pod: Pod) {
        self.version += 1;
        pod.resource_version = self.version;
        if pod.deleting || pod.finished {
            self.left.entry(pod.uid.to_string()).or_insert(self.version);
        }
        self.pods.insert(pod.uid.to_string(), pod.clone());
        self.note(Event::Applied(Object::Pod(pod)));
    }

    pub(crate) fn delete_pod(&mut self, uid: &str) {
        if let Some(mut pod) = self.pods.remove(uid) {
            self.version += 1;
            pod.resource_version = self.version;
            self.left.entry(uid.to_owned()).or_insert(self.version);
            self.note(Event::Deleted(Object::Pod(pod)));
        }
    }

    pub(crate) fn put_node(&mut self, mut node: Node) {
        self.version += 1;
        node.resource_version = self.version;
        self.nodes.insert(node.name.to_string(), node.clone());
        self.note(Event::Applied(Object::Node(node)));
    }

    pub(crate) fn delete_node(&mut self, name: &str) {
        if let Some(mut node) = self.nodes.remove(name) {
            self.version += 1;
            node.resource_version = self.version;
            self.note(Event::Deleted(Object::Node(node)));
        }
    }

    /// Creates a registration, or gives an existing one another spec.
    pub(crate) fn put_registration(&mut self, mut registration: Registration) {
        self.version += 1;
        registration.resource_version = self.version;
        let full_name = format!("{}/{}", registration.namespace, registration.name);
        if let Some(known) = self.registrations.get(&full_name) {
            registration.generation = known.generation;
            if known.spec != registration.spec {
                registration.generation += 1;
            }
        }
        self.registrations.insert(full_name, registration.clone());
        self.note(Event::Applied(Object::Registration(Box::new(registration))));
    }

    pub(crate) fn delete_registration(&mut self, full_name: &str) {
        if let Some(mut registration) = self.registrations.remove(full_name) {
            self.version += 1;
            registration.resource_version = self.version;
            self.note(Event::Deleted(Object::Registration(Box::new(registration))));
        }
    }

    /// What the status writer of a process does.
    pub(crate) fn put_status(
        &mut self,
        full_name: &str,
        uid: &str,
        status: ServiceRegistrationStatus,
    ) {
        let Some(known) = self.registrations.get(full_name) else {
            return;
        };
        if known.uid != uid || known.status.as_ref() == Some(&status) {
            return;
        }
        let mut registration = known.clone();
        registration.status = Some(status);
        self.put_registration(registration);
    }

    fn note(&mut self, event: Event) {
        let (object, stands) = match &event {
            Event::Applied(object) => (object, true),
            Event::Deleted(object) => (object, false),
        };
        let name = match object {
            Object::Pod(pod) => (Resource::Pods, pod.uid.to_string()),
            Object::Node(node) => (Resource::Nodes, node.name.to_string()),
            Object::Registration(found) => (
                Resource::Registrations,
                format!("{}/{}", found.namespace, found.name),
            ),
        };
        let versions = self.history.entry(name).or_default();
        match object {
            Object::Pod(_) => self.pod_versions.push(self.version),
            Object::Node(_) => {}
            Object::Registration(found) => {
                let same = match versions.last() {
                    Some((_, Some(Object::Registration(known)))) => {
                        stands && known.uid == found.uid && known.spec == found.spec
                    }
                    _ => false,
                };
                if !same {
                    self.spec_versions.push(self.version);
                }
            }
        }
        versions.push((self.version, stands.then(|| object.clone())));
        self.log.push((self.version, event));
    }

    /// What stood at a resource version.
    fn at(&self, resource: Resource, version: u64) -> impl Iterator<Item = &Object> {
        let first = (resource, String::new());
        self.history
            .range(first..)
            .take_while(move |((of, _), _)| *of == resource)
            .filter_map(move |(_, versions)| {
                let after = versions.partition_point(|(from, _)| *from <= version);
                versions.get(after.checked_sub(1)?)?.1.as_ref()
            })
    }

    /// The pods at a resource version.
    pub(crate) fn pods_at(&self, version: u64) -> Vec<&Pod> {
        self.at(Resource::Pods, version)
            .filter_map(|object| match object {
                Object::Pod(pod) => Some(pod),
                Object::Node(_) | Object::Registration(_) => None,
            })
            .collect()
    }

    /// The registrations at a resource version.
    pub(crate) fn registrations_at(&self, version: u64) -> Vec<&Registration> {
        self.at(Resource::Registrations, version)
            .filter_map(|object| match object {
                Object::Registration(found) => Some(&**found),
                Object::Pod(_) | Object::Node(_) => None,
            })
            .collect()
    }

    /// How many changes of pods, and of registrations (but for statuses), came up to these versions: where
    /// they are the same, so is what is wanted.
    pub(crate) fn state_at(&self, pods: u64, registrations: u64) -> (usize, usize) {
        (
            self.pod_versions.partition_point(|at| *at <= pods),
            self.spec_versions
                .partition_point(|at| *at <= registrations),
        )
    }

    /// The resource versions after one at which a pod changed.
    pub(crate) fn pod_versions_after(&self, version: u64) -> &[u64] {
        let from = self.pod_versions.partition_point(|at| *at <= version);
        self.pod_versions.get(from..).unwrap_or(&[])
    }

    /// A list: consistent at the newest resource version, else what an old cache gives.
    pub(crate) fn list_at(&self, resource: Resource, version: u64) -> Vec<Object> {
        self.at(resource, version).cloned().collect()
    }

    /// The events of a resource after a resource version, with theirs.
    pub(crate) fn events(
        &self,
        resource: Resource,
        after: u64,
    ) -> impl Iterator<Item = (u64, &Event)> {
        let from = self.log.partition_point(|(version, _)| *version <= after);
        self.log
            .get(from..)
            .unwrap_or(&[])
            .iter()
            .filter(move |(_, event)| {
                resource
                    == match event.object() {
                        Object::Pod(_) => Resource::Pods,
                        Object::Node(_) => Resource::Nodes,
                        Object::Registration(_) => Resource::Registrations,
                    }
            })
            .map(|(version, event)| (*version, event))
    }
}
