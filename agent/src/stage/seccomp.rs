//! The system call filter of a spec, built by libseccomp.

use std::{
    fs::File,
    io::{self, Read, Seek},
    os::fd::AsFd,
};

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
    error::SeccompError,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use super::{StageError, unknown_calls};

// include/uapi/linux/seccomp.h
const SET_MODE_FILTER: libc::c_uint = 1;
const FLAG_TSYNC: libc::c_ulong = 1;
const FLAG_LOG: libc::c_ulong = 1 << 1;
const FLAG_SPEC_ALLOW: libc::c_ulong = 1 << 2;
const FLAG_WAIT_KILLABLE_RECV: libc::c_ulong = 1 << 5;

/// Bytes of a `struct sock_filter`.
const INSTRUCTION_LEN: usize = 8;

/// A filter that is ready to be installed.
#[derive(Debug)]
pub struct Filter {
    instructions: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

impl Filter {
    /// Builds the filter while errors can still be told to the caller of Create.
    pub fn compile(spec: &LinuxSeccomp) -> Result<Self, StageError> {
        let default = action(spec.default_action(), spec.default_errno_ret())?;
        let mut context = ScmpFilterContext::new(default).map_err(failed("the default action"))?;
        for arch in spec.architectures().iter().flatten() {
            context
                .add_arch(architecture(*arch)?)
                .map_err(failed(format!("architecture {arch:?}")))?;
        }
        for syscall in spec.syscalls().iter().flatten() {
            add(&mut context, syscall, default)?;
        }
        let flags = spec
            .flags()
            .iter()
            .flatten()
            .fold(0, |all, flag| all | bit(*flag));
        let mut instructions = unknown_calls::instructions(spec);
        instructions.extend(export(&context)?);
        Ok(Self {
            instructions,
            flags,
        })
    }

    /// Puts the filter in force. Needs `no_new_privs` or CAP_SYS_ADMIN.
    pub fn install(&self) -> Result<(), StageError> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.instructions.len())
                .map_err(|_| StageError::Invalid("the seccomp filter is too long".into()))?,
            filter: self.instructions.as_ptr().cast_mut(),
        };
        // SAFETY: the program points to `len` instructions, which the kernel copies.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        if result != 0 {
            return Err(StageError::system("install the seccomp filter")(
                io::Error::last_os_error(),
            ));
        }
        Ok(())
    }
}

fn add(
    context: &mut ScmpFilterContext,
    syscall: &LinuxSyscall,
    default: ScmpAction,
) -> Result<(), StageError> {
    let action = action(syscall.action(), syscall.errno_ret())?;
    // libseccomp refuses rules that say what the default says.
    if action == default {
        return Ok(());
    }
    for name in syscall.names() {
        // Profiles name calls of newer kernels and of other architectures.
        let Ok(number) = ScmpSyscall::from_name(name) else {
            continue;
        };
        let args = syscall.args().as_deref().unwrap_or_default();
        for comparisons in rules(args)? {
            context
                .add_rule_conditional(action, number, &comparisons)
                .map_err(failed(format!("the rule for {name}")))?;
        }
    }
    Ok(())
}

/// The rules for a list of conditions. All of them must hold, but libseccomp takes one condition
/// for each argument only: with more the established meaning is that any of them may hold.
fn rules(args: &[LinuxSeccompArg]) -> Result<Vec<Vec<ScmpArgCompare>>, StageError> {
    let comparisons = args.iter().map(comparison).collect::<Result<Vec<_>, _>>()?;
    let mut seen = [0; 6];
    for arg in args {
        seen[arg.index()] += 1;
    }
    Ok(match seen.iter().any(|count| *count > 1) {
        true => comparisons.into_iter().map(|one| vec![one]).collect(),
        false => vec![comparisons],
    })
}

fn comparison(arg: &LinuxSeccompArg) -> Result<ScmpArgCompare, StageError> {
    let index = u32::try_from(arg.index()).ok().filter(|index| *index < 6);
    let index = index.ok_or_else(|| {
        StageError::Invalid(format!("linux.seccomp argument index {}", arg.index()))
    })?;
    let (op, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // `value` is the mask, `valueTwo` what must be left.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (
            ScmpCompareOp::MaskedEqual(arg.value()),
            arg.value_two().unwrap_or(0),
        ),
    };
    Ok(ScmpArgCompare::new(index, op, value))
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, StageError> {
    let errno = errno.unwrap_or(libc::EPERM.unsigned_abs());
    let errno = u16::try_from(errno)
        .map_err(|_| StageError::Invalid(format!("linux.seccomp errnoRet {errno}")))?;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(i32::from(errno)),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(StageError::Invalid("SCMP_ACT_NOTIFY is not applied".into()));
        }
    })
}

fn architecture(arch: Arch) -> Result<ScmpArch, StageError> {
    Ok(match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        other => {
            return Err(StageError::Invalid(format!(
                "linux.seccomp architecture {other:?}"
            )));
        }
    })
}

fn bit(flag: LinuxSeccompFilterFlag) -> libc::c_ulong {
    match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => FLAG_TSYNC,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => FLAG_SPEC_ALLOW,
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => FLAG_WAIT_KILLABLE_RECV,
    }
}

/// The filter as the kernel takes it.
fn export(context: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>, StageError> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::from(memfd_create(c"seccomp", MFdFlags::MFD_CLOEXEC)?);
        context.export_bpf(file.as_fd()).map_err(io::Error::other)?;
        file.rewind()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(StageError::system("export the seccomp filter"))?;
    let instructions = bytes
        .chunks_exact(INSTRUCTION_LEN)
        .map(|bytes| libc::sock_filter {
            code: u16::from_ne_bytes([bytes[0], bytes[1]]),
            jt: bytes[2],
            jf: bytes[3],
            k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        });
    Ok(instructions.collect())
}

fn failed(what: impl Into<String>) -> impl FnOnce(SeccompError) -> StageError {
    let what = what.into();
    move |source| StageError::Seccomp { what, source }
}
