//! What the end-to-end tests and the fault tests share: a stage to play on, a registry client, a watcher, makers of
//! objects.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use etcd_client::{
    Certificate, Client, ConnectOptions, EventType, GetOptions, Identity, LeaseTimeToLiveOptions,
    PutOptions, TlsOptions, WatchOptions,
};
use serde_json::{Map, Value, json};
use testbed::{Cluster, Etcd, EtcdBuilder, Operator, OperatorBuilder, ROOT_PASSWORD, eventually};
use tokio::sync::mpsc;

/// What may take so long at most, on a busy machine. Nothing waits for the whole of it when all is well.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// "Within a second" (design, sections 5 and 8), with room for a busy machine.
pub(crate) const A_SECOND: Duration = Duration::from_millis(1800);
/// The annotations that steer the pods of the testbed.
const STEER: &str = "testbed.etcd-registrar.io";
/// The operator under test.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_etcd-registrar");

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === Control planes ===

/// Planes that tests take and give back. An operator watches a whole cluster and writes the status of every
/// registration in it, so that two tests on one plane would disturb each other.
struct Pool {
    /// Numbers of planes that were made and that nobody uses.
    free: Vec<usize>,
    made: usize,
}

/// A plane takes about 600 MB.
const MOST_PLANES: usize = 4;

static POOL: Mutex<Pool> = Mutex::new(Pool {
    free: Vec::new(),
    made: 0,
});
static GIVEN_BACK: Condvar = Condvar::new();

/// Several at once or none, so that two tests which need two can't wait for each other.
fn take_planes(wanted: usize) -> Vec<usize> {
    let mut pool = lock(&POOL);
    while pool.free.len() + (MOST_PLANES - pool.made) < wanted {
        pool = GIVEN_BACK
            .wait(pool)
            .unwrap_or_else(PoisonError::into_inner);
    }
    let mut taken = Vec::new();
    while taken.len() < wanted {
        let number = pool.free.pop().unwrap_or_else(|| {
            pool.made += 1;
            pool.made
        });
        taken.push(number);
    }
    taken
}

fn repository(path: &str) -> String {
    format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))
}

fn apply_deploy(cluster: &Cluster) {
    let deploy = repository("deploy");
    cluster.kubectl(&["apply", "-k", &deploy]).unwrap();
    let crd = "crd/serviceregistrations.etcd-registrar.io";
    cluster
        .kubectl(&["wait", "--for=condition=Established", crd, "--timeout=60s"])
        .unwrap();
}

/// A control plane with everything that `kubectl apply -k deploy/` makes, of one test alone.
pub(crate) struct Plane {
    number: usize,
    pub(crate) cluster: &'static Cluster,
    /// The rights of the operator's ServiceAccount, and no others.
    pub(crate) kubeconfig: PathBuf,
}

impl Plane {
    fn prepare(number: usize) -> Self {
        let cluster = Cluster::shared(&format!("plane-{number}")).unwrap();
        apply_deploy(cluster);
        let kubeconfig = cluster
            .kubeconfig_for_service_account("etcd-registrar", "etcd-registrar")
            .unwrap();
        Self {
            number,
            cluster,
            kubeconfig,
        }
    }

    /// An operator with the rights of `deploy/`, to be completed and started.
    pub(crate) fn operator(&self, cluster_name: &str, etcd: &Etcd) -> OperatorBuilder {
        Operator::builder(BINARY, cluster_name)
            .kubeconfig(&self.kubeconfig)
            .etcd(etcd)
    }

    /// `kubectl apply -k deploy/`, as was done when the test began.
    pub(crate) fn apply_deploy(&self) {
        apply_deploy(self.cluster);
    }

