//! A queue of a tap (Linux, Documentation/networking/tuntap.rst), or whatever takes and gives whole
//! packets.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use crate::memory::VolatileSlice;

/// What became of a packet for the tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// The tap has it, or does not want it: there is nothing more to do.
    Done,
    /// It has no room now.
    Full,
}

/// One queue, which does not block.
#[derive(Debug)]
pub struct Tap(OwnedFd);

impl Tap {
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Takes the descriptor back.
    pub fn close(self) -> OwnedFd {
        self.0
    }

    /// Sends a packet. `pieces` is room for its buffers.
    pub fn send(&self, packet: &[VolatileSlice<'_>], pieces: &mut Vec<libc::iovec>) -> Sent {
        pieces.clear();
        pieces.extend(packet.iter().map(piece));
        let count = i32::try_from(pieces.len()).unwrap_or(i32::MAX);
        // SAFETY: the pieces are slices of the guest's memory, which is mapped for as long as they are
        // borrowed. The guest may change them meanwhile; nothing here relies on what is in them.
        let sent = unsafe { libc::writev(self.0.as_raw_fd(), pieces.as_ptr(), count) };
        if sent == -1 && io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock {
            return Sent::Full;
        }
        // A tap takes a packet whole. One that it refuses is lost, as on a wire: its header may be
        // nonsense, or the interface down.
        Sent::Done
    }

    /// Receives a packet into `pieces` and returns its length, or nothing if there is none.
    ///
    /// # Safety
    ///
    /// The pieces are memory of the guest's that is mapped.
    pub unsafe fn receive(&self, pieces: &[libc::iovec]) -> Option<usize> {
        let count = i32::try_from(pieces.len()).unwrap_or(i32::MAX);
        // SAFETY: the caller says that the pieces are there. The guest may look at them and change them
        // meanwhile.
        let received = unsafe { libc::readv(self.0.as_raw_fd(), pieces.as_ptr(), count) };
        usize::try_from(received).ok().filter(|length| *length > 0)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A piece of guest memory as the kernel takes it.
pub fn piece(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}
