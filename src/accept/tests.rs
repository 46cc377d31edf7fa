//! Every rule of the API, of the formats and of the policy once, and none that a key can get past.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::format::Place;
use crate::model::endpoint::{Endpoint, Target};

fn settings() -> AcceptSettings {
    AcceptSettings {
        cluster_name: "east".into(),
        registrar_prefix: "/registrar/".into(),
    }
}

fn everything() -> Policy {
    Policy::parse(
        "rules: [{namespaces: ['*'], formats: [Json, Plain, Grpc, Kitex, Hertz, Kratos, SkyDns, GoMicro, Traefik, Apisix, Template], prefixes: ['*']}]",
    )
    .unwrap()
}

fn spec(patch: serde_json::Value) -> ServiceRegistrationSpec {
    let mut spec = json!({
        "selector": {"matchLabels": {"app": "web"}},
        "ports": [{"name": "http", "port": 8080}],
    });
    for (name, value) in patch.as_object().unwrap() {
        spec[name] = value.clone();
    }
    serde_json::from_value(spec).unwrap()
}

fn try_accept(patch: serde_json::Value, policy: &Policy) -> Result<Accepted, Refusal> {
    accept("shop", "web", &spec(patch), policy, &settings())
}

#[test]
fn defaults() {
    let accepted = try_accept(json!({}), &Policy::default()).unwrap();
    assert_eq!(
        accepted,
        Accepted {
            service: "web".into(),
            selector: accepted.selector.clone(),
            ports: vec![AcceptedPort {
                name: "http".into(),
                number: Some(8080),
                protocol: Protocol::Tcp,
                scheme: String::new(),
            }],
            families: Vec::new(),
            address: AddressKind::Pod,
            format: Format::Json,
            prefix: "/services/".into(),
            scope: "/services/shop/web/".into(),
            ttl: 60,
            weight: 100,
            labels: Vec::new(),
            annotations: Vec::new(),
            statics: Vec::new(),
            publish_not_ready: false,
            suspend: false,
        }
    );
}

#[test]
fn all_members() {
    let accepted = try_accept(
        json!({
            "service": "web.rpc",
            "ports": [
                {"name": "http", "scheme": "https"},
                {"name": "dns", "port": 53, "protocol": "UDP"},
                {"name": "sig", "port": 99, "protocol": "SCTP"},
            ],
            "addressFamilies": ["IPv6", "IPv4"],
            "address": "Host",
            "format": {"type": "Plain"},
            "prefix": "",
            "leaseTTLSeconds": 5,
            "weight": 1,
            "metadata": {"labels": ["version", "app"], "annotations": ["a/b"], "static": {"z": "1", "team": "shop"}},
            "publishNotReady": true,
            "suspend": true,
        }),
        &everything(),
    )
    .unwrap();
    let port = |name: &str, number, protocol, scheme: &str| AcceptedPort {
        name: name.into(),
        number,
        protocol,
        scheme: scheme.into(),
    };
    assert_eq!(
        accepted,
        Accepted {
            service: "web.rpc".into(),
            selector: accepted.selector.clone(),
            ports: vec![
                port("http", None, Protocol::Tcp, "https"),
                port("dns", Some(53), Protocol::Udp, ""),
                port("sig", Some(99), Protocol::Sctp, ""),
            ],
            families: vec![Family::V6, Family::V4],
            address: AddressKind::Host,
            format: Format::Plain,
            prefix: String::new(),
            scope: "web.rpc/".into(),
            ttl: 5,
            weight: 1,
            labels: vec!["app".into(), "version".into()],
            annotations: vec!["a/b".into()],
            statics: vec![("team".into(), "shop".into()), ("z".into(), "1".into())],
            publish_not_ready: true,
            suspend: true,
        }
    );
}

