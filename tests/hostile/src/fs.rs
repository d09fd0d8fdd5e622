//! Requests to the file server (FUSE 7.41, Linux's `include/uapi/linux/fuse.h`).

use crate::{
    driver::{BUFFERS, Buffer, Device, Queue},
    machine::{load, load32, store, store_bytes, store32},
    random::{Random, low},
    requests::{ROOM, Request, Requests},
};

/// Length of a request's header in bytes.
pub const HEADER: u64 = 40;
/// Of an answer's.
pub const ANSWER: u64 = 16;
/// Operations.
pub const INIT: u32 = 26;
/// See [`INIT`].
pub const LOOKUP: u32 = 1;
/// See [`INIT`].
pub const OPEN: u32 = 14;
/// See [`INIT`].
pub const READ: u32 = 15;
const WRITE: u32 = 16;
const CREATE: u32 = 35;
const OPENDIR: u32 = 27;

/// What the requests look like: operation, 32-bit words in front, names behind.
const SHAPES: [(u32, u64, usize); 43] = [
    (LOOKUP, 0, 1),
    (2, 2, 0),
    (3, 4, 0),
    (4, 22, 0),
    (5, 0, 0),
    (6, 0, 2),
    (8, 4, 1),
    (9, 2, 1),
    (10, 0, 1),
    (11, 0, 1),
    (12, 2, 2),
    (13, 2, 1),
    (OPEN, 2, 0),
    (READ, 10, 0),
    (WRITE, 10, 0),
    (17, 0, 0),
    (18, 6, 0),
    (20, 4, 0),
    (21, 4, 2),
    (22, 2, 1),
    (23, 2, 0),
    (24, 0, 1),
    (25, 6, 0),
    (INIT, 16, 0),
    (OPENDIR, 2, 0),
    (28, 10, 0),
    (29, 6, 0),
    (30, 4, 0),
    (CREATE, 4, 1),
    (36, 2, 0),
    (38, 0, 0),
    (39, 8, 0),
    (42, 10, 0),
    (43, 8, 0),
    (44, 10, 0),
    (45, 4, 2),
    (46, 6, 0),
    (47, 14, 0),
    (50, 2, 0),
    (51, 4, 1),
    (52, 6, 0),
    (53, 0, 0),
    (u32::MAX, 9, 3),
];

/// Names that are there or could be there, and then such as must not work.
const NAMES: [&[u8]; 15] = [
    b"share\0",
    b"other\0",
    b"file\0",
    b"directory\0",
    b"new\0",
    b"new2\0",
    b"new3\0",
    b"user.name\0",
    b"..\0",
    b".\0",
    b"../outside\0",
    b"/etc/passwd\0",
    b"\0",
    &[b'x'; 300],
    b"endless",
];

/// How many names could work.
const USABLE: usize = 8;

/// Writes a request's header.
pub fn write_header(at: u64, length: u64, operation: u32, node: u64) {
    store32(at, low(length));
    store32(at + 4, operation);
    store(at + 8, at, 8);
    store(at + 16, node, 8);
    for offset in [24, 28, 32, 36] {
        store32(at + offset, 0);
    }
}

/// Writes the request that starts a connection and returns its length.
pub fn write_init(at: u64) -> u64 {
    let length = HEADER + 64;
    write_header(at, length, INIT, 0);
    for offset in (HEADER..length).step_by(8) {
        store(at + offset, 0, 8);
    }
    for (word, value) in (0..).zip([7, 41, 0x2_0000, u32::MAX, u32::MAX]) {
        store32(at + HEADER + word * 4, value);
    }
    length
}

/// Writes a request for a node's child, whose name ends with a zero, and returns its length.
pub fn write_lookup(at: u64, node: u64, name: &[u8]) -> u64 {
    let length = HEADER + name.len() as u64;
    write_header(at, length, LOOKUP, node);
    store_bytes(at + HEADER, name);
    length
}

fn buffer(address: u64, length: u64, writable: bool) -> Buffer {
    Buffer {
        address,
        length: low(length),
        writable,
    }
}

/// The server's files as far as the guest has found them.
pub struct Fs {
    nodes: [u64; 8],
    handles: [u64; 8],
}

impl Fs {
    /// Knows nothing but the root.
    pub fn new() -> Self {
        Self {
            nodes: [1; 8],
            handles: [1; 8],
        }
    }

    fn node(&self, random: &mut Random) -> u64 {
        match random.below(16) {
            0 => random.number(),
            1 => 1,
            _ => random.pick(&self.nodes),
        }
    }

