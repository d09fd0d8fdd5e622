//! A container's root file system on the host.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use bulkhead_vmm_control::UserNamespace;
use containerd_shim_protos::api::Mount;
use nix::{errno::Errno, mount::MsFlags};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, move_mount},
};
use thiserror::Error;

use crate::{
    assembly::{self, assemble},
    child::Reaper,
    mapped_ids::IdsError,
    mounts::{MountError, Options, unmount_all},
    overlay::{Overlay, OverlayError},
    tree::{self, TreeError},
    view::{View, ViewError},
};

/// Name of the directory in the bundle where hooks find the root.
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
    Mount(#[from] MountError),
    /// A mount asks for something that is not supported.
    #[error("Cannot mount the root file system")]
    Unsupported(#[source] MountError),
    /// The files of a mount cannot be handed over.
    #[error("Cannot mount the root file system")]
    Tree(#[from] TreeError),
    /// Its files cannot be shown by the ids that containerd wants.
    #[error("Cannot mount the root file system with mapped ids")]
    Ids(#[source] IdsError),
    /// Some file system does not answer.
    #[error("The root file system was not mounted within {} s", assembly::DEADLINE.as_secs())]
    Deadline,
    /// There is no thread to mount in.
    #[error("Cannot run a thread to mount the root file system")]
    Thread(#[source] io::Error),
    /// The thread cannot be separated from the host's mounts.
    #[error("Cannot create a mount namespace for the root file system")]
    Namespace(#[source] Errno),
    /// The directory in which mounts are put together cannot be used.
    #[error("Cannot prepare a directory for the root file system's mounts")]
    Scratch(#[source] io::Error),
    /// A mount cannot be put where it belongs.
    #[error("Cannot attach a mount at {target}")]
    Attach {
        /// Where.
        target: PathBuf,
        /// The system's error.
        #[source]
        source: Errno,
    },
    /// The place of a mount within the root cannot be used.
    #[error("Cannot find {target} in the root file system")]
    Target {
        /// Path within the root.
        target: String,
        /// The system's error.
        #[source]
        source: Errno,
    },
    /// It is an overlay that cannot be mounted a second time.
    #[error("Cannot mount the root file system")]
    Overlay(#[from] OverlayError),
    /// The host cannot be shown what the container does.
    #[error("Cannot show the host the root file system")]
    View(#[from] ViewError),
    /// There is neither a mount nor a directory.
    #[error("The container has no root file system: neither mounts nor an absolute root.path")]
    Missing,
}

/// Where the files are.
#[derive(Debug)]
enum Source {
    /// What containerd asks to be mounted.
    Mounts(Vec<Mount>),
    /// A directory that is there.
    Directory(PathBuf),
    /// The mount point of an overlay that is there.
    Overlay(Overlay),
}

/// A root file system.
///
/// It is mounted for the VM alone, under the pod's ids. Host hooks see it under the host's, at
/// `rootfs` in the bundle, before the VM has it: overlayfs does not say what happens to an upper
/// layer that two mounts use. An overlay that the host has mounted itself is covered by a [`View`]
/// once the VM has its own.
#[derive(Debug)]
pub struct Rootfs {
    source: Source,
    /// Where hooks find it, if it is mounted there.
    shown: Option<PathBuf>,
    /// What covers the overlay that was there.
    view: Option<View>,
}

impl Rootfs {
    /// Takes what containerd asks to be mounted. Without mounts, `root`, the specification's path,
    /// is used as it is.
    pub fn new(bundle: &Path, mounts: &[Mount], root: Option<&Path>) -> Result<Self, RootfsError> {
        for mount in mounts {
            Options::parse(&mount.type_, &mount.options).map_err(RootfsError::Unsupported)?;
        }
        let source = match root {
            _ if !mounts.is_empty() => Source::Mounts(mounts.to_vec()),
            Some(path) if path.is_absolute() => match Overlay::at(path)? {
                Some(overlay) => Source::Overlay(overlay),
                None => Source::Directory(path.to_owned()),
            },
            // Relative to the bundle, when somebody has mounted or unpacked it there.
            Some(path) if bundle.join(path).is_dir() => Source::Directory(bundle.join(path)),
            _ => return Err(RootfsError::Missing),
        };
        Ok(Self {
            source,
            shown: None,
            view: None,
        })
    }

    /// Mounts it at `rootfs` in the bundle, as the host's own users see it. `scratch` is an
    /// existing directory.
    pub async fn show(&mut self, bundle: &Path, scratch: &Path) -> Result<(), RootfsError> {
        let Source::Mounts(mounts) = &self.source else {
            return Ok(());
        };
        let tree = assemble(mounts.clone(), None, scratch.to_owned()).await?;
        let path = bundle.join(DIRECTORY);
        if let Err(source) = fs::create_dir(&path)
            && source.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(RootfsError::Create { path, source });
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&tree, "", CWD, &path, flags).map_err(|errno| RootfsError::Attach {
            target: path.clone(),
            source: Errno::from_raw(errno.raw_os_error()),
        })?;
        self.shown = Some(path);
        Ok(())
    }

    /// Takes it away from the host's users again.
    pub fn hide(&mut self) {
        if let Some(path) = self.shown.take() {
            unmount_all(&path);
        }
    }

    /// The root's mounts, attached nowhere, under the ids of the pod.
    pub async fn tree(
        &mut self,
        namespace: &Arc<UserNamespace>,
        scratch: &Path,
    ) -> Result<OwnedFd, RootfsError> {
        self.hide();
        match &self.source {
            Source::Mounts(mounts) => {
                assemble(mounts.clone(), Some(namespace.clone()), scratch.to_owned()).await
            }
            Source::Overlay(overlay) => {
                overlay.prepare()?;
                let mounts = vec![overlay.mount()];
                assemble(mounts, Some(namespace.clone()), scratch.to_owned()).await
            }
            Source::Directory(path) => {
                let tree = tree::clone(path, true)?;
                tree::confine(
                    tree.as_fd(),
                    path,
                    Some(namespace.as_fd()),
                    MsFlags::empty(),
                )?;
                Ok(tree)
            }
        }
    }

    /// Whether the host gets a view of it.
    pub fn is_viewed(&self) -> bool {
        matches!(self.source, Source::Overlay(_))
    }

    /// Covers the host's own mount, if there is one, with a view of `tree`, the VM's.
    pub async fn view(
        &mut self,
        tree: OwnedFd,
        namespace: &Arc<UserNamespace>,
        reaper: &Reaper,
        scratch: &Path,
    ) -> Result<(), RootfsError> {
        if let Source::Overlay(overlay) = &self.source {
            let view = View::show(tree, namespace, reaper, scratch, &overlay.path).await?;
            self.view = Some(view);
        }
        Ok(())
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        self.hide();
        self.view = None;
        if let Source::Overlay(overlay) = &self.source {
            overlay.clean_up();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absolute_root_is_used_as_it_is() {
        let bundle = tempfile::tempdir().unwrap();
        let rootfs = Rootfs::new(bundle.path(), &[], Some(Path::new("/proc"))).unwrap();
        assert!(matches!(&rootfs.source, Source::Directory(path) if path == Path::new("/proc")));
        for root in [None, Some(Path::new("rootfs"))] {
            assert!(matches!(
                Rootfs::new(bundle.path(), &[], root),
                Err(RootfsError::Missing)
            ));
        }
    }
}
