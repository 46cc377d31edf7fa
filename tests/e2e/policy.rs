//! The policy: what it grants by default and by its file, how it changes, and what a refusal says.

use serde_json::json;
use testbed::{always, eventually};

use crate::support::{SOON, Stage, Watcher};

/// Long enough for what is wrong to happen: writes take milliseconds.
const A_MOMENT: std::time::Duration = std::time::Duration::from_millis(500);

const OWN: &str = "
  - namespaces: ['*']
    formats: [Json]
    prefixes: ['/services/{namespace}/']
";

fn ready(stage: &Stage, name: &str) {
    stage.wait_condition(name, "Ready", "True", "Registered");
}

/// The log has an error or a warning that holds all of these.
fn wait_said(operator: &testbed::Operator, parts: &[&str]) {
    eventually(SOON, &format!("a line with {parts:?}"), || {
        let log = operator.log_of_run();
        log.lines()
            .any(|line| parts.iter().all(|part| line.contains(part)))
            .then_some(())
            .ok_or(log)
    })
    .unwrap();
}

#[test]
fn without_a_file_a_namespace_has_its_own_prefix_and_a_refusal_holds_the_rule_that_would_allow_it()
{
    let stage = Stage::new("policy");
    let operator = stage.operator("east").start().unwrap();
    stage.create_pod("web-0", "web", &json!({}), &json!({}));
    let address = format!("{}:8080", stage.wait_ready("web-0").remove(0));
    let web = json!({"selector": {"matchLabels": {"app": "web"}}, "service": "web"});
    let with = |more: serde_json::Value| {
        let mut spec = web.clone();
        for (key, value) in more.as_object().unwrap() {
            spec[key] = value.clone();
        }
        spec
    };
    stage.register("own", &with(json!({})));
    ready(&stage, "own");
    let cases = [
        (
            "plain",
            with(json!({"format": {"type": "Plain"}, "prefix": "/"})),
        ),
        (
            "plain-bare",
            with(json!({"format": {"type": "Plain"}, "prefix": "", "service": "web.rpc"})),
        ),
        (
            "grpc",
            with(json!({"format": {"type": "Grpc"}, "prefix": "grpc/"})),
        ),
        ("other-prefix", with(json!({"prefix": "/teams/"}))),
        (
            "odd-name",
            with(json!({"prefix": "/odd/", "service": "1.0"})),
        ),
    ];
    for (name, spec) in &cases {
        stage.register(name, spec);
    }
    // The rules of the messages as they stand there, one after the other.
    let mut rules = String::new();
    for (name, _) in &cases {
        let message = stage.wait_condition(name, "Accepted", "False", "NotGranted");
        assert!(message.contains(&stage.namespace), "{message}");
        let (_, rule) = message.split_once("rules:\n").unwrap();
        rules += rule;
        rules += "\n";
    }
    // The operator's own keys are never anybody's.
    stage.register("own-keys", &with(json!({"prefix": "/registrar/"})));
    let message = stage.wait_condition("own-keys", "Accepted", "False", "ReservedPrefix");
    assert!(message.contains("/registrar/"), "{message}");
    stage.unregister("own-keys");
    let own = format!("{}east/{address}", stage.scope("web"));
    let all = |stage: &Stage| {
        let mut found = stage.registry.list("");
        found.retain(|record| !record.key.starts_with("/registrar/"));
        crate::support::keys(&found)
    };
    assert_eq!(all(&stage), [own.as_str()]);
    operator.stop().unwrap();

    // Pasted into a policy, they make exactly those registrations accepted. The rule of the default is not among them.
    let policy = format!("rules:\n{OWN}{}", indented(&rules));
    let operator = stage.operator("east").policy(&policy).start().unwrap();
    for (name, _) in &cases {
        ready(&stage, name);
    }
    let namespace = &stage.namespace;
    let mut expected = vec![
        own,
        format!("/teams/{namespace}/web/east/{address}"),
        format!("/odd/{namespace}/1.0/east/{address}"),
        format!("/web/{address}"),
        format!("grpc/web/{address}"),
        format!("web.rpc/{address}"),
    ];
    expected.sort();
    assert_eq!(all(&stage), expected);
    operator.stop().unwrap();
}

