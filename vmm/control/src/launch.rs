//! How the VMM's process is started: the descriptors it inherits, and nothing else.

use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
};

use rustix::{
    io::Errno,
    process::getpid,
    thread::{CoreSchedulingScope, core_scheduling_cookie, create_core_scheduling_cookie},
};

use crate::{Channel, IdRange, UserNamespace, in_new_pid_namespace};

/// Descriptor of the VMM's end of the control socket.
pub const CONTROL_FD: i32 = 3;

/// Descriptor of the user namespace that the VMM joins.
pub const USER_NAMESPACE_FD: i32 = 4;

/// The first descriptor that is not handed over.
pub const FIRST_FREE_FD: i32 = 5;

/// What a VMM inherits.
#[derive(Debug)]
pub struct Launch {
    /// Its end of the control socket.
    pub control: Channel,
    /// The user namespace that it joins.
    pub user_namespace: OwnedFd,
    /// `cgroup.procs` of its cgroup, open for writing; `None` leaves it where its parent is.
    pub cgroup: Option<File>,
    /// Its OOM preference; `None` keeps its parent's.
    pub oom_score_adj: Option<i32>,
    /// While it runs on a core, the core's other hardware threads run nothing but it
    /// (core-scheduling.rst).
    pub own_cores: bool,
}

impl Launch {
    /// Arranges for the command's process to have these descriptors under their numbers, nothing
    /// else but `stderr`, no environment, its cgroup and OOM preference from the start, and to die
    /// with the thread that starts it. Start it by [`crate::in_new_pid_namespace`].
    pub fn prepare(self, command: &mut Command, stderr: Stdio) {
        command
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        let inherited = [
            (OwnedFd::from(self.control), CONTROL_FD),
            (self.user_namespace, USER_NAMESPACE_FD),
        ];
        let oom_score_adj = self.oom_score_adj.map(|value| value.to_string());
        let cgroup = self.cgroup;
        let own_cores = self.own_cores;
        let setup = move || -> io::Result<()> {
            if own_cores {
                // Threads inherit it from here on.
                create_core_scheduling_cookie(getpid(), CoreSchedulingScope::Thread)?;
            }
            if let Some(mut procs) = cgroup.as_ref() {
                procs.write_all(b"0")?;
            }
            if let Some(value) = &oom_score_adj {
                // A lower value than the parent's own needs a capability that a nested root lacks;
                // the inherited one does then.
                let _ = std::fs::write("/proc/self/oom_score_adj", value);
            }
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            hand_over(&inherited)
        };
        // SAFETY: the closure makes only system calls, and allocates nothing: a path as short as
        // the one above is put together on the stack.
        unsafe { command.pre_exec(setup) };
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
pub fn spawn_alone(mut command: Command, control: Channel, stderr: Stdio) -> io::Result<Child> {
    let namespace = UserNamespace::create(IDS_ALONE).map_err(io::Error::other)?;
    let launch = Launch {
        control,
        user_namespace: namespace.as_fd().try_clone_to_owned()?,
        cgroup: None,
        oom_score_adj: None,
        own_cores: false,
    };
    launch.prepare(&mut command, stderr);
    in_new_pid_namespace(|| command.spawn())
}

/// Gives each descriptor its number, and lets no other survive execve(2).
fn hand_over(inherited: &[(OwnedFd, RawFd); 2]) -> io::Result<()> {
    // In two steps, since any of them may have another's number now.
    let mut above = [-1; 2];
    for ((fd, _), copy) in inherited.iter().zip(&mut above) {
        // SAFETY: fcntl(2) with plain integers makes a new descriptor.
        *copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD, FIRST_FREE_FD) };
        if *copy < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    for ((_, number), copy) in inherited.iter().zip(above) {
        // SAFETY: whatever had this number before is the parent's copy in this child, which goes
        // on to execve(2).
        if unsafe { libc::dup2(copy, *number) } != *number {
            return Err(io::Error::last_os_error());
        }
    }
    // The others are marked rather than closed: std reports a failed execve through a descriptor of
    // its own.
    // SAFETY: close_range(2) takes plain integers.
    let marked = unsafe {
        libc::close_range(
            FIRST_FREE_FD.unsigned_abs(),
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC.cast_signed(),
        )
    };
    if marked != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
