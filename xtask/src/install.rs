//! `cargo xtask install`: the files as they are on a user's machine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bulkhead_lab::{Client, target_dir};
use bulkhead_rootfs_builder::{INITRAMFS, MANIFEST, VMLINUX};
use tempfile::NamedTempFile;

use crate::build::{self, Built};

/// Where containerd finds runtimes, Bulkhead its VMM and people the command.
const PROGRAMS: &str = "usr/local/bin";

/// The programs.
const PROGRAM_NAMES: [&str; 3] = ["bulkhead", "bulkhead-vmm", "containerd-shim-bulkhead-v2"];

/// Where the shim looks for the guest's files.
const GUEST: &str = "usr/lib/bulkhead";

/// The user's configuration.
const CONFIG: &str = "etc/bulkhead/config.toml";

/// What a new configuration says: every key with its default, commented out.
const DEFAULT_CONFIG: &str = include_str!("../config.toml");

/// Builds and installs below `root`.
pub fn run(root: &Path) -> Result<i32> {
    install(&build::build()?, root)?;
    Ok(0)
}

/// Copies the built files below `root`; a configuration that is there stays as it is.
pub fn install(built: &Built, root: &Path) -> Result<()> {
    for program in PROGRAM_NAMES {
        let content = read(&built.programs.join(program))?;
        place(&content, 0o755, &root.join(PROGRAMS).join(program))?;
    }
    // The manifest last: until then the old one does not match, and the shim says so.
    for file in [VMLINUX, INITRAMFS, MANIFEST] {
        let content = read(&built.guest.join(file))?;
        place(&content, 0o644, &root.join(GUEST).join(file))?;
    }
    let config = root.join(CONFIG);
    if !config.exists() {
        place(DEFAULT_CONFIG.as_bytes(), 0o644, &config)?;
    }
    eprintln!(
        "Installed below {}: {PROGRAMS}, {GUEST}, {CONFIG}",
        root.display()
    );
    Ok(())
}

/// Installs the built files in a lab, in the same way.
pub fn install_in_lab(built: &Built, lab: &Client) -> Result<()> {
    let tree = tempfile::tempdir_in(target_dir()).context("create a directory to install into")?;
    fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755))
        .with_context(|| format!("change the mode of {}", tree.path().display()))?;
    install(built, tree.path())?;
    Ok(lab.push(tree.path(), "/")?)
}

fn read(path: &PathBuf) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

/// Writes a file in one step, so that a program that runs can be replaced.
fn place(content: &[u8], mode: u32, path: &Path) -> Result<()> {
    let directory = path.parent().unwrap_or(path);
    let write = || {
        fs::create_dir_all(directory)?;
        let file = NamedTempFile::new_in(directory)?;
        fs::write(file.path(), content)?;
        file.as_file()
            .set_permissions(fs::Permissions::from_mode(mode))?;
        file.persist(path)?;
        std::io::Result::Ok(())
    };
    write().with_context(|| format!("install {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(directory: &Path) -> Built {
        let files = [VMLINUX, INITRAMFS, MANIFEST];
        for file in PROGRAM_NAMES.into_iter().chain(files) {
            fs::write(directory.join(file), file).unwrap();
        }
        Built {
            programs: directory.into(),
            guest: directory.into(),
        }
    }

    #[test]
    fn lays_out_programs_guest_and_configuration() {
        let from = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        install(&built(from.path()), root.path()).unwrap();
        for program in ["bulkhead", "bulkhead-vmm", "containerd-shim-bulkhead-v2"] {
            let path = root.path().join("usr/local/bin").join(program);
            let mode = fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o755, "{program}");
        }
        assert!(root.path().join("usr/lib/bulkhead/manifest.json").exists());
        assert!(root.path().join("etc/bulkhead/config.toml").exists());
    }

    #[test]
    fn keeps_an_edited_configuration() {
        let from = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        install(&built(from.path()), root.path()).unwrap();
        let config = root.path().join(CONFIG);
        fs::write(&config, "vcpus = 2\n").unwrap();
        install(&built(from.path()), root.path()).unwrap();
        assert_eq!(fs::read_to_string(config).unwrap(), "vcpus = 2\n");
    }
}
