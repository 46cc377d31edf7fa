//! The binaries that the harness runs: built once from the pinned Go modules, or those that the user has already.
//!
//! A binary is looked for, in this order: in the folder `KUBEBUILDER_ASSETS`; for the command line tools and when an
//! existing cluster is used, on the `PATH`; in the user's cache folder, where it is built on first use. Programs of a
//! test's own modules are only built.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::process::lock;

const GO_MOD: &str = include_str!("../go.mod");
const GO_SUM: &str = include_str!("../go.sum");
const HELM_GO_MOD: &str = include_str!("../helm/go.mod");
const HELM_GO_SUM: &str = include_str!("../helm/go.sum");
const OLD_GO_MOD: &str = include_str!("../old-kubernetes/go.mod");
const OLD_GO_SUM: &str = include_str!("../old-kubernetes/go.sum");
/// How often a plain progress line is printed when there is no terminal.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(15);

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

/// Those of an older Kubernetes, which are called as they are made.
const OLD_BINARIES: [&str; 3] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
];

/// As it is made and called.
const HELM: &str = "helm";

/// The path of the binary `name`, such as `etcd` or `kubectl`; builds it, and those that are built with it, if need be.
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
    let folder = if name == HELM { helm()? } else { plane()? };
    Ok(folder.join(name))
}

/// The folders with every binary, built from source if they are not there yet.
pub fn built() -> Result<[PathBuf; 2]> {
    Ok([plane()?, helm()?])
}

/// The folder of a control plane two minor versions older than the testbed's, built from source if it is not there yet:
/// for `KUBEBUILDER_ASSETS`.
pub fn old_kubernetes() -> Result<PathBuf> {
    Module::old_kubernetes().build_once(&cache_folder()?)
}

/// The folder of the control plane, etcd and kwok.
fn plane() -> Result<PathBuf> {
    static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);
    folder_of(&FOLDER, Module::tools)
}

/// The folder of helm, whose module is its own.
fn helm() -> Result<PathBuf> {
    static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);
    folder_of(&FOLDER, Module::helm)
}

/// Looked for once a process, by one thread at a time.
fn folder_of(known: &Mutex<Option<PathBuf>>, module: fn() -> Module) -> Result<PathBuf> {
    let mut known = lock(known);
    if let Some(folder) = &*known {
        return Ok(folder.clone());
    }
    let folder = module().build_once(&cache_folder()?)?;
    Ok(known.insert(folder).clone())
}

