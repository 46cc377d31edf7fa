//! The API server's protobuf and its JSON say the same of every object.

use etcd_registrar::engine::io::{Object, Resource};
use etcd_registrar::kube::client::{ClientOptions, KubeClient};
use etcd_registrar::kube::session::list_path;
use etcd_registrar::kube::wire::{
    Encoding, Item, Line, read_line, read_list_version, read_page, read_refusal,
};
use http::header::{ACCEPT, CONTENT_TYPE};
use http_body_util::BodyExt;
use kube::client::Body;
use serde_json::json;
use testbed::eventually;

use crate::support::{SOON, Stage, container};

/// The status, how it is written, and the body of an answer.
async fn ask(client: &KubeClient, path: &str, accept: &str) -> (u16, Encoding, Vec<u8>) {
    let request = http::Request::get(path).header(ACCEPT, accept);
    let request = request.body(Body::empty()).unwrap();
    let answer = client.current().send(request).await.unwrap();
    let encoding = Encoding::of(answer.headers()[CONTENT_TYPE].to_str().unwrap());
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, encoding, body.to_vec())
}

/// The same in protobuf and in JSON.
async fn both(
    client: &KubeClient,
    resource: Resource,
    path: &str,
) -> [(u16, Encoding, Vec<u8>); 2] {
    let protobuf = ask(client, path, Encoding::accepted(resource)).await;
    let json = ask(client, path, "application/json").await;
    assert_eq!((protobuf.1, json.1), (Encoding::Protobuf, Encoding::Json));
    [protobuf, json]
}

/// The lines of a watch that has ended, in an order that two watches share.
fn lines(resource: Resource, encoding: Encoding, mut body: &[u8]) -> Vec<Line> {
    let mut lines = Vec::new();
    while !body.is_empty() {
        let (line, rest) = match encoding {
            Encoding::Json => {
                body.split_at(body.iter().position(|byte| *byte == b'\n').unwrap() + 1)
            }
            Encoding::Protobuf => {
                let (length, rest) = body.split_first_chunk::<4>().unwrap();
                rest.split_at(u32::from_be_bytes(*length) as usize)
            }
        };
        lines.push(read_line(resource, encoding, line).unwrap());
        body = rest;
    }
    lines.sort_by_key(|line| format!("{line:?}"));
    lines
}

