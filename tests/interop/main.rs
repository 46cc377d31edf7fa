//! The clients of other projects, unmodified, against what the operator wrote: each has to see what happens to the pods.
//!
//! One service with a registration in the format of each client, two clusters, one etcd; every client runs all the time,
//! so that those that look every few seconds cost no more than one of them. The programs are built from the Go modules
//! next to this file (`make clients`). What is measured is the time from the last change of a client's keys in etcd to
//! its list; `INTEROP_MARKDOWN=docs/formats.md` writes the table there anew.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use testbed::{Etcd, Process, WorkDir, eventually, free_port, tools};

use client::{Client, Kind, Pods, WhenNone, now};
use support::{SOON, Stage, Watcher};
use table::Cells;

mod client;
#[path = "../support/mod.rs"]
#[expect(
    dead_code,
    reason = "the end-to-end tests use all of it, and are warned of what nobody uses"
)]
mod support;
mod table;

/// Grants each format below the prefix that its client reads.
const POLICY: &str = "
rules:
  - {namespaces: ['*'], formats: [Plain], prefixes: ['', /], services: [web, web.rpc]}
  - {namespaces: ['*'], formats: [Grpc], prefixes: [grpc/]}
  - {namespaces: ['*'], formats: [Kitex], prefixes: [kitex/registry-etcd/]}
  - {namespaces: ['*'], formats: [Hertz], prefixes: [hertz/registry-etcd/]}
  - {namespaces: ['*'], formats: [Kratos], prefixes: [/microservices/]}
  - {namespaces: ['*'], formats: [SkyDns], prefixes: ['/skydns/local/skydns/{namespace}/']}
  - {namespaces: ['*'], formats: [GoMicro], prefixes: [/micro/registry/]}
  - {namespaces: ['*'], formats: [Traefik], prefixes: [traefik/]}
";

/// The lease of the second cluster's records in seconds: long enough that a busy machine keeps it alive, short enough to
/// wait for its end.
const SHORT_LEASE: u32 = 10;

const KINDS: [Kind; 9] = [
    Kind {
        name: "gRPC-Go",
        folder: "clients",
        modules: &[
            ("google.golang.org/grpc", "grpc"),
            ("go.etcd.io/etcd/client/v3", "etcd/client"),
        ],
        prefix: "grpc/web/",
        tells_pods: false,
        when_none: WhenNone::Empties,
    },
    Kind {
        name: "go-zero",
        folder: "clients",
        modules: &[("github.com/zeromicro/go-zero", "")],
        prefix: "web.rpc/",
        tells_pods: false,
        when_none: WhenNone::Empties,
    },
    Kind {
        name: "go-kit",
        folder: "clients",
        modules: &[("github.com/go-kit/kit", "")],
        prefix: "/web/",
        tells_pods: false,
        when_none: WhenNone::Empties,
    },
    Kind {
        name: "Kratos",
        folder: "clients",
        modules: &[
            ("github.com/go-kratos/kratos/v2", ""),
            (
                "github.com/go-kratos/kratos/contrib/registry/etcd/v2",
                "registry/etcd",
            ),
        ],
        prefix: "/microservices/web/",
        tells_pods: true,
        when_none: WhenNone::Keeps("Zero endpoint found"),
    },
    Kind {
        name: "Kitex",
        folder: "clients",
        modules: &[
            ("github.com/cloudwego/kitex", ""),
            ("github.com/kitex-contrib/registry-etcd", "registry-etcd"),
        ],
        prefix: "kitex/registry-etcd/web/",
        tells_pods: true,
        when_none: WhenNone::Keeps("resolver refresh failed"),
    },
    Kind {
        name: "Hertz",
        folder: "clients",
        modules: &[
            ("github.com/cloudwego/hertz", ""),
            ("github.com/hertz-contrib/registry/etcd", "registry/etcd"),
        ],
        prefix: "hertz/registry-etcd/web/",
        tells_pods: true,
        when_none: WhenNone::Empties,
    },
    Kind {
        name: "go-micro",
        folder: "clients",
        modules: &[
            ("go-micro.dev/v4", ""),
            (
                "github.com/go-micro/plugins/v4/registry/etcd",
                "registry/etcd",
            ),
        ],
        prefix: "/micro/registry/web/",
        tells_pods: true,
        when_none: WhenNone::Empties,
    },
    Kind {
        name: "CoreDNS",
        folder: "coredns",
        modules: &[("github.com/coredns/coredns", "")],
        prefix: "/skydns/",
        tells_pods: true,
        when_none: WhenNone::Empties,
    },
    Kind {
        name: "Traefik",
        folder: "traefik",
        modules: &[("github.com/traefik/traefik/v3", "")],
        prefix: "traefik/http/services/",
        tells_pods: false,
        when_none: WhenNone::Empties,
    },
];

