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
//!
//! The other side, for programs that want to know where to connect, is [`discovery`]; for those outside Kubernetes that want to be
//! found there is [`registration`]. Both need nothing of the operator:
//!
//! ```toml
//! etcd-registrar = { version = "0.1", default-features = false, features = ["discovery"] }
//! ```

#[cfg(feature = "operator")]
pub mod accept;
#[cfg(feature = "operator")]
pub mod admin;
#[cfg(feature = "operator")]
pub mod api;
#[cfg(feature = "operator")]
pub mod app;
#[cfg(feature = "operator")]
pub mod cli;
#[cfg(feature = "operator")]
pub mod commands;
#[cfg(feature = "discovery")]
pub mod discovery;
#[cfg(feature = "operator")]
pub mod engine;
pub mod format;
#[cfg(feature = "operator")]
pub mod index;
#[cfg(feature = "operator")]
pub mod kube;
#[cfg(feature = "operator")]
pub mod mirror;
pub mod model;
#[cfg(feature = "operator")]
pub mod plan;
#[cfg(feature = "discovery")]
pub mod registration;
#[cfg(feature = "discovery")]
pub mod registry;
#[cfg(feature = "operator")]
pub mod summary;
#[cfg(feature = "operator")]
pub mod version;