#[test]
fn pods_nodes_bookmarks_and_refusals() {
    let stage = Stage::new("encodings");
    let whole = json!({
        "hostNetwork": true,
        "initContainers": [
            {"name": "once", "image": "example.com/web:1", "ports": [{"containerPort": 1}]},
            {"name": "side", "image": "example.com/web:1", "restartPolicy": "Always",
             "ports": [{"name": "mesh", "containerPort": 15001}]},
        ],
        "containers": [{"name": "main", "image": "example.com/web:1", "ports": [
            {"name": "http", "containerPort": 8080, "hostPort": 8080},
            {"name": "dns", "containerPort": 53, "hostPort": 53, "protocol": "UDP"},
            {"containerPort": 9, "hostPort": 9, "protocol": "SCTP"},
        ]}],
    });
    let notes = json!({"annotations": {
        "example.com/full": "x".repeat(256), "example.com/long": "x".repeat(257), "example.com/none": "",
        "kubectl.kubernetes.io/restartedAt": "now", "example.com/text": "ü\n\"quoted\" {json}\\",
    }});
    stage.create_pod("whole", "web", &notes, &whole);
    stage.create_pod(
        "leaving",
        "web",
        &json!({"finalizers": ["example.com/stay"]}),
        &json!({}),
    );
    stage.create_pod(
        "waiting",
        "web",
        &json!({}),
        &json!({
            "nodeSelector": {"no": "such"}, "containers": [container()],
        }),
    );
    stage.create_pod_by_hand("finished", "web");
    stage.patch_pod_status("finished", &json!({"phase": "Succeeded"}));
    stage.wait_ready("whole");
    stage.wait_ready("leaving");
    stage.delete_pod("leaving");
    eventually(SOON, "the end to begin", || {
        let deleted = &stage.pod("leaving")?["metadata"]["deletionTimestamp"];
        deleted
            .as_str()
            .map(drop)
            .ok_or_else(|| deleted.to_string())
    })
    .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let client = |kubeconfig: &std::path::Path| {
        let options = ClientOptions {
            kubeconfig: Some(kubeconfig.to_owned()),
            context: None,
        };
        runtime.block_on(KubeClient::new(options)).unwrap()
    };
    let operator = client(&stage.plane.kubeconfig);
    for (resource, namespace) in [
        (Resource::Pods, Some(stage.namespace.as_str())),
        (Resource::Nodes, None),
    ] {
        let path = list_path(resource, namespace);
        // Nothing changes meanwhile, in the end.
        let items = eventually(SOON, "two readings alike", || {
            let pages = runtime
                .block_on(both(&operator, resource, &format!("{path}?limit=500")))
                .map(|(_, encoding, body)| {
                    assert!(read_list_version(encoding, &body).unwrap() > 0);
                    read_page(resource, encoding, &body).unwrap().items
                });
            let watch = "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan\
                         &allowWatchBookmarks=true&timeoutSeconds=1";
            let watches = runtime
                .block_on(both(&operator, resource, &format!("{path}?{watch}")))
                .map(|(_, encoding, body)| lines(resource, encoding, &body));
            let ends = |line: &Line| matches!(line, Line::Bookmark { list_end: true, .. });
            assert!(
                watches.iter().all(|lines| lines.iter().any(ends)),
                "{watches:?}"
            );
            let events = watches.map(|mut lines| {
                lines.retain(|line| !matches!(line, Line::Bookmark { .. }));
                lines
            });
            if pages[0] == pages[1] && events[0] == events[1] && events[0].len() == pages[0].len() {
                Ok(pages[0].clone())
            } else {
                Err(format!("{pages:#?} {events:#?}"))
            }
        })
        .unwrap();
        if resource == Resource::Nodes {
            assert!(!items.is_empty() && items.iter().all(|item| matches!(item, Item::Read(_))));
            continue;
        }
        let pod = |name: &str| {
            let found = items.iter().find_map(|item| match item {
                Item::Read(Object::Pod(pod)) if &*pod.name == name => Some(pod.clone()),
                _ => None,
            });
            found.unwrap()
        };
        let whole = pod("whole");
        assert!(whole.ready && whole.host_network && !whole.ips.is_empty() && whole.created > 0);
        assert_eq!(
            (whole.ports.len(), whole.annotations.len()),
            (4, 3),
            "{whole:?}"
        );
        assert!(pod("leaving").deleting && pod("finished").finished);
        assert!(pod("waiting").node.is_empty() && !pod("waiting").ready);
    }
    stage.patch_pod("leaving", &json!({"metadata": {"finalizers": null}}));
    // A watch from nowhere, and one without the rights.
    let pods = list_path(Resource::Pods, Some(&stage.namespace));
    let refusals = |client: &KubeClient, query: &str| {
        let path = format!("{pods}?{query}");
        let [protobuf, json] = runtime
            .block_on(both(client, Resource::Pods, &path))
            .map(|(status, encoding, body)| read_refusal(status, encoding, &body));
        assert_eq!(protobuf, json);
        protobuf
    };
    let refusal = refusals(&operator, "watch=true&resourceVersion=nowhere");
    assert!(
        refusal.code >= 400 && refusal.message.contains("nowhere"),
        "{refusal}"
    );
    stage.kubectl(&["create", "serviceaccount", "nobody"]);
    let nobody = stage
        .plane
        .cluster
        .kubeconfig_for_service_account(&stage.namespace, "nobody")
        .unwrap();
    let refusal = refusals(&client(&nobody), "watch=true");
    assert!(
        refusal.code == 403 && refusal.message.contains("cannot watch"),
        "{refusal}"
    );
    // Who has no protobuf of it answers in JSON.
    let registrations = list_path(Resource::Registrations, None);
    let accepted = Encoding::accepted(Resource::Pods);
    // Its storage may still be about to begin.
    let encoding = eventually(SOON, "the registrations", || {
        match runtime.block_on(ask(&operator, &registrations, accepted)) {
            (200, encoding, _) => Ok(encoding),
            (_, encoding, body) => Err(read_refusal(0, encoding, &body).message),
        }
    })
    .unwrap();
    assert_eq!(encoding, Encoding::Json);
}
