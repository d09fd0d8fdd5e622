//! The server: shares, and one request at a time from the guest.

use std::os::fd::OwnedFd;

use vm_memory::VolatileSlice;

use crate::{FsError, ShareOptions};

/// A FUSE server for one guest.
#[derive(Debug)]
pub struct FileServer {
    proc_self_fd: OwnedFd,
}

impl FileServer {
    /// Makes a server without shares. `proc_self_fd` is an `O_PATH` descriptor of `/proc/self/fd`.
    pub fn new(proc_self_fd: OwnedFd) -> Result<Self, FsError> {
        Ok(Self { proc_self_fd })
    }

    /// Adds `root`, an `O_PATH` descriptor, as `name` below the file system's root.
    pub fn share(&self, name: &str, _root: OwnedFd, _options: ShareOptions) -> Result<(), FsError> {
        Err(FsError::Name(name.to_owned()))
    }

    /// Takes a share away. When it returns, no descriptor of it is left.
    pub fn unshare(&self, name: &str) -> Result<(), FsError> {
        Err(FsError::Unknown(name.to_owned()))
    }

    /// Serves one request: `request` is what the guest wrote, `reply` is where the answer goes.
    /// Returns the bytes written to `reply`; 0 means that the request has no answer.
    pub fn handle(&self, _request: &[VolatileSlice<'_>], _reply: &[VolatileSlice<'_>]) -> usize {
        0
    }
}
