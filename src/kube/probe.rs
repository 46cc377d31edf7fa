//! Asks the API server when nothing else is heard, and whose cluster it is.
//!
//! Takes the time of the last word; gives [`KubeInput::Answered`] and [`KubeInput::ClusterUid`].
//! Must never report an answer that was none: whether this replica is live hangs on it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::engine::io::{Input, KubeInput};

use super::client::KubeClient;
use super::lists::{Failure, get};
use super::session::backoff;
use super::{Heard, LogLimit, wire};

/// A third of the 15 s after which a replica is no longer live: two answers may be lost.
const PERIOD: Duration = Duration::from_secs(5);

/// How often what the watches heard is reported: an answer is never made younger than by this.
const LOOK: Duration = Duration::from_secs(1);

/// With [`PERIOD`] still well within those 15 s.
const TIMEOUT: Duration = Duration::from_secs(3);

/// The UID is asked for so often although the watches are busy: another cluster behind the same
/// address has to be noticed there, too.
const UID_PERIOD: Duration = Duration::from_secs(60);

/// Its UID names the cluster where all namespaces are watched: it is in every one and can't be deleted.
pub const EVERYWHERE: &str = "kube-system";

/// Probes until the engine is gone; the UID is that of this namespace.
pub async fn run(
    client: KubeClient,
    namespace: Arc<str>,
    inputs: mpsc::Sender<Input>,
    heard: Heard,
) {
    let mut probe = Probe {
        namespace: Arc::clone(&namespace),
        uid: None,
        failures: 0,
        log: LogLimit::new(),
    };
    let mut asked: Option<Instant> = None;
    loop {
        let due = asked.is_none_or(|asked| asked.elapsed() >= UID_PERIOD);
        let silence = heard.silence();
        let told = if due || silence >= PERIOD {
            let answer = uid(&client, &namespace, TIMEOUT).await;
            if answer.is_ok() {
                heard.now();
                asked = Some(Instant::now());
            }
            // The credentials may have been rotated, or the API server moved, on disk.
            let reload = matches!(
                &answer,
                Err(Failure {
                    code: None | Some(401),
                    ..
                })
            );
            let told = probe.answer(answer);
            if reload && let Err(error) = client.reload().await {
                tracing::warn!(%error, "the configuration for Kubernetes can't be read again");
            }
            told
        } else if silence <= LOOK {
            vec![KubeInput::Answered]
        } else {
            Vec::new()
        };
        for input in told {
            if inputs.send(Input::Kube(input)).await.is_err() {
                return;
            }
        }
        sleep(probe.pause()).await;
    }
}

/// The UID of a namespace.
///
/// # Errors
///
/// What the API server or the connection said, for a person; `patience` is how long it may take.
pub async fn uid(
    client: &KubeClient,
    namespace: &str,
    patience: Duration,
) -> Result<String, Failure> {
    let body = get(client, &format!("/api/v1/namespaces/{namespace}"), patience).await?;
    let failure = |message: String| Failure {
        code: None,
        message,
    };
    match wire::read_uid(body.as_bytes()) {
        Ok(uid) if !uid.is_empty() => Ok(uid),
        Ok(_) => Err(failure(format!("the namespace {namespace} has no UID"))),
        Err(error) => Err(failure(error.to_string())),
    }
}

/// What follows from the answers; without IO.
struct Probe {
    namespace: Arc<str>,
    uid: Option<String>,
    failures: u32,
    log: LogLimit,
}

impl Probe {
    fn answer(&mut self, answer: Result<String, Failure>) -> Vec<KubeInput> {
        match answer {
            Ok(uid) => {
                self.failures = 0;
                let mut told = vec![KubeInput::Answered];
                if self.uid.as_ref() != Some(&uid) {
                    told.push(KubeInput::ClusterUid(uid.clone()));
                    self.uid = Some(uid);
                }
                told
            }
            Err(failure) => {
                self.failures = self.failures.saturating_add(1);
                if let Some(more) = self.log.pass(std::time::Instant::now()) {
                    tracing::warn!(more, "{}", advice(&self.namespace, &failure));
                }
                // Once the UID is known, a missing permission does not make the API server absent.
                if failure.code == Some(403) && self.uid.is_some() {
                    vec![KubeInput::Answered]
                } else {
                    Vec::new()
                }
            }
        }
    }

    /// The pause before the next look: short only as long as nothing can begin without the UID.
    fn pause(&self) -> Duration {
        if self.uid.is_none() {
            backoff(self.failures, rand::random())
        } else {
            LOOK
        }
    }
}

fn advice(namespace: &str, failure: &Failure) -> String {
    let said = &failure.message;
    match failure.code {
        Some(403) if namespace == EVERYWHERE => format!(
            "can't read the UID of the namespace {namespace}: {said}; grant the verb get on this \
             namespace, as the ClusterRole in deploy/ does (kubectl apply -k deploy/)"
        ),
        Some(403) => format!(
            "can't read the UID of the operator's own namespace {namespace}: {said}; grant the verb get \
             on it by a Role in it (docs/install.md)"
        ),
        Some(401) => format!(
            "the API server does not accept the credentials: {said}; check the kubeconfig or the \
             token of the ServiceAccount"
        ),
        _ => format!("can't reach the API server of Kubernetes: {said}; it is tried again"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: u16) -> Result<String, Failure> {
        Err(Failure {
            code: Some(code),
            message: "no".to_owned(),
        })
    }

    fn probe() -> Probe {
        Probe {
            namespace: EVERYWHERE.into(),
            uid: None,
            failures: 0,
            log: LogLimit::new(),
        }
    }

    #[test]
    fn the_uid_is_told_once_and_again_when_it_is_another() {
        let mut probe = probe();
        let uid = |uid: &str| KubeInput::ClusterUid(uid.to_owned());
        assert_eq!(
            probe.answer(Ok("a".to_owned())),
            [KubeInput::Answered, uid("a")]
        );
        assert_eq!(probe.answer(Ok("a".to_owned())), [KubeInput::Answered]);
        assert_eq!(
            probe.answer(Ok("b".to_owned())),
            [KubeInput::Answered, uid("b")]
        );
    }

    #[test]
    fn only_an_answer_of_the_api_server_counts_as_one() {
        let mut probe = probe();
        assert_eq!(probe.answer(refused(403)), []);
        assert_eq!(probe.answer(refused(503)), []);
        assert!(probe.pause() <= Duration::from_millis(100));
        probe.answer(Ok("a".to_owned()));
        assert_eq!(probe.pause(), LOOK);
        assert_eq!(probe.answer(refused(403)), [KubeInput::Answered]);
        assert_eq!(probe.answer(refused(401)), []);
        assert_eq!(probe.answer(refused(503)), []);
    }
}
