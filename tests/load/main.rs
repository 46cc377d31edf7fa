//! Ten thousand pods that are replaced, and that flap as fast as the API server takes it, while etcd is well, stands
//! still, or is slow: `make load`.
//!
//! An own client of etcd notes every event. From that, and from when the API server had taken each change, follows how
//! long the key of a ready pod was missing, and how long that of another one stood. `docs/reliability.md` has the figures.
//! `LOAD_PODS` and `LOAD_SECONDS` make it smaller, to see that it works.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

#[path = "../../benches/operator/observe.rs"]
#[expect(dead_code, reason = "the benchmark uses all of it")]
mod observe;
#[path = "../../benches/operator/world.rs"]
#[expect(dead_code, reason = "the benchmark uses all of it")]
mod world;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::Value;
use testbed::{Etcd, EtcdBuilder, Operator, eventually};

use observe::{Change, Observer};
use world::{BULK, Pod, World, prefix};

/// Anything that can go wrong: the test says so and ends.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Result<T> = std::result::Result<T, Error>;

pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

/// Pods, and for how long they flap.
const PODS: usize = 10_000;
const FLAPPING: Duration = Duration::from_secs(60);
/// Pods that a step of the rolling restart replaces: 5 % of them.
const STEP: usize = PODS / 20;
/// So many others later a pod that flaps is ready again, which is after about a second: what comes back at once is not
/// written at all.
const LATER: usize = 200;
/// Requests to the API server under way at a time: it takes no more a second with more of them.
const AT_ONCE: usize = 32;
/// How long etcd stands still: longer than requests and probes wait, shorter than a lease lasts.
const FROZEN: Duration = Duration::from_secs(8);
/// What each fdatasync of a slow disk takes more.
const SLOW: Duration = Duration::from_millis(100);
/// So long may a key be missing or stand wrongly, beyond the time in which etcd does not answer. On an idle machine it is
/// some milliseconds; here the API server, etcd, the operator and the load share the processors.
const BOUND: Duration = Duration::from_secs(10);
/// What may wait for the engine: its channel, and two batches that were taken from it (`src/app.rs`). Beside that, each
/// key waits once.
const INPUTS: usize = 4096 + 2 * 256;
/// What the operator may have resident, in bytes: what 100,000 pods may take (`docs/benchmarks.md`), of which there are
/// never more than 10,500 here; the rest is for what waits.
const MEMORY: u64 = 64_000_000;
/// From one look at the operator to the next.
const LOOK: Duration = Duration::from_millis(200);

fn number_of(variable: &str) -> Option<usize> {
    std::env::var(variable).ok()?.parse().ok()
}

/// The readiness of a pod, as the API server had it.
#[derive(Clone, Copy, Debug)]
struct Turn {
    ready: bool,
    /// When the change was asked for, and when it was done.
    asked: Instant,
    done: Instant,
}

/// All turns by key, in the order of time.
type Turns = BTreeMap<String, Vec<Turn>>;

/// When each key was put (true) and removed, in the order of time.
type Events = BTreeMap<String, Vec<(Instant, bool)>>;

/// Dropped in this order: what watches or works ends before what it needs.
struct Load {
    changes: Observer<Change>,
    operator: Arc<Operator>,
    world: World,
    prefix: String,
    pods: Vec<Pod>,
    turns: Turns,
    events: Events,
}

/// The most that was seen of the operator.
#[derive(Clone, Copy, Debug, Default)]
struct Most {
    queue: usize,
    memory: u64,
}

impl Load {
    fn new(etcd: EtcdBuilder) -> Self {
        let mut world = World::new(etcd.start().unwrap()).unwrap();
        let count = number_of("LOAD_PODS").unwrap_or(PODS);
        let pods = world.bulk(count).unwrap();
        let changes = observe::etcd(&world.endpoint(), &["/services/bulk/"]).unwrap();
        let operator = Arc::new(world.operator().unwrap());
        world.registered_bulk(count, &operator).unwrap();
        let now = Instant::now();
        let prefix = prefix(BULK, BULK);
        let turn = Turn {
            ready: true,
            asked: now,
            done: now,
        };
        let turns = pods.iter().map(|pod| (pod.key(&prefix), vec![turn]));
        Self {
            turns: turns.collect(),
            events: Events::new(),
            world,
            operator,
            changes,
            prefix,
            pods,
        }
    }

    fn note(&mut self, turned: Vec<(Pod, Turn)>) {
        for (pod, turn) in turned {
            let key = pod.key(&self.prefix);
            self.turns.entry(key).or_default().push(turn);
        }
    }

