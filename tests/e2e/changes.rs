//! Registrations whose spec changes, and two that want one key.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use testbed::{always, eventually};

use crate::support::{A_SECOND, SOON, Stage, Watcher, keys, tell};

/// Grants Plain and Grpc below `/teams/NAMESPACE/` and `grpc/NAMESPACE/`, and Json at a second place.
const POLICY: &str = r#"
rules:
  - namespaces: ["*"]
    formats: [Json]
    prefixes: ["/services/{namespace}/", "/more/{namespace}/"]
  - namespaces: ["*"]
    formats: [Plain]
    prefixes: ["/teams/{namespace}/"]
  - namespaces: ["*"]
    formats: [Grpc]
    prefixes: ["grpc/{namespace}/"]
"#;

/// Two pods `web-0` and `web-1`; gives `ADDRESS:8080` of each, sorted.
fn two_pods(stage: &Stage) -> Vec<String> {
    let mut addresses: Vec<String> = ["web-0", "web-1"]
        .iter()
        .map(|name| {
            stage.create_pod(name, "web", &json!({}), &json!({}));
            format!("{}:8080", stage.wait_ready(name)[0])
        })
        .collect();
    addresses.sort();
    addresses
}

fn below(prefix: &str, addresses: &[String]) -> Vec<String> {
    addresses
        .iter()
        .map(|address| format!("{prefix}{address}"))
        .collect()
}

#[test]
fn new_keys_stand_before_the_old_ones_go() {
    let stage = Stage::new("changes");
    let _operator = stage.operator("east").policy(POLICY).start().unwrap();
    let addresses = two_pods(&stage);
    let namespace = &stage.namespace;
    stage.register("web", &json!({}));
    let mut old = below(&format!("{}east/", stage.scope("web")), &addresses);
    stage.wait_keys(&stage.scope("web"), &old);
    for (what, spec, new) in [
        (
            "service",
            json!({"service": "shop.web"}),
            format!("/services/{namespace}/shop.web/east/"),
        ),
        (
            "prefix",
            json!({"prefix": "/more/"}),
            format!("/more/{namespace}/shop.web/east/"),
        ),
        (
            "format and prefix",
            json!({"format": {"type": "Plain"}, "prefix": format!("/teams/{namespace}/")}),
            format!("/teams/{namespace}/shop.web/"),
        ),
        (
            "format and prefix",
            json!({"format": {"type": "Grpc"}, "prefix": format!("grpc/{namespace}/")}),
            format!("grpc/{namespace}/shop.web/"),
        ),
        (
            "all of them",
            json!({"format": {"type": "Json"}, "prefix": null, "service": null}),
            format!("{}east/", stage.scope("web")),
        ),
    ] {
        let watcher = Watcher::start(&stage.etcd, "");
        stage.change("web", &spec);
        let wanted = below(&new, &addresses);
        for prefix in ["/services/", "/more/", "/teams/", "grpc/"] {
            let here: Vec<&String> = wanted
                .iter()
                .filter(|key| key.starts_with(prefix))
                .collect();
            stage.wait_keys(prefix, &here);
        }
        let seen: Vec<_> = watcher
            .seen()
            .into_iter()
            .filter(|seen| !seen.key.starts_with("/registrar/"))
            .collect();
        assert_eq!(seen.len(), 4, "{what}: {seen:#?}");
        for address in &addresses {
            let revision = |is_put: bool| {
                seen.iter()
                    .find(|seen| seen.key.ends_with(address) && seen.put.is_some() == is_put)
                    .map(|seen| seen.revision)
            };
            let (put, deleted) = (revision(true), revision(false));
            assert!(
                put.is_some() && put <= deleted,
                "{what}, {address}: {seen:#?}"
            );
        }
        stage.wait_condition("web", "Ready", "True", "Registered");
        old = wanted;
    }
    // Of all these scopes only one lease is left.
    let slots = format!("/registrar/east/leases/{}/", stage.plane.uid());
    stage.wait_count(&slots, 1);
    assert_eq!(
        stage
            .registry
            .list("")
            .iter()
            .filter(|record| !record.key.starts_with("/registrar/"))
            .count(),
        old.len()
    );

    // What the policy does not grant is refused, and what stands stays.
    let watcher = Watcher::start(&stage.etcd, "/services/");
    stage.change(
        "web",
        &json!({"format": {"type": "Plain"}, "prefix": "/others/"}),
    );
    let message = stage.wait_condition("web", "Accepted", "False", "NotGranted");
    assert!(message.contains("/others/"), "{message}");
    watcher.assert_silent("after a spec that is refused");
}

