//! The command `discover`, as persons and scripts see it.

use std::process::Output;

use serde_json::{Value, json};
use testbed::eventually;

use crate::commands::{self, Running};
use crate::support::{SOON, Stage};

/// Two clusters' records of a service, and what else may stand in a registry.
fn stage() -> testbed::Etcd {
    let etcd = testbed::Etcd::builder("discover")
        .unsafe_no_fsync()
        .start()
        .unwrap();
    let record = |cluster: &str, address: &str, zone: &str| {
        let (host, port) = address.rsplit_once(':').unwrap();
        let value = json!({
            "address": address, "host": host, "port": port.parse::<u16>().unwrap(), "portName": "http",
            "protocol": "TCP", "scheme": "http", "family": "IPv4", "cluster": cluster, "namespace": "shop",
            "service": "web", "pod": format!("web-{cluster}"), "uid": "0b9e", "node": "n1", "zone": zone,
            "weight": 100, "metadata": {"version": "v1", "note": "a, \"b\""},
        });
        put(
            &etcd,
            &format!("/services/shop/web/{cluster}/{address}"),
            &value.to_string(),
        );
    };
    record("east", "10.1.2.3:8080", "eu-a");
    record("west", "10.2.7.1:8080", "eu-long-name");
    put(&etcd, "/services/shop/web2/east/10.9.9.9:80", "{}");
    put(
        &etcd,
        "grpc/web/1",
        r#"{"Op":0,"Addr":"10.1.2.3:9090","Metadata":null}"#,
    );
    etcd
}

fn put(etcd: &testbed::Etcd, key: &str, value: &str) {
    etcd.etcdctl(&["put", key, value]).unwrap();
}

fn output(etcd: &testbed::Etcd, args: &[&str]) -> Output {
    commands::output(etcd, "discover", args)
}

fn watching(etcd: &testbed::Etcd, args: &[&str]) -> Running {
    Running::start(commands::command(etcd, "discover", args))
}

