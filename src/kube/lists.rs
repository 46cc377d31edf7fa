//! Requests that are made once: lists, for commands, and what the probe asks.
//!
//! Takes a resource, gives all of its objects. Must never give a part for the whole: an error on the way is one.

use std::time::Duration;

use tokio::time::timeout;

use super::client::KubeClient;
use super::explain;
use super::session::list_path;
use super::wire::{self, Encoding, Item};
use crate::engine::io::{Object, Resource};

/// Objects a page, as the watches take them.
const PAGE: u32 = 500;

/// All objects of a resource.
#[derive(Debug, Default)]
pub struct Listed {
    /// Those that were understood.
    pub objects: Vec<Object>,
    /// Why others were not, for a person.
    pub not_understood: Vec<String>,
}

/// Lists a resource of all namespaces. `patience` is for each page.
///
/// # Errors
///
/// What the API server or the connection said, for a person.
pub async fn all(
    client: &KubeClient,
    resource: Resource,
    patience: Duration,
) -> Result<Listed, String> {
    let path = list_path(resource, None);
    let mut listed = Listed::default();
    let mut next: Option<String> = None;
    loop {
        let token = next.as_deref().map(|token| format!("&continue={token}"));
        let query = format!("{path}?limit={PAGE}{}", token.unwrap_or_default());
        let body = get(client, &query, patience)
            .await
            .map_err(|failure| format!("can't list {path}: {}", failure.message))?;
        let page = wire::read_page(resource, Encoding::Json, body.as_bytes())
            .map_err(|error| format!("can't list {path}: {error}"))?;
        for item in page.items {
            match item {
                Item::Read(object) => listed.objects.push(object),
                Item::NotUnderstood(why) => listed.not_understood.push(why),
            }
        }
        next = page.next;
        if next.is_none() {
            return Ok(listed);
        }
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub struct Failure {
    /// The HTTP status, where the API server answered.
    pub code: Option<u16>,
    /// What it or the connection said, for a person.
    pub message: String,
}

/// Asks for a path.
///
/// # Errors
///
/// When there is no answer within `patience`, or it is no success.
pub async fn get(client: &KubeClient, path: &str, patience: Duration) -> Result<String, Failure> {
    let failure = |message: String| Failure {
        code: None,
        message,
    };
    let request = http::Request::get(path)
        .body(Vec::new())
        .map_err(|error| failure(error.to_string()))?;
    timeout(patience, client.current().request_text(request))
        .await
        .map_err(|_| {
            failure(format!(
                "{}: no answer within {patience:?}",
                client.server()
            ))
        })?
        .map_err(|error| Failure {
            code: super::code(&error),
            message: match error {
                kube::Error::Api(_) => explain(&error),
                _ => format!("{}: {}", client.server(), explain(&error)),
            },
        })
}
