//! A start with all records in place: how soon the operator writes, and that it writes nothing else.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::observe;
use crate::report::{Row, shown};
use crate::statistics::{Times, milliseconds};
use crate::world::{BULK, World, prefix};
use crate::{Measured, Sizes};

/// How long events are looked for after everything is known to be registered.
const WATCHED: Duration = Duration::from_secs(3);

pub(crate) fn measure(world: &mut World, sizes: &Sizes) -> Measured {
    let operator = world.operator()?;
    world.registered_bulk(sizes.endpoints, &operator)?;
    let pods = world.bulk(sizes.endpoints)?;
    let pod = pods.first().ok_or("there are no pods")?;
    let key = pod.key(&prefix(BULK, BULK));
    let changes = observe::etcd(&world.endpoint(), &["/services/"])?;
    let mut first = Times::default();
    let mut others = 0;
    for _ in 0..sizes.starts {
        operator.stop()?;
        // The one thing to do: it shows when the operator begins to write.
        world.set_ready(pod, false)?;
        others += changes.pending().len();
        let began = Instant::now();
        operator.process().start()?;
        let change = changes.next("the first write")?;
        first.push(milliseconds(began, change.at));
        if change.key != key || change.put {
            return Err(format!("{key} was to be removed first, and {change:?} came").into());
        }
        operator.wait_ready()?;
        world.wait_registered(&operator, sizes.endpoints - 1)?;
        let until = Instant::now() + WATCHED;
        while changes.next_until(until)?.is_some() {
            others += 1;
        }
        world.set_ready(pod, true)?;
        changes.next("the record that comes back")?;
        world.wait_registered(&operator, sizes.endpoints)?;
    }
    let count = sizes.endpoints;
    let rows = vec![
        Row::new(
            format!(
                "start with {count} records: from exec to the first write, worst of {}",
                sizes.starts
            ),
            shown(first.worst()),
        )
        .target("below 2 s", first.worst() < 2000.0),
        Row::new(
            format!("start with {count} records: events on unchanged endpoints"),
            others.to_string(),
        )
        .target("0", others == 0),
    ];
    Ok((
        rows,
        json!({"endpoints": count, "first_write_ms": first.values(), "other_events": others}),
    ))
}
