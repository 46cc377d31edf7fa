//! Limits: whatever comes and goes, and in whatever order, the same pods are within.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::api::{Port, ServiceRegistrationSpec};

const NAMESPACE: &str = "shop";

fn policy(registrations: u32, endpoints: u32, each: u32) -> Policy {
    Policy::parse(&format!(
        "rules: [{{namespaces: ['*'], formats: [Json], prefixes: ['/services/{{namespace}}/']}}]\n\
         limits: [{{namespaces: ['*'], registrations: {registrations}, endpoints: {endpoints}, endpointsPerRegistration: {each}}}]"
    ))
    .unwrap()
}

fn index(policy: Policy) -> Index {
    let settings = AcceptSettings {
        cluster_name: "east".into(),
        registrar_prefix: "/registrar/".into(),
    };
    Index::new(settings, policy)
}

/// Two in a second.
fn pod_created(number: u8) -> i64 {
    i64::from(number / 2 * 2)
}

/// In between.
fn registration_created(number: u8) -> i64 {
    i64::from(number * 4 + 1)
}

/// Pod `number` with the labels that registrations select by.
fn pod(number: u8, version: u64, labels: &[u8], ready: bool) -> Pod {
    let mut labels: Vec<(Box<str>, Box<str>)> = labels
        .iter()
        .map(|label| (format!("sel{label}").into(), "yes".into()))
        .collect();
    labels.sort();
    labels.dedup();
    Pod {
        uid: format!("0b9e4c3a-1111-4222-8333-0123456789{number:02x}").into(),
        namespace: NAMESPACE.into(),
        name: format!("pod-{number}").into(),
        resource_version: version,
        created: pod_created(number),
        labels,
        ready,
        ips: vec![[10, 0, 0, number].into()],
        ..Pod::default()
    }
}

/// Registration `number`, with so many ports, of the pods with its label.
fn registration(number: u8, version: u64, ports: u8) -> Registration {
    let mut spec = ServiceRegistrationSpec {
        ports: (0..ports)
            .map(|port| Port {
                name: format!("p{port}"),
                port: Some(8080 + i32::from(port)),
                ..Port::default()
            })
            .collect(),
        ..ServiceRegistrationSpec::default()
    };
    let labels = [(format!("sel{number}"), "yes".to_owned())];
    spec.selector.match_labels = Some(labels.into());
    Registration {
        namespace: NAMESPACE.into(),
        name: format!("reg-{number}"),
        uid: format!("uid-{number}"),
        generation: i64::try_from(version).unwrap(),
        resource_version: version,
        created: registration_created(number),
        deleting: false,
        spec: Ok(spec),
        status: None,
    }
}

/// Who has which key, and who is left out.
type State = (BTreeMap<String, String>, BTreeMap<String, (u32, u32, bool)>);

fn state(index: &Index) -> State {
    let mut keys = BTreeMap::new();
    let mut left_out = BTreeMap::new();
    for (id, stored) in index.registrations() {
        for key in index.keys_of(id) {
            let key = String::from_utf8_lossy(key).into_owned();
            keys.insert(key, stored.name.to_string());
        }
        left_out.insert(
            stored.name.to_string(),
            (
                stored.beyond_own_limit,
                stored.beyond_namespace_limit,
                stored.serving().is_some(),
            ),
        );
    }
    assert_eq!(keys.len(), index.wanted_count());
    (keys, left_out)
}

/// By definition, from the objects alone.
fn by_definition(
    pods: &BTreeMap<u8, Pod>,
    registrations: &BTreeMap<u8, Registration>,
    limits: (u32, u32, u32),
) -> BTreeMap<String, String> {
    let mut places: Vec<(i64, u8, u8, usize)> = Vec::new();
    for (number, object) in registrations.iter().take(limits.0 as usize) {
        let label = format!("sel{number}");
        let ports = object.spec.as_ref().unwrap().ports.len();
        let mut own: Vec<(i64, u8)> = pods
            .iter()
            .filter(|(_, pod)| pod.labels.iter().any(|(key, _)| **key == *label))
            .map(|(name, pod)| (pod.created.max(object.created), *name))
            .collect();
        own.sort_unstable();
        let room = limits.2 as usize / ports;
        for (since, pod) in own.into_iter().take(room) {
            places.push((since, *number, pod, ports));
        }
    }
    places.sort_unstable();
    let mut used = 0;
    let mut keys = BTreeMap::new();
    for (_, number, name, ports) in places {
        used += ports;
        if used > limits.1 as usize {
            break;
        }
        if pods[&name].ready {
            for port in 0..ports {
                let port = 8080 + port;
                keys.insert(
                    format!("/services/{NAMESPACE}/reg-{number}/east/10.0.0.{name}:{port}"),
                    format!("reg-{number}"),
                );
            }
        }
    }
    keys
}

#[derive(Clone, Debug)]
enum Step {
    Pod(u8, Vec<u8>, bool),
    NoPod(u8),
    Registration(u8, u8),
    NoRegistration(u8),
    Limits(u32, u32, u32),
}

