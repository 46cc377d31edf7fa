//! Every kind of pod: families, ports, nodes, gates, lives and ends.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use testbed::{always, eventually};

use crate::changes::wait_for_a_later_second;
use crate::support::{A_SECOND, SOON, Stage, Watcher, addresses, container, keys, steer, tell};

fn key(stage: &Stage, service: &str, address: &str) -> String {
    format!("{}east/{address}", stage.scope(service))
}

#[test]
fn readiness_gates_and_pods_that_are_published_before_they_are_ready() {
    let stage = Stage::new("gates");
    let _operator = stage.operator("east").start().unwrap();
    stage.register("gated", &json!({}));
    let gates = json!({"readinessGates": [{"conditionType": "example.com/gate"}]});
    stage.create_pod("gated-0", "gated", &json!({}), &gates);
    stage.wait_registration("gated", "a pod that is not ready", |object| {
        object["status"]["pods"] == json!({"selected": 1, "ready": 0})
    });
    let set = |gate: &str| {
        let pod = stage.pod("gated-0").unwrap();
        let mut conditions = pod["status"]["conditions"].as_array().unwrap().clone();
        conditions.retain(|condition| condition["type"] != "example.com/gate");
        conditions.push(json!({"type": "example.com/gate", "status": gate}));
        stage.patch_pod_status("gated-0", &json!({"conditions": conditions}));
    };
    eventually(
        SOON,
        "the pod to run",
        || match stage.pod("gated-0")?["status"]["phase"].as_str() {
            Some("Running") => Ok(()),
            other => Err(format!("{other:?}")),
        },
    )
    .unwrap();
    assert_eq!(stage.registry.list("/services/"), []);
    set("True");
    stage.wait_count(&stage.scope("gated"), 1);
    set("False");
    stage.wait_count(&stage.scope("gated"), 0);

    let unready = steer("ready", Some("false"));
    stage.create_pod("early-0", "early", &unready, &json!({}));
    stage.register("early", &json!({"publishNotReady": true}));
    stage.wait_count(&stage.scope("early"), 1);
    stage.change("early", &json!({"publishNotReady": false}));
    stage.wait_count(&stage.scope("early"), 0);
    stage.change("early", &json!({"publishNotReady": true}));
    stage.wait_count(&stage.scope("early"), 1);
    // Terminating is the end all the same.
    stage.patch_pod(
        "early-0",
        &json!({"metadata": steer("terminate-delay", Some("30s"))}),
    );
    stage.delete_pod("early-0");
    stage.wait_count(&stage.scope("early"), 0);
}

