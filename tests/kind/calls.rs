//! Clients elsewhere: they read where the server is from etcd, and call it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use etcd_registrar::discovery::{Discovery, Settings};
use testbed::eventually;

use crate::watcher::runtime;
use crate::world::{LONG, SHOP, World};

fn request(address: &str, method: &str, path: &str) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("{address}: {error}");
    let socket = address.parse().map_err(|_| format!("{address} is none"))?;
    let mut stream = TcpStream::connect_timeout(&socket, Duration::from_secs(5)).map_err(failed)?;
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .map_err(failed)?;
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").map_err(failed)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(failed)?;
    if answer.starts_with("HTTP/1.1 200") {
        Ok(answer.lines().last().unwrap_or_default().to_owned())
    } else {
        Err(format!("{address}: {answer}"))
    }
}

/// A GET of the test's server at an address, which answers with its pod's name.
pub(crate) fn get(address: &str) -> Result<String, String> {
    request(address, "GET", "/")
}

/// A POST to the test's server on a pod.
pub(crate) fn post(ip: &str, path: &str) {
    eventually(Duration::from_secs(20), "the server to answer", || {
        request(&format!("{ip}:8080"), "POST", path)
    })
    .unwrap();
}

/// Calls every registered endpoint of `web` in `east` over and over, as a client that follows the registry does.
pub(crate) struct Traffic {
    stop: Arc<AtomicBool>,
    calls: Arc<AtomicUsize>,
    thread: std::thread::JoinHandle<Vec<String>>,
}

impl Traffic {
    pub(crate) fn start(world: &World) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let calls = Arc::new(AtomicUsize::new(0));
        let (stopped, counted, registry) = (
            Arc::clone(&stop),
            Arc::clone(&calls),
            world.registry.clone(),
        );
        let thread = std::thread::spawn(move || {
            let mut failures = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let keys = match registry.keys(&format!("/services/{SHOP}/web/east/")) {
                    Ok(keys) if !keys.is_empty() => keys,
                    other => {
                        failures.push(format!("{other:?}"));
                        continue;
                    }
                };
                for key in keys {
                    let address = key.rsplit('/').next().unwrap();
                    counted.fetch_add(1, Ordering::Relaxed);
                    failures.extend(get(address).err());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            failures
        });
        Self {
            stop,
            calls,
            thread,
        }
    }

    /// Ends it, and gives the number of calls, none of which may have failed.
    pub(crate) fn end(self) -> usize {
        let calls = self.calls.load(Ordering::Relaxed);
        self.stop.store(true, Ordering::Relaxed);
        let failures = self.thread.join().unwrap();
        assert!(
            failures.is_empty(),
            "{} of {calls} failed: {failures:#?}",
            failures.len()
        );
        calls
    }
}

/// How the discovery library reaches etcd, as root.
pub(crate) fn settings(world: &World) -> Settings {
    let file = |name: &str| Some(world.folder.join(name));
    Settings {
        endpoints: world.registry.endpoints.clone(),
        cacert: file("ca.crt"),
        cert: file("root.crt"),
        key: file("root.key"),
        ..Settings::default()
    }
}

/// A pod of `west` and a process on this machine call the server of `east`.
pub(crate) fn across_clusters(world: &World) {
    let wanted: Vec<String> = world
        .settled("east", "web", 4)
        .iter()
        .map(|key| key.rsplit('/').next().unwrap().to_owned())
        .collect();

    // A process on the host, through the discovery library.
    let mut found: Vec<String> = runtime().block_on(async {
        let discovery = Discovery::connect(settings(world)).await.unwrap();
        let web = discovery.service(SHOP, "web").unwrap();
        tokio::time::timeout(LONG, web.ready()).await.unwrap();
        web.snapshot()
            .iter()
            .map(|endpoint| endpoint.address().to_owned())
            .collect()
    });
    found.sort();
    assert_eq!(found, wanted);
    for address in &found {
        get(address).unwrap();
    }
    world.note(&format!(
        "{} of {} called from the host",
        found.len(),
        wanted.len()
    ));

    // A pod of west: what its operator's image discovers, it calls.
    let image = world.get(
        "west",
        &["deploy", "etcd-registrar", "-n", crate::world::HOME],
    );
    let pod = &image["spec"]["template"]["spec"];
    let discover = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "discover", "namespace": crate::world::HOME},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": pod["securityContext"],
            "volumes": pod["volumes"],
            "containers": [{
                "name": "discover", "image": pod["containers"][0]["image"],
                "args": ["discover", "web", "--namespace", SHOP, "--cluster", "east", "--output", "addresses"],
                "env": pod["containers"][0]["env"].as_array().unwrap().iter()
                    .filter(|variable| variable["name"].as_str().unwrap().starts_with("ETCD_REGISTRAR_ETCD_"))
                    .collect::<Vec<_>>(),
                "securityContext": pod["containers"][0]["securityContext"],
                "volumeMounts": pod["containers"][0]["volumeMounts"],
            }],
        },
    });
    world.apply("west", "discover", &discover.to_string());
    let mut found: Vec<String> = world
        .finished("west", crate::world::HOME, "discover")
        .lines()
        .map(str::to_owned)
        .collect();
    found.sort();
    assert_eq!(found, wanted);
    let urls: Vec<String> = found
        .iter()
        .map(|address| format!("http://{address}/"))
        .collect();
    let mut args = vec![
        "run",
        "call",
        "-n",
        SHOP,
        "--image=etcd-registrar/web:kind",
        "--restart=Never",
        "--",
        "call",
    ];
    args.extend(urls.iter().map(String::as_str));
    world.kubectl("west", &args);
    let said = world.finished("west", SHOP, "call");
    assert_eq!(said.matches("200 OK").count(), wanted.len(), "{said}");
    world.note(&format!(
        "{} of {} called by a pod of west",
        wanted.len(),
        wanted.len()
    ));
}
