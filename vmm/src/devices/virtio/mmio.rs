//! The MMIO transport (section 4.2): registers, feature negotiation, device status and queue
//! set-up.
//!
//! Writes leave the guest and come here; what can be read lies ready in a page of
//! [`Registers`], which is brought up to date before the writer goes on.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Device, Interrupt, Work,
    queue::{self, QueueError, QueueState},
    registers::{Registers, register},
};
use crate::{bus::MmioDevice, counters::DeviceStats, memory::GuestMemory};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"BLKH");

const FEATURE_EVENT_IDX: u64 = 1 << 29;
const FEATURE_INDIRECT_DESC: u64 = 1 << 28;
const FEATURE_VERSION_1: u64 = 1 << 32;

bitflags! {
    /// Device status (section 2.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Status: u32 {
        /// The guest has noticed the device.
        const ACKNOWLEDGE = 1;
        /// The guest knows how to drive it.
        const DRIVER = 2;
        /// The driver is ready.
        const DRIVER_OK = 4;
        /// Features are agreed on.
        const FEATURES_OK = 8;
        /// The device cannot go on before a reset.
        const NEEDS_RESET = 64;
        /// The guest has given up on the device.
        const FAILED = 128;
    }
}

/// A saved transport that does not fit its device.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// Another number of queues.
    #[error("The saved device has {0} queues instead of {1}")]
    Queues(usize, usize),
    /// A queue with impossible values.
    #[error("Cannot restore a virtqueue")]
    Queue(#[source] QueueError),
    /// Another device, or none.
    #[error("The saved device is not like this one")]
    Device,
    /// Features that this device does not have, or status bits that do not exist.
    #[error("The saved device has features or a status that this one cannot have")]
    Features,
}

/// A transport as it is saved, without its device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    status: u32,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    config_changed: bool,
    queues: Vec<QueueState>,
}

/// What the transport's lock protects.
pub struct Inner<D> {
    /// The device.
    pub device: D,
    /// Its queues.
    pub queues: Vec<Queue>,
    /// Chains or queues that are worked on without the lock; a reset waits for them.
    pub in_flight: usize,
    resetting: usize,
    waiting: usize,
    status: Status,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
}

impl<D> Inner<D> {
    /// The driver is ready, has kept to the rules so far, and is not about to be reset.
    pub fn is_running(&self) -> bool {
        self.resetting == 0
            && self.status.contains(Status::DRIVER_OK)
            && !self.status.contains(Status::NEEDS_RESET)
    }

    /// The driver has accepted these features, all of them.
    pub fn has_features(&self, features: u64) -> bool {
        self.driver_features & features == features
    }

    fn queue(&mut self) -> Option<&mut Queue> {
        let index = usize::try_from(self.queue_sel).ok()?;
        self.queues.get_mut(index)
    }
}

/// A device in the guest's memory.
pub struct Transport<D> {
    inner: Mutex<Inner<D>>,
    /// What the guest reads.
    pub registers: Arc<Registers>,
    idle: Condvar,
    /// Guest memory.
    pub memory: GuestMemory,
    /// Signalled by the guest's notifications.
    pub kick: Arc<EventFd>,
    /// The way to the guest.
    pub interrupt: Interrupt,
    /// Its counters.
    pub stats: Arc<DeviceStats>,
}

impl<D: Device> Transport<D> {
    /// A device after power-on.
    pub fn new(
        device: D,
        memory: GuestMemory,
        kick: impl Into<Arc<EventFd>>,
        interrupt: impl Into<Arc<EventFd>>,
    ) -> Self {
        Self::with_registers(device, Registers::default(), memory, kick, interrupt)
    }

    /// A device after power-on whose registers are there.
    pub fn with_registers(
        device: D,
        registers: Registers,
        memory: GuestMemory,
        kick: impl Into<Arc<EventFd>>,
        interrupt: impl Into<Arc<EventFd>>,
    ) -> Self {
        let stats = Arc::new(DeviceStats::default());
        let registers = Arc::new(registers);
        for (offset, value) in [
            (register::MAGIC, MAGIC),
            (register::VERSION, VERSION),
            (register::VENDOR_ID, VENDOR),
            // All ones is the length of a shared memory region that does not exist.
            (register::SHM_LEN_LOW, u32::MAX),
            (register::SHM_LEN_HIGH, u32::MAX),
            (register::SHM_BASE_LOW, u32::MAX),
            (register::SHM_BASE_HIGH, u32::MAX),
        ] {
            registers.set(offset, value);
        }
        let inner = Inner {
            queues: new_queues(&device),
            device,
            in_flight: 0,
            resetting: 0,
            waiting: 0,
            status: Status::empty(),
            driver_features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
        };
        let interrupt = Interrupt::new(interrupt.into(), registers.clone(), stats.clone());
        let transport = Self {
            inner: Mutex::new(inner),
            registers,
            idle: Condvar::new(),
            memory,
            kick: kick.into(),
            interrupt,
            stats,
        };
        let mut inner = transport.lock();
        transport.introduce(&inner.device);
        transport.publish(&mut inner);
        drop(inner);
        transport
    }

