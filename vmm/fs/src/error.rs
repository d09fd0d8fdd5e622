//! What can go wrong when a share is added or removed.

use rustix::io::Errno;
use thiserror::Error;

/// Failures of the file server's own interface. What goes wrong inside a request is the guest's to
/// know, as an errno in the reply, and never appears here.
#[derive(Debug, Error)]
pub enum FsError {
    /// A share's name cannot be a directory entry.
    #[error("Cannot share {0:?}: a name is 1 to 255 bytes without '/', and neither '.' nor '..'")]
    Name(String),
    /// A share of that name is there already.
    #[error("Cannot share {0:?}: the name is taken")]
    Taken(String),
    /// No share has that name.
    #[error("Cannot unshare {0:?}: no such share")]
    Unknown(String),
    /// The root of a share could not be examined.
    #[error("Cannot examine the root of share {name:?}")]
    Root {
        /// The share.
        name: String,
        /// What statx(2) said.
        #[source]
        source: Errno,
    },
    /// The limit of open files could not be raised.
    #[error("Cannot raise the limit of open files")]
    Limit(#[source] Errno),
    /// The thread could not get its own working directory and umask.
    #[error("Cannot prepare a thread to serve files")]
    Thread(#[source] Errno),
}
