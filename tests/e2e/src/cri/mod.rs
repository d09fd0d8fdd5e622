//! Driving containerd as Kubernetes does: pods and their containers, by way of CRI.
//!
//! The tests stand in for the kubelet: it makes a pod's cgroup, log directory and volumes, and takes
//! them away.

mod client;
mod streams;

use std::cell::Cell;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use data_encoding::BASE64;
use serde_json::{Value, json};

use self::client::Client;
pub use self::client::Refused;
pub use self::streams::{Forwarded, Streams};
use crate::command::DEADLINE;
use crate::ctr::{self, ctr};

/// containerd's namespace for CRI.
pub const NAMESPACE: &str = "k8s.io";

/// The image of a pod's first container, which the lab has beside those that it imports.
const PAUSE_ARCHIVE: &str = "/var/lib/bulkhead-images/pause.tar";

/// And the one that is imported elsewhere already.
const BUSYBOX_ARCHIVE: &str = "/var/lib/bulkhead-images/boot/busybox.tar";

/// The parent of all pods' cgroups.
const CGROUPS: &str = "/kubepods";

/// Between two looks at a container's state.
const PAUSE: Duration = Duration::from_millis(100);

/// Where the lab configures containerd.
const CONFIG: &str = "/etc/containerd/config.toml";

/// Whether this containerd can make pods by its sandbox API.
pub fn has_sandbox_api() -> bool {
    fs::read_to_string(CONFIG).is_ok_and(|config| config.contains(ctr::SANDBOX))
}

/// containerd with one of its runtimes.
pub struct Cri {
    client: Client,
    handler: &'static str,
    /// Of the next pod.
    number: Cell<u32>,
}

impl Cri {
    /// CRI with pods of this runtime, and with the images that they need.
    pub fn new(runtime: &str) -> Result<Self> {
        let there = ctr(&["--namespace", NAMESPACE, "image", "ls", "-q"])?.succeeds()?;
        for (name, archive) in [("pause", PAUSE_ARCHIVE), ("busybox", BUSYBOX_ARCHIVE)] {
            if !there.contains(&format!("/{name}:")) {
                ctr(&["--namespace", NAMESPACE, "image", "import", archive])?.succeeds()?;
            }
        }
        Ok(Self {
            client: Client::new()?,
            handler: match runtime {
                ctr::RUNC => "runc",
                ctr::SANDBOX => ctr::SANDBOX,
                _ => "bulkhead",
            },
            number: Cell::new(0),
        })
    }

    /// Waits until a containerd that was restarted serves CRI, which is later than the rest.
    pub fn ready(&self) -> Result<()> {
        let begun = Instant::now();
        loop {
            match self.call("ListPodSandbox", &json!({})) {
                Ok(_) => return Ok(()),
                // By which code depends on the version.
                Err(error) if begun.elapsed() > DEADLINE => return Err(error),
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }

    /// Fails if containerd has anything left of the pods.
    pub fn end(self) -> Result<()> {
        for what in ["container", "task"] {
            let left = ctr(&["--namespace", NAMESPACE, what, "ls", "-q"])?.succeeds()?;
            ensure!(left.is_empty(), "a {what} is left: {left}");
        }
        let snapshots = ctr(&["--namespace", NAMESPACE, "snapshot", "ls"])?.succeeds()?;
        let left = snapshots.lines().find(|line| line.contains("Active"));
        ensure!(left.is_none(), "a snapshot is left: {left:?}");
        Ok(())
    }

    /// Calls a method.
    pub fn call(&self, method: &str, request: &Value) -> Result<Value> {
        self.client.call(method, request)
    }

    /// Runs a pod: the usual one with these changes to its `PodSandboxConfig`.
    pub fn pod(&self, changes: &Value) -> Result<Pod<'_>> {
        let number = self.number.replace(self.number.get() + 1);
        let uid = format!("e2e-{}-{}-{number}", self.handler, std::process::id());
        let directory = PathBuf::from(format!("/var/tmp/{uid}"));
        let parent = format!("{CGROUPS}/pod{uid}");
        let cgroup = Path::new("/sys/fs/cgroup").join(&parent[1..]);
        let usual = json!({
            "metadata": { "name": "pod", "uid": uid, "namespace": "e2e" },
            "hostname": "in-pod",
            "log_directory": directory.join("logs"),
            "linux": {
                "cgroup_parent": parent,
                "security_context": { "namespace_options": { "pid": "CONTAINER" } },
            },
        });
        let mut pod = Pod {
            cri: self,
            id: String::new(),
            config: merged(usual, changes),
            directory,
            cgroup,
        };
        fs::create_dir_all(pod.directory.join("logs"))?;
        make_cgroup(&pod.cgroup)?;
        let request = json!({ "config": pod.config, "runtime_handler": self.handler });
        let answer = self.call("RunPodSandbox", &request)?;
        pod.id = text(&answer["pod_sandbox_id"])?;
        Ok(pod)
    }
}

/// A pod that runs. It is removed when dropped.
pub struct Pod<'a> {
    cri: &'a Cri,
    /// Its id.
    pub id: String,
    config: Value,
    /// Its logs, and what a test puts there.
    pub directory: PathBuf,
    /// The kubelet's cgroup for it.
    pub cgroup: PathBuf,
}

