//! The etcd side against a real etcd: requests, mirror, keeper, connection, purge.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "clippy allows these in tests, not in the helpers next to them"
)]

#[path = "own_etcd/mod.rs"]
mod own_etcd;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use etcd_client::{Client, CompactionOptions, ConnectOptions, Permission, PermissionType};
use etcd_registrar::engine::io::Input;
use etcd_registrar::model::etcd::{
    Answer, Compare, Event, Failure, FailureKind, KeyValue, News, Op, Range, Refusal, Request, Txn,
};
use etcd_registrar::registry::connection::{ConnectError, Connection, Settings, State};
use etcd_registrar::registry::keeper::{self, Names};
use etcd_registrar::registry::mirror::{self, Pace};
use etcd_registrar::registry::purge::{PurgeError, Report, purge};
use etcd_registrar::registry::requests::{DEADLINE, Requests, execute};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use own_etcd::Etcd;

/// What anything here may take at most, on a busy machine.
const SOON: Duration = Duration::from_secs(10);

/// In what time a member that does not answer is to be noticed: a third of the shortest TTL of 5 s, and something for
/// a busy machine.
const NOTICED: Duration = Duration::from_millis(2_500);

impl Etcd {
    fn url(&self) -> String {
        self.0.endpoints()[0].clone()
    }

    /// What an operator needs to reach it.
    fn settings(&self) -> Settings {
        let client = self.0.client_cert();
        Settings {
            endpoints: self.0.endpoints().to_vec(),
            cacert: self.0.ca_cert().map(Into::into),
            cert: client.map(|files| files.cert.clone()),
            key: client.map(|files| files.key.clone()),
            user: self.0.user().map(Into::into),
            password_file: self.0.password_file().map(Into::into),
        }
    }
}

/// A key or a value.
fn bytes<'a, T: From<&'a [u8]>>(text: &'a str) -> T {
    text.as_bytes().into()
}

fn prefix(text: &str) -> Range {
    Range::prefix(text.as_bytes())
}

async fn ask(client: &Client, request: Request) -> Result<Answer, Failure> {
    execute(client, request, DEADLINE).await
}

async fn txn(client: &Client, compares: Vec<Compare>, then: Vec<Op>, otherwise: Vec<Op>) -> Answer {
    let txn = Txn {
        compares,
        then,
        otherwise,
    };
    ask(client, Request::Txn(txn)).await.unwrap()
}

async fn refusal(client: &Client, request: Request) -> FailureKind {
    ask(client, request).await.unwrap_err().kind
}

async fn next(inputs: &mut mpsc::Receiver<Input>) -> Input {
    timeout(SOON, inputs.recv()).await.unwrap().unwrap()
}

fn text(kv: &KeyValue) -> String {
    let part = String::from_utf8_lossy;
    format!("{}={}", part(&kv.key), part(&kv.value))
}

/// The keys and values of the snapshot that comes next.
async fn snapshot(inputs: &mut mpsc::Receiver<Input>) -> Vec<String> {
    match news(inputs).await {
        Input::Etcd(News::Snapshot { records, .. }) => records.iter().map(text).collect(),
        other => panic!("{other:?}"),
    }
}

/// The next input that is no progress: that comes whenever etcd is quiet.
async fn news(inputs: &mut mpsc::Receiver<Input>) -> Input {
    loop {
        match next(inputs).await {
            Input::Etcd(News::Progress(_)) => {}
            other => return other,
        }
    }
}

