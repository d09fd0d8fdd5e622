//! What the thread that serves a request is to the host's kernel: its working directory, its umask,
//! and, for one operation, the caller's identity.
//!
//! The guest's kernel decides who may do what; the server carries it out with its own capabilities.
//! But who owns a new file, whether its mode is masked by a umask or by a default ACL, and whether
//! a write clears set-user-ID must come out as on a local file system. The host's kernel gets
//! these right by itself when it is told who is asking, so it is told.

use std::{
    cell::Cell,
    os::fd::{AsFd, BorrowedFd},
};

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::{
    fs::Mode,
    io::Errno,
    process::{fchdir, umask},
    thread::{CapabilitySet, CapabilitySets, UnshareFlags, capabilities, set_capabilities},
};

thread_local! {
    static PREPARED: Cell<bool> = const { Cell::new(false) };
}

/// Gives the calling thread a working directory and a umask of its own (`CLONE_FS`, unshare(2)), the
/// directory being `/proc/self/fd` and the umask 0. Does nothing the second time.
///
/// The working directory is for the calls on extended attributes, which take a path but no
/// directory, and whose descriptor must not be `O_PATH`.
pub(crate) fn prepare(proc_self_fd: BorrowedFd<'_>) -> Result<(), Errno> {
    if PREPARED.get() {
        return Ok(());
    }
    // SAFETY: the flag separates the working directory and the umask, not the descriptor table.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS)? };
    fchdir(proc_self_fd)?;
    umask(Mode::empty());
    PREPARED.set(true);
    Ok(())
}

/// The name of a descriptor in `/proc/self/fd`: a magic link to just that file, so that following
/// it looks at no name the guest could have made.
pub(crate) fn magic_link(fd: impl AsFd) -> rustix::path::DecInt {
    rustix::path::DecInt::from_fd(fd)
}

/// While it lives, files that this thread makes belong to the caller.
///
/// Only ownership changes: the effective capabilities stay, since permission was decided by the
/// guest.
#[derive(Debug)]
pub(crate) struct Caller {
    uid: Uid,
    gid: Gid,
    capabilities: CapabilitySets,
}

impl Caller {
    /// Takes on `uid`, `gid` and `mask` (a umask).
    pub(crate) fn assume(uid: u32, gid: u32, mask: u32) -> Result<Self, Errno> {
        // -1 changes nothing, and only asks.
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        let capabilities = capabilities(None)?;
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        let caller = Self {
            gid: setfsgid(gid),
            uid: setfsuid(uid),
            capabilities,
        };
        // The calls do not say whether they worked. From here on a return restores all.
        if setfsgid(Gid::from_raw(u32::MAX)) != gid || setfsuid(Uid::from_raw(u32::MAX)) != uid {
            // As the kernel itself for ids that the file system has no room for.
            return Err(Errno::OVERFLOW);
        }
        if caller.uid != uid {
            // Leaving user 0 took the file system capabilities (capabilities(7)).
            set_capabilities(None, caller.capabilities)?;
        }
        umask(Mode::from_raw_mode(mask & 0o777));
        Ok(caller)
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        umask(Mode::empty());
        let assumed = setfsuid(self.uid);
        setfsgid(self.gid);
        if assumed != self.uid {
            // Going back gave no more than was permitted before; it may have given more than was
            // effective. Were this refused, the thread would only keep what its process has.
            let _ = set_capabilities(None, self.capabilities);
        }
    }
}

/// While it lives, changes by this thread clear set-user-ID and set-group-ID bits, as for any
/// process without `CAP_FSETID`.
#[derive(Debug)]
pub(crate) struct WithoutFsetid(CapabilitySets);

impl WithoutFsetid {
    /// Drops the capability if `wanted`.
    pub(crate) fn when(wanted: bool) -> Result<Option<Self>, Errno> {
        if !wanted {
            return Ok(None);
        }
        let before = capabilities(None)?;
        let mut without = before;
        without.effective.remove(CapabilitySet::FSETID);
        set_capabilities(None, without)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        // Raising what is permitted cannot be refused; if it were, the thread would have less.
        let _ = set_capabilities(None, self.0);
    }
}
