//! What was read back from etcd --> the status of a registration.
//!
//! Takes the index, the mirror and the engine's counts for one registration, gives its status. It says
//! what was read, never what was merely sent. Must never remember anything, do IO or read a clock.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

use crate::accept::Accepted;
use crate::api::reason;
use crate::api::{
    ClusterCount, EndpointStatus, MAX_STATUS_ENDPOINTS, PodCounts, ServiceRegistrationStatus,
};
use crate::format::{Aggregate, Format, Place, apisix};
use crate::index::Index;
use crate::index::registrations::{RegistrationId, Standing, StoredRegistration};
use crate::mirror::Mirror;
use crate::model::etcd::{Key, LeaseId, Refusal};
use crate::model::names::{self, shortened};
use crate::plan::{Need, need};

use std::collections::{BTreeMap, BTreeSet};

/// What stands in the way of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// What stands there is not ours; whose it is, as far as it tells.
    Foreign(String),
    /// An older registration wants it too: its name.
    OtherRegistration(String),
    /// Another pod of the same registration wants it too.
    OtherPod,
    /// etcd refused it.
    Refused(Refusal, String),
}

/// What the engine knows beside index and mirror.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Seconds since 1970.
    pub now: i64,
    /// The cluster's name.
    pub cluster: &'a str,
    /// Keys that were read back as wanted.
    pub registered: u32,
    /// Keys with a problem, sorted.
    pub problems: Vec<(&'a [u8], &'a Problem)>,
    /// Why the scope can't be read.
    pub scope_refused: Option<&'a str>,
    /// Something is queued or in flight, of whatever registration.
    pub busy: bool,
    /// etcd has no space.
    pub no_space: bool,
    /// Records of the namespace that wait because it has put too many of late.
    pub slowed_down: usize,
    /// Keys that are held although their pods went, and when the last hold ends, in seconds since 1970.
    pub held: Option<(u32, i64)>,
    /// The conditions that were there before, for the times of their last changes.
    pub before: &'a [Condition],
}

/// The keys that a message names: it has to stay readable.
const NAMED: usize = 3;
/// The most characters of a key that a status or message repeats: more than prefix (256), namespace (63),
/// service (253), cluster (63) and address (47) can have. Where readers take any key, others may write one
/// that is longer than the API server takes in a status.
const MAX_KEY: usize = 1_024;
/// The most characters of what the value of a record tells: those of a DNS subdomain.
const MAX_TOLD: usize = names::MAX_DNS_SUBDOMAIN;

/// The whole status of a registration.
#[must_use]
pub fn summary(
    index: &Index,
    mirror: &Mirror,
    id: RegistrationId,
    facts: &Facts<'_>,
) -> Option<ServiceRegistrationStatus> {
    let stored = index.registration(id)?;
    let (discovered, clusters, endpoints) = discovered(mirror, stored, facts.cluster);
    let registered = registered(index, mirror, id, stored, facts);
    let conditions = vec![
        condition(accepted(stored), stored, facts),
        condition(conflict(facts), stored, facts),
        condition(
            ready(index, mirror, id, stored, facts, registered),
            stored,
            facts,
        ),
    ];
    Some(ServiceRegistrationStatus {
        observed_generation: Some(stored.generation),
        service: last_accepted(stored).map(|accepted| accepted.service.clone()),
        pods: Some(PodCounts {
            selected: i64::from(stored.selected),
            ready: i64::from(stored.ready),
        }),
        registered: Some(registered),
        discovered: Some(discovered),
        clusters,
        endpoints,
        conditions,
    })
}

/// `Ready` alone, as a replica sets it when no leader is known.
#[must_use]
pub fn leaderless(
    stored: &StoredRegistration,
    facts: &Facts<'_>,
    why: &'static str,
    message: String,
) -> ServiceRegistrationStatus {
    let verdict = Verdict {
        type_: reason::READY,
        status: "Unknown",
        reason: why,
        message,
    };
    ServiceRegistrationStatus {
        conditions: vec![condition(verdict, stored, facts)],
        ..ServiceRegistrationStatus::default()
    }
}

struct Verdict {
    type_: &'static str,
    status: &'static str,
    reason: &'static str,
    message: String,
}

