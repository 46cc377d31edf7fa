//! The operator itself, run as a program against a cluster and an etcd.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Mutex;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::etcd::Etcd;
use crate::http::Response;
use crate::process::{Process, lock};
use crate::workdir::{WorkDir, write_private};
use crate::{http, ports};

/// How long the operator has to become ready, unless the test says otherwise.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// The operator's binary, for programs that are not its own tests: `ETCD_REGISTRAR_BIN`, or the one that Cargo built next
/// to the program that runs.
pub fn operator_binary() -> Result<PathBuf> {
    const NAME: &str = "etcd-registrar";
    if let Some(path) = std::env::var_os("ETCD_REGISTRAR_BIN").filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let own = std::env::current_exe().map_err(|error| Error::new(NAME, error))?;
    // Benchmarks and tests are one folder deeper, in `deps`.
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(NAME))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            Error::new(
                NAME,
                "its binary is not built (`cargo build`), and ETCD_REGISTRAR_BIN is not set",
            )
        })
}

/// How an [`Operator`] is started.
#[derive(Debug, Clone)]
pub struct OperatorBuilder {
    binary: PathBuf,
    cluster_name: Option<String>,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    policy: Option<String>,
    log_level: String,
}

impl OperatorBuilder {
    /// The kubeconfig that it uses, such as that of [`crate::Cluster::kubeconfig_for_service_account`].
    #[must_use]
    pub fn kubeconfig(self, path: &Path) -> Self {
        self.args([OsString::from("--kubeconfig"), path.as_os_str().to_owned()])
    }

    /// The etcd that it writes to, with its certificates, user and password file.
    #[must_use]
    pub fn etcd(self, etcd: &Etcd) -> Self {
        self.args(etcd.operator_args())
    }

    /// The same etcd at other endpoints, such as those of proxies in front of it.
    #[must_use]
    pub fn etcd_at(self, etcd: &Etcd, endpoints: &str) -> Self {
        self.args(etcd.operator_args_for(endpoints))
    }

    /// The content of the policy file.
    #[must_use]
    pub fn policy(mut self, text: &str) -> Self {
        self.policy = Some(text.to_owned());
        self
    }

    /// The TTL of the election, such as `5s`.
    #[must_use]
    pub fn election_ttl(self, ttl: &str) -> Self {
        self.args(["--election-ttl", ttl])
    }

    /// The log level; `info` unless said otherwise.
    #[must_use]
    pub fn log_level(mut self, level: &str) -> Self {
        self.log_level = level.to_owned();
        self
    }

    /// Does not give `--cluster-name`, for the test of what happens then.
    #[must_use]
    pub fn without_cluster_name(mut self) -> Self {
        self.cluster_name = None;
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args<S: Into<OsString>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// An environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Starts it and waits until `/readyz` answers 200.
    pub fn start(self) -> Result<Operator> {
        // Another process may take the port before the operator does; every other failure is the test's business.
        let mut left = 3;
        loop {
            left -= 1;
            let operator = self.clone().spawn()?;
            match operator.wait_ready() {
                Err(error) if left > 0 && error.is_port_taken() => {}
                result => return result.map(|()| operator),
            }
        }
    }

    /// Starts it and waits for nothing: for one that is not expected to become ready.
    pub fn spawn(self) -> Result<Operator> {
        let name = self
            .cluster_name
            .clone()
            .unwrap_or_else(|| "unnamed".to_owned());
        let dir = WorkDir::new(&format!("operator-{name}"))?;
        let port = ports::free_port()?;
        let mut args: Vec<OsString> = vec!["run".into()];
        if let Some(name) = &self.cluster_name {
            args.extend(["--cluster-name".into(), name.into()]);
        }
        args.extend(["--listen".into(), format!("127.0.0.1:{port}").into()]);
        args.extend([
            "--log-format".into(),
            "json".into(),
            "--log-level".into(),
            self.log_level.into(),
        ]);
        let policy = match &self.policy {
            Some(text) => {
                let path = dir.write("policy.yaml", text)?;
                args.extend(["--policy-file".into(), path.clone().into()]);
                Some(path)
            }
            None => None,
        };
        args.extend(self.args);
        let mut process = Process::new(
            format!("etcd-registrar {name}"),
            self.binary,
            dir.join("operator.log"),
        )
        .args(args);
        for (name, value) in self.env {
            process = process.env(name, value);
        }
        let operator = Operator {
            process,
            port,
            policy: Mutex::new(policy),
            _dir: dir,
        };
        operator.process.start()?;
        Ok(operator)
    }
}

/// A running operator. Dropping it kills it.
pub struct Operator {
    process: Process,
    port: u16,
    policy: Mutex<Option<PathBuf>>,
    _dir: WorkDir,
}

impl Operator {
    /// An operator from its binary: `env!("CARGO_BIN_EXE_etcd-registrar")` in the operator's own tests.
    pub fn builder(binary: impl Into<PathBuf>, cluster_name: impl Into<String>) -> OperatorBuilder {
        OperatorBuilder {
            binary: binary.into(),
            cluster_name: Some(cluster_name.into()),
            args: Vec::new(),
            env: Vec::new(),
            policy: None,
            log_level: "info".to_owned(),
        }
    }

