//! `make bench`: the operator against a bare floor, on the same API server and etcd. The method is in
//! docs/benchmarks.md.

mod burst;
mod discovery;
mod failover;
mod floor;
mod memory;
mod observe;
mod propagation;
mod report;
mod rest;
mod start;
mod statistics;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use serde_json::json;
use testbed::Etcd;

use report::{Machine, Report, Row};
use world::World;

/// Anything that can go wrong: a benchmark says so and ends.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Measures the operator against a bare floor.
#[derive(Debug, Parser)]
#[command(name = "cargo bench --")]
struct Args {
    /// What to measure; everything when nothing is named.
    parts: Vec<Part>,
    /// Small numbers, to see that it works. What it prints means nothing.
    #[arg(long)]
    quick: bool,
    /// Endpoints for the burst, the start, the memory, the rest and the failover.
    #[arg(long, default_value_t = 10_000)]
    endpoints: usize,
    /// Pods for the memory of a large cluster.
    #[arg(long, default_value_t = 100_000)]
    pods: usize,
    /// Replaces the table in this Markdown file.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["quick", "parts"])]
    markdown: Option<PathBuf>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// From a change of readiness to the event in etcd.
    Propagation,
    /// All endpoints at once.
    Burst,
    /// Start with all records in place.
    Start,
    /// CPU at rest.
    Rest,
    /// Failover between two replicas.
    Failover,
    /// Resident memory.
    Memory,
    /// The discovery library with all endpoints in one list.
    Discovery,
    /// Size of the binary.
    Binary,
}

/// How much of everything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) endpoints: usize,
    pub(crate) pods: usize,
    /// Rounds of propagation, and changes in each for each group.
    pub(crate) rounds: usize,
    pub(crate) changes: usize,
    /// Bursts of each.
    pub(crate) bursts: usize,
    pub(crate) starts: usize,
    /// Seconds at rest.
    pub(crate) rest: u64,
    /// Leaders ended with SIGTERM, and with SIGKILL.
    pub(crate) terminated: usize,
    pub(crate) killed: usize,
}

impl Sizes {
    fn of(args: &Args) -> Self {
        if args.quick {
            return Self {
                endpoints: args.endpoints.min(1000),
                pods: args.pods.min(3000),
                rounds: 2,
                changes: 60,
                bursts: 2,
                starts: 2,
                rest: 5,
                terminated: 1,
                killed: 1,
            };
        }
        Self {
            endpoints: args.endpoints,
            pods: args.pods,
            rounds: 40,
            changes: 100,
            bursts: 7,
            starts: 5,
            rest: 30,
            terminated: 5,
            killed: 3,
        }
    }
}

fn main() -> ExitCode {
    // Both clients find it here; ring is the only one that is built in.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let result = if arguments.first().is_some_and(|name| name == floor::NAME) {
        floor::run(floor::Args::parse_from(arguments))
    } else {
        measure(&Args::parse())
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// As the operator's: one thread.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

fn measure(args: &Args) -> Result<()> {
    let parts = if args.parts.is_empty() {
        Part::value_variants()
    } else {
        &args.parts
    };
    let sizes = Sizes::of(args);
    let mut report = Report::new(Machine::new(args.quick)?)?;
    // Always in the same order: the later parts fill the API server.
    let mut world: Option<World> = None;
    for part in Part::value_variants() {
        if !parts.contains(part) {
            continue;
        }
        let name = part
            .to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default();
        eprintln!("bench: {name}");
        if *part == Part::Binary {
            let (rows, measured) = binary()?;
            report.add(&name, rows, &measured)?;
            continue;
        }
        if *part == Part::Discovery {
            let (rows, measured) = discovery::measure(&sizes)?;
            report.add(&name, rows, &measured)?;
            continue;
        }
        let world = match &mut world {
            Some(world) => world,
            none => none.insert(World::new(Etcd::builder("registry").start()?)?),
        };
        let (rows, measured) = match part {
            Part::Propagation => propagation::measure(world, &sizes),
            Part::Burst => burst::measure(world, &sizes),
            Part::Start => start::measure(world, &sizes),
            Part::Rest => rest::measure(world, &sizes),
            Part::Failover => failover::measure(world, &sizes),
            Part::Memory => memory::measure(world, &sizes),
            Part::Discovery => discovery::measure(&sizes),
            Part::Binary => binary(),
        }?;
        report.add(&name, rows, &measured)?;
    }
    print!("{}", report.text());
    if let Some(file) = &args.markdown {
        report.write_markdown(file)?;
    }
    Ok(())
}

/// What a part gives: rows of the table, and all that was measured.
pub(crate) type Measured = Result<(Vec<Row>, serde_json::Value)>;

fn binary() -> Measured {
    let size = std::fs::metadata(testbed::operator_binary()?)?.len();
    let row = Row::new("size of the binary", format!("{:.1} MB", size as f64 / 1e6))
        .target("below 20 MB", size < 20_000_000);
    Ok((vec![row], json!({"bytes": size})))
}