    /// Half of a record: something that is known, or small, or anything.
    fn field(&self, random: &mut Random) -> u64 {
        match random.below(8) {
            0 => random.number(),
            1 => random.pick(&self.nodes),
            2 => random.below(0x1_0000) << 32 | random.below(0x1000),
            _ => random.below(16),
        }
    }

    fn write_body(&self, random: &mut Random, at: u64, words: u64, names: usize) -> u64 {
        let mut end = at;
        for pair in 0..words.div_ceil(2) {
            // Most records start with a handle.
            let value = if pair == 0 && random.below(4) > 0 {
                random.pick(&self.handles)
            } else {
                self.field(random)
            };
            store(end, value, 8);
            end += 8;
        }
        end = at + words * 4;
        for _ in 0..names {
            let usable = random.below(4) > 0;
            let name = random.pick(&NAMES[..if usable { USABLE } else { NAMES.len() }]);
            store_bytes(end, name);
            end += name.len() as u64;
        }
        end - at
    }
}

impl Default for Fs {
    fn default() -> Self {
        Self::new()
    }
}

impl Requests for Fs {
    fn device(&self) -> Device {
        Device::at(1)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 512]
    }

    fn started(&mut self, device: Device, queues: &mut [Queue]) {
        *self = Self::new();
        let Some(queue) = queues.get_mut(1) else {
            return;
        };
        let at = BUFFERS;
        let mut ask = |length| {
            queue.offer(&[buffer(at, length, false), buffer(at + ROOM, 256, true)]);
            device.kick(1);
            queue.settle(device);
            let good = load32(at + ROOM + 4) == 0;
            good.then(|| load(at + ROOM + ANSWER, 8))
        };
        ask(write_init(at));
        let Some(share) = ask(write_lookup(at, 1, NAMES[0])) else {
            return;
        };
        let file = ask(write_lookup(at, share, NAMES[2])).unwrap_or(share);
        self.nodes = [share, file, share, file, share, file, share, file];
        write_header(at, HEADER + 8, OPEN, file);
        // For reading and writing.
        store(at + HEADER, 2, 8);
        self.handles = [ask(HEADER + 8).unwrap_or(1); 8];
    }

    fn make(&mut self, random: &mut Random, at: u64) -> Request {
        let (operation, words, names) = if random.once_in(3) {
            // What finds more files for the others.
            let finders = [
                (LOOKUP, 0, 1),
                (CREATE, 4, 1),
                (OPEN, 2, 0),
                (OPENDIR, 2, 0),
            ];
            random.pick(&finders)
        } else {
            random.pick(&SHAPES)
        };
        let mut length = HEADER + self.write_body(random, at + HEADER, words, names);
        if operation == OPEN || operation == CREATE {
            // For reading or writing, not for both of all the other flags there are.
            store32(at + HEADER, random.pick(&[0, 1, 2, 2, 0o1000, 0o2002]));
        }
        let mut data = 0;
        if operation == WRITE {
            data = random.pick(&[0, 1, 4096, 0x8000]);
            store32(at + HEADER + 16, low(data));
        }
        let node = self.node(random);
        write_header(at, length + data, operation, node);
        length += data;
        if random.once_in(32) {
            store32(at, random.word());
        }
        let head = low(random.pick(&[HEADER, HEADER, length, 8]));
        let head = head.min(low(length));
        let room = random.pick(&[0, 15, 16, 104, 160, 160, 4096, 4096, 0x1_0000]);
        let hurried = operation == 2 || operation == 42;
        Request::new(usize::from(!hurried), at, length - data)
            .with(at, head, false)
            .with(at + u64::from(head), low(length) - head, false)
            .with(at + ROOM, room.min(16), true)
            .with(at + ROOM + 16, room.saturating_sub(16), true)
    }

    fn answered(&mut self, random: &mut Random, request: &Request) {
        let answer = request.at + ROOM;
        if load32(answer + 4) != 0 || load(answer + 8, 8) != request.at {
            return;
        }
        let body = load(answer + ANSWER, 8);
        let slot = random.index(8);
        match load32(request.at + 4) {
            LOOKUP | 6 | 8 | 9 | 13 => self.nodes[slot] = body,
            OPEN | OPENDIR => self.handles[slot] = body,
            CREATE => {
                self.nodes[slot] = body;
                self.handles[slot] = load(answer + ANSWER + 128, 8);
            }
            _ => {}
        }
    }
}
