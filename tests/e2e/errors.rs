//! What goes wrong when an operator is set up: one clear line each, tried again where that can help, and an exit code
//! where it cannot.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testbed::{Cluster, Etcd, Operator, OperatorBuilder, Proxy, always, eventually};

use crate::support::{BINARY, SOON, Stage, Watcher, tell, without};

/// Long enough for a wrong delete, or a flood of log lines, to show.
const WHILE: Duration = Duration::from_secs(2);

/// The messages that were logged at a level since the last start, with the values of their fields.
fn lines(operator: &Operator, level: &str) -> Vec<String> {
    operator
        .log_of_run()
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["level"] == level)
        .map(|line| {
            let fields = line.as_object().unwrap().iter();
            let mut said = line["message"].as_str().unwrap_or_default().to_owned();
            for (name, value) in fields {
                if !["level", "message", "timestamp", "target"].contains(&name.as_str()) {
                    said += &format!(" {name}={value}");
                }
            }
            said
        })
        .collect()
}

/// Waits for one line that says all of this, and gives it. All other lines of that level are about the same.
fn said(operator: &Operator, level: &str, parts: &[&str]) -> String {
    eventually(SOON, &format!("{level}: {parts:?}"), || {
        lines(operator, level)
            .into_iter()
            .find(|line| parts.iter().all(|part| line.contains(part)))
            .ok_or_else(|| operator.log_of_run())
    })
    .unwrap()
}

/// What is wrong is said, and not again and again: at most `most` lines of warnings and errors.
fn quiet(operator: &Operator, most: usize) {
    always(WHILE, "few lines", || {
        let mut all = lines(operator, "ERROR");
        all.extend(lines(operator, "WARN"));
        if all.len() <= most {
            Ok(())
        } else {
            Err(format!("{all:#?}"))
        }
    })
    .unwrap();
}

/// It is alive, but not ready, and `/readyz` says why.
fn not_ready(operator: &Operator, parts: &[&str]) {
    assert_eq!(operator.get("/healthz").unwrap().status, 200);
    eventually(SOON, &format!("/readyz to say {parts:?}"), || {
        let answer = operator.get("/readyz").map_err(|error| error.to_string())?;
        if answer.status == 503 && parts.iter().all(|part| answer.body.contains(part)) {
            Ok(())
        } else {
            Err(format!("{}: {}", answer.status, answer.body))
        }
    })
    .unwrap();
}

/// Runs the program to its end.
fn run(args: &[&str]) -> Output {
    Command::new(BINARY)
        .args(args)
        // A flag that is not given must not come from the environment of the person who tests.
        .env_clear()
        .env("HOME", "/nonexistent")
        .output()
        .unwrap()
}

/// The program ends with this code and one line that says all of this.
fn ends(args: &[&str], code: i32, parts: &[&str]) {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{args:?}: no {part:?} in: {stderr}");
    }
    if code == 1 {
        let errors: Vec<_> = stderr
            .lines()
            .filter(|line| line.starts_with("etcd-registrar: "))
            .collect();
        assert_eq!(errors.len(), 1, "{args:?}: {stderr}");
    }
}

