//! The Helm chart, and `deploy/` beside it: both yield the same objects, which a real API server takes under restricted Pod
//! Security; wrong values are refused before anything is installed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use testbed::{Cluster, eventually, tools};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/chart");
const NAME: &str = "etcd-registrar";
const CRD: &str = "serviceregistrations.etcd-registrar.io";
const EXAMPLES: [&str; 5] = ["minimal", "tls", "namespaces", "monitoring", "large"];

/// Objects by kind, namespace and name.
type Objects = BTreeMap<(String, String, String), Value>;

fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(format!(
            "{}{stderr}",
            String::from_utf8_lossy(&output.stdout)
        ))
    }
}

fn helm(args: &[&str]) -> Result<String, String> {
    run(Command::new(tools::path("helm").unwrap()).args(args))
}

fn example(name: &str) -> String {
    format!("{CHART}/examples/{name}.yaml")
}

/// What the chart yields for a file of values.
fn template(name: &str, more: &[&str]) -> String {
    let values = example(name);
    let mut args = vec!["template", NAME, CHART, "--namespace", NAME, "-f", &values];
    args.extend(more);
    helm(&args).unwrap()
}

fn objects(yaml: &str) -> Objects {
    let mut found = Objects::new();
    for document in serde_yaml::Deserializer::from_str(yaml) {
        let object = Value::deserialize(document).unwrap();
        if object.is_null() {
            continue;
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let meta = &object["metadata"];
        let key = (
            text(&object["kind"]),
            text(&meta["namespace"]),
            text(&meta["name"]),
        );
        assert!(found.insert(key.clone(), object).is_none(), "{key:?} twice");
    }
    found
}

/// kustomize writes 1.0 as 1.
fn whole_numbers(value: &mut Value) {
    match value {
        Value::Number(number) if number.as_f64().is_some_and(|n| n.fract() == 0.0) => {
            *value = json!(number.as_f64());
        }
        Value::Array(list) => list.iter_mut().for_each(whole_numbers),
        Value::Object(members) => members.values_mut().for_each(whole_numbers),
        _ => {}
    }
}

/// Without what only Helm writes, and with the policy read.
fn plain(mut objects: Objects) -> Objects {
    objects.retain(|(kind, ..), _| kind != "Namespace");
    for object in objects.values_mut() {
        whole_numbers(object);
        let is_crd = object["kind"] == "CustomResourceDefinition";
        let meta = object["metadata"].as_object_mut().unwrap();
        if is_crd {
            meta.remove("labels");
            meta.remove("annotations");
        }
        if let Some(labels) = meta.get_mut("labels").and_then(Value::as_object_mut) {
            for ours in [
                "helm.sh/chart",
                "app.kubernetes.io/managed-by",
                "app.kubernetes.io/version",
            ] {
                labels.remove(ours);
            }
        }
        // kustomize puts what it merges before the rest.
        let pod = "/spec/template/spec";
        for list in ["containers/0/env", "containers/0/volumeMounts", "volumes"] {
            let list = object.pointer_mut(&format!("{pod}/{list}"));
            if let Some(list) = list.and_then(Value::as_array_mut) {
                list.sort_by_key(|entry| entry["name"].to_string());
            }
        }
        if let Some(policy) = object["data"]["policy.yaml"].as_str() {
            object["data"]["policy.yaml"] = serde_yaml::from_str(policy).unwrap();
        } else if object.get("data").is_some_and(Value::is_null) {
            object.as_object_mut().unwrap().remove("data");
        }
    }
    objects
}

fn kustomize(folder: &str) -> Objects {
    let path = format!("{ROOT}/{folder}");
    let mut kubectl = Command::new(tools::path("kubectl").unwrap());
    objects(&run(kubectl.args(["kustomize", &path])).unwrap())
}

#[track_caller]
fn assert_same(left: Objects, right: Objects) {
    let (left, right) = (plain(left), plain(right));
    assert!(left.len() > 1);
    let names = |objects: &Objects| objects.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&left), names(&right));
    for (key, object) in &left {
        let pretty = |object| serde_json::to_string_pretty(object).unwrap();
        let (left, right) = (pretty(object), pretty(&right[key]));
        let differs = left.lines().zip(right.lines()).find(|(l, r)| l != r);
        assert!(left == right, "{key:?}: {differs:?}");
    }
}