/// What is printed, of a command that finds something.
fn printed(etcd: &testbed::Etcd, args: &[&str]) -> String {
    let output = output(etcd, args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
    assert_eq!(stderr, "", "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_output_of_discover() {
    let etcd = stage();
    assert_eq!(
        printed(&etcd, &["web", "-n", "shop"]),
        "\
ADDRESS         PORT   CLUSTER   ZONE           POD        WEIGHT
10.1.2.3:8080   http   east      eu-a           web-east   100
10.2.7.1:8080   http   west      eu-long-name   web-west   100
"
    );
    let wide = printed(
        &etcd,
        &["web", "-n", "shop", "-o", "wide", "--cluster", "east"],
    );
    let lines: Vec<&str> = wide.lines().collect();
    let cells = |line: &str| -> Vec<String> {
        let cells = line.split("   ").filter(|cell| !cell.is_empty());
        cells.map(|cell| cell.trim().to_owned()).collect()
    };
    assert_eq!(
        cells(lines[0]).join("|"),
        "NAMESPACE|SERVICE|ADDRESS|PORT|SCHEME|CLUSTER|ZONE|NODE|POD|WEIGHT|METADATA|KEY"
    );
    assert_eq!(
        cells(lines[1]).join("|"),
        "shop|web|10.1.2.3:8080|http|http|east|eu-a|n1|web-east|100|note=a, \"b\",version=v1|/services/shop/web/east/10.1.2.3:8080"
    );
    assert_eq!(lines[0].find("KEY"), lines[1].find("/services/"));
    assert_eq!(
        printed(
            &etcd,
            &[
                "web",
                "-n",
                "shop",
                "-o",
                "addresses",
                "--zone",
                "eu-long-name,eu-b"
            ]
        ),
        "10.2.7.1:8080\n"
    );
    let csv = printed(&etcd, &["web", "--namespace=shop", "-o", "csv"]);
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(
        lines[..2],
        [
            "address,portName,protocol,scheme,cluster,namespace,service,pod,uid,node,zone,weight,metadata,key",
            "10.1.2.3:8080,http,TCP,http,east,shop,web,web-east,0b9e,n1,eu-a,100,\"note=a, \"\"b\"\",version=v1\",/services/shop/web/east/10.1.2.3:8080",
        ]
    );
    assert_eq!(lines.len(), 3);
    let list: Value =
        serde_json::from_str(&printed(&etcd, &["web", "-n", "shop", "-o", "json"])).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 2);
    // The members of the record, and its key.
    let value = etcd
        .etcdctl(&[
            "get",
            "/services/shop/web/east/10.1.2.3:8080",
            "--print-value-only",
        ])
        .unwrap();
    let mut record: Value = serde_json::from_str(&value).unwrap();
    record["key"] = json!("/services/shop/web/east/10.1.2.3:8080");
    assert_eq!(list[0], record);
    // Another format, of all services below a prefix; what it does not tell is a dash.
    assert_eq!(
        printed(&etcd, &["--format", "grpc", "--prefix", "grpc/"]),
        "\
NAMESPACE   SERVICE   ADDRESS         PORT   CLUSTER   ZONE   POD   WEIGHT
-           web       10.1.2.3:9090   -      -         -      -     -
"
    );
}

#[test]
fn discover_says_what_is_wrong_and_ends_with_a_code() {
    let etcd = stage();
    let ends = |args: &[&str], code: i32, part: &str| {
        let output = output(&etcd, args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(part), "{args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(ends(&["web"], 3, "give -n"), "");
    assert_eq!(
        ends(
            &["nothing", "-n", "shop", "-o", "json"],
            3,
            "no such endpoint"
        ),
        "[]\n"
    );
    // A record that can't be read is named, and nothing else fails for it.
    ends(
        &["web2", "-n", "shop"],
        3,
        "/services/shop/web2/east/10.9.9.9:80",
    );
    ends(&["a/b"], 1, "service name");
    ends(&["web", "--format", "SkyDns"], 1, "/skydns/local/skydns/");
    ends(&["web", "--format", "Yaml"], 2, "write one of Json, Plain");
    ends(&["web", "--metadata", "version"], 2, "name=value");
    let port = testbed::free_port().unwrap();
    let nowhere = format!("--etcd-endpoints=http://127.0.0.1:{port}");
    ends(
        &["web", "--timeout=1s", &nowhere],
        1,
        "does etcd run there?",
    );
}

#[test]
fn discover_prints_changes_as_they_come() {
    let etcd = stage();
    let table = watching(&etcd, &["web", "-n", "shop", "--watch", "--cluster=east"]);
    assert_eq!(
        table.next(),
        "CHANGE    ADDRESS         PORT   CLUSTER   ZONE   POD        WEIGHT"
    );
    assert_eq!(
        table.next(),
        "ADDED     10.1.2.3:8080   http   east      eu-a   web-east   100"
    );
    let json = watching(&etcd, &["web", "-n", "shop", "-w", "-o", "json"]);
    for address in ["10.1.2.3:8080", "10.2.7.1:8080"] {
        let line: Value = serde_json::from_str(&json.next()).unwrap();
        assert_eq!(
            (&line["change"], &line["endpoint"]["address"]),
            (&json!("added"), &json!(address))
        );
    }
    let key = "/services/shop/web/east/10.1.2.3:8080";
    put(
        &etcd,
        key,
        r#"{"address":"10.1.2.3:8080","host":"10.1.2.3","port":8080,"scheme":"http","weight":7}"#,
    );
    assert_eq!(
        table.next(),
        "CHANGED   10.1.2.3:8080   -      east      -      -          7"
    );
    let line: Value = serde_json::from_str(&json.next()).unwrap();
    assert_eq!(
        (&line["change"], &line["endpoint"]["weight"]),
        (&json!("changed"), &json!(7))
    );
    // It says when it does not know, and goes on.
    etcd.kill().unwrap();
    assert!(table.next().contains("etcd is away"));
    etcd.start().unwrap();
    assert!(table.next().contains("etcd is back"));
    etcd.etcdctl(&["del", key]).unwrap();
    assert_eq!(
        table.next(),
        "REMOVED   10.1.2.3:8080   -      east      -      -          7"
    );
}

#[test]
fn discover_finds_what_the_operator_registers() {
    let stage = Stage::new("discover");
    let _operator = stage.operator("east").start().unwrap();
    stage.create_pod(
        "web-0",
        "web",
        &json!({"labels": {"app": "web"}}),
        &json!({}),
    );
    let address = format!("{}:8080\n", stage.wait_ready("web-0")[0]);
    stage.register(
        "web",
        &json!({
            "selector": {"matchLabels": {"app": "web"}},
            "ports": [{"name": "http", "port": 8080}],
        }),
    );
    eventually(SOON, "the endpoint", || {
        let output = output(
            &stage.etcd,
            &["web", "-n", &stage.namespace, "-o", "addresses"],
        );
        if output.stdout == address.as_bytes() {
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    })
    .unwrap();
}
