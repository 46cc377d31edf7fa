//! Whose the cluster's name is, and which replica leads.
//!
//! Takes what the mirror shows of the operator's own keys, gives the transactions of sections 5 and 7 of
//! the design: the owner, the election, the marks, giving up. Must never write a record.

use std::sync::Arc;

use rand::Rng;

use crate::mirror::Changed;

use super::io::{Effect, Resource};
use super::kube_view::Mark;
use super::lane::{LANES, Lane, State};
use super::{Ask, Engine, Life};
use crate::model::etcd::{
    Answer, Compare, Failure, FailureKind, Key, KeyValue, LeaseId, Op, Range, Refusal, Request,
    Revision, Txn,
};

/// The TTL of the lease under `owner` and the marks, in seconds (design, section 5).
const OWNER_TTL: i64 = 60;
/// A mark that is not reached after so long is replaced by a list (design, section 7).
const MARKS_MICROS: u64 = 200_000;
/// Between two attempts at the same transaction of this file; half of it is random.
const RETRY_MICROS: u64 = 200_000;
/// How often the watches are asked how far they are while a new leader waits for them.
const ASK_PROGRESS_MICROS: u64 = 250_000;
/// How long a replica that ends waits for its transactions, and then for its last one.
const LEAVE_MICROS: u64 = 500_000;

/// What a replica is.
#[derive(Debug)]
pub(super) enum Role {
    /// It keeps leases alive and its copies warm.
    Standby,
    /// It stands for election.
    Electing,
    /// It won.
    Leader(Term),
}

/// The time from winning one election to losing it.
#[derive(Debug)]
pub(super) struct Term {
    pub(super) nonce: String,
    /// The create revision of the leader key.
    pub(super) won_at: Revision,
    marks: Mark,
    mark_missing: bool,
    since: u64,
    /// The relists of pods and registrations that stand in for marks that are not reached.
    relists: Option<(u64, u64)>,
    marks_reached: bool,
    asked_progress: u64,
    /// It plans and writes.
    pub(super) ready: bool,
    /// It is not live: it changes nothing but what it had confirmed.
    pub(super) frozen: bool,
    /// The watches broke, and not all was read since: it changes and tells nothing.
    blind: bool,
}

/// What a process holds in etcd beside records.
#[derive(Debug)]
pub(super) struct Session {
    nonce: String,
    /// The short lease of the leader key and the waiting key.
    lease: Option<LeaseId>,
    granting: bool,
    retry_at: u64,
    asking: bool,
    /// The lease under `owner`.
    pub(super) owner_lease: Option<LeaseId>,
    granting_owner: bool,
    /// The highest marks that were ever mirrored.
    highest: Mark,
    /// The last transaction was sent; the end comes with its answer.
    last_words: bool,
}

impl Session {
    pub(super) fn new(nonce: String) -> Self {
        Self {
            nonce,
            lease: None,
            granting: false,
            retry_at: 0,
            asking: false,
            owner_lease: None,
            granting_owner: false,
            highest: Mark::default(),
            last_words: false,
        }
    }
}

impl Engine {
    /// Whether this replica leads and may plan and write.
    pub(super) fn leads(&self) -> bool {
        self.life == Life::Running && matches!(&self.role, Role::Leader(term) if term.ready)
    }

    /// Whether this replica leads, but must change nothing that it had not confirmed.
    pub(super) fn frozen(&self) -> bool {
        matches!(&self.role, Role::Leader(term) if term.frozen)
    }

    /// Whether this replica leads, but does not know what stands: its mirror may be of an etcd that was restored
    /// since, and brought back the leader key and the marks, so that the fence passes.
    pub(super) fn blind(&self) -> bool {
        matches!(&self.role, Role::Leader(term) if term.blind)
    }

    /// The watches broke: a leader reads everything anew before it goes on.
    pub(super) fn watch_broken(&mut self) {
        self.mirror.broken();
        // A restored etcd may show the same bytes, put for another pod.
        self.left.clear();
        if let Role::Leader(term) = &mut self.role {
            term.blind = true;
        }
    }