#[tokio::test]
async fn requests_and_their_refusals() {
    let etcd = Etcd::start().await;
    let client = etcd.client().await;

    // Nothing in a range, also in an empty one.
    let nothing = || vec![Compare::Nothing(prefix("/a/"))];
    let put = || vec![Op::Put(bytes("/a/1"), bytes("v"), 0)];
    let read = || {
        vec![
            Op::Get(bytes("/a/1")),
            Op::Get(bytes("/none")),
            Op::GetRange(prefix("/a/")),
        ]
    };
    let Answer::Txn {
        succeeded: true,
        revision,
        reads,
    } = txn(&client, nothing(), put(), read()).await
    else {
        panic!("the range is empty");
    };
    assert_eq!(reads, [vec![]]);
    let record = KeyValue {
        key: bytes("/a/1"),
        value: bytes("v"),
        lease: 0,
        create_revision: revision,
        mod_revision: revision,
    };
    assert_eq!(
        txn(&client, nothing(), put(), read()).await,
        Answer::Txn {
            succeeded: false,
            revision,
            reads: vec![vec![record.clone()], vec![], vec![record.clone()]],
        }
    );

    // All comparisons, of a key that is there and of one that is not.
    for (compare, expected) in [
        (Compare::CreateRevision(bytes("/a/1"), revision), true),
        (Compare::CreateRevision(bytes("/a/1"), 0), false),
        (Compare::CreateRevision(bytes("/none"), 0), true),
        (Compare::ModRevision(bytes("/a/1"), revision), true),
        (Compare::ModRevision(bytes("/none"), 0), true),
        (Compare::Value(bytes("/a/1"), bytes("v")), true),
        (Compare::Value(bytes("/a/1"), bytes("w")), false),
        (Compare::Value(bytes("/none"), bytes("")), false),
        (Compare::Nothing(prefix("/none")), true),
        (Compare::Nothing(prefix("/a/1")), false),
    ] {
        let answer = txn(&client, vec![compare.clone()], vec![], vec![]).await;
        let Answer::Txn { succeeded, .. } = answer else {
            panic!("{answer:?}");
        };
        assert_eq!(succeeded, expected, "{compare:?}");
    }

    // Leases.
    let id = 0x1234;
    assert_eq!(
        ask(&client, Request::Grant(id, 60)).await,
        Ok(Answer::Granted)
    );
    assert_eq!(
        refusal(&client, Request::Grant(id, 60)).await,
        FailureKind::Refused(Refusal::LeaseExists)
    );
    txn(
        &client,
        vec![],
        vec![Op::Put(bytes("/a/2"), bytes("v"), id)],
        vec![],
    )
    .await;
    assert_eq!(
        ask(&client, Request::LeaseKeys(id)).await,
        Ok(Answer::LeaseKeys(59, vec![bytes("/a/2")]))
    );
    assert_eq!(ask(&client, Request::Revoke(id)).await, Ok(Answer::Revoked));
    assert_eq!(
        refusal(&client, Request::Revoke(id)).await,
        FailureKind::Refused(Refusal::LeaseNotFound)
    );
    assert_eq!(
        ask(&client, Request::LeaseKeys(id)).await,
        Ok(Answer::LeaseKeys(-1, vec![]))
    );

    // Requests that are wrong.
    let of = |then: Vec<Op>| {
        Request::Txn(Txn {
            then,
            ..Txn::default()
        })
    };
    let key = |n: usize| bytes(&format!("/b/{n}"));
    for (request, expected) in [
        (
            of(vec![Op::Put(key(1), bytes(""), id)]),
            Refusal::LeaseNotFound,
        ),
        (
            of((0..129).map(|n| Op::Put(key(n), bytes(""), 0)).collect()),
            Refusal::TooLarge,
        ),
        (
            of(vec![Op::Put(key(1), vec![b'x'; 2_000_000].into(), 0)]),
            Refusal::TooLarge,
        ),
        (
            of(vec![Op::Put(key(1), vec![b'x'; 8_000_000].into(), 0)]),
            Refusal::TooLarge,
        ),
        (
            of(vec![Op::Put(key(1), bytes(""), 0), Op::Delete(key(1))]),
            Refusal::Invalid,
        ),
        (of(vec![Op::Delete(bytes(""))]), Refusal::Invalid),
        (Request::Grant(id, i64::MAX), Refusal::Invalid),
    ] {
        assert_eq!(
            refusal(&client, request).await,
            FailureKind::Refused(expected)
        );
    }
}

#[tokio::test]
async fn every_request_is_answered_once() {
    let etcd = Etcd::start().await;
    let connection = Connection::connect(etcd.settings()).await.unwrap();
    let (inputs, mut answers) = mpsc::channel(8);
    let requests = Requests::new(connection.clone(), Duration::from_millis(600), inputs);
    let read = || {
        Request::Txn(Txn {
            then: vec![Op::Get(bytes("/a"))],
            ..Txn::default()
        })
    };
    requests.ask(1, read());
    assert!(matches!(
        next(&mut answers).await,
        Input::Answer(1, Ok(Answer::Txn { .. }))
    ));
    etcd.does(testbed::Etcd::kill).await;
    for number in 2..5 {
        requests.ask(number, read());
    }
    let mut numbers = Vec::new();
    for _ in 2..5 {
        match next(&mut answers).await {
            Input::Answer(number, Err(failure)) => {
                assert_eq!(failure.kind, FailureKind::Unknown);
                numbers.push(number);
            }
            other => panic!("{other:?}"),
        }
    }
    numbers.sort_unstable();
    assert_eq!(numbers, [2, 3, 4]);
    etcd.does(testbed::Etcd::start).await;
    timeout(SOON, async {
        let mut number = 5;
        loop {
            requests.ask(number, read());
            if matches!(next(&mut answers).await, Input::Answer(n, Ok(_)) if n == number) {
                return;
            }
            number += 1;
        }
    })
    .await
    .unwrap();
    assert!(answers.try_recv().is_err());
}

/// Starts a mirror; gives its commands and inputs.
async fn mirror_of(
    etcd: &Etcd,
    pace: Pace,
) -> (mpsc::Sender<mirror::Command>, mpsc::Receiver<Input>) {
    let connection = Connection::connect(etcd.settings()).await.unwrap();
    let (commands, receiver) = mpsc::channel(8);
    let (sender, inputs) = mpsc::channel(8);
    tokio::spawn(mirror::run(connection, receiver, sender, pace));
    (commands, inputs)
}

fn follow(ranges: &[&str]) -> mirror::Command {
    mirror::Command::Follow(ranges.iter().map(|range| prefix(range)).collect())
}

