//! Schedules that are made by hand: each shows what one guard of the protocol stops, where chance seldom does.
//!
//! Takes nothing, gives nothing: what breaks without the guard is seen by the checks of every run, by what stands
//! in etcd at the end, or by who leads. The shape of transactions is not looked at. Must never look at what an
//! engine believes, but to make sure that it came to what is to be shown.

use etcd_registrar::api::{FormatType, Port, PortProtocol};
use etcd_registrar::engine::io::Resource;
use etcd_registrar::model::endpoint::Protocol;
use etcd_registrar::model::etcd::{Op, Request, Txn};
use etcd_registrar::model::pod::{ContainerPort, Node, Pod};

use crate::model_etcd::{GoesOn, show};
use crate::scenario;
use crate::world::{
    self, Knobs, MILLISECOND, REGISTRAR, RESOURCES, SECOND, World, election, is_record, key,
};
use crate::{Named, calm_down};

/// So many choices of delays.
const SEEDS: u64 = 5;

fn txn(request: &Request) -> Option<&Txn> {
    match request {
        Request::Txn(txn) => Some(txn),
        _ => None,
    }
}

fn changes(request: &Request, which: impl Fn(&[u8]) -> bool) -> bool {
    txn(request).is_some_and(|txn| {
        let mut ops = txn.then.iter();
        ops.any(|op| matches!(op, Op::Put(key, ..) | Op::Delete(key) if which(key)))
    })
}

fn stands(request: &Request) -> bool {
    txn(request).and_then(election).is_some()
}

fn claims(request: &Request) -> bool {
    let owner = key(&format!("{REGISTRAR}owner"));
    changes(request, |key| *key == *owner)
}

fn writes(request: &Request) -> bool {
    changes(request, is_record)
}

fn is_barrier(request: &Request) -> bool {
    let seen = format!("{REGISTRAR}seen/");
    !writes(request) && changes(request, |key| key.starts_with(seen.as_bytes()))
}

fn is_revoke(request: &Request) -> bool {
    matches!(request, Request::Revoke(_))
}

fn run_while(world: &mut World, what: &str, within: u64, goes_on: impl Fn(&mut World) -> bool) {
    let end = world.now + within;
    while goes_on(world) {
        assert!(world.now < end, "not {what}:\n{}", world.summary());
        world.run_until(world.now + MILLISECOND);
    }
}

fn delete_by_hand(world: &mut World, name: &str) {
    scenario::by_hand(world, Op::Delete(key(&format!("{REGISTRAR}{name}"))));
}

fn web(world: &mut World) {
    let web = scenario::registration("web", FormatType::Json, None);
    scenario::put(world, web);
    world.wake_all();
}

/// A ready pod.
fn ready(world: &mut World, number: usize) -> Pod {
    let ip = format!("10.0.0.{number}");
    let pod = scenario::pod(world, &format!("web-{number}"), &[&ip]);
    scenario::put_pod(world, pod.clone());
    pod
}

fn turn(world: &mut World, pod: &Pod, ready: bool) {
    let mut pod = pod.clone();
    pod.ready = ready;
    scenario::put_pod(world, pod);
}

/// Two replicas with a registration and a pod, at rest; which leads, and which does not.
fn two(seed: u64) -> (World, usize, usize, Pod) {
    let knobs = Knobs {
        replicas: 2,
        ..Knobs::default()
    };
    let mut world = World::new(seed, knobs, false);
    world.checks.shapeless = true;
    web(&mut world);
    let pod = ready(&mut world, 1);
    world.start(0);
    world.start(1);
    calm_down(&mut world);
    // Bookmarks bring both beyond the marks, and both wait for the leader key.
    world.run_until(world.now + 5 * SECOND);
    let leader = world.leader().expect("a leader");
    (world, leader, 1 - leader, pod)
}

/// The leader key goes, without the leader hearing of it, until the other replica leads.
fn depose(world: &mut World, leader: usize, other: usize) {
    world.deafen(leader, "", world.now + 10 * SECOND);
    delete_by_hand(world, "leader");
    run_while(world, "led by the other replica", 5 * SECOND, |world| {
        !world.numbers(other).leads
    });
    assert!(world.numbers(leader).leads, "it heard of it");
    // The other one does not act before it.
    world.stall(other, &RESOURCES, world.now + 5 * SECOND);
}

/// A leader that does not know that it is none any more hears of a change, and hears in the end that it may not
/// write it.
fn tries_to_write(world: &mut World, leader: usize, pod: &Pod) {
    let answered = |world: &mut World| {
        let numbers = world.numbers(leader);
        numbers.transactions_compared + numbers.transactions_done
    };
    let before = answered(world);
    turn(world, pod, false);
    run_while(world, "tried", 5 * SECOND, |world| {
        answered(world) == before
    });
}

