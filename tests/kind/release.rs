//! The operator's own life: its rights, its pods, upgrades, and what is left when it goes.

use std::time::Instant;

use serde_json::Value;
use testbed::eventually;

use crate::calls::Traffic;
use crate::nodes::assert_silent;
use crate::world::{HOME, LONG, SHOP, TTL, World, run};

/// `kubectl auth can-i --list` of the ServiceAccount: what is its own, without what everyone may.
const RIGHTS: [&str; 6] = [
    "events.events.k8s.io [] [] [create]",
    "namespaces [] [kube-system] [get]",
    "nodes [] [] [list watch]",
    "pods [] [] [list watch]",
    "serviceregistrations.etcd-registrar.io [] [] [list watch]",
    "serviceregistrations.etcd-registrar.io/status [] [] [patch]",
];

/// What everyone who has logged in may, on any cluster.
fn is_everyones(right: &str) -> bool {
    right.starts_with('[')
        || right.starts_with("self")
        || right.contains(".authentication.k8s.io")
        || right.contains(".authorization.k8s.io")
}

pub(crate) fn rights(world: &World) {
    for cluster in World::clusters() {
        let account = format!("--as=system:serviceaccount:{HOME}:{HOME}");
        let said = world.kubectl(
            cluster,
            &["auth", "can-i", "--list", &account, "--no-headers"],
        );
        let mut found: Vec<String> = said
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .filter(|line| !is_everyones(line))
            .collect();
        found.sort();
        assert_eq!(found, RIGHTS, "{said}");
        let namespace = world.get(cluster, &["namespace", HOME]);
        assert_eq!(
            namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"],
            "restricted"
        );
        let pods = world.get(
            cluster,
            &[
                "pods",
                "-n",
                HOME,
                "-lapp.kubernetes.io/name=etcd-registrar",
            ],
        );
        for pod in pods["items"].as_array().unwrap() {
            let context = &pod["spec"]["containers"][0]["securityContext"];
            assert_eq!(context["readOnlyRootFilesystem"], true, "{context}");
            assert_eq!(context["capabilities"]["drop"][0], "ALL", "{context}");
            assert_eq!(pod["spec"]["securityContext"]["runAsUser"], 65532);
            let restarts: Vec<&Value> = pod["status"]["containerStatuses"]
                .as_array()
                .unwrap()
                .iter()
                .map(|c| &c["restartCount"])
                .collect();
            assert_eq!(restarts, [&Value::from(0)]);
        }
        // Valid as the API server defaulted it.
        let policy = world.get(cluster, &["networkpolicy", HOME, "-n", HOME]);
        assert_eq!(policy["spec"]["ingress"][0]["ports"][0]["port"], "http");
    }
    world.note(&format!(
        "{} rights, as listed; restricted Pod Security",
        RIGHTS.len()
    ));
}

/// Both operators at once are killed, and nobody sees it.
pub(crate) fn operators_killed(world: &World) {
    let from = world.watcher.position();
    let traffic = Traffic::start(world);
    let began = Instant::now();
    for pod in world.operators("east") {
        world.kubectl(
            "east",
            &["delete", "-n", HOME, &pod, "--force", "--grace-period=0"],
        );
    }
    world.rollout("east", HOME, "deploy/etcd-registrar");
    let back = began.elapsed();
    let calls = traffic.end();
    assert_silent(world, from, "both operators were killed");
    world.kubectl("east", &["scale", "deploy/web", "-n", SHOP, "--replicas=5"]);
    world.settled("east", "web", 5);
    world.kubectl("east", &["scale", "deploy/web", "-n", SHOP, "--replicas=4"]);
    world.settled("east", "web", 4);
    world.note(&format!(
        "ready again after {:.1} s; no event, {calls} calls, none failed",
        back.as_secs_f64()
    ));
}

/// The commit that an image is of, as its label and its program say.
fn commit(image: &str) -> String {
    let template = "{{index .Config.Labels \"org.opencontainers.image.revision\"}}";
    let label = run("docker", &["image", "inspect", "--format", template, image]);
    let version = run("docker", &["run", "--rm", image, "--version"]);
    let commit = label.trim().to_owned();
    assert!(
        version.contains(&format!("commit {commit} ")),
        "{label} {version}"
    );
    commit
}

