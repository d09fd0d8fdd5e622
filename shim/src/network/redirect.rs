//! Packets between an interface and the tap beside it.
//!
//! Both have an ingress queue with one filter, an eBPF program. What the tap receives, which is what
//! the guest sends, leaves by the interface. What the interface receives goes to the tap before the
//! host's stack sees it, so that nobody but the guest answers for the guest's addresses, with two
//! exceptions. A packet for a socket that somebody on the host has opened in the namespace stays on
//! the host: Docker's name server asks others from there. And answers of neighbours (ARP, NDP) go to
//! both, because both ask.
//!
//! The filter's name tells whose it is, and whether the queue was there before.

use std::{io, os::fd::AsRawFd};

use bulkhead_bpf::{FRAME, Kind, Program, Size};

use super::{
    netlink::{CREATE, Netlink, Payload, attribute, number32, text},
    tap,
};

/// Bytes of `struct tcmsg`.
const FIXED: usize = 20;

// linux/pkt_sched.h, pkt_cls.h
const TC_H_INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`, which names the filters of both kinds of queues.
const INGRESS_FILTERS: u32 = 0xffff_fff2;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const ACT_DIRECT: u32 = 1;
const TC_ACT_UNSPEC: i32 = -1;

/// Priority 1, `ETH_P_ALL`.
const INFO: u32 = 1 << 16 | 0x0300;

/// Beginning of a filter's name.
const OURS: &str = "bulkhead";

/// The name of a filter whose queue was there before it.
const IN_ANOTHERS_QUEUE: &str = "bulkhead, in another's queue";

// linux/bpf.h: functions of the kernel
const CLONE_REDIRECT: i32 = 13;
const REDIRECT: i32 = 23;
const LOAD_BYTES: i32 = 26;
const LOOKUP_TCP: i32 = 84;
const LOOKUP_UDP: i32 = 85;
const RELEASE: i32 = 86;

/// Offset of `protocol` in `struct __sk_buff`.
const PROTOCOL: i16 = 16;

// As a little-endian processor loads what is big-endian.
const ARP: i32 = 0x0608;
const IPV4: i32 = 0x0008;
const IPV6: i32 = 0xdd86;
const ARP_REPLY: i32 = 0x0200;
/// More fragments, or not the first one.
const FRAGMENT: i32 = 0xff3f;

const TCP: i32 = 6;
const UDP: i32 = 17;
const ICMPV6: i32 = 58;
const NEIGHBOUR_ADVERTISEMENT: i32 = 136;

/// Bytes of an Ethernet header.
const ETHERNET: i32 = 14;

/// Why packets cannot be redirected.
#[derive(Debug)]
pub enum RedirectError {
    /// Somebody else decides about the packets.
    Taken(&'static str),
    /// The kernel said no.
    System(&'static str, io::Error),
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> RedirectError {
    move |error| RedirectError::System(what, error)
}

/// Connects an interface and its tap, in the namespace of the calling thread. The tap's part vanishes
/// with the tap; the interface's is undone by [`disconnect`], here if the rest fails.
pub fn connect(netlink: &Netlink, interface: u32, tap: u32) -> Result<(), RedirectError> {
    add_queue(netlink, tap).map_err(failed("set up the tap's ingress queue"))?;
    add_filter(netlink, tap, &all_to(interface), OURS)
        .map_err(failed("redirect what the guest sends"))?;
    let filters = filters(netlink, interface).map_err(failed("look for its filters"))?;
    if filters.iter().any(|filter| filter.is_ours()) {
        // Its tap's name was free.
        disconnect(netlink, interface).map_err(failed("remove what is left of an earlier pod"))?;
    } else if !filters.is_empty() {
        return Err(RedirectError::Taken(
            "somebody else has filters (tc) at its ingress, which would not see its packets any more",
        ));
    }
    let name = match add_queue(netlink, interface) {
        Ok(()) => OURS,
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => IN_ANOTHERS_QUEUE,
        Err(error) => return Err(RedirectError::System("set up its ingress queue", error)),
    };
    add_filter(netlink, interface, &to_guest(tap), name).map_err(|error| {
        if name == OURS {
            let _ = remove_queue(netlink, interface);
        }
        RedirectError::System("redirect what it receives", error)
    })
}

/// Takes the interface's part away, if it is there. What others have added stays.
pub fn disconnect(netlink: &Netlink, interface: u32) -> io::Result<()> {
    let (ours, others): (Vec<Filter>, _) = filters(netlink, interface)?
        .into_iter()
        .partition(Filter::is_ours);
    for filter in &ours {
        let request = message(interface, filter.handle, INGRESS_FILTERS, filter.info)
            .with_text(TCA_KIND, "bpf");
        netlink.order(libc::RTM_DELTFILTER, 0, &request)?;
    }
    if others.is_empty() && ours.iter().any(|filter| filter.name == OURS) {
        remove_queue(netlink, interface)?;
    }
    Ok(())
}

/// Takes away what pods that are gone have left, in the namespace of the calling thread. A pod that is
/// there has a tap.
pub fn clean_up(netlink: &Netlink) -> io::Result<()> {
    const IFLA_IFNAME: u16 = 3;
    let links = netlink.dump(libc::RTM_GETLINK, &Payload::new(&[0; 16]))?;
    let links: Vec<(u32, String)> = links
        .iter()
        .filter_map(|link| {
            let name = attribute(link.get(16..)?, IFLA_IFNAME)?;
            Some((number32(link, 4)?, text(name)))
        })
        .collect();
    for (index, _) in &links {
        let tap = tap::name(*index);
        if !links.iter().any(|(_, name)| *name == tap) {
            disconnect(netlink, *index)?;
        }
    }
    Ok(())
}

#[derive(Debug)]
struct Filter {
    handle: u32,
    info: u32,
    name: String,
}

impl Filter {
    fn is_ours(&self) -> bool {
        self.name == OURS || self.name == IN_ANOTHERS_QUEUE
    }
}

/// The filters at an interface's ingress.
fn filters(netlink: &Netlink, interface: u32) -> io::Result<Vec<Filter>> {
    let request = message(interface, 0, INGRESS_FILTERS, 0);
    let dumped = match netlink.dump(libc::RTM_GETTFILTER, &request) {
        Ok(dumped) => dumped,
        // There is no queue.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Vec::new(),
        Err(error) => return Err(error),
    };
    let parsed = dumped.iter().filter_map(|filter| {
        let handle = number32(filter, 8)?;
        let rest = filter.get(FIXED..)?;
        let options = attribute(rest, TCA_OPTIONS).unwrap_or_default();
        let is_bpf = attribute(rest, TCA_KIND).map(text)? == "bpf";
        let name = attribute(options, TCA_BPF_NAME).filter(|_| is_bpf);
        // Each priority has a message of its own, too, without a filter.
        (handle != 0 || attribute(rest, TCA_OPTIONS).is_some()).then(|| Filter {
            handle,
            info: number32(filter, 16).unwrap_or_default(),
            name: name.map(text).unwrap_or_default(),
        })
    });
    Ok(parsed.collect())
}

/// `struct tcmsg`
fn message(interface: u32, handle: u32, parent: u32, info: u32) -> Payload {
    let mut fixed = vec![0; 4];
    for number in [interface, handle, parent, info] {
        fixed.extend(number.to_ne_bytes());
    }
    Payload::new(&fixed)
}

fn queue(interface: u32) -> Payload {
    message(interface, INGRESS_HANDLE, TC_H_INGRESS, 0).with_text(TCA_KIND, "ingress")
}

fn add_queue(netlink: &Netlink, interface: u32) -> io::Result<()> {
    netlink.order(libc::RTM_NEWQDISC, CREATE, &queue(interface))
}

fn remove_queue(netlink: &Netlink, interface: u32) -> io::Result<()> {
    netlink.order(libc::RTM_DELQDISC, 0, &queue(interface))
}

fn add_filter(netlink: &Netlink, interface: u32, program: &Program, name: &str) -> io::Result<()> {
    let program = program.to_kernel(Kind::Packets, "bulkhead_nic")?;
    let options = Payload::default()
        .with(TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes())
        .with_text(TCA_BPF_NAME, name)
        .with(TCA_BPF_FLAGS, &ACT_DIRECT.to_ne_bytes());
    let request = message(interface, 1, INGRESS_FILTERS, INFO)
        .with_text(TCA_KIND, "bpf")
        .with_nested(TCA_OPTIONS, options);
    netlink.order(libc::RTM_NEWTFILTER, CREATE, &request)
}

/// Sends every packet out of an interface.
fn all_to(interface: u32) -> Program {
    let mut program = Program::default();
    redirect(&mut program, interface);
    program
}

fn redirect(program: &mut Program, interface: u32) {
    program
        .set(1, interface.cast_signed())
        .set(2, 0)
        .call(REDIRECT)
        .exit();
}

/// Sends packets out of the tap, but for those that are the host's.
fn to_guest(tap: u32) -> Program {
    const CONTEXT: u8 = 6;
    const KIND: u8 = 7;
    const PORTS: u8 = 8;
    const SIZE: u8 = 9;
    // On the stack: a part of the packet, and the addresses and ports to look up behind it.
    const PACKET: i16 = -104;
    const TUPLE: i16 = -64;
    let mut program = Program::default();
    let load_bytes = |program: &mut Program, from: i32, to: i16, length: i32| {
        program
            .copy(1, CONTEXT)
            .set(2, from)
            .copy(3, FRAME)
            .add(3, to.into())
            .set(4, length)
            .call(LOAD_BYTES)
            .if_not(0, 0, "guest");
    };
    program
        .copy(CONTEXT, 1)
        .load(Size::Word, KIND, 1, PROTOCOL)
        .if_equal(KIND, IPV4, "ipv4")
        .if_equal(KIND, IPV6, "ipv6")
        .if_not(KIND, ARP, "guest");
    load_bytes(&mut program, ETHERNET + 6, PACKET, 2);
    program
        .load(Size::Half, 1, FRAME, PACKET)
        .if_not(1, ARP_REPLY, "guest")
        .go("both")
        .label("ipv4");
    load_bytes(&mut program, ETHERNET, PACKET, 20);
    program
        .load(Size::Half, 1, FRAME, PACKET + 6)
        .and(1, FRAGMENT)
        .if_not(1, 0, "guest")
        .load(Size::Byte, KIND, FRAME, PACKET + 9)
        .load(Size::Word, 1, FRAME, PACKET + 12)
        .store(TUPLE, 1)
        .load(Size::Word, 1, FRAME, PACKET + 16)
        .store(TUPLE + 4, 1)
        // Ports are behind the options.
        .load(Size::Byte, PORTS, FRAME, PACKET)
        .and(PORTS, 15)
        .shift_left(PORTS, 2)
        .add(PORTS, ETHERNET)
        .copy(1, CONTEXT)
        .copy(2, PORTS)
        .copy(3, FRAME)
        .add(3, (TUPLE + 8).into())
        .set(4, 4)
        .call(LOAD_BYTES)
        .if_not(0, 0, "guest")
        .set(SIZE, 12)
        .go("look up");

    program.label("ipv6");
    load_bytes(&mut program, ETHERNET, PACKET, 40);
    program
        .load(Size::Byte, KIND, FRAME, PACKET + 6)
        .if_equal(KIND, ICMPV6, "icmpv6");
    for word in 0..8 {
        program
            .load(Size::Word, 1, FRAME, PACKET + 8 + 4 * word)
            .store(TUPLE + 4 * word, 1);
    }
    load_bytes(&mut program, ETHERNET + 40, TUPLE + 32, 4);
    program.set(SIZE, 36);

    program
        .label("look up")
        .copy(1, CONTEXT)
        .copy(2, FRAME)
        .add(2, TUPLE.into())
        .copy(3, SIZE)
        // In this namespace.
        .set(4, -1)
        .set(5, 0)
        .if_equal(KIND, TCP, "tcp")
        .if_not(KIND, UDP, "guest")
        .call(LOOKUP_UDP)
        .go("looked up")
        .label("tcp")
        .call(LOOKUP_TCP)
        .label("looked up")
        .if_equal(0, 0, "guest")
        .copy(1, 0)
        .call(RELEASE)
        .exit_with(TC_ACT_UNSPEC);

    program.label("icmpv6");
    load_bytes(&mut program, ETHERNET + 40, PACKET, 1);
    program
        .load(Size::Byte, 1, FRAME, PACKET)
        .if_not(1, NEIGHBOUR_ADVERTISEMENT, "guest")
        .label("both")
        .copy(1, CONTEXT)
        .set(2, tap.cast_signed())
        .set(3, 0)
        .call(CLONE_REDIRECT)
        .exit_with(TC_ACT_UNSPEC);

    program.label("guest");
    redirect(&mut program, tap);
    program
}
