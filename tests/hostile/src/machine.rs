//! The machine under the guest: memory, ports, the other processor, and the end.
//!
//! Memory is accessed by address and with single instructions, never through Rust's references: most
//! of it is shared with devices, and some of it is no memory. The functions for that are not `unsafe`,
//! although a wrong address would be: the guest consists of little else, and harms only itself.

use core::arch::{asm, x86_64::_rdtsc};

use crate::random::{low, low16};

/// Port of the serial console.
pub const SERIAL: u16 = 0x3f8;
/// First page of the virtio devices.
pub const DEVICES: u64 = 0xd000_0000;
/// From one virtio device to the next.
pub const DEVICE_SIZE: u64 = 0x1000;
/// The I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APIC.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// End of the guest's memory.
pub const MEMORY_END: u64 = (crate::MEMORY_MIB as u64) << 20;
/// Memory that nothing but devices' rings and buffers lies in, up to its end. Devices may be told to
/// write to this or to where no memory is, since the guest itself is not there.
pub const ARENA: u64 = 32 << 20;

/// Reads `width` bytes (1, 2, 4 or 8) at any address, with one instruction.
pub fn load(address: u64, width: usize) -> u64 {
    let value: u64;
    // SAFETY: all of the first 4 GiB is mapped to itself, and reading changes nothing that Rust
    // relies on.
    unsafe {
        match width {
            1 => asm!("movzx {0:e}, byte ptr [{1}]", out(reg) value, in(reg) address),
            2 => asm!("movzx {0:e}, word ptr [{1}]", out(reg) value, in(reg) address),
            4 => asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) address),
            _ => asm!("mov {0}, qword ptr [{1}]", out(reg) value, in(reg) address),
        }
    }
    value
}

/// Writes `width` bytes (1, 2, 4 or 8) to any address where nothing of the guest's own lies, with
/// one instruction.
pub fn store(address: u64, value: u64, width: usize) {
    // SAFETY: as for reading; callers keep to the arena, to low memory and to devices.
    unsafe {
        match width {
            1 => asm!("mov byte ptr [{0}], {1}", in(reg) address, in(reg_byte) low_byte(value)),
            2 => asm!("mov word ptr [{0}], {1:x}", in(reg) address, in(reg) value),
            4 => asm!("mov dword ptr [{0}], {1:e}", in(reg) address, in(reg) value),
            _ => asm!("mov qword ptr [{0}], {1}", in(reg) address, in(reg) value),
        }
    }
}

/// Reads 16 bits.
pub fn load16(address: u64) -> u16 {
    low16(load(address, 2))
}

/// Reads 32 bits.
pub fn load32(address: u64) -> u32 {
    low(load(address, 4))
}

/// Writes 16 bits.
pub fn store16(address: u64, value: u16) {
    store(address, value.into(), 2);
}

/// Writes 32 bits.
pub fn store32(address: u64, value: u32) {
    store(address, value.into(), 4);
}

/// Copies bytes to memory.
pub fn store_bytes(address: u64, bytes: &[u8]) {
    for (at, byte) in (address..).zip(bytes) {
        store(at, (*byte).into(), 1);
    }
}

/// Exchanges 32 bits in one locked instruction.
pub fn exchange32(address: u64, value: u32) {
    // SAFETY: as for `store`.
    unsafe { asm!("xchg dword ptr [{0}], {1:e}", in(reg) address, inout(reg) value => _) }
}

/// Copies `count` bytes with one string instruction, from and to any places as for [`store`].
pub fn move_string(from: u64, to: u64, count: u64) {
    // SAFETY: as for `load` and `store`.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rsi") from => _, inout("rdi") to => _);
    }
}

/// IN of `width` bytes (1, 2 or 4).
pub fn port_in(port: u16, width: usize) -> u32 {
    let value: u32;
    // SAFETY: reading a port changes no memory.
    unsafe {
        match width {
            1 => asm!("in al, dx", "movzx eax, al", in("dx") port, out("eax") value),
            2 => asm!("in ax, dx", "movzx eax, ax", in("dx") port, out("eax") value),
            _ => asm!("in eax, dx", in("dx") port, out("eax") value),
        }
    }
    value
}

