//! The user namespace of a pod: the host's ids that its VMM has, and that its files are shown by.

use std::{
    fmt, fs, io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

use nix::{
    sys::socket::{AddressFamily, SockFlag, SockType, socketpair},
    unistd::Pid,
};
use rustix::{
    io::retry_on_intr,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg,
        sockopt::{Timeout, set_socket_timeout},
    },
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
};
use thiserror::Error;

/// For a new process to open a file.
const DEADLINE: Duration = Duration::from_secs(30);

/// Bytes of a descriptor in a message.
const FD_LEN: u32 = 4;

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
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(failed)?;
    // A namespace is made by a process in it; this one does nothing else.
    let (child, pidfd) = first_process(&ours, &theirs).map_err(failed)?;
    drop(theirs);
    let made = receive(ours.as_fd())
        .map_err(UserNamespaceError::Create)
        .and_then(|namespace| {
            map(child, users, groups)?;
            Ok(namespace)
        });
    drop(ours);
    // It has no more to do. Who reaps all of this process's children may be quicker.
    let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    let _ = retry_on_intr(|| waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED));
    made
}

fn map(child: Pid, users: &[IdMap], groups: &[IdMap]) -> Result<(), UserNamespaceError> {
    for (file, maps) in [("uid_map", users), ("gid_map", groups)] {
        let ids: String = maps.iter().map(|map| format!("{map}\n")).collect();
        fs::write(format!("/proc/{child}/{file}"), &ids)
            .map_err(|source| UserNamespaceError::Map { ids, source })?;
    }
    Ok(())
}

/// Takes the namespace from the process in it: whoever is not dumpable hides those of its children
/// in /proc, even from itself.
fn receive(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    set_socket_timeout(socket, Timeout::Recv, Some(DEADLINE))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    // A receive with a deadline is not restarted after a signal (signal(7)), as of a child's end.
    retry_on_intr(|| {
        let mut data = [io::IoSliceMut::new(&mut byte)];
        recvmsg(socket, &mut data, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut messages = ancillary.drain();
    let received = messages.find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    received.ok_or_else(|| io::Error::other("the first process in it has ended"))
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A message with one descriptor, unix(7).
#[repr(C)]
struct Rights {
    header: libc::cmsghdr,
    fd: RawFd,
}

/// Starts a process in a new user namespace. It sends the namespace over `theirs`, and ends when
/// `ours` is closed.
fn first_process(ours: &OwnedFd, theirs: &OwnedFd) -> nix::Result<(Pid, OwnedFd)> {
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
    let mut data = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // SAFETY: plain system calls of the child, on descriptors that it has inherited and its own
    // memory: the message points to `data` and `rights`, which say their own lengths. Its own copy
    // of the other end would keep the connection open.
    unsafe {
        libc::close(ours.as_raw_fd());
        let path = c"/proc/self/ns/user";
        let mut rights = Rights {
            header: libc::cmsghdr {
                cmsg_len: libc::CMSG_LEN(FD_LEN) as usize,
                cmsg_level: libc::SOL_SOCKET,
                cmsg_type: libc::SCM_RIGHTS,
            },
            fd: libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC),
        };
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut data;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut rights).cast();
        message.msg_controllen = size_of::<Rights>();
        if libc::sendmsg(theirs.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) == 1 {
            libc::read(theirs.as_raw_fd(), (&raw mut byte).cast(), 1);
        }
        libc::_exit(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_read_as_the_kernel_wants_them() {
        let range = IdRange {
            first: 1000,
            count: 10,
        };
        assert_eq!(range.map().to_string(), "0 1000 10");
    }

    #[test]
    fn signals_disturb_nothing() {
        use std::{
            sync::atomic::{AtomicBool, Ordering},
            thread,
        };

        use nix::sys::{
            pthread::{pthread_kill, pthread_self},
            signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
        };

        extern "C" fn nothing(_: libc::c_int) {}
        let handler = SigHandler::Handler(nothing);
        let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing.
        unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
        let (disturbed, done) = (pthread_self(), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    pthread_kill(disturbed, Signal::SIGUSR1).unwrap();
                    thread::yield_now();
                }
            });
            let range = IdRange {
                first: 5000,
                count: 3,
            }
            .map();
            let made: Vec<_> = (0..50)
                .map(|_| namespace_with(&[range], &[range]))
                .collect();
            done.store(true, Ordering::Relaxed);
            for namespace in made {
                namespace.unwrap();
            }
        });
    }

    #[test]
    fn a_namespace_has_its_ids_also_for_who_is_not_dumpable() {
        use rustix::process::{DumpableBehavior, set_dumpable_behavior};
        let map = |inside, outside| IdMap {
            inside,
            outside,
            count: 3,
        };
        set_dumpable_behavior(DumpableBehavior::NotDumpable).unwrap();
        let made = namespace_with(&[map(0, 5000), map(10, 6000)], &[map(0, 7000)]);
        set_dumpable_behavior(DumpableBehavior::Dumpable).unwrap();
        made.unwrap();
        let error = namespace_with(&[map(0, 1), map(1, 1)], &[map(0, 1)]).unwrap_err();
        assert!(matches!(error, UserNamespaceError::Map { .. }), "{error}");
    }
}
