//! `start`: gives containerd the address of the pod's shim, and forks it if there is none.

use std::{
    env,
    fs::{self, File},
    io::{self, Write},
    os::fd::AsRawFd,
    process::ExitCode,
};

use nix::{
    errno::Errno,
    unistd::{ForkResult, fork, setsid},
};
use serde::Serialize;
use thiserror::Error;

use crate::{
    address::{Address, AddressError, Claim},
    args::Arguments,
    daemon::{self, Daemon},
    options::{Options, OptionsError},
    spec::{Spec, SpecError},
};

/// The highest OOM score adjustment (proc_pid_oom_score_adj(5)).
const MAX_OOM_SCORE_ADJ: i32 = 1000;

/// Why no shim was started.
#[derive(Debug, Error)]
pub enum StartError {
    /// The bundle is unusable.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The socket is unusable.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// containerd's options are unusable.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The working directory is unknown.
    #[error("Cannot find the bundle's directory")]
    Bundle(#[source] io::Error),
    /// No new process.
    #[error("Cannot fork the shim's daemon")]
    Fork(#[source] Errno),
    /// containerd does not listen.
    #[error("Cannot write the address")]
    Write(#[source] io::Error),
}

/// What containerd reads from standard output. Version 2 is what every containerd from 1.7 on
/// handles in full.
#[derive(Serialize)]
struct Bootstrap {
    version: u8,
    address: String,
    protocol: &'static str,
}

/// Runs `start` in the bundle. Returns in the caller with the address written, and in the daemon
/// when the pod is no more.
pub fn run(arguments: &Arguments, started_ns: u64) -> Result<ExitCode, StartError> {
    let bundle = env::current_dir().map_err(StartError::Bundle)?;
    let options = Options::receive(&bundle)?;
    let spec = Spec::read_if_there(&bundle)?;
    let group = match &spec {
        Some(spec) => spec.group(&arguments.id)?,
        None => arguments.id.clone(),
    };
    let address = Address::new(&arguments.address, &arguments.namespace, &group);
    if let Claim::Ours(listener) = address.claim()? {
        // SAFETY: there is one thread.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                detach();
                let settings = Daemon {
                    namespace: arguments.namespace.clone(),
                    id: arguments.id.clone(),
                    group,
                    options,
                    bundle,
                    debug: arguments.debug,
                    started_ns,
                    address,
                };
                return Ok(daemon::run(settings, spec.as_ref(), listener));
            }
            Ok(ForkResult::Parent { .. }) => {}
            Err(errno) => {
                // Nobody will serve it.
                let _ = address.remove();
                return Err(StartError::Fork(errno));
            }
        }
    }
    address.write(&bundle)?;
    print(&address)
}

fn print(address: &Address) -> Result<ExitCode, StartError> {
    let bootstrap = Bootstrap {
        version: 2,
        address: address.url(),
        protocol: "ttrpc",
    };
    let text = serde_json::to_vec(&bootstrap).map_err(|error| StartError::Write(error.into()))?;
    io::stdout().write_all(&text).map_err(StartError::Write)?;
    Ok(ExitCode::SUCCESS)
}

/// Leaves everything of the caller's: containerd waits until the standard streams are closed, and
/// signals to its process group are not for the shim.
fn detach() {
    // Fails for the leader of a group only, which a fork's child is not.
    let _ = setsid();
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        for number in 0..3 {
            // SAFETY: plain integers. Nobody holds the standard streams as owned descriptors.
            unsafe { libc::dup2(null.as_raw_fd(), number) };
        }
    }
    // The kernel should rather end a shim than containerd, whose value this process has so far.
    const SCORE: &str = "/proc/self/oom_score_adj";
    if let Some(score) = fs::read_to_string(SCORE)
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok())
    {
        let score = (score + 1).min(MAX_OOM_SCORE_ADJ);
        let _ = fs::write(SCORE, score.to_string());
    }
}
