//! Commands and flags --> what to do.
//!
//! Takes the command line and the environment, gives checked settings. Must never connect to anything.
//! Every flag has an environment variable; the flags for etcd are the same in every command and are named
//! as etcdctl names them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::commands::diff::DiffArgs;
use crate::commands::doctor::DoctorArgs;
use crate::commands::register::RegisterArgs;
use crate::commands::tree::TreeArgs;
use crate::format::Format;
use crate::kube::client::ClientOptions;
use crate::model::names;
use crate::registry::connection::Settings;
use crate::version::BUILD;

/// Registers the ready endpoints of Kubernetes pods in etcd.
#[derive(Debug, Parser)]
#[command(name = "etcd-registrar", version = BUILD.as_str(), about, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The exit code where etcd answered, and has no such endpoint: 1 is a failure, and 2 a flag that is wrong.
pub const NONE: u8 = 3;

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the operator: register what ServiceRegistrations select, until SIGTERM.
    Run(Box<RunArgs>),
    /// Print the CustomResourceDefinition as YAML, for `kubectl apply -f -`.
    Crd,
    /// Remove all records of a cluster from etcd and free its name. Its operator must not run.
    Purge(Box<PurgeArgs>),
    /// Print where a service can be reached: its endpoints of every cluster, in any format of the registry.
    ///
    /// The exit code is 0 when there are endpoints, 3 when there are none, 1 when etcd does not answer, and 2 when a
    /// flag is wrong.
    Discover(Box<DiscoverArgs>),
    /// Register a process outside Kubernetes, for as long as it runs and passes its check.
    ///
    /// With a COMMAND after `--` it is started, registered when its check passes, and taken out at once when that fails or the
    /// process ends. SIGTERM and SIGINT first take it out of the registry and are then passed on. The exit code is that of the
    /// COMMAND; 126 or 127 when it can't be run or is not found. Without a COMMAND it runs until SIGTERM.
    Register(Box<RegisterArgs>),
    /// Print the registry by namespace, service and cluster, with the time that is left on the leases.
    ///
    /// The exit code is 0 when there are endpoints, 3 when there are none, 1 when etcd does not answer, and 2 when a
    /// flag is wrong.
    Tree(Box<TreeArgs>),
    /// Compare what Kubernetes wants with what etcd holds, by the operator's own rules.
    ///
    /// A line for each key that differs: `+` is wanted and not there, `~` is there in another way, `-` is there and wanted by
    /// nobody. What an operator is about to write shows, too. The exit code is 0 when nothing differs, 1 when something does,
    /// and 2 when that can't be told.
    Diff(Box<DiffArgs>),
    /// Look whether an operator has what it needs, and say what to do where it has not.
    ///
    /// It tries etcd and Kubernetes as an operator would, and writes nothing that lasts. Each finding is a line, and below it what
    /// to do. The exit code is 0 when all is well, 1 when there are warnings, and 2 when there are errors.
    Doctor(Box<DoctorArgs>),
    /// Print the script that completes commands and flags in a shell.
    ///
    /// For bash: `source <(etcd-registrar completions bash)`.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Print the page for `man`, of the program or of one of its commands.
    ///
    /// To read one: `man <(etcd-registrar man discover)`.
    Man {
        /// The command.
        #[arg(value_name = "COMMAND")]
        command: Option<String>,
        /// Write all pages into this folder instead.
        #[arg(
            long,
            env = "ETCD_REGISTRAR_MAN_FOLDER",
            conflicts_with = "command",
            value_name = "FOLDER"
        )]
        man_folder: Option<PathBuf>,
    },
}

