//! Two kind clusters, an etcd of three members with TLS and users on the same network, and the operator from its image and
//! chart in both.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::{Ca, eventually, tools};

use crate::watcher::{Registry, Watcher};

/// With two busy cores a pod may take this long to be scheduled, started and ready.
pub(crate) const LONG: Duration = Duration::from_secs(180);
/// What the operator does by itself, with everything up.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// The TTL of the registrations, in seconds.
pub(crate) const TTL: u64 = 15;
/// Where the operator is installed.
pub(crate) const HOME: &str = "etcd-registrar";
/// Where the workload is.
pub(crate) const SHOP: &str = "shop";
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/chart");
const NODE_IMAGE: &str = "etcd-registrar/kind-node:v1.36.3";
const MEMBERS: [&str; 3] = ["etcd-0", "etcd-1", "etcd-2"];
pub(crate) const PASSWORD: &str = "kind-password";
/// What the operators may write: the default, and what CoreDNS reads.
const POLICY: &str = r#"policy={"rules": [
    {"namespaces": ["*"], "formats": ["Json"], "prefixes": ["/services/{namespace}/"]},
    {"namespaces": ["shop"], "formats": ["SkyDns"], "prefixes": ["/skydns/local/skydns/{namespace}/"]}]}"#;

/// The clusters: name, pods, Services, workers.
const CLUSTERS: [(&str, &str, &str, usize); 2] = [
    ("east", "10.110.0.0/16", "10.120.0.0/16", 2),
    ("west", "10.130.0.0/16", "10.140.0.0/16", 0),
];

/// Everything that the steps work on.
pub(crate) struct World {
    /// Kubeconfigs, certificates, and what is kept of a failure.
    pub(crate) folder: PathBuf,
    pub(crate) registry: Registry,
    /// Of all endpoints, from the beginning.
    pub(crate) watcher: Watcher,
    notes: RefCell<String>,
}

/// The folder with what the recipe of `testbed/kind/` builds.
pub(crate) fn lab() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache");
    let lab = std::env::var_os("KIND_LAB").map(PathBuf::from);
    lab.unwrap_or_else(|| cache.unwrap_or_else(home).join("kind-lab"))
        .join("bin")
}

/// A file or folder of the repository.
pub(crate) fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Runs a program and gives what it printed, or what it said when it failed.
pub(crate) fn try_run(program: &str, args: &[&str]) -> Result<String, String> {
    let path = match program {
        "docker" | "ip" => PathBuf::from(program),
        "helm" => tools::path("helm").unwrap(),
        other => lab().join(other),
    };
    finish(program, args, Command::new(path).args(args))
}

/// Waits for a program, and gives what it printed, or what it said when it failed.
pub(crate) fn finish(
    program: &str,
    args: &[&str],
    command: &mut Command,
) -> Result<String, String> {
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    Err(format!(
        "{program} {}: {status}: {}{}",
        args.join(" "),
        String::from_utf8_lossy(&stdout),
        String::from_utf8_lossy(&stderr)
    ))
}

#[track_caller]
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    try_run(program, args).unwrap_or_else(|said| panic!("{said}"))
}

/// Why there can be no kind cluster here, in a line.
pub(crate) fn missing() -> Option<String> {
    if try_run_here("docker", &["version"]).is_err() {
        return Some("no Docker answers: start it, e.g. with testbed/kind/dockerd-up".into());
    }
    if !lab().join("kind").exists()
        || try_run_here("docker", &["image", "inspect", NODE_IMAGE]).is_err()
    {
        return Some(format!(
            "the image {NODE_IMAGE} is missing: testbed/kind/build-node-image builds it"
        ));
    }
    None
}

fn try_run_here(program: &str, args: &[&str]) -> Result<(), String> {
    match Command::new(program).args(args).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Err(error.to_string()),
    }
}

