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

pub mod namespace;
pub mod netlink;
pub mod ports;
pub mod redirect;
pub mod resolver;
pub mod scan;
pub mod tap;

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    future::Future,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use bulkhead_agent_api::messages::{Interface as GuestInterface, NetworkRequest};
use bulkhead_vmm_control::{NICS, nic_device};
use thiserror::Error;
use tokio::{io::unix::AsyncFd, sync::Mutex as AsyncMutex, task::AbortHandle};

use self::{
    namespace::{Namespace, NamespaceId},
    netlink::{Monitor, Netlink},
    ports::Ports,
    redirect::RedirectError,
    scan::{Interface, LOOPBACK, Scan, scan},
    tap::Tap,
};
use crate::{
    agent_client::AgentError, deadline::timeout, pod::Pod, process::Process, text,
    vmm_process::VmmError,
};

/// How long the agent may take to dial the stream of the name server.
const RESOLVER_DEADLINE: Duration = Duration::from_secs(60);

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

/// An interface that the guest has.
#[derive(Debug)]
struct Nic {
    slot: u8,
    /// As it was when the guest got it.
    interface: Interface,
    /// Index of the tap.
    tap: u32,
    /// The tap's MTU.
    mtu: u16,
}

impl Nic {
    /// Whether the guest's device can become what the interface is now.
    fn can_be(&self, found: &Interface) -> bool {
        let had = &self.interface;
        // A virtio device's MTU does not grow.
        had.index == found.index && had.mac == found.mac && found.mtu <= had.mtu
    }
}

