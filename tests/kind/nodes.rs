//! Nodes, control planes, members of etcd and networks that go and come back.

use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use testbed::eventually;

use crate::watcher::Seen;
use crate::workload::a_pod;
use crate::world::{LONG, SHOP, TTL, World, run};

/// Nothing was seen after a position.
#[track_caller]
pub(crate) fn assert_silent(world: &World, position: usize, when: &str) {
    let events = world.watcher.since(position);
    assert!(events.is_empty(), "{when}: {events:#?}");
}

/// The keys in `east` of the pods on a node that are not on their way out.
fn on_node(world: &World, node: &str) -> Vec<String> {
    let selector = format!("--field-selector=spec.nodeName={node}");
    let pods = world.get("east", &["pods", "-n", SHOP, &selector]);
    let pods = pods["items"].as_array().unwrap();
    pods.iter()
        .filter(|pod| stays(pod))
        .map(|pod| {
            let ip = pod["status"]["podIP"].as_str().unwrap();
            let app = pod["metadata"]["labels"]["app"].as_str().unwrap();
            format!("/services/{SHOP}/{app}/east/{ip}:8080")
        })
        .collect()
}

/// Whether a pod is not on its way out.
pub(crate) fn stays(pod: &Value) -> bool {
    pod["metadata"]["deletionTimestamp"].is_null()
}

fn settle(world: &World) -> usize {
    world.rollout("east", SHOP, "deploy/web");
    world.rollout("east", SHOP, "sts/db");
    world.rollout("east", crate::world::HOME, "deploy/etcd-registrar");
    world.settled("east", "web", 4);
    world.settled("east", "db", 2);
    world.watcher.position()
}

/// Lets evictions take no more than all but so many pods of `web`.
fn budget(world: &World, least: usize) {
    let budget = format!(
        "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {{name: web, namespace: {SHOP}}}\n\
         spec: {{minAvailable: {least}, selector: {{matchLabels: {{app: web}}}}}}\n"
    );
    world.apply("east", "budget", &budget);
}

