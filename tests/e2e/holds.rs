//! Many pods that stop being ready at once: told by default, held where the policy says so.

use std::time::{Duration, Instant};

use serde_json::json;
use testbed::{Operator, eventually};

use crate::support::{A_SECOND, SOON, Stage, Watcher, addresses, condition};

/// Pods whose readiness the test sets; all are ready and registered. Gives their keys.
fn ready_pods(stage: &Stage, count: usize) -> Vec<String> {
    let keys: Vec<String> = (0..count)
        .map(|number| {
            let pod = stage.create_pod_by_hand(&name(number), "web");
            let address = &addresses(&pod)[0];
            format!("{}east/{address}:8080", stage.scope("web"))
        })
        .collect();
    for number in 0..count {
        stage.set_condition(&name(number), true);
    }
    stage.wait_keys(&stage.scope("web"), &keys);
    stage.wait_condition("web", "Ready", "True", "Registered");
    keys
}

fn name(number: usize) -> String {
    format!("web-{number}")
}

fn wait_metric(operator: &Operator, name: &str, wanted: f64) {
    eventually(SOON, &format!("{name} to be {wanted}"), || {
        match operator.metric(&format!("etcd_registrar_{name}"), &[]) {
            Ok(now) if now == wanted => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
}

/// The Events that tell of it, once there are some.
fn wait_told(stage: &Stage) -> String {
    eventually(SOON, "the event", || {
        let events = stage.kubectl(&["get", "events", "--field-selector=reason=MassRemoval"]);
        if events.contains("serviceregistration/web") {
            Ok(events)
        } else {
            Err(events)
        }
    })
    .unwrap()
}

#[test]
fn many_pods_that_stop_being_ready_at_once_are_removed_and_told() {
    let stage = Stage::new("mass-removal");
    let operator = stage.operator("east").start().unwrap();
    stage.register("web", &json!({}));

    // Those that are deleted are nothing to tell of.
    let count = 6;
    ready_pods(&stage, count);
    for number in 0..count {
        stage.delete_pod(&name(number));
    }
    stage.wait_count(&stage.scope("web"), 0);
    for number in 0..count {
        eventually(SOON, "the pod to be gone", || {
            stage
                .pod(&name(number))
                .map_or(Ok(()), |pod| Err(pod["status"].to_string()))
        })
        .unwrap();
    }

    let keys = ready_pods(&stage, count);
    for number in 0..count {
        stage.set_condition(&name(number), false);
    }
    stage
        .registry
        .wait_keys::<&str>(A_SECOND, &stage.scope("web"), &[]);
    let told = wait_told(&stage);
    assert_eq!(told.matches("MassRemoval").count(), 1, "{told}");
    assert!(
        told.contains("Warning") && told.contains("5 of 6 pods"),
        "{told}"
    );
    wait_metric(&operator, "mass_removals_total", 1.0);
    wait_metric(&operator, "endpoints_held", 0.0);
    stage.wait_condition("web", "Ready", "True", "Registered");
    for number in 0..count {
        stage.set_condition(&name(number), true);
    }
    stage.wait_keys(&stage.scope("web"), &keys);
}

/// The policy with a hold of so many seconds.
fn holding(seconds: u64) -> String {
    format!(
        "
rules:
  - namespaces: ['*']
    formats: [Json]
    prefixes: ['/services/{{namespace}}/']
massRemovals:
  - namespaces: ['*']
    percent: 50
    leastPods: 4
    holdSeconds: {seconds}
"
    )
}

#[test]
fn what_the_policy_holds_stays_until_its_time_or_its_pod_is_over() {
    let stage = Stage::new("holds");
    let leader = stage
        .operator("east")
        .policy(&holding(3600))
        .start()
        .unwrap();
    // What is held outlives its lease, if nobody keeps that.
    stage.register("web", &json!({"leaseTTLSeconds": 5}));
    let keys = ready_pods(&stage, 8);
    wait_metric(&leader, "leader", 1.0);
    let standby = stage
        .operator("east")
        .policy(&holding(3600))
        .start()
        .unwrap();
    wait_metric(&standby, "endpoints_registered", 8.0);
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));
    for number in 0..8 {
        stage.set_condition(&name(number), false);
    }
    let went = Instant::now();

    // Half of them, and no more.
    // The status may have told of the first that is held before the last one was.
    stage.wait_registration("web", "4 of 8 held", |object| {
        let ready = condition(object, "Ready");
        let message = ready["message"].as_str().unwrap_or_default();
        ready["reason"] == "RemovalsHeld"
            && message.starts_with("4 endpoints ")
            && object["status"]["registered"] == 4
            && object["status"]["pods"] == json!({"selected": 8, "ready": 0})
    });
    stage.wait_keys(&stage.scope("web"), &keys[4..]);
    let told = wait_told(&stage);
    assert!(
        told.contains("5 of 8 pods") && told.contains("3600 s"),
        "{told}"
    );
    wait_metric(&leader, "endpoints_held", 4.0);
    wait_metric(&standby, "endpoints_held", 4.0);
    let seen = watcher.seen();
    assert!(
        seen.len() == 4
            && seen
                .iter()
                .all(|seen| seen.put.is_none() && keys[..4].contains(&seen.key)),
        "{seen:#?}"
    );
    watcher.forget();

    // A standby that saw it holds it, too.
    leader.stop().unwrap();
    wait_metric(&standby, "leader", 1.0);

    // Ready again: nothing is written. Deleted, or without the label: gone at once.
    stage.set_condition(&name(4), true);
    wait_metric(&standby, "endpoints_held", 3.0);
    watcher.assert_silent("with a new leader, and a pod back");
    stage.delete_pod(&name(5));
    stage.registry.wait_keys(
        A_SECOND,
        &stage.scope("web"),
        &[&keys[4], &keys[6], &keys[7]],
    );
    stage.patch_pod(&name(6), &json!({"metadata": {"labels": {"app": "other"}}}));
    stage
        .registry
        .wait_keys(A_SECOND, &stage.scope("web"), &[&keys[4], &keys[7]]);
    wait_metric(&standby, "endpoints_held", 1.0);

    // And the last one when its time is over, and not before.
    let hold = Duration::from_secs(went.elapsed().as_secs() + 6);
    standby.write_policy(&holding(hold.as_secs())).unwrap();
    let key = &keys[7];
    let removed = watcher.wait("the hold to end", |seen| seen.key == *key);
    // It went some milliseconds before `went`.
    let lasted = removed.at.duration_since(went) + A_SECOND;
    assert!(
        removed.put.is_none() && lasted >= hold,
        "{removed:#?} after {lasted:?}"
    );
    stage.wait_condition("web", "Ready", "True", "Registered");
    assert_eq!(stage.registration("web")["status"]["registered"], 1);
    wait_metric(&standby, "endpoints_held", 0.0);
    let seen = watcher.seen();
    assert_eq!(seen.len(), 3, "{seen:#?}");
}