/// All is right once everyone hears of everything.
fn ends_well(world: &mut World, records: usize) {
    world.run_until(world.now + 15 * SECOND);
    calm_down(world);
    assert_eq!(world.expected().len(), records);
}

#[test]
fn a_deposed_leader_that_has_not_heard_of_it_changes_nothing() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let (mut world, leader, other, pod) = two(seed);
        depose(&mut world, leader, other);
        tries_to_write(&mut world, leader, &pod);
        ends_well(&mut world, 0);
    }
}

/// Its own election reaches etcd a second time, after the term of another replica.
#[test]
fn a_leader_changes_nothing_under_a_leader_key_of_its_that_came_later() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let (mut world, first, leader, pod) = two(seed);
        world.repeat(leader, stands);
        delete_by_hand(&mut world, "leader");
        // Who stands again wins as often as not.
        run_while(&mut world, "led by the one", 30 * SECOND, |world| {
            if world.numbers(first).leads {
                delete_by_hand(world, "leader");
                world.run_until(world.now + SECOND);
            }
            !world.numbers(leader).leads
        });
        calm_down(&mut world);
        let nonce = |world: &World| world.leader_key().map(|kv| kv.value.clone());
        let won = nonce(&world);
        depose(&mut world, leader, first);
        assert_ne!(nonce(&world), won);
        world.crash(first);
        delete_by_hand(&mut world, "leader");
        while nonce(&world) != won {
            // All that it had stood for election with, the last one at the end.
            assert!(world.held(leader, stands) > 0);
            delete_by_hand(&mut world, "leader");
            world.let_go(leader, stands);
        }
        tries_to_write(&mut world, leader, &pod);
        world.start(first);
        ends_well(&mut world, 0);
    }
}

/// etcd is restored, and another replica is elected at the very revision at which the leader of before was.
#[test]
fn a_leader_changes_nothing_under_the_leader_key_of_another_in_a_restored_etcd() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let (mut world, leader, other, pod) = two(seed);
        world.hold_back(other, stands);
        delete_by_hand(&mut world, "leader");
        world.save();
        let aside = key("/registrar/elsewhere");
        let put = |world: &mut World| {
            scenario::by_hand(world, Op::Put(aside.clone(), Box::default(), 0));
        };
        for _ in 0..20 {
            put(&mut world);
        }
        run_while(&mut world, "led", 5 * SECOND, |world| {
            !(world.leader_key().is_some() && world.numbers(leader).leads)
        });
        calm_down(&mut world);
        let won_at = world.leader_key().map_or(0, |kv| kv.create_revision);
        world.deafen(leader, "", world.now + 15 * SECOND);
        let before = world.held(other, stands);
        world.restore(GoesOn::Back);
        run_while(&mut world, "stood for", 5 * SECOND, |world| {
            world.held(other, stands) == before
        });
        for _ in 0..before {
            // Of before the restore.
            world.let_go(other, stands);
        }
        assert!(world.leader_key().is_none() && world.etcd.revision < won_at);
        while world.etcd.revision + 1 < won_at {
            put(&mut world);
        }
        world.let_go(other, stands);
        let same = world.leader_key().map(|kv| kv.create_revision);
        assert_eq!(same, Some(won_at));
        world.hold_back_no_more(other);
        assert!(world.numbers(leader).leads, "it heard of it");
        world.stall(other, &RESOURCES, world.now + 5 * SECOND);
        tries_to_write(&mut world, leader, &pod);
        ends_well(&mut world, 0);
    }
}

/// A registration moved to another prefix and, since etcd was saved, back on the lease of before: of what is restored the
/// leader reads the leases and the one prefix first.
#[test]
fn a_leader_deletes_no_old_key_because_of_a_new_one_that_a_restore_took_away() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let (mut world, leader, _, _) = two(seed);
        let stand = |world: &World, prefix: &str| {
            let all = world.etcd.below(prefix);
            all.iter().filter(|kv| is_record(&kv.key)).count()
        };
        let records = |world: &World| (stand(world, "/services/"), stand(world, "/alt/"));
        let move_to = |world: &mut World, prefix: Option<&str>, wanted: (usize, usize)| {
            let moved = scenario::registration("web", FormatType::Json, prefix);
            scenario::put(world, moved);
            world.wake_all();
            run_while(world, "moved", 5 * SECOND, |world| records(world) != wanted);
            // Soon enough that the lease of before is not revoked yet.
            let leases = world.etcd.below(&format!("{REGISTRAR}leases/"));
            assert_eq!(leases.len(), 2);
        };
        move_to(&mut world, Some("/alt/"), (0, 1));
        world.save();
        move_to(&mut world, None, (1, 0));
        world.run_until(world.now + SECOND);
        let hears = world.now + 3 * SECOND;
        world.deafen(leader, "/services/", hears);
        world.restore(GoesOn::Above);
        assert_eq!(records(&world), (0, 1));
        while world.now < hears {
            world.run_until(world.now + MILLISECOND);
            assert!(world.numbers(leader).leads, "it is to write if it may");
            assert_eq!(stand(&world, "/alt/"), 1, "nothing stands");
        }
        ends_well(&mut world, 1);
    }
}

