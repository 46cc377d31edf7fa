//! The whole operator but its IO, under a seeded model of Kubernetes and etcd.
//!
//! Every class of faults is a test of its own, over so many seeds that all of them take half a minute;
//! `SEEDS=2000` runs more. A seed that fails is printed, and is run again, with all that happens, by
//!
//! ```text
//! SEED=restarts:17 cargo test --test simulation replay -- --nocapture
//! ```
//!
//! | file | what |
//! |---|---|
//! | `model_etcd` | etcd: transactions, leases, the log of all changes |
//! | `model_kube` | Kubernetes: objects, resource versions, the log of its watches |
//! | `world` | the scheduler: messages with delays, processes, what the tasks around the engine do |
//! | `scenario` | random changes of Kubernetes, and what people do to etcd |
//! | `expected` | what has to stand in etcd, from scratch |
//! | `checks` | what must hold after every step |

// Clippy takes only the `#[test]` functions themselves for tests, and not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod checks;
mod expected;
mod model_etcd;
mod model_kube;
mod scenario;
mod world;

use etcd_registrar::api::{AddressFamily, FormatType};
use etcd_registrar::engine::io::Resource;

use world::{Knobs, MILLISECOND, SECOND, World};

/// A class of faults.
struct Class {
    name: &'static str,
    seeds: u64,
    /// Within what time all is right once the faults have stopped.
    bound: u64,
    knobs: fn() -> Knobs,
}

/// Changes of Kubernetes in any order across its watches, and lists at any point; no fault.
const CHANGES: Class = Class {
    name: "changes",
    seeds: 150,
    bound: 8 * SECOND,
    knobs: || Knobs {
        relists: 4,
        broken_lists: 0.02,
        ..Knobs::default()
    },
};

/// Slow watches on both sides, which break.
const LAG: Class = Class {
    name: "lag",
    seeds: 80,
    bound: 8 * SECOND,
    knobs: || Knobs {
        changes: 40,
        kube_lag: 2 * SECOND,
        etcd_lag: 2 * SECOND,
        relists: 4,
        broken_watches: 4,
        ..Knobs::default()
    },
};

/// The only replica is killed and started again, or asked to end and started again.
const RESTARTS: Class = Class {
    name: "restarts",
    seeds: 80,
    bound: 25 * SECOND,
    knobs: || Knobs {
        changes: 24,
        horizon: 20 * SECOND,
        relists: 2,
        crashes: 2,
        handovers: 1,
        ..Knobs::default()
    },
};

/// The leader key goes again and again.
const TERMS: Class = Class {
    name: "terms",
    seeds: 80,
    bound: 25 * SECOND,
    knobs: || Knobs {
        changes: 24,
        horizon: 15 * SECOND,
        expiries: 3,
        ..Knobs::default()
    },
};

/// Two replicas that know different things, and change places.
const REPLICAS: Class = Class {
    name: "replicas",
    seeds: 80,
    bound: 25 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        horizon: 15 * SECOND,
        kube_lag: 2 * SECOND,
        etcd_lag: SECOND,
        relists: 8,
        broken_lists: 0.02,
        broken_watches: 2,
        crashes: 2,
        handovers: 2,
        expiries: 2,
        freezes: 1,
        ..Knobs::default()
    },
};

/// Requests whose outcome is unknown, and that etcd does later or never.
const UNKNOWN: Class = Class {
    name: "unknown",
    seeds: 100,
    bound: 25 * SECOND,
    knobs: || Knobs {
        changes: 40,
        horizon: 15 * SECOND,
        etcd_lag: 200 * MILLISECOND,
        unknown: 0.15,
        expiries: 1,
        ..Knobs::default()
    },
};

/// Two replicas, one of which does not reach Kubernetes for a while.
const CUT_OFF: Class = Class {
    name: "cut-off",
    seeds: 40,
    bound: 25 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        horizon: 40 * SECOND,
        cuts: 2,
        ..Knobs::default()
    },
};

/// etcd has no space for a while.
const NO_SPACE: Class = Class {
    name: "no-space",
    seeds: 60,
    bound: 25 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        horizon: 15 * SECOND,
        kube_lag: 500 * MILLISECOND,
        no_space: 2,
        expiries: 1,
        ..Knobs::default()
    },
};

