//! Pods that end slowly.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::scene::{EAST, tell};
use crate::support::{Stage, Watcher, addresses, steer};

/// So many that the slowest of a hundred can be told.
const PODS: usize = 100;
/// What is required on an idle machine is 100 ms; this is what a busy one may take, and far below the grace period.
const AT_ONCE: Duration = Duration::from_secs(2);

#[test]
fn a_pod_with_a_long_grace_period_leaves_at_its_deletion() {
    let stage = Stage::new("grace");
    let _operator = stage.operator(EAST).start().unwrap();
    stage.register("web", &json!({}));
    let names: Vec<String> = (0..PODS).map(|number| format!("web-{number}")).collect();
    for name in &names {
        let slow = steer("terminate-delay", Some("60s"));
        let grace = json!({"terminationGracePeriodSeconds": 60});
        stage.create_pod(name, "web", &slow, &grace);
    }
    let keys: Vec<String> = names
        .iter()
        .map(|name| {
            stage.wait_ready(name);
            let address = addresses(&stage.pod(name).unwrap()).swap_remove(0);
            format!("{}{EAST}/{address}:8080", stage.scope("web"))
        })
        .collect();
    stage.wait_keys(&stage.scope("web"), &keys);
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));
    let mut times: Vec<Duration> = names
        .iter()
        .zip(&keys)
        .map(|(name, key)| {
            let begun = Instant::now();
            stage.delete_pod(name);
            let seen = watcher.wait(key, |seen| seen.key == *key);
            assert!(seen.put.is_none(), "{seen:#?}");
            // The whole way of the request is in it: more than what the operator takes.
            seen.at.saturating_duration_since(begun)
        })
        .collect();
    times.sort();
    let p99 = times[PODS * 99 / 100];
    assert!(p99 < AT_ONCE, "{times:?}");
    // Each leaves once, while its pod is still there.
    assert_eq!(watcher.seen().len(), PODS);
    assert!(stage.pod("web-0").is_ok());
    tell("pod terminating with a long grace period, p99", 0, p99);
}