#[test]
fn prefixes_and_scopes_of_the_formats() {
    for (format, prefix, scope) in [
        ("Json", None, Ok("/services/shop/web/")),
        ("Json", Some("x/"), Ok("x/shop/web/")),
        ("Json", Some(""), Err("format Json needs a prefix")),
        ("Plain", None, Ok("/web/")),
        ("Plain", Some(""), Ok("web/")),
        ("Plain", Some("/a/b/"), Ok("/a/b/web/")),
        ("Grpc", None, Ok("web/")),
        ("Grpc", Some("grpc/"), Ok("grpc/web/")),
        ("Grpc", Some("/grpc/"), Err("no leading slash")),
        ("Kitex", None, Ok("kitex/registry-etcd/web/")),
        ("Kitex", Some("x/"), Ok("x/web/")),
        ("Kitex", Some(""), Err("without a leading slash")),
        ("Kitex", Some("/x/"), Err("without a leading slash")),
        ("Hertz", None, Ok("hertz/registry-etcd/web/")),
        ("Hertz", Some("x/"), Err("can be given no other")),
        ("Kratos", None, Ok("/microservices/web/")),
        ("Kratos", Some("/"), Ok("/web/")),
        ("Kratos", Some("x/"), Err("with a leading slash")),
        ("Kratos", Some(""), Err("with a leading slash")),
        ("SkyDns", None, Ok("/skydns/local/skydns/shop/web/")),
        ("SkyDns", Some("/skydns/"), Err("leave `prefix` out")),
        ("GoMicro", None, Ok("/micro/registry/web/")),
        (
            "GoMicro",
            Some("/micro/registry/"),
            Ok("/micro/registry/web/"),
        ),
        ("GoMicro", Some("/x/"), Err("can be given no other")),
        ("Traefik", None, Ok("traefik/http/services/shop.web.")),
        ("Traefik", Some("x/"), Ok("x/http/services/shop.web.")),
        ("Traefik", Some(""), Err("without a leading slash")),
        ("Traefik", Some("/traefik/"), Err("without a leading slash")),
        ("Apisix", None, Ok("/apisix/upstreams/east.shop.web.")),
        (
            "Apisix",
            Some("/x/upstreams/"),
            Ok("/x/upstreams/east.shop.web."),
        ),
        (
            "Apisix",
            Some("/apisix/"),
            Err("`/upstreams/` as its prefix"),
        ),
        (
            "Apisix",
            Some("x/upstreams/"),
            Err("`/upstreams/` as its prefix"),
        ),
    ] {
        let mut patch = json!({
            "format": {"type": format},
            "ports": [{"name": "http", "port": 8080, "scheme": "http"}],
        });
        if format == "SkyDns" {
            patch["format"]["skyDns"] = json!({"zone": "skydns.local"});
        }
        if let Some(prefix) = prefix {
            patch["prefix"] = prefix.into();
        }
        let found = try_accept(patch.clone(), &everything());
        match (&found, scope) {
            (Ok(accepted), Ok(scope)) => assert_eq!(accepted.scope, scope, "{patch}"),
            (Err(refusal), Err(fragment)) => {
                assert!(refusal.message.contains(fragment), "{patch}: {refusal}");
            }
            _ => panic!("{patch}: {found:?}"),
        }
    }
}

