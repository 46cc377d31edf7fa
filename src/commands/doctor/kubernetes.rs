//! What an operator needs of Kubernetes.
//!
//! Takes the flags, looks at the API server, the CustomResourceDefinition, the permissions and the clock. Must never write an object:
//! an access review is a question.

use std::time::{Duration, SystemTime};

use kube::client::Body;
use kube::core::CustomResourceExt;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{DoctorArgs, Findings, numbers};
use crate::api::ServiceRegistration;
use crate::kube::client::KubeClient;
use crate::kube::lists::get;
use crate::kube::probe;
use crate::kube::{GROUP, PLURAL, VERSION, explain};

/// The ClusterRole of the operator.
const RBAC: &str = include_str!("../../../deploy/rbac.yaml");

/// Its name there.
const ROLE: &str = "etcd-registrar";

/// The rules of the CustomResourceDefinition are written in CEL.
const OLDEST: (u32, u32) = (1, 25);

/// The header of an answer has whole seconds, and an answer takes its time.
const SKEW: Duration = Duration::from_secs(5);

/// A rule of a role.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    api_groups: Vec<String>,
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    resource_names: Vec<String>,
    verbs: Vec<String>,
}

/// Looks at everything; gives the UID of the cluster.
pub(super) async fn look(args: &DoctorArgs, findings: &mut Findings) -> Option<String> {
    let client = match KubeClient::new(args.kube.options()).await {
        Ok(client) => client,
        Err(error) => {
            findings.error(
                error.to_string(),
                "name the kubeconfig, or look at etcd alone: --only etcd",
            );
            return None;
        }
    };
    if !version(&client, args.timeout, findings).await {
        return None;
    }
    definition(&client, args.timeout, findings).await;
    permissions(&client, args.timeout, findings).await;
    match probe::uid(&client, probe::EVERYWHERE, args.timeout).await {
        Ok(uid) => {
            findings.ok(format!("the UID of this cluster is {uid}"));
            Some(uid)
        }
        Err(why) => {
            findings.error(
                format!(
                    "can't read the UID of the namespace kube-system: {}",
                    why.message
                ),
                "grant the verb get on this namespace: kubectl apply -k deploy/",
            );
            None
        }
    }
}

/// Whether the API server answers, which version it has, and what its clock says.
async fn version(client: &KubeClient, patience: Duration, findings: &mut Findings) -> bool {
    let server = client.server();
    let Ok(request) = http::Request::get("/version").body(Body::empty()) else {
        return false;
    };
    let advice =
        "check --kubeconfig and --context, and that the API server can be reached from here";
    let answer = match timeout(patience, client.current().send(request)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            let why = explain(&error);
            findings.error(
                format!("Kubernetes {server} does not answer: {why}"),
                advice,
            );
            return false;
        }
        Err(_) => {
            findings.error(
                format!("Kubernetes {server} does not answer within {patience:?}"),
                advice,
            );
            return false;
        }
    };
    let date = answer.headers().get(http::header::DATE).cloned();
    let body = match timeout(patience, answer.into_body().collect_bytes()).await {
        Ok(Ok(body)) => body,
        _ => {
            findings.error(format!("Kubernetes {server} breaks off its answer"), advice);
            return false;
        }
    };
    let told: Value = serde_json::from_slice(&body).unwrap_or_default();
    let version = told
        .get("gitVersion")
        .and_then(Value::as_str)
        .unwrap_or("?");
    match numbers(version) {
        Some(found) if found < OLDEST => findings.error(
            format!("Kubernetes {server} has version {version}"),
            "install 1.25 or newer: the rules of the CustomResourceDefinition need it",
        ),
        Some(_) => findings.ok(format!("Kubernetes {server} has version {version}")),
        None => {
            findings.error(
                format!("{server} does not answer as an API server of Kubernetes does"),
                advice,
            );
            return false;
        }
    }
    let date = date.and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
    if let Some(theirs) = date {
        let ours = SystemTime::now();
        let apart = match ours.duration_since(theirs) {
            Ok(apart) => apart,
            Err(error) => error.duration(),
        };
        if apart > SKEW {
            findings.warning(
                format!("the clock here and that of Kubernetes are {} s apart", apart.as_secs()),
                "let both be set by NTP: certificates and tokens are judged by them, and times in statuses",
            );
        } else {
            findings.ok("the clock here agrees with that of Kubernetes");
        }
    }
    true
}

