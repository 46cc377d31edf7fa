//! An etcd of one or three members, with TLS and authentication if wanted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use crate::ca::{Ca, CertFiles};
use crate::error::{Context, Error, Result};
use crate::process::{Process, run, with_free_ports};
use crate::workdir::{WorkDir, keep_on_panic};
use crate::{eventually, http, ports, tools};

/// The password of etcd's `root` user, when authentication is on.
pub const ROOT_PASSWORD: &str = "testbed-root";
/// The limited user, when authentication is on.
pub const USER: &str = "registrar";
/// The first password of the limited user.
pub const USER_PASSWORD: &str = "testbed-registrar";

/// As whom etcdctl runs unless the test says otherwise.
const ROOT: Option<(&str, &str)> = Some(("root", ROOT_PASSWORD));

const HEALTH_TIMEOUT: Duration = Duration::from_secs(30);

/// How an [`Etcd`] is to be.
#[derive(Debug, Clone)]
pub struct EtcdBuilder {
    name: String,
    members: usize,
    tls: bool,
    prefixes: Option<Vec<String>>,
    unsafe_no_fsync: bool,
    slow_disk: Option<Duration>,
    args: Vec<String>,
}

impl EtcdBuilder {
    /// The number of members, 1 or 3.
    #[must_use]
    pub fn members(mut self, members: usize) -> Self {
        self.members = members;
        self
    }

    /// TLS, with client certificates required.
    #[must_use]
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Authentication: `root`, and [`USER`], who may read and write below `prefixes` and nothing else.
    #[must_use]
    pub fn auth<S: Into<String>>(mut self, prefixes: impl IntoIterator<Item = S>) -> Self {
        self.prefixes = Some(prefixes.into_iter().map(Into::into).collect());
        self
    }

    /// Does not wait for the disk. Faster, and not what a test of durability wants.
    #[must_use]
    pub fn unsafe_no_fsync(mut self) -> Self {
        self.unsafe_no_fsync = true;
        self
    }

    /// A slow disk: every fdatasync of etcd takes so much longer. Needs strace, which delays the system call.
    #[must_use]
    pub fn slow_disk(mut self, delay: Duration) -> Self {
        self.slow_disk = Some(delay);
        self
    }

    /// More flags of etcd, such as `--quota-backend-bytes=16777216`.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Starts it and waits until it answers.
    ///
    /// With `TESTBED_ETCD_ENDPOINTS` set, gives the etcd at those endpoints instead.
    pub fn start(self) -> Result<Etcd> {
        match tools::external_etcd() {
            Some(endpoints) => self.external(endpoints),
            None => self.start_own(),
        }
    }

    fn external(self, endpoints: Vec<String>) -> Result<Etcd> {
        if self.tls
            || self.prefixes.is_some()
            || self.members > 1
            || self.slow_disk.is_some()
            || !self.args.is_empty()
        {
            return Err(Error::new(
                self.name,
                "TLS, authentication, several members, a slow disk and extra flags are not available with TESTBED_ETCD_ENDPOINTS",
            ));
        }
        Ok(Etcd {
            members: Vec::new(),
            endpoints,
            tls: None,
            password_file: None,
            dir: WorkDir::new(&self.name)?,
            builder: self,
        })
    }

    /// As [`EtcdBuilder::start`], never an existing one.
    pub(crate) fn start_own(self) -> Result<Etcd> {
        if self.members != 1 && self.members != 3 {
            return Err(Error::new(
                self.name,
                format!("{} members; 1 or 3 are possible", self.members),
            ));
        }
        tools::path("etcd")?;
        with_free_ports(|| {
            let etcd = self.clone().lay_out()?;
            etcd.start()?;
            Ok(etcd)
        })
    }

