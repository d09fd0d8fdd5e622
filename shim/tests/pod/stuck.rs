//! Nobody waits for ever for a guest or a VMM that does not answer: each call of a container's life ends
//! within a deadline, with a result or a status, and nothing is left afterwards.

use std::{
    fmt::Debug,
    fs,
    future::Future,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpStream},
    os::unix::fs::symlink,
    path::PathBuf,
    time::Duration,
};

use bulkhead_shim::network::namespace::Namespace;

use containerd_shim_protos::{
    api::{ResizePtyRequest, StatsRequest},
    shim_async::TaskClient,
};
use nix::sys::signal::Signal;
use serde_json::json;
use tokio::time::timeout;

use crate::{
    adjust::{pause, resume, update},
    containerd::{Containerd, deadline, delete, start, wait},
    crashes::signal,
    fake_agent::OPEN_PORT,
    lifecycle::{connect, exec, kill, shut_down, state},
    net::Net,
};

/// The shim's deadlines are this many times shorter.
pub const HASTE: u32 = 10;

/// More than any call may take: the longest deadline, a minute, and what may follow from it.
const LIMIT: Duration = Duration::from_secs(20);

const SIGKILL: u32 = 9;

/// A step that is never answered, and the calls that fail because of it.
pub struct Stuck {
    pub step: &'static str,
    pub failing: &'static [&'static str],
}

/// What follows when the guest's container was never created.
const NEVER_CREATED: &[&str] = &["create: DEADLINE_EXCEEDED"];

pub const STUCK: [Stuck; 24] = [
    // Steps of the VMM.
    Stuck {
        step: "Boot",
        failing: &["create: UNKNOWN"],
    },
    Stuck {
        step: "Connection",
        failing: &["create: UNKNOWN"],
    },
    Stuck {
        step: "Share",
        failing: &["create: UNKNOWN"],
    },
    Stuck {
        step: "Unshare",
        failing: &[],
    },
    Stuck {
        step: "AttachNic",
        failing: &["start: UNKNOWN"],
    },
    Stuck {
        step: "DetachNic",
        failing: &[],
    },
    Stuck {
        step: "Counters",
        failing: &["create: UNKNOWN"],
    },
    // Calls of the agent.
    Stuck {
        step: "Info",
        failing: &[],
    },
    Stuck {
        step: "CreateContainer",
        failing: NEVER_CREATED,
    },
    Stuck {
        step: "SetNetwork",
        failing: &["start: DEADLINE_EXCEEDED"],
    },
    Stuck {
        step: "StartContainer",
        failing: &["start: DEADLINE_EXCEEDED"],
    },
    Stuck {
        step: "Exec",
        failing: &["start of the exec: DEADLINE_EXCEEDED"],
    },
    Stuck {
        step: "Wait",
        failing: &[],
    },
    Stuck {
        step: "Signal",
        failing: &["kill of the exec: DEADLINE_EXCEEDED"],
    },
    Stuck {
        step: "ResizePty",
        failing: &["resize: DEADLINE_EXCEEDED"],
    },
    Stuck {
        step: "Delete",
        failing: &[],
    },
    Stuck {
        step: "Stats",
        failing: &["stats: DEADLINE_EXCEEDED"],
    },
    Stuck {
        step: "Update",
        failing: &["update: DEADLINE_EXCEEDED"],
    },
    Stuck {
        step: "Pause",
        failing: &["pause: DEADLINE_EXCEEDED"],
    },
    Stuck {
        step: "Resume",
        failing: &["resume: DEADLINE_EXCEEDED"],
    },
    Stuck {
        step: "WaitForOom",
        failing: &[],
    },
    Stuck {
        step: "Connect",
        failing: &["connection to a port"],
    },
    Stuck {
        step: "RefreshMirror",
        failing: &[],
    },
    Stuck {
        step: "ReleaseShares",
        failing: &[],
    },
];

/// The calls that have failed so far.
#[derive(Default)]
struct Calls {
    failed: Vec<String>,
}

