//! What a registration does while etcd fails, and after.

use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Permission, PermissionType};
use etcd_registrar::registration::{Registrar, Settings, State};

use crate::{Etcd, KEY, SHORT, SOON, TTL, get, put, registered, registrar, stands, state, web};

/// A proxy before an etcd, and the settings that lead through it.
fn through_proxy(etcd: &Etcd) -> (testbed::Proxy, Settings) {
    let proxy = testbed::Proxy::start(etcd.0.client_ports()[0]).unwrap();
    let settings = Settings {
        endpoints: vec![proxy.url("http")],
        ..Settings::default()
    };
    (proxy, settings)
}

#[tokio::test]
async fn a_lease_that_is_lost_is_replaced_at_once() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let registration = registrar(&etcd).await.register(TTL, [web()]).unwrap();
    registered(&registration).await;
    let (value, lease) = get(&mut client, KEY).await.unwrap();
    client.lease_revoke(lease).await.unwrap();
    let back = stands(&mut client, KEY, |found| {
        found.is_some_and(|(_, other)| other != lease)
    });
    assert_eq!(back.await.unwrap().0, value);
    registered(&registration).await;
}

#[tokio::test]
async fn an_etcd_that_is_stopped_and_started_keeps_the_record() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let registration = registrar(&etcd).await.register(TTL, [web()]).unwrap();
    registered(&registration).await;
    let before = get(&mut client, KEY).await;
    etcd.does(testbed::Etcd::kill).await;
    state(
        &registration,
        |state| matches!(state, State::Waiting(Some(why)) if !why.is_empty()),
    )
    .await;
    // What is wanted meanwhile is done later.
    registration.update([web().weight(7).unwrap()]).unwrap();
    etcd.does(testbed::Etcd::start).await;
    registered(&registration).await;
    let mut client = etcd.client().await;
    let (value, lease) = get(&mut client, KEY).await.unwrap();
    assert!(value.contains("\"weight\":7"), "{value}");
    assert_eq!(Some(lease), before.map(|(_, lease)| lease));
}

#[tokio::test]
async fn an_etcd_that_stood_still_past_the_ttl_gets_the_record_again() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let registration = registrar(&etcd).await.register(SHORT, [web()]).unwrap();
    registered(&registration).await;
    etcd.does(testbed::Etcd::freeze).await;
    state(&registration, |state| matches!(state, State::Waiting(_))).await;
    tokio::time::sleep(SHORT + Duration::from_secs(1)).await;
    etcd.does(testbed::Etcd::thaw).await;
    registered(&registration).await;
    let lease = get(&mut client, KEY).await.unwrap().1;
    client.lease_keep_alive(lease).await.unwrap();
}

#[tokio::test]
async fn a_wiped_etcd_gets_the_record_again_and_another_s_key_there_is_left_alone() {
    let etcd = Etcd::start().await;
    let registrar = registrar(&etcd).await;
    // Its key is the first of this etcd ...
    let registration = registrar.register(TTL, [web()]).unwrap();
    registered(&registration).await;
    etcd.does(|etcd| {
        etcd.kill()?;
        etcd.wipe()?;
        etcd.start()
    })
    .await;
    registered(&registration).await;
    let mut client = etcd.client().await;
    stands(&mut client, KEY, |found| found.is_some()).await;

    // ... and another writer's is, of the next: its create revision is the same.
    let (proxy, settings) = through_proxy(&etcd);
    let cut = Registrar::connect(settings).await.unwrap();
    registration.close().await.unwrap();
    let registration = cut.register(TTL, [web()]).unwrap();
    registered(&registration).await;
    let created = client.get(KEY, None).await.unwrap().kvs()[0].create_revision();
    proxy.refuse(true);
    proxy.reset();
    etcd.does(|etcd| {
        etcd.kill()?;
        etcd.wipe()?;
        etcd.start()
    })
    .await;
    let mut client = etcd.client().await;
    while client
        .put("other", "", None)
        .await
        .unwrap()
        .header()
        .unwrap()
        .revision()
        < created - 1
    {}
    put(&mut client, KEY, "theirs", 0).await;
    let theirs = client.get(KEY, None).await.unwrap().kvs()[0].create_revision();
    assert_eq!(theirs, created);
    proxy.refuse(false);
    state(&registration, |state| {
        matches!(state, State::Conflict { .. })
    })
    .await;
    assert_eq!(get(&mut client, KEY).await, Some(("theirs".into(), 0)));
    registration.close().await.unwrap();
    assert_eq!(get(&mut client, KEY).await, Some(("theirs".into(), 0)));
}

