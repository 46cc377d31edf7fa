//! The rights that `deploy/` gives are those that the operator uses: no fewer and no more.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use testbed::{Cluster, Etcd, Operator, always, eventually};

use crate::support::{BINARY, SOON, get, registration};

const USER: &str = "system:serviceaccount:etcd-registrar:etcd-registrar";

/// A right: the namespace where it is of one, API group, resource with its subresource, verb, and the name where it is for
/// one object.
pub(super) type Right = (String, String, String, String, String);

/// What the ClusterRole of `deploy/` grants.
fn granted(cluster: &Cluster) -> BTreeSet<Right> {
    granted_by(
        cluster,
        "",
        "/apis/rbac.authorization.k8s.io/v1/clusterroles/etcd-registrar",
    )
}

/// What a role at a path grants in a namespace, or in all.
pub(super) fn granted_by(cluster: &Cluster, namespace: &str, path: &str) -> BTreeSet<Right> {
    let role = get(cluster, path).unwrap();
    let list = |value: &Value| -> Vec<String> {
        value
            .as_array()
            .into_iter()
            .flatten()
            .map(|text| text.as_str().unwrap().to_owned())
            .collect()
    };
    let mut rights = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        assert!(rule["nonResourceURLs"].is_null(), "{rule}");
        let mut names = list(&rule["resourceNames"]);
        if names.is_empty() {
            names.push(String::new());
        }
        for group in list(&rule["apiGroups"]) {
            for resource in list(&rule["resources"]) {
                for verb in list(&rule["verbs"]) {
                    for name in &names {
                        rights.insert((
                            namespace.to_owned(),
                            group.clone(),
                            resource.clone(),
                            verb.clone(),
                            name.clone(),
                        ));
                    }
                }
            }
        }
    }
    rights
}

/// What the operator has asked the API server for, and what of it was refused for want of a right.
fn asked(log: &Path, granted: &BTreeSet<Right>) -> Result<(BTreeSet<Right>, Vec<String>), String> {
    let text = std::fs::read_to_string(log).map_err(|error| error.to_string())?;
    let mut rights = BTreeSet::new();
    let mut refused = Vec::new();
    // The last line may be half written.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for line in whole.lines() {
        let entry: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
        assert_eq!(entry["user"]["username"], USER);
        let uri = &entry["requestURI"];
        if entry["responseStatus"]["code"] == 403 {
            refused.push(format!("{} {uri}", entry["verb"]));
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let object = &entry["objectRef"];
        assert!(object.is_object(), "a request for no resource: {uri}");
        let mut resource = text(&object["resource"]);
        if let Some(sub) = object["subresource"].as_str() {
            resource += "/";
            resource += sub;
        }
        let mut right = (
            text(&object["namespace"]),
            text(&object["apiGroup"]),
            resource,
            text(&entry["verb"]),
            text(&object["name"]),
        );
        // The name counts where the right is for one object only, and the namespace where it is of one.
        if !granted.iter().any(|known| known.4 == right.4) {
            right.4.clear();
        }
        if granted.iter().all(|known| known.0.is_empty()) {
            right.0.clear();
        }
        rights.insert(right);
    }
    Ok((rights, refused))
}

/// The operator uses what was granted, and nothing else.
pub(super) fn check_used(log: &Path, granted: &BTreeSet<Right>) {
    let check = || {
        let (asked, refused) = asked(log, granted)?;
        assert!(refused.is_empty(), "missing rights: {refused:#?}");
        let needless: Vec<_> = granted.difference(&asked).collect();
        if needless.is_empty() {
            let more: Vec<_> = asked.difference(granted).collect();
            assert!(more.is_empty(), "granted by another role: {more:#?}");
            return Ok(());
        }
        Err(format!("granted and never used: {needless:#?}"))
    };
    eventually(SOON, "every right to be used", check).unwrap();
    // Nor is anything refused a little later, such as an event that is written behind the rest.
    always(Duration::from_secs(1), "no right is missing", check).unwrap();
}

