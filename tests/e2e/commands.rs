//! How the commands beside `run` are run: as persons and scripts do.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use crate::support::{BINARY, SOON};

/// A command with its arguments; etcd is named by the environment alone.
pub(crate) fn command(etcd: &testbed::Etcd, name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command
        .arg(name)
        .args(args)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("ETCD_REGISTRAR_ETCD_ENDPOINTS", etcd.endpoints_arg());
    command
}

/// What a command printed that ends by itself; one that does not is ended.
pub(crate) fn output(etcd: &testbed::Etcd, name: &str, args: &[&str]) -> Output {
    let command = command(etcd, name, args);
    let mut limited = Command::new("timeout");
    limited.arg("120").arg(command.get_program());
    limited.args(command.get_args()).env_clear();
    for (name, value) in command.get_envs() {
        limited.env(name, value.unwrap_or_default());
    }
    limited.output().unwrap()
}

/// What a command printed that ended with this code, and what it said beside.
pub(crate) fn ends(etcd: &testbed::Etcd, name: &str, args: &[&str], code: i32) -> (String, String) {
    let output = output(etcd, name, args);
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        output.status.code(),
        Some(code),
        "{name} {args:?}: {stdout}{stderr}"
    );
    (stdout, stderr)
}

/// A command that goes on, and the lines that it prints. It is killed when it is dropped.
pub(crate) struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let errors = sender.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        std::thread::spawn(move || {
            for line in BufReader::new(err).lines().map_while(Result::ok) {
                let _ = errors.send(line);
            }
        });
        Self { child, lines }
    }

    pub(crate) fn next(&self) -> String {
        self.lines.recv_timeout(SOON).unwrap()
    }

    /// The next line that holds this.
    pub(crate) fn says(&self, part: &str) -> String {
        self.says_all(&[part]).remove(0)
    }

    /// The next lines that hold these, in whichever order they come: a command and its process write at the same time.
    pub(crate) fn says_all(&self, parts: &[&str]) -> Vec<String> {
        let until = Instant::now() + SOON;
        let mut found: Vec<Option<String>> = vec![None; parts.len()];
        let mut others = Vec::new();
        while found.iter().any(Option::is_none) {
            let patience = until.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(patience) else {
                panic!("waited for {parts:?}: {others:#?}");
            };
            let mut places = found.iter_mut().zip(parts);
            match places.find(|(place, part)| place.is_none() && line.contains(**part)) {
                Some((place, _)) => *place = Some(line),
                None => others.push(line),
            }
        }
        found.into_iter().flatten().collect()
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(sent.unwrap().success());
    }

    pub(crate) fn wait(mut self) -> ExitStatus {
        let until = Instant::now() + SOON;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "the command goes on");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
