//! Volumes that the host replaces as a whole: the guest has a copy of them, which follows.
//!
//! The kubelet makes config maps, secrets and the like so (pkg/volume/util/atomic_writer.go), and
//! programs wait with inotify(7) for their replacement.

use std::{fs, io, path::Path};

use rustix::{
    fs::inotify::{self, CreateFlags, WatchFlags},
    io::{Errno, read},
};
use tokio::{io::unix::AsyncFd, task::JoinHandle};

use crate::{agent_client::AgentClient, spec::Mount, text};

/// The link to the present content.
const DATA: &str = "..data";

/// The largest content that the guest is to copy, in bytes: the kubelet's are at most a few MiB.
const MOST_BYTES: u64 = 16 << 20;

/// And in files and directories.
const MOST_FILES: u64 = 4096;

/// Whether a mount shows such a volume, which the container does not change and which is small.
pub fn suits(mount: &Mount) -> bool {
    let data = mount.source.join(DATA);
    let is_link = fs::symlink_metadata(&data).is_ok_and(|metadata| metadata.is_symlink());
    let (mut bytes, mut files) = (0, 0);
    mount.is_read_only() && is_link && is_small(&data, &mut bytes, &mut files).unwrap_or(false)
}

/// Adds up what is in a directory, as long as it is not too much.
fn is_small(directory: &Path, bytes: &mut u64, files: &mut u64) -> io::Result<bool> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        *bytes = bytes.saturating_add(metadata.len());
        *files += 1;
        if *bytes > MOST_BYTES || *files > MOST_FILES {
            return Ok(false);
        }
        if metadata.is_dir() && !is_small(&entry.path(), bytes, files)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Tells the guest of changes, until it is dropped.
#[derive(Debug)]
pub struct Watch(JoinHandle<()>);

impl Watch {
    /// Watches a volume that the guest knows as the share of this name.
    pub fn start(volume: &Path, share: &str, agent: AgentClient) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let changes = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_TO;
        inotify::add_watch(&inotify, volume, changes | WatchFlags::ONLYDIR)?;
        // SAFETY: the descriptor stays the same, and open, as long as this owns it.
        let events = unsafe { AsyncFd::register(inotify) }?;
        let share = share.to_owned();
        Ok(Self(tokio::spawn(async move {
            // What has changed is for the guest to find out.
            let mut ignored = [0; 4096];
            while let Ok(mut ready) = events.readable().await {
                match read(events.get_ref(), &mut ignored) {
                    Ok(_) => {
                        if let Err(error) = agent.refresh_mirror(&share).await {
                            let error = text::chain(&error);
                            tracing::warn!(share, error, "The guest does not follow a volume");
                        }
                    }
                    Err(Errno::AGAIN) => ready.clear_ready(),
                    Err(errno) => {
                        tracing::warn!(share, %errno, "Cannot watch a volume any more");
                        return;
                    }
                }
            }
        })))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}