fn condition(verdict: Verdict, stored: &StoredRegistration, facts: &Facts<'_>) -> Condition {
    let before = facts
        .before
        .iter()
        .find(|c| c.type_ == verdict.type_ && c.status == verdict.status);
    let now = Time(Timestamp::from_second(facts.now).unwrap_or(Timestamp::UNIX_EPOCH));
    Condition {
        last_transition_time: before
            .map_or(now, |condition| condition.last_transition_time.clone()),
        message: verdict.message,
        observed_generation: Some(stored.generation),
        reason: verdict.reason.to_owned(),
        status: verdict.status.to_owned(),
        type_: verdict.type_.to_owned(),
    }
}

fn accepted(stored: &StoredRegistration) -> Verdict {
    match &stored.standing {
        Standing::Serving(accepted) => Verdict {
            type_: reason::ACCEPTED,
            status: "True",
            reason: reason::SPEC_ACCEPTED,
            message: format!("served below {}", accepted.scope),
        },
        Standing::Kept { refusal, .. } => Verdict {
            type_: reason::ACCEPTED,
            status: "False",
            reason: refusal.reason,
            message: refusal.message.clone(),
        },
    }
}

fn conflict(facts: &Facts<'_>) -> Verdict {
    let mut named: Vec<String> = Vec::new();
    let mut why = reason::NO_CONFLICT;
    let mut count = 0usize;
    for (key, problem) in &facts.problems {
        let (this, text) = match problem {
            Problem::Foreign(whose) => (reason::KEY_TAKEN, format!("was written by {whose}")),
            Problem::OtherRegistration(name) => (
                reason::OTHER_REGISTRATION,
                format!("belongs to ServiceRegistration {name}, which is older"),
            ),
            Problem::OtherPod => (
                reason::OTHER_POD,
                "is wanted by another pod of this registration, too".to_owned(),
            ),
            Problem::Refused(..) => continue,
        };
        if why == reason::NO_CONFLICT {
            why = this;
        }
        count += 1;
        if named.len() < NAMED {
            named.push(format!("{} {text}", String::from_utf8_lossy(key)));
        }
    }
    if count == 0 {
        return Verdict {
            type_: reason::CONFLICT,
            status: "False",
            reason: reason::NO_CONFLICT,
            message: "every wanted key is free or this registration's own".into(),
        };
    }
    let more = if count > named.len() {
        format!(" (and {} more)", count - named.len())
    } else {
        String::new()
    };
    Verdict {
        type_: reason::CONFLICT,
        status: "True",
        reason: why,
        message: format!(
            "{}{more}. Nothing of others is overwritten: delete the key, or choose another service, prefix or selector",
            named.join("; ")
        ),
    }
}

