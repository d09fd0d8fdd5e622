//! What containerd may rely on, beyond what the other tests use of it.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    process::{Command, Stdio},
};

use containerd_shim_protos::{
    api::{
        ConnectRequest, PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, StatsRequest,
        Status, UpdateTaskRequest,
    },
    shim::oci::ProcessDetails,
    shim_async::TaskClient,
    types::introspection::RuntimeInfo,
};
use nix::sys::signal::Signal;
use protobuf::{Message, MessageField, well_known_types::any::Any};
use serde_json::json;
use ttrpc::Code;

use crate::{
    containerd::{Containerd, SHIM, deadline, delete, start, wait, wait_gone},
    crashes::signal,
    lifecycle::{code, connect, exec, kill, shut_down, state},
    stuck::HASTE,
};

const SIGKILL: u32 = 9;

async fn create(containerd: &Containerd, client: &TaskClient) -> u32 {
    let request = containerd.create_request("c1");
    let created = client.create(deadline(), &request).await;
    created.unwrap().pid
}

async fn end(containerd: &Containerd, client: &TaskClient) {
    let _ = client.kill(deadline(), &kill("c1", "", SIGKILL)).await;
    client.wait(deadline(), &wait("c1", "")).await.unwrap();
    client.delete(deadline(), &delete("c1", "")).await.unwrap();
    shut_down(client).await;
    containerd.assert_nothing_left("c1");
}

/// Changes the specification of a container.
fn change(containerd: &Containerd, change: impl FnOnce(&mut serde_json::Value)) {
    let path = containerd.bundle("c1").join("config.json");
    let mut spec = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut spec);
    fs::write(&path, spec.to_string()).unwrap();
}

/// For people, and for containerd 2, which gives the options of the runtime or nothing.
pub async fn described() {
    for flag in ["-v", "--version"] {
        let output = Command::new(SHIM).arg(flag).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success());
        assert!(text.starts_with("io.containerd.bulkhead.v2 "), "{text}");
    }
    let options = Any {
        type_url: "containerd.runc.v1.Options".into(),
        value: b"\x12\x04/a/b".into(),
        ..Any::default()
    };
    for input in [Vec::new(), options.write_to_bytes().unwrap()] {
        let mut child = Command::new(SHIM)
            .arg("-info")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It need not read them.
        let _ = child.stdin.take().unwrap().write_all(&input);
        let output = child.wait_with_output().unwrap();
        let info = RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!(info.name, "io.containerd.bulkhead.v2");
        assert!(!info.version.version.is_empty());
    }
}

/// The daemon is in a session and a process group of its own, is ended before its caller when memory is
/// short, survives whoever does not listen, and adopts what others leave behind.
pub async fn daemon() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["sleep"]);
    let left = containerd.directory.path().join("left");
    change(&containerd, |spec| {
        let script = format!(
            "sleep 1000 </dev/null >/dev/null 2>&1 & echo $! > {}",
            left.display()
        );
        spec["hooks"] = json!({
            "createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]}],
        });
    });
    let (client, _) = containerd.start_shim("c1").await;
    create(&containerd, &client).await;
    let shim = connect(&client).await;
    let of = |pid: u32, file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let own = std::process::id();
    // Parent, process group and session.
    let family = |pid: u32| -> Vec<u32> {
        let stat = of(pid, "stat");
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ').skip(1);
        fields.take(3).map(|field| field.parse().unwrap()).collect()
    };
    assert_eq!(family(shim)[1..], [shim, shim]);
    let score = |pid| of(pid, "oom_score_adj").trim().parse::<i32>().unwrap();
    assert_eq!(score(shim), (score(own) + 1).min(1000));
    assert_eq!(of(shim, "cgroup"), of(own, "cgroup"));
    let bundle = fs::read_link(format!("/proc/{shim}/cwd")).unwrap();
    assert_eq!(bundle, containerd.bundle("c1"));
    for number in 0..3 {
        let open = fs::read_link(format!("/proc/{shim}/fd/{number}")).unwrap();
        assert_eq!(open.to_str(), Some("/dev/null"));
    }
    let status = of(shim, "status");
    let ignored = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:\t"));
    let ignored = u64::from_str_radix(ignored.unwrap(), 16).unwrap();
    assert_ne!(
        ignored & 1 << (Signal::SIGPIPE as i32 - 1),
        0,
        "{ignored:x}"
    );

    let orphan: u32 = fs::read_to_string(left).unwrap().trim().parse().unwrap();
    assert_eq!(family(orphan)[0], shim);
    signal(orphan, Signal::SIGKILL);
    wait_gone(orphan.try_into().unwrap());
    end(&containerd, &client).await;
}

