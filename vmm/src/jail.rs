//! The jail of the VMM's process: [`enter`] reads from top to bottom as what is given up, in this
//! order, before anything of a guest exists.
//!
//! What is left is an unprivileged user of the host in an empty, read-only root, alone in namespaces
//! that it has no rights over. Its capabilities count only against files whose owners the pod's user
//! namespace maps: those that the shim has handed over through idmapped mounts.

use std::{
    env, io,
    os::fd::{FromRawFd, OwnedFd},
};

use bulkhead_vmm_control::{CONTROL_FD, FIRST_FREE_FD, JailTimes, USER_NAMESPACE_FD};
use landlock::{
    ABI, Access, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError, Scope,
};
use rustix::{
    io::{FdFlags, fcntl_getfd, fcntl_setfd},
    mount::{
        MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
        open_tree, unmount,
    },
    process::{
        DumpableBehavior, Gid, Resource, Rlimit, Signal, Uid, chdir, getrlimit, pivot_root,
        set_dumpable_behavior, set_parent_process_death_signal, setrlimit,
    },
    thread::{
        CapabilitySet, CapabilitySets, LinkNameSpaceType, UnshareFlags, move_into_link_name_space,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
        set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
    },
};
use thiserror::Error;

use crate::vcpu::monotonic_ns;

/// What the file server needs, in the pod's user namespace, to do for a guest what root does: own
/// files for others, be asked for no permission, and take on a caller's identity.
pub const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP);

/// Open files: what the file server keeps for the guest's caches, and the most that the kernel
/// allows unless it was told otherwise (`fs.nr_open`).
pub const MAX_FILES: u64 = 1024 * 1024;

/// The longest file in bytes: the most that ext4 holds. Longer writes fail with `EFBIG`.
pub const MAX_FILE_SIZE: u64 = 16 << 40;

/// The limits of the process: what, and how much.
const LIMITS: [(Resource, u64); 4] = [
    (Resource::Nofile, MAX_FILES),
    (Resource::Fsize, MAX_FILE_SIZE),
    (Resource::Core, 0),
    (Resource::Memlock, 0),
];

/// The namespaces that the process makes for itself. Its PID and time namespaces are
/// made by the shim, as the user namespace is.
const NAMESPACES: UnshareFlags = UnshareFlags::NEWNS
    .union(UnshareFlags::NEWNET)
    .union(UnshareFlags::NEWIPC)
    .union(UnshareFlags::NEWUTS)
    .union(UnshareFlags::NEWCGROUP);

