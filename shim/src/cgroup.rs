//! Where a pod's processes are in the host's cgroup hierarchy (v2).
//!
//! The limits of a container hold inside the guest, as long as its kernel keeps them. The host's
//! cgroup is there to account for the processes, to find them and to end them, and to hold a pod to
//! its share of the CPUs whatever its guest does; what is set on the cgroups above applies as always.
//!
//! ```text
//! cgroupsPath       of a container; that of the pod's first one with its CPU limits
//! ├── anchors       its anchors
//! └── vmm           the VMM, in that of the pod's first container, with limits of its own
//! ```

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read, Seek, Write},
    os::fd::AsFd,
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

use bulkhead_agent_api::{cpu_weight, messages::StatsResponse};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::statfs::{CGROUP2_SUPER_MAGIC, statfs},
};
use thiserror::Error;

use crate::{config::Config, spec::Cpu};

/// Where the hierarchy is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// Name of the anchors' cgroup in a container's.
const ANCHORS: &str = "anchors";

/// Name of the VMM's cgroup in that of the pod's first container.
const VMM: &str = "vmm";

/// What limits a VMM.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];

/// The period of CPU quotas in microseconds where the specification names none, as for the kernel
/// (cgroup-v2.rst, `cpu.max`).
pub const DEFAULT_PERIOD: u64 = 100_000;

/// The shortest quota that the kernel takes, in microseconds.
const MIN_QUOTA: u64 = 1_000;

/// Processes and threads of a VMM beside its vCPUs: those of its devices, and those that KVM starts
/// for it.
const VMM_THREADS: u32 = 20;

/// Memory in bytes that a VMM may use beside its guest's, however small that is.
const VMM_MEMORY: u64 = 256 << 20;

/// How long a killed process may take to end that keeps a cgroup from being removed.
const END_DEADLINE: Duration = Duration::from_secs(3);

