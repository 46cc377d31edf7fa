//! Endpoint <-> record, one file a format; pure.
//!
//! Takes the endpoints of one pod in one registration and gives their records; takes a key and a
//! value that anybody may have written and gives what they tell. Must never read a clock, keep a
//! state, or panic on bytes from etcd, and never write a key outside [`Format::scope`].
//!
//! A new format is a file of its own and a variant here, which carries its settings. A record may
//! stand for several endpoints of its pod (all ports in one), and an endpoint may need several
//! records; [`Rules`] say how they go to etcd.

pub mod apisix;
mod go_micro;
mod grpc;
mod json;
mod kitex;
pub mod kratos;
mod plain;
pub mod sky_dns;
pub mod template;
pub mod traefik;

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use sha2::{Digest, Sha256};

use crate::model::endpoint::{Endpoint, Family, Protocol, Target};

use sky_dns::SkyDns;
use template::Template;
use traefik::Kind;

/// The records that share a lease unless a format says otherwise (measured: shared leases register
/// 10,000 endpoints in 0.13 s against 3.6 s).
pub const RECORDS_PER_LEASE: usize = 256;

/// How an endpoint is written.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub enum Format {
    /// The project's own: everything that a client may want.
    #[default]
    Json,
    /// The bare address: go-zero, go-kit, confd and most hand-written registries.
    Plain,
    /// The naming package of etcd's Go client: the resolver of gRPC-Go.
    Grpc,
    /// The registry of Kitex.
    Kitex,
    /// The registry of Hertz.
    Hertz,
    /// The registry of Kratos.
    Kratos,
    /// The plugin `etcd` of CoreDNS.
    SkyDns(SkyDns),
    /// The etcd registry of go-micro.
    GoMicro,
    /// The KV provider of Traefik 3.
    Traefik(Kind),
    /// Upstreams of APISIX.
    Apisix,
    /// Templates of the registration's own; none where they are not known, and records are only read.
    Template(Option<Template>),
}

/// Where the records of a registration stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// The prefix of the spec; empty or ending with a slash.
    pub prefix: &'a str,
}

/// A key and its value, and the endpoints that they stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Vec<u8>,
    /// The targets of the endpoints, in the order given.
    pub targets: Vec<Target>,
}

/// What one record is for that stands for all endpoints of a port, whatever their pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aggregate<'a> {
    /// The cluster.
    pub cluster: &'a str,
    /// The namespace.
    pub namespace: &'a str,
    /// The service's name.
    pub service: &'a str,
    /// The name of the port.
    pub port_name: &'a str,
    /// The scheme of the port.
    pub scheme: &'a str,
}

/// An endpoint in such a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Address, port and protocol.
    pub target: Target,
    /// The weight.
    pub weight: u32,
    /// The zone; empty when unknown.
    pub zone: &'a str,
}

/// How the records of one pod go into transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bundle {
    /// As it suits the writer.
    Free,
    /// Each one in a transaction of its own.
    Alone,
    /// All of them in the same transaction and on the same lease.
    Together,
}

/// What a format asks of the writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// How many records may share a lease.
    pub records_per_lease: usize,
    /// How the records of one pod go into transactions.
    pub bundle: Bundle,
}

/// What a record tells. `None`: the format does not hold it, or the record leaves it out.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Discovered {
    /// The address as the record has it, usually `host:port`.
    pub address: String,
    /// Address and port, when the address is an IP address.
    pub socket: Option<SocketAddr>,
    /// The protocol.
    pub protocol: Option<Protocol>,
    /// The name of the port.
    pub port_name: Option<String>,
    /// The scheme.
    pub scheme: Option<String>,
    /// The cluster that registered it.
    pub cluster: Option<String>,
    /// The namespace.
    pub namespace: Option<String>,
    /// The service's name.
    pub service: String,
    /// The pod's name.
    pub pod: Option<String>,
    /// The pod's UID.
    pub uid: Option<String>,
    /// The node's name.
    pub node: Option<String>,
    /// The zone.
    pub zone: Option<String>,
    /// The weight.
    pub weight: Option<u32>,
    /// The metadata, sorted by name.
    pub metadata: Vec<(String, String)>,
}

