//! What ties a process to others: namespaces, mappings, keys, and what the kernel's security
//! modules say of it.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::Result;

use super::{Report, errno_name, text};

/// Inode numbers of the first namespaces, which no container may be in (include/uapi/linux/nsfs.h).
const INITIAL: [(&str, u64); 6] = [
    ("cgroup", 0xeffffffb),
    ("ipc", 0xefffffff),
    ("pid", 0xeffffffc),
    ("time", 0xeffffffa),
    ("user", 0xeffffffd),
    ("uts", 0xeffffffe),
];

/// Files of a process that say who it is elsewhere.
const FILES: [&str; 5] = [
    "uid_map",
    "gid_map",
    "projid_map",
    "setgroups",
    "timens_offsets",
];

/// What each security module could say.
const LABELS: [&str; 8] = [
    "apparmor/current",
    "apparmor/exec",
    "apparmor/prev",
    "current",
    "exec",
    "fscreate",
    "keycreate",
    "sockcreate",
];

const KEYCTL_GET_KEYRING_ID: libc::c_long = 0;
const KEYCTL_DESCRIBE: libc::c_long = 6;

/// Keyrings by the numbers that stand for a process's own (include/uapi/linux/keyctl.h).
const KEYRINGS: [(&str, libc::c_long); 3] = [("thread", -1), ("process", -2), ("session", -3)];

pub(super) fn ask(report: &mut Report) -> Result<()> {
    for entry in fs::read_dir("/proc/self/ns")? {
        let name = entry?.file_name().display().to_string();
        report.insert(format!("namespace.{name}"), namespace(&name));
    }
    for file in FILES {
        let lines = text(format!("/proc/self/{file}"));
        let words: Vec<_> = lines.split_whitespace().collect();
        report.insert(file.into(), words.join(" "));
    }
    for label in LABELS {
        report.insert(
            format!("label.{label}"),
            text(format!("/proc/self/attr/{label}")),
        );
    }
    for (name, number) in KEYRINGS {
        report.insert(format!("keyring.{name}"), keyring(number));
    }
    // Numbers of keys are chance, and so are containers that run besides this one. The kernel's own
    // keyrings, whose names begin with a dot, are its builder's choice.
    for line in text("/proc/keys").lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let [_, _, _, _, rights, uid, gid, "keyring", name, ..] = words.as_slice() else {
            continue;
        };
        if let Some(kind) = name.strip_prefix('_') {
            let kind = kind.split(['.', ':']).next().unwrap_or_default();
            // Another container's has the rights of another configuration.
            if kind == "ses" {
                continue;
            }
            report.insert(
                format!("visible keyring _{kind}"),
                format!("{rights} {uid}:{gid}"),
            );
        }
    }
    Ok(())
}

/// Whether it is the kernel's first one, and that of PID 1. Numbers of others are chance.
fn namespace(name: &str) -> String {
    let number = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/{name}")).map(|m| m.ino());
    let own = match number("self") {
        Ok(own) => own,
        Err(error) => return errno_name(&error),
    };
    let kind = name.strip_suffix("_for_children").unwrap_or(name);
    let initial = INITIAL.contains(&(kind, own));
    let first = match number("1") {
        Ok(first) if first == own => "as PID 1".into(),
        Ok(_) => "not as PID 1".into(),
        Err(error) => errno_name(&error),
    };
    format!("{}, {first}", if initial { "initial" } else { "own" })
}

fn keyring(number: libc::c_long) -> String {
    // SAFETY: both operations take numbers and a buffer with its length.
    let id = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_GET_KEYRING_ID, number, 0) };
    if id < 0 {
        return errno_name(&std::io::Error::last_os_error());
    }
    let mut description = [0_u8; 256];
    // SAFETY: the buffer is as long as is said.
    let length = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_DESCRIBE,
            id,
            description.as_mut_ptr(),
            description.len(),
        )
    };
    if length < 0 {
        return errno_name(&std::io::Error::last_os_error());
    }
    let description = String::from_utf8_lossy(&description);
    description.trim_end_matches('\0').to_owned()
}
