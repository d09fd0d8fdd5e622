//! The root file system that every configuration starts from, and what a run has made of it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};

use crate::command::{Input, Running};
use crate::ctr::{BUSYBOX, ctr};
use crate::probe::Report;

/// Directories: path, mode, owner.
const DIRECTORIES: [(&str, u32, u32); 17] = [
    ("bin", 0o755, 0),
    ("dev", 0o755, 0),
    ("etc", 0o755, 0),
    ("etc/private", 0o700, 0),
    ("home", 0o755, 0),
    ("home/user", 0o700, 1000),
    ("mnt", 0o755, 0),
    ("proc", 0o555, 0),
    ("root", 0o700, 0),
    ("run", 0o755, 0),
    ("sys", 0o555, 0),
    ("tmp", 0o1777, 0),
    ("tree", 0o755, 0),
    ("tree/inner", 0o750, 5),
    ("usr", 0o755, 0),
    ("var", 0o755, 0),
    ("var/lib", 0o755, 0),
];

/// Symbolic links: path, target.
const LINKS: [(&str, &str); 7] = [
    ("var/run", "/run"),
    ("var/relative", "../tree"),
    ("link-to-tree", "tree"),
    ("link-to-file", "/file"),
    ("out", "../../../../tree/inner"),
    ("dangling", "/not/there/yet"),
    ("loop", "loop"),
];

/// Files: path, mode, content.
const FILES: [(&str, u32, &str); 5] = [
    (
        "etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    ),
    ("etc/group", 0o644, "root:x:0:\nuser:x:1000:\n"),
    ("etc/hosts", 0o644, "127.0.0.1 localhost\n"),
    ("file", 0o640, "a file\n"),
    ("tree/inner/leaf", 0o600, "a leaf\n"),
];

/// Commands of busybox that scripts use.
const COMMANDS: [&str; 14] = [
    "cat", "chmod", "echo", "grep", "id", "kill", "ls", "mkdir", "mount", "sh", "sleep", "stat",
    "touch", "true",
];

/// A directory of the host for everything that a run needs.
pub(super) struct Workspace(PathBuf);

impl Workspace {
    /// A mount of its own: how the host's disk is mounted, and so whether it keeps access times, must
    /// not show in bind mounts of it.
    pub(super) fn new() -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("configurations-")
            .tempdir_in("/var/tmp")?;
        let workspace = Self(directory.keep());
        // Those of a container with other ids must be able to come this far.
        fs::set_permissions(workspace.path(), fs::Permissions::from_mode(0o755))?;
        mount_bind(workspace.path(), workspace.path())?;
        mount_remount(
            workspace.path(),
            MountFlags::BIND | MountFlags::RELATIME,
            "",
        )?;
        Ok(workspace)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Removes it with all that is in it.
    pub(super) fn remove(mut self) -> Result<()> {
        let path = std::mem::take(&mut self.0);
        unmount(&path, UnmountFlags::DETACH)?;
        remove(&path)
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            // A run that has failed leaves its files to be looked at, but not the mount.
            let _ = unmount(&self.0, UnmountFlags::DETACH);
        }
    }
}

/// Where programs are that root file systems share.
pub(super) struct Programs {
    directory: PathBuf,
}

impl Programs {
    /// Takes busybox from its image, and this program.
    pub(super) fn prepare(directory: &Path) -> Result<Self> {
        let image = directory.join("image");
        let programs = directory.join("programs");
        fs::create_dir(&image)?;
        fs::create_dir(&programs)?;
        let mount = image.to_str().context("a path that is not UTF-8")?;
        ctr(&["image", "mount", BUSYBOX, mount])?.succeeds()?;
        let copied = fs::copy(image.join("bin/busybox"), programs.join("busybox"));
        ctr(&["image", "unmount", "--rm", mount])?.succeeds()?;
        copied.context("copy busybox")?;
        fs::copy(std::env::current_exe()?, programs.join("probe"))?;
        for program in ["busybox", "probe"] {
            fs::set_permissions(programs.join(program), fs::Permissions::from_mode(0o755))?;
        }
        fs::remove_dir(&image)?;
        Ok(Self {
            directory: programs,
        })
    }

    /// Makes a root file system at `root`, and beside it what is mounted into it.
    pub(super) fn root(&self, root: &Path, volume: &Path) -> Result<()> {
        fs::create_dir(root)?;
        for (path, mode, owner) in DIRECTORIES {
            let path = root.join(path);
            fs::create_dir(&path)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            chown(&path, Some(owner), Some(owner))?;
        }
        for (path, target) in LINKS {
            symlink(target, root.join(path))?;
        }
        for (path, mode, content) in FILES {
            file(&root.join(path), mode, content)?;
        }
        fs::hard_link(self.directory.join("probe"), root.join("probe"))?;
        fs::hard_link(self.directory.join("busybox"), root.join("bin/busybox"))?;
        for command in COMMANDS {
            symlink("busybox", root.join("bin").join(command))?;
        }
        fs::create_dir_all(volume.join("below"))?;
        // For hooks, which take a program of the host.
        fs::hard_link(self.directory.join("busybox"), volume.join("sh"))?;
        file(&volume.join("file"), 0o644, "in a volume\n")?;
        file(&volume.join("below/file"), 0o600, "deep in a volume\n")?;
        lchown(volume.join("below/file"), Some(1000), Some(1000))?;
        Ok(())
    }
}

fn file(path: &Path, mode: u32, content: &str) -> Result<()> {
    fs::write(path, content)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// What is on the disk below `directory`, without times and sizes of directories.
pub(super) fn look(directory: &Path) -> Result<Report> {
    let mut report = Report::new();
    walk(directory, directory, &mut report)?;
    Ok(report)
}

fn walk(top: &Path, directory: &Path, report: &mut Report) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let metadata = fs::symlink_metadata(&path)?;
        let (mode, uid, gid) = (metadata.mode(), metadata.uid(), metadata.gid());
        let mut line = format!("{mode:o} {uid}:{gid}");
        if metadata.is_file() {
            line = format!("{line}, {} bytes", metadata.size());
        } else if metadata.is_symlink() {
            line = format!("{line} -> {}", fs::read_link(&path)?.display());
        } else if !metadata.is_dir() {
            line = format!("{line}, device {:x}", metadata.rdev());
        }
        let name = path.strip_prefix(top)?.display();
        report.insert(format!("disk./{name}"), line);
        if metadata.is_dir() {
            walk(top, &path, report)?;
        }
    }
    Ok(())
}

/// Removes a tree in which something may still be mounted: then it fails, and touches nothing.
pub(super) fn remove(directory: &Path) -> Result<()> {
    let mut command = std::process::Command::new("rm");
    command
        .args(["-rf", "--one-file-system", "--"])
        .arg(directory);
    Running::spawn(command, Input::Null)?.finish()?.succeeds()?;
    Ok(())
}
