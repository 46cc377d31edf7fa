//! A gRPC channel over a list: real servers join and leave under load.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use etcd_client::Client;
use etcd_registrar::discovery::{Format, Service as List};
use etcd_registrar::model::endpoint::Endpoint;
use tokio::sync::{Notify, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tonic::body::Body;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{NamedService, UnaryService};
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::{Etcd, SOON, delete, endpoint, put, ready, until};

/// What it is asked it says; `wait` only when it is released.
#[derive(Clone, Default)]
struct Echo {
    served: Arc<AtomicUsize>,
    waiting: Arc<AtomicUsize>,
    release: Arc<Notify>,
}

impl NamedService for Echo {
    const NAME: &'static str = "test.Echo";
}

impl Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<String, String>::default());
            Ok(grpc.unary(this, request).await)
        })
    }
}

impl UnaryService<String> for Echo {
    type Response = String;
    type Future = BoxFuture<Response<String>, Status>;

    fn call(&mut self, request: Request<String>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let text = request.into_inner();
            if text == "wait" {
                let released = this.release.notified();
                this.waiting.fetch_add(1, Ordering::SeqCst);
                released.await;
            } else {
                // So that requests are under way when something happens.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            this.served.fetch_add(1, Ordering::SeqCst);
            Ok(Response::new(text))
        })
    }
}

/// A server and its record.
struct Member {
    echo: Echo,
    endpoint: Endpoint,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Member {
    /// Listens before it registers, as a pod does that is ready.
    async fn join(client: &mut Client) -> Self {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = incoming.local_addr().unwrap().to_string();
        let echo = Echo::default();
        let (stop, stopped) = oneshot::channel();
        let server = Server::builder()
            .add_service(echo.clone())
            .serve_with_incoming_shutdown(incoming, async {
                let _ = stopped.await;
            });
        let task = tokio::spawn(async move { server.await.unwrap() });
        let endpoint = endpoint("east", &address);
        put(client, &Format::Json, &endpoint).await;
        Self {
            echo,
            endpoint,
            stop,
            task,
        }
    }

    async fn unregister(&self, client: &mut Client) {
        delete(client, &Format::Json, &self.endpoint).await;
    }

    /// Takes no more connections and ends what is under way.
    async fn end(self) {
        self.stop.send(()).unwrap();
        tokio::time::timeout(SOON, self.task)
            .await
            .unwrap()
            .unwrap();
    }

    fn is_in(&self, list: &List) -> bool {
        let address = self.endpoint.target.host_port();
        list.snapshot().iter().any(|e| e.address() == address)
    }

    fn served(&self) -> usize {
        self.echo.served.load(Ordering::SeqCst)
    }
}

async fn say(channel: Channel, text: &str) -> Result<String, Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready()
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let path = PathAndQuery::from_static("/test.Echo/Say");
    let codec = ProstCodec::<String, String>::default();
    let request = Request::new(text.to_owned());
    Ok(grpc.unary(request, path, codec).await?.into_inner())
}

/// 200 requests a second, until it is told to stop: how many there were, and what went wrong.
struct Load {
    done: Arc<AtomicUsize>,
    /// The numbers of those that were begun, and are not done.
    open: Arc<Mutex<BTreeSet<usize>>>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<Vec<Status>>,
}

