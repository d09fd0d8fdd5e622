//! `manifest.json`: which kernel and initramfs belong together, with their hashes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use crate::initramfs::publish;

/// The kernel's file name in a guest directory.
pub const VMLINUX: &str = "vmlinux";
/// The initramfs' file name in a guest directory.
pub const INITRAMFS: &str = "initramfs.cpio";
/// The manifest's file name in a guest directory.
pub const MANIFEST: &str = "manifest.json";

/// The version of the manifest's own format that this program writes and reads.
pub const SCHEMA: u32 = 1;

/// A manifest has a few hundred bytes; a file larger than this is something else.
const MAX_MANIFEST_BYTES: u64 = 64 << 10;

/// The contents of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format, [`SCHEMA`].
    pub schema: u32,
    /// Version of Bulkhead that the files were built with.
    pub bulkhead: String,
    /// The kernel's release, as `uname -r` prints it in the guest.
    pub kernel_release: String,
    /// The kernel, `vmlinux`.
    pub vmlinux: FileRecord,
    /// The initramfs, `initramfs.cpio`.
    pub initramfs: FileRecord,
}

/// Size and hash of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

/// Why a manifest could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A file that the manifest describes could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The manifest could not be written.
    #[error("cannot write {path}")]
    Write {
        /// The manifest's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The file is not a manifest.
    #[error("{path} is not a valid manifest")]
    Parse {
        /// The manifest's path.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The manifest was written by a version of Bulkhead with another format.
    #[error("{path} has schema version {found}, this program reads {SCHEMA}")]
    Schema {
        /// The manifest's path.
        path: PathBuf,
        /// The version found.
        found: u32,
    },
}

/// Describes the `vmlinux` and `initramfs.cpio` of `directory` in its `manifest.json`.
///
/// `kernel_release` is what `uname -r` prints in the guest.
pub fn write_manifest(directory: &Path, kernel_release: &str) -> Result<Manifest, ManifestError> {
    let record = |name: &str| {
        let path = directory.join(name);
        File::open(&path)
            .and_then(|file| FileRecord::of(&file))
            .map_err(|source| ManifestError::Read { path, source })
    };
    let manifest = Manifest {
        schema: SCHEMA,
        bulkhead: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: kernel_release.to_owned(),
        vmlinux: record(VMLINUX)?,
        initramfs: record(INITRAMFS)?,
    };
    let path = directory.join(MANIFEST);
    let write = || {
        let mut file = NamedTempFile::new_in(directory)?;
        serde_json::to_writer_pretty(&mut file, &manifest)?;
        file.write_all(b"\n")?;
        publish(file, &path)
    };
    write().map_err(|source| ManifestError::Write {
        path: path.clone(),
        source,
    })?;
    Ok(manifest)
}

impl Manifest {
    /// Reads the `manifest.json` of `directory`.
    pub fn read(directory: &Path) -> Result<Self, ManifestError> {
        let path = directory.join(MANIFEST);
        let mut text = Vec::new();
        let read =
            File::open(&path).and_then(|file| file.take(MAX_MANIFEST_BYTES).read_to_end(&mut text));
        if let Err(source) = read {
            return Err(ManifestError::Read { path, source });
        }
        // The version is looked at first: other fields mean nothing under another schema.
        let parsed = serde_json::from_slice::<SchemaOnly>(&text).and_then(|head| {
            if head.schema == SCHEMA {
                serde_json::from_slice(&text).map(Ok)
            } else {
                Ok(Err(head.schema))
            }
        });
        match parsed {
            Ok(Ok(manifest)) => Ok(manifest),
            Ok(Err(found)) => Err(ManifestError::Schema { path, found }),
            Err(source) => Err(ManifestError::Parse { path, source }),
        }
    }
}

/// The one field that every version of the format has.
#[derive(Deserialize)]
struct SchemaOnly {
    schema: u32,
}

impl FileRecord {
    /// Reads all of `file` without moving its offset.
    pub fn of(file: &File) -> io::Result<Self> {
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 256 << 10];
        let mut size = 0;
        loop {
            match file.read_at(&mut buffer, size) {
                Ok(0) => break,
                Ok(count) => {
                    hash.update(&buffer[..count]);
                    size += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let sha256 = hash
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Ok(Self { size, sha256 })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn guest_directory() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(VMLINUX), b"abc").unwrap();
        fs::write(directory.path().join(INITRAMFS), b"").unwrap();
        directory
    }

    #[test]
    fn is_read_as_it_was_written() {
        let directory = guest_directory();
        let written = write_manifest(directory.path(), "6.12.1-bulkhead").unwrap();
        assert_eq!(Manifest::read(directory.path()).unwrap(), written);
        assert_eq!(written.kernel_release, "6.12.1-bulkhead");
        // The test vectors of FIPS 180-4 for "abc" and for the empty message.
        assert_eq!(
            written.vmlinux,
            FileRecord {
                size: 3,
                sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad".into()
            }
        );
        assert_eq!(
            written.initramfs.sha256,
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn another_schema_is_refused_before_its_fields_are_read() {
        let directory = guest_directory();
        fs::write(
            directory.path().join(MANIFEST),
            br#"{"schema": 2, "something": "new"}"#,
        )
        .unwrap();
        assert!(matches!(
            Manifest::read(directory.path()),
            Err(ManifestError::Schema { found: 2, .. })
        ));
    }

    #[test]
    fn what_is_not_a_manifest_is_refused() {
        let directory = guest_directory();
        write_manifest(directory.path(), "6.12").unwrap();
        let path = directory.path().join(MANIFEST);
        let good = fs::read_to_string(&path).unwrap();
        for bad in [
            "",
            "{}",
            "not json",
            &good[..good.len() / 2],
            &good.replace("\"bulkhead\"", "\"bulk\""),
        ] {
            fs::write(&path, bad).unwrap();
            assert!(
                matches!(
                    Manifest::read(directory.path()),
                    Err(ManifestError::Parse { .. })
                ),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = write_manifest(directory.path(), "6.12").unwrap_err();
        assert!(error.to_string().contains("vmlinux"), "{error}");
        let error = Manifest::read(directory.path()).unwrap_err();
        assert!(error.to_string().contains("manifest.json"), "{error}");
    }
}
