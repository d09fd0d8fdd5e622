//! What a new container shares with others of its pod: namespaces.

use std::{
    collections::{HashMap, HashSet},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use tokio::sync::{Mutex, MutexGuard};

use crate::{
    error::ServiceError,
    network::{Identity, identity, namespace_of},
    spec::path_of,
    stage::{
        namespaces::flag,
        protocol::{IdMappings, NamespaceFlags},
    },
};

/// A container whose namespaces are joined.
#[derive(Debug)]
pub struct Neighbour {
    /// Which of them.
    pub kind: LinuxNamespaceType,
    /// Its own process.
    pub pidfd: OwnedFd,
    /// Ids of its user namespace.
    pub users: Option<IdMappings>,
}

/// All of them that one container joins.
#[derive(Debug, Default)]
pub struct Neighbours(pub Vec<Neighbour>);

impl Neighbours {
    /// The kinds of their namespaces.
    pub fn kinds(&self) -> HashSet<LinuxNamespaceType> {
        self.0.iter().map(|neighbour| neighbour.kind).collect()
    }

    /// Ids of the container's user namespace: the spec's, or those of the one that it joins.
    pub fn users(&self, spec: &Spec) -> Option<IdMappings> {
        let linux = spec.linux().as_ref()?;
        if let (Some(uids), Some(gids)) = (linux.uid_mappings(), linux.gid_mappings())
            && !uids.is_empty()
        {
            return Some(IdMappings {
                uids: uids.clone(),
                gids: gids.clone(),
            });
        }
        let mut joined = self.0.iter();
        let joined = joined.find(|neighbour| neighbour.kind == LinuxNamespaceType::User)?;
        joined.users.clone()
    }

    /// What a stage needs to join them, the user namespace first: the others may belong to it.
    pub fn into_descriptors(mut self) -> Vec<(OwnedFd, NamespaceFlags)> {
        let is_user = |neighbour: &Neighbour| neighbour.kind == LinuxNamespaceType::User;
        self.0.sort_by_key(|neighbour| !is_user(neighbour));
        let all = self.0.into_iter();
        all.map(|neighbour| (neighbour.pidfd, flag(neighbour.kind)))
            .collect()
    }
}

/// Network namespaces of the pod, by the names of those on the host that they stand for.
#[derive(Debug, Default)]
pub struct Networks(Mutex<HashMap<PathBuf, OwnedFd>>);

/// The network namespace that a container's spec names, while the container is created.
pub struct Network<'a> {
    networks: MutexGuard<'a, HashMap<PathBuf, OwnedFd>>,
    path: PathBuf,
}

impl Networks {
    /// The network of a spec that names one. Nobody else gets at it meanwhile, so that one of two
    /// containers makes it and the other joins it.
    pub async fn of(&self, spec: &Spec) -> Option<Network<'_>> {
        let path = network_path(spec)?.to_owned();
        let networks = self.0.lock().await;
        Some(Network { networks, path })
    }

    /// Which namespaces are kept.
    pub async fn kept(&self) -> Vec<Identity> {
        let networks = self.0.lock().await;
        let all = networks.values().filter_map(|one| identity(one).ok());
        all.collect()
    }
}

impl Network<'_> {
    /// The namespace, if a container has been in it before.
    pub fn namespace(&self) -> Result<Option<OwnedFd>, ServiceError> {
        let found = self.networks.get(&self.path).map(OwnedFd::try_clone);
        found
            .transpose()
            .map_err(ServiceError::system("copy a network namespace"))
    }

    /// Keeps the namespace of a container's process for those to come.
    pub fn keep(&mut self, process: &OwnedFd) -> Result<(), ServiceError> {
        if self.networks.contains_key(&self.path) {
            return Ok(());
        }
        let namespace = namespace_of(process);
        let namespace = namespace.map_err(ServiceError::system("keep the network namespace"))?;
        self.networks.insert(self.path.clone(), namespace);
        Ok(())
    }
}

fn network_path(spec: &Spec) -> Option<&Path> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let mut namespaces = namespaces.iter();
    path_of(namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::Network)?)
}
