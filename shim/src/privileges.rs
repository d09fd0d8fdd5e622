//! What the shim and its anchors may do on the host.

use rustix::{
    io::{Errno, Result},
    thread::{
        CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities,
        set_no_new_privs,
    },
};

/// What a shim works with: mounts, namespaces and idmaps (`SYS_ADMIN`, `SETUID`, `SETGID`), the files
/// that overlayfs changes in its name (`CHOWN` to `SETFCAP`) and finds again by their handles
/// (`DAC_READ_SEARCH`), children of other users (`KILL`), and their OOM preference (`SYS_RESOURCE`).
pub const SHIM: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SYS_ADMIN)
    .union(CapabilitySet::SYS_RESOURCE);

/// Leaves the calling thread, and those that it starts, with the capabilities of a shim.
///
/// Programs that a shim executes have those of any program that root starts: hooks and loggers are
/// the administrator's, and the VMM and the anchors give up theirs by themselves. The bounding set
/// and `no_new_privs` therefore stay as they are.
pub fn restrict() -> Result<()> {
    let before = rustix::thread::capabilities(None)?;
    // A nested root may lack some of them.
    set(before.permitted.intersection(SHIM))
}

/// Leaves the calling process without any capability, for good.
pub fn renounce() -> Result<()> {
    for capability in CapabilitySet::all().iter() {
        match remove_capability_from_bounding_set(capability) {
            // A capability that this kernel does not have yet.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(errno) => return Err(errno),
        }
    }
    set(CapabilitySet::empty())?;
    set_no_new_privs(true)
}

fn set(capabilities: CapabilitySet) -> Result<()> {
    let sets = CapabilitySets {
        effective: capabilities,
        permitted: capabilities,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets)
}
