//! The host's AppArmor policy in the guest's kernel.
//!
//! The host hands a profile over as its own kernel has it, compiled, and the guest's kernel takes it
//! as it is: nothing here looks into it. What is loaded stays until the VM ends and is never
//! replaced, so a container's confinement cannot change under it.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Mutex, PoisonError},
};

use oci_spec::runtime::Process;
use rustix::{
    fs::{Mode, OFlags, openat},
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};
use thiserror::Error;

/// The name that asks for no profile.
const UNCONFINED: &str = "unconfined";

/// Takes policy whose profiles are all new, as one write.
const LOAD: &str = "apparmor/.load";

/// Why a process cannot have its profile.
#[derive(Debug, Error)]
pub enum ProfileError {
    /// The host named a profile without its policy.
    #[error("process.apparmorProfile is {0:?}, and its policy did not come along")]
    NoPolicy(String),
    /// The kernel has a profile of that name already, or of another one in the same policy.
    #[error(
        "AppArmor profile {0:?} is not the one that this pod has loaded under a name in its \
         policy: profiles of a pod are not replaced while it runs"
    )]
    Differs(String),
    /// The kernel does not understand the policy.
    #[error("the guest's kernel refuses AppArmor profile {name:?} as the host's compiled it")]
    Refused {
        /// The profile.
        name: String,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// The kernel does not take any policy.
    #[error("failed to {what} for AppArmor profile {name:?}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The profile.
        name: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// The profile that is to confine a process, if any.
pub fn profile_of(process: &Process) -> Option<&str> {
    let name = process.apparmor_profile().as_deref().unwrap_or_default();
    (!matches!(name, "" | UNCONFINED)).then_some(name)
}

/// Confines an exec'd process that says nothing about it as its container is. One that asks to be
/// unconfined is.
pub fn inherit(process: &mut Process, container: Option<&str>) {
    let name = process.apparmor_profile().as_deref().unwrap_or_default();
    if name.is_empty() {
        process.set_apparmor_profile(container.map(str::to_owned));
    }
}

/// What the guest's kernel has.
#[derive(Debug, Default)]
pub struct Profiles(Mutex<Loaded>);

#[derive(Debug, Default)]
struct Loaded {
    policies: Vec<Vec<u8>>,
    /// Those under which the policies came; they may hold more.
    names: HashSet<String>,
}

impl Profiles {
    /// Sees to it that the kernel has the profile of a process. Without a policy it must be one that
    /// came before.
    pub fn provide(&self, process: &Process, policy: Vec<u8>) -> Result<(), ProfileError> {
        match profile_of(process) {
            Some(name) => self.provide_by(name, policy, load),
            None => Ok(()),
        }
    }

    fn provide_by(
        &self,
        name: &str,
        policy: Vec<u8>,
        load: impl FnOnce(&str, &[u8]) -> Result<(), ProfileError>,
    ) -> Result<(), ProfileError> {
        let mut loaded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if policy.is_empty() {
            return match loaded.names.contains(name) {
                true => Ok(()),
                false => Err(ProfileError::NoPolicy(name.to_owned())),
            };
        }
        if !loaded.policies.contains(&policy) {
            load(name, &policy)?;
            loaded.policies.push(policy);
        }
        loaded.names.insert(name.to_owned());
        Ok(())
    }
}

fn load(name: &str, policy: &[u8]) -> Result<(), ProfileError> {
    let failed = |what| {
        move |errno: Errno| ProfileError::System {
            what,
            name: name.to_owned(),
            source: errno.into(),
        }
    };
    let root = securityfs().map_err(failed("mount securityfs"))?;
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = openat(&root, LOAD, flags, Mode::empty()).map_err(failed("reach the kernel"))?;
    match rustix::io::write(&file, policy) {
        Ok(written) if written == policy.len() => Ok(()),
        Ok(_) => Err(failed("load all policy")(Errno::IO)),
        Err(Errno::EXIST) => Err(ProfileError::Differs(name.to_owned())),
        Err(source @ (Errno::NOMEM | Errno::ACCESS | Errno::PERM)) => {
            Err(failed("load the policy")(source))
        }
        Err(source) => Err(ProfileError::Refused {
            name: name.to_owned(),
            source,
        }),
    }
}

/// A mount that is attached nowhere, so no container can ever come across it.
fn securityfs() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("securityfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let safe = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, safe)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(profile: Option<&str>) -> Process {
        let mut process = Process::default();
        process.set_apparmor_profile(profile.map(str::to_owned));
        process
    }

    #[test]
    fn no_name_and_unconfined_are_no_profile() {
        for name in [None, Some(""), Some("unconfined")] {
            assert_eq!(profile_of(&process(name)), None, "{name:?}");
        }
        assert_eq!(profile_of(&process(Some("a"))), Some("a"));
    }

    #[test]
    fn an_execd_process_has_its_own_profile_or_its_containers() {
        for (own, container, expected) in [
            (None, Some("a"), Some("a")),
            (Some(""), Some("a"), Some("a")),
            (Some("b"), Some("a"), Some("b")),
            (Some("unconfined"), Some("a"), None),
            (None, None, None),
        ] {
            let mut process = process(own);
            inherit(&mut process, container);
            assert_eq!(profile_of(&process), expected, "{own:?} in {container:?}");
        }
    }

    #[test]
    fn the_same_policy_is_loaded_once() {
        let profiles = Profiles::default();
        let mut loads = 0;
        for (name, policy) in [("a", b"1"), ("a", b"1"), ("b", b"1"), ("c", b"2")] {
            let load = |_: &str, _: &[u8]| {
                loads += 1;
                Ok(())
            };
            profiles.provide_by(name, policy.to_vec(), load).unwrap();
        }
        assert_eq!(loads, 2);
    }

    #[test]
    fn without_a_policy_a_profile_must_have_come_before() {
        let profiles = Profiles::default();
        let never = |_: &str, _: &[u8]| panic!("there is nothing to load");
        let error = profiles.provide_by("a", vec![], never).unwrap_err();
        assert!(matches!(error, ProfileError::NoPolicy(name) if name == "a"));
        profiles.provide_by("a", vec![1], |_, _| Ok(())).unwrap();
        profiles.provide_by("a", vec![], never).unwrap();
        assert!(profiles.provide_by("b", vec![], never).is_err());
    }

    #[test]
    fn a_policy_that_was_refused_is_not_taken_for_loaded() {
        let profiles = Profiles::default();
        let refuse = |name: &str, _: &[u8]| Err(ProfileError::Differs(name.to_owned()));
        for _ in 0..2 {
            assert!(profiles.provide_by("a", vec![1], refuse).is_err());
        }
        assert!(profiles.provide_by("a", vec![], refuse).is_err());
    }
}
