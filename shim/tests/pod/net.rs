//! Namespaces with interfaces, as others set them up, and frames that pass through these.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    process, thread,
};

use bulkhead_shim::network::{
    namespace::Namespace,
    netlink::{CREATE, Netlink, Payload, attribute, number32, text},
};
use nix::sys::{
    socket::{
        self as sys, AddressFamily, LinkAddr, SockFlag, SockType, SockaddrLike,
        sockopt::ReceiveTimeout,
    },
    time::TimeVal,
};

use crate::fake_vmm::ECHO;

pub const UP: u32 = libc::IFF_UP.unsigned_abs();

// linux/if_link.h, linux/veth.h, linux/if_addr.h, linux/rtnetlink.h
pub const IFLA_ADDRESS: u16 = 1;
pub const IFLA_IFNAME: u16 = 3;
pub const IFLA_MTU: u16 = 4;
pub const IFLA_LINK: u16 = 5;
pub const IFLA_LINKINFO: u16 = 18;
pub const IFLA_NET_NS_FD: u16 = 28;
pub const IFLA_INFO_KIND: u16 = 1;
pub const IFLA_INFO_DATA: u16 = 2;
pub const VETH_INFO_PEER: u16 = 1;
pub const IFA_LOCAL: u16 = 2;
pub const RTA_OIF: u16 = 4;
pub const RTA_GATEWAY: u16 = 5;
pub const NDA_DST: u16 = 1;
pub const NDA_LLADDR: u16 = 2;

/// Addresses of the interfaces inside.
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// A namespace for containers, and one for the network beyond it.
pub struct Net {
    pub inside: Namespace,
    pub outside: Namespace,
}

pub fn new_namespace() -> Namespace {
    let made = thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        Namespace::open(Path::new("/proc/thread-self/ns/net")).unwrap()
    });
    made.join().unwrap()
}

/// `struct ifinfomsg`
pub fn link(index: u32, flags: u32) -> Payload {
    let mut fixed = vec![0; 4];
    for number in [index, flags, flags] {
        fixed.extend(number.to_ne_bytes());
    }
    Payload::new(&fixed)
}

pub fn order(namespace: &Namespace, kind: u16, flags: u16, request: Payload) {
    let ordered = namespace.enter(move || Netlink::open().unwrap().order(kind, flags, &request));
    ordered.unwrap().unwrap();
}

/// Names and indices of what is there.
pub fn links(namespace: &Namespace) -> Vec<(String, u32)> {
    let dump = || {
        let netlink = Netlink::open().unwrap();
        netlink
            .dump(libc::RTM_GETLINK, &Payload::new(&[0; 16]))
            .unwrap()
    };
    let links = namespace.enter(dump).unwrap();
    links
        .iter()
        .map(|link| {
            let name = text(attribute(&link[16..], IFLA_IFNAME).unwrap());
            (name, number32(link, 4).unwrap())
        })
        .collect()
}

pub fn index(namespace: &Namespace, name: &str) -> u32 {
    let links = links(namespace);
    let found = links.iter().find(|(found, _)| found == name);
    found
        .unwrap_or_else(|| panic!("{name} is not among {links:?}"))
        .1
}

impl Net {
    pub fn new() -> Self {
        Self {
            inside: new_namespace(),
            outside: new_namespace(),
        }
    }

    /// With eth0 inside.
    pub fn with_interface() -> Self {
        let net = Self::new();
        net.add_veth(&net.inside, "eth0", 1500);
        net
    }

    /// As a specification names it.
    pub fn path(&self) -> String {
        format!(
            "/proc/{}/fd/{}",
            process::id(),
            self.inside.file().as_raw_fd()
        )
    }

    /// Adds a veth pair; the end outside has a `p` before its name.
    pub fn add_veth(&self, inside: &Namespace, name: &str, mtu: u32) {
        let namespace = inside.file().as_raw_fd().to_ne_bytes();
        let peer = link(0, 0)
            .with_text(IFLA_IFNAME, name)
            .with(IFLA_ADDRESS, &MAC)
            .with(IFLA_MTU, &mtu.to_ne_bytes())
            .with(IFLA_NET_NS_FD, &namespace);
        let data = Payload::default().with_nested(VETH_INFO_PEER, peer);
        let info = Payload::default()
            .with_text(IFLA_INFO_KIND, "veth")
            .with_nested(IFLA_INFO_DATA, data);
        let request = link(0, UP)
            .with_text(IFLA_IFNAME, &format!("p{name}"))
            .with(IFLA_MTU, &mtu.to_ne_bytes())
            .with_nested(IFLA_LINKINFO, info);
        order(&self.outside, libc::RTM_NEWLINK, CREATE, request);
        // Not before the other end is there.
        let up = link(index(inside, name), UP);
        order(inside, libc::RTM_SETLINK, 0, up);
    }

    pub fn add_macvlan(&self, on: &str, name: &str) {
        let info = Payload::default().with_text(IFLA_INFO_KIND, "macvlan");
        let request = link(0, UP)
            .with_text(IFLA_IFNAME, name)
            .with(IFLA_LINK, &index(&self.inside, on).to_ne_bytes())
            .with_nested(IFLA_LINKINFO, info);
        order(&self.inside, libc::RTM_NEWLINK, CREATE, request);
    }

