//! The JSON of the API server, or its protobuf --> slim objects of the project's own.
//!
//! Takes one line of a watch or one page of a list; gives pods, nodes and registrations, bookmarks
//! and errors. Pods and nodes come as protobuf (`wire/protobuf.rs`), which the other controllers of Kubernetes read, too, and
//! is a quarter of the work; custom resources have JSON alone. What the project does not read (`managedFields` above all) is skipped while parsing
//! and never held in memory. Pure: must never do IO, log or keep anything between two calls.

mod protobuf;

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;

use k8s_openapi::jiff::Timestamp;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use crate::engine::io::{Object, Registration, Resource};
use crate::model::endpoint::Protocol;
use crate::model::names::shortened;
use crate::model::pod::{ContainerPort, Node, Pod};

/// The longest value of an annotation that is kept, in bytes: what a person writes for a record is
/// short, and tools keep whole documents in annotations (up to 256 KiB a pod).
const MAX_ANNOTATION_BYTES: usize = 256;

/// The most annotations kept of a pod, so that the memory per pod is bounded.
const MAX_ANNOTATIONS: usize = 64;

/// The most characters of why a part can't be read: the words of serde repeat what stands there, and a
/// condition takes 32,768.
const MAX_WHY: usize = 1_024;

/// kubectl's own annotations hold copies of whole objects and say nothing about an endpoint.
const KUBECTL_ANNOTATIONS: &str = "kubectl.kubernetes.io/";

/// Marks the bookmark that ends the initial events of a streaming list (KEP-3157).
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// The zone of a node: a well-known label of Kubernetes.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Why a line or page could not be used.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// What came is no answer of a Kubernetes API server.
    #[error("the API server sent what is no watch event or list: {0}")]
    NoJson(#[source] serde_json::Error),
    /// The same, of an answer in protobuf.
    #[error("the API server sent what is no watch event or list in protobuf: {0}")]
    NoProtobuf(String),
    /// A list, bookmark or event without a usable `metadata.resourceVersion`.
    #[error("the API server sent the resource version {0:?}, which is no positive number")]
    NoVersion(String),
}

impl From<prost::DecodeError> for WireError {
    fn from(error: prost::DecodeError) -> Self {
        Self::NoProtobuf(error.to_string())
    }
}

/// How an answer of the API server is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Text; the events of a watch are lines.
    Json,
    /// The protobuf of Kubernetes; each event of a watch comes after its length (four bytes, the highest first).
    Protobuf,
}

const JSON: &str = "application/json";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

impl Encoding {
    /// The header `Accept` that asks for a resource. The API server has its choice: one that stands in for Kubernetes
    /// may know JSON alone.
    #[must_use]
    pub fn accepted(resource: Resource) -> &'static str {
        match resource {
            Resource::Pods | Resource::Nodes => {
                "application/vnd.kubernetes.protobuf, application/json"
            }
            Resource::Registrations => JSON,
        }
    }

    /// What the header `Content-Type` of an answer says; without one it is JSON.
    #[must_use]
    pub fn of(content_type: &str) -> Self {
        let media_type = content_type.split(';').next().unwrap_or_default();
        if media_type.trim().eq_ignore_ascii_case(PROTOBUF) {
            Self::Protobuf
        } else {
            Self::Json
        }
    }
}

/// An object that the API server sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// It was understood.
    Read(Object),
    /// It was not; why, and which object, for a person.
    NotUnderstood(String),
}

/// What one line of a watch says.
#[derive(Clone, Debug, PartialEq)]
pub enum Line {
    /// An object was added or modified, at this resource version.
    Applied(Item, u64),
    /// An object was deleted, at this resource version.
    Deleted(Item, u64),
    /// The watch has reached this resource version; `list_end`: the initial events are complete.
    Bookmark {
        /// The resource version.
        resource_version: u64,
        /// All objects of the list were sent.
        list_end: bool,
    },
    /// The API server ends the watch with this answer.
    Error(Refusal),
}

/// One page of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Page {
    /// The resource version of the whole list.
    pub resource_version: u64,
    /// Asks for the next page; `None`: this is the last one.
    pub next: Option<String>,
    /// The objects.
    pub items: Vec<Item>,
}

/// An answer that is no success: a `Status` of Kubernetes, shortened.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Refusal {
    /// The HTTP status code.
    pub code: u16,
    /// What the API server said, for a person.
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (HTTP {})", self.message, self.code)
    }
}

