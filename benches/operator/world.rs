//! The servers that everything is measured on: one API server with its etcd, and one etcd as the registry.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use etcd_registrar::api::crd_yaml;
use etcd_registrar::kube::client::{ClientOptions, KubeClient};
use etcd_registrar::kube::wire::{Encoding, read_list_version};
use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};
use testbed::{Cluster, Etcd, Operator, eventually};
use tokio::runtime::Runtime;

use crate::observe::PATIENCE;
use crate::{Result, runtime};

/// The name of the cluster, in every key.
pub(crate) const CLUSTER: &str = "bench";
/// The namespace of the 10,000 endpoints, and the label `app` of their pods.
pub(crate) const BULK: &str = "bulk";
/// The label `app` of pods that no registration selects at first.
pub(crate) const OTHERS: &str = "others";
/// The conditions of a pod, in order.
const CONDITIONS: [&str; 5] = [
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
];
const NODE: &str = "node-1";
/// Puts of pods under way at a time. Each pod is put alone: pods of one transaction would share a resource version,
/// which real ones never do, and a list could end between them.
const PODS_AT_ONCE: usize = 64;

/// A pod of the benchmark.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) ready: bool,
}

impl Pod {
    /// Its key, below the prefix of its registration.
    pub(crate) fn key(&self, prefix: &str) -> String {
        format!("{prefix}{CLUSTER}/{}:8080", self.address)
    }
}

/// The servers, and what was made in them so far.
pub(crate) struct World {
    pub(crate) runtime: Runtime,
    pub(crate) cluster: Cluster,
    pub(crate) etcd: Arc<Etcd>,
    pub(crate) registry: etcd_client::Client,
    pub(crate) kube: kube::Client,
    /// The etcd of the API server.
    store: etcd_client::Client,
    /// A pod as the API server shows it, of which the others are copies.
    template: Value,
    /// The number of pods made.
    made: u32,
    bulk: Vec<Pod>,
    others: usize,
    registered_bulk: bool,
}

/// The default rule, with room for a namespace of 100,000 endpoints and more: limits are not measured.
const POLICY: &str = r#"
rules:
  - {namespaces: ["*"], formats: [Json], prefixes: ["/services/{namespace}/"]}
limits:
  - {namespaces: ["*"], endpoints: 1000000, endpointsPerRegistration: 1000000}
"#;

impl World {
    /// With this etcd as the registry.
    pub(crate) fn new(etcd: Etcd) -> Result<Self> {
        let cluster = Cluster::builder(CLUSTER).api_only().start()?;
        cluster.apply(&crd_yaml()?)?;
        cluster.kubectl(&[
            "wait",
            "--for=condition=Established",
            "crd/serviceregistrations.etcd-registrar.io",
            "--timeout=30s",
        ])?;
        let zone = [("topology.kubernetes.io/zone", "a")];
        cluster.add_node(NODE, &zone, &["172.20.0.1"])?;
        let runtime = runtime()?;
        let options = ClientOptions {
            kubeconfig: Some(cluster.kubeconfig().to_owned()),
            context: None,
        };
        let (kube, registry, store) = runtime.block_on(async {
            let kube = KubeClient::new(options).await?.current();
            let registry = etcd_client::Client::connect(etcd.endpoints(), None).await?;
            let store = etcd_client::Client::connect(cluster.etcd()?.endpoints(), None).await?;
            Ok::<_, crate::Error>((kube, registry, store))
        })?;
        let template = template(&cluster)?;
        Ok(Self {
            runtime,
            cluster,
            etcd: Arc::new(etcd),
            registry,
            kube,
            store,
            template,
            made: 0,
            bulk: Vec::new(),
            others: 0,
            registered_bulk: false,
        })
    }

    /// The registry, as a client takes it.
    pub(crate) fn endpoint(&self) -> String {
        self.etcd.endpoints_arg()
    }

    pub(crate) fn kubeconfig(&self) -> &Path {
        self.cluster.kubeconfig()
    }

    /// A replica of the operator that is ready.
    pub(crate) fn replica(&self) -> Result<Operator> {
        Ok(Operator::builder(testbed::operator_binary()?, CLUSTER)
            .kubeconfig(self.kubeconfig())
            .etcd(&self.etcd)
            .policy(POLICY)
            .start()?)
    }

