//! A tap for each interface: what the guest's network device sends and receives.

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use super::netlink::{Netlink, Payload};

/// Makes taps.
pub const DEVICE: &str = "/dev/net/tun";

/// Their names begin with this; the index of the interface on the host follows.
const PREFIX: &str = "bh";

/// Kind of such an interface, in rtnetlink's words.
const KIND: &str = "tun";

/// Bytes of `struct virtio_net_hdr_v1`.
const HEADER: libc::c_int = 12;

/// `TUN_F_CSUM`, `TUN_F_TSO4` and `TUN_F_TSO6`: what a guest may leave to whoever gets its packets.
const OFFLOADS: libc::c_ulong = 1 | 2 | 4;

// linux/if_tun.h
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

// linux/if_link.h
const IFLA_MTU: u16 = 4;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// A tap. It is gone with its last descriptor.
#[derive(Debug)]
pub struct Tap {
    /// One for each queue pair.
    pub queues: Vec<OwnedFd>,
    /// On the host.
    pub index: u32,
}

/// The name of the tap beside the interface of this index.
pub fn name(index: u32) -> String {
    format!("{PREFIX}{index}")
}

/// Whether an interface is a tap of some pod.
pub fn is_ours(name: &str, kind: &str) -> bool {
    let number = name.strip_prefix(PREFIX);
    kind == KIND && number.is_some_and(|number| number.parse::<u32>().is_ok())
}

impl Tap {
    /// Makes the tap beside an interface, in the namespace of the calling thread: up, with the same
    /// MTU, and silent.
    pub fn create(netlink: &Netlink, beside: u32, mtu: u16, queue_pairs: u8) -> io::Result<Self> {
        let name = CString::new(name(beside))?;
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queue_pairs > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let queues = (0..queue_pairs)
            .map(|queue| {
                // The first one makes it.
                let exclusive = if queue == 0 { libc::IFF_TUN_EXCL } else { 0 };
                open_queue(&name, flags | exclusive)
            })
            .collect::<io::Result<Vec<_>>>()?;
        // SAFETY: the name ends with a NUL.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        silence(netlink, index)?;
        let up = libc::IFF_UP.unsigned_abs();
        let request = change(index, up).with(IFLA_MTU, &u32::from(mtu).to_ne_bytes());
        netlink.order(libc::RTM_SETLINK, 0, &request)?;
        Ok(Self { queues, index })
    }
}

/// Brings an interface up.
pub fn bring_up(netlink: &Netlink, index: u32) -> io::Result<()> {
    let request = change(index, libc::IFF_UP.unsigned_abs());
    netlink.order(libc::RTM_SETLINK, 0, &request)
}

/// Gives an interface another MTU.
pub fn set_mtu(netlink: &Netlink, index: u32, mtu: u16) -> io::Result<()> {
    let request = change(index, 0).with(IFLA_MTU, &u32::from(mtu).to_ne_bytes());
    netlink.order(libc::RTM_SETLINK, 0, &request)
}

/// `struct ifinfomsg` that sets flags.
fn change(index: u32, flags: u32) -> Payload {
    let mut fixed = vec![0; 4];
    for number in [index, flags, flags] {
        fixed.extend(number.to_ne_bytes());
    }
    Payload::new(&fixed)
}

/// Leaves the tap without a link-local address: the host says nothing on it.
fn silence(netlink: &Netlink, index: u32) -> io::Result<()> {
    let inet6 = Payload::default().with(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
    let family = u16::try_from(libc::AF_INET6).map_err(io::Error::other)?;
    let families = Payload::default().with_nested(family, inet6);
    let request = change(index, 0).with_nested(IFLA_AF_SPEC, families);
    match netlink.order(libc::RTM_SETLINK, 0, &request) {
        // A host without IPv6.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(()),
        result => result,
    }
}

fn open_queue(name: &CString, flags: libc::c_int) -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(DEVICE)?;
    // SAFETY: all zeroes are a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = u16::try_from(flags)
        .map_err(io::Error::other)?
        .cast_signed();
    // SAFETY: the kernel reads and writes one `struct ifreq`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
    let header = HEADER;
    // SAFETY: the kernel reads one int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const header) })?;
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, OFFLOADS) })?;
    Ok(File::into(file))
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taps_are_known_by_name_and_kind() {
        assert!(is_ours(&name(u32::MAX), "tun"));
        assert!(name(u32::MAX).len() < libc::IFNAMSIZ);
        assert!(!is_ours("bh7", "veth"));
        assert!(!is_ours("bhx", "tun"));
        assert!(!is_ours("tap0", "tun"));
    }
}
