//! The command `register`: a process of a virtual machine --> a record of the registry, for as long as the process is well.
//!
//! Takes the flags, starts the process if there is one, looks whether it is well, and registers it with the library. Must never
//! leave a record behind a process that ended while etcd can be reached, nor hold up the end of one because it can't.

mod check;

use std::ffi::OsString;
use std::future::pending;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::cli::{EtcdArgs, RecordArgs, cluster_name, duration, entry};
use crate::format::Format;
use crate::format::template::{self, Template};
use crate::registration::{Instance, Registrar, Registration, State};

use check::{Check, Health};

/// How long the end of the process may be held up because etcd does not answer: then the record goes with its lease.
const CLOSE: Duration = Duration::from_secs(3);

/// The exit codes of a shell for a command that is not found, or can't be run.
const NOT_FOUND: u8 = 127;
const NOT_RUN: u8 = 126;

/// To this a shell adds the number of the signal that ended a process.
const BY_SIGNAL: i32 = 128;

/// `etcd-registrar register`.
#[derive(Debug, Args)]
pub struct RegisterArgs {
    /// The name of the service.
    #[arg(long, env = "ETCD_REGISTRAR_SERVICE", value_name = "NAME")]
    pub service: String,
    /// The address at which others reach the process, for example 10.0.0.5:8080 or [fd00::3]:8080.
    #[arg(long, env = "ETCD_REGISTRAR_ADDRESS", value_name = "IP:PORT")]
    pub address: SocketAddr,
    /// The namespace of the service.
    #[arg(
        short,
        long,
        env = "ETCD_REGISTRAR_NAMESPACE",
        default_value = "default",
        value_name = "NAME"
    )]
    pub namespace: String,
    /// The name under which processes outside Kubernetes register; no Kubernetes cluster may have it.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_CLUSTER",
        default_value = "vm",
        value_parser = cluster_name,
        value_name = "NAME"
    )]
    pub cluster: String,
    /// The name of the process, which stands where a pod's name does [default: made from the address].
    #[arg(long, env = "ETCD_REGISTRAR_NAME", value_name = "NAME")]
    pub name: Option<String>,
    /// The name of the port.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_PORT_NAME",
        default_value = "main",
        value_name = "NAME"
    )]
    pub port_name: String,
    /// The scheme of the port, for formats that write URLs [default: that of --check, where it is a URL].
    #[arg(long, env = "ETCD_REGISTRAR_SCHEME", value_name = "SCHEME")]
    pub scheme: Option<String>,
    /// The zone.
    #[arg(long, env = "ETCD_REGISTRAR_ZONE", value_name = "NAME")]
    pub zone: Option<String>,
    /// The weight.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_WEIGHT",
        default_value = "100",
        value_name = "NUMBER"
    )]
    pub weight: u32,
    /// Entries of the metadata.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_METADATA",
        value_delimiter = ',',
        value_parser = entry,
        value_name = "NAME=VALUE,..."
    )]
    pub metadata: Vec<(String, String)>,
    /// How the record is written.
    #[command(flatten)]
    pub records: RecordArgs,
    /// The template of the key, for --format Template, for example 'web/{{ addr }}'.
    #[arg(long, env = "ETCD_REGISTRAR_TEMPLATE_KEY", value_name = "TEMPLATE")]
    pub template_key: Option<String>,
    /// The template of the value.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_TEMPLATE_VALUE",
        default_value = "{{ addr }}",
        value_name = "TEMPLATE"
    )]
    pub template_value: String,
    /// The TTL of the lease: so long after a crash of this program the record goes. From 5s to 24h.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_TTL",
        default_value = "15s",
        value_parser = duration,
        value_name = "DURATION"
    )]
    pub ttl: Duration,
    /// What has to succeed for the process to be registered: `tcp` connects to the address, `http` and `https` ask it for /, a
    /// URL is asked for as it is. A status from 200 to 399 is a success; certificates are not looked at, as by Kubernetes.
    #[arg(long, env = "ETCD_REGISTRAR_CHECK", value_name = "tcp|http|https|URL")]
    pub check: Option<String>,
    /// How often it is checked.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_CHECK_INTERVAL",
        default_value = "2s",
        value_parser = duration,
        value_name = "DURATION"
    )]
    pub check_interval: Duration,
    /// How long a check may take.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_CHECK_TIMEOUT",
        default_value = "1s",
        value_parser = duration,
        value_name = "DURATION"
    )]
    pub check_timeout: Duration,
    /// How many checks have to fail in a row for the process to be taken out.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_CHECK_FAILURES",
        default_value = "1",
        value_parser = clap::value_parser!(u32).range(1..),
        value_name = "NUMBER"
    )]
    pub check_failures: u32,
    /// How long the process goes on after it was taken out and before the signal is passed on, so that readers have left it.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_DRAIN",
        default_value = "0",
        value_parser = duration,
        value_name = "DURATION"
    )]
    pub drain: Duration,
    /// Where etcd is.
    #[command(flatten)]
    pub etcd: EtcdArgs,
    /// The program to run, and its arguments.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

