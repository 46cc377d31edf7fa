//! What is looked for: which keys, in which format, and which of their endpoints.

use thiserror::Error;

use super::endpoint::Endpoint;
use crate::format::Format;
use crate::model::etcd::Range;
use crate::model::names::{self, NameError};

/// Which endpoints are looked for. The keys that are read end with a slash (or what else ends a name in the format):
/// `web` is never taken for `web2`.
///
/// ```
/// use etcd_registrar::discovery::{Format, Source};
///
/// // Of every cluster, as the operator registers them by default.
/// let web = Source::service("shop", "web")?;
/// // Those that are near, of the new version.
/// let near = web.clone().zone("eu-a").metadata("version", "v2");
/// // What gRPC-Go would dial as etcd:///grpc/web.
/// let grpc = Source::service_in(Format::Grpc, "grpc/", "shop", "web")?;
/// // Every service of go-micro.
/// let all = Source::prefix(Format::GoMicro, "/micro/registry/")?;
/// # Ok::<(), etcd_registrar::discovery::SourceError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub(super) format: Format,
    /// The prefix of the registrations.
    pub(super) prefix: String,
    /// What the keys begin with.
    below: String,
    /// The service that was named: where names and ports are joined with dots, the keys of another can begin alike.
    service: Option<String>,
    filter: Filter,
}

/// Empty: everything. An endpoint that does not tell what is asked for does not match.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
struct Filter {
    namespaces: Vec<String>,
    clusters: Vec<String>,
    zones: Vec<String>,
    ports: Vec<String>,
    metadata: Vec<(String, String)>,
}

/// A source that can't be one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SourceError {
    /// A name or the prefix is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The prefix is none of the format.
    #[error("{0}")]
    Prefix(&'static str),
    /// Without a prefix and a service every key of etcd would be taken for an endpoint.
    #[error("name a service or a prefix: without them every key of etcd would be read")]
    Everything,
}

impl Source {
    /// The endpoints of a service in the default format, Json below `/services/`, of all clusters.
    ///
    /// # Errors
    ///
    /// When namespace or service can't be names.
    pub fn service(namespace: &str, service: &str) -> Result<Self, SourceError> {
        let format = Format::Json;
        let prefix = format.default_prefix();
        Self::service_in(format, prefix, namespace, service)
    }

    /// The endpoints of a service in any format, of all clusters. `prefix` is that of the registration, usually
    /// [`Format::default_prefix`]; for formats whose keys name no namespace it makes no difference which is given.
    ///
    /// # Errors
    ///
    /// When namespace or service can't be names, or the prefix is none of the format.
    pub fn service_in(
        format: Format,
        prefix: &str,
        namespace: &str,
        service: &str,
    ) -> Result<Self, SourceError> {
        names::namespace(namespace)?;
        names::service(service)?;
        names::prefix(prefix)?;
        format.check_prefix(prefix).map_err(SourceError::Prefix)?;
        if prefix.is_empty() && matches!(format, Format::SkyDns(_)) {
            return Err(SourceError::Prefix(
                "format SkyDns has no prefix of its own: name path and zone reversed, for example `/skydns/local/skydns/`",
            ));
        }
        let mut filter = Filter::default();
        if format.is_aggregate() {
            // Its keys begin with the cluster: the services of all namespaces are read, and told apart.
            filter.namespaces.push(namespace.to_owned());
        }
        Ok(Self {
            below: format.scope(prefix, namespace, service),
            prefix: prefix.to_owned(),
            format,
            service: Some(service.to_owned()),
            filter,
        })
    }

    /// The endpoints of all services below the prefix of a registration. [`Endpoint::service`] tells them apart.
    ///
    /// # Errors
    ///
    /// When the prefix is empty, can't be one, or is none of the format.
    pub fn prefix(format: Format, prefix: &str) -> Result<Self, SourceError> {
        if prefix.is_empty() {
            return Err(SourceError::Everything);
        }
        names::prefix(prefix)?;
        format.check_prefix(prefix).map_err(SourceError::Prefix)?;
        Ok(Self {
            below: prefix.to_owned(),
            prefix: prefix.to_owned(),
            format,
            service: None,
            filter: Filter::default(),
        })
    }