#[test]
fn ports_families_and_node_addresses() {
    let stage = Stage::new("ports");
    let _operator = stage.operator("east").start().unwrap();
    let both = json!({"containers": [{
        "name": "main", "image": "example.com/web:1",
        "ports": [
            {"name": "http", "containerPort": 8080, "hostPort": 30080},
            {"name": "metrics", "containerPort": 9090},
        ],
    }]});
    stage.create_pod("web-0", "web", &json!({}), &both);
    let found = stage.wait_ready("web-0");
    let (four, six) = (&found[0], &found[1]);
    assert!(six.contains(':'), "{found:?}");

    // By name and by number, in both families.
    stage.register(
        "web",
        &json!({
            "ports": [{"name": "http", "scheme": "http"}, {"name": "metrics"}, {"name": "other", "port": 7070}],
            "addressFamilies": ["IPv4", "IPv6"],
        }),
    );
    let of =
        |host: &str| [7070, 8080, 9090].map(|port| key(&stage, "web", &format!("{host}:{port}")));
    let wanted = [of(four), of(&format!("[{six}]"))].concat();
    let records = stage.wait_keys(&stage.scope("web"), &wanted);
    let families: Vec<Value> = records
        .iter()
        .map(|record| record.json()["family"].clone())
        .collect();
    assert_eq!(families, ["IPv4", "IPv4", "IPv4", "IPv6", "IPv6", "IPv6"]);
    stage.change("web", &json!({"addressFamilies": ["IPv6"]}));
    stage.wait_keys(&stage.scope("web"), &wanted[3..]);
    stage.change("web", &json!({"addressFamilies": null}));
    stage.wait_keys(&stage.scope("web"), &wanted[..3]);

    // A pod that lacks a named port is left out, and is named.
    stage.create_pod(
        "web-lacking",
        "web",
        &json!({}),
        &json!({"containers": [{"name": "main", "image": "example.com/web:1"}]}),
    );
    stage.wait_ready("web-lacking");
    let message = stage.wait_condition("web", "Ready", "False", "PodsLeftOut");
    assert!(
        message.contains("web-lacking") && message.contains("http"),
        "{message}"
    );
    stage.wait_keys(&stage.scope("web"), &wanted[..3]);
    stage.delete_pod("web-lacking");
    stage.wait_condition("web", "Ready", "True", "Registered");

    // The node's address and the hostPort; a port without one leaves the pod out.
    let host = stage.pod("web-0").unwrap()["status"]["hostIP"]
        .as_str()
        .unwrap()
        .to_owned();
    stage.register(
        "outside",
        &json!({
            "selector": {"matchLabels": {"app": "web"}},
            "address": "Host",
            "ports": [{"name": "http"}],
        }),
    );
    stage.wait_keys(
        &stage.scope("outside"),
        &[key(&stage, "outside", &format!("{host}:30080"))],
    );
    stage.register(
        "inside",
        &json!({
            "selector": {"matchLabels": {"app": "web"}},
            "address": "Host",
            "ports": [{"name": "metrics"}],
        }),
    );
    let message = stage.wait_condition("inside", "Ready", "False", "PodsLeftOut");
    assert!(
        message.contains("web-0") && message.contains("hostPort"),
        "{message}"
    );
    assert_eq!(stage.registry.list(&stage.scope("inside")), []);

    // A host-network pod has its node's addresses.
    stage.create_pod(
        "host-0",
        "host",
        &json!({}),
        &json!({"hostNetwork": true, "containers": [{
            "name": "main", "image": "example.com/web:1",
            "ports": [{"name": "http", "containerPort": 8081, "hostPort": 8081}],
        }]}),
    );
    stage.register("host", &json!({"ports": [{"name": "http"}]}));
    let address = stage.wait_ready("host-0")[0].clone();
    let pod = stage.pod("host-0").unwrap();
    assert_eq!(pod["status"]["hostIP"], address.as_str());
    stage.wait_keys(
        &stage.scope("host"),
        &[key(&stage, "host", &format!("{address}:8081"))],
    );
}

#[test]
fn the_zone_is_the_pods_or_its_nodes() {
    let stage = Stage::new("zones");
    let _operator = stage.operator("east").start().unwrap();
    stage.create_pod("web-0", "web", &json!({}), &json!({"nodeName": "node-b"}));
    stage.register("web", &json!({}));
    let record = stage.wait_count(&stage.scope("web"), 1).remove(0);
    assert_eq!(record.json()["zone"], "b");
    assert_eq!(record.json()["node"], "node-b");
    let zone = |wanted: &str| {
        eventually(SOON, &format!("the zone {wanted}"), || {
            let record = stage.registry.get(&record.key).ok_or("gone")?;
            let zone = record.json()["zone"].clone();
            if zone == wanted {
                Ok(())
            } else {
                Err(zone.to_string())
            }
        })
        .unwrap();
    };
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));
    let label = |value: Option<&str>| json!({"metadata": {"labels": {"topology.kubernetes.io/zone": value}}});
    stage.patch_pod("web-0", &label(Some("own")));
    zone("own");
    stage.patch_pod("web-0", &label(None));
    zone("b");
    crate::support::patch(
        stage.plane.cluster,
        "/api/v1/nodes/node-b",
        &label(Some("b2")),
    );
    zone("b2");
    assert_eq!(watcher.seen().len(), 3);
    // A zone that is not known does not replace one that is.
    crate::support::patch(stage.plane.cluster, "/api/v1/nodes/node-b", &label(None));
    stage.patch_pod("web-0", &json!({"metadata": {"labels": {"other": "x"}}}));
    stage.create_pod("web-1", "web", &json!({}), &json!({"nodeName": "node-b"}));
    // The node's change came before this one.
    let records = stage.wait_count(&stage.scope("web"), 2);
    let zones: Vec<Value> = records
        .iter()
        .map(|now| json!([now.key == record.key, now.json()["zone"]]))
        .collect();
    let restore = || {
        crate::support::patch(
            stage.plane.cluster,
            "/api/v1/nodes/node-b",
            &label(Some("b")),
        )
    };
    restore();
    assert!(zones.contains(&json!([true, "b2"])), "{zones:?}");
}