    /// The comparisons that make a deposed leader's write fail.
    pub(super) fn fence(&self) -> Vec<Compare> {
        let Role::Leader(term) = &self.role else {
            return Vec::new();
        };
        let uid = self.uid.clone().unwrap_or_default();
        vec![
            Compare::CreateRevision(Arc::clone(&self.keys.leader), term.won_at),
            Compare::Value(Arc::clone(&self.keys.leader), term.nonce.as_bytes().into()),
            Compare::Value(Arc::clone(&self.keys.owner), uid.as_bytes().into()),
        ]
    }

    /// Looks at the operator's own keys and does what they ask for.
    pub(super) fn control(&mut self) {
        if self.life != Life::Running {
            self.last_words();
            return;
        }
        let Some(uid) = self.uid.clone() else { return };
        if !self.mirror.covers(&self.keys.owner) {
            return;
        }
        self.note_marks();
        let owner = self
            .mirror
            .get(&self.keys.owner)
            .map(|record| (record.value.clone(), record.lease));
        match &owner {
            Some((value, _)) if **value != *uid.as_bytes() => {
                let message = name_taken(
                    &self.settings.cluster_name,
                    &String::from_utf8_lossy(value),
                    &uid,
                );
                self.fatal(message);
                return;
            }
            Some((_, lease)) => {
                let lease = Some(*lease).filter(|lease| *lease != 0);
                if lease.is_some() && self.session.owner_lease != lease {
                    if let Some(unused) = self.session.owner_lease {
                        // Another replica was faster, or the key was put back on another lease.
                        self.effects.push(Effect::Release(unused));
                    }
                    self.session.owner_lease = lease;
                    if let Some(lease) = lease {
                        self.effects.push(Effect::Keep(lease, OWNER_TTL));
                    }
                }
            }
            None => {}
        }
        self.watch_leader_key();
        if self.session.lease.is_none() && !self.session.granting && self.may_try() {
            let lease = self.random_lease();
            self.session.granting = true;
            self.ask(
                Ask::GrantSession(lease),
                Request::Grant(lease, self.settings.election_ttl),
            );
        }
        if self.session.asking || !self.may_try() {
            return;
        }
        if owner.is_none() {
            self.take_name(&uid);
            return;
        }
        let live = self.kube.live(self.now.monotonic);
        let waiting = self.keys.waiting(&self.session.nonce);
        let waits = self.mirror.get(&waiting).is_some();
        match &self.role {
            Role::Leader(_) => {
                let someone_waits = self
                    .mirror
                    .below(self.keys.waiting.as_bytes())
                    .any(|(key, _)| *key != waiting);
                if !live && someone_waits {
                    self.log(
                        tracing::Level::WARN,
                        "no contact with Kubernetes, and another replica has it: giving up the leadership".into(),
                    );
                    self.resign();
                }
            }
            Role::Standby => {
                let Some(lease) = self.session.lease else {
                    return;
                };
                if !live {
                    if waits {
                        self.session.asking = true;
                        let txn = Txn {
                            then: vec![Op::Delete(Arc::clone(&waiting))],
                            ..Txn::default()
                        };
                        self.ask(Ask::Wait(waiting, None), Request::Txn(txn));
                    }
                } else if self.mirror.get(&self.keys.leader).is_none() {
                    self.stand(lease, &uid);
                } else if !waits {
                    self.session.asking = true;
                    let txn = Txn {
                        compares: vec![Compare::Value(
                            Arc::clone(&self.keys.owner),
                            uid.as_bytes().into(),
                        )],
                        then: vec![Op::Put(Arc::clone(&waiting), Box::default(), lease)],
                        otherwise: Vec::new(),
                    };
                    self.ask(Ask::Wait(waiting, Some(lease)), Request::Txn(txn));
                }
            }
            Role::Electing => {}
        }
    }

    fn may_try(&self) -> bool {
        self.now.monotonic >= self.session.retry_at
    }

    fn try_later(&mut self) {
        let wait = RETRY_MICROS / 2 + self.rng.random_range(0..=RETRY_MICROS / 2);
        self.session.retry_at = self.now.monotonic + wait;
    }

