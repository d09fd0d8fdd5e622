//! A VMM without a VM: it speaks the control protocol and serves the agent's API itself.
//!
//! What it does at boot is told by the file `scenario` beside it, and what its containers do by
//! the arguments of their processes. `hold` and a step's name, which is that of a request or of a call of
//! the agent, let it answer there when the test says so.

use std::{
    collections::HashMap,
    fs,
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::net,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use bulkhead_agent_api::{
    AGENT_PORT, STREAM_PORT,
    messages::{
        ConnectRequest, ContainerRequest, CreateContainerRequest, Empty, ExecRequest, InfoRequest,
        InfoResponse, NetworkRequest, OomRequest, OomResponse, ProcessRequest, ReleaseRequest,
        ResizePtyRequest, ShareRequest, SignalRequest, StatsResponse, Stdio, UpdateRequest,
        WaitResponse,
    },
    service::{Agent, create_agent},
};
use bulkhead_vmm_control::{
    CONTROL_FD, Channel, Counters, Event, FromVmm, Packet, Reply, Request, StopReason,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, unix::AsyncFd},
    net::{UnixStream, unix::pipe},
    sync::watch,
    task::JoinHandle,
};
use ttrpc::{
    Code,
    asynchronous::{Server, TtrpcContext, transport::Listener},
    error::get_rpc_status,
};

type Shares = Arc<Mutex<HashMap<String, OwnedFd>>>;

/// FIFO that says to the test that the step is reached.
pub const REACHED: &str = "reached";

/// FIFO from which each answer to the step takes a byte first.
pub const RELEASE: &str = "release";

/// FIFO to which a line of JSON goes for all that the agent is told of the network.
pub const NETWORK: &str = "network";

/// EtherType of frames that the guest sends back: one for experiments.
pub const ECHO: [u8; 2] = [0x88, 0xb5];

/// Bytes before each frame of a tap.
const HEADER: usize = 12;

/// The port of a container's loopback interface at which somebody listens, and echoes.
pub const OPEN_PORT: u32 = 7;

/// What the guest asks the name server, by UDP and by TCP.
pub const QUESTIONS: [&[u8]; 2] = [b"by UDP", b"by TCP"];

/// The step at which the fake waits for the test, if there is one.
struct Steps {
    held: Option<String>,
    directory: PathBuf,
}

impl Steps {
    /// Whether this step is the one; if so, the test is told.
    fn is_held(&self, step: &str) -> bool {
        let held = self.held.as_deref() == Some(step);
        if held {
            let reached = self.directory.join(REACHED);
            let fifo = fs::File::options().write(true).open(reached);
            fifo.unwrap().write_all(b"x").unwrap();
        }
        held
    }

    fn pass(&self, step: &str) {
        if self.is_held(step) {
            let mut release = fs::File::open(self.directory.join(RELEASE)).unwrap();
            release.read_exact(&mut [0]).unwrap();
        }
    }

    async fn pass_async(&self, step: &str) {
        if self.is_held(step) {
            let release = self.directory.join(RELEASE);
            let mut release = pipe::OpenOptions::new().open_receiver(release).unwrap();
            release.read_exact(&mut [0]).await.unwrap();
        }
    }
}

/// Runs the fake until the shim hangs up.
pub fn main(executable: &str) {
    let scenario = fs::read_to_string(Path::new(executable).with_file_name("scenario")).unwrap();
    // SAFETY: this is how a VMM gets its control socket.
    let channel = Arc::new(Channel::from(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) }));
    let open: Vec<String> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    // The sixth is the directory that is being read.
    assert_eq!(open.len(), 6, "inherited descriptors: {open:?}");
    let Some(Packet { message, fds }) = channel.receive::<Request>().unwrap() else {
        return;
    };
    assert!(matches!(message, Request::Boot(_)));
    assert_eq!(fds.len(), 3);
    let steps = Arc::new(Steps {
        held: scenario.strip_prefix("hold ").map(str::to_owned),
        directory: Path::new(executable).parent().unwrap().to_owned(),
    });
    steps.pass("Boot");
    match scenario.trim() {
        "refuse" => {
            let reason = "Cannot allocate 512 MiB of guest memory: Cannot allocate memory";
            reply(&channel, Reply::Failed(reason.into()));
            let _ = channel.receive::<Request>();
        }
        "die" => {
            eprintln!("fake VMM: no luck today");
            std::process::exit(7);
        }
        "panic" => {
            reply(&channel, Reply::Done);
            let console = "[ 0.1] VFS: Cannot open root device\n\
                           [ 0.2] Kernel panic - not syncing: VFS: Unable to mount root fs\n\
                           [ 0.3] CPU: 0\n";
            send(
                &channel,
                Event::Stopped {
                    reason: StopReason::Reset,
                    console: console.into(),
                },
            );
        }
        "silent" => {
            reply(&channel, Reply::Done);
            fs::write(Path::new(executable).with_file_name("up"), "up").unwrap();
            let _ = channel.receive::<Request>();
        }
        "slow" => {
            // Opens when the test opens the other end.
            fs::File::open(Path::new(executable).with_file_name("go")).unwrap();
            serve(channel, &steps);
        }
        _ => serve(channel, &steps),
    }
}

