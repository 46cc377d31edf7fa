//! Operators that are killed, stopped and replaced, or that were away while something was deleted.

use std::time::{Duration, Instant};

use serde_json::json;
use testbed::{Operator, eventually};

use crate::support::{SOON, Stage, Watcher, keys, tell};

const LEADER: &str = "/registrar/east/leader";

/// Three pods `web-0` to `web-2`, registered; gives their keys.
fn three_registered(stage: &Stage) -> Vec<String> {
    stage.register("web", &json!({}));
    for name in ["web-0", "web-1", "web-2"] {
        stage.create_pod(name, "web", &json!({}), &json!({}));
    }
    let wanted: Vec<String> = ["web-0", "web-1", "web-2"]
        .iter()
        .map(|name| key(stage, name))
        .collect();
    stage.wait_keys(&stage.scope("web"), &wanted);
    wanted
}

fn key(stage: &Stage, pod: &str) -> String {
    format!(
        "{}east/{}:8080",
        stage.scope("web"),
        stage.wait_ready(pod)[0]
    )
}

fn leader(stage: &Stage) -> String {
    eventually(SOON, "a leader", || {
        stage.registry.get(LEADER).ok_or("no leader key")
    })
    .unwrap()
    .value
}

/// Waits until a second replica is live and waits for its turn.
fn wait_standby(stage: &Stage) {
    eventually(SOON, "a standby", || {
        match stage.registry.list("/registrar/east/waiting/").len() {
            1 => Ok(()),
            n => Err(format!("{n} wait")),
        }
    })
    .unwrap();
}

/// Waits for the first leader after `old` and gives when it was elected.
fn wait_leader_after(watcher: &Watcher, old: &str) -> Instant {
    watcher
        .wait("another leader", |seen| {
            seen.key == LEADER && seen.put.as_ref().is_some_and(|put| put.value != old)
        })
        .at
}

/// Makes a pod not ready and ready again, and checks that nothing else happens.
fn turn(stage: &Stage, watcher: &Watcher, pod: &str, key: &str) {
    stage.set_ready(pod, false);
    watcher.wait("the removal", |seen| seen.key == key && seen.put.is_none());
    stage.set_ready(pod, true);
    watcher.wait("the return", |seen| seen.key == key && seen.put.is_some());
    let seen = watcher.seen();
    assert!(
        seen.len() == 2 && seen.iter().all(|seen| seen.key == key),
        "{seen:#?}"
    );
    watcher.forget();
}

#[test]
fn a_killed_operator_comes_back_and_only_what_changed_meanwhile_is_seen() {
    let stage = Stage::new("killed");
    let operator = stage.operator("east").election_ttl("2s").start().unwrap();
    let wanted = three_registered(&stage);
    let before = stage.registry.list(&stage.scope("web"));
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));

    operator.kill().unwrap();
    operator.start().unwrap();
    let first = leader(&stage);
    eventually(SOON, "the restarted operator to lead", || {
        let now = leader(&stage);
        match operator.metric("etcd_registrar_leader", &[]) {
            Ok(1.0) => Ok(now),
            other => Err(format!("{first} {now} {other:?}")),
        }
    })
    .unwrap();
    watcher.assert_silent("after SIGKILL and a restart");
    assert_eq!(stage.registry.list(&stage.scope("web")), before);
    turn(&stage, &watcher, "web-1", &wanted[1]);

    // What changes while it is away is all that happens when it is back.
    operator.kill().unwrap();
    stage.set_ready("web-0", false);
    stage.create_pod("web-3", "web", &json!({}), &json!({}));
    let new = key(&stage, "web-3");
    let started = Instant::now();
    operator.start().unwrap();
    let mut now = vec![wanted[1].clone(), wanted[2].clone(), new.clone()];
    now.sort();
    stage.wait_keys(&stage.scope("web"), &now);
    let seen = watcher.seen();
    let first = seen.first().map_or(started, |seen| seen.at);
    let changed: Vec<(String, bool)> = seen
        .into_iter()
        .map(|seen| (seen.key, seen.put.is_some()))
        .collect();
    assert_eq!(changed.len(), 2, "{changed:?}");
    assert!(changed.contains(&(wanted[0].clone(), false)), "{changed:?}");
    assert!(changed.contains(&(new, true)), "{changed:?}");
    tell(
        "operator killed and restarted",
        changed.len() - 2,
        first.saturating_duration_since(started),
    );
}

