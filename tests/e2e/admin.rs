//! Health, metrics, logs and help, as those see them who run the operator.

use std::process::Command;

use serde_json::{Value, json};
use testbed::eventually;

use crate::support::{BINARY, SOON, Stage};

#[test]
fn health_and_metrics_tell_what_is_so() {
    let stage = Stage::new("admin");
    let operator = stage.operator("east").start().unwrap();
    for path in ["/healthz", "/readyz"] {
        let answer = operator.get(path).unwrap();
        assert_eq!(
            (answer.status, answer.body.as_str()),
            (200, "ok\n"),
            "{path}"
        );
    }
    assert_eq!(operator.get("/elsewhere").unwrap().status, 404);
    stage.register("web", &json!({}));
    for pod in ["web-0", "web-1", "web-2"] {
        stage.create_pod(pod, "web", &json!({}), &json!({}));
    }
    stage.wait_count(&stage.scope("web"), 3);
    stage.wait_condition("web", "Ready", "True", "Registered");
    let metric = |name: &str, labels: &[&str]| {
        operator
            .metric(&format!("etcd_registrar_{name}"), labels)
            .unwrap()
    };
    let becomes = |name: &str, labels: &[&str], value: f64| {
        eventually(SOON, &format!("{name}{labels:?} to be {value}"), || {
            let now = metric(name, labels);
            // An exact number, however it is computed.
            if (now - value).abs() < 0.001 {
                Ok(())
            } else {
                Err(now)
            }
        })
        .unwrap();
    };
    becomes("leader", &[], 1.0);
    becomes("live", &[], 1.0);
    becomes("registrations", &[], 1.0);
    becomes("endpoints_wanted", &[], 3.0);
    becomes("endpoints_registered", &[], 3.0);
    becomes("puts_total", &[], 3.0);
    becomes("build_info", &["version=\""], 1.0);

    // One observation a change that a reader of etcd sees, in its own series.
    becomes("propagation_seconds_count", &["change=\"put\""], 3.0);
    becomes("propagation_seconds_count", &["change=\"removal\""], 0.0);
    for round in 1..=3 {
        stage.set_ready("web-0", false);
        stage.wait_count(&stage.scope("web"), 2);
        stage.set_ready("web-0", true);
        stage.wait_count(&stage.scope("web"), 3);
        becomes(
            "propagation_seconds_count",
            &["change=\"removal\""],
            f64::from(round),
        );
        becomes(
            "propagation_seconds_count",
            &["change=\"put\""],
            f64::from(3 + round),
        );
    }
    let sum = metric("propagation_seconds_sum", &[]);
    assert!(sum > 0.0 && sum < 9.0 * 2.0, "{sum}");
    becomes("removals_total", &[], 3.0);

    // Every family is explained, has a type, and is in the text that Prometheus reads to its end.
    let text = operator.metrics().unwrap();
    assert!(text.ends_with("# EOF\n"), "{text}");
    let names = |kind: &str| -> Vec<String> {
        text.lines()
            .filter_map(|line| line.strip_prefix(kind)?.split(' ').next())
            .map(str::to_owned)
            .collect()
    };
    let (help, types) = (names("# HELP "), names("# TYPE "));
    assert!(help.len() >= 20, "{help:?}");
    assert_eq!(help, types);
    for line in text.lines().filter(|line| line.starts_with("# HELP ")) {
        assert!(line.split(' ').count() >= 5, "no explanation: {line}");
    }
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        assert!(
            help.iter().any(|name| line.starts_with(name.as_str())),
            "no help: {line}"
        );
    }

    // At rest nothing waits: alerts look at these.
    for name in ["queue_depth", "lanes_busy"] {
        let name = format!("etcd_registrar_{name}");
        eventually(SOON, &format!("{name} to be 0"), || {
            match operator
                .metric(&name, &[])
                .map_err(|error| error.to_string())?
            {
                0.0 => Ok(()),
                depth => Err(format!("it is {depth}")),
            }
        })
        .unwrap();
    }

    // An etcd that is away makes nobody restart the replica, and one that is ready stays so.
    stage.etcd.freeze().unwrap();
    eventually(SOON, "the operator to notice", || {
        let log = operator.log();
        if log.contains("etcd can't be reached") {
            Ok(())
        } else {
            Err(log)
        }
    })
    .unwrap();
    assert_eq!(operator.get("/healthz").unwrap().status, 200);
    assert_eq!(operator.get("/readyz").unwrap().status, 200);
    stage.etcd.thaw().unwrap();
}

#[test]
fn the_log_is_json_for_machines_and_has_no_line_a_pod() {
    let stage = Stage::new("logs");
    let operator = stage.operator("east").start().unwrap();
    stage.register("web", &json!({}));
    let deployment = crate::support::deployment("web", 300);
    stage.apply(&deployment.to_string());
    stage
        .plane
        .cluster
        .wait_rollout(&stage.namespace, "deployment/web")
        .unwrap();
    stage.wait_count(&stage.scope("web"), 300);
    stage.kubectl(&["scale", "deployment/web", "--replicas=0"]);
    stage.wait_count(&stage.scope("web"), 0);
    stage.kubectl(&["delete", "deployment", "web"]);
    operator.stop().unwrap();

    let log = operator.log();
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    for line in &lines {
        for member in ["timestamp", "level", "message", "target"] {
            assert!(line[member].is_string(), "{member}: {line}");
        }
    }
    assert!(!log.contains("web-"), "a pod is named: {log}");
    assert!(
        (3..=20).contains(&lines.len()),
        "{} lines: {log}",
        lines.len()
    );
    // Where it began and ended, and with what.
    let told = |message: &str| {
        lines
            .iter()
            .find(|line| line["message"] == message)
            .unwrap_or_else(|| panic!("{message}: {log}"))
    };
    let start = told("starting");
    assert_eq!(start["cluster"], "east");
    assert_eq!(start["version"], env!("CARGO_PKG_VERSION"));
    told("handed over");
    for level in ["WARN", "ERROR"] {
        assert!(lines.iter().all(|line| line["level"] != level), "{log}");
    }
}

#[test]
fn help_names_every_flag_with_its_variable_and_shows_no_value_of_it() {
    let help = |command: &[&str]| {
        let output = Command::new(BINARY)
            .args(command)
            .arg("--help")
            .env("ETCD_REGISTRAR_ETCD_USER", "root:s3cret")
            .env(
                "ETCD_REGISTRAR_ETCD_ENDPOINTS",
                "https://root:s3cret@a:2379",
            )
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let all = help(&[]);
    for command in ["run", "crd", "purge"] {
        assert!(all.contains(&format!("  {command}")), "{all}");
    }
    for command in ["run", "purge"] {
        let text = help(&[command]);
        assert!(!text.contains("s3cret"), "{text}");
        let flags: Vec<&str> = text
            .split_whitespace()
            .filter(|word| word.starts_with("--") && *word != "--help")
            .map(|word| word.trim_matches(|c: char| !c.is_ascii_alphanumeric() && c != '-'))
            .collect();
        assert!(flags.contains(&"--etcd-endpoints"), "{flags:?}");
        for flag in flags {
            let variable = flag
                .trim_start_matches('-')
                .replace('-', "_")
                .to_uppercase();
            assert!(
                text.contains(&format!("[env: ETCD_REGISTRAR_{variable}")),
                "{flag}: {text}"
            );
        }
    }
}
