//! A guest that keeps to the rules, and checks that its devices do what they should. It sleeps until
//! it is asked to, over a connection to the host.

use crate::{
    driver::{BUFFERS, Buffer, Device, EVENT_IDX, Queue, VERSION_1},
    fs::{self, ANSWER, HEADER},
    machine::{
        IOAPIC,
        Word::{Number, Text},
        load, load16, load32, say, sleep_until, store, store_bytes, store32,
    },
    random::low,
    requests::ROOM,
    vsock::{self, PACKET, Packet},
};

/// The vector of all devices' interrupts.
pub const VECTOR: u32 = 0x40;

/// What the first byte of a message asks for.
pub mod command {
    /// To check all devices; the answer is the same byte.
    pub const CHECK: u8 = b'c';
    /// To end.
    pub const END: u8 = b'e';
}

/// The port that it dials.
pub const PORT: u32 = 7;
/// The content of the file `file` in the share `share`.
pub const CONTENT: &[u8] = b"what was there";
/// What each check writes to the console.
pub const LINE: &[u8] = b"checked\n";

const FEATURES: u64 = VERSION_1 | EVENT_IDX;
const GUEST_PORT: u32 = 1000;
const DEVICES: u32 = 4;

struct Calm {
    socket: Socket,
    files: Queue,
    /// Of the file, once it is open: the host shows it before the first check.
    handle: Option<u64>,
    rng: Queue,
    console: Queue,
}

/// Serves the host until it says that this is the end.
pub fn run() {
    for pin in 1..=DEVICES {
        for (register, value) in [(0x11, 0), (0x10, VECTOR)] {
            store32(IOAPIC, register + 2 * pin);
            store32(IOAPIC + 0x10, value);
        }
    }
    let mut calm = Calm::start();
    let mut checks = 0;
    loop {
        match calm.socket.receive() {
            command::END => break,
            _ => calm.check(),
        }
        checks += 1;
        calm.socket.send(command::CHECK);
    }
    say(&[Text("calm guest: "), Number(checks), Text(" checks")]);
}

impl Calm {
    fn start() -> Self {
        let mut sockets =
            [(0, 64), (1, 64), (2, 8)].map(|(index, size)| Queue::new(0, index, size));
        Device::at(0).start(FEATURES, &mut sockets);
        let mut files = [(0, 128), (1, 512)].map(|(index, size)| Queue::new(1, index, size));
        Device::at(1).start(FEATURES, &mut files);
        let mut rng = [Queue::new(2, 0, 8)];
        Device::at(2).start(FEATURES, &mut rng);
        let mut console = [0, 1].map(|index| Queue::new(4, index, 16));
        Device::at(4).start(FEATURES, &mut console);
        let mut socket = Socket {
            to_guest: sockets[0],
            from_guest: sockets[1],
            received: 0,
        };
        socket.dial();
        Self {
            socket,
            files: files[1],
            handle: None,
            rng: rng[0],
            console: console[1],
        }
    }

    /// Opens the file.
    fn open(&mut self) -> u64 {
        let at = BUFFERS;
        fs::write_init(at);
        self.ask(HEADER + 64);
        let mut node = 1;
        for name in [&b"share\0"[..], b"file\0"] {
            let length = fs::write_lookup(at, node, name);
            node = self.ask(length);
        }
        fs::write_header(at, HEADER + 8, fs::OPEN, node);
        store(at + HEADER, 0, 8);
        self.ask(HEADER + 8)
    }

    /// Asks the file server, and returns the first number of the answer.
    fn ask(&mut self, length: u64) -> u64 {
        let request = Buffer {
            address: BUFFERS,
            length: low(length),
            writable: false,
        };
        let answer = Buffer {
            address: BUFFERS + ROOM,
            length: 4096,
            writable: true,
        };
        self.files.offer(&[request, answer]);
        back(Device::at(1), &mut self.files);
        assert_eq!(load32(answer.address + 4), 0, "a file request failed");
        load(answer.address + ANSWER, 8)
    }

    fn check(&mut self) {
        let handle = match self.handle {
            Some(handle) => handle,
            None => self.open(),
        };
        self.handle = Some(handle);
        // struct fuse_read_in: handle, offset, size.
        let at = BUFFERS;
        fs::write_header(at, HEADER + 40, fs::READ, 0);
        for (word, value) in (0..).zip([handle, 0, 4096, 0, 0]) {
            store(at + HEADER + word * 8, value, 8);
        }
        self.ask(HEADER + 40);
        for (at, byte) in (BUFFERS + ROOM + ANSWER..).zip(CONTENT) {
            assert_eq!(load(at, 1), u64::from(*byte), "the file has changed");
        }

        let buffer = |length, writable| Buffer {
            address: BUFFERS,
            length,
            writable,
        };
        (0..32).for_each(|offset| store(BUFFERS + offset, 0, 1));
        self.rng.offer(&[buffer(32, true)]);
        back(Device::at(2), &mut self.rng);
        assert_ne!(load(BUFFERS, 8), load(BUFFERS + 8, 8), "nothing random");

        store_bytes(BUFFERS, LINE);
        self.console.offer(&[buffer(low(LINE.len() as u64), false)]);
        back(Device::at(4), &mut self.console);
    }
}

/// Notifies a device and sleeps until it has given the last chain back.
fn back(device: Device, queue: &mut Queue) {
    device.kick(queue.index);
    sleep_until(|| queue.has_used());
    queue.take_used();
}

/// One connection to the host.
struct Socket {
    to_guest: Queue,
    from_guest: Queue,
    received: u32,
}

impl Socket {
    fn dial(&mut self) {
        vsock::offer_room(&mut self.to_guest);
        Device::at(0).kick(0);
        self.packet(vsock::REQUEST, &[]);
        while self.next().0 != vsock::RESPONSE {}
    }

    /// Waits for a message of one byte.
    fn receive(&mut self) -> u8 {
        loop {
            let (operation, byte) = self.next();
            if operation == vsock::READ_WRITE {
                self.received += 1;
                return byte;
            }
            assert_ne!(operation, vsock::RESET, "the connection was reset");
        }
    }

    fn send(&mut self, byte: u8) {
        self.packet(vsock::READ_WRITE, &[byte]);
    }

    fn packet(&mut self, operation: u16, payload: &[u8]) {
        let packet = Packet {
            from: GUEST_PORT,
            to: PORT,
            length: low(payload.len() as u64),
            operation,
            buf_alloc: PACKET,
            fwd_cnt: self.received,
        };
        packet.write(BUFFERS);
        let at = BUFFERS + u64::from(vsock::HEADER);
        store_bytes(at, payload);
        self.from_guest.offer(&[Buffer {
            address: BUFFERS,
            length: vsock::HEADER + packet.length,
            writable: false,
        }]);
        back(Device::at(0), &mut self.from_guest);
    }

    /// Waits for a packet: its operation, and the first byte behind the header.
    fn next(&mut self) -> (u16, u8) {
        let queue = &mut self.to_guest;
        sleep_until(|| queue.has_used());
        let head = queue.take_used().map_or(0, |(head, _)| head);
        let at = vsock::received(head);
        let operation = load16(at + 30);
        let [byte, ..] = load(at + u64::from(vsock::HEADER), 1).to_le_bytes();
        queue.publish(head);
        Device::at(0).kick(0);
        (operation, byte)
    }
}