/// Where etcd is, and how to log in.
#[derive(Debug, Args)]
#[command(next_help_heading = "etcd")]
pub struct EtcdArgs {
    /// URLs of the etcd members, separated by commas.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_ETCD_ENDPOINTS",
        // Somebody may have put a password into it, which is refused later and must not be shown before.
        hide_env_values = true,
        value_delimiter = ',',
        default_value = "http://127.0.0.1:2379",
        value_name = "URL,..."
    )]
    pub etcd_endpoints: Vec<String>,
    /// The CA that signed etcd's certificates (PEM); without it, those of the system.
    #[arg(long, env = "ETCD_REGISTRAR_ETCD_CACERT", value_name = "FILE")]
    pub etcd_cacert: Option<PathBuf>,
    /// The client certificate (PEM).
    #[arg(long, env = "ETCD_REGISTRAR_ETCD_CERT", value_name = "FILE")]
    pub etcd_cert: Option<PathBuf>,
    /// The private key of the client certificate (PEM).
    #[arg(long, env = "ETCD_REGISTRAR_ETCD_KEY", value_name = "FILE")]
    pub etcd_key: Option<PathBuf>,
    /// The user of etcd; its password comes from --etcd-password-file.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_ETCD_USER",
        hide_env_values = true,
        value_name = "NAME"
    )]
    pub etcd_user: Option<String>,
    /// The file that holds the user's password.
    #[arg(long, env = "ETCD_REGISTRAR_ETCD_PASSWORD_FILE", value_name = "FILE")]
    pub etcd_password_file: Option<PathBuf>,
}

impl EtcdArgs {
    /// The settings of a connection.
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings {
            endpoints: self
                .etcd_endpoints
                .iter()
                .map(|url| url.trim().to_owned())
                .collect(),
            cacert: self.etcd_cacert.clone(),
            cert: self.etcd_cert.clone(),
            key: self.etcd_key.clone(),
            user: self.etcd_user.clone(),
            password_file: self.etcd_password_file.clone(),
        }
    }
}

/// Which API server, as whom.
#[derive(Debug, Args)]
#[command(next_help_heading = "Kubernetes")]
pub struct KubeArgs {
    /// The kubeconfig file; by default as kubectl, then the pod's own ServiceAccount.
    #[arg(long, env = "ETCD_REGISTRAR_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig.
    #[arg(long, env = "ETCD_REGISTRAR_CONTEXT", value_name = "NAME")]
    pub context: Option<String>,
}

impl KubeArgs {
    /// The options of a client.
    #[must_use]
    pub fn options(&self) -> ClientOptions {
        ClientOptions {
            kubeconfig: self.kubeconfig.clone(),
            context: self.context.clone(),
        }
    }
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For a person.
    Text,
    /// A JSON object a line.
    Json,
}

/// Whose keys these are.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// The name of this Kubernetes cluster in etcd: a DNS label that no other cluster has.
    #[arg(long, env = "ETCD_REGISTRAR_CLUSTER_NAME", value_parser = cluster_name, value_name = "NAME")]
    pub cluster_name: String,
    /// Where the operator's own keys stand in etcd; no registration may write there.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_REGISTRAR_PREFIX",
        default_value = "/registrar/",
        value_parser = registrar_prefix,
        value_name = "PREFIX"
    )]
    pub registrar_prefix: String,
}

/// `etcd-registrar run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Whose keys these are.
    #[command(flatten)]
    pub name: NameArgs,
    /// The policy file: who may write where, how much, and whether removals are held when many pods stop being ready at
    /// once. Without it each namespace may use the Json format below /services/<namespace>/, and nothing is held. It is
    /// read again when it changes.
    #[arg(long, env = "ETCD_REGISTRAR_POLICY_FILE", value_name = "FILE")]
    pub policy_file: Option<PathBuf>,
    /// The TTL of the leader key: so long after a crash the next replica takes over.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_ELECTION_TTL",
        default_value = "5s",
        value_parser = election_ttl,
        value_name = "DURATION"
    )]
    pub election_ttl: Duration,
    /// After how long without Kubernetes the leases are left to expire; 0: never.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_MAX_STALENESS",
        default_value = "0",
        value_parser = duration,
        value_name = "DURATION"
    )]
    pub max_staleness: Duration,
    /// Where /healthz, /readyz and /metrics are served.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_LISTEN",
        default_value = "0.0.0.0:8080",
        value_name = "ADDRESS"
    )]
    pub listen: SocketAddr,
    /// How the log is written.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_LOG_FORMAT",
        default_value = "text",
        value_name = "FORMAT"
    )]
    pub log_format: LogFormat,
    /// How much is logged: error, warn, info, debug or trace, also by module (etcd_registrar::kube=debug).
    #[arg(
        long,
        env = "ETCD_REGISTRAR_LOG_LEVEL",
        default_value = "info",
        value_name = "LEVEL"
    )]
    pub log_level: String,
    /// Which API server.
    #[command(flatten)]
    pub kube: KubeArgs,
    /// Watch only this namespace; may be given several times. Roles are then enough: Nodes are not read, so that only pods
    /// with the label topology.kubernetes.io/zone have a zone, and the cluster is known by the UID of the operator's own
    /// namespace. Without it all namespaces are watched.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_NAMESPACE",
        value_delimiter = ',',
        value_parser = namespace,
        value_name = "NAME",
        help_heading = "Kubernetes"
    )]
    pub namespace: Vec<String>,
    /// Where etcd is.
    #[command(flatten)]
    pub etcd: EtcdArgs,
}