fn step() -> impl Strategy<Value = Step> {
    let labels = prop::collection::vec(0u8..4, 0..4);
    prop_oneof![
        6 => (1u8..16, labels, prop::bool::weighted(0.8)).prop_map(|(n, l, r)| Step::Pod(n, l, r)),
        2 => (1u8..16).prop_map(Step::NoPod),
        4 => (0u8..4, 1u8..4).prop_map(|(n, ports)| Step::Registration(n, ports)),
        1 => (0u8..4).prop_map(Step::NoRegistration),
        1 => (0u32..5, 0u32..30, 0u32..12).prop_map(|(r, n, e)| Step::Limits(r, n, e)),
    ]
}

proptest! {
    /// After every step the keys are those of the definition, and those that a new process finds.
    #[test]
    fn the_same_pods_are_within_however_it_came_to_it(
        steps in prop::collection::vec(step(), 1..60),
        limits in (1u32..5, 0u32..20, 0u32..10),
    ) {
        let mut limits = limits;
        let mut index = index(policy(limits.0, limits.1, limits.2));
        let mut pods: BTreeMap<u8, Pod> = BTreeMap::new();
        let mut registrations: BTreeMap<u8, Registration> = BTreeMap::new();
        for (version, step) in (1u64..).zip(steps) {
            let mut touched = Touched::default();
            let before = state(&index).0;
            let newest = pods
                .values()
                .map(|pod| pod.created)
                .chain(registrations.values().map(|object| object.created))
                .max();
            let grows = match &step {
                Step::Pod(number, ..) => newest < Some(pod_created(*number)),
                Step::Registration(number, _) => newest < Some(registration_created(*number)),
                _ => false,
            };
            match step {
                Step::Pod(number, labels, ready) => {
                    let object = pod(number, version, &labels, ready);
                    pods.insert(number, object.clone());
                    index.apply_pod(object, false, &mut touched);
                }
                Step::NoPod(number) => {
                    if let Some(object) = pods.remove(&number) {
                        index.delete_pod(&object.uid, &mut touched);
                    }
                }
                Step::Registration(number, ports) => {
                    let object = registration(number, version, ports);
                    registrations.insert(number, object.clone());
                    index.apply_registration(object, false, &mut touched);
                }
                Step::NoRegistration(number) => {
                    if let Some(object) = registrations.remove(&number) {
                        let name = format!("{NAMESPACE}/{}", object.name);
                        index.delete_registration(&name, &object.uid, &mut touched);
                    }
                }
                Step::Limits(registrations, endpoints, each) => {
                    limits = (registrations, endpoints, each);
                    index.set_policy(policy(registrations, endpoints, each), &mut touched);
                }
            }
            let now = state(&index);
            prop_assert_eq!(&now.0, &by_definition(&pods, &registrations, limits));
            // Whatever changed was said.
            let named: BTreeSet<String> = touched
                .keys
                .iter()
                .map(|key| String::from_utf8_lossy(key).into_owned())
                .collect();
            for key in before.keys().chain(now.0.keys()) {
                if before.get(key) != now.0.get(key) {
                    prop_assert!(named.contains(key), "{key} changed unsaid");
                }
            }
            // Who comes last takes nothing away.
            if grows {
                for key in before.keys() {
                    prop_assert!(now.0.contains_key(key), "{key} was lost to a newcomer");
                }
            }
            let mut fresh = self::index(policy(limits.0, limits.1, limits.2));
            for object in pods.values().rev() {
                fresh.apply_pod(object.clone(), false, &mut touched);
            }
            for object in registrations.values().rev() {
                fresh.apply_registration(object.clone(), false, &mut touched);
            }
            prop_assert_eq!(state(&fresh), now);
        }
    }
}

#[test]
fn metadata_that_finds_no_room_is_left_out_and_what_is_the_same_for_all_stays() {
    let mut index = index(Policy::default());
    let mut touched = Touched::default();
    let mut object = registration(0, 1, 1);
    let annotations: Vec<String> = (0..32).map(|at| format!("note-{at:02}")).collect();
    if let Ok(spec) = &mut object.spec {
        spec.metadata.annotations = annotations.clone();
        spec.metadata.labels = vec!["sel0".into()];
        spec.metadata.statics = [("zone-of-mine".to_owned(), "x".repeat(100))].into();
    }
    index.apply_registration(object, false, &mut touched);
    let mut pod = pod(1, 2, &[0], true);
    pod.annotations = annotations
        .iter()
        .map(|name| (name.as_str().into(), "y".repeat(256).into()))
        .collect();
    index.apply_pod(pod, false, &mut touched);
    let id = index.find("shop/reg-0").unwrap();
    let key = index.keys_of(id).next().unwrap().clone();
    let (claim, _) = index.winner(&key).unwrap();
    let value = index.record(claim, &key, "").unwrap().value;
    let value: serde_json::Value = serde_json::from_slice(&value).unwrap();
    let names: Vec<&String> = value["metadata"].as_object().unwrap().keys().collect();
    // 8,192 without 112 for the static entry are 30 annotations of 263; then there is room for the label.
    assert_eq!(names.len(), 30 + 1 + 1);
    assert!(value["metadata"]["zone-of-mine"].is_string() && value["metadata"]["sel0"] == "yes");
    assert!(value["metadata"]["note-29"].is_string() && value["metadata"]["note-30"].is_null());
}