/// A list of rules as it stands in a message, as an entry of a longer list.
fn indented(rules: &str) -> String {
    rules.lines().map(|line| format!("  {line}\n")).collect()
}

#[test]
fn a_changed_policy_is_followed_and_a_malformed_one_is_not() {
    let stage = Stage::new("policy-change");
    let namespace = stage.namespace.clone();
    let other = stage.plane.cluster.new_namespace("policy-other").unwrap();
    let plain = format!(
        "  - namespaces: [{namespace}, {other}]\n    formats: [Plain, Grpc]\n    prefixes: ['{{namespace}}/', '/{{namespace}}/']\n"
    );
    let wide = format!("rules:\n{OWN}{plain}");
    let operator = stage.operator("east").policy(&wide).start().unwrap();
    let spec = |format: &str, prefix: String| json!({"selector": {"matchLabels": {"app": "web"}}, "format": {"type": format}, "prefix": prefix});
    for pod in ["web-0", "web-1"] {
        stage.create_pod(pod, "web", &json!({}), &json!({}));
    }
    stage.register("plain", &spec("Plain", format!("/{namespace}/")));
    stage.register("grpc", &spec("Grpc", format!("{namespace}/")));
    stage.register(
        "json",
        &json!({"selector": {"matchLabels": {"app": "web"}}}),
    );
    let granted = [
        format!("/{namespace}/plain/"),
        format!("{namespace}/grpc/"),
        stage.scope("json"),
    ];
    for prefix in &granted {
        stage.wait_count(prefix, 2);
    }
    let watcher = Watcher::start(&stage.etcd, "");
    let records = |watcher: &Watcher| {
        let mut seen = watcher.seen();
        seen.retain(|seen| !seen.key.starts_with("/registrar/"));
        seen
    };

    // Malformed: said, with the place, and nothing changes.
    for (text, parts) in [
        ("rules: [", &["line 2", "stays in force"][..]),
        (
            "rules:\n  - namespaces: ['*']\n    formats: [Jsn]\n    prefixes: ['/a/']\n",
            &["line 3", "Jsn", "Json", "stays in force"],
        ),
        ("", &["missing field `rules`", "stays in force"]),
    ] {
        operator.write_policy(text).unwrap();
        wait_said(&operator, parts);
        assert!(records(&watcher).is_empty(), "{:#?}", watcher.seen());
    }

    // Narrowed: the records of those that lost their grant go, and no others.
    let narrow = format!(
        "rules:\n{OWN}  - namespaces: ['{namespace}']\n    formats: [Grpc]\n    prefixes: ['{namespace}/']\n"
    );
    operator.write_policy(&narrow).unwrap();
    stage.wait_keys::<&str>(&granted[0], &[]);
    let message = stage.wait_condition("plain", "Accepted", "False", "NotGranted");
    assert!(message.contains(&format!("\"/{namespace}/\"")), "{message}");
    stage.wait_condition("grpc", "Accepted", "True", "Accepted");
    stage.wait_condition("json", "Accepted", "True", "Accepted");
    let seen = records(&watcher);
    assert_eq!(seen.len(), 2, "{seen:#?}");
    assert!(
        seen.iter()
            .all(|seen| seen.put.is_none() && seen.key.starts_with(&granted[0])),
        "{seen:#?}"
    );

    // Nothing comes back by a malformed one in between, and all of it by the wide one.
    watcher.forget();
    operator.write_policy("rules: {}").unwrap();
    wait_said(&operator, &["invalid type: map", "stays in force"]);
    always(A_MOMENT, "no record comes back", || {
        let back = stage.registry.try_list(&granted[0])?;
        if back.is_empty() {
            Ok(())
        } else {
            Err(format!("{back:?}"))
        }
    })
    .unwrap();
    operator.write_policy(&wide).unwrap();
    stage.wait_count(&granted[0], 2);
    ready(&stage, "plain");
    assert_eq!(records(&watcher).len(), 2);
    let _ = stage
        .plane
        .cluster
        .kubectl(&["delete", "namespace", &other, "--wait=false"]);
}
