//! The floor: the least that a program of the same language and libraries can do, in a process of its own.
//!
//! One raw watch of all pods with the operator's own parser, one lease that is kept alive, one put or delete for each
//! change: no comparison, no mirror, no election, no status.
//!
//! What the protocol itself costs is measured too: [`Fenced`] makes transactions of the operator's shape, the fence, the
//! lane's mark and the key's revision compared, without anything of what the operator does to know what to write; and
//! the keys can be watched, which tells a mirror of everything that is written to them.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use clap::{Parser, Subcommand};
use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, GetOptions, KvClient, LeaseGrantOptions, PutOptions,
    Txn, TxnOp, WatchOptions,
};
use etcd_registrar::engine::io::{Object, Resource};
use etcd_registrar::kube::client::{ClientOptions, KubeClient};
use etcd_registrar::kube::wire::{Encoding, Item, Line, read_line};
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
        /// Those of them that it registers with the operator's transactions.
        #[arg(long)]
        fenced: Vec<String>,
        /// Those of the fenced ones whose keys, records and marks, it watches in etcd, as whoever keeps a mirror must.
        #[arg(long)]
        watched: Vec<String>,
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
            fenced,
            watched,
        } => {
            // Ends with the benchmark, whichever way that ends.
            std::thread::spawn(|| {
                let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                std::process::exit(0);
            });
            let following = Following {
                prefix,
                apps: app,
                fenced,
                watched,
            };
            runtime()?.block_on(follow(&args.etcd, kubeconfig, &following))
        }
        Mode::Burst { from, to } => burst(&args.etcd, &from, &to),
    }
}

/// What is to be registered, and how.
struct Following {
    prefix: String,
    apps: Vec<String>,
    fenced: Vec<String>,
    watched: Vec<String>,
}

