//! The only place that spawns tasks and wires them, and that ends them in order.
//!
//! Takes the command, gives an exit code: 0 when all is done, 1 when trying again can't help. Must never
//! decide anything about records: that is the engine's.

use std::collections::{BTreeSet, VecDeque};
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tracing_subscriber::EnvFilter;

use crate::accept::policy::Policy;
use crate::admin::metrics::{Metrics, Outcome};
use crate::admin::{self, Health};
use crate::api::crd_yaml;
use crate::cli::{Cli, Command, LogFormat, PurgeArgs, RunArgs};
use crate::commands::{
    self, completions, counted, diff, discover, doctor, read_policy, register, tree,
};
use crate::engine::io::{Effect, Input, Now, Resource};
use crate::engine::{Engine, Numbers, Settings};
use crate::kube::client::KubeClient;
use crate::kube::events::{Announcement, Announcer};
use crate::kube::status::{Patch, StatusQueue};
use crate::kube::watch::{Relists, Sink, Watching};
use crate::kube::{Heard, events, merge, probe, status, watch as kube_watch};
use crate::registry::connection::{Connection, State};
use crate::registry::requests::{DEADLINE, Requests};
use crate::registry::{keeper, mirror, purge};
use crate::version::{COMMIT, VERSION};

/// Inputs that may wait for the engine: a watch of Kubernetes is slowed down beyond that, and the
/// memory stays bounded.
const INPUTS: usize = 4096;
/// Inputs taken at a time, so that ticks and effects get their turn.
const AT_ONCE: usize = 256;
/// Commands that may wait for a task around the engine; what is more waits in the engine's task.
const COMMANDS: usize = 64;
/// The engine's sense of time: "at least every 100 ms".
const TICK: Duration = Duration::from_millis(50);
/// Ticks between two looks at the numbers.
const TICKS_A_SECOND: u32 = 20;
/// How often the policy file is looked at: a mounted ConfigMap takes up to a minute itself.
const POLICY_PERIOD: Duration = Duration::from_secs(2);
/// After how long what is still wrong is said again.
const SAY_AGAIN: Duration = Duration::from_secs(30);
/// How long `purge` waits for etcd.
const PURGE_CONNECT: Duration = Duration::from_secs(10);

