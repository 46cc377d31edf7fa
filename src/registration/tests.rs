//! The rules of a registration, one step at a time, where a real etcd would need luck.

use super::State;
use super::core::{Core, Step, Ticket};
use super::instance::{Instance, groups};
use crate::model::etcd::{
    Answer, Compare, Event, Failure, FailureKind, KeyValue, LeaseId, News, Op, Range, Refusal,
    Request, Revision,
};

const KEY: &str = "/services/shop/web/vm/10.0.0.5:8080";
const LEASE: LeaseId = 7;

fn web(weight: u32) -> Vec<Instance> {
    let web = Instance::new("vm", "shop", "web", "10.0.0.5:8080".parse().unwrap()).unwrap();
    vec![web.uid("1").weight(weight).unwrap()]
}

/// A core that wants [`KEY`].
fn core() -> Core {
    let mut core = Core::new(30);
    core.want(groups(&web(1)).unwrap());
    core
}

fn range() -> Range {
    let start = KEY.as_bytes().into();
    let end = [KEY.as_bytes(), &[0]].concat().into();
    Range { start, end }
}

fn kv(value: &str, lease: LeaseId, created: Revision, changed: Revision) -> KeyValue {
    KeyValue {
        key: KEY.as_bytes().into(),
        value: value.as_bytes().into(),
        lease,
        create_revision: created,
        mod_revision: changed,
    }
}

fn snapshot(core: &mut Core, revision: Revision, found: Option<KeyValue>) {
    let records = found.into_iter().collect();
    let reread = core.heard(News::Snapshot {
        range: range(),
        revision,
        records,
    });
    assert_eq!(reread, None);
}

fn event(core: &mut Core, event: Event) {
    core.heard(News::Events {
        range: range(),
        revision: 0,
        events: vec![event],
    });
}

/// What is asked of etcd now.
fn asks(core: &mut Core, now: u64) -> (Ticket, Request) {
    match core.next(now, || LEASE) {
        Step::Ask(ticket, request) => (ticket, request),
        Step::Wait(until) => panic!("waits until {until:?}"),
    }
}

fn waits(core: &mut Core, now: u64) -> Option<u64> {
    match core.next(now, || LEASE) {
        Step::Wait(until) => until,
        Step::Ask(_, request) => panic!("asks {request:?}"),
    }
}

fn done(revision: Revision) -> Result<Answer, Failure> {
    Ok(Answer::Txn {
        succeeded: true,
        revision,
        reads: vec![Vec::new()],
    })
}

fn read(succeeded: bool, revision: Revision, found: Option<KeyValue>) -> Result<Answer, Failure> {
    Ok(Answer::Txn {
        succeeded,
        revision,
        reads: vec![found.into_iter().collect()],
    })
}

fn unknown() -> Result<Answer, Failure> {
    fails(FailureKind::Unknown)
}

fn fails(kind: FailureKind) -> Result<Answer, Failure> {
    Err(Failure {
        kind,
        message: "no answer".to_owned(),
    })
}

/// The value, the lease and the compared revision of a put.
fn put(request: &Request) -> (String, LeaseId, Revision) {
    let Request::Txn(txn) = request else {
        panic!("{request:?}");
    };
    match (&txn.compares[..], &txn.then[..]) {
        ([Compare::ModRevision(_, revision)], [Op::Put(_, value, lease)]) => {
            let value = String::from_utf8(value.to_vec()).unwrap();
            (value, *lease, *revision)
        }
        _ => panic!("{txn:?}"),
    }
}

/// A core whose key was put at revision 5.
fn registered() -> Core {
    let mut core = core();
    assert_eq!(waits(&mut core, 0), None);
    snapshot(&mut core, 4, None);
    let (ticket, request) = asks(&mut core, 0);
    assert_eq!(request, Request::Grant(LEASE, 30));
    core.answered(ticket, &request, Ok(Answer::Granted), 0);
    let (ticket, request) = asks(&mut core, 0);
    assert_eq!(put(&request).1, LEASE);
    assert_eq!(put(&request).2, 0);
    core.answered(ticket, &request, done(5), 0);
    assert_eq!(core.state(), State::Registered);
    assert_eq!(waits(&mut core, 0), None);
    core
}

