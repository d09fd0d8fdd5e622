//! Attacks on a virtio device, mixed with requests as they should be.

use crate::{
    driver::{
        BUFFERS, Device, EVENT_IDX, INDIRECT, INDIRECT_DESC, NEXT, Queue, RINGS_END, VERSION_1,
        WRITE, register,
    },
    machine::{ARENA, DEVICES, MEMORY_END, load, store, store16},
    race::{SLOTS, Second},
    random::{Random, low, low16},
    requests::{ROOM, Requests},
};

/// Most queues of a device.
const MAX_QUEUES: usize = 5;
/// Where descriptors lie that others point to: behind everything else.
const TABLES: u64 = ARENA + (8 << 20);

/// A device under attack.
pub struct Rig<R> {
    requests: R,
    device: Device,
    queues: [Queue; MAX_QUEUES],
    count: usize,
    random: Random,
    second: Second,
    slot: u64,
    answers: u64,
}

impl<R: Requests> Rig<R> {
    /// The device for these requests, as it is after power-on.
    pub fn new(requests: R, seed: u64, second: Second) -> Self {
        Self {
            device: requests.device(),
            queues: [Queue::new(0, 0, 8); MAX_QUEUES],
            count: requests.queue_sizes().len(),
            requests,
            random: Random::new(seed),
            second,
            slot: 0,
            answers: 0,
        }
    }

    /// One attack, or some honest requests.
    pub fn round(&mut self) {
        if !self.device.is_running() && self.random.below(8) > 0 {
            self.restart();
        }
        self.requests
            .refill(self.device, &mut self.queues[..self.count]);
        match self.random.below(20) {
            0..=5 => (0..4).for_each(|_| self.ask_honestly()),
            6..=9 => self.ask_wrongly(),
            10..=12 => self.chain(),
            13 => self.ring(),
            14 => self.registers(),
            15 => self.states(),
            16 => self.misplace(),
            17 => self.abort(),
            _ => self.race(),
        }
    }

    /// Ends the device's work, and returns how many honest requests were answered, and who else did
    /// all this.
    pub fn finish(self) -> (u64, Second) {
        self.second.wait();
        self.device.reset();
        (self.answers, self.second)
    }

    fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues[..self.count]
    }

    fn any_queue(&mut self) -> usize {
        self.random.index(self.count)
    }

    fn restart(&mut self) {
        let mut features = VERSION_1 | self.requests.features();
        for feature in [EVENT_IDX, INDIRECT_DESC] {
            features |= self.random.below(4).min(1) * feature;
        }
        for (index, size) in self.requests.queue_sizes().iter().enumerate() {
            let smaller = self.random.pick(&[*size, *size, *size / 2, 8]);
            self.queues[index] = Queue::new(0, low(index as u64), smaller);
        }
        let device = self.device;
        device.start(features, self.queues());
        self.requests
            .started(device, &mut self.queues[..self.count]);
    }

    /// Waits until a queue's chains are back. Numbers that do not add up any more end in a reset.
    fn settle(&mut self, queue: usize) -> bool {
        let settled = self.queues[queue].settle(self.device);
        if !settled {
            self.device.reset();
        }
        settled
    }

    /// Where the next request goes.
    fn slot(&mut self) -> u64 {
        self.slot = (self.slot + 1) % SLOTS;
        BUFFERS + self.slot * 2 * ROOM
    }

    /// A few requests at once, and the wait for all answers.
    fn ask_honestly(&mut self) {
        let count = 1 + self.random.index(4);
        let mut sent = [None; 4];
        for place in &mut sent[..count] {
            let at = self.slot();
            let mut request = self.requests.make(&mut self.random, at);
            // Nothing must look like an answer before there is one.
            store(at + ROOM, 0, 8);
            store(at + ROOM + 8, 0, 8);
            let room = usize::from(self.queues[request.queue].size);
            if request.buffers().len() * count <= room {
                self.queues[request.queue].offer(request.buffers());
                *place = Some(request);
            }
        }
        for request in sent.iter().flatten() {
            self.device.kick(low(request.queue as u64));
        }
        for request in sent.iter().flatten() {
            if self.settle(request.queue) {
                self.answers += 1;
                self.requests.answered(&mut self.random, request);
            }
        }
    }

    /// A request with something wrong in its bytes or its buffers.
    fn ask_wrongly(&mut self) {
        let at = self.slot();
        let mut request = self.requests.make(&mut self.random, at);
        for _ in 0..self.random.below(4) {
            let offset = self.random.below(request.length.max(64));
            let width = self.random.pick(&[1, 2, 4, 8]);
            store(at + offset, self.random.number(), width);
        }
        for buffer in request.buffers() {
            match self.random.below(16) {
                0 => buffer.address = address(&mut self.random),
                1 => buffer.length = length(&mut self.random),
                2 => buffer.writable ^= true,
                _ => {}
            }
        }
        let queue = match self.random.below(16) {
            0 => self.any_queue(),
            _ => request.queue,
        };
        self.queues[queue].offer(request.buffers());
        self.device.kick(low(queue as u64));
        if self.random.once_in(2) {
            self.settle(queue);
        }
    }

    /// A chain of descriptors that may lead anywhere.
    fn chain(&mut self) {
        let index = self.any_queue();
        let size = self.queues[index].size;
        let count = self.random.pick(&[1, 2, 3, 4, 8, size]);
        let head = low16(self.random.below(size.into()));
        let sane = self.random.once_in(2);
        let table = self.queues[index].descriptors;
        for position in 0..count {
            let entry = u64::from((head + position) % size);
            let next = match self.random.below(32) {
                0 => low16(self.random.number()),
                1 => head,
                _ => (head + position + 1) % size,
            };
            let last = position + 1 == count;
            self.describe(table + entry * 16, last, next, sane);
            // One in most chains, however long.
            if self.random.once_in(1 + u64::from(count)) {
                self.point_to_table(table + entry * 16);
            }
        }
        self.queues[index].publish(head);
        self.device.kick(low(index as u64));
        if self.random.once_in(2) {
            self.settle(index);
        }
    }

    fn describe(&mut self, at: u64, last: bool, next: u16, sane: bool) {
        let random = &mut self.random;
        let (address, length) = if sane {
            let at = BUFFERS + random.below(SLOTS) * 2 * ROOM;
            (at, random.below(0x2000))
        } else {
            (address(random), length(random).into())
        };
        let chained = last == random.once_in(32);
        let mut flags = if chained { NEXT } else { 0 };
        flags |= if random.once_in(2) { WRITE } else { 0 };
        store(at, address, 8);
        let rest = length | u64::from(flags) << 32 | u64::from(next) << 48;
        store(at + 8, rest, 8);
    }

    /// Makes a descriptor one of more descriptors.
    fn point_to_table(&mut self, at: u64) {
        let count = self.random.pick(&[0, 1, 2, 8, 100, 600]);
        for entry in 0..count {
            let next = match self.random.below(64) {
                0 => low16(self.random.number()),
                _ => low16(entry) + 1,
            };
            let sane = self.random.below(16) > 0;
            self.describe(TABLES + entry * 16, entry + 1 == count, next, sane);
        }
        if count > 0 && self.random.once_in(8) {
            // Descriptors in descriptors in descriptors, or in themselves.
            let inner = TABLES + self.random.below(count) * 16;
            store(inner, TABLES, 8);
            store(inner + 8, 16 | u64::from(INDIRECT) << 32, 8);
        }
        let (table, length) = match self.random.below(16) {
            0 => (address(&mut self.random), count * 16),
            1 => (TABLES, self.random.number() & u64::from(u32::MAX)),
            2 => (TABLES + self.random.below(16), count * 16),
            _ => (TABLES, count * 16),
        };
        let kept = load(at + 8, 8) >> 48 << 48;
        let flags = INDIRECT | self.random.pick(&[0, 0, 0, NEXT, WRITE]);
        store(at, table, 8);
        store(at + 8, kept | u64::from(flags) << 32 | length, 8);
    }

    /// Rings with numbers that do not go together.
    fn ring(&mut self) {
        let index = self.any_queue();
        let queue = self.queues[index];
        let size = u64::from(queue.size);
        for _ in 0..1 + self.random.below(4) {
            let random = &mut self.random;
            let entry = random.below(size);
            match random.below(5) {
                0 => store16(queue.available + 2, low16(random.number())),
                1 => store16(queue.available + 4 + entry * 2, low16(random.number())),
                2 => store(queue.used + random.below(size * 8 + 6), random.number(), 8),
                3 => store16(queue.available, low16(random.number())),
                _ => store16(queue.available + 4 + size * 2, low16(random.number())),
            }
        }
        self.device.kick(low(self.random.number()));
    }

    /// Registers at any offset, with any width.
    fn registers(&mut self) {
        let device = self.device;
        for _ in 0..1 + self.random.below(8) {
            let random = &mut self.random;
            let offset = match random.below(4) {
                0 => random.below(0xff9),
                1 => random.below(0x120),
                _ => random.below(0x30) * 4,
            };
            let width = random.pick(&[1, 2, 4, 4, 4, 8]);
            if random.once_in(3) {
                load(device.base + offset, width);
            } else if offset & !7 == register::STATUS && random.below(4) > 0 {
                // Otherwise most would end up as resets.
                device.set(register::STATUS, device.get(register::STATUS));
            } else if (register::QUEUE_DESC..register::QUEUE_DEVICE + 8).contains(&offset) {
                store(device.base + offset, address(random), width);
            } else {
                store(device.base + offset, random.number(), width);
            }
        }
    }

    /// The way to a running device, with steps left out, repeated and turned around.
    fn states(&mut self) {
        let device = self.device;
        if self.random.once_in(2) {
            device.reset();
        }
        for _ in 0..self.random.below(12) {
            let random = &mut self.random;
            match random.below(6) {
                0 => {
                    device.set(register::DRIVER_FEATURES_SEL, low(random.below(3)));
                    device.set(register::DRIVER_FEATURES, low(random.number()));
                }
                1 => {
                    let queue = random.index(self.count);
                    self.queues[queue].set_up(device);
                }
                2 => {
                    device.set(register::QUEUE_SEL, low(random.number()));
                    device.set(register::QUEUE_READY, low(random.below(3)));
                }
                3 => device.kick(low(random.number())),
                _ => {
                    let status = random.pick(&[0, 1, 2, 3, 8, 11, 15, 4, 64, 128, u32::MAX]);
                    device.set(register::STATUS, status);
                }
            }
        }
    }

    /// Rings where they cannot be, or on top of each other.
    fn misplace(&mut self) {
        let device = self.device;
        let features = VERSION_1 | self.requests.features();
        device.negotiate(features | self.random.pick(&[0, EVENT_IDX, INDIRECT_DESC]));
        for index in 0..self.count {
            let size = self.requests.queue_sizes()[index];
            let random = &mut self.random;
            let sizes = [size, size, 1, 2, 0, 3, size * 2, u16::MAX];
            self.queues[index] = Queue::new(0, low(index as u64), size);
            let mut queue = self.queues[index];
            for ring in [
                &mut queue.descriptors,
                &mut queue.available,
                &mut queue.used,
            ] {
                *ring = match random.below(8) {
                    0..=2 => *ring,
                    3 => ARENA + random.below(8) * 16,
                    4 => ARENA + random.below(RINGS_END - ARENA),
                    5 => 0,
                    _ => address(random) & !random.pick(&[0, 1, 3, 15]),
                };
            }
            queue.size = random.pick(&sizes);
            queue.set_up(device);
        }
        device.go();
        for index in 0..self.count {
            let at = self.slot();
            let mut request = self.requests.make(&mut self.random, at);
            self.queues[index].offer(request.buffers());
            device.kick(low(index as u64));
        }
        if self.random.once_in(2) {
            let queue = self.any_queue();
            self.settle(queue);
        }
        if device.is_running() {
            self.ring();
        }
        device.reset();
    }

    /// A reset with requests on the way.
    fn abort(&mut self) {
        for _ in 0..1 + self.random.below(8) {
            let at = self.slot();
            let mut request = self.requests.make(&mut self.random, at);
            self.queues[request.queue].offer(request.buffers());
        }
        for index in 0..self.count {
            self.device.kick(low(index as u64));
        }
        self.device.reset();
        if self.random.once_in(2) {
            self.restart();
        }
    }

    /// Requests while the second processor interferes. Now and then the next race interrupts it.
    fn race(&mut self) {
        let queue = self.any_queue();
        let (seed, steps) = (self.random.any(), self.random.below(200));
        self.second
            .start(self.device, &self.queues[queue], seed, steps);
        for _ in 0..4 {
            if self.random.once_in(2) {
                self.ask_honestly();
            } else {
                self.ask_wrongly();
            }
        }
        if self.random.below(8) > 0 {
            self.second.wait();
        }
    }
}

