//! The socket device against a guest that is played by the tests.

use std::{
    io::{Read, Write},
    net,
    sync::{Arc, Mutex},
};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::{
    super::{mmio::tests as mmio, queue::tests::Driver},
    connection::BUF_ALLOC,
    header::{HOST_CID, Key, Operation, Shutdown, TYPE_STREAM},
    muxer::{MAX_CONNECTIONS, MAX_RESETS},
    *,
};
use crate::memory::{GuestMemory, VolatileSlice};

type Hosts = Arc<Mutex<Vec<UnixStream>>>;

/// Keeps the host's ends where a test can reach them.
struct TestDial {
    hosts: Hosts,
    refuse: bool,
}

impl Dial for TestDial {
    fn dial(&mut self, _port: u32, _id: u32) -> Option<UnixStream> {
        // A test process may have no more descriptors.
        let (ours, theirs) = UnixStream::pair().ok()?;
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        self.hosts.lock().unwrap().push(theirs);
        (!self.refuse).then_some(ours)
    }
}

/// A guest that speaks packets, without queues.
struct Guest {
    muxer: Muxer,
    hosts: Hosts,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Guest {
    fn new(refuse: bool) -> Self {
        let hosts = Hosts::default();
        let dial = TestDial {
            hosts: hosts.clone(),
            refuse,
        };
        Self {
            muxer: Muxer::new(Box::new(dial)),
            hosts,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        }
    }

    fn header(&self, guest_port: u32, operation: Operation) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: 1024,
            len: 0,
            kind: TYPE_STREAM,
            operation,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    fn send_raw(&mut self, header: &Header, payload: &[u8]) {
        let mut packet = [header.bytes().as_slice(), payload].concat();
        let (a, b) = packet.split_at_mut(Header::LEN / 2);
        self.muxer
            .receive(&[VolatileSlice::from(a), VolatileSlice::from(b)]);
    }

    fn send(&mut self, guest_port: u32, operation: Operation) {
        self.send_raw(&self.header(guest_port, operation), &[]);
    }

    fn write(&mut self, guest_port: u32, data: &[u8]) {
        let mut header = self.header(guest_port, Operation::ReadWrite);
        header.len = u32::try_from(data.len()).unwrap();
        self.send_raw(&header, data);
    }

    fn shut_down(&mut self, guest_port: u32, flags: Shutdown) {
        let mut header = self.header(guest_port, Operation::Shutdown);
        header.flags = flags.bits();
        self.send_raw(&header, &[]);
    }

    /// The next packet in a buffer like Linux's.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut buffer = vec![0; 4096 - 320];
        let length = self.muxer.send(&[VolatileSlice::from(&mut buffer[..])])?;
        let header = Header::parse(buffer[..Header::LEN].try_into().unwrap());
        let payload = buffer[Header::LEN..length].to_vec();
        assert_eq!(payload.len(), usize::try_from(header.len).unwrap());
        Some((header, payload))
    }

    fn operations(&mut self) -> Vec<Operation> {
        std::iter::from_fn(|| self.receive())
            .map(|(header, _)| header.operation)
            .collect()
    }

    /// A connection that is up: its id in events is 0 for the first.
    fn connect(&mut self, guest_port: u32) -> UnixStream {
        self.send(guest_port, Operation::Request);
        assert_eq!(self.operations(), [Operation::Response]);
        self.hosts.lock().unwrap().pop().unwrap()
    }
}

