//! Names: LINK, READLINK, UNLINK, RMDIR, RENAME and RENAME2.

use rustix::{
    fs::{AtFlags, FileType, RenameFlags, linkat, readlinkat, renameat_with, unlinkat},
    io::Errno,
};

use crate::{
    FileServer,
    abi::{Reader, Writer},
    reply::Answer,
    request::Header,
    thread::{Caller, magic_link},
};

impl FileServer {
    /// `struct fuse_link_in`, name: one more name in the header's directory.
    pub(crate) fn link(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let inode = self.inodes.get(body.u64()?)?;
        let name = body.name()?;
        let parent = self.inodes.get(header.node)?;
        parent.writable()?;
        if inode.share.id != parent.share.id {
            return Err(Errno::XDEV);
        }
        linkat(
            self.proc_self_fd(),
            magic_link(&*inode),
            &*parent,
            name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        let (inode, stat) = self.find(&parent, name)?;
        Ok(self
            .entry(Writer::default(), &inode, &stat, Some(&parent))
            .into())
    }

    pub(crate) fn readlink(&self, header: &Header) -> Result<Answer, Errno> {
        let inode = self.inodes.get(header.node)?;
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = readlinkat(&*inode, c"", Vec::new())?;
        Ok(Answer::Body(target.into_bytes()))
    }

    pub(crate) fn unlink(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        self.remove(header, body, AtFlags::empty())
    }

    pub(crate) fn rmdir(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        self.remove(header, body, AtFlags::REMOVEDIR)
    }

    fn remove(
        &self,
        header: &Header,
        body: &mut Reader<'_>,
        flags: AtFlags,
    ) -> Result<Answer, Errno> {
        let name = body.name()?;
        let parent = self.inodes.get(header.node)?;
        parent.writable()?;
        unlinkat(&*parent, name, flags)?;
        Ok(Answer::Empty)
    }

    /// `struct fuse_rename_in`, old name, new name.
    pub(crate) fn rename(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let new_parent = body.u64()?;
        self.move_entry(header, new_parent, RenameFlags::empty(), body)
    }

    /// `struct fuse_rename2_in`, old name, new name.
    pub(crate) fn rename2(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let new_parent = body.u64()?;
        let flags = RenameFlags::from_bits_retain(body.u32()?);
        let _ = body.u32()?;
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        self.move_entry(header, new_parent, flags, body)
    }

    fn move_entry(
        &self,
        header: &Header,
        new_parent: u64,
        flags: RenameFlags,
        body: &mut Reader<'_>,
    ) -> Result<Answer, Errno> {
        let (old_name, new_name) = (body.name()?, body.name()?);
        let old_parent = self.inodes.get(header.node)?;
        let new_parent = self.inodes.get(new_parent)?;
        old_parent.writable()?;
        new_parent.writable()?;
        if old_parent.share.id != new_parent.share.id {
            return Err(Errno::XDEV);
        }
        // The whiteout that stays behind is a new file, and the caller's.
        let _caller = flags
            .contains(RenameFlags::WHITEOUT)
            .then(|| Caller::assume(header.uid, header.gid, 0))
            .transpose()?;
        renameat_with(&*old_parent, old_name, &*new_parent, new_name, flags)?;
        Ok(Answer::Empty)
    }
}
