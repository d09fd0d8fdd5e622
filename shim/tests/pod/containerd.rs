//! As much of containerd as the tests need: bundles, calls and events.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{CreateTaskRequest, DeleteRequest, Empty, Mount, StartRequest, WaitRequest},
    events::task::TaskExit,
    shim::events::ForwardRequest,
    shim_async::{Client, Events, TaskClient, create_events},
};
use protobuf::Message;
use serde_json::json;
use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};
use ttrpc::{
    asynchronous::{Server, TtrpcContext},
    context,
};

use crate::fake_vmm::{REACHED, RELEASE};

pub const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v2");

/// No call takes this long unless something hangs.
const DEADLINE: Duration = Duration::from_secs(60);

pub fn deadline() -> context::Context {
    context::with_duration(DEADLINE)
}

type Log = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

struct EventLog(Log);

#[async_trait]
impl Events for EventLog {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap();
        let event = envelope.event.unwrap();
        assert!(event.type_url.starts_with("containerd.events.Task"));
        self.0.lock().unwrap().push((envelope.topic, event.value));
        Ok(Empty::new())
    }
}

/// A machine with containerd on it, in a directory that is removed with this.
pub struct Containerd {
    pub directory: tempfile::TempDir,
    /// How many times shorter the shim's deadlines are.
    pub haste: u32,
    log: Log,
    server: Option<Server>,
}

/// The test's side of the step at which the VMM is held.
pub struct Held {
    reached: pipe::Receiver,
    release: File,
}

impl Held {
    /// Waits until the VMM is there.
    pub async fn reached(&mut self) {
        let read = timeout(DEADLINE, self.reached.read_u8()).await;
        read.expect("the step is never reached").unwrap();
    }

    /// Lets it go on, there and from now on.
    pub fn release(&mut self) {
        self.release.write_all(&[0; 256]).unwrap();
    }
}

impl Containerd {
    pub async fn new(scenario: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::create_dir(path.join("guest")).unwrap();
        fs::write(path.join("guest/vmlinux"), "kernel").unwrap();
        fs::write(path.join("guest/initramfs.cpio"), "initramfs").unwrap();
        bulkhead_rootfs_builder::write_manifest(&path.join("guest"), "6.12").unwrap();
        fs::create_dir(path.join("image")).unwrap();
        fs::write(path.join("image/hello"), "from the image").unwrap();
        fs::write(path.join("scenario"), scenario).unwrap();
        let vmm = path.join("bulkhead-vmm");
        std::os::unix::fs::symlink(std::env::current_exe().unwrap(), &vmm).unwrap();
        let config = format!(
            "guest_dir = {:?}\nvmm = {:?}\nstate_dir = {:?}\nlog_level = 'debug'\n\
             cgroup_limits = false\n",
            path.join("guest"),
            vmm,
            path.join("state"),
        );
        fs::write(path.join("config.toml"), config).unwrap();
        let mut containerd = Self {
            directory,
            haste: 1,
            log: Log::default(),
            server: None,
        };
        containerd.listen().await;
        containerd
    }

    /// Takes events.
    pub async fn listen(&mut self) {
        let address = format!("unix://{}", self.directory.path().join("events").display());
        let log = EventLog(self.log.clone());
        let mut server = Server::new()
            .bind(&address)
            .unwrap()
            .register_service(create_events(Arc::new(log)));
        server.start().await.unwrap();
        self.server = Some(server);
    }

    /// Takes no more events, and is not there.
    pub async fn go_away(&mut self) {
        self.server.take().unwrap().shutdown().await.unwrap();
        // As a containerd that is started again does with the socket of the one before.
        let _ = fs::remove_file(self.directory.path().join("events"));
    }

    /// A machine whose VMM is held at a step.
    pub async fn held_at(step: &str) -> (Self, Held) {
        let containerd = Self::new(&format!("hold {step}")).await;
        let path = |name| PathBuf::from(containerd.fifo(name));
        let (reached, release) = (path(REACHED), path(RELEASE));
        // Open for both, so that neither side waits for the other to open it.
        let reached = pipe::OpenOptions::new()
            .read_write(true)
            .open_receiver(reached);
        let release = File::options().read(true).write(true).open(release);
        let held = Held {
            reached: reached.unwrap(),
            release: release.unwrap(),
        };
        (containerd, held)
    }