impl Pod<'_> {
    /// Creates a container: one of busybox that does nothing, with these changes to its
    /// `ContainerConfig`.
    pub fn create(&self, name: &str, changes: &Value) -> Result<Member<'_>> {
        let usual = json!({
            "metadata": { "name": name },
            "image": { "image": ctr::BUSYBOX },
            "command": ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done"],
            "log_path": format!("{name}.log"),
            "linux": {
                "security_context": {
                    "namespace_options": merged(
                        json!({ "pid": "CONTAINER" }),
                        &self.config["linux"]["security_context"]["namespace_options"],
                    ),
                },
            },
        });
        let request = json!({
            "pod_sandbox_id": self.id,
            "config": merged(usual, changes),
            "sandbox_config": self.config,
        });
        let answer = self.cri.call("CreateContainer", &request)?;
        Ok(Member {
            cri: self.cri,
            id: text(&answer["container_id"])?,
            log: self.directory.join(format!("logs/{name}.log")),
        })
    }

    /// Creates a container and starts it.
    pub fn start(&self, name: &str, changes: &Value) -> Result<Member<'_>> {
        let member = self.create(name, changes)?;
        member.start()?;
        Ok(member)
    }

    /// Its `PodSandboxStatus`.
    pub fn status(&self) -> Result<Value> {
        let request = json!({ "pod_sandbox_id": self.id });
        let mut answer = self.cri.call("PodSandboxStatus", &request)?;
        Ok(answer["status"].take())
    }

    /// Its `PodSandboxStats`.
    pub fn stats(&self) -> Result<Value> {
        let request = json!({ "pod_sandbox_id": self.id });
        let mut answer = self.cri.call("PodSandboxStats", &request)?;
        Ok(answer["stats"].take())
    }

    /// The address by which others reach it.
    pub fn address(&self) -> Result<IpAddr> {
        let status = self.status()?;
        Ok(text(&status["network"]["ip"])?.parse()?)
    }

    /// Connects with a port of it as `kubectl port-forward` does.
    pub fn forward(&self, port: u16) -> Result<Forwarded> {
        let request = json!({ "pod_sandbox_id": self.id, "port": [port] });
        let answer = self.cri.call("PortForward", &request)?;
        Forwarded::connect(&text(&answer["url"])?, port)
    }

    /// A directory on the host for a volume of it.
    pub fn volume(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    }

    /// What containerd tells of it beyond its status.
    pub fn info(&self) -> Result<Value> {
        let request = json!({ "pod_sandbox_id": self.id, "verbose": true });
        let answer = self.cri.call("PodSandboxStatus", &request)?;
        let info = text(&answer["info"]["info"])?;
        serde_json::from_str(&info).with_context(|| format!("no JSON: {info}"))
    }

    /// The host's process for the pod itself.
    pub fn pid(&self) -> Result<i32> {
        let info = self.info()?;
        let pid = info["pid"].as_i64();
        Ok(pid
            .with_context(|| format!("no pid in {info}"))?
            .try_into()?)
    }

    /// Ends everything in it.
    pub fn stop(&self) -> Result<()> {
        let request = json!({ "pod_sandbox_id": self.id });
        self.cri.call("StopPodSandbox", &request).map(drop)
    }

    /// Removes it, when it has been stopped. What the kubelet made for it stays.
    pub fn remove(&mut self) -> Result<()> {
        let request = json!({ "pod_sandbox_id": std::mem::take(&mut self.id) });
        self.cri.call("RemovePodSandbox", &request).map(drop)
    }

    fn give_back(&mut self) -> Result<()> {
        if !self.id.is_empty() {
            self.stop()?;
            self.remove()?;
        }
        fs::remove_dir(&self.cgroup)
            .with_context(|| format!("cannot remove {}", self.cgroup.display()))?;
        fs::remove_dir_all(&self.directory)?;
        Ok(())
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.give_back() {
            // The comparison after the test fails as well, and says what is left.
            eprintln!("cannot remove a pod: {error:#}");
        }
    }
}

