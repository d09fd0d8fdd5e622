//! The nodes the guest knows: a node id for each file of the host that it has looked up and not
//! forgotten, with an `O_PATH` descriptor that keeps the file from going away.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::{
    fs::{AtFlags, FileType, Statx, StatxFlags, statx},
    io::Errno,
};

use crate::{
    abi::ROOT_ID,
    descriptors::{Counted, Descriptors},
    share::Share,
};

/// What makes two descriptors the same node. The descriptor held by the node keeps the inode
/// number from being used again. The mount is part of it since one file can be reached through
/// several mounts with different rights, and the share since it has rights of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    share: u64,
    mount: u64,
    device: (u32, u32),
    ino: u64,
}

impl Key {
    /// Whether both are on the same mount of the same file system.
    pub(crate) fn same_mount(&self, other: &Self) -> bool {
        (self.mount, self.device) == (other.mount, other.device)
    }
}

/// A file of the host, of any type.
#[derive(Debug)]
pub(crate) struct Inode {
    /// Never used again for another file.
    pub(crate) id: u64,
    pub(crate) kind: FileType,
    pub(crate) share: Arc<Share>,
    pub(crate) key: Key,
    /// What the guest sees as `st_ino`.
    pub(crate) ino: u64,
    /// The handles that are open for reading only; held while the file is being opened.
    pub(crate) readers: Mutex<Vec<u64>>,
    fd: Counted,
}

impl Inode {
    /// Refuses changes below a share that is read-only.
    pub(crate) fn writable(&self) -> Result<(), Errno> {
        if self.share.options.read_only {
            return Err(Errno::ROFS);
        }
        Ok(())
    }

    /// The file's attributes as they are now.
    pub(crate) fn stat(&self) -> Result<Statx, Errno> {
        stat(self)
    }
}

impl AsFd for Inode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Examines the file of a descriptor, which may be `O_PATH`.
pub(crate) fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    statx(
        fd,
        c"",
        AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT,
        StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID,
    )
}

/// The nodes by id and by file.
#[derive(Debug)]
pub(crate) struct Inodes {
    nodes: Mutex<Nodes>,
    descriptors: Arc<Descriptors>,
}

#[derive(Debug)]
struct Nodes {
    by_id: HashMap<u64, Node>,
    by_key: HashMap<Key, u64>,
    last_id: u64,
}

#[derive(Debug)]
struct Node {
    inode: Arc<Inode>,
    /// How many times the guest was told of it; `None` for the root of a share, which stays.
    lookups: Option<u64>,
}

impl Inodes {
    pub(crate) fn new(descriptors: Arc<Descriptors>) -> Self {
        Self {
            nodes: Mutex::new(Nodes {
                by_id: HashMap::new(),
                by_key: HashMap::new(),
                last_id: ROOT_ID,
            }),
            descriptors,
        }
    }

    /// The node of that id, while the guest has not forgotten it.
    pub(crate) fn get(&self, id: u64) -> Result<Arc<Inode>, Errno> {
        match self.lock().by_id.get(&id) {
            Some(node) => Ok(Arc::clone(&node.inode)),
            // Nothing can be changed in the root, and what can be asked of it was answered before.
            None if id == ROOT_ID => Err(Errno::ROFS),
            None => Err(Errno::STALE),
        }
    }

    /// The node of a file, counting one more look-up. `fd` is an `O_PATH` descriptor of it.
    pub(crate) fn look_up(
        &self,
        share: &Arc<Share>,
        fd: OwnedFd,
        stat: &Statx,
    ) -> Result<Arc<Inode>, Errno> {
        self.enter(share, fd, stat, false)
    }

    /// The node of a share's root, which stays until the share goes.
    pub(crate) fn add_root(
        &self,
        share: &Arc<Share>,
        fd: OwnedFd,
        stat: &Statx,
    ) -> Result<Arc<Inode>, Errno> {
        self.enter(share, fd, stat, true)
    }

    fn enter(
        &self,
        share: &Arc<Share>,
        fd: OwnedFd,
        stat: &Statx,
        root: bool,
    ) -> Result<Arc<Inode>, Errno> {
        let key = Key {
            share: share.id,
            mount: stat.stx_mnt_id,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
        };
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        let mut nodes = self.lock();
        let nodes = &mut *nodes;
        if let Some(node) = nodes
            .by_key
            .get(&key)
            .and_then(|id| nodes.by_id.get_mut(id))
        {
            node.lookups = node.lookups.map(|count| count.saturating_add(1));
            return Ok(Arc::clone(&node.inode));
        }
        let fd = self.descriptors.count_node(fd)?;
        nodes.last_id += 1;
        let id = nodes.last_id;
        // Files shared one by one come from any file system of the host but appear on one of the
        // guest, where equal numbers would make them links of one file. Directories appear as file
        // systems of their own.
        let ino = if root && kind != FileType::Directory {
            id
        } else {
            stat.stx_ino
        };
        let inode = Arc::new(Inode {
            id,
            kind,
            share: Arc::clone(share),
            key,
            ino,
            readers: Mutex::default(),
            fd,
        });
        nodes.by_key.insert(key, id);
        nodes.by_id.insert(
            id,
            Node {
                inode: Arc::clone(&inode),
                lookups: (!root).then_some(1),
            },
        );
        Ok(inode)
    }

    /// Takes back `count` look-ups, and closes the node with the last.
    pub(crate) fn forget(&self, id: u64, count: u64) {
        let mut nodes = self.lock();
        let Some(node) = nodes.by_id.get_mut(&id) else {
            return;
        };
        node.lookups = node.lookups.map(|lookups| lookups.saturating_sub(count));
        if node.lookups == Some(0)
            && let Some(node) = nodes.by_id.remove(&id)
        {
            nodes.by_key.remove(&node.inode.key);
        }
    }

    /// Closes every node but the roots of shares.
    pub(crate) fn forget_all(&self) {
        self.retain(|node| node.lookups.is_none());
    }

    /// Closes every node of a share.
    pub(crate) fn remove_share(&self, share: u64) {
        self.retain(|node| node.inode.share.id != share);
    }

    fn retain(&self, keep: impl Fn(&Node) -> bool) {
        let mut nodes = self.lock();
        let nodes = &mut *nodes;
        nodes.by_id.retain(|_, node| keep(node));
        nodes.by_key.retain(|_, id| nodes.by_id.contains_key(id));
    }

    fn lock(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