/// How many of the clients watch etcd. The others ask again and again.
const WATCHING: usize = 6;

/// What the table has of each client, in this order.
const COLUMNS: [&str; 9] = [
    "IPv4",
    "IPv6",
    "scale up",
    "two clusters",
    "address taken over",
    "replaced address",
    "removal",
    "lease expiry",
    "last one gone",
];

/// The file in which the table is to be written anew.
fn markdown() -> Option<PathBuf> {
    let file = std::env::var_os("INTEROP_MARKDOWN")?;
    (!file.is_empty()).then(|| file.into())
}

/// The program of a module next to this file.
fn program(folder: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop");
    tools::program(&tests.join(folder)).unwrap()
}

/// `host:port` of the service's one port at each of a pod's addresses.
fn endpoints(addresses: &[String]) -> Vec<String> {
    let each = addresses.iter().map(|address| match address.parse() {
        // As RFC 5952 says, whatever the pod's status has.
        Ok(IpAddr::V6(ip)) => format!("[{ip}]:8080"),
        Ok(IpAddr::V4(ip)) => format!("{ip}:8080"),
        Err(error) => panic!("{address}: {error}"),
    });
    each.collect()
}

/// A registration for each format, with the same pods.
fn register(stage: &Stage, lease: u32) {
    let base = json!({
        "service": "web",
        "selector": {"matchLabels": {"app": "web"}},
        "ports": [{"name": "http", "port": 8080, "scheme": "http"}],
        "addressFamilies": ["IPv4", "IPv6"],
        "leaseTTLSeconds": lease,
    });
    let each = [
        (
            "go-zero",
            json!({"format": {"type": "Plain"}, "prefix": "", "service": "web.rpc"}),
        ),
        (
            "go-kit",
            json!({"format": {"type": "Plain"}, "prefix": "/"}),
        ),
        (
            "grpc",
            json!({"format": {"type": "Grpc"}, "prefix": "grpc/"}),
        ),
        ("kitex", json!({"format": {"type": "Kitex"}})),
        ("hertz", json!({"format": {"type": "Hertz"}})),
        (
            "kratos",
            json!({"format": {"type": "Kratos"}, "ports": [{"name": "grpc", "port": 8080, "scheme": "grpc"}]}),
        ),
        ("go-micro", json!({"format": {"type": "GoMicro"}})),
        (
            "sky-dns",
            json!({"format": {"type": "SkyDns", "skyDns": {"zone": "skydns.local"}}}),
        ),
        ("traefik", json!({"format": {"type": "Traefik"}})),
    ];
    for (name, more) in &each {
        let mut spec = base.clone();
        for (member, value) in more.as_object().unwrap() {
            spec[member] = value.clone();
        }
        stage.register(name, &spec);
    }
    for (name, _) in &each {
        stage.wait_condition(name, "Ready", "True", "Registered");
    }
}

