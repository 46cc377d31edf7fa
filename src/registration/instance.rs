//! What is registered: an address of a process, and how its record is written.
//!
//! Takes names and an address, gives the records that the operator would write for them. Must never let a name leave its place
//! in a key, and never give one key twice.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use thiserror::Error;

use crate::format::traefik::Kind;
use crate::format::{Bundle, Format, Place, bundle_of, kratos, sky_dns};
use crate::model::endpoint::{Endpoint, Protocol, Target};
use crate::model::etcd::Key;
use crate::model::names::{self, NameError};

/// The weight of an instance that names none: that of a registration.
const WEIGHT: u32 = 100;

/// One address of a process, to be registered as the operator registers a pod's.
///
/// ```
/// use etcd_registrar::registration::{Format, Instance};
///
/// // /services/shop/web/vm/10.0.0.5:8080
/// let web = Instance::new("vm", "shop", "web", "10.0.0.5:8080".parse()?)?
///     .zone("eu-a")
///     .metadata("version", "v2");
/// // grpc/greeter/10.0.0.5:9090, which gRPC-Go dials as etcd:///grpc/greeter
/// let greeter = Instance::new("vm", "shop", "greeter", "10.0.0.5:9090".parse()?)?
///     .format(Format::Grpc, "grpc/")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    endpoint: Endpoint,
    format: Format,
    prefix: String,
}

/// What can't be registered.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum InstanceError {
    /// A name or the prefix is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The prefix is none of the format.
    #[error("{0}")]
    Prefix(&'static str),
    /// Nobody could connect there.
    #[error(
        "the address {0} can't be registered: write the one at which others reach this process, with its port, for example 10.0.0.5:8080"
    )]
    Address(SocketAddr),
    /// The weight is 0, which readers take for many things.
    #[error("the weight 0 means something else to each reader: write 1 or more")]
    Weight,
    /// The format has no record for it.
    #[error("there is no record for it: {0}")]
    NoRecord(String),
    /// Two instances want one key.
    #[error("two of the instances want the key {0}: give them different addresses, ports or names")]
    Twice(String),
}

impl Instance {
    /// An instance in the format Json, below `/services/`. `cluster` is the name of those who register here, such as `vm`:
    /// no Kubernetes cluster that registers in this etcd may have it.
    ///
    /// # Errors
    ///
    /// When a name can't be one, or the address is none to which anybody could connect.
    pub fn new(
        cluster: &str,
        namespace: &str,
        service: &str,
        address: SocketAddr,
    ) -> Result<Self, InstanceError> {
        names::cluster(cluster)?;
        names::namespace(namespace)?;
        names::service(service)?;
        if !can_be_reached(address) {
            return Err(InstanceError::Address(address));
        }
        Ok(Self {
            endpoint: Endpoint {
                target: Target {
                    ip: address.ip(),
                    port: address.port(),
                    protocol: Protocol::Tcp,
                },
                port_name: "main".into(),
                scheme: String::new(),
                cluster: cluster.into(),
                namespace: namespace.into(),
                service: service.into(),
                pod: name_of(address),
                uid: random_uid(),
                node: String::new(),
                zone: String::new(),
                weight: WEIGHT,
                metadata: Vec::new(),
            },
            format: Format::Json,
            prefix: Format::Json.default_prefix().to_owned(),
        })
    }

    /// In this format, below this prefix, usually [`Format::default_prefix`].
    ///
    /// # Errors
    ///
    /// When the prefix can't be one, or is none of the format.
    pub fn format(mut self, format: Format, prefix: &str) -> Result<Self, InstanceError> {
        names::prefix(prefix)?;
        format.check_prefix(prefix).map_err(InstanceError::Prefix)?;
        if prefix.is_empty() && matches!(format, Format::SkyDns(_)) {
            return Err(InstanceError::Prefix(
                "format SkyDns has no prefix of its own: name path and zone reversed, for example `/skydns/local/skydns/`",
            ));
        }
        self.format = format;
        prefix.clone_into(&mut self.prefix);
        Ok(self)
    }

    /// The name of the instance, which stands where a pod's name does; several ports of one process have the same. Without it
    /// one is made from the address.
    ///
    /// # Errors
    ///
    /// When it is no DNS subdomain.
    pub fn name(mut self, name: &str) -> Result<Self, InstanceError> {
        names::pod(name)?;
        name.clone_into(&mut self.endpoint.pod);
        Ok(self)
    }