impl Discovered {
    /// The target, when address and protocol are known.
    #[must_use]
    pub fn target(&self) -> Option<Target> {
        let socket = self.socket?;
        Some(Target {
            ip: socket.ip(),
            port: socket.port(),
            protocol: self.protocol?,
        })
    }

    /// Whether the record may hold this target: a protocol that it does not tell can be any.
    #[must_use]
    pub fn holds(&self, target: &Target) -> bool {
        self.socket == Some(SocketAddr::new(target.ip, target.port))
            && self
                .protocol
                .is_none_or(|protocol| protocol == target.protocol)
    }

    /// The whole endpoint, when the record holds what makes one (Json does).
    #[must_use]
    pub fn endpoint(&self) -> Option<Endpoint> {
        Some(Endpoint {
            target: self.target()?,
            port_name: self.port_name.clone()?,
            scheme: self.scheme.clone().unwrap_or_default(),
            cluster: self.cluster.clone()?,
            namespace: self.namespace.clone()?,
            service: self.service.clone(),
            pod: self.pod.clone()?,
            uid: self.uid.clone()?,
            node: self.node.clone().unwrap_or_default(),
            zone: self.zone.clone().unwrap_or_default(),
            weight: self.weight?,
            metadata: self.metadata.clone(),
        })
    }
}

