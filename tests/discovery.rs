//! The discovery library against a real etcd, and real gRPC servers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

#[path = "discovery/balance.rs"]
mod balance;
#[path = "discovery/faults.rs"]
mod faults;
#[path = "discovery/lists.rs"]
mod lists;
#[path = "own_etcd/mod.rs"]
mod own_etcd;

use std::time::Duration;

use etcd_client::Client;
use etcd_registrar::discovery::{Change, Changes, Discovery, Format, Service, Settings, State};
use etcd_registrar::format::{Place, Record};
use etcd_registrar::model::endpoint::{Endpoint, Protocol, Target};
use tokio::time::timeout;

use own_etcd::Etcd;

/// What anything here may take at most, on a busy machine.
const SOON: Duration = Duration::from_secs(30);

impl Etcd {
    fn settings(&self) -> Settings {
        Settings {
            endpoints: self.0.endpoints().to_vec(),
            user: self.0.user().map(Into::into),
            password_file: self.0.password_file().map(Into::into),
            ..Settings::default()
        }
    }

    async fn discovery(&self) -> Discovery {
        Discovery::connect(self.settings()).await.unwrap()
    }
}

/// A proxy before an etcd of one member, and the settings that lead through it.
fn through_proxy(etcd: &Etcd) -> (testbed::Proxy, Settings) {
    let proxy = testbed::Proxy::start(etcd.0.client_ports()[0]).unwrap();
    let settings = Settings {
        endpoints: vec![proxy.url("http")],
        ..Settings::default()
    };
    (proxy, settings)
}

/// An endpoint of the service `web` in the namespace `shop`.
fn endpoint(cluster: &str, address: &str) -> Endpoint {
    let (host, port) = address.rsplit_once(':').unwrap();
    Endpoint {
        target: Target {
            ip: host.trim_matches(['[', ']']).parse().unwrap(),
            port: port.parse().unwrap(),
            protocol: Protocol::Tcp,
        },
        port_name: "http".into(),
        scheme: "http".into(),
        cluster: cluster.into(),
        namespace: "shop".into(),
        service: "web".into(),
        pod: format!("web-{port}"),
        uid: format!("0b9e1c1e-4a52-4f0a-9c0e-{port:0>12}"),
        node: "n1".into(),
        zone: "eu-a".into(),
        weight: 100,
        metadata: vec![("version".into(), "v1".into())],
    }
}

/// The record of an endpoint in a format, as the operator writes it.
fn record(format: &Format, endpoint: &Endpoint) -> Record {
    let prefix = prefix_of(format);
    let place = Place { prefix };
    format
        .records(&place, std::slice::from_ref(endpoint))
        .remove(0)
}

fn prefix_of(format: &Format) -> &'static str {
    match format {
        Format::SkyDns(_) => "/skydns/local/skydns/",
        format => format.default_prefix(),
    }
}

async fn put(client: &mut Client, format: &Format, endpoint: &Endpoint) {
    let record = record(format, endpoint);
    client.put(record.key, record.value, None).await.unwrap();
}

/// Puts so many endpoints, at 10.0.0.1:80 and on.
async fn put_first(client: &mut Client, format: &Format, count: usize) {
    for n in 1..=count {
        put(client, format, &endpoint("east", &format!("10.0.0.{n}:80"))).await;
    }
}

async fn delete(client: &mut Client, format: &Format, endpoint: &Endpoint) {
    let key = record(format, endpoint).key;
    client.delete(key, None).await.unwrap();
}

async fn ready(service: &Service) {
    timeout(SOON, service.ready()).await.unwrap();
}

fn addresses(service: &Service) -> Vec<String> {
    service
        .snapshot()
        .iter()
        .map(|endpoint| endpoint.address().to_owned())
        .collect()
}

fn text(change: &Change) -> String {
    let sign = match change {
        Change::Added(_) => '+',
        Change::Changed { .. } => '~',
        Change::Removed(_) => '-',
    };
    format!("{sign}{}", change.endpoint().address())
}

/// The next change.
async fn next(changes: &mut Changes) -> String {
    text(&timeout(SOON, changes.next()).await.unwrap().unwrap())
}

/// Waits until a list is that of etcd (or is not).
async fn live(service: &Service, wanted: bool) -> State {
    timeout(SOON, async {
        let mut state = service.state();
        while (state == State::Live) != wanted {
            state = service.state_other_than(&state).await;
        }
        state
    })
    .await
    .unwrap_or_else(|_| panic!("live: {wanted}, but {:?}", service.state()))
}

/// Waits until something holds.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    timeout(SOON, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("waited for {what}"));
}
