//! What a network namespace has that a guest is to have, too.

use std::{fs, io, net::Ipv6Addr};

use super::{
    netlink::{Netlink, Payload, attribute, attributes, number16, number32, text},
    tap,
};

/// Bytes of `struct ifinfomsg`, `ifaddrmsg`, `rtmsg`, `fib_rule_hdr` and `ndmsg`.
const LINK: usize = 16;
const ADDRESS: usize = 8;
const ROUTE: usize = 12;
const NEIGHBOUR: usize = 12;

/// The loopback interface, in every namespace.
pub const LOOPBACK: u32 = 1;

/// `ARPHRD_ETHER`
const ETHERNET: u16 = 1;

// linux/if_link.h, if_addr.h, rtnetlink.h, fib_rules.h, neighbour.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const IFA_CACHEINFO: u16 = 6;
const IFA_FLAGS: u16 = 8;
const IFA_ADDRESS: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;
const RTA_CACHEINFO: u16 = 12;
const RTA_TABLE: u16 = 15;
const FRA_PROTOCOL: u16 = 21;
const NDA_CACHEINFO: u16 = 3;
const NDA_PROBES: u16 = 4;
const RTPROT_REDIRECT: u8 = 1;
const RTPROT_KERNEL: u8 = 2;
const RTN_UNICAST: u8 = 1;
const RTPROT_RA: u8 = 9;
const RTM_F_CLONED: u32 = 0x200;
const NUD_PERMANENT: u16 = 0x80;

/// Where Docker's name server listens: 127.0.0.11, as procfs writes it.
const RESOLVER: &str = "0B00007F:";

/// An interface of the host that becomes one of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// On the host.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// In bytes.
    pub mtu: u16,
    /// Whether it is up.
    pub up: bool,
}

/// All that is looked at, at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scan {
    /// What can be had in the guest, by age.
    pub interfaces: Vec<Interface>,
    /// The names of interfaces that cannot be, with the reason.
    pub unsupported: Vec<(String, &'static str)>,
    /// RTM_NEWADDR
    pub addresses: Vec<Vec<u8>>,
    /// RTM_NEWROUTE
    pub routes: Vec<Vec<u8>>,
    /// RTM_NEWRULE
    pub rules: Vec<Vec<u8>>,
    /// RTM_NEWNEIGH
    pub neighbours: Vec<Vec<u8>>,
    /// There is a name server at 127.0.0.11.
    pub resolver: bool,
}

/// Looks at the namespace of the calling thread.
pub fn scan(netlink: &Netlink) -> io::Result<Scan> {
    let mut scan = Scan::default();
    let links = netlink.dump(libc::RTM_GETLINK, &Payload::new(&[0; LINK]))?;
    let links: Vec<Link> = links.iter().filter_map(|link| Link::parse(link)).collect();
    for link in &links {
        match link.verdict(&links) {
            Verdict::Guest(interface) => scan.interfaces.push(interface),
            Verdict::Host => {}
            Verdict::Unsupported(why) => scan.unsupported.push((link.name.clone(), why)),
        }
    }
    scan.interfaces.sort_by_key(|interface| interface.index);
    if !scan.interfaces.is_empty() {
        scan.add_configuration(netlink)?;
    }
    let udp = fs::read_to_string("/proc/thread-self/net/udp")?;
    scan.resolver = udp
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .any(|address| address.starts_with(RESOLVER));
    Ok(scan)
}

impl Scan {
    fn add_configuration(&mut self, netlink: &Netlink) -> io::Result<()> {
        for family in [libc::AF_INET, libc::AF_INET6] {
            let family = u8::try_from(family).map_err(io::Error::other)?;
            let of_family = |length: usize| {
                let mut fixed = vec![0; length];
                fixed[0] = family;
                Payload::new(&fixed)
            };
            let addresses = netlink.dump(libc::RTM_GETADDR, &of_family(ADDRESS))?;
            self.addresses.extend(addresses);
            let routes = netlink.dump(libc::RTM_GETROUTE, &of_family(ROUTE))?;
            self.routes.extend(routes);
            match netlink.dump(libc::RTM_GETRULE, &of_family(ROUTE)) {
                Ok(rules) => self.rules.extend(rules),
                // A kernel without rules of its family.
                Err(error) if is_unknown(&error) => {}
                Err(error) => return Err(error),
            }
            let neighbours = netlink.dump(libc::RTM_GETNEIGH, &of_family(NEIGHBOUR))?;
            self.neighbours.extend(neighbours);
        }
        self.rules.retain(|rule| {
            let by = rule
                .get(ROUTE..)
                .and_then(|rule| attribute(rule, FRA_PROTOCOL));
            by != Some(&[RTPROT_KERNEL])
        });
        self.routes.retain(|route| is_configured(route));
        self.neighbours.retain(|neighbour| {
            let state = number16(neighbour, 8).unwrap_or_default();
            state & NUD_PERMANENT != 0
        });
        self.keep(|_| true);
        Ok(())
    }

