//! The check of the guest's files before they are used.
//!
//! Hashing tens of megabytes at every start would cost more than booting the guest, so what was
//! verified is remembered by the file's identity (device, inode, size, times): `ctime` cannot be
//! set by a program, so an equal identity means equal contents. The memory is a file that only
//! its owner can write; anything unexpected about it means hashing again, never an error.

use std::fs::{DirBuilder, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::manifest::{FileRecord, INITRAMFS, Manifest, ManifestError, VMLINUX};

/// File times advance with the kernel's timer tick, 10 ms at most. A file that changed this
/// recently could change again without a new `ctime`, so it is not remembered yet.
const TIME_GRANULARITY: Duration = Duration::from_millis(20);

/// The memory holds two short records; a file larger than this is something else.
const MAX_CACHE_BYTES: u64 = 64 << 10;

/// The verified files of a guest directory.
#[derive(Debug)]
pub struct GuestFiles {
    /// The manifest that the files agree with.
    pub manifest: Manifest,
    /// `vmlinux`, open for reading, offset 0.
    pub vmlinux: File,
    /// `initramfs.cpio`, open for reading, offset 0.
    pub initramfs: File,
    /// Why the result could not be remembered, if so: the files are good, but the next start
    /// hashes them again.
    pub cache_error: Option<CacheError>,
}

/// Why the files of a guest directory must not be used.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The manifest is missing or unusable.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A file is missing or unreadable.
    #[error("cannot open {path}")]
    Open {
        /// The file's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Something else than a regular file is in its place.
    #[error("{path} is not a regular file")]
    NotAFile {
        /// The file's path.
        path: PathBuf,
    },
    /// Reading failed while hashing.
    #[error("cannot read {path}")]
    Read {
        /// The file's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The file has another size than its manifest says.
    #[error("{path} is corrupt: it has {actual} bytes, its manifest says {expected}")]
    Size {
        /// The file's path.
        path: PathBuf,
        /// The manifest's size in bytes.
        expected: u64,
        /// The file's size in bytes.
        actual: u64,
    },
    /// The file has other contents than its manifest says.
    #[error("{path} is corrupt: its sha256 is {actual}, its manifest says {expected}")]
    Hash {
        /// The file's path.
        path: PathBuf,
        /// The manifest's hash.
        expected: String,
        /// The file's hash.
        actual: String,
    },
    /// The file was written to while it was hashed.
    #[error("{path} changed while it was being verified")]
    Changed {
        /// The file's path.
        path: PathBuf,
    },
}

/// Why a verification could not be remembered.
#[derive(Debug, thiserror::Error)]
#[error("cannot remember verified files in {path}")]
pub struct CacheError {
    /// The memory's path.
    pub path: PathBuf,
    /// The system's error.
    #[source]
    pub source: io::Error,
}

/// Checks `vmlinux` and `initramfs.cpio` of `directory` against its `manifest.json` and returns
/// them open.
///
/// The descriptors are those that were checked: whoever uses them instead of the paths uses what
/// was verified. `cache` is the memory's path, created with its directory when missing.
pub fn verify(directory: &Path, cache: &Path) -> Result<GuestFiles, VerifyError> {
    verify_at(SystemTime::now(), directory, cache)
}

/// [`verify`] at a given time, which only decides what is old enough to be remembered.
fn verify_at(now: SystemTime, directory: &Path, cache: &Path) -> Result<GuestFiles, VerifyError> {
    let manifest = Manifest::read(directory)?;
    let known = Cache::load(cache);
    let vmlinux = check(now, directory.join(VMLINUX), &manifest.vmlinux, &known)?;
    let initramfs = check(now, directory.join(INITRAMFS), &manifest.initramfs, &known)?;

    let verified = Cache {
        verified: [&vmlinux.entry, &initramfs.entry]
            .into_iter()
            .flatten()
            .cloned()
            .collect(),
    };
    let cache_error = if verified == known {
        None
    } else {
        verified.store(cache).err().map(|source| CacheError {
            path: cache.to_owned(),
            source,
        })
    };
    Ok(GuestFiles {
        manifest,
        vmlinux: vmlinux.file,
        initramfs: initramfs.file,
        cache_error,
    })
}

/// A file that agrees with its record, and what to remember about it.
struct Checked {
    file: File,
    entry: Option<Entry>,
}

fn check(
    now: SystemTime,
    path: PathBuf,
    expected: &FileRecord,
    known: &Cache,
) -> Result<Checked, VerifyError> {
    // Non-blocking, so that a FIFO in the file's place cannot hang the start.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(&path, flags, Mode::empty()) {
        Ok(descriptor) => File::from(descriptor),
        Err(error) => {
            return Err(VerifyError::Open {
                path,
                source: error.into(),
            });
        }
    };
    let before = match file.metadata() {
        Ok(metadata) => metadata,
        Err(source) => return Err(VerifyError::Read { path, source }),
    };
    if !before.is_file() {
        return Err(VerifyError::NotAFile { path });
    }
    if before.len() != expected.size {
        return Err(VerifyError::Size {
            path,
            expected: expected.size,
            actual: before.len(),
        });
    }
    let identity = Identity::of(&before);
    let entry = Entry {
        identity,
        sha256: expected.sha256.clone(),
    };
    if known.verified.contains(&entry) {
        return Ok(Checked {
            file,
            entry: Some(entry),
        });
    }

    let actual = match FileRecord::of(&file) {
        Ok(record) => record,
        Err(source) => return Err(VerifyError::Read { path, source }),
    };
    match file.metadata() {
        Ok(after) if Identity::of(&after) == entry.identity => {}
        Ok(_) => return Err(VerifyError::Changed { path }),
        Err(source) => return Err(VerifyError::Read { path, source }),
    }
    if actual.sha256 != expected.sha256 {
        return Err(VerifyError::Hash {
            path,
            expected: expected.sha256.clone(),
            actual: actual.sha256,
        });
    }
    let settled = entry.identity.is_older_than(now, TIME_GRANULARITY);
    Ok(Checked {
        file,
        entry: settled.then_some(entry),
    })
}

/// What tells one state of a file from any other. Times are seconds and nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            dev: metadata.dev(),
            ino: metadata.ino(),
            size: metadata.size(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether the file last changed more than `margin` before `now`.
    fn is_older_than(&self, now: SystemTime, margin: Duration) -> bool {
        let (Ok(seconds), Ok(nanoseconds)) =
            (u64::try_from(self.ctime.0), u32::try_from(self.ctime.1))
        else {
            return false;
        };
        let changed = UNIX_EPOCH + Duration::new(seconds, nanoseconds);
        now.duration_since(changed).is_ok_and(|age| age > margin)
    }
}

/// One verified file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    identity: Identity,
    sha256: String,
}

