//! Messages to the kernel's log: the only place where a guest's troubles are seen from outside.

use std::{error::Error, fmt::Write as _, fs::OpenOptions, io::Write as _};

/// Writes one line at level 3 (`KERN_ERR`), which reaches the crash console.
pub fn error(message: &str) {
    // One write is one record (Documentation/ABI/testing/dev-kmsg); a newline would end it early.
    let line = format!("<3>bulkhead-agent: {}\n", message.replace('\n', " "));
    let written = OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut kmsg| kmsg.write_all(line.as_bytes()));
    if written.is_err() {
        eprint!("{}", &line[3..]);
    }
}

/// The messages of an error and of all its sources, joined by colons.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}