/// The only replica is away for longer than any lease lasts.
const EXPIRED: Class = Class {
    name: "expired",
    seeds: 40,
    bound: 120 * SECOND,
    knobs: || Knobs {
        horizon: 15 * SECOND,
        crashes: 2,
        away: 100 * SECOND,
        unknown: 0.05,
        records_may_expire: true,
        ..Knobs::default()
    },
};

/// People write and delete keys, records and the operator's own.
const HANDS: Class = Class {
    name: "hands",
    seeds: 60,
    bound: 25 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        changes: 20,
        horizon: 15 * SECOND,
        etcd_lag: 200 * MILLISECOND,
        hands: 12,
        ..Knobs::default()
    },
};

/// All of that at once, but for hands.
const ALL: Class = Class {
    name: "all",
    seeds: 80,
    bound: 40 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        changes: 40,
        horizon: 20 * SECOND,
        kube_lag: 3 * SECOND,
        etcd_lag: SECOND,
        relists: 3,
        broken_lists: 0.02,
        broken_watches: 3,
        unknown: 0.05,
        crashes: 2,
        handovers: 1,
        freezes: 2,
        cuts: 1,
        expiries: 1,
        no_space: 1,
        ..Knobs::default()
    },
};

const CLASSES: [&Class; 11] = [
    &CHANGES, &LAG, &RESTARTS, &TERMS, &REPLICAS, &UNKNOWN, &CUT_OFF, &NO_SPACE, &EXPIRED, &HANDS,
    &ALL,
];

/// What a run has shown, so that a class can tell whether it tested anything.
#[derive(Debug, Default)]
struct Shown {
    puts: usize,
    deletes: usize,
    settled: usize,
    new_keys: usize,
    slowest: u64,
}

/// Says which seed it was when a check panics.
struct Named(&'static str, u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self(name, seed) = self;
            eprintln!(
                "replay it with: SEED={name}:{seed} cargo test --test simulation replay -- --nocapture"
            );
        }
    }
}

fn run(class: &Class, seed: u64, trace: bool) -> (Shown, Vec<String>) {
    let _named = Named(class.name, seed);
    let mut world = World::new(seed, (class.knobs)(), trace);
    scenario::prepare(&mut world);
    world.plan();
    let end = world.now + world.knobs.horizon;
    while world.now < end {
        world.run_until((world.now + 100 * MILLISECOND).min(end));
        world.settle();
    }
    world.calm();
    let calm = world.now;
    let took = converge(&mut world, class.bound);
    // Leases that are empty go within some seconds, and nothing else moves.
    let still = world.etcd.log().len();
    let pause = 12 * SECOND;
    world.run_until(world.now + pause);
    let moved: Vec<String> = world
        .etcd
        .log()
        .iter()
        .skip(still)
        .filter(|change| world::is_record(&change.key))
        .map(|change| model_etcd::show(&change.key))
        .collect();
    assert!(moved.is_empty(), "records change for nothing: {moved:?}");
    // What a process had granted that is gone, or was never told of it, ends with its TTL.
    if !world.leaks().is_empty() {
        world.run_until(world.now + 60 * SECOND);
    }
    let leaks = world.leaks();
    assert!(leaks.is_empty(), "{leaks:#?}\n{}", world.summary());
    let shown = Shown {
        puts: world.checks.puts,
        deletes: world.checks.deletes,
        settled: world.checks.settled_keys,
        new_keys: world.checks.waited_for_new_key,
        slowest: took.saturating_sub(calm),
    };
    (shown, world.trace())
}

/// Runs until etcd is as it has to be and stays so; gives the time at which it was.
fn converge(world: &mut World, bound: u64) -> u64 {
    let end = world.now + bound;
    loop {
        world.run_until(world.now + 100 * MILLISECOND);
        world.settle();
        let differences = world.differences();
        let led = world.leader().is_some();
        let running: Vec<usize> = world.running().collect();
        let all = running.len() == world.knobs.replicas
            && running.iter().all(|process| world.caught_up(*process));
        if differences.is_empty() && led && all {
            let reached = world.now;
            world.run_until(world.now + SECOND);
            if world.differences().is_empty() {
                return reached;
            }
        }
        assert!(
            world.now < end,
            "not right after {} s: {differences:#?}\n{}",
            bound / SECOND,
            world.summary()
        );
    }
}

