//! What is registered, and what others do to it.

use std::time::Duration;

use etcd_registrar::discovery::{Discovery, Settings, Source};
use etcd_registrar::format::sky_dns::SkyDns;
use etcd_registrar::format::template::{self, Template};
use etcd_registrar::format::traefik::Kind;
use etcd_registrar::registration::{Format, RegistrationError, State};

use crate::{
    Etcd, KEY, SOON, TTL, all_keys, get, instance, put, registered, registrar, stands, state, web,
};

#[tokio::test]
async fn a_registration_stands_until_it_is_closed() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let registrar = registrar(&etcd).await;
    let two = [
        web().zone("eu-a").metadata("version", "v2"),
        instance("[fd00::3]:8080"),
    ];
    let registration = registrar.register(TTL, two).unwrap();
    registered(&registration).await;
    assert_eq!(
        registration.keys(),
        [KEY, "/services/shop/web/vm/[fd00::3]:8080"]
    );
    assert_eq!(all_keys(&mut client).await, registration.keys());
    let (value, lease) = get(&mut client, KEY).await.unwrap();
    assert_eq!(
        value,
        r#"{"address":"10.0.0.5:8080","host":"10.0.0.5","port":8080,"portName":"main","protocol":"TCP","scheme":"","family":"IPv4","cluster":"vm","namespace":"shop","service":"web","pod":"ip-10-0-0-5-8080","uid":"1","node":"","zone":"eu-a","weight":100,"metadata":{"version":"v2"}}"#
    );
    // Both stand on one lease, with the TTL that was asked for.
    let other = get(&mut client, &registration.keys()[1]).await.unwrap();
    assert_eq!(other.1, lease);
    let told = client.lease_time_to_live(lease, None).await.unwrap();
    assert_eq!(told.granted_ttl(), 30);

    registration.close().await.unwrap();
    assert_eq!(registration.state(), State::Closed);
    assert!(all_keys(&mut client).await.is_empty());
    assert!(client.leases().await.unwrap().leases().is_empty());
    registration.close().await.unwrap();
    assert_eq!(registration.update([]), Err(RegistrationError::Closed));
}

#[tokio::test]
async fn every_format_is_registered_and_found() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let registrar = registrar(&etcd).await;
    let discovery = Discovery::connect(Settings {
        endpoints: etcd.0.endpoints().to_vec(),
        ..Settings::default()
    })
    .await
    .unwrap();
    let template = Template::new(template::Source {
        key: "tried/{{ service }}/{{ pod }}".into(),
        value: "{{ addr }}".into(),
        json: false,
        ttl: 30,
        labels: Vec::new(),
        annotations: Vec::new(),
    });
    for (format, prefix) in [
        (Format::Json, "/services/"),
        (Format::Plain, "/"),
        (Format::Grpc, "grpc/"),
        (Format::Kitex, "kitex/registry-etcd/"),
        (Format::Hertz, "hertz/registry-etcd/"),
        (Format::Kratos, "/microservices/"),
        (Format::SkyDns(SkyDns::default()), "/skydns/local/skydns/"),
        (Format::GoMicro, "/micro/registry/"),
        (Format::Traefik(Kind::default()), "traefik/"),
        (Format::Template(Some(template.unwrap())), "tried/"),
    ] {
        let name = format.name();
        let of = |address: &str| {
            let made = instance(address).scheme("http").unwrap();
            made.format(format.clone(), prefix).unwrap()
        };
        let both = [of("10.0.0.5:8080"), of("[fd00::3]:8080")];
        let registration = registrar.register(TTL, both).unwrap();
        registered(&registration).await;
        let source = Source::service_in(format.clone(), prefix, "shop", "web").unwrap();
        let list = discovery.follow(source);
        tokio::time::timeout(SOON, list.ready()).await.unwrap();
        let mut found: Vec<_> = list
            .snapshot()
            .iter()
            .map(|endpoint| endpoint.address().trim_start_matches("http://").to_owned())
            .collect();
        found.sort();
        assert_eq!(found, ["10.0.0.5:8080", "[fd00::3]:8080"], "{name}");
        // go-micro's watcher sees one key of an expired lease go.
        let mut leases = std::collections::BTreeSet::new();
        for key in registration.keys() {
            leases.insert(get(&mut client, &key).await.unwrap().1);
        }
        let wanted = if name == "GoMicro" { 2 } else { 1 };
        assert_eq!(leases.len(), wanted, "{name}");
        registration.close().await.unwrap();
        assert!(all_keys(&mut client).await.is_empty(), "{name}");
    }
    assert!(client.leases().await.unwrap().leases().is_empty());
}

