//! Health and metrics over HTTP.
//!
//! Takes a heartbeat of the engine, the reasons why this replica is not ready, and the metrics;
//! gives `/healthz`, `/readyz` and `/metrics`. Must never ask etcd or Kubernetes anything: an
//! outage of either must not restart the replicas that keep the leases alive.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

pub mod metrics;

/// The engine gets a tick every 100 ms; one that made no progress for so long is stuck. Shorter
/// than any sensible liveness probe gives up, longer than the largest list takes to be worked in.
const STUCK: Duration = Duration::from_secs(15);

/// What OpenMetrics 1.0 prescribes.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why the server can't serve.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The address can't be listened on.
    #[error("can't listen on {address} (--listen): {source}; is it taken by another process?")]
    Listen {
        /// The address that was asked for.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The server ended.
    #[error("the server of health and metrics ended: {0}")]
    Serve(#[source] std::io::Error),
}

/// What the probes are told; clones share it.
#[derive(Clone, Debug)]
pub struct Health {
    state: Arc<Mutex<HealthState>>,
}

#[derive(Debug)]
struct HealthState {
    heartbeat: Instant,
    /// Why this replica is not ready, a line a reason; empty: it is.
    not_ready: Vec<String>,
}

impl Health {
    /// Healthy from now on, and not ready before [`Health::set_ready`] says so.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: Arc::new(Mutex::new(HealthState {
                heartbeat: Instant::now(),
                not_ready: vec!["starting".to_owned()],
            })),
        }
    }

    /// The engine made progress; to be called at least once a second.
    pub fn beat(&self) {
        self.with(|state| state.heartbeat = Instant::now());
    }

    /// Why this replica is not ready, a line a reason; none: it is.
    pub fn set_ready(&self, not_ready: Vec<String>) {
        self.with(|state| state.not_ready = not_ready);
    }

    fn with<T>(&self, act: impl FnOnce(&mut HealthState) -> T) -> T {
        // Nothing in here panics half-way, so a poisoned lock still holds whole values.
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn healthz(&self, now: Instant) -> (StatusCode, String) {
        let silent = self.with(|state| now.saturating_duration_since(state.heartbeat));
        if silent < STUCK {
            (StatusCode::OK, "ok\n".to_owned())
        } else {
            (
                StatusCode::SERVICE_UNAVAILABLE,
                format!("the engine made no progress for {} s\n", silent.as_secs()),
            )
        }
    }

    fn readyz(&self) -> (StatusCode, String) {
        let reasons = self.with(|state| state.not_ready.clone());
        if reasons.is_empty() {
            (StatusCode::OK, "ok\n".to_owned())
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n")
        }
    }
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

/// Binds the address of `--listen`; port 0 takes a free one.
///
/// # Errors
/// [`AdminError::Listen`] when the address is taken or not this machine's.
pub async fn listen(address: SocketAddr) -> Result<TcpListener, AdminError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| AdminError::Listen { address, source })
}

/// Serves until the task is dropped.
///
/// # Errors
/// [`AdminError::Serve`] when the listener fails for good.
pub async fn serve(
    listener: TcpListener,
    health: Health,
    registry: Registry,
) -> Result<(), AdminError> {
    axum::serve(listener, router(health, registry))
        .await
        .map_err(AdminError::Serve)
}

fn router(health: Health, registry: Registry) -> Router {
    let registry = Arc::new(registry);
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(health)
        .route("/metrics", get(metrics_text).with_state(registry))
}

async fn healthz(State(health): State<Health>) -> (StatusCode, String) {
    health.healthz(Instant::now())
}

async fn readyz(State(health): State<Health>) -> (StatusCode, String) {
    health.readyz()
}

async fn metrics_text(State(registry): State<Arc<Registry>>) -> Response {
    match metrics::text(&registry) {
        Ok(text) => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    #[test]
    fn an_engine_without_progress_is_not_healthy() {
        let health = Health::new();
        let beat = Instant::now();
        health.beat();
        assert_eq!(health.healthz(beat).0, StatusCode::OK);
        let (code, body) = health.healthz(beat + STUCK * 2);
        assert_eq!(code, StatusCode::SERVICE_UNAVAILABLE);
        assert!(body.contains("no progress"), "{body}");
    }

    #[test]
    fn readiness_names_every_reason_on_a_line() {
        let health = Health::new();
        assert_eq!(health.readyz().0, StatusCode::SERVICE_UNAVAILABLE);
        health.set_ready(vec![
            "etcd is away".to_owned(),
            "pods not listed".to_owned(),
        ]);
        assert_eq!(health.readyz().1, "etcd is away\npods not listed\n");
        health.set_ready(Vec::new());
        assert_eq!(health.readyz(), (StatusCode::OK, "ok\n".to_owned()));
    }

    async fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn the_three_paths_are_served() {
        let listener = listen(([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (metrics, registry) = metrics::Metrics::new();
        metrics.set_live(true);
        let health = Health::new();
        let server = tokio::spawn(serve(listener, health.clone(), registry));
        assert!(ask(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(ask(address, "/readyz").await.starts_with("HTTP/1.1 503"));
        let text = ask(address, "/metrics").await;
        assert!(text.contains("\netcd_registrar_live 1\n"), "{text}");
        assert!(text.contains(METRICS_TYPE), "{text}");
        assert!(ask(address, "/other").await.starts_with("HTTP/1.1 404"));
        // A second server on the same address is told so.
        let error = listen(address).await.unwrap_err();
        assert!(error.to_string().contains("--listen"), "{error}");
        server.abort();
    }
}