/// Runs a command to its end.
#[must_use]
pub fn run(cli: Cli) -> ExitCode {
    // Both clients find it here; ring is the only one that is built in.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let done = |()| ExitCode::SUCCESS;
    let result = match cli.command {
        Command::Run(args) => operate(&args).map(done),
        Command::Crd => crd_yaml()
            .map(|yaml| print!("{yaml}"))
            .map(done)
            .map_err(|error| error.to_string()),
        Command::Purge(args) => remove(&args).map(done),
        Command::Discover(args) => command(discover::run(&args)),
        Command::Register(args) => command(register::run(&args)),
        Command::Diff(args) => command(diff::run(&args)),
        Command::Doctor(args) => command(doctor::run(&args)),
        Command::Tree(args) => command(tree::run(&args)),
        Command::Completions { shell } => print_bytes(&completions::script(shell)),
        Command::Man {
            man_folder: Some(folder),
            ..
        } => completions::write_pages(&folder).map(done),
        Command::Man { command, .. } => {
            completions::page(command.as_deref()).and_then(|page| print_bytes(&page))
        }
    };
    match result {
        Ok(code) => code,
        Err(message) => {
            eprintln!("etcd-registrar: {message}");
            ExitCode::FAILURE
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    // One thread: what the engine hands over is carried on at once, without waking another core.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("can't start: {error}"))
}

/// A command that says what it has to say on standard error.
fn command(run: impl Future<Output = Result<ExitCode, String>>) -> Result<ExitCode, String> {
    commands::start_log()?;
    runtime()?.block_on(run)
}

fn print_bytes(text: &[u8]) -> Result<ExitCode, String> {
    commands::print(&String::from_utf8_lossy(text))?;
    Ok(ExitCode::SUCCESS)
}

fn start_log(args: &RunArgs) -> Result<(), String> {
    // kube logs every failed connection as an error, beside our own message about it.
    let directives = format!("{},kube_client::client::builder=off", args.log_level);
    let filter = EnvFilter::builder().parse(directives).map_err(|error| {
        format!(
            "--log-level {:?}: {error}; write error, warn, info, debug or trace",
            args.log_level
        )
    })?;
    // `kubectl logs` and log collectors would show the escape sequences.
    let colours = std::io::stderr().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let started = match args.log_format {
        LogFormat::Text => builder.with_target(false).with_ansi(colours).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| format!("can't start the log: {error}"))
}

// === run ===

fn operate(args: &RunArgs) -> Result<(), String> {
    start_log(args)?;
    let policy = read_policy(args.policy_file.as_deref())?;
    runtime()?.block_on(operate_in(args, policy))
}

async fn operate_in(args: &RunArgs, policy: Policy) -> Result<(), String> {
    let client = KubeClient::new(args.kube.options())
        .await
        .map_err(|error| error.to_string())?;
    let connection = Connection::connect(args.etcd.settings())
        .await
        .map_err(|error| error.to_string())?;
    let listener = admin::listen(args.listen)
        .await
        .map_err(|error| error.to_string())?;
    tracing::info!(
        cluster = args.name.cluster_name,
        endpoints = args.etcd.etcd_endpoints.join(","),
        listen = %args.listen,
        version = VERSION,
        commit = COMMIT,
        "starting"
    );
    let (metrics, registry) = Metrics::new();
    let health = Health::new();
    let (inputs, received) = mpsc::channel(INPUTS);
    let tasks = Tasks::start(args, &client, connection, &metrics, inputs.clone())?;
    tokio::spawn(tell_connection(tasks.connection.clone()));
    if let Some(path) = &args.policy_file {
        tokio::spawn(follow_policy(path.clone(), policy.clone(), inputs.clone()));
    }
    let mut served = tokio::spawn(admin::serve(listener, health.clone(), registry));
    tokio::spawn(listen_to_signals(inputs)?);
    let settings = Settings {
        cluster_name: args.name.cluster_name.clone(),
        registrar_prefix: args.name.registrar_prefix.clone(),
        election_ttl: i64::try_from(args.election_ttl.as_secs()).unwrap_or(5),
        max_staleness: u64::try_from(args.max_staleness.as_micros()).unwrap_or(u64::MAX),
        namespaces: args.namespaces(),
        seed: rand::random(),
    };
    let engine = Engine::new(settings, policy);
    tokio::select! {
        result = drive(engine, received, tasks, &metrics, &health) => result,
        ended = &mut served => Err(match ended {
            Ok(Err(error)) => error.to_string(),
            _ => "the server of health and metrics ended".to_owned(),
        }),
    }
}

/// SIGTERM and Ctrl-C hand over.
fn listen_to_signals(inputs: mpsc::Sender<Input>) -> Result<impl Future<Output = ()>, String> {
    let failed = |error| format!("can't listen to signals: {error}");
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("asked to end: handing over");
        let _ = inputs.send(Input::Shutdown).await;
    })
}

/// The tasks around the engine, and the ways to them.
struct Tasks {
    connection: Connection,
    requests: Requests,
    mirror: Outbox<mirror::Command>,
    keeper: Outbox<keeper::Command>,
    keeper_ready: watch::Receiver<bool>,
    relists: Relists,
    statuses: StatusQueue,
    announcer: Announcer,
}

impl Tasks {
    fn start(
        args: &RunArgs,
        client: &KubeClient,
        connection: Connection,
        metrics: &Metrics,
        inputs: mpsc::Sender<Input>,
    ) -> Result<Self, String> {
        let heard = Heard::new();
        let relists = Relists::new();
        let watching = Watching {
            client: client.clone(),
            sink: Sink::Engine(inputs.clone()),
            heard: heard.clone(),
            metrics: metrics.clone(),
        };
        watch_kubernetes(&args.namespaces(), &watching, &inputs, &relists);
        let identity = if args.namespace.is_empty() {
            probe::EVERYWHERE.into()
        } else {
            // A Role can grant no namespace but its own.
            client.current().default_namespace().into()
        };
        tokio::spawn(probe::run(client.clone(), identity, inputs.clone(), heard));
        let statuses = StatusQueue::new();
        tokio::spawn(status::run(
            client.clone(),
            statuses.clone(),
            metrics.clone(),
        ));
        let (announcer, announcements) = Announcer::new(metrics.clone());
        let instance = std::env::var("HOSTNAME").unwrap_or_else(|_| "etcd-registrar".into());
        tokio::spawn(events::run(
            client.clone(),
            announcements,
            instance,
            metrics.clone(),
        ));
        let (mirror_commands, commands) = mpsc::channel(COMMANDS);
        tokio::spawn(mirror::run(
            connection.clone(),
            commands,
            inputs.clone(),
            mirror::Pace::default(),
        ));
        let (keeper_commands, commands) = mpsc::channel(COMMANDS);
        let (ready, keeper_ready) = watch::channel(false);
        start_keeper(args, commands, inputs.clone(), ready)?;
        Ok(Self {
            requests: Requests::new(connection.clone(), DEADLINE, inputs),
            connection,
            mirror: Outbox::new(mirror_commands),
            keeper: Outbox::new(keeper_commands),
            keeper_ready,
            relists,
            statuses,
            announcer,
        })
    }
}

