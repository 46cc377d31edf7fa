//! Operators that stand still for longer than every TTL.

use std::time::Instant;

use testbed::{Proxy, eventually};

use crate::scene::{
    EAST, LEADER, SHORT_TTL, Scene, leader, outlive_a_lease, quick, tell, through_etcd,
    wait_leader_after, wait_standbys,
};
use crate::support::{SOON, Stage, Watcher};

#[test]
fn a_leader_that_stood_still_past_every_ttl_cannot_write_afterwards() {
    let stage = Stage::new("frozen-leader");
    let proxy = Proxy::start(stage.etcd.client_ports()[0]).unwrap();
    let first = quick(through_etcd(&stage, &[&proxy])).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let stage = &scene.stage;
    let second = quick(stage.operator(EAST)).start().unwrap();
    wait_standbys(&stage.registry, 1);
    let watcher = scene.watch();
    let elections = Watcher::start(&stage.etcd, LEADER);
    let old = leader(&stage.registry);
    let before = scene.records();

    // A removal of the first one is on its way when it is stopped; the pod is ready again before anyone else could know.
    proxy.black_hole();
    scene.set_ready(1, false);
    eventually(SOON, "a transaction under way", || {
        match first.metric("etcd_registrar_lanes_busy", &[]) {
            Ok(busy) if busy > 0.0 => Ok(()),
            other => Err(format!("{other:?} lanes are busy")),
        }
    })
    .unwrap();
    scene.set_ready(1, true);
    stage.wait_ready("web-1");
    first.freeze().unwrap();
    wait_leader_after(&elections, &old);
    outlive_a_lease(stage, SHORT_TTL);
    watcher.assert_silent("while the standby keeps the leases alive");

    // Now that removal arrives, and only the fence stands in its way: nobody has touched the key since.
    let ended = Instant::now();
    proxy.heal();
    first.thaw().unwrap();
    wait_standbys(&stage.registry, 1);
    watcher.assert_silent("after the old leader went on");
    assert_eq!(scene.records(), before);
    // It has become a standby that works.
    let now = leader(&stage.registry);
    elections.forget();
    second.stop().unwrap();
    wait_leader_after(&elections, &now);
    scene.set_ready(0, false);
    let recovered = scene.recovered(&watcher, 0, false, ended);
    let seen = watcher.seen();
    assert_eq!(seen.len(), 1, "{seen:#?}");
    tell(
        "leader SIGSTOPped past every TTL, with a standby",
        0,
        recovered,
    );
}

#[test]
fn the_only_replica_stands_still_past_the_ttl_and_publishes_everything_again() {
    let stage = Stage::new("frozen-alone");
    let operator = quick(stage.operator(EAST)).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let watcher = scene.watch();
    let before = scene.records();

    operator.freeze().unwrap();
    scene.wait_pods(&[]);
    let ended = Instant::now();
    operator.thaw().unwrap();
    let after = scene.wait_pods(&[0, 1, 2]);
    for (after, before) in after.iter().zip(&before) {
        assert_eq!((&after.key, &after.value), (&before.key, &before.value));
        assert_ne!(after.lease, before.lease, "a lease that ended");
    }
    scene.assert_leases_live();
    let seen = watcher.seen();
    let recovered = seen.last().unwrap().at.saturating_duration_since(ended);
    // Gone once and back once, each of them.
    for key in &scene.keys {
        let of: Vec<bool> = seen
            .iter()
            .filter(|seen| seen.key == *key)
            .map(|seen| seen.put.is_some())
            .collect();
        assert_eq!(of, [false, true], "{key}");
    }
    // The new leases are kept.
    watcher.forget();
    outlive_a_lease(&scene.stage, SHORT_TTL);
    watcher.assert_silent("on the new leases");
    scene.turn(&watcher, 0);
    tell(
        "the only replica SIGSTOPped past the TTL",
        seen.len(),
        recovered,
    );
}
