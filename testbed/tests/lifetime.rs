//! What happens to a plane when it is broken, and when the process that started it goes.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use testbed::{Cluster, Proxy, eventually};

const SOON: Duration = Duration::from_secs(30);

#[test]
fn the_api_server_is_killed_and_comes_back_on_its_port() {
    let cluster = Cluster::builder("restart").start().unwrap();
    cluster.kubectl(&["create", "configmap", "kept"]).unwrap();
    let image = "--image=example.com/web:1";
    cluster
        .kubectl(&["create", "deployment", "old", image, "--replicas=10"])
        .unwrap();
    cluster.wait_rollout("default", "deployment/old").unwrap();
    let server = cluster.server().unwrap();
    cluster.kill_apiserver().unwrap();
    assert!(cluster.request("GET", "/readyz", "").is_err());
    cluster.start_apiserver().unwrap();
    assert_eq!(cluster.server().unwrap(), server);
    cluster.kubectl(&["get", "configmap", "kept"]).unwrap();
    // The others work again too.
    cluster
        .kubectl(&["create", "deployment", "web", image, "--replicas=10"])
        .unwrap();
    cluster.wait_rollout("default", "deployment/web").unwrap();
    // And no pod has the address of another, though whoever gives them was started anew.
    let addresses = "-o=jsonpath={.items[*].status.podIP}";
    let addresses = cluster.kubectl(&["get", "pods", addresses]).unwrap();
    let distinct: BTreeSet<&str> = addresses.split_whitespace().collect();
    assert_eq!(distinct.len(), 20, "{addresses}");
}

#[test]
fn a_service_account_has_its_own_rights_only_also_through_a_proxy() {
    let cluster = Cluster::builder("rights").api_only().start().unwrap();
    cluster
        .apply(
            "apiVersion: v1
kind: ServiceAccount
metadata: {name: reader, namespace: default}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reader}
rules: [{apiGroups: [''], resources: [pods], verbs: [list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reader}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}
subjects: [{kind: ServiceAccount, name: reader, namespace: default}]
",
        )
        .unwrap();
    let proxy = Proxy::start(cluster.apiserver_port().unwrap()).unwrap();
    let direct = cluster
        .kubeconfig_for_service_account("default", "reader")
        .unwrap();
    let proxied = cluster
        .kubeconfig_for_service_account_at("default", "reader", &proxy.url("https"))
        .unwrap();
    let kubectl = |kubeconfig: &Path, args: &[&str]| {
        Command::new(testbed::tools::path("kubectl").unwrap())
            .arg(format!("--kubeconfig={}", kubeconfig.display()))
            .args(args)
            .output()
            .unwrap()
    };
    for kubeconfig in [&direct, &proxied] {
        assert!(
            kubectl(kubeconfig, &["get", "--raw", "/api/v1/pods"])
                .status
                .success()
        );
        let denied = kubectl(kubeconfig, &["get", "--raw", "/api/v1/nodes"]);
        let text = String::from_utf8_lossy(&denied.stderr).into_owned();
        assert!(
            !denied.status.success() && text.contains("forbidden"),
            "{text}"
        );
    }
    assert!(proxy.accepted() > 0);
}

/// The process ids of everything that was started with this folder in its command line.
fn running_in(folder: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if name.bytes().all(|byte| byte.is_ascii_digit())
            && String::from_utf8_lossy(&command).contains(folder)
        {
            found.push(name);
        }
    }
    found
}

#[test]
fn everything_ends_with_a_process_that_is_killed() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_testbed"))
        .args(["up", "--clusters", "1"])
        .env_remove("TESTBED_KEEP")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines: Vec<String> = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .take_while(|line| !line.starts_with("Ctrl-C"))
        .collect();
    let kubeconfig = lines
        .iter()
        .find_map(|line| line.trim().strip_prefix("export KUBECONFIG="))
        .unwrap();
    let folder = Path::new(kubeconfig)
        .parent()
        .unwrap()
        .parent()
        .unwrap()
        .to_path_buf();
    let name = folder.display().to_string();
    // etcd of the registry, etcd of Kubernetes, four programs of Kubernetes, and the watcher.
    assert_eq!(running_in(&name).len(), 7, "{:?}", running_in(&name));

    child.kill().unwrap();
    child.wait().unwrap();
    eventually(SOON, "the children to end", || match running_in(&name) {
        pids if pids.is_empty() => Ok(()),
        pids => Err(format!("{pids:?} still run")),
    })
    .unwrap();
    assert!(!folder.exists(), "{name} is still there");
}
