//! The walk: each step runs commands, shows what came out, and checks that it is what was said.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::{Error, Operator, Result, eventually};

use crate::feed::{Feed, KeyEvent, KeyEvents, PodState, Timed, fewest_ready};
use crate::screen::Screen;
use crate::shell::Shell;

/// Where every cluster registers the service of `examples/web.yaml`.
const PREFIX: &str = "/services/default/web/";
/// How long a step may take until it has shown what it is to show.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the steps work with.
pub(crate) struct Walk<'a> {
    pub(crate) screen: Screen,
    pub(crate) shell: &'a Shell,
    pub(crate) east: &'a Operator,
}

/// The watcher of the keys, which runs from the second step on.
struct Watcher {
    keys: Feed<KeyEvent>,
    /// How many of its events have been shown. What comes between two steps belongs to the later one, so that none is
    /// overlooked.
    shown: Cell<usize>,
}

/// What stands below the prefix, with revisions and leases.
struct Keys {
    revision: i64,
    records: Value,
}

impl Walk<'_> {
    /// All steps.
    pub(crate) fn all(&self) -> Result<()> {
        self.register()?;
        let watcher = self.both_clusters()?;
        self.scale(&watcher)?;
        let pods = self.not_ready(&watcher)?;
        self.rolling_update(&watcher, &pods)?;
        self.status()?;
        self.restart(&watcher)
    }

    fn register(&self) -> Result<()> {
        let Self { screen, shell, .. } = self;
        screen.heading("1. Register a Deployment");
        screen.say("A ServiceRegistration says which pods to register, and on which ports:");
        shell.run("cat examples/web.yaml")?;
        screen.say("It is applied to the cluster east, with a Deployment of three replicas:");
        shell
            .run("kubectl --context east apply -f examples/deployment.yaml -f examples/web.yaml")?;
        screen.say("Its status says what was read back from etcd, so it can be waited for:");
        shell.run(
            "kubectl --context east wait sreg/web --for=jsonpath='{.status.registered}'=3 --timeout=30s",
        )?;
        screen.say("Each ready pod is a key now:");
        let keys = shell.run(&format!("etcdctl get --prefix {PREFIX} --keys-only"))?;
        let keys: Vec<&str> = keys.lines().filter(|line| !line.is_empty()).collect();
        let addresses = shell.quietly(
            "kubectl --context east get pods -l app=web -o jsonpath='{range .items[*]}{.status.podIP}{\"\\n\"}{end}'",
        )?;
        let wanted: BTreeSet<String> = addresses
            .lines()
            .map(|address| format!("{PREFIX}east/{address}:80"))
            .collect();
        self.check(
            wanted.len() == 3 && keys.iter().map(|key| (*key).to_owned()).eq(wanted),
            "three keys, with the addresses of the three pods",
        )?;
        let Some(first) = keys.first() else {
            return Err(Error::new("demo", "there is no key"));
        };
        screen.say("The value tells the rest, to any etcd client:");
        let value = shell.run(&format!("etcdctl get --print-value-only {first}"))?;
        let value: Value = serde_json::from_str(&value)
            .map_err(|error| Error::new("demo", format!("the value is no JSON: {error}")))?;
        let address = value.get("address").and_then(Value::as_str);
        self.check(
            address.is_some_and(|address| first.ends_with(&format!("/{address}"))),
            "the address in the value is that of the key",
        )?;
        screen.say(
            "The keys are attached to a lease, with the TTL of the registration (60 s unless it says otherwise). The operator keeps \
             it alive; should the whole cluster vanish, the keys expire:",
        );
        let lease = shell.run(
            "etcdctl lease timetolive --keys \
             $(kubectl --context east get sreg web -o jsonpath='{.status.endpoints[0].lease}')",
        )?;
        self.check(
            lease.contains("granted with TTL(60s)") && keys.iter().all(|key| lease.contains(key)),
            "one lease of 60 s holds all three keys",
        )
    }

    fn both_clusters(&self) -> Result<Watcher> {
        let Self { screen, shell, .. } = self;
        screen.heading("2. Both clusters under one prefix");
        screen.say(
            "A watcher begins after the revision of the last read, so that it misses nothing. From now on its events are shown below \
             the commands that led to them: one a line, without the value, with the time since the command was started.",
        );
        let revision = self.keys()?.revision;
        let command = format!("etcdctl watch --prefix {PREFIX} --rev={}", revision + 1);
        screen.command(&command);
        let mut parser = KeyEvents::default();
        let watcher = Watcher {
            keys: Feed::start(
                "etcdctl watch",
                &mut shell.background(&command),
                move |line| parser.line(line),
            )?,
            shown: Cell::new(0),
        };
        screen.say("The same files, applied to the cluster west:");
        let start = Instant::now();
        shell
            .run("kubectl --context west apply -f examples/deployment.yaml -f examples/web.yaml")?;
        let events = self.events(&watcher, start, 3, "three keys of west")?;
        self.check(
            puts(&events, "west") == 3 && events.len() == 3,
            "the watcher saw three keys of west come, and nothing else",
        )?;
        screen.say("Who reads this prefix has the endpoints of both clusters:");
        let keys = shell.run(&format!("etcdctl get --prefix {PREFIX} --keys-only"))?;
        let count = |cluster: &str| {
            keys.lines()
                .filter(|key| key.starts_with(&format!("{PREFIX}{cluster}/")))
                .count()
        };
        self.check(
            (count("east"), count("west")) == (3, 3),
            "three keys of each cluster",
        )?;
        Ok(watcher)
    }

    fn scale(&self, watcher: &Watcher) -> Result<()> {
        self.screen.heading("3. Scale up");
        self.screen
            .say("Two more replicas are two more keys, and no event for the others:");
        let start = Instant::now();
        self.shell
            .run("kubectl --context east scale deployment web --replicas=5")?;
        let events = self.events(watcher, start, 2, "two more keys")?;
        self.check(
            puts(&events, "east") == 2 && events.len() == 2,
            "the watcher saw two keys of east come, and nothing else",
        )
    }

    fn not_ready(&self, watcher: &Watcher) -> Result<Feed<PodState>> {
        let Self { screen, shell, .. } = self;
        screen.heading("4. A pod turns not ready");
        screen.say("A second watcher shows when the API server tells of a change of a pod:");
        let command = "kubectl --context east get --raw \
                       '/api/v1/namespaces/default/pods?watch=true&labelSelector=app%3Dweb'";
        screen.command(command);
        let pods = Feed::start(
            "kubectl get --raw",
            &mut shell.background(command),
            PodState::parse,
        )?;
        // The watch begins with what is there.
        pods.wait(0, PATIENCE, "the five pods", |events| {
            (events.iter().filter(|event| event.what.ready).count() >= 5).then_some(())
        })?;
        screen.say(
            "There are no containers here; kwok plays the kubelets. An annotation tells it that the readiness probe of a pod fails:",
        );
        let pod = shell.quietly(
            "kubectl --context east get pods -l app=web -o jsonpath='{.items[0].metadata.name}'",
        )?;
        let annotate =
            format!("kubectl --context east annotate pod {pod} testbed.etcd-registrar.io/ready");
        let took = self.readiness(watcher, &pods, &pod, &format!("{annotate}=false"), false)?;
        screen.seen(&format!(
            "it was gone {took} after the API server told that the pod is not ready"
        ));
        screen.say("And ready again:");
        let took = self.readiness(watcher, &pods, &pod, &format!("{annotate}-"), true)?;
        screen.seen(&format!(
            "it was back {took} after the API server told that the pod is ready"
        ));
        Ok(pods)
    }

    /// Runs a command that changes the readiness of a pod, and gives the time from the watcher of the pods to that of the
    /// keys.
    fn readiness(
        &self,
        watcher: &Watcher,
        pods: &Feed<PodState>,
        pod: &str,
        command: &str,
        ready: bool,
    ) -> Result<String> {
        let mark = pods.mark();
        let start = Instant::now();
        self.shell.run(command)?;
        let told = pods.wait(mark, PATIENCE, "the pod's readiness", |events| {
            events
                .iter()
                .find(|event| event.what.name == pod && event.what.ready == ready)
                .cloned()
        })?;
        let events = self.events(watcher, start, 1, "the event of its key")?;
        let key = format!("{PREFIX}east/{}:80", told.what.address);
        let (wanted, what) = if ready {
            (KeyEvent::Put(key), "come")
        } else {
            (KeyEvent::Delete(key), "go")
        };
        let [event] = events.as_slice() else {
            return Err(Error::new("demo", "the watcher saw more than one event"));
        };
        self.check(
            event.what == wanted,
            &format!("the watcher saw the key of this pod {what}, and nothing else"),
        )?;
        Ok(match event.at.checked_duration_since(told.at) {
            Some(took) => format!("{:.1} ms", took.as_secs_f64() * 1000.0),
            // Both came at the same moment, and their readers here were woken in the other order.
            None => "less than a millisecond".to_owned(),
        })
    }

    fn rolling_update(&self, watcher: &Watcher, pods: &Feed<PodState>) -> Result<()> {
        let Self { screen, shell, .. } = self;
        screen.heading("5. A rolling update");
        screen.say(
            "Every pod is replaced, a new one becoming ready before an old one goes. So is every key. (Some addresses come back: \
             kwok gives an address that became free to the next pod.)",
        );
        let before = self.names("east")?;
        let mark = pods.mark();
        let start = Instant::now();
        shell.run("kubectl --context east rollout restart deployment web")?;
        shell.run("kubectl --context east rollout status deployment web --timeout=60s")?;
        // The key of the last old pod may still be on its way out.
        let events = self.events(watcher, start, 2 * before.len(), "each key replaced")?;
        self.check(
            puts(&events, "east") == before.len() && events.len() == 2 * before.len(),
            "the watcher saw five keys go and five come, and nothing else",
        )?;
        let registered = shell.quietly(&format!(
            "etcdctl get --prefix {PREFIX}east/ --print-value-only"
        ))?;
        let registered: BTreeSet<String> = registered
            .lines()
            .filter_map(|value| serde_json::from_str::<Value>(value).ok())
            .filter_map(|value| Some(value.get("pod")?.as_str()?.to_owned()))
            .collect();
        let running = shell.quietly(
            "kubectl --context east get pods -l app=web -o jsonpath='{range .items[*]}{.metadata.name}{\"\\n\"}{end}'",
        )?;
        self.check(
            registered.len() == 5 && registered.iter().eq(&lines(&running)),
            "the five keys are those of the five new pods",
        )?;
        let mut standing = before;
        let mut fewest = standing.len();
        for event in &events {
            match &event.what {
                KeyEvent::Put(key) => standing.insert(key.clone()),
                KeyEvent::Delete(key) => standing.remove(key),
            };
            fewest = fewest.min(standing.len());
        }
        let ready = fewest_ready(&pods.since(0), mark);
        self.check(
            fewest >= ready,
            &format!(
                "there were never fewer than {ready} ready pods, and never fewer than {fewest} keys"
            ),
        )
    }

    fn status(&self) -> Result<()> {
        let Self { screen, shell, .. } = self;
        screen.heading("6. What Kubernetes says about it");
        screen
            .say("REGISTERED are the endpoints of this cluster, DISCOVERED those of all clusters:");
        for (cluster, registered) in [("east", "5"), ("west", "3")] {
            let command = format!("kubectl --context {cluster} get sreg");
            let expected = ["web", "web", "Json", registered, "8", "True"];
            // It is written once a second at most, so the newest may be yet to come.
            eventually(PATIENCE, "the status", || {
                let table = shell.quietly(&command).map_err(|error| error.to_string())?;
                as_expected(&table, &expected).then_some(()).ok_or(table)
            })?;
            let table = shell.run(&command)?;
            self.check(
                as_expected(&table, &expected),
                &format!("{registered} registered, 8 discovered, ready"),
            )?;
        }
        screen.say(
            "The details, here without the list of endpoints. The conditions say what is wrong, when something is:",
        );
        let text = shell.run(
            "kubectl --context west describe sreg web | sed -n '/^Status:/,/Discovered:/p; /^Events:/,$p'",
        )?;
        self.check(
            [
                "served below /services/default/web/",
                "3 endpoints are registered",
                "NoConflict",
            ]
            .iter()
            .all(|part| text.contains(part)),
            "the conditions tell how things stand",
        )?;
        let events = text.split_once("Events:").map_or("", |(_, events)| events);
        self.check(
            events.contains("Registered"),
            "an Event tells of the first registration",
        )
    }

    fn restart(&self, watcher: &Watcher) -> Result<()> {
        let Self {
            screen,
            shell,
            east,
        } = self;
        screen.heading("7. The operator is killed, and comes back");
        screen.say("No reader must see that. The leader key names the process that may write:");
        let before = self.keys()?;
        let leader = shell.run("etcdctl get --print-value-only /registrar/east/leader")?;
        let pid = east.process().pid()?;
        shell.run(&format!("kill -KILL {pid}"))?;
        east.wait_exit(PATIENCE)?;
        screen.say(
            "It is started again with the command from above, adopts the leases that it finds, and leads once the leader key of \
             the killed process has expired:",
        );
        let start = Instant::now();
        east.start()?;
        eventually(PATIENCE, "the new process to lead", || {
            match east.metric("etcd_registrar_leader", &[]) {
                Ok(1.0) => Ok(()),
                Ok(other) => Err(format!("etcd_registrar_leader is {other}")),
                Err(error) => Err(error.to_string()),
            }
        })?;
        screen.progress(&format!(
            "it leads {:.1} s after its start",
            start.elapsed().as_secs_f64()
        ));
        let new = shell.run("etcdctl get --print-value-only /registrar/east/leader")?;
        self.check(
            !new.trim().is_empty() && new != leader,
            "another process leads",
        )?;
        self.check(
            before.records == self.keys()?.records,
            "every key has the value, the revision and the lease that it had",
        )?;
        screen.say("The next change shows that the watcher was not asleep, and that the new process works:");
        let start = Instant::now();
        shell.run("kubectl --context east scale deployment web --replicas=4")?;
        let events = self.events(watcher, start, 1, "one key less")?;
        self.check(
            matches!(events.as_slice(), [Timed { what: KeyEvent::Delete(key), .. }] if key.starts_with(&format!("{PREFIX}east/"))),
            "from before the kill until now, the watcher saw this one event and nothing else",
        )
    }

    /// Shows that something was seen, or fails.
    fn check(&self, holds: bool, what: &str) -> Result<()> {
        if holds {
            self.screen.seen(what);
            Ok(())
        } else {
            Err(Error::new("demo", format!("this was not seen: {what}")))
        }
    }

    /// Waits for `count` more events of the keys, and shows all that came.
    fn events(
        &self,
        watcher: &Watcher,
        start: Instant,
        count: usize,
        what: &str,
    ) -> Result<Vec<Timed<KeyEvent>>> {
        let mark = watcher.shown.get();
        let waited = watcher.keys.wait(mark, PATIENCE, what, |events| {
            (events.len() >= count).then_some(())
        });
        let events = watcher.keys.since(mark);
        watcher.shown.set(mark + events.len());
        for event in &events {
            let milliseconds = event.at.saturating_duration_since(start).as_millis();
            let (type_, key) = match &event.what {
                KeyEvent::Put(key) => ("PUT", key),
                KeyEvent::Delete(key) => ("DELETE", key),
            };
            self.screen
                .watcher(&format!("{milliseconds:>5} ms  {type_:<6}  {key}"));
        }
        waited.map(|()| events)
    }

    /// The names of a cluster's keys.
    fn names(&self, cluster: &str) -> Result<BTreeSet<String>> {
        let text = self.shell.quietly(&format!(
            "etcdctl get --prefix {PREFIX}{cluster}/ --keys-only"
        ))?;
        Ok(lines(&text))
    }

    fn keys(&self) -> Result<Keys> {
        let text = self
            .shell
            .quietly(&format!("etcdctl get --prefix {PREFIX} -w json"))?;
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        let revision = answer.pointer("/header/revision").and_then(Value::as_i64);
        match (revision, answer.get("kvs")) {
            (Some(revision), Some(records)) => Ok(Keys {
                revision,
                records: records.clone(),
            }),
            _ => Err(Error::new("etcdctl", format!("not understood: {text}"))),
        }
    }
}

/// The lines that are not empty, sorted.
fn lines(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Whether the last row of a table begins with these columns.
fn as_expected(table: &str, columns: &[&str]) -> bool {
    let row = table.lines().last().unwrap_or_default();
    row.split_whitespace()
        .take(columns.len())
        .eq(columns.iter().copied())
}

/// How many of the events are a key of this cluster that came.
fn puts(events: &[Timed<KeyEvent>], cluster: &str) -> usize {
    let prefix = format!("{PREFIX}{cluster}/");
    events
        .iter()
        .filter(|event| matches!(&event.what, KeyEvent::Put(key) if key.starts_with(&prefix)))
        .count()
}