/// A user who could reach the socket is not answered.
pub async fn strangers() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["sleep"]);
    let (client, address) = containerd.start_shim("c1").await;
    let path = address.strip_prefix("unix://").unwrap().to_owned();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    let stranger = std::thread::spawn(move || {
        // This thread alone becomes nobody; the C library would change all.
        // SAFETY: plain integers.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(changed, 0);
        let mut stream = UnixStream::connect(path).unwrap();
        stream.read(&mut [0]).unwrap()
    });
    let read = tokio::task::spawn_blocking(move || stranger.join().unwrap()).await;
    assert_eq!(read.unwrap(), 0);
    create(&containerd, &client).await;
    end(&containerd, &client).await;
}

/// A created container dies like one that runs, for whoever waits and in the events.
pub async fn killed_early() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["sleep"]);
    let (client, _) = containerd.start_shim("c1").await;
    create(&containerd, &client).await;
    let (waiting, killing) = (wait("c1", ""), kill("c1", "", SIGKILL));
    let (waited, killed) = tokio::join!(
        client.wait(deadline(), &waiting),
        client.kill(deadline(), &killing),
    );
    killed.unwrap();
    assert_eq!(waited.unwrap().exit_status, 137);
    let stopped = client.state(deadline(), &state("c1", "")).await.unwrap();
    assert_eq!(stopped.status(), Status::STOPPED);
    let refused = [
        code(client.start(deadline(), &start("c1", "")).await),
        code(client.exec(deadline(), &exec("c1", "e1", &["sleep"])).await),
        code(
            client
                .update(
                    deadline(),
                    &UpdateTaskRequest {
                        id: "c1".into(),
                        ..Default::default()
                    },
                )
                .await,
        ),
        code(
            client
                .pause(
                    deadline(),
                    &PauseRequest {
                        id: "c1".into(),
                        ..Default::default()
                    },
                )
                .await,
        ),
    ];
    assert_eq!(refused, [Code::FAILED_PRECONDITION; 4]);
    let stats = StatsRequest {
        id: "c1".into(),
        ..Default::default()
    };
    assert!(client.stats(deadline(), &stats).await.is_ok());
    end(&containerd, &client).await;
    assert_eq!(
        containerd.topics(),
        ["/tasks/create", "/tasks/exit c1 137", "/tasks/delete"]
    );
}

/// Any number of clients may wait, before the end and after it.
pub async fn waiters() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["sleep"]);
    let (client, _) = containerd.start_shim("c1").await;
    create(&containerd, &client).await;
    client.start(deadline(), &start("c1", "")).await.unwrap();
    let request = wait("c1", "");
    let waiting = (0..50).map(|_| client.wait(deadline(), &request));
    let killing = kill("c1", "", 15);
    let (waited, killed) = tokio::join!(
        futures::future::join_all(waiting),
        client.kill(deadline(), &killing),
    );
    killed.unwrap();
    for exited in waited {
        assert_eq!(exited.unwrap().exit_status, 128 + 15);
    }
    let late = client.wait(deadline(), &request).await.unwrap();
    assert_eq!(late.exit_status, 128 + 15);
    end(&containerd, &client).await;
}

/// A containerd that comes back asks for the processes of a container, and deletes one without.
pub async fn pids() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["sleep"]);
    let (client, _) = containerd.start_shim("c1").await;
    let request = PidsRequest {
        id: "c1".into(),
        ..PidsRequest::default()
    };
    let listed = async || client.pids(deadline(), &request).await;
    let numbers = |listed: ttrpc::Result<PidsResponse>| -> Vec<u32> {
        let processes = listed.unwrap().processes;
        processes.iter().map(|process| process.pid).collect()
    };
    assert_eq!(code(listed().await), Code::NOT_FOUND);
    let init = create(&containerd, &client).await;
    assert_eq!(numbers(listed().await), [init]);
    client.start(deadline(), &start("c1", "")).await.unwrap();
    let running = exec("c1", "e1", &["sleep"]);
    client.exec(deadline(), &running).await.unwrap();
    assert_eq!(numbers(listed().await), [init]);
    let started = client.start(deadline(), &start("c1", "e1")).await;
    let exec_pid = started.unwrap().pid;
    let both = listed().await.unwrap();
    assert_eq!(numbers(Ok(both.clone())), [init, exec_pid]);
    assert!(both.processes[0].info.is_none());
    let info = both.processes[1].info.as_ref().unwrap();
    assert_eq!(info.type_url, "containerd.runc.v1.ProcessDetails");
    let details = ProcessDetails::parse_from_bytes(&info.value).unwrap();
    assert_eq!(details.exec_id, "e1");

    client.kill(deadline(), &kill("c1", "", 9)).await.unwrap();
    client.wait(deadline(), &wait("c1", "")).await.unwrap();
    assert_eq!(numbers(listed().await), [init]);
    let task_pid = async |id: &str| {
        let request = ConnectRequest {
            id: id.into(),
            ..ConnectRequest::default()
        };
        let connected = client.connect(deadline(), &request).await;
        connected.unwrap().task_pid
    };
    assert_eq!([task_pid("c1").await, task_pid("other").await], [init, 0]);
    end(&containerd, &client).await;
}