impl Load {
    fn start(channel: Channel) -> Self {
        let done = Arc::new(AtomicUsize::new(0));
        let open = Arc::new(Mutex::new(BTreeSet::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (counted, opened, stopped) = (Arc::clone(&done), Arc::clone(&open), Arc::clone(&stop));
        let task = tokio::spawn(async move {
            let mut beat = tokio::time::interval(Duration::from_millis(5));
            let mut requests = JoinSet::new();
            let mut failed = Vec::new();
            for number in 0.. {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                beat.tick().await;
                let channel = channel.clone();
                let (counted, opened) = (Arc::clone(&counted), Arc::clone(&opened));
                opened.lock().unwrap().insert(number);
                requests.spawn(async move {
                    let answer = say(channel, "hello").await;
                    opened.lock().unwrap().remove(&number);
                    counted.fetch_add(1, Ordering::SeqCst);
                    answer.map(|text| assert_eq!(text, "hello"))
                });
                while let Some(answer) = requests.try_join_next() {
                    failed.extend(answer.unwrap().err());
                }
            }
            while let Some(answer) = requests.join_next().await {
                failed.extend(answer.unwrap().err());
            }
            failed
        });
        Self {
            done,
            open,
            stop,
            task,
        }
    }

    fn done(&self) -> usize {
        self.done.load(Ordering::SeqCst)
    }

    /// Waits until all requests that were begun are done, and so many more.
    async fn more(&self, requests: usize) {
        let begun = self.open.lock().unwrap().clone();
        let enough = self.done() + begun.len() + requests;
        until("more requests", || {
            self.done() >= enough && self.open.lock().unwrap().is_disjoint(&begun)
        })
        .await;
    }

    async fn end(self) -> (usize, Vec<Status>) {
        self.stop.store(true, Ordering::SeqCst);
        let failed = tokio::time::timeout(SOON, self.task)
            .await
            .unwrap()
            .unwrap();
        (self.done.load(Ordering::SeqCst), failed)
    }
}

#[tokio::test]
async fn a_rolling_update_of_twenty_servers_fails_no_request() {
    const SERVERS: usize = 20;
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let mut old = Vec::new();
    for _ in 0..SERVERS {
        old.push(Member::join(&mut client).await);
    }
    let web = etcd.discovery().await.service("shop", "web").unwrap();
    ready(&web).await;
    let load = Load::start(web.channel());
    until("a request at each", || old.iter().all(|m| m.served() > 0)).await;

    let mut new = Vec::new();
    for member in old {
        let next = Member::join(&mut client).await;
        until("the new one", || next.is_in(&web)).await;
        new.push(next);
        member.unregister(&mut client).await;
        until("its removal", || !member.is_in(&web)).await;
        // The moment for which a server that leaves goes on.
        load.more(20).await;
        let served = member.served();
        load.more(20).await;
        assert_eq!(member.served(), served, "it got requests after it had left");
        member.end().await;
    }
    until("a request at each new one", || {
        new.iter().all(|m| m.served() > 0)
    })
    .await;
    let (requests, failed) = load.end().await;
    assert!(
        failed.is_empty(),
        "{} of {requests}: {failed:?}",
        failed.len()
    );
    println!("{requests} requests through a rolling update of {SERVERS} servers, none failed");
    for member in new {
        member.end().await;
    }
}

#[tokio::test]
async fn a_request_under_way_comes_to_its_end() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let member = Member::join(&mut client).await;
    let web = etcd.discovery().await.service("shop", "web").unwrap();
    let channel = web.channel();
    let long = tokio::spawn(say(channel.clone(), "wait"));
    let echo = member.echo.clone();
    until("the request", || echo.waiting.load(Ordering::SeqCst) == 1).await;

    let next = Member::join(&mut client).await;
    member.unregister(&mut client).await;
    until("the change", || next.is_in(&web) && !member.is_in(&web)).await;
    // The balancer takes it up with the next request.
    assert_eq!(say(channel.clone(), "hello").await.unwrap(), "hello");
    let ending = tokio::spawn(member.end());
    assert_eq!(say(channel, "hello").await.unwrap(), "hello");
    assert!(!long.is_finished());
    echo.release.notify_waiters();
    assert_eq!(long.await.unwrap().unwrap(), "wait");
    ending.await.unwrap();
    next.end().await;
}

#[tokio::test]
async fn requests_wait_while_there_is_no_server() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let web = etcd.discovery().await.service("shop", "web").unwrap();
    ready(&web).await;
    let channel = web.channel();
    // The list is followed for as long as the channel is there.
    drop(web);
    let early = tokio::spawn(say(channel.clone(), "hello"));
    let member = Member::join(&mut client).await;
    let answer = tokio::time::timeout(SOON, early).await.unwrap().unwrap();
    assert_eq!(answer.unwrap(), "hello");
    drop(channel);
    member.end().await;
}