#[test]
fn the_chart_and_kustomize_yield_the_same_objects() {
    assert_same(objects(&template("minimal", &[])), kustomize("deploy"));
    assert_same(
        objects(&template("tls", &[])),
        kustomize("examples/kustomize"),
    );
}

#[test]
fn the_roles_of_the_chart_are_those_that_the_tests_run_under() {
    let chart = objects(&template("namespaces", &[]));
    assert!(
        chart
            .keys()
            .all(|(kind, ..)| !kind.starts_with("Cluster") && !kind.starts_with("Custom"))
    );
    let read = |file: &str| {
        let path = format!("{ROOT}/deploy/namespaced/{file}");
        objects(&std::fs::read_to_string(path).unwrap())
    };
    let role = |objects: &Objects, namespace: &str, name: &str| {
        objects[&("Role".to_owned(), namespace.to_owned(), name.to_owned())]["rules"].clone()
    };
    let watched = role(&read("watched.yaml"), "", NAME);
    for namespace in ["shop", "stock"] {
        assert_eq!(role(&chart, namespace, NAME), watched);
    }
    let identity = format!("{NAME}-identity");
    assert_eq!(
        role(&chart, NAME, &identity),
        role(&read("rbac.yaml"), NAME, &identity)
    );
    let roles = chart.keys().filter(|(kind, ..)| kind == "Role").count();
    assert_eq!(roles, 3);
}

#[test]
fn helm_finds_nothing_to_say_about_the_chart() {
    for name in EXAMPLES {
        let said = helm(&["lint", "--strict", CHART, "-f", &example(name)]).unwrap();
        assert!(said.contains("0 chart(s) failed"), "{said}");
    }
    helm(&["lint", "--strict", CHART]).unwrap();
}

#[test]
fn a_wrong_value_is_refused_with_a_message() {
    let minimal = example("minimal");
    for (set, message) in [
        ("clusterName=East", "clusterName"),
        ("clusterName=", "clusterName is needed"),
        ("etcd.endpoints=null", "etcd.endpoints is needed"),
        ("etcd.endpoints={etcd:2379}", "endpoints"),
        ("etcd.endpoints={http://user:secret@etcd:2379}", "endpoints"),
        ("etcd.endpoint=http://etcd:2379", "endpoint"),
        ("replicas=0", "replicas"),
        ("replicas=two", "replicas"),
        ("scope=all", "scope"),
        ("scope=namespaces", "namespaces"),
        ("namespaces={shop}", "namespaces"),
        ("electionTTL=500ms", "electionTTL"),
        ("etcd.auth.user=registrar", "secret"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("labels.team=4", "team"),
        ("policy.rules[0].formats=Json", "policy"),
        ("unknown=1", "unknown"),
    ] {
        let args = ["template", NAME, CHART, "-f", &minimal, "--set", set];
        let said = helm(&args).expect_err(set);
        assert!(said.contains(message), "{set}: {said}");
    }
}

/// A kind of the Prometheus Operator, as far as the API server has to know it.
fn monitoring(kind: &str) -> Value {
    let plural = format!("{}s", kind.to_lowercase());
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.monitoring.coreos.com")},
        "spec": {
            "group": "monitoring.coreos.com", "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object", "x-kubernetes-preserve-unknown-fields": true,
            }}}],
        },
    })
}

/// A cluster with a namespace that takes only what restricted Pod Security allows.
fn cluster() -> Cluster {
    let cluster = Cluster::builder("chart").start().unwrap();
    for kind in ["ServiceMonitor", "PrometheusRule"] {
        cluster.apply(&monitoring(kind).to_string()).unwrap();
    }
    for name in [NAME, "shop", "stock"] {
        cluster.kubectl(&["create", "namespace", name]).unwrap();
    }
    let restricted = "pod-security.kubernetes.io/enforce=restricted";
    cluster
        .kubectl(&["label", "namespace", NAME, restricted])
        .unwrap();
    cluster
        .kubectl(&[
            "wait",
            "--for=condition=Established",
            "crd",
            "--all",
            "--timeout=60s",
        ])
        .unwrap();
    cluster
}

