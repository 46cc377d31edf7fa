//! Resident memory, of a process that was just started and of one that registered everything itself.

use serde_json::json;
use testbed::Operator;

use crate::report::Row;
use crate::world::{BULK, OTHERS, World, settled_memory};
use crate::{Measured, Result, Sizes};

pub(crate) fn measure(world: &mut World, sizes: &Sizes) -> Measured {
    let Sizes {
        endpoints, pods, ..
    } = *sizes;
    let operator = world.operator()?;
    world.registered_bulk(endpoints, &operator)?;
    let few = started(world, &operator, endpoints)?;
    world.others(pods)?;
    let many = started(world, &operator, endpoints)?;
    world.register(BULK, OTHERS)?;
    world.wait_registered(&operator, pods)?;
    let grown = settled_memory(&operator)?;
    let all = started(world, &operator, pods)?;
    let shown = |(now, peak): (f64, f64)| format!("{now:.1} MB (peak {peak:.1})");
    let rows = vec![
        Row::new(
            format!("memory after a start: {endpoints} pods, all registered"),
            shown(few),
        ),
        Row::new(
            format!("memory after a start: {pods} pods, {endpoints} registered"),
            shown(many),
        )
        .target("below 64 MB", many.0 < 64.0),
        Row::new(
            format!("memory after a start: {pods} pods, all registered"),
            shown(all),
        )
        .target("below 200 MB", all.0 < 200.0),
        Row::new(
            format!(
                "memory after registering {} more: {pods} pods, all registered",
                pods - endpoints
            ),
            shown(grown),
        )
        .target("below 200 MB", grown.0 < 200.0),
    ];
    let figures = |(now, peak): (f64, f64)| json!({"resident_mb": now, "peak_mb": peak});
    let measured = json!({
        "endpoints": endpoints, "pods": pods,
        "few": figures(few), "many": figures(many), "all": figures(all), "all_grown": figures(grown),
    });
    Ok((rows, measured))
}

/// The memory of the operator after a start.
fn started(world: &World, operator: &Operator, registered: usize) -> Result<(f64, f64)> {
    operator.restart()?;
    world.wait_registered(operator, registered)?;
    settled_memory(operator)
}