    /// Only endpoints of this namespace; of several namespaces, when it is said several times.
    #[must_use]
    pub fn namespace(mut self, name: impl Into<String>) -> Self {
        self.filter.namespaces.push(name.into());
        self
    }

    /// Only endpoints of this cluster; of several clusters, when it is said several times.
    #[must_use]
    pub fn cluster(mut self, name: impl Into<String>) -> Self {
        self.filter.clusters.push(name.into());
        self
    }

    /// Only endpoints in this zone; in several zones, when it is said several times.
    #[must_use]
    pub fn zone(mut self, name: impl Into<String>) -> Self {
        self.filter.zones.push(name.into());
        self
    }

    /// Only endpoints on the port of this name; on several ports, when it is said several times.
    #[must_use]
    pub fn port(mut self, name: impl Into<String>) -> Self {
        self.filter.ports.push(name.into());
        self
    }

    /// Only endpoints with this entry in their metadata; with all of them, when it is said several times.
    #[must_use]
    pub fn metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.filter.metadata.push((name.into(), value.into()));
        self
    }

    /// What the keys that are read begin with.
    #[must_use]
    pub fn below(&self) -> &str {
        &self.below
    }

    /// The keys that are read.
    pub(super) fn range(&self) -> Range {
        Range::prefix(self.below.as_bytes())
    }

    /// Whether the endpoint is looked for.
    pub(super) fn wants(&self, endpoint: &Endpoint) -> bool {
        let among = |wanted: &[String], told: Option<&str>| {
            wanted.is_empty() || told.is_some_and(|told| wanted.iter().any(|name| name == told))
        };
        let filter = &self.filter;
        self.service
            .as_deref()
            .is_none_or(|service| service == endpoint.service())
            && among(&filter.namespaces, endpoint.namespace())
            && among(&filter.clusters, endpoint.cluster())
            && among(&filter.zones, endpoint.zone())
            && among(&filter.ports, endpoint.port_name())
            && filter
                .metadata
                .iter()
                .all(|(name, value)| endpoint.metadata_value(name) == Some(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_never_reads_the_keys_of_another() {
        for name in [
            "Json", "Plain", "Grpc", "Kitex", "Hertz", "Kratos", "SkyDns", "GoMicro", "Traefik",
            "Apisix", "Template",
        ] {
            let format = Format::by_name(name).unwrap();
            let prefix = match &format {
                Format::SkyDns(_) => "/skydns/local/skydns/",
                format => format.default_prefix(),
            };
            let source = Source::service_in(format.clone(), prefix, "shop", "web").unwrap();
            for other in ["web2", "web.x2", "we"] {
                let scope = format.scope(prefix, "shop", other);
                // Those of Traefik and Apisix are told apart when they are read.
                if name != "Apisix" && (name != "Traefik" || other != "web.x2") {
                    assert!(!source.range().contains(scope.as_bytes()), "{name} {other}");
                }
            }
        }
    }

    #[test]
    fn what_can_t_be_a_source_is_refused() {
        for (made, part) in [
            (Source::service("shop", "a/b"), "service name"),
            (Source::service("Shop", "web"), "namespace"),
            (Source::service("shop", ""), "service name"),
            (Source::prefix(Format::Plain, ""), "every key"),
            (Source::prefix(Format::Plain, "/web"), "slash"),
            (Source::prefix(Format::Grpc, "/grpc/"), "no leading slash"),
            (
                Source::service_in(Format::Json, "", "shop", "web"),
                "a prefix",
            ),
            (
                Source::service_in(Format::by_name("SkyDns").unwrap(), "", "shop", "web"),
                "zone reversed",
            ),
        ] {
            let error = made.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