/// A size may come with the specification, or before there is a terminal.
pub async fn sizes() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["size"]);
    change(&containerd, |spec| {
        spec["process"]["terminal"] = true.into();
        spec["process"]["consoleSize"] = json!({"width": 70, "height": 20});
    });
    let (client, _) = containerd.start_shim("c1").await;
    let log = |name: &str| containerd.directory.path().join(name);
    let mut request = containerd.create_request("c1");
    request.terminal = true;
    request.stdout = format!("file://{}", log("init").display());
    client.create(deadline(), &request).await.unwrap();
    for exec_id in ["told", "untold"] {
        let mut request = exec("c1", exec_id, &["size"]);
        request.terminal = true;
        request.stdout = format!("file://{}", log(exec_id).display());
        client.exec(deadline(), &request).await.unwrap();
    }
    let resize = ResizePtyRequest {
        id: "c1".into(),
        exec_id: "told".into(),
        width: 130,
        height: 50,
        ..ResizePtyRequest::default()
    };
    client.resize_pty(deadline(), &resize).await.unwrap();
    for exec_id in ["told", "untold", ""] {
        let request = start("c1", exec_id);
        client.start(deadline(), &request).await.unwrap();
        let waiting = wait("c1", exec_id);
        client.wait(deadline(), &waiting).await.unwrap();
        if !exec_id.is_empty() {
            let deleting = delete("c1", exec_id);
            client.delete(deadline(), &deleting).await.unwrap();
        }
    }
    end(&containerd, &client).await;
    let said = ["init", "told", "untold"].map(|name| fs::read_to_string(log(name)).unwrap());
    assert_eq!(said, ["70x20", "130x50", "0x0"]);
}

/// CRI gives the options of runc to any runtime.
pub async fn options() {
    let types = ["containerd.runc.v1.Options", "who.knows/what"];
    for type_url in types {
        let containerd = Containerd::new("normal").await;
        containerd.add_bundle("c1", None, &["say", "hello", "0"]);
        let (client, _) = containerd.start_shim("c1").await;
        let mut request = containerd.create_request("c1");
        request.options = MessageField::some(Any {
            type_url: type_url.into(),
            value: b"\x12\x04/a/b".into(),
            ..Any::default()
        });
        client.create(deadline(), &request).await.unwrap();
        client.start(deadline(), &start("c1", "")).await.unwrap();
        end(&containerd, &client).await;
    }
}

/// What happens while containerd is not there is told when it is back, in order.
pub async fn events() {
    let mut containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["sleep"]);
    let (client, _) = containerd.start_shim("c1").await;
    create(&containerd, &client).await;
    containerd.go_away().await;
    client.start(deadline(), &start("c1", "")).await.unwrap();
    client.kill(deadline(), &kill("c1", "", 9)).await.unwrap();
    client.wait(deadline(), &wait("c1", "")).await.unwrap();
    containerd.listen().await;
    end(&containerd, &client).await;
    assert_eq!(
        containerd.topics(),
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit c1 137",
            "/tasks/delete"
        ]
    );
}

/// A containerd that is restarted in the middle of the last deletion does not say that the pod is over.
pub async fn forgotten() {
    let mut containerd = Containerd::new("normal").await;
    containerd.haste = HASTE;
    for (args, created) in [(["sleep"], true), (["unknown"], false)] {
        containerd.add_bundle("c1", None, &args);
        let (client, _) = containerd.start_shim("c1").await;
        let shim = connect(&client).await;
        let request = containerd.create_request("c1");
        assert_eq!(client.create(deadline(), &request).await.is_ok(), created);
        if created {
            client.delete(deadline(), &delete("c1", "")).await.unwrap();
        }
        wait_gone(shim.try_into().unwrap());
        containerd.assert_nothing_left("c1");
        fs::remove_dir_all(containerd.bundle("c1")).unwrap();
    }
}