#[test]
fn an_api_server_takes_every_example_and_a_release_leaves_only_the_crd() {
    let cluster = cluster();
    for name in EXAMPLES {
        let yaml = template(name, &[]);
        let dry = ["apply", "--dry-run=server", "--validate=strict", "-f", "-"];
        let said = cluster.kubectl_input(&dry, &yaml).unwrap();
        assert!(!said.contains("Warning"), "{name}: {said}");
        // Pod Security warns of workloads, and refuses pods.
        for ((kind, ..), object) in objects(&yaml) {
            if kind == "Deployment" || kind == "Job" {
                let pod = json!({
                    "apiVersion": "v1", "kind": "Pod",
                    "metadata": {"name": "dry", "namespace": NAME},
                    "spec": object["spec"]["template"]["spec"],
                });
                // The ServiceAccount is not there in a dry run.
                let mut pod = pod;
                pod["spec"]["serviceAccountName"] = "default".into();
                cluster.kubectl_input(&dry, &pod.to_string()).unwrap();
            }
        }
    }

    let kubeconfig = cluster.kubeconfig().to_str().unwrap().to_owned();
    let release = |args: &[&str]| {
        let mut all = args.to_vec();
        all.extend(["--namespace", NAME, "--kubeconfig", &kubeconfig]);
        helm(&all).unwrap()
    };
    let values = example("minimal");
    release(&["install", NAME, CHART, "-f", &values]);
    // kwok plays the kubelets: the pods are there as Kubernetes admitted them.
    cluster.wait_rollout(NAME, "deploy/etcd-registrar").unwrap();
    // The CustomResourceDefinition is upgraded with the chart ...
    let older = json!([{"op": "remove", "path": "/spec/versions/0/additionalPrinterColumns"}]);
    let patch = older.to_string();
    cluster
        .kubectl(&["patch", "crd", CRD, "--type=json", "-p", &patch])
        .unwrap();
    release(&[
        "upgrade",
        NAME,
        CHART,
        "-f",
        &values,
        "--set",
        "log.level=debug",
        "--force-conflicts",
    ]);
    let columns = cluster
        .kubectl(&[
            "get",
            "crd",
            CRD,
            "-o",
            "jsonpath={.spec.versions[0].additionalPrinterColumns[*].name}",
        ])
        .unwrap();
    assert!(columns.contains("Registered"), "{columns}");
    // ... who may edit may edit registrations ...
    cluster
        .kubectl(&[
            "create",
            "rolebinding",
            "dev",
            "--clusterrole=edit",
            "--user=dev",
            "-n",
            "shop",
        ])
        .unwrap();
    let may = |verb: &str| {
        let asked = [
            "auth",
            "can-i",
            verb,
            "serviceregistrations",
            "--as=dev",
            "-n",
            "shop",
        ];
        cluster.kubectl(&asked).map_err(|error| error.to_string())
    };
    eventually(
        Duration::from_secs(30),
        "the roles to be aggregated",
        || may("create").and_then(|_| may("list")),
    )
    .unwrap();
    // ... and nothing else is left of a release.
    release(&["uninstall", NAME]);
    let kinds =
        "deploy,cm,sa,pdb,netpol,secret,role,rolebinding,clusterrole,clusterrolebinding,crd,svc";
    let label = "app.kubernetes.io/name=etcd-registrar";
    let left = cluster
        .kubectl(&["get", kinds, "-A", "-l", label, "-o", "name"])
        .unwrap();
    assert_eq!(
        left.trim(),
        format!("customresourcedefinition.apiextensions.k8s.io/{CRD}")
    );
    // It can be installed again over what was kept.
    release(&["install", NAME, CHART, "-f", &values, "--take-ownership"]);
}