/// A container of a pod. It goes with the pod at the latest.
pub struct Member<'a> {
    cri: &'a Cri,
    /// Its id.
    pub id: String,
    /// Its log on the host.
    pub log: PathBuf,
}

impl Member<'_> {
    fn call(&self, method: &str, more: &Value) -> Result<Value> {
        let request = merged(json!({ "container_id": self.id }), more);
        self.cri.call(method, &request)
    }

    /// Starts it.
    pub fn start(&self) -> Result<()> {
        self.call("StartContainer", &json!({})).map(drop)
    }

    /// Ends it, by force after this many seconds.
    pub fn stop(&self, seconds: u32) -> Result<()> {
        self.call("StopContainer", &json!({ "timeout": seconds }))
            .map(drop)
    }

    /// Removes it.
    pub fn remove(&self) -> Result<()> {
        self.call("RemoveContainer", &json!({})).map(drop)
    }

    /// Changes its limits.
    pub fn update(&self, linux: &Value) -> Result<()> {
        self.call("UpdateContainerResources", &json!({ "linux": linux }))
            .map(drop)
    }

    /// Makes containerd open its log anew.
    pub fn reopen_log(&self) -> Result<()> {
        self.call("ReopenContainerLog", &json!({})).map(drop)
    }

    /// Its `ContainerStatus`.
    pub fn status(&self) -> Result<Value> {
        let mut answer = self.call("ContainerStatus", &json!({}))?;
        Ok(answer["status"].take())
    }

    /// Waits until its log has this text; gives the log.
    pub fn logs(&self, text: &str) -> Result<String> {
        let begun = Instant::now();
        loop {
            // It may just have been renamed.
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            if log.contains(text) {
                return Ok(log);
            }
            ensure!(begun.elapsed() < DEADLINE, "no {text:?} in {log:?}");
            thread::sleep(PAUSE);
        }
    }

    /// Its `ContainerStats`.
    pub fn stats(&self) -> Result<Value> {
        let mut answer = self.call("ContainerStats", &json!({}))?;
        Ok(answer["stats"].take())
    }

    /// Waits for its end; gives its last status.
    pub fn ended(&self) -> Result<Value> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let status = self.status()?;
            if status["state"] == "CONTAINER_EXITED" {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("it does not end: {status}");
            }
            thread::sleep(PAUSE);
        }
    }

    /// `ExecSync` of a command, which may take this many seconds; 0 is no limit.
    pub fn exec_within(&self, seconds: u32, command: &[&str]) -> Result<Executed> {
        let answer = self.call("ExecSync", &json!({ "cmd": command, "timeout": seconds }))?;
        Ok(Executed {
            code: answer["exit_code"].as_i64().context("no exit code")?,
            out: decoded(&answer["stdout"])?,
            err: decoded(&answer["stderr"])?,
        })
    }

    /// `Exec` of a command with all of its streams, or on a terminal.
    pub fn spawn(&self, command: &[&str], tty: bool) -> Result<Streams> {
        let answer = self.call(
            "Exec",
            &json!({
                "cmd": command, "tty": tty, "stdin": true, "stdout": true, "stderr": !tty,
            }),
        )?;
        Streams::connect(&text(&answer["url"])?)
    }

    /// `Attach` to its streams.
    pub fn attach(&self) -> Result<Streams> {
        let answer = self.call(
            "Attach",
            &json!({ "stdin": true, "stdout": true, "stderr": true }),
        )?;
        Streams::connect(&text(&answer["url"])?)
    }

    /// `ExecSync` of a script.
    pub fn exec(&self, script: &str) -> Result<Executed> {
        self.exec_within(0, &["sh", "-c", script])
    }

    /// What a script writes, which must succeed.
    pub fn says(&self, script: &str) -> Result<String> {
        let done = self.exec(script)?;
        ensure!(done.code == 0, "`{script}`: {done:?}");
        Ok(done.out.trim_end().to_owned())
    }
}

