//! What of the host a container can see: its root and the sources of its bind mounts.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use bulkhead_agent_api::messages::SharedMount;
use nix::mount::MsFlags;
use thiserror::Error;

use crate::{
    pod::{Confinement, Pod},
    rootfs::{Rootfs, RootfsError},
    spec::Mount,
    text,
    tree::{self, TreeError},
    vmm_process::VmmError,
};

/// Failures with shares.
#[derive(Debug, Error)]
pub enum ShareError {
    /// The source of a bind mount cannot be used.
    #[error("Cannot mount {path} on {destination}")]
    Source {
        /// The source on the host.
        path: PathBuf,
        /// Where in the container.
        destination: PathBuf,
        /// What failed.
        #[source]
        source: TreeError,
    },
    /// The VMM did not take it.
    #[error("Cannot share {what} with the VM")]
    Vmm {
        /// What of the host.
        what: PathBuf,
        /// Its reason.
        #[source]
        source: VmmError,
    },
    /// The root cannot be taken.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
}

/// The shares of one container, by name.
#[derive(Debug, Default)]
pub struct Shares {
    names: Vec<String>,
}

impl Shares {
    /// Shares the root under the name that is returned. `prefix` is the container's own.
    pub async fn add_rootfs(
        &mut self,
        pod: &Pod,
        confinement: &Confinement,
        prefix: &str,
        rootfs: &mut Rootfs,
    ) -> Result<String, ShareError> {
        let name = format!("{prefix}-rootfs");
        let tree = rootfs
            .tree(&confinement.namespace, &confinement.state_dir)
            .await?;
        self.add(
            pod,
            &name,
            tree,
            (false, true),
            "the root file system".into(),
        )
        .await?;
        Ok(name)
    }

    /// Shares the source of each bind mount of the specification.
    pub async fn add_mounts(
        &mut self,
        pod: &Pod,
        confinement: &Confinement,
        prefix: &str,
        mounts: &[Mount],
    ) -> Result<Vec<SharedMount>, ShareError> {
        let mut shared = Vec::new();
        for (index, mount) in (0u32..).zip(mounts) {
            if !mount.is_bind() {
                continue;
            }
            let tree = bind(confinement, mount)?;
            let name = format!("{prefix}-m{index}");
            let options = (mount.is_read_only(), false);
            self.add(pod, &name, tree, options, mount.source.clone())
                .await?;
            shared.push(SharedMount {
                index,
                share: name,
                ..SharedMount::default()
            });
        }
        Ok(shared)
    }

    async fn add(
        &mut self,
        pod: &Pod,
        name: &str,
        tree: OwnedFd,
        (read_only, exclusive): (bool, bool),
        what: PathBuf,
    ) -> Result<(), ShareError> {
        // Noted first: an answer that comes too late may still mean that it is shared.
        self.names.push(name.to_owned());
        pod.share(name, tree.as_fd(), read_only, exclusive)
            .await
            .map_err(|source| ShareError::Vmm { what, source })
    }

    /// Takes all of them away. The VMM, if it still is there, holds nothing of them afterwards.
    pub async fn remove(&mut self, pod: &Pod) {
        for name in self.names.drain(..) {
            match pod.unshare(&name).await {
                Ok(()) | Err(VmmError::Gone) => {}
                Err(error) => {
                    let error = text::chain(&error);
                    tracing::warn!(name, error, "Cannot take a share away");
                }
            }
        }
    }
}

/// The source of a bind mount, under the ids of the pod.
fn bind(confinement: &Confinement, mount: &Mount) -> Result<OwnedFd, ShareError> {
    let path = &mount.source;
    let mut flags = MsFlags::empty();
    flags.set(MsFlags::MS_RDONLY, mount.is_read_only());
    let tree = tree::clone(path, mount.is_recursive()).and_then(|tree| {
        tree::confine(tree.as_fd(), path, Some(&confinement.namespace), flags)?;
        Ok(tree)
    });
    tree.map_err(|source| ShareError::Source {
        path: path.clone(),
        destination: mount.destination.clone(),
        source,
    })
}
