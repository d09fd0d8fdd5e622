//! What containerd does with containers that behave.

use std::{fs, io::Read};

use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, ExecProcessRequest,
        KillRequest, PidsRequest, ShutdownRequest, StateRequest, StatsRequest, Status,
    },
    cgroups_v2::metrics::Metrics,
    shim_async::{Client, TaskClient},
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use ttrpc::Code;

use crate::containerd::{Containerd, deadline, delete, start, wait, wait_gone, write_fifo};

pub fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        other => panic!("no status: {other:?}"),
    }
}

pub fn state(id: &str, exec_id: &str) -> StateRequest {
    StateRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..StateRequest::default()
    }
}

pub fn kill(id: &str, exec_id: &str, signal: u32) -> KillRequest {
    KillRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        signal,
        ..KillRequest::default()
    }
}

/// The shim's PID.
pub async fn connect(client: &TaskClient) -> u32 {
    let connected = client.connect(deadline(), &ConnectRequest::default()).await;
    connected.unwrap().shim_pid
}

/// Shuts a pod down that has no containers, and waits until its shim is gone.
pub async fn shut_down(client: &TaskClient) {
    let shim = connect(client).await;
    try_shut_down(client).await;
    wait_gone(i32::try_from(shim).unwrap());
}

/// Asks for the end of a pod.
pub async fn try_shut_down(client: &TaskClient) {
    client
        .shutdown(deadline(), &ShutdownRequest::default())
        .await
        .unwrap();
}

pub fn exec(id: &str, exec_id: &str, args: &[&str]) -> ExecProcessRequest {
    ExecProcessRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        spec: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: serde_json::json!({"args": args}).to_string().into_bytes(),
            ..Any::default()
        }),
        ..ExecProcessRequest::default()
    }
}

pub async fn run_to_exit() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["say", "hello", "42"]);
    let (client, address) = containerd.start_shim("c1").await;
    let mut request = containerd.create_request("c1");
    let log = containerd.directory.path().join("logs/both");
    request.stdout = format!("file://{}", log.display());
    request.stderr.clone_from(&request.stdout);

    let created = client.create(deadline(), &request).await.unwrap();
    let anchor = created.pid;
    let comm = fs::read_to_string(format!("/proc/{anchor}/comm")).unwrap();
    assert_eq!(comm.trim(), "bulkhead-anchor");
    let net = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(net(anchor), net(std::process::id()));
    assert_eq!(
        fs::read_dir(format!("/proc/{anchor}/root"))
            .unwrap()
            .count(),
        0,
        "the anchor sees something"
    );
    let members = fs::read_to_string(containerd.cgroup("c1").join("anchors/cgroup.procs")).unwrap();
    assert!(members.lines().any(|line| line == anchor.to_string()));
    let before = client.state(deadline(), &state("c1", "")).await.unwrap();
    assert_eq!(before.status(), Status::CREATED);
    assert_eq!(before.pid, anchor);

    // As containerd 1.7 calls it.
    let old = Client::connect(&address).await.unwrap();
    let mut connect = ttrpc::Request::new();
    connect.set_service("containerd.task.v2.Task".into());
    connect.set_method("Connect".into());
    let whose = ConnectRequest {
        id: "c1".into(),
        ..ConnectRequest::default()
    };
    connect.set_payload(whose.write_to_bytes().unwrap());
    let answer = old.request(connect).await.unwrap();
    let answer = ConnectResponse::parse_from_bytes(&answer.payload).unwrap();
    assert_eq!(answer.task_pid, anchor);

    assert_eq!(
        client
            .start(deadline(), &start("c1", ""))
            .await
            .unwrap()
            .pid,
        anchor
    );
    let exited = client.wait(deadline(), &wait("c1", "")).await.unwrap();
    assert_eq!(exited.exit_status, 42);
    let after = client.state(deadline(), &state("c1", "")).await.unwrap();
    assert_eq!(after.status(), Status::STOPPED);
    assert_eq!(after.exit_status, 42);
    let timeline = containerd
        .directory
        .path()
        .join("state/test:c1/timeline.json");
    let timeline = fs::read_to_string(timeline).unwrap();
    assert!(timeline.contains("container_started"), "{timeline}");

    try_shut_down(&client).await;
    let deleted = client.delete(deadline(), &delete("c1", "")).await.unwrap();
    assert_eq!(deleted.exit_status, 42);
    assert_eq!(deleted.pid, anchor);
    let mut said = fs::read_to_string(log).unwrap();
    said = said.replace("to stderr", "");
    assert_eq!(said, "hello");
    assert_eq!(
        code(client.delete(deadline(), &delete("c1", "")).await),
        Code::NOT_FOUND
    );
    shut_down(&client).await;
    containerd.assert_nothing_left("c1");
    assert!(!std::path::Path::new(address.strip_prefix("unix://").unwrap()).exists());
    assert_eq!(
        containerd.topics(),
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit c1 42",
            "/tasks/delete"
        ]
    );
    // containerd runs it after every deletion.
    for _ in 0..2 {
        let output = containerd.run_shim("c1", "delete", || Ok(()));
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
    }
}

