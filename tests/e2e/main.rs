//! The operator on real control planes and etcds, run as a program under the RBAC of `deploy/`.
//!
//! Every test takes a [`support::Stage`]: a control plane that no other test uses meanwhile, an etcd and a
//! namespace of its own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

mod admin;
mod basic;
mod changes;
mod commands;
mod credentials;
mod diff;
mod discover;
mod doctor;
mod encodings;
mod errors;
mod failover;
mod flapping;
mod formats;
mod hands;
mod holds;
mod limits;
mod names;
mod namespaces;
mod objects;
mod pods;
mod policy;
mod rbac;
mod register;
mod secrets;
mod status;
#[path = "../support/mod.rs"]
mod support;
mod tree;
