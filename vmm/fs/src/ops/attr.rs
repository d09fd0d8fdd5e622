//! GETATTR, STATX, SETATTR and STATFS.

use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, StatVfs, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
        chmodat, chownat, fstatvfs, ftruncate, utimensat,
    },
    io::Errno,
};

use super::entry::attr_validity;
use crate::{
    FileServer,
    abi::{NAME_MAX, ROOT_ID, Reader, SetattrValid, Writer},
    inodes::Inode,
    reply::Answer,
    request::Header,
    thread::{WithoutFsetid, magic_link},
};

/// The mode of the file system's root: a directory that everybody reads and nobody changes.
const ROOT_MODE: u32 = 0o40_555;

impl FileServer {
    pub(crate) fn getattr(&self, header: &Header) -> Result<Answer, Errno> {
        if header.node == ROOT_ID {
            return Ok(root_attr(Writer::default().zeros(16)).into());
        }
        attr_out(&*self.inodes.get(header.node)?)
    }

    pub(crate) fn statx(&self, header: &Header) -> Result<Answer, Errno> {
        if header.node == ROOT_ID {
            return Ok(root_statx(Writer::default().zeros(32)).into());
        }
        let inode = self.inodes.get(header.node)?;
        let stat = inode.stat()?;
        Ok(Writer::default()
            .u64(attr_validity(&inode, &stat))
            .zeros(24)
            .statx(&stat, inode.ino)
            .into())
    }

    /// `struct fuse_setattr_in`: owner first, since it clears mode bits, then mode, size and times.
    pub(crate) fn setattr(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let valid = SetattrValid::from_bits_truncate(body.u32()?);
        let _ = body.u32()?;
        let fh = body.u64()?;
        let size = body.u64()?;
        let _lock_owner = body.u64()?;
        let (atime, mtime, _ctime) = (body.u64()?, body.u64()?, body.u64()?);
        let (atime_ns, mtime_ns, _ctime_ns) = (body.u32()?, body.u32()?, body.u32()?);
        let mode = body.u32()?;
        let _ = body.u32()?;
        let (uid, gid) = (body.u32()?, body.u32()?);
        let _ = body.u32()?;

        let inode = self.inodes.get(header.node)?;
        inode.writable()?;
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID).then(|| checked_id(uid));
            let gid = valid.contains(SetattrValid::GID).then(|| checked_id(gid));
            chownat(
                &*inode,
                c"",
                uid.transpose()?.map(Uid::from_raw),
                gid.transpose()?.map(Gid::from_raw),
                AtFlags::EMPTY_PATH,
            )?;
        }
        if valid.contains(SetattrValid::MODE) {
            self.change_mode(&inode, mode)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let _guard = WithoutFsetid::when(valid.contains(SetattrValid::KILL_SUIDGID))?;
            let fh = valid.contains(SetattrValid::FH).then_some(fh);
            self.truncate(&inode, fh, size)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let times = Timestamps {
                last_access: time(
                    valid.contains(SetattrValid::ATIME),
                    valid.contains(SetattrValid::ATIME_NOW),
                    atime,
                    atime_ns,
                )?,
                last_modification: time(
                    valid.contains(SetattrValid::MTIME),
                    valid.contains(SetattrValid::MTIME_NOW),
                    mtime,
                    mtime_ns,
                )?,
            };
            utimensat(&*inode, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        attr_out(&inode)
    }

    /// Sets the permission bits of a file of any type but a symbolic link, which has none.
    pub(crate) fn change_mode(&self, inode: &Inode, mode: u32) -> Result<(), Errno> {
        if inode.kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        chmodat(
            self.proc_self_fd(),
            magic_link(inode),
            Mode::from_raw_mode(mode & 0o7777),
            AtFlags::empty(),
        )
    }

    fn truncate(&self, inode: &Inode, fh: Option<u64>, size: u64) -> Result<(), Errno> {
        if let Some(fh) = fh {
            let handle = self.handles.get(fh)?;
            handle.inode.writable()?;
            return ftruncate(&*handle, size);
        }
        if inode.kind != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        self.truncate_file(inode, size)
    }

    pub(crate) fn statfs(&self, header: &Header) -> Result<Answer, Errno> {
        if header.node == ROOT_ID {
            return Ok(Writer::default()
                .zeros(40)
                .u32(4096)
                .u32(u32::try_from(NAME_MAX).map_err(|_| Errno::OVERFLOW)?)
                .u32(4096)
                .zeros(28)
                .into());
        }
        let StatVfs {
            f_bsize,
            f_frsize,
            f_blocks,
            f_bfree,
            f_bavail,
            f_files,
            f_ffree,
            f_namemax,
            ..
        } = fstatvfs(&*self.inodes.get(header.node)?)?;
        let narrow = |value: u64| u32::try_from(value).map_err(|_| Errno::OVERFLOW);
        Ok(Writer::default()
            .u64(f_blocks)
            .u64(f_bfree)
            .u64(f_bavail)
            .u64(f_files)
            .u64(f_ffree)
            .u32(narrow(f_bsize)?)
            .u32(narrow(f_namemax)?)
            .u32(narrow(f_frsize)?)
            .zeros(28)
            .into())
    }
}

/// `struct fuse_attr_out`.
fn attr_out(inode: &Inode) -> Result<Answer, Errno> {
    let stat = inode.stat()?;
    Ok(Writer::default()
        .u64(attr_validity(inode, &stat))
        .zeros(8)
        .attr(&stat, inode.ino, 0)
        .into())
}

/// `struct fuse_attr` of the file system's root.
fn root_attr(writer: Writer) -> Writer {
    writer
        .u64(ROOT_ID)
        .zeros(52)
        .u32(ROOT_MODE)
        .u32(2) // links
        .zeros(12)
        .u32(4096)
        .zeros(4)
}

/// `struct fuse_statx` of the file system's root.
fn root_statx(writer: Writer) -> Writer {
    writer
        .u32(rustix::fs::StatxFlags::BASIC_STATS.bits())
        .u32(4096)
        .zeros(8)
        .u32(2) // links
        .zeros(8)
        .u16(0o40_555)
        .zeros(2)
        .u64(ROOT_ID)
        .zeros(256 - 40)
}

/// An owner that is one: -1 would mean "unchanged".
fn checked_id(id: u32) -> Result<u32, Errno> {
    if id == u32::MAX {
        return Err(Errno::INVAL);
    }
    Ok(id)
}

/// What utimensat(2) is told about one of the times.
fn time(set: bool, now: bool, seconds: u64, nanoseconds: u32) -> Result<Timespec, Errno> {
    let (tv_sec, tv_nsec) = match (set, now) {
        (false, _) => (0, UTIME_OMIT),
        (true, true) => (0, UTIME_NOW),
        (true, false) if nanoseconds < 1_000_000_000 => {
            (seconds.cast_signed(), i64::from(nanoseconds))
        }
        (true, false) => return Err(Errno::INVAL),
    };
    Ok(Timespec { tv_sec, tv_nsec })
}
