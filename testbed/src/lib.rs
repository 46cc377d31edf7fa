//! A real Kubernetes control plane and real etcds on loopback, for tests, demo and benchmarks.
//!
//! No containers and no root: kube-apiserver, kube-controller-manager, kube-scheduler, kwok (which plays the kubelets)
//! and etcd are built once from the modules pinned in `go.mod` and run as children on 127.0.0.1. They die with the
//! process, even when it is killed, and their folders go with it unless a test failed.
//!
//! ```no_run
//! # fn main() -> testbed::Result<()> {
//! let cluster = testbed::Cluster::builder("east").start()?;
//! let etcd = testbed::Etcd::builder("registry").members(3).tls().auth(["/services/"]).start()?;
//! cluster.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}")?;
//! println!("{}", etcd.etcdctl(&["get", "--prefix", "/services/"])?);
//! # Ok(())
//! # }
//! ```
//!
//! Everything blocks; from asynchronous code call it in `spawn_blocking`.

mod ca;
mod cluster;
mod error;
mod etcd;
mod http;
mod operator;
mod ports;
mod process;
mod proxy;
pub mod tools;
mod wait;
mod workdir;

use std::sync::{Mutex, OnceLock};

pub use ca::{Ca, CertFiles};
pub use cluster::{Cluster, ClusterBuilder};
pub use error::{Error, Result};
pub use etcd::{Etcd, EtcdBuilder, ROOT_PASSWORD, USER, USER_PASSWORD};
pub use http::Response;
pub use nix::sys::signal::Signal;
pub use operator::{Operator, OperatorBuilder, operator_binary};
pub use ports::free_port;
pub use process::Process;
pub use proxy::{Direction, Flow, Proxy};
pub use wait::{always, eventually};
pub use workdir::{WorkDir, keep};

/// One value for each name, made once and kept until the process ends.
pub(crate) type Shared<T> = Mutex<Vec<(String, &'static OnceLock<Result<T, String>>)>>;

/// The value called `name`; whoever comes first makes it, and the others wait for it. A failure is kept too: the second
/// attempt would fail the same way and take as long.
fn shared<T>(all: &Shared<T>, name: &str, make: impl FnOnce() -> Result<T>) -> Result<&'static T> {
    let cell = {
        let mut all = process::lock(all);
        match all.iter().find(|(known, _)| known == name) {
            Some((_, cell)) => *cell,
            None => {
                let cell: &'static OnceLock<Result<T, String>> =
                    Box::leak(Box::new(OnceLock::new()));
                all.push((name.to_owned(), cell));
                cell
            }
        }
    };
    cell.get_or_init(|| make().map_err(|error| error.to_string()))
        .as_ref()
        .map_err(|error| Error::new(format!("shared {name}"), error))
}
