//! Whatever others write into Kubernetes, etcd or the policy file: no panic, no key outside of what is
//! granted, nothing of others touched, and what is written can be read back.
//!
//! Inputs are real ones with random changes, a second of each in `make test`. `make fuzz MINUTES=10` goes on
//! for so long; a failure is shrunk and printed as the input that shows it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_registrar::accept::policy::Policy;
use etcd_registrar::api::FormatType;
use etcd_registrar::engine::io::{Effect, Input, KubeInput, Now, Object, Resource};
use etcd_registrar::engine::{Engine, Settings};
use etcd_registrar::format::Format;
use etcd_registrar::kube::wire::{
    Encoding, Item, Line, read_line, read_list_version, read_page, read_refusal, read_uid,
};
use etcd_registrar::mirror::leases::SlotName;
use etcd_registrar::model::etcd::{
    Answer, Compare, Event, Key, KeyValue, News, Op, Range, Request, Txn,
};
use etcd_registrar::model::names;
use etcd_registrar::model::selector::Selector;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestCaseResult, TestRunner};
use serde_json::{Value, json};

/// How long each of the tests goes on, unless told otherwise.
const SHORT: Duration = Duration::from_secs(3);
/// Cases between two looks at the clock.
const CASES: u32 = 64;

/// Runs a property until the time is over.
fn fuzz<S: Strategy>(strategy: &S, property: impl Fn(S::Value) -> TestCaseResult)
where
    S::Value: Debug,
{
    let time = std::env::var("FUZZ_MINUTES").map_or(SHORT, |minutes| {
        let minutes: f64 = minutes.parse().expect("FUZZ_MINUTES is a number");
        Duration::from_secs_f64(minutes * 60.0)
    });
    let end = Instant::now() + time;
    let mut cases = 0u64;
    while Instant::now() < end {
        let config = Config {
            cases: CASES,
            failure_persistence: None,
            max_shrink_iters: 20_000,
            ..Config::default()
        };
        if let Err(error) = TestRunner::new(config).run(strategy, &property) {
            panic!("after {cases} cases: {error}");
        }
        cases += u64::from(CASES);
    }
    println!("{cases} cases");
}

// === inputs ===

/// What is put into inputs: what has a meaning to some part of the program, or had one elsewhere.
const PIECES: [&[u8]; 32] = [
    b"/",
    b"//",
    b"..",
    b"/../",
    b".",
    b"\0",
    b"\n",
    b"\\",
    b"\"",
    b"*",
    b"{namespace}",
    b"{",
    b"}",
    b"[",
    b"null",
    b"-1",
    b"0",
    b"18446744073709551616",
    b"1e999",
    b":",
    b"[::1]:80",
    b"10.0.0.1",
    b"\xff",
    b"\xc3",
    "\u{202e}".as_bytes(),
    "\u{feff}".as_bytes(),
    b" ",
    b"%2f",
    b",",
    b"true",
    b"registrar",
    b"\\u0000",
];

#[derive(Clone, Debug)]
enum Edit {
    Byte(Index, u8),
    Insert(Index, Index),
    Cut(Index, usize),
    Copy(Index, Index, usize),
    End(Index),
}

fn edits(most: usize) -> impl Strategy<Value = Vec<Edit>> {
    let edit = prop_oneof![
        3 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Edit::Byte(at, byte)),
        6 => (any::<Index>(), any::<Index>()).prop_map(|(at, piece)| Edit::Insert(at, piece)),
        2 => (any::<Index>(), 1usize..20).prop_map(|(at, length)| Edit::Cut(at, length)),
        2 => (any::<Index>(), any::<Index>(), 1usize..40).prop_map(|(a, b, l)| Edit::Copy(a, b, l)),
        1 => any::<Index>().prop_map(Edit::End),
    ];
    prop::collection::vec(edit, 0..=most)
}

fn edited(text: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut bytes = text.to_vec();
    for edit in edits {
        let length = bytes.len() + 1;
        match edit {
            Edit::Byte(at, byte) => {
                if let Some(found) = bytes.get_mut(at.index(length)) {
                    *found = *byte;
                }
            }
            Edit::Insert(at, piece) => {
                let at = at.index(length);
                bytes.splice(at..at, PIECES[piece.index(PIECES.len())].iter().copied());
            }
            Edit::Cut(at, count) => {
                let at = at.index(length);
                let end = (at + count).min(bytes.len());
                bytes.drain(at..end);
            }
            Edit::Copy(from, to, count) => {
                let from = from.index(length);
                let end = (from + count).min(bytes.len());
                let piece = bytes[from..end].to_vec();
                let to = to.index(length);
                bytes.splice(to..to, piece);
            }
            Edit::End(at) => bytes.truncate(at.index(length)),
        }
    }
    bytes
}

