//! What a cgroup tells by itself: the files that the kernel announces changes of
//! (Documentation/admin-guide/cgroup-v2.rst, "cgroup.events", "memory.events").

use std::{fs, io, os::fd::OwnedFd, path::PathBuf};

use rustix::fs::inotify;
use tokio::io::{Interest, unix::AsyncFd};

use super::{Cgroup, CgroupError, file_error};

impl Cgroup {
    /// Waits until no process is left in it.
    pub async fn until_empty(&self) -> Result<(), CgroupError> {
        let empty = |text: &str| key(text, "populated") == Some(0);
        self.until("cgroup.events", empty).await.map(drop)
    }

    /// Stops every process in it, or lets them go on, and waits until they have.
    pub async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let wanted = u64::from(frozen);
        self.set("cgroup.freeze".to_owned(), wanted.to_string())?;
        let reached = |text: &str| key(text, "frozen") == Some(wanted);
        self.until("cgroup.events", reached).await.map(drop)
    }

    /// How many of its processes the kernel has ended for lack of memory.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        let file = self.path.join("memory.events");
        let text = fs::read_to_string(&file).map_err(file_error("read", file))?;
        Ok(key(&text, "oom_kill").unwrap_or(0))
    }

    /// Waits until these are more than `known`, and returns how many.
    pub async fn more_oom_kills(&self, known: u64) -> Result<u64, CgroupError> {
        let more = |text: &str| key(text, "oom_kill") > Some(known);
        let text = self.until("memory.events", more).await?;
        Ok(key(&text, "oom_kill").unwrap_or(0))
    }

    /// Waits until the content of a file is as wanted, and returns it. The kernel announces its
    /// changes as modifications.
    async fn until(
        &self,
        file: &'static str,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String, CgroupError> {
        let file = self.path.join(file);
        let events = watch(&file).map_err(file_error("watch", &file))?;
        loop {
            let text = fs::read_to_string(&file).map_err(file_error("read", &file))?;
            if wanted(&text) {
                return Ok(text);
            }
            let mut ready = events
                .readable()
                .await
                .map_err(file_error("watch", &file))?;
            // What it says does not matter, only that it has come.
            let _ = rustix::io::read(events.get_ref(), &mut [0; 4096]);
            ready.clear_ready();
        }
    }
}

fn watch(file: &PathBuf) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let watcher = inotify::init(flags)?;
    inotify::add_watch(&watcher, file, inotify::WatchFlags::MODIFY)?;
    crate::transport::watch(watcher, Interest::READABLE)
}

/// The value of a key in a flat keyed file.
fn key(text: &str, name: &str) -> Option<u64> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(' '));
    let (_, value) = pairs.find(|(key, _)| *key == name)?;
    value.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_by_their_whole_name() {
        let text = "low 1\noom 2\noom_kill 3\noom_group_kill 4\n";
        assert_eq!(key(text, "oom_kill"), Some(3));
        assert_eq!(key(text, "oom"), Some(2));
        assert_eq!(key(text, "kill"), None);
    }
}
