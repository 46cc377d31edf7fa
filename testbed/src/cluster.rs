//! A Kubernetes control plane: API server with an etcd of its own, controllers, scheduler, and kwok for the kubelets.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::ClientConfig;
use serde_json::Value;

use crate::ca::{Ca, CertFiles, signing_key};
use crate::error::{Error, Result};
use crate::etcd::Etcd;
use crate::http::{Request, Response};
use crate::process::{Process, run, with_free_ports};
use crate::workdir::{WorkDir, keep, keep_on_panic};
use crate::{eventually, http, ports, tools};

/// The life of nodes and pods as kwok plays it; see the files for the annotations that steer it.
const STAGES: [&str; 2] = [
    include_str!("../stages/node.yaml"),
    include_str!("../stages/pod.yaml"),
];

/// Lets kwok play many pods at a time; with the default of 4 a Deployment of a thousand is slow. It has no defaults for the
/// others once there is a configuration.
const KWOK_CONFIG: &str = "\
apiVersion: config.kwok.x-k8s.io/v1alpha1
kind: KwokConfiguration
options:
  podPlayStageParallelism: 16
  nodePlayStageParallelism: 4
  nodeLeaseParallelism: 4
  podsOnNodeSyncParallelism: 4
";

/// By these kwok knows which nodes it plays.
const NODE_LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";

const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// How many clusters have pod addresses that no other one has; each has 2^20 of them.
const NETWORKS: u32 = 16;

/// Each cluster of this process gets pod addresses of its own, so that two of them can be told apart by address.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A node to be.
#[derive(Debug, Clone)]
struct Node {
    name: String,
    labels: Vec<(String, String)>,
}

/// How a [`Cluster`] is to be.
#[derive(Debug, Clone)]
pub struct ClusterBuilder {
    name: String,
    pods: bool,
    nodes: Vec<Node>,
    dual_stack: bool,
    apiserver_args: Vec<String>,
}

impl ClusterBuilder {
    /// Only the API server and its etcd: ready in half the time. Nothing runs or deletes pods, and a deleted namespace
    /// stays; a test can create pods with a `nodeName` and patch their status.
    #[must_use]
    pub fn api_only(mut self) -> Self {
        self.pods = false;
        self
    }

    /// Adds a node with the given labels. Without any there are three, in the zones `a`, `b` and `c`.
    #[must_use]
    pub fn node(mut self, name: &str, labels: &[(&str, &str)]) -> Self {
        self.nodes.push(Node {
            name: name.to_owned(),
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        });
        self
    }

    /// Pods, nodes and services have an IPv4 and an IPv6 address.
    #[must_use]
    pub fn dual_stack(mut self) -> Self {
        self.dual_stack = true;
        self
    }

    /// More flags of the API server.
    #[must_use]
    pub fn apiserver_args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.apiserver_args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Starts it and waits until it can be used: the API server answers, and the nodes are ready.
    ///
    /// With `TESTBED_KUBECONFIG` set, gives the cluster of that file instead.
    pub fn start(mut self) -> Result<Cluster> {
        if let Some(kubeconfig) = tools::external_kubeconfig() {
            return Ok(Cluster {
                plane: None,
                kubeconfig,
                dir: WorkDir::new(&self.name)?,
                name: self.name,
            });
        }
        if self.pods && self.nodes.is_empty() {
            for zone in ["a", "b", "c"] {
                let name = format!("node-{zone}");
                self = self.node(&name, &[("topology.kubernetes.io/zone", zone)]);
            }
        }
        let network = Network {
            number: NUMBER.fetch_add(1, Ordering::Relaxed) % NETWORKS,
            dual_stack: self.dual_stack,
        };
        tools::path("kube-apiserver")?;
        let etcd = Etcd::builder(format!("{}-kube", self.name))
            .unsafe_no_fsync()
            .args(["--quota-backend-bytes=4294967296"])
            .start_own()?;
        let dir = WorkDir::new(&self.name)?;
        let plane = Plane::new(&self, etcd, &dir, &network)?;
        let kubeconfig = plane.admin.clone();
        let cluster = Cluster {
            plane: Some(plane),
            kubeconfig,
            dir,
            name: self.name.clone(),
        };
        match cluster.bring_up(&self, &network) {
            Ok(()) => Ok(cluster),
            Err(error) => {
                keep("a control plane did not start");
                Err(error)
            }
        }
    }
}