    /// The marks that the mirror shows, and a mark of one's own that someone removed.
    fn note_marks(&mut self) {
        let marks: Vec<Mark> = self
            .mirror
            .below(self.keys.seen.as_bytes())
            .filter_map(|(_, record)| serde_json::from_slice(&record.value).ok())
            .collect();
        for mark in marks {
            self.session.highest = self.session.highest.max(mark);
        }
        if !self.leads() {
            return;
        }
        for at in 0..LANES {
            let stands = self.mirror.get(&self.keys.seen(at)).is_some();
            if let Some(lane) = self.lanes.get_mut(at)
                && !stands
                && lane.seen != 0
                && matches!(lane.state, State::Idle)
            {
                lane.seen = 0;
                lane.state = State::Unknown;
            }
        }
    }

    /// Whether the term is over, or one is held that this process does not know of.
    fn watch_leader_key(&mut self) {
        match (&self.role, self.mirror.get(&self.keys.leader)) {
            (Role::Leader(term), Some(record))
                if *record.value == *term.nonce.as_bytes()
                    && record.create_revision == term.won_at => {}
            (Role::Leader(_), found) => {
                let whom = if found.is_some() {
                    "another replica leads"
                } else {
                    "the leader key is gone"
                };
                self.deposed(whom);
            }
            (Role::Standby, Some(record))
                if self.session.lease == Some(record.lease)
                    && !self.session.asking
                    && self.session.retry_at <= self.now.monotonic =>
            {
                // An election whose outcome was unknown was won after all, however many were tried since, or
                // a term ended halfway: its marks were not read, so it is given up. Nobody else would: this
                // process keeps the lease alive. By its revision, since hands may have made anything of its value.
                self.session.asking = true;
                let leader = Arc::clone(&self.keys.leader);
                let txn = Txn {
                    compares: vec![Compare::ModRevision(
                        Arc::clone(&leader),
                        record.mod_revision,
                    )],
                    then: vec![Op::Delete(Arc::clone(&leader))],
                    otherwise: Vec::new(),
                };
                self.ask(Ask::Wait(leader, None), Request::Txn(txn));
            }
            _ => {}
        }
    }

    /// Nobody has the name: takes it, or puts the key back as the leader.
    fn take_name(&mut self, uid: &str) {
        let other = self
            .mirror
            .below(self.keys.all_leases.as_bytes())
            .find_map(|(key, _)| {
                let rest = key.get(self.keys.all_leases.len()..)?;
                let found =
                    String::from_utf8_lossy(rest.split(|byte| *byte == b'/').next()?).into_owned();
                (found != uid).then_some(found)
            });
        if let Some(other) = other {
            let message = name_taken(&self.settings.cluster_name, &other, uid);
            self.fatal(message);
            return;
        }
        let Some(lease) = self.session.owner_lease else {
            if !self.session.granting_owner {
                let lease = self.random_lease();
                self.session.granting_owner = true;
                self.ask(Ask::GrantOwner(lease), Request::Grant(lease, OWNER_TTL));
            }
            return;
        };
        let owner = Arc::clone(&self.keys.owner);
        let leader = Arc::clone(&self.keys.leader);
        let mut compares = vec![Compare::CreateRevision(Arc::clone(&owner), 0)];
        let put = Op::Put(owner, uid.as_bytes().into(), lease);
        if let Role::Leader(term) = &self.role {
            compares.push(Compare::CreateRevision(Arc::clone(&leader), term.won_at));
            compares.push(Compare::Value(leader, term.nonce.as_bytes().into()));
            self.session.asking = true;
            self.ask(
                Ask::PutOwnerBack,
                Request::Txn(Txn {
                    compares,
                    then: vec![put],
                    otherwise: Vec::new(),
                }),
            );
            return;
        }
        if self.mirror.get(&leader).is_some() {
            return;
        }
        let all = Range::prefix(self.keys.all_leases.as_bytes());
        let own = Range::prefix(self.keys.leases.as_bytes());
        compares.push(Compare::CreateRevision(leader, 0));
        compares.push(Compare::Nothing(Range {
            start: all.start,
            end: own.start,
        }));
        compares.push(Compare::Nothing(Range {
            start: own.end,
            end: all.end,
        }));
        self.session.asking = true;
        self.ask(
            Ask::ClaimOwner,
            Request::Txn(Txn {
                compares,
                then: vec![put],
                otherwise: Vec::new(),
            }),
        );
    }

