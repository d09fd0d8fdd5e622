//! What of the host the containers of a pod have mounted.
//!
//! Containers that mount the same thing in the same way are given one share of it, so that it is one
//! file system in the guest: they see each other's locks, mapped memory and inotify events.

use std::{
    collections::HashMap,
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, CWD, StatxFlags, statvfs, statx};

use crate::{
    mirror::{self, Watch},
    mount_table,
    pod::{Confinement, Pod},
    shares::{self, ShareError},
    spec::{IdMappings, Mount},
    text,
};

/// Where a container has the memory that its pod shares (shm_overview(7)).
const SHARED_MEMORY: &str = "/dev/shm";

/// As what containerd and Docker mount a pod's shared memory on the host.
const SHARED_MEMORY_SOURCE: &[u8] = b"shm";

/// What is shared, and how: two mounts that are alike in all of it show the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Identity {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// Of the mount that the path is in, and of those below it.
    mounts: Vec<u64>,
    read_only: bool,
    ids: Option<IdMappings>,
}

#[derive(Debug)]
struct Volume {
    name: String,
    users: usize,
    /// The guest has a copy, and hears of changes.
    mirror: Option<Watch>,
}

/// The shares of a pod that are not one container's alone.
#[derive(Debug, Default)]
pub struct Volumes {
    volumes: HashMap<Identity, Volume>,
    made: u64,
}

impl Volumes {
    /// Shares the source of a bind mount, unless that was done, and returns the share's name and whether
    /// the guest is to have a copy of it. `users` are the ids of the container's user namespace.
    /// Whatever the outcome, [`Volumes::remove`] is to be called with each name that is noted in
    /// `names`.
    pub async fn add(
        &mut self,
        pod: &Pod,
        confinement: &Confinement,
        mount: &Mount,
        users: &IdMappings,
        names: &mut Vec<String>,
    ) -> Result<(String, bool), ShareError> {
        let identity = Identity::of(mount, users).map_err(|source| ShareError::Look {
            path: mount.source.clone(),
            destination: mount.destination.clone(),
            source,
        })?;
        if let Some(volume) = self.volumes.get_mut(&identity) {
            volume.users += 1;
            names.push(volume.name.clone());
            return Ok((volume.name.clone(), volume.mirror.is_some()));
        }
        let tree = shares::bind(confinement, mount, users)?;
        let name = format!("v{}", self.made);
        self.made += 1;
        // Noted first: an answer that comes too late may still mean that it is shared.
        names.push(name.clone());
        pod.share(&name, tree.as_fd(), mount.is_read_only(), false)
            .await
            .map_err(|source| ShareError::Vmm {
                what: mount.source.clone(),
                source,
            })?;
        let mirror = mirror(pod, mount, &name).map_err(|source| ShareError::Look {
            path: mount.source.clone(),
            destination: mount.destination.clone(),
            source,
        })?;
        let mirrored = mirror.is_some();
        let volume = Volume {
            name: name.clone(),
            users: 1,
            mirror,
        };
        self.volumes.insert(identity, volume);
        Ok((name, mirrored))
    }

    /// Ends one use of each of these shares. Those with no other are taken away: the VMM, if it still is
    /// there, holds nothing of them afterwards.
    pub async fn remove(&mut self, pod: &Pod, names: Vec<String>) {
        let unused: Vec<String> = names
            .into_iter()
            .filter(|name| self.drop_use(name))
            .collect();
        if unused.is_empty() {
            return;
        }
        if let Some(agent) = pod.ready_agent()
            && let Err(error) = agent.release_shares(unused.clone()).await
        {
            let error = text::chain(&error);
            tracing::warn!(error, "The guest does not let go of shares");
        }
        for name in unused {
            shares::report(&name, pod.unshare(&name).await);
        }
    }

    /// Whether that was the last use.
    fn drop_use(&mut self, name: &str) -> bool {
        let mut all = self.volumes.iter_mut();
        let Some((identity, volume)) = all.find(|(_, volume)| volume.name == name) else {
            return true;
        };
        volume.users -= 1;
        if volume.users > 0 {
            return false;
        }
        let identity = identity.clone();
        self.volumes.remove(&identity);
        true
    }
}

