//! Tokens that expire, and passwords and certificates that are replaced, while an operator works.

use std::time::Instant;

use serde_json::json;
use testbed::{Etcd, Operator, eventually};

use crate::scene::{EAST, SHORT_TTL, Scene, others, outlive_a_lease, tell};
use crate::support::{SOON, Stage, Watcher};

/// How often the operator has connected with new certificates while the old ones worked: its connection and the keeper's.
fn renewals(operator: &Operator) -> usize {
    operator
        .log()
        .matches("connected to etcd with the new ones")
        .count()
}

#[test]
fn expired_tokens_and_new_passwords_and_certificates_cost_no_event() {
    let guarded = Etcd::builder("rotation")
        .unsafe_no_fsync()
        .tls()
        .auth(["/services/", "/registrar/east/"])
        .args(["--auth-token-ttl=1", "--log-level=debug"]);
    let stage = Stage::with_etcd("rotation", guarded);
    let operator = stage.operator(EAST).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let watcher = scene.watch();
    let etcd = &scene.stage.etcd;
    let mut ready = true;
    let mut passed = |row: &str, begun: Instant| {
        ready = !ready;
        scene.set_ready(0, ready);
        let recovered = scene.recovered(&watcher, 0, ready, begun);
        // The keeper's connection too: it has to find a new lease before it can keep it alive.
        let later = format!("later-{}", row.replace(' ', "-"));
        let spec =
            json!({"selector": {"matchLabels": {"app": "web"}}, "leaseTTLSeconds": SHORT_TTL});
        scene.stage.register(&later, &spec);
        let scope = scene.stage.scope(&later);
        scene.stage.wait_count(&scope, 2 + usize::from(ready));
        let new = Watcher::start(etcd, &scope);
        outlive_a_lease(&scene.stage, SHORT_TTL);
        new.assert_silent(row);
        let seen = watcher.seen();
        assert_eq!(seen.len(), 1, "{row}: {seen:#?}");
        watcher.forget();
        tell(row, others(&seen, &scene.keys[0]).len(), recovered);
    };

    let expired = || {
        let log = etcd.process(0).unwrap().log();
        log.lines()
            .filter(|line| line.contains("deleted a simple token"))
            .filter(|line| line.contains(testbed::USER))
            .count()
    };
    let before = expired();
    eventually(
        SOON,
        "a token of the operator to expire",
        || match expired() {
            now if now > before => Ok(()),
            now => Err(now),
        },
    )
    .unwrap();
    passed("etcd auth token expired", Instant::now());

    let begun = Instant::now();
    etcd.rotate_password("second").unwrap();
    passed("etcd password replaced", begun);

    let before = renewals(&operator);
    let begun = Instant::now();
    etcd.rotate_client_cert().unwrap();
    eventually(
        SOON,
        "both connections to have the certificate",
        || match renewals(&operator) - before {
            2 => Ok(()),
            now => Err(now),
        },
    )
    .unwrap();
    passed("etcd client certificate replaced", begun);
    let lost = operator.metric("etcd_registrar_leases_lost_total", &[]);
    assert_eq!(lost.unwrap(), 0.0);
}
