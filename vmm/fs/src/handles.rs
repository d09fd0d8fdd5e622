//! Open files and directories.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::io::Errno;

use crate::{
    descriptors::{Counted, Descriptors},
    inodes::Inode,
};

/// An open regular file or directory.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) inode: Arc<Inode>,
    /// Held while the directory's position is set and used.
    pub(crate) position: Mutex<()>,
    fd: Counted,
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The open files by handle (`fh`).
#[derive(Debug)]
pub(crate) struct Handles {
    files: Mutex<Files>,
    descriptors: Arc<Descriptors>,
}

#[derive(Debug, Default)]
struct Files {
    by_fh: HashMap<u64, Arc<Handle>>,
    last_fh: u64,
}

impl Handles {
    pub(crate) fn new(descriptors: Arc<Descriptors>) -> Self {
        Self {
            files: Mutex::default(),
            descriptors,
        }
    }

    /// Keeps an open file and returns its handle, which is never 0 and never used again.
    pub(crate) fn insert(&self, inode: Arc<Inode>, fd: OwnedFd) -> Result<u64, Errno> {
        let fd = self.descriptors.count(fd)?;
        let mut files = self.lock();
        files.last_fh += 1;
        let fh = files.last_fh;
        files.by_fh.insert(
            fh,
            Arc::new(Handle {
                inode,
                position: Mutex::new(()),
                fd,
            }),
        );
        Ok(fh)
    }

    /// Puts another open file of the same inode in the place of a handle's. Requests under way
    /// finish with the one before.
    pub(crate) fn replace(&self, fh: u64, fd: OwnedFd) -> Result<(), Errno> {
        let fd = self.descriptors.count(fd)?;
        if let Some(handle) = self.lock().by_fh.get_mut(&fh) {
            *handle = Arc::new(Handle {
                inode: Arc::clone(&handle.inode),
                position: Mutex::new(()),
                fd,
            });
        }
        Ok(())
    }

    /// The open file of a handle.
    pub(crate) fn get(&self, fh: u64) -> Result<Arc<Handle>, Errno> {
        self.lock().by_fh.get(&fh).cloned().ok_or(Errno::BADF)
    }

    /// Closes a handle.
    pub(crate) fn remove(&self, fh: u64) -> Option<Arc<Handle>> {
        self.lock().by_fh.remove(&fh)
    }

    /// Closes every handle.
    pub(crate) fn remove_all(&self) {
        let all = std::mem::take(&mut self.lock().by_fh);
        // Outside the lock, which is taken inside this one elsewhere. The inode may outlive its
        // handles: the root of a share does.
        for handle in all.values() {
            handle
                .inode
                .readers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
        }
    }

    /// Closes every handle of a share.
    pub(crate) fn remove_share(&self, share: u64) {
        self.lock()
            .by_fh
            .retain(|_, handle| handle.inode.share.id != share);
    }

    fn lock(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