impl Calls {
    /// Waits for the end of a call, which is in time, with a result or a status.
    async fn made<T: Debug>(
        &mut self,
        name: &str,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> Option<T> {
        let result = timeout(LIMIT, call).await;
        match result.unwrap_or_else(|_| panic!("{name} does not end")) {
            Ok(value) => Some(value),
            Err(ttrpc::Error::RpcStatus(status)) => {
                self.failed.push(format!("{name}: {:?}", status.code()));
                None
            }
            Err(error) => panic!("{name} has no status: {error}"),
        }
    }

    /// A connection to a port is made, or reset in time.
    fn port_dialled(&mut self, net: &Net) {
        if let Err(error) = dial(&net.inside) {
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            self.failed.push("connection to a port".into());
        }
    }
}

/// Asks something at a port of the container, by way of its namespace on the host.
fn dial(inside: &Namespace) -> io::Result<()> {
    let dialled = inside.enter(|| {
        let mut connection =
            TcpStream::connect((Ipv4Addr::LOCALHOST, OPEN_PORT.try_into().unwrap()))?;
        connection.set_read_timeout(Some(LIMIT))?;
        connection.write_all(b"?")?;
        connection.shutdown(Shutdown::Write)?;
        connection.read_exact(&mut [0])
    });
    dialled.unwrap()
}

/// A container's life with a step that is never answered.
pub async fn never_answered(stuck: &Stuck) {
    let (mut containerd, mut held) = Containerd::held_at(stuck.step).await;
    containerd.haste = HASTE;
    containerd.configure("boot_timeout = 5");
    containerd.add_bundle("c1", None, &["sleep"]);
    let volume = ReplacedVolume::new(&containerd);
    containerd.add_mount("c1", &volume.0);
    let net = Net::with_interface();
    containerd.set_network("c1", &net.path());
    let (client, _) = containerd.start_shim("c1").await;
    let mut calls = Calls::default();
    live(&containerd, &client, &net, &volume, &mut calls).await;
    assert_eq!(calls.failed, stuck.failing, "{} is stuck", stuck.step);
    finish(&containerd, &client).await;
    held.reached().await;
    net.assert_nothing_left();
}

/// A volume as the kubelet makes them of config maps, which it replaces as a whole.
struct ReplacedVolume(PathBuf);

impl ReplacedVolume {
    fn new(containerd: &Containerd) -> Self {
        let volume = Self(containerd.directory.path().join("volume"));
        fs::create_dir(&volume.0).unwrap();
        volume.replace("..first");
        volume
    }

