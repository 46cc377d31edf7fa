//! The protobuf of the API server --> the same objects as from its JSON, in a fraction of the time.
//!
//! Takes one message of a watch or one page of a list. Only what is read has a field here; prost passes over everything
//! else, whole subtrees at a time. The numbers are those of `generated.proto` in k8s.io/api and k8s.io/apimachinery,
//! which never change. Pure, as the JSON is.

use k8s_openapi::jiff::Timestamp;
use prost::Message;
use serde::de::IgnoredAny;

use super::{
    Annotations, INITIAL_EVENTS_END, Item, Labels, Line, Page, Refusal, Wire, WireCondition,
    WireContainer, WireError, WireIp, WireMetadata, WireNode, WirePod, WirePodMetadata,
    WirePodSpec, WirePodStatus, WirePort, item, next_page, not_understood, version,
};

/// What every object begins with; a `runtime.Unknown` follows.
const MAGIC: &[u8] = b"k8s\0";
/// `raw` of a `runtime.Unknown`: the object.
const UNKNOWN_RAW: usize = 2;
/// `type` and `object` of a `WatchEvent`, and `raw` of the `RawExtension` that this is.
const EVENT_TYPE: usize = 1;
const EVENT_OBJECT: usize = 2;
const EXTENSION_RAW: usize = 1;
/// `metadata` of every object and list.
const METADATA: usize = 1;
/// `items` of every list.
const ITEMS: usize = 2;

/// A message that becomes an [`Item`].
pub(super) trait Read: Message + Default {
    /// The same as read from JSON.
    type Wire: Wire<'static> + From<Self>;
}

impl Read for Pod {
    type Wire = WirePod<'static>;
}

impl Read for Node {
    type Wire = WireNode<'static>;
}

/// Reads one message of a watch.
pub(super) fn event<T: Read>(message: &[u8]) -> Result<Line, WireError> {
    let kind = field(message, EVENT_TYPE)?;
    let body = body(field(field(message, EVENT_OBJECT)?, EXTENSION_RAW)?)?;
    match kind {
        b"ADDED" | b"MODIFIED" => object::<T>(body).map(|(i, v)| Line::Applied(i, v)),
        b"DELETED" => object::<T>(body).map(|(i, v)| Line::Deleted(i, v)),
        b"BOOKMARK" => {
            let metadata = Metadata::decode(field(body, METADATA)?)?;
            let ends = |e: &Entry| e.key == INITIAL_EVENTS_END && e.value == "true";
            Ok(Line::Bookmark {
                resource_version: version(&metadata.resource_version)?,
                list_end: metadata.annotations.iter().any(ends),
            })
        }
        b"ERROR" => status(body).map(Line::Error),
        other => Err(WireError::NoProtobuf(format!(
            "an event of the type {:?}",
            String::from_utf8_lossy(other)
        ))),
    }
}

/// Reads one page of a list.
pub(super) fn page<T: Read>(answer: &[u8]) -> Result<Page, WireError> {
    let list = body(answer)?;
    let metadata = ListMetadata::decode(field(list, METADATA)?)?;
    let mut items = Vec::new();
    let mut rest = list;
    while let Some((number, part)) = next_field(&mut rest)? {
        if number == ITEMS {
            // One that is odd costs no other its place.
            items.push(listed::<T>(part));
        }
    }
    Ok(Page {
        resource_version: version(&metadata.resource_version)?,
        next: next_page(metadata.next.into()),
        items,
    })
}

/// Reads the resource version of a list, and nothing else of it.
pub(super) fn list_version(answer: &[u8]) -> Result<u64, WireError> {
    let metadata = ListMetadata::decode(field(body(answer)?, METADATA)?)?;
    version(&metadata.resource_version)
}

/// Reads an answer that is no success.
pub(super) fn refusal(answer: &[u8]) -> Result<Refusal, WireError> {
    status(body(answer)?)
}

fn status(body: &[u8]) -> Result<Refusal, WireError> {
    let status = Status::decode(body)?;
    Ok(Refusal {
        code: u16::try_from(status.code).unwrap_or_default(),
        message: status.message,
    })
}

