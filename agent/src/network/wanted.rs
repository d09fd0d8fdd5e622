//! What the host says that a network namespace is to have.

use std::collections::HashSet;

use bulkhead_agent_api::messages::{Interface, NetworkRequest};

use super::{
    items::{Item, Kind, LOOPBACK, is_kernel_route},
    reconcile::NetworkError,
};

/// Longest name of an interface, in bytes: `IFNAMSIZ` - 1.
const NAME_MAX: usize = 15;

/// What a namespace is to have.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Its interfaces, no two of one name, device or index.
    pub interfaces: Vec<Interface>,
    /// What belongs to these, in the order in which it is made.
    pub items: Vec<Item>,
    /// Whether the routes that the host's kernel made by itself are among them. There are always
    /// some of the loopback interface.
    kernel_routes: bool,
}

impl Wanted {
    /// Reads and checks a request.
    pub fn read(request: &NetworkRequest) -> Result<Self, NetworkError> {
        let interfaces = request.interfaces.clone();
        for interface in &interfaces {
            check(interface)?;
        }
        let unique = |values: HashSet<String>, what: &str| match values.len() == interfaces.len() {
            true => Ok(()),
            false => Err(NetworkError::Invalid(format!(
                "two interfaces have one {what}"
            ))),
        };
        let all = || interfaces.iter();
        unique(all().map(|one| one.name.clone()).collect(), "name")?;
        unique(all().map(|one| one.device.clone()).collect(), "device")?;
        unique(all().map(|one| one.index.to_string()).collect(), "index")?;
        let mut items = Vec::new();
        for kind in Kind::ALL {
            let messages = match kind {
                Kind::Address => &request.addresses,
                Kind::Route => &request.routes,
                Kind::Rule => &request.rules,
                Kind::Neighbour => &request.neighbours,
            };
            for bytes in messages {
                let item = Item::read(kind, bytes);
                let invalid = |error| NetworkError::Invalid(format!("{}: {error}", kind.name()));
                items.extend(item.map_err(invalid)?);
            }
        }
        // Stable: the host's order is kept otherwise.
        items.sort_by_key(|item| (item.kind, item.has_gateway()));
        // The host tells its user of interfaces that the guest does not have.
        let known: HashSet<u32> = all().map(|one| one.index).chain([LOOPBACK]).collect();
        items.retain(|item| item.indices().iter().all(|index| known.contains(index)));
        for item in &mut items {
            let owner = all().find(|one| item.indices() == [one.index]);
            item.without_label(owner.map_or("lo", |owner| owner.name.as_str()));
        }
        Ok(Self {
            interfaces,
            items,
            kernel_routes: request.routes.iter().any(|route| is_kernel_route(route)),
        })
    }

    /// The platform devices of the interfaces.
    pub fn devices(&self) -> impl Iterator<Item = &str> {
        self.interfaces.iter().map(|one| one.device.as_str())
    }

    /// The interface of a platform device that has this index on the host.
    pub fn interface(&self, device: &str, host: u32) -> Option<&Interface> {
        let mut all = self.interfaces.iter();
        all.find(|one| one.device == device && one.index == host)
    }

    /// Whether somebody has taken away the route that the host's kernel made with an address.
    pub fn lacks_route_of(&self, address: &Item) -> bool {
        self.kernel_routes && !self.items.iter().any(|item| item.is_route_of(address))
    }
}

fn check(interface: &Interface) -> Result<(), NetworkError> {
    let Interface { name, device, .. } = interface;
    // Of the kernel's own rules those on which more hangs than its refusal.
    let bad_name = name.is_empty() || name.len() > NAME_MAX || name.contains(['/', '%', '\0']);
    let bad_device = device.is_empty() || device.contains(['/', '\0']) || device.starts_with('.');
    let bad_index = interface.index <= LOOPBACK;
    if bad_name || bad_device || bad_index {
        return Err(NetworkError::Invalid(format!(
            "interface {name:?} with index {} at device {device:?}",
            interface.index
        )));
    }
    Ok(())
}
