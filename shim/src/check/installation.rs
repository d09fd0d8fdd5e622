//! Bulkhead's own files: configuration, programs, and what the guest is made of.

use std::{
    env,
    path::{Path, PathBuf},
};

use bulkhead_rootfs_builder::{GuestFiles, verify};

use super::{
    machine::{Machine, Unreadable, is_program},
    report::Outcome,
};
use crate::{
    config::{self, Config},
    pod, text,
};

/// What containerd executes for the runtime `io.containerd.bulkhead.v2`.
const SHIM: &str = "containerd-shim-bulkhead-v2";

/// Where a service finds programs: systemd's default for the `PATH` of its services, and the
/// directories that it leaves out where they are links.
const CONTAINERD_PATH: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// What sets all files right.
const REINSTALL: &str = "install Bulkhead again (in its sources: cargo xtask install)";

/// The configuration can be used.
pub fn configuration(machine: &Machine) -> Result<Outcome, Unreadable> {
    let path = env::var_os(config::PATH_VARIABLE)
        .map_or_else(|| PathBuf::from(config::PATH), PathBuf::from);
    Ok(match &machine.config {
        Ok(config) => {
            let absent = if path.exists() { "" } else { " is not there" };
            Outcome::ok(format!(
                "{}{absent}: {} vCPU, {} MiB for each pod",
                path.display(),
                config.vcpus,
                config.memory_mib
            ))
        }
        Err(error) => Outcome::failed(
            text::chain(error),
            format!(
                "correct {}; docs/configuration.md explains every key",
                path.display()
            ),
        ),
    })
}

/// The shim is where containerd looks for it.
pub fn shim(machine: &Machine) -> Result<Outcome, Unreadable> {
    Ok(match find_shim(machine) {
        Some(path) => Outcome::ok(path.display().to_string()),
        None => {
            let beside = env::current_exe().map(|own| own.with_file_name(SHIM));
            let fix = match beside {
                Ok(beside) if is_program(&beside) => {
                    format!("ln -s {} /usr/local/bin/", beside.display())
                }
                _ => REINSTALL.to_owned(),
            };
            let path = CONTAINERD_PATH.join(":");
            Outcome::failed(format!("there is no {SHIM} in {path}"), fix)
        }
    })
}

fn find_shim(machine: &Machine) -> Option<PathBuf> {
    CONTAINERD_PATH
        .iter()
        .map(|directory| machine.path(directory).join(SHIM))
        .find(|path| is_program(path))
}

/// The VMM that the shim would start.
pub fn vmm_path(machine: &Machine, config: &Config) -> Option<PathBuf> {
    if config.vmm.is_none()
        && let Some(shim) = find_shim(machine)
        // The shim asks the kernel for its own path, which has no links.
        && let Ok(shim) = shim.canonicalize()
    {
        return Some(shim.with_file_name("bulkhead-vmm"));
    }
    config.vmm_path().ok()
}

/// The VMM is where the shim looks for it.
pub fn vmm(machine: &Machine) -> Result<Outcome, Unreadable> {
    let path = machine
        .config
        .as_ref()
        .ok()
        .and_then(|config| Some((config, vmm_path(machine, config)?)));
    Ok(match path {
        Some((_, path)) if is_program(&path) => Outcome::ok(path.display().to_string()),
        Some((config, path)) => Outcome::failed(
            format!("{} is no program", path.display()),
            if config.vmm.is_some() {
                "correct the key vmm of the configuration, or remove it"
            } else {
                REINSTALL
            },
        ),
        None => Outcome::failed("its place is not known", REINSTALL),
    })
}

/// Kernel and initramfs are those of their manifest.
pub fn guest_files(machine: &Machine) -> Result<Outcome, Unreadable> {
    Ok(match &machine.config {
        Ok(config) => guest(&config.guest_dir, &config.state_dir.join(pod::VERIFIED)),
        Err(error) => Outcome::failed(text::chain(error), "correct the configuration"),
    })
}

fn guest(directory: &Path, memory: &Path) -> Outcome {
    match verify(directory, memory) {
        Ok(files) => judge(directory, &files),
        Err(error) => Outcome::failed(text::chain(&error), REINSTALL),
    }
}

