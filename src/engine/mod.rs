//! The engine: a function of (state, input, now) to effects.
//!
//! Takes what the tasks around it were told ([`io::Input`]), gives what they are to do
//! ([`io::Effect`]). It owns the index, the mirror and all that is remembered between two inputs; no
//! other task holds state that matters. Must never do IO, read a clock or wait.
//!
//! The parts: `leadership` (whose the name is, who leads), `writer` (lanes, slots, leases), `keys_in_need`
//! (what each key needs, and when it is looked at again), `guard` (what is held of it), `report` (status
//! and events).

mod guard;
pub mod io;
pub mod keys;
pub mod kube_view;
mod lane;
mod leadership;
mod need;
mod pace;
mod report;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use smallvec::SmallVec;

use crate::accept::AcceptSettings;
use crate::accept::policy::Policy;
use crate::format::has_dotted_scope;
use crate::index::pods::Uid;
use crate::index::registrations::RegistrationId;
use crate::index::{Index, Touched};
use crate::mirror::leases::SlotName;
use crate::mirror::{Changed, Mirror};
use crate::model::endpoint::Socket;
use crate::model::etcd::{
    Answer, Failure, FailureKind, Key, LeaseId, News, Range, Request, Revision,
};
use crate::model::maps::{HashMap, HashSet};
use crate::model::pod::{Node, Pod};
use crate::plan::ranges::ranges;
use crate::plan::slots::Slots;

use guard::Guard;
use io::{Effect, Input, KubeInput, Now, Object, Registration, Resource};
use keys::OwnKeys;
use kube_view::{KubeView, ListEnd};
use lane::{Change, Flying, LANES, Lane};
use leadership::{Role, Session};
use need::{Confirmed, Held, Turns};
use pace::Pace;
use report::Report;

/// What the engine is told once.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The cluster's name.
    pub cluster_name: String,
    /// Where the operator's own keys stand; ends with a slash.
    pub registrar_prefix: String,
    /// The TTL of the leader key, in seconds.
    pub election_ttl: i64,
    /// After how long without Kubernetes leases are left to expire, in microseconds; 0: never.
    pub max_staleness: u64,
    /// The namespaces that are watched; empty: all. Where there are some, Nodes are not watched.
    pub namespaces: BTreeSet<String>,
    /// Where nonces and lease ids come from: from the operating system, or of a simulation.
    pub seed: u64,
}

/// Numbers that a person would like to see; the metrics show them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Whether this replica leads and writes.
    pub leads: bool,
    /// Whether it is live.
    pub live: bool,
    /// Microseconds since Kubernetes answered.
    pub kubernetes_silence: u64,
    /// Microseconds since etcd answered.
    pub etcd_silence: u64,
    /// Registrations.
    pub registrations: usize,
    /// Pods in the index.
    pub pods: usize,
    /// Keys that are wanted.
    pub wanted: usize,
    /// Keys that were read back as wanted.
    pub registered: usize,
    /// Keys in the mirror.
    pub mirrored: usize,
    /// Leases of this cluster.
    pub leases: usize,
    /// Keys that wait in the lanes.
    pub queued: usize,
    /// Lanes with a transaction under way.
    pub lanes_busy: usize,
    /// Transactions that were done.
    pub transactions_done: u64,
    /// Transactions of which a comparison failed.
    pub transactions_compared: u64,
    /// Transactions that were refused.
    pub transactions_refused: u64,
    /// Transactions for which there was no space.
    pub transactions_no_space: u64,
    /// Transactions of unknown outcome.
    pub transactions_unknown: u64,
    /// Records put.
    pub puts: u64,
    /// Records deleted.
    pub removals: u64,
    /// Leases granted.
    pub grants: u64,
    /// Leases revoked.
    pub revokes: u64,
    /// Records that wait because their namespace has put too many of late.
    pub slowed_down: usize,
    /// Pods that a limit of the policy leaves out, once for each registration.
    pub over_limit: usize,
    /// Records that are held although their pods went.
    pub held: usize,
    /// Times that too much of a registration went at once.
    pub mass_removals: u64,
    /// etcd has no space.
    pub no_space: bool,
}

