//! AppArmor profiles of the host, as its kernel has compiled them.
//!
//! The guest's kernel enforces them; see `apparmor_policy` in the agent's protocol.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Whether the kernel enforces profiles.
const ENABLED: &str = "sys/module/apparmor/parameters/enabled";

/// Where securityfs is mounted.
const SECURITYFS: &str = "sys/kernel/security";

/// The loaded profiles, a directory for each.
const PROFILES: &str = "sys/kernel/security/apparmor/policy/profiles";

/// The file of a profile that holds the policy it was loaded with.
const RAW_DATA: &str = "raw_data";

/// The largest policy that is handed to a guest. It must fit into a message of ttrpc, which takes
/// 4 MiB, together with a specification.
const POLICY_MAX: u64 = 2 << 20;

/// Why a process cannot have its AppArmor profile.
#[derive(Debug, Error)]
pub enum ApparmorError {
    /// The host does not enforce profiles.
    #[error(
        "Cannot apply AppArmor profile {0:?}: AppArmor is not enabled on this host; remove the \
         profile from the container, or boot with apparmor=1 security=apparmor"
    )]
    Disabled(String),
    /// The kernel's profiles cannot be seen.
    #[error(
        "Cannot apply AppArmor profile {0:?}: /sys/kernel/security is not mounted; run mount -t \
         securityfs securityfs /sys/kernel/security"
    )]
    NoSecurityfs(String),
    /// There is no such profile.
    #[error(
        "Cannot apply AppArmor profile {0:?}: it is not loaded on this host; load it with \
         apparmor_parser"
    )]
    NotLoaded(String),
    /// The kernel keeps no policy.
    #[error(
        "Cannot apply AppArmor profile {0:?}: the host's kernel does not export its policy; it \
         needs CONFIG_SECURITY_APPARMOR_EXPORT_BINARY, and apparmor.export_binary=1"
    )]
    NotExported(String),
    /// The policy is larger than any that is known.
    #[error(
        "Cannot apply AppArmor profile {0:?}: the policy that it was loaded with is larger than \
         2 MiB; load the profile from a file of its own"
    )]
    TooLarge(String),
    /// It cannot be read.
    #[error("Cannot apply AppArmor profile {profile:?}: cannot read {}", path.display())]
    Read {
        /// The profile.
        profile: String,
        /// What cannot be read.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// The policy of the profile that a process names; empty if it names none.
pub fn policy(profile: Option<&str>) -> Result<Vec<u8>, ApparmorError> {
    match profile {
        None | Some("" | "unconfined") => Ok(Vec::new()),
        Some(profile) => read(Path::new("/"), profile),
    }
}

/// Reads a policy on the host whose root this is.
fn read(root: &Path, profile: &str) -> Result<Vec<u8>, ApparmorError> {
    let named = || profile.to_owned();
    match fs::read_to_string(root.join(ENABLED)) {
        Ok(answer) if answer.starts_with('Y') => {}
        _ => return Err(ApparmorError::Disabled(named())),
    }
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ApparmorError::Read {
            profile: named(),
            path,
            source,
        }
    };
    let mut children = root.join(PROFILES);
    if !children.exists() {
        return Err(if root.join(SECURITYFS).join("lsm").exists() {
            ApparmorError::Disabled(named())
        } else {
            ApparmorError::NoSecurityfs(named())
        });
    }
    let mut directory = None;
    // A child's name is its parent's and its own.
    for name in profile.split("//") {
        let found = find(&children, name).map_err(failed(&children))?;
        let found = found.ok_or_else(|| ApparmorError::NotLoaded(named()))?;
        children = found.join("profiles");
        directory = Some(found);
    }
    let directory = directory.ok_or_else(|| ApparmorError::NotLoaded(named()))?;
    let path = directory.join(RAW_DATA);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(if directory.exists() {
                ApparmorError::NotExported(named())
            } else {
                // Removed meanwhile.
                ApparmorError::NotLoaded(named())
            });
        }
        Err(error) => return Err(failed(&path)(error)),
    };
    let mut policy = Vec::new();
    file.take(POLICY_MAX + 1)
        .read_to_end(&mut policy)
        .map_err(failed(&path))?;
    if policy.len() as u64 > POLICY_MAX {
        return Err(ApparmorError::TooLarge(named()));
    }
    if policy.is_empty() {
        return Err(ApparmorError::NotExported(named()));
    }
    Ok(policy)
}

