//! A reproducible initramfs: the same agent gives the same bytes.
//!
//! The archive is cpio in the `newc` format, uncompressed, because the guest kernel has no
//! decompressor (kernel documentation, `driver-api/early-userspace/buffer-format.rst`).

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use cpio::newc::{self, Builder, ModeFileType};
use tempfile::NamedTempFile;

/// What the root holds beside `/init`, in the order of the archive: a directory comes before what
/// lies in it. The standard library of a static Rust program opens `/dev/null` before `main`, and
/// the kernel opens `/dev/console` for PID 1, so both exist before devtmpfs is mounted.
const SKELETON: [Node; 9] = [
    Node::directory("dev", 0o755),
    Node::device("dev/console", 0o600, 5, 1),
    Node::device("dev/null", 0o666, 1, 3),
    Node::directory("etc", 0o755),
    Node::directory("mnt", 0o755),
    Node::directory("proc", 0o555),
    Node::directory("run", 0o755),
    Node::directory("sys", 0o555),
    Node::directory("tmp", 0o1777),
];

/// Why an initramfs could not be built.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// The agent could not be read.
    #[error("cannot read the agent {path}")]
    Agent {
        /// The agent's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The agent is too large for the archive's 32-bit sizes.
    #[error("the agent {path} has {size} bytes; an initramfs takes files below 4 GiB")]
    AgentTooLarge {
        /// The agent's path.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The archive could not be written.
    #[error("cannot write the initramfs {path}")]
    Write {
        /// The archive's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// Builds an initramfs at `out` with the static executable `agent` as `/init`.
///
/// `out` appears whole or not at all.
pub fn build_initramfs(agent: &Path, out: &Path) -> Result<(), InitramfsError> {
    let agent_error = |source| InitramfsError::Agent {
        path: agent.to_owned(),
        source,
    };
    let mut init = File::open(agent).map_err(agent_error)?;
    let size = init.metadata().map_err(agent_error)?.len();
    let size = u32::try_from(size).map_err(|_| InitramfsError::AgentTooLarge {
        path: agent.to_owned(),
        size,
    })?;

    let mut write_archive = || {
        let directory = out.parent().unwrap_or(Path::new("."));
        let mut archive = BufWriter::new(NamedTempFile::new_in(directory)?);
        let mut inode = 1;
        for node in &SKELETON {
            node.entry(inode).write(&mut archive, 0).finish()?;
            inode += 1;
        }
        let mut entry =
            entry("init", inode, 0o755, ModeFileType::Regular).write(&mut archive, size);
        io::copy(&mut init, &mut entry)?;
        entry.finish()?;
        newc::trailer(&mut archive)?;
        archive.flush()?;
        let file = archive
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        publish(file, out)
    };
    write_archive().map_err(|source| InitramfsError::Write {
        path: out.to_owned(),
        source,
    })
}

/// Gives a finished temporary file the mode of an installed file and its final name.
pub(crate) fn publish(file: NamedTempFile, path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.as_file()
        .set_permissions(std::fs::Permissions::from_mode(0o644))?;
    file.persist(path)?;
    Ok(())
}

/// A directory or a character device of the initramfs.
struct Node {
    path: &'static str,
    mode: u32,
    device: Option<(u32, u32)>,
}

impl Node {
    const fn directory(path: &'static str, mode: u32) -> Self {
        Self {
            path,
            mode,
            device: None,
        }
    }

    const fn device(path: &'static str, mode: u32, major: u32, minor: u32) -> Self {
        Self {
            path,
            mode,
            device: Some((major, minor)),
        }
    }

    fn entry(&self, inode: u32) -> Builder {
        match self.device {
            None => entry(self.path, inode, self.mode, ModeFileType::Directory),
            Some((major, minor)) => entry(self.path, inode, self.mode, ModeFileType::Char)
                .rdev_major(major)
                .rdev_minor(minor),
        }
    }
}

/// An entry owned by root, without a date. Inode numbers are distinct, so the kernel links nothing.
fn entry(path: &str, inode: u32, mode: u32, file_type: ModeFileType) -> Builder {
    Builder::new(path)
        .ino(inode)
        .nlink(1)
        .mtime(0)
        .mode(mode)
        .set_mode_file_type(file_type)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;

    use cpio::NewcReader;

    use super::*;

    fn build(agent: &[u8], date: std::time::SystemTime) -> Vec<u8> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent");
        fs::write(&path, agent).unwrap();
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(date)
            .unwrap();
        let out = directory.path().join("initramfs.cpio");
        build_initramfs(&path, &out).unwrap();
        fs::read(out).unwrap()
    }

    #[test]
    fn same_agent_gives_same_bytes_whenever_and_wherever_it_is_built() {
        let now = std::time::SystemTime::now();
        let earlier = now - std::time::Duration::from_secs(86_400);
        assert_eq!(build(b"agent", now), build(b"agent", earlier));
        assert_ne!(build(b"agent", now), build(b"other", now));
    }

    #[test]
    fn holds_the_agent_as_init_and_the_nodes_of_the_root() {
        let archive = build(b"\x7fELF agent", std::time::SystemTime::now());
        let mut rest = archive.as_slice();
        let mut seen = Vec::new();
        loop {
            let mut reader = NewcReader::new(rest).unwrap();
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0));
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            if entry.name() == "init" {
                assert_eq!(content, b"\x7fELF agent");
            }
            seen.push((
                entry.name().to_owned(),
                entry.mode(),
                entry.rdev_major(),
                entry.rdev_minor(),
            ));
            rest = reader.finish().unwrap();
        }
        assert!(seen.contains(&("init".into(), 0o100_755, 0, 0)));
        assert!(seen.contains(&("dev/console".into(), 0o020_600, 5, 1)));
        assert!(seen.contains(&("dev/null".into(), 0o020_666, 1, 3)));
        assert!(seen.contains(&("tmp".into(), 0o041_777, 0, 0)));
        assert!(seen.contains(&("proc".into(), 0o040_555, 0, 0)));
        // The kernel creates entries in order and makes no parent directories.
        for (index, (name, ..)) in seen.iter().enumerate() {
            if let Some((parent, _)) = name.rsplit_once('/') {
                assert!(seen[..index].iter().any(|(earlier, ..)| earlier == parent));
            }
        }
    }

    #[test]
    fn missing_agent_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = build_initramfs(
            &directory.path().join("absent"),
            &directory.path().join("out"),
        )
        .unwrap_err();
        assert!(matches!(error, InitramfsError::Agent { .. }));
        assert!(error.to_string().contains("absent"));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
