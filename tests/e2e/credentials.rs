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

#[test]
fn the_role_of_the_examples_is_enough_and_not_more_than_is_needed() {
    // The commands of the file as they stand there, but for the address and the passwords.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/etcd-role.sh");
    let stage = Stage::with_etcd("etcd-role", Etcd::builder("etcd-role").unsafe_no_fsync());
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
        .env("CLUSTER", "east")
        .env("PASSWORD", "pw-of-east")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    stage
        .etcd
        .etcdctl(&["user", "add", "root:pw-of-root"])
        .unwrap();
    stage
        .etcd
        .etcdctl(&["user", "grant-role", "root", "root"])
        .unwrap();
    stage.etcd.etcdctl(&["auth", "enable"]).unwrap();
    let as_root = |args: &[&str]| {
        let mut all = vec!["--user=root:pw-of-root"];
        all.extend(args);
        stage.etcd.etcdctl(&all).unwrap()
    };

    let password = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(password.path(), "pw-of-east\n").unwrap();
    let operator = stage
        .operator("east")
        .args(["--etcd-user", "registrar-east", "--etcd-password-file"])
        .args([password.path()])
        .start()
        .unwrap();
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

    // Not more than is needed: with each of its permissions gone, the operator says so.
    let granted = as_root(&["role", "get", "registrar-east"]);
    for prefix in ["/services/", "/registrar/east/"] {
        assert_eq!(
            granted.matches(&format!("[{prefix}, ")).count(),
            2,
            "read and write, and each once: {granted}"
        );
    }
    assert_eq!(granted.matches(", /").count(), 4, "{granted}");
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