fn object<T: Read>(body: &[u8]) -> Result<(Item, u64), WireError> {
    match T::decode(body) {
        Ok(read) => {
            let wire = T::Wire::from(read);
            let version = wire.metadata().version()?;
            Ok((item(wire), version))
        }
        Err(why) => {
            let metadata = WirePodMetadata::from(Metadata::decode(field(body, METADATA)?)?);
            let version = metadata.common.version()?;
            Ok((not_understood(&metadata.common, &why.to_string()), version))
        }
    }
}

fn listed<T: Read>(body: &[u8]) -> Item {
    T::decode(body).map_or_else(
        |why| {
            let metadata = field(body, METADATA).ok().map(Metadata::decode);
            let metadata = metadata.and_then(Result::ok).unwrap_or_default();
            not_understood(&WirePodMetadata::from(metadata).common, &why.to_string())
        },
        |read| item(T::Wire::from(read)),
    )
}

// === the frame around an object ===

/// The object in an answer or event.
fn body(answer: &[u8]) -> Result<&[u8], WireError> {
    let unknown = answer
        .strip_prefix(MAGIC)
        .ok_or_else(|| WireError::NoProtobuf("it does not begin as an object does".to_owned()))?;
    field(unknown, UNKNOWN_RAW)
}

/// The first part of a message that has this number; empty where there is none, as protobuf has it.
fn field(mut message: &[u8], wanted: usize) -> Result<&[u8], WireError> {
    while let Some((number, part)) = next_field(&mut message)? {
        if number == wanted {
            return Ok(part);
        }
    }
    Ok(&[])
}

/// The number and the bytes of the next part of a message; of numbers no bytes are given.
fn next_field<'a>(message: &mut &'a [u8]) -> Result<Option<(usize, &'a [u8])>, WireError> {
    if message.is_empty() {
        return Ok(None);
    }
    // A key, a length and a number are written alike.
    let key = prost::decode_length_delimiter(&mut *message)?;
    let (length, is_text) = match key & 7 {
        0 => (
            0,
            prost::decode_length_delimiter(&mut *message).map(|_| false)?,
        ),
        1 => (8, false),
        2 => (prost::decode_length_delimiter(&mut *message)?, true),
        5 => (4, false),
        other => {
            let why = format!("a part of the wire type {other}");
            return Err(WireError::NoProtobuf(why));
        }
    };
    let (part, rest) = message
        .split_at_checked(length)
        .ok_or_else(|| WireError::NoProtobuf("a part is cut short".to_owned()))?;
    *message = rest;
    Ok(Some((key >> 3, if is_text { part } else { &[] })))
}

// === messages: only what is read ===

/// An entry of a map.
#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, PartialEq, Message)]
struct Time {
    #[prost(int64, tag = "1")]
    seconds: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(string, tag = "5")]
    uid: String,
    #[prost(string, tag = "6")]
    resource_version: String,
    #[prost(message, optional, tag = "8")]
    creation_timestamp: Option<Time>,
    #[prost(message, optional, tag = "9")]
    deletion_timestamp: Option<Time>,
    #[prost(message, repeated, tag = "11")]
    labels: Vec<Entry>,
    #[prost(message, repeated, tag = "12")]
    annotations: Vec<Entry>,
}

#[derive(Clone, PartialEq, Message)]
struct ListMetadata {
    #[prost(string, tag = "2")]
    resource_version: String,
    #[prost(string, tag = "3")]
    next: String,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(string, tag = "3")]
    message: String,
    #[prost(int32, tag = "6")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Node {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Pod {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
    #[prost(message, optional, tag = "2")]
    spec: Option<PodSpec>,
    #[prost(message, optional, tag = "3")]
    status: Option<PodStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSpec {
    #[prost(message, repeated, tag = "2")]
    containers: Vec<Container>,
    #[prost(string, tag = "10")]
    node_name: String,
    #[prost(bool, tag = "11")]
    host_network: bool,
    #[prost(message, repeated, tag = "20")]
    init_containers: Vec<Container>,
}

