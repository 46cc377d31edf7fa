//! What happens in Kubernetes, and what people do to etcd: random, from a small world in which things
//! meet often.

use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use rand::Rng;

use etcd_registrar::api::{
    Address, AddressFamily, FormatSpec, FormatType, MetadataSpec, Port, PortProtocol,
    ServiceRegistrationSpec,
};
use etcd_registrar::engine::io::Registration;
use etcd_registrar::model::endpoint::Protocol;
use etcd_registrar::model::etcd::{Key, Op, Request, Txn};
use etcd_registrar::model::pod::{ContainerPort, Node, Pod};

use crate::expected::accepted;
use crate::model_etcd::{Author, show};
use crate::schedule::Change;
use crate::world::{REGISTRAR, World, is_record, key};

const NAMESPACES: [&str; 3] = ["shop", "shop", "team"];
const NODES: [&str; 3] = ["n1", "n2", "n3"];
const ZONES: [&str; 3] = ["eu-a", "eu-b", ""];
const PODS: usize = 10;
/// What a hand writes.
const HAND: &str = "put by hand";

fn pick<T: Copy>(world: &mut World, from: &[T]) -> T {
    let at = world.rng.random_range(0..from.len());
    *from.get(at).expect("not empty")
}

/// One change of Kubernetes.
pub(crate) fn change(world: &mut World, change: Change) {
    match change {
        Change::CreatePod => create_pod(world),
        Change::Readiness => with_pod(world, |_, pod| pod.ready = !pod.ready),
        Change::Addresses => with_pod(world, |world, pod| pod.ips = addresses(world)),
        Change::Labels => with_pod(world, |world, pod| pod.labels = labels(world)),
        Change::Terminate => with_pod(world, |_, pod| pod.deleting = true),
        Change::Finish => with_pod(world, |_, pod| {
            pod.finished = true;
            pod.ready = false;
        }),
        Change::DeletePod => delete_pod(world),
        Change::ReplacePod => replace_pod(world),
        Change::EditSpec => change_spec(world),
        Change::CreateRegistration => create_registration(world),
        Change::DeleteRegistration => delete_registration(world),
        Change::EditNode => change_node(world),
        Change::Suspend => suspend(world),
        Change::Spoil => spoil(world),
        Change::Mend => mend(world, false),
    }
    let changed = world.kube.version;
    world.note(|| format!("kube is at {changed}"));
}

// === pods ===

fn a_pod(world: &mut World) -> Option<Pod> {
    let pods: Vec<Pod> = world.kube.pods.values().cloned().collect();
    if pods.is_empty() {
        return None;
    }
    let at = world.rng.random_range(0..pods.len());
    pods.get(at).cloned()
}

fn with_pod(world: &mut World, change: impl FnOnce(&mut World, &mut Pod)) {
    let Some(mut pod) = a_pod(world) else { return };
    let before = pod.clone();
    change(world, &mut pod);
    world.note(|| format!("kube: {pod:?}"));
    world.checks.pod_changes(&before, world.kube.version + 1);
    world.checks.pod_changes(&pod, world.kube.version + 1);
    world.kube.put_pod(pod);
}

fn delete_pod(world: &mut World) {
    let Some(pod) = a_pod(world) else { return };
    world.note(|| format!("kube: delete pod {}", pod.uid));
    world.checks.pod_changes(&pod, world.kube.version + 1);
    world.kube.delete_pod(&pod.uid);
}

fn replace_pod(world: &mut World) {
    let Some(old) = a_pod(world) else { return };
    world.note(|| format!("kube: delete pod {}", old.uid));
    world.checks.pod_changes(&old, world.kube.version + 1);
    world.kube.delete_pod(&old.uid);
    let new = Pod {
        uid: world.kube.new_uid().into(),
        created: i64::try_from(world.kube.version / 5).unwrap_or(0),
        deleting: false,
        finished: false,
        ready: true,
        ..old
    };
    world.note(|| format!("kube: {new:?}"));
    world.checks.pod_changes(&new, world.kube.version + 1);
    world.kube.put_pod(new);
}

