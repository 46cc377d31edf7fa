//! Clients that know nothing of this project: one that asks CoreDNS by name, and one of gRPC over the discovery library.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use etcd_registrar::discovery::Discovery;
use serde_json::{Value, json};
use testbed::{Process, eventually, tools};
use tonic::Request;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;

use crate::watcher::runtime;
use crate::world::{LONG, PASSWORD, SHOP, World, run, source};

/// What CoreDNS serves, of which `web.shop` is the service.
const ZONE: &str = "skydns.local";
/// So many calls by name: more than there are pods.
const CALLS: usize = 8;

/// The name of a pod of `west`, which is not removed before it has come to its end.
const CALLER: &str = "call-by-name";

/// The names of the pods of `web` in `east`.
fn pods(world: &World) -> BTreeSet<String> {
    let pods = world.get("east", &["pods", "-n", SHOP, "-lapp=web"]);
    let pods = pods["items"].as_array().unwrap();
    pods.iter()
        .filter(|pod| crate::nodes::stays(pod))
        .map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned())
        .collect()
}

/// An address of this machine that pods reach, too: that on Docker's own network. What nodes of kind send to port 53 of the
/// one on theirs goes to Docker's resolver.
fn here() -> Ipv4Addr {
    let template = "{{range .IPAM.Config}}{{.Gateway}} {{end}}";
    let said = run(
        "docker",
        &["network", "inspect", "--format", template, "bridge"],
    );
    let mut addresses = said.split_whitespace();
    addresses.find_map(|text| text.parse().ok()).unwrap()
}

/// CoreDNS on this machine, with a user of etcd's who may read its records and nothing else. On port 53, since a pod's
/// resolver asks at no other.
fn start_core_dns(world: &World, at: Ipv4Addr) -> Process {
    let program = tools::program(&source("tests/interop/coredns")).unwrap();
    let file = |name: &str| world.folder.join(name).display().to_string();
    let config = format!(
        "{ZONE}:53 {{
            bind {at}
            errors
            etcd {{
                path /skydns
                endpoint {}
                tls {} {} {}
                credentials coredns {PASSWORD}
            }}
        }}
",
        world.registry.endpoints.join(" "),
        file("coredns.crt"),
        file("coredns.key"),
        file("ca.crt"),
    );
    std::fs::write(world.folder.join("Corefile"), config).unwrap();
    let process = Process::new("coredns", program, world.folder.join("coredns.log"))
        .args(["-conf", &file("Corefile")]);
    process.start().unwrap();
    let listens = process.wait_ready(|| {
        // It names its version once it listens.
        match process.log_of_run().contains("CoreDNS-") {
            true => Ok(()),
            false => Err("its log does not say that it listens".to_owned()),
        }
    });
    listens.unwrap();
    process
}

/// The newest list that the DNS client of the interop tests printed: `address pod`.
fn answers(client: &Process) -> Option<Vec<String>> {
    let log = client.log_of_run();
    let line = log
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("seen "))?;
    // The last line may be half written.
    let seen: Value = serde_json::from_str(line).ok()?;
    let text = |entry: &Value, member: &str| entry[member].as_str().unwrap_or_default().to_owned();
    let list = seen["endpoints"].as_array()?;
    Some(
        list.iter()
            .map(|entry| format!("{} {}", text(entry, "address"), text(entry, "pod")))
            .collect(),
    )
}

