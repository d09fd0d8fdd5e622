//! Memory that containers of the pod share as a file system (shm_overview(7)).

use std::{
    collections::HashMap,
    fs, io,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use rustix::mount::{MountFlags, mount};

use crate::error::ServiceError;

/// A tmpfs for each name. They stay until the guest ends, as the pod does.
#[derive(Debug)]
pub struct SharedMemory {
    /// Where they are mounted.
    dir: PathBuf,
    mounted: Mutex<HashMap<String, PathBuf>>,
}

impl SharedMemory {
    /// None so far. `dir` is made with the first.
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            mounted: Mutex::default(),
        }
    }

    /// Where the memory of this name is, which gets the limit of `size` bytes when it is new; 0 is none.
    pub fn provide(&self, name: &str, size: u64) -> Result<PathBuf, ServiceError> {
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = mounted.get(name) {
            return Ok(path.clone());
        }
        let path = self.dir.join(mounted.len().to_string());
        make(&path, size).map_err(ServiceError::system("mount memory that is shared"))?;
        mounted.insert(name.to_owned(), path.clone());
        Ok(path)
    }
}

fn make(path: &PathBuf, size: u64) -> io::Result<()> {
    fs::create_dir_all(path)?;
    let options = std::ffi::CString::new(format!("mode=1777,size={size}"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount("shm", path, "tmpfs", flags, options.as_c_str())?)
}
