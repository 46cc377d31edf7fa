//! An etcd of one member that is killed, frozen, wiped, restored, full or compacted.

use std::time::Instant;

use serde_json::json;
use testbed::{Etcd, Proxy, eventually};

use crate::scene::{
    EAST, LONG_TTL, PAST_SHORT_TTL, SHORT_TTL, Scene, endure, key, others, outlive_a_lease, quick,
    tell, through_etcd,
};
use crate::support::{Record, Registry, SOON, Stage, Watcher};

/// Many more revisions than a test makes, as one would choose before a restore.
const BUMP: i64 = 1_000_000;

#[test]
fn an_etcd_that_is_killed_or_restarted_keeps_every_record_on_its_lease() {
    // With fsync: what was acknowledged must survive SIGKILL.
    let stage = Stage::with_etcd("etcd-killed", Etcd::builder("etcd-killed"));
    let operator = quick(stage.operator(EAST)).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let watcher = scene.watch();
    let before = scene.records();
    let etcd = &scene.stage.etcd;
    for (row, ready, kill) in [
        ("etcd killed and restarted, 1 node", false, true),
        ("etcd stopped and restarted, 1 node", true, false),
    ] {
        watcher.forget();
        if kill {
            etcd.kill().unwrap();
        } else {
            etcd.stop().unwrap();
        }
        scene.set_ready(0, ready);
        let ended = Instant::now();
        etcd.start().unwrap();
        let recovered = scene.recovered(&watcher, 0, ready, ended);
        outlive_a_lease(&scene.stage, SHORT_TTL);
        let seen = watcher.seen();
        assert_eq!(seen.len(), 1, "{seen:#?}");
        tell(row, others(&seen, &scene.keys[0]).len(), recovered);
    }
    let untouched = |records: Vec<Record>| -> Vec<Record> {
        let changed = &scene.keys[0];
        records
            .into_iter()
            .filter(|record| record.key != *changed)
            .collect()
    };
    assert_eq!(untouched(scene.records()), untouched(before));
    assert!(operator.process().is_running());
}

#[test]
fn an_etcd_that_stood_still_past_the_ttl_has_everything_again() {
    let stage = Stage::new("etcd-frozen");
    let operator = quick(stage.operator(EAST)).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let watcher = scene.watch();
    let etcd = &scene.stage.etcd;
    etcd.freeze().unwrap();
    scene.set_ready(0, false);
    endure(PAST_SHORT_TTL, &[&operator]);
    let ended = Instant::now();
    etcd.thaw().unwrap();
    scene.recovered(&watcher, 0, false, ended);
    scene.wait_pods(&[1, 2]);
    scene
        .stage
        .wait_condition("web", "Ready", "True", "Registered");
    let seen = watcher.seen();
    let recovered = seen.last().unwrap().at.saturating_duration_since(ended);
    // What ended came back: put and removal take turns, and the changed pod did not return.
    for key in &scene.keys {
        let mut stands = true;
        for seen in seen.iter().filter(|seen| seen.key == *key) {
            assert_ne!(seen.put.is_some(), stands, "{seen:#?}");
            stands = seen.put.is_some();
        }
        assert_eq!(stands, *key != scene.keys[0], "{key}");
    }
    scene.assert_leases_live();
    watcher.forget();
    outlive_a_lease(&scene.stage, SHORT_TTL);
    watcher.assert_silent("after it had converged");
    let events = others(&seen, &scene.keys[0]).len();
    tell("etcd frozen past the TTL, 1 node", events, recovered);
}

#[test]
fn a_wiped_etcd_is_filled_with_exactly_what_is_wanted() {
    let stage = Stage::new("etcd-wiped");
    let operator = quick(stage.operator(EAST)).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    // A watcher would wait for revisions that a new etcd comes to much later; the next one begins with that etcd.
    let etcd = &scene.stage.etcd;
    etcd.stop().unwrap();
    etcd.wipe().unwrap();
    scene.set_ready(0, false);
    let ended = Instant::now();
    etcd.start().unwrap();
    let scope = scene.stage.scope("web");
    let watcher = Watcher::after(Registry::connect(etcd), &scope, 1);
    scene.wait_pods(&[1, 2]);
    let seen = watcher.seen();
    let recovered = seen.last().unwrap().at.saturating_duration_since(ended);
    assert!(
        seen.len() == 2 && seen.iter().all(|seen| seen.put.is_some()),
        "{seen:#?}"
    );
    scene.assert_leases_live();
    scene.assert_not_deaf(&watcher, 1);
    scene.set_ready(0, true);
    scene.recovered(&watcher, 0, true, ended);
    watcher.forget();
    outlive_a_lease(&scene.stage, SHORT_TTL);
    watcher.assert_silent("on the new leases");
    assert!(operator.process().is_running());
    tell("etcd data wiped", seen.len(), recovered);
}

