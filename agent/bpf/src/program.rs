//! Programs as instructions (Documentation/bpf/standardization/instruction-set.rst).

use std::os::fd::RawFd;

const PSEUDO_MAP_FD: u8 = 1;

/// The frame pointer.
pub const FRAME: u8 = 10;

/// `struct bpf_insn`, little-endian as x86 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// What it does.
    pub code: u8,
    /// Destination in the low half, source in the high one.
    pub registers: u8,
    /// Of a memory access, in bytes; of a jump, in instructions after the next one.
    pub offset: i16,
    /// A constant.
    pub immediate: i32,
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

    /// `to >>= bits`, without a sign.
    pub fn shift_right(&mut self, to: u8, bits: i32) -> &mut Self {
        self.push(instruction(0x77, to, 0, 0, bits))
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

    /// The instructions so far.
    pub fn code(&self) -> &[Instruction] {
        &self.code
    }
}