/// The memory: what was verified last.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cache {
    verified: Vec<Entry>,
}

impl Cache {
    /// Reads the memory; one that is missing, damaged or writable by others is empty.
    fn load(path: &Path) -> Self {
        let read = || -> io::Result<Self> {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
            let metadata = file.metadata()?;
            let ours = metadata.uid() == rustix::process::geteuid().as_raw();
            if !metadata.is_file() || !ours || metadata.mode() & 0o077 != 0 {
                return Ok(Self::default());
            }
            let mut text = Vec::new();
            file.take(MAX_CACHE_BYTES).read_to_end(&mut text)?;
            Ok(serde_json::from_slice(&text)?)
        };
        read().unwrap_or_default()
    }

    /// Replaces the memory. The temporary file is created with mode 0600 and keeps it.
    fn store(&self, path: &Path) -> io::Result<()> {
        let directory = path.parent().unwrap_or(Path::new("."));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
        let mut file = NamedTempFile::new_in(directory)?;
        serde_json::to_writer(&mut file, self)?;
        file.flush()?;
        file.persist(path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::*;
    use crate::manifest::{MANIFEST, write_manifest};

    struct Guest {
        directory: tempfile::TempDir,
    }

    impl Guest {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::write(directory.path().join(VMLINUX), b"the kernel").unwrap();
            fs::write(directory.path().join(INITRAMFS), b"the initramfs").unwrap();
            write_manifest(directory.path(), "6.12").unwrap();
            Self { directory }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn cache(&self) -> PathBuf {
            self.path("run/verified.json")
        }

        fn verify(&self) -> Result<GuestFiles, VerifyError> {
            verify(self.directory.path(), &self.cache())
        }

        /// Writes a memory that holds the files' present identities, whatever their contents.
        fn remember(&self) {
            let manifest = Manifest::read(self.directory.path()).unwrap();
            let entry = |name: &str, record: &FileRecord| Entry {
                identity: Identity::of(&fs::metadata(self.path(name)).unwrap()),
                sha256: record.sha256.clone(),
            };
            let cache = Cache {
                verified: vec![
                    entry(VMLINUX, &manifest.vmlinux),
                    entry(INITRAMFS, &manifest.initramfs),
                ],
            };
            cache.store(&self.cache()).unwrap();
        }

        /// Changes the kernel without changing its size.
        fn corrupt_kernel(&self) {
            fs::write(self.path(VMLINUX), b"The kernel").unwrap();
        }
    }

    /// A time at which every file of a test is old.
    fn later() -> SystemTime {
        SystemTime::now() + Duration::from_secs(3600)
    }

    #[test]
    fn good_files_are_returned_open_at_their_start() {
        let guest = Guest::new();
        let mut files = guest.verify().unwrap();
        assert!(files.cache_error.is_none());
        let mut text = String::new();
        files.vmlinux.read_to_string(&mut text).unwrap();
        assert_eq!(text, "the kernel");
        text.clear();
        files.initramfs.read_to_string(&mut text).unwrap();
        assert_eq!(text, "the initramfs");
    }

    #[test]
    fn the_returned_file_is_the_verified_one_after_a_replacement() {
        let guest = Guest::new();
        let files = guest.verify().unwrap();
        fs::remove_file(guest.path(VMLINUX)).unwrap();
        guest.corrupt_kernel();
        let mut text = [0; 10];
        files.vmlinux.read_exact_at(&mut text, 0).unwrap();
        assert_eq!(&text, b"the kernel");
    }

    #[test]
    fn changed_contents_are_reported_with_both_hashes() {
        let guest = Guest::new();
        guest.verify().unwrap();
        guest.corrupt_kernel();
        let error = guest.verify().unwrap_err();
        let VerifyError::Hash {
            path,
            expected,
            actual,
        } = &error
        else {
            panic!("{error:?}");
        };
        assert_eq!(*path, guest.path(VMLINUX));
        assert_ne!(expected, actual);
        assert!(error.to_string().contains(expected) && error.to_string().contains(actual));
    }

    #[test]
    fn another_size_is_reported_with_both_sizes() {
        let guest = Guest::new();
        fs::write(guest.path(INITRAMFS), b"short").unwrap();
        assert!(matches!(
            guest.verify(),
            Err(VerifyError::Size {
                expected: 13,
                actual: 5,
                ..
            })
        ));
    }

    #[test]
    fn missing_files_are_named() {
        for name in [VMLINUX, INITRAMFS, MANIFEST] {
            let guest = Guest::new();
            fs::remove_file(guest.path(name)).unwrap();
            let error = guest.verify().unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn what_is_not_a_regular_file_is_refused_without_waiting() {
        let guest = Guest::new();
        fs::remove_file(guest.path(VMLINUX)).unwrap();
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            guest.path(VMLINUX),
            Mode::from_raw_mode(0o600),
        )
        .unwrap();
        assert!(matches!(guest.verify(), Err(VerifyError::NotAFile { .. })));
    }

    #[test]
    fn a_remembered_identity_is_not_hashed_again() {
        let guest = Guest::new();
        guest.corrupt_kernel();
        // Only a memory of this very state of the file can let the wrong contents pass.
        guest.remember();
        guest.verify().unwrap();
    }

    #[test]
    fn a_changed_file_is_hashed_again() {
        let guest = Guest::new();
        guest.remember();
        // Another inode, so that the identity differs whatever the clock's granularity.
        fs::rename(guest.path(VMLINUX), guest.path("old")).unwrap();
        guest.corrupt_kernel();
        assert!(matches!(guest.verify(), Err(VerifyError::Hash { .. })));
    }

    #[test]
    fn a_new_manifest_is_not_satisfied_by_an_old_memory() {
        let guest = Guest::new();
        guest.remember();
        let path = guest.path(MANIFEST);
        let mut manifest = Manifest::read(guest.directory.path()).unwrap();
        manifest.vmlinux.sha256 = "0".repeat(64);
        fs::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
        assert!(matches!(guest.verify(), Err(VerifyError::Hash { .. })));
    }

    #[test]
    fn a_memory_that_others_could_write_or_that_is_damaged_is_not_believed() {
        let guest = Guest::new();
        guest.corrupt_kernel();
        guest.remember();
        fs::set_permissions(guest.cache(), Permissions::from_mode(0o620)).unwrap();
        assert!(matches!(guest.verify(), Err(VerifyError::Hash { .. })));

        guest.remember();
        let good = fs::read(guest.cache()).unwrap();
        for bad in [&good[..good.len() / 2], b"", b"[]"] {
            fs::write(guest.cache(), bad).unwrap();
            assert!(matches!(guest.verify(), Err(VerifyError::Hash { .. })));
        }

        guest.remember();
        fs::rename(guest.cache(), guest.path("elsewhere")).unwrap();
        std::os::unix::fs::symlink(guest.path("elsewhere"), guest.cache()).unwrap();
        assert!(matches!(guest.verify(), Err(VerifyError::Hash { .. })));
    }

    #[test]
    fn the_memory_is_private() {
        let guest = Guest::new();
        guest.remember();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&guest.cache()), 0o600);
        assert_eq!(mode(guest.cache().parent().unwrap()), 0o700);
    }

    #[test]
    fn a_memory_that_cannot_be_written_is_reported_and_does_no_harm() {
        let guest = Guest::new();
        fs::write(guest.path("run"), b"a file, not a directory").unwrap();
        let files = verify_at(later(), guest.directory.path(), &guest.cache()).unwrap();
        let error = files.cache_error.unwrap();
        assert!(error.to_string().contains("verified.json"), "{error}");
    }

    #[test]
    fn verified_files_are_remembered_once_they_are_old_enough() {
        let guest = Guest::new();
        verify_at(UNIX_EPOCH, guest.directory.path(), &guest.cache()).unwrap();
        assert_eq!(Cache::load(&guest.cache()), Cache::default());

        verify_at(later(), guest.directory.path(), &guest.cache()).unwrap();
        assert_eq!(Cache::load(&guest.cache()).verified.len(), 2);
        let written = Identity::of(&fs::metadata(guest.cache()).unwrap());
        // Nothing new to remember: the memory is left alone.
        verify_at(later(), guest.directory.path(), &guest.cache()).unwrap();
        assert_eq!(Identity::of(&fs::metadata(guest.cache()).unwrap()), written);
    }

    #[test]
    fn only_files_older_than_the_clocks_granularity_are_remembered() {
        let identity = |ctime| Identity {
            dev: 1,
            ino: 1,
            size: 1,
            mtime: (0, 0),
            ctime,
        };
        let now = UNIX_EPOCH + Duration::from_secs(100);
        assert!(identity((99, 0)).is_older_than(now, TIME_GRANULARITY));
        assert!(!identity((99, 990_000_000)).is_older_than(now, TIME_GRANULARITY));
        assert!(!identity((101, 0)).is_older_than(now, TIME_GRANULARITY));
        assert!(!identity((-1, 0)).is_older_than(now, TIME_GRANULARITY));
    }
}