/// CoreDNS on a port of its own, which is given too.
fn start_core_dns(etcd: &Etcd, logs: &Path) -> (Process, u16) {
    let program = program("coredns");
    let mut left = 3;
    loop {
        left -= 1;
        let port = free_port().unwrap();
        let config = logs.join("Corefile");
        let text = format!(
            "skydns.local:{port} {{
                bind 127.0.0.1
                errors
                etcd {{
                    path /skydns
                    endpoint {}
                }}
            }}",
            etcd.endpoints()[0]
        );
        std::fs::write(&config, text).unwrap();
        let process = Process::new("coredns", &program, logs.join("coredns.log"))
            .args(["-conf".as_ref(), config.as_os_str()]);
        process.start().unwrap();
        let ready = process.wait_ready(|| {
            // It names its version once it listens.
            if process.log_of_run().contains("CoreDNS-") {
                Ok(())
            } else {
                Err("its log does not say that it listens".to_owned())
            }
        });
        match ready {
            Ok(()) => return (process, port),
            // Another process may have taken the port.
            Err(error) if left == 0 => panic!("{error}"),
            Err(_) => {}
        }
    }
}

fn start(kind: &'static Kind, etcd: &Etcd, dns: u16, namespace: &str, logs: &Path) -> Client {
    let address = etcd.endpoints()[0].clone();
    let bare = address.trim_start_matches("http://").to_owned();
    let (folder, args) = match kind.name {
        "gRPC-Go" => (
            "clients",
            vec!["grpc".to_owned(), address, "grpc/web".to_owned()],
        ),
        "go-zero" => (
            "clients",
            vec!["go-zero".to_owned(), bare, "web.rpc".to_owned()],
        ),
        "go-kit" => (
            "clients",
            vec!["go-kit".to_owned(), address, "/web/".to_owned()],
        ),
        "CoreDNS" => {
            let name = format!("_http._tcp.web.{namespace}.skydns.local");
            (
                "clients",
                vec!["dns".to_owned(), format!("127.0.0.1:{dns}"), name],
            )
        }
        "Traefik" => ("traefik", vec![bare, format!("{namespace}.web.http")]),
        "go-micro" => (
            "clients",
            vec!["go-micro".to_owned(), bare, "web".to_owned()],
        ),
        other => (
            "clients",
            vec![other.to_lowercase(), address, "web".to_owned()],
        ),
    };
    Client::start(kind, program(folder), &args, logs)
}

/// How many watches etcd serves.
fn watches(etcd: &Etcd) -> Result<usize, String> {
    let text = etcd.metrics(0).map_err(|error| error.to_string())?;
    let name = "etcd_debugging_mvcc_watcher_total ";
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value
        .and_then(|value| value.parse().ok())
        .ok_or_else(|| format!("no {name}in etcd's metrics"))
}

/// The clients, what they ought to see, and what was measured.
struct Scene {
    clients: Vec<(Client, Cells)>,
    watcher: Watcher,
    pods: Pods,
}

impl Scene {
    /// A pod with these addresses.
    fn add(&mut self, pod: &str, addresses: &[String]) {
        for endpoint in endpoints(addresses) {
            self.pods.insert(endpoint, pod.to_owned());
        }
    }

    fn remove(&mut self, pod: &str) {
        self.pods.retain(|_, other| other != pod);
    }

    /// Waits until every client has what it ought to have, and notes for the table how long each took.
    fn see(&mut self, column: &'static str) {
        for (client, _) in &self.clients {
            client.wait(column, &self.pods);
        }
        self.note(column, |_, took| table::shown(took.unwrap()));
    }

    /// Notes the time between the last change of a client's keys since [`Watcher::forget`] and its list; `None` when
    /// nothing changed.
    fn note(&mut self, column: &'static str, shown: impl Fn(&Kind, Option<i64>) -> String) {
        let seen = self.watcher.seen();
        for (client, cells) in &mut self.clients {
            let mut events = seen.iter().rev();
            let last = events.find(|seen| seen.key.starts_with(client.kind.prefix));
            let took = last.map(|last| {
                let ago = i64::try_from(last.at.elapsed().as_micros()).unwrap();
                client.last().unwrap().at - (now() - ago)
            });
            println!("interop: {} | {column} | {took:?} µs", client.kind.name);
            cells.insert(column, shown(client.kind, took));
        }
    }

