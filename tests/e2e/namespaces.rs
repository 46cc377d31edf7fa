//! An operator that watches only some namespaces, with Roles and without a ClusterRole.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use testbed::{Cluster, Etcd, Operator, OperatorBuilder, always, eventually};

use super::rbac::{audited, check_used, create_ready_pod, granted_by};
use crate::support::{BINARY, SOON, Watcher, condition, get, registration};
use crate::support::{Registry, keys};

const WATCHED: &str = include_str!("../../deploy/namespaced/watched.yaml");
const HOME: &str = "etcd-registrar";
const ROLES: &str = "/apis/rbac.authorization.k8s.io/v1/namespaces";

/// A cluster of its own with the Roles of `deploy/namespaced/`, and an etcd.
struct World {
    cluster: Cluster,
    etcd: Etcd,
    registry: Registry,
    kubeconfig: PathBuf,
}

impl World {
    fn on(cluster: Cluster, namespaces: &[&str]) -> Self {
        let path = |name| format!("{}/{name}", env!("CARGO_MANIFEST_DIR"));
        cluster.kubectl(&["apply", "-k", &path("crds")]).unwrap();
        cluster.kubectl(&["create", "namespace", HOME]).unwrap();
        cluster
            .kubectl(&["apply", "-f", &path("deploy/namespaced/rbac.yaml")])
            .unwrap();
        for name in namespaces {
            cluster.kubectl(&["create", "namespace", name]).unwrap();
        }
        cluster
            .kubectl(&[
                "wait",
                "--for=condition=Established",
                "crd/serviceregistrations.etcd-registrar.io",
                "--timeout=60s",
            ])
            .unwrap();
        let etcd = Etcd::builder("namespaces")
            .unsafe_no_fsync()
            .start()
            .unwrap();
        let kubeconfig = cluster.kubeconfig_for_service_account(HOME, HOME).unwrap();
        Self {
            registry: Registry::connect(&etcd),
            cluster,
            etcd,
            kubeconfig,
        }
    }

    fn new(namespaces: &[&str]) -> Self {
        let cluster = Cluster::builder("namespaces").api_only().start().unwrap();
        Self::on(cluster, namespaces)
    }

    fn operator(&self, namespaces: &[&str]) -> OperatorBuilder {
        let flags = namespaces.iter().map(|name| format!("--namespace={name}"));
        Operator::builder(BINARY, "east")
            .kubeconfig(&self.kubeconfig)
            .etcd(&self.etcd)
            .election_ttl("2s")
            .args(flags)
    }

    /// Grants what the operator needs in a namespace that it watches.
    fn grant(&self, namespace: &str) {
        let apply = ["apply", "--namespace", namespace, "--filename", "-"];
        self.cluster.kubectl_input(&apply, WATCHED).unwrap();
    }

    fn revoke(&self, namespace: &str) {
        let delete = ["delete", "rolebinding", HOME, "--namespace", namespace];
        self.cluster.kubectl(&delete).unwrap();
    }

    /// A registration `web` whose leases end soon.
    fn register(&self, namespace: &str) {
        let path =
            format!("/apis/etcd-registrar.io/v1alpha1/namespaces/{namespace}/serviceregistrations");
        let body = registration("web", &json!({"leaseTTLSeconds": 5}));
        let created = self.cluster.request("POST", &path, &body.to_string());
        created.unwrap().ok().unwrap();
    }

    fn status(&self, namespace: &str) -> Value {
        let path = format!(
            "/apis/etcd-registrar.io/v1alpha1/namespaces/{namespace}/serviceregistrations/web"
        );
        get(&self.cluster, &path).unwrap()
    }

    /// A ready pod, and the key that stands for it.
    fn pod(&self, namespace: &str, name: &str, address: &str) -> String {
        create_ready_pod(&self.cluster, namespace, name, address);
        key(namespace, address)
    }

    fn delete_pod(&self, namespace: &str, name: &str) {
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}?gracePeriodSeconds=0");
        let deleted = self.cluster.request("DELETE", &path, "").unwrap();
        deleted.ok().unwrap();
    }

    fn wait(&self, wanted: &[&String]) {
        self.registry.wait_keys(SOON, "/services/", wanted);
    }
}

fn key(namespace: &str, address: &str) -> String {
    format!("/services/{namespace}/web/east/{address}:8080")
}

#[test]
fn roles_grant_what_an_operator_of_two_namespaces_uses_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (cluster, log) = audited(folder.path());
    let world = World::on(cluster, &["shop", "stock", "other"]);
    for namespace in ["shop", "stock"] {
        world.grant(namespace);
    }
    for namespace in ["shop", "stock", "other"] {
        world.register(namespace);
    }
    let shop = world.pod("shop", "web-0", "10.1.2.3");
    let stock = world.pod("stock", "web-0", "10.1.2.4");
    world.pod("other", "web-0", "10.1.2.5");
    let first = world.operator(&["shop", "stock"]).start().unwrap();
    let second = world.operator(&["shop", "stock"]).start().unwrap();
    world.wait(&[&shop, &stock]);
    for namespace in ["shop", "stock"] {
        eventually(SOON, "the status", || {
            let ready = condition(&world.status(namespace), "Ready");
            if ready["status"] == "True" {
                Ok(())
            } else {
                Err(ready.to_string())
            }
        })
        .unwrap();
    }
    assert!(world.status("other")["status"].is_null());

    // A failover, and a change in each namespace after it.
    let watcher = Watcher::start(&world.etcd, "/services/");
    first.kill().unwrap();
    let another = world.pod("stock", "web-1", "10.1.2.6");
    world.wait(&[&shop, &another, &stock]);
    world.delete_pod("shop", "web-0");
    world.wait(&[&another, &stock]);
    let seen = watcher.seen();
    let changed: Vec<&String> = seen.iter().map(|seen| &seen.key).collect();
    assert_eq!(changed, [&another, &shop], "{seen:#?}");

    let mut granted = granted_by(
        &world.cluster,
        HOME,
        &format!("{ROLES}/{HOME}/roles/{HOME}-identity"),
    );
    for namespace in ["shop", "stock"] {
        granted.extend(granted_by(
            &world.cluster,
            namespace,
            &format!("{ROLES}/{namespace}/roles/{HOME}"),
        ));
    }
    check_used(&log, &granted);
    let log = second.log();
    assert!(log.contains("only these namespaces are watched"), "{log}");
}