impl RegisterArgs {
    fn instance(&self, check: Option<&Check>) -> Result<Instance, String> {
        let said = |error: crate::registration::InstanceError| error.to_string();
        let format = match (&self.records.format, &self.template_key) {
            (Format::Template(_), None) => {
                return Err("--format Template needs --template-key".to_owned());
            }
            (Format::Template(_), Some(key)) => {
                let source = template::Source {
                    key: key.clone(),
                    value: self.template_value.clone(),
                    json: false,
                    ttl: i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX),
                    labels: Vec::new(),
                    annotations: Vec::new(),
                };
                Format::Template(Some(Template::new(source)?))
            }
            (_, Some(_)) => return Err("--template-key is for --format Template".to_owned()),
            (format, None) => format.clone(),
        };
        let prefix = self.records.prefix();
        let mut made = Instance::new(&self.cluster, &self.namespace, &self.service, self.address)
            .and_then(|made| made.format(format, prefix))
            .and_then(|made| made.port_name(&self.port_name))
            .and_then(|made| made.weight(self.weight))
            .map_err(said)?;
        if let Some(name) = &self.name {
            made = made.name(name).map_err(said)?;
        }
        if let Some(scheme) = self.scheme.as_deref().or(check.and_then(Check::scheme)) {
            made = made.scheme(scheme).map_err(said)?;
        }
        if let Some(zone) = &self.zone {
            made = made.zone(zone);
        }
        for (name, value) in &self.metadata {
            made = made.metadata(name, value);
        }
        Ok(made)
    }
}