    /// VMMs that start from now on do this.
    pub fn set_scenario(&self, scenario: &str) {
        fs::write(self.directory.path().join("scenario"), scenario).unwrap();
    }

    /// Adds a line to the configuration.
    pub fn configure(&self, line: &str) {
        let path = self.directory.path().join("config.toml");
        let config = fs::read_to_string(&path).unwrap();
        fs::write(path, format!("{config}{line}\n")).unwrap();
    }

    pub fn bundle(&self, id: &str) -> PathBuf {
        self.directory.path().join("bundles").join(id)
    }

    /// Name of the cgroup of a container; unique on the machine.
    pub fn cgroup(&self, id: &str) -> PathBuf {
        let unique = self.directory.path().file_name().unwrap();
        Path::new("/sys/fs/cgroup/bulkhead-test")
            .join(unique)
            .join(id)
    }

    /// Writes a bundle whose container runs `args`.
    pub fn add_bundle(&self, id: &str, group: Option<&str>, args: &[&str]) {
        let bundle = self.bundle(id);
        fs::create_dir_all(&bundle).unwrap();
        let mut spec = json!({
            "ociVersion": "1.1.0",
            "root": {"path": "rootfs"},
            "process": {"args": args, "cwd": "/"},
            "linux": {
                "cgroupsPath": self.cgroup(id).strip_prefix("/sys/fs/cgroup").unwrap().join(""),
                "namespaces": [{"type": "network"}, {"type": "mount"}],
            },
            "mounts": [{
                "destination": "/extra", "type": "bind", "source": self.directory.path(),
                "options": ["rbind", "ro"],
            }],
        });
        if let Some(group) = group {
            spec["annotations"] = json!({"io.kubernetes.cri.sandbox-id": group});
        }
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let log = bundle.join("log");
        nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).unwrap();
    }

    /// Puts the container of a bundle into the network namespace at a path.
    pub fn set_network(&self, id: &str, path: &str) {
        self.edit_spec(id, |spec| {
            spec["linux"]["namespaces"][0]["path"] = path.into();
        });
    }

    /// Mounts a directory in the container of a bundle, read-only.
    pub fn add_mount(&self, id: &str, source: &Path) {
        self.edit_spec(id, |spec| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(json!({
                "destination": "/volume", "type": "bind", "source": source,
                "options": ["rbind", "ro"],
            }));
        });
    }

    fn edit_spec(&self, id: &str, edit: impl FnOnce(&mut serde_json::Value)) {
        let config = self.bundle(id).join("config.json");
        let spec = fs::read_to_string(&config).unwrap();
        let mut spec: serde_json::Value = serde_json::from_str(&spec).unwrap();
        edit(&mut spec);
        fs::write(config, spec.to_string()).unwrap();
    }

    /// Runs the shim's executable as containerd does.
    pub fn run_shim(&self, id: &str, action: &str, prepare: fn() -> std::io::Result<()>) -> Output {
        let mut command = Command::new(SHIM);
        command
            .args(["-namespace", "test", "-address"])
            // Of its own, so that a failed test's pods are in nobody's way.
            .arg(self.directory.path().join("containerd.sock"))
            .args(["-publish-binary", "/containerd", "-id", id])
            .args(["-bundle".as_ref(), self.bundle(id).as_os_str()])
            .arg(action)
            .current_dir(self.bundle(id))
            .env("TTRPC_ADDRESS", self.directory.path().join("events"))
            .env("BULKHEAD_CONFIG", self.directory.path().join("config.toml"))
            .env("BULKHEAD_TEST_HASTE", self.haste.to_string())
            .stdin(Stdio::null());
        // SAFETY: the tests' functions make system calls only.
        unsafe { command.pre_exec(prepare) };
        command.output().unwrap()
    }

    /// `start`: returns the client and the address.
    pub async fn start_shim(&self, id: &str) -> (TaskClient, String) {
        self.start_shim_with(id, || Ok(())).await
    }

    pub async fn start_shim_with(
        &self,
        id: &str,
        prepare: fn() -> std::io::Result<()>,
    ) -> (TaskClient, String) {
        let output = self.run_shim(id, "start", prepare);
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(answer["version"], 2);
        assert_eq!(answer["protocol"], "ttrpc");
        let address = answer["address"].as_str().unwrap().to_owned();
        let socket = fs::metadata(address.strip_prefix("unix://").unwrap()).unwrap();
        assert_eq!(socket.permissions().mode() & 0o777, 0o600);
        assert_eq!(
            fs::read_to_string(self.bundle(id).join("address")).unwrap(),
            address
        );
        let client = Client::connect(&address).await.unwrap();
        (TaskClient::new(client), address)
    }

    /// A request that mounts the image by a bind mount.
    pub fn create_request(&self, id: &str) -> CreateTaskRequest {
        CreateTaskRequest {
            id: id.into(),
            bundle: self.bundle(id).to_str().unwrap().into(),
            rootfs: vec![Mount {
                type_: "bind".into(),
                source: self.directory.path().join("image").to_str().unwrap().into(),
                options: vec!["rbind".into(), "rw".into()],
                ..Mount::default()
            }],
            ..CreateTaskRequest::default()
        }
    }

    /// Makes a FIFO and returns its path.
    pub fn fifo(&self, name: &str) -> String {
        let path = self.directory.path().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().into()
    }

    /// The topics of the events so far, with whose exit an exit is.
    pub fn topics(&self) -> Vec<String> {
        self.log
            .lock()
            .unwrap()
            .iter()
            .map(|(topic, value)| {
                if topic == "/tasks/exit" {
                    let exit = TaskExit::parse_from_bytes(value).unwrap();
                    format!("{topic} {} {}", exit.id, exit.exit_status)
                } else {
                    topic.clone()
                }
            })
            .collect()
    }

    /// Panics if anything of a pod is left on the machine.
    pub fn assert_nothing_left(&self, id: &str) {
        let path = self.directory.path();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let bundle = self.bundle(id);
        assert!(!mounts.contains(bundle.to_str().unwrap()), "{mounts}");
        assert!(!self.cgroup(id).exists(), "the cgroup is left");
        let state = path.join(format!("state/test:{id}"));
        assert!(!state.exists(), "the state is left");
        if let Ok(address) = fs::read_to_string(bundle.join("address")) {
            let socket = address.strip_prefix("unix://").unwrap();
            assert!(!Path::new(socket).exists(), "the socket is left");
        }
        for process in processes() {
            let command = process.command.replace('\0', " ");
            assert!(
                !command.contains(path.to_str().unwrap()) && !command.contains(&*self.mark(id)),
                "{command} is left"
            );
        }
    }

    fn mark(&self, id: &str) -> String {
        self.cgroup(id).to_str().unwrap().into()
    }

    /// The PIDs of the pod's VMM.
    pub fn vmm_pids(&self) -> Vec<i32> {
        let name = self.directory.path().join("bulkhead-vmm");
        processes()
            .filter(|process| process.command.starts_with(name.to_str().unwrap()))
            .map(|process| process.pid)
            .collect()
    }
}

