//! API servers that restart, go away or can no longer be reached, and registrations that can't be read.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testbed::{Direction, Operator, Proxy, eventually};

use crate::scene::{
    EAST, LEADER, LONG_TTL, PAST_SHORT_TTL, SHORT_TTL, Scene, endure, leader, others,
    outlive_a_lease, quick, tell, through_kubernetes, wait_leader_after, wait_standbys,
};
use crate::support::{SOON, Stage, Watcher, by_hand, patch};

/// A replica is live for 15 s after the API server answered last, and looks every second.
const NO_LONGER_LIVE: Duration = Duration::from_secs(17);
/// So long may it take until another replica leads when only the leader is cut off from Kubernetes, and something for a
/// busy machine.
const GIVEN_UP: Duration = Duration::from_secs(30);

/// Waits until the operator is live, or no longer. The metric can be a second old, so that the first comes before the fault.
fn wait_live(operator: &Operator, live: f64) {
    eventually(GIVEN_UP, &format!("live to be {live}"), || {
        match operator.metric("etcd_registrar_live", &[]) {
            Ok(now) if now == live => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
}

/// The lists of pods that were begun.
fn lists(operator: &Operator) -> f64 {
    operator
        .metric("etcd_registrar_lists_total", &["resource=\"pods\""])
        .unwrap()
}

/// Starts the API server of a scene again, and changes `web-0` as soon as it takes a change; gives when it had. By hand,
/// since the testbed's controllers come back later than the API server.
fn start_and_change(scene: &Scene, ready: bool) -> Instant {
    let cluster = scene.stage.plane.cluster;
    std::thread::scope(|scope| {
        let start = scope.spawn(|| cluster.start_apiserver());
        let changed = eventually(GIVEN_UP, "the API server to take a change", || {
            scene.stage.try_set_condition("web-0", ready)
        });
        start.join().unwrap().unwrap();
        changed.unwrap()
    })
}

#[test]
fn an_api_server_that_restarts_or_has_forgotten_the_past_is_listed_anew() {
    let stage = Stage::new("api-restart");
    let operator = quick(stage.operator(EAST)).start().unwrap();
    // It is frozen for longer than it takes to start an API server: no lease ends meanwhile.
    let scene = Scene::new(stage, LONG_TTL);
    let watcher = scene.watch();
    let cluster = scene.stage.plane.cluster;
    scene
        .stage
        .patch_pod("web-0", &json!({"metadata": by_hand(true)}));
    cluster.kill_apiserver().unwrap();
    let ended = start_and_change(&scene, false);
    let recovered = scene.recovered(&watcher, 0, false, ended);
    let seen = watcher.seen();
    assert_eq!(seen.len(), 1, "{seen:#?}");
    tell("API server restarted", 0, recovered);

    // The versions that the operator knows are compacted, and the API server that remembered them is gone: 410 Gone.
    watcher.forget();
    let before = lists(&operator);
    operator.freeze().unwrap();
    scene.stage.set_condition("web-0", true);
    cluster.kill_apiserver().unwrap();
    let etcd = cluster.etcd().unwrap();
    // Newer than all that the connection of the operator may still hold for it.
    etcd.etcdctl(&["put", "/others/key", "value"]).unwrap();
    let status = etcd
        .etcdctl(&["endpoint", "status", "--write-out=json"])
        .unwrap();
    let status: Value = serde_json::from_str(&status).unwrap();
    let revision = status[0]["Status"]["header"]["revision"].to_string();
    etcd.etcdctl(&["compact", &revision]).unwrap();
    cluster.start_apiserver().unwrap();
    let ended = Instant::now();
    operator.thaw().unwrap();
    let recovered = scene.recovered(&watcher, 0, true, ended);
    eventually(SOON, "the pods to be listed anew", || {
        match lists(&operator) {
            now if now > before => Ok(()),
            now => Err(now),
        }
    })
    .unwrap();
    let seen = watcher.seen();
    assert_eq!(seen.len(), 1, "{seen:#?}");
    tell("watch of Kubernetes answered with 410 Gone", 0, recovered);
    scene.turn(&watcher, 1);
}

#[test]
fn an_api_server_that_is_away_changes_nothing() {
    let stage = Stage::new("api-away");
    let operator = quick(stage.operator(EAST)).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let watcher = scene.watch();
    let cluster = scene.stage.plane.cluster;
    scene
        .stage
        .patch_pod("web-0", &json!({"metadata": by_hand(true)}));
    wait_live(&operator, 1.0);
    cluster.kill_apiserver().unwrap();
    wait_live(&operator, 0.0);
    outlive_a_lease(&scene.stage, SHORT_TTL);
    let silence = operator
        .metric("etcd_registrar_kubernetes_silence_seconds", &[])
        .unwrap();
    assert!(silence >= NO_LONGER_LIVE.as_secs_f64(), "{silence}");
    watcher.assert_silent("without an API server");
    let ended = start_and_change(&scene, false);
    let recovered = scene.recovered(&watcher, 0, false, ended);
    let seen = watcher.seen();
    assert_eq!(seen.len(), 1, "{seen:#?}");
    tell(
        "API server away",
        others(&seen, &scene.keys[0]).len(),
        recovered,
    );
}

#[test]
fn without_an_api_server_for_longer_than_max_staleness_the_leases_end() {
    const STALENESS: Duration = Duration::from_secs(5);
    // How long a replica is live without an answer, less one between two of its looks.
    const LIVE: Duration = Duration::from_secs(13);
    let stage = Stage::new("max-staleness");
    let operator = quick(stage.operator(EAST))
        .args(["--max-staleness", "5s"])
        .start()
        .unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    // The same pods under another name, by an operator that keeps them for ever.
    let other = quick(scene.stage.operator("west")).start().unwrap();
    let scope = scene.stage.scope("web");
    scene.stage.wait_count(&format!("{scope}west/"), 3);
    let watcher = scene.watch();
    let cluster = scene.stage.plane.cluster;
    for operator in [&operator, &other] {
        wait_live(operator, 1.0);
    }
    let begun = Instant::now();
    cluster.kill_apiserver().unwrap();
    wait_live(&operator, 0.0);
    let ended: Vec<Duration> = (scene.keys.iter())
        .map(|key| {
            let seen = watcher.wait("the lease to end", |seen| seen.key == *key);
            assert!(seen.put.is_none(), "{seen:#?}");
            seen.at - begun
        })
        .collect();
    // Kept alive until then, a lease lasts for two thirds of its TTL at least.
    let kept = LIVE + STALENESS + Duration::from_secs(SHORT_TTL * 2 / 3);
    assert!(ended.iter().all(|ended| *ended >= kept), "{ended:?}");
    assert!(operator.log().contains("--max-staleness"));
    wait_live(&other, 0.0);
    outlive_a_lease(&scene.stage, SHORT_TTL);
    let seen = watcher.seen();
    assert_eq!(seen.len(), 3, "{seen:#?}");
    println!("--max-staleness 5s: leases ended {ended:?} after the API server was killed");

    cluster.start_apiserver().unwrap();
    let back = Instant::now();
    let put = |key: &str| {
        watcher
            .wait("the record to be back", |seen| {
                seen.key == key && seen.put.is_some()
            })
            .at
    };
    let recovered = (scene.keys.iter())
        .map(|key| put(key).saturating_duration_since(back))
        .max()
        .unwrap_or_default();
    let seen = watcher.seen();
    assert_eq!(seen.len(), 6, "{seen:#?}");
    assert!(seen.iter().all(|seen| scene.keys.contains(&seen.key)));
    for key in &scene.keys {
        let record = scene.stage.registry.get(key).unwrap();
        assert!(scene.stage.registry.ttl(record.lease).1 > 0, "{record:#?}");
    }
    tell(
        "API server away for longer than --max-staleness",
        0,
        recovered,
    );
}

#[test]
fn an_operator_that_restarts_without_an_api_server_keeps_the_leases_alive() {
    let stage = Stage::new("restart-away");
    let proxy = Proxy::start(stage.plane.cluster.apiserver_port().unwrap()).unwrap();
    let operator = quick(through_kubernetes(&stage, &proxy)).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let watcher = scene.watch();
    proxy.refuse(true);
    proxy.reset();
    operator.kill().unwrap();
    operator.process().start().unwrap();
    for _ in 0..2 {
        outlive_a_lease(&scene.stage, SHORT_TTL);
    }
    watcher.assert_silent("after a restart without an API server");
    scene.set_ready(0, false);
    let ended = Instant::now();
    proxy.refuse(false);
    let recovered = scene.recovered(&watcher, 0, false, ended);
    let seen = watcher.seen();
    assert_eq!(seen.len(), 1, "{seen:#?}");
    tell("API server away, and the operator restarted", 0, recovered);
}

#[test]
fn a_running_leader_without_an_api_server_puts_back_what_it_had_confirmed() {
    let stage = Stage::new("expired-away");
    let proxy = Proxy::start(stage.plane.cluster.apiserver_port().unwrap()).unwrap();
    // The term outlives the leases of the records.
    let builder = through_kubernetes(&stage, &proxy).election_ttl("60s");
    let operator = builder.start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let watcher = scene.watch();
    wait_live(&operator, 1.0);
    proxy.refuse(true);
    proxy.reset();
    wait_live(&operator, 0.0);
    scene.stage.etcd.freeze().unwrap();
    endure(PAST_SHORT_TTL, &[&operator]);
    let ended = Instant::now();
    scene.stage.etcd.thaw().unwrap();
    let removed = |key: &str| {
        watcher
            .seen()
            .iter()
            .any(|seen| seen.key == key && seen.put.is_none())
    };
    let recovered = scene.recovered_all(&watcher, ended);
    assert!(
        scene.keys.iter().all(|key| removed(key)),
        "nothing had ended"
    );
    scene.assert_leases_live();
    tell(
        "API server away, and etcd frozen past the TTL",
        watcher.seen().len(),
        recovered,
    );

    // The term goes with the data. Only a live replica may be elected, so that the rest waits for the API server.
    let etcd = &scene.stage.etcd;
    let scope = scene.stage.scope("web");
    drop(watcher);
    etcd.stop().unwrap();
    etcd.wipe().unwrap();
    etcd.start().unwrap();
    let registry = crate::support::Registry::connect(etcd);
    let watcher = Watcher::after(registry, &scope, 1);
    let ended = Instant::now();
    proxy.refuse(false);
    scene.wait_pods(&[0, 1, 2]);
    let recovered = scene.recovered_all(&watcher, ended);
    let seen = watcher.seen();
    assert_eq!(seen.len(), 3, "{seen:#?}");
    tell("API server away, and etcd wiped", seen.len(), recovered);
}

#[test]
fn a_leader_that_alone_is_cut_off_from_kubernetes_gives_way() {
    let stage = Stage::new("cut-off");
    let proxy = Proxy::start(stage.plane.cluster.apiserver_port().unwrap()).unwrap();
    let first = quick(through_kubernetes(&stage, &proxy)).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let stage = &scene.stage;
    let _second = quick(stage.operator(EAST)).start().unwrap();
    wait_standbys(&stage.registry, 1);
    let watcher = scene.watch();
    let elections = Watcher::start(&stage.etcd, LEADER);
    let old = leader(&stage.registry);
    wait_live(&first, 1.0);
    let begun = Instant::now();
    proxy.black_hole();
    scene.set_ready(0, false);
    wait_live(&first, 0.0);
    let took = wait_leader_after(&elections, &old)
        .at
        .saturating_duration_since(begun);
    let recovered = scene.recovered(&watcher, 0, false, begun);
    assert!(took < GIVEN_UP, "{took:?}");
    let seen = watcher.seen();
    assert_eq!(seen.len(), 1, "{seen:#?}");
    tell("only the leader cut off from Kubernetes", 0, recovered);
    // It is a standby again once it is live.
    proxy.heal();
    wait_standbys(&stage.registry, 1);
}

#[test]
fn a_new_leader_that_knows_less_brings_nothing_back_and_takes_nothing_away() {
    let stage = Stage::new("older-view");
    let first = quick(stage.operator(EAST)).start().unwrap();
    let scene = Scene::new(stage, LONG_TTL);
    let stage = &scene.stage;
    let proxy = Proxy::start(stage.plane.cluster.apiserver_port().unwrap()).unwrap();
    let _second = quick(through_kubernetes(stage, &proxy)).start().unwrap();
    wait_standbys(&stage.registry, 1);
    let watcher = scene.watch();
    let elections = Watcher::start(&stage.etcd, LEADER);
    let old = leader(&stage.registry);
    // What the standby learns is old: a pod has come, and another has left. In this order, for it not to get its address.
    proxy.delay(Direction::ToClient, Duration::from_secs(3));
    stage.create_pod("web-3", "web", &json!({}), &json!({}));
    let new = crate::scene::key(stage, "web-3");
    watcher.wait("the new pod", |seen| seen.key == new && seen.put.is_some());
    let begun = Instant::now();
    stage.delete_pod("web-0");
    scene.recovered(&watcher, 0, false, begun);
    first.stop().unwrap();
    let ended = wait_leader_after(&elections, &old).at;
    // A change after those is the first that the new leader may write.
    scene.set_ready(1, false);
    let recovered = scene.recovered(&watcher, 1, false, ended);
    let seen = watcher.seen();
    let changes: Vec<(&str, bool)> = seen
        .iter()
        .map(|seen| (seen.key.as_str(), seen.put.is_some()))
        .collect();
    assert_eq!(seen.len(), 3, "{seen:#?}");
    assert!(
        !changes.contains(&(scene.keys[0].as_str(), true)),
        "{seen:#?}"
    );
    assert!(!changes.contains(&(new.as_str(), false)), "{seen:#?}");
    tell(
        "a new leader whose view of Kubernetes is older",
        0,
        recovered,
    );
}

#[test]
fn nodes_that_are_seen_later_than_pods_cost_no_record_its_zone() {
    let stage = Stage::new("late-nodes");
    let operator = quick(stage.operator(EAST)).start().unwrap();
    let scene = Scene::new(stage, LONG_TTL);
    let stage = &scene.stage;
    let before = scene.records();
    assert!(before.iter().all(|record| record.json()["zone"] != ""));
    let watcher = scene.watch();
    operator.kill().unwrap();
    // Another one, which may list everything but the nodes.
    let kubeconfig = crate::support::without(stage, "no-nodes", "nodes", &["list", "watch"]);
    let late = quick(
        Operator::builder(crate::support::BINARY, EAST)
            .kubeconfig(&kubeconfig)
            .etcd(&stage.etcd),
    )
    .spawn()
    .unwrap();
    eventually(SOON, "the other watches to be complete", || {
        let answer = late.get("/readyz").map_err(|error| error.to_string())?;
        if answer.body.contains("nodes") && !answer.body.contains("pods") {
            Ok(())
        } else {
            Err(answer.body)
        }
    })
    .unwrap();
    outlive_a_lease(stage, SHORT_TTL);
    watcher.assert_silent("without the nodes");
    let ended = Instant::now();
    stage.bind_operator_role("nodes", "no-nodes");
    late.wait_ready().unwrap();
    scene.set_ready(0, false);
    let recovered = scene.recovered(&watcher, 0, false, ended);
    let seen = watcher.seen();
    assert_eq!(seen.len(), 1, "{seen:#?}");
    let zones = |number: usize| {
        let of = |records: Vec<crate::support::Record>| {
            let found = records.into_iter().find(|r| r.key == scene.keys[number]);
            found.unwrap().json()["zone"].clone()
        };
        (of(before.clone()), of(scene.records()))
    };
    for number in [1, 2] {
        let (then, now) = zones(number);
        assert_eq!(then, now);
    }
    tell("Nodes seen later than pods", 0, recovered);
}

#[test]
fn a_registration_that_a_newer_version_wrote_keeps_its_records() {
    let stage = Stage::new("rolled-back");
    let operator = quick(stage.operator(EAST)).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let stage = &scene.stage;
    let watcher = scene.watch();
    // A newer version's definition lets a format pass that this one does not know.
    let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/serviceregistrations.etcd-registrar.io";
    let cluster = stage.plane.cluster;
    let text = cluster.request("GET", path, "").unwrap().ok().unwrap();
    let mut newer: Value = serde_json::from_str(&text).unwrap();
    let known = "/schema/openAPIV3Schema/properties/spec/properties/format/properties/type/enum";
    let formats = newer["spec"]["versions"][0].pointer_mut(known).unwrap();
    formats.as_array_mut().unwrap().push("Newer".into());
    patch(cluster, path, &json!({"spec": newer["spec"]}));
    let format = json!({"format": {"type": "Newer"}});
    eventually(SOON, "the newer definition to be in force", || {
        let body = json!({"spec": format}).to_string();
        let target = format!(
            "/apis/etcd-registrar.io/v1alpha1/namespaces/{}/serviceregistrations/web",
            stage.namespace
        );
        cluster
            .patch(&target, &body)
            .map_err(|error| error.to_string())?
            .ok()
            .map(drop)
    })
    .unwrap();

    let said = stage.wait_condition("web", "Accepted", "False", "Unreadable");
    assert!(said.contains("Newer"), "{said}");
    // Also with a start in between, and for longer than the leases live by themselves.
    operator.restart().unwrap();
    stage.set_ready("web-0", false);
    outlive_a_lease(stage, SHORT_TTL);
    watcher.assert_silent("for a registration that can't be read");
    stage.set_ready("web-0", true);
    stage.wait_ready("web-0");
    let ended = Instant::now();
    stage.change("web", &json!({"format": {"type": "Json"}}));
    stage.wait_condition("web", "Ready", "True", "Registered");
    let recovered = ended.elapsed();
    watcher.assert_silent("after it can be read again");
    scene.turn(&watcher, 0);
    stage.plane.apply_deploy();
    tell("a registration that this version can't read", 0, recovered);
}
