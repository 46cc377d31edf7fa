//! The main job: Deployments and registrations with kubectl alone.

use std::collections::BTreeSet;
use std::time::Duration;

use testbed::eventually;

use crate::support::{Record, SOON, Stage, Watcher, addresses, deployment, keys, registration};

/// The keys that the ready pods of the Deployment `web` should have in the cluster `east`.
fn wanted(stage: &Stage) -> Result<Vec<String>, String> {
    let mut wanted: Vec<String> = stage
        .ready_pods("web")?
        .iter()
        .map(|pod| format!("{}east/{}:8080", stage.scope("web"), addresses(pod)[0]))
        .collect();
    wanted.sort();
    Ok(wanted)
}

/// Waits until etcd has exactly what Kubernetes has, and that is `count` endpoints.
fn converged(stage: &Stage, count: usize) -> Vec<Record> {
    eventually(SOON, &format!("{count} endpoints"), || {
        let wanted = wanted(stage)?;
        let records = stage.registry.try_list(&stage.scope("web"))?;
        if wanted.len() == count && keys(&records) == wanted {
            Ok(records)
        } else {
            Err(format!("{:#?} instead of {wanted:#?}", keys(&records)))
        }
    })
    .unwrap()
}

#[test]
fn endpoints_follow_a_deployment_and_leave_nothing_behind() {
    let stage = Stage::new("basic");
    stage.registry.put("/services/other", "mine", 0);
    let operator = stage.operator("east").start().unwrap();
    // What is there without any registration: the owner's and the leader's leases.
    eventually(SOON, "a leader", || {
        stage
            .registry
            .get("/registrar/east/leader")
            .ok_or("no leader")
    })
    .unwrap();
    let outside = |records: Vec<Record>| -> BTreeSet<String> {
        let scope = stage.scope("web");
        // The marks come with the first write, and are on the owner's lease.
        keys(&records)
            .into_iter()
            .filter(|key| !key.starts_with(&scope) && !key.starts_with("/registrar/east/seen/"))
            .collect()
    };
    let before = outside(stage.registry.list(""));
    let leases = stage.registry.leases();
    assert_eq!(leases.len(), 2, "owner and leader: {leases:?}");
    let slots = format!("/registrar/east/leases/{}/", stage.plane.uid());

    stage.apply(&deployment("web", 3).to_string());
    stage.apply(&registration("web", &serde_json::json!({"leaseTTLSeconds": 33})).to_string());
    let records = converged(&stage, 3);
    for record in &records {
        let (granted, left) = stage.registry.ttl(record.lease);
        assert_eq!(granted, 33);
        assert!(left > 15, "{left}");
        assert_eq!(record.json()["cluster"], "east");
    }
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));
    stage.kubectl(&["scale", "deployment/web", "--replicas=5"]);
    converged(&stage, 5);
    // What stayed was not touched.
    let seen = watcher.seen();
    assert!(
        seen.len() == 2 && seen.iter().all(|seen| seen.put.is_some()),
        "{seen:#?}"
    );
    // A rolling update replaces each of them, and etcd follows.
    let uids = |records: &[Record]| -> Vec<String> {
        let uid = |record: &Record| record.json()["uid"].to_string();
        records.iter().map(uid).collect()
    };
    let old = uids(&stage.registry.list(&stage.scope("web")));
    stage.kubectl(&["rollout", "restart", "deployment/web"]);
    stage.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    eventually(SOON, "records of new pods alone", || {
        let new = uids(&converged(&stage, 5));
        if new.iter().any(|uid| old.contains(uid)) {
            Err(format!("{new:?} after {old:?}"))
        } else {
            Ok(())
        }
    })
    .unwrap();
    watcher.forget();
    stage.kubectl(&["scale", "deployment/web", "--replicas=0"]);
    converged(&stage, 0);
    assert_eq!(watcher.seen().len(), 5);
    // An empty slot is given back although the registration lives; it waits some seconds for new endpoints.
    eventually(SOON, "the slots to be revoked", || {
        let slots = stage.registry.try_list(&slots)?;
        if slots.is_empty() {
            Ok(())
        } else {
            Err(format!("{slots:?}"))
        }
    })
    .unwrap();
    assert_eq!(stage.registry.leases(), leases);

    stage.kubectl(&["scale", "deployment/web", "--replicas=2"]);
    converged(&stage, 2);
    let start = std::time::Instant::now();
    stage.kubectl(&["delete", "sreg", "web"]);
    stage.wait_keys::<&str>(&stage.scope("web"), &[]);
    eventually(SOON, "the leases as before", || {
        let now = stage.registry.leases();
        if now == leases {
            Ok(())
        } else {
            Err(format!("{now:?}"))
        }
    })
    .unwrap();
    // Nothing will come for a deleted registration, so that its slot goes at once.
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(outside(stage.registry.list("")), before);
    assert_eq!(stage.registry.get("/services/other").unwrap().value, "mine");
    operator.stop().unwrap();
}