fn corpus(texts: Vec<Vec<u8>>, most: usize) -> impl Strategy<Value = Vec<u8>> {
    (prop::sample::select(texts), edits(most)).prop_map(|(text, edits)| edited(&text, &edits))
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        12 => prop::sample::select(vec!["web", "shop", "a-b", "http", "v1"]).prop_map(String::from),
        2 => corpus(vec![b"web".to_vec(), b"/services/".to_vec(), b"shop".to_vec()], 3)
            .prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        1 => "\\PC{0,6}",
        1 => (1usize..600).prop_map(|length| "a".repeat(length)),
    ]
}

/// A value of JSON that stands where another is expected.
fn odd_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        text().prop_map(Value::from),
        prop::collection::vec(text(), 0..3).prop_map(Value::from),
        text().prop_map(|name| json!({name: "x"})),
    ]
}

/// Replaces values deep inside.
fn change(value: &mut Value, mut at: usize, new: &Value) {
    // Which of the values, counted depth first.
    fn walk(value: &mut Value, at: &mut usize, new: &Value) -> bool {
        if *at == 0 {
            value.clone_from(new);
            return true;
        }
        *at -= 1;
        match value {
            Value::Array(items) => items.iter_mut().any(|item| walk(item, at, new)),
            Value::Object(members) => members.values_mut().any(|member| walk(member, at, new)),
            _ => false,
        }
    }
    walk(value, &mut at, new);
}

/// Mostly no changes: what is refused at once shows nothing of what follows.
fn few(new: impl Strategy<Value = Value>) -> impl Strategy<Value = Vec<(usize, Value)>> {
    prop::option::weighted(0.25, (0usize..40, new)).prop_map(|change| change.into_iter().collect())
}

/// All that can be read without settings.
const FORMATS: [&str; 11] = [
    "Json", "Plain", "Grpc", "Kitex", "Hertz", "Kratos", "SkyDns", "GoMicro", "Traefik", "Apisix",
    "Template",
];

const NAMESPACES: [&str; 2] = ["shop", "ops"];

/// A format and a prefix, mostly those that are granted.
fn place() -> impl Strategy<Value = (&'static str, Option<String>)> {
    let format = || prop::sample::select(vec!["Json", "Plain", "Grpc"]);
    let prefix = prop_oneof![
        Just("/services/".to_owned()),
        Just(String::new()),
        Just("/registrar/".to_owned()),
        text(),
    ];
    let plain = prop::sample::select(vec!["plain/shop/", "plain/ops/", "plain/shop/a/"]);
    prop_oneof![
        6 => Just(("Json", None)),
        4 => (format(), plain).prop_map(|(format, prefix)| (format, Some(prefix.to_owned()))),
        1 => (format(), prop::option::of(prefix)),
    ]
}

fn registration() -> impl Strategy<Value = Value> {
    let spec = (
        prop::option::weighted(0.5, text()),
        place(),
        prop::collection::vec((text(), prop::option::weighted(0.8, 1u16..100)), 1..3),
        prop::collection::btree_map(text(), text(), 0..2),
    );
    let changes = few(odd_value());
    let names = (prop::sample::select(NAMESPACES.to_vec()), 0u8..3, 1u8..5);
    (spec, changes, names).prop_map(|(spec, changes, (namespace, name, generation))| {
        let (service, (format, prefix), ports, statics) = spec;
        let ports: Vec<Value> = ports
            .into_iter()
            .map(|(name, number)| match number {
                Some(number) => json!({"name": name, "port": number}),
                None => json!({"name": name}),
            })
            .collect();
        let mut object = json!({
            "metadata": {
                "namespace": namespace, "name": format!("r{name}"), "uid": format!("uid-{namespace}-{name}"),
                "generation": generation, "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {
                "selector": {"matchLabels": {"app": "web"}}, "ports": ports, "format": {"type": format},
                "metadata": {"labels": ["app"], "annotations": ["note"], "static": statics},
            },
        });
        if let Some(service) = service {
            object["spec"]["service"] = service.into();
        }
        if let Some(prefix) = prefix {
            object["spec"]["prefix"] = prefix.into();
        }
        for (at, new) in &changes {
            change(&mut object["spec"], *at, new);
        }
        object
    })
}

