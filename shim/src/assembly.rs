//! Assembles a container's root file system out of the mounts that containerd asks for, and shows
//! its files by the ids of the pod.
//!
//! overlayfs cannot be idmapped, but its layers can (Linux 5.19): each is attached, idmapped, where
//! only a thread with a mount namespace of its own can see it, and the overlay is mounted on these.
//! What comes out is detached, and the rest goes with the thread.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use bulkhead_vmm_control::{IdRange, UserNamespace};
use containerd_shim_protos::api::Mount;
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::{Gid, Uid, setfsgid, setfsuid},
};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, move_mount},
    thread::{capabilities, set_capabilities},
};
use tokio::sync::oneshot;

use crate::{
    deadline::timeout,
    mapped_ids,
    mounts::{Options, mount_on},
    rootfs::RootfsError,
    spec::IdMappings,
    tree,
};

/// How long it may take, with whatever file systems the layers are on.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The ids of the host, for what is not shown to a pod.
const ALL_IDS: IdRange = IdRange {
    first: 0,
    count: u32::MAX,
};

/// Where the root is put together, in the scratch directory.
const ROOT: &str = "root";

/// Assembles `mounts`, the first of which is the root itself. `scratch` is an existing directory
/// that the thread may hide from itself. With a namespace, the files are shown by its ids.
pub async fn assemble(
    mounts: Vec<Mount>,
    namespace: Option<Arc<UserNamespace>>,
    scratch: PathBuf,
) -> Result<OwnedFd, RootfsError> {
    let (sender, result) = oneshot::channel();
    let work = move || {
        let assembly = Assembly {
            namespace: namespace.as_deref(),
            places: 0,
        };
        // The one who asked may have stopped waiting.
        let _ = sender.send(assembly.run(&mounts, &scratch));
    };
    // A thread that ends: its mounts are nobody else's.
    thread::Builder::new()
        .name("rootfs".to_owned())
        .spawn(work)
        .map_err(RootfsError::Thread)?;
    let ended = |_| RootfsError::Thread(io::Error::other("it ended without an answer"));
    let in_time = timeout(DEADLINE, result).await;
    in_time.map_err(|_| RootfsError::Deadline)?.map_err(ended)?
}

struct Assembly<'a> {
    namespace: Option<&'a UserNamespace>,
    /// Directories in use.
    places: usize,
}

