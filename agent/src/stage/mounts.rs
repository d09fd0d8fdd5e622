//! Mounts of a spec, made detached and then moved onto a handle inside the root, so that no path
//! of the image is resolved outside it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::Mount;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    fspick, move_mount, open_tree,
};

pub use super::mount_options::{Attributes, MountOptions, propagation};
use super::{StageError, copy_up::copy_up, proc, root::Root};

/// Whether a mount takes its files from somewhere else instead of making a file system.
pub fn is_bind(mount: &Mount) -> bool {
    let options = mount.options().as_deref().unwrap_or_default();
    mount.typ().as_deref() == Some("bind")
        || options
            .iter()
            .any(|option| option == "bind" || option == "rbind")
}

/// Whether a bind mount brings the mounts below its source.
pub fn is_recursive(mount: &Mount) -> bool {
    options(mount).bind.unwrap_or(false)
}

/// The options of a mount, sorted.
pub fn options(mount: &Mount) -> MountOptions {
    MountOptions::parse(mount.options().as_deref().unwrap_or_default())
}

/// Whether a mount is made read-only only when all is made: there are mount points to be made in
/// it, device nodes, and what a tmpfs covers.
pub fn becomes_read_only(mount: &Mount) -> bool {
    let options = options(mount);
    let filled = mount.typ().as_deref() == Some("tmpfs")
        || mount
            .destination()
            .components()
            .eq(Path::new("/dev").components());
    filled && !options.remount && options.attributes.is_read_only()
}

/// Makes one mount of the spec inside the root. `source` is the detached tree of a bind mount.
pub fn make(root: &Root, mount: &Mount, source: Option<OwnedFd>) -> Result<(), StageError> {
    let destination = mount.destination();
    let failed = |what: &str| StageError::system(format!("{what} {}", destination.display()));
    let mut options = options(mount);
    if becomes_read_only(mount) {
        options.attributes.keep_writable();
    }
    if options.remount {
        return change(root, mount, &options).map_err(failed("remount"));
    }
    let (tree, target) = if is_bind(mount) {
        let tree = source.ok_or_else(|| {
            StageError::Invalid(format!("no source to bind at {}", destination.display()))
        })?;
        let target = if is_directory(&tree).map_err(failed("look at the source for"))? {
            root.make_directory(destination)
        } else {
            root.make_file(destination)
        };
        (tree, target.map_err(failed("make the mount point"))?)
    } else {
        let kind = mount.typ().as_deref().unwrap_or_default();
        if kind == "tmpfs" {
            keep_mode(root, destination, &mut options)
                .map_err(failed("look at the mount point"))?;
        }
        let target = root.make_directory(destination);
        let target = target.map_err(failed("make the mount point"))?;
        let tree = new_file_system(kind, mount.source().as_deref(), &options).map_err(
            StageError::system(format!(
                "make a {kind} file system for {}",
                destination.display()
            )),
        )?;
        if options.copy_up {
            copy_up(target.as_fd(), tree.as_fd()).map_err(failed("copy up"))?;
        }
        (tree, target)
    };
    if let Some(reason) = proc::refusal(&tree, &target).map_err(failed("look at"))? {
        return Err(StageError::Invalid(format!(
            "{} cannot be mounted because {reason}",
            destination.display()
        )));
    }
    options
        .attributes
        .apply(tree.as_fd(), false)
        .map_err(failed("set the attributes of"))?;
    options
        .recursive
        .apply(tree.as_fd(), true)
        .map_err(failed("set the attributes below"))?;
    attach(tree.as_fd(), target.as_fd()).map_err(failed("mount onto"))?;
    // After the move: only a mount that is in a namespace can change its peers.
    for (propagation, recursive) in &options.propagation {
        propagation
            .apply(tree.as_fd(), *recursive)
            .map_err(failed("set the propagation of"))?;
    }
    Ok(())
}

