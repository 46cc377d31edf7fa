//! The programs of the usual tutorials beside what replaces them, on one etcd: `docs/from-tutorials.md`.
//!
//! The `original` side is written as the tutorials write it, with nothing but a client of etcd: a lease, a put, a loop of keepalives; a
//! get, a watch, a map. Each reader sees what either writer registers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

#[path = "own_etcd/mod.rs"]
mod own_etcd;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use etcd_client::{Client, EventType, GetOptions, PutOptions, WatchOptions};
use etcd_registrar::discovery::{Discovery, Service, Settings, Source};
use etcd_registrar::format::template::{self, Template};
use etcd_registrar::registration::{Format, Instance, Registrar, Registration};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use own_etcd::Etcd;

/// What anything here may take at most, on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// The TTL of the tutorials.
const TTL: i64 = 5;

/// A writer as the tutorials have it.
struct OriginalWriter {
    client: Client,
    lease: i64,
    keepalives: JoinHandle<()>,
}

impl OriginalWriter {
    async fn register(etcd: &Etcd, records: &[(&str, &str)]) -> Self {
        let mut client = etcd.client().await;
        let lease = client.lease_grant(TTL, None).await.unwrap().id();
        for (key, value) in records {
            let options = PutOptions::new().with_lease(lease);
            client.put(*key, *value, Some(options)).await.unwrap();
        }
        let (mut keeper, mut answers) = client.lease_keep_alive(lease).await.unwrap();
        let keepalives = tokio::spawn(async move {
            while keeper.keep_alive().await.is_ok() {
                if answers.message().await.ok().flatten().is_none() {
                    return;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        Self {
            client,
            lease,
            keepalives,
        }
    }

    /// The tutorials' `RevokeLease`.
    async fn revoke(mut self) {
        self.keepalives.abort();
        self.client.lease_revoke(self.lease).await.unwrap();
    }

    /// The process is gone.
    fn crash(self) {
        self.keepalives.abort();
    }
}

/// A reader as the tutorials have it: a map of keys, and in how many answers of the watch what went.
#[derive(Clone, Default)]
struct OriginalReader {
    map: Arc<Mutex<BTreeMap<String, String>>>,
    removals: Arc<Mutex<Vec<usize>>>,
}

impl OriginalReader {
    async fn start(etcd: &Etcd, prefix: &str) -> Self {
        let mut client = etcd.client().await;
        let this = Self::default();
        let options = GetOptions::new().with_prefix();
        let list = client.get(prefix, Some(options)).await.unwrap();
        for kv in list.kvs() {
            let (key, value) = (kv.key_str().unwrap(), kv.value_str().unwrap());
            this.map.lock().unwrap().insert(key.into(), value.into());
        }
        let options = WatchOptions::new().with_prefix();
        let mut watch = client.watch(prefix, Some(options)).await.unwrap();
        let seen = this.clone();
        tokio::spawn(async move {
            while let Ok(Some(answer)) = watch.message().await {
                let mut gone = 0;
                for event in answer.events() {
                    let kv = event.kv().unwrap();
                    let key = kv.key_str().unwrap().to_owned();
                    let mut map = seen.map.lock().unwrap();
                    match event.event_type() {
                        EventType::Put => {
                            map.insert(key, kv.value_str().unwrap().to_owned());
                        }
                        EventType::Delete => {
                            map.remove(&key);
                            gone += 1;
                        }
                    }
                }
                if gone > 0 {
                    seen.removals.lock().unwrap().push(gone);
                }
            }
        });
        this
    }

    async fn sees(&self, wanted: &[(&str, &str)]) {
        let wanted: BTreeMap<String, String> = wanted
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        until(
            || *self.map.lock().unwrap() == wanted,
            || format!("{:?}", self.map.lock().unwrap()),
        )
        .await;
    }
}

async fn until(holds: impl Fn() -> bool, found: impl Fn() -> String) {
    timeout(SOON, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("found {}", found()));
}

/// Our reader.
async fn follow(etcd: &Etcd, source: Source) -> Service {
    let discovery = Discovery::connect(settings(etcd)).await.unwrap();
    let list = discovery.follow(source);
    timeout(SOON, list.ready()).await.unwrap();
    list
}

async fn finds(list: &Service, wanted: &[&str]) {
    let found = || -> Vec<String> {
        let list = list.snapshot();
        list.iter()
            .map(|endpoint| endpoint.address().to_owned())
            .collect()
    };
    until(|| found() == wanted, || format!("{:?}", found())).await;
}

/// Our writer.
async fn register(etcd: &Etcd, instances: impl IntoIterator<Item = Instance>) -> Registration {
    let registrar = Registrar::connect(settings(etcd)).await.unwrap();
    let ttl = Duration::from_secs(TTL.unsigned_abs());
    let registration = registrar.register(ttl, instances).unwrap();
    timeout(SOON, registration.registered()).await.unwrap();
    registration
}

fn settings(etcd: &Etcd) -> Settings {
    Settings {
        endpoints: etcd.0.endpoints().to_vec(),
        ..Settings::default()
    }
}

fn instance(service: &str, address: &str) -> Instance {
    Instance::new("vm", "default", service, address.parse().unwrap()).unwrap()
}

fn template(key: &str, value: &str) -> Format {
    let source = template::Source {
        key: key.to_owned(),
        value: value.to_owned(),
        json: false,
        ttl: TTL,
        labels: Vec::new(),
        annotations: Vec::new(),
    };
    Format::Template(Some(Template::new(source).unwrap()))
}

#[tokio::test]
async fn keys_of_nodes_under_a_lease_of_five_seconds() {
    let etcd = Etcd::start().await;
    let original = OriginalReader::start(&etcd, "/web/").await;
    let source = Source::service_in(Format::Plain, "/", "default", "web").unwrap();
    let ours = follow(&etcd, source).await;

    let writer = OriginalWriter::register(&etcd, &[("/web/node1", "10.0.0.1:8080")]).await;
    finds(&ours, &["10.0.0.1:8080"]).await;
    let node2 = instance("web", "10.0.0.2:8080").name("node2").unwrap();
    let node2 = node2
        .format(template("/web/{{ pod }}", "{{ addr }}"), "/")
        .unwrap();
    let registration = register(&etcd, [node2]).await;
    original
        .sees(&[
            ("/web/node1", "10.0.0.1:8080"),
            ("/web/node2", "10.0.0.2:8080"),
        ])
        .await;
    finds(&ours, &["10.0.0.1:8080", "10.0.0.2:8080"]).await;
    // The one that crashed goes with its lease, the other at once.
    writer.crash();
    original.sees(&[("/web/node2", "10.0.0.2:8080")]).await;
    finds(&ours, &["10.0.0.2:8080"]).await;
    registration.close().await.unwrap();
    original.sees(&[]).await;
    finds(&ours, &[]).await;
}

#[tokio::test]
async fn json_with_a_name_and_an_address_for_a_resolver_of_grpc() {
    let etcd = Etcd::start().await;
    let original = OriginalReader::start(&etcd, "web/").await;
    let source = Source::service_in(Format::Template(None), "", "default", "web").unwrap();
    let ours = follow(&etcd, source).await;

    let first = r#"{"PSM":"web","IP":"10.0.0.1:9090"}"#;
    let writer = OriginalWriter::register(&etcd, &[("web/10.0.0.1:9090", first)]).await;
    let format = template(
        "web/{{ addr }}",
        r#"{"PSM":{{ service|tojson }},"IP":{{ addr|tojson }}}"#,
    );
    let second = instance("web", "10.0.0.2:9090").format(format, "").unwrap();
    let registration = register(&etcd, [second]).await;
    let value = r#"{"PSM":"web","IP":"10.0.0.2:9090"}"#;
    original
        .sees(&[("web/10.0.0.1:9090", first), ("web/10.0.0.2:9090", value)])
        .await;
    // What a resolver gives to its balancer.
    finds(&ours, &["10.0.0.1:9090", "10.0.0.2:9090"]).await;
    let urls: Vec<_> = ours.snapshot().iter().map(|e| e.url().to_owned()).collect();
    assert_eq!(urls, ["10.0.0.1:9090", "10.0.0.2:9090"]);
    let _channel: tonic::transport::Channel = ours.channel();
    registration.close().await.unwrap();
    writer.revoke().await;
    original.sees(&[]).await;
    finds(&ours, &[]).await;
}

#[tokio::test]
async fn several_keys_under_one_lease_that_is_revoked() {
    let etcd = Etcd::start().await;
    let original = OriginalReader::start(&etcd, "/services/").await;
    let plain = |service: &str| {
        let source = Source::service_in(Format::Plain, "/services/", "default", service);
        follow(&etcd, source.unwrap())
    };
    let (api, web) = (plain("api").await, plain("web").await);

    let records = [
        ("/services/api/10.0.0.1:80", "10.0.0.1:80"),
        ("/services/web/10.0.0.1:81", "10.0.0.1:81"),
        ("/services/web/10.0.0.1:82", "10.0.0.1:82"),
    ];
    let writer = OriginalWriter::register(&etcd, &records).await;
    finds(&api, &["10.0.0.1:80"]).await;
    finds(&web, &["10.0.0.1:81", "10.0.0.1:82"]).await;
    writer.revoke().await;
    finds(&web, &[]).await;
    original.sees(&[]).await;

    let all = records.map(|(key, address)| {
        let service = key.split('/').nth(2).unwrap();
        instance(service, address)
            .format(Format::Plain, "/services/")
            .unwrap()
    });
    let registration = register(&etcd, all).await;
    original.sees(&records).await;
    finds(&api, &["10.0.0.1:80"]).await;
    let mut client = etcd.client().await;
    let mut leases = std::collections::BTreeSet::new();
    for (key, _) in records {
        leases.insert(client.get(key, None).await.unwrap().kvs()[0].lease());
    }
    assert_eq!(leases.len(), 1);
    registration.close().await.unwrap();
    original.sees(&[]).await;
    finds(&web, &[]).await;
    // All at once, of either.
    assert_eq!(*original.removals.lock().unwrap(), [3, 3]);
}

#[tokio::test]
async fn a_gateway_that_watches_all_servers() {
    let etcd = Etcd::start().await;
    let original = OriginalReader::start(&etcd, "/server/").await;
    let ours = follow(&etcd, Source::prefix(Format::Plain, "/server/").unwrap()).await;
    // What a gateway makes of it: its routes.
    let routes = || -> Vec<(String, String)> {
        let list = ours.snapshot();
        let pair = |e: &Arc<etcd_registrar::discovery::Endpoint>| {
            (e.service().to_owned(), e.address().to_owned())
        };
        list.iter().map(pair).collect()
    };
    let pair = |service: &str, address: &str| (service.to_owned(), address.to_owned());

    let writer =
        OriginalWriter::register(&etcd, &[("/server/user/10.0.0.1:80", "10.0.0.1:80")]).await;
    let order = instance("order", "10.0.0.2:80")
        .format(Format::Plain, "/server/")
        .unwrap();
    let registration = register(&etcd, [order]).await;
    original
        .sees(&[
            ("/server/order/10.0.0.2:80", "10.0.0.2:80"),
            ("/server/user/10.0.0.1:80", "10.0.0.1:80"),
        ])
        .await;
    let wanted = [pair("order", "10.0.0.2:80"), pair("user", "10.0.0.1:80")];
    until(|| routes() == wanted, || format!("{:?}", routes())).await;
    // A server moves.
    let moved = instance("order", "10.0.0.3:80")
        .format(Format::Plain, "/server/")
        .unwrap();
    registration.update([moved]).unwrap();
    let wanted = [pair("order", "10.0.0.3:80"), pair("user", "10.0.0.1:80")];
    until(|| routes() == wanted, || format!("{:?}", routes())).await;
    writer.revoke().await;
    original
        .sees(&[("/server/order/10.0.0.3:80", "10.0.0.3:80")])
        .await;
    registration.close().await.unwrap();
    until(|| routes().is_empty(), || format!("{:?}", routes())).await;
}

#[tokio::test]
async fn after_etcd_lost_its_data_only_ours_is_back() {
    let etcd = Etcd::start().await;
    let source = Source::service_in(Format::Plain, "/", "default", "web").unwrap();
    let ours = follow(&etcd, source).await;
    let _writer = OriginalWriter::register(&etcd, &[("/web/node1", "10.0.0.1:8080")]).await;
    let node2 = instance("web", "10.0.0.2:8080");
    let node2 = node2.format(Format::Plain, "/").unwrap();
    let _registration = register(&etcd, [node2]).await;
    finds(&ours, &["10.0.0.1:8080", "10.0.0.2:8080"]).await;
    etcd.does(|etcd| {
        etcd.kill()?;
        etcd.wipe()?;
        etcd.start()
    })
    .await;
    finds(&ours, &["10.0.0.2:8080"]).await;
}