    /// An operator that is ready and, being alone, leads.
    pub(crate) fn operator(&self) -> Result<Operator> {
        let operator = self.replica()?;
        wait_metric(&operator, "etcd_registrar_leader", 1)?;
        Ok(operator)
    }

    /// Ends the only operator with SIGTERM and starts it again; it leads afterwards.
    pub(crate) fn restart(&self, operator: &Operator) -> Result<()> {
        operator.stop()?;
        operator.start()?;
        wait_metric(operator, "etcd_registrar_leader", 1)
    }

    pub(crate) fn namespace(&self, name: &str) -> Result<()> {
        let body = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        let answer = self
            .cluster
            .request("POST", "/api/v1/namespaces", &body.to_string())?;
        match answer.status {
            409 => Ok(()),
            _ => Ok(answer.ok().map(drop)?),
        }
    }

    /// Makes pods with the label `app`, in a namespace that is there.
    ///
    /// They are written to the etcd of the API server as copies of a pod that it made itself: 100,000 pods through the API,
    /// two requests each, would take longer than everything that is measured.
    pub(crate) fn pods(
        &mut self,
        namespace: &str,
        app: &str,
        count: usize,
        ready: impl Fn(usize) -> bool,
    ) -> Result<Vec<Pod>> {
        let first = self.made;
        let pods: Vec<Pod> = (first..)
            .take(count)
            .enumerate()
            .map(|(at, number)| Pod {
                namespace: namespace.to_owned(),
                name: format!("{app}-{number:06}"),
                // 10.16.0.0 and on: enough for a million, and nothing is ever sent there.
                address: Ipv4Addr::from(0x0a10_0000 + number),
                ready: ready(at),
            })
            .collect();
        self.made += u32::try_from(count)?;
        let put = |pod: &Pod| {
            let key = format!("/registry/pods/{namespace}/{}", pod.name);
            let value = copy(&self.template, pod, app).to_string();
            let mut store = self.store.kv_client();
            async move { store.put(key, value, None).await }
        };
        if let Some((last, others)) = pods.split_last() {
            self.runtime.block_on(async {
                let mut puts = futures::stream::iter(others)
                    .map(put)
                    .buffer_unordered(PODS_AT_ONCE);
                let mut done = 0_usize;
                while puts.try_next().await?.is_some() {
                    done += 1;
                    if done.is_multiple_of(10_000) {
                        eprintln!("bench:   {done} of {count} pods made");
                    }
                }
                put(last).await
            })?;
            // Out of the API server's cache, which programs list from: once it has the last one it has them all.
            let path = format!(
                "/api/v1/namespaces/{namespace}/pods/{}?resourceVersion=0",
                last.name
            );
            eventually(PATIENCE, "the last pod", || {
                let answer = self.cluster.request("GET", &path, "");
                answer.map_err(|error| error.to_string())?.ok().map(drop)
            })?;
        }
        Ok(pods)
    }

    /// Registers the pods of a namespace that have this label; gives the prefix of the keys.
    pub(crate) fn register(&self, namespace: &str, app: &str) -> Result<String> {
        let path = registrations(namespace);
        let body = json!({
            "apiVersion": "etcd-registrar.io/v1alpha1",
            "kind": "ServiceRegistration",
            "metadata": {"name": app},
            "spec": {
                "selector": {"matchLabels": {"app": app}},
                "ports": [{"name": "http", "port": 8080}],
            },
        });
        let request = http::Request::post(path)
            .header("content-type", "application/json")
            .body(body.to_string().into_bytes())?;
        self.runtime.block_on(self.kube.request_text(request))?;
        Ok(prefix(namespace, app))
    }

    pub(crate) fn unregister(&self, namespace: &str, app: &str) -> Result<()> {
        let path = format!("{}/{app}", registrations(namespace));
        let request = http::Request::delete(path).body(Vec::new())?;
        self.runtime.block_on(self.kube.request_text(request))?;
        Ok(())
    }

