//! Device access by an eBPF program on the cgroup (`BPF_PROG_TYPE_CGROUP_DEVICE`).
//!
//! The spec's rules are those of the old device controller: the last rule that speaks about a
//! device and a kind of access decides. The program walks the rules backwards and takes out of
//! the request what each allows, until nothing is left (allowed), a rule denies some of what is
//! left, or the rules are at their end (denied).

use std::os::fd::OwnedFd;

use bulkhead_bpf::{Kind, Program, Size, attach_to_cgroup};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::CgroupError;

// include/uapi/linux/bpf.h
const DEV_BLOCK: i32 = 1;
const DEV_CHAR: i32 = 2;
const ACCESS_MKNOD: i32 = 1;
const ACCESS_READ: i32 = 2;
const ACCESS_WRITE: i32 = 4;
const ACCESS_ALL: i32 = 7;

const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

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
pub fn program(rules: &[LinuxDeviceCgroup]) -> Program {
    let mut program = Program::default();
    // struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; }, the access in the
    // upper half of access_type.
    program
        .load(Size::Word, ACCESS, CONTEXT, 0)
        .copy(KIND, ACCESS)
        .and(KIND, 0xffff)
        .shift_right(ACCESS, 16)
        .load(Size::Word, MAJOR, CONTEXT, 4)
        .load(Size::Word, MINOR, CONTEXT, 8);
    for rule in all_rules(rules).iter().rev() {
        let tests = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)];
        for (register, value) in tests {
            if let Some(value) = value {
                program.if_not(register, value, "next rule");
            }
        }
        match rule.allow {
            true => program
                .and(ACCESS, ACCESS_ALL & !rule.access)
                .if_not(ACCESS, 0, "next rule")
                .exit_with(1),
            false => program
                .copy(SCRATCH, ACCESS)
                .and(SCRATCH, rule.access)
                .if_equal(SCRATCH, 0, "next rule")
                .exit_with(0),
        };
        program.label("next rule");
    }
    program.exit_with(0);
    program
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

/// Loads the program and attaches it to a cgroup, which then owns it.
pub fn attach(cgroup: &OwnedFd, program: &Program) -> Result<(), CgroupError> {
    let failed = |what| move |source| CgroupError::Devices { what, source };
    let loaded = program.to_kernel(Kind::Devices, "bulkhead_devices");
    let loaded = loaded.map_err(failed("load"))?;
    attach_to_cgroup(&loaded, cgroup, Kind::Devices).map_err(failed("attach"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    // Documentation/bpf/standardization/instruction-set.rst
    const LOAD_WORD: u8 = 0x61;
    const COPY: u8 = 0xbf;
    const SET: u8 = 0xb7;
    const AND: u8 = 0x57;
    const SHIFT_RIGHT: u8 = 0x77;
    const IF_EQUAL: u8 = 0x15;
    const IF_NOT: u8 = 0x55;
    const EXIT: u8 = 0x95;

    /// Runs a program as the kernel would.
    fn run(program: &Program, kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let mut registers = [0i32; 11];
        let mut at = 0usize;
        loop {
            let i = program.code()[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            at += 1;
            let jumps = match i.code {
                LOAD_WORD => {
                    registers[to] = match i.offset {
                        0 => access << 16 | kind,
                        4 => major,
                        _ => minor,
                    };
                    false
                }
                COPY => {
                    registers[to] = registers[from];
                    false
                }
                SET => {
                    registers[to] = i.immediate;
                    false
                }
                AND => {
                    registers[to] &= i.immediate;
                    false
                }
                SHIFT_RIGHT => {
                    registers[to] >>= i.immediate;
                    false
                }
                IF_EQUAL => registers[to] == i.immediate,
                IF_NOT => registers[to] != i.immediate,
                EXIT => return registers[0] == 1,
                code => panic!("instruction {code:#x}"),
            };
            if jumps {
                at += usize::try_from(i.offset).unwrap();
            }
        }
    }

    fn rules(rules: serde_json::Value) -> Program {
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
