//! Two long outputs at once.

use std::io::{Read, Write};
use std::thread;

use anyhow::{Result, anyhow};

use crate::pattern::Pattern;

/// The seed of the pattern on standard output.
pub const STDOUT_SEED: u64 = 1;
/// The seed of the pattern on standard error.
pub const STDERR_SEED: u64 = 2;

/// Writes a pattern of `length` bytes to standard output and another to standard error.
pub(super) fn write(length: u64) -> Result<()> {
    let errors = thread::spawn(move || copy(STDERR_SEED, length, std::io::stderr()));
    copy(STDOUT_SEED, length, std::io::stdout())?;
    errors
        .join()
        .map_err(|_| anyhow!("the thread that writes to standard error panicked"))??;
    Ok(())
}

fn copy(seed: u64, length: u64, mut to: impl Write) -> std::io::Result<()> {
    let mut pattern = Pattern::new(seed, length);
    // Not a power of two: writes and pages do not line up.
    let mut block = vec![0; 40_000];
    loop {
        match pattern.read(&mut block)? {
            0 => return to.flush(),
            count => to.write_all(&block[..count])?,
        }
    }
}