#[test]
fn nothing_is_put_before_it_was_read() {
    let mut core = core();
    assert_eq!(waits(&mut core, 0), None);
    assert_eq!(core.state(), State::Waiting(None));
    registered();
}

#[test]
fn a_grant_of_unknown_outcome_is_repeated_with_its_id() {
    let mut core = core();
    snapshot(&mut core, 4, None);
    let (ticket, request) = asks(&mut core, 0);
    core.answered(ticket, &request, unknown(), 0);
    let at = waits(&mut core, 0).unwrap();
    let (ticket, again) = match core.next(at, || 99) {
        Step::Ask(ticket, request) => (ticket, request),
        Step::Wait(_) => panic!(),
    };
    assert_eq!(again, request);
    let exists = fails(FailureKind::Refused(Refusal::LeaseExists));
    core.answered(ticket, &again, exists, at);
    assert_eq!(put(&asks(&mut core, at).1).1, LEASE);
}

#[test]
fn a_put_of_unknown_outcome_is_read_back_and_not_repeated() {
    for applied in [true, false] {
        let mut core = registered();
        core.want(groups(&web(2)).unwrap());
        let (ticket, request) = asks(&mut core, 0);
        let (value, lease, compared) = put(&request);
        assert_eq!(compared, 5);
        core.answered(ticket, &request, unknown(), 0);
        assert_eq!(core.state(), State::Waiting(Some("no answer".into())));
        let at = waits(&mut core, 0).unwrap();
        let (ticket, request) = asks(&mut core, at);
        assert!(matches!(&request, Request::Txn(txn) if matches!(txn.then[..], [Op::Get(_)])));
        let found = match applied {
            true => kv(&value, lease, 5, 6),
            false => kv("old", lease, 5, 5),
        };
        core.answered(ticket, &request, read(true, 6, Some(found)), at);
        if applied {
            assert_eq!(core.state(), State::Registered);
            assert_eq!(waits(&mut core, at), None);
        } else {
            assert_eq!(put(&asks(&mut core, at).1), (value, lease, 5));
        }
    }
}

#[test]
fn a_put_that_is_applied_late_does_not_outlive_the_wish() {
    let mut core = core();
    snapshot(&mut core, 4, None);
    let (ticket, request) = asks(&mut core, 0);
    core.answered(ticket, &request, Ok(Answer::Granted), 0);
    let (ticket, request) = asks(&mut core, 0);
    let (value, lease, _) = put(&request);
    core.answered(ticket, &request, unknown(), 0);
    core.want(Vec::new());
    let at = waits(&mut core, 0).unwrap();
    let (ticket, request) = asks(&mut core, at);
    core.answered(ticket, &request, read(true, 5, None), at);
    assert_eq!(core.state(), State::Registered);
    // It is watched on, and goes when it comes.
    assert!(core.ranges().contains(&range()));
    event(&mut core, Event::Put(kv(&value, lease, 6, 6)));
    let (ticket, request) = asks(&mut core, at);
    assert!(matches!(&request, Request::Txn(txn) if matches!(txn.then[..], [Op::Delete(_)])));
    core.answered(ticket, &request, done(7), at);
    assert_eq!(core.state(), State::Registered);
}

#[test]
fn what_the_watch_told_is_not_undone_by_an_older_answer() {
    let mut core = registered();
    core.want(groups(&web(2)).unwrap());
    let (ticket, request) = asks(&mut core, 0);
    let (value, lease, _) = put(&request);
    // Put at 6, and altered at 7, before the answer comes.
    event(&mut core, Event::Put(kv(&value, lease, 5, 6)));
    event(&mut core, Event::Put(kv("x", 0, 5, 7)));
    core.answered(ticket, &request, done(6), 0);
    assert_eq!(core.state(), State::Waiting(None));
    // A rest between two puts of one key.
    assert_eq!(waits(&mut core, 0), Some(1_000));
    assert_eq!(put(&asks(&mut core, 1_000).1), (value, lease, 7));
    // Nor by an older event.
    event(&mut core, Event::Delete(KEY.as_bytes().into(), 6));
    assert_eq!(put(&asks(&mut core, 1_000).1).2, 7);
}

