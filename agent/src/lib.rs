//! Bulkhead's guest agent.
//!
//! As PID 1 it boots the guest's user space and serves the host. Every container process is set
//! up by a second mode of the same binary, the stage: a fresh single-threaded process, because a
//! process that runs an async runtime must not fork.

mod apparmor;
mod boot;
pub mod cgroup;
mod clock;
mod container;
mod error;
mod log;
mod memory;
mod mirrors;
mod neighbours;
mod network;
mod process;
mod reaper;
mod serve;
mod service;
pub mod spec;
pub mod stage;
mod stream;
mod transport;
mod volumes;

use std::{ffi::OsStr, path::PathBuf, process::ExitCode};

/// The whole program, in the mode that its arguments ask for.
pub fn main() -> ExitCode {
    let started_ns = serve::boottime_ns();
    if nix::unistd::getpid().as_raw() == 1 {
        boot::run(started_ns);
    }
    let mut args = std::env::args_os().skip(1);
    match (args.next().as_deref().and_then(OsStr::to_str), args.next()) {
        (Some(stage::ARGUMENT), None) => stage::main(),
        (Some("serve"), Some(dir)) => serve::without_vm(PathBuf::from(dir), started_ns),
        _ => {
            eprintln!(
                "bulkhead-agent is PID 1 of a Bulkhead guest.\n\
                 usage: bulkhead-agent serve DIR\n\
                 Without a VM: dials DIR/1024 and DIR/1025 instead of vsock; finds shares in\n\
                 DIR/shared and makes cgroups in DIR/cgroup; DIR/platform is its platform bus."
            );
            ExitCode::from(2)
        }
    }
}
