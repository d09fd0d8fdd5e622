//! The server: its shares, and one request after the other.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{fs::FileType, io::Errno};
use vm_memory::VolatileSlice;

use crate::{
    FsError, ShareOptions,
    abi::{
        Features, MAJOR, MAX_PAGES, MAX_WRITE, MINOR, OLDEST_MINOR, Reader, Writer,
        opcode::{
            BATCH_FORGET, COPY_FILE_RANGE, CREATE, DESTROY, FALLOCATE, FORGET, FSYNC, FSYNCDIR,
            GETATTR, GETXATTR, INIT, INTERRUPT, IOCTL, LINK, LISTXATTR, LOOKUP, LSEEK, MKDIR,
            MKNOD, OPEN, OPENDIR, READ, READDIR, READDIRPLUS, READLINK, RELEASE, RELEASEDIR,
            REMOVEXATTR, RENAME, RENAME2, RMDIR, SETATTR, SETXATTR, STATFS, STATX, SYMLINK, SYNCFS,
            TMPFILE, UNLINK, WRITE,
        },
    },
    descriptors::Descriptors,
    handles::Handles,
    inodes::{self, Inodes},
    reply::{self, Answer},
    request::Header,
    share::Shares,
    thread,
};

/// What the server asks of the guest's kernel.
///
/// Permissions are checked by the guest (`POSIX_ACL` implies `default_permissions`); umasks, ACLs
/// that new files inherit and the clearing of set-user-ID are left to the host's kernel
/// (`DONT_MASK`, `HANDLE_KILLPRIV_V2`). Data cached by the guest is dropped when a file has
/// changed behind its back (`AUTO_INVAL_DATA`), and there is no `WRITEBACK_CACHE`, with which the
/// guest would trust its own size and times of a file that others change too: both count for the
/// whole connection, so they must suit shares that are not exclusive. Locks are the guest's own.
const FEATURES: Features = Features::all();

/// Read-ahead in bytes, at most what the guest offers.
const MAX_READAHEAD: u32 = 1024 * 1024;
/// Requests the guest keeps in flight for read-ahead and writing back.
const MAX_BACKGROUND: u16 = 64;
const CONGESTION_THRESHOLD: u16 = 48;

/// A FUSE server for one guest. Requests may be handled by several threads at once.
///
/// It has the state of one FUSE connection; a new INIT starts over with the same shares.
#[derive(Debug)]
pub struct FileServer {
    /// `/proc/self/fd`, to open again what is known by an `O_PATH` descriptor.
    proc_self_fd: OwnedFd,
    /// Held for reading by every request: a share is not taken away under one.
    shares: RwLock<Shares>,
    pub(crate) inodes: Inodes,
    pub(crate) handles: Handles,
    /// Whether the guest mounts the root of each share as a file system of its own.
    submounts: AtomicBool,
}

impl FileServer {
    /// Makes a server without shares. `proc_self_fd` is an `O_PATH` descriptor of `/proc/self/fd`.
    ///
    /// Raises the process's limit of open files (`RLIMIT_NOFILE`) as far as it may: every file the
    /// guest has in its caches costs a descriptor, and at the limit look-ups fail with `ENFILE`.
    pub fn new(proc_self_fd: OwnedFd) -> Result<Self, FsError> {
        let descriptors = Descriptors::of_process().map_err(FsError::Limit)?;
        Ok(Self::with_budget(proc_self_fd, &descriptors))
    }

    pub(crate) fn with_budget(proc_self_fd: OwnedFd, descriptors: &Arc<Descriptors>) -> Self {
        Self {
            proc_self_fd,
            shares: RwLock::default(),
            inodes: Inodes::new(Arc::clone(descriptors)),
            handles: Handles::new(Arc::clone(descriptors)),
            submounts: AtomicBool::new(false),
        }
    }

    /// Adds `root`, an `O_PATH` descriptor, as `name` below the file system's root. Mounts below
    /// it are part of it.
    pub fn share(&self, name: &str, root: OwnedFd, options: ShareOptions) -> Result<(), FsError> {
        let failed = |source| FsError::Root {
            name: name.to_owned(),
            source,
        };
        let mut shares = self.shares.write().unwrap_or_else(PoisonError::into_inner);
        let share = Arc::new(shares.draft(name, options)?);
        let stat = inodes::stat(&root).map_err(failed)?;
        let inode = self.inodes.add_root(&share, root, &stat).map_err(failed)?;
        shares.insert(share, inode.id);
        Ok(())
    }

    /// Takes a share away, after the requests under way. When it returns, no descriptor of it is
    /// left, and requests for its files fail with `ESTALE` or `EBADF`.
    pub fn unshare(&self, name: &str) -> Result<(), FsError> {
        let mut shares = self.shares.write().unwrap_or_else(PoisonError::into_inner);
        let share = shares
            .remove(name)
            .ok_or_else(|| FsError::Unknown(name.to_owned()))?;
        self.handles.remove_share(share.id);
        self.inodes.remove_share(share.id);
        Ok(())
    }

    /// Makes the calling thread ready to handle requests: it gets a working directory and a umask
    /// of its own (unshare(2), fchdir(2), umask(2)). [`Self::handle`] does so when it was not done,
    /// which a thread's system call filter may forbid later.
    pub fn prepare_thread(&self) -> Result<(), FsError> {
        thread::prepare(self.proc_self_fd.as_fd()).map_err(FsError::Thread)
    }

