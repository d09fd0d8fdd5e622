//! Device access by an eBPF program on the cgroup (`BPF_PROG_TYPE_CGROUP_DEVICE`).
//!
//! The spec's rules are those of the old device controller: the last rule that speaks about a
//! device and a kind of access decides. The program walks the rules backwards and takes out of
//! the request what each allows, until nothing is left (allowed), a rule denies some of what is
//! left, or the rules are at their end (denied).

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::CgroupError;

// include/uapi/linux/bpf.h
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const F_ALLOW_MULTI: u32 = 2;
const DEV_BLOCK: i32 = 1;
const DEV_CHAR: i32 = 2;
const ACCESS_MKNOD: i32 = 1;
const ACCESS_READ: i32 = 2;
const ACCESS_WRITE: i32 = 4;
const ACCESS_ALL: i32 = 7;

const MOV64_IMM: u8 = 0xb7;
const LDX_W: u8 = 0x61;
const MOV32_REG: u8 = 0xbc;
const AND32_IMM: u8 = 0x54;
const RSH32_IMM: u8 = 0x74;
const JEQ_IMM: u8 = 0x15;
const JNE_IMM: u8 = 0x55;
const EXIT: u8 = 0x95;

const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;
const RESULT: u8 = 0;

/// `struct bpf_insn`, little-endian as the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn op(code: u8, destination: u8, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: destination,
        offset: 0,
        immediate,
    }
}

const fn jump(code: u8, register: u8, immediate: i32, offset: i16) -> Instruction {
    Instruction {
        code,
        registers: register,
        offset,
        immediate,
    }
}

/// A rule as the program tests it; `None` matches everything.
#[derive(Clone, Copy, Debug)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// What every container may do, whatever the spec says: make any node, and use the devices
/// that every container has.
const DEFAULT_ALLOWED: [(i32, Option<i32>, Option<i32>, i32); 11] = [
    (DEV_CHAR, None, None, ACCESS_MKNOD),
    (DEV_BLOCK, None, None, ACCESS_MKNOD),
    (DEV_CHAR, Some(1), Some(3), ACCESS_ALL),
    (DEV_CHAR, Some(1), Some(5), ACCESS_ALL),
    (DEV_CHAR, Some(1), Some(7), ACCESS_ALL),
    (DEV_CHAR, Some(1), Some(8), ACCESS_ALL),
    (DEV_CHAR, Some(1), Some(9), ACCESS_ALL),
    (DEV_CHAR, Some(5), Some(0), ACCESS_ALL),
    (DEV_CHAR, Some(5), Some(2), ACCESS_ALL),
    (DEV_CHAR, Some(10), Some(200), ACCESS_ALL),
    (DEV_CHAR, Some(136), None, ACCESS_ALL),
];

/// The program for the rules of a spec.
pub fn program(rules: &[LinuxDeviceCgroup]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; }, the access in the
    // upper half of access_type.
    let load = |register: u8, offset: i16| Instruction {
        code: LDX_W,
        registers: register | CONTEXT << 4,
        offset,
        immediate: 0,
    };
    let copy = |to: u8, from: u8| Instruction {
        code: MOV32_REG,
        registers: to | from << 4,
        offset: 0,
        immediate: 0,
    };
    let mut code = vec![
        load(ACCESS, 0),
        copy(KIND, ACCESS),
        op(AND32_IMM, KIND, 0xffff),
        op(RSH32_IMM, ACCESS, 16),
        load(MAJOR, 4),
        load(MINOR, 8),
    ];
    for rule in all_rules(rules).iter().rev() {
        // Rules are short, so the offset of a jump over one fits.
        let body = match rule.allow {
            true => vec![
                op(AND32_IMM, ACCESS, ACCESS_ALL & !rule.access),
                jump(JNE_IMM, ACCESS, 0, 2),
                op(MOV64_IMM, RESULT, 1),
                op(EXIT, 0, 0),
            ],
            false => vec![
                copy(SCRATCH, ACCESS),
                op(AND32_IMM, SCRATCH, rule.access),
                jump(JEQ_IMM, SCRATCH, 0, 2),
                op(MOV64_IMM, RESULT, 0),
                op(EXIT, 0, 0),
            ],
        };
        let tests = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)];
        let tests: Vec<(u8, i32)> = tests
            .into_iter()
            .filter_map(|(register, value)| value.map(|value| (register, value)))
            .collect();
        let mut skip = i16::try_from(tests.len() + body.len()).unwrap_or(i16::MAX);
        for (register, value) in tests {
            skip -= 1;
            code.push(jump(JNE_IMM, register, value, skip));
        }
        code.extend(body);
    }
    code.extend([op(MOV64_IMM, RESULT, 0), op(EXIT, 0, 0)]);
    code
}

