//! A connection to one healthy etcd endpoint at a time.
//!
//! Takes [`Settings`], gives ready clients and says when etcd is up or down. All endpoints are
//! raced and the first that answers a linearizable read wins; whoever finds that the client does
//! not work says so by [`Connection::failed`], and the race is run again. TLS and password files
//! are read again when they change. Must never show a password or a private key in a log, an error
//! or a `Debug` output, and never give up: after the settings were accepted it tries for ever.

use std::error::Error as _;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{Certificate, Client, ConnectOptions, GetOptions, Identity, TlsOptions};
use futures::stream::{FuturesUnordered, StreamExt};
use thiserror::Error;
use tokio::sync::{mpsc, watch};

use super::failure::is_denied;

/// How long a request may take: less than a third of the default election TTL of 5 s, so that
/// a member that does not answer is left before the leader's lease ends.
pub const DEADLINE: Duration = Duration::from_millis(1500);

/// How long an endpoint may take to connect and answer the probe. Three tries fit into the
/// election TTL of 5 s.
const PROBE_DEADLINE: Duration = Duration::from_secs(1);

/// The same with a user: checking the password costs etcd a bcrypt round and a raft write.
const LOGIN_DEADLINE: Duration = Duration::from_secs(2);

/// HTTP/2 pings: etcd closes connections that ping more often than every 5 s, and its clock may
/// see an interval a little shortened by the network.
const PING_INTERVAL: Duration = Duration::from_secs(6);

/// How long a ping may stay unanswered.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// How often the TLS and password files are compared with what is in use.
const FILES_INTERVAL: Duration = Duration::from_secs(2);

/// The first and the longest pause between two races that nobody won. What was to go while etcd was away goes within a
/// second of its return.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_LAST: Duration = Duration::from_millis(800);

/// The longest pause where etcd is there and refuses: each login costs it a hash that is slow on purpose.
const BACKOFF_REFUSED: Duration = Duration::from_secs(3);

/// A session that lived this long was a good one: the next race starts without a pause.
const GOOD_SESSION: Duration = Duration::from_secs(3);

/// Failures that wait to be looked at; more of them say nothing new.
const FAILURES: usize = 16;

/// Where etcd is and how to log in. Holds paths, no secrets.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// URLs of the members; without a scheme `https://` is meant when TLS files are named, else
    /// `http://`.
    pub endpoints: Vec<String>,
    /// The CA that signed the servers' certificates (PEM); `None`: those of the system.
    pub cacert: Option<PathBuf>,
    /// The client certificate (PEM).
    pub cert: Option<PathBuf>,
    /// The private key of the client certificate (PEM).
    pub key: Option<PathBuf>,
    /// The user of etcd.
    pub user: Option<String>,
    /// The file that holds the user's password; newlines at its end do not belong to it.
    pub password_file: Option<PathBuf>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An endpoint or user that somebody wrote with a password is refused by
        // `Connection::connect`, but it may be printed before.
        let endpoints: Vec<_> = self.endpoints.iter().map(|url| without_user(url)).collect();
        let user = self.user.as_deref().map(without_password);
        f.debug_struct("Settings")
            .field("endpoints", &endpoints)
            .field("cacert", &self.cacert)
            .field("cert", &self.cert)
            .field("key", &self.key)
            .field("user", &user)
            .field("password_file", &self.password_file)
            .finish()
    }
}

/// What is after the `@` of a URL, with its scheme.
fn without_user(url: &str) -> String {
    match url.rsplit_once('@') {
        Some((before, host)) => match before.split_once("://") {
            Some((scheme, _)) => format!("{scheme}://{host}"),
            None => host.to_owned(),
        },
        None => url.to_owned(),
    }
}

/// What is before the `:` of a user.
fn without_password(user: &str) -> &str {
    user.split_once(':').map_or(user, |(name, _)| name)
}

