//! The shim's log: the FIFO `log` in its bundle, which containerd copies into its own.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use tracing::Level;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::LogLevel;

/// Name of the FIFO in the bundle.
const FIFO: &str = "log";

impl From<LogLevel> for Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

/// Starts to log into the FIFO of `bundle`. Without one, nothing is logged.
pub fn start(bundle: &Path, level: Level) {
    // Open for reading too: there is no error when containerd is away, and it finds the last
    // lines when it is back. Non-blocking: a log that nobody reads must not stop the shim.
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.join(FIFO));
    let Ok(fifo) = opened else {
        return;
    };
    // Fails only when there is a subscriber already.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_writer(Log { fifo })
        .try_init();
}

struct Log {
    fifo: File,
}

/// Writes lines, dropping what does not fit.
struct Lines<'a>(&'a File);

impl Write for Lines<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Lines<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        Lines(&self.fifo)
    }
}
