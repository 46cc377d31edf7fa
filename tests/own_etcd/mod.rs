//! An etcd of one test alone, for tests whose tasks share one thread.
//!
//! Takes how it is to be, gives it started. Must never be used by two tests.

use std::sync::Arc;

use etcd_client::Client;

/// An etcd that ends with the test. What its harness does blocks, so it is done on other threads: the tasks under
/// test share the one thread of their runtime.
#[derive(Clone)]
pub(crate) struct Etcd(pub(crate) Arc<testbed::Etcd>);

async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> testbed::Result<T> + Send + 'static,
) -> T {
    tokio::task::spawn_blocking(work).await.unwrap().unwrap()
}

impl Etcd {
    /// One member, without TLS and authentication.
    pub(crate) async fn start() -> Self {
        Self::start_as(|builder| builder).await
    }

    pub(crate) async fn start_as(
        change: impl FnOnce(testbed::EtcdBuilder) -> testbed::EtcdBuilder + Send + 'static,
    ) -> Self {
        let start =
            || change(testbed::Etcd::builder(env!("CARGO_CRATE_NAME")).unsafe_no_fsync()).start();
        Self(Arc::new(off_thread(start).await))
    }

    /// Does something to it.
    pub(crate) async fn does<T: Send + 'static>(
        &self,
        work: impl FnOnce(&testbed::Etcd) -> testbed::Result<T> + Send + 'static,
    ) -> T {
        let etcd = Arc::clone(&self.0);
        off_thread(move || work(&etcd)).await
    }

    /// A client beside those under test, of an etcd that asks for neither certificates nor a user.
    pub(crate) async fn client(&self) -> Client {
        Client::connect(self.0.endpoints(), None).await.unwrap()
    }
}
