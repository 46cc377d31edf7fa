//! What an operator needs of etcd.
//!
//! Takes the flags, tries each endpoint, the permissions, a lease and the keys of the cluster. Must never write a key: what needs the
//! permission to write is tried in a transaction whose comparison can't hold.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::{DoctorArgs, Findings, numbers};
use crate::accept::policy::Policy;
use crate::commands::{connect, counted};
use crate::model::etcd::{Compare, Failure, FailureKind, Key, Op, Range, Refusal, Request, Txn};
use crate::registry::ask::{execute, keep_alive, remaining};
use crate::registry::connection::{Connection, DEADLINE, Session, Settings};
use crate::registry::mirror::read;

/// The quota of etcd where it was not told another: `--quota-backend-bytes`.
const DEFAULT_QUOTA: i64 = 2 << 30;

/// The share of the quota (percent) from which it is time to do something.
const MUCH: i64 = 80;

/// A read that takes longer says that requests may fail: a third of the deadline of the operator's.
const SLOW: Duration = Duration::from_millis(500);

/// The TTL (seconds) of the lease that is tried: the default of the election.
const TTL: i64 = 5;

/// Leases that are looked at, to see whether anybody keeps them alive.
const LOOKED_AT: usize = 64;

pub(super) async fn look(
    args: &DoctorArgs,
    policy: &Policy,
    uid: Option<&str>,
    findings: &mut Findings,
) {
    let settings = args.etcd.settings();
    if settings.endpoints.len() > 1 {
        for url in &settings.endpoints {
            let alone = Settings {
                endpoints: vec![url.clone()],
                ..settings.clone()
            };
            match connect(alone, args.timeout).await {
                Ok((_connection, session)) => member(&session, findings).await,
                Err(why) => findings.warning(
                    why,
                    "the others are used; start this member, or take it out of --etcd-endpoints",
                ),
            }
        }
    }
    let (connection, session) = match connect(settings.clone(), args.timeout).await {
        Ok(connected) => connected,
        Err(why) => {
            let advice = match why.contains("no leader") {
                true => {
                    "etcd has no leader: start enough members for a quorum (etcdctl endpoint status --cluster)"
                }
                false => {
                    "mend what it says; without etcd nothing is registered, and what is there goes with its leases"
                }
            };
            findings.error(why, advice);
            return;
        }
    };
    if settings.endpoints.len() == 1 {
        member(&session, findings).await;
    }
    permissions(args, policy, &session, findings).await;
    lease(&connection, &session, findings).await;
    cluster(args, uid, &session, findings).await;
}

/// One member: its version, leader, alarms and space.
async fn member(session: &Session, findings: &mut Findings) {
    let url = &session.endpoint;
    let began = Instant::now();
    let mut maintenance = session.client.maintenance_client();
    let status = match tokio::time::timeout(DEADLINE, maintenance.status()).await {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => {
            let advice =
                "its version, alarms and space are not known; look with `etcdctl endpoint status`";
            findings.warning(
                format!("etcd {url} does not tell its status: {error}"),
                advice,
            );
            return;
        }
        Err(_) => {
            let advice =
                "look at its disk and load; an operator waits no longer than that for an answer";
            findings.error(
                format!("etcd {url} takes longer than {DEADLINE:?} to answer"),
                advice,
            );
            return;
        }
    };
    let took = began.elapsed();
    let version = status.version();
    match numbers(version) {
        Some(found) if found < (3, 4) => findings.error(
            format!("etcd {url} has version {version}"),
            "install 3.4 or newer: older ones have no streams that tell their progress",
        ),
        Some(found) if found > (3, 6) => findings.warning(
            format!("etcd {url} has version {version}"),
            "this version of etcd-registrar was tried up to 3.6; look for a newer one",
        ),
        _ => findings.ok(format!(
            "etcd {url} has version {version} and answers within {} ms",
            took.as_millis()
        )),
    }
    if took > SLOW {
        findings.warning(
            format!("etcd {url} took {} ms to answer", took.as_millis()),
            "look at its disk and load (etcdctl check perf): slow writes delay what readers see",
        );
    }
    if status.leader() == 0 {
        findings.error(
            format!("etcd {url} knows no leader"),
            "start enough members for a quorum (etcdctl endpoint status --cluster)",
        );
    }
    for alarm in status.errors() {
        let advice = if alarm.contains("NOSPACE") {
            "etcd takes no writes but removals: compact and defragment it (etcdctl compact REVISION; etcdctl defrag), or raise --quota-backend-bytes, then etcdctl alarm disarm"
        } else {
            "see etcd's own documentation of this alarm (etcdctl alarm list)"
        };
        findings.error(format!("etcd {url} says: {alarm}"), advice);
    }
    let (size, used) = (status.db_size(), status.raft_used_db_size());
    // Only newer ones tell it.
    let (quota, told) = match status.db_size_quota() {
        0 => (DEFAULT_QUOTA, "the default quota"),
        quota => (quota, "its quota"),
    };
    let mib = |bytes: i64| bytes >> 20;
    let space = format!(
        "etcd {url} uses {} MiB of {told} of {} MiB, {} MiB of it for what is held",
        mib(size),
        mib(quota),
        mib(used)
    );
    if size.saturating_mul(100) > quota.saturating_mul(MUCH) {
        findings.warning(
            space,
            "defragment it (etcdctl defrag) where much of it is not held, else compact it (--auto-compaction-retention) or raise --quota-backend-bytes: at the quota it takes no more writes",
        );
    } else {
        findings.ok(space);
    }
}

