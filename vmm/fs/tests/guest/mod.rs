//! Plays the guest's kernel: writes requests byte by byte and takes replies apart.
#![allow(
    dead_code,
    missing_docs,
    reason = "shared by several test binaries, none of which uses all of it"
)]

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use bulkhead_fs::{FileServer, ShareOptions};
use tempfile::TempDir;
use vm_memory::VolatileSlice;

pub const EXCLUSIVE: ShareOptions = ShareOptions {
    read_only: false,
    exclusive: true,
};
pub const SHARED: ShareOptions = ShareOptions {
    read_only: false,
    exclusive: false,
};
pub const READ_ONLY: ShareOptions = ShareOptions {
    read_only: true,
    exclusive: false,
};

pub const ROOT: u64 = 1;
pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const RENAME: u32 = 12;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const STATFS: u32 = 17;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const SETXATTR: u32 = 21;
pub const GETXATTR: u32 = 22;
pub const LISTXATTR: u32 = 23;
pub const REMOVEXATTR: u32 = 24;
pub const FLUSH: u32 = 25;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const RELEASEDIR: u32 = 29;
pub const FSYNCDIR: u32 = 30;
pub const CREATE: u32 = 35;
pub const DESTROY: u32 = 38;
pub const IOCTL: u32 = 39;
pub const BATCH_FORGET: u32 = 42;
pub const FALLOCATE: u32 = 43;
pub const READDIRPLUS: u32 = 44;
pub const RENAME2: u32 = 45;
pub const LSEEK: u32 = 46;
pub const COPY_FILE_RANGE: u32 = 47;
pub const SYNCFS: u32 = 50;
pub const TMPFILE: u32 = 51;
pub const STATX: u32 = 52;

/// Every feature Linux 6.12 offers over virtio-fs.
pub const OFFERED: u64 = !(1 << 31);

pub type Reply = Result<Vec<u8>, i32>;

/// Concatenates integers and byte strings, little-endian.
#[macro_export]
macro_rules! record {
    ($($part:expr),* $(,)?) => {{
        #[allow(unused_mut, reason = "an empty record changes nothing")]
        let mut bytes: Vec<u8> = Vec::new();
        $($crate::guest::Part::append(&$part, &mut bytes);)*
        bytes
    }};
}

pub trait Part {
    fn append(&self, bytes: &mut Vec<u8>);
}
impl Part for u32 {
    fn append(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }
}
impl Part for u64 {
    fn append(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }
}
/// A string with its NUL.
impl Part for &str {
    fn append(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.as_bytes());
        bytes.push(0);
    }
}
impl Part for &[u8] {
    fn append(&self, bytes: &mut Vec<u8>) {
        bytes.extend(*self);
    }
}

pub fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

/// `struct fuse_attr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub mtime: u64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub flags: u32,
}

impl Attr {
    pub fn parse(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 88);
        Self {
            ino: u64_at(bytes, 0),
            size: u64_at(bytes, 8),
            blocks: u64_at(bytes, 16),
            mtime: u64_at(bytes, 32),
            mode: u32_at(bytes, 60),
            nlink: u32_at(bytes, 64),
            uid: u32_at(bytes, 68),
            gid: u32_at(bytes, 72),
            rdev: u32_at(bytes, 76),
            flags: u32_at(bytes, 84),
        }
    }
}

/// `struct fuse_entry_out`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    pub entry_valid: u64,
    pub attr_valid: u64,
    pub attr: Attr,
}

impl Entry {
    pub fn parse(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), 128);
        Self {
            node: u64_at(bytes, 0),
            entry_valid: u64_at(bytes, 16),
            attr_valid: u64_at(bytes, 24),
            attr: Attr::parse(&bytes[40..]),
        }
    }
}

/// One entry of READDIR or READDIRPLUS.
#[derive(Debug, Clone)]
pub struct Dirent {
    pub entry: Option<Entry>,
    pub offset: u64,
    pub kind: u32,
    pub name: String,
}

/// Puts a request together.
pub fn request(opcode: u32, unique: u64, node: u64, uid: u32, gid: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(40 + body.len()).unwrap();
    record![len, opcode, unique, node, uid, gid, 77_u32, 0_u32, body]
}

/// Hands buffers to the server in pieces of `piece` bytes, as a guest's descriptors do.
pub fn exchange(server: &FileServer, request: &mut [u8], reply: &mut [u8], piece: usize) -> usize {
    let request: Vec<_> = request.chunks_mut(piece).map(VolatileSlice::from).collect();
    let reply: Vec<_> = reply.chunks_mut(piece).map(VolatileSlice::from).collect();
    server.handle(&request, &reply)
}

pub fn path_fd(path: &Path) -> OwnedFd {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(path)
        .unwrap()
        .into()
}

pub fn server() -> FileServer {
    FileServer::new(path_fd(Path::new("/proc/self/fd"))).unwrap()
}

