//! The change to an AppArmor profile that comes with a process's execve.

use std::os::fd::OwnedFd;

use oci_spec::runtime::Process;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::{StageError, open_guest};
use crate::apparmor::profile_of;

/// A profile and the guest's own procfs to ask for it: a container's `/proc` may be anything.
#[derive(Debug)]
pub struct Transition {
    profile: String,
    proc: OwnedFd,
}

impl Transition {
    /// The one that a process wants. To be called before any namespace is joined.
    pub fn of(process: &Process) -> Result<Option<Self>, StageError> {
        let Some(profile) = profile_of(process) else {
            return Ok(None);
        };
        Ok(Some(Self {
            profile: profile.to_owned(),
            proc: open_guest("/proc", OFlags::PATH | OFlags::DIRECTORY)?,
        }))
    }

    /// Has the kernel make it at this process's next execve. Only then does the profile count, so
    /// nothing of the set-up needs its permission.
    pub fn at_execve(self) -> Result<(), StageError> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
        // This process's own, though it has another number in its namespace than here.
        let path = "self/attr/apparmor/exec";
        let file = openat2(&self.proc, path, flags, Mode::empty(), resolve)
            .map_err(StageError::system(format!("open /proc/{path}")))?;
        let command = format!("exec {}", self.profile);
        // In one piece, or the kernel would look for a shorter name.
        let written = rustix::io::write(&file, command.as_bytes()).map_err(StageError::system(
            format!("apply AppArmor profile {:?}", self.profile),
        ))?;
        if written == command.len() {
            return Ok(());
        }
        Err(StageError::Invalid(format!(
            "the name of AppArmor profile {:?} is too long",
            self.profile
        )))
    }
}