    /// Leaves out interfaces, and what belongs to those that are not among them.
    pub fn keep(&mut self, kept: impl Fn(&Interface) -> bool) {
        self.interfaces.retain(kept);
        let indices: Vec<u32> = self.interfaces.iter().map(|found| found.index).collect();
        let known = |index: Option<u32>| index.is_some_and(|index| indices.contains(&index));
        self.addresses
            .retain(|address| known(number32(address, 4)) || is_added_to_loopback(address));
        self.routes.retain(|route| is_reachable(route, known));
        self.neighbours
            .retain(|neighbour| known(number32(neighbour, 4)));
    }

    /// Whether there is no difference that a guest is to be told of: lifetimes run down, and the host
    /// looks for duplicates of addresses that are the guest's.
    pub fn is_like(&self, other: &Self) -> bool {
        self.interfaces == other.interfaces
            && self.resolver == other.resolver
            && self.rules == other.rules
            && like(&self.addresses, &other.addresses, lasting_address)
            && like(&self.routes, &other.routes, |route| {
                lasting(route, ROUTE, &[RTA_CACHEINFO])
            })
            && like(&self.neighbours, &other.neighbours, |neighbour| {
                lasting(neighbour, NEIGHBOUR, &[NDA_CACHEINFO, NDA_PROBES])
            })
    }
}

type Lasting = (Vec<u8>, Vec<(u16, Vec<u8>)>);

fn like(some: &[Vec<u8>], others: &[Vec<u8>], lasting: fn(&[u8]) -> Lasting) -> bool {
    let all = |list: &[Vec<u8>]| -> Vec<Lasting> {
        list.iter().map(|payload| lasting(payload)).collect()
    };
    all(some) == all(others)
}

/// What of a message does not change by itself.
fn lasting(payload: &[u8], fixed: usize, ignored: &[u16]) -> Lasting {
    let (fixed, rest) = payload.split_at_checked(fixed).unwrap_or((payload, &[]));
    let rest = attributes(rest).filter(|(kind, _)| !ignored.contains(kind));
    let rest = rest.map(|(kind, value)| (kind, value.to_vec()));
    (fixed.to_vec(), rest.collect())
}

fn lasting_address(address: &[u8]) -> Lasting {
    let (mut fixed, rest) = lasting(address, ADDRESS, &[IFA_CACHEINFO, IFA_FLAGS]);
    if let Some(flags) = fixed.get_mut(2) {
        *flags = 0;
    }
    (fixed, rest)
}

fn is_unknown(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)
    )
}

/// Whether the guest is to have a route: those of router advertisements come with the advertisements,
/// which it gets, and of the kernel's own the local ones. The others are told, because the host may
/// have removed the one that came with an address.
fn is_configured(route: &[u8]) -> bool {
    let Some(fixed) = route.get(..ROUTE) else {
        return false;
    };
    let table = attribute(&route[ROUTE..], RTA_TABLE).and_then(|table| number32(table, 0));
    let table = table.unwrap_or(fixed[4].into());
    let flags = number32(fixed, 8).unwrap_or_default();
    table != u32::from(libc::RT_TABLE_LOCAL)
        && !matches!(fixed[5], RTPROT_REDIRECT | RTPROT_RA)
        && (fixed[5] != RTPROT_KERNEL || fixed[7] == RTN_UNICAST)
        && flags & RTM_F_CLONED == 0
}

/// Whether it leads over interfaces that the guest has, or over none.
fn is_reachable(route: &[u8], known: impl Fn(Option<u32>) -> bool) -> bool {
    let rest = &route[ROUTE..];
    let one = attribute(rest, RTA_OIF).and_then(|index| number32(index, 0));
    let mut hops = attribute(rest, RTA_MULTIPATH).unwrap_or_default();
    let several = std::iter::from_fn(|| {
        // `struct rtnexthop`
        let length = usize::from(number16(hops, 0)?).next_multiple_of(4);
        let index = number32(hops, 4)?;
        hops = hops.get(length.max(8)..).unwrap_or_default();
        Some(index)
    });
    one.into_iter()
        .chain(several)
        .all(|index| index == LOOPBACK || known(Some(index)))
}