    /// The UID that tells this cluster from others.
    pub(crate) fn uid(&self) -> String {
        let namespace = get(self.cluster, "/api/v1/namespaces/kube-system").unwrap();
        namespace["metadata"]["uid"].as_str().unwrap().to_owned()
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        // The next test's operator must find no registrations. If this fails, that test will say so.
        let _ = self.cluster.kubectl(&["delete", "sreg", "--all", "-A"]);
        lock(&POOL).free.push(self.number);
        GIVEN_BACK.notify_all();
    }
}

/// A plane, an etcd and a namespace that only one test uses.
pub(crate) struct Stage {
    pub(crate) namespace: String,
    pub(crate) registry: Registry,
    pub(crate) etcd: Arc<Etcd>,
    pub(crate) plane: Plane,
}

impl Stage {
    /// With a plain etcd of one member.
    pub(crate) fn new(test: &str) -> Self {
        Self::with_etcd(test, Etcd::builder(test).unsafe_no_fsync())
    }

    /// With another etcd.
    pub(crate) fn with_etcd(test: &str, etcd: EtcdBuilder) -> Self {
        let plane = take_planes(1).into_iter().map(Plane::prepare).next();
        let etcd = etcd.start().unwrap();
        Self::on(test, plane.unwrap(), etcd)
    }

    /// Two planes with one etcd and a namespace of the same name.
    pub(crate) fn pair(test: &str) -> (Self, Self) {
        let mut planes = take_planes(2).into_iter().map(Plane::prepare);
        let (first, second) = (planes.next().unwrap(), planes.next().unwrap());
        let etcd = Etcd::builder(test).unsafe_no_fsync().start().unwrap();
        let first = Self::on(test, first, etcd);
        let namespace = &first.namespace;
        let second = Self {
            namespace: namespace.clone(),
            registry: Registry::connect(&first.etcd),
            etcd: first.etcd.clone(),
            plane: second,
        };
        let create = ["create", "namespace", namespace];
        second.plane.cluster.kubectl(&create).unwrap();
        (first, second)
    }

    fn on(test: &str, plane: Plane, etcd: Etcd) -> Self {
        Self {
            namespace: plane.cluster.new_namespace(test).unwrap(),
            registry: Registry::connect(&etcd),
            etcd: Arc::new(etcd),
            plane,
        }
    }

    /// An operator of this plane and etcd, to be completed and started.
    pub(crate) fn operator(&self, cluster_name: &str) -> OperatorBuilder {
        self.plane.operator(cluster_name, &self.etcd)
    }

    /// The default prefix of a service's records in all clusters.
    pub(crate) fn scope(&self, service: &str) -> String {
        format!("/services/{}/{service}/", self.namespace)
    }

