//! What the operator counts and measures, for Prometheus.
//!
//! Takes plain numbers from every part; gives one text in the OpenMetrics format. Must never block
//! and never label a metric with the name of a pod, key or registration (their number is unbounded).
//!
//! | metric (all begin with `etcd_registrar_`) | type | what it is |
//! |---|---|---|
//! | `propagation_seconds{change="put\|removal"}` | histogram | from the receipt of a change of a pod to its event in the mirror |
//! | `leader` | gauge | 1 while this replica leads |
//! | `live` | gauge | 1 while the watches are complete and the API server answers |
//! | `kubernetes_silence_seconds` | gauge | since the API server was last heard |
//! | `registrations` | gauge | ServiceRegistrations that are known |
//! | `endpoints_wanted`, `endpoints_registered` | gauge | endpoints that should stand in etcd, and those read back from it |
//! | `records_mirrored` | gauge | records of all clusters in the mirror |
//! | `leases_kept` | gauge | leases that the keeper keeps alive |
//! | `lanes_busy` | gauge | lanes with a transaction in flight |
//! | `puts_slowed_down` | gauge | records that wait because their namespace has put too many of late |
//! | `pods_over_limit` | gauge | ready pods that a limit of the policy leaves out, once for each registration |
//! | `endpoints_held` | gauge | endpoints that are held in etcd although their pods went |
//! | `queue_depth` | gauge | inputs that wait for the engine |
//! | `transactions_total{outcome="succeeded\|lost\|refused\|no_space\|unknown"}` | counter | transactions sent to etcd |
//! | `puts_total`, `removals_total` | counter | records put and removed |
//! | `mass_removals_total` | counter | times that too many pods of a registration went at once although they are there |
//! | `leases_granted_total`, `leases_revoked_total`, `leases_lost_total` | counter | leases |
//! | `status_patches_total`, `status_patch_errors_total` | counter | writes of a status, and failed attempts |
//! | `watch_restarts_total{resource}` | counter | watches of Kubernetes that ended before their time |
//! | `lists_total{resource}` | counter | lists of Kubernetes that were begun |
//! | `unparsable_objects_total{resource}` | counter | objects of Kubernetes that were not understood |
//! | `events_dropped_total` | counter | Kubernetes Events that were not written |
//! | `build_info{version}` | gauge | always 1 |

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::engine::io::Resource;
use crate::version::VERSION;

/// Upper bounds in seconds: 0.5 ms is a local etcd, 10 s is two election TTLs by default.
const PROPAGATION_BUCKETS: [f64; 14] = [
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
];

/// What became of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Its comparisons held.
    Succeeded,
    /// A comparison did not hold.
    Lost,
    /// etcd refused it.
    Refused,
    /// etcd has no space.
    NoSpace,
    /// There was no answer.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResourceLabel {
    resource: &'static str,
}

/// All metrics; clones are cheap and share their values. The list is in the module's doc.
#[derive(Clone, Debug)]
pub struct Metrics {
    propagation_put: Histogram,
    propagation_removal: Histogram,
    transactions: Family<OutcomeLabel, Counter>,
    watch_restarts: Family<ResourceLabel, Counter>,
    lists: Family<ResourceLabel, Counter>,
    unparsable: Family<ResourceLabel, Counter>,
    kubernetes_silence: Gauge<f64, AtomicU64>,
    leader: Gauge,
    live: Gauge,
    /// ServiceRegistrations that are known.
    pub registrations: Gauge,
    /// Endpoints that should stand in etcd.
    pub endpoints_wanted: Gauge,
    /// Endpoints that were read back from etcd.
    pub endpoints_registered: Gauge,
    /// Records of all clusters in the mirror.
    pub records_mirrored: Gauge,
    /// Leases that the keeper keeps alive.
    pub leases_kept: Gauge,
    /// Lanes with a transaction in flight.
    pub lanes_busy: Gauge,
    /// Records that wait because their namespace has put too many of late.
    pub puts_slowed_down: Gauge,
    /// Ready pods that a limit of the policy leaves out, once for each registration.
    pub pods_over_limit: Gauge,
    /// Endpoints that are held in etcd although their pods went.
    pub endpoints_held: Gauge,
    /// Inputs that wait for the engine.
    pub queue_depth: Gauge,
    /// Records put.
    pub puts: Counter,
    /// Records removed.
    pub removals: Counter,
    /// Times that too many pods of a registration went at once although they are there.
    pub mass_removals: Counter,
    /// Leases granted.
    pub leases_granted: Counter,
    /// Leases revoked.
    pub leases_revoked: Counter,
    /// Leases that were to be kept and turned out lost.
    pub leases_lost: Counter,
    /// Statuses written.
    pub status_patches: Counter,
    /// Attempts to write a status that failed.
    pub status_patch_errors: Counter,
    /// Kubernetes Events that were not written.
    pub events_dropped: Counter,
}

