//! From a change of readiness to the event on an etcd watcher.
//!
//! Five groups of pods, one after the other in each round: the operator's; two of the floor, so that the table shows by
//! how much two equal programs differ; and two that the floor registers with the operator's transactions, one of which
//! it watches in etcd, so that it shows what the protocol costs. Every program receives every event of every pod; only
//! one acts on it.

use rand::Rng;
use rand::seq::SliceRandom;
use serde_json::json;

use crate::floor::Floor;
use crate::observe::{self, Change, Observer, PodSeen};
use crate::report::{Row, shown};
use crate::statistics::{Times, milliseconds};
use crate::world::{Pod, World, prefix};
use crate::{Measured, Result, Sizes};

const NAMESPACE: &str = "propagation";
/// The label `app` of each group; the first is the operator's.
const GROUPS: [&str; 5] = ["operator", "floor", "twin", FENCED, WATCHED];
/// The group that the floor registers with the operator's transactions.
const FENCED: &str = "fenced";
/// The same, and the floor watches in etcd what it writes.
const WATCHED: &str = "watched";
/// Rounds of each half before those that count.
const WARM_UP: usize = 2;
/// Which program was started first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Half {
    FloorFirst,
    OperatorFirst,
}

const HALVES: [Half; 2] = [Half::FloorFirst, Half::OperatorFirst];
/// The pause between two changes, in microseconds: no change meets the one before it, and none keeps step with a timer.
const PAUSE: std::ops::Range<u64> = 2_000..8_000;

struct Group {
    prefix: String,
    pods: Vec<Pod>,
    /// From the API server's event, and from the return of the patch; puts and removals.
    put: [Times; 2],
    removed: [Times; 2],
}

pub(crate) fn measure(world: &mut World, sizes: &Sizes) -> Measured {
    world.namespace(NAMESPACE)?;
    let mut groups = Vec::new();
    for app in GROUPS {
        let pods = world.pods(NAMESPACE, app, sizes.changes, |at| at % 2 == 0)?;
        groups.push(Group {
            prefix: prefix(NAMESPACE, app),
            pods,
            put: Default::default(),
            removed: Default::default(),
        });
    }
    let changes = observe::etcd(&world.endpoint(), &[&prefix_of_all()])?;
    let pods = observe::pods(world.kubeconfig(), NAMESPACE)?;
    let apps: Vec<&str> = GROUPS.iter().skip(1).copied().collect();
    let (endpoint, kubeconfig) = (world.endpoint(), world.kubeconfig().to_owned());
    let fenced = [FENCED, WATCHED];
    let follow = || {
        let prefix = prefix_of_all();
        Floor::follow(&endpoint, &kubeconfig, &prefix, &apps, &fenced, WATCHED)
    };
    let mut random = rand::rng();
    let mut operator = None;
    let (mut counted, mut lost) = (0.0, 0.0);
    for half in HALVES {
        // The newer of two watches gets an event some 90 us earlier: each program has it in one half.
        let floor = match half {
            Half::FloorFirst => {
                let floor = follow()?;
                operator = Some(world.operator()?);
                world.register(NAMESPACE, GROUPS[0])?;
                floor
            }
            Half::OperatorFirst => {
                if let Some(operator) = &operator {
                    world.restart(operator)?;
                }
                follow()?
            }
        };
        // What is ready is registered first: by the floor whenever it starts, by the operator once.
        let registering = groups.iter().skip(usize::from(half == Half::OperatorFirst));
        for _ in registering.flat_map(|group| group.pods.iter().filter(|pod| pod.ready)) {
            changes.next("the first records")?;
        }
        let rounds = WARM_UP + sizes.rounds / HALVES.len();
        for round in 0..rounds {
            if round % 10 == 0 {
                eprintln!("bench:   {half:?}, round {round} of {rounds}");
            }
            let mut order: Vec<usize> = (0..groups.len()).collect();
            order.shuffle(&mut random);
            for at in order {
                let Some(group) = groups.get_mut(at) else {
                    continue;
                };
                turn(world, group, &changes, &pods, round >= WARM_UP)?;
            }
        }
        drop(floor);
        if let Some(operator) = &operator {
            counted += operator.metric("etcd_registrar_propagation_seconds_count", &[])?;
            lost += operator.metric("etcd_registrar_transactions_total", &["outcome=\"lost\""])?;
        }
    }
    let made = (HALVES.len() * WARM_UP + sizes.rounds) * sizes.changes;
    let mut rows = rows(&groups);
    rows.push(
        Row::new(
            format!("changes in the operator's own histogram, of {made}"),
            counted.to_string(),
        )
        .target("all", counted == made as f64),
    );
    world.unregister(NAMESPACE, GROUPS[0])?;
    Ok((rows, measured(&groups, counted, lost)))
}

