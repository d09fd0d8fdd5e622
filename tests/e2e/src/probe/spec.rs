//! What a process of a container sees of its set-up.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Report, outcome, syscalls};

/// Lines of /proc/self/status that the set-up decides.
const STATUS: [&str; 19] = [
    "Uid",
    "Gid",
    "Groups",
    "Umask",
    "NStgid",
    "NSpgid",
    "NSsid",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "Threads",
];

/// Files that a container must not be able to write, or that tell whether it is privileged. They
/// are opened for writing, and nothing is written.
const WRITABLE: [&str; 13] = [
    "/etc/hostname",
    "/proc/sysrq-trigger",
    "/proc/sys/kernel/panic",
    "/proc/sys/vm/drop_caches",
    "/proc/kcore",
    "/proc/keys",
    "/proc/timer_list",
    "/proc/irq/0/smp_affinity",
    "/sys/kernel/uevent_helper",
    "/sys/fs/cgroup/cgroup.procs",
    "/sys/firmware",
    "/dev/null",
    "/dev/kmsg",
];

/// Settings that programs read.
const SETTINGS: [&str; 18] = [
    "/proc/sys/fs/file-max",
    "/proc/sys/fs/nr_open",
    "/proc/sys/fs/pipe-max-size",
    "/proc/sys/fs/inotify/max_user_instances",
    "/proc/sys/fs/mqueue/msg_max",
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/domainname",
    "/proc/sys/kernel/pid_max",
    "/proc/sys/kernel/shmmax",
    "/proc/sys/kernel/shmall",
    "/proc/sys/kernel/sem",
    "/proc/sys/kernel/msgmax",
    "/proc/sys/kernel/unprivileged_bpf_disabled",
    "/proc/sys/vm/max_map_count",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/net/core/somaxconn",
    "/proc/sys/net/ipv4/ip_unprivileged_port_start",
    "/proc/sys/net/ipv4/ping_group_range",
];

/// Controls of the container's cgroup.
const CONTROLS: [&str; 12] = [
    "cgroup.controllers",
    "cgroup.subtree_control",
    "cgroup.type",
    "cpu.max",
    "cpu.weight",
    "cpuset.cpus",
    "cpuset.mems",
    "memory.max",
    "memory.low",
    "memory.swap.max",
    "pids.max",
    "io.weight",
];

/// Looks at everything.
pub(super) fn report() -> Result<Report> {
    let mut report = Report::new();
    // First: looking opens files of its own.
    descriptors(&mut report)?;
    process(&mut report)?;
    mounts(&mut report)?;
    devices(Path::new("/dev"), &mut report)?;
    cgroup(&mut report)?;
    network(&mut report)?;
    for path in WRITABLE {
        let opened = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path);
        report.insert(format!("write.{path}"), outcome(opened));
    }
    let created = fs::write("/created-by-the-probe", "x");
    report.insert("create in /".into(), outcome(created));
    for path in SETTINGS {
        report.insert(format!("setting.{path}"), text(path));
    }
    syscalls::ask(&mut report);
    Ok(report)
}

fn text(path: impl AsRef<Path>) -> String {
    match fs::read_to_string(path) {
        Ok(text) => text.trim_end().to_owned(),
        Err(error) => super::errno_name(&error),
    }
}

