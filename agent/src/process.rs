//! Processes of containers: how they are started through a stage, signalled and waited for.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::{Command, Stdio as CommandStdio},
    sync::{Arc, OnceLock},
    time::Duration,
};

use bulkhead_agent_api::messages::Stdio;
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

use crate::{
    error::ServiceError,
    reaper::{Exit, ExitReceiver, Reaper, ended},
    serve::Guest,
    stage::{
        self,
        protocol::{Channel, Reply, Request, RequestFds, START, receive_reply},
    },
    stream::{Streams, resize},
    transport::{Stream, watch},
};

/// For a stage to set a process up. Far above what any set-up takes, also on an emulated CPU.
const STAGE_DEADLINE: Duration = Duration::from_secs(60);

/// A process of a container.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
    exit: ExitReceiver,
    terminal: Option<Arc<Stream>>,
    /// Signal that ended the process before its execve, when it could not yet take signals.
    ended_early_by: OnceLock<u32>,
}

impl Process {
    /// Its pid in the guest.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its pidfd.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let exit = ended(&self.exit).await;
        match self.ended_early_by.get() {
            Some(signal) => Exit {
                status: 128 + signal,
                ..exit
            },
            None => exit,
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: u32) -> Result<(), ServiceError> {
        if self.has_ended() {
            return Err(ServiceError::ProcessFinished);
        }
        let no_info: *const libc::siginfo_t = std::ptr::null();
        // SAFETY: an open pidfd, and no signal information for the kernel to read.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal,
                no_info,
                0,
            )
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ESRCH) => Err(ServiceError::ProcessFinished),
            Some(libc::EINVAL) => Err(ServiceError::BadRequest {
                what: "signal",
                value: signal.to_string(),
            }),
            _ => Err(ServiceError::system(format!("send signal {signal}"))(error)),
        }
    }

    /// Ends a process that has not got to its execve, as `signal` would end it after that.
    pub fn end_early(&self, signal: u32) -> Result<(), ServiceError> {
        self.signal(libc::SIGKILL.unsigned_abs())?;
        let _ = self.ended_early_by.set(signal);
        Ok(())
    }

    /// Changes the size of its terminal.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<(), ServiceError> {
        match &self.terminal {
            Some(terminal) => resize(terminal, columns, rows),
            None => Err(ServiceError::WrongState {
                what: "resize the terminal",
                state: "the process has none",
            }),
        }
    }
}

/// The agent's end of the channel to a process on its way to the execve.
#[derive(Debug)]
pub struct StageChannel {
    fd: AsyncFd<OwnedFd>,
    /// For anything that is to be heard.
    deadline: Duration,
}

/// What a stage has told so far.
#[derive(Default)]
struct Heard {
    spawned: Option<(i32, OwnedFd)>,
    terminal: Option<OwnedFd>,
    ready: bool,
}

impl StageChannel {
    /// Lets a created container's process execve, and waits until it has.
    pub async fn start(&self) -> Result<(), ServiceError> {
        rustix::net::send(self.fd.get_ref(), START, rustix::net::SendFlags::NOSIGNAL)
            .map_err(ServiceError::system("start the process"))?;
        self.listen(&mut Heard::default(), "the start of a process")
            .await
    }

    /// Takes replies until the process is ready or has called execve, within the deadline.
    async fn listen(&self, heard: &mut Heard, what: &'static str) -> Result<(), ServiceError> {
        let all = async {
            while let Some(reply) = self.next().await? {
                match reply {
                    (Reply::Spawned { pid }, Some(pidfd)) => heard.spawned = Some((pid, pidfd)),
                    (Reply::Terminal, Some(master)) => heard.terminal = Some(master),
                    (Reply::Failed(failure), _) => return Err(ServiceError::Stage(failure)),
                    (Reply::Ready, _) => heard.ready = true,
                    (Reply::Spawned { .. } | Reply::Terminal, None) => {
                        return Err(ServiceError::StageVanished { status: None });
                    }
                }
                // The two that are needed may come in any order, from two processes.
                if heard.ready && heard.spawned.is_some() {
                    break;
                }
            }
            Ok(())
        };
        timeout(self.deadline, all)
            .await
            .unwrap_or(Err(ServiceError::Deadline(what)))
    }

