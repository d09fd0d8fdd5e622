//! What a process of a container sees of its set-up.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Report, abi, errno_name, identity, outcome, protection, scheduling, syscalls, text};

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

/// Settings that programs read.
const SETTINGS: [&str; 32] = [
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
    "/proc/sys/kernel/msgmnb",
    "/proc/sys/kernel/msgmni",
    "/proc/sys/kernel/shmmni",
    "/proc/sys/kernel/shm_rmid_forced",
    "/proc/sys/kernel/cap_last_cap",
    "/proc/sys/kernel/ngroups_max",
    "/proc/sys/fs/mqueue/msgsize_max",
    "/proc/sys/fs/mqueue/queues_max",
    "/proc/sys/fs/protected_hardlinks",
    "/proc/sys/fs/protected_symlinks",
    "/proc/sys/fs/suid_dumpable",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/net/ipv4/tcp_syncookies",
    "/proc/sys/net/ipv4/ip_local_port_range",
    "/proc/sys/kernel/unprivileged_bpf_disabled",
    "/proc/sys/vm/max_map_count",
    "/proc/sys/vm/overcommit_memory",
    "/proc/sys/net/core/somaxconn",
    "/proc/sys/net/ipv4/ip_unprivileged_port_start",
    "/proc/sys/net/ipv4/ping_group_range",
];

/// Parts of names of the cgroup's files that hold what happens instead of what was set.
const MEASURED: [&str; 7] = [
    "stat", "current", "events", "pressure", "peak", "procs", "threads",
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
    identity::ask(&mut report)?;
    scheduling::ask(&mut report);
    protection::ask(&mut report);
    for path in SETTINGS {
        report.insert(format!("setting.{path}"), text(path));
    }
    terminal(&mut report);
    abi::ask(&mut report);
    // Last: it opens descriptors.
    syscalls::ask(&mut report);
    Ok(report)
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
        // The numbers of pipes and sockets are chance.
        let target = link(&path);
        let target = target.split('[').next().unwrap_or_default();
        let information = text(format!("/proc/self/fdinfo/{number}"));
        let flags = information
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .map_or("unknown", str::trim);
        report.insert(
            format!("fd.{number}"),
            format!("{what} {mode:o} {uid}:{gid} {target} flags {flags}"),
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
    // As it was given: a variable may come twice.
    for variable in fs::read_to_string("/proc/self/environ")?.split_terminator('\0') {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        let values = report.entry(format!("env.{name}")).or_default();
        values.push_str(&format!("{value:?}"));
    }
    let mut note = |name: &str, value: String| report.insert(name.to_owned(), value);
    note("cwd", std::env::current_dir()?.display().to_string());
    note("oom_score_adj", text("/proc/self/oom_score_adj"));
    note("root directory", link("/proc/self/root"));
    note("affinity", affinity());
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
        let found = fs::metadata(target).map(|found| {
            let (mode, uid, gid) = (found.mode(), found.uid(), found.gid());
            format!("{mode:o} {uid}:{gid}")
        });
        let found = found.unwrap_or_else(|error| errno_name(&error));
        note("owner", &found);
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
    let Ok(listing) = fs::read_dir(directory) else {
        return Ok(());
    };
    for entry in listing {
        let entry = entry?;
        let name = entry.file_name().display().to_string();
        let decided = !MEASURED.iter().any(|word| name.contains(word));
        if decided && entry.file_type().is_ok_and(|kind| kind.is_file()) {
            report.insert(format!("cgroup.{name}"), text(entry.path()));
        }
        report.insert(format!("cgroup file {name}"), "there".into());
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

/// What a symbolic link says, or why it cannot be read.
fn link(path: impl AsRef<Path>) -> String {
    match fs::read_link(path) {
        Ok(target) => target.display().to_string(),
        Err(error) => errno_name(&error),
    }
}

/// The CPUs on which it may run.
fn affinity() -> String {
    let set = match rustix::thread::sched_getaffinity(None) {
        Ok(set) => set,
        Err(error) => return errno_name(&error.into()),
    };
    let cpus = (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
    let cpus: Vec<_> = cpus.map(|cpu| cpu.to_string()).collect();
    cpus.join(" ")
}

/// Whether there is a terminal, its size, and whether this process is in its foreground.
fn terminal(report: &mut Report) {
    let streams = [
        ("stdin", rustix::stdio::stdin()),
        ("stdout", rustix::stdio::stdout()),
        ("stderr", rustix::stdio::stderr()),
    ];
    for (name, stream) in streams {
        let size = rustix::termios::tcgetwinsize(stream);
        let answer = match size {
            Ok(size) => format!("{} rows, {} columns", size.ws_row, size.ws_col),
            Err(error) => errno_name(&error.into()),
        };
        report.insert(format!("terminal.{name}"), answer);
    }
    let foreground = rustix::termios::tcgetpgrp(rustix::stdio::stdin());
    let answer = match foreground {
        Ok(group) => (group == rustix::process::getpgrp()).to_string(),
        Err(error) => errno_name(&error.into()),
    };
    report.insert("terminal.foreground".into(), answer);
}
