//! Non-blocking files as async byte streams: the virtio-serial port, pipes, terminals.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::Context as _;

/// A file that can be waited for.
pub struct FileStream(AsyncFd<File>);

impl FileStream {
    /// Takes over a descriptor and makes it non-blocking.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        // SAFETY: the file owns its descriptor, always gives the same one, and only closes it when
        // it is dropped, which it is after its registration, for nothing takes it out.
        let file = unsafe { AsyncFd::register(File::from(descriptor)) }?;
        Ok(FileStream(file))
    }

    /// How many bytes can be read at once.
    pub fn readable(&self) -> io::Result<u64> {
        Ok(rustix::io::ioctl_fionread(self.0.get_ref())?)
    }
}

impl AsFd for FileStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// Waits for the port to the build machine, which the driver makes some time after boot, and opens
/// it.
pub fn open_port() -> crate::Result<FileStream> {
    let path = appeared("/dev", "vport")?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .context(|| format!("open {}", path.display()))?;
    FileStream::new(file.into()).context(|| format!("watch {}", path.display()))
}

/// The file in `directory` whose name starts with `prefix`, once there is one.
fn appeared(directory: &str, prefix: &str) -> crate::Result<PathBuf> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).context(|| "use inotify".into())?;
    inotify
        .add_watch(directory, AddWatchFlags::IN_CREATE)
        .context(|| format!("watch {directory}"))?;
    loop {
        for entry in std::fs::read_dir(directory).context(|| format!("list {directory}"))? {
            let entry = entry.context(|| format!("list {directory}"))?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                return Ok(entry.path());
            }
        }
        inotify
            .read_events()
            .context(|| format!("watch {directory}"))?;
    }
}

impl AsyncRead for FileStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let unfilled = buffer.initialize_unfilled();
            if let Ok(count) = guard.try_io(|fd| fd.get_ref().read(unfilled)) {
                buffer.advance(count?);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for FileStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(result) = guard.try_io(|fd| fd.get_ref().write(data)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
