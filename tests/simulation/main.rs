//! The whole operator but its IO, under a seeded model of Kubernetes and etcd.
//!
//! Every class of faults is a test of its own, over thousands of seeds in all; `SEEDS=2000` runs so many of each
//! class, and `make soak` goes on for half an hour. A seed that fails is shrunk to the steps that matter, and is
//! run again, with all that happens, by the command that is printed:
//!
//! ```text
//! SEED=restarts:17 cargo test --test simulation replay -- --nocapture
//! SEED=restarts:17:3.9.14:2 cargo test --test simulation replay -- --nocapture
//! ```
//!
//! (the second: only these steps of its schedule, with the second choice of delays).
//!
//! | file | what |
//! |---|---|
//! | `schedule` | what happens in a run: steps from a seed |
//! | `model_etcd` | etcd: transactions, leases, the log of all changes |
//! | `model_kube` | Kubernetes: objects, resource versions, the log of its watches |
//! | `world` | the scheduler: messages with delays, processes, what the tasks around the engine do |
//! | `scenario` | changes of Kubernetes, and what people do to etcd |
//! | `expected`, `oracle` | what has to stand in etcd, from scratch: now, and at any time before |
//! | `checks` | what must hold after every step |
//! | `directed` | schedules made by hand, each for one guard of the protocol |
//! | `shrink` | a failing schedule --> a short one that fails the same way |
//! | `real_etcd` | the same operations on the model of etcd and on a real one |
//!
//! Steps have the names of the actions in `Registrar.tla`, the model of the protocol: KubeStep, KubeWatch, List,
//! Watch, Elect, Write, Remove, Grant, Revoke, Barrier, Read, Apply, ApplyRevoke, Crash, Start, Freeze,
//! LeaderExpires, Hand, NoSpace, Save and Restore. GiveUp is an answer that is an unknown outcome, Expire and
//! ExpireOwner are leases that end in the log of etcd, Thaw is the end of a Freeze, Deposed a line of the engine.

// Clippy takes only the `#[test]` functions themselves for tests, and not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod checks;
mod directed;
mod expected;
mod model_etcd;
mod model_kube;
mod oracle;
mod real_etcd;
mod scenario;
mod schedule;
mod shrink;
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use etcd_registrar::api::{AddressFamily, FormatType};
use etcd_registrar::engine::io::Resource;

use schedule::{Step, schedule};
use world::{Knobs, MILLISECOND, RESOURCES, SECOND, World};

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
        horizon: 60 * SECOND,
        cuts: 2,
        ..Knobs::default()
    },
};

/// etcd has no space for a while.
const NO_SPACE: Class = Class {
    name: "no-space",
    seeds: 150,
    bound: 25 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        changes: 60,
        horizon: 15 * SECOND,
        kube_lag: 3 * SECOND,
        no_space: 3,
        expiries: 3,
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

/// Addresses pass from pod to pod, while outcomes are unknown and what was written is seen late.
const ADDRESSES: Class = Class {
    name: "addresses",
    seeds: 200,
    bound: 25 * SECOND,
    knobs: || Knobs {
        changes: 60,
        horizon: 15 * SECOND,
        etcd_lag: 5 * SECOND,
        unknown: 0.2,
        moves: true,
        ..Knobs::default()
    },
};

/// Registrations that are suspended, refused or can't be read, and other policies.
const KEPT: Class = Class {
    name: "kept",
    seeds: 300,
    bound: 25 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        changes: 40,
        horizon: 15 * SECOND,
        kube_lag: SECOND,
        odd_specs: true,
        policies: 3,
        crashes: 1,
        expiries: 1,
        hands: 0,
        ..Knobs::default()
    },
};

