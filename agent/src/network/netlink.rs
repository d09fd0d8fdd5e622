//! rtnetlink(7): messages whose attributes may be changed without knowing them all, and a socket.

use std::{cell::Cell, fmt, io, time::Duration};

use netlink_packet_core::{
    NLA_F_NESTED, NLA_F_NET_BYTEORDER, NLA_TYPE_MASK, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::{
    socket::{setsockopt, sockopt},
    time::TimeVal,
};
use thiserror::Error;

/// Bytes of a `struct nlmsghdr`.
const HEADER_LEN: usize = 16;

/// Bytes of a `struct ifinfomsg`.
const IFINFO_LEN: usize = 16;

/// The kernel's explanation in an error message: include/uapi/linux/netlink.h.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// `IFLA_INET6_ADDR_GEN_MODE`, include/uapi/linux/if_link.h.
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;

/// For the kernel to answer, which it does while the request is sent.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// An attribute of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    /// Its type, with the flags of netlink in it.
    pub kind: u16,
    /// Without padding.
    pub value: Vec<u8>,
}

impl Attribute {
    /// An attribute of one kind.
    pub fn new(kind: u16, value: impl Into<Vec<u8>>) -> Self {
        let value = value.into();
        Self { kind, value }
    }

    /// One with attributes in it.
    pub fn nest(kind: u16, attributes: &[Self]) -> Self {
        Self::new(kind, emit(attributes))
    }

    /// Whether it is of this type, whatever flags stand beside that.
    pub fn is(&self, kind: u16) -> bool {
        self.kind & NLA_TYPE_MASK == kind
    }

    /// Its value as a number of the host's byte order.
    pub fn number(&self) -> Option<u32> {
        Some(u32::from_ne_bytes(self.value.as_slice().try_into().ok()?))
    }
}

/// The attributes of which `bytes` is made.
pub fn attributes(bytes: &[u8]) -> Result<Vec<Attribute>, Malformed> {
    let all = NlasIterator::new(bytes).map(|attribute| {
        let attribute = attribute.map_err(|_| Malformed)?;
        let mut kind = attribute.kind();
        if attribute.nested_flag() {
            kind |= NLA_F_NESTED;
        }
        if attribute.network_byte_order_flag() {
            kind |= NLA_F_NET_BYTEORDER;
        }
        Ok(Attribute::new(kind, attribute.value()))
    });
    all.collect()
}

/// The reverse of [`attributes`].
pub fn emit(attributes: &[Attribute]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for attribute in attributes {
        let length = u16::try_from(attribute.value.len() + 4).unwrap_or(u16::MAX);
        bytes.extend(length.to_ne_bytes());
        bytes.extend(attribute.kind.to_ne_bytes());
        bytes.extend(&attribute.value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Bytes that are not what their kind of message is made of.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("malformed rtnetlink message")]
pub struct Malformed;

/// What follows the `nlmsghdr`: a fixed header, and attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// As long as its kind of message has it.
    pub header: Vec<u8>,
    /// In the order in which they are sent.
    pub attributes: Vec<Attribute>,
}

impl Message {
    /// Takes a message apart whose fixed header has so many bytes.
    pub fn parse(bytes: &[u8], header_len: usize) -> Result<Self, Malformed> {
        let (header, rest) = bytes.split_at_checked(header_len).ok_or(Malformed)?;
        Ok(Self {
            header: header.to_vec(),
            attributes: attributes(rest)?,
        })
    }

    /// Puts it together.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header.clone();
        bytes.extend(emit(&self.attributes));
        bytes
    }

    /// An attribute, by its type.
    pub fn get(&self, kind: u16) -> Option<&Attribute> {
        let mut all = self.attributes.iter();
        all.find(|attribute| attribute.is(kind))
    }

    /// Sets an attribute in its place, or behind the others.
    pub fn set(&mut self, kind: u16, value: &[u8]) {
        let mut all = self.attributes.iter_mut();
        match all.find(|attribute| attribute.is(kind)) {
            Some(attribute) => attribute.value = value.to_vec(),
            None => self.attributes.push(Attribute::new(kind, value)),
        }
    }
}

