//! Pods and nodes, as far as the project reads them.

use std::net::IpAddr;

use super::endpoint::Protocol;

/// A port that a container declares.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContainerPort {
    /// The port's name; empty when it has none.
    pub name: Box<str>,
    /// The port on the pod's address.
    pub port: u16,
    /// The port on the node's address; 0 when it has none.
    pub host_port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// A pod, slim: what is not here is dropped while the object is parsed.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Pod {
    /// `metadata.uid`.
    pub uid: Box<str>,
    /// `metadata.namespace`.
    pub namespace: Box<str>,
    /// `metadata.name`.
    pub name: Box<str>,
    /// `metadata.resourceVersion` as a number.
    pub resource_version: u64,
    /// `metadata.creationTimestamp`, in seconds since 1970.
    pub created: i64,
    /// The labels, sorted by key.
    pub labels: Vec<(Box<str>, Box<str>)>,
    /// The annotations that are short enough to be selected, sorted by key.
    pub annotations: Vec<(Box<str>, Box<str>)>,
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// The phase is Failed or Succeeded.
    pub finished: bool,
    /// The condition Ready is True.
    pub ready: bool,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `spec.nodeName`; empty while unscheduled.
    pub node: Box<str>,
    /// `status.podIPs`, the primary one first; `status.podIP` where the list is absent.
    pub ips: Vec<IpAddr>,
    /// `status.hostIPs`, the primary one first; `status.hostIP` where the list is absent.
    pub host_ips: Vec<IpAddr>,
    /// The ports of all containers, sidecars (restartable init containers) included.
    pub ports: Vec<ContainerPort>,
}

/// A node, slim.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Node {
    /// `metadata.name`.
    pub name: Box<str>,
    /// `metadata.resourceVersion` as a number.
    pub resource_version: u64,
    /// The label `topology.kubernetes.io/zone`; empty when it has none.
    pub zone: Box<str>,
}