/// What a request was for.
#[derive(Debug)]
enum Ask {
    Lane(usize),
    Grant(LeaseId),
    GrantSession(LeaseId),
    GrantOwner(LeaseId),
    ClaimOwner,
    PutOwnerBack,
    Elect(String),
    /// A key of this process: put on a lease, or deleted.
    Wait(Key, Option<LeaseId>),
    Resign,
    Conflict(Key, LeaseId),
    LeaseKeys(LeaseId),
    CheckLease(LeaseId),
    /// The key of a lease that is gone, put without that lease by someone, is deleted.
    Orphan,
    Revoke(LeaseId),
}

/// How far the life of the process has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Running,
    /// Handing over since then.
    Leaving(u64),
    Over,
}

/// The engine.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    rng: StdRng,
    now: Now,
    index: Index,
    mirror: Mirror,
    kube: KubeView,
    /// Objects that a new list named and that were not known, or not so, and all of its nodes: they count once it is
    /// complete.
    listed_pods: Vec<Pod>,
    listed_registrations: Vec<Registration>,
    listed_nodes: Vec<Node>,
    uid: Option<String>,
    keys: OwnKeys,
    session: Session,
    role: Role,
    life: Life,
    lanes: [Lane; LANES],
    /// What was under way, or of unknown outcome, when the last term ended: only this process knows for which pod.
    left: Vec<Change>,
    slots: Slots,
    asks: HashMap<u64, Ask>,
    next_ask: u64,
    /// Keys that are in flight or of unknown outcome; and those of puts by the address that they stand for.
    flying: HashMap<Key, Flying>,
    flying_sockets: HashMap<Socket, SmallVec<[Key; 1]>>,
    /// Keys to be looked at again at a time.
    timers: BTreeMap<u64, Vec<Key>>,
    confirmed: HashMap<Key, Confirmed>,
    held: HashMap<Key, Held>,
    turns: HashMap<Uid, Turns>,
    pace: Pace,
    guard: Guard,
    checked: HashMap<Key, Revision>,
    /// When a change of Kubernetes came in that has not shown in the mirror, and whether it removes.
    pending: HashMap<Key, (u64, bool)>,
    reports: HashMap<RegistrationId, Report>,
    due_reports: BTreeSet<(u64, RegistrationId)>,
    /// The generation and standing that each registration was judged by last.
    judged: HashMap<RegistrationId, (i64, bool)>,
    /// Registrations whose first endpoints were announced.
    announced: HashSet<RegistrationId>,
    by_scope: HashMap<Box<str>, Vec<RegistrationId>>,
    problems: HashMap<Key, Vec<(RegistrationId, report::Problem)>>,
    range_problems: HashMap<Range, Failure>,
    followed: Vec<Range>,
    scopes_dirty: bool,
    control_dirty: bool,
    empty_since: HashMap<LeaseId, u64>,
    /// Leases to be asked for again, and when: it is not known whether they were granted.
    grant_again: Vec<(u64, LeaseId)>,
    revoking: HashSet<LeaseId>,
    next_sweep: u64,
    etcd_heard: Option<u64>,
    etcd_problem: Option<String>,
    last_live: u64,
    started: Option<u64>,
    keeping: bool,
    no_space: bool,
    /// When the mirror showed a leader last, and whether that is long ago.
    leader_seen: Option<u64>,
    leaderless: bool,
    numbers: Numbers,
    effects: Vec<Effect>,
}

