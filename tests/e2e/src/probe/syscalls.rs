//! Which system calls a filter lets through, seen from their answers to senseless arguments.

use syscalls::Sysno;

use super::{Report, errno_name};

/// One past the last system call that is tried. Numbers without a name in this list of system calls
/// are tried all the same.
const END: i64 = 471;

/// Nothing takes this for a pointer, a descriptor, a process or a set of flags.
const SENSELESS: [i64; 6] = [-1; 6];

/// No process, no key of an IPC object.
const NOBODY: i64 = 0x7fff_fff0;

/// Calls that do something even then, or that a filter looks into, and what they get instead.
const ARGUMENTS: [(i64, [i64; 4]); 36] = [
    (libc::SYS_acct, [1, 0, 0, 0]),
    (libc::SYS_add_key, [1, 0, 0, 0]),
    (libc::SYS_alarm, [0, 0, 0, 0]),
    (libc::SYS_clone3, [0, 0, 0, 0]),
    (libc::SYS_delete_module, [1, 0, 0, 0]),
    (libc::SYS_get_mempolicy, [0, 0, 0, 0]),
    (libc::SYS_io_uring_setup, [0, 0, 0, 0]),
    (libc::SYS_kcmp, [-1, -1, -1, 0]),
    (libc::SYS_kexec_load, [0, 0, 0, -1]),
    (libc::SYS_keyctl, [-1, 0, 0, 0]),
    (libc::SYS_kill, [NOBODY, 0, 0, 0]),
    (libc::SYS_landlock_create_ruleset, [1, 0, 0, 0]),
    (libc::SYS_memfd_create, [0, 0, 0, 0]),
    (libc::SYS_mount, [1, 1, 0, 0]),
    (libc::SYS_msgget, [NOBODY, 0, 0, 0]),
    (libc::SYS_name_to_handle_at, [-1, 0, 0, 0]),
    (libc::SYS_open_by_handle_at, [-1, 0, 0, 0]),
    (libc::SYS_perf_event_open, [0, -1, -1, -1]),
    (libc::SYS_pivot_root, [1, 1, 0, 0]),
    (libc::SYS_process_vm_readv, [-1, 0, 0, 0]),
    (libc::SYS_quotactl, [-1, 1, 0, 0]),
    (libc::SYS_reboot, [0, 0, 0, 0]),
    (libc::SYS_request_key, [1, 0, 0, 0]),
    (libc::SYS_semget, [NOBODY, 0, 0, 0]),
    (libc::SYS_setns, [-1, 0, 0, 0]),
    (libc::SYS_settimeofday, [1, 0, 0, 0]),
    (libc::SYS_shmget, [NOBODY, 0, 0, 0]),
    (libc::SYS_swapoff, [1, 0, 0, 0]),
    (libc::SYS_swapon, [1, 0, 0, 0]),
    (libc::SYS_umask, [0o022, 0, 0, 0]),
    (libc::SYS_unshare, [0x4000_0000, 0, 0, 0]),
    (libc::SYS_ptrace, [-1, -1, 0, 0]),
    (libc::SYS_fanotify_init, [-1, -1, 0, 0]),
    (libc::SYS_clock_settime, [-1, 0, 0, 0]),
    (libc::SYS_syslog, [-1, 0, 0, 0]),
    (libc::SYS_bpf, [-1, 0, 0, 0]),
];

/// Calls that cannot be tried harmlessly, and why.
const UNTRIED: [(i64, &str); 11] = [
    (libc::SYS_rt_sigreturn, "returns to where nothing was"),
    (libc::SYS_pause, "waits"),
    (libc::SYS_fork, "always makes a process"),
    (libc::SYS_vfork, "always makes a process"),
    (libc::SYS_exit, "ends the probe"),
    (libc::SYS_exit_group, "ends the probe"),
    (libc::SYS_setsid, "may take the terminal away"),
    (libc::SYS_vhangup, "takes the terminal away"),
    (libc::SYS_sync, "waits for every disk of the host"),
    (335, "uretprobe: raises SIGILL when a program makes it"),
    (336, "uprobe: raises SIGILL when a program makes it"),
];

/// Kinds of sockets that a filter or a kernel may refuse: family, type, protocol.
const SOCKETS: [(&str, i64, i64, i64); 8] = [
    ("unix", 1, 1, 0),
    ("inet tcp", 2, 1, 0),
    ("inet raw icmp", 2, 3, 1),
    ("inet6 udp", 10, 2, 0),
    ("netlink route", 16, 3, 0),
    ("packet", 17, 3, 0),
    ("alg", 38, 5, 0),
    ("vsock", 40, 1, 0),
];

/// Last of all questions: some answers are descriptors, which stay open until the probe ends.
pub(super) fn ask(report: &mut Report) {
    for (name, family, kind, protocol) in SOCKETS {
        // SAFETY: socket() takes no pointers.
        let result = unsafe { libc::syscall(libc::SYS_socket, family, kind, protocol) };
        report.insert(format!("socket.{name}"), answer(result));
    }
    for number in 0..END {
        if UNTRIED.iter().any(|(untried, _)| *untried == number) {
            continue;
        }
        report.insert(format!("syscall.{}", name(number)), attempt(number));
    }
}

fn attempt(number: i64) -> String {
    let own = ARGUMENTS.iter().find(|(other, _)| *other == number);
    let [a, b, c, d, e, f] = own.map_or(SENSELESS, |(_, [a, b, c, d])| [*a, *b, *c, *d, 0, 0]);
    // SAFETY: pointers among these arguments are null, in the first page, which no program has
    // mapped, or the last address, which is the kernel's: it reads and writes none of our memory.
    // What would change this process in other ways is in one of the lists above.
    answer(unsafe { libc::syscall(number, a, b, c, d, e, f) })
}

fn name(number: i64) -> String {
    let known = usize::try_from(number).ok().and_then(Sysno::new);
    known.map_or_else(|| number.to_string(), |known| known.name().to_owned())
}

fn answer(result: i64) -> String {
    if result >= 0 {
        "ok".into()
    } else {
        errno_name(&std::io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_either_tried_or_not() {
        for (number, reason) in UNTRIED {
            assert!(!reason.is_empty());
            assert!(ARGUMENTS.iter().all(|(other, _)| *other != number));
        }
    }
}