/// A guest with one share, `share`, of a new directory.
pub struct Guest {
    pub server: FileServer,
    pub directory: TempDir,
    pub share: u64,
    pub uid: u32,
    pub gid: u32,
    unique: AtomicU64,
}

impl Guest {
    pub fn new(options: ShareOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("share");
        std::fs::create_dir(&inside).unwrap();
        let server = server();
        server.share("share", path_fd(&inside), options).unwrap();
        let mut guest = Self {
            server,
            directory,
            share: 0,
            uid: 0,
            gid: 0,
            unique: AtomicU64::new(1),
        };
        guest.init(OFFERED).unwrap();
        guest.share = guest.lookup(ROOT, "share").unwrap().node;
        guest
    }

    /// The directory of the share on the host.
    pub fn host(&self, below: &str) -> PathBuf {
        self.directory.path().join("share").join(below)
    }

    pub fn init(&self, offered: u64) -> Reply {
        let low = u32::try_from(offered & 0xffff_ffff).unwrap();
        let high = u32::try_from(offered >> 32).unwrap();
        let body = record![7_u32, 41_u32, 131_072_u32, low, high, &[0_u8; 44][..]];
        self.call(INIT, 0, &body)
    }

    pub fn call(&self, opcode: u32, node: u64, body: &[u8]) -> Reply {
        self.call_for(opcode, node, body, 70_000)
    }

    /// Makes a request with room for a reply of `room` bytes behind the header.
    pub fn call_for(&self, opcode: u32, node: u64, body: &[u8], room: usize) -> Reply {
        let unique = self.unique.fetch_add(1, Ordering::Relaxed);
        let mut bytes = request(opcode, unique, node, self.uid, self.gid, body);
        let mut reply = vec![0xaa; 16 + room];
        let length = exchange(&self.server, &mut bytes, &mut reply, 4096);
        assert!(length >= 16, "a reply to {opcode}");
        assert_eq!(u32_at(&reply, 0) as usize, length);
        assert_eq!(u64_at(&reply, 8), unique);
        assert!(reply[length..].iter().all(|byte| *byte == 0xaa));
        match u32_at(&reply, 4).cast_signed() {
            0 => Ok(reply[16..length].to_vec()),
            error => {
                assert_eq!(length, 16);
                Err(-error)
            }
        }
    }

    /// Makes a request that has no reply.
    pub fn tell(&self, opcode: u32, node: u64, body: &[u8]) {
        let mut bytes = request(opcode, 0, node, 0, 0, body);
        assert_eq!(exchange(&self.server, &mut bytes, &mut [], 4096), 0);
    }

    pub fn lookup(&self, parent: u64, name: &str) -> Result<Entry, i32> {
        let reply = self.call(LOOKUP, parent, &record![name])?;
        let entry = Entry::parse(&reply);
        if entry.node == 0 {
            return Err(libc::ENOENT);
        }
        Ok(entry)
    }

    pub fn forget(&self, node: u64, count: u64) {
        self.tell(FORGET, node, &record![count]);
    }

    pub fn getattr(&self, node: u64) -> Result<Attr, i32> {
        let reply = self.call(GETATTR, node, &record![0_u32, 0_u32, 0_u64])?;
        Ok(Attr::parse(&reply[16..]))
    }

    pub fn mkdir(&self, parent: u64, name: &str, mode: u32, umask: u32) -> Result<Entry, i32> {
        self.call(MKDIR, parent, &record![mode, umask, name])
            .map(|reply| Entry::parse(&reply))
    }

    pub fn mknod(&self, parent: u64, name: &str, mode: u32, rdev: u32) -> Result<Entry, i32> {
        self.call(MKNOD, parent, &record![mode, rdev, 0_u32, 0_u32, name])
            .map(|reply| Entry::parse(&reply))
    }

    pub fn symlink(&self, parent: u64, name: &str, target: &str) -> Result<Entry, i32> {
        self.call(SYMLINK, parent, &record![name, target])
            .map(|reply| Entry::parse(&reply))
    }

    pub fn link(&self, node: u64, parent: u64, name: &str) -> Result<Entry, i32> {
        self.call(LINK, parent, &record![node, name])
            .map(|reply| Entry::parse(&reply))
    }

