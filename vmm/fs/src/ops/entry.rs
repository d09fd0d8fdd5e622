//! What the guest is told of a file it looked up, and for how long it may believe it.

use rustix::fs::{FileType, Mode, Statx};

use crate::{
    FileServer,
    abi::{ATTR_SUBMOUNT, Writer},
    inodes::Inode,
    share::Share,
};

/// The length of `fuse_entry_out`.
pub(crate) const ENTRY_OUT: usize = 128;

/// A year in seconds: until the guest runs out of memory for it.
const FOREVER: u64 = 365 * 24 * 60 * 60;

/// Seconds for which the guest may believe that a name leads to a file, or to none.
pub(crate) fn entry_validity(share: &Share) -> u64 {
    if share.options.exclusive { FOREVER } else { 0 }
}

/// Seconds for which the guest may believe a file's attributes.
///
/// Writing clears set-user-ID and set-group-ID on the host and the guest does not notice, so these
/// it must always ask for.
pub(crate) fn attr_validity(inode: &Inode, stat: &Statx) -> u64 {
    let mode = Mode::from_raw_mode(stat.stx_mode.into());
    if inode.kind == FileType::RegularFile && mode.intersects(Mode::SUID | Mode::SGID) {
        return 0;
    }
    entry_validity(&inode.share)
}

/// `struct fuse_entry_out` of no file: the name leads nowhere.
pub(crate) fn negative(share: &Share) -> Writer {
    Writer::with_capacity(ENTRY_OUT)
        .zeros(16)
        .u64(entry_validity(share))
        .zeros(ENTRY_OUT - 24)
}

impl FileServer {
    /// Appends `struct fuse_entry_out` for a file found in `parent`, `None` being the file system's
    /// root. Names in the root are never believed, since shares come and go.
    pub(crate) fn entry(
        &self,
        writer: Writer,
        inode: &Inode,
        stat: &Statx,
        parent: Option<&Inode>,
    ) -> Writer {
        let flags = if self.is_submount(inode, parent) {
            ATTR_SUBMOUNT
        } else {
            0
        };
        writer
            .u64(inode.id)
            .u64(0) // generation: node ids are not used again
            .u64(parent.map_or(0, |_| entry_validity(&inode.share)))
            .u64(attr_validity(inode, stat))
            .zeros(8) // nanoseconds of both
            .attr(stat, inode.ino, flags)
    }
}
