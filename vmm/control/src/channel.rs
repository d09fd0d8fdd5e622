//! Packets of one message and its descriptors over a `SOCK_SEQPACKET` socket.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
        sendmsg, socketpair,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

/// The longest message, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// The most descriptors beside one message.
pub const MAX_FDS: usize = 8;

/// Failures of the control socket.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The pair of sockets could not be made.
    #[error("Cannot create the control socket")]
    Create(#[source] Errno),
    /// The packet could not be sent.
    #[error("Cannot send on the control socket")]
    Send(#[source] Errno),
    /// No packet could be received.
    #[error("Cannot receive from the control socket")]
    Receive(#[source] Errno),
    /// The message is longer than [`MAX_MESSAGE`].
    #[error("A control message of {0} bytes is longer than {MAX_MESSAGE}")]
    TooLong(usize),
    /// More than [`MAX_FDS`] descriptors, or more message than announced.
    #[error("A control packet was cut short")]
    Truncated,
    /// The bytes are no message of the protocol.
    #[error("Cannot decode a control message")]
    Decode(#[source] serde_json::Error),
    /// The message could not be written as JSON.
    #[error("Cannot encode a control message")]
    Encode(#[source] serde_json::Error),
}

/// One message and the descriptors that came with it.
#[derive(Debug)]
pub struct Packet<T> {
    /// The message.
    pub message: T,
    /// The descriptors, in the order they were sent, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// One end of a control socket. Sending and receiving take `&self`: packets are atomic.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Makes a connected pair, close-on-exec and blocking.
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(ChannelError::Create)?;
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// Sends one message and descriptors that stay the caller's.
    ///
    /// On a non-blocking socket with a full buffer this is [`ChannelError::Send`] with `EAGAIN`.
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message).map_err(ChannelError::Encode)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(ChannelError::TooLong(bytes.len()));
        }
        if fds.len() > MAX_FDS {
            return Err(ChannelError::Truncated);
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        loop {
            match sendmsg::<()>(
                self.socket.as_raw_fd(),
                &[IoSlice::new(&bytes)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(ChannelError::Send(errno)),
            }
        }
    }

    /// Receives one message, or `None` when the other end is closed.
    ///
    /// On a non-blocking socket with nothing to read this is [`ChannelError::Receive`] with
    /// `EAGAIN`. Whatever the sender does, no descriptor is leaked and memory stays bounded.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<Packet<T>>, ChannelError> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut control = cmsg_space!([RawFd; MAX_FDS]);
        let (length, fds, flags) = loop {
            let mut slices = [IoSliceMut::new(&mut buffer)];
            let message = match recvmsg::<()>(
                self.socket.as_raw_fd(),
                &mut slices,
                Some(&mut control),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Ok(message) => message,
                // The second comes once, when the other end closed before it had read everything,
                // and ahead of what it had sent.
                Err(Errno::EINTR | Errno::ECONNRESET) => continue,
                Err(errno) => return Err(ChannelError::Receive(errno)),
            };
            let mut fds = Vec::new();
            for item in message.cmsgs().map_err(ChannelError::Receive)? {
                if let ControlMessageOwned::ScmRights(raw) = item {
                    // SAFETY: the kernel has just installed these descriptors for this process,
                    // and nothing else knows their numbers.
                    fds.extend(
                        raw.into_iter()
                            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                    );
                }
            }
            break (message.bytes, fds, message.flags);
        };
        if length == 0 {
            return Ok(None);
        }
        if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Err(ChannelError::Truncated);
        }
        let message = serde_json::from_slice(&buffer[..length]).map_err(ChannelError::Decode)?;
        Ok(Some(Packet { message, fds }))
    }
}

impl From<OwnedFd> for Channel {
    /// Takes an end that was inherited or received.
    fn from(socket: OwnedFd) -> Self {
        Self { socket }
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write};

    use proptest::prelude::*;

    use super::*;
    use crate::{Event, FromVmm, Request};

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (shim, vmm) = Channel::pair().unwrap();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let sent = FromVmm::Event(Event::Connection { port: 7 });
        vmm.send(&sent, &[writer.as_fd()]).unwrap();
        drop(writer);
        let Packet { message, mut fds } = shim.receive::<FromVmm>().unwrap().unwrap();
        assert_eq!(message, sent);
        assert_eq!(fds.len(), 1);
        File::from(fds.remove(0)).write_all(b"x").unwrap();
        let mut byte = [0];
        assert_eq!(nix::unistd::read(&reader, &mut byte), Ok(1));
    }

    #[test]
    fn the_other_ends_close_is_no_error() {
        let (shim, vmm) = Channel::pair().unwrap();
        let counters = Request::Counters;
        shim.send(&counters, &[]).unwrap();
        drop(vmm);
        assert!(shim.receive::<FromVmm>().unwrap().is_none());
        assert!(shim.receive::<FromVmm>().unwrap().is_none());
    }

    #[test]
    fn last_words_arrive_though_the_other_end_did_not_listen() {
        let (shim, vmm) = Channel::pair().unwrap();
        shim.send(&Request::Counters, &[]).unwrap();
        let last = FromVmm::Event(Event::Connection { port: 7 });
        vmm.send(&last, &[]).unwrap();
        drop(vmm);
        let packet = shim.receive::<FromVmm>().unwrap().unwrap();
        assert_eq!(packet.message, last);
        assert!(shim.receive::<FromVmm>().unwrap().is_none());
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_by_its_sender() {
        let (shim, _vmm) = Channel::pair().unwrap();
        let name = "x".repeat(MAX_MESSAGE);
        assert!(matches!(
            shim.send(&Request::Unshare { name }, &[]),
            Err(ChannelError::TooLong(_))
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 1..200)) {
            let (shim, vmm) = Channel::pair().unwrap();
            nix::unistd::write(&vmm, &bytes).unwrap();
            if let Err(error) = shim.receive::<FromVmm>() {
                prop_assert!(matches!(error, ChannelError::Decode(_)));
            }
        }
    }
}
