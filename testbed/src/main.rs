//! `testbed tools`, `testbed old-kubernetes` and `testbed programs` build binaries; `testbed up` starts control planes and an etcd to play with.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use testbed::{Cluster, Error, Etcd, Result, tools};

const USAGE: &str = "\
usage: testbed tools                                   build the binaries, print their folder
       testbed old-kubernetes                          build an older control plane, print its folder
       testbed programs FOLDER...                      build the programs of Go modules, print their paths
       testbed up [--clusters N] [--etcd-members 1|3]  start control planes and an etcd, until Ctrl-C";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args.as_slice() {
        ["tools"] => tools::built().map(|folders| {
            for folder in folders {
                println!("{}", folder.display());
            }
        }),
        ["old-kubernetes"] => {
            tools::old_kubernetes().map(|folder| println!("{}", folder.display()))
        }
        ["programs", folders @ ..] => folders.iter().try_for_each(|folder| {
            let program = tools::program(Path::new(folder))?;
            println!("{}", program.display());
            Ok(())
        }),
        ["up", rest @ ..] => up(rest),
        ["help" | "-h" | "--help"] => {
            println!("{USAGE}");
            Ok(())
        }
        _ => Err(Error::new("testbed", format!("unknown arguments\n{USAGE}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn number(value: &str) -> Result<usize> {
    value
        .parse()
        .map_err(|_| Error::new("testbed", format!("{value:?} is not a number\n{USAGE}")))
}

fn up(args: &[&str]) -> Result<()> {
    let (mut clusters, mut members) = (1, 1);
    let mut rest = args;
    loop {
        match rest {
            ["--clusters", value, more @ ..] => (clusters, rest) = (number(value)?, more),
            ["--etcd-members", value, more @ ..] => (members, rest) = (number(value)?, more),
            [] => break,
            _ => return Err(Error::new("testbed", format!("unknown arguments\n{USAGE}"))),
        }
    }
    // Blocked in every thread from here on, and taken by `wait`, so that Ctrl-C ends this in order.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals
        .thread_block()
        .map_err(|error| Error::new("testbed", error))?;
    static STOPPING: AtomicBool = AtomicBool::new(false);
    std::thread::spawn(move || {
        let _ = signals.wait();
        STOPPING.store(true, Ordering::Relaxed);
    });

    tools::path("kubectl")?;
    let (etcd, planes) = std::thread::scope(|scope| {
        let etcd = scope.spawn(|| Etcd::builder("registry").members(members).start());
        let planes: Vec<_> = (1..=clusters)
            .map(|index| {
                scope.spawn(move || {
                    Cluster::builder(format!("cluster{index}"))
                        .dual_stack()
                        .start()
                })
            })
            .collect();
        let planes: Result<Vec<_>> = planes
            .into_iter()
            .map(|thread| joined(thread.join()))
            .collect();
        Ok::<_, Error>((joined(etcd.join())?, planes?))
    })?;
    for plane in &planes {
        println!(
            "{}:\n  export KUBECONFIG={}\n  {} get nodes",
            plane.name(),
            plane.kubeconfig().display(),
            tools::path("kubectl")?.display()
        );
    }
    println!(
        "etcd:\n  {} --endpoints={} get --prefix /",
        tools::path("etcdctl")?.display(),
        etcd.endpoints_arg()
    );
    println!("Ctrl-C ends it.");
    while !STOPPING.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn joined<T>(result: std::thread::Result<Result<T>>) -> Result<T> {
    result.unwrap_or_else(|_| Err(Error::new("testbed", "a thread panicked")))
}