    /// kubectl in the test's namespace.
    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        let mut all = vec!["-n", &self.namespace];
        all.extend(args);
        self.plane.cluster.kubectl(&all).unwrap()
    }

    /// Binds the operator's cluster role to a service account of the test's namespace; cluster roles have no namespace,
    /// and so the binding's name begins with the test's.
    pub(crate) fn bind_operator_role(&self, binding: &str, account: &str) {
        let namespace = &self.namespace;
        self.kubectl(&[
            "create",
            "clusterrolebinding",
            &format!("{namespace}-{binding}"),
            "--clusterrole=etcd-registrar",
            &format!("--serviceaccount={namespace}:{account}"),
        ]);
    }

    /// `kubectl apply` in the test's namespace.
    pub(crate) fn apply(&self, yaml: &str) -> String {
        self.plane
            .cluster
            .kubectl_input(&["-n", &self.namespace, "apply", "-f", "-"], yaml)
            .unwrap()
    }

    // Registrations.

    fn registration_path(&self, name: &str) -> String {
        let namespace = &self.namespace;
        format!(
            "/apis/etcd-registrar.io/v1alpha1/namespaces/{namespace}/serviceregistrations/{name}"
        )
    }

    /// Creates a registration: of the pods labelled `app: NAME`, port 8080, but for what `spec` says.
    pub(crate) fn register(&self, name: &str, spec: &Value) {
        let body = registration(name, spec).to_string();
        let path = self.registration_path("");
        request(
            self.plane.cluster,
            "POST",
            path.trim_end_matches('/'),
            &body,
        );
    }

    /// The registration as the API server has it.
    pub(crate) fn registration(&self, name: &str) -> Value {
        get(self.plane.cluster, &self.registration_path(name)).unwrap()
    }

    /// Changes members of a registration's spec; null removes one.
    pub(crate) fn change(&self, name: &str, spec: &Value) {
        patch(
            self.plane.cluster,
            &self.registration_path(name),
            &json!({"spec": spec}),
        );
    }

    /// Deletes a registration.
    pub(crate) fn unregister(&self, name: &str) {
        request(
            self.plane.cluster,
            "DELETE",
            &self.registration_path(name),
            "",
        );
    }

    /// Waits until a registration is as it should be, and gives it.
    pub(crate) fn wait_registration(
        &self,
        name: &str,
        what: &str,
        check: impl Fn(&Value) -> bool,
    ) -> Value {
        eventually(SOON, &format!("{name}: {what}"), || {
            let object = get(self.plane.cluster, &self.registration_path(name))?;
            if check(&object) {
                Ok(object)
            } else {
                Err(object["status"].to_string())
            }
        })
        .unwrap()
    }

    /// Waits until the status tells of the newest spec and a condition has this status and reason, and gives its message.
    pub(crate) fn wait_condition(
        &self,
        name: &str,
        kind: &str,
        status: &str,
        reason: &str,
    ) -> String {
        let what = format!("{kind}={status} ({reason})");
        let object = self.wait_registration(name, &what, |object| {
            let found = condition(object, kind);
            found["observedGeneration"] == object["metadata"]["generation"]
                && found["status"] == status
                && found["reason"] == reason
        });
        condition(&object, kind)["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    // Pods.

    fn pod_path(&self, name: &str) -> String {
        format!("/api/v1/namespaces/{}/pods/{name}", self.namespace)
    }

    /// Creates a pod with the label `app` and a container `main` with the port `http` 8080, but for what `metadata` and
    /// `spec` say.
    pub(crate) fn create_pod(&self, name: &str, app: &str, metadata: &Value, spec: &Value) {
        let mut pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": app}},
            "spec": {"containers": [container()], "terminationGracePeriodSeconds": 1},
        });
        merge(&mut pod["metadata"], metadata);
        merge(&mut pod["spec"], spec);
        let path = self.pod_path("");
        request(
            self.plane.cluster,
            "POST",
            path.trim_end_matches('/'),
            &pod.to_string(),
        );
    }

    /// A pod as the API server has it.
    pub(crate) fn pod(&self, name: &str) -> Result<Value, String> {
        get(self.plane.cluster, &self.pod_path(name))
    }

    /// A merge patch of a pod.
    pub(crate) fn patch_pod(&self, name: &str, body: &Value) {
        patch(self.plane.cluster, &self.pod_path(name), body);
    }

    /// A merge patch of a pod's status.
    pub(crate) fn patch_pod_status(&self, name: &str, status: &Value) {
        let path = format!("{}/status", self.pod_path(name));
        patch(self.plane.cluster, &path, &json!({"status": status}));
    }

    /// Deletes a pod with its grace period.
    pub(crate) fn delete_pod(&self, name: &str) {
        request(self.plane.cluster, "DELETE", &self.pod_path(name), "");
    }

    /// Makes a pod ready or not, through the testbed's stages.
    pub(crate) fn set_ready(&self, name: &str, ready: bool) {
        self.patch_pod(
            name,
            &json!({"metadata": steer("ready", ready.then_some("true").or(Some("false")))}),
        );
    }

    /// A pod whose readiness only [`Stage::set_condition`] changes. It begins not ready, with an address, whose pod is returned.
    pub(crate) fn create_pod_by_hand(&self, name: &str, app: &str) -> Value {
        self.create_pod(name, app, &by_hand(false), &json!({}));
        eventually(SOON, &format!("pod {name} to run"), || {
            let pod = self.pod(name)?;
            if addresses(&pod).is_empty() {
                Err(pod["status"].to_string())
            } else {
                Ok(pod)
            }
        })
        .unwrap()
    }

    /// Sets the condition `Ready`, and no other one stays. Gives when the API server had done it.
    pub(crate) fn set_condition(&self, name: &str, ready: bool) -> Instant {
        self.try_set_condition(name, ready).unwrap()
    }

    /// The same, when the API server may be away.
    pub(crate) fn try_set_condition(&self, name: &str, ready: bool) -> Result<Instant, String> {
        let status = if ready { "True" } else { "False" };
        let conditions = json!([{"type": "Ready", "status": status}]);
        let path = format!("{}/status", self.pod_path(name));
        let body = json!({"status": {"conditions": conditions}}).to_string();
        let answer = self.plane.cluster.patch(&path, &body);
        answer.map_err(|error| error.to_string())?.ok()?;
        Ok(Instant::now())
    }

    /// Waits until a pod is ready, and gives its addresses; the primary one first.
    pub(crate) fn wait_ready(&self, name: &str) -> Vec<String> {
        let pod = eventually(SOON, &format!("pod {name} to be ready"), || {
            let pod = self.pod(name)?;
            if condition(&pod, "Ready")["status"] == "True" {
                Ok(pod)
            } else {
                Err(pod["status"].to_string())
            }
        })
        .unwrap();
        addresses(&pod)
    }

    /// The primary address of a pod.
    pub(crate) fn pod_address(&self, name: &str) -> String {
        addresses(&self.pod(name).unwrap()).swap_remove(0)
    }

    /// The pods with a label `app` that are ready and not being deleted, by name.
    pub(crate) fn ready_pods(&self, app: &str) -> Result<Vec<Value>, String> {
        let path = format!(
            "/api/v1/namespaces/{}/pods?labelSelector=app%3D{app}",
            self.namespace
        );
        let list = get(self.plane.cluster, &path)?;
        let mut pods: Vec<Value> = list["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|pod| {
                condition(pod, "Ready")["status"] == "True"
                    && pod["metadata"]["deletionTimestamp"].is_null()
            })
            .cloned()
            .collect();
        pods.sort_by_key(|pod| pod["metadata"]["name"].to_string());
        Ok(pods)
    }

    /// Waits until exactly these keys stand below a prefix, and gives the records.
    pub(crate) fn wait_keys<K: AsRef<str>>(&self, prefix: &str, keys: &[K]) -> Vec<Record> {
        self.registry.wait_keys(SOON, prefix, keys)
    }

    /// Waits until `count` keys stand below a prefix, and gives the records.
    pub(crate) fn wait_count(&self, prefix: &str, count: usize) -> Vec<Record> {
        eventually(SOON, &format!("{count} keys below {prefix}"), || {
            let records = self.registry.try_list(prefix)?;
            if records.len() == count {
                Ok(records)
            } else {
                Err(format!("{records:#?}"))
            }
        })
        .unwrap()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ =
            self.plane
                .cluster
                .kubectl(&["delete", "namespace", &self.namespace, "--wait=false"]);
    }
}

