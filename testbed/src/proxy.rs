//! A TCP proxy that plays a bad network.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

use crate::error::{Context, Result};
use crate::ports;
use crate::process::lock;

/// How soon a change of the settings is seen by a connection that is idle.
const TICK: Duration = Duration::from_millis(5);

/// What happens to bytes that travel in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Flow {
    /// They arrive.
    #[default]
    Pass,
    /// A black hole that heals: nothing arrives now; what was sent meanwhile arrives once this is [`Flow::Pass`] again, as
    /// TCP sends again what was lost.
    Hold,
    /// They are lost for good. Such a connection is reset rather than healed, for it would have a gap.
    Drop,
}

/// One of the two directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server: requests.
    ToServer,
    /// From the server to the client: responses.
    ToClient,
}

#[derive(Debug, Default, Clone, Copy)]
struct Settings {
    to_server: Flow,
    to_client: Flow,
    delay_to_server: Duration,
    delay_to_client: Duration,
    refuse: bool,
}

struct Inner {
    settings: Mutex<Settings>,
    target: SocketAddr,
    /// A connection's own threads hold it too, and let go of it when they end.
    connections: Mutex<Vec<Weak<AtomicBool>>>,
    accepted: AtomicU64,
    stopping: AtomicBool,
}

/// Set to end the connection with a RST.
type Aborted = Arc<AtomicBool>;

/// Listens on a port of 127.0.0.1 and forwards to a target. Dropping it resets every connection.
pub struct Proxy {
    inner: Arc<Inner>,
    port: u16,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    /// A proxy to a port of 127.0.0.1 that lets everything pass.
    pub fn start(target_port: u16) -> Result<Self> {
        let (port, listener) = loop {
            let port = ports::free_port()?;
            match listen(port) {
                Ok(listener) => break (port, listener),
                Err(error) if error.kind() == ErrorKind::AddrInUse => {}
                Err(error) => return Err(error).context("proxy", format!("listen on port {port}")),
            }
        };
        let inner = Arc::new(Inner {
            settings: Mutex::default(),
            target: SocketAddr::from((Ipv4Addr::LOCALHOST, target_port)),
            connections: Mutex::default(),
            accepted: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        });
        let shared = Arc::clone(&inner);
        let acceptor = std::thread::spawn(move || accept(&shared, port, listener));
        Ok(Self {
            inner,
            port,
            acceptor: Some(acceptor),
        })
    }