/// Reads one line of a watch.
///
/// # Errors
/// [`WireError`] when the line is no watch event; an object alone that is not understood is none.
pub fn read_line(resource: Resource, encoding: Encoding, line: &[u8]) -> Result<Line, WireError> {
    match (encoding, resource) {
        (Encoding::Protobuf, Resource::Pods) => protobuf::event::<protobuf::Pod>(line),
        (Encoding::Protobuf, Resource::Nodes) => protobuf::event::<protobuf::Node>(line),
        (Encoding::Protobuf, Resource::Registrations) => Err(no_protobuf()),
        (Encoding::Json, Resource::Pods) => event::<WirePod<'_>>(line),
        (Encoding::Json, Resource::Nodes) => event::<WireNode<'_>>(line),
        (Encoding::Json, Resource::Registrations) => event::<WireRegistration<'_>>(line),
    }
}

/// Reads one page of a list.
///
/// # Errors
/// [`WireError`] when the body is no list; an object alone that is not understood is none.
pub fn read_page(resource: Resource, encoding: Encoding, body: &[u8]) -> Result<Page, WireError> {
    match (encoding, resource) {
        (Encoding::Protobuf, Resource::Pods) => protobuf::page::<protobuf::Pod>(body),
        (Encoding::Protobuf, Resource::Nodes) => protobuf::page::<protobuf::Node>(body),
        (Encoding::Protobuf, Resource::Registrations) => Err(no_protobuf()),
        (Encoding::Json, Resource::Pods) => page::<WirePod<'_>>(body),
        (Encoding::Json, Resource::Nodes) => page::<WireNode<'_>>(body),
        (Encoding::Json, Resource::Registrations) => page::<WireRegistration<'_>>(body),
    }
}

/// Reads the resource version of a list, and nothing else of it.
///
/// # Errors
/// [`WireError`] when the body is no list.
pub fn read_list_version(encoding: Encoding, body: &[u8]) -> Result<u64, WireError> {
    if encoding == Encoding::Protobuf {
        return protobuf::list_version(body);
    }
    let list: WireObject<'_> = serde_json::from_slice(body).map_err(WireError::NoJson)?;
    list.metadata.version()
}

/// Reads an answer that is no success. One that is no `Status` comes from something between here and the API server: its
/// words are kept.
#[must_use]
pub fn read_refusal(code: u16, encoding: Encoding, body: &[u8]) -> Refusal {
    let read = match encoding {
        Encoding::Json => serde_json::from_slice::<WireStatus>(body)
            .ok()
            .map(|status| status.message),
        Encoding::Protobuf => protobuf::refusal(body).ok().map(|refusal| refusal.message),
    };
    let message = read.filter(|message| !message.is_empty());
    Refusal {
        code,
        message: message
            .unwrap_or_else(|| shortened(String::from_utf8_lossy(body).trim(), MAX_WHY)),
    }
}

/// Reads the UID of any object.
///
/// # Errors
/// [`WireError::NoJson`] when the body is no object of Kubernetes.
pub fn read_uid(body: &[u8]) -> Result<String, WireError> {
    let object: WireObject<'_> = serde_json::from_slice(body).map_err(WireError::NoJson)?;
    Ok(object.metadata.uid.into_owned())
}

fn no_protobuf() -> WireError {
    WireError::NoProtobuf("custom resources have none".to_owned())
}

// === events and pages ===

/// A wire type that becomes an [`Object`].
trait Wire<'a>: Deserialize<'a> {
    /// The slim object, or why it can't be used.
    fn object(self) -> Result<Object, String>;
    /// The metadata.
    fn metadata(&self) -> &WireMetadata<'a>;
}

fn event<'a, T: Wire<'a>>(line: &'a [u8]) -> Result<Line, WireError> {
    // The fast path reads the line once; what it can't read is looked at again, part by part.
    match serde_json::from_slice::<WireEvent<'a, T>>(line) {
        Ok(event) => match event.kind {
            Kind::Added | Kind::Modified => {
                let version = event.object.metadata().version()?;
                Ok(Line::Applied(item(event.object), version))
            }
            Kind::Deleted => {
                let version = event.object.metadata().version()?;
                Ok(Line::Deleted(item(event.object), version))
            }
            Kind::Bookmark => bookmark(line),
            Kind::Error => error(line),
        },
        Err(error) => odd_event(line, &error),
    }
}

