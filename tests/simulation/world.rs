//! One or two operators between a model of Kubernetes and a model of etcd, driven from a seed.
//!
//! Takes a seed and how much may go wrong, gives a run of virtual time in which every message has a delay
//! of its own. Within one watch, order is kept; answers to requests come in any order. Must never read a
//! clock or any other source of chance than the seed: a run can be replayed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use etcd_registrar::accept::AcceptSettings;
use etcd_registrar::accept::policy::Policy;
use etcd_registrar::api::FormatType;
use etcd_registrar::engine::io::{Effect, Input, KubeInput, Now, Object, Resource, WatchProblem};
use etcd_registrar::engine::kube_view::LIVE_MICROS;
use etcd_registrar::engine::{Engine, Numbers, Settings};
use etcd_registrar::model::etcd::{
    Answer, Failure, FailureKind, Key, KeyValue, LeaseId, News, Op, Range, Request, Revision, Txn,
};
use etcd_registrar::model::pod::Pod;

use crate::checks::{Checks, lease_key};
use crate::expected::{accepted, expected, nodes, without_zone};
use crate::model_etcd::{Author, Etcd, GoesOn, show};
use crate::model_kube::{Event as KubeEvent, Kube};
use crate::oracle::{HOLDING, Known, Oracle, Records};
use crate::schedule::{Fault, Step};

pub(crate) const SECOND: u64 = 1_000_000;
pub(crate) const MILLISECOND: u64 = 1_000;
/// The UIDs of the cluster, and of another one that was given the same name.
pub(crate) const CLUSTER_UIDS: [&str; 2] = [
    "c1c1c1c1-0000-4000-8000-000000000001",
    "d2d2d2d2-0000-4000-8000-000000000002",
];
pub(crate) const CLUSTER: &str = "east";
pub(crate) const REGISTRAR: &str = "/registrar/east/";
pub(crate) const RESOURCES: [Resource; 3] =
    [Resource::Pods, Resource::Nodes, Resource::Registrations];

/// How much may go wrong, and how late things may be.
#[derive(Clone, Debug)]
pub(crate) struct Knobs {
    /// Operators.
    pub(crate) replicas: usize,
    /// Changes of Kubernetes.
    pub(crate) changes: usize,
    /// Over how long they, and the faults, are spread.
    pub(crate) horizon: u64,
    /// The longest lag of a watch of Kubernetes.
    pub(crate) kube_lag: u64,
    /// The longest lag of a watch of etcd.
    pub(crate) etcd_lag: u64,
    /// Watches of Kubernetes that list anew.
    pub(crate) relists: usize,
    /// How often a list breaks off halfway.
    pub(crate) broken_lists: f64,
    /// Watches of etcd that break.
    pub(crate) broken_watches: usize,
    /// How often the outcome of a request is unknown to the one who asked.
    pub(crate) unknown: f64,
    /// Processes that end at once, and are started again.
    pub(crate) crashes: usize,
    /// How long they are away at most.
    pub(crate) away: u64,
    /// Processes that are asked to end, and are started again.
    pub(crate) handovers: usize,
    /// Processes that stand still for a while.
    pub(crate) freezes: usize,
    /// Processes that don't reach Kubernetes for a while.
    pub(crate) cuts: usize,
    /// The lease of the leader key ends.
    pub(crate) expiries: usize,
    /// What people do to keys in etcd.
    pub(crate) hands: usize,
    /// The alarm NOSPACE is raised and disarmed.
    pub(crate) no_space: usize,
    /// Leases of records may end, since nobody may be there to keep them.
    pub(crate) records_may_expire: bool,
    /// Operators of another cluster that was given the same name.
    pub(crate) intruders: usize,
    /// Times in which no process reaches Kubernetes.
    pub(crate) kube_away: usize,
    /// Times in which etcd does not answer, and those in which it stands still.
    pub(crate) etcd_away: usize,
    pub(crate) etcd_frozen: usize,
    /// etcd is restored from a snapshot.
    pub(crate) restores: usize,
    /// etcd comes back empty.
    pub(crate) wipes: usize,
    /// The history of etcd goes.
    pub(crate) compactions: usize,
    /// The policy file changes.
    pub(crate) policies: usize,
    /// Registrations are suspended, refused, or can't be read.
    pub(crate) odd_specs: bool,
    /// How often a list that was not asked for by the engine comes from an old cache.
    pub(crate) stale_lists: f64,
    /// How often a revoke is given up and reaches etcd much later.
    pub(crate) slow_revokes: f64,
    /// Clocks that people read jump.
    pub(crate) clock_jumps: usize,
    /// Most changes are of who has which address.
    pub(crate) moves: bool,
    /// Removals of pods that are there are held.
    pub(crate) holds: bool,
    /// What registrations have beside Json, Plain and Grpc.
    pub(crate) formats: &'static [FormatType],
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            replicas: 1,
            changes: 30,
            horizon: 6 * SECOND,
            kube_lag: 100 * MILLISECOND,
            etcd_lag: 50 * MILLISECOND,
            relists: 0,
            broken_lists: 0.0,
            broken_watches: 0,
            unknown: 0.0,
            crashes: 0,
            away: 8 * SECOND,
            handovers: 0,
            freezes: 0,
            cuts: 0,
            expiries: 0,
            hands: 0,
            no_space: 0,
            records_may_expire: false,
            intruders: 0,
            kube_away: 0,
            etcd_away: 0,
            etcd_frozen: 0,
            restores: 0,
            wipes: 0,
            compactions: 0,
            policies: 0,
            odd_specs: false,
            stale_lists: 0.0,
            slow_revokes: 0.0,
            clock_jumps: 0,
            moves: false,
            holds: false,
            formats: &[],
        }
    }
}

/// A term: the nonce of the leader key, and the revision at which that came into being.
pub(crate) type Term = (String, Revision);

/// A request on its way to etcd.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) process: usize,
    life: u64,
    number: u64,
    pub(crate) request: Request,
    /// Its answer comes back.
    answer: bool,
    /// Pods whose records it deletes and that the sender knew to have left.
    pub(crate) left: Vec<String>,
    /// What the sender had been told of Kubernetes.
    pub(crate) known: Known,
    /// The last term that it was told to have won.
    pub(crate) term: Option<Term>,
    /// Through which connections: those of before a restore are gone.
    etcd: u64,
}

/// What a lease is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) registration: String,
    pub(crate) scope: String,
    pub(crate) ttl: i64,
    pub(crate) format: String,
}

/// What happens next. Where `Registrar.tla` has an action for it, it has that name.
#[derive(Debug)]
enum Event {
    Step(Step),
    Start(usize),
    Tick(usize, u64),
    /// A watch of Kubernetes delivers, or lists (`List`).
    KubeWatch(usize, u64, Resource),
    /// The policy file is read.
    Policy(usize, u64),
    Probe(usize, u64),
    Keeper(usize, u64),
    /// A request reaches etcd.
    Apply(Box<Sent>),
    Answer {
        process: usize,
        life: u64,
        number: u64,
        request: Box<Request>,
        answer: Box<Result<Answer, Failure>>,
        etcd: u64,
    },
    /// A range is read.
    Read(usize, u64, Range, u64),
    /// What was read is handed on.
    Given {
        process: usize,
        life: u64,
        range: Range,
        token: u64,
        revision: Revision,
        records: Vec<KeyValue>,
    },
    /// A watch of etcd delivers.
    Watch(usize, u64, Range, u64),
    Progress(usize, u64),
    /// A process hears that its watches of etcd broke, and that it is connected again.
    Broken(usize, u64),
    Connected(usize, u64),
    /// etcd answers again.
    EtcdBack,
    Status {
        process: usize,
        effect: Box<Effect>,
    },
}

impl Event {
    /// Whose event it is, and of which of its lives; `None`: it happens in etcd or Kubernetes.
    fn of(&self) -> Option<(usize, u64)> {
        match self {
            Self::Tick(process, life)
            | Self::KubeWatch(process, life, _)
            | Self::Policy(process, life)
            | Self::Probe(process, life)
            | Self::Keeper(process, life)
            | Self::Read(process, life, ..)
            | Self::Watch(process, life, ..)
            | Self::Progress(process, life)
            | Self::Broken(process, life)
            | Self::Connected(process, life)
            | Self::Answer { process, life, .. }
            | Self::Given { process, life, .. } => Some((*process, *life)),
            Self::Step(_)
            | Self::Start(_)
            | Self::Apply(_)
            | Self::EtcdBack
            | Self::Status { .. } => None,
        }
    }
}

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Away,
    Listing {
        version: u64,
        rest: Vec<Object>,
    },
    Watching,
}

/// A list+watch of one resource.
#[derive(Debug, Default)]
struct KubeWatch {
    phase: Phase,
    position: u64,
    /// The newest relist that was ordered.
    ordered: u64,
    /// The one that the list has taken up.
    taken: u64,
    /// The one that a list has answered as a whole.
    answered: u64,
    /// Its next turn is in the queue.
    due: bool,
    broken: bool,
    /// The list before came from an old cache.
    was_stale: bool,
    /// The newest resource version that was handed on.
    heard: u64,
}

/// What a process was told of a key of etcd.
#[derive(Debug)]
struct Told {
    /// Of which etcd: one that was restored is another.
    etcd: u64,
    revision: Revision,
    kv: Option<KeyValue>,
}

impl Told {
    fn hear(&mut self, etcd: u64, revision: Revision, kv: Option<&KeyValue>) {
        if (etcd, revision) >= (self.etcd, self.revision) {
            *self = Self {
                etcd,
                revision,
                kv: kv.cloned(),
            };
        }
    }
}

#[derive(Debug)]
struct Followed {
    token: u64,
    /// Up to where it was delivered; `None`: no snapshot was handed on yet.
    reached: Option<Revision>,
    due: bool,
}

/// Snapshots and watches of etcd.
#[derive(Debug, Default)]
struct Follower {
    ranges: BTreeMap<Range, Followed>,
    tokens: u64,
    asked: bool,
    connected: bool,
}

/// Keeps leases alive.
#[derive(Debug)]
struct Keeper {
    named: BTreeMap<LeaseId, i64>,
    due: BTreeMap<LeaseId, u64>,
    keeping: bool,
    uid: Option<String>,
}

