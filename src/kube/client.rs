//! The connection to the API server.
//!
//! Takes the flags `--kubeconfig` and `--context`; gives a client as kubectl would have it, else
//! the one of the pod it runs in. Must never put a credential into an error or a log.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};

/// An API server that takes no connection within this time is taken for absent; as many round
/// trips as that are lost on no healthy network.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The configuration is not read more often than this after refusals.
const RELOAD_PAUSE: Duration = Duration::from_secs(10);

/// Which API server, as whom.
#[derive(Clone, Debug, Default)]
pub struct ClientOptions {
    /// `--kubeconfig`: this file, and no other source.
    pub kubeconfig: Option<PathBuf>,
    /// `--context`: this context of the kubeconfig.
    pub context: Option<String>,
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The kubeconfig can't be used.
    #[error(
        "can't use the kubeconfig {file}: {what}; check --kubeconfig, KUBECONFIG and --context"
    )]
    Kubeconfig {
        /// Where it was looked for.
        file: String,
        /// What is wrong with it.
        what: String,
    },
    /// There is no kubeconfig, and this is no pod.
    #[error(
        "no way to Kubernetes: there is no kubeconfig ({kubeconfig}), and this is no pod with a \
         ServiceAccount ({in_cluster}); give --kubeconfig"
    )]
    Nowhere {
        /// Why there is no kubeconfig.
        kubeconfig: KubeconfigError,
        /// Why this is no pod.
        in_cluster: Box<InClusterError>,
    },
    /// The configuration was read, but no client can be built from it.
    #[error(
        "can't connect to Kubernetes as configured: {0}; check the certificates and user of the kubeconfig"
    )]
    Build(String),
    /// The task that builds the client was stopped.
    #[error("the client for Kubernetes was not built: the process is shutting down")]
    Stopped,
}

/// A client that follows its configuration: clones share the newest one.
///
/// The token and the CA of a ServiceAccount are read again by kube itself, at least once a minute.
/// Client certificates and tokens of a kubeconfig are not: [`KubeClient::reload`] reads them.
#[derive(Clone)]
pub struct KubeClient {
    options: Arc<ClientOptions>,
    /// The client and the URL of its API server.
    client: Arc<RwLock<(Client, Arc<str>)>>,
    reloaded: Arc<Mutex<Instant>>,
}

impl KubeClient {
    /// Reads the configuration and makes a client; does not connect yet.
    ///
    /// # Errors
    /// [`ClientError`], when there is no usable configuration.
    pub async fn new(options: ClientOptions) -> Result<Self, ClientError> {
        let client = build(&options).await?;
        Ok(Self {
            options: Arc::new(options),
            client: Arc::new(RwLock::new(client)),
            reloaded: Arc::new(Mutex::new(Instant::now())),
        })
    }

    /// The client as it is now.
    #[must_use]
    pub fn current(&self) -> Client {
        self.client
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .clone()
    }

    /// The URL of the API server as it is now, for a person.
    #[must_use]
    pub fn server(&self) -> Arc<str> {
        let current = self.client.read();
        Arc::clone(&current.unwrap_or_else(PoisonError::into_inner).1)
    }

    /// Reads the configuration again after the API server did not accept the credentials or could
    /// not be reached, every 10 s at most; an unusable one is reported, and the old one stays.
    ///
    /// # Errors
    /// [`ClientError`], when there is no usable configuration any more.
    pub async fn reload(&self) -> Result<(), ClientError> {
        {
            let mut reloaded = self.reloaded.lock().unwrap_or_else(PoisonError::into_inner);
            if reloaded.elapsed() < RELOAD_PAUSE {
                return Ok(());
            }
            *reloaded = Instant::now();
        }
        let client = build(&self.options).await?;
        *self.client.write().unwrap_or_else(PoisonError::into_inner) = client;
        Ok(())
    }
}

async fn build(options: &ClientOptions) -> Result<(Client, Arc<str>), ClientError> {
    let mut config = config(options).await?;
    let server = config.cluster_url.to_string();
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    // Retries are decided by those who ask: each has a backoff of its own and tells of failures.
    config.default_retry = false;
    // A user of a kubeconfig may run a program for its token; that must not stop the other tasks.
    let client = tokio::task::spawn_blocking(move || Client::try_from(config))
        .await
        .map_err(|_| ClientError::Stopped)?
        .map_err(|error| ClientError::Build(super::explain(&error)))?;
    Ok((client, server.trim_end_matches('/').into()))
}

