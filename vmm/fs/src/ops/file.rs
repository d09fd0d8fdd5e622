//! Regular files: OPEN, READ, WRITE, RELEASE, FSYNC, FALLOCATE, LSEEK, COPY_FILE_RANGE and SYNCFS.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, PoisonError},
};

use rustix::{
    fs::{
        FallocateFlags, FileType, Mode, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync,
        fsync, ftruncate, openat, seek, syncfs,
    },
    io::Errno,
};
use vm_memory::VolatileSlice;

use crate::{
    FileServer,
    abi::{
        FOPEN_KEEP_CACHE, FSYNC_FDATASYNC, IN_HEADER, MAX_WRITE, OPEN_KILL_SUIDGID, OUT_HEADER,
        ROOT_ID, Reader, WRITE_CACHE, WRITE_IN, WRITE_KILL_SUIDGID, Writer,
    },
    chain,
    inodes::Inode,
    reply::Answer,
    request::Header,
    share::Shares,
    thread::{WithoutFsetid, magic_link},
};

/// What a file is opened with on the host. `O_APPEND` is a matter of each write. `O_DIRECT` is
/// between the guest's process and the guest's cache: the host's file system may want an alignment
/// that the process knows nothing of.
pub(super) fn host_flags(guest: u32) -> Result<OFlags, Errno> {
    let guest = OFlags::from_bits_retain(guest);
    if guest & OFlags::RWMODE == OFlags::RWMODE {
        return Err(Errno::INVAL);
    }
    let kept = OFlags::RWMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
    Ok((guest & kept) | OFlags::NOCTTY | OFlags::CLOEXEC)
}

/// `fuse_open_out.open_flags` of a regular file.
pub(super) fn open_flags(inode: &Inode) -> u32 {
    if inode.share.options.exclusive {
        FOPEN_KEEP_CACHE
    } else {
        0
    }
}