/// Watches all namespaces, or these alone, and then no Nodes: a Role can't grant them.
fn watch_kubernetes(
    namespaces: &BTreeSet<String>,
    watching: &Watching,
    inputs: &mpsc::Sender<Input>,
    relists: &Relists,
) {
    let alone = |resource, namespace| {
        let orders = relists.subscribe(resource);
        tokio::spawn(kube_watch::run(
            resource,
            namespace,
            watching.clone(),
            orders,
        ));
    };
    let several: Vec<Arc<str>> = namespaces.iter().map(|name| name.as_str().into()).collect();
    match several.as_slice() {
        [] => {
            for resource in [Resource::Pods, Resource::Nodes, Resource::Registrations] {
                alone(resource, None);
            }
            return;
        }
        [only] => {
            for resource in [Resource::Pods, Resource::Registrations] {
                alone(resource, Some(Arc::clone(only)));
            }
        }
        _ => {
            for resource in [Resource::Pods, Resource::Registrations] {
                tokio::spawn(merge::run(
                    resource,
                    several.clone(),
                    watching.clone(),
                    inputs.clone(),
                    relists.subscribe(resource),
                ));
            }
        }
    }
    tracing::info!(
        namespaces = several.join(","),
        "only these namespaces are watched, and no Nodes: pods without the label topology.kubernetes.io/zone have no zone"
    );
}

/// The keeper has a thread and a connection of its own: whatever keeps the others busy, leases are
/// kept alive in time.
fn start_keeper(
    args: &RunArgs,
    commands: mpsc::Receiver<keeper::Command>,
    inputs: mpsc::Sender<Input>,
    ready: watch::Sender<bool>,
) -> Result<(), String> {
    let runtime = runtime()?;
    let settings = args.etcd.settings();
    let names = keeper::Names::new(
        &args.name.registrar_prefix,
        &args.name.cluster_name,
        args.namespaces(),
    );
    std::thread::Builder::new()
        .name("keeper".into())
        .spawn(move || {
            runtime.block_on(async move {
                match Connection::connect(settings).await {
                    Ok(connection) => keeper::run(connection, names, commands, inputs, ready).await,
                    // The same settings were accepted a moment ago; the files changed in between.
                    Err(error) => tracing::error!(%error, "the keeper can't connect"),
                }
            });
        })
        .map(drop)
        .map_err(|error| format!("can't start the keeper: {error}"))
}

/// Commands that wait here when a task has no room: the engine must never wait for a task that may be
/// waiting for the engine.
struct Outbox<T> {
    sender: mpsc::Sender<T>,
    waiting: VecDeque<T>,
}

impl<T> Outbox<T> {
    fn new(sender: mpsc::Sender<T>) -> Self {
        Self {
            sender,
            waiting: VecDeque::new(),
        }
    }

    fn send(&mut self, command: T) {
        self.waiting.push_back(command);
        self.flush();
    }

    fn flush(&mut self) {
        while let Some(command) = self.waiting.pop_front() {
            if let Err(mpsc::error::TrySendError::Full(command)) = self.sender.try_send(command) {
                self.waiting.push_front(command);
                return;
            }
        }
    }
}

