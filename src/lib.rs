//! etcd-registrar: registers the ready endpoints of Kubernetes pods in etcd.
//!
//! Data flows one way, and one task owns the state:
//!
//! ```text
//! kube watches ---> index --> desired --+
//!                                       +--> plan --> writer --> etcd
//! etcd snapshot + watch --> mirror -----+
//!                                             keeper --> etcd   (keepalives; every replica)
//! outcomes + mirror --> status summary --> status writer --> kube
//! ```

pub mod accept;
pub mod admin;
pub mod api;
pub mod app;
pub mod cli;
pub mod engine;
pub mod format;
pub mod index;
pub mod kube;
pub mod mirror;
pub mod model;
pub mod plan;
pub mod registry;
pub mod summary;