/// Open descriptors: none may come along from the runtime.
fn descriptors(report: &mut Report) -> Result<()> {
    let numbers: Vec<PathBuf> = fs::read_dir("/proc/self/fd")?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    for path in numbers {
        // The listing's own descriptor is closed by now.
        let Ok(metadata) = fs::metadata(&path) else {
            continue;
        };
        let number = path
            .file_name()
            .context("a descriptor without number")?
            .to_string_lossy();
        let kind = metadata.file_type();
        let what = if kind.is_fifo() {
            "pipe"
        } else if kind.is_socket() {
            "socket"
        } else if kind.is_char_device() {
            "character device"
        } else {
            "file"
        };
        let (mode, uid, gid) = (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
        report.insert(
            format!("fd.{number}"),
            format!("{what} {mode:o} {uid}:{gid}"),
        );
        // Programs log to /dev/stdout by its name.
        if number != "0" {
            let opened = OpenOptions::new().write(true).open(&path);
            report.insert(format!("fd.{number}.reopen"), outcome(opened));
        }
    }
    Ok(())
}

fn process(report: &mut Report) -> Result<()> {
    let status = fs::read_to_string("/proc/self/status")?;
    for line in status.lines() {
        if let Some((name, value)) = line.split_once(':')
            && STATUS.contains(&name)
        {
            let values: Vec<_> = value.split_whitespace().collect();
            // Which number a process has is chance; how many it has is the depth of its namespace.
            let text = if name.starts_with("NS") {
                values.len().to_string()
            } else {
                values.join(" ")
            };
            report.insert(format!("status.{name}"), text);
        }
    }
    for line in fs::read_to_string("/proc/self/limits")?.lines().skip(1) {
        let (name, values) = line
            .split_at_checked(26)
            .context("a short line in limits")?;
        let values: Vec<_> = values.split_whitespace().take(2).collect();
        report.insert(format!("limit.{}", name.trim_end()), values.join(" "));
    }
    for (name, value) in std::env::vars_os() {
        report.insert(
            format!("env.{}", name.display()),
            value.display().to_string(),
        );
    }
    for entry in fs::read_dir("/proc/self/ns")? {
        report.insert(
            format!("namespace.{}", entry?.file_name().display()),
            "there".into(),
        );
    }
    let mut note = |name: &str, value: String| report.insert(name.to_owned(), value);
    note("cwd", std::env::current_dir()?.display().to_string());
    note("oom_score_adj", text("/proc/self/oom_score_adj"));
    note("personality", text("/proc/self/personality"));
    note(
        "schedule",
        text("/proc/self/sched")
            .lines()
            .filter(|line| line.starts_with("policy") || line.starts_with("prio"))
            .collect::<Vec<_>>()
            .join(" ")
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" "),
    );
    note("apparmor", text("/proc/self/attr/apparmor/current"));
    let system = rustix::system::uname();
    note(
        "uname.sysname",
        system.sysname().to_string_lossy().into_owned(),
    );
    note(
        "uname.machine",
        system.machine().to_string_lossy().into_owned(),
    );
    note(
        "uname.nodename",
        system.nodename().to_string_lossy().into_owned(),
    );
    note(
        "uname.release",
        system.release().to_string_lossy().into_owned(),
    );
    note(
        "processors",
        std::thread::available_parallelism()?.to_string(),
    );
    note(
        "processes",
        fs::read_dir("/proc")?
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok())
            .count()
            .to_string(),
    );
    Ok(())
}

/// The mount table: order, and for each mount point what is mounted and how.
fn mounts(report: &mut Report) -> Result<()> {
    let mut order = Vec::new();
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    for line in table.lines() {
        let (left, right) = line
            .split_once(" - ")
            .context("mountinfo without separator")?;
        let left: Vec<_> = left.split(' ').collect();
        let right: Vec<_> = right.split(' ').collect();
        let [_, _, _, root, target, options, propagation @ ..] = left.as_slice() else {
            anyhow::bail!("a short line in mountinfo: {line}");
        };
        let [kind, source, superblock] = right.as_slice() else {
            anyhow::bail!("a short line in mountinfo: {line}");
        };
        // Numbers of peer groups mean nothing outside.
        let propagation: Vec<_> = propagation
            .iter()
            .map(|tag| tag.split(':').next().unwrap_or_default())
            .collect();
        let mut note = |aspect: &str, value: &str| {
            report.insert(format!("mount.{target}.{aspect}"), value.to_owned());
        };
        note("root", root);
        note("options", options);
        note("propagation", &propagation.join(" "));
        note("type", kind);
        note("source", source);
        note("superblock", superblock);
        order.push(*target);
    }
    report.insert("mount order".into(), order.join(" "));
    Ok(())
}

fn devices(directory: &Path, report: &mut Report) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let metadata = fs::symlink_metadata(&path)?;
        let kind = metadata.file_type();
        let (mode, uid, gid) = (metadata.mode(), metadata.uid(), metadata.gid());
        let mut value = format!("{mode:o} {uid}:{gid}");
        if kind.is_char_device() || kind.is_block_device() {
            let (major, minor) = (
                rustix::fs::major(metadata.rdev()),
                rustix::fs::minor(metadata.rdev()),
            );
            let opened = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(&path);
            value = format!("{value} {major}:{minor} open: {}", outcome(opened));
        } else if kind.is_symlink() {
            value = format!("{value} -> {}", fs::read_link(&path)?.display());
        }
        report.insert(format!("device.{}", path.display()), value);
        if kind.is_dir() {
            devices(&path, report)?;
        }
    }
    Ok(())
}

fn cgroup(report: &mut Report) -> Result<()> {
    report.insert("cgroup".into(), text("/proc/self/cgroup"));
    let directory = Path::new("/sys/fs/cgroup");
    for name in CONTROLS {
        report.insert(format!("cgroup.{name}"), text(directory.join(name)));
    }
    let Ok(listing) = fs::read_dir(directory) else {
        return Ok(());
    };
    for entry in listing {
        report.insert(
            format!("cgroup file {}", entry?.file_name().display()),
            "there".into(),
        );
    }
    Ok(())
}

fn network(report: &mut Report) -> Result<()> {
    for entry in fs::read_dir("/sys/class/net")? {
        let path = entry?.path();
        let name = path
            .file_name()
            .context("an interface without name")?
            .display()
            .to_string();
        for aspect in ["flags", "mtu", "address", "type"] {
            report.insert(
                format!("interface.{name}.{aspect}"),
                text(path.join(aspect)),
            );
        }
    }
    report.insert("routes".into(), text("/proc/net/route"));
    Ok(())
}
