//! A wall clock that jumps.

use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use k8s_openapi::jiff::Timestamp;
use serde_json::json;

use crate::scene::{EAST, SHORT_TTL, Scene, outlive_a_lease, quick, tell};
use crate::support::{Stage, condition};

/// An hour, in seconds.
const HOUR: i64 = 3600;
/// What lies between two readings of the same clock at most, in seconds.
const APART: i64 = 60;

/// The library that shows a process another wall clock.
fn faketime() -> String {
    let asked = Command::new("faketime")
        .args(["-f", "+0", "printenv", "LD_PRELOAD"])
        .output()
        .unwrap();
    assert!(asked.status.success(), "{asked:?}");
    String::from_utf8(asked.stdout).unwrap().trim().to_owned()
}

/// How far the clock of the operator is from that of the machine, in seconds: it writes the time of a condition.
fn ahead(stage: &Stage, name: &str) -> i64 {
    stage.register(name, &json!({"leaseTTLSeconds": SHORT_TTL}));
    stage.wait_condition(name, "Ready", "True", "Registered");
    let told = condition(&stage.registration(name), "Ready")["lastTransitionTime"].clone();
    let told: Timestamp = told.as_str().unwrap().parse().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    told.as_second() - i64::try_from(now.as_secs()).unwrap()
}

#[test]
fn a_clock_that_jumps_an_hour_changes_nothing() {
    let stage = Stage::new("clock");
    let file = stage.plane.kubeconfig.with_file_name("clock");
    std::fs::write(&file, "+0").unwrap();
    let operator = quick(stage.operator(EAST))
        .env("LD_PRELOAD", &faketime())
        .env("FAKETIME_TIMESTAMP_FILE", &file.display().to_string())
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .start()
        .unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let stage = &scene.stage;
    let watcher = scene.watch();
    assert!(ahead(stage, "before").abs() < APART);
    for (name, jump) in [("forward", HOUR), ("back", -HOUR)] {
        std::fs::write(&file, format!("{jump:+}")).unwrap();
        let found = ahead(stage, name);
        assert!((found - jump).abs() < APART, "{found}");
        outlive_a_lease(stage, SHORT_TTL);
        watcher.assert_silent(format!("after a jump {name}"));
        scene.turn(&watcher, 0);
    }
    let lost = operator.metric("etcd_registrar_leases_lost_total", &[]);
    assert_eq!(lost.unwrap(), 0.0);
    let changed = Instant::now();
    scene.set_ready(1, false);
    let took = scene.recovered(&watcher, 1, false, changed);
    let seen = watcher.seen();
    assert_eq!(seen.len(), 1, "{seen:#?}");
    tell("wall clock jumps an hour, and two back", 0, took);
}