/// A restored etcd comes to the very revision of a mark in the etcd before, when that is put alone.
#[test]
fn a_late_write_does_not_pass_its_barrier_with_a_revision_of_another_etcd() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let (mut world, leader, _, pod) = two(seed);
        world.save();
        let aside = key("/registrar/elsewhere");
        let put = |world: &mut World| {
            scenario::by_hand(world, Op::Put(aside.clone(), Box::default(), 0));
        };
        for _ in 0..20 {
            put(&mut world);
        }
        // The mark of the lane of its key is the newest.
        for is_ready in [false, true] {
            turn(&mut world, &pod, is_ready);
            calm_down(&mut world);
        }
        let mark = |world: &World| {
            let marks = world.etcd.below(&format!("{REGISTRAR}seen/"));
            marks.iter().map(|kv| kv.mod_revision).max()
        };
        let before = mark(&world);
        world.restore(GoesOn::Back);
        world.hold_back(leader, writes);
        turn(&mut world, &pod, false);
        run_while(&mut world, "written", 5 * SECOND, |world| {
            world.held(leader, writes) == 0
        });
        while Some(world.etcd.revision + 1) < before {
            put(&mut world);
        }
        run_while(&mut world, "at that mark", 5 * SECOND, |world| {
            mark(world) != before
        });
        let stands = |world: &World| world.etcd.all().any(|kv| is_record(&kv.key));
        assert!(stands(&world));
        world.let_go(leader, writes);
        assert!(stands(&world), "it passed");
        world.hold_back_no_more(leader);
        ends_well(&mut world, 0);
    }
}

#[test]
fn a_leader_changes_nothing_while_nobody_has_the_name() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let (mut world, leader, _, pod) = two(seed);
        world.deafen(leader, "", world.now + 10 * SECOND);
        delete_by_hand(&mut world, "owner");
        tries_to_write(&mut world, leader, &pod);
        ends_well(&mut world, 0);
    }
}

#[test]
fn the_barrier_of_a_deposed_leader_puts_no_mark() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let (mut world, leader, other, pod) = two(seed);
        world.hold_back(leader, |request| writes(request) || is_barrier(request));
        turn(&mut world, &pod, false);
        // Its write is given up, and so is its barrier.
        run_while(&mut world, "at the barrier", 5 * SECOND, |world| {
            world.held(leader, is_barrier) == 0
        });
        depose(&mut world, leader, other);
        world.let_go(leader, is_barrier);
        world.hold_back_no_more(leader);
        ends_well(&mut world, 0);
    }
}

/// What a leader has heard of a later term without hearing of that: a record in dispute is read together with the
/// key of its lease.
#[test]
fn a_lease_of_a_later_term_is_not_revoked() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let (mut world, leader, other, _) = two(seed);
        let long = world.now + 60 * SECOND;
        world.stall(leader, &[Resource::Pods], long);
        world.deafen(leader, REGISTRAR, long);
        delete_by_hand(&mut world, "leader");
        run_while(&mut world, "led by the other", 5 * SECOND, |world| {
            !world.numbers(other).leads
        });
        let second = ready(&mut world, 2);
        let stands = |world: &World| {
            let all: Vec<_> = world.etcd.all().filter(|kv| is_record(&kv.key)).collect();
            all.len() == 2
        };
        run_while(&mut world, "put", 5 * SECOND, |world| !stands(world));
        // The first leader reads the record, and only then hears of its pod.
        world.run_until(world.now + SECOND);
        let now = world.now;
        world.stall(leader, &[Resource::Pods], now);
        world.run_until(world.now + 2 * SECOND);
        assert!(world.numbers(leader).leads, "it wrote");
        // It wants nothing any more, and the other one does not hear why.
        world.stall(other, &[Resource::Registrations], long);
        let mut suspended = scenario::registration("web", FormatType::Json, None);
        if let Ok(spec) = &mut suspended.spec {
            spec.suspend = true;
        }
        scenario::put(&mut world, suspended);
        world.wake_all();
        world.run_until(world.now + SECOND);
        world.hold_back(leader, is_revoke);
        turn(&mut world, &second, false);
        run_while(&mut world, "gone", 5 * SECOND, |world| stands(world));
        world.run_until(world.now + 4 * SECOND);
        assert!(world.numbers(leader).leads, "it wrote");
        turn(&mut world, &second, true);
        run_while(&mut world, "back", 5 * SECOND, |world| !stands(world));
        while world.held(leader, is_revoke) > 0 {
            world.let_go(leader, is_revoke);
        }
        assert!(stands(&world));
        let now = world.now;
        world.deafen(leader, "", now);
        world.stall(other, &[Resource::Registrations], now);
        web(&mut world);
        world.run_until(world.now + 5 * SECOND);
        calm_down(&mut world);
        assert_eq!(world.expected().len(), 2);
    }
}

