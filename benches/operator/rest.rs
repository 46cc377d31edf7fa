//! CPU at rest, with all endpoints registered.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::report::Row;
use crate::world::World;
use crate::{Measured, Sizes};

pub(crate) fn measure(world: &mut World, sizes: &Sizes) -> Measured {
    let operator = world.operator()?;
    world.registered_bulk(sizes.endpoints, &operator)?;
    let etcd = world.etcd.process(0)?;
    let times =
        || -> testbed::Result<[Duration; 2]> { Ok([operator.cpu_time()?, etcd.cpu_time()?]) };
    // Settled: what followed the registration is over.
    crate::world::settled_memory(&operator)?;
    let revision = world.revision()?;
    let began = Instant::now();
    let before = times()?;
    std::thread::sleep(Duration::from_secs(sizes.rest));
    let after = times()?;
    let lasted = began.elapsed();
    let writes = world.revision()? - revision;
    let share = |at: usize| {
        let used = after
            .get(at)
            .zip(before.get(at))
            .map_or(0.0, |(after, before)| (*after - *before).as_secs_f64());
        100.0 * used / lasted.as_secs_f64()
    };
    let count = sizes.endpoints;
    let rows = vec![
        Row::new(
            format!("CPU at rest with {count} endpoints, operator"),
            format!("{:.2} % of a core", share(0)),
        )
        .target("below 1 %", share(0) < 1.0),
        Row::new(
            format!("CPU at rest with {count} endpoints, etcd"),
            format!("{:.2} % of a core", share(1)),
        ),
        Row::new(
            format!("writes to etcd at rest in {} s", sizes.rest),
            writes.to_string(),
        ),
    ];
    let measured = json!({"endpoints": count, "seconds": lasted.as_secs_f64(), "operator_percent": share(0), "etcd_percent": share(1), "writes": writes});
    Ok((rows, measured))
}