/// A GET.
pub(crate) fn get(cluster: &Cluster, path: &str) -> Result<Value, String> {
    let text = cluster
        .request("GET", path, "")
        .map_err(|error| error.to_string())?
        .ok()?;
    serde_json::from_str(&text).map_err(|error| error.to_string())
}

fn request(cluster: &Cluster, method: &str, path: &str, body: &str) {
    cluster.request(method, path, body).unwrap().ok().unwrap();
}

/// A merge patch.
pub(crate) fn patch(cluster: &Cluster, path: &str, body: &Value) {
    cluster
        .patch(path, &body.to_string())
        .unwrap()
        .ok()
        .unwrap();
}

/// A kubeconfig of a ServiceAccount with the rights of `deploy/` but some for one resource.
pub(crate) fn without(stage: &Stage, name: &str, resource: &str, verbs: &[&str]) -> PathBuf {
    let cluster = stage.plane.cluster;
    let role = cluster
        .kubectl(&["get", "clusterrole", "etcd-registrar", "-o", "json"])
        .unwrap();
    let role: Value = serde_json::from_str(&role).unwrap();
    let mut rules = Vec::new();
    for rule in role["rules"].as_array().unwrap() {
        for one in rule["resources"].as_array().unwrap() {
            let mut rule = rule.clone();
            rule["resources"] = json!([one]);
            if one == resource {
                let kept: Vec<&Value> = rule["verbs"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter(|verb| !verbs.contains(&verb.as_str().unwrap()))
                    .collect();
                if kept.is_empty() {
                    continue;
                }
                rule["verbs"] = json!(kept);
            }
            rules.push(rule);
        }
    }
    assert_ne!(&json!(rules), &role["rules"]);
    let namespace = &stage.namespace;
    let full = format!("{namespace}-{name}");
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": {"name": full}, "rules": rules,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": {"name": full},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": full},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
        },
    ]});
    cluster.apply(&list.to_string()).unwrap();
    cluster
        .kubeconfig_for_service_account(namespace, name)
        .unwrap()
}

