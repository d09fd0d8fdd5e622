//! What changes about a container while it runs.

use containerd_shim_protos::{
    api::{PauseRequest, ResumeRequest, Status, UpdateTaskRequest},
    shim_async::TaskClient,
};
use protobuf::{MessageField, well_known_types::any::Any};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::{
    containerd::{Containerd, deadline, delete, start, wait},
    lifecycle::{code, exec, kill, shut_down, state},
};

pub async fn pause(client: &TaskClient, id: &str) -> ttrpc::Result<()> {
    let request = PauseRequest {
        id: id.into(),
        ..PauseRequest::default()
    };
    client.pause(deadline(), &request).await.map(drop)
}

pub async fn resume(client: &TaskClient, id: &str) -> ttrpc::Result<()> {
    let request = ResumeRequest {
        id: id.into(),
        ..ResumeRequest::default()
    };
    client.resume(deadline(), &request).await.map(drop)
}

pub async fn update(client: &TaskClient, id: &str, resources: &Value) -> ttrpc::Result<()> {
    let request = UpdateTaskRequest {
        id: id.into(),
        resources: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: resources.to_string().into_bytes(),
            ..Any::default()
        }),
        ..UpdateTaskRequest::default()
    };
    client.update(deadline(), &request).await.map(drop)
}

async fn ended(client: &TaskClient, id: &str) -> u32 {
    let status = client.wait(deadline(), &wait(id, "")).await.unwrap();
    client.delete(deadline(), &delete(id, "")).await.unwrap();
    status.exit_status
}

pub async fn paused() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["sleep"]);
    let (client, _) = containerd.start_shim("c1").await;
    let request = containerd.create_request("c1");
    client.create(deadline(), &request).await.unwrap();
    assert_eq!(code(pause(&client, "c2").await), Code::NOT_FOUND);
    assert_eq!(code(pause(&client, "c1").await), Code::FAILED_PRECONDITION);
    client.start(deadline(), &start("c1", "")).await.unwrap();
    assert_eq!(code(resume(&client, "c1").await), Code::FAILED_PRECONDITION);
    let status = async || {
        let state = client.state(deadline(), &state("c1", "")).await.unwrap();
        state.status()
    };
    client
        .exec(deadline(), &exec("c1", "early", &["sleep"]))
        .await
        .unwrap();

    pause(&client, "c1").await.unwrap();
    assert_eq!(status().await, Status::PAUSED);
    assert_eq!(code(pause(&client, "c1").await), Code::FAILED_PRECONDITION);
    let added = client
        .exec(deadline(), &exec("c1", "late", &["sleep"]))
        .await;
    assert_eq!(code(added), Code::FAILED_PRECONDITION);
    let started = client.start(deadline(), &start("c1", "early")).await;
    assert_eq!(code(started), Code::FAILED_PRECONDITION);
    let deleted = client.delete(deadline(), &delete("c1", "")).await;
    assert_eq!(code(deleted), Code::FAILED_PRECONDITION);
    resume(&client, "c1").await.unwrap();
    assert_eq!(status().await, Status::RUNNING);
    client
        .start(deadline(), &start("c1", "early"))
        .await
        .unwrap();

    pause(&client, "c1").await.unwrap();
    client.kill(deadline(), &kill("c1", "", 9)).await.unwrap();
    client.wait(deadline(), &wait("c1", "")).await.unwrap();
    assert_eq!(status().await, Status::STOPPED);
    assert_eq!(code(resume(&client, "c1").await), Code::FAILED_PRECONDITION);
    assert_eq!(ended(&client, "c1").await, 137);
    shut_down(&client).await;
    assert_eq!(
        containerd.topics(),
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exec-added",
            "/tasks/paused",
            "/tasks/resumed",
            "/tasks/exec-started",
            "/tasks/paused",
            "/tasks/exit early 137",
            "/tasks/exit c1 137",
            "/tasks/delete",
        ]
    );
    containerd.assert_nothing_left("c1");
}

pub async fn updated() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["sleep"]);
    let (client, _) = containerd.start_shim("c1").await;
    let request = containerd.create_request("c1");
    client.create(deadline(), &request).await.unwrap();
    let fine = json!({"pids": {"limit": 12}, "cpu": {"shares": 512}});
    update(&client, "c1", &fine).await.unwrap();
    client.start(deadline(), &start("c1", "")).await.unwrap();
    update(&client, "c1", &fine).await.unwrap();
    for wrong in [json!({"pids": {"limit": 13}}), json!({"cpu": 7})] {
        let result = update(&client, "c1", &wrong).await;
        assert_eq!(code(result), Code::INVALID_ARGUMENT, "{wrong}");
    }
    let long = json!({"unified": {"x": "y".repeat(2 << 20)}});
    let result = update(&client, "c1", &long).await;
    assert_eq!(code(result), Code::INVALID_ARGUMENT);
    pause(&client, "c1").await.unwrap();
    update(&client, "c1", &fine).await.unwrap();
    client.kill(deadline(), &kill("c1", "", 9)).await.unwrap();
    client.wait(deadline(), &wait("c1", "")).await.unwrap();
    let result = update(&client, "c1", &fine).await;
    assert_eq!(code(result), Code::FAILED_PRECONDITION);
    assert_eq!(ended(&client, "c1").await, 137);
    shut_down(&client).await;
    containerd.assert_nothing_left("c1");
}

pub async fn out_of_memory() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["sleep", "hungry"]);
    let (client, _) = containerd.start_shim("c1").await;
    let request = containerd.create_request("c1");
    client.create(deadline(), &request).await.unwrap();
    client.start(deadline(), &start("c1", "")).await.unwrap();
    client.kill(deadline(), &kill("c1", "", 9)).await.unwrap();
    assert_eq!(ended(&client, "c1").await, 137);
    shut_down(&client).await;
    assert_eq!(
        containerd.topics(),
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/oom",
            "/tasks/exit c1 137",
            "/tasks/delete",
        ]
    );
    containerd.assert_nothing_left("c1");
}
