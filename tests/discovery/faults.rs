//! What a list is while etcd fails, and after.

use std::time::Duration;

use etcd_client::{Client, CompactionOptions, ConnectOptions, Permission, PermissionType};
use etcd_registrar::discovery::{Discovery, Format, Settings, Source, State};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    Etcd, SOON, addresses, delete, endpoint, live, next, put, put_first, ready, through_proxy,
    until,
};

/// A page of a server, over plain HTTP.
pub(crate) async fn get(url: &str, path: &str) -> String {
    let host = url.strip_prefix("http://").unwrap();
    let mut stream = tokio::net::TcpStream::connect(host).await.unwrap();
    let request = format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    page
}

#[tokio::test]
async fn the_last_known_list_is_kept_with_its_age_while_etcd_is_away() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let json = Format::Json;
    put(&mut client, &json, &endpoint("east", "10.0.0.1:80")).await;
    let web = etcd.discovery().await.service("shop", "web").unwrap();
    ready(&web).await;
    let mut changes = web.changes();
    assert_eq!(next(&mut changes).await, "+10.0.0.1:80");

    for frozen in [true, false] {
        if frozen {
            etcd.does(testbed::Etcd::freeze).await;
        } else {
            etcd.does(testbed::Etcd::kill).await;
        }
        let State::Stale(why) = live(&web, false).await else {
            panic!("{:?}", web.state());
        };
        assert!(!why.is_empty());
        assert_eq!(addresses(&web), ["10.0.0.1:80"]);
        let age = web.age().unwrap();
        until("a greater age", || {
            web.age().unwrap() > age + Duration::from_millis(300)
        })
        .await;
        let age = web.age().unwrap();
        if frozen {
            etcd.does(testbed::Etcd::thaw).await;
        } else {
            etcd.does(testbed::Etcd::start).await;
        }
        live(&web, true).await;
        assert!(web.age().unwrap() < age);
    }
    // All that time nothing was told, and now it goes on.
    put(&mut client, &json, &endpoint("east", "10.0.0.2:80")).await;
    assert_eq!(next(&mut changes).await, "+10.0.0.2:80");
}

