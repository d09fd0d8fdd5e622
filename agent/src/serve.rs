//! The service on the one connection to the host.

use std::{
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    pin::Pin,
    process::ExitCode,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bulkhead_agent_api::{AGENT_PORT, service::create_agent};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
    time::timeout,
};
use ttrpc::r#async::{Server, transport::Listener};

use crate::{
    apparmor::Profiles,
    cgroup::{self, CgroupError},
    log,
    memory::SharedMemory,
    mirrors::Mirrors,
    network::PlatformDevices,
    reaper::Reaper,
    service::Service,
    transport::{Stream, Transport, connected},
};

/// For the host to accept the agent's connection.
const DIAL_DEADLINE: Duration = Duration::from_secs(30);

/// What the service needs to know of the guest.
#[derive(Debug)]
pub struct Guest {
    /// The way to the host.
    pub transport: Transport,
    /// Where shares appear.
    pub shared_dir: PathBuf,
    /// Where the containers' cgroups are made.
    pub cgroup_root: PathBuf,
    /// Memory that containers share.
    pub memory: SharedMemory,
    /// Copies of shares.
    pub mirrors: Mirrors,
    /// AppArmor profiles that the kernel has been given.
    pub profiles: Profiles,
    /// What becomes network interfaces.
    pub devices: Arc<PlatformDevices>,
    /// CLOCK_BOOTTIME in nanoseconds when `main` began.
    pub started_ns: u64,
    /// The same just before the host was dialled.
    pub ready_ns: u64,
}

/// Why there is no service.
#[derive(Debug, Error)]
pub enum ServeError {
    /// A system call.
    #[error("failed to {what}")]
    System {
        /// What was tried on what.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The cgroup that containers' cgroups are made in.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The ttrpc server.
    #[error("failed to start the ttrpc server")]
    Server(#[source] ttrpc::Error),
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> ServeError {
    move |source| ServeError::System {
        what,
        source: source.into(),
    }
}

/// CLOCK_BOOTTIME in nanoseconds.
pub fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanoseconds) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1_000_000_000 + nanoseconds
}

/// Serves until the host closes its end.
pub fn run(guest: Guest, host: OwnedFd) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed("start the runtime"))?;
    runtime.block_on(async {
        let reaper = Reaper::start().map_err(failed("watch for ended processes"))?;
        let connection = timeout(DIAL_DEADLINE, connected(host));
        let connection = connection
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(failed("connect to the host"))?;
        let (closed, connection) = Connection::new(connection);
        let service = Arc::new(Service::new(guest, reaper));
        let mut server = Server::new()
            .add_listener(Listener::new(futures::stream::once(async {
                Ok(connection)
            })))
            .register_service(create_agent(service));
        server.start().await.map_err(ServeError::Server)?;
        // Resolves, with an error, when the server drops the connection.
        let _ = closed.await;
        Ok(())
    })
}

/// Serves without a VM, as a plain process of root: see the usage in `main`.
pub fn without_vm(dir: PathBuf, started_ns: u64) -> ExitCode {
    let serve = || {
        // What PID 1 is anyway: the parent of processes whose stage has gone.
        nix::sys::prctl::set_child_subreaper(true).map_err(failed("become a subreaper"))?;
        let guest = Guest {
            shared_dir: dir.join("shared"),
            cgroup_root: dir.join("cgroup"),
            devices: Arc::new(PlatformDevices::new(dir.join("platform"))),
            memory: SharedMemory::new(dir.join("memory")),
            mirrors: Mirrors::new(dir.join("mirrors")),
            transport: Transport::Unix(dir),
            profiles: Profiles::default(),
            started_ns,
            ready_ns: boottime_ns(),
        };
        cgroup::delegate_controllers(&guest.cgroup_root)?;
        let host = guest.transport.dial(AGENT_PORT);
        run(guest, host.map_err(failed("dial the host"))?)
    };
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error(&log::chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// The connection to the host, which tells when the server has let go of it.
struct Connection {
    stream: Stream,
    _closed: oneshot::Sender<()>,
}

impl Connection {
    fn new(stream: Stream) -> (oneshot::Receiver<()>, Self) {
        let (sender, receiver) = oneshot::channel();
        let connection = Self {
            stream,
            _closed: sender,
        };
        (receiver, connection)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
