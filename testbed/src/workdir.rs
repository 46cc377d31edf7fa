//! Temporary folders that go away with the process, unless something failed.
//!
//! Each process has one root folder. A small watcher, which holds the other end of a pipe, removes it once the process is
//! gone, also when that was killed. Rust runs no destructors for statics, so that shared planes depend on it.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::error::{Context, Error, Result};

const PREFIX: &str = "etcd-registrar-testbed-";
/// The file in the root folder that says that it stays.
const KEEP: &str = "KEEP";
const LOCK: &str = "LOCK";

/// Waits for the end of its input, which comes when the process is gone, and removes the folder. The components die at
/// the same moment and may still write, hence the attempts.
const WATCHER: &str = r#"trap '' INT TERM HUP
read -r _
for attempt in 1 2 3 4 5 6 7 8 9 10; do
  [ -e "$1/KEEP" ] && exit 0
  rm -rf "$1" 2>/dev/null && [ ! -e "$1" ] && exit 0
  sleep 0.2
done"#;

struct Root {
    path: PathBuf,
    /// Locked for as long as the process lives: tells a folder in use from a leftover.
    _lock: File,
    /// Its standard input is the pipe that the watcher waits on.
    _watcher: Option<Child>,
}

static ROOT: OnceLock<Result<Root, String>> = OnceLock::new();
static COUNTER: AtomicU32 = AtomicU32::new(0);
static TOLD: AtomicBool = AtomicBool::new(false);

fn root() -> Result<&'static Root> {
    ROOT.get_or_init(|| create_root().map_err(|error| error.to_string()))
        .as_ref()
        .map_err(|error| Error::new("temporary folder", error))
}

fn create_root() -> std::io::Result<Root> {
    let temp = std::env::temp_dir();
    remove_leftovers(&temp);
    let path = tempfile::Builder::new()
        .prefix(&format!("{PREFIX}{}-", std::process::id()))
        .tempdir_in(&temp)?
        .keep();
    let lock = File::create(path.join(LOCK))?;
    lock.lock()?;
    // Without a shell the folder is left for the next process to remove.
    let watcher = Command::new("sh")
        .args(["-c", WATCHER, "testbed-watcher"])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // A group of its own, so that Ctrl-C on the terminal does not end it before its work is done.
        .process_group(0)
        .spawn()
        .ok();
    if std::env::var_os("TESTBED_KEEP").is_some() {
        File::create(path.join(KEEP))?;
    }
    Ok(Root {
        path,
        _lock: lock,
        _watcher: watcher,
    })
}

/// Removes the folders of processes that are gone and whose watcher did not get to it (a machine that was switched off).
fn remove_leftovers(temp: &Path) {
    let Ok(entries) = fs::read_dir(temp) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) || path.join(KEEP).exists() {
            continue;
        }
        // A folder without a lock file is one that is just being made, or removed.
        let Ok(lock) = File::open(path.join(LOCK)) else {
            continue;
        };
        if lock.try_lock().is_ok() {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// Keeps the folder of this process and prints where it is, once.
pub fn keep(why: &str) {
    let Ok(root) = root() else { return };
    let _ = File::create(root.path.join(KEEP));
    if !TOLD.swap(true, Ordering::Relaxed) {
        eprintln!(
            "testbed: {why}; logs and data are kept in {}",
            root.path.display()
        );
    }
}

/// Keeps the logs when any thread panics. For planes in statics, which no unwinding drops.
pub(crate) fn keep_on_panic() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            keep("a test failed");
            previous(info);
        }));
    });
}

/// A folder for one component, removed when dropped, unless that happens in a panic.
pub struct WorkDir {
    path: PathBuf,
}

impl WorkDir {
    /// A new folder, with a number and this label for its name.
    pub fn new(label: &str) -> Result<Self> {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = root()?.path.join(format!("{number:03}-{label}"));
        fs::create_dir_all(&path).context("temporary folder", path.display())?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a file that only its owner may read, for it may be a key or a password.
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.path.join(name);
        write_private(&path, content.as_ref()).context("temporary folder", path.display())?;
        Ok(path)
    }
}

/// Replaces a file in one step, so that a reader never sees half of it.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(content)?;
    file.persist(path)?;
    Ok(())
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if std::thread::panicking() {
            keep("a test failed");
            return;
        }
        let kept = root().is_ok_and(|root| root.path.join(KEEP).exists());
        if !kept {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
