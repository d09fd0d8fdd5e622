//! Holding a shim at a step of its work (`shim/src/steps.rs`).

use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::net::sockopt::socket_peercred;

use crate::command::{DEADLINE, wait_readable};

/// The shim that can be held, which containerd takes by its path.
pub const SHIM: &str = "/usr/local/lib/bulkhead-test/containerd-shim-bulkhead-v2";

/// Where the shim looks for somebody who waits for it.
const DIRECTORY: &str = "/run/bulkhead-test";

/// A step at which the next shim that comes to it is held.
pub struct Step {
    path: PathBuf,
    listener: UnixListener,
}

/// A shim that is held until this is dropped.
pub struct Held {
    shim: UnixStream,
}

impl Step {
    /// A request to the VMM or a call of the agent, or with `-answered` the moment after it.
    pub fn hold(name: &str) -> Result<Self> {
        fs::create_dir_all(DIRECTORY)?;
        let path = Path::new(DIRECTORY).join(name);
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("cannot listen on {}", path.display()))?;
        Ok(Self { path, listener })
    }

    /// Waits for a shim. Those that come to the step later are not held.
    pub fn reached(self) -> Result<Held> {
        ensure!(
            wait_readable(&self.listener, DEADLINE)?,
            "no shim has come to {}",
            self.path.display()
        );
        let (shim, _) = self.listener.accept()?;
        Ok(Held { shim })
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        // The directory stays while another step is in it.
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_dir(DIRECTORY);
    }
}

impl Held {
    /// The process id of the shim.
    pub fn shim(&self) -> io::Result<i32> {
        Ok(socket_peercred(&self.shim)?.pid.as_raw_nonzero().get())
    }
}