impl FileServer {
    /// `struct fuse_open_in`.
    pub(crate) fn open(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let flags = host_flags(body.u32()?)?;
        let kill = body.u32()? & OPEN_KILL_SUIDGID != 0;
        let inode = self.inodes.get(header.node)?;
        match inode.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            // A hostile guest's question: its kernel opens devices, pipes and sockets itself.
            _ => return Err(Errno::NXIO),
        }
        if flags.intersects(OFlags::RWMODE | OFlags::TRUNC) {
            inode.writable()?;
        }
        let _guard = WithoutFsetid::when(kill)?;
        let fh = self.open_handle(&inode, flags)?;
        let open_flags = open_flags(&inode);
        Ok(Writer::default().u64(fh).u32(open_flags).u32(0).into())
    }

    /// Opens a regular file and keeps it.
    ///
    /// The first open for writing makes overlayfs copy a file from a lower layer to the upper one,
    /// and whoever has it open already goes on reading the old copy. What the guest reads through
    /// any handle goes to the cache of all, so those are opened again.
    fn open_handle(&self, inode: &Arc<Inode>, flags: OFlags) -> Result<u64, Errno> {
        let mut readers = inode.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let file = self.open_file(inode, flags)?;
        let fh = self.handles.insert(Arc::clone(inode), file)?;
        if !flags.intersects(OFlags::RWMODE | OFlags::TRUNC) {
            readers.push(fh);
            return Ok(fh);
        }
        self.reopen(inode, &readers)
            .inspect_err(|_| drop(self.handles.remove(fh)))?;
        Ok(fh)
    }

    /// Sets the length of a regular file, which is an open for writing.
    pub(super) fn truncate_file(&self, inode: &Inode, size: u64) -> Result<(), Errno> {
        let readers = inode.readers.lock().unwrap_or_else(PoisonError::into_inner);
        ftruncate(self.open_file(inode, OFlags::WRONLY)?, size)?;
        self.reopen(inode, &readers)
    }

    fn reopen(&self, inode: &Inode, readers: &[u64]) -> Result<(), Errno> {
        for fh in readers {
            self.handles
                .replace(*fh, self.open_file(inode, OFlags::RDONLY)?)?;
        }
        Ok(())
    }

    /// Opens a regular file or a directory by its magic link.
    fn open_file(&self, inode: &Inode, flags: OFlags) -> Result<OwnedFd, Errno> {
        openat(
            self.proc_self_fd(),
            magic_link(inode),
            flags | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
        )
    }

    /// `struct fuse_release_in`, for files and directories. The root has no handle.
    pub(crate) fn release(&self, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let fh = body.u64()?;
        if let Some(handle) = self.handles.remove(fh) {
            let readers = &handle.inode.readers;
            readers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .retain(|reader| *reader != fh);
        }
        Ok(Answer::Empty)
    }

    /// `struct fuse_read_in`: straight into the guest's pages.
    pub(crate) fn read(
        &self,
        body: &mut Reader<'_>,
        reply: &[VolatileSlice<'_>],
    ) -> Result<Answer, Errno> {
        let (fh, offset) = (body.u64()?, body.u64()?);
        let size = usize::try_from(body.u32()?.min(MAX_WRITE)).map_err(|_| Errno::INVAL)?;
        let handle = self.handles.get(fh)?;
        let moved = chain::transfer(reply, OUT_HEADER, size, |buffers, done| {
            let offset = position(offset, done)?;
            let count = i32::try_from(buffers.len()).map_err(|_| Errno::INVAL)?;
            // SAFETY: the buffers are slices of the guest's memory, which is mapped for as long as
            // they are borrowed. The guest may look at them and change them meanwhile; nothing here
            // relies on what is in them.
            let moved = unsafe {
                libc::preadv(handle.as_fd().as_raw_fd(), buffers.as_ptr(), count, offset)
            };
            outcome(moved)
        })?;
        Ok(Answer::InPlace(moved))
    }

    /// `struct fuse_write_in`, data: straight from the guest's pages.
    pub(crate) fn write(
        &self,
        header: &Header,
        request: &[VolatileSlice<'_>],
    ) -> Result<Answer, Errno> {
        let mut record = [0; WRITE_IN];
        if chain::read(request, IN_HEADER, &mut record) != WRITE_IN {
            return Err(Errno::INVAL);
        }
        let mut record = Reader::new(&record);
        let (fh, offset) = (record.u64()?, record.u64()?);
        let (size, write_flags) = (record.u32()?, record.u32()?);
        let _lock_owner = record.u64()?;
        let open_flags = OFlags::from_bits_retain(record.u32()?);
        let length = usize::try_from(size).map_err(|_| Errno::INVAL)?;
        if size > MAX_WRITE || header.len != IN_HEADER + WRITE_IN + length {
            return Err(Errno::INVAL);
        }
        let handle = self.handles.get(fh)?;
        // Others may append to the file too, so the host finds its end. Pages that are written
        // back have their place, even if they happen to come through a handle that appends.
        let append = open_flags.contains(OFlags::APPEND) && write_flags & WRITE_CACHE == 0;
        let how = if append { libc::RWF_APPEND } else { 0 };
        let _guard = WithoutFsetid::when(write_flags & WRITE_KILL_SUIDGID != 0)?;
        let moved = chain::transfer(request, IN_HEADER + WRITE_IN, length, |buffers, done| {
            let offset = position(offset, done)?;
            let count = i32::try_from(buffers.len()).map_err(|_| Errno::INVAL)?;
            // SAFETY: as for reading; the kernel copies whatever is there at the time.
            let moved = unsafe {
                libc::pwritev2(
                    handle.as_fd().as_raw_fd(),
                    buffers.as_ptr(),
                    count,
                    offset,
                    how,
                )
            };
            outcome(moved)
        })?;
        let moved = u32::try_from(moved).map_err(|_| Errno::INVAL)?;
        Ok(Writer::default().u32(moved).u32(0).into())
    }

    /// `struct fuse_fsync_in`.
    pub(crate) fn fsync(&self, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let (fh, flags) = (body.u64()?, body.u32()?);
        let handle = self.handles.get(fh)?;
        if flags & FSYNC_FDATASYNC != 0 {
            fdatasync(&*handle)?;
        } else {
            fsync(&*handle)?;
        }
        Ok(Answer::Empty)
    }

    /// `struct fuse_fallocate_in`.
    pub(crate) fn fallocate(
        &self,
        header: &Header,
        body: &mut Reader<'_>,
    ) -> Result<Answer, Errno> {
        let (fh, offset, length) = (body.u64()?, body.u64()?, body.u64()?);
        let mode = FallocateFlags::from_bits_retain(body.u32()?);
        let known =
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        let handle = self.handles.get(fh)?;
        let _guard = WithoutFsetid::when(header.uid != 0)?;
        fallocate(&*handle, mode, offset, length)?;
        Ok(Answer::Empty)
    }

    /// `struct fuse_lseek_in`: the guest keeps the position itself and asks only for data and holes.
    pub(crate) fn lseek(&self, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let (fh, offset, whence) = (body.u64()?, body.u64()?, body.u32()?);
        let from = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        i64::try_from(offset).map_err(|_| Errno::NXIO)?;
        let handle = self.handles.get(fh)?;
        Ok(Writer::default().u64(seek(&*handle, from)?).into())
    }

    /// `struct fuse_copy_file_range_in`. May copy less than was asked for.
    pub(crate) fn copy_file_range(
        &self,
        header: &Header,
        body: &mut Reader<'_>,
    ) -> Result<Answer, Errno> {
        /// What one request may take, in bytes, so that it ends soon.
        const MOST: u64 = 64 * 1024 * 1024;
        let (from, mut from_offset) = (body.u64()?, body.u64()?);
        let _node = body.u64()?;
        let (to, mut to_offset, length, flags) =
            (body.u64()?, body.u64()?, body.u64()?, body.u64()?);
        if flags != 0 {
            return Err(Errno::INVAL);
        }
        let (from, to) = (self.handles.get(from)?, self.handles.get(to)?);
        let _guard = WithoutFsetid::when(header.uid != 0)?;
        let length = usize::try_from(length.min(MOST)).map_err(|_| Errno::INVAL)?;
        let copied = copy_file_range(
            &*from,
            Some(&mut from_offset),
            &*to,
            Some(&mut to_offset),
            length,
        )?;
        let copied = u32::try_from(copied).map_err(|_| Errno::OVERFLOW)?;
        Ok(Writer::default().u32(copied).u32(0).into())
    }

    /// Writes out the file system of a node; for the root, those of all shares.
    pub(crate) fn syncfs(&self, shares: &Shares, header: &Header) -> Result<Answer, Errno> {
        if header.node != ROOT_ID {
            self.sync_file_system(&*self.inodes.get(header.node)?)?;
            return Ok(Answer::Empty);
        }
        for (_, node) in shares.after(0) {
            self.sync_file_system(&*self.inodes.get(node)?)?;
        }
        Ok(Answer::Empty)
    }

    fn sync_file_system(&self, inode: &Inode) -> Result<(), Errno> {
        let openable = matches!(inode.kind, FileType::Directory | FileType::RegularFile);
        if inode.share.options.read_only || !openable {
            return Ok(());
        }
        syncfs(self.open_file(inode, OFlags::RDONLY)?)
    }
}

/// Where in the file the next batch goes.
fn position(offset: u64, done: usize) -> Result<i64, Errno> {
    u64::try_from(done)
        .ok()
        .and_then(|done| offset.checked_add(done))
        .and_then(|position| i64::try_from(position).ok())
        .ok_or(Errno::INVAL)
}

/// The result of a call that returns a length, or -1 with `errno` set.
fn outcome(returned: isize) -> Result<usize, Errno> {
    usize::try_from(returned)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