/// A tmpfs has the mode of the directory that it covers, unless it is given one.
fn keep_mode(root: &Root, destination: &Path, options: &mut MountOptions) -> io::Result<()> {
    let covered = match root.handle(destination) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        covered => covered?,
    };
    if !options.data.iter().any(|(key, _)| key == "mode") {
        let mode = rustix::fs::fstat(&covered)?.st_mode & 0o7777;
        options
            .data
            .push(("mode".to_owned(), Some(format!("{mode:o}"))));
    }
    Ok(())
}

/// Changes a mount that an earlier one of the spec has made.
fn change(root: &Root, mount: &Mount, options: &MountOptions) -> io::Result<()> {
    let handle = root.handle(mount.destination())?;
    if !is_bind(mount) && !options.data.is_empty() {
        let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
        let context = fspick(&handle, "", flags)?;
        configure(context.as_fd(), options)?;
        fsconfig_reconfigure(context.as_fd())?;
    }
    options.attributes.apply(handle.as_fd(), false)?;
    options.recursive.apply(handle.as_fd(), true)
}

/// A detached mount of a new instance of a file system.
fn new_file_system(
    kind: &str,
    source: Option<&Path>,
    options: &MountOptions,
) -> io::Result<OwnedFd> {
    // The guest has cgroup v2 only, whatever the spec was written for.
    let kind = if kind == "cgroup" { "cgroup2" } else { kind };
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    // Without a source the kernel would call it "none".
    let source = source.unwrap_or(Path::new(""));
    fsconfig_set_string(context.as_fd(), "source", source)?;
    configure(context.as_fd(), options)?;
    // As mount(2) with MS_RDONLY does: the file system itself is read-only, not just this mount.
    if options.attributes.is_read_only() {
        fsconfig_set_flag(context.as_fd(), "ro")?;
    }
    fsconfig_create(context.as_fd())?;
    let none = MountAttrFlags::empty();
    Ok(fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        none,
    )?)
}

fn configure(context: BorrowedFd<'_>, options: &MountOptions) -> io::Result<()> {
    for (key, value) in &options.data {
        let set = match value {
            Some(value) => fsconfig_set_string(context, key.as_str(), value.as_str()),
            None => fsconfig_set_flag(context, key.as_str()),
        };
        set.map_err(|error| {
            io::Error::new(
                io::Error::from(error).kind(),
                format!("option {key:?}: {error}"),
            )
        })?;
    }
    Ok(())
}

/// A detached copy of the mount at a path of the guest.
pub fn clone_path(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(rustix::fs::CWD, path, flags)?)
}

/// A detached copy of the mount, from an open file or directory of it downwards.
pub fn clone_handle(handle: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(handle, "", flags)?)
}

/// Moves a detached mount onto a handle.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", target, "", flags)?)
}

/// A file system for device nodes.
pub fn device_directory() -> io::Result<OwnedFd> {
    let options = MountOptions::parse(&["nosuid".into(), "noexec".into(), "mode=755".into()]);
    let directory = new_file_system("tmpfs", Some(Path::new("tmpfs")), &options)?;
    options.attributes.apply(directory.as_fd(), false)?;
    Ok(directory)
}

/// An empty directory for things that nobody keeps.
pub fn scratch_directory() -> io::Result<OwnedFd> {
    let options = MountOptions::parse(&["nosuid".into(), "nodev".into(), "mode=755".into()]);
    let directory = new_file_system("tmpfs", Some(Path::new("tmpfs")), &options)?;
    options.attributes.apply(directory.as_fd(), false)?;
    Ok(directory)
}

/// An empty read-only directory, for masking one. Should it ever be made writable, it still has no room
/// for anything.
pub fn empty_directory() -> io::Result<OwnedFd> {
    let options = MountOptions::parse(&["ro".into(), "nr_blocks=1".into(), "nr_inodes=1".into()]);
    let directory = new_file_system("tmpfs", Some(Path::new("tmpfs")), &options)?;
    options.attributes.apply(directory.as_fd(), false)?;
    Ok(directory)
}

fn is_directory(handle: &OwnedFd) -> io::Result<bool> {
    let mode = rustix::fs::fstat(handle)?.st_mode;
    Ok(rustix::fs::FileType::from_raw_mode(mode).is_dir())
}