/// Whether the user may read and write where the operator does.
async fn permissions(
    args: &DoctorArgs,
    policy: &Policy,
    session: &Session,
    findings: &mut Findings,
) {
    let own = format!("{}{}/", args.name.registrar_prefix, args.name.cluster_name);
    let granted: BTreeSet<&str> = policy.beginnings();
    let mut prefixes: Vec<(&str, &str)> = vec![(&own, "the operator's own keys stand there")];
    prefixes.extend(
        granted
            .iter()
            .map(|prefix| (*prefix, "the policy grants it")),
    );
    for (prefix, why) in prefixes {
        if prefix.is_empty() {
            findings.warning(
                "the policy grants keys without a prefix, whose permission can't be tried",
                "grant the user of etcd each service's keys (etcdctl role grant-permission NAME readwrite web.rpc/ --prefix)",
            );
            continue;
        }
        let range = Range::prefix(prefix.as_bytes());
        let grant = format!(
            "grant it: etcdctl role grant-permission ROLE readwrite {prefix} --prefix=true (examples/etcd-role.sh)"
        );
        let mut denied = Vec::new();
        let mut failed = None;
        for (what, op) in [
            ("read", Op::Get(range.start.clone())),
            ("read all", Op::GetRange(tail(&range))),
            ("write", Op::Put(range.start.clone(), Box::default(), 0)),
        ] {
            match execute(
                &session.client,
                Request::Txn(never(&range.start, op)),
                DEADLINE,
            )
            .await
            {
                Ok(_) => {}
                Err(failure) if failure.kind == FailureKind::Refused(Refusal::Permission) => {
                    denied.push(what);
                }
                Err(failure) => failed = Some(failure.message),
            }
        }
        match (denied.is_empty(), failed) {
            (false, _) => findings.error(
                format!(
                    "etcd does not let this user {} {prefix} ({why})",
                    denied.join(", ")
                ),
                grant,
            ),
            (true, Some(message)) => findings.error(
                format!("the permission for {prefix} can't be tried: {message}"),
                "mend what it says, and look again",
            ),
            (true, None) => {
                findings.ok(format!("{prefix} can be read and written in etcd ({why})"))
            }
        }
    }
}

/// The last keys of a range: a user who may read all of it may read these, and nothing stands there.
fn tail(range: &Range) -> Range {
    let start: Vec<u8> = [&range.start, &[0xff][..]].concat();
    Range {
        start: start.into(),
        end: range.end.clone(),
    }
}

/// A transaction that is judged by etcd's permissions, and never done: no key was created at a revision below 0.
fn never(key: &Key, op: Op) -> Txn {
    Txn {
        compares: vec![Compare::CreateRevision(key.clone(), -1)],
        then: vec![op],
        otherwise: Vec::new(),
    }
}

