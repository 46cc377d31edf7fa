//! The records of each format as a plain etcdctl reads them, byte for byte.

use std::collections::BTreeSet;

use etcd_registrar::format::bundle_of;
use serde_json::{Value, json};

use crate::support::{Stage, Watcher, keys as keys_of};

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

/// Grants every format below the prefixes that its clients read.
const ALL: &str = "
rules:
  - {namespaces: ['*'], formats: [Json], prefixes: ['/services/{namespace}/']}
  - {namespaces: ['*'], formats: [Plain, Grpc, Kitex], prefixes: [kitex/registry-etcd/]}
  - {namespaces: ['*'], formats: [Hertz], prefixes: [hertz/registry-etcd/]}
  - {namespaces: ['*'], formats: [Kratos], prefixes: [/microservices/]}
  - {namespaces: ['*'], formats: [SkyDns], prefixes: ['/skydns/local/skydns/{namespace}/']}
  - {namespaces: ['*'], formats: [GoMicro], prefixes: [/micro/registry/]}
  - {namespaces: ['*'], formats: [Traefik], prefixes: [traefik/]}
  - {namespaces: ['*'], formats: [Apisix], prefixes: [/apisix/upstreams/]}
  - {namespaces: ['*'], formats: [Template], prefixes: [/rpcx/]}
";

/// The settings of a format in the spec.
fn settings(format: &str) -> Value {
    match format {
        "SkyDns" => json!({"type": format, "skyDns": {"zone": "skydns.local"}}),
        "Template" => json!({"type": format, "template": {
            "key": "/rpcx/web/tcp@{{ addr }}",
            "value": "weight={{ weight }}&v={{ labels.version|urlencode }}",
        }}),
        _ => json!({"type": format}),
    }
}

