//! Passwords, keys and tokens are in nothing that the operator writes, whatever goes wrong.

use std::fmt::Write as _;
use std::fs;
use std::process::{Command, Output};

use serde_json::{Value, json};
use testbed::{Etcd, Operator, USER, eventually};

use crate::support::{BINARY, SOON, Stage};

/// Somewhere in an input; never in an output.
const SECRET: &str = "s3cret-Do-Not-Show";

/// Everything that must not be seen, each with its name.
struct Secrets(Vec<(String, String)>);

impl Secrets {
    fn of(stage: &Stage) -> Self {
        let mut all = vec![("password".to_owned(), SECRET.to_owned())];
        let kubeconfig: Value =
            serde_json::from_str(&fs::read_to_string(&stage.plane.kubeconfig).unwrap()).unwrap();
        let token = kubeconfig.pointer("/users/0/user/token").unwrap();
        let token = token.as_str().unwrap();
        // The signature is what makes a token one; its other parts could be made by anybody.
        let signature = token.rsplit('.').next().unwrap();
        all.push(("token".to_owned(), signature.to_owned()));
        let key = fs::read_to_string(&stage.etcd.client_cert().unwrap().key).unwrap();
        for (number, line) in key
            .lines()
            .filter(|line| !line.starts_with("---"))
            .enumerate()
        {
            all.push((format!("line {number} of the key"), line.to_owned()));
        }
        assert!(
            all.len() >= 4 && all.iter().all(|(_, secret)| secret.len() > 15),
            "{all:?}"
        );
        Self(all)
    }

    #[track_caller]
    fn assert_not_in(&self, what: &str, text: &str) {
        for (name, secret) in &self.0 {
            if let Some(at) = text.find(secret.as_str()) {
                let from = text[..at].rfind('\n').map_or(0, |line| line + 1);
                panic!("{what} shows the {name}: {}", &text[from..at]);
            }
        }
        // The tokens that etcd gives out: sixteen letters, a dot and a number.
        for word in text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '.')) {
            if let Some((letters, number)) = word.split_once('.') {
                let token = letters.len() == 16
                    && letters.bytes().all(|byte| byte.is_ascii_alphabetic())
                    && !number.is_empty()
                    && number.bytes().all(|byte| byte.is_ascii_digit());
                assert!(!token, "{what} shows a token of etcd: {word}");
            }
        }
    }
}

/// All that a person or a scraper can see of an operator.
fn outputs(stage: &Stage, operator: &Operator) -> String {
    let mut text = operator.log();
    for path in ["/metrics", "/readyz", "/healthz"] {
        let response = operator.get(path);
        write!(text, "\n{path}: {response:?}").unwrap();
    }
    // As docs/operations.md has it.
    let own = "--field-selector=reportingComponent=etcd-registrar.io/operator";
    text += &stage.kubectl(&["get", "events", own, "--output=json"]);
    text += &stage.kubectl(&["get", "sreg", "--output=json", "--show-managed-fields"]);
    text
}

#[test]
fn no_secret_shows_whatever_goes_wrong() {
    let builder = Etcd::builder("secrets").unsafe_no_fsync().tls();
    let stage = Stage::with_etcd("secrets", builder.auth(["/registrar/east/", "/services/"]));
    stage.etcd.rotate_password(SECRET).unwrap();
    let secrets = Secrets::of(&stage);
    stage.create_pod("web-0", "web", &json!({}), &json!({}));
    stage.register("web", &json!({}));
    // Not granted, not in the role, and in the way of a key of someone else.
    stage.register("refused", &json!({"prefix": "/elsewhere/"}));
    let operator = stage
        .operator("east")
        .log_level("trace")
        .policy(
            "rules: [{namespaces: ['*'], formats: [Json, Plain], prefixes: ['/services/{namespace}/', 'denied/']}]",
        )
        .start()
        .unwrap();
    stage.wait_condition("web", "Ready", "True", "Registered");
    stage.wait_condition("refused", "Accepted", "False", "NotGranted");
    stage.register("denied", &json!({"format": {"type": "Plain"}, "prefix": "denied/", "selector": {"matchLabels": {"app": "web"}}}));
    stage.wait_condition("denied", "Ready", "False", "PermissionDenied");

    // The password is another one in etcd, and the connection breaks.
    let restart = || {
        stage.etcd.stop_member(0).unwrap();
        stage.etcd.start_member(0).unwrap();
    };
    let said = |what: &str| {
        eventually(SOON, &format!("the log to say {what:?}"), || {
            let log = operator.log();
            if log.contains(what) {
                Ok(())
            } else {
                Err(log.len())
            }
        })
        .unwrap();
    };
    let input = format!("{SECRET}-of-old\n");
    let change = ["user", "passwd", USER, "--interactive=false"];
    stage.etcd.etcdctl_input(&change, &input).unwrap();
    restart();
    said("invalid user ID or password");
    stage.etcd.rotate_password(SECRET).unwrap();
    // A certificate that cannot be read.
    let key = &stage.etcd.client_cert().unwrap().key;
    let good = fs::read(key).unwrap();
    fs::write(
        key,
        format!("-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n"),
    )
    .unwrap();
    said("the changed certificates or password do not work");
    fs::write(key, &good).unwrap();
    let wait_registered = |count: u64| {
        stage.wait_registration("web", "the endpoint", |object| {
            object["status"]["registered"] == count
        });
    };
    stage.set_ready("web-0", false);
    wait_registered(0);
    // No API server for a moment.
    stage.plane.cluster.kill_apiserver().unwrap();
    said("serviceregistrations");
    stage.plane.cluster.start_apiserver().unwrap();
    stage.set_ready("web-0", true);
    wait_registered(1);

    let seen = outputs(&stage, &operator);
    // On this level the libraries tell all that they would ever tell.
    assert!(seen.contains("\"level\":\"TRACE\"") && seen.contains("PermissionDenied"));
    assert!(
        seen.contains("\"reason\": \"Refused\""),
        "the events are missing"
    );
    secrets.assert_not_in("the operator", &seen);
    let stored = stage.etcd.etcdctl(&["get", "", "--from-key"]).unwrap();
    assert!(stored.contains("/services/"));
    secrets.assert_not_in("etcd", &stored);
    secrets.assert_not_in("the command line", &operator.process().command_line());
}

