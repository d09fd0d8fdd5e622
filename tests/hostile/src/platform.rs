//! Attacks on what is no virtio device: the I/O APIC, ports, and addresses between devices.

use crate::{
    machine::{
        ARENA, DEVICE_SIZE, DEVICES, IOAPIC, MEMORY_END, SERIAL, exchange32, load, move_string,
        port_in, port_in_string, port_out, port_out_string, store, store32,
    },
    random::{Random, low, low16},
};

/// The I/O APIC's select register and its window.
const SELECT: u64 = IOAPIC;
/// See [`SELECT`].
const WINDOW: u64 = IOAPIC + 0x10;
/// The lower half of a pin's entry: INIT, SMI, NMI and the like to this processor would end the
/// attack early, and interrupts of the lowest vectors are not allowed.
const HARMLESS: u32 = !0x600;

/// One attack.
pub fn round(random: &mut Random) {
    match random.below(6) {
        0 => ioapic(random),
        1 => ports(random),
        2 => strings(random),
        3 => holes(random),
        4 => moves(random),
        _ => serial(random),
    }
}

/// Registers that exist and that do not, in order and out of it.
fn ioapic(random: &mut Random) {
    for _ in 0..1 + random.below(8) {
        match random.below(4) {
            0 => {
                let address = IOAPIC + random.below(0xff9);
                let width = random.pick(&[1, 2, 4, 8]);
                load(address, width);
                if address & !0xf != WINDOW {
                    store(address, random.number(), width);
                }
            }
            1 => {
                store32(SELECT, low(random.below(0x100)));
                load(WINDOW, 4);
            }
            _ => {
                let select = 0x10 + low(random.below(0x12));
                let upper = select % 2 == 1;
                let value = random.word() & if upper { u32::MAX } else { HARMLESS };
                store32(SELECT, select);
                store32(WINDOW, value);
            }
        }
    }
}

/// Any port. Nothing behind one of them resets the machine.
fn ports(random: &mut Random) {
    let port = low16(random.any());
    let width = random.pick(&[1, 2, 4]);
    port_in(port, width);
    port_out(port, random.word(), width);
}

/// The serial port's registers, also half outside.
fn serial(random: &mut Random) {
    for _ in 0..8 {
        let port = SERIAL - 4 + low16(random.below(16));
        let width = random.pick(&[1, 1, 2, 4]);
        port_in(port, width);
        port_out(port, random.word(), width);
    }
}

/// Many bytes at a port with one instruction.
fn strings(random: &mut Random) {
    let port = random.pick(&[SERIAL, SERIAL + 5, SERIAL + 7, 0, u16::MAX]);
    let count = random.pick(&[0, 1, 100, 4096, 5000]);
    port_out_string(port, ARENA, count);
    port_in_string(port, ARENA, count);
}

/// Addresses at the ends of memory and of devices, and across them.
fn holes(random: &mut Random) {
    let edge = match random.below(6) {
        0 => MEMORY_END,
        1 => 1 << 32,
        2 => IOAPIC + random.below(2) * 0x1000,
        3 => 0xfffb_d000,
        _ => DEVICES + random.below(6) * DEVICE_SIZE,
    };
    let address = edge - random.below(9);
    let width = random.pick(&[1, 2, 4, 8]);
    // The window would take a vector for this processor, and behind 4 GiB nothing is mapped.
    if address + width as u64 > 1 << 32 {
        return;
    }
    load(address, width);
    store(address, random.number(), width);
}

/// String and locked instructions on registers.
fn moves(random: &mut Random) {
    let device = DEVICES + random.below(5) * DEVICE_SIZE;
    let offset = random.below(0x180);
    let count = random.below(64);
    match random.below(3) {
        0 => move_string(device + offset, ARENA, count),
        1 => {
            for at in (0..64).step_by(8) {
                store(ARENA + at, random.number(), 8);
            }
            move_string(ARENA, device + offset, count);
        }
        _ => exchange32(device + (offset & !3), random.word()),
    }
}
