//! Requests that a device understands, so that what is wrong with them is found deep inside.

use crate::{
    driver::{Buffer, Device, Queue},
    machine::store_bytes,
    random::Random,
};

/// The most buffers of a request.
pub const MAX_BUFFERS: usize = 4;
/// Bytes from the start of a request to the place of its answer, and of that to the next request.
pub const ROOM: u64 = 0x1_0000;

/// A request in memory.
#[derive(Clone, Copy)]
pub struct Request {
    /// Which queue it is for.
    pub queue: usize,
    /// Where it starts.
    pub at: u64,
    /// Bytes that were written there.
    pub length: u64,
    buffers: [Buffer; MAX_BUFFERS],
    count: usize,
}

impl Request {
    /// A request without buffers.
    pub fn new(queue: usize, at: u64, length: u64) -> Self {
        let none = Buffer {
            address: at,
            length: 0,
            writable: false,
        };
        Self {
            queue,
            at,
            length,
            buffers: [none; MAX_BUFFERS],
            count: 0,
        }
    }

    /// Adds a buffer.
    pub fn with(mut self, address: u64, length: u32, writable: bool) -> Self {
        if let Some(buffer) = self.buffers.get_mut(self.count) {
            *buffer = Buffer {
                address,
                length,
                writable,
            };
            self.count += 1;
        }
        self
    }

    /// Its buffers.
    pub fn buffers(&mut self) -> &mut [Buffer] {
        &mut self.buffers[..self.count]
    }
}

/// What is particular to a device's requests.
pub trait Requests {
    /// Where the device is.
    fn device(&self) -> Device;
    /// The largest sizes of its queues.
    fn queue_sizes(&self) -> &'static [u16];
    /// Features of this type of device that its driver accepts.
    fn features(&self) -> u64 {
        0
    }
    /// The device has just been started.
    fn started(&mut self, _device: Device, _queues: &mut [Queue]) {}
    /// Writes a request that the device will mostly carry out, to `at` and no further than [`ROOM`].
    fn make(&mut self, random: &mut Random, at: u64) -> Request;
    /// Learns from the answer to a request that was sent as it was made.
    fn answered(&mut self, _random: &mut Random, _request: &Request) {}
    /// Room for what the device sends unasked is offered again.
    fn refill(&mut self, _device: Device, _queues: &mut [Queue]) {}
}

/// The entropy device: one buffer to fill.
pub struct Rng;

impl Requests for Rng {
    fn device(&self) -> Device {
        Device::at(2)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[8]
    }

    fn make(&mut self, random: &mut Random, at: u64) -> Request {
        let length = random.pick(&[0, 1, 32, 64, 4095, 4096, 4097, 0x1_0000]);
        Request::new(0, at, 0).with(at, length, true).with(
            at + ROOM,
            random.pick(&[0, 8, 0x8000]),
            true,
        )
    }
}

/// The console: text.
pub struct Console;

impl Requests for Console {
    fn device(&self) -> Device {
        Device::at(4)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[16, 16]
    }

    fn make(&mut self, random: &mut Random, at: u64) -> Request {
        store_bytes(at, b"\x1b[2J\x00 hostile text\r\n");
        let length = random.pick(&[0, 1, 20, 4096, 4097, 0x1_0000, 0x10_0000]);
        Request::new(1, at, 20)
            .with(at, 20, false)
            .with(at, length, false)
    }
}
