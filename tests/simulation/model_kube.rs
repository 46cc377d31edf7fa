//! A model of Kubernetes: objects, resource versions, and the log that watches deliver.
//!
//! Takes changes, gives lists at a resource version and the events after one. Must never let an object
//! change without a new resource version.

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
        self.log.push((self.version, event));
    }

    /// A consistent list.
    pub(crate) fn list(&self, resource: Resource) -> Vec<Object> {
        match resource {
            Resource::Pods => self.pods.values().cloned().map(Object::Pod).collect(),
            Resource::Nodes => self.nodes.values().cloned().map(Object::Node).collect(),
            Resource::Registrations => self
                .registrations
                .values()
                .cloned()
                .map(|registration| Object::Registration(Box::new(registration)))
                .collect(),
        }
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