    /// Stands for election.
    fn stand(&mut self, lease: LeaseId, uid: &str) {
        let nonce = format!("{:016x}", self.rng.random::<u64>());
        self.session.asking = true;
        self.role = Role::Electing;
        let leader = Arc::clone(&self.keys.leader);
        let txn = Txn {
            compares: vec![
                Compare::CreateRevision(Arc::clone(&leader), 0),
                Compare::Value(Arc::clone(&self.keys.owner), uid.as_bytes().into()),
            ],
            then: vec![
                Op::Put(Arc::clone(&leader), nonce.as_bytes().into(), lease),
                Op::Delete(self.keys.waiting(&self.session.nonce)),
                Op::GetRange(Range::prefix(self.keys.seen.as_bytes())),
            ],
            otherwise: vec![Op::Get(leader), Op::Get(Arc::clone(&self.keys.owner))],
        };
        self.ask(Ask::Elect(nonce), Request::Txn(txn));
    }

    /// What came of the transactions of this file.
    pub(super) fn control_answered(&mut self, ask: Ask, answer: Result<Answer, Failure>) {
        self.control_dirty = true;
        match (&ask, &answer) {
            (Ask::GrantSession(lease), _) => {
                self.session.granting = false;
                if granted(&answer) {
                    self.session.lease = Some(*lease);
                    self.effects
                        .push(Effect::Keep(*lease, self.settings.election_ttl));
                    return;
                }
            }
            (Ask::GrantOwner(lease), _) => {
                self.session.granting_owner = false;
                if granted(&answer) {
                    self.session.owner_lease = Some(*lease);
                    self.effects.push(Effect::Keep(*lease, OWNER_TTL));
                    return;
                }
            }
            _ => self.session.asking = false,
        }
        let answer = match answer {
            Ok(answer) => answer,
            Err(failure) => {
                self.try_later();
                if failure.kind == FailureKind::Refused(Refusal::LeaseNotFound) {
                    self.check_own_leases();
                }
                if matches!(failure.kind, FailureKind::Refused(Refusal::Permission)) {
                    let prefix = self.keys.prefix.clone();
                    self.log(
                        tracing::Level::ERROR,
                        format!("etcd does not let this user write below {prefix}: {}; grant its role readwrite on that prefix", failure.message),
                    );
                }
                if matches!(self.role, Role::Electing) {
                    self.role = Role::Standby;
                }
                if self.session.last_words {
                    self.over();
                }
                return;
            }
        };
        let Answer::Txn {
            succeeded,
            revision,
            reads,
        } = answer
        else {
            return;
        };
        if succeeded && !matches!(ask, Ask::Resign | Ask::Wait(..)) {
            // A put was let through.
            self.set_no_space(false);
        }
        match ask {
            Ask::ClaimOwner | Ask::PutOwnerBack if succeeded => {
                let uid = self.uid.clone().unwrap_or_default();
                let lease = self.session.owner_lease.unwrap_or(0);
                let key = Arc::clone(&self.keys.owner);
                self.note_own(&key, Some((uid.as_bytes(), lease)), revision);
            }
            Ask::Elect(nonce) => self.election_answered(nonce, succeeded, revision, reads),
            Ask::Resign => {
                if self.session.last_words {
                    self.over();
                }
            }
            // The watch may take a moment, and would have it done again.
            Ask::Wait(key, lease) if succeeded => {
                let value = lease.map(|lease| (&[] as &[u8], lease));
                self.note_own(&key, value, revision);
            }
            _ => self.try_later(),
        }
    }

