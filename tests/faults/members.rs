//! An etcd of three members, of which some are killed or frozen.

use std::time::{Duration, Instant};

use testbed::Etcd;

use crate::scene::{EAST, PAST_SHORT_TTL, SHORT_TTL, Scene, endure, others, outlive_a_lease, tell};
use crate::support::{Registry, Stage, Watcher};

/// The member that nothing happens to, and that the watcher reads from.
const SURVIVOR: usize = 0;
/// The members that are killed and frozen.
const KILLED: usize = 1;
const FROZEN: usize = 2;

/// Makes a member lead.
fn make_lead(etcd: &Etcd, member: usize) {
    let leads = etcd.leader().unwrap();
    if leads == member {
        return;
    }
    let status = etcd
        .etcdctl_member(member, &["endpoint", "status", "--write-out=fields"])
        .unwrap();
    let id: u64 = status
        .lines()
        .find_map(|line| line.strip_prefix("\"MemberID\" : "))
        .and_then(|id| id.trim().parse().ok())
        .unwrap();
    etcd.etcdctl_member(leads, &["move-leader", &format!("{id:x}")])
        .unwrap();
    assert_eq!(etcd.leader().unwrap(), member);
}

#[test]
fn three_members_lose_one_their_leader_and_their_quorum() {
    let members = Etcd::builder("members").unsafe_no_fsync().members(3);
    let mut stage = Stage::with_etcd("members", members);
    let etcd = stage.etcd.clone();
    let survivor = &etcd.endpoints()[SURVIVOR..=SURVIVOR];
    stage.registry = Registry::connect_to(&etcd, survivor);
    let operator = stage.operator(EAST).start().unwrap();
    let scene = Scene::new(stage, SHORT_TTL);
    let registry = Registry::connect_to(&etcd, survivor);
    let from = registry.revision();
    let watcher = Watcher::after(registry, &scene.stage.scope("web"), from);
    let before = scene.stage.registry.get(&scene.keys[1]);
    let passed = |row: &str, ready: bool, ended: Instant| {
        let recovered = scene.recovered(&watcher, 0, ready, ended);
        let seen = watcher.seen();
        assert_eq!(seen.len(), 1, "{row}: {seen:#?}");
        tell(row, others(&seen, &scene.keys[0]).len(), recovered);
    };

    make_lead(&etcd, FROZEN);
    let begun = Instant::now();
    etcd.kill_member(KILLED).unwrap();
    scene.set_ready(0, false);
    passed("etcd member killed, 3 nodes", false, begun);
    etcd.start_member(KILLED).unwrap();

    // Without a leader for a while: another one is elected.
    watcher.forget();
    let begun = Instant::now();
    etcd.freeze_member(FROZEN).unwrap();
    scene.set_ready(0, true);
    passed("etcd leader frozen, 3 nodes", true, begun);
    etcd.thaw_member(FROZEN).unwrap();
    etcd.wait_healthy().unwrap();

    // Nothing expires without quorum, and the operator neither ends nor runs hot.
    watcher.forget();
    let lines = operator.log().lines().count();
    let cpu = operator.cpu_time().unwrap();
    etcd.kill_member(KILLED).unwrap();
    etcd.kill_member(FROZEN).unwrap();
    scene.set_ready(0, false);
    endure(PAST_SHORT_TTL, &[&operator]);
    let cpu = operator.cpu_time().unwrap() - cpu;
    let lines = operator.log().lines().count() - lines;
    assert!(cpu < Duration::from_secs(2), "{cpu:?}");
    assert!(lines < 20, "{}", operator.log());
    let ended = Instant::now();
    etcd.start_member(KILLED).unwrap();
    etcd.start_member(FROZEN).unwrap();
    passed("etcd quorum lost for longer than the TTL", false, ended);
    watcher.forget();
    outlive_a_lease(&scene.stage, SHORT_TTL);
    watcher.assert_silent("with three members again");
    assert_eq!(scene.stage.registry.get(&scene.keys[1]), before);
}