fn prefix_of_all() -> String {
    format!("/services/{NAMESPACE}/")
}

/// Flips every pod of a group, in any order.
fn turn(
    world: &World,
    group: &mut Group,
    changes: &Observer<Change>,
    seen: &Observer<PodSeen>,
    counts: bool,
) -> Result<()> {
    let mut random = rand::rng();
    group.pods.shuffle(&mut random);
    for pod in &mut group.pods {
        std::thread::sleep(std::time::Duration::from_micros(random.random_range(PAUSE)));
        let odd = changes.pending();
        if !odd.is_empty() {
            return Err(format!("events that no change had caused: {odd:?}").into());
        }
        pod.ready = !pod.ready;
        let version = world.set_ready(pod, pod.ready)?;
        let patched = std::time::Instant::now();
        let change = changes.next("the record of a pod")?;
        let key = pod.key(&group.prefix);
        if change.key != key || change.put != pod.ready {
            return Err(format!("{key} was to change, and {change:?} came").into());
        }
        let event = loop {
            let event = seen.next("the event of a pod")?;
            if event.name == pod.name && event.resource_version >= version {
                break event;
            }
        };
        if counts {
            let [from_event, from_patch] = if pod.ready {
                &mut group.put
            } else {
                &mut group.removed
            };
            from_event.push(milliseconds(event.at, change.at));
            from_patch.push(milliseconds(patched, change.at));
        }
    }
    Ok(())
}

const PERCENTILES: [(&str, f64, Option<f64>); 3] = [
    ("p50", 0.50, Some(1.1)),
    ("p90", 0.90, None),
    ("p99", 0.99, Some(1.5)),
];

fn rows(groups: &[Group]) -> Vec<Row> {
    let [operator, floor, twin, fenced, watched] = groups else {
        return Vec::new();
    };
    let mut rows = Vec::new();
    for (from, text) in [
        (0, "from the API server's event"),
        (1, "from the return of the patch"),
    ] {
        for (what, pick) in [
            ("ready", (|group| &group.put) as fn(&Group) -> &[Times; 2]),
            ("not ready", |group| &group.removed),
        ] {
            for (name, share, target) in PERCENTILES {
                let time = |group: &Group| {
                    pick(group)
                        .get(from)
                        .map_or(0.0, |times| times.percentile(share))
                };
                // Both halves of the floor count as the floor.
                let bare = both(floor, twin, pick, from).percentile(share);
                let ratio = time(operator) / bare;
                let mut row = Row::new(
                    format!("propagation, {what}, {text}, {name}"),
                    shown(time(operator)),
                )
                .floor(shown(bare), ratio)
                .noise(time(twin) / time(floor))
                .protocol(time(fenced) / bare, time(watched) / bare);
                // The event is what the target speaks of.
                if let (0, Some(target)) = (from, target) {
                    row = row.target(format!("at most {target}"), ratio <= target);
                }
                rows.push(row);
            }
        }
    }
    rows
}

fn both(a: &Group, b: &Group, pick: fn(&Group) -> &[Times; 2], from: usize) -> Times {
    let mut all = Times::default();
    for group in [a, b] {
        for time in pick(group).get(from).into_iter().flat_map(Times::values) {
            all.push(*time);
        }
    }
    all
}

fn measured(groups: &[Group], counted: f64, lost: f64) -> serde_json::Value {
    let times = |times: &[Times; 2]| json!({"count": times[0].len(), "from_event_ms": times[0].values(), "from_patch_ms": times[1].values()});
    let groups: Vec<_> = groups
        .iter()
        .zip(GROUPS)
        .map(|(group, name)| json!({"group": name, "ready": times(&group.put), "not_ready": times(&group.removed)}))
        .collect();
    json!({"groups": groups, "counted_by_the_operator": counted, "transactions_lost": lost})
}
