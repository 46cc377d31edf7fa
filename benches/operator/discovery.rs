//! The discovery library with one large service: its first list, its changes, and what it costs.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use etcd_client::{Client, Txn, TxnOp};
use etcd_registrar::discovery::{Changes, Discovery, Format, Service, Settings};
use etcd_registrar::format::Place;
use etcd_registrar::model::endpoint::{Endpoint, Protocol, Target};
use serde_json::json;
use testbed::Etcd;

use crate::report::Row;
use crate::statistics::{Times, milliseconds};
use crate::{Measured, Result, Sizes};

/// Puts in a transaction: etcd takes 128 operations.
const AT_ONCE: usize = 100;

/// Changes that are made one at a time.
const SINGLE: usize = 500;

/// First lists, each over a connection of its own.
const LISTS: usize = 7;

/// A record as the operator writes it.
fn record(number: usize, weight: u32) -> Result<(String, Vec<u8>)> {
    let (high, low) = (u8::try_from(number >> 8)?, u8::try_from(number & 0xff)?);
    let endpoint = Endpoint {
        target: Target {
            ip: [10, 1, high, low].into(),
            port: 8080,
            protocol: Protocol::Tcp,
        },
        port_name: "http".into(),
        scheme: "http".into(),
        cluster: "east".into(),
        namespace: "shop".into(),
        service: "web".into(),
        pod: format!("web-7d4b9c6f5d-{number:05}"),
        uid: format!("0b9e1c1e-4a52-4f0a-9c0e-{number:012}"),
        node: format!("node-{}", number % 100),
        zone: "eu-a".into(),
        weight,
        metadata: vec![("version".into(), "v1".into())],
    };
    let place = Place {
        prefix: Format::Json.default_prefix(),
    };
    let record = Format::Json.records(&place, &[endpoint]).pop();
    let record = record.ok_or("there is no record")?;
    Ok((record.key, record.value))
}

/// Puts all records.
async fn put_all(client: &mut Client, count: usize, weight: u32) -> Result<()> {
    let numbers: Vec<usize> = (0..count).collect();
    for numbers in numbers.chunks(AT_ONCE) {
        let mut puts = Vec::new();
        for number in numbers {
            let (key, value) = record(*number, weight)?;
            puts.push(TxnOp::put(key, value, None));
        }
        client.txn(Txn::new().and_then(puts)).await?;
    }
    Ok(())
}

async fn changes(changes: &mut Changes, count: usize) -> Result<()> {
    for _ in 0..count {
        let next = tokio::time::timeout(Duration::from_secs(60), changes.next()).await?;
        next.ok_or("the changes ended")?;
    }
    Ok(())
}

pub(crate) fn measure(sizes: &Sizes) -> Measured {
    let etcd = Etcd::builder("discovery").start()?;
    let count = sizes.endpoints;
    let (empty, full) = {
        let empty = memory(&etcd)?;
        crate::runtime()?.block_on(async {
            let mut client = Client::connect(etcd.endpoints(), None).await?;
            put_all(&mut client, count, 100).await
        })?;
        (empty, memory(&etcd)?)
    };
    let (lists, single, snapshots, all) = crate::runtime()?.block_on(times(&etcd, count))?;
    let each = (full.saturating_sub(empty)) as f64 / count as f64;
    let rows = vec![
        Row::new(
            format!(
                "discovery of {count} endpoints: from the connection to the list, median of {LISTS}"
            ),
            format!("{:.0} ms", lists.median()),
        ),
        Row::new(
            format!(
                "discovery of {count} endpoints: from a put to its change, p50 and p99 of {SINGLE}"
            ),
            format!(
                "{:.2} and {:.2} ms",
                single.median(),
                single.percentile(0.99)
            ),
        ),
        Row::new(
            format!("discovery of {count} endpoints: the snapshot after a change, p50"),
            format!("{:.2} ms", snapshots.median()),
        ),
        Row::new(
            format!(
                "discovery of {count} endpoints: from the first put of {count} to the last change, and for each"
            ),
            format!("{all:.0} ms, {:.0} us", all * 1000.0 / count as f64),
        ),
        Row::new(
            format!("discovery of {count} endpoints: memory of `discover --watch`"),
            format!("{:.1} MB, {each:.0} bytes for each", full as f64 / 1e6),
        ),
    ];
    let measured = json!({
        "endpoints": count, "list_ms": lists.values(), "change_ms": single.values(),
        "snapshot_ms": snapshots.values(), "all_changes_ms": all, "empty_bytes": empty, "full_bytes": full,
    });
    Ok((rows, measured))
}

async fn times(etcd: &Etcd, count: usize) -> Result<(Times, Times, Times, f64)> {
    let settings = || Settings {
        endpoints: etcd.endpoints().to_vec(),
        ..Settings::default()
    };
    let mut client = Client::connect(etcd.endpoints(), None).await?;
    let mut lists = Times::default();
    let mut last: Option<Service> = None;
    for _ in 0..LISTS {
        let began = Instant::now();
        let discovery = Discovery::connect(settings()).await?;
        let list = discovery.service("shop", "web")?;
        list.ready().await;
        lists.push(milliseconds(began, Instant::now()));
        if list.snapshot().len() != count {
            return Err("the list is not whole".into());
        }
        last = Some(list);
    }
    let list = last.ok_or("there is no list")?;
    let mut stream = list.changes();
    changes(&mut stream, count).await?;
    let (mut single, mut snapshots) = (Times::default(), Times::default());
    for at in 0..SINGLE {
        let (key, value) = record(at % count, 7)?;
        let began = Instant::now();
        let put = client.put(key, value, None);
        let (put, change) = tokio::join!(put, changes(&mut stream, 1));
        single.push(milliseconds(began, Instant::now()));
        put?;
        change?;
        let began = Instant::now();
        let snapshot = list.snapshot();
        snapshots.push(milliseconds(began, Instant::now()));
        drop(snapshot);
        // The same change twice is none.
        let (key, value) = record(at % count, 100)?;
        client.put(key, value, None).await?;
        changes(&mut stream, 1).await?;
    }
    let began = Instant::now();
    let (put, seen) = tokio::join!(put_all(&mut client, count, 9), changes(&mut stream, count));
    put?;
    seen?;
    Ok((
        lists,
        single,
        snapshots,
        milliseconds(began, Instant::now()),
    ))
}

/// Ends the process with the value.
struct Reader(Child);

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Resident memory (bytes) of a program that follows the service, once it has not grown for two seconds.
fn memory(etcd: &Etcd) -> Result<u64> {
    let reader = Command::new(testbed::operator_binary()?)
        .args([
            "discover",
            "web",
            "-n",
            "shop",
            "--watch",
            "-o",
            "addresses",
        ])
        .args(["--etcd-endpoints", &etcd.endpoints_arg()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let reader = Reader(reader);
    let status = format!("/proc/{}/status", reader.0.id());
    let read = || -> Result<u64> {
        let text = std::fs::read_to_string(&status)?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = line
            .and_then(|line| line.split_whitespace().next())
            .ok_or("there is no VmRSS")?
            .parse()?;
        Ok(kib * 1024)
    };
    let mut most = 0;
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(100));
        let now = read()?;
        if now > most {
            most = now;
            since = Instant::now();
        }
    }
    read()
}