#[test]
fn what_cannot_work_ends_with_an_exit_code_and_says_what_to_write() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let kubeconfig = file(
        "kubeconfig",
        "{apiVersion: v1, kind: Config, current-context: a,
          clusters: [{name: a, cluster: {server: 'https://127.0.0.1:1'}}],
          users: [{name: a, user: {token: s3cret}}],
          contexts: [{name: a, context: {cluster: a, user: a}}]}",
    );
    let run = ["run", "--cluster-name", "east", "--kubeconfig", &kubeconfig];
    let with = |more: &[&str], code: i32, parts: &[&str]| {
        let mut args = run.to_vec();
        args.extend(more);
        ends(&args, code, parts);
    };

    // The command line.
    ends(&["run"], 2, &["--cluster-name <NAME>", "required"]);
    ends(
        &["run", "--cluster-name", "East_1"],
        2,
        &["--cluster-name", "East_1", "DNS label"],
    );
    ends(&["purge"], 2, &["--cluster-name <NAME>"]);
    with(&["--election-ttl", "1s"], 2, &["2s to 60s"]);
    with(&["--max-staleness", "soon"], 2, &["soon", "1m30s"]);
    with(&["--registrar-prefix", "registrar"], 2, &["registrar", "/"]);
    with(&["--listen", "8080"], 2, &["--listen"]);
    with(&["--etcd-password", "x"], 2, &["--etcd-password-file"]);

    // The policy file.
    let policy = folder.path().join("absent.yaml").display().to_string();
    with(
        &["--policy-file", &policy],
        1,
        &["--policy-file", "absent.yaml", "No such file"],
    );
    let policy = file(
        "policy.yaml",
        "rules:\n  - namespaces: [shop]\n    formats: [Json]\n    prefixes: [/shop]\n",
    );
    with(
        &["--policy-file", &policy],
        1,
        &[
            "--policy-file",
            "policy.yaml",
            "\"/shop\"",
            "line 4",
            "slash",
        ],
    );

    // etcd.
    let garbage = file("garbage.pem", "not a certificate");
    let password = file("password", "pw");
    let absent = folder.path().join("absent.pem").display().to_string();
    for (args, parts) in [
        (
            &["--etcd-endpoints", "ftp://etcd:2379"][..],
            &["ftp://etcd:2379", "https://host:2379"][..],
        ),
        (
            &["--etcd-endpoints", "http://root:s3cret@etcd:2379"],
            &["http://etcd:2379", "password"],
        ),
        (&["--etcd-cacert", &absent], &["absent.pem", "No such file"]),
        (
            &["--etcd-cacert", &garbage],
            &["garbage.pem", "PEM certificate"],
        ),
        (&["--etcd-cert", &garbage], &["--etcd-key"]),
        (&["--etcd-user", "registrar"], &["--etcd-password-file"]),
        (&["--etcd-password-file", &password], &["--etcd-user"]),
        (
            &["--etcd-user", "registrar:s3cret"],
            &["--etcd-password-file"],
        ),
    ] {
        with(args, 1, parts);
    }

    // Kubernetes.
    ends(
        &["run", "--cluster-name", "east"],
        1,
        &["no kubeconfig", "--kubeconfig"],
    );
    with(&["--context", "nowhere"], 1, &["nowhere", "--context"]);
    // The port of health and metrics.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    with(
        &["--listen", &address],
        1,
        &[&address, "--listen", "in use"],
    );
}

fn operator(cluster: &Cluster, kubeconfig: &Path) -> OperatorBuilder {
    assert!(kubeconfig.is_file(), "{}", cluster.name());
    Operator::builder(BINARY, "east").kubeconfig(kubeconfig)
}