#[test]
fn a_key_that_another_took_is_not_put() {
    let mut core = registered();
    event(&mut core, Event::Delete(KEY.as_bytes().into(), 6));
    let (ticket, request) = asks(&mut core, 2_000);
    // Somebody was faster.
    let theirs = kv("theirs", 9, 7, 7);
    core.answered(ticket, &request, read(false, 7, Some(theirs)), 2_000);
    assert!(matches!(core.state(), State::Conflict { .. }));
    assert_eq!(waits(&mut core, 60_000), None);
    event(&mut core, Event::Delete(KEY.as_bytes().into(), 8));
    assert_eq!(put(&asks(&mut core, 60_000).1).2, 0);
}

#[test]
fn with_its_lease_it_is_forgotten_which_keys_were_ours() {
    let mut core = registered();
    core.heard(News::Broken("gone".to_owned()));
    assert_eq!(core.state(), State::Waiting(Some("gone".into())));
    // Another etcd, in which another's key has the create revision of ours.
    snapshot(&mut core, 9, Some(kv("theirs", 0, 5, 9)));
    // It is taken for one that was altered by hand; but the put names a lease that is not there.
    let (ticket, request) = asks(&mut core, 2_000);
    assert_eq!(put(&request).1, LEASE);
    let gone = fails(FailureKind::Refused(Refusal::LeaseNotFound));
    core.answered(ticket, &request, gone, 2_000);
    assert!(matches!(core.state(), State::Conflict { .. }));
    assert_eq!(waits(&mut core, 60_000), None);
}

#[test]
fn an_answer_from_before_the_watch_broke_tells_nothing() {
    let mut core = registered();
    core.want(groups(&web(2)).unwrap());
    let (ticket, request) = asks(&mut core, 0);
    core.heard(News::Broken("gone".to_owned()));
    core.answered(ticket, &request, done(6), 0);
    snapshot(&mut core, 3, None);
    assert_eq!(put(&asks(&mut core, 2_000).1).2, 0);
}

#[test]
fn a_lease_that_is_lost_is_granted_anew() {
    let mut core = registered();
    assert_eq!(core.next_keep(), Some(10_000));
    assert_eq!(core.due(9_999), []);
    assert_eq!(core.due(10_000), [(0, LEASE)]);
    assert_eq!(core.due(10_000), []);
    core.kept(0, LEASE, Ok(true), 10_000);
    assert_eq!(core.due(20_000), [(0, LEASE)]);
    core.kept(0, LEASE, Ok(false), 20_000);
    let (_, request) = asks(&mut core, 20_000);
    assert_eq!(request, Request::Grant(LEASE, 30));
}

#[test]
fn a_refusal_is_tried_again_ever_less() {
    let mut core = registered();
    core.want(groups(&web(2)).unwrap());
    let mut now = 0;
    let mut pauses = Vec::new();
    for _ in 0..7 {
        let (ticket, request) = asks(&mut core, now);
        core.answered(
            ticket,
            &request,
            fails(FailureKind::Refused(Refusal::Permission)),
            now,
        );
        assert_eq!(core.state(), State::Refused("no answer".into()));
        let next = waits(&mut core, now).unwrap();
        pauses.push(next - now);
        now = next;
    }
    assert_eq!(pauses, [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
}

#[test]
fn a_list_that_is_not_that_of_etcd_is_read_again() {
    let mut core = registered();
    let seen = |revision, changed| News::KeysSeen {
        range: range(),
        revision,
        keys: vec![(KEY.as_bytes().into(), changed)],
    };
    assert_eq!(core.heard(seen(9, 5)), None);
    assert_eq!(core.heard(seen(4, 3)), None);
    assert_eq!(core.heard(seen(9, 8)), Some(range()));
}

#[test]
fn closing_revokes_and_waits_for_the_answer() {
    let mut core = registered();
    core.close();
    let (ticket, request) = asks(&mut core, 0);
    assert_eq!(request, Request::Revoke(LEASE));
    core.answered(ticket, &request, unknown(), 0);
    assert!(!core.is_closed());
    let at = waits(&mut core, 0).unwrap();
    let (ticket, request) = asks(&mut core, at);
    // The first one was applied.
    let gone = fails(FailureKind::Refused(Refusal::LeaseNotFound));
    core.answered(ticket, &request, gone, at);
    assert_eq!(waits(&mut core, at), None);
    assert!(core.is_closed());
    assert_eq!(core.state(), State::Closed);
}
