//! What is in a list, and what its readers are told.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use etcd_registrar::discovery::{Change, Discovery, Format, Id, Source, State};

use tokio::time::timeout;

use crate::{
    Etcd, SOON, addresses, delete, endpoint, live, next, prefix_of, put, ready, record, text,
    through_proxy, until,
};

#[tokio::test]
async fn endpoints_join_change_and_leave() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let json = Format::Json;
    let (a, b) = (
        endpoint("east", "10.0.0.1:80"),
        endpoint("west", "10.0.0.2:80"),
    );
    put(&mut client, &json, &a).await;
    // Its name begins as that of the other.
    let mut other = endpoint("east", "10.0.0.9:80");
    other.service = "web2".into();
    put(&mut client, &json, &other).await;

    let web = etcd.discovery().await.service("shop", "web").unwrap();
    assert_eq!(web.state(), State::Waiting(None));
    assert_eq!(web.age(), None);
    // Before anything is read there is nothing to be told.
    let mut changes = web.changes();
    assert_eq!(next(&mut changes).await, "+10.0.0.1:80");
    ready(&web).await;
    assert_eq!(web.state(), State::Live);
    let snapshot = web.snapshot();
    assert!(Arc::ptr_eq(&snapshot, &web.snapshot()));
    assert_eq!(snapshot[0].zone(), Some("eu-a"));

    put(&mut client, &json, &b).await;
    assert_eq!(next(&mut changes).await, "+10.0.0.2:80");
    assert_eq!(addresses(&web), ["10.0.0.1:80", "10.0.0.2:80"]);
    // A snapshot stays as it was.
    assert_eq!(snapshot.len(), 1);

    // The same again is no change, and another weight is one.
    put(&mut client, &json, &b).await;
    let mut heavy = b.clone();
    heavy.weight = 200;
    put(&mut client, &json, &heavy).await;
    match changes.next().await.unwrap() {
        Change::Changed { before, after } => {
            assert_eq!((before.weight(), after.weight()), (Some(100), Some(200)));
        }
        other => panic!("{other:?}"),
    }
    delete(&mut client, &json, &a).await;
    assert_eq!(next(&mut changes).await, "-10.0.0.1:80");
    assert_eq!(addresses(&web), ["10.0.0.2:80"]);

    // Who comes later is told the same list.
    let mut late = web.changes();
    assert_eq!(next(&mut late).await, "+10.0.0.2:80");
}

#[tokio::test]
async fn every_format_is_read_over_one_connection() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let (proxy, settings) = through_proxy(&etcd);
    let discovery = Discovery::connect(settings).await.unwrap();
    let formats = [
        "Json", "Plain", "Grpc", "Kitex", "Hertz", "Kratos", "SkyDns", "GoMicro", "Traefik",
        "Apisix",
    ]
    .map(|name| Format::by_name(name).unwrap());
    let mut lists = Vec::new();
    for format in &formats {
        put(&mut client, format, &endpoint("east", "10.0.0.1:80")).await;
        let source = Source::service_in(format.clone(), prefix_of(format), "shop", "web").unwrap();
        lists.push((format, discovery.follow(source)));
    }
    // A template's record tells its address only.
    client
        .put("/own/web/1", r#"{"ip":"10.0.0.1","port":80}"#, None)
        .await
        .unwrap();
    let template = Format::by_name("Template").unwrap();
    let own = discovery.prefix(template.clone(), "/own/").unwrap();
    lists.push((&template, own));
    for (format, list) in &lists {
        ready(list).await;
        assert_eq!(addresses(list), ["10.0.0.1:80"], "{}", format.name());
        assert_eq!(list.snapshot()[0].service(), "web", "{}", format.name());
    }
    // And each is watched.
    for format in &formats {
        put(&mut client, format, &endpoint("west", "[fd00::2]:80")).await;
    }
    for (format, list) in &lists {
        if !matches!(format, Format::Template(_)) {
            until(format.name(), || list.snapshot().len() == 2).await;
            assert!(addresses(list).contains(&"[fd00::2]:80".to_owned()));
        }
        assert_eq!(list.unreadable(), 0, "{}", format.name());
    }
    assert_eq!(proxy.accepted(), 1);
}

