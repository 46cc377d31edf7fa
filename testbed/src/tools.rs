//! The binaries that the harness runs: built once from the pinned Go modules, or those that the user has already.
//!
//! A binary is looked for, in this order: in the folder `KUBEBUILDER_ASSETS`; for the command line tools and when an
//! existing cluster is used, on the `PATH`; in the user's cache folder, where it is built on first use.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::process::lock;

const GO_MOD: &str = include_str!("../go.mod");
const GO_SUM: &str = include_str!("../go.sum");
/// How often a plain progress line is printed when there is no terminal.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(15);

/// How the folders begin in which a build goes on.
const SCRATCH: &str = "tools-build-";

/// What `go build tool` makes, and how it is called afterwards.
const BINARIES: [(&str, &str); 8] = [
    ("kube-apiserver", "kube-apiserver"),
    ("kube-controller-manager", "kube-controller-manager"),
    ("kube-scheduler", "kube-scheduler"),
    ("kubectl", "kubectl"),
    ("kwok", "kwok"),
    // The module's path ends in "server".
    ("server", "etcd"),
    ("etcdctl", "etcdctl"),
    ("etcdutl", "etcdutl"),
];

/// The path of the binary `name`, such as `etcd` or `kubectl`; builds all of them if need be.
pub fn path(name: &str) -> Result<PathBuf> {
    if let Some(assets) = non_empty_env("KUBEBUILDER_ASSETS") {
        let path = Path::new(&assets).join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    if external_kubeconfig().is_some() || external_etcd().is_some() {
        let found = std::env::var_os("PATH")
            .into_iter()
            .flat_map(|paths| std::env::split_paths(&paths).collect::<Vec<_>>())
            .map(|folder| folder.join(name))
            .find(|path| path.is_file());
        if let Some(path) = found {
            return Ok(path);
        }
    }
    Ok(built()?.join(name))
}

/// The folder with every binary, built from source if it is not there yet.
pub fn built() -> Result<PathBuf> {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    static BUILDING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = lock(&BUILDING);
    if let Some(folder) = FOLDER.get() {
        return Ok(folder.clone());
    }
    let folder = build_once(&cache_folder()?)?;
    Ok(FOLDER.get_or_init(|| folder).clone())
}

/// The kubeconfig of a cluster of the user's own, from `TESTBED_KUBECONFIG`.
pub(crate) fn external_kubeconfig() -> Option<PathBuf> {
    non_empty_env("TESTBED_KUBECONFIG").map(PathBuf::from)
}

/// The endpoints of an etcd of the user's own, from `TESTBED_ETCD_ENDPOINTS`.
pub(crate) fn external_etcd() -> Option<Vec<String>> {
    let value = non_empty_env("TESTBED_ETCD_ENDPOINTS")?
        .into_string()
        .ok()?;
    Some(
        value
            .split(',')
            .map(|endpoint| endpoint.trim().to_owned())
            .collect(),
    )
}

fn non_empty_env(name: &str) -> Option<std::ffi::OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

fn cache_folder() -> Result<PathBuf> {
    let base = match (non_empty_env("XDG_CACHE_HOME"), non_empty_env("HOME")) {
        (Some(cache), _) => PathBuf::from(cache),
        (None, Some(home)) => Path::new(&home).join(".cache"),
        (None, None) => {
            return Err(Error::new(
                "tools",
                "neither XDG_CACHE_HOME nor HOME is set",
            ));
        }
    };
    Ok(base.join("etcd-registrar"))
}

/// The version of a module in go.mod, without the `v`.
fn module_version(module: &str) -> &'static str {
    GO_MOD
        .lines()
        .filter_map(|line| line.trim().strip_prefix(module)?.split_whitespace().next())
        .find_map(|version| version.strip_prefix('v'))
        .unwrap_or("0.0.0")
}

/// The linker's flags: no debug information, and the version that `kubectl version` and the API server tell.
fn linker_flags() -> String {
    let kubernetes = module_version("k8s.io/kubernetes ");
    let mut parts = kubernetes.split('.');
    let (major, minor) = (parts.next().unwrap_or("0"), parts.next().unwrap_or("0"));
    let mut flags = "-s -w".to_owned();
    for package in [
        "k8s.io/component-base/version",
        "k8s.io/client-go/pkg/version",
    ] {
        flags += &format!(
            " -X {package}.gitVersion=v{kubernetes} -X {package}.gitMajor={major} -X {package}.gitMinor={minor} \
             -X {package}.gitTreeState=clean"
        );
    }
    flags
}

fn build_args() -> Vec<String> {
    ["build", "-v", "-trimpath", "-ldflags"]
        .into_iter()
        .map(str::to_owned)
        .chain([linker_flags()])
        .collect()
}

/// FNV-1a, which stays the same between versions of Rust, as the hasher of the standard library need not.
fn fingerprint() -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let flags = build_args().join(" ");
    for byte in GO_MOD.bytes().chain(GO_SUM.bytes()).chain(flags.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("{hash:016x}")
}

fn is_complete(folder: &Path) -> bool {
    BINARIES.iter().all(|(_, name)| folder.join(name).is_file())
}

