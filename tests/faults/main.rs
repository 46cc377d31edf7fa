//! The faults that the operator must survive, played with real processes: operators, etcds, API servers and the network
//! between them.
//!
//! Each test asserts on the record of a watcher with an etcd client of its own, and prints one line with what it saw;
//! `docs/reliability.md` has the table. What the end-to-end tests prove already is not proven again here.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

mod availability;
mod clock;
mod credentials;
mod disk;
mod etcd;
mod kubernetes;
mod members;
mod names;
mod network;
mod operator;
mod pods;
mod scene;
#[path = "../support/mod.rs"]
#[expect(
    dead_code,
    reason = "the end-to-end tests use all of it, and are warned of what nobody uses"
)]
mod support;