/// Settings that can't work, whatever etcd does.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// No endpoint was given.
    #[error("no etcd endpoint is given; name at least one: --etcd-endpoints http://127.0.0.1:2379")]
    NoEndpoints,
    /// An endpoint is not a URL of a host.
    #[error("--etcd-endpoints: {url}: {why}; write it as https://host:2379 or http://host:2379")]
    BadEndpoint {
        /// The endpoint, without user and password.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// The user holds a colon.
    #[error(
        "--etcd-user {user:?} is followed by a colon; write the name alone, and the password into the file of --etcd-password-file"
    )]
    PasswordInUser {
        /// The name before the colon.
        user: String,
    },
    /// A user without a password file.
    #[error(
        "--etcd-user {user:?} has no password; name the file that holds it: --etcd-password-file"
    )]
    NoPassword {
        /// The user.
        user: String,
    },
    /// A password file without a user.
    #[error(
        "the password file {} is given without its user; name it: --etcd-user", path.display()
    )]
    NoUser {
        /// The password file.
        path: PathBuf,
    },
    /// A certificate without a key, or a key without a certificate.
    #[error(
        "a client certificate needs both the certificate and its private key; {missing} is missing"
    )]
    HalfIdentity {
        /// `--etcd-cert` or `--etcd-key`.
        missing: &'static str,
    },
    /// A file can't be read.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// What the file should be.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why it can't be read.
        source: std::io::Error,
    },
    /// A file holds something else than it should.
    #[error("{what} {}: {why}", path.display())]
    BadFile {
        /// What the file should be.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What was expected in it.
        why: &'static str,
    },
    /// The certificates, or a certificate and its key, do not go together.
    #[error("the TLS files for {url} can't be used: {why}")]
    Tls {
        /// The endpoint for which they were tried.
        url: String,
        /// What was said.
        why: String,
    },
}

/// What the files hold; compared to see a change, never printed.
#[derive(Clone, PartialEq, Eq)]
struct Material {
    cacert: Option<Vec<u8>>,
    cert: Option<Vec<u8>>,
    key: Option<Vec<u8>>,
    password: Option<String>,
}

async fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, ConnectError> {
    tokio::fs::read(path)
        .await
        .map_err(|source| ConnectError::File {
            what,
            path: path.to_owned(),
            source,
        })
}

async fn read_pem(
    what: &'static str,
    path: Option<&PathBuf>,
    marker: &str,
    why: &'static str,
) -> Result<Option<Vec<u8>>, ConnectError> {
    let Some(path) = path else { return Ok(None) };
    let bytes = read(what, path).await?;
    // A file without any certificate would be taken for an empty list, and fail much later.
    if !String::from_utf8_lossy(&bytes).contains(marker) {
        return Err(ConnectError::BadFile {
            what,
            path: path.clone(),
            why,
        });
    }
    Ok(Some(bytes))
}

impl Material {
    async fn load(settings: &Settings) -> Result<Self, ConnectError> {
        let certificate = "holds no PEM certificate (-----BEGIN CERTIFICATE-----)";
        let password = match &settings.password_file {
            None => None,
            Some(path) => {
                let what = "the password file (--etcd-password-file)";
                let bytes = read(what, path).await?;
                let bad = |why| ConnectError::BadFile {
                    what,
                    path: path.clone(),
                    why,
                };
                let text = String::from_utf8(bytes).map_err(|_| bad("is not UTF-8 text"))?;
                let text = text.trim_end_matches(['\n', '\r']);
                if text.is_empty() {
                    return Err(bad("is empty"));
                }
                Some(text.to_owned())
            }
        };
        Ok(Self {
            cacert: read_pem(
                "the CA certificate (--etcd-cacert)",
                settings.cacert.as_ref(),
                "-----BEGIN CERTIFICATE-----",
                certificate,
            )
            .await?,
            cert: read_pem(
                "the client certificate (--etcd-cert)",
                settings.cert.as_ref(),
                "-----BEGIN CERTIFICATE-----",
                certificate,
            )
            .await?,
            key: read_pem(
                "the private key (--etcd-key)",
                settings.key.as_ref(),
                "PRIVATE KEY-----",
                "holds no PEM private key (-----BEGIN PRIVATE KEY-----)",
            )
            .await?,
            password,
        })
    }