#[derive(Debug)]
struct Process {
    engine: Option<Engine>,
    /// Counts its starts: what belongs to an earlier one is void.
    life: u64,
    watches: BTreeMap<Resource, KubeWatch>,
    follower: Follower,
    keeper: Keeper,
    /// It stands still until then.
    frozen_until: u64,
    /// It does not reach Kubernetes until then.
    cut_until: u64,
    /// It was asked to end.
    leaving: bool,
    /// The UID of its cluster.
    cluster: usize,
    /// The policy that it has read.
    policy: usize,
    /// When Kubernetes told it something last.
    answered: u64,
    /// What it has read from etcd.
    told: BTreeMap<Key, Told>,
    /// The last term that it was told to have won.
    term: Option<Term>,
    /// Until then it hears nothing of what stands below a prefix in etcd.
    deaf: (String, u64),
    /// Its watches of one resource of Kubernetes deliver nothing until then, although they stand.
    stalled: BTreeMap<Resource, u64>,
    /// Such requests of its are given up, and reach etcd when a test says so; with `true`, such requests reach
    /// etcd twice: also when a test says so.
    held_back: Option<(Kind, bool)>,
}

/// A kind of requests.
pub(crate) type Kind = fn(&Request) -> bool;

impl Process {
    fn hear(&mut self, etcd: u64, revision: Revision, key: &Key, kv: Option<&KeyValue>) {
        match self.told.get_mut(key) {
            Some(told) => told.hear(etcd, revision, kv),
            None => {
                let kv = kv.cloned();
                let told = Told { etcd, revision, kv };
                self.told.insert(Arc::clone(key), told);
            }
        }
    }

    fn new(cluster: usize) -> Self {
        Self {
            engine: None,
            life: 0,
            watches: BTreeMap::new(),
            follower: Follower::default(),
            keeper: Keeper {
                named: BTreeMap::new(),
                due: BTreeMap::new(),
                keeping: true,
                uid: None,
            },
            frozen_until: 0,
            cut_until: 0,
            leaving: false,
            cluster,
            policy: 0,
            answered: 0,
            told: BTreeMap::new(),
            term: None,
            deaf: (String::new(), 0),
            stalled: BTreeMap::new(),
            held_back: None,
        }
    }
}

/// All of it.
pub(crate) struct World {
    pub(crate) rng: StdRng,
    pub(crate) knobs: Knobs,
    pub(crate) now: u64,
    pub(crate) kube: Kube,
    pub(crate) etcd: Etcd,
    pub(crate) oracle: Oracle,
    pub(crate) checks: Checks,
    /// Faults that last may happen still.
    pub(crate) faults: bool,
    /// Once they don't: the cluster whose processes go on.
    winner: Option<usize>,
    processes: Vec<Process>,
    queue: BTreeMap<(u64, u64), Event>,
    serial: u64,
    /// Up to which revision the checks have seen etcd.
    checked: Revision,
    /// Requests that have not reached etcd yet, and may.
    under_way: usize,
    /// Counts the restores: which etcd it is.
    etcd_number: u64,
    /// etcd does not answer, until then.
    etcd_away: bool,
    etcd_away_until: u64,
    /// When the faults end.
    horizon: u64,
    /// It stands still meanwhile, and its clock goes on.
    etcd_frozen: bool,
    /// The policy file.
    pub(crate) policy: usize,
    /// How far the clocks that people read are off, in seconds.
    clock_off: i64,
    /// Keys at which a record of ours has ever stood.
    stood: BTreeSet<Key>,
    /// Revokes that were sent, and leases that etcd was asked about.
    pub(crate) revokes: usize,
    pub(crate) asked_leases: usize,
    /// Requests that are held back.
    held_back: Vec<Sent>,
    /// Faults that happened, for a person.
    pub(crate) faults_played: usize,
    /// Times at which something was held that nobody wants.
    pub(crate) held: usize,
    /// The last comparison, and of which states.
    compared: ((u64, u64, Revision), Vec<String>),
    trace: Option<Vec<String>>,
    print: bool,
}

impl World {
    pub(crate) fn new(seed: u64, knobs: Knobs, trace: bool) -> Self {
        let processes = (0..knobs.replicas + knobs.intruders)
            .map(|at| Process::new(usize::from(at >= knobs.replicas)))
            .collect();
        Self {
            rng: StdRng::seed_from_u64(seed),
            now: SECOND,
            kube: Kube::new(),
            etcd: Etcd::new(),
            oracle: Oracle::new(AcceptSettings {
                cluster_name: CLUSTER.into(),
                registrar_prefix: "/registrar/".into(),
            }),
            checks: Checks::new(&knobs),
            faults: true,
            winner: None,
            processes,
            queue: BTreeMap::new(),
            serial: 0,
            checked: 1,
            under_way: 0,
            etcd_number: 0,
            etcd_away: false,
            etcd_away_until: 0,
            horizon: 0,
            etcd_frozen: false,
            policy: first_policy(&knobs),
            clock_off: 0,
            stood: BTreeSet::new(),
            revokes: 0,
            asked_leases: 0,
            held_back: Vec::new(),
            faults_played: 0,
            held: 0,
            compared: ((0, 0, 0), Vec::new()),
            trace: trace.then(Vec::new),
            print: std::env::var_os("SEED").is_some(),
            knobs,
        }
    }

    /// What happened, if it was to be noted.
    pub(crate) fn trace(&mut self) -> Vec<String> {
        self.trace.take().unwrap_or_default()
    }