/// OUT of `width` bytes (1, 2 or 4).
pub fn port_out(port: u16, value: u32, width: usize) {
    // SAFETY: no device behind a port changes memory.
    unsafe {
        match width {
            1 => asm!("out dx, al", in("dx") port, in("eax") value),
            2 => asm!("out dx, ax", in("dx") port, in("eax") value),
            _ => asm!("out dx, eax", in("dx") port, in("eax") value),
        }
    }
}

/// OUT of `count` bytes from memory with one string instruction.
pub fn port_out_string(port: u16, from: u64, count: u64) {
    // SAFETY: as for `port_out` and `load`.
    unsafe { asm!("rep outsb", inout("rcx") count => _, inout("rsi") from => _, in("dx") port) }
}

/// IN of `count` bytes to memory as for [`store`], with one string instruction.
pub fn port_in_string(port: u16, to: u64, count: u64) {
    // SAFETY: as for `store`.
    unsafe { asm!("rep insb", inout("rcx") count => _, inout("rdi") to => _, in("dx") port) }
}

/// The processor's clock, in cycles.
pub fn cycles() -> u64 {
    // SAFETY: reads a counter that every x86-64 processor has.
    unsafe { _rdtsc() }
}

/// Waits until `done`, at most this many cycles. False when it was in vain.
pub fn wait(limit: u64, mut done: impl FnMut() -> bool) -> bool {
    let start = cycles();
    loop {
        if done() {
            return true;
        }
        if cycles().wrapping_sub(start) > limit {
            return false;
        }
        core::hint::spin_loop();
    }
}

/// Sleeps until an interrupt unless `done`, again and again, until `done`.
pub fn sleep_until(mut done: impl FnMut() -> bool) {
    // SAFETY: the handler changes nothing; HLT directly behind STI misses no interrupt.
    unsafe { asm!("cli") };
    while !done() {
        // SAFETY: as above.
        unsafe { asm!("sti", "hlt", "cli") };
    }
}

/// Sends INIT, and then the address of its first instructions, to the second processor.
pub fn start_second(code: u64) {
    const INIT: u32 = 0x4500;
    const START: u32 = 0x4600;
    for command in [INIT, START | low(code >> 12)] {
        store32(LOCAL_APIC + 0x310, 1 << 24);
        store32(LOCAL_APIC + 0x300, command);
    }
}

/// Switches the local APIC on, so that it takes interrupts and sends them to other processors.
pub fn enable_local_apic() {
    store32(LOCAL_APIC + 0xf0, 0x1ff);
}

/// Ends the VM: an exception without a table of handlers is a triple fault.
pub fn reset() -> ! {
    let table = [0u16; 5];
    // SAFETY: nothing runs afterwards.
    unsafe { asm!("lidt [{0}]", "ud2", in(reg) table.as_ptr(), options(noreturn)) }
}

/// A piece of a line on the serial console.
#[derive(Clone, Copy)]
pub enum Word<'a> {
    /// Text.
    Text(&'a str),
    /// A number, in decimal.
    Number(u64),
    /// An address, in hexadecimal.
    Address(u64),
}

/// Says a line on the serial console, whatever the attacks have made of it.
///
/// Not with Rust's formatting: that is compiled with vector instructions.
pub fn say(words: &[Word<'_>]) {
    port_out(SERIAL + 3, 3, 1);
    say_text("\n");
    for word in words {
        match *word {
            Word::Text(text) => say_text(text),
            Word::Number(number) => say_number(number, 10),
            Word::Address(number) => {
                say_text("0x");
                say_number(number, 16);
            }
        }
    }
    say_text("\n");
}

fn say_text(text: &str) {
    for byte in text.bytes() {
        port_out(SERIAL, byte.into(), 1);
    }
}

fn say_number(number: u64, base: u64) {
    if number >= base {
        say_number(number / base, base);
    }
    let digit = low(number % base);
    let first = if digit < 10 { b'0' } else { b'a' - 10 };
    port_out(SERIAL, u32::from(first) + digit, 1);
}

#[allow(clippy::cast_possible_truncation, reason = "that is its purpose")]
fn low_byte(value: u64) -> u8 {
    value as u8
}
