//! A driver that keeps to no rules, for the devices of the VMM, and a file server with a few files.

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::{fs::symlink, net::UnixDatagram},
    },
    sync::Arc,
};

use arbitrary::Arbitrary;
use bulkhead_fs::{FileServer, ShareOptions};
use bulkhead_vmm::{
    bus::MmioDevice,
    devices::virtio::{
        Device,
        mmio::Transport,
        net::{Interface, Kicks, LaneState, Limits, Net, NetHandler},
    },
    memory::{self, GuestMemory},
};
use rustix::fs::{Mode, OFlags, open};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where the first queue lies in guest memory; each has a page of its own.
const RINGS: u64 = 0x1000;
const DRIVER_RING: u64 = 0x400;
const DEVICE_RING: u64 = 0x800;
const QUEUE_SIZE: u16 = 8;
/// The most queues of a device.
const QUEUES: usize = 5;

const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;

/// One thing that a driver can do.
#[derive(Debug, Arbitrary)]
pub enum Step {
    /// Writes to a register, with one to eight bytes.
    Register { offset: u16, value: u64, length: u8 },
    /// Writes anywhere into memory, the rings included.
    Memory { address: u16, bytes: [u8; 8] },
    /// Makes a chain of buffers available, with something in the first one.
    Send {
        queue: u8,
        buffers: Vec<Buffer>,
        content: Vec<u8>,
    },
    /// Lets the device look.
    Kick,
    /// An event that only this device knows.
    Event { token: u8, events: u8 },
}

/// A buffer of a chain.
#[derive(Debug, Arbitrary)]
pub struct Buffer {
    address: u16,
    length: u16,
    writable: bool,
    /// The address is far outside memory.
    wild: bool,
}

/// A device and its driver's memory.
pub struct Rig<D> {
    /// The device.
    pub transport: Arc<Transport<D>>,
    memory: GuestMemory,
    available: [u16; QUEUES],
}

impl<D: Device> Rig<D> {
    /// A device that a driver has started as it should.
    pub fn start(device: D) -> Self {
        let memory = memory::allocate(1).expect("a MiB of memory");
        let event = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let transport = Transport::new(device, memory.clone(), event(), event());
        Self::drive(Arc::new(transport), memory, 0)
    }

    /// A driver that has started this device as it should, with these features of its type.
    fn drive(transport: Arc<Transport<D>>, memory: GuestMemory, features: u64) -> Self {
        let queues = u32::try_from(transport.lock().queues.len()).unwrap_or(0);
        let features = u32::try_from(features).unwrap_or(0);
        let write = |offset: u64, value: u32| transport.write(offset, &value.to_le_bytes());
        for status in [1, 3] {
            write(0x70, status);
        }
        // VIRTIO_F_VERSION_1 and VIRTIO_F_EVENT_IDX.
        for (selector, features) in [(0, 1 << 29 | features), (1, 1)] {
            write(0x24, selector);
            write(0x20, features);
        }
        write(0x70, 11);
        for index in 0..queues {
            let base = u32::try_from(RINGS).unwrap_or(0) * (index + 1);
            for (offset, value) in [
                (0x30, index),
                (0x38, QUEUE_SIZE.into()),
                (0x80, base),
                (0x90, base + 0x400),
                (0xa0, base + 0x800),
                (0x44, 1),
            ] {
                write(offset, value);
            }
        }
        write(0x70, 15);
        Self {
            transport,
            memory,
            available: [0; QUEUES],
        }
    }

    /// Does what is no event of the device.
    pub fn step(&mut self, step: &Step) {
        match step {
            Step::Register {
                offset,
                value,
                length,
            } => {
                let bytes = value.to_le_bytes();
                let length = usize::from(length % 8) + 1;
                self.transport
                    .write(u64::from(*offset) & 0xfff, &bytes[..length]);
            }
            Step::Memory { address, bytes } => self.poke((*address).into(), bytes),
            Step::Send {
                queue,
                buffers,
                content,
            } => self.send(usize::from(*queue) % QUEUES, buffers, content),
            Step::Kick | Step::Event { .. } => {}
        }
    }

