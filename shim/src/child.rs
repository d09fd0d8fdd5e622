//! The shim's child processes: one place that reaps, and an owner for each child.

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bulkhead_vmm_control::Spawned;
use nix::{
    errno::Errno,
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// Exit code of a process ended by SIGKILL.
pub const KILLED: u8 = 128 + 9;

type Exits = BTreeMap<i32, watch::Sender<Option<u8>>>;

/// The children that have owners, by PID. One for the process, as its children are. It is locked
/// while a child is started and while one is reaped, so no child is reaped before it is known.
static OWNED: Mutex<Exits> = Mutex::new(BTreeMap::new());

/// Reaps every child, also those it inherits as a subreaper, and tells the owners of its own.
#[derive(Debug, Clone)]
pub struct Reaper(());

impl Reaper {
    /// Starts to reap on SIGCHLD. All children must be started by [`Reaper::spawn`] or
    /// [`Reaper::own`].
    pub fn start() -> io::Result<Self> {
        let mut signals = signal(SignalKind::child())?;
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                reap();
            }
        });
        Ok(Self(()))
    }

    /// Starts a child. Dropping the owner kills it.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.own(|| {
            let id = command.spawn()?.id();
            let raw = i32::try_from(id).map_err(io::Error::other)?;
            // Not reaped before the lock is released, so the number is the child's.
            let pid = rustix::process::Pid::from_raw(raw).ok_or(Errno::ESRCH)?;
            match pidfd_open(pid, PidfdFlags::empty()) {
                Ok(pidfd) => Ok(Spawned { pid, pidfd }),
                Err(errno) => {
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                    Err(errno.into())
                }
            }
        })
    }

    /// Owns the child that `start` starts. Dropping the owner kills it.
    pub fn own(&self, start: impl FnOnce() -> io::Result<Spawned>) -> io::Result<Child> {
        let (sender, exit) = watch::channel(None);
        let mut owned = lock();
        let Spawned { pid, pidfd } = start()?;
        let id = pid.as_raw_nonzero().get();
        owned.insert(id, sender);
        let id = id.unsigned_abs();
        Ok(Child { id, pidfd, exit })
    }
}

fn lock() -> MutexGuard<'static, Exits> {
    OWNED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn reap() {
    let mut owned = lock();
    loop {
        let (pid, code) = match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, u8::try_from(code & 0xff).unwrap_or(0xff)),
            Ok(WaitStatus::Signaled(pid, signal, _)) => {
                (pid, u8::try_from(128 + signal as i32).unwrap_or(KILLED))
            }
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(errno) => {
                tracing::error!(%errno, "Cannot reap children");
                return;
            }
        };
        if let Some(sender) = owned.remove(&pid.as_raw()) {
            sender.send_replace(Some(code));
        }
    }
}

/// A child process. It is killed when this is dropped, and reaped in any case.
#[derive(Debug)]
pub struct Child {
    id: u32,
    pidfd: OwnedFd,
    exit: watch::Receiver<Option<u8>>,
}

impl Child {
    /// Process id, for people and other programs.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Exit code, 128 + n for death by signal n. May be awaited many times.
    pub async fn exited(&self) -> u8 {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(code) => code.unwrap_or(KILLED),
            // The reaper ends with the runtime only.
            Err(_) => KILLED,
        }
    }

    /// Sends a signal; nothing happens if the child has ended.
    pub fn signal(&self, signal: Signal) {
        if self.exit.borrow().is_some() {
            return;
        }
        if let Err(errno) = pidfd_send_signal(&self.pidfd, signal)
            && errno != rustix::io::Errno::SRCH
        {
            tracing::error!(pid = self.id, %errno, "Cannot signal a child");
        }
    }

    /// Sends SIGKILL.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn exits_are_told_with_their_codes() {
        let reaper = Reaper::start().unwrap();
        let child = reaper
            .spawn(Command::new("sh").args(["-c", "exit 7"]))
            .unwrap();
        assert_eq!(child.exited().await, 7);
        assert_eq!(child.exited().await, 7);
        let child = reaper.spawn(Command::new("sleep").arg("1000")).unwrap();
        child.signal(Signal::TERM);
        assert_eq!(child.exited().await, 128 + 15);
    }

    #[tokio::test]
    async fn a_dropped_child_dies() {
        let reaper = Reaper::start().unwrap();
        let child = reaper.spawn(Command::new("sleep").arg("1000")).unwrap();
        let mut exit = child.exit.clone();
        drop(child);
        let code = *exit.wait_for(Option::is_some).await.unwrap();
        assert_eq!(code, Some(KILLED));
    }
}
