//! Mounts of a spec, made detached and then moved onto a handle inside the root, so that no path
//! of the image is resolved outside it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::Mount;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use super::{StageError, root::Root};

// include/uapi/linux/mount.h
const ATTR_RDONLY: u64 = 0x01;
const ATTR_NOSUID: u64 = 0x02;
const ATTR_NODEV: u64 = 0x04;
const ATTR_NOEXEC: u64 = 0x08;
/// Field of the three ways to keep access times.
const ATTR_ATIME: u64 = 0x70;
const ATTR_RELATIME: u64 = 0x00;
const ATTR_NOATIME: u64 = 0x10;
const ATTR_STRICTATIME: u64 = 0x20;
const ATTR_NODIRATIME: u64 = 0x80;
const ATTR_NOSYMFOLLOW: u64 = 0x20_0000;

/// Files of /proc that a mount may cover, as under runc: those that describe the machine, for which
/// programs such as lxcfs have their own.
const PROC_FILES: [&str; 11] = [
    "cpuinfo",
    "diskstats",
    "loadavg",
    "meminfo",
    "net/dev",
    "slabinfo",
    "stat",
    "swaps",
    "sys/crypto/fips_enabled",
    "sys/kernel/ns_last_pid",
    "uptime",
];

/// Options that change a mount's attributes: name, bits to set, bits to clear.
const ATTRIBUTES: [(&str, u64, u64); 16] = [
    ("ro", ATTR_RDONLY, 0),
    ("rw", 0, ATTR_RDONLY),
    ("nosuid", ATTR_NOSUID, 0),
    ("suid", 0, ATTR_NOSUID),
    ("nodev", ATTR_NODEV, 0),
    ("dev", 0, ATTR_NODEV),
    ("noexec", ATTR_NOEXEC, 0),
    ("exec", 0, ATTR_NOEXEC),
    ("relatime", ATTR_RELATIME, ATTR_ATIME),
    ("norelatime", ATTR_RELATIME, ATTR_ATIME),
    ("noatime", ATTR_NOATIME, ATTR_ATIME),
    ("atime", ATTR_RELATIME, ATTR_ATIME),
    ("strictatime", ATTR_STRICTATIME, ATTR_ATIME),
    ("nostrictatime", ATTR_RELATIME, ATTR_ATIME),
    ("nodiratime", ATTR_NODIRATIME, 0),
    ("diratime", 0, ATTR_NODIRATIME),
];

/// `struct mount_attr` of mount_setattr(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

impl Attributes {
    /// Only the change to read-only.
    pub const READ_ONLY: Self = Self {
        set: ATTR_RDONLY,
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };

    /// Only a change of propagation, as `MS_PRIVATE` and the like.
    pub fn propagation(flag: libc::c_ulong) -> Self {
        Self {
            propagation: flag,
            ..Self::default()
        }
    }

    fn add(&mut self, set: u64, clear: u64) {
        self.set = self.set & !clear | set;
        self.clear = self.clear & !set | clear;
        // An atime mode is always named whole: its field is cleared before it is set.
        self.clear |= clear & ATTR_ATIME;
    }

