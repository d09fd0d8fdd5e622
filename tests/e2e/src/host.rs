//! The host that the tests run on: its processes, and containerd among them.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};
use semver::Version;

use crate::command::{DEADLINE, Input, Running, wait_readable};

/// A process, as `/proc/PID/stat` and `/proc/PID/cmdline` show it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id.
    pub parent: i32,
    /// In clock ticks since boot; with the id it names a process for good.
    pub started: u64,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// One letter; `Z` has ended and waits for its parent.
    pub state: char,
    /// Its arguments, separated by spaces; empty for threads of the kernel.
    pub command_line: String,
}

/// All processes but the threads of the kernel.
pub fn processes() -> Result<Vec<Process>> {
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot list /proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may end while it is looked at.
        if let Some(process) = process(pid)
            && process.parent != 2
            && process.pid != 2
        {
            processes.push(process);
        }
    }
    processes.sort();
    Ok(processes)
}

fn process(pid: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let command_line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    Some(Process {
        pid,
        parent: fields.get(1)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
        name: name.to_owned(),
        state: fields.first()?.chars().next()?,
        command_line: String::from_utf8_lossy(&command_line)
            .split_terminator('\0')
            .collect::<Vec<_>>()
            .join(" "),
    })
}

/// The version of the host's runc, without what stands after its three numbers.
pub fn runc_version() -> Result<Version> {
    let mut command = Command::new("runc");
    command.arg("--version");
    let said = Running::spawn(command, Input::Null)?.finish()?.succeeds()?;
    said.lines()
        .next()
        .and_then(|line| line.strip_prefix("runc version "))
        .and_then(|version| version.split(['+', '-', '~']).next()?.parse().ok())
        .with_context(|| format!("no version of runc in {said:?}"))
}

/// The processes of one pod.
#[derive(Debug)]
pub struct Pod {
    /// containerd's child, or rather its adopted grandchild.
    pub shim: Process,
    /// Everything that the shim has started.
    pub children: Vec<Process>,
}

impl Pod {
    /// Finds the shim of this container, and its children.
    pub fn of(id: &str) -> Result<Self> {
        let all = processes()?;
        let is_shim = |process: &&Process| {
            let mut words = process.command_line.split(' ');
            words
                .next()
                .is_some_and(|program| program.contains("containerd-shim-"))
                && words.any(|word| word == id)
        };
        let mut shims = all.iter().filter(is_shim);
        let (Some(shim), None) = (shims.next(), shims.next()) else {
            bail!("there is not exactly one shim for {id} among {all:#?}");
        };
        Self::among(&all, shim.pid)
    }

    /// The pod of the shim with this process id.
    pub fn served_by(shim: i32) -> Result<Self> {
        Self::among(&processes()?, shim)
    }

    fn among(all: &[Process], shim: i32) -> Result<Self> {
        let found = all.iter().find(|process| process.pid == shim);
        let children = all.iter().filter(|process| process.parent == shim);
        Ok(Self {
            shim: found.with_context(|| format!("no shim {shim}"))?.clone(),
            children: children.cloned().collect(),
        })
    }

    /// The one child with this name.
    pub fn child(&self, name: &str) -> Result<&Process> {
        let mut found = self.children.iter().filter(|process| process.name == name);
        match (found.next(), found.next()) {
            (Some(process), None) => Ok(process),
            _ => bail!("there is not exactly one {name} in {self:#?}"),
        }
    }
}

/// Sends SIGKILL to a process and waits for its end.
pub fn kill(pid: i32) -> Result<()> {
    let target = Pid::from_raw(pid).with_context(|| format!("{pid} is no process id"))?;
    let pidfd = pidfd_open(target, PidfdFlags::empty())
        .with_context(|| format!("there is no process {pid}"))?;
    pidfd_send_signal(&pidfd, Signal::KILL).with_context(|| format!("cannot kill {pid}"))?;
    ensure!(
        wait_readable(&pidfd, DEADLINE)?,
        "process {pid} survives SIGKILL"
    );
    Ok(())
}

/// The lab's own tool for its containerd.
const LAB_AGENT: &str = "/usr/local/sbin/lab-agent";

/// containerd's log, which holds the logs of the shims as well.
const CONTAINERD_LOG: &str = "/var/log/containerd.log";

/// A containerd that was stopped; started again when dropped, if not before.
pub struct StoppedContainerd {
    stopped: bool,
}

impl StoppedContainerd {
    /// Ends containerd as a service manager does; the containers go on.
    pub fn stop() -> Result<Self> {
        containerd("stop")?;
        Ok(Self { stopped: true })
    }

    /// Starts containerd and waits until it serves.
    pub fn start(mut self) -> Result<()> {
        self.stopped = false;
        containerd("start")
    }
}

impl Drop for StoppedContainerd {
    fn drop(&mut self) {
        if self.stopped
            && let Err(error) = containerd("start")
        {
            eprintln!("containerd cannot be started again: {error:#}");
        }
    }
}

fn containerd(verb: &str) -> Result<()> {
    let mut command = Command::new(LAB_AGENT);
    command.args(["containerd", verb]);
    Running::spawn(command, Input::Null)?.finish()?.succeeds()?;
    Ok(())
}

/// What containerd and the shims have logged since this was made.
pub struct Log {
    from: u64,
}

impl Log {
    /// Starts now.
    pub fn start() -> Self {
        Self {
            from: fs::metadata(CONTAINERD_LOG).map_or(0, |metadata| metadata.len()),
        }
    }

    /// The end of it, `most` bytes at most.
    pub fn tail(&self, most: u64) -> Result<String> {
        let mut file =
            File::open(CONTAINERD_LOG).with_context(|| format!("cannot open {CONTAINERD_LOG}"))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(self.from.max(length.saturating_sub(most))))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Proportional share of memory of a process in KiB, its anonymous and file pages and its share of
/// those that others map as well (proc_pid_smaps_rollup(5)).
pub fn pss_kib(pid: i32) -> Result<u64> {
    let path = PathBuf::from(format!("/proc/{pid}/smaps_rollup"));
    let text = read(&path)?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let value = line.and_then(|line| line.split_whitespace().next());
    value
        .with_context(|| format!("no Pss in {}", path.display()))?
        .parse()
        .context("Pss is no number")
}

/// A text file, with its path in the error.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// CPU time that a process and its threads have used, in clock ticks (proc_pid_stat(5)).
pub fn cpu_ticks(pid: i32) -> Result<u64> {
    let path = PathBuf::from(format!("/proc/{pid}/stat"));
    let stat = read(&path)?;
    let (_, rest) = stat.rsplit_once(") ").context("a stat without a name")?;
    // utime and stime, the 14th and 15th field.
    let times = rest.split(' ').skip(11).take(2);
    times
        .map(|time| time.parse::<u64>().context("a time is no number"))
        .sum()
}

/// Which processes may run beside this one on a core's threads: those with the same number, 0 unless it
/// has one of its own (core-scheduling.rst). Nothing where no core has a second thread; fails with
/// `EINVAL` where the kernel does not know of it.
pub fn core_cookie(pid: i32) -> Result<Option<u64>, Errno> {
    let pid = Pid::from_raw(pid).ok_or(Errno::SRCH)?;
    match core_scheduling_cookie(pid, CoreSchedulingScope::Thread) {
        Err(Errno::NODEV) => Ok(None),
        result => result.map(Some),
    }
}