/// Someone put a key of their own on a lease of the operator, where it does not look: it ends with that lease.
#[test]
fn a_lease_is_not_revoked_while_something_stands_on_it_that_is_not_followed() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let (mut world, _, _, pod) = two(seed);
        let leases = format!("{REGISTRAR}leases/");
        let lease = world.etcd.below(&leases).first().map_or(0, |kv| kv.lease);
        let aside = key("/elsewhere");
        scenario::by_hand(&mut world, Op::Put(aside.clone(), Box::default(), lease));
        turn(&mut world, &pod, false);
        world.run_until(world.now + 30 * SECOND);
        assert!(world.etcd.get(&aside).is_some(), "it went with the lease");
        scenario::by_hand(&mut world, Op::Delete(aside));
        run_while(&mut world, "revoked", 30 * SECOND, |world| {
            !world.etcd.below(&leases).is_empty()
        });
        ends_well(&mut world, 0);
    }
}

/// One replica of each of two clusters.
fn two_clusters(seed: u64) -> World {
    let knobs = Knobs {
        intruders: 1,
        records_may_expire: true,
        ..Knobs::default()
    };
    let mut world = World::new(seed, knobs, false);
    world.checks.shapeless = true;
    world
}

fn owner(world: &World) -> Option<String> {
    let owner = world.etcd.get(format!("{REGISTRAR}owner").as_bytes());
    owner.map(|kv| crate::model_etcd::show(&kv.value))
}

/// Another cluster asks for the name, and etcd hears of it when the name is in use.
fn claims_late(world: &mut World) {
    world.start(1);
    world.hold_back(1, claims);
    run_while(world, "claimed", 5 * SECOND, |world| {
        world.held(1, claims) == 0
    });
    world.start(0);
    run_while(world, "led", 10 * SECOND, |world| !world.numbers(0).leads);
}

#[test]
fn a_name_whose_cluster_has_leases_is_not_taken() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let mut world = two_clusters(seed);
        web(&mut world);
        ready(&mut world, 1);
        claims_late(&mut world);
        run_while(&mut world, "put", 5 * SECOND, |world| {
            !world.etcd.all().any(|kv| is_record(&kv.key))
        });
        world.crash(0);
        delete_by_hand(&mut world, "leader");
        delete_by_hand(&mut world, "owner");
        world.let_go(1, claims);
        assert_eq!(owner(&world), None);
    }
}

#[test]
fn a_name_under_which_another_cluster_leads_is_not_taken() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let mut world = two_clusters(seed);
        claims_late(&mut world);
        delete_by_hand(&mut world, "owner");
        world.let_go(1, claims);
        assert_eq!(owner(&world), None);
    }
}

/// A late election of a cluster whose name is another's by now would hold that one up.
#[test]
fn who_has_lost_the_name_is_not_elected() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let mut world = two_clusters(seed);
        world.start(0);
        world.hold_back(0, stands);
        run_while(&mut world, "stood for", 5 * SECOND, |world| {
            world.held(0, stands) == 0
        });
        // It hears nothing of all that follows, and keeps its leases alive.
        world.deafen(0, "", world.now + 60 * SECOND);
        delete_by_hand(&mut world, "owner");
        world.start(1);
        world.hold_back(1, stands);
        run_while(&mut world, "stood for", 10 * SECOND, |world| {
            world.held(1, stands) == 0
        });
        assert_eq!(owner(&world).as_deref(), Some(world::CLUSTER_UIDS[1]));
        world.let_go(0, stands);
        world.hold_back_no_more(1);
        run_while(&mut world, "led by its owner", 10 * SECOND, |world| {
            !world.numbers(1).leads
        });
    }
}

/// One replica with a registration and a pod, at rest.
fn one(seed: u64) -> World {
    let mut world = World::new(seed, Knobs::default(), false);
    world.checks.shapeless = true;
    web(&mut world);
    ready(&mut world, 1);
    world.start(0);
    calm_down(&mut world);
    world
}