    /// The identity of the process, which stands where a pod's UID does. Without it, it is random.
    #[must_use]
    pub fn uid(mut self, uid: impl Into<String>) -> Self {
        self.endpoint.uid = uid.into();
        self
    }

    /// The name of the port; without it `main`.
    ///
    /// # Errors
    ///
    /// When it is no DNS label.
    pub fn port_name(mut self, name: &str) -> Result<Self, InstanceError> {
        names::port(name)?;
        name.clone_into(&mut self.endpoint.port_name);
        Ok(self)
    }

    /// The scheme of the port, for formats that write URLs.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub fn scheme(mut self, scheme: &str) -> Result<Self, InstanceError> {
        names::scheme(scheme)?;
        scheme.clone_into(&mut self.endpoint.scheme);
        Ok(self)
    }

    /// The protocol; without it TCP.
    #[must_use]
    pub fn protocol(mut self, protocol: Protocol) -> Self {
        self.endpoint.target.protocol = protocol;
        self
    }

    /// The machine, which stands where a node's name does.
    #[must_use]
    pub fn node(mut self, node: impl Into<String>) -> Self {
        self.endpoint.node = node.into();
        self
    }

    /// The zone.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.endpoint.zone = zone.into();
        self
    }

    /// The weight; without it 100.
    ///
    /// # Errors
    ///
    /// When it is 0.
    pub fn weight(mut self, weight: u32) -> Result<Self, InstanceError> {
        if weight == 0 {
            return Err(InstanceError::Weight);
        }
        self.endpoint.weight = weight;
        Ok(self)
    }

    /// An entry of the metadata; one of this name is replaced.
    #[must_use]
    pub fn metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        let mut all: BTreeMap<_, _> = self.endpoint.metadata.into_iter().collect();
        all.insert(name.into(), value.into());
        self.endpoint.metadata = all.into_iter().collect();
        self
    }

    /// With the kind of Traefik's servers that the scheme means, where the format has a record for it.
    fn settled(mut self) -> Result<Self, InstanceError> {
        let no_record = |why: String| Err(InstanceError::NoRecord(why));
        let Endpoint {
            scheme,
            target,
            namespace,
            service,
            cluster,
            port_name,
            ..
        } = &self.endpoint;
        match &mut self.format {
            Format::Kratos if !kratos::SCHEMES.contains(&scheme.as_str()) => {
                no_record(format!(
                    "Kratos looks for the schemes {}: name that of the port",
                    kratos::SCHEMES.join(", ")
                ))?;
            }
            Format::Traefik(kind) => match Kind::of(target.protocol, scheme) {
                Some(told) => *kind = told,
                None => no_record(
                    "Traefik takes TCP with the scheme http, https or h2c for HTTP services, and TCP or UDP without a scheme for others"
                        .to_owned(),
                )?,
            },
            Format::SkyDns(_) => {
                // The zone is in the prefix, which was granted as it is.
                let ports = std::iter::once(port_name.as_str());
                sky_dns::check("local", namespace, service, cluster, ports)
                    .map_err(InstanceError::NoRecord)?;
            }
            format if format.is_aggregate() => {
                no_record(
                    "a record of Apisix stands for all endpoints, and processes that know nothing of each other can't share it"
                        .to_owned(),
                )?;
            }
            Format::Template(None) => {
                no_record("the format Template needs its templates".to_owned())?;
            }
            _ => {}
        }
        Ok(self)
    }

    /// The keys of its records, sorted.
    ///
    /// # Errors
    ///
    /// When the format has no record for it.
    pub fn keys(&self) -> Result<Vec<String>, InstanceError> {
        Ok(keys_of(&groups(std::slice::from_ref(self))?))
    }

    /// Of one pod in one registration: a record may stand for several of its ports.
    fn is_beside(&self, other: &Self) -> bool {
        let names = |instance: &Self| {
            let Endpoint {
                cluster,
                namespace,
                service,
                pod,
                ..
            } = instance.endpoint.clone();
            [cluster, namespace, service, pod]
        };
        self.format == other.format && self.prefix == other.prefix && names(self) == names(other)
    }
}