#[test]
fn a_changed_selector_touches_only_what_it_concerns() {
    let stage = Stage::new("selector");
    let _operator = stage.operator("east").start().unwrap();
    let mut wanted = below(&format!("{}east/", stage.scope("web")), &two_pods(&stage));
    stage.create_pod("api-0", "api", &json!({}), &json!({}));
    let api = format!(
        "{}east/{}:8080",
        stage.scope("web"),
        stage.wait_ready("api-0")[0]
    );
    stage.register("web", &json!({}));
    stage.wait_keys(&stage.scope("web"), &wanted);
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));
    let old = wanted.clone();
    let expressions = json!([
        {"key": "app", "operator": "In", "values": ["web", "api"]},
        {"key": "hidden", "operator": "DoesNotExist"},
    ]);
    stage.change(
        "web",
        &json!({"selector": {"matchLabels": null, "matchExpressions": expressions}}),
    );
    wanted.push(api.clone());
    wanted.sort();
    stage.wait_keys(&stage.scope("web"), &wanted);
    let seen = watcher.seen();
    assert!(seen.len() == 1 && seen[0].key == api, "{seen:#?}");

    // A label that hides a pod, and one that does not matter.
    watcher.forget();
    stage.patch_pod("web-0", &json!({"metadata": {"labels": {"other": "x"}}}));
    stage.patch_pod("api-0", &json!({"metadata": {"labels": {"hidden": "yes"}}}));
    stage.wait_keys(&stage.scope("web"), &old);
    let seen = watcher.seen();
    assert!(
        seen.len() == 1 && seen[0].key == api && seen[0].put.is_none(),
        "{seen:#?}"
    );
    stage.patch_pod("api-0", &json!({"metadata": {"labels": {"hidden": null}}}));
    stage.wait_keys(&stage.scope("web"), &wanted);

    stage.change(
        "web",
        &json!({"selector": {"matchLabels": {"app": "web"}, "matchExpressions": null}}),
    );
    stage.wait_keys(&stage.scope("web"), &old);
    let seen = watcher.seen();
    assert!(seen.iter().all(|seen| seen.key == api), "{seen:#?}");
}

#[test]
fn a_changed_ttl_is_one_put_for_each_key() {
    let stage = Stage::new("ttl");
    let _operator = stage.operator("east").start().unwrap();
    let wanted = below(&format!("{}east/", stage.scope("web")), &two_pods(&stage));
    stage.register("web", &json!({}));
    let old = stage.wait_keys(&stage.scope("web"), &wanted);
    assert_eq!(stage.registry.ttl(old[0].lease).0, 60);
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));
    stage.change("web", &json!({"leaseTTLSeconds": 30}));
    let new = eventually(SOON, "the new TTL", || {
        let records = stage.registry.try_list(&stage.scope("web"))?;
        if records.iter().all(|record| record.lease != old[0].lease) {
            Ok(records)
        } else {
            Err(format!("{records:#?}"))
        }
    })
    .unwrap();
    assert_eq!(keys(&new), wanted);
    for (new, old) in new.iter().zip(&old) {
        assert_eq!(stage.registry.ttl(new.lease).0, 30);
        assert_eq!(new.value, old.value);
        assert_eq!(new.created, old.created);
    }
    let seen = watcher.seen();
    assert!(
        seen.len() == 2 && seen.iter().all(|seen| seen.put.is_some()),
        "{seen:#?}"
    );
    // The old lease is given back.
    eventually(SOON, "the old lease to go", || {
        if stage.registry.leases().contains(&old[0].lease) {
            Err("it is there")
        } else {
            Ok(())
        }
    })
    .unwrap();
    assert_eq!(watcher.seen().len(), 2);
}

