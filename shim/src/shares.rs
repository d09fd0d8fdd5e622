//! What of the host a container can see: its root and the sources of its bind mounts.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use bulkhead_agent_api::messages::{MemoryMount, SharedMount};
use nix::mount::MsFlags;
use thiserror::Error;

use crate::{
    child::Reaper,
    mapped_ids::{self, IdsError},
    pod::{Confinement, Pod},
    rootfs::{Rootfs, RootfsError},
    sandbox::Sandbox,
    spec::{Hook, IdMappings, Mount, Spec},
    text,
    tree::{self, TreeError},
    vmm_process::VmmError,
    volumes::shared_memory,
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
    /// The source of a bind mount cannot be looked at.
    #[error("Cannot mount {path} on {destination}")]
    Look {
        /// The source on the host.
        path: PathBuf,
        /// Where in the container.
        destination: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A hook's program cannot be used.
    #[error("Cannot have the hook {path} run in the container's namespaces")]
    Hook {
        /// The program on the host.
        path: PathBuf,
        /// What failed.
        #[source]
        source: TreeError,
    },
    /// Its ids cannot be mapped.
    #[error("Cannot mount {path} on {destination} with mapped ids")]
    Ids {
        /// The source on the host.
        path: PathBuf,
        /// Where in the container.
        destination: PathBuf,
        /// What is wrong with them.
        #[source]
        source: IdsError,
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
    /// Those that other containers of the pod may use as well.
    volumes: Vec<String>,
}

/// Where the guest finds what the spec's mounts are to show.
#[derive(Debug, Default)]
pub struct Mounts {
    /// What the host has.
    pub shared: Vec<SharedMount>,
    /// What is the pod's memory.
    pub memory: Vec<MemoryMount>,
}

impl Shares {
    /// Shares the root under the name that is returned. `prefix` is the container's own.
    pub async fn add_rootfs(
        &mut self,
        pod: &Pod,
        confinement: &Confinement,
        reaper: &Reaper,
        prefix: &str,
        rootfs: &mut Rootfs,
    ) -> Result<String, ShareError> {
        let name = format!("{prefix}-rootfs");
        let tree = rootfs
            .tree(&confinement.namespace, &confinement.state_dir)
            .await?;
        // The host may change what it has a view of.
        let options = (false, !rootfs.is_viewed());
        let what = "the root file system".into();
        self.add(pod, &name, tree.as_fd(), options, what).await?;
        rootfs
            .view(tree, &confinement.namespace, reaper, &confinement.state_dir)
            .await?;
        Ok(name)
    }

    /// Shares the source of each bind mount of the specification of a container, in this sandbox if in
    /// any.
    pub async fn add_mounts(
        &mut self,
        pod: &Pod,
        confinement: &Confinement,
        spec: &Spec,
        sandbox: Option<&Sandbox>,
    ) -> Result<Mounts, ShareError> {
        let users = spec.user_ids();
        let mut mounts = Mounts::default();
        let mut volumes = pod.volumes().await;
        for (index, mount) in (0u32..).zip(spec.mounts.iter().flatten()) {
            if !mount.is_bind() {
                continue;
            }
            let memory = match sandbox.and_then(|sandbox| sandbox.shared_memory(mount)) {
                Some(size) => Some(size),
                None => shared_memory(mount).map_err(|source| ShareError::Look {
                    path: mount.source.clone(),
                    destination: mount.destination.clone(),
                    source,
                })?,
            };
            if let Some(size) = memory {
                mounts.memory.push(MemoryMount {
                    index,
                    name: mount.source.display().to_string(),
                    size,
                    ..MemoryMount::default()
                });
                continue;
            }
            let names = &mut self.volumes;
            let added = volumes.add(pod, confinement, mount, &users, names).await?;
            let (share, mirrored) = added;
            mounts.shared.push(SharedMount {
                index,
                share,
                mirrored,
                ..SharedMount::default()
            });
        }
        Ok(mounts)
    }

    /// Shares the programs of the hooks that run in the container's namespaces but come from the host.
    pub async fn add_hooks(
        &mut self,
        pod: &Pod,
        confinement: &Confinement,
        prefix: &str,
        hooks: &[Hook],
    ) -> Result<Vec<SharedMount>, ShareError> {
        let mut shared = Vec::new();
        for (index, hook) in (0u32..).zip(hooks) {
            let namespace = confinement.namespace.as_fd();
            let tree = confined(&hook.path, false, namespace, MsFlags::MS_RDONLY);
            let tree = tree.map_err(|source| ShareError::Hook {
                path: hook.path.clone(),
                source,
            })?;
            let name = format!("{prefix}-h{index}");
            self.add(pod, &name, tree.as_fd(), (true, false), hook.path.clone())
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
        tree: BorrowedFd<'_>,
        (read_only, exclusive): (bool, bool),
        what: PathBuf,
    ) -> Result<(), ShareError> {
        // Noted first: an answer that comes too late may still mean that it is shared.
        self.names.push(name.to_owned());
        pod.share(name, tree, read_only, exclusive)
            .await
            .map_err(|source| ShareError::Vmm { what, source })
    }

    /// Takes all of them away. The VMM, if it still is there, holds nothing of them afterwards.
    pub async fn remove(&mut self, pod: &Pod) {
        let volumes = std::mem::take(&mut self.volumes);
        pod.volumes().await.remove(pod, volumes).await;
        for name in self.names.drain(..) {
            report(&name, pod.unshare(&name).await);
        }
    }
}

/// Logs why a share is not taken away, if so.
pub fn report(name: &str, taken: Result<(), VmmError>) {
    match taken {
        Ok(()) | Err(VmmError::Gone) => {}
        Err(error) => {
            let error = text::chain(&error);
            tracing::warn!(name, error, "Cannot take a share away");
        }
    }
}

/// The source of a bind mount, under the ids of the pod. `users` are those of the container's user
/// namespace.
pub fn bind(
    confinement: &Confinement,
    mount: &Mount,
    users: &IdMappings,
) -> Result<OwnedFd, ShareError> {
    let path = &mount.source;
    let mapped = match mount.mapped_ids(users) {
        Some(ids) => {
            let range = confinement.namespace.range();
            let mapped = mapped_ids::namespace(range, ids);
            Some(mapped.map_err(|source| ShareError::Ids {
                path: path.clone(),
                destination: mount.destination.clone(),
                source,
            })?)
        }
        None => None,
    };
    let namespace = match &mapped {
        Some(mapped) => mapped.as_fd(),
        None => confinement.namespace.as_fd(),
    };
    let mut flags = MsFlags::empty();
    flags.set(MsFlags::MS_RDONLY, mount.is_read_only());
    let tree = confined(path, mount.is_recursive(), namespace, flags);
    tree.map_err(|source| ShareError::Source {
        path: path.clone(),
        destination: mount.destination.clone(),
        source,
    })
}

/// What is at a path, under the ids of a namespace.
fn confined(
    path: &Path,
    recursive: bool,
    namespace: BorrowedFd<'_>,
    flags: MsFlags,
) -> Result<OwnedFd, TreeError> {
    let tree = tree::clone(path, recursive)?;
    tree::confine(tree.as_fd(), path, Some(namespace), flags)?;
    Ok(tree)
}
