//! Who a process is and what it may do.

use std::io;

use caps::CapSet;
use oci_spec::runtime::{Capability, Process};

use super::{StageError, users};

/// `_LINUX_CAPABILITY_VERSION_3`, capget(2).
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// The five sets of the spec, as bits.
#[derive(Debug, Default)]
pub struct Capabilities {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`, of which two make 64 bits.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

impl Capabilities {
    /// The sets of a process. A process without any has none.
    pub fn of(process: &Process) -> Result<Self, StageError> {
        let Some(sets) = process.capabilities() else {
            return Ok(Self::default());
        };
        Ok(Self {
            bounding: bits(sets.bounding().iter().flatten())?,
            effective: bits(sets.effective().iter().flatten())?,
            permitted: bits(sets.permitted().iter().flatten())?,
            inheritable: bits(sets.inheritable().iter().flatten())?,
            ambient: bits(sets.ambient().iter().flatten())?,
        })
    }

    fn drop_bounding(&self) -> Result<(), StageError> {
        for capability in caps::runtime::thread_all_supported() {
            if self.bounding & capability.bitmask() == 0 {
                caps::drop(None, CapSet::Bounding, capability)
                    .map_err(io::Error::other)
                    .map_err(StageError::system(format!("drop {capability}")))?;
            }
        }
        Ok(())
    }

    /// Makes everything that is permitted effective again, after a change of user has cleared
    /// that.
    pub fn raise_permitted() -> Result<(), StageError> {
        let permitted = caps::read(None, CapSet::Permitted)
            .map_err(io::Error::other)
            .map_err(StageError::system("read the capabilities"))?;
        let permitted = permitted.iter().fold(0, |bits, next| bits | next.bitmask());
        set(permitted, permitted, 0).map_err(StageError::system("raise the capabilities"))
    }

    /// Narrows this process to its sets.
    pub fn apply(&self) -> Result<(), StageError> {
        set(self.effective, self.permitted, self.inheritable)
            .map_err(StageError::system("set the capabilities"))?;
        for capability in caps::all() {
            if self.ambient & capability.bitmask() != 0 {
                caps::raise(None, CapSet::Ambient, capability)
                    .map_err(io::Error::other)
                    .map_err(StageError::system(format!("make {capability} ambient")))?;
            }
        }
        Ok(())
    }
}

fn bits<'a>(set: impl Iterator<Item = &'a Capability>) -> Result<u64, StageError> {
    let mut bits = 0;
    for name in set {
        let name = format!("CAP_{name}");
        let capability: caps::Capability = name
            .parse()
            .map_err(|_| StageError::Invalid(format!("unknown capability {name}")))?;
        bits |= capability.bitmask();
    }
    Ok(bits)
}

fn set(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let header = Header {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    let half = |shift: u32| {
        let half = |bits: u64| u32::try_from(bits >> shift & 0xffff_ffff).unwrap_or_default();
        Data {
            effective: half(effective),
            permitted: half(permitted),
            inheritable: half(inheritable),
        }
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 of the header goes with two data structures, which capset only reads.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Who a process runs as.
#[derive(Debug)]
pub struct User {
    /// Number of the user.
    pub uid: u32,
    gid: u32,
    groups: Vec<u32>,
    umask: u32,
}

impl User {
    /// The user of a process, by number or by its name in the files of this process's root. A name
    /// brings its own groups, unless the spec has some.
    pub fn of(process: &Process) -> Result<Self, StageError> {
        let user = process.user();
        let mut found = Self {
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().clone().unwrap_or_default(),
            // The spec's default is what a shell on a host has.
            umask: user.umask().unwrap_or(0o022),
        };
        let name = user.username().as_deref().unwrap_or_default();
        if name.is_empty() {
            return Ok(found);
        }
        let failed = || StageError::system(format!("look up the user {name:?}"));
        let unknown = || {
            StageError::Invalid(format!(
                "unable to find user {name}: no matching entries in passwd file"
            ))
        };
        let entry = users::by_name(name).map_err(failed())?;
        let entry = entry.ok_or_else(unknown)?;
        (found.uid, found.gid) = (entry.uid, entry.gid);
        if found.groups.is_empty() {
            found.groups = users::groups_of(name).map_err(failed())?;
        }
        Ok(found)
    }
}

/// Takes on the user, groups and umask of the process, and its bounding set while that is still
/// allowed. Permitted capabilities stay until [`Capabilities::apply`].
pub fn become_user(user: &User, capabilities: &Capabilities) -> Result<(), StageError> {
    capabilities.drop_bounding()?;
    nix::sys::prctl::set_keepcaps(true).map_err(StageError::system(
        "keep capabilities over the change of user",
    ))?;
    let groups: Vec<_> = user
        .groups
        .iter()
        .map(|gid| nix::unistd::Gid::from_raw(*gid))
        .collect();
    nix::unistd::setgroups(&groups).map_err(StageError::system("set the additional groups"))?;
    let gid = nix::unistd::Gid::from_raw(user.gid);
    nix::unistd::setresgid(gid, gid, gid)
        .map_err(StageError::system(format!("become group {gid}")))?;
    let uid = nix::unistd::Uid::from_raw(user.uid);
    nix::unistd::setresuid(uid, uid, uid)
        .map_err(StageError::system(format!("become user {uid}")))?;
    nix::sys::prctl::set_keepcaps(false)
        .map_err(StageError::system("stop keeping capabilities"))?;
    let umask = rustix::fs::Mode::from_raw_mode(user.umask & 0o777);
    rustix::process::umask(umask);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn capabilities_have_the_kernels_numbers() {
        let set = HashSet::from([
            Capability::Chown,
            Capability::SysAdmin,
            Capability::CheckpointRestore,
        ]);
        assert_eq!(bits(set.iter()).unwrap(), 1 | 1 << 21 | 1 << 40);
    }

    #[test]
    fn every_name_of_the_spec_is_known() {
        let names = [
            "AUDIT_READ",
            "BPF",
            "PERFMON",
            "SYSLOG",
            "WAKE_ALARM",
            "SETFCAP",
            "MAC_ADMIN",
        ];
        let json = serde_json::to_value(names).unwrap();
        let set: HashSet<Capability> = serde_json::from_value(json).unwrap();
        assert_eq!(bits(set.iter()).unwrap().count_ones(), 7);
    }
}
