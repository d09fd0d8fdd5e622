//! Network device (section 5.1) between a slot of the VM and the queues of a tap.
//!
//! The slots of a VM are there from its boot, without a device. One becomes a network device when an
//! interface is attached to it, and is empty again once that is detached.
//!
//! Packets go straight between the tap and the guest's buffers, each with the header that the tap and
//! virtio have in common, in which either side leaves checksums and segmentation to the other. A
//! queue pair and its tap are a lane. Each lane has a thread, which serves this lane of all slots; it
//! borrows queues and tap from the device and works without the transport's lock.

mod buffers;
mod control;
mod lane;
mod limits;
mod tap;
#[cfg(test)]
mod tests;
mod workers;

use std::{os::fd::OwnedFd, sync::Arc};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use self::{buffers::Buffers, tap::Tap};
pub use self::{
    lane::{LaneState, NetHandler, Turn},
    limits::Limits,
    workers::NetWorkers,
};
use super::{
    Device,
    mmio::{RestoreError, TransportState},
};
use crate::devices::event_loop::{self, EventLoopError};

const DEVICE_ID: u32 = 1;
/// Of each lane first the queue to the guest and then that from it; last the one for commands, which
/// is there when there are several lanes.
const QUEUE_SIZES: &[u16] = &[256; 2 * MAX_LANES + 1];
const MAX_LANES: usize = bulkhead_vmm_control::MAX_QUEUE_PAIRS as usize;

/// `struct virtio_net_hdr_v1`.
const HEADER_LEN: usize = 12;
/// The longest packet: the header, Ethernet's with a VLAN tag, and what a segmentation may join.
const MAX_PACKET: usize = HEADER_LEN + 18 + (1 << 16);
/// The smallest MTU of IPv4, and the smallest that the specification allows (section 5.1.4.1).
const MIN_MTU: u16 = 68;

/// Feature bits (section 5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const MQ: u64 = 1 << 22;

    /// What a tap delivers, in buffers of any size. It is told when it is made, so there is no doing
    /// without. `GUEST_ECN` is not among it: a tap splits such packets itself.
    pub const NEEDED: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | MRG_RXBUF;
    /// What the driver may use.
    pub const OFFERED: u64 = NEEDED | CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | MAC | MTU | STATUS;
    /// With several lanes: the driver says how many it uses.
    pub const SEVERAL: u64 = CTRL_VQ | MQ;
}

/// `VIRTIO_NET_S_LINK_UP`
const LINK_UP: u16 = 1;

/// An interface that cannot be attached or detached.
#[derive(Debug, Error)]
pub enum NicError {
    /// A slot that no VM has.
    #[error("There is no network device {0}")]
    NoSlot(u8),
    /// The slot has an interface.
    #[error("Network device {0} has an interface already")]
    Taken(u8),
    /// The slot has none.
    #[error("Network device {0} has no interface")]
    Empty(u8),
    /// None, or more than the VM has threads for.
    #[error("{0} queues of a tap came for a network interface, and not 1 to {1}")]
    Queues(usize, usize),
    /// Smaller than any network's.
    #[error("An MTU of {0} bytes is less than {MIN_MTU}")]
    Mtu(u16),
    /// A queue of a tap cannot be waited for.
    #[error("Cannot use a queue of a tap")]
    Watch(#[source] EventLoopError),
}

/// What notifies each lane of a slot.
pub type Kicks = Arc<[Arc<EventFd>]>;

/// What makes a slot a network device.
#[derive(Debug)]
pub struct Interface {
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its MTU in bytes.
    pub mtu: u16,
    /// A queue of its tap for each lane, none of which blocks.
    pub taps: Vec<OwnedFd>,
}

/// The device, or an empty slot.
pub struct Net {
    kicks: Kicks,
    nic: Option<Nic>,
}

struct Nic {
    /// MAC address, status, lanes, MTU (section 5.1.4).
    config: [u8; 12],
    /// Gone while its thread works with it.
    taps: Vec<Option<Tap>>,
    /// What the guest has offered for packets; gone while a thread works with it.
    buffers: Vec<Option<Buffers>>,
    /// How many lanes bring packets to the guest.
    active: usize,
}

impl Net {
    /// An empty slot, whose lanes are notified by `kicks`.
    pub fn new(kicks: Kicks) -> Self {
        Self { kicks, nic: None }
    }