    pub fn remove(&self, name: &str) {
        let index = index(&self.inside, name);
        order(&self.inside, libc::RTM_DELLINK, 0, link(index, 0));
    }

    /// 10.9.0.1/24 is outside, 10.9.0.2/24 inside, with a default route and a neighbour.
    pub fn configure(&self, inside: &Namespace, name: &str) {
        for (namespace, name, last) in [
            (&self.outside, format!("p{name}"), 1),
            (inside, name.to_owned(), 2),
        ] {
            let mut fixed = vec![2, 24, 0, 0];
            fixed.extend(index(namespace, &name).to_ne_bytes());
            let request = Payload::new(&fixed).with(IFA_LOCAL, &[10, 9, 0, last]);
            order(namespace, libc::RTM_NEWADDR, CREATE, request);
        }
        let index = index(inside, name).to_ne_bytes();
        // Table main, configured at boot, everywhere, unicast.
        let request = Payload::new(&[2, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0])
            .with(RTA_GATEWAY, &[10, 9, 0, 1])
            .with(RTA_OIF, &index);
        order(inside, libc::RTM_NEWROUTE, CREATE, request);
        let mut fixed = vec![2, 0, 0, 0];
        fixed.extend(index);
        fixed.extend([0x80, 0, 0, 0]);
        let request = Payload::new(&fixed)
            .with(NDA_DST, &[10, 9, 0, 77])
            .with(NDA_LLADDR, &[2, 0, 0, 0, 0, 77]);
        order(inside, libc::RTM_NEWNEIGH, CREATE, request);
    }

    /// The names of interfaces with an ingress queue.
    pub fn queues(&self) -> Vec<String> {
        let dump = || {
            let netlink = Netlink::open().unwrap();
            netlink
                .dump(libc::RTM_GETQDISC, &Payload::new(&[0; 20]))
                .unwrap()
        };
        let queues = self.inside.enter(dump).unwrap();
        let links = links(&self.inside);
        queues
            .iter()
            .filter(|queue| number32(queue, 12) == Some(0xffff_fff1))
            .map(|queue| {
                let index = number32(queue, 4).unwrap();
                let link = links.iter().find(|(_, found)| *found == index);
                link.unwrap().0.clone()
            })
            .collect()
    }

    /// Panics if anything of a pod is left.
    pub fn assert_nothing_left(&self) {
        assert_eq!(self.queues(), Vec::<String>::new());
        let links = links(&self.inside);
        let left = links.iter().any(|(name, _)| name.starts_with("bh"));
        assert!(!left, "{links:?}");
    }

    /// Sends a frame from outside; returns the next one that comes.
    pub fn exchange(&self, name: &str, frames: Vec<Vec<u8>>) -> Vec<u8> {
        let index = index(&self.outside, &format!("p{name}"));
        let exchange = move || {
            let socket = packet_socket(index);
            for frame in frames {
                sys::send(socket.as_raw_fd(), &frame, sys::MsgFlags::empty()).unwrap();
            }
            loop {
                let mut frame = vec![0; 4096];
                let length = sys::recv(socket.as_raw_fd(), &mut frame, sys::MsgFlags::empty());
                frame.truncate(length.expect("nothing came back"));
                // The kernel's own (neighbour discovery, multicast) are not meant.
                if frame[..6] == OUTSIDE {
                    return frame;
                }
            }
        };
        self.outside.enter(exchange).unwrap()
    }
}

/// Where frames of the tests come from.
pub const OUTSIDE: [u8; 6] = [2, 0, 0, 0, 0, 9];

pub fn packet_socket(index: u32) -> OwnedFd {
    let all = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    let socket = sys::socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        None,
    );
    let socket = socket.unwrap();
    let limit = TimeVal::new(10, 0);
    sys::setsockopt(&socket, ReceiveTimeout, &limit).unwrap();
    // SAFETY: all zeroes are an address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = all;
    address.sll_ifindex = index.cast_signed();
    let length = u32::try_from(size_of_val(&address)).unwrap();
    // SAFETY: it is a whole `sockaddr_ll`.
    let address = unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(length)) };
    sys::bind(socket.as_raw_fd(), &address.unwrap()).unwrap();
    socket
}

pub fn frame(kind: [u8; 2], payload: &[u8]) -> Vec<u8> {
    [&MAC, &OUTSIDE, &kind[..], payload].concat()
}

/// Asks who has 10.9.0.2.
pub fn arp_request() -> Vec<u8> {
    let mut payload = vec![0, 1, 8, 0, 6, 4, 0, 1];
    payload.extend(OUTSIDE);
    payload.extend([10, 9, 0, 9, 0, 0, 0, 0, 0, 0, 10, 9, 0, 2]);
    frame([8, 6], &payload)
}

/// Panics unless the interface leads to the guest, and to nobody else.
pub fn assert_guest_answers(net: &Net, name: &str) {
    let sent = frame(ECHO, format!("hello, {name}").as_bytes());
    let back = net.exchange(name, vec![arp_request(), sent.clone()]);
    assert_eq!(back[6..12], MAC);
    assert_eq!(back[12..], sent[12..]);
}