    fn replace(&self, content: &str) {
        fs::create_dir(self.0.join(content)).unwrap();
        symlink(content, self.0.join("..new")).unwrap();
        fs::rename(self.0.join("..new"), self.0.join("..data")).unwrap();
    }
}

async fn live(
    containerd: &Containerd,
    client: &TaskClient,
    net: &Net,
    volume: &ReplacedVolume,
    calls: &mut Calls,
) {
    let mut request = containerd.create_request("c1");
    request.terminal = true;
    let create = client.create(deadline(), &request);
    if calls.made("create", create).await.is_none() {
        return;
    }
    let request = state("c1", "");
    calls
        .made("state", client.state(deadline(), &request))
        .await;
    let request = start("c1", "");
    let starting = client.start(deadline(), &request);
    if calls.made("start", starting).await.is_some() {
        calls.port_dialled(net);
        volume.replace("..second");
        use_running(client, calls).await;
        let request = kill("c1", "", SIGKILL);
        // With the pod, it may have ended already.
        let _ = timeout(LIMIT, client.kill(deadline(), &request)).await;
    }
    let request = wait("c1", "");
    let waited = client.wait(deadline(), &request);
    let exited = calls.made("wait", waited).await.unwrap();
    assert_eq!(exited.exit_status, 137);
    let request = delete("c1", "");
    calls
        .made("delete", client.delete(deadline(), &request))
        .await;
}

/// All that is asked of a running container.
async fn use_running(client: &TaskClient, calls: &mut Calls) {
    let request = ResizePtyRequest {
        id: "c1".into(),
        width: 80,
        height: 25,
        ..ResizePtyRequest::default()
    };
    let resize = client.resize_pty(deadline(), &request);
    calls.made("resize", resize).await;
    let request = StatsRequest {
        id: "c1".into(),
        ..StatsRequest::default()
    };
    calls
        .made("stats", client.stats(deadline(), &request))
        .await;
    calls.made("update", update(client, "c1", &json!({}))).await;
    if calls.made("pause", pause(client, "c1")).await.is_some() {
        let resumed = calls.made("resume", resume(client, "c1")).await;
        if resumed.is_none() {
            // It stays paused, and nothing can be executed in it.
            return;
        }
    }
    let request = exec("c1", "e1", &["sleep"]);
    calls.made("exec", client.exec(deadline(), &request)).await;
    let request = start("c1", "e1");
    let starting = client.start(deadline(), &request);
    if calls.made("start of the exec", starting).await.is_some() {
        let request = kill("c1", "e1", SIGKILL);
        let killing = client.kill(deadline(), &request);
        calls.made("kill of the exec", killing).await;
    }
    let request = wait("c1", "e1");
    let waited = client.wait(deadline(), &request);
    calls.made("wait for the exec", waited).await.unwrap();
    let request = delete("c1", "e1");
    let deletion = client.delete(deadline(), &request);
    calls.made("delete of the exec", deletion).await;
}

/// Ends the pod, as containerd does after the last deletion.
async fn finish(containerd: &Containerd, client: &TaskClient) {
    timeout(LIMIT, shut_down(client))
        .await
        .expect("the shutdown");
    let output = containerd.run_shim("c1", "delete", || Ok(()));
    assert!(output.status.success(), "{output:?}");
    containerd.assert_nothing_left("c1");
    let topics = containerd.topics();
    let count = |prefix| {
        topics
            .iter()
            .filter(|topic| topic.starts_with(prefix))
            .count()
    };
    assert_eq!(
        count("/tasks/create"),
        count("/tasks/exit c1"),
        "{topics:?}"
    );
    assert_eq!(
        count("/tasks/exec-started"),
        count("/tasks/exit e1"),
        "{topics:?}"
    );
}

/// Neither SIGKILL nor what it leads to can be refused, whoever sends it.
pub async fn disobedient() {
    for command in ["deaf", "undead"] {
        for anchor_is_killed in [false, true] {
            let mut containerd = Containerd::new("normal").await;
            containerd.haste = HASTE;
            containerd.add_bundle("c1", None, &["sleep", command]);
            let (client, _) = containerd.start_shim("c1").await;
            let request = containerd.create_request("c1");
            client.create(deadline(), &request).await.unwrap();
            let started = client.start(deadline(), &start("c1", "")).await.unwrap();
            if anchor_is_killed {
                signal(started.pid, Signal::SIGKILL);
            } else {
                let request = kill("c1", "", SIGKILL);
                client.kill(deadline(), &request).await.unwrap();
            }
            let request = wait("c1", "");
            let waited = timeout(LIMIT, client.wait(deadline(), &request)).await;
            let exited = waited.unwrap_or_else(|_| panic!("a {command} guest is waited for"));
            assert_eq!(exited.unwrap().exit_status, 137);
            client.delete(deadline(), &delete("c1", "")).await.unwrap();
            finish(&containerd, &client).await;
        }
    }
}

/// A container that was only created is deleted though its process does not die.
pub async fn undead_and_never_started() {
    for command in ["deaf", "undead"] {
        let mut containerd = Containerd::new("normal").await;
        containerd.haste = HASTE;
        containerd.add_bundle("c1", None, &["sleep", command]);
        let (client, _) = containerd.start_shim("c1").await;
        let request = containerd.create_request("c1");
        client.create(deadline(), &request).await.unwrap();
        let deleted = timeout(LIMIT, client.delete(deadline(), &delete("c1", ""))).await;
        let deleted = deleted.expect("the deletion does not end").unwrap();
        assert_eq!(deleted.exit_status, 137);
        finish(&containerd, &client).await;
    }
}

/// An exec whose end is never told ends with its container, whose other resources are released.
pub async fn lost_exec() {
    let mut containerd = Containerd::new("normal").await;
    containerd.haste = HASTE;
    for id in ["pod", "member"] {
        containerd.add_bundle(id, Some("pod"), &["sleep"]);
    }
    let (client, _) = containerd.start_shim("pod").await;
    for id in ["pod", "member"] {
        let request = containerd.create_request(id);
        client.create(deadline(), &request).await.unwrap();
        client.start(deadline(), &start(id, "")).await.unwrap();
    }
    let request = exec("member", "e1", &["sleep", "lost"]);
    client.exec(deadline(), &request).await.unwrap();
    let started = client.start(deadline(), &start("member", "e1")).await;
    let anchor = started.unwrap().pid;
    let request = kill("member", "", SIGKILL);
    client.kill(deadline(), &request).await.unwrap();
    for exec_id in ["e1", ""] {
        let request = wait("member", exec_id);
        let waited = timeout(LIMIT, client.wait(deadline(), &request)).await;
        let exited = waited.unwrap_or_else(|_| panic!("{exec_id:?} is waited for"));
        assert_eq!(exited.unwrap().exit_status, 137);
    }
    let request = delete("member", "");
    client.delete(deadline(), &request).await.unwrap();
    // The pod goes on.
    assert!(!containerd.cgroup("member").exists(), "its cgroup is left");
    crate::containerd::wait_gone(anchor.try_into().unwrap());
    let request = kill("pod", "", SIGKILL);
    client.kill(deadline(), &request).await.unwrap();
    client.wait(deadline(), &wait("pod", "")).await.unwrap();
    client.delete(deadline(), &delete("pod", "")).await.unwrap();
    shut_down(&client).await;
    containerd.assert_nothing_left("pod");
    containerd.assert_nothing_left("member");
}

/// A log file that is a FIFO without a reader does not stop the shim.
pub async fn unread_log() {
    let containerd = Containerd::new("normal").await;
    containerd.add_bundle("c1", None, &["say", "hello", "0"]);
    let (client, _) = containerd.start_shim("c1").await;
    let mut request = containerd.create_request("c1");
    request.stdout = format!("file://{}", containerd.fifo("unread"));
    let created = timeout(LIMIT, client.create(deadline(), &request)).await;
    created.expect("the creation does not end").unwrap();
    connect(&client).await;
    client.start(deadline(), &start("c1", "")).await.unwrap();
    client.wait(deadline(), &wait("c1", "")).await.unwrap();
    client.delete(deadline(), &delete("c1", "")).await.unwrap();
    finish(&containerd, &client).await;
}
