//! The command `diff`: what it says is what the operator then does.

use serde_json::{Value, json};
use testbed::eventually;

use crate::commands::ends;
use crate::support::{Registry, SOON, Stage};

/// What it prints, which ends with this code.
fn diff(stage: &Stage, args: &[&str], code: i32) -> (String, String) {
    let kubeconfig = stage.plane.kubeconfig.display().to_string();
    let mut all = vec!["--cluster-name", "east", "--kubeconfig", &kubeconfig];
    all.extend(args);
    ends(&stage.etcd, "diff", &all, code)
}

#[test]
fn the_difference_is_told_and_goes_with_the_operator() {
    let stage = Stage::new("diff");
    let registry: &Registry = &stage.registry;
    let web = |name: &str| {
        stage.create_pod(name, "web", &json!({}), &json!({}));
        format!(
            "{}{}:8080",
            stage.scope("web") + "east/",
            stage.wait_ready(name)[0]
        )
    };
    stage.register(
        "web",
        &json!({
            "selector": {"matchLabels": {"app": "web"}},
            "ports": [{"name": "http", "port": 8080}],
        }),
    );
    let keys = [web("web-0"), web("web-1"), web("web-2"), web("web-3")];
    // Nothing stands yet, and no operator is needed to say so.
    let (text, _) = diff(&stage, &[], 1);
    assert_eq!(text.lines().count(), 4, "{text}");
    assert!(text.starts_with("+ "), "{text}");

    let operator = stage.operator("east").start().unwrap();
    stage.wait_keys(&stage.scope("web"), &keys);
    assert_eq!(diff(&stage, &[], 0), (String::new(), String::new()));
    operator.kill().unwrap();

    // One comes, one goes, one is altered, another is taken from its lease. The new one first: it would get the address.
    let new = web("web-4");
    stage.delete_pod("web-0");
    eventually(SOON, "the end of the pod", || match stage.pod("web-0") {
        Ok(_) => Err("it is there".to_owned()),
        Err(_) => Ok(()),
    })
    .unwrap();
    let record = registry.get(&keys[1]).unwrap();
    let mut value = record.json();
    value["weight"] = json!(7);
    registry.put(&keys[1], &value.to_string(), record.lease);
    registry.put(&keys[2], "x", 0);
    let name = format!("{}/web", stage.namespace);
    let (text, _) = diff(&stage, &[], 1);
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    let mut wanted = [
        format!("- {}   {name}: nobody wants it", keys[0]),
        format!("~ {}   {name}: weight is 7 and should be 100", keys[1]),
        format!(
            "~ {}   {name}: another writer has it, without a lease",
            keys[2]
        ),
        format!("+ {new}   {name}: wanted for pod web-4, and not there"),
    ];
    wanted.sort_unstable();
    // The members of the altered value are in another order, too; that alone is no difference.
    assert_eq!(lines, wanted);
    let (text, _) = diff(&stage, &["-o", "json", "-n", &stage.namespace], 1);
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 4);
    let missing = list
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["change"] == "missing");
    assert_eq!(missing.unwrap()["key"], json!(new));
    assert_eq!(diff(&stage, &["-n", "other"], 0).0, "");

    // The operator does what was said.
    registry.delete(&keys[2]);
    operator.start().unwrap();
    let stands = [keys[1].clone(), keys[2].clone(), keys[3].clone(), new];
    stage.wait_keys(&stage.scope("web"), &stands);
    eventually(SOON, "no difference", || {
        let kubeconfig = stage.plane.kubeconfig.display().to_string();
        let args = ["--cluster-name", "east", "--kubeconfig", &kubeconfig];
        let output = crate::commands::output(&stage.etcd, "diff", &args);
        match output.status.code() {
            Some(0) => Ok(()),
            _ => Err(String::from_utf8_lossy(&output.stdout).into_owned()),
        }
    })
    .unwrap();

    // A name of somebody else is no difference, but trouble; so is what can't be read.
    let (_, stderr) = {
        registry.put("/registrar/west/owner", "another", 0);
        let kubeconfig = stage.plane.kubeconfig.display().to_string();
        let args = ["--cluster-name", "west", "--kubeconfig", &kubeconfig];
        ends(&stage.etcd, "diff", &args, 2)
    };
    assert!(
        stderr.contains("belongs to the cluster with the UID another"),
        "{stderr}"
    );
    let (_, stderr) = diff(&stage, &["--policy-file=/no/such"], 2);
    assert!(stderr.contains("--policy-file"), "{stderr}");
    let lacking = crate::support::without(&stage, "no-pods", "pods", &["list", "watch"]);
    let lacking = lacking.display().to_string();
    let args = ["--cluster-name", "east", "--kubeconfig", &lacking];
    let (stdout, stderr) = ends(&stage.etcd, "diff", &args, 2);
    assert_eq!(stdout, "");
    assert!(stderr.contains("can't list /api/v1/pods"), "{stderr}");
    stage.etcd.kill().unwrap();
    let (_, stderr) = diff(&stage, &["--timeout=1s"], 2);
    assert!(stderr.contains("does etcd run there?"), "{stderr}");
}
