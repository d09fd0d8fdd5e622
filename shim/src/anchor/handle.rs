//! The shim's side of an anchor.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_vmm_control::Spawn;
use thiserror::Error;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use super::{ARGUMENT, READY};
use crate::{
    cgroup::{self, CgroupError},
    child::{Child, Reaper},
    deadline::timeout,
    text,
};

/// The name by which it is started.
const NAME: &str = "bulkhead-anchor";

/// How long an anchor may take to set itself up.
const READY_DEADLINE: Duration = Duration::from_secs(20);

/// How long an anchor may take to exit.
const EXIT_DEADLINE: Duration = Duration::from_secs(2);

/// The longest reason of a failure, in bytes.
const MAX_REASON: u64 = 512;

/// Failures with an anchor.
#[derive(Debug, Error)]
pub enum AnchorError {
    /// The process cannot be started.
    #[error("Cannot start the anchor process")]
    Spawn(#[source] io::Error),
    /// There is no cgroup for it.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// It could not set itself up.
    #[error("The anchor process {0}")]
    SetUp(String),
    /// It did not become ready in time.
    #[error("The anchor process was not ready within {} s", READY_DEADLINE.as_secs())]
    Deadline,
}

/// The network namespace of an anchor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// The shim's.
    Host,
    /// A new one.
    New,
    /// An existing one.
    Path(PathBuf),
}

impl Network {
    /// From the specification: `None` for the host's, an empty path for a new one.
    pub fn from_spec(path: Option<&Path>) -> Self {
        match path {
            None => Self::Host,
            Some(path) if path.as_os_str().is_empty() => Self::New,
            Some(path) => Self::Path(path.to_owned()),
        }
    }

    fn argument(&self) -> OsString {
        match self {
            Self::Host => "host".into(),
            Self::New => "new".into(),
            Self::Path(path) => {
                let mut argument = OsString::from("path:");
                argument.push(path);
                argument
            }
        }
    }
}

/// What happened to an anchor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnchorEvent {
    /// It got a signal, which is meant for the container's process.
    Signal(u8),
    /// It was killed.
    Died,
}

/// A running anchor, killed when this is dropped.
#[derive(Debug)]
pub struct Anchor {
    child: Child,
    socket: UnixStream,
}

impl Anchor {
    /// Starts an anchor in `cgroup`, a directory, for the process that people know as `name`.
    pub async fn start(
        reaper: &Reaper,
        cgroup: &Path,
        network: &Network,
        name: &str,
    ) -> Result<Self, AnchorError> {
        let (ours, theirs) = net::UnixStream::pair().map_err(AnchorError::Spawn)?;
        ours.set_nonblocking(true).map_err(AnchorError::Spawn)?;
        let theirs = OwnedFd::from(theirs);
        let null = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(AnchorError::Spawn)?;
        let cgroup = cgroup::open(cgroup.to_owned())?;
        let network = network.argument();
        let words = [NAME, ARGUMENT].map(OsStr::new);
        let spawn = Spawn {
            program: Path::new("/proc/self/exe"),
            arguments: &[&words[..], &[&network, OsStr::new(name)]].concat(),
            cgroup: Some(cgroup.as_fd()),
            namespaces: 0,
            // The last one is `SOCKET_FD`.
            descriptors: &[null.as_fd(), null.as_fd(), null.as_fd(), theirs.as_fd()],
        };
        // SAFETY: nothing is done in its process.
        let started = reaper.own(|| unsafe { spawn.start(|| Ok(())) });
        let child = started.map_err(AnchorError::Spawn)?;
        // The child has its own.
        drop(theirs);
        let socket = UnixStream::from_std(ours).map_err(AnchorError::Spawn)?;
        let mut anchor = Self { child, socket };
        match timeout(READY_DEADLINE, anchor.ready()).await {
            Ok(result) => result.map(|()| anchor),
            Err(_) => Err(AnchorError::Deadline),
        }
    }

    async fn ready(&mut self) -> Result<(), AnchorError> {
        match self.socket.read_u8().await {
            Ok(READY) => Ok(()),
            Ok(_) => {
                let mut reason = String::new();
                let read = (&mut self.socket)
                    .take(MAX_REASON)
                    .read_to_string(&mut reason)
                    .await;
                if read.is_err() {
                    reason.push_str("failed");
                }
                Err(AnchorError::SetUp(text::one_line(&reason, 512)))
            }
            Err(_) => {
                let code = self.child.exited().await;
                Err(AnchorError::SetUp(format!("exited with status {code}")))
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the next thing that happens to it. Safe to cancel.
    pub async fn event(&mut self) -> AnchorEvent {
        match self.socket.read_u8().await {
            Ok(signal) => AnchorEvent::Signal(signal),
            Err(_) => AnchorEvent::Died,
        }
    }

    /// Lets it exit with `code` and waits until it is gone.
    pub async fn finish(mut self, code: u8) {
        let told = self.socket.write_all(&[code]).await;
        if told.is_err() || timeout(EXIT_DEADLINE, self.child.exited()).await.is_err() {
            self.child.kill();
            self.child.exited().await;
        }
    }
}