fn run(args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(BINARY);
    command.args(args).env("RUST_BACKTRACE", "1");
    command.envs(environment.iter().copied());
    command.output().unwrap()
}

#[test]
fn no_secret_shows_when_the_operator_is_called_wrongly() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| -> String {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let kubeconfig = file(
        "kubeconfig",
        "apiVersion: v1\nkind: Config\ncurrent-context: a\nclusters: [{name: a, cluster: {server: 'https://127.0.0.1:1'}}]\n\
         users: [{name: a, user: {}}]\ncontexts: [{name: a, context: {cluster: a, user: a}}]\n",
    );
    let misplaced = file(
        "misplaced",
        &format!("users:\n- name: a\n  user: {SECRET}\n"),
    );
    let script = file(
        "login",
        &format!("#!/bin/sh\necho {SECRET}\necho {SECRET} >&2\nexit 1\n"),
    );
    let login = file(
        "exec",
        &format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: a\nclusters: [{{name: a, cluster: {{server: 'https://127.0.0.1:1'}}}}]\n\
             users: [{{name: a, user: {{exec: {{apiVersion: client.authentication.k8s.io/v1, command: sh, args: ['{script}'], interactiveMode: Never}}}}}}]\n\
             contexts: [{{name: a, context: {{cluster: a, user: a}}}}]\n"
        ),
    );
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n");
    let key = file("key", &pem);
    let password = file("password", &format!("{SECRET}\n{SECRET}"));
    let url = format!("http://root:{SECRET}@127.0.0.1:2379");
    let user = format!("root:{SECRET}");
    let flag = format!("--etcd-password={SECRET}");

    let start = [
        "run",
        "--cluster-name",
        "east",
        "--log-level",
        "trace",
        "--listen",
        "127.0.0.1:0",
    ];
    let cases: [(&str, Vec<&str>); 8] = [
        (
            "user",
            vec!["--kubeconfig", &kubeconfig, "--etcd-endpoints", &url],
        ),
        (
            "colon",
            vec!["--kubeconfig", &kubeconfig, "--etcd-user", &user],
        ),
        ("unexpected argument", vec![&flag]),
        ("kubeconfig", vec!["--kubeconfig", &misplaced]),
        ("login", vec!["--kubeconfig", &login]),
        (
            "etcd-cert",
            vec![
                "--kubeconfig",
                &kubeconfig,
                "--etcd-cert",
                &key,
                "--etcd-key",
                &key,
            ],
        ),
        (
            "etcd-user",
            vec![
                "--kubeconfig",
                &kubeconfig,
                "--etcd-password-file",
                &password,
            ],
        ),
        (
            "cacert",
            vec![
                "--kubeconfig",
                &kubeconfig,
                "--etcd-endpoints",
                "https://127.0.0.1:1",
                "--etcd-cacert",
                &key,
            ],
        ),
    ];
    for (expected, args) in cases {
        let mut all = start.to_vec();
        all.extend(args);
        let output = run(&all, &[]);
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(!output.status.success(), "{all:?}: {text}");
        assert!(text.contains(expected), "{expected}: {text}");
        assert!(!text.contains(SECRET), "{expected}: {text}");
    }

    // Nor in any help, whatever is in the environment.
    let environment = [
        ("ETCD_REGISTRAR_ETCD_ENDPOINTS", &*url),
        ("ETCD_REGISTRAR_ETCD_USER", &user),
        ("ETCD_REGISTRAR_ETCD_PASSWORD", SECRET),
        ("ETCDCTL_PASSWORD", SECRET),
    ];
    for args in [
        &["--help"][..],
        &["run", "--help"],
        &["purge", "--help"],
        &["crd", "--help"],
    ] {
        let output = run(args, &environment);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("Usage"), "{text}");
        assert!(!text.contains(SECRET), "{text}");
    }
    // The same from the environment as from flags.
    let output = run(&start, &environment[..1]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && !text.contains(SECRET), "{text}");
}
