//! Keys that a person or another program writes or removes.

use std::time::{Duration, Instant};

use serde_json::json;
use testbed::{always, eventually};

use crate::support::{A_SECOND, SOON, Stage, Watcher, tell};

#[test]
fn a_foreign_key_is_untouched_and_named_until_it_goes() {
    let stage = Stage::new("foreign");
    let _operator = stage.operator("east").start().unwrap();
    stage.create_pod("web-0", "web", &json!({}), &json!({}));
    stage.create_pod("web-1", "web", &json!({}), &json!({}));
    let key = |pod: &str| {
        format!(
            "{}east/{}:8080",
            stage.scope("web"),
            stage.wait_ready(pod)[0]
        )
    };
    let (taken, free) = (key("web-0"), key("web-1"));
    stage.registry.put(&taken, "mine", 0);
    let foreign = stage.registry.get(&taken).unwrap();
    stage.register("web", &json!({}));

    let message = stage.wait_condition("web", "Conflict", "True", "KeyTaken");
    assert!(message.contains(&taken), "{message}");
    stage.wait_condition("web", "Ready", "False", "Conflicting");
    // The other endpoint does not wait for it.
    stage.wait_keys(&stage.scope("web"), &{
        let mut both = [taken.clone(), free.clone()];
        both.sort();
        both
    });
    // Status and events follow the keys in their own time.
    eventually(SOON, "the free endpoint in the status and an event", || {
        let registered = stage.registration("web")["status"]["registered"].clone();
        let events = stage.kubectl(&["get", "events", "--field-selector=reason=Conflict"]);
        if registered == 1 && events.contains("serviceregistration/web") {
            Ok(())
        } else {
            Err(format!("{registered} registered; {events}"))
        }
    })
    .unwrap();

    // It stays as it is, also when the pod goes and comes, and when the registration goes.
    stage.set_ready("web-0", false);
    stage.wait_condition("web", "Conflict", "False", "NoConflict");
    stage.set_ready("web-0", true);
    stage.wait_condition("web", "Conflict", "True", "KeyTaken");
    assert_eq!(stage.registry.get(&taken).unwrap(), foreign);

    stage.registry.delete(&taken);
    eventually(A_SECOND, "the key to be ours", || {
        stage
            .registry
            .get(&taken)
            .filter(|record| record.lease != 0)
            .ok_or("not there")
    })
    .unwrap();
    stage.wait_condition("web", "Conflict", "False", "NoConflict");
    stage.wait_condition("web", "Ready", "True", "Registered");

    // Once more, for a registration that is deleted.
    stage.set_ready("web-0", false);
    stage.wait_keys(&stage.scope("web"), &[free.as_str()]);
    stage.registry.put(&taken, "mine", 0);
    stage.unregister("web");
    stage.wait_keys(&stage.scope("web"), &[taken.as_str()]);
    assert_eq!(stage.registry.get(&taken).unwrap().value, "mine");
}

#[test]
fn a_record_that_is_deleted_or_altered_by_hand_is_back_within_a_second() {
    let stage = Stage::new("drift");
    let _operator = stage.operator("east").start().unwrap();
    stage.register("web", &json!({}));
    stage.create_pod("web-0", "web", &json!({}), &json!({}));
    let record = stage.wait_count(&stage.scope("web"), 1).remove(0);
    let all = Watcher::start(&stage.etcd, "/services/");
    let back = |what: &str| {
        let start = Instant::now();
        eventually(A_SECOND, what, || {
            let now = stage.registry.get(&record.key);
            if now
                .as_ref()
                .is_some_and(|now| now.value == record.value && now.lease == record.lease)
            {
                Ok(())
            } else {
                Err(format!("{now:?}"))
            }
        })
        .unwrap();
        let took = start.elapsed();
        let others = all
            .seen()
            .iter()
            .filter(|seen| seen.key != record.key)
            .count();
        assert_eq!(others, 0);
        tell(what, others, took);
    };
    stage.etcd.etcdctl(&["del", &record.key]).unwrap();
    back("a deleted record");
    stage.etcd.etcdctl(&["put", &record.key, "x"]).unwrap();
    back("an overwritten record");
    stage
        .etcd
        .etcdctl(&["put", &record.key, &record.value])
        .unwrap();
    back("a record without its lease");
    // Whoever writes it again and again is answered once a second.
    let watcher = Watcher::start(&stage.etcd, &record.key);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        stage.registry.put(&record.key, "z", 0);
        std::thread::sleep(Duration::from_millis(20));
    }
    let repairs = watcher
        .seen()
        .iter()
        .filter(|seen| seen.put.as_ref().is_some_and(|put| put.lease != 0))
        .count();
    assert!((2..=4).contains(&repairs), "{repairs} in 3 s");
    back("a record that was written again and again");
    let granted = stage.etcd.etcdctl(&["lease", "grant", "600"]).unwrap();
    let other = granted.split(' ').nth(1).unwrap();
    let moved = format!("--lease={other}");
    stage
        .etcd
        .etcdctl(&["put", &moved, &record.key, &record.value])
        .unwrap();
    back("a record on another lease");
    stage.etcd.etcdctl(&["del", &record.key]).unwrap();
    stage.etcd.etcdctl(&["put", &record.key, "y"]).unwrap();
    // Deleted and put anew it is another's key, unless the operator was faster: then it is ours and put back.
    eventually(SOON, "a conflict or the record", || {
        let now = stage.registry.get(&record.key);
        let conflict = crate::support::condition(&stage.registration("web"), "Conflict");
        match now {
            Some(now) if now.value == record.value => Ok(()),
            Some(now) if now.value == "y" && conflict["status"] == "True" => Ok(()),
            other => Err(format!("{other:?}, {conflict}")),
        }
    })
    .unwrap();
}