impl World {
    /// Brings everything up that is not up yet.
    pub(crate) fn new(image: &str, archive: &str) -> Self {
        let folder = folder();
        std::fs::create_dir_all(&folder).unwrap();
        let began = Instant::now();
        for (name, pods, services, workers) in CLUSTERS {
            create_cluster(&folder, name, pods, services, workers);
        }
        said(began, "two clusters");
        run("docker", &["load", "--quiet", "--input", archive]);
        image_of("etcd", &lab(), &["etcd", "etcdctl"]);
        let web = tools::program(&source("testbed/kind/web")).unwrap();
        image_of("web", web.parent().unwrap(), &["web"]);
        for (name, ..) in CLUSTERS {
            run(
                "kind",
                &[
                    "load",
                    "docker-image",
                    image,
                    "etcd-registrar/web:kind",
                    "--name",
                    name,
                ],
            );
        }
        join_networks(&folder);
        let registry = start_etcd(&folder);
        said(began, "an etcd of three members");
        let watcher = Watcher::start(&registry, "/services/");
        let world = Self {
            folder,
            registry,
            watcher,
            notes: RefCell::new(String::new()),
        };
        for (name, ..) in CLUSTERS {
            world.prepare(name);
            world.install(name, image, &[]);
        }
        said(began, "the operator in both");
        world
    }

    pub(crate) fn clusters() -> [&'static str; 2] {
        [CLUSTERS[0].0, CLUSTERS[1].0]
    }

    /// Notes what a step saw, for the table at the end.
    pub(crate) fn note(&self, text: &str) {
        let mut notes = self.notes.borrow_mut();
        if !notes.is_empty() {
            notes.push_str("; ");
        }
        let _ = write!(notes, "{text}");
    }

    pub(crate) fn take_notes(&self) -> String {
        std::mem::take(&mut self.notes.borrow_mut())
    }

    fn kubeconfig(&self, cluster: &str) -> String {
        kubeconfig(&self.folder, cluster)
    }

    /// kubectl in a cluster, as administrator.
    pub(crate) fn try_kubectl(&self, cluster: &str, args: &[&str]) -> Result<String, String> {
        let kubeconfig = format!("--kubeconfig={}", self.kubeconfig(cluster));
        let mut all = vec![kubeconfig.as_str()];
        all.extend(args);
        try_run("kubectl", &all)
    }

    #[track_caller]
    pub(crate) fn kubectl(&self, cluster: &str, args: &[&str]) -> String {
        self.try_kubectl(cluster, args)
            .unwrap_or_else(|said| panic!("{said}"))
    }

    pub(crate) fn get(&self, cluster: &str, args: &[&str]) -> Value {
        let mut all = vec!["get", "-o", "json"];
        all.extend(args);
        serde_json::from_str(&self.kubectl(cluster, &all)).unwrap()
    }

    pub(crate) fn apply(&self, cluster: &str, name: &str, yaml: &str) {
        let path = self.folder.join(format!("{name}.yaml"));
        std::fs::write(&path, yaml).unwrap();
        self.kubectl(cluster, &["apply", "-f", path.to_str().unwrap()]);
    }

    pub(crate) fn rollout(&self, cluster: &str, namespace: &str, workload: &str) {
        let status = [
            "rollout",
            "status",
            workload,
            "-n",
            namespace,
            "--timeout=180s",
        ];
        self.kubectl(cluster, &status);
    }

    /// The addresses of the ready pods of `app: NAME`, as keys of that service.
    pub(crate) fn wanted(&self, cluster: &str, app: &str) -> Vec<String> {
        let selector = format!("-lapp={app}");
        let pods = self.get(cluster, &["pods", "-n", SHOP, &selector]);
        let mut keys: Vec<String> = pods["items"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|pod| crate::nodes::stays(pod))
            .filter(|pod| {
                let conditions = pod["status"]["conditions"].as_array();
                conditions
                    .into_iter()
                    .flatten()
                    .any(|c| c["type"] == "Ready" && c["status"] == "True")
            })
            .map(|pod| {
                let ip = pod["status"]["podIP"].as_str().unwrap();
                format!("/services/{SHOP}/{app}/{cluster}/{ip}:8080")
            })
            .collect();
        keys.sort();
        keys
    }