/// Keys and values.
type Records = Vec<(Key, Box<[u8]>)>;

/// Records that are put together, on one lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) format: Format,
    pub(super) prefix: String,
    /// Sorted by key.
    pub(super) records: Records,
}

/// The keys of records, sorted.
pub(super) fn keys_of(groups: &[Group]) -> Vec<String> {
    let records = groups.iter().flat_map(|group| &group.records);
    let mut keys: Vec<String> = records
        .map(|(key, _)| String::from_utf8_lossy(key).into_owned())
        .collect();
    keys.sort();
    keys
}

/// The records of all instances.
pub(super) fn groups(instances: &[Instance]) -> Result<Vec<Group>, InstanceError> {
    let settled = instances.iter().cloned().map(Instance::settled);
    let instances: Vec<Instance> = settled.collect::<Result<_, _>>()?;
    let mut groups: Vec<Group> = Vec::new();
    let mut done: Vec<bool> = vec![false; instances.len()];
    for (first, instance) in instances.iter().enumerate() {
        if done.get(first) == Some(&true) {
            continue;
        }
        let mut endpoints = Vec::new();
        for (other, done) in instances.iter().zip(&mut done).skip(first) {
            if other.is_beside(instance) {
                endpoints.push(other.endpoint.clone());
                *done = true;
            }
        }
        let place = Place {
            prefix: &instance.prefix,
        };
        // A template that can't be filled in leaves its record out, and `keys` says why.
        instance
            .format
            .keys(&place, &endpoints)
            .map_err(InstanceError::NoRecord)?;
        let records = instance.format.records(&place, &endpoints);
        let told: usize = records.iter().map(|record| record.targets.len()).sum();
        if told < endpoints.len() {
            let key = records.first().map(|record| record.key.clone());
            return Err(InstanceError::Twice(key.unwrap_or_default()));
        }
        let together = instance.format.rules().bundle == Bundle::Together;
        let mut bundles: BTreeMap<Vec<u8>, Records> = BTreeMap::new();
        for record in records {
            let key = record.key.into_bytes();
            let bundle = if together { bundle_of(&key) } else { &key };
            let bundle = bundles.entry(bundle.to_vec()).or_default();
            bundle.push((key.into(), record.value.into()));
        }
        groups.extend(bundles.into_values().map(|mut records| {
            records.sort();
            Group {
                format: instance.format.clone(),
                prefix: instance.prefix.clone(),
                records,
            }
        }));
    }
    let mut keys: Vec<&Key> = groups
        .iter()
        .flat_map(|group| group.records.iter().map(|(key, _)| key))
        .collect();
    keys.sort();
    if let Some([key, _]) = keys.array_windows().find(|[one, next]| one == next) {
        return Err(InstanceError::Twice(
            String::from_utf8_lossy(key).into_owned(),
        ));
    }
    Ok(groups)
}

/// Whether anybody could connect there. The address of the machine to itself is let through: all may run on one.
fn can_be_reached(address: SocketAddr) -> bool {
    let ip = address.ip().to_canonical();
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    address.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !link_local
}

/// A DNS label of an address, which no other address has.
fn name_of(address: SocketAddr) -> String {
    let ip = match address.ip() {
        IpAddr::V4(v4) => v4.to_string().replace('.', "-"),
        IpAddr::V6(v6) => v6.to_string().replace([':', '.'], "-"),
    };
    format!("ip-{ip}-{}", address.port())
}

