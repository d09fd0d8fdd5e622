//! What may be mounted onto a container's procfs. Everything that confines a process later is
//! written through procfs, so an image or a volume must not be able to stand in for it.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use rustix::fs::{fstat, fstatfs};

/// `PROC_SUPER_MAGIC`, include/uapi/linux/magic.h
const PROC_MAGIC: i64 = 0x9fa0;
/// `PROC_ROOT_INO`, include/linux/proc_ns.h
const ROOT_INODE: u64 = 1;

/// Files that tools such as lxcfs replace, as in runc.
const REPLACEABLE: [&str; 11] = [
    "cpuinfo",
    "diskstats",
    "meminfo",
    "stat",
    "swaps",
    "uptime",
    "loadavg",
    "slabinfo",
    "net/dev",
    "sys/kernel/ns_last_pid",
    "sys/crypto/fips_enabled",
];

/// Why a tree must not be mounted there, if so.
pub fn refusal(tree: &OwnedFd, target: &OwnedFd) -> io::Result<Option<&'static str>> {
    if fstatfs(target)?.f_type != PROC_MAGIC {
        return Ok(None);
    }
    if fstat(target)?.st_ino == ROOT_INODE {
        let is_proc = fstatfs(tree)?.f_type == PROC_MAGIC && fstat(tree)?.st_ino == ROOT_INODE;
        return Ok((!is_proc).then_some("it would hide /proc and is not of type proc"));
    }
    // By the guest's own procfs, which no container sees.
    let path = std::fs::read_link(format!("/proc/self/fd/{}", target.as_raw_fd()))?;
    let replaceable = REPLACEABLE
        .iter()
        .any(|name| path.ends_with(Path::new("proc").join(name)));
    Ok((!replaceable).then_some("it is inside /proc"))
}