/// An address for a device: in the arena, or where no memory is, or close to either, but never where
/// the guest itself lies.
pub fn address(random: &mut Random) -> u64 {
    match random.below(16) {
        0..=7 => BUFFERS + random.below(2 * SLOTS * ROOM),
        8 | 9 => ARENA + random.below(RINGS_END - ARENA),
        10 => MEMORY_END - random.below(64),
        11 => MEMORY_END + random.below(64),
        12 => DEVICES + random.below(0x5000),
        13 => u64::MAX - random.below(0x1_0000),
        14 => random.below(0x1000),
        _ => 1 << random.pick(&[32, 40, 63]) | random.below(1 << 20),
    }
}

/// A buffer's length.
fn length(random: &mut Random) -> u32 {
    match random.below(8) {
        0 => 0,
        1 => low(random.number()),
        2 => u32::MAX - low(random.below(16)),
        3 => 1 << 20,
        4 => random.pick(&[1, 15, 16, 39, 40, 43, 44, 4096]),
        _ => low(random.below(0x2000)),
    }
}

/// The second half of a descriptor: length, flags and the next one.
pub fn descriptor(random: &mut Random, size: u16) -> u64 {
    let flags = random.pick(&[0, NEXT, WRITE, NEXT | WRITE, INDIRECT, 7]);
    let next = random.below(u64::from(size) + 1);
    u64::from(length(random)) | u64::from(flags) << 32 | next << 48
}
