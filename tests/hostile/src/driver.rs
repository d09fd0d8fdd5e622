//! A driver that keeps to the rules of virtio (Virtual I/O Device Version 1.2, OASIS), as the start
//! of what does not.

use core::sync::atomic::{Ordering::SeqCst, fence};

use crate::{
    machine::{ARENA, DEVICE_SIZE, DEVICES, load, load16, load32, store, store16, store32, wait},
    random::{low, low16},
};

/// Offsets of registers (section 4.2.2).
pub mod register {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
}

/// A driver's steps (section 3.1.1).
pub const ACKNOWLEDGE: u32 = 1;
/// See [`ACKNOWLEDGE`].
pub const DRIVER: u32 = 2;
/// See [`ACKNOWLEDGE`].
pub const DRIVER_OK: u32 = 4;
/// See [`ACKNOWLEDGE`].
pub const FEATURES_OK: u32 = 8;
/// The device's word that the driver broke the rules.
pub const NEEDS_RESET: u32 = 64;

/// Indirect descriptors.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Notifications when an index is reached.
pub const EVENT_IDX: u64 = 1 << 29;
/// The version.
pub const VERSION_1: u64 = 1 << 32;

/// A descriptor goes on with another.
pub const NEXT: u16 = 1;
/// A descriptor's buffer is for the device to write.
pub const WRITE: u16 = 2;
/// A descriptor's buffer holds descriptors.
pub const INDIRECT: u16 = 4;

/// Bytes from one network device to the next.
const NIC_SIZE: u64 = 0x200;

/// Bytes from one queue's rings to the next one's.
const RINGS: u64 = 0x1_0000;
/// Queues of a device for which there is room.
const MAX_QUEUES: u64 = 5;
/// End of the rings of the device at the first place.
pub const RINGS_END: u64 = ARENA + MAX_QUEUES * RINGS;
/// Where requests lie.
pub const BUFFERS: u64 = ARENA + (2 << 20);
/// Cycles for which an answer is waited for: some tens of milliseconds.
pub const PATIENCE: u64 = 1 << 27;

/// A device's registers.
#[derive(Clone, Copy)]
pub struct Device {
    /// Their address.
    pub base: u64,
}

impl Device {
    /// The device at a place.
    pub fn at(place: u64) -> Self {
        Self {
            base: DEVICES + place * DEVICE_SIZE,
        }
    }

    /// The device of a network interface's slot.
    pub fn nic(slot: u64) -> Self {
        Self {
            base: DEVICES + 3 * DEVICE_SIZE + slot * NIC_SIZE,
        }
    }

    /// Reads a register.
    pub fn get(self, offset: u64) -> u32 {
        load32(self.base + offset)
    }

    /// Writes a register.
    pub fn set(self, offset: u64, value: u32) {
        store32(self.base + offset, value);
    }

    /// Writes a register of two halves.
    pub fn set64(self, offset: u64, value: u64) {
        self.set(offset, low(value));
        self.set(offset + 4, low(value >> 32));
    }

    /// The driver has started it, and it has nothing to complain about.
    pub fn is_running(self) -> bool {
        self.get(register::STATUS) & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }

    /// Takes everything back.
    pub fn reset(self) {
        self.set(register::STATUS, 0);
    }

