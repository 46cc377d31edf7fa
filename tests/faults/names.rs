//! Two clusters with one name, and what is deleted while etcd is away.

use std::time::{Duration, Instant};

use serde_json::json;
use testbed::{Operator, eventually};

use crate::scene::{EAST, PAST_SHORT_TTL, SHORT_TTL, Scene, endure, quick, tell};
use crate::support::{A_SECOND, SOON, Stage, Watcher, deployment, registration};

/// Longer than the lease of `owner`, 60 s, and etcd's own delay in ending leases.
const PAST_EVERY_TTL: Duration = Duration::from_secs(64);

/// One registration with one pod, in each cluster.
fn populate(stages: [&Stage; 2]) {
    for stage in stages {
        stage.register("web", &json!({"leaseTTLSeconds": SHORT_TTL}));
        stage.create_pod("web-0", "web", &json!({}), &json!({}));
        stage.wait_ready("web-0");
    }
}

/// Waits until one of two operators has ended by itself; gives the stages of the one that works and of the other.
fn one_ends<'a>(both: [(&'a Stage, &Operator); 2]) -> (&'a Stage, &'a Stage) {
    let [(first, one), (second, other)] = both;
    let (works, ended, gone) = eventually(SOON, "one of both to end", || {
        match (one.process().is_running(), other.process().is_running()) {
            (true, false) => Ok((first, second, other)),
            (false, true) => Ok((second, first, one)),
            running => Err(format!("{running:?}")),
        }
    })
    .unwrap();
    let status = gone.process().exit_status().unwrap();
    let log = gone.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains(&works.plane.uid()), "{log}");
    (works, ended)
}

/// Exactly the one cluster's pod is registered, and it stays so.
fn only(works: &Stage, watcher: &Watcher) {
    let record = works.wait_count(&works.scope("web"), 1).remove(0);
    assert_eq!(record.json()["host"], works.pod_address("web-0").as_str());
    let owner = works.registry.get("/registrar/east/owner").unwrap();
    assert_eq!(owner.value, works.plane.uid());
    let foreign: Vec<_> = watcher
        .seen()
        .into_iter()
        .filter(|seen| seen.put.is_some() && seen.key != record.key)
        .collect();
    assert!(foreign.is_empty(), "{foreign:#?}");
}

#[test]
fn of_two_clusters_that_start_with_one_name_at_the_same_moment_one_works() {
    let (east, other) = Stage::pair("same-moment");
    populate([&east, &other]);
    let watcher = Watcher::start(&east.etcd, "/services/");
    // Both wait for etcd, and find it at the same moment.
    east.etcd.freeze().unwrap();
    let one = quick(east.operator(EAST)).spawn().unwrap();
    let two = quick(other.operator(EAST)).spawn().unwrap();
    for operator in [&one, &two] {
        eventually(SOON, "the operator to look for etcd", || {
            match operator.log().contains("etcd can't be reached") {
                true => Ok(()),
                false => Err(operator.log()),
            }
        })
        .unwrap();
    }
    let ended = Instant::now();
    east.etcd.thaw().unwrap();
    let (works, _) = one_ends([(&east, &one), (&other, &two)]);
    only(works, &watcher);
    let seen = watcher.seen();
    assert_eq!(seen.len(), 1, "{seen:#?}");
    tell(
        "two clusters start with one name at the same moment",
        0,
        seen[0].at.saturating_duration_since(ended),
    );
}

#[test]
fn of_two_clusters_with_one_name_one_works_after_etcd_stood_still_past_every_ttl() {
    let (east, other) = Stage::pair("all-expired");
    populate([&east, &other]);
    let one = quick(east.operator(EAST)).start().unwrap();
    east.wait_count(&east.scope("web"), 1);
    let watcher = Watcher::start(&east.etcd, "/services/");
    east.etcd.freeze().unwrap();
    let two = quick(other.operator(EAST)).spawn().unwrap();
    endure(PAST_EVERY_TTL, &[&one, &two]);
    let ended = Instant::now();
    east.etcd.thaw().unwrap();
    let (works, _) = one_ends([(&east, &one), (&other, &two)]);
    works.wait_condition("web", "Ready", "True", "Registered");
    only(works, &watcher);
    let seen = watcher.seen();
    let last = seen.last().map_or(ended, |seen| seen.at);
    tell(
        "two clusters with one name after etcd was frozen past every TTL",
        seen.len(),
        last.saturating_duration_since(ended),
    );
}

#[test]
fn what_is_deleted_while_etcd_is_away_waits_for_nobody_and_leaves_when_it_is_back() {
    let stage = Stage::new("deleted");
    let operator = quick(stage.operator(EAST)).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let stage = &scene.stage;
    let cluster = stage.plane.cluster;
    let namespace = cluster.new_namespace("deleted-namespace").unwrap();
    for object in [
        deployment("api", 2),
        registration("api", &json!({"leaseTTLSeconds": SHORT_TTL})),
        deployment("gone", 1),
    ] {
        let apply = ["-n", &namespace, "apply", "-f", "-"];
        cluster.kubectl_input(&apply, &object.to_string()).unwrap();
    }
    stage.wait_count(&format!("/services/{namespace}/api/"), 2);
    stage.create_pod("cart-0", "cart", &json!({}), &json!({}));
    stage.register("cart", &json!({"leaseTTLSeconds": SHORT_TTL}));
    let cart = stage.scope("cart");
    stage.wait_count(&cart, 1);
    let watcher = Watcher::start(&stage.etcd, "/services/");

    stage.etcd.stop().unwrap();
    let begun = Instant::now();
    stage.kubectl(&["delete", "sreg", "cart", "--timeout=20s"]);
    let delete = ["delete", "namespace", &namespace, "--timeout=60s"];
    cluster.kubectl(&delete).unwrap();
    println!("faults: deleted without etcd in {:?}", begun.elapsed());
    endure(PAST_SHORT_TTL, &[&operator]);
    let ended = Instant::now();
    stage.etcd.start().unwrap();
    let back = Instant::now();
    eventually(SOON, "the keys to go", || {
        let left = stage
            .registry
            .try_list(&format!("/services/{namespace}/"))?;
        match left.len() + stage.registry.try_list(&cart)?.len() {
            0 => Ok(()),
            left => Err(format!("{left} keys")),
        }
    })
    .unwrap();
    let seen = watcher.seen();
    assert_eq!(seen.len(), 3, "{seen:#?}");
    let last = seen.last().unwrap().at;
    assert!(last.saturating_duration_since(back) < A_SECOND, "{seen:#?}");
    let recovered = last.saturating_duration_since(ended);
    let unchanged = seen
        .iter()
        .filter(|seen| scene.keys.contains(&seen.key))
        .count();
    assert_eq!(unchanged, 0);
    scene.wait_pods(&[0, 1, 2]);
    tell(
        "namespace and registration deleted while etcd was down",
        unchanged,
        recovered,
    );
}
