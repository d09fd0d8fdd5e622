//! Where a pod's processes are in the host's cgroup hierarchy (v2).
//!
//! The limits of a container hold inside the guest. The host's cgroup is there to account for the
//! processes, to find them and to end them; what is set on the cgroups above applies as always.
//!
//! ```text
//! cgroupsPath       of a container
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

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::statfs::{CGROUP2_SUPER_MAGIC, statfs},
};
use thiserror::Error;

use crate::config::Config;

/// Where the hierarchy is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// Name of the anchors' cgroup in a container's.
const ANCHORS: &str = "anchors";

/// Name of the VMM's cgroup in that of the pod's first container.
const VMM: &str = "vmm";

/// What limits a VMM.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];

/// Processes and threads of a VMM beside its vCPUs: those of its devices, and those that KVM starts
/// for it.
const VMM_THREADS: u32 = 16;

/// Memory in bytes that a VMM may use beside its guest's, however small that is.
const VMM_MEMORY: u64 = 256 << 20;

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
        "Cannot limit a VMM: the cgroup controller {controller} cannot be enabled in {path}; enable \
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
        /// The file's path.
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
}

impl Cgroup {
    /// Makes the cgroup, or takes one that is there.
    pub fn create(path: PathBuf) -> Result<Self, CgroupError> {
        ensure(&anchors(&path))?;
        Ok(Self { path })
    }

    /// Makes the VMM's cgroup in it, with the limits for this configuration, and opens its
    /// `cgroup.procs` for writing: a process that writes "0" joins.
    ///
    /// A VMM may use its guest's memory, as much again for what the host's kernel keeps of the
    /// files that the guest keeps in its caches, and something for itself.
    pub fn for_vmm(&self, config: &Config) -> Result<File, CgroupError> {
        let path = self.path.join(VMM);
        ensure(&path)?;
        if config.cgroup_limits {
            enable_controllers(&self.path)?;
            let memory = 2 * (u64::from(config.memory_mib) << 20) + VMM_MEMORY;
            let pids = u32::from(config.vcpus) + VMM_THREADS;
            set(&path, "memory.max", &memory.to_string())?;
            set(&path, "pids.max", &pids.to_string())?;
        }
        let path = path.join("cgroup.procs");
        OpenOptions::new()
            .write(true)
            .open(&path)
            .map_err(|source| CgroupError::Open { path, source })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for path in [&self.path.join(VMM), &self.path.join(ANCHORS), &self.path] {
            match fs::remove_dir(path) {
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
fn enable_controllers(path: &Path) -> Result<(), CgroupError> {
    let above = path.ancestors().take_while(|above| above.starts_with(ROOT));
    let from_root: Vec<_> = above.collect();
    for directory in from_root.into_iter().rev() {
        let file = directory.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&file).unwrap_or_default();
        for controller in CONTROLLERS {
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

/// Kills what is in a cgroup that a crashed shim has left, waits until it is gone, and removes the
/// cgroup.
pub fn destroy(path: &Path, deadline: Duration) {
    if !path.is_dir() {
        return;
    }
    // cgroup.kill is there since Linux 5.14; without it the processes die with their shim alone.
    if let Ok(mut kill) = OpenOptions::new()
        .write(true)
        .open(path.join("cgroup.kill"))
    {
        let _ = kill.write_all(b"1");
    }
    if let Err(error) = wait_until_empty(path, deadline) {
        tracing::warn!(path = %path.display(), %error, "Cannot wait for a cgroup's processes");
    }
    drop(Cgroup {
        path: path.to_owned(),
    });
}

fn wait_until_empty(path: &Path, deadline: Duration) -> io::Result<()> {
    let end = Instant::now() + deadline;
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
        poll(
            &mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)],
            timeout,
        )?;
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