/// A record that is none of this format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The key is not valid UTF-8.
    #[error("the key is not valid UTF-8")]
    KeyNotUtf8,
    /// The key does not begin with the prefix.
    #[error("the key is not below the prefix")]
    KeyOutside,
    /// The key has other segments than the format's.
    #[error("the key is not of the form {0}")]
    KeyShape(&'static str),
    /// The value can't be read.
    #[error("the value is not {0}")]
    Value(String),
    /// The value tells something else than the key.
    #[error("the value's {0} is not that of the key")]
    Mismatch(&'static str),
    /// It tells something of an endpoint whose address stands at another key.
    #[error("the address of the endpoint stands at another key")]
    Beside,
    /// It stands for no endpoint now, and may again.
    #[error("it has no endpoint")]
    Empty,
}

impl Format {
    /// The name in the API and in the policy.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Json => "Json",
            Self::Plain => "Plain",
            Self::Grpc => "Grpc",
            Self::Kitex => "Kitex",
            Self::Hertz => "Hertz",
            Self::Kratos => "Kratos",
            Self::SkyDns(_) => "SkyDns",
            Self::GoMicro => "GoMicro",
            Self::Traefik(_) => "Traefik",
            Self::Apisix => "Apisix",
            Self::Template(_) => "Template",
        }
    }

    /// The inverse of [`Format::name`], without settings: enough to read records.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "Json" => Self::Json,
            "Plain" => Self::Plain,
            "Grpc" => Self::Grpc,
            "Kitex" => Self::Kitex,
            "Hertz" => Self::Hertz,
            "Kratos" => Self::Kratos,
            "SkyDns" => Self::SkyDns(SkyDns::default()),
            "GoMicro" => Self::GoMicro,
            "Traefik" => Self::Traefik(Kind::default()),
            "Apisix" => Self::Apisix,
            "Template" => Self::Template(None),
            _ => return None,
        })
    }

    /// The prefix of a registration that names none: those of the golden records. That of SkyDns is
    /// made from its settings ([`sky_dns::prefix`]).
    #[must_use]
    pub fn default_prefix(&self) -> &'static str {
        match self {
            Self::Json => json::DEFAULT_PREFIX,
            Self::Plain => plain::DEFAULT_PREFIX,
            Self::Grpc => grpc::DEFAULT_PREFIX,
            Self::Kitex => kitex::KITEX_PREFIX,
            Self::Hertz => kitex::HERTZ_PREFIX,
            Self::Kratos => kratos::DEFAULT_PREFIX,
            Self::SkyDns(_) | Self::Template(_) => "",
            Self::GoMicro => go_micro::PREFIX,
            Self::Traefik(_) => traefik::DEFAULT_PREFIX,
            Self::Apisix => apisix::DEFAULT_PREFIX,
        }
    }

    /// Whether a prefix, which is valid as such, is one for this format.
    ///
    /// # Errors
    ///
    /// Says what to write.
    pub fn check_prefix(&self, prefix: &str) -> Result<(), &'static str> {
        match self {
            Self::Json if prefix.is_empty() => Err(
                "format Json needs a prefix that ends with a slash, for example `/services/`; only Plain, Grpc and Template can do without",
            ),
            Self::Grpc if prefix.starts_with('/') => Err(
                "format Grpc takes no leading slash, because gRPC clients dial etcd:///{prefix}{service}: write for example `grpc/`, or nothing",
            ),
            Self::Kitex if prefix.is_empty() || prefix.starts_with('/') => Err(
                "format Kitex needs a prefix without a leading slash, because its client reads `{prefix}{service}/` as the prefix is written: write for example `kitex/registry-etcd/`",
            ),
            Self::Hertz if prefix != kitex::HERTZ_PREFIX => Err(
                "the client of Hertz reads below `hertz/registry-etcd/` and can be given no other prefix: leave `prefix` out",
            ),
            Self::Kratos if !prefix.starts_with('/') => Err(
                "format Kratos needs a prefix with a leading slash, because its client reads `/{namespace}/{service}`: write for example `/microservices/`",
            ),
            Self::GoMicro if prefix != go_micro::PREFIX => Err(
                "the client of go-micro reads below `/micro/registry/` and can be given no other prefix: leave `prefix` out",
            ),
            Self::Traefik(_) if prefix.is_empty() || prefix.starts_with('/') => Err(
                "format Traefik needs the root key of Traefik's provider as its prefix, without a leading slash: write for example `traefik/`",
            ),
            Self::Apisix if !prefix.starts_with('/') || !prefix.ends_with(apisix::DIRECTORY) => {
                Err(
                    "format Apisix needs the prefix of APISIX's etcd and `/upstreams/` as its prefix, because APISIX reads upstreams nowhere else: write for example `/apisix/upstreams/`",
                )
            }
            Self::Json
            | Self::Plain
            | Self::Grpc
            | Self::Kitex
            | Self::Hertz
            | Self::Kratos
            | Self::SkyDns(_)
            | Self::GoMicro
            | Self::Traefik(_)
            | Self::Apisix
            | Self::Template(_) => Ok(()),
        }
    }

    /// Whether a key tells two ports with one address and number apart. Where it does not, they
    /// can't be registered under one service.
    #[must_use]
    pub fn key_names_port(&self) -> bool {
        match self {
            Self::Json | Self::Plain | Self::Grpc | Self::Kitex | Self::Hertz | Self::Kratos => {
                false
            }
            // What a template tells apart is tried when it is accepted.
            Self::SkyDns(_)
            | Self::GoMicro
            | Self::Traefik(_)
            | Self::Apisix
            | Self::Template(_) => true,
        }
    }

    /// What the format asks of the writer.
    #[must_use]
    pub fn rules(&self) -> Rules {
        match self {
            // Of three keys whose shared lease expires, go-micro's watcher sees one go.
            Self::GoMicro => Rules {
                records_per_lease: 1,
                bundle: Bundle::Alone,
            },
            // As large as a transaction may be.
            Self::Apisix => Rules {
                records_per_lease: RECORDS_PER_LEASE,
                bundle: Bundle::Alone,
            },
            // A server with a weight and without its address is one that fails.
            Self::Traefik(_) => Rules {
                records_per_lease: RECORDS_PER_LEASE,
                bundle: Bundle::Together,
            },
            Self::Json
            | Self::Plain
            | Self::Grpc
            | Self::Kitex
            | Self::Hertz
            | Self::Kratos
            | Self::SkyDns(_)
            | Self::Template(_) => Rules {
                records_per_lease: RECORDS_PER_LEASE,
                bundle: Bundle::Free,
            },
        }
    }

    /// How many endpoints so many keys of a registration stand for, which registers so many ports.
    #[must_use]
    pub fn endpoints_of(&self, keys: u32, ports: usize) -> u32 {
        match self {
            Self::Kratos => keys.saturating_mul(u32::try_from(ports).unwrap_or(u32::MAX)),
            Self::Traefik(kind) => keys / kind.keys(),
            _ => keys,
        }
    }

    /// What stands before the service in a key: what a policy grants. It ends with a slash or is
    /// empty. (The names of Traefik and Apisix hold the namespace behind it: nobody can write for another.)
    #[must_use]
    pub fn base(&self, prefix: &str, namespace: &str) -> String {
        match self {
            Self::Json => json::base(prefix, namespace),
            Self::SkyDns(_) => sky_dns::base(prefix, namespace),
            Self::Plain
            | Self::Grpc
            | Self::Kitex
            | Self::Hertz
            | Self::Kratos
            | Self::GoMicro
            | Self::Traefik(_)
            | Self::Apisix
            | Self::Template(_) => prefix.to_owned(),
        }
    }

    /// The narrowest prefix that holds the records of a service of all clusters. It ends with a slash; that of
    /// Traefik with a dot, behind which the port follows. The keys of Apisix begin with the cluster: here, it is their
    /// whole prefix.
    #[must_use]
    pub fn scope(&self, prefix: &str, namespace: &str, service: &str) -> String {
        match self {
            Self::Traefik(kind) => return traefik::scope(prefix, *kind, namespace, service),
            Self::Apisix => return prefix.to_owned(),
            _ => {}
        }
        let mut scope = self.base(prefix, namespace);
        scope.push_str(service);
        scope.push('/');
        scope
    }

    /// The scope of a registration: as [`Format::scope`], but of this cluster where a service of each cluster is one of
    /// its own (Apisix).
    #[must_use]
    pub fn scope_in(&self, prefix: &str, cluster: &str, namespace: &str, service: &str) -> String {
        match self {
            Self::Apisix => apisix::scope(prefix, cluster, namespace, service),
            _ => self.scope(prefix, namespace, service),
        }
    }

    /// Whether one record stands for the endpoints of all pods on a port, as long as the registration does.
    #[must_use]
    pub fn is_aggregate(&self) -> bool {
        matches!(self, Self::Apisix)
    }

    /// The key of an aggregate record; `None`: the format has none.
    #[must_use]
    pub fn aggregate_key(&self, place: &Place<'_>, aggregate: &Aggregate<'_>) -> Option<String> {
        self.is_aggregate().then(|| apisix::key(place, aggregate))
    }

    /// The value of an aggregate record with these endpoints, and how many of them, the last ones by what comes with
    /// each, don't fit in; `None`: the format has none.
    #[must_use]
    pub fn aggregate_value<'a, A: Ord>(
        &self,
        aggregate: &Aggregate<'_>,
        nodes: impl IntoIterator<Item = (Entry<'a>, A)>,
    ) -> Option<(Vec<u8>, usize)> {
        self.is_aggregate().then(|| apisix::value(aggregate, nodes))
    }

    /// The records of all endpoints of one pod in one registration (of Apisix: of however many pods). Where several endpoints want
    /// one key (two named ports with one number), the first one has it: in one transaction etcd
    /// takes a key once.
    #[must_use]
    pub fn records(&self, place: &Place<'_>, endpoints: &[Endpoint]) -> Vec<Record> {
        let found: Vec<Record> = match self {
            Self::Kratos => return kratos::records(place, endpoints),
            Self::Apisix => return apisix::records(place, endpoints),
            Self::Traefik(kind) => endpoints
                .iter()
                .flat_map(|endpoint| traefik::records(place, *kind, endpoint))
                .collect(),
            Self::SkyDns(settings) => endpoints
                .iter()
                .map(|endpoint| sky_dns::record(place, endpoint, settings.ttl))
                .collect(),
            Self::Json => each(place, endpoints, json::record),
            Self::Plain => each(place, endpoints, plain::record),
            Self::Grpc => each(place, endpoints, grpc::record),
            Self::Kitex | Self::Hertz => each(place, endpoints, kitex::record),
            Self::GoMicro => each(place, endpoints, go_micro::record),
            Self::Template(template) => template
                .iter()
                .flat_map(|template| endpoints.iter().map(|e| template.record(place, e)))
                .filter_map(Result::ok)
                .collect(),
        };
        first_of_each(found, |record| &record.key)
    }

    /// Keys and targets of [`Format::records`], without the values.
    ///
    /// # Errors
    ///
    /// Says why one of them has no record: a template can't be filled in for it.
    pub fn keys(
        &self,
        place: &Place<'_>,
        endpoints: &[Endpoint],
    ) -> Result<Vec<(String, Vec<Target>)>, String> {
        let one = |endpoint: &Endpoint, key: String| (key, vec![endpoint.target]);
        let found: Vec<(String, Vec<Target>)> = match self {
            Self::Kratos => return Ok(kratos::keys(place, endpoints)),
            Self::Apisix => return Ok(apisix::keys(place, endpoints)),
            Self::Traefik(kind) => endpoints
                .iter()
                .flat_map(|endpoint| traefik::keys(place, *kind, endpoint))
                .collect(),
            Self::SkyDns(_) => each(place, endpoints, |place, endpoint| {
                one(endpoint, sky_dns::key(place, endpoint))
            }),
            Self::Json => each(place, endpoints, |place, endpoint| {
                one(endpoint, json::key(place, endpoint).0)
            }),
            Self::Plain | Self::Grpc | Self::Kitex | Self::Hertz => {
                each(place, endpoints, |place, endpoint| {
                    one(endpoint, plain::key(place, endpoint).0)
                })
            }
            Self::GoMicro => each(place, endpoints, |place, endpoint| {
                one(endpoint, go_micro::key(place, endpoint).0)
            }),
            Self::Template(None) => Vec::new(),
            Self::Template(Some(template)) => endpoints
                .iter()
                .map(|endpoint| Ok((template.record(place, endpoint)?.key, vec![endpoint.target])))
                .collect::<Result<_, String>>()?,
        };
        Ok(first_of_each(found, |(key, _)| key))
    }

    /// What a record tells; of one that stands for several endpoints, the first. `prefix` is that of
    /// the registration.
    ///
    /// # Errors
    ///
    /// When key or value are not of this format: others may write any bytes there.
    pub fn read(&self, prefix: &str, key: &[u8], value: &[u8]) -> Result<Discovered, ReadError> {
        let below = below(prefix, key)?;
        match self {
            Self::Json => json::read(below, value),
            Self::Plain => plain::read(below, value),
            Self::Grpc => grpc::read(below, value),
            Self::Kitex | Self::Hertz => kitex::read(below, value),
            Self::Kratos => kratos::read(below, value)?
                .into_iter()
                .next()
                .ok_or(ReadError::Beside),
            Self::Apisix => apisix::read(below, value)?
                .into_iter()
                .next()
                .ok_or(ReadError::Empty),
            Self::SkyDns(_) => sky_dns::read(below, value),
            Self::GoMicro => go_micro::read(below, value),
            Self::Traefik(_) => traefik::read(below, value),
            Self::Template(_) => template::read(below, value),
        }
    }

    /// All that a record tells: one for each of its endpoints; none only where one record is for all pods.
    ///
    /// # Errors
    ///
    /// As for [`Format::read`].
    pub fn read_all(
        &self,
        prefix: &str,
        key: &[u8],
        value: &[u8],
    ) -> Result<Vec<Discovered>, ReadError> {
        match self {
            Self::Kratos => kratos::read(below(prefix, key)?, value),
            Self::Apisix => apisix::read(below(prefix, key)?, value),
            _ => Ok(vec![self.read(prefix, key, value)?]),
        }
    }

    /// Whether a record may stand for several endpoints.
    #[must_use]
    pub fn holds_several(&self) -> bool {
        matches!(self, Self::Kratos | Self::Apisix)
    }

    /// The key of the record that tells which endpoint this one belongs to, where it is another.
    #[must_use]
    pub fn lead_of(&self, key: &[u8]) -> Option<Vec<u8>> {
        match self {
            Self::Traefik(_) => traefik::lead_of(key),
            _ => None,
        }
    }

    /// Whether a record names its pod by UID.
    #[must_use]
    pub fn names_pod(&self) -> bool {
        matches!(self, Self::Json)
    }

    /// The cluster that the key names, without a look at the value; `None` where the format's keys
    /// name none, or the key is not of this format.
    #[must_use]
    pub fn cluster_of<'a>(&self, prefix: &str, key: &'a [u8]) -> Option<&'a str> {
        let below = key.strip_prefix(prefix.as_bytes())?;
        match self {
            Self::Json => json::cluster_of(below),
            Self::Kratos => kratos::cluster_of(below),
            Self::SkyDns(_) => sky_dns::cluster_of(below),
            Self::GoMicro => go_micro::cluster_of(below),
            Self::Apisix => apisix::cluster_of(below),
            Self::Plain
            | Self::Grpc
            | Self::Kitex
            | Self::Hertz
            | Self::Traefik(_)
            | Self::Template(_) => None,
        }
    }
}