    /// Waits until etcd has the ready pods of an app, `count` of them, and gives their keys.
    pub(crate) fn settled(&self, cluster: &str, app: &str, count: usize) -> Vec<String> {
        let prefix = format!("/services/{SHOP}/{app}/{cluster}/");
        eventually(
            LONG,
            &format!("{count} endpoints of {app} in {cluster}"),
            || {
                let wanted = self.wanted(cluster, app);
                let found = self.registry.keys(&prefix)?;
                if wanted.len() == count && wanted == found {
                    Ok(found)
                } else {
                    Err(format!("{wanted:?} are ready, {found:?} registered"))
                }
            },
        )
        .unwrap()
    }

    /// Waits for a pod that comes to its end, and gives what it printed. The pod is removed.
    pub(crate) fn finished(&self, cluster: &str, namespace: &str, name: &str) -> String {
        let phase = "--for=jsonpath={.status.phase}=Succeeded";
        let pod = format!("pod/{name}");
        let args = ["wait", "-n", namespace, &pod, phase, "--timeout=120s"];
        let done = self.try_kubectl(cluster, &args);
        let log = self.kubectl(cluster, &["logs", "-n", namespace, name]);
        assert!(done.is_ok(), "{done:?}: {log}");
        let args = ["delete", "-n", namespace, &pod, "--wait=false"];
        self.kubectl(cluster, &args);
        log
    }

    /// Removes a registration, and waits until no key with a prefix is left.
    pub(crate) fn unregister(&self, cluster: &str, name: &str, prefix: &str) {
        self.kubectl(cluster, &["delete", "sreg", name, "-n", SHOP]);
        eventually(SOON, &format!("{prefix} to be empty"), || {
            match self.registry.keys(prefix)?.as_slice() {
                [] => Ok(()),
                keys => Err(format!("{keys:?}")),
            }
        })
        .unwrap();
    }

    /// The address of a container on the network of kind.
    pub(crate) fn address(container: &str) -> String {
        let template = "{{.NetworkSettings.Networks.kind.IPAddress}}";
        run("docker", &["inspect", "--format", template, container])
            .trim()
            .to_owned()
    }

    fn prepare(&self, cluster: &str) {
        for name in [HOME, SHOP] {
            let _ = self.try_kubectl(cluster, &["create", "namespace", name]);
        }
        let restricted = "pod-security.kubernetes.io/enforce=restricted";
        self.kubectl(
            cluster,
            &["label", "--overwrite", "namespace", HOME, restricted],
        );
        let file = |name: &str| self.folder.join(name).display().to_string();
        let _ = self.try_kubectl(
            cluster,
            &[
                "delete",
                "secret",
                "etcd-client",
                "etcd-password",
                "-n",
                HOME,
            ],
        );
        self.kubectl(
            cluster,
            &[
                "create",
                "secret",
                "generic",
                "etcd-client",
                "-n",
                HOME,
                &format!("--from-file=ca.crt={}", file("ca.crt")),
                &format!(
                    "--from-file=tls.crt={}",
                    file(&format!("registrar-{cluster}.crt"))
                ),
                &format!(
                    "--from-file=tls.key={}",
                    file(&format!("registrar-{cluster}.key"))
                ),
            ],
        );
        self.kubectl(
            cluster,
            &[
                "create",
                "secret",
                "generic",
                "etcd-password",
                "-n",
                HOME,
                &format!("--from-literal=password={PASSWORD}"),
            ],
        );
    }

