//! Makes a network namespace have what the host has in its own.
//!
//! What was made before and is not wanted any more is removed; what stays is not touched. What the
//! container has made itself stays as well, and what it has changed of ours is left so, as long as
//! the host does not change the same.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs, io,
    os::fd::{AsRawFd, BorrowedFd},
    path::Path,
};

use bulkhead_agent_api::messages::Interface;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use thiserror::Error;

use super::{
    devices::Devices,
    items::{Item, Kind, LOOPBACK},
    netlink::{Link, LinkLocal, Refusal, Rtnetlink},
    wanted::Wanted,
};
use crate::stage::settings::sysctl_interface;

/// Why a namespace does not have what it should have.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// A request that makes no sense.
    #[error("invalid network: {0}")]
    Invalid(String),
    /// The container has made an interface of that name.
    #[error("failed to {step} interface {name}: the container has one of that name")]
    NameTaken {
        /// What was tried.
        step: &'static str,
        /// The name.
        name: String,
    },
    /// A step with an interface.
    #[error("failed to {step} interface {name} ({device})")]
    Interface {
        /// What was tried.
        step: &'static str,
        /// The interface.
        name: String,
        /// Its platform device.
        device: String,
        /// The kernel's answer.
        #[source]
        source: Refusal,
    },
    /// A step with what belongs to an interface.
    #[error("failed to {step} {item}{}", interfaces(.names))]
    Item {
        /// What was tried.
        step: &'static str,
        /// Which one.
        item: String,
        /// The interfaces that it names.
        names: Vec<String>,
        /// The kernel's answer.
        #[source]
        source: Refusal,
    },
    /// A system call.
    #[error("failed to {step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl NetworkError {
    /// For `map_err`: a failed system call.
    pub fn system(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { step, source }
    }
}

fn interfaces(names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!(" of interface {}", names.join(", ")),
    }
}

/// An interface that was put into a namespace, as the host had it then.
#[derive(Debug)]
struct Known {
    /// Its index on the host.
    host: u32,
    /// Its index in the namespace.
    guest: u32,
    device: String,
    name: String,
    mtu: u32,
    up: bool,
    /// Whether the kernel may make a link-local address for it.
    makes_link_local: bool,
}

impl Known {
    fn failed(&self, step: &'static str) -> impl FnOnce(Refusal) -> NetworkError {
        failed(step, &self.name, &self.device)
    }
}

fn failed(step: &'static str, name: &str, device: &str) -> impl FnOnce(Refusal) -> NetworkError {
    let (name, device) = (name.to_owned(), device.to_owned());
    move |source| match source.errno() {
        Some(libc::EEXIST) => NetworkError::NameTaken { step, name },
        _ => NetworkError::Interface {
            step,
            name,
            device,
            source,
        },
    }
}

/// The ways into a namespace, and to the devices.
pub struct Place<'a> {
    /// Platform devices.
    pub devices: &'a dyn Devices,
    /// In the agent's own namespace.
    pub outside: &'a Rtnetlink,
    /// In the namespace, as is the calling thread.
    pub inside: &'a Rtnetlink,
    /// The namespace.
    pub namespace: BorrowedFd<'a>,
    /// Devices whose interfaces were put into other namespaces, dead or alive.
    pub elsewhere: &'a HashSet<String>,
    /// Sysctls of interfaces, by their paths below /proc/sys.
    pub sysctls: &'a BTreeMap<String, String>,
}

/// What was made in one network namespace.
#[derive(Debug, Default)]
pub struct Made {
    interfaces: Vec<Known>,
    items: Vec<Item>,
}

impl Made {
    /// The platform devices of the interfaces.
    pub fn devices(&self) -> impl Iterator<Item = &str> {
        self.interfaces.iter().map(|one| one.device.as_str())
    }

    /// Forgets interfaces that were put into another namespace since.
    pub fn forget(&mut self, devices: &HashSet<String>) {
        let gone = |known: &Known| devices.contains(&known.device);
        let hosts: Vec<u32> = self
            .interfaces
            .extract_if(.., |known| gone(known))
            .map(|known| known.host)
            .collect();
        self.items.retain(|item| !names_any(item, &hosts));
    }

    /// Makes the namespace have what is wanted. What a failure leaves has no interface that was not
    /// there before.
    pub fn reconcile(&mut self, place: &Place<'_>, wanted: &Wanted) -> Result<(), NetworkError> {
        self.remove_interfaces(place.devices, wanted)?;
        self.remove_items(place, wanted)?;
        self.rename(place, wanted)?;
        self.change_links(place, wanted)?;
        let before = self.interfaces.len();
        let result = self
            .add_interfaces(place, wanted)
            .and_then(|()| self.add_items(place, wanted));
        if result.is_err() {
            let hosts: Vec<u32> = self.interfaces[before..]
                .iter()
                .map(|one| one.host)
                .collect();
            for known in self.interfaces.drain(before..) {
                if let Err(error) = place.devices.detach(&known.device) {
                    let Known { name, device, .. } = known;
                    crate::log::error(&format!("Failed to take {name} ({device}) back: {error}"));
                }
            }
            self.items.retain(|item| !names_any(item, &hosts));
        }
        result
    }

