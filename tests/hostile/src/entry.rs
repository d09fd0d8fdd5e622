//! The first instructions, and what a program needs that has no operating system.

use core::{
    arch::{asm, global_asm},
    panic::PanicInfo,
    slice,
};

use crate::{
    calm::VECTOR,
    machine::{
        self,
        Word::{Address, Number, Text},
        say,
    },
    race,
};

/// Where `boot_params` has the address of the command line.
const COMMAND_LINE: u64 = 0x228;
/// The longest command line that the VMM passes on.
const COMMAND_LINE_MAX: usize = 2048;
/// The processor's exceptions.
const EXCEPTIONS: usize = 32;
/// Bytes from the entry of one exception to that of the next.
const ENTRY: u64 = 16;
/// Selector of the code segment.
const CODE: u64 = 0x10;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
const INTERRUPT_GATE: u64 = 0x8e << 40;

/// A page of a table of the processor.
#[repr(C, align(4096))]
struct Table([u64; 512]);

static mut ROOT: Table = Table([0; 512]);
static mut POINTERS: Table = Table([0; 512]);
/// All of the first 4 GiB, in pages of 2 MiB.
static mut DIRECTORIES: [Table; 4] = [const { Table([0; 512]) }; 4];
static mut INTERRUPTS: Table = Table([0; 512]);
/// Null, unused, 64-bit code, data: with the selectors that the VMM starts the guest with.
static SEGMENTS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

global_asm!(
    // The VMM enters here in 64-bit mode, with the address of `boot_params` in rsi. SSE is off.
    ".section .text.entry, \"ax\"",
    ".global _start",
    "_start:",
    "lea rsp, [rip + first_stack_end]",
    "mov rax, cr0",
    "and rax, -5",
    "or rax, 2",
    "mov cr0, rax",
    "mov rax, cr4",
    "or rax, 0x600",
    "mov cr4, rax",
    "mov rdi, rsi",
    "call {first}",
    "ud2",
    // A device's interrupt only ends a HLT.
    ".balign 16",
    "interrupt:",
    "push rax",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
    // Which exception it is follows from where the call comes from.
    ".balign 16",
    "exceptions:",
    ".rept 32",
    ".balign 16",
    "call exception",
    ".endr",
    "exception:",
    "pop rdi",
    "mov rsi, [rsp]",
    "mov rdx, [rsp + 8]",
    "and rsp, -16",
    "call {exception}",
    "ud2",
    // Here the second processor is in 64-bit mode too. It sleeps when it is done, until it is
    // started again.
    "second_start:",
    "mov eax, 0x18",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "lea rsp, [rip + second_stack_end]",
    "call {second}",
    "2:",
    "hlt",
    "jmp 2b",
    // The second processor starts in real mode at a copy of this, and takes over the tables of the
    // first.
    ".section .rodata.trampoline, \"a\"",
    "trampoline:",
    ".code16",
    "cli",
    "mov ax, cs",
    "mov ds, ax",
    ".byte 0x66, 0x0f, 0x01, 0x16", // lgdt
    ".word segments_pointer - trampoline",
    ".byte 0x66, 0xb8", // mov eax, ROOT
    ".long {root}",
    "mov cr3, eax",
    "mov eax, 0x620",
    "mov cr4, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "and eax, 0x9ffffffb",
    "or eax, 0x80000003",
    "mov cr0, eax",
    ".byte 0x66, 0xea", // ljmp
    ".long second_start",
    ".word 0x10",
    "segments_pointer:",
    ".word 31",
    ".long {segments}",
    "trampoline_end:",
    ".code64",
    ".section .bss, \"aw\", @nobits",
    ".balign 16",
    ".skip 65536",
    "first_stack_end:",
    ".skip 65536",
    "second_stack_end:",
    ".section .text",
    first = sym first,
    second = sym race::run,
    exception = sym exception,
    root = sym ROOT,
    segments = sym SEGMENTS,
);

// SAFETY: labels of the assembly above.
unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    static exceptions: u8;
    static interrupt: u8;
}

