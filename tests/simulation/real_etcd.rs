//! The same seeded operations on the model of etcd and on a real one, which must answer alike.
//!
//! Takes nothing, fails where the model is not what etcd is: else the simulation would prove something about
//! another world. Must never ask what the engine does not ask, or leave out what it asks.

use std::time::{Duration, Instant};

use etcd_client::{
    AlarmAction, AlarmType, Client, Error, EventType, WatchOptions, WatchResponse, WatchStream,
};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use etcd_registrar::model::etcd::{
    Answer, Compare, Event, Key, KeyValue, LeaseId, Op, Range, Request, Revision, Txn,
};
use etcd_registrar::registry::requests::execute;

use crate::model_etcd::{Author, Etcd};
use crate::world::key;

/// What one request may take on a busy machine.
const SOON: Duration = Duration::from_secs(10);
const SEEDS: u64 = 12;
const OPERATIONS: usize = 150;

/// Both of them, and what there is to choose from.
struct Pair {
    rng: StdRng,
    client: Client,
    model: Etcd,
    began: Instant,
    prefix: String,
    keys: Vec<Key>,
    leases: Vec<LeaseId>,
}

impl Pair {
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(0)
    }

    fn one<T: Clone>(&mut self, from: &[T]) -> T {
        from.choose(&mut self.rng).expect("not empty").clone()
    }

    fn key(&mut self) -> Key {
        let keys = self.keys.clone();
        self.one(&keys)
    }

    /// A lease, mostly one that was granted; or none.
    fn lease(&mut self) -> LeaseId {
        let leases = self.leases.clone();
        let granted: Vec<LeaseId> = leases
            .iter()
            .copied()
            .filter(|lease| self.model.lives(*lease))
            .collect();
        match self.rng.random_range(0..10) {
            0 => 0,
            1 => self.one(&leases),
            _ if granted.is_empty() => 0,
            _ => self.one(&granted),
        }
    }

    fn range(&mut self) -> Range {
        let (a, b) = (self.key(), self.key());
        match self.rng.random_range(0..3) {
            0 => Range::prefix(self.prefix.as_bytes()),
            1 => Range::prefix(&a),
            _ => Range {
                start: a.clone().min(b.clone()),
                end: a.max(b),
            },
        }
    }

    /// One that holds about as often as not.
    fn compare(&mut self) -> Compare {
        let key = self.key();
        let kv = self.model.get(&key).cloned();
        let right = self.rng.random_bool(0.85);
        let off = |revision: Revision| if right { revision } else { revision + 1 };
        match self.rng.random_range(0..5) {
            0 => Compare::CreateRevision(key, off(kv.map_or(0, |kv| kv.create_revision))),
            1 | 2 => Compare::ModRevision(key, off(kv.map_or(0, |kv| kv.mod_revision))),
            3 => {
                let value = kv
                    .filter(|_| right)
                    .map_or("none".as_bytes().into(), |kv| kv.value);
                Compare::Value(key, value)
            }
            _ => {
                let range = self.range();
                if right && range.start < range.end && !self.model.range(&range).is_empty() {
                    // Mostly something stands.
                    return Compare::ModRevision(key, kv.map_or(0, |kv| kv.mod_revision));
                }
                if range.start >= range.end {
                    return Compare::Nothing(Range::prefix(&key));
                }
                Compare::Nothing(range)
            }
        }
    }

    fn branch(&mut self) -> Vec<Op> {
        let mut changed: Vec<Key> = Vec::new();
        let mut ops = Vec::new();
        for _ in 0..self.rng.random_range(0..5) {
            let key = self.key();
            let kind = self.rng.random_range(0..8);
            if kind < 6 && changed.contains(&key) {
                continue;
            }
            ops.push(match kind {
                0..4 => {
                    changed.push(key.clone());
                    let value = format!("{}", self.rng.random_range(0..4));
                    Op::Put(key, value.as_bytes().into(), self.lease())
                }
                4 | 5 => {
                    changed.push(key.clone());
                    Op::Delete(key)
                }
                6 => Op::Get(key),
                _ => Op::GetRange(Range::prefix(self.prefix.as_bytes())),
            });
        }
        ops
    }

    fn request(&mut self) -> Request {
        let leases = self.leases.clone();
        match self.rng.random_range(0..20) {
            // Also twice.
            0..3 => Request::Grant(self.one(&leases), 600),
            3 => Request::Revoke(self.one(&leases)),
            4 | 5 => Request::LeaseKeys(self.one(&leases)),
            _ => {
                let compares = (0..self.rng.random_range(0..4))
                    .map(|_| self.compare())
                    .collect();
                Request::Txn(Txn {
                    compares,
                    then: self.branch(),
                    otherwise: self.branch(),
                })
            }
        }
    }

    async fn same(&mut self, request: Request) {
        let real = execute(&self.client, request.clone(), SOON).await;
        let now = self.now();
        let model = self.model.request(&request, now, Author::Hand);
        match (real, model) {
            (
                Ok(Answer::LeaseKeys(real_ttl, mut real)),
                Ok(Answer::LeaseKeys(model_ttl, mut model)),
            ) => {
                real.sort();
                model.sort();
                assert_eq!(real, model, "{request:?}");
                assert!(
                    (real_ttl - model_ttl).abs() <= 5,
                    "{request:?}: {real_ttl} s are left, and of the model's {model_ttl}"
                );
            }
            (Ok(real), Ok(model)) => assert_eq!(real, model, "{request:?}"),
            (Err(real), Err(model)) => {
                assert_eq!(real.kind, model.kind, "{request:?}: {}", real.message);
            }
            (real, model) => panic!("{request:?}: {real:?}, and the model {model:?}"),
        }
    }

    async fn keep_alive(&mut self) {
        let leases = self.leases.clone();
        let id = self.one(&leases);
        let mut client = self.client.lease_client();
        let kept = match client.keep_alive(id).await {
            Ok(_) => true,
            // What the client makes of TTL 0.
            Err(Error::LeaseKeepAliveError(_)) => false,
            Err(other) => panic!("{other}"),
        };
        let now = self.now();
        assert_eq!(kept, self.model.keep_alive(id, now), "lease {id:x}");
    }

    async fn watch(&self, from: Revision) -> WatchStream {
        let options = WatchOptions::new()
            .with_prefix()
            .with_start_revision(from)
            .with_prev_key();
        let mut client = self.client.watch_client();
        client
            .watch(self.prefix.as_bytes(), Some(options))
            .await
            .expect("a watch")
    }

    /// What a watch from a revision delivers until `newest`.
    async fn watched_alike(&self, from: Revision) {
        let newest = self.model.revision;
        let range = Range::prefix(self.prefix.as_bytes());
        let wanted = self.model.events(&range, from - 1, newest);
        let mut stream = self.watch(from).await;
        let mut found: Vec<Event> = Vec::new();
        while found.len() < wanted.len() {
            let response = next(&mut stream).await;
            assert!(!response.canceled(), "{}", response.cancel_reason());
            for event in response.events() {
                let kv = event.kv().expect("an event has a key");
                found.push(match event.event_type() {
                    EventType::Put => Event::Put(KeyValue {
                        key: kv.key().into(),
                        value: kv.value().into(),
                        lease: kv.lease(),
                        create_revision: kv.create_revision(),
                        mod_revision: kv.mod_revision(),
                    }),
                    EventType::Delete => Event::Delete(kv.key().into(), kv.mod_revision()),
                });
            }
        }
        // The keys of a lease that ends go in one revision, in an order that etcd does not promise.
        let place = |event: &Event| match event {
            Event::Put(kv) => (kv.mod_revision, kv.key.clone()),
            Event::Delete(key, at) => (*at, key.clone()),
        };
        let mut wanted = wanted;
        wanted.sort_by_key(place);
        found.sort_by_key(place);
        assert_eq!(found, wanted, "a watch from {from}");
    }

    /// The history goes, and with it what a watch from before would have to deliver.
    async fn compacted_alike(&mut self) {
        let newest = self.model.revision;
        if newest <= self.model.compacted + 2 {
            return;
        }
        let at = self.rng.random_range(self.model.compacted + 1..newest);
        let mut client = self.client.kv_client();
        client.compact(at, None).await.expect("a compaction");
        self.model.compact(at);
        for from in [at - 1, at + 1] {
            if from < 1 {
                continue;
            }
            if self.model.is_gone(from) {
                let mut stream = self.watch(from).await;
                let response = next(&mut stream).await;
                let canceled = if response.canceled() {
                    response
                } else {
                    next(&mut stream).await
                };
                assert!(canceled.canceled() && canceled.compact_revision() == at);
            } else {
                self.watched_alike(from).await;
            }
        }
    }

    async fn alarm(&mut self, full: bool) {
        let action = if full {
            AlarmAction::Activate
        } else {
            AlarmAction::Deactivate
        };
        let mut client = self.client.maintenance_client();
        client
            .alarm(action, AlarmType::Nospace, None)
            .await
            .expect("an alarm");
        self.model.full = full;
    }
}

