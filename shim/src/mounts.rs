//! Mounts on the host, as containerd's snapshotters ask for them.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use thiserror::Error;

use crate::spec::{IdMapping, IdMappings};

/// mount(2) takes one page of options, its last byte being zero.
const MAX_OPTIONS: usize = 4095;

/// How many mounts may be stacked on one directory when it is cleaned up.
const MAX_STACKED: usize = 64;

/// A mount that failed.
#[derive(Debug, Error)]
pub enum MountError {
    /// mount(2) failed.
    #[error("Cannot mount {source_name} ({kind}) on {target}")]
    Mount {
        /// What is mounted.
        source_name: String,
        /// The file system's type.
        kind: String,
        /// Where.
        target: PathBuf,
        /// The system's error.
        #[source]
        source: Errno,
    },
    /// The options do not fit.
    #[error("The options for {target} are {length} bytes long; the kernel takes {MAX_OPTIONS}")]
    TooLong {
        /// Where.
        target: PathBuf,
        /// Their length in bytes.
        length: usize,
    },
    /// A path or option has a zero byte.
    #[error("A mount for {0} has a zero byte in its options")]
    ZeroByte(PathBuf),
    /// A file cannot be made a block device.
    #[error("Cannot attach {path} to a loop device")]
    Loop {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Not yet.
    #[error("Mount option {0:?} is not supported")]
    Option(String),
}

/// The options of a mount, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Flags of mount(2).
    pub flags: MsFlags,
    /// The source is a file, to be attached to a loop device.
    pub attach_loop: bool,
    /// What is the file system's own business.
    pub data: Vec<String>,
    /// By what ids its files are shown: with an overlay those of its lower layers.
    pub ids: IdMappings,
}

