//! The name of a cluster, which is one cluster's.

use std::process::Command;

use serde_json::json;
use testbed::eventually;

use crate::support::{BINARY, SOON, Stage};

#[test]
fn a_name_is_one_clusters_until_it_is_purged() {
    let (east, other) = Stage::pair("names");
    let first = east.operator("east").election_ttl("2s").start().unwrap();
    for stage in [&east, &other] {
        stage.register("web", &json!({}));
        stage.create_pod("web-0", "web", &json!({}), &json!({}));
        stage.wait_ready("web-0");
    }
    east.wait_count(&east.scope("web"), 1);
    let before = east.registry.list("");

    let second = other.operator("east").election_ttl("2s").spawn().unwrap();
    let status = second.wait_exit(SOON).unwrap();
    assert_eq!(status.code(), Some(1), "{status}");
    let log = second.log();
    assert!(log.contains(&east.plane.uid()), "{log}");
    assert!(log.contains("purge"), "{log}");
    let unmarked = |records: Vec<crate::support::Record>| -> Vec<_> {
        records
            .into_iter()
            .filter(|record| !record.key.starts_with("/registrar/east/seen/"))
            .collect()
    };
    assert_eq!(unmarked(east.registry.list("")), unmarked(before));

    // Not while the first one runs, and not when it has merely gone: its leases live on.
    let purge = || {
        Command::new(BINARY)
            .args(["purge", "--cluster-name", "east"])
            .args(east.etcd.operator_args())
            .output()
            .unwrap()
    };
    let refused = purge();
    assert!(!refused.status.success());
    let message = String::from_utf8_lossy(&refused.stderr);
    assert!(message.contains("is running"), "{message}");
    first.stop().unwrap();
    let third = other.operator("east").election_ttl("2s").spawn().unwrap();
    assert_eq!(third.wait_exit(SOON).unwrap().code(), Some(1));

    let purged = purge();
    assert!(purged.status.success(), "{purged:?}");
    assert_eq!(east.registry.list(""), []);
    eventually(SOON, "the leases of the terms to end", || {
        let leases = east.registry.leases();
        if leases.is_empty() {
            Ok(())
        } else {
            Err(format!("{leases:?}"))
        }
    })
    .unwrap();
    let fourth = other.operator("east").election_ttl("2s").start().unwrap();
    let records = other.wait_count(&other.scope("web"), 1);
    let address = &other.wait_ready("web-0")[0];
    assert_eq!(records[0].json()["host"], address.as_str());
    let owner = other.registry.get("/registrar/east/owner").unwrap();
    assert_eq!(owner.value, other.plane.uid());
    fourth.stop().unwrap();
}