    /// Takes the lock.
    pub fn lock(&self) -> MutexGuard<'_, Inner<D>> {
        // A panic in a device ends the process in release builds; state is not left half-way.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `work` work on device and queues if the driver is ready. An error stops the device.
    pub fn run(&self, work: impl FnOnce(&mut D, &mut [Queue]) -> Work) {
        let mut inner = self.lock();
        if !inner.is_running() {
            return;
        }
        let Inner { device, queues, .. } = &mut *inner;
        if work(device, queues).is_err() {
            self.stop(&mut inner);
        }
    }

    /// Stops the device after the driver broke the rules (section 2.1.2).
    pub fn stop(&self, inner: &mut Inner<D>) {
        inner.status |= Status::NEEDS_RESET;
        self.publish(inner);
        self.interrupt.config_changed();
    }

    /// Makes the device another one of another type or configuration, once nothing is in flight. It is
    /// as after power-on, except that a driver that was at the old one learns that it must reset.
    pub fn exchange<T>(&self, change: impl FnOnce(&mut D) -> T) -> T {
        let mut inner = self.when_idle(self.lock(), |inner| {
            let driven = !inner.status.is_empty();
            self.reset(inner);
            if driven {
                self.stop(inner);
            }
        });
        let result = change(&mut inner.device);
        inner.queues = new_queues(&inner.device);
        self.introduce(&inner.device);
        self.publish(&mut inner);
        result
    }