/// The part of a key that those keys share which go in one transaction ([`Bundle::Together`]); the whole
/// key where there are none. Of every key, whatever its format: it decides through which lane a key goes.
#[must_use]
pub fn bundle_of(key: &[u8]) -> &[u8] {
    traefik::bundle(key)
}

/// Whether a scope of which the key may be a part can end with a dot.
#[must_use]
pub fn has_dotted_scope(key: &[u8]) -> bool {
    traefik::bundle(key).len() < key.len() || apisix::is_upstream(key)
}

/// What is made of each endpoint.
fn each<T>(
    place: &Place<'_>,
    endpoints: &[Endpoint],
    make: impl Fn(&Place<'_>, &Endpoint) -> T,
) -> Vec<T> {
    endpoints
        .iter()
        .map(|endpoint| make(place, endpoint))
        .collect()
}

/// Without those whose key an earlier one has.
fn first_of_each<T>(mut found: Vec<T>, key: impl Fn(&T) -> &str) -> Vec<T> {
    let mut at = 1;
    while let Some(next) = found.get(at) {
        if found
            .iter()
            .take(at)
            .any(|earlier| key(earlier) == key(next))
        {
            found.remove(at);
        } else {
            at += 1;
        }
    }
    found
}

/// What follows the prefix.
fn below<'a>(prefix: &str, key: &'a [u8]) -> Result<&'a str, ReadError> {
    let key = std::str::from_utf8(key).map_err(|_| ReadError::KeyNotUtf8)?;
    key.strip_prefix(prefix).ok_or(ReadError::KeyOutside)
}