    /// `helm upgrade --install` of the operator, and waits for both replicas.
    pub(crate) fn install(&self, cluster: &str, image: &str, more: &[&str]) {
        let (repository, tag) = image.rsplit_once(':').unwrap();
        let endpoints = MEMBERS.map(|name| format!("https://{name}:2379")).join(",");
        let sets = [
            format!("clusterName={cluster}"),
            format!("etcd.endpoints={{{endpoints}}}"),
            "etcd.tls.secret=etcd-client".to_owned(),
            format!("etcd.auth.user=registrar-{cluster}"),
            "etcd.auth.secret=etcd-password".to_owned(),
            format!("image.repository={repository}"),
            format!("image.tag={tag}"),
        ];
        let mut args = vec!["upgrade", "--install", HOME, CHART, "--set-json", POLICY];
        for set in &sets {
            args.extend(["--set", set]);
        }
        args.extend(more);
        self.helm(cluster, &args);
        self.rollout(cluster, HOME, "deploy/etcd-registrar");
    }

    pub(crate) fn helm(&self, cluster: &str, args: &[&str]) -> String {
        let kubeconfig = self.kubeconfig(cluster);
        let mut all = args.to_vec();
        all.extend(["--namespace", HOME, "--kubeconfig", &kubeconfig]);
        run("helm", &all)
    }

    /// Which pod leads.
    pub(crate) fn operators(&self, cluster: &str) -> Vec<String> {
        let names = [
            "get",
            "pods",
            "-n",
            HOME,
            "-l",
            "app.kubernetes.io/name=etcd-registrar",
            "-o",
            "name",
        ];
        self.kubectl(cluster, &names)
            .lines()
            .map(str::to_owned)
            .collect()
    }

    /// Keeps all that tells of a failure.
    pub(crate) fn keep(&self, step: &str) {
        let seen = format!("{:#?}", self.watcher.known());
        let _ = std::fs::write(keep(step).join("watcher.txt"), seen);
    }
}

/// Keeps what the clusters and etcd tell of a failure, and gives the folder.
pub(crate) fn keep(step: &str) -> PathBuf {
    let all = folder();
    let folder = all.join(format!("failed-{step}"));
    let _ = std::fs::remove_dir_all(&folder);
    let _ = std::fs::create_dir_all(&folder);
    let clusters = try_run("kind", &["get", "clusters"]).unwrap_or_default();
    for cluster in clusters.lines() {
        let logs = folder.join(cluster).display().to_string();
        let _ = try_run("kind", &["export", "logs", "--name", cluster, &logs]);
        let config = format!("--kubeconfig={}", kubeconfig(&all, cluster));
        let objects = "all,sreg,nodes,events,cm,sa,netpol,pdb,crd,roles,rolebindings,clusterroles,clusterrolebindings";
        let operators = "--selector=app.kubernetes.io/name=etcd-registrar";
        for (file, args) in [
            ("objects.yaml", vec!["get", objects, "-A", "-o", "yaml"]),
            (
                "operators.log",
                vec!["logs", "-n", HOME, operators, "--prefix", "--tail=-1"],
            ),
        ] {
            let args = [vec![config.as_str()], args].concat();
            let said = try_run("kubectl", &args).unwrap_or_else(|said| said);
            let _ = std::fs::write(folder.join(format!("{cluster}-{file}")), said);
        }
    }
    for member in MEMBERS {
        // What a container says on its standard error is told there.
        let said = Command::new("docker").args(["logs", member]).output();
        let said = said.map_or_else(|error| error.to_string().into_bytes(), |all| all.stderr);
        let _ = std::fs::write(folder.join(format!("{member}.log")), said);
    }
    println!("kept in {}", folder.display());
    folder
}

/// Where the files of a run are.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("kind")
}

fn said(began: Instant, what: &str) {
    println!("{:5.0} s  {what}", began.elapsed().as_secs_f64());
}

fn kubeconfig(folder: &Path, cluster: &str) -> String {
    folder
        .join(format!("{cluster}.kubeconfig"))
        .display()
        .to_string()
}

