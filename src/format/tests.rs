//! The golden records byte for byte, and reading as the inverse of writing.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;

/// Those whose keys end with the address.
const BY_ADDRESS: [Format; 5] = [
    Format::Json,
    Format::Plain,
    Format::Grpc,
    Format::Kitex,
    Format::Hertz,
];

fn formats() -> Vec<Format> {
    BY_ADDRESS.into()
}

fn endpoint(ip: &str) -> Endpoint {
    Endpoint {
        target: Target {
            ip: ip.parse().unwrap(),
            port: 8080,
            protocol: Protocol::Tcp,
        },
        port_name: "http".into(),
        scheme: "http".into(),
        cluster: "east".into(),
        namespace: "shop".into(),
        service: "web".into(),
        pod: "web-0".into(),
        uid: "0b9e...".into(),
        node: "n1".into(),
        zone: "eu-a".into(),
        weight: 100,
        metadata: vec![("version".into(), "v1".into())],
    }
}

fn written(format: &Format, prefix: &str, endpoint: Endpoint) -> (String, String) {
    let target = endpoint.target;
    let mut records = format.records(&Place { prefix }, &[endpoint]);
    assert_eq!(records.len(), 1);
    let record = records.pop().unwrap();
    assert_eq!(record.targets, [target]);
    (record.key, String::from_utf8(record.value).unwrap())
}

#[test]
fn golden_json() {
    assert_eq!(
        written(&Format::Json, "/services/", endpoint("10.1.2.3")),
        (
            "/services/shop/web/east/10.1.2.3:8080".into(),
            r#"{"address":"10.1.2.3:8080","host":"10.1.2.3","port":8080,"portName":"http","protocol":"TCP","scheme":"http","family":"IPv4","cluster":"east","namespace":"shop","service":"web","pod":"web-0","uid":"0b9e...","node":"n1","zone":"eu-a","weight":100,"metadata":{"version":"v1"}}"#.into()
        )
    );
    assert_eq!(
        written(&Format::Json, "/services/", endpoint("fd00::3")),
        (
            "/services/shop/web/east/[fd00::3]:8080".into(),
            r#"{"address":"[fd00::3]:8080","host":"fd00::3","port":8080,"portName":"http","protocol":"TCP","scheme":"http","family":"IPv6","cluster":"east","namespace":"shop","service":"web","pod":"web-0","uid":"0b9e...","node":"n1","zone":"eu-a","weight":100,"metadata":{"version":"v1"}}"#.into()
        )
    );
}

#[test]
fn golden_plain() {
    assert_eq!(
        written(&Format::Plain, "/", endpoint("10.1.2.3")),
        ("/web/10.1.2.3:8080".into(), "10.1.2.3:8080".into())
    );
    assert_eq!(
        written(&Format::Plain, "/", endpoint("fd00::3")),
        ("/web/[fd00::3]:8080".into(), "[fd00::3]:8080".into())
    );
    let rpc = Endpoint {
        service: "web.rpc".into(),
        ..endpoint("10.1.2.3")
    };
    assert_eq!(
        written(&Format::Plain, "", rpc),
        ("web.rpc/10.1.2.3:8080".into(), "10.1.2.3:8080".into())
    );
}

#[test]
fn golden_grpc() {
    assert_eq!(
        written(&Format::Grpc, "", endpoint("10.1.2.3")),
        (
            "web/10.1.2.3:8080".into(),
            r#"{"Op":0,"Addr":"10.1.2.3:8080","Metadata":null}"#.into()
        )
    );
    assert_eq!(
        written(&Format::Grpc, "", endpoint("fd00::3")),
        (
            "web/[fd00::3]:8080".into(),
            r#"{"Op":0,"Addr":"[fd00::3]:8080","Metadata":null}"#.into()
        )
    );
}