#[test]
fn a_suspended_registration_keeps_what_it_has() {
    let stage = Stage::new("suspend");
    let _operator = stage.operator("east").start().unwrap();
    let wanted = below(&format!("{}east/", stage.scope("web")), &two_pods(&stage));
    stage.register("web", &json!({}));
    stage.wait_keys(&stage.scope("web"), &wanted);
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));
    stage.change("web", &json!({"suspend": true}));
    stage.wait_condition("web", "Ready", "False", "Suspended");
    stage.set_ready("web-0", false);
    stage.create_pod("web-2", "web", &json!({}), &json!({}));
    let new = format!(
        "{}east/{}:8080",
        stage.scope("web"),
        stage.wait_ready("web-2")[0]
    );
    stage.wait_registration("web", "the changed counts", |object| {
        object["status"]["pods"] == json!({"selected": 3, "ready": 2})
    });
    always(Duration::from_millis(500), "no event", || {
        watcher.assert_silent("while suspended");
        Ok::<_, String>(())
    })
    .unwrap();
    stage.change("web", &json!({"suspend": null}));
    let gone = format!(
        "{}east/{}:8080",
        stage.scope("web"),
        stage.pod_address("web-0")
    );
    let mut now: Vec<String> = wanted.into_iter().filter(|key| *key != gone).collect();
    now.push(new);
    stage.wait_keys(&stage.scope("web"), &now);
    assert_eq!(watcher.seen().len(), 2);
}

#[test]
fn a_format_without_pod_names_that_changed_while_no_operator_ran() {
    let stage = Stage::new("unnamed");
    let operator = stage
        .operator("east")
        .policy(POLICY)
        .election_ttl("2s")
        .start()
        .unwrap();
    let addresses = two_pods(&stage);
    let prefix = format!("/teams/{}/", stage.namespace);
    stage.register(
        "web",
        &json!({"format": {"type": "Plain"}, "prefix": prefix}),
    );
    stage.wait_keys("/teams/", &below(&format!("{prefix}web/"), &addresses));
    operator.kill().unwrap();
    stage.change("web", &json!({"service": "new"}));
    operator.start().unwrap();
    stage.wait_keys("/teams/", &below(&format!("{prefix}new/"), &addresses));
    stage.wait_condition("web", "Ready", "True", "Registered");
}

#[test]
fn records_beyond_256_get_a_second_lease_and_all_of_them_go() {
    let stage = Stage::new("slots");
    let _operator = stage.operator("east").start().unwrap();
    for number in 0..9 {
        stage.create_pod(&format!("web-{number}"), "web", &json!({}), &json!({}));
    }
    for number in 0..9 {
        stage.wait_ready(&format!("web-{number}"));
    }
    let ports: Vec<Value> = (0..16)
        .map(|number| json!({"name": format!("p{number}"), "port": 9000 + number}))
        .collect();
    let spec = json!({"ports": ports, "addressFamilies": ["IPv4", "IPv6"]});
    stage.register("web", &spec);
    let records = stage.wait_count(&stage.scope("web"), 9 * 16 * 2);
    let mut sizes = BTreeMap::new();
    for record in &records {
        *sizes.entry(record.lease).or_insert(0) += 1;
    }
    assert!(
        sizes.len() == 2 && sizes.values().all(|size| *size <= 256),
        "{sizes:?}"
    );
    stage.wait_registration("web", "all of them", |object| {
        object["status"]["registered"] == 288
            && object["status"]["endpoints"].as_array().map(Vec::len) == Some(100)
    });
    stage.unregister("web");
    stage.wait_keys::<&str>("/services/", &[]);
    eventually(SOON, "the leases to go", || {
        let left = stage.registry.leases();
        if sizes.keys().any(|lease| left.contains(lease)) {
            Err(format!("{left:?}"))
        } else {
            Ok(())
        }
    })
    .unwrap();
}

