//! `bulkhead-vmm`: one VM, on behalf of the shim at the other end of descriptor 3.

use std::{
    os::fd::{FromRawFd, OwnedFd},
    process::ExitCode,
};

use bulkhead_vmm::{control, seccomp::Filter};
use bulkhead_vmm_control::{CONTROL_FD, Channel};
use rustix::{
    io::{FdFlags, fcntl_getfd, fcntl_setfd},
    process::{Signal, set_parent_process_death_signal},
};

fn main() -> ExitCode {
    // The shim closes the socket when it ends in order; this is for when it does not.
    let result = set_parent_process_death_signal(Some(Signal::KILL));
    let Some(channel) = result.ok().and_then(|()| control_socket()) else {
        eprintln!(
            "bulkhead-vmm is started by containerd-shim-bulkhead-v2, with a control socket as descriptor {CONTROL_FD}"
        );
        return ExitCode::FAILURE;
    };
    if let Err(error) = Filter::Setup.install() {
        eprintln!("bulkhead-vmm: {}", control::one_line(&error));
        return ExitCode::FAILURE;
    }
    match control::serve(channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-vmm: {}", control::one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// Takes over the inherited descriptor, if there is one.
fn control_socket() -> Option<Channel> {
    // SAFETY: nothing has been opened yet, so if the descriptor is open it was inherited, and
    // nothing else in this process knows it. The check below does not close it.
    let socket = unsafe { std::os::fd::BorrowedFd::borrow_raw(CONTROL_FD) };
    let flags = fcntl_getfd(socket).ok()?;
    fcntl_setfd(socket, flags | FdFlags::CLOEXEC).ok()?;
    // SAFETY: as above; this takes the ownership that nobody else has.
    Some(Channel::from(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) }))
}