#[tokio::test]
async fn snapshot_watch_and_progress() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    for n in 0..25 {
        client.put(format!("/a/{n:02}"), "v", None).await.unwrap();
    }
    let pace = Pace {
        page: 10,
        audit: Duration::from_millis(1_500),
        ..Pace::default()
    };
    let (commands, mut inputs) = mirror_of(&etcd, pace).await;
    commands.send(follow(&["/a/"])).await.unwrap();
    let Input::Etcd(News::Snapshot {
        range,
        revision,
        records,
    }) = next(&mut inputs).await
    else {
        panic!("a snapshot comes first");
    };
    assert_eq!(range, prefix("/a/"));
    let keys: Vec<_> = records
        .iter()
        .map(|kv| String::from_utf8_lossy(&kv.key).into_owned())
        .collect();
    assert_eq!(
        keys,
        (0..25).map(|n| format!("/a/{n:02}")).collect::<Vec<_>>()
    );

    // On a quiet etcd, at the snapshot's own revision.
    commands.send(mirror::Command::AskProgress).await.unwrap();
    assert_eq!(
        next(&mut inputs).await,
        Input::Etcd(News::Progress(revision))
    );

    // A second range does not disturb the first; all events come before the progress.
    commands.send(follow(&["/a/", "/b/"])).await.unwrap();
    client.put("/a/new", "v", None).await.unwrap();
    client.delete("/a/00", None).await.unwrap();
    let last = client
        .put("/b/1", "v", None)
        .await
        .unwrap()
        .header()
        .unwrap()
        .revision();
    commands.send(mirror::Command::AskProgress).await.unwrap();
    let (mut events, mut seen_b) = (Vec::new(), 0);
    timeout(SOON, async {
        loop {
            match next(&mut inputs).await {
                Input::Etcd(News::Events {
                    range, events: new, ..
                }) if range == prefix("/a/") => events.extend(new),
                Input::Etcd(News::Events { events: new, .. }) => seen_b += new.len(),
                Input::Etcd(News::Snapshot { range, records, .. }) => {
                    assert_eq!(range, prefix("/b/"));
                    seen_b += records.len();
                }
                Input::Etcd(News::Progress(revision)) if revision >= last => return,
                Input::Etcd(News::Progress(_)) => {
                    commands.send(mirror::Command::AskProgress).await.unwrap()
                }
                other => panic!("{other:?}"),
            }
        }
    })
    .await
    .unwrap();
    assert!(
        matches!(&events[..], [Event::Put(put), Event::Delete(key, revision)]
            if *put.key == *b"/a/new" && **key == *b"/a/00" && *revision == last - 1)
    );
    assert_eq!(seen_b, 1);

    // The safety net names exactly what is there.
    let mut audited = Vec::new();
    while audited.len() < 2 {
        if let Input::Etcd(News::KeysSeen { range, keys, .. }) = news(&mut inputs).await {
            assert!(keys.iter().all(|(key, _)| range.contains(key)));
            audited.push((range, keys.len()));
        }
    }
    audited.sort_unstable();
    assert_eq!(audited, [(prefix("/a/"), 25), (prefix("/b/"), 1)]);
}

#[tokio::test]
async fn many_ranges_over_one_stream() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let (commands, mut inputs) = mirror_of(&etcd, Pace::default()).await;
    let ranges: Vec<_> = (0..1_000).map(|n| prefix(&format!("/s/{n:04}/"))).collect();
    client.put("/s/0007/x", "v", None).await.unwrap();
    commands
        .send(mirror::Command::Follow(ranges.clone()))
        .await
        .unwrap();
    let (mut snapshots, mut records_seen) = (0, 0);
    while snapshots < ranges.len() {
        match next(&mut inputs).await {
            Input::Etcd(News::Snapshot { records, .. }) => {
                snapshots += 1;
                records_seen += records.len();
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(records_seen, 1);
    client.put("/s/0999/x", "v", None).await.unwrap();
    assert!(matches!(
        news(&mut inputs).await,
        Input::Etcd(News::Events { range, .. }) if range == ranges[999]
    ));
}

#[tokio::test]
async fn a_restarted_etcd_is_read_anew() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    client.put("/a/1", "v", None).await.unwrap();
    let (commands, mut inputs) = mirror_of(&etcd, Pace::default()).await;
    commands.send(follow(&["/a/"])).await.unwrap();
    assert!(matches!(
        next(&mut inputs).await,
        Input::Etcd(News::Snapshot { .. })
    ));
    etcd.does(testbed::Etcd::kill).await;
    assert!(matches!(
        news(&mut inputs).await,
        Input::Etcd(News::Broken(_))
    ));
    etcd.does(testbed::Etcd::start).await;
    let Input::Etcd(News::Snapshot { records, .. }) = news(&mut inputs).await else {
        panic!("a snapshot follows");
    };
    assert_eq!(records.len(), 1);
    // And it is watched.
    client.put("/a/2", "v", None).await.unwrap();
    assert!(matches!(
        news(&mut inputs).await,
        Input::Etcd(News::Events { .. })
    ));
}

#[tokio::test]
async fn a_frozen_etcd_is_noticed_and_read_anew() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    client.put("/a/1", "v", None).await.unwrap();
    let (commands, mut inputs) = mirror_of(&etcd, Pace::default()).await;
    commands.send(follow(&["/a/"])).await.unwrap();
    assert!(matches!(
        next(&mut inputs).await,
        Input::Etcd(News::Snapshot { .. })
    ));
    etcd.does(testbed::Etcd::freeze).await;
    let since = Instant::now();
    assert!(matches!(
        news(&mut inputs).await,
        Input::Etcd(News::Broken(_))
    ));
    assert!(since.elapsed() < NOTICED, "{:?}", since.elapsed());
    etcd.does(testbed::Etcd::thaw).await;
    // Nothing is taken from before: it is read anew, and watched again.
    assert_eq!(snapshot(&mut inputs).await, ["/a/1=v"]);
    client.put("/a/2", "v", None).await.unwrap();
    assert!(matches!(
        news(&mut inputs).await,
        Input::Etcd(News::Events { .. })
    ));
}

