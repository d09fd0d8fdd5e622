//! System calls that are newer than a seccomp profile: as runc does, they fail with `ENOSYS` rather
//! than by the profile's default. Programs take that for an older kernel and use what came before;
//! of `EPERM` they make an error.

use libseccomp::{ScmpArch, ScmpSyscall};
use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction};

// include/uapi/linux/bpf_common.h
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER: u16 = 0x25;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

// include/uapi/linux/audit.h
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// `__X32_SYSCALL_BIT`
const X32: u32 = 0x4000_0000;

/// `SECCOMP_RET_ERRNO` with `ENOSYS`.
const NO_SUCH_CALL: u32 = 0x0005_0000 | libc::ENOSYS.unsigned_abs();

/// What goes before a profile's filter: for each architecture that this machine runs, calls with
/// higher numbers than any that the profile names do not exist.
pub fn instructions(profile: &LinuxSeccomp) -> Vec<libc::sock_filter> {
    // What is allowed by default, or decided by a tracer, stays so.
    if matches!(
        profile.default_action(),
        LinuxSeccompAction::ScmpActAllow
            | LinuxSeccompAction::ScmpActLog
            | LinuxSeccompAction::ScmpActTrace
    ) {
        return vec![];
    }
    let named = |arch: Arch| {
        let mut listed = profile.architectures().iter().flatten();
        listed.any(|listed| *listed == arch)
    };
    let highest = |arch: ScmpArch| highest(profile, arch);
    // The machine's own architecture is part of every filter.
    let x32 = named(Arch::ScmpArchX32).then(|| highest(ScmpArch::X32));
    let mut all = section(AUDIT_ARCH_X86_64, highest(ScmpArch::X8664), x32.flatten());
    if named(Arch::ScmpArchX86) {
        all.extend(section(AUDIT_ARCH_I386, highest(ScmpArch::X86), None));
    }
    all
}

/// The highest number that the profile names.
fn highest(profile: &LinuxSeccomp, arch: ScmpArch) -> Option<u32> {
    let rules = profile.syscalls().iter().flatten();
    let names = rules.flat_map(|rule| rule.names());
    let numbers = names.filter_map(|name| {
        let call = ScmpSyscall::from_name_by_arch(name, arch).ok()?;
        // libseccomp gives calls that an architecture lacks negative numbers.
        u32::try_from(i32::from(call)).ok()
    });
    numbers.max()
}

/// For one architecture as the kernel tells it; x32 has its calls above a bit of x86-64's.
fn section(audit: u32, highest: Option<u32>, x32: Option<u32>) -> Vec<libc::sock_filter> {
    let Some(highest) = highest else {
        return vec![];
    };
    let step = |code, if_true, if_false, k| libc::sock_filter {
        code,
        jt: if_true,
        jf: if_false,
        k,
    };
    let load = |offset| step(LOAD, 0, 0, offset);
    match x32 {
        // Calls of an architecture that the profile does not name are the filter's to refuse.
        None => vec![
            load(ARCHITECTURE),
            step(JUMP_IF_EQUAL, 0, 4, audit),
            load(NUMBER),
            step(JUMP_IF_AT_LEAST, 2, 0, X32),
            step(JUMP_IF_GREATER, 0, 1, highest),
            step(RETURN, 0, 0, NO_SUCH_CALL),
        ],
        Some(x32) => vec![
            load(ARCHITECTURE),
            step(JUMP_IF_EQUAL, 0, 5, audit),
            load(NUMBER),
            step(JUMP_IF_AT_LEAST, 1, 0, X32),
            step(JUMP_IF_GREATER, 1, 2, highest),
            step(JUMP_IF_GREATER, 0, 1, x32),
            step(RETURN, 0, 0, NO_SUCH_CALL),
        ],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What the instructions return for a call; nothing when they leave it to the profile.
    fn verdict(instructions: &[libc::sock_filter], arch: u32, number: u32) -> Option<u32> {
        let (mut at, mut value) = (0, 0);
        while let Some(step) = instructions.get(at) {
            let jump = |taken: bool| usize::from(if taken { step.jt } else { step.jf });
            at += 1;
            match step.code {
                LOAD => value = if step.k == NUMBER { number } else { arch },
                JUMP_IF_EQUAL => at += jump(value == step.k),
                JUMP_IF_GREATER => at += jump(value > step.k),
                JUMP_IF_AT_LEAST => at += jump(value >= step.k),
                RETURN => return Some(step.k),
                code => panic!("{code}"),
            }
        }
        assert_eq!(at, instructions.len(), "a jump beyond the end");
        None
    }

    fn profile(default: &str, architectures: &[&str]) -> Vec<libc::sock_filter> {
        let profile = json!({
            "defaultAction": default, "architectures": architectures,
            "syscalls": [{"names": ["read", "openat2", "no_such_call"], "action": "SCMP_ACT_ALLOW"}],
        });
        instructions(&serde_json::from_value(profile).unwrap())
    }

    #[test]
    fn calls_above_the_highest_do_not_exist() {
        let all = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];
        let openat2 = 437;
        for architectures in [&all[..], &all[..1], &all[..2]] {
            let instructions = profile("SCMP_ACT_ERRNO", architectures);
            let verdict = |arch, number| verdict(&instructions, arch, number);
            assert_eq!(verdict(AUDIT_ARCH_X86_64, openat2), None);
            assert_eq!(verdict(AUDIT_ARCH_X86_64, openat2 + 1), Some(NO_SUCH_CALL));
            assert_eq!(verdict(AUDIT_ARCH_X86_64, X32 | openat2), None);
            let above = verdict(AUDIT_ARCH_X86_64, X32 | (openat2 + 1));
            assert_eq!(above.is_some(), architectures.len() == 3);
            let above = verdict(AUDIT_ARCH_I386, openat2 + 1);
            assert_eq!(above.is_some(), architectures.len() > 1);
            assert_eq!(verdict(AUDIT_ARCH_I386, openat2), None);
        }
    }

    #[test]
    fn what_is_allowed_by_default_stays_so() {
        for default in ["SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE"] {
            assert!(profile(default, &["SCMP_ARCH_X86_64"]).is_empty());
        }
    }
}
