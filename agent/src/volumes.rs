//! Shares of the host that several containers may have mounted.
//!
//! The guest's kernel mounts the directory of a share where its name is looked up, and makes another
//! file system of it in each mount namespace. So the agent looks first: containers inherit what is
//! mounted in its own namespace, and have the same file system.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    mount::{UnmountFlags, unmount},
};
use tokio::{task::spawn_blocking, time::timeout};

use crate::error::ServiceError;

/// For the host to answer.
const DEADLINE: Duration = Duration::from_secs(30);

/// Mounts the shares at these paths, which may be files as well.
pub async fn hold(paths: Vec<PathBuf>) -> Result<(), ServiceError> {
    let held = spawn_blocking(move || paths.iter().try_for_each(|path| mount(path)));
    finished(held, "mount a share of the host").await
}

/// Unmounts a share that no container has any more. The host takes it away after that.
pub async fn release(path: PathBuf) -> Result<(), ServiceError> {
    let released = spawn_blocking(move || match unmount(&path, UnmountFlags::DETACH) {
        // A file, or one that is not there any more.
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        released => Ok(released?),
    });
    finished(released, "unmount a share of the host").await
}

async fn finished(
    work: tokio::task::JoinHandle<io::Result<()>>,
    what: &'static str,
) -> Result<(), ServiceError> {
    match timeout(DEADLINE, work).await {
        Err(_) => Err(ServiceError::Deadline("the host's answer about a share")),
        Ok(Err(gone)) => Err(ServiceError::system(what)(io::Error::other(gone))),
        Ok(Ok(done)) => done.map_err(ServiceError::system(what)),
    }
}

fn mount(path: &Path) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match openat(CWD, path, flags, Mode::empty()) {
        Err(Errno::NOTDIR) => Ok(()),
        opened => Ok(opened.map(drop)?),
    }
}