/// One pod is evicted: not while its PodDisruptionBudget forbids it, and at once when it no longer does.
pub(crate) fn evicted(world: &World) {
    budget(world, 4);
    let from = settle(world);
    let (name, _, key) = a_pod(world);
    let eviction = serde_json::json!({
        "apiVersion": "policy/v1", "kind": "Eviction",
        "metadata": {"name": name, "namespace": SHOP},
    });
    let file = world.folder.join("eviction.json");
    std::fs::write(&file, eviction.to_string()).unwrap();
    let path = format!("/api/v1/namespaces/{SHOP}/pods/{name}/eviction");
    let args = ["create", "--raw", &path, "-f", file.to_str().unwrap()];
    // Until the controller has seen the budget, the refusal has another reason.
    eventually(LONG, "the eviction to be refused", || {
        match world.try_kubectl("east", &args) {
            Err(said) if said.contains("would violate the pod's disruption budget") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
    assert_silent(world, from, "an eviction was refused");
    budget(world, 3);
    eventually(LONG, "the eviction to be accepted", || {
        world.try_kubectl("east", &args)
    })
    .unwrap();
    let accepted = SystemTime::now();
    let gone = world.watcher.wait(from, &key, false);
    world.settled("east", "web", 4);
    let events = world.watcher.since(from);
    // The new pod may have the address of the old one.
    assert_eq!(events.len(), 2, "{events:#?}");
    assert!(!events[0].put && events[1].put, "{events:#?}");
    // The operator may be told before kubectl is.
    let delay = gone.at.duration_since(accepted).unwrap_or_default();
    world.note(&format!(
        "refused while the budget forbids it: no event; then its endpoint was gone {:.0} ms after kubectl was told; never below 3 of 4",
        delay.as_secs_f64() * 1000.0
    ));
}

/// A node is drained, as a PodDisruptionBudget allows.
pub(crate) fn drain(world: &World) {
    budget(world, 3);
    let from = settle(world);
    let stay = on_node(world, "east-worker");
    let began = Instant::now();
    world.kubectl(
        "east",
        &[
            "drain",
            "east-worker2",
            "--ignore-daemonsets",
            "--delete-emptydir-data",
            "--timeout=170s",
        ],
    );
    world.settled("east", "web", 4);
    world.settled("east", "db", 2);
    let events = world.watcher.since(from);
    let touched: Vec<&Seen> = events
        .iter()
        .filter(|event| stay.contains(&event.key))
        .collect();
    assert!(touched.is_empty(), "{touched:#?}");
    let least = crate::workload::fewest(4, &events, &format!("/services/{SHOP}/web/east/"));
    assert!(least >= 3, "{least}: {events:#?}");
    world.kubectl("east", &["uncordon", "east-worker2"]);
    world.note(&format!(
        "drained in {:.0} s; {} events, none on the {} pods that stayed; never below {least} of 4",
        began.elapsed().as_secs_f64(),
        events.len(),
        stay.len()
    ));
    // Both nodes have pods again, for the steps after this.
    world.kubectl("east", &["rollout", "restart", "deploy/web", "-n", SHOP]);
    world.kubectl(
        "east",
        &[
            "rollout",
            "restart",
            "deploy/etcd-registrar",
            "-n",
            crate::world::HOME,
        ],
    );
    settle(world);
}

/// A worker stops, with its kubelet and its pods, and comes back.
pub(crate) fn worker_stopped(world: &World) {
    let from = settle(world);
    let (lost, stay) = (
        on_node(world, "east-worker"),
        on_node(world, "east-worker2"),
    );
    assert!(!lost.is_empty() && !stay.is_empty(), "{lost:?} {stay:?}");
    let began = Instant::now();
    run("docker", &["stop", "east-worker"]);
    let gone = eventually(LONG, "the endpoints of the node to go", || {
        let keys = world.registry.keys(&format!("/services/{SHOP}/"))?;
        if lost.iter().any(|key| keys.contains(key)) {
            Err(format!("{keys:?}"))
        } else {
            Ok(began.elapsed())
        }
    })
    .unwrap();
    run("docker", &["start", "east-worker"]);
    eventually(LONG, "the node to be back", || {
        let ready = world.try_kubectl(
            "east",
            &[
                "wait",
                "--for=condition=Ready",
                "node/east-worker",
                "--timeout=5s",
            ],
        )?;
        Ok::<_, String>(ready)
    })
    .unwrap();
    let back = began.elapsed();
    settle(world);
    let events = world.watcher.since(from);
    let healthy: Vec<&Seen> = events
        .iter()
        .filter(|event| stay.contains(&event.key))
        .collect();
    assert!(healthy.is_empty(), "{healthy:#?}");
    world.note(&format!(
        "{} endpoints gone {:.0} s after the stop, the node back after {:.0} s; no event on the {} others",
        lost.len(),
        gone.as_secs_f64(),
        back.as_secs_f64(),
        stay.len()
    ));
}

/// The API server, its etcd, scheduler and controllers restart; no reader sees it.
pub(crate) fn control_plane_restarted(world: &World) {
    let from = settle(world);
    let began = Instant::now();
    run("docker", &["restart", "east-control-plane"]);
    eventually(LONG, "the API server to be back", || {
        world.try_kubectl("east", &["get", "--raw", "/readyz"])
    })
    .unwrap();
    let back = began.elapsed();
    // A node's lease is renewed every 10 s; what it would do to pods shows within the TTL.
    sleep(Duration::from_secs(TTL));
    assert_silent(world, from, "the control plane was restarted");
    world.kubectl("east", &["scale", "deploy/web", "-n", SHOP, "--replicas=5"]);
    world.settled("east", "web", 5);
    world.kubectl("east", &["scale", "deploy/web", "-n", SHOP, "--replicas=4"]);
    settle(world);
    world.note(&format!(
        "API server back after {:.0} s; no event until the next change, which got through",
        back.as_secs_f64()
    ));
}

/// One of three members stops and comes back.
pub(crate) fn etcd_member_stopped(world: &World) {
    let from = settle(world);
    let member = crate::world::members()[0];
    run("docker", &["stop", "--time", "2", member]);
    // A lease that nobody keeps alive any more would have ended by then, and its end been seen.
    sleep(Duration::from_secs(TTL + 5));
    assert_silent(world, from, "a member of etcd is stopped");
    world.kubectl("east", &["scale", "deploy/web", "-n", SHOP, "--replicas=5"]);
    world.settled("east", "web", 5);
    run("docker", &["start", member]);
    world.kubectl("east", &["scale", "deploy/web", "-n", SHOP, "--replicas=4"]);
    settle(world);
    world.note(&format!(
        "stopped for {} s: no event; a change meanwhile got through",
        TTL + 5
    ));
}

/// The network between `west` and etcd is cut, for less than a TTL and for more.
pub(crate) fn network_cut(world: &World) {
    world.apply(
        "west",
        "web",
        &crate::workload::manifest("Deployment", "web", 2),
    );
    world.settled("west", "web", 2);
    let from = settle(world);
    let cut = |chain: &str| {
        for member in crate::world::members() {
            let address = World::address(member);
            run(
                "docker",
                &[
                    "exec",
                    "west-control-plane",
                    "iptables",
                    chain,
                    "FORWARD",
                    "-d",
                    &address,
                    "-j",
                    "DROP",
                ],
            );
        }
    };
    // The replicas keep leases alive at a third of their TTL.
    cut("-I");
    sleep(Duration::from_secs(TTL / 3));
    cut("-D");
    // What was not kept alive in time would end by then.
    sleep(Duration::from_secs(TTL));
    assert_silent(world, from, "the network was cut for a third of the TTL");
    cut("-I");
    let began = Instant::now();
    let prefix = format!("/services/{SHOP}/web/west/");
    eventually(LONG, "the endpoints of west to end", || {
        match world.registry.keys(&prefix)?.len() {
            0 => Ok(()),
            n => Err(format!("{n} stand")),
        }
    })
    .unwrap();
    let ended = began.elapsed();
    cut("-D");
    let healed = Instant::now();
    world.settled("west", "web", 2);
    let back = healed.elapsed();
    let events = world.watcher.since(from);
    let others: Vec<&Seen> = events
        .iter()
        .filter(|event| !event.key.starts_with(&prefix))
        .collect();
    assert!(others.is_empty(), "{others:#?}");
    world.note(&format!(
        "cut for {} s: no event; cut for good: gone after {:.0} s (TTL {TTL} s), back {:.1} s after the cut; no event of east",
        TTL / 3,
        ended.as_secs_f64(),
        back.as_secs_f64()
    ));
}
