//! What most of these tests begin with: three registered pods, and a record of what a reader sees.

use std::time::{Duration, Instant};

use serde_json::json;
use testbed::{Operator, OperatorBuilder, Proxy, always, eventually};

use crate::support::{BINARY, Record, Registry, SOON, Seen, Stage, Watcher};

pub(crate) use crate::support::tell;

/// The shortest TTL that a registration may ask for, in seconds: leases that nobody keeps alive soon end.
pub(crate) const SHORT_TTL: u64 = 5;
/// A fault of this length is longer than [`SHORT_TTL`], etcd's own delay in ending leases included.
pub(crate) const PAST_SHORT_TTL: Duration = Duration::from_secs(8);
/// The default TTL: no lease ends by itself while a test runs.
pub(crate) const LONG_TTL: u64 = 60;
/// The name of the cluster.
pub(crate) const EAST: &str = "east";
/// The leader key of that cluster.
pub(crate) const LEADER: &str = "/registrar/east/leader";
/// The leases of that cluster's slots stand below this and its UID.
const LEASES: &str = "/registrar/east/leases/";

/// An operator with the shortest election TTL, so that its failure is soon noticed.
pub(crate) fn quick(builder: OperatorBuilder) -> OperatorBuilder {
    builder.election_ttl("2s")
}

/// An operator that reaches etcd through these proxies alone.
pub(crate) fn through_etcd(stage: &Stage, proxies: &[&Proxy]) -> OperatorBuilder {
    let urls: Vec<String> = proxies.iter().map(|proxy| proxy.url("http")).collect();
    Operator::builder(BINARY, EAST)
        .kubeconfig(&stage.plane.kubeconfig)
        .etcd_at(&stage.etcd, &urls.join(","))
}

/// An operator that reaches the API server through this proxy alone.
pub(crate) fn through_kubernetes(stage: &Stage, proxy: &Proxy) -> OperatorBuilder {
    let account = "etcd-registrar";
    let cluster = stage.plane.cluster;
    let kubeconfig =
        cluster.kubeconfig_for_service_account_at(account, account, &proxy.url("https"));
    Operator::builder(BINARY, EAST)
        .kubeconfig(&kubeconfig.unwrap())
        .etcd(&stage.etcd)
}

/// Three pods `web-0` to `web-2` and the registration `web`.
pub(crate) struct Scene {
    pub(crate) stage: Stage,
    /// The keys of the pods, in their order.
    pub(crate) keys: Vec<String>,
}

impl Scene {
    /// Creates pods and registration, and waits until an operator, which has to run, has registered them.
    pub(crate) fn new(stage: Stage, ttl: u64) -> Self {
        stage.register("web", &json!({"leaseTTLSeconds": ttl}));
        let names = ["web-0", "web-1", "web-2"];
        for name in names {
            stage.create_pod(name, "web", &json!({}), &json!({}));
        }
        let keys: Vec<String> = names.iter().map(|name| key(&stage, name)).collect();
        stage.wait_keys(&stage.scope("web"), &keys);
        stage.wait_condition("web", "Ready", "True", "Registered");
        Self { stage, keys }
    }

    /// What a reader of the service sees from now on.
    pub(crate) fn watch(&self) -> Watcher {
        Watcher::start(&self.stage.etcd, &self.stage.scope("web"))
    }

    /// The records of the service.
    pub(crate) fn records(&self) -> Vec<Record> {
        self.stage.registry.list(&self.stage.scope("web"))
    }

    /// Waits until exactly the pods of these numbers are registered, and gives the records.
    pub(crate) fn wait_pods(&self, numbers: &[usize]) -> Vec<Record> {
        let keys: Vec<&String> = numbers.iter().map(|number| &self.keys[*number]).collect();
        self.stage.wait_keys(&self.stage.scope("web"), &keys)
    }

    /// Makes a pod ready or not.
    pub(crate) fn set_ready(&self, number: usize, ready: bool) {
        self.stage.set_ready(&format!("web-{number}"), ready);
    }

    /// Waits until the watcher has seen the last change of a pod's readiness, and gives how long that was after the fault
    /// had ended.
    pub(crate) fn recovered(
        &self,
        watcher: &Watcher,
        number: usize,
        ready: bool,
        ended: Instant,
    ) -> Duration {
        let key = &self.keys[number];
        let what = format!("{key} to be {}", if ready { "put" } else { "removed" });
        watcher
            .wait(&what, |seen| {
                seen.key == *key && seen.put.is_some() == ready
            })
            .at
            .saturating_duration_since(ended)
    }