impl RunArgs {
    /// The namespaces that are watched, each once; empty: all.
    #[must_use]
    pub fn namespaces(&self) -> BTreeSet<String> {
        self.namespace.iter().cloned().collect()
    }
}

/// `etcd-registrar purge`.
#[derive(Debug, Args)]
pub struct PurgeArgs {
    /// Whose keys are removed.
    #[command(flatten)]
    pub name: NameArgs,
    /// The UID of the cluster (of its kube-system namespace); needed where several are found.
    #[arg(long, env = "ETCD_REGISTRAR_UID", value_name = "UID")]
    pub uid: Option<String>,
    /// Where etcd is.
    #[command(flatten)]
    pub etcd: EtcdArgs,
}

/// What is printed of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// Aligned columns, for a person.
    Table,
    /// The same with all that is known.
    Wide,
    /// An array of objects; with --watch an object a line.
    Json,
    /// An address a line.
    Addresses,
    /// Comma-separated values with a header.
    Csv,
}

/// Which records are meant.
#[derive(Debug, Args)]
pub struct RecordArgs {
    /// The format of the records, as in `format.type` of a registration.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_FORMAT",
        default_value = "Json",
        value_parser = format,
        value_name = "FORMAT"
    )]
    pub format: Format,
    /// The prefix of the registrations [default: that of the format].
    #[arg(long, env = "ETCD_REGISTRAR_PREFIX", value_name = "PREFIX")]
    pub prefix: Option<String>,
}

impl RecordArgs {
    /// The prefix that is given, or that of the format.
    #[must_use]
    pub fn prefix(&self) -> &str {
        let given = self.prefix.as_deref();
        given.unwrap_or_else(|| self.format.default_prefix())
    }
}

/// `etcd-registrar discover`.
#[derive(Debug, Args)]
pub struct DiscoverArgs {
    /// The name of the service; without it, all services below the prefix.
    #[arg(value_name = "SERVICE")]
    pub service: Option<String>,
    /// The namespace of the service [default: `default` where a service is named].
    #[arg(short, long, env = "ETCD_REGISTRAR_NAMESPACE", value_name = "NAME")]
    pub namespace: Option<String>,
    /// Only endpoints of these clusters.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_CLUSTER",
        value_delimiter = ',',
        value_name = "NAME,..."
    )]
    pub cluster: Vec<String>,
    /// Only endpoints in these zones.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_ZONE",
        value_delimiter = ',',
        value_name = "NAME,..."
    )]
    pub zone: Vec<String>,
    /// Only endpoints on ports of these names.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_PORT",
        value_delimiter = ',',
        value_name = "NAME,..."
    )]
    pub port: Vec<String>,
    /// Only endpoints with all of these entries in their metadata.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_METADATA",
        value_delimiter = ',',
        value_parser = entry,
        value_name = "NAME=VALUE,..."
    )]
    pub metadata: Vec<(String, String)>,
    /// Which records are meant.
    #[command(flatten)]
    pub records: RecordArgs,
    /// Go on and print what changes.
    #[arg(short, long, env = "ETCD_REGISTRAR_WATCH")]
    pub watch: bool,
    /// What is printed.
    #[arg(
        short,
        long,
        env = "ETCD_REGISTRAR_OUTPUT",
        default_value = "table",
        value_name = "OUTPUT"
    )]
    pub output: OutputFormat,
    /// How long etcd may take to answer first.
    #[arg(
        long,
        env = "ETCD_REGISTRAR_TIMEOUT",
        default_value = "10s",
        value_parser = duration,
        value_name = "DURATION"
    )]
    pub timeout: Duration,
    /// Where etcd is.
    #[command(flatten)]
    pub etcd: EtcdArgs,
}

