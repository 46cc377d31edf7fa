//! The command `diff`: what Kubernetes wants and what etcd holds --> what differs, and why.
//!
//! Takes both as they are now, gives what the operator's own index and plan say of them. Must never change anything, nor take a
//! list that could not be read for an empty one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;

use super::{connect, counted, print, printable, read_policy};
use crate::accept::AcceptSettings;
use crate::accept::policy::Policy;
use crate::cli::{EtcdArgs, KubeArgs, NameArgs, duration};
use crate::engine::io::{Object, Resource};
use crate::index::registrations::Standing;
use crate::index::{Claim, Index, Touched};
use crate::kube::client::KubeClient;
use crate::kube::{lists, probe};
use crate::mirror::Mirror;
use crate::model::etcd::{Key, Range};
use crate::plan::ranges::ranges;
use crate::plan::{self, Need, Wait};
use crate::registry::connection::Session;
use crate::registry::mirror::read;

/// The exit codes of diff(1).
const DIFFERENT: u8 = 1;
const TROUBLE: u8 = 2;

/// What is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DiffOutput {
    /// A line for each key.
    Text,
    /// An array of objects.
    Json,
}

/// `etcd-registrar diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// Whose keys are compared.
    #[command(flatten)]
    pub name: NameArgs,
    /// The policy file of the operator.
    #[arg(long, env = "ETCD_REGISTRAR_POLICY_FILE", value_name = "FILE")]
    pub policy_file: Option<PathBuf>,
    /// Only the registrations of this namespace.
    #[arg(short, long, env = "ETCD_REGISTRAR_NAMESPACE", value_name = "NAME")]
    pub namespace: Option<String>,
    /// What is printed.
    #[arg(
        short,
        long,
        env = "ETCD_REGISTRAR_OUTPUT",
        default_value = "text",
        value_name = "OUTPUT"
    )]
    pub output: DiffOutput,
    /// How long etcd and the API server may take to answer.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_TIMEOUT",
        default_value = "10s",
        value_parser = duration,
        value_name = "DURATION"
    )]
    pub timeout: Duration,
    /// Which API server.
    #[command(flatten)]
    pub kube: KubeArgs,
    /// Where etcd is.
    #[command(flatten)]
    pub etcd: EtcdArgs,
}

/// What becomes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Change {
    Missing,
    Different,
    Surplus,
}

/// One key that is not as it is wanted.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Difference {
    change: Change,
    key: String,
    /// `namespace/name`, where it is known.
    registration: Option<String>,
    why: String,
}

/// Prints what differs.
///
/// # Errors
///
/// None: what goes wrong has an exit code of its own.
pub async fn run(args: &DiffArgs) -> Result<ExitCode, String> {
    match compare(args).await {
        Ok(code) => Ok(code),
        Err(why) => {
            eprintln!("etcd-registrar: {why}");
            Ok(ExitCode::from(TROUBLE))
        }
    }
}

async fn compare(args: &DiffArgs) -> Result<ExitCode, String> {
    let policy = read_policy(args.policy_file.as_deref())?;
    let client = KubeClient::new(args.kube.options())
        .await
        .map_err(|error| error.to_string())?;
    let (_connection, session) = connect(args.etcd.settings(), args.timeout).await?;
    let uid = probe::uid(&client, probe::EVERYWHERE, args.timeout)
        .await
        .map_err(|why| {
            format!(
                "can't read the UID of the namespace kube-system: {}",
                why.message
            )
        })?;
    let index = wanted(args, policy, &client).await?;
    let mirror = standing(args, &index, &uid, &session).await?;
    let found = differences(&index, &mirror, &own_prefix(args));
    let of_namespace = |difference: &Difference| {
        let Some(namespace) = &args.namespace else {
            return true;
        };
        let registration = difference.registration.as_deref();
        registration
            .and_then(|name| name.split_once('/'))
            .is_some_and(|(found, _)| found == namespace)
    };
    let found: Vec<Difference> = found.into_iter().filter(of_namespace).collect();
    for (_, stored) in index.registrations() {
        let meant = args.namespace.as_deref();
        if let Standing::Kept { refusal, .. } = &stored.standing
            && meant.is_none_or(|namespace| namespace == &*stored.namespace)
        {
            eprintln!(
                "etcd-registrar: {} is not served ({}: {}): what it had registered is kept",
                stored.full_name,
                refusal.reason,
                printable(&refusal.message)
            );
        }
    }
    match args.output {
        DiffOutput::Json => {
            let text = serde_json::to_string_pretty(&found).unwrap_or_default();
            print(&format!("{text}\n"))?;
        }
        DiffOutput::Text => {
            let lines: Vec<String> = found.iter().map(line).collect();
            print(&lines.concat())?;
        }
    }
    Ok(if found.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(DIFFERENT)
    })
}