#[tokio::test]
async fn an_update_changes_what_differs_and_nothing_else() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let registrar = registrar(&etcd).await;
    let other = instance("10.0.0.6:8080");
    let registration = registrar.register(TTL, [web(), other.clone()]).unwrap();
    registered(&registration).await;
    let revision = |answer: etcd_client::GetResponse| answer.kvs()[0].mod_revision();
    let other_key = "/services/shop/web/vm/10.0.0.6:8080";
    let before = revision(client.get(other_key, None).await.unwrap());
    // As fast as it is asked for: the rest between two puts is for what others do.
    for weight in 1..=5 {
        let heavier = web().weight(weight).unwrap();
        registration.update([heavier, other.clone()]).unwrap();
        registered(&registration).await;
        let (value, _) = get(&mut client, KEY).await.unwrap();
        assert!(value.contains(&format!("\"weight\":{weight},")), "{value}");
    }
    assert_eq!(revision(client.get(other_key, None).await.unwrap()), before);
    // Another address is another key, and none at all is fine.
    registration.update([instance("10.0.0.7:80")]).unwrap();
    registered(&registration).await;
    assert_eq!(
        all_keys(&mut client).await,
        ["/services/shop/web/vm/10.0.0.7:80"]
    );
    registration.update([]).unwrap();
    registered(&registration).await;
    assert!(all_keys(&mut client).await.is_empty());
    registration.update([web()]).unwrap();
    registered(&registration).await;
    assert_eq!(all_keys(&mut client).await, [KEY]);
    // What can't be registered changes nothing.
    registration.update([web(), web()]).unwrap_err();
    assert_eq!(registration.keys(), [KEY]);
    assert_eq!(registration.state(), State::Registered);
}

#[tokio::test]
async fn what_is_deleted_or_altered_by_hand_comes_back() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let registrar = registrar(&etcd).await;
    let registration = registrar.register(TTL, [web()]).unwrap();
    registered(&registration).await;
    let ours = get(&mut client, KEY).await.unwrap();
    let back = |found: Option<(&str, i64)>| found == Some((&ours.0, ours.1));

    client.delete(KEY, None).await.unwrap();
    stands(&mut client, KEY, back).await;
    // As `etcdctl put` does, which takes it from its lease.
    put(&mut client, KEY, "x", 0).await;
    stands(&mut client, KEY, back).await;
    let lease = client.lease_grant(600, None).await.unwrap().id();
    put(&mut client, KEY, &ours.0, lease).await;
    stands(&mut client, KEY, back).await;
    registered(&registration).await;

    // What was altered a moment before goes all the same.
    put(&mut client, KEY, "y", 0).await;
    state(&registration, |state| *state != State::Registered).await;
    registration.close().await.unwrap();
    assert_eq!(get(&mut client, KEY).await, None);
    // Nor does it stay when it is not wanted any more.
    let registration = registrar.register(TTL, [web()]).unwrap();
    registered(&registration).await;
    put(&mut client, KEY, "z", 0).await;
    state(&registration, |state| *state != State::Registered).await;
    registration.update([]).unwrap();
    registered(&registration).await;
    assert_eq!(get(&mut client, KEY).await, None);
}

