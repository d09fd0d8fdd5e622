//! How the VMM's process is started: the descriptors it inherits, and nothing else.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::{Errno, write},
    process::{Signal, getpid, set_parent_process_death_signal},
    thread::{CoreSchedulingScope, core_scheduling_cookie, create_core_scheduling_cookie},
};

use crate::{
    Channel, IdRange, UserNamespace,
    spawn::{Spawn, Spawned},
};

/// Descriptor of the VMM's end of the control socket.
pub const CONTROL_FD: i32 = 3;

/// Descriptor of the user namespace that the VMM joins.
pub const USER_NAMESPACE_FD: i32 = 4;

/// The first descriptor that is not handed over.
pub const FIRST_FREE_FD: i32 = 5;

/// What a VMM inherits.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Its end of the control socket.
    pub control: &'a Channel,
    /// The user namespace that it joins.
    pub user_namespace: &'a UserNamespace,
    /// Its standard error.
    pub stderr: BorrowedFd<'a>,
    /// The directory of its cgroup; `None` leaves it where its parent is.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Its OOM preference; `None` keeps its parent's.
    pub oom_score_adj: Option<i32>,
    /// While it runs on a core, the core's other hardware threads run nothing but it
    /// (core-scheduling.rst).
    pub own_cores: bool,
}

impl Launch<'_> {
    /// Starts a VMM with these descriptors under their numbers and nothing else, no environment, its
    /// cgroup and OOM preference from the start, first in PID and time namespaces of its own. It dies
    /// with the thread that starts it.
    pub fn spawn(&self, program: &Path) -> io::Result<Spawned> {
        // SAFETY: it does nothing.
        unsafe { self.spawn_after(program, || Ok(())) }
    }

    /// Likewise, after `setup` in its process.
    ///
    /// # Safety
    ///
    /// `setup` may make system calls, but not allocate or take a lock.
    unsafe fn spawn_after(
        &self,
        program: &Path,
        setup: impl Fn() -> io::Result<()>,
    ) -> io::Result<Spawned> {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let spawn = Spawn {
            program,
            arguments: &[program.as_os_str()],
            cgroup: self.cgroup,
            namespaces: libc::CLONE_NEWPID | libc::CLONE_NEWTIME,
            // In the order of `CONTROL_FD` and `USER_NAMESPACE_FD`.
            descriptors: &[
                null.as_fd(),
                null.as_fd(),
                self.stderr,
                self.control.as_fd(),
                self.user_namespace.as_fd(),
            ],
        };
        let oom_score_adj = self.oom_score_adj.map(|value| value.to_string());
        let prepare = || -> io::Result<()> {
            if self.own_cores {
                // Threads inherit it from here on.
                create_core_scheduling_cookie(getpid(), CoreSchedulingScope::Thread)?;
            }
            if let Some(value) = &oom_score_adj {
                let file = openat(
                    CWD,
                    c"/proc/self/oom_score_adj",
                    OFlags::WRONLY,
                    Mode::empty(),
                )?;
                // A lower value than the parent's own needs a capability that a nested root lacks;
                // the inherited one does then.
                let _ = write(&file, value.as_bytes());
            }
            set_parent_process_death_signal(Some(Signal::KILL))?;
            setup()
        };
        // SAFETY: only system calls, on strings that are made already.
        unsafe { spawn.start(prepare) }
    }
}

/// Whether there is somebody to keep off a VMM's cores: without hardware threads that share a core
/// there is not. Fails with `EINVAL` when the kernel has no core scheduling (`CONFIG_SCHED_CORE`).
pub fn needs_core_scheduling() -> io::Result<bool> {
    match core_scheduling_cookie(getpid(), CoreSchedulingScope::Thread) {
        Ok(_) => Ok(true),
        Err(Errno::NODEV) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// The ids of a VMM that is started without a shim: no pod has them by default.
pub const IDS_ALONE: IdRange = IdRange {
    first: 0x6fff_0000,
    count: 0x1_0000,
};

/// Starts a VMM without a shim, for tools and tests: with [`IDS_ALONE`], and where this process is.
pub fn spawn_alone(
    program: &Path,
    control: &Channel,
    stderr: BorrowedFd<'_>,
) -> io::Result<Spawned> {
    // SAFETY: it does nothing.
    unsafe { spawn_alone_after(program, control, stderr, || Ok(())) }
}

/// Likewise, after `setup` in its process.
///
/// # Safety
///
/// `setup` may make system calls, but not allocate or take a lock.
pub unsafe fn spawn_alone_after(
    program: &Path,
    control: &Channel,
    stderr: BorrowedFd<'_>,
    setup: impl Fn() -> io::Result<()>,
) -> io::Result<Spawned> {
    let user_namespace = UserNamespace::create(IDS_ALONE).map_err(io::Error::other)?;
    let launch = Launch {
        control,
        user_namespace: &user_namespace,
        stderr,
        cgroup: None,
        oom_score_adj: None,
        own_cores: false,
    };
    // SAFETY: the caller's promise.
    unsafe { launch.spawn_after(program, setup) }
}
