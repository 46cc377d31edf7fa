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

/// A template of usual size.
fn template(key: &str, value: &str) -> Format {
    let source = template::Source {
        key: key.into(),
        value: value.into(),
        json: false,
        ttl: 60,
        labels: vec!["version".into()],
        annotations: vec!["note".into()],
    };
    Format::Template(Some(Template::new(source).unwrap()))
}

fn formats() -> Vec<Format> {
    let mut formats = BY_ADDRESS.to_vec();
    formats.extend([
        Format::Kratos,
        Format::SkyDns(SkyDns::default()),
        Format::GoMicro,
        Format::Traefik(Kind::Http),
        Format::Traefik(Kind::Tcp),
        Format::Traefik(Kind::Udp),
        Format::Apisix,
        Format::Template(None),
    ]);
    formats
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
fn golden_kratos() {
    for (ip, last, address) in [
        ("10.1.2.3", "v4", "10.1.2.3:8080"),
        ("fd00::3", "v6", "[fd00::3]:8080"),
    ] {
        assert_eq!(
            written(&Format::Kratos, "/microservices/", endpoint(ip)),
            (
                format!("/microservices/web/east.shop.web-0.{last}"),
                format!(
                    r#"{{"id":"east.shop.web-0.{last}","name":"web","version":"v1","metadata":{{"cluster":"east","namespace":"shop","pod":"web-0","weight":"100","zone":"eu-a"}},"endpoints":["http://{address}"]}}"#
                )
            )
        );
    }
    // All ports of a pod and family are one instance.
    let grpc = |ip| Endpoint {
        port_name: "grpc".into(),
        scheme: "grpc".into(),
        target: Target {
            port: 9090,
            ..endpoint(ip).target
        },
        zone: String::new(),
        metadata: Vec::new(),
        ..endpoint(ip)
    };
    let http = |ip| Endpoint {
        port_name: "http".into(),
        scheme: "http".into(),
        target: endpoint(ip).target,
        ..grpc(ip)
    };
    let endpoints = [
        http("10.1.2.3"),
        http("fd00::3"),
        grpc("10.1.2.3"),
        grpc("fd00::3"),
    ];
    let place = Place {
        prefix: "/microservices/",
    };
    let records = Format::Kratos.records(&place, &endpoints);
    assert_eq!(records.len(), 2);
    let record = &records[1];
    assert_eq!(
        std::str::from_utf8(&record.value).unwrap(),
        r#"{"id":"east.shop.web-0.v6","name":"web","version":"","metadata":{"cluster":"east","namespace":"shop","pod":"web-0","weight":"100"},"endpoints":["http://[fd00::3]:8080","grpc://[fd00::3]:9090"]}"#
    );
    assert_eq!(record.targets, [endpoints[1].target, endpoints[3].target]);
    let keys: Vec<_> = records
        .iter()
        .map(|record| (record.key.clone(), record.targets.clone()))
        .collect();
    assert_eq!(Format::Kratos.keys(&place, &endpoints), Ok(keys));
    let found = Format::Kratos
        .read_all("/microservices/", record.key.as_bytes(), &record.value)
        .unwrap();
    let told: Vec<_> = found
        .iter()
        .map(|found| (found.scheme.as_deref(), &*found.address, found.weight))
        .collect();
    assert_eq!(
        told,
        [
            (Some("http"), "[fd00::3]:8080", Some(100)),
            (Some("grpc"), "[fd00::3]:9090", Some(100)),
        ]
    );
    assert_eq!(Format::Kratos.endpoints_of(2, 2), 4);
    assert!(Format::Kratos.records(&place, &[]).is_empty());
}

#[test]
fn golden_sky_dns() {
    let format = Format::SkyDns(SkyDns::default());
    let prefix = sky_dns::prefix("skydns", "skydns.local");
    for (ip, last) in [("10.1.2.3", "v4"), ("fd00::3", "v6")] {
        assert_eq!(
            written(&format, &prefix, endpoint(ip)),
            (
                format!("/skydns/local/skydns/shop/web/_tcp/_http/east/web-0/{last}"),
                format!(r#"{{"host":"{ip}","port":8080,"weight":100,"ttl":30,"targetstrip":1}}"#)
            )
        );
    }
    assert_eq!(
        format.scope(&prefix, "shop", "web"),
        "/skydns/local/skydns/shop/web/"
    );
    assert_eq!(
        sky_dns::prefix("dns", "a.example.org"),
        "/dns/org/example/a/"
    );
    // What is no label of DNS becomes one, and always the same.
    for (pod, label) in [
        ("any", "d6a7cd2a7371b1a15d543196979ff74f"),
        ("web.0", "2acf1e4b3d23bb9c60449bac6c378c9c"),
    ] {
        let pod = Endpoint {
            pod: pod.into(),
            ..endpoint("10.1.2.3")
        };
        let (key, _) = written(&format, &prefix, pod);
        assert_eq!(
            key,
            format!("/skydns/local/skydns/shop/web/_tcp/_http/east/{label}/v4")
        );
    }
    let long = Endpoint {
        pod: "a".repeat(64),
        target: Target {
            protocol: Protocol::Udp,
            ..endpoint("10.1.2.3").target
        },
        ..endpoint("10.1.2.3")
    };
    let (key, _) = written(&Format::SkyDns(SkyDns { ttl: 5 }), &prefix, long);
    assert!(key.starts_with("/skydns/local/skydns/shop/web/_udp/_http/east/"));
    assert!(key.split('/').all(|segment| segment.len() <= 63));
}

#[test]
fn golden_go_micro() {
    assert_eq!(
        written(&Format::GoMicro, "/micro/registry/", endpoint("10.1.2.3")),
        (
            "/micro/registry/web/east.shop.web-0.http.v4".into(),
            r#"{"name":"web","version":"v1","metadata":null,"endpoints":null,"nodes":[{"metadata":{"zone":"eu-a"},"id":"east.shop.web-0.http.v4","address":"10.1.2.3:8080"}]}"#.into()
        )
    );
    let bare = Endpoint {
        zone: String::new(),
        metadata: Vec::new(),
        ..endpoint("fd00::3")
    };
    assert_eq!(
        written(&Format::GoMicro, "/micro/registry/", bare),
        (
            "/micro/registry/web/east.shop.web-0.http.v6".into(),
            r#"{"name":"web","version":"","metadata":null,"endpoints":null,"nodes":[{"metadata":{},"id":"east.shop.web-0.http.v6","address":"[fd00::3]:8080"}]}"#.into()
        )
    );
    let rules = Format::GoMicro.rules();
    assert_eq!((rules.records_per_lease, rules.bundle), (1, Bundle::Alone));
}

#[test]
fn golden_traefik() {
    let records = |kind, endpoint: Endpoint| -> Vec<(String, String)> {
        let place = Place { prefix: "traefik/" };
        let format = Format::Traefik(kind);
        let records = format.records(&place, std::slice::from_ref(&endpoint));
        assert!(
            records
                .iter()
                .all(|record| record.targets == [endpoint.target])
        );
        records
            .into_iter()
            .map(|record| (record.key, String::from_utf8(record.value).unwrap()))
            .collect()
    };
    let http = "traefik/http/services/shop.web.http/loadbalancer/servers";
    for (ip, server, address) in [
        ("10.1.2.3", "1507705758", "10.1.2.3:8080"),
        ("fd00::3", "1252041399", "[fd00::3]:8080"),
    ] {
        assert_eq!(
            records(Kind::Http, endpoint(ip)),
            [
                (format!("{http}/{server}/url"), format!("http://{address}")),
                (format!("{http}/{server}/weight"), "100".into()),
            ]
        );
        for (kind, name) in [(Kind::Tcp, "tcp"), (Kind::Udp, "udp")] {
            assert_eq!(
                records(kind, endpoint(ip)),
                [(
                    format!(
                        "traefik/{name}/services/shop.web.http/loadbalancer/servers/{server}/address"
                    ),
                    address.into()
                )]
            );
        }
    }
    let format = Format::Traefik(Kind::Http);
    assert_eq!(format.rules().bundle, Bundle::Together);
    assert_eq!(
        format.scope("traefik/", "shop", "web"),
        "traefik/http/services/shop.web."
    );
    // The weight belongs to the URL beside it, and is no endpoint of its own.
    let server = format!("{http}/1507705758");
    let weight = format!("{server}/weight");
    assert_eq!(
        format.lead_of(weight.as_bytes()),
        Some(format!("{server}/url").into_bytes())
    );
    assert_eq!(format.lead_of(format!("{server}/url").as_bytes()), None);
    assert_eq!(
        format.read("traefik/", weight.as_bytes(), b"100"),
        Err(ReadError::Beside)
    );
    for member in ["url", "weight", "address"] {
        assert_eq!(
            bundle_of(format!("{server}/{member}").as_bytes()),
            server.as_bytes()
        );
    }
    for key in [
        "/services/shop/web/east/10.1.2.3:8080",
        "a/url",
        "web/loadbalancer/servers//url",
        "web/loadbalancer/servers/1/other",
        "web/servers/1/url",
        "",
    ] {
        assert_eq!(bundle_of(key.as_bytes()), key.as_bytes());
    }
}

#[test]
fn golden_apisix() {
    let place = Place {
        prefix: "/apisix/upstreams/",
    };
    let key = "/apisix/upstreams/east.shop.web.http";
    let head = r#"{"id":"east.shop.web.http","name":"east.shop.web.http","type":"roundrobin","scheme":"http","nodes":["#;
    assert_eq!(
        written(&Format::Apisix, place.prefix, endpoint("10.1.2.3")),
        (
            key.into(),
            format!(
                r#"{head}{{"host":"10.1.2.3","port":8080,"weight":100,"metadata":{{"zone":"eu-a"}}}}]}}"#
            )
        )
    );
    // All endpoints of a port in one record, sorted by host and port, whatever order they come in.
    let bare = Endpoint {
        zone: String::new(),
        weight: 7,
        ..endpoint("fd00::3")
    };
    let high = Endpoint {
        target: Target {
            port: 18080,
            ..endpoint("10.1.2.3").target
        },
        ..bare.clone()
    };
    let ten = Endpoint {
        target: endpoint("10.1.2.10").target,
        ..bare.clone()
    };
    let all = [bare, high, endpoint("10.1.2.3"), ten];
    let records = Format::Apisix.records(&place, &all);
    assert_eq!(records.len(), 1);
    assert_eq!(
        String::from_utf8_lossy(&records[0].value),
        [
            head,
            r#"{"host":"10.1.2.10","port":8080,"weight":7,"metadata":{}},"#,
            r#"{"host":"10.1.2.3","port":8080,"weight":100,"metadata":{"zone":"eu-a"}},"#,
            r#"{"host":"10.1.2.3","port":18080,"weight":7,"metadata":{}},"#,
            r#"{"host":"[fd00::3]","port":8080,"weight":7,"metadata":{}}]}"#,
        ]
        .concat()
    );
    assert_eq!(records[0].targets.len(), 4);
    let found = Format::Apisix
        .read_all(place.prefix, key.as_bytes(), &records[0].value)
        .unwrap();
    let told: Vec<_> = found
        .iter()
        .map(|f| (&*f.address, f.weight, f.zone.as_deref()))
        .collect();
    assert_eq!(
        told,
        [
            ("10.1.2.10:8080", Some(7), None),
            ("10.1.2.3:8080", Some(100), Some("eu-a")),
            ("10.1.2.3:18080", Some(7), None),
            ("[fd00::3]:8080", Some(7), None),
        ]
    );
    assert!(found.iter().all(|f| f.service == "web"
        && f.cluster.as_deref() == Some("east")
        && f.namespace.as_deref() == Some("shop")
        && f.port_name.as_deref() == Some("http")));
    // One port is one record.
    let admin = Endpoint {
        port_name: "admin".into(),
        ..endpoint("10.1.2.3")
    };
    let records = Format::Apisix.records(&place, &[endpoint("10.1.2.3"), admin]);
    assert_eq!(records[1].key, "/apisix/upstreams/east.shop.web.admin");
}

/// One port of the golden service.
fn aggregate(service: &str) -> Aggregate<'_> {
    Aggregate {
        cluster: "east",
        namespace: "shop",
        service,
        port_name: "http",
        scheme: "grpc",
    }
}

#[test]
fn an_upstream_without_an_endpoint_is_no_missing_one() {
    let none: [(Entry<'_>, u32); 0] = [];
    let (value, beyond) = Format::Apisix
        .aggregate_value(&aggregate("web"), none)
        .unwrap();
    assert_eq!(
        (String::from_utf8_lossy(&value).as_ref(), beyond),
        (
            r#"{"id":"east.shop.web.http","name":"east.shop.web.http","type":"roundrobin","scheme":"grpc","nodes":[]}"#,
            0
        )
    );
    let key = b"/apisix/upstreams/east.shop.web.http";
    let prefix = "/apisix/upstreams/";
    assert_eq!(Format::Apisix.read_all(prefix, key, &value), Ok(Vec::new()));
    assert_eq!(
        Format::Apisix.read(prefix, key, &value),
        Err(ReadError::Empty)
    );
}

#[test]
fn the_ids_of_apisix_are_as_long_as_it_takes_them() {
    let place = Place {
        prefix: "/u/upstreams/",
    };
    let id = |service: &str| {
        let key = Format::Apisix.aggregate_key(&place, &aggregate(service));
        key.unwrap().strip_prefix(place.prefix).unwrap().to_owned()
    };
    // `east.shop.` and `.http` have 15 characters.
    let longest = "w".repeat(49);
    assert_eq!(id(&longest), format!("east.shop.{longest}.http"));
    let long = "w".repeat(50);
    let hash = sha256(&format!("east.shop.{long}.http"));
    assert_eq!(
        id(&long),
        format!("east.shop.{}-{}", "w".repeat(45), &hash[..8])
    );
    assert_eq!(id(&long).len(), 64);
    assert_ne!(id(&long), id(&"w".repeat(51)));
    // What keys begin with never ends within a name, and never holds those of another cluster.
    for (service, scope) in [
        ("web", "/u/upstreams/east.shop.web."),
        (
            &*"w".repeat(44),
            &*format!("/u/upstreams/east.shop.{}.", "w".repeat(44)),
        ),
        (&*"w".repeat(45), "/u/upstreams/east.shop."),
        (&*long, "/u/upstreams/east.shop."),
    ] {
        assert_eq!(
            Format::Apisix.scope_in(place.prefix, "east", "shop", service),
            scope
        );
        assert!(format!("{}{}", place.prefix, id(service)).starts_with(scope));
    }
    let cluster = "c".repeat(apisix::MAX_CLUSTER);
    assert_eq!(
        Format::Apisix.scope_in(place.prefix, &cluster, "shop", "web"),
        format!("/u/upstreams/{cluster}.")
    );
    // A shortened id is nobody's that could be told.
    let value = br#"{"nodes":[{"host":"10.1.2.3","port":80,"weight":1}]}"#;
    let key = format!("{}{}", place.prefix, id(&long));
    let found = Format::Apisix
        .read(place.prefix, key.as_bytes(), value)
        .unwrap();
    assert_eq!((found.service, found.cluster), (id(&long), None));
}

#[test]
fn an_upstream_that_is_full_keeps_the_oldest() {
    let targets: Vec<Target> = (0..20_000_u32)
        .map(|number| Target {
            ip: IpAddr::from((0x0a00_0000 + number).to_be_bytes()),
            port: 8080,
            protocol: Protocol::Tcp,
        })
        .collect();
    let entry = |target: &Target| Entry {
        target: *target,
        weight: 100,
        zone: "eu-a",
    };
    // Those with the lowest addresses are the youngest.
    let value = |count: usize| {
        let some = targets.iter().rev().take(count).enumerate();
        let entries = some.map(|(age, target)| (entry(target), age));
        let (value, beyond) = Format::Apisix
            .aggregate_value(&aggregate("web"), entries)
            .unwrap();
        let key = b"/apisix/upstreams/east.shop.web.http";
        let found = Format::Apisix
            .read_all("/apisix/upstreams/", key, &value)
            .unwrap();
        assert_eq!(found.len() + beyond, count);
        let mut found: Vec<_> = found.iter().filter_map(|found| found.socket).collect();
        found.sort_unstable();
        let first = targets[targets.len() - found.len()];
        assert_eq!(found.first().map(|found| found.ip()), Some(first.ip));
        (value.len(), beyond)
    };
    let (bytes, beyond) = value(20_000);
    assert!(
        (apisix::MAX_VALUE - 80..=apisix::MAX_VALUE).contains(&bytes),
        "{bytes}"
    );
    let fit = 20_000 - beyond;
    assert_eq!(value(fit), (bytes, 0));
    assert_eq!(value(fit + 1).1, 1);
}

#[test]
fn golden_templates() {
    for (prefix, key, value, golden_key, golden_value) in [
        (
            "",
            "web/{{ addr }}",
            r#"{"PSM":{{ service|tojson }},"IP":{{ addr|tojson }}}"#,
            "web/ADDR",
            r#"{"PSM":"web","IP":"ADDR"}"#,
        ),
        (
            "/rpcx/",
            "/rpcx/web/tcp@{{ addr }}",
            "weight={{ weight }}",
            "/rpcx/web/tcp@ADDR",
            "weight=100",
        ),
        (
            "/service/default/default/",
            "/service/default/default/web/latest/{{ addr }}",
            r#"{"name":{{ service|tojson }},"metadata":{{ metadata|tojson }}}"#,
            "/service/default/default/web/latest/ADDR",
            r#"{"name":"web","metadata":{"version":"v1"}}"#,
        ),
        (
            "",
            "web/{{ pod }}.{{ family|lower }}",
            r#"{"host":"{{ host }}","port":{{ port }}}"#,
            "web/web-0.FAMILY",
            r#"{"host":"HOST","port":8080}"#,
        ),
        (
            "",
            "{{ service }}/{{ cluster }}/{{ namespace }}/{{ addr|sha256 }}",
            "{% for name in labels %}{{ name }}={{ labels[name] }};{% endfor %}{% if zone == 'eu-a' %}{{ addr }};{% endif %}{{ 'a/b ü'|urlencode }};{{ 'Web.rpc'|dns_label }};{{ 'Web'|dns_label }};{{ 'a.example.org'|reverse_dns }};{{ uid }} {{ node }} {{ port_name }} {{ protocol }} {{ scheme }} {{ ttl }}",
            "web/east/shop/SHA",
            "version=v1;ADDR;a%2Fb%20%C3%BC;9ae9a6f5f2f30e2b3ef5b0e3d4b1a6c7;web;org/example/a;0b9e... n1 http TCP http 60",
        ),
    ] {
        for (ip, host_port) in [("10.1.2.3", "10.1.2.3:8080"), ("fd00::3", "[fd00::3]:8080")] {
            let golden = |text: &str| {
                text.replace("ADDR", host_port)
                    .replace("HOST", ip)
                    .replace("SHA", &sha256(host_port))
                    .replace("FAMILY", if ip.contains(':') { "ipv6" } else { "ipv4" })
                    .replace("9ae9a6f5f2f30e2b3ef5b0e3d4b1a6c7", &sha256("web.rpc")[..32])
            };
            assert_eq!(
                written(&template(key, value), prefix, endpoint(ip)),
                (golden(golden_key), golden(golden_value))
            );
        }
    }
}

#[test]
fn a_template_is_bounded_and_stays_in_its_scope() {
    let try_it = |key: &str, value: &str, json: bool| -> Result<Record, String> {
        let source = template::Source {
            key: key.into(),
            value: value.into(),
            json,
            ttl: 60,
            labels: vec!["version".into()],
            annotations: Vec::new(),
        };
        Template::new(source)?.record(&Place { prefix: "/p/" }, &endpoint("10.1.2.3"))
    };
    let good = "/p/web/{{ addr }}";
    assert!(try_it(good, "x", false).is_ok());
    assert!(try_it(good, r#"{"a":1}"#, true).is_ok());
    let long = "x".repeat(4_000);
    let tojson = format!("{{{{ '\"'{} }}}}", "|tojson".repeat(34));
    let concatenated = format!("{{{{ {} }}}}", vec!["metadata|tojson"; 200].join("~"));
    let nested = "{% for a in metadata %}".repeat(3)
        + &"{{ addr }}".repeat(7_000)
        + &"{% endfor %}".repeat(3);
    for (key, value, json, fragment) in [
        ("/p/{{ addr }}", "x", false, "begin it with \"/p/web/\""),
        ("/p/web2/{{ addr }}", "x", false, "begin it with"),
        ("/p/web/", "{{ addr }}", false, "no segment that is empty"),
        ("/p/web//{{ addr }}", "x", false, "no segment that is empty"),
        ("/p/web/../{{ addr }}", "x", false, "`.` or `..`"),
        ("/p/web/{{ addr }}/", "x", false, "no segment that is empty"),
        ("/p/web/\n{{ addr }}", "x", false, "no control characters"),
        ("/p/web/x", "x", false, "does not tell the address"),
        ("/p/web/x", "{{ host }}", false, "does not tell the address"),
        (
            "/p/web/x",
            "1.2.3.4:5 {{ addr }}",
            false,
            "before any other address",
        ),
        (good, "{{ nothing }}", false, "undefined value"),
        (good, "{{ labels.other }}", false, "listed under `metadata`"),
        (good, "{{ addr|upper }}", false, "unknown filter"),
        (good, "{{ addr", false, "template.value can't be read"),
        (good, "{{ addr }}", true, "gives no JSON"),
        (good, "{% include 'x' %}", false, "is not one of templates"),
        (good, "{% set a = addr %}", false, "is not one of templates"),
        (
            good,
            "{%- with a = addr %}{% endwith %}",
            false,
            "is not one of templates",
        ),
        (
            good,
            "{% for a in [addr ~ addr] %}{% endfor %}",
            false,
            "is not one of templates",
        ),
        (
            good,
            "{% macro a() %}{% endmacro %}",
            false,
            "is not one of templates",
        ),
        (good, "{{ addr * 1000 }}", false, "write no `*`"),
        (good, "{{ {'a': {}}.a ~ addr * 9 }}", false, "write no `*`"),
        (
            good,
            "{{ '}}' ~ addr * 1000 ~ '{{' }}",
            false,
            "write no `*`",
        ),
        (
            &format!("/p/web/{{{{ addr }}}}{long}"),
            "x",
            false,
            "more than 1024 bytes",
        ),
        (good, &tojson, false, "too long a text"),
        (good, &concatenated, false, "more than 256 characters"),
        (
            good,
            &"{{ metadata|tojson }}".repeat(9_000),
            false,
            "template.value",
        ),
        (good, "{{ \"'\" ~ '}}' ~ addr * 9 }}", false, "write no `*`"),
        (good, &nested, false, "template.value"),
    ] {
        let why = try_it(key, value, json).unwrap_err();
        assert!(why.contains(fragment), "{key} {fragment}: {why}");
        assert!(why.len() < 9_000, "{}", why.len());
    }
}

#[test]
fn a_record_of_any_template_tells_its_address_or_is_shown_as_it_is() {
    let format = Format::Template(None);
    for (key, value, socket) in [
        ("web/10.1.2.3:80", "x", Some("10.1.2.3:80")),
        ("web/tcp@[fd00::3]:80", "weight=1", Some("[fd00::3]:80")),
        ("web/x", r#"{"IP":"10.1.2.3:80"}"#, Some("10.1.2.3:80")),
        (
            "web/x",
            r#"{"port":80,"host":"fd00::3"}"#,
            Some("[fd00::3]:80"),
        ),
        (
            "web/x",
            r#"{"Ip":"10.1.2.3","Port":"80"}"#,
            Some("10.1.2.3:80"),
        ),
        ("web/x", "host=10.1.2.3&port=80", Some("10.1.2.3:80")),
        ("web/x", "db.example:80", None),
    ] {
        let found = format.read("", key.as_bytes(), value.as_bytes()).unwrap();
        assert_eq!(
            found.socket.map(|socket| socket.to_string()).as_deref(),
            socket
        );
        assert_eq!(found.address, socket.unwrap_or(value));
        assert_eq!(found.service, "web");
    }
    for (key, value) in [
        ("web", "10.1.2.3:80"),
        ("web/", "10.1.2.3:80"),
        ("web/x", "a b"),
        ("web/x", ""),
    ] {
        assert!(
            format.read("", key.as_bytes(), value.as_bytes()).is_err(),
            "{key} {value}"
        );
    }
    let place = Place { prefix: "" };
    assert!(format.records(&place, &[endpoint("10.1.2.3")]).is_empty());
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
    let (kitex, kratos, micro) = (Format::Kitex, Format::Kratos, Format::GoMicro);
    let apisix = Format::Apisix;
    let (dns, traefik) = (
        Format::SkyDns(SkyDns::default()),
        Format::Traefik(Kind::Http),
    );
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
            &kratos,
            b"/s/web/x",
            br#"{"id":"x","name":"web","endpoints":[]}"#,
        ),
        (
            &kratos,
            b"/s/web/x",
            br#"{"id":"x","name":"web","endpoints":["10.1.2.3:80"]}"#,
        ),
        (&kratos, b"/s/web/x", b"null"),
        (
            &kratos,
            b"/s/web",
            br#"{"endpoints":["http://10.1.2.3:80"]}"#,
        ),
        (
            &dns,
            b"/s/shop/web/_tcp/_http/east/web-0",
            br#"{"host":"10.1.2.3","port":80}"#,
        ),
        (
            &dns,
            b"/s/shop/web/_tcp/_http/east/web-0/v6",
            br#"{"host":"10.1.2.3","port":80}"#,
        ),
        (
            &dns,
            b"/s/shop/web/_tcp/_http/east/web-0/v4",
            br#"{"host":"10.1.2.3","port":"80"}"#,
        ),
        (
            &dns,
            b"/s/shop/web/_tcp/http/east/web-0/v4",
            br#"{"host":"10.1.2.3","port":80}"#,
        ),
        (
            &dns,
            b"/s/shop/web/_x/_http/east/web-0/v4",
            br#"{"host":"10.1.2.3","port":80}"#,
        ),
        (&micro, b"/s/web/x", br#"{"name":"web","nodes":[]}"#),
        (
            &micro,
            b"/s/web/x",
            br#"{"name":"web","nodes":[{"id":"x","address":""}]}"#,
        ),
        (&micro, b"/s/web/x", b"null"),
        (&apisix, b"/s/a/b", br#"{"nodes":[{"host":"a","port":1}]}"#),
        (&apisix, b"/s/", br#"{"nodes":[{"host":"a","port":1}]}"#),
        (&apisix, b"/s/a", br#"{"nodes":{"a:1":1}}"#),
        (&apisix, b"/s/a", br#"{"nodes":[{"host":"","port":1}]}"#),
        (&apisix, b"/s/a", br#"{"nodes":[{"host":"a b","port":1}]}"#),
        (&apisix, b"/s/a", b"null"),
        (&apisix, b"/s/a", b"{}"),
        (
            &traefik,
            b"/s/http/services/a.b.c/loadbalancer/servers/1/url",
            b"10.1.2.3:80",
        ),
        (
            &traefik,
            b"/s/http/services/a.b.c/loadbalancer/servers/1/url",
            b"http://",
        ),
        (
            &traefik,
            b"/s/tcp/services/a.b.c/loadbalancer/servers/1/address",
            b"http://10.1.2.3:80",
        ),
        (
            &traefik,
            b"/s/sctp/services/a.b.c/loadbalancer/servers/1/address",
            b"10.1.2.3:80",
        ),
        (&traefik, b"/s/http/routers/a.b.c/rule", b"x"),
        (
            &traefik,
            b"/s/http/services/a.b.c/loadbalancer/servers/1/url/x",
            b"http://10.1.2.3:80",
        ),
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

/// What a template may be made of, valid or not.
fn template_text() -> impl Strategy<Value = String> {
    let part = proptest::sample::select(vec![
        "{{",
        "}}",
        "{{ addr }}",
        "{{ metadata|tojson }}",
        "{%",
        "%}",
        "{% if zone %}",
        "{% endif %}",
        "{% for a in metadata %}",
        "{% endfor %}",
        "{{ a }}",
        "{#",
        "#}",
        "'",
        "\"",
        "\\",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "|tojson",
        "|urlencode",
        "|dns_label",
        "|reverse_dns",
        "|sha256",
        "|lower",
        "~",
        "*",
        "-",
        " addr ",
        " pod ",
        "/",
        "..",
        "1",
        " in ",
        "not ",
        "x",
    ]);
    proptest::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
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
            let format = match format {
                Format::Template(None) => {
                    template(&format!("{prefix}{{{{ service }}}}/{{{{ cluster }}}}/{{{{ addr }}}}"), "{{ pod }}")
                }
                known => known,
            };
            let place = Place { prefix: &prefix };
            let records = format.records(&place, std::slice::from_ref(&endpoint));
            let scope = format.scope(&prefix, &endpoint.namespace, &endpoint.service);
            let keys: Vec<_> = records
                .iter()
                .map(|record| (record.key.clone(), record.targets.clone()))
                .collect();
            prop_assert_eq!(format.keys(&place, std::slice::from_ref(&endpoint)).unwrap(), keys);
            for record in &records {
                prop_assert!(record.key.starts_with(&scope), "{} {scope}", record.key);
                prop_assert_eq!(&record.targets, &[endpoint.target]);
            }
            let record = &records[0];
            let found = format.read(&prefix, record.key.as_bytes(), &record.value).unwrap();
            prop_assert_eq!(&found.address, &endpoint.target.host_port());
            prop_assert_eq!(&found.service, &endpoint.service);
            // A kind of Traefik's is for one protocol.
            let protocol = match format {
                Format::Traefik(Kind::Http | Kind::Tcp) => Protocol::Tcp,
                Format::Traefik(Kind::Udp) => Protocol::Udp,
                Format::Apisix if endpoint.scheme == "udp" => Protocol::Udp,
                Format::Apisix => Protocol::Tcp,
                _ => endpoint.target.protocol,
            };
            let target = Target { protocol, ..endpoint.target };
            prop_assert!(found.holds(&target));
            let all = format.read_all(&prefix, record.key.as_bytes(), &record.value).unwrap();
            prop_assert_eq!(all.as_slice(), std::slice::from_ref(&found));
            for (told, is) in [
                (&found.cluster, &endpoint.cluster),
                (&found.namespace, &endpoint.namespace),
                (&found.port_name, &endpoint.port_name),
                (&found.scheme, &endpoint.scheme),
                (&found.zone, &endpoint.zone),
            ] {
                prop_assert!(told.as_ref().is_none_or(|told| told == is), "{told:?} {is}");
            }
            match &format {
                Format::SkyDns(_) => prop_assert_eq!(found.pod.as_deref(), Some(&*sky_dns::label(&endpoint.pod))),
                _ => prop_assert!(found.pod.as_ref().is_none_or(|pod| *pod == endpoint.pod)),
            }
            prop_assert!(found.weight.is_none_or(|weight| weight == endpoint.weight));
            if let Some(cluster) = format.cluster_of(&prefix, record.key.as_bytes()) {
                prop_assert_eq!(cluster, &endpoint.cluster);
                prop_assert_eq!(found.cluster.as_deref(), Some(cluster));
            }
            for beside in &records[1..] {
                let lead = format.lead_of(beside.key.as_bytes());
                prop_assert_eq!(lead.as_deref(), Some(record.key.as_bytes()));
                prop_assert_eq!(bundle_of(beside.key.as_bytes()), bundle_of(record.key.as_bytes()));
            }
            prop_assert_eq!(Format::by_name(format.name()).map(|f| f.name()), Some(format.name()));
            if format == Format::Json {
                prop_assert_eq!(format.cluster_of(&prefix, record.key.as_bytes()), Some(endpoint.cluster.as_str()));
                prop_assert_eq!(found.endpoint(), Some(endpoint.clone()));
            }
        }
    }

    /// Whatever a tenant writes for a template: it ends, and what it gives keeps to the rules.
    #[test]
    fn templates_never_panic_and_stay_within_their_bounds(
        key in template_text(), value in template_text(), json in any::<bool>(), endpoint in endpoints(),
    ) {
        let source = template::Source {
            key: format!("web/{key}"), value, json, ttl: 60, labels: Vec::new(), annotations: Vec::new(),
        };
        let Ok(template) = Template::new(source) else { return Ok(()) };
        let endpoint = Endpoint { service: "web".into(), ..endpoint };
        let format = Format::Template(Some(template));
        for record in format.records(&Place { prefix: "" }, std::slice::from_ref(&endpoint)) {
            prop_assert!(record.key.starts_with("web/") && record.key.len() <= 1_024);
            prop_assert!(!record.key.contains("//") && !record.key.ends_with('/'));
            prop_assert!(record.value.len() <= 65_536);
            let found = format.read("", record.key.as_bytes(), &record.value).unwrap();
            prop_assert!(found.holds(&endpoint.target));
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
                    let _ = format.read_all(prefix, key, text.as_bytes());
                    let _ = format.lead_of(key);
                    let _ = bundle_of(key);
                }
            }
        }
    }

    /// Records that are damaged at one place: nearer to the truth than any bytes.
    #[test]
    fn reading_never_panics_on_damaged_records(
        endpoint in endpoints(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        for format in formats().into_iter().filter(|format| *format != Format::Template(None)) {
            let place = Place { prefix: "/s/" };
            let record = format.records(&place, std::slice::from_ref(&endpoint)).swap_remove(0);
            let mut value = record.value.clone();
            let place = at.index(value.len());
            value[place] = byte;
            let _ = format.read_all("/s/", record.key.as_bytes(), &value);
            let mut key = record.key.into_bytes();
            let place = at.index(key.len());
            key[place] = byte;
            let _ = format.read("/s/", &key, &record.value);
        }
    }
}
