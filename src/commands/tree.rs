//! The command `tree`: a prefix of the registry --> its endpoints by namespace, service and cluster, with the time that is left
//! on their leases.
//!
//! Takes the flags, prints for a person or a program. Must never print a record under a name that it does not tell.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use futures::stream::{self, StreamExt};
use serde::Serialize;

use super::{connect, counted, print, printable};
use crate::cli::{EtcdArgs, NONE, RecordArgs, duration};
use crate::discovery::Source;
use crate::model::etcd::{LeaseId, Range};
use crate::registry::ask::{Remaining, remaining};
use crate::registry::mirror::read;

/// Questions about leases under way at a time.
const PARALLEL: usize = 16;

/// What is printed of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TreeOutput {
    /// For a person.
    Tree,
    /// For a program: one object.
    Json,
}

/// How far down the tree is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Depth {
    /// Namespaces, with their numbers of endpoints.
    Namespace,
    /// And their services.
    Service,
    /// And the clusters of these.
    Cluster,
    /// And every endpoint.
    Endpoint,
}

/// `etcd-registrar tree`.
#[derive(Debug, Args)]
pub struct TreeArgs {
    /// Only this service, of every namespace where none is given.
    #[arg(value_name = "SERVICE")]
    pub service: Option<String>,
    /// Only this namespace.
    #[arg(short, long, env = "ETCD_REGISTRAR_NAMESPACE", value_name = "NAME")]
    pub namespace: Option<String>,
    /// How far down.
    #[arg(
        short,
        long,
        env = "ETCD_REGISTRAR_DEPTH",
        default_value = "endpoint",
        value_name = "DEPTH"
    )]
    pub depth: Depth,
    /// Which records are meant.
    #[command(flatten)]
    pub records: RecordArgs,
    /// What is printed.
    #[arg(
        short,
        long,
        env = "ETCD_REGISTRAR_OUTPUT",
        default_value = "tree",
        value_name = "OUTPUT"
    )]
    pub output: TreeOutput,
    /// How long etcd may take to answer first.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_TIMEOUT",
        default_value = "10s",
        value_parser = duration,
        value_name = "DURATION"
    )]
    pub timeout: Duration,
    /// Where etcd is.
    #[command(flatten)]
    pub etcd: EtcdArgs,
}

