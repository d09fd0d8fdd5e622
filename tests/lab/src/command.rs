//! Running a command of the build machine with a deadline, its output kept for the error message.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::{Context, Error};

/// How many bytes of a failed command's output its error message repeats.
const TAIL: u64 = 4096;

/// Runs a command to its end with its output in a temporary file, and fails with the end of that
/// output when the command fails or is not done within `limit` (then it is killed).
pub fn run_logged(command: &mut Command, limit: Duration) -> Result<(), Error> {
    let name = describe(command);
    let mut log = tempfile::tempfile().context(|| "create a temporary log file")?;
    let clone = || log.try_clone().context(|| "duplicate a log file");
    command
        .stdin(Stdio::null())
        .stdout(clone()?)
        .stderr(clone()?);
    let mut child = command.spawn().context(|| format!("run {name}"))?;
    match wait(&mut child, limit).context(|| format!("wait for {name}"))? {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(Error::Command {
            command: name,
            status,
            output: tail(&mut log),
        }),
        None => Err(Error::CommandTimeout {
            command: name,
            limit,
            output: tail(&mut log),
        }),
    }
}

/// Runs a command to its end with its output shown to the user, within `limit`.
pub fn run_shown(command: &mut Command, limit: Duration) -> Result<(), Error> {
    let name = describe(command);
    let mut child = command
        .stdin(Stdio::null())
        .spawn()
        .context(|| format!("run {name}"))?;
    match wait(&mut child, limit).context(|| format!("wait for {name}"))? {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(Error::Failed {
            command: name,
            status,
        }),
        None => Err(Error::CommandTimeout {
            command: name,
            limit,
            output: "(see above)".into(),
        }),
    }
}

/// Waits for a child until `limit` has passed; then kills it and returns `None`.
fn wait(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let pid = Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    if poll_until(&pidfd, Instant::now() + limit)? {
        return child.wait().map(Some);
    }
    child.kill()?;
    child.wait()?;
    Ok(None)
}

/// Waits until a descriptor is readable; false when the deadline passes first.
pub(crate) fn poll_until(
    fd: &impl std::os::fd::AsFd,
    deadline: Instant,
) -> Result<bool, rustix::io::Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| rustix::io::Errno::INVAL)?;
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

fn tail(log: &mut File) -> String {
    let length = log.metadata().map_or(0, |metadata| metadata.len());
    let mut bytes = Vec::new();
    let read = log
        .seek(SeekFrom::Start(length.saturating_sub(TAIL)))
        .and_then(|_| log.read_to_end(&mut bytes));
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => format!("(its output cannot be read: {error})"),
    }
}

/// The end of a text file, for error messages; empty when it cannot be read.
pub(crate) fn file_tail(path: &Path) -> String {
    File::open(path).map_or_else(|_| String::new(), |mut file| tail(&mut file))
}