impl Engine {
    /// An engine that knows nothing yet.
    #[must_use]
    pub fn new(settings: Settings, policy: Policy) -> Self {
        let accept = AcceptSettings {
            cluster_name: settings.cluster_name.clone(),
            registrar_prefix: settings.registrar_prefix.clone(),
        };
        let keys = OwnKeys::new(&settings.registrar_prefix, &settings.cluster_name);
        let mut kube = KubeView::default();
        // A Role can't grant Nodes: what is not watched has nothing to deliver first.
        kube.nodes.complete = !settings.namespaces.is_empty();
        let mut rng = StdRng::seed_from_u64(settings.seed);
        let session = Session::new(format!("{:016x}", rng.random::<u64>()));
        Self {
            // Until the UID is known nothing below `leases/` is taken for ours.
            mirror: Mirror::new(format!("{}?/", keys.all_leases)),
            index: Index::new(accept, policy).of_namespaces(&settings.namespaces),
            rng,
            session,
            keys,
            settings,
            now: Now::default(),
            kube,
            listed_pods: Vec::new(),
            listed_registrations: Vec::new(),
            listed_nodes: Vec::new(),
            uid: None,
            role: Role::Standby,
            life: Life::Running,
            lanes: Default::default(),
            left: Vec::new(),
            slots: Slots::default(),
            asks: HashMap::default(),
            next_ask: 1,
            flying: HashMap::default(),
            flying_sockets: HashMap::default(),
            timers: BTreeMap::new(),
            confirmed: HashMap::default(),
            held: HashMap::default(),
            turns: HashMap::default(),
            pace: Pace::default(),
            guard: Guard::default(),
            checked: HashMap::default(),
            pending: HashMap::default(),
            reports: HashMap::default(),
            due_reports: BTreeSet::new(),
            judged: HashMap::default(),
            announced: HashSet::default(),
            by_scope: HashMap::default(),
            problems: HashMap::default(),
            range_problems: HashMap::default(),
            followed: Vec::new(),
            scopes_dirty: false,
            control_dirty: true,
            empty_since: HashMap::default(),
            grant_again: Vec::new(),
            revoking: HashSet::default(),
            next_sweep: 0,
            etcd_heard: None,
            etcd_problem: None,
            last_live: 0,
            started: None,
            keeping: true,
            no_space: false,
            leader_seen: None,
            leaderless: false,
            numbers: Numbers::default(),
            effects: Vec::new(),
        }
    }

    /// Takes one input and says what is to be done.
    pub fn step(&mut self, input: Input, now: Now) -> Vec<Effect> {
        self.now = now;
        if self.started.is_none() {
            self.started = Some(now.monotonic);
            self.last_live = now.monotonic;
        }
        if self.life == Life::Over {
            return Vec::new();
        }
        match input {
            Input::Kube(input) => self.kube_input(input),
            Input::Policy(policy) => {
                let mut touched = Touched::default();
                self.index.set_policy(*policy, &mut touched);
                self.index_changed(touched);
                self.look_at_kept();
                self.look_at_held();
            }
            Input::Answer(number, answer) => self.answered(number, answer),
            Input::Etcd(News::Snapshot {
                range,
                revision,
                records,
            }) => {
                self.heard_etcd();
                self.range_problems.remove(&range);
                let mut changed = Vec::new();
                self.mirror
                    .snapshot(&range, revision, records, &mut changed);
                self.mirror_changed(changed);
                self.control_dirty = true;
                self.look_at_range(&range);
            }
            Input::Etcd(News::Events {
                range,
                revision,
                events,
            }) => {
                self.heard_etcd();
                let mut changed = Vec::new();
                self.mirror.events(&range, revision, events, &mut changed);
                self.mirror_changed(changed);
            }
            Input::Etcd(News::KeysSeen {
                range,
                revision,
                keys,
            }) => self.compare_keys(&range, revision, &keys),
            Input::Etcd(News::Progress(revision)) => {
                self.heard_etcd();
                self.mirror.progress(revision);
            }
            Input::Etcd(News::Refused(range, failure)) => {
                if range.contains(&self.keys.leader) {
                    // No condition tells of it: without these keys nobody leads.
                    self.log(tracing::Level::ERROR, self.own_keys_refused(&failure));
                }
                self.range_problems.insert(range, failure);
                self.all_reports_due();
            }
            Input::Etcd(News::Broken(why)) => {
                self.watch_broken();
                self.etcd_problem = Some(why);
            }
            Input::LeaseLost(lease) => self.lease_lost(lease),
            Input::Shutdown => self.leave(),
            Input::Tick => self.tick(),
        }
        self.advance();
        std::mem::take(&mut self.effects)
    }