fn odd_event(line: &[u8], why: &serde_json::Error) -> Result<Line, WireError> {
    let event: WireEvent<'_, &RawValue> =
        serde_json::from_slice(line).map_err(WireError::NoJson)?;
    let read = |raw: &RawValue| -> Result<(Item, u64), WireError> {
        let object: WireObject<'_> = serde_json::from_str(raw.get()).map_err(WireError::NoJson)?;
        let version = object.metadata.version()?;
        Ok((not_understood(&object.metadata, &why.to_string()), version))
    };
    match event.kind {
        Kind::Added | Kind::Modified => {
            read(event.object).map(|(item, version)| Line::Applied(item, version))
        }
        Kind::Deleted => read(event.object).map(|(item, version)| Line::Deleted(item, version)),
        Kind::Bookmark => bookmark(line),
        Kind::Error => error(line),
    }
}

fn bookmark(line: &[u8]) -> Result<Line, WireError> {
    let event: WireEvent<'_, WireBookmark<'_>> =
        serde_json::from_slice(line).map_err(WireError::NoJson)?;
    let metadata = event.object.metadata;
    Ok(Line::Bookmark {
        resource_version: version(&metadata.resource_version)?,
        list_end: metadata
            .annotations
            .0
            .iter()
            .any(|(key, value)| &**key == INITIAL_EVENTS_END && &**value == "true"),
    })
}

fn error(line: &[u8]) -> Result<Line, WireError> {
    let event: WireEvent<'_, WireStatus> =
        serde_json::from_slice(line).map_err(WireError::NoJson)?;
    Ok(Line::Error(Refusal {
        code: event.object.code,
        message: event.object.message,
    }))
}

fn page<'a, T: Wire<'a>>(body: &'a [u8]) -> Result<Page, WireError> {
    if let Ok(list) = serde_json::from_slice::<WireList<'a, T>>(body) {
        return Ok(Page {
            resource_version: version(&list.metadata.resource_version)?,
            next: next_page(list.metadata.next),
            items: list.items.into_iter().map(item).collect(),
        });
    }
    // Some object of the page is odd: each is read alone, so that the others still count.
    let list: WireList<'a, &'a RawValue> =
        serde_json::from_slice(body).map_err(WireError::NoJson)?;
    let items = list.items.into_iter().map(|raw| {
        serde_json::from_str::<T>(raw.get()).map_or_else(
            |why| {
                let metadata = serde_json::from_str::<WireObject<'_>>(raw.get())
                    .map(|object| object.metadata)
                    .unwrap_or_default();
                not_understood(&metadata, &why.to_string())
            },
            item,
        )
    });
    Ok(Page {
        resource_version: version(&list.metadata.resource_version)?,
        next: next_page(list.metadata.next),
        items: items.collect(),
    })
}

fn next_page(token: Cow<'_, str>) -> Option<String> {
    (!token.is_empty()).then(|| token.into_owned())
}

fn item<'a, T: Wire<'a>>(wire: T) -> Item {
    let (namespace, name) = {
        let metadata = wire.metadata();
        (metadata.namespace.clone(), metadata.name.clone())
    };
    match wire.object() {
        Ok(object) => Item::Read(object),
        Err(why) => Item::NotUnderstood(format!("{namespace}/{name}: {why}")),
    }
}

fn not_understood(metadata: &WireMetadata<'_>, why: &str) -> Item {
    Item::NotUnderstood(format!("{}/{}: {why}", metadata.namespace, metadata.name))
}

fn version(text: &str) -> Result<u64, WireError> {
    match text.parse() {
        Ok(version) if version > 0 => Ok(version),
        _ => Err(WireError::NoVersion(text.to_owned())),
    }
}

// === wire types: only what is read; everything else is skipped while parsing ===

#[derive(Deserialize)]
struct WireEvent<'a, T> {
    #[serde(rename = "type")]
    kind: Kind,
    object: T,
    #[serde(skip)]
    lifetime: PhantomData<&'a ()>,
}

#[derive(Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Kind {
    Added,
    Modified,
    Deleted,
    Bookmark,
    Error,
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "T: Deserialize<'de>"))]
struct WireList<'a, T> {
    #[serde(borrow, default)]
    metadata: WireListMetadata<'a>,
    #[serde(default = "Vec::new", deserialize_with = "nullable")]
    items: Vec<T>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct WireListMetadata<'a> {
    #[serde(borrow)]
    resource_version: Cow<'a, str>,
    #[serde(borrow, rename = "continue")]
    next: Cow<'a, str>,
}

#[derive(Deserialize)]
struct WireStatus {
    #[serde(default)]
    message: String,
    #[serde(default)]
    code: u16,
}

