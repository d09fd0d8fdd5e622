//! New namespaces for a container, and those of a container for another process.

use std::{
    fs,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};

use super::{
    StageError,
    protocol::{IdMappings, NamespaceFlags},
};

// include/uapi/linux/sched.h; libc has them as narrower integers.
const CLONE_PIDFD: u64 = 0x0000_1000;
const CLONE_PARENT: u64 = 0x0000_8000;
const CLONE_NEWUSER: u64 = 0x1000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `PIDFD_GET_CGROUP_NAMESPACE`, include/uapi/linux/pidfd.h.
const PIDFD_GET_CGROUP_NAMESPACE: libc::Ioctl = 0xff01;

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

/// Whether the spec wants a namespace of that kind, a new one or another's.
pub fn has(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_deref());
    namespaces
        .unwrap_or_default()
        .iter()
        .any(|namespace| namespace.typ() == kind)
}

/// The flag for a kind of namespace.
pub fn flag(kind: LinuxNamespaceType) -> NamespaceFlags {
    let flag = match kind {
        LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
        LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
        LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
        LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
        LinuxNamespaceType::Network => libc::CLONE_NEWNET,
        LinuxNamespaceType::User => libc::CLONE_NEWUSER,
        LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
        LinuxNamespaceType::Time => libc::CLONE_NEWTIME,
    };
    flag.cast_unsigned()
}

/// Flags for the process of a new container that joins namespaces of the kinds in `joined`. The
/// rest is made by [`unshare`].
pub fn to_create(spec: &Spec, joined: NamespaceFlags) -> u64 {
    let kinds = [
        LinuxNamespaceType::User,
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Network,
    ];
    let wanted = kinds.into_iter().filter(|kind| has(spec, *kind));
    let wanted = wanted.fold(0, |all, kind| all | flag(kind));
    u64::from(wanted & !joined)
}

/// The namespaces that the process of a new container makes for itself, as root of its user
/// namespace: that of its cgroups from inside the cgroup, and that of message queues, whose
/// directory belongs to who makes it.
pub fn unshare(spec: &Spec, joined: NamespaceFlags) -> Result<(), StageError> {
    let kinds = [
        (LinuxNamespaceType::Cgroup, UnshareFlags::NEWCGROUP),
        (LinuxNamespaceType::Ipc, UnshareFlags::NEWIPC),
    ];
    let wanted = kinds
        .into_iter()
        .filter(|(kind, _)| has(spec, *kind) && flag(*kind) & joined == 0);
    let flags = wanted.fold(UnshareFlags::empty(), |all, (_, flag)| all | flag);
    // SAFETY: new namespaces share no descriptors and no memory with anything.
    unsafe { rustix::thread::unshare_unsafe(flags) }
        .map_err(StageError::system("make the container's namespaces"))
}

/// Joins existing namespaces, for the child that follows.
pub fn enter(namespace: BorrowedFd<'_>, flags: NamespaceFlags) -> Result<(), StageError> {
    rustix::thread::move_into_thread_name_spaces(
        namespace,
        ThreadNameSpaceType::from_bits_retain(flags),
    )
    .map_err(StageError::system("join another container's namespaces"))
}

/// Joins every namespace of the container but that of its cgroups, for the child that follows.
/// From inside a cgroup namespace a child cannot be born in a cgroup of it, as this process's own
/// cgroup is outside. Returns that namespace, unless it is this process's own.
pub fn join(init: BorrowedFd<'_>, has_users: bool) -> Result<Option<OwnedFd>, StageError> {
    // Before this process loses its rights over the container's.
    // SAFETY: the request takes no argument and returns a new descriptor.
    let cgroup = unsafe { libc::ioctl(init.as_raw_fd(), PIDFD_GET_CGROUP_NAMESPACE, 0) };
    if cgroup < 0 {
        let error = io::Error::last_os_error();
        return Err(StageError::system("find the container's cgroup namespace")(
            error,
        ));
    }
    // SAFETY: the kernel returned a new descriptor, which nothing else owns.
    let cgroup = unsafe { OwnedFd::from_raw_fd(cgroup) };
    let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|stat| stat.st_ino);
    let own = super::open_guest("/proc/self/ns/cgroup", rustix::fs::OFlags::RDONLY)?;
    let is_own = inode(own.as_fd())
        .and_then(|own| Ok(own == inode(cgroup.as_fd())?))
        .map_err(StageError::system("look at the cgroup namespaces"))?;
    let mut all = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::TIME;
    // Joining one's own is an error.
    if has_users {
        all |= ThreadNameSpaceType::USER;
    }
    rustix::thread::move_into_thread_name_spaces(init, all)
        .map_err(StageError::system("join the container's namespaces"))?;
    Ok((!is_own).then_some(cgroup))
}