    /// The port that it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A URL of it, with `http` or `https`.
    pub fn url(&self, scheme: &str) -> String {
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// Lets bytes pass, holds or drops them in one direction, on every connection, also on those to come.
    ///
    /// `set(ToClient, Drop)` is "the response is lost after the commit".
    pub fn set(&self, direction: Direction, flow: Flow) {
        let mut settings = lock(&self.inner.settings);
        match direction {
            Direction::ToServer => settings.to_server = flow,
            Direction::ToClient => settings.to_client = flow,
        }
    }

    /// Delays every byte in one direction.
    pub fn delay(&self, direction: Direction, delay: Duration) {
        let mut settings = lock(&self.inner.settings);
        match direction {
            Direction::ToServer => settings.delay_to_server = delay,
            Direction::ToClient => settings.delay_to_client = delay,
        }
    }

    /// A black hole in both directions. New connections are accepted, and hang.
    pub fn black_hole(&self) {
        self.set(Direction::ToServer, Flow::Hold);
        self.set(Direction::ToClient, Flow::Hold);
    }

    /// Refuses new connections (the port is closed), or takes them again. Those that exist are not touched.
    pub fn refuse(&self, refuse: bool) {
        lock(&self.inner.settings).refuse = refuse;
        // The port is closed by the acceptor; whoever calls this may rely on it afterwards.
        let _ = crate::eventually(Duration::from_secs(2), "the port", || {
            let open = TcpStream::connect(("127.0.0.1", self.port)).is_ok();
            if open != refuse {
                Ok(())
            } else {
                Err("not yet")
            }
        });
    }

    /// Resets every connection that exists.
    pub fn reset(&self) {
        for connection in lock(&self.inner.connections).drain(..) {
            if let Some(aborted) = connection.upgrade() {
                aborted.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Lets everything pass again and takes connections. Connections that lost bytes are reset.
    pub fn heal(&self) {
        *lock(&self.inner.settings) = Settings::default();
    }

    /// How many connections it has taken so far.
    pub fn accepted(&self) -> u64 {
        self.inner.accepted.load(Ordering::Relaxed)
    }

    /// How many connections there are now.
    pub fn open(&self) -> usize {
        let mut connections = lock(&self.inner.connections);
        connections.retain(|connection| connection.strong_count() > 0);
        connections.len()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.inner.stopping.store(true, Ordering::Relaxed);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.reset();
    }
}

fn listen(port: u16) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn accept(inner: &Arc<Inner>, port: u16, listener: TcpListener) {
    let mut listener = Some(listener);
    while !inner.stopping.load(Ordering::Relaxed) {
        if lock(&inner.settings).refuse {
            listener = None;
        } else if listener.is_none() {
            listener = listen(port).ok();
        }
        match listener.as_ref().map(TcpListener::accept) {
            Some(Ok((client, _))) => {
                inner.accepted.fetch_add(1, Ordering::Relaxed);
                let inner = Arc::clone(inner);
                // The target may be slow to answer, and the next client shall not wait for it.
                std::thread::spawn(move || serve(&inner, client));
            }
            _ => std::thread::sleep(TICK),
        }
    }
}

/// Connects a client with the target. Without a target the client is closed.
fn serve(inner: &Arc<Inner>, client: TcpStream) {
    let aborted = Aborted::default();
    let start = || -> std::io::Result<()> {
        client.set_nonblocking(false)?;
        let server = TcpStream::connect_timeout(&inner.target, Duration::from_secs(5))?;
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
            // So that a change of the settings, or the end, is noticed by a thread that waits for the network.
            stream.set_read_timeout(Some(TICK))?;
            stream.set_write_timeout(Some(TICK))?;
        }
        let pump = |direction| Pump {
            inner: Arc::clone(inner),
            aborted: Arc::clone(&aborted),
            direction,
        };
        pump(Direction::ToServer).start(client.try_clone()?, server.try_clone()?);
        pump(Direction::ToClient).start(server, client.try_clone()?);
        Ok(())
    };
    if start().is_ok() {
        let mut connections = lock(&inner.connections);
        connections.retain(|connection| connection.strong_count() > 0);
        connections.push(Arc::downgrade(&aborted));
    }
}

/// Moves the bytes of one direction: a thread that reads, and one that writes when the time has come.
#[derive(Clone)]
struct Pump {
    inner: Arc<Inner>,
    aborted: Aborted,
    direction: Direction,
}

/// Bytes and when they are due.
type Chunk = (Instant, Vec<u8>);

impl Pump {
    fn start(self, from: TcpStream, to: TcpStream) {
        let (sender, receiver) = channel();
        let writer = self.clone();
        std::thread::spawn(move || {
            self.read(&from, &sender);
            self.close(&from);
        });
        std::thread::spawn(move || {
            writer.write(&to, &receiver);
            writer.close(&to);
        });
    }

    fn flow(&self) -> (Flow, Duration) {
        let settings = lock(&self.inner.settings);
        match self.direction {
            Direction::ToServer => (settings.to_server, settings.delay_to_server),
            Direction::ToClient => (settings.to_client, settings.delay_to_client),
        }
    }

    fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Relaxed)
    }

    fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
    }