#[tokio::test]
async fn an_answer_that_is_lost_is_read_back() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let (proxy, settings) = through_proxy(&etcd);
    let registrar = Registrar::connect(settings).await.unwrap();
    let registration = registrar.register(TTL, [web()]).unwrap();
    registered(&registration).await;
    let changes =
        async |client: &mut Client| client.get(KEY, None).await.unwrap().kvs()[0].version();
    assert_eq!(changes(&mut client).await, 1);
    // What it asked for a moment before may be what is not answered, and then the update is not sent: once more.
    for weight in 2..10 {
        let wanted = format!("\"weight\":{weight}");
        let there = |found: Option<(&str, i64)>| found.is_some_and(|(v, _)| v.contains(&wanted));
        let before = changes(&mut client).await;
        // etcd does it, and says so to nobody.
        proxy.set(testbed::Direction::ToClient, testbed::Flow::Hold);
        registration
            .update([web().weight(weight).unwrap()])
            .unwrap();
        let sent =
            tokio::time::timeout(Duration::from_secs(2), stands(&mut client, KEY, there)).await;
        if sent.is_ok() {
            state(&registration, |state| {
                matches!(state, State::Waiting(Some(_)))
            })
            .await;
        }
        proxy.heal();
        registered(&registration).await;
        stands(&mut client, KEY, there).await;
        // It was not put twice.
        assert_eq!(changes(&mut client).await, before + 1);
        if sent.is_ok() {
            return;
        }
    }
    panic!("no update was sent");
}

#[tokio::test]
async fn an_etcd_that_is_away_at_the_start_is_waited_for() {
    let etcd = Etcd::start().await;
    etcd.does(testbed::Etcd::kill).await;
    let registration = registrar(&etcd).await.register(TTL, [web()]).unwrap();
    state(
        &registration,
        |state| matches!(state, State::Waiting(Some(why)) if why.contains("refused")),
    )
    .await;
    etcd.does(testbed::Etcd::start).await;
    registered(&registration).await;
}

#[tokio::test]
async fn what_can_t_be_closed_is_left_to_its_lease() {
    let etcd = Etcd::start().await;
    let registration = registrar(&etcd).await.register(SHORT, [web()]).unwrap();
    registered(&registration).await;
    etcd.does(testbed::Etcd::kill).await;
    let error = tokio::time::timeout(SOON, registration.close())
        .await
        .unwrap()
        .unwrap_err();
    assert!(
        error.to_string().contains("when their lease ends"),
        "{error}"
    );
}

#[tokio::test]
async fn a_refusal_is_said_and_passes_with_the_grant() {
    let etcd = Etcd::start_as(|builder| builder.auth(["/other/"])).await;
    let options = ConnectOptions::new().with_user("root", testbed::ROOT_PASSWORD);
    let mut root = Client::connect(etcd.0.endpoints(), Some(options))
        .await
        .unwrap();
    let settings = Settings {
        endpoints: etcd.0.endpoints().to_vec(),
        user: etcd.0.user().map(Into::into),
        password_file: etcd.0.password_file().map(Into::into),
        ..Settings::default()
    };
    let registrar = Registrar::connect(settings).await.unwrap();
    let registration = registrar.register(TTL, [web()]).unwrap();
    state(
        &registration,
        |state| matches!(state, State::Refused(why) if why.contains("permission denied")),
    )
    .await;
    // That key alone is needed, to read and to write.
    let permission = Permission::new(PermissionType::Readwrite, KEY);
    root.role_grant_permission(testbed::USER, permission)
        .await
        .unwrap();
    registered(&registration).await;
    registration.close().await.unwrap();
}
