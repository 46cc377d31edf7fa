//! Whether a process is well.
//!
//! Takes an address or a URL, asks it again and again, and says when the answer changes. Must never take one that does not answer
//! for well, nor wait for one longer than it is told.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Empty;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

/// The longest pause between two checks of a process that is not well: it is to be registered soon after it is.
const SOON: Duration = Duration::from_millis(250);

/// Where is looked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Check {
    Tcp(SocketAddr),
    Http(http::Uri),
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Health {
    Unknown,
    Well,
    Ill(String),
}

impl Check {
    /// Reads the flag.
    pub(super) fn parse(text: &str, address: SocketAddr) -> Result<Self, String> {
        let wrong = |why: &str| format!("--check {text}: {why}; write tcp, http, https or a URL");
        let url = match text {
            "tcp" => return Ok(Self::Tcp(address)),
            "http" | "https" => format!("{text}://{address}/"),
            url => url.to_owned(),
        };
        let uri: http::Uri = url.parse().map_err(|error: http::uri::InvalidUri| {
            let why = error.to_string();
            wrong(&why)
        })?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            return Err(wrong("it is neither a URL of http nor of https"));
        }
        Ok(Self::Http(uri))
    }

    /// The scheme that it shows the port to have.
    pub(super) fn scheme(&self) -> Option<&str> {
        match self {
            Self::Tcp(_) => None,
            Self::Http(uri) => uri.scheme_str(),
        }
    }
}

/// Checks until nobody listens any more; says what changes.
pub(super) async fn run(
    check: Check,
    interval: Duration,
    patience: Duration,
    failures: u32,
    health: watch::Sender<Health>,
) {
    let client = client();
    let mut failed = 0;
    while !health.is_closed() {
        let result = match timeout(patience, once(&check, client.as_ref())).await {
            Ok(result) => result,
            Err(_) => Err(format!("no answer within {patience:?}")),
        };
        let well = result.is_ok();
        match result {
            Ok(()) => {
                failed = 0;
                set(&health, Health::Well);
            }
            Err(why) => {
                failed += 1;
                // One that was never well is not registered, whatever is forgiven later.
                if failed >= failures || *health.borrow() == Health::Unknown {
                    set(&health, Health::Ill(why));
                }
            }
        }
        tokio::time::sleep(if well { interval } else { interval.min(SOON) }).await;
    }
}

/// Another reason for the same is no news.
fn set(health: &watch::Sender<Health>, new: Health) {
    health.send_if_modified(|known| {
        let same = std::mem::discriminant(known) == std::mem::discriminant(&new);
        *known = new;
        !same
    });
}

type HttpClient = Client<HttpsConnector<HttpConnector>, Empty<&'static [u8]>>;

/// `None`: TLS can't be used in this process.
fn client() -> Option<HttpClient> {
    let provider = CryptoProvider::get_default()?;
    let config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .ok()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(Arc::clone(provider))))
        .with_no_client_auth();
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(config)
        .https_or_http()
        .enable_http1()
        .build();
    let mut builder = Client::builder(TokioExecutor::new());
    // A connection for each check: that a new one is taken is what others need, too.
    builder.pool_max_idle_per_host(0);
    Some(builder.build(connector))
}

async fn once(check: &Check, client: Option<&HttpClient>) -> Result<(), String> {
    match check {
        Check::Tcp(address) => match TcpStream::connect(address).await {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("{address}: {error}")),
        },
        Check::Http(uri) => {
            let request = http::Request::get(uri.clone())
                .header(http::header::USER_AGENT, "etcd-registrar")
                .body(Empty::new())
                .map_err(|error| error.to_string())?;
            let client = client.ok_or("there is no TLS in this process")?;
            let answer = client.request(request).await.map_err(|error| {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                format!("{uri}: {}", cause.unwrap_or_else(|| error.to_string()))
            })?;
            let status = answer.status();
            if status.is_success() || status.is_redirection() {
                return Ok(());
            }
            Err(format!("{uri}: {status}"))
        }
    }
}

/// Takes any certificate, as the probes of Kubernetes do: whether the process answers is the question, and nothing is told to it.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_read() {
        let address = "[fd00::3]:8080".parse().unwrap();
        let of = |text| Check::parse(text, address);
        assert_eq!(of("tcp"), Ok(Check::Tcp(address)));
        let url = |text: Result<Check, String>| match text {
            Ok(Check::Http(uri)) => uri.to_string(),
            other => panic!("{other:?}"),
        };
        assert_eq!(url(of("http")), "http://[fd00::3]:8080/");
        assert_eq!(url(of("https")), "https://[fd00::3]:8080/");
        assert_eq!(url(of("http://a:1/healthz?x=1")), "http://a:1/healthz?x=1");
        assert_eq!(of("https").unwrap().scheme(), Some("https"));
        for wrong in ["", "udp", "ftp://a/", "http://", "/healthz"] {
            let why = of(wrong).unwrap_err();
            assert!(why.contains("write tcp, http, https or a URL"), "{why}");
        }
    }
}
