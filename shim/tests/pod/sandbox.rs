//! Pods that containerd makes by its sandbox API.

use std::{fs, path::Path};

use containerd_shim_protos::{
    api::{CreateTaskRequest, DeleteResponse, ShutdownRequest, Status},
    cgroups_v2::metrics::Metrics,
    sandbox_api::{
        CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest,
        SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest, StartSandboxRequest,
        StopSandboxRequest, WaitSandboxRequest,
    },
    sandbox_async::SandboxClient,
    shim_async::{Client, TaskClient},
};
use nix::sys::signal::Signal;
use protobuf::{Message, MessageField, well_known_types::any::Any};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::{
    containerd::{Containerd, deadline, delete, start, wait, wait_gone},
    crashes::signal,
    lifecycle::{code, connect, kill, state},
};

/// The sandbox of these tests, and a container in it.
const ID: &str = "s1";
const MEMBER: &str = "c1";

/// A message or text in a message.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
    assert!(bytes[1] < 128, "its length has one byte");
    bytes.extend(content);
    bytes
}

/// A `PodSandboxConfig` with a host name, a parent of the cgroup, and a mode of the network.
fn config(containerd: &Containerd, network: u8) -> Any {
    let parent = containerd.cgroup("");
    let parent = parent.strip_prefix("/sys/fs/cgroup").unwrap();
    let parent = format!("/{}", parent.display());
    let options = field(1, &[1 << 3, network]);
    let linux = [
        field(1, parent.trim_end_matches('/').as_bytes()),
        field(2, &options),
    ];
    let value = [field(2, b"in-pod"), field(8, &linux.concat())];
    Any {
        type_url: "runtime.v1.PodSandboxConfig".into(),
        value: value.concat(),
        ..Any::default()
    }
}

/// A shim that was started for a sandbox.
struct Shim {
    containerd: Containerd,
    sandbox: SandboxClient,
    task: TaskClient,
    pid: i32,
}

impl Shim {
    async fn start(scenario: &str) -> Self {
        Self::start_on(Containerd::new(scenario).await).await
    }