    /// Makes the folder, the certificates and the members, without starting them.
    fn lay_out(self) -> Result<Etcd> {
        let dir = WorkDir::new(&self.name)?;
        let tls = if self.tls {
            Some(Tls::new(dir.path())?)
        } else {
            None
        };
        let password_file = match self.prefixes {
            Some(_) => Some(dir.write("password", USER_PASSWORD)?),
            None => None,
        };
        let mut ports = Vec::new();
        for _ in 0..self.members {
            ports.push([
                ports::free_port()?,
                ports::free_port()?,
                ports::free_port()?,
            ]);
        }
        let peers: Vec<String> = ports
            .iter()
            .enumerate()
            .map(|(index, [_, peer, _])| format!("m{index}=http://127.0.0.1:{peer}"))
            .collect();
        let scheme = if self.tls { "https" } else { "http" };
        let binary = tools::path("etcd")?;
        let mut members = Vec::new();
        let mut endpoints = Vec::new();
        for (index, [client, peer, metrics]) in ports.into_iter().enumerate() {
            let name = format!("m{index}");
            let data = dir.join(format!("{name}.data"));
            let endpoint = format!("{scheme}://127.0.0.1:{client}");
            let mut args = vec![
                format!("--name={name}"),
                format!("--data-dir={}", data.display()),
                format!("--listen-client-urls={endpoint}"),
                format!("--advertise-client-urls={endpoint}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
                format!("--initial-cluster={}", peers.join(",")),
                format!("--initial-cluster-token={}", self.name),
                format!("--listen-metrics-urls=http://127.0.0.1:{metrics}"),
                "--logger=zap".to_owned(),
            ];
            if let Some(tls) = &tls {
                args.extend([
                    format!("--cert-file={}", tls.server.cert.display()),
                    format!("--key-file={}", tls.server.key.display()),
                    format!("--trusted-ca-file={}", tls.ca.cert().display()),
                    "--client-cert-auth".to_owned(),
                ]);
            }
            if self.unsafe_no_fsync {
                args.push("--unsafe-no-fsync".to_owned());
            }
            args.extend(self.args.iter().cloned());
            let log = dir.join(format!("{name}.log"));
            let component = format!("etcd {}/{name}", self.name);
            let process = match self.slow_disk {
                None => Process::new(component, &binary, log),
                Some(delay) => Process::new(component, "strace", log)
                    .args(slowed(delay))
                    .args([&binary]),
            };
            let process = process.args(args);
            endpoints.push(endpoint);
            members.push(Member {
                name,
                peer: format!("http://127.0.0.1:{peer}"),
                client_port: client,
                metrics_port: metrics,
                data,
                process,
            });
        }
        Ok(Etcd {
            members,
            endpoints,
            tls,
            password_file,
            dir,
            builder: self,
        })
    }
}

/// The arguments with which strace runs a program whose fdatasync is slow.
fn slowed(delay: Duration) -> Vec<String> {
    let mut args: Vec<String> = [
        // strace is a child of the program and not its parent: signals and the process id are the program's own.
        "--daemonize",
        "--follow-forks",
        // No other system call is made slower.
        "--seccomp-bpf",
        "--quiet=all",
        "--output=/dev/null",
        "--trace=fdatasync",
    ]
    .map(str::to_owned)
    .into();
    let microseconds = delay.as_micros();
    args.push(format!("--inject=fdatasync:delay_enter={microseconds}"));
    args.push("--".to_owned());
    args
}

struct Member {
    name: String,
    peer: String,
    client_port: u16,
    metrics_port: u16,
    data: PathBuf,
    process: Process,
}

struct Tls {
    ca: Ca,
    server: CertFiles,
    client: CertFiles,
    root: CertFiles,
}

impl Tls {
    fn new(folder: &Path) -> Result<Self> {
        let ca = Ca::new(folder, "testbed etcd")?;
        let server = ca.server("server", &[])?;
        let client = ca.client("client", "testbed-client", None)?;
        let root = ca.client("root", "root", None)?;
        Ok(Self {
            ca,
            server,
            client,
            root,
        })
    }
}

/// A running etcd. Dropping it ends its members and removes their data.
pub struct Etcd {
    // The members first: they end before their folder goes.
    members: Vec<Member>,
    endpoints: Vec<String>,
    tls: Option<Tls>,
    password_file: Option<PathBuf>,
    dir: WorkDir,
    builder: EtcdBuilder,
}

impl Etcd {
    /// An etcd of one member, without TLS and authentication unless the builder is told otherwise.
    pub fn builder(name: impl Into<String>) -> EtcdBuilder {
        EtcdBuilder {
            name: name.into(),
            members: 1,
            tls: false,
            prefixes: None,
            unsafe_no_fsync: false,
            slow_disk: None,
            args: Vec::new(),
        }
    }

    /// The plain etcd called `name` that every test of this process shares; the first one starts it.
    ///
    /// It ends with the process, and its folder goes with it unless a test failed.
    pub fn shared(name: &str) -> Result<&'static Etcd> {
        static ALL: crate::Shared<Etcd> = Mutex::new(Vec::new());
        crate::shared(&ALL, name, || {
            keep_on_panic();
            Etcd::builder(name).start()
        })
    }

