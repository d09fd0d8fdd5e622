//! A VMM without a VM: it speaks the control protocol, and has an agent without a guest.
//!
//! What it does at boot is told by the file `scenario` beside it. `hold` and a step's name, which is that
//! of a request or of a call of the agent, let it answer there when the test says so.

use std::{
    collections::HashMap,
    fs,
    io::{Read, Write},
    os::{
        fd::{AsFd, FromRawFd, OwnedFd},
        unix::net,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use bulkhead_agent_api::{AGENT_PORT, service::create_agent};
use bulkhead_vmm_control::{
    CONTROL_FD, Channel, Counters, Event, FromVmm, Packet, Reply, Request, StopReason,
};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    net::{UnixStream, unix::pipe},
    task::JoinHandle,
};
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::fake_agent::FakeAgent;

/// What the VMM was handed, by the names that the guest knows it by.
pub type Shares = Arc<Mutex<HashMap<String, OwnedFd>>>;

/// FIFO that says to the test that the step is reached.
pub const REACHED: &str = "reached";

/// FIFO from which each answer to the step takes a byte first.
pub const RELEASE: &str = "release";

/// EtherType of frames that the guest sends back: one for experiments.
pub const ECHO: [u8; 2] = [0x88, 0xb5];

/// Bytes before each frame of a tap.
const HEADER: usize = 12;

/// The step at which the fake waits for the test, if there is one.
pub struct Steps {
    held: Option<String>,
    /// Where the FIFOs are that the test makes.
    pub directory: PathBuf,
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

    /// Waits there, without holding others up.
    pub async fn pass_async(&self, step: &str) {
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

/// Dials a port of the host, as the guest does.
pub fn connect(channel: &Channel, port: u32) -> UnixStream {
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
        let agent = FakeAgent::new(channel.clone(), shares.clone(), steps.clone());
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
