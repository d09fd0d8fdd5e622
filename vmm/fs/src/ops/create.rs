//! New files: MKNOD, MKDIR, SYMLINK, CREATE and TMPFILE.
//!
//! Each is made by the host's kernel in the caller's name, so that owner, group (a set-group-ID
//! directory hands down its own), umask and default ACL come out as on a local file system, and
//! there is no moment at which the file is somebody else's.

use rustix::{
    fs::{
        FileType, Mode, OFlags, ResolveFlags, makedev, mkdirat, mknodat, openat, openat2, symlinkat,
    },
    io::Errno,
};

use super::file::{host_flags, open_flags};
use crate::{
    FileServer,
    abi::{Reader, Writer, decode_device},
    inodes::{self, Inode},
    reply::Answer,
    request::Header,
    thread::{Caller, magic_link},
};

impl FileServer {
    /// `struct fuse_mknod_in`, name.
    pub(crate) fn mknod(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let (mode, device, umask) = (body.u32()?, body.u32()?, body.u32()?);
        let _ = body.u32()?;
        let name = body.name()?;
        let parent = self.inodes.get(header.node)?;
        parent.writable()?;
        let kind = FileType::from_raw_mode(mode);
        if matches!(
            kind,
            FileType::Directory | FileType::Symlink | FileType::Unknown
        ) {
            return Err(Errno::INVAL);
        }
        let (major, minor) = decode_device(device);
        {
            let _caller = Caller::assume(header.uid, header.gid, umask)?;
            mknodat(
                &*parent,
                name,
                kind,
                Mode::from_raw_mode(mode & 0o7777),
                makedev(major, minor),
            )?;
        }
        self.made(&parent, name)
    }

    /// `struct fuse_mkdir_in`, name.
    pub(crate) fn mkdir(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let (mode, umask) = (body.u32()?, body.u32()?);
        let name = body.name()?;
        let parent = self.inodes.get(header.node)?;
        parent.writable()?;
        {
            let _caller = Caller::assume(header.uid, header.gid, umask)?;
            mkdirat(&*parent, name, Mode::from_raw_mode(mode & 0o7777))?;
        }
        self.made(&parent, name)
    }

    /// Name, target: which is the guest's to follow, and may be anything.
    pub(crate) fn symlink(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let name = body.name()?;
        let target = body.string()?;
        let parent = self.inodes.get(header.node)?;
        parent.writable()?;
        {
            let _caller = Caller::assume(header.uid, header.gid, 0)?;
            symlinkat(target, &*parent, name)?;
        }
        self.made(&parent, name)
    }

    /// Answers with the entry just made.
    fn made(&self, parent: &Inode, name: &std::ffi::CStr) -> Result<Answer, Errno> {
        let (inode, stat) = self.find(parent, name)?;
        Ok(self
            .entry(Writer::default(), &inode, &stat, Some(parent))
            .into())
    }

    /// `struct fuse_create_in`, name.
    pub(crate) fn create(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let (guest_flags, mode, umask) = (body.u32()?, body.u32()?, body.u32()?);
        let _ = body.u32()?;
        let name = body.name()?;
        let flags = host_flags(guest_flags)?.difference(OFlags::TRUNC);
        self.make_file(
            header,
            name,
            flags | OFlags::CREATE | OFlags::EXCL,
            mode,
            umask,
        )
        .map_err(|errno| {
            let exclusive = OFlags::from_bits_retain(guest_flags).contains(OFlags::EXCL);
            if errno == Errno::EXIST && !exclusive {
                // It was not there when the guest looked. Now the guest has to look again,
                // which this error makes it do: what it finds may be a file that the caller
                // may not open, or a pipe that must not be opened here.
                Errno::STALE
            } else {
                errno
            }
        })
    }

    /// `struct fuse_create_in` and a name that is not used.
    pub(crate) fn tmpfile(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let (guest_flags, mode, umask) = (body.u32()?, body.u32()?, body.u32()?);
        let flags = host_flags(guest_flags)?.difference(OFlags::TRUNC);
        // With O_EXCL the file can never be given a name.
        let exclusive = OFlags::from_bits_retain(guest_flags) & OFlags::EXCL;
        self.make_file(
            header,
            c".",
            flags | OFlags::TMPFILE | exclusive,
            mode,
            umask,
        )
    }

    /// Makes a regular file and opens it; answers with `struct fuse_entry_out` and
    /// `struct fuse_open_out`.
    fn make_file(
        &self,
        header: &Header,
        name: &std::ffi::CStr,
        flags: OFlags,
        mode: u32,
        umask: u32,
    ) -> Result<Answer, Errno> {
        let parent = self.inodes.get(header.node)?;
        parent.writable()?;
        let file = {
            let _caller = Caller::assume(header.uid, header.gid, umask)?;
            openat2(
                &*parent,
                name,
                flags,
                Mode::from_raw_mode(mode & 0o7777),
                ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS,
            )?
        };
        // By the open file, not by the name, which may be another file's by now.
        let fd = openat(
            self.proc_self_fd(),
            magic_link(&file),
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let stat = inodes::stat(&fd)?;
        let inode = self.inodes.look_up(&parent.share, fd, &stat)?;
        let opened = self.handles.insert(inode.clone(), file);
        let fh = opened.inspect_err(|_| self.inodes.forget(inode.id, 1))?;
        Ok(self
            .entry(Writer::default(), &inode, &stat, Some(&parent))
            .u64(fh)
            .u32(open_flags(&inode))
            .u32(0)
            .into())
    }
}
