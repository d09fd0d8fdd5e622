//! The host's side of an agent that runs as a plain process: its connection, its streams, its
//! shares, and a root file system made of a static busybox.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio as CommandStdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_api::{
    AGENT_PORT, STREAM_PORT, TOKEN_LEN,
    messages::{
        ContainerRequest, CreateContainerRequest, ExecRequest, ProcessRequest, SignalRequest, Stdio,
    },
    service::AgentClient,
};
use protobuf::MessageField;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::oneshot,
    time::timeout,
};
use ttrpc::{Code, r#async::Client, r#async::transport::Socket, context};

/// For anything that must happen at all; far above what it takes.
pub const DEADLINE: Duration = Duration::from_secs(60);

const APPLETS: [&str; 28] = [
    "sh", "cat", "echo", "id", "ls", "true", "false", "sleep", "env", "mount", "hostname", "grep",
    "pwd", "stat", "touch", "kill", "wc", "head", "tr", "ip", "readlink", "dd", "mkdir", "tty",
    "stty", "umask", "printf", "nc",
];

type Waiting = Arc<Mutex<HashMap<Vec<u8>, oneshot::Sender<UnixStream>>>>;

/// A running agent and its host.
pub struct Host {
    pub client: AgentClient,
    pub dir: tempfile::TempDir,
    agent: Child,
    waiting: Waiting,
    tokens: AtomicU64,
}

/// The host's ends of a process's streams.
pub struct Ends {
    pub stdin: Option<UnixStream>,
    pub stdout: UnixStream,
    pub stderr: Option<UnixStream>,
}

impl Host {
    /// Starts an agent with a root file system in the share `root`.
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("shared/root");
        make_rootfs(&root);
        symlink(cgroup_root(), dir.path().join("cgroup")).unwrap();
        let bind = |port: u32| UnixListener::bind(dir.path().join(port.to_string())).unwrap();
        let (control, streams) = (bind(AGENT_PORT), bind(STREAM_PORT));
        let agent = Command::new(env!("CARGO_BIN_EXE_bulkhead-agent"))
            .arg("serve")
            .arg(dir.path())
            .stdin(CommandStdio::null())
            .spawn()
            .unwrap();
        let (connection, _) = timeout(DEADLINE, control.accept()).await.unwrap().unwrap();
        let waiting = Waiting::default();
        tokio::spawn(accept_streams(streams, Arc::clone(&waiting)));
        Self {
            client: AgentClient::new(Client::new(Socket::new(connection))),
            dir,
            agent,
            waiting,
            tokens: AtomicU64::new(1),
        }
    }

    /// A path below the container's root file system, as the host sees it.
    pub fn root(&self, path: &str) -> PathBuf {
        self.dir.path().join("shared/root").join(path)
    }

    /// A token, and the stream that will come with it.
    pub fn token(&self) -> (Vec<u8>, oneshot::Receiver<UnixStream>) {
        let number = self.tokens.fetch_add(1, Ordering::Relaxed);
        let mut token = vec![0; TOKEN_LEN];
        token[..8].copy_from_slice(&number.to_le_bytes());
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().unwrap().insert(token.clone(), sender);
        (token, receiver)
    }

    /// Creates a container with streams, and returns their ends.
    pub async fn create(&self, id: &str, spec: &Value) -> ttrpc::Result<Ends> {
        self.create_with(id, spec, CreateContainerRequest::default())
            .await
    }

    /// Creates a container with what else is in `request`.
    pub async fn create_with(
        &self,
        id: &str,
        spec: &Value,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<Ends> {
        let (stdio, ends) = self.streams(spec["process"]["terminal"] == json!(true));
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            spec: spec.to_string().into_bytes(),
            rootfs_share: "root".to_owned(),
            stdio: MessageField::some(stdio),
            ..request
        };
        self.client.create_container(deadline(), &request).await?;
        Ok(ends.connected().await)
    }

    pub async fn exec(&self, id: &str, exec: &str, process: &Value) -> ttrpc::Result<Ends> {
        let (stdio, ends) = self.streams(process["terminal"] == json!(true));
        let request = ExecRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            process: process.to_string().into_bytes(),
            stdio: MessageField::some(stdio),
            ..ExecRequest::default()
        };
        self.client.exec(deadline(), &request).await?;
        Ok(ends.connected().await)
    }

    fn streams(&self, terminal: bool) -> (Stdio, Pending) {
        let (stdin, stdin_end) = self.token();
        let (stdout, stdout_end) = self.token();
        let stderr = (!terminal).then(|| self.token());
        let (stderr, stderr_end) = stderr.map_or((vec![], None), |(t, end)| (t, Some(end)));
        let stdio = Stdio {
            terminal,
            width: 91,
            height: 33,
            stdin,
            stdout,
            stderr,
            ..Stdio::default()
        };
        (stdio, Pending(stdin_end, stdout_end, stderr_end))
    }

    pub async fn start_container(&self, id: &str) -> ttrpc::Result<()> {
        let request = ContainerRequest {
            container_id: id.to_owned(),
            ..ContainerRequest::default()
        };
        self.client
            .start_container(deadline(), &request)
            .await
            .map(drop)
    }

    pub async fn wait(&self, id: &str, exec: &str) -> u32 {
        self.client
            .wait(deadline(), &process(id, exec))
            .await
            .unwrap()
            .status
    }

    pub async fn delete(&self, id: &str) {
        self.client
            .delete(deadline(), &process(id, ""))
            .await
            .unwrap();
        let left = self.dir.path().join(format!("cgroup/container-{id}"));
        assert!(!left.exists(), "cgroup left behind");
    }

    /// Kills a container and deletes it.
    pub async fn end(&self, id: &str) {
        let request = SignalRequest {
            container_id: id.to_owned(),
            signal: 9,
            ..SignalRequest::default()
        };
        self.client.signal(deadline(), &request).await.unwrap();
        assert_eq!(self.wait(id, "").await, 137);
        self.delete(id).await;
    }

    /// Runs a container to its end: status, stdout and stderr.
    pub async fn run(&self, id: &str, spec: &Value) -> (u32, String, String) {
        self.run_with(id, spec, CreateContainerRequest::default())
            .await
    }

    /// The same with what else is in `request`.
    pub async fn run_with(
        &self,
        id: &str,
        spec: &Value,
        request: CreateContainerRequest,
    ) -> (u32, String, String) {
        let ends = self.create_with(id, spec, request).await.unwrap();
        self.start_container(id).await.unwrap();
        let (stdout, stderr) = ends.output().await;
        let status = self.wait(id, "").await;
        self.delete(id).await;
        (status, stdout, stderr)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        // What a failed test left running.
        let root = self.dir.path().join("cgroup");
        for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
            let _ = fs::write(entry.path().join("cgroup.kill"), "1");
        }
        if let Ok(own) = fs::read_link(&root) {
            let _ = fs::remove_dir(own);
        }
    }
}

