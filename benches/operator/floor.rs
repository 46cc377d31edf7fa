//! The floor: the least that a program of the same language and libraries can do, in a process of its own.
//!
//! One raw watch of all pods with the operator's own parser, one lease that is kept alive, one put or delete for each
//! change: no comparison, no mirror, no election, no status. It serves one group of pods or none at a time, as it is told.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use clap::{Parser, Subcommand};
use etcd_client::{Client, DeleteOptions, GetOptions, LeaseGrantOptions, PutOptions, Txn, TxnOp};
use etcd_registrar::engine::io::{Object, Resource};
use etcd_registrar::kube::client::{ClientOptions, KubeClient};
use etcd_registrar::kube::wire::{Item, Line, read_line};
use etcd_registrar::model::pod::Pod;
use futures::io::AsyncBufReadExt;
use futures::{StreamExt, TryStreamExt};

use crate::{Result, runtime};

/// What the operator puts into a transaction: its 120 operations less the lane's mark and the key of a lease.
const PUTS: usize = 118;
/// Transactions in flight: the operator's lanes.
const IN_FLIGHT: usize = 4;
/// Records that share a lease, as in the operator.
const RECORDS_PER_LEASE: usize = 256;
/// The TTL of its leases, in seconds.
const TTL: i64 = 60;
/// An answer may hold all records at once.
const MESSAGE: usize = 256 << 20;

/// The first argument that makes this program the floor.
pub(crate) const NAME: &str = "floor";

/// The arguments after [`NAME`].
#[derive(Debug, Parser)]
pub(crate) struct Args {
    #[arg(long)]
    etcd: String,
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Debug, Subcommand)]
enum Mode {
    /// Registers ready pods below `PREFIX<app>/`.
    Follow {
        #[arg(long)]
        kubeconfig: PathBuf,
        #[arg(long)]
        prefix: String,
        /// The values of the label `app` that it registers.
        #[arg(long)]
        app: Vec<String>,
    },
    /// Reads the records below one prefix, and puts them below another one when told to.
    Burst {
        #[arg(long)]
        from: String,
        #[arg(long)]
        to: String,
    },
}

pub(crate) fn run(args: Args) -> Result<()> {
    match args.mode {
        Mode::Follow {
            kubeconfig,
            prefix,
            app,
        } => {
            // Ends with the benchmark, whichever way that ends.
            std::thread::spawn(|| {
                let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                std::process::exit(0);
            });
            runtime()?.block_on(follow(&args.etcd, kubeconfig, &prefix, &app))
        }
        Mode::Burst { from, to } => burst(&args.etcd, &from, &to),
    }
}

async fn follow(etcd: &str, kubeconfig: PathBuf, prefix: &str, apps: &[String]) -> Result<()> {
    let etcd = Client::connect([etcd], None).await?;
    let lease = etcd.lease_client().grant(TTL, None).await?.id();
    let (mut keeper, mut kept) = etcd.lease_client().keep_alive(lease).await?;
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(TTL as u64 / 3)).await;
            if keeper.keep_alive().await.is_err() || kept.message().await.is_err() {
                eprintln!("bench: the floor's lease is lost");
                return;
            }
        }
    });
    let options = ClientOptions {
        kubeconfig: Some(kubeconfig),
        context: None,
    };
    let client = KubeClient::new(options).await?.current();
    // Without a resource version the pods that are there come first.
    let request = http::Request::get("/api/v1/pods?watch=true").body(Vec::new())?;
    let mut reader = Box::pin(client.request_stream(request).await?);
    let mut kv = etcd.kv_client();
    let mut registered: HashMap<Box<str>, bool> = HashMap::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).await? == 0 {
            return Err("the API server ended the floor's watch".into());
        }
        let Line::Applied(Item::Read(Object::Pod(pod)), _) = read_line(Resource::Pods, &line)?
        else {
            continue;
        };
        let app = pod.labels.iter().find(|(name, _)| &**name == "app");
        let Some((_, app)) = app.filter(|(_, app)| apps.iter().any(|known| **known == **app))
        else {
            continue;
        };
        let Some(address) = pod.ips.first().copied() else {
            continue;
        };
        let before = registered.insert(pod.name.clone(), pod.ready);
        if before.unwrap_or(false) == pod.ready {
            continue;
        }
        let key = format!("{prefix}{app}/bench/{address}:8080");
        if pod.ready {
            let options = PutOptions::new().with_lease(lease);
            kv.put(key, record(&pod, app, address), Some(options))
                .await?;
        } else {
            kv.delete(key, None).await?;
        }
    }
}

