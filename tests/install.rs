//! The commands of docs/install.md are run as they stand there, with an etcd of their own and a real API server, and an
//! operator gets along with the certificates and users that they made.
//!
//! `tests/kind/` runs those of a first try.

#![allow(
    clippy::unwrap_used,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use testbed::{Cluster, Operator, Process, eventually, free_port, tools};

/// For what is quick when the machine is not busy.
const SOON: Duration = Duration::from_secs(60);

/// Those that tests/kind/ follows.
const ON_KIND: [&str; 2] = ["The image", "On kind in five minutes"];
/// The first that is followed here.
const TLS: &str = "TLS and users of etcd";
/// The others, in an order in which each finds what it needs.
const THEN: [&str; 5] = [
    "With Helm",
    "Some namespaces only",
    "Upgrading",
    "Uninstalling",
    "With kustomize",
];

/// The sections that have commands, which are in indented blocks.
fn sections() -> BTreeMap<String, Vec<String>> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/install.md");
    let text = std::fs::read_to_string(page).unwrap();
    let mut found = BTreeMap::new();
    for section in text.split("\n## ").skip(1) {
        let (heading, rest) = section.split_once('\n').unwrap();
        let blocks: Vec<String> = rest
            .split("\n\n")
            .map(|paragraph| paragraph.trim_start_matches('\n'))
            .filter(|paragraph| paragraph.starts_with("    "))
            .map(str::to_owned)
            .collect();
        if !blocks.is_empty() {
            found.insert(heading.to_owned(), blocks);
        }
    }
    found
}

/// Runs commands in a folder, and gives what they said.
struct Shell {
    folder: PathBuf,
    path: String,
    kubeconfig: PathBuf,
    /// Takes the place of 2379, which may be another etcd's.
    port: u16,
}

impl Shell {
    fn text(&self, commands: &str) -> String {
        commands.replace("2379", &self.port.to_string())
    }

    fn run(&self, commands: &str) -> Result<String, String> {
        let output = Command::new("bash")
            .args(["-euc", &self.text(commands)])
            .current_dir(&self.folder)
            .env("PATH", &self.path)
            .env("KUBECONFIG", &self.kubeconfig)
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        if output.status.success() {
            Ok(said)
        } else {
            Err(format!("{commands}\n{}: {said}", output.status))
        }
    }

    /// etcdctl as whom a certificate names.
    fn etcdctl(&self, name: &str, args: &str) -> Result<String, String> {
        self.run(&format!(
            "etcdctl --endpoints=https://localhost:2379 --cacert=ca.crt --cert={name}.crt --key={name}.key {args}"
        ))
    }

    /// Runs the command that starts a member of etcd, and waits until it answers.
    fn start_etcd(&mut self, command: &str) -> testbed::Result<Process> {
        // Another process may take a port before etcd does.
        let mut left = 3;
        loop {
            left -= 1;
            self.port = free_port()?;
            match self.try_start_etcd(command) {
                Err(error) if left > 0 && error.is_port_taken() => {}
                result => return result,
            }
        }
    }

    fn try_start_etcd(&self, command: &str) -> testbed::Result<Process> {
        let peers = format!("http://127.0.0.1:{}", free_port()?);
        let command = self.text(command);
        let script = format!("cd {}; exec {}", self.folder.display(), command.trim());
        let process = Process::new("etcd", "bash", self.folder.join("etcd.log"))
            .args(["-euc", &script])
            .env("PATH", &self.path)
            .env("ETCD_UNSAFE_NO_FSYNC", "true")
            .env("ETCD_LISTEN_PEER_URLS", &peers)
            .env("ETCD_INITIAL_ADVERTISE_PEER_URLS", &peers)
            .env("ETCD_INITIAL_CLUSTER", format!("default={peers}"));
        process.start()?;
        process.wait_ready_for(SOON, || self.etcdctl("root", "endpoint health").map(drop))?;
        Ok(process)
    }
}