impl Assembly<'_> {
    fn run(mut self, mounts: &[Mount], scratch: &Path) -> Result<OwnedFd, RootfsError> {
        enter(scratch).map_err(RootfsError::Namespace)?;
        fs::create_dir(ROOT).map_err(RootfsError::Scratch)?;
        for mount in mounts {
            let tree = self.build(mount)?;
            let inside;
            let target = if mount.target.is_empty() {
                PathBuf::from(ROOT)
            } else {
                inside = within_root(&mount.target)?;
                PathBuf::from(format!("/proc/self/fd/{}", inside.as_raw_fd()))
            };
            attach(&tree, &target)?;
        }
        Ok(tree::clone(Path::new(ROOT), true)?)
    }

    /// One mount, detached.
    fn build(&mut self, mount: &Mount) -> Result<OwnedFd, RootfsError> {
        let options = Options::parse(&mount.type_, &mount.options)?;
        let mapped = self.mapped(&options.ids)?;
        let shown_by = mapped.as_ref().map(AsFd::as_fd);
        let shown_by = shown_by.or(self.namespace.map(AsFd::as_fd));
        if options.flags.contains(MsFlags::MS_BIND) {
            let path = Path::new(&mount.source);
            let tree = tree::clone(path, options.flags.contains(MsFlags::MS_REC))?;
            tree::confine(tree.as_fd(), path, shown_by, options.flags)?;
            return Ok(tree);
        }
        let place = self.place()?;
        if mount.type_ == "overlay" {
            let data = self.layers(&options.data, shown_by)?;
            let options = Options { data, ..options };
            self.as_owner(|| mount_on("overlay", &mount.source, &options, &place))??;
            return Ok(tree::clone(&place, false)?);
        }
        mount_on(&mount.type_, &mount.source, &options, &place)?;
        let tree = tree::clone(&place, false)?;
        let source = Path::new(&mount.source);
        tree::confine(tree.as_fd(), source, shown_by, options.flags)?;
        Ok(tree)
    }

    /// The user namespace for a mount of containerd's with mapped ids, if it is one.
    fn mapped(&self, ids: &IdMappings) -> Result<Option<OwnedFd>, RootfsError> {
        if ids.is_empty() {
            return Ok(None);
        }
        let range = self.namespace.map_or(ALL_IDS, UserNamespace::range);
        let mapped = mapped_ids::namespace(range, ids).map_err(RootfsError::Ids)?;
        Ok(Some(mapped))
    }

    /// overlay's options with the layers named by where they are attached here, which also makes
    /// them short: the kernel takes no more than a page. The lower layers' files are shown by the ids
    /// of a namespace; whoever writes to the upper one has these ids already.
    fn layers(
        &mut self,
        options: &[String],
        lower_ids: Option<BorrowedFd<'_>>,
    ) -> Result<Vec<String>, RootfsError> {
        let value = |key| options.iter().find_map(|option| option.strip_prefix(key));
        // Both must be reached through the same mount.
        let writable = match (value("upperdir="), value("workdir=")) {
            (Some(upper), Some(work)) => {
                let (upper, work) = (unescape(upper), unescape(work));
                let shared = shared_directory(&upper, &work);
                let place = self.layer(&shared, self.namespace.map(AsFd::as_fd))?;
                let named = |path: &Path| {
                    let relative = path.strip_prefix(&shared).unwrap_or(path);
                    escape(&place.join(relative))
                };
                Some((named(&upper), named(&work)))
            }
            _ => None,
        };
        let mut named = Vec::new();
        for option in options {
            named.push(if let Some(lower) = option.strip_prefix("lowerdir=") {
                let layers: Result<Vec<_>, RootfsError> = split_layers(lower)
                    .map(|layer| self.lower(layer, lower_ids))
                    .collect();
                format!("lowerdir={}", layers?.join(":"))
            } else {
                match (&writable, option) {
                    (Some((upper, _)), option) if option.starts_with("upperdir=") => {
                        format!("upperdir={upper}")
                    }
                    (Some((_, work)), option) if option.starts_with("workdir=") => {
                        format!("workdir={work}")
                    }
                    (_, option) => option.clone(),
                }
            });
        }
        Ok(named)
    }

    /// A lower layer's name; an empty one separates layers of another kind.
    fn lower(&mut self, escaped: &str, ids: Option<BorrowedFd<'_>>) -> Result<String, RootfsError> {
        if escaped.is_empty() {
            return Ok(String::new());
        }
        Ok(escape(&self.layer(&unescape(escaped), ids)?))
    }

    /// Attaches a directory of the host, shown by the ids of a namespace.
    fn layer(&mut self, path: &Path, ids: Option<BorrowedFd<'_>>) -> Result<PathBuf, RootfsError> {
        let tree = tree::clone(path, false)?;
        tree::confine(tree.as_fd(), path, ids, MsFlags::empty())?;
        let place = self.place()?;
        attach(&tree, &place)?;
        Ok(place)
    }

    fn place(&mut self) -> Result<PathBuf, RootfsError> {
        let name = PathBuf::from(self.places.to_string());
        self.places += 1;
        fs::create_dir(&name).map_err(RootfsError::Scratch)?;
        Ok(name)
    }

    /// overlayfs makes files of its own in the name of who mounts it: the pod's root, who is 0 on
    /// the disk. The capabilities stay the shim's.
    fn as_owner<T>(&self, work: impl FnOnce() -> T) -> Result<T, RootfsError> {
        let Some(namespace) = self.namespace else {
            return Ok(work());
        };
        let failed = |errno: rustix::io::Errno| RootfsError::Namespace(errno_of(errno));
        let before = capabilities(None).map_err(failed)?;
        let owner = namespace.range().first;
        let (gid, uid) = (Gid::from_raw(owner), Uid::from_raw(owner));
        setfsgid(gid);
        setfsuid(uid);
        // They do not say whether they worked; -1 changes nothing, and only asks.
        if setfsgid(Gid::from_raw(u32::MAX)) != gid || setfsuid(Uid::from_raw(u32::MAX)) != uid {
            return Err(RootfsError::Namespace(Errno::EPERM));
        }
        set_capabilities(None, before).map_err(failed)?;
        Ok(work())
    }
}

