//! What the shim and the processes that it starts of itself may do on the host.

use rustix::{
    io::{Errno, Result},
    thread::{
        CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities,
        set_no_new_privs,
    },
};

/// What a shim works with: mounts, namespaces and idmaps (`SYS_ADMIN`, `SETUID`, `SETGID`), the files
/// that overlayfs changes in its name (`CHOWN` to `SETFCAP`) and finds again by their handles
/// (`DAC_READ_SEARCH`), children of other users (`KILL`), their OOM preference (`SYS_RESOURCE`), and taps and filters in the
/// network namespaces of pods (`NET_ADMIN`).
pub const SHIM: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::SYS_ADMIN)
    .union(CapabilitySet::SYS_RESOURCE);

/// What a shim may take on for a moment: a hook may be the executable of a process (Docker's is
/// `/proc/PID/exe`), and the link leads only who has all that the process has, or this. So it is with
/// the network namespace of an anchor, which got all capabilities at its execution.
const FOR_PROCESSES: CapabilitySet = CapabilitySet::SYS_PTRACE;

/// Leaves the calling thread, and those that it starts, with the capabilities of a shim.
///
/// Programs that a shim executes have those of any program that root starts: hooks and loggers are
/// the administrator's, and the VMM and the anchors give up theirs by themselves. The bounding set
/// and `no_new_privs` therefore stay as they are.
pub fn restrict() -> Result<()> {
    let before = rustix::thread::capabilities(None)?;
    // A nested root may lack some of them.
    let permitted = before.permitted;
    set(
        permitted.intersection(SHIM),
        permitted.intersection(SHIM.union(FOR_PROCESSES)),
    )
}

/// Takes on what it needs to find the executable of a hook or the namespace of an anchor, for the
/// calling thread. A child may call it before execve(2): it makes system calls only.
pub fn reach_processes() -> Result<()> {
    let permitted = rustix::thread::capabilities(None)?.permitted;
    set(permitted, permitted)
}

/// Leaves the calling process without any capability, for good.
pub fn renounce() -> Result<()> {
    keep_only(CapabilitySet::empty())
}

/// Leaves the calling process with these capabilities at most, for good.
pub fn keep_only(kept: CapabilitySet) -> Result<()> {
    for capability in CapabilitySet::all().difference(kept).iter() {
        match remove_capability_from_bounding_set(capability) {
            // A capability that this kernel does not have yet.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(errno) => return Err(errno),
        }
    }
    set(kept, kept)?;
    set_no_new_privs(true)
}

fn set(effective: CapabilitySet, permitted: CapabilitySet) -> Result<()> {
    let sets = CapabilitySets {
        effective,
        permitted,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets)
}