fn ready(
    index: &Index,
    mirror: &Mirror,
    id: RegistrationId,
    stored: &StoredRegistration,
    facts: &Facts<'_>,
    registered: i64,
) -> Verdict {
    let no = |why: &'static str, message: String| Verdict {
        type_: reason::READY,
        status: "False",
        reason: why,
        message,
    };
    let Some(accepted) = stored.serving() else {
        return no(
            reason::NOT_ACCEPTED,
            format!(
                "{registered} endpoints stay registered as they are; see the condition Accepted"
            ),
        );
    };
    if accepted.suspend {
        return no(
            reason::SUSPENDED,
            format!("suspended: {registered} endpoints stay registered as they are"),
        );
    }
    if let Some(why) = facts.scope_refused {
        return no(
            reason::PERMISSION_DENIED,
            format!(
                "etcd does not let the operator read {}: {why}. Grant its user a role with readwrite on that prefix",
                accepted.scope
            ),
        );
    }
    let refused = facts
        .problems
        .iter()
        .find_map(|(key, problem)| match problem {
            Problem::Refused(refusal, message) => Some((*key, *refusal, message)),
            _ => None,
        });
    if let Some((key, refusal, message)) = refused {
        let key = String::from_utf8_lossy(key);
        return match refusal {
            Refusal::Permission => no(
                reason::PERMISSION_DENIED,
                format!(
                    "etcd does not let the operator write {key}: {message}. Grant its user a role with readwrite on {}",
                    accepted.scope
                ),
            ),
            _ => no(
                reason::RECORD_REFUSED,
                format!("etcd refuses {key}: {message}"),
            ),
        };
    }
    let conflicts = facts
        .problems
        .iter()
        .filter(|(_, p)| !matches!(p, Problem::Refused(..)))
        .count();
    if conflicts > 0 {
        return no(
            reason::CONFLICTING,
            format!(
                "{conflicts} of the wanted keys belong to someone else; see the condition Conflict"
            ),
        );
    }
    let beyond_record = beyond_record(index, id, accepted);
    let missing = if accepted.format.is_aggregate() {
        missing_of_all(index, mirror, id, facts, registered, beyond_record)
    } else {
        missing(index, mirror, id, facts)
    };
    if missing > 0 {
        return if facts.no_space {
            no(
                reason::NO_SPACE,
                format!(
                    "{missing} endpoints can't be registered: etcd has no space left (alarm NOSPACE). Compact and defragment it or raise its quota, then: etcdctl alarm disarm"
                ),
            )
        } else if facts.slowed_down > 0 {
            no(
                reason::TOO_MANY_CHANGES,
                format!(
                    "{missing} endpoints are on their way to etcd, and {} of namespace {} have to wait: so many were changed that they are slowed down, removals excepted. \
                     Find out what changes ServiceRegistrations, labels or the readiness of pods all the time",
                    facts.slowed_down, stored.namespace
                ),
            )
        } else {
            no(
                reason::PENDING,
                format!("{missing} endpoints are on their way to etcd"),
            )
        };
    }
    if let Some((held, until)) = facts.held {
        let held = accepted.format.endpoints_of(held, accepted.ports.len());
        return no(
            reason::REMOVALS_HELD,
            format!(
                "{held} endpoints of pods that are not ready are held, the last of them until {}: too many pods stopped being ready at once, and none of them was deleted. \
                 Look at the pods, their nodes and their readiness probes; what is deleted leaves at once",
                Timestamp::from_second(until).unwrap_or(Timestamp::UNIX_EPOCH)
            ),
        );
    }
    if beyond_record > 0 {
        return no(
            reason::TOO_MANY_ENDPOINTS,
            format!(
                "{beyond_record} endpoints are left out: a record of format {} has at most {} bytes, and those of the youngest pods find no room. \
                 Register the pods in several ServiceRegistrations with narrower selectors, and share the traffic among their upstreams",
                accepted.format.name(),
                apisix::MAX_VALUE
            ),
        );
    }
    if let Some(message) = beyond(index, stored, accepted) {
        return no(reason::TOO_MANY_ENDPOINTS, message);
    }
    if let Some((pod, why)) = stored.lacking.iter().next() {
        let others = stored.lacking.len() - 1;
        let more = if others > 0 {
            format!(" (and {others} more pods)")
        } else {
            String::new()
        };
        return no(
            reason::PODS_LEFT_OUT,
            format!("ready, but left out: pod {pod} {why}{more}"),
        );
    }
    Verdict {
        type_: reason::READY,
        status: "True",
        reason: reason::REGISTERED,
        message: match registered {
            0 => "no pod is ready, and nothing is registered".into(),
            1 => "1 endpoint is registered".into(),
            n => format!("{n} endpoints are registered"),
        },
    }
}

/// Which limit leaves pods out, and what to do.
fn beyond(index: &Index, stored: &StoredRegistration, accepted: &Accepted) -> Option<String> {
    let limits = index.limits(&stored.namespace);
    let (pods, most, of, member) = if stored.beyond_own_limit > 0 {
        let most = limits.endpoints_per_registration;
        let member = "endpointsPerRegistration";
        (stored.beyond_own_limit, most, "a registration", member)
    } else if stored.beyond_namespace_limit > 0 {
        let pods = stored.beyond_namespace_limit;
        (pods, limits.endpoints, "a namespace", "endpoints")
    } else {
        return None;
    };
    let each = accepted.ports.len() * accepted.families.len().max(1);
    Some(format!(
        "{pods} ready pods are left out: {of} may have at most {most} endpoints, {each} for each pod that this one selects; those that came first count. \
         Select fewer pods or ports, or ask an administrator to raise `{member}` for this namespace under `limits` in the policy file"
    ))
}