    /// Removes all interfaces, from wherever they are.
    pub fn remove_all(&mut self, devices: &dyn Devices) -> Result<(), NetworkError> {
        self.remove_interfaces(devices, &Wanted::default())
    }

    fn remove_interfaces(
        &mut self,
        devices: &dyn Devices,
        wanted: &Wanted,
    ) -> Result<(), NetworkError> {
        let is_gone = |known: &Known| wanted.interface(&known.device, known.host).is_none();
        while let Some(at) = self.interfaces.iter().position(is_gone) {
            let known = &self.interfaces[at];
            let detached = devices.detach(&known.device);
            detached.map_err(|error| known.failed("remove")(error.into()))?;
            let host = self.interfaces.remove(at).host;
            self.items.retain(|item| !names_any(item, &[host]));
        }
        Ok(())
    }

    fn remove_items(&mut self, place: &Place<'_>, wanted: &Wanted) -> Result<(), NetworkError> {
        let guests = self.guests();
        let is_stale = |item: &Item| !wanted.items.contains(item);
        // Addresses last: routes may need them, and go with them.
        while let Some(at) = self.items.iter().rposition(is_stale) {
            let item = &self.items[at];
            if let Some(translated) = item.translate(&guests) {
                let removed = item.kind.removed_by();
                match place.inside.request(removed, 0, &translated.bytes()) {
                    Err(refusal) if !is_absent(&refusal) => {
                        return Err(self.item_failed("remove", item)(refusal));
                    }
                    _ => {}
                }
            }
            self.items.remove(at);
        }
        Ok(())
    }

    /// The indices of the namespace for the host's.
    fn guests(&self) -> HashMap<u32, u32> {
        let all = self.interfaces.iter().map(|one| (one.host, one.guest));
        all.chain([(LOOPBACK, LOOPBACK)]).collect()
    }

    /// Gives interfaces the names that the host has given them since.
    fn rename(&mut self, place: &Place<'_>, wanted: &Wanted) -> Result<(), NetworkError> {
        let mut pending = Vec::new();
        for (at, known) in self.interfaces.iter().enumerate() {
            match wanted.interface(&known.device, known.host) {
                Some(one) if one.name != known.name => pending.push((at, one.name.clone())),
                _ => {}
            }
        }
        let rename = |known: &mut Known, name: &str| {
            let renamed = place.inside.rename(known.guest, name);
            match renamed {
                Err(refusal) if refusal.errno() != Some(libc::ENODEV) => {
                    Err(failed("rename", name, &known.device)(refusal))
                }
                _ => {
                    known.name = name.to_owned();
                    Ok(())
                }
            }
        };
        // One may be getting the name that another is about to lose.
        if pending.len() > 1 {
            for (at, _) in &pending {
                let known = &mut self.interfaces[*at];
                let name = format!("renamed{}", known.guest);
                rename(known, &name)?;
            }
        }
        for (at, name) in pending {
            rename(&mut self.interfaces[at], &name)?;
        }
        Ok(())
    }

    /// MTU and state of interfaces that were there before.
    fn change_links(&mut self, place: &Place<'_>, wanted: &Wanted) -> Result<(), NetworkError> {
        for known in &mut self.interfaces {
            let Some(one) = wanted.interface(&known.device, known.host) else {
                continue;
            };
            if (one.mtu, one.up) == (known.mtu, known.up) || place.link(known)?.is_none() {
                continue;
            }
            if one.mtu != known.mtu {
                let set = place.inside.set_mtu(known.guest, one.mtu);
                set.map_err(known.failed("set the MTU of"))?;
                known.mtu = one.mtu;
            }
            if one.up != known.up {
                place.set_up(known, one.up)?;
            }
        }
        Ok(())
    }

    fn add_interfaces(&mut self, place: &Place<'_>, wanted: &Wanted) -> Result<(), NetworkError> {
        for interface in &wanted.interfaces {
            let mut all = self.interfaces.iter();
            if all.any(|known| known.device == interface.device) {
                continue;
            }
            let known = place.attach(interface)?;
            self.interfaces.push(known);
            if let Some(known) = self.interfaces.last_mut() {
                place.enter(known, interface)?;
            }
        }
        Ok(())
    }