/// A part of the jail that could not be set up.
#[derive(Debug, Error)]
pub enum JailError {
    /// A descriptor that the shim hands over is not there.
    #[error(
        "bulkhead-vmm is started by containerd-shim-bulkhead-v2, with {what} as descriptor {number}"
    )]
    Descriptor {
        /// What is missing.
        what: &'static str,
        /// Its number.
        number: i32,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// The environment may hold anything.
    #[error("The environment of bulkhead-vmm must be empty")]
    Environment,
    /// A step failed.
    #[error("Cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Landlock is there, but refuses.
    #[error("Cannot restrict the process with Landlock")]
    Landlock(#[from] RulesetError),
}

/// What is left to work with.
#[derive(Debug)]
pub struct Inside {
    /// The control socket.
    pub control: OwnedFd,
    /// `/proc/self/fd` as a mount of its own that leads nowhere else.
    pub proc_self_fd: OwnedFd,
    /// How long it took to get here.
    pub times: JailTimes,
}

/// Enters the jail. The process must be as the shim starts it ([`bulkhead_vmm_control::Launch`]):
/// root, with one thread, first in a PID namespace.
pub fn enter() -> Result<Inside, JailError> {
    let started_ns = monotonic_ns();
    let control = inherited("a control socket", CONTROL_FD)?;
    let user_namespace = inherited("a user namespace", USER_NAMESPACE_FD)?;
    close_others()?;
    if env::vars_os().next().is_some() {
        return Err(JailError::Environment);
    }
    for (resource, value) in LIMITS {
        limit(resource, value).map_err(failed("set the limits of the process"))?;
    }
    let limited_ns = monotonic_ns();
    // Made by root of the host, these belong to its user namespace: the process keeps no rights
    // over them.
    // SAFETY: the flags leave the descriptor table shared with no one as it is.
    unsafe { unshare_unsafe(NAMESPACES) }.map_err(failed("create namespaces"))?;
    let separated_ns = monotonic_ns();
    let proc_self_fd = leave_files()?;
    let rooted_ns = monotonic_ns();
    join(user_namespace)?;
    let joined_ns = monotonic_ns();
    drop_capabilities()?;
    set_no_new_privs(true).map_err(failed("set no_new_privs"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("become unreadable for other processes"))?;
    restrict_by_landlock()?;
    // Last, since the kernel forgets it when the ids change (PR_SET_PDEATHSIG(2const)). A shim that
    // was gone before has closed the control socket.
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(failed("bind the process to the shim's life"))?;
    Ok(Inside {
        control,
        proc_self_fd,
        times: JailTimes {
            started_ns,
            limited_ns,
            separated_ns,
            rooted_ns,
            joined_ns,
            jailed_ns: monotonic_ns(),
        },
    })
}

/// Takes over an inherited descriptor, if it is there.
fn inherited(what: &'static str, number: i32) -> Result<OwnedFd, JailError> {
    // SAFETY: nothing has been opened yet, so if the descriptor is open it was inherited, and
    // nothing else in this process knows it. The check below does not close it.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    fcntl_getfd(fd)
        .and_then(|flags| fcntl_setfd(fd, flags | FdFlags::CLOEXEC))
        .map_err(|errno| JailError::Descriptor {
            what,
            number,
            source: errno.into(),
        })?;
    // SAFETY: as above; this takes the ownership that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn close_others() -> Result<(), JailError> {
    // SAFETY: nothing in this process owns a descriptor from that number on.
    let closed = unsafe { libc::close_range(FIRST_FREE_FD.unsigned_abs(), libc::c_uint::MAX, 0) };
    if closed != 0 {
        let source = io::Error::last_os_error();
        let step = "close other descriptors";
        return Err(JailError::Step { step, source });
    }
    Ok(())
}

fn limit(resource: Resource, value: u64) -> rustix::io::Result<()> {
    let set = |value| {
        let limit = Rlimit {
            current: Some(value),
            maximum: Some(value),
        };
        setrlimit(resource, limit)
    };
    match (set(value), getrlimit(resource).maximum) {
        // Without CAP_SYS_RESOURCE, which a nested root may lack, the limit that is there already
        // stays, if it is lower.
        (Err(rustix::io::Errno::PERM), Some(lower)) => set(lower.min(value)),
        (result, _) => result,
    }
}

/// Replaces every file that has a name by an empty, read-only directory. What is returned is
/// `/proc/self/fd` of a procfs that knows this process alone, and even of that only this directory.
fn leave_files() -> Result<OwnedFd, JailError> {
    let hardened = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(failed("separate mounts from the host's"))?;
    mount("proc", "/proc", "proc", hardened, c"").map_err(failed("mount procfs"))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let proc_self_fd =
        open_tree(rustix::fs::CWD, "/proc/self/fd", flags).map_err(failed("open /proc/self/fd"))?;

    // Any directory does as the place of the mount; this one is on every host.
    mount(
        "bulkhead",
        "/proc",
        "tmpfs",
        hardened | MountFlags::RDONLY,
        c"size=4k,nr_inodes=1,mode=555",
    )
    .map_err(failed("mount an empty root"))?;
    chdir("/proc").map_err(failed("enter the empty root"))?;
    // The old root goes on top of the new one, and away (pivot_root(2), "pivot_root(".", ".")").
    pivot_root(".", ".").map_err(failed("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("leave the host's files"))?;
    chdir("/").map_err(failed("enter the empty root"))?;
    Ok(proc_self_fd)
}

/// Becomes root of the user namespace: an unprivileged user of the host.
fn join(user_namespace: OwnedFd) -> Result<(), JailError> {
    use std::os::fd::AsFd;
    move_into_link_name_space(user_namespace.as_fd(), Some(LinkNameSpaceType::User))
        .map_err(failed("join the user namespace"))?;
    let (uid, gid) = (Uid::ROOT, Gid::ROOT);
    set_thread_groups(&[]).map_err(failed("leave the supplementary groups"))?;
    set_thread_res_gid(gid, gid, gid).map_err(failed("change the group id"))?;
    set_thread_res_uid(uid, uid, uid).map_err(failed("change the user id"))
}

fn drop_capabilities() -> Result<(), JailError> {
    for capability in CapabilitySet::all().difference(CAPABILITIES).iter() {
        match remove_capability_from_bounding_set(capability) {
            // A capability that this kernel does not have yet.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(failed("drop capabilities for good")(errno)),
        }
    }
    let sets = CapabilitySets {
        effective: CAPABILITIES,
        permitted: CAPABILITIES,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(failed("drop capabilities"))
}

/// Forbids TCP, signals to others and abstract sockets, as far as the kernel knows Landlock. It is
/// a second lock where namespaces are the first.
///
/// Files are left out: a ruleset that handles any access to files denies moving them between
/// directories (`LANDLOCK_ACCESS_FS_REFER`) below all that was not named beforehand, and shares
/// are named later.
fn restrict_by_landlock() -> Result<(), JailError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .restrict_self()?;
    Ok(())
}

fn failed(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> JailError {
    move |errno| JailError::Step {
        step,
        source: errno.into(),
    }
}
