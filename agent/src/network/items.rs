//! What belongs to interfaces: addresses, routes, rules and neighbours, as the host's kernel
//! describes them, and as the guest's kernel is to be told of them.
//!
//! Everything is kept as it came, also attributes that nobody here has heard of. Only what is the
//! host's own is taken out ([`Item::read`]), and interface indices are replaced
//! ([`Item::translate`]).

use std::collections::HashMap;

use super::netlink::{Malformed, Message};

/// Its index is the same in every network namespace.
pub const LOOPBACK: u32 = 1;

const INET: u8 = 2;
const INET6: u8 = 10;

// include/uapi/linux/if_addr.h
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_LABEL: u16 = 3;
const IFA_CACHEINFO: u16 = 6;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;
const IFA_F_DEPRECATED: u32 = 0x20;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
/// Those that say how far the kernel is with an address: SECONDARY (in IPv6, TEMPORARY),
/// OPTIMISTIC, DADFAILED, DEPRECATED, TENTATIVE, PERMANENT, STABLE_PRIVACY.
const IFA_F_STATE: u32 = 0x01 | 0x04 | 0x08 | IFA_F_DEPRECATED | 0x40 | 0x80 | 0x800;

// include/uapi/linux/rtnetlink.h
const RTA_DST: u16 = 1;
const RTA_IIF: u16 = 3;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_MULTIPATH: u16 = 9;
const RTA_CACHEINFO: u16 = 12;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTA_EXPIRES: u16 = 23;
const RTA_NH_ID: u16 = 30;
const RTPROT_REDIRECT: u8 = 1;
const RTPROT_KERNEL: u8 = 2;
const RTN_UNICAST: u8 = 1;
const RT_TABLE_LOCAL: u32 = 255;
const RTM_F_CLONED: u32 = 0x200;
/// The flags of a next hop that are not its state: PERVASIVE and ONLINK.
const RTNH_F_WANTED: u8 = 0x02 | 0x04;

// include/uapi/linux/fib_rules.h
const FRA_PRIORITY: u16 = 6;
const FRA_PROTOCOL: u16 = 21;
/// The only flag that is not a rule's state.
const FIB_RULE_INVERT: u32 = 0x02;

// include/uapi/linux/neighbour.h
const NDA_DST: u16 = 1;
const NDA_CACHEINFO: u16 = 3;
const NDA_PROBES: u16 = 4;
const NDA_IFINDEX: u16 = 8;

/// For ever, as a time in seconds.
const FOREVER: [u8; 4] = u32::MAX.to_ne_bytes();

/// A kind of them, in the order in which they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `struct ifaddrmsg`
    Address,
    /// `struct rtmsg`
    Route,
    /// `struct fib_rule_hdr`
    Rule,
    /// `struct ndmsg`
    Neighbour,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 4] = [Self::Address, Self::Route, Self::Rule, Self::Neighbour];

    /// As it is called in messages for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Route => "route",
            Self::Rule => "rule",
            Self::Neighbour => "neighbour",
        }
    }

    /// The message that makes one.
    pub fn made_by(self) -> u16 {
        match self {
            Self::Address => libc::RTM_NEWADDR,
            Self::Route => libc::RTM_NEWROUTE,
            Self::Rule => libc::RTM_NEWRULE,
            Self::Neighbour => libc::RTM_NEWNEIGH,
        }
    }

    /// The message that removes one.
    pub fn removed_by(self) -> u16 {
        self.made_by() + 1
    }

    fn header_len(self) -> usize {
        match self {
            Self::Address => 8,
            _ => 12,
        }
    }

    /// Where in the header the index of its interface is.
    fn index_at(self) -> Option<usize> {
        match self {
            Self::Address | Self::Neighbour => Some(4),
            Self::Route | Self::Rule => None,
        }
    }
}

/// One of them, with the host's indices. Two are equal if they ask the same of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What it is.
    pub kind: Kind,
    message: Message,
}

impl Item {
    /// Reads what the host's kernel says of one. `None` for what a kernel makes by itself, and for
    /// what belongs to other protocols than IPv4 and IPv6.
    pub fn read(kind: Kind, bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let mut item = Self {
            kind,
            message: Message::parse(bytes, kind.header_len())?,
        };
        if !matches!(item.family(), INET | INET6) {
            return Ok(None);
        }
        match kind {
            Kind::Address => item.read_address(),
            Kind::Route => {
                if item.is_the_kernels() {
                    return Ok(None);
                }
                item.read_route()?;
            }
            Kind::Rule => {
                let by = item.message.get(FRA_PROTOCOL);
                if by.is_some_and(|by| by.value == [RTPROT_KERNEL]) {
                    return Ok(None);
                }
                // Not told when it is 0, and chosen by the kernel when it is not told.
                if item.message.get(FRA_PRIORITY).is_none() {
                    item.message.set(FRA_PRIORITY, &[0; 4]);
                }
                let flags = item.number_at(8) & FIB_RULE_INVERT;
                item.set_number_at(8, flags);
            }
            Kind::Neighbour => item.drop_attributes(&[NDA_CACHEINFO, NDA_PROBES]),
        }
        // That all of it can be walked through is known from here on.
        item.message.each_index(kind, &mut |index| index)?;
        Ok(Some(item))
    }

