//! Paths inside a container's root that cannot lead out of it, whatever the image holds.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, readlinkat},
    io::Errno,
};

/// Symbolic links that are followed on the way to something that does not exist yet.
const LINKS_MAX: u32 = 40;

/// Attempts when something is renamed or mounted meanwhile.
const RACES_MAX: u32 = 128;

/// The root directory of a container, before or after it is this process's root.
#[derive(Debug)]
pub struct Root(OwnedFd);

impl Root {
    /// Takes a descriptor of the root directory.
    pub fn new(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// This process's root directory.
    pub fn own() -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open("/", flags, Mode::empty())?))
    }

    /// Opens what `path` leads to, with every symbolic link taken as in the container.
    pub fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC;
        let path = if path == Path::new("") {
            Path::new(".")
        } else {
            path
        };
        for _ in 0..RACES_MAX {
            match openat2(&self.0, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// A handle to what `path` leads to.
    pub fn handle(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open(path, OFlags::PATH)
    }

    /// A handle to the directory at `path`, made with all its parents if it is missing.
    pub fn make_directory(&self, path: &Path) -> io::Result<OwnedFd> {
        self.make_directory_through(path, LINKS_MAX)
    }

    fn make_directory_through(&self, path: &Path, links: u32) -> io::Result<OwnedFd> {
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => return result,
        }
        let Some((parent_path, name)) = split(path) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let parent = self.make_directory_through(&parent_path, links)?;
        match mkdirat(&parent, &name, Mode::from_raw_mode(0o755)) {
            Ok(()) => self.open(path, OFlags::PATH | OFlags::DIRECTORY),
            Err(Errno::EXIST) => {
                // A link to nowhere yet, or somebody else was faster.
                let target = match readlinkat(&parent, &name, Vec::new()) {
                    Ok(target) => target,
                    Err(Errno::INVAL) => {
                        return self.open(path, OFlags::PATH | OFlags::DIRECTORY);
                    }
                    Err(error) => return Err(error.into()),
                };
                let links = links.checked_sub(1).ok_or(Errno::LOOP)?;
                let target = PathBuf::from(std::ffi::OsString::from(
                    String::from_utf8(target.into_bytes()).map_err(io::Error::other)?,
                ));
                self.make_directory_through(&parent_path.join(target), links)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// A handle to whatever is at `path`; an empty file if there is nothing.
    pub fn make_file(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.handle(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => return result,
        }
        let (parent, name) = self.parent(path)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&parent, &name, flags, Mode::from_raw_mode(0o644))?;
        self.handle(path)
    }

    /// The directory in which the last component of `path` lies, made if it is missing, and that
    /// component.
    pub fn parent(&self, path: &Path) -> io::Result<(OwnedFd, PathBuf)> {
        let Some((parent, name)) = split(path) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        Ok((self.make_directory(&parent)?, name))
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Parent and last component. A trailing `..` or `.` has neither.
fn split(path: &Path) -> Option<(PathBuf, PathBuf)> {
    match path.components().next_back()? {
        Component::Normal(name) => Some((path.parent()?.to_owned(), PathBuf::from(name))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let outer = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(outer.path().join("root/etc")).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd = rustix::fs::open(outer.path().join("root"), flags, Mode::empty()).unwrap();
        (outer, Root::new(fd))
    }

    #[test]
    fn links_and_dots_stay_inside() {
        let (outer, root) = root();
        symlink("/", outer.path().join("root/abs")).unwrap();
        symlink("../../..", outer.path().join("root/etc/up")).unwrap();
        root.make_directory(Path::new("/abs/../../made/a")).unwrap();
        root.make_directory(Path::new("/etc/up/made/b")).unwrap();
        root.make_file(Path::new("/abs/made/c")).unwrap();
        for made in ["a", "b", "c"] {
            assert!(outer.path().join("root/made").join(made).exists(), "{made}");
        }
    }

    #[test]
    fn a_link_to_nowhere_is_made_somewhere() {
        let (outer, root) = root();
        std::fs::create_dir(outer.path().join("root/var")).unwrap();
        symlink("/run", outer.path().join("root/var/run")).unwrap();
        root.make_directory(Path::new("/var/run/lock")).unwrap();
        assert!(outer.path().join("root/run/lock").is_dir());
    }

    #[test]
    fn endless_links_end() {
        let (outer, root) = root();
        symlink("b", outer.path().join("root/a")).unwrap();
        symlink("a", outer.path().join("root/b")).unwrap();
        assert!(root.make_directory(Path::new("/a/x")).is_err());
        symlink("c/x", outer.path().join("root/c")).unwrap();
        assert!(root.make_directory(Path::new("/c")).is_err());
    }

    #[test]
    fn a_file_is_not_taken_for_a_directory() {
        let (_outer, root) = root();
        root.make_file(Path::new("/file")).unwrap();
        assert!(root.make_directory(Path::new("/file/x")).is_err());
        assert!(
            root.make_file(Path::new("/etc")).is_ok(),
            "whatever is there"
        );
    }
}
