//! The control plane, and the life of pods as the project's stages play it.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testbed::{Cluster, Result, eventually};

const SOON: Duration = Duration::from_secs(20);
const PREFIX: &str = "testbed.etcd-registrar.io";

fn plane() -> &'static Cluster {
    Cluster::shared("plane").unwrap()
}

fn pods(cluster: &Cluster, namespace: &str) -> Result<Vec<Value>, String> {
    let path = format!("/api/v1/namespaces/{namespace}/pods");
    let list = cluster
        .request("GET", &path, "")
        .map_err(|error| error.to_string())?
        .ok()?;
    let list: Value = serde_json::from_str(&list).map_err(|error| error.to_string())?;
    Ok(list["items"].as_array().cloned().unwrap_or_default())
}

fn condition(pod: &Value, kind: &str) -> bool {
    pod["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == kind && condition["status"] == "True")
}

fn create(cluster: &Cluster, namespace: &str, name: &str, annotations: &Value, spec: &Value) {
    let mut spec = spec.clone();
    spec["containers"] = json!([{"name": "main", "image": "example.com/app:1"}]);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "annotations": annotations},
        "spec": spec,
    });
    let path = format!("/api/v1/namespaces/{namespace}/pods");
    cluster
        .request("POST", &path, &pod.to_string())
        .unwrap()
        .ok()
        .unwrap();
}

fn wait_pod(namespace: &str, name: &str, what: &str, check: impl Fn(&Value) -> bool) -> Value {
    let path = format!("/api/v1/namespaces/{namespace}/pods/{name}");
    eventually(SOON, what, || {
        let pod = plane()
            .request("GET", &path, "")
            .map_err(|error| error.to_string())?
            .ok()?;
        let pod: Value = serde_json::from_str(&pod).map_err(|error| error.to_string())?;
        if check(&pod) {
            Ok(pod)
        } else {
            Err(pod["status"].to_string())
        }
    })
    .unwrap()
}

fn annotate(namespace: &str, name: &str, key: &str, value: Option<&str>) {
    let path = format!("/api/v1/namespaces/{namespace}/pods/{name}");
    let patch = json!({"metadata": {"annotations": {format!("{PREFIX}/{key}"): value}}});
    plane()
        .patch(&path, &patch.to_string())
        .unwrap()
        .ok()
        .unwrap();
}

#[test]
fn a_deployment_of_three_becomes_ready_with_addresses_of_both_families() {
    let cluster = plane();
    let namespace = cluster.new_namespace("deployment").unwrap();
    cluster
        .apply(&format!(
            "apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, namespace: {namespace}}}
spec:
  replicas: 3
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec: {{containers: [{{name: web, image: example.com/web:1}}]}}
"
        ))
        .unwrap();
    cluster.wait_rollout(&namespace, "deployment/web").unwrap();
    let pods = pods(cluster, &namespace).unwrap();
    assert_eq!(pods.len(), 3);
    assert!(pods.iter().all(|pod| condition(pod, "Ready")));
    let mut addresses: Vec<_> = pods
        .iter()
        .flat_map(|pod| {
            pod["status"]["podIPs"]
                .as_array()
                .cloned()
                .unwrap_or_default()
        })
        .map(|address| address["ip"].as_str().unwrap_or_default().to_owned())
        .collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 6, "{addresses:?}");
    assert_eq!(
        addresses
            .iter()
            .filter(|address| address.contains(':'))
            .count(),
        3
    );
    cluster
        .kubectl(&["delete", "namespace", &namespace, "--timeout=60s"])
        .unwrap();
}

#[test]
fn readiness_follows_the_annotation_at_once() {
    let namespace = plane().new_namespace("ready").unwrap();
    create(plane(), &namespace, "a", &json!({}), &json!({}));
    wait_pod(&namespace, "a", "a ready pod", |pod| {
        condition(pod, "Ready")
    });
    let mut times = Vec::new();
    for ready in [false, true, false, true, false, true] {
        let start = Instant::now();
        annotate(&namespace, "a", "ready", (!ready).then_some("false"));
        wait_pod(&namespace, "a", "the readiness", |pod| {
            condition(pod, "Ready") == ready
                && condition(pod, "ContainersReady") == ready
                && pod["status"]["containerStatuses"][0]["ready"] == ready
        });
        times.push(start.elapsed());
    }
    times.sort();
    // Generous: the machine may be busy. Alone it takes 10 to 40 ms.
    assert!(times[times.len() / 2] < Duration::from_secs(1), "{times:?}");
}

#[test]
fn a_pod_created_as_not_ready_is_never_ready() {
    let namespace = plane().new_namespace("unready").unwrap();
    create(
        plane(),
        &namespace,
        "a",
        &json!({format!("{PREFIX}/ready"): "false"}),
        &json!({}),
    );
    let pod = wait_pod(&namespace, "a", "a running pod", |pod| {
        pod["status"]["phase"] == "Running"
    });
    assert!(!condition(&pod, "Ready"));
}