    /// Numbers that a person would like to see.
    pub fn numbers(&mut self) -> &Numbers {
        let now = self.now.monotonic;
        self.numbers.leads = self.leads();
        self.numbers.live = self.kube.live(now);
        let since = |at: Option<u64>, started: Option<u64>| {
            now.saturating_sub(at.or(started).unwrap_or(now))
        };
        self.numbers.kubernetes_silence = since(self.kube.heard, self.started);
        self.numbers.etcd_silence = since(self.etcd_heard, self.started);
        self.numbers.registrations = self.index.registrations().count();
        self.numbers.pods = self.index.pods().len();
        self.numbers.wanted = self.index.wanted_count();
        self.numbers.registered = self
            .reports
            .values()
            .map(|report| report.registered as usize)
            .sum();
        self.numbers.mirrored = self.mirror.len();
        self.numbers.leases = self
            .mirror
            .leases()
            .iter()
            .filter(|(_, lease)| lease.key_stands)
            .count();
        self.numbers.queued = self.lanes.iter().map(Lane::len).sum();
        self.numbers.lanes_busy = self.lanes.iter().filter(|lane| lane.is_busy()).count();
        self.numbers.slowed_down = self.pace.all_waiting();
        self.numbers.over_limit = self
            .index
            .registrations()
            .map(|(_, stored)| (stored.beyond_own_limit + stored.beyond_namespace_limit) as usize)
            .sum();
        self.numbers.held = self.guard.len();
        self.numbers.no_space = self.no_space;
        &self.numbers
    }

    /// Whether every watch of Kubernetes has delivered a complete list; if not, which has not and why.
    #[must_use]
    pub fn incomplete(&self) -> Option<String> {
        self.kube
            .all()
            .iter()
            .find(|(_, watch)| !watch.complete)
            .map(|(resource, watch)| match &watch.broken {
                Some((.., message)) => format!("{resource:?}: {message}"),
                None => format!("{resource:?}: the first list is under way"),
            })
    }

    /// Why the operator's own keys can't be read, where etcd refuses that.
    #[must_use]
    pub fn shut_out(&self) -> Option<String> {
        self.range_problems
            .iter()
            .find(|(range, _)| range.contains(&self.keys.leader))
            .map(|(_, failure)| self.own_keys_refused(failure))
    }

    fn own_keys_refused(&self, failure: &Failure) -> String {
        format!(
            "etcd does not let the operator read its own keys below {}: {}. Grant its user a role with readwrite on that prefix; nothing is registered before that",
            self.keys.prefix, failure.message
        )
    }

    /// The index, for tests that compare it with what stands in etcd.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    // === Kubernetes ===

    fn kube_input(&mut self, input: KubeInput) {
        let now = self.now.monotonic;
        match input {
            KubeInput::ClusterUid(uid) => {
                self.kube.heard = Some(now);
                self.learn_uid(uid);
            }
            KubeInput::Answered => self.kube.heard = Some(now),
            KubeInput::ListStarted { resource, relist } => {
                self.kube.heard = Some(now);
                self.index.begin_list();
                let epoch = self.index.epoch();
                self.kube.of(resource).begin_list(epoch, relist);
                self.forget_listed(resource);
            }
            KubeInput::Applied(object) => {
                self.kube.heard = Some(now);
                self.applied(object);
            }
            KubeInput::Deleted(object) => {
                self.kube.heard = Some(now);
                self.deleted(object);
            }
            KubeInput::ListDone {
                resource,
                resource_version,
            } => {
                self.kube.heard = Some(now);
                self.list_done(resource, resource_version);
            }
            KubeInput::Bookmark {
                resource,
                resource_version,
            } => {
                self.kube.heard = Some(now);
                self.kube.of(resource).bookmark(resource_version);
            }
            KubeInput::Broken {
                resource,
                problem,
                message,
            } => {
                let watch = self.kube.of(resource);
                watch.break_off();
                let since = watch.broken.as_ref().map_or(now, |(since, ..)| *since);
                watch.broken = Some((since, problem, message));
                self.forget_listed(resource);
            }
        }
    }

    fn forget_listed(&mut self, resource: Resource) {
        match resource {
            Resource::Pods => self.listed_pods.clear(),
            Resource::Registrations => self.listed_registrations.clear(),
            Resource::Nodes => self.listed_nodes.clear(),
        }
    }