    /// Patches the status of a pod as a kubelet does; gives the resource version.
    pub(crate) fn set_ready(&self, pod: &Pod, ready: bool) -> Result<u64> {
        self.runtime.block_on(set_ready(&self.kube, pod, ready))
    }

    /// So many ready pods that a registration `bulk` would select.
    pub(crate) fn bulk(&mut self, count: usize) -> Result<Vec<Pod>> {
        if self.bulk.is_empty() {
            eprintln!("bench: making {count} ready pods");
            self.namespace(BULK)?;
            self.bulk = self.pods(BULK, BULK, count, |_| true)?;
        }
        Ok(self.bulk.clone())
    }

    /// As [`World::bulk`], registered by this operator.
    pub(crate) fn registered_bulk(&mut self, count: usize, operator: &Operator) -> Result<()> {
        self.bulk(count)?;
        if !self.registered_bulk {
            self.register(BULK, BULK)?;
            self.registered_bulk = true;
        }
        self.wait_registered(operator, count)
    }

    /// More ready pods in the same namespace, so that there are `count` of them together.
    pub(crate) fn others(&mut self, count: usize) -> Result<()> {
        let more = count.saturating_sub(self.bulk.len() + self.others);
        if more > 0 {
            eprintln!("bench: making {more} pods more");
            self.pods(BULK, OTHERS, more, |_| true)?;
            self.others += more;
        }
        Ok(())
    }

    /// Waits until so many endpoints are registered, and nothing is under way.
    pub(crate) fn wait_registered(&self, operator: &Operator, count: usize) -> Result<()> {
        wait_metric(operator, "etcd_registrar_endpoints_registered", count)?;
        wait_metric(operator, "etcd_registrar_queue_depth", 0)
    }

    /// The revision of the registry: it grows with every write.
    pub(crate) fn revision(&self) -> Result<i64> {
        let answer = self
            .runtime
            .block_on(self.registry.kv_client().get("/", None))?;
        Ok(answer.header().map_or(0, |header| header.revision()))
    }
}

/// The prefix of the keys of a registration.
pub(crate) fn prefix(namespace: &str, service: &str) -> String {
    format!("/services/{namespace}/{service}/")
}

fn registrations(namespace: &str) -> String {
    format!("/apis/etcd-registrar.io/v1alpha1/namespaces/{namespace}/serviceregistrations")
}

/// Waits until a metric of the operator has this value.
pub(crate) fn wait_metric(operator: &Operator, name: &str, value: usize) -> Result<()> {
    eventually(4 * PATIENCE, &format!("{name} to be {value}"), || {
        let now = operator
            .metric(name, &[])
            .map_err(|error| error.to_string())?;
        if now == value as f64 {
            Ok(())
        } else {
            Err(format!("it is {now}"))
        }
    })?;
    Ok(())
}

/// Patches the status of a pod as a kubelet does; gives the resource version.
pub(crate) async fn set_ready(kube: &kube::Client, pod: &Pod, ready: bool) -> Result<u64> {
    let now =
        k8s_openapi::jiff::Timestamp::from_second(k8s_openapi::jiff::Timestamp::now().as_second())?;
    let status = if ready { "True" } else { "False" };
    let condition =
        |name: &str| json!({"type": name, "status": status, "lastTransitionTime": now.to_string()});
    let patch =
        json!({"status": {"conditions": [condition("Ready"), condition("ContainersReady")]}});
    let path = format!(
        "/api/v1/namespaces/{}/pods/{}/status",
        pod.namespace, pod.name
    );
    let request = http::Request::patch(path)
        .header("content-type", "application/strategic-merge-patch+json")
        .body(patch.to_string().into_bytes())?;
    let answer = kube.request_text(request).await?;
    Ok(read_list_version(Encoding::Json, answer.as_bytes())?)
}