/// etcd is restored from a snapshot, goes on at a lower or a higher revision, comes back empty, and loses its
/// history.
const RESTORED: Class = Class {
    name: "restored",
    seeds: 300,
    bound: 90 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        horizon: 20 * SECOND,
        etcd_lag: 500 * MILLISECOND,
        restores: 2,
        wipes: 1,
        compactions: 3,
        unknown: 0.03,
        crashes: 1,
        expiries: 1,
        records_may_expire: true,
        ..Knobs::default()
    },
};

/// etcd does not answer for a while; objects and namespaces go meanwhile.
const ETCD_AWAY: Class = Class {
    name: "etcd-away",
    seeds: 150,
    bound: 120 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        horizon: 60 * SECOND,
        etcd_away: 2,
        crashes: 1,
        handovers: 1,
        compactions: 1,
        ..Knobs::default()
    },
};

/// The only member of etcd stands still, for longer than any lease lasts.
const ETCD_FROZEN: Class = Class {
    name: "etcd-frozen",
    seeds: 100,
    bound: 120 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        horizon: 120 * SECOND,
        etcd_frozen: 1,
        crashes: 1,
        records_may_expire: true,
        ..Knobs::default()
    },
};

/// No process reaches Kubernetes; etcd is away, has no space and loses things, and the clock jumps.
const KUBE_AWAY: Class = Class {
    name: "kube-away",
    seeds: 100,
    bound: 60 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        horizon: 90 * SECOND,
        kube_away: 2,
        etcd_away: 2,
        no_space: 1,
        expiries: 2,
        clock_jumps: 2,
        ..Knobs::default()
    },
};

/// The same with people at work in etcd: what was confirmed is put back, as long as someone leads.
const FAIL_STATIC: Class = Class {
    name: "fail-static",
    seeds: 60,
    bound: 60 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        horizon: 90 * SECOND,
        kube_away: 2,
        etcd_away: 1,
        hands: 6,
        // A hand may take the key of a lease, and the leader key, too.
        records_may_expire: true,
        ..Knobs::default()
    },
};

/// The API server answers from an old cache.
const STALE: Class = Class {
    name: "stale",
    seeds: 200,
    bound: 25 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        changes: 40,
        horizon: 15 * SECOND,
        kube_lag: 2 * SECOND,
        relists: 8,
        stale_lists: 0.4,
        crashes: 2,
        handovers: 1,
        expiries: 2,
        ..Knobs::default()
    },
};

/// Revokes of empty leases that reach etcd when others lead.
const REVOKES: Class = Class {
    name: "revokes",
    seeds: 150,
    bound: 60 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        changes: 60,
        horizon: 40 * SECOND,
        slow_revokes: 0.7,
        unknown: 0.02,
        expiries: 4,
        handovers: 1,
        ..Knobs::default()
    },
};

/// Two clusters were given one name, and start at the same moment; no operator is there for long enough that
/// the name is free again.
const NAMES: Class = Class {
    name: "names",
    seeds: 100,
    bound: 240 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        intruders: 1,
        changes: 20,
        horizon: 30 * SECOND,
        crashes: 3,
        away: 100 * SECOND,
        expiries: 2,
        unknown: 0.02,
        wipes: 1,
        records_may_expire: true,
        ..Knobs::default()
    },
};

/// Removals of pods that are there are held for a while, or until something ends that.
const HOLDS: Class = Class {
    name: "holds",
    seeds: 200,
    bound: 25 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        changes: 60,
        horizon: 40 * SECOND,
        kube_lag: SECOND,
        etcd_lag: 200 * MILLISECOND,
        unknown: 0.03,
        relists: 2,
        expiries: 2,
        hands: 2,
        holds: true,
        ..Knobs::default()
    },
};

/// Records of formats that go to etcd in other ways, and registrations that change from one to another.
const FORMATS: Class = Class {
    name: "formats",
    seeds: 200,
    bound: 25 * SECOND,
    knobs: || Knobs {
        changes: 40,
        horizon: 15 * SECOND,
        etcd_lag: 500 * MILLISECOND,
        unknown: 0.05,
        relists: 2,
        broken_watches: 2,
        expiries: 2,
        formats: &MORE_FORMATS,
        ..Knobs::default()
    },
};

