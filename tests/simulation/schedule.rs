//! What happens in a run, from a seed: a list of steps, each with a seed of its own.
//!
//! Takes how much may go wrong, gives steps. A step keeps its own source of chance, so that it does the same
//! when others are left out: that is what lets a schedule be shrunk. Must never look at the state of a run.

use std::fmt;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::model_etcd::GoesOn;
use crate::world::{Knobs, MILLISECOND};

/// A change of Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    CreatePod,
    Readiness,
    Addresses,
    Labels,
    Terminate,
    Finish,
    DeletePod,
    /// A pod goes, and another has its address at once.
    ReplacePod,
    EditSpec,
    CreateRegistration,
    DeleteRegistration,
    EditNode,
    /// `suspend` is set, or taken back.
    Suspend,
    /// A spec that this version can't read, or one that is refused.
    Spoil,
    /// Such a spec is put right.
    Mend,
}

/// What happens to Kubernetes, to the operators and to etcd. Where `Registrar.tla` has an action for it, it
/// has that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    KubeStep(Change),
    /// A watch of Kubernetes lists anew.
    Relist,
    /// The watches of etcd of one process break.
    BreakWatch,
    Crash,
    /// A process is asked to end: `Crash` with `LeaderExpires` in the model.
    HandOver,
    Freeze,
    /// One process does not reach Kubernetes.
    CutOff,
    /// None does.
    KubeAway,
    /// etcd does not answer. `false`: its leases have all of their time when it is back; `true`: it stood
    /// still, and those whose time is over end.
    EtcdAway(bool),
    LeaderExpires,
    Hand,
    NoSpace(bool),
    Save,
    Restore(GoesOn),
    /// etcd comes back without its data.
    Wipe,
    /// The history of etcd goes.
    Compact,
    /// The policy file changes.
    Policy(usize),
    /// The clock of the machine jumps by an hour.
    ClockJump,
}

/// One step of a schedule.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    /// Its place in the whole schedule, by which it is named when others are left out.
    pub(crate) number: usize,
    /// When, from the start of the run; `None`: before any operator starts.
    pub(crate) at: Option<u64>,
    pub(crate) what: Fault,
    /// Where its chance comes from.
    pub(crate) seed: u64,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.at {
            None => write!(f, "   before    "),
            Some(at) => write!(f, "{:>10.3} ms", at as f64 / MILLISECOND as f64),
        }?;
        write!(f, "  {:?}", self.what)
    }
}

/// The steps of a run.
pub(crate) fn schedule(knobs: &Knobs, seed: u64) -> Vec<Step> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut planned: Vec<(Option<u64>, Fault)> = Vec::new();
    for (most, change) in [
        (3..=3, Change::EditNode),
        (2..=6, Change::CreateRegistration),
        (2..=9, Change::CreatePod),
    ] {
        let count: usize = rng.random_range(most);
        planned.extend((0..count).map(|_| (None, Fault::KubeStep(change))));
    }
    for (count, fault) in [
        (knobs.relists, Fault::Relist),
        (knobs.broken_watches, Fault::BreakWatch),
        (knobs.crashes, Fault::Crash),
        (knobs.handovers, Fault::HandOver),
        (knobs.freezes, Fault::Freeze),
        (knobs.cuts, Fault::CutOff),
        (knobs.kube_away, Fault::KubeAway),
        (knobs.etcd_away, Fault::EtcdAway(false)),
        (knobs.etcd_frozen, Fault::EtcdAway(true)),
        (knobs.expiries, Fault::LeaderExpires),
        (knobs.hands, Fault::Hand),
        (knobs.wipes, Fault::Wipe),
        (knobs.compactions, Fault::Compact),
        (knobs.clock_jumps, Fault::ClockJump),
    ] {
        for _ in 0..count {
            planned.push((Some(rng.random_range(0..knobs.horizon)), fault));
        }
    }
    for _ in 0..knobs.policies {
        let policy = rng.random_range(0..crate::oracle::TAKE_TURNS);
        planned.push((
            Some(rng.random_range(0..knobs.horizon)),
            Fault::Policy(policy),
        ));
    }
    for (count, from, to) in [
        (
            knobs.no_space,
            Fault::NoSpace(true),
            [Fault::NoSpace(false); 3],
        ),
        (
            knobs.restores,
            Fault::Save,
            [GoesOn::Back, GoesOn::Between, GoesOn::Above].map(Fault::Restore),
        ),
    ] {
        for _ in 0..count {
            let first = rng.random_range(0..knobs.horizon / 2);
            let then = first + rng.random_range(0..knobs.horizon / 2);
            let which = rng.random_range(0..to.len());
            planned.push((Some(first), from));
            planned.extend(to.get(which).map(|fault| (Some(then), *fault)));
        }
    }
    let mut left = knobs.changes;
    while left > 0 {
        // Changes come in bursts: what follows at once is what races.
        let burst = rng.random_range(1..=4usize).min(left);
        let time = rng.random_range(0..knobs.horizon);
        for _ in 0..burst {
            let gap = rng.random_range(0..=20 * MILLISECOND);
            let change = change(&mut rng, knobs);
            // All of it before the end.
            let at = (time + gap).min(knobs.horizon);
            planned.push((Some(at), Fault::KubeStep(change)));
        }
        left -= burst;
    }
    // `None` comes first.
    planned.sort_by_key(|(at, _)| *at);
    planned
        .into_iter()
        .enumerate()
        .map(|(number, (at, what))| Step {
            number,
            at,
            what,
            seed: rng.random(),
        })
        .collect()
}

fn change(rng: &mut StdRng, knobs: &Knobs) -> Change {
    if knobs.moves && rng.random_bool(0.7) {
        return match rng.random_range(0..4) {
            0 => Change::Addresses,
            1 => Change::CreatePod,
            _ => Change::ReplacePod,
        };
    }
    if knobs.odd_specs && rng.random_bool(0.3) {
        return match rng.random_range(0..4) {
            0 | 1 => Change::Suspend,
            2 => Change::Spoil,
            _ => Change::Mend,
        };
    }
    match rng.random_range(0..100) {
        0..20 => Change::CreatePod,
        20..46 => Change::Readiness,
        46..53 => Change::Addresses,
        53..60 => Change::Labels,
        60..67 => Change::Terminate,
        67..71 => Change::Finish,
        71..80 => Change::DeletePod,
        80..91 => Change::EditSpec,
        91..95 => Change::CreateRegistration,
        95..97 => Change::DeleteRegistration,
        _ => Change::EditNode,
    }
}