/// Feeds the engine and carries out what it wants, until it is done.
async fn drive(
    mut engine: Engine,
    mut inputs: mpsc::Receiver<Input>,
    mut tasks: Tasks,
    metrics: &Metrics,
    health: &Health,
) -> Result<(), String> {
    let start = Instant::now();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut ticks = 0u32;
    let mut before = Numbers::default();
    let mut batch: Vec<Input> = Vec::with_capacity(AT_ONCE);
    // An answer lets a lane go on: it does not wait behind events, which are many in a burst.
    let mut answers: VecDeque<Input> = VecDeque::new();
    let mut others: VecDeque<Input> = VecDeque::new();
    loop {
        let busy = !answers.is_empty() || !others.is_empty();
        tokio::select! {
            biased;
            _ = tick.tick() => {
                ticks = ticks.wrapping_add(1);
                health.beat();
                health.set_ready(not_ready(&engine, &tasks));
                if ticks.is_multiple_of(TICKS_A_SECOND) {
                    let waiting = inputs.len() + answers.len() + others.len();
                    show(engine.numbers(), &mut before, metrics, waiting);
                }
                others.push_back(Input::Tick);
            }
            taken = inputs.recv_many(&mut batch, AT_ONCE), if others.len() < AT_ONCE => {
                if taken == 0 {
                    return Err("every task around the engine has ended".into());
                }
                for input in batch.drain(..) {
                    match input {
                        Input::Answer(..) => answers.push_back(input),
                        _ => others.push_back(input),
                    }
                }
            }
            () = std::future::ready(()), if busy => {}
        }
        let Some(input) = answers.pop_front().or_else(|| others.pop_front()) else {
            continue;
        };
        if matches!(input, Input::LeaseLost(_)) {
            metrics.leases_lost.inc();
        }
        let now = Now {
            monotonic: u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX),
            unix: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(0)),
        };
        let mut asked = false;
        for effect in engine.step(input, now) {
            match effect {
                Effect::Done => {
                    tracing::info!("handed over");
                    return Ok(());
                }
                Effect::Fatal(message) => return Err(message),
                effect => {
                    asked |= matches!(effect, Effect::Ask(..));
                    carry_out(effect, &mut tasks, metrics);
                }
            }
        }
        tasks.mirror.flush();
        tasks.keeper.flush();
        if asked {
            // What was asked is sent before anything else is looked at.
            tokio::task::yield_now().await;
        }
    }
}

fn carry_out(effect: Effect, tasks: &mut Tasks, metrics: &Metrics) {
    match effect {
        Effect::Ask(number, request) => tasks.requests.ask(number, request),
        Effect::Follow(ranges) => tasks.mirror.send(mirror::Command::Follow(ranges)),
        Effect::Reread(range) => tasks.mirror.send(mirror::Command::Reread(range)),
        Effect::AskProgress => tasks.mirror.send(mirror::Command::AskProgress),
        Effect::Keep(lease, ttl) => tasks.keeper.send(keeper::Command::Keep(lease, ttl)),
        Effect::Release(lease) => tasks.keeper.send(keeper::Command::Release(lease)),
        Effect::Keeping(keeping) => tasks.keeper.send(keeper::Command::Keeping(keeping)),
        Effect::Cluster(uid) => tasks.keeper.send(keeper::Command::Cluster(uid)),
        Effect::Relist(resource, number) => tasks.relists.order(resource, number),
        Effect::PatchStatus {
            namespace,
            name,
            uid,
            status,
            ready_only,
        } => {
            tasks.statuses.submit(Patch {
                namespace,
                name,
                uid,
                status,
                ready_only,
            });
        }
        Effect::Announce {
            namespace,
            name,
            uid,
            event_type,
            reason,
            message,
        } => {
            tasks.announcer.announce(Announcement {
                namespace,
                name,
                uid,
                event_type,
                reason,
                message,
            });
        }
        Effect::Propagated(microseconds, removal) => metrics.propagated(microseconds, removal),
        Effect::Log(level, message) => match level {
            tracing::Level::ERROR => tracing::error!("{message}"),
            tracing::Level::WARN => tracing::warn!("{message}"),
            tracing::Level::INFO => tracing::info!("{message}"),
            tracing::Level::DEBUG | tracing::Level::TRACE => tracing::debug!("{message}"),
        },
        // The caller ends with them.
        Effect::Done | Effect::Fatal(_) => {}
    }
}

/// Why this replica is not ready, a line a reason.
fn not_ready(engine: &Engine, tasks: &Tasks) -> Vec<String> {
    let mut reasons = Vec::new();
    if !*tasks.keeper_ready.borrow() {
        reasons.push(
            match (&*tasks.connection.state().borrow(), engine.shut_out()) {
                (State::Down(why), _) => format!("etcd can't be reached: {why}"),
                (_, Some(why)) => why,
                _ => "the keeper has not kept every lease alive once".to_owned(),
            },
        );
    }
    reasons.extend(
        engine
            .incomplete()
            .map(|why| format!("a watch of Kubernetes is not complete: {why}")),
    );
    reasons
}