fn create_pod(world: &mut World) {
    if world.kube.pods.len() >= PODS {
        return delete_pod(world);
    }
    let namespace = pick(world, &NAMESPACES);
    // A name comes again with another UID, as those of a StatefulSet do.
    let name = format!("web-{}", world.rng.random_range(0..7));
    let taken = world
        .kube
        .pods
        .values()
        .any(|pod| *pod.namespace == *namespace && *pod.name == *name);
    if taken {
        return;
    }
    let node = pick(world, &NODES);
    let host_ip = format!("192.168.0.{}", node.trim_start_matches('n'));
    let host_network = world.rng.random_bool(0.1);
    let host_ips: Vec<IpAddr> = vec![host_ip.parse().expect("an address")];
    let ips = if host_network {
        host_ips.clone()
    } else {
        addresses(world)
    };
    let pod = Pod {
        uid: world.kube.new_uid().into(),
        namespace: namespace.into(),
        name: name.into(),
        resource_version: 0,
        created: i64::try_from(world.kube.version / 5).unwrap_or(0),
        labels: labels(world),
        annotations: Vec::new(),
        deleting: false,
        finished: false,
        ready: world.rng.random_bool(0.8),
        host_network,
        node: node.into(),
        ips,
        host_ips,
        ports: container_ports(world),
    };
    world.note(|| format!("kube: {pod:?}"));
    world.checks.pod_changes(&pod, world.kube.version + 1);
    world.kube.put_pod(pod);
}

fn addresses(world: &mut World) -> Vec<IpAddr> {
    let mut found: Vec<String> = Vec::new();
    if world.rng.random_bool(0.1) {
        let odd = pick(world, &["127.0.0.1", "fe80::1"]);
        found.push(odd.into());
    }
    if world.rng.random_bool(0.9) {
        found.push(format!("10.0.0.{}", world.rng.random_range(1..=8)));
    }
    if world.rng.random_bool(0.3) {
        found.push(format!("fd00::{}", world.rng.random_range(1..=4)));
    }
    found
        .iter()
        .map(|ip| ip.parse().expect("an address"))
        .collect()
}

fn labels(world: &mut World) -> Vec<(Box<str>, Box<str>)> {
    let mut labels: Vec<(Box<str>, Box<str>)> = Vec::new();
    if world.rng.random_bool(0.9) {
        labels.push(("app".into(), pick(world, &["a", "a", "a", "b"]).into()));
    }
    if world.rng.random_bool(0.1) {
        let zone = pick(world, &["eu-x", "eu-y"]);
        labels.push(("topology.kubernetes.io/zone".into(), zone.into()));
    }
    if world.rng.random_bool(0.5) {
        labels.push(("version".into(), pick(world, &["v1", "v2"]).into()));
    }
    labels
}

fn container_ports(world: &mut World) -> Vec<ContainerPort> {
    let port = |name: &str, port, host_port, protocol| ContainerPort {
        name: name.into(),
        port,
        host_port,
        protocol,
    };
    let mut ports = Vec::new();
    if world.rng.random_bool(0.9) {
        ports.push(port("http", 8080, 18080, Protocol::Tcp));
    }
    match world.rng.random_range(0..4) {
        0 => ports.push(port("metrics", 8080, 0, Protocol::Tcp)),
        1 => {}
        _ => ports.push(port("metrics", 9090, 19090, Protocol::Tcp)),
    }
    if world.rng.random_bool(0.3) {
        ports.push(port("dns", 8080, 18080, Protocol::Udp));
    }
    ports
}

// === registrations ===

fn a_registration(world: &mut World) -> Option<Registration> {
    let all: Vec<Registration> = world.kube.registrations.values().cloned().collect();
    if all.is_empty() {
        return None;
    }
    let at = world.rng.random_range(0..all.len());
    all.get(at).cloned()
}

fn create_registration(world: &mut World) {
    let namespace = pick(world, &NAMESPACES);
    let name = pick(world, &["web", "api"]);
    if world
        .kube
        .registrations
        .contains_key(&format!("{namespace}/{name}"))
    {
        return;
    }
    let spec = some_spec(world);
    let registration = Registration {
        namespace: namespace.into(),
        name: name.into(),
        uid: world.kube.new_uid(),
        generation: 1,
        resource_version: 0,
        created: i64::try_from(world.kube.version / 5).unwrap_or(0),
        deleting: false,
        spec: Ok(spec),
        status: None,
    };
    put(world, registration);
}

