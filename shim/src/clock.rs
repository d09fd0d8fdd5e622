//! The guest's wall clock, which follows the host's.
//!
//! It is right when the guest boots, and then runs by itself: neither the corrections that NTP makes to
//! the host's reach it, nor what somebody sets that to, nor the time that the host has slept. The kernel
//! tells of the latter two (timerfd_create(2), `TFD_TIMER_CANCEL_ON_SET`); for the first it is compared
//! now and then.

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::{
    io::{Errno, read},
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};
use tokio::io::unix::AsyncFd;

use crate::{
    agent_client::{AgentClient, AgentError},
    text,
};

/// Between two comparisons. A clock is wrong by some ten microseconds in each second.
const PERIOD: Duration = Duration::from_secs(60);

/// What is not worth a correction, in nanoseconds.
const LEAST: i64 = 100_000;

/// Makes the clock of a guest follow, until its agent is gone.
pub async fn follow(agent: AgentClient) {
    if let Err(error) = try_to_follow(&agent).await {
        tracing::warn!(%error, "The guest's clock does not follow the host's any more");
    }
}

async fn try_to_follow(agent: &AgentClient) -> io::Result<()> {
    let timer = Timer::new()?;
    loop {
        timer.passed().await?;
        match compare(agent).await {
            Ok(()) => {}
            Err(AgentError::Gone) => return Ok(()),
            Err(error) => {
                let error = text::chain(&error);
                tracing::warn!(error, "The guest's clock is not corrected");
            }
        }
    }
}

async fn compare(agent: &AgentClient) -> Result<(), AgentError> {
    let before = now();
    let guest = agent.adjust_clock(0).await?;
    let offset = correction(before, guest, now());
    if offset != 0 {
        tracing::debug!(offset, "The guest's clock is corrected");
        agent.adjust_clock(offset).await?;
    }
    Ok(())
}

/// By how much a clock is to be moved that was at `guest` at some time between `before` and `after`, all
/// in nanoseconds since the epoch. 0 where it may have been right.
fn correction(before: u64, guest: u64, after: u64) -> i64 {
    let signed = |time: u64| i64::try_from(time).unwrap_or(i64::MAX);
    let (before, guest, after) = (signed(before), signed(guest), signed(after));
    // Negative where the host's clock was set meanwhile; it is compared again then.
    let uncertain = after.saturating_sub(before).max(0) / 2;
    let offset = before.saturating_add(uncertain).saturating_sub(guest);
    if offset.saturating_abs() > uncertain.saturating_add(LEAST) {
        offset
    } else {
        0
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

/// Passes periodically, and at once when the host's clock is set.
struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
        // SAFETY: the descriptor stays the same, and open, as long as this owns it.
        let timer = Self(unsafe { AsyncFd::register(timer) }?);
        timer.arm()?;
        Ok(timer)
    }

    fn arm(&self) -> io::Result<()> {
        let next = Duration::from_nanos(now()) + PERIOD;
        let time = |seconds, nanos| Timespec {
            tv_sec: seconds,
            tv_nsec: nanos,
        };
        let once = Itimerspec {
            it_interval: time(0, 0),
            it_value: time(
                i64::try_from(next.as_secs()).unwrap_or(i64::MAX),
                next.subsec_nanos().into(),
            ),
        };
        // What happens from now on is not lost.
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        timerfd_settime(self.0.get_ref(), flags, &once)?;
        Ok(())
    }

    async fn passed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            match read(ready.get_inner(), &mut [0; 8]) {
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Ok(_) | Err(Errno::CANCELED) => return self.arm(),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const SECOND: u64 = 1000 * MS;

    #[test]
    fn what_may_be_right_stays() {
        for guest in [100, 101, 102, 104] {
            assert_eq!(correction(100 * MS, guest * MS, 104 * MS), 0, "{guest}");
        }
        assert_eq!(correction(100 * MS, 100 * MS, 100 * MS), 0);
    }

    #[test]
    fn what_is_wrong_is_moved() {
        let ms = i64::try_from(MS).unwrap();
        assert_eq!(correction(100 * MS, 107 * MS, 104 * MS), -5 * ms);
        assert_eq!(correction(100 * MS, 97 * MS, 104 * MS), 5 * ms);
        assert_eq!(correction(3600 * SECOND, 0, 3600 * SECOND), 3_600_000 * ms);
    }

    #[test]
    fn no_answer_of_a_guest_is_too_much() {
        for guest in [0, 1, u64::MAX / 2, u64::MAX] {
            for (before, after) in [(0, u64::MAX), (u64::MAX, 0), (now(), now())] {
                correction(before, guest, after);
            }
        }
    }

    #[tokio::test]
    async fn a_timer_can_be_armed() {
        let timer = Timer::new().unwrap();
        timer.arm().unwrap();
    }
}
