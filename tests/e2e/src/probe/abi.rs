//! The other ways into the kernel that x86-64 has. A filter that knows system calls by their 64-bit
//! numbers alone can be walked around by them.

use std::arch::asm;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::{Report, errno_name};

/// getpid by its x32 number.
const X32_GETPID: i64 = 0x4000_0000 + libc::SYS_getpid;

/// getpid by its i386 number.
const I386_GETPID: i64 = 20;

pub(super) fn ask(report: &mut Report) {
    report.insert("abi.x32".into(), in_a_child(x32));
    report.insert("abi.i386".into(), in_a_child(i386));
}

fn x32() -> i64 {
    // SAFETY: getpid takes no arguments, whatever the table in which it is looked up.
    let result = unsafe { libc::syscall(X32_GETPID) };
    if result < 0 {
        -i64::from(
            std::io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO),
        )
    } else {
        result
    }
}

fn i386() -> i64 {
    let mut result = I386_GETPID;
    // SAFETY: getpid takes no arguments and touches no memory; the kernel keeps all other registers
    // but for r8 to r11.
    unsafe {
        asm!(
            "int 0x80",
            inout("rax") result,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    // A 32-bit process's error is a 32-bit number.
    result << 32 >> 32
}

/// In a child, because a filter may kill it, as does a kernel without that entry.
fn in_a_child(call: fn() -> i64) -> String {
    // SAFETY: this program has one thread here, so the child may do what it likes.
    match unsafe { fork() } {
        Err(error) => format!("fork {error:?}"),
        Ok(ForkResult::Child) => {
            let result = call();
            let code = i32::try_from((-result).clamp(0, 200)).unwrap_or(201);
            // SAFETY: ends the child at once, without what the parent would do at its end.
            unsafe { libc::_exit(code) }
        }
        // No deadline: the child makes one call that does not wait.
        Ok(ForkResult::Parent { child }) => match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, 0)) => "ok".into(),
            Ok(WaitStatus::Exited(_, code)) => errno_name(&std::io::Error::from_raw_os_error(code)),
            Ok(WaitStatus::Signaled(_, signal, _)) => format!("killed by {signal}"),
            other => format!("{other:?}"),
        },
    }
}
