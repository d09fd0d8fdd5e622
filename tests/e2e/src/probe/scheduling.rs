//! How the kernel treats a process: its turn at the CPU and the disk, and the switches of prctl(2).

use super::{Report, errno_name};

/// Switches that prctl(2) returns: name, operation, argument.
const SWITCHES: [(&str, libc::c_int, libc::c_ulong); 11] = [
    ("dumpable", libc::PR_GET_DUMPABLE, 0),
    ("keep capabilities", libc::PR_GET_KEEPCAPS, 0),
    ("securebits", libc::PR_GET_SECUREBITS, 0),
    ("timer slack", libc::PR_GET_TIMERSLACK, 0),
    ("machine check", libc::PR_MCE_KILL_GET, 0),
    ("no new privileges", libc::PR_GET_NO_NEW_PRIVS, 0),
    ("huge pages off", libc::PR_GET_THP_DISABLE, 0),
    ("I/O flusher", 58, 0),
    ("seccomp", libc::PR_GET_SECCOMP, 0),
    ("memory deny write execute", 66, 0),
    ("timing", libc::PR_GET_TIMING, 0),
];

/// Those that it stores.
const STORED: [(&str, libc::c_int); 3] = [
    ("parent-death signal", libc::PR_GET_PDEATHSIG),
    ("child subreaper", libc::PR_GET_CHILD_SUBREAPER),
    ("time stamp counter", libc::PR_GET_TSC),
];

/// Words of `struct sched_attr` in its first version.
const SCHED_ATTR: usize = 12;

pub(super) fn ask(report: &mut Report) {
    let mut note = |name: &str, value: String| report.insert(name.to_owned(), value);
    let mut attributes = [0_u32; SCHED_ATTR];
    // SAFETY: the buffer has the length in bytes that is said.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            0,
            attributes.as_mut_ptr(),
            size_of_val(&attributes),
            0,
        )
    };
    let [_, policy, flags, _, nice, priority, ..] = attributes;
    let scheduler = format!("policy {policy}, flags {flags}, nice {nice}, priority {priority}");
    note("scheduler", answer(result, |_| scheduler));
    // SAFETY: takes numbers alone; 1 is a process, 0 this one.
    let priority = unsafe { libc::syscall(libc::SYS_ioprio_get, 1, 0) };
    note(
        "I/O priority",
        answer(priority, |value| format!("{value:#x}")),
    );
    // SAFETY: 0xffffffff asks without changing.
    let personality = unsafe { libc::syscall(libc::SYS_personality, 0xffff_ffff_u64) };
    note(
        "personality",
        answer(personality, |value| format!("{value:#x}")),
    );
    for (name, operation, argument) in SWITCHES {
        // SAFETY: these operations return their answer and take no pointer.
        let value = unsafe { libc::prctl(operation, argument, 0, 0, 0) };
        note(
            &format!("switch.{name}"),
            answer(value.into(), |value| value.to_string()),
        );
    }
    for (name, operation) in STORED {
        let mut value: libc::c_int = 0;
        // SAFETY: these operations store an integer where the argument points.
        let result = unsafe { libc::prctl(operation, &raw mut value, 0, 0, 0) };
        note(
            &format!("switch.{name}"),
            answer(result.into(), |_| value.to_string()),
        );
    }
}

fn answer(result: i64, value: impl FnOnce(i64) -> String) -> String {
    if result < 0 {
        errno_name(&std::io::Error::last_os_error())
    } else {
        value(result)
    }
}
