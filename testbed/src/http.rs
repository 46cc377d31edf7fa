//! A very small HTTP client: one request per connection, over TCP or TLS. Enough for health checks and for the few
//! requests that would be slow with a kubectl each.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::error::{Context, Error, Result};

/// How long one request may take, so that a frozen server is noticed.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What came back: the status code and the body.
#[derive(Debug, Clone)]
pub struct Response {
    /// Such as 200.
    pub status: u16,
    /// The body as text.
    pub body: String,
}

impl Response {
    /// The body when the status is 2xx, otherwise both in the error.
    pub fn ok(self) -> Result<String, String> {
        if (200..300).contains(&self.status) {
            Ok(self.body)
        } else {
            Err(format!("HTTP status {}: {}", self.status, self.body.trim()))
        }
    }
}

/// TLS with the given authority and, when given, a client certificate with its key.
pub(crate) fn tls_config(ca: &Path, client: Option<(&Path, &Path)>) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).context("TLS", ca.display())? {
        let certificate = certificate.context("TLS", ca.display())?;
        roots.add(certificate).context("TLS", ca.display())?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("TLS", "versions")?
        .with_root_certificates(roots);
    let config = match client {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = CertificateDer::pem_file_iter(certificate)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .context("TLS", certificate.display())?;
            let key = PrivateKeyDer::from_pem_file(key).context("TLS", key.display())?;
            builder
                .with_client_auth_cert(chain, key)
                .context("TLS", "client certificate")?
        }
    };
    Ok(Arc::new(config))
}

/// A request to a port on 127.0.0.1.
pub(crate) struct Request<'a> {
    pub(crate) port: u16,
    pub(crate) tls: Option<Arc<ClientConfig>>,
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) content_type: &'a str,
    pub(crate) body: &'a str,
}

impl Request<'_> {
    pub(crate) fn send(&self) -> Result<Response> {
        let text = self
            .exchange()
            .context("HTTP", format!("{} {}", self.method, self.path))?;
        let (head, body) = text
            .split_once("\r\n\r\n")
            .ok_or_else(|| Error::new("HTTP", "an answer without a header"))?;
        let status = head
            .split_whitespace()
            .nth(1)
            .and_then(|status| status.parse().ok())
            .ok_or_else(|| Error::new("HTTP", format!("an answer without a status: {head}")))?;
        Ok(Response {
            status,
            body: body.to_owned(),
        })
    }

    fn exchange(&self) -> std::io::Result<String> {
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let tcp = TcpStream::connect_timeout(&address, TIMEOUT)?;
        tcp.set_read_timeout(Some(TIMEOUT))?;
        tcp.set_write_timeout(Some(TIMEOUT))?;
        // Version 1.0: the server closes the connection after the answer and does not send it in chunks.
        let request = format!(
            "{} {} HTTP/1.0\r\nHost: 127.0.0.1:{}\r\nAccept: application/json, */*\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n{}",
            self.method,
            self.path,
            self.port,
            self.content_type,
            self.body.len(),
            self.body
        );
        match &self.tls {
            None => converse(tcp, &request),
            Some(config) => {
                let name = ServerName::from(std::net::IpAddr::from([127, 0, 0, 1]));
                let connection =
                    ClientConnection::new(config.clone(), name).map_err(std::io::Error::other)?;
                converse(StreamOwned::new(connection, tcp), &request)
            }
        }
    }
}

fn converse(mut stream: impl Read + Write, request: &str) -> std::io::Result<String> {
    stream.write_all(request.as_bytes())?;
    stream.flush()?;
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        // Some servers close the connection without the closing message of TLS.
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof && !answer.is_empty() => {}
        Err(error) => return Err(error),
        Ok(_) => {}
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// A plain GET on 127.0.0.1.
pub(crate) fn get(port: u16, path: &str) -> Result<Response> {
    request(port, None, path)
}

/// A GET, with TLS when there is a configuration for it.
pub(crate) fn request(port: u16, tls: Option<Arc<ClientConfig>>, path: &str) -> Result<Response> {
    Request {
        port,
        tls,
        method: "GET",
        path,
        content_type: "application/json",
        body: "",
    }
    .send()
}

/// For waiting: an error while the answer isn't 2xx.
pub(crate) fn healthy(port: u16, tls: Option<Arc<ClientConfig>>, path: &str) -> Result<(), String> {
    request(port, tls, path)
        .map_err(|error| error.to_string())?
        .ok()
        .map(drop)
}
