//! The transport against a driver that is played by the tests.

use proptest::prelude::*;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

struct Nothing {
    resets: usize,
}

impl Device for Nothing {
    fn id(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[16, 16]
    }
    fn config(&self) -> &[u8] {
        b"configuration"
    }
    fn reset(&mut self) {
        self.resets += 1;
    }
}

pub fn transport<D: Device>(device: D, memory: GuestMemory) -> Transport<D> {
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    Transport::new(device, memory, event(), event())
}

fn nothing() -> Transport<Nothing> {
    transport(Nothing { resets: 0 }, crate::memory::allocate(1).unwrap())
}

fn read<D: Device>(transport: &Transport<D>, offset: u64) -> u32 {
    transport.registers.get(offset)
}

fn write<D: Device>(transport: &Transport<D>, offset: u64, value: u32) {
    transport.write(offset, &value.to_le_bytes());
}

/// What a driver does until it is ready, with each queue in its own 4 KiB from `memory`.
pub fn start<D: Device>(transport: &Transport<D>, features: u64, memory: u32) {
    write(transport, register::STATUS, 1);
    write(transport, register::STATUS, 3);
    for (selector, part) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
        write(transport, register::DRIVER_FEATURES_SEL, selector);
        let part = u32::try_from(part).unwrap();
        write(transport, register::DRIVER_FEATURES, part);
    }
    write(transport, register::STATUS, 11);
    let queues = u32::try_from(transport.lock().queues.len()).unwrap();
    for index in 0..queues {
        let base = memory + index * 0x1000;
        write(transport, register::QUEUE_SEL, index);
        write(transport, register::QUEUE_NUM, 16);
        write(transport, register::QUEUE_DESC_LOW, base);
        write(transport, register::QUEUE_DRIVER_LOW, base + 0x400);
        write(transport, register::QUEUE_DEVICE_LOW, base + 0x800);
        write(transport, register::QUEUE_READY, 1);
    }
    write(transport, register::STATUS, 15);
}

pub const MODERN: u64 = FEATURE_VERSION_1 | FEATURE_EVENT_IDX;

#[test]
fn a_driver_finds_and_starts_the_device() {
    let transport = nothing();
    assert_eq!(read(&transport, register::MAGIC), 0x7472_6976);
    assert_eq!(read(&transport, register::VERSION), 2);
    assert_eq!(read(&transport, register::DEVICE_ID), 42);
    let word = read(&transport, register::CONFIG + 4);
    assert_eq!(&word.to_le_bytes(), b"igur");
    let end = read(&transport, register::CONFIG + 12);
    assert_eq!(&end.to_le_bytes(), b"n\0\0\0");
    write(&transport, register::DEVICE_FEATURES_SEL, 1);
    assert_eq!(read(&transport, register::DEVICE_FEATURES), 1);
    start(&transport, MODERN, 0x4000);
    assert_eq!(read(&transport, register::STATUS), 15);
    assert_eq!(read(&transport, register::QUEUE_READY), 1);
    let inner = transport.lock();
    assert!(inner.is_running());
    assert!(inner.queues.iter().all(QueueT::event_idx_enabled));
}

#[test]
fn features_that_were_not_offered_are_not_agreed_on() {
    for features in [MODERN | 1 << 5, FEATURE_EVENT_IDX] {
        let transport = nothing();
        start(&transport, features, 0x4000);
        assert_eq!(read(&transport, register::STATUS) & 8, 0);
        assert!(!transport.lock().is_running());
        assert!(!transport.lock().queues[0].ready());
    }
}

#[test]
fn a_queue_outside_memory_never_becomes_ready() {
    let transport = nothing();
    start(&transport, MODERN, 0xf_f000);
    assert!(transport.lock().queues[0].ready());
    assert!(!transport.lock().queues[1].ready());
}

#[test]
fn a_ready_queue_cannot_be_moved() {
    let transport = nothing();
    start(&transport, MODERN, 0x4000);
    let before = transport.save();
    write(&transport, register::QUEUE_SEL, 0);
    write(&transport, register::QUEUE_DESC_LOW, 0x9000);
    write(&transport, register::QUEUE_READY, 0);
    assert_eq!(transport.save().queues, before.queues);
}

#[test]
fn a_reset_forgets_everything() {
    let transport = nothing();
    let fresh = transport.save();
    start(&transport, MODERN, 0x4000);
    transport.interrupt.config_changed();
    write(&transport, register::STATUS, 0);
    assert_eq!(transport.save(), fresh);
    assert_eq!(transport.lock().device.resets, 1);
}

#[test]
fn a_change_is_shown_until_it_is_acknowledged() {
    let transport = nothing();
    let calm = read(&transport, register::INTERRUPT_STATUS);
    assert_eq!(calm & 3, 1);
    transport.interrupt.config_changed();
    assert_eq!(read(&transport, register::INTERRUPT_STATUS), 3);
    write(&transport, register::INTERRUPT_ACK, 1);
    assert_eq!(read(&transport, register::INTERRUPT_STATUS), 3);
    write(&transport, register::INTERRUPT_ACK, 3);
    assert_eq!(read(&transport, register::INTERRUPT_STATUS), calm);
}

#[test]
fn a_driver_that_breaks_the_rules_must_reset() {
    let transport = nothing();
    start(&transport, MODERN, 0x4000);
    transport.run(|_, _| Err(QueueError::Order));
    assert_eq!(read(&transport, register::STATUS), 15 | 64);
    transport.run(|_, _| panic!("a stopped device must not work"));
}

#[test]
fn a_saved_transport_carries_on() {
    let before = nothing();
    start(&before, MODERN, 0x4000);
    before.interrupt.config_changed();
    let state = before.save();
    let after = nothing();
    after.restore(&state).unwrap();
    assert_eq!(after.save(), state);
    assert!(after.lock().is_running());
    let mut strange = state.clone();
    strange.queues.pop();
    let error = after.restore(&strange).unwrap_err();
    assert!(matches!(error, RestoreError::Queues(1, 2)));
}

proptest! {
    #[test]
    fn no_register_access_breaks_the_transport(
        accesses in proptest::collection::vec((0u64..0x120, any::<u32>(), 1usize..9), 1..200),
    ) {
        let transport = nothing();
        for (offset, value, length) in accesses {
            // Mostly registers, mostly whole ones.
            let offset = if value % 3 == 0 { offset } else { offset & !3 };
            let length = if value % 5 == 0 { length } else { 4 };
            let mut data = [0; 8];
            data[..4].copy_from_slice(&(value & 0xffff).to_le_bytes());
            transport.write(offset, &data[..length]);
        }
        let running = transport.lock().is_running();
        prop_assert!(!running || read(&transport, register::STATUS) & 15 == 15);
    }
}