/// How many of the keys that a registration wins have not been read back as wanted.
fn missing(index: &Index, mirror: &Mirror, id: RegistrationId, facts: &Facts<'_>) -> usize {
    let wanted = index.keys_of(id).count();
    let registered = facts.registered as usize;
    if wanted == registered {
        return 0;
    }
    if facts.busy && wanted > registered {
        // Counting costs microseconds a key; while much is under way the difference says enough.
        return wanted - registered;
    }
    // Two of its pods may want one key, or another registration wins it: then it has to be counted.
    let mut keys: Vec<_> = index.keys_of(id).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.into_iter()
        .filter(|key| {
            index
                .winner(key)
                .is_some_and(|(claim, _)| claim.registration == id)
        })
        .filter(|key| {
            !(matches!(need(index, mirror, key), Need::Right(_))
                && mirror.get(key).is_some_and(|r| r.read))
        })
        .count()
}

/// How many endpoints find no room in the records for all pods of a registration.
fn beyond_record(index: &Index, id: RegistrationId, accepted: &Accepted) -> usize {
    if !accepted.format.is_aggregate() {
        return 0;
    }
    let beyond = index.keys_of(id).filter_map(|key| {
        let parts = index.parts(id, key);
        let entries = parts.map(|part| (part.entry, (part.created, part.uid)));
        let aggregate = index.aggregate_at(id, key)?;
        accepted.format.aggregate_value(&aggregate, entries)
    });
    beyond.map(|(_, beyond)| beyond).sum()
}

/// How many endpoints of the records for all pods have not been read back; one at least, where a record is not right.
fn missing_of_all(
    index: &Index,
    mirror: &Mirror,
    id: RegistrationId,
    facts: &Facts<'_>,
    registered: i64,
    beyond: usize,
) -> usize {
    let parts = index.keys_of(id).map(|key| index.parts(id, key).count());
    let wanted = parts.sum::<usize>().saturating_sub(beyond);
    let known = usize::try_from(registered).unwrap_or(0);
    let records = missing(index, mirror, id, facts).min(1);
    wanted.saturating_sub(known).max(records)
}