    fn applied(&mut self, object: Object) {
        let mut touched = Touched::default();
        match object {
            Object::Pod(pod) => {
                let watch = &mut self.kube.pods;
                if watch.listing.is_some() {
                    // A list may turn out to be older than what was seen, and until its end the mark is
                    // the old one: who takes over by it must not know less than what was acted on.
                    let pods = self.index.pods();
                    let known = pods.find(pods.uid(&pod.uid)).and_then(|id| pods.get(id));
                    let new = known.is_none_or(|k| k.resource_version < pod.resource_version);
                    if watch.complete && (new || watch.older_too) {
                        self.listed_pods.push(pod);
                        return;
                    }
                    watch.show(pod.resource_version);
                } else {
                    watch.advance(pod.resource_version);
                }
                self.index
                    .apply_pod(pod, self.kube.pods.older_too, &mut touched);
            }
            Object::Node(node) => {
                let watch = &mut self.kube.nodes;
                if watch.listing.is_none() {
                    watch.advance(node.resource_version);
                } else if watch.complete {
                    self.listed_nodes.push(node);
                    return;
                } else {
                    watch.show(node.resource_version);
                }
                self.index.apply_node(node, &mut touched);
            }
            Object::Registration(object) => {
                let watch = &mut self.kube.registrations;
                if watch.listing.is_some() {
                    let known = self
                        .index
                        .find(&format!("{}/{}", object.namespace, object.name))
                        .and_then(|id| self.index.registration(id));
                    let new = known.is_none_or(|k| k.resource_version < object.resource_version);
                    if watch.complete && (new || watch.older_too) {
                        self.listed_registrations.push(*object);
                        return;
                    }
                    watch.show(object.resource_version);
                } else {
                    watch.advance(object.resource_version);
                }
                self.index.apply_registration(
                    *object,
                    self.kube.registrations.older_too,
                    &mut touched,
                );
            }
        }
        self.index_changed(touched);
    }

    fn deleted(&mut self, object: Object) {
        let mut touched = Touched::default();
        match object {
            Object::Pod(pod) => {
                self.kube.pods.advance(pod.resource_version);
                self.listed_pods.retain(|listed| listed.uid != pod.uid);
                self.index.delete_pod(&pod.uid, &mut touched);
            }
            Object::Node(node) => {
                self.kube.nodes.advance(node.resource_version);
                self.listed_nodes.retain(|listed| listed.name != node.name);
                self.index.delete_node(&node.name, &mut touched);
            }
            Object::Registration(object) => {
                self.kube.registrations.advance(object.resource_version);
                let full_name = format!("{}/{}", object.namespace, object.name);
                self.listed_registrations
                    .retain(|listed| listed.uid != object.uid);
                self.index
                    .delete_registration(&full_name, &object.uid, &mut touched);
            }
        }
        self.index_changed(touched);
    }

    fn list_done(&mut self, resource: Resource, version: u64) {
        let watch = self.kube.of(resource);
        let Some(epoch) = watch.listing else { return };
        let older_too = watch.older_too;
        let end = watch.end_list(version);
        match end {
            ListEnd::Older => {
                self.forget_listed(resource);
                self.log(
                    tracing::Level::WARN,
                    format!("a list of {resource:?} is older (resource version {version}) than what was seen before; it is discarded and asked for again"),
                );
                self.relist(resource);
                return;
            }
            ListEnd::Restored => {
                self.log(
                    tracing::Level::WARN,
                    format!("lists of {resource:?} stay older (resource version {version}) than what was seen before: Kubernetes was restored from a backup; going on from the list"),
                );
                self.write_marks_anew();
            }
            ListEnd::Counts => {}
        }
        let mut touched = Touched::default();
        match resource {
            Resource::Pods => {
                for pod in std::mem::take(&mut self.listed_pods) {
                    self.index.apply_pod(pod, older_too, &mut touched);
                }
                self.index.end_pods(epoch, &mut touched);
            }
            Resource::Nodes => {
                for node in std::mem::take(&mut self.listed_nodes) {
                    self.index.apply_node(node, &mut touched);
                }
                self.index.end_nodes(epoch, &mut touched);
            }
            Resource::Registrations => {
                for object in std::mem::take(&mut self.listed_registrations) {
                    self.index
                        .apply_registration(object, older_too, &mut touched);
                }
                self.index.end_registrations(epoch, &mut touched);
            }
        }
        self.index_changed(touched);
    }

    fn relist(&mut self, resource: Resource) {
        let watch = self.kube.of(resource);
        watch.asked += 1;
        let number = watch.asked;
        self.effects.push(Effect::Relist(resource, number));
    }

    /// The UID of the cluster is known, or turned out to be another.
    fn learn_uid(&mut self, uid: String) {
        match &self.uid {
            Some(known) if *known == uid => {}
            Some(known) => {
                let message = format!(
                    "the Kubernetes cluster is another one now: the UID of its namespace was {known} and is {uid}; start the operator anew if that is meant"
                );
                self.fatal(message);
            }
            None => {
                self.keys.set_uid(&uid);
                self.mirror.set_leases_prefix(self.keys.leases.clone());
                self.effects.push(Effect::Cluster(uid.clone()));
                self.uid = Some(uid);
                self.scopes_dirty = true;
                self.control_dirty = true;
            }
        }
    }