    /// Replaces all pods, some at a time: new ones are made and become ready, then as many old ones end.
    fn restart(&mut self, fault: Option<&Fault>) {
        let old = std::mem::take(&mut self.pods);
        let steps = old.len().div_ceil(STEP);
        let mut broken = None;
        for (number, some) in old.chunks(STEP).enumerate() {
            if number == steps / 2 {
                broken = fault.map(|fault| fault.begin(&self.world.etcd, Duration::ZERO));
            }
            let new = self.world.pods(BULK, BULK, some.len(), |_| false).unwrap();
            let kube = &self.world.kube;
            let ready = futures::stream::iter(&new)
                .map(|pod| turn(kube, pod, true))
                .buffer_unordered(AT_ONCE)
                .collect::<Vec<_>>();
            let ready = self.world.runtime.block_on(ready);
            let gone = futures::stream::iter(some)
                .map(|pod| end(kube, pod))
                .buffer_unordered(AT_ONCE)
                .collect::<Vec<_>>();
            let gone = self.world.runtime.block_on(gone);
            self.note(ready);
            self.note(gone);
            self.pods.extend(new);
        }
        if let Some(broken) = broken {
            broken.join().unwrap();
        }
    }

    /// Pods stop being ready, one after the other, and are ready again some others later; gives how many did.
    fn flap(&mut self, fault: Option<&Fault>) -> usize {
        let flapping =
            number_of("LOAD_SECONDS").map_or(FLAPPING, |s| Duration::from_secs(s as u64));
        let broken = fault.map(|fault| fault.begin(&self.world.etcd, flapping / 2));
        let begun = Instant::now();
        let kube = &self.world.kube;
        let down = self.pods.iter().cycle();
        let later = LATER.min(self.pods.len() / 2);
        let up = std::iter::repeat_n(None, later).chain(self.pods.iter().cycle().map(Some));
        let mut count = 0;
        let changes = down
            .zip(up)
            .take_while(|_| begun.elapsed() < flapping)
            .inspect(|_| count += 1)
            .flat_map(|(down, up)| [Some((down, false)), up.map(|pod| (pod, true))])
            .flatten();
        let turned = futures::stream::iter(changes)
            .map(|(pod, ready)| turn(kube, pod, ready))
            .buffer_unordered(AT_ONCE)
            .collect::<Vec<_>>();
        let turned = self.world.runtime.block_on(turned);
        // Those that are down still.
        let all = self.pods.len();
        let last = (count - later.min(count)..count).map(|at| &self.pods[at % all]);
        let back = futures::stream::iter(last)
            .map(|pod| turn(kube, pod, true))
            .buffer_unordered(AT_ONCE)
            .collect::<Vec<_>>();
        let back = self.world.runtime.block_on(back);
        self.note(turned);
        self.note(back);
        if let Some(broken) = broken {
            broken.join().unwrap();
        }
        count
    }

    /// Waits until etcd holds exactly what Kubernetes wants, and nothing is under way.
    fn converges(&self) {
        let (world, prefix) = (&self.world, &self.prefix);
        let wanted = world.runtime.block_on(wanted(&world.kube, prefix)).unwrap();
        assert_eq!(wanted.len(), self.pods.len());
        eventually(6 * BOUND, "etcd to hold what is wanted", || {
            let standing = world.runtime.block_on(standing(&world.registry, prefix));
            let standing = standing.map_err(|error| error.to_string())?;
            if standing == wanted {
                return Ok(());
            }
            let differs = |a: &BTreeMap<String, String>, b: &BTreeMap<String, String>| {
                a.iter()
                    .filter(|(key, uid)| b.get(*key) != Some(uid))
                    .count()
            };
            Err(format!(
                "{} are missing, {} are too many",
                differs(&wanted, &standing),
                differs(&standing, &wanted)
            ))
        })
        .unwrap();
        world
            .wait_registered(&self.operator, self.pods.len())
            .unwrap();
    }

    fn leases_lost(&self) -> f64 {
        let lost = self
            .operator
            .metric("etcd_registrar_leases_lost_total", &[]);
        lost.unwrap()
    }