#[test]
fn what_stood_on_a_lease_that_is_gone_is_put_on_another() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let mut world = one(seed);
        let lease = |world: &World| {
            let record = world.etcd.all().find(|kv| is_record(&kv.key));
            record.map(|kv| kv.lease)
        };
        let lost = lease(&world).expect("a record");
        scenario::request_by_hand(&mut world, &Request::Revoke(lost));
        assert_eq!(lease(&world), None);
        calm_down(&mut world);
        assert!(lease(&world).is_some_and(|lease| lease != lost));
    }
}

/// Two pods have one address: the later one counts, until it is not ready any more. A record that does not say
/// whose it is passes to the first one then, without a change in etcd, and another registration wants that one alone.
#[test]
fn who_waits_for_an_address_goes_on_when_a_record_passes_to_its_pod() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let mut world = World::new(seed, Knobs::default(), false);
        let plain = scenario::registration("web", FormatType::Plain, Some("plain/"));
        scenario::put(&mut world, plain);
        let mut only_first = scenario::registration("api", FormatType::Json, None);
        if let Ok(spec) = &mut only_first.spec {
            spec.selector.match_labels = Some([("first".to_owned(), "yes".to_owned())].into());
        }
        scenario::put(&mut world, only_first);
        let mut first = scenario::pod(&mut world, "first", &["10.0.0.1"]);
        first.labels.push(("first".into(), "yes".into()));
        scenario::put_pod(&mut world, first);
        world.start(0);
        calm_down(&mut world);
        assert_eq!(world.expected().len(), 2);
        let second = ready(&mut world, 1);
        calm_down(&mut world);
        assert_eq!(world.expected().len(), 1);
        turn(&mut world, &second, false);
        calm_down(&mut world);
        assert_eq!(world.expected().len(), 2);
    }
}

/// A record was put and not read yet when its registration is suspended, or can't be read any more.
#[test]
fn what_is_kept_counts_when_it_was_read() {
    for suspended in [true, false] {
        for seed in 0..SEEDS {
            let _named = Named(seed);
            let mut world = one(seed);
            world.deafen(0, "/services/", world.now + 10 * SECOND);
            let before = world.numbers(0).puts;
            ready(&mut world, 2);
            run_while(&mut world, "put", 5 * SECOND, |world| {
                world.numbers(0).puts == before
            });
            let mut kept = scenario::registration("web", FormatType::Json, None);
            match &mut kept.spec {
                Ok(spec) if suspended => spec.suspend = true,
                spec => *spec = Err("unknown variant".into()),
            }
            scenario::put(&mut world, kept);
            world.wake_all();
            let told = |world: &World| {
                let web = world.kube.registrations.get("shop/web");
                let status = web.and_then(|web| web.status.clone());
                status.and_then(|status| status.registered)
            };
            // The checks look at every status.
            world.run_until(world.now + 5 * SECOND);
            assert_eq!(told(&world), Some(1));
            world.run_until(world.now + 10 * SECOND);
            assert_eq!(told(&world), Some(2));
        }
    }
}

#[test]
fn a_late_write_changes_nothing_that_a_person_put_there_meanwhile() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let mut world = one(seed);
        world.hold_back(0, writes);
        ready(&mut world, 2);
        run_while(&mut world, "sent", 5 * SECOND, |world| {
            world.held(0, writes) == 0
        });
        let foreign = key("/services/shop/web/east/10.0.0.2:8080");
        assert!(world.expected().keys().any(|wanted| key(wanted) == foreign));
        scenario::by_hand(&mut world, Op::Put(foreign.clone(), Box::default(), 0));
        world.let_go(0, writes);
        world.hold_back_no_more(0);
        world.run_until(world.now + 5 * SECOND);
        let stands = world.etcd.get(&foreign);
        assert!(stands.is_some_and(|kv| kv.value.is_empty()));
        scenario::by_hand(&mut world, Op::Delete(foreign));
        calm_down(&mut world);
    }
}

/// A record stands that its writer never heard of, and its pod has gone when another one has the address.
#[test]
fn what_a_write_of_unknown_outcome_did_is_read_before_anything_is_built_on_it() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let mut world = one(seed);
        let mut api = scenario::registration("api", FormatType::Json, None);
        if let Ok(spec) = &mut api.spec {
            spec.selector.match_labels = Some([("of".to_owned(), "api".to_owned())].into());
        }
        scenario::put(&mut world, api);
        world.wake_all();
        calm_down(&mut world);
        world.deafen(0, "/services/shop/web/", world.now + 15 * SECOND);
        world.hold_back(0, writes);
        let old = ready(&mut world, 2);
        run_while(&mut world, "sent", 5 * SECOND, |world| {
            world.held(0, writes) == 0
        });
        world.let_go(0, writes);
        scenario::remove_pod(&mut world, &old);
        let mut new = scenario::pod(&mut world, "new", &["10.0.0.2"]);
        new.labels = vec![("of".into(), "api".into())];
        scenario::put_pod(&mut world, new);
        world.run_until(world.now + 500 * MILLISECOND);
        world.hold_back_no_more(0);
        // The checks look whether two pods ever have the address.
        ends_well(&mut world, 2);
    }
}