/// `helm upgrade` to another image and `helm rollback`, under traffic.
pub(crate) fn upgrade_and_rollback(world: &World) {
    let image = std::env::var("KIND_IMAGE").unwrap();
    let before = std::env::var("KIND_IMAGE_BEFORE").ok();
    if let Some(before) = &before {
        let archive = std::env::var("KIND_ARCHIVE_BEFORE").unwrap();
        run("docker", &["load", "--quiet", "--input", &archive]);
        run("kind", &["load", "docker-image", before, "--name", "east"]);
        assert_ne!(commit(before), commit(&image));
    }
    let other = before.as_ref().unwrap_or(&image);
    let from = world.watcher.position();
    world.install("east", other, &["--set", "log.level=debug"]);
    assert_silent(world, from, "the release before was installed");
    let traffic = Traffic::start(world);
    let began = Instant::now();
    world.install("east", &image, &[]);
    let upgraded = began.elapsed();
    world.helm("east", &["rollback", HOME]);
    world.rollout("east", HOME, "deploy/etcd-registrar");
    let rolled_back = began.elapsed() - upgraded;
    let calls = traffic.end();
    assert_silent(world, from, "upgraded and rolled back");
    world.install("east", &image, &[]);
    assert_silent(world, from, "upgraded again");
    let which = match &before {
        Some(before) => format!("from the commit before, {:.7}", commit(before)),
        None => "with other flags (one image only)".to_owned(),
    };
    world.note(&format!(
        "{which}: upgrade {:.0} s, rollback {:.0} s; no event, {calls} calls, none failed",
        upgraded.as_secs_f64(),
        rolled_back.as_secs_f64()
    ));
}

/// What of a release is left in a cluster.
fn left(world: &World, cluster: &str) -> Vec<String> {
    let kinds = "deploy,rs,pods,cm,sa,pdb,netpol,role,rolebinding,clusterrole,clusterrolebinding,crd,svc,jobs";
    let args = [
        "get",
        kinds,
        "-A",
        "-l",
        "app.kubernetes.io/name=etcd-registrar",
        "-o",
        "name",
    ];
    world
        .kubectl(cluster, &args)
        .lines()
        .map(str::to_owned)
        .collect()
}

fn wait_left(world: &World, cluster: &str) {
    let crd =
        "customresourcedefinition.apiextensions.k8s.io/serviceregistrations.etcd-registrar.io";
    eventually(LONG, "nothing but the CRD to be left", || {
        let left = left(world, cluster);
        if left == [crd] {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    })
    .unwrap();
}

/// `helm uninstall`: the keys expire within their TTL, and a namespace with a registration can be deleted.
pub(crate) fn uninstall(world: &World) {
    world.apply(
        "west",
        "web",
        &crate::workload::manifest("Deployment", "web", 2),
    );
    world.settled("west", "web", 2);
    world.helm("west", &["uninstall", HOME, "--wait"]);
    let began = Instant::now();
    let prefix = format!("/services/{SHOP}/web/west/");
    eventually(LONG, "the keys to expire", || {
        match world.registry.keys(&prefix)?.len() {
            0 => Ok(()),
            n => Err(format!("{n} stand")),
        }
    })
    .unwrap();
    let expired = began.elapsed();
    // etcd may take a second longer to end a lease, and looks every half a second.
    assert!(expired.as_secs() <= TTL + 3, "{expired:?}");
    wait_left(world, "west");
    let began = Instant::now();
    world.kubectl("west", &["delete", "namespace", SHOP, "--timeout=120s"]);
    world.note(&format!(
        "keys expired {:.0} s later (TTL {TTL} s); only the CRD is left; its namespace deleted in {:.0} s",
        expired.as_secs_f64(),
        began.elapsed().as_secs_f64()
    ));
}

/// Asked to, `helm uninstall` removes the keys at once.
pub(crate) fn uninstall_with_purge(world: &World) {
    world.install(
        "east",
        &std::env::var("KIND_IMAGE").unwrap(),
        &["--set", "uninstall.purge=true"],
    );
    let count = world.registry.keys("/services/").unwrap().len();
    assert!(count > 0);
    let began = Instant::now();
    world.helm("east", &["uninstall", HOME, "--wait", "--timeout", "3m"]);
    let done = began.elapsed();
    let keys = world.registry.keys("/services/").unwrap();
    assert!(keys.is_empty(), "{keys:?}");
    let own = world.registry.keys("/registrar/east/").unwrap();
    assert!(own.is_empty(), "{own:?}");
    wait_left(world, "east");
    world.note(&format!(
        "{count} keys gone when helm was done, {:.0} s",
        done.as_secs_f64()
    ));
}