fn pod() -> impl Strategy<Value = Value> {
    let names = (prop::sample::select(NAMESPACES.to_vec()), 0u8..5);
    let changes = few(odd_value());
    (names, text(), text(), prop::bool::weighted(0.8), changes).prop_map(
        |((namespace, number), port, note, ready, changes)| {
            let mut object = json!({
                "metadata": {
                    "namespace": namespace, "name": format!("p{number}"),
                    "uid": format!("0b9e4c3a-1111-4222-8333-0123456789a{number}"),
                    "labels": {"app": "web"}, "annotations": {"note": note},
                    "creationTimestamp": "2026-01-01T00:00:00Z",
                },
                "spec": {"nodeName": "n1", "containers": [{"ports": [{"name": port, "containerPort": 80}]}]},
                "status": {
                    "phase": "Running", "podIPs": [{"ip": format!("10.0.0.{number}")}], "hostIP": "192.168.0.1",
                    "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
                },
            });
            for (at, new) in &changes {
                change(&mut object, *at, new);
            }
            object
        },
    )
}

/// A line of a watch.
fn line(kind: &str, mut object: Value, version: u64) -> Vec<u8> {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert("resourceVersion".into(), version.to_string().into());
    }
    json!({"type": kind, "object": object})
        .to_string()
        .into_bytes()
}

// === parts ===

/// What stands below `prefix` is the segment `name` and no other, and nothing of it can be misread.
fn one_segment(prefix: &str, name: &str) -> TestCaseResult {
    let key = format!("{prefix}{name}/end");
    let path = key.strip_prefix('/').unwrap_or(&key);
    for segment in path.split('/') {
        prop_assert!(
            !segment.is_empty() && segment != "." && segment != "..",
            "{key:?}"
        );
    }
    prop_assert!(!key.chars().any(char::is_control), "{key:?}");
    prop_assert_eq!(key[prefix.len()..].split('/').count(), 2, "{:?}", key);
    Ok(())
}

#[test]
fn names() {
    fuzz(&(text(), text()), |(prefix, name)| {
        if names::prefix(&prefix).is_ok() && names::service(&name).is_ok() {
            one_segment(&prefix, &name)?;
        }
        for check in [names::cluster, names::namespace, names::port] {
            if check(&name).is_ok() {
                one_segment("/", &name)?;
                prop_assert!(name.len() <= 63);
            } else {
                let message = check(&name).unwrap_err().to_string();
                prop_assert!(message.chars().count() < 600 && !message.contains('\0'));
            }
        }
        let _ = (
            names::label_key(&name),
            names::label_value(&name),
            names::scheme(&name),
        );
        Ok(())
    });
}

#[test]
fn values_in_etcd() {
    let endpoint = r#"{"address":"10.1.2.3:8080","host":"10.1.2.3","port":8080,"portName":"http","protocol":"TCP","scheme":"http","family":"IPv4","cluster":"east","namespace":"shop","service":"web","pod":"web-0","uid":"0b9e","node":"n1","zone":"eu-a","weight":100,"metadata":{"version":"v1"}}"#;
    let keys = [
        "/services/shop/web/east/10.1.2.3:8080",
        "/services/shop/web/east/[fd00::3]:8080",
        "/services/web/10.1.2.3:8080",
        "/services/web/east.shop.web-0.http.v4",
        "/services/shop/web/_tcp/_http/east/web-0/v4",
        "/services/http/services/shop.web.http/loadbalancer/servers/1507705758/url",
    ];
    let values = [
        endpoint,
        "10.1.2.3:8080",
        r#"{"Op":0,"Addr":"10.1.2.3:8080","Metadata":null}"#,
        r#"{"network":"tcp","address":"10.1.2.3:8080","weight":100,"tags":{"cluster":"east","pod":"web-0"}}"#,
        r#"{"id":"x","name":"web","version":"v1","metadata":{"cluster":"east","weight":"100"},"endpoints":["http://10.1.2.3:8080"]}"#,
        r#"{"host":"10.1.2.3","port":8080,"weight":100,"ttl":30,"targetstrip":1}"#,
        r#"{"name":"web","version":"v1","nodes":[{"metadata":{"zone":"eu-a"},"id":"x","address":"10.1.2.3:8080"}]}"#,
        "http://10.1.2.3:8080",
        "",
    ];
    let texts = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    let pair = (corpus(texts(&keys), 3), corpus(texts(&values), 4));
    fuzz(&pair, |(key, value)| {
        for format in FORMATS.iter().filter_map(|name| Format::by_name(name)) {
            let _ = format.read_all("/services/", &key, &value);
            if let Some(cluster) = format.cluster_of("/services/", &key) {
                prop_assert!(names::cluster(cluster).is_ok());
            }
            let Ok(found) = format.read("/services/", &key, &value) else {
                continue;
            };
            prop_assert!(!found.address.is_empty());
            prop_assert!(!found.address.chars().any(char::is_control));
            // A whole endpoint comes out as it went in.
            if let Some(endpoint) = found.endpoint() {
                let place = etcd_registrar::format::Place {
                    prefix: "/services/",
                };
                let again = &format.records(&place, std::slice::from_ref(&endpoint))[0];
                let read = format
                    .read("/services/", again.key.as_bytes(), &again.value)
                    .unwrap();
                prop_assert_eq!(read.endpoint(), Some(endpoint));
            }
        }
        let _ = serde_json::from_slice::<SlotName>(&value);
        Ok(())
    });
}