/// The address ranges of one cluster. Nothing is ever sent to these addresses.
struct Network {
    number: u32,
    dual_stack: bool,
}

impl Network {
    fn services(&self) -> &'static str {
        if self.dual_stack {
            "192.168.0.0/16,fd00:96::/112"
        } else {
            "192.168.0.0/16"
        }
    }

    /// A stage that gives pods addresses, for this cluster: 10.0.0.0/8 is shared out between the networks.
    fn stage(&self, stage: &str) -> String {
        let v6 = if self.dual_stack {
            format!("fd00:{:x}::", 0x100 + self.number)
        } else {
            String::new()
        };
        stage
            .replace("@FIRST@", &(self.number * 256 / NETWORKS).to_string())
            .replace("@V6@", &v6)
    }

    fn node_addresses(&self, index: usize) -> Vec<String> {
        let host = index + 1;
        let mut addresses = vec![format!(
            "172.20.{}.{}",
            self.number as usize + host / 250,
            host % 250
        )];
        if self.dual_stack {
            addresses.push(format!("fd01:{:x}::{host:x}", 0x100 + self.number));
        }
        addresses
    }
}

/// The parts that the harness runs.
struct Plane {
    // In the order in which they are to end: those that use the API server first.
    clients: Vec<(Process, HealthCheck)>,
    apiserver: Process,
    port: u16,
    tls: Arc<ClientConfig>,
    admin: PathBuf,
    etcd: Etcd,
}

struct HealthCheck {
    port: u16,
    path: &'static str,
    tls: bool,
}

impl Plane {
    /// Starts the API server, and prepares the others.
    fn new(builder: &ClusterBuilder, etcd: Etcd, dir: &WorkDir, network: &Network) -> Result<Self> {
        let ca = Ca::new(dir.path(), &format!("testbed {}", builder.name))?;
        let server = ca.server("server", &[])?;
        let admin = ca.client("admin", "admin", Some("system:masters"))?;
        let (private, public) = signing_key(dir.path(), "service-account")?;
        let tls = http::tls_config(ca.cert(), Some((&admin.cert, &admin.key)))?;
        let (apiserver, port) = with_free_ports(|| {
            let port = ports::free_port()?;
            let mut args = vec![
                format!("--etcd-servers={}", etcd.endpoints_arg()),
                "--bind-address=127.0.0.1".to_owned(),
                "--advertise-address=127.0.0.1".to_owned(),
                format!("--secure-port={port}"),
                format!("--cert-dir={}", dir.path().display()),
                format!("--tls-cert-file={}", server.cert.display()),
                format!("--tls-private-key-file={}", server.key.display()),
                format!("--client-ca-file={}", ca.cert().display()),
                "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
                format!("--service-account-key-file={}", public.display()),
                format!("--service-account-signing-key-file={}", private.display()),
                "--authorization-mode=RBAC".to_owned(),
                format!("--service-cluster-ip-range={}", network.services()),
                "--endpoint-reconciler-type=none".to_owned(),
                // TaintNodesByCondition would keep every pod unscheduled, for nothing here removes the taint.
                "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition".to_owned(),
                "--allow-privileged=true".to_owned(),
            ];
            args.extend(builder.apiserver_args.iter().cloned());
            let name = format!("kube-apiserver {}", builder.name);
            let log = dir.join("kube-apiserver.log");
            let process = Process::new(name, tools::path("kube-apiserver")?, log).args(args);
            process.start()?;
            process.wait_ready(|| http::healthy(port, Some(tls.clone()), "/readyz"))?;
            Ok((process, port))
        })?;
        let kubeconfig = dir.write(
            "admin.kubeconfig",
            kubeconfig(
                &builder.name,
                &format!("https://127.0.0.1:{port}"),
                ca.cert(),
                &admin,
            ),
        )?;
        let mut plane = Self {
            clients: Vec::new(),
            apiserver,
            port,
            tls,
            admin: kubeconfig,
            etcd,
        };
        if builder.pods {
            plane.prepare_clients(builder, dir, network, &server, ca.cert(), &private)?;
        }
        Ok(plane)
    }

