//! Two replicas and a trickle of changes: how long nobody writes after the leader's end, and whether a reader sees
//! anything else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use etcd_registrar::kube::client::{ClientOptions, KubeClient};
use serde_json::json;
use testbed::{Operator, Signal, eventually};

use crate::observe::{self, Change, Observer, PATIENCE};
use crate::report::{Row, shown};
use crate::statistics::{Times, milliseconds};
use crate::world::{CLUSTER, Pod, World, prefix, set_ready, wait_metric};
use crate::{Measured, Result, Sizes, runtime};

const NAMESPACE: &str = "trickle";
/// The pods that change, and the pause between two changes: each comes back after 4 s or more, which is no flapping.
const PODS: usize = 100;
const PAUSE: Duration = Duration::from_millis(20);
/// The default of `--election-ttl`, in milliseconds.
const ELECTION_TTL: f64 = 5000.0;

pub(crate) fn measure(world: &mut World, sizes: &Sizes) -> Measured {
    let first = world.operator()?;
    world.registered_bulk(sizes.endpoints, &first)?;
    world.namespace(NAMESPACE)?;
    let pods = world.pods(NAMESPACE, NAMESPACE, PODS, |_| true)?;
    world.register(NAMESPACE, NAMESPACE)?;
    world.wait_registered(&first, sizes.endpoints + PODS)?;
    let second = world.replica()?;
    let mut watched = Watched {
        changes: observe::etcd(&world.endpoint(), &["/services/", &leader_key()])?,
        unchanged: 0,
    };
    let operators = [first, second];
    let trickle = Trickle::start(world, pods)?;
    let (mut terminated, mut killed) = (Times::default(), Times::default());
    for _ in 0..sizes.terminated {
        terminated.push(watched.failover(&operators, Signal::SIGTERM)?);
    }
    for _ in 0..sizes.killed {
        killed.push(watched.failover(&operators, Signal::SIGKILL)?);
    }
    trickle.stop()?;
    world.unregister(NAMESPACE, NAMESPACE)?;
    let (leader, _) = leader_of(&operators)?;
    world.wait_registered(leader, sizes.endpoints)?;
    watched.take_pending();

    let limit = ELECTION_TTL + 1000.0;
    let rows = vec![
        Row::new(
            format!(
                "failover after SIGTERM: from the signal to the next leader's first write, worst of {}",
                terminated.len()
            ),
            shown(terminated.worst()),
        )
        .target("below 0.5 s", terminated.worst() < 500.0),
        Row::new(
            format!(
                "failover after SIGKILL: from the signal to the next leader's first write, worst of {}",
                killed.len()
            ),
            shown(killed.worst()),
        )
        .target("below the election TTL + 1 s = 6 s", killed.worst() < limit),
        Row::new(
            format!(
                "events on the {} unchanged endpoints in all failovers",
                sizes.endpoints
            ),
            watched.unchanged.to_string(),
        )
        .target("0", watched.unchanged == 0),
    ];
    let measured = json!({"sigterm_ms": terminated.values(), "sigkill_ms": killed.values(), "events_on_unchanged": watched.unchanged});
    Ok((rows, measured))
}

fn leader_key() -> String {
    format!("/registrar/{CLUSTER}/leader")
}

/// The leader, and the other one.
fn leader_of(operators: &[Operator; 2]) -> Result<(&Operator, &Operator)> {
    let [a, b] = operators;
    let leads = |operator: &Operator| -> std::result::Result<bool, String> {
        let leads = operator.metric("etcd_registrar_leader", &[]);
        Ok(leads.map_err(|error| error.to_string())? == 1.0)
    };
    let found = eventually(PATIENCE, "one leader", || match (leads(a)?, leads(b)?) {
        (true, false) => Ok((a, b)),
        (false, true) => Ok((b, a)),
        other => Err(format!("they lead: {other:?}")),
    })?;
    Ok(found)
}

struct Watched {
    changes: Observer<Change>,
    /// Events on endpoints that did not change.
    unchanged: usize,
}

impl Watched {
    fn count(&mut self, change: &Change) {
        if change.key != leader_key() && !change.key.starts_with(&prefix(NAMESPACE, NAMESPACE)) {
            self.unchanged += 1;
        }
    }

    fn take_pending(&mut self) {
        for change in self.changes.pending() {
            self.count(&change);
        }
    }

    /// Ends the leader and starts it again; gives the milliseconds until its successor's first write.
    fn failover(&mut self, operators: &[Operator; 2], signal: Signal) -> Result<f64> {
        let (leader, standby) = leader_of(operators)?;
        wait_metric(standby, "etcd_registrar_live", 1)?;
        self.take_pending();
        let began = Instant::now();
        leader.process().signal(signal)?;
        // Two watches have no order: a write may come before the election that allowed it.
        let mut writes: Vec<Change> = Vec::new();
        let mut won_at = None;
        let resumed = loop {
            let change = self.changes.next("a write of the next leader")?;
            self.count(&change);
            if change.key == leader_key() {
                if change.put {
                    won_at = Some(change.revision);
                }
            } else {
                writes.push(change);
            }
            let after = |won_at| writes.iter().find(|write| write.revision > won_at);
            if let Some(write) = won_at.and_then(after) {
                break write.at;
            }
        };
        let took = milliseconds(began, resumed);
        eprintln!("bench:   {signal}: {}", shown(took));
        leader.process().wait_exit(PATIENCE)?;
        leader.start()?;
        Ok(took)
    }
}

/// Changes of readiness at a steady pace, on a thread.
struct Trickle {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Trickle {
    fn start(world: &World, mut pods: Vec<Pod>) -> Result<Self> {
        let options = ClientOptions {
            kubeconfig: Some(world.kubeconfig().to_owned()),
            context: None,
        };
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            runtime()?.block_on(async {
                let kube = KubeClient::new(options).await?.current();
                loop {
                    for pod in &mut pods {
                        if stopped.load(Ordering::Relaxed) {
                            return Ok(());
                        }
                        pod.ready = !pod.ready;
                        set_ready(&kube, pod, pod.ready).await?;
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            })
        });
        Ok(Self { stop, thread })
    }

    fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| "the trickle of changes panicked")?
    }
}
