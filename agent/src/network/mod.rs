//! The network of containers: what the host has in the pod's network namespace, made in the
//! guest's, and ways from and to the host that lead through it.
//!
//! Everything is remembered by the network namespace, not by the container: several may share one,
//! and the one that it was made for may be the first to go. Whatever is done inside a namespace is
//! done on a thread of its own ([`inside`]).

mod devices;
mod forward;
mod inside;
mod items;
mod netlink;
mod reconcile;
mod resolver;
#[cfg(test)]
mod tests;
mod wanted;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use bulkhead_agent_api::messages::{ConnectRequest, NetworkRequest};
use tokio::sync::Mutex;

pub use devices::PlatformDevices;
pub use reconcile::NetworkError;

use crate::{error::ServiceError, serve::Guest, stream::dial};
use inside::inside;
pub use inside::{Identity, identity, namespace_of};
use netlink::Rtnetlink;
use reconcile::{Made, Place};
use resolver::{Resolver, Sockets};
use wanted::Wanted;

/// What was made in the network namespaces of the guest.
#[derive(Debug, Default)]
pub struct Network {
    /// Locked for as long as something changes.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    namespaces: HashMap<Identity, Namespace>,
    /// Devices whose interfaces were in namespaces that nobody is in any more.
    left: HashSet<String>,
}

#[derive(Debug, Default)]
struct Namespace {
    made: Made,
    resolver: Option<Resolver>,
    /// Sysctls that interfaces get when they come.
    sysctls: BTreeMap<String, String>,
}

impl Network {
    /// Takes note of sysctls, by their paths below /proc/sys, for interfaces that come to a
    /// namespace. Those that are there have them already.
    pub async fn expect(&self, namespace: Option<Identity>, sysctls: &[(String, String)]) {
        if let (Some(key), false) = (namespace, sysctls.is_empty()) {
            let mut state = self.state.lock().await;
            let entry = state.namespaces.entry(key).or_default();
            entry.sysctls.extend(sysctls.iter().cloned());
        }
    }

    /// Makes the namespace of a process have what the host has in its own. Once the process has
    /// ended, `last` is where it was, and can only be left without interfaces.
    pub async fn set(
        &self,
        guest: &Guest,
        process: &OwnedFd,
        last: Option<Identity>,
        request: NetworkRequest,
    ) -> Result<(), ServiceError> {
        let namespace = match (open(process), last) {
            (Err(ServiceError::WrongState { .. }), Some(key)) if request.interfaces.is_empty() => {
                return self.take_down(guest, key).await;
            }
            (namespace, _) => namespace?,
        };
        let key = identity(&namespace).map_err(NetworkError::system("look at the namespace"))?;
        let wanted = Wanted::read(&request)?;
        let mut state = self.state.lock().await;
        let entry = state.namespaces.entry(key).or_default();
        if let Some(other) = entry.resolver.take_if(|one| !one.is_for(&request.resolver)) {
            // Its sockets can be bound again once it has ended.
            other.end().await;
        }
        let resolver = match request.resolver.is_empty() || entry.resolver.is_some() {
            true => None,
            false => Some(dial(&guest.transport, &request.resolver).await?),
        };
        let mut made = std::mem::take(&mut entry.made);
        let sysctls = entry.sysctls.clone();
        let mut elsewhere = state.left.clone();
        let others = state.namespaces.values();
        elsewhere.extend(others.flat_map(|other| other.made.devices().map(str::to_owned)));
        let moved: HashSet<String> = wanted.devices().map(str::to_owned).collect();
        let devices = Arc::clone(&guest.devices);
        let answers = resolver.is_some();
        let outside = Rtnetlink::open().map_err(NetworkError::system("open a netlink socket"))?;
        let work = inside(namespace, move |namespace| {
            let reconcile = |made: &mut Made| {
                let failed = NetworkError::system("open a netlink socket");
                let place = Place {
                    devices: &*devices,
                    outside: &outside,
                    inside: &Rtnetlink::open().map_err(failed)?,
                    namespace: namespace.as_fd(),
                    elsewhere: &elsewhere,
                    sysctls: &sysctls,
                };
                let failed = NetworkError::system("listen on port 53 of 127.0.0.11");
                let sockets = answers.then(Sockets::bind).transpose().map_err(failed)?;
                made.reconcile(&place, &wanted)?;
                Ok::<_, NetworkError>(sockets)
            };
            let result = reconcile(&mut made);
            (made, result)
        });
        let work = work.await;
        let (made, result) = work.map_err(NetworkError::system("enter the network namespace"))?;
        if result.is_ok() {
            state.left.retain(|device| !moved.contains(device));
            for other in state.namespaces.values_mut() {
                other.made.forget(&moved);
            }
        }
        let entry = state.namespaces.entry(key).or_default();
        entry.made = made;
        if let (Some(sockets), Some(host)) = (result?, resolver) {
            let started = Resolver::start(sockets, host, request.resolver);
            let failed = NetworkError::system("answer on port 53 of 127.0.0.11");
            entry.resolver = Some(started.map_err(failed)?);
        }
        Ok(())
    }

    /// Removes the interfaces of a namespace that nobody is in any more, wherever they are now.
    async fn take_down(&self, guest: &Guest, key: Identity) -> Result<(), ServiceError> {
        let mut state = self.state.lock().await;
        let Some(mut namespace) = state.namespaces.remove(&key) else {
            return Ok(());
        };
        if let Some(resolver) = namespace.resolver.take() {
            resolver.end().await;
        }
        let devices = Arc::clone(&guest.devices);
        // The kernel takes its time.
        let removed = tokio::task::spawn_blocking(move || {
            let result = namespace.made.remove_all(&*devices);
            (namespace.made, result)
        });
        let (made, result) = removed
            .await
            .map_err(|gone| NetworkError::system("remove interfaces")(io::Error::other(gone)))?;
        state.left.extend(made.devices().map(str::to_owned));
        Ok(result?)
    }

    /// Connects a stream to the host with a port of the loopback interface of a process's
    /// namespace.
    pub async fn connect(
        &self,
        guest: &Guest,
        process: &OwnedFd,
        request: &ConnectRequest,
    ) -> Result<(), ServiceError> {
        forward::forward(&guest.transport, open(process)?, request).await
    }

    /// Forgets all namespaces but these, so that nothing of the agent's keeps them.
    pub async fn retain(&self, living: &HashSet<Identity>) {
        let mut state = self.state.lock().await;
        let state = &mut *state;
        let gone = |key: &Identity| !living.contains(key);
        for (_, namespace) in state.namespaces.extract_if(|key, _| gone(key)) {
            state
                .left
                .extend(namespace.made.devices().map(str::to_owned));
        }
    }
}

fn open(process: &OwnedFd) -> Result<OwnedFd, ServiceError> {
    namespace_of(process).map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH) => ServiceError::WrongState {
            what: "find the container's network",
            state: "its process has ended",
        },
        _ => ServiceError::system("find the container's network namespace")(error),
    })
}