/// The same, where addresses pass from pod to pod and replicas know different things.
const FORMATS_MOVED: Class = Class {
    name: "formats-moved",
    seeds: 200,
    bound: 40 * SECOND,
    knobs: || Knobs {
        replicas: 2,
        changes: 60,
        horizon: 15 * SECOND,
        kube_lag: SECOND,
        etcd_lag: 2 * SECOND,
        unknown: 0.1,
        relists: 4,
        crashes: 1,
        handovers: 1,
        expiries: 2,
        freezes: 1,
        no_space: 1,
        moves: true,
        formats: &MORE_FORMATS,
        ..Knobs::default()
    },
};

/// Several keys in one transaction, one key in each, one record for all pods.
const MORE_FORMATS: [FormatType; 6] = [
    FormatType::Traefik,
    FormatType::Traefik,
    FormatType::GoMicro,
    FormatType::GoMicro,
    FormatType::Apisix,
    FormatType::Apisix,
];

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
        odd_specs: true,
        policies: 1,
        compactions: 1,
        stale_lists: 0.1,
        slow_revokes: 0.3,
        clock_jumps: 1,
        ..Knobs::default()
    },
};

const CLASSES: [&Class; 24] = [
    &CHANGES,
    &LAG,
    &RESTARTS,
    &TERMS,
    &REPLICAS,
    &UNKNOWN,
    &CUT_OFF,
    &NO_SPACE,
    &EXPIRED,
    &HANDS,
    &ADDRESSES,
    &KEPT,
    &RESTORED,
    &ETCD_AWAY,
    &ETCD_FROZEN,
    &KUBE_AWAY,
    &FAIL_STATIC,
    &STALE,
    &REVOKES,
    &NAMES,
    &HOLDS,
    &FORMATS,
    &FORMATS_MOVED,
    &ALL,
];

/// What a run has shown, so that a class can tell whether it tested anything.
#[derive(Debug, Default)]
struct Shown {
    puts: usize,
    deletes: usize,
    settled: usize,
    new_keys: usize,
    faults: usize,
    held: usize,
    slowest: u64,
}

impl Shown {
    fn add(&mut self, one: &Self) {
        self.puts += one.puts;
        self.deletes += one.deletes;
        self.settled += one.settled;
        self.new_keys += one.new_keys;
        self.faults += one.faults;
        self.held += one.held;
        self.slowest = self.slowest.max(one.slowest);
    }
}

/// A run that can be played again.
#[derive(Clone)]
struct Case {
    class: &'static Class,
    seed: u64,
    /// The steps of its schedule that are left; `None`: all.
    kept: Option<Vec<usize>>,
    /// Another choice of delays.
    delays: u64,
}

impl Case {
    fn whole(class: &'static Class, seed: u64) -> Self {
        Self {
            class,
            seed,
            kept: None,
            delays: 0,
        }
    }

    /// What it is written as: `class:seed`, or `class:seed:step.step:delays`.
    fn parse(text: &str) -> Self {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or("");
        let class = CLASSES
            .into_iter()
            .find(|class| class.name == name)
            .unwrap_or_else(|| panic!("no class {name}"));
        let number = |part: Option<&str>| part.map(|n| n.parse().expect("a number"));
        Self {
            class,
            seed: number(parts.next()).expect("SEED is class:number"),
            kept: parts.next().map(|kept| {
                kept.split('.')
                    .filter(|step| !step.is_empty())
                    .map(|step| step.parse().expect("numbers of steps"))
                    .collect()
            }),
            delays: number(parts.next()).unwrap_or(0),
        }
    }

