//! The network between operator and etcd: black holes, lost responses, requests that arrive late.

use std::time::{Duration, Instant};

use serde_json::json;
use testbed::{Direction, Flow, Operator, Proxy, eventually};

use crate::scene::{LONG_TTL, SHORT_TTL, Scene, key, outlive_a_lease, tell, through_etcd};
use crate::support::{SOON, Stage};

#[test]
fn a_black_hole_on_the_way_to_etcd_is_noticed_and_another_endpoint_used() {
    let stage = Stage::new("black-hole");
    let port = stage.etcd.client_ports()[0];
    let proxies = [Proxy::start(port).unwrap(), Proxy::start(port).unwrap()];
    let both = [&proxies[0], &proxies[1]];
    let operator = through_etcd(&stage, &both).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let watcher = scene.watch();
    // First one way is closed, then the other: each connection of the operator was in a black hole once.
    for (number, ready) in [(0, false), (1, true)] {
        watcher.forget();
        let begun = Instant::now();
        proxies[number].black_hole();
        scene.set_ready(0, ready);
        let noticed = scene.recovered(&watcher, 0, ready, begun);
        outlive_a_lease(&scene.stage, SHORT_TTL);
        let seen = watcher.seen();
        assert_eq!(seen.len(), 1, "{seen:#?}");
        // Noticed within a third of the TTL on an idle machine; the TTL itself is what must never pass.
        assert!(noticed < Duration::from_secs(SHORT_TTL), "{noticed:?}");
        proxies[number].heal();
        tell("black-holed connection to etcd", 0, noticed);
    }
    assert!(operator.process().is_running());
}

/// Waits until so many transactions of unknown outcome were counted.
fn wait_unknown(operator: &Operator, more_than: f64) {
    eventually(SOON, "a transaction of unknown outcome", || {
        match unknown(operator) {
            now if now > more_than => Ok(()),
            now => Err(now),
        }
    })
    .unwrap();
}

/// The transactions so far whose outcome is unknown.
fn unknown(operator: &Operator) -> f64 {
    operator
        .metric(
            "etcd_registrar_transactions_total",
            &["outcome=\"unknown\""],
        )
        .unwrap()
}

#[test]
fn what_was_committed_though_its_response_was_lost_is_not_done_twice() {
    let stage = Stage::new("lost-response");
    let proxy = Proxy::start(stage.etcd.client_ports()[0]).unwrap();
    let operator = through_etcd(&stage, &[&proxy]).start().unwrap();
    let scene = Scene::new(stage, LONG_TTL);
    let stage = &scene.stage;
    let watcher = scene.watch();
    for ready in [false, true] {
        watcher.forget();
        let before = unknown(&operator);
        proxy.set(Direction::ToClient, Flow::Drop);
        scene.set_ready(0, ready);
        // It is committed, and the operator knows nothing of it.
        scene.recovered(&watcher, 0, ready, Instant::now());
        wait_unknown(&operator, before);
        let ended = Instant::now();
        proxy.heal();
        // The next change of the same key comes after the barrier and the read.
        scene.set_ready(0, !ready);
        let recovered = scene.recovered(&watcher, 0, !ready, ended);
        scene.set_ready(0, ready);
        scene.wait_pods(if ready { &[0, 1, 2] } else { &[1, 2] });
        let seen = watcher.seen();
        let puts: Vec<bool> = seen.iter().map(|seen| seen.put.is_some()).collect();
        assert_eq!(puts, [ready, !ready, ready], "{seen:#?}");
        assert!(
            seen.iter().all(|seen| seen.key == scene.keys[0]),
            "{seen:#?}"
        );
        tell("response lost after the commit", 0, recovered);
    }

    // A grant whose response is lost leaves no lease behind: another TTL needs a lease of its own.
    let slots = scene.slots().len();
    let before = stage.registry.leases();
    proxy.set(Direction::ToClient, Flow::Drop);
    stage.change("web", &json!({"leaseTTLSeconds": SHORT_TTL}));
    eventually(SOON, "a lease whose grant was not answered", || {
        if stage.registry.leases().is_subset(&before) {
            Err("none")
        } else {
            Ok(())
        }
    })
    .unwrap();
    watcher.forget();
    proxy.heal();
    eventually(SOON, "only leases that are in use, of the new TTL", || {
        let records = stage.registry.try_list(&stage.scope("web"))?;
        let leases = stage.registry.leases();
        let of_old = records.iter().any(|record| before.contains(&record.lease));
        // Those of `owner` and of the term are no slots.
        if !of_old && records.len() == 3 && leases.len() == slots + 2 {
            Ok(())
        } else {
            Err(format!("{records:#?} {leases:?}"))
        }
    })
    .unwrap();
    let seen = watcher.seen();
    let put_once = |key: &String| seen.iter().filter(|seen| seen.key == *key).count() == 1;
    assert!(scene.keys.iter().all(put_once), "{seen:#?}");
}

#[test]
fn a_request_that_arrives_after_its_pod_has_gone_leaves_no_key() {
    let stage = Stage::new("late-request");
    let proxy = Proxy::start(stage.etcd.client_ports()[0]).unwrap();
    let operator = through_etcd(&stage, &[&proxy]).start().unwrap();
    let scene = Scene::new(stage, LONG_TTL);
    let stage = &scene.stage;
    let watcher = scene.watch();
    // The put of a new pod is on its way, and its deadline passes.
    let before = unknown(&operator);
    proxy.black_hole();
    stage.create_pod("web-3", "web", &json!({}), &json!({}));
    let late = key(stage, "web-3");
    wait_unknown(&operator, before);
    stage.delete_pod("web-3");
    eventually(SOON, "the pod to be gone", || match stage.pod("web-3") {
        Ok(pod) => Err(pod["metadata"].to_string()),
        Err(_) => Ok(()),
    })
    .unwrap();
    let ended = Instant::now();
    proxy.heal();
    // What the operator writes next comes after a barrier, so that nothing earlier can be applied any more.
    scene.set_ready(0, false);
    let recovered = scene.recovered(&watcher, 0, false, ended);
    scene.wait_pods(&[1, 2]);
    let of_late = |put: bool| {
        let seen = watcher.seen();
        let found = seen
            .iter()
            .filter(|seen| seen.key == late && seen.put.is_some() == put);
        found.count()
    };
    // It may have been applied before the barrier, and was removed then.
    assert!(of_late(true) <= 1 && of_late(true) == of_late(false));
    let unchanged = watcher.seen();
    let unchanged = unchanged
        .iter()
        .filter(|seen| seen.key != late && seen.key != scene.keys[0])
        .count();
    assert_eq!(unchanged, 0);
    scene.turn(&watcher, 1);
    tell("request applied after its deadline", unchanged, recovered);
}
