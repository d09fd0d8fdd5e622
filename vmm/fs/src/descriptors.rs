//! The budget of open descriptors: the guest decides how many it makes the server hold.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

/// Descriptors left for the rest of the process.
const RESERVE: usize = 256;

/// What may be open at once.
#[derive(Debug)]
pub(crate) struct Descriptors {
    limit: usize,
    open: AtomicUsize,
}

/// A descriptor that counts against the budget until it is closed.
#[derive(Debug)]
pub(crate) struct Counted {
    fd: OwnedFd,
    budget: Arc<Descriptors>,
}

impl Descriptors {
    /// The process's own limit of open files, raised as far as it may be (`RLIMIT_NOFILE`, its
    /// hard limit), less a reserve.
    pub(crate) fn of_process() -> Result<Arc<Self>, Errno> {
        let maximum = getrlimit(Resource::Nofile).maximum;
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: maximum,
                maximum,
            },
        )?;
        let limit = maximum.map_or(usize::MAX, |limit| {
            usize::try_from(limit).unwrap_or(usize::MAX)
        });
        Ok(Self::new(limit.saturating_sub(RESERVE)))
    }

    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            open: AtomicUsize::new(0),
        })
    }

    /// Counts a file's descriptor. At the limit it is closed, with `ENFILE`.
    pub(crate) fn count(self: &Arc<Self>, fd: OwnedFd) -> Result<Counted, Errno> {
        self.count_below(self.limit, fd)
    }

    /// Counts a node's descriptor. The last eighth is for files, so that what is known can always
    /// be opened.
    pub(crate) fn count_node(self: &Arc<Self>, fd: OwnedFd) -> Result<Counted, Errno> {
        self.count_below(self.limit - self.limit / 8, fd)
    }

    fn count_below(self: &Arc<Self>, limit: usize, fd: OwnedFd) -> Result<Counted, Errno> {
        self.open
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| {
                (open < limit).then_some(open + 1)
            })
            .map_err(|_| Errno::NFILE)?;
        Ok(Counted {
            fd,
            budget: Arc::clone(self),
        })
    }
}

impl AsFd for Counted {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.budget.open.fetch_sub(1, Ordering::Relaxed);
    }
}