#[test]
fn golden_kitex_and_hertz() {
    for (format, prefix) in [
        (Format::Kitex, "kitex/registry-etcd/"),
        (Format::Hertz, "hertz/registry-etcd/"),
    ] {
        assert_eq!(format.default_prefix(), prefix);
        for (ip, address) in [("10.1.2.3", "10.1.2.3:8080"), ("fd00::3", "[fd00::3]:8080")] {
            assert_eq!(
                written(&format, prefix, endpoint(ip)),
                (
                    format!("{prefix}web/{address}"),
                    format!(
                        r#"{{"network":"tcp","address":"{address}","weight":100,"tags":{{"cluster":"east","namespace":"shop","pod":"web-0","zone":"eu-a"}}}}"#
                    )
                )
            );
        }
        let bare = Endpoint {
            zone: String::new(),
            ..endpoint("10.1.2.3")
        };
        let (_, value) = written(&format, prefix, bare);
        assert!(value.ends_with(r#""pod":"web-0"}}"#), "{value}");
    }
}

#[test]
fn what_is_unknown_is_empty_in_json() {
    let bare = Endpoint {
        scheme: String::new(),
        node: String::new(),
        zone: String::new(),
        metadata: Vec::new(),
        ..endpoint("10.1.2.3")
    };
    let (_, value) = written(&Format::Json, "/services/", bare);
    assert!(value.contains(r#""scheme":"","#), "{value}");
    assert!(
        value.ends_with(r#""node":"","zone":"","weight":100,"metadata":{}}"#),
        "{value}"
    );
}

#[test]
fn addresses_are_written_as_rfc_5952_says() {
    for (ip, shown) in [
        ("FD00:0:0:0:0:0:0:A", "[fd00::a]:8080"),
        ("2001:db8:0:1:1:1:1:1", "[2001:db8:0:1:1:1:1:1]:8080"),
        ("2001:db8:0:0:1:0:0:1", "[2001:db8::1:0:0:1]:8080"),
        ("::ffff:10.1.2.3", "[::ffff:10.1.2.3]:8080"),
    ] {
        assert_eq!(written(&Format::Plain, "/", endpoint(ip)).1, shown);
    }
}

#[test]
fn one_key_is_given_once() {
    let second = Endpoint {
        port_name: "dns".into(),
        target: Target {
            protocol: Protocol::Udp,
            ..endpoint("10.1.2.3").target
        },
        ..endpoint("10.1.2.3")
    };
    for format in BY_ADDRESS {
        let records = format.records(
            &Place { prefix: "p/" },
            &[endpoint("10.1.2.3"), second.clone(), endpoint("fd00::3")],
        );
        assert_eq!(records.len(), 2, "{format:?}");
        assert_eq!(records[0].targets, [endpoint("10.1.2.3").target]);
    }
}

#[test]
fn readers_take_what_others_write() {
    // A later version's member, and one that is left out.
    let found = Format::Json
        .read(
            "/s/",
            b"/s/shop/web/east/10.1.2.3:80",
            br#"{"address":"10.1.2.3:80","host":"10.1.2.3","port":80,"colour":"blue"}"#,
        )
        .unwrap();
    assert_eq!((found.cluster.as_deref(), found.uid), (Some("east"), None));
    // go-zero's own publisher: a lease id in the key.
    let found = Format::Plain
        .read("", b"web.rpc/7587", b"10.1.2.3:80")
        .unwrap();
    assert_eq!(found.address, "10.1.2.3:80");
    let target = Target {
        port: 80,
        ..endpoint("10.1.2.3").target
    };
    assert!(
        found.holds(&target),
        "a protocol that is not told can be any"
    );
    assert_eq!(found.target(), None);
    // etcd's own client, with metadata as an object, and a name instead of an address.
    let found = Format::Grpc
        .read(
            "",
            b"web/a",
            br#"{"Op":0,"Addr":"db.example:80","Metadata":{"a":1}}"#,
        )
        .unwrap();
    assert_eq!(
        (found.address.as_str(), found.socket),
        ("db.example:80", None)
    );
    // Kitex's own registry, without tags.
    let found = Format::Kitex
        .read(
            "",
            b"web/10.1.2.3:80",
            br#"{"network":"tcp","address":"10.1.2.3:80","weight":10,"tags":null}"#,
        )
        .unwrap();
    assert_eq!((found.target(), found.weight), (Some(target), Some(10)));
}

#[test]
fn what_is_no_record_is_refused() {
    let (json, plain, grpc) = (Format::Json, Format::Plain, Format::Grpc);
    let kitex = Format::Kitex;
    let good = br#"{"address":"10.1.2.3:80","host":"10.1.2.3","port":80}"#;
    for (format, key, value) in [
        (&json, &b"/s/shop/web/east/10.1.2.3:81"[..], &good[..]),
        (&json, b"/s/shop/web/10.1.2.3:80", good),
        (&json, b"/s/shop/web/east/x/10.1.2.3:80", good),
        (&json, b"/s/shop//east/10.1.2.3:80", good),
        (&json, b"/x/shop/web/east/10.1.2.3:80", good),
        (&json, b"/s/shop/web/east/10.1.2.3:80", b"null"),
        (
            &json,
            b"/s/shop/web/east/10.1.2.3:80",
            br#"{"address":"10.1.2.3:80","host":"10.1.2.4","port":80}"#,
        ),
        (
            &json,
            b"/s/shop/web/east/10.1.2.3:80",
            br#"{"address":"10.1.2.3:80","host":"10.1.2.3","port":80,"cluster":"west"}"#,
        ),
        (
            &json,
            b"/s/shop/web/east/10.1.2.3:80",
            br#"{"address":"10.1.2.3:80","host":"10.1.2.3","port":80,"protocol":"tcp"}"#,
        ),
        (&json, b"/s/\xff/web/east/10.1.2.3:80", good),
        (&plain, b"/s/web/x", b""),
        (&plain, b"/s/web/x", b"\xff"),
        (&plain, b"/s/web/x", b"10.1.2.3:80\n"),
        (&plain, b"/s/web", b"10.1.2.3:80"),
        (&plain, b"/s/web/", b"10.1.2.3:80"),
        (&grpc, b"/s/web/x", b"10.1.2.3:80"),
        (&grpc, b"/s/web/x", br#"{"Op":0,"Addr":""}"#),
        (&grpc, b"/s/web/x", br#"{"Op":0}"#),
        (&kitex, b"/s/web/x", b"10.1.2.3:80"),
        (&kitex, b"/s/web/x", b"null"),
        (
            &kitex,
            b"/s/web/x",
            br#"{"network":"tcp","address":"","weight":10,"tags":null}"#,
        ),
        (&kitex, b"/s/web/x", br#"{"network":"tcp","weight":10}"#),
        (
            &kitex,
            b"/s/web",
            br#"{"network":"tcp","address":"10.1.2.3:80"}"#,
        ),
    ] {
        assert!(
            format.read("/s/", key, value).is_err(),
            "{format:?} {key:?} {value:?}"
        );
    }
}

#[test]
fn the_cluster_is_read_from_the_key() {
    let json = Format::Json;
    assert_eq!(
        json.cluster_of("/s/", b"/s/shop/web/east/1.2.3.4:5"),
        Some("east")
    );
    for key in [
        &b"/s/shop/web/east"[..],
        b"/s/shop/web//x",
        b"/x/shop/web/east/y",
        b"/s/a/b/c/d/e",
        b"/s/a/b/\xff/d",
    ] {
        assert_eq!(json.cluster_of("/s/", key), None, "{key:?}");
    }
    assert_eq!(Format::Plain.cluster_of("/", b"/web/1.2.3.4:5"), None);
}

fn label() -> impl Strategy<Value = String> {
    "[a-z0-9]([-a-z0-9]{0,8}[a-z0-9])?"
}

prop_compose! {
    fn endpoints()(
        ip in prop_oneof![
            any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from(bits))),
            any::<u128>().prop_map(|bits| IpAddr::V6(Ipv6Addr::from(bits))),
        ],
        port in 1_u16..,
        protocol in prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)],
        names in (label(), label(), label(), "[A-Za-z0-9]([A-Za-z0-9_-]{0,8}[A-Za-z0-9])?"),
        texts in ("[a-z]{0,5}", "[a-z0-9.-]{1,12}", "[a-f0-9-]{1,36}", "[a-z]{0,5}", ".{0,5}"),
        weight in 1_u32..=65_535,
        metadata in proptest::collection::btree_map("\\PC{1,8}", any::<String>(), 0..4),
    ) -> Endpoint {
        let (port_name, cluster, namespace, service) = names;
        let (scheme, pod, uid, node, zone) = texts;
        let metadata: BTreeMap<String, String> = metadata;
        Endpoint {
            target: Target { ip, port, protocol },
            port_name, scheme, cluster, namespace, service, pod, uid, node, zone, weight,
            metadata: metadata.into_iter().collect(),
        }
    }
}

fn prefixes() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        Just("/".to_owned()),
        "/?([a-z.]{1,4}/){1,3}",
    ]
}

proptest! {
    #[test]
    fn reading_is_the_inverse_of_writing(endpoint in endpoints(), prefix in prefixes()) {
        for format in formats() {
            let place = Place { prefix: &prefix };
            let record = format.records(&place, std::slice::from_ref(&endpoint)).pop().unwrap();
            let scope = format.scope(&prefix, &endpoint.namespace, &endpoint.service);
            prop_assert!(record.key.starts_with(&scope));
            let found = format.read(&prefix, record.key.as_bytes(), &record.value).unwrap();
            prop_assert_eq!(&found.address, &endpoint.target.host_port());
            prop_assert_eq!(&found.service, &endpoint.service);
            prop_assert!(found.holds(&endpoint.target));
            let keys = format.keys(&place, std::slice::from_ref(&endpoint));
            prop_assert_eq!(keys, [(record.key.clone(), record.targets.clone())]);
            if format == Format::Json {
                prop_assert_eq!(format.cluster_of(&prefix, record.key.as_bytes()), Some(endpoint.cluster.as_str()));
                prop_assert_eq!(found.endpoint(), Some(endpoint.clone()));
            }
        }
    }

    #[test]
    fn reading_never_panics(key in any::<Vec<u8>>(), value in any::<Vec<u8>>(), text in ".{0,40}") {
        for format in formats() {
            for prefix in ["", "/s/"] {
                let below = [prefix.as_bytes(), b"a/b/c/", &key].concat();
                for key in [&key, &below] {
                    let _ = format.cluster_of(prefix, key);
                    let _ = format.read(prefix, key, &value);
                    let _ = format.read(prefix, key, text.as_bytes());
                }
            }
        }
    }

    /// Records that are damaged at one place: nearer to the truth than any bytes.
    #[test]
    fn reading_never_panics_on_damaged_records(
        endpoint in endpoints(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        for format in formats() {
            let place = Place { prefix: "/s/" };
            let record = format.records(&place, std::slice::from_ref(&endpoint)).pop().unwrap();
            let mut value = record.value.clone();
            let place = at.index(value.len());
            value[place] = byte;
            let _ = format.read("/s/", record.key.as_bytes(), &value);
            let mut key = record.key.into_bytes();
            let place = at.index(key.len());
            key[place] = byte;
            let _ = format.read("/s/", &key, &record.value);
        }
    }
}