    /// Applies the change to a mount, or with `recursive` also to all mounts below it.
    pub fn apply(&self, mount: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
        if *self == Self::default() {
            return Ok(());
        }
        let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
        // SAFETY: an open descriptor with an empty path, and a whole `struct mount_attr`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                mount.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH | recursive,
                &raw const *self,
                size_of::<Self>(),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// A mount's options, sorted by who takes them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// A bind mount; with `Some(true)` of everything below the source as well.
    pub bind: Option<bool>,
    /// For the mount itself.
    pub attributes: Attributes,
    /// For the mount and all below it (`rro` and the like).
    pub recursive: Attributes,
    /// Propagation, one after the other, and whether it is recursive.
    pub propagation: Vec<(Attributes, bool)>,
    /// For the file system: flags, or keys with values.
    pub data: Vec<(String, Option<String>)>,
}

impl MountOptions {
    /// Sorts the options of a spec's mount.
    ///
    /// # Errors
    ///
    /// Why an option cannot be applied.
    pub fn parse(options: &[String]) -> Result<Self, String> {
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option)?;
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &str) -> Result<(), String> {
        let attribute = |name: &str| {
            let found = ATTRIBUTES.iter().find(|(known, ..)| *known == name);
            found.map(|(_, set, clear)| (*set, *clear))
        };
        if let Some((set, clear)) = attribute(option) {
            self.attributes.add(set, clear);
            return Ok(());
        }
        if let Some(propagation) = propagation(option) {
            self.propagation.push(propagation);
            return Ok(());
        }
        if let Some((set, clear)) = option.strip_prefix('r').and_then(attribute) {
            self.recursive.add(set, clear);
            return Ok(());
        }
        match option {
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "nosymfollow" => self.attributes.add(ATTR_NOSYMFOLLOW, 0),
            "symfollow" => self.attributes.add(0, ATTR_NOSYMFOLLOW),
            "defaults" | "async" | "loud" | "silent" | "nomand" | "" => {}
            "idmap" | "ridmap" | "tmpcopyup" | "remount" | "mand" | "iversion" => {
                return Err(format!("{option:?} is not applied"));
            }
            _ => self.data.push(match option.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (option.to_owned(), None),
            }),
        }
        Ok(())
    }
}

/// `private`, `rslave` and the like.
pub fn propagation(option: &str) -> Option<(Attributes, bool)> {
    let flag = |name: &str| match name {
        "private" => Some(libc::MS_PRIVATE),
        "slave" => Some(libc::MS_SLAVE),
        "shared" => Some(libc::MS_SHARED),
        "unbindable" => Some(libc::MS_UNBINDABLE),
        _ => None,
    };
    let plain = flag(option).map(|flag| (flag, false));
    let recursive = || {
        option
            .strip_prefix('r')
            .and_then(flag)
            .map(|flag| (flag, true))
    };
    let found = plain.or_else(recursive);
    found.map(|(flag, recursive)| (Attributes::propagation(flag), recursive))
}

/// Whether a mount takes its files from somewhere else instead of making a file system.
pub fn is_bind(mount: &Mount) -> bool {
    let options = mount.options().as_deref().unwrap_or_default();
    mount.typ().as_deref() == Some("bind")
        || options
            .iter()
            .any(|option| option == "bind" || option == "rbind")
}

/// Makes one mount of the spec inside the root. `source` is where the guest sees the source of a
/// bind mount.
pub fn make(root: &Root, mount: &Mount, source: Option<&Path>) -> Result<(), StageError> {
    let destination = mount.destination();
    let failed = |what: &str| StageError::system(format!("{what} {}", destination.display()));
    let mut options = MountOptions::parse(mount.options().as_deref().unwrap_or_default())
        .map_err(StageError::Invalid)?;
    let (tree, target) = if is_bind(mount) {
        let source = source.ok_or_else(|| {
            StageError::Invalid(format!("no source to bind at {}", destination.display()))
        })?;
        let tree = clone_path(source, options.bind.unwrap_or(false))
            .map_err(StageError::system(format!("clone {}", source.display())))?;
        let target = if is_directory(&tree).map_err(failed("look at the source for"))? {
            root.make_directory(destination)
        } else {
            root.make_file(destination)
        };
        (tree, target)
    } else {
        let kind = mount.typ().as_deref().unwrap_or_default();
        if kind == "tmpfs" {
            keep_mode(root, destination, &mut options)
                .map_err(failed("look at the mount point"))?;
        }
        let tree = new_file_system(kind, mount.source().as_deref(), &options).map_err(
            StageError::system(format!(
                "make a {kind} file system for {}",
                destination.display()
            )),
        )?;
        (tree, root.make_directory(destination))
    };
    let target = target.map_err(failed("make the mount point"))?;
    spare_proc(root, &target, &tree, destination)?;
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
        Ok(covered) => rustix::fs::fstat(&covered)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !options.data.iter().any(|(key, _)| key == "mode") {
        let mode = format!("{:o}", covered.st_mode & 0o7777);
        options.data.push(("mode".to_owned(), Some(mode)));
    }
    Ok(())
}