/// A running and ready pod of usual size, made through the API.
fn template(cluster: &Cluster) -> Result<Value> {
    let probe = json!({"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 5});
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "template",
            "namespace": "default",
            "labels": {"app": "template", "version": "v1", "pod-template-hash": "6d4cf56db6"},
            "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "9090"},
        },
        "spec": {
            "nodeName": NODE,
            "containers": [{
                "name": "main",
                "image": "example.com/shop/web:1.2.3",
                "ports": [{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9090}],
                "env": [{"name": "LOG_LEVEL", "value": "info"}, {"name": "REGION", "value": "eu"}],
                "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
                "livenessProbe": probe,
                "readinessProbe": probe,
                "volumeMounts": [{"name": "config", "mountPath": "/etc/web"}],
            }],
            "volumes": [{"name": "config", "configMap": {"name": "web"}}],
        },
    });
    let pods = "/api/v1/namespaces/default/pods";
    let path = format!("{pods}/template");
    cluster.request("POST", pods, &pod.to_string())?.ok()?;
    let now = "2026-01-01T00:00:00Z";
    let condition = |name: &str| json!({"type": name, "status": "True", "lastTransitionTime": now});
    let conditions = CONDITIONS.map(condition);
    let status = json!({"status": {
        "phase": "Running",
        "startTime": now,
        "hostIP": "172.20.0.1",
        "hostIPs": [{"ip": "172.20.0.1"}],
        "podIP": "10.15.0.1",
        "podIPs": [{"ip": "10.15.0.1"}],
        "conditions": conditions,
        "containerStatuses": [{
            "name": "main",
            "image": "example.com/shop/web:1.2.3",
            "imageID": "example.com/shop/web@sha256:0000000000000000000000000000000000000000000000000000000000000000",
            "containerID": "containerd://0000000000000000000000000000000000000000000000000000000000000000",
            "ready": true,
            "started": true,
            "restartCount": 0,
            "state": {"running": {"startedAt": now}},
        }],
    }});
    cluster
        .patch(&format!("{path}/status"), &status.to_string())?
        .ok()?;
    let text = cluster.request("GET", &path, "")?.ok()?;
    // No kubelet is there to end it.
    let now = r#"{"gracePeriodSeconds":0}"#;
    cluster.request("DELETE", &path, now)?.ok()?;
    let mut template: Value = serde_json::from_str(&text)?;
    if let Some(metadata) = template
        .pointer_mut("/metadata")
        .and_then(Value::as_object_mut)
    {
        metadata.remove("resourceVersion");
    }
    Ok(template)
}

/// The template under another name.
fn copy(template: &Value, pod: &Pod, app: &str) -> Value {
    let mut copy = template.clone();
    let mut set = |pointer: &str, value: Value| {
        if let Some(place) = copy.pointer_mut(pointer) {
            *place = value;
        }
    };
    let address = pod.address.to_string();
    let number = u32::from(pod.address);
    set("/metadata/name", json!(pod.name));
    set("/metadata/namespace", json!(pod.namespace));
    set(
        "/metadata/uid",
        json!(format!("8b0a6f2e-5d1c-4c3b-9a7e-0000{number:08x}")),
    );
    set("/metadata/labels/app", json!(app));
    set("/status/podIP", json!(address));
    set("/status/podIPs", json!([{"ip": address}]));
    if !pod.ready {
        for at in [2, 3] {
            set(&format!("/status/conditions/{at}/status"), json!("False"));
        }
        set("/status/containerStatuses/0/ready", json!(false));
    }
    copy
}

/// The memory of a process in MB (10^6 bytes): resident now, and at most so far.
pub(crate) fn memory(operator: &Operator) -> Result<(f64, f64)> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", operator.process().pid()?))?;
    let field = |name: &str| -> Result<f64> {
        let kib: f64 = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.split_whitespace().next())
            .ok_or_else(|| format!("no {name} in /proc"))?
            .parse()?;
        Ok(kib * 1024.0 / 1e6)
    };
    Ok((field("VmRSS:")?, field("VmHWM:")?))
}

/// Waits until the resident memory has not grown for a while; gives it and the peak.
pub(crate) fn settled_memory(operator: &Operator) -> Result<(f64, f64)> {
    const STILL: Duration = Duration::from_secs(5);
    let mut most = memory(operator)?.0;
    let mut since = std::time::Instant::now();
    while since.elapsed() < STILL {
        std::thread::sleep(Duration::from_millis(100));
        let now = memory(operator)?.0;
        if now > most {
            most = now;
            since = std::time::Instant::now();
        }
    }
    memory(operator)
}