#[test]
fn stateful_pods_jobs_and_long_ends() {
    let stage = Stage::new("lives");
    let _operator = stage.operator("east").start().unwrap();

    // A StatefulSet's pod that comes back under its name is another endpoint.
    let set = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "db"},
        "spec": {
            "serviceName": "db", "replicas": 1,
            "selector": {"matchLabels": {"app": "db"}},
            "template": {
                "metadata": {"labels": {"app": "db"}},
                "spec": {"containers": [container()], "terminationGracePeriodSeconds": 1},
            },
        },
    });
    stage.apply(&set.to_string());
    stage.register("db", &json!({}));
    let first = stage.wait_count(&stage.scope("db"), 1).remove(0).json();
    assert_eq!(first["pod"], "db-0");
    let watcher = Watcher::start(&stage.etcd, &stage.scope("db"));
    stage.delete_pod("db-0");
    let second = watcher.wait("the new pod", |seen| {
        seen.put
            .as_ref()
            .is_some_and(|record| record.json()["uid"] != first["uid"])
    });
    assert_eq!(second.put.unwrap().json()["pod"], "db-0");
    let seen = watcher.seen();
    assert!(seen.len() == 2 && seen[0].put.is_none(), "{seen:#?}");
    tell(
        "StatefulSet pod back under its name",
        seen.len(),
        seen[1].at.saturating_duration_since(seen[0].at),
    );

    // A Job's pod that completes.
    let job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"},
        "spec": {"template": {
            "metadata": {"labels": {"app": "job"}, "annotations": steer("complete-after", Some("1500ms"))["annotations"]},
            "spec": {"containers": [container()], "restartPolicy": "Never"},
        }},
    });
    let watcher = Watcher::start(&stage.etcd, &stage.scope("job"));
    stage.register("job", &json!({"publishNotReady": true}));
    stage.apply(&job.to_string());
    watcher.wait("the running job", |seen| seen.put.is_some());
    watcher.wait("the end of the job", |seen| seen.put.is_none());
    stage.wait_keys::<&str>(&stage.scope("job"), &[]);
    stage.wait_registration("job", "no ready pod", |object| {
        object["status"]["registered"] == 0
    });

    // A pod with a long grace period goes when its deletion begins, not when it ends.
    let slow = steer("terminate-delay", Some("60s"));
    stage.create_pod(
        "slow-0",
        "slow",
        &slow,
        &json!({"terminationGracePeriodSeconds": 60}),
    );
    stage.register("slow", &json!({}));
    stage.wait_count(&stage.scope("slow"), 1);
    stage.delete_pod("slow-0");
    stage
        .registry
        .wait_keys::<&str>(A_SECOND, &stage.scope("slow"), &[]);
    let pod = stage.pod("slow-0").unwrap();
    assert_eq!(crate::support::condition(&pod, "Ready")["status"], "True");
    // Nothing brings it back.
    stage.patch_pod("slow-0", &json!({"metadata": {"labels": {"other": "x"}}}));
    always(Duration::from_millis(500), "no key", || {
        if stage.registry.try_list(&stage.scope("slow"))?.is_empty() {
            Ok(())
        } else {
            Err("back".to_owned())
        }
    })
    .unwrap();
}