// === Objects ===

fn merge(into: &mut Value, from: &Value) {
    if let (Some(into), Some(from)) = (into.as_object_mut(), from.as_object()) {
        into.extend(from.clone());
    }
}

/// The container `main` with the port `http` 8080.
pub(crate) fn container() -> Value {
    json!({
        "name": "main",
        "image": "example.com/web:1",
        "ports": [{"name": "http", "containerPort": 8080}],
    })
}

/// A registration of the pods labelled `app: NAME`, port 8080, but for what `spec` says.
pub(crate) fn registration(name: &str, spec: &Value) -> Value {
    let mut object = json!({
        "apiVersion": "etcd-registrar.io/v1alpha1",
        "kind": "ServiceRegistration",
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "ports": [{"name": "http", "port": 8080}],
        },
    });
    merge(&mut object["spec"], spec);
    object
}

/// A Deployment of pods labelled `app: NAME`.
pub(crate) fn deployment(name: &str, replicas: u32) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [container()], "terminationGracePeriodSeconds": 1},
            },
        },
    })
}

/// Metadata with one annotation that steers the testbed's pods, such as `start-delay`.
pub(crate) fn steer(annotation: &str, value: Option<&str>) -> Value {
    let mut annotations = Map::new();
    annotations.insert(format!("{STEER}/{annotation}"), value.into());
    json!({"annotations": annotations})
}

/// Metadata of a pod whose readiness only [`Stage::set_condition`] changes after this.
pub(crate) fn by_hand(ready: bool) -> Value {
    json!({"annotations": {
        format!("{STEER}/ready"): ready.to_string(),
        // The stages leave its conditions alone for so long.
        format!("{STEER}/flap"): "600m",
    }})
}

/// A condition of an object's status, or null.
pub(crate) fn condition(object: &Value, kind: &str) -> Value {
    object["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == kind)
        .cloned()
        .unwrap_or_default()
}

/// The addresses of a pod, the primary one first.
pub(crate) fn addresses(pod: &Value) -> Vec<String> {
    pod["status"]["podIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|address| address["ip"].as_str())
        .map(str::to_owned)
        .collect()
}

// === The registry ===

/// A key as etcd holds it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Record {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) lease: i64,
    pub(crate) created: i64,
    pub(crate) modified: i64,
}

impl Record {
    fn new(kv: &etcd_client::KeyValue) -> Self {
        Self {
            key: String::from_utf8_lossy(kv.key()).into_owned(),
            value: String::from_utf8_lossy(kv.value()).into_owned(),
            lease: kv.lease(),
            created: kv.create_revision(),
            modified: kv.mod_revision(),
        }
    }

    /// The value, where the format is Json.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.value).unwrap()
    }
}

