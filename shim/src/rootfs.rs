//! A container's root file system on the host.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use containerd_shim_protos::api::Mount;
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
};
use rustix::{
    fs::CWD,
    mount::{OpenTreeFlags, open_tree},
};
use thiserror::Error;

use crate::mounts::{MountError, mount_on, unmount_all};

/// Name of the directory in the bundle that containerd's mounts go to.
pub const DIRECTORY: &str = "rootfs";

/// Failures with a root file system.
#[derive(Debug, Error)]
pub enum RootfsError {
    /// Its directory cannot be made.
    #[error("Cannot create {path}")]
    Create {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A mount failed.
    #[error("Cannot mount the root file system")]
    Mount(#[source] MountError),
    /// A mount asks for something that is not supported.
    #[error("Cannot mount the root file system")]
    Unsupported(#[source] MountError),
    /// The place of a mount within the root cannot be used.
    #[error("Cannot find {target} in the root file system")]
    Target {
        /// Path within the root.
        target: String,
        /// The system's error.
        #[source]
        source: Errno,
    },
    /// There is neither a mount nor a directory.
    #[error("The container has no root file system: neither mounts nor an absolute root.path")]
    Missing,
    /// The tree of mounts cannot be taken.
    #[error("Cannot clone the mounts of {path}")]
    Clone {
        /// The root's directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: rustix::io::Errno,
    },
}

/// A root file system. What was mounted for it is unmounted with its owner.
#[derive(Debug)]
pub struct Rootfs {
    path: PathBuf,
    mounted: bool,
}

impl Rootfs {
    /// Mounts what containerd asks for at `rootfs` in the bundle. Without mounts, `root`, the
    /// specification's absolute path, is used as it is.
    pub fn mount(
        bundle: &Path,
        mounts: &[Mount],
        root: Option<&Path>,
    ) -> Result<Self, RootfsError> {
        if mounts.is_empty() {
            return match root {
                Some(path) if path.is_absolute() => Ok(Self {
                    path: path.to_owned(),
                    mounted: false,
                }),
                // Relative to the bundle, when somebody has mounted or unpacked it there.
                Some(path) if bundle.join(path).is_dir() => Ok(Self {
                    path: bundle.join(path),
                    mounted: false,
                }),
                _ => Err(RootfsError::Missing),
            };
        }
        let path = bundle.join(DIRECTORY);
        if let Err(source) = fs::create_dir(&path)
            && source.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(RootfsError::Create { path, source });
        }
        // From here on, its drop undoes what was mounted.
        let rootfs = Self {
            path,
            mounted: true,
        };
        for mount in mounts {
            rootfs.add(mount)?;
        }
        Ok(rootfs)
    }

    fn add(&self, mount: &Mount) -> Result<(), RootfsError> {
        let inside;
        let target = if mount.target.is_empty() {
            self.path.clone()
        } else {
            inside = self.within(&mount.target)?;
            PathBuf::from(format!("/proc/self/fd/{}", inside.as_raw_fd()))
        };
        mount_on(&mount.type_, &mount.source, &mount.options, &target).map_err(
            |error| match error {
                MountError::Option(_) => RootfsError::Unsupported(error),
                error => RootfsError::Mount(error),
            },
        )
    }

    /// A directory within the root, whatever links the image has there.
    fn within(&self, target: &str) -> Result<OwnedFd, RootfsError> {
        let relative = target.trim_start_matches('/');
        let failed = |source| RootfsError::Target {
            target: target.to_owned(),
            source,
        };
        let root = File::open(&self.path)
            .map_err(|error| failed(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))))?;
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&root, relative, how).map_err(failed)
    }

    /// A copy of the root's mounts that is attached nowhere.
    pub fn tree(&self) -> Result<OwnedFd, RootfsError> {
        clone_tree(&self.path, true).map_err(|source| RootfsError::Clone {
            path: self.path.clone(),
            source,
        })
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        if self.mounted {
            unmount_all(&self.path);
        }
    }
}

/// A copy of the mount at `path`, with those below if `recursive`, that is attached nowhere.
pub fn clone_tree(path: &Path, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    open_tree(CWD, path, flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absolute_root_is_used_as_it_is() {
        let bundle = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        let rootfs = Rootfs::mount(bundle.path(), &[], Some(root.path())).unwrap();
        assert_eq!(rootfs.path, root.path());
        assert!(matches!(
            Rootfs::mount(bundle.path(), &[], None),
            Err(RootfsError::Missing)
        ));
        assert!(matches!(
            Rootfs::mount(bundle.path(), &[], Some(Path::new("rootfs"))),
            Err(RootfsError::Missing)
        ));
    }
}
