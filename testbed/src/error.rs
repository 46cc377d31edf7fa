//! The one error type of the harness.

use std::fmt;
use std::path::{Path, PathBuf};

/// How many lines of a component's log an error carries.
const TAIL_LINES: usize = 25;

/// What went wrong, in which component, and what its log said last.
///
/// `Debug` prints the same as `Display`, so that a test's `unwrap` is readable.
pub struct Error(Box<Details>);

struct Details {
    component: String,
    message: String,
    command: Option<String>,
    log: Option<(PathBuf, String)>,
    port_taken: bool,
}

/// A result with the harness's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `component`, such as `etcd` or `kube-apiserver`.
    pub fn new(component: impl Into<String>, message: impl fmt::Display) -> Self {
        Self(Box::new(Details {
            component: component.into(),
            message: message.to_string(),
            command: None,
            log: None,
            port_taken: false,
        }))
    }

    /// Marks that another process has the port, so that another port may do.
    pub(crate) fn with_port_taken(mut self, taken: bool) -> Self {
        self.0.port_taken = taken;
        self
    }

    /// Whether it failed because another process has a port that it was to have.
    pub fn is_port_taken(&self) -> bool {
        self.0.port_taken
    }

    /// Adds the command that failed.
    #[must_use]
    pub fn with_command(mut self, command: impl Into<String>) -> Self {
        self.0.command = Some(command.into());
        self
    }

    /// Adds the end of a log file, when there is one.
    #[must_use]
    pub fn with_log(mut self, path: &Path) -> Self {
        if let Ok(bytes) = std::fs::read(path) {
            let text = tail(&String::from_utf8_lossy(&bytes), TAIL_LINES);
            self.0.log = Some((path.to_path_buf(), text));
        }
        self
    }

    /// The component that the error is about.
    pub fn component(&self) -> &str {
        &self.0.component
    }

    /// What went wrong, without the command and the log.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The end of the component's log, if the error has one.
    pub fn log_tail(&self) -> Option<&str> {
        self.0.log.as_ref().map(|(_, text)| text.as_str())
    }
}

/// The last `lines` lines of `text`.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    let skip = all.len().saturating_sub(lines);
    all.into_iter().skip(skip).collect::<Vec<_>>().join("\n")
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.component, self.0.message)?;
        if let Some(command) = &self.0.command {
            write!(f, "\n  command: {command}")?;
        }
        if let Some((path, text)) = &self.0.log {
            write!(f, "\n  end of {}:", path.display())?;
            for line in text.lines() {
                write!(f, "\n    {line}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {}

/// Turns any error into one of a component, saying what was being done.
pub(crate) trait Context<T> {
    fn context(self, component: &str, doing: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, component: &str, doing: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Error::new(component, format!("{doing}: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_keeps_the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 2), "a");
        assert_eq!(tail("", 2), "");
    }
}