    /// Serves one request: `request` is what the guest wrote, `reply` is where the answer goes.
    /// Returns the bytes written to `reply`; 0 means that the request has no answer.
    ///
    /// May block for as long as the host's file systems do. The calling thread's identity, umask
    /// and capabilities change on the way and are back when it returns.
    pub fn handle(&self, request: &[VolatileSlice<'_>], reply: &[VolatileSlice<'_>]) -> usize {
        let Some(header) = Header::read(request) else {
            return 0;
        };
        let shares = self.shares.read().unwrap_or_else(PoisonError::into_inner);
        let outcome = header
            .check_length(request)
            .and_then(|()| thread::prepare(self.proc_self_fd.as_fd()))
            .and_then(|()| self.dispatch(&shares, &header, request, reply));
        let outcome = match header.opcode {
            FORGET | BATCH_FORGET | INTERRUPT => Ok(Answer::None),
            _ => outcome,
        };
        reply::send(reply, header.unique, outcome)
    }

    fn dispatch(
        &self,
        shares: &Shares,
        header: &Header,
        request: &[VolatileSlice<'_>],
        reply: &[VolatileSlice<'_>],
    ) -> Result<Answer, Errno> {
        if header.opcode == WRITE {
            return self.write(header, request);
        }
        let body = header.body(request)?;
        let mut body = Reader::new(&body);
        let body = &mut body;
        match header.opcode {
            INIT => self.init(body),
            DESTROY => {
                self.start_over();
                Ok(Answer::Empty)
            }
            INTERRUPT => Ok(Answer::None),

            LOOKUP => self.lookup(shares, header, body),
            FORGET => self.forget(header, body),
            BATCH_FORGET => self.batch_forget(body),

            GETATTR => self.getattr(header),
            STATX => self.statx(header),
            SETATTR => self.setattr(header, body),
            STATFS => self.statfs(header),

            MKNOD => self.mknod(header, body),
            MKDIR => self.mkdir(header, body),
            SYMLINK => self.symlink(header, body),
            CREATE => self.create(header, body),
            TMPFILE => self.tmpfile(header, body),

            LINK => self.link(header, body),
            READLINK => self.readlink(header),
            UNLINK => self.unlink(header, body),
            RMDIR => self.rmdir(header, body),
            RENAME => self.rename(header, body),
            RENAME2 => self.rename2(header, body),

            OPENDIR => self.opendir(header),
            READDIR => self.readdir(shares, header, body),
            READDIRPLUS => self.readdirplus(shares, header, body),
            FSYNCDIR => self.fsyncdir(header, body),

            OPEN => self.open(header, body),
            READ => self.read(body, reply),
            RELEASE | RELEASEDIR => self.release(body),
            FSYNC => self.fsync(body),
            FALLOCATE => self.fallocate(header, body),
            LSEEK => self.lseek(body),
            COPY_FILE_RANGE => self.copy_file_range(header, body),
            SYNCFS => self.syncfs(shares, header),

            SETXATTR => self.setxattr(header, body),
            GETXATTR => self.getxattr(header, body),
            LISTXATTR => self.listxattr(header, body),
            REMOVEXATTR => self.removexattr(header, body),

            // No ioctl is about the file alone and safe to pass on.
            IOCTL => Err(Errno::NOTTY),
            // The guest's kernel takes this as "never ask again": FLUSH does nothing on a local
            // file system, ACCESS is decided by the guest, POLL and BMAP are for other files.
            _ => Err(Errno::NOSYS),
        }
    }

    /// Agrees on the protocol (`struct fuse_init_in`, `struct fuse_init_out`).
    fn init(&self, body: &mut Reader<'_>) -> Result<Answer, Errno> {
        let major = body.u32()?;
        let minor = body.u32()?;
        let readahead = body.u32()?;
        let mut offered = u64::from(body.u32()?);
        if major < MAJOR || (major == MAJOR && minor < OLDEST_MINOR) {
            return Err(Errno::PROTO);
        }
        if major > MAJOR {
            // The guest then asks again with this one.
            return Ok(Writer::default().u32(MAJOR).u32(MINOR).zeros(56).into());
        }
        if offered & Features::INIT_EXT.bits() != 0 {
            offered |= u64::from(body.u32()?) << 32;
        }
        let agreed = FEATURES & Features::from_bits_truncate(offered);
        self.start_over();
        self.submounts
            .store(agreed.contains(Features::SUBMOUNTS), Ordering::Relaxed);
        let [low, high] = halves(agreed.bits());
        Ok(Writer::default()
            .u32(MAJOR)
            .u32(MINOR)
            .u32(readahead.min(MAX_READAHEAD))
            .u32(low)
            .u16(MAX_BACKGROUND)
            .u16(CONGESTION_THRESHOLD)
            .u32(MAX_WRITE)
            .u32(1) // time_gran: nanoseconds
            .u16(MAX_PAGES)
            .u16(0) // map_alignment
            .u32(high)
            .zeros(28)
            .into())
    }

    /// Forgets what the guest knew; the shares stay.
    fn start_over(&self) {
        self.handles.remove_all();
        self.inodes.forget_all();
    }

    pub(crate) fn proc_self_fd(&self) -> BorrowedFd<'_> {
        self.proc_self_fd.as_fd()
    }

    /// Whether a directory is to be mounted by the guest on its own, as it is mounted on the host,
    /// so that `st_dev` and inode numbers tell files apart as they do there.
    pub(crate) fn is_submount(
        &self,
        inode: &inodes::Inode,
        parent: Option<&inodes::Inode>,
    ) -> bool {
        self.submounts.load(Ordering::Relaxed)
            && inode.kind == FileType::Directory
            && parent.is_none_or(|parent| !parent.key.same_mount(&inode.key))
    }
}

/// The lower and the upper 32 bits.
fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}
