//! rtnetlink(7), as bytes: what a namespace has goes to the guest as the kernel tells it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;

/// More than any message of the kernel takes (`NLMSG_GOODSIZE` for dumps, 32 KiB).
const BUFFER: usize = 64 << 10;

/// How often a dump is begun again because something changed meanwhile.
const MAX_DUMPS: usize = 5;

// linux/netlink.h
const ERROR: u16 = 2;
const DONE: u16 = 3;
const DUMP: u16 = 0x301; // NLM_F_REQUEST | NLM_F_DUMP
const ORDER: u16 = 0x5; // NLM_F_REQUEST | NLM_F_ACK
const INTERRUPTED: u16 = 0x10; // NLM_F_DUMP_INTR
const NESTED: u16 = 0x8000; // NLA_F_NESTED

/// For what must not be there yet: `NLM_F_CREATE | NLM_F_EXCL`.
pub const CREATE: u16 = 0x600;

/// Tells of links, addresses, routes, rules and neighbours: bits of `nl_groups`, which are those of
/// `RTNLGRP_*` less one.
const GROUPS: u32 = 1 // LINK
    | 1 << 2 // NEIGH
    | 1 << 4 // IPV4_IFADDR
    | 1 << 6 // IPV4_ROUTE
    | 1 << 7 // IPV4_RULE
    | 1 << 8 // IPV6_IFADDR
    | 1 << 10 // IPV6_ROUTE
    | 1 << 18; // IPV6_RULE

/// A message without its `nlmsghdr`: a fixed part, and attributes.
#[derive(Debug, Clone, Default)]
pub struct Payload(Vec<u8>);

impl Payload {
    /// Begins with the fixed part, whose size is a multiple of four.
    pub fn new(fixed: &[u8]) -> Self {
        Self(fixed.to_vec())
    }

    /// Adds an attribute.
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds an attribute that is made of others.
    pub fn with_nested(self, kind: u16, inner: Self) -> Self {
        self.with(kind | NESTED, &inner.0)
    }

    /// Adds a text with its NUL.
    pub fn with_text(self, kind: u16, text: &str) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.with(kind, &bytes)
    }
}

/// The attributes in `bytes`: type and value. It ends where something is no attribute.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(number16(bytes, 0)?);
        let kind = number16(bytes, 2)? & !NESTED;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the attribute of this type.
pub fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|(kind, _)| *kind == wanted)
        .map(|(_, value)| value)
}

/// A number in the host's order.
pub fn number16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// A number in the host's order.
pub fn number32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A text that may have a NUL at its end.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}

/// A socket for requests, in the namespace of the thread that opened it.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

impl Netlink {
    /// Opens one.
    pub fn open() -> io::Result<Self> {
        Ok(Self(bound(0, SockFlag::SOCK_CLOEXEC)?))
    }

    /// Asks for all of a kind. Returns the payloads of the answers.
    pub fn dump(&self, kind: u16, request: &Payload) -> io::Result<Vec<Vec<u8>>> {
        let mut answers = Vec::new();
        for _ in 0..MAX_DUMPS {
            answers.clear();
            self.send(kind, DUMP, request)?;
            if self.collect(&mut answers)? {
                break;
            }
        }
        // Whatever goes on changing is told of by events, too.
        Ok(answers)
    }

    /// Has the kernel change something.
    pub fn order(&self, kind: u16, flags: u16, request: &Payload) -> io::Result<()> {
        self.send(kind, ORDER | flags, request)?;
        self.collect(&mut Vec::new()).map(drop)
    }

    fn send(&self, kind: u16, flags: u16, request: &Payload) -> io::Result<()> {
        let length = u32::try_from(HEADER + request.0.len()).map_err(io::Error::other)?;
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        // Sequence number and port: there is one request at a time.
        message.extend([0; 8]);
        message.extend(&request.0);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(())
    }

    /// Reads the answers to a request. Returns whether they are all of one time.
    fn collect(&self, answers: &mut Vec<Vec<u8>>) -> io::Result<bool> {
        let mut buffer = vec![0; BUFFER];
        let mut consistent = true;
        loop {
            let received = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for (kind, flags, payload) in messages(&buffer[..received]) {
                consistent &= flags & INTERRUPTED == 0;
                match kind {
                    DONE | ERROR => {
                        let code = number32(payload, 0).map_or(0, u32::cast_signed);
                        return match code {
                            0 => Ok(consistent),
                            _ => Err(io::Error::from_raw_os_error(-code)),
                        };
                    }
                    _ => answers.push(payload.to_vec()),
                }
            }
        }
    }
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(number32(bytes, 0)?).ok()?;
        let (kind, flags) = (number16(bytes, 4)?, number16(bytes, 6)?);
        let payload = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, flags, payload))
    })
}

fn bound(groups: u32, flags: SockFlag) -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        flags,
        SockProtocol::NetlinkRoute,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}

/// Becomes readable when something of a namespace changes. What has changed is not told: whoever is
/// told looks at everything.
#[derive(Debug)]
pub struct Monitor(OwnedFd);

impl Monitor {
    /// Listens in the namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        Ok(Self(bound(GROUPS, flags)?))
    }

    /// Takes all events that are there.
    pub fn drain(&self) -> io::Result<()> {
        let mut buffer = [0; 8192];
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                // Some were lost, as this one is.
                Ok(_) | Err(nix::errno::Errno::ENOBUFS | nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let inner = Payload::new(&[]).with_text(1, "tun").with(2, &[5]);
        let payload = Payload::new(&[9; 4])
            .with(3, &[1, 2, 3])
            .with_nested(7, inner);
        let read = &payload.0[4..];
        assert_eq!(attribute(read, 3), Some(&[1, 2, 3][..]));
        let nested = attribute(read, 7).unwrap();
        assert_eq!(text(attribute(nested, 1).unwrap()), "tun");
        assert_eq!(attribute(nested, 2), Some(&[5][..]));
        assert_eq!(attribute(read, 8), None);
    }

    #[test]
    fn the_kernel_answers() {
        let netlink = Netlink::open().unwrap();
        let links = netlink
            .dump(libc::RTM_GETLINK, &Payload::new(&[0; 16]))
            .unwrap();
        assert!(
            links
                .iter()
                .any(|link| attribute(&link[16..], 3) == Some(b"lo\0"))
        );
        let error = netlink
            .order(libc::RTM_DELLINK, 0, &Payload::new(&[0; 16]))
            .unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error}");
    }

    proptest! {
        #[test]
        fn nothing_is_read_beyond_the_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let all: usize = attributes(&bytes).map(|(_, value)| value.len() + 4).sum();
            prop_assert!(all <= bytes.len());
            let all: usize = messages(&bytes).map(|(_, _, payload)| payload.len() + HEADER).sum();
            prop_assert!(all <= bytes.len());
        }
    }
}
