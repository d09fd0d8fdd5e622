//! The network of a pod's containers: what their network namespaces on the host have, the guest has.
//!
//! CNI and Docker set a namespace up as for runc, with interfaces, addresses and routes. Beside each
//! Ethernet interface of it stands a tap ([`tap`]), between which and the interface every packet is
//! passed on ([`redirect`]); the tap is a network device of the VM. The agent is told what the
//! interface is called, and which addresses and routes there are ([`scan`]).
//!
//! A namespace is looked at when the first container in it starts, because Docker 28 attaches networks
//! between Create and Start, and again whenever the kernel tells of a change in it ([`netlink`]). What
//! was found is compared with what the guest has, and the difference is made up for; no event means
//! anything by itself. Containers of a pod that are in the same namespace have one network together,
//! which ends with the last of them.

mod connection;
pub mod namespace;
pub mod netlink;
pub mod ports;
pub mod redirect;
pub mod resolver;
pub mod scan;
pub mod tap;

use std::{
    collections::{HashMap, hash_map::Entry},
    future::Future,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use bulkhead_vmm_control::NICS;
use thiserror::Error;
use tokio::{io::unix::AsyncFd, sync::Mutex as AsyncMutex, task::AbortHandle};

use self::{
    connection::Network,
    namespace::{Namespace, NamespaceId},
    netlink::{Monitor, Netlink},
    scan::LOOPBACK,
};
use crate::{agent_client::AgentError, pod::Pod, process::Process, vmm_process::VmmError};

/// Why a container has no network.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// The namespace is not to be had.
    #[error("Cannot enter the container's network namespace")]
    Namespace(#[source] io::Error),
    /// The kernel does not tell.
    #[error("Cannot look at the container's network namespace")]
    Scan(#[source] io::Error),
    /// The namespace is another VM's, or that of a process of the host's.
    #[error(
        "linux.namespaces: the network namespace of process {0} is not one of this pod's: its \
         interfaces cannot be in two places"
    )]
    Foreign(u32),
    /// The guest has no place for more.
    #[error("A pod has {NICS} network interfaces at most; there is none left for {0}")]
    TooMany(String),
    /// An interface that only works on the host.
    #[error("The network interface {name} cannot be given to a guest: {why}")]
    Unsupported {
        /// Its name.
        name: String,
        /// What is in the way.
        why: &'static str,
    },
    /// There is no tap.
    #[error("Cannot make a tap beside the network interface {name}{hint}")]
    Tap {
        /// The interface's name.
        name: String,
        /// The system's error.
        #[source]
        source: io::Error,
        /// What to do about it.
        hint: &'static str,
    },
    /// Its packets do not reach the tap.
    #[error("Cannot connect the network interface {name} with its tap: cannot {what}")]
    Redirect {
        /// Its name.
        name: String,
        /// The step.
        what: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The VMM has no device for it.
    #[error("Cannot give the network interface {name} to the VM")]
    Attach {
        /// Its name.
        name: String,
        /// What the VMM says.
        #[source]
        source: VmmError,
    },
    /// Ports cannot be forwarded.
    #[error("The pod's ports cannot be reached by localhost of its network namespace")]
    Ports(#[source] io::Error),
    /// The agent refused.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// A task that ends with its owner.
#[derive(Debug)]
pub struct Task(AbortHandle);

impl Task {
    fn spawn(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(task).abort_handle())
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The containers in a namespace.
#[derive(Debug, Default)]
pub struct Members(Mutex<Vec<(String, Arc<Process>)>>);

impl Members {
    fn list(&self) -> MutexGuard<'_, Vec<(String, Arc<Process>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One whose own process has not ended.
    fn alive(&self) -> Option<String> {
        let list = self.list();
        let alive = list.iter().find(|(_, init)| init.exit().is_none());
        alive.map(|(id, _)| id.clone())
    }
}

/// The networks of a pod, by their namespaces. All changes to them are made one after the other.
#[derive(Debug)]
pub struct Networks {
    pod: Arc<Pod>,
    networks: AsyncMutex<HashMap<NamespaceId, Network>>,
    /// The namespace of the pod's last container, kept until the shim ends. The kernel takes namespaces
    /// and VMs down one after the other, and whoever deletes a pod waits for its VM alone.
    last: Mutex<Option<Arc<Namespace>>>,
}

/// A container's part in a network, to be given back by [`Networks::leave`].
#[derive(Debug)]
pub struct Membership {
    namespace: NamespaceId,
    container: String,
}

impl Networks {
    /// No container has a network.
    pub fn new(pod: Arc<Pod>) -> Arc<Self> {
        Arc::new(Self {
            pod,
            networks: AsyncMutex::default(),
            last: Mutex::default(),
        })
    }

    /// Gives a container what the namespace of its anchor has, before its process executes. `by_path`
    /// says that the namespace was there before the container. On failure nothing is left.
    pub async fn join(
        self: &Arc<Self>,
        container: &str,
        init: &Arc<Process>,
        by_path: bool,
    ) -> Result<Membership, NetworkError> {
        let namespace = Namespace::of(init.pid()).map_err(NetworkError::Namespace)?;
        let id = namespace.id();
        let mut networks = self.networks.lock().await;
        *self.last() = None;
        let network = match networks.entry(id) {
            Entry::Occupied(network) => network.into_mut(),
            Entry::Vacant(place) => place.insert(self.open(namespace, by_path).await?),
        };
        let member = (container.to_owned(), init.clone());
        network.members().list().push(member);
        let membership = Membership {
            namespace: id,
            container: container.to_owned(),
        };
        match self.reconcile(&mut networks, id, true).await {
            Ok(()) => Ok(membership),
            Err(error) => {
                self.part(&mut networks, &membership).await;
                Err(error)
            }
        }
    }

    fn last(&self) -> MutexGuard<'_, Option<Arc<Namespace>>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a container out of its network, and with the last one the network down.
    pub async fn leave(&self, membership: &Membership) {
        let mut networks = self.networks.lock().await;
        self.part(&mut networks, membership).await;
    }

    async fn part(&self, networks: &mut HashMap<NamespaceId, Network>, membership: &Membership) {
        let Entry::Occupied(mut network) = networks.entry(membership.namespace) else {
            return;
        };
        let container = &membership.container;
        let last = {
            let mut members = network.get().members().list();
            members.retain(|(id, _)| id != container);
            members.is_empty()
        };
        if last {
            network.get_mut().close(&self.pod, container).await;
            // With it ends its watch.
            let namespace = network.remove().into_namespace();
            if networks.is_empty() {
                *self.last() = Some(namespace);
            }
        }
    }

    /// Begins to watch a namespace.
    async fn open(
        self: &Arc<Self>,
        namespace: Namespace,
        by_path: bool,
    ) -> Result<Network, NetworkError> {
        let monitor = namespace
            .run(|| {
                // As runc leaves the loopback interface of a new namespace.
                tap::bring_up(&Netlink::open()?, LOOPBACK)?;
                Monitor::open()
            })
            .await
            .map_err(NetworkError::Namespace)?
            .map_err(NetworkError::Scan)?;
        // SAFETY: a monitor keeps its one descriptor open as long as it lives.
        let registered = unsafe { AsyncFd::register(monitor) };
        let monitor = registered.map_err(|error| NetworkError::Scan(error.into_parts().1))?;
        let watch = watch(Arc::downgrade(self), namespace.id(), monitor);
        Ok(Network::new(namespace, by_path, Task::spawn(watch)))
    }

    /// Looks at a namespace and makes the guest have what it has. With `strict`, what cannot be had is
    /// an error; otherwise it is left out.
    async fn reconcile(
        &self,
        networks: &mut HashMap<NamespaceId, Network>,
        id: NamespaceId,
        strict: bool,
    ) -> Result<(), NetworkError> {
        let others = networks.iter().filter(|(other, _)| **other != id);
        let others: Vec<u8> = others.flat_map(|(_, network)| network.slots()).collect();
        let Some(network) = networks.get_mut(&id) else {
            return Ok(());
        };
        network.follow(&self.pod, &others, strict).await
    }
}

/// Looks again whenever something has changed.
async fn watch(networks: Weak<Networks>, id: NamespaceId, monitor: AsyncFd<Monitor>) {
    loop {
        let Ok(mut ready) = monitor.readable().await else {
            return;
        };
        let drained = ready.get_inner().drain();
        ready.clear_ready();
        drop(ready);
        if let Err(error) = drained {
            tracing::warn!(%error, "The pod's network is not watched any more");
            return;
        }
        let Some(networks) = networks.upgrade() else {
            return;
        };
        // This task may be ended with its network, which the lock keeps from happening half-way
        // through a change.
        let changing = tokio::spawn(async move {
            let mut all = networks.networks.lock().await;
            let changed = networks.reconcile(&mut all, id, false).await;
            if let (Err(error), Some(network)) = (changed, all.get_mut(&id)) {
                network.complain(&error);
            }
        });
        let _ = changing.await;
    }
}

/// Takes away what a shim that was killed has left in the namespace at a path, which may be gone. What
/// a running pod has there stays.
pub fn clean_up(path: &Path) {
    let Ok(namespace) = Namespace::open(path) else {
        return;
    };
    let cleaned = namespace
        .enter(|| redirect::clean_up(&Netlink::open()?))
        .and_then(|cleaned| cleaned);
    if let Err(error) = cleaned {
        tracing::warn!(path = %path.display(), %error, "Cannot clean a network namespace up");
    }
}