    fn lanes(&self) -> usize {
        self.nic.as_ref().map_or(0, |nic| nic.taps.len())
    }

    /// Has the threads of all lanes look at them.
    fn wake_all(&self) {
        self.kicks.iter().for_each(|kick| event_loop::signal(kick));
    }
}

impl Nic {
    fn new(interface: Interface) -> Self {
        let taps: Vec<_> = interface
            .taps
            .into_iter()
            .map(|tap| Some(Tap::new(tap)))
            .collect();
        let mut config = [0; 12];
        config[..6].copy_from_slice(&interface.mac);
        let lanes = u16::try_from(taps.len()).unwrap_or(u16::MAX);
        for (field, value) in [(6, LINK_UP), (8, lanes), (10, interface.mtu)] {
            config[field..field + 2].copy_from_slice(&value.to_le_bytes());
        }
        Self {
            config,
            buffers: taps.iter().map(|_| Some(Buffers::default())).collect(),
            taps,
            active: 1,
        }
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        // Linux takes a device without a type for a place where there is none yet.
        if self.nic.is_some() { DEVICE_ID } else { 0 }
    }

    fn features(&self) -> u64 {
        match self.lanes() {
            0 => 0,
            1 => feature::OFFERED,
            _ => feature::OFFERED | feature::SEVERAL,
        }
    }

    fn accepts(&self, features: u64) -> bool {
        // Without one of these two the other makes no sense, and the place of a queue would change.
        let several = features & feature::SEVERAL;
        features & feature::NEEDED == feature::NEEDED
            && (several == 0 || several == feature::SEVERAL)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        let count = match self.lanes() {
            lanes @ 0..=1 => 2 * lanes,
            lanes => 2 * lanes + 1,
        };
        &QUEUE_SIZES[..count]
    }

    fn config(&self) -> &[u8] {
        self.nic.as_ref().map_or(&[0; 12], |nic| &nic.config)
    }

    fn notified(&mut self, queue: u32) {
        let lane = usize::try_from(queue / 2).ok();
        // Commands are for the first.
        let lane = lane.filter(|lane| *lane < self.lanes()).unwrap_or(0);
        if let Some(kick) = self.kicks.get(lane) {
            event_loop::signal(kick);
        }
    }

    fn reset(&mut self) {
        if let Some(nic) = &mut self.nic {
            nic.active = 1;
            nic.buffers.iter_mut().flatten().for_each(Buffers::clear);
        }
    }
}

/// The saved device, without its taps: it is restored into a slot with an interface like it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    transport: TransportState,
    active: usize,
}

impl NetHandler {
    /// Makes an empty slot the device of `interface`, or gives the interface back.
    pub fn attach(&self, interface: Interface) -> Result<(), Interface> {
        self.transport.exchange(|device| {
            if device.nic.is_some() {
                return Err(interface);
            }
            device.nic = Some(Nic::new(interface));
            Ok(())
        })
    }

    /// Empties the slot and returns the queues of the tap, or nothing where there is no interface.
    /// Nothing uses them any more.
    pub fn detach(&self) -> Option<Vec<OwnedFd>> {
        let nic = self.transport.exchange(|device| device.nic.take())?;
        Some(nic.taps.into_iter().flatten().map(Tap::close).collect())
    }

    /// Takes down the device. Nothing may be in flight.
    pub fn save(&self) -> State {
        let active = {
            let mut inner = self.transport.lock();
            let inner = &mut *inner;
            inner.device.nic.as_mut().map_or(1, |nic| {
                // Buffers that wait for packets are the guest's again.
                let to_guest = inner.queues.iter_mut().step_by(2);
                for (buffers, queue) in nic.buffers.iter_mut().flatten().zip(to_guest) {
                    buffers.give_up(queue);
                }
                nic.active
            })
        };
        State {
            transport: self.transport.save(),
            active,
        }
    }

    /// Puts a saved device into a new one.
    pub fn restore(&self, state: &State) -> Result<(), RestoreError> {
        let lanes = self.transport.lock().device.lanes();
        if !(1..=lanes.max(1)).contains(&state.active) {
            return Err(RestoreError::Device);
        }
        self.transport.restore(&state.transport)?;
        let mut inner = self.transport.lock();
        if let Some(nic) = &mut inner.device.nic {
            nic.active = state.active;
            nic.buffers.iter_mut().flatten().for_each(Buffers::clear);
        }
        inner.device.wake_all();
        Ok(())
    }
}