/// Failures with a cgroup.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// The host has no v2 hierarchy.
    #[error("Bulkhead needs cgroup v2, but {ROOT} is not a cgroup2 file system")]
    NotV2,
    /// The path would leave the hierarchy, or has the wrong form.
    #[error("cgroupsPath {0:?} is invalid")]
    Path(String),
    /// The cgroup cannot be made.
    #[error("Cannot create cgroup {path}")]
    Create {
        /// Its directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The host cannot limit anything.
    #[error(
        "Cannot limit a pod: the cgroup controller {controller} cannot be enabled in {path}; enable \
         it (cgroup v2 must own it), or set cgroup_limits = false in the configuration"
    )]
    Controller {
        /// Which one.
        controller: &'static str,
        /// Where.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A limit cannot be set.
    #[error("Cannot write {path}")]
    Limit {
        /// The file's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The cgroup cannot be used.
    #[error("Cannot open {path}")]
    Open {
        /// The directory's path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// The directory for `cgroupsPath`, which is `/a/b` or systemd's `slice:prefix:name`; when it is
/// empty, `/namespace/id`.
pub fn directory(cgroups_path: &str, namespace: &str, id: &str) -> Result<PathBuf, CgroupError> {
    let invalid = || CgroupError::Path(cgroups_path.to_owned());
    let relative = if cgroups_path.is_empty() {
        Path::new(namespace).join(id)
    } else if let [slice, prefix, name] = cgroups_path.split(':').collect::<Vec<_>>()[..] {
        let unit = if name.ends_with(".slice") {
            name.to_owned()
        } else if prefix.is_empty() {
            format!("{name}.scope")
        } else {
            format!("{prefix}-{name}.scope")
        };
        slice_directory(slice).ok_or_else(invalid)?.join(unit)
    } else {
        PathBuf::from(cgroups_path.trim_start_matches('/'))
    };
    let plain = relative
        .components()
        .all(|component| matches!(component, Component::Normal(_)));
    // The hierarchy's root is not a container's.
    if !plain || relative.as_os_str().is_empty() {
        return Err(invalid());
    }
    Ok(Path::new(ROOT).join(relative))
}

/// systemd nests slices by their dashes: `a-b.slice` is in `a.slice` (systemd.slice(5)).
fn slice_directory(slice: &str) -> Option<PathBuf> {
    let slice = if slice.is_empty() {
        "system.slice"
    } else {
        slice
    };
    let name = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    if name == "-" {
        return Some(path);
    }
    for (index, _) in name.match_indices('-') {
        path.push(format!("{}.slice", &name[..index]));
    }
    path.push(slice);
    Some(path)
}

/// The cgroup for the anchors of the container with this cgroup.
pub fn anchors(container: &Path) -> PathBuf {
    container.join(ANCHORS)
}

/// A container's cgroup, removed with its owner.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// Limits are to hold, or else nothing is to run.
    limited: bool,
}

impl Cgroup {
    /// Makes the cgroup, or takes one that is there.
    pub fn create(path: PathBuf) -> Result<Self, CgroupError> {
        ensure(&anchors(&path))?;
        Ok(Self {
            path,
            limited: false,
        })
    }

    /// Makes the VMM's cgroup in it, with the limits for this configuration, and opens its directory.
    ///
    /// A VMM may use its guest's memory, as much again for what the host's kernel keeps of the
    /// files that the guest keeps in its caches, and something for itself.
    pub fn for_vmm(&mut self, config: &Config) -> Result<File, CgroupError> {
        let path = self.path.join(VMM);
        ensure(&path)?;
        self.limited = config.cgroup_limits;
        if self.limited {
            enable_controllers(&self.path, &CONTROLLERS)?;
            let memory = 2 * (u64::from(config.memory_mib) << 20) + VMM_MEMORY;
            let pids = u32::from(config.vcpus) + VMM_THREADS;
            set(&path, "memory.max", &memory.to_string())?;
            set(&path, "pids.max", &pids.to_string())?;
        }
        open(path)
    }

    /// Gives everything in the cgroup these CPU limits of a container, for the time when its guest's
    /// kernel no longer keeps them. A quota is a quarter longer than the container's own: the VMM
    /// works for it too.
    pub fn limit_cpu(&self, cpu: &Cpu) -> Result<(), CgroupError> {
        let limits = [("cpu.weight", weight(cpu)), ("cpu.max", bandwidth(cpu))];
        if !self.limited || limits.iter().all(|(_, value)| value.is_none()) {
            return Ok(());
        }
        if let Some(parent) = self.path.parent() {
            enable_controllers(parent, &["cpu"])?;
        }
        for (file, value) in limits {
            if let Some(value) = value {
                set(&self.path, file, &value)?;
            }
        }
        Ok(())
    }
}

fn weight(cpu: &Cpu) -> Option<String> {
    let shares = cpu.shares.filter(|shares| *shares != 0)?;
    Some(cpu_weight(shares).to_string())
}

fn bandwidth(cpu: &Cpu) -> Option<String> {
    let period = cpu
        .period
        .filter(|period| *period != 0)
        .unwrap_or(DEFAULT_PERIOD);
    let quota = cpu.quota.filter(|quota| *quota != 0)?;
    // A negative one takes away what there was.
    let Ok(quota) = u64::try_from(quota) else {
        return Some(format!("max {period}"));
    };
    let quota = quota.saturating_add(quota / 4).max(MIN_QUOTA);
    Some(format!("{quota} {period}"))
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let own = [self.path.join(VMM), self.path.join(ANCHORS)];
        for path in own.iter().chain([&self.path]) {
            let mut removed = fs::remove_dir(path);
            if path != &self.path
                && matches!(&removed, Err(error) if error.kind() == ErrorKind::ResourceBusy)
            {
                // Somebody is in it who was killed just now, or left to end by himself.
                empty(path, END_DEADLINE);
                removed = fs::remove_dir(path);
            }
            match removed {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "Cannot remove a cgroup");
                }
            }
        }
    }
}

/// Lets the children of a cgroup be limited, which its ancestors must allow each to the next
/// (cgroup-v2.rst, "Enabling and Disabling").
fn enable_controllers(path: &Path, controllers: &[&'static str]) -> Result<(), CgroupError> {
    let above = path.ancestors().take_while(|above| above.starts_with(ROOT));
    let from_root: Vec<_> = above.collect();
    for directory in from_root.into_iter().rev() {
        let file = directory.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&file).unwrap_or_default();
        for &controller in controllers {
            if enabled.split_whitespace().any(|name| name == controller) {
                continue;
            }
            fs::write(&file, format!("+{controller}")).map_err(|source| {
                CgroupError::Controller {
                    controller,
                    path: directory.to_owned(),
                    source,
                }
            })?;
        }
    }
    Ok(())
}

fn set(cgroup: &Path, file: &str, value: &str) -> Result<(), CgroupError> {
    let path = cgroup.join(file);
    fs::write(&path, value).map_err(|source| CgroupError::Limit { path, source })
}

/// Opens a cgroup's directory, for a process to be started in it.
pub fn open(path: PathBuf) -> Result<File, CgroupError> {
    File::open(&path).map_err(|source| CgroupError::Open { path, source })
}

/// What all that runs in a cgroup uses, as far as the host's kernel accounts for it.
pub fn usage(path: &Path) -> StatsResponse {
    let read = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
    let number = |file: &str| read(file).trim().parse().unwrap_or(0);
    let mut usage = StatsResponse::default();
    let cpu = usage.cpu.mut_or_insert_default();
    for line in read("cpu.stat").lines() {
        let (key, value) = line.split_once(' ').unwrap_or_default();
        let value = value.parse().unwrap_or(0);
        match key {
            "usage_usec" => cpu.usage_usec = value,
            "user_usec" => cpu.user_usec = value,
            "system_usec" => cpu.system_usec = value,
            _ => {}
        }
    }
    usage.memory.mut_or_insert_default().usage = number("memory.current");
    usage.pids.mut_or_insert_default().current = number("pids.current");
    usage
}