/// Whether an address is one of the loopback interface that it does not have by itself.
fn is_added_to_loopback(address: &[u8]) -> bool {
    let value = attribute(address.get(ADDRESS..).unwrap_or_default(), IFA_ADDRESS);
    let localhost = Ipv6Addr::LOCALHOST.octets();
    let own = value.is_some_and(|value| value == [127, 0, 0, 1] || value == localhost);
    number32(address, 4) == Some(LOOPBACK) && !own
}

/// An interface, whoever's it is to be.
#[derive(Debug)]
struct Link {
    index: u32,
    hardware: u16,
    flags: u32,
    name: String,
    kind: String,
    mac: Option<[u8; 6]>,
    mtu: u32,
    /// What it is a port of.
    master: bool,
    /// What it is built on, in this namespace.
    lower: Option<u32>,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Guest(Interface),
    Host,
    Unsupported(&'static str),
}

impl Link {
    fn parse(payload: &[u8]) -> Option<Self> {
        let rest = payload.get(LINK..)?;
        let number = |kind| attribute(rest, kind).and_then(|value| number32(value, 0));
        let info = attribute(rest, IFLA_LINKINFO).unwrap_or_default();
        let elsewhere = attribute(rest, IFLA_LINK_NETNSID).is_some();
        Some(Self {
            index: number32(payload, 4)?,
            hardware: number16(payload, 2)?,
            flags: number32(payload, 8)?,
            name: attribute(rest, IFLA_IFNAME).map(text)?,
            kind: attribute(info, IFLA_INFO_KIND)
                .map(text)
                .unwrap_or_default(),
            mac: attribute(rest, IFLA_ADDRESS).and_then(|mac| mac.try_into().ok()),
            mtu: number(IFLA_MTU).unwrap_or_default(),
            master: number(IFLA_MASTER).is_some(),
            lower: number(IFLA_LINK).filter(|_| !elsewhere),
        })
    }

    fn has(&self, flag: libc::c_int) -> bool {
        self.flags & flag.unsigned_abs() != 0
    }

