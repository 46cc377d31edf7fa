//! An etcd with TLS, client certificates and a user who may do only what is needed.

use std::time::Instant;

use serde_json::json;
use testbed::{Etcd, EtcdBuilder, Operator, USER, always, eventually};

use crate::support::{SOON, Stage, Watcher, tell};

fn guarded(name: &str) -> EtcdBuilder {
    // The operator's own keys; where records may stand is granted step by step.
    Etcd::builder(name)
        .unsafe_no_fsync()
        .tls()
        .auth(["/registrar/east/"])
}

fn role(stage: &Stage, action: &str, how: &[&str], prefix: &str) {
    let mut args = vec!["role", action, USER];
    args.extend(how);
    args.extend([prefix, "--prefix=true"]);
    stage.etcd.etcdctl(&args).unwrap();
}

fn grant(stage: &Stage, how: &str, prefix: &str) {
    role(stage, "grant-permission", &[how], prefix);
}

/// Transactions that etcd has refused, as the operator counts them.
fn refused(operator: &Operator) -> f64 {
    operator
        .metric(
            "etcd_registrar_transactions_total",
            &["outcome=\"refused\""],
        )
        .unwrap()
}

/// Runs `examples/etcd-role.sh` as it stands there, with a password that is made of the user's name.
fn make_role(stage: &Stage, cluster: &str, environment: &[(&str, &str)]) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/etcd-role.sh");
    let etcdctl = stage.etcd.etcdctl_command().unwrap();
    let folder = std::path::Path::new(etcdctl.get_program())
        .parent()
        .unwrap()
        .to_owned();
    let path = format!(
        "{}:{}",
        folder.display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let output = std::process::Command::new("sh")
        .arg(script)
        .env("PATH", path)
        .env("ETCDCTL_ENDPOINTS", stage.etcd.endpoints_arg())
        .env("CLUSTER", cluster)
        .env("PASSWORD", format!("pw-of-registrar-{cluster}"))
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn turn_on_login(stage: &Stage) {
    for args in [
        &["user", "add", "root:pw-of-root"][..],
        &["user", "grant-role", "root", "root"],
        &["auth", "enable"],
    ] {
        stage.etcd.etcdctl(args).unwrap();
    }
}

#[test]
fn the_role_of_the_examples_is_enough_and_not_more_than_is_needed() {
    let stage = Stage::with_etcd("etcd-role", Etcd::builder("etcd-role").unsafe_no_fsync());
    make_role(&stage, "east", &[]);
    turn_on_login(&stage);
    let as_root = |args: &[&str]| {
        let mut all = vec!["--user=root:pw-of-root"];
        all.extend(args);
        stage.etcd.etcdctl(&all).unwrap()
    };

    let password = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(password.path(), "pw-of-registrar-east\n").unwrap();
    let operator_of = |stage: &Stage| {
        stage
            .operator("east")
            .args(["--etcd-user", "registrar-east", "--etcd-password-file"])
            .args([password.path()])
    };
    let operator = operator_of(&stage).start().unwrap();
    stage.register("web", &json!({}));
    for pod in ["web-0", "web-1"] {
        stage.create_pod(pod, "web", &json!({}), &json!({}));
    }
    stage.wait_condition("web", "Ready", "True", "Registered");
    // Everything that an operator does: put, delete, grant, revoke, keep alive, elect, hand over.
    stage.set_ready("web-0", false);
    stage.wait_registration("web", "one endpoint", |object| {
        object["status"]["registered"] == 1
    });
    operator.restart().unwrap();
    stage.set_ready("web-0", true);
    stage.wait_registration("web", "two endpoints", |object| {
        object["status"]["registered"] == 2
    });
    stage.unregister("web");
    eventually(SOON, "no record and no lease key", || {
        let left = as_root(&["get", "--prefix", "", "--keys-only"]);
        if left.contains("/services/") || left.contains("/leases/") {
            Err(left)
        } else {
            Ok(())
        }
    })
    .unwrap();
    assert_eq!(refused(&operator), 0.0);
    let log = operator.log();
    assert!(!log.contains("permission denied"), "{log}");
    operator.stop().unwrap();

    // Not more than is needed: each part of it is missed where it is not there.
    let granted = as_root(&["role", "get", "registrar-east"]);
    let prefixes = ["/services/", "/registrar/east/"];
    assert_eq!(
        granted.matches(", /").count(),
        2 * prefixes.len(),
        "{granted}"
    );
    for (round, (prefix, left)) in prefixes
        .iter()
        .flat_map(|prefix| [(prefix, "read"), (prefix, "write")])
        .enumerate()
    {
        let name = format!("web{round}");
        let selector = json!({"matchLabels": {"app": "web"}});
        stage.register(&name, &json!({"selector": selector}));
        let change = |action: &str, how: &[&str]| {
            let role = [&["role", action, "registrar-east"], how];
            as_root(&[&role.concat()[..], &[*prefix, "--prefix=true"]].concat());
        };
        change("revoke-permission", &[]);
        change("grant-permission", &[left]);
        let operator = operator_of(&stage).spawn().unwrap();
        let what = format!("{prefix} to be missed with {left} alone");
        eventually(SOON, &what, || {
            let log = operator.log();
            let status = stage.registration(&name)["status"].to_string();
            // One of its own keys, or the record of the registration.
            if log.contains("does not let") && log.contains(prefix)
                || status.contains("PermissionDenied") && status.contains(prefix)
            {
                Ok(())
            } else {
                Err(status)
            }
        })
        .unwrap();
        operator.kill().unwrap();
        change("revoke-permission", &[]);
        change("grant-permission", &["readwrite"]);
        stage.unregister(&name);
    }
}

#[test]
fn who_has_the_password_of_one_cluster_can_do_nothing_to_another_where_keys_are_laid_out_for_it() {
    let stage = Stage::with_etcd("confined", Etcd::builder("confined").unsafe_no_fsync());
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/security.md"));
    let page = page.unwrap();
    let policy = page
        .split("```yaml\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    for cluster in ["east", "west"] {
        let records = format!("/clusters/{cluster}/ clusters/{cluster}/");
        make_role(&stage, cluster, &[("RECORDS", &records)]);
    }
    turn_on_login(&stage);
    let as_user = |user: &str, args: &[&str]| {
        let login = format!("--user={user}:pw-of-{user}");
        stage.etcd.etcdctl(&[&[&*login], args].concat())
    };
    let password = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(password.path(), "pw-of-registrar-east\n").unwrap();
    let _operator = stage
        .operator("east")
        .policy(policy)
        .args(["--etcd-user", "registrar-east", "--etcd-password-file"])
        .args([password.path()])
        .start()
        .unwrap();
    stage.create_pod("web-0", "web", &json!({}), &json!({}));
    stage.register("web", &json!({"prefix": "/clusters/east/"}));
    let plain = format!("clusters/east/{}/", stage.namespace);
    let selector = json!({"matchLabels": {"app": "web"}});
    stage.register(
        "plain",
        &json!({"prefix": plain, "format": {"type": "Plain"}, "selector": selector}),
    );
    stage.register("usual", &json!({"selector": selector}));
    for name in ["web", "plain"] {
        stage.wait_condition(name, "Ready", "True", "Registered");
    }
    stage.wait_condition("usual", "Accepted", "False", "NotGranted");

    // A thief of the other password: not a key, and no lease either.
    let status = stage.registration("web")["status"].clone();
    let key = status["endpoints"][0]["key"].as_str().unwrap();
    let lease = status["endpoints"][0]["lease"].as_str().unwrap();
    assert!(key.starts_with("/clusters/east/"), "{key}");
    let own_lease = as_user("registrar-west", &["lease", "grant", "60"]).unwrap();
    assert!(own_lease.contains("granted"), "{own_lease}");
    for args in [
        &["get", key][..],
        &["put", key, "x"],
        &["del", key],
        &["del", "--prefix", "/registrar/east/"],
        &["put", "/registrar/east/leader", "x"],
        &["get", "--prefix", "/clusters/"],
        &["lease", "revoke", lease],
        &["put", "/clusters/west/x", "x", "--lease", lease],
        &["lease", "timetolive", "--keys", lease],
        &["compact", "2"],
    ] {
        let error = as_user("registrar-west", args).unwrap_err().to_string();
        assert!(error.contains("permission denied"), "{args:?}: {error}");
        // The owner may.
        if args[0] == "get" && args[1] == key {
            assert!(as_user("registrar-east", args).unwrap().contains(key));
        }
    }
    as_user("registrar-west", &["put", "/clusters/west/x", "x"]).unwrap();
    stage.wait_condition("web", "Ready", "True", "Registered");
}

#[test]
fn a_prefix_that_the_etcd_user_may_not_touch_is_told_and_holds_nobody_up() {
    let stage = Stage::with_etcd("denied", guarded("denied"));
    grant(&stage, "readwrite", &stage.scope("good"));
    // One may not even be read, the other not be written.
    grant(&stage, "read", &stage.scope("readable"));
    for name in ["good", "closed", "readable"] {
        for pod in 0..3 {
            stage.create_pod(&format!("{name}-{pod}"), name, &json!({}), &json!({}));
        }
        stage.register(name, &json!({}));
    }
    let operator = stage.operator("east").start().unwrap();
    stage.wait_condition("good", "Ready", "True", "Registered");
    for (name, verb) in [("closed", "read"), ("readable", "write")] {
        let said = stage.wait_condition(name, "Ready", "False", "PermissionDenied");
        for part in [verb, "readwrite", &stage.scope(name), "permission denied"] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }
    stage.wait_count(&stage.scope("good"), 3);

    // No hot loop, in transactions, in log lines or in writes of the status.
    let status_patches = || {
        operator
            .metric("etcd_registrar_status_patches_total", &[])
            .unwrap()
    };
    let (before, patches) = (refused(&operator), status_patches());
    let lines = operator.log().lines().count();
    let cpu = operator.process().cpu_time().unwrap();
    always(std::time::Duration::from_secs(6), "few refusals", || {
        let now = refused(&operator) - before;
        // Three keys, tried again with a growing pause.
        if now <= 15.0 {
            Ok(())
        } else {
            Err(format!("{now} refusals"))
        }
    })
    .unwrap();
    assert!(status_patches() - patches <= 2.0);
    assert!(
        operator.log().lines().count() - lines <= 3,
        "{}",
        operator.log()
    );
    let cpu = operator.process().cpu_time().unwrap() - cpu;
    assert!(cpu < std::time::Duration::from_millis(600), "{cpu:?}");

    // The others go on meanwhile, both ways.
    let watcher = Watcher::start(&stage.etcd, &stage.scope("good"));
    stage.set_ready("good-0", false);
    stage.wait_count(&stage.scope("good"), 2);
    stage.set_ready("good-0", true);
    stage.wait_count(&stage.scope("good"), 3);
    assert_eq!(watcher.seen().len(), 2);

    // Also over a restart: the one that cannot be read keeps no new leader from its work.
    operator.restart().unwrap();
    stage.set_ready("good-1", false);
    stage.wait_count(&stage.scope("good"), 2);
    stage.set_ready("good-1", true);
    stage.wait_count(&stage.scope("good"), 3);

    // Granted: registered without a restart.
    for name in ["closed", "readable"] {
        grant(&stage, "readwrite", &stage.scope(name));
        stage.wait_condition(name, "Ready", "True", "Registered");
        stage.wait_count(&stage.scope(name), 3);
    }

    // Taken away again while records stand: they stay as long as their leases, which are kept alive, and it is said.
    let closed = stage.scope("closed");
    watcher.forget();
    role(&stage, "revoke-permission", &[], &closed);
    stage.set_ready("closed-0", false);
    stage.wait_condition("closed", "Ready", "False", "PermissionDenied");
    assert_eq!(stage.registry.list(&closed).len(), 3);
    watcher.assert_silent("for the others");
    let removal = Watcher::start(&stage.etcd, &closed);
    let granted = Instant::now();
    grant(&stage, "readwrite", &closed);
    stage.wait_count(&closed, 2);
    let seen = removal.seen();
    assert_eq!(seen.len(), 1, "{seen:#?}");
    tell(
        "etcd user without permission for one prefix",
        watcher.seen().len(),
        seen[0].at.saturating_duration_since(granted),
    );
    stage.wait_condition("closed", "Ready", "True", "Registered");
}
