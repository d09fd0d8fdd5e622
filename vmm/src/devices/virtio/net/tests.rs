//! The device against a driver and a tap that are played by the tests. The tap is one end of a pair of
//! sockets that keep packets apart.

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::{Duration, Instant},
};

use proptest::prelude::*;
use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::{
    super::{
        mmio::{Transport, tests as mmio},
        queue::tests::Driver,
        registers::register,
    },
    *,
};
use crate::{bus::MmioDevice, memory::GuestMemory};

const MODERN: u64 = mmio::MODERN | feature::OFFERED;
const QUEUES: u64 = 0x4000;
/// Where the first buffer for packets to the guest lies, and the one for a packet from it.
const RECEIVED: u64 = 0x4_0000;
const SENT: u64 = 0x2_0000;
/// A buffer, of which four have room for any packet.
const BUFFER: u32 = 0x5000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

fn pair() -> (OwnedFd, File) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (tap, peer) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (tap, peer.into())
}

fn interface(taps: Vec<OwnedFd>) -> Interface {
    Interface {
        mac: MAC,
        mtu: 1500,
        taps,
    }
}

fn slot(memory: &GuestMemory, limits: Limits) -> NetHandler {
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let kicks: Arc<[_]> = (0..2).map(|_| Arc::new(event())).collect();
    let device = Net::new(kicks.clone());
    let transport = Transport::new(device, memory.clone(), kicks[0].clone(), event());
    NetHandler::new(Arc::new(transport), kicks, limits)
}

/// A slot with an interface, and the far ends of its taps.
fn device(memory: &GuestMemory, lanes: usize, limits: Limits) -> (NetHandler, Vec<File>) {
    let handler = slot(memory, limits);
    let (taps, peers) = (0..lanes).map(|_| pair()).unzip();
    handler.attach(interface(taps)).unwrap();
    (handler, peers)
}

fn queue(memory: &GuestMemory, index: u64) -> Driver<'_> {
    Driver::new(memory, QUEUES + index * 0x1000)
}

fn start(handler: &NetHandler, features: u64) {
    let base = u32::try_from(QUEUES).unwrap();
    mmio::start(&handler.transport, features, base);
}

fn packet(length: usize) -> Vec<u8> {
    let payload = (0..length).map(|index| u8::try_from(index % 251).unwrap());
    [0; HEADER_LEN].into_iter().chain(payload).collect()
}

fn readable() -> LaneState {
    let mut state = LaneState::default();
    state.readable = true;
    state
}

fn serve(handler: &NetHandler, lane: usize) -> Turn {
    let mut state = readable();
    handler.serve(lane, &mut state, |_| {})
}

/// Offers four buffers for packets from `RECEIVED` on.
fn offer(driver: &mut Driver<'_>) {
    for index in 0..4 {
        driver.send(&[(RECEIVED + index * u64::from(BUFFER), BUFFER, true)]);
    }
}

