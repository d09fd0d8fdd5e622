//! Detached mounts: what of the host's files a VMM is handed.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::mount::MsFlags;
use rustix::{
    fs::CWD,
    mount::{OpenTreeFlags, open_tree},
};
use thiserror::Error;

/// Failures with a tree of mounts.
#[derive(Debug, Error)]
pub enum TreeError {
    /// There is nothing, or nothing that can be cloned.
    #[error("Cannot clone the mounts of {path}")]
    Clone {
        /// The top of the tree.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: rustix::io::Errno,
    },
    /// The files cannot be shown under other ids.
    #[error("Cannot map the owners of files in {path} to the ids of the pod: {hint}")]
    Map {
        /// The top of the tree.
        path: PathBuf,
        /// What the error means there.
        hint: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// A copy of the mount at `path`, with those below if `recursive`, that is attached nowhere.
pub fn clone(path: &Path, recursive: bool) -> Result<OwnedFd, TreeError> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    open_tree(CWD, path, flags).map_err(|source| TreeError::Clone {
        path: path.to_owned(),
        source,
    })
}

/// Confines a tree that was cloned from `path` to what a VMM may do with it: nothing in it is
/// executed or a device, and with `MS_RDONLY` in `flags` nothing is changed.
///
/// With a user namespace, the files belong to the ids that it maps: who is `n` on the disk is `n`
/// in the namespace, and nobody's outside (`MOUNT_ATTR_IDMAP`, mount_setattr(2)).
pub fn confine(
    tree: BorrowedFd<'_>,
    path: &Path,
    namespace: Option<BorrowedFd<'_>>,
    flags: MsFlags,
) -> Result<(), TreeError> {
    let mut attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NOSUID,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    if flags.contains(MsFlags::MS_RDONLY) {
        attributes.attr_set |= libc::MOUNT_ATTR_RDONLY;
    }
    if let Some(namespace) = namespace {
        attributes.attr_set |= libc::MOUNT_ATTR_IDMAP;
        attributes.userns_fd = u64::from(namespace.as_raw_fd().unsigned_abs());
    }
    set_attributes(tree, &attributes).map_err(|source| TreeError::Map {
        path: path.to_owned(),
        hint: match source.raw_os_error() {
            Some(libc::EINVAL) => {
                "a file system there does not support idmapped mounts on this kernel"
            }
            Some(libc::EPERM) => "a mount there is idmapped already",
            _ => "mount_setattr(2) failed",
        },
        source,
    })
}

fn set_attributes(tree: BorrowedFd<'_>, attributes: &libc::mount_attr) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is a C string, and `attributes` has the layout and the length that are told;
    // both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