fn build_once(cache: &Path) -> Result<PathBuf> {
    let folder = cache.join(format!("tools-{}", fingerprint()));
    if is_complete(&folder) {
        return Ok(folder);
    }
    let doing = |what: &str| format!("{what} {}", cache.display());
    fs::create_dir_all(cache).context("tools", doing("create"))?;
    // Two test runs at a time would build the same thing twice.
    let lock_file = File::create(cache.join("tools.lock")).context("tools", doing("lock"))?;
    if lock_file.try_lock().is_err() {
        eprintln!("tools: another process is building them; waiting for it");
        lock_file.lock().context("tools", doing("lock"))?;
    }
    if is_complete(&folder) {
        return Ok(folder);
    }
    // What builds left that were killed; with the lock held, none of them goes on.
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(SCRATCH) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let scratch = tempfile::Builder::new()
        .prefix(SCRATCH)
        .tempdir_in(cache)
        .context("tools", doing("temporary folder in"))?;
    let bin = build(scratch.path())?;
    for (made, name) in BINARIES {
        if made != name {
            fs::rename(bin.join(made), bin.join(name))
                .context("tools", format!("rename {made}"))?;
        }
    }
    if folder.exists() {
        fs::remove_dir_all(&folder).context(
            "tools",
            format!("remove the incomplete {}", folder.display()),
        )?;
    }
    fs::rename(&bin, &folder).context("tools", format!("rename to {}", folder.display()))?;
    eprintln!("tools: ready in {}", folder.display());
    Ok(folder)
}

/// Builds every tool of the module in `scratch`, and gives the folder of the binaries.
fn build(scratch: &Path) -> Result<PathBuf> {
    fs::write(scratch.join("go.mod"), GO_MOD).context("tools", "write go.mod")?;
    fs::write(scratch.join("go.sum"), GO_SUM).context("tools", "write go.sum")?;
    let bin = scratch.join("bin");
    fs::create_dir(&bin).context("tools", "create bin")?;
    let mut command = Command::new("go");
    command
        .args(build_args())
        .arg("-o")
        .arg(&bin)
        .arg("tool")
        .current_dir(scratch)
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "-mod=readonly")
        .env("GOWORK", "off")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    eprintln!(
        "tools: building Kubernetes {}, etcd {} and kwok {} from source; once, about 7 minutes on two cores",
        module_version("k8s.io/kubernetes "),
        module_version("go.etcd.io/etcd/server/v3 "),
        module_version("sigs.k8s.io/kwok "),
    );
    let mut child = command.spawn().map_err(|error| {
        let go = module_version_of_go();
        let message = match error.kind() {
            std::io::ErrorKind::NotFound => {
                format!("Go is missing: install Go {go} or newer (https://go.dev/dl/), or set KUBEBUILDER_ASSETS")
            }
            _ => format!("go: {error}"),
        };
        Error::new("tools", message)
    })?;
    let stderr = child.stderr.take();
    let (sender, lines) = channel();
    if let Some(stderr) = stderr {
        std::thread::spawn(move || {
            for line in BufReader::new(stderr)
                .lines()
                .map_while(std::io::Result::ok)
            {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
    }
    let mut progress = Progress::new();
    let mut errors = Vec::new();
    loop {
        match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(line) => progress.line(&line, &mut errors),
            Err(RecvTimeoutError::Timeout) => progress.show(),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    progress.end();
    let status = child.wait().context("tools", "go build")?;
    if status.success() {
        Ok(bin)
    } else {
        let last = crate::error::tail(&errors.join("\n"), 20);
        Err(
            Error::new("tools", format!("go build failed ({status}):\n{last}"))
                .with_command("go build tool"),
        )
    }
}

fn module_version_of_go() -> &'static str {
    GO_MOD
        .lines()
        .find_map(|line| line.strip_prefix("go "))
        .unwrap_or("1.26")
}

/// Shows how far the build is: one line that changes on a terminal, a line now and then otherwise.
struct Progress {
    start: Instant,
    shown: Option<Instant>,
    terminal: bool,
    packages: BTreeSet<String>,
    downloads: usize,
}

impl Progress {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            shown: None,
            terminal: std::io::stderr().is_terminal(),
            packages: BTreeSet::new(),
            downloads: 0,
        }
    }

    /// Takes a line of `go build -v`: a package's path, a download, or something worth telling when it fails.
    fn line(&mut self, line: &str, errors: &mut Vec<String>) {
        if line.starts_with("go: downloading ") {
            self.downloads += 1;
        } else if !line.contains(char::is_whitespace) {
            self.packages.insert(line.to_owned());
        } else {
            errors.push(line.to_owned());
        }
        self.show();
    }

    fn show(&mut self) {
        let interval = if self.terminal {
            Duration::from_millis(200)
        } else {
            PROGRESS_INTERVAL
        };
        if self.shown.is_some_and(|shown| shown.elapsed() < interval) {
            return;
        }
        self.shown = Some(Instant::now());
        let seconds = self.start.elapsed().as_secs();
        let text = format!(
            "tools: {} modules downloaded, {} packages compiled, {}:{:02}",
            self.downloads,
            self.packages.len(),
            seconds / 60,
            seconds % 60
        );
        if self.terminal {
            eprint!("\r{text}\x1b[K");
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{text}");
        }
    }

    fn end(&mut self) {
        self.shown = None;
        self.show();
        if self.terminal {
            eprintln!();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_come_from_go_mod() {
        assert!(module_version("k8s.io/kubernetes ").starts_with("1."));
        assert!(module_version("go.etcd.io/etcd/server/v3 ").starts_with("3."));
        assert!(linker_flags().contains("version.gitMajor=1"));
        assert!(module_version_of_go().starts_with("1."));
    }

    #[test]
    fn the_fingerprint_is_stable() {
        assert_eq!(fingerprint(), fingerprint());
        assert_eq!(fingerprint().len(), 16);
    }

    #[test]
    fn progress_tells_packages_from_errors() {
        let mut progress = Progress::new();
        let mut errors = Vec::new();
        for line in [
            "go: downloading a v1",
            "k8s.io/api/core/v1",
            "x.go:1:2: undefined: y",
        ] {
            progress.line(line, &mut errors);
        }
        assert_eq!(
            (progress.downloads, progress.packages.len(), errors.len()),
            (1, 1, 1)
        );
    }
}