/// A registration of namespace `shop` for the pods with `app: a`, on port `http`.
pub(crate) fn registration(name: &str, type_: FormatType, prefix: Option<&str>) -> Registration {
    let spec = ServiceRegistrationSpec {
        selector: LabelSelector {
            match_labels: Some([("app".to_owned(), "a".to_owned())].into()),
            match_expressions: None,
        },
        ports: vec![Port {
            name: "http".into(),
            ..Port::default()
        }],
        format: FormatSpec {
            type_,
            ..FormatSpec::default()
        },
        prefix: prefix.map(str::to_owned),
        ..ServiceRegistrationSpec::default()
    };
    Registration {
        namespace: "shop".into(),
        name: name.into(),
        uid: format!("of {name}"),
        generation: 1,
        resource_version: 0,
        created: 1,
        deleting: false,
        spec: Ok(spec),
        status: None,
    }
}

/// A ready pod that such a registration selects.
pub(crate) fn pod(world: &mut World, name: &str, ips: &[&str]) -> Pod {
    Pod {
        uid: world.kube.new_uid().into(),
        namespace: "shop".into(),
        name: name.into(),
        created: i64::try_from(world.kube.version).unwrap_or(0),
        labels: vec![("app".into(), "a".into())],
        ready: true,
        node: "n1".into(),
        ips: ips
            .iter()
            .map(|ip| ip.parse().expect("an address"))
            .collect(),
        ports: vec![ContainerPort {
            name: "http".into(),
            port: 8080,
            host_port: 0,
            protocol: Protocol::Tcp,
        }],
        ..Pod::default()
    }
}

pub(crate) fn put_pod(world: &mut World, pod: Pod) {
    world.checks.pod_changes(&pod, world.kube.version + 1);
    world.kube.put_pod(pod);
    world.wake_all();
}

pub(crate) fn remove_pod(world: &mut World, pod: &Pod) {
    world.checks.pod_changes(pod, world.kube.version + 1);
    world.kube.delete_pod(&pod.uid);
    world.wake_all();
}

pub(crate) fn put(world: &mut World, registration: Registration) {
    world.note(|| format!("kube: {registration:?}"));
    world.checks.registration_changes(world.kube.version + 1);
    world.kube.put_registration(registration);
}

fn change_spec(world: &mut World) {
    let Some(mut registration) = a_registration(world) else {
        return;
    };
    // Who edits one that can't be read writes a new one.
    let mut spec = registration
        .spec
        .clone()
        .unwrap_or_else(|_| some_spec(world));
    match world.rng.random_range(0..6) {
        0 => set_selector(world, &mut spec),
        1 => set_ports(world, &mut spec),
        2 => set_format(world, &mut spec),
        3 => set_prefix(world, &mut spec),
        4 => set_ttl(world, &mut spec),
        _ => set_other(world, &mut spec),
    }
    fit_schemes(world, &mut spec);
    registration.spec = Ok(spec);
    put(world, registration);
}

fn delete_registration(world: &mut World) {
    if let Some(found) = a_registration(world) {
        let full_name = format!("{}/{}", found.namespace, found.name);
        world.note(|| format!("kube: delete registration {full_name}"));
        world.checks.registration_changes(world.kube.version + 1);
        world.kube.delete_registration(&full_name);
    }
}

fn some_spec(world: &mut World) -> ServiceRegistrationSpec {
    let mut spec = ServiceRegistrationSpec::default();
    set_selector(world, &mut spec);
    set_ports(world, &mut spec);
    set_format(world, &mut spec);
    set_ttl(world, &mut spec);
    if world.rng.random_bool(0.5) {
        set_other(world, &mut spec);
    }
    fit_schemes(world, &mut spec);
    spec
}

/// Some formats are refused without a scheme, or with another one.
fn fit_schemes(world: &World, spec: &mut ServiceRegistrationSpec) {
    if world.knobs.formats.is_empty() {
        return;
    }
    for port in &mut spec.ports {
        let scheme = match (port.protocol, spec.format.type_) {
            (PortProtocol::Tcp, _) => Some("http"),
            (_, FormatType::Apisix) => Some("udp"),
            _ => None,
        };
        port.scheme = scheme.map(str::to_owned);
    }
}