    /// What the index said that may have changed.
    fn index_changed(&mut self, touched: Touched) {
        let now = self.now.monotonic;
        let free = self.note_losses(&touched);
        for (_, uid, wanted) in &touched.turned {
            if *wanted {
                self.turned_wanted(*uid);
            } else {
                self.turned_unwanted(*uid);
            }
        }
        for key in &touched.keys {
            self.look(key, Some(now));
        }
        for key in &free {
            self.look(key, Some(now));
        }
        let looked_at: HashSet<Key> = touched.keys.into_iter().collect();
        for target in touched.targets {
            self.look_at_socket(target.socket(), |key| looked_at.contains(key));
        }
        for name in &touched.kept {
            self.look_at_leases_of(name);
        }
        for (_, name) in &touched.removed {
            self.scopes_dirty = true;
            self.registration_removed(name);
        }
        for (id, status) in touched.statuses {
            self.status_seen(id, status);
        }
        for id in &touched.registrations {
            self.report_due(*id);
            self.registration_touched(*id);
        }
    }

    // === etcd ===

    fn heard_etcd(&mut self) {
        self.etcd_heard = Some(self.now.monotonic);
        self.etcd_problem = None;
    }

    /// Keys of the mirror changed.
    fn mirror_changed(&mut self, changed: Vec<Changed>) {
        let mut before: Option<Key> = None;
        for change in changed {
            if change.key.starts_with(self.keys.prefix.as_bytes()) {
                self.control_dirty = true;
                if change.key.starts_with(self.keys.leases.as_bytes()) {
                    self.scopes_dirty = true;
                }
                continue;
            }
            self.look(&change.key, None);
            let itself = |key: &Key| *key == change.key;
            if let Some(socket) = change.before {
                self.look_at_socket(socket, itself);
            }
            if let Some(socket) = self
                .mirror
                .get(&change.key)
                .and_then(|record| record.socket)
                && change.before != Some(socket)
            {
                self.look_at_socket(socket, itself);
            }
            // Neighbours are in the same scopes, and one of them says it for all.
            if !before.is_some_and(|before| are_neighbours(&before, &change.key)) {
                self.scope_changed(&change.key);
            }
            before = Some(change.key);
        }
    }

    /// A new reading of keys and revisions alone: what the watch missed is read anew.
    fn compare_keys(&mut self, range: &Range, revision: Revision, keys: &[(Key, Revision)]) {
        if self.mirror.differs_from(range, revision, keys) {
            self.log(
                tracing::Level::WARN,
                "the mirror differs from etcd although its watch is whole; everything is read anew"
                    .into(),
            );
            self.effects.push(Effect::Reread(range.clone()));
        }
    }

    /// Follows what is wanted or named below `leases/`.
    fn follow_scopes(&mut self) {
        if !std::mem::take(&mut self.scopes_dirty) || self.uid.is_none() {
            return;
        }
        self.note_scopes();
        let names: Vec<Arc<SlotName>> = self
            .mirror
            .leases()
            .iter()
            .filter(|(_, lease)| lease.key_stands || lease.own || lease.records > 0)
            .filter_map(|(_, lease)| lease.name.clone())
            .collect();
        let mut scopes: BTreeSet<&str> = names.iter().map(|name| &*name.scope).collect();
        for (_, stored) in self.index.registrations() {
            if let Some(accepted) = stored.serving() {
                scopes.insert(&accepted.scope);
            }
        }
        // A value below `leases/` that someone altered must not make us read the whole of etcd.
        scopes.retain(|scope| scope.len() > 1 && scope.ends_with(['/', '.']));
        let wanted = ranges(&self.keys.prefix, &scopes);
        if wanted != self.followed {
            let mut changed = Vec::new();
            self.mirror.follow(&wanted, &mut changed);
            self.range_problems
                .retain(|range, _| wanted.contains(range));
            self.followed.clone_from(&wanted);
            self.effects.push(Effect::Follow(wanted));
            self.mirror_changed(changed);
        }
    }