struct Process {
    pid: i32,
    command: String,
}

fn processes() -> impl Iterator<Item = Process> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let entry = entry.ok()?;
        Some(Process {
            pid: entry.file_name().to_str()?.parse().ok()?,
            command: fs::read_to_string(entry.path().join("cmdline")).ok()?,
        })
    })
}

/// Waits until a process is gone, reaped or not.
pub fn wait_gone(pid: i32) {
    let Ok(fd) = rustix::process::pidfd_open(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::PidfdFlags::empty(),
    ) else {
        return;
    };
    let mut polled = [nix::poll::PollFd::new(
        std::os::fd::AsFd::as_fd(&fd),
        nix::poll::PollFlags::POLLIN,
    )];
    let ready = nix::poll::poll(&mut polled, 30_000u16).unwrap();
    assert_eq!(ready, 1, "process {pid} is still there");
}

pub fn start(id: &str, exec_id: &str) -> StartRequest {
    StartRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..StartRequest::default()
    }
}

pub fn wait(id: &str, exec_id: &str) -> WaitRequest {
    WaitRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..WaitRequest::default()
    }
}

pub fn delete(id: &str, exec_id: &str) -> DeleteRequest {
    DeleteRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        ..DeleteRequest::default()
    }
}

/// Says something to a FIFO as a client does.
pub fn write_fifo(path: &str, bytes: &[u8]) {
    let mut fifo = fs::OpenOptions::new().write(true).open(path).unwrap();
    fifo.write_all(bytes).unwrap();
}