async fn config(options: &ClientOptions) -> Result<Config, ClientError> {
    let selection = KubeConfigOptions {
        context: options.context.clone(),
        ..KubeConfigOptions::default()
    };
    if let Some(file) = &options.kubeconfig {
        let wrong = |error| ClientError::Kubeconfig {
            file: file.display().to_string(),
            what: what(&error),
        };
        let kubeconfig = Kubeconfig::read_from(file).map_err(wrong)?;
        return Config::from_custom_kubeconfig(kubeconfig, &selection)
            .await
            .map_err(wrong);
    }
    match Config::from_kubeconfig(&selection).await {
        Ok(config) => Ok(config),
        // A pod without a kubeconfig is the usual case. One that is there but broken, or lacks the
        // context that was asked for, is never passed over.
        Err(kubeconfig) if absent(&kubeconfig) && options.context.is_none() => Config::incluster()
            .map_err(|in_cluster| ClientError::Nowhere {
                kubeconfig,
                in_cluster: Box::new(in_cluster),
            }),
        Err(error) => Err(ClientError::Kubeconfig {
            file: "of KUBECONFIG or ~/.kube/config".to_owned(),
            what: what(&error),
        }),
    }
}

/// What is wrong with a kubeconfig.
fn what(error: &KubeconfigError) -> String {
    match error {
        // Its words hold lines of the file, and these a token or key.
        KubeconfigError::Parse(_) => {
            "it can't be read as YAML (`kubectl config view --kubeconfig FILE` says where)"
                .to_owned()
        }
        other => other.to_string(),
    }
}

fn absent(error: &KubeconfigError) -> bool {
    match error {
        KubeconfigError::FindPath => true,
        KubeconfigError::ReadConfig(error, _) => error.kind() == std::io::ErrorKind::NotFound,
        // What an empty file or KUBECONFIG leads to.
        KubeconfigError::CurrentContextNotSet => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &str) -> PathBuf {
        let name = format!(
            "etcd-registrar-kubeconfig-{}-{:x}",
            std::process::id(),
            content.len()
        );
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    async fn error(options: ClientOptions) -> String {
        match KubeClient::new(options).await {
            Ok(_) => panic!("there is a client"),
            Err(error) => error.to_string(),
        }
    }

    #[tokio::test]
    async fn a_missing_kubeconfig_is_named() {
        let said = error(ClientOptions {
            kubeconfig: Some("/no/such/kubeconfig".into()),
            context: None,
        })
        .await;
        assert!(said.contains("/no/such/kubeconfig"), "{said}");
        assert!(said.contains("--kubeconfig"), "{said}");
    }

    #[tokio::test]
    async fn a_kubeconfig_that_cannot_be_read_is_not_shown() {
        for content in [
            "users: [{name: a, user: s3cret-in-the-wrong-place}]\n",
            "users:\n- name: a\n  user:\n    token: s3cret\n   clusters: [\n",
        ] {
            let path = file(content);
            let said = error(ClientOptions {
                kubeconfig: Some(path.clone()),
                context: None,
            })
            .await;
            assert!(said.contains("can't be read as YAML"), "{said}");
            assert!(!said.contains("s3cret"), "{said}");
            std::fs::remove_file(path).unwrap();
        }
    }

    #[tokio::test]
    async fn an_unknown_context_is_named_and_no_token_is() {
        let path = file(
            "apiVersion: v1\nkind: Config\ncurrent-context: a\n\
             clusters: [{name: a, cluster: {server: 'https://127.0.0.1:1'}}]\n\
             users: [{name: a, user: {token: s3cret}}]\n\
             contexts: [{name: a, context: {cluster: a, user: a}}]\n",
        );
        let said = error(ClientOptions {
            kubeconfig: Some(path.clone()),
            context: Some("other".to_owned()),
        })
        .await;
        assert!(said.contains("other"), "{said}");
        assert!(!said.contains("s3cret"), "{said}");
        let client = KubeClient::new(ClientOptions {
            kubeconfig: Some(path.clone()),
            context: Some("a".to_owned()),
        })
        .await;
        assert!(client.is_ok());
        std::fs::remove_file(path).unwrap();
    }
}
