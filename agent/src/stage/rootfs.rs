//! The container's root file system: its mounts, and the change into it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::{Linux, Spec};
use rustix::{
    fs::OFlags,
    mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount},
    process::{chdir, fchdir, pivot_root},
};

use super::{
    StageError, devices,
    mounts::{self, Attributes},
    open_guest,
    protocol::CreateTask,
    root::Root,
};
use crate::spec::has_bound_dev;

/// Builds the root file system and makes it this process's root. The mount namespace is new.
pub fn enter(create: &CreateTask) -> Result<(), StageError> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(StageError::system("make all mounts private"))?;
    let root = attach_root(&create.rootfs)?;
    for (index, mount) in create.spec.mounts().iter().flatten().enumerate() {
        mounts::make(&root, mount, create.binds.get(&index).map(AsRef::as_ref))?;
    }
    if !has_bound_dev(&create.spec) {
        devices::populate(&root, &create.spec)?;
    }
    if let Some(process) = create.spec.process() {
        root.make_directory(process.cwd())
            .map_err(StageError::system(format!(
                "make {}",
                process.cwd().display()
            )))?;
    }
    pivot(&root)
}

/// Mounts the shared directory onto itself: a mount of its own that can become the root.
fn attach_root(rootfs: &Path) -> Result<Root, StageError> {
    let failed = |what: &str| StageError::system(format!("{what} {}", rootfs.display()));
    let tree = mounts::clone_path(rootfs, true).map_err(failed("clone the root file system"))?;
    let path = rootfs.to_str().unwrap_or_default();
    let target = open_guest(path, OFlags::PATH | OFlags::DIRECTORY)?;
    mounts::attach(tree.as_fd(), target.as_fd()).map_err(failed("mount the root file system"))?;
    Ok(Root::new(tree))
}

fn pivot(root: &Root) -> Result<(), StageError> {
    let old = open_guest("/", OFlags::PATH | OFlags::DIRECTORY)?;
    fchdir(root).map_err(StageError::system("enter the root file system"))?;
    // Old and new root at the same place: no directory for the old one is needed in the image.
    pivot_root(".", ".").map_err(StageError::system("change the root file system"))?;
    fchdir(&old).map_err(StageError::system("go back to the old root file system"))?;
    unmount(".", UnmountFlags::DETACH).map_err(StageError::system("leave the old root"))?;
    chdir("/").map_err(StageError::system("enter the new root"))
}

/// What is taken away once everything has been made: masked and read-only paths, the root's
/// writability.
pub fn finish(create: &CreateTask) -> Result<(), StageError> {
    let root = Root::own().map_err(StageError::system("open the root"))?;
    let empty = vec![];
    let Some(linux) = create.spec.linux() else {
        return Ok(());
    };
    for path in linux.readonly_paths().as_ref().unwrap_or(&empty) {
        make_read_only(&root, Path::new(path))
            .map_err(StageError::system(format!("make {path} read-only")))?;
    }
    for path in linux.masked_paths().as_ref().unwrap_or(&empty) {
        mask(&root, Path::new(path)).map_err(StageError::system(format!("mask {path}")))?;
    }
    root_attributes(&root, &create.spec, linux)
}

fn root_attributes(root: &Root, spec: &Spec, linux: &Linux) -> Result<(), StageError> {
    let propagation = linux.rootfs_propagation().as_deref().unwrap_or_default();
    if let Some((propagation, recursive)) = mounts::propagation(propagation) {
        propagation
            .apply(root.as_fd(), recursive)
            .map_err(StageError::system("set the root's propagation"))?;
    }
    let read_only = spec
        .root()
        .as_ref()
        .and_then(oci_spec::runtime::Root::readonly);
    if read_only == Some(true) {
        Attributes::READ_ONLY
            .apply(root.as_fd(), false)
            .map_err(StageError::system("make the root read-only"))?;
    }
    Ok(())
}

fn make_read_only(root: &Root, path: &Path) -> io::Result<()> {
    let Some(handle) = existing(root, path)? else {
        return Ok(());
    };
    let copy = mounts::clone_handle(handle.as_fd(), true)?;
    Attributes::READ_ONLY.apply(copy.as_fd(), false)?;
    mounts::attach(copy.as_fd(), handle.as_fd())
}

fn mask(root: &Root, path: &Path) -> io::Result<()> {
    let Some(handle) = existing(root, path)? else {
        return Ok(());
    };
    let mode = rustix::fs::fstat(&handle)?.st_mode;
    let cover = if rustix::fs::FileType::from_raw_mode(mode).is_dir() {
        mounts::empty_directory()?
    } else {
        let null = root.handle(Path::new("/dev/null"))?;
        if !devices::is_null(&null)? {
            return Err(io::Error::other(
                "/dev/null of the container is not the null device",
            ));
        }
        mounts::clone_handle(null.as_fd(), false)?
    };
    mounts::attach(cover.as_fd(), handle.as_fd())
}

/// A handle, or `None` for what the container does not have and so need not be kept from it.
fn existing(root: &Root, path: &Path) -> io::Result<Option<OwnedFd>> {
    match root.handle(path) {
        Ok(handle) => Ok(Some(handle)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
