//! A gRPC channel that is balanced over a list.
//!
//! Takes changes of a list, gives them to the balancer of `tonic`. Must never take a server from the balancer that another
//! record still names, nor end a request that is under way.

use std::collections::HashMap;

use tonic::transport::channel::Change as Balance;
use tonic::transport::{Channel, Endpoint as Server};

use super::{Change, Endpoint, Service};
use crate::model::endpoint::Protocol;

/// Changes that the balancer has not taken up: it does when a request is made. More wait, joined, in the list.
const CHANGES: usize = 64;

impl Service {
    /// A channel of `tonic` that balances requests over the list, without TLS: a server that joins is used as soon as its record
    /// is there, and one that leaves gets no further request, while those under way come to their end. While there is none,
    /// requests wait: set a timeout. Must be called within a runtime of tokio; the list is followed for as long as the channel
    /// is there.
    ///
    /// So that no request fails in a rolling update, a server has to serve when it turns ready, and has to go on for a moment
    /// after it turned unready or was asked to end (in Kubernetes, by a `preStop` hook that sleeps), and then end
    /// gracefully.
    ///
    /// ```no_run
    /// # async fn run(discovery: etcd_registrar::discovery::Discovery) -> Result<(), Box<dyn std::error::Error>> {
    /// let channel = discovery.service("shop", "web")?.channel();
    /// // let mut client = GreeterClient::new(channel);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel_with(without_tls)
    }

    /// As [`Service::channel`], with servers of your own making: with TLS, timeouts, an origin. It is asked once for each URL that
    /// joins; those for which it gives `None` are left out.
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use tonic::transport::{ClientTlsConfig, Endpoint};
    ///
    /// # async fn run(discovery: etcd_registrar::discovery::Discovery) -> Result<(), Box<dyn std::error::Error>> {
    /// let channel = discovery.service("shop", "web")?.channel_with(|endpoint| {
    ///     Endpoint::from_shared(format!("https://{}", endpoint.address()))
    ///         .and_then(|server| server.tls_config(ClientTlsConfig::new().domain_name("web.shop")))
    ///         .map(|server| server.timeout(Duration::from_secs(2)))
    ///         .ok()
    /// });
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn channel_with<F>(&self, make: F) -> Channel
    where
        F: Fn(&Endpoint) -> Option<Server> + Send + 'static,
    {
        let (channel, balancer) = Channel::balance_channel(CHANGES);
        let mut changes = self.changes();
        tokio::spawn(async move {
            let mut servers = Servers::default();
            loop {
                let change = tokio::select! {
                    () = balancer.closed() => return,
                    change = changes.next() => match change {
                        Some(change) => change,
                        None => return,
                    },
                };
                if let Some(change) = servers.change(&change, &make)
                    && balancer.send(change).await.is_err()
                {
                    return;
                }
            }
        });
        channel
    }
}

/// How many records name each URL that the balancer has.
#[derive(Default)]
struct Servers(HashMap<String, usize>);

impl Servers {
    /// What the balancer is told of a change.
    fn change(
        &mut self,
        change: &Change,
        make: &impl Fn(&Endpoint) -> Option<Server>,
    ) -> Option<Balance<String, Server>> {
        let url = change.endpoint().url();
        match change {
            Change::Added(endpoint) => {
                if let Some(named) = self.0.get_mut(url) {
                    *named += 1;
                    return None;
                }
                let server = make(endpoint)?;
                self.0.insert(url.to_owned(), 1);
                Some(Balance::Insert(url.to_owned(), server))
            }
            Change::Removed(_) => {
                let named = self.0.get_mut(url)?;
                *named -= 1;
                if *named > 0 {
                    return None;
                }
                self.0.remove(url);
                Some(Balance::Remove(url.to_owned()))
            }
            Change::Changed { .. } => None,
        }
    }
}

/// A server that is spoken to in clear text.
fn without_tls(endpoint: &Endpoint) -> Option<Server> {
    let clear = matches!(endpoint.scheme(), None | Some("http" | "grpc" | "h2c"))
        && matches!(endpoint.protocol(), None | Some(Protocol::Tcp));
    let server = clear
        .then(|| Server::from_shared(format!("http://{}", endpoint.address())).ok())
        .flatten();
    if server.is_none() {
        tracing::warn!(
            key = endpoint.key(),
            url = endpoint.url(),
            "this endpoint can't be spoken to in clear text over TCP, and is left out of the channel: use `channel_with`"
        );
    }
    server
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::format::Discovered;

    fn endpoint(key: &str, scheme: Option<&str>) -> Arc<Endpoint> {
        Arc::new(Endpoint::new(
            &key.into(),
            Discovered {
                address: "10.1.2.3:8080".to_owned(),
                scheme: scheme.map(str::to_owned),
                ..Discovered::default()
            },
        ))
    }

    #[test]
    fn a_server_goes_with_the_last_record_that_names_it() {
        let mut servers = Servers::default();
        let (east, west) = (endpoint("east", None), endpoint("west", None));
        let mut tell = |change| servers.change(&change, &without_tls);
        assert!(matches!(
            tell(Change::Added(Arc::clone(&east))),
            Some(Balance::Insert(..))
        ));
        assert!(tell(Change::Added(Arc::clone(&west))).is_none());
        assert!(tell(Change::Removed(east)).is_none());
        assert!(matches!(
            tell(Change::Removed(Arc::clone(&west))),
            Some(Balance::Remove(url)) if url == "10.1.2.3:8080"
        ));
        // One that was left out is not taken away either.
        assert!(tell(Change::Removed(west)).is_none());
    }

    #[test]
    fn what_needs_tls_is_left_out_of_clear_text() {
        assert!(without_tls(&endpoint("a", Some("grpc"))).is_some());
        assert!(without_tls(&endpoint("a", Some("grpcs"))).is_none());
    }
}
