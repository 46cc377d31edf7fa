//! Status and events: when they are written.
//!
//! Takes what changed, gives a status at once on the first change and then at most once a second per
//! registration. Must never say what was not read back.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use crate::accept::policy::MassRemovals;
use crate::api::{ServiceRegistrationStatus, reason};
use crate::format::has_dotted_scope;
use crate::index::registrations::{RegistrationId, Standing};
use crate::model::names::{MAX_DNS_SUBDOMAIN, shortened};
use crate::summary::{Facts, leaderless, summary};

use super::guard::{Mass, WINDOW_MICROS};
use super::io::{Effect, EventType};
use super::lane::Write;
use super::{Engine, Life};
use crate::model::etcd::{Key, Range};

pub(super) use crate::summary::Problem;

/// What is remembered of a registration between two statuses.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Keys that were read back as wanted.
    pub(super) registered: u32,
    /// Not before this time is a status written.
    next: u64,
    due: bool,
    /// What was written last and has not shown in the watch, or what showed there.
    known: Option<Box<ServiceRegistrationStatus>>,
    /// It was said once that no leader is known. Who overwrites that leads, and knows better.
    said_leaderless: bool,
    /// Keys with a problem.
    problems: BTreeSet<Key>,
    /// The scope that the newest accepted spec has, to see the mirror's changes by.
    scope: Option<Arc<str>>,
}

/// At most one status a second per object (design, section 4).
const STATUS_MICROS: u64 = 1_000_000;
/// What Kubernetes changed is reported together with its effect in etcd, which mostly takes less.
const SETTLE_MICROS: u64 = 25_000;
/// When no leader is known for so long, any live replica sets `Ready` (design, section 4).
const LEADERLESS_MICROS: u64 = 10_000_000;

impl Engine {
    /// A registration's status may be another now.
    pub(super) fn report_due(&mut self, id: RegistrationId) {
        let soon = self.now.monotonic + SETTLE_MICROS;
        self.due_at(id, soon);
    }

    fn due_at(&mut self, id: RegistrationId, time: u64) {
        let report = self.reports.entry(id).or_default();
        if report.due {
            return;
        }
        report.due = true;
        let time = time.max(report.next);
        self.due_reports.insert((time, id));
    }

    pub(super) fn all_reports_due(&mut self) {
        let ids: Vec<RegistrationId> = self.index.registrations().map(|(id, _)| id).collect();
        for id in ids {
            self.report_due(id);
        }
    }

    /// Keys that were read back as a registration wants them: more or fewer.
    pub(super) fn count_registered(&mut self, id: RegistrationId, by: i32) {
        let report = self.reports.entry(id).or_default();
        report.registered = report.registered.saturating_add_signed(by);
        let now = self.now.monotonic;
        self.due_at(id, now);
    }

    /// The spec or the standing of a registration changed, or one of its pods.
    pub(super) fn registration_touched(&mut self, id: RegistrationId) {
        let Some(stored) = self.index.registration(id) else {
            return;
        };
        // This is on the way of every change of a pod: nothing is copied here.
        let scope = stored.serving().map(|accepted| accepted.scope.as_str());
        let seen = (stored.generation, stored.serving().is_some());
        let report = self.reports.entry(id).or_default();
        if report.scope.as_deref() != scope {
            report.scope = scope.map(Into::into);
            self.scopes_dirty = true;
        }
        if self.judged.insert(id, seen) != Some(seen) {
            let name = Arc::clone(&stored.full_name);
            // What it had registered under another spec is judged anew.
            self.guard.forget_registration(id);
            self.look_at_leases_of(&name);
        }
    }

    /// A registration was delivered with this status.
    pub(super) fn status_seen(
        &mut self,
        id: RegistrationId,
        status: Option<Box<ServiceRegistrationStatus>>,
    ) {
        if self.index.registration(id).is_none() {
            return;
        }
        let report = self.reports.entry(id).or_default();
        // None: taken away by someone, or never written; the next one is written whatever was before.
        report.known = status.map(|mut status| {
            // Which manager applied a condition first decides their order in the list.
            status.conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
            // Whoever wrote that has told of it, or an earlier process has.
            if status.registered.unwrap_or(0) > 0 && (report.known.is_none() || is_ready(&status)) {
                self.announced.insert(id);
            }
            status
        });
    }

    /// A registration is gone: its records are nobody's wish now.
    pub(super) fn registration_removed(&mut self, full_name: &str) {
        let gone: Vec<RegistrationId> = self
            .reports
            .keys()
            .copied()
            .filter(|id| self.index.registration(*id).is_none())
            .collect();
        for id in gone {
            self.reports.remove(&id);
            self.judged.remove(&id);
            self.announced.remove(&id);
        }
        self.look_at_leases_of(full_name);
        self.next_sweep = self.now.monotonic;
    }