/// The kernel's refusal of a request.
#[derive(Debug)]
pub struct Refusal {
    error: io::Error,
    /// What it says beside the error's number.
    reason: Option<String>,
}

impl Refusal {
    /// Its number, errno(3).
    pub fn errno(&self) -> Option<i32> {
        self.error.raw_os_error()
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            Some(reason) => write!(f, "{}: {reason}", self.error),
            None => self.error.fmt(f),
        }
    }
}

impl std::error::Error for Refusal {}

impl<E: Into<io::Error>> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self {
            error: error.into(),
            reason: None,
        }
    }
}

/// A network interface as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is up.
    pub up: bool,
    /// Its hardware address.
    pub address: Vec<u8>,
}

/// A way of the kernel to the link-local address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLocal {
    /// From the hardware address.
    Eui64 = 0,
    /// None.
    None = 1,
}

/// A socket in the network namespace in which it was opened.
pub struct Rtnetlink {
    socket: Socket,
    sequence: Cell<u32>,
}

impl Rtnetlink {
    /// Opens one in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_ext_ack(true)?;
        let seconds = ANSWER_DEADLINE.as_secs().try_into().unwrap_or(i64::MAX);
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(seconds, 0))?;
        Ok(Self {
            socket,
            sequence: Cell::new(0),
        })
    }

    /// Makes a request and returns the messages of the answer.
    pub fn request(&self, kind: u16, flags: u16, payload: &[u8]) -> Result<Vec<Vec<u8>>, Refusal> {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        let mut bytes = vec![0; HEADER_LEN];
        bytes.extend(payload);
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut buffer = NetlinkBuffer::new(&mut bytes);
        buffer.set_length(length);
        buffer.set_message_type(kind);
        buffer.set_flags(flags | NLM_F_REQUEST | NLM_F_ACK);
        buffer.set_sequence_number(sequence);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message = NetlinkBuffer::new_checked(rest);
                let message = message.map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
                let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
                let next = length.next_multiple_of(4).min(rest.len());
                let body = &rest[HEADER_LEN..length];
                let is_ours = message.sequence_number() == sequence;
                match message.message_type() {
                    NLMSG_ERROR | NLMSG_DONE if is_ours => {
                        answered(body, message.flags())?;
                        return Ok(answers);
                    }
                    _ if is_ours => answers.push(body.to_vec()),
                    _ => {}
                }
                rest = &rest[next..];
            }
        }
    }

    /// An interface by its index, if it exists.
    pub fn link(&self, index: u32) -> Result<Option<Link>, Refusal> {
        self.find(ifinfo(index, 0, 0))
    }

    /// An interface by its name, if it exists.
    pub fn link_named(&self, name: &str) -> Result<Option<Link>, Refusal> {
        let mut payload = ifinfo(0, 0, 0);
        payload.extend(emit(&[text(libc::IFLA_IFNAME, name)]));
        self.find(payload)
    }

    fn find(&self, payload: Vec<u8>) -> Result<Option<Link>, Refusal> {
        let answers = match self.request(libc::RTM_GETLINK, 0, &payload) {
            Err(refusal) if refusal.errno() == Some(libc::ENODEV) => return Ok(None),
            answers => answers?,
        };
        let Some(answer) = answers.first() else {
            return Ok(None);
        };
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidData);
        let message = Message::parse(answer, IFINFO_LEN).map_err(invalid)?;
        let number = |at: usize| {
            let bytes = message.header[at..at + 4].try_into();
            bytes.map_or(0, u32::from_ne_bytes)
        };
        let name = message.get(libc::IFLA_IFNAME);
        let name = name.map_or(&[][..], |attribute| &attribute.value);
        let name = name.strip_suffix(&[0]).unwrap_or(name);
        let address = message.get(libc::IFLA_ADDRESS);
        Ok(Some(Link {
            index: number(4),
            name: String::from_utf8_lossy(name).into_owned(),
            up: number(8) & libc::IFF_UP.unsigned_abs() != 0,
            address: address.map_or_else(Vec::new, |attribute| attribute.value.clone()),
        }))
    }

    /// Moves an interface to another network namespace, under a name.
    pub fn move_link(&self, index: u32, namespace: i32, name: &str) -> Result<(), Refusal> {
        let namespace = Attribute::new(libc::IFLA_NET_NS_FD, namespace.to_ne_bytes());
        self.change(index, &[namespace, text(libc::IFLA_IFNAME, name)])
    }

    /// Gives an interface another name.
    pub fn rename(&self, index: u32, name: &str) -> Result<(), Refusal> {
        self.change(index, &[text(libc::IFLA_IFNAME, name)])
    }

    /// Sets the longest packet of an interface, in bytes.
    pub fn set_mtu(&self, index: u32, mtu: u32) -> Result<(), Refusal> {
        self.change(index, &[Attribute::new(libc::IFLA_MTU, mtu.to_ne_bytes())])
    }

    /// Brings an interface up, or takes it down.
    pub fn set_up(&self, index: u32, up: bool) -> Result<(), Refusal> {
        let flag = libc::IFF_UP.unsigned_abs();
        let payload = ifinfo(index, if up { flag } else { 0 }, flag);
        self.request(libc::RTM_NEWLINK, 0, &payload).map(drop)
    }

    /// Says how the kernel comes to a link-local address the next time that it makes one.
    pub fn set_link_local(&self, index: u32, way: LinkLocal) -> Result<(), Refusal> {
        let way = Attribute::new(IFLA_INET6_ADDR_GEN_MODE, [way as u8]);
        let family = u16::try_from(libc::AF_INET6).unwrap_or_default();
        let family = Attribute::nest(family, &[way]);
        let result = self.change(index, &[Attribute::nest(libc::IFLA_AF_SPEC, &[family])]);
        match result {
            // There is no IPv6 on it: so small an MTU, or none in the kernel.
            Err(refusal) if refusal.errno() == Some(libc::EAFNOSUPPORT) => Ok(()),
            result => result,
        }
    }

    fn change(&self, index: u32, attributes: &[Attribute]) -> Result<(), Refusal> {
        let mut payload = ifinfo(index, 0, 0);
        payload.extend(emit(attributes));
        self.request(libc::RTM_NEWLINK, 0, &payload).map(drop)
    }
}