    /// The host tells when a lifetime has ended: here none does.
    fn read_address(&mut self) {
        let flags = self.flags();
        let deprecated = flags & IFA_F_DEPRECATED != 0;
        self.drop_attributes(&[IFA_CACHEINFO]);
        if deprecated {
            let preferred = [0; 4];
            let lifetimes = [preferred, FOREVER, [0; 4], [0; 4]].concat();
            self.message.set(IFA_CACHEINFO, &lifetimes);
        }
        self.set_flags(flags & !IFA_F_STATE);
    }

    /// Leaves out a label that is only the interface's name, which may change.
    pub fn without_label(&mut self, name: &str) {
        let label = self.message.get(IFA_LABEL);
        let label = label.map(|label| label.value.strip_suffix(&[0]).unwrap_or(&label.value));
        if self.kind == Kind::Address && label == Some(name.as_bytes()) {
            self.drop_attributes(&[IFA_LABEL]);
        }
    }

    fn read_route(&mut self) -> Result<(), Malformed> {
        // The next hop of a nexthop object is described beside its number.
        self.drop_attributes(&[RTA_CACHEINFO, RTA_EXPIRES, RTA_NH_ID]);
        let flags = self.number_at(8) & u32::from(RTNH_F_WANTED);
        self.set_number_at(8, flags);
        self.message.each_hop(&mut |hop| hop[2] &= RTNH_F_WANTED)
    }

    fn is_the_kernels(&self) -> bool {
        let [.., protocol, _, kind] = self.message.header[..8] else {
            return false;
        };
        let kernel = protocol == RTPROT_KERNEL;
        let unicast = kind == RTN_UNICAST && self.table() != RT_TABLE_LOCAL;
        protocol == RTPROT_REDIRECT || self.number_at(8) & RTM_F_CLONED != 0 || (kernel && !unicast)
    }

    fn drop_attributes(&mut self, kinds: &[u16]) {
        let all = &mut self.message.attributes;
        all.retain(|attribute| !kinds.iter().any(|kind| attribute.is(*kind)));
    }

    fn family(&self) -> u8 {
        self.message.header[0]
    }

    /// Whether it is of IPv6.
    pub fn is_ipv6(&self) -> bool {
        self.family() == INET6
    }

    fn number_at(&self, at: usize) -> u32 {
        let bytes = self.message.header[at..at + 4].try_into();
        bytes.map_or(0, u32::from_ne_bytes)
    }

    fn set_number_at(&mut self, at: usize, number: u32) {
        self.message.header[at..at + 4].copy_from_slice(&number.to_ne_bytes());
    }

    fn table(&self) -> u32 {
        let table = self.message.get(RTA_TABLE).and_then(|one| one.number());
        table.unwrap_or_else(|| self.message.header[4].into())
    }

    fn flags(&self) -> u32 {
        let flags = self.message.get(IFA_FLAGS).and_then(|one| one.number());
        flags.unwrap_or_else(|| self.message.header[2].into())
    }

    fn set_flags(&mut self, flags: u32) {
        self.message.header[2] = flags.to_ne_bytes()[0];
        self.message.set(IFA_FLAGS, &flags.to_ne_bytes());
    }

    /// The host's indices of all interfaces that it names.
    pub fn indices(&self) -> Vec<u32> {
        let mut indices = Vec::new();
        let mut message = self.message.clone();
        let walked = message.each_index(self.kind, &mut |index| {
            indices.push(index);
            index
        });
        debug_assert_eq!(walked, Ok(()), "it was walked through when it was read");
        indices
    }

    /// It with other indices. `None` if it names an interface that is not among them.
    pub fn translate(&self, indices: &HashMap<u32, u32>) -> Option<Self> {
        let mut item = self.clone();
        let mut all_known = true;
        let walked = item.message.each_index(self.kind, &mut |index| {
            indices.get(&index).copied().unwrap_or_else(|| {
                all_known = false;
                index
            })
        });
        (all_known && walked.is_ok()).then_some(item)
    }

    /// What the kernel is sent.
    pub fn bytes(&self) -> Vec<u8> {
        self.message.bytes()
    }

