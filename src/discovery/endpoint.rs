//! An endpoint as a reader has it.

use std::net::SocketAddr;
use std::sync::Arc;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::format::Discovered;
use crate::model::endpoint::{Family, Protocol};

/// What tells endpoints of a list apart: the key of the record, and the URL that it tells. A record with another
/// address is another endpoint; one with another weight, zone or pod is the same, changed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id {
    key: Arc<str>,
    url: Arc<str>,
}

/// One address where a service can be reached, and what its record tells beside. What a record leaves out, or its
/// format can't hold, is `None`.
///
/// It serializes with the member names of the format Json, without what is not known, and with `key`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    id: Id,
    told: Discovered,
}

impl Endpoint {
    /// What a record of this key tells.
    pub(super) fn new(key: &Arc<str>, told: Discovered) -> Self {
        let url = match &told.scheme {
            Some(scheme) => format!("{scheme}://{}", told.address).into(),
            None => told.address.as_str().into(),
        };
        let id = Id {
            key: Arc::clone(key),
            url,
        };
        Self { id, told }
    }

    /// What tells it from all others of a list.
    #[must_use]
    pub fn id(&self) -> &Id {
        &self.id
    }

    /// The key of its record in etcd.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.id.key
    }

    /// The address as the record has it, usually `host:port`; IPv6 in brackets.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.told.address
    }

    /// `scheme://address`; the bare address where no scheme is known.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.id.url
    }

    /// Address and port, where the address is an IP address and no name.
    #[must_use]
    pub fn socket(&self) -> Option<SocketAddr> {
        self.told.socket
    }

    /// The transport protocol.
    #[must_use]
    pub fn protocol(&self) -> Option<Protocol> {
        self.told.protocol
    }

    /// The name of the port.
    #[must_use]
    pub fn port_name(&self) -> Option<&str> {
        self.told.port_name.as_deref()
    }

    /// The scheme of its URL.
    #[must_use]
    pub fn scheme(&self) -> Option<&str> {
        self.told.scheme.as_deref()
    }

    /// The cluster that registered it.
    #[must_use]
    pub fn cluster(&self) -> Option<&str> {
        self.told.cluster.as_deref()
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        self.told.namespace.as_deref()
    }

    /// The name of the service.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.told.service
    }

    /// The name of the pod.
    #[must_use]
    pub fn pod(&self) -> Option<&str> {
        self.told.pod.as_deref()
    }

    /// The UID of the pod.
    #[must_use]
    pub fn uid(&self) -> Option<&str> {
        self.told.uid.as_deref()
    }

    /// The name of the node.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        self.told.node.as_deref()
    }

    /// The zone.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.told.zone.as_deref()
    }

    /// The weight beside others of the service.
    #[must_use]
    pub fn weight(&self) -> Option<u32> {
        self.told.weight
    }

    /// The metadata, sorted by name.
    #[must_use]
    pub fn metadata(&self) -> &[(String, String)] {
        &self.told.metadata
    }

    /// One entry of the metadata.
    #[must_use]
    pub fn metadata_value(&self, name: &str) -> Option<&str> {
        self.told
            .metadata
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }
}

impl Serialize for Endpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("address", self.address())?;
        if let Some(socket) = self.socket() {
            map.serialize_entry("host", &socket.ip())?;
            map.serialize_entry("port", &socket.port())?;
        }
        let family = self.socket().map(|socket| Family::of(socket.ip()).as_str());
        for (name, value) in [
            ("portName", self.port_name()),
            ("protocol", self.protocol().map(Protocol::as_str)),
            ("scheme", self.scheme()),
            ("family", family),
            ("cluster", self.cluster()),
            ("namespace", self.namespace()),
            ("service", Some(self.service())),
            ("pod", self.pod()),
            ("uid", self.uid()),
            ("node", self.node()),
            ("zone", self.zone()),
        ] {
            if let Some(value) = value {
                map.serialize_entry(name, value)?;
            }
        }
        if let Some(weight) = self.weight() {
            map.serialize_entry("weight", &weight)?;
        }
        let metadata: std::collections::BTreeMap<&str, &str> = self
            .metadata()
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        map.serialize_entry("metadata", &metadata)?;
        map.serialize_entry("key", self.key())?;
        map.end()
    }
}