/// A UUID of version 4 (RFC 9562, section 5.4).
fn random_uid() -> String {
    let mut bytes: [u8; 16] = rand::random();
    let [_, _, _, _, _, _, version, _, variant, ..] = &mut bytes;
    *version = *version & 0x0f | 0x40;
    *variant = *variant & 0x3f | 0x80;
    let mut uid = String::with_capacity(36);
    for (at, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&at) {
            uid.push('-');
        }
        // Writing to a String can't fail.
        let _ = write!(uid, "{byte:02x}");
    }
    uid
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(address: &str) -> Instance {
        Instance::new("vm", "shop", "web", address.parse().unwrap()).unwrap()
    }

    fn keys(instances: &[Instance]) -> Vec<Vec<String>> {
        groups(instances)
            .unwrap()
            .iter()
            .map(|group| {
                let keys = group.records.iter();
                keys.map(|(key, _)| String::from_utf8(key.to_vec()).unwrap())
                    .collect()
            })
            .collect()
    }

    #[test]
    fn keys_are_those_of_the_operator() {
        let web = instance("10.0.0.5:8080");
        let six = instance("[fd00::3]:8080");
        let in_format = |format: &str, prefix: &str| {
            let format = Format::by_name(format).unwrap();
            let web = web.clone().scheme("http").unwrap();
            keys(&[web.format(format, prefix).unwrap()])
        };
        assert_eq!(
            keys(&[web.clone(), six]),
            [
                ["/services/shop/web/vm/10.0.0.5:8080"],
                ["/services/shop/web/vm/[fd00::3]:8080"],
            ]
        );
        assert_eq!(in_format("Plain", "/"), [["/web/10.0.0.5:8080"]]);
        assert_eq!(
            in_format("Kratos", "/microservices/"),
            [["/microservices/web/vm.shop.ip-10-0-0-5-8080.v4"]]
        );
        // The keys of one server are put in one transaction.
        let traefik = in_format("Traefik", "traefik/");
        assert_eq!((traefik.len(), traefik[0].len()), (1, 2));
        let uid = &web.endpoint.uid;
        assert_eq!(
            (uid.len(), &uid[14..15], uid.split('-').count()),
            (36, "4", 5)
        );
    }

    #[test]
    fn ports_of_one_process_share_a_record_where_the_format_has_it_so() {
        let kratos = |address: &str, scheme: &str| {
            let made = instance(address).name("web-0").unwrap();
            let made = made.scheme(scheme).unwrap();
            made.format(Format::Kratos, "/microservices/").unwrap()
        };
        let two = [
            kratos("10.0.0.5:8080", "http"),
            kratos("10.0.0.5:9090", "grpc"),
        ];
        assert_eq!(keys(&two), [["/microservices/web/vm.shop.web-0.v4"]]);
    }

    #[test]
    fn what_can_t_be_registered_is_refused() {
        for address in [
            "0.0.0.0:80",
            "[::]:80",
            "10.0.0.1:0",
            "224.0.0.1:80",
            "169.254.1.1:80",
            "[fe80::1]:80",
        ] {
            let made = Instance::new("vm", "shop", "web", address.parse().unwrap());
            assert!(
                matches!(made, Err(InstanceError::Address(_))),
                "{address}: {made:?}"
            );
        }
        let address = "10.0.0.5:8080".parse().unwrap();
        for (cluster, namespace, service) in [
            ("V M", "shop", "web"),
            ("vm", "", "web"),
            ("vm", "a", "../"),
        ] {
            Instance::new(cluster, namespace, service, address).unwrap_err();
        }
        let web = instance("10.0.0.5:8080");
        web.clone().weight(0).unwrap_err();
        web.clone().name("a/b").unwrap_err();
        web.clone().format(Format::Grpc, "/grpc/").unwrap_err();
        let twice = groups(&[web.clone(), web.clone().name("other").unwrap()]).unwrap_err();
        assert!(matches!(twice, InstanceError::Twice(key) if key.ends_with("/vm/10.0.0.5:8080")));
        let twice = groups(&[web.clone(), web.clone()]).unwrap_err();
        assert!(matches!(twice, InstanceError::Twice(_)));
        for (format, prefix) in [
            ("Template", "web/"),
            ("Apisix", "/apisix/upstreams/"),
            ("Kratos", "/microservices/"),
            ("SkyDns", "/skydns/local/"),
        ] {
            let format = Format::by_name(format).unwrap();
            let mut wrong = web.clone().format(format, prefix).unwrap();
            wrong.endpoint.service = "a.b".into();
            assert!(matches!(wrong.keys(), Err(InstanceError::NoRecord(_))));
        }
        // Of Traefik's kinds of servers the scheme tells which is meant.
        let traefik = web
            .format(Format::by_name("Traefik").unwrap(), "traefik/")
            .unwrap();
        assert_eq!(
            traefik
                .clone()
                .scheme("https")
                .unwrap()
                .keys()
                .unwrap()
                .len(),
            2
        );
        assert!(traefik.keys().unwrap()[0].starts_with("traefik/tcp/services/"));
        assert!(traefik.scheme("ftp").unwrap().keys().is_err());
    }
}