#[test]
fn a_standby_takes_over_after_sigterm_and_after_sigkill_without_an_event() {
    let stage = Stage::new("standby");
    let start = || -> Operator { stage.operator("east").election_ttl("2s").start().unwrap() };
    let first = start();
    let wanted = three_registered(&stage);
    let second = start();
    wait_standby(&stage);
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));
    let elections = Watcher::start(&stage.etcd, LEADER);
    let before = stage.registry.list(&stage.scope("web"));

    let old = leader(&stage);
    let stopped = Instant::now();
    first.stop().unwrap();
    let took = wait_leader_after(&elections, &old) - stopped;
    println!("SIGTERM: another leader after {took:?}");
    // 0.5 s (design, section 10) and room for a busy machine.
    assert!(took < Duration::from_millis(1500), "{took:?}");
    turn(&stage, &watcher, "web-0", &wanted[0]);

    first.start().unwrap();
    wait_standby(&stage);
    let old = leader(&stage);
    let killed = Instant::now();
    second.kill().unwrap();
    let took = wait_leader_after(&elections, &old) - killed;
    println!("SIGKILL: another leader after {took:?}");
    // The election's TTL of 2 s and a second (design, section 10), and room for a busy machine.
    assert!(took < Duration::from_millis(4500), "{took:?}");
    turn(&stage, &watcher, "web-2", &wanted[2]);

    // The records of the pods that stayed are those of the beginning, on the same lease.
    let after = stage.registry.list(&stage.scope("web"));
    assert_eq!(keys(&after), keys(&before));
    let untouched = |records: &[crate::support::Record]| {
        records
            .iter()
            .find(|record| record.key == wanted[1])
            .cloned()
    };
    assert_eq!(untouched(&after), untouched(&before));
}

#[test]
fn what_is_deleted_while_no_operator_runs_leaves_at_its_start() {
    let stage = Stage::new("away");
    let operator = stage.operator("east").election_ttl("2s").start().unwrap();
    let wanted = three_registered(&stage);
    let other = stage.plane.cluster.new_namespace("away-namespace").unwrap();
    let apply = |yaml: &serde_json::Value| {
        stage
            .plane
            .cluster
            .kubectl_input(&["-n", &other, "apply", "-f", "-"], &yaml.to_string())
            .unwrap()
    };
    apply(&crate::support::deployment("api", 2));
    apply(&crate::support::registration("api", &json!({})));
    let scope = format!("/services/{other}/api/");
    stage.wait_count(&scope, 2);
    let leases = stage.registry.leases();
    let watcher = Watcher::start(&stage.etcd, "/services/");

    operator.kill().unwrap();
    let start = Instant::now();
    stage.kubectl(&["delete", "sreg", "web", "--timeout=10s"]);
    stage
        .plane
        .cluster
        .kubectl(&["delete", "namespace", &other, "--timeout=60s"])
        .unwrap();
    println!("deleted without an operator in {:?}", start.elapsed());
    assert_eq!(stage.registry.list(&stage.scope("web")).len(), 3);
    assert_eq!(stage.registry.list(&scope).len(), 2);

    watcher.assert_silent("while no operator runs");
    let started = Instant::now();
    operator.start().unwrap();
    stage.wait_keys::<&str>("/services/", &[]);
    let seen = watcher.seen();
    assert!(
        seen.len() == 5 && seen.iter().all(|seen| seen.put.is_none()),
        "{seen:#?}"
    );
    tell(
        "namespace and registration deleted while no operator ran",
        seen.len() - 5,
        seen.last().unwrap().at.saturating_duration_since(started),
    );
    let slots = format!("/registrar/east/leases/{}/", stage.plane.uid());
    stage.wait_keys::<&str>(&slots, &[]);
    let now = stage.registry.leases();
    assert!(now.len() <= 3, "{now:?} of {leases:?}");
    // It goes on working.
    stage.register("web", &json!({}));
    stage.wait_keys(&stage.scope("web"), &wanted);
}

#[test]
fn a_rolling_upgrade_of_two_replicas_is_not_seen() {
    let stage = Stage::new("upgrade");
    let start = || -> Operator { stage.operator("east").start().unwrap() };
    let (first, second) = (start(), start());
    three_registered(&stage);
    wait_standby(&stage);
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));
    // As a Deployment does it: one more, then one less.
    let third = start();
    first.stop().unwrap();
    let fourth = start();
    second.stop().unwrap();
    wait_standby(&stage);
    watcher.assert_silent("after a rolling upgrade");
    third.stop().unwrap();
    fourth.kill().unwrap();
    watcher.assert_silent("after every replica has gone");
}