    pub(crate) fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let line = format!("{:>10.3} ms  {}", self.now as f64 / 1000.0, what());
            if self.print {
                println!("{line}");
            }
            trace.push(line);
        }
    }

    // === time ===

    fn at(&mut self, time: u64, event: Event) {
        self.serial += 1;
        self.queue.insert((time, self.serial), event);
    }

    fn later(&mut self, most: u64, event: Event) {
        let delay = self.delay(most);
        self.at(self.now + delay, event);
    }

    /// Mostly short, sometimes long.
    fn delay(&mut self, most: u64) -> u64 {
        let most = most.max(2_000);
        if self.rng.random_bool(0.8) {
            self.rng.random_range(200..=2_000)
        } else {
            self.rng.random_range(200..=most)
        }
    }

    /// What a schedule does before the operators start is done, and the rest is to come.
    pub(crate) fn plan(&mut self, steps: &[Step]) {
        self.horizon = self.now + self.knobs.horizon;
        for step in steps {
            match step.at {
                None => self.step(step),
                Some(at) => self.at(self.now + at, Event::Step(*step)),
            }
        }
        for process in 0..self.processes.len() {
            self.later(SECOND, Event::Start(process));
        }
    }

    /// No new faults: what is down is started, what is cut off is connected, people leave etcd
    /// alone. Where two clusters fought for the name, the loser ends.
    pub(crate) fn calm(&mut self) {
        self.note(|| "--- no more faults".into());
        self.faults = false;
        self.etcd.full = false;
        if self.etcd_away {
            self.etcd_back();
        }
        crate::scenario::clean_up(self);
        let winner = self.owner().unwrap_or(0);
        self.winner = Some(winner);
        for process in 0..self.processes.len() {
            if self.process(process).cluster != winner {
                self.crash(process);
                continue;
            }
            self.thaw(process);
            let now = self.now;
            let found = self.process(process);
            found.cut_until = found.cut_until.min(now);
            if found.engine.is_none() && self.knobs.intruders > 0 {
                // It had ended because the other cluster had the name.
                self.later(SECOND, Event::Start(process));
            }
        }
        self.wake_all();
        self.after_etcd();
    }

    /// A process that stands still goes on.
    fn thaw(&mut self, process: usize) {
        let now = self.now;
        let frozen_until = &mut self.process(process).frozen_until;
        let until = std::mem::replace(frozen_until, now.min(*frozen_until));
        if until > now {
            self.wait_otherwise(process, until, now);
        }
    }

    /// What waits for a process that stands still waits for another moment: it comes before anything new and in its order,
    /// as from the channels of the operator. No snapshot overtakes the news that the watch before it broke.
    fn wait_otherwise(&mut self, process: usize, before: u64, until: u64) {
        let of_process = |event: &Event| event.of().is_some_and(|(whose, _)| whose == process);
        let waiting: Vec<(u64, u64)> = self
            .queue
            .range((before, 0)..=(before, u64::MAX))
            .filter(|(_, event)| of_process(event))
            .map(|(at, _)| *at)
            .collect();
        for at in waiting {
            if let Some(event) = self.queue.remove(&at) {
                self.queue.insert((until, at.1), event);
            }
        }
    }

    /// Every registration can be served again. Before, what is kept of those that are not is looked at.
    pub(crate) fn mend(&mut self, bound: u64) {
        if self.knobs.odd_specs || self.knobs.policies > 0 {
            let end = self.now + bound;
            // Twice: a lane whose outcome is unknown waits up to a second before it asks.
            let mut rested = 0;
            while rested < 2 {
                self.run_until(self.now + SECOND);
                let leader = self.leader();
                let known = self.running().all(|process| self.caught_up(process));
                if known && self.all_run() && leader.is_some_and(|leader| self.rests(leader)) {
                    rested += 1;
                    continue;
                }
                rested = 0;
                assert!(self.now < end, "no rest:\n{}", self.summary());
            }
            let known = Known {
                pods: self.kube.version,
                registrations: self.kube.version,
                policy: self.policy,
            };
            self.checks
                .kept(&self.etcd, &self.kube, &mut self.oracle, known);
        }
        crate::scenario::mend(self, true);
        let policy = first_policy(&self.knobs);
        self.set_policy(policy);
        self.wake_all();
    }

    /// Which cluster has the name, or else still has leases under it.
    fn owner(&self) -> Option<usize> {
        let owner = self.etcd.get(format!("{REGISTRAR}owner").as_bytes());
        CLUSTER_UIDS.iter().position(|uid| match owner {
            Some(kv) => *kv.value == *uid.as_bytes(),
            None => !self
                .etcd
                .below(&format!("{REGISTRAR}leases/{uid}/"))
                .is_empty(),
        })
    }

    /// Whether a process is one that has to work at the end.
    pub(crate) fn all_run(&self) -> bool {
        let winner = self.owner().unwrap_or(0);
        self.processes
            .iter()
            .filter(|found| found.cluster == winner)
            .all(|found| found.engine.is_some())
    }

    fn expire(&mut self) {
        if !self.etcd_away {
            self.etcd.expire(self.now);
        }
    }

    /// The next event; until `end`.
    pub(crate) fn run_until(&mut self, end: u64) {
        while let Some(entry) = self.queue.first_entry() {
            let (time, _) = *entry.key();
            if time > end {
                break;
            }
            let event = entry.remove();
            self.now = time;
            self.expire();
            self.after_etcd();
            self.happen(event);
            self.after_etcd();
        }
        self.now = end;
        self.expire();
        self.after_etcd();
    }

    fn happen(&mut self, event: Event) {
        if let Some((process, life)) = event.of() {
            let Some(found) = self.processes.get(process) else {
                return;
            };
            if found.life != life || found.engine.is_none() {
                return;
            }
            if found.frozen_until > self.now {
                let until = found.frozen_until;
                self.at(until, event);
                return;
            }
            let (prefix, until) = &found.deaf;
            let unheard = match &event {
                Event::Read(_, _, range, _)
                | Event::Watch(_, _, range, _)
                | Event::Given { range, .. } => range.start.starts_with(prefix.as_bytes()),
                // Who hears nothing at all does not notice either that the stream is gone.
                Event::Broken(..) => prefix.is_empty(),
                _ => false,
            };
            if unheard && *until > self.now {
                let until = *until;
                self.at(until, event);
                return;
            }
        }
        match event {
            Event::Step(step) => self.step(&step),
            Event::Start(process) => self.start(process),
            Event::Tick(process, life) => {
                self.feed(process, Input::Tick);
                self.at(self.now + 100 * MILLISECOND, Event::Tick(process, life));
            }
            Event::KubeWatch(process, _, resource) => self.kube_turn(process, resource),
            Event::Policy(process, _) => {
                let policy = self.policy;
                self.process(process).policy = policy;
                let read = self.oracle.policy(policy).clone();
                self.feed(process, Input::Policy(Box::new(read)));
            }
            Event::Probe(process, life) => {
                self.probe(process);
                let pause = self.rng.random_range(SECOND / 2..2 * SECOND);
                self.at(self.now + pause, Event::Probe(process, life));
            }
            Event::Keeper(process, life) => {
                self.keep(process);
                let pause = self.rng.random_range(300 * MILLISECOND..600 * MILLISECOND);
                self.at(self.now + pause, Event::Keeper(process, life));
            }
            Event::Apply(sent) => self.apply(*sent),
            Event::Answer {
                process,
                number,
                request,
                answer,
                etcd,
                ..
            } => {
                let answer = if etcd == self.etcd_number {
                    *answer
                } else {
                    Err(unknown("the connection broke"))
                };
                if let (Request::Txn(txn), Ok(answer)) = (&*request, &answer) {
                    self.told_by_answer(process, txn, answer);
                }
                self.feed(process, Input::Answer(number, answer));
            }
            Event::Read(process, life, range, token) => self.read(process, life, range, token),
            Event::Given {
                process,
                range,
                token,
                revision,
                records,
                ..
            } => self.given(process, range, token, revision, records),
            Event::Watch(process, _, range, token) => self.watch_turn(process, &range, token),
            Event::Progress(process, _) => self.progress(process),
            Event::Broken(process, _) => {
                self.feed(
                    process,
                    Input::Etcd(News::Broken("the stream ended".into())),
                );
            }
            Event::Connected(process, _) => self.connected(process),
            Event::EtcdBack if self.etcd_away && self.etcd_away_until <= self.now => {
                self.etcd_back()
            }
            Event::EtcdBack => {}
            Event::Status { process, effect } => self.status(process, *effect),
        }
    }

    // === processes ===

    fn process(&mut self, process: usize) -> &mut Process {
        self.processes.get_mut(process).expect("a process")
    }

    pub(crate) fn running(&self) -> impl Iterator<Item = usize> {
        self.processes
            .iter()
            .enumerate()
            .filter(|(_, found)| found.engine.is_some())
            .map(|(process, _)| process)
    }

    /// The process that leads, if one knows that it does.
    pub(crate) fn leader(&mut self) -> Option<usize> {
        (0..self.processes.len()).find(|process| {
            self.process(*process)
                .engine
                .as_mut()
                .is_some_and(|engine| engine.numbers().leads)
        })
    }

    /// How many processes believe that they lead.
    pub(crate) fn leaders(&mut self) -> usize {
        self.processes
            .iter_mut()
            .filter_map(|found| found.engine.as_mut())
            .filter_map(|engine| engine.numbers().leads.then_some(()))
            .count()
    }

    pub(crate) fn start(&mut self, process: usize) {
        let seed = self.rng.random();
        let number = self.policy;
        let policy = self.oracle.policy(number).clone();
        self.note(|| format!("p{process} Start"));
        let winner = self.winner;
        let found = self.process(process);
        if found.engine.is_some() || winner.is_some_and(|winner| winner != found.cluster) {
            return;
        }
        let life = found.life + 1;
        *found = Process::new(found.cluster);
        found.life = life;
        found.policy = number;
        found.follower.connected = true;
        found.engine = Some(Engine::new(
            Settings {
                cluster_name: CLUSTER.into(),
                registrar_prefix: "/registrar/".into(),
                election_ttl: 5,
                max_staleness: 0,
                namespaces: BTreeSet::new(),
                seed,
            },
            policy,
        ));
        self.later(50 * MILLISECOND, Event::Probe(process, life));
        self.later(100 * MILLISECOND, Event::Tick(process, life));
        self.later(100 * MILLISECOND, Event::Keeper(process, life));
        for resource in RESOURCES {
            self.process(process)
                .watches
                .insert(resource, KubeWatch::default());
            self.wake_kube(process, resource, 50 * MILLISECOND);
        }
    }

    /// The process is gone; what it had sent may still arrive.
    pub(crate) fn crash(&mut self, process: usize) {
        let found = self.process(process);
        found.engine = None;
        found.life += 1;
    }

    fn feed(&mut self, process: usize, input: Input) {
        let now = Now {
            monotonic: self.now,
            unix: 1_700_000_000 + i64::try_from(self.now / SECOND).unwrap_or(0) + self.clock_off,
        };
        self.note_told(process, &input);
        if self.trace.is_some() && !matches!(input, Input::Tick) {
            let text = show_input(&input);
            self.note(|| format!("p{process} {text}"));
        }
        let Some(engine) = &mut self.process(process).engine else {
            return;
        };
        for effect in engine.step(input, now) {
            self.carry_out(process, effect);
        }
    }

    fn carry_out(&mut self, process: usize, effect: Effect) {
        if self.trace.is_some() {
            let text = show_effect(&effect);
            self.note(|| format!("p{process}     {text}"));
        }
        let life = self.process(process).life;
        match effect {
            Effect::Ask(number, request) => self.send(process, life, number, request),
            Effect::Follow(ranges) => self.follow(process, life, ranges),
            Effect::Reread(range) => self.reread(process, &range),
            Effect::AskProgress => {
                self.process(process).follower.asked = true;
                self.later(20 * MILLISECOND, Event::Progress(process, life));
            }
            Effect::Keep(lease, ttl) => {
                let due = self.now + third(ttl);
                let keeper = &mut self.process(process).keeper;
                keeper.named.insert(lease, ttl);
                keeper.due.entry(lease).or_insert(due);
            }
            Effect::Release(lease) => {
                let keeper = &mut self.process(process).keeper;
                keeper.named.remove(&lease);
            }
            Effect::Keeping(keeping) => self.process(process).keeper.keeping = keeping,
            Effect::Cluster(uid) => self.process(process).keeper.uid = Some(uid),
            Effect::Relist(resource, number) => {
                if let Some(watch) = self.process(process).watches.get_mut(&resource) {
                    watch.ordered = watch.ordered.max(number);
                    // Its next turn may be far off.
                    watch.due = false;
                }
                self.wake_kube(process, resource, 20 * MILLISECOND);
            }
            effect @ Effect::PatchStatus { .. } => {
                self.check_status(process, &effect);
                let effect = Box::new(effect);
                self.later(50 * MILLISECOND, Event::Status { process, effect });
            }
            Effect::Announce { .. } | Effect::Propagated(..) | Effect::Log(..) => {}
            Effect::Done => {
                self.crash(process);
                let pause = self.rng.random_range(0..3 * SECOND);
                self.at(self.now + pause, Event::Start(process));
            }
            Effect::Fatal(message) => self.gives_up(process, &message),
        }
    }

    // === Kubernetes ===

    fn wake_kube(&mut self, process: usize, resource: Resource, lag: u64) {
        let life = self.process(process).life;
        let Some(watch) = self.process(process).watches.get_mut(&resource) else {
            return;
        };
        if !std::mem::replace(&mut watch.due, true) {
            self.later(lag, Event::KubeWatch(process, life, resource));
        }
    }

    /// Kubernetes changed.
    pub(crate) fn wake_all(&mut self) {
        let lag = self.lag();
        for process in self.running().collect::<Vec<_>>() {
            for resource in RESOURCES {
                if self.pending(process, resource) {
                    self.wake_kube(process, resource, lag);
                }
            }
        }
    }

    fn lag(&self) -> u64 {
        if self.faults {
            self.knobs.kube_lag
        } else {
            self.knobs.kube_lag.min(100 * MILLISECOND)
        }
    }

    /// Whether the API server has something that a watch has not delivered.
    fn pending(&self, process: usize, resource: Resource) -> bool {
        let Some(watch) = self
            .processes
            .get(process)
            .and_then(|found| found.watches.get(&resource))
        else {
            return false;
        };
        !matches!(watch.phase, Phase::Watching)
            || self.kube.events(resource, watch.position).next().is_some()
    }

    /// Whether a process has heard of everything.
    pub(crate) fn caught_up(&self, process: usize) -> bool {
        let policy = self.processes.get(process).map(|found| found.policy);
        policy == Some(self.policy)
            && RESOURCES
                .iter()
                .all(|resource| !self.pending(process, *resource))
    }

    fn kube_turn(&mut self, process: usize, resource: Resource) {
        let stalled = self.process(process).stalled.get(&resource);
        let stalled_until = stalled.copied().unwrap_or(0);
        // A list that is asked for comes all the same.
        let watches = self
            .process(process)
            .watches
            .get(&resource)
            .is_some_and(|watch| {
                matches!(watch.phase, Phase::Watching) && watch.ordered <= watch.taken
            });
        if watches && stalled_until > self.now {
            let life = self.process(process).life;
            self.at(stalled_until, Event::KubeWatch(process, life, resource));
            return;
        }
        let cut = self.process(process).cut_until > self.now;
        let broken_lists = if self.faults {
            self.knobs.broken_lists
        } else {
            0.0
        };
        let breaks = self.rng.random_bool(broken_lists);
        let some = self.rng.random_range(1..=4usize);
        let lag = self.lag();
        let Some(mut watch) = self.process(process).watches.remove(&resource) else {
            return;
        };
        watch.due = false;
        let mut inputs: Vec<KubeInput> = Vec::new();
        let mut changes: Vec<(u64, KubeInput)> = Vec::new();
        let stale = self.faults && self.rng.random_bool(self.knobs.stale_lists);
        let back = self.rng.random_range(1..=12u64);
        let broken = |inputs: &mut Vec<KubeInput>| {
            inputs.push(KubeInput::Broken {
                resource,
                problem: WatchProblem::Unreachable,
                message: "the connection broke".into(),
            });
        };
        let pause;
        if cut {
            broken(&mut inputs);
            watch.broken = true;
            if !matches!(watch.phase, Phase::Watching) {
                watch.phase = Phase::Away;
            }
            pause = Some(SECOND);
        } else {
            match &mut watch.phase {
                Phase::Away => {
                    watch.taken = watch.ordered;
                    // A list that broke off is no answer.
                    let asked = watch.taken > watch.answered;
                    watch.broken = false;
                    inputs.push(KubeInput::ListStarted {
                        resource,
                        relist: watch.taken,
                    });
                    // One that the engine asked for is consistent; and of two in a row that are older than
                    // what was seen the engine may make what it likes.
                    let stale = stale && !asked && !watch.was_stale;
                    watch.was_stale = stale;
                    let version = if stale {
                        self.kube.version.saturating_sub(back).max(1)
                    } else {
                        self.kube.version
                    };
                    let mut rest = self.kube.list_at(resource, version);
                    rest.shuffle(&mut self.rng);
                    watch.phase = Phase::Listing { version, rest };
                    pause = Some(20 * MILLISECOND);
                }
                Phase::Listing { .. } if watch.ordered > watch.taken => {
                    watch.phase = Phase::Away;
                    pause = Some(20 * MILLISECOND);
                }
                Phase::Listing { .. } if breaks => {
                    broken(&mut inputs);
                    watch.phase = Phase::Away;
                    pause = Some(200 * MILLISECOND);
                }
                Phase::Listing { version, rest } => {
                    for object in rest.drain(..some.min(rest.len())) {
                        inputs.push(KubeInput::Applied(object));
                    }
                    if rest.is_empty() {
                        let resource_version = *version;
                        let done = KubeInput::ListDone {
                            resource,
                            resource_version,
                        };
                        changes.push((resource_version, done));
                        watch.answered = watch.taken;
                        watch.phase = Phase::Watching;
                        pause = Some(lag);
                    } else {
                        pause = Some(20 * MILLISECOND);
                    }
                }
                Phase::Watching if watch.ordered > watch.taken => {
                    watch.phase = Phase::Away;
                    pause = Some(20 * MILLISECOND);
                }
                Phase::Watching => {
                    if std::mem::take(&mut watch.broken) {
                        inputs.push(KubeInput::Bookmark {
                            resource,
                            resource_version: watch.position,
                        });
                    }
                    let mut events = self.kube.events(resource, watch.position);
                    for (version, event) in events.by_ref().take(some) {
                        let input = match event {
                            KubeEvent::Applied(object) => KubeInput::Applied(object.clone()),
                            KubeEvent::Deleted(object) => KubeInput::Deleted(object.clone()),
                        };
                        changes.push((version, input));
                    }
                    pause = events.next().is_some().then_some(lag);
                }
            }
        }
        self.process(process).watches.insert(resource, watch);
        if let Some(pause) = pause {
            self.wake_kube(process, resource, pause);
        }
        for input in inputs {
            self.feed(process, Input::Kube(input));
        }
        for (version, input) in changes {
            if let Some(watch) = self.process(process).watches.get_mut(&resource) {
                watch.position = version;
                watch.heard = watch.heard.max(version);
            }
            self.feed(process, Input::Kube(input));
        }
    }

    /// The probe, and the bookmarks and progress that come when nothing else does.
    fn probe(&mut self, process: usize) {
        self.process(process).follower.asked = true;
        self.progress(process);
        if self.process(process).cut_until > self.now {
            for resource in RESOURCES {
                self.wake_kube(process, resource, SECOND);
            }
            return;
        }
        let cluster = self.process(process).cluster;
        let uid = CLUSTER_UIDS.get(cluster).expect("a cluster").to_string();
        self.feed(process, Input::Kube(KubeInput::ClusterUid(uid)));
        self.feed(process, Input::Kube(KubeInput::Answered));
        for resource in RESOURCES {
            if self.pending(process, resource) {
                continue;
            }
            let resource_version = self.kube.version;
            if let Some(watch) = self.process(process).watches.get_mut(&resource) {
                if watch.broken {
                    continue;
                }
                watch.position = resource_version;
                watch.heard = watch.heard.max(resource_version);
            }
            let bookmark = KubeInput::Bookmark {
                resource,
                resource_version,
            };
            self.feed(process, Input::Kube(bookmark));
        }
    }

    fn status(&mut self, process: usize, effect: Effect) {
        let Effect::PatchStatus {
            namespace,
            name,
            uid,
            status,
            ready_only,
        } = effect
        else {
            return;
        };
        if self.process(process).cut_until > self.now {
            return;
        }
        let full_name = format!("{namespace}/{name}");
        let mut whole = *status;
        if ready_only {
            let known = self.kube.registrations.get(&full_name);
            let mut merged = known.and_then(|r| r.status.clone()).unwrap_or_default();
            for condition in whole.conditions {
                merged.conditions.retain(|c| c.type_ != condition.type_);
                merged.conditions.push(condition);
            }
            whole = merged;
        }
        self.kube.put_status(&full_name, &uid, whole);
        self.wake_all();
    }

    // === etcd ===

    fn send(&mut self, process: usize, life: u64, number: u64, request: Request) {
        self.check_sent(process, &request);
        let sent = Sent {
            process,
            life,
            number,
            left: self.known_to_have_left(process, &request),
            known: self.known(process),
            term: self.process(process).term.clone(),
            etcd: self.etcd_number,
            answer: true,
            request,
        };
        let there = self.delay(20 * MILLISECOND);
        if let Some((kind, twice)) = self.process(process).held_back
            && kind(&sent.request)
        {
            self.held_back.push(Sent {
                answer: false,
                ..sent.clone()
            });
            if !twice {
                self.answers(self.now + 50 * MILLISECOND, &sent, Err(GIVEN_UP));
                return;
            }
        }
        let mut unknown = if self.faults { self.knobs.unknown } else { 0.0 };
        let slow = matches!(sent.request, Request::Revoke(_)) && self.faults;
        self.revokes += usize::from(matches!(sent.request, Request::Revoke(_)));
        self.asked_leases += usize::from(matches!(sent.request, Request::LeaseKeys(_)));
        if slow {
            unknown = unknown.max(self.knobs.slow_revokes);
        }
        if !self.rng.random_bool(unknown) {
            self.travels(self.now + there, sent);
            return;
        }
        // `GiveUp`: etcd does it now, later, both (a client that tries again), or never.
        let deadline = self.now + self.rng.random_range(50 * MILLISECOND..1_500 * MILLISECOND);
        self.answers(deadline, &sent, Err(GIVEN_UP));
        let sent = Sent {
            answer: false,
            ..sent
        };
        let how = self.rng.random_range(0..4);
        if matches!(how, 0 | 2) {
            self.travels((self.now + there).min(deadline), sent.clone());
        }
        if matches!(how, 1 | 2) {
            let most = if slow && self.knobs.slow_revokes > 0.0 {
                20 * SECOND
            } else {
                3 * SECOND
            };
            let late = self.rng.random_range(0..most);
            self.travels(deadline + late, sent);
        }
    }

    fn travels(&mut self, arrives: u64, sent: Sent) {
        self.under_way += 1;
        self.at(arrives, Event::Apply(Box::new(sent)));
    }

    fn answers(&mut self, at: u64, sent: &Sent, answer: Result<Answer, &str>) {
        self.answered(at, sent, answer.map_err(unknown));
    }

    fn answered(&mut self, at: u64, sent: &Sent, answer: Result<Answer, Failure>) {
        let event = Event::Answer {
            process: sent.process,
            life: sent.life,
            number: sent.number,
            request: Box::new(sent.request.clone()),
            answer: Box::new(answer),
            etcd: sent.etcd,
        };
        self.at(at, event);
    }

    /// A request reaches etcd.
    fn apply(&mut self, sent: Sent) {
        self.under_way -= 1;
        if sent.etcd != self.etcd_number {
            // Its connection broke when etcd was restored.
            if sent.answer {
                self.answers(self.now, &sent, Err(GIVEN_UP));
            }
            return;
        }
        if self.etcd_away_until > self.now {
            if sent.answer {
                let deadline = self.now + self.rng.random_range(0..1_500 * MILLISECOND);
                self.answers(deadline, &sent, Err(GIVEN_UP));
            }
            if self.rng.random_bool(0.5) {
                let late = self.rng.random_range(0..200 * MILLISECOND);
                let sent = Sent {
                    answer: false,
                    ..sent
                };
                self.travels(self.etcd_away_until + late, sent);
            }
            return;
        }
        let Sent {
            process, number, ..
        } = sent;
        self.checks.other(&sent.request);
        let result = self
            .etcd
            .request(&sent.request, self.now, Author::Process(process));
        let name = match &sent.request {
            Request::Revoke(_) => "ApplyRevoke",
            _ => "Apply",
        };
        self.note(|| {
            let result = match &result {
                Ok(Answer::Txn { succeeded, .. }) => succeeded.to_string(),
                Ok(_) => "done".into(),
                Err(failure) => failure.message.clone(),
            };
            format!("etcd {name} {number} of p{process}: {result}")
        });
        if let (Request::Txn(txn), Ok(Answer::Txn { succeeded, .. })) = (&sent.request, &result)
            && *succeeded
        {
            let cluster = self.uid_of(process);
            self.checks.applied(txn, &sent, cluster, &self.etcd);
        }
        self.after_etcd();
        if sent.answer {
            let back = self.now + self.delay(20 * MILLISECOND);
            self.answered(back, &sent, result);
        }
    }

    fn uid_of(&self, process: usize) -> &'static str {
        let cluster = self.processes.get(process).map_or(0, |found| found.cluster);
        CLUSTER_UIDS.get(cluster).expect("a cluster")
    }

    /// What a process was told of Kubernetes so far.
    fn known(&self, process: usize) -> Known {
        let found = self.processes.get(process).expect("a process");
        let heard = |resource| found.watches.get(&resource).map_or(0, |watch| watch.heard);
        Known {
            pods: heard(Resource::Pods),
            registrations: heard(Resource::Registrations),
            policy: found.policy,
        }
    }

    // === what was read back ===

    /// Notes what an input tells a process of etcd and of Kubernetes.
    fn note_told(&mut self, process: usize, input: &Input) {
        use etcd_registrar::model::etcd::Event as Changed;
        let (now, etcd) = (self.now, self.etcd_number);
        let found = self.process(process);
        match input {
            Input::Kube(KubeInput::Broken { .. }) => {}
            Input::Kube(_) => found.answered = now,
            Input::Etcd(News::Snapshot {
                range,
                revision,
                records,
            }) => {
                for (key, told) in &mut found.told {
                    if range.contains(key) {
                        told.hear(etcd, *revision, None);
                    }
                }
                for kv in records {
                    found.hear(etcd, *revision, &kv.key, Some(kv));
                }
            }
            Input::Etcd(News::Events { events, .. }) => {
                for event in events {
                    match event {
                        Changed::Put(kv) => found.hear(etcd, kv.mod_revision, &kv.key, Some(kv)),
                        Changed::Delete(key, at) => found.hear(etcd, *at, key, None),
                    }
                }
            }
            _ => {}
        }
    }

    fn told_by_answer(&mut self, process: usize, txn: &Txn, answer: &Answer) {
        let Answer::Txn {
            succeeded,
            revision,
            reads,
        } = answer
        else {
            return;
        };
        let branch = if *succeeded {
            &txn.then
        } else {
            &txn.otherwise
        };
        let etcd = self.etcd_number;
        let found = self.process(process);
        if let (true, Some(nonce)) = (succeeded, election(txn)) {
            found.term = Some((nonce, *revision));
        }
        for (op, read) in branch.iter().zip(reads) {
            if let Op::Get(key) = op {
                found.hear(etcd, *revision, key, read.first());
            }
        }
    }

    /// S8: a status claims nothing that was not read back.
    fn check_status(&mut self, process: usize, effect: &Effect) {
        let Effect::PatchStatus {
            namespace,
            name,
            status,
            ready_only: false,
            ..
        } = effect
        else {
            return;
        };
        let full_name = format!("{namespace}/{name}");
        let known = self.known(process);
        let wanted = self.oracle.wanted(&self.kube, known);
        let found = self.processes.get(process).expect("a process");
        let read = |key: &str| found.told.get(key.as_bytes())?.kv.as_ref();
        for endpoint in &status.endpoints {
            let lease = read(&endpoint.key).map(|kv| format!("{:016x}", kv.lease));
            let lease = lease.map(|id| {
                if id == format!("{:016x}", 0) {
                    String::new()
                } else {
                    id
                }
            });
            assert_eq!(
                lease.as_ref(),
                Some(&endpoint.lease),
                "S8: p{process} claims {endpoint:?}, and did not read it so"
            );
        }
        let on_its_slots = found
            .told
            .values()
            .filter_map(|told| told.kv.as_ref())
            .filter(|kv| is_record(&kv.key) && self.checks.is_on_slot_of(kv.lease, &full_name))
            .map(|kv| nodes(&show(&kv.value)).map_or(1, |nodes| nodes.len()))
            .sum::<usize>();
        assert!(
            status.registered.unwrap_or(0) <= i64::try_from(on_its_slots).unwrap_or(i64::MAX),
            "S8: p{process} says that {full_name} has {:?} endpoints registered, and has read {on_its_slots}",
            status.registered
        );
        let ready = status
            .conditions
            .iter()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True");
        if !ready {
            return;
        }
        for (key, wanted) in wanted.iter().filter(|(_, w)| w.registration == full_name) {
            assert!(
                read(key).is_some_and(
                    |kv| without_zone(&show(&kv.value)) == without_zone(&wanted.value)
                ),
                "S8: p{process} says that {full_name} is ready, and has not read {key} as it is wanted"
            );
        }
    }

    /// A process ends because the name is another cluster's, and says whose.
    fn gives_up(&mut self, process: usize, message: &str) {
        let own = self.uid_of(process);
        let other = CLUSTER_UIDS
            .iter()
            .find(|uid| **uid != own && message.contains(**uid));
        assert!(
            self.knobs.intruders > 0 && other.is_some() && message.contains(CLUSTER),
            "p{process} gives up: {message}"
        );
        self.crash(process);
        // Kubernetes starts what ended with an error again, later each time: the name may be free then. Each start
        // keeps the lease of `owner` alive once more, so of two replicas one has to wait for longer than that lasts.
        let pause = if self.faults {
            self.rng.random_range(SECOND..10 * SECOND)
        } else {
            self.rng.random_range(130 * SECOND..150 * SECOND)
        };
        self.at(self.now + pause, Event::Start(process));
    }

    /// Pods whose records a request deletes, and of which the sender has heard that they left.
    fn known_to_have_left(&self, process: usize, request: &Request) -> Vec<String> {
        let Request::Txn(txn) = request else {
            return Vec::new();
        };
        let engine = self
            .processes
            .get(process)
            .and_then(|found| found.engine.as_ref());
        let Some(pods) = engine.map(|engine| engine.index().pods()) else {
            return Vec::new();
        };
        let deleted = txn.then.iter().filter_map(|op| match op {
            Op::Delete(key) if is_record(key) => uid(&self.etcd.get(key)?.value),
            _ => None,
        });
        deleted
            .filter(|uid| {
                let known = pods.find(pods.uid(uid)).and_then(|id| pods.get(id));
                known.is_none_or(|pod| pod.left)
            })
            .collect()
    }

    /// What must hold of every request.
    fn check_sent(&mut self, process: usize, request: &Request) {
        let Request::Txn(txn) = request else { return };
        let writes = |op: &Op| match op {
            Op::Put(key, ..) | Op::Delete(key) => is_record(key),
            Op::Get(_) | Op::GetRange(_) => false,
        };
        if !txn.then.iter().chain(&txn.otherwise).any(writes) {
            return;
        }
        let uid = self.uid_of(process);
        self.checks.fenced(txn, uid);
        self.fails_static(process, txn);
        let incomplete = self
            .process(process)
            .engine
            .as_ref()
            .and_then(Engine::incomplete);
        assert!(
            incomplete.is_none(),
            "p{process} writes records although {incomplete:?}"
        );
        if !self.caught_up(process) || self.knobs.hands > 0 {
            return;
        }
        let wanted = self.expected();
        for op in &txn.then {
            if let Op::Delete(key) = op
                && is_record(key)
            {
                self.checks.old_key_stays(&show(key), &wanted, &self.etcd);
            }
        }
    }

    /// Who has not heard of Kubernetes for long only puts back what stood.
    fn fails_static(&mut self, process: usize, txn: &Txn) {
        let answered = self.process(process).answered;
        if self.now.saturating_sub(answered) < LIVE_MICROS {
            return;
        }
        for op in &txn.then {
            match op {
                Op::Delete(key) if is_record(key) => panic!(
                    "lost: p{process} deletes {} without contact with Kubernetes",
                    show(key)
                ),
                Op::Put(key, ..) if is_record(key) => assert!(
                    self.stood.contains(key),
                    "p{process} puts {} without contact with Kubernetes, and it never stood",
                    show(key)
                ),
                _ => {}
            }
        }
    }

    /// etcd changed: checks, and watches.
    pub(crate) fn after_etcd(&mut self) {
        let revision = self.etcd.revision;
        if revision == self.checked {
            return;
        }
        let changes = self.etcd.changes(self.checked, revision).to_vec();
        self.checked = revision;
        for change in &changes {
            if self.trace.is_some() {
                let text = format!(
                    "etcd {}: {} {} -> {} ({:?}{})",
                    change.revision,
                    show(&change.key),
                    show_kv(change.before.as_ref()),
                    show_kv(change.after.as_ref()),
                    change.author,
                    if change.by_lease {
                        ", a lease ended"
                    } else {
                        ""
                    }
                );
                self.note(|| text);
            }
            self.checks
                .changed(change, &self.etcd, &self.kube, &mut self.oracle);
            if let (Author::Process(_), Some(kv)) = (change.author, &change.after)
                && is_record(&kv.key)
            {
                self.stood.insert(kv.key.clone());
            }
        }
        self.checks.one_owner(&self.etcd);
        let lag = if self.faults {
            self.knobs.etcd_lag
        } else {
            self.knobs.etcd_lag.min(50 * MILLISECOND)
        };
        for process in self.running().collect::<Vec<_>>() {
            let life = self.process(process).life;
            let mut woken = Vec::new();
            for (range, followed) in &mut self.process(process).follower.ranges {
                if followed.reached.is_some()
                    && !followed.due
                    && changes.iter().any(|change| range.contains(&change.key))
                {
                    followed.due = true;
                    woken.push((range.clone(), followed.token));
                }
            }
            for (range, token) in woken {
                self.later(lag, Event::Watch(process, life, range, token));
            }
        }
    }

    fn follow(&mut self, process: usize, life: u64, ranges: Vec<Range>) {
        let follower = &mut self.process(process).follower;
        follower.ranges.retain(|range, _| ranges.contains(range));
        let mut new = Vec::new();
        for range in ranges {
            if !follower.ranges.contains_key(&range) {
                follower.tokens += 1;
                let token = follower.tokens;
                let followed = Followed {
                    token,
                    reached: None,
                    due: false,
                };
                follower.ranges.insert(range.clone(), followed);
                new.push((range, token));
            }
        }
        let (connected, asked) = (follower.connected, follower.asked);
        if connected {
            for (range, token) in new {
                self.later(20 * MILLISECOND, Event::Read(process, life, range, token));
            }
        }
        if asked {
            self.later(20 * MILLISECOND, Event::Progress(process, life));
        }
    }

    fn read(&mut self, process: usize, life: u64, range: Range, token: u64) {
        if self.etcd_away_until > self.now {
            let back = self.etcd_away_until;
            self.at(back, Event::Read(process, life, range, token));
            return;
        }
        let revision = self.etcd.revision;
        let records = self.etcd.range(&range);
        self.later(
            20 * MILLISECOND,
            Event::Given {
                process,
                life,
                range,
                token,
                revision,
                records,
            },
        );
    }

    fn given(
        &mut self,
        process: usize,
        range: Range,
        token: u64,
        revision: Revision,
        records: Vec<KeyValue>,
    ) {
        let life = self.process(process).life;
        let more = !self
            .etcd
            .events(&range, revision, self.etcd.revision)
            .is_empty();
        let follower = &mut self.process(process).follower;
        let Some(followed) = follower
            .ranges
            .get_mut(&range)
            .filter(|followed| followed.token == token)
        else {
            return;
        };
        followed.reached = Some(revision);
        followed.due = more;
        let asked = follower.asked;
        if more {
            // Events that came meanwhile are handed on right after it, as the follower does.
            self.at(self.now, Event::Watch(process, life, range.clone(), token));
        }
        if asked {
            self.later(20 * MILLISECOND, Event::Progress(process, life));
        }
        self.feed(
            process,
            Input::Etcd(News::Snapshot {
                range,
                revision,
                records,
            }),
        );
    }

    fn watch_turn(&mut self, process: usize, range: &Range, token: u64) {
        let life = self.process(process).life;
        if self.etcd_away_until > self.now {
            let back = self.etcd_away_until;
            self.at(back, Event::Watch(process, life, range.clone(), token));
            return;
        }
        let newest = self.etcd.revision;
        let Some(reached) = self
            .process(process)
            .follower
            .ranges
            .get(range)
            .filter(|followed| followed.token == token)
            .and_then(|followed| followed.reached)
        else {
            return;
        };
        if self.etcd.is_gone(reached + 1) {
            // What it has not delivered may be gone: the watch is canceled, and the range read anew.
            self.reread(process, range);
            return;
        }
        let up_to = if newest > reached && self.rng.random_bool(0.3) {
            self.rng.random_range(reached + 1..=newest)
        } else {
            newest
        };
        let events = self.etcd.events(range, reached, up_to);
        let more = !self.etcd.events(range, up_to, newest).is_empty();
        if let Some(followed) = self.process(process).follower.ranges.get_mut(range) {
            followed.reached = Some(up_to);
            followed.due = more;
        }
        if more {
            let lag = self.knobs.etcd_lag;
            self.later(lag, Event::Watch(process, life, range.clone(), token));
        }
        self.give_events(process, range, events);
    }

    /// A range is read anew.
    fn reread(&mut self, process: usize, range: &Range) {
        let life = self.process(process).life;
        let follower = &mut self.process(process).follower;
        follower.tokens += 1;
        let token = follower.tokens;
        if let Some(followed) = follower.ranges.get_mut(range) {
            followed.token = token;
            followed.reached = None;
            followed.due = false;
            self.later(
                20 * MILLISECOND,
                Event::Read(process, life, range.clone(), token),
            );
        }
    }

    fn give_events(
        &mut self,
        process: usize,
        range: &Range,
        events: Vec<etcd_registrar::model::etcd::Event>,
    ) {
        use etcd_registrar::model::etcd::Event as Changed;
        let last = match events.last() {
            None => return,
            Some(Changed::Put(kv)) => kv.mod_revision,
            Some(Changed::Delete(_, revision)) => *revision,
        };
        self.feed(
            process,
            Input::Etcd(News::Events {
                range: range.clone(),
                revision: last,
                events,
            }),
        );
    }

    fn progress(&mut self, process: usize) {
        if self.etcd_away_until > self.now || self.process(process).deaf.1 > self.now {
            return;
        }
        let gone: Vec<Range> = self
            .processes
            .iter()
            .skip(process)
            .take(1)
            .flat_map(|found| &found.follower.ranges)
            .filter(|(_, followed)| {
                let from = followed.reached.map(|reached| reached + 1);
                followed.due && from.is_some_and(|from| self.etcd.is_gone(from))
            })
            .map(|(range, _)| range.clone())
            .collect();
        for range in gone {
            self.reread(process, &range);
        }
        let follower = &mut self.process(process).follower;
        let settled = follower.connected
            && follower
                .ranges
                .values()
                .all(|followed| followed.reached.is_some());
        if !settled || !std::mem::take(&mut follower.asked) {
            return;
        }
        let newest = self.etcd.revision;
        let mut open: Vec<(Range, Revision)> = Vec::new();
        for (range, followed) in &mut self.process(process).follower.ranges {
            open.push((range.clone(), followed.reached.unwrap_or(newest)));
            followed.reached = Some(newest);
        }
        open.shuffle(&mut self.rng);
        let one = open.first().map(|(range, _)| range.clone());
        for (range, reached) in open {
            let events = self.etcd.events(&range, reached, newest);
            self.give_events(process, &range, events);
        }
        self.feed(process, Input::Etcd(News::Progress(newest)));
        if let Some(range) = one.filter(|_| self.rng.random_bool(0.3)) {
            let keys = self
                .etcd
                .range(&range)
                .into_iter()
                .map(|kv| (kv.key, kv.mod_revision))
                .collect();
            let still = self.process(process).follower.ranges.contains_key(&range);
            if still && self.etcd.revision == newest {
                self.feed(
                    process,
                    Input::Etcd(News::KeysSeen {
                        range,
                        revision: newest,
                        keys,
                    }),
                );
            }
        }
    }

    fn break_watch(&mut self, process: usize) {
        let life = self.process(process).life;
        let follower = &mut self.process(process).follower;
        follower.connected = false;
        for followed in follower.ranges.values_mut() {
            follower.tokens += 1;
            followed.token = follower.tokens;
            followed.reached = None;
            followed.due = false;
        }
        self.later(500 * MILLISECOND, Event::Connected(process, life));
        self.at(self.now, Event::Broken(process, life));
    }

    fn connected(&mut self, process: usize) {
        let life = self.process(process).life;
        if self.etcd_away_until > self.now {
            let back = self.etcd_away_until;
            let tries = self.rng.random_range(0..500 * MILLISECOND);
            self.at(back + tries, Event::Connected(process, life));
            return;
        }
        let follower = &mut self.process(process).follower;
        // It broke twice in a row: each range is read once, as the follower does.
        if std::mem::replace(&mut follower.connected, true) {
            return;
        }
        let all: Vec<(Range, u64)> = follower
            .ranges
            .iter()
            .map(|(range, followed)| (range.clone(), followed.token))
            .collect();
        for (range, token) in all {
            self.later(20 * MILLISECOND, Event::Read(process, life, range, token));
        }
    }

    /// The keeper of a process, as `registry::keeper` is.
    fn keep(&mut self, process: usize) {
        if self.etcd_away_until > self.now {
            return;
        }
        let owner = self
            .etcd
            .get(format!("{REGISTRAR}owner").as_bytes())
            .cloned();
        let keeper = &mut self.process(process).keeper;
        if !keeper.keeping {
            return;
        }
        let uid = keeper.uid.clone().or_else(|| {
            let value = owner.as_ref().map(|kv| kv.value.to_vec())?;
            String::from_utf8(value).ok()
        });
        let mut found: BTreeMap<LeaseId, i64> = BTreeMap::new();
        if let Some(kv) = owner.filter(|kv| kv.lease != 0) {
            found.insert(kv.lease, 60);
        }
        if let Some(uid) = uid {
            for kv in self.etcd.below(&format!("{REGISTRAR}leases/{uid}/")) {
                let key = show(&kv.key);
                let id = key.rsplit('/').next().unwrap_or("");
                if let Ok(id) = i64::from_str_radix(id, 16) {
                    found.insert(id, slot(&kv.value).map_or(5, |slot| slot.ttl));
                }
            }
        }
        let now = self.now;
        let keeper = &mut self.process(process).keeper;
        let mut kept: BTreeMap<LeaseId, i64> = keeper.named.clone();
        kept.extend(found);
        keeper.due.retain(|id, _| kept.contains_key(id));
        let mut lost = Vec::new();
        let mut due_now = Vec::new();
        for (id, ttl) in kept {
            let due = keeper.due.entry(id).or_insert(now);
            if *due <= now {
                *due = now + third(ttl);
                due_now.push(id);
            }
        }
        for id in due_now {
            if !self.etcd.keep_alive(id, now) {
                lost.push(id);
            }
        }
        for id in lost {
            self.process(process).keeper.named.remove(&id);
            self.feed(process, Input::LeaseLost(id));
        }
    }

    // === faults ===

    /// One step of the schedule, with its own source of chance.
    fn step(&mut self, step: &Step) {
        let rng = std::mem::replace(&mut self.rng, StdRng::seed_from_u64(step.seed));
        self.fault(&step.what);
        self.rng = rng;
    }

    fn fault(&mut self, fault: &Fault) {
        if !matches!(fault, Fault::KubeStep(_)) {
            self.faults_played += 1;
        }
        self.note(|| format!("--- {fault:?}"));
        let up: Vec<usize> = self.running().collect();
        let any = (!up.is_empty()).then(|| {
            let at = self.rng.random_range(0..up.len());
            up.get(at).copied().unwrap_or(0)
        });
        match (fault, any) {
            (Fault::KubeStep(change), _) => {
                crate::scenario::change(self, *change);
                self.wake_all();
            }
            (Fault::Hand, _) => crate::scenario::hand(self),
            (Fault::NoSpace(full), _) => self.etcd.full = *full && self.faults,
            (Fault::LeaderExpires, _) => self.end_leader_lease(),
            (Fault::KubeAway, _) => {
                let pause = self.rng.random_range(0..60 * SECOND);
                for process in up {
                    self.cut_off(process, pause);
                }
            }
            (Fault::EtcdAway(frozen), _) => {
                self.etcd_frozen = *frozen;
                let most = if *frozen { 90 } else { 30 };
                let until = self.now + self.rng.random_range(0..most * SECOND);
                self.etcd_away_until = self.etcd_away_until.max(until).min(self.horizon);
                self.etcd_away = true;
                let back = self.etcd_away_until;
                self.at(back, Event::EtcdBack);
                for process in up {
                    self.break_watch(process);
                }
            }
            (Fault::Save, _) => self.save(),
            (Fault::Restore(goes_on), _) => self.restore(*goes_on),
            (Fault::Wipe, _) => {
                self.etcd.wipe();
                self.another_etcd();
            }
            (Fault::Compact, _) => self.etcd.compact(self.etcd.revision),
            (Fault::Policy(policy), _) => self.set_policy(*policy),
            (Fault::ClockJump, _) => {
                self.clock_off += if self.rng.random_bool(0.5) {
                    3_600
                } else {
                    -3_600
                };
            }
            (Fault::Relist, Some(process)) => {
                let at = self.rng.random_range(0..RESOURCES.len());
                let resource = RESOURCES.get(at).copied().unwrap_or(Resource::Pods);
                self.relist(process, resource);
            }
            (Fault::BreakWatch, Some(process)) => self.break_watch(process),
            (Fault::Crash, Some(process)) => {
                self.crash(process);
                let pause = self.rng.random_range(0..self.knobs.away);
                self.at(self.now + pause, Event::Start(process));
            }
            (Fault::HandOver, Some(process)) => {
                if !std::mem::replace(&mut self.process(process).leaving, true) {
                    self.feed(process, Input::Shutdown);
                }
            }
            (Fault::Freeze, Some(process)) => {
                let pause = self.rng.random_range(0..self.knobs.away);
                let (now, until) = (self.now, self.now + pause);
                let before = self.process(process).frozen_until;
                // One that stands still already does not go on earlier.
                if before < until {
                    self.process(process).frozen_until = until;
                    if before > now {
                        self.wait_otherwise(process, before, until);
                    }
                }
            }
            (Fault::CutOff, Some(process)) => {
                let pause = self.rng.random_range(0..40 * SECOND);
                self.cut_off(process, pause);
            }
            (_, None) => {}
        }
    }

    /// A process does not reach Kubernetes for so long.
    pub(crate) fn cut_off(&mut self, process: usize, pause: u64) {
        self.process(process).cut_until = self.now + pause;
        for resource in RESOURCES {
            self.wake_kube(process, resource, SECOND);
        }
    }

    /// etcd answers again; after a change of its leader, leases have all of their time.
    fn etcd_back(&mut self) {
        self.etcd_away = false;
        self.etcd_away_until = self.now;
        if !self.etcd_frozen {
            self.etcd.renew(self.now);
        }
    }

    /// etcd was restored or wiped: connections break, and nothing sent before is done.
    fn another_etcd(&mut self) {
        self.etcd_number += 1;
        self.checked = self.etcd.revision;
        self.checks.restored(&self.etcd);
        for process in self.running().collect::<Vec<_>>() {
            self.break_watch(process);
        }
    }

    fn set_policy(&mut self, policy: usize) {
        if std::mem::replace(&mut self.policy, policy) == policy {
            return;
        }
        self.checks.registration_changes(self.kube.version);
        for process in self.running().collect::<Vec<_>>() {
            let life = self.process(process).life;
            self.later(2 * SECOND, Event::Policy(process, life));
        }
    }

    /// A watch lists anew.
    pub(crate) fn relist(&mut self, process: usize, resource: Resource) {
        if let Some(watch) = self.process(process).watches.get_mut(&resource) {
            watch.phase = Phase::Away;
        }
        self.wake_kube(process, resource, 20 * MILLISECOND);
    }

    /// A watch of a process lists anew, and an old cache answers with what stood at a resource version.
    pub(crate) fn relist_at(&mut self, process: usize, resource: Resource, version: u64) {
        let rest = self.kube.list_at(resource, version);
        let mut relist = 0;
        if let Some(watch) = self.process(process).watches.get_mut(&resource) {
            watch.phase = Phase::Listing { version, rest };
            // The one that the engine asks for then is consistent.
            watch.was_stale = true;
            relist = watch.taken;
        }
        let started = KubeInput::ListStarted { resource, relist };
        self.feed(process, Input::Kube(started));
        self.wake_kube(process, resource, 20 * MILLISECOND);
    }

    /// Whether a list of pods that is not complete has named a pod already.
    pub(crate) fn heard_in_list(&self, process: usize, uid: &str) -> bool {
        let watch = self
            .processes
            .get(process)
            .and_then(|found| found.watches.get(&Resource::Pods));
        matches!(watch.map(|watch| &watch.phase), Some(Phase::Listing { rest, .. })
            if !rest.iter().any(|object| matches!(object, Object::Pod(pod) if *pod.uid == *uid)))
    }

    /// The watches of a process deliver nothing of these until then.
    pub(crate) fn stall(&mut self, process: usize, resources: &[Resource], until: u64) {
        for resource in resources {
            self.process(process).stalled.insert(*resource, until);
            // A turn may be due much later.
            if let Some(watch) = self.process(process).watches.get_mut(resource) {
                watch.due = false;
            }
            self.wake_kube(process, *resource, MILLISECOND);
        }
    }

    /// A process hears nothing of what stands below a prefix in etcd until then.
    pub(crate) fn deafen(&mut self, process: usize, prefix: &str, until: u64) {
        self.process(process).deaf = (prefix.to_owned(), until);
    }

    /// Such requests of a process are given up from now on, and reach etcd with [`World::let_go`].
    pub(crate) fn hold_back(&mut self, process: usize, kind: Kind) {
        self.process(process).held_back = Some((kind, false));
    }

    /// Such requests of a process reach etcd twice from now on: in time, and with [`World::let_go`].
    pub(crate) fn repeat(&mut self, process: usize, kind: Kind) {
        self.process(process).held_back = Some((kind, true));
    }

    /// Requests go their way again.
    pub(crate) fn hold_back_no_more(&mut self, process: usize) {
        self.process(process).held_back = None;
    }

    /// How many such requests of a process are held back.
    pub(crate) fn held(&self, process: usize, kind: Kind) -> usize {
        let held = self.held_back.iter();
        held.filter(|sent| sent.process == process && kind(&sent.request))
            .count()
    }

    /// The oldest such request of a process that was held back reaches etcd.
    pub(crate) fn let_go(&mut self, process: usize, kind: Kind) {
        let which = |sent: &Sent| sent.process == process && kind(&sent.request);
        let at = self
            .held_back
            .iter()
            .position(which)
            .expect("one is held back");
        let sent = self.held_back.remove(at);
        self.under_way += 1;
        self.apply(sent);
    }

    /// Somebody saves etcd.
    pub(crate) fn save(&mut self) {
        self.etcd.save();
        self.checks.saved();
    }

    /// Somebody restores etcd.
    pub(crate) fn restore(&mut self, goes_on: GoesOn) {
        if self.etcd.restore(goes_on, self.now) {
            self.another_etcd();
        }
    }

    /// The numbers of a process that runs.
    pub(crate) fn numbers(&mut self, process: usize) -> Numbers {
        let engine = self.process(process).engine.as_mut();
        engine.expect("it runs").numbers().clone()
    }

    /// The leader key.
    pub(crate) fn leader_key(&self) -> Option<&KeyValue> {
        self.etcd.get(format!("{REGISTRAR}leader").as_bytes())
    }

    pub(crate) fn end_leader_lease(&mut self) {
        if let Some(lease) = self.leader_key().map(|kv| kv.lease) {
            self.etcd.end(lease);
        }
    }

    // === what is compared ===

    pub(crate) fn policy(&self, which: usize) -> &Policy {
        self.oracle.policy(which)
    }

    /// What is wanted now, zones included.
    pub(crate) fn expected(&self) -> Records {
        expected(
            &self.kube,
            &self.kube.pods.values().collect::<Vec<_>>(),
            &self.kube.registrations.values().collect::<Vec<_>>(),
            self.policy(self.policy),
            &self.oracle.settings,
        )
    }

    /// Registrations that are not served and may keep what nobody wants, or a policy that some process may
    /// not have read.
    fn is_odd(&self) -> bool {
        self.processes
            .iter()
            .any(|found| found.engine.is_some() && found.policy != self.policy)
            || self.kube.registrations.values().any(|found| {
                let accepted = accepted(found, self.policy(self.policy), &self.oracle.settings);
                accepted.is_none_or(|accepted| accepted.suspend)
            })
    }

    /// Whether etcd holds exactly what is wanted, on the right leases; else what is wrong.
    pub(crate) fn differences(&mut self) -> Vec<String> {
        if self.is_odd() {
            return vec!["what is wanted is not all of what may stand".into()];
        }
        let state = (self.kube.version, self.etcd_number, self.etcd.revision);
        if self.compared.0 != state {
            self.compared = (state, self.differences_now());
        }
        self.compared.1.clone()
    }

    /// The same, where what may be held is as right as what is wanted.
    pub(crate) fn differences_but_held(&mut self) -> Vec<String> {
        let mut wrong = self.differences();
        if self.knobs.holds && !wrong.is_empty() {
            let held = self.may_be_held();
            let all = wrong.len();
            wrong.retain(|text| {
                !held
                    .iter()
                    .any(|key| text.starts_with(&format!("{key} stands (")))
            });
            self.held += all - wrong.len();
        }
        wrong
    }

    /// The records that nobody wants of pods that are there, with their addresses, and only not ready. An address that
    /// another pod has now is nothing to hold.
    fn may_be_held(&self) -> Vec<String> {
        let wanted = self.expected();
        let last = |key: &str| key.rsplit('/').next().unwrap_or("").to_owned();
        let protocol = |value: &str| {
            let value = serde_json::from_str::<serde_json::Value>(value).ok()?;
            Some(value.get("protocol")?.as_str()?.to_owned())
        };
        // Not every format tells the protocol.
        let owners: BTreeMap<(String, String), &str> = wanted
            .iter()
            .filter_map(|(key, wanted)| {
                Some(((last(key), protocol(&wanted.value)?), wanted.uid.as_str()))
            })
            .collect();
        let is_its = |pod: &Pod, address: &str| {
            let ips = pod.ips.iter().chain(&pod.host_ips);
            let mut starts = ips.map(|ip| match ip {
                IpAddr::V4(ip) => format!("{ip}:"),
                IpAddr::V6(ip) => format!("[{ip}]:"),
            });
            starts.any(|start| address.starts_with(&start))
        };
        let records = self.etcd.all().filter(|kv| is_record(&kv.key));
        let held = records.filter(|kv| {
            let address = last(&show(&kv.key));
            let named = uid(&kv.value);
            let owner = protocol(&show(&kv.value))
                .and_then(|protocol| owners.get(&(address.clone(), protocol)));
            self.kube.pods.values().any(|pod| {
                owner.is_none_or(|owner| **owner == *pod.uid)
                    && named.as_ref().is_none_or(|uid| **uid == *pod.uid)
                    && !(pod.ready || pod.deleting || pod.finished)
                    && is_its(pod, &address)
            })
        });
        held.map(|kv| show(&kv.key)).collect()
    }

    /// The same, without a memory.
    pub(crate) fn differences_now(&self) -> Vec<String> {
        let wanted = self.expected();
        let mut wrong = Vec::new();
        let mut standing = BTreeSet::new();
        for kv in self.etcd.all().filter(|kv| is_record(&kv.key)) {
            let key = show(&kv.key);
            let value = show(&kv.value);
            standing.insert(key.clone());
            let Some(wanted) = wanted.get(&key) else {
                wrong.push(format!("{key} stands ({value}) and is not wanted"));
                continue;
            };
            let same = if wanted.any_zone {
                without_zone(&value) == without_zone(&wanted.value)
            } else {
                value == wanted.value
            };
            if !same {
                wrong.push(format!("{key} is {value} and should be {}", wanted.value));
            }
            let name = lease_key(kv.lease, &self.etcd);
            let is = name.and_then(|kv| slot(&kv.value));
            let right = is.as_ref().is_some_and(|is| {
                (&is.registration, &is.scope, is.ttl)
                    == (&wanted.registration, &wanted.scope, wanted.ttl)
            });
            if !right {
                wrong.push(format!(
                    "{key} is on a lease for {is:?}, not for {wanted:?}"
                ));
            }
            if name.is_some_and(|name| name.lease != kv.lease) {
                wrong.push(format!("the key of lease {:016x} is on another", kv.lease));
            }
            if !self.etcd.lives(kv.lease) {
                wrong.push(format!("{key} is on a lease that is gone"));
            }
        }
        for (key, wanted) in wanted {
            if !standing.contains(&key) {
                wrong.push(format!("{key} is missing ({})", wanted.value));
            }
        }
        wrong
    }

    /// Leases that nothing stands on and that are not the operator's own, and keys of processes that
    /// are gone.
    pub(crate) fn leaks(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let own = [format!("{REGISTRAR}owner"), format!("{REGISTRAR}leader")];
        for lease in self.etcd.leases() {
            let keys: Vec<String> = self
                .etcd
                .keys_of(lease)
                .iter()
                .map(|key| show(key))
                .collect();
            let used = keys.iter().any(|key| {
                is_record(key.as_bytes())
                    || own.contains(key)
                    || key.starts_with(&format!("{REGISTRAR}waiting/"))
                    // Put back after a hand had taken it: younger than the term, so it is left to the next.
                    // So is one that a restore brought back.
                    || self.knobs.hands + self.knobs.restores > 0 && key.starts_with(&format!("{REGISTRAR}leases/"))
            });
            if !used {
                wrong.push(format!("lease {lease:016x} with nothing but {keys:?}"));
            }
        }
        let waiting = self.etcd.below(&format!("{REGISTRAR}waiting/")).len();
        // The leader's own may stand there still: its put was late.
        if waiting > self.knobs.replicas {
            wrong.push(format!("{waiting} keys below waiting/"));
        }
        wrong
    }

    /// A leader that has not heard of Kubernetes for 20 s gives way, where another replica has it.
    fn gives_way(&mut self) {
        const GIVES_WAY: u64 = 20 * SECOND;
        let knobs = &self.knobs;
        let only_cut = knobs.cuts > 0 && knobs.crashes + knobs.handovers + knobs.freezes == 0;
        if !only_cut || knobs.unknown > 0.0 || self.now < GIVES_WAY + 5 * SECOND {
            return;
        }
        let now = self.now;
        let Some(leader) = self.leader() else { return };
        let silent = |found: &Process| now - found.answered >= GIVES_WAY;
        let whole = |found: &Process| found.cut_until + GIVES_WAY < now;
        assert!(
            !(self.processes.get(leader).is_some_and(silent) && self.processes.iter().any(whole)),
            "p{leader} leads without Kubernetes, and another replica has it"
        );
    }

    /// Nothing is under way: what stands is what no process has a reason to touch.
    pub(crate) fn settle(&mut self) {
        self.gives_way();
        let at_rest = self.under_way == 0
            && self
                .leader()
                .is_some_and(|leader| self.caught_up(leader) && self.rests(leader))
            && self.differences().is_empty();
        if at_rest {
            self.checks.settle(&self.etcd);
        }
    }

    /// Whether a process has nothing queued and nothing in flight.
    pub(crate) fn rests(&mut self, process: usize) -> bool {
        self.process(process).engine.as_mut().is_some_and(|engine| {
            let numbers = engine.numbers();
            numbers.queued == 0 && numbers.lanes_busy == 0
        })
    }

    /// One line for each process.
    pub(crate) fn summary(&mut self) -> String {
        let mut lines = Vec::new();
        for process in 0..self.processes.len() {
            let text = match &mut self.process(process).engine {
                None => "down".to_owned(),
                Some(engine) => format!("{:?}", engine.numbers()),
            };
            let caught_up = self.caught_up(process);
            lines.push(format!("p{process} (caught up: {caught_up}): {text}"));
        }
        lines.join("\n")
    }
}