#[tokio::test]
async fn a_compacted_etcd_is_read_and_watched() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    for key in ["/a/1", "/a/2"] {
        for n in 0..5 {
            client.put(key, n.to_string(), None).await.unwrap();
        }
    }
    let deleted = client.delete("/a/2", None).await.unwrap();
    // All that is compacted was before the mirror came, or happens while it cannot see it.
    let compact = async |client: &mut Client, revision| {
        let physical = Some(CompactionOptions::new().with_physical());
        client.compact(revision, physical).await.unwrap();
    };
    compact(&mut client, deleted.header().unwrap().revision()).await;
    let (commands, mut inputs) = mirror_of(&etcd, Pace::default()).await;
    commands.send(follow(&["/a/"])).await.unwrap();
    assert_eq!(snapshot(&mut inputs).await, ["/a/1=4"]);
    etcd.does(testbed::Etcd::kill).await;
    assert!(matches!(
        news(&mut inputs).await,
        Input::Etcd(News::Broken(_))
    ));
    etcd.does(testbed::Etcd::start).await;
    let put = client.put("/a/3", "new", None).await.unwrap();
    let gone = client.delete("/a/1", None).await.unwrap();
    compact(&mut client, gone.header().unwrap().revision()).await;
    // The mirror may have been faster than those: then it is told by events, and only once.
    let mut seen = snapshot(&mut inputs).await;
    let mut last = 0;
    while last < gone.header().unwrap().revision() && seen != ["/a/3=new"] {
        match news(&mut inputs).await {
            Input::Etcd(News::Events {
                events, revision, ..
            }) => {
                last = revision;
                for event in events {
                    match event {
                        Event::Put(kv) => {
                            assert_eq!(kv.mod_revision, put.header().unwrap().revision());
                            seen.push(text(&kv));
                        }
                        Event::Delete(key, _) => {
                            let name = format!("{}=", String::from_utf8_lossy(&key));
                            seen.retain(|known| !known.starts_with(&name));
                        }
                    }
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, ["/a/3=new"]);
}

#[tokio::test]
async fn the_first_endpoint_that_answers_is_used() {
    let etcd = Etcd::start().await;
    // Nobody listens there, and there somebody who never answers.
    let deaf = TcpListener::bind("127.0.0.1:0").unwrap();
    let settings = Settings {
        endpoints: vec![
            format!("http://127.0.0.1:{}", testbed::free_port().unwrap()),
            format!("http://{}", deaf.local_addr().unwrap()),
            etcd.url(),
        ],
        ..Settings::default()
    };
    let connection = Connection::connect(settings).await.unwrap();
    let session = timeout(Duration::from_millis(900), connection.ready())
        .await
        .unwrap();
    assert_eq!(*session.endpoint, *etcd.url());
    // An outdated failure does nothing, a new one makes a new session.
    connection.failed(session.generation + 5, "x");
    connection.failed(session.generation, "the test says so");
    let session = timeout(SOON, connection.ready_after(session.generation))
        .await
        .unwrap();
    assert_eq!(session.generation, 2);
}

async fn down(connection: &Connection) -> String {
    let mut state = connection.state();
    timeout(SOON, async {
        loop {
            if let State::Down(why) = &*state.borrow_and_update() {
                return why.to_string();
            }
            state.changed().await.unwrap();
        }
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn what_is_wrong_with_a_connection_is_said() {
    let url = format!("http://127.0.0.1:{}", testbed::free_port().unwrap());
    let connection = Connection::connect(Settings {
        endpoints: vec![url.clone()],
        ..Settings::default()
    })
    .await
    .unwrap();
    let why = down(&connection).await;
    assert!(
        why.starts_with(&format!("no endpoint answered: {url}: ")) && why.contains("refused"),
        "{why}"
    );
    let missing = Connection::connect(Settings {
        endpoints: vec![url],
        cacert: Some("/nonexistent/ca.pem".into()),
        ..Settings::default()
    })
    .await;
    assert!(matches!(missing, Err(ConnectError::File { .. })));
}

/// A client of an etcd with authentication that may do everything.
async fn root(etcd: &Etcd) -> Client {
    let options = ConnectOptions::new().with_user("root", testbed::ROOT_PASSWORD);
    Client::connect(etcd.0.endpoints(), Some(options))
        .await
        .unwrap()
}

#[tokio::test]
async fn users_and_passwords() {
    let etcd = Etcd::start_as(|builder| builder.auth(["/reg/", "/a/"])).await;
    let mut root = root(&etcd).await;

    // Without a user, and with a wrong password.
    let anonymous = Settings {
        user: None,
        password_file: None,
        ..etcd.settings()
    };
    let anonymous = Connection::connect(anonymous).await.unwrap();
    let why = down(&anonymous).await;
    assert!(
        why.contains("give --etcd-user and --etcd-password-file"),
        "{why}"
    );
    let settings = etcd.settings();
    let file = settings.password_file.clone().unwrap();
    std::fs::write(&file, "wrong-pw\n").unwrap();
    let connection = Connection::connect(settings).await.unwrap();
    let why = down(&connection).await;
    assert!(
        why.contains("check --etcd-user and --etcd-password-file") && !why.contains("wrong-pw"),
        "{why}"
    );

    // The right one is picked up without a restart, and so is its successor.
    std::fs::write(&file, format!("{}\n", testbed::USER_PASSWORD)).unwrap();
    let session = timeout(SOON, connection.ready()).await.unwrap();
    etcd.does(|etcd| etcd.rotate_password("second")).await;
    timeout(SOON, connection.ready_after(session.generation))
        .await
        .unwrap();

    // What the user may not touch.
    let session = connection.ready().await;
    let denied = Request::Txn(Txn {
        then: vec![Op::Put(bytes("/foreign"), bytes("v"), 0)],
        ..Txn::default()
    });
    assert_eq!(
        refusal(&session.client, denied).await,
        FailureKind::Refused(Refusal::Permission)
    );
    let (commands, receiver) = mpsc::channel(8);
    let (sender, mut inputs) = mpsc::channel(8);
    tokio::spawn(mirror::run(connection, receiver, sender, Pace::default()));
    commands.send(follow(&["/a/", "/f/"])).await.unwrap();
    let (mut snapshot, mut refused) = (false, false);
    while !(snapshot && refused) {
        match news(&mut inputs).await {
            Input::Etcd(News::Snapshot { range, .. }) => {
                assert_eq!(range, prefix("/a/"));
                snapshot = true;
            }
            Input::Etcd(News::Refused(range, failure)) => {
                assert_eq!(range, prefix("/f/"));
                assert_eq!(failure.kind, FailureKind::Refused(Refusal::Permission));
                refused = true;
            }
            other => panic!("{other:?}"),
        }
    }
    // The refused range holds nothing up, and is followed once that is allowed.
    commands.send(mirror::Command::AskProgress).await.unwrap();
    assert!(matches!(
        next(&mut inputs).await,
        Input::Etcd(News::Progress(_))
    ));
    root.role_grant_permission(
        testbed::USER,
        Permission::new(PermissionType::Read, "/f/").with_prefix(),
    )
    .await
    .unwrap();
    assert!(matches!(
        news(&mut inputs).await,
        Input::Etcd(News::Snapshot { range, .. }) if range == prefix("/f/")
    ));
}

/// A keeper at work.
struct Keeping {
    commands: mpsc::Sender<keeper::Command>,
    inputs: mpsc::Receiver<Input>,
    ready: watch::Receiver<bool>,
}

async fn keep(etcd: &Etcd) -> Keeping {
    keep_with(etcd.settings()).await
}

async fn keep_with(settings: Settings) -> Keeping {
    let connection = Connection::connect(settings).await.unwrap();
    let (commands, receiver) = mpsc::channel(8);
    let (sender, inputs) = mpsc::channel(8);
    let (ready_sender, ready) = watch::channel(false);
    tokio::spawn(keeper::run(
        connection,
        Names::new("/reg/", "east", BTreeSet::new()),
        receiver,
        sender,
        ready_sender,
    ));
    Keeping {
        commands,
        inputs,
        ready,
    }
}

async fn slot(client: &mut Client, uid: &str, id: i64, ttl: i64) {
    let options = etcd_client::LeaseGrantOptions::new().with_id(id);
    client.lease_grant(ttl, Some(options)).await.unwrap();
    let options = etcd_client::PutOptions::new().with_lease(id);
    client
        .put(
            format!("/reg/east/leases/{uid}/{id:016x}"),
            format!("{{\"ttl\":{ttl}}}"),
            Some(options),
        )
        .await
        .unwrap();
}

/// Waits until a lease is no more.
async fn gone(client: &mut Client, id: i64) {
    timeout(SOON, async {
        while ttl(client, id).await >= 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
}

async fn ttl(client: &mut Client, id: i64) -> i64 {
    client.lease_time_to_live(id, None).await.unwrap().ttl()
}

#[tokio::test]
async fn leases_are_found_and_kept() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    // Two of this cluster, one of another UID; the UID is that of the owner.
    slot(&mut client, "u1", 1, 3).await;
    slot(&mut client, "u1", 2, 3).await;
    slot(&mut client, "u2", 3, 3).await;
    client
        .lease_grant(60, Some(etcd_client::LeaseGrantOptions::new().with_id(9)))
        .await
        .unwrap();
    let on = etcd_client::PutOptions::new().with_lease(9);
    client.put("/reg/east/owner", "u1", Some(on)).await.unwrap();
    let mut keeping = keep(&etcd).await;
    timeout(SOON, keeping.ready.wait_for(|ready| *ready))
        .await
        .unwrap()
        .unwrap();
    // One that is only named.
    client
        .lease_grant(3, Some(etcd_client::LeaseGrantOptions::new().with_id(4)))
        .await
        .unwrap();
    keeping
        .commands
        .send(keeper::Command::Keep(4, 3))
        .await
        .unwrap();
    // The key of one goes: it is kept no longer. etcd is restarted meanwhile.
    client
        .delete("/reg/east/leases/u1/0000000000000002", None)
        .await
        .unwrap();
    etcd.does(testbed::Etcd::kill).await;
    etcd.does(testbed::Etcd::start).await;
    // A restart gives every lease its full TTL, and all of them the same one: when those that nobody keeps are gone, one
    // that stands was kept.
    for id in [2, 3] {
        gone(&mut client, id).await;
    }
    for id in [1, 4, 9] {
        assert!(ttl(&mut client, id).await > 0, "lease {id}");
    }
    // A lease that is gone is told.
    client.lease_revoke(4).await.unwrap();
    assert_eq!(next(&mut keeping.inputs).await, Input::LeaseLost(4));
    // Nothing is kept while that is said; then what is left is kept again.
    slot(&mut client, "u1", 5, 60).await;
    keeping
        .commands
        .send(keeper::Command::Keeping(false))
        .await
        .unwrap();
    gone(&mut client, 1).await;
    slot(&mut client, "u1", 6, 3).await;
    keeping
        .commands
        .send(keeper::Command::Keeping(true))
        .await
        .unwrap();
    slot(&mut client, "u2", 7, 3).await;
    gone(&mut client, 7).await;
    assert!(ttl(&mut client, 6).await > 0);
}

#[tokio::test]
async fn thousands_of_leases_share_few_streams() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    for id in 1..=2_000 {
        slot(&mut client, "u1", id, 60).await;
    }
    let mut keeping = keep(&etcd).await;
    keeping
        .commands
        .send(keeper::Command::Cluster("u1".into()))
        .await
        .unwrap();
    timeout(SOON, keeping.ready.wait_for(|ready| *ready))
        .await
        .unwrap()
        .unwrap();
    // All were renewed just now.
    for id in [1, 1_000, 2_000] {
        assert!(ttl(&mut client, id).await >= 58);
    }
    // All are gone: each is told.
    for id in 1..=50 {
        client.lease_revoke(id).await.unwrap();
        keeping
            .commands
            .send(keeper::Command::Keep(id, 1))
            .await
            .unwrap();
    }
    let mut lost = Vec::new();
    while lost.len() < 50 {
        match next(&mut keeping.inputs).await {
            Input::LeaseLost(id) => lost.push(id),
            other => panic!("{other:?}"),
        }
    }
    lost.sort_unstable();
    assert_eq!(lost, (1..=50).collect::<Vec<_>>());
}

#[tokio::test]
async fn purge_frees_a_name() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    slot(&mut client, "u1", 1, 60).await;
    slot(&mut client, "u2", 2, 60).await;
    for (key, id) in [("/services/a", 1), ("/services/b", 2)] {
        let on = etcd_client::PutOptions::new().with_lease(id);
        client.put(key, "v", Some(on)).await.unwrap();
    }
    client.put("/reg/east/owner", "u1", None).await.unwrap();
    client.put("/reg/east/seen/0", "v", None).await.unwrap();
    client.put("/reg/east/leader", "nonce", None).await.unwrap();
    client.put("/reg/east2/owner", "u1", None).await.unwrap();
    let running = purge(&client, "/reg/", "east", Some("u1"), |_, _| {}).await;
    assert!(matches!(running, Err(PurgeError::OperatorRuns { .. })));
    client.delete("/reg/east/leader", None).await.unwrap();
    let unnamed = purge(&client, "/reg/", "east", None, |_, _| {}).await;
    assert!(matches!(unnamed, Err(PurgeError::SeveralUids { uids, .. }) if uids == ["u1", "u2"]));

    let mut steps = Vec::new();
    let nobody = purge(&client, "/reg/", "east", Some("u3"), |_, _| {}).await;
    assert!(matches!(nobody, Err(PurgeError::OtherUid { others, .. }) if others == ["u1", "u2"]));
    let done = purge(&client, "/reg/", "east", Some("u1"), |n, all| {
        steps.push((n, all))
    })
    .await;
    let removed = |keys, others: &[&str]| Report {
        leases: 1,
        keys,
        others: others.iter().map(ToString::to_string).collect(),
    };
    assert_eq!(done.unwrap(), removed(2, &["u2"]));
    assert_eq!(steps, [(1, 1)]);
    let options = || Some(etcd_client::GetOptions::new().with_prefix());
    let left: Vec<_> = client
        .get("/", options())
        .await
        .unwrap()
        .kvs()
        .iter()
        .map(|kv| kv.key_str().unwrap().to_owned())
        .collect();
    assert_eq!(
        left,
        [
            "/reg/east/leases/u2/0000000000000002",
            "/reg/east2/owner",
            "/services/b"
        ]
    );
    // Again, and then the other one without a name.
    let again = purge(&client, "/reg/", "east", Some("u1"), |_, _| {}).await;
    assert!(matches!(again, Err(PurgeError::OtherUid { others, .. }) if others == ["u2"]));
    let other = purge(&client, "/reg/", "east", None, |_, _| {}).await;
    assert_eq!(other.unwrap(), removed(0, &[]));
    // Nobody has it: nothing is to be done.
    let free = purge(&client, "/reg/", "east", Some("u1"), |_, _| {}).await;
    assert_eq!(free.unwrap(), Report::default());
    assert_eq!(
        client
            .get("/services/", options())
            .await
            .unwrap()
            .kvs()
            .len(),
        0
    );
}

/// A mirror, requests and a keeper on connections as the operator has them, at work with `/a/1` on a lease of 5 s.
struct AtWork {
    connection: Connection,
    requests: Requests,
    answers: mpsc::Receiver<Input>,
    mirrored: mpsc::Receiver<Input>,
    keeping: Keeping,
    asked: u64,
    /// Ends the mirror when it is dropped.
    _commands: mpsc::Sender<mirror::Command>,
}

/// The lease of [`AtWork`]; the shortest TTL that a registration may have.
const LEASE: (i64, i64) = (5, 5);

impl AtWork {
    async fn start(settings: Settings, client: &mut Client) -> Self {
        slot(client, "u1", LEASE.0, LEASE.1).await;
        let on = etcd_client::PutOptions::new().with_lease(LEASE.0);
        client.put("/a/1", "v", Some(on)).await.unwrap();
        let connection = Connection::connect(settings.clone()).await.unwrap();
        let (sender, answers) = mpsc::channel(8);
        let requests = Requests::new(connection.clone(), DEADLINE, sender);
        let (commands, receiver) = mpsc::channel(8);
        let (sender, mirrored) = mpsc::channel(64);
        tokio::spawn(mirror::run(
            connection.clone(),
            receiver,
            sender,
            Pace::default(),
        ));
        commands.send(follow(&["/a/"])).await.unwrap();
        let mut keeping = keep_with(settings).await;
        keeping
            .commands
            .send(keeper::Command::Cluster("u1".into()))
            .await
            .unwrap();
        timeout(SOON, keeping.ready.wait_for(|ready| *ready))
            .await
            .unwrap()
            .unwrap();
        let mut this = Self {
            connection,
            requests,
            answers,
            mirrored,
            keeping,
            asked: 0,
            _commands: commands,
        };
        assert_eq!(snapshot(&mut this.mirrored).await, ["/a/1=v"]);
        this
    }

    /// The endpoint that is in use.
    async fn endpoint(&self) -> String {
        let session = timeout(SOON, self.connection.ready()).await.unwrap();
        session.endpoint.to_string()
    }

    /// Reads `/a/1` until etcd answers; gives what the failures on the way said.
    async fn read(&mut self) -> Vec<String> {
        let mut failures = Vec::new();
        let since = Instant::now();
        loop {
            self.asked += 1;
            let get = Request::Txn(Txn {
                then: vec![Op::Get(bytes("/a/1"))],
                ..Txn::default()
            });
            self.requests.ask(self.asked, get);
            match next(&mut self.answers).await {
                Input::Answer(number, Ok(Answer::Txn { reads, .. })) => {
                    assert_eq!(number, self.asked);
                    assert_eq!(reads[0].iter().map(text).collect::<Vec<_>>(), ["/a/1=v"]);
                    return failures;
                }
                Input::Answer(number, Err(failure)) => {
                    assert_eq!(number, self.asked);
                    assert!(since.elapsed() < SOON, "{failure:?}");
                    failures.push(failure.message);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// The mirror has all of `/a/` again, and nothing was lost on the way.
    async fn mirror_recovers(&mut self) {
        loop {
            match news(&mut self.mirrored).await {
                Input::Etcd(News::Broken(_)) => {}
                Input::Etcd(News::Snapshot { records, .. }) => {
                    assert_eq!(records.iter().map(text).collect::<Vec<_>>(), ["/a/1=v"]);
                    return;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// The lease is still kept after a lease of the same TTL that nobody keeps has ended.
    async fn leases_are_kept(&mut self, client: &mut Client, other: i64) {
        slot(client, "u2", other, LEASE.1).await;
        gone(client, other).await;
        assert!(ttl(client, LEASE.0).await > 0);
        assert!(self.keeping.inputs.try_recv().is_err(), "no lease was lost");
    }
}

#[tokio::test]
async fn another_member_takes_over_from_one_that_was_killed_or_frozen() {
    let etcd = Etcd::start_as(|builder| builder.members(3)).await;
    let mut client = etcd.client().await;
    let mut work = AtWork::start(etcd.settings(), &mut client).await;
    for freeze in [false, true] {
        let before = work.endpoint().await;
        let index = etcd
            .0
            .endpoints()
            .iter()
            .position(|url| *url == before)
            .unwrap();
        // How long an election takes is etcd's business: the member that goes is a follower.
        let leads = etcd.does(testbed::Etcd::leader).await;
        if leads == index {
            etcd.does(move |etcd| {
                let next = (index + 1) % etcd.member_count();
                let status =
                    etcd.etcdctl_member(next, &["endpoint", "status", "--write-out=fields"])?;
                let id = status
                    .lines()
                    .find_map(|line| line.strip_prefix("\"MemberID\" : "))
                    .map(|id| format!("{:x}", id.trim().parse::<u64>().unwrap()))
                    .unwrap();
                etcd.etcdctl_member(index, &["move-leader", &id])
            })
            .await;
        }
        work.read().await;
        etcd.does(move |etcd| match freeze {
            true => etcd.freeze_member(index),
            false => etcd.kill_member(index),
        })
        .await;
        let since = Instant::now();
        work.read().await;
        let took = since.elapsed();
        assert!(took < NOTICED, "freeze {freeze}: {took:?}");
        assert_ne!(work.endpoint().await, before);
        work.mirror_recovers().await;
        etcd.does(move |etcd| match freeze {
            true => etcd.thaw_member(index),
            false => etcd.start_member(index),
        })
        .await;
    }
    work.leases_are_kept(&mut client, 20).await;
}

/// Without `hasleader` in its metadata such a request waits until it is given up.
#[tokio::test]
async fn a_member_without_a_leader_says_so_at_once() {
    let etcd = Etcd::start_as(|builder| builder.members(3)).await;
    let settings = Settings {
        endpoints: vec![etcd.url()],
        ..etcd.settings()
    };
    let connection = Connection::connect(settings).await.unwrap();
    let session = timeout(SOON, connection.ready()).await.unwrap();
    etcd.does(|etcd| {
        etcd.kill_member(1)?;
        etcd.kill_member(2)
    })
    .await;
    let end = Instant::now() + 2 * SOON;
    let put = Request::Txn(Txn {
        then: vec![Op::Put(bytes("key"), bytes("value"), 0)],
        ..Txn::default()
    });
    loop {
        assert!(Instant::now() < end, "no request was refused at once");
        let asked = Instant::now();
        let answer = execute(&session.client, put.clone(), SOON).await;
        // Until the member has noticed, a request may be taken and wait.
        if answer.is_err() && asked.elapsed() < DEADLINE {
            break;
        }
    }
}

#[tokio::test]
async fn another_endpoint_is_used_when_a_connection_leads_into_a_black_hole() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let port = etcd.0.client_ports()[0];
    let proxies = [
        testbed::Proxy::start(port).unwrap(),
        testbed::Proxy::start(port).unwrap(),
    ];
    let settings = Settings {
        endpoints: proxies.iter().map(|proxy| proxy.url("http")).collect(),
        ..Settings::default()
    };
    let mut work = AtWork::start(settings, &mut client).await;
    let before = work.endpoint().await;
    // The keeper's connection has chosen for itself.
    let chosen = usize::from(proxies[1].url("http") == before);
    proxies[chosen].black_hole();
    let since = Instant::now();
    work.read().await;
    assert!(since.elapsed() < NOTICED, "{:?}", since.elapsed());
    assert_eq!(work.endpoint().await, proxies[1 - chosen].url("http"));
    work.mirror_recovers().await;
    // And back, without healing the first in between: that one alone answers then.
    proxies[chosen].heal();
    proxies[1 - chosen].black_hole();
    work.read().await;
    assert_eq!(work.endpoint().await, before);
    work.mirror_recovers().await;
    work.leases_are_kept(&mut client, 20).await;
}

#[tokio::test]
async fn a_new_password_and_an_expired_token_lose_nothing() {
    let etcd = Etcd::start_as(|builder| {
        builder
            .auth(["/reg/", "/a/"])
            .args(["--auth-token-ttl=1", "--log-level=debug"])
    })
    .await;
    let mut root = root(&etcd).await;
    let mut work = AtWork::start(etcd.settings(), &mut root).await;
    work.read().await;
    // Unused tokens are dropped; a request that meets that is repeated with a new one.
    let tokens = || {
        let log = etcd.0.process(0).unwrap().log();
        log.lines()
            .filter(|line| line.contains("deleted a simple token") && line.contains(testbed::USER))
            .count()
    };
    timeout(SOON, async {
        while tokens() == 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(work.read().await, Vec::<String>::new());

    // The file lags behind etcd: nothing works meanwhile, and all of it afterwards.
    let file = etcd.0.password_file().unwrap().to_owned();
    etcd.does(|etcd| {
        let passwd = ["user", "passwd", testbed::USER, "--interactive=false"];
        etcd.etcdctl_input(&passwd, "second")
    })
    .await;
    let session = work.connection.ready().await;
    std::fs::write(&file, "second").unwrap();
    timeout(SOON, work.connection.ready_after(session.generation))
        .await
        .unwrap();
    work.read().await;
    // `root` has a token of its own, which has expired by now: a client for each question.
    let mut fresh = self::root(&etcd).await;
    slot(&mut fresh, "u2", 20, LEASE.1).await;
    timeout(SOON, async {
        while ttl(&mut self::root(&etcd).await, 20).await >= 0 {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
    .await
    .unwrap();
    assert!(ttl(&mut self::root(&etcd).await, LEASE.0).await > 0);
    assert!(work.keeping.inputs.try_recv().is_err(), "no lease was lost");
}

#[tokio::test]
async fn certificates_are_checked_and_replaced() {
    // The client certificate is its bearer's login, so that it can be told which one is in use.
    let etcd = Etcd::start_as(|builder| builder.tls().auth(["/reg/", "/a/"])).await;
    let settings = Settings {
        user: None,
        password_file: None,
        ..etcd.settings()
    };

    // What is wrong is said.
    let elsewhere = tempfile::tempdir().unwrap();
    let foreign = testbed::Ca::new(elsewhere.path(), "another authority").unwrap();
    let files = foreign.client("client", testbed::USER, None).unwrap();
    let with = |change: &dyn Fn(&mut Settings)| {
        let mut settings = settings.clone();
        change(&mut settings);
        settings
    };
    for (settings, part) in [
        (
            with(&|settings| settings.cacert = Some(foreign.cert().to_owned())),
            "check --etcd-cacert",
        ),
        (
            with(&|settings| (settings.cert, settings.key) = (None, None)),
            "--etcd-cert",
        ),
        (
            with(&|settings| {
                (settings.cert, settings.key) = (Some(files.cert.clone()), Some(files.key.clone()));
            }),
            "--etcd-cert",
        ),
        (
            with(&|settings| {
                settings.endpoints = vec![settings.endpoints[0].replace("https", "http")];
            }),
            "if etcd serves TLS here, write https://",
        ),
    ] {
        let connection = Connection::connect(settings).await.unwrap();
        let why = down(&connection).await;
        assert!(why.contains(part), "{part}: {why}");
    }

    // The first certificate is nobody's, so that nothing is allowed; its successor is the user's.
    let connection = Connection::connect(settings.clone()).await.unwrap();
    let session = timeout(SOON, connection.ready()).await.unwrap();
    let put = |key: &str| {
        Request::Txn(Txn {
            then: vec![Op::Put(bytes(key), bytes("v"), 0)],
            ..Txn::default()
        })
    };
    let denied = FailureKind::Refused(Refusal::Permission);
    assert_eq!(refusal(&session.client, put("/a/2")).await, denied);
    etcd.does(|etcd| etcd.ca().unwrap().client("client", testbed::USER, None))
        .await;
    let session = timeout(SOON, connection.ready_after(session.generation))
        .await
        .unwrap();
    ask(&session.client, put("/a/2")).await.unwrap();
    assert_eq!(refusal(&session.client, put("/elsewhere")).await, denied);
    // The next one is root's.
    etcd.does(|etcd| etcd.ca().unwrap().client("client", "root", None))
        .await;
    let session = timeout(SOON, connection.ready_after(session.generation))
        .await
        .unwrap();
    ask(&session.client, put("/elsewhere")).await.unwrap();
}