/// Runs until the process ends, or until SIGTERM.
///
/// # Errors
///
/// Flags that can't work.
pub async fn run(args: &RegisterArgs) -> Result<ExitCode, String> {
    let check = match &args.check {
        None => None,
        Some(text) => Some(Check::parse(text, args.address)?),
    };
    let instance = args.instance(check.as_ref())?;
    if args.check_interval.is_zero() || args.check_timeout.is_zero() {
        return Err("--check-interval and --check-timeout have to be more than 0".to_owned());
    }
    let registrar = Registrar::connect(args.etcd.settings())
        .await
        .map_err(|error| error.to_string())?;
    // What can't be registered is said before anything is started.
    let keys = instance.keys().map_err(|error| error.to_string())?;
    let at_once = check.is_none().then(|| instance.clone());
    let registration = registrar
        .register(args.ttl, at_once)
        .map_err(|error| error.to_string())?;
    let failed = |error| format!("can't listen to signals: {error}");
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut child = match start(&args.command) {
        Ok(child) => child,
        Err((code, why)) => {
            say(&why);
            close(&registration).await;
            return Ok(ExitCode::from(code));
        }
    };
    let (sender, mut health) = watch::channel(Health::Unknown);
    if let Some(check) = check {
        tokio::spawn(check::run(
            check,
            args.check_interval,
            args.check_timeout,
            args.check_failures,
            sender,
        ));
    }
    let mut state = State::Waiting(None);
    let mut wanted = args.check.is_none();
    let asked = loop {
        tokio::select! {
            status = ended(&mut child) => {
                let status = status?;
                say(&format!("the process ended ({status}): taking it out"));
                close(&registration).await;
                return Ok(code_of(status));
            }
            _ = terminate.recv() => break Signal::SIGTERM,
            _ = interrupt.recv() => break Signal::SIGINT,
            Ok(()) = health.changed() => {
                let well = health.borrow_and_update().clone();
                let updated = match well {
                    Health::Unknown => continue,
                    Health::Well => {
                        wanted = true;
                        registration.update([instance.clone()])
                    }
                    Health::Ill(why) => {
                        say(&format!("the check fails: {why}"));
                        wanted = false;
                        registration.update([])
                    }
                };
                updated.map_err(|error| error.to_string())?;
            }
            new = registration.state_other_than(&state) => {
                tell(&new, wanted, &keys);
                state = new;
            }
        }
    };
    say("asked to end: taking it out");
    let done = close(&registration).await;
    let Some(process) = &mut child else {
        return Ok(if done {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    };
    // Who asks again wants it now.
    tokio::select! {
        () = tokio::time::sleep(args.drain) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = process.wait() => {}
    }
    pass_on(process, asked);
    let status = loop {
        tokio::select! {
            status = process.wait() => break status,
            _ = terminate.recv() => pass_on(process, Signal::SIGTERM),
            _ = interrupt.recv() => pass_on(process, Signal::SIGINT),
        }
    };
    let status = status.map_err(|error| format!("can't wait for the process: {error}"))?;
    Ok(code_of(status))
}

/// Starts the program, where one is named.
fn start(command: &[OsString]) -> Result<Option<Child>, (u8, String)> {
    let Some((program, args)) = command.split_first() else {
        return Ok(None);
    };
    let mut command = Command::new(program);
    // In a group of its own a Ctrl-C of the terminal reaches it only after it was taken out. The terminal's input
    // would stop such a process.
    command.args(args).process_group(0);
    if std::io::stdin().is_terminal() {
        command.stdin(Stdio::null());
    }
    command.spawn().map(Some).map_err(|error| {
        let code = match error.kind() {
            std::io::ErrorKind::NotFound => NOT_FOUND,
            _ => NOT_RUN,
        };
        let program = program.to_string_lossy();
        (code, format!("can't run {program}: {error}"))
    })
}

async fn ended(child: &mut Option<Child>) -> Result<ExitStatus, String> {
    match child {
        Some(child) => child
            .wait()
            .await
            .map_err(|error| format!("can't wait for the process: {error}")),
        None => pending().await,
    }
}

/// Passes a signal on to a process that was not waited for yet.
fn pass_on(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // It may have ended just now.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// As a shell has it.
fn code_of(status: ExitStatus) -> ExitCode {
    let code = status
        .code()
        .or_else(|| Some(BY_SIGNAL + status.signal()?))
        .unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

/// Takes the record out; whether etcd did it.
async fn close(registration: &Registration) -> bool {
    let why = match timeout(CLOSE, registration.close()).await {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!(
            "the record could not be removed within {} s, and goes when its lease ends",
            CLOSE.as_secs()
        ),
    };
    say(&why);
    false
}

fn tell(state: &State, wanted: bool, keys: &[String]) {
    match state {
        State::Registered if wanted => say(&format!("registered: {}", keys.join(" "))),
        State::Registered => say("not registered"),
        State::Conflict { key, owner } => say(&format!(
            "{key} belongs to someone else ({owner}): it is left alone, and taken when it is free"
        )),
        State::Refused(why) => say(&format!("etcd refuses: {why}")),
        State::Waiting(Some(why)) => say(&format!("waiting for etcd: {why}")),
        State::Waiting(None) | State::Closed => {}
    }
}

fn say(text: &str) {
    eprintln!("etcd-registrar: {text}");
}
