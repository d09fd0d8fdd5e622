//! Packets and commands of a network device (section 5.1.6).

use crate::{
    driver::{BUFFERS, Buffer, Device, Queue},
    machine::{store, store_bytes, store16},
    random::Random,
    requests::{ROOM, Request, Requests},
};

/// `VIRTIO_NET_F_GUEST_CSUM`, `_GUEST_TSO4`, `_GUEST_TSO6`, `_MRG_RXBUF`, without which the device does
/// not work, and `_CTRL_VQ` and `_MQ`.
const FEATURES: u64 = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 15 | 1 << 17 | 1 << 22;
/// Entries of each queue.
const SIZE: u16 = 256;
/// The queue for commands.
const COMMANDS: usize = 4;
const HEADER: u32 = 12;
/// Room for a packet of the device, or a part of one.
const PIECE: u32 = 4096;
/// Where the device's packets go, behind all requests.
const RECEIVED: u64 = BUFFERS + 64 * ROOM;

/// Two pairs of queues, and the one for commands.
pub struct Net;

/// Those of the queues that bring packets.
fn to_guest(queues: &mut [Queue]) -> impl Iterator<Item = &mut Queue> {
    queues.iter_mut().take(COMMANDS).step_by(2)
}

impl Requests for Net {
    fn device(&self) -> Device {
        Device::nic(0)
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[SIZE; COMMANDS + 1]
    }

    fn started(&mut self, device: Device, queues: &mut [Queue]) {
        for queue in to_guest(queues) {
            for entry in 0..u64::from(queue.size) {
                queue.offer(&[Buffer {
                    address: RECEIVED + entry * u64::from(PIECE),
                    length: PIECE,
                    writable: true,
                }]);
            }
            device.kick(queue.index);
        }
    }

    fn refill(&mut self, device: Device, queues: &mut [Queue]) {
        for queue in to_guest(queues) {
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
                device.kick(queue.index);
            }
        }
    }

    fn make(&mut self, random: &mut Random, at: u64) -> Request {
        if random.once_in(8) {
            store16(at, random.pick(&[4, 4, 4, 0, 0x104]));
            store16(at + 2, random.pick(&[1, 2, 2, 0, 3, u16::MAX]));
            let length = random.pick(&[4, 4, 4, 0, 3, 5]);
            return Request::new(COMMANDS, at, 4)
                .with(at, length, false)
                .with(at + ROOM, 1, true);
        }
        // Flags, kind of segmentation, lengths and places in the packet.
        store(at, random.number(), 8);
        store(at + 8, random.number(), 4);
        store_bytes(at + u64::from(HEADER), b"\xff\xff\xff\xff\xff\xffhostile");
        let length = random.pick(&[0, 1, 60, 1514, 9000, 0xffff, 0x1_0000]);
        let early = random.pick(&[0, length / 2]);
        let queue = random.pick(&[1, 1, 3]);
        Request::new(queue, at, HEADER.into())
            .with(at, HEADER + early, false)
            .with(at + u64::from(HEADER + early), length - early, false)
    }
}