/// Whether the CustomResourceDefinition is there, and this version's.
async fn definition(client: &KubeClient, patience: Duration, findings: &mut Findings) {
    let name = format!("{PLURAL}.{GROUP}");
    let apply = "kubectl apply -k deploy/, or etcd-registrar crd | kubectl apply -f -";
    let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}");
    let found = match get(client, &path, patience).await {
        Ok(body) => serde_json::from_str::<Value>(&body).unwrap_or_default(),
        Err(failure) if failure.code == Some(404) => {
            findings.error(
                format!("the CustomResourceDefinition {name} is not there"),
                apply,
            );
            return;
        }
        Err(failure) if failure.code == Some(403) => {
            // The operator itself may not read it, and need not.
            let path = format!("/apis/{GROUP}/{VERSION}/{PLURAL}?limit=1");
            match get(client, &path, patience).await {
                Err(failure) if failure.code == Some(404) => findings
                    .error(format!("the CustomResourceDefinition {name} is not there"), apply),
                _ => findings.warning(
                    format!("this user may not read the CustomResourceDefinition {name}: whether it is of this version is not known"),
                    "look again as one who may, such as a cluster-admin",
                ),
            }
            return;
        }
        Err(failure) => {
            findings.error(
                format!(
                    "the CustomResourceDefinition can't be read: {}",
                    failure.message
                ),
                "mend what it says, and look again",
            );
            return;
        }
    };
    let ours = serde_json::to_value(ServiceRegistration::crd()).unwrap_or_default();
    let schema = |crd: &Value| {
        let versions = crd.pointer("/spec/versions")?.as_array()?;
        let served = |version: &&Value| {
            version.get("name").and_then(Value::as_str) == Some(VERSION)
                && version.get("served") == Some(&Value::Bool(true))
        };
        versions.iter().find(served)?.get("schema").cloned()
    };
    match (schema(&ours), schema(&found)) {
        (Some(ours), Some(theirs)) if holds(&theirs, &ours) => findings.ok(format!(
            "the CustomResourceDefinition {name} is that of this version"
        )),
        (_, Some(_)) => findings.warning(
            format!("the CustomResourceDefinition {name} is that of another version"),
            format!("apply that of the operator's version: {apply}"),
        ),
        (_, None) => findings.error(
            format!("the CustomResourceDefinition {name} does not serve {VERSION}"),
            apply,
        ),
    }
    let conditions = found
        .pointer("/status/conditions")
        .and_then(Value::as_array);
    let established = conditions.into_iter().flatten().any(|condition| {
        condition.get("type").and_then(Value::as_str) == Some("Established")
            && condition.get("status").and_then(Value::as_str) == Some("True")
    });
    if !established {
        findings.error(
            format!("the CustomResourceDefinition {name} is not established"),
            format!("see why: kubectl describe crd {name}"),
        );
    }
}

/// Whether all that is in one is in the other, too: the API server adds defaults.
fn holds(theirs: &Value, ours: &Value) -> bool {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => ours.iter().all(|(name, ours)| {
            ours.is_null() || theirs.get(name).is_some_and(|theirs| holds(theirs, ours))
        }),
        (Value::Array(theirs), Value::Array(ours)) => {
            theirs.len() == ours.len()
                && theirs
                    .iter()
                    .zip(ours)
                    .all(|(theirs, ours)| holds(theirs, ours))
        }
        // 1 and 1.0.
        (Value::Number(theirs), Value::Number(ours)) => theirs.as_f64() == ours.as_f64(),
        (theirs, ours) => theirs == ours,
    }
}