async fn next(stream: &mut WatchStream) -> WatchResponse {
    let message = tokio::time::timeout(SOON, stream.message()).await;
    let response = message.expect("an event in time").expect("a response");
    response.expect("the stream goes on")
}

#[tokio::test]
async fn the_model_of_etcd_answers_as_etcd_does() {
    let start = || testbed::Etcd::builder("model").unsafe_no_fsync().start();
    let etcd = tokio::task::spawn_blocking(start)
        .await
        .expect("no panic")
        .expect("an etcd");
    for seed in 0..SEEDS {
        eprintln!("seed {seed}");
        let client = Client::connect(etcd.endpoints(), None)
            .await
            .expect("a client");
        let prefix = format!("/model/{seed}/");
        let mut pair = Pair {
            rng: StdRng::seed_from_u64(seed),
            model: Etcd::new(),
            client,
            began: Instant::now(),
            keys: ["a", "a/b", "ab", "b", "c"]
                .iter()
                .map(|name| key(&format!("{prefix}{name}")))
                .collect(),
            leases: (1..=4)
                .map(|n| i64::try_from(seed * 8 + n).expect("a small number"))
                .collect(),
            prefix,
        };
        let read = Request::Txn(Txn {
            then: vec![Op::Get(pair.key())],
            ..Txn::default()
        });
        let now = execute(&pair.client, read, SOON).await;
        let Ok(Answer::Txn { revision, .. }) = now else {
            panic!("{now:?}");
        };
        pair.model.revision = revision;
        pair.model.compact(revision);
        let from = revision + 1;
        for _ in 0..OPERATIONS {
            match pair.rng.random_range(0..40) {
                0 => pair.keep_alive().await,
                1 if pair.model.full => pair.alarm(false).await,
                1 if pair.rng.random_bool(0.3) => pair.alarm(true).await,
                _ => {
                    let request = pair.request();
                    pair.same(request).await;
                }
            }
        }
        if pair.model.full {
            pair.alarm(false).await;
        }
        pair.watched_alike(from).await;
        pair.compacted_alike().await;
    }
}
