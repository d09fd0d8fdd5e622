//! Which host ids a pod has: a range of its own while it lives, out of those set aside for pods.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use bulkhead_vmm_control::IdRange;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
};
use thiserror::Error;

/// Name of the file of claims, in the state directory of all pods.
const FILE: &str = "ids";

// `struct flock` has short fields for constants that are small but ints.
#[allow(clippy::cast_possible_truncation, reason = "it is 1")]
const WRITE_LOCK: libc::c_short = libc::F_WRLCK as libc::c_short;
#[allow(clippy::cast_possible_truncation, reason = "it is 0")]
const START: libc::c_short = libc::SEEK_SET as libc::c_short;

/// No range for a pod.
#[derive(Debug, Error)]
pub enum IdError {
    /// A claim cannot be made.
    #[error("Cannot claim ids by {path}")]
    Claim {
        /// The file of the claim.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Every range is a running pod's.
    #[error(
        "All {0} ranges of user ids are in use by running pods; raise id_count or lower ids_per_pod \
         in the configuration"
    )]
    Exhausted(u32),
}

/// The ids that the administrator has set aside for pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdSpace {
    /// The first host id.
    pub first: u32,
    /// How many there are.
    pub count: u32,
    /// How many of them a pod gets.
    pub per_pod: u32,
}

impl IdSpace {
    /// The first and the last id, if they are 32-bit numbers other than 0 and -1 and hold a pod.
    pub fn is_valid(&self) -> bool {
        let end = self.first.checked_add(self.count);
        self.first > 0 && self.per_pod > 0 && self.count >= self.per_pod && end.is_some()
    }

    fn ranges(&self) -> u32 {
        self.count / self.per_pod
    }
}

/// A range that no other pod has, until this is dropped or its process ends.
#[derive(Debug)]
pub struct IdClaim {
    range: IdRange,
    _locked: File,
}

impl IdClaim {
    /// Claims the lowest free range. `state` is the state directory of all pods.
    ///
    /// The claims are locks on one file, whose bytes stand for the host's ids: the kernel keeps
    /// them apart even if the administrator has changed the space while pods run.
    pub fn lowest(state: &Path, space: &IdSpace) -> Result<Self, IdError> {
        let path = state.join(FILE);
        let failed = |source| IdError::Claim {
            path: path.clone(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state)
            .map_err(failed)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        let count = space.per_pod;
        for index in 0..space.ranges() {
            let first = space.first + index * space.per_pod;
            let range = IdRange { first, count };
            match lock(&file, range) {
                Ok(()) => {
                    return Ok(Self {
                        range,
                        _locked: file,
                    });
                }
                Err(Errno::EAGAIN | Errno::EACCES) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        Err(IdError::Exhausted(space.ranges()))
    }

    /// The ids.
    pub fn range(&self) -> IdRange {
        self.range
    }
}

/// Locks a range for the open file (`F_OFD_SETLK`, fcntl(2)).
fn lock(file: &File, range: IdRange) -> nix::Result<()> {
    let lock = libc::flock {
        l_type: WRITE_LOCK,
        l_whence: START,
        l_start: range.first.into(),
        l_len: range.count.into(),
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: IdSpace = IdSpace {
        first: 1000,
        count: 250,
        per_pod: 100,
    };

    #[test]
    fn no_two_claims_are_for_the_same_ids() {
        let state = tempfile::tempdir().unwrap();
        let claim = || IdClaim::lowest(state.path(), &SPACE);
        let first = claim().unwrap();
        let second = claim().unwrap();
        assert_eq!(first.range().first, 1000);
        assert_eq!(second.range().first, 1100);
        assert!(matches!(claim(), Err(IdError::Exhausted(2))));
        drop(first);
        assert_eq!(claim().unwrap().range().first, 1000);
        drop(second);
        // Other ranges, which one of those that are left reaches into.
        let _kept = claim().unwrap();
        let other = IdSpace {
            first: 950,
            count: 350,
            ..SPACE
        };
        let claim = IdClaim::lowest(state.path(), &other).unwrap();
        assert_eq!(claim.range().first, 1150);
    }

    #[test]
    fn spaces_beyond_the_ids_that_exist_are_told() {
        let valid = |first, count, per_pod| {
            IdSpace {
                first,
                count,
                per_pod,
            }
            .is_valid()
        };
        assert!(valid(1, 100, 100));
        assert!(valid(u32::MAX - 100, 100, 100));
        assert!(!valid(u32::MAX - 99, 100, 100));
        assert!(!valid(0, 100, 100));
        assert!(!valid(1, 99, 100));
        assert!(!valid(1, 99, 0));
    }
}
