//! What the API server takes and refuses: the table `tests/data/objects.yaml`, and the same objects past its checks.

use std::fmt::Write as _;
use std::time::Instant;

use serde_json::{Value, json};
use testbed::{Cluster, Response, eventually};

use crate::support::{SOON, Stage, condition, get, tell};

/// An object of the table.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) spec: Value,
    /// What the API server's message holds; `None`: it takes the object.
    pub(crate) refused: Option<String>,
}

/// The table, with its lists expanded.
pub(crate) fn table() -> Vec<Case> {
    let entries: Vec<Value> = serde_yaml::from_str(include_str!("../data/objects.yaml")).unwrap();
    entries
        .into_iter()
        .map(|mut entry| {
            if let Some(count) = entry["repeat"]["count"].as_u64() {
                let list: Vec<String> = (0..count).map(|n| format!("l{n}")).collect();
                let mut path = String::from("/spec");
                let mut last = String::new();
                for part in entry["repeat"]["path"].as_array().unwrap() {
                    if !last.is_empty() {
                        write!(path, "/{last}").unwrap();
                    }
                    last = part.as_str().unwrap().to_owned();
                }
                entry.pointer_mut(&path).unwrap()[last.as_str()] = json!(list);
            }
            Case {
                name: entry["name"].as_str().unwrap().to_owned(),
                spec: entry["spec"].clone(),
                refused: entry["refused"].as_str().map(str::to_owned),
            }
        })
        .collect()
}

/// Creates a registration, or only tries to.
pub(crate) fn create(stage: &Stage, name: &str, spec: &Value, query: &str) -> Response {
    let object = json!({
        "apiVersion": "etcd-registrar.io/v1alpha1",
        "kind": "ServiceRegistration",
        "metadata": {"name": name},
        "spec": spec,
    });
    let path = format!(
        "/apis/etcd-registrar.io/v1alpha1/namespaces/{}/serviceregistrations{query}",
        stage.namespace
    );
    stage
        .plane
        .cluster
        .request("POST", &path, &object.to_string())
        .unwrap()
}

