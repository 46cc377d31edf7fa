//! The definition is what the code says, and what it fills in is what the code would.

use crate::model::names::{MAX_PREFIX, MAX_SCHEME, MAX_SERVICE};
use serde_json::{Value, json};

use super::*;

/// The schema of `spec` or `status`.
fn schema(part: &str) -> Value {
    let crd = serde_json::to_value(ServiceRegistration::crd()).unwrap();
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][part].clone()
}

#[test]
fn the_definition_in_crds_is_not_stale() {
    let file = include_str!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/crds/serviceregistrations.yaml"
    ));
    let yaml = crd_yaml().unwrap();
    assert!(
        file == yaml,
        "crds/serviceregistrations.yaml is stale: `make crds` (`etcd-registrar crd` into that file) writes it anew"
    );
}

#[test]
fn the_definition_has_its_names() {
    let crd = serde_json::to_value(ServiceRegistration::crd()).unwrap();
    assert_eq!(
        crd["metadata"]["name"],
        "serviceregistrations.etcd-registrar.io"
    );
    let names = &crd["spec"]["names"];
    assert_eq!(names["kind"], "ServiceRegistration");
    assert_eq!(names["shortNames"], json!(["sreg"]));
    assert_eq!(names["categories"], json!(["discovery"]));
    assert_eq!(crd["spec"]["scope"], "Namespaced");
    let version = &crd["spec"]["versions"][0];
    assert_eq!(version["name"], "v1alpha1");
    assert_eq!(version["subresources"], json!({"status": {}}));
}

#[test]
fn the_bounds_in_the_schema_are_the_constants() {
    let spec = &schema("spec")["properties"];
    for (place, bound) in [
        (&spec["service"]["maxLength"], MAX_SERVICE),
        (&spec["prefix"]["maxLength"], MAX_PREFIX),
        (&spec["ports"]["maxItems"], MAX_PORTS),
        (
            &spec["format"]["properties"]["template"]["properties"]["key"]["maxLength"],
            MAX_KEY_TEMPLATE,
        ),
        (
            &spec["format"]["properties"]["template"]["properties"]["value"]["maxLength"],
            MAX_VALUE_TEMPLATE,
        ),
        (
            &spec["ports"]["items"]["properties"]["scheme"]["maxLength"],
            MAX_SCHEME,
        ),
        (
            &schema("status")["properties"]["endpoints"]["maxItems"],
            MAX_STATUS_ENDPOINTS,
        ),
    ] {
        assert_eq!(place.as_u64(), u64::try_from(bound).ok());
    }
    for (place, bound) in [
        (&spec["leaseTTLSeconds"]["minimum"], MIN_LEASE_TTL_SECONDS),
        (&spec["leaseTTLSeconds"]["maximum"], MAX_LEASE_TTL_SECONDS),
        (
            &spec["leaseTTLSeconds"]["default"],
            DEFAULT_LEASE_TTL_SECONDS,
        ),
        (&spec["weight"]["maximum"], MAX_WEIGHT),
        (&spec["weight"]["default"], DEFAULT_WEIGHT),
    ] {
        assert_eq!(place.as_f64(), Some(f64::from(bound)));
    }
}

/// What the API server fills into `value` by its schema.
fn fill(schema: &Value, value: &mut Value) {
    let Some(members) = value.as_object_mut() else {
        return;
    };
    for (name, member) in schema["properties"].as_object().into_iter().flatten() {
        if let Some(default) = member.get("default") {
            members.entry(name).or_insert_with(|| default.clone());
        }
        match members.get_mut(name) {
            Some(Value::Array(items)) => {
                items
                    .iter_mut()
                    .for_each(|item| fill(&member["items"], item));
            }
            Some(value) => fill(member, value),
            None => {}
        }
    }
}

#[test]
fn the_api_server_fills_in_what_the_code_would() {
    let least = json!({"selector": {"matchLabels": {"app": "web"}}, "ports": [{"name": "http"}]});
    let mut filled = least.clone();
    fill(&schema("spec"), &mut filled);
    assert_ne!(filled, least);
    let read: ServiceRegistrationSpec = serde_json::from_value(least).unwrap();
    assert_eq!(
        read,
        ServiceRegistrationSpec {
            selector: read.selector.clone(),
            ports: read.ports.clone(),
            ..ServiceRegistrationSpec::default()
        }
    );
    assert_eq!(serde_json::to_value(&read).unwrap(), filled);
}

/// A value that the API server put into a status would look like a change, for ever.
#[test]
fn the_api_server_fills_nothing_into_a_status() {
    fn search(schema: &Value, path: &str) {
        for (name, value) in schema.as_object().into_iter().flatten() {
            assert!(name != "default", "{path} has a default");
            search(value, &format!("{path}.{name}"));
        }
    }
    search(&schema("status"), "status");
    assert_eq!(
        serde_json::to_value(ServiceRegistrationStatus::default()).unwrap(),
        json!({})
    );
}

#[test]
fn a_spec_of_a_newer_version_is_unreadable_only_where_it_matters() {
    let mut spec = json!({
        "selector": {"matchLabels": {"app": "web"}},
        "ports": [{"name": "http", "later": 1}],
        "later": true,
    });
    assert!(serde_json::from_value::<ServiceRegistrationSpec>(spec.clone()).is_ok());
    spec["format"] = json!({"type": "Later"});
    let error = serde_json::from_value::<ServiceRegistrationSpec>(spec).unwrap_err();
    assert!(error.to_string().contains("unknown variant `Later`"));
}

#[test]
fn the_lists_of_a_status_are_maps_where_several_write() {
    let status = &schema("status")["properties"];
    for (list, key) in [("conditions", "type"), ("clusters", "name")] {
        assert_eq!(status[list]["x-kubernetes-list-type"], "map");
        assert_eq!(status[list]["x-kubernetes-list-map-keys"], json!([key]));
    }
}
