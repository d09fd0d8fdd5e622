//! Starting and stopping the lab's containerd.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{Context, Result};

const RUN_DIR: &str = "/run/containerd";
const SOCKET: &str = "/run/containerd/containerd.sock";
const PID_FILE: &str = "/run/containerd.pid";
const LOG: &str = "/var/log/containerd.log";

/// How long containerd may take to listen or to end.
const LIMIT: Duration = Duration::from_secs(60);

/// Starts containerd in a session of its own and waits until its socket accepts a connection.
pub fn start() -> Result<()> {
    fs::create_dir_all(RUN_DIR).context(|| format!("create {RUN_DIR}"))?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(LOG)
        .context(|| format!("open {LOG}"))?;
    // Watched from before it starts, so that its socket cannot be missed. The socket exists before
    // it is listened on; containerd changes its mode after.
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
        .context(|| "use inotify".into())?;
    inotify
        .add_watch(RUN_DIR, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ATTRIB)
        .context(|| format!("watch {RUN_DIR}"))?;
    let containerd = Command::new("containerd")
        .stdin(Stdio::null())
        .stdout(log.try_clone().context(|| format!("open {LOG}"))?)
        .stderr(log)
        .process_group(0)
        .spawn()
        .context(|| "run containerd".into())?;
    fs::write(PID_FILE, containerd.id().to_string()).context(|| format!("write {PID_FILE}"))?;
    let pidfd = pidfd_open(Pid::from_child(&containerd), PidfdFlags::empty())
        .context(|| "watch containerd".into())?;

    let deadline = Instant::now() + LIMIT;
    while !listening()? {
        let mut events = [
            PollFd::new(inotify.as_fd(), PollFlags::POLLIN),
            PollFd::new(pidfd.as_fd(), PollFlags::POLLIN),
        ];
        wait(&mut events, deadline, "containerd's socket")?;
        if events[1].any() == Some(true) {
            return Err(format!("containerd ended at once, see {LOG}").into());
        }
        if events[0].any() == Some(true) {
            inotify
                .read_events()
                .context(|| format!("watch {RUN_DIR}"))?;
        }
    }
    Ok(())
}

/// Ends containerd, which leaves its containers running, and waits until it is gone.
pub fn stop() -> Result<()> {
    let pid = fs::read_to_string(PID_FILE).context(|| format!("read {PID_FILE}"))?;
    let pid = pid.trim().parse().ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| format!("{PID_FILE} holds no process ID"))?;
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(format!("watch containerd: {error}").into()),
    };
    pidfd_send_signal(&pidfd, Signal::TERM).context(|| "end containerd".into())?;
    let mut events = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    wait(&mut events, Instant::now() + LIMIT, "containerd's end")
}

/// Whether somebody accepts connections; a socket without a listener is left from before.
fn listening() -> Result<bool> {
    match UnixStream::connect(SOCKET) {
        Ok(_) => Ok(true),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(format!("connect to {SOCKET}: {error}").into()),
    }
}

fn wait(events: &mut [PollFd], deadline: Instant, what: &str) -> Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).context(|| "wait".into())?;
    match poll(events, timeout).context(|| format!("wait for {what}"))? {
        0 => Err(format!("{what} did not come within {LIMIT:?}").into()),
        _ => Ok(()),
    }
}