    fn verdict(&self, links: &[Self]) -> Verdict {
        let mac = match self.mac {
            Some(mac) if self.hardware == ETHERNET => mac,
            // Loopback; and tunnels, which the kernel puts into every namespace.
            _ => return Verdict::Host,
        };
        // A bridge's ports are the bridge's. Kernels put Ethernet tunnels into every namespace, too,
        // which are down.
        if self.master || tap::is_ours(&self.name, &self.kind) || !self.has(libc::IFF_UP) {
            return Verdict::Host;
        }
        if self.has(libc::IFF_NOARP) && self.kind != "dummy" {
            return Verdict::Unsupported(
                "it has no link layer of its own, as ipvlan in the modes L3 and L3S; \
                 mode L2, macvlan and veth work",
            );
        }
        let built_on_another = |lower| {
            let lower = links.iter().find(|link| link.index == lower);
            lower.is_some_and(|lower| lower.hardware == ETHERNET && lower.has(libc::IFF_UP))
        };
        if self.kind != "veth" && self.lower.is_some_and(built_on_another) {
            return Verdict::Unsupported(
                "it is built on another interface of the same network namespace, \
                 which is the guest's",
            );
        }
        Verdict::Guest(Interface {
            index: self.index,
            name: self.name.clone(),
            mac,
            mtu: u16::try_from(self.mtu).unwrap_or(u16::MAX),
            up: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(kind: &str) -> Link {
        Link {
            index: 7,
            hardware: ETHERNET,
            flags: libc::IFF_UP.unsigned_abs(),
            name: "eth0".into(),
            kind: kind.into(),
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: 70_000,
            master: false,
            lower: None,
        }
    }

    #[test]
    fn what_a_guest_gets_is_up_and_ethernet() {
        for kind in [
            "veth", "macvlan", "ipvlan", "vlan", "dummy", "bridge", "tun", "",
        ] {
            let Verdict::Guest(interface) = link(kind).verdict(&[]) else {
                panic!("{kind} is not the guest's");
            };
            assert_eq!((interface.index, interface.mtu), (7, u16::MAX));
        }
        let tunnel = Link {
            hardware: 776,
            ..link("sit")
        };
        let down = Link {
            flags: 0,
            ..link("gretap")
        };
        let port = Link {
            master: true,
            ..link("veth")
        };
        let tap = Link {
            name: "bh7".into(),
            ..link("tun")
        };
        for link in [tunnel, down, port, tap] {
            assert_eq!(link.verdict(&[]), Verdict::Host, "{link:?}");
        }
    }

    #[test]
    fn what_cannot_work_is_refused() {
        let up = libc::IFF_UP.unsigned_abs();
        let routed = Link {
            flags: up | libc::IFF_NOARP.unsigned_abs(),
            ..link("ipvlan")
        };
        assert!(matches!(routed.verdict(&[]), Verdict::Unsupported(_)));
        let dummy = Link {
            flags: routed.flags,
            ..link("dummy")
        };
        assert!(matches!(dummy.verdict(&[]), Verdict::Guest(_)));
        let lower = Link {
            index: 3,
            ..link("veth")
        };
        let above = Link {
            lower: Some(3),
            ..link("vlan")
        };
        assert!(matches!(above.verdict(&[lower]), Verdict::Unsupported(_)));
        // Its parent is the host's.
        assert!(matches!(above.verdict(&[]), Verdict::Guest(_)));
        // The other end of a veth that is whole in the namespace.
        let peers = [
            link("veth"),
            Link {
                index: 8,
                lower: Some(7),
                ..link("veth")
            },
        ];
        assert!(matches!(peers[1].verdict(&peers), Verdict::Guest(_)));
    }

    #[test]
    fn the_guest_gets_the_routes_that_it_does_not_make_itself() {
        let route = |table: u8, protocol: u8, flags: u32| {
            let mut route = vec![2, 0, 0, 0, table, protocol, 0, RTN_UNICAST];
            route.extend(flags.to_ne_bytes());
            route
        };
        assert!(is_configured(&route(254, 3, 0)));
        assert!(is_configured(&route(100, 4, 0)));
        assert!(!is_configured(&route(255, 3, 0)));
        assert!(is_configured(&route(254, RTPROT_KERNEL, 0)));
        let mut broadcast = route(254, RTPROT_KERNEL, 0);
        broadcast[7] = 3;
        assert!(!is_configured(&broadcast));
        assert!(!is_configured(&route(254, RTPROT_RA, 0)));
        assert!(!is_configured(&route(254, 3, RTM_F_CLONED)));
        assert!(!is_configured(&[0; 3]));
    }

    #[test]
    fn routes_over_what_the_guest_does_not_have_are_left_out() {
        let known = |index: Option<u32>| index == Some(7);
        let over = |index: u8| [8, 0, 4, 0, index, 0, 0, 0];
        let hops = |first: u8, second: u8| {
            let mut hops = vec![20, 0, 9, 0];
            for index in [first, second] {
                hops.extend([8, 0, 0, 0, index, 0, 0, 0]);
            }
            hops
        };
        let reachable = |rest: &[u8]| is_reachable(&[&[0; ROUTE], rest].concat(), known);
        assert!(reachable(&[]) && reachable(&over(7)) && reachable(&over(1)));
        assert!(reachable(&hops(7, 7)));
        assert!(!reachable(&over(8)) && !reachable(&hops(7, 8)) && !reachable(&hops(8, 7)));
    }

    #[test]
    fn the_loopback_interface_keeps_what_was_added_to_it() {
        let address = |index: u8, value: &[u8]| {
            let length = u8::try_from(value.len() + 4).unwrap();
            [&[2, 32, 0, 0, index, 0, 0, 0, length, 0, 1, 0], value].concat()
        };
        assert!(is_added_to_loopback(&address(1, &[10, 0, 0, 1])));
        assert!(!is_added_to_loopback(&address(1, &[127, 0, 0, 1])));
        assert!(!is_added_to_loopback(&address(2, &[10, 0, 0, 1])));
        let mut localhost = [0; 16];
        localhost[15] = 1;
        assert!(!is_added_to_loopback(&address(1, &localhost)));
        localhost[0] = 0xfd;
        assert!(is_added_to_loopback(&address(1, &localhost)));
    }

    #[test]
    fn lifetimes_and_checks_for_duplicates_are_no_difference() {
        let address = |flags: u8, index: u8, lifetime: u8| {
            let mut address = vec![10, 64, flags, 0, index, 0, 0, 0];
            address.extend([8, 0, 1, 0, 1, 2, 3, 4]);
            address.extend([5, 0, 6, 0, lifetime, 0, 0, 0]);
            Scan {
                addresses: vec![address],
                ..Scan::default()
            }
        };
        assert!(address(0x40, 7, 1).is_like(&address(0x80, 7, 2)));
        assert!(!address(0x40, 7, 1).is_like(&address(0x40, 8, 1)));
        assert!(!address(0x40, 7, 1).is_like(&Scan::default()));
    }
}
