//! Virtio devices (Virtual I/O Device Version 1.2, OASIS) behind memory-mapped registers.
//!
//! A [`mmio::Transport`] owns a device and its queues behind one lock. vCPU threads take it for
//! writes to registers, which happen while the guest's driver starts, and the device's own thread
//! takes it to work. The two registers of the interrupt path need no lock.

pub mod console;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod registers;
pub mod rng;
pub mod vsock;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use self::{
    queue::QueueError,
    registers::{Registers, register},
};
use super::event_loop;
use crate::counters::DeviceStats;

/// What makes a device this device, for the transport.
pub trait Device: Send {
    /// Device type (section 5).
    fn id(&self) -> u32;
    /// Feature bits of this type of device (section 5, "Feature bits").
    fn features(&self) -> u64 {
        0
    }
    /// Whether it can work for a driver that has accepted these of its features.
    fn accepts(&self, _features: u64) -> bool {
        true
    }
    /// The largest size of each of its queues; powers of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// Its configuration space, which does not change while a driver uses it.
    fn config(&self) -> &[u8] {
        &[]
    }
    /// The driver has notified `queue` in a way that signals no event of the device's.
    fn notified(&mut self, _queue: u32) {}
    /// Forgets everything that the driver has brought about.
    fn reset(&mut self) {}
}

/// Interrupt status: look into the queues.
const USED_BUFFER: u32 = 1;
/// Interrupt status: look at the device's status.
const CONFIG_CHANGED: u32 = 2;
/// Interrupt status: there is no need to acknowledge. No bit of the specification; our guest kernel
/// knows it, others acknowledge it with the rest.
const NO_ACK: u32 = 1 << 31;

/// The interrupt status while the configuration has not changed.
///
/// It always says that a queue has used buffers, because the driver is interrupted for hardly
/// anything else and finds out by itself. So neither reading nor acknowledging it has to reach the
/// device.
pub const CALM: u32 = USED_BUFFER | NO_ACK;

/// The way from a device to the guest: the interrupt status register and an irqfd.
#[derive(Debug)]
pub struct Interrupt {
    registers: Arc<Registers>,
    event: Arc<EventFd>,
    stats: Arc<DeviceStats>,
}

impl Interrupt {
    /// An interrupt that is sent by writing to `event`.
    pub fn new(event: Arc<EventFd>, registers: Arc<Registers>, stats: Arc<DeviceStats>) -> Self {
        registers.set(register::INTERRUPT_STATUS, CALM);
        Self {
            registers,
            event,
            stats,
        }
    }

    /// The event to connect with KVM.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Tells the driver that a queue has used buffers.
    pub fn used_buffer(&self) {
        self.stats.interrupted();
        event_loop::signal(&self.event);
    }

    /// Tells the driver to read the device's status again.
    pub fn config_changed(&self) {
        self.set_config_changed(true);
        self.used_buffer();
    }

    fn is_config_changed(&self) -> bool {
        self.registers.get(register::INTERRUPT_STATUS) != CALM
    }

    fn acknowledge(&self, reasons: u32) {
        if reasons & CONFIG_CHANGED != 0 {
            self.set_config_changed(false);
        }
    }

    fn set_config_changed(&self, changed: bool) {
        let status = if changed {
            USED_BUFFER | CONFIG_CHANGED
        } else {
            CALM
        };
        self.registers.set(register::INTERRUPT_STATUS, status);
    }
}

/// The result of working on queues: an error means that the driver broke the rules, and the device
/// then waits for a reset.
pub type Work = Result<(), QueueError>;
