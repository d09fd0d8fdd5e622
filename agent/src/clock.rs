//! The guest's wall clock, which the host corrects (adjtimex(2)).

use std::{io, mem};

use rustix::time::{ClockId, clock_gettime};

const NANOS: i64 = 1_000_000_000;

/// What is made up for little by little, in nanoseconds: the kernel does half a millisecond in each
/// second, and this within the time between two corrections.
const MOST_SLEWED: i64 = 25_000_000;

/// Moves the clock by so many nanoseconds.
pub fn adjust(offset: i64) -> io::Result<()> {
    if offset == 0 {
        return Ok(());
    }
    // SAFETY: all zeroes are a `timex` that asks for nothing.
    let mut timex: libc::timex = unsafe { mem::zeroed() };
    if offset.abs() <= MOST_SLEWED {
        timex.modes = libc::ADJ_OFFSET_SINGLESHOT;
        // Microseconds.
        timex.offset = offset / 1000;
    } else {
        timex.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
        // The fraction is never negative; with ADJ_NANO it is one of nanoseconds.
        timex.time.tv_sec = offset.div_euclid(NANOS);
        timex.time.tv_usec = offset.rem_euclid(NANOS);
    }
    // SAFETY: the kernel reads and writes one `timex`.
    match unsafe { libc::adjtimex(&raw mut timex) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Nanoseconds since the epoch.
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    let nanos = now.tv_sec.saturating_mul(NANOS);
    // Before the epoch it is not.
    u64::try_from(nanos.saturating_add(now.tv_nsec)).unwrap_or(0)
}