/// Joins a cgroup namespace.
pub fn join_cgroup(namespace: BorrowedFd<'_>) -> Result<(), StageError> {
    rustix::thread::move_into_thread_name_spaces(namespace, ThreadNameSpaceType::CONTROL_GROUP)
        .map_err(StageError::system("join the container's cgroup namespace"))
}

/// A time namespace that begins with the execve, and how far its clocks are ahead,
/// time_namespaces(7).
pub fn unshare_time(spec: &Spec) -> Result<(), StageError> {
    // SAFETY: a time namespace shares no descriptors and no memory with anything.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWTIME) }
        .map_err(StageError::system("make a time namespace"))?;
    let offsets = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.time_offsets().as_ref());
    for (clock, offset) in offsets.into_iter().flatten() {
        let (seconds, nanoseconds) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        let line = format!("{clock} {seconds} {nanoseconds}");
        fs::write("/proc/self/timens_offsets", &line)
            .map_err(StageError::system(format!("set the time offset {line:?}")))?;
    }
    Ok(())
}

/// Makes the process, in the cgroup from its first instruction, as a child of PID 1. With a user
/// namespace among the `flags`, it has the ids of `users` before this returns in it.
pub fn spawn(
    flags: u64,
    cgroup: BorrowedFd<'_>,
    users: Option<&IdMappings>,
) -> Result<Cloned, StageError> {
    let flags = flags | CLONE_PARENT | CLONE_INTO_CGROUP;
    let made =
        |flags| clone(flags, cgroup).map_err(StageError::system("make the container's process"));
    let Some(users) = users.filter(|_| flags & CLONE_NEWUSER != 0) else {
        return made(flags);
    };
    let (mapped, mut mapper) =
        io::pipe().map_err(StageError::system("make a pipe for the new process"))?;
    let cloned = made(flags)?;
    match &cloned {
        Cloned::Child => {
            drop(mapper);
            wait_for(mapped)?;
        }
        Cloned::Parent { pid, .. } => {
            map_ids(*pid, users)?;
            let told = mapper.write_all(b"m");
            told.map_err(StageError::system("let the new process go on"))?;
        }
    }
    Ok(cloned)
}

/// Becomes root of the user namespace, in which this process is nobody yet.
pub fn become_root() -> Result<(), StageError> {
    let root = (nix::unistd::Uid::from_raw(0), nix::unistd::Gid::from_raw(0));
    let become_root = || -> nix::Result<()> {
        nix::unistd::setgroups(&[])?;
        nix::unistd::setresgid(root.1, root.1, root.1)?;
        nix::unistd::setresuid(root.0, root.0, root.0)
    };
    become_root().map_err(StageError::system("become root of the user namespace"))
}

/// Reads the one byte, or finds that nobody will send it.
fn wait_for(mut pipe: io::PipeReader) -> Result<(), StageError> {
    pipe.read_exact(&mut [0])
        .map_err(StageError::system("wait for the user namespace's ids"))
}

fn map_ids(pid: i32, users: &IdMappings) -> Result<(), StageError> {
    let write = |file: &str, ranges: &[LinuxIdMapping]| {
        let lines = ranges.iter().map(|range| {
            let (inside, outside) = (range.container_id(), range.host_id());
            format!("{inside} {outside} {}\n", range.size())
        });
        let text: String = lines.collect();
        // All in one write, as the kernel demands.
        fs::write(format!("/proc/{pid}/{file}"), &text).map_err(StageError::system(format!(
            "write the user namespace's {file} ({:?})",
            text.trim_end()
        )))
    };
    write("gid_map", &users.gids)?;
    write("uid_map", &users.uids)
}

fn clone(flags: u64, cgroup: BorrowedFd<'_>) -> io::Result<Cloned> {
    let mut pidfd: libc::c_int = -1;
    let arguments = CloneArguments {
        flags: flags | CLONE_PIDFD,
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
            let pid = i32::try_from(pid).map_err(io::Error::other)?;
            Ok(Cloned::Parent { pid, pidfd })
        }
        _ => Err(io::Error::last_os_error()),
    }
}