    /// The name given to the builder.
    pub fn name(&self) -> &str {
        &self.builder.name
    }

    /// The endpoints of all members, such as `http://127.0.0.1:12379`.
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// The endpoints as `--etcd-endpoints` takes them.
    pub fn endpoints_arg(&self) -> String {
        self.endpoints.join(",")
    }

    /// The client port of each member, as the target of a [`crate::Proxy`].
    pub fn client_ports(&self) -> Vec<u16> {
        self.members
            .iter()
            .map(|member| member.client_port)
            .collect()
    }

    /// The authority's certificate, with TLS.
    pub fn ca_cert(&self) -> Option<&Path> {
        self.tls.as_ref().map(|tls| tls.ca.cert())
    }

    /// The authority, with TLS: for certificates of a test's own.
    pub fn ca(&self) -> Option<&Ca> {
        self.tls.as_ref().map(|tls| &tls.ca)
    }

    /// The client's certificate and key, with TLS.
    pub fn client_cert(&self) -> Option<&CertFiles> {
        self.tls.as_ref().map(|tls| &tls.client)
    }

    /// A certificate whose bearer is `root`, with TLS: a login without a token, which would expire.
    pub fn root_cert(&self) -> Option<&CertFiles> {
        self.tls.as_ref().map(|tls| &tls.root)
    }