/// The program of the Go module in `folder`, such as `tests/interop/clients`, built from source if it is not there yet. It
/// is called as the last segment of the module's path.
pub fn program(folder: &Path) -> Result<PathBuf> {
    let module = Module::read(folder)?;
    let built = module.build_once(&cache_folder()?)?;
    let (_, name) = module
        .binaries
        .first()
        .ok_or_else(|| Error::new("tools", format!("{}: no program", folder.display())))?;
    Ok(built.join(name))
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

/// The version of a module in a go.mod, without the `v`.
fn module_version(manifest: &'static str, module: &str) -> &'static str {
    manifest
        .lines()
        .filter_map(|line| line.trim().strip_prefix(module)?.split_whitespace().next())
        .find_map(|version| version.strip_prefix('v'))
        .unwrap_or("0.0.0")
}

/// The linker's flags: no debug information, and the version that `kubectl version` and the API server tell.
fn linker_flags(manifest: &'static str) -> String {
    let kubernetes = module_version(manifest, KUBERNETES);
    let mut parts = kubernetes.split('.');
    let (major, minor) = (parts.next().unwrap_or("0"), parts.next().unwrap_or("0"));
    let mut flags = SMALL.to_owned();
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

/// No debug information, which nobody reads.
const SMALL: &str = "-s -w";

/// Its line in a go.mod.
const KUBERNETES: &str = "k8s.io/kubernetes ";

/// A Go module with programs to build.
struct Module {
    /// How its folders in the cache begin.
    name: String,
    /// Its files, go.mod and go.sum first.
    files: Vec<(String, String)>,
    /// What `go build` is to build.
    target: &'static str,
    linker_flags: String,
    /// What `go build` makes, and how it is called afterwards.
    binaries: Vec<(String, String)>,
    /// What is said before it is built.
    announcement: String,
}

/// The files of a module that has no code of its own.
fn files(manifest: &str, sums: &str) -> Vec<(String, String)> {
    [("go.mod", manifest), ("go.sum", sums)]
        .map(|(name, text)| (name.to_owned(), text.to_owned()))
        .to_vec()
}

impl Module {
    /// The tools of the harness.
    fn tools() -> Self {
        Self {
            name: "tools".to_owned(),
            files: files(GO_MOD, GO_SUM),
            target: "tool",
            linker_flags: linker_flags(GO_MOD),
            binaries: BINARIES
                .map(|(made, name)| (made.to_owned(), name.to_owned()))
                .to_vec(),
            announcement: format!(
                "building Kubernetes {}, etcd {} and kwok {} from source; once, about 7 minutes on two cores",
                module_version(GO_MOD, KUBERNETES),
                module_version(GO_MOD, "go.etcd.io/etcd/server/v3 "),
                module_version(GO_MOD, "sigs.k8s.io/kwok "),
            ),
        }
    }

    /// An older control plane.
    fn old_kubernetes() -> Self {
        Self {
            name: "old-kubernetes".to_owned(),
            files: files(OLD_GO_MOD, OLD_GO_SUM),
            target: "tool",
            linker_flags: linker_flags(OLD_GO_MOD),
            binaries: OLD_BINARIES
                .map(|name| (name.to_owned(), name.to_owned()))
                .to_vec(),
            announcement: format!(
                "building Kubernetes {} from source; once, about 6 minutes on two cores",
                module_version(OLD_GO_MOD, KUBERNETES),
            ),
        }
    }

    /// helm, for the chart.
    fn helm() -> Self {
        Self {
            name: HELM.to_owned(),
            files: files(HELM_GO_MOD, HELM_GO_SUM),
            target: "tool",
            linker_flags: SMALL.to_owned(),
            binaries: vec![(HELM.to_owned(), HELM.to_owned())],
            announcement: format!(
                "building helm {} from source; once, about 2 minutes on two cores",
                module_version(HELM_GO_MOD, "helm.sh/helm/v4 "),
            ),
        }
    }

    /// The program in a folder without subfolders that matter: its go.mod, go.sum and Go files.
    fn read(folder: &Path) -> Result<Self> {
        let text = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).context("tools", path.display())
        };
        let manifest = text("go.mod")?;
        // `module example.com/interop/clients` makes `interop-clients`, and its program is `clients`.
        let name = manifest
            .lines()
            .find_map(|line| line.strip_prefix("module ")?.trim().split_once('/'))
            .map(|(_, path)| path.replace('/', "-"))
            .ok_or_else(|| Error::new("tools", format!("{}: no module path", folder.display())))?;
        let binary = name.rsplit('-').next().unwrap_or(&name).to_owned();
        let mut sources = Vec::new();
        for entry in fs::read_dir(folder).context("tools", folder.display())? {
            let file = entry
                .context("tools", folder.display())?
                .file_name()
                .to_string_lossy()
                .into_owned();
            if Path::new(&file)
                .extension()
                .is_some_and(|extension| extension == "go")
            {
                sources.push(file);
            }
        }
        sources.sort();
        let mut files = vec![
            ("go.mod".to_owned(), manifest),
            ("go.sum".to_owned(), text("go.sum")?),
        ];
        for file in sources {
            let content = text(&file)?;
            files.push((file, content));
        }
        Ok(Self {
            announcement: format!("building {} from source; once", folder.display()),
            name,
            files,
            target: ".",
            linker_flags: SMALL.to_owned(),
            binaries: vec![(binary.clone(), binary)],
        })
    }

    fn build_args(&self) -> Vec<String> {
        ["build", "-v", "-trimpath", "-ldflags"]
            .into_iter()
            .map(str::to_owned)
            .chain([self.linker_flags.clone()])
            .collect()
    }

    /// FNV-1a, which stays the same between versions of Rust, as the hasher of the standard library need not.
    fn fingerprint(&self) -> String {
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        let flags = self.build_args().join(" ");
        let contents = self.files.iter().map(|(_, content)| content.as_str());
        for byte in contents.chain([flags.as_str()]).flat_map(str::bytes) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        format!("{hash:016x}")
    }

    fn is_complete(&self, folder: &Path) -> bool {
        self.binaries
            .iter()
            .all(|(_, name)| folder.join(name).is_file())
    }

    /// The folder with its binaries, built if it is not there yet.
    fn build_once(&self, cache: &Path) -> Result<PathBuf> {
        let name = &self.name;
        let folder = cache.join(format!("{name}-{}", self.fingerprint()));
        if self.is_complete(&folder) {
            return Ok(folder);
        }
        let doing = |what: &str| format!("{what} {}", cache.display());
        fs::create_dir_all(cache).context("tools", doing("create"))?;
        // Two test runs at a time would build the same thing twice.
        let lock_file =
            File::create(cache.join(format!("{name}.lock"))).context("tools", doing("lock"))?;
        if lock_file.try_lock().is_err() {
            eprintln!("{name}: another process is building this; waiting for it");
            lock_file.lock().context("tools", doing("lock"))?;
        }
        if self.is_complete(&folder) {
            return Ok(folder);
        }
        // What builds left that were killed; with the lock held, none of them goes on.
        let scratches = format!("{name}-build-");
        for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&scratches) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let scratch = tempfile::Builder::new()
            .prefix(&scratches)
            .tempdir_in(cache)
            .context("tools", doing("temporary folder in"))?;
        let bin = self.build(scratch.path())?;
        for (made, name) in &self.binaries {
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
        eprintln!("{name}: ready in {}", folder.display());
        Ok(folder)
    }

    /// Builds its programs in `scratch`, and gives the folder of the binaries.
    fn build(&self, scratch: &Path) -> Result<PathBuf> {
        for (file, content) in &self.files {
            fs::write(scratch.join(file), content).context("tools", format!("write {file}"))?;
        }
        let bin = scratch.join("bin");
        fs::create_dir(&bin).context("tools", "create bin")?;
        let mut command = Command::new("go");
        command
            .args(self.build_args())
            .arg("-o")
            .arg(&bin)
            .arg(self.target)
            .current_dir(scratch)
            .env("CGO_ENABLED", "0")
            .env("GOFLAGS", "-mod=readonly")
            .env("GOWORK", "off")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        eprintln!("{}: {}", self.name, self.announcement);
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
        let mut progress = Progress::new(&self.name);
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
                    .with_command(format!("go build {}", self.target)),
            )
        }
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
    name: String,
    start: Instant,
    shown: Option<Instant>,
    terminal: bool,
    packages: BTreeSet<String>,
    downloads: usize,
}

