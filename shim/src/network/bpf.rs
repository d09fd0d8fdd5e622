//! eBPF programs as instructions, and bpf(2).

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

// linux/bpf.h
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const PSEUDO_MAP_FD: u8 = 1;

/// `BPF_PROG_TYPE_SCHED_CLS`
pub const SCHED_CLS: u32 = 3;
/// `BPF_PROG_TYPE_SK_LOOKUP`
pub const SK_LOOKUP: u32 = 30;
/// `BPF_SK_LOOKUP`
pub const ATTACH_SK_LOOKUP: u32 = 36;

/// The frame pointer.
pub const FRAME: u8 = 10;

/// `struct bpf_insn`, little-endian as x86 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// A size of a load.
#[derive(Clone, Copy, Debug)]
pub enum Size {
    /// One byte.
    Byte = 0x10,
    /// Two.
    Half = 0x08,
    /// Four.
    Word = 0x00,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    }
}

/// A program under construction. Jumps go forward, to labels.
#[derive(Debug, Default)]
pub struct Program {
    code: Vec<Instruction>,
    jumps: Vec<(usize, &'static str)>,
}

impl Program {
    fn push(&mut self, instruction: Instruction) -> &mut Self {
        self.code.push(instruction);
        self
    }

    /// `to = value`
    pub fn set(&mut self, to: u8, value: i32) -> &mut Self {
        self.push(instruction(0xb7, to, 0, 0, value))
    }

    /// `to = from`
    pub fn copy(&mut self, to: u8, from: u8) -> &mut Self {
        self.push(instruction(0xbf, to, from, 0, 0))
    }

    /// `to += value`
    pub fn add(&mut self, to: u8, value: i32) -> &mut Self {
        self.push(instruction(0x07, to, 0, 0, value))
    }

    /// `to &= value`
    pub fn and(&mut self, to: u8, value: i32) -> &mut Self {
        self.push(instruction(0x57, to, 0, 0, value))
    }

    /// `to <<= bits`
    pub fn shift_left(&mut self, to: u8, bits: i32) -> &mut Self {
        self.push(instruction(0x67, to, 0, 0, bits))
    }

    /// `to = *(from + offset)`
    pub fn load(&mut self, size: Size, to: u8, from: u8, offset: i16) -> &mut Self {
        self.push(instruction(0x61 | size as u8, to, from, offset, 0))
    }

    /// `*(frame + offset) = from`, four bytes.
    pub fn store(&mut self, offset: i16, from: u8) -> &mut Self {
        self.push(instruction(0x63, FRAME, from, offset, 0))
    }

    /// `to` = the map of this descriptor.
    pub fn map(&mut self, to: u8, map: RawFd) -> &mut Self {
        self.push(instruction(0x18, to, PSEUDO_MAP_FD, 0, map));
        self.push(instruction(0, 0, 0, 0, 0))
    }

    /// Calls a function of the kernel.
    pub fn call(&mut self, function: i32) -> &mut Self {
        self.push(instruction(0x85, 0, 0, 0, function))
    }

    /// Goes on at the label if `register == value`.
    pub fn if_equal(&mut self, register: u8, value: i32, label: &'static str) -> &mut Self {
        self.jumps.push((self.code.len(), label));
        self.push(instruction(0x15, register, 0, 0, value))
    }

    /// Goes on at the label if `register != value`.
    pub fn if_not(&mut self, register: u8, value: i32, label: &'static str) -> &mut Self {
        self.jumps.push((self.code.len(), label));
        self.push(instruction(0x55, register, 0, 0, value))
    }

    /// Goes on at the label.
    pub fn go(&mut self, label: &'static str) -> &mut Self {
        self.jumps.push((self.code.len(), label));
        self.push(instruction(0x05, 0, 0, 0, 0))
    }

    /// Ends with `value`.
    pub fn exit_with(&mut self, value: i32) -> &mut Self {
        self.set(0, value).exit()
    }

    /// Ends with what register 0 holds.
    pub fn exit(&mut self) -> &mut Self {
        self.push(instruction(0x95, 0, 0, 0, 0))
    }

    /// Where the jumps so far to this label go.
    pub fn label(&mut self, label: &'static str) -> &mut Self {
        let here = self.code.len();
        let code = &mut self.code;
        self.jumps.retain(|(at, wanted)| {
            let met = *wanted == label;
            if met {
                // Programs are short, so it fits.
                code[*at].offset = i16::try_from(here - at - 1).unwrap_or(i16::MAX);
            }
            !met
        });
        self
    }

    /// Loads it into the kernel. `name` is for people.
    pub fn load_as(&self, kind: u32, attach_type: u32, name: &str) -> io::Result<OwnedFd> {
        let mut short = [0; 16];
        for (to, from) in short.iter_mut().zip(name.bytes().take(15)) {
            *to = from;
        }
        let attributes = LoadAttributes {
            program_type: kind,
            instruction_count: u32::try_from(self.code.len()).map_err(io::Error::other)?,
            instructions: self.code.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name: short,
            interface: 0,
            expected_attach_type: attach_type,
        };
        // SAFETY: the attributes point to the program and the licence, which outlive the call.
        unsafe { create(PROG_LOAD, &attributes) }
    }
}

#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct MapAttributes {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
struct UpdateAttributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// Makes a map of that many sockets.
pub fn socket_map(entries: u32) -> io::Result<OwnedFd> {
    let attributes = MapAttributes {
        map_type: MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: entries,
        flags: 0,
    };
    // SAFETY: the attributes hold no pointer.
    unsafe { create(MAP_CREATE, &attributes) }
}

/// Puts a socket into a map.
pub fn put_socket(map: &OwnedFd, key: u32, socket: &impl AsRawFd) -> io::Result<()> {
    let value = u64::try_from(socket.as_raw_fd()).map_err(io::Error::other)?;
    let attributes = UpdateAttributes {
        map: map.as_raw_fd().cast_unsigned(),
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    // SAFETY: key and value have the sizes of the map's, and outlive the call.
    unsafe { bpf(MAP_UPDATE, &attributes) }.map(drop)
}

/// Attaches a program to what `target` is. It is detached when the result is dropped.
pub fn attach(program: &OwnedFd, target: &impl AsRawFd, attach_type: u32) -> io::Result<OwnedFd> {
    let attributes = LinkAttributes {
        program: program.as_raw_fd().cast_unsigned(),
        target: target.as_raw_fd().cast_unsigned(),
        attach_type,
        flags: 0,
    };
    // SAFETY: the attributes hold no pointer.
    unsafe { create(LINK_CREATE, &attributes) }
}

/// # Safety
///
/// As for [`bpf`]; the command must be one that makes a descriptor.
unsafe fn create<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller vouches for the attributes.
    let created = unsafe { bpf(command, attributes) }?;
    // SAFETY: the kernel returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(created) })
}

/// bpf(2).
///
/// # Safety
///
/// `attributes` must be a prefix of `union bpf_attr` as `command` reads it.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the caller vouches for the attributes; the kernel reads `size` bytes of them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}