#[derive(Clone, PartialEq, Message)]
struct Container {
    #[prost(message, repeated, tag = "6")]
    ports: Vec<Port>,
    #[prost(string, tag = "24")]
    restart_policy: String,
}

#[derive(Clone, PartialEq, Message)]
struct Port {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int32, tag = "2")]
    host_port: i32,
    #[prost(int32, tag = "3")]
    container_port: i32,
    #[prost(string, tag = "4")]
    protocol: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodStatus {
    #[prost(string, tag = "1")]
    phase: String,
    #[prost(message, repeated, tag = "2")]
    conditions: Vec<Condition>,
    #[prost(string, tag = "5")]
    host_ip: String,
    #[prost(string, tag = "6")]
    pod_ip: String,
    #[prost(message, repeated, tag = "12")]
    pod_ips: Vec<Ip>,
    #[prost(message, repeated, tag = "16")]
    host_ips: Vec<Ip>,
}

#[derive(Clone, PartialEq, Message)]
struct Condition {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(string, tag = "2")]
    status: String,
}

#[derive(Clone, PartialEq, Message)]
struct Ip {
    #[prost(string, tag = "1")]
    ip: String,
}

// === the same as the JSON would have become ===

impl From<Metadata> for WirePodMetadata<'_> {
    fn from(read: Metadata) -> Self {
        let mut annotations = Annotations::default();
        for Entry { key, value } in read.annotations {
            if annotations.takes(&key) {
                annotations.add(key, value);
            }
        }
        let label = |entry: Entry| (entry.key.into(), entry.value.into());
        Self {
            common: WireMetadata {
                namespace: read.namespace.into(),
                name: read.name.into(),
                uid: read.uid.into(),
                resource_version: read.resource_version.into(),
                // Of custom resources alone.
                generation: 0,
                creation_timestamp: read
                    .creation_timestamp
                    .and_then(|time| Timestamp::from_second(time.seconds).ok()),
                deletion_timestamp: read.deletion_timestamp.map(|_| IgnoredAny),
            },
            labels: Labels(read.labels.into_iter().map(label).collect()),
            annotations,
        }
    }
}

impl From<Pod> for WirePod<'_> {
    fn from(read: Pod) -> Self {
        Self {
            metadata: read.metadata.unwrap_or_default().into(),
            spec: read.spec.unwrap_or_default().into(),
            status: read.status.unwrap_or_default().into(),
        }
    }
}

impl From<Node> for WireNode<'_> {
    fn from(read: Node) -> Self {
        Self {
            metadata: read.metadata.unwrap_or_default().into(),
        }
    }
}

impl From<PodSpec> for WirePodSpec<'_> {
    fn from(read: PodSpec) -> Self {
        Self {
            node_name: read.node_name.into(),
            host_network: read.host_network,
            containers: each(read.containers),
            init_containers: each(read.init_containers),
        }
    }
}

impl From<Container> for WireContainer<'_> {
    fn from(read: Container) -> Self {
        Self {
            restart_policy: read.restart_policy.into(),
            ports: each(read.ports),
        }
    }
}

impl From<Port> for WirePort<'_> {
    fn from(read: Port) -> Self {
        Self {
            name: read.name.into(),
            container_port: read.container_port.into(),
            host_port: read.host_port.into(),
            protocol: read.protocol.into(),
        }
    }
}

impl From<PodStatus> for WirePodStatus<'_> {
    fn from(read: PodStatus) -> Self {
        Self {
            phase: read.phase.into(),
            conditions: each(read.conditions),
            pod_ip: read.pod_ip.into(),
            pod_ips: each(read.pod_ips),
            host_ip: read.host_ip.into(),
            host_ips: each(read.host_ips),
        }
    }
}

impl From<Condition> for WireCondition<'_> {
    fn from(read: Condition) -> Self {
        Self {
            kind: read.kind.into(),
            status: read.status.into(),
        }
    }
}

impl From<Ip> for WireIp<'_> {
    fn from(read: Ip) -> Self {
        Self { ip: read.ip.into() }
    }
}