impl Progress {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
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
            "{}: {} modules downloaded, {} packages compiled, {}:{:02}",
            self.name,
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
        assert!(module_version(GO_MOD, KUBERNETES).starts_with("1."));
        assert!(module_version(GO_MOD, "go.etcd.io/etcd/server/v3 ").starts_with("3."));
        assert!(linker_flags(GO_MOD).contains("version.gitMajor=1"));
        // What the page on Kubernetes says was tried: two minor versions back.
        let minor = |manifest| {
            let version = module_version(manifest, KUBERNETES);
            version.split('.').nth(1)?.parse::<u32>().ok()
        };
        assert_eq!(minor(GO_MOD), minor(OLD_GO_MOD).map(|older| older + 2));
        assert!(module_version_of_go().starts_with("1."));
    }

    #[test]
    fn the_fingerprint_is_stable() {
        let module = Module::tools();
        assert_eq!(module.fingerprint(), Module::tools().fingerprint());
        assert_ne!(module.fingerprint(), Module::helm().fingerprint());
        assert_eq!(module.fingerprint().len(), 16);
    }

    #[test]
    fn a_module_is_known_by_all_that_is_built() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(folder.path().join(file), text).unwrap();
        write("go.mod", "module example.com/some/client\n\ngo 1.26.0\n");
        write("go.sum", "");
        write("main.go", "package main\n");
        write("notes.txt", "not built");
        let module = Module::read(folder.path()).unwrap();
        assert_eq!(module.name, "some-client");
        assert_eq!(
            module.binaries,
            [("client".to_owned(), "client".to_owned())]
        );
        let files: Vec<&str> = module.files.iter().map(|(file, _)| file.as_str()).collect();
        assert_eq!(files, ["go.mod", "go.sum", "main.go"]);
        write("notes.txt", "changed");
        let same = Module::read(folder.path()).unwrap();
        assert_eq!(module.fingerprint(), same.fingerprint());
        write("main.go", "package main // changed\n");
        let changed = Module::read(folder.path()).unwrap();
        assert_ne!(module.fingerprint(), changed.fingerprint());
    }

    #[test]
    fn progress_tells_packages_from_errors() {
        let mut progress = Progress::new("tools");
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