/// The keys of records, for comparisons.
pub(crate) fn keys(records: &[Record]) -> Vec<String> {
    records.iter().map(|record| record.key.clone()).collect()
}

fn connect_options(etcd: &Etcd) -> ConnectOptions {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(Duration::from_secs(2))
        .with_timeout(Duration::from_secs(5));
    if let (Some(ca), Some(root)) = (etcd.ca_cert(), etcd.root_cert()) {
        let read = |path| std::fs::read(path).unwrap();
        let _ = rustls::crypto::ring::default_provider().install_default();
        options = options.with_tls(
            TlsOptions::new()
                .ca_certificate(Certificate::from_pem(read(ca)))
                .identity(Identity::from_pem(read(&root.cert), read(&root.key))),
        );
    } else if etcd.user().is_some() {
        options = options.with_user("root", ROOT_PASSWORD);
    }
    options
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// A client of the registry, as root.
pub(crate) struct Registry {
    runtime: tokio::runtime::Runtime,
    client: Client,
    endpoints: Vec<String>,
    options: ConnectOptions,
}

impl Registry {
    /// Connects to an etcd that runs.
    pub(crate) fn connect(etcd: &Etcd) -> Self {
        Self::connect_to(etcd, etcd.endpoints())
    }

    /// Connects to some of its endpoints only: those that a test does not break.
    pub(crate) fn connect_to(etcd: &Etcd, endpoints: &[String]) -> Self {
        let runtime = runtime();
        let options = connect_options(etcd);
        let client = runtime
            .block_on(Client::connect(endpoints, Some(options.clone())))
            .unwrap();
        Self {
            runtime,
            client,
            endpoints: endpoints.to_vec(),
            options,
        }
    }

    fn wait<T>(&self, future: impl Future<Output = Result<T, etcd_client::Error>>) -> T {
        self.runtime.block_on(future).unwrap()
    }

    /// What stands below a prefix, in order; all keys when it is empty.
    pub(crate) fn try_list(&self, prefix: &str) -> Result<Vec<Record>, String> {
        let options = if prefix.is_empty() {
            GetOptions::new().with_all_keys()
        } else {
            GetOptions::new().with_prefix()
        };
        self.runtime
            .block_on(self.client.kv_client().get(prefix, Some(options)))
            .map(|answer| answer.kvs().iter().map(Record::new).collect())
            .map_err(|error| error.to_string())
    }

    /// The same, once etcd answers: a connection to an etcd that was restarted breaks at its first use.
    pub(crate) fn list(&self, prefix: &str) -> Vec<Record> {
        eventually(SOON, "etcd to answer", || self.try_list(prefix)).unwrap()
    }

    /// One key.
    pub(crate) fn get(&self, key: &str) -> Option<Record> {
        let answer = self.wait(self.client.kv_client().get(key, None));
        answer.kvs().first().map(Record::new)
    }

    /// Waits until exactly these keys stand below a prefix, and gives the records.
    pub(crate) fn wait_keys<K: AsRef<str>>(
        &self,
        timeout: Duration,
        prefix: &str,
        wanted: &[K],
    ) -> Vec<Record> {
        let mut wanted: Vec<&str> = wanted.iter().map(AsRef::as_ref).collect();
        wanted.sort_unstable();
        eventually(timeout, &format!("the keys {wanted:#?}"), || {
            let records = self.try_list(prefix)?;
            if records
                .iter()
                .map(|record| record.key.as_str())
                .eq(wanted.iter().copied())
            {
                Ok(records)
            } else {
                Err(format!("{:#?}", keys(&records)))
            }
        })
        .unwrap()
    }

    /// The revision of etcd, once it answers. Each time over a new connection: an old one may have lost its token, or
    /// lead to an etcd that was restarted.
    pub(crate) fn revision(&self) -> i64 {
        let ask = async || {
            let client = Client::connect(&self.endpoints, Some(self.options.clone())).await?;
            client.kv_client().get("-", None).await
        };
        let answer = eventually(SOON, "etcd to answer", || self.runtime.block_on(ask())).unwrap();
        answer.header().unwrap().revision()
    }

    /// Puts a key, on no lease when it is 0.
    pub(crate) fn put(&self, key: &str, value: &str, lease: i64) {
        let options = PutOptions::new().with_lease(lease);
        self.wait(self.client.kv_client().put(key, value, Some(options)));
    }

    /// Deletes a key.
    pub(crate) fn delete(&self, key: &str) {
        self.wait(self.client.kv_client().delete(key, None));
    }

    /// The ids of all leases.
    pub(crate) fn leases(&self) -> BTreeSet<i64> {
        let answer = self.wait(self.client.lease_client().leases());
        answer
            .leases()
            .iter()
            .map(etcd_client::LeaseStatus::id)
            .collect()
    }

    /// The TTL that was asked for when a lease was granted, and what is left of it.
    pub(crate) fn ttl(&self, lease: i64) -> (i64, i64) {
        let options = LeaseTimeToLiveOptions::new();
        let answer = self.wait(
            self.client
                .lease_client()
                .time_to_live(lease, Some(options)),
        );
        (answer.granted_ttl(), answer.ttl())
    }

    /// Ends a lease and all its keys.
    pub(crate) fn revoke(&self, lease: i64) {
        self.wait(self.client.lease_client().revoke(lease));
    }
}

// === The watcher ===

/// What a watcher saw.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// When it came in.
    pub(crate) at: Instant,
    pub(crate) revision: i64,
    pub(crate) key: String,
    /// `None`: it was deleted, or its lease ended.
    pub(crate) put: Option<Record>,
}