#[derive(Deserialize)]
struct WireBookmark<'a> {
    #[serde(borrow)]
    metadata: WireBookmarkMetadata<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireBookmarkMetadata<'a> {
    #[serde(borrow)]
    resource_version: Cow<'a, str>,
    #[serde(default, deserialize_with = "nullable")]
    annotations: Annotations,
}

/// Any object, its metadata alone.
#[derive(Deserialize)]
struct WireObject<'a> {
    #[serde(borrow, default)]
    metadata: WireMetadata<'a>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct WireMetadata<'a> {
    #[serde(borrow)]
    namespace: Cow<'a, str>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    uid: Cow<'a, str>,
    #[serde(borrow)]
    resource_version: Cow<'a, str>,
    generation: i64,
    creation_timestamp: Option<Timestamp>,
    deletion_timestamp: Option<IgnoredAny>,
}

impl WireMetadata<'_> {
    fn version(&self) -> Result<u64, WireError> {
        version(&self.resource_version)
    }

    fn created(&self) -> i64 {
        self.creation_timestamp.map_or(0, Timestamp::as_second)
    }

    /// The resource version, after the caller of [`Wire::object`] saw that it is one.
    fn version_text(&self) -> Result<u64, String> {
        self.version().map_err(|error| error.to_string())
    }
}

#[derive(Deserialize)]
struct WirePod<'a> {
    #[serde(borrow, default)]
    metadata: WirePodMetadata<'a>,
    #[serde(borrow, default)]
    spec: WirePodSpec<'a>,
    #[serde(borrow, default)]
    status: WirePodStatus<'a>,
}

/// Flattening would make serde buffer the whole object, so a pod's metadata is read by hand.
#[derive(Default)]
struct WirePodMetadata<'a> {
    common: WireMetadata<'a>,
    labels: Labels,
    annotations: Annotations,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct WirePodSpec<'a> {
    #[serde(borrow)]
    node_name: Cow<'a, str>,
    host_network: bool,
    #[serde(borrow, deserialize_with = "nullable")]
    containers: Vec<WireContainer<'a>>,
    #[serde(borrow, deserialize_with = "nullable")]
    init_containers: Vec<WireContainer<'a>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct WireContainer<'a> {
    #[serde(borrow)]
    restart_policy: Cow<'a, str>,
    #[serde(borrow, deserialize_with = "nullable")]
    ports: Vec<WirePort<'a>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct WirePort<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    container_port: i64,
    host_port: i64,
    #[serde(borrow)]
    protocol: Cow<'a, str>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct WirePodStatus<'a> {
    #[serde(borrow)]
    phase: Cow<'a, str>,
    #[serde(borrow, deserialize_with = "nullable")]
    conditions: Vec<WireCondition<'a>>,
    #[serde(borrow, rename = "podIP")]
    pod_ip: Cow<'a, str>,
    #[serde(borrow, rename = "podIPs", deserialize_with = "nullable")]
    pod_ips: Vec<WireIp<'a>>,
    #[serde(borrow, rename = "hostIP")]
    host_ip: Cow<'a, str>,
    #[serde(borrow, rename = "hostIPs", deserialize_with = "nullable")]
    host_ips: Vec<WireIp<'a>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct WireCondition<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    status: Cow<'a, str>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct WireIp<'a> {
    #[serde(borrow)]
    ip: Cow<'a, str>,
}

impl<'a> Wire<'a> for WirePod<'a> {
    fn metadata(&self) -> &WireMetadata<'a> {
        &self.metadata.common
    }

    fn object(self) -> Result<Object, String> {
        let WirePodMetadata {
            common,
            labels,
            annotations,
        } = self.metadata;
        if common.uid.is_empty() || common.name.is_empty() || common.namespace.is_empty() {
            return Err("metadata lacks a uid, name or namespace".to_owned());
        }
        let sidecars = self
            .spec
            .init_containers
            .iter()
            .filter(|container| container.restart_policy == "Always");
        let ports = self
            .spec
            .containers
            .iter()
            .chain(sidecars)
            .flat_map(|container| &container.ports)
            .filter_map(container_port)
            .collect();
        let ready = self
            .status
            .conditions
            .iter()
            .any(|condition| condition.kind == "Ready" && condition.status == "True");
        Ok(Object::Pod(Pod {
            resource_version: common.version_text()?,
            created: common.created(),
            uid: common.uid.into(),
            namespace: common.namespace.into(),
            name: common.name.into(),
            labels: labels.sorted(),
            annotations: annotations.sorted(),
            deleting: common.deletion_timestamp.is_some(),
            finished: matches!(&*self.status.phase, "Failed" | "Succeeded"),
            ready,
            host_network: self.spec.host_network,
            node: self.spec.node_name.into(),
            ips: addresses(&self.status.pod_ips, &self.status.pod_ip),
            host_ips: addresses(&self.status.host_ips, &self.status.host_ip),
            ports,
        }))
    }
}