#[test]
fn policy_files() {
    let texts = ["examples/policy.yaml", "docs/policy.md"].map(|file| {
        let text =
            std::fs::read_to_string(format!("{}/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        match text.split_once("```yaml\n") {
            Some((_, rest)) => rest.split("```").next().unwrap().as_bytes().to_vec(),
            None => text.into_bytes(),
        }
    });
    let asked = (text(), text());
    fuzz(
        &(corpus(texts.into(), 4), asked),
        |(file, (prefix, service))| {
            let Ok(policy) = Policy::parse(&String::from_utf8_lossy(&file)) else {
                return Ok(());
            };
            for namespace in NAMESPACES {
                let _ = policy.limits(namespace);
                for format in [FormatType::Json, FormatType::Plain, FormatType::Grpc] {
                    // A rule that does not name the format grants nothing.
                    let grants = policy.grants(namespace, format, &prefix, &service);
                    let any = policy
                        .rules
                        .iter()
                        .any(|rule| rule.formats.contains(&format));
                    prop_assert!(!grants || any);
                }
            }
            Ok(())
        },
    );
}

#[test]
fn lines_of_a_watch() {
    let whole = (pod(), registration(), edits(4)).prop_map(|(pod, registration, edits)| {
        let node =
            json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}}});
        [pod, registration, node].map(|object| edited(&line("MODIFIED", object, 7), &edits))
    });
    fuzz(&whole, |lines| {
        let resources = [Resource::Pods, Resource::Registrations, Resource::Nodes];
        for (resource, line) in resources.into_iter().zip(&lines) {
            if let Ok(Line::Applied(Item::Read(object), version)) =
                read_line(resource, Encoding::Json, line)
            {
                prop_assert!(version > 0);
                if let Object::Registration(object) = object
                    && let Ok(spec) = &object.spec
                {
                    let _ = Selector::parse(&spec.selector);
                }
            }
            let mut page = br#"{"metadata":{"resourceVersion":"7"},"items":["#.to_vec();
            page.extend(line);
            page.extend(b"]}");
            let _ = (
                read_page(resource, Encoding::Json, &page),
                read_list_version(Encoding::Json, &page),
                read_uid(line),
            );
        }
        Ok(())
    });
}

#[test]
fn messages_of_a_watch() {
    // As `runtime.Unknown` and `WatchEvent` frame an object; a length is a byte here.
    let part = |number: u8, bytes: &[u8]| [&[number << 3 | 2, bytes.len() as u8], bytes].concat();
    let metadata = [
        part(1, b"web-0"),
        part(3, b"shop"),
        part(5, b"u-1"),
        part(6, b"7"),
    ]
    .concat();
    let ready = [part(1, b"Ready"), part(2, b"True")].concat();
    let object = [part(1, &metadata), part(3, &part(2, &ready))].concat();
    let body = [b"k8s\0".as_slice(), &part(2, &object)].concat();
    let message = [part(1, b"ADDED"), part(2, &part(1, &body))].concat();
    let items = [part(1, &part(2, b"7")), part(2, &object)].concat();
    let list = [b"k8s\0".as_slice(), &part(2, &items)].concat();
    let protobuf = Encoding::Protobuf;
    let whole = read_line(Resource::Pods, protobuf, &message);
    assert!(
        matches!(whole, Ok(Line::Applied(Item::Read(_), 7))),
        "{whole:?}"
    );
    assert_eq!(
        read_page(Resource::Pods, protobuf, &list)
            .unwrap()
            .items
            .len(),
        1
    );
    let changed = edits(4).prop_map(move |edits| (edited(&message, &edits), edited(&list, &edits)));
    fuzz(&changed, |(message, list)| {
        for resource in [Resource::Pods, Resource::Registrations, Resource::Nodes] {
            if let Ok(Line::Applied(_, version)) = read_line(resource, protobuf, &message) {
                prop_assert!(version > 0);
            }
            let _ = (
                read_page(resource, protobuf, &list),
                read_list_version(protobuf, &list),
                read_refusal(500, protobuf, &list),
            );
        }
        Ok(())
    });
}

