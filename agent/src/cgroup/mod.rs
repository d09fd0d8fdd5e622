//! A container's cgroup (v2): made before its first process, removed after its last.

pub mod devices_bpf;
mod events;
pub mod limits;
mod stats;

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use oci_spec::runtime::LinuxResources;
use rustix::fs::{Mode, OFlags};
use thiserror::Error;

/// Names of the files that may be given to somebody else.
const DELEGATE: &str = "/sys/kernel/cgroup/delegate";

/// What went wrong with a cgroup.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// A file or directory of the cgroup file system.
    #[error("failed to {what} {}", path.display())]
    File {
        /// Verb.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A value that the kernel does not take.
    #[error("failed to set {file} to {value:?}")]
    Set {
        /// The cgroup's file.
        file: String,
        /// What was written.
        value: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The device program.
    #[error("failed to {what} the cgroup's device program")]
    Devices {
        /// `load` or `attach`.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

fn file_error(
    what: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.into();
    move |source| CgroupError::File { what, path, source }
}

/// One directory of the cgroup file system.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup of a container, with all its limits. `owner` is the user outside a user
    /// namespace to whom it is delegated. Leaves nothing behind on failure.
    pub fn create(
        root: &Path,
        container: &str,
        resources: Option<&LinuxResources>,
        owner: Option<u32>,
    ) -> Result<Self, CgroupError> {
        // The prefix keeps containers apart from the files of the root cgroup.
        let path = root.join(format!("container-{container}"));
        fs::create_dir(&path).map_err(file_error("create cgroup", &path))?;
        let cgroup = Self { path };
        let limited = cgroup.limit(resources);
        match limited.and_then(|()| owner.map_or(Ok(()), |owner| cgroup.delegate(owner))) {
            Ok(()) => Ok(cgroup),
            Err(error) => {
                let _ = fs::remove_dir(&cgroup.path);
                Err(error)
            }
        }
    }

    fn limit(&self, resources: Option<&LinuxResources>) -> Result<(), CgroupError> {
        for (file, value) in resources.map(limits::files).unwrap_or_default() {
            self.set(file, value)?;
        }
        let rules = resources.and_then(|resources| resources.devices().as_deref());
        let program = devices_bpf::program(rules.unwrap_or_default());
        devices_bpf::attach(&self.open()?, &program)
    }

    fn set(&self, file: String, value: String) -> Result<(), CgroupError> {
        let written = fs::write(self.path.join(&file), &value);
        written.map_err(|source| CgroupError::Set {
            file,
            value,
            source,
        })
    }

    /// Goes over to other limits. Those that were set already are set back when one fails.
    pub fn update(&self, now: &LinuxResources, next: &LinuxResources) -> Result<(), CgroupError> {
        let now = limits::files(now);
        let mut replaced = Vec::new();
        for (file, value) in limits::files(next) {
            if now.contains(&(file.clone(), value.clone())) {
                continue;
            }
            let path = self.path.join(&file);
            let before = fs::read_to_string(&path).map_err(file_error("read", &path))?;
            if let Err(error) = self.set(file.clone(), value) {
                for (file, value) in replaced.into_iter().rev() {
                    // The first error is the one to tell.
                    let _ = self.set(file, value);
                }
                return Err(error);
            }
            replaced.push((file, before));
        }
        Ok(())
    }

    /// Gives a user what the kernel says is safe to delegate (cgroup-v2.rst, "Delegation").
    fn delegate(&self, owner: u32) -> Result<(), CgroupError> {
        let listed = fs::read_to_string(DELEGATE).map_err(file_error("read", DELEGATE))?;
        let files = listed.lines().map(|name| self.path.join(name));
        for path in files.chain([self.path.clone()]) {
            match std::os::unix::fs::chown(&path, Some(owner), None) {
                // A file of a controller that this kernel does not have.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done.map_err(file_error("delegate", &path))?,
            }
        }
        Ok(())
    }

    /// A descriptor for `CLONE_INTO_CGROUP`.
    pub fn open(&self) -> Result<OwnedFd, CgroupError> {
        open_dir(&self.path)
    }

    /// A descriptor of the cgroup that a process of this container is in: this one, or a child
    /// that the container has made for itself. (Processes cannot join a cgroup whose controllers
    /// are handed on to children.)
    pub fn open_of(&self, root: &Path, pid: i32) -> Result<OwnedFd, CgroupError> {
        let file = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = fs::read_to_string(&file).map_err(file_error("read", &file))?;
        let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
        let path = root.join(own.unwrap_or_default());
        if path.starts_with(&self.path) {
            return open_dir(&path);
        }
        self.open()
    }

    /// Every process of the container, children of the cgroup included.
    pub fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let mut pids = Vec::new();
        for dir in self.tree()? {
            let file = dir.join("cgroup.procs");
            match fs::read_to_string(&file) {
                Ok(text) => pids.extend(text.lines().filter_map(|pid| pid.parse::<i32>().ok())),
                // Removed by the container since, or threaded.
                Err(error) if is_gone(&error) || error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                }
                Err(error) => return Err(file_error("read", file)(error)),
            }
        }
        Ok(pids)
    }

    /// SIGKILL to every process of the container at once.
    pub fn kill(&self) -> Result<(), CgroupError> {
        let file = self.path.join("cgroup.kill");
        fs::write(&file, "1").map_err(file_error("write", file))
    }

    /// Kills what is left, waits until the kernel says that the cgroup is empty, and removes it.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        match self.kill() {
            Err(CgroupError::File { source, .. }) if is_gone(&source) => return Ok(()),
            other => other?,
        }
        self.until_empty().await?;
        // Children first.
        for dir in self.tree()?.iter().rev() {
            match fs::remove_dir(dir) {
                Err(error) if !is_gone(&error) => {
                    return Err(file_error("remove cgroup", dir)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The cgroup's directory and all below, parents before children.
    fn tree(&self) -> Result<Vec<PathBuf>, CgroupError> {
        let mut dirs = vec![self.path.clone()];
        let mut next = 0;
        while let Some(dir) = dirs.get(next).cloned() {
            next += 1;
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(file_error("list", dir)(error)),
            };
            for entry in entries.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    dirs.push(entry.path());
                }
            }
        }
        Ok(dirs)
    }
}

/// Hands every controller of the root cgroup on to its children.
pub fn delegate_controllers(root: &Path) -> Result<(), CgroupError> {
    let controllers = root.join("cgroup.controllers");
    let names = fs::read_to_string(&controllers).map_err(file_error("read", controllers))?;
    let enable: Vec<String> = names
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    let file = root.join("cgroup.subtree_control");
    fs::write(&file, enable.join(" ")).map_err(file_error("write", file))
}

fn open_dir(path: &Path) -> Result<OwnedFd, CgroupError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| file_error("open cgroup", path)(error.into()))
}

/// A cgroup that is removed while its files are used answers with either.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}