/// A pod labelled `app: web` that is ready, where nothing runs pods.
pub(super) fn create_ready_pod(cluster: &Cluster, namespace: &str, name: &str, address: &str) {
    let pods = format!("/api/v1/namespaces/{namespace}/pods");
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "containers": [{"name": "main", "image": "example.com/web:1"}]},
    });
    let created = cluster.request("POST", &pods, &pod.to_string()).unwrap();
    created.ok().unwrap();
    let status = json!({"status": {
        "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True"}],
    }});
    let path = format!("{pods}/{name}/status");
    let patched = cluster.patch(&path, &status.to_string()).unwrap();
    patched.ok().unwrap();
}

/// An API server that writes down what the operator asks it for, and where.
pub(super) fn audited(folder: &Path) -> (Cluster, PathBuf) {
    let log = folder.join("audit.log");
    let policy = folder.join("audit.yaml");
    let rules = json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata", "users": [USER]}],
    });
    std::fs::write(&policy, rules.to_string()).unwrap();
    let cluster = Cluster::builder("audited")
        .api_only()
        .apiserver_args([
            format!("--audit-policy-file={}", policy.display()),
            format!("--audit-log-path={}", log.display()),
            // Streaming lists are watches; an API server that has none is asked for pages. The operator needs both.
            "--feature-gates=WatchList=false".to_owned(),
        ])
        .start()
        .unwrap();
    (cluster, log)
}

#[test]
fn deploy_grants_what_the_operator_uses_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (cluster, log) = audited(folder.path());
    let deploy = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy");
    cluster.kubectl(&["apply", "-k", deploy]).unwrap();
    cluster
        .kubectl(&[
            "wait",
            "--for=condition=Established",
            "crd/serviceregistrations.etcd-registrar.io",
            "--timeout=60s",
        ])
        .unwrap();
    let etcd = Etcd::builder("audited").unsafe_no_fsync().start().unwrap();
    let namespace = cluster.new_namespace("shop").unwrap();
    let create = |path: &str, body: &Value| {
        let answer = cluster.request("POST", path, &body.to_string()).unwrap();
        answer.ok().unwrap()
    };
    create(
        "/api/v1/nodes",
        &json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}),
    );
    create_ready_pod(&cluster, &namespace, "web-0", "10.1.2.3");
    let registrations =
        format!("/apis/etcd-registrar.io/v1alpha1/namespaces/{namespace}/serviceregistrations");
    create(&registrations, &registration("web", &json!({})));
    // What is refused is told by an event of its own.
    create(
        &registrations,
        &registration("elsewhere", &json!({"prefix": "/elsewhere/"})),
    );

    let kubeconfig = cluster
        .kubeconfig_for_service_account("etcd-registrar", "etcd-registrar")
        .unwrap();
    let operator = |name: &str| {
        Operator::builder(BINARY, name)
            .kubeconfig(&kubeconfig)
            .etcd(&etcd)
    };
    // Two replicas, as in `deploy/`; the first gives way to the second.
    let first = operator("east").start().unwrap();
    let second = operator("east").start().unwrap();
    let condition = |name: &str, kind: &str, status: &str| {
        eventually(SOON, &format!("{name}: {kind}={status}"), || {
            let object = get(&cluster, &format!("{registrations}/{name}"))?;
            if crate::support::condition(&object, kind)["status"] == status {
                Ok(())
            } else {
                Err(object["status"].to_string())
            }
        })
        .unwrap();
    };
    condition("web", "Ready", "True");
    condition("elsewhere", "Accepted", "False");
    first.stop().unwrap();
    let patch = json!({"spec": {"weight": 7}});
    let path = format!("{registrations}/web");
    cluster
        .patch(&path, &patch.to_string())
        .unwrap()
        .ok()
        .unwrap();
    eventually(SOON, "the second replica to lead", || {
        let leads = second.metric("etcd_registrar_leader", &[]);
        match leads.map_err(|error| error.to_string())? {
            1.0 => Ok(()),
            other => Err(other.to_string()),
        }
    })
    .unwrap();
    condition("web", "Ready", "True");

    check_used(&log, &granted(&cluster));
    let log = second.log();
    assert!(!log.contains("forbidden"), "{log}");
}