    fn tls(&self) -> TlsOptions {
        let mut tls = TlsOptions::new();
        tls = match &self.cacert {
            Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
            None => tls.with_native_roots(),
        };
        if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        tls
    }

    fn options(&self, url: &str) -> ConnectOptions {
        let mut options = ConnectOptions::new()
            .with_require_leader(true)
            .with_connect_timeout(PROBE_DEADLINE)
            .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
            // etcd takes a ping without an open stream for an abuse.
            .with_keep_alive_while_idle(false);
        if url.starts_with("https://") {
            options = options.with_tls(self.tls());
        }
        options
    }
}

/// A client that answered, to be used until it fails.
pub struct Session {
    /// The client. Take the part that is needed (`kv_client()`, ...): a whole one holds eight.
    pub client: Client,
    /// Names this session to [`Connection::failed`]; later sessions have higher numbers.
    pub generation: u64,
    /// The URL of the endpoint.
    pub endpoint: Arc<str>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("generation", &self.generation)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

/// Whether there is a connection, for logs and metrics.
#[derive(Clone, Debug)]
pub enum State {
    /// The first race is not over.
    Connecting,
    /// An endpoint answered.
    Up(Arc<Session>),
    /// No endpoint answers; the message names each of them with its error.
    Down(Arc<str>),
}

/// A handle on a connection; clones share it, and it ends with the last of them.
#[derive(Clone, Debug)]
pub struct Connection {
    state: watch::Receiver<State>,
    failures: mpsc::Sender<(u64, String)>,
}

impl Connection {
    /// Checks the settings and reads the files, then connects in the background.
    ///
    /// # Errors
    ///
    /// Settings that can't work: a malformed URL, a missing file, a certificate without its key.
    /// That etcd does not answer is no error; [`Connection::state`] tells it.
    pub async fn connect(settings: Settings) -> Result<Self, ConnectError> {
        let urls = check(&settings)?;
        let material = Material::load(&settings).await?;
        try_tls(&urls, &material).await?;
        let (state, receiver) = watch::channel(State::Connecting);
        let (failures, failed) = mpsc::channel(FAILURES);
        let task = Task {
            settings,
            urls,
            material,
            state,
            failed,
            generation: 0,
        };
        tokio::spawn(task.run());
        Ok(Self {
            state: receiver,
            failures,
        })
    }

    /// The current session, if there is one.
    #[must_use]
    pub fn current(&self) -> Option<Arc<Session>> {
        match &*self.state.borrow() {
            State::Up(session) => Some(Arc::clone(session)),
            State::Connecting | State::Down(_) => None,
        }
    }

    /// Waits for a session. Can be dropped at any time.
    pub async fn ready(&self) -> Arc<Session> {
        self.ready_after(0).await
    }