#[test]
fn what_the_api_server_would_refuse_is_refused_here_too() {
    let many: Vec<String> = (0..300).map(|n| format!("l{n}")).collect();
    let ports: Vec<_> = (1..=17)
        .map(|n| json!({"name": format!("p{n}"), "port": n}))
        .collect();
    for (patch, fragment) in [
        (json!({"selector": {}}), "selector must not be empty"),
        (json!({"ports": []}), "write 1 to 16"),
        (json!({"ports": ports}), "write 1 to 16"),
        (
            json!({"ports": [{"name": "http", "port": 0}]}),
            "write 1 to 65535",
        ),
        (
            json!({"ports": [{"name": "http", "port": -1}]}),
            "write 1 to 65535",
        ),
        (
            json!({"ports": [{"name": "http", "port": 65_536}]}),
            "write 1 to 65535",
        ),
        (
            json!({"ports": [{"name": "a", "port": 1}, {"name": "a", "port": 2}]}),
            "two ports have the name a",
        ),
        (
            json!({"ports": [{"name": "a", "port": 53}, {"name": "b", "port": 53, "protocol": "UDP"}]}),
            "have one number",
        ),
        (
            json!({"ports": [{"name": "a/b", "port": 1}]}),
            "the port name",
        ),
        (
            json!({"ports": [{"name": "a", "scheme": "http://"}]}),
            "the scheme",
        ),
        (json!({"service": "a/b"}), "the service name"),
        (json!({"service": ".."}), "the service name"),
        (json!({"service": ""}), "the service name"),
        (json!({"prefix": "/services"}), "end it with a slash"),
        (json!({"prefix": "/a/../services/"}), "no segment may be"),
        (json!({"prefix": "//"}), "one slash instead of two"),
        (json!({"prefix": "/a\u{0}/"}), "control characters"),
        (
            json!({"leaseTTLSeconds": 1}),
            "leaseTTLSeconds is 1: write 5 to 86400",
        ),
        (json!({"leaseTTLSeconds": 86_401}), "write 5 to 86400"),
        (json!({"leaseTTLSeconds": -5}), "write 5 to 86400"),
        (json!({"weight": 0}), "weight is 0: write 1 to 65535"),
        (
            json!({"metadata": {"labels": many}}),
            "metadata.labels has 300 entries: write at most 32",
        ),
        (json!({"metadata": {"labels": ["a b"]}}), "the label name"),
        (
            json!({"metadata": {"labels": ["a"], "annotations": ["a"]}}),
            "the name \"a\" stands in two",
        ),
        (
            json!({"metadata": {"labels": ["a"], "static": {"a": ""}}}),
            "the name \"a\" stands in two",
        ),
        (
            json!({"metadata": {"annotations": ["a"], "static": {"a": ""}}}),
            "the name \"a\" stands in two",
        ),
        (
            json!({"metadata": {"static": {"": "x"}}}),
            "metadata.static",
        ),
        (
            json!({"metadata": {"static": {"a": "x".repeat(257)}}}),
            "at most 256",
        ),
    ] {
        let refusal = try_accept(patch.clone(), &everything()).unwrap_err();
        assert_eq!(refusal.reason, reason::INVALID, "{patch}");
        assert!(refusal.message.contains(fragment), "{patch}: {refusal}");
    }
}

/// The same table is put to a real API server; what that refuses must be refused here, too.
#[test]
fn the_table_of_objects() {
    #[derive(serde::Deserialize)]
    struct Case {
        name: String,
        refused: Option<String>,
        spec: serde_json::Value,
        repeat: Option<Repeat>,
    }
    #[derive(serde::Deserialize)]
    struct Repeat {
        path: Vec<String>,
        count: usize,
    }
    let table = include_str!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/objects.yaml"
    ));
    let cases: Vec<Case> = serde_yaml::from_str(table).unwrap();
    assert!(cases.iter().any(|case| case.refused.is_none()));
    for mut case in cases {
        if let Some(repeat) = case.repeat {
            let place = repeat
                .path
                .iter()
                .fold(&mut case.spec, |place, member| &mut place[member]);
            *place = (0..repeat.count).map(|n| format!("l{n}")).collect();
        }
        let found = serde_json::from_value(case.spec)
            .map_err(|error| error.to_string())
            .and_then(|spec| {
                accept("shop", &case.name, &spec, &everything(), &settings())
                    .map_err(|refusal| refusal.message)
            });
        // A set of two equal families means the same as one; only the API server minds.
        let refused = case.refused.is_some() && case.name != "family-twice";
        assert_eq!(found.is_err(), refused, "{}: {found:?}", case.name);
    }
}