    /// Makes the coming close of the socket a RST, when the connection was aborted. The socket is really closed when the
    /// last of its threads lets go of it, a tick later.
    fn close(&self, stream: &TcpStream) {
        if self.is_aborted() {
            let _ = setsockopt(
                stream,
                sockopt::Linger,
                &nix::libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                },
            );
        }
    }

    fn read(&self, mut from: &TcpStream, sender: &Sender<Chunk>) {
        let mut buffer = vec![0; 64 * 1024];
        let mut gap = false;
        while !self.is_aborted() {
            let (flow, _) = self.flow();
            if flow == Flow::Hold {
                // Not reading fills the buffers of the kernel, until the other side cannot send any more either.
                std::thread::sleep(TICK);
                continue;
            }
            if gap && flow == Flow::Pass {
                return self.abort();
            }
            match from.read(&mut buffer) {
                // The ordinary end, of this direction only.
                Ok(0) => return,
                Ok(length) => {
                    // Asked again: the settings may have changed while it waited.
                    let (flow, delay) = self.flow();
                    if flow == Flow::Drop {
                        gap = true;
                        continue;
                    }
                    let bytes = buffer.get(..length).unwrap_or_default().to_vec();
                    if gap || sender.send((Instant::now() + delay, bytes)).is_err() {
                        return self.abort();
                    }
                }
                Err(error) if is_timeout(&error) => {}
                Err(_) => return self.abort(),
            }
        }
    }

    fn write(&self, mut to: &TcpStream, receiver: &Receiver<Chunk>) {
        while !self.is_aborted() {
            let (due, bytes) = match receiver.recv_timeout(TICK) {
                Ok(chunk) => chunk,
                Err(RecvTimeoutError::Timeout) => continue,
                // The reader ended: with the stream, or because the connection was aborted.
                Err(RecvTimeoutError::Disconnected) => {
                    if !self.is_aborted() {
                        let _ = to.shutdown(Shutdown::Write);
                    }
                    return;
                }
            };
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let mut left = bytes.as_slice();
            while !left.is_empty() && !self.is_aborted() {
                // What had been read before the black hole began is still on its way, and stays in it.
                if self.flow().0 == Flow::Hold {
                    std::thread::sleep(TICK);
                    continue;
                }
                match to.write(left) {
                    Ok(written) => left = left.get(written..).unwrap_or_default(),
                    Err(error) if is_timeout(&error) => {}
                    Err(_) => self.abort(),
                }
            }
        }
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends back what it gets, and counts the bytes.
    fn echo() -> (u16, Arc<AtomicU64>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&seen);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(std::io::Result::ok) {
                let count = Arc::clone(&count);
                std::thread::spawn(move || {
                    let mut buffer = [0; 1024];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        count.fetch_add(length as u64, Ordering::Relaxed);
                        if stream.write_all(&buffer[..length]).is_err() {
                            break;
                        }
                    }
                });
            }
        });
        (port, seen)
    }

    fn client(proxy: &Proxy) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream
    }

    fn exchange(stream: &mut TcpStream, text: &str) -> std::io::Result<String> {
        stream.write_all(text.as_bytes())?;
        let mut buffer = vec![0; text.len()];
        stream.read_exact(&mut buffer)?;
        Ok(String::from_utf8(buffer).unwrap())
    }

    #[test]
    fn passes_and_delays() {
        let (port, _) = echo();
        let proxy = Proxy::start(port).unwrap();
        let mut stream = client(&proxy);
        assert_eq!(exchange(&mut stream, "hello").unwrap(), "hello");
        proxy.delay(Direction::ToClient, Duration::from_millis(200));
        let start = Instant::now();
        assert_eq!(exchange(&mut stream, "again").unwrap(), "again");
        assert!(start.elapsed() >= Duration::from_millis(200));
        assert_eq!(proxy.open(), 1);
    }

    #[test]
    fn a_black_hole_heals() {
        let (port, seen) = echo();
        let proxy = Proxy::start(port).unwrap();
        let mut stream = client(&proxy);
        assert_eq!(exchange(&mut stream, "one").unwrap(), "one");
        proxy.black_hole();
        stream
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        assert!(exchange(&mut stream, "two").is_err());
        assert_eq!(seen.load(Ordering::Relaxed), 3);
        proxy.heal();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let mut buffer = [0; 3];
        stream.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"two");
    }

    #[test]
    fn a_lost_response_reaches_the_server_and_ends_the_connection_once_healed() {
        let (port, seen) = echo();
        let proxy = Proxy::start(port).unwrap();
        let mut stream = client(&proxy);
        proxy.set(Direction::ToClient, Flow::Drop);
        stream
            .set_read_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        assert!(exchange(&mut stream, "put").is_err());
        assert_eq!(seen.load(Ordering::Relaxed), 3);
        proxy.heal();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        assert!(matches!(stream.read(&mut [0; 3]), Ok(0) | Err(_)));
        assert_eq!(exchange(&mut client(&proxy), "new").unwrap(), "new");
    }

    #[test]
    fn resets_and_refuses() {
        let (port, _) = echo();
        let proxy = Proxy::start(port).unwrap();
        let mut stream = client(&proxy);
        assert_eq!(exchange(&mut stream, "one").unwrap(), "one");
        proxy.reset();
        let error = stream.read(&mut [0; 3]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        proxy.refuse(true);
        assert!(TcpStream::connect(("127.0.0.1", proxy.port())).is_err());
        proxy.refuse(false);
        assert_eq!(exchange(&mut client(&proxy), "three").unwrap(), "three");
    }
}
