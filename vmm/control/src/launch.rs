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

#[cfg(test)]
mod tests {
    use std::{
        env, fs,
        os::fd::{AsRawFd, FromRawFd, OwnedFd},
        path::PathBuf,
        sync::mpsc,
        thread,
        time::Duration,
    };

    use super::*;
    use crate::spawn::wait_readable;

    /// A request for core scheduling, and who made it.
    #[derive(Debug, PartialEq, Eq)]
    struct Request {
        /// What is asked, of whom, and for what: prctl(2)'s second to fifth argument.
        arguments: [u64; 4],
        pid: u32,
        program: PathBuf,
    }

    /// Has requests of this thread, and of what it starts, for core scheduling answered by who reads
    /// from the descriptor (seccomp_unotify(2)).
    fn intercept() -> OwnedFd {
        let code = |code: u32| u16::try_from(code).unwrap();
        let load = code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS);
        let equal = code(libc::BPF_JMP | libc::BPF_JEQ);
        let answer = code(libc::BPF_RET);
        let prctl = u32::try_from(libc::SYS_prctl).unwrap();
        let which = libc::PR_SCHED_CORE.unsigned_abs();
        // SAFETY: they only fill in a structure.
        let mut program = unsafe {
            [
                libc::BPF_STMT(load, 0),
                libc::BPF_JUMP(equal, prctl, 0, 3),
                // The low half of the first argument.
                libc::BPF_STMT(load, 16),
                libc::BPF_JUMP(equal, which, 0, 1),
                libc::BPF_STMT(answer, libc::SECCOMP_RET_USER_NOTIF),
                libc::BPF_STMT(answer, libc::SECCOMP_RET_ALLOW),
            ]
        };
        let filter = libc::sock_fprog {
            len: 6,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: plain integers, and a program that the kernel copies.
        let listener = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
                &raw const filter,
            )
        };
        let listener = i32::try_from(listener).unwrap();
        assert!(listener >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the kernel has just made it.
        unsafe { OwnedFd::from_raw_fd(listener) }
    }

    /// Answers one of them with this error, 0 for success.
    fn answer(listener: &OwnedFd, error: i32) -> Request {
        // SAFETY: structures of plain integers.
        let (mut asked, mut answer): (libc::seccomp_notif, libc::seccomp_notif_resp) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        let fd = listener.as_raw_fd();
        wait_readable(listener.as_fd(), Duration::from_secs(20)).unwrap();
        // SAFETY: the kernel fills in the structure.
        let received = unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut asked) };
        assert_eq!(received, 0, "{}", io::Error::last_os_error());
        let [_, arguments @ .., _] = asked.data.args;
        let request = Request {
            arguments,
            pid: asked.pid,
            program: fs::read_link(format!("/proc/{}/exe", asked.pid)).unwrap(),
        };
        (answer.id, answer.error) = (asked.id, -error);
        // SAFETY: the kernel reads the structure.
        let sent = unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
        assert_eq!(sent, 0, "{}", io::Error::last_os_error());
        request
    }

    /// Does work that asks once for core scheduling, which is answered here instead of by a kernel that
    /// may not have it.
    fn answered<T: Send + 'static>(
        error: i32,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> (T, Request) {
        let (sender, listeners) = mpsc::channel();
        let worker = thread::spawn(move || {
            sender.send(intercept()).unwrap();
            work()
        });
        let request = answer(&listeners.recv().unwrap(), error);
        (worker.join().unwrap(), request)
    }

    /// Starts `true` as a VMM with cores of its own; returns its process id and exit code.
    fn launch() -> io::Result<(u32, Option<i32>)> {
        let (_, control) = Channel::pair().unwrap();
        let null = File::open("/dev/null")?;
        let launch = Launch {
            control: &control,
            user_namespace: &UserNamespace::create(IDS_ALONE).unwrap(),
            stderr: null.as_fd(),
            cgroup: None,
            oom_score_adj: None,
            own_cores: true,
        };
        let vmm = launch.spawn(Path::new("/bin/true"))?;
        let pid = vmm.pid.as_raw_nonzero().get().unsigned_abs();
        Ok((pid, vmm.wait()?.code()))
    }

    #[test]
    fn a_vmm_has_cores_of_its_own_before_its_first_instruction() {
        let (vmm, request) = answered(0, launch);
        let (pid, code) = vmm.unwrap();
        assert_eq!(code, Some(0));
        let create = libc::PR_SCHED_CORE_CREATE.unsigned_abs().into();
        let thread = libc::PR_SCHED_CORE_SCOPE_THREAD.unsigned_abs().into();
        let expected = Request {
            // It is the first process of its namespace.
            arguments: [create, 1, thread, 0],
            pid,
            // Not its own yet.
            program: env::current_exe().unwrap(),
        };
        assert_eq!(request, expected);
    }

    #[test]
    fn a_vmm_that_gets_no_cores_of_its_own_does_not_start() {
        let (vmm, _) = answered(libc::ENOMEM, launch);
        assert_eq!(vmm.unwrap_err().raw_os_error(), Some(libc::ENOMEM));
    }

    #[test]
    fn whether_cores_are_shared_is_asked_of_the_kernel() {
        let asked = |error| answered(error, needs_core_scheduling).0;
        assert!(asked(0).unwrap());
        assert!(!asked(libc::ENODEV).unwrap());
        let unknown = asked(libc::EINVAL).unwrap_err();
        assert_eq!(unknown.raw_os_error(), Some(libc::EINVAL));
    }
}