    async fn start_on(containerd: Containerd) -> Self {
        let bundle = containerd.bundle(ID);
        fs::create_dir_all(&bundle).unwrap();
        nix::unistd::mkfifo(&bundle.join("log"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (task, address) = containerd.start_shim(ID).await;
        let sandbox = SandboxClient::new(Client::connect(&address).await.unwrap());
        let pid = i32::try_from(connect(&task).await).unwrap();
        Self {
            containerd,
            sandbox,
            task,
            pid,
        }
    }

    fn request(&self) -> CreateSandboxRequest {
        CreateSandboxRequest {
            sandbox_id: ID.into(),
            bundle_path: self.containerd.bundle(ID).to_str().unwrap().into(),
            options: MessageField::some(config(&self.containerd, 0)),
            ..CreateSandboxRequest::default()
        }
    }

    /// Makes the sandbox, and returns its anchor.
    async fn run(&self) -> i32 {
        let request = self.request();
        self.sandbox
            .create_sandbox(deadline(), &request)
            .await
            .unwrap();
        i32::try_from(self.begin().await.unwrap()).unwrap()
    }

    async fn begin(&self) -> ttrpc::Result<u32> {
        let request = StartSandboxRequest {
            sandbox_id: ID.into(),
            ..StartSandboxRequest::default()
        };
        let started = self.sandbox.start_sandbox(deadline(), &request).await?;
        assert!(started.created_at.seconds > 0);
        Ok(started.pid)
    }

    /// The request for a container that does this, in the namespaces of a process.
    fn member(&self, pid: i32, arguments: &[&str]) -> CreateTaskRequest {
        self.containerd.add_bundle(MEMBER, Some(ID), arguments);
        let path = self.containerd.bundle(MEMBER).join("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        spec["linux"]["namespaces"] = json!([
            { "type": "network", "path": format!("/proc/{pid}/ns/net") },
            { "type": "ipc", "path": format!("/proc/{pid}/ns/ipc") },
            { "type": "mount" },
        ]);
        fs::write(path, spec.to_string()).unwrap();
        self.containerd.create_request(MEMBER)
    }

    /// A container that runs.
    async fn run_member(&self, pid: i32) {
        let request = self.member(pid, &["sleep"]);
        self.task.create(deadline(), &request).await.unwrap();
        let start = start(MEMBER, "");
        self.task.start(deadline(), &start).await.unwrap();
    }

    async fn status(&self) -> SandboxStatusResponse {
        let request = SandboxStatusRequest {
            sandbox_id: ID.into(),
            verbose: true,
            ..SandboxStatusRequest::default()
        };
        let status = self.sandbox.sandbox_status(deadline(), &request).await;
        status.unwrap()
    }

    async fn stop(&self) {
        let request = StopSandboxRequest {
            sandbox_id: ID.into(),
            ..StopSandboxRequest::default()
        };
        let stopped = self.sandbox.stop_sandbox(deadline(), &request).await;
        stopped.unwrap();
    }

    /// How the sandbox ended.
    async fn exit_status(&self) -> u32 {
        let request = WaitSandboxRequest {
            sandbox_id: ID.into(),
            ..WaitSandboxRequest::default()
        };
        let exited = self.sandbox.wait_sandbox(deadline(), &request).await;
        let exited = exited.unwrap();
        assert!(exited.exited_at.seconds > 0);
        exited.exit_status
    }

    /// The last thing that containerd asks for. Nothing may be left then.
    async fn shut_down(self) {
        let request = ShutdownSandboxRequest {
            sandbox_id: ID.into(),
            ..ShutdownSandboxRequest::default()
        };
        let ended = self.sandbox.shutdown_sandbox(deadline(), &request).await;
        ended.unwrap();
        self.ended();
    }

    fn ended(self) {
        wait_gone(self.pid);
        for id in [ID, MEMBER] {
            self.containerd.assert_nothing_left(id);
        }
        let topics = self.containerd.topics();
        let of_sandbox = topics.iter().any(|topic| topic.contains(ID));
        assert!(!of_sandbox, "{topics:?}");
    }
}

fn is_alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

pub async fn life() {
    let shim = Shim::start("normal").await;
    let (sandbox, task) = (&shim.sandbox, &shim.task);
    // Before it is described.
    assert_eq!(shim.status().await.state, "SANDBOX_NOTREADY");
    let early = task.create(deadline(), &shim.member(0, &["sleep"])).await;
    assert_eq!(code(early), Code::FAILED_PRECONDITION);
    fs::remove_dir_all(shim.containerd.bundle(MEMBER)).unwrap();
    assert_eq!(code(shim.begin().await), Code::NOT_FOUND);
    assert!(shim.containerd.vmm_pids().is_empty());

    let pid = shim.run().await;
    assert!(is_alive(pid));
    let again = sandbox.create_sandbox(deadline(), &shim.request()).await;
    assert_eq!(code(again), Code::ALREADY_EXISTS);
    assert_eq!(code(shim.begin().await), Code::FAILED_PRECONDITION);
    let mut request = shim.member(pid, &["sleep"]);
    request.id = ID.into();
    let again = task.create(deadline(), &request).await;
    assert_eq!(code(again), Code::ALREADY_EXISTS);
    fs::remove_dir_all(shim.containerd.bundle(MEMBER)).unwrap();

    let status = shim.status().await;
    assert_eq!(status.state, "SANDBOX_READY");
    assert_eq!(i32::try_from(status.pid).unwrap(), pid);
    let info: Value = serde_json::from_str(&status.info["info"]).unwrap();
    assert_eq!(info["pid"], pid);
    assert_eq!(info["runtimeSpec"]["hostname"], "in-pod");
    let ping = PingRequest {
        sandbox_id: ID.into(),
        ..PingRequest::default()
    };
    sandbox.ping_sandbox(deadline(), &ping).await.unwrap();
    let platform = PlatformRequest {
        sandbox_id: ID.into(),
        ..PlatformRequest::default()
    };
    let platform = sandbox.platform(deadline(), &platform).await.unwrap();
    let platform = platform.platform.unwrap();
    assert_eq!(
        (platform.os.as_str(), platform.architecture.as_str()),
        ("linux", "amd64")
    );
    let metrics = SandboxMetricsRequest {
        sandbox_id: ID.into(),
        ..SandboxMetricsRequest::default()
    };
    let metrics = sandbox.sandbox_metrics(deadline(), &metrics).await.unwrap();
    let metrics = metrics.metrics.unwrap();
    assert_eq!(metrics.id, ID);
    let metrics = Metrics::parse_from_bytes(&metrics.data.value).unwrap();
    assert!(metrics.cpu.usage_usec > 0, "{metrics:?}");

    // Containers come and go; that containerd asks for the shim's end says nothing of the sandbox.
    for _ in 0..2 {
        shim.run_member(pid).await;
        let killed = kill(MEMBER, "", 9);
        task.kill(deadline(), &killed).await.unwrap();
        let exited = task.wait(deadline(), &wait(MEMBER, "")).await.unwrap();
        assert_eq!(exited.exit_status, 137);
        let deleted = delete(MEMBER, "");
        task.delete(deadline(), &deleted).await.unwrap();
        let shutdown = ShutdownRequest::default();
        task.shutdown(deadline(), &shutdown).await.unwrap();
        fs::remove_dir_all(shim.containerd.bundle(MEMBER)).unwrap();
    }
    assert_eq!(shim.status().await.state, "SANDBOX_READY");

    shim.stop().await;
    assert_eq!(shim.exit_status().await, 137);
    assert!(!is_alive(pid) && shim.containerd.vmm_pids().is_empty());
    let status = shim.status().await;
    assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_NOTREADY", 0));
    assert!(sandbox.ping_sandbox(deadline(), &ping).await.is_err());
    shim.stop().await;
    shim.shut_down().await;
}

/// What a container is given of its sandbox.
pub async fn member() {
    let shim = Shim::start("normal").await;
    let pid = shim.run().await;
    let stdout = shim.containerd.fifo("stdout");
    // As containerd names a sandbox whose PID it has forgotten.
    let mut request = shim.member(0, &["describe"]);
    request.stdout = stdout.clone();
    let output = tokio::task::spawn_blocking(move || fs::read(stdout).unwrap());
    shim.task.create(deadline(), &request).await.unwrap();
    shim.task
        .start(deadline(), &start(MEMBER, ""))
        .await
        .unwrap();
    let output = output.await.unwrap();
    let described: Value = serde_json::from_slice(&output).unwrap();
    let bundle = shim.containerd.bundle(ID);
    assert_eq!(
        described,
        json!({
            "root": true,
            "joined": { "ipc": ID, "network": ID },
            "memory": { "name": bundle.join("shm"), "size": 64 << 20, "at": "/dev/shm" },
            "shared": ["/extra", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf"],
            "ipc": format!("/proc/{pid}/ns/ipc"),
        })
    );
    let hostname = fs::read_to_string(bundle.join("hostname")).unwrap();
    assert_eq!(hostname, "in-pod\n");
    // Its output ends before it does.
    shim.task.wait(deadline(), &wait(MEMBER, "")).await.unwrap();
    shim.task
        .delete(deadline(), &delete(MEMBER, ""))
        .await
        .unwrap();
    shim.shut_down().await;
}

pub async fn stopped_with_containers() {
    let shim = Shim::start("normal").await;
    let pid = shim.run().await;
    shim.run_member(pid).await;
    shim.stop().await;
    let exited = shim.task.wait(deadline(), &wait(MEMBER, "")).await.unwrap();
    assert_eq!(exited.exit_status, 137);
    assert!(shim.containerd.vmm_pids().is_empty());
    // containerd still asks for its end, and for its deletion.
    let found = shim.task.state(deadline(), &state(MEMBER, "")).await;
    assert_eq!(found.unwrap().status, Status::STOPPED.into());
    let deleted = shim.task.delete(deadline(), &delete(MEMBER, "")).await;
    assert_eq!(deleted.unwrap().exit_status, 137);
    shim.shut_down().await;
}

pub async fn shut_down_at_once() {
    let shim = Shim::start("normal").await;
    let pid = shim.run().await;
    shim.run_member(pid).await;
    shim.shut_down().await;
}

pub async fn vmm_killed() {
    let shim = Shim::start("normal").await;
    let pid = shim.run().await;
    shim.run_member(pid).await;
    for vmm in shim.containerd.vmm_pids() {
        signal(vmm, Signal::SIGKILL);
    }
    assert_eq!(shim.exit_status().await, 137);
    let exited = shim.task.wait(deadline(), &wait(MEMBER, "")).await.unwrap();
    assert_eq!(exited.exit_status, 137);
    assert_eq!(shim.status().await.state, "SANDBOX_NOTREADY");
    shim.shut_down().await;
}

pub async fn anchor_killed() {
    let shim = Shim::start("normal").await;
    let pid = shim.run().await;
    shim.run_member(pid).await;
    signal(pid, Signal::SIGKILL);
    assert_eq!(shim.exit_status().await, 137);
    assert_eq!(shim.status().await.state, "SANDBOX_NOTREADY");
    // What runs goes on, but nothing new begins.
    let found = shim.task.state(deadline(), &state(MEMBER, "")).await;
    assert_eq!(found.unwrap().status, Status::RUNNING.into());
    let mut request = shim.containerd.create_request(MEMBER);
    request.id = "c2".into();
    let late = shim.task.create(deadline(), &request).await;
    assert_eq!(code(late), Code::FAILED_PRECONDITION);
    // With the last container ends the VM, though containerd remembers the sandbox.
    let vmms = shim.containerd.vmm_pids();
    let killed = kill(MEMBER, "", 9);
    shim.task.kill(deadline(), &killed).await.unwrap();
    let waited = wait(MEMBER, "");
    shim.task.wait(deadline(), &waited).await.unwrap();
    let deleted = delete(MEMBER, "");
    shim.task.delete(deadline(), &deleted).await.unwrap();
    vmms.into_iter().for_each(wait_gone);
    assert_eq!(shim.status().await.state, "SANDBOX_NOTREADY");
    shim.shut_down().await;
}

pub async fn shim_killed() {
    let shim = Shim::start("normal").await;
    let pid = shim.run().await;
    shim.run_member(pid).await;
    let vmms = shim.containerd.vmm_pids();
    signal(shim.pid, Signal::SIGKILL);
    for pid in vmms.into_iter().chain([pid, shim.pid]) {
        wait_gone(pid);
    }
    // containerd asks for this alone.
    let output = shim.containerd.run_shim(ID, "delete", || Ok(()));
    assert!(output.status.success(), "{output:?}");
    let answer = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(answer.exit_status, 137);
    shim.ended();
}

pub async fn refused() {
    for (change, wanted) in [
        (
            (|request, containerd| {
                request.options = MessageField::some(config(containerd, 2));
            }) as fn(&mut CreateSandboxRequest, &Containerd),
            Code::UNIMPLEMENTED,
        ),
        (
            |request, _| request.options.mut_or_insert_default().type_url = "other".into(),
            Code::INVALID_ARGUMENT,
        ),
        (
            |request, _| request.options.mut_or_insert_default().value = vec![0xff],
            Code::INVALID_ARGUMENT,
        ),
        (
            |request, _| request.sandbox_id = "s2".into(),
            Code::NOT_FOUND,
        ),
    ] {
        let shim = Shim::start("normal").await;
        let mut request = shim.request();
        change(&mut request, &shim.containerd);
        let refused = shim.sandbox.create_sandbox(deadline(), &request).await;
        assert_eq!(code(refused), wanted);
        shim.shut_down().await;
    }
}

pub async fn boot_failure() {
    let shim = Shim::start("panic").await;
    let request = shim.request();
    let created = shim.sandbox.create_sandbox(deadline(), &request).await;
    created.unwrap();
    let error = shim.begin().await.unwrap_err().to_string();
    assert!(error.contains("Unable to mount root fs"), "{error}");
    assert_eq!(shim.status().await.state, "SANDBOX_NOTREADY");
    shim.shut_down().await;
}

/// containerd was ended between the start of the shim and its first call.
pub async fn forgotten() {
    let mut containerd = Containerd::new("normal").await;
    containerd.haste = 10;
    Shim::start_on(containerd).await.ended();
}

/// The end overtakes the start.
pub async fn shut_down_while_starting() {
    let (containerd, mut held) = Containerd::held_at("CreateContainer").await;
    let shim = Shim::start_on(containerd).await;
    let request = shim.request();
    let created = shim.sandbox.create_sandbox(deadline(), &request).await;
    created.unwrap();
    let request = ShutdownSandboxRequest {
        sandbox_id: ID.into(),
        ..ShutdownSandboxRequest::default()
    };
    let (started, ended) = tokio::join!(shim.begin(), async {
        held.reached().await;
        shim.sandbox.shutdown_sandbox(deadline(), &request).await
    });
    assert!(started.is_err());
    ended.unwrap();
    shim.ended();
}
