//! What a cgroup tells by itself: the files that the kernel announces changes of
//! (Documentation/admin-guide/cgroup-v2.rst, "cgroup.events", "memory.events").

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
};

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
    /// changes as priority events of whoever has read it.
    async fn until(
        &self,
        file: &'static str,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String, CgroupError> {
        // Not with inotify(7): the end of a watch lasts two ticks and a grace period of the kernel's.
        let path = self.path.join(file);
        let opened = File::open(&path).map_err(file_error("open", &path))?;
        let file = crate::transport::watch(opened.into(), Interest::PRIORITY)
            .map_err(file_error("watch", &path))?;
        loop {
            let text = read(&file).map_err(file_error("read", &path))?;
            if wanted(&text) {
                return Ok(text);
            }
            let changed = file.ready(Interest::PRIORITY).await;
            changed.map_err(file_error("watch", &path))?.clear_ready();
        }
    }
}

/// All of a file, whose content is shorter than a page, by the descriptor that is waited on.
fn read(file: &AsyncFd<OwnedFd>) -> io::Result<String> {
    let mut content = [0; 4096];
    let length = rustix::io::pread(file, &mut content, 0)?;
    Ok(String::from_utf8_lossy(&content[..length]).into_owned())
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
