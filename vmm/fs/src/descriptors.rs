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
/// What the process should be able to open: as much as the host's kernel allows unless it was told
/// otherwise (`fs.nr_open`).
const WANTED: u64 = 1024 * 1024;

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
    /// The process's limit of open files (`RLIMIT_NOFILE`), raised as far as it may be, less a
    /// reserve. A process with `CAP_SYS_RESOURCE` may go beyond its hard limit, which is 4096 where
    /// nobody has set it.
    pub(crate) fn of_process() -> Result<Arc<Self>, Errno> {
        let hard = getrlimit(Resource::Nofile).maximum;
        let limit = hard.map_or(WANTED, |hard| hard.max(WANTED));
        let raise = |limit: u64| {
            setrlimit(
                Resource::Nofile,
                Rlimit {
                    current: Some(limit),
                    maximum: Some(limit),
                },
            )
            .map(|()| limit)
        };
        let limit = match (raise(limit), hard) {
            (Err(Errno::PERM), Some(hard)) => raise(hard)?,
            (raised, _) => raised?,
        };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn fd() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn nodes_leave_room_for_files_and_closing_makes_room() {
        let budget = Descriptors::new(16);
        let nodes: Vec<_> = (0..14).map(|_| budget.count_node(fd()).unwrap()).collect();
        assert_eq!(budget.count_node(fd()).unwrap_err(), Errno::NFILE);
        let files: Vec<_> = (0..2).map(|_| budget.count(fd()).unwrap()).collect();
        assert_eq!(budget.count(fd()).unwrap_err(), Errno::NFILE);
        drop((nodes, files));
        budget.count_node(fd()).unwrap();
    }
}