#[derive(Default)]
struct Notes {
    seen: Vec<Seen>,
    /// All events up to here are noted.
    revision: i64,
    /// Why nothing more will be noted.
    broken: Option<String>,
}

/// A client that watches a prefix from now on and notes every event. It survives the loss of its connection: etcd then
/// sends what it missed.
pub(crate) struct Watcher {
    notes: Arc<Mutex<Notes>>,
    /// Asks for the revision that the watch has reached; dropped, it ends the thread.
    ask: Option<mpsc::UnboundedSender<()>>,
    thread: Option<JoinHandle<()>>,
    registry: Registry,
}

impl Watcher {
    /// Watches a prefix from now on; all keys when it is empty.
    pub(crate) fn start(etcd: &Etcd, prefix: &str) -> Self {
        let registry = Registry::connect(etcd);
        let after = registry.revision();
        Self::after(registry, prefix, after)
    }

    /// Watches a prefix through the endpoints of a client: every event after a revision.
    pub(crate) fn after(registry: Registry, prefix: &str, after: i64) -> Self {
        let notes = Arc::new(Mutex::new(Notes {
            revision: after,
            ..Notes::default()
        }));
        let (ask, asked) = mpsc::unbounded_channel();
        let watch = Watch {
            endpoints: registry.endpoints.clone(),
            options: registry.options.clone(),
            prefix: prefix.to_owned(),
            notes: notes.clone(),
        };
        let thread = std::thread::spawn(move || runtime().block_on(watch.run(asked)));
        let watcher = Self {
            notes,
            ask: Some(ask),
            thread: Some(thread),
            registry,
        };
        watcher.seen();
        watcher
    }

