//! Child processes that can be killed, stopped, frozen and started again, and that die with this process.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Context, Error, Result};

/// How long a component has to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a component has to become ready.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(90);

type SpawnJob = (Command, Sender<std::io::Result<Child>>);

/// Starts a child from a thread that lives as long as this process.
///
/// The kernel's "parent died" signal is tied to the thread that started the child, not to the process: a child started by
/// a test's own thread would die at the end of that test.
fn spawn(command: Command) -> std::io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<Sender<SpawnJob>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, receiver) = channel::<SpawnJob>();
        std::thread::spawn(move || {
            for (mut command, reply) in receiver {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let (reply, answer) = channel();
    let gone = || std::io::Error::other("the thread that starts children is gone");
    lock(spawner).send((command, reply)).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

/// A poisoned lock means that a test failed; what it guards here is still usable for cleaning up.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One component: how it is started, and the child that runs, if one does.
pub struct Process {
    component: String,
    program: PathBuf,
    args: Mutex<Vec<OsString>>,
    env: Vec<(OsString, OsString)>,
    log: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    child: Option<Child>,
    last_exit: Option<ExitStatus>,
    /// Where in the log the current run begins.
    log_start: u64,
}

impl Process {
    /// A component that is not started yet. Its output goes to the file `log`.
    pub fn new(
        component: impl Into<String>,
        program: impl Into<PathBuf>,
        log: impl Into<PathBuf>,
    ) -> Self {
        Self {
            component: component.into(),
            program: program.into(),
            args: Mutex::default(),
            env: Vec::new(),
            log: log.into(),
            state: Mutex::default(),
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Self {
        lock(&self.args).extend(args.into_iter().map(|arg| arg.as_ref().to_os_string()));
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Replaces the arguments that the next start uses.
    pub fn set_args<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) {
        *lock(&self.args) = args
            .into_iter()
            .map(|arg| arg.as_ref().to_os_string())
            .collect();
    }

    /// The component's name.
    pub fn component(&self) -> &str {
        &self.component
    }

    /// The command line, for messages.
    pub fn command_line(&self) -> String {
        let mut line = self.program.display().to_string();
        for arg in lock(&self.args).iter() {
            line.push(' ');
            line.push_str(&arg.to_string_lossy());
        }
        line
    }

    /// Starts it, without waiting for anything. An error when it runs already.
    pub fn start(&self) -> Result<()> {
        let mut state = lock(&self.state);
        if state.refresh() {
            return Err(self.error("runs already"));
        }
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .context(&self.component, self.log.display())?;
        state.log_start = log.metadata().map_or(0, |metadata| metadata.len());
        let errors = log.try_clone().context(&self.component, "log")?;
        // `setpriv` asks the kernel to kill the child when its parent goes, and then becomes the component, under the
        // same process id. Doing it here would need unsafe code between fork and exec.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&self.program)
            .args(lock(&self.args).iter())
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // Ctrl-C on the terminal is for the harness, which decides what to do with its children.
            .process_group(0);
        let child = spawn(command).map_err(|error| {
            let hint = if error.kind() == std::io::ErrorKind::NotFound {
                " (setpriv of util-linux is needed)"
            } else {
                ""
            };
            self.error(format!("cannot be started: {error}{hint}"))
        })?;
        state.child = Some(child);
        state.last_exit = None;
        Ok(())
    }

    /// Polls `ready` until it says so. Ends early, with the end of the log, when the process ends.
    pub fn wait_ready(&self, ready: impl FnMut() -> Result<(), String>) -> Result<()> {
        self.wait_ready_for(START_TIMEOUT, ready)
    }

    /// As [`Process::wait_ready`], with a time-out of its own.
    pub fn wait_ready_for(
        &self,
        timeout: Duration,
        mut ready: impl FnMut() -> Result<(), String>,
    ) -> Result<()> {
        let start = Instant::now();
        loop {
            let last = match ready() {
                Ok(()) => return Ok(()),
                Err(last) => last,
            };
            if !self.is_running() {
                let how = self
                    .exit_status()
                    .map_or_else(String::new, |status| format!(" ({status})"));
                let taken = self
                    .log_of_run()
                    .to_lowercase()
                    .contains("address already in use");
                return Err(self
                    .error(format!("ended before it was ready{how}"))
                    .with_port_taken(taken));
            }
            if start.elapsed() > timeout {
                return Err(self.error(format!("not ready after {timeout:?}: {last}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether it runs (a frozen process does).
    pub fn is_running(&self) -> bool {
        lock(&self.state).refresh()
    }

    /// How the last run ended, when it did.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        let mut state = lock(&self.state);
        state.refresh();
        state.last_exit
    }

    /// Waits for it to end by itself.
    pub fn wait_exit(&self, timeout: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.exit_status() {
                return Ok(status);
            }
            if start.elapsed() > timeout {
                return Err(self.error(format!("still runs after {timeout:?}")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The process id, while it runs.
    pub fn pid(&self) -> Result<u32> {
        let mut state = lock(&self.state);
        state.refresh();
        match &state.child {
            Some(child) => Ok(child.id()),
            None => Err(self.error("does not run")),
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.pid()?;
        let pid = i32::try_from(pid).context(&self.component, "process id")?;
        kill(Pid::from_raw(pid), signal).context(&self.component, signal)
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill(&self) -> Result<()> {
        let mut state = lock(&self.state);
        if let Some(child) = state.child.as_mut() {
            let _ = child.kill();
            state.last_exit = child.wait().ok();
            state.child = None;
        }
        Ok(())
    }

    /// Ends it with SIGTERM and waits until it is gone. Already gone is no error.
    pub fn stop(&self) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        self.signal(Signal::SIGTERM)?;
        self.wait_exit(STOP_TIMEOUT).map(drop)
    }

    /// Freezes it with SIGSTOP, and waits until every thread stands still.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)?;
        let pid = self.pid()?;
        crate::eventually(
            Duration::from_secs(5),
            "a stopped process",
            || match process_state(pid) {
                Some('T') => Ok(()),
                other => Err(format!("{} is in state {other:?}", self.component)),
            },
        )
    }

    /// Lets a frozen process go on.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// The log of every run.
    pub fn log(&self) -> String {
        fs::read(&self.log).map_or_else(
            |_| String::new(),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// The log since the last start.
    pub fn log_of_run(&self) -> String {
        let start = lock(&self.state).log_start;
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(&self.log)?;
            file.seek(SeekFrom::Start(start))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        read().map_or_else(
            |_| String::new(),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// The file of the log.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Resident memory in bytes.
    pub fn rss_bytes(&self) -> Result<u64> {
        let status = self.proc_file("status")?;
        status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
            .map(|kib| kib * 1024)
            .ok_or_else(|| self.error("no VmRSS in /proc"))
    }

    /// Time spent on a processor, user and system together, since its start.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = self.proc_file("stat")?;
        // The second field is the name in brackets, which may have blanks in it.
        let ticks = stat
            .rsplit_once(')')
            .map(|(_, rest)| {
                rest.split_whitespace()
                    .skip(11)
                    .take(2)
                    .filter_map(|n| n.parse::<u64>().ok())
                    .sum::<u64>()
            })
            .ok_or_else(|| self.error("/proc/PID/stat not understood"))?;
        let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)
            .ok()
            .flatten()
            .and_then(|n| u64::try_from(n).ok())
            .unwrap_or(100);
        Ok(Duration::from_millis(ticks * 1000 / per_second))
    }

    fn proc_file(&self, name: &str) -> Result<String> {
        let path = format!("/proc/{}/{name}", self.pid()?);
        fs::read_to_string(&path).context(&self.component, path)
    }

    /// An error of this component, with its command and the end of its log.
    pub fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::new(self.component.clone(), message)
            .with_command(self.command_line())
            .with_log(&self.log)
    }
}

impl State {
    /// Takes note of an end, and says whether it runs.
    fn refresh(&mut self) -> bool {
        if let Some(child) = self.child.as_mut()
            && let Ok(Some(status)) = child.try_wait()
        {
            self.last_exit = Some(status);
            self.child = None;
        }
        self.child.is_some()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Starts a component on ports of its own, and on others if somebody took one of them meanwhile.
///
/// `attempt` picks the ports, starts it and waits for it.
pub(crate) fn with_free_ports<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let mut left = 5;
    loop {
        left -= 1;
        match attempt() {
            Err(error) if left > 0 && error.is_port_taken() => {}
            result => return result,
        }
    }
}

/// Runs a command to its end, with `input`, and gives what it printed.
pub(crate) fn run(component: &str, command: &mut Command, input: Option<&str>) -> Result<String> {
    use std::io::Write;
    let line = || {
        std::iter::once(command_name(command))
            .chain(
                command
                    .get_args()
                    .map(|arg| arg.to_string_lossy().into_owned()),
            )
            .collect::<Vec<_>>()
            .join(" ")
    };
    let shown = line();
    let failed = |message: String| Error::new(component, message).with_command(shown.clone());
    command
        .stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .map_err(|error| failed(format!("cannot be started: {error}")))?;
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // From a thread of its own: the command may print before it has read everything.
            scope.spawn(move || stdin.write_all(input.as_bytes()));
        }
        child.wait_with_output()
    })
    .map_err(|error| failed(error.to_string()))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let how = match (output.status.code(), output.status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, signal) => format!("signal {signal:?}"),
    };
    Err(failed(format!(
        "{how}: {}{}",
        stderr.trim(),
        if stderr.trim().is_empty() {
            stdout.trim()
        } else {
            ""
        }
    )))
}

fn command_name(command: &Command) -> String {
    Path::new(command.get_program())
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The state letter of a process: `R`, `S`, `T` and so on.
fn process_state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}
