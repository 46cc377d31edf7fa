//! A failing schedule --> a short one that fails the same way.
//!
//! Takes a case that fails, leaves out steps (and with them pods, registrations and faults) for as long as it
//! fails at the same place of the code, gives the case and what to type. Must never change a step: one that is
//! left does what it did.

use std::cell::RefCell;
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use crate::{Case, Shown, run};

/// Runs that a shrinking may take: some seconds.
const RUNS: usize = 400;
/// Other choices of delays that are tried with every part of a schedule: what is left out shifts them.
const DELAYS: u64 = 3;

/// Why a run failed, and where in the code that was noticed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) message: String,
    place: String,
}

thread_local! {
    /// What the panic that is being caught said; `None`: nobody catches.
    static CAUGHT: RefCell<Option<Failure>> = const { RefCell::new(None) };
    static CATCHING: RefCell<bool> = const { RefCell::new(false) };
}

/// Runs a case; a check that fails is no panic, and prints nothing.
pub(crate) fn attempt(case: &Case) -> Result<Shown, Failure> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            if !CATCHING.with_borrow(|catching| *catching) {
                return before(info);
            }
            let payload = info.payload();
            let message = payload
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string))
                .unwrap_or_default();
            let place = info.location().map(ToString::to_string).unwrap_or_default();
            CAUGHT.set(Some(Failure { message, place }));
        }));
    });
    CATCHING.set(true);
    let ran = catch_unwind(AssertUnwindSafe(|| run(case, false).0));
    CATCHING.set(false);
    ran.map_err(|_| CAUGHT.take().expect("the hook has noted it"))
}

/// Whether a case fails at the same place, with which delays.
fn fails_alike(case: &Case, place: &str, runs: &mut usize) -> Option<(Case, Failure)> {
    for delays in (0..=DELAYS).map(|n| case.delays + n) {
        *runs += 1;
        let case = Case {
            delays,
            ..case.clone()
        };
        match attempt(&case) {
            Err(failure) if failure.place == place => return Some((case, failure)),
            _ => {}
        }
    }
    None
}

/// Leaves out ever smaller parts.
fn shrink(case: &Case, failure: &Failure) -> (Case, Failure) {
    let mut kept: Vec<usize> = case.steps().iter().map(|step| step.number).collect();
    let mut best = (case.clone(), failure.clone());
    let mut runs = 0;
    let mut size = kept.len().div_ceil(2);
    while size > 0 && runs < RUNS {
        let mut from = 0;
        let mut shorter = false;
        while from < kept.len() && runs < RUNS {
            let mut rest = kept.clone();
            rest.drain(from..(from + size).min(rest.len()));
            let candidate = Case {
                kept: Some(rest.clone()),
                ..best.0.clone()
            };
            match fails_alike(&candidate, &failure.place, &mut runs) {
                Some(found) => {
                    best = found;
                    kept = rest;
                    shorter = true;
                }
                None => from += size,
            }
        }
        if !(shorter && size == 1) {
            size /= 2;
        }
    }
    best
}

/// What a person is told of a case that fails.
pub(crate) fn report(case: &Case, failure: &Failure) -> String {
    let (short, last) = shrink(case, failure);
    let steps = short.steps();
    let mut text = format!(
        "{case} fails: {}\nof its {} steps these {} are enough:\n",
        failure.message,
        case.steps().len(),
        steps.len()
    );
    for step in steps {
        let _ = writeln!(text, "{step}");
    }
    let _ = write!(
        text,
        "they fail with: {}\nreplay it with: SEED={short} cargo test --test simulation replay -- --nocapture",
        last.message
    );
    text
}