/// How an etcd is restored.
#[derive(Clone, Copy)]
enum Restore {
    /// Its revision is that of the snapshot: below the last one that the operator saw.
    Back,
    /// The same, and others write so much before the operator is back that the revision is above the last one it saw.
    OtherWriters,
    /// As etcd's documents advise for clients that watch: far above every revision there was.
    Bumped,
}

#[test]
fn a_restored_etcd_comes_to_exactly_what_is_wanted() {
    for (row, how) in [
        ("etcd restored from a snapshot", Restore::Back),
        (
            "etcd restored from a snapshot, with other writers",
            Restore::OtherWriters,
        ),
        (
            "etcd restored from a snapshot with --bump-revision",
            Restore::Bumped,
        ),
    ] {
        restore(row, how);
    }
}

fn restore(row: &str, how: Restore) {
    let stage = Stage::new("etcd-restored");
    let operator = quick(stage.operator(EAST)).start().unwrap();
    let scene = Scene::new(stage, LONG_TTL);
    let stage = &scene.stage;
    let etcd = &stage.etcd;
    let kept = scene.records();
    let snapshot = etcd.save_snapshot("before").unwrap();
    let saved = stage.registry.revision();
    // Afterwards one pod leaves and another comes, of which the snapshot knows nothing.
    scene.set_ready(0, false);
    scene.wait_pods(&[1, 2]);
    stage.create_pod("web-3", "web", &json!({}), &json!({}));
    let new = key(stage, "web-3");
    let wanted = [&scene.keys[1], &scene.keys[2], &new];
    stage.wait_keys(&stage.scope("web"), &wanted);
    let last = stage.registry.revision();

    let (flags, after): (&[&str], i64) = match how {
        Restore::Back | Restore::OtherWriters => (&[], saved),
        Restore::Bumped => (
            &["--bump-revision=1000000", "--mark-compacted"],
            saved + BUMP,
        ),
    };
    let others_write = matches!(how, Restore::OtherWriters);
    if others_write {
        operator.freeze().unwrap();
    }
    let mut ended = Instant::now();
    etcd.restore(&snapshot, flags).unwrap();
    let registry = Registry::connect(etcd);
    if others_write {
        while registry.revision() <= last {
            registry.put("/others/key", "value", 0);
        }
        ended = Instant::now();
        operator.thaw().unwrap();
    }
    let watcher = Watcher::after(registry, &stage.scope("web"), after);
    stage.wait_keys(&stage.scope("web"), &wanted);
    let seen = watcher.seen();
    let recovered = seen.last().unwrap().at.saturating_duration_since(ended);
    // The pod that left goes, the one that came is there, and the others are those of the snapshot, on their leases.
    assert_eq!(seen.len(), 2, "{row}: {seen:#?}");
    for (key, put) in [(&scene.keys[0], false), (&new, true)] {
        let found = seen
            .iter()
            .any(|seen| seen.key == *key && seen.put.is_some() == put);
        assert!(found, "{row}: {key}: {seen:#?}");
    }
    for before in kept.iter().filter(|record| record.key != scene.keys[0]) {
        let now = stage.registry.get(&before.key).unwrap();
        assert_eq!((&now.value, now.lease), (&before.value, before.lease));
    }
    scene.assert_leases_live();
    scene.assert_not_deaf(&watcher, 1);
    scene.set_ready(0, true);
    scene.recovered(&watcher, 0, true, ended);
    tell(row, seen.len() - 2, recovered);
}

/// Fills etcd until it refuses more, and gives how many keys that took.
fn fill(etcd: &Etcd) -> usize {
    // A little below the 1.5 MiB that a request may have.
    let value = "x".repeat(1_000_000);
    let full = (0..100).find(|number| {
        let put = etcd.etcdctl_input(&["put", &format!("/filler/{number:02}")], &value);
        put.is_err_and(|error| error.to_string().contains("database space exceeded"))
    });
    full.unwrap()
}

