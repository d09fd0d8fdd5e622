//! Packets of the socket device (section 5.10.6).

use crate::{
    driver::{BUFFERS, Buffer, Device, Queue},
    machine::{store, store16, store32},
    random::{Random, low},
    requests::{ROOM, Request, Requests},
};

/// Length of a header in bytes.
pub const HEADER: u32 = 44;
/// Room for a packet of the device.
pub const PACKET: u32 = 4096;
/// Operations.
pub const REQUEST: u16 = 1;
/// See [`REQUEST`].
pub const RESPONSE: u16 = 2;
/// See [`REQUEST`].
pub const RESET: u16 = 3;
/// See [`REQUEST`].
pub const SHUTDOWN: u16 = 4;
/// See [`REQUEST`].
pub const READ_WRITE: u16 = 5;

const GUEST: u64 = 3;
const HOST: u64 = 2;
/// Where the device's packets go, behind all requests.
const RECEIVED: u64 = BUFFERS + 64 * ROOM;

/// The fields of a header that differ among honest packets.
#[derive(Clone, Copy)]
pub struct Packet {
    /// Port of the guest.
    pub from: u32,
    /// Port of the host.
    pub to: u32,
    /// Bytes behind the header.
    pub length: u32,
    /// What it is for.
    pub operation: u16,
    /// How much the guest can take.
    pub buf_alloc: u32,
    /// How much it has taken.
    pub fwd_cnt: u32,
}

impl Packet {
    /// Writes the header.
    pub fn write(&self, at: u64) {
        store(at, GUEST, 8);
        store(at + 8, HOST, 8);
        store32(at + 16, self.from);
        store32(at + 20, self.to);
        store32(at + 24, self.length);
        store16(at + 28, 1);
        store16(at + 30, self.operation);
        store32(at + 32, 0);
        store32(at + 36, self.buf_alloc);
        store32(at + 40, self.fwd_cnt);
    }
}

/// Offers room for every packet that the device can have sent.
pub fn offer_room(queue: &mut Queue) {
    for entry in 0..u64::from(queue.size) {
        queue.offer(&[Buffer {
            address: RECEIVED + entry * u64::from(PACKET),
            length: PACKET,
            writable: true,
        }]);
    }
}

/// Where the packet in the room of `head` starts.
pub fn received(head: u16) -> u64 {
    RECEIVED + u64::from(head) * u64::from(PACKET)
}

/// A few connections, and what is said on them.
pub struct Vsock;

impl Requests for Vsock {
    fn device(&self) -> Device {
        Device::at(0)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64, 64, 8]
    }

    fn started(&mut self, device: Device, queues: &mut [Queue]) {
        if let Some(queue) = queues.first_mut() {
            offer_room(queue);
            device.kick(0);
        }
    }

    fn refill(&mut self, device: Device, queues: &mut [Queue]) {
        let Some(queue) = queues.first_mut() else {
            return;
        };
        let mut any = false;
        // What the rings say may be nonsense by now, and without end.
        for _ in 0..queue.size {
            let Some((head, _)) = queue.take_used() else {
                break;
            };
            queue.publish(head);
            any = true;
        }
        if any {
            device.kick(0);
        }
    }

    fn make(&mut self, random: &mut Random, at: u64) -> Request {
        let length = random.pick(&[0, 0, 1, 44, 1000, 4096, 0x8000]);
        let operation = match random.below(16) {
            0..=5 => REQUEST,
            6..=10 => READ_WRITE,
            // The last are for credit, and such as do not exist.
            _ => random.pick(&[RESPONSE, RESET, SHUTDOWN, SHUTDOWN, 6, 7, 0, 8, u16::MAX]),
        };
        let flood = random.once_in(4);
        let packet = Packet {
            from: if flood {
                random.word()
            } else {
                1000 + low(random.below(8))
            },
            to: 1024 + low(random.below(4)),
            length,
            operation,
            buf_alloc: random.pick(&[0, 1, 4096, 0x1_0000, 0x1_0000, u32::MAX]),
            fwd_cnt: if random.once_in(4) { random.word() } else { 0 },
        };
        packet.write(at);
        if operation == SHUTDOWN {
            store32(at + 32, random.pick(&[0, 1, 2, 3, u32::MAX]));
        }
        // The payload lies behind the header in a piece of its own, or in two with it.
        let early = random.pick(&[0, length / 2]);
        Request::new(1, at, HEADER.into())
            .with(at, HEADER + early, false)
            .with(at + u64::from(HEADER + early), length - early, false)
    }
}
