//! The registration library against a real etcd.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

#[path = "registration/faults.rs"]
mod faults;
#[path = "registration/keys.rs"]
mod keys;
#[path = "own_etcd/mod.rs"]
mod own_etcd;

use std::time::Duration;

use etcd_client::{Client, PutOptions};
use etcd_registrar::registration::{Instance, Registrar, Registration, Settings, State};
use tokio::time::timeout;

use own_etcd::Etcd;

/// What anything here may take at most, on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// Long enough that no lease ends because the machine is busy.
const TTL: Duration = Duration::from_secs(30);

/// The shortest that is taken.
const SHORT: Duration = Duration::from_secs(5);

const KEY: &str = "/services/shop/web/vm/10.0.0.5:8080";

async fn registrar(etcd: &Etcd) -> Registrar {
    let settings = Settings {
        endpoints: etcd.0.endpoints().to_vec(),
        ..Settings::default()
    };
    Registrar::connect(settings).await.unwrap()
}

fn instance(address: &str) -> Instance {
    Instance::new("vm", "shop", "web", address.parse().unwrap()).unwrap()
}

/// The instance that stands at [`KEY`].
fn web() -> Instance {
    instance("10.0.0.5:8080").uid("1")
}

async fn registered(registration: &Registration) {
    timeout(SOON, registration.registered())
        .await
        .unwrap_or_else(|_| panic!("{:?}", registration.state()));
    assert_eq!(registration.state(), State::Registered);
}

/// Waits for a state.
async fn state(registration: &Registration, wanted: impl Fn(&State) -> bool) -> State {
    timeout(SOON, async {
        let mut state = registration.state();
        while !wanted(&state) {
            state = registration.state_other_than(&state).await;
        }
        state
    })
    .await
    .unwrap_or_else(|_| panic!("{:?}", registration.state()))
}

/// A key as it stands: value and lease.
async fn get(client: &mut Client, key: &str) -> Option<(String, i64)> {
    let found = client.get(key, None).await.unwrap();
    let kv = found.kvs().first()?;
    Some((kv.value_str().unwrap().to_owned(), kv.lease()))
}

/// Waits until a key stands so.
async fn stands(
    client: &mut Client,
    key: &str,
    wanted: impl Fn(Option<(&str, i64)>) -> bool,
) -> Option<(String, i64)> {
    timeout(SOON, async {
        loop {
            let found = get(client, key).await;
            if wanted(
                found
                    .as_ref()
                    .map(|(value, lease)| (value.as_str(), *lease)),
            ) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("waited for {key}"))
}

/// All keys, sorted.
async fn all_keys(client: &mut Client) -> Vec<String> {
    let options = etcd_client::GetOptions::new().with_all_keys();
    let found = client.get("", Some(options)).await.unwrap();
    let keys = found.kvs().iter();
    keys.map(|kv| kv.key_str().unwrap().to_owned()).collect()
}

/// Puts a key as another writer does.
async fn put(client: &mut Client, key: &str, value: &str, lease: i64) {
    let options = PutOptions::new().with_lease(lease);
    client.put(key, value, Some(options)).await.unwrap();
}