fn create_cluster(folder: &Path, name: &str, pods: &str, services: &str, workers: usize) {
    let kubeconfig = kubeconfig(folder, name);
    if run("kind", &["get", "clusters"])
        .lines()
        .any(|line| line == name)
    {
        run(
            "kind",
            &[
                "export",
                "kubeconfig",
                "--name",
                name,
                "--kubeconfig",
                &kubeconfig,
            ],
        );
        return;
    }
    let mut config = format!(
        "kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\n\
         networking: {{podSubnet: {pods}, serviceSubnet: {services}}}\nnodes:\n- role: control-plane\n"
    );
    config += &"- role: worker\n".repeat(workers);
    let path = folder.join(format!("{name}.kind.yaml"));
    std::fs::write(&path, config).unwrap();
    run(
        "kind",
        &[
            "create",
            "cluster",
            "--name",
            name,
            "--config",
            path.to_str().unwrap(),
            "--image",
            NODE_IMAGE,
            "--kubeconfig",
            &kubeconfig,
            "--wait",
            "180s",
        ],
    );
}

/// An image of some programs of a folder. The label says of which, so that programs that were built anew make a new one.
fn image_of(name: &str, folder: &Path, programs: &[&str]) {
    let folder = folder.display().to_string();
    let image = format!("etcd-registrar/{name}:kind");
    let template = "{{index .Config.Labels \"folder\"}}";
    let there = try_run(
        "docker",
        &["image", "inspect", "--format", template, &image],
    );
    if there.is_ok_and(|label| label.trim() == folder) {
        return;
    }
    let mut tar = Command::new("tar")
        .args(["--create", "--owner=0", "--group=0", "--directory", &folder])
        .args(programs)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let entrypoint = format!("ENTRYPOINT [\"/{}\"]", programs[0]);
    let label = format!("LABEL folder=\"{folder}\"");
    let args = [
        "import",
        "--change",
        &entrypoint,
        "--change",
        &label,
        "-",
        &image,
    ];
    let mut import = Command::new("docker");
    import.args(args).stdin(tar.stdout.take().unwrap());
    finish("docker", &args, &mut import).unwrap();
    assert!(tar.wait().unwrap().success());
}

/// Lets pods of each cluster, and this machine, reach the pods of the other.
fn join_networks(folder: &Path) {
    for (cluster, ..) in CLUSTERS {
        let config = format!("--kubeconfig={}", kubeconfig(folder, cluster));
        let template = "{range .items[*]}{.metadata.name} {.spec.podCIDR} {.status.addresses[?(@.type==\"InternalIP\")].address}{\"\\n\"}{end}";
        let nodes = run(
            "kubectl",
            &[
                &config,
                "get",
                "nodes",
                "-o",
                &format!("jsonpath={template}"),
            ],
        );
        for line in nodes.lines() {
            let parts: Vec<&str> = line.split_whitespace().collect();
            let [_, pods, address] = parts.as_slice() else {
                panic!("{line}")
            };
            run("ip", &["route", "replace", pods, "via", address]);
            for (other, ..) in CLUSTERS.iter().filter(|(other, ..)| *other != cluster) {
                for node in run("kind", &["get", "nodes", "--name", other]).lines() {
                    run(
                        "docker",
                        &["exec", node, "ip", "route", "replace", pods, "via", address],
                    );
                }
            }
        }
    }
}