fn line(difference: &Difference) -> String {
    let sign = match difference.change {
        Change::Missing => '+',
        Change::Different => '~',
        Change::Surplus => '-',
    };
    let (key, why) = (printable(&difference.key), printable(&difference.why));
    match &difference.registration {
        Some(name) => format!("{sign} {key}   {}: {why}\n", printable(name)),
        None => format!("{sign} {key}   {why}\n"),
    }
}

fn own_prefix(args: &DiffArgs) -> String {
    format!("{}{}/", args.name.registrar_prefix, args.name.cluster_name)
}

/// What Kubernetes wants.
async fn wanted(args: &DiffArgs, policy: Policy, client: &KubeClient) -> Result<Index, String> {
    let settings = AcceptSettings {
        cluster_name: args.name.cluster_name.clone(),
        registrar_prefix: args.name.registrar_prefix.clone(),
    };
    let mut index = Index::new(settings, policy);
    let mut touched = Touched::default();
    for resource in [Resource::Nodes, Resource::Registrations, Resource::Pods] {
        let listed = lists::all(client, resource, args.timeout).await?;
        for object in listed.objects {
            match object {
                Object::Pod(pod) => index.apply_pod(pod, false, &mut touched),
                Object::Node(node) => index.apply_node(node, &mut touched),
                Object::Registration(registration) => {
                    index.apply_registration(*registration, false, &mut touched);
                }
            }
        }
        if let Some(first) = listed.not_understood.first() {
            eprintln!(
                "etcd-registrar: {} can't be understood, the first: {}",
                counted(listed.not_understood.len(), "object"),
                printable(first)
            );
        }
    }
    Ok(index)
}

/// What etcd holds of it.
async fn standing(
    args: &DiffArgs,
    index: &Index,
    uid: &str,
    session: &Session,
) -> Result<Mirror, String> {
    let own = own_prefix(args);
    let mut changed = Vec::new();
    let mut mirror = Mirror::new(format!("{own}leases/{uid}/"));
    let mut done: BTreeSet<Range> = BTreeSet::new();
    // The leases first: they name scopes that nobody wants any more.
    let mut followed = ranges(&own, &BTreeSet::new());
    for _ in 0..2 {
        mirror.follow(&followed, &mut changed);
        for range in &followed {
            if !done.insert(range.clone()) {
                continue;
            }
            let below = String::from_utf8_lossy(&range.start).into_owned();
            let (revision, records) = read(&session.client, range)
                .await
                .map_err(|why| format!("can't read {below} in etcd: {why}"))?;
            mirror.snapshot(range, revision, records, &mut changed);
        }
        followed = scopes(index, &mirror, &own);
    }
    if let Some(owner) = mirror.get(format!("{own}owner").as_bytes())
        && *owner.value != *uid.as_bytes()
    {
        return Err(format!(
            "the name {:?} belongs to the cluster with the UID {}, and this one has {uid}: check --cluster-name, --context and --etcd-endpoints",
            args.name.cluster_name,
            printable(&String::from_utf8_lossy(&owner.value)),
        ));
    }
    Ok(mirror)
}

fn scopes(index: &Index, mirror: &Mirror, own: &str) -> Vec<Range> {
    let names: Vec<_> = mirror
        .leases()
        .iter()
        .filter_map(|(_, lease)| lease.name.clone())
        .collect();
    let mut scopes: BTreeSet<&str> = names.iter().map(|name| &*name.scope).collect();
    for (_, stored) in index.registrations() {
        if let Some(accepted) = stored.serving() {
            scopes.insert(&accepted.scope);
        }
    }
    // As the operator has it: an altered value below `leases/` does not make it read all of etcd.
    scopes.retain(|scope| scope.len() > 1 && scope.ends_with(['/', '.']));
    ranges(own, &scopes)
}

/// Everything that the operator would change, or can't.
fn differences(index: &Index, mirror: &Mirror, own: &str) -> Vec<Difference> {
    let mut keys: BTreeSet<&Key> = index.wanted_keys().collect();
    let everything = Range {
        start: Key::from([0]),
        end: Key::from([0xff]),
    };
    for (key, record) in mirror.in_range(&everything) {
        if record.ours && !key.starts_with(own.as_bytes()) {
            keys.insert(key);
        }
    }
    keys.into_iter()
        .filter_map(|key| difference(index, mirror, key))
        .collect()
}