    /// Waits until something that is worked on without the lock is back.
    pub fn wait<'l>(&self, mut inner: MutexGuard<'l, Inner<D>>) -> MutexGuard<'l, Inner<D>> {
        inner.waiting += 1;
        let mut inner = self
            .idle
            .wait(inner)
            .unwrap_or_else(PoisonError::into_inner);
        inner.waiting -= 1;
        inner
    }

    /// Calls `work` once nothing is in flight. Nothing new begins until then.
    pub fn when_idle<'l>(
        &self,
        mut inner: MutexGuard<'l, Inner<D>>,
        work: impl FnOnce(&mut Inner<D>),
    ) -> MutexGuard<'l, Inner<D>> {
        inner.resetting += 1;
        while inner.in_flight > 0 {
            inner = self.wait(inner);
        }
        inner.resetting -= 1;
        work(&mut inner);
        inner
    }

    /// Shows the guest what the device is.
    fn introduce(&self, device: &D) {
        self.registers.set_config(device.config());
        self.registers.set(register::DEVICE_ID, device.id());
    }

    /// Shows the guest the registers that change.
    fn publish(&self, inner: &mut Inner<D>) {
        let features = half(features(&inner.device), inner.device_features_sel);
        let (max_size, ready) = inner
            .queue()
            .map_or((0, false), |queue| (queue.max_size(), queue.ready()));
        self.registers.set(register::DEVICE_FEATURES, features);
        self.registers.set(register::QUEUE_NUM_MAX, max_size.into());
        self.registers.set(register::QUEUE_READY, ready.into());
        self.registers.set(register::STATUS, inner.status.bits());
    }

    /// A chain or queue that was worked on without the lock is done.
    pub fn settle(&self, inner: &mut Inner<D>) {
        inner.in_flight -= 1;
        if inner.waiting > 0 {
            self.idle.notify_all();
        }
    }

    /// Takes down registers and queues. Nothing may be in flight.
    pub fn save(&self) -> TransportState {
        let inner = self.lock();
        TransportState {
            status: inner.status.bits(),
            driver_features: inner.driver_features,
            device_features_sel: inner.device_features_sel,
            driver_features_sel: inner.driver_features_sel,
            queue_sel: inner.queue_sel,
            config_changed: self.interrupt.is_config_changed(),
            queues: inner.queues.iter().map(queue::save).collect(),
        }
    }

    /// Puts saved registers and queues into a new transport.
    pub fn restore(&self, state: &TransportState) -> Result<(), RestoreError> {
        let mut inner = self.lock();
        let sizes = inner.device.queue_sizes();
        if state.queues.len() != sizes.len() {
            return Err(RestoreError::Queues(state.queues.len(), sizes.len()));
        }
        let offered = features(&inner.device);
        let status = Status::from_bits(state.status).ok_or(RestoreError::Features)?;
        if state.driver_features & !offered != 0 {
            return Err(RestoreError::Features);
        }
        let queues = state
            .queues
            .iter()
            .zip(sizes)
            .map(|(state, max_size)| queue::restore(state, *max_size))
            .collect::<Result<Vec<_>, _>>()
            .map_err(RestoreError::Queue)?;
        inner.queues = queues;
        inner.status = status;
        inner.driver_features = state.driver_features;
        inner.device_features_sel = state.device_features_sel;
        inner.driver_features_sel = state.driver_features_sel;
        inner.queue_sel = state.queue_sel;
        self.interrupt.set_config_changed(state.config_changed);
        self.publish(&mut inner);
        Ok(())
    }

    fn write_register(&self, offset: u64, value: u32) {
        if offset == register::INTERRUPT_ACK {
            self.interrupt.acknowledge(value);
            return;
        }
        let mut inner = self.lock();
        match offset {
            register::DEVICE_FEATURES_SEL => inner.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => inner.driver_features_sel = value,
            register::DRIVER_FEATURES => accept_features(&mut inner, value),
            register::QUEUE_SEL => inner.queue_sel = value,
            register::QUEUE_NOTIFY => inner.device.notified(value),
            register::STATUS => inner = self.set_status(inner, value),
            _ => self.configure_queue(&mut inner, offset, value),
        }
        self.publish(&mut inner);
    }

    /// Returns the lock, which it gives up while it waits for chains in flight.
    fn set_status<'l>(
        &self,
        mut inner: MutexGuard<'l, Inner<D>>,
        value: u32,
    ) -> MutexGuard<'l, Inner<D>> {
        if value == 0 {
            return self.when_idle(inner, |inner| self.reset(inner));
        }
        let old = inner.status;
        let new = Status::from_bits_truncate(value) | (old & Status::NEEDS_RESET);
        // The driver can take no bit back (section 2.1.1).
        if !new.contains(old) {
            return inner;
        }
        let added = new - old;
        inner.status = new;
        if added.contains(Status::FEATURES_OK) && !features_agreed(&inner) {
            inner.status -= Status::FEATURES_OK;
        }
        if added.contains(Status::DRIVER_OK) {
            if inner.status.contains(Status::FEATURES_OK) {
                let event_idx = inner.driver_features & FEATURE_EVENT_IDX != 0;
                for queue in &mut inner.queues {
                    queue.set_event_idx(event_idx);
                }
            } else {
                self.stop(&mut inner);
            }
        }
        inner
    }

    fn reset(&self, inner: &mut Inner<D>) {
        inner.device.reset();
        inner.queues.iter_mut().for_each(QueueT::reset);
        inner.status = Status::empty();
        inner.driver_features = 0;
        inner.device_features_sel = 0;
        inner.driver_features_sel = 0;
        inner.queue_sel = 0;
        self.interrupt.set_config_changed(false);
    }

    /// Writes one of the selected queue's registers, which the driver may do between agreeing on
    /// features and being ready (section 3.1.1).
    fn configure_queue(&self, inner: &mut Inner<D>, offset: u64, value: u32) {
        let open = inner.status.contains(Status::FEATURES_OK)
            && !inner
                .status
                .intersects(Status::DRIVER_OK | Status::NEEDS_RESET | Status::FAILED);
        let Some(queue) = inner.queue() else { return };
        if !open {
            return;
        }
        if offset == register::QUEUE_READY {
            queue.set_ready(value == 1);
            if !queue.is_valid(&self.memory) {
                queue.set_ready(false);
            }
            return;
        }
        if queue.ready() {
            return;
        }
        match offset {
            register::QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            register::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            register::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }
}

impl<D: Device> MmioDevice for Transport<D> {
    fn write(&self, offset: u64, data: &[u8]) {
        // No device of ours has a configuration that the driver can write.
        if offset < register::CONFIG
            && let Ok(data) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

fn new_queues(device: &impl Device) -> Vec<Queue> {
    // Fails only for a size that is no power of two, and a device's sizes are constants.
    let new = |size: &u16| Queue::new(*size).unwrap_or_default();
    device.queue_sizes().iter().map(new).collect()
}

fn features(device: &impl Device) -> u64 {
    device.features() | FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC
}

fn half(features: u64, selector: u32) -> u32 {
    let shifted = match selector {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(shifted & u64::from(u32::MAX)).unwrap_or(0)
}

fn accept_features<D>(inner: &mut Inner<D>, value: u32) {
    let may = inner.status.contains(Status::DRIVER) && !inner.status.contains(Status::FEATURES_OK);
    let low = u64::from(u32::MAX);
    match inner.driver_features_sel {
        0 if may => inner.driver_features = inner.driver_features & !low | u64::from(value),
        1 if may => inner.driver_features = inner.driver_features & low | u64::from(value) << 32,
        _ => {}
    }
}

fn features_agreed<D: Device>(inner: &Inner<D>) -> bool {
    let accepted = inner.driver_features;
    accepted & !features(&inner.device) == 0
        && accepted & FEATURE_VERSION_1 != 0
        && inner.device.accepts(accepted)
}

#[cfg(test)]
pub(super) mod tests;