pub async fn byte_exact() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["cat"]);
    let (client, _) = containerd.start_shim("c1").await;
    let mut request = containerd.create_request("c1");
    request.stdin = containerd.fifo("in");
    request.stdout = containerd.fifo("out");
    client.create(deadline(), &request).await.unwrap();
    client.start(deadline(), &start("c1", "")).await.unwrap();

    let data: Vec<u8> = (0u32..2_000_000).flat_map(u32::to_le_bytes).collect();
    let (first, second) = data.split_at(data.len() / 2);
    let path = request.stdout.clone();
    let reader = std::thread::spawn(move || {
        let mut read = Vec::new();
        let mut fifo = fs::File::open(path).unwrap();
        fifo.read_to_end(&mut read).unwrap();
        read
    });
    // A client that goes is not the end of the input.
    for half in [first, second] {
        let (path, half) = (request.stdin.clone(), half.to_vec());
        tokio::task::spawn_blocking(move || write_fifo(&path, &half))
            .await
            .unwrap();
    }
    let close = CloseIORequest {
        id: "c1".into(),
        stdin: true,
        ..CloseIORequest::default()
    };
    client.close_io(deadline(), &close).await.unwrap();
    client.close_io(deadline(), &close).await.unwrap();
    let exited = client.wait(deadline(), &wait("c1", "")).await.unwrap();
    assert_eq!(exited.exit_status, 0);
    client.delete(deadline(), &delete("c1", "")).await.unwrap();
    let read = reader.join().unwrap();
    assert_eq!(read.len(), data.len());
    assert!(read == data, "the bytes differ");
    shut_down(&client).await;
    containerd.assert_nothing_left("c1");
}

