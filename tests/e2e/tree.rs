//! The command `tree`.

use serde_json::{Value, json};

use crate::commands::ends;
use crate::support::Registry;

#[test]
fn the_tree_of_a_registry() {
    let etcd = testbed::Etcd::builder("tree")
        .unsafe_no_fsync()
        .start()
        .unwrap();
    let registry = Registry::connect(&etcd);
    let lease = |ttl: &str| {
        let told = etcd
            .etcdctl(&["lease", "grant", ttl, "-w", "json"])
            .unwrap();
        serde_json::from_str::<Value>(&told).unwrap()["ID"]
            .as_i64()
            .unwrap()
    };
    let long = lease("1000000");
    for (namespace, service, cluster, host, lease) in [
        ("shop", "web", "east", "10.1.2.3", long),
        ("shop", "web", "east", "10.1.2.4", long),
        ("shop", "web", "west", "10.2.7.1", 0),
        ("shop", "api", "east", "10.1.2.5", long),
        ("bank", "web", "east", "10.1.2.6", long),
    ] {
        let address = format!("{host}:80");
        let value = json!({"address": address, "host": host, "port": 80, "pod": "web-0", "portName": "http"});
        let key = format!("/services/{namespace}/{service}/{cluster}/{address}");
        registry.put(&key, &value.to_string(), lease);
    }
    let tree = |args: &[&str], code| ends(&etcd, "tree", args, code);
    let (text, _) = tree(&[], 0);
    // How far in, and the words; the seconds that are left pass meanwhile.
    let lines: Vec<String> = text
        .lines()
        .map(|line| {
            let indent = line.len() - line.trim_start().len();
            let words: Vec<_> = line.split_whitespace().collect();
            let words = words.join(" ");
            let words = ["1000000", "999999", "999998"]
                .iter()
                .fold(words, |words, seconds| words.replace(seconds, "N"));
            format!("{indent} {words}")
        })
        .collect();
    assert_eq!(
        lines,
        [
            "0 NAME ENDPOINTS LEASE",
            "0 /services/ 5 N s left, 1 without a lease",
            "2 bank 1 N s left",
            "4 web 1 N s left",
            "6 east 1 N s left",
            "8 10.1.2.6:80 web-0 N s left",
            "2 shop 4 N s left, 1 without a lease",
            "4 api 1 N s left",
            "6 east 1 N s left",
            "8 10.1.2.5:80 web-0 N s left",
            "4 web 3 N s left, 1 without a lease",
            "6 east 2 N s left",
            "8 10.1.2.3:80 web-0 N s left",
            "8 10.1.2.4:80 web-0 N s left",
            "6 west 1 no lease",
            "8 10.2.7.1:80 web-0 no lease",
        ]
    );
    let (text, _) = tree(&["-n", "shop", "--depth=service"], 0);
    assert_eq!(text.lines().count(), 5, "{text}");
    let (text, _) = tree(&["web", "-n=shop", "-o=json"], 0);
    let told: Value = serde_json::from_str(&text).unwrap();
    let cluster = &told["namespaces"][0]["services"][0]["clusters"][0];
    let endpoint = &cluster["endpoints"][0];
    assert_eq!(
        (&told["format"], &cluster["cluster"], &endpoint["address"]),
        (&json!("Json"), &json!("east"), &json!("10.1.2.3:80"))
    );
    assert_eq!(endpoint["lease"]["ttlSeconds"], 1_000_000);
    assert_eq!(endpoint["lease"]["id"], format!("{long:x}"));
    assert!(endpoint["lease"]["secondsLeft"].as_i64().unwrap() > 999_000);
    assert_eq!(told["namespaces"].as_array().unwrap().len(), 1);
    // `web` of every namespace.
    let (text, _) = tree(&["web", "--depth=namespace"], 0);
    assert_eq!(text.lines().count(), 4, "{text}");
    // What can't be read is said, and another format has other names.
    registry.put("/services/shop/web/east/odd", "x", 0);
    let (_, stderr) = tree(&[], 0);
    assert!(stderr.contains("1 key can't be read as Json"), "{stderr}");
    registry.put(
        "grpc/web/10.0.0.1:80",
        r#"{"Op":0,"Addr":"10.0.0.1:80","Metadata":null}"#,
        0,
    );
    let (text, _) = tree(&["--format=Grpc", "--prefix=grpc/", "--depth=cluster"], 0);
    let last: Vec<_> = text.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(last, ["-", "1", "no", "lease"]);
    let (text, stderr) = tree(&["nothing"], 3);
    assert_eq!(text, "");
    assert!(stderr.contains("no endpoint"), "{stderr}");
}