    /// A record of a scope changed: so may what is discovered there.
    pub(super) fn scope_changed(&mut self, key: &Key) {
        let Ok(text) = std::str::from_utf8(key) else {
            return;
        };
        let mut ids: Vec<RegistrationId> = Vec::new();
        let mut end = text.len();
        // The scopes of Traefik and Apisix end with a dot; of other keys a dot says nothing.
        let ends: &[char] = if has_dotted_scope(key) {
            &['/', '.']
        } else {
            &['/']
        };
        while let Some(at) = text.get(..end).and_then(|head| head.rfind(ends)) {
            if let Some(found) = text.get(..=at).and_then(|scope| self.by_scope.get(scope)) {
                ids.extend(found.iter().copied());
            }
            end = at;
        }
        let now = self.now.monotonic;
        for id in ids {
            self.due_at(id, now);
        }
    }

    /// Which registrations look at which scope.
    pub(super) fn note_scopes(&mut self) {
        self.by_scope.clear();
        for (id, stored) in self.index.registrations() {
            // What is kept of one that is not served any more is counted, too.
            let (Standing::Serving(accepted)
            | Standing::Kept {
                last: Some(accepted),
                ..
            }) = &stored.standing
            else {
                continue;
            };
            self.by_scope
                .entry(accepted.scope.as_str().into())
                .or_default()
                .push(id);
        }
    }

    /// What stands in the way of a key, for each registration that it concerns.
    pub(super) fn set_problems(&mut self, key: &Key, found: Vec<(RegistrationId, Problem)>) {
        let before = self.problems.get(key);
        if before.is_none() && found.is_empty() || before == Some(&found) {
            return;
        }
        let mut touched: BTreeSet<RegistrationId> = found.iter().map(|(id, _)| *id).collect();
        touched.extend(before.into_iter().flatten().map(|(id, _)| *id));
        for id in touched {
            let report = self.reports.entry(id).or_default();
            if found.iter().any(|(other, _)| *other == id) {
                report.problems.insert(Arc::clone(key));
            } else {
                report.problems.remove(key);
            }
            self.report_due(id);
        }
        if found.is_empty() {
            self.problems.remove(key);
        } else {
            self.problems.insert(Arc::clone(key), found);
        }
    }

    /// The registration that a change of a key was made for.
    pub(super) fn registration_of(&self, key: &Key, write: &Write) -> Option<RegistrationId> {
        match write {
            Write::Put { slot, .. } | Write::LeaseKey(_, slot) => {
                self.index.find(&slot.registration)
            }
            Write::Delete => {
                let lease = self.mirror.get(key)?.lease;
                let name = self.mirror.leases().get(lease)?.name.as_ref()?;
                self.index.find(&name.registration)
            }
        }
    }

    /// Whose a foreign record is, as far as it tells.
    pub(super) fn foreign_owner(&self, key: &Key) -> String {
        let Some(record) = self.mirror.get(key) else {
            return "someone else".into();
        };
        let told = self.index.winner(key).and_then(|(claim, _)| {
            let accepted = self.index.registration(claim.registration)?.serving()?;
            let found = accepted
                .format
                .read(&accepted.prefix, key, &record.value)
                .ok()?;
            let cluster = found
                .cluster
                .filter(|cluster| *cluster != self.settings.cluster_name)?;
            Some(match (found.namespace, found.pod) {
                (Some(namespace), Some(pod)) => {
                    let pod = shortened(&pod, MAX_DNS_SUBDOMAIN);
                    format!("cluster {cluster} for pod {namespace}/{pod}")
                }
                _ => format!("cluster {cluster}"),
            })
        });
        told.unwrap_or_else(|| match record.lease {
            0 => "someone else (a key without a lease, put by hand or by another program)".into(),
            lease => format!("someone else (on lease {lease:016x}, which is not this cluster's)"),
        })
    }

    /// Writes what is due.
    pub(super) fn reports(&mut self) {
        if self.life != Life::Running {
            return;
        }
        let now = self.now.monotonic;
        self.mind_leaderless();
        while let Some((time, id)) = self.due_reports.first().copied() {
            if time > now {
                break;
            }
            self.due_reports.pop_first();
            let Some(report) = self.reports.get_mut(&id) else {
                continue;
            };
            report.due = false;
            if self.leads() && !self.frozen() && !self.blind() {
                self.report(id);
            } else if self.leaderless && self.kube.live(now) {
                self.report_leaderless(id);
            }
        }
    }