fn received(memory: &GuestMemory, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
fn a_slot_is_a_device_while_an_interface_is_attached() {
    let memory = crate::memory::allocate(1).unwrap();
    let handler = slot(&memory, Limits::default());
    let read = |offset| handler.transport.registers.get(offset);
    for _ in 0..2 {
        assert_eq!(read(register::DEVICE_ID), 0);
        assert!(handler.detach().is_none());
        let (tap, _peer) = pair();
        handler.attach(interface(vec![tap])).unwrap();
        assert_eq!(read(register::DEVICE_ID), 1);
        let config: Vec<u8> = (0..3)
            .flat_map(|word| read(register::CONFIG + word * 4).to_le_bytes())
            .collect();
        assert_eq!(config, [2, 0, 0, 0, 0, 9, 1, 0, 1, 0, 0xdc, 5]);
        assert!(handler.attach(interface(vec![pair().0])).is_err());
        start(&handler, MODERN);
        assert_eq!(read(register::STATUS), 15);
        handler.transport.write(register::STATUS, &[0; 4]);
        assert_eq!(handler.detach().unwrap().len(), 1);
        assert_eq!(read(register::CONFIG), 0);
    }
}

#[test]
fn a_driver_that_stays_must_reset() {
    let memory = crate::memory::allocate(1).unwrap();
    let (handler, mut peers) = device(&memory, 1, Limits::default());
    start(&handler, MODERN);
    offer(&mut queue(&memory, 0));
    serve(&handler, 0);
    drop(handler.detach());
    assert_eq!(peers[0].read(&mut [0]).unwrap(), 0, "the tap is closed");
    let read = |offset| handler.transport.registers.get(offset);
    assert_eq!(read(register::STATUS), 64);
    assert_eq!(serve(&handler, 0), Turn::default());
    start(&handler, MODERN);
    assert_eq!(read(register::STATUS) & 4, 4, "as it says itself");
    assert!(!handler.transport.lock().is_running());
    let (tap, _peer) = pair();
    handler.attach(interface(vec![tap])).unwrap();
    assert!(!handler.transport.lock().is_running());
    handler.transport.write(register::STATUS, &[0; 4]);
    start(&handler, MODERN);
    assert!(handler.transport.lock().is_running());
}

#[test]
fn a_driver_that_cannot_take_what_a_tap_gives_is_refused() {
    let memory = crate::memory::allocate(1).unwrap();
    let (handler, _peers) = device(&memory, 2, Limits::default());
    for (features, agreed) in [
        (MODERN, true),
        (MODERN | feature::SEVERAL, true),
        (mmio::MODERN | feature::NEEDED, true),
        (mmio::MODERN, false),
        (MODERN & !feature::MRG_RXBUF, false),
        (MODERN & !feature::GUEST_TSO6, false),
        (MODERN | feature::MQ, false),
        (MODERN | 1 << 9, false),
    ] {
        handler.transport.write(register::STATUS, &[0; 4]);
        start(&handler, features);
        let running = handler.transport.lock().is_running();
        assert_eq!(running, agreed, "{features:#x}");
    }
}

#[test]
fn packets_pass_in_both_directions_before_and_after_a_restore() {
    let memory = crate::memory::allocate(1).unwrap();
    let (before, mut peers) = device(&memory, 1, Limits::default());
    start(&before, MODERN);
    let (mut to_guest, mut from_guest) = (queue(&memory, 0), queue(&memory, 1));
    offer(&mut to_guest);
    let mut exchange = |handler: &NetHandler, peer: &mut File, length: usize, at: u64| {
        let sent = packet(length);
        memory.write_slice(&sent, GuestAddress(SENT)).unwrap();
        let rest = u32::try_from(sent.len() - 5).unwrap();
        from_guest.send(&[(SENT, 5, false), (SENT + 5, rest, false)]);
        peer.write_all(&sent).unwrap();
        serve(handler, 0);
        assert_eq!(from_guest.used(), Some(0));
        let mut bytes = vec![0; sent.len() + 1];
        assert_eq!(peer.read(&mut bytes).unwrap(), sent.len());
        assert_eq!(bytes[..sent.len()], sent);
        assert_eq!(to_guest.used(), u32::try_from(sent.len()).ok());
        assert_eq!(to_guest.used(), None);
        let mut expected = sent;
        expected[10] = 1;
        assert_eq!(received(&memory, at, expected.len()), expected);
        // There must be room for a longer one.
        let again = RECEIVED + 0x1_4000 + at - RECEIVED;
        to_guest.send(&[(again, BUFFER, true)]);
    };
    exchange(&before, &mut peers[0], 100, RECEIVED);
    let (after, mut peers) = device(&memory, 1, Limits::default());
    after.restore(&before.save()).unwrap();
    exchange(&after, &mut peers[0], 1514, RECEIVED + u64::from(BUFFER));
    let stats = after.transport.stats.snapshot();
    assert_eq!((stats.bytes_to_guest, stats.bytes_from_guest), (1514, 1514));
}

#[test]
fn a_long_packet_lies_in_several_buffers() {
    let memory = crate::memory::allocate(1).unwrap();
    let (handler, mut peers) = device(&memory, 1, Limits::default());
    start(&handler, MODERN);
    let mut driver = queue(&memory, 0);
    offer(&mut driver);
    // The longest that a tap gives, which is more than three buffers.
    let mut sent = packet(65_550);
    peers[0].write_all(&sent).unwrap();
    serve(&handler, 0);
    let parts: Vec<_> = std::iter::from_fn(|| driver.used()).collect();
    assert_eq!(parts, [BUFFER, BUFFER, BUFFER, 65_562 - 3 * BUFFER]);
    sent[10] = 4;
    assert_eq!(received(&memory, RECEIVED, sent.len()), sent);
}

#[test]
fn packets_wait_for_room_in_the_guest() {
    let memory = crate::memory::allocate(1).unwrap();
    let (handler, mut peers) = device(&memory, 1, Limits::default());
    start(&handler, MODERN);
    let mut driver = queue(&memory, 0);
    let mut state = readable();
    peers[0].write_all(&packet(60)).unwrap();
    for index in 0..3 {
        driver.send(&[(RECEIVED + index * u64::from(BUFFER), BUFFER, true)]);
        handler.serve(0, &mut state, |_| {});
        assert_eq!(driver.used(), None);
        assert!(state.readable);
    }
    // The driver is to notify with the next one.
    let event: u16 = memory
        .read_obj(GuestAddress(QUEUES + 0x800 + 4 + 16 * 8))
        .unwrap();
    assert_eq!(event, 3);
    driver.send(&[(RECEIVED + 3 * u64::from(BUFFER), BUFFER, true)]);
    handler.serve(0, &mut state, |_| {});
    assert_eq!(driver.used(), Some(72));
    assert!(handler.transport.interrupt.event().read().is_ok());
}

#[test]
fn a_tap_without_room_is_waited_for_and_nothing_is_lost() {
    let memory = crate::memory::allocate(1).unwrap();
    let (handler, mut peers) = device(&memory, 1, Limits::default());
    start(&handler, MODERN);
    let mut driver = queue(&memory, 1);
    let mut state = LaneState::default();
    let (mut sent, mut waits) = (0_u8, 0);
    while waits == 0 {
        let mut bytes = packet(30_000);
        bytes[20] = sent;
        memory.write_slice(&bytes, GuestAddress(SENT)).unwrap();
        driver.send(&[(SENT, 30_012, false)]);
        sent += 1;
        let turn = handler.serve(0, &mut state, |_| waits += 1);
        assert!(!turn.more);
        assert_eq!(driver.used().is_some(), waits == 0);
    }
    assert!(state.full);
    handler.serve(0, &mut state, |_| panic!("it is known to be full"));
    let mut bytes = vec![0; 40_000];
    for expected in 0..sent {
        if expected + 1 == sent {
            state.full = false;
            handler.serve(0, &mut state, |_| panic!("there is room"));
            assert_eq!(driver.used(), Some(0));
        }
        assert_eq!(peers[0].read(&mut bytes).unwrap(), 30_012);
        assert_eq!(bytes[20], expected);
    }
}

#[test]
fn packets_that_are_none_are_dropped() {
    let memory = crate::memory::allocate(1).unwrap();
    let (handler, mut peers) = device(&memory, 1, Limits::default());
    start(&handler, MODERN);
    let mut driver = queue(&memory, 1);
    for buffers in [
        &[(SENT, 12, false)][..],
        &[(SENT, 0x2_0000, false)],
        &[(SENT, 100, true)],
        &[(SENT, 60_000, false), (SENT, 60_000, false)],
    ] {
        driver.send(buffers);
        assert_eq!(serve(&handler, 0), Turn::default());
        assert_eq!(driver.used(), Some(0));
    }
    let error = peers[0].read(&mut [0; 100]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    assert!(handler.transport.lock().is_running());
    // A buffer for packets to the guest has room for a header at least.
    let mut driver = queue(&memory, 0);
    driver.send(&[(RECEIVED, 11, true)]);
    serve(&handler, 0);
    assert!(!handler.transport.lock().is_running());
}

#[test]
fn too_many_packets_wait() {
    let memory = crate::memory::allocate(1).unwrap();
    let limits = Limits::new(0, 1000);
    let (handler, mut peers) = device(&memory, 1, limits);
    start(&handler, MODERN);
    let (mut to_guest, mut from_guest) = (queue(&memory, 0), queue(&memory, 1));
    offer(&mut to_guest);
    let bytes = packet(2988);
    memory.write_slice(&bytes, GuestAddress(SENT)).unwrap();
    // The first takes what three seconds give, of which one was there.
    for _ in 0..2 {
        peers[0].write_all(&bytes).unwrap();
        from_guest.send(&[(SENT, 3000, false)]);
    }
    let turn = serve(&handler, 0);
    let until = turn
        .after
        .unwrap()
        .saturating_duration_since(Instant::now());
    assert!(
        until > Duration::from_secs(1) && until <= Duration::from_secs(2),
        "{until:?}"
    );
    assert!(!turn.more);
    for driver in [&mut to_guest, &mut from_guest] {
        assert!(driver.used().is_some());
        assert!(driver.used().is_none());
    }
}

#[test]
fn as_many_lanes_bring_packets_as_the_driver_uses() {
    let memory = crate::memory::allocate(1).unwrap();
    let (handler, mut peers) = device(&memory, 2, Limits::default());
    start(&handler, MODERN | feature::SEVERAL);
    let mut queues = [queue(&memory, 0), queue(&memory, 2)];
    let mut commands = queue(&memory, 4);
    let mut command = |bytes: &[u8]| {
        memory.write_slice(bytes, GuestAddress(SENT)).unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        event_loop::take(handler.kick(0).unwrap());
        commands.send(&[(SENT, length, false), (SENT + 100, 1, true)]);
        handler
            .transport
            .write(register::QUEUE_NOTIFY, &[4, 0, 0, 0]);
        assert_eq!(event_loop::take(handler.kick(0).unwrap()), 1);
        handler.kicked(0);
        assert_eq!(commands.used(), Some(1));
        memory.read_obj::<u8>(GuestAddress(SENT + 100)).unwrap()
    };
    let mut bring = |at: usize| {
        for driver in &mut queues {
            offer(driver);
        }
        peers[1].write_all(&packet(60)).unwrap();
        serve(&handler, 1);
        let used = [queues[0].used(), queues[1].used()];
        let mut expected = [None, None];
        expected[at] = Some(72);
        assert_eq!(used, expected);
    };
    bring(0);
    for wrong in [
        &[4, 0, 0, 0][..],
        &[4, 0, 3, 0],
        &[4, 0, 2],
        &[4, 0, 2, 0, 0],
        &[4, 1, 2, 0],
        &[0, 0, 2, 0],
        &[],
    ] {
        assert_eq!(command(wrong), 1, "{wrong:?}");
    }
    assert_eq!(command(&[4, 0, 2, 0]), 0);
    assert_eq!(handler.save().active, 2);
    bring(1);
    assert_eq!(command(&[4, 0, 1, 0]), 0);
    handler.transport.write(register::STATUS, &[0; 4]);
    assert_eq!(handler.save().active, 1);
}

/// The device at work with its threads.
fn workers(memory: &GuestMemory) -> (NetWorkers, Arc<Transport<Net>>, Kicks) {
    let handler = slot(memory, Limits::default());
    let (transport, kicks) = (handler.transport.clone(), handler.kicks());
    let other = slot(memory, Limits::default());
    let workers = NetWorkers::spawn(vec![handler, other], 2).unwrap();
    (workers, transport, kicks)
}

fn wait(fd: BorrowedFd<'_>) {
    let mut polled = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut polled, None).unwrap();
}

#[test]
fn threads_bring_packets_until_the_interface_is_gone() {
    let memory = crate::memory::allocate(1).unwrap();
    let (workers, transport, kicks) = workers(&memory);
    for round in 0..3 {
        let (taps, mut peers): (Vec<_>, Vec<_>) = (0..2).map(|_| pair()).unzip();
        // Somebody else still has a tap of theirs.
        let _kept = taps[0].try_clone().unwrap();
        workers.attach(0, interface(taps)).unwrap();
        // A packet that was there first.
        peers[0].write_all(&packet(60 + round)).unwrap();
        transport.write(register::STATUS, &[0; 4]);
        mmio::start(&transport, MODERN, u32::try_from(QUEUES).unwrap());
        let (mut to_guest, mut from_guest) = (queue(&memory, 0), queue(&memory, 1));
        clear(&memory);
        offer(&mut to_guest);
        from_guest.send(&[(SENT, 100, false)]);
        event_loop::signal(&kicks[0]);
        wait(peers[0].as_fd());
        assert_eq!(peers[0].read(&mut [0; 200]).unwrap(), 100);
        let event = transport.interrupt.event();
        // SAFETY: the event outlives the wait.
        let event_fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        let length = loop {
            if let Some(length) = to_guest.used() {
                break length;
            }
            wait(event_fd);
            event_loop::take(event);
        };
        assert_eq!(usize::try_from(length).unwrap(), 72 + round);
        workers.detach(0).unwrap();
        event_loop::take(event);
        assert_eq!(peers[1].read(&mut [0; 100]).unwrap(), 0, "closed");
    }
}

/// Empties the rings of the first queues.
fn clear(memory: &GuestMemory) {
    memory
        .write_slice(&[0; 0x2000], GuestAddress(QUEUES))
        .unwrap();
}

#[test]
fn what_cannot_be_attached_is_refused_and_closed() {
    let memory = crate::memory::allocate(1).unwrap();
    let (workers, ..) = workers(&memory);
    let attach = |slot, taps: usize, mtu| {
        let (taps, peers): (Vec<_>, Vec<_>) = (0..taps).map(|_| pair()).unzip();
        let interface = Interface {
            mtu,
            ..interface(taps)
        };
        let result = workers.attach(slot, interface);
        for mut peer in peers {
            let read = peer.read(&mut [0]);
            assert_eq!(read.is_ok(), result.is_err());
        }
        result
    };
    assert!(matches!(attach(2, 1, 1500), Err(NicError::NoSlot(2))));
    assert!(matches!(attach(1, 0, 1500), Err(NicError::Queues(0, 2))));
    assert!(matches!(attach(1, 3, 1500), Err(NicError::Queues(3, 2))));
    assert!(matches!(attach(1, 1, 67), Err(NicError::Mtu(67))));
    assert!(matches!(workers.detach(1), Err(NicError::Empty(1))));
    let file = tempfile::tempfile().unwrap().into();
    let error = workers.attach(1, interface(vec![file])).unwrap_err();
    assert!(matches!(error, NicError::Watch(_)), "{error}");
    attach(1, 1, 1500).unwrap();
    assert!(matches!(attach(1, 1, 1500), Err(NicError::Taken(1))));
    workers.detach(1).unwrap();
    attach(1, 2, 1500).unwrap();
}

proptest! {
    #[test]
    fn no_chains_break_it(
        steps in proptest::collection::vec(
            (0u64..5, proptest::collection::vec((any::<u32>(), any::<u32>(), any::<bool>()), 1..5)),
            1..30,
        ),
    ) {
        let memory = crate::memory::allocate(1).unwrap();
        let (handler, mut peers) = device(&memory, 2, Limits::default());
        start(&handler, MODERN | feature::SEVERAL);
        let mut queues: Vec<_> = (0..5).map(|index| queue(&memory, index)).collect();
        let mut states = [LaneState::default(), LaneState::default()];
        for (index, buffers) in steps {
            let buffers: Vec<_> = buffers
                .into_iter()
                // Mostly memory behind the rings, and lengths that fit.
                .map(|(address, length, writable)| {
                    let far = address % 16 == 0;
                    let address = u64::from(address);
                    let address = if far { address } else { SENT + address % 0xd_0000 };
                    (address, if far { length } else { length % 0x1_0000 }, writable)
                })
                .collect();
            queues[usize::try_from(index).unwrap()].send(&buffers);
            let _ = peers[0].write(&packet(70));
            handler.kicked(0);
            for (lane, state) in states.iter_mut().enumerate() {
                state.readable = true;
                handler.serve(lane, state, |_| {});
            }
        }
        let state = handler.save();
        prop_assert!(device(&memory, 2, Limits::default()).0.restore(&state).is_ok());
    }
}
