//! Copies of volumes that the host replaces as a whole, as the kubelet does with config maps.
//!
//! Such a volume has a link `..data` to the directory of its present content, and links to what is in
//! there by way of `..data`. The guest's kernel does not learn what the host changes, so nobody who
//! waits for that with inotify(7) would hear of it. In a copy the agent makes the same changes in the
//! same order.

use std::{
    collections::HashMap,
    ffi::CString,
    fs::{self, Metadata},
    io,
    os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::{task::spawn_blocking, time::timeout};

use crate::error::ServiceError;

/// The link to the present content.
const DATA: &str = "..data";

/// What becomes it.
const NEXT: &str = "..data_tmp";

/// Two contents of the largest volume that the host has copied, and the start of a third.
const SIZE: &str = "size=48m,mode=755";

/// How often a copy begins anew because the content was replaced meanwhile.
const TRIES: u32 = 5;

/// How long a copy may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// The mirrors of the pod, by the names of their shares.
#[derive(Debug)]
pub struct Mirrors {
    dir: PathBuf,
    known: Mutex<HashMap<String, Arc<Mirror>>>,
}

#[derive(Debug)]
struct Mirror {
    from: PathBuf,
    to: PathBuf,
    /// Held while it is changed.
    mounted: Mutex<bool>,
}

impl Mirrors {
    /// None so far. `dir` is made with the first.
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            known: Mutex::default(),
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Mirror>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the mirror of a share is, which is at `from`. It is made unless it is there.
    pub async fn provide(&self, share: &str, from: PathBuf) -> Result<PathBuf, ServiceError> {
        let to = self.dir.join(share);
        let new = Mirror {
            from,
            to: to.clone(),
            mounted: Mutex::new(false),
        };
        let mirror = {
            let mut known = self.known();
            Arc::clone(known.entry(share.to_owned()).or_insert(Arc::new(new)))
        };
        within_deadline(move || mirror.follow(true)).await?;
        Ok(to)
    }

    /// Makes the changes that the host has made. A share without a mirror has none to follow them.
    pub async fn refresh(&self, share: &str) -> Result<(), ServiceError> {
        let mirror = self.known().get(share).cloned();
        match mirror {
            Some(mirror) => within_deadline(move || mirror.follow(false)).await,
            None => Ok(()),
        }
    }

    /// Takes the mirror of a share away, which no container uses any more.
    pub async fn remove(&self, share: &str) -> Result<(), ServiceError> {
        let mirror = self.known().remove(share);
        match mirror {
            Some(mirror) => within_deadline(move || mirror.unmount()).await,
            None => Ok(()),
        }
    }
}

async fn within_deadline(
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<(), ServiceError> {
    match timeout(DEADLINE, spawn_blocking(work)).await {
        Err(_) => Err(ServiceError::Deadline("the copy of a volume")),
        Ok(Err(gone)) => Err(ServiceError::system("copy a volume")(io::Error::other(
            gone,
        ))),
        Ok(Ok(done)) => done.map_err(ServiceError::system("copy a volume")),
    }
}

impl Mirror {
    /// Becomes what the volume is now.
    fn follow(&self, make: bool) -> io::Result<()> {
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        if !*mounted && make {
            fs::create_dir_all(&self.to)?;
            let size = CString::new(SIZE)?;
            let flags = MountFlags::NOSUID | MountFlags::NODEV;
            mount("mirror", &self.to, "tmpfs", flags, size.as_c_str())?;
            *mounted = true;
            own(&self.to, &fs::metadata(&self.from)?)?;
        }
        if !*mounted {
            return Ok(());
        }
        let mut tries = 1;
        loop {
            match self.copy() {
                // What was being copied has been replaced.
                Err(error) if error.kind() == io::ErrorKind::NotFound && tries < TRIES => {
                    tries += 1;
                }
                done => return done,
            }
        }
    }

    /// In the kubelet's order (pkg/volume/util/atomic_writer.go): new content, the link to it, links
    /// into it, and then away with what is old.
    fn copy(&self) -> io::Result<()> {
        let now = fs::read_link(self.from.join(DATA))?;
        let before = fs::read_link(self.to.join(DATA)).ok();
        if before.as_ref() != Some(&now) {
            // Of an attempt that came to nothing.
            remove(&self.to.join(&now))?;
            remove(&self.to.join(NEXT))?;
            copy_tree(&self.from.join(&now), &self.to.join(&now))?;
            symlink(&now, self.to.join(NEXT))?;
            fs::rename(self.to.join(NEXT), self.to.join(DATA))?;
        }
        let (wanted, there) = (links(&self.from)?, links(&self.to)?);
        for (name, target) in &wanted {
            if there.get(name) != Some(target) {
                remove(&self.to.join(name))?;
                symlink(target, self.to.join(name))?;
            }
        }
        for name in there.keys().filter(|name| !wanted.contains_key(*name)) {
            remove(&self.to.join(name))?;
        }
        match before {
            Some(before) if before != now => remove(&self.to.join(before)),
            _ => Ok(()),
        }
    }

    fn unmount(&self) -> io::Result<()> {
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut *mounted) {
            unmount(&self.to, UnmountFlags::DETACH)?;
            fs::remove_dir(&self.to)?;
        }
        Ok(())
    }
}

/// The links that users of a volume see, with their targets.
fn links(volume: &Path) -> io::Result<HashMap<std::ffi::OsString, PathBuf>> {
    let mut found = HashMap::new();
    for entry in fs::read_dir(volume)? {
        let entry = entry?;
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b"..");
        if !hidden && entry.file_type()?.is_symlink() {
            found.insert(entry.file_name(), fs::read_link(entry.path())?);
        }
    }
    Ok(found)
}

fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(from)?;
    if metadata.is_dir() {
        fs::create_dir(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            copy_tree(&entry.path(), &to.join(entry.file_name()))?;
        }
    } else if metadata.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
    } else {
        // With the mode; what is no file is not in such a volume.
        fs::copy(from, to)?;
    }
    own(to, &metadata)
}

/// Gives a file the owner and the mode of another.
fn own(path: &Path, like: &Metadata) -> io::Result<()> {
    lchown(path, Some(like.uid()), Some(like.gid()))?;
    if like.is_symlink() {
        return Ok(());
    }
    fs::set_permissions(path, PermissionsExt::from_mode(like.mode() & 0o7777))
}

/// Removes whatever is there.
fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A volume with these files, in its `number`th content.
    fn write(volume: &Path, number: u32, files: &[&str]) {
        let name = format!("..{number}");
        let content = volume.join(&name);
        fs::create_dir(&content).unwrap();
        for file in files {
            fs::write(content.join(file), format!("{file} {number}")).unwrap();
            fs::set_permissions(content.join(file), PermissionsExt::from_mode(0o640)).unwrap();
        }
        symlink(&name, volume.join(NEXT)).unwrap();
        fs::rename(volume.join(NEXT), volume.join(DATA)).unwrap();
        for (name, _) in links(volume).unwrap() {
            fs::remove_file(volume.join(name)).unwrap();
        }
        for file in files {
            symlink(Path::new(DATA).join(file), volume.join(file)).unwrap();
        }
        remove(&volume.join(format!("..{}", number - 1))).unwrap();
    }

    fn names(path: &Path) -> Vec<String> {
        let entries = fs::read_dir(path).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries
            .map(|entry| name(entry).to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_mirror_becomes_what_the_volume_is() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir(&from).unwrap();
        fs::create_dir(&to).unwrap();
        let mirror = Mirror {
            from: from.clone(),
            to: to.clone(),
            mounted: Mutex::new(true),
        };
        for (number, files) in [(1, ["a", "b"]), (2, ["a", "b"]), (3, ["b", "c"])] {
            write(&from, number, &files);
            // Half of an attempt before.
            fs::create_dir(to.join(format!("..{number}"))).unwrap();
            mirror.follow(false).unwrap();
            mirror.follow(false).unwrap();
            assert_eq!(names(&to), names(&from));
            for file in files {
                let copied = fs::read_to_string(to.join(file)).unwrap();
                assert_eq!(copied, format!("{file} {number}"));
                let mode = fs::metadata(to.join(file)).unwrap().mode();
                assert_eq!(mode & 0o7777, 0o640);
            }
        }
    }
}