    /// Does something to the pods, and checks what came of it.
    fn play(&mut self, name: &str, fault: Option<&Fault>, work: impl FnOnce(&mut Self) -> usize) {
        let idle = self.operator.rss_bytes().unwrap();
        let lost = self.leases_lost();
        let stop = Arc::new(AtomicBool::new(false));
        let looks = look(&self.operator, &stop);
        let begun = Instant::now();
        let count = work(self);
        let took = begun.elapsed();
        self.converges();
        let converged = begun.elapsed() - took;
        stop.store(true, Ordering::Relaxed);
        let most = looks.join().unwrap();
        let changes = self.changes.pending();
        let seen = changes.iter().filter(|change| change.at >= begun).count();
        for change in changes {
            let events = self.events.entry(change.key).or_default();
            events.push((change.at, change.put));
        }
        let (missing, stale) = judge(&mut self.turns, &self.events);
        println!(
            "load: {name} | {count} pods in {:.1} s, {:.0} a second | {seen} events in etcd | converged after {:.1} s | a ready pod's key missing: {} | \
             another's standing: {} | queue at most {} | resident {:.1} MB before, at most {:.1} MB",
            took.as_secs_f64(),
            count as f64 / took.as_secs_f64(),
            converged.as_secs_f64(),
            shown(&missing),
            shown(&stale),
            most.queue,
            idle as f64 / 1e6,
            most.memory as f64 / 1e6,
        );
        let bound = BOUND + fault.map_or(Duration::ZERO, |fault| fault.lasts);
        for times in [&missing, &stale] {
            assert!(
                times.last().is_some_and(|longest| *longest < bound),
                "{}",
                shown(times)
            );
        }
        // Old and new ones: each key waits once.
        assert!(most.queue <= INPUTS + 2 * self.pods.len(), "{most:?}");
        assert!(most.memory <= MEMORY, "{most:?}");
        // That of the leader key lasts for 5 s; those of records do not end.
        let lost = self.leases_lost() - lost;
        assert!(lost <= if fault.is_some() { 1.0 } else { 0.0 }, "{lost}");
    }
}

fn restart(name: &str, etcd: EtcdBuilder, fault: Option<&Fault>) {
    let mut load = Load::new(etcd);
    let count = load.pods.len();
    load.play(&format!("rolling restart, {name}"), fault, |load| {
        load.restart(fault);
        count
    });
}

fn flap(name: &str, etcd: EtcdBuilder, fault: Option<&Fault>) {
    let mut load = Load::new(etcd);
    load.play(&format!("flaps, {name}"), fault, |load| load.flap(fault));
}

/// What etcd does in the middle of the load.
struct Fault {
    lasts: Duration,
}

impl Fault {
    /// Stands still after a while, and goes on.
    fn begin(&self, etcd: &Arc<Etcd>, after: Duration) -> JoinHandle<()> {
        let (etcd, lasts) = (Arc::clone(etcd), self.lasts);
        std::thread::spawn(move || {
            std::thread::sleep(after);
            etcd.freeze().unwrap();
            std::thread::sleep(lasts);
            etcd.thaw().unwrap();
        })
    }
}

/// Looks at the operator until told to stop.
fn look(operator: &Arc<Operator>, stop: &Arc<AtomicBool>) -> JoinHandle<Most> {
    let (operator, stop) = (Arc::clone(operator), Arc::clone(stop));
    std::thread::spawn(move || {
        let mut most = Most::default();
        while !stop.load(Ordering::Relaxed) {
            // An operator that has no time to answer is looked at again.
            if let Ok(depth) = operator.metric("etcd_registrar_queue_depth", &[]) {
                most.queue = most.queue.max(depth as usize);
            }
            most.memory = most.memory.max(operator.rss_bytes().unwrap());
            std::thread::sleep(LOOK);
        }
        most
    })
}

/// Makes a pod ready, or no longer.
async fn turn(kube: &kube::Client, pod: &Pod, ready: bool) -> (Pod, Turn) {
    let asked = Instant::now();
    world::set_ready(kube, pod, ready).await.unwrap();
    let turn = Turn {
        ready,
        asked,
        done: Instant::now(),
    };
    (pod.clone(), turn)
}

/// Deletes a pod as its controller does, and ends it as its kubelet does.
async fn end(kube: &kube::Client, pod: &Pod) -> (Pod, Turn) {
    let asked = Instant::now();
    let mut done = asked;
    for grace in [30, 0] {
        let path = format!("/api/v1/namespaces/{}/pods/{}", pod.namespace, pod.name);
        let request = http::Request::delete(path)
            .header("content-type", "application/json")
            .body(format!("{{\"gracePeriodSeconds\":{grace}}}").into_bytes())
            .unwrap();
        kube.request_text(request).await.unwrap();
        if grace > 0 {
            done = Instant::now();
        }
    }
    (
        pod.clone(),
        Turn {
            ready: false,
            asked,
            done,
        },
    )
}

/// The UIDs of the pods that are ready, by the keys that they should have.
async fn wanted(kube: &kube::Client, prefix: &str) -> Result<BTreeMap<String, String>> {
    let path = format!("/api/v1/namespaces/{BULK}/pods?labelSelector=app%3D{BULK}");
    let text = kube
        .request_text(http::Request::get(path).body(Vec::new())?)
        .await?;
    let list: Value = serde_json::from_str(&text)?;
    let pods = list["items"]
        .as_array()
        .ok_or("no list")?
        .iter()
        .filter(|pod| {
            let conditions = pod["status"]["conditions"].as_array();
            pod["metadata"]["deletionTimestamp"].is_null()
                && conditions
                    .into_iter()
                    .flatten()
                    .any(|c| c["type"] == "Ready" && c["status"] == "True")
        });
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(pods
        .map(|pod| {
            let key = format!(
                "{prefix}{}/{}:8080",
                world::CLUSTER,
                text(&pod["status"]["podIP"])
            );
            (key, text(&pod["metadata"]["uid"]))
        })
        .collect())
}