/// A process on this machine and a pod of `west` ask CoreDNS for the server of `east`, and call what it answers.
pub(crate) fn by_name(world: &World) {
    let keys = world.settled("east", "web", 4);
    let registration = format!(
        "apiVersion: etcd-registrar.io/v1alpha1\nkind: ServiceRegistration\nmetadata: {{name: web-names, namespace: {SHOP}}}\n\
         spec:\n  service: web\n  selector: {{matchLabels: {{app: web}}}}\n  ports: [{{name: http}}]\n\
         \x20 format: {{type: SkyDns, skyDns: {{zone: {ZONE}}}}}\n"
    );
    world.apply("east", "web-names", &registration);
    let at = here();
    let dns = start_core_dns(world, at);

    // Its SRV, the A of each target, and the A of the service itself, which have to say the same.
    let wanted = pods(world);
    let client = Process::new(
        "clients",
        tools::program(&source("tests/interop/clients")).unwrap(),
        world.folder.join("dns.log"),
    )
    .args([
        "dns",
        &format!("{at}:53"),
        &format!("_http._tcp.web.{SHOP}.{ZONE}"),
    ]);
    client.start().unwrap();
    let found = eventually(LONG, "CoreDNS to answer with every pod", || {
        let list = answers(&client).ok_or_else(|| format!("no answer: {}", client.log_of_run()))?;
        let named: BTreeSet<String> = list
            .iter()
            .filter_map(|entry| Some(entry.split_once(' ')?.1.to_owned()))
            .collect();
        if named == wanted {
            Ok(list)
        } else {
            Err(format!("{list:?}, {}", dns.log()))
        }
    })
    .unwrap();
    let mut addresses: Vec<&str> = found
        .iter()
        .filter_map(|entry| Some(entry.split_once(' ')?.0))
        .collect();
    addresses.sort_unstable();
    let registered: Vec<&str> = keys
        .iter()
        .filter_map(|key| key.rsplit('/').next())
        .collect();
    assert_eq!(addresses, registered);
    for address in &addresses {
        crate::calls::get(address).unwrap();
    }
    world.note(&format!(
        "{} of {} called from the host by SRV and A",
        addresses.len(),
        keys.len()
    ));

    // A pod that has CoreDNS for a resolver calls the name.
    let url = format!("http://web.{SHOP}.{ZONE}:8080/");
    let mut args = vec!["call"];
    args.resize(CALLS + 1, &url);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": CALLER, "namespace": SHOP},
        "spec": {
            "restartPolicy": "Never",
            "dnsPolicy": "None",
            "dnsConfig": {"nameservers": [at]},
            "containers": [{"name": "call", "image": "etcd-registrar/web:kind", "args": args}],
        },
    });
    world.apply("west", CALLER, &pod.to_string());
    let said = world.finished("west", SHOP, CALLER);
    let served: Vec<&str> = said
        .lines()
        .filter_map(|line| line.strip_prefix(&format!("{url} 200 OK ")))
        .collect();
    assert_eq!(served.len(), CALLS, "{said}");
    assert!(served.iter().all(|pod| wanted.contains(*pod)), "{said}");
    world.note(&format!(
        "{CALLS} calls of a pod of west by name, none failed"
    ));

    world.unregister("east", "web-names", "/skydns/");
    let gone = eventually(LONG, "CoreDNS to answer with no pod", || {
        match answers(&client) {
            Some(list) if list.is_empty() => Ok(()),
            list => Err(format!("{list:?}")),
        }
    });
    gone.unwrap();
    world.note("no answer once the registration was deleted");
}

/// A channel of gRPC over the discovery library reaches every pod of `east`.
pub(crate) fn grpc(world: &World) {
    world.settled("east", "web", 4);
    let registration = format!(
        "apiVersion: etcd-registrar.io/v1alpha1\nkind: ServiceRegistration\nmetadata: {{name: web-grpc, namespace: {SHOP}}}\n\
         spec:\n  selector: {{matchLabels: {{app: web}}}}\n  ports: [{{name: grpc, port: 9090}}]\n"
    );
    world.apply("east", "web-grpc", &registration);
    let wanted = pods(world);
    let calls = runtime().block_on(async {
        let discovery = Discovery::connect(crate::calls::settings(world))
            .await
            .unwrap();
        let channel = discovery.service(SHOP, "web-grpc").unwrap().channel();
        let mut calls = 0;
        let mut reached = BTreeSet::new();
        let all = async {
            while reached != wanted {
                let mut health = tonic::client::Grpc::new(channel.clone());
                health.ready().await.unwrap();
                let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
                // A message with a text, and one with a number: 1 is SERVING.
                let codec = ProstCodec::<String, i32>::default();
                let answer = health
                    .unary(Request::new(String::new()), path, codec)
                    .await
                    .unwrap();
                assert_eq!(*answer.get_ref(), 1);
                let pod = answer.metadata().get("pod").unwrap().to_str().unwrap();
                reached.insert(pod.to_owned());
                calls += 1;
            }
        };
        tokio::time::timeout(LONG, all).await.unwrap();
        calls
    });
    world.unregister("east", "web-grpc", &format!("/services/{SHOP}/web-grpc/"));
    world.note(&format!(
        "{calls} calls over one channel reached all {} pods, none failed",
        wanted.len()
    ));
}
