//! The VMM's process and what is said over its control socket.

use std::{
    collections::VecDeque,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bulkhead_vmm_control::{
    Channel, ChannelError, Event, FromVmm, Launch, Packet, Reply, Request, StopReason,
    UserNamespace, needs_core_scheduling,
};
use nix::{errno::Errno, fcntl::OFlag};
use thiserror::Error;
use tokio::{
    io::unix::AsyncFd,
    net::{UnixStream, unix::pipe},
    sync::{Mutex as AsyncMutex, mpsc, oneshot},
};

use crate::{
    child::{Child, Reaper},
    deadline::timeout,
    text,
};

/// How long the VMM may take for one request. Sharing and counting are quick; building the VM
/// includes the kernel's allocation of it.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// How long the VMM may live after it closed its control socket.
const EXIT_DEADLINE: Duration = Duration::from_secs(2);

/// Unread connections and notices of the VMM, beyond which it has to wait.
const MAX_NOTICES: usize = 64;

/// The longest reason of the VMM that is passed on, in bytes.
const MAX_REASON: usize = 1024;

/// The longest line of the VMM's standard error that is kept, in bytes.
const MAX_LINE: usize = 1024;

/// Failures with the VMM.
#[derive(Debug, Error)]
pub enum VmmError {
    /// The control socket cannot be made.
    #[error("Cannot set up the control socket")]
    Channel(#[source] ChannelError),
    /// The process cannot be started.
    #[error("Cannot start {path}")]
    Spawn {
        /// The executable.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The host's kernel cannot do what the configuration asks for.
    #[error(
        "Cannot keep others off the VMM's cores: the host's kernel needs core scheduling \
         (CONFIG_SCHED_CORE), or core_scheduling = false in the configuration"
    )]
    CoreScheduling(#[source] io::Error),
    /// Something of the host is missing.
    #[error("Cannot supervise the VMM")]
    Supervise(#[source] io::Error),
    /// The VMM said no.
    #[error("{0}")]
    Refused(String),
    /// The VMM has ended.
    #[error("The VMM is gone")]
    Gone,
    /// The VMM did not answer in time.
    #[error("The VMM did not answer within {} s", REQUEST_DEADLINE.as_secs())]
    Deadline,
    /// The answer makes no sense.
    #[error("The VMM gave an answer to another question")]
    Mismatch,
}

/// What the VMM says unasked.
#[derive(Debug)]
pub enum Notice {
    /// The guest dialled a port.
    Connection {
        /// Port on the host's side.
        port: u32,
        /// The connection.
        stream: UnixStream,
    },
    /// The VMM has ended. Nothing follows.
    Ended {
        /// Why, in one line.
        reason: String,
    },
}

/// What the VMM is started with.
#[derive(Debug)]
pub struct VmmSettings<'a> {
    /// The executable.
    pub path: &'a Path,
    /// The user namespace that it joins.
    pub user_namespace: &'a UserNamespace,
    /// The directory of its cgroup.
    pub cgroup: BorrowedFd<'a>,
    /// Its OOM preference; `None` keeps the shim's.
    pub oom_score_adj: Option<i32>,
    /// Nobody else runs on the other hardware threads of a core that it runs on.
    pub core_scheduling: bool,
}

type Pending = Arc<Mutex<VecDeque<oneshot::Sender<Reply>>>>;

fn lock(pending: &Pending) -> MutexGuard<'_, VecDeque<oneshot::Sender<Reply>>> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running VMM. It is killed when this is dropped.
#[derive(Debug)]
pub struct VmmProcess {
    child: Arc<Child>,
    channel: Arc<AsyncFd<Channel>>,
    pending: Pending,
    sending: AsyncMutex<()>,
}

impl VmmProcess {
    /// Starts the VMM. Its notices come through the receiver.
    pub fn spawn(
        settings: VmmSettings<'_>,
        reaper: &Reaper,
    ) -> Result<(Self, mpsc::Receiver<Notice>), VmmError> {
        let own_cores = settings.core_scheduling
            && needs_core_scheduling().map_err(VmmError::CoreScheduling)?;
        let (ours, theirs) = Channel::pair().map_err(VmmError::Channel)?;
        let (messages, their_messages) = io::pipe().map_err(VmmError::Supervise)?;
        let launch = Launch {
            control: &theirs,
            user_namespace: settings.user_namespace,
            stderr: their_messages.as_fd(),
            cgroup: Some(settings.cgroup),
            oom_score_adj: settings.oom_score_adj,
            own_cores,
        };
        let started = reaper.own(|| launch.spawn(settings.path));
        let child = started.map_err(|source| VmmError::Spawn {
            path: settings.path.to_owned(),
            source,
        })?;
        // The child has its own.
        drop((theirs, their_messages));
        let child = Arc::new(child);

        set_nonblocking(ours.as_fd()).map_err(VmmError::Supervise)?;
        // SAFETY: a channel keeps its one descriptor open as long as it lives.
        let registered = unsafe { AsyncFd::register(ours) };
        let channel =
            Arc::new(registered.map_err(|error| VmmError::Supervise(error.into_parts().1))?);
        let messages =
            pipe::Receiver::from_owned_fd(messages.into()).map_err(VmmError::Supervise)?;
        let last_message = Arc::new(Mutex::new(String::new()));
        tokio::spawn(log_messages(messages, last_message.clone()));

        let pending = Pending::default();
        let (sender, notices) = mpsc::channel(MAX_NOTICES);
        let reader = Reader {
            channel: channel.clone(),
            pending: pending.clone(),
            notices: sender,
            child: child.clone(),
            last_message,
        };
        tokio::spawn(reader.run());
        let vmm = Self {
            child,
            channel,
            pending,
            sending: AsyncMutex::new(()),
        };
        Ok((vmm, notices))
    }

    /// Sends a request and waits for its reply.
    pub async fn request(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, VmmError> {
        let (sender, receiver) = oneshot::channel();
        let sent = async {
            // Replies come in the order of the requests: both are queued under one lock.
            let _turn = self.sending.lock().await;
            loop {
                let mut ready = self.channel.writable().await.map_err(VmmError::Supervise)?;
                match self.channel.get_ref().send(request, fds) {
                    Ok(()) => break,
                    Err(ChannelError::Send(Errno::EAGAIN)) => ready.clear_ready(),
                    Err(ChannelError::Send(Errno::EPIPE | Errno::ECONNRESET)) => {
                        return Err(VmmError::Gone);
                    }
                    Err(error) => return Err(VmmError::Channel(error)),
                }
            }
            // The reader runs on this thread, so it sees this before the reply.
            lock(&self.pending).push_back(sender);
            Ok(())
        };
        let exchange = async {
            sent.await?;
            receiver.await.map_err(|_| VmmError::Gone)
        };
        #[cfg(feature = "steps")]
        crate::steps::before(request.name()).await;
        let answer = timeout(REQUEST_DEADLINE, exchange).await;
        #[cfg(feature = "steps")]
        crate::steps::after(request.name()).await;
        match answer {
            Ok(Ok(Reply::Failed(reason))) => {
                Err(VmmError::Refused(text::one_line(&reason, MAX_REASON)))
            }
            Ok(result) => result,
            Err(_) => Err(VmmError::Deadline),
        }
    }

    /// Sends a request that is answered with nothing but success.
    pub async fn order(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), VmmError> {
        match self.request(request, fds).await? {
            Reply::Done => Ok(()),
            _ => Err(VmmError::Mismatch),
        }
    }

    /// Sends SIGKILL.
    pub fn kill(&self) {
        self.child.kill();
    }

    /// Waits until the process is gone.
    pub async fn exited(&self) {
        self.child.exited().await;
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        self.child.kill();
    }
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, fcntl};
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(())
}

struct Reader {
    channel: Arc<AsyncFd<Channel>>,
    pending: Pending,
    notices: mpsc::Sender<Notice>,
    child: Arc<Child>,
    last_message: Arc<Mutex<String>>,
}

impl Reader {
    async fn run(self) {
        let told = self.read().await;
        // No reply comes any more.
        lock(&self.pending).clear();
        let exit = timeout(EXIT_DEADLINE, self.child.exited()).await;
        self.child.kill();
        let reason = told.unwrap_or_else(|| {
            let last = self
                .last_message
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            match exit {
                Ok(code) if last.is_empty() => format!("the VMM exited with status {code}"),
                Ok(code) => format!("the VMM exited with status {code}: {last}"),
                Err(_) => "the VMM closed its control socket".to_owned(),
            }
        });
        let _ = self.notices.send(Notice::Ended { reason }).await;
    }

    /// Reads until the end. Returns the reason that the VMM gave, if it gave one.
    async fn read(&self) -> Option<String> {
        loop {
            let Ok(mut ready) = self.channel.readable().await else {
                return None;
            };
            let packet = match self.channel.get_ref().receive::<FromVmm>() {
                Ok(Some(packet)) => packet,
                Ok(None) => return None,
                Err(ChannelError::Receive(Errno::EAGAIN)) => {
                    ready.clear_ready();
                    continue;
                }
                Err(error) => {
                    self.child.kill();
                    return Some(text::chain(&error));
                }
            };
            drop(ready);
            match self.handle(packet).await {
                Ok(None) => {}
                Ok(Some(reason)) => return Some(reason),
                Err(problem) => {
                    self.child.kill();
                    return Some(problem.to_owned());
                }
            }
        }
    }

    async fn handle(&self, packet: Packet<FromVmm>) -> Result<Option<String>, &'static str> {
        let Packet { message, mut fds } = packet;
        match message {
            FromVmm::Reply(reply) => {
                let waiter = lock(&self.pending).pop_front();
                let waiter = waiter.ok_or("the VMM answered without a question")?;
                // Whoever asked may have stopped waiting.
                let _ = waiter.send(reply);
            }
            FromVmm::Event(Event::Connection { port }) => {
                let fd = fds
                    .pop()
                    .ok_or("the VMM announced a connection without one")?;
                match stream(fd) {
                    Ok(stream) => {
                        let _ = self.notices.send(Notice::Connection { port, stream }).await;
                    }
                    Err(error) => tracing::warn!(%error, "Cannot take a connection of the guest"),
                }
            }
            FromVmm::Event(Event::Stopped { reason, console }) => {
                let reason = match reason {
                    StopReason::Reset => "the guest reset or shut itself down".to_owned(),
                    StopReason::Failed(reason) => text::one_line(&reason, MAX_REASON),
                };
                let console = text::last_words(&console);
                return Ok(Some(if console.is_empty() {
                    reason
                } else {
                    format!("{reason}; its console ended with: {console}")
                }));
            }
        }
        Ok(None)
    }
}

fn stream(fd: OwnedFd) -> io::Result<UnixStream> {
    let stream = net::UnixStream::from(fd);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Passes what the VMM writes to its standard error to the log, line by line.
async fn log_messages(messages: pipe::Receiver, last: Arc<Mutex<String>>) {
    let mut line = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        if messages.readable().await.is_err() {
            return;
        }
        let read = match messages.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => break,
        };
        for byte in buffer[..read].bytes().flatten() {
            if byte == b'\n' {
                finish_line(&mut line, &last);
            } else if line.len() < MAX_LINE {
                line.push(byte);
            }
        }
    }
    finish_line(&mut line, &last);
}

fn finish_line(line: &mut Vec<u8>, last: &Mutex<String>) {
    let text = text::one_line(&String::from_utf8_lossy(line), MAX_LINE);
    line.clear();
    if !text.is_empty() {
        tracing::warn!(text, "The VMM says");
        *last.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }
}
