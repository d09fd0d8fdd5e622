//! The host's side of a Bulkhead pod, as containerd's runtime v2 protocol wants it.
//!
//! One executable plays every part, told by its arguments:
//!
//! - [`start`]: containerd asks for a shim; a [`daemon`] is forked for a new pod, or the address of
//!   a running one is given.
//! - [`daemon`]: serves the task API ([`service`]) for one pod ([`pod`]) and its containers
//!   ([`container`]).
//! - [`sandbox`]: what the daemon knows of a pod that has no pause container.
//! - [`anchor`]: the process that stands for a container's process on the host.
//! - [`view`]: the process that shows the host a container's files.
//! - [`delete`]: cleans up what a crashed daemon left.
//! - [`info`]: tells containerd 2 what this is.
//!
//! A second executable, `bulkhead`, is for people: [`check`] tries the host.

pub mod address;
pub mod agent_client;
pub mod anchor;
pub mod apparmor;
pub mod args;
pub mod assembly;
pub mod cgroup;
pub mod check;
pub mod child;
mod clock;
pub mod config;
pub mod connections;
pub mod container;
pub mod creation;
pub mod daemon;
pub mod deadline;
pub mod delete;
pub mod errors;
pub mod events;
pub mod hooks;
pub mod ids;
pub mod info;
pub mod logging;
pub mod mapped_ids;
pub mod mirror;
pub mod mount_table;
pub mod mounts;
pub mod network;
pub mod options;
pub mod overlay;
pub mod pod;
pub mod privileges;
pub mod process;
pub mod rootfs;
pub mod sandbox;
pub mod service;
pub mod shares;
mod sizing;
pub mod spec;
pub mod start;
pub mod state;
pub mod stats;
pub mod stdio;
#[cfg(feature = "steps")]
pub mod steps;
pub mod streams;
pub mod text;
pub mod timeline;
pub mod tree;
pub mod view;
pub mod vmm_process;
pub mod volumes;

use std::{env, ffi::OsString, io::Write, process::ExitCode};

use args::{Action, Arguments};

/// Runs the executable's part. The first arguments `anchor` and `view` are looked at before anything
/// else is set up, because these processes stay small.
pub fn main() -> ExitCode {
    let started_ns = timeline::now_ns();
    let mut arguments = env::args_os().skip(1).peekable();
    if arguments
        .next_if(|first| first == anchor::ARGUMENT)
        .is_some()
    {
        return anchor::process::main(arguments);
    }
    if arguments.next_if(|first| first == view::ARGUMENT).is_some() {
        return view::process::main();
    }
    match run(arguments, started_ns) {
        Ok(code) => code,
        Err(message) => {
            // containerd shows what a failed start or delete wrote here.
            let _ = writeln!(std::io::stderr(), "{message}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: impl Iterator<Item = OsString>, started_ns: u64) -> Result<ExitCode, String> {
    let arguments = Arguments::parse(arguments).map_err(|error| text::chain(&error))?;
    let result = match arguments.action {
        Action::Version => {
            println!("{} {}", info::RUNTIME_NAME, env!("CARGO_PKG_VERSION"));
            return Ok(ExitCode::SUCCESS);
        }
        Action::Info => info::run().map_err(|error| text::chain(&error)),
        Action::Start => {
            return start::run(&arguments, started_ns).map_err(|error| text::chain(&error));
        }
        Action::Delete => delete::run(&arguments).map_err(|error| text::chain(&error)),
    };
    result.map(|()| ExitCode::SUCCESS)
}