/// The format of that name, in any case.
fn format(text: &str) -> Result<Format, String> {
    const NAMES: [&str; 11] = [
        "Json", "Plain", "Grpc", "Kitex", "Hertz", "Kratos", "SkyDns", "GoMicro", "Traefik",
        "Apisix", "Template",
    ];
    NAMES
        .iter()
        .find(|name| name.eq_ignore_ascii_case(text))
        .and_then(|name| Format::by_name(name))
        .ok_or_else(|| format!("write one of {}", NAMES.join(", ")))
}

/// `name=value`.
pub(crate) fn entry(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write name=value, for example version=v1".into()),
    }
}

pub(crate) fn cluster_name(text: &str) -> Result<String, String> {
    names::cluster(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

fn namespace(text: &str) -> Result<String, String> {
    names::namespace(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

fn registrar_prefix(text: &str) -> Result<String, String> {
    names::prefix(text).map_err(|error| error.to_string())?;
    if text.is_empty() || text == "/" {
        return Err("the operator's own keys need a prefix of their own, e.g. /registrar/".into());
    }
    Ok(text.to_owned())
}

/// A duration as in Go; a bare 0 is one too.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    humantime::parse_duration(text)
        .map_err(|error| format!("{error}; write for example 5s, 1m30s or 0"))
}

fn election_ttl(text: &str) -> Result<Duration, String> {
    let ttl = duration(text)?;
    // etcd grants whole seconds, and takes up to a second longer to end a lease.
    if ttl.subsec_nanos() != 0 || !(2..=60).contains(&ttl.as_secs()) {
        return Err("write whole seconds from 2s to 60s".into());
    }
    Ok(ttl)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_are_written_as_in_go() {
        assert_eq!(duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert_eq!(election_ttl("5s"), Ok(Duration::from_secs(5)));
        for bad in ["1s", "90s", "2500ms", "five"] {
            assert!(election_ttl(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_run_needs_the_cluster_s_name() {
        let error = Cli::try_parse_from(["etcd-registrar", "run"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("--cluster-name"), "{error}");
        for bad in ["East", "a/b", "", "a.b"] {
            assert!(
                Cli::try_parse_from(["etcd-registrar", "run", "--cluster-name", bad]).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn namespaces_are_named_one_by_one_or_together() {
        let namespaces = |flags: &[&str]| {
            let run = ["etcd-registrar", "run", "--cluster-name", "east"];
            let cli = Cli::try_parse_from(run.iter().chain(flags))?;
            match cli.command {
                Command::Run(args) => Ok::<_, clap::Error>(args.namespaces()),
                _ => panic!("another command"),
            }
        };
        assert!(namespaces(&[]).unwrap().is_empty());
        let several = ["--namespace", "shop", "--namespace=web,shop"];
        let found = namespaces(&several).unwrap();
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["shop", "web"]);
        for bad in ["Shop", "a/b", "", "shop,"] {
            let error = namespaces(&["--namespace", bad]).unwrap_err().to_string();
            assert!(error.contains("DNS label"), "{bad}: {error}");
        }
    }

    #[test]
    fn help_holds_no_secret_and_every_flag_has_a_variable() {
        for command in Cli::command().get_subcommands() {
            for argument in command.get_arguments().filter(|a| a.get_long().is_some()) {
                let long = argument.get_long().unwrap();
                if long == "help" {
                    continue;
                }
                let variable = format!("ETCD_REGISTRAR_{}", long.replace('-', "_").to_uppercase());
                assert_eq!(
                    argument.get_env().and_then(|e| e.to_str()),
                    Some(&*variable),
                    "{long}"
                );
            }
        }
    }
}
