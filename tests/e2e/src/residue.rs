//! What a container may leave on the host, compared before and after each test.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::ctr::ctr;
use crate::host;

/// How long what is on its way out may take.
const SETTLE: Duration = Duration::from_secs(40);

/// Between two looks at the host: what shall go away goes without a notification.
const PAUSE: Duration = Duration::from_millis(200);

/// Directories of which the names of the entries are compared. The FIFOs in /run/containerd/fifo
/// are not among them: they are the client's, and `ctr task exec --detach` keeps its own.
const DIRECTORIES: [&str; 7] = [
    "/run",
    "/run/containerd",
    "/run/containerd/s",
    "/run/netns",
    "/sys/class/net",
    "/tmp",
    "/var/lib/bulkhead",
];

/// Directories of which every entry below is compared.
const TREES: [&str; 4] = [
    "/run/bulkhead",
    "/run/containerd/io.containerd.runtime.v2.task",
    "/run/containerd/runc",
    "/var/lib/containerd/io.containerd.runtime.v2.task",
];

/// What stays by design: the record of kernels that were checked, the file of claimed ids, the parents
/// that containerd, runc and `ip netns` make once, the bridge of pods and the parent of their cgroups.
const STAYS: [&str; 18] = [
    "/run/bulkhead",
    "/run/bulkhead/ids",
    "/run/bulkhead/verified.json",
    "/run/netns",
    "/run/containerd/runc/default",
    "/run/containerd/runc/k8s.io",
    "/run/containerd/runc",
    "/run/containerd/fifo",
    "/run/containerd/s",
    "/run/containerd/io.containerd.runtime.v2.task/default",
    "/run/containerd/io.containerd.runtime.v2.task/k8s.io",
    "/run/containerd/io.containerd.runtime.v2.task/moby",
    "/sys/class/net/cni0",
    "/sys/fs/cgroup/kubepods",
    "/var/lib/containerd/io.containerd.runtime.v2.task/default",
    "/var/lib/containerd/io.containerd.runtime.v2.task/k8s.io",
    "/var/lib/containerd/io.containerd.runtime.v2.task/moby",
    "/sys/fs/cgroup/default",
];

/// All of it at one moment, each thing on a line of its own.
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Looks at the host now.
    pub fn take() -> Result<Self> {
        let mut things = BTreeSet::new();
        processes(&mut things)?;
        mounts(&mut things)?;
        for directory in DIRECTORIES {
            entries(Path::new(directory), false, &mut things)?;
        }
        for tree in TREES {
            entries(Path::new(tree), true, &mut things)?;
        }
        cgroups(Path::new("/sys/fs/cgroup"), &mut things)?;
        Ok(Self(things))
    }

    /// What containerd keeps. It takes several commands, so it is not looked at after every test.
    pub fn of_containerd() -> Result<Self> {
        let mut things = BTreeSet::new();
        for what in ["container", "task", "snapshot", "leases"] {
            let listing = ctr(&[what, "ls"])?.succeeds()?;
            things.extend(listing.lines().skip(1).map(|line| format!("{what} {line}")));
        }
        Ok(Self(things))
    }

    /// Waits until nothing is there that was not there before; names what stays.
    pub fn nothing_new(&self, look: impl Fn() -> Result<Self>) -> Result<()> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let now = look()?;
            let new: Vec<_> = now.0.difference(&self.0).map(String::as_str).collect();
            if new.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("left behind:\n  {}", new.join("\n  "));
            }
            thread::sleep(PAUSE);
        }
    }
}

/// Processes, and among them those that hold a virtual machine.
fn processes(things: &mut BTreeSet<String>) -> Result<()> {
    let own = i32::try_from(std::process::id())?;
    for process in host::processes()? {
        // A restarted containerd is a new process by intent, and a child of this one.
        if process.pid == own || process.name == "containerd" {
            continue;
        }
        let (pid, started) = (process.pid, process.started);
        let (state, name, line) = (process.state, &process.name, &process.command_line);
        let zombie = if state == 'Z' {
            " (ended, not waited for)"
        } else {
            ""
        };
        things.insert(format!("process {pid}@{started} {name}{zombie}: {line}"));
        // Gone by now, or it holds nothing.
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        let machines = descriptors
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .filter(|target| target.as_os_str() == "anon_inode:kvm-vm")
            .count();
        if machines > 0 {
            things.insert(format!(
                "{machines} virtual machine(s) of process {pid}@{started} {name}"
            ));
        }
    }
    Ok(())
}

fn mounts(things: &mut BTreeSet<String>) -> Result<()> {
    let table = host::read(Path::new("/proc/self/mountinfo"))?;
    for line in table.lines() {
        let mut words = line.split(' ').skip(3);
        let root = words.next().context("mountinfo has no root")?;
        let target = words.next().context("mountinfo has no mount point")?;
        let rest = line.split_once(" - ").map_or("", |(_, rest)| rest);
        let kind = rest.split(' ').next().unwrap_or_default();
        if STAYS.contains(&target) {
            continue;
        }
        things.insert(format!("mount at {target}: {root} of {kind}"));
    }
    Ok(())
}

fn entries(directory: &Path, deep: bool, things: &mut BTreeSet<String>) -> Result<()> {
    // A directory that is not there, or no longer, has no entries.
    let Ok(listing) = fs::read_dir(directory) else {
        return Ok(());
    };
    for entry in listing.flatten() {
        let path = entry.path();
        if !STAYS.iter().any(|&stays| path == Path::new(stays)) {
            things.insert(format!("file {}", path.display()));
        }
        // A root file system that is mounted there is seen as a mount.
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if deep && is_directory && entry.file_name() != "rootfs" {
            entries(&path, deep, things)?;
        }
    }
    Ok(())
}

fn cgroups(directory: &Path, things: &mut BTreeSet<String>) -> Result<()> {
    let Ok(listing) = fs::read_dir(directory) else {
        return Ok(());
    };
    for entry in listing.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            if !STAYS.iter().any(|&stays| path == Path::new(stays)) {
                things.insert(format!("cgroup {}", path.display()));
            }
            cgroups(&path, things)?;
        }
    }
    Ok(())
}
