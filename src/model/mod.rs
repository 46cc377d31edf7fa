//! The words of the project as types: endpoint, record, pod, registration.
//!
//! Takes nothing, gives plain data to every other folder. Must never do IO, read a clock or know
//! of tokio, kube or etcd-client.

pub mod endpoint;
pub mod maps;
pub mod names;
pub mod pod;
pub mod selector;
