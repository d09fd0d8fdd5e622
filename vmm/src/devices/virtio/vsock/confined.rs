//! The device on its thread, whose system calls are restricted: all that it asks of the kernel.

use std::{
    io::{Read, Write},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, mpsc},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress};

use super::{
    super::{mmio::tests as mmio, queue::tests::Driver},
    header::{HOST_CID, Operation, Shutdown, TYPE_STREAM},
    *,
};
use crate::{devices::event_loop::EventLoopBuilder, memory::GuestMemory};

const DEADLINE: Duration = Duration::from_secs(30);
/// More than a socket takes at once; the rest fits the device's buffer.
const CHUNK: u32 = 32 * 1024;
const CHUNKS: u32 = 9;

const PACKET: u64 = 0x2_0000;
const ROOM: u64 = 0x4_0000;
const ROOM_LEN: u32 = 4000;

struct Rig<'m> {
    memory: &'m GuestMemory,
    transport: Arc<Transport<Vsock>>,
    to_guest: Driver<'m>,
    from_guest: Driver<'m>,
}

impl Rig<'_> {
    /// Sends a packet of the guest and waits until the device has taken it.
    fn send(&mut self, operation: Operation, len: u32, flags: u32) {
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: 5,
            dst_port: 1024,
            len,
            kind: TYPE_STREAM,
            operation,
            flags,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        };
        let at = GuestAddress(PACKET);
        self.memory.write_slice(&header.bytes(), at).unwrap();
        let length = len + u32::try_from(Header::LEN).unwrap();
        self.from_guest.send(&[(PACKET, length, false)]);
        event_loop::signal(&self.transport.kick);
        while self.from_guest.used().is_none() {
            self.interrupted();
        }
    }

    /// Makes room for packets to the guest until there is one for this operation. Credit may come
    /// at any time before it, and the end of the host's stream before the end of its socket.
    fn receive(&mut self, operation: Operation) -> Header {
        loop {
            self.to_guest.send(&[(ROOM, ROOM_LEN, true)]);
            event_loop::signal(&self.transport.kick);
            while self.to_guest.used().is_none() {
                self.interrupted();
            }
            let mut bytes = [0; Header::LEN];
            self.memory
                .read_slice(&mut bytes, GuestAddress(ROOM))
                .unwrap();
            let header = Header::parse(&bytes);
            if header.operation == operation {
                return header;
            }
            let early = [Operation::CreditUpdate, Operation::Shutdown];
            assert!(early.contains(&header.operation), "{header:?}");
        }
    }

    fn interrupted(&self) {
        let event = self.transport.interrupt.event();
        // SAFETY: the event outlives the poll.
        let borrowed = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        let mut polled = [PollFd::new(&borrowed, PollFlags::IN)];
        let deadline = Timespec::try_from(DEADLINE).unwrap();
        assert_eq!(poll(&mut polled, Some(&deadline)), Ok(1));
        event_loop::take(event);
    }
}

#[test]
fn a_connection_lives_and_ends_under_the_filter() {
    let memory = crate::memory::allocate(1).unwrap();
    let mut builder = EventLoopBuilder::new().unwrap();
    let watcher = builder.next_watcher();
    let (accepted, hosts) = mpsc::channel::<OwnedFd>();
    let accept = move |_, host| accepted.send(host).is_ok();
    let transport = Arc::new(mmio::transport(
        Vsock::new(watcher.clone(), accept),
        memory.clone(),
    ));
    mmio::start(&transport, mmio::MODERN & !(1 << 29), 0x4000);
    let handler = VsockHandler::new(transport.clone());
    handler.watch(&watcher).unwrap();
    builder.add(Arc::new(handler));
    let event_loop = builder.spawn("devices").unwrap();

    let mut rig = Rig {
        memory: &memory,
        transport,
        to_guest: Driver::new(&memory, 0x4000),
        from_guest: Driver::new(&memory, 0x5000),
    };
    rig.send(Operation::Request, 0, 0);
    rig.receive(Operation::Response);
    let mut host = UnixStream::from(hosts.recv_timeout(DEADLINE).unwrap());
    host.set_read_timeout(Some(DEADLINE)).unwrap();

    // Straight into the socket at first, then into the buffer, and from there.
    for _ in 0..CHUNKS {
        rig.send(Operation::ReadWrite, CHUNK, 0);
    }
    let mut bytes = vec![0; usize::try_from(CHUNKS * CHUNK).unwrap()];
    host.read_exact(&mut bytes).unwrap();

    host.write_all(b"hello").unwrap();
    assert_eq!(rig.receive(Operation::ReadWrite).len, 5);

    rig.send(Operation::Shutdown, 0, Shutdown::SEND.bits());
    assert_eq!(host.read(&mut bytes).unwrap(), 0);
    drop(host);
    rig.receive(Operation::Reset);
    drop(event_loop);
}