/// The directory of a profile. What directories are called says little: slashes and more are missing
/// from their names, and a number is added.
fn find(profiles: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    let entries = match fs::read_dir(profiles) {
        Ok(entries) => entries,
        // A profile without children.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let directory = entry?.path();
        match fs::read(directory.join("name")) {
            Ok(found) if found.strip_suffix(b"\n").unwrap_or(&found) == name.as_bytes() => {
                return Ok(Some(directory));
            }
            Ok(_) => {}
            // Removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with AppArmor and two profiles, one of which has a child.
    fn host() -> tempfile::TempDir {
        let host = tempfile::tempdir().unwrap();
        write(&host, ENABLED, b"Y\n");
        write(&host, "sys/kernel/security/lsm", b"capability,apparmor");
        profile(&host, "docker-default.4", "docker-default", Some(b"one"));
        profile(&host, "usr.bin.man.7", "/usr/bin/man", Some(b"two"));
        let child = "usr.bin.man.7/profiles/filter.0";
        profile(&host, child, "filter", Some(b"three"));
        host
    }

    fn profile(host: &tempfile::TempDir, directory: &str, name: &str, policy: Option<&[u8]>) {
        let directory = format!("{PROFILES}/{directory}");
        write(
            host,
            &format!("{directory}/name"),
            format!("{name}\n").as_bytes(),
        );
        if let Some(policy) = policy {
            write(host, &format!("{directory}/{RAW_DATA}"), policy);
        }
    }

    fn write(host: &tempfile::TempDir, path: &str, content: &[u8]) {
        let path = host.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    #[test]
    fn a_profile_is_found_by_what_it_calls_itself() {
        let host = host();
        let policy = |name| read(host.path(), name).ok();
        assert_eq!(policy("docker-default").unwrap(), b"one");
        assert_eq!(policy("/usr/bin/man").unwrap(), b"two");
        assert_eq!(policy("/usr/bin/man//filter").unwrap(), b"three");
        for absent in [
            "usr.bin.man",
            "filter",
            "docker-default//filter",
            "docker",
            "//",
            "&a",
        ] {
            let error = read(host.path(), absent).unwrap_err();
            assert!(
                matches!(error, ApparmorError::NotLoaded(_)),
                "{absent}: {error}"
            );
        }
    }

    #[test]
    fn no_profile_needs_no_apparmor() {
        for name in [None, Some(""), Some("unconfined")] {
            assert!(policy(name).unwrap().is_empty());
        }
    }

    #[test]
    fn what_the_host_lacks_is_said() {
        let host = host();
        profile(&host, "bare.9", "bare", None);
        let says = |name: &str, expected: &str| {
            let text = read(host.path(), name).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains(expected), "{text}");
        };
        says("other", "not loaded");
        says("bare", "EXPORT_BINARY");
        fs::remove_dir_all(host.path().join(PROFILES)).unwrap();
        says("docker-default", "not enabled");
        fs::remove_dir_all(host.path().join(SECURITYFS)).unwrap();
        says("docker-default", "mount -t securityfs");
        write(&host, ENABLED, b"N\n");
        says("docker-default", "not enabled");
        fs::remove_file(host.path().join(ENABLED)).unwrap();
        says("docker-default", "not enabled");
    }

    #[test]
    fn a_policy_has_a_limit() {
        let host = host();
        let most = usize::try_from(POLICY_MAX).unwrap();
        profile(&host, "most.1", "most", Some(&vec![1; most]));
        profile(&host, "more.1", "more", Some(&vec![1; most + 1]));
        assert_eq!(read(host.path(), "most").unwrap().len(), most);
        let error = read(host.path(), "more").unwrap_err();
        assert!(matches!(error, ApparmorError::TooLarge(_)), "{error}");
    }
}