#[tokio::test]
async fn a_key_of_another_writer_is_left_alone_and_taken_when_it_is_free() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let lease = client.lease_grant(600, None).await.unwrap().id();
    put(
        &mut client,
        KEY,
        r#"{"address":"10.0.0.5:8080","host":"10.0.0.5","port":8080,"pod":"other"}"#,
        lease,
    )
    .await;
    let before = get(&mut client, KEY).await;
    let registrar = registrar(&etcd).await;
    let other = "/services/shop/web/vm/10.0.0.6:8080";
    let registration = registrar
        .register(TTL, [web(), instance("10.0.0.6:8080")])
        .unwrap();
    let conflict = state(&registration, |state| {
        matches!(state, State::Conflict { .. })
    })
    .await;
    let State::Conflict { key, owner } = conflict else {
        panic!("{conflict:?}");
    };
    assert_eq!(key, KEY);
    assert_eq!(
        owner,
        format!("cluster \"vm\", pod \"other\", lease {lease:016x}")
    );
    // The others are registered, and what it holds stays, however often it changes.
    stands(&mut client, other, |found| found.is_some()).await;
    assert_eq!(get(&mut client, KEY).await, before);
    put(&mut client, KEY, "changed", 0).await;
    state(
        &registration,
        |state| matches!(state, State::Conflict { owner, .. } if owner == "without a lease"),
    )
    .await;
    registration.update([instance("10.0.0.6:8080")]).unwrap();
    registered(&registration).await;
    registration
        .update([web(), instance("10.0.0.6:8080")])
        .unwrap();
    state(&registration, |state| {
        matches!(state, State::Conflict { .. })
    })
    .await;
    assert_eq!(get(&mut client, KEY).await, Some(("changed".into(), 0)));

    client.delete(KEY, None).await.unwrap();
    registered(&registration).await;
    assert!(
        get(&mut client, KEY)
            .await
            .unwrap()
            .0
            .contains("\"uid\":\"1\"")
    );
}

#[tokio::test]
async fn of_two_registrations_of_one_key_the_second_waits_for_the_first() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let registrar = registrar(&etcd).await;
    let first = registrar.register(TTL, [web()]).unwrap();
    registered(&first).await;
    let second = registrar.register(TTL, [web().uid("2")]).unwrap();
    let conflict = |state: &State| matches!(state, State::Conflict { key, owner } if key == KEY && owner.contains("uid \"1\""));
    state(&second, conflict).await;
    first.update([web().weight(7).unwrap()]).unwrap();
    registered(&first).await;
    assert!(
        get(&mut client, KEY)
            .await
            .unwrap()
            .0
            .contains("\"weight\":7")
    );
    first.close().await.unwrap();
    registered(&second).await;
    assert!(
        get(&mut client, KEY)
            .await
            .unwrap()
            .0
            .contains("\"uid\":\"2\"")
    );
}

#[tokio::test]
async fn a_registration_that_is_dropped_ends_with_its_lease() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    let registrar = registrar(&etcd).await;
    // Long enough for a busy machine to keep it alive in time.
    let ttl = Duration::from_secs(10);
    let registration = registrar.register(ttl, [web()]).unwrap();
    registered(&registration).await;
    // It is kept for longer than its TTL, which only time can show.
    let lease = get(&mut client, KEY).await.unwrap().1;
    tokio::time::sleep(ttl + Duration::from_secs(2)).await;
    assert_eq!(get(&mut client, KEY).await.unwrap().1, lease);
    drop(registration);
    assert!(get(&mut client, KEY).await.is_some());
    stands(&mut client, KEY, |found| found.is_none()).await;
}

#[tokio::test]
async fn what_can_t_be_registered_is_refused_at_once() {
    let etcd = Etcd::start().await;
    let registrar = registrar(&etcd).await;
    for ttl in [
        Duration::from_secs(4),
        Duration::from_millis(5_500),
        Duration::from_secs(86_401),
    ] {
        let refused = registrar.register(ttl, [web()]).unwrap_err();
        assert_eq!(refused, RegistrationError::Ttl(ttl));
    }
    let twice = registrar.register(TTL, [web(), web()]).unwrap_err();
    assert!(twice.to_string().contains(KEY), "{twice}");
}
