//! The container's root file system: its mounts, and the change into it.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::{Linux, Mount, Spec};
use rustix::{
    fs::OFlags,
    mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount},
    process::{chdir, fchdir, pivot_root},
};

use super::{
    StageError, devices, hooks,
    mounts::{self, Attributes},
    open_guest,
    protocol::{CreateTask, IdMappings},
    root::Root,
};
use crate::spec::has_bound_dev;

/// Where the root file system is mounted until it is the root: any directory of the guest in which
/// nothing is looked for any more.
const STAGING: &str = "/sys";

/// Where prepared devices are mounted meanwhile: a detached file system has nothing to bind.
const DEVICES: &str = "/tmp";

/// What comes from outside the container. With a user namespace it is taken by the stage, because
/// the new process has no rights outside.
#[derive(Debug)]
pub struct Sources {
    root: OwnedFd,
    /// Detached mounts for the spec's bind mounts, by index. Any other is made in its turn: the
    /// table of mounts is in the order in which they are made.
    binds: HashMap<usize, OwnedFd>,
    /// A file system of device nodes, where the new process cannot make them.
    devices: Option<OwnedFd>,
}

impl Sources {
    /// Takes everything. `users` are the ids of the container's user namespace.
    pub fn open(create: &CreateTask, users: Option<&IdMappings>) -> Result<Self, StageError> {
        let failed = |path: &Path| StageError::system(format!("clone {}", path.display()));
        let root = match &create.rootfs {
            Some(path) => mounts::clone_path(path, true).map_err(failed(path))?,
            None => mounts::empty_directory().map_err(StageError::system("make an empty root"))?,
        };
        let mut binds = HashMap::new();
        for (index, mount) in create.spec.mounts().iter().flatten().enumerate() {
            if users.is_some()
                && let Some(tree) = bound_tree(create, index, mount)?
            {
                binds.insert(index, tree);
            }
        }
        let devices = match users {
            Some(users) if has_devices(create) => Some(devices::prepare(&create.spec, users)?),
            _ => None,
        };
        Ok(Self {
            root,
            binds,
            devices,
        })
    }
}

/// Whether device nodes are made for it.
fn has_devices(create: &CreateTask) -> bool {
    create.rootfs.is_some() && !has_bound_dev(&create.spec)
}

/// A detached mount of what a bind mount shows.
fn bound_tree(
    create: &CreateTask,
    index: usize,
    mount: &Mount,
) -> Result<Option<OwnedFd>, StageError> {
    let Some(path) = create.binds.get(&index) else {
        return Ok(None);
    };
    let tree = mounts::clone_path(path, mounts::is_recursive(mount))
        .map_err(StageError::system(format!("clone {}", path.display())))?;
    Ok(Some(tree))
}

/// Builds the root file system and makes it this process's root. The mount namespace is new.
pub fn enter(id: &str, create: &CreateTask, mut sources: Sources) -> Result<(), StageError> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(StageError::system("make all mounts private"))?;
    attach(&sources.root, STAGING)?;
    let root = Root::new(sources.root);
    for (index, mount) in create.spec.mounts().iter().flatten().enumerate() {
        let source = match sources.binds.remove(&index) {
            None => bound_tree(create, index, mount)?,
            taken => taken,
        };
        mounts::make(&root, mount, source)?;
    }
    if has_devices(create) {
        if let Some(devices) = &sources.devices {
            attach(devices, DEVICES)?;
        }
        let prepared = sources.devices.map(Root::new);
        devices::populate(&root, &create.spec, prepared.as_ref())?;
    }
    if let Some(process) = create.spec.process() {
        root.make_directory(process.cwd())
            .map_err(StageError::system(format!(
                "make {}",
                process.cwd().display()
            )))?;
    }
    hooks::create_container(id, create, &root)?;
    pivot(&root)
}

/// Mounts a detached tree for the time until this process has its own root.
fn attach(tree: &OwnedFd, at: &str) -> Result<(), StageError> {
    let target = open_guest(at, OFlags::PATH | OFlags::DIRECTORY)?;
    mounts::attach(tree.as_fd(), target.as_fd())
        .map_err(StageError::system(format!("mount onto the guest's {at}")))
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
    for mount in create.spec.mounts().iter().flatten() {
        if mounts::becomes_read_only(mount) {
            let destination = mount.destination();
            let failed = StageError::system(format!("make {} read-only", destination.display()));
            root.handle(destination)
                .and_then(|mount| Attributes::READ_ONLY.apply(mount.as_fd(), false))
                .map_err(failed)?;
        }
    }
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