    fn prepare_clients(
        &mut self,
        builder: &ClusterBuilder,
        dir: &WorkDir,
        network: &Network,
        server: &CertFiles,
        ca: &Path,
        signing_key: &Path,
    ) -> Result<()> {
        let kubeconfig = format!("--kubeconfig={}", self.admin.display());
        let served = |port: u16| {
            [
                "--bind-address=127.0.0.1".to_owned(),
                format!("--secure-port={port}"),
                format!("--tls-cert-file={}", server.cert.display()),
                format!("--tls-private-key-file={}", server.key.display()),
                "--leader-elect=false".to_owned(),
                // The defaults are made for a busy production cluster, and slow a big rolling update down.
                "--kube-api-qps=2000".to_owned(),
                "--kube-api-burst=4000".to_owned(),
                kubeconfig.clone(),
            ]
        };
        let port = ports::free_port()?;
        let manager = self
            .client(builder, dir, "kube-controller-manager")?
            .args(served(port))
            .args([
                format!("--cert-dir={}", dir.path().display()),
                format!(
                    "--service-account-private-key-file={}",
                    signing_key.display()
                ),
                format!("--root-ca-file={}", ca.display()),
                "--controllers=*,-nodeipam,-nodelifecycle,-cloud-node-lifecycle".to_owned(),
            ]);
        self.add_client(manager, port, "/healthz", true);

        let port = ports::free_port()?;
        let scheduler = self
            .client(builder, dir, "kube-scheduler")?
            .args(served(port));
        self.add_client(scheduler, port, "/healthz", true);

        let port = ports::free_port()?;
        let mut config = KWOK_CONFIG.to_owned();
        for stage in STAGES {
            config += "---\n";
            config += &network.stage(stage);
        }
        let config = dir.write("kwok.yaml", config)?;
        let kwok = self
            .client(builder, dir, "kwok")?
            .args([
                kubeconfig.clone(),
                format!("--config={}", config.display()),
                "--manage-all-nodes=true".to_owned(),
                "--node-ip=127.0.0.1".to_owned(),
                "--node-lease-duration-seconds=40".to_owned(),
                format!("--server-address=127.0.0.1:{port}"),
            ])
            // Otherwise it would read the configuration in the user's home too.
            .env("KWOK_WORKDIR", dir.path());
        self.add_client(kwok, port, "/healthz", false);
        Ok(())
    }

    fn client(&self, builder: &ClusterBuilder, dir: &WorkDir, program: &str) -> Result<Process> {
        let log = dir.join(format!("{program}.log"));
        Ok(Process::new(
            format!("{program} {}", builder.name),
            tools::path(program)?,
            log,
        ))
    }

    fn add_client(&mut self, process: Process, port: u16, path: &'static str, tls: bool) {
        self.clients
            .push((process, HealthCheck { port, path, tls }));
    }

    fn start_clients(&self) -> Result<()> {
        self.clients
            .iter()
            .try_for_each(|(process, _)| process.start())
    }

    fn kill_clients(&self) -> Result<()> {
        self.clients
            .iter()
            .try_for_each(|(process, _)| process.kill())
    }

    fn wait_clients(&self) -> Result<()> {
        for (process, check) in &self.clients {
            let tls = check.tls.then(|| self.tls.clone());
            process.wait_ready(|| http::healthy(check.port, tls.clone(), check.path))?;
        }
        Ok(())
    }
}

/// A running control plane. Dropping it ends every part and removes its folder.
pub struct Cluster {
    plane: Option<Plane>,
    kubeconfig: PathBuf,
    dir: WorkDir,
    name: String,
}