/// As long as a record of the operator, with the same members.
fn record(pod: &Pod, app: &str, address: IpAddr) -> String {
    format!(
        r#"{{"address":"{address}:8080","host":"{address}","port":8080,"portName":"http","protocol":"TCP","scheme":"","family":"IPv4","cluster":"bench","namespace":"{}","service":"{app}","pod":"{}","uid":"{}","node":"{}","zone":"a","weight":100,"metadata":{{}}}}"#,
        pod.namespace, pod.name, pod.uid, pod.node
    )
}

fn burst(etcd: &str, from: &str, to: &str) -> Result<()> {
    let runtime = runtime()?;
    let client = runtime.block_on(Client::connect([etcd], None))?;
    let records: Vec<(Vec<u8>, Vec<u8>)> = runtime.block_on(async {
        let mut kv = client.kv_client().max_decoding_message_size(MESSAGE);
        let options = GetOptions::new().with_prefix();
        let mut found = kv.get(from, Some(options)).await?;
        let renamed = found.take_kvs().into_iter().map(|kv| {
            let (key, value) = kv.into_key_value();
            let rest = key.get(from.len()..).unwrap_or_default();
            ([to.as_bytes(), rest].concat(), value)
        });
        Ok::<_, etcd_client::Error>(renamed.collect())
    })?;
    let mut leases: Vec<i64> = Vec::new();
    println!("{}", records.len());
    for command in std::io::stdin().lines() {
        match command?.as_str() {
            "grant" => runtime.block_on(async {
                for _ in 0..records.len().div_ceil(RECORDS_PER_LEASE) {
                    let options = LeaseGrantOptions::new();
                    let granted = client.lease_client().grant(TTL, Some(options)).await?;
                    leases.push(granted.id());
                }
                Ok::<_, etcd_client::Error>(())
            })?,
            "put" => runtime.block_on(put_all(&client, &records, &leases))?,
            "remove" => runtime.block_on(async {
                let options = DeleteOptions::new().with_prefix();
                client.kv_client().delete(to, Some(options)).await?;
                for lease in leases.drain(..) {
                    client.lease_client().revoke(lease).await?;
                }
                Ok::<_, etcd_client::Error>(())
            })?,
            other => return Err(format!("unknown command {other}").into()),
        }
        println!("done");
    }
    Ok(())
}

async fn put_all(client: &Client, records: &[(Vec<u8>, Vec<u8>)], leases: &[i64]) -> Result<()> {
    let lease_of = |at: usize| leases.get(at / RECORDS_PER_LEASE).copied().unwrap_or(0);
    let transactions = records.chunks(PUTS).enumerate().map(|(chunk, records)| {
        let puts = records.iter().enumerate().map(|(at, (key, value))| {
            let options = PutOptions::new().with_lease(lease_of(chunk * PUTS + at));
            TxnOp::put(key.as_slice(), value.as_slice(), Some(options))
        });
        Txn::new().and_then(puts.collect::<Vec<_>>())
    });
    futures::stream::iter(transactions)
        .map(|transaction| async move { client.kv_client().txn(transaction).await })
        .buffer_unordered(IN_FLIGHT)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    Ok(())
}

/// The floor, run from the benchmark. Dropping it ends it.
pub(crate) struct Floor {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Floor {
    /// Follows the pods whose label `app` is one of these.
    pub(crate) fn follow(
        etcd: &str,
        kubeconfig: &Path,
        prefix: &str,
        apps: &[&str],
    ) -> Result<Self> {
        let mut args = vec!["follow".to_owned(), "--kubeconfig".to_owned()];
        args.push(kubeconfig.display().to_string());
        args.extend(["--prefix".to_owned(), prefix.to_owned()]);
        for app in apps {
            args.extend(["--app".to_owned(), (*app).to_owned()]);
        }
        Self::start(etcd, &args)
    }

    /// Holds the records below `from` in memory; gives their number too.
    pub(crate) fn burst(etcd: &str, from: &str, to: &str) -> Result<(Self, usize)> {
        let mut floor = Self::start(etcd, &["burst", "--from", from, "--to", to])?;
        let number = floor.answer()?.parse()?;
        Ok((floor, number))
    }

    fn start<S: AsRef<std::ffi::OsStr>>(etcd: &str, args: &[S]) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([NAME, "--etcd", etcd])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let commands = child.stdin.take();
        let answers = child.stdout.take().ok_or("the floor has no output")?;
        Ok(Self {
            child,
            commands,
            answers: BufReader::new(answers),
        })
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err("the floor ended".into());
        }
        Ok(line.trim().to_owned())
    }

    /// Gives a command without waiting for it to be done.
    pub(crate) fn begin(&mut self, command: &str) -> Result<()> {
        let commands = self
            .commands
            .as_mut()
            .ok_or("the floor takes no commands")?;
        writeln!(commands, "{command}")?;
        commands.flush()?;
        Ok(())
    }

    /// Waits until the last command is done.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.answer().map(drop)
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        drop(self.commands.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