    /// The user that an operator is to be, with authentication.
    pub fn user(&self) -> Option<&'static str> {
        self.password_file.as_ref().map(|_| USER)
    }

    /// The file with that user's password, with authentication.
    pub fn password_file(&self) -> Option<&Path> {
        self.password_file.as_deref()
    }

    /// A new client certificate and key in the place of the old ones.
    pub fn rotate_client_cert(&self) -> Result<()> {
        let tls = self.tls.as_ref().ok_or_else(|| self.error("has no TLS"))?;
        tls.ca.client("client", "testbed-client", None).map(drop)
    }

    /// A new password for the limited user, in etcd and in the file.
    pub fn rotate_password(&self, password: &str) -> Result<()> {
        self.etcdctl_input(&["user", "passwd", USER, "--interactive=false"], password)?;
        self.dir.write("password", password).map(drop)
    }

    /// The flags that an operator or `etcd-registrar` command needs to reach this etcd.
    pub fn operator_args(&self) -> Vec<String> {
        self.operator_args_for(&self.endpoints_arg())
    }

    /// The same with other endpoints, such as those of proxies in front of it.
    pub fn operator_args_for(&self, endpoints: &str) -> Vec<String> {
        let mut args = vec!["--etcd-endpoints".to_owned(), endpoints.to_owned()];
        let mut flag =
            |name: &str, value: &Path| args.extend([name.to_owned(), value.display().to_string()]);
        if let Some(tls) = &self.tls {
            flag("--etcd-cacert", tls.ca.cert());
            flag("--etcd-cert", &tls.client.cert);
            flag("--etcd-key", &tls.client.key);
        }
        if let Some(file) = &self.password_file {
            flag("--etcd-password-file", file);
            args.extend(["--etcd-user".to_owned(), USER.to_owned()]);
        }
        args
    }

    /// Runs etcdctl as root against all members.
    pub fn etcdctl(&self, args: &[&str]) -> Result<String> {
        run(
            "etcdctl",
            self.ctl(ROOT, &self.endpoints_arg())?.args(args),
            None,
        )
    }

    /// Runs etcdctl with something on its standard input.
    pub fn etcdctl_input(&self, args: &[&str], input: &str) -> Result<String> {
        run(
            "etcdctl",
            self.ctl(ROOT, &self.endpoints_arg())?.args(args),
            Some(input),
        )
    }

    /// Runs etcdctl as another user.
    pub fn etcdctl_as(&self, user: &str, password: &str, args: &[&str]) -> Result<String> {
        run(
            "etcdctl",
            self.ctl(Some((user, password)), &self.endpoints_arg())?
                .args(args),
            None,
        )
    }

    /// Runs etcdctl against one member.
    pub fn etcdctl_member(&self, member: usize, args: &[&str]) -> Result<String> {
        let endpoint = self
            .endpoints
            .get(member)
            .ok_or_else(|| self.no_member(member))?;
        run("etcdctl", self.ctl(ROOT, endpoint)?.args(args), None)
    }

    /// A command for etcdctl that carries endpoints, certificates and root's password, to be run by the caller.
    pub fn etcdctl_command(&self) -> Result<Command> {
        self.ctl(ROOT, &self.endpoints_arg())
    }

    fn ctl(&self, user: Option<(&str, &str)>, endpoints: &str) -> Result<Command> {
        let mut command = Command::new(tools::path("etcdctl")?);
        command.arg(format!("--endpoints={endpoints}"));
        if let Some(tls) = &self.tls {
            command
                .arg(format!("--cacert={}", tls.ca.cert().display()))
                .arg(format!("--cert={}", tls.client.cert.display()))
                .arg(format!("--key={}", tls.client.key.display()));
        }
        if let (Some((user, password)), Some(_)) = (user, &self.builder.prefixes) {
            command
                .arg(format!("--user={user}"))
                .arg(format!("--password={password}"));
        }
        Ok(command)
    }

    // Start and stop.

    /// Starts every member that does not run, and waits until they answer. Sets up authentication when it is not there.
    pub fn start(&self) -> Result<()> {
        self.own()?;
        for member in &self.members {
            if !member.process.is_running() {
                member.process.start()?;
            }
        }
        self.wait_healthy()?;
        if self.builder.prefixes.is_some() {
            self.set_up_auth()?;
        }
        Ok(())
    }

    /// Waits until every member that runs can read from the quorum.
    pub fn wait_healthy(&self) -> Result<()> {
        self.own()?;
        for member in self
            .members
            .iter()
            .filter(|member| member.process.is_running())
        {
            member.process.wait_ready_for(HEALTH_TIMEOUT, || {
                http::healthy(member.metrics_port, None, "/readyz")
            })?;
        }
        Ok(())
    }

    /// Starts one member, and waits until it serves; for the quorum too if there is one.
    pub fn start_member(&self, member: usize) -> Result<()> {
        let member = self.member(member)?;
        member.process.start()?;
        let running = self
            .members
            .iter()
            .filter(|member| member.process.is_running())
            .count();
        let path = if running * 2 > self.members.len() {
            "/readyz"
        } else {
            "/livez"
        };
        member.process.wait_ready_for(HEALTH_TIMEOUT, || {
            http::healthy(member.metrics_port, None, path)
        })
    }

    /// Kills one member with SIGKILL.
    pub fn kill_member(&self, member: usize) -> Result<()> {
        self.member(member)?.process.kill()
    }

    /// Ends one member with SIGTERM.
    pub fn stop_member(&self, member: usize) -> Result<()> {
        self.member(member)?.process.stop()
    }

    /// Freezes one member.
    pub fn freeze_member(&self, member: usize) -> Result<()> {
        self.member(member)?.process.freeze()
    }

    /// Lets one member go on.
    pub fn thaw_member(&self, member: usize) -> Result<()> {
        self.member(member)?.process.thaw()
    }

    /// Stops one member and starts it on the same ports with the same data.
    pub fn restart_member(&self, member: usize) -> Result<()> {
        self.stop_member(member)?;
        self.start_member(member)
    }

    /// Deletes the data of one member, which must not run.
    ///
    /// A member of three does not come back with empty data unless it was removed and added again (`etcdctl member`).
    pub fn wipe_member(&self, member: usize) -> Result<()> {
        let member = self.member(member)?;
        if member.process.is_running() {
            return Err(member
                .process
                .error("has to be stopped before its data is deleted"));
        }
        match fs::remove_dir_all(&member.data) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context(member.process.component(), member.data.display())
            }
            _ => Ok(()),
        }
    }

    /// Kills every member.
    pub fn kill(&self) -> Result<()> {
        self.each(Self::kill_member)
    }

    /// Ends every member with SIGTERM.
    pub fn stop(&self) -> Result<()> {
        self.own()?;
        // At the same time: the last of three waits in vain for a quorum to hand over to.
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .members
                .iter()
                .map(|member| scope.spawn(|| member.process.stop()))
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(self.error("stop"))))
        })
    }

    /// Freezes every member.
    pub fn freeze(&self) -> Result<()> {
        self.each(Self::freeze_member)
    }

    /// Lets every member go on.
    pub fn thaw(&self) -> Result<()> {
        self.each(Self::thaw_member)
    }

    /// Stops and starts every member, with the same ports and data.
    pub fn restart(&self) -> Result<()> {
        self.stop()?;
        self.start()
    }

    /// Deletes the data of every member; none may run. The next start is a new, empty etcd with the same cluster id.
    pub fn wipe(&self) -> Result<()> {
        self.each(Self::wipe_member)
    }

    /// Saves a snapshot of the first member that runs to a file in this etcd's folder.
    pub fn save_snapshot(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(format!("{name}.snapshot"));
        let file = path.display().to_string();
        let member = self
            .members
            .iter()
            .position(|member| member.process.is_running())
            .unwrap_or(0);
        self.etcdctl_member(member, &["snapshot", "save", &file])?;
        Ok(path)
    }

    /// Puts every member back to a snapshot and starts them. They are killed before when they run.
    ///
    /// `extra` are flags of `etcdutl snapshot restore`, such as `--bump-revision=1000000 --mark-compacted`.
    pub fn restore(&self, snapshot: &Path, extra: &[&str]) -> Result<()> {
        self.own()?;
        self.kill()?;
        self.wipe()?;
        let cluster: Vec<String> = self
            .members
            .iter()
            .map(|member| format!("{}={}", member.name, member.peer))
            .collect();
        for member in &self.members {
            let mut command = Command::new(tools::path("etcdutl")?);
            command
                .args(["snapshot", "restore"])
                .arg(snapshot)
                .arg(format!("--data-dir={}", member.data.display()))
                .arg(format!("--name={}", member.name))
                .arg(format!("--initial-cluster={}", cluster.join(",")))
                .arg(format!("--initial-cluster-token={}", self.builder.name))
                .arg(format!("--initial-advertise-peer-urls={}", member.peer))
                .args(extra);
            run("etcdutl", &mut command, None)?;
        }
        self.start()
    }

    /// The number of members that the harness runs; 0 for an existing etcd.
    pub fn member_count(&self) -> usize {
        self.members.len()
    }

    /// One member's process: its id, its log, signals.
    pub fn process(&self, member: usize) -> Result<&Process> {
        self.member(member).map(|member| &member.process)
    }

    /// What one member's `/metrics` says.
    pub fn metrics(&self, member: usize) -> Result<String> {
        let member = self.member(member)?;
        http::get(member.metrics_port, "/metrics")?
            .ok()
            .map_err(|error| member.process.error(error))
    }

    /// The member that leads, by asking each that runs.
    pub fn leader(&self) -> Result<usize> {
        self.own()?;
        eventually(HEALTH_TIMEOUT, "a leader", || {
            self.members
                .iter()
                .position(|member| {
                    member.process.is_running()
                        && http::get(member.metrics_port, "/metrics").is_ok_and(|answer| {
                            answer
                                .body
                                .lines()
                                .any(|line| line == "etcd_server_is_leader 1")
                        })
                })
                .ok_or("none says that it leads")
        })
    }

    /// Creates root, the role and the limited user, and switches authentication on, unless it is on.
    fn set_up_auth(&self) -> Result<()> {
        // After a restart the users are there already.
        if self
            .etcdctl(&["user", "list"])
            .is_ok_and(|users| users.lines().any(|user| user == USER))
        {
            return Ok(());
        }
        let plain = |args: &[&str]| {
            run(
                "etcdctl",
                self.ctl(None, &self.endpoints_arg())?.args(args),
                None,
            )
            .map(drop)
        };
        plain(&["user", "add", &format!("root:{ROOT_PASSWORD}")])?;
        plain(&["user", "grant-role", "root", "root"])?;
        plain(&["role", "add", USER])?;
        for prefix in self.builder.prefixes.iter().flatten() {
            plain(&[
                "role",
                "grant-permission",
                USER,
                "readwrite",
                prefix,
                "--prefix=true",
            ])?;
        }
        plain(&["user", "add", &format!("{USER}:{USER_PASSWORD}")])?;
        plain(&["user", "grant-role", USER, USER])?;
        plain(&["auth", "enable"])?;
        if self.password_file.is_some() {
            self.dir.write("password", USER_PASSWORD)?;
        }
        Ok(())
    }

    fn each(&self, action: impl Fn(&Self, usize) -> Result<()>) -> Result<()> {
        self.own()?;
        (0..self.members.len()).try_for_each(|member| action(self, member))
    }

    fn own(&self) -> Result<()> {
        if self.members.is_empty() {
            return Err(self.error("was not started by the testbed (TESTBED_ETCD_ENDPOINTS), so it cannot be started or stopped"));
        }
        Ok(())
    }

    fn member(&self, index: usize) -> Result<&Member> {
        self.own()?;
        self.members.get(index).ok_or_else(|| self.no_member(index))
    }

    fn no_member(&self, index: usize) -> Error {
        self.error(format!("has no member {index}"))
    }

    fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::new(format!("etcd {}", self.builder.name), message)
    }
}