fn suspend(world: &mut World) {
    let Some(mut registration) = a_registration(world) else {
        return;
    };
    if let Ok(spec) = &mut registration.spec {
        spec.suspend = !spec.suspend;
        put(world, registration);
    }
}

/// A spec that a newer version wrote, or one that is refused.
fn spoil(world: &mut World) {
    let Some(mut registration) = a_registration(world) else {
        return;
    };
    if world.rng.random_bool(0.5) {
        registration.spec = Err("unknown variant `Apisix`".into());
    } else if let Ok(spec) = &mut registration.spec {
        // What the API server would refuse today, an older definition may have let through.
        spec.prefix = Some("/registrar/east/".into());
    }
    put(world, registration);
}

/// Puts one spec right that is not served, or all.
pub(crate) fn mend(world: &mut World, all: bool) {
    let broken: Vec<Registration> = world
        .kube
        .registrations
        .values()
        .filter(|found| {
            let suspended = found.spec.as_ref().is_ok_and(|spec| spec.suspend);
            accepted(found, world.policy(0), &world.oracle.settings).is_none() || all && suspended
        })
        .cloned()
        .collect();
    for mut registration in broken {
        match &mut registration.spec {
            Ok(spec) => {
                spec.suspend = false;
                spec.prefix = None;
            }
            Err(_) => registration.spec = Ok(some_spec(world)),
        }
        put(world, registration);
        if !all {
            return;
        }
    }
}

fn set_selector(world: &mut World, spec: &mut ServiceRegistrationSpec) {
    let expression = |operator: &str, values: &[&str]| LabelSelector {
        match_labels: None,
        match_expressions: Some(vec![LabelSelectorRequirement {
            key: "version".into(),
            operator: operator.into(),
            values: (!values.is_empty())
                .then(|| values.iter().map(|value| (*value).to_owned()).collect()),
        }]),
    };
    let labels = |app: &str| LabelSelector {
        match_labels: Some([("app".to_owned(), app.to_owned())].into()),
        match_expressions: None,
    };
    spec.selector = match world.rng.random_range(0..6) {
        0..3 => labels("a"),
        3 => labels("b"),
        4 => expression("NotIn", &["v2"]),
        _ => expression("Exists", &[]),
    };
}

fn set_ports(world: &mut World, spec: &mut ServiceRegistrationSpec) {
    let named = |name: &str| Port {
        name: name.into(),
        ..Port::default()
    };
    let numbered = |name: &str, number| Port {
        port: Some(number),
        ..named(name)
    };
    spec.ports = match world.rng.random_range(0..6) {
        0 | 1 => vec![named("http")],
        2 => vec![numbered("http", 8080)],
        3 => vec![named("http"), named("metrics")],
        4 => vec![numbered("web", 8080), numbered("extra", 9191)],
        _ => vec![Port {
            protocol: PortProtocol::Udp,
            ..named("dns")
        }],
    };
}

fn set_format(world: &mut World, spec: &mut ServiceRegistrationSpec) {
    let mut formats = vec![
        FormatType::Json,
        FormatType::Json,
        FormatType::Plain,
        FormatType::Grpc,
    ];
    formats.extend(world.knobs.formats);
    let type_ = pick(world, &formats);
    spec.format = FormatSpec {
        type_,
        ..FormatSpec::default()
    };
    set_prefix(world, spec);
}

fn set_prefix(world: &mut World, spec: &mut ServiceRegistrationSpec) {
    // Scopes of different formats meet, and one lies in another.
    let prefixes: &[&str] = match spec.format.type_ {
        FormatType::Json => &["", "/services/", "/alt/"],
        FormatType::Plain => &["", "/services/shop/", "/services/shop/web/", "plain/"],
        FormatType::Grpc => &["", "grpc/", "plain/"],
        _ => &[""],
    };
    let prefix = pick(world, prefixes);
    spec.prefix = (!prefix.is_empty()).then(|| prefix.to_owned());
}

