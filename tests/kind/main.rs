//! The operator on real kind clusters: kubelets, readiness probes, nodes that stop, images, Helm, restricted Pod Security.
//!
//! `make e2e-kind` runs it, and removes the clusters before and after. It needs Docker and takes minutes, so that `cargo test`
//! leaves it out. KIND_STEPS names some steps, KIND_KEEP leaves the clusters up for the next run, KIND_IMAGE_BEFORE is the image
//! of the commit before, to upgrade from.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

mod calls;
mod names;
mod nodes;
mod pages;
mod release;
mod watcher;
mod workload;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use world::World;

/// A name, and what it shows.
type Step = (&'static str, fn(&World));

/// What is shown, in order: later steps go on from what earlier ones left.
const STEPS: [Step; 18] = [
    ("deployment", workload::deployment),
    ("statefulset", workload::statefulset),
    ("probe", workload::probe),
    ("calls", calls::across_clusters),
    ("names", names::by_name),
    ("grpc", names::grpc),
    ("rights", release::rights),
    ("operators-killed", release::operators_killed),
    ("upgrade", release::upgrade_and_rollback),
    ("eviction", nodes::evicted),
    ("drain", nodes::drain),
    ("worker", nodes::worker_stopped),
    ("control-plane", nodes::control_plane_restarted),
    ("etcd-member", nodes::etcd_member_stopped),
    ("network", nodes::network_cut),
    ("uninstall", release::uninstall),
    ("purge", release::uninstall_with_purge),
    ("first-page", pages::first_page),
];

#[test]
#[ignore = "make e2e-kind: needs Docker, and takes minutes"]
fn kind_end_to_end() {
    if let Some(missing) = world::missing() {
        assert!(std::env::var_os("CI").is_none(), "{missing}");
        println!("kind: left out: {missing}");
        return;
    }
    let variable = |name| std::env::var(name).unwrap_or_default();
    let (image, archive) = (variable("KIND_IMAGE"), variable("KIND_ARCHIVE"));
    assert!(
        !image.is_empty() && !archive.is_empty(),
        "make e2e-kind sets KIND_IMAGE and KIND_ARCHIVE"
    );
    let only = variable("KIND_STEPS");
    let began = Instant::now();
    let Ok(world) = catch_unwind(|| World::new(&image, &archive)) else {
        world::keep("set-up");
        panic!("nothing could be shown");
    };
    let mut table = Vec::new();
    let mut failed = 0;
    for (name, step) in STEPS {
        if !only.is_empty() && !only.split(',').any(|wanted| wanted == name) {
            continue;
        }
        let step_began = Instant::now();
        let passed = catch_unwind(AssertUnwindSafe(|| step(&world))).is_ok();
        let seconds = step_began.elapsed().as_secs_f64();
        let verdict = if passed { "ok" } else { "FAILED" };
        let line = format!(
            "{name:<17} {verdict:<6} {seconds:6.1} s  {}",
            world.take_notes()
        );
        println!("{line}");
        table.push(line);
        if !passed {
            failed += 1;
            world.keep(name);
        }
    }
    println!(
        "\n{}\n{:.0} s in all",
        table.join("\n"),
        began.elapsed().as_secs_f64()
    );
    assert_eq!(failed, 0, "steps failed");
}
