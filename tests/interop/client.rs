//! A client that runs: takes its command, gives the lists that it printed. Must never decide what is right.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use testbed::{Process, eventually};

/// What may take so long at most, on a busy machine: less than the minute after which go-micro looks again by itself, so
/// that a change that it missed is a failure.
const AT_LAST: Duration = Duration::from_secs(50);

/// The pods of a service by their addresses.
pub(crate) type Pods = BTreeMap<String, String>;

/// What a client does when the last endpoint is gone.
#[derive(Clone, Copy)]
pub(crate) enum WhenNone {
    /// It has an empty list.
    Empties,
    /// It keeps its last list, and logs this each time that it finds none.
    Keeps(&'static str),
}

/// How a client is started, and what is known of it.
pub(crate) struct Kind {
    /// Its name in the table.
    pub(crate) name: &'static str,
    /// The folder with its module below `tests/interop/`.
    pub(crate) folder: &'static str,
    /// The modules that it is made of: the path, and how the table calls it.
    pub(crate) modules: &'static [(&'static str, &'static str)],
    /// The prefix of the keys that it reads.
    pub(crate) prefix: &'static str,
    /// Whether its records tell it the pods' names.
    pub(crate) tells_pods: bool,
    pub(crate) when_none: WhenNone,
}

/// A list as a client had it.
#[derive(Clone, Debug)]
pub(crate) struct Sighting {
    /// When it was printed, in microseconds since 1970.
    pub(crate) at: i64,
    /// Address and pod; the pod is empty where the client does not know it.
    pub(crate) endpoints: Vec<(String, String)>,
}

/// A client that runs. It ends when this is dropped.
pub(crate) struct Client {
    pub(crate) kind: &'static Kind,
    process: Process,
}

impl Client {
    /// Starts the program of a client. Its output goes to a file in `logs`.
    pub(crate) fn start(
        kind: &'static Kind,
        program: PathBuf,
        args: &[String],
        logs: &Path,
    ) -> Self {
        let name = kind.name.replace('/', "-");
        let process = Process::new(kind.name, program, logs.join(format!("{name}.log")))
            .args(args.iter().map(OsString::from));
        process.start().unwrap();
        Self { kind, process }
    }

    /// Everything that it printed.
    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    /// Every list that it had, one after the other.
    pub(crate) fn sightings(&self) -> Vec<Sighting> {
        let log = self.process.log();
        // The last line may be half written.
        let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let lines = whole.lines().filter_map(|line| line.strip_prefix("seen "));
        lines.map(Sighting::parse).collect()
    }

    /// The list that it has now.
    pub(crate) fn last(&self) -> Result<Sighting, String> {
        assert!(self.process.is_running(), "{}", self.process.error("ended"));
        let mut all = self.sightings();
        all.pop().ok_or_else(|| "no list yet".to_owned())
    }

    /// What it has to see of these pods.
    pub(crate) fn list_of(&self, pods: &Pods) -> Vec<(String, String)> {
        let tells = self.kind.tells_pods;
        pods.iter()
            .map(|(address, pod)| {
                let pod = if tells { pod.clone() } else { String::new() };
                (address.clone(), pod)
            })
            .collect()
    }

    /// Waits until its list holds these pods and no others.
    pub(crate) fn wait(&self, when: &str, pods: &Pods) -> Sighting {
        let wanted = self.list_of(pods);
        let what = format!("{}, {when}: {wanted:?}", self.kind.name);
        let found = eventually(AT_LAST, &what, || {
            let last = self.last()?;
            if last.endpoints == wanted {
                Ok(last)
            } else {
                Err(format!("{:?}", last.endpoints))
            }
        });
        found.unwrap_or_else(|error| panic!("{error}\n{}", self.process.error("its log")))
    }

    /// Waits until it logs something for the `count`th time.
    pub(crate) fn wait_log(&self, text: &str, count: usize) {
        let what = format!("{} to log {text:?}", self.kind.name);
        eventually(AT_LAST, &what, || {
            let logged = self.log().matches(text).count();
            if logged >= count {
                Ok(())
            } else {
                Err(format!("it did {logged} times"))
            }
        })
        .unwrap();
    }
}

impl Sighting {
    fn parse(line: &str) -> Self {
        let value: Value = serde_json::from_str(line).unwrap();
        let endpoints = value["endpoints"].as_array().unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut endpoints: Vec<_> = endpoints
            .iter()
            .map(|one| (text(&one["address"]), text(&one["pod"])))
            .collect();
        endpoints.sort();
        Self {
            at: value["at"].as_i64().unwrap(),
            endpoints,
        }
    }
}

/// Now, in microseconds since 1970, as the clients have it.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(since.as_micros()).unwrap()
}