fn first_policy(knobs: &Knobs) -> usize {
    if knobs.holds { HOLDING } else { 0 }
}

/// Whether a key is not one of the operator's own.
pub(crate) fn is_record(key: &[u8]) -> bool {
    !key.starts_with(b"/registrar/")
}

/// What the value of a key below `leases/` says.
pub(crate) fn slot(value: &[u8]) -> Option<Slot> {
    let value: serde_json::Value = serde_json::from_slice(value).ok()?;
    let text = |name: &str| Some(value.get(name)?.as_str()?.to_owned());
    Some(Slot {
        registration: text("registration")?,
        scope: text("scope")?,
        ttl: value.get("ttl")?.as_i64()?,
        format: text("format")?,
    })
}

/// The pod that a record of the format Json names.
pub(crate) fn uid(value: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(value).ok()?;
    Some(value.get("uid")?.as_str()?.to_owned())
}

/// What the one who asked hears of a request that it gave up.
const GIVEN_UP: &str = "no answer within the deadline";

fn unknown(message: &str) -> Failure {
    Failure {
        kind: FailureKind::Unknown,
        message: message.to_owned(),
    }
}

fn third(ttl: i64) -> u64 {
    u64::try_from(ttl).unwrap_or(0) * SECOND / 3
}

fn show_kv(kv: Option<&KeyValue>) -> String {
    kv.map_or("nothing".into(), |kv| {
        format!(
            "[{} on {:016x}, created {}, changed {}]",
            show(&kv.value),
            kv.lease,
            kv.create_revision,
            kv.mod_revision
        )
    })
}