/// A lease that nothing stands on.
async fn lease(connection: &Connection, session: &Session, findings: &mut Findings) {
    let id = rand::random_range(1..=i64::MAX);
    let advice = "look at etcd's log; without leases nothing can be registered";
    let failed =
        |what: &str, failure: Failure| format!("a lease can't be {what}: {}", failure.message);
    if let Err(failure) = execute(&session.client, Request::Grant(id, TTL), DEADLINE).await {
        findings.error(failed("granted", failure), advice);
        return;
    }
    let granted = match remaining(&session.client, id).await {
        Ok(told) => told.map_or(0, |(_, granted)| granted),
        Err(failure) => {
            findings.error(failed("looked at", failure), advice);
            return;
        }
    };
    match keep_alive(connection, id, DEADLINE).await {
        Ok(true) if granted <= TTL => findings.ok(format!(
            "a lease of {TTL} s was granted, kept alive and revoked"
        )),
        Ok(true) => findings.warning(
            format!("a lease of {TTL} s was granted for {granted} s"),
            "etcd grants no less than one and a half of its --election-timeout: a leader that crashed is replaced so much later",
        ),
        Ok(false) => findings.error("a lease ended at once", advice),
        Err(failure) => findings.error(failed("kept alive", failure), advice),
    }
    // It would end by itself.
    if let Err(failure) = execute(&session.client, Request::Revoke(id), DEADLINE).await {
        findings.warning(failed("revoked", failure), "it ends by itself");
    }
}

/// Whose the name is, who leads, and whether anybody keeps the leases alive.
async fn cluster(args: &DoctorArgs, uid: Option<&str>, session: &Session, findings: &mut Findings) {
    let name = &args.name.cluster_name;
    let own = format!("{}{name}/", args.name.registrar_prefix);
    let records = match read(&session.client, &Range::prefix(own.as_bytes())).await {
        Ok((_, records)) => records,
        Err(why) => {
            findings.error(
                format!("{own} can't be read: {why}"),
                "without it whose the name is, and who leads, is not known",
            );
            return;
        }
    };
    let at = |key: &str| {
        let key = format!("{own}{key}");
        records.iter().find(|kv| *kv.key == *key.as_bytes())
    };
    match at("owner") {
        None => findings.ok(format!("the name {name} is free")),
        Some(kv) => {
            let owner = String::from_utf8_lossy(&kv.value);
            match uid {
                Some(uid) if uid == owner => {
                    findings.ok(format!("the name {name} is this cluster's"));
                }
                Some(uid) => findings.error(
                    format!("the name {name} is that of the cluster {owner}, and this one is {uid}"),
                    "give this cluster another --cluster-name; where that one is gone for good: etcd-registrar purge --uid",
                ),
                None => findings.ok(format!("the name {name} is that of the cluster {owner}")),
            }
        }
    }
    let waiting = records
        .iter()
        .filter(|kv| kv.key.starts_with(format!("{own}waiting/").as_bytes()))
        .count();
    let leads = at("leader").is_some();
    let leases: Vec<_> = records
        .iter()
        .filter(|kv| kv.lease != 0 && kv.key.starts_with(format!("{own}leases/").as_bytes()))
        .map(|kv| kv.lease)
        .collect();
    match (leads, waiting) {
        (true, 0) => findings.warning(
            format!("one operator of {name} runs, and none waits to take over"),
            "run two replicas, so that removals go on while one restarts",
        ),
        (true, waiting) => findings.ok(format!(
            "an operator of {name} leads, and {} to take over",
            match waiting {
                1 => "one waits".to_owned(),
                several => format!("{several} wait"),
            }
        )),
        (false, _) if leases.is_empty() => findings.warning(
            format!("no operator of {name} runs yet"),
            "start it: etcd-registrar run, or kubectl apply -k deploy/",
        ),
        (false, _) => findings.error(
            format!(
                "no operator of {name} leads, and {} stand",
                counted(leases.len(), "lease")
            ),
            "start it, or see its log: nothing is registered or removed meanwhile",
        ),
    }
    let (mut kept, mut ending) = (0, 0);
    for lease in leases.iter().take(LOOKED_AT) {
        match remaining(&session.client, *lease).await {
            // They are kept alive at a third of their TTL.
            Ok(Some((left, ttl))) if left < ttl / 2 => ending += 1,
            Ok(Some(_)) => kept += 1,
            // It went just now.
            Ok(None) => {}
            Err(failure) => {
                findings.error(
                    format!(
                        "the lease {lease:016x} can't be looked at: {}",
                        failure.message
                    ),
                    "the user of etcd needs the permission for every key of its leases",
                );
                return;
            }
        }
    }
    match (kept, ending) {
        (0, 0) => {}
        (_, 0) => findings.ok(format!(
            "{} of {name} looked at, all kept alive",
            counted(kept, "lease")
        )),
        (_, _) => findings.error(
            format!("{} of {name} not kept alive", counted(ending, "lease")),
            "see whether a replica runs and reaches etcd (/readyz): the records go when the leases end",
        ),
    }
}