    /// A route that needs another one to its gateway first.
    pub fn has_gateway(&self) -> bool {
        let kinds = [RTA_GATEWAY, RTA_VIA, RTA_MULTIPATH];
        self.kind == Kind::Route && kinds.iter().any(|kind| self.message.get(*kind).is_some())
    }

    /// An address that can be used at once: nobody else has it, as the host has it already.
    pub fn without_detection(mut self) -> Self {
        if self.is_ipv6() {
            self.set_flags(self.flags() | IFA_F_NODAD);
        }
        self
    }

    /// An address without the route to its network that comes along with it.
    pub fn without_route(mut self) -> Self {
        self.set_flags(self.flags() | IFA_F_NOPREFIXROUTE);
        self
    }

    /// Whether the kernel makes a route to the network of this address when it gets it.
    pub fn brings_route(&self) -> bool {
        let (local, address) = (self.message.get(IFA_LOCAL), self.message.get(IFA_ADDRESS));
        let alone = self.message.header[1] == 32 && !self.is_ipv6();
        let same = local.map(|one| &one.value) == address.map(|one| &one.value);
        !(alone && same)
    }

    /// Whether this is the route that comes along with an address.
    pub fn is_route_of(&self, address: &Self) -> bool {
        let length = address.message.header[1];
        let Some(network) = address.message.get(IFA_ADDRESS) else {
            return false;
        };
        let network = masked(&network.value, length);
        let target = self.message.get(RTA_DST);
        let target = target.map_or_else(|| vec![0; network.len()], |one| one.value.clone());
        self.kind == Kind::Route
            && self.family() == address.family()
            && self.message.header[5] == RTPROT_KERNEL
            && self.message.header[1] == length
            && target == network
            && self.indices() == address.indices()
    }

    /// The interface identifier of a link-local address of IPv6, if it is one.
    pub fn link_local(&self) -> Option<&[u8]> {
        let local = self.message.get(IFA_LOCAL);
        let address = local.or_else(|| self.message.get(IFA_ADDRESS))?;
        let is_address = self.kind == Kind::Address && self.is_ipv6();
        match address.value.as_slice() {
            [0xfe, second, _, _, _, _, _, _, identifier @ ..]
                if is_address && second & 0xc0 == 0x80 =>
            {
                Some(identifier)
            }
            _ => None,
        }
    }

    /// It for people: `route 10.0.0.0/8`.
    pub fn describe(&self) -> String {
        let kind = self.kind.name();
        let (attribute, length) = match self.kind {
            Kind::Address => (self.message.get(IFA_LOCAL), Some(self.message.header[1])),
            Kind::Route => (self.message.get(RTA_DST), Some(self.message.header[1])),
            Kind::Neighbour => (self.message.get(NDA_DST), None),
            Kind::Rule => {
                return format!("{kind} of {}", if self.is_ipv6() { "IPv6" } else { "IPv4" });
            }
        };
        let or_address = (self.kind == Kind::Address).then(|| self.message.get(IFA_ADDRESS));
        let value = attribute
            .or(or_address.flatten())
            .map(|one| one.value.as_slice());
        let address = value.and_then(|value| {
            let four = <[u8; 4]>::try_from(value).map(std::net::IpAddr::from);
            let six = || <[u8; 16]>::try_from(value).map(std::net::IpAddr::from);
            four.or_else(|_| six()).ok()
        });
        match (address, length) {
            (Some(address), Some(length)) => format!("{kind} {address}/{length}"),
            (Some(address), None) => format!("{kind} {address}"),
            (None, _) => format!("default {kind}"),
        }
    }
}

/// Whether a route is one that a kernel has made.
pub fn is_kernel_route(bytes: &[u8]) -> bool {
    bytes.get(5) == Some(&RTPROT_KERNEL)
}

/// The network that an address is in.
fn masked(address: &[u8], mut length: u8) -> Vec<u8> {
    let bytes = address.iter().map(|byte| {
        let bits = length.min(8);
        length -= bits;
        byte & u8::MAX.checked_shl(8 - u32::from(bits)).unwrap_or(0)
    });
    bytes.collect()
}