/// Makes a cgroup without owning it.
pub fn ensure(path: &Path) -> Result<(), CgroupError> {
    match statfs(ROOT) {
        Ok(found) if found.filesystem_type() == CGROUP2_SUPER_MAGIC => {}
        _ => return Err(CgroupError::NotV2),
    }
    fs::create_dir_all(path).map_err(|source| CgroupError::Create {
        path: path.to_owned(),
        source,
    })
}

/// Kills what is in the cgroups that a crashed shim has left, waits until it is gone, and removes the
/// cgroups. The deadline is for all of them.
pub fn destroy(paths: &[PathBuf], deadline: Duration) {
    let there: Vec<_> = paths.iter().filter(|path| path.is_dir()).collect();
    for path in &there {
        kill(path);
    }
    let end = Instant::now() + deadline;
    for path in there {
        wait_until_empty(path, end);
        drop(Cgroup {
            path: path.clone(),
            limited: false,
        });
    }
}

/// Kills what is in a cgroup, and waits until it is gone.
fn empty(path: &Path, deadline: Duration) {
    kill(path);
    wait_until_empty(path, Instant::now() + deadline);
}

fn kill(path: &Path) {
    // cgroup.kill is there since Linux 5.14; without it the processes die with their shim alone.
    if let Ok(mut kill) = OpenOptions::new()
        .write(true)
        .open(path.join("cgroup.kill"))
    {
        let _ = kill.write_all(b"1");
    }
}

fn wait_until_empty(path: &Path, end: Instant) {
    if let Err(error) = try_to_wait_until_empty(path, end) {
        tracing::warn!(path = %path.display(), %error, "Cannot wait for a cgroup's processes");
    }
}

fn try_to_wait_until_empty(path: &Path, end: Instant) -> io::Result<()> {
    let mut events = File::open(path.join("cgroup.events"))?;
    let mut text = String::new();
    loop {
        text.clear();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if text.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        // The kernel notifies changes of the file (cgroup-v2.rst, "[Un]populated Notification").
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(
            &mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)],
            timeout,
        ) {
            // They are children of this process, perhaps.
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(cgroups_path: &str) -> Option<String> {
        directory(cgroups_path, "ns", "id")
            .ok()
            .map(|path| path.display().to_string())
    }

    #[test]
    fn plain_paths_are_below_the_root() {
        assert_eq!(mapped("/a/b").as_deref(), Some("/sys/fs/cgroup/a/b"));
        assert_eq!(mapped("").as_deref(), Some("/sys/fs/cgroup/ns/id"));
        assert_eq!(mapped("/../b"), None);
        assert_eq!(mapped("/"), None);
    }

    #[test]
    fn cpu_limits_become_those_of_v2_with_room_for_the_vmm() {
        let cpu = |shares, quota, period| Cpu {
            shares,
            quota,
            period,
            cpus: None,
        };
        let of_shares = |shares| weight(&cpu(Some(shares), None, None));
        assert_eq!(of_shares(0), None);
        assert_eq!(of_shares(1024).as_deref(), Some("100"));
        let limit = |quota, period| bandwidth(&cpu(None, quota, period));
        assert_eq!(limit(Some(50_000), None).as_deref(), Some("62500 100000"));
        assert_eq!(
            limit(Some(20_000), Some(10_000)).as_deref(),
            Some("25000 10000")
        );
        assert_eq!(
            limit(Some(100), Some(10_000)).as_deref(),
            Some("1000 10000")
        );
        assert_eq!(limit(Some(-1), Some(10_000)).as_deref(), Some("max 10000"));
        assert_eq!(limit(Some(0), Some(10_000)), None);
        assert_eq!(limit(None, Some(10_000)), None);
    }

    #[test]
    fn systemds_form_is_nested_by_dashes() {
        assert_eq!(
            mapped("system.slice:docker:abc").as_deref(),
            Some("/sys/fs/cgroup/system.slice/docker-abc.scope")
        );
        assert_eq!(
            mapped("kubepods-burstable-pod1.slice:cri-containerd:x").as_deref(),
            Some(
                "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/\
                 kubepods-burstable-pod1.slice/cri-containerd-x.scope"
            )
        );
        assert_eq!(
            mapped(":p:n").as_deref(),
            Some("/sys/fs/cgroup/system.slice/p-n.scope")
        );
        assert_eq!(
            mapped("-.slice::n").as_deref(),
            Some("/sys/fs/cgroup/n.scope")
        );
        assert_eq!(mapped("nosuffix:p:n"), None);
    }
}