fn errno_of(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error())
}

/// Gives this thread mounts of its own, and an empty directory to work in.
pub(crate) fn enter(scratch: &Path) -> nix::Result<()> {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    let name = Some("bulkhead");
    // As long as the layers have not been attached, all that is in it are directories for them.
    mount(
        name,
        scratch,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=700"),
    )?;
    nix::unistd::chdir(scratch)
}

fn attach(tree: &OwnedFd, target: &Path) -> Result<(), RootfsError> {
    // The target may be a magic link.
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    move_mount(tree, "", CWD, target, flags).map_err(|errno| RootfsError::Attach {
        target: target.to_owned(),
        source: errno_of(errno),
    })
}

/// A directory within the root, whatever links the image has there.
fn within_root(target: &str) -> Result<OwnedFd, RootfsError> {
    let relative = target.trim_start_matches('/');
    let failed = |source| RootfsError::Target {
        target: target.to_owned(),
        source,
    };
    let root = fs::File::open(ROOT).map_err(RootfsError::Scratch)?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(&root, relative, how).map_err(failed)
}

/// The layers of `lowerdir`, still escaped.
pub(crate) fn split_layers(lower: &str) -> impl Iterator<Item = &str> {
    let mut escaped = false;
    lower.split(move |c| {
        let separates = c == ':' && !escaped;
        escaped = c == '\\' && !escaped;
        separates
    })
}

/// Takes away the backslashes that keep overlayfs from splitting a path.
pub(crate) fn unescape(path: &str) -> PathBuf {
    let mut plain = String::with_capacity(path.len());
    let mut rest = path.chars();
    while let Some(c) = rest.next() {
        plain.push(if c == '\\' {
            rest.next().unwrap_or(c)
        } else {
            c
        });
    }
    plain.into()
}

pub(crate) fn escape(path: &Path) -> String {
    let mut escaped = String::new();
    for c in path.to_string_lossy().chars() {
        if matches!(c, '\\' | ':' | ',') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// The nearest directory that both are in.
fn shared_directory(a: &Path, b: &Path) -> PathBuf {
    a.ancestors()
        .skip(1)
        .find(|ancestor| b != *ancestor && b.starts_with(ancestor))
        .unwrap_or(Path::new("/"))
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_split_where_overlayfs_splits_them() {
        let layers: Vec<_> = split_layers(r"/a\:b:/c::/d\\:/e").collect();
        assert_eq!(layers, [r"/a\:b", "/c", "", r"/d\\", "/e"]);
        assert_eq!(unescape(layers[0]), Path::new("/a:b"));
        assert_eq!(unescape(layers[3]), Path::new(r"/d\"));
        assert_eq!(escape(Path::new(r"/a:b,c\d")), r"/a\:b\,c\\d");
    }

    #[test]
    fn upper_and_work_are_reached_through_one_directory() {
        let shared = |a, b| shared_directory(Path::new(a), Path::new(b));
        assert_eq!(shared("/s/9/fs", "/s/9/work"), Path::new("/s/9"));
        assert_eq!(shared("/s/9/fs", "/s/8/work"), Path::new("/s"));
        assert_eq!(shared("/s/9", "/s/9/work"), Path::new("/s"));
        assert_eq!(shared("/s/9/fs", "/s/9"), Path::new("/s"));
        assert_eq!(shared("/a", "/b"), Path::new("/"));
    }
}