/// A write is sent after a person took the mark of its lane away, and reaches etcd when that is done once more: what
/// it puts had been put again and deleted meanwhile.
#[test]
fn a_late_write_does_not_pass_because_the_mark_is_gone_again() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let mut world = one(seed);
        let take_marks = |world: &mut World| {
            for mark in world.etcd.below(&format!("{REGISTRAR}seen/")) {
                scenario::by_hand(world, Op::Delete(mark.key));
            }
        };
        let records = |world: &World| world.etcd.all().filter(|kv| is_record(&kv.key)).count();
        take_marks(&mut world);
        world.run_until(world.now + SECOND);
        world.hold_back(0, writes);
        let pod = ready(&mut world, 2);
        run_while(&mut world, "sent", 5 * SECOND, |world| {
            world.held(0, writes) == 0
        });
        world.hold_back_no_more(0);
        run_while(&mut world, "put", 5 * SECOND, |world| records(world) == 1);
        scenario::remove_pod(&mut world, &pod);
        run_while(&mut world, "gone", 5 * SECOND, |world| records(world) == 2);
        take_marks(&mut world);
        world.let_go(0, writes);
        assert_eq!(records(&world), 1);
        ends_well(&mut world, 1);
    }
}

/// A removal without space can't write its mark, and the next leader has not heard of what it removed.
#[test]
fn who_takes_over_after_a_removal_without_space_lists_first() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let (mut world, leader, other, pod) = two(seed);
        world.stall(other, &[Resource::Pods], world.now + 15 * SECOND);
        world.etcd.full = true;
        scenario::remove_pod(&mut world, &pod);
        run_while(&mut world, "gone", 5 * SECOND, |world| {
            world.etcd.all().any(|kv| is_record(&kv.key))
        });
        world.crash(leader);
        delete_by_hand(&mut world, "leader");
        world.etcd.full = false;
        run_while(&mut world, "led", 10 * SECOND, |world| {
            !world.numbers(other).leads
        });
        // The checks look whether the pod returns.
        world.run_until(world.now + SECOND);
        world.start(leader);
        ends_well(&mut world, 0);
    }
}

/// What happened to records since a place in the log of etcd: what, and below which prefix.
fn since(world: &World, from: usize) -> Vec<String> {
    let changes = world.etcd.log().iter().skip(from);
    let changes = changes.filter(|change| is_record(&change.key));
    let text = changes.map(|change| {
        let what = if change.after.is_some() {
            "put"
        } else {
            "delete"
        };
        let key = show(&change.key);
        format!("{what} {}", key.split('/').next().unwrap_or(""))
    });
    text.collect()
}

/// A pod and a registration were deleted and made anew under their names, and a node has another zone, when an old
/// cache lists what there was before.
#[test]
fn an_old_list_that_is_discarded_changes_nothing() {
    for resource in RESOURCES {
        for seed in 0..SEEDS {
            let _named = Named(seed);
            let mut world = World::new(seed, Knobs::default(), false);
            let node = |zone: &str| Node {
                name: "n1".into(),
                resource_version: 0,
                zone: zone.into(),
            };
            world.kube.put_node(node("eu-a"));
            // It selected other pods: no new key is waited for.
            let mut first = scenario::registration("web", FormatType::Json, None);
            if let Ok(spec) = &mut first.spec {
                spec.selector.match_labels = Some([("app".to_owned(), "b".to_owned())].into());
            }
            scenario::put(&mut world, first);
            let pod = ready(&mut world, 1);
            world.start(0);
            calm_down(&mut world);
            let old = world.kube.version;
            world.kube.put_node(node("eu-b"));
            world.checks.registration_changes(old + 2);
            world.kube.delete_registration("shop/web");
            let mut second = scenario::registration("web", FormatType::Json, None);
            second.uid = "of another web".into();
            scenario::put(&mut world, second);
            scenario::remove_pod(&mut world, &pod);
            ready(&mut world, 1);
            calm_down(&mut world);
            let from = world.etcd.log().len();
            world.relist_at(0, resource, old);
            world.run_until(world.now + 2 * SECOND);
            assert_eq!(since(&world, from), Vec::<String>::new(), "{resource:?}");
            calm_down(&mut world);
            assert_eq!(world.expected().len(), 1);
        }
    }
}

