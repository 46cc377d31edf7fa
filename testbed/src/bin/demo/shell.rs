//! Runs commands as the reader would: in a shell, with kubectl, etcdctl and the operator on the PATH.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use testbed::{Cluster, Error, Etcd, Result, tools};

use crate::screen::Screen;

/// A shell with what it needs in its environment.
pub(crate) struct Shell {
    screen: Screen,
    folder: PathBuf,
    /// The variables as the reader has to export them.
    variables: Vec<(&'static str, String)>,
}

impl Shell {
    /// A shell that reaches both clusters, as contexts of these names, and the etcd.
    pub(crate) fn new(
        screen: Screen,
        folder: &Path,
        clusters: [&Cluster; 2],
        etcd: &Etcd,
        operator: &Path,
    ) -> Result<Self> {
        let mut folders: Vec<PathBuf> = Vec::new();
        for program in [
            operator.to_path_buf(),
            tools::path("kubectl")?,
            tools::path("etcdctl")?,
        ] {
            let folder = program.parent().unwrap_or(Path::new("/")).to_path_buf();
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
        let path: Vec<String> = folders
            .iter()
            .map(|folder| folder.display().to_string())
            .collect();
        let kubeconfigs = clusters.map(|cluster| cluster.kubeconfig().display().to_string());
        // What kubectl remembers of a cluster is wrong for the next one on the same port.
        let [east, _] = clusters;
        let cache = east.kubeconfig().with_file_name("kubectl-cache");
        Ok(Self {
            screen,
            folder: folder.to_path_buf(),
            variables: vec![
                ("PATH", format!("{}:$PATH", path.join(":"))),
                ("KUBECONFIG", kubeconfigs.join(":")),
                ("KUBECACHEDIR", cache.display().to_string()),
                ("ETCDCTL_ENDPOINTS", etcd.endpoints_arg()),
            ],
        })
    }

    /// What the reader types so that the commands work elsewhere, too.
    pub(crate) fn exports(&self) -> String {
        let mut lines = vec![format!("cd {}", self.folder.display())];
        lines.extend(
            self.variables
                .iter()
                .map(|(name, value)| format!("export {name}={value}")),
        );
        lines.join("\n")
    }

    /// A command to be started by the caller.
    pub(crate) fn prepared(&self, command: &str) -> Command {
        let mut shell = Command::new("sh");
        shell.args(["-c", command]);
        self.set_up(&mut shell);
        shell
    }

    /// A program that goes on beside the others, and ends when this process does, even when that is killed. `command` is
    /// one command without pipes.
    pub(crate) fn background(&self, command: &str) -> Command {
        let mut shell = Command::new("setpriv");
        // "exec", so that the signal reaches the program and not a shell around it.
        shell.args(["--pdeathsig", "KILL", "--", "sh", "-c"]);
        shell.arg(format!("exec {command}"));
        self.set_up(&mut shell);
        shell
    }

    fn set_up(&self, command: &mut Command) {
        command.current_dir(&self.folder).stdin(Stdio::null());
        for (name, value) in &self.variables {
            let known = std::env::var(name).unwrap_or_default();
            command.env(name, value.replace(&format!("${name}"), &known));
        }
    }

    /// Runs a command without showing it.
    pub(crate) fn quietly(&self, command: &str) -> Result<String> {
        let output = self
            .prepared(command)
            .output()
            .map_err(|error| Error::new("sh", error).with_command(command))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(Error::new(
            "demo",
            format!(
                "the command failed ({}): {}{}",
                output.status,
                text.trim(),
                errors.trim()
            ),
        )
        .with_command(command))
    }

    /// Shows a command, runs it, and shows what it printed.
    pub(crate) fn run(&self, command: &str) -> Result<String> {
        self.screen.command(command);
        let text = self.quietly(command)?;
        self.screen.output(&text);
        Ok(text)
    }
}