    /// Waits until `/readyz` answers 200.
    pub fn wait_ready(&self) -> Result<()> {
        self.process
            .wait_ready_for(READY_TIMEOUT, || http::healthy(self.port, None, "/readyz"))
    }

    /// Kills it with SIGKILL.
    pub fn kill(&self) -> Result<()> {
        self.process.kill()
    }

    /// Ends it with SIGTERM and waits until it is gone.
    pub fn stop(&self) -> Result<()> {
        self.process.stop()
    }

    /// Freezes it with SIGSTOP.
    pub fn freeze(&self) -> Result<()> {
        self.process.freeze()
    }

    /// Lets it go on.
    pub fn thaw(&self) -> Result<()> {
        self.process.thaw()
    }

    /// Starts it again after [`Operator::kill`] or [`Operator::stop`], on the same port, and waits until it is ready.
    pub fn start(&self) -> Result<()> {
        self.process.start()?;
        self.wait_ready()
    }

    /// Ends it with SIGTERM, starts it again and waits until it is ready.
    pub fn restart(&self) -> Result<()> {
        self.stop()?;
        self.start()
    }

    /// Waits for it to end by itself, and gives how it ended.
    pub fn wait_exit(&self, timeout: Duration) -> Result<ExitStatus> {
        self.process.wait_exit(timeout)
    }

    /// Replaces the content of the policy file, which the builder has to have given.
    pub fn write_policy(&self, text: &str) -> Result<()> {
        match lock(&self.policy).as_deref() {
            Some(path) => {
                write_private(path, text.as_bytes()).map_err(|error| self.process.error(error))
            }
            None => Err(self.process.error("was started without a policy file")),
        }
    }

    /// The process: its id, signals, whether it runs.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The address of its health checks and metrics, `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A GET of one of its paths.
    pub fn get(&self, path: &str) -> Result<Response> {
        http::get(self.port, path)
    }

    /// What `/metrics` says.
    pub fn metrics(&self) -> Result<String> {
        self.get("/metrics")?
            .ok()
            .map_err(|error| self.process.error(error))
    }

    /// The sum of a metric over its labels that contain each of `labels`, such as `["reason=\"conflict\""]`; 0 when it is
    /// not there.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        Ok(sum(&self.metrics()?, name, labels))
    }

    /// Everything that it logged, one JSON object per line.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// What it logged since it was last started.
    pub fn log_of_run(&self) -> String {
        self.process.log_of_run()
    }

    /// Resident memory.
    pub fn rss_bytes(&self) -> Result<u64> {
        self.process.rss_bytes()
    }

    /// Time spent on a processor since it was last started.
    pub fn cpu_time(&self) -> Result<Duration> {
        self.process.cpu_time()
    }

    /// An error with the end of its log, for assertions of a test.
    pub fn error(&self, message: impl std::fmt::Display) -> Error {
        self.process.error(message)
    }
}

/// The sum over the lines of the text format that are of the metric `name` and have all `labels`.
fn sum(text: &str, name: &str, labels: &[&str]) -> f64 {
    text.lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            if !rest.starts_with(['{', ' ']) {
                return None;
            }
            let (inside, value) = match rest.rsplit_once("} ") {
                Some((inside, value)) => (inside, value),
                None => ("", rest.trim_start()),
            };
            // A time stamp may follow the value.
            let value: f64 = value.split(' ').next()?.parse().ok()?;
            labels
                .iter()
                .all(|label| inside.contains(label))
                .then_some(value)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_over_labels() {
        let text =
            "# HELP a x\na_total{k=\"x\",r=\"1\"} 2\na_total{k=\"y\"} 3\na_total_more 9\nb 4.5\n";
        assert_eq!(sum(text, "a_total", &[]), 5.0);
        assert_eq!(sum(text, "a_total", &["k=\"x\""]), 2.0);
        assert_eq!(sum(text, "b", &[]), 4.5);
        assert_eq!(sum(text, "c", &[]), 0.0);
    }
}