fn judge(directory: &Path, guest: &GuestFiles) -> Outcome {
    let (built, own) = (&guest.manifest.bulkhead, env!("CARGO_PKG_VERSION"));
    let detail = format!(
        "{}: Linux {}, Bulkhead {built}",
        directory.display(),
        guest.manifest.kernel_release
    );
    if built != own {
        return Outcome::warning(
            format!("{detail}, but the programs are of {own}"),
            REINSTALL,
        );
    }
    match &guest.cache_error {
        None => Outcome::ok(detail),
        Some(error) => Outcome::warning(
            format!("{detail}; every start hashes them: {}", text::chain(error)),
            "let root write there, or set state_dir",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use bulkhead_rootfs_builder::{
        INITRAMFS, MANIFEST, VMLINUX, verify::CacheError, write_manifest,
    };

    use super::*;
    use crate::check::report::Verdict;

    fn executable(path: &Path) {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn programs_are_found_where_containerd_and_the_shim_look() {
        let (_directory, mut machine) = Machine::of(&[
            ("/usr/local/bin/containerd-shim-bulkhead-v2", ""),
            ("/opt/bulkhead/containerd-shim-bulkhead-v2", ""),
            ("/opt/bulkhead/bulkhead-vmm", ""),
        ]);
        // It is there, but nobody may execute it.
        let outcome = shim(&machine).unwrap();
        assert_eq!(outcome.verdict, Verdict::Failed);
        assert!(outcome.detail.contains(SHIM), "{outcome:?}");

        let link = machine.path("/usr/local/bin/containerd-shim-bulkhead-v2");
        let target = machine.path("/opt/bulkhead/containerd-shim-bulkhead-v2");
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        executable(&target);
        assert_eq!(
            shim(&machine).unwrap(),
            Outcome::ok(link.display().to_string())
        );
        // The VMM is beside the shim, not beside the link.
        let beside = machine.path("/opt/bulkhead/bulkhead-vmm");
        assert_eq!(vmm(&machine).unwrap().verdict, Verdict::Failed);
        executable(&beside);
        let beside = beside.canonicalize().unwrap().display().to_string();
        assert_eq!(vmm(&machine).unwrap(), Outcome::ok(beside));

        machine.config.as_mut().unwrap().vmm = Some("/nonexistent/vmm".into());
        let outcome = vmm(&machine).unwrap();
        assert_eq!(outcome.verdict, Verdict::Failed);
        assert!(outcome.detail.contains("/nonexistent/vmm"), "{outcome:?}");
        assert!(outcome.fix.unwrap().contains("key vmm"));
    }

    #[test]
    fn guest_files_are_compared_with_their_manifest() {
        let directory = tempfile::tempdir().unwrap();
        let memory = directory.path().join("state/verified.json");
        let path = |name: &str| directory.path().join(name);
        fs::write(path(VMLINUX), "kernel").unwrap();
        fs::write(path(INITRAMFS), "initramfs").unwrap();
        write_manifest(directory.path(), "6.12.9-bulkhead").unwrap();
        let good = guest(directory.path(), &memory);
        assert_eq!(good.verdict, Verdict::Ok);
        assert!(good.detail.contains("Linux 6.12.9-bulkhead"), "{good:?}");

        // A memory that cannot be written costs time only.
        let mut files = verify(directory.path(), &memory).unwrap();
        files.cache_error = Some(CacheError {
            path: memory.clone(),
            source: std::io::ErrorKind::ReadOnlyFilesystem.into(),
        });
        let slow = judge(directory.path(), &files);
        assert_eq!(slow.verdict, Verdict::Warning);
        assert!(slow.detail.contains("verified.json"), "{slow:?}");

        let manifest = fs::read_to_string(path(MANIFEST)).unwrap();
        let own = format!("\"bulkhead\": \"{}\"", env!("CARGO_PKG_VERSION"));
        assert!(manifest.contains(&own), "{manifest}");
        let other = manifest.replace(&own, "\"bulkhead\": \"0.0.9\"");
        fs::write(path(MANIFEST), other).unwrap();
        let mixed = guest(directory.path(), &memory);
        assert_eq!(mixed.verdict, Verdict::Warning);
        assert!(mixed.detail.contains("0.0.9"), "{mixed:?}");

        fs::write(path(VMLINUX), "kermel").unwrap();
        let corrupt = guest(directory.path(), &memory);
        assert_eq!(corrupt.verdict, Verdict::Failed);
        assert!(corrupt.detail.contains("vmlinux is corrupt"), "{corrupt:?}");
    }
}
