//! How much a tenant may have, and how fast: told in conditions, and nobody else is concerned.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use testbed::{Operator, eventually};

use crate::support::{SOON, Stage, Watcher, condition};

/// Each namespace below its own prefix, with these limits.
fn limits(registrations: u32, endpoints: u32, each: u32) -> String {
    format!(
        "rules:\n- namespaces: ['*']\n  formats: [Json]\n  prefixes: ['/services/{{namespace}}/']\n\
         limits:\n- namespaces: ['*']\n  registrations: {registrations}\n  endpoints: {endpoints}\n  endpointsPerRegistration: {each}\n"
    )
}

/// Waits until what is created now is younger than what there is: creation times have seconds.
fn next_second() {
    let second = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs()
    };
    let start = second();
    eventually(SOON, "the next second", || {
        if second() > start { Ok(()) } else { Err(start) }
    })
    .unwrap();
}

/// Pods of which each is younger than all that was there before it.
fn create_pods(stage: &Stage, app: &str, numbers: std::ops::Range<u32>) {
    for number in numbers {
        next_second();
        stage.create_pod(&format!("{app}-{number}"), app, &json!({}), &json!({}));
    }
}

/// Metrics are set once a second.
fn wait_metric(operator: &Operator, name: &str, value: f64) {
    eventually(SOON, &format!("{name} to be {value}"), || {
        match operator.metric(name, &[]) {
            Ok(now) if now == value => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
}

fn pods_of(records: &[crate::support::Record]) -> Vec<String> {
    let mut pods: Vec<String> = records
        .iter()
        .map(|record| {
            let value: Value = serde_json::from_str(&record.value).unwrap();
            value["pod"].as_str().unwrap().to_owned()
        })
        .collect();
    pods.sort();
    pods
}

#[test]
fn who_has_too_many_endpoints_keeps_the_oldest_and_is_told() {
    let stage = Stage::new("limit-endpoints");
    let operator = stage
        .operator("east")
        .policy(&limits(10, 100, 2))
        .start()
        .unwrap();
    create_pods(&stage, "web", 0..2);
    stage.register("web", &json!({}));
    stage.wait_condition("web", "Ready", "True", "Registered");
    let scope = stage.scope("web");
    let watcher = Watcher::start(&stage.etcd, &scope);

    // One too many: it is told, and nothing of the others changes.
    create_pods(&stage, "web", 2..3);
    let message = stage.wait_condition("web", "Ready", "False", "TooManyEndpoints");
    for part in [
        "1 ready pods",
        "at most 2 endpoints",
        "endpointsPerRegistration",
        "limits",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    wait_metric(&operator, "etcd_registrar_pods_over_limit", 1.0);
    watcher.assert_silent("a newcomer takes nothing away");

    // Nor does a restart, or one of the older pods that is away for a moment.
    operator.restart().unwrap();
    stage.wait_condition("web", "Ready", "False", "TooManyEndpoints");
    watcher.assert_silent("a restart finds the same ones within");
    stage.set_ready("web-0", false);
    stage.wait_count(&scope, 1);
    stage.set_ready("web-0", true);
    assert_eq!(pods_of(&stage.wait_count(&scope, 2)), ["web-0", "web-1"]);

    // Its place is free when it goes for good.
    stage.delete_pod("web-0");
    stage.wait_condition("web", "Ready", "True", "Registered");
    assert_eq!(pods_of(&stage.wait_count(&scope, 2)), ["web-1", "web-2"]);

    // All have room, and then fewer.
    operator.write_policy(&limits(10, 100, 3)).unwrap();
    create_pods(&stage, "web", 3..4);
    stage.wait_count(&scope, 3);
    stage.wait_condition("web", "Ready", "True", "Registered");
    operator.write_policy(&limits(10, 1, 3)).unwrap();
    let message = stage.wait_condition("web", "Ready", "False", "TooManyEndpoints");
    assert!(
        message.contains("a namespace may have at most 1 endpoints"),
        "{message}"
    );
    assert_eq!(pods_of(&stage.wait_count(&scope, 1)), ["web-1"]);
}

#[test]
fn a_namespace_shares_its_endpoints_among_its_registrations_oldest_first() {
    let stage = Stage::new("limit-namespace");
    let _operator = stage
        .operator("east")
        .policy(&limits(2, 4, 100))
        .start()
        .unwrap();
    create_pods(&stage, "web", 0..2);
    let selector = json!({"selector": {"matchLabels": {"app": "web"}}});
    stage.register("first", &selector);
    stage.wait_condition("first", "Ready", "True", "Registered");
    next_second();
    stage.register("second", &selector);
    stage.wait_condition("second", "Ready", "True", "Registered");
    let watcher = Watcher::start(&stage.etcd, &format!("/services/{}/", stage.namespace));

    // A third registration is not served, and told why.
    next_second();
    stage.register("third", &selector);
    let message = stage.wait_condition("third", "Accepted", "False", "TooManyRegistrations");
    assert!(
        message.contains("at most 2") && message.contains("`registrations`"),
        "{message}"
    );
    let third = stage.wait_registration("third", "to be told", |object| {
        condition(object, "Ready")["reason"] == "NotAccepted"
    });
    assert_eq!(third["status"]["registered"], 0);
    // A third pod finds no room in either.
    create_pods(&stage, "web", 2..3);
    for name in ["first", "second"] {
        let message = stage.wait_condition(name, "Ready", "False", "TooManyEndpoints");
        assert!(
            message.contains("a namespace may have at most 4"),
            "{message}"
        );
    }
    watcher.assert_silent("newcomers take nothing away");

    // The oldest goes: its places are those of the third, which is older than the third pod.
    stage.unregister("first");
    stage.wait_condition("third", "Accepted", "True", "Accepted");
    stage.wait_count(&stage.scope("first"), 0);
    for name in ["second", "third"] {
        let records = stage.wait_count(&stage.scope(name), 2);
        assert_eq!(pods_of(&records), ["web-0", "web-1"]);
        stage.wait_condition(name, "Ready", "False", "TooManyEndpoints");
    }
    // The third pod is older than a registration that comes now.
    stage.unregister("second");
    stage.wait_count(&stage.scope("third"), 3);
    stage.wait_condition("third", "Ready", "True", "Registered");
    next_second();
    stage.register("fourth", &selector);
    stage.wait_condition("fourth", "Ready", "False", "TooManyEndpoints");
    stage.wait_count(&stage.scope("fourth"), 1);
    assert_eq!(stage.wait_count(&stage.scope("third"), 3).len(), 3);
}

#[test]
fn who_changes_records_all_the_time_is_slowed_down_but_never_in_removing() {
    let stage = Stage::new("limit-pace");
    // So few endpoints that 1,000 puts may go at once, and then 100 a second.
    let operator = stage
        .operator("east")
        .policy(&limits(10, 200, 200))
        .start()
        .unwrap();
    for pod in 0..10 {
        stage.create_pod(&format!("web-{pod}"), "web", &json!({}), &json!({}));
    }
    let ports: Vec<Value> = (0..16)
        .map(|port| json!({"name": format!("p{port}"), "port": 8080 + port}))
        .collect();
    stage.register("web", &json!({"ports": ports}));
    let scope = stage.scope("web");
    stage.wait_count(&scope, 160);
    stage.wait_condition("web", "Ready", "True", "Registered");

    // Every change of the weight is a put for each endpoint.
    let weight = std::cell::Cell::new(1);
    eventually(Duration::from_secs(60), "to be slowed down", || {
        weight.set(weight.get() + 1);
        stage.change("web", &json!({"weight": weight.get()}));
        let waiting = operator.metric("etcd_registrar_puts_slowed_down", &[]);
        let reason = condition(&stage.registration("web"), "Ready")["reason"].clone();
        if waiting.is_ok_and(|waiting| waiting > 0.0) && reason == "TooManyChanges" {
            Ok(())
        } else {
            Err(format!("{reason} at weight {}", weight.get()))
        }
    })
    .unwrap();
    // A removal does not wait for that.
    stage.delete_pod("web-0");
    stage.wait_count(&scope, 144);
    // With nobody changing anything, all comes right.
    stage.wait_condition("web", "Ready", "True", "Registered");
    let last = stage.registration("web")["spec"]["weight"].clone();
    for record in stage.wait_count(&scope, 144) {
        let value: Value = serde_json::from_str(&record.value).unwrap();
        assert_eq!(value["weight"], last);
    }
    wait_metric(&operator, "etcd_registrar_puts_slowed_down", 0.0);
}
