//! A pod's directory below `/run/bulkhead`.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Name of the console's log in a pod's directory.
const CONSOLE: &str = "console.log";

/// A state directory that cannot be made.
#[derive(Debug, Error)]
#[error("Cannot create {path}")]
pub struct StateError {
    /// What could not be made.
    pub path: PathBuf,
    /// The system's error.
    #[source]
    pub source: io::Error,
}

/// The path of a pod's directory. It is one name, for a directory that the pods of a namespace share
/// would have to be removed by its last one while the next is about to use it. containerd's names
/// have no colon.
pub fn path(base: &Path, namespace: &str, group: &str) -> PathBuf {
    base.join(format!("{namespace}:{group}"))
}

/// A pod's directory, removed with its owner.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
}

impl StateDirectory {
    /// Makes the directory, mode 0700, empty.
    pub fn create(base: &Path, namespace: &str, group: &str) -> Result<Self, StateError> {
        let path = path(base, namespace, group);
        remove(&path);
        match DirBuilder::new().recursive(true).mode(0o700).create(&path) {
            Ok(()) => Ok(Self { path }),
            Err(source) => Err(StateError { path, source }),
        }
    }

    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the file for the guest's console.
    pub fn console(&self) -> Result<File, StateError> {
        let path = self.path.join(CONSOLE);
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| StateError { path, source })
    }
}

impl Drop for StateDirectory {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes a pod's directory, if it is there.
pub fn remove(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path)
        && error.kind() != ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "Cannot remove the state directory");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_directory_lives_with_its_owner() {
        let base = tempfile::tempdir().unwrap();
        let state = StateDirectory::create(base.path(), "ns", "pod").unwrap();
        let path = base.path().join("ns:pod");
        assert_eq!(state.path(), path);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        state.console().unwrap();
        assert!(path.join("console.log").exists());
        drop(state);
        assert!(!path.exists());
        remove(&path);
    }
}