#[test]
fn an_etcd_that_refuses_or_is_not_there_is_named_and_tried_again() {
    let etcd = || {
        Etcd::builder("errors")
            .unsafe_no_fsync()
            .tls()
            .auth(["/services/", "/registrar/east/"])
    };
    let stage = Stage::with_etcd("errors-etcd", etcd());
    let etcd = &stage.etcd;
    let plane = &stage.plane;
    let folder = tempfile::tempdir().unwrap();
    let proxy = Proxy::start(etcd.client_ports()[0]).unwrap();
    let url = proxy.url("https");

    // Nobody listens there.
    proxy.refuse(true);
    let builder = operator(plane.cluster, &plane.kubeconfig).etcd_at(etcd, &url);
    let operator = builder.spawn().unwrap();
    said(
        &operator,
        "ERROR",
        &["etcd can't be reached", &url, "refused", "--etcd-endpoints"],
    );
    not_ready(&operator, &["etcd", &url, "refused"]);
    quiet(&operator, 3);
    proxy.refuse(false);
    operator.wait_ready().unwrap();
    operator.stop().unwrap();

    // The wrong password, the wrong authority, no certificate: each is mended on disk while the operator runs.
    let ca = testbed::Ca::new(folder.path(), "another authority").unwrap();
    let args = etcd.operator_args();
    let flag = |args: &[String], name: &str| {
        let at = args.iter().position(|arg| arg == name).unwrap();
        args[at + 1].clone()
    };
    for (name, wrong, parts) in [
        (
            "--etcd-password-file",
            b"s3cret-but-wrong".to_vec(),
            ["authentication failed", "--etcd-password-file"],
        ),
        (
            "--etcd-cacert",
            std::fs::read(ca.cert()).unwrap(),
            ["not signed by the given CA", "--etcd-cacert"],
        ),
    ] {
        let right = flag(&args, name);
        let file = folder.path().join("mended");
        std::fs::write(&file, wrong).unwrap();
        let mut args = args.clone();
        let at = args.iter().position(|arg| *arg == right).unwrap();
        args[at] = file.display().to_string();
        let builder = self::operator(plane.cluster, &plane.kubeconfig).args(args);
        let operator = builder.spawn().unwrap();
        let mut all = vec!["etcd can't be reached"];
        all.extend(parts);
        said(&operator, "ERROR", &all);
        not_ready(&operator, &parts);
        quiet(&operator, 3);
        assert!(!operator.log().contains("s3cret"), "{}", operator.log());
        std::fs::copy(&right, &file).unwrap();
        operator.wait_ready().unwrap();
        operator.stop().unwrap();
    }

    // The user may not touch the operator's own keys: nothing can work, and it is said what to grant.
    etcd.etcdctl(&[
        "role",
        "revoke-permission",
        testbed::USER,
        "/registrar/east/",
        "--prefix=true",
    ])
    .unwrap();
    let operator = self::operator(plane.cluster, &plane.kubeconfig)
        .etcd(etcd)
        .spawn()
        .unwrap();
    let parts = ["permission denied", "/registrar/east/", "readwrite"];
    said(&operator, "ERROR", &parts);
    not_ready(&operator, &["/registrar/east/"]);
    quiet(&operator, 5);
    etcd.etcdctl(&[
        "role",
        "grant-permission",
        testbed::USER,
        "readwrite",
        "/registrar/east/",
        "--prefix=true",
    ])
    .unwrap();
    operator.wait_ready().unwrap();
}

#[test]
fn a_missing_permission_is_named_and_never_taken_for_an_empty_list() {
    let stage = Stage::new("errors-rbac");
    stage.register("web", &json!({}));
    for pod in 0..3 {
        stage.create_pod(&format!("web-{pod}"), "web", &json!({}), &json!({}));
    }
    let first = stage.operator("east").start().unwrap();
    stage.wait_count(&stage.scope("web"), 3);
    stage.wait_condition("web", "Ready", "True", "Registered");
    let watcher = Watcher::start(&stage.etcd, "/services/");
    first.kill().unwrap();
    for (name, resource, verbs) in [
        ("no-pods", "pods", &["list", "watch"][..]),
        ("no-nodes", "nodes", &["list", "watch"]),
        (
            "no-registrations",
            "serviceregistrations",
            &["list", "watch"],
        ),
        ("no-uid", "namespaces", &["get"]),
    ] {
        let kubeconfig = without(&stage, name, resource, verbs);
        let operator = operator(stage.plane.cluster, &kubeconfig)
            .etcd(&stage.etcd)
            .spawn()
            .unwrap();
        let line = said(&operator, "WARN", &[resource, "kubectl apply -k deploy/"]);
        assert!(
            line.contains("forbidden") && line.contains("grant"),
            "{line}"
        );
        // Whose cluster it is, `owner` in etcd still tells; the watches alone are complete.
        if name != "no-uid" {
            not_ready(&operator, &[resource]);
        }
        quiet(&operator, 4);
        watcher.assert_silent(format!("without rights to {resource}"));
        // Granted while it runs: no restart is needed.
        if name == "no-pods" {
            let granted = Instant::now();
            stage.bind_operator_role(&format!("{name}-mended"), name);
            operator.wait_ready().unwrap();
            let complete = granted.elapsed();
            stage.create_pod("web-3", "web", &json!({}), &json!({}));
            stage.wait_count(&stage.scope("web"), 4);
            let seen = watcher.seen();
            assert_eq!(seen.len(), 1, "{seen:#?}");
            tell("list of pods forbidden", seen.len() - 1, complete);
            watcher.forget();
        }
        operator.kill().unwrap();
    }
}