pub async fn execs() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["sleep"]);
    let (client, _) = containerd.start_shim("c1").await;
    client
        .create(deadline(), &containerd.create_request("c1"))
        .await
        .unwrap();
    let init = client
        .start(deadline(), &start("c1", ""))
        .await
        .unwrap()
        .pid;

    let mut listing = exec("c1", "e1", &["ls"]);
    let log = containerd.directory.path().join("ls");
    listing.stdout = format!("file://{}", log.display());
    client.exec(deadline(), &listing).await.unwrap();
    assert_eq!(
        code(client.exec(deadline(), &listing).await),
        Code::ALREADY_EXISTS
    );
    assert_eq!(
        code(client.kill(deadline(), &kill("c1", "e1", 9)).await),
        Code::FAILED_PRECONDITION
    );
    client.start(deadline(), &start("c1", "e1")).await.unwrap();
    let exited = client.wait(deadline(), &wait("c1", "e1")).await.unwrap();
    assert_eq!(exited.exit_status, 0);
    client
        .delete(deadline(), &delete("c1", "e1"))
        .await
        .unwrap();
    assert_eq!(fs::read_to_string(log).unwrap(), "hello");

    client
        .exec(deadline(), &exec("c1", "e2", &["sleep"]))
        .await
        .unwrap();
    let second = client
        .start(deadline(), &start("c1", "e2"))
        .await
        .unwrap()
        .pid;
    let pids = PidsRequest {
        id: "c1".into(),
        ..PidsRequest::default()
    };
    let listed = client.pids(deadline(), &pids).await.unwrap().processes;
    let listed: Vec<u32> = listed.iter().map(|process| process.pid).collect();
    assert_eq!(listed, [init, second]);

    // Input that ends before the start, and input that comes while it starts.
    for (exec_id, text) in [("in1", ""), ("in2", "text")] {
        let mut cat = exec("c1", exec_id, &["cat"]);
        cat.stdin = containerd.fifo(exec_id);
        let log = containerd
            .directory
            .path()
            .join(exec_id)
            .with_extension("log");
        cat.stdout = format!("file://{}", log.display());
        client.exec(deadline(), &cat).await.unwrap();
        let close = CloseIORequest {
            id: "c1".into(),
            exec_id: exec_id.into(),
            stdin: true,
            ..CloseIORequest::default()
        };
        let client_side = async {
            if !text.is_empty() {
                let path = cat.stdin.clone();
                // Opening waits for the shim, and so for the start.
                tokio::task::spawn_blocking(move || write_fifo(&path, text.as_bytes()))
                    .await
                    .unwrap();
            }
            client.close_io(deadline(), &close).await.unwrap();
        };
        let starting = start("c1", exec_id);
        let ((), started) = tokio::join!(client_side, client.start(deadline(), &starting));
        started.unwrap();
        let exited = client.wait(deadline(), &wait("c1", exec_id)).await.unwrap();
        assert_eq!(exited.exit_status, 0);
        client
            .delete(deadline(), &delete("c1", exec_id))
            .await
            .unwrap();
        assert_eq!(fs::read_to_string(log).unwrap(), text);
    }

    // A command that does not exist releases whoever waits.
    client
        .exec(deadline(), &exec("c1", "e3", &["unknown"]))
        .await
        .unwrap();
    let (waited, started) = (wait("c1", "e3"), start("c1", "e3"));
    let (waited, started) = tokio::join!(
        client.wait(deadline(), &waited),
        client.start(deadline(), &started)
    );
    assert_eq!(code(started), Code::INVALID_ARGUMENT);
    assert_ne!(waited.unwrap().exit_status, 0);

    let stats = StatsRequest {
        id: "c1".into(),
        ..StatsRequest::default()
    };
    let stats = client
        .stats(deadline(), &stats)
        .await
        .unwrap()
        .stats
        .unwrap();
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
    assert_eq!(metrics.cpu.usage_usec, 42);

    assert_eq!(
        code(client.delete(deadline(), &delete("c1", "")).await),
        Code::FAILED_PRECONDITION
    );
    client.kill(deadline(), &kill("c1", "", 15)).await.unwrap();
    let exited = client.wait(deadline(), &wait("c1", "")).await.unwrap();
    assert_eq!(exited.exit_status, 128 + 15);
    assert_eq!(
        code(client.kill(deadline(), &kill("c1", "", 9)).await),
        Code::NOT_FOUND
    );
    client.delete(deadline(), &delete("c1", "")).await.unwrap();
    shut_down(&client).await;
    let topics = containerd.topics();
    let at = |wanted: &str| topics.iter().position(|topic| topic == wanted);
    assert!(at("/tasks/exit e2 137").unwrap() < at("/tasks/exit c1 143").unwrap());
    assert!(at("/tasks/exec-added").unwrap() < at("/tasks/exec-started").unwrap());
    containerd.assert_nothing_left("c1");
}

pub async fn error_codes() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["lie"]);
    let (client, _) = containerd.start_shim("c1").await;
    assert_eq!(
        code(client.state(deadline(), &state("c1", "")).await),
        Code::NOT_FOUND
    );
    let request = containerd.create_request("c1");
    client.create(deadline(), &request).await.unwrap();
    assert_eq!(
        code(client.create(deadline(), &request).await),
        Code::ALREADY_EXISTS
    );
    assert_eq!(
        code(client.wait(deadline(), &wait("c1", "nobody")).await),
        Code::NOT_FOUND
    );
    let checkpoint = CheckpointTaskRequest {
        id: "c1".into(),
        ..CheckpointTaskRequest::default()
    };
    assert_eq!(
        code(client.checkpoint(deadline(), &checkpoint).await),
        Code::UNIMPLEMENTED
    );
    client.start(deadline(), &start("c1", "")).await.unwrap();
    // The guest says that it ended with status 1000.
    let exited = client.wait(deadline(), &wait("c1", "")).await.unwrap();
    assert_eq!(exited.exit_status, 137);
    assert_eq!(
        code(client.start(deadline(), &start("c1", "")).await),
        Code::FAILED_PRECONDITION
    );
    client.delete(deadline(), &delete("c1", "")).await.unwrap();
    shut_down(&client).await;
    containerd.assert_nothing_left("c1");
}

