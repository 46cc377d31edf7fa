//! Replicas that take over from each other while pods come and go.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use testbed::{Operator, Signal, eventually};

use crate::scene::{EAST, LEADER, leader, quick, tell, wait_leader_after, wait_standbys};
use crate::support::{SOON, Seen, Stage, Watcher, addresses, by_hand};

/// Pods that change. Each comes back every 4 s, which is no flapping.
const CHANGING: usize = 100;
/// So many change at once, since a request to the API server can take longer than the pause between two changes.
const CHANGERS: usize = 5;
/// The pause between two changes of a changer: 50 a second of all together.
const PAUSE: Duration = Duration::from_millis(100);
/// Changes before and after each replacement of a replica: two seconds of them.
const BETWEEN: usize = 100;
/// Pods that stay ready.
const UNCHANGED: usize = 5;
/// The election TTL of [`quick`].
const ELECTION_TTL: Duration = Duration::from_secs(2);
/// What two busy cores may add to what is promised on idle ones.
const BUSY: Duration = Duration::from_millis(1500);

/// Pods of the registration `web`: some that change all the time, and some that never do.
struct Churn {
    stage: Stage,
    changing: Vec<(String, String)>,
    unchanged: Vec<String>,
}

impl Churn {
    /// Registers the pods; an operator has to run.
    fn new(stage: Stage) -> Self {
        stage.register("web", &json!({}));
        let names: Vec<String> = (0..CHANGING)
            .map(|number| format!("web-{number}"))
            .collect();
        for name in &names {
            stage.create_pod(name, "web", &by_hand(false), &json!({}));
        }
        let key = |address: &str| format!("{}{EAST}/{address}:8080", stage.scope("web"));
        let changing: Vec<(String, String)> = names
            .into_iter()
            .map(|name| {
                let address = eventually(SOON, &format!("pod {name} to run"), || {
                    addresses(&stage.pod(&name)?)
                        .into_iter()
                        .next()
                        .ok_or_else(|| "no address".to_owned())
                })
                .unwrap();
                let key = key(&address);
                (name, key)
            })
            .collect();
        let unchanged: Vec<String> = (0..UNCHANGED)
            .map(|number| {
                let name = format!("stays-{number}");
                stage.create_pod(&name, "web", &json!({}), &json!({}));
                key(&stage.wait_ready(&name)[0])
            })
            .collect();
        stage.wait_keys(&stage.scope("web"), &unchanged);
        Self {
            stage,
            changing,
            unchanged,
        }
    }

    /// Changes the pods in turn while `action` runs, which may look at their number; gives the keys of those that are
    /// ready in the end.
    fn during(&self, action: impl FnOnce(&AtomicUsize)) -> Vec<&str> {
        let (stop, changes) = (AtomicBool::new(false), AtomicUsize::new(0));
        let begun = Instant::now();
        let standing = std::thread::scope(|scope| {
            let changers: Vec<_> = (0..CHANGERS)
                .map(|changer| {
                    let (stop, changes) = (&stop, &changes);
                    let mine = self.changing.iter().skip(changer).step_by(CHANGERS);
                    let mine: Vec<&(String, String)> = mine.collect();
                    scope.spawn(move || {
                        let mut standing = BTreeSet::new();
                        let mut due = Instant::now();
                        for (name, key) in mine.into_iter().cycle() {
                            if stop.load(Ordering::Relaxed) {
                                break;
                            }
                            let ready = standing.insert(key.as_str());
                            if !ready {
                                standing.remove(key.as_str());
                            }
                            self.stage.set_condition(name, ready);
                            changes.fetch_add(1, Ordering::Relaxed);
                            due += PAUSE;
                            std::thread::sleep(due.saturating_duration_since(Instant::now()));
                        }
                        standing
                    })
                })
                .collect();
            // Ends the changes also when the action fails.
            let end = End(&stop);
            action(&changes);
            drop(end);
            let standing = changers.into_iter().map(|changer| changer.join().unwrap());
            standing.flatten().collect()
        });
        let changes = changes.into_inner();
        let rate = changes as f64 / begun.elapsed().as_secs_f64();
        println!("faults: {changes} changes of pods, {rate:.0} a second");
        standing
    }