/// A record that does not say whose it is was put without its writer hearing so, and is to stand under another key when
/// it is read. `meanwhile`: what happens before its writer may write again.
fn put_unheard_and_moved(meanwhile: impl Fn(&mut World)) {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let mut world = World::new(seed, Knobs::default(), false);
        world.checks.shapeless = true;
        let plain = |prefix| scenario::registration("web", FormatType::Plain, Some(prefix));
        scenario::put(&mut world, plain("old/"));
        world.start(0);
        calm_down(&mut world);
        world.deafen(0, "old/", world.now + 10 * SECOND);
        world.hold_back(0, |request| writes(request) || is_barrier(request));
        ready(&mut world, 1);
        run_while(&mut world, "sent", 5 * SECOND, |world| {
            world.held(0, writes) == 0
        });
        let from = world.etcd.log().len();
        world.let_go(0, writes);
        scenario::put(&mut world, plain("new/"));
        world.wake_all();
        world.run_until(world.now + SECOND);
        meanwhile(&mut world);
        world.hold_back_no_more(0);
        ends_well(&mut world, 1);
        assert_eq!(since(&world, from), ["put old", "put new", "delete old"]);
    }
}

#[test]
fn a_record_of_unknown_outcome_goes_when_its_successor_stands() {
    put_unheard_and_moved(|_| {});
}

#[test]
fn a_record_of_unknown_outcome_goes_when_its_successor_stands_in_the_next_term_too() {
    put_unheard_and_moved(|world| {
        world.end_leader_lease();
        run_while(world, "deposed", 5 * SECOND, |world| world.numbers(0).leads);
    });
}

/// A registration moves and comes back before the removal of its old record was answered: that record still stands as
/// far as anybody knows, and does not any more.
#[test]
fn a_key_whose_removal_is_in_flight_is_no_successor() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let mut world = World::new(seed, Knobs::default(), false);
        world.checks.shapeless = true;
        let plain = |prefix| scenario::registration("web", FormatType::Plain, Some(prefix));
        scenario::put(&mut world, plain("old/"));
        ready(&mut world, 1);
        world.start(0);
        calm_down(&mut world);
        let from = world.etcd.log().len();
        world.hold_back(0, |request| {
            changes(request, |key| key.starts_with(b"old/")) || is_barrier(request)
        });
        scenario::put(&mut world, plain("new/"));
        world.wake_all();
        run_while(&mut world, "moved", 5 * SECOND, |world| {
            world.held(0, writes) == 0
        });
        scenario::put(&mut world, plain("old/"));
        world.wake_all();
        world.run_until(world.now + SECOND);
        world.let_go(0, writes);
        world.hold_back_no_more(0);
        ends_well(&mut world, 1);
        let expected = ["put new", "delete old", "put old", "delete new"];
        assert_eq!(since(&world, from), expected);
    }
}

/// Two registrations have records of one pod, in a format that names it but has no UID, and its zone changes while nobody
/// is there.
#[test]
fn records_that_changed_while_nobody_looked_are_known_by_name_and_address() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let mut world = World::new(seed, Knobs::default(), false);
        for name in ["web", "api"] {
            let micro = scenario::registration(name, FormatType::GoMicro, None);
            scenario::put(&mut world, micro);
        }
        ready(&mut world, 1);
        world.start(0);
        calm_down(&mut world);
        world.crash(0);
        world.kube.put_node(Node {
            name: "n1".into(),
            resource_version: 0,
            zone: "eu-a".into(),
        });
        let from = world.etcd.log().len();
        world.start(0);
        ends_well(&mut world, 2);
        // The keys begin with a slash.
        assert_eq!(since(&world, from), ["put ", "put "]);
    }
}

/// Two pods move into one record; its put is answered before or after the watch shows it, as chance has it.
#[test]
fn the_old_keys_of_all_pods_go_when_their_one_successor_was_read() {
    for seed in 0..4 * SEEDS {
        let _named = Named(seed);
        let mut world = one(seed);
        ready(&mut world, 2);
        calm_down(&mut world);
        let mut web = scenario::registration("web", FormatType::Apisix, None);
        if let Ok(spec) = &mut web.spec {
            spec.ports
                .iter_mut()
                .for_each(|port| port.scheme = Some("http".into()));
        }
        scenario::put(&mut world, web);
        world.wake_all();
        ends_well(&mut world, 1);
    }
}

/// Removals are held, and the last of three pods is held when its record is written.
fn held(seed: u64, format: FormatType) -> (World, Pod) {
    let knobs = Knobs {
        holds: true,
        ..Knobs::default()
    };
    let mut world = World::new(seed, knobs, false);
    world.checks.shapeless = true;
    let web = scenario::registration("web", format, Some("web/"));
    scenario::put(&mut world, web);
    ready(&mut world, 1);
    ready(&mut world, 2);
    let last = ready(&mut world, 3);
    world.start(0);
    calm_down(&mut world);
    (world, last)
}

