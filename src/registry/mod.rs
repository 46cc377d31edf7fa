//! The etcd side: connection, requests, snapshot and watch, lease keeper, purge.
//!
//! Takes what the engine wants done (requests, ranges to follow, leases to keep) and gives back
//! inputs of the engine. Carries bytes only: must never decide what is written, and never hold or
//! log a password or a key.
//!
//! ```text
//! requests  --- connection A --- etcd     one answer to every request, within a deadline
//! mirror    --- connection A --- etcd     snapshot + watch of every followed range
//! keeper    --- connection B --- etcd     keepalives, on few streams
//! ```

pub mod connection;
mod follower;
pub mod keeper;
pub mod mirror;
pub mod purge;
pub mod requests;
mod schedule;