/// Endpoints of this cluster, confirmed by a read from etcd.
fn registered(
    index: &Index,
    mirror: &Mirror,
    id: RegistrationId,
    stored: &StoredRegistration,
    facts: &Facts<'_>,
) -> i64 {
    if let Some(accepted) = stored.serving().filter(|accepted| !accepted.suspend) {
        if accepted.format.is_aggregate() {
            let own = index.keys_of(id).filter(|key| {
                let record = mirror.get(key).filter(|record| record.ours && record.read);
                let lease = record.and_then(|record| mirror.leases().get(record.lease));
                let name = lease.and_then(|lease| lease.name.as_ref());
                name.is_some_and(|name| name.registration == stored.full_name)
            });
            let count: usize = own.map(|key| endpoints_at(mirror, key)).sum();
            return i64::try_from(count).unwrap_or(i64::MAX);
        }
        let held = facts.held.map_or(0, |(held, _)| held);
        let keys = facts.registered.saturating_add(held);
        return i64::from(accepted.format.endpoints_of(keys, accepted.ports.len()));
    }
    // What is merely kept is what was read on its leases.
    let (leases, scopes): (BTreeSet<LeaseId>, BTreeSet<&str>) = mirror
        .leases()
        .iter()
        .filter(|(_, lease)| lease.records > 0)
        .filter_map(|(id, lease)| Some((id, lease.name.as_ref()?)))
        .filter(|(_, name)| name.registration == stored.full_name)
        .map(|(id, name)| (id, &*name.scope))
        .unzip();
    // One scope may lie in another.
    let keys: BTreeSet<&Key> = scopes
        .iter()
        .flat_map(|scope| mirror.below(scope.as_bytes()))
        .filter(|(_, record)| record.read && leases.contains(&record.lease))
        .map(|(key, _)| key)
        .collect();
    let count: usize = keys.into_iter().map(|key| endpoints_at(mirror, key)).sum();
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// How many endpoints a record of ours stands for: one where it can't be read.
fn endpoints_at(mirror: &Mirror, key: &Key) -> usize {
    let Some(record) = mirror.get(key) else {
        return 0;
    };
    let slot = mirror
        .leases()
        .get(record.lease)
        .and_then(|lease| lease.name.as_ref());
    let Some((slot, format)) = slot.and_then(|slot| Some((slot, Format::by_name(&slot.format)?)))
    else {
        return 1;
    };
    if format.lead_of(key).is_some() {
        return 0;
    }
    if !format.holds_several() {
        return 1;
    }
    format
        .read_all(&slot.prefix, key, &record.value)
        .map_or(1, |found| found.len())
}

/// What is served, or was accepted last.
fn last_accepted(stored: &StoredRegistration) -> Option<&Accepted> {
    match &stored.standing {
        Standing::Serving(accepted) => Some(accepted),
        Standing::Kept { last, .. } => last.as_deref(),
    }
}

/// Endpoints of the service from every cluster: how many, of which cluster, and the first of them.
fn discovered(
    mirror: &Mirror,
    stored: &StoredRegistration,
    own_cluster: &str,
) -> (i64, Vec<ClusterCount>, Vec<EndpointStatus>) {
    let accepted = match &stored.standing {
        Standing::Serving(accepted) => accepted,
        Standing::Kept {
            last: Some(last), ..
        } => last,
        Standing::Kept { last: None, .. } => return (0, Vec::new(), Vec::new()),
    };
    let mut count = 0i64;
    let mut clusters: BTreeMap<String, i64> = BTreeMap::new();
    let mut endpoints: Vec<EndpointStatus> = Vec::new();
    let of_all = accepted.format.is_aggregate();
    let own: Vec<String> = accepted
        .ports
        .iter()
        .filter_map(|port| {
            let place = Place {
                prefix: &accepted.prefix,
            };
            let aggregate = Aggregate {
                cluster: own_cluster,
                namespace: &stored.namespace,
                service: &accepted.service,
                port_name: &port.name,
                scheme: &port.scheme,
            };
            accepted.format.aggregate_key(&place, &aggregate)
        })
        .collect();
    for (key, record) in mirror
        .below(accepted.scope.as_bytes())
        .filter(|(_, record)| record.read)
        .filter(|(key, _)| !of_all || own.iter().any(|own| own.as_bytes() == &***key))
    {
        let listed = endpoints.len() < MAX_STATUS_ENDPOINTS;
        let by_key = accepted.format.cluster_of(&accepted.prefix, key);
        // Values are only parsed where they are shown, or where the key does not tell enough.
        if listed || by_key.is_none() || accepted.format.holds_several() {
            let Ok(found) = accepted
                .format
                .read_all(&accepted.prefix, key, &record.value)
            else {
                continue;
            };
            // A scope of Traefik may hold services whose names go on behind a dot. The name may be cut short where the
            // key was looked for.
            let found = found
                .into_iter()
                .filter(|f| of_all || f.service == accepted.service);
            for found in found {
                let cluster = found
                    .cluster
                    .or_else(|| record.ours.then(|| own_cluster.to_owned()));
                if let Some(cluster) = &cluster {
                    *clusters.entry(cluster.clone()).or_default() += 1;
                }
                count += 1;
                if endpoints.len() == MAX_STATUS_ENDPOINTS {
                    continue;
                }
                let told = |text: Option<String>| {
                    text.map_or_else(String::new, |text| shortened(&text, MAX_TOLD))
                };
                endpoints.push(EndpointStatus {
                    address: told(Some(found.address)),
                    port: told(found.port_name),
                    cluster: told(cluster),
                    pod: told(found.pod),
                    node: told(found.node),
                    zone: told(found.zone),
                    lease: if record.lease == 0 {
                        String::new()
                    } else {
                        format!("{:016x}", record.lease)
                    },
                    key: shortened(&String::from_utf8_lossy(key), MAX_KEY),
                });
            }
        } else if let Some(cluster) = by_key {
            match clusters.get_mut(cluster) {
                Some(known) => *known += 1,
                None => {
                    clusters.insert(cluster.to_owned(), 1);
                }
            }
            count += 1;
        }
    }
    let clusters = clusters
        .into_iter()
        .map(|(name, endpoints)| ClusterCount { name, endpoints })
        .collect();
    (count, clusters, endpoints)
}