/// Refuses what would hide a part of /proc, on which processes and masks rely: nothing but procfs
/// may be its root, and only some files that describe the machine may be covered.
fn spare_proc(
    root: &Root,
    target: &OwnedFd,
    tree: &OwnedFd,
    destination: &Path,
) -> Result<(), StageError> {
    let path = |handle: BorrowedFd<'_>| {
        std::fs::read_link(format!("/proc/self/fd/{}", handle.as_raw_fd())).map_err(
            StageError::system(format!("find where {} leads", destination.display())),
        )
    };
    let (root, target) = (path(root.as_fd())?, path(target.as_fd())?);
    let Some(inside) = target
        .strip_prefix(&root)
        .ok()
        .and_then(|path| path.strip_prefix("proc").ok())
    else {
        return Ok(());
    };
    let allowed = if inside == Path::new("") {
        let kind = rustix::fs::fstatfs(tree).map_err(StageError::system("look at a mount"))?;
        kind.f_type == rustix::fs::PROC_SUPER_MAGIC
    } else {
        PROC_FILES.iter().any(|file| inside == Path::new(file))
    };
    if allowed {
        return Ok(());
    }
    Err(StageError::Invalid(format!(
        "{} cannot be mounted because it is inside /proc",
        destination.display()
    )))
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
    for (key, value) in &options.data {
        let set = match value {
            Some(value) => fsconfig_set_string(context.as_fd(), key.as_str(), value.as_str()),
            None => fsconfig_set_flag(context.as_fd(), key.as_str()),
        };
        set.map_err(|error| {
            io::Error::new(
                io::Error::from(error).kind(),
                format!("option {key:?}: {error}"),
            )
        })?;
    }
    // As mount(2) with MS_RDONLY does: the file system itself is read-only, not just this mount.
    if options.attributes.set & ATTR_RDONLY != 0 {
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

/// An empty read-only directory, for masking one.
pub fn empty_directory() -> io::Result<OwnedFd> {
    let options = MountOptions {
        attributes: Attributes::READ_ONLY,
        ..MountOptions::default()
    };
    let directory = new_file_system("tmpfs", Some(Path::new("tmpfs")), &options)?;
    options.attributes.apply(directory.as_fd(), false)?;
    Ok(directory)
}

fn is_directory(handle: &OwnedFd) -> io::Result<bool> {
    let mode = rustix::fs::fstat(handle)?.st_mode;
    Ok(rustix::fs::FileType::from_raw_mode(mode).is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<MountOptions, String> {
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        MountOptions::parse(&options)
    }

    #[test]
    fn options_go_where_they_belong() {
        let parsed = parse(&[
            "nosuid",
            "strictatime",
            "mode=755",
            "size=65536k",
            "newinstance",
        ]);
        let parsed = parsed.unwrap();
        assert_eq!(parsed.attributes.set, ATTR_NOSUID | ATTR_STRICTATIME);
        assert_eq!(parsed.attributes.clear, ATTR_ATIME);
        assert_eq!(
            parsed.data,
            [
                ("mode".into(), Some("755".into())),
                ("size".into(), Some("65536k".into())),
                ("newinstance".into(), None),
            ]
        );
    }

    #[test]
    fn recursive_forms_are_told_apart() {
        let parsed = parse(&["rbind", "rro", "rprivate", "relatime"]).unwrap();
        assert_eq!(parsed.bind, Some(true));
        assert_eq!(parsed.recursive, Attributes::READ_ONLY);
        assert_eq!(
            parsed.propagation,
            [(Attributes::propagation(libc::MS_PRIVATE), true)]
        );
        assert_eq!(parsed.attributes.clear, ATTR_ATIME);
        assert_eq!(
            parse(&["bind", "ro"]).unwrap().attributes,
            Attributes::READ_ONLY
        );
    }

    #[test]
    fn the_last_of_opposite_options_counts() {
        let parsed = parse(&["ro", "rw", "noatime", "relatime"]).unwrap();
        assert_eq!(parsed.attributes.set, 0);
        assert_eq!(parsed.attributes.clear, ATTR_RDONLY | ATTR_ATIME);
    }

    #[test]
    fn what_is_not_applied_is_refused() {
        for option in ["idmap", "tmpcopyup", "remount"] {
            assert!(parse(&[option]).is_err(), "{option}");
        }
    }
}
