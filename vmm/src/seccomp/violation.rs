//! What becomes of a process that makes a forbidden system call: one line on standard error, such
//! as `bulkhead-vmm: thread vcpu0 made the forbidden system call 257 (openat); killed`, and exit
//! status 159 (128 + SIGSYS). The shim reports both as the reason of the pod's end.
//!
//! The filters answer with `SECCOMP_RET_TRAP`: the kernel skips the call and sends the thread SIGSYS.
//! That is no weaker than killing at once. The signal is forced: a thread that blocks or ignores it
//! is killed by it, and whatever the handler would do, the call has not been made.

use std::{
    cell::Cell,
    fmt::{self, Write as _},
    io, str,
};

use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

/// The process's exit status after a forbidden call.
pub const EXIT_STATUS: i32 = 128 + libc::SIGSYS;

/// `SYS_SECCOMP`, the signal's code when it comes from a filter (sigaction(2)).
const SYS_SECCOMP: libc::c_int = 1;

/// The longest name of a thread in bytes, as for the kernel.
const NAME_MAX: usize = 15;

/// A thread's name, short and in its own memory: the handler cannot ask for one.
type Name = ([u8; NAME_MAX], usize);

thread_local! {
    static THREAD: Cell<Name> = const { Cell::new(([b'?'; NAME_MAX], 1)) };
}

/// `siginfo_t` of a SIGSYS on a 64-bit machine.
#[repr(C)]
struct SigsysInfo {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    _padding: libc::c_int,
    address: *mut libc::c_void,
    number: libc::c_int,
    architecture: libc::c_uint,
}

/// Installs the handler for the whole process.
pub(super) fn install_handler() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, handler).map_err(Into::into)
}

/// Keeps the calling thread's name for the report.
pub(super) fn remember_thread(name: Option<&str>) {
    let name = name.unwrap_or("?").as_bytes();
    let mut kept = [0; NAME_MAX];
    let length = name.len().min(NAME_MAX);
    kept[..length].copy_from_slice(&name[..length]);
    THREAD.set((kept, length));
}

/// Runs in the middle of anything, so it allocates nothing and takes no lock (signal-safety(7)).
extern "C" fn handler(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    #[cfg(feature = "back-door")]
    if crate::back_door::was_attempt(context) {
        return;
    }
    let _ = context;
    // SAFETY: the kernel passes the signal's information, which for SIGSYS has this layout; it is
    // longer than the structure whatever sent the signal.
    let info = unsafe { &*info.cast::<SigsysInfo>() };
    let mut line = Line::default();
    // A line that is too long is cut.
    let _ = if info.code == SYS_SECCOMP {
        report(&mut line, THREAD.get(), info.number)
    } else {
        line.write_str("bulkhead-vmm: killed by SIGSYS, which another process sent\n")
    };
    // SAFETY: the bytes are on this stack. There is nothing to do about an error.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.length) };
    // SAFETY: ends the process, without destructors or handlers.
    unsafe { libc::_exit(EXIT_STATUS) }
}

fn report(line: &mut Line, (name, length): Name, number: libc::c_int) -> fmt::Result {
    let thread = str::from_utf8(&name[..length]).unwrap_or("?");
    write!(
        line,
        "bulkhead-vmm: thread {thread} made the forbidden system call {number}"
    )?;
    if let Some(call) = usize::try_from(number).ok().and_then(Sysno::new) {
        write!(line, " ({})", call.name())?;
    }
    line.write_str("; killed\n")
}

/// A line of text on the stack.
struct Line {
    bytes: [u8; 128],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 128],
            length: 0,
        }
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.length + text.len();
        let room = self.bytes.get_mut(self.length..end).ok_or(fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str, number: libc::c_int) -> String {
        remember_thread(Some(name));
        let mut line = Line::default();
        report(&mut line, THREAD.get(), number).unwrap();
        String::from_utf8(line.bytes[..line.length].to_vec()).unwrap()
    }

    #[test]
    fn a_report_names_thread_and_call() {
        assert_eq!(
            text("vcpu0", 257),
            "bulkhead-vmm: thread vcpu0 made the forbidden system call 257 (openat); killed\n"
        );
        assert_eq!(
            text("a name too long for the kernel", 0x4000_0101),
            "bulkhead-vmm: thread a name too long made the forbidden system call 1073742081; killed\n"
        );
    }
}