/// The family of an address as a segment of a key.
fn family(ip: IpAddr) -> &'static str {
    match Family::of(ip) {
        Family::V4 => "v4",
        Family::V6 => "v6",
    }
}

/// The selected metadata of the name `version`, or nothing.
fn metadata_version(endpoint: &Endpoint) -> &str {
    endpoint
        .metadata
        .iter()
        .find(|(name, _)| name == "version")
        .map_or("", |(_, value)| value)
}

/// A hash in lower-case hex.
fn sha256(text: &str) -> String {
    let mut hex = String::with_capacity(64);
    for byte in Sha256::digest(text.as_bytes()) {
        // Writing to a String can't fail.
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

/// Service and last segment of `{service}/{address}`.
fn service_and_last(below: &str) -> Result<(&str, &str), ReadError> {
    match below.split_once('/') {
        Some((service, last)) if !service.is_empty() && !last.is_empty() && !last.contains('/') => {
            Ok((service, last))
        }
        _ => Err(ReadError::KeyShape("{prefix}{service}/{address}")),
    }
}

/// What is not empty.
fn known(text: impl Into<String>) -> Option<String> {
    Some(text.into()).filter(|text| !text.is_empty())
}

/// An address as a record may have it: not empty, no blanks, no control characters.
fn is_address(text: &str) -> bool {
    !text.is_empty() && !text.chars().any(|c| c.is_control() || c.is_whitespace())
}

#[cfg(test)]
mod tests;