    /// Makes everything that belongs to interfaces, as far as it is not there. Also what was there
    /// before may have gone with something else: a route with its interface's state.
    fn add_items(&mut self, place: &Place<'_>, wanted: &Wanted) -> Result<(), NetworkError> {
        let mut links = HashMap::new();
        for known in &self.interfaces {
            if let Some(link) = place.link(known)? {
                links.insert(known.host, link);
            }
        }
        if let Some(link) = place.loopback()? {
            links.insert(LOOPBACK, link);
        }
        let indices = |suits: fn(&Link, &Item) -> bool, item: &Item| {
            let suiting = links.iter().filter(|(_, link)| suits(link, item));
            suiting.map(|(host, link)| (*host, link.index)).collect()
        };
        // The container may have taken an interface down, or away, or turned IPv6 off.
        let usable = |item: &Item| match item.kind {
            Kind::Address | Kind::Rule => item.translate(&indices(Link::takes, item)),
            Kind::Route | Kind::Neighbour => item.translate(&indices(Link::carries, item)),
        };
        for kind in Kind::ALL {
            let all = wanted.items.iter().filter(|item| item.kind == kind);
            let mut pending = all.filter_map(|item| Some((item, usable(item)?))).collect();
            loop {
                let before: &Vec<(&Item, Item)> = &pending;
                let mut refused = Vec::new();
                for (item, translated) in before {
                    let translated = prepared(item, translated.clone(), wanted);
                    match self.make(place, item, &translated) {
                        // The container has changed something that it needs.
                        Err(_) if self.items.contains(item) => {}
                        Err(refusal) => refused.push((*item, translated, refusal)),
                        Ok(()) => {}
                    }
                }
                // A route may need another one, to its gateway, that was made after it.
                let is_stuck = kind != Kind::Route || refused.len() == before.len();
                match refused.first() {
                    None => break,
                    Some(_) if !is_stuck => {}
                    Some(_) => {
                        let (item, _, refusal) = refused.swap_remove(0);
                        return Err(self.item_failed("make", item)(refusal));
                    }
                }
                let all = refused.into_iter();
                pending = all
                    .map(|(item, translated, _)| (item, translated))
                    .collect();
            }
        }
        for known in &mut self.interfaces {
            let Some(link) = links.get(&known.host).filter(|_| !known.makes_link_local) else {
                continue;
            };
            let addresses = wanted
                .items
                .iter()
                .filter(|one| one.indices() == [known.host]);
            let mut identifiers = addresses.filter_map(Item::link_local);
            // The host's own way to it is another one otherwise.
            if identifiers.any(|identifier| eui64(&link.address).as_deref() == Some(identifier)) {
                let set = place.inside.set_link_local(known.guest, LinkLocal::Eui64);
                set.map_err(known.failed("set the address generation of"))?;
                known.makes_link_local = true;
            }
        }
        Ok(())
    }

    /// Makes one of them, unless it is there.
    fn make(&mut self, place: &Place<'_>, item: &Item, translated: &Item) -> Result<(), Refusal> {
        let is_known = self.items.contains(item);
        let flags = creation(item, is_known);
        let made = item.kind.made_by();
        match place.inside.request(made, flags, &translated.bytes()) {
            Err(refusal) if refusal.errno() != Some(libc::EEXIST) => return Err(refusal),
            _ => {}
        }
        if !is_known {
            self.items.push(item.clone());
        }
        Ok(())
    }

    fn item_failed(&self, step: &'static str, item: &Item) -> impl FnOnce(Refusal) -> NetworkError {
        let indices = item.indices();
        let named = self.interfaces.iter();
        let named = named.filter(|known| indices.contains(&known.host));
        let names = named.map(|known| known.name.clone()).collect();
        let item = item.describe();
        move |source| NetworkError::Item {
            step,
            item,
            names,
            source,
        }
    }
}