#[derive(Debug)]
struct Network {
    namespace: Arc<Namespace>,
    members: Arc<Members>,
    nics: Vec<Nic>,
    /// What the guest was told last; `None` when nobody knows how much of it was done.
    told: Option<Scan>,
    /// What was complained about.
    complaints: BTreeSet<String>,
    /// The namespace was there before its first container.
    by_path: bool,
    resolver: Option<Task>,
    ports: Option<Ports>,
    _watch: Task,
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
        network.members.list().push(member);
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
            let mut members = network.get().members.list();
            members.retain(|(id, _)| id != container);
            members.is_empty()
        };
        if last {
            network.get_mut().close(&self.pod, container).await;
            // With it ends its watch.
            let namespace = network.remove().namespace;
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
        Ok(Network {
            namespace: Arc::new(namespace),
            members: Arc::default(),
            nics: Vec::new(),
            told: Some(Scan::default()),
            complaints: BTreeSet::new(),
            by_path,
            resolver: None,
            ports: None,
            _watch: Task::spawn(watch),
        })
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
        let others: Vec<u8> = others
            .flat_map(|(_, network)| network.nics.iter().map(|nic| nic.slot))
            .collect();
        let Some(network) = networks.get_mut(&id) else {
            return Ok(());
        };
        let mut found = network
            .namespace
            .run(|| scan(&Netlink::open()?))
            .await
            .map_err(NetworkError::Namespace)?
            .map_err(NetworkError::Scan)?;
        network.refuse(&found, strict)?;
        network.remove_all_but(&self.pod, &found).await?;

        for interface in found.interfaces.clone() {
            if network
                .nics
                .iter()
                .any(|nic| nic.interface.index == interface.index)
            {
                continue;
            }
            let own = |slot: &u8| network.nics.iter().any(|nic| nic.slot == *slot);
            let free = (0..NICS).find(|slot| !others.contains(slot) && !own(slot));
            let added = match free {
                Some(slot) => network.add(&self.pod, slot, &interface).await,
                None => Err(NetworkError::TooMany(interface.name.clone())),
            };
            match added {
                Ok(()) => {}
                Err(error) if strict => return Err(error),
                Err(error) => {
                    network.complain(&error);
                    found.keep(|kept| kept.index != interface.index);
                }
            }
        }
        network.follow_mtus(&found).await;
        if let Some(container) = network.members.alive() {
            network.tell(&self.pod, &container, found).await?;
        }
        if network.ports.is_none() && (network.by_path || !network.nics.is_empty()) {
            network.open_ports(&self.pod).await;
        }
        Ok(())
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

impl Network {
    /// Tells of what the guest does not get.
    fn refuse(&mut self, found: &Scan, strict: bool) -> Result<(), NetworkError> {
        for (name, why) in &found.unsupported {
            let error = NetworkError::Unsupported {
                name: name.clone(),
                why,
            };
            if strict {
                return Err(error);
            }
            self.complain(&error);
        }
        Ok(())
    }

    /// Logs what is wrong, once.
    fn complain(&mut self, error: &NetworkError) {
        let error = text::chain(error);
        if self.complaints.insert(error.clone()) {
            tracing::warn!(error, "The pod's network is incomplete");
        }
    }

    /// Takes interfaces away from the guest that are not there any more, or not as they were.
    async fn remove_all_but(&mut self, pod: &Pod, found: &Scan) -> Result<(), NetworkError> {
        let stays = |nic: &Nic| found.interfaces.iter().any(|found| nic.can_be(found));
        let (stay, gone): (Vec<Nic>, Vec<Nic>) =
            std::mem::take(&mut self.nics).into_iter().partition(stays);
        self.nics = stay;
        if gone.is_empty() {
            return Ok(());
        }
        let mut without = found.clone();
        let kept: Vec<u32> = self.nics.iter().map(|nic| nic.interface.index).collect();
        without.keep(|interface| kept.contains(&interface.index));
        // The guest's driver has to leave them first.
        let told = match self.members.alive() {
            Some(container) => self.tell(pod, &container, without).await,
            None => Ok(()),
        };
        for nic in &gone {
            self.detach(pod, nic).await;
        }
        told
    }

    /// Makes an interface one of the guest's.
    async fn add(
        &mut self,
        pod: &Pod,
        slot: u8,
        interface: &Interface,
    ) -> Result<(), NetworkError> {
        let name = || interface.name.clone();
        let (index, mtu) = (interface.index, interface.mtu);
        let queue_pairs = pod.queue_pairs();
        let made = self.namespace.run(move || {
            let netlink = Netlink::open().map_err(Made::Tap)?;
            let tap = Tap::create(&netlink, index, mtu, queue_pairs).map_err(Made::Tap)?;
            redirect::connect(&netlink, index, tap.index).map_err(Made::Redirect)?;
            Ok(tap)
        });
        let tap = match made.await.map_err(NetworkError::Namespace)? {
            Ok(tap) => tap,
            Err(Made::Tap(source)) => {
                return Err(NetworkError::Tap {
                    name: name(),
                    hint: hint(&source),
                    source,
                });
            }
            Err(Made::Redirect(RedirectError::Taken(why))) => {
                return Err(NetworkError::Unsupported { name: name(), why });
            }
            Err(Made::Redirect(RedirectError::System(what, source))) => {
                return Err(NetworkError::Redirect {
                    name: name(),
                    what,
                    source,
                });
            }
        };
        let nic = Nic {
            slot,
            interface: interface.clone(),
            tap: tap.index,
            mtu,
        };
        // With its last descriptor the tap goes: the VMM has them from now on.
        if let Err(source) = pod.attach_nic(slot, interface, &tap.queues).await {
            drop(tap);
            self.disconnect(&nic).await;
            return Err(NetworkError::Attach {
                name: name(),
                source,
            });
        }
        self.nics.push(nic);
        Ok(())
    }

    async fn detach(&self, pod: &Pod, nic: &Nic) {
        // With the VM its devices are gone.
        if pod.failure().is_none()
            && let Err(error) = pod.detach_nic(nic.slot).await
        {
            let error = text::chain(&error);
            tracing::warn!(
                name = nic.interface.name,
                error,
                "The VMM keeps an interface"
            );
        }
        self.disconnect(nic).await;
    }

    async fn disconnect(&self, nic: &Nic) {
        let index = nic.interface.index;
        let done = self
            .namespace
            .run(move || redirect::disconnect(&Netlink::open()?, index))
            .await
            .and_then(|done| done);
        match done {
            Ok(()) => {}
            // It has gone, with all that it had.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => {
                let name = &nic.interface.name;
                tracing::warn!(name, %error, "Cannot release an interface of the host");
            }
        }
    }

    /// Gives taps the MTUs of their interfaces.
    async fn follow_mtus(&mut self, found: &Scan) {
        for nic in &mut self.nics {
            let now = found
                .interfaces
                .iter()
                .find(|interface| interface.index == nic.interface.index);
            let Some(now) = now.filter(|now| now.mtu != nic.mtu) else {
                continue;
            };
            let (tap, mtu) = (nic.tap, now.mtu);
            let set = self
                .namespace
                .run(move || tap::set_mtu(&Netlink::open()?, tap, mtu));
            match set.await.and_then(|set| set) {
                Ok(()) => nic.mtu = mtu,
                Err(error) => {
                    tracing::warn!(name = now.name, %error, "Cannot set the MTU of a tap");
                }
            }
        }
    }

    /// Tells the guest, unless it knows.
    async fn tell(&mut self, pod: &Pod, container: &str, found: Scan) -> Result<(), NetworkError> {
        if self.told.as_ref().is_some_and(|told| found.is_like(told)) {
            return Ok(());
        }
        let Some(agent) = pod.ready_agent() else {
            return Ok(());
        };
        let expected = match found.resolver {
            true => Some(pod.streams().expect().map_err(NetworkError::Scan)?),
            false => None,
        };
        let request = NetworkRequest {
            container_id: container.to_owned(),
            interfaces: self.interfaces(&found),
            addresses: found.addresses.clone(),
            routes: found.routes.clone(),
            rules: found.rules.clone(),
            neighbours: found.neighbours.clone(),
            resolver: expected
                .as_ref()
                .map(|expected| expected.token())
                .unwrap_or_default(),
            ..NetworkRequest::default()
        };
        // The stream may come before the answer.
        let namespace = self.namespace.clone();
        let resolver = expected.map(|expected| {
            Task::spawn(async move {
                match timeout(RESOLVER_DEADLINE, expected.arrived()).await {
                    Ok(Some(stream)) => resolver::serve(stream, namespace).await,
                    Ok(None) | Err(_) => tracing::warn!("The guest does not ask for names"),
                }
            })
        });
        self.told = None;
        agent.set_network(&request).await?;
        self.resolver = resolver;
        self.told = Some(found);
        Ok(())
    }

    /// What the guest is told of its interfaces.
    fn interfaces(&self, found: &Scan) -> Vec<GuestInterface> {
        let interfaces = found.interfaces.iter().filter_map(|interface| {
            let has = |nic: &&Nic| nic.interface.index == interface.index;
            let nic = self.nics.iter().find(has)?;
            Some(GuestInterface {
                index: interface.index,
                name: interface.name.clone(),
                device: nic_device(nic.slot),
                mtu: interface.mtu.into(),
                up: interface.up,
                ..GuestInterface::default()
            })
        });
        interfaces.collect()
    }

    /// Lets port-forward reach the guest. A container works without that.
    async fn open_ports(&mut self, pod: &Arc<Pod>) {
        match Ports::open(&self.namespace, pod, &self.members).await {
            Ok(ports) => self.ports = Some(ports),
            Err(error) => self.complain(&NetworkError::Ports(error)),
        }
    }

    /// Gives everything back, `last` being the last container.
    async fn close(&mut self, pod: &Pod, last: &str) {
        self.ports = None;
        if let Err(error) = self.tell(pod, last, Scan::default()).await {
            let error = text::chain(&error);
            tracing::warn!(error, "The guest keeps a network");
        }
        self.resolver = None;
        for nic in std::mem::take(&mut self.nics) {
            self.detach(pod, &nic).await;
        }
    }
}

/// The step at which an interface could not be had.
#[derive(Debug)]
enum Made {
    Tap(io::Error),
    Redirect(RedirectError),
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            " (load the kernel module tun: modprobe tun)"
        }
        Some(libc::EBUSY) => " (another pod has the interface)",
        _ => "",
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
