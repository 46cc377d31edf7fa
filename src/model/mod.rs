//! The words of the project as types: endpoint, record, pod, registration, and those of etcd.
//!
//! Takes nothing, gives plain data to every other folder. Must never do IO, read a clock or know
//! of tokio, kube or etcd-client.

pub mod endpoint;
pub mod etcd;
#[cfg(feature = "operator")]
pub mod maps;
pub mod names;
#[cfg(feature = "operator")]
pub mod pod;
#[cfg(feature = "operator")]
pub mod selector;