#[test]
fn without_space_removals_and_keepalives_go_on_and_the_rest_is_made_up_for() {
    let quota = Etcd::builder("no-space").unsafe_no_fsync();
    let stage = Stage::with_etcd("no-space", quota.args(["--quota-backend-bytes=16777216"]));
    let operator = quick(stage.operator(EAST)).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let stage = &scene.stage;
    let watcher = scene.watch();
    // No lease can be granted later. Twice the TTL and more: it ends when every other that was not kept has ended.
    let granted = stage.etcd.etcdctl(&["lease", "grant", "15"]).unwrap();
    let control = i64::from_str_radix(granted.split(' ').nth(1).unwrap(), 16).unwrap();
    let filled = fill(&stage.etcd);
    assert!(filled > 3, "{filled}");

    let full = Instant::now();
    stage.create_pod("web-3", "web", &json!({}), &json!({}));
    let new = key(stage, "web-3");
    let said = stage.wait_condition("web", "Ready", "False", "NoSpace");
    assert!(said.contains("etcdctl alarm disarm"), "{said}");
    scene.set_ready(0, false);
    let removed = scene.recovered(&watcher, 0, false, full);
    eventually(SOON, "the control lease to end", || {
        if stage.registry.leases().contains(&control) {
            Err("it lives")
        } else {
            Ok(())
        }
    })
    .unwrap();
    scene.wait_pods(&[1, 2]);
    let refused = operator
        .metric(
            "etcd_registrar_transactions_total",
            &["outcome=\"no_space\""],
        )
        .unwrap();
    // No hot loop: a few attempts a second at most.
    assert!((1.0..100.0).contains(&refused), "{refused}");
    let before = watcher.seen();
    assert_eq!(before.len(), 1, "{before:#?}");

    stage
        .etcd
        .etcdctl(&["del", "--prefix", "/filler/"])
        .unwrap();
    let revision = stage.registry.revision().to_string();
    stage.etcd.etcdctl(&["compact", &revision]).unwrap();
    stage.etcd.etcdctl(&["defrag"]).unwrap();
    let ended = Instant::now();
    stage.etcd.etcdctl(&["alarm", "disarm"]).unwrap();
    let put = watcher.wait("the new pod", |seen| seen.key == new && seen.put.is_some());
    stage.wait_condition("web", "Ready", "True", "Registered");
    let seen = watcher.seen();
    assert_eq!(seen.len(), 2, "{seen:#?}");
    scene.turn(&watcher, 1);
    println!("faults: NOSPACE: a removal took {removed:?}, {refused} transactions were refused");
    tell(
        "NOSPACE alarm",
        seen.len() - 2,
        put.at.saturating_duration_since(ended),
    );
}

#[test]
fn what_was_compacted_while_the_watch_was_broken_is_neither_missed_nor_done_twice() {
    let stage = Stage::new("compacted");
    let proxy = Proxy::start(stage.etcd.client_ports()[0]).unwrap();
    let operator = quick(through_etcd(&stage, &[&proxy])).start().unwrap();
    let scene = Scene::new(stage, LONG_TTL);
    let stage = &scene.stage;
    let watcher = scene.watch();
    let compact = || {
        let revision = stage.registry.revision().to_string();
        stage
            .etcd
            .etcdctl(&["compact", "--physical", &revision])
            .unwrap();
    };
    // Under a watch that stands.
    compact();
    scene.turn(&watcher, 0);

    // Behind the back of one that is broken: a record is gone, another one altered, and the history of both too.
    proxy.refuse(true);
    proxy.reset();
    stage.registry.delete(&scene.keys[1]);
    stage.registry.put(&scene.keys[2], "altered", 0);
    stage.registry.put("/services/other", "value", 0);
    compact();
    scene.set_ready(0, false);
    watcher.seen();
    let hands = watcher.seen().len();
    let ended = Instant::now();
    proxy.refuse(false);
    let recovered = scene.recovered(&watcher, 0, false, ended);
    for number in [1, 2] {
        watcher.wait("the record as it was", |seen| {
            let back = |put: &Record| put.lease != 0;
            seen.key == scene.keys[number] && seen.put.as_ref().is_some_and(back)
        });
    }
    scene.wait_pods(&[1, 2]);
    let seen = watcher.seen();
    assert_eq!((hands, seen.len()), (2, 5), "{seen:#?}");
    scene.assert_leases_live();
    scene.turn(&watcher, 1);
    assert!(operator.process().is_running());
    tell("compaction while the watch was broken", 0, recovered);
}