#[test]
fn nothing_is_removed_before_every_namespace_was_listed() {
    let world = World::new(&["shop", "stock"]);
    for namespace in ["shop", "stock"] {
        world.grant(namespace);
        world.register(namespace);
    }
    let shop = world.pod("shop", "web-0", "10.1.2.3");
    let stock = world.pod("stock", "web-0", "10.1.2.4");
    let operator = world.operator(&["shop", "stock"]).start().unwrap();
    world.wait(&[&shop, &stock]);
    operator.stop().unwrap();

    // What is gone in one namespace stays registered as long as the other can't be listed.
    let watcher = Watcher::start(&world.etcd, "/services/");
    world.delete_pod("shop", "web-0");
    world.revoke("stock");
    let operator = world.operator(&["shop", "stock"]).spawn().unwrap();
    let waits = || {
        let answer = operator.get("/readyz").map_err(|error| error.to_string())?;
        let says = format!("{} {}", answer.status, answer.body);
        if answer.status != 200 && says.contains("in the namespace stock") {
            Ok(())
        } else {
            Err(says)
        }
    };
    eventually(SOON, "the namespace that can't be read to be named", waits).unwrap();
    always(Duration::from_secs(7), "it is not ready", || {
        waits().map(|()| watcher.assert_silent("a namespace can't be listed"))
    })
    .unwrap();
    world.grant("stock");
    world.wait(&[&stock]);
    let seen = watcher.seen();
    assert!(seen.iter().all(|seen| seen.key == shop), "{seen:#?}");

    // Once all was listed, a namespace that can't be read any more stays as it is, and stops no other: not even when
    // every watch has to begin anew.
    watcher.forget();
    world.revoke("stock");
    world.cluster.kill_apiserver().unwrap();
    world.cluster.start_apiserver().unwrap();
    eventually(SOON, "the refusal", || {
        let log = operator.log_of_run();
        let refused = log.contains("can't watch pods of namespace stock");
        if refused { Ok(()) } else { Err(log) }
    })
    .unwrap();
    let back = world.pod("shop", "web-1", "10.1.2.7");
    world.wait(&[&back, &stock]);
    world.delete_pod("shop", "web-1");
    world.wait(&[&stock]);
    let seen = watcher.seen();
    assert!(seen.iter().all(|seen| seen.key == back), "{seen:#?}");
}

#[test]
fn a_namespace_that_is_not_watched_any_more_ends_with_its_leases_and_not_before() {
    let world = World::new(&["shop", "stock"]);
    for namespace in ["shop", "stock"] {
        world.grant(namespace);
        world.register(namespace);
    }
    let shop = world.pod("shop", "web-0", "10.1.2.3");
    let stock = world.pod("stock", "web-0", "10.1.2.4");
    let wide = world.operator(&["shop", "stock"]).start().unwrap();
    world.wait(&[&shop, &stock]);
    let watcher = Watcher::start(&world.etcd, "/services/");

    // As in a rolling update: the new replica leads, and the old one still keeps what only it watches.
    let narrow = world.operator(&["shop"]).start().unwrap();
    wide.freeze().unwrap();
    eventually(SOON, "the new replica to lead", || {
        match narrow.metric("etcd_registrar_leader", &[]) {
            Ok(1.0) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
    wide.thaw().unwrap();
    let more = world.pod("shop", "web-1", "10.1.2.5");
    world.wait(&[&shop, &more, &stock]);
    always(
        Duration::from_secs(7),
        "nothing of the other namespace goes",
        || match keys(&world.registry.list("/services/stock/")).as_slice() {
            [only] if *only == stock => Ok(()),
            other => Err(format!("{other:?}")),
        },
    )
    .unwrap();
    assert_eq!(
        watcher
            .seen()
            .iter()
            .map(|seen| &seen.key)
            .collect::<BTreeSet<_>>(),
        BTreeSet::from([&more])
    );
    watcher.forget();

    wide.stop().unwrap();
    world.wait(&[&shop, &more]);
    let seen = watcher.seen();
    assert!(
        seen.len() == 1
            && seen
                .iter()
                .all(|seen| seen.key == stock && seen.put.is_none()),
        "{seen:#?}"
    );
    let log = narrow.log();
    let said = log.matches("which is not among --namespace").count();
    assert_eq!(said, 1, "{log}");

    // Watched again, it comes back.
    let wide = world.operator(&["shop", "stock"]).start().unwrap();
    narrow.stop().unwrap();
    world.wait(&[&shop, &more, &stock]);
    wide.stop().unwrap();
}