async fn follow(etcd: &str, kubeconfig: PathBuf, following: &Following) -> Result<()> {
    let prefix = following.prefix.as_str();
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
    let mut fences = HashMap::new();
    for app in &following.fenced {
        let own = format!("{FENCE}{app}/");
        fences.insert(app.as_str(), Fenced::new(&mut kv, &own, lease).await?);
        if following.watched.contains(app) {
            for keys in [own, format!("{prefix}{app}/")] {
                let options = WatchOptions::new().with_prefix().with_fragment();
                let mut events = etcd.watch_client().watch(keys, Some(options)).await?;
                tokio::spawn(async move { while let Ok(Some(_)) = events.message().await {} });
            }
        }
    }
    // A floor that ran before may have left its records.
    let left = kv
        .get(prefix, Some(GetOptions::new().with_prefix()))
        .await?;
    let mut revisions: HashMap<String, i64> = HashMap::new();
    for record in left.kvs() {
        revisions.insert(record.key_str()?.to_owned(), record.mod_revision());
    }
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).await? == 0 {
            return Err("the API server ended the floor's watch".into());
        }
        let Line::Applied(Item::Read(Object::Pod(pod)), _) =
            read_line(Resource::Pods, Encoding::Json, &line)?
        else {
            continue;
        };
        let app = pod.labels.iter().find(|(name, _)| &**name == "app");
        let known = |app: &str| following.apps.iter().any(|known| known == app);
        let Some((_, app)) = app.filter(|(_, app)| known(app)) else {
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
        if let Some(fence) = fences.get_mut(&**app) {
            let known = revisions.get(&key).copied().unwrap_or(0);
            let value = pod.ready.then(|| record(&pod, app, address).into_bytes());
            let change = [(key.clone().into_bytes(), value, lease)];
            let revision = fence.change(&mut kv, &change, known).await?;
            revisions.insert(key, if pod.ready { revision } else { 0 });
        } else if pod.ready {
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
            "fenced" => runtime.block_on(put_all_fenced(&client, &records, &leases))?,
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

/// Where the floor's stand-ins for the operator's own keys are; no part looks there for records.
const FENCE: &str = "/fence/";

/// Transactions of the operator's shape: leader and owner compared, the lane's mark compared and put, and each key
/// compared with the revision that is known of it; all of them read when a comparison fails.
struct Fenced {
    leader: Vec<u8>,
    owner: Vec<u8>,
    seen: Vec<u8>,
    won_at: i64,
    seen_at: i64,
    lease: i64,
}

/// As long as the operator's nonce, and about as long as a UID and as its mark.
const NONCE: &str = "0123456789abcdef";
const OWNER: &str = "8b0a6f2e-5d1c-4c3b-9a7e-000000000000";
const MARK: &str = r#"{"pods":12345678,"nodes":12345678,"registrations":12345678}"#;

/// A key, its value or nothing to delete it, and its lease.
type FencedChange = (Vec<u8>, Option<Vec<u8>>, i64);

impl Fenced {
    async fn new(kv: &mut KvClient, prefix: &str, lease: i64) -> Result<Self> {
        let [leader, owner, seen] =
            ["leader", "owner", "seen/0"].map(|name| format!("{prefix}{name}").into_bytes());
        let mut revisions = Vec::new();
        for (key, value) in [(&leader, NONCE), (&owner, OWNER), (&seen, MARK)] {
            let options = PutOptions::new().with_lease(lease);
            // Each comes into being anew: the leader's create revision is compared.
            kv.delete(key.as_slice(), None).await?;
            let put = kv.put(key.as_slice(), value, Some(options)).await?;
            revisions.push(put.header().map_or(0, |header| header.revision()));
        }
        Ok(Self {
            leader,
            owner,
            seen,
            won_at: revisions.first().copied().unwrap_or(0),
            seen_at: revisions.last().copied().unwrap_or(0),
            lease,
        })
    }

    /// Puts or deletes keys that have this mod revision; gives the new one.
    async fn change(
        &mut self,
        kv: &mut KvClient,
        changes: &[FencedChange],
        known: i64,
    ) -> Result<i64> {
        let (leader, owner, seen) = (&*self.leader, &*self.owner, &*self.seen);
        let mut compares = vec![
            Compare::create_revision(leader, CompareOp::Equal, self.won_at),
            Compare::value(leader, CompareOp::Equal, NONCE),
            Compare::value(owner, CompareOp::Equal, OWNER),
            Compare::mod_revision(seen, CompareOp::Equal, self.seen_at),
        ];
        let on = |lease| Some(PutOptions::new().with_lease(lease));
        let mut then = vec![TxnOp::put(seen, MARK, on(self.lease))];
        let mut otherwise = [leader, owner, seen]
            .map(|key| TxnOp::get(key, None))
            .to_vec();
        for (key, value, lease) in changes {
            let key = key.as_slice();
            compares.push(Compare::mod_revision(key, CompareOp::Equal, known));
            then.push(match value {
                Some(value) => TxnOp::put(key, value.as_slice(), on(*lease)),
                None => TxnOp::delete(key, None),
            });
            otherwise.push(TxnOp::get(key, None));
        }
        let transaction = Txn::new().when(compares).and_then(then).or_else(otherwise);
        let answer = kv.txn(transaction).await?;
        if !answer.succeeded() {
            return Err("a comparison of the floor's failed".into());
        }
        self.seen_at = answer.header().map_or(0, |header| header.revision());
        Ok(self.seen_at)
    }
}

/// As [`put_all`], with the operator's transactions: each lane has a mark of its own, and its next transaction waits for
/// the answer to the one before.
async fn put_all_fenced(
    client: &Client,
    records: &[(Vec<u8>, Vec<u8>)],
    leases: &[i64],
) -> Result<()> {
    let lease_of = |at: usize| leases.get(at / RECORDS_PER_LEASE).copied().unwrap_or(0);
    let mut lanes: [Vec<Vec<_>>; IN_FLIGHT] = Default::default();
    for (chunk, records) in records.chunks(PUTS).enumerate() {
        let changes = records.iter().enumerate().map(|(at, (key, value))| {
            let lease = lease_of(chunk * PUTS + at);
            (key.clone(), Some(value.clone()), lease)
        });
        if let Some(lane) = lanes.get_mut(chunk % IN_FLIGHT) {
            lane.push(changes.collect::<Vec<_>>());
        }
    }
    let lanes = lanes
        .into_iter()
        .enumerate()
        .map(|(at, chunks)| async move {
            let mut kv = client.kv_client();
            let lane = format!("{FENCE}{at}/");
            let mut fence = Fenced::new(&mut kv, &lane, lease_of(0)).await?;
            for changes in chunks {
                fence.change(&mut kv, &changes, 0).await?;
            }
            Ok::<_, crate::Error>(())
        });
    futures::future::try_join_all(lanes).await?;
    Ok(())
}

/// The floor, run from the benchmark. Dropping it ends it.
pub(crate) struct Floor {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Floor {
    /// Follows the pods whose label `app` is one of these, and registers those that are `fenced` with the operator's
    /// transactions; it watches the keys of those that are `watched`.
    pub(crate) fn follow(
        etcd: &str,
        kubeconfig: &Path,
        prefix: &str,
        apps: &[&str],
        fenced: &[&str],
        watched: &str,
    ) -> Result<Self> {
        let mut args = vec!["follow".to_owned(), "--kubeconfig".to_owned()];
        args.push(kubeconfig.display().to_string());
        args.extend(["--prefix".to_owned(), prefix.to_owned()]);
        for app in apps {
            args.extend(["--app".to_owned(), (*app).to_owned()]);
        }
        for app in fenced {
            args.extend(["--fenced".to_owned(), (*app).to_owned()]);
        }
        args.extend(["--watched".to_owned(), watched.to_owned()]);
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