impl Cluster {
    /// A whole plane with three nodes, unless the builder is told otherwise.
    pub fn builder(name: impl Into<String>) -> ClusterBuilder {
        ClusterBuilder {
            name: name.into(),
            pods: true,
            nodes: Vec::new(),
            dual_stack: false,
            apiserver_args: Vec::new(),
        }
    }

    /// The plane called `name` that every test of this process shares, with IPv4 and IPv6; the first one starts it.
    ///
    /// It ends with the process, and its folder goes with it unless a test failed. Tests keep out of each other's way by
    /// [`Cluster::new_namespace`].
    pub fn shared(name: &str) -> Result<&'static Cluster> {
        Self::shared_with(name, || Self::builder(name).dual_stack())
    }

    /// As [`Cluster::shared`], with a builder. The same name has to come with the same builder.
    pub fn shared_with(
        name: &str,
        builder: impl FnOnce() -> ClusterBuilder,
    ) -> Result<&'static Cluster> {
        static ALL: crate::Shared<Cluster> = Mutex::new(Vec::new());
        crate::shared(&ALL, name, || {
            keep_on_panic();
            builder().start()
        })
    }

    /// Starts what uses the API server, creates the nodes meanwhile, and waits for all of it.
    fn bring_up(&self, builder: &ClusterBuilder, network: &Network) -> Result<()> {
        let plane = self.plane()?;
        plane.start_clients()?;
        for (index, node) in builder.nodes.iter().enumerate() {
            self.create_node(node, &network.node_addresses(index))?;
        }
        eventually(READY_TIMEOUT, "the namespace default", || {
            self.request("GET", "/api/v1/namespaces/default", "")
                .map_err(|error| error.to_string())?
                .ok()
        })?;
        if !builder.pods {
            return Ok(());
        }
        plane.wait_clients()?;
        eventually(READY_TIMEOUT, "nodes to be ready", || self.nodes_ready()).map_err(|error| {
            plane
                .clients
                .last()
                .map_or(error, |(kwok, _)| kwok.error("no ready nodes"))
        })
    }

    fn nodes_ready(&self) -> Result<(), String> {
        let list = self
            .request("GET", "/api/v1/nodes", "")
            .map_err(|error| error.to_string())?
            .ok()?;
        let list: Value = serde_json::from_str(&list).map_err(|error| error.to_string())?;
        for node in list
            .pointer("/items")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let conditions = node.pointer("/status/conditions").and_then(Value::as_array);
            let ready = conditions.into_iter().flatten().any(|condition| {
                condition.get("type").is_some_and(|kind| kind == "Ready")
                    && condition
                        .get("status")
                        .is_some_and(|status| status == "True")
            });
            if !ready {
                let name = node.pointer("/metadata/name").and_then(Value::as_str);
                return Err(format!("{} is not ready", name.unwrap_or("a node")));
            }
        }
        Ok(())
    }

    fn create_node(&self, node: &Node, addresses: &[String]) -> Result<()> {
        let mut labels = serde_json::Map::new();
        labels.insert(
            "kubernetes.io/hostname".to_owned(),
            node.name.clone().into(),
        );
        labels.insert("kubernetes.io/os".to_owned(), "linux".into());
        for (key, value) in &node.labels {
            labels.insert(key.clone(), value.clone().into());
        }
        let mut listed: Vec<_> = addresses
            .iter()
            .map(|address| serde_json::json!({"type": "InternalIP", "address": address}))
            .collect();
        listed.push(serde_json::json!({"type": "Hostname", "address": node.name}));
        let resources = serde_json::json!({"cpu": "1000", "memory": "1Ti", "pods": "100k"});
        let body = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node.name, "labels": labels},
            "status": {"allocatable": resources, "capacity": resources, "addresses": listed},
        });
        self.request("POST", "/api/v1/nodes", &body.to_string())?
            .ok()
            .map(drop)
            .map_err(|error| self.error(format!("create node {}: {error}", node.name)))
    }

    /// Adds a node to a running cluster.
    pub fn add_node(&self, name: &str, labels: &[(&str, &str)], addresses: &[&str]) -> Result<()> {
        let node = Node {
            name: name.to_owned(),
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        };
        let addresses: Vec<_> = addresses.iter().map(|text| (*text).to_owned()).collect();
        self.create_node(&node, &addresses)
    }

    /// The name given to the builder.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The kubeconfig of an administrator.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The URL of the API server.
    pub fn server(&self) -> Result<String> {
        self.apiserver_port()
            .map(|port| format!("https://127.0.0.1:{port}"))
    }

    /// The port of the API server, as the target of a [`crate::Proxy`].
    pub fn apiserver_port(&self) -> Result<u16> {
        self.plane().map(|plane| plane.port)
    }

    /// Runs kubectl as administrator.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        run("kubectl", self.kubectl_command()?.args(args), None)
    }

    /// Runs kubectl with something on its standard input.
    pub fn kubectl_input(&self, args: &[&str], input: &str) -> Result<String> {
        run("kubectl", self.kubectl_command()?.args(args), Some(input))
    }

    /// A command for kubectl as administrator, to be run by the caller.
    pub fn kubectl_command(&self) -> Result<Command> {
        let mut command = Command::new(tools::path("kubectl")?);
        command
            .arg(format!("--kubeconfig={}", self.kubeconfig.display()))
            // What it remembers about one cluster is wrong for the next one on the same port.
            .arg(format!(
                "--cache-dir={}",
                self.dir.join("kubectl-cache").display()
            ));
        Ok(command)
    }

    /// Applies YAML.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.kubectl_input(&["apply", "-f", "-"], yaml)
    }

    /// Deletes what is in the YAML, and waits until it is gone. What is not there is no error.
    pub fn delete(&self, yaml: &str) -> Result<String> {
        self.kubectl_input(&["delete", "--ignore-not-found", "-f", "-"], yaml)
    }

    /// Waits with `kubectl rollout status` until a workload such as `deployment/web` is complete.
    pub fn wait_rollout(&self, namespace: &str, workload: &str) -> Result<()> {
        self.kubectl(&[
            "rollout",
            "status",
            "-n",
            namespace,
            workload,
            "--timeout=120s",
        ])
        .map(drop)
    }

    /// A request to the API server as administrator, without the start-up time of a kubectl. The body is JSON.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Result<Response> {
        self.request_typed(method, path, "application/json", body)
    }

    /// A merge patch, such as of a pod's annotations, or of the status with a path that ends in `/status`.
    pub fn patch(&self, path: &str, body: &str) -> Result<Response> {
        self.request_typed("PATCH", path, "application/merge-patch+json", body)
    }

    fn request_typed(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: &str,
    ) -> Result<Response> {
        let plane = self.plane()?;
        Request {
            port: plane.port,
            tls: Some(plane.tls.clone()),
            method,
            path,
            content_type,
            body,
        }
        .send()
    }

    /// Creates a namespace of its own for a test, called `prefix` and a number.
    pub fn new_namespace(&self, prefix: &str) -> Result<String> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        // The process id too: an existing cluster may hold what an earlier run left.
        let name = format!("{prefix}-{}-{number}", std::process::id());
        self.kubectl(&["create", "namespace", &name])?;
        Ok(name)
    }

    /// A kubeconfig with a token of a service account, which has to exist: for running a program under exactly its rights.
    pub fn kubeconfig_for_service_account(&self, namespace: &str, name: &str) -> Result<PathBuf> {
        self.derived_kubeconfig(Some((namespace, name)), None)
    }

    /// The same with another URL, such as that of a proxy: `https://127.0.0.1:PORT`.
    pub fn kubeconfig_for_service_account_at(
        &self,
        namespace: &str,
        name: &str,
        server: &str,
    ) -> Result<PathBuf> {
        self.derived_kubeconfig(Some((namespace, name)), Some(server))
    }

    /// The administrator's kubeconfig with another URL, such as that of a proxy.
    pub fn kubeconfig_at(&self, server: &str) -> Result<PathBuf> {
        self.derived_kubeconfig(None, Some(server))
    }

    /// The administrator's kubeconfig with another user or URL.
    fn derived_kubeconfig(
        &self,
        service_account: Option<(&str, &str)>,
        server: Option<&str>,
    ) -> Result<PathBuf> {
        let text = self.kubectl(&[
            "config",
            "view",
            "--raw",
            "--minify",
            "--flatten",
            "--output=json",
        ])?;
        let mut config: Value = serde_json::from_str(&text).map_err(|error| self.error(error))?;
        let mut file = "admin".to_owned();
        if let Some((namespace, name)) = service_account {
            let token =
                self.kubectl(&["create", "token", "-n", namespace, name, "--duration=24h"])?;
            if let Some(user) = config.pointer_mut("/users/0/user") {
                *user = serde_json::json!({"token": token.trim()});
            }
            // As a pod with this ServiceAccount has it.
            if let Some(context) = config.pointer_mut("/contexts/0/context") {
                context["namespace"] = namespace.into();
            }
            file = format!("{namespace}-{name}");
        }
        if let Some(server) = server {
            if let Some(old) = config.pointer_mut("/clusters/0/cluster/server") {
                *old = server.into();
            }
            file += &format!("-{}", server.rsplit(':').next().unwrap_or_default());
        }
        // JSON is YAML too.
        self.dir
            .write(&format!("{file}.derived.kubeconfig"), config.to_string())
    }

    /// The etcd behind the API server; for tests that compact it, for instance.
    pub fn etcd(&self) -> Result<&Etcd> {
        self.plane().map(|plane| &plane.etcd)
    }

    /// The API server's process: its log, its memory, signals.
    pub fn apiserver(&self) -> Result<&Process> {
        self.plane().map(|plane| &plane.apiserver)
    }

    /// Another process: `kube-controller-manager`, `kube-scheduler` or `kwok`.
    pub fn process(&self, program: &str) -> Result<&Process> {
        self.plane()?
            .clients
            .iter()
            .map(|(process, _)| process)
            .find(|process| process.component().split(' ').next() == Some(program))
            .ok_or_else(|| self.error(format!("has no {program}")))
    }

    /// Kills the API server with SIGKILL.
    pub fn kill_apiserver(&self) -> Result<()> {
        self.apiserver()?.kill()
    }

    /// Ends the API server with SIGTERM.
    pub fn stop_apiserver(&self) -> Result<()> {
        self.apiserver()?.stop()
    }

    /// Starts the API server again, on the same port with the same data, and waits until it and its clients are ready.
    pub fn start_apiserver(&self) -> Result<()> {
        let plane = self.plane()?;
        plane.apiserver.start()?;
        plane
            .apiserver
            .wait_ready(|| http::healthy(plane.port, Some(plane.tls.clone()), "/readyz"))?;
        // Some of them give up while it is away, and the others ask again only after up to a minute.
        plane.kill_clients()?;
        // Otherwise kwok would wait until those of the one before it have run out.
        self.request("DELETE", NODE_LEASES, "")?
            .ok()
            .map_err(|error| self.error(error))?;
        plane.start_clients()?;
        plane.wait_clients()
    }

    /// Freezes the API server.
    pub fn freeze_apiserver(&self) -> Result<()> {
        self.apiserver()?.freeze()
    }

    /// Lets the API server go on.
    pub fn thaw_apiserver(&self) -> Result<()> {
        self.apiserver()?.thaw()
    }

    fn plane(&self) -> Result<&Plane> {
        self.plane.as_ref().ok_or_else(|| {
            self.error("was not started by the testbed (TESTBED_KUBECONFIG): only kubectl is available for it")
        })
    }

    fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::new(format!("cluster {}", self.name), message)
    }
}

fn kubeconfig(name: &str, server: &str, ca: &Path, admin: &CertFiles) -> String {
    serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "clusters": [{"name": name, "cluster": {"server": server, "certificate-authority": ca}}],
        "users": [{"name": name, "user": {"client-certificate": admin.cert, "client-key": admin.key}}],
    })
    .to_string()
}