// === the whole ===

const POLICY: &str = r#"
rules:
  - {namespaces: ["*"], formats: [Json], prefixes: ["/services/{namespace}/"]}
  - {namespaces: ["*"], formats: [Plain, Grpc], prefixes: ["plain/{namespace}/*"]}
limits:
  - {namespaces: ["*"], registrations: 3, endpoints: 12, endpointsPerRegistration: 8}
"#;
const UID: &str = "c1c1c1c1-0000-4000-8000-000000000001";
const OWN: &str = "/registrar/east/";

#[derive(Clone, Debug)]
enum Step {
    Registration(Value),
    Pod(Value),
    /// Deleted: a registration, or a pod.
    Gone(bool, Value),
    /// Someone puts a key: the key, the value, and on which lease of those that there are.
    Put(Vec<u8>, Vec<u8>, Option<Index>),
    /// Someone deletes a key.
    Delete(Index),
    /// Someone alters the value of a key that stands.
    Alter(Index, Vec<Edit>),
    Wait(u8),
}

/// Large records of others, where a registration may look.
fn foreign() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let name = prop::sample::select(vec!["r0", "r1", "web", "shop"]);
    let place = (prop::sample::select(NAMESPACES.to_vec()), name, 0u8..200);
    (place, any::<bool>(), 1usize..60_000).prop_map(|((namespace, name, number), plain, size)| {
        let long = "y".repeat(size);
        if plain {
            let key = format!("plain/{namespace}/{name}/{number}{long}");
            return (key.into_bytes(), long.into_bytes());
        }
        let address = format!("10.0.1.{number}:80");
        let value = json!({
            "address": address, "host": format!("10.0.1.{number}"), "port": 80, "pod": long, "node": long,
            "zone": long, "portName": long,
        });
        let key = format!("/services/{namespace}/{name}/west/{address}");
        (key.into_bytes(), value.to_string().into_bytes())
    })
}

fn step() -> impl Strategy<Value = Step> {
    let keys = [
        "/services/shop/web/east/10.0.0.1:80",
        "/services/ops/r0/east/10.0.0.2:80",
        "plain/shop/web/10.0.0.1:80",
        "/services/shop/r1/west/10.0.0.3:80",
        "/registrar/east/owner",
        "/registrar/east/leader",
        "/registrar/east/seen/0",
        "/registrar/east/waiting/x",
        "/registrar/east/leases/c1c1c1c1-0000-4000-8000-000000000001/00000000000000aa",
    ]
    .map(|key| key.as_bytes().to_vec());
    let values = [
        r#"{"address":"10.0.0.1:80","host":"10.0.0.1","port":80,"cluster":"east"}"#, "10.0.0.1:80", UID,
        r#"{"registration":"shop/r0","scope":"/services/shop/web/","ttl":60,"format":"Json","prefix":"/services/","service":"web"}"#,
        r#"{"registration":"shop/r0","scope":"/","ttl":60,"format":"Plain","prefix":"","service":""}"#,
        r#"{"pods":5,"registrations":99999999}"#,
    ]
    .map(|value| value.as_bytes().to_vec());
    prop_oneof![
        6 => registration().prop_map(Step::Registration),
        6 => pod().prop_map(Step::Pod),
        1 => (any::<bool>(), registration(), pod()).prop_map(|(first, a, b)| Step::Gone(first, if first { a } else { b })),
        3 => (corpus(keys.into(), 2), corpus(values.into(), 2), any::<Option<Index>>())
            .prop_map(|(key, value, lease)| Step::Put(key, value, lease)),
        1 => any::<Index>().prop_map(Step::Delete),
        2 => (any::<Index>(), edits(3)).prop_map(|(at, edits)| Step::Alter(at, edits)),
        3 => any::<u8>().prop_map(Step::Wait),
        2 => foreign().prop_map(|(key, value)| Step::Put(key, value, None)),
    ]
}

