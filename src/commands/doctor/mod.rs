//! The command `doctor`: what an operator needs --> whether it is there, and what to do where it is not.
//!
//! Takes the flags of `run`, tries what an operator would do, in ways that change nothing that lasts. Must never write a key, nor say
//! that something is well that it did not see.

mod etcd;
mod kubernetes;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{print, printable, read_policy};
use crate::cli::{EtcdArgs, KubeArgs, NameArgs, duration};

/// `etcd-registrar doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Whose keys are looked at.
    #[command(flatten)]
    pub name: NameArgs,
    /// The policy file of the operator: the prefixes that it grants are tried in etcd.
    #[arg(long, env = "ETCD_REGISTRAR_POLICY_FILE", value_name = "FILE")]
    pub policy_file: Option<PathBuf>,
    /// Look at one side alone.
    #[arg(long, env = "ETCD_REGISTRAR_ONLY", value_name = "SIDE")]
    pub only: Option<Side>,
    /// What is printed.
    #[arg(
        short,
        long,
        env = "ETCD_REGISTRAR_OUTPUT",
        default_value = "text",
        value_name = "OUTPUT"
    )]
    pub output: DoctorOutput,
    /// How long each of them may take to answer.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_TIMEOUT",
        default_value = "5s",
        value_parser = duration,
        value_name = "DURATION"
    )]
    pub timeout: Duration,
    /// Which API server, as whom: the permissions looked at are those of this user.
    #[command(flatten)]
    pub kube: KubeArgs,
    /// Where etcd is.
    #[command(flatten)]
    pub etcd: EtcdArgs,
}

/// A side that is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Side {
    /// etcd.
    Etcd,
    /// Kubernetes.
    Kubernetes,
}

/// What is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DoctorOutput {
    /// A line for each finding, and below it what to do.
    Text,
    /// An array of objects.
    Json,
}

/// How bad a finding is; also the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok = 0,
    /// It works, and may not for long or not as meant.
    Warning = 1,
    /// An operator would not work.
    Error = 2,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

#[derive(Debug, Serialize)]
struct Finding {
    level: Level,
    what: String,
    /// What to do.
    advice: Option<String>,
}

/// What was found, in the order in which it was looked at.
#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, what: impl Into<String>) {
        self.add(Level::Ok, what.into(), None);
    }

    fn warning(&mut self, what: impl Into<String>, advice: impl Into<String>) {
        self.add(Level::Warning, what.into(), Some(advice.into()));
    }

    fn error(&mut self, what: impl Into<String>, advice: impl Into<String>) {
        self.add(Level::Error, what.into(), Some(advice.into()));
    }

    fn add(&mut self, level: Level, what: String, advice: Option<String>) {
        self.0.push(Finding {
            level,
            what: printable(&what),
            advice: advice.map(|advice| printable(&advice)),
        });
    }

    fn worst(&self) -> Level {
        let levels = self.0.iter().map(|finding| finding.level);
        levels.max().unwrap_or(Level::Ok)
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for finding in &self.0 {
            // Writing to a String can't fail.
            let _ = writeln!(text, "{:<7}  {}", finding.level.name(), finding.what);
            if let Some(advice) = &finding.advice {
                let _ = writeln!(text, "         {advice}");
            }
        }
        text
    }
}

/// Looks at everything, and prints what it found.
///
/// # Errors
///
/// When it can't be printed.
pub async fn run(args: &DoctorArgs) -> Result<ExitCode, String> {
    let mut findings = Findings::default();
    let policy = match read_policy(args.policy_file.as_deref()) {
        Ok(policy) => {
            if let Some(file) = &args.policy_file {
                findings.ok(format!("the policy file {} can be read", file.display()));
            }
            policy
        }
        Err(why) => {
            let advice = "mend it (docs/policy.md); the operator would not start with it";
            findings.error(why, advice);
            crate::accept::policy::Policy::default()
        }
    };
    let uid = match args.only {
        Some(Side::Etcd) => None,
        None | Some(Side::Kubernetes) => kubernetes::look(args, &mut findings).await,
    };
    if args.only != Some(Side::Kubernetes) {
        etcd::look(args, &policy, uid.as_deref(), &mut findings).await;
    }
    match args.output {
        DoctorOutput::Text => print(&findings.text())?,
        DoctorOutput::Json => {
            let text = serde_json::to_string_pretty(&findings.0).unwrap_or_default();
            print(&format!("{text}\n"))?;
        }
    }
    Ok(ExitCode::from(findings.worst() as u8))
}

/// The major and minor number of a version such as `v1.36.3` or `3.6.16`.
fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?;
    let digits = minor.find(|c: char| !c.is_ascii_digit());
    let minor = minor.get(..digits.unwrap_or(minor.len()))?.parse().ok()?;
    Some((major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(numbers("v1.36.3"), Some((1, 36)));
        assert_eq!(numbers("3.6.16"), Some((3, 6)));
        assert_eq!(numbers("v1.30+"), Some((1, 30)));
        assert_eq!(numbers("v1.29.0-gke.1"), Some((1, 29)));
        assert_eq!(numbers("odd"), None);
    }

    #[test]
    fn the_exit_code_is_that_of_the_worst_finding() {
        let mut findings = Findings::default();
        assert_eq!(findings.worst() as u8, 0);
        findings.ok("fine");
        findings.warning("odd", "look");
        assert_eq!(findings.worst() as u8, 1);
        findings.error("bad", "mend");
        findings.ok("fine\n");
        assert_eq!(findings.worst() as u8, 2);
        assert_eq!(
            findings.text(),
            "ok       fine\nwarning  odd\n         look\nerror    bad\n         mend\nok       fine?\n"
        );
    }
}