#[test]
fn an_address_never_has_two_owners() {
    let stage = Stage::new("reuse");
    let _operator = stage.operator("east").start().unwrap();
    let namespace = format!("/services/{}/", stage.namespace);
    let watcher = Watcher::start(&stage.etcd, &namespace);
    let move_to = |name: &str, address: &str| {
        stage.patch_pod_status(
            name,
            &json!({"podIP": address, "podIPs": [{"ip": address}]}),
        );
    };
    let shared = "10.240.0.7";
    // The older and the younger of a second one, each of another registration; and one of the same.
    stage.register("web", &json!({}));
    stage.register("api", &json!({}));
    let old = stage.create_pod_by_hand("web-0", "web");
    wait_for_a_later_second(&old);
    let young = stage.create_pod_by_hand("api-0", "api");
    wait_for_a_later_second(&young);
    stage.create_pod_by_hand("web-1", "web");
    for name in ["web-0", "api-0", "web-1"] {
        move_to(name, shared);
    }
    let in_web = key(&stage, "web", &format!("{shared}:8080"));
    let in_api = key(&stage, "api", &format!("{shared}:8080"));
    let owner = |wanted: &str, pod: &str| {
        eventually(SOON, &format!("{shared} to be {pod}'s"), || {
            let records = stage.registry.try_list(&namespace)?;
            if keys(&records) == [wanted] && records[0].json()["pod"] == pod {
                Ok(())
            } else {
                Err(format!("{records:#?}"))
            }
        })
        .unwrap();
    };
    stage.set_condition("web-0", true);
    owner(&in_web, "web-0");
    stage.set_condition("api-0", true);
    owner(&in_api, "api-0");
    stage.set_condition("web-1", true);
    owner(&in_web, "web-1");
    // The same key changes hands.
    stage.set_condition("api-0", false);
    stage.set_condition("web-1", false);
    owner(&in_web, "web-0");
    stage.set_condition("web-1", true);
    owner(&in_web, "web-1");
    stage.delete_pod("web-1");
    owner(&in_web, "web-0");
    // The address is freed by a move, and taken again.
    stage.set_condition("api-0", true);
    owner(&in_api, "api-0");
    move_to("api-0", "10.240.0.8");
    stage.wait_keys(
        &namespace,
        &[&key(&stage, "api", "10.240.0.8:8080"), &in_web],
    );
    move_to("api-0", shared);
    owner(&in_api, "api-0");

    // At no revision did two pods stand at one address.
    let mut standing: BTreeMap<String, (String, String)> = BTreeMap::new();
    let seen = watcher.seen();
    assert!(seen.len() > 10, "{seen:#?}");
    let mut position = 0;
    while let Some(at) = seen.get(position).map(|seen| seen.revision) {
        while let Some(seen) = seen.get(position).filter(|seen| seen.revision == at) {
            match &seen.put {
                Some(record) => {
                    let value = record.json();
                    let text = |member: &str| value[member].as_str().unwrap().to_owned();
                    standing.insert(seen.key.clone(), (text("address"), text("uid")));
                }
                None => {
                    standing.remove(&seen.key);
                }
            }
            position += 1;
        }
        for (address, uid) in standing.values() {
            assert!(
                standing
                    .values()
                    .all(|(other, owner)| other != address || owner == uid),
                "revision {at}: {standing:#?}"
            );
        }
    }
    assert_eq!(addresses(&stage.pod("web-0").unwrap()), [shared]);
}

#[test]
fn an_address_that_changed_hands_while_its_registration_was_suspended() {
    let stage = Stage::new("handover");
    let _operator = stage.operator("east").start().unwrap();
    let address = "10.240.0.7";
    let take_address = |name: &str| {
        stage.patch_pod_status(
            name,
            &json!({"podIP": address, "podIPs": [{"ip": address}]}),
        );
        stage.set_condition(name, true);
    };
    stage.create_pod_by_hand("web-0", "web");
    take_address("web-0");
    stage.register("web", &json!({}));
    stage.wait_count(&stage.scope("web"), 1);
    stage.change("web", &json!({"suspend": true}));
    stage.wait_condition("web", "Ready", "False", "Suspended");
    stage.delete_pod("web-0");
    stage.create_pod_by_hand("web-1", "web");
    take_address("web-1");
    stage.wait_registration("web", "the new pod alone", |object| {
        object["status"]["pods"] == json!({"selected": 1, "ready": 1})
    });
    // The new key may not come before the old one is gone, as it is another pod's.
    let watcher = Watcher::start(&stage.etcd, "/services/");
    stage.change("web", &json!({"suspend": false, "service": "new"}));
    let new = key(&stage, "new", &format!("{address}:8080"));
    let record = stage.wait_keys("/services/", &[&new]).remove(0);
    assert_eq!(record.json()["pod"], "web-1");
    let seen = watcher.seen();
    assert!(
        seen.len() == 2 && seen[0].put.is_none() && seen[1].key == new,
        "{seen:#?}"
    );
}
