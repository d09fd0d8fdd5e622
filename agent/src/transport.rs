//! Connections to the host, and byte streams over any descriptor.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bulkhead_agent_api::HOST_CID;
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Shutdown, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, connect,
        getsockopt, shutdown, socket, sockopt,
    },
};
use rustix::fd::AsRawFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

/// How long the host may take to accept a connection, in seconds. Linux gives it 2, in which a VMM on a
/// host that is short of CPU time may not have run at all; whoever dials has a deadline for the whole.
const CONNECT_TIMEOUT: libc::time_t = 30;

/// `SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD` of linux/vm_sockets.h.
const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;

/// How the host is reached.
#[derive(Debug)]
pub enum Transport {
    /// vsock, in a guest.
    Vsock,
    /// A Unix socket named after the port in this directory, without a VM.
    Unix(PathBuf),
}

impl Transport {
    /// Begins a connection to a port of the host. The socket is non-blocking and may still be
    /// connecting: [`connected`] waits for the end of that.
    pub fn dial(&self, port: u32) -> io::Result<OwnedFd> {
        match self {
            Self::Vsock => {
                let socket = new_socket(AddressFamily::Vsock)?;
                be_patient(&socket)?;
                begin(socket, &VsockAddr::new(HOST_CID, port))
            }
            Self::Unix(dir) => {
                let address = UnixAddr::new(&dir.join(port.to_string()))?;
                begin(new_socket(AddressFamily::Unix)?, &address)
            }
        }
    }
}

fn new_socket(family: AddressFamily) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(family, SockType::Stream, flags, None)
}

fn be_patient(socket: &OwnedFd) -> io::Result<()> {
    let limit = libc::timeval {
        tv_sec: CONNECT_TIMEOUT,
        tv_usec: 0,
    };
    // SAFETY: the kernel reads a structure of this length.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const limit).cast(),
            libc::socklen_t::try_from(size_of_val(&limit)).map_err(io::Error::other)?,
        )
    };
    Ok(Errno::result(set).map(drop)?)
}

fn begin(socket: OwnedFd, address: &dyn SockaddrLike) -> io::Result<OwnedFd> {
    match connect(socket.as_raw_fd(), address) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// Waits until a dialled socket is connected.
pub async fn connected(socket: OwnedFd) -> io::Result<Stream> {
    let stream = Stream::new(socket)?;
    let _ = stream.fd.writable().await?;
    match getsockopt(&stream.fd.get_ref(), sockopt::SocketError)? {
        0 => Ok(stream),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Registers a non-blocking descriptor with the runtime, inside of which this must be called.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor until it is dropped, and nothing here
    // puts another into its place by `get_mut`.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// A non-blocking descriptor (socket, pipe, terminal) as a byte stream.
#[derive(Debug)]
pub struct Stream {
    fd: AsyncFd<OwnedFd>,
}

impl Stream {
    /// Makes the descriptor non-blocking and watches it. Must be called inside the runtime.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        // A terminal's master gives no end-of-file by itself but EIO, which a read reports.
        let fd = watch(fd, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { fd })
    }

    /// Returns once the other end of a pipe that is written to here has been closed.
    pub async fn reader_gone(&self) -> io::Result<()> {
        self.fd.ready(Interest::ERROR).await.map(drop)
    }

    /// One read into `buffer`; 0 is the end.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.fd
            .async_io(Interest::READABLE, |fd| {
                rustix::io::read(fd, &mut *buffer).map_err(io::Error::from)
            })
            .await
    }

    /// Writes all of `bytes`.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self
                .fd
                .async_io(Interest::WRITABLE, |fd| {
                    rustix::io::write(fd, bytes).map_err(io::Error::from)
                })
                .await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Tells a socket's other end that nothing more will come.
    pub fn end(&self) -> io::Result<()> {
        Ok(shutdown(self.fd.as_raw_fd(), Shutdown::Write)?)
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(cx))?;
            let read = guard.try_io(|fd| {
                rustix::io::read(fd, buf.initialize_unfilled()).map_err(io::Error::from)
            });
            if let Ok(result) = read {
                buf.advance(result?);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(cx))?;
            let written = guard.try_io(|fd| rustix::io::write(fd, bytes).map_err(io::Error::from));
            if let Ok(result) = written {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.end())
    }
}
