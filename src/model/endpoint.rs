//! An endpoint: one address of one pod on one port.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// The transport protocol of a port, written as Kubernetes writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Protocol {
    /// The default of Kubernetes.
    #[default]
    Tcp,
    /// User datagrams.
    Udp,
    /// Stream control transmission.
    Sctp,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// `TCP`, `UDP` or `SCTP`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }

    /// `tcp`, `udp` or `sctp`, as Go's `net` and DNS have it.
    #[must_use]
    pub fn lower(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }

    /// The inverse of [`Protocol::as_str`]; `None` for anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            "SCTP" => Some(Self::Sctp),
            _ => None,
        }
    }
}

/// The family of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// `IPv4` or `IPv6`, as Kubernetes writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// What no two pods may own at a time: an address, a port and a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// The address.
    pub ip: IpAddr,
    /// The port, 1 to 65535.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// An address and a port, of whatever protocol: all that some records tell.
pub type Socket = (IpAddr, u16);

impl Target {
    /// Address and port.
    #[must_use]
    pub fn socket(&self) -> Socket {
        (self.ip, self.port)
    }

    /// `host:port`, IPv6 as RFC 5952 says and in brackets.
    #[must_use]
    pub fn host_port(&self) -> String {
        SocketAddr::new(self.ip, self.port).to_string()
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host_port(), self.protocol.as_str())
    }
}

/// Everything that a format may write about one endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address, port and protocol.
    pub target: Target,
    /// The name of the port in the registration; a DNS label.
    pub port_name: String,
    /// The scheme for formats that write URLs; empty when the registration names none.
    pub scheme: String,
    /// The cluster's name; a DNS label.
    pub cluster: String,
    /// The namespace of the registration and its pods.
    pub namespace: String,
    /// The service's name in the registry.
    pub service: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's UID: the identity of the endpoint.
    pub uid: String,
    /// The node's name; empty when unknown.
    pub node: String,
    /// The zone; empty when unknown.
    pub zone: String,
    /// The weight, at least 1.
    pub weight: u32,
    /// The selected labels and annotations and the static entries, sorted by key.
    pub metadata: Vec<(String, String)>,
}