    async fn next(&self) -> Result<Option<(Reply, Option<OwnedFd>)>, ServiceError> {
        self.fd
            .async_io(Interest::READABLE, |fd| receive_reply(fd.as_fd()))
            .await
            .map_err(ServiceError::system("hear from the stage"))
    }
}

/// Where a process is made.
#[derive(Debug)]
pub struct Place {
    /// The cgroup to be born in.
    pub cgroup: OwnedFd,
    /// pidfd of the own process of the container that is joined.
    pub init: Option<OwnedFd>,
    /// Namespaces that a new container joins, in the order of [`CreateTask::joined`].
    ///
    /// [`CreateTask::joined`]: stage::protocol::CreateTask::joined
    pub joined: Vec<OwnedFd>,
}

/// Has a stage make a process and connects its streams. Returns when a container's process waits
/// for its start, or when another process has called execve.
pub async fn launch(
    guest: &Guest,
    reaper: &Reaper,
    request: Request,
    place: Place,
    stdio: &Stdio,
) -> Result<(Process, StageChannel), ServiceError> {
    let waits = matches!(request.task, stage::protocol::Task::Create(_));
    let (streams, ends) = Streams::prepare(&guest.transport, stdio)?;
    let fds = RequestFds {
        cgroup: place.cgroup,
        stdio: ends,
        init: place.init,
        joined: place.joined,
    };
    let channel = spawn_stage(reaper, &request, fds)?;
    let mut heard = Heard::default();
    let told = channel.listen(&mut heard, "the set-up of a process").await;
    let Some((pid, pidfd)) = heard.spawned else {
        told?;
        return Err(ServiceError::StageVanished { status: None });
    };
    let mut process = Process {
        pid,
        pidfd,
        exit: reaper.claim(pid),
        terminal: None,
        ended_early_by: OnceLock::new(),
    };
    let connected = async {
        told?;
        if waits && !heard.ready {
            // It ended without a word; its status is about to come.
            let exit = timeout(STAGE_DEADLINE, process.wait()).await;
            let status = exit.ok().map(|exit| exit.status);
            return Err(ServiceError::StageVanished { status });
        }
        let terminal = heard.terminal.map(Stream::new).transpose();
        process.terminal = terminal
            .map_err(ServiceError::system::<io::Error>("watch the terminal"))?
            .map(Arc::new);
        streams.run(process.terminal.as_ref(), &process.exit).await
    };
    match connected.await {
        Ok(()) => Ok((process, channel)),
        Err(error) => {
            // Gone already, or gone now: nobody else knows of it.
            let _ = process.signal(libc::SIGKILL.unsigned_abs());
            Err(error)
        }
    }
}

fn spawn_stage(
    reaper: &Reaper,
    request: &Request,
    fds: RequestFds,
) -> Result<StageChannel, ServiceError> {
    let failed = ServiceError::system::<io::Error>;
    let (channel, stage_end) = Channel::pair().map_err(failed("make a channel"))?;
    channel
        .send_request(request, &fds)
        .map_err(failed("send the request to the stage"))?;
    // By its path, which is on a read-only mount; /proc/self/exe would be the file as PID 1 was
    // started with, on a mount that was not read-only.
    let exe = std::env::current_exe().map_err(failed("find the agent's binary"))?;
    let child = Command::new(exe)
        .arg(stage::ARGUMENT)
        .env_clear()
        .current_dir("/")
        .stdin(CommandStdio::from(stage_end))
        .stdout(CommandStdio::null())
        .stderr(CommandStdio::null())
        .spawn()
        .map_err(failed("start a stage"))?;
    // Nobody asks for the stage's own status; a claim keeps it from being stored.
    if let Ok(pid) = i32::try_from(child.id()) {
        drop(reaper.claim(pid));
    }
    let fd = watch(nonblocking(channel.into_fd())?, Interest::READABLE)
        .map_err(failed("watch the stage"))?;
    let hooks = match &request.task {
        stage::protocol::Task::Create(create) => create.hooks_time(),
        stage::protocol::Task::Join => Duration::ZERO,
    };
    Ok(StageChannel {
        fd,
        deadline: STAGE_DEADLINE + hooks,
    })
}

fn nonblocking(fd: OwnedFd) -> Result<OwnedFd, ServiceError> {
    let set = rustix::io::ioctl_fionbio(&fd, true);
    set.map_err(ServiceError::system("make the channel non-blocking"))?;
    Ok(fd)
}
