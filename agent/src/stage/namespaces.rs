//! New namespaces for a container, and those of a container for another process.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};

use super::StageError;

// include/uapi/linux/sched.h; libc has them as narrower integers.
const CLONE_PIDFD: u64 = 0x0000_1000;
const CLONE_PARENT: u64 = 0x0000_8000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` of clone3(2).
#[derive(Default)]
#[repr(C, align(8))]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// On which side of [`spawn`] this process is.
pub enum Cloned {
    /// The stage.
    Parent {
        /// The new process, as PID 1 of the guest sees it.
        pid: i32,
        /// The new process.
        pidfd: OwnedFd,
    },
    /// The new process.
    Child,
}

/// Whether the spec wants a namespace of its own of that kind.
pub fn has(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_deref());
    namespaces
        .unwrap_or_default()
        .iter()
        .any(|namespace| namespace.typ() == kind)
}

/// Flags for a new container. Its cgroup namespace is made later, from inside the cgroup.
pub fn to_create(spec: &Spec) -> u64 {
    let flags = [
        (LinuxNamespaceType::Pid, libc::CLONE_NEWPID),
        (LinuxNamespaceType::Mount, libc::CLONE_NEWNS),
        (LinuxNamespaceType::Ipc, libc::CLONE_NEWIPC),
        (LinuxNamespaceType::Uts, libc::CLONE_NEWUTS),
        (LinuxNamespaceType::Network, libc::CLONE_NEWNET),
    ];
    let wanted = flags.into_iter().filter(|(kind, _)| has(spec, *kind));
    wanted.fold(0, |all, (_, flag)| all | u64::from(flag.unsigned_abs()))
}

/// Joins every namespace of the container but that of its cgroups, for the child that follows.
/// From inside a cgroup namespace a child cannot be born in a cgroup of it, as this process's own
/// cgroup is outside.
pub fn join(init: BorrowedFd<'_>) -> Result<(), StageError> {
    let all = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::NETWORK;
    rustix::thread::move_into_thread_name_spaces(init, all)
        .map_err(StageError::system("join the container's namespaces"))
}

/// Joins the container's cgroup namespace.
pub fn join_cgroup(init: BorrowedFd<'_>) -> Result<(), StageError> {
    rustix::thread::move_into_thread_name_spaces(init, ThreadNameSpaceType::CONTROL_GROUP)
        .map_err(StageError::system("join the container's cgroup namespace"))
}

/// A cgroup namespace rooted at this process's cgroup.
pub fn unshare_cgroup() -> Result<(), StageError> {
    // SAFETY: a cgroup namespace of its own shares no descriptors and no memory with anything.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) }
        .map_err(StageError::system("make a cgroup namespace"))
}

/// Makes the process, in the cgroup from its first instruction, as a child of PID 1.
pub fn spawn(flags: u64, cgroup: BorrowedFd<'_>) -> Result<Cloned, StageError> {
    let mut pidfd: libc::c_int = -1;
    let arguments = CloneArguments {
        flags: flags | CLONE_PIDFD | CLONE_PARENT | CLONE_INTO_CGROUP,
        pidfd: (&raw mut pidfd) as u64,
        cgroup: u64::from(cgroup.as_raw_fd().unsigned_abs()),
        ..CloneArguments::default()
    };
    // SAFETY: without CLONE_VM and without a stack the child is a copy of this single-threaded
    // process, as after fork(2); the arguments point to `pidfd`, which outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<CloneArguments>(),
        )
    };
    match result {
        0 => Ok(Cloned::Child),
        pid if pid > 0 => {
            // SAFETY: the kernel stored a new descriptor here that nothing else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid)
                .map_err(io::Error::other)
                .map_err(StageError::system("read the new pid"))?;
            Ok(Cloned::Parent { pid, pidfd })
        }
        _ => Err(StageError::system("make the container's process")(
            io::Error::last_os_error(),
        )),
    }
}