impl Message {
    /// Replaces every index of an interface. 0 is none.
    fn each_index(
        &mut self,
        kind: Kind,
        replace: &mut dyn FnMut(u32) -> u32,
    ) -> Result<(), Malformed> {
        let mut at = |bytes: &mut [u8]| -> Result<(), Malformed> {
            let number = <[u8; 4]>::try_from(&*bytes).map_err(|_| Malformed)?;
            let number = u32::from_ne_bytes(number);
            if number != 0 {
                bytes.copy_from_slice(&replace(number).to_ne_bytes());
            }
            Ok(())
        };
        if let Some(offset) = kind.index_at() {
            at(&mut self.header[offset..offset + 4])?;
        }
        let indices: &[u16] = match kind {
            Kind::Route => &[RTA_IIF, RTA_OIF],
            Kind::Neighbour => &[NDA_IFINDEX],
            Kind::Address | Kind::Rule => &[],
        };
        for attribute in &mut self.attributes {
            if indices.iter().any(|kind| attribute.is(*kind)) {
                at(&mut attribute.value)?;
            }
        }
        if kind == Kind::Route {
            let mut result = Ok(());
            self.each_hop(&mut |hop| result = result.and(at(&mut hop[4..8])))?;
            result?;
        }
        Ok(())
    }

    /// Every `struct rtnexthop` of a route: length (2 bytes), flags, hops, index (4 bytes).
    fn each_hop(&mut self, change: &mut dyn FnMut(&mut [u8])) -> Result<(), Malformed> {
        let mut all = self.attributes.iter_mut();
        let Some(hops) = all.find(|attribute| attribute.is(RTA_MULTIPATH)) else {
            return Ok(());
        };
        let mut rest = hops.value.as_mut_slice();
        while !rest.is_empty() {
            let length = rest.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes));
            let length = usize::from(length.unwrap_or(0));
            if length < 8 || length > rest.len() {
                return Err(Malformed);
            }
            change(&mut rest[..length]);
            let next = length.next_multiple_of(4).min(rest.len());
            rest = &mut rest[next..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod properties {
    use proptest::prelude::*;

    use super::*;
    use crate::network::netlink::{Attribute, emit};

    fn attribute() -> impl Strategy<Value = Attribute> {
        // Beyond what any kernel has, and without those that are looked into.
        let value = proptest::collection::vec(any::<u8>(), 0..40);
        (100_u16..0x3fff, value).prop_map(|(kind, value)| Attribute::new(kind, value))
    }

    fn hop(index: u32, inner: &[Attribute]) -> Vec<u8> {
        let inner = emit(inner);
        let length = u16::try_from(8 + inner.len()).unwrap();
        [
            &length.to_ne_bytes()[..],
            &[4, 1],
            &index.to_ne_bytes(),
            &inner,
        ]
        .concat()
    }

    prop_compose! {
        fn route()(
            unknown in proptest::collection::vec(attribute(), 0..6),
            hops in proptest::collection::vec((1_u32..5, attribute()), 0..4),
            oif in 1_u32..5,
        ) -> Vec<u8> {
            // A route of a user in table main.
            let header = vec![INET, 0, 0, 0, 254, 4, 0, RTN_UNICAST, 4, 0, 0, 0];
            let mut attributes = unknown;
            attributes.push(Attribute::new(RTA_OIF, oif.to_ne_bytes()));
            if !hops.is_empty() {
                let hops = hops.iter().map(|(index, inner)| hop(*index, std::slice::from_ref(inner)));
                attributes.push(Attribute::new(RTA_MULTIPATH, hops.collect::<Vec<_>>().concat()));
            }
            Message { header, attributes }.bytes()
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            for kind in Kind::ALL {
                if let Ok(Some(item)) = Item::read(kind, &bytes) {
                    let same = item.indices().into_iter().map(|one| (one, one)).collect();
                    prop_assert_eq!(item.translate(&same), Some(item.clone()));
                    item.describe();
                    item.link_local();
                }
            }
        }

        #[test]
        fn what_is_unknown_survives(bytes in route()) {
            let item = Item::read(Kind::Route, &bytes).unwrap().unwrap();
            prop_assert_eq!(item.bytes(), bytes);
        }

        #[test]
        fn indices_are_replaced_everywhere_and_nothing_else_is(bytes in route()) {
            let item = Item::read(Kind::Route, &bytes).unwrap().unwrap();
            let there: HashMap<u32, u32> = (1..5).map(|index| (index, 0x0101_0100 + index)).collect();
            let back = there.iter().map(|(from, to)| (*to, *from)).collect();
            let translated = item.translate(&there).unwrap();
            prop_assert!(translated.indices().iter().all(|index| *index > 0x0101_0100));
            prop_assert_eq!(translated.indices().len(), item.indices().len());
            prop_assert_eq!(translated.bytes().len(), bytes.len());
            prop_assert_eq!(translated.translate(&back), Some(item));
        }

        #[test]
        fn a_missing_interface_is_noticed(bytes in route()) {
            let item = Item::read(Kind::Route, &bytes).unwrap().unwrap();
            for gone in item.indices() {
                let others = (1..5).filter(|index| *index != gone).map(|index| (index, index));
                prop_assert_eq!(item.translate(&others.collect()), None);
            }
        }
    }
}