/// `None` for a port that no API server accepts; one of them must not cost the pod its others.
fn container_port(wire: &WirePort<'_>) -> Option<ContainerPort> {
    let protocol = if wire.protocol.is_empty() {
        Protocol::default()
    } else {
        Protocol::parse(&wire.protocol)?
    };
    Some(ContainerPort {
        name: (*wire.name).into(),
        port: u16::try_from(wire.container_port)
            .ok()
            .filter(|port| *port > 0)?,
        host_port: u16::try_from(wire.host_port).unwrap_or_default(),
        protocol,
    })
}

/// Those that are addresses; older API servers send the single field only.
fn addresses(list: &[WireIp<'_>], single: &str) -> Vec<IpAddr> {
    if list.is_empty() {
        single.parse().into_iter().collect()
    } else {
        list.iter()
            .filter_map(|wire| wire.ip.parse().ok())
            .collect()
    }
}

#[derive(Deserialize)]
struct WireNode<'a> {
    #[serde(borrow, default)]
    metadata: WirePodMetadata<'a>,
}

impl<'a> Wire<'a> for WireNode<'a> {
    fn metadata(&self) -> &WireMetadata<'a> {
        &self.metadata.common
    }

    fn object(self) -> Result<Object, String> {
        let common = self.metadata.common;
        if common.name.is_empty() {
            return Err("metadata lacks a name".to_owned());
        }
        let zone = self
            .metadata
            .labels
            .0
            .into_iter()
            .find(|(key, _)| &**key == ZONE_LABEL)
            .map(|(_, zone)| zone)
            .unwrap_or_default();
        Ok(Object::Node(Node {
            resource_version: common.version_text()?,
            name: common.name.into(),
            zone,
        }))
    }
}

#[derive(Deserialize)]
struct WireRegistration<'a> {
    #[serde(borrow, default)]
    metadata: WireMetadata<'a>,
    #[serde(borrow)]
    spec: Option<&'a RawValue>,
    #[serde(borrow)]
    status: Option<&'a RawValue>,
}

impl<'a> Wire<'a> for WireRegistration<'a> {
    fn metadata(&self) -> &WireMetadata<'a> {
        &self.metadata
    }

    fn object(self) -> Result<Object, String> {
        let common = self.metadata;
        if common.uid.is_empty() || common.name.is_empty() || common.namespace.is_empty() {
            return Err("metadata lacks a uid, name or namespace".to_owned());
        }
        Ok(Object::Registration(Box::new(Registration {
            resource_version: common.version_text()?,
            created: common.created(),
            generation: common.generation,
            deleting: common.deletion_timestamp.is_some(),
            namespace: common.namespace.into_owned(),
            name: common.name.into_owned(),
            uid: common.uid.into_owned(),
            spec: part(self.spec, "spec"),
            status: self.status.and_then(|raw| part(Some(raw), "status").ok()),
        })))
    }
}

fn part<T: DeserializeOwned>(raw: Option<&RawValue>, field: &str) -> Result<T, String> {
    let raw = raw.ok_or_else(|| format!("{field} is missing"))?;
    serde_json::from_str(raw.get())
        .map_err(|error| format!("{field}: {}", shortened(&error.to_string(), MAX_WHY)))
}

// === maps ===

/// The labels of an object; Kubernetes bounds each key and value itself.
#[derive(Default)]
struct Labels(Vec<(Box<str>, Box<str>)>);

/// The annotations that are short enough to be of use; see [`MAX_ANNOTATION_BYTES`].
#[derive(Default)]
struct Annotations(Vec<(Box<str>, Box<str>)>);

impl Labels {
    fn sorted(mut self) -> Vec<(Box<str>, Box<str>)> {
        self.0.sort_unstable();
        self.0.shrink_to_fit();
        self.0
    }
}

impl Annotations {
    /// Whether one of this name is of use, and there is room for it.
    fn takes(&self, key: &str) -> bool {
        !key.starts_with(KUBECTL_ANNOTATIONS) && self.0.len() < MAX_ANNOTATIONS
    }

    fn add<T: Into<Box<str>> + AsRef<str>>(&mut self, key: T, value: T) {
        if value.as_ref().len() <= MAX_ANNOTATION_BYTES {
            self.0.push((key.into(), value.into()));
        }
    }

