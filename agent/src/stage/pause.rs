//! The process of a pod's sandbox: it holds the namespaces that the pod's containers join, and runs
//! nothing.

use std::{convert::Infallible, io, process};

use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
};

use super::{FIRST_OWN_FD, StageError};

/// What others in its PID namespace see.
const NAME: &std::ffi::CStr = c"pause";

/// Holds the namespaces until it is told to end. Where containers share a PID namespace it is their
/// PID 1, to which orphans come. Returns only why not.
pub fn hold() -> StageError {
    match try_to_hold() {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn try_to_hold() -> Result<Infallible, StageError> {
    // Whoever joins its namespaces from inside its user namespace must be able to look at it.
    prctl::set_dumpable(true).map_err(StageError::system("become dumpable"))?;
    prctl::set_name(NAME).map_err(StageError::system("set the name of the process"))?;
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM] {
        signals.add(signal);
    }
    // Blocked, they wait for their turn, though PID 1 has no handlers for them.
    let blocked = signals.thread_block();
    blocked.map_err(StageError::system("block signals"))?;
    close_all()?;
    loop {
        let signal = signals.wait();
        match signal.map_err(StageError::system("wait for signals"))? {
            Signal::SIGCHLD => reap()?,
            _ => process::exit(0),
        }
    }
}

/// Closes what an execve would close. The agent takes the channel's end for it.
fn close_all() -> Result<(), StageError> {
    // SAFETY: whatever owns one of these descriptors is not used any more, nor dropped: this process
    // waits for signals until it exits.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, FIRST_OWN_FD, libc::c_uint::MAX, 0) };
    if result < 0 {
        return Err(StageError::system("close all descriptors")(
            io::Error::last_os_error(),
        ));
    }
    Ok(())
}

fn reap() -> Result<(), StageError> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(StageError::system("reap a process")(errno)),
        }
    }
}
