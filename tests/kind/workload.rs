//! Deployments, StatefulSets and a probe that fails, played by real kubelets.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Instant, SystemTime};

use crate::calls::post;
use crate::nodes::stays;
use crate::watcher::Seen;
use crate::world::{LONG, SHOP, TTL, World};

/// A workload of the test's server, and its registration.
pub(crate) fn manifest(kind: &str, name: &str, replicas: u32) -> String {
    let service_name = if kind == "StatefulSet" {
        format!("  serviceName: {name}\n")
    } else {
        String::new()
    };
    format!(
        r#"apiVersion: apps/v1
kind: {kind}
metadata: {{name: {name}, namespace: {SHOP}}}
spec:
  replicas: {replicas}
{service_name}  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      terminationGracePeriodSeconds: 5
      # A node that is gone does not keep its pods for minutes.
      tolerations:
        - {{key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 300}}
      containers:
        - name: web
          image: etcd-registrar/web:kind
          args: [serve]
          ports: [{{name: http, containerPort: 8080}}]
          readinessProbe:
            httpGet: {{path: /ready, port: http}}
            periodSeconds: 1
            failureThreshold: 1
            # Not ready is what the server says, not that a busy machine lets it answer late.
            timeoutSeconds: 10
---
apiVersion: etcd-registrar.io/v1alpha1
kind: ServiceRegistration
metadata: {{name: {name}, namespace: {SHOP}}}
spec:
  selector: {{matchLabels: {{app: {name}}}}}
  ports: [{{name: http}}]
  leaseTTLSeconds: {TTL}
"#
    )
}

/// The fewest endpoints of a prefix that stood at any time, beginning from so many.
pub(crate) fn fewest(begin: usize, events: &[Seen], prefix: &str) -> usize {
    let mut now = begin;
    let mut least = begin;
    for event in events.iter().filter(|event| event.key.starts_with(prefix)) {
        if event.put {
            now += 1;
        } else {
            now -= 1;
        }
        least = least.min(now);
    }
    least
}

pub(crate) fn deployment(world: &World) {
    let prefix = format!("/services/{SHOP}/web/east/");
    let began = Instant::now();
    world.apply("east", "web", &manifest("Deployment", "web", 3));
    world.settled("east", "web", 3);
    world.note(&format!(
        "3 pods registered {:.1} s after apply",
        began.elapsed().as_secs_f64()
    ));
    let scale = |replicas: usize| {
        world.kubectl(
            "east",
            &[
                "scale",
                "deploy/web",
                "-n",
                SHOP,
                &format!("--replicas={replicas}"),
            ],
        );
        world.settled("east", "web", replicas);
    };
    scale(6);
    scale(4);
    let from = world.watcher.position();
    world.kubectl("east", &["rollout", "restart", "deploy/web", "-n", SHOP]);
    world.rollout("east", SHOP, "deploy/web");
    world.settled("east", "web", 4);
    let events = world.watcher.since(from);
    // A quarter of 4 may be away at a time.
    let least = fewest(4, &events, &prefix);
    assert!(least >= 3, "{least}: {events:#?}");
    assert_eq!(events.len(), 8, "{events:#?}");
    world.note(&format!(
        "rolling update: 4 puts, 4 deletes, never below {least} of 4"
    ));
}

pub(crate) fn statefulset(world: &World) {
    let prefix = format!("/services/{SHOP}/db/east/");
    world.apply("east", "db", &manifest("StatefulSet", "db", 2));
    world.settled("east", "db", 2);
    let from = world.watcher.position();
    world.kubectl("east", &["rollout", "restart", "sts/db", "-n", SHOP]);
    world.rollout("east", SHOP, "sts/db");
    world.settled("east", "db", 2);
    let events = world.watcher.since(from);
    assert!(
        events.iter().all(|event| event.key.starts_with(&prefix)),
        "{events:#?}"
    );
    let least = fewest(2, &events, &prefix);
    assert_eq!(least, 1, "{events:#?}");
    world.note(&format!(
        "rolling update of 2: {} events, never below 1",
        events.len()
    ));
}

/// What the API server says of a pod's condition Ready, and when it came.
fn reports(
    world: &World,
    pod: &str,
) -> (
    std::process::Child,
    std::sync::mpsc::Receiver<(String, SystemTime)>,
) {
    let kubeconfig = world.folder.join("east.kubeconfig");
    let template = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}{\"\\n\"}";
    let mut child = Command::new(testbed::tools::path("kubectl").unwrap())
        .arg(format!("--kubeconfig={}", kubeconfig.display()))
        .args(["get", "pod", pod, "-n", SHOP, "--watch", "-o", template])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            if sender.send((line, SystemTime::now())).is_err() {
                return;
            }
        }
    });
    (child, receiver)
}

/// The name, address and key of a pod of `web` in `east` that is not on its way out.
pub(crate) fn a_pod(world: &World) -> (String, String, String) {
    let pods = world.get("east", &["pods", "-n", SHOP, "-lapp=web"]);
    let mut pods = pods["items"].as_array().unwrap().iter();
    let pod = pods.find(|pod| stays(pod)).unwrap();
    let name = pod["metadata"]["name"].as_str().unwrap().to_owned();
    let ip = pod["status"]["podIP"].as_str().unwrap().to_owned();
    let key = format!("/services/{SHOP}/web/east/{ip}:8080");
    (name, ip, key)
}

/// A probe that fails takes the endpoint out, and one that passes puts it back.
pub(crate) fn probe(world: &World) {
    let mut delays = Vec::new();
    let (name, ip, key) = a_pod(world);
    let (mut child, told) = reports(world, &name);
    let next = |status: &str| loop {
        let (line, at) = told.recv_timeout(LONG).unwrap();
        if line == status {
            return at;
        }
    };
    next("True");
    for _ in 0..5 {
        for ready in [false, true] {
            let from = world.watcher.position();
            post(&ip, &format!("/switch?ready={ready}"));
            let reported = next(if ready { "True" } else { "False" });
            let seen = world.watcher.wait(from, &key, ready);
            // A watch of kubectl may be told a little later than the operator's.
            let delay = seen.at.duration_since(reported).unwrap_or_default();
            delays.push((ready, delay.as_secs_f64() * 1000.0));
            let others: Vec<Seen> = world
                .watcher
                .since(from)
                .into_iter()
                .filter(|seen| seen.key != key)
                .collect();
            assert!(others.is_empty(), "{others:#?}");
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    for ready in [false, true] {
        let mut times: Vec<f64> = delays
            .iter()
            .filter(|(of, _)| *of == ready)
            .map(|(_, ms)| *ms)
            .collect();
        times.sort_by(f64::total_cmp);
        let what = if ready { "back" } else { "gone" };
        world.note(&format!(
            "{what} {:.0} ms after the kubelet's report reached kubectl (median of 5; {:.0} at most)",
            times[times.len() / 2],
            times[times.len() - 1]
        ));
    }
}