    fn ask(&mut self, ask: Ask, request: Request) {
        let number = self.next_ask;
        self.next_ask += 1;
        self.asks.insert(number, ask);
        self.effects.push(Effect::Ask(number, request));
    }

    fn answered(&mut self, number: u64, answer: Result<Answer, Failure>) {
        let Some(ask) = self.asks.remove(&number) else {
            return;
        };
        match &answer {
            Ok(_) => self.heard_etcd(),
            Err(failure) => match failure.kind {
                FailureKind::NoSpace => {
                    self.heard_etcd();
                    self.set_no_space(true);
                }
                FailureKind::Refused(_) => self.heard_etcd(),
                FailureKind::Unknown => self.etcd_problem = Some(failure.message.clone()),
            },
        }
        match ask {
            Ask::Lane(lane) => self.lane_answered(lane, answer),
            Ask::Grant(lease) => self.grant_answered(lease, answer),
            Ask::LeaseKeys(lease) => self.lease_keys_answered(lease, answer),
            Ask::CheckLease(lease) => {
                if let Ok(Answer::LeaseKeys(ttl, _)) = answer
                    && ttl < 0
                {
                    self.lease_lost(lease);
                }
            }
            Ask::Revoke(lease) => self.revoke_answered(lease, answer),
            Ask::Conflict(key, lease) => self.conflict_answered(&key, lease, answer),
            // The watch shows it; else the next sweep tries again.
            Ask::Orphan => {}
            Ask::GrantSession(_)
            | Ask::GrantOwner(_)
            | Ask::ClaimOwner
            | Ask::PutOwnerBack
            | Ask::Elect(_)
            | Ask::Wait(..)
            | Ask::Resign => self.control_answered(ask, answer),
        }
    }

    // === time ===

    fn tick(&mut self) {
        let now = self.now.monotonic;
        self.control_dirty = true;
        self.grant_due();
        let later = self.timers.split_off(&(now + 1));
        for key in std::mem::replace(&mut self.timers, later)
            .into_values()
            .flatten()
        {
            self.look(&key, None);
        }
        if now >= self.next_sweep {
            self.next_sweep = now + SWEEP_MICROS;
            self.sweep();
        }
    }

    /// Looks at a key again at a time.
    fn at(&mut self, time: u64, key: Key) {
        self.timers.entry(time).or_default().push(key);
    }

    /// What follows from the state, after every input.
    fn advance(&mut self) {
        let now = self.now.monotonic;
        if self.kube.live(now) {
            self.last_live = now;
        }
        self.follow_scopes();
        self.stay_fresh();
        if std::mem::take(&mut self.control_dirty) {
            self.control();
        }
        self.term();
        self.pump();
        self.reports();
    }

    /// `--max-staleness`: leases are kept for so long without Kubernetes.
    fn stay_fresh(&mut self) {
        if self.settings.max_staleness == 0 {
            return;
        }
        let keep = self.now.monotonic.saturating_sub(self.last_live) <= self.settings.max_staleness;
        if keep != self.keeping {
            self.keeping = keep;
            self.effects.push(Effect::Keeping(keep));
            let text = if keep {
                "Kubernetes is back; leases are kept alive again"
            } else {
                "no contact with Kubernetes for longer than --max-staleness; leases are left to expire"
            };
            self.log(tracing::Level::WARN, text.into());
        }
    }

    fn fatal(&mut self, message: String) {
        self.life = Life::Over;
        self.effects.push(Effect::Fatal(message));
    }

    fn log(&mut self, level: tracing::Level, message: String) {
        self.effects.push(Effect::Log(level, message));
    }

    /// A lease id that nobody else has: random, positive, as the design asks.
    fn random_lease(&mut self) -> LeaseId {
        self.rng.random_range(1..i64::MAX)
    }
}

/// Whether two keys are in the same scopes for certain.
fn are_neighbours(a: &Key, b: &Key) -> bool {
    let folder = |key: &Key| key.iter().rposition(|byte| *byte == b'/');
    let (at, other) = (folder(a), folder(b));
    at.is_some()
        && at == other
        && at.and_then(|at| Some(a.get(..at)? == b.get(..at)?)) == Some(true)
        && !has_dotted_scope(a)
        && !has_dotted_scope(b)
}

/// How often what is remembered for a while is swept and empty leases are looked for.
const SWEEP_MICROS: u64 = 1_000_000;