    fn steps(&self) -> Vec<Step> {
        let mut steps = schedule(&(self.class.knobs)(), self.seed);
        if let Some(kept) = &self.kept {
            steps.retain(|step| kept.contains(&step.number));
        }
        steps
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.class.name, self.seed)?;
        if let Some(kept) = &self.kept {
            let kept: Vec<String> = kept.iter().map(ToString::to_string).collect();
            write!(f, ":{}:{}", kept.join("."), self.delays)?;
        }
        Ok(())
    }
}

/// Says which seed it was when a check of a scripted run panics.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the seed was {}", self.0);
        }
    }
}

fn run(case: &Case, trace: bool) -> (Shown, Vec<String>) {
    let class = case.class;
    // Far apart from the seeds of other cases.
    let seed = case
        .seed
        .wrapping_add(case.delays.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut world = World::new(seed, (class.knobs)(), trace);
    world.plan(&case.steps());
    let end = world.now + world.knobs.horizon;
    while world.now < end {
        world.run_until((world.now + 100 * MILLISECOND).min(end));
        world.settle();
    }
    world.calm();
    world.mend(class.bound);
    let calm = world.now;
    let took = converge(&mut world, class.bound);
    if world.knobs.holds {
        // Some seconds for the watches and writes: from now on nothing is held.
        world.run_until(calm + (oracle::HOLD_SECONDS + 5) * SECOND);
        let differences = world.differences();
        assert!(
            differences.is_empty(),
            "held for too long: {differences:#?}"
        );
    }
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
        faults: world.faults_played,
        held: world.held,
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
        let differences = world.differences_but_held();
        // What is still in flight may be a removal that it takes back then.
        let rests = world.leader().is_some_and(|leader| world.rests(leader));
        let led = world.leaders() == 1 && rests;
        let running: Vec<usize> = world.running().collect();
        let all = world.all_run() && running.iter().all(|process| world.caught_up(*process));
        if differences.is_empty() && led && all {
            let reached = world.now;
            world.run_until(world.now + SECOND);
            if world.differences_but_held().is_empty() {
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

fn number_of(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is a number")),
    )
}

/// Runs all seeds of a class (`SEEDS` says how many).
fn all(class: &'static Class) -> Shown {
    let seeds = number_of("SEEDS").unwrap_or(class.seeds);
    // Where it only matters whether one fails.
    let shrinks = std::env::var("SHRINK").as_deref() != Ok("no");
    let mut shown = Shown::default();
    let mut failed: Vec<u64> = Vec::new();
    let mut first = String::new();
    for seed in 0..seeds {
        let case = Case::whole(class, seed);
        match shrink::attempt(&case) {
            Ok(one) => shown.add(&one),
            Err(failure) => {
                if failed.is_empty() && shrinks {
                    eprintln!("{}", shrink::report(&case, &failure));
                }
                if failed.is_empty() {
                    first = failure.message;
                }
                failed.push(seed);
            }
        }
        // Nobody is helped by hundreds.
        if failed.len() == if shrinks { 5 } else { 1 } {
            break;
        }
    }
    println!("{}: {seeds} seeds, {shown:?}", class.name);
    assert!(
        failed.is_empty(),
        "{first}\n{}: these seeds fail, of the first {}: {failed:?}",
        class.name,
        failed.last().unwrap_or(&0) + 1
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
fn no_address_has_two_owners() {
    all(&ADDRESSES);
}

#[test]
fn what_is_suspended_or_refused_is_kept() {
    all(&KEPT);
}

#[test]
fn a_restored_wiped_or_compacted_etcd_is_compared_anew() {
    all(&RESTORED);
}

#[test]
fn while_etcd_is_away_nothing_is_lost() {
    all(&ETCD_AWAY);
}

#[test]
fn an_etcd_that_stood_still_is_filled_again() {
    all(&ETCD_FROZEN);
}

#[test]
fn while_kubernetes_is_away_all_stays() {
    all(&KUBE_AWAY);
}

#[test]
fn without_kubernetes_only_what_stood_is_put_back() {
    all(&FAIL_STATIC);
}

#[test]
fn an_old_cache_brings_nobody_back() {
    all(&STALE);
}

#[test]
fn late_revokes_take_nothing() {
    all(&REVOKES);
}

#[test]
fn what_is_held_goes_when_its_time_or_its_pod_is_over() {
    let shown = all(&HOLDS);
    assert!(shown.held > 0, "nothing was ever held: {shown:?}");
}

#[test]
fn of_two_clusters_with_one_name_one_works() {
    all(&NAMES);
}

#[test]
fn every_way_of_writing_leads_to_the_state_from_scratch() {
    let shown = all(&FORMATS);
    assert!(shown.new_keys > 0, "no key ever moved: {shown:?}");
}

#[test]
fn addresses_pass_from_pod_to_pod_in_every_way_of_writing() {
    all(&FORMATS_MOVED);
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
        let _named = Named(seed);
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
            let _named = Named(seed);
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
        let _named = Named(seed);
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
        world.stall(standby, &RESOURCES, world.now + 15 * SECOND);
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

/// Seeds that found a defect.
#[test]
fn what_was_found_stays_mended() {
    for found in [
        // A key waited for an address whose record had passed to its own pod without a change in etcd.
        "changes:5057",
        "addresses:5026",
        // A key waited for ever for an address, since the outcome of an old put counted for more than who wants it now.
        "addresses:1795282076034",
        "addresses:1795282076234",
        // The status of a suspended registration claimed what was merely sent.
        "kept:5026",
        // Of a restored etcd, whose leader key let its writes pass, a leader believed what it knew of the one before: its
        // status named what it had read to be gone, the only key of a pod was deleted, two pods held one address, and
        // a record stood on a lease without its key.
        "restored:1795278114149",
        "restored:1795278113502",
        "restored:1795278115981",
        "restored:1795278116970",
        // A registration moved and came back before the removal of its old record was answered.
        "changes:1795287742742",
        // What waited for the later addresses of a record was not told when it was read, and a record whose zone was not
        // known any more was in the way of another protocol.
        "formats-moved:1795289944912",
        "formats-moved:1795289945752",
        // Two records moved at once, each in the way of the other's new one.
        "restarts:1795289947978",
        "unknown:1795292172052",
        // A pod was replaced under its name and address: its record, which says no more, was taken for another pod's.
        "formats-moved:1795293176707",
        // An old key went before its successor stood, because of another pod's record that was not waiting for it.
        "all:1795302431124",
        "addresses:1795302432072",
        // A record in dispute had moved to another lease when its lease was read: that one got the name of the first.
        "replicas:1795303930648",
        // A list broke off after it had shown a newer registration, and an older one was taken next: who leads acted on
        // more than its mark said.
        "all:1795305355163",
        // A hand took the key of a lease while nobody led: who is elected next never saw it, and leaves the record alone.
        "holds:1795310721506",
        // A watch that broke was told of after its new reading, to a process that had been frozen twice.
        "all:1795293177985",
    ] {
        let case = Case::parse(found);
        if let Err(failure) = shrink::attempt(&case) {
            panic!("{}", shrink::report(&case, &failure));
        }
    }
}

/// A registration has no pod for long enough that its lease is revoked, and has one again while that is on its way.
#[test]
fn a_pod_that_comes_back_while_its_lease_is_revoked_is_kept() {
    for seed in 0..60 {
        let _named = Named(seed);
        let knobs = Knobs {
            slow_revokes: 1.0,
            ..Knobs::default()
        };
        let mut world = World::new(seed, knobs, false);
        scenario::put(
            &mut world,
            scenario::registration("web", FormatType::Json, None),
        );
        let mut pod = scenario::pod(&mut world, "web-0", &["10.0.0.1"]);
        scenario::put_pod(&mut world, pod.clone());
        world.start(0);
        calm_down(&mut world);
        pod.ready = false;
        scenario::put_pod(&mut world, pod.clone());
        world.run_until(world.now + 5 * SECOND);
        let (asked, revokes) = (world.asked_leases, world.revokes);
        let end = world.now + 10 * SECOND;
        // It comes back when etcd is asked whether the lease is empty, or after the revoke.
        while if seed % 2 == 0 {
            world.asked_leases == asked
        } else {
            world.revokes == revokes
        } {
            assert!(world.now < end, "an empty lease is never revoked");
            world.run_until(world.now + MILLISECOND / 10);
        }
        pod.ready = true;
        scenario::put_pod(&mut world, pod);
        // A late revoke comes within 22 s.
        world.run_until(world.now + 25 * SECOND);
        calm_down(&mut world);
        assert_eq!(world.expected().len(), 1);
    }
}

#[test]
fn a_term_that_ends_lets_no_lease_run_out() {
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
            let case = Case::whole(class, 1);
            let (first, second) = (run(&case, true).1, run(&case, true).1);
            let differs = first.iter().zip(&second).find(|(a, b)| a != b);
            assert!(
                differs.is_none() && first.len() == second.len(),
                "{}: {differs:?}",
                class.name
            );
        }
        return;
    };
    let case = Case::parse(&wanted);
    for step in case.steps() {
        println!("{step}");
    }
    run(&case, true);
}

/// Runs schedules that no test has run, on all cores, for `SOAK_MINUTES` or until there were `SOAK_SCHEDULES`,
/// whichever is named (30 minutes where neither is); `SOAK_FROM` is the first seed.
#[test]
#[ignore = "make soak: takes as long as it is told to"]
fn soak() {
    let schedules = number_of("SOAK_SCHEDULES").unwrap_or(u64::MAX);
    let minutes = number_of("SOAK_MINUTES").or((schedules == u64::MAX).then_some(30));
    let from = number_of("SOAK_FROM").unwrap_or_else(|| {
        // Other seeds every time.
        let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        since.as_secs() * 1_000
    });
    let end = minutes.map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    let next = AtomicU64::new(0);
    let told = Mutex::new((Shown::default(), 0u64, Vec::new(), Instant::now()));
    let began = Instant::now();
    let line = |shown: &Shown, runs: u64, failed: &[(String, bool)]| {
        println!(
            "{:>6} s  {runs} schedules, {} faults, {} puts, {} removals, {} endpoints lost, {} schedules failed",
            began.elapsed().as_secs(),
            shown.faults,
            shown.puts,
            shown.deletes,
            failed.iter().filter(|(_, lost)| *lost).count(),
            failed.len()
        );
    };
    println!("from seed {from}");
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, Into::into) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= schedules || end.is_some_and(|end| Instant::now() >= end) {
                        return;
                    }
                    let classes = CLASSES.len() as u64;
                    let class = usize::try_from(number % classes).unwrap_or(0);
                    let class = CLASSES.get(class).expect("a class");
                    let case = Case::whole(class, from + number / classes);
                    let ran = shrink::attempt(&case);
                    let report = ran.as_ref().err().map(|why| shrink::report(&case, why));
                    let mut told = told.lock().expect("no panic");
                    let (shown, runs, failed, at) = &mut *told;
                    *runs += 1;
                    match (ran, report) {
                        (Ok(one), _) => shown.add(&one),
                        (Err(failure), report) => {
                            println!("{}", report.unwrap_or_default());
                            failed.push((case.to_string(), failure.message.starts_with("lost")));
                        }
                    }
                    if at.elapsed() >= Duration::from_secs(10) {
                        *at = Instant::now();
                        line(shown, *runs, failed);
                    }
                }
            });
        }
    });
    let (shown, runs, failed, _) = told.into_inner().expect("no panic");
    line(&shown, runs, &failed);
    assert!(failed.is_empty(), "these fail: {failed:?}");
}