    fn election_answered(
        &mut self,
        nonce: String,
        succeeded: bool,
        revision: Revision,
        reads: Vec<Vec<KeyValue>>,
    ) {
        self.role = Role::Standby;
        if !succeeded {
            let keys = [Arc::clone(&self.keys.leader), Arc::clone(&self.keys.owner)];
            self.note_reads(&keys, reads, revision);
            self.try_later();
            return;
        }
        let leader = Arc::clone(&self.keys.leader);
        let lease = self.session.lease.unwrap_or(0);
        self.note_own(&leader, Some((nonce.as_bytes(), lease)), revision);
        let waiting = self.keys.waiting(&self.session.nonce);
        self.note_own(&waiting, None, revision);
        let seen = reads.into_iter().nth(2).unwrap_or_default();
        let mut marks = self.session.highest;
        self.lanes = Default::default();
        // One number can't tell how far the watches of several namespaces are: each list is asked for anew.
        let mut mark_missing = self.settings.namespaces.len() > 1;
        for at in 0..LANES {
            let key = self.keys.seen(at);
            let found = seen.iter().find(|kv| kv.key == key);
            let mark = found.and_then(|kv| serde_json::from_slice::<Mark>(&kv.value).ok());
            mark_missing |= mark.is_none();
            if let Some(lane) = self.lanes.get_mut(at) {
                lane.seen = found.map_or(0, |kv| kv.mod_revision);
                lane.state = if lane.seen == 0 {
                    State::Unknown
                } else {
                    State::Idle
                };
            }
        }
        for kv in &seen {
            // Lanes of another version count too.
            if let Ok(mark) = serde_json::from_slice::<Mark>(&kv.value) {
                marks = marks.max(mark);
            }
        }
        self.log(
            tracing::Level::INFO,
            format!("elected leader of cluster {}", self.settings.cluster_name),
        );
        self.role = Role::Leader(Term {
            nonce,
            won_at: revision,
            marks,
            mark_missing,
            since: self.now.monotonic,
            relists: None,
            marks_reached: false,
            asked_progress: 0,
            ready: false,
            frozen: false,
            blind: false,
        });
    }

    /// What a new leader waits for before its first write: the marks, and its mirror.
    pub(super) fn term(&mut self) {
        let now = self.now.monotonic;
        let live = self.kube.live(now);
        let known = self.kube.mark();
        let (pods, registrations) = (self.kube.pods.answered, self.kube.registrations.answered);
        let Role::Leader(term) = &mut self.role else {
            return;
        };
        if term.ready {
            if term.frozen == live {
                term.frozen = !live;
                let text = if live {
                    "live again: changes are written"
                } else {
                    "no contact with Kubernetes: what is registered stays, nothing is changed"
                };
                self.log(tracing::Level::WARN, text.into());
                if live {
                    self.look_at_all();
                    self.all_reports_due();
                }
            }
            if self.blind() && self.mirror_reached() {
                self.sees_again();
            }
            return;
        }
        let mut restored = false;
        if !term.marks_reached {
            let reached =
                known.pods >= term.marks.pods && known.registrations >= term.marks.registrations;
            if reached && !term.mark_missing {
                term.marks_reached = true;
            } else if let Some((asked_pods, asked_registrations)) = term.relists {
                if pods >= asked_pods && registrations >= asked_registrations {
                    term.marks_reached = true;
                    restored = !reached;
                }
            } else if term.mark_missing || now.saturating_sub(term.since) >= MARKS_MICROS {
                self.relist(Resource::Pods);
                self.relist(Resource::Registrations);
                let asked = (self.kube.pods.asked, self.kube.registrations.asked);
                if let Role::Leader(term) = &mut self.role {
                    term.relists = Some(asked);
                }
            }
        }
        if restored {
            self.log(
                tracing::Level::WARN,
                "Kubernetes knows less than what was acted on: it was restored from a backup; going on from its lists".into(),
            );
            self.write_marks_anew();
        }
        if !self.mirror_reached() {
            return;
        }
        if let Role::Leader(term) = &mut self.role
            && term.marks_reached
        {
            term.ready = true;
            term.frozen = !live;
            if term.blind {
                // Its election may have read the marks of another etcd.
                self.sees_again();
            }
            // What was under way when an earlier term ended stands by now, or never will.
            let left = std::mem::take(&mut self.left);
            self.note_whose_stands(&left);
            self.look_at_all();
            self.all_reports_due();
        }
    }