/// The UIDs that stand in etcd, by key. Every record is on a lease.
async fn standing(
    registry: &etcd_client::Client,
    prefix: &str,
) -> Result<BTreeMap<String, String>> {
    let mut kv = registry.kv_client().max_decoding_message_size(256 << 20);
    let options = etcd_client::GetOptions::new().with_prefix();
    let answer = kv.get(prefix, Some(options)).await?;
    let mut found = BTreeMap::new();
    for record in answer.kvs() {
        assert_ne!(record.lease(), 0, "{record:?}");
        let value: Value = serde_json::from_slice(record.value())?;
        found.insert(
            record.key_str()?.to_owned(),
            value["uid"].as_str().unwrap_or_default().to_owned(),
        );
    }
    Ok(found)
}

/// How long the key of each ready pod was missing at most, and how long that of each pod stood at most that was not ready
/// or gone; the longest last.
fn judge(turns: &mut Turns, events: &Events) -> (Vec<Duration>, Vec<Duration>) {
    let now = Instant::now();
    let (mut missing, mut stale) = (Vec::new(), Vec::new());
    for (key, turns) in turns {
        turns.sort_by_key(|turn| turn.asked);
        let events = events.get(key).map_or(&[][..], Vec::as_slice);
        for (at, turn) in turns.iter().enumerate() {
            let end = turns.get(at + 1).map_or(now, |next| next.asked);
            let longest = longest(turn.done, end, events, !turn.ready);
            if turn.ready { &mut missing } else { &mut stale }.push(longest);
        }
    }
    missing.sort_unstable();
    stale.sort_unstable();
    (missing, stale)
}

/// The longest time between two times in which a key stood, or did not.
fn longest(from: Instant, to: Instant, events: &[(Instant, bool)], stood: bool) -> Duration {
    let mut longest = Duration::ZERO;
    let (mut stands, mut since) = (false, from);
    for (at, put) in events.iter().copied().chain([(to, !stood)]) {
        let at = at.clamp(from, to.max(from));
        if stands == stood {
            longest = longest.max(at.saturating_duration_since(since));
        }
        if stands != put {
            since = at;
        }
        stands = put;
    }
    longest
}

fn shown(times: &[Duration]) -> String {
    let at = |share: f64| {
        let place = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
        times.get(place).map_or(0.0, Duration::as_secs_f64)
    };
    format!(
        "p50 {:.3} s, p99 {:.3} s, at most {:.3} s",
        at(0.5),
        at(0.99),
        at(1.0)
    )
}

const STANDS_STILL: Fault = Fault { lasts: FROZEN };

fn etcd() -> EtcdBuilder {
    Etcd::builder("registry")
}

#[test]
#[ignore = "takes minutes: make load"]
fn all_pods_are_replaced() {
    restart("etcd well", etcd(), None);
}

#[test]
#[ignore = "takes minutes: make load"]
fn all_pods_are_replaced_while_etcd_stands_still() {
    restart("etcd still for 8 s", etcd(), Some(&STANDS_STILL));
}

#[test]
#[ignore = "takes minutes: make load"]
fn all_pods_are_replaced_while_etcd_is_slow() {
    restart("slow disk", etcd().slow_disk(SLOW), None);
}

#[test]
#[ignore = "takes minutes: make load"]
fn pods_flap() {
    flap("etcd well", etcd(), None);
}

#[test]
#[ignore = "takes minutes: make load"]
fn pods_flap_while_etcd_stands_still() {
    flap("etcd still for 8 s", etcd(), Some(&STANDS_STILL));
}

#[test]
#[ignore = "takes minutes: make load"]
fn pods_flap_while_etcd_is_slow() {
    flap("slow disk", etcd().slow_disk(SLOW), None);
}

#[test]
fn the_longest_time_that_a_key_stood_or_not_is_found() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let seconds = |from, to, stood| {
        let events = [(at(1), true), (at(5), false), (at(7), true), (at(8), true)];
        longest(at(from), at(to), &events, stood).as_secs()
    };
    for (from, to, missing, stood) in [
        (0, 10, 2, 4),
        (0, 1, 1, 0),
        (2, 4, 0, 2),
        (4, 6, 1, 1),
        (6, 12, 1, 5),
        (5, 6, 1, 0),
        (9, 9, 0, 0),
    ] {
        assert_eq!(
            seconds(from, to, false),
            missing,
            "missing from {from} to {to}"
        );
        assert_eq!(
            seconds(from, to, true),
            stood,
            "standing from {from} to {to}"
        );
    }
}