/// The rules that `deploy/rbac.yaml` grants the operator.
fn rules() -> Vec<Rule> {
    serde_yaml::Deserializer::from_str(RBAC)
        .filter_map(|document| serde_yaml::Value::deserialize(document).ok())
        .filter(|object| {
            object.get("kind").and_then(|kind| kind.as_str()) == Some("ClusterRole")
                && object
                    .get("metadata")
                    .and_then(|metadata| metadata.get("name")?.as_str())
                    == Some(ROLE)
        })
        .filter_map(|object| serde_yaml::from_value(object.get("rules")?.clone()).ok())
        .flat_map(|rules: Vec<Rule>| rules)
        .collect()
}

/// Whether this user may do what the operator does.
async fn permissions(client: &KubeClient, patience: Duration, findings: &mut Findings) {
    let user = review(client, "selfsubjectreviews", &json!({}), patience).await;
    let user = user.ok().and_then(|told| {
        let name = told.pointer("/status/userInfo/username")?;
        name.as_str().map(str::to_owned)
    });
    let user = user.unwrap_or_else(|| "this user".to_owned());
    for rule in rules() {
        for group in &rule.api_groups {
            for resource in &rule.resources {
                for verb in &rule.verbs {
                    let name = rule.resource_names.first();
                    permission(
                        client,
                        patience,
                        &user,
                        (group, resource, verb, name),
                        findings,
                    )
                    .await;
                }
            }
        }
    }
}

async fn permission(
    client: &KubeClient,
    patience: Duration,
    user: &str,
    (group, resource, verb, name): (&str, &str, &str, Option<&String>),
    findings: &mut Findings,
) {
    let (plain, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    let spec = json!({"resourceAttributes": {
        "group": group, "resource": plain, "subresource": subresource, "verb": verb,
        "name": name.map_or("", String::as_str),
    }});
    let what = match name {
        Some(name) => format!("{verb} {resource} {name}"),
        None => format!("{verb} {resource}"),
    };
    match review(client, "selfsubjectaccessreviews", &spec, patience).await {
        Ok(told) if told.pointer("/status/allowed") == Some(&Value::Bool(true)) => {
            findings.ok(format!("{user} may {what}"));
        }
        Ok(_) => findings.error(
            format!("{user} may not {what}"),
            "kubectl apply -k deploy/ grants it to the operator's ServiceAccount; look as that one, or bind its ClusterRole",
        ),
        Err(why) => findings.error(
            format!("whether {user} may {what} can't be asked: {why}"),
            "mend what it says, and look again",
        ),
    }
}

/// Asks the API server about its user.
async fn review(
    client: &KubeClient,
    resource: &str,
    spec: &Value,
    patience: Duration,
) -> Result<Value, String> {
    let kind = match resource {
        "selfsubjectreviews" => ("authentication.k8s.io", "SelfSubjectReview"),
        _ => ("authorization.k8s.io", "SelfSubjectAccessReview"),
    };
    let object = json!({"apiVersion": format!("{}/v1", kind.0), "kind": kind.1, "spec": spec});
    let request = http::Request::post(format!("/apis/{}/v1/{resource}", kind.0))
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(object.to_string().into_bytes())
        .map_err(|error| error.to_string())?;
    match timeout(patience, client.current().request::<Value>(request)).await {
        Ok(Ok(told)) => Ok(told),
        Ok(Err(error)) => Err(explain(&error)),
        Err(_) => Err(format!("no answer within {patience:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_are_those_of_deploy() {
        let rules = rules();
        assert!(rules.len() >= 5, "{rules:?}");
        let lists_pods = |rule: &Rule| {
            rule.resources.iter().any(|resource| resource == "pods")
                && rule.verbs.iter().any(|verb| verb == "list")
        };
        assert!(rules.iter().any(lists_pods));
        assert!(
            rules
                .iter()
                .any(|rule| rule.resource_names == ["kube-system"])
        );
    }

    #[test]
    fn what_the_api_server_adds_is_no_difference() {
        let ours = json!({"a": 1, "b": [{"c": "x"}], "n": null});
        assert!(holds(
            &json!({"a": 1.0, "b": [{"c": "x", "d": 2}], "e": 3}),
            &ours
        ));
        assert!(!holds(&json!({"a": 1, "b": []}), &ours));
        assert!(!holds(&json!({"a": 2, "b": [{"c": "x"}]}), &ours));
    }
}