pub async fn groups() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("pod", Some("pod"), &["sleep"]);
    containerd.add_bundle("member", Some("pod"), &["sleep"]);
    let (client, first) = containerd.start_shim("pod").await;
    let (_, second) = containerd.start_shim("member").await;
    assert_eq!(first, second);
    for id in ["pod", "member"] {
        client
            .create(deadline(), &containerd.create_request(id))
            .await
            .unwrap();
        client.start(deadline(), &start(id, "")).await.unwrap();
    }
    assert_eq!(containerd.vmm_pids().len(), 1);
    client.kill(deadline(), &kill("pod", "", 9)).await.unwrap();
    client.wait(deadline(), &wait("pod", "")).await.unwrap();
    client.delete(deadline(), &delete("pod", "")).await.unwrap();
    try_shut_down(&client).await;
    let output = containerd.run_shim("pod", "delete", || Ok(()));
    assert!(output.status.success(), "{output:?}");
    // The other one goes on.
    let left = client
        .state(deadline(), &state("member", ""))
        .await
        .unwrap();
    assert_eq!(left.status(), Status::RUNNING);
    client
        .kill(deadline(), &kill("member", "", 9))
        .await
        .unwrap();
    client.wait(deadline(), &wait("member", "")).await.unwrap();
    client
        .delete(deadline(), &delete("member", ""))
        .await
        .unwrap();
    shut_down(&client).await;
    containerd.assert_nothing_left("pod");
    containerd.assert_nothing_left("member");
}

pub async fn refused() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["unknown"]);
    let (client, _) = containerd.start_shim("c1").await;
    let error = client
        .create(deadline(), &containerd.create_request("c1"))
        .await
        .unwrap_err();
    let ttrpc::Error::RpcStatus(status) = error else {
        panic!("{error}");
    };
    assert_eq!(status.code(), Code::INVALID_ARGUMENT);
    assert!(status.message().contains("not found in $PATH"), "{status}");

    // A bind mount's source that is not there.
    let path = containerd.bundle("c1").join("config.json");
    let spec = fs::read_to_string(&path).unwrap();
    let source = containerd.directory.path().to_str().unwrap();
    fs::write(
        &path,
        spec.replace(&format!("\"{source}\""), "\"/no/such\""),
    )
    .unwrap();
    let error = client
        .create(deadline(), &containerd.create_request("c1"))
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("Cannot mount /no/such on /extra: "), "{text}");
    shut_down(&client).await;
    containerd.assert_nothing_left("c1");
    assert_eq!(containerd.topics(), Vec::<String>::new());
}

/// Hooks that run before the container see its root on the host, and can change it; afterwards it
/// is the VM's alone.
pub async fn hooks() {
    let containerd = Containerd::new("normal").await;
    let directory = containerd.directory.path();
    let [upper, work] = ["upper", "work"].map(|name| directory.join(name));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&work).unwrap();
    containerd.add_bundle("c1", None, &["sleep"]);
    let bundle = containerd.bundle("c1");
    let path = bundle.join("config.json");
    let mut spec: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let root = bundle.join("rootfs");
    let script = format!("cp {0}/hello {0}/copy", root.display());
    spec["hooks"] = serde_json::json!({
        "createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", script]}],
    });
    fs::write(&path, spec.to_string()).unwrap();
    let mut request = containerd.create_request("c1");
    let image = directory.join("image");
    request.rootfs[0].type_ = "overlay".into();
    request.rootfs[0].source = "overlay".into();
    request.rootfs[0].options = vec![
        format!("lowerdir={}", image.display()),
        format!("upperdir={}", upper.display()),
        format!("workdir={}", work.display()),
    ];
    let (client, _) = containerd.start_shim("c1").await;
    client.create(deadline(), &request).await.unwrap();
    assert_eq!(
        fs::read_to_string(upper.join("copy")).unwrap(),
        "from the image"
    );
    assert!(!image.join("copy").exists());
    assert_eq!(
        fs::read_dir(&root).unwrap().count(),
        0,
        "it is still mounted"
    );
    client.delete(deadline(), &delete("c1", "")).await.unwrap();
    shut_down(&client).await;
    containerd.assert_nothing_left("c1");
}