#[test]
fn the_records_go_with_the_crd_and_come_with_it() {
    let stage = Stage::new("crd");
    let operator = stage.operator("east").start().unwrap();
    let wanted = below(&format!("{}east/", stage.scope("web")), &two_pods(&stage));
    stage.register("web", &json!({}));
    stage.wait_keys(&stage.scope("web"), &wanted);
    let crd = "customresourcedefinition/serviceregistrations.etcd-registrar.io";
    stage.kubectl(&["delete", crd, "--timeout=30s"]);
    stage.wait_keys::<&str>("/services/", &[]);
    // The 404 is no list, and no reason to end.
    let pods = ["web-2", "web-3"];
    for name in pods {
        stage.create_pod(name, "web", &json!({}), &json!({}));
        stage.wait_ready(name);
    }
    assert!(operator.process().is_running());
    stage.plane.apply_deploy();
    stage.register("web", &json!({}));
    stage.wait_count(&stage.scope("web"), 4);
}

#[test]
fn of_two_registrations_that_want_one_key_the_older_has_it() {
    let stage = Stage::new("older");
    let _operator = stage.operator("east").start().unwrap();
    let wanted = below(
        &format!("{}east/", stage.scope("shared")),
        &two_pods(&stage),
    );
    let spec = json!({"service": "shared", "selector": {"matchLabels": {"app": "web"}}});
    stage.register("z-old", &spec);
    let before = stage.wait_keys(&stage.scope("shared"), &wanted);
    wait_for_a_later_second(&stage.registration("z-old"));
    let watcher = Watcher::start(&stage.etcd, &stage.scope("shared"));
    // It would win by its name.
    stage.register("a-new", &spec);
    let message = stage.wait_condition("a-new", "Conflict", "True", "OtherRegistration");
    assert!(
        message.contains("z-old") && message.contains(&wanted[0]),
        "{message}"
    );
    stage.wait_condition("a-new", "Ready", "False", "Conflicting");
    stage.wait_condition("z-old", "Ready", "True", "Registered");
    stage.wait_condition("z-old", "Conflict", "False", "NoConflict");
    assert_eq!(stage.registration("a-new")["status"]["registered"], 0);
    watcher.assert_silent("after a younger registration");

    let gone = Instant::now();
    stage.unregister("z-old");
    eventually(A_SECOND, "the younger one's lease", || {
        let records = stage.registry.try_list(&stage.scope("shared"))?;
        if keys(&records) == wanted && records.iter().all(|record| record.lease != before[0].lease)
        {
            Ok(())
        } else {
            Err(format!("{records:#?}"))
        }
    })
    .unwrap();
    stage.wait_condition("a-new", "Conflict", "False", "NoConflict");
    stage.wait_condition("a-new", "Ready", "True", "Registered");
    // A reader sees no gap.
    let seen = watcher.seen();
    assert!(seen.iter().all(|seen| seen.put.is_some()), "{seen:#?}");
    tell(
        "two registrations want one key, and the older goes",
        seen.len(),
        seen.last().unwrap().at.saturating_duration_since(gone),
    );
}

/// Creation times have whole seconds.
pub(crate) fn wait_for_a_later_second(object: &Value) {
    let created = object["metadata"]["creationTimestamp"]
        .as_str()
        .unwrap()
        .to_owned();
    eventually(SOON, "the next second", || {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let created: k8s_openapi::jiff::Timestamp = created.parse().map_err(|_| created.clone())?;
        if i64::try_from(now).unwrap_or(0) > created.as_second() {
            Ok(())
        } else {
            Err(created.to_string())
        }
    })
    .unwrap();
}