#[test]
fn bytes_flow_both_ways() {
    let mut guest = Guest::new(false);
    let mut host = guest.connect(5);
    guest.write(5, b"hello");
    let mut bytes = [0; 5];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    host.write_all(b"world").unwrap();
    guest.muxer.host_ready(0, true, false, false);
    let (header, payload) = guest.receive().unwrap();
    assert_eq!(
        header.key(),
        Key {
            guest_port: 1024,
            host_port: 5
        }
    );
    assert_eq!(header.operation, Operation::ReadWrite);
    assert_eq!(header.fwd_cnt, 5);
    assert_eq!(payload, b"world");
    assert!(guest.receive().is_none());
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_and_loses_nothing() {
    let mut guest = Guest::new(false);
    let mut host = guest.connect(5);
    let chunk: Vec<u8> = (0..=255).cycle().take(16 * 1024).collect();
    let (mut sent, mut forwarded, mut got) = (0u32, 0u32, Vec::<u8>::new());
    while sent < 10 << 20 {
        if BUF_ALLOC - (sent - forwarded) >= 16 * 1024 {
            guest.write(5, &chunk);
            sent += 16 * 1024;
        } else {
            // Out of credit: only a host that reads brings more.
            assert_eq!(guest.operations(), []);
            let mut part = vec![0; 300_000];
            let count = host.read(&mut part).unwrap();
            got.extend(&part[..count]);
            guest.muxer.host_ready(0, false, true, false);
        }
        while let Some((header, _)) = guest.receive() {
            assert_eq!(header.operation, Operation::CreditUpdate);
            forwarded = header.fwd_cnt;
        }
    }
    guest.shut_down(5, Shutdown::SEND);
    loop {
        let mut part = vec![0; 300_000];
        match host.read(&mut part) {
            Ok(0) => break,
            Ok(count) => got.extend(&part[..count]),
            Err(error) => panic!("{error} after {} bytes", got.len()),
        }
        guest.muxer.host_ready(0, false, true, false);
    }
    assert_eq!(got.len(), usize::try_from(sent).unwrap());
    assert!(got.chunks(chunk.len()).all(|part| part == chunk));
}

#[test]
fn a_guest_that_ignores_its_credit_is_cut_off() {
    let mut guest = Guest::new(false);
    let _host = guest.connect(5);
    for _ in 0..100 {
        guest.write(5, &[0; 64 * 1024]);
    }
    let operations = guest.operations();
    assert!(operations.contains(&Operation::Reset), "{operations:?}");
    assert!(!operations.contains(&Operation::ReadWrite));
}

#[test]
fn a_guest_without_room_gets_nothing_until_it_has_some() {
    let mut guest = Guest::new(false);
    guest.buf_alloc = 3;
    let mut host = guest.connect(5);
    host.write_all(b"hello").unwrap();
    guest.muxer.host_ready(0, true, false, false);
    assert_eq!(guest.receive().unwrap().1, b"hel");
    assert_eq!(guest.operations(), [Operation::CreditRequest]);
    guest.fwd_cnt = 3;
    guest.send(5, Operation::CreditUpdate);
    assert_eq!(guest.receive().unwrap().1, b"lo");
    guest.fwd_cnt = 77;
    guest.send(5, Operation::CreditUpdate);
    host.write_all(b"!").unwrap();
    guest.muxer.host_ready(0, true, false, false);
    assert_eq!(guest.receive(), None, "the guest claims what it never got");
}

#[test]
fn each_direction_ends_by_itself() {
    let mut guest = Guest::new(false);
    let mut host = guest.connect(5);
    host.shutdown(net::Shutdown::Write).unwrap();
    guest.muxer.host_ready(0, true, false, false);
    let (header, _) = guest.receive().unwrap();
    assert_eq!(header.operation, Operation::Shutdown);
    assert_eq!(header.flags, Shutdown::SEND.bits());
    guest.write(5, b"still here");
    guest.shut_down(5, Shutdown::SEND);
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
    guest.shut_down(5, Shutdown::RECEIVE);
    assert_eq!(guest.operations(), [Operation::Reset]);
}

#[test]
fn the_hosts_close_resets_after_the_last_byte() {
    let mut guest = Guest::new(false);
    let mut host = guest.connect(5);
    host.write_all(b"last").unwrap();
    drop(host);
    guest.muxer.host_ready(0, true, true, true);
    assert_eq!(guest.receive().unwrap().1, b"last");
    assert_eq!(guest.operations(), [Operation::Reset]);
    guest.write(5, b"nobody there");
    assert_eq!(guest.operations(), [Operation::Reset]);
}

#[test]
fn a_closed_connection_still_delivers_what_was_sent() {
    let mut guest = Guest::new(false);
    let mut host = guest.connect(5);
    let mut sent = 0;
    // More than the socket takes, so that something is left in the device.
    for _ in 0..4 {
        guest.write(5, &[1; 60 * 1024]);
        sent += 60 * 1024;
        while guest.receive().is_some() {}
    }
    guest.shut_down(5, Shutdown::SEND | Shutdown::RECEIVE);
    assert_eq!(guest.operations(), [Operation::Reset]);
    // The guest may use the port again at once.
    let _second = guest.connect(5);
    let mut got = 0;
    loop {
        let mut part = vec![0; 100_000];
        match host.read(&mut part) {
            Ok(0) => break,
            Ok(count) => got += count,
            Err(error) => panic!("{error} after {got} of {sent} bytes"),
        }
        guest.muxer.host_ready(0, false, true, false);
    }
    assert_eq!(got, sent);
}

#[test]
fn what_leads_nowhere_is_refused() {
    let mut guest = Guest::new(false);
    guest.write(9, b"no such connection");
    assert_eq!(guest.operations(), [Operation::Reset]);
    guest.send(9, Operation::Reset);
    guest.send(9, Operation::Unknown);
    assert_eq!(guest.operations(), [Operation::Reset]);
    let mut other_type = guest.header(9, Operation::Request);
    other_type.kind = 2;
    guest.send_raw(&other_type, &[]);
    assert_eq!(guest.operations(), [Operation::Reset]);
    let mut other_host = guest.header(9, Operation::Request);
    other_host.dst_cid = 4;
    guest.send_raw(&other_host, &[]);
    let mut too_long = guest.header(9, Operation::ReadWrite);
    too_long.len = 100;
    guest.send_raw(&too_long, &[0; 99]);
    assert_eq!(guest.operations(), []);
    let _host = guest.connect(5);
    guest.send(5, Operation::Request);
    assert_eq!(guest.operations(), [Operation::Reset]);

    let mut refused = Guest::new(true);
    refused.send(5, Operation::Request);
    assert_eq!(refused.operations(), [Operation::Reset]);
}

#[test]
fn connections_and_refusals_are_limited() {
    let mut guest = Guest::new(false);
    let most = u32::try_from(MAX_CONNECTIONS).unwrap();
    // The host's ends are not needed.
    for port in 0..most {
        guest.send(port, Operation::Request);
        guest.hosts.lock().unwrap().clear();
        if guest.operations() != [Operation::Response] {
            return;
        }
    }
    guest.send(most, Operation::Request);
    assert_eq!(guest.operations(), [Operation::Reset]);
    guest.send(7, Operation::Reset);
    guest.send(most, Operation::Request);
    assert_eq!(guest.operations(), [Operation::Response]);
    for port in 0..2 * u32::try_from(MAX_RESETS).unwrap() {
        if guest.muxer.can_receive() {
            guest.send(10_000 + port, Operation::CreditRequest);
        }
    }
    assert!(!guest.muxer.can_receive());
    assert_eq!(guest.operations().len(), MAX_RESETS);
}

fn device(memory: &GuestMemory, hosts: &Hosts) -> VsockHandler {
    let dial = TestDial {
        hosts: hosts.clone(),
        refuse: false,
    };
    let device = Vsock::with_dial(Box::new(dial));
    VsockHandler::new(Arc::new(mmio::transport(device, memory.clone())))
}

#[test]
fn a_restored_device_drops_its_connections_and_takes_new_ones() {
    let memory = crate::memory::allocate(1).unwrap();
    let hosts = Hosts::default();
    let before = device(&memory, &hosts);
    mmio::start(&before.transport, mmio::MODERN, 0x4000);
    let mut to_guest = Driver::new(&memory, 0x4000);
    let mut from_guest = Driver::new(&memory, 0x5000);
    let mut events = Driver::new(&memory, 0x6000);
    let guest = Guest::new(false);
    let mut dial = |handler: &VsockHandler, port: u32| {
        let request = guest.header(port, Operation::Request).bytes();
        memory.write_slice(&request, GuestAddress(0x8000)).unwrap();
        to_guest.send(&[(0x9000, 4000, true)]);
        from_guest.send(&[(0x8000, 44, false)]);
        handler.handle(KICK, EventSet::IN);
        assert_eq!(from_guest.used(), Some(0));
        assert_eq!(to_guest.used(), Some(44));
        let mut reply = [0; Header::LEN];
        memory.read_slice(&mut reply, GuestAddress(0x9000)).unwrap();
        Header::parse(&reply).operation
    };
    assert_eq!(dial(&before, 5), Operation::Response);
    events.send(&[(0xa000, 4, true)]);

    let after = device(&memory, &hosts);
    after.restore(&before.save()).unwrap();
    assert_eq!(events.used(), Some(4));
    assert_eq!(dial(&after, 5), Operation::Response);
    assert_eq!(hosts.lock().unwrap().len(), 2);
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        Just(Operation::Request),
        Just(Operation::Response),
        Just(Operation::Reset),
        Just(Operation::Shutdown),
        Just(Operation::ReadWrite),
        Just(Operation::CreditUpdate),
        Just(Operation::CreditRequest),
        Just(Operation::Unknown),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_packets_break_the_device(
        packets in proptest::collection::vec(
            (operation(), 0u32..3, 0u32..4, any::<u32>(), any::<u32>(), 0usize..3000, any::<bool>()),
            0..300,
        ),
    ) {
        let mut guest = Guest::new(false);
        for (operation, port, flags, buf_alloc, fwd_cnt, length, host_acts) in packets {
            let mut header = guest.header(port, operation);
            header.flags = flags;
            header.buf_alloc = buf_alloc;
            header.fwd_cnt = fwd_cnt;
            header.len = u32::try_from(length).unwrap();
            guest.send_raw(&header, &vec![0; length]);
            if host_acts {
                let mut hosts = guest.hosts.lock().unwrap();
                let count = hosts.len();
                if let Some(host) = hosts.last_mut() {
                    // Any of these may fail by now.
                    let _ = host.write(&[0; 100]);
                    let _ = host.read(&mut [0; 100]);
                }
                if count > 4 {
                    hosts.remove(0);
                }
                drop(hosts);
                for id in 0..3 {
                    guest.muxer.host_ready(id, true, true, flags == 3);
                }
            }
            if guest.muxer.has_packet() && fwd_cnt % 3 != 0 {
                guest.receive();
            }
            prop_assert!(guest.muxer.can_receive() || !guest.operations().is_empty());
        }
    }

    #[test]
    fn both_streams_are_exact_whatever_the_order(
        steps in proptest::collection::vec((0u8..5, 1usize..30_000), 50..300),
    ) {
        let mut guest = Guest::new(false);
        guest.buf_alloc = 10_000;
        let mut host = guest.connect(5);
        let (mut sent, mut forwarded, mut at_host) = (0u32, 0u32, 0u32);
        let (mut host_sent, mut at_guest) = (0usize, 0usize);
        let pattern = |at: usize| u8::try_from(at % 251).unwrap();
        for (step, size) in steps {
            match step {
                0 => {
                    let credit = BUF_ALLOC - (sent - forwarded);
                    let length = size.min(usize::try_from(credit).unwrap());
                    let start = usize::try_from(sent).unwrap();
                    let data: Vec<u8> = (start..start + length).map(pattern).collect();
                    guest.write(5, &data);
                    sent += u32::try_from(length).unwrap();
                }
                1 => {
                    let mut data = vec![0; size];
                    if let Ok(count) = host.read(&mut data) {
                        for byte in &data[..count] {
                            prop_assert_eq!(*byte, pattern(usize::try_from(at_host).unwrap()));
                            at_host += 1;
                        }
                    }
                    guest.muxer.host_ready(0, false, true, false);
                }
                2 => {
                    let data: Vec<u8> = (host_sent..host_sent + size).map(pattern).collect();
                    host_sent += host.write(&data).unwrap_or(0);
                    guest.muxer.host_ready(0, true, false, false);
                }
                3 => {
                    guest.fwd_cnt = u32::try_from(at_guest).unwrap();
                    guest.send(5, Operation::CreditUpdate);
                }
                _ => {}
            }
            while let Some((header, payload)) = guest.receive() {
                prop_assert_ne!(header.operation, Operation::Reset);
                forwarded = header.fwd_cnt;
                for byte in payload {
                    prop_assert_eq!(byte, pattern(at_guest));
                    at_guest += 1;
                }
                let unread = at_guest - usize::try_from(guest.fwd_cnt).unwrap();
                prop_assert!(unread <= 10_000);
            }
        }
        prop_assert!(at_host <= sent && at_guest <= host_sent);
    }
}
