//! The records of each format as a plain etcdctl reads them, byte for byte.

use serde_json::json;

use crate::support::Stage;

/// The value of a key as etcdctl prints it, without its newline.
fn value(stage: &Stage, key: &str) -> String {
    let printed = stage
        .etcd
        .etcdctl(&["get", key, "--print-value-only"])
        .unwrap();
    printed.strip_suffix('\n').unwrap_or(&printed).to_owned()
}

/// The keys below a prefix as etcdctl prints them.
fn keys(stage: &Stage, prefix: &str) -> Vec<String> {
    stage
        .etcd
        .etcdctl(&["get", "--prefix", prefix, "--keys-only"])
        .unwrap()
        .lines()
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect()
}

#[test]
fn records_are_those_of_the_formats() {
    let stage = Stage::new("formats");
    let policy = "
rules:
  - {namespaces: ['*'], formats: [Json], prefixes: ['/services/{namespace}/']}
  - {namespaces: ['*'], formats: [Plain], prefixes: ['', /], services: [web, web.rpc]}
  - {namespaces: ['*'], formats: [Grpc], prefixes: ['', grpc/], services: [web, greeter]}
";
    let operator = stage.operator("east").policy(policy).start().unwrap();
    stage.create_pod(
        "web-0",
        "web",
        &json!({
            "labels": {"app": "web", "version": "v1"},
            "annotations": {"example.com/note": "a \"quote\", <tag> & ünïcode\t"},
        }),
        &json!({}),
    );
    let addresses = stage.wait_ready("web-0");
    let [v4, v6] = addresses.as_slice() else {
        panic!("one address of each family: {addresses:?}");
    };
    // As RFC 5952 says, whatever the pod's status has.
    let v6 = &v6.parse::<std::net::Ipv6Addr>().unwrap().to_string();
    let pod = stage.pod("web-0").unwrap();
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let node = pod["spec"]["nodeName"].as_str().unwrap();
    // The zone of the testbed's nodes is the end of their names.
    let zone = node.rsplit('-').next().unwrap();
    let namespace = &stage.namespace;
    let both = json!({
        "selector": {"matchLabels": {"app": "web"}},
        "ports": [{"name": "http", "port": 8080, "scheme": "http"}],
        "addressFamilies": ["IPv4", "IPv6"],
        "metadata": {"labels": ["version"]},
        "service": "web",
    });
    let with = |more: serde_json::Value| {
        let mut spec = both.clone();
        for (key, value) in more.as_object().unwrap() {
            spec[key] = value.clone();
        }
        spec
    };

    let scope = format!("/services/{namespace}/web/");
    stage.register("json", &both);
    let mut expected: Vec<(String, String)> = [
        (format!("{v4}:8080"), v4, "IPv4"),
        (format!("[{v6}]:8080"), v6, "IPv6"),
    ]
    .into_iter()
    .map(|(address, host, family)| {
        (
            format!("{scope}east/{address}"),
            format!(
                r#"{{"address":"{address}","host":"{host}","port":8080,"portName":"http","protocol":"TCP","scheme":"http","family":"{family}","cluster":"east","namespace":"{namespace}","service":"web","pod":"web-0","uid":"{uid}","node":"{node}","zone":"{zone}","weight":100,"metadata":{{"version":"v1"}}}}"#
            ),
        )
    })
    .collect();

    // All that a person can choose in it.
    stage.register(
        "json-all",
        &with(json!({
            "service": "all",
            "addressFamilies": ["IPv4"],
            "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}],
            "weight": 7,
            "metadata": {
                "labels": ["version", "absent"],
                "annotations": ["example.com/note"],
                "static": {"team": "shop", "a": ""},
            },
        })),
    );
    expected.push((
        format!("/services/{namespace}/all/east/{v4}:53"),
        format!(
            r#"{{"address":"{v4}:53","host":"{v4}","port":53,"portName":"dns","protocol":"UDP","scheme":"","family":"IPv4","cluster":"east","namespace":"{namespace}","service":"all","pod":"web-0","uid":"{uid}","node":"{node}","zone":"{zone}","weight":7,"metadata":{{"a":"","example.com/note":"a \"quote\", <tag> & ünïcode\t","team":"shop","version":"v1"}}}}"#
        ),
    ));

    for (name, prefix, service) in [("plain", "/", "web"), ("plain-bare", "", "web.rpc")] {
        let more = json!({"format": {"type": "Plain"}, "prefix": prefix, "service": service});
        stage.register(name, &with(more));
        for address in [format!("{v4}:8080"), format!("[{v6}]:8080")] {
            expected.push((format!("{prefix}{service}/{address}"), address));
        }
    }
    for (name, prefix, service) in [("grpc", "grpc/", "greeter"), ("grpc-bare", "", "web")] {
        let more = json!({"format": {"type": "Grpc"}, "prefix": prefix, "service": service});
        stage.register(name, &with(more));
        for address in [format!("{v4}:8080"), format!("[{v6}]:8080")] {
            expected.push((
                format!("{prefix}{service}/{address}"),
                format!(r#"{{"Op":0,"Addr":"{address}","Metadata":null}}"#),
            ));
        }
    }

    for name in [
        "json",
        "json-all",
        "plain",
        "plain-bare",
        "grpc",
        "grpc-bare",
    ] {
        stage.wait_condition(name, "Ready", "True", "Registered");
    }
    expected.sort();
    let mut found: Vec<(String, String)> = keys(&stage, "")
        .into_iter()
        .filter(|key| !key.starts_with("/registrar/"))
        .map(|key| {
            let value = value(&stage, &key);
            (key, value)
        })
        .collect();
    found.sort();
    assert_eq!(found, expected);
    operator.stop().unwrap();
}
