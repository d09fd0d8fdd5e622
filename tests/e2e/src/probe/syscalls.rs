//! Which system calls a filter lets through, seen from their answers to senseless arguments.

use super::{Report, errno_name};

/// System calls that containerd's default filter treats differently, each with arguments that the
/// kernel refuses should the call get through.
const CALLS: [(&str, i64, [i64; 4]); 30] = [
    ("acct", libc::SYS_acct, [1, 0, 0, 0]),
    ("add_key", libc::SYS_add_key, [1, 0, 0, 0]),
    ("bpf", libc::SYS_bpf, [-1, 0, 0, 0]),
    ("clock_settime", libc::SYS_clock_settime, [-1, 0, 0, 0]),
    ("clone3", libc::SYS_clone3, [0, 0, 0, 0]),
    ("delete_module", libc::SYS_delete_module, [1, 0, 0, 0]),
    ("fanotify_init", libc::SYS_fanotify_init, [-1, -1, 0, 0]),
    ("get_mempolicy", libc::SYS_get_mempolicy, [0, 0, 0, 0]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [0, 0, 0, 0]),
    ("kcmp", libc::SYS_kcmp, [-1, -1, -1, 0]),
    ("kexec_load", libc::SYS_kexec_load, [0, 0, 0, -1]),
    ("keyctl", libc::SYS_keyctl, [-1, 0, 0, 0]),
    (
        "landlock_create_ruleset",
        libc::SYS_landlock_create_ruleset,
        [1, 0, 0, 0],
    ),
    ("memfd_create", libc::SYS_memfd_create, [0, 0, 0, 0]),
    ("mount", libc::SYS_mount, [1, 1, 0, 0]),
    (
        "name_to_handle_at",
        libc::SYS_name_to_handle_at,
        [-1, 0, 0, 0],
    ),
    (
        "open_by_handle_at",
        libc::SYS_open_by_handle_at,
        [-1, 0, 0, 0],
    ),
    (
        "perf_event_open",
        libc::SYS_perf_event_open,
        [0, -1, -1, -1],
    ),
    ("pivot_root", libc::SYS_pivot_root, [1, 1, 0, 0]),
    (
        "process_vm_readv",
        libc::SYS_process_vm_readv,
        [-1, 0, 0, 0],
    ),
    ("ptrace", libc::SYS_ptrace, [-1, -1, 0, 0]),
    ("quotactl", libc::SYS_quotactl, [-1, 1, 0, 0]),
    ("reboot", libc::SYS_reboot, [0, 0, 0, 0]),
    ("request_key", libc::SYS_request_key, [1, 0, 0, 0]),
    ("setns", libc::SYS_setns, [-1, 0, 0, 0]),
    ("settimeofday", libc::SYS_settimeofday, [1, 0, 0, 0]),
    ("swapon", libc::SYS_swapon, [1, 0, 0, 0]),
    ("syslog", libc::SYS_syslog, [-1, 0, 0, 0]),
    ("unshare", libc::SYS_unshare, [0x4000_0000, 0, 0, 0]),
    ("userfaultfd", libc::SYS_userfaultfd, [-1, 0, 0, 0]),
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

pub(super) fn ask(report: &mut Report) {
    for (name, number, [first, second, third, fourth]) in CALLS {
        // SAFETY: pointers among these arguments are null or point into the first page, which no
        // program has mapped, so the kernel reads and writes none of our memory.
        let result = unsafe { libc::syscall(number, first, second, third, fourth) };
        report.insert(format!("syscall.{name}"), answer(result));
    }
    for (name, family, kind, protocol) in SOCKETS {
        // SAFETY: socket() takes no pointers. The descriptor stays open until this process ends.
        let result = unsafe { libc::syscall(libc::SYS_socket, family, kind, protocol) };
        report.insert(format!("socket.{name}"), answer(result));
    }
}

fn answer(result: i64) -> String {
    if result >= 0 {
        "ok".into()
    } else {
        errno_name(&std::io::Error::last_os_error())
    }
}