#[tokio::test]
async fn filters_leave_out_what_is_not_asked_for() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let json = Format::Json;
    let mut near = endpoint("east", "10.0.0.1:80");
    near.zone = "eu-a".into();
    let mut far = endpoint("east", "10.0.0.2:80");
    far.zone = "eu-b".into();
    let mut new = endpoint("west", "10.0.0.3:80");
    new.metadata = vec![("version".into(), "v2".into())];
    let mut admin = endpoint("west", "10.0.0.4:81");
    admin.port_name = "admin".into();
    for endpoint in [&near, &far, &new, &admin] {
        put(&mut client, &json, endpoint).await;
    }
    let discovery = etcd.discovery().await;
    let web = || Source::service("shop", "web").unwrap();
    let lists = [
        ("1234", web()),
        ("12", web().cluster("east")),
        ("1234", web().cluster("east").cluster("west")),
        ("2", web().zone("eu-b")),
        ("1", web().cluster("east").zone("eu-a")),
        ("3", web().metadata("version", "v2")),
        ("4", web().port("admin")),
        ("", web().cluster("north")),
    ]
    .map(|(wanted, source)| (wanted, discovery.follow(source)));
    for (wanted, list) in &lists {
        ready(list).await;
        let seen: String = addresses(list)
            .iter()
            .map(|address| address.as_bytes()[7] as char)
            .collect();
        assert_eq!(seen, *wanted);
    }
    // Who no longer matches is gone for this reader, and there for that one.
    let mut changes = lists[3].1.changes();
    assert_eq!(next(&mut changes).await, "+10.0.0.2:80");
    far.zone = "eu-a".into();
    put(&mut client, &json, &far).await;
    assert_eq!(next(&mut changes).await, "-10.0.0.2:80");
}

#[tokio::test]
async fn a_record_that_nobody_can_read_is_left_out() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let json = Format::Json;
    let good = endpoint("east", "10.0.0.1:80");
    put(&mut client, &json, &good).await;
    client
        .put("/services/shop/web/east/10.0.0.2:80", "garbage", None)
        .await
        .unwrap();
    client
        .put(b"/services/shop/web/\xff\xfe".to_vec(), vec![0xff], None)
        .await
        .unwrap();
    let web = etcd.discovery().await.service("shop", "web").unwrap();
    ready(&web).await;
    assert_eq!(addresses(&web), ["10.0.0.1:80"]);
    assert_eq!(web.unreadable(), 2);
    // One that is mended is there, and one that is broken by hand is gone.
    put(&mut client, &json, &endpoint("east", "10.0.0.2:80")).await;
    until("the mended one", || web.snapshot().len() == 2).await;
    client
        .put(record(&json, &good).key, "null", None)
        .await
        .unwrap();
    until("the broken one", || addresses(&web) == ["10.0.0.2:80"]).await;
    assert_eq!(web.unreadable(), 2);
}

