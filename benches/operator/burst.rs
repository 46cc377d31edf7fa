//! All endpoints at once: the pods are ready, and a registration that selects them is applied.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::floor::Floor;
use crate::observe::{self, Change, Observer};
use crate::report::{Row, shown};
use crate::statistics::{Times, milliseconds};
use crate::world::{BULK, World, prefix};
use crate::{Measured, Result, Sizes};

const SERVICE: &str = BULK;
/// From one burst to the next: endpoints that come back five times within 10 s are held back for flapping.
const PAUSE: Duration = Duration::from_secs(3);
/// As long as the operator's prefix, so that the keys are as long too.
const FLOOR: &str = "/services/bulk/flor/";

pub(crate) fn measure(world: &mut World, sizes: &Sizes) -> Measured {
    let count = world.bulk(sizes.endpoints)?.len();
    let own = prefix(BULK, SERVICE);
    let changes = observe::etcd(&world.endpoint(), &["/services/bulk/"])?;
    let operator = world.operator()?;
    let (mut put, mut removed) = (Times::default(), Times::default());
    let (mut bare, mut fenced) = (Times::default(), Times::default());
    let mut floor: Option<Floor> = None;
    let mut next = Instant::now();
    for _ in 0..sizes.bursts {
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        next = Instant::now() + PAUSE;
        world.register(BULK, SERVICE)?;
        let began = Instant::now();
        put.push(milliseconds(began, last(&changes, &own, true, count)?));
        // It copies what the operator wrote the first time.
        let other = match &mut floor {
            Some(other) => other,
            none => {
                let (other, read) = Floor::burst(&world.endpoint(), &own, FLOOR)?;
                if read != count {
                    return Err(format!("{read} records stand, not {count}").into());
                }
                none.insert(other)
            }
        };
        world.wait_registered(&operator, count)?;
        world.unregister(BULK, SERVICE)?;
        let began = Instant::now();
        removed.push(milliseconds(began, last(&changes, &own, false, count)?));
        world.wait_registered(&operator, 0)?;

        for (command, times) in [("put", &mut bare), ("fenced", &mut fenced)] {
            other.begin("grant")?;
            other.finish()?;
            other.begin(command)?;
            let began = Instant::now();
            times.push(milliseconds(began, last(&changes, FLOOR, true, count)?));
            other.finish()?;
            other.begin("remove")?;
            last(&changes, FLOOR, false, count)?;
            other.finish()?;
        }
        let newest = |times: &Times| shown(times.values().last().copied().unwrap_or_default());
        eprintln!(
            "bench:   {}, floor {}, with such transactions {}",
            newest(&put),
            newest(&bare),
            newest(&fenced)
        );
    }
    // As a rate: how much of the floor's is reached.
    let ratio = fenced.median() / put.median();
    let rows = vec![
        Row::new(
            format!(
                "{count} endpoints at once, median of {}, against the operator's transactions",
                sizes.bursts
            ),
            shown(put.median()),
        )
        .floor(shown(fenced.median()), ratio)
        .target("at least 0.80 of the rate", ratio >= 0.8),
        Row::new(
            format!("{count} endpoints at once, against puts without comparisons"),
            shown(put.median()),
        )
        .floor(shown(bare.median()), bare.median() / put.median()),
        Row::new(
            format!("{count} endpoints removed at once, median"),
            shown(removed.median()),
        ),
    ];
    let measured = json!({"endpoints": count, "put_ms": put.values(), "removed_ms": removed.values(), "floor_ms": bare.values(), "fenced_floor_ms": fenced.values()});
    Ok((rows, measured))
}

/// When the last of `count` such events came; nothing else may come.
fn last(changes: &Observer<Change>, prefix: &str, put: bool, count: usize) -> Result<Instant> {
    let mut at = Instant::now();
    for _ in 0..count {
        let change = changes.next("a record of the burst")?;
        if change.put != put || !change.key.starts_with(prefix) {
            return Err(format!("an event that does not belong to the burst: {change:?}").into());
        }
        at = change.at;
    }
    Ok(at)
}
