//! The etcd side: connection, requests, snapshot and watch, lease keeper, purge.
//!
//! Takes what the engine wants done (requests, ranges to follow, leases to keep) and gives back
//! inputs of the engine; the discovery library has connection and mirror from here, too. Carries bytes only: must never decide what is written, and never hold or
//! log a password or a key.
//!
//! ```text
//! requests  --- connection A --- etcd     one answer to every request, within a deadline
//! mirror    --- connection A --- etcd     snapshot + watch of every followed range
//! keeper    --- connection B --- etcd     keepalives, on few streams
//! ```

pub mod ask;
pub mod connection;
mod failure;
mod follower;
#[cfg(feature = "operator")]
pub mod keeper;
pub mod mirror;
#[cfg(feature = "operator")]
pub mod purge;
#[cfg(feature = "operator")]
pub mod requests;
#[cfg(feature = "operator")]
mod schedule;
