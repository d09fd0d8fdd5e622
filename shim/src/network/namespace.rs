//! Work inside a network namespace.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;

use crate::{deadline::timeout, privileges};

/// How long work in a namespace may take: it waits for nobody but the kernel, and there for whoever
/// else changes interfaces.
const DEADLINE: Duration = Duration::from_secs(30);

/// Name of the threads; the kernel keeps 15 bytes.
const THREAD: &str = "network";

/// Which namespace it is, whatever it is reached by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

/// An open network namespace. It exists for at least as long as this.
#[derive(Debug)]
pub struct Namespace {
    file: Arc<File>,
    id: NamespaceId,
}

impl Namespace {
    /// Opens the namespace at a path.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        Ok(Self {
            file: Arc::new(file),
            id: NamespaceId {
                device: metadata.dev(),
                inode: metadata.ino(),
            },
        })
    }

    /// Opens the namespace of a process.
    pub fn of(pid: u32) -> io::Result<Self> {
        let opening = thread::Builder::new().name(THREAD.into()).spawn(move || {
            // Of this thread alone.
            privileges::reach_processes()?;
            Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
        })?;
        joined(opening)
    }

    /// Which one it is.
    pub fn id(&self) -> NamespaceId {
        self.id
    }

    /// Its descriptor.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Does `work` in the namespace, on a thread of its own that ends with it. What sockets it opens
    /// stay in the namespace.
    pub fn enter<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let thread = self.spawn(|entered: io::Result<()>| entered.map(|()| work()))?;
        joined(thread)
    }

    /// Like [`Namespace::enter`], while the caller's thread goes on with something else.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let (sender, receiver) = oneshot::channel();
        self.spawn(|entered: io::Result<()>| {
            let result = entered.map(|()| work());
            // Whoever asked may have stopped waiting.
            let _ = sender.send(result);
        })?;
        match timeout(DEADLINE, receiver).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(panicked()),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce(io::Result<()>) -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        let file = self.file.clone();
        thread::Builder::new().name(THREAD.into()).spawn(move || {
            let entered = setns(&*file, CloneFlags::CLONE_NEWNET);
            work(entered.map_err(io::Error::from))
        })
    }
}

fn joined<T>(thread: JoinHandle<io::Result<T>>) -> io::Result<T> {
    thread.join().unwrap_or_else(|_| Err(panicked()))
}

fn panicked() -> io::Error {
    io::Error::other("a thread in the namespace panicked")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_thread_enters_and_the_caller_stays() {
        let own = Namespace::of(std::process::id()).unwrap().id();
        let other = thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            Namespace::open(Path::new("/proc/thread-self/ns/net")).unwrap()
        });
        let other = other.join().unwrap();
        assert_ne!(other.id(), own);
        let inside = || {
            let entered = Namespace::open(Path::new("/proc/thread-self/ns/net"));
            entered.unwrap().id()
        };
        assert_eq!(other.enter(inside).unwrap(), other.id());
        assert_eq!(other.run(inside).await.unwrap(), other.id());
        assert_eq!(inside(), own);
        // Not a namespace.
        let null = Namespace::open(Path::new("/dev/null")).unwrap();
        assert!(null.enter(|| ()).is_err());
    }
}