    /// All was read anew since the watches broke: the leader goes on.
    fn sees_again(&mut self) {
        if let Role::Leader(term) = &mut self.role {
            term.blind = false;
        }
        // The revisions of another etcd may come again in this one: with them a late write would pass its barrier.
        for at in 0..LANES {
            let seen = self.mirror.mod_revision(&self.keys.seen(at));
            if let Some(lane) = self.lanes.get_mut(at) {
                lane.seen = seen;
                if seen == 0 && matches!(lane.state, State::Idle) {
                    lane.state = State::Unknown;
                }
            }
        }
        // What was due meanwhile was not told.
        self.all_reports_due();
    }

    /// Whether the mirror of a leader has reached the revision of its election, also since the watches broke last;
    /// else asks how far the watches are.
    fn mirror_reached(&mut self) -> bool {
        let now = self.now.monotonic;
        let own = Range::prefix(self.keys.prefix.as_bytes());
        let Role::Leader(term) = &mut self.role else {
            return false;
        };
        // What etcd does not let us read is left as it is (`Mirror::covers`), and holds nothing else up.
        let problems = &self.range_problems;
        let unreadable = |range: &Range| {
            problems
                .get(range)
                .is_some_and(|failure| failure.kind == FailureKind::Refused(Refusal::Permission))
        };
        // `leases/` first: it names the scopes, which `follow_scopes` then added.
        let reached = self.mirror.range_reached(&own, term.won_at)
            && !self.scopes_dirty
            && self.mirror.reached(term.won_at, unreadable);
        if !reached && now.saturating_sub(term.asked_progress) >= ASK_PROGRESS_MICROS {
            term.asked_progress = now;
            self.effects.push(Effect::AskProgress);
        }
        reached
    }

    /// Every lane writes its mark anew: what stands there is no measure any more.
    pub(super) fn write_marks_anew(&mut self) {
        self.session.highest = self.kube.mark();
        if let Role::Leader(term) = &mut self.role {
            term.marks = Mark::default();
            for lane in &mut self.lanes {
                if matches!(lane.state, State::Idle) {
                    lane.state = State::Unknown;
                }
            }
        }
    }

    /// The term is over.
    pub(super) fn deposed(&mut self, why: &str) {
        if !matches!(self.role, Role::Leader(_)) {
            return;
        }
        self.log(
            tracing::Level::WARN,
            format!("not the leader any more: {why}"),
        );
        self.role = Role::Standby;
        let mut own: Vec<LeaseId> = self
            .mirror
            .leases()
            .iter()
            .filter(|(_, lease)| lease.own)
            .map(|(id, _)| id)
            .collect();
        own.sort_unstable();
        for lease in own {
            self.effects.push(Effect::Release(lease));
        }
        for lane in std::mem::take(&mut self.lanes) {
            self.left.extend(lane.unknown);
            if let State::Wait { batch, .. } = lane.state {
                self.left.extend(batch);
            }
        }
        self.slots = crate::plan::slots::Slots::default();
        self.flying.clear();
        self.flying_sockets.clear();
        self.revoking.clear();
        self.empty_since.clear();
        // What is still under way is fenced off; its answers mean nothing to the next term.
        self.asks.retain(|_, ask| {
            !matches!(
                ask,
                Ask::Lane(_)
                    | Ask::Grant(_)
                    | Ask::LeaseKeys(_)
                    | Ask::Revoke(_)
                    | Ask::Conflict(..)
                    | Ask::Orphan
            )
        });
        self.mirror.end_term();
        self.scopes_dirty = true;
        self.control_dirty = true;
    }

    /// Gives the leader key up, if it is still one's own.
    fn resign(&mut self) {
        let compares = self.fence();
        self.session.asking = true;
        let txn = Txn {
            compares,
            then: vec![Op::Delete(Arc::clone(&self.keys.leader))],
            otherwise: Vec::new(),
        };
        self.ask(Ask::Resign, Request::Txn(txn));
        self.deposed("given up");
    }

