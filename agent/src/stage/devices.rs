//! Nodes and links in a container's `/dev`.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxDevice, Spec};
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, Uid, chownat, fstat, major, makedev, minor, mknodat,
        symlinkat, unlinkat,
    },
    io::Errno,
};

use super::{StageError, mounts, protocol::IdMappings, root::Root};

/// The devices that every container has: name, major, minor. The order, which is runc's, shows where
/// they are mounted.
const DEFAULT: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/random", 1, 8),
    ("/dev/full", 1, 7),
    ("/dev/tty", 5, 0),
    ("/dev/zero", 1, 5),
    ("/dev/urandom", 1, 9),
];

/// The links that every container has.
const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];

/// A node to make.
struct Node {
    path: PathBuf,
    kind: FileType,
    permissions: u32,
    device: u64,
    owner: (u32, u32),
}

/// The nodes that a container is to have: the default ones and those of the spec.
fn nodes(spec: &Spec) -> Result<Vec<Node>, StageError> {
    let devices = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.devices().as_deref());
    let devices = devices.unwrap_or_default();
    let named = |path: &str| {
        devices
            .iter()
            .any(|device| device.path() == Path::new(path))
    };
    let default = DEFAULT.into_iter().filter(|(path, ..)| !named(path));
    let default = default.map(|(path, major, minor)| {
        Ok(Node {
            path: PathBuf::from(path),
            kind: FileType::CharacterDevice,
            permissions: 0o666,
            device: makedev(major, minor),
            owner: (0, 0),
        })
    });
    default.chain(devices.iter().map(node_of)).collect()
}

/// Makes the nodes of a container with a user namespace, in which nobody may, in a file system of
/// their own; each by its number in the list of nodes.
pub fn prepare(spec: &Spec, users: &IdMappings) -> Result<OwnedFd, StageError> {
    let umask = rustix::process::umask(Mode::empty());
    let failed = || StageError::system("make a file system for devices");
    let tree = mounts::device_directory().map_err(failed())?;
    let directory = Root::new(tree.try_clone().map_err(failed())?);
    for (number, mut node) in nodes(spec)?.into_iter().enumerate() {
        let path = std::mem::replace(&mut node.path, PathBuf::from(number.to_string()));
        let (uid, gid) = node.owner;
        let (Some(uid), Some(gid)) = (users.user(uid), users.group(gid)) else {
            return Err(StageError::Invalid(format!(
                "device {}: its owner {uid}:{gid} is not in the user namespace",
                path.display()
            )));
        };
        node.owner = (uid, gid);
        make(&directory, &node)?;
    }
    rustix::process::umask(umask);
    Ok(tree)
}

/// Makes the default devices, those of the spec, and the links. What has been prepared is bound.
pub fn populate(root: &Root, spec: &Spec, prepared: Option<&Root>) -> Result<(), StageError> {
    // Modes are meant as they are written.
    let umask = rustix::process::umask(Mode::empty());
    for (number, node) in nodes(spec)?.iter().enumerate() {
        match prepared {
            Some(prepared) => bind(root, node, prepared, number)?,
            None => make(root, node)?,
        }
    }
    for (target, path) in LINKS {
        link(root, target, Path::new(path))
            .map_err(StageError::system(format!("link {path} to {target}")))?;
    }
    // As on a host, if this kernel shows its memory at all.
    if Path::new("/proc/kcore").exists() {
        link(root, "/proc/kcore", Path::new("/dev/core"))
            .map_err(StageError::system("link /dev/core to /proc/kcore"))?;
    }
    rustix::process::umask(umask);
    Ok(())
}

fn node_of(device: &LinuxDevice) -> Result<Node, StageError> {
    let path = device.path();
    let invalid = |what: &str| StageError::Invalid(format!("device {}: {what}", path.display()));
    let kind = crate::spec::device_type(device.typ()).ok_or_else(|| invalid("no type"))?;
    let number = |number: i64, what| u32::try_from(number).map_err(|_| invalid(what));
    Ok(Node {
        path: path.clone(),
        kind: FileType::from_raw_mode(kind.bits()),
        permissions: device.file_mode().unwrap_or(0o666) & 0o7777,
        device: match kind {
            nix::sys::stat::SFlag::S_IFIFO => 0,
            _ => makedev(
                number(device.major(), "bad major number")?,
                number(device.minor(), "bad minor number")?,
            ),
        },
        owner: (device.uid().unwrap_or(0), device.gid().unwrap_or(0)),
    })
}

fn make(root: &Root, node: &Node) -> Result<(), StageError> {
    let make = || -> io::Result<()> {
        let (parent, name) = root.parent(&node.path)?;
        let mode = Mode::from_raw_mode(node.permissions);
        match mknodat(&parent, &name, node.kind, mode, node.device) {
            // What the image or another mount brings stays.
            Err(Errno::EXIST) => return Ok(()),
            result => result?,
        }
        let (uid, gid) = node.owner;
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        Ok(chownat(
            &parent,
            &name,
            uid,
            gid,
            AtFlags::SYMLINK_NOFOLLOW,
        )?)
    };
    make().map_err(StageError::system(format!("make {}", node.path.display())))
}

/// Shows a prepared node at its place.
fn bind(root: &Root, node: &Node, prepared: &Root, number: usize) -> Result<(), StageError> {
    let bind = || -> io::Result<()> {
        let source = prepared.handle(Path::new(&number.to_string()))?;
        let target = root.make_file(&node.path)?;
        let copy = mounts::clone_handle(source.as_fd(), false)?;
        mounts::attach(copy.as_fd(), target.as_fd())
    };
    bind().map_err(StageError::system(format!("bind {}", node.path.display())))
}

fn link(root: &Root, target: &str, path: &Path) -> io::Result<()> {
    let (parent, name) = root.parent(path)?;
    match symlinkat(target, &parent, &name) {
        // An image's own ptmx node would lead to the guest's terminals.
        Err(Errno::EXIST) if path.ends_with("ptmx") => {
            unlinkat(&parent, &name, AtFlags::empty())?;
            Ok(symlinkat(target, &parent, &name)?)
        }
        Err(Errno::EXIST) => Ok(()),
        result => Ok(result?),
    }
}

/// Whether a handle is of the null device.
pub fn is_null(handle: &OwnedFd) -> io::Result<bool> {
    let stat = fstat(handle)?;
    Ok(FileType::from_raw_mode(stat.st_mode).is_char_device()
        && (major(stat.st_rdev), minor(stat.st_rdev)) == (1, 3))
}