    fn report(&mut self, id: RegistrationId) {
        let Some(stored) = self.index.registration(id) else {
            return;
        };
        let Some(report) = self.reports.get(&id) else {
            return;
        };
        let before: &[Condition] = report
            .known
            .as_ref()
            .map_or(&[], |status| &status.conditions);
        let mut problems: Vec<(&[u8], &Problem)> = Vec::new();
        for key in &report.problems {
            let found = self
                .problems
                .get(key)
                .into_iter()
                .flatten()
                .find(|(other, _)| *other == id);
            problems.extend(found.map(|(_, problem)| (&**key, problem)));
        }
        let scope_refused = stored.serving().and_then(|accepted| {
            let scope = Range::prefix(accepted.scope.as_bytes());
            self.range_problems
                .iter()
                .find(|(range, _)| range.start <= scope.start && scope.end <= range.end)
                .map(|(_, failure)| failure.message.as_str())
        });
        let facts = Facts {
            now: self.now.unix,
            cluster: &self.settings.cluster_name,
            registered: report.registered,
            problems,
            scope_refused,
            busy: !self.flying.is_empty() || self.lanes.iter().any(|lane| !lane.is_empty()),
            no_space: self.no_space,
            slowed_down: self.pace.waiting(&stored.namespace),
            held: self.held_of(id),
            before,
        };
        let Some(status) = summary(&self.index, &self.mirror, id, &facts) else {
            return;
        };
        if report.known.as_deref() == Some(&status) {
            return;
        }
        self.announce_changes(id, &status);
        self.patch(id, status, false);
    }

    fn patch(&mut self, id: RegistrationId, status: ServiceRegistrationStatus, ready_only: bool) {
        let Some(stored) = self.index.registration(id) else {
            return;
        };
        self.effects.push(Effect::PatchStatus {
            namespace: stored.namespace.to_string(),
            name: stored.name.to_string(),
            uid: stored.uid.clone(),
            status: Box::new(status.clone()),
            ready_only,
        });
        let now = self.now.monotonic;
        if let Some(report) = self.reports.get_mut(&id) {
            report.next = now + STATUS_MICROS;
            if ready_only {
                report.said_leaderless = true;
                let known = report.known.get_or_insert_default();
                known
                    .conditions
                    .retain(|condition| condition.type_ != reason::READY);
                known.conditions.extend(status.conditions);
                known.conditions.sort_by(|a, b| a.type_.cmp(&b.type_));
            } else {
                report.known = Some(Box::new(status));
            }
        }
    }

