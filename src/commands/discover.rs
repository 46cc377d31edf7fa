//! The command `discover`: flags --> a list of the discovery library --> text on standard output.
//!
//! Takes the flags, prints endpoints for a person or a program. Must never print what was not read: while etcd does not answer, it
//! says so, and on standard error.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use super::{print, printable};
use crate::cli::{DiscoverArgs, NONE, OutputFormat};
use crate::discovery::{Change, Discovery, Endpoint, Service, Source, State};
use crate::model::endpoint::Protocol;

/// What is printed where a record does not tell.
const UNKNOWN: &str = "-";

/// Prints the list, and with `--watch` what changes, until the process is ended.
///
/// # Errors
///
/// Flags that can't work, and an etcd that does not answer in time.
pub async fn run(args: &DiscoverArgs) -> Result<ExitCode, String> {
    let source = source(args)?;
    let discovery = Discovery::connect(args.etcd.settings())
        .await
        .map_err(|error| error.to_string())?;
    let list = discovery.follow(source);
    if tokio::time::timeout(args.timeout, list.ready())
        .await
        .is_err()
    {
        return Err(not_read(&list, args.timeout));
    }
    let mut printer = Printer::new(args);
    let snapshot = list.snapshot();
    if snapshot.is_empty() {
        eprintln!("etcd-registrar: {}", nothing(&list, args));
    }
    if args.watch {
        return watch(&list, &mut printer).await;
    }
    if snapshot.is_empty() {
        // What a program reads is whole also when it is empty.
        if matches!(args.output, OutputFormat::Json | OutputFormat::Csv) {
            print(&printer.list(&snapshot))?;
        }
        return Ok(ExitCode::from(NONE));
    }
    print(&printer.list(&snapshot))?;
    Ok(ExitCode::SUCCESS)
}

fn source(args: &DiscoverArgs) -> Result<Source, String> {
    let format = args.records.format.clone();
    let prefix = args.records.prefix();
    let made = match (&args.service, &args.namespace) {
        (Some(service), namespace) => {
            let namespace = namespace.as_deref().unwrap_or("default");
            Source::service_in(format.clone(), prefix, namespace, service)
        }
        (None, None) => Source::prefix(format.clone(), prefix),
        (None, Some(namespace)) => {
            Source::prefix(format.clone(), prefix).map(|source| source.namespace(namespace))
        }
    };
    let mut source = made.map_err(|error| error.to_string())?;
    for cluster in &args.cluster {
        source = source.cluster(cluster);
    }
    for zone in &args.zone {
        source = source.zone(zone);
    }
    for port in &args.port {
        source = source.port(port);
    }
    for (name, value) in &args.metadata {
        source = source.metadata(name, value);
    }
    Ok(source)
}

fn not_read(list: &Service, waited: Duration) -> String {
    let waited = humantime::format_duration(waited);
    let below = list.source().below();
    match list.state() {
        State::Waiting(Some(why)) if why.contains("permission denied") => {
            format!(
                "etcd does not let this user read {below}: {why}; check --etcd-user, or grant it"
            )
        }
        State::Waiting(Some(why)) => format!("nothing was read within {waited}: {why}"),
        _ => {
            format!("nothing was read within {waited}; does etcd run there? check --etcd-endpoints")
        }
    }
}

/// What to look at when there is nothing.
fn nothing(list: &Service, args: &DiscoverArgs) -> String {
    let unreadable = match list.unreadable() {
        0 => String::new(),
        number => format!("; records that can't be read in this format: {number}"),
    };
    let hint = match (&args.service, &args.namespace) {
        (Some(_), None) if args.records.prefix.is_none() => " (another namespace? give -n)",
        _ => "",
    };
    format!(
        "no such endpoint below {}{hint}{unreadable}",
        list.source().below()
    )
}

/// Prints what is known, then each change as it comes.
async fn watch(list: &Service, printer: &mut Printer) -> Result<ExitCode, String> {
    print(&printer.header(&list.snapshot()))?;
    let mut changes = list.changes();
    let mut state = State::Live;
    loop {
        tokio::select! {
            change = changes.next() => match change {
                Some(change) => print(&printer.change(&change))?,
                None => return Ok(ExitCode::SUCCESS),
            },
            new = list.state_other_than(&state) => {
                match (&state, &new) {
                    (State::Live, State::Stale(why)) => eprintln!(
                        "etcd-registrar: etcd is away; the list is the last known one: {why}"
                    ),
                    (_, State::Live) => eprintln!("etcd-registrar: etcd is back; the list was read again"),
                    _ => {}
                }
                state = new;
            }
        }
    }
}

/// A column: its header, its name as in the value of format Json, and what stands in it.
type Column = (&'static str, &'static str, fn(&Endpoint) -> Option<String>);

const ADDRESS: Column = ("ADDRESS", "address", |e| Some(e.address().to_owned()));
const PORT: Column = ("PORT", "portName", |e| e.port_name().map(str::to_owned));
const PROTOCOL: Column = ("PROTOCOL", "protocol", |e| {
    e.protocol()
        .map(|protocol| Protocol::as_str(protocol).to_owned())
});
const SCHEME: Column = ("SCHEME", "scheme", |e| e.scheme().map(str::to_owned));
const CLUSTER: Column = ("CLUSTER", "cluster", |e| e.cluster().map(str::to_owned));
const NAMESPACE: Column = ("NAMESPACE", "namespace", |e| {
    e.namespace().map(str::to_owned)
});
const SERVICE: Column = ("SERVICE", "service", |e| Some(e.service().to_owned()));
const POD: Column = ("POD", "pod", |e| e.pod().map(str::to_owned));
const UID: Column = ("UID", "uid", |e| e.uid().map(str::to_owned));
const NODE: Column = ("NODE", "node", |e| e.node().map(str::to_owned));
const ZONE: Column = ("ZONE", "zone", |e| e.zone().map(str::to_owned));
const WEIGHT: Column = ("WEIGHT", "weight", |e| {
    e.weight().map(|weight| weight.to_string())
});
const METADATA: Column = ("METADATA", "metadata", |e| {
    let entries: Vec<String> = e
        .metadata()
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    Some(entries.join(",")).filter(|text| !text.is_empty())
});
const KEY: Column = ("KEY", "key", |e| Some(e.key().to_owned()));