#[test]
fn the_api_server_takes_what_is_valid_and_says_of_the_rest_what_to_write() {
    let stage = Stage::new("objects");
    let cases = table();
    assert!(cases.iter().filter(|case| case.refused.is_none()).count() >= 8);
    assert!(cases.iter().filter(|case| case.refused.is_some()).count() > 40);
    let mut wrong = Vec::new();
    for case in cases {
        let answer = create(
            &stage,
            &case.name,
            &case.spec,
            "?dryRun=All&fieldValidation=Strict",
        );
        let message = serde_json::from_str::<Value>(&answer.body)
            .ok()
            .and_then(|body| Some(body["message"].as_str()?.to_owned()));
        match (&case.refused, answer.status) {
            (None, 201) => {}
            // One rule speaks at a time where it can: a person reads the first one.
            (Some(part), 422) if message.as_ref().is_some_and(|said| said.contains(part)) => {}
            (expected, status) => {
                wrong.push(format!(
                    "{}: HTTP {status}: {message:?}, expected {expected:?}",
                    case.name
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

const DEFINITION: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/serviceregistrations.etcd-registrar.io";

/// The API server takes any spec, as one whose definition is newer or older might. Dropping it puts the rules back.
pub(crate) struct AnySpec {
    cluster: &'static Cluster,
    before: Value,
}

impl AnySpec {
    pub(crate) fn new(stage: &Stage) -> Self {
        let cluster = stage.plane.cluster;
        let before = get(cluster, DEFINITION).unwrap();
        let mut relaxed = before.clone();
        relaxed["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] =
            json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        replace(cluster, &relaxed);
        let this = Self { cluster, before };
        // The new rules are in force a little after the answer.
        eventually(SOON, "a definition that takes any spec", || {
            create(stage, "any", &json!({"any": "spec"}), "?dryRun=All").ok()
        })
        .unwrap();
        this
    }
}

impl Drop for AnySpec {
    fn drop(&mut self) {
        replace(self.cluster, &self.before);
    }
}

fn replace(cluster: &Cluster, definition: &Value) {
    let mut definition = definition.clone();
    // Whatever the definition is by now, this is what it is to be.
    definition["metadata"]
        .as_object_mut()
        .unwrap()
        .remove("resourceVersion");
    definition["metadata"]["resourceVersion"] =
        get(cluster, DEFINITION).unwrap()["metadata"]["resourceVersion"].clone();
    cluster
        .request("PUT", DEFINITION, &definition.to_string())
        .unwrap()
        .ok()
        .unwrap();
}

#[test]
fn what_the_api_server_should_have_refused_has_a_condition_and_holds_nobody_up() {
    let stage = Stage::new("past-the-rules");
    let operator = stage.operator("east").start().unwrap();
    let any_spec = AnySpec::new(&stage);
    let mut cases: Vec<Case> = table()
        .into_iter()
        .filter(|case| case.refused.is_some())
        .collect();
    for (name, spec) in [
        ("nothing", json!({})),
        ("numbers", json!({"selector": 1, "ports": "x"})),
        (
            "format-of-tomorrow",
            json!({
                "selector": {"matchLabels": {"app": "web"}},
                "ports": [{"name": "http", "port": 8080}],
                "format": {"type": "Apisix"},
            }),
        ),
    ] {
        cases.push(Case {
            name: name.to_owned(),
            spec,
            refused: Some(String::new()),
        });
    }
    for case in &cases {
        create(&stage, &case.name, &case.spec, "").ok().unwrap();
    }
    // The rules are back before the statuses are written, at least for some: old objects have to be told of, too.
    drop(any_spec);
    stage.register("fine", &json!({}));
    stage.create_pod("fine-0", "fine", &json!({}), &json!({}));
    let address = stage.wait_ready("fine-0").remove(0);
    stage.wait_keys(
        "/services/",
        &[format!("{}east/{address}:8080", stage.scope("fine"))],
    );
    let mut wrong = Vec::new();
    for case in &cases {
        let object = stage.wait_registration(&case.name, "a condition", |object| {
            condition(object, "Accepted")["status"].is_string()
        });
        let accepted = condition(&object, "Accepted");
        let message = accepted["message"].as_str().unwrap_or_default();
        let reason = accepted["reason"].as_str().unwrap_or_default();
        // One family twice reads as once: the API server says so only because it can.
        if case.name == "family-twice" && accepted["status"] == "True" {
            continue;
        }
        if accepted["status"] != "False"
            || !["Invalid", "Unreadable", "ReservedPrefix"].contains(&reason)
            || message.len() < 20
        {
            wrong.push(format!("{}: {accepted}", case.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let log = operator.log();
    assert!(!log.contains("panicked"), "{log}");
    // They go like any other.
    stage.kubectl(&["delete", "sreg", "--all"]);
    stage.wait_keys::<&str>("/services/", &[]);
}

#[test]
fn a_spec_that_is_refused_later_or_cannot_be_read_keeps_its_records() {
    let stage = Stage::new("later-refused");
    let operator = stage.operator("east").start().unwrap();
    for name in ["edited", "newer"] {
        stage.register(name, &json!({}));
        for pod in 0..2 {
            stage.create_pod(&format!("{name}-{pod}"), name, &json!({}), &json!({}));
        }
        stage.wait_count(&stage.scope(name), 2);
        stage.wait_condition(name, "Ready", "True", "Registered");
    }
    let watcher = crate::support::Watcher::start(&stage.etcd, "/services/");

    // Refused by the policy: the prefix is nobody's.
    stage.change("edited", &json!({"prefix": "/elsewhere/"}));
    let said = stage.wait_condition("edited", "Accepted", "False", "NotGranted");
    assert!(said.contains("/elsewhere/"), "{said}");
    let said = stage.wait_condition("edited", "Ready", "False", "NotAccepted");
    assert!(said.contains("2 endpoints stay registered"), "{said}");

    // Written by a newer version.
    let any_spec = AnySpec::new(&stage);
    stage.change("newer", &json!({"format": {"type": "Consul"}}));
    let said = stage.wait_condition("newer", "Accepted", "False", "Unreadable");
    assert!(said.contains("Consul") && said.contains("Json"), "{said}");

    // Nor does a restart change anything, with only the records left to know them by.
    operator.kill().unwrap();
    operator.start().unwrap();
    // A pod of each comes and another registration is served: so the new process has done its work.
    stage.create_pod("edited-2", "edited", &json!({}), &json!({}));
    stage.create_pod("newer-2", "newer", &json!({}), &json!({}));
    stage.register("fine", &json!({}));
    stage.create_pod("fine-0", "fine", &json!({}), &json!({}));
    stage.wait_ready("edited-2");
    stage.wait_ready("newer-2");
    stage.wait_count(&stage.scope("fine"), 1);
    let fine = stage.scope("fine");
    let others: Vec<_> = watcher
        .seen()
        .into_iter()
        .filter(|seen| !seen.key.starts_with(&fine))
        .collect();
    assert!(others.is_empty(), "{others:#?}");

    // Readable and granted again: what stands is right, and the new pod is added.
    let mended = Instant::now();
    stage.change("edited", &json!({"prefix": null}));
    let edited = stage.scope("edited");
    let added = watcher.wait("the new pod", |seen| seen.key.starts_with(&edited));
    tell(
        "a spec edited into one that is refused",
        others.len(),
        added.at.saturating_duration_since(mended),
    );
    stage.wait_count(&edited, 3);
    stage.wait_condition("edited", "Ready", "True", "Registered");
    // Deleted while it cannot be read: seen as well.
    stage.unregister("newer");
    stage.wait_keys::<&str>(&stage.scope("newer"), &[]);
    let seen = watcher.seen();
    let of = |name: &str| {
        let scope = stage.scope(name);
        seen.iter()
            .filter(|seen| seen.key.starts_with(&scope))
            .map(|seen| seen.put.is_some())
            .collect::<Vec<_>>()
    };
    assert_eq!(of("edited"), [true]);
    assert_eq!(of("newer"), [false, false]);
    drop(any_spec);
}