fn reply(channel: &Channel, reply: Reply) {
    channel.send(&FromVmm::Reply(reply), &[]).unwrap();
}

fn send(channel: &Channel, event: Event) {
    channel.send(&FromVmm::Event(event), &[]).unwrap();
}

fn connect(channel: &Channel, port: u32) -> UnixStream {
    let (ours, theirs) = net::UnixStream::pair().unwrap();
    channel
        .send(
            &FromVmm::Event(Event::Connection { port }),
            &[theirs.as_fd()],
        )
        .unwrap();
    ours.set_nonblocking(true).unwrap();
    UnixStream::from_std(ours).unwrap()
}

fn serve(channel: Arc<Channel>, steps: &Arc<Steps>) {
    let shares = Shares::default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    reply(&channel, Reply::Done);
    steps.pass("Connection");
    let _server = runtime.block_on(async {
        let stream = connect(&channel, AGENT_PORT);
        // Not a second one, and on no other port.
        connect(&channel, AGENT_PORT);
        connect(&channel, 99);
        let agent = FakeAgent {
            channel: channel.clone(),
            shares: shares.clone(),
            steps: steps.clone(),
            processes: Mutex::default(),
            resolver: Mutex::default(),
        };
        let connections = futures::StreamExt::chain(
            futures::stream::iter([Ok(stream)]),
            futures::stream::pending::<std::io::Result<UnixStream>>(),
        );
        let mut server = Server::new()
            .add_listener(Listener::new(connections))
            .register_service(create_agent(Arc::new(agent)));
        server.start().await.unwrap();
        server
    });
    let refuses_nics = channel_refuses(steps);
    let mut nics: HashMap<u8, Vec<JoinHandle<()>>> = HashMap::new();
    while let Ok(Some(Packet { message, mut fds })) = channel.receive::<Request>() {
        steps.pass(message.name());
        match message {
            Request::Share { name, .. } => {
                shares.lock().unwrap().insert(name, fds.pop().unwrap());
                reply(&channel, Reply::Done);
            }
            Request::Unshare { name } => {
                let known = shares.lock().unwrap().remove(&name).is_some();
                assert!(known, "{name} is no share");
                reply(&channel, Reply::Done);
            }
            Request::AttachNic { .. } if refuses_nics => {
                reply(&channel, Reply::Failed("no device for it".into()));
            }
            Request::AttachNic { slot, .. } => {
                assert!(!fds.is_empty());
                let queues = fds.drain(..).map(|queue| runtime.spawn(echo(queue)));
                let attached = nics.insert(slot, queues.collect());
                assert!(attached.is_none(), "{slot} is taken");
                reply(&channel, Reply::Done);
            }
            Request::DetachNic { slot } => {
                for queue in nics.remove(&slot).unwrap() {
                    queue.abort();
                    let _ = runtime.block_on(queue);
                }
                reply(&channel, Reply::Done);
            }
            Request::Counters => reply(&channel, Reply::Counters(Counters::default())),
            Request::Boot(_) => panic!("booted twice"),
        }
    }
}

fn channel_refuses(steps: &Steps) -> bool {
    fs::read_to_string(steps.directory.join("scenario")).unwrap() == "no nics"
}

/// Sends frames of [`ECHO`] back to whom they came from.
async fn echo(queue: OwnedFd) {
    let queue = fs::File::from(queue);
    // SAFETY: a file keeps its one descriptor open as long as it lives.
    let queue = unsafe { AsyncFd::register(queue) }.unwrap();
    let mut frame = [0; 4096];
    loop {
        let mut ready = queue.readable().await.unwrap();
        let Ok(read) = ready.try_io(|queue| queue.get_ref().read(&mut frame)) else {
            continue;
        };
        let length = read.unwrap();
        if frame[HEADER + 12..][..2] == ECHO {
            let (to, from) = frame[HEADER..][..12].split_at_mut(6);
            to.swap_with_slice(from);
            queue.get_ref().write_all(&frame[..length]).unwrap();
        }
    }
}

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

struct FakeAgent {
    channel: Arc<Channel>,
    shares: Shares,
    steps: Arc<Steps>,
    processes: Mutex<HashMap<(String, String), Process>>,
    resolver: Mutex<Option<JoinHandle<()>>>,
}

impl FakeAgent {
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