    /// Nothing is lost: in the end exactly the ready pods stand. Nothing twice: put and removal of each key take turns.
    /// Nothing happens to those that did not change. Gives the number of events on those.
    fn check(&self, seen: &[Seen], standing: &[&str]) -> usize {
        let mut wanted: Vec<&str> = standing.to_vec();
        wanted.extend(self.unchanged.iter().map(String::as_str));
        self.stage.wait_keys(&self.stage.scope("web"), &wanted);
        let mut stands: BTreeMap<&str, bool> = BTreeMap::new();
        for seen in seen {
            let put = seen.put.is_some();
            let before = stands.insert(&seen.key, put).unwrap_or(!put);
            assert_ne!(before, put, "twice: {seen:#?}");
        }
        let touched = |key: &&String| stands.contains_key(key.as_str());
        self.unchanged.iter().filter(touched).count()
    }
}

/// Stops the changes.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// From the last write of the old leader to the first of the new one, whose election had this revision.
fn gap(seen: &[Seen], elected: i64) -> Duration {
    let last = seen.iter().rfind(|seen| seen.revision < elected).unwrap();
    let first = seen.iter().find(|seen| seen.revision > elected).unwrap();
    first.at.saturating_duration_since(last.at)
}

#[test]
fn a_standby_takes_over_under_churn_without_an_event_on_what_did_not_change() {
    let stage = Stage::new("takeover");
    let start = |stage: &Stage| -> Operator { quick(stage.operator(EAST)).start().unwrap() };
    let replicas = [start(&stage), start(&stage)];
    let churn = Churn::new(stage);
    let stage = &churn.stage;
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));
    let elections = Watcher::start(&stage.etcd, LEADER);
    let mut elected = Vec::new();
    let standing = churn.during(|changes| {
        for signal in [
            Signal::SIGTERM,
            Signal::SIGKILL,
            Signal::SIGTERM,
            Signal::SIGKILL,
        ] {
            wait_standbys(&stage.registry, 1);
            let old = leader(&stage.registry);
            let leads = |operator: &&Operator| {
                operator
                    .metric("etcd_registrar_leader", &[])
                    .is_ok_and(|leads| leads == 1.0)
            };
            let leading = eventually(SOON, "one that leads", || {
                replicas.iter().find(leads).ok_or("none")
            })
            .unwrap();
            // Changes are under way when it goes.
            elections.forget();
            wait_changes(changes);
            leading.process().signal(signal).unwrap();
            let election = wait_leader_after(&elections, &old);
            elected.push((signal, election.revision));
            watcher.wait("a write of the new leader", |seen| {
                seen.revision > election.revision
            });
            leading.wait_exit(SOON).unwrap();
            leading.start().unwrap();
        }
    });
    wait_standbys(&stage.registry, 1);
    stage.wait_condition("web", "Ready", "True", "Registered");
    let seen = watcher.seen();
    let unchanged = churn.check(&seen, &standing);
    assert_eq!(unchanged, 0);
    for (signal, elected) in elected {
        let gap = gap(&seen, elected);
        let promised = match signal {
            Signal::SIGTERM => Duration::from_millis(500),
            _ => ELECTION_TTL + Duration::from_secs(1),
        };
        tell(
            &format!("takeover after {signal} under churn"),
            unchanged,
            gap,
        );
        assert!(gap < promised + BUSY, "{signal}: {gap:?}");
    }
}

/// Waits for so many changes from now on as come between two replacements.
fn wait_changes(changes: &AtomicUsize) {
    let before = changes.load(Ordering::Relaxed);
    eventually(SOON, "more changes", || {
        match changes.load(Ordering::Relaxed) - before {
            more if more >= BETWEEN => Ok(()),
            more => Err(more),
        }
    })
    .unwrap();
}

#[test]
fn a_rolling_upgrade_under_churn_loses_nothing_and_does_nothing_twice() {
    let stage = Stage::new("rolling");
    let start = |stage: &Stage| -> Operator { quick(stage.operator(EAST)).start().unwrap() };
    let mut replicas = vec![start(&stage), start(&stage)];
    let churn = Churn::new(stage);
    let stage = &churn.stage;
    let watcher = Watcher::start(&stage.etcd, &stage.scope("web"));
    let standing = churn.during(|changes| {
        // As a Deployment does it: one more, then one less.
        for _ in 0..2 {
            wait_changes(changes);
            replicas.push(start(stage));
            wait_standbys(&stage.registry, 2);
            replicas.remove(0).stop().unwrap();
        }
        wait_changes(changes);
    });
    stage.wait_condition("web", "Ready", "True", "Registered");
    let seen = watcher.seen();
    let unchanged = churn.check(&seen, &standing);
    assert_eq!(unchanged, 0);
    let pauses = seen
        .windows(2)
        .map(|pair| pair[1].at.saturating_duration_since(pair[0].at));
    let longest = pauses.max().unwrap();
    // A change is never older than the pause between two events.
    tell(
        "rolling upgrade of two replicas under churn",
        unchanged,
        longest,
    );
}
