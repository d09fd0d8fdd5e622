//! The FUSE wire format, protocol 7.41 (Linux, `include/uapi/linux/fuse.h`): numbers, flags, and
//! the little-endian records of requests and replies. Only what the server uses is here.

use std::ffi::CStr;

use rustix::{
    fs::{Statx, StatxTimestamp},
    io::Errno,
};

/// The major version of the protocol.
pub(crate) const MAJOR: u32 = 7;
/// The minor version the server speaks; the older one of both sides counts.
pub(crate) const MINOR: u32 = 41;
/// The oldest minor version with every record as it is read here (7.31, Linux 5.1).
pub(crate) const OLDEST_MINOR: u32 = 31;

/// The node of the file system's root.
pub(crate) const ROOT_ID: u64 = 1;
/// The length of `fuse_in_header`.
pub(crate) const IN_HEADER: usize = 40;
/// The length of `fuse_out_header`.
pub(crate) const OUT_HEADER: usize = 16;
/// The length of `fuse_write_in`.
pub(crate) const WRITE_IN: usize = 40;
/// The longest name of a directory entry, in bytes (`NAME_MAX`).
pub(crate) const NAME_MAX: usize = 255;
/// The longest value of an extended attribute, in bytes (`XATTR_SIZE_MAX`).
pub(crate) const XATTR_MAX: usize = 64 * 1024;
/// Pages of one READ or WRITE.
pub(crate) const MAX_PAGES: u16 = 256;
/// Bytes of one READ or WRITE.
pub(crate) const MAX_WRITE: u32 = 1024 * 1024;

/// Opcodes (`enum fuse_opcode`).
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
    pub(crate) const TMPFILE: u32 = 51;
    pub(crate) const STATX: u32 = 52;
}

bitflags::bitflags! {
    /// Features of `fuse_init_in` and `fuse_init_out`; those above bit 31 are in `flags2`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Features: u64 {
        const ASYNC_READ = 1 << 0;
        const ATOMIC_O_TRUNC = 1 << 3;
        const BIG_WRITES = 1 << 5;
        const DONT_MASK = 1 << 6;
        const AUTO_INVAL_DATA = 1 << 12;
        const DO_READDIRPLUS = 1 << 13;
        const READDIRPLUS_AUTO = 1 << 14;
        const ASYNC_DIO = 1 << 15;
        const PARALLEL_DIROPS = 1 << 18;
        const POSIX_ACL = 1 << 20;
        const MAX_PAGES = 1 << 22;
        const CACHE_SYMLINKS = 1 << 23;
        const SUBMOUNTS = 1 << 27;
        const HANDLE_KILLPRIV_V2 = 1 << 28;
        const SETXATTR_EXT = 1 << 29;
        const INIT_EXT = 1 << 30;
        const ALLOW_IDMAP = 1 << 40;
    }

    /// `fuse_setattr_in.valid`.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct SetattrValid: u32 {
        const MODE = 1 << 0;
        const UID = 1 << 1;
        const GID = 1 << 2;
        const SIZE = 1 << 3;
        const ATIME = 1 << 4;
        const MTIME = 1 << 5;
        const FH = 1 << 6;
        const ATIME_NOW = 1 << 7;
        const MTIME_NOW = 1 << 8;
        const KILL_SUIDGID = 1 << 11;
    }
}

/// `fuse_open_out.open_flags`: the data cached before the open is still good.
pub(crate) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// `fuse_open_out.open_flags`: the directory's entries may be cached.
pub(crate) const FOPEN_CACHE_DIR: u32 = 1 << 3;
/// `fuse_open_in.open_flags`: truncation clears set-user-ID and set-group-ID.
pub(crate) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `fuse_write_in.write_flags`: pages written back, through any handle of the file.
pub(crate) const WRITE_CACHE: u32 = 1 << 0;
/// `fuse_write_in.write_flags`: the write clears set-user-ID and set-group-ID.
pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `fuse_fsync_in.fsync_flags`: data only.
pub(crate) const FSYNC_FDATASYNC: u32 = 1 << 0;
/// `fuse_setxattr_in.setxattr_flags`: setting the ACL clears set-group-ID.
pub(crate) const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// `fuse_attr.flags`: the root of another mount.
pub(crate) const ATTR_SUBMOUNT: u32 = 1 << 0;

