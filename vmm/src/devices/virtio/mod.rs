//! Virtio devices (Virtual I/O Device Version 1.2, OASIS) behind memory-mapped registers.
//!
//! A [`mmio::Transport`] owns a device and its queues behind one lock. vCPU threads take it for
//! accesses to registers, which happen while the guest's driver starts, and the device's own thread
//! takes it to work. The two registers of the interrupt path need no lock.

pub mod console;
pub mod fs;
pub mod mmio;
pub mod queue;
pub mod rng;
pub mod vsock;

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use vmm_sys_util::eventfd::EventFd;

use self::queue::QueueError;
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
    /// The largest size of each of its queues; powers of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// Its configuration space, which never changes.
    fn config(&self) -> &[u8] {
        &[]
    }
    /// Forgets everything that the driver has brought about.
    fn reset(&mut self) {}
}

const USED_BUFFER: u32 = 1;
const CONFIG_CHANGED: u32 = 2;

/// The way from a device to the guest: the interrupt status register and an irqfd.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    event: EventFd,
    stats: Arc<DeviceStats>,
}

impl Interrupt {
    /// An interrupt that is sent by writing to `event`.
    pub fn new(event: EventFd, stats: Arc<DeviceStats>) -> Self {
        Self {
            status: AtomicU32::new(0),
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
        self.send(USED_BUFFER);
    }

    /// Tells the driver to read the device's status again.
    pub fn config_changed(&self) {
        self.send(CONFIG_CHANGED);
    }

    fn send(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::SeqCst);
        self.stats.interrupted();
        event_loop::signal(&self.event);
    }

    fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    fn acknowledge(&self, reasons: u32) {
        self.status.fetch_and(!reasons, Ordering::SeqCst);
    }

    fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }
}

/// The result of working on queues: an error means that the driver broke the rules, and the device
/// then waits for a reset.
pub type Work = Result<(), QueueError>;