/// An etcd that does what it is asked at once, and the tasks around the engine.
struct World {
    engine: Engine,
    now: u64,
    version: u64,
    revision: i64,
    store: BTreeMap<Key, KeyValue>,
    leases: BTreeSet<i64>,
    /// Keys that someone else made, and that were never the operator's.
    foreign: BTreeSet<Key>,
    ranges: Vec<Range>,
    objects: BTreeMap<(Resource, String), Object>,
    inputs: VecDeque<Input>,
    over: bool,
    /// Records that the operator put.
    put: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let settings = Settings {
            cluster_name: "east".into(),
            registrar_prefix: "/registrar/".into(),
            election_ttl: 5,
            max_staleness: 0,
            namespaces: BTreeSet::new(),
            seed,
        };
        let mut world = Self {
            engine: Engine::new(settings, Policy::parse(POLICY).unwrap()),
            now: 0,
            version: 1,
            revision: 1,
            store: BTreeMap::new(),
            leases: BTreeSet::new(),
            foreign: BTreeSet::new(),
            ranges: Vec::new(),
            objects: BTreeMap::new(),
            inputs: VecDeque::new(),
            over: false,
            put: 0,
        };
        let uid = Input::Kube(KubeInput::ClusterUid(UID.into()));
        world.inputs.push_back(uid);
        for resource in [Resource::Pods, Resource::Nodes, Resource::Registrations] {
            world.list(resource, 0);
        }
        world
    }

    fn list(&mut self, resource: Resource, relist: u64) {
        let mut inputs = vec![KubeInput::ListStarted { resource, relist }];
        for ((of, _), object) in &self.objects {
            if *of == resource {
                inputs.push(KubeInput::Applied(object.clone()));
            }
        }
        inputs.push(KubeInput::ListDone {
            resource,
            resource_version: self.version,
        });
        self.inputs.extend(inputs.into_iter().map(Input::Kube));
    }

    /// Time passes, in ticks of 100 ms, and everything is carried out.
    fn run(&mut self, ticks: u32) -> TestCaseResult {
        for _ in 0..ticks {
            self.now += 100_000;
            self.inputs.push_back(Input::Kube(KubeInput::Answered));
            self.inputs.push_back(Input::Tick);
            let mut steps = 0;
            while let Some(input) = self.inputs.pop_front() {
                steps += 1;
                prop_assert!(steps < 20_000, "it never comes to rest: {input:?}");
                let now = Now {
                    monotonic: self.now,
                    unix: 1_800_000_000,
                };
                for effect in self.engine.step(input, now) {
                    self.carry_out(effect)?;
                }
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, effect: Effect) -> TestCaseResult {
        match effect {
            Effect::Ask(number, request) => {
                let answer = self.ask(request)?;
                self.inputs.push_back(Input::Answer(number, Ok(answer)));
            }
            Effect::Follow(ranges) => {
                for range in &ranges {
                    prop_assert!(
                        range.start.len() > 1 && range.start.ends_with(b"/"),
                        "follows {range:?}"
                    );
                    if !self.ranges.contains(range) {
                        self.snapshot(range);
                    }
                }
                self.ranges = ranges;
            }
            Effect::Reread(range) => self.snapshot(&range),
            Effect::AskProgress => self
                .inputs
                .push_back(Input::Etcd(News::Progress(self.revision))),
            Effect::Relist(resource, number) => self.list(resource, number),
            Effect::Done | Effect::Fatal(_) => self.over = true,
            Effect::PatchStatus { status, .. } => {
                prop_assert!(status.endpoints.len() <= 100);
                // An endpoint takes 2.5 KB at most, and the API server some 1.5 MB a status.
                let most = 10_000 + 2_500 * status.endpoints.len();
                let size = serde_json::to_vec(&status).unwrap().len();
                prop_assert!(size < most, "a status of {size} bytes");
                for condition in &status.conditions {
                    prop_assert!(
                        condition.message.len() <= 32_768,
                        "{}",
                        condition.message.len()
                    );
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn snapshot(&mut self, range: &Range) {
        let found = self.store.values().filter(|kv| range.contains(&kv.key));
        self.inputs.push_back(Input::Etcd(News::Snapshot {
            range: range.clone(),
            revision: self.revision,
            records: found.cloned().collect(),
        }));
    }

    fn set(&mut self, key: &Key, value: Option<(Box<[u8]>, i64)>) {
        let event = match value {
            Some((value, lease)) => {
                let create_revision = self
                    .store
                    .get(key)
                    .map_or(self.revision, |kv| kv.create_revision);
                let kv = KeyValue {
                    key: Arc::clone(key),
                    value,
                    lease,
                    create_revision,
                    mod_revision: self.revision,
                };
                self.store.insert(Arc::clone(key), kv.clone());
                Event::Put(kv)
            }
            None => {
                if self.store.remove(key).is_none() {
                    return;
                }
                self.foreign.remove(key);
                Event::Delete(Arc::clone(key), self.revision)
            }
        };
        for range in self.ranges.iter().filter(|range| range.contains(key)) {
            self.inputs.push_back(Input::Etcd(News::Events {
                range: range.clone(),
                revision: self.revision,
                events: vec![event.clone()],
            }));
        }
    }

    fn ask(&mut self, request: Request) -> Result<Answer, TestCaseError> {
        Ok(match request {
            Request::Grant(lease, ttl) => {
                prop_assert!((1..=86_400).contains(&ttl));
                self.leases.insert(lease);
                Answer::Granted
            }
            Request::Revoke(lease) => {
                self.leases.remove(&lease);
                self.revision += 1;
                let keys: Vec<Key> = self.keys_on(lease);
                for key in keys {
                    prop_assert!(key.starts_with(OWN.as_bytes()), "a revoke removes {key:?}");
                    self.set(&key, None);
                }
                Answer::Revoked
            }
            Request::LeaseKeys(lease) => {
                let ttl = if self.leases.contains(&lease) { 60 } else { -1 };
                Answer::LeaseKeys(ttl, self.keys_on(lease))
            }
            Request::Txn(txn) => self.transaction(&txn)?,
        })
    }

    fn keys_on(&self, lease: i64) -> Vec<Key> {
        let found = self.store.values().filter(|kv| kv.lease == lease);
        found.map(|kv| Arc::clone(&kv.key)).collect()
    }

    fn transaction(&mut self, txn: &Txn) -> Result<Answer, TestCaseError> {
        let held = txn.compares.iter().all(|compare| match compare {
            Compare::CreateRevision(key, at) => {
                self.store.get(key).map_or(0, |kv| kv.create_revision) == *at
            }
            Compare::ModRevision(key, at) => {
                self.store.get(key).map_or(0, |kv| kv.mod_revision) == *at
            }
            Compare::Value(key, value) => self.store.get(key).is_some_and(|kv| kv.value == *value),
            Compare::Nothing(range) => !self.store.keys().any(|key| range.contains(key)),
        });
        let branch = if held { &txn.then } else { &txn.otherwise };
        if branch
            .iter()
            .any(|op| matches!(op, Op::Put(..) | Op::Delete(_)))
        {
            self.revision += 1;
        }
        let mut reads = Vec::new();
        let mut written = BTreeSet::new();
        for op in branch {
            let mut found = Vec::new();
            match op {
                Op::Put(key, value, lease) => {
                    prop_assert!(
                        written.insert(Arc::clone(key)),
                        "{key:?} twice in a transaction"
                    );
                    prop_assert!(*lease != 0, "{key:?} without a lease");
                    self.check_put(key)?;
                    if !key.starts_with(OWN.as_bytes()) {
                        check_record(key, value)?;
                        self.put += 1;
                    }
                    self.set(key, Some((value.clone(), *lease)));
                }
                Op::Delete(key) => {
                    prop_assert!(
                        written.insert(Arc::clone(key)),
                        "{key:?} twice in a transaction"
                    );
                    self.check_delete(key)?;
                    self.set(key, None);
                }
                Op::Get(key) => found.extend(self.store.get(key).cloned()),
                Op::GetRange(range) => {
                    let inside = self.store.values().filter(|kv| range.contains(&kv.key));
                    found.extend(inside.cloned());
                }
            }
            reads.push(found);
        }
        Ok(Answer::Txn {
            succeeded: held,
            revision: self.revision,
            reads,
        })
    }

    /// A put is in its place, and at no key of someone else's.
    fn check_put(&self, key: &Key) -> TestCaseResult {
        let text = std::str::from_utf8(key).unwrap();
        if !text.starts_with(OWN) {
            prop_assert!(!self.foreign.contains(key), "{text:?} is someone else's");
            let granted = NAMESPACES.iter().any(|namespace| {
                text.starts_with(&format!("/services/{namespace}/"))
                    || text.starts_with(&format!("plain/{namespace}/"))
            });
            prop_assert!(granted, "{text:?} is not granted");
        }
        Ok(())
    }

    /// What is deleted was the operator's: its lease was, or it was put by the operator before.
    fn check_delete(&self, key: &Key) -> TestCaseResult {
        let foreign = self.foreign.contains(key) && !key.starts_with(OWN.as_bytes());
        prop_assert!(!foreign, "{key:?} is someone else's");
        Ok(())
    }

    fn take(&mut self, step: Step) {
        self.version += 1;
        match step {
            Step::Registration(object) => self.kube("MODIFIED", Resource::Registrations, object),
            Step::Pod(object) => self.kube("MODIFIED", Resource::Pods, object),
            Step::Gone(true, object) => self.kube("DELETED", Resource::Registrations, object),
            Step::Gone(false, object) => self.kube("DELETED", Resource::Pods, object),
            Step::Put(key, value, lease) => {
                let key: Key = key.as_slice().into();
                let leases: Vec<i64> = self.leases.iter().copied().collect();
                let lease = match lease {
                    Some(at) if !leases.is_empty() => leases[at.index(leases.len())],
                    _ => 0,
                };
                self.revision += 1;
                // On a lease of the operator's it is its business.
                if lease != 0 {
                    self.foreign.remove(&key);
                } else if !self.store.contains_key(&key) {
                    self.foreign.insert(Arc::clone(&key));
                }
                self.set(&key, Some((value.into(), lease)));
            }
            Step::Delete(at) => {
                if let Some(key) = self.standing(&at) {
                    self.revision += 1;
                    self.set(&key, None);
                }
            }
            Step::Alter(at, edits) => {
                if let Some(key) = self.standing(&at) {
                    self.revision += 1;
                    let kv = &self.store[&key];
                    let (value, lease) = (edited(&kv.value, &edits), kv.lease);
                    self.set(&key, Some((value.into(), lease)));
                }
            }
            Step::Wait(_) => {}
        }
    }

    fn standing(&self, at: &Index) -> Option<Key> {
        let keys: Vec<&Key> = self.store.keys().collect();
        (!keys.is_empty()).then(|| Arc::clone(keys[at.index(keys.len())]))
    }

    fn kube(&mut self, kind: &str, resource: Resource, object: Value) {
        let read = match read_line(resource, Encoding::Json, &line(kind, object, self.version)) {
            Ok(Line::Applied(Item::Read(object), _)) => (false, object),
            Ok(Line::Deleted(Item::Read(object), _)) => (true, object),
            _ => return,
        };
        let (deleted, object) = read;
        let name = match &object {
            Object::Pod(pod) => format!("{}/{}", pod.namespace, pod.uid),
            Object::Node(node) => node.name.to_string(),
            Object::Registration(object) => format!("{}/{}", object.namespace, object.uid),
        };
        let input = if deleted {
            self.objects.remove(&(resource, name));
            KubeInput::Deleted(object)
        } else {
            self.objects.insert((resource, name), object.clone());
            KubeInput::Applied(object)
        };
        self.inputs.push_back(Input::Kube(input));
    }
}

/// A record can be read back by the format that wrote it, and no segment of its key can be misread.
fn check_record(key: &[u8], value: &[u8]) -> TestCaseResult {
    let text = std::str::from_utf8(key).unwrap();
    let path = text.strip_prefix('/').unwrap_or(text);
    for segment in path.split('/') {
        prop_assert!(
            !segment.is_empty() && segment != "." && segment != "..",
            "{text:?}"
        );
    }
    prop_assert!(!text.chars().any(char::is_control), "{text:?}");
    let (formats, prefix): (&[Format], String) = if text.starts_with("/services/") {
        (&[Format::Json], "/services/".into())
    } else {
        // `{prefix}{service}/{address}`
        let service = text.rmatch_indices('/').nth(1).map_or(0, |(at, _)| at + 1);
        (&[Format::Plain, Format::Grpc], text[..service].into())
    };
    let found = formats.iter().find_map(|format| {
        let found = format.read(&prefix, key, value).ok()?;
        found.socket.map(|socket| (found, socket))
    });
    let Some((found, socket)) = found else {
        return Err(TestCaseError::fail(format!("{text:?} can't be read back")));
    };
    prop_assert!(
        text.ends_with(&format!("/{socket}")),
        "{text:?} stands for {socket}"
    );
    if formats == [Format::Json] {
        prop_assert!(found.endpoint().is_some(), "{text:?} is not whole");
    }
    Ok(())
}

#[test]
fn the_whole_operator() {
    let steps = prop::collection::vec(step(), 1..25);
    let put = std::cell::Cell::new(0usize);
    fuzz(&(any::<u64>(), steps), |(seed, steps)| {
        let mut world = World::new(seed);
        // Until it leads: its leases, the owner, the election, the marks.
        world.run(15)?;
        for step in steps {
            let ticks = match step {
                Step::Wait(ticks) => u32::from(ticks % 20),
                _ => 0,
            };
            world.take(step);
            world.run(ticks + 1)?;
            if world.over {
                break;
            }
        }
        if !world.over {
            world.run(30)?;
        }
        put.set(put.get() + world.put);
        Ok(())
    });
    // Else it has checked nothing. A busy machine has time for the first cases alone, which put some 60 to 100.
    assert!(put.get() > 10, "{} records were put", put.get());
}