/// The endpoints of a prefix at one revision.
#[derive(Debug, Serialize)]
struct Tree {
    prefix: String,
    format: &'static str,
    revision: i64,
    namespaces: Vec<Namespace>,
    /// Keys that can't be read in the format.
    unreadable: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Namespace {
    /// `None`: the format does not tell.
    namespace: Option<String>,
    services: Vec<Service>,
}

#[derive(Debug, Serialize)]
struct Service {
    service: String,
    clusters: Vec<Cluster>,
}

#[derive(Debug, Serialize)]
struct Cluster {
    /// `None`: the format does not tell.
    cluster: Option<String>,
    endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    address: String,
    port_name: Option<String>,
    pod: Option<String>,
    key: String,
    /// `None`: it stands without one, until somebody deletes it.
    lease: Option<Lease>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Lease {
    /// As etcdctl writes it.
    id: String,
    /// `None`: it ended while it was asked for.
    seconds_left: Option<i64>,
    ttl_seconds: Option<i64>,
}

/// Prints the tree.
///
/// # Errors
///
/// Flags that can't work, and an etcd that does not answer in time, or refuses.
pub async fn run(args: &TreeArgs) -> Result<ExitCode, String> {
    let prefix = args.records.prefix();
    let source = match (&args.namespace, &args.service) {
        (Some(namespace), Some(service)) => {
            Source::service_in(args.records.format.clone(), prefix, namespace, service)
        }
        _ => Source::prefix(args.records.format.clone(), prefix),
    };
    let below = source
        .map_err(|error| error.to_string())?
        .below()
        .to_owned();
    let (_, session) = connect(args.etcd.settings(), args.timeout).await?;
    let (revision, records) = read(&session.client, &Range::prefix(below.as_bytes()))
        .await
        .map_err(|why| format!("can't read {below}: {why}"))?;
    let mut leases: BTreeSet<LeaseId> = records.iter().map(|kv| kv.lease).collect();
    leases.remove(&0);
    let leases: BTreeMap<LeaseId, Remaining> = stream::iter(leases)
        .map(async |id| {
            let told = remaining(&session.client, id).await;
            told.map(|told| (id, told))
                .map_err(|failure| format!("can't read lease {id:016x}: {}", failure.message))
        })
        .buffer_unordered(PARALLEL)
        .collect::<Vec<_>>()
        .await
        .into_iter()
        .collect::<Result<_, _>>()?;

    let mut found: Found = BTreeMap::new();
    let mut unreadable = Vec::new();
    for kv in records {
        let key = String::from_utf8_lossy(&kv.key).into_owned();
        let Ok(all) = args.records.format.read_all(prefix, &kv.key, &kv.value) else {
            // What only belongs to a record that tells the address is no fault.
            if args.records.format.lead_of(&kv.key).is_none() {
                unreadable.push(key);
            }
            continue;
        };
        let lease = (kv.lease != 0).then(|| {
            let told = leases.get(&kv.lease).and_then(|told| *told);
            Lease {
                id: format!("{:x}", kv.lease),
                seconds_left: told.map(|(left, _)| left),
                ttl_seconds: told.map(|(_, ttl)| ttl),
            }
        });
        for told in all {
            let other = |wanted: &Option<String>, name: Option<&str>| {
                wanted
                    .as_deref()
                    .is_some_and(|wanted| name.is_some_and(|name| name != wanted))
            };
            if other(&args.namespace, told.namespace.as_deref())
                || other(&args.service, Some(&told.service))
            {
                continue;
            }
            found
                .entry(told.namespace)
                .or_default()
                .entry(told.service)
                .or_default()
                .entry(told.cluster)
                .or_default()
                .push(Endpoint {
                    address: told.address,
                    port_name: told.port_name,
                    pod: told.pod,
                    key: key.clone(),
                    lease: lease.clone(),
                });
        }
    }
    let tree = Tree {
        prefix: prefix.to_owned(),
        format: args.records.format.name(),
        revision,
        namespaces: grown(found),
        unreadable,
    };
    let empty = tree.namespaces.is_empty();
    match args.output {
        TreeOutput::Json => {
            let text = serde_json::to_string_pretty(&tree).unwrap_or_default();
            print(&format!("{text}\n"))?;
        }
        TreeOutput::Tree if empty => {}
        TreeOutput::Tree => print(&drawn(&tree, args.depth))?,
    }
    if !tree.unreadable.is_empty() {
        eprintln!(
            "etcd-registrar: {} can't be read as {}, the first is {}",
            counted(tree.unreadable.len(), "key"),
            tree.format,
            tree.unreadable.first().map_or("", String::as_str)
        );
    }
    if empty {
        eprintln!("etcd-registrar: there is no endpoint below {below}");
        return Ok(ExitCode::from(NONE));
    }
    Ok(ExitCode::SUCCESS)
}

/// Endpoints by namespace, service and cluster.
type Found = BTreeMap<Option<String>, BTreeMap<String, BTreeMap<Option<String>, Vec<Endpoint>>>>;

fn grown(found: Found) -> Vec<Namespace> {
    let clusters = |clusters: BTreeMap<Option<String>, Vec<Endpoint>>| {
        let clusters = clusters.into_iter();
        clusters
            .map(|(cluster, endpoints)| Cluster { cluster, endpoints })
            .collect()
    };
    found
        .into_iter()
        .map(|(namespace, services)| Namespace {
            namespace,
            services: services
                .into_iter()
                .map(|(service, found)| Service {
                    service,
                    clusters: clusters(found),
                })
                .collect(),
        })
        .collect()
}

/// A line: how deep it is, its name, and what is said of it.
struct Line {
    depth: usize,
    name: String,
    number: String,
    lease: String,
}

fn drawn(tree: &Tree, depth: Depth) -> String {
    let unknown = |name: &Option<String>| name.clone().unwrap_or_else(|| "-".to_owned());
    let mut lines = Vec::new();
    let mut line = |depth: usize, name: &str, endpoints: &[&Endpoint], is_endpoint: bool| {
        let number = match is_endpoint {
            true => endpoints
                .first()
                .and_then(|endpoint| endpoint.pod.clone())
                .unwrap_or_else(|| "-".to_owned()),
            false => endpoints.len().to_string(),
        };
        lines.push(Line {
            depth,
            name: printable(name),
            number: printable(&number),
            lease: left(endpoints),
        });
    };
    let all: Vec<&Endpoint> = tree.namespaces.iter().flat_map(of_namespace).collect();
    let root = if tree.prefix.is_empty() {
        "(all)"
    } else {
        &tree.prefix
    };
    line(0, root, &all, false);
    for namespace in &tree.namespaces {
        let endpoints: Vec<_> = of_namespace(namespace).collect();
        line(1, &unknown(&namespace.namespace), &endpoints, false);
        for service in namespace
            .services
            .iter()
            .filter(|_| depth >= Depth::Service)
        {
            let endpoints: Vec<_> = of_service(service).collect();
            line(2, &service.service, &endpoints, false);
            for cluster in service.clusters.iter().filter(|_| depth >= Depth::Cluster) {
                let endpoints: Vec<_> = cluster.endpoints.iter().collect();
                line(3, &unknown(&cluster.cluster), &endpoints, false);
                for endpoint in endpoints.iter().filter(|_| depth >= Depth::Endpoint) {
                    line(4, &endpoint.address, &[endpoint], true);
                }
            }
        }
    }
    let heads = ["NAME", "ENDPOINTS", "LEASE"];
    let width = |cell: fn(&Line) -> usize, head: &str| {
        lines.iter().map(cell).max().unwrap_or(0).max(head.len())
    };
    let names = width(|line| line.depth * 2 + line.name.chars().count(), heads[0]);
    let numbers = width(|line| line.number.chars().count(), heads[1]);
    // Writing to a String can't fail.
    let mut text = format!(
        "{:<names$}   {:<numbers$}   {}\n",
        heads[0], heads[1], heads[2]
    );
    for line in lines {
        let name = format!("{:indent$}{}", "", line.name, indent = line.depth * 2);
        let (number, lease) = (line.number, line.lease);
        let _ = writeln!(text, "{name:<names$}   {number:<numbers$}   {lease}");
    }
    text
}

fn of_namespace(namespace: &Namespace) -> impl Iterator<Item = &Endpoint> {
    namespace.services.iter().flat_map(of_service)
}

fn of_service(service: &Service) -> impl Iterator<Item = &Endpoint> {
    service
        .clusters
        .iter()
        .flat_map(|cluster| &cluster.endpoints)
}

/// How long the leases of endpoints go on without a keepalive.
fn left(endpoints: &[&Endpoint]) -> String {
    let seconds: Vec<i64> = endpoints
        .iter()
        .filter_map(|endpoint| endpoint.lease.as_ref()?.seconds_left)
        .collect();
    let without = endpoints.iter().filter(|e| e.lease.is_none()).count();
    let ended = endpoints.len() - without - seconds.len();
    let mut parts = Vec::new();
    match (seconds.iter().min(), seconds.iter().max()) {
        (Some(least), Some(most)) if least == most => parts.push(format!("{least} s left")),
        (Some(least), Some(most)) => parts.push(format!("{least} to {most} s left")),
        _ => {}
    }
    match (without, endpoints.len()) {
        (0, _) => {}
        (1, 1) => parts.push("no lease".to_owned()),
        (without, _) => parts.push(format!("{without} without a lease")),
    }
    match (ended, endpoints.len()) {
        (0, _) => {}
        (1, 1) => parts.push("ended".to_owned()),
        (ended, _) => parts.push(format!("{ended} ended")),
    }
    parts.join(", ")
}