/// Runs all seeds of a class (`SEEDS` says how many).
fn all(class: &Class) -> Shown {
    let seeds = std::env::var("SEEDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(class.seeds);
    let mut shown = Shown::default();
    let mut failed = Vec::new();
    for seed in 0..seeds {
        let Ok((one, _)) = std::panic::catch_unwind(|| run(class, seed, false)) else {
            failed.push(seed);
            continue;
        };
        shown.puts += one.puts;
        shown.deletes += one.deletes;
        shown.settled += one.settled;
        shown.new_keys += one.new_keys;
        shown.slowest = shown.slowest.max(one.slowest);
    }
    println!("{}: {seeds} seeds, {shown:?}", class.name);
    assert!(
        failed.is_empty(),
        "{}: these seeds fail: {failed:?}",
        class.name
    );
    assert!(shown.puts > 0 && shown.deletes > 0, "{shown:?}");
    shown
}

#[test]
fn any_order_of_changes_leads_to_the_state_from_scratch() {
    let shown = all(&CHANGES);
    assert!(shown.new_keys > 0, "no key ever moved: {shown:?}");
}

#[test]
fn slow_and_broken_watches_change_nothing() {
    all(&LAG);
}

#[test]
fn a_restart_within_the_ttl_makes_no_event() {
    let shown = all(&RESTARTS);
    assert!(shown.settled > 0, "nothing ever settled: {shown:?}");
}

#[test]
fn terms_that_end_leave_no_trace() {
    all(&TERMS);
}

#[test]
fn replicas_with_different_views_agree() {
    let shown = all(&REPLICAS);
    assert!(shown.settled > 0, "nothing ever settled: {shown:?}");
}

#[test]
fn requests_of_unknown_outcome_do_no_harm() {
    all(&UNKNOWN);
}

#[test]
fn a_replica_that_is_cut_off_gives_way() {
    all(&CUT_OFF);
}

#[test]
fn without_space_removals_go_on() {
    all(&NO_SPACE);
}

#[test]
fn what_expired_is_published_again() {
    all(&EXPIRED);
}

#[test]
fn what_hands_change_is_put_right() {
    all(&HANDS);
}

#[test]
fn everything_at_once_converges() {
    all(&ALL);
}

/// Waits until all is right, without any fault.
fn calm_down(world: &mut World) {
    converge(world, 10 * SECOND);
    world.settle();
}

#[test]
fn an_address_under_two_keys_passes_to_another_pod_at_once() {
    for seed in 0..10 {
        let _named = Named("scripted", seed);
        let mut world = World::new(seed, Knobs::default(), false);
        for name in ["web", "api"] {
            scenario::put(
                &mut world,
                scenario::registration(name, FormatType::Json, None),
            );
        }
        let old = scenario::pod(&mut world, "old", &["10.0.0.1"]);
        scenario::put_pod(&mut world, old.clone());
        world.start(0);
        calm_down(&mut world);
        assert_eq!(world.expected().len(), 2);
        // While nobody looks, so that the operator sees both pods change in one list.
        world.crash(0);
        scenario::remove_pod(&mut world, &old);
        let new = scenario::pod(&mut world, "new", &["10.0.0.1"]);
        scenario::put_pod(&mut world, new);
        world.start(0);
        calm_down(&mut world);
        assert_eq!(world.expected().len(), 2);
    }
}

#[test]
fn every_key_of_a_pod_moves_before_its_old_one_goes() {
    for format in [FormatType::Json, FormatType::Plain, FormatType::Grpc] {
        for seed in 0..10 {
            let _named = Named("scripted", seed);
            let mut world = World::new(seed, Knobs::default(), false);
            let moved = |prefix: &str| {
                let mut found = scenario::registration("web", format, Some(prefix));
                if let Ok(spec) = &mut found.spec {
                    spec.address_families = vec![AddressFamily::IPv4, AddressFamily::IPv6];
                }
                found
            };
            scenario::put(&mut world, moved("old/"));
            let pod = scenario::pod(&mut world, "web-0", &["10.0.0.1", "fd00::1"]);
            scenario::put_pod(&mut world, pod);
            world.start(0);
            calm_down(&mut world);
            let from = world.etcd.log().len();
            scenario::put(&mut world, moved("new/"));
            world.wake_all();
            calm_down(&mut world);
            for ip in ["10.0.0.1", "[fd00::1]"] {
                let changes: Vec<String> = world
                    .etcd
                    .log()
                    .iter()
                    .skip(from)
                    .filter(|change| model_etcd::show(&change.key).contains(ip))
                    .map(|change| {
                        let key = model_etcd::show(&change.key);
                        let what = if change.after.is_some() {
                            "put"
                        } else {
                            "delete"
                        };
                        format!("{what} {}", key.split('/').next().unwrap_or(""))
                    })
                    .collect();
                assert_eq!(changes, ["put new", "delete old"], "{format:?} {ip}");
            }
        }
    }
}

#[test]
fn a_pod_that_a_broken_list_showed_to_have_left_never_returns() {
    let mut shown = 0;
    for seed in 0..20 {
        let _named = Named("scripted", seed);
        let knobs = Knobs {
            replicas: 2,
            ..Knobs::default()
        };
        let mut world = World::new(seed, knobs, false);
        scenario::put(
            &mut world,
            scenario::registration("web", FormatType::Json, None),
        );
        let ips: Vec<String> = (1..=12).map(|n| format!("10.0.0.{n}")).collect();
        let pods: Vec<_> = ips
            .iter()
            .map(|ip| scenario::pod(&mut world, &format!("web-{ip}"), &[ip.as_str()]))
            .collect();
        for pod in &pods {
            scenario::put_pod(&mut world, pod.clone());
        }
        world.start(0);
        world.start(1);
        calm_down(&mut world);
        // Bookmarks bring both watches beyond the marks.
        world.run_until(world.now + 5 * SECOND);
        let leader = world.leader().expect("a leader");
        let standby = 1 - leader;
        // The standby is behind, and the leader hears of the change by a list that it does not finish.
        world.stall(standby, world.now + 15 * SECOND);
        let mut left = pods.first().cloned().expect("a pod");
        let uid = left.uid.to_string();
        left.deleting = true;
        scenario::put_pod(&mut world, left);
        world.relist(leader, Resource::Pods);
        while !world.heard_in_list(leader, &uid) && !world.caught_up(leader) {
            world.run_until(world.now + MILLISECOND);
        }
        world.run_until(world.now + 3 * MILLISECOND);
        shown += u32::from(world.heard_in_list(leader, &uid));
        world.crash(leader);
        world.run_until(world.now + 14 * SECOND);
        assert_eq!(world.leader(), Some(standby));
        world.start(leader);
        calm_down(&mut world);
    }
    assert!(
        shown > 0,
        "no list was ever left off after the pod was seen to have left"
    );
}

#[test]
fn a_term_that_ends_lets_no_lease_run_out() {
    let _named = Named("scripted", 0);
    let mut world = World::new(0, Knobs::default(), false);
    scenario::put(
        &mut world,
        scenario::registration("web", FormatType::Json, None),
    );
    let pod = scenario::pod(&mut world, "web-0", &["10.0.0.1"]);
    scenario::put_pod(&mut world, pod);
    world.start(0);
    calm_down(&mut world);
    let records = |world: &World| {
        let changes = world.etcd.log().iter();
        changes
            .filter(|change| world::is_record(&change.key))
            .count()
    };
    let before = records(&world);
    world.end_leader_lease();
    world.run_until(world.now + 200 * SECOND);
    assert_eq!(records(&world), before);
    assert!(world.differences().is_empty());
}

/// Runs the seed that `SEED` names, with all that happens; without it, shows that a seed is always the
/// same run.
#[test]
fn replay() {
    let Ok(wanted) = std::env::var("SEED") else {
        for class in CLASSES {
            let (first, second) = (run(class, 1, true).1, run(class, 1, true).1);
            let differs = first.iter().zip(&second).find(|(a, b)| a != b);
            assert!(
                differs.is_none() && first.len() == second.len(),
                "{}: {differs:?}",
                class.name
            );
        }
        return;
    };
    let (name, seed) = wanted.split_once(':').expect("SEED is class:number");
    let class = CLASSES
        .into_iter()
        .find(|class| class.name == name)
        .unwrap_or_else(|| panic!("no class {name}"));
    run(class, seed.parse().expect("a number"), true);
}