/// Reads the records of a request, in order. Running short is `EINVAL`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (head, tail) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = tail;
        Ok(head)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Errno> {
        let (head, tail) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = tail;
        Ok(u32::from_le_bytes(*head))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Errno> {
        let (head, tail) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = tail;
        Ok(u64::from_le_bytes(*head))
    }

    /// A NUL-terminated string of any content and length.
    pub(crate) fn string(&mut self) -> Result<&'a CStr, Errno> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.bytes(string.count_bytes() + 1)?;
        Ok(string)
    }

    /// The name of a directory entry: one component that is neither `.` nor `..`, so that it can
    /// lead nowhere but into the directory it is used in.
    pub(crate) fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.string()?;
        match name.to_bytes() {
            [] | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(name),
        }
    }
}

/// Builds the records of a reply, in order.
#[derive(Debug, Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }

    pub(crate) fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn zeros(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// Zeros up to a multiple of 8 bytes (`FUSE_REC_ALIGN`).
    pub(crate) fn align(self) -> Self {
        let count = self.0.len().next_multiple_of(8) - self.0.len();
        self.zeros(count)
    }

    /// `struct fuse_attr`; `ino` is what the guest sees as `st_ino`.
    pub(crate) fn attr(self, stat: &Statx, ino: u64, flags: u32) -> Self {
        self.u64(ino)
            .u64(stat.stx_size)
            .u64(stat.stx_blocks)
            .u64(stat.stx_atime.tv_sec.cast_unsigned())
            .u64(stat.stx_mtime.tv_sec.cast_unsigned())
            .u64(stat.stx_ctime.tv_sec.cast_unsigned())
            .u32(stat.stx_atime.tv_nsec)
            .u32(stat.stx_mtime.tv_nsec)
            .u32(stat.stx_ctime.tv_nsec)
            .u32(u32::from(stat.stx_mode))
            .u32(stat.stx_nlink)
            .u32(stat.stx_uid)
            .u32(stat.stx_gid)
            .u32(encode_device(stat.stx_rdev_major, stat.stx_rdev_minor))
            .u32(stat.stx_blksize)
            .u32(flags)
    }

    /// `struct fuse_statx`.
    pub(crate) fn statx(self, stat: &Statx, ino: u64) -> Self {
        self.u32(stat.stx_mask)
            .u32(stat.stx_blksize)
            .u64(stat.stx_attributes.bits())
            .u32(stat.stx_nlink)
            .u32(stat.stx_uid)
            .u32(stat.stx_gid)
            .u16(stat.stx_mode)
            .zeros(2)
            .u64(ino)
            .u64(stat.stx_size)
            .u64(stat.stx_blocks)
            .u64(stat.stx_attributes_mask.bits())
            .statx_time(&stat.stx_atime)
            .statx_time(&stat.stx_btime)
            .statx_time(&stat.stx_ctime)
            .statx_time(&stat.stx_mtime)
            .u32(stat.stx_rdev_major)
            .u32(stat.stx_rdev_minor)
            .u32(stat.stx_dev_major)
            .u32(stat.stx_dev_minor)
            .zeros(14 * 8)
    }

    fn statx_time(self, time: &StatxTimestamp) -> Self {
        self.u64(time.tv_sec.cast_unsigned())
            .u32(time.tv_nsec)
            .zeros(4)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// A device number as the kernel passes it in 32 bits (`new_encode_dev`).
pub(crate) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}

/// The major and minor number in what [`encode_device`] makes (`new_decode_dev`).
pub(crate) fn decode_device(device: u32) -> (u32, u32) {
    (
        (device & 0xf_ff00) >> 8,
        (device & 0xff) | ((device >> 12) & 0xf_ff00),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for (bytes, errno) in [
            (&b"\0"[..], Errno::INVAL),
            (b".\0", Errno::INVAL),
            (b"..\0", Errno::INVAL),
            (b"a/b\0", Errno::INVAL),
            (b"/\0", Errno::INVAL),
            (b"no end", Errno::INVAL),
            (b"", Errno::INVAL),
        ] {
            assert_eq!(Reader::new(bytes).name(), Err(errno), "{bytes:?}");
        }
        let mut long = vec![b'x'; 256];
        long.push(0);
        assert_eq!(Reader::new(&long).name(), Err(Errno::NAMETOOLONG));
        assert_eq!(
            Reader::new(&long[1..]).name().map(CStr::count_bytes),
            Ok(255)
        );
        assert_eq!(Reader::new(b"...\0").name(), Ok(c"..."));
    }

    #[test]
    fn device_numbers_survive_their_encoding() {
        for (major, minor) in [(0, 0), (1, 3), (259, 70_000), (0xfff, 0xf_ffff)] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
        }
    }
}