#[test]
fn what_a_format_cannot_hold_is_refused_with_what_to_write() {
    let dns = json!({"type": "SkyDns", "skyDns": {"zone": "skydns.local"}});
    let zone = |zone: &str| json!({"type": "SkyDns", "skyDns": {"zone": zone}});
    let port =
        |name: &str, port: u16, scheme: &str| json!({"name": name, "port": port, "scheme": scheme});
    let template = |key: &str, value: &str| json!({"type": "Template", "template": {"key": key, "value": value}});
    let (kratos, traefik) = (json!({"type": "Kratos"}), json!({"type": "Traefik"}));
    let apisix = json!({"type": "Apisix"});
    for (patch, fragment) in [
        (
            json!({"format": apisix, "ports": [{"name": "a", "port": 1}]}),
            "for APISIX write TCP and",
        ),
        (
            json!({"format": apisix, "ports": [port("a", 1, "udp")]}),
            "port a is TCP and has the scheme \"udp\"",
        ),
        (
            json!({"format": apisix, "ports": [{"name": "a", "port": 1, "protocol": "SCTP", "scheme": "tcp"}]}),
            "port a is SCTP",
        ),
        (
            json!({"format": {"type": "SkyDns"}}),
            "skyDns: {zone: skydns.local}",
        ),
        (
            json!({"format": {"type": "Json", "skyDns": {"zone": "a"}}}),
            "write `type: SkyDns`",
        ),
        (
            json!({"format": zone("Skydns.local")}),
            "domain name in lower case",
        ),
        (
            json!({"format": zone("skydns.local.")}),
            "domain name in lower case",
        ),
        (
            json!({"format": zone("any.local")}),
            "domain name in lower case",
        ),
        (
            json!({"format": zone(&format!("{}.local", ["a"; 100].join(".")))}),
            "DNS takes 253",
        ),
        (
            json!({"format": {"type": "SkyDns", "skyDns": {"zone": "a", "path": "a/b"}}}),
            "one segment",
        ),
        (
            json!({"format": {"type": "SkyDns", "skyDns": {"zone": "a", "path": ".."}}}),
            "one segment",
        ),
        (
            json!({"format": {"type": "SkyDns", "skyDns": {"zone": "a", "ttl": 0}}}),
            "skyDns.ttl is 0",
        ),
        (
            json!({"format": dns, "service": "Web"}),
            "a label of DNS: write lower-case",
        ),
        (json!({"format": dns, "service": "web.rpc"}), "without dots"),
        (json!({"format": dns, "service": "any"}), "not `any`"),
        (
            json!({"format": dns, "service": "a".repeat(64)}),
            "at most 63",
        ),
        (
            json!({"format": dns, "ports": [{"name": "a".repeat(63), "port": 1}]}),
            "at most 62 characters",
        ),
        (
            json!({"format": kratos}),
            "write one of its own for each port",
        ),
        (
            json!({"format": kratos, "ports": [port("a", 1, "ftp")]}),
            "`http`, `https`, `grpc` or `grpcs`",
        ),
        (
            json!({"format": kratos, "ports": [port("a", 1, "http"), port("b", 2, "http")]}),
            "a second port of one scheme",
        ),
        (
            json!({"format": kratos, "ports": [port("a", 1, "http"), port("b", 1, "grpc")]}),
            "have one number",
        ),
        (
            json!({"format": traefik, "ports": [port("a", 1, "grpc")]}),
            "all of one kind",
        ),
        (
            json!({"format": traefik, "ports": [port("a", 1, "http"), {"name": "b", "port": 2}]}),
            "all of one kind",
        ),
        (
            json!({"format": traefik, "ports": [{"name": "b", "port": 2, "protocol": "SCTP"}]}),
            "all of one kind",
        ),
    ] {
        let refusal = try_accept(patch.clone(), &everything()).unwrap_err();
        assert_eq!(refusal.reason, reason::INVALID, "{patch}");
        assert!(refusal.message.contains(fragment), "{patch}: {refusal}");
    }
    for (patch, kind) in [
        (
            json!({"ports": [port("a", 1, "h2c"), port("b", 1, "https")]}),
            Kind::Http,
        ),
        (json!({"ports": [{"name": "b", "port": 2}]}), Kind::Tcp),
        (
            json!({"ports": [{"name": "b", "port": 2, "protocol": "UDP"}]}),
            Kind::Udp,
        ),
    ] {
        let mut patch = patch;
        patch["format"] = traefik.clone();
        let accepted = try_accept(patch, &everything()).unwrap();
        assert_eq!(accepted.format, Format::Traefik(kind));
    }
    for (patch, scope) in [
        (json!({"format": template("web/{{ addr }}", "x")}), "web/"),
        (
            json!({"format": template("web/{{ pod }}", "{{ addr }}")}),
            "web/",
        ),
        (
            json!({
                "format": template("/a/{{ service }}/{{ labels.version }}/{{ addr }}", "{{ metadata.version }}"),
                "prefix": "/a/",
                "metadata": {"labels": ["version"]},
                "addressFamilies": ["IPv6", "IPv4"],
                "ports": [{"name": "a"}, {"name": "b"}],
            }),
            "/a/web/",
        ),
    ] {
        assert_eq!(try_accept(patch, &everything()).unwrap().scope, scope);
    }
    let micro = json!({"format": {"type": "GoMicro"}, "ports": [port("a", 1, "http"), port("b", 1, "grpc")]});
    try_accept(micro, &everything()).unwrap();
}

