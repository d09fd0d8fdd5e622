//! Starting a process right where it belongs: in its cgroup and namespaces from its first
//! instruction (clone3(2)), with the descriptors that it is given and no others.
//!
//! A process that joins a cgroup later makes the kernel wait for every processor (an RCU grace
//! period, some 10 ms); one that is born in it does not.

use std::{
    ffi::{CString, OsStr},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, process::ExitStatusExt},
    },
    path::Path,
    process::ExitStatus,
    ptr,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{SigSet, SigmaskHow, pthread_sigmask},
};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

/// `CLONE_INTO_CGROUP` of linux/sched.h, which libc gives a type that is too short for it.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// How long a process may take to execve(2).
const DEADLINE: Duration = Duration::from_secs(20);

/// How long one may take to end that was killed because it did not.
const END_DEADLINE: Duration = Duration::from_secs(1);

/// A process to be. Its environment is empty, and its signals are neither blocked nor ignored.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// The executable.
    pub program: &'a Path,
    /// Its arguments, its own name first.
    pub arguments: &'a [&'a OsStr],
    /// The directory of its cgroup (v2); `None` leaves it where its parent is.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The namespaces that are made for it: `CLONE_NEWPID` and so on (namespaces(7)).
    pub namespaces: libc::c_int,
    /// Its descriptors, numbered from 0.
    pub descriptors: &'a [BorrowedFd<'a>],
}

/// A process that was started. Nobody else reaps it.
#[derive(Debug)]
pub struct Spawned {
    /// Its number, here.
    pub pid: Pid,
    /// It, whatever becomes of the number.
    pub pidfd: OwnedFd,
}

impl Spawn<'_> {
    /// Starts it, after `setup` in its place. An error of any step is returned, and nothing is left.
    ///
    /// # Safety
    ///
    /// `setup` runs in a copy of a process whose other threads are gone at whatever they were doing:
    /// it may make system calls, but not allocate or take a lock (signal-safety(7)).
    pub unsafe fn start(&self, setup: impl Fn() -> io::Result<()>) -> io::Result<Spawned> {
        // SAFETY: the caller's promise.
        unsafe { self.start_within(DEADLINE, setup) }
    }

    /// Likewise, with a deadline of its own.
    ///
    /// # Safety
    ///
    /// As for [`Spawn::start`].
    unsafe fn start_within(
        &self,
        deadline: Duration,
        setup: impl Fn() -> io::Result<()>,
    ) -> io::Result<Spawned> {
        let program = CString::new(self.program.as_os_str().as_bytes())?;
        let arguments = self
            .arguments
            .iter()
            .map(|word| CString::new(word.as_bytes()));
        let arguments = arguments.collect::<Result<Vec<_>, _>>()?;
        let mut argv: Vec<_> = arguments.iter().map(|word| word.as_ptr()).collect();
        argv.push(ptr::null());
        let mut copies = vec![-1; self.descriptors.len()];
        let (mut failure, report) = io::pipe()?;

        let mut pidfd: RawFd = -1;
        // SAFETY: a structure of plain integers.
        let mut request: libc::clone_args = unsafe { std::mem::zeroed() };
        request.pidfd = (&raw mut pidfd).expose_provenance() as u64;
        request.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
        request.flags = u64::from((libc::CLONE_PIDFD | self.namespaces).cast_unsigned());
        if let Some(cgroup) = self.cgroup {
            request.flags |= CLONE_INTO_CGROUP;
            request.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
        }
        // A handler of this process must not run in the child.
        let mut before = SigSet::empty();
        pthread_sigmask(
            SigmaskHow::SIG_SETMASK,
            Some(&SigSet::all()),
            Some(&mut before),
        )?;
        // SAFETY: without CLONE_VM this is fork(2). The child only makes system calls, on memory
        // that is allocated already, and never returns from here.
        let pid =
            unsafe { libc::syscall(libc::SYS_clone3, &raw const request, size_of_val(&request)) };
        if pid == 0 {
            let failed = setup()
                .and_then(|()| self.hand_over(&mut copies))
                .and_then(|()| unblock_signals())
                .map(|()| {
                    let environment = [ptr::null()];
                    // SAFETY: zero-terminated strings in zero-terminated lists.
                    unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), environment.as_ptr()) };
                    io::Error::last_os_error()
                });
            let (Ok(error) | Err(error)) = failed;
            let code = error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
            let _ = rustix::io::write(&report, &code);
            // SAFETY: it ends the child at once.
            unsafe { libc::_exit(127) }
        }
        let cloned = io::Error::last_os_error();
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
        drop(report);
        let raw = i32::try_from(pid).map_err(io::Error::other)?;
        let Some(pid) = Pid::from_raw(raw.max(0)) else {
            return Err(cloned);
        };
        // SAFETY: the kernel has just made it for this process.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        let spawned = Spawned { pid, pidfd };
        // There is something to read, or execve(2) has closed the other end.
        if let Err(error) = wait_readable(failure.as_fd(), deadline) {
            spawned.kill()?;
            // It is not waited for longer: who cannot execve(2) may be unable to die, too.
            wait_readable(spawned.pidfd.as_fd(), END_DEADLINE)?;
            spawned.wait()?;
            return Err(error);
        }
        let mut code = [0; 4];
        match failure.read_exact(&mut code) {
            Err(_) => Ok(spawned),
            Ok(()) => {
                spawned.wait()?;
                Err(io::Error::from_raw_os_error(i32::from_ne_bytes(code)))
            }
        }
    }

    /// Gives each descriptor its number, and lets no other survive execve(2).
    fn hand_over(&self, copies: &mut [RawFd]) -> io::Result<()> {
        let first_free = i32::try_from(copies.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // In two steps, since any of them may have another's number now.
        for (fd, copy) in self.descriptors.iter().zip(&mut *copies) {
            // SAFETY: fcntl(2) with plain integers makes a new descriptor.
            *copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD, first_free) };
            if *copy < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for (number, copy) in (0..).zip(copies) {
            // SAFETY: whatever had this number before is the parent's copy in this child, which goes
            // on to execve(2).
            if unsafe { libc::dup2(*copy, number) } != number {
                return Err(io::Error::last_os_error());
            }
        }
        // Marked rather than closed: a failure is reported through one of them.
        // SAFETY: close_range(2) takes plain integers.
        let marked = unsafe {
            libc::close_range(
                first_free.unsigned_abs(),
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC.cast_signed(),
            )
        };
        if marked != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

pub(crate) fn wait_readable(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<()> {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) if left.is_zero() => return Err(io::ErrorKind::TimedOut.into()),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// What execve(2) keeps of the parent's signals: what is blocked, and what is ignored, which in a Rust
/// program is SIGPIPE.
fn unblock_signals() -> io::Result<()> {
    // SAFETY: the default action is no function of this process.
    if unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(pthread_sigmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::empty()),
        None,
    )?)
}