    fn sorted(self) -> Vec<(Box<str>, Box<str>)> {
        Labels(self.0).sorted()
    }
}

/// A string that is borrowed from the input where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Labels;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Labels, A::Error> {
                let mut entries = Vec::new();
                while let Some((Text(key), Text(value))) = map.next_entry()? {
                    entries.push((key.into(), value.into()));
                }
                Ok(Labels(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl<'de> Deserialize<'de> for Annotations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Annotations;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Annotations, A::Error> {
                let mut entries = Annotations::default();
                while let Some(Text(key)) = map.next_key()? {
                    if entries.takes(&key) {
                        let Text(value) = map.next_value()?;
                        entries.add(key, value);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for WirePodMetadata<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        enum Field {
            Namespace,
            Name,
            Uid,
            ResourceVersion,
            CreationTimestamp,
            DeletionTimestamp,
            Labels,
            Annotations,
            #[serde(other)]
            Other,
        }

        struct Fields<'a>(PhantomData<&'a ()>);
        impl<'de: 'a, 'a> Visitor<'de> for Fields<'a> {
            type Value = WirePodMetadata<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the metadata of an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut read = WirePodMetadata::default();
                while let Some(field) = map.next_key()? {
                    match field {
                        Field::Namespace => read.common.namespace = map.next_value::<Text<'a>>()?.0,
                        Field::Name => read.common.name = map.next_value::<Text<'a>>()?.0,
                        Field::Uid => read.common.uid = map.next_value::<Text<'a>>()?.0,
                        Field::ResourceVersion => {
                            read.common.resource_version = map.next_value::<Text<'a>>()?.0;
                        }
                        Field::CreationTimestamp => {
                            read.common.creation_timestamp = map.next_value()?;
                        }
                        Field::DeletionTimestamp => {
                            read.common.deletion_timestamp = map.next_value()?;
                        }
                        Field::Labels => {
                            read.labels = map.next_value::<Option<_>>()?.unwrap_or_default();
                        }
                        Field::Annotations => {
                            read.annotations = map.next_value::<Option<_>>()?.unwrap_or_default();
                        }
                        Field::Other => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(read)
            }
        }
        deserializer.deserialize_map(Fields(PhantomData))
    }
}

/// Go writes an empty list or map as null where the field is not omitted.
fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    pub(super) fn full_pod() -> serde_json::Value {
        json!({
            "kind": "Pod", "apiVersion": "v1",
            "metadata": {
                "name": "web-0", "generateName": "web-", "namespace": "shop", "uid": "u-1",
                "resourceVersion": "42", "generation": 1,
                "creationTimestamp": "2023-11-14T22:13:20Z",
                "deletionTimestamp": null,
                "labels": {"version": "v\"1", "app": "web"},
                "annotations": {
                    "note": "short", "long": "x".repeat(257), "full": "y".repeat(256),
                    "kubectl.kubernetes.io/restartedAt": "now",
                },
                "ownerReferences": [{"uid": "o", "name": "web"}],
                "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {"f:podIP": {}}}}],
            },
            "spec": {
                "nodeName": "n1", "hostNetwork": true,
                "initContainers": [
                    {"name": "once", "ports": [{"containerPort": 1}]},
                    {"name": "side", "restartPolicy": "Always",
                     "ports": [{"name": "mesh", "containerPort": 15001, "protocol": "TCP"}]},
                ],
                "containers": [
                    {"name": "a", "ports": [
                        {"name": "http", "containerPort": 8080, "hostPort": 80, "protocol": "TCP"},
                        {"containerPort": 53, "protocol": "UDP"},
                        {"containerPort": 70000, "protocol": "TCP"},
                        {"containerPort": 9, "protocol": "QUIC"}]},
                    {"name": "b", "ports": null},
                ],
            },
            "status": {
                "phase": "Running",
                "conditions": [
                    {"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}],
                "hostIP": "10.0.0.1", "hostIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
                "podIP": "10.1.2.3", "podIPs": [{"ip": "10.1.2.3"}, {"ip": "nonsense"}, {"ip": "fd00::2"}],
            },
        })
    }

    pub(super) fn line(kind: &str, object: &serde_json::Value) -> Vec<u8> {
        let mut line = json!({"type": kind, "object": object})
            .to_string()
            .into_bytes();
        line.push(b'\n');
        line
    }

    fn pair(key: &str, value: &str) -> (Box<str>, Box<str>) {
        (key.into(), value.into())
    }

    #[test]
    fn a_pod_is_read_as_far_as_it_is_of_use() {
        let Line::Applied(Item::Read(Object::Pod(pod)), 42) = read_line(
            Resource::Pods,
            Encoding::Json,
            &line("MODIFIED", &full_pod()),
        )
        .unwrap() else {
            panic!("no pod");
        };
        let port = |name: &str, port, host_port, protocol| ContainerPort {
            name: name.into(),
            port,
            host_port,
            protocol,
        };
        assert_eq!(
            pod,
            Pod {
                uid: "u-1".into(),
                namespace: "shop".into(),
                name: "web-0".into(),
                resource_version: 42,
                created: 1_700_000_000,
                labels: vec![pair("app", "web"), pair("version", "v\"1")],
                annotations: vec![pair("full", &"y".repeat(256)), pair("note", "short")],
                deleting: false,
                finished: false,
                ready: true,
                host_network: true,
                node: "n1".into(),
                ips: vec!["10.1.2.3".parse().unwrap(), "fd00::2".parse().unwrap()],
                host_ips: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
                ports: vec![
                    port("http", 8080, 80, Protocol::Tcp),
                    port("", 53, 0, Protocol::Udp),
                    port("mesh", 15001, 0, Protocol::Tcp),
                ],
            }
        );
    }

    #[test]
    fn the_annotations_of_a_pod_are_bounded() {
        let mut object = full_pod();
        object["metadata"]["annotations"] = (0..500)
            .map(|i| (format!("a{i}"), json!("v".repeat(250 + i % 12))))
            .collect::<serde_json::Map<_, _>>()
            .into();
        let Line::Applied(Item::Read(Object::Pod(pod)), _) =
            read_line(Resource::Pods, Encoding::Json, &line("ADDED", &object)).unwrap()
        else {
            panic!("no pod");
        };
        assert_eq!(pod.annotations.len(), MAX_ANNOTATIONS);
        assert!(
            pod.annotations
                .iter()
                .all(|(_, value)| value.len() <= MAX_ANNOTATION_BYTES)
        );
    }

    #[test]
    fn an_old_status_with_single_addresses_is_read() {
        let mut object = full_pod();
        object["status"] = json!({"phase": "Failed", "podIP": "10.9.9.9", "hostIP": "10.0.0.9"});
        object["metadata"]["deletionTimestamp"] = json!("2023-11-14T22:13:21Z");
        let Line::Deleted(Item::Read(Object::Pod(pod)), _) =
            read_line(Resource::Pods, Encoding::Json, &line("DELETED", &object)).unwrap()
        else {
            panic!("no pod");
        };
        assert_eq!(pod.ips, ["10.9.9.9".parse::<IpAddr>().unwrap()]);
        assert_eq!(pod.host_ips, ["10.0.0.9".parse::<IpAddr>().unwrap()]);
        assert!(pod.finished && pod.deleting && !pod.ready);
    }

    #[test]
    fn a_node_keeps_its_zone_alone() {
        let object = json!({"metadata": {"name": "n1", "resourceVersion": "7", "uid": "x",
            "labels": {"topology.kubernetes.io/zone": "eu-a", "a": "b"}}, "status": {"images": []}});
        assert_eq!(
            read_line(Resource::Nodes, Encoding::Json, &line("ADDED", &object)).unwrap(),
            Line::Applied(
                Item::Read(Object::Node(Node {
                    name: "n1".into(),
                    resource_version: 7,
                    zone: "eu-a".into(),
                })),
                7
            )
        );
    }

    #[test]
    fn a_registration_with_an_unreadable_spec_is_still_a_registration() {
        let mut object = json!({"metadata": {"name": "web", "namespace": "shop", "uid": "r",
            "resourceVersion": "9", "generation": 3, "creationTimestamp": "2023-11-14T22:13:20Z",
            "deletionTimestamp": "2023-11-14T22:13:20Z"}, "spec": 5, "status": 6});
        for wrong in [json!(5), json!(null)] {
            object["spec"] = wrong;
            let Line::Applied(Item::Read(Object::Registration(read)), 9) = read_line(
                Resource::Registrations,
                Encoding::Json,
                &line("ADDED", &object),
            )
            .unwrap() else {
                panic!("no registration");
            };
            assert!(read.spec.as_ref().unwrap_err().contains("spec"), "{read:?}");
            assert_eq!((read.generation, read.deleting), (3, true));
            assert_eq!(read.status, None);
        }
    }

    #[test]
    fn an_object_that_is_not_understood_costs_no_other_its_place() {
        let mut odd = full_pod();
        odd["spec"]["containers"] = json!("none");
        odd["metadata"]["name"] = json!("odd");
        let Line::Applied(Item::NotUnderstood(why), 42) =
            read_line(Resource::Pods, Encoding::Json, &line("ADDED", &odd)).unwrap()
        else {
            panic!("understood");
        };
        assert!(why.starts_with("shop/odd: "), "{why}");
        let list = json!({"kind": "PodList", "items": [full_pod(), odd, full_pod()],
            "metadata": {"resourceVersion": "50", "continue": "next"}});
        let page = read_page(Resource::Pods, Encoding::Json, list.to_string().as_bytes()).unwrap();
        let understood: Vec<bool> = page
            .items
            .iter()
            .map(|item| matches!(item, Item::Read(_)))
            .collect();
        assert_eq!(understood, [true, false, true]);
        assert_eq!(
            (page.resource_version, page.next.as_deref()),
            (50, Some("next"))
        );
    }

    #[test]
    fn bookmarks_and_errors_are_told_apart() {
        let bookmark = |annotations: serde_json::Value| {
            json!({"kind": "Pod", "metadata": {"resourceVersion": "77",
                "creationTimestamp": null, "annotations": annotations},
                "spec": {"containers": null}, "status": {}})
        };
        for (annotations, list_end) in [
            (json!({"k8s.io/initial-events-end": "true"}), true),
            (json!({"k8s.io/initial-events-end": "false"}), false),
            (json!(null), false),
        ] {
            for resource in [Resource::Pods, Resource::Nodes, Resource::Registrations] {
                assert_eq!(
                    read_line(
                        resource,
                        Encoding::Json,
                        &line("BOOKMARK", &bookmark(annotations.clone()))
                    )
                    .unwrap(),
                    Line::Bookmark {
                        resource_version: 77,
                        list_end
                    }
                );
            }
        }
        let status = json!({"kind": "Status", "status": "Failure", "reason": "Expired",
            "message": "too old resource version", "code": 410, "metadata": {}});
        assert_eq!(
            read_line(Resource::Pods, Encoding::Json, &line("ERROR", &status)).unwrap(),
            Line::Error(Refusal {
                code: 410,
                message: "too old resource version".to_owned()
            })
        );
    }

    #[test]
    fn the_header_says_how_an_answer_is_written() {
        for (header, encoding) in [
            (
                "application/vnd.kubernetes.protobuf;stream=watch",
                Encoding::Protobuf,
            ),
            ("application/vnd.kubernetes.protobuf", Encoding::Protobuf),
            ("application/json", Encoding::Json),
            ("", Encoding::Json),
        ] {
            assert_eq!(Encoding::of(header), encoding, "{header}");
        }
        assert!(Encoding::accepted(Resource::Pods).starts_with(PROTOBUF));
    }

    #[test]
    fn a_refusal_keeps_the_words_of_whoever_refused() {
        let said = |encoding, body: &str| read_refusal(403, encoding, body.as_bytes()).message;
        let status = json!({"kind": "Status", "message": "no", "code": 403}).to_string();
        assert_eq!(said(Encoding::Json, &status), "no");
        assert_eq!(
            said(Encoding::Json, "<html>proxy</html>\n"),
            "<html>proxy</html>"
        );
        assert_eq!(said(Encoding::Protobuf, "<html>"), "<html>");
        assert_eq!(said(Encoding::Json, &"x".repeat(5000)).len(), MAX_WHY);
    }

    #[test]
    fn what_is_no_answer_of_kubernetes_is_an_error() {
        for text in [
            "",
            "<html>",
            "{}",
            "{\"type\":\"ADDED\"",
            "{\"type\":\"NEW\",\"object\":{}}",
        ] {
            assert!(
                read_line(Resource::Pods, Encoding::Json, text.as_bytes()).is_err(),
                "{text}"
            );
        }
        let mut object = full_pod();
        for version in ["", "0", "abc", "-1"] {
            object["metadata"]["resourceVersion"] = json!(version);
            let read = read_line(Resource::Pods, Encoding::Json, &line("ADDED", &object));
            assert!(matches!(read, Err(WireError::NoVersion(_))), "{read:?}");
        }
        assert!(read_page(Resource::Pods, Encoding::Json, b"{\"items\": []}").is_err());
        assert_eq!(
            read_list_version(
                Encoding::Json,
                b"{\"metadata\":{\"resourceVersion\":\"5\"}}"
            )
            .unwrap(),
            5
        );
        assert_eq!(read_uid(b"{\"metadata\":{\"uid\":\"u\"}}").unwrap(), "u");
    }
}