extern "C" fn first(boot_params: u64) -> ! {
    set_tables();
    let line = u64::from(machine::load32(boot_params + COMMAND_LINE));
    let mut bytes = [0; COMMAND_LINE_MAX];
    let mut length = 0;
    for (at, byte) in (line..).zip(&mut bytes) {
        [*byte, ..] = machine::load(at, 1).to_le_bytes();
        if *byte == 0 {
            break;
        }
        length += 1;
    }
    let (start, end) = (&raw const trampoline, &raw const trampoline_end);
    // SAFETY: both are in the image, one behind the other, and nothing changes what is between.
    let code = unsafe { slice::from_raw_parts(start, end.addr() - start.addr()) };
    crate::run(&bytes[..length], code);
    machine::reset()
}

/// Maps the first 4 GiB to themselves, and takes exceptions and the interrupt.
fn set_tables() {
    let address = |pointer: *const Table| pointer.expose_provenance() as u64;
    // SAFETY: this is the only processor yet, and after this nothing in Rust uses the tables.
    unsafe {
        let directories = &raw mut DIRECTORIES;
        for (number, directory) in (0..).zip(&mut *directories) {
            for (page, entry) in (number * 512..).zip(&mut directory.0) {
                *entry = page << 21 | LARGE | PRESENT_WRITABLE;
            }
        }
        for (number, directory) in (*directories).iter().enumerate() {
            (*&raw mut POINTERS).0[number] = address(directory) | PRESENT_WRITABLE;
        }
        (*&raw mut ROOT).0[0] = address(&raw const POINTERS) | PRESENT_WRITABLE;
        let gates = &raw mut INTERRUPTS;
        let set_gate = |vector: usize, handler: u64| {
            let low = handler & 0xffff | CODE << 16 | INTERRUPT_GATE;
            (*gates).0[vector * 2] = low | (handler >> 16 & 0xffff) << 48;
            (*gates).0[vector * 2 + 1] = handler >> 32;
        };
        for vector in 0..EXCEPTIONS {
            let offset = vector as u64 * ENTRY;
            set_gate(vector, (&raw const exceptions).addr() as u64 + offset);
        }
        set_gate(VECTOR as usize, (&raw const interrupt).addr() as u64);
        load_table("lidt", (&raw const INTERRUPTS).addr() as u64, 4095);
        load_table("lgdt", (&raw const SEGMENTS).addr() as u64, 31);
        asm!("mov cr3, {0}", in(reg) address(&raw const ROOT));
    }
}

/// Loads one of the two registers that point to a table.
///
/// # Safety
///
/// The table has that many bytes and one more, is in order, and stays.
unsafe fn load_table(which: &str, address: u64, limit: u16) {
    let mut pointer = [0; 10];
    pointer[..2].copy_from_slice(&limit.to_le_bytes());
    pointer[2..].copy_from_slice(&address.to_le_bytes());
    // SAFETY: the caller has seen to it.
    unsafe {
        match which {
            "lidt" => asm!("lidt [{0}]", in(reg) pointer.as_ptr()),
            _ => asm!("lgdt [{0}]", in(reg) pointer.as_ptr()),
        }
    }
}

extern "C" fn exception(entry: u64, first: u64, second: u64) -> ! {
    let vector = entry.wrapping_sub((&raw const exceptions).addr() as u64) / ENTRY;
    // With an error code it is the first, and the instruction's address the second.
    say(&[
        Text("hostile guest: exception "),
        Number(vector),
        Text(" with "),
        Address(first),
        Text(" "),
        Address(second),
    ]);
    machine::reset()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let (file, line) = info.location().map_or(("", 0), |at| (at.file(), at.line()));
    say(&[
        Text("hostile guest: panic in "),
        Text(file),
        Text(":"),
        Number(line.into()),
        Text(" "),
        Text(info.message().as_str().unwrap_or_default()),
    ]);
    machine::reset()
}

// What compiled code calls for memory. Loops would be compiled to calls of themselves.
// SAFETY: each asks of its caller what the C function of its name does.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's pointers are good for as much.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rsi") from => _, inout("rdi") to => _);
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= count {
        // SAFETY: the caller's pointers are good for as much, and nothing is read after it was
        // written.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: as above, from the end to the start.
    unsafe {
        let (last_to, last_from) = (to.add(count - 1), from.add(count - 1));
        asm!(
            "std", "rep movsb", "cld",
            inout("rcx") count => _, inout("rsi") last_from => _, inout("rdi") last_to => _,
        );
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's pointer is good for as much.
    unsafe { asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8) }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: the caller's pointers are good for as much.
        let (a, b) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's pointers are good for as much.
    unsafe { memcmp(a, b, count) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: the caller's text ends with a zero.
    while unsafe { text.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}