    /// Goes up to where queues can be set up.
    pub fn negotiate(self, features: u64) {
        self.reset();
        self.set(register::STATUS, ACKNOWLEDGE);
        self.set(register::STATUS, ACKNOWLEDGE | DRIVER);
        for (half, features) in [(0, low(features)), (1, low(features >> 32))] {
            self.set(register::DRIVER_FEATURES_SEL, half);
            self.set(register::DRIVER_FEATURES, features);
        }
        self.set(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    /// Says that the driver is ready.
    pub fn go(self) {
        let ready = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.set(register::STATUS, ready);
    }

    /// Starts it with empty queues.
    pub fn start(self, features: u64, queues: &mut [Queue]) {
        self.negotiate(features);
        for queue in &mut *queues {
            queue.clear();
            queue.set_up(self);
        }
        self.go();
    }

    /// Notifies it.
    pub fn kick(self, queue: u32) {
        self.set(register::QUEUE_NOTIFY, queue);
    }
}

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    /// Where it is.
    pub address: u64,
    /// Its length in bytes.
    pub length: u32,
    /// It is for the device to write.
    pub writable: bool,
}

/// A queue at its place in the arena.
#[derive(Clone, Copy)]
pub struct Queue {
    /// Its number.
    pub index: u32,
    /// Its entries.
    pub size: u16,
    /// Its descriptors.
    pub descriptors: u64,
    /// The ring of chains for the device.
    pub available: u64,
    /// The ring of chains that the device has given back.
    pub used: u64,
    sent: u16,
    seen: u16,
    next: u16,
}

impl Queue {
    /// Queue `index` with `size` entries, of a device at `place`.
    pub fn new(place: u64, index: u32, size: u16) -> Self {
        let base = ARENA + (place * MAX_QUEUES + u64::from(index)) * RINGS;
        Self {
            index,
            size,
            descriptors: base,
            available: base + 0x4000,
            used: base + 0x8000,
            sent: 0,
            seen: 0,
            next: 0,
        }
    }

    /// Forgets everything, in memory too.
    pub fn clear(&mut self) {
        (self.sent, self.seen, self.next) = (0, 0, 0);
        for ring in [self.available, self.used] {
            for offset in (0..6 + 8 * u64::from(self.size)).step_by(8) {
                store(ring + offset, 0, 8);
            }
        }
    }

    /// Tells the device where it is.
    pub fn set_up(&self, device: Device) {
        device.set(register::QUEUE_SEL, self.index);
        device.set(register::QUEUE_NUM, self.size.into());
        device.set64(register::QUEUE_DESC, self.descriptors);
        device.set64(register::QUEUE_DRIVER, self.available);
        device.set64(register::QUEUE_DEVICE, self.used);
        device.set(register::QUEUE_READY, 1);
    }

    /// Writes a descriptor.
    pub fn describe(&self, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let at = self.descriptors + u64::from(index % self.size) * 16;
        let write = if buffer.writable { WRITE } else { 0 };
        let rest =
            u64::from(buffer.length) | u64::from(flags | write) << 32 | u64::from(next) << 48;
        // Each half in one piece: with a device that reads half of an address, nothing could be said
        // of where it writes.
        store(at, buffer.address, 8);
        store(at + 8, rest, 8);
    }

    /// Makes a chain of these buffers available and returns its head. Descriptors are taken in turn:
    /// no more chains may be on the way than there is room for.
    pub fn offer(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next;
        let last = buffers.len().saturating_sub(1);
        for (position, buffer) in buffers.iter().enumerate() {
            let index = self.next;
            self.next = (self.next + 1) % self.size;
            let flags = if position < last { NEXT } else { 0 };
            self.describe(index, *buffer, flags, self.next);
        }
        self.publish(head);
        head
    }

    /// Puts a head into the ring.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.sent % self.size);
        store16(self.available + 4 + slot * 2, head);
        self.sent = self.sent.wrapping_add(1);
        store16(self.available + 2, self.sent);
        // The device's next answer is worth an interrupt.
        let event = self.available + 4 + u64::from(self.size) * 2;
        store16(event, load16(self.used + 2));
        // Before the guest looks whether the answer is there already.
        fence(SeqCst);
    }

    /// The device has given back a chain that was not taken yet.
    pub fn has_used(&self) -> bool {
        load16(self.used + 2) != self.seen
    }

    /// Takes the next chain that the device has given back: its head, and the bytes written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let element = self.used + 4 + u64::from(self.seen % self.size) * 8;
        self.seen = self.seen.wrapping_add(1);
        Some((low16(load(element, 4)), load32(element + 4)))
    }

    /// Waits until all that was sent is back. False when it does not come, or the device breaks.
    pub fn settle(&mut self, device: Device) -> bool {
        let (used, sent) = (self.used + 2, self.sent);
        wait(PATIENCE, || load16(used) == sent || !device.is_running());
        self.seen = load16(used);
        self.seen == sent && device.is_running()
    }
}
