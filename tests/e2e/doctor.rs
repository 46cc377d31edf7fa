//! The command `doctor` on set-ups that are well, and on broken ones.

use std::path::Path;

use serde_json::Value;
use testbed::{Etcd, eventually};

use crate::commands::{command, ends, output};
use crate::support::{SOON, Stage, without};

/// What it finds, which ends with this code.
fn doctor(etcd: &Etcd, kubeconfig: &Path, args: &[&str], code: i32) -> String {
    let kubeconfig = kubeconfig.display().to_string();
    let mut all = vec!["--cluster-name", "east", "--kubeconfig", &kubeconfig];
    all.extend(args);
    ends(etcd, "doctor", &all, code).0
}

/// The line of this level that holds this part, and what to do.
fn finding<'a>(text: &'a str, level: &str, part: &str) -> &'a str {
    let mut lines = text.lines();
    let found = lines.find(|line| line.starts_with(level) && line.contains(part));
    assert!(found.is_some(), "no {level} with {part:?} in:\n{text}");
    let advice = lines.next().unwrap_or_default();
    if advice.starts_with(' ') {
        advice.trim()
    } else {
        ""
    }
}

fn etcd_alone(etcd: &Etcd, args: &[&str], code: i32) -> String {
    let mut all = vec!["--cluster-name=east", "--only=etcd"];
    all.extend(args);
    ends(etcd, "doctor", &all, code).0
}

#[test]
fn a_set_up_that_is_well_has_nothing_but_ok() {
    let stage = Stage::new("doctor-well");
    let admin = stage.plane.cluster.kubeconfig();
    // Before there is an operator that is a warning.
    let text = doctor(&stage.etcd, admin, &[], 1);
    assert!(finding(&text, "warning", "no operator of east runs yet").contains("start it"));
    finding(&text, "ok", "the name east is free");
    let operators = [
        stage.operator("east").start().unwrap(),
        stage.operator("east").start().unwrap(),
    ];
    eventually(SOON, "a finding of nothing", || {
        let kubeconfig = admin.display().to_string();
        let args = ["--cluster-name", "east", "--kubeconfig", &kubeconfig];
        let output = output(&stage.etcd, "doctor", &args);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.code() {
            Some(0) => Ok(text),
            _ => Err(text),
        }
    })
    .inspect(|text| {
        for part in [
            "Kubernetes https://",
            "the clock here agrees",
            "is that of this version",
            "may list pods",
            "may patch serviceregistrations/status",
            "may get namespaces kube-system",
            "has version 3.",
            "uses ",
            "/registrar/east/ can be read and written",
            "/services/ can be read and written",
            "a lease of 5 s was granted, kept alive and revoked",
            "the name east is this cluster's",
            "leads, and one waits to take over",
        ] {
            finding(text, "ok", part);
        }
        assert!(!text.contains("warning"), "{text}");
    })
    .unwrap();
    // The operator's own account may not read the definition, and need not.
    let text = doctor(&stage.etcd, &stage.plane.kubeconfig, &[], 1);
    finding(
        &text,
        "warning",
        "may not read the CustomResourceDefinition",
    );
    finding(
        &text,
        "ok",
        "system:serviceaccount:etcd-registrar:etcd-registrar may watch nodes",
    );
    assert_eq!(text.matches("warning").count(), 1, "{text}");
    // It left nothing behind.
    assert!(stage.registry.list("/services/").is_empty());
    operators[0].kill().unwrap();
    operators[1].kill().unwrap();
    // The leader's key ends with its lease, the others are kept for longer.
    eventually(SOON, "nobody leads", || {
        let args = ["--cluster-name=east", "--only=etcd", "-o=json"];
        let output = output(&stage.etcd, "doctor", &args);
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        let found = found.as_array().unwrap();
        let told = found.iter().any(|one| {
            one["what"]
                .as_str()
                .unwrap()
                .contains("no operator of east runs yet")
        });
        if told {
            Ok(())
        } else {
            Err(format!("{found:?}"))
        }
    })
    .unwrap();
}