#[test]
fn records_whose_lease_is_revoked_by_hand_are_back_on_a_new_one() {
    let stage = Stage::new("revoked");
    let _operator = stage.operator("east").start().unwrap();
    stage.register("web", &json!({}));
    for name in ["web-0", "web-1", "web-2"] {
        stage.create_pod(name, "web", &json!({}), &json!({}));
    }
    let old = stage.wait_count(&stage.scope("web"), 3);
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));
    stage.registry.revoke(old[0].lease);
    let start = Instant::now();
    let new = eventually(A_SECOND, "three records on a new lease", || {
        let records = stage.registry.try_list(&stage.scope("web"))?;
        if records.len() == 3 {
            Ok(records)
        } else {
            Err(format!("{records:#?}"))
        }
    })
    .unwrap();
    let took = start.elapsed();
    let seen = watcher.seen();
    assert_eq!(seen.len(), 6, "{seen:#?}");
    tell("a lease revoked by hand", seen.len(), took);
    for (new, old) in new.iter().zip(&old) {
        assert_eq!((&new.key, &new.value), (&old.key, &old.value));
        assert_ne!(new.lease, old.lease);
    }
    let slots = format!("/registrar/east/leases/{}/", stage.plane.uid());
    stage.wait_count(&slots, 1);
}

#[test]
fn the_operators_own_keys_are_back_within_a_second_and_no_reader_sees_it() {
    let stage = Stage::new("own-keys");
    let operator = stage.operator("east").start().unwrap();
    stage.register("web", &json!({}));
    for name in ["web-0", "web-1", "web-2"] {
        stage.create_pod(name, "web", &json!({}), &json!({}));
    }
    stage.wait_count(&stage.scope("web"), 3);
    let watcher = Watcher::start(&stage.etcd, "/services/");
    let slots = format!("/registrar/east/leases/{}/", stage.plane.uid());
    let slot = stage.wait_count(&slots, 1).remove(0);
    let mark = stage.registry.list("/registrar/east/seen/").remove(0);
    let owner = stage.registry.get("/registrar/east/owner").unwrap();
    for (record, same_lease) in [(&slot, true), (&owner, false), (&mark, false)] {
        stage.registry.delete(&record.key);
        eventually(A_SECOND, &record.key, || {
            let now = stage.registry.get(&record.key);
            match &now {
                Some(now) if now.lease == record.lease => Ok(()),
                Some(now) if now.lease != 0 && !same_lease => Ok(()),
                _ => Err(format!("{now:?}")),
            }
        })
        .unwrap();
        watcher.assert_silent(format!("after {} was deleted", record.key));
    }
    let leader = stage.registry.get("/registrar/east/leader").unwrap();
    stage.registry.delete(&leader.key);
    eventually(A_SECOND, "a leader", || {
        stage.registry.get(&leader.key).ok_or("none")
    })
    .unwrap();
    watcher.assert_silent("after the leader key was deleted");

    // All of them at once.
    for record in [&slot, &owner, &mark, &leader] {
        stage.registry.delete(&record.key);
    }
    eventually(A_SECOND + A_SECOND, "all of them", || {
        for record in [&slot, &owner, &leader] {
            if stage.registry.get(&record.key).is_none() {
                return Err(record.key.clone());
            }
        }
        Ok(())
    })
    .unwrap();
    always(A_SECOND, "the operator", || {
        if operator.process().is_running() {
            Ok(())
        } else {
            Err("ended")
        }
    })
    .unwrap();
    watcher.assert_silent("after all of them were deleted");
    // And it works.
    stage.set_ready("web-1", false);
    stage.wait_count(&stage.scope("web"), 2);
}
