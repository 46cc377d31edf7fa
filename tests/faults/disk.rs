//! A disk under etcd that is slow.

use std::time::{Duration, Instant};

use testbed::Etcd;

use crate::scene::{EAST, SHORT_TTL, Scene, others, outlive_a_lease, tell};
use crate::support::Stage;

/// Thirty times what etcd asks of a disk for a write, and more than a third of it is what a keepalive may wait.
const DELAY: Duration = Duration::from_millis(300);

#[test]
fn keepalives_do_not_wait_behind_writes_on_a_slow_disk() {
    // With fsync, which is what is slow.
    let slow = Etcd::builder("slow-disk").slow_disk(DELAY);
    let stage = Stage::with_etcd("slow-disk", slow);
    let operator = stage.operator(EAST).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let watcher = scene.watch();

    // That the disk is slow: one write takes as long as it takes to sync it.
    let begun = Instant::now();
    scene.stage.registry.put("/others/key", "value", 0);
    assert!(begun.elapsed() >= DELAY, "{:?}", begun.elapsed());

    // Others write all the time.
    let stop = std::sync::atomic::AtomicBool::new(false);
    let writes = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|number| {
                let (etcd, stop) = (&scene.stage.etcd, &stop);
                scope.spawn(move || {
                    let registry = crate::support::Registry::connect(etcd);
                    let mut writes = 0;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        registry.put(&format!("/others/{number}"), &writes.to_string(), 0);
                        writes += 1;
                    }
                    writes
                })
            })
            .collect();
        for _ in 0..3 {
            outlive_a_lease(&scene.stage, SHORT_TTL);
        }
        let changed = Instant::now();
        scene.set_ready(0, false);
        let took = scene.recovered(&watcher, 0, false, changed);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let writes: i32 = writers
            .into_iter()
            .map(|writer| writer.join().unwrap())
            .sum();
        let seen = watcher.seen();
        assert_eq!(seen.len(), 1, "{seen:#?}");
        tell(
            "slow disk under etcd",
            others(&seen, &scene.keys[0]).len(),
            took,
        );
        writes
    });
    assert!(writes > 10, "{writes}");
    let lost = operator.metric("etcd_registrar_leases_lost_total", &[]);
    assert_eq!(lost.unwrap(), 0.0);
}