/// Options of mount(8) that are flags of mount(2): name, flag, whether it is set or cleared.
const FLAGS: [(&str, MsFlags, bool); 25] = [
    ("ro", MsFlags::MS_RDONLY, true),
    ("rw", MsFlags::MS_RDONLY, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("nodev", MsFlags::MS_NODEV, true),
    ("dev", MsFlags::MS_NODEV, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("async", MsFlags::MS_SYNCHRONOUS, false),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
    ("remount", MsFlags::MS_REMOUNT, true),
    ("mand", MsFlags::MS_MANDLOCK, true),
    ("nomand", MsFlags::MS_MANDLOCK, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("norelatime", MsFlags::MS_RELATIME, false),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("nostrictatime", MsFlags::MS_STRICTATIME, false),
    ("silent", MsFlags::MS_SILENT, true),
    ("loud", MsFlags::MS_SILENT, false),
    ("defaults", MsFlags::empty(), true),
];

impl Options {
    /// Tells flags from the file system's own options.
    pub fn parse(kind: &str, options: &[String]) -> Result<Self, MountError> {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            attach_loop: false,
            data: Vec::new(),
            ids: IdMappings::default(),
        };
        if kind == "bind" {
            parsed.flags |= MsFlags::MS_BIND;
        }
        for option in options {
            if let Some((_, flag, set)) = FLAGS.iter().find(|(name, ..)| name == option) {
                parsed.flags.set(*flag, *set);
                continue;
            }
            match option.as_str() {
                "" => {}
                "bind" => parsed.flags |= MsFlags::MS_BIND,
                "rbind" => parsed.flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
                "loop" => parsed.attach_loop = true,
                // containerd's own, for pods with a user namespace.
                ids if ids.starts_with("uidmap=") => {
                    parsed.ids.uid_mappings = Some(parse_ids(&ids["uidmap=".len()..], option)?);
                }
                ids if ids.starts_with("gidmap=") => {
                    parsed.ids.gid_mappings = Some(parse_ids(&ids["gidmap=".len()..], option)?);
                }
                // For programs, not for the kernel (mount(8)).
                note if note.starts_with("x-") || note.starts_with("X-") => {}
                data => parsed.data.push(data.to_owned()),
            }
        }
        Ok(parsed)
    }
}

/// Ids as containerd writes them: `CONTAINER:HOST:SIZE`, with commas between several.
fn parse_ids(ids: &str, option: &str) -> Result<Vec<IdMapping>, MountError> {
    let mapping = |text: &str| {
        let mut numbers = text.split(':').map(|number| number.parse().ok());
        let mapping = IdMapping {
            container: numbers.next()??,
            host: numbers.next()??,
            size: numbers.next()??,
        };
        numbers.next().is_none().then_some(mapping)
    };
    let mappings: Option<Vec<_>> = ids.split(',').map(mapping).collect();
    mappings.ok_or_else(|| MountError::Option(option.to_owned()))
}

/// Mounts `source`, which is not to be bound, on `target`, which exists.
pub fn mount_on(
    kind: &str,
    source: &str,
    options: &Options,
    target: &Path,
) -> Result<(), MountError> {
    let failed = |errno| MountError::Mount {
        source_name: source.to_owned(),
        kind: kind.to_owned(),
        target: target.to_owned(),
        source: errno,
    };
    let device = options
        .attach_loop
        .then(|| {
            attach_loop(
                Path::new(source),
                options.flags.contains(MsFlags::MS_RDONLY),
            )
        })
        .transpose()
        .map_err(|error| MountError::Loop {
            path: source.into(),
            source: error,
        })?;
    let source = device
        .as_ref()
        .map_or_else(|| source.to_owned(), |device| device.path.clone());
    let data = options.data.join(",");
    if data.contains('\0') {
        return Err(MountError::ZeroByte(target.to_owned()));
    }
    if data.len() <= MAX_OPTIONS {
        return mount(
            Some(source.as_str()),
            target,
            Some(kind),
            options.flags,
            Some(data.as_str()),
        )
        .map_err(failed);
    }
    Err(MountError::TooLong {
        target: target.to_owned(),
        length: data.len(),
    })
}

/// Takes every mount off `target`, with those below. A mount that is in use goes as soon as it is
/// no longer.
pub fn unmount_all(target: &Path) {
    for _ in 0..MAX_STACKED {
        let result = match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Err(Errno::EBUSY) => umount2(target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH),
            result => result,
        };
        match result {
            Ok(()) | Err(Errno::EINTR) => {}
            // Nothing is mounted there, or nothing is there.
            Err(Errno::EINVAL | Errno::ENOENT) => return,
            Err(errno) => {
                tracing::warn!(target = %target.display(), %errno, "Cannot unmount");
                return;
            }
        }
    }
}

/// A loop device that goes when its last user does.
struct LoopDevice {
    path: String,
    _open: File,
}

/// `struct loop_info64` of <linux/loop.h>
#[repr(C)]
struct LoopInfo {
    numbers: [u64; 5],
    number: u32,
    encrypt: [u32; 2],
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of <linux/loop.h>
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

fn attach_loop(file: &Path, read_only: bool) -> io::Result<LoopDevice> {
    let backing = File::options().read(true).write(!read_only).open(file)?;
    let control = File::options()
        .read(true)
        .write(true)
        .open("/dev/loop-control")?;
    loop {
        // SAFETY: LOOP_CTL_GET_FREE takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = format!("/dev/loop{number}");
        let device = File::options().read(true).write(!read_only).open(&path)?;
        let read_only = if read_only { LO_FLAGS_READ_ONLY } else { 0 };
        let config = LoopConfig {
            fd: u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?,
            block_size: 0,
            info: LoopInfo {
                numbers: [0; 5],
                number: 0,
                encrypt: [0; 2],
                flags: LO_FLAGS_AUTOCLEAR | read_only,
                file_name: [0; 64],
                crypt_name: [0; 64],
                encrypt_key: [0; 32],
                init: [0; 2],
            },
            reserved: [0; 8],
        };
        // SAFETY: `config` has the layout that the kernel reads, and outlives the call.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        if result == 0 {
            return Ok(LoopDevice {
                path,
                _open: device,
            });
        }
        let error = io::Error::last_os_error();
        // Somebody else was faster; there is another one.
        if error.raw_os_error() != Some(libc::EBUSY) {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(kind: &str, options: &[&str]) -> Result<Options, MountError> {
        let owned: Vec<String> = options.iter().map(|&option| option.into()).collect();
        Options::parse(kind, &owned)
    }

    #[test]
    fn flags_are_told_from_data() {
        let parsed = options("overlay", &["ro", "nosuid", "index=off", "lowerdir=/a:/b"]).unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(parsed.data, ["index=off", "lowerdir=/a:/b"]);
    }

    #[test]
    fn the_last_flag_wins() {
        assert!(options("ext4", &["ro", "rw"]).unwrap().flags.is_empty());
    }

    #[test]
    fn binds_are_told_by_type_and_by_option() {
        assert_eq!(options("bind", &[]).unwrap().flags, MsFlags::MS_BIND);
        assert_eq!(
            options("none", &["rbind"]).unwrap().flags,
            MsFlags::MS_BIND | MsFlags::MS_REC
        );
    }

    #[test]
    fn loops_and_notes_do_not_reach_the_kernel() {
        let parsed = options("ext4", &["loop", "x-note"]).unwrap();
        assert!(parsed.attach_loop && parsed.data.is_empty());
    }

    #[test]
    fn mapped_ids_are_read_and_do_not_reach_the_kernel() {
        let parsed = options("overlay", &["uidmap=0:131072:65536,7:8:9", "gidmap=0:1:2"]).unwrap();
        let mapping = |container, host, size| IdMapping {
            container,
            host,
            size,
        };
        let users = vec![mapping(0, 131_072, 65_536), mapping(7, 8, 9)];
        assert_eq!(parsed.ids.uid_mappings, Some(users));
        assert_eq!(parsed.ids.gid_mappings, Some(vec![mapping(0, 1, 2)]));
        assert!(parsed.data.is_empty());
        for wrong in ["uidmap=", "uidmap=0:1", "gidmap=0:1:2:3", "gidmap=a:1:2"] {
            assert!(matches!(
                options("overlay", &[wrong]),
                Err(MountError::Option(_))
            ));
        }
    }
}
