//! etcd: members, TLS, authentication, and everything that can be done to it.

use std::time::Duration;

use testbed::{Etcd, Result, USER, USER_PASSWORD, eventually};

const SOON: Duration = Duration::from_secs(20);

fn value(etcd: &Etcd, key: &str) -> Result<String> {
    Ok(etcd
        .etcdctl(&["get", "--print-value-only", key])?
        .trim()
        .to_owned())
}

#[test]
fn one_member_survives_kill_freeze_and_restart() {
    let etcd = Etcd::builder("one").start().unwrap();
    etcd.etcdctl(&["put", "/a", "1"]).unwrap();

    etcd.kill_member(0).unwrap();
    let error = etcd
        .process(0)
        .unwrap()
        .signal(testbed::Signal::SIGTERM)
        .unwrap_err();
    assert!(error.to_string().contains("does not run"), "{error}");
    etcd.start_member(0).unwrap();
    assert_eq!(value(&etcd, "/a").unwrap(), "1");

    etcd.freeze().unwrap();
    etcd.etcdctl(&["--command-timeout=300ms", "get", "/a"])
        .unwrap_err();
    etcd.thaw().unwrap();
    eventually(SOON, "an answer after the thaw", || value(&etcd, "/a")).unwrap();

    etcd.restart().unwrap();
    assert_eq!(value(&etcd, "/a").unwrap(), "1");
    assert!(
        etcd.wipe()
            .unwrap_err()
            .to_string()
            .contains("has to be stopped")
    );
    etcd.stop().unwrap();
    etcd.wipe().unwrap();
    etcd.start().unwrap();
    assert_eq!(value(&etcd, "/a").unwrap(), "");
}

#[test]
fn a_snapshot_is_restored() {
    let etcd = Etcd::builder("snapshot").start().unwrap();
    etcd.etcdctl(&["put", "/a", "old"]).unwrap();
    let snapshot = etcd.save_snapshot("before").unwrap();
    etcd.etcdctl(&["put", "/a", "new"]).unwrap();
    etcd.restore(&snapshot, &["--bump-revision=1000000", "--mark-compacted"])
        .unwrap();
    assert_eq!(value(&etcd, "/a").unwrap(), "old");
    let status = etcd.etcdctl(&["get", "/a", "--write-out=json"]).unwrap();
    assert!(status.contains("\"revision\":1000"), "{status}");
}

#[test]
fn three_members_with_tls_and_authentication() {
    let etcd = Etcd::builder("three")
        .members(3)
        .tls()
        .auth(["/services/", "/registrar/"])
        .start()
        .unwrap();
    assert_eq!(etcd.endpoints().len(), 3);
    assert!(
        etcd.endpoints()
            .iter()
            .all(|endpoint| endpoint.starts_with("https://"))
    );

    let user = |args: &[&str]| etcd.etcdctl_as(USER, USER_PASSWORD, args);
    user(&["put", "/services/a", "1"]).unwrap();
    let denied = user(&["put", "/other/a", "1"]).unwrap_err().to_string();
    assert!(denied.contains("permission denied"), "{denied}");
    etcd.etcdctl(&["put", "/other/a", "1"]).unwrap();
    assert_eq!(etcd.operator_args().len(), 12);

    // One of three may die.
    let leader = etcd.leader().unwrap();
    etcd.kill_member(leader).unwrap();
    eventually(SOON, "an answer without the leader", || {
        etcd.etcdctl_member((leader + 1) % 3, &["get", "/services/a"])
    })
    .unwrap();
    etcd.start_member(leader).unwrap();

    etcd.rotate_password("another").unwrap();
    user(&["get", "/services/a"]).unwrap_err();
    let password = std::fs::read_to_string(etcd.password_file().unwrap()).unwrap();
    etcd.etcdctl_as(USER, &password, &["get", "/services/a"])
        .unwrap();
    etcd.rotate_client_cert().unwrap();
    etcd.etcdctl(&["get", "/services/a"]).unwrap();

    // Everything lost, authentication too; the next start sets it up again.
    etcd.kill().unwrap();
    etcd.wipe().unwrap();
    etcd.start().unwrap();
    etcd.etcdctl_as(USER, USER_PASSWORD, &["put", "/services/a", "2"])
        .unwrap();
}

#[test]
fn a_failed_start_says_why() {
    let error = Etcd::builder("bad")
        .args(["--no-such-flag"])
        .start()
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("etcd bad/m0"), "{error}");
    assert!(error.contains("no-such-flag"), "{error}");
}