#[test]
fn a_refusal_shows_the_rule_that_would_allow_it() {
    let patch = json!({"format": {"type": "Plain"}, "prefix": "", "service": "1.0"});
    let refusal = try_accept(patch.clone(), &Policy::default()).unwrap_err();
    assert_eq!(refusal.reason, reason::NOT_GRANTED);
    assert!(
        refusal
            .message
            .contains("what it grants for this format: nothing"),
        "{refusal}"
    );
    let (_, rule) = refusal.message.split_once("policy file:\n").unwrap();
    let policy = Policy::parse(rule).unwrap();
    assert_eq!(try_accept(patch, &policy).unwrap().scope, "1.0/");
    assert!(accept("other", "x", &spec(json!({})), &policy, &settings()).is_err());

    let refusal = try_accept(json!({"prefix": "/other/"}), &Policy::default()).unwrap_err();
    assert_eq!(refusal.reason, reason::NOT_GRANTED);
    assert!(
        refusal
            .message
            .contains(r#"prefixes ["/services/{namespace}/"]"#),
        "{refusal}"
    );
}

#[test]
fn no_record_stands_among_the_operators_keys() {
    for (registrar, prefix, service, format, reserved) in [
        ("/registrar/", "/", "registrar", "Plain", true),
        ("/registrar/", "/registrar/", "web", "Plain", true),
        (
            "/registrar/",
            "/registrar/east/leases/",
            "web",
            "Plain",
            true,
        ),
        ("/registrar/", "/registrar/", "web", "Json", true),
        ("/registrar/", "/registrar2/", "web", "Plain", false),
        ("/registrar/", "/", "registrar2", "Plain", false),
        ("/registrar", "/", "registrar2", "Plain", false),
        ("/registrar", "/", "registrar", "Plain", true),
        ("/registrar/", "", "registrar", "Plain", false),
        ("/", "/", "web", "Plain", true),
        ("/services/shop/web/x/", "/services/", "web", "Json", true),
        ("/services/shop/webs/", "/services/", "web", "Json", false),
        ("registrar/", "", "registrar", "Grpc", true),
        ("traefik/", "traefik/", "web", "Traefik", true),
        (
            "traefik/tcp/services/shop.web.x/",
            "traefik/",
            "web",
            "Traefik",
            true,
        ),
        ("/registrar/", "traefik/", "web", "Traefik", false),
    ] {
        let settings = AcceptSettings {
            registrar_prefix: registrar.into(),
            ..settings()
        };
        let spec = spec(json!({"prefix": prefix, "service": service, "format": {"type": format}}));
        let found = accept("shop", "web", &spec, &everything(), &settings);
        let refused = found.is_err_and(|refusal| refusal.reason == reason::RESERVED_PREFIX);
        assert_eq!(refused, reserved, "{registrar} {prefix} {service}");
    }
}

proptest! {
    /// Whatever a tenant writes: under the default policy no key leaves `/services/shop/`, and under
    /// any policy none comes among the operator's.
    #[test]
    fn keys_stay_where_they_belong(
        prefix in proptest::option::of("(/?(services|shop|registrar|[.]{1,2}|\\*|\n)/){0,3}/?"),
        service in proptest::option::of("[a-c./*\n]{1,6}|registrar|shop"),
        format in proptest::sample::select(vec![
            "Json", "Plain", "Grpc", "Kitex", "Hertz", "Kratos", "SkyDns", "GoMicro", "Traefik",
            "Apisix",
        ]),
        default_policy in any::<bool>(),
    ) {
        let mut patch = json!({
            "format": {"type": format},
            "ports": [{"name": "http", "port": 80, "scheme": "http"}],
        });
        if format == "SkyDns" { patch["format"]["skyDns"] = json!({"zone": "skydns.local"}); }
        if let Some(prefix) = prefix { patch["prefix"] = prefix.into(); }
        if let Some(service) = service { patch["service"] = service.into(); }
        let policy = if default_policy { Policy::default() } else { everything() };
        let Ok(accepted) = try_accept(patch, &policy) else { return Ok(()) };
        let endpoint = Endpoint {
            target: Target { ip: [10, 1, 2, 3].into(), port: 80, protocol: Protocol::Tcp },
            port_name: "http".into(), scheme: String::new(), cluster: "east".into(),
            namespace: "shop".into(), service: accepted.service.clone(), pod: "p".into(),
            uid: "u".into(), node: String::new(), zone: String::new(), weight: 1,
            metadata: Vec::new(),
        };
        for record in accepted.format.records(&Place { prefix: &accepted.prefix }, &[endpoint]) {
            prop_assert!(record.key.starts_with(&accepted.scope));
            prop_assert!(!record.key.starts_with("/registrar/"));
            prop_assert!(!default_policy || record.key.starts_with("/services/shop/"));
        }
    }
}

#[test]
fn the_examples_are_accepted_under_the_policy_among_them() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");
    let read = |path: &std::path::Path| std::fs::read_to_string(path).unwrap();
    let policy = Policy::parse(&read(&std::path::Path::new(folder).join("policy.yaml"))).unwrap();
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        for document in serde_yaml::Deserializer::from_str(&read(&path)) {
            let object: serde_json::Value = serde::Deserialize::deserialize(document).unwrap();
            if object["kind"] != "ServiceRegistration" {
                continue;
            }
            let registration: crate::api::ServiceRegistration =
                serde_json::from_value(object).unwrap();
            let metadata = &registration.metadata;
            accept(
                metadata.namespace.as_deref().unwrap_or("default"),
                metadata.name.as_deref().unwrap(),
                &registration.spec,
                &policy,
                &settings(),
            )
            .unwrap_or_else(|refusal| panic!("{}: {refusal}", path.display()));
            seen += 1;
        }
    }
    assert!(seen >= 4, "{seen} examples were found");
}

