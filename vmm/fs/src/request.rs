//! A request: the header, and the records behind it.

use rustix::io::Errno;
use vm_memory::VolatileSlice;

use crate::{
    abi::{IN_HEADER, Reader},
    chain,
};

/// The longest request that is not a WRITE: a value of an extended attribute, names, and spare.
const MAX_BODY: usize = 128 * 1024;

/// `struct fuse_in_header`, as far as it is used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    /// The length of the whole request.
    pub(crate) len: usize,
    pub(crate) opcode: u32,
    pub(crate) unique: u64,
    /// The node the request is about.
    pub(crate) node: u64,
    /// The caller's file system identity; -1 where it cannot be told in an idmapped mount.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Header {
    /// Reads the header, or `None` when the request has not even that.
    pub(crate) fn read(request: &[VolatileSlice<'_>]) -> Option<Self> {
        let mut bytes = [0; IN_HEADER];
        if chain::read(request, 0, &mut bytes) != IN_HEADER {
            return None;
        }
        let mut reader = Reader::new(&bytes);
        Some(Self {
            len: usize::try_from(reader.u32().ok()?).ok()?,
            opcode: reader.u32().ok()?,
            unique: reader.u64().ok()?,
            node: reader.u64().ok()?,
            uid: reader.u32().ok()?,
            gid: reader.u32().ok()?,
        })
    }

    /// Checks the length that the request gives itself against its buffers.
    pub(crate) fn check_length(&self, request: &[VolatileSlice<'_>]) -> Result<(), Errno> {
        if self.len < IN_HEADER || self.len > chain::length(request) {
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    /// Copies what follows the header, so that the guest cannot change it any more.
    pub(crate) fn body(&self, request: &[VolatileSlice<'_>]) -> Result<Vec<u8>, Errno> {
        let length = self.len.checked_sub(IN_HEADER).ok_or(Errno::INVAL)?;
        if length > MAX_BODY {
            return Err(Errno::INVAL);
        }
        let mut body = vec![0; length];
        if chain::read(request, IN_HEADER, &mut body) != length {
            return Err(Errno::INVAL);
        }
        Ok(body)
    }
}