/// What a command wrote and how it ended.
#[derive(Debug)]
pub struct Executed {
    /// Its exit code.
    pub code: i64,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

/// A change of a JSON value: objects are merged, all else is replaced.
pub fn merged(mut base: Value, changes: &Value) -> Value {
    match (&mut base, changes) {
        (Value::Object(object), Value::Object(changes)) => {
            for (key, change) in changes {
                let old = object.remove(key).unwrap_or(Value::Null);
                object.insert(key.clone(), merged(old, change));
            }
            base
        }
        _ => changes.clone(),
    }
}

/// A mount of a container: a directory or file of the host.
pub fn mount(host: &Path, container: &str) -> Value {
    json!({ "host_path": host, "container_path": container })
}

/// The mount of this program, for its [`crate::probe`].
pub fn probe() -> Result<Value> {
    let mut mount = mount(&std::env::current_exe()?, ctr::PROBE);
    mount["readonly"] = json!(true);
    Ok(mount)
}

/// Why containerd refused something.
pub fn refusal<T>(result: Result<T>) -> Result<Refused> {
    match result {
        Ok(_) => bail!("it was not refused"),
        Err(error) => error.downcast::<Refused>(),
    }
}

/// A string of an answer.
pub fn text(value: &Value) -> Result<String> {
    let text = value.as_str();
    Ok(text
        .with_context(|| format!("no text: {value}"))?
        .to_owned())
}

/// A number of an answer; those of 64 bits are strings in JSON.
pub fn number(value: &Value) -> Result<u64> {
    let number = value.as_u64().or_else(|| value.as_str()?.parse().ok());
    number.with_context(|| format!("no number: {value}"))
}

fn decoded(value: &Value) -> Result<String> {
    let bytes = BASE64.decode(text(value)?.as_bytes())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// As the kubelet: with all controllers for those below.
fn make_cgroup(cgroup: &Path) -> Result<()> {
    fs::create_dir_all(cgroup).with_context(|| format!("cannot create {}", cgroup.display()))?;
    let parent = cgroup.parent().context("a cgroup has a parent")?;
    for directory in [parent, cgroup] {
        fs::write(
            directory.join("cgroup.subtree_control"),
            "+cpuset +cpu +io +memory +hugetlb +pids",
        )
        .with_context(|| format!("cannot delegate in {}", directory.display()))?;
    }
    Ok(())
}