#[tokio::test]
async fn a_list_is_followed_until_its_last_handle_is_dropped() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let json = Format::Json;
    put(&mut client, &json, &endpoint("east", "10.0.0.1:80")).await;
    let discovery = etcd.discovery().await;
    let first = discovery.service("shop", "web").unwrap();
    ready(&first).await;
    // Of the same keys, while they are watched already.
    let second = discovery.service("shop", "web").unwrap();
    let another = discovery.service("shop", "api").unwrap();
    ready(&second).await;
    ready(&another).await;
    let clone = first.clone();
    drop((first, discovery));
    put(&mut client, &json, &endpoint("east", "10.0.0.2:80")).await;
    until("both lists", || {
        clone.snapshot().len() == 2 && second.snapshot().len() == 2
    })
    .await;
    let mut changes = clone.changes();
    drop((clone, second));
    // A stream of changes holds it, too.
    let mut told = [next(&mut changes).await, next(&mut changes).await];
    told.sort();
    assert_eq!(told, ["+10.0.0.1:80", "+10.0.0.2:80"]);
    delete(&mut client, &json, &endpoint("east", "10.0.0.1:80")).await;
    assert_eq!(next(&mut changes).await, "-10.0.0.1:80");
    let watchers = || async {
        let url = etcd.0.endpoints()[0].clone();
        let page = crate::faults::get(&url, "/metrics").await;
        let line = page
            .lines()
            .find(|line| line.starts_with("etcd_debugging_mvcc_watcher_total"))
            .unwrap()
            .to_owned();
        line.rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!(watchers().await, "2");
    drop(changes);
    timeout(SOON, async {
        while watchers().await != "1" {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    live(&another, true).await;
}

#[tokio::test]
async fn nothing_is_lost_between_the_list_and_the_watch() {
    const ENDPOINTS: usize = 300;
    const LISTS: usize = 20;
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    // Somebody writes all the time, and lists are followed meanwhile.
    let written = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&written);
    let writer = tokio::spawn(async move {
        for port in 1..=ENDPOINTS {
            let endpoint = endpoint("east", &format!("10.0.0.1:{port}"));
            put(&mut client, &Format::Json, &endpoint).await;
            if port % 3 == 0 {
                delete(&mut client, &Format::Json, &endpoint).await;
            }
            counted.store(port, Ordering::SeqCst);
        }
    });
    let discovery = etcd.discovery().await;
    let mut lists = Vec::new();
    for number in 0..LISTS {
        let some = number * ENDPOINTS / LISTS;
        until("some more", || written.load(Ordering::SeqCst) >= some).await;
        let list = discovery.service("shop", "web").unwrap();
        lists.push((list.changes(), list));
    }
    writer.await.unwrap();
    let wanted = ENDPOINTS - ENDPOINTS / 3;
    for (mut changes, list) in lists {
        until("the whole list", || list.snapshot().len() == wanted).await;
        // And who was told of changes only has it, too.
        let all: BTreeSet<Id> = list.snapshot().iter().map(|e| e.id().clone()).collect();
        let mut known = BTreeSet::new();
        while known != all {
            match timeout(SOON, changes.next()).await.unwrap().unwrap() {
                Change::Added(endpoint) => assert!(known.insert(endpoint.id().clone())),
                Change::Removed(endpoint) => assert!(known.remove(endpoint.id())),
                Change::Changed { .. } => panic!("none was changed"),
            }
        }
    }
}

#[tokio::test]
async fn a_slow_reader_sees_what_became_of_it() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let json = Format::Json;
    let web = etcd.discovery().await.service("shop", "web").unwrap();
    ready(&web).await;
    let mut slow = web.changes();
    let mut fast = web.changes();
    for port in 1..=20 {
        let endpoint = endpoint("east", &format!("10.0.0.1:{port}"));
        put(&mut client, &json, &endpoint).await;
        assert_eq!(next(&mut fast).await, format!("+10.0.0.1:{port}"));
        if port > 2 {
            delete(&mut client, &json, &endpoint).await;
            assert_eq!(next(&mut fast).await, format!("-10.0.0.1:{port}"));
        }
    }
    // Eighteen came and went.
    let told = [slow.next().await.unwrap(), slow.next().await.unwrap()];
    assert_eq!(told.each_ref().map(text), ["+10.0.0.1:1", "+10.0.0.1:2"]);
    delete(&mut client, &json, &endpoint("east", "10.0.0.1:1")).await;
    assert_eq!(next(&mut slow).await, "-10.0.0.1:1");
}