    /// Events tell of what a person would want to know.
    fn announce_changes(&mut self, id: RegistrationId, status: &ServiceRegistrationStatus) {
        let before = self
            .reports
            .get(&id)
            .and_then(|report| report.known.as_deref());
        let find = |status: &ServiceRegistrationStatus, type_: &str| {
            status
                .conditions
                .iter()
                .find(|condition| condition.type_ == type_)
                .cloned()
        };
        let mut said: Vec<(EventType, &'static str, String)> = Vec::new();
        let ready = (
            before.and_then(|b| find(b, reason::READY)),
            find(status, reason::READY),
        );
        if let (was, Some(is)) = &ready {
            let unknown = was.as_ref().is_some_and(|was| {
                was.reason == reason::REGISTRY_UNREACHABLE || was.reason == reason::NO_LEADER
            });
            if unknown {
                said.push((
                    EventType::Normal,
                    reason::EVENT_REGISTRY_BACK,
                    "etcd answers again".into(),
                ));
            }
            let some = status.registered.unwrap_or(0) > 0;
            if is.status == "True" && some && self.announced.insert(id) {
                said.push((
                    EventType::Normal,
                    reason::EVENT_REGISTERED,
                    is.message.clone(),
                ));
            }
        }
        for (type_, bad, event) in [
            (reason::ACCEPTED, "False", reason::EVENT_REFUSED),
            (reason::CONFLICT, "True", reason::EVENT_CONFLICT),
        ] {
            let was = before
                .and_then(|b| find(b, type_))
                .is_some_and(|c| c.status == bad);
            if let Some(is) = find(status, type_).filter(|is| is.status == bad && !was) {
                said.push((EventType::Warning, event, is.message));
            }
        }
        for (event_type, reason, message) in said {
            self.announce(id, event_type, reason, message);
        }
    }

    fn announce(
        &mut self,
        id: RegistrationId,
        event_type: EventType,
        reason: &'static str,
        message: String,
    ) {
        let Some(stored) = self.index.registration(id) else {
            return;
        };
        self.effects.push(Effect::Announce {
            namespace: stored.namespace.to_string(),
            name: stored.name.to_string(),
            uid: stored.uid.clone(),
            event_type,
            reason,
            message,
        });
    }

    /// Tells of many pods that went at once although they are there.
    pub(super) fn tell_mass_removal(&mut self, id: RegistrationId, mass: Mass, rule: MassRemovals) {
        let Some(stored) = self.index.registration(id) else {
            return;
        };
        let then = match rule.hold_seconds {
            0 => "their endpoints are removed".to_owned(),
            seconds => format!(
                "the endpoints of the last of them, and of those that follow, are held for {seconds} s"
            ),
        };
        let message = format!(
            "{} of {} pods stopped being ready within {} s, and none of them was deleted; {then}. Look at the pods, their nodes and their readiness probes",
            mass.pods,
            mass.of,
            WINDOW_MICROS / 1_000_000
        );
        let line = format!("{}: {message}", stored.full_name);
        self.log(tracing::Level::WARN, line);
        self.announce(id, EventType::Warning, reason::EVENT_MASS_REMOVAL, message);
    }

    /// No leader is known for 10 s: `Ready` is any live replica's to set.
    fn mind_leaderless(&mut self) {
        let now = self.now.monotonic;
        let heard = self
            .etcd_heard
            .is_some_and(|heard| now.saturating_sub(heard) < LEADERLESS_MICROS);
        if heard && self.mirror.get(&self.keys.leader).is_some() {
            self.leader_seen = Some(now);
        }
        let since = self.leader_seen.or(self.started).unwrap_or(now);
        let leaderless = now.saturating_sub(since) >= LEADERLESS_MICROS;
        if leaderless != self.leaderless {
            self.leaderless = leaderless;
            for report in self.reports.values_mut() {
                report.said_leaderless = false;
            }
            if leaderless {
                let why = self
                    .etcd_problem
                    .clone()
                    .or_else(|| self.shut_out())
                    .or_else(|| self.incomplete())
                    .unwrap_or_else(|| "no replica leads".into());
                self.log(tracing::Level::ERROR, format!("no leader is known for 10 s: {why}; what is registered stays as long as its leases are kept alive"));
            }
            self.all_reports_due();
        }
    }

    fn report_leaderless(&mut self, id: RegistrationId) {
        let now = self.now.monotonic;
        let Some(stored) = self.index.registration(id) else {
            return;
        };
        let Some(report) = self.reports.get(&id) else {
            return;
        };
        let before: &[Condition] = report
            .known
            .as_ref()
            .map_or(&[], |status| &status.conditions);
        let silent = self
            .etcd_heard
            .is_none_or(|heard| now.saturating_sub(heard) >= LEADERLESS_MICROS);
        let (why, message) = if self.no_space {
            (reason::NO_SPACE, "no replica can be elected: etcd has no space left (alarm NOSPACE). Compact and defragment it or raise its quota, then: etcdctl alarm disarm".to_owned())
        } else if silent {
            let said = self
                .etcd_problem
                .clone()
                .unwrap_or_else(|| "no answer".into());
            (
                reason::REGISTRY_UNREACHABLE,
                format!(
                    "etcd can't be reached: {said}. What is registered stays as long as its leases"
                ),
            )
        } else {
            (
                reason::NO_LEADER,
                "no replica of the operator leads; what is registered stays, nothing changes"
                    .to_owned(),
            )
        };
        let facts = Facts {
            now: self.now.unix,
            cluster: &self.settings.cluster_name,
            registered: report.registered,
            problems: Vec::new(),
            scope_refused: None,
            busy: !self.flying.is_empty() || self.lanes.iter().any(|lane| !lane.is_empty()),
            no_space: self.no_space,
            slowed_down: 0,
            held: None,
            before,
        };
        let known = before
            .iter()
            .find(|condition| condition.type_ == reason::READY);
        if report.said_leaderless || known.is_some_and(|condition| condition.reason == why) {
            return;
        }
        let status = leaderless(stored, &facts, why, message.clone());
        if why == reason::REGISTRY_UNREACHABLE {
            self.announce(
                id,
                EventType::Warning,
                reason::EVENT_REGISTRY_UNREACHABLE,
                message,
            );
        }
        self.patch(id, status, true);
    }
}

/// Whether every wanted record was read back.
fn is_ready(status: &ServiceRegistrationStatus) -> bool {
    status
        .conditions
        .iter()
        .any(|condition| condition.type_ == reason::READY && condition.status == "True")
}