    pub fn create(
        &self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(Entry, u64), i32> {
        let mode = libc::S_IFREG | mode;
        let body = record![flags.cast_unsigned(), mode, 0o22_u32, 0_u32, name];
        let reply = self.call(CREATE, parent, &body)?;
        Ok((Entry::parse(&reply[..128]), u64_at(&reply, 128)))
    }

    /// A new file with content.
    pub fn file(&self, parent: u64, name: &str, content: &[u8]) -> u64 {
        let (entry, fh) = self
            .create(parent, name, libc::O_RDWR | libc::O_EXCL, 0o644)
            .unwrap();
        assert_eq!(self.write(fh, 0, content), Ok(content.len()));
        self.release(fh);
        entry.node
    }

    pub fn open(&self, node: u64, flags: i32) -> Result<u64, i32> {
        self.call(OPEN, node, &record![flags.cast_unsigned(), 0_u32])
            .map(|reply| u64_at(&reply, 0))
    }

    pub fn release(&self, fh: u64) {
        self.call(RELEASE, 0, &record![fh, 0_u32, 0_u32, 0_u64])
            .unwrap();
    }

    pub fn read(&self, fh: u64, offset: u64, size: u32) -> Reply {
        let body = record![fh, offset, size, 0_u32, 0_u64, 0_u32, 0_u32];
        self.call_for(READ, 0, &body, size as usize)
    }

    pub fn write(&self, fh: u64, offset: u64, data: &[u8]) -> Result<usize, i32> {
        self.write_with(fh, offset, data, 0, 0)
    }

    pub fn write_with(
        &self,
        fh: u64,
        offset: u64,
        data: &[u8],
        write_flags: u32,
        flags: i32,
    ) -> Result<usize, i32> {
        let size = u32::try_from(data.len()).unwrap();
        let flags = flags.cast_unsigned();
        let body = record![fh, offset, size, write_flags, 0_u64, flags, 0_u32, data];
        self.call(WRITE, 0, &body)
            .map(|reply| u32_at(&reply, 0) as usize)
    }

    pub fn unlink(&self, parent: u64, name: &str) -> Result<(), i32> {
        self.call(UNLINK, parent, &record![name]).map(drop)
    }

    pub fn rename(&self, from: (u64, &str), to: (u64, &str), flags: u32) -> Result<(), i32> {
        let body = record![to.0, flags, 0_u32, from.1, to.1];
        self.call(RENAME2, from.0, &body).map(drop)
    }

    /// SETATTR with the fields in the order of `fuse_setattr_in`.
    pub fn setattr(&self, node: u64, set: &Setattr) -> Result<Attr, i32> {
        let body = record![
            set.valid,
            0_u32,
            set.fh,
            set.size,
            0_u64,
            set.atime,
            set.mtime,
            0_u64,
            set.nanoseconds,
            set.nanoseconds,
            0_u32,
            set.mode,
            0_u32,
            set.uid,
            set.gid,
            0_u32
        ];
        self.call(SETATTR, node, &body)
            .map(|reply| Attr::parse(&reply[16..]))
    }

    pub fn setxattr(&self, node: u64, name: &str, value: &[u8]) -> Result<(), i32> {
        let size = u32::try_from(value.len()).unwrap();
        let body = record![size, 0_u32, 0_u32, 0_u32, name, value];
        self.call(SETXATTR, node, &body).map(drop)
    }

    pub fn getxattr(&self, node: u64, name: &str, size: u32) -> Reply {
        self.call(GETXATTR, node, &record![size, 0_u32, name])
    }

    pub fn listxattr(&self, node: u64, size: u32) -> Reply {
        self.call(LISTXATTR, node, &record![size, 0_u32])
    }

    /// Reads a directory to its end, with buffers of `size` bytes.
    pub fn list(&self, node: u64, plus: bool, size: u32) -> Result<Vec<Dirent>, i32> {
        let reply = self.call(OPENDIR, node, &record![0_u32, 0_u32])?;
        let fh = u64_at(&reply, 0);
        let mut all = Vec::new();
        loop {
            let offset = all.last().map_or(0, |entry: &Dirent| entry.offset);
            let some = self.list_some(node, fh, plus, offset, size)?;
            if some.is_empty() {
                break;
            }
            all.extend(some);
        }
        self.call(RELEASEDIR, node, &record![fh, 0_u32, 0_u32, 0_u64])?;
        Ok(all)
    }

    pub fn list_some(
        &self,
        node: u64,
        fh: u64,
        plus: bool,
        offset: u64,
        size: u32,
    ) -> Result<Vec<Dirent>, i32> {
        let opcode = if plus { READDIRPLUS } else { READDIR };
        let body = record![fh, offset, size, 0_u32, 0_u64, 0_u32, 0_u32];
        let reply = self.call_for(opcode, node, &body, size as usize)?;
        let mut rest = &reply[..];
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let entry = plus.then(|| {
                let (entry, tail) = rest.split_at(128);
                rest = tail;
                Entry::parse(entry)
            });
            let length = u32_at(rest, 16) as usize;
            entries.push(Dirent {
                entry: entry.filter(|entry| entry.node != 0),
                offset: u64_at(rest, 8),
                kind: u32_at(rest, 20),
                name: String::from_utf8(rest[24..24 + length].to_vec()).unwrap(),
            });
            rest = &rest[(24 + length).next_multiple_of(8)..];
        }
        Ok(entries)
    }
}

/// What SETATTR sets.
#[derive(Debug, Default)]
pub struct Setattr {
    pub valid: u32,
    pub fh: u64,
    pub size: u64,
    pub atime: u64,
    pub mtime: u64,
    pub nanoseconds: u32,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

pub fn names(entries: &[Dirent]) -> Vec<&str> {
    entries.iter().map(|entry| entry.name.as_str()).collect()
}