impl Metrics {
    /// The metrics, all at 0, and the registry that [`text`] reads.
    #[must_use]
    pub fn new() -> (Self, Registry) {
        let mut registry = Registry::with_prefix("etcd_registrar");
        let propagation = Family::<ChangeLabel, Histogram>::new_with_constructor(|| {
            Histogram::new(PROPAGATION_BUCKETS)
        });
        registry.register_with_unit(
            "propagation",
            "Time from the receipt of a change of a pod to its event in etcd",
            Unit::Seconds,
            propagation.clone(),
        );
        let put = propagation.get_or_create_owned(&ChangeLabel { change: "put" });
        let removal = propagation.get_or_create_owned(&ChangeLabel { change: "removal" });
        let metrics = Self {
            propagation_put: put,
            propagation_removal: removal,
            transactions: Family::default(),
            watch_restarts: Family::default(),
            lists: Family::default(),
            unparsable: Family::default(),
            kubernetes_silence: Gauge::default(),
            leader: Gauge::default(),
            live: Gauge::default(),
            registrations: Gauge::default(),
            endpoints_wanted: Gauge::default(),
            endpoints_registered: Gauge::default(),
            records_mirrored: Gauge::default(),
            leases_kept: Gauge::default(),
            lanes_busy: Gauge::default(),
            puts_slowed_down: Gauge::default(),
            pods_over_limit: Gauge::default(),
            endpoints_held: Gauge::default(),
            queue_depth: Gauge::default(),
            puts: Counter::default(),
            removals: Counter::default(),
            mass_removals: Counter::default(),
            leases_granted: Counter::default(),
            leases_revoked: Counter::default(),
            leases_lost: Counter::default(),
            status_patches: Counter::default(),
            status_patch_errors: Counter::default(),
            events_dropped: Counter::default(),
        };
        metrics.register(&mut registry);
        (metrics, registry)
    }

    fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "kubernetes_silence",
            "Time since the API server of Kubernetes was last heard",
            Unit::Seconds,
            self.kubernetes_silence.clone(),
        );
        for (name, help, gauge) in [
            ("leader", "1 while this replica leads", &self.leader),
            (
                "live",
                "1 while the Kubernetes watches are complete and the API server answers",
                &self.live,
            ),
            (
                "registrations",
                "ServiceRegistrations that are known",
                &self.registrations,
            ),
            (
                "endpoints_wanted",
                "Endpoints of this cluster that should stand in etcd",
                &self.endpoints_wanted,
            ),
            (
                "endpoints_registered",
                "Endpoints of this cluster that were read back from etcd",
                &self.endpoints_registered,
            ),
            (
                "records_mirrored",
                "Records of all clusters in the mirror of etcd",
                &self.records_mirrored,
            ),
            (
                "leases_kept",
                "Leases that this replica keeps alive",
                &self.leases_kept,
            ),
            (
                "lanes_busy",
                "Lanes of the writer with a transaction in flight",
                &self.lanes_busy,
            ),
            (
                "puts_slowed_down",
                "Records that wait because their namespace has put too many of late",
                &self.puts_slowed_down,
            ),
            (
                "pods_over_limit",
                "Ready pods that a limit of the policy leaves out, once for each registration",
                &self.pods_over_limit,
            ),
            (
                "endpoints_held",
                "Endpoints that are held in etcd although their pods went",
                &self.endpoints_held,
            ),
            (
                "queue_depth",
                "Inputs that wait for the engine",
                &self.queue_depth,
            ),
        ] {
            registry.register(name, help, gauge.clone());
        }
        for (name, help, counter) in [
            ("puts", "Records put", &self.puts),
            ("removals", "Records removed", &self.removals),
            (
                "mass_removals",
                "Times that too many pods of a registration went at once although they are there",
                &self.mass_removals,
            ),
            ("leases_granted", "Leases granted", &self.leases_granted),
            ("leases_revoked", "Leases revoked", &self.leases_revoked),
            (
                "leases_lost",
                "Leases that were to be kept alive and turned out lost",
                &self.leases_lost,
            ),
            (
                "status_patches",
                "Statuses written to Kubernetes",
                &self.status_patches,
            ),
            (
                "status_patch_errors",
                "Attempts to write a status that failed",
                &self.status_patch_errors,
            ),
            (
                "events_dropped",
                "Kubernetes Events that were not written",
                &self.events_dropped,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        registry.register(
            "transactions",
            "Transactions sent to etcd",
            self.transactions.clone(),
        );
        for (name, help, family) in [
            (
                "watch_restarts",
                "Watches of Kubernetes that ended before their time",
                &self.watch_restarts,
            ),
            ("lists", "Lists of Kubernetes that were begun", &self.lists),
            (
                "unparsable_objects",
                "Objects of Kubernetes that were not understood",
                &self.unparsable,
            ),
        ] {
            registry.register(name, help, family.clone());
        }
        registry.register(
            "build",
            "The version of the operator",
            Info::new([("version", VERSION)]),
        );
    }

    /// A change of a pod reached the mirror this many microseconds after it was received.
    pub fn propagated(&self, microseconds: u64, removal: bool) {
        let seconds = std::time::Duration::from_micros(microseconds).as_secs_f64();
        if removal {
            self.propagation_removal.observe(seconds);
        } else {
            self.propagation_put.observe(seconds);
        }
    }

    /// Whether this replica leads.
    pub fn set_leader(&self, leader: bool) {
        self.leader.set(leader.into());
    }

    /// Whether this replica is live.
    pub fn set_live(&self, live: bool) {
        self.live.set(live.into());
    }

    /// The time since the API server was last heard.
    pub fn set_kubernetes_silence(&self, silence: std::time::Duration) {
        self.kubernetes_silence.set(silence.as_secs_f64());
    }

    /// Transactions ended.
    pub fn transactions(&self, outcome: Outcome, number: u64) {
        self.transactions
            .get_or_create(&OutcomeLabel {
                outcome: match outcome {
                    Outcome::Succeeded => "succeeded",
                    Outcome::Lost => "lost",
                    Outcome::Refused => "refused",
                    Outcome::NoSpace => "no_space",
                    Outcome::Unknown => "unknown",
                },
            })
            .inc_by(number);
    }

    /// A watch of Kubernetes ended before its time.
    pub fn watch_restarted(&self, resource: Resource) {
        self.watch_restarts.get_or_create(&label(resource)).inc();
    }

    /// Lists of Kubernetes were begun.
    pub fn listed(&self, resource: Resource, lists: u64) {
        self.lists.get_or_create(&label(resource)).inc_by(lists);
    }

    /// Objects of Kubernetes were not understood.
    pub fn unparsable(&self, resource: Resource, objects: u64) {
        self.unparsable
            .get_or_create(&label(resource))
            .inc_by(objects);
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ChangeLabel {
    change: &'static str,
}

fn label(resource: Resource) -> ResourceLabel {
    ResourceLabel {
        resource: match resource {
            Resource::Pods => "pods",
            Resource::Nodes => "nodes",
            Resource::Registrations => "serviceregistrations",
        },
    }
}

/// All metrics of the registry as OpenMetrics text.
///
/// # Errors
/// When a metric can't be written, which only happens when memory is short.
pub fn text(registry: &Registry) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    encode(&mut text, registry)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_of_the_table_is_exported_and_no_other() {
        let (metrics, registry) = Metrics::new();
        metrics.transactions(Outcome::NoSpace, 1);
        metrics.watch_restarted(Resource::Pods);
        metrics.listed(Resource::Nodes, 2);
        metrics.unparsable(Resource::Registrations, 1);
        let text = text(&registry).unwrap();
        let mut exported: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE etcd_registrar_"))
            .filter_map(|rest| rest.split(' ').next())
            .collect();
        exported.sort_unstable();
        let source = include_str!("metrics.rs");
        let mut documented: Vec<&str> = source
            .lines()
            .filter_map(|line| line.strip_prefix("//! | `"))
            .flat_map(|row| row.split(" | ").next().unwrap_or("").split(", "))
            .map(|cell| {
                let name = cell.trim_matches('`').split('{').next().unwrap_or("");
                name.trim_end_matches("_total").trim_end_matches("_info")
            })
            .collect();
        documented.sort_unstable();
        assert_eq!(exported, documented);
    }

    #[test]
    fn values_are_those_that_were_set() {
        let (metrics, registry) = Metrics::new();
        metrics.propagated(1_500, false);
        metrics.propagated(30_000_000, true);
        metrics.transactions(Outcome::Unknown, 1);
        metrics.set_leader(true);
        metrics.listed(Resource::Pods, 3);
        metrics.set_kubernetes_silence(std::time::Duration::from_millis(2_500));
        let text = text(&registry).unwrap();
        for line in [
            "etcd_registrar_propagation_seconds_bucket{le=\"0.001\",change=\"put\"} 0",
            "etcd_registrar_propagation_seconds_bucket{le=\"0.002\",change=\"put\"} 1",
            "etcd_registrar_propagation_seconds_bucket{le=\"10.0\",change=\"removal\"} 0",
            "etcd_registrar_propagation_seconds_count{change=\"removal\"} 1",
            "etcd_registrar_transactions_total{outcome=\"unknown\"} 1",
            "etcd_registrar_leader 1",
            "etcd_registrar_live 0",
            "etcd_registrar_lists_total{resource=\"pods\"} 3",
            "etcd_registrar_kubernetes_silence_seconds 2.5",
        ] {
            assert!(
                text.lines().any(|have| have == line),
                "{line} not in:\n{text}"
            );
        }
    }
}