/// The number that Traefik's server has, by another way than the operator's.
fn server(address: &str) -> u32 {
    use std::io::Write;
    let mut child = std::process::Command::new("sha256sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(address.as_bytes())
        .unwrap();
    let printed = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    u32::from_str_radix(&printed[..8], 16).unwrap()
}

/// The record of all pods on the port `http` in the format Apisix.
fn upstream(namespace: &str, nodes: &[String]) -> (String, String) {
    let id = format!("east.{namespace}.web.http");
    let nodes = nodes.join(",");
    (
        format!("/apisix/upstreams/{id}"),
        format!(
            r#"{{"id":"{id}","name":"{id}","type":"roundrobin","scheme":"http","nodes":[{nodes}]}}"#
        ),
    )
}

/// The records of `web-0` on the port `http` 8080 at one of its addresses.
fn expected(format: &str, namespace: &str, zone: &str, ip: &str) -> Vec<(String, String)> {
    let (family, address) = if ip.contains(':') {
        ("v6", format!("[{ip}]:8080"))
    } else {
        ("v4", format!("{ip}:8080"))
    };
    let tags = format!(r#""cluster":"east","namespace":"{namespace}","pod":"web-0""#);
    let kitex = format!(
        r#"{{"network":"tcp","address":"{address}","weight":7,"tags":{{{tags},"zone":"{zone}"}}}}"#
    );
    let one = |key: String, value: String| vec![(key, value)];
    match format {
        "Plain" => one(format!("kitex/registry-etcd/web/{address}"), address),
        "Grpc" => one(
            format!("kitex/registry-etcd/web/{address}"),
            format!(r#"{{"Op":0,"Addr":"{address}","Metadata":null}}"#),
        ),
        "Kitex" => one(format!("kitex/registry-etcd/web/{address}"), kitex),
        "Hertz" => one(format!("hertz/registry-etcd/web/{address}"), kitex),
        "Kratos" => {
            let id = format!("east.{namespace}.web-0.{family}");
            one(
                format!("/microservices/web/{id}"),
                format!(
                    r#"{{"id":"{id}","name":"web","version":"v1","metadata":{{{tags},"weight":"7","zone":"{zone}"}},"endpoints":["http://{address}"]}}"#
                ),
            )
        }
        "SkyDns" => one(
            format!("/skydns/local/skydns/{namespace}/web/_tcp/_http/east/web-0/{family}"),
            format!(r#"{{"host":"{ip}","port":8080,"weight":7,"ttl":30,"targetstrip":1}}"#),
        ),
        "GoMicro" => {
            let id = format!("east.{namespace}.web-0.http.{family}");
            one(
                format!("/micro/registry/web/{id}"),
                format!(
                    r#"{{"name":"web","version":"v1","metadata":null,"endpoints":null,"nodes":[{{"metadata":{{"zone":"{zone}"}},"id":"{id}","address":"{address}"}}]}}"#
                ),
            )
        }
        "Traefik" => {
            let number = server(&address);
            let base = format!(
                "traefik/http/services/{namespace}.web.http/loadbalancer/servers/{number}/"
            );
            vec![
                (format!("{base}url"), format!("http://{address}")),
                (format!("{base}weight"), "7".into()),
            ]
        }
        "Apisix" => {
            let host = address.strip_suffix(":8080").unwrap();
            let node = format!(
                r#"{{"host":"{host}","port":8080,"weight":7,"metadata":{{"zone":"{zone}"}}}}"#
            );
            vec![upstream(namespace, &[node])]
        }
        "Template" => one(format!("/rpcx/web/tcp@{address}"), "weight=7&v=v1".into()),
        other => panic!("{other}"),
    }
}

/// A pod `web-0`, and a registration of it as it is in every format.
fn pod_and_spec(stage: &Stage) -> (Vec<String>, String, Value) {
    let labels = json!({"labels": {"app": "web", "version": "v1"}});
    stage.create_pod("web-0", "web", &labels, &json!({}));
    let addresses = canonical(&stage.wait_ready("web-0"));
    let node = stage.pod("web-0").unwrap()["spec"]["nodeName"].clone();
    let zone = node
        .as_str()
        .unwrap()
        .rsplit('-')
        .next()
        .unwrap()
        .to_owned();
    let spec = json!({
        "service": "web",
        "selector": {"matchLabels": {"app": "web"}},
        "ports": [{"name": "http", "port": 8080, "scheme": "http"}],
        "metadata": {"labels": ["version"]},
        "weight": 7,
    });
    (addresses, zone, spec)
}

/// As RFC 5952 says, whatever the pod's status has.
fn canonical(addresses: &[String]) -> Vec<String> {
    addresses
        .iter()
        .map(|ip| ip.parse::<std::net::IpAddr>().unwrap().to_string())
        .collect()
}

const NEW: [&str; 7] = [
    "Kitex", "Hertz", "Kratos", "SkyDns", "GoMicro", "Traefik", "Template",
];

#[test]
fn every_format_comes_goes_and_gets_another_address_by_its_own_rules() {
    let stage = Stage::new("every-format");
    let operator = stage.operator("east").policy(ALL).start().unwrap();
    let (addresses, zone, spec) = pod_and_spec(&stage);
    let namespace = &stage.namespace;
    let records = |addresses: &[String], zone: &str| -> Vec<(String, String)> {
        let mut all: Vec<(String, String)> = NEW
            .iter()
            .flat_map(|format| addresses.iter().map(move |ip| (*format, ip)))
            .flat_map(|(format, ip)| expected(format, namespace, zone, ip))
            .collect();
        all.sort();
        all
    };
    let wait = |wanted: &[(String, String)]| {
        let mut found = Vec::new();
        for prefix in [
            "/micro/",
            "/microservices/",
            "/rpcx/",
            "/skydns/",
            "hertz/",
            "kitex/",
            "traefik/",
        ] {
            let here: Vec<&String> = wanted
                .iter()
                .map(|(key, _)| key)
                .filter(|key| key.starts_with(prefix))
                .collect();
            found.extend(stage.wait_keys(prefix, &here));
        }
        for (record, (_, value)) in found.iter().zip(wanted) {
            assert_eq!(record.value, *value, "{}", record.key);
        }
        found
    };
    let watcher = Watcher::start(&stage.etcd, "");
    for format in NEW {
        let mut spec = spec.clone();
        spec["format"] = settings(format);
        spec["addressFamilies"] = json!(["IPv4", "IPv6"]);
        if format == "Template" {
            spec["prefix"] = json!("/rpcx/");
        }
        stage.register(&format.to_lowercase(), &spec);
    }
    let wanted = records(&addresses, &zone);
    let found = wait(&wanted);

    // One transaction and one lease for what goes together, one each for what goes alone.
    let check_events = |is_put: bool| {
        let seen: Vec<_> = watcher
            .seen()
            .into_iter()
            .filter(|seen| !seen.key.starts_with("/registrar/") && seen.put.is_some() == is_put)
            .collect();
        assert_eq!(seen.len(), wanted.len(), "each key once: {seen:#?}");
        for one in &seen {
            let others: BTreeSet<&str> = seen
                .iter()
                .filter(|other| other.revision == one.revision && other.key != one.key)
                .map(|other| &*other.key)
                .collect();
            if one.key.starts_with("/micro/") {
                assert!(
                    others.iter().all(|key| !key.starts_with("/micro/")),
                    "{one:?}: {others:?}"
                );
            }
            if let Some(server) = one.key.strip_suffix("/url") {
                assert!(
                    others.contains(&*format!("{server}/weight")),
                    "{one:?}: {others:?}"
                );
            }
        }
    };
    check_events(true);
    for one in &found {
        for other in &found {
            if one.key == other.key {
                continue;
            }
            if bundle_of(one.key.as_bytes()) == bundle_of(other.key.as_bytes()) {
                assert_eq!(one.lease, other.lease, "{} {}", one.key, other.key);
            }
            if one.key.starts_with("/micro/") {
                assert_ne!(one.lease, other.lease, "{} {}", one.key, other.key);
            }
        }
    }
    for format in NEW {
        stage.wait_registration(&format.to_lowercase(), "two endpoints", |object| {
            let status = &object["status"];
            status["registered"] == 2
                && status["discovered"] == 2
                && status["clusters"] == json!([{"name": "east", "endpoints": 2}])
        });
    }

    // A restart is seen by nobody.
    watcher.forget();
    operator.kill().unwrap();
    operator.start().unwrap();
    for format in NEW {
        stage.wait_condition(&format.to_lowercase(), "Ready", "True", "Registered");
    }
    let seen: Vec<_> = watcher
        .seen()
        .into_iter()
        .filter(|seen| !seen.key.starts_with("/registrar/"))
        .collect();
    assert!(seen.is_empty(), "{seen:#?}");

    watcher.forget();
    stage.set_ready("web-0", false);
    wait(&[]);
    check_events(false);

    // The name comes back with another address.
    watcher.forget();
    stage.set_ready("web-0", true);
    wait(&wanted);
    stage.delete_pod("web-0");
    wait(&[]);
    // And maybe on another node.
    let (addresses, zone, _) = pod_and_spec(&stage);
    let wanted = records(&addresses, &zone);
    wait(&wanted);
    let seen = watcher.seen();
    for (key, value) in wanted.iter().filter(|(key, _)| key.contains("web-0")) {
        let of: Vec<_> = seen.iter().filter(|seen| seen.key == *key).collect();
        let [first, gone, new] = of.as_slice() else {
            panic!("put, deleted, put: {of:#?}");
        };
        assert!(first.put.is_some() && gone.put.is_none(), "{of:#?}");
        assert!(gone.revision < new.revision);
        assert_eq!(new.put.as_ref().map(|put| &put.value), Some(value));
    }

    for format in NEW {
        stage.unregister(&format.to_lowercase());
    }
    wait(&[]);
}

#[test]
fn a_changed_format_replaces_old_by_new_and_a_client_never_sees_none() {
    let stage = Stage::new("format-change");
    let _operator = stage.operator("east").policy(ALL).start().unwrap();
    let (addresses, zone, mut spec) = pod_and_spec(&stage);
    let ip = &addresses[0];
    let namespace = &stage.namespace;
    let keys = |format: &str| -> BTreeSet<String> {
        let records = match format {
            "Json" => vec![(
                format!("{}east/{ip}:8080", stage.scope("web")),
                String::new(),
            )],
            other => expected(other, namespace, &zone, ip),
        };
        records.into_iter().map(|(key, _)| key).collect()
    };
    spec["format"] = settings("Kitex");
    stage.register("web", &spec);
    stage.wait_keys("kitex/", &keys("Kitex").into_iter().collect::<Vec<_>>());
    let mut before = "Kitex";
    // The first two pairs have one prefix and one key.
    for format in [
        "Grpc", "Plain", "Kratos", "Traefik", "GoMicro", "Json", "Template", "SkyDns", "Traefik",
        "Apisix", "Hertz", "Apisix", "Json",
    ] {
        let (old, new) = (keys(before), keys(format));
        let watcher = Watcher::start(&stage.etcd, "");
        let prefix = match format {
            "Grpc" | "Plain" => json!("kitex/registry-etcd/"),
            "Template" => json!("/rpcx/"),
            _ => Value::Null,
        };
        let mut wanted = json!({"type": null, "skyDns": null, "template": null});
        for (name, value) in settings(format).as_object().unwrap() {
            wanted[name] = value.clone();
        }
        stage.change("web", &json!({"format": wanted, "prefix": prefix}));
        stage.wait_registration("web", "the new format to be served", |object| {
            let status = &object["status"];
            let listed = status["endpoints"][0]["key"].as_str().unwrap_or_default();
            status["observedGeneration"] == object["metadata"]["generation"]
                && new.contains(listed)
                && status["registered"] == 1
        });
        let left = testbed::eventually(crate::support::SOON, "the old keys to go", || {
            let left: BTreeSet<String> = keys_of(&stage.registry.try_list("")?)
                .into_iter()
                .filter(|key| !key.starts_with("/registrar/"))
                .collect();
            if left == new {
                Ok(left)
            } else {
                Err(format!("{left:?}"))
            }
        });
        left.unwrap();
        let mut standing = old.clone();
        let seen: Vec<_> = watcher
            .seen()
            .into_iter()
            .filter(|seen| !seen.key.starts_with("/registrar/"))
            .collect();
        for (at, event) in seen.iter().enumerate() {
            if event.put.is_some() {
                standing.insert(event.key.clone());
            } else {
                standing.remove(&event.key);
            }
            // What a client can see is what stands between two revisions.
            let last = seen
                .get(at + 1)
                .is_none_or(|next| next.revision != event.revision);
            assert!(
                !last || old.is_subset(&standing) || new.is_subset(&standing),
                "{before} to {format}: {seen:#?}"
            );
        }
        let each_once = old.difference(&new).count() + new.len();
        assert_eq!(seen.len(), each_once, "{before} to {format}: {seen:#?}");
        before = format;
    }
}

#[test]
fn the_keys_of_a_server_stay_together_whatever_is_done_to_one_of_them() {
    let stage = Stage::new("together");
    let operator = stage.operator("east").policy(ALL).start().unwrap();
    let (addresses, zone, mut spec) = pod_and_spec(&stage);
    let keys: Vec<String> = expected("Traefik", &stage.namespace, &zone, &addresses[0])
        .into_iter()
        .map(|(key, _)| key)
        .collect();
    let [url, weight] = keys.as_slice() else {
        panic!("two keys: {keys:?}");
    };
    spec["format"] = settings("Traefik");
    stage.register("web", &spec);
    stage.wait_keys("traefik/", &keys);
    let wait = |value: &str| {
        testbed::eventually(crate::support::SOON, "both keys on one lease", || {
            let found = stage.registry.try_list("traefik/")?;
            match found.as_slice() {
                [first, second] if first.lease == second.lease && second.value == value => {
                    Ok(first.lease)
                }
                _ => Err(format!("{found:#?}")),
            }
        })
        .unwrap()
    };
    let lease = wait("7");

    // What did not change is not put again.
    let watcher = Watcher::start(&stage.etcd, "traefik/");
    stage.change("web", &json!({"weight": 9}));
    assert_eq!(wait("9"), lease);
    let seen = watcher.seen();
    assert!(seen.len() == 1 && seen[0].key == *weight, "{seen:#?}");

    // On a lease of this term the missing one is put back, and nothing else.
    watcher.forget();
    stage.registry.delete(weight);
    watcher.wait("the weight to be back", |seen| seen.put.is_some());
    assert_eq!(wait("9"), lease);
    assert_eq!(watcher.seen().len(), 2);

    // Nothing is put on a lease of another term: both go to a new one.
    operator.kill().unwrap();
    operator.start().unwrap();
    stage.wait_condition("web", "Ready", "True", "Registered");
    watcher.forget();
    stage.registry.delete(weight);
    watcher.wait("the weight to be back", |seen| {
        seen.put.is_some() && seen.key == *weight
    });
    assert_ne!(wait("9"), lease);
    let seen = watcher.seen();
    let puts: Vec<_> = seen.iter().filter(|seen| seen.put.is_some()).collect();
    assert!(
        puts.len() == 2 && puts[0].key == *url && puts[0].revision == puts[1].revision,
        "{seen:#?}"
    );
}

/// The only record below the prefix of APISIX, once it is that.
fn wait_upstream(stage: &Stage, wanted: &(String, String)) -> i64 {
    testbed::eventually(crate::support::SOON, "the upstream", || {
        let found = stage.registry.try_list("/apisix/")?;
        match found.as_slice() {
            [one] if (&one.key, &one.value) == (&wanted.0, &wanted.1) => Ok(one.lease),
            _ => Err(format!("{found:#?} instead of {wanted:#?}")),
        }
    })
    .unwrap()
}

#[test]
fn an_upstream_of_apisix_holds_all_ready_pods_and_stands_without_any() {
    let stage = Stage::new("upstream");
    let operator = stage.operator("east").policy(ALL).start().unwrap();
    let namespace = &stage.namespace;
    let spec = json!({
        "service": "web",
        "selector": {"matchLabels": {"app": "web"}},
        "ports": [{"name": "http", "port": 8080, "scheme": "http"}],
        "addressFamilies": ["IPv4", "IPv6"],
        "format": settings("Apisix"),
        "weight": 7,
    });
    // Before the first pod, and ready.
    stage.register("web", &spec);
    wait_upstream(&stage, &upstream(namespace, &[]));
    stage.wait_condition("web", "Ready", "True", "Registered");

    let mut pods: Vec<Vec<String>> = Vec::new();
    let labels = json!({"labels": {"app": "web"}});
    for pod in ["web-0", "web-1", "web-2"] {
        stage.create_pod(pod, "web", &labels, &json!({}));
    }
    for pod in ["web-0", "web-1", "web-2"] {
        let zone = stage_zone(&stage, pod);
        let nodes = canonical(&stage.wait_ready(pod)).into_iter().map(|ip| {
            let host = if ip.contains(':') {
                format!("[{ip}]")
            } else {
                ip
            };
            format!(r#"{{"host":"{host}","port":8080,"weight":7,"metadata":{{"zone":"{zone}"}}}}"#)
        });
        pods.push(nodes.collect());
    }
    let with = |which: &[usize]| {
        let mut nodes: Vec<String> = which.iter().flat_map(|at| pods[*at].clone()).collect();
        nodes.sort();
        upstream(namespace, &nodes)
    };
    let lease = wait_upstream(&stage, &with(&[0, 1, 2]));
    stage.wait_registration("web", "six endpoints", |object| {
        let status = &object["status"];
        status["registered"] == 6
            && status["discovered"] == 6
            && status["endpoints"].as_array().map(Vec::len) == Some(6)
            && status["clusters"] == json!([{"name": "east", "endpoints": 6}])
    });
    stage.wait_condition("web", "Ready", "True", "Registered");

    // A restart is seen by nobody, and what is gone is gone at once.
    let watcher = Watcher::start(&stage.etcd, "/apisix/");
    operator.kill().unwrap();
    operator.start().unwrap();
    stage.wait_condition("web", "Ready", "True", "Registered");
    stage.set_ready("web-1", false);
    wait_upstream(&stage, &with(&[0, 2]));
    assert_eq!(watcher.seen().len(), 1, "{:#?}", watcher.seen());
    stage.delete_pod("web-0");
    wait_upstream(&stage, &with(&[2]));

    // A person finds out by the command, too.
    let found = std::process::Command::new(crate::support::BINARY)
        .args([
            "discover",
            "web",
            "-n",
            namespace,
            "--format",
            "Apisix",
            "-o",
            "addresses",
        ])
        .env_clear()
        .env("ETCD_REGISTRAR_ETCD_ENDPOINTS", stage.etcd.endpoints_arg())
        .output()
        .unwrap();
    let printed = String::from_utf8(found.stdout).unwrap();
    assert_eq!(printed.lines().count(), 2, "{printed}");
    assert!(
        printed.lines().all(|line| line.ends_with(":8080")),
        "{printed}"
    );

    // Down to none it stays, on a lease that is kept.
    stage.set_ready("web-2", false);
    wait_upstream(&stage, &upstream(namespace, &[]));
    stage.wait_registration("web", "no endpoint", |object| {
        object["status"]["registered"] == 0
    });
    stage.set_ready("web-2", true);
    assert_ne!(
        wait_upstream(&stage, &with(&[2])),
        lease,
        "that of another term"
    );
    let seen = watcher.seen();
    assert!(seen.iter().all(|seen| seen.put.is_some()), "{seen:#?}");

    stage.unregister("web");
    stage.wait_keys::<&str>("/apisix/", &[]);
}

/// The zone of a pod of the testbed: the end of its node's name.
fn stage_zone(stage: &Stage, pod: &str) -> String {
    stage.wait_ready(pod);
    let node = stage.pod(pod).unwrap()["spec"]["nodeName"].clone();
    node.as_str()
        .unwrap()
        .rsplit('-')
        .next()
        .unwrap()
        .to_owned()
}

#[test]
fn an_upstream_of_another_is_never_touched() {
    let stage = Stage::new("upstream-taken");
    let _operator = stage.operator("east").policy(ALL).start().unwrap();
    let (addresses, zone, mut spec) = pod_and_spec(&stage);
    let wanted = expected("Apisix", &stage.namespace, &zone, &addresses[0]).remove(0);
    let taken = (wanted.0.clone(), r#"{"nodes":[]}"#.to_owned());
    stage.etcd.etcdctl(&["put", &taken.0, &taken.1]).unwrap();
    spec["format"] = settings("Apisix");
    stage.register("web", &spec);
    stage.wait_condition("web", "Conflict", "True", "KeyTaken");
    stage.wait_condition("web", "Ready", "False", "Conflicting");
    wait_upstream(&stage, &taken);
    stage.registry.delete(&taken.0);
    stage.wait_condition("web", "Ready", "True", "Registered");
    wait_upstream(&stage, &wanted);
}
