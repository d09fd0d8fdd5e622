//! The end of every child of PID 1, in one place.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use rustix::process::{WaitOptions, wait};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

use crate::transport;

/// Statuses kept for children that nobody has asked for yet.
const UNCLAIMED_MAX: usize = 256;

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// Wall-clock time in nanoseconds since the epoch.
    pub at_ns: u64,
}

/// Resolves to the end of one process.
pub type ExitReceiver = watch::Receiver<Option<Exit>>;

/// Collects the children of this process and hands their statuses to whoever claims them.
///
/// A child may end before its pid has been heard of here, because a stage makes the processes of
/// containers. Statuses without a claim are therefore kept, the last [`UNCLAIMED_MAX`] of them.
#[derive(Debug, Default)]
pub struct Reaper {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    claimed: HashMap<i32, watch::Sender<Option<Exit>>>,
    unclaimed: VecDeque<(i32, Exit)>,
}

impl Reaper {
    /// Starts to reap. SIGCHLD is blocked for this process from here on; a stage starts with an
    /// empty signal mask again. Must be called inside the runtime.
    pub fn start() -> io::Result<Arc<Self>> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGCHLD);
        signals.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&signals, flags)?
            .as_fd()
            .try_clone_to_owned()?;
        let signals = transport::watch(signals, Interest::READABLE)?;
        let reaper = Arc::new(Self::default());
        let running = Arc::clone(&reaper);
        tokio::spawn(async move {
            loop {
                running.reap();
                if let Err(error) = drain(&signals).await {
                    crate::log::error(&format!("Failed to wait for SIGCHLD: {error}"));
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// Takes over the status of a child, whether it has ended or not.
    pub fn claim(&self, pid: i32) -> ExitReceiver {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // The newest one: pids are used again.
        let ended = state.unclaimed.iter().rposition(|(ended, _)| *ended == pid);
        if let Some((_, exit)) = ended.and_then(|index| state.unclaimed.remove(index)) {
            return watch::channel(Some(exit)).1;
        }
        let (sender, receiver) = watch::channel(None);
        state.claimed.insert(pid, sender);
        receiver
    }

    fn reap(&self) {
        loop {
            // Not nix's waitpid: it fails for a process ended by a real-time signal.
            let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) else {
                return;
            };
            let status = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code.unsigned_abs() & 0xff,
                (None, Some(signal)) => 128 + signal.unsigned_abs(),
                (None, None) => continue,
            };
            self.ended(pid.as_raw_nonzero().get(), status);
        }
    }

    fn ended(&self, pid: i32, status: u32) {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        let at_ns =
            since_epoch.map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        let exit = Exit { status, at_ns };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.claimed.remove(&pid) {
            Some(sender) => {
                sender.send_replace(Some(exit));
            }
            None => {
                if state.unclaimed.len() == UNCLAIMED_MAX {
                    state.unclaimed.pop_front();
                }
                state.unclaimed.push_back((pid, exit));
            }
        }
    }
}

/// Waits for at least one SIGCHLD. Several children may stand behind one.
async fn drain(signals: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut guard = signals.readable().await?;
    // What they say does not matter, only that they have come.
    while rustix::io::read(signals.get_ref(), &mut [0; 1024]).is_ok() {}
    guard.clear_ready();
    Ok(())
}

/// Waits for the end of a process whose status was claimed.
pub async fn ended(receiver: &ExitReceiver) -> Exit {
    let mut receiver = receiver.clone();
    match receiver.wait_for(Option::is_some).await.map(|exit| *exit) {
        Ok(Some(exit)) => exit,
        // The reaper lives as long as the agent, so its sender cannot have gone without a status.
        _ => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_kept_until_it_is_claimed() {
        let reaper = Reaper::default();
        reaper.ended(7, 42);
        let receiver = reaper.claim(7);
        assert_eq!(receiver.borrow().map(|exit| exit.status), Some(42));
        assert_eq!(*reaper.claim(7).borrow(), None, "claimed twice");
    }

    #[test]
    fn a_claim_is_answered_later() {
        let reaper = Reaper::default();
        let receiver = reaper.claim(7);
        assert_eq!(*receiver.borrow(), None);
        reaper.ended(7, 137);
        assert_eq!(receiver.borrow().map(|exit| exit.status), Some(137));
    }

    #[test]
    fn the_newest_status_of_a_pid_counts_and_old_ones_are_dropped() {
        let reaper = Reaper::default();
        reaper.ended(1, 1);
        for pid in 2..2 + i32::try_from(UNCLAIMED_MAX).unwrap() {
            reaper.ended(pid, 0);
        }
        reaper.ended(5, 9);
        assert_eq!(*reaper.claim(1).borrow(), None);
        assert_eq!(reaper.claim(5).borrow().map(|exit| exit.status), Some(9));
    }
}