    /// Waits until every pod's key was put, and gives how long after the end of the fault the last of them was.
    pub(crate) fn recovered_all(&self, watcher: &Watcher, ended: Instant) -> Duration {
        let each = 0..self.keys.len();
        each.map(|number| self.recovered(watcher, number, true, ended))
            .max()
            .unwrap_or_default()
    }

    /// Removes a pod and brings it back while all is well, and checks that nothing else happens.
    pub(crate) fn turn(&self, watcher: &Watcher, number: usize) {
        watcher.forget();
        let now = Instant::now();
        self.set_ready(number, false);
        self.recovered(watcher, number, false, now);
        self.set_ready(number, true);
        self.recovered(watcher, number, true, now);
        let seen = watcher.seen();
        assert!(
            seen.len() == 2 && seen.iter().all(|seen| seen.key == self.keys[number]),
            "{seen:#?}"
        );
        watcher.forget();
    }

    /// The operator hears what etcd tells: a record that is deleted by hand is back, and nothing else happens.
    pub(crate) fn assert_not_deaf(&self, watcher: &Watcher, number: usize) {
        watcher.forget();
        let key = &self.keys[number];
        self.stage.registry.delete(key);
        watcher.wait("the deleted record to be back", |seen| {
            seen.key == *key && seen.put.is_some()
        });
        let seen = watcher.seen();
        assert!(
            seen.len() == 2 && seen.iter().all(|seen| seen.key == *key),
            "{seen:#?}"
        );
        watcher.forget();
    }

    /// Each pair of a lease that records stand on and its key below `leases/` lives.
    pub(crate) fn assert_leases_live(&self) {
        let slots = self.slots();
        for record in self.records() {
            assert!(record.lease != 0, "{record:#?}");
            assert!(self.stage.registry.ttl(record.lease).1 > 0, "{record:#?}");
            assert!(
                slots.iter().any(|slot| slot.lease == record.lease),
                "{record:#?} {slots:#?}"
            );
        }
    }

    /// The keys of the slots.
    pub(crate) fn slots(&self) -> Vec<Record> {
        let uid = self.stage.plane.uid();
        self.stage.registry.list(&format!("{LEASES}{uid}/"))
    }
}

/// The key of a pod of the registration `web`, once the pod is ready.
pub(crate) fn key(stage: &Stage, pod: &str) -> String {
    let address = &stage.wait_ready(pod)[0];
    format!("{}{EAST}/{address}:8080", stage.scope("web"))
}

/// The nonce of the term.
pub(crate) fn leader(registry: &Registry) -> String {
    eventually(SOON, "a leader", || {
        let found = registry.try_list(LEADER)?.pop();
        found.ok_or_else(|| "no leader key".to_owned())
    })
    .unwrap()
    .value
}

/// Waits until so many live replicas wait for their turn.
pub(crate) fn wait_standbys(registry: &Registry, wanted: usize) {
    eventually(SOON, "standbys", || {
        match registry.try_list("/registrar/east/waiting/")?.len() {
            found if found == wanted => Ok(()),
            found => Err(format!("{found} wait")),
        }
    })
    .unwrap();
}

/// Waits for the first leader after `old`, and gives its election.
pub(crate) fn wait_leader_after(elections: &Watcher, old: &str) -> Seen {
    elections.wait("another leader", |seen| {
        seen.put.as_ref().is_some_and(|put| put.value != old)
    })
}

/// Waits until a lease of this TTL that nobody keeps has ended: so has every other that was not kept in that time.
pub(crate) fn outlive_a_lease(stage: &Stage, ttl: u64) {
    let ttl = ttl.to_string();
    let granted = stage.etcd.etcdctl(&["lease", "grant", &ttl]).unwrap();
    let id = granted.split(' ').nth(1).unwrap();
    let lease = i64::from_str_radix(id, 16).unwrap();
    eventually(SOON, "a lease to end", || {
        if Registry::connect(&stage.etcd).leases().contains(&lease) {
            Err(format!("lease {id} lives"))
        } else {
            Ok(())
        }
    })
    .unwrap();
}

/// Lets a fault last, during which the operators must run on.
pub(crate) fn endure(fault: Duration, operators: &[&Operator]) {
    always(fault, "every operator to run", || {
        for operator in operators {
            if !operator.process().is_running() {
                return Err(operator.log());
            }
        }
        Ok(())
    })
    .unwrap();
}

/// The events on all keys but one.
pub(crate) fn others<'a>(seen: &'a [Seen], key: &str) -> Vec<&'a Seen> {
    seen.iter().filter(|seen| seen.key != key).collect()
}