fn each<T: Into<U>, U>(read: Vec<T>) -> Vec<U> {
    read.into_iter().map(Into::into).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::tests::{full_pod, line};
    use super::super::{Encoding, read_line};
    use super::*;
    use crate::engine::io::Resource;

    fn text(value: &Value) -> String {
        value.as_str().unwrap_or_default().to_owned()
    }

    fn list<T>(value: &Value, one: impl Fn(&Value) -> T) -> Vec<T> {
        value.as_array().into_iter().flatten().map(one).collect()
    }

    fn map(value: &Value) -> Vec<Entry> {
        let entries = value.as_object().into_iter().flatten();
        let entry = |(key, value): (&String, &Value)| Entry {
            key: key.clone(),
            value: text(value),
        };
        entries.map(entry).collect()
    }

    fn metadata(object: &Value) -> Metadata {
        let object = &object["metadata"];
        let time = |field: &str| {
            let time = object[field].as_str()?.parse::<Timestamp>().ok()?;
            Some(Time {
                seconds: time.as_second(),
            })
        };
        Metadata {
            name: text(&object["name"]),
            namespace: text(&object["namespace"]),
            uid: text(&object["uid"]),
            resource_version: text(&object["resourceVersion"]),
            creation_timestamp: time("creationTimestamp"),
            deletion_timestamp: time("deletionTimestamp"),
            labels: map(&object["labels"]),
            annotations: map(&object["annotations"]),
        }
    }

    fn pod(object: &Value) -> Pod {
        let number = |value: &Value| i32::try_from(value.as_i64().unwrap_or_default()).unwrap();
        let container = |container: &Value| Container {
            restart_policy: text(&container["restartPolicy"]),
            ports: list(&container["ports"], |port| Port {
                name: text(&port["name"]),
                host_port: number(&port["hostPort"]),
                container_port: number(&port["containerPort"]),
                protocol: text(&port["protocol"]),
            }),
        };
        let ip = |ip: &Value| Ip {
            ip: text(&ip["ip"]),
        };
        let (spec, status) = (&object["spec"], &object["status"]);
        Pod {
            metadata: Some(metadata(object)),
            spec: Some(PodSpec {
                containers: list(&spec["containers"], container),
                node_name: text(&spec["nodeName"]),
                host_network: spec["hostNetwork"] == true,
                init_containers: list(&spec["initContainers"], container),
            }),
            status: Some(PodStatus {
                phase: text(&status["phase"]),
                conditions: list(&status["conditions"], |condition| Condition {
                    kind: text(&condition["type"]),
                    status: text(&condition["status"]),
                }),
                host_ip: text(&status["hostIP"]),
                pod_ip: text(&status["podIP"]),
                pod_ips: list(&status["podIPs"], ip),
                host_ips: list(&status["hostIPs"], ip),
            }),
        }
    }

    /// A part of a message, of the wire type for bytes.
    fn part(number: usize, bytes: &[u8]) -> Vec<u8> {
        let mut part = Vec::new();
        for varint in [number << 3 | 2, bytes.len()] {
            prost::encode_length_delimiter(varint, &mut part).unwrap();
        }
        [part.as_slice(), bytes].concat()
    }

    fn answer(object: &[u8]) -> Vec<u8> {
        let kind = part(1, &part(2, b"Pod"));
        [MAGIC, &kind, &part(UNKNOWN_RAW, object), &part(4, b"")].concat()
    }

    fn message(kind: &str, object: &[u8]) -> Vec<u8> {
        let object = part(EXTENSION_RAW, &answer(object));
        [
            part(EVENT_TYPE, kind.as_bytes()),
            part(EVENT_OBJECT, &object),
        ]
        .concat()
    }

    /// What the API server sends beside what is read: `managedFields`, and numbers of both sizes.
    fn with_more(mut object: Vec<u8>) -> Vec<u8> {
        let managed_fields = part(METADATA, &part(17, &[b'x'; 300]));
        let status = part(
            3,
            &[
                &[8 << 3, 200, 1, 14 << 3 | 1],
                &[1; 8][..],
                &[15 << 3 | 5],
                &[2; 4],
            ]
            .concat(),
        );
        // Parts of one number are one message.
        object.extend([managed_fields, status].concat());
        object
    }

    #[test]
    fn a_pod_is_what_its_json_says() {
        let mut old = full_pod();
        old["status"] =
            serde_json::json!({"phase": "Failed", "podIP": "10.9.9.9", "hostIP": "10.0.0.9"});
        old["metadata"]["deletionTimestamp"] = "2023-11-14T22:13:21Z".into();
        let mut nameless = full_pod();
        nameless["metadata"]["uid"] = "".into();
        for object in [full_pod(), old, nameless] {
            for kind in ["ADDED", "MODIFIED", "DELETED"] {
                let json = read_line(Resource::Pods, Encoding::Json, &line(kind, &object)).unwrap();
                let bytes = message(kind, &with_more(pod(&object).encode_to_vec()));
                let read = read_line(Resource::Pods, Encoding::Protobuf, &bytes).unwrap();
                assert_eq!(read, json);
            }
        }
    }

    #[test]
    fn a_list_bookmarks_and_refusals() {
        let bytes = pod(&full_pod()).encode_to_vec();
        // A pod whose status is no message.
        let odd = [part(METADATA, &part(1, b"odd")), part(3, &[0xff])].concat();
        let list = [
            part(METADATA, &[part(2, b"50"), part(3, b"next")].concat()),
            part(ITEMS, &bytes),
            part(ITEMS, &odd),
            part(ITEMS, &bytes),
        ];
        let list = answer(&list.concat());
        let read = page::<Pod>(&list).unwrap();
        assert_eq!(
            (read.resource_version, read.next.as_deref()),
            (50, Some("next"))
        );
        assert!(matches!(
            read.items.as_slice(),
            [Item::Read(_), Item::NotUnderstood(why), Item::Read(_)] if why.starts_with("/odd: ")
        ));
        assert_eq!(list_version(&list).unwrap(), 50);

        let ends = [part(1, INITIAL_EVENTS_END.as_bytes()), part(2, b"true")].concat();
        for (annotation, list_end) in [(ends, true), (part(1, b"a"), false)] {
            let metadata = [part(6, b"77"), part(12, &annotation), part(8, b"")].concat();
            assert_eq!(
                event::<Node>(&message("BOOKMARK", &part(METADATA, &metadata))).unwrap(),
                Line::Bookmark {
                    resource_version: 77,
                    list_end
                }
            );
        }
        let status = Status {
            message: "too old resource version".to_owned(),
            code: 410,
        };
        let refused = Refusal {
            code: status.code as u16,
            message: status.message.clone(),
        };
        let status = status.encode_to_vec();
        assert_eq!(refusal(&answer(&status)).unwrap(), refused);
        let read = event::<Pod>(&message("ERROR", &status)).unwrap();
        assert_eq!(read, Line::Error(refused));
    }

    #[test]
    fn what_is_odd_is_told() {
        let odd = [
            part(
                METADATA,
                &[part(1, b"odd"), part(3, b"shop"), part(6, b"42")].concat(),
            ),
            part(3, &[0xff]),
        ];
        let Line::Applied(Item::NotUnderstood(why), 42) =
            event::<Pod>(&message("ADDED", &odd.concat())).unwrap()
        else {
            panic!("understood");
        };
        assert!(why.starts_with("shop/odd: "), "{why}");
        let whole = message("ADDED", &pod(&full_pod()).encode_to_vec());
        assert!(read_line(Resource::Registrations, Encoding::Protobuf, &whole).is_err());
        for cut in 0..whole.len() {
            assert!(event::<Pod>(&whole[..cut]).is_err(), "{cut}");
        }
        for version in ["", "0", "abc"] {
            let mut object = full_pod();
            object["metadata"]["resourceVersion"] = version.into();
            let read = event::<Pod>(&message("ADDED", &pod(&object).encode_to_vec()));
            assert!(matches!(read, Err(WireError::NoVersion(_))), "{read:?}");
        }
        for kind in ["", "NEW"] {
            assert!(event::<Pod>(&message(kind, b"")).is_err());
        }
    }
}
