//! The README and docs/install.md, followed word for word on a kind cluster of their own: every command that they show for a
//! first try is run as it stands there.

use std::process::{Command, Stdio};
use std::time::Duration;

use testbed::{Process, eventually, tools};

use crate::world::{LONG, World, finish, lab, run, source};

/// The cluster that `kind` makes while `KIND_CLUSTER_NAME` says so.
pub(crate) const CLUSTER: &str = "first-page";

/// Which sections are followed, in this order. What the second page has in common with the first is run once.
const SECTIONS: [(&str, &str); 4] = [
    ("README.md", "Install"),
    ("README.md", "A first registration"),
    ("README.md", "Reading the result"),
    ("docs/install.md", "On kind in five minutes"),
];

/// Commands that go on until they are stopped: how they begin, what they say once they work, and what they say of a pod
/// that goes.
const GO_ON: [(&str, &str, &str); 4] = [
    ("kubectl port-forward ", "Forwarding from", ""),
    ("etcd-registrar run ", "connected to etcd", ""),
    ("etcdctl watch ", "", "DELETE"),
    ("etcd-registrar discover ", "ADDED", "REMOVED"),
];

/// What is run on another machine, with a program of one's own: tests/e2e/register.rs has it.
const ELSEWHERE: &str = "etcd-registrar register ";

/// The commands of a section: its indented blocks, with the lines put together that end in a backslash.
fn commands(page: &str, heading: &str) -> Vec<String> {
    let text = std::fs::read_to_string(source(page)).unwrap();
    let section = text.split(&format!("\n## {heading}\n")).nth(1);
    let section = section.unwrap_or_else(|| panic!("{page} has no heading {heading}"));
    let section = section.split("\n## ").next().unwrap().replace("\\\n", "");
    // Fenced blocks hold YAML and JSON.
    let plain = section.split("```").step_by(2);
    let found: Vec<String> = plain
        .flat_map(str::lines)
        .filter_map(|line| line.strip_prefix("    "))
        .map(str::to_owned)
        .collect();
    assert!(!found.is_empty(), "{page}: {heading} has no commands");
    found
}

/// All commands, each once, in the order of the pages.
fn all_commands() -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for (page, heading) in SECTIONS {
        let mut after = 0;
        for command in commands(page, heading) {
            // Who follows this page alone must have the same order.
            match all.iter().position(|known| *known == command) {
                Some(known) => {
                    assert!(known >= after, "{page}: {command} is out of order");
                    after = known;
                }
                None => all.push(command),
            }
        }
    }
    all.retain(|command| !command.starts_with(ELSEWHERE));
    all
}

/// Follows the pages.
pub(crate) fn first_page(world: &World) {
    let kubeconfig = world.folder.join(format!("{CLUSTER}.kubeconfig"));
    // The programs that the pages ask for.
    let mut path = std::env::join_paths([
        source("target/image/amd64/files"),
        lab(),
        tools::path("etcdctl").unwrap().parent().unwrap().to_owned(),
        tools::path("helm").unwrap().parent().unwrap().to_owned(),
    ])
    .unwrap();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap());
    let _ = remove();
    let mut going_on = Vec::new();
    let commands = all_commands();
    let began = std::time::Instant::now();
    for command in &commands {
        let told = GO_ON.iter().find(|(begin, ..)| command.starts_with(begin));
        let Some((_, ready, later)) = told else {
            let mut bash = Command::new("bash");
            bash.args(["-c", command])
                .current_dir(source(""))
                .stdin(Stdio::null())
                .env("PATH", &path)
                .env("KUBECONFIG", &kubeconfig)
                .env("KIND_CLUSTER_NAME", CLUSTER);
            // What `cargo test` sets would have `make image` compile much of what it needs anew.
            for (name, _) in std::env::vars_os() {
                if name.to_string_lossy().starts_with("CARGO_") && name != "CARGO_HOME" {
                    bash.env_remove(name);
                }
            }
            finish(command, &[], &mut bash).unwrap_or_else(|said| panic!("{said}"));
            continue;
        };
        let log = world
            .folder
            .join(format!("first-page-{}.log", going_on.len()));
        let process = Process::new(command.as_str(), "bash", log)
            .args(["-c", command.trim_end_matches(" &")])
            .env("PATH", &path)
            .env("KUBECONFIG", &kubeconfig);
        process.start().unwrap();
        process
            .wait_ready_for(LONG, || says(&process, ready))
            .unwrap();
        going_on.push((process, *later));
    }
    world.note(&format!(
        "{} commands in {:.0} s",
        commands.len(),
        began.elapsed().as_secs_f64()
    ));
    // Those that show changes show one.
    let kubeconfig = format!("--kubeconfig={}", kubeconfig.display());
    run(
        "kubectl",
        &[&kubeconfig, "scale", "deploy/web", "--replicas=2"],
    );
    for (process, later) in &going_on {
        eventually(Duration::from_secs(60), process.component(), || {
            says(process, later)
        })
        .unwrap();
        assert!(process.is_running(), "{}", process.error("ended"));
    }
    assert_eq!(going_on.len(), GO_ON.len(), "{commands:#?}");
    drop(going_on);
    remove().unwrap();
}

fn says(process: &Process, text: &str) -> Result<(), String> {
    let said = process.log_of_run();
    if said.contains(text) {
        Ok(())
    } else {
        Err(format!("no {text:?}: {said}"))
    }
}

/// Removes the cluster.
pub(crate) fn remove() -> Result<String, String> {
    crate::world::try_run("kind", &["delete", "cluster", "--name", CLUSTER])
}