    /// Since a time, every list had these endpoints, and none an address twice.
    fn check_lists(&self, since: i64, kept: &Pods) {
        for (client, _) in &self.clients {
            let kept = client.list_of(kept);
            let lists = client.sightings().into_iter();
            for list in lists.filter(|list| list.at >= since) {
                let addresses = list.endpoints.iter().map(|(address, _)| address);
                let different: BTreeSet<&String> = addresses.collect();
                assert!(
                    different.len() == list.endpoints.len()
                        && kept
                            .iter()
                            .all(|endpoint| list.endpoints.contains(endpoint)),
                    "{}: {list:?}",
                    client.kind.name
                );
            }
        }
    }

    /// How many lists each client had until now.
    fn counts(&self) -> Vec<usize> {
        let each = self.clients.iter();
        each.map(|(client, _)| client.sightings().len()).collect()
    }
}

#[test]
fn the_table_is_of_the_versions_that_are_built() {
    if markdown().is_some() {
        // It is about to be written.
        return;
    }
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/formats.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    for kind in &KINDS {
        let row = format!("| {} | {} | ", kind.name, table::versions(kind));
        let again = "make interop MARKDOWN=docs/formats.md";
        assert!(
            docs.contains(&row),
            "docs/formats.md lacks {row:?}: {again}"
        );
    }
}

