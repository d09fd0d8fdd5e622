//! Directories: OPENDIR, READDIR, READDIRPLUS and FSYNCDIR.

use std::{mem::MaybeUninit, sync::PoisonError};

use rustix::{
    fs::{FileType, Mode, OFlags, RawDir, RawDirEntry, SeekFrom, fsync, openat, seek},
    io::Errno,
};

use super::entry::ENTRY_OUT;
use crate::{
    FileServer,
    abi::{FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, ROOT_ID, Reader, Writer},
    handles::Handle,
    inodes::Inode,
    reply::Answer,
    request::Header,
    share::Shares,
    thread::magic_link,
};

/// The length of `fuse_dirent` without the name.
const DIRENT: usize = 24;
/// The most that is read of a directory at once, in bytes, and the least: one entry.
const MAX_READ: usize = 64 * 1024;
const MIN_READ: usize = 512;

/// The entries of a reply as they fit.
struct Listing {
    writer: Writer,
    size: usize,
    plus: bool,
}

impl Listing {
    fn new(size: u32, plus: bool) -> Self {
        let size = usize::try_from(size).unwrap_or(MAX_READ).min(MAX_READ);
        Self {
            writer: Writer::with_capacity(size),
            size,
            plus,
        }
    }

    fn fits(&self, name: &[u8]) -> bool {
        let head = if self.plus {
            ENTRY_OUT + DIRENT
        } else {
            DIRENT
        };
        self.writer.len() + (head + name.len()).next_multiple_of(8) <= self.size
    }

    /// Adds `struct fuse_dirent`; `after` is what the guest gives to go on behind it. Where look-ups
    /// are wanted, `entry` adds `struct fuse_entry_out` before it.
    fn push(
        &mut self,
        ino: u64,
        after: u64,
        kind: FileType,
        name: &[u8],
        entry: impl FnOnce(Writer) -> Writer,
    ) {
        let mut writer = std::mem::take(&mut self.writer);
        if self.plus {
            writer = entry(writer);
        }
        self.writer = writer
            .u64(ino)
            .u64(after)
            .u32(u32::try_from(name.len()).unwrap_or(0))
            .u32(kind.as_raw_mode() >> 12)
            .bytes(name)
            .align();
    }
}

/// An entry that the guest must look up itself.
fn without_lookup(writer: Writer) -> Writer {
    writer.zeros(ENTRY_OUT)
}

impl FileServer {
    pub(crate) fn opendir(&self, header: &Header) -> Result<Answer, Errno> {
        if header.node == ROOT_ID {
            return Ok(Writer::default().zeros(16).into());
        }
        let inode = self.inodes.get(header.node)?;
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let directory = openat(
            self.proc_self_fd(),
            magic_link(&*inode),
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let flags = if inode.share.options.exclusive {
            FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE
        } else {
            0
        };
        let fh = self.handles.insert(inode, directory)?;
        Ok(Writer::default().u64(fh).u32(flags).u32(0).into())
    }

    pub(crate) fn readdir(
        &self,
        shares: &Shares,
        header: &Header,
        body: &mut Reader<'_>,
    ) -> Result<Answer, Errno> {
        self.list(shares, header, body, false)
    }

    pub(crate) fn readdirplus(
        &self,
        shares: &Shares,
        header: &Header,
        body: &mut Reader<'_>,
    ) -> Result<Answer, Errno> {
        self.list(shares, header, body, true)
    }

    /// `struct fuse_read_in`: the entries from an offset on, as many as fit.
    fn list(
        &self,
        shares: &Shares,
        header: &Header,
        body: &mut Reader<'_>,
        plus: bool,
    ) -> Result<Answer, Errno> {
        let (fh, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
        let mut listing = Listing::new(size, plus);
        if header.node == ROOT_ID {
            list_root(shares, offset, &mut listing);
        } else {
            let handle = self.handles.get(fh)?;
            self.list_directory(&handle, offset, &mut listing)?;
        }
        Ok(listing.writer.into())
    }

    fn list_directory(
        &self,
        handle: &Handle,
        offset: u64,
        listing: &mut Listing,
    ) -> Result<(), Errno> {
        if handle.inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        i64::try_from(offset).map_err(|_| Errno::INVAL)?;
        // As much as will fit: what is read beyond that is read again next time.
        let room = if listing.plus {
            listing.size / 4
        } else {
            listing.size
        };
        let mut buffer = vec![MaybeUninit::uninit(); room.max(MIN_READ)];
        let _position = handle
            .position
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        seek(handle, SeekFrom::Start(offset))?;
        let mut entries = RawDir::new(handle, &mut buffer);
        let mut any = false;
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // What was found so far counts; the error comes again.
                Err(_) if any => break,
                Err(errno) => return Err(errno),
            };
            let name = entry.file_name().to_bytes();
            if !listing.fits(name) {
                break;
            }
            any = true;
            let after = entry.next_entry_cookie();
            listing.push(entry.ino(), after, entry.file_type(), name, |writer| {
                self.look_up_entry(writer, &handle.inode, &entry)
            });
        }
        Ok(())
    }

    /// Adds what LOOKUP would answer. Where it would fail, or where the guest must mount what is
    /// there, it is left to the guest to ask.
    fn look_up_entry(&self, writer: Writer, parent: &Inode, entry: &RawDirEntry<'_>) -> Writer {
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            return without_lookup(writer);
        }
        let Ok((inode, stat)) = self.find(parent, name) else {
            return without_lookup(writer);
        };
        if self.is_submount(&inode, Some(parent)) {
            self.inodes.forget(inode.id, 1);
            return without_lookup(writer);
        }
        self.entry(writer, &inode, &stat, Some(parent))
    }

    /// `struct fuse_fsync_in`.
    pub(crate) fn fsyncdir(&self, header: &Header, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        if header.node != ROOT_ID {
            fsync(&*self.handles.get(body.u64()?)?)?;
        }
        Ok(Answer::Empty)
    }
}

/// Lists the shares. Offsets are 1 and 2 for `.` and `..`, then 2 more than the share's id, so that
/// they stay when others come and go.
fn list_root(shares: &Shares, offset: u64, listing: &mut Listing) {
    for (after, name) in [(1, &b"."[..]), (2, b"..")] {
        if offset >= after {
            continue;
        }
        if !listing.fits(name) {
            return;
        }
        listing.push(ROOT_ID, after, FileType::Directory, name, without_lookup);
    }
    for (share, node) in shares.after(offset.saturating_sub(2)) {
        let name = share.name.as_bytes();
        if !listing.fits(name) {
            return;
        }
        let after = share.id.saturating_add(2);
        listing.push(node, after, FileType::Unknown, name, without_lookup);
    }
}