    /// SIGTERM: no new transaction, then the leader key goes, then the process.
    pub(super) fn leave(&mut self) {
        if self.life == Life::Running {
            self.life = Life::Leaving(self.now.monotonic);
            self.control_dirty = true;
        }
    }

    fn last_words(&mut self) {
        let Life::Leaving(since) = self.life else {
            return;
        };
        let waited = self.now.monotonic.saturating_sub(since);
        if self.session.last_words {
            if waited >= 2 * LEAVE_MICROS {
                self.over();
            }
            return;
        }
        let busy = self.lanes.iter().any(Lane::is_busy) || matches!(self.role, Role::Electing);
        if busy && waited < LEAVE_MICROS {
            self.control_dirty = true;
            return;
        }
        self.session.last_words = true;
        let waiting = Op::Delete(self.keys.waiting(&self.session.nonce));
        let txn = match &self.role {
            Role::Leader(term) => Txn {
                compares: vec![
                    Compare::CreateRevision(Arc::clone(&self.keys.leader), term.won_at),
                    Compare::Value(Arc::clone(&self.keys.leader), term.nonce.as_bytes().into()),
                ],
                then: vec![Op::Delete(Arc::clone(&self.keys.leader)), waiting.clone()],
                otherwise: vec![waiting],
            },
            _ => Txn {
                then: vec![waiting],
                ..Txn::default()
            },
        };
        self.ask(Ask::Resign, Request::Txn(txn));
    }

    fn over(&mut self) {
        self.life = Life::Over;
        self.effects.push(Effect::Done);
    }

    /// One of the short leases of this process is gone.
    pub(super) fn own_lease_lost(&mut self, lease: LeaseId) {
        if self.session.lease == Some(lease) {
            self.session.lease = None;
            self.deposed("its lease ran out");
        }
        if self.session.owner_lease == Some(lease) {
            self.session.owner_lease = None;
        }
        self.control_dirty = true;
    }

    /// Asks etcd which of the leases that every transaction needs are there.
    pub(super) fn check_own_leases(&mut self) {
        for lease in [self.session.lease, self.session.owner_lease]
            .into_iter()
            .flatten()
        {
            self.ask(Ask::CheckLease(lease), Request::LeaseKeys(lease));
        }
    }

    /// Notes the effect of one's own transaction on a key of one's own.
    pub(super) fn note_own(
        &mut self,
        key: &Key,
        value: Option<(&[u8], LeaseId)>,
        revision: Revision,
    ) {
        let created = self
            .mirror
            .get(key)
            .map_or(revision, |record| record.create_revision);
        let kv = value.map(|(value, lease)| KeyValue {
            key: Arc::clone(key),
            value: value.into(),
            lease,
            create_revision: created,
            mod_revision: revision,
        });
        let mut changed: Vec<Changed> = Vec::new();
        self.mirror.answer(key, kv, revision, false, &mut changed);
        self.mirror_changed(changed);
    }

    /// Notes what a transaction read of keys, in their order.
    pub(super) fn note_reads(
        &mut self,
        keys: &[Key],
        reads: Vec<Vec<KeyValue>>,
        revision: Revision,
    ) {
        let mut changed: Vec<Changed> = Vec::new();
        for (key, found) in keys.iter().zip(reads) {
            self.mirror
                .answer(key, found.into_iter().next(), revision, true, &mut changed);
        }
        self.mirror_changed(changed);
    }
}

fn granted(answer: &Result<Answer, Failure>) -> bool {
    match answer {
        Ok(_) => true,
        Err(failure) => failure.kind == FailureKind::Refused(Refusal::LeaseExists),
    }
}

fn name_taken(cluster: &str, other: &str, own: &str) -> String {
    format!(
        "the cluster name {cluster:?} belongs to the Kubernetes cluster whose kube-system namespace (with --namespace: whose operator's namespace) has the UID {other}; this one's is {own}. \
         Give this operator another --cluster-name, or, if that cluster is gone for good, free the name with: \
         etcd-registrar purge --cluster-name {cluster} --uid {other}"
    )
}
