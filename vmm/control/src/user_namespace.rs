//! The user namespace of a pod: the host's ids that its VMM has, and that its files are shown by.

use std::{
    fmt, fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::unistd::{Pid, pipe2};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use thiserror::Error;

/// A range of user ids and of the group ids with the same numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The host's id that is 0 in the namespace.
    pub first: u32,
    /// How many there are.
    pub count: u32,
}

impl IdRange {
    /// Its ids, counted from 0.
    fn map(self) -> IdMap {
        IdMap {
            inside: 0,
            outside: self.first,
            count: self.count,
        }
    }
}

/// Ids of a user namespace and the host's ids that they stand for, or ids on a disk and the host's
/// ids by which an idmapped mount shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdMap {
    /// The first id inside, or on the disk.
    pub inside: u32,
    /// The first id of the host.
    pub outside: u32,
    /// How many there are.
    pub count: u32,
}

impl fmt::Display for IdMap {
    /// A line of `uid_map` (user_namespaces(7)).
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {} {}", self.inside, self.outside, self.count)
    }
}

/// A namespace that could not be made.
#[derive(Debug, Error)]
pub enum UserNamespaceError {
    /// There is no process to make it.
    #[error("Cannot create a user namespace")]
    Create(#[source] io::Error),
    /// The ids cannot be mapped.
    #[error("Cannot map ids {ids:?} in a user namespace")]
    Map {
        /// The content of `uid_map` or `gid_map`.
        ids: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// The user namespace of a pod, with nobody in it. It lasts as long as it is referred to.
#[derive(Debug)]
pub struct UserNamespace {
    fd: OwnedFd,
    range: IdRange,
}

impl UserNamespace {
    /// Makes a namespace in which the ids of `range` are 0 and up. Needs `CAP_SETUID` and
    /// `CAP_SETGID`.
    pub fn create(range: IdRange) -> Result<Self, UserNamespaceError> {
        let fd = namespace_with(&[range.map()], &[range.map()])?;
        Ok(Self { fd, range })
    }

    /// The ids that it maps.
    pub fn range(&self) -> IdRange {
        self.range
    }
}

/// Makes a user namespace with these users and groups and nobody in it, by which a mount may show
/// its files. Needs `CAP_SETUID` and `CAP_SETGID`.
pub fn namespace_with(users: &[IdMap], groups: &[IdMap]) -> Result<OwnedFd, UserNamespaceError> {
    let failed = |errno: nix::Error| UserNamespaceError::Create(errno.into());
    // A namespace is made by a process in it; this one does nothing else.
    let (end, wait) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(failed)?;
    let (child, pidfd) = first_process(&end, &wait).map_err(failed)?;
    drop(end);
    let made = map(child, users, groups);
    drop(wait);
    // It ends at once now. Who reaps all of this process's children may be quicker.
    let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
    made
}

fn map(child: Pid, users: &[IdMap], groups: &[IdMap]) -> Result<OwnedFd, UserNamespaceError> {
    for (file, maps) in [("uid_map", users), ("gid_map", groups)] {
        let ids: String = maps.iter().map(|map| format!("{map}\n")).collect();
        fs::write(format!("/proc/{child}/{file}"), &ids)
            .map_err(|source| UserNamespaceError::Map { ids, source })?;
    }
    let namespace = fs::File::open(format!("/proc/{child}/ns/user"));
    Ok(namespace.map_err(UserNamespaceError::Create)?.into())
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Starts a process in a new user namespace, which ends when the writing end of the pipe is closed.
fn first_process(end: &OwnedFd, wait: &OwnedFd) -> nix::Result<(Pid, OwnedFd)> {
    let flags = libc::CLONE_NEWUSER | libc::CLONE_PIDFD | libc::SIGCHLD;
    let mut pidfd: RawFd = -1;
    // SAFETY: without CLONE_VM and with a null stack this is fork(2). The child makes nothing but
    // system calls.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) };
    if child != 0 {
        let child = i32::try_from(nix::errno::Errno::result(child)?);
        let child = child.map_err(|_| nix::Error::ESRCH)?;
        // SAFETY: the kernel has just made it for this process.
        return Ok((Pid::from_raw(child), unsafe { OwnedFd::from_raw_fd(pidfd) }));
    }
    let mut byte = 0_u8;
    // SAFETY: plain system calls of the child, on descriptors that it has inherited and into its
    // own memory. Its own copy of the writing end would keep the pipe open.
    unsafe {
        libc::close(wait.as_raw_fd());
        libc::read(end.as_raw_fd(), (&raw mut byte).cast(), 1);
        libc::_exit(0)
    }
}