fn show_range(range: &Range) -> String {
    show(&range.start)
}

fn show_input(input: &Input) -> String {
    use etcd_registrar::model::etcd::Event as Changed;
    match input {
        Input::Etcd(News::Events {
            range,
            revision,
            events,
        }) => {
            let events: Vec<String> = events
                .iter()
                .map(|event| match event {
                    Changed::Put(kv) => format!("put {}@{}", show(&kv.key), kv.mod_revision),
                    Changed::Delete(key, at) => format!("delete {}@{at}", show(key)),
                })
                .collect();
            let range = show_range(range);
            format!("Watch {range} up to {revision}: {}", events.join(", "))
        }
        Input::Etcd(News::Snapshot {
            range,
            revision,
            records,
        }) => {
            let keys: Vec<String> = records
                .iter()
                .map(|kv| format!("{}@{}", show(&kv.key), kv.mod_revision))
                .collect();
            let range = show_range(range);
            format!("Watch {range}, snapshot at {revision}: {}", keys.join(", "))
        }
        Input::Etcd(News::KeysSeen { range, .. }) => format!("keys seen of {}", show_range(range)),
        Input::Answer(number, Ok(Answer::Txn { succeeded, .. })) => {
            format!("answer {number}: {succeeded}")
        }
        Input::Kube(input @ (KubeInput::ListStarted { .. } | KubeInput::ListDone { .. })) => {
            format!("List {input:?}")
        }
        Input::Kube(input) => format!("KubeWatch {input:?}"),
        other => format!("{other:?}"),
    }
}