fn has_record_of(world: &World, address: &str) -> bool {
    let mut records = world.etcd.all().filter(|kv| is_record(&kv.key));
    records.any(|kv| show(&kv.key).ends_with(address))
}

/// Another pod has the address and is not ready, and the record is that of the one before still, which was deleted.
#[test]
fn the_record_of_a_deleted_pod_is_not_held_for_who_has_its_address() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let (mut world, old) = held(seed, FormatType::Json);
        world.hold_back(0, |request| writes(request) || is_barrier(request));
        let new = ready(&mut world, 3);
        run_while(&mut world, "sent", 5 * SECOND, |world| {
            world.held(0, writes) == 0
        });
        scenario::remove_pod(&mut world, &old);
        turn(&mut world, &new, false);
        world.run_until(world.now + SECOND);
        assert!(has_record_of(&world, "/10.0.0.3:8080"));
        world.hold_back_no_more(0);
        world.run_until(world.now + 5 * SECOND);
        assert!(!has_record_of(&world, "/10.0.0.3:8080"));
    }
}

/// A record is held that does not tell its protocol, and another pod has the address with another one.
#[test]
fn what_is_held_is_not_in_the_way_of_another_pod() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let (mut world, last) = held(seed, FormatType::Plain);
        turn(&mut world, &last, false);
        world.run_until(world.now + 2 * SECOND);
        assert!(has_record_of(&world, "web/10.0.0.3:8080"), "it is not held");
        let mut dns = scenario::registration("dns", FormatType::Plain, Some("dns/"));
        if let Ok(spec) = &mut dns.spec {
            spec.selector.match_labels = Some([("of".to_owned(), "dns".to_owned())].into());
            spec.ports = vec![Port {
                name: "dns".into(),
                protocol: PortProtocol::Udp,
                ..Port::default()
            }];
        }
        scenario::put(&mut world, dns);
        let mut other = scenario::pod(&mut world, "dns-0", &["10.0.0.3"]);
        other.labels = vec![("of".into(), "dns".into())];
        other.ports = vec![ContainerPort {
            name: "dns".into(),
            port: 8080,
            host_port: 0,
            protocol: Protocol::Udp,
        }];
        scenario::put_pod(&mut world, other);
        world.run_until(world.now + 5 * SECOND);
        assert!(has_record_of(&world, "dns/10.0.0.3:8080"));
    }
}

/// The key of a lease is taken away by hand when a record on that lease is on its way.
#[test]
fn the_key_of_a_lease_that_goes_while_a_record_is_put_there_is_put_back() {
    for seed in 0..10 * SEEDS {
        let _named = Named(seed);
        let knobs = Knobs {
            hands: 1,
            ..Knobs::default()
        };
        let mut world = World::new(seed, knobs, false);
        world.checks.shapeless = true;
        web(&mut world);
        let first = ready(&mut world, 1);
        world.start(0);
        calm_down(&mut world);
        // Nothing else on the lease wants its key back.
        scenario::remove_pod(&mut world, &first);
        calm_down(&mut world);
        ready(&mut world, 2);
        let end = world.now + 5 * SECOND;
        while world.numbers(0).lanes_busy == 0 {
            assert!(world.now < end, "not sent");
            world.run_until(world.now + MILLISECOND / 10);
        }
        for lease in world.etcd.below(&format!("{REGISTRAR}leases/")) {
            scenario::by_hand(&mut world, Op::Delete(lease.key));
        }
        calm_down(&mut world);
        assert_eq!(world.expected().len(), 1);
    }
}

/// A removal could not be sent while the leader was live, and could be when it is so no more.
#[test]
fn a_leader_without_kubernetes_does_not_go_on_with_what_it_could_not_write_before() {
    for seed in 0..SEEDS {
        let _named = Named(seed);
        let mut world = one(seed);
        let pod = ready(&mut world, 2);
        calm_down(&mut world);
        let address = "/10.0.0.2:8080";
        assert!(has_record_of(&world, address));
        // It hears of the change, and no request of its that would follow it arrives.
        world.hold_back(0, writes);
        turn(&mut world, &pod, false);
        run_while(&mut world, "tried", 5 * SECOND, |world| {
            world.held(0, writes) == 0
        });
        world.cut_off(0, 40 * SECOND);
        // It is not live any more.
        world.run_until(world.now + 20 * SECOND);
        world.hold_back_no_more(0);
        world.run_until(world.now + 10 * SECOND);
        assert!(world.numbers(0).leads && !world.numbers(0).live);
        assert!(has_record_of(&world, address), "it went on");
        ends_well(&mut world, 1);
        assert!(!has_record_of(&world, address));
    }
}