fn all_rules(rules: &[LinuxDeviceCgroup]) -> Vec<Rule> {
    // Negative numbers are wildcards in old specs.
    let number = |number: Option<i64>| number.and_then(|number| i32::try_from(number).ok());
    let number = |given: Option<i64>| number(given).filter(|number| *number >= 0);
    let spec = rules.iter().map(|rule| Rule {
        allow: rule.allow(),
        kind: match rule.typ() {
            None | Some(LinuxDeviceType::A | LinuxDeviceType::P) => None,
            Some(LinuxDeviceType::B) => Some(DEV_BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(DEV_CHAR),
        },
        major: number(rule.major()),
        minor: number(rule.minor()),
        access: access(rule.access().as_deref().unwrap_or_default()),
    });
    let mut all: Vec<Rule> = spec.collect();
    // Where everything is allowed, what the spec denies after that stays denied: a default for many
    // devices adds nothing but would undo it.
    let allows_all = all
        .iter()
        .rfind(|rule| (rule.kind, rule.major, rule.minor) == (None, None, None))
        .is_some_and(|rule| rule.allow);
    let default = DEFAULT_ALLOWED
        .iter()
        .map(|&(kind, major, minor, access)| Rule {
            allow: true,
            kind: Some(kind),
            major,
            minor,
            access,
        });
    all.extend(default.filter(|rule| !allows_all || rule.minor.is_some()));
    all
}

fn access(letters: &str) -> i32 {
    let bits = letters.chars().map(|letter| match letter {
        'r' => ACCESS_READ,
        'w' => ACCESS_WRITE,
        'm' => ACCESS_MKNOD,
        _ => 0,
    });
    match bits.fold(0, |all, bit| all | bit) {
        0 => ACCESS_ALL,
        bits => bits,
    }
}

/// Head of `union bpf_attr` for `BPF_PROG_LOAD`.
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

/// Head of `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
struct AttachAttributes {
    target: i32,
    program: i32,
    attach_type: u32,
    flags: u32,
}

/// Loads the program and attaches it to a cgroup, which then owns it.
pub fn attach(cgroup: &OwnedFd, program: &[Instruction]) -> Result<(), CgroupError> {
    let failed = |what| move |source| CgroupError::Devices { what, source };
    let mut load = LoadAttributes {
        program_type: PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).unwrap_or(u32::MAX),
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"bulkhead_devices",
        interface: 0,
        expected_attach_type: ATTACH_CGROUP_DEVICE,
    };
    // Ends with a NUL, as the kernel asks.
    load.name[15] = 0;
    // SAFETY: the attributes point to the program and the licence, which outlive the call.
    let loaded = unsafe { bpf(PROG_LOAD, &raw const load) }.map_err(failed("load"))?;
    // SAFETY: a successful load returns a new descriptor that nothing else owns.
    let loaded = unsafe { OwnedFd::from_raw_fd(loaded) };
    let attach = AttachAttributes {
        target: cgroup.as_raw_fd(),
        program: loaded.as_raw_fd(),
        attach_type: ATTACH_CGROUP_DEVICE,
        flags: F_ALLOW_MULTI,
    };
    // SAFETY: the attributes hold two open descriptors and no pointer.
    unsafe { bpf(PROG_ATTACH, &raw const attach) }.map_err(failed("attach"))?;
    Ok(())
}