    fn send(&mut self, queue: usize, buffers: &[Buffer], content: &[u8]) {
        let base = RINGS * (queue as u64 + 1);
        if let Some(first) = buffers.first() {
            self.poke(first.address.into(), content);
        }
        let count = buffers.len().min(QUEUE_SIZE.into());
        for (index, buffer) in (0u16..).zip(&buffers[..count]) {
            let wild = if buffer.wild { u64::MAX << 20 } else { 0 };
            let next = if usize::from(index) + 1 < count {
                DESCRIPTOR_NEXT
            } else {
                0
            };
            let write = if buffer.writable { DESCRIPTOR_WRITE } else { 0 };
            let mut bytes = Vec::with_capacity(16);
            bytes.extend((u64::from(buffer.address) | wild).to_le_bytes());
            bytes.extend(u32::from(buffer.length).to_le_bytes());
            bytes.extend((next | write).to_le_bytes());
            bytes.extend((index + 1).to_le_bytes());
            self.poke(base + u64::from(index) * 16, &bytes);
        }
        let slot = u64::from(self.available[queue] % QUEUE_SIZE);
        self.available[queue] = self.available[queue].wrapping_add(1);
        let ring = base + DRIVER_RING;
        self.poke(ring + 4 + slot * 2, &[0, 0]);
        self.poke(ring + 2, &self.available[queue].to_le_bytes());
        // The device's event index: always wants an interrupt.
        self.poke(base + DEVICE_RING, &[0, 0]);
    }

    fn poke(&self, address: u64, bytes: &[u8]) {
        // What does not fit is cut off at the end of memory.
        let _ = self.memory.write(bytes, GuestAddress(address));
    }
}

/// A slot with a network interface of two lanes.
pub struct Nic {
    /// The driver's side.
    pub rig: Rig<Net>,
    /// The device.
    pub handler: NetHandler,
    states: [LaneState; LANES],
    peers: Vec<UnixDatagram>,
}

/// Lanes of the interface.
const LANES: usize = 2;
/// What a driver must accept (section 5.1.3), and what it needs for several lanes.
const NIC_FEATURES: u64 = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 15 | 1 << 17 | 1 << 22;

impl Nic {
    /// An interface that a driver has started as it should.
    pub fn start() -> Self {
        let event = || Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let kicks: Kicks = (0..LANES).map(|_| event()).collect();
        let memory = memory::allocate(1).expect("a MiB of memory");
        let device = Net::new(kicks.clone());
        let transport = Transport::new(device, memory.clone(), kicks[0].clone(), event());
        let transport = Arc::new(transport);
        let handler = NetHandler::new(transport.clone(), kicks, Limits::default());
        let (interface, peers) = interface();
        handler.attach(interface).expect("an empty slot");
        Self {
            rig: Rig::drive(transport, memory, NIC_FEATURES),
            handler,
            states: Default::default(),
            peers,
        }
    }

    /// Takes a step.
    pub fn step(&mut self, step: &Step) {
        self.rig.step(step);
        if let Step::Event { token, events } = step {
            match events % 8 {
                0 => drop(self.handler.detach()),
                1 => {
                    let (interface, peers) = interface();
                    if self.handler.attach(interface).is_ok() {
                        self.peers = peers;
                    }
                }
                2 => drop(self.peers[0].recv(&mut [0; 5000])),
                many => {
                    let packet = [*events; 0x1_0000];
                    let length = usize::from(*token) << (many % 8 + 1);
                    let lane = usize::from(*token) % LANES;
                    let _ = self.peers[lane].send(&packet[..length]);
                }
            }
        }
        self.serve();
    }

    /// Lets the device work on all lanes.
    pub fn serve(&mut self) {
        for (lane, state) in self.states.iter_mut().enumerate() {
            self.handler.kicked(lane);
            state.readable = true;
            state.full = false;
            self.handler.serve(lane, state, |_| {});
        }
    }
}

fn interface() -> (Interface, Vec<UnixDatagram>) {
    let (taps, peers): (Vec<_>, Vec<_>) = (0..LANES)
        .map(|_| UnixDatagram::pair().expect("sockets"))
        .unzip();
    for socket in taps.iter().chain(&peers) {
        socket.set_nonblocking(true).expect("a socket");
    }
    let interface = Interface {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        taps: taps.into_iter().map(OwnedFd::from).collect(),
    };
    (interface, peers)
}

/// A file server with one share, a new directory with a file, a directory and a link that leads out.
pub fn file_server() -> (FileServer, TempDir) {
    // Devices in it could not be opened.
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    fs::write(directory.path().join("file"), b"content").expect("a file");
    fs::create_dir(directory.path().join("directory")).expect("a directory");
    symlink("/etc/passwd", directory.path().join("link")).expect("a link");
    let path = OFlags::PATH | OFlags::CLOEXEC;
    let proc_self_fd = open("/proc/self/fd", path, Mode::empty()).expect("/proc");
    let server = FileServer::new(proc_self_fd).expect("a server");
    let root = open(directory.path(), path, Mode::empty()).expect("the directory");
    let options = ShareOptions {
        read_only: false,
        exclusive: true,
    };
    server.share("share", root, options).expect("a share");
    (server, directory)
}