#[test]
fn a_missing_definition_is_named_and_picked_up_when_it_is_applied() {
    let cluster = Cluster::builder("bare").api_only().start().unwrap();
    let etcd = Etcd::builder("errors-crd")
        .unsafe_no_fsync()
        .start()
        .unwrap();
    let operator = operator(&cluster, cluster.kubeconfig())
        .etcd(&etcd)
        .spawn()
        .unwrap();
    let parts = [
        "serviceregistrations",
        "etcd-registrar crd | kubectl apply -f -",
    ];
    said(&operator, "WARN", &parts);
    not_ready(&operator, &parts);
    quiet(&operator, 3);
    // As the message says.
    let crd = run(&["crd"]);
    assert!(crd.status.success());
    cluster
        .apply(&String::from_utf8(crd.stdout).unwrap())
        .unwrap();
    operator.wait_ready().unwrap();
}

#[test]
fn a_kubernetes_that_is_not_there_is_named_and_tried_again() {
    let stage = Stage::new("errors-kube");
    let proxy = Proxy::start(stage.plane.cluster.apiserver_port().unwrap()).unwrap();
    proxy.refuse(true);
    let kubeconfig = stage
        .plane
        .cluster
        .kubeconfig_for_service_account_at("etcd-registrar", "etcd-registrar", &proxy.url("https"))
        .unwrap();
    let operator = operator(stage.plane.cluster, &kubeconfig)
        .etcd(&stage.etcd)
        .spawn()
        .unwrap();
    said(
        &operator,
        "WARN",
        &[
            "can't reach the API server",
            "refused",
            &proxy.port().to_string(),
        ],
    );
    not_ready(&operator, &["pods", "refused"]);
    quiet(&operator, 5);
    proxy.refuse(false);
    operator.wait_ready().unwrap();
}

#[test]
fn purge_does_nothing_while_an_operator_runs_and_frees_the_name_after_it() {
    let stage = Stage::new("errors-purge");
    let operator = stage.operator("east").start().unwrap();
    stage.register("web", &json!({}));
    stage.create_pod("web-0", "web", &json!({}), &json!({}));
    stage.wait_count(&stage.scope("web"), 1);
    stage.wait_condition("web", "Ready", "True", "Registered");
    let watcher = Watcher::start(&stage.etcd, "/services/");
    let etcd = stage.etcd.endpoints_arg();
    let purge = ["purge", "--cluster-name", "east", "--etcd-endpoints", &etcd];
    ends(
        &purge,
        1,
        &["an operator of cluster \"east\" is running", "stop it"],
    );
    watcher.assert_silent("purge beside an operator");
    assert!(!stage.registry.list("/registrar/east/").is_empty());
    operator.kill().unwrap();

    // A name that nobody has: nothing happens, and it is said.
    let output = run(&["purge", "--cluster-name", "west", "--etcd-endpoints", &etcd]);
    assert!(output.status.success());
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(
        stdout.contains("west") && stdout.contains("nothing"),
        "{stdout}"
    );
    watcher.assert_silent("purge of another name");

    // The wrong UID: that of nobody.
    let mut wrong = purge.to_vec();
    wrong.extend(["--uid", "00000000-0000-0000-0000-000000000000"]);
    let leader_gone = || {
        stage
            .registry
            .get("/registrar/east/leader")
            .map_or(Ok(()), |record| Err(record.key))
    };
    // As the message says: the killed leader's key goes with its lease.
    eventually(SOON, "the end of the leader's lease", leader_gone).unwrap();
    let output = run(&wrong);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let uid = stage.plane.uid();
    assert!(said.contains(&uid) && said.contains("--uid"), "{said}");
    watcher.assert_silent("purge of another UID");

    let output = run(&purge);
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(
        stdout.contains("1 lease") && stdout.contains("the name is free"),
        "{stdout}"
    );
    assert_eq!(stage.registry.list(""), []);
    assert!(stage.registry.leases().is_empty());

    // An etcd that is not there.
    let nowhere = format!("http://127.0.0.1:{}", testbed::free_port().unwrap());
    ends(
        &[
            "purge",
            "--cluster-name",
            "east",
            "--etcd-endpoints",
            &nowhere,
        ],
        1,
        &[&nowhere, "refused", "--etcd-endpoints"],
    );
}
