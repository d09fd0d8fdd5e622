//! Work inside another network namespace.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    thread,
};

use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;

/// `PIDFD_GET_NET_NAMESPACE`, include/uapi/linux/pidfd.h.
const PIDFD_GET_NET_NAMESPACE: libc::Ioctl = 0xff04;

/// The network namespace of a process.
pub fn namespace_of(pidfd: &OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument and returns a new descriptor.
    let namespace = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_NET_NAMESPACE, 0) };
    if namespace < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel returned a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(namespace) })
}

/// Device and inode of a namespace's file: which one it is, for as long as it exists.
pub type Identity = (u64, u64);

/// Which namespace it is.
pub fn identity(namespace: &OwnedFd) -> io::Result<Identity> {
    let stat = rustix::fs::fstat(namespace)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Does something on a thread that is in a network namespace and ends afterwards: no other work
/// ever finds itself there. Sockets that are made stay in the namespace.
pub async fn inside<T: Send + 'static>(
    namespace: OwnedFd,
    work: impl FnOnce(&OwnedFd) -> T + Send + 'static,
) -> io::Result<T> {
    let (sender, receiver) = oneshot::channel();
    thread::Builder::new()
        .name("network".to_owned())
        .spawn(move || {
            let entered = setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET);
            let result = entered.map(|()| work(&namespace));
            // Whoever waited may have gone.
            let _ = sender.send(result.map_err(io::Error::from));
        })?;
    let gone = |_| Err(io::Error::other("the thread in the namespace ended early"));
    receiver.await.unwrap_or_else(gone)
}
