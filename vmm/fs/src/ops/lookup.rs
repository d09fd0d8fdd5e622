//! LOOKUP, FORGET and BATCH_FORGET.

use std::{ffi::CStr, sync::Arc};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, Statx, openat2},
    io::Errno,
};

use super::entry::negative;
use crate::{
    FileServer,
    abi::{ROOT_ID, Reader, Writer},
    inodes::{self, Inode},
    reply::Answer,
    request::Header,
    share::Shares,
};

impl FileServer {
    pub(crate) fn lookup(
        &self,
        shares: &Shares,
        header: &Header,
        body: &mut Reader<'_>,
    ) -> Result<Answer, Errno> {
        let name = body.name()?;
        if header.node == ROOT_ID {
            let (_, node) = shares.find(name.to_bytes()).ok_or(Errno::NOENT)?;
            let inode = self.inodes.get(node)?;
            let stat = inode.stat()?;
            return Ok(self.entry(Writer::default(), &inode, &stat, None).into());
        }
        let parent = self.inodes.get(header.node)?;
        match self.find(&parent, name) {
            Ok((inode, stat)) => Ok(self
                .entry(Writer::default(), &inode, &stat, Some(&parent))
                .into()),
            // Without a time to remember it for, the plain error is the shorter answer.
            Err(Errno::NOENT) if parent.share.options.exclusive => {
                Ok(negative(&parent.share).into())
            }
            Err(errno) => Err(errno),
        }
    }

    /// Looks up one entry of a directory, counting it as known by the guest.
    ///
    /// The name is one component and not `..`, so the kernel has no way but down; that it must not
    /// leave the directory nor follow a link is said all the same.
    pub(crate) fn find(&self, parent: &Inode, name: &CStr) -> Result<(Arc<Inode>, Statx), Errno> {
        let fd = openat2(
            parent,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS,
        )?;
        let stat = inodes::stat(&fd)?;
        let inode = self.inodes.look_up(&parent.share, fd, &stat)?;
        Ok((inode, stat))
    }

    pub(crate) fn forget(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        self.inodes.forget(header.node, body.u64()?);
        Ok(Answer::None)
    }

    pub(crate) fn batch_forget(&self, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let count = body.u32()?;
        let _ = body.u32()?;
        for _ in 0..count {
            self.inodes.forget(body.u64()?, body.u64()?);
        }
        Ok(Answer::None)
    }
}