#[test]
fn a_refusal_stays_short_under_a_long_policy() {
    let prefixes: Vec<String> = (0..10_000).map(|n| format!("\"/p{n}/\"")).collect();
    let rule = format!(
        "{{namespaces: ['*'], formats: [Json], prefixes: [{}]}}",
        prefixes.join(",")
    );
    let policy = Policy::parse(&format!("rules: [{rule},{rule},{rule},{rule}]")).unwrap();
    let refusal = try_accept(json!({}), &policy).unwrap_err();
    // The API server takes 32,768 characters in a message; a person takes fewer.
    assert!(refusal.message.len() < 1_500, "{refusal}");
    assert!(refusal.message.contains("..."), "{refusal}");
}

#[test]
fn the_metadata_of_a_record_has_an_end() {
    let long = |count: usize| -> serde_json::Value {
        let entries = (0..count).map(|at| (format!("name-{at:02}"), "x".repeat(256)));
        json!({"metadata": {"static": entries.collect::<std::collections::BTreeMap<_, _>>()}})
    };
    let policy = Policy::default();
    // 263 characters each.
    assert!(try_accept(long(31), &policy).is_ok());
    let refusal = try_accept(long(32), &policy).unwrap_err();
    assert_eq!(refusal.reason, reason::INVALID);
    assert!(
        refusal.message.contains("8416") && refusal.message.contains("at most 8192"),
        "{refusal}"
    );
}