/// bpf(2).
///
/// # Safety
///
/// `attributes` must be a prefix of `union bpf_attr` as `command` reads it.
unsafe fn bpf<T>(command: libc::c_int, attributes: *const T) -> io::Result<i32> {
    // SAFETY: the caller vouches for the attributes; the kernel reads `size` bytes of them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Runs a program as the kernel would.
    fn run(code: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let mut registers = [0i32; 11];
        let mut at = 0usize;
        loop {
            let i = code[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            at += 1;
            let jumps = match i.code {
                LDX_W => {
                    registers[to] = match i.offset {
                        0 => access << 16 | kind,
                        4 => major,
                        _ => minor,
                    };
                    false
                }
                MOV32_REG => {
                    registers[to] = registers[from];
                    false
                }
                MOV64_IMM => {
                    registers[to] = i.immediate;
                    false
                }
                AND32_IMM => {
                    registers[to] &= i.immediate;
                    false
                }
                RSH32_IMM => {
                    registers[to] >>= i.immediate;
                    false
                }
                JEQ_IMM => registers[to] == i.immediate,
                JNE_IMM => registers[to] != i.immediate,
                EXIT => return registers[0] == 1,
                code => panic!("instruction {code:#x}"),
            };
            if jumps {
                at += usize::try_from(i.offset).unwrap();
            }
        }
    }

    fn rules(rules: serde_json::Value) -> Vec<Instruction> {
        program(&serde_json::from_value::<Vec<LinuxDeviceCgroup>>(rules).unwrap())
    }

    const READ_WRITE: i32 = ACCESS_READ | ACCESS_WRITE;

    #[test]
    fn without_rules_only_the_default_devices_work() {
        let code = rules(json!([]));
        assert!(run(&code, DEV_CHAR, READ_WRITE, 1, 3), "/dev/null");
        assert!(run(&code, DEV_CHAR, READ_WRITE, 136, 17), "/dev/pts/17");
        assert!(run(&code, DEV_BLOCK, ACCESS_MKNOD, 254, 0), "mknod");
        assert!(!run(&code, DEV_BLOCK, ACCESS_READ, 254, 0), "/dev/vda");
        assert!(!run(&code, DEV_BLOCK, ACCESS_MKNOD | ACCESS_READ, 254, 0));
        assert!(!run(&code, DEV_CHAR, ACCESS_READ, 1, 1), "/dev/mem");
    }

    #[test]
    fn the_last_rule_decides_for_each_kind_of_access() {
        let code = rules(json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 8, "access": "rw"},
            {"allow": false, "type": "b", "major": 8, "minor": 1, "access": "w"},
        ]));
        assert!(run(&code, DEV_BLOCK, READ_WRITE, 8, 0));
        assert!(run(&code, DEV_BLOCK, ACCESS_READ, 8, 1));
        assert!(!run(&code, DEV_BLOCK, READ_WRITE, 8, 1));
        assert!(!run(&code, DEV_BLOCK, ACCESS_READ, 9, 0));
        assert!(!run(&code, DEV_CHAR, ACCESS_READ, 8, 0));
    }

    #[test]
    fn a_privileged_container_may_use_everything() {
        let code = rules(json!([{"allow": true, "access": "rwm"}]));
        assert!(run(&code, DEV_BLOCK, ACCESS_ALL, 254, 0));
        assert!(run(&code, DEV_CHAR, READ_WRITE, 1, 1));
    }

    #[test]
    fn what_is_denied_where_all_else_is_allowed_cannot_be_made() {
        let code = rules(json!([
            {"allow": true, "access": "rwm"},
            {"allow": false, "type": "c", "major": 1, "minor": 1, "access": "rwm"},
        ]));
        assert!(!run(&code, DEV_CHAR, ACCESS_MKNOD, 1, 1));
        assert!(run(&code, DEV_CHAR, ACCESS_ALL, 1, 4));
        assert!(run(&code, DEV_BLOCK, ACCESS_ALL, 8, 0));
    }
}
