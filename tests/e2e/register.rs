//! The command `register`: processes of a virtual machine.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use testbed::eventually;

use crate::commands::{Running, command, ends};
use crate::support::{Registry, SOON, Stage};

fn etcd() -> testbed::Etcd {
    testbed::Etcd::builder("register")
        .unsafe_no_fsync()
        .start()
        .unwrap()
}

/// The address of the process under check. It listens while it is well.
struct Server {
    address: SocketAddr,
    status: Arc<AtomicU16>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Answers every request with a status.
    fn start(address: SocketAddr, status: u16) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let status = Arc::new(AtomicU16::new(status));
        let stop = Arc::new(AtomicBool::new(false));
        let (answer, stopped) = (Arc::clone(&status), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                let Ok((mut stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                };
                let status = answer.load(Ordering::SeqCst);
                let text = format!(
                    "HTTP/1.1 {status} X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                );
                let _ = stream.set_nonblocking(false);
                let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(text.as_bytes());
            }
        });
        Self {
            address,
            status,
            stop,
            thread: Some(thread),
        }
    }

    fn stop(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn key(address: SocketAddr) -> String {
    format!("/services/shop/web/vm/{address}")
}

/// Flags that make it look often.
const FAST: [&str; 6] = [
    "--service=web",
    "-n=shop",
    "--ttl=60s",
    "--check-interval=50ms",
    "--check-timeout=5s",
    "--zone=eu-a",
];

fn register(etcd: &testbed::Etcd, args: &[&str], process: &[&str]) -> Running {
    let mut command = command(etcd, "register", &FAST);
    command.args(args);
    if !process.is_empty() {
        command.arg("--").args(process);
    }
    Running::start(command)
}

fn wait(registry: &Registry, key: &str, there: bool) {
    eventually(SOON, "the key", || match registry.get(key) {
        Some(_) if there => Ok(()),
        None if !there => Ok(()),
        found => Err(format!("{key}: {found:?}")),
    })
    .unwrap();
}

/// A process that says what stands in etcd when it is asked to end, and ends with 7.
fn process(etcd: &testbed::Etcd) -> String {
    let etcdctl = etcd.etcdctl_command().unwrap();
    let mut words = vec![etcdctl.get_program().to_string_lossy().into_owned()];
    words.extend(
        etcdctl
            .get_args()
            .map(|arg| arg.to_string_lossy().into_owned()),
    );
    let environment = etcdctl
        .get_envs()
        .filter_map(|(name, value)| Some(format!("{}='{}'", name.to_str()?, value?.to_str()?)));
    let environment: Vec<_> = environment.collect();
    format!(
        "trap '{} {} get /services/ --prefix --keys-only > \"$SEEN\"; exit 7' TERM INT; echo started; while :; do sleep 0.02; done",
        environment.join(" ").replace('\'', "\""),
        words.join(" ")
    )
}

#[test]
fn a_process_is_registered_while_its_check_passes_and_is_asked_to_end_after_it_was_taken_out() {
    let etcd = etcd();
    let registry = Registry::connect(&etcd);
    let folder = tempfile::tempdir().unwrap();
    for (number, name) in ["TERM", "INT"].into_iter().enumerate() {
        let seen = folder.path().join(name);
        let server = Server::start("127.0.0.1:0".parse().unwrap(), 200);
        let (address, flag) = (server.address, format!("--address={}", server.address));
        server.stop();
        let mut command = command(&etcd, "register", &FAST);
        command
            .args([&flag, "--check=tcp", "--", "sh", "-c", &process(&etcd)])
            .env("SEEN", &seen);
        let running = Running::start(command);
        running.says_all(&["started", "the check fails"]);
        assert!(registry.get(&key(address)).is_none());
        for _ in 0..=number {
            let server = Server::start(address, 200);
            running.says("registered: ");
            let record = registry.get(&key(address)).unwrap();
            assert_eq!(record.json()["zone"], "eu-a");
            server.stop();
            running.says("the check fails");
            wait(&registry, &key(address), false);
        }
        let server = Server::start(address, 200);
        wait(&registry, &key(address), true);
        running.signal(name);
        assert_eq!(running.wait().code(), Some(7), "{name}");
        assert_eq!(std::fs::read_to_string(&seen).unwrap(), "", "{name}");
        assert!(registry.get(&key(address)).is_none());
        assert!(registry.leases().is_empty());
        server.stop();
    }
}

#[test]
fn a_process_that_ends_is_taken_out_and_its_exit_code_is_kept() {
    let etcd = etcd();
    let registry = Registry::connect(&etcd);
    let address = "--address=10.0.0.5:8080";
    for (end, code) in [("exit 3", 3), ("exit 0", 0), ("kill -9 $$", 128 + 9)] {
        // It ends when it is told so.
        let folder = tempfile::tempdir().unwrap();
        let told = folder.path().join("told");
        let script = format!(
            "until [ -e {} ]; do sleep 0.02; done; {end}",
            told.display()
        );
        let running = register(&etcd, &[address], &["sh", "-c", &script]);
        running.says("registered: ");
        assert!(
            registry
                .get("/services/shop/web/vm/10.0.0.5:8080")
                .is_some()
        );
        std::fs::write(&told, "").unwrap();
        assert_eq!(running.wait().code(), Some(code), "{end}");
        assert!(registry.list("/services/").is_empty(), "{end}");
    }
    for (program, code) in [("/no/such/program", 127), ("/etc/hostname", 126)] {
        let running = register(&etcd, &[address], &[program]);
        assert_eq!(running.wait().code(), Some(code), "{program}");
        assert!(registry.list("/services/").is_empty(), "{program}");
    }
}

#[test]
fn without_a_command_it_watches_over_a_process_of_others() {
    let etcd = etcd();
    let registry = Registry::connect(&etcd);
    let server = Server::start("127.0.0.1:0".parse().unwrap(), 503);
    let flag = format!("--address={}", server.address);
    let running = register(
        &etcd,
        &[
            &flag,
            "--check=http",
            "--check-failures=3",
            "--weight=7",
            "--metadata=version=v1",
        ],
        &[],
    );
    assert!(running.says("the check fails").contains("503"));
    assert!(registry.get(&key(server.address)).is_none());
    server.status.store(302, Ordering::SeqCst);
    assert!(running.says("registered: ").contains(&key(server.address)));
    let value = registry.get(&key(server.address)).unwrap().json();
    assert_eq!(
        (
            &value["weight"],
            &value["metadata"]["version"],
            &value["scheme"]
        ),
        (&7.into(), &"v1".into(), &"http".into())
    );
    server.status.store(404, Ordering::SeqCst);
    assert!(running.says("the check fails").contains("404"));
    wait(&registry, &key(server.address), false);
    server.status.store(200, Ordering::SeqCst);
    wait(&registry, &key(server.address), true);
    running.signal("TERM");
    assert_eq!(running.wait().code(), Some(0));
    assert!(registry.get(&key(server.address)).is_none());
    server.stop();
}

#[test]
fn a_key_of_another_is_left_alone_and_an_absent_etcd_holds_up_no_end() {
    let etcd = etcd();
    let registry = Registry::connect(&etcd);
    let key = "/services/shop/web/vm/10.0.0.5:8080";
    registry.put(key, "theirs", 0);
    let running = register(&etcd, &["--address=10.0.0.5:8080"], &["sleep", "600"]);
    assert!(running.says("belongs to someone else").contains(key));
    registry.delete(key);
    running.says("registered: ");
    etcd.kill().unwrap();
    running.says("waiting for etcd");
    running.signal("TERM");
    running.says("goes when its lease ends");
    // The process is asked to end all the same.
    assert_eq!(running.wait().code(), Some(128 + 15));
}

#[test]
fn other_formats_and_templates_are_registered_by_one_line() {
    let etcd = etcd();
    let registry = Registry::connect(&etcd);
    for (args, key, value) in [
        (
            &["--format=Grpc", "--prefix=grpc/"][..],
            "grpc/web/10.0.0.5:8080",
            r#"{"Op":0,"Addr":"10.0.0.5:8080","Metadata":null}"#,
        ),
        (
            &[
                "--format=template",
                "--prefix=/",
                "--name=node1",
                "--template-key=/web/{{ pod }}",
            ],
            "/web/node1",
            "10.0.0.5:8080",
        ),
    ] {
        let mut all = vec!["--address=10.0.0.5:8080"];
        all.extend(args);
        let running = register(&etcd, &all, &[]);
        running.says("registered: ");
        assert_eq!(registry.get(key).unwrap().value, value);
        running.signal("TERM");
        assert_eq!(running.wait().code(), Some(0));
    }
}

#[test]
fn register_says_which_flag_is_wrong() {
    let etcd = etcd();
    let says = |args: &[&str], code: i32, part: &str| {
        let (_, stderr) = ends(&etcd, "register", args, code);
        assert!(stderr.contains(part), "{args:?}: {stderr}");
    };
    let address = "--address=10.0.0.5:8080";
    says(&[address], 2, "--service");
    says(&["--service=web", "--address=web:80"], 2, "--address");
    says(&["--service=a/b", address], 1, "service name");
    says(
        &["--service=web", "--address=0.0.0.0:80"],
        1,
        "at which others reach",
    );
    says(&["--service=web", address, "--ttl=1s"], 1, "from 5 s");
    says(
        &["--service=web", address, "--check=udp"],
        1,
        "write tcp, http, https or a URL",
    );
    says(
        &["--service=web", address, "--format=Template"],
        1,
        "--template-key",
    );
    says(&["--service=web", address, "--format=Kratos"], 1, "scheme");
    says(&["--service=web", address, "--cluster=V M"], 2, "DNS label");
}

#[test]
fn a_check_by_https_takes_any_certificate() {
    let stage = Stage::new("register-https");
    let registry = Registry::connect(&stage.etcd);
    let server = stage.plane.cluster.server().unwrap();
    let check = format!("--check={server}/livez");
    let running = register(&stage.etcd, &["--address=10.0.0.5:8080", &check], &[]);
    running.says("registered: ");
    let record = registry.get("/services/shop/web/vm/10.0.0.5:8080").unwrap();
    assert_eq!(record.json()["scheme"], "https");
}

#[test]
fn the_completions_of_bash_are_a_script() {
    let script = Command::new(crate::support::BINARY)
        .args(["completions", "bash"])
        .output()
        .unwrap();
    assert!(script.status.success());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("completions");
    std::fs::write(&file, script.stdout).unwrap();
    let complete = format!(
        "source {}; COMP_WORDS=(etcd-registrar disc); COMP_CWORD=1; _etcd__registrar etcd-registrar disc etcd-registrar; echo ${{COMPREPLY[@]}}",
        file.display()
    );
    let told = Command::new("bash")
        .args(["-c", &complete])
        .output()
        .unwrap();
    let told = String::from_utf8(told.stdout).unwrap();
    assert_eq!(told.trim(), "discover");
}