impl Place<'_> {
    /// Makes an interface of a platform device, in the agent's namespace.
    fn attach(&self, interface: &Interface) -> Result<Known, NetworkError> {
        let Interface { name, device, .. } = interface;
        // Where it is now nobody knows, and what is behind it may have changed.
        if self.elsewhere.contains(device) {
            let detached = self.devices.detach(device);
            detached.map_err(|error| failed("reset", name, device)(error.into()))?;
        }
        let attached = || {
            let found = self.devices.attach(device)?;
            let link = self.outside.link_named(&found)?;
            link.ok_or_else(|| Refusal::from(io::Error::from_raw_os_error(libc::ENODEV)))
        };
        match attached() {
            Ok(link) => Ok(Known {
                host: interface.index,
                guest: link.index,
                device: device.clone(),
                name: name.clone(),
                mtu: interface.mtu,
                up: false,
                makes_link_local: true,
            }),
            Err(refusal) => {
                // The first error is the one to tell.
                let _ = self.devices.detach(device);
                Err(failed("bind the driver of", name, device)(refusal))
            }
        }
    }

    /// Moves a new interface into the namespace.
    fn enter(&self, known: &mut Known, interface: &Interface) -> Result<(), NetworkError> {
        let name = &interface.name;
        let namespace = self.namespace.as_raw_fd();
        let moved = self.outside.move_link(known.guest, namespace, name);
        moved.map_err(known.failed("move to the container"))?;
        let found = self
            .inside
            .link_named(name)
            .and_then(|link| link.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV).into()));
        known.guest = found.map_err(known.failed("find"))?.index;
        self.set_sysctls(name)?;
        let set = self.inside.set_mtu(known.guest, interface.mtu);
        set.map_err(known.failed("set the MTU of"))?;
        if interface.up {
            self.set_up(known, true)?;
        }
        Ok(())
    }

    /// Gives a new interface what a container's spec wants for it.
    fn set_sysctls(&self, name: &str) -> Result<(), NetworkError> {
        let of_it = |path: &str| sysctl_interface(path) == Some(name);
        for (path, value) in self.sysctls.iter().filter(|(path, _)| of_it(path)) {
            let written = fs::write(Path::new("/proc/sys").join(path), value);
            written.map_err(|error| NetworkError::Item {
                step: "set",
                item: format!("sysctl {path} to {value:?}"),
                names: vec![name.to_owned()],
                source: error.into(),
            })?;
        }
        Ok(())
    }

    /// Brings an interface up without an address that the kernel makes and has to try out first, or
    /// takes it down.
    fn set_up(&self, known: &mut Known, up: bool) -> Result<(), NetworkError> {
        if up && known.makes_link_local {
            let set = self.inside.set_link_local(known.guest, LinkLocal::None);
            set.map_err(known.failed("set the address generation of"))?;
            known.makes_link_local = false;
        }
        let set = self.inside.set_up(known.guest, up);
        set.map_err(known.failed(if up { "bring up" } else { "take down" }))?;
        known.up = up;
        Ok(())
    }

    fn link(&self, known: &Known) -> Result<Option<Link>, NetworkError> {
        let link = self.inside.link(known.guest);
        link.map_err(known.failed("look at"))
    }

    fn loopback(&self) -> Result<Option<Link>, NetworkError> {
        let link = self.inside.link(LOOPBACK);
        link.map_err(failed("look at", "lo", "loopback"))
    }
}

impl Link {
    /// Whether an address can be given to it.
    fn takes(&self, item: &Item) -> bool {
        !item.is_ipv6() || self.has_ipv6()
    }

    /// Whether packets can leave it.
    fn carries(&self, item: &Item) -> bool {
        self.up && self.takes(item)
    }

    /// Asks the namespace that the calling thread is in.
    fn has_ipv6(&self) -> bool {
        let path = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", self.name);
        fs::read_to_string(path).is_ok_and(|off| off.trim() == "0")
    }
}

/// It as the kernel is to be told of it.
fn prepared(item: &Item, translated: Item, wanted: &Wanted) -> Item {
    if item.kind != Kind::Address {
        return translated;
    }
    let mut interfaces = wanted.interfaces.iter();
    let up = interfaces.any(|one| one.up && item.indices() == [one.index]);
    let translated = translated.without_detection();
    match up && item.brings_route() && wanted.lacks_route_of(item) {
        true => translated.without_route(),
        false => translated,
    }
}

/// Whether there was nothing to remove.
fn is_absent(refusal: &Refusal) -> bool {
    let absent = [libc::ENOENT, libc::ESRCH, libc::EADDRNOTAVAIL, libc::ENODEV];
    refusal.errno().is_some_and(|errno| absent.contains(&errno))
}

/// How one is made. One that was there before is not made beside what the container has put into
/// its place.
fn creation(item: &Item, is_known: bool) -> u16 {
    match item.kind {
        Kind::Neighbour => NLM_F_CREATE | NLM_F_REPLACE,
        // The kernel keeps several IPv4 routes to one network in their order.
        Kind::Route if !is_known && item.is_ipv6() => NLM_F_CREATE,
        Kind::Route if !is_known => NLM_F_CREATE | NLM_F_APPEND,
        _ => NLM_F_CREATE | NLM_F_EXCL,
    }
}

fn names_any(item: &Item, hosts: &[u32]) -> bool {
    item.indices().iter().any(|index| hosts.contains(index))
}

/// The interface identifier that IPv6 makes of a hardware address, RFC 4291, appendix A.
fn eui64(address: &[u8]) -> Option<Vec<u8>> {
    let [a, b, c, d, e, f] = *<&[u8; 6]>::try_from(address).ok()?;
    Some(vec![a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}
