//! An agent without a guest. What its containers do is told by the arguments of their processes.

use std::{
    collections::HashMap,
    fs,
    io::Write,
    os::fd::AsRawFd,
    path::Path,
    sync::{Arc, Mutex},
    time::{SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use bulkhead_agent_api::{
    STREAM_PORT,
    messages::{
        ConnectRequest, ContainerRequest, CreateContainerRequest, Empty, ExecRequest, InfoRequest,
        InfoResponse, NetworkRequest, OomRequest, OomResponse, ProcessRequest, ReleaseRequest,
        ResizePtyRequest, ShareRequest, SignalRequest, StatsResponse, Stdio, UpdateRequest,
        WaitResponse,
    },
    service::Agent,
};
use bulkhead_vmm_control::Channel;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::watch,
    task::JoinHandle,
};
use ttrpc::{Code, asynchronous::TtrpcContext, error::get_rpc_status};

use crate::fake_vmm::{Shares, Steps, connect};

/// FIFO to which a line of JSON goes for all that the agent is told of the network.
pub const NETWORK: &str = "network";

/// The port of a container's loopback interface at which somebody listens, and echoes.
pub const OPEN_PORT: u32 = 7;

/// What the guest asks the name server, by UDP and by TCP.
pub const QUESTIONS: [&[u8]; 2] = [b"by UDP", b"by TCP"];

/// A process that exists only here.
#[derive(Clone)]
struct Process {
    arguments: Vec<String>,
    /// The token and the connection of each stream, in the order of their numbers.
    streams: [Option<Arc<Mutex<Option<UnixStream>>>>; 3],
    exit: Arc<watch::Sender<Option<u32>>>,
    root: String,
    /// What its container was made from.
    described: serde_json::Value,
}

/// The agent of the guest that there is not.
pub struct FakeAgent {
    channel: Arc<Channel>,
    shares: Shares,
    steps: Arc<Steps>,
    processes: Mutex<HashMap<(String, String), Process>>,
    resolver: Mutex<Option<JoinHandle<()>>>,
}

impl FakeAgent {
    pub fn new(channel: Arc<Channel>, shares: Shares, steps: Arc<Steps>) -> Self {
        Self {
            channel,
            shares,
            steps,
            processes: Mutex::default(),
            resolver: Mutex::default(),
        }
    }

    async fn stream(&self, token: &[u8]) -> Option<Arc<Mutex<Option<UnixStream>>>> {
        if token.is_empty() {
            return None;
        }
        let mut stream = connect(&self.channel, STREAM_PORT);
        stream.write_all(token).await.unwrap();
        Some(Arc::new(Mutex::new(Some(stream))))
    }

    async fn add(
        &self,
        (id, exec): (&str, &str),
        process: &serde_json::Value,
        stdio: &Stdio,
        root: String,
        described: serde_json::Value,
    ) -> Process {
        let mut arguments: Vec<String> = process["args"]
            .as_array()
            .unwrap()
            .iter()
            .map(|argument| argument.as_str().unwrap().to_owned())
            .collect();
        if arguments == ["size"] {
            let size = format!("{}x{}", stdio.width, stdio.height);
            arguments = vec!["say".into(), size, "0".into()];
        }
        let process = Process {
            arguments,
            streams: [
                self.stream(&stdio.stdin).await,
                self.stream(&stdio.stdout).await,
                self.stream(&stdio.stderr).await,
            ],
            exit: Arc::new(watch::Sender::new(None)),
            root,
            described,
        };
        let key = (id.to_owned(), exec.to_owned());
        self.processes.lock().unwrap().insert(key, process.clone());
        process
    }

    /// Asks the host's name server, and tells the test of the answers.
    async fn ask(&self, token: &[u8]) {
        let mut stream = connect(&self.channel, STREAM_PORT);
        stream.write_all(token).await.unwrap();
        for (kind, question) in (0..).zip(QUESTIONS) {
            let mut frame = vec![kind, 0, kind, 0, u8::try_from(question.len()).unwrap()];
            frame.extend(question);
            stream.write_all(&frame).await.unwrap();
        }
        let network = self.steps.directory.join(NETWORK);
        let answers = tokio::spawn(async move {
            let mut header = [0; 5];
            while stream.read_exact(&mut header).await.is_ok() {
                let mut answer = vec![0; usize::from(header[4])];
                stream.read_exact(&mut answer).await.unwrap();
                tell(
                    &network,
                    &serde_json::json!({
                        "tcp": header[0] == 1,
                        "number": header[2],
                        "answer": String::from_utf8(answer).unwrap(),
                    }),
                );
            }
        });
        *self.resolver.lock().unwrap() = Some(answers);
    }

    fn find(&self, id: &str, exec: &str) -> ttrpc::Result<Process> {
        self.processes
            .lock()
            .unwrap()
            .get(&(id.to_owned(), exec.to_owned()))
            .cloned()
            .ok_or_else(|| get_rpc_status(Code::NOT_FOUND, "no such process"))
    }

    fn run(&self, process: Process) {
        let listing = self
            .shares
            .lock()
            .unwrap()
            .get(&process.root)
            .map(|root| listing(root.as_raw_fd()));
        tokio::spawn(async move {
            let [stdin, stdout, stderr] = process.streams.each_ref().map(|stream| {
                stream
                    .as_ref()
                    .and_then(|stream| stream.lock().unwrap().take())
            });
            let arguments: Vec<&str> = process.arguments.iter().map(String::as_str).collect();
            let code = match arguments[..] {
                ["say", text, code] => {
                    if let Some(mut stdout) = stdout {
                        stdout.write_all(text.as_bytes()).await.unwrap();
                    }
                    if let Some(mut stderr) = stderr {
                        stderr.write_all(b"to stderr").await.unwrap();
                    }
                    code.parse().unwrap()
                }
                ["cat"] => {
                    let (mut stdin, mut stdout) = (stdin.unwrap(), stdout.unwrap());
                    tokio::io::copy(&mut stdin, &mut stdout).await.unwrap();
                    0
                }
                ["ls"] => {
                    let mut stdout = stdout.unwrap();
                    stdout.write_all(listing.unwrap().as_bytes()).await.unwrap();
                    0
                }
                ["describe"] => {
                    let mut stdout = stdout.unwrap();
                    let text = process.described.to_string();
                    stdout.write_all(text.as_bytes()).await.unwrap();
                    0
                }
                // Until a signal comes; an end of the input does nothing.
                ["sleep" | "pause", ..] => {
                    if let Some(mut stdin) = stdin {
                        let _ = stdin.read(&mut [0]).await;
                    }
                    return;
                }
                // More than any status can be.
                ["lie"] => 1000,
                _ => 127,
            };
            process.exit.send_if_modified(|exit| {
                let first = exit.is_none();
                *exit = exit.or(Some(code));
                first
            });
        });
    }
}

fn tell(fifo: &Path, what: &serde_json::Value) {
    if fifo.exists() {
        let fifo = fs::File::options().write(true).open(fifo);
        writeln!(fifo.unwrap(), "{what}").unwrap();
    }
}

/// What a container was made from beside its process.
fn describe(spec: &serde_json::Value, request: &CreateContainerRequest) -> serde_json::Value {
    let joined = request.joined_namespaces.iter();
    let joined = joined.map(|one| (one.type_.clone(), one.container_id.clone().into()));
    let joined: serde_json::Map<_, _> = joined.collect();
    let at = |index: u32| spec["mounts"][index as usize]["destination"].clone();
    let memory = request.memory_mounts.first().map(|memory| {
        serde_json::json!({ "name": memory.name, "size": memory.size, "at": at(memory.index) })
    });
    let shared = request.shared_mounts.iter().map(|mount| at(mount.index));
    serde_json::json!({
        "root": !request.rootfs_share.is_empty(),
        "joined": joined,
        "memory": memory,
        "shared": shared.collect::<Vec<_>>(),
        "ipc": spec["linux"]["namespaces"][1]["path"],
    })
}

fn listing(root: i32) -> String {
    let mut names: Vec<String> = fs::read_dir(format!("/proc/self/fd/{root}"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names.join("\n")
}

#[async_trait]
impl Agent for FakeAgent {
    async fn info(&self, _: &TtrpcContext, _: InfoRequest) -> ttrpc::Result<InfoResponse> {
        self.steps.pass_async("Info").await;
        Ok(InfoResponse {
            version: "fake".into(),
            // More than a line, as only a hostile guest says.
            kernel_release: "6.12-fake\nok".into(),
            ..InfoResponse::default()
        })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.steps.pass_async("CreateContainer").await;
        let spec: serde_json::Value = serde_json::from_slice(&request.spec).unwrap();
        if spec["process"]["args"][0] == "unknown" {
            let message = "exec: \"unknown\": executable file not found in $PATH";
            return Err(get_rpc_status(Code::INVALID_ARGUMENT, message));
        }
        let key = (request.container_id.as_str(), "");
        let described = describe(&spec, &request);
        let root = request.rootfs_share.clone();
        self.add(key, &spec["process"], &request.stdio, root, described)
            .await;
        Ok(Empty::new())
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.steps.pass_async("StartContainer").await;
        self.run(self.find(&request.container_id, "")?);
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<Empty> {
        self.steps.pass_async("Exec").await;
        let init = self.find(&request.container_id, "")?;
        let process: serde_json::Value = serde_json::from_slice(&request.process).unwrap();
        if process["args"][0] == "unknown" {
            return Err(get_rpc_status(Code::INVALID_ARGUMENT, "no such command"));
        }
        let key = (request.container_id.as_str(), request.exec_id.as_str());
        let (root, described) = (init.root, init.described);
        let process = self.add(key, &process, &request.stdio, root, described);
        let process = process.await;
        self.run(process);
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        self.steps.pass_async("Wait").await;
        let process = self.find(&request.container_id, &request.exec_id)?;
        if process.arguments == ["sleep", "lost"] {
            // Its end is never told.
            std::future::pending::<()>().await;
        }
        let mut exit = process.exit.subscribe();
        let status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        if request.exec_id.is_empty() {
            // The end of a container's own process ends all others.
            for ((id, _), other) in &*self.processes.lock().unwrap() {
                if *id == request.container_id {
                    other.exit.send_if_modified(|exit| {
                        let first = exit.is_none();
                        *exit = exit.or(Some(137));
                        first
                    });
                }
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        Ok(WaitResponse {
            status,
            exited_at_ns: u64::try_from(now.as_nanos()).unwrap(),
            // The kernel's doing.
            oom_kills: u64::from(process.arguments == ["sleep", "hungry"]),
            ..WaitResponse::default()
        })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        self.steps.pass_async("Signal").await;
        let process = self.find(&request.container_id, &request.exec_id)?;
        if process.arguments == ["sleep", "deaf"] {
            // A guest that is stuck: no answer ever.
            std::future::pending::<()>().await;
        }
        if process.arguments == ["sleep", "undead"] {
            return Ok(Empty::new());
        }
        process.exit.send_replace(Some(128 + request.signal));
        for stream in process.streams.iter().flatten() {
            stream.lock().unwrap().take();
        }
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, _: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.steps.pass_async("ResizePty").await;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        self.steps.pass_async("Delete").await;
        self.processes
            .lock()
            .unwrap()
            .remove(&(request.container_id, request.exec_id));
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, _: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        self.steps.pass_async("Stats").await;
        let mut stats = StatsResponse::default();
        stats.cpu.mut_or_insert_default().usage_usec = 42;
        Ok(stats)
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.steps.pass_async("Pause").await;
        self.find(&request.container_id, "")?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.steps.pass_async("Resume").await;
        self.find(&request.container_id, "")?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        self.steps.pass_async("Update").await;
        self.find(&request.container_id, "")?;
        let resources: serde_json::Value = serde_json::from_slice(&request.resources).unwrap();
        if resources["pids"]["limit"] == 13 {
            return Err(get_rpc_status(Code::INVALID_ARGUMENT, "not this one"));
        }
        Ok(Empty::new())
    }

    async fn set_network(&self, _: &TtrpcContext, request: NetworkRequest) -> ttrpc::Result<Empty> {
        self.steps.pass_async("SetNetwork").await;
        self.find(&request.container_id, "")?;
        // As the real one has it: nothing belongs to an interface that is not there.
        for address in &request.addresses {
            let index = u32::from_ne_bytes(address[4..8].try_into().unwrap());
            let mut indices = request.interfaces.iter().map(|interface| interface.index);
            if !indices.any(|known| known == index) {
                let message = format!("there is no interface {index}");
                return Err(get_rpc_status(Code::INVALID_ARGUMENT, message));
            }
        }
        let interfaces = request.interfaces.iter().map(|interface| {
            serde_json::json!({
                "index": interface.index, "name": interface.name, "device": interface.device,
                "mtu": interface.mtu, "up": interface.up,
            })
        });
        let told = serde_json::json!({
            "container": request.container_id,
            "interfaces": interfaces.collect::<Vec<_>>(),
            "addresses": request.addresses,
            "routes": request.routes,
            "rules": request.rules,
            "neighbours": request.neighbours,
            "resolver": !request.resolver.is_empty(),
        });
        tell(&self.steps.directory.join(NETWORK), &told);
        if !request.resolver.is_empty() {
            self.ask(&request.resolver).await;
        }
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<Empty> {
        self.steps.pass_async("Connect").await;
        self.find(&request.container_id, "")?;
        if request.port != OPEN_PORT || request.ipv6 {
            return Err(get_rpc_status(Code::UNAVAILABLE, "nobody listens"));
        }
        let mut stream = connect(&self.channel, STREAM_PORT);
        stream.write_all(&request.token).await.unwrap();
        tokio::spawn(async move {
            // Answers when all has been said.
            let mut said = Vec::new();
            stream.read_to_end(&mut said).await.unwrap();
            stream.write_all(&said).await.unwrap();
        });
        Ok(Empty::new())
    }

    async fn refresh_mirror(&self, _: &TtrpcContext, _: ShareRequest) -> ttrpc::Result<Empty> {
        self.steps.pass_async("RefreshMirror").await;
        Ok(Empty::new())
    }

    async fn release_shares(
        &self,
        _: &TtrpcContext,
        request: ReleaseRequest,
    ) -> ttrpc::Result<Empty> {
        self.steps.pass_async("ReleaseShares").await;
        for name in &request.shares {
            let known = self.shares.lock().unwrap().contains_key(name);
            assert!(known, "{name} is no share");
        }
        Ok(Empty::new())
    }

    async fn wait_for_oom(
        &self,
        _: &TtrpcContext,
        request: OomRequest,
    ) -> ttrpc::Result<OomResponse> {
        self.steps.pass_async("WaitForOom").await;
        let process = self.find(&request.container_id, "")?;
        let mut exit = process.exit.subscribe();
        exit.wait_for(Option::is_some).await.unwrap();
        Ok(OomResponse {
            kills: request.known_kills,
            ..OomResponse::default()
        })
    }
}