    /// Waits for a session of a higher generation than the one given.
    pub async fn ready_after(&self, generation: u64) -> Arc<Session> {
        let mut state = self.state.clone();
        loop {
            if let State::Up(session) = &*state.borrow_and_update()
                && session.generation > generation
            {
                return Arc::clone(session);
            }
            if state.changed().await.is_err() {
                // The task ends before its handles only when the runtime shuts down.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Says that a session does not work (any more): unreachable, without a leader, or its login
    /// is refused. Ignored when that session was replaced already.
    pub fn failed(&self, generation: u64, why: &str) {
        // A full queue holds enough reasons to race again.
        let _ = self.failures.try_send((generation, why.to_owned()));
    }

    /// Up or down, and why; the receiver sees every change that lasts.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }
}

/// Checks what needs no IO; gives the endpoints with their schemes.
fn check(settings: &Settings) -> Result<Vec<Arc<str>>, ConnectError> {
    if settings.endpoints.is_empty() {
        return Err(ConnectError::NoEndpoints);
    }
    match (&settings.cert, &settings.key) {
        (Some(_), None) => {
            return Err(ConnectError::HalfIdentity {
                missing: "--etcd-key",
            });
        }
        (None, Some(_)) => {
            return Err(ConnectError::HalfIdentity {
                missing: "--etcd-cert",
            });
        }
        _ => {}
    }
    match (&settings.user, &settings.password_file) {
        (Some(user), _) if user.contains(':') => {
            return Err(ConnectError::PasswordInUser {
                user: without_password(user).to_owned(),
            });
        }
        (Some(user), None) => return Err(ConnectError::NoPassword { user: user.clone() }),
        (None, Some(path)) => return Err(ConnectError::NoUser { path: path.clone() }),
        _ => {}
    }
    let tls = settings.cacert.is_some() || settings.cert.is_some();
    settings
        .endpoints
        .iter()
        .map(|given| endpoint_url(given.trim(), tls))
        .collect()
}

fn endpoint_url(given: &str, tls: bool) -> Result<Arc<str>, ConnectError> {
    let bad = |why: &str| ConnectError::BadEndpoint {
        url: without_user(given),
        why: why.to_owned(),
    };
    if given.contains('@') {
        return Err(bad(
            "a URL must not hold a user or password; give --etcd-user and --etcd-password-file",
        ));
    }
    let url = if given.contains("://") {
        given.to_owned()
    } else if tls {
        format!("https://{given}")
    } else {
        format!("http://{given}")
    };
    let uri: http::Uri = url.parse().map_err(|e: http::uri::InvalidUri| {
        let why = e.to_string();
        bad(&why)
    })?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(bad("the scheme is neither http nor https"));
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err(bad("the host is missing"));
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(bad("a path is not expected"));
    }
    Ok(url.trim_end_matches('/').into())
}

/// Builds a client for each endpoint, which parses all TLS files and needs no network.
async fn try_tls(urls: &[Arc<str>], material: &Material) -> Result<(), ConnectError> {
    for url in urls {
        if let Err(error) = Client::connect([&**url], Some(material.options(url))).await {
            return Err(ConnectError::Tls {
                url: url.to_string(),
                why: describe(&error),
            });
        }
    }
    Ok(())
}

/// The background task of a connection.
struct Task {
    settings: Settings,
    urls: Vec<Arc<str>>,
    material: Material,
    state: watch::Sender<State>,
    failed: mpsc::Receiver<(u64, String)>,
    generation: u64,
}

/// Why a session is no longer used.
enum End {
    /// All handles are gone.
    Dropped,
    /// Somebody said that it does not work.
    Failed(String),
}

/// Why nobody won a race.
struct Lost {
    why: String,
    /// An endpoint answered, and wants nothing of this.
    refused: bool,
}

impl Task {
    async fn run(mut self) {
        let mut tries = 0;
        while !self.failed.is_closed() {
            let mut longest = BACKOFF_REFUSED;
            match self.race(&self.material).await {
                Ok(session) => {
                    let since = Instant::now();
                    self.up(session);
                    match self.watch().await {
                        End::Dropped => return,
                        End::Failed(why) => self.down(why),
                    }
                    if since.elapsed() >= GOOD_SESSION {
                        tries = 0;
                        continue;
                    }
                }
                Err(lost) => {
                    if !lost.refused {
                        longest = BACKOFF_LAST;
                    }
                    self.down(lost.why);
                    self.reload().await;
                }
            }
            // The first failure is followed by a race at once: another endpoint may be well.
            if tries > 0 {
                tokio::time::sleep(backoff(tries - 1, longest, rand::random())).await;
            }
            tries += 1;
        }
    }

    fn up(&mut self, (client, endpoint): (Client, Arc<str>)) {
        self.generation += 1;
        self.state.send_replace(State::Up(Arc::new(Session {
            client,
            generation: self.generation,
            endpoint,
        })));
    }

    fn down(&self, why: String) {
        self.state.send_replace(State::Down(why.into()));
    }

    /// Reads the files anew; those that can't be used are tried again later. Whether they differ.
    async fn reload(&mut self) -> bool {
        match Material::load(&self.settings).await {
            Ok(material) if material != self.material => {
                self.material = material;
                true
            }
            Ok(_) => false,
            Err(error) => {
                tracing::warn!(%error, "a file of the etcd connection can't be used; the last one stays in use");
                false
            }
        }
    }

    /// Waits until the session fails; replaces it meanwhile when the files change.
    async fn watch(&mut self) -> End {
        let mut files = tokio::time::interval(FILES_INTERVAL);
        files.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Files that changed and do not work (half written) are tried again.
        let mut changed = false;
        loop {
            tokio::select! {
                failure = self.failed.recv() => match failure {
                    None => return End::Dropped,
                    Some((generation, why)) if generation == self.generation => {
                        return End::Failed(why);
                    }
                    Some(_) => {}
                },
                _ = files.tick() => {
                    changed |= self.reload().await;
                    if changed {
                        match self.race(&self.material).await {
                            Ok(session) => {
                                tracing::info!("certificates or password changed: connected to etcd with the new ones");
                                self.up(session);
                                changed = false;
                            }
                            Err(lost) => tracing::warn!(
                                error = %lost.why,
                                "the changed certificates or password do not work; the old connection stays in use"
                            ),
                        }
                    }
                }
            }
        }
    }

    /// The first endpoint that answers, or what each of them said.
    async fn race(&self, material: &Material) -> Result<(Client, Arc<str>), Lost> {
        let deadline = if self.settings.user.is_some() {
            LOGIN_DEADLINE
        } else {
            PROBE_DEADLINE
        };
        let user = self.settings.user.as_deref();
        let mut running: FuturesUnordered<_> = self
            .urls
            .iter()
            .enumerate()
            .map(|(index, url)| async move {
                let result = match tokio::time::timeout(deadline, probe(url, user, material)).await
                {
                    Ok(Ok(client)) => Ok((client, url.clone())),
                    Ok(Err(error)) => Err(Lost {
                        why: with_hint(url, &describe(&error)),
                        refused: is_refusal(&error),
                    }),
                    Err(_) => Err(Lost {
                        why: with_hint(url, &format!("no answer within {} s", deadline.as_secs())),
                        refused: false,
                    }),
                };
                (index, result)
            })
            .collect();
        let mut errors = Vec::new();
        let mut refused = false;
        while let Some((index, result)) = running.next().await {
            match result {
                Ok(won) => return Ok(won),
                Err(lost) => {
                    refused |= lost.refused;
                    errors.push((index, lost.why));
                }
            }
        }
        errors.sort_unstable();
        let errors: Vec<_> = errors
            .into_iter()
            .filter_map(|(index, error)| Some(format!("{}: {error}", self.urls.get(index)?)))
            .collect();
        Err(Lost {
            why: format!("no endpoint answered: {}", errors.join("; ")),
            refused,
        })
    }
}

/// Connects to an endpoint and asks it for something that it can only answer with a quorum.
async fn probe(
    url: &str,
    user: Option<&str>,
    material: &Material,
) -> Result<Client, etcd_client::Error> {
    let plain = material.options(url);
    let mut client = match (user, &material.password) {
        (Some(user), Some(password)) => {
            let options = plain
                .clone()
                .with_user(user, password)
                .with_auto_token_refresh(true);
            match Client::connect([url], Some(options)).await {
                // As etcdctl does: a user where none is needed is no error.
                Err(etcd_client::Error::GRpcStatus(status))
                    if status.message() == "etcdserver: authentication is not enabled" =>
                {
                    Client::connect([url], Some(plain)).await?
                }
                other => other?,
            }
        }
        _ => Client::connect([url], Some(plain)).await?,
    };
    let options = GetOptions::new().with_count_only();
    match client.get("\0", Some(options)).await {
        Ok(_) => Ok(client),
        // The user may not read that key, but etcd had to find its leader before it said so.
        Err(error) if is_denied(&error) => Ok(client),
        Err(error) => Err(error),
    }
}

/// Whether etcd itself said no, and not because it waits for a leader: an error of the connection has a source.
fn is_refusal(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status)
        if status.source().is_none() && status.code() != tonic::Code::Unavailable)
}

/// The pause after the given number of failures; `random` is in 0..1 and takes away up to half.
fn backoff(failures: u32, longest: Duration, random: f64) -> Duration {
    let full = BACKOFF_FIRST
        .saturating_mul(1 << failures.min(16))
        .min(longest);
    full.mul_f64(1.0 - random / 2.0)
}

/// What an error of the client says, with its causes and without repetitions.
pub(super) fn describe(error: &etcd_client::Error) -> String {
    let (text, mut cause) = match error {
        etcd_client::Error::GRpcStatus(status) => (status.message().to_owned(), status.source()),
        etcd_client::Error::TransportError(error) => (error.to_string(), error.source()),
        other => (other.to_string(), other.source()),
    };
    let mut parts = vec![text];
    while let Some(error) = cause {
        let part = error.to_string();
        if !parts.iter().any(|said| said.contains(&part)) {
            parts.push(part);
        }
        cause = error.source();
    }
    // The layers in between say only that there is an error.
    let empty = ["", "transport error", "operation was canceled"];
    if !parts.iter().all(|part| empty.contains(&part.as_str())) {
        parts.retain(|part| !empty.contains(&part.as_str()));
    }
    parts.join(": ")
}

/// Adds what a person can do about it.
fn with_hint(url: &str, error: &str) -> String {
    let hints = [
        (
            "authentication failed",
            "check --etcd-user and --etcd-password-file",
        ),
        (
            "user name is empty",
            "etcd asks for a login: give --etcd-user and --etcd-password-file, or a client certificate",
        ),
        (
            "UnknownIssuer",
            "the server's certificate is not signed by the given CA: check --etcd-cacert",
        ),
        (
            "NotValidForName",
            "the server's certificate is not made out to this host name",
        ),
        ("Expired", "the server's certificate has expired"),
        (
            "CertificateRequired",
            "etcd asks for a client certificate: give --etcd-cert and --etcd-key",
        ),
        (
            "UnknownCA",
            "etcd does not trust the CA of the client certificate: check --etcd-cert",
        ),
        (
            "BadCertificate",
            "etcd does not accept the client certificate: check --etcd-cert",
        ),
        (
            "InvalidContentType",
            "there is no TLS at this endpoint: write http://",
        ),
    ];
    for (part, hint) in hints {
        if error.contains(part) {
            return format!("{error} ({hint})");
        }
    }
    if [
        "refused",
        "dns error",
        "no answer within",
        "unreachable",
        "timed out",
    ]
    .iter()
    .any(|part| error.contains(part))
    {
        return format!("{error} (does etcd run there? check --etcd-endpoints)");
    }
    // A server that meets another protocol, or does not accept a certificate, may just hang up.
    if [
        "h2 protocol error",
        "broken pipe",
        "connection closed",
        "reset by peer",
    ]
    .iter()
    .any(|part| error.contains(part))
    {
        let hint = if url.starts_with("http://") {
            "if etcd serves TLS here, write https://"
        } else {
            "if etcd asks for a client certificate, check --etcd-cert and --etcd-key"
        };
        return format!("{error} ({hint})");
    }
    error.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(endpoints: &[&str]) -> Settings {
        Settings {
            endpoints: endpoints.iter().map(ToString::to_string).collect(),
            ..Settings::default()
        }
    }

    #[test]
    fn endpoints_get_a_scheme() {
        let urls = check(&settings(&[
            "a:2379",
            "http://b:2379/",
            "https://[::1]:2379",
        ]))
        .unwrap();
        assert_eq!(
            urls.iter().map(|u| &**u).collect::<Vec<_>>(),
            ["http://a:2379", "http://b:2379", "https://[::1]:2379"]
        );
        let mut with_ca = settings(&["a:2379"]);
        with_ca.cacert = Some("ca.pem".into());
        assert_eq!(&*check(&with_ca).unwrap()[0], "https://a:2379");
    }

    #[test]
    fn impossible_settings_are_refused() {
        for (given, part) in [
            (settings(&[]), "no etcd endpoint"),
            (settings(&["ftp://a:1"]), "neither http nor https"),
            (settings(&["http://a b"]), "write it as"),
            (settings(&["http://a:2379/v3"]), "a path is not expected"),
            (settings(&[""]), "write it as"),
        ] {
            let error = check(&given).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let mut half = settings(&["a"]);
        half.cert = Some("cert.pem".into());
        assert!(
            check(&half)
                .unwrap_err()
                .to_string()
                .contains("--etcd-key is missing")
        );
        let mut user = settings(&["a"]);
        user.user = Some("root".into());
        assert!(
            check(&user)
                .unwrap_err()
                .to_string()
                .contains("--etcd-password-file")
        );
    }

    #[test]
    fn no_secret_is_shown() {
        let mut given = settings(&["http://root:hunter2@a:2379"]);
        given.user = Some("root:hunter2".into());
        assert!(!format!("{given:?}").contains("hunter2"));
        assert!(!check(&given).unwrap_err().to_string().contains("hunter2"));
        given.user = None;
        assert!(!check(&given).unwrap_err().to_string().contains("hunter2"));
    }

    #[test]
    fn errors_say_what_to_do() {
        let status = tonic::Status::new(tonic::Code::Unavailable, "");
        assert_eq!(describe(&etcd_client::Error::GRpcStatus(status)), "");
        for (url, error, part) in [
            (
                "https://a",
                "invalid peer certificate: UnknownIssuer",
                "check --etcd-cacert",
            ),
            (
                "http://a",
                "stream closed because of a broken pipe",
                "write https://",
            ),
            ("https://a", "connection closed", "check --etcd-cert"),
            (
                "http://a",
                "etcdserver: user name is empty",
                "give --etcd-user",
            ),
        ] {
            let text = with_hint(url, error);
            assert!(text.starts_with(error) && text.contains(part), "{text}");
        }
        assert_eq!(
            with_hint("http://a", "etcdserver: no leader"),
            "etcdserver: no leader"
        );
    }

    #[test]
    fn pauses_grow_and_are_capped() {
        let longest = BACKOFF_REFUSED;
        assert_eq!(backoff(0, longest, 0.0), BACKOFF_FIRST);
        assert_eq!(backoff(2, longest, 0.0), BACKOFF_FIRST * 4);
        assert_eq!(backoff(40, longest, 0.0), longest);
        assert_eq!(backoff(40, longest, 1.0), longest / 2);
    }

    #[test]
    fn only_what_etcd_says_is_a_refusal() {
        let said = |code, message: &str| {
            is_refusal(&etcd_client::Error::GRpcStatus(tonic::Status::new(
                code, message,
            )))
        };
        let wrong = "etcdserver: authentication failed, invalid user ID or password";
        assert!(said(tonic::Code::InvalidArgument, wrong));
        assert!(!said(tonic::Code::Unavailable, "etcdserver: no leader"));
        let broken = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        let broken = tonic::Status::from_error(Box::new(broken));
        assert!(!is_refusal(&etcd_client::Error::GRpcStatus(broken)));
    }
}