/// A `struct ifinfomsg`.
fn ifinfo(index: u32, flags: u32, change: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    for number in [index, flags, change] {
        bytes.extend(number.to_ne_bytes());
    }
    bytes
}

fn text(kind: u16, text: &str) -> Attribute {
    let mut value = text.as_bytes().to_vec();
    value.push(0);
    Attribute::new(kind, value)
}

/// The result in the body of an `NLMSG_ERROR` or `NLMSG_DONE`.
fn answered(body: &[u8], flags: u16) -> Result<(), Refusal> {
    let (number, rest) = match body.split_first_chunk() {
        Some((number, rest)) => (i32::from_ne_bytes(*number), rest),
        None => (0, &[][..]),
    };
    if number == 0 {
        return Ok(());
    }
    // The request comes back first, whole: the option to leave its payload out is not set.
    let request = rest.first_chunk().map(|length| u32::from_ne_bytes(*length));
    let request = usize::try_from(request.unwrap_or(0)).unwrap_or(usize::MAX);
    let told = (flags & NLM_F_ACK_TLVS != 0).then(|| rest.get(request.next_multiple_of(4)..));
    let told = attributes(told.flatten().unwrap_or_default()).unwrap_or_default();
    let told = told.iter().find(|one| one.is(NLMSGERR_ATTR_MSG));
    let reason = told.map(|one| {
        let text = String::from_utf8_lossy(&one.value);
        text.trim_end_matches('\0').to_owned()
    });
    Err(Refusal {
        error: io::Error::from_raw_os_error(number.wrapping_neg()),
        reason,
    })
}
