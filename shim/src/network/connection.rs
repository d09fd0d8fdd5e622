//! What a namespace has, in the guest: the difference is found, and made up for.

use std::{collections::BTreeSet, io, sync::Arc, time::Duration};

use bulkhead_agent_api::messages::{Interface as GuestInterface, NetworkRequest};
use bulkhead_vmm_control::{NICS, nic_device};

use super::{
    Members, NetworkError, Task,
    namespace::Namespace,
    netlink::Netlink,
    ports::Ports,
    redirect::{self, RedirectError},
    resolver,
    scan::{Interface, Scan, scan},
    tap::{self, Tap},
};
use crate::{deadline::timeout, pod::Pod, text};

/// How long the agent may take to dial the stream of the name server.
const RESOLVER_DEADLINE: Duration = Duration::from_secs(60);

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

/// The network of the containers in a namespace.
#[derive(Debug)]
pub struct Network {
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

impl Network {
    /// One that the guest has nothing of yet. `by_path` says that the namespace was there before its
    /// first container; `watch` ends with the network.
    pub fn new(namespace: Namespace, by_path: bool, watch: Task) -> Self {
        Self {
            namespace: Arc::new(namespace),
            members: Arc::default(),
            nics: Vec::new(),
            told: Some(Scan::default()),
            complaints: BTreeSet::new(),
            by_path,
            resolver: None,
            ports: None,
            _watch: watch,
        }
    }

    /// The containers in it.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// The VM's devices that it has.
    pub fn slots(&self) -> impl Iterator<Item = u8> {
        self.nics.iter().map(|nic| nic.slot)
    }

    /// Ends the watch. The namespace stays while the result is kept.
    pub fn into_namespace(self) -> Arc<Namespace> {
        self.namespace
    }

    /// Looks at the namespace and makes the guest have what it has. `taken` are devices of other
    /// networks. With `strict`, what cannot be had is an error; otherwise it is left out.
    pub async fn follow(
        &mut self,
        pod: &Arc<Pod>,
        taken: &[u8],
        strict: bool,
    ) -> Result<(), NetworkError> {
        let mut found = self
            .namespace
            .run(|| scan(&Netlink::open()?))
            .await
            .map_err(NetworkError::Namespace)?
            .map_err(NetworkError::Scan)?;
        self.refuse(&found, strict)?;
        self.remove_all_but(pod, &found).await?;

        for interface in found.interfaces.clone() {
            if self
                .nics
                .iter()
                .any(|nic| nic.interface.index == interface.index)
            {
                continue;
            }
            let own: Vec<u8> = self.slots().collect();
            let free = (0..NICS).find(|slot| !taken.contains(slot) && !own.contains(slot));
            let added = match free {
                Some(slot) => self.add(pod, slot, &interface).await,
                None => Err(NetworkError::TooMany(interface.name.clone())),
            };
            match added {
                Ok(()) => {}
                Err(error) if strict => return Err(error),
                Err(error) => {
                    self.complain(&error);
                    found.keep(|kept| kept.index != interface.index);
                }
            }
        }
        self.follow_mtus(&found).await;
        if let Some(container) = self.members.alive() {
            self.tell(pod, &container, found).await?;
        }
        if self.ports.is_none() && (self.by_path || !self.nics.is_empty()) {
            self.open_ports(pod).await;
        }
        Ok(())
    }

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
    pub fn complain(&mut self, error: &NetworkError) {
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
    pub async fn close(&mut self, pod: &Pod, last: &str) {
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