#[test]
fn every_client_sees_what_happens_to_the_pods() {
    let logs = WorkDir::new("clients").unwrap();
    let (east, west) = Stage::pair("interop");
    let etcd = &east.etcd;
    let first = east.operator("east").policy(POLICY).start().unwrap();
    let second = west.operator("west").policy(POLICY).start().unwrap();

    east.create_pod("web-0", "web", &json!({}), &json!({}));
    let shared = east.wait_ready("web-0");
    assert_eq!(shared.len(), 2, "an address of each family: {shared:?}");
    register(&east, 60);
    register(&west, SHORT_LEASE);
    // Traefik does not watch while nothing stands below its root key.
    let router = "traefik/http/routers/web/";
    let service = format!("{}.web.http@etcd", east.namespace);
    east.registry
        .put(&format!("{router}rule"), "Host(`web.example.org`)", 0);
    east.registry.put(&format!("{router}service"), &service, 0);

    let before = watches(etcd).unwrap();
    let (_core_dns, dns) = start_core_dns(etcd, logs.path());
    let clients = KINDS
        .iter()
        .map(|kind| start(kind, etcd, dns, &east.namespace, logs.path()));
    let mut scene = Scene {
        clients: clients.map(|client| (client, Cells::new())).collect(),
        watcher: Watcher::start(etcd, ""),
        pods: Pods::new(),
    };
    scene.add("web-0", &shared);
    for (client, cells) in &mut scene.clients {
        let list = client.wait("the first list", &scene.pods);
        let has = |v6: bool| {
            let mut each = list.endpoints.iter();
            let found = each.any(|(address, _)| address.starts_with('[') == v6);
            if found { "yes" } else { "no" }.to_owned()
        };
        cells.insert("IPv4", has(false));
        cells.insert("IPv6", has(true));
    }
    // Some clients begin to watch only after their first list, and miss what happens between.
    eventually(SOON, "the clients to watch", || {
        let now = watches(etcd)?;
        if now > before + WATCHING {
            Ok(())
        } else {
            Err(format!("{now} watches, {before} before"))
        }
    })
    .unwrap();

    scene.watcher.forget();
    west.create_pod("web-2", "web", &json!({}), &json!({}));
    let addresses = west.wait_ready("web-2");
    scene.add("web-2", &addresses);
    scene.see("two clusters");
    // These stay until their leases end, whatever happens to others.
    let steady = now();
    let other_cluster: Pods = scene
        .pods
        .clone()
        .into_iter()
        .filter(|(_, pod)| pod == "web-2")
        .collect();

    // The addresses of a pod that went are given to the next one by the testbed; so what follows has addresses by hand.
    let create_at = |pod: &str, addresses: &[String]| {
        east.create_pod_by_hand(pod, "web");
        let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        east.patch_pod_status(pod, &json!({"podIP": addresses[0], "podIPs": ips}));
        east.set_condition(pod, true);
    };

    // Two ready pods have the same addresses for a moment, and the later one counts.
    scene.watcher.forget();
    create_at("web-3", &shared);
    east.delete_pod("web-0");
    scene.remove("web-0");
    scene.add("web-3", &shared);
    for (client, _) in &scene.clients {
        client.wait("address taken over", &scene.pods);
    }
    scene.note("address taken over", |kind, took| {
        // Without the pod's name the record stays as it is.
        assert_eq!(took.is_some(), kind.tells_pods, "{}", kind.name);
        took.map_or_else(|| "no change".to_owned(), table::shown)
    });

    // Whoever sees this has seen all that came before.
    scene.watcher.forget();
    let addresses = ["10.240.0.6".to_owned(), "fd00:240::6".to_owned()];
    create_at("web-1", &addresses);
    scene.add("web-1", &addresses);
    scene.see("scale up");

    // An operator that is killed and started again is seen by no client.
    let lists = scene.counts();
    let restarted = now();
    scene.watcher.forget();
    let leader = || east.registry.get("/registrar/east/leader");
    let old = leader().unwrap();
    first.kill().unwrap();
    first.start().unwrap();
    eventually(SOON, "a new leader", || match leader() {
        Some(new) if new.value != old.value => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .unwrap();
    let seen = scene.watcher.seen();
    let records = seen
        .iter()
        .filter(|seen| !seen.key.starts_with("/registrar/"));
    assert_eq!(records.count(), 0, "{seen:#?}");

    assert_eq!(scene.counts(), lists, "a restart of the operator was seen");

    // A pod goes, and comes back under its name with other addresses.
    east.delete_pod("web-1");
    scene.remove("web-1");
    let kept = scene.pods.clone();
    eventually(SOON, "web-1 to be gone", || match east.pod("web-1") {
        Ok(pod) => Err(pod["metadata"].to_string()),
        Err(_) => Ok(()),
    })
    .unwrap();
    let addresses = ["10.240.0.7".to_owned(), "fd00:240::7".to_owned()];
    create_at("web-1", &addresses);
    scene.add("web-1", &addresses);
    scene.see("replaced address");
    // By then the new leader has compared everything.
    scene.check_lists(restarted, &kept);

    scene.watcher.forget();
    east.set_condition("web-3", false);
    scene.remove("web-3");
    scene.see("removal");
    scene.check_lists(steady, &other_cluster);

    scene.watcher.forget();
    second.kill().unwrap();
    scene.remove("web-2");
    scene.see("lease expiry");
    let none = Pods::new();

    // Nothing is left.
    scene.watcher.forget();
    let logged: Vec<usize> = scene
        .clients
        .iter()
        .map(|(client, _)| match client.kind.when_none {
            WhenNone::Keeps(log) => client.log().matches(log).count(),
            WhenNone::Empties => 0,
        })
        .collect();
    east.set_condition("web-1", false);
    for ((client, _), logged) in scene.clients.iter().zip(logged) {
        match client.kind.when_none {
            WhenNone::Empties => drop(client.wait("last one gone", &none)),
            WhenNone::Keeps(log) => {
                client.wait_log(log, logged + 1);
                // Not the whole of it, where it saw one record go before the other.
                let kept = client.last().unwrap().endpoints;
                let before = client.list_of(&scene.pods);
                assert!(!kept.is_empty(), "{}", client.kind.name);
                assert!(kept.iter().all(|one| before.contains(one)), "{kept:?}");
            }
        }
    }
    scene.note("last one gone", |kind, took| match kind.when_none {
        WhenNone::Empties => table::shown(took.unwrap()),
        WhenNone::Keeps(_) => "keeps what it had".to_owned(),
    });

    // And a client finds what comes after that.
    scene.remove("web-1");
    scene.add("web-3", &shared);
    east.set_condition("web-3", true);
    for (client, _) in &scene.clients {
        client.wait("one again", &scene.pods);
    }

    let rows: Vec<_> = scene
        .clients
        .into_iter()
        .map(|(client, cells)| (client.kind, cells))
        .collect();
    let text = table::markdown(&COLUMNS, &rows);
    println!("{text}");
    if let Some(file) = markdown() {
        table::write(&file, &text);
    }
}