fn difference(index: &Index, mirror: &Mirror, key: &Key) -> Option<Difference> {
    let record = mirror.get(key);
    let claimant = |claim: &Claim| {
        let stored = index.registration(claim.registration)?;
        Some(stored.full_name.to_string())
    };
    let slot = record
        .and_then(|record| mirror.leases().get(record.lease))
        .and_then(|lease| lease.name.clone());
    let holder = slot.as_ref().map(|slot| slot.registration.to_string());
    let winner = index.winner(key).map(|(claim, _)| claim);
    let wanted_by = winner.as_ref().and_then(claimant);
    let (change, registration, why) = match plan::need(index, mirror, key) {
        Need::Nothing | Need::Right(_) | Need::Keep => return None,
        Need::Put(claim) => {
            let name = claimant(&claim);
            match record {
                None => (Change::Missing, name, missing(index, &claim)),
                Some(record) => {
                    let put = if claim.pod.is_some() {
                        plan::put(index, mirror, key, claim)?
                    } else {
                        plan::put_aggregate(index, mirror, key, claim, |_| true)?
                    };
                    if plan::stands(mirror, key, &put) {
                        return None;
                    }
                    let why = if *put.value != *record.value {
                        other_value(&record.value, &put.value)
                    } else if slot.is_none() {
                        "it stands on no lease of this cluster".to_owned()
                    } else {
                        "it stands on the lease of another registration, scope or TTL".to_owned()
                    };
                    (Change::Different, name, why)
                }
            }
        }
        Need::LeaseKey(lease, name) => {
            let why = format!("its lease {lease:016x} has no key below leases/");
            (Change::Different, Some(name.registration.to_string()), why)
        }
        Need::Delete if wanted_by.is_some() => {
            let why = "it stands for another address, and goes first".to_owned();
            (Change::Different, wanted_by, why)
        }
        Need::Delete => (Change::Surplus, holder, "nobody wants it".to_owned()),
        Need::Wait(Wait::Successor) => {
            let why = "it goes when the record that takes its place stands".to_owned();
            (Change::Surplus, holder, why)
        }
        Need::Wait(Wait::Address) => {
            let why = "it waits until another pod's record of its address is gone".to_owned();
            let change = record.map_or(Change::Missing, |_| Change::Different);
            (change, wanted_by, why)
        }
        Need::Wait(Wait::Snapshot) => (
            Change::Different,
            wanted_by,
            "it could not be read".to_owned(),
        ),
        Need::Foreign(claim) => {
            let lease = record.map_or(0, |record| record.lease);
            let why = match lease {
                0 => "another writer has it, without a lease".to_owned(),
                lease => format!("another writer has it, on lease {lease:016x}"),
            };
            (Change::Different, claimant(&claim), why)
        }
    };
    Some(Difference {
        change,
        key: String::from_utf8_lossy(key).into_owned(),
        registration,
        why,
    })
}

fn missing(index: &Index, claim: &Claim) -> String {
    match claim.pod.and_then(|pod| index.pods().get(pod)) {
        Some(pod) => format!("wanted for pod {}, and not there", pod.name),
        None => "wanted, and not there".to_owned(),
    }
}

/// What differs in a value: the members, where both are objects of JSON.
fn other_value(stands: &[u8], wanted: &[u8]) -> String {
    let object =
        |bytes: &[u8]| -> Option<BTreeMap<String, Value>> { serde_json::from_slice(bytes).ok() };
    let (Some(stands), Some(wanted)) = (object(stands), object(wanted)) else {
        return "the value is another".to_owned();
    };
    let names: BTreeSet<&String> = stands.keys().chain(wanted.keys()).collect();
    let text = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
    let parts: Vec<String> = names
        .into_iter()
        .filter(|name| stands.get(*name) != wanted.get(*name))
        .map(|name| {
            let (is, should) = (text(stands.get(name)), text(wanted.get(name)));
            format!("{name} is {is} and should be {should}")
        })
        .collect();
    if parts.is_empty() {
        return "the value is written in another way".to_owned();
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_which_members_differ() {
        let of = |a: &str, b: &str| other_value(a.as_bytes(), b.as_bytes());
        assert_eq!(
            of(r#"{"a":1,"b":2,"c":"x"}"#, r#"{"a":1,"b":3,"d":null}"#),
            "b is 2 and should be 3, c is \"x\" and should be nothing, d is nothing and should be null"
        );
        assert_eq!(of("x", "{}"), "the value is another");
        assert_eq!(
            of("{\"a\":1}", "{ \"a\":1}"),
            "the value is written in another way"
        );
    }
}