/// Three members with TLS on the network of kind, users for both operators, and the test's own client as root.
fn start_etcd(folder: &Path) -> Registry {
    let running = run("docker", &["ps", "--format", "{{.Names}}"]);
    let fresh = !MEMBERS
        .iter()
        .all(|name| running.lines().any(|line| line == *name));
    if fresh {
        for member in MEMBERS {
            let _ = try_run("docker", &["rm", "--force", "--volumes", member]);
        }
        let ca = Ca::new(folder, "kind etcd").unwrap();
        ca.client("root", "root", None).unwrap();
        ca.client("coredns", "coredns", None).unwrap();
        for (cluster, ..) in CLUSTERS {
            let name = format!("registrar-{cluster}");
            ca.client(&name, &name, None).unwrap();
        }
        let cluster = MEMBERS
            .map(|name| format!("{name}=https://{name}:2380"))
            .join(",");
        let certs = format!("{}:/certs:ro", folder.display());
        for member in MEMBERS {
            ca.server_named(member, &[member], &[]).unwrap();
            // A port of its own choice would be another after a restart.
            let publish = format!("127.0.0.1:{}:2379", testbed::free_port().unwrap());
            run(
                "docker",
                &[
                    "run",
                    "--detach",
                    "--name",
                    member,
                    "--network",
                    "kind",
                    "--publish",
                    &publish,
                    "--volume",
                    &certs,
                    "etcd-registrar/etcd:kind",
                    "--name",
                    member,
                    "--data-dir",
                    "/data",
                    "--listen-client-urls",
                    "https://0.0.0.0:2379",
                    "--advertise-client-urls",
                    &format!("https://{member}:2379"),
                    "--listen-peer-urls",
                    "https://0.0.0.0:2380",
                    "--initial-advertise-peer-urls",
                    &format!("https://{member}:2380"),
                    "--initial-cluster",
                    &cluster,
                    "--client-cert-auth",
                    "--trusted-ca-file",
                    "/certs/ca.crt",
                    "--cert-file",
                    &format!("/certs/{member}.crt"),
                    "--key-file",
                    &format!("/certs/{member}.key"),
                    "--peer-client-cert-auth",
                    "--peer-trusted-ca-file",
                    "/certs/ca.crt",
                    "--peer-cert-file",
                    &format!("/certs/{member}.crt"),
                    "--peer-key-file",
                    &format!("/certs/{member}.key"),
                ],
            );
        }
    }
    let endpoints: Vec<String> = MEMBERS
        .iter()
        .map(|member| {
            let port = run("docker", &["port", member, "2379/tcp"]);
            format!("https://{}", port.lines().next().unwrap().trim())
        })
        .collect();
    if fresh {
        let path = std::env::var("PATH").unwrap_or_default();
        let etcdctl = |program: &str, args: &[&str], more: &[(&str, &str)]| {
            let mut command = Command::new(program);
            command
                .args(args)
                .env("PATH", format!("{}:{path}", lab().display()))
                .env("ETCDCTL_ENDPOINTS", endpoints.join(","))
                .env("ETCDCTL_CACERT", folder.join("ca.crt"))
                .env("ETCDCTL_CERT", folder.join("root.crt"))
                .env("ETCDCTL_KEY", folder.join("root.key"))
                .envs(more.iter().copied());
            finish(program, args, &mut command)
        };
        eventually(LONG, "etcd to answer", || {
            etcdctl("etcdctl", &["endpoint", "health"], &[])
        })
        .unwrap();
        etcdctl("etcdctl", &["user", "add", "root", "--no-password"], &[]).unwrap();
        let _ = etcdctl("etcdctl", &["role", "add", "root"], &[]);
        etcdctl("etcdctl", &["user", "grant-role", "root", "root"], &[]).unwrap();
        let script = source("examples/etcd-role.sh").display().to_string();
        for (cluster, ..) in CLUSTERS {
            let user = [
                ("CLUSTER", cluster),
                ("PASSWORD", PASSWORD),
                ("RECORDS", "/services/ /skydns/"),
            ];
            etcdctl("sh", &[&script], &user).unwrap();
        }
        // CoreDNS reads what it serves, and nothing else.
        let reader = format!("coredns:{PASSWORD}");
        etcdctl("etcdctl", &["role", "add", "coredns"], &[]).unwrap();
        let grant = [
            "role",
            "grant-permission",
            "coredns",
            "read",
            "/skydns/",
            "--prefix=true",
        ];
        etcdctl("etcdctl", &grant, &[]).unwrap();
        etcdctl("etcdctl", &["user", "add", &reader], &[]).unwrap();
        etcdctl(
            "etcdctl",
            &["user", "grant-role", "coredns", "coredns"],
            &[],
        )
        .unwrap();
        etcdctl("etcdctl", &["auth", "enable"], &[]).unwrap();
    }
    Registry::connect(folder, endpoints)
}

/// The names of etcd's members, which are those of their containers.
pub(crate) fn members() -> [&'static str; 3] {
    MEMBERS
}
