//! What system calls this process may make (seccomp(2)): little, and each thread only its part.
//!
//! The policy is `seccomp.json`, compiled with the program. There are two phases. [`Filter::Setup`]
//! goes in at the start and holds for the whole process. Before the guest runs, each thread adds a
//! filter of its own, which takes away what only building a VM needs. Filters stack: a call must
//! pass all of its thread's.
//!
//! A call that no rule allows is not made. The process reports it and ends: see [`violation`].

pub mod violation;

use std::{io, thread};

use seccompiler::{apply_filter, sock_filter};
use thiserror::Error;

/// Failures to restrict system calls. The process must not go on without.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// malloc may come to read files, which a filter forbids.
    #[error("Cannot limit the allocator to one arena")]
    Arenas,
    /// The handler of violations.
    #[error("Cannot install the handler that reports forbidden system calls")]
    Handler(#[source] io::Error),
    /// The kernel did not take a filter.
    #[error("Cannot restrict the system calls of {filter:?}")]
    Install {
        /// Which filter.
        filter: Filter,
        /// What prctl(2) or seccomp(2) said.
        #[source]
        source: seccompiler::Error,
    },
}

/// The system calls of one kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// All threads, from the start of the process: what building a VM needs, and whatever the
    /// other filters allow.
    Setup,
    /// The main thread of a running VM: the control socket.
    Main,
    /// A vCPU.
    Vcpu,
    /// The devices that never wait.
    Devices,
    /// A thread that serves files.
    Fs,
    /// A thread of the network devices.
    Net,
}

mod compiled {
    use seccompiler::sock_filter;

    include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));
}

impl Filter {
    /// Restricts the calling thread, and the threads that it starts, for good.
    ///
    /// [`Self::Setup`] is for the process's only thread. It also does once what the others rely on:
    /// it installs the handler of violations and keeps the allocator from reading files.
    pub fn install(self) -> Result<(), SeccompError> {
        if self == Self::Setup {
            one_arena()?;
            violation::install_handler().map_err(SeccompError::Handler)?;
        }
        violation::remember_thread(thread::current().name());
        // This sets PR_SET_NO_NEW_PRIVS too.
        apply_filter(self.program()).map_err(|source| SeccompError::Install {
            filter: self,
            source,
        })
    }

    /// The compiled filter.
    pub fn program(self) -> &'static [sock_filter] {
        match self {
            Self::Setup => compiled::SETUP,
            Self::Main => compiled::MAIN,
            Self::Vcpu => compiled::VCPU,
            Self::Devices => compiled::DEVICES,
            Self::Fs => compiled::FS,
            Self::Net => compiled::NET,
        }
    }
}

/// Makes all threads allocate from one heap. With several, glibc reads how many processors there
/// are before it makes the ninth, and the kernel's overcommit policy when one first shrinks. Both
/// are files, opened by whichever thread it happens to be.
fn one_arena() -> Result<(), SeccompError> {
    // SAFETY: changes a setting of the allocator.
    match unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } {
        1 => Ok(()),
        _ => Err(SeccompError::Arenas),
    }
}