struct Pending(
    oneshot::Receiver<UnixStream>,
    oneshot::Receiver<UnixStream>,
    Option<oneshot::Receiver<UnixStream>>,
);

impl Pending {
    async fn connected(self) -> Ends {
        let get = async |end: oneshot::Receiver<UnixStream>| {
            timeout(DEADLINE, end).await.unwrap().unwrap()
        };
        Ends {
            stdin: Some(get(self.0).await),
            stdout: get(self.1).await,
            stderr: match self.2 {
                Some(end) => Some(get(end).await),
                None => None,
            },
        }
    }
}

impl Ends {
    /// Ends stdin and reads the others to their ends.
    pub async fn output(mut self) -> (String, String) {
        drop(self.stdin.take());
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let read = async {
            self.stdout.read_to_end(&mut stdout).await.unwrap();
            if let Some(mut stream) = self.stderr {
                stream.read_to_end(&mut stderr).await.unwrap();
            }
        };
        timeout(DEADLINE, read).await.expect("streams without end");
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (text(stdout), text(stderr))
    }

    /// Reads stdout until it holds `text`.
    pub async fn expect(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        let read = async {
            while !String::from_utf8_lossy(&seen).contains(text) {
                let byte = self.stdout.read_u8().await;
                seen.push(byte.unwrap_or_else(|_| {
                    panic!("no {text:?} in {:?}", String::from_utf8_lossy(&seen))
                }));
            }
        };
        let done = timeout(DEADLINE, read).await;
        let seen = String::from_utf8_lossy(&seen).into_owned();
        done.unwrap_or_else(|_| panic!("no {text:?} in {seen:?}"));
        seen
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(bytes).await.unwrap();
    }
}

async fn accept_streams(listener: UnixListener, waiting: Waiting) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut token = vec![0; TOKEN_LEN];
        if stream.read_exact(&mut token).await.is_ok()
            && let Some(sender) = waiting.lock().unwrap().remove(&token)
        {
            let _ = sender.send(stream);
        }
    }
}

pub fn deadline() -> context::Context {
    context::with_duration(DEADLINE)
}

pub fn process(id: &str, exec: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.to_owned(),
        exec_id: exec.to_owned(),
        ..ProcessRequest::default()
    }
}

/// The gRPC code and message of a failed call.
pub fn status<T>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Ok(_) => panic!("the call succeeded"),
        Err(ttrpc::Error::RpcStatus(status)) => (status.code.enum_value().unwrap(), status.message),
        Err(error) => panic!("{error}"),
    }
}

fn make_rootfs(root: &Path) {
    for dir in ["bin", "dev", "etc", "proc", "sys", "tmp", "root"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))
        .expect("tests need /bin/busybox, static, from the package busybox-static");
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
    fs::write(root.join("etc/passwd"), passwd).unwrap();
}

/// A new directory in the machine's cgroup v2 hierarchy, with or without controllers.
fn cgroup_root() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let cgroup2 = mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields[2] == "cgroup2").then(|| fields[1].to_owned())
    });
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("bulkhead-test-{}-{number}", std::process::id());
    let root = Path::new(&cgroup2.expect("tests need cgroup v2")).join(name);
    fs::create_dir(&root).expect("tests need root");
    root
}

/// A spec as containerd makes it by default, for a shell command.
pub fn spec(script: &str) -> Value {
    let caps = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["ro", "nosuid", "noexec", "nodev"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "cgroupsPath": "/default/c1",
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"}, {"type": "cgroup"}
            ],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list",
                "/sys/firmware", "/proc/scsi", "/no/such/path"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys",
                "/proc/sysrq-trigger"]
        }
    })
}