#[test]
fn a_start_delay_is_kept() {
    let namespace = plane().new_namespace("delay").unwrap();
    let start = Instant::now();
    create(
        plane(),
        &namespace,
        "a",
        &json!({format!("{PREFIX}/start-delay"): "1500ms"}),
        &json!({}),
    );
    let running = wait_pod(&namespace, "a", "a running pod", |pod| {
        pod["status"]["phase"] == "Running"
    });
    assert!(
        !condition(&running, "Ready") && running["status"]["podIP"].is_string(),
        "{running}"
    );
    wait_pod(&namespace, "a", "a ready pod", |pod| {
        condition(pod, "Ready")
    });
    assert!(start.elapsed() >= Duration::from_millis(1500));
}

#[test]
fn readiness_gates_hold_the_pod_back() {
    let namespace = plane().new_namespace("gate").unwrap();
    let gates = json!({"readinessGates": [{"conditionType": "example.com/lb"}]});
    create(plane(), &namespace, "a", &json!({}), &gates);
    let pod = wait_pod(&namespace, "a", "ready containers", |pod| {
        condition(pod, "ContainersReady")
    });
    assert!(!condition(&pod, "Ready"));
    let set = |status: &str| {
        let patch =
            json!({"status": {"conditions": [{"type": "example.com/lb", "status": status}]}})
                .to_string();
        plane()
            .kubectl(&[
                "patch",
                "pod",
                "a",
                "-n",
                &namespace,
                "--subresource=status",
                "-p",
                &patch,
            ])
            .unwrap();
    };
    set("True");
    wait_pod(&namespace, "a", "a ready pod", |pod| {
        condition(pod, "Ready")
    });
    set("False");
    wait_pod(&namespace, "a", "a pod that is not ready", |pod| {
        !condition(pod, "Ready")
    });
}

#[test]
fn flapping_changes_readiness_again_and_again() {
    let namespace = plane().new_namespace("flap").unwrap();
    create(
        plane(),
        &namespace,
        "a",
        &json!({format!("{PREFIX}/flap"): "100ms"}),
        &json!({}),
    );
    for _ in 0..3 {
        wait_pod(&namespace, "a", "ready", |pod| condition(pod, "Ready"));
        wait_pod(&namespace, "a", "not ready", |pod| !condition(pod, "Ready"));
    }
    annotate(&namespace, "a", "flap", None);
    wait_pod(&namespace, "a", "ready for good", |pod| {
        condition(pod, "Ready")
    });
}

#[test]
fn deletion_takes_its_time_and_at_most_the_grace_period() {
    let namespace = plane().new_namespace("delete").unwrap();
    let annotations = json!({format!("{PREFIX}/terminate-delay"): "60s"});
    create(
        plane(),
        &namespace,
        "a",
        &annotations,
        &json!({"terminationGracePeriodSeconds": 3}),
    );
    wait_pod(&namespace, "a", "a ready pod", |pod| {
        condition(pod, "Ready")
    });
    let start = Instant::now();
    plane()
        .kubectl(&["delete", "pod", "a", "-n", &namespace, "--wait=false"])
        .unwrap();
    let pod = wait_pod(&namespace, "a", "a terminating pod", |pod| {
        pod["metadata"]["deletionTimestamp"].is_string()
    });
    assert!(
        condition(&pod, "Ready"),
        "a terminating pod stays ready until its containers end"
    );
    eventually(SOON, "the end of the pod", || {
        match pods(plane(), &namespace) {
            Ok(pods) if pods.is_empty() => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
    // Its deletionTimestamp is in whole seconds.
    assert!(
        start.elapsed() >= Duration::from_millis(1900),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn a_job_completes_and_a_host_network_pod_has_its_nodes_address() {
    let namespace = plane().new_namespace("job").unwrap();
    plane()
        .apply(&format!(
            "apiVersion: batch/v1
kind: Job
metadata: {{name: once, namespace: {namespace}}}
spec:
  template:
    metadata: {{annotations: {{{PREFIX}/complete-after: 300ms}}}}
    spec: {{restartPolicy: Never, containers: [{{name: main, image: example.com/once:1}}]}}
"
        ))
        .unwrap();
    create(
        plane(),
        &namespace,
        "host",
        &json!({}),
        &json!({"hostNetwork": true}),
    );
    plane()
        .kubectl(&[
            "wait",
            "--for=condition=Complete",
            "job/once",
            "-n",
            &namespace,
            "--timeout=30s",
        ])
        .unwrap();
    let pod = wait_pod(&namespace, "host", "a ready pod", |pod| {
        condition(pod, "Ready")
    });
    assert_eq!(pod["status"]["podIP"], pod["status"]["hostIP"]);
    assert!(pod["status"]["podIP"].as_str().unwrap().starts_with("172."));
}