/// Sets the metrics from the engine's numbers.
fn show(numbers: &Numbers, before: &mut Numbers, metrics: &Metrics, waiting: usize) {
    let gauge = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    metrics.set_leader(numbers.leads);
    metrics.set_live(numbers.live);
    metrics.set_kubernetes_silence(Duration::from_micros(numbers.kubernetes_silence));
    metrics.registrations.set(gauge(numbers.registrations));
    metrics.endpoints_wanted.set(gauge(numbers.wanted));
    metrics.endpoints_registered.set(gauge(numbers.registered));
    metrics.records_mirrored.set(gauge(numbers.mirrored));
    metrics.leases_kept.set(gauge(numbers.leases));
    metrics.lanes_busy.set(gauge(numbers.lanes_busy));
    metrics.puts_slowed_down.set(gauge(numbers.slowed_down));
    metrics.pods_over_limit.set(gauge(numbers.over_limit));
    metrics.queue_depth.set(gauge(waiting + numbers.queued));
    metrics.puts.inc_by(numbers.puts - before.puts);
    metrics.removals.inc_by(numbers.removals - before.removals);
    metrics.endpoints_held.set(gauge(numbers.held));
    metrics
        .mass_removals
        .inc_by(numbers.mass_removals - before.mass_removals);
    metrics
        .leases_granted
        .inc_by(numbers.grants - before.grants);
    metrics
        .leases_revoked
        .inc_by(numbers.revokes - before.revokes);
    for (outcome, now, then) in [
        (
            Outcome::Succeeded,
            numbers.transactions_done,
            before.transactions_done,
        ),
        (
            Outcome::Lost,
            numbers.transactions_compared,
            before.transactions_compared,
        ),
        (
            Outcome::Refused,
            numbers.transactions_refused,
            before.transactions_refused,
        ),
        (
            Outcome::NoSpace,
            numbers.transactions_no_space,
            before.transactions_no_space,
        ),
        (
            Outcome::Unknown,
            numbers.transactions_unknown,
            before.transactions_unknown,
        ),
    ] {
        metrics.transactions(outcome, now - then);
    }
    before.clone_from(numbers);
}

/// Tells in the log when etcd is reached and lost.
async fn tell_connection(connection: Connection) {
    let mut states = connection.state();
    // It is tried again every few seconds, and mostly for the same reason.
    let mut said: Option<(Arc<str>, Instant)> = None;
    loop {
        let state = states.borrow_and_update().clone();
        match state {
            State::Connecting => {}
            State::Up(session) => {
                said = None;
                tracing::info!(endpoint = %session.endpoint, "connected to etcd");
            }
            State::Down(why) => {
                let again = said
                    .as_ref()
                    .is_some_and(|(before, at)| *before == why && at.elapsed() < SAY_AGAIN);
                if !again {
                    tracing::error!("etcd can't be reached: {why}; it is tried again");
                    said = Some((why, Instant::now()));
                }
            }
        }
        if states.changed().await.is_err() {
            return;
        }
    }
}

/// Reads the policy file again when it changes; a malformed one is reported and the old one stays.
async fn follow_policy(path: std::path::PathBuf, mut known: Policy, inputs: mpsc::Sender<Input>) {
    let mut said: Option<String> = None;
    loop {
        tokio::time::sleep(POLICY_PERIOD).await;
        match read_policy(Some(&path)) {
            Ok(policy) if policy == known => said = None,
            Ok(policy) => {
                tracing::info!(file = %path.display(), "the policy changed");
                said = None;
                known = policy.clone();
                if inputs.send(Input::Policy(Box::new(policy))).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                if said.as_ref() != Some(&error) {
                    tracing::error!("{error}; the policy from before stays in force");
                    said = Some(error);
                }
            }
        }
    }
}

// === purge ===

fn remove(args: &PurgeArgs) -> Result<(), String> {
    runtime()?.block_on(async {
        let (_connection, session) = commands::connect(args.etcd.settings(), PURGE_CONNECT).await?;
        let name = &args.name;
        let mut told = Instant::now();
        let progress = |done: usize, of: usize| {
            if done == of || told.elapsed() >= Duration::from_secs(1) {
                told = Instant::now();
                eprintln!("{} of {of} removed", counted(done, "lease"));
            }
        };
        let report = purge::purge(
            &session.client,
            &name.registrar_prefix,
            &name.cluster_name,
            args.uid.as_deref(),
            progress,
        )
        .await
        .map_err(|error| error.to_string())?;
        println!("{}", removed(&report, &name.cluster_name));
        Ok(())
    })
}

/// What `purge` did, for a person.
fn removed(report: &purge::Report, cluster: &str) -> String {
    if *report == purge::Report::default() {
        return format!("nothing stands under the name {cluster}: it was free already");
    }
    let others: Vec<&str> = report.others.iter().map(String::as_str).collect();
    let name = if others.is_empty() {
        "the name is free".to_owned()
    } else {
        format!("the name is still held by {}", others.join(", "))
    };
    format!(
        "removed {}, with all records, and {} of cluster {cluster}; {name}",
        counted(report.leases, "lease"),
        counted(report.keys, "key"),
    )
}