#[test]
fn what_is_broken_in_kubernetes_is_said_with_what_to_do() {
    let stage = Stage::new("doctor-kubernetes");
    let cluster = stage.plane.cluster;
    let admin = cluster.kubeconfig();
    let look =
        |kubeconfig: &Path, code| doctor(&stage.etcd, kubeconfig, &["--only=kubernetes"], code);
    look(admin, 0);
    let lacking = without(&stage, "no-watch", "nodes", &["watch"]);
    let text = look(&lacking, 2);
    assert!(finding(&text, "error", "may not watch nodes").contains("kubectl apply -k deploy/"));
    finding(&text, "ok", "may list nodes");

    // Another version of the definition, then none.
    let crd = "crd/serviceregistrations.etcd-registrar.io";
    let path = "/spec/versions/0/schema/openAPIV3Schema/description";
    let patch = format!(r#"[{{"op":"replace","path":"{path}","value":"another"}}]"#);
    cluster
        .kubectl(&["patch", crd, "--type=json", "-p", &patch])
        .unwrap();
    let text = look(admin, 1);
    assert!(finding(&text, "warning", "is that of another version").contains("etcd-registrar crd"));
    cluster.kubectl(&["delete", crd]).unwrap();
    let text = look(admin, 2);
    assert!(finding(&text, "error", "is not there").contains("etcd-registrar crd"));
    let text = look(&stage.plane.kubeconfig, 2);
    finding(&text, "error", "is not there");
    stage.plane.apply_deploy();
    look(admin, 0);

    let text = look(Path::new("/no/such/kubeconfig"), 2);
    assert!(finding(&text, "error", "/no/such/kubeconfig").contains("--only etcd"));
    // A clock that is an hour ahead; `faketime` is what the tests of the operator use for it.
    let mut late = command(
        &stage.etcd,
        "doctor",
        &["--cluster-name=east", "--only=kubernetes"],
    );
    late.args(["--kubeconfig", &admin.display().to_string()]);
    let mut faked = std::process::Command::new("faketime");
    faked
        .args(["-f", "+1h"])
        .arg(late.get_program())
        .args(late.get_args());
    let told = faked.output().unwrap();
    let text = String::from_utf8_lossy(&told.stdout).into_owned();
    assert_eq!(told.status.code(), Some(1), "{text}");
    assert!(finding(&text, "warning", "s apart").contains("NTP"));
}

#[test]
fn what_is_broken_in_etcd_is_said_with_what_to_do() {
    // Nothing is there.
    let etcd = Etcd::builder("doctor").unsafe_no_fsync().start().unwrap();
    etcd_alone(&etcd, &[], 1);
    // A member that does not answer.
    let nowhere = format!("http://127.0.0.1:{}", testbed::free_port().unwrap());
    let both = format!("--etcd-endpoints={},{nowhere}", etcd.endpoints_arg());
    let text = etcd_alone(&etcd, &[&both, "--timeout=2s"], 1);
    assert!(finding(&text, "warning", &nowhere).contains("the others are used"));
    // The name is another cluster's, and nobody keeps its leases alive.
    etcd.etcdctl(&["put", "/registrar/east/owner", "another"])
        .unwrap();
    let text = etcd_alone(&etcd, &[], 1);
    finding(&text, "ok", "the name east is that of the cluster another");
    let lease = etcd
        .etcdctl(&["lease", "grant", "20", "-w", "json"])
        .unwrap();
    let lease: Value = serde_json::from_str(&lease).unwrap();
    let lease = lease["ID"].as_i64().unwrap();
    let key = format!("/registrar/east/leases/another/{lease:016x}");
    etcd.etcdctl(&["put", &key, "{}", &format!("--lease={lease:x}")])
        .unwrap();
    eventually(SOON, "a lease that nobody keeps alive", || {
        let args = ["--cluster-name=east", "--only=etcd"];
        let text = String::from_utf8(output(&etcd, "doctor", &args).stdout).unwrap();
        if text.contains("no operator of east leads")
            && text.contains("1 lease of east not kept alive")
        {
            return Ok(());
        }
        Err(text)
    })
    .unwrap();
    etcd.kill().unwrap();
    let text = etcd_alone(&etcd, &["--timeout=1s"], 2);
    finding(&text, "error", "does etcd run there?");
}

#[test]
fn a_user_of_etcd_without_permissions_is_told_which_are_missing() {
    let etcd = Etcd::builder("doctor-auth")
        .unsafe_no_fsync()
        .auth(["/registrar/", "/other/"])
        .start()
        .unwrap();
    let user = format!("--etcd-user={}", etcd.user().unwrap());
    let password = format!(
        "--etcd-password-file={}",
        etcd.password_file().unwrap().display()
    );
    let text = etcd_alone(&etcd, &[&user, &password], 2);
    finding(&text, "ok", "/registrar/east/ can be read and written");
    let advice = finding(&text, "error", "read, read all, write /services/");
    assert!(
        advice.contains("readwrite /services/ --prefix=true"),
        "{advice}"
    );
    // Those of the policy are tried.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("policy.yaml");
    let rules = "rules: [{namespaces: ['*'], formats: [Plain], prefixes: ['/other/{namespace}/']}]";
    std::fs::write(&file, rules).unwrap();
    let policy = format!("--policy-file={}", file.display());
    let text = etcd_alone(&etcd, &[&user, &password, &policy], 1);
    finding(&text, "ok", "/other/ can be read and written");
    std::fs::write(&file, "rules: 1").unwrap();
    let text = etcd_alone(&etcd, &[&user, &password, &policy], 2);
    assert!(finding(&text, "error", "--policy-file").contains("docs/policy.md"));
    assert!(
        etcd.etcdctl_as(
            "root",
            testbed::ROOT_PASSWORD,
            &["get", "--prefix", "/", "--keys-only"]
        )
        .unwrap()
        .trim()
        .is_empty()
    );
}

#[test]
fn an_etcd_without_space_and_one_without_a_quorum_are_told() {
    let full = Etcd::builder("doctor-full")
        .unsafe_no_fsync()
        .args(["--quota-backend-bytes=16777216"])
        .start()
        .unwrap();
    let value = "x".repeat(1 << 20);
    let refused = (0..40).any(|n| {
        full.etcdctl_input(&["put", &format!("fill/{n}")], &value)
            .is_err()
    });
    assert!(refused, "etcd took 40 MiB at a quota of 16 MiB");
    let text = etcd_alone(&full, &[], 2);
    assert!(finding(&text, "error", "NOSPACE").contains("etcdctl alarm disarm"));
    assert!(finding(&text, "warning", "of its quota of 16 MiB").contains("etcdctl defrag"));
    drop(full);

    let three = Etcd::builder("doctor-three")
        .unsafe_no_fsync()
        .members(3)
        .start()
        .unwrap();
    let text = etcd_alone(&three, &[], 1);
    assert_eq!(text.matches("has version 3.").count(), 3, "{text}");
    three.kill_member(0).unwrap();
    three.kill_member(1).unwrap();
    let text = etcd_alone(&three, &["--timeout=3s"], 2);
    finding(&text, "error", "etcd can't be reached");
}
