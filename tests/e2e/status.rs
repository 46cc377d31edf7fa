//! What a registration says about itself.

use std::fmt::Write as _;

use serde_json::json;
use testbed::eventually;

use crate::support::{SOON, Stage, condition, deployment, steer};

#[test]
fn the_status_counts_the_endpoints_of_every_cluster() {
    let (east, west) = Stage::pair("status");
    let _operators = [
        east.operator("east").start().unwrap(),
        west.operator("west").start().unwrap(),
    ];
    for (stage, pods) in [(&east, 3), (&west, 2)] {
        stage.apply(&deployment("web", pods).to_string());
        stage.register("web", &json!({}));
    }
    // Selected and not ready.
    let unready = steer("ready", Some("false"));
    east.create_pod("web-unready", "web", &unready, &json!({}));
    let object = east.wait_registration("web", "both clusters", |object| {
        object["status"]["discovered"] == 5
            && object["status"]["pods"] == json!({"selected": 4, "ready": 3})
    });
    let status = &object["status"];
    assert_eq!(status["service"], "web");
    assert_eq!(status["registered"], 3);
    assert_eq!(
        status["clusters"],
        json!([{"name": "east", "endpoints": 3}, {"name": "west", "endpoints": 2}])
    );
    assert_eq!(
        status["observedGeneration"],
        object["metadata"]["generation"]
    );
    for (kind, value) in [
        ("Ready", "True"),
        ("Accepted", "True"),
        ("Conflict", "False"),
    ] {
        let condition = condition(&object, kind);
        assert_eq!(condition["status"], value, "{condition}");
        assert_eq!(
            condition["observedGeneration"],
            object["metadata"]["generation"]
        );
        assert!(!condition["message"].as_str().unwrap().is_empty());
        assert!(!condition["lastTransitionTime"].is_null());
    }
    let records = east.registry.list(&east.scope("web"));
    let endpoints = status["endpoints"].as_array().unwrap();
    assert_eq!(endpoints.len(), 5);
    for (endpoint, record) in endpoints.iter().zip(&records) {
        let value = record.json();
        assert_eq!(endpoint["key"], record.key);
        assert_eq!(endpoint["lease"], format!("{:016x}", record.lease));
        for (member, of_record) in [
            ("address", "address"),
            ("port", "portName"),
            ("cluster", "cluster"),
            ("pod", "pod"),
            ("node", "node"),
            ("zone", "zone"),
        ] {
            assert_eq!(endpoint[member], value[of_record], "{endpoint}");
        }
    }
    let west_object = west.wait_registration("web", "both clusters", |object| {
        object["status"]["discovered"] == 5
    });
    assert_eq!(west_object["status"]["registered"], 2);

    // What kubectl shows.
    let shown = east.kubectl(&["get", "sreg"]);
    let mut lines = shown.lines().map(|line| line.split_whitespace().collect());
    let header: Vec<&str> = lines.next().unwrap();
    assert_eq!(
        header,
        [
            "NAME",
            "SERVICE",
            "FORMAT",
            "REGISTERED",
            "DISCOVERED",
            "READY",
            "AGE"
        ]
    );
    let row: Vec<&str> = lines.next().unwrap();
    assert_eq!(
        row[..6],
        ["web", "web", "Json", "3", "5", "True"],
        "{shown}"
    );
    // Events follow the status in their own time.
    let events = eventually(SOON, "the event", || {
        let events = east.kubectl(&["get", "events", "--field-selector=reason=Registered"]);
        if events.contains("serviceregistration/web") {
            Ok(events)
        } else {
            Err(events)
        }
    })
    .unwrap();
    assert_eq!(events.matches("Registered").count(), 1, "{events}");
}

#[test]
fn the_status_lists_at_most_100_endpoints_and_counts_all() {
    let stage = Stage::new("many");
    let _operator = stage.operator("east").start().unwrap();
    stage.register("web", &json!({}));
    stage.create_pod("web-0", "web", &json!({}), &json!({}));
    stage.wait_count(&stage.scope("web"), 1);
    let mut transaction = String::from("\n");
    for number in 0..120 {
        let host = format!("10.250.0.{number}");
        let value = json!({
            "address": format!("{host}:8080"), "host": host, "port": 8080, "portName": "http",
            "protocol": "TCP", "scheme": "", "family": "IPv4", "cluster": "north",
            "namespace": stage.namespace, "service": "web", "pod": format!("p{number}"),
            "uid": format!("u{number}"), "node": "n", "zone": "", "weight": 100, "metadata": {},
        });
        let key = format!("{}north/{host}:8080", stage.scope("web"));
        writeln!(transaction, "put {key} '{value}'").unwrap();
    }
    transaction += "\n\n";
    stage.etcd.etcdctl_input(&["txn"], &transaction).unwrap();
    let object = stage.wait_registration("web", "121 endpoints", |object| {
        object["status"]["discovered"] == 121
    });
    let status = &object["status"];
    assert_eq!(status["registered"], 1);
    assert_eq!(
        status["clusters"],
        json!([{"name": "east", "endpoints": 1}, {"name": "north", "endpoints": 120}])
    );
    let endpoints = status["endpoints"].as_array().unwrap();
    assert_eq!(endpoints.len(), 100);
    assert!(endpoints.is_sorted_by_key(|endpoint| endpoint["key"].to_string()));
    // None of theirs was touched.
    assert_eq!(
        stage
            .registry
            .list(&format!("{}north/", stage.scope("web")))
            .len(),
        120
    );
}
