//! What a process can reach and must not: masked and read-only paths, devices by their numbers.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rustix::fs::Access;

use super::{Report, outcome};

/// Paths that runtimes mask or make read-only by default, and those that the suite's root file
/// system has to be masked.
const PATHS: [&str; 38] = [
    "/dev/kmsg",
    "/dev/null",
    "/etc/hostname",
    "/etc/passwd",
    "/file",
    "/link-to-file",
    "/link-to-tree",
    "/proc/acpi",
    "/proc/asound",
    "/proc/bus",
    "/proc/config.gz",
    "/proc/fs",
    "/proc/interrupts",
    "/proc/irq",
    "/proc/irq/0/smp_affinity",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kmsg",
    "/proc/latency_stats",
    "/proc/modules",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/sys",
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/panic",
    "/proc/sys/vm/drop_caches",
    "/proc/sysrq-trigger",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/run",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/cgroup/cgroup.procs",
    "/sys/kernel/uevent_helper",
    "/tmp",
    "/tree",
    "/tree/inner",
];

/// Devices that are made and opened: name, type, number. The names that a container has by default
/// and those that it must never have.
const DEVICES: [(&str, SFlag, u64, u64); 12] = [
    ("null", SFlag::S_IFCHR, 1, 3),
    ("mem", SFlag::S_IFCHR, 1, 1),
    ("port", SFlag::S_IFCHR, 1, 4),
    ("kmsg", SFlag::S_IFCHR, 1, 11),
    ("tty", SFlag::S_IFCHR, 5, 0),
    ("console", SFlag::S_IFCHR, 5, 1),
    ("ptmx", SFlag::S_IFCHR, 5, 2),
    ("tun", SFlag::S_IFCHR, 10, 200),
    ("fuse", SFlag::S_IFCHR, 10, 229),
    ("kvm", SFlag::S_IFCHR, 10, 232),
    ("loop", SFlag::S_IFBLK, 7, 0),
    ("disk", SFlag::S_IFBLK, 8, 0),
];

pub(super) fn ask(report: &mut Report) {
    for path in PATHS {
        report.insert(format!("path.{path}"), path_answer(Path::new(path)));
    }
    for (name, kind, major, minor) in DEVICES {
        report.insert(
            format!("device access.{name}"),
            device_answer(kind, major, minor),
        );
    }
    for directory in ["/", "/tmp", "/dev", "/sys", "/proc/sys", "/run", "/tree"] {
        let name = Path::new(directory).join("created-by-the-probe");
        let created = fs::write(&name, "x");
        report.insert(format!("create in {directory}"), outcome(created));
        // What could not be made is not there to be removed.
        let _ = fs::remove_file(&name);
    }
}

/// Whether there is something, what comes of reading it, and whether it could be written.
fn path_answer(path: &Path) -> String {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => return outcome::<(), _>(Err(error)),
    };
    let owner = format!(
        "{:o} {}:{}",
        metadata.mode(),
        metadata.uid(),
        metadata.gid()
    );
    if metadata.is_dir() {
        let read = match fs::read_dir(path) {
            Ok(entries) => match entries.count() {
                0 => "empty".into(),
                _ => "ok".into(),
            },
            Err(error) => outcome::<(), _>(Err(error)),
        };
        let writable = outcome(rustix::fs::access(path, Access::WRITE_OK));
        return format!("{owner}, list {read}, write {writable}");
    }
    let open = |write: bool| {
        OpenOptions::new()
            .read(!write)
            .write(write)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
    };
    let read = open(false).and_then(|mut file| file.read(&mut [0; 16]));
    let read = match read {
        Ok(0) => "empty".into(),
        read => outcome(read),
    };
    // Opened only: nothing is written to what belongs to the machine.
    format!("{owner}, read {read}, write {}", outcome(open(true)))
}

/// The verdict of the cgroup's device filter, and of the mount.
fn device_answer(kind: SFlag, major: u64, minor: u64) -> String {
    let path = Path::new("/dev/made-by-the-probe");
    let made = mknod(
        path,
        kind,
        Mode::from_bits_truncate(0o600),
        makedev(major, minor),
    );
    let answer = match made {
        Ok(()) => {
            let open = |write: bool| {
                OpenOptions::new()
                    .read(!write)
                    .write(write)
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(path)
            };
            let (read, write) = (outcome(open(false)), outcome(open(true)));
            format!("mknod ok, read {read}, write {write}")
        }
        Err(error) => format!("mknod {error:?}"),
    };
    // What could not be made is not there to be removed.
    let _ = fs::remove_file(path);
    answer
}
