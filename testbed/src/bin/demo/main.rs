//! `make demo`: two clusters, an etcd and an operator for each cluster, walked through with kubectl and etcdctl.
//!
//! Every step prints the commands that it runs and what they printed, and checks that this is what it should be. On a
//! terminal everything stays up afterwards, until Ctrl-C.

mod feed;
mod screen;
mod shell;
mod walk;

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use testbed::{Cluster, Error, Etcd, Operator, Result, eventually, operator_binary, tools};

use screen::Screen;
use shell::Shell;
use walk::Walk;

/// The exit code of a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// Whether a signal is awaited; before, it ends the demo where it stands.
static STAYING: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let screen = Screen::new();
    match signals().and_then(|signals| demo(screen, &signals)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: failed: {error}");
            testbed::keep("the demo failed");
            ExitCode::FAILURE
        }
    }
}

/// Ctrl-C and SIGTERM. They are blocked in every thread, and taken by one.
fn signals() -> Result<Receiver<()>> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals
        .thread_block()
        .map_err(|error| Error::new("demo", error))?;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        while signals.wait().is_ok() {
            if !STAYING.load(Ordering::Relaxed) || sender.send(()).is_err() {
                eprintln!("\ndemo: interrupted");
                // The children die with this process, and the temporary folder goes.
                std::process::exit(INTERRUPTED);
            }
        }
    });
    Ok(receiver)
}

fn demo(screen: Screen, signals: &Receiver<()>) -> Result<()> {
    for name in ["TESTBED_KUBECONFIG", "TESTBED_ETCD_ENDPOINTS"] {
        if std::env::var_os(name).is_some_and(|value| !value.is_empty()) {
            return Err(Error::new(
                "demo",
                format!(
                    "{name} is set, but the demo needs two clusters and an etcd of its own: unset it"
                ),
            ));
        }
    }
    let in_folder = |error| Error::new("the working folder", error);
    let binary = std::path::absolute(operator_binary()?).map_err(in_folder)?;
    // Where deploy/ and examples/ are: Cargo says which folder this was built in.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."));
    std::env::set_current_dir(folder).map_err(in_folder)?;
    let beginning = Instant::now();
    screen.heading("Two clusters and an etcd");
    screen.say(
        "Real API servers, controllers and schedulers of two clusters, east and west; kwok plays their kubelets. One etcd, which \
         is the registry. All of it on 127.0.0.1, in a temporary folder.",
    );
    println!();
    let (etcd, east, west) = planes(screen)?;
    let shell = Shell::new(screen, folder, [&east, &west], &etcd, &binary)?;
    screen.say("The commands below can be copied into another terminal after these:");
    println!();
    screen.output(&shell.exports());

    screen.heading("An operator for each cluster");
    screen.say("The manifests of deploy/ are applied to both:");
    for cluster in [&east, &west] {
        shell.run(&format!(
            "kubectl --context {} apply -k deploy/",
            cluster.name()
        ))?;
    }
    screen.say(
        "There are no containers here, so their pods can't run, and the Deployments are scaled to zero. Each operator is a process \
         instead, with a token of its ServiceAccount: it may do what deploy/rbac.yaml allows and nothing else.",
    );
    for cluster in [&east, &west] {
        shell.run(&format!(
            "kubectl --context {} --namespace etcd-registrar scale deployment etcd-registrar --replicas=0",
            cluster.name()
        ))?;
    }
    let east_operator = operator(screen, &binary, &east, &etcd)?;
    let west_operator = operator(screen, &binary, &west, &etcd)?;

    // kubectl learns of a new resource a moment after the operator does.
    for cluster in [&east, &west] {
        eventually(
            Duration::from_secs(30),
            "kubectl to know the resource",
            || shell.quietly(&format!("kubectl --context {} get sreg", cluster.name())),
        )?;
    }

    let walk = Walk {
        screen,
        shell: &shell,
        east: &east_operator,
    };
    walk.all().inspect_err(|_| {
        // What the operators said last is what one wants to read first.
        for operator in [&east_operator, &west_operator] {
            eprintln!("\n{}", operator.error("what it logged last"));
        }
    })?;
    screen.heading("Done");
    screen.say(&format!(
        "Every step showed what it should. All of it took {:.0} s.",
        beginning.elapsed().as_secs_f64()
    ));
    if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        stay(screen, &shell, &east_operator, signals);
    }
    Ok(())
}

/// Starts everything at the same time.
fn planes(screen: Screen) -> Result<(Etcd, Cluster, Cluster)> {
    // Before the threads: whatever has to be built shows its own progress.
    tools::path("kube-apiserver")?;
    let start = Instant::now();
    let tell = |what: &str| {
        screen.progress(&format!(
            "{what} ready after {:.1} s",
            start.elapsed().as_secs_f64()
        ));
    };
    screen.progress("starting");
    std::thread::scope(|scope| {
        let etcd = scope.spawn(|| {
            let etcd = Etcd::builder("registry").start()?;
            tell("etcd:");
            Ok(etcd)
        });
        let [east, west] = ["east", "west"].map(|name| {
            scope.spawn(move || {
                let cluster = Cluster::builder(name).start()?;
                tell(&format!("cluster {name}:"));
                Ok(cluster)
            })
        });
        Ok((
            joined(etcd.join())?,
            joined(east.join())?,
            joined(west.join())?,
        ))
    })
}

fn joined<T>(result: std::thread::Result<Result<T>>) -> Result<T> {
    result.unwrap_or_else(|_| Err(Error::new("demo", "a thread panicked")))
}

/// Starts the operator of a cluster, as the ServiceAccount of `deploy/`.
fn operator(screen: Screen, binary: &Path, cluster: &Cluster, etcd: &Etcd) -> Result<Operator> {
    let kubeconfig = cluster.kubeconfig_for_service_account("etcd-registrar", "etcd-registrar")?;
    let operator = Operator::builder(binary, cluster.name())
        .kubeconfig(&kubeconfig)
        .etcd(etcd)
        .args(["--policy-file", "examples/policy.yaml"])
        .spawn()?;
    // The program is on the PATH, and its arguments are easier to read one a line.
    let line = operator.process().command_line();
    let arguments = line.split_once(' ').map_or("", |(_, rest)| rest);
    screen.command(&format!(
        "etcd-registrar {}",
        arguments.replace(" --", " \\\n    --")
    ));
    operator.wait_ready()?;
    screen.seen("it is ready (/readyz)");
    Ok(operator)
}

/// Says how to go on by hand, and waits for Ctrl-C.
fn stay(screen: Screen, shell: &Shell, operator: &Operator, signals: &Receiver<()>) {
    STAYING.store(true, Ordering::Relaxed);
    screen.say("Everything stays up until Ctrl-C. To go on by hand, in another terminal:");
    println!();
    screen.output(&shell.exports());
    screen.say("and then, for example:");
    println!();
    screen.output(&format!(
        "etcdctl watch --prefix /services/\n\
         kubectl --context west scale deployment web --replicas=10\n\
         kubectl --context east annotate pods -l app=web testbed.etcd-registrar.io/ready=false\n\
         kubectl --context east get sreg,pods\n\
         etcdctl get --prefix /registrar/ --keys-only\n\
         curl http://{}/metrics",
        operator.address()
    ));
    println!();
    let _ = signals.recv();
    println!();
    screen.progress("ending");
}
