//! The cache of everything that takes long to build, keyed by the hash of what it is built from.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::error::{Context, Error};
use crate::step::Step;

/// The cache directory, which the guest's kernel is kept in too.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the cache directory, creating it when it is missing.
    pub fn open() -> Result<Self, Error> {
        let root = bulkhead_guest_kernel::cache_dir().ok_or_else(|| Error::Missing {
            what: "a cache directory".into(),
            hint: "set HOME or BULKHEAD_CACHE to an absolute path".into(),
        })?;
        fs::create_dir_all(&root).context(|| format!("create {}", root.display()))?;
        let root = root
            .canonicalize()
            .context(|| format!("resolve {}", root.display()))?;
        Ok(Cache { root })
    }

    /// Where the cache is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory `NAME-HASH` made by `build` from `inputs`; built now unless it exists.
    ///
    /// `build` fills an empty directory that gets its final name only when it succeeds, so an
    /// interrupted build leaves nothing that looks finished. Two processes that want the same
    pub fn entry(
        &self,
        name: &str,
        inputs: &[&[u8]],
        build: impl FnOnce(&Path) -> Result<(), Error>,
    ) -> Result<PathBuf, Error> {
        let entry = self.root.join(format!("{name}-{}", hash(inputs)));
        if entry.exists() {
            return Ok(entry);
        }
        let lock_path = self.root.join(format!("{name}.lock"));
        let lock =
            fs::File::create(&lock_path).context(|| format!("create {}", lock_path.display()))?;
        if flock(lock.as_fd(), FlockOperation::NonBlockingLockExclusive).is_err() {
            // It ends, for each of its steps has a deadline.
            let step = Step::start(format!("Waiting for another build of {name}"));
            flock(lock.as_fd(), FlockOperation::LockExclusive)
                .context(|| format!("lock {}", lock_path.display()))?;
            step.done();
        }
        if entry.exists() {
            return Ok(entry);
        }
        let partial = self.root.join(format!("{name}.partial"));
        remove_tree(&partial)?;
        fs::create_dir(&partial).context(|| format!("create {}", partial.display()))?;
        if let Err(error) = build(&partial) {
            remove_tree(&partial)?;
            return Err(error);
        }
        fs::rename(&partial, &entry).context(|| format!("create {}", entry.display()))?;
        Ok(entry)
    }
}

/// Removes a directory tree; a missing one is no error.
pub(crate) fn remove_tree(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// The first 16 hexadecimal digits of the hash of all inputs, each with its length before it.
fn hash(inputs: &[&[u8]]) -> String {
    let mut hasher = Sha256::new();
    for input in inputs {
        hasher.update((input.len() as u64).to_le_bytes());
        hasher.update(input);
    }
    let digest = hasher.finalize();
    digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(root: &Path) -> Cache {
        Cache {
            root: root.to_path_buf(),
        }
    }

    #[test]
    fn builds_once_for_the_same_inputs() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path());
        let first = cache.entry("a", &[b"x"], |_| Ok(())).unwrap();
        let again = cache
            .entry("a", &[b"x"], |_| panic!("built twice"))
            .unwrap();
        let other = cache.entry("a", &[b"y"], |_| Ok(())).unwrap();
        assert_eq!(first, again);
        assert_ne!(first, other);
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let failed = cache(dir.path()).entry("a", &[], |partial| {
            fs::write(partial.join("half"), "").unwrap();
            Err(Error::NotUp { name: "x".into() })
        });
        assert!(failed.is_err());
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "only the lock file stays: {left:?}");
    }

    #[test]
    fn the_hash_separates_inputs() {
        assert_ne!(hash(&[b"ab", b"c"]), hash(&[b"a", b"bc"]));
    }
}