#[test]
fn the_commands_of_the_page_work() {
    let mut sections = sections();
    for heading in ON_KIND {
        assert!(sections.remove(heading).is_some(), "{heading}");
    }
    let found = sections.remove(TLS).unwrap();
    let [certificates, member, users, cluster_side] = found.as_slice() else {
        panic!("{found:#?}");
    };
    let cluster = Cluster::builder("install").start().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for name in ["examples", "deploy", "crds"] {
        let there = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        symlink(there, folder.path().join(name)).unwrap();
    }
    let programs = ["etcd", "kubectl", "helm"].map(|name| tools::path(name).unwrap());
    let mut path: Vec<String> = programs
        .iter()
        .map(|program| program.parent().unwrap().display().to_string())
        .collect();
    path.push(std::env::var("PATH").unwrap());
    let mut shell = Shell {
        folder: folder.path().to_owned(),
        path: path.join(":"),
        kubeconfig: cluster.kubeconfig().to_owned(),
        port: 0,
    };
    shell.run(certificates).unwrap();
    let _etcd = shell.start_etcd(member).unwrap();
    shell.run(users).unwrap();
    shell.run(cluster_side).unwrap();
    cluster
        .wait_rollout("etcd-registrar", "deploy/etcd-registrar")
        .unwrap();

    // The pods there are played. A real operator has what is in the Secrets for its files.
    let secret = |name: &str, key: &str| {
        let template = format!("go-template={{{{index .data \"{key}\" | base64decode}}}}");
        let args = [
            "get",
            "secret",
            name,
            "-n",
            "etcd-registrar",
            "-o",
            &template,
        ];
        let file = folder.path().join(format!("{name}-{key}"));
        std::fs::write(&file, cluster.kubectl(&args).unwrap()).unwrap();
        file.display().to_string()
    };
    let operator = Operator::builder(env!("CARGO_BIN_EXE_etcd-registrar"), "east")
        .kubeconfig(cluster.kubeconfig())
        .args([
            format!("--etcd-endpoints=https://localhost:{}", shell.port),
            format!("--etcd-cacert={}", secret("etcd-client", "ca.crt")),
            format!("--etcd-cert={}", secret("etcd-client", "tls.crt")),
            format!("--etcd-key={}", secret("etcd-client", "tls.key")),
            "--etcd-user=registrar-east".to_owned(),
            format!(
                "--etcd-password-file={}",
                secret("etcd-password", "password")
            ),
        ])
        .start()
        .unwrap();
    eventually(SOON, "a leader", || {
        let keys = shell.etcdctl("root", "get --prefix /registrar/east/ --keys-only")?;
        match keys.contains("/registrar/east/leader") {
            true => Ok(()),
            false => Err(format!("{keys}: {}", operator.log())),
        }
    })
    .unwrap();

    // Nobody else gets in, and the operator's user no further.
    let plain = "etcdctl --endpoints=https://localhost:2379 --cacert=ca.crt get /services/";
    assert!(shell.run(plain).is_err());
    let refused = shell
        .etcdctl("registrar-east", "put /elsewhere x")
        .unwrap_err();
    assert!(refused.contains("permission denied"), "{refused}");

    // The other sections, with what they take for granted.
    operator.stop().unwrap();
    let least = folder.path().join("deploy/chart/examples/minimal.yaml");
    std::fs::copy(least, folder.path().join("my.yaml")).unwrap();
    for name in ["shop", "stock"] {
        cluster.kubectl(&["create", "namespace", name]).unwrap();
    }
    for heading in THEN {
        for block in sections.remove(heading).unwrap() {
            shell
                .run(&block)
                .unwrap_or_else(|said| panic!("{heading}: {said}"));
        }
    }
    assert!(sections.is_empty(), "nothing runs {sections:#?}");
    cluster
        .wait_rollout("etcd-registrar", "deploy/etcd-registrar")
        .unwrap();
}