fn set_ttl(world: &mut World, spec: &mut ServiceRegistrationSpec) {
    spec.lease_ttl_seconds = pick(world, &[30, 60]);
}

fn set_other(world: &mut World, spec: &mut ServiceRegistrationSpec) {
    match world.rng.random_range(0..6) {
        0 => spec.service = pick(world, &[None, Some("web"), Some("x.y")]).map(str::to_owned),
        1 => spec.weight = pick(world, &[50, 100]),
        2 => {
            spec.metadata = MetadataSpec {
                labels: pick(world, &[None, Some("version")])
                    .map(str::to_owned)
                    .into_iter()
                    .collect(),
                annotations: Vec::new(),
                statics: [("team".to_owned(), pick(world, &["x", "y"]).to_owned())].into(),
            };
        }
        3 => {
            spec.address_families = pick(
                world,
                &[
                    &[][..],
                    &[AddressFamily::IPv4, AddressFamily::IPv6],
                    &[AddressFamily::IPv6],
                ],
            )
            .to_vec();
        }
        4 => spec.address = pick(world, &[Address::Pod, Address::Host]),
        _ => spec.publish_not_ready = !spec.publish_not_ready,
    }
}

// === nodes ===

fn change_node(world: &mut World) {
    let name = pick(world, &NODES);
    if world.kube.nodes.contains_key(name) && world.rng.random_bool(0.3) {
        world.note(|| format!("kube: delete node {name}"));
        return world.kube.delete_node(name);
    }
    let zone = pick(world, &ZONES);
    world.note(|| format!("kube: node {name} is in {zone:?}"));
    world.kube.put_node(Node {
        name: name.into(),
        resource_version: 0,
        zone: zone.into(),
    });
}

// === hands ===

/// Somebody does something to a key in etcd.
pub(crate) fn hand(world: &mut World) {
    let records: Vec<Key> = world
        .etcd
        .all()
        .filter(|kv| is_record(&kv.key))
        .map(|kv| kv.key.clone())
        .collect();
    let own: Vec<Key> = world
        .etcd
        .below(REGISTRAR)
        .into_iter()
        .map(|kv| kv.key)
        .collect();
    let absent: Vec<Key> = world
        .expected()
        .keys()
        .map(|wanted| key(wanted))
        .filter(|wanted| world.etcd.get(wanted).is_none())
        .collect();
    let put = |key: Key| Op::Put(key, HAND.as_bytes().into(), 0);
    let kind = world.rng.random_range(0..6);
    if kind == 5 {
        // `etcdctl lease revoke`: every record on it goes at once.
        let record = one(world, &records);
        let kv = record.and_then(|key| world.etcd.get(&key).cloned());
        if let Some(lease) = kv.map(|kv| kv.lease).filter(|lease| *lease != 0) {
            request_by_hand(world, &Request::Revoke(lease));
        }
        return;
    }
    let op = match kind {
        0 => one(world, &records).map(put),
        1 => one(world, &records).map(Op::Delete),
        2 => one(world, &absent).map(put),
        _ => one(world, &own).map(Op::Delete),
    };
    if let Some(op) = op {
        by_hand(world, op);
    }
}

/// People take away what they wrote.
pub(crate) fn clean_up(world: &mut World) {
    let left: Vec<Key> = world
        .etcd
        .all()
        .filter(|kv| show(&kv.value) == HAND)
        .map(|kv| kv.key.clone())
        .collect();
    for key in left {
        by_hand(world, Op::Delete(key));
    }
}

fn one(world: &mut World, keys: &[Key]) -> Option<Key> {
    if keys.is_empty() {
        return None;
    }
    let at = world.rng.random_range(0..keys.len());
    keys.get(at).cloned()
}

pub(crate) fn by_hand(world: &mut World, op: Op) {
    let request = Request::Txn(Txn {
        then: vec![op],
        ..Txn::default()
    });
    request_by_hand(world, &request);
}

pub(crate) fn request_by_hand(world: &mut World, request: &Request) {
    let now = world.now;
    let done = world.etcd.request(request, now, Author::Hand);
    assert!(done.is_ok() || world.etcd.full, "{done:?}");
    world.after_etcd();
}