/// Endpoints as text.
struct Printer {
    output: OutputFormat,
    columns: Vec<Column>,
    /// How wide the columns of a table are; later lines are aligned with the first ones.
    widths: Vec<usize>,
    /// Whether each line says what became of an endpoint.
    changes: bool,
}

impl Printer {
    fn new(args: &DiscoverArgs) -> Self {
        let columns = match args.output {
            OutputFormat::Table if args.service.is_some() => {
                vec![ADDRESS, PORT, CLUSTER, ZONE, POD, WEIGHT]
            }
            OutputFormat::Table => vec![
                NAMESPACE, SERVICE, ADDRESS, PORT, CLUSTER, ZONE, POD, WEIGHT,
            ],
            OutputFormat::Wide => vec![
                NAMESPACE, SERVICE, ADDRESS, PORT, SCHEME, CLUSTER, ZONE, NODE, POD, WEIGHT,
                METADATA, KEY,
            ],
            OutputFormat::Csv => vec![
                ADDRESS, PORT, PROTOCOL, SCHEME, CLUSTER, NAMESPACE, SERVICE, POD, UID, NODE, ZONE,
                WEIGHT, METADATA, KEY,
            ],
            OutputFormat::Addresses | OutputFormat::Json => vec![ADDRESS],
        };
        Self {
            output: args.output,
            columns,
            widths: Vec::new(),
            changes: args.watch,
        }
    }

    /// A whole list.
    fn list(&mut self, list: &[Arc<Endpoint>]) -> String {
        if self.output == OutputFormat::Json {
            let text = serde_json::to_string_pretty(list).unwrap_or_default();
            return format!("{text}\n");
        }
        let mut text = self.header(list);
        for endpoint in list {
            text.push_str(&self.line(None, endpoint));
        }
        text
    }

    /// What stands above the lines, and how wide the columns of these endpoints are.
    fn header(&mut self, list: &[Arc<Endpoint>]) -> String {
        let headers: Vec<String> = match self.output {
            OutputFormat::Json | OutputFormat::Addresses => return String::new(),
            OutputFormat::Csv => {
                let change = self.changes.then(|| "change".to_owned());
                let names = self.columns.iter().map(|(_, name, _)| (*name).to_owned());
                return csv(change.into_iter().chain(names));
            }
            OutputFormat::Table | OutputFormat::Wide => {
                let change = self.changes.then(|| "CHANGE".to_owned());
                let names = self.columns.iter().map(|(header, ..)| (*header).to_owned());
                change.into_iter().chain(names).collect()
            }
        };
        let change = self.changes.then_some("CHANGED".len());
        let widths = self.columns.iter().map(|(header, _, cell)| {
            let widest = list
                .iter()
                .filter_map(|e| Some(cell(e)?.chars().count()))
                .max();
            widest.unwrap_or(0).max(header.len())
        });
        self.widths = change.into_iter().chain(widths).collect();
        self.aligned(&headers)
    }

    /// What became of an endpoint.
    fn change(&self, change: &Change) -> String {
        let word = match change {
            Change::Added(_) => "added",
            Change::Changed { .. } => "changed",
            Change::Removed(_) => "removed",
        };
        if self.output == OutputFormat::Json {
            let line = serde_json::json!({"change": word, "endpoint": &**change.endpoint()});
            return format!("{line}\n");
        }
        self.line(Some(word), change.endpoint())
    }

    fn line(&self, change: Option<&str>, endpoint: &Endpoint) -> String {
        let cells = self.columns.iter().map(|(_, _, cell)| cell(endpoint));
        match self.output {
            OutputFormat::Csv => csv(change
                .map(str::to_owned)
                .into_iter()
                .chain(cells.map(Option::unwrap_or_default))),
            OutputFormat::Addresses | OutputFormat::Json => match change {
                Some(change) => format!("{change} {}\n", endpoint.address()),
                None => format!("{}\n", endpoint.address()),
            },
            OutputFormat::Table | OutputFormat::Wide => {
                let cells: Vec<String> = change
                    .map(str::to_uppercase)
                    .into_iter()
                    .chain(cells.map(|cell| cell.unwrap_or_else(|| UNKNOWN.to_owned())))
                    .collect();
                self.aligned(&cells)
            }
        }
    }

    fn aligned(&self, cells: &[String]) -> String {
        let mut line = String::new();
        for (cell, width) in cells.iter().zip(&self.widths) {
            // A record may hold any text, which must not move a terminal's cursor.
            let cell = printable(cell);
            // Writing to a String can't fail.
            let _ = write!(line, "{cell:<width$}   ");
        }
        format!("{}\n", line.trim_end())
    }
}

/// A line as RFC 4180 has it.
fn csv(cells: impl Iterator<Item = String>) -> String {
    let cells: Vec<String> = cells
        .map(|cell| {
            if cell.contains([',', '"', '\n', '\r']) {
                format!("\"{}\"", cell.replace('"', "\"\""))
            } else {
                cell
            }
        })
        .collect();
    format!("{}\n", cells.join(","))
}