/// Has the guest follow a volume that is replaced as a whole.
fn mirror(pod: &Pod, mount: &Mount, name: &str) -> io::Result<Option<Watch>> {
    // There is one, or no container could be created.
    match pod.ready_agent() {
        Some(agent) if mirror::suits(mount) => Watch::start(&mount.source, name, agent).map(Some),
        _ => Ok(None),
    }
}

impl Identity {
    fn of(mount: &Mount, users: &IdMappings) -> io::Result<Self> {
        let path = fs::canonicalize(&mount.source)?;
        let stat = fs::metadata(&path)?;
        let mut mounts = vec![mount_id(&path)?];
        if mount.is_recursive() && stat.is_dir() {
            let table = fs::read(mount_table::PATH)?;
            let below = mount_table::lines(&table)
                .filter(|line| line.point() != path && line.point().starts_with(&path));
            mounts.extend(below.map(|line| line.id));
        }
        Ok(Self {
            path,
            device: stat.dev(),
            inode: stat.ino(),
            mounts,
            read_only: mount.is_read_only(),
            ids: mount.mapped_ids(users).cloned(),
        })
    }
}

fn mount_id(path: &Path) -> io::Result<u64> {
    let stat = statx(CWD, path, AtFlags::NO_AUTOMOUNT, StatxFlags::MNT_ID)?;
    Ok(stat.stx_mnt_id)
}

/// How large the shared memory of a pod is, in bytes, if a mount is that: containerd and Docker make a
/// tmpfs on the host for it, which only their containers use. 0 is as large as any.
pub fn shared_memory(mount: &Mount) -> io::Result<Option<u64>> {
    if mount.destination != Path::new(SHARED_MEMORY) || !mount.is_bind() {
        return Ok(None);
    }
    let id = mount_id(&mount.source)?;
    let table = fs::read(mount_table::PATH)?;
    let mut lines = mount_table::lines(&table);
    let Some(line) = lines.find(|line| line.id == id) else {
        return Ok(None);
    };
    let whole = line.root == b"/" && line.point() == fs::canonicalize(&mount.source)?;
    if !whole || line.kind != b"tmpfs" || line.source != SHARED_MEMORY_SOURCE {
        return Ok(None);
    }
    let size = statvfs(&mount.source)?;
    Ok(Some(size.f_blocks.saturating_mul(size.f_frsize)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(source: &Path, options: &[&str]) -> Mount {
        Mount {
            destination: "/volume".into(),
            kind: "bind".into(),
            source: source.into(),
            options: Some(options.iter().map(|it| (*it).to_owned()).collect()),
            ids: IdMappings::default(),
        }
    }

    #[test]
    fn mounts_that_show_the_same_are_one_volume() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other");
        fs::create_dir(&other).unwrap();
        let none = IdMappings::default();
        let of = |mount: &Mount| Identity::of(mount, &none).unwrap();
        let first = of(&mount(dir.path(), &["rbind"]));
        assert_eq!(first, of(&mount(dir.path(), &["rbind", "rw"])));
        assert_eq!(first, of(&mount(&other.join(".."), &["rbind"])));
        assert_ne!(first, of(&mount(dir.path(), &["rbind", "ro"])));
        assert_ne!(first, of(&mount(&other, &["rbind"])));

        let before = of(&mount(&other, &["rbind"]));
        fs::rename(&other, dir.path().join("gone")).unwrap();
        fs::create_dir(&other).unwrap();
        assert_ne!(before, of(&mount(&other, &["rbind"])));
    }

    #[test]
    fn a_share_ends_with_its_last_use() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::of(&mount(dir.path(), &[]), &IdMappings::default()).unwrap();
        let mut volumes = Volumes::default();
        let volume = Volume {
            name: "v0".into(),
            users: 2,
            mirror: None,
        };
        volumes.volumes.insert(identity, volume);
        assert!(!volumes.drop_use("v0"));
        assert!(volumes.drop_use("v0"));
        // One that could not be shared is nobody's.
        assert!(volumes.drop_use("v1"));
    }

    #[test]
    fn what_is_no_shared_memory_of_a_pod_is_a_volume() {
        let dir = tempfile::tempdir().unwrap();
        let mut plain = mount(dir.path(), &["rbind"]);
        assert_eq!(shared_memory(&plain).unwrap(), None);
        plain.destination = SHARED_MEMORY.into();
        assert_eq!(shared_memory(&plain).unwrap(), None);
    }
}