impl Spawned {
    /// Sends SIGKILL. One that has ended is left alone.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for its end, which happens once, and reaps it.
    pub fn wait(&self) -> io::Result<ExitStatus> {
        loop {
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED) {
                Ok(Some(status)) => {
                    let exit = status.exit_status().map(|code| code << 8);
                    let signal = status.terminating_signal();
                    return Ok(ExitStatus::from_raw(exit.or(signal).unwrap_or_default()));
                }
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::process::ExitStatusExt};

    use super::*;

    fn shell(script: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<Spawned> {
        let words = ["sh", "-c", script].map(OsStr::new);
        let spawn = Spawn {
            program: Path::new("/bin/sh"),
            arguments: &words,
            cgroup: None,
            namespaces: 0,
            descriptors,
        };
        // SAFETY: it does nothing.
        unsafe { spawn.start(|| Ok(())) }
    }

    #[test]
    fn it_has_its_descriptors_and_nothing_else() {
        let (mut output, theirs) = io::pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        let _not_handed_over = null.try_clone().unwrap();
        let descriptors = [null.as_fd(), theirs.as_fd(), null.as_fd(), null.as_fd()];
        let script = "ls /proc/self/fd | wc -l; export -p | grep -vw PWD";
        let child = shell(script, &descriptors).unwrap();
        child.wait().unwrap();
        drop(theirs);
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        // The four and the directory that ls reads; no variable but the shell's own.
        assert_eq!(text, "5\n");
    }

    #[test]
    fn its_end_is_told() {
        assert_eq!(
            shell("exit 7", &[]).unwrap().wait().unwrap().code(),
            Some(7)
        );
        let child = shell("exec sleep 1000", &[]).unwrap();
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        child.kill().unwrap();
    }

    #[test]
    fn one_that_never_starts_is_ended() {
        let (held, theirs) = io::pipe().unwrap();
        let spawn = Spawn {
            program: Path::new("/bin/true"),
            arguments: &[OsStr::new("true")],
            cgroup: None,
            namespaces: 0,
            descriptors: &[],
        };
        let wait = || {
            // SAFETY: it takes no arguments.
            unsafe { libc::pause() };
            Ok(())
        };
        // SAFETY: only a system call.
        let error = unsafe { spawn.start_within(Duration::from_millis(50), wait) }.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // It is gone, with what it had inherited.
        drop(theirs);
        assert_eq!(io::read_to_string(held).unwrap(), "");
    }

    #[test]
    fn what_cannot_start_is_an_error() {
        let missing = Spawn {
            program: Path::new("/no/such/program"),
            arguments: &[OsStr::new("program")],
            cgroup: None,
            namespaces: 0,
            descriptors: &[],
        };
        // SAFETY: it does nothing.
        let error = unsafe { missing.start(|| Ok(())) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        // SAFETY: it does nothing else.
        let error = unsafe { missing.start(|| Err(io::Error::from_raw_os_error(libc::EPERM))) };
        assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::EPERM));
        // SAFETY: as above.
        let no_cgroup = unsafe {
            Spawn {
                cgroup: Some(File::open("/dev/null").unwrap().as_fd()),
                ..missing
            }
            .start(|| Ok(()))
        };
        assert!(no_cgroup.is_err());
    }
}