#[tokio::test]
async fn an_age_stays_small_while_nothing_changes() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let discovery = etcd.discovery().await;
    let quiet = discovery.service("shop", "web").unwrap();
    let busy = discovery.service("shop", "api").unwrap();
    ready(&quiet).await;
    ready(&busy).await;
    // The list is confirmed although nothing happens to it, and although the stream is never silent.
    let mut last = quiet.age().unwrap();
    let mut confirmed = 0;
    tokio::time::timeout(SOON, async {
        while confirmed < 2 {
            let mut other = endpoint("east", "10.0.0.1:80");
            other.service = "api".into();
            put(&mut client, &Format::Json, &other).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            let age = quiet.age().unwrap();
            confirmed += usize::from(age < last);
            last = age;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn an_etcd_that_is_away_at_the_start_is_waited_for() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    put(&mut client, &Format::Json, &endpoint("east", "10.0.0.1:80")).await;
    let settings = etcd.settings();
    etcd.does(testbed::Etcd::kill).await;
    let web = Discovery::connect(settings)
        .await
        .unwrap()
        .service("shop", "web")
        .unwrap();
    tokio::time::timeout(SOON, async {
        let mut state = web.state();
        while !matches!(&state, State::Waiting(Some(why)) if why.contains("refused")) {
            state = web.state_other_than(&state).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(web.age(), None);
    etcd.does(testbed::Etcd::start).await;
    ready(&web).await;
    assert_eq!(addresses(&web), ["10.0.0.1:80"]);
}

#[tokio::test]
async fn a_wiped_etcd_is_believed() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let json = Format::Json;
    put_first(&mut client, &json, 3).await;
    let web = etcd.discovery().await.service("shop", "web").unwrap();
    ready(&web).await;
    assert_eq!(web.snapshot().len(), 3);
    etcd.does(|etcd| {
        etcd.kill()?;
        etcd.wipe()?;
        etcd.start()
    })
    .await;
    until("an empty list", || web.snapshot().is_empty()).await;
    // The new etcd's revisions are lower than those that were seen.
    let mut client = etcd.client().await;
    put(&mut client, &json, &endpoint("east", "10.0.0.4:80")).await;
    until("the new one", || addresses(&web) == ["10.0.0.4:80"]).await;
    delete(&mut client, &json, &endpoint("east", "10.0.0.4:80")).await;
    until("an empty list again", || web.snapshot().is_empty()).await;
}

#[tokio::test]
async fn what_was_compacted_while_the_connection_was_broken_is_not_missed() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let json = Format::Json;
    put_first(&mut client, &json, 2).await;
    let (proxy, settings) = through_proxy(&etcd);
    let web = Discovery::connect(settings)
        .await
        .unwrap()
        .service("shop", "web")
        .unwrap();
    ready(&web).await;
    let mut changes = web.changes();
    assert_eq!(next(&mut changes).await, "+10.0.0.1:80");
    assert_eq!(next(&mut changes).await, "+10.0.0.2:80");

    proxy.refuse(true);
    proxy.reset();
    live(&web, false).await;
    put(&mut client, &json, &endpoint("east", "10.0.0.3:80")).await;
    let key = crate::record(&json, &endpoint("east", "10.0.0.1:80")).key;
    let gone = client.delete(key, None).await.unwrap();
    let physical = Some(CompactionOptions::new().with_physical());
    client
        .compact(gone.header().unwrap().revision(), physical)
        .await
        .unwrap();
    assert_eq!(addresses(&web), ["10.0.0.1:80", "10.0.0.2:80"]);
    proxy.refuse(false);
    live(&web, true).await;
    assert_eq!(addresses(&web), ["10.0.0.2:80", "10.0.0.3:80"]);
    assert_eq!(next(&mut changes).await, "+10.0.0.3:80");
    assert_eq!(next(&mut changes).await, "-10.0.0.1:80");
}

#[tokio::test]
async fn a_connection_that_leads_nowhere_is_noticed() {
    let etcd = Etcd::start().await;
    let (proxy, settings) = through_proxy(&etcd);
    let web = Discovery::connect(settings)
        .await
        .unwrap()
        .service("shop", "web")
        .unwrap();
    ready(&web).await;
    proxy.black_hole();
    live(&web, false).await;
    proxy.heal();
    live(&web, true).await;
}

#[tokio::test]
async fn a_watch_that_etcd_cancels_is_told_and_tried_again() {
    let etcd = Etcd::start_as(|builder| builder.auth(["/services/"])).await;
    let options = ConnectOptions::new().with_user("root", testbed::ROOT_PASSWORD);
    let mut root = Client::connect(etcd.0.endpoints(), Some(options))
        .await
        .unwrap();
    put(&mut root, &Format::Json, &endpoint("east", "10.0.0.1:80")).await;
    root.put("/secret/web/1", "10.0.0.2:80", None)
        .await
        .unwrap();
    let discovery = etcd.discovery().await;
    let web = discovery.service("shop", "web").unwrap();
    let secret = || Source::prefix(Format::Plain, "/secret/").unwrap();
    let secrets = [discovery.follow(secret()), discovery.follow(secret())];
    for secret in &secrets {
        tokio::time::timeout(SOON, async {
            let mut state = secret.state();
            while !matches!(&state, State::Waiting(Some(why)) if why.contains("permission denied"))
            {
                state = secret.state_other_than(&state).await;
            }
        })
        .await
        .unwrap();
    }
    // It holds up nobody, nor is it taken for empty; and it is there as soon as it is allowed.
    ready(&web).await;
    assert_eq!(addresses(&web), ["10.0.0.1:80"]);
    root.role_grant_permission(
        testbed::USER,
        Permission::new(PermissionType::Read, "/secret/").with_prefix(),
    )
    .await
    .unwrap();
    for secret in &secrets {
        ready(secret).await;
        assert_eq!(addresses(secret), ["10.0.0.2:80"]);
    }
}

#[tokio::test]
async fn settings_that_can_t_work_are_refused() {
    let error = Discovery::connect(Settings::default()).await.unwrap_err();
    assert!(error.to_string().contains("no etcd endpoint"), "{error}");
}