    /// Everything that has happened until now.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        let now = self.registry.revision();
        eventually(
            SOON,
            &format!("the watcher to reach revision {now}"),
            || {
                let notes = lock(&self.notes);
                assert!(
                    notes.broken.is_none(),
                    "the watch broke: {:?}",
                    notes.broken
                );
                if notes.revision >= now {
                    return Ok(notes.seen.clone());
                }
                if let Some(ask) = &self.ask {
                    let _ = ask.send(());
                }
                Err(format!("it is at {}", notes.revision))
            },
        )
        .unwrap()
    }

    /// Waits for an event, which may have happened already.
    pub(crate) fn wait(&self, what: &str, check: impl Fn(&Seen) -> bool) -> Seen {
        eventually(SOON, what, || {
            let notes = lock(&self.notes);
            notes
                .seen
                .iter()
                .find(|seen| check(seen))
                .cloned()
                .ok_or_else(|| format!("{:#?}", notes.seen))
        })
        .unwrap()
    }

    /// Nothing has happened since it was started or [`Watcher::forget`] was called.
    #[track_caller]
    pub(crate) fn assert_silent(&self, when: impl Display) {
        let seen = self.seen();
        assert!(seen.is_empty(), "{when}: {seen:#?}");
    }

    /// Forgets what has happened until now.
    pub(crate) fn forget(&self) {
        self.seen();
        lock(&self.notes).seen.clear();
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.ask = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Prints what `docs/reliability.md` tells of a fault: the events that a reader saw on endpoints that did not change, and
/// how long after the end of the fault the first change got through.
pub(crate) fn tell(row: &str, events: usize, recovered: Duration) {
    println!(
        "faults: {row} | events {events} | recovered in {} ms",
        recovered.as_millis()
    );
}

struct Watch {
    endpoints: Vec<String>,
    options: ConnectOptions,
    prefix: String,
    notes: Arc<Mutex<Notes>>,
}

impl Watch {
    async fn run(self, mut asked: mpsc::UnboundedReceiver<()>) {
        // Until the test ends, which shows by the end of the channel.
        while !asked.is_closed() {
            if self.follow(&mut asked).await.is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// One watch; `None` when it has to be started anew.
    async fn follow(&self, asked: &mut mpsc::UnboundedReceiver<()>) -> Option<()> {
        let client = Client::connect(&self.endpoints, Some(self.options.clone()))
            .await
            .ok()?;
        let from = lock(&self.notes).revision + 1;
        let options = WatchOptions::new().with_start_revision(from);
        let options = if self.prefix.is_empty() {
            options.with_all_keys()
        } else {
            options.with_prefix()
        };
        let mut stream = client
            .watch_client()
            .watch(self.prefix.as_str(), Some(options))
            .await
            .ok()?;
        loop {
            tokio::select! {
                asked = asked.recv() => {
                    if asked.is_none() {
                        return Some(());
                    }
                    stream.request_progress().await.ok()?;
                }
                message = stream.message() => {
                    if self.note(&message.ok()??) {
                        return Some(());
                    }
                }
            }
        }
    }

    /// Notes what a message holds; true when nothing more can come.
    fn note(&self, message: &etcd_client::WatchResponse) -> bool {
        let at = Instant::now();
        let mut notes = lock(&self.notes);
        if message.canceled() {
            notes.broken = Some(message.cancel_reason().to_owned());
            return true;
        }
        for event in message.events() {
            let record = event.kv().map(Record::new);
            let Some(record) = record else { continue };
            notes.revision = notes.revision.max(record.modified);
            notes.seen.push(Seen {
                at,
                revision: record.modified,
                key: record.key.clone(),
                put: (event.event_type() == EventType::Put).then_some(record),
            });
        }
        // A message without events tells how far the watch is; that it was created does not.
        if message.events().is_empty()
            && !message.created()
            && let Some(header) = message.header()
        {
            notes.revision = notes.revision.max(header.revision());
        }
        false
    }
}