/// The nonce with which a transaction stands for election, if it does.
pub(crate) fn election(txn: &Txn) -> Option<String> {
    let leader = format!("{REGISTRAR}leader");
    txn.then.iter().find_map(|op| match op {
        Op::Put(key, nonce, _) if show(key) == leader => Some(show(nonce)),
        _ => None,
    })
}

/// The action of the model that a transaction is.
fn action(txn: &Txn) -> &'static str {
    let any = |what: &dyn Fn(&Op) -> bool| txn.then.iter().any(what);
    let seen = format!("{REGISTRAR}seen/");
    if election(txn).is_some() {
        "Elect"
    } else if any(&|op| matches!(op, Op::Delete(key) if show(key).starts_with(&seen))) {
        "Remove"
    } else if any(&|op| matches!(op, Op::Put(key, ..) if show(key).starts_with(&seen))) {
        if txn.then.len() == 1 {
            "Barrier"
        } else {
            "Write"
        }
    } else if txn.then.iter().all(|op| matches!(op, Op::Get(_))) {
        "Read"
    } else {
        "ask"
    }
}

fn show_effect(effect: &Effect) -> String {
    let op = |op: &Op| match op {
        Op::Put(key, value, lease) => format!("put {}={} on {lease:016x}", show(key), show(value)),
        Op::Delete(key) => format!("delete {}", show(key)),
        Op::Get(key) => format!("get {}", show(key)),
        Op::GetRange(range) => format!("get range {}", show_range(range)),
    };
    match effect {
        Effect::Ask(number, Request::Txn(txn)) => {
            let then: Vec<String> = txn.then.iter().map(op).collect();
            format!("{} {number}: {}", action(txn), then.join("; "))
        }
        Effect::Ask(number, Request::Grant(lease, ttl)) => {
            format!("Grant {number}: lease {lease:016x} for {ttl} s")
        }
        Effect::Ask(number, Request::Revoke(lease)) => {
            format!("Revoke {number}: lease {lease:016x}")
        }
        Effect::Ask(number, Request::LeaseKeys(lease)) => {
            format!("ask {number}: the keys of lease {lease:016x}")
        }
        Effect::Follow(ranges) => {
            let ranges: Vec<String> = ranges.iter().map(show_range).collect();
            format!("follow {}", ranges.join(", "))
        }
        Effect::PatchStatus { name, status, .. } => {
            format!("status of {name}: registered {:?}", status.registered)
        }
        other => format!("{other:?}"),
    }
}

/// Keys are shared.
pub(crate) fn key(text: &str) -> etcd_registrar::model::etcd::Key {
    Arc::from(text.as_bytes())
}
