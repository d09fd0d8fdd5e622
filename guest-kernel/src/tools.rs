//! Running the programs that a build needs, each with a deadline and its output kept.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How long a program may take to end after SIGTERM before it is killed.
const GRACE: Duration = Duration::from_secs(10);

/// Why a program did not do its work. The program's name and arguments are in `command`.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be started or watched.
    #[error("cannot run `{command}`")]
    Run {
        /// The command line.
        command: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// It ended with a failure.
    #[error("`{command}` failed with {status}")]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// It did not end in time and was ended.
    #[error("`{command}` did not end within {} s", deadline.as_secs())]
    Deadline {
        /// The command line.
        command: String,
        /// The time it was given.
        deadline: Duration,
    },
}

/// Runs `command` to its end, giving each line of its standard output to `on_line`.
///
/// Standard output and standard error are appended to `log` in full. Whatever happens, the
/// program has ended when this returns.
pub fn run(
    command: &mut Command,
    deadline: Duration,
    log: &File,
    on_line: &mut dyn FnMut(&str),
) -> Result<(), ToolError> {
    let line = command_line(command);
    match supervise(command, deadline, log, on_line) {
        Ok(Some(status)) if status.success() => Ok(()),
        Ok(Some(status)) => Err(ToolError::Failed {
            command: line,
            status,
        }),
        Ok(None) => Err(ToolError::Deadline {
            command: line,
            deadline,
        }),
        Err(source) => Err(ToolError::Run {
            command: line,
            source,
        }),
    }
}

/// Starts `command` and watches it; `None` when the deadline has passed.
fn supervise(
    command: &mut Command,
    deadline: Duration,
    mut log: &File,
    on_line: &mut dyn FnMut(&str),
) -> io::Result<Option<ExitStatus>> {
    let end = Instant::now() + deadline;
    let mut running = Running::start(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.try_clone()?),
    )?;
    let mut stdout = running.child.stdout.take();
    let mut partial = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Some(ready) = running.wait(stdout.as_ref().map(AsFd::as_fd), end)? else {
            return Ok(None);
        };
        // Output first: the program's last lines are read before its end is seen.
        match (ready, &mut stdout) {
            (Ready::Output, Some(pipe)) => {
                let count = pipe.read(&mut buffer)?;
                if count == 0 {
                    stdout = None;
                    // The last line need not end with a newline.
                    if !partial.is_empty() {
                        on_line(&String::from_utf8_lossy(&partial));
                        partial.clear();
                    }
                }
                log.write_all(&buffer[..count])?;
                partial.extend_from_slice(&buffer[..count]);
                while let Some(newline) = partial.iter().position(|&byte| byte == b'\n') {
                    on_line(&String::from_utf8_lossy(&partial[..newline]));
                    partial.drain(..=newline);
                }
            }
            _ => return running.child.wait().map(Some),
        }
    }
}

enum Ready {
    Output,
    Ended,
}

/// A started program, ended on drop if it has not ended before.
struct Running {
    child: Child,
    pidfd: OwnedFd,
}

impl Running {
    fn start(command: &mut Command) -> io::Result<Self> {
        let mut child = command.spawn()?;
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self { child, pidfd }),
            Err(error) => {
                child.kill()?;
                child.wait()?;
                Err(error.into())
            }
        }
    }

    /// Waits for output or the program's end; `None` when `end` has passed.
    fn wait(
        &self,
        output: Option<std::os::fd::BorrowedFd<'_>>,
        end: Instant,
    ) -> io::Result<Option<Ready>> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut watched = vec![PollFd::new(&self.pidfd, PollFlags::IN)];
            watched.extend(output.map(|pipe| PollFd::from_borrowed_fd(pipe, PollFlags::IN)));
            match poll(&mut watched, Some(&timeout)) {
                Ok(0) => return Ok(None),
                Ok(_)
                    if watched
                        .get(1)
                        .is_some_and(|pipe| !pipe.revents().is_empty()) =>
                {
                    return Ok(Some(Ready::Output));
                }
                Ok(_) => return Ok(Some(Ready::Ended)),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // SIGTERM first: make passes it on to what it started. Errors mean it has ended.
        let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
        let ended = self.wait(None, Instant::now() + GRACE);
        if !matches!(ended, Ok(Some(_))) {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

fn command_line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn lines(script: &str, deadline: Duration) -> (Result<(), ToolError>, Vec<String>, String) {
        let mut log = tempfile::tempfile().unwrap();
        let mut lines = Vec::new();
        let result = run(&mut shell(script), deadline, &log, &mut |line| {
            lines.push(line.to_owned());
        });
        let mut text = String::new();
        io::Seek::rewind(&mut log).unwrap();
        log.read_to_string(&mut text).unwrap();
        (result, lines, text)
    }

    #[test]
    fn output_is_given_by_line_and_logged() {
        let (result, lines, log) = lines("echo one; echo error >&2; printf two", LONG);
        result.unwrap();
        assert_eq!(lines, ["one", "two"]);
        for line in ["one\n", "two", "error\n"] {
            assert!(log.contains(line), "{log:?}");
        }
    }

    #[test]
    fn failure_names_command_and_status() {
        let (result, ..) = lines("exit 3", LONG);
        let error = result.unwrap_err();
        assert!(matches!(error, ToolError::Failed { .. }));
        assert!(error.to_string().contains("sh -c exit 3"), "{error}");
        assert!(error.to_string().contains('3'), "{error}");
    }

    #[test]
    fn a_program_that_does_not_end_is_ended() {
        let (result, lines, _) = lines("echo $$; exec sleep 600", Duration::from_secs(1));
        assert!(matches!(result, Err(ToolError::Deadline { .. })));
        let pid = Pid::from_raw(lines[0].parse().unwrap()).unwrap();
        assert!(rustix::process::test_kill_process(pid).is_err());
    }

    #[test]
    fn a_pipe_kept_open_by_a_grandchild_is_not_waited_for() {
        let (result, lines, _) = lines("sleep 600 & echo $!", LONG);
        result.unwrap();
        let grandchild = Pid::from_raw(lines[0].parse().unwrap()).unwrap();
        rustix::process::kill_process(grandchild, Signal::KILL).unwrap();
    }

    #[test]
    fn a_missing_program_is_named() {
        let log = tempfile::tempfile().unwrap();
        let error = run(
            &mut Command::new("no-such-program"),
            LONG,
            &log,
            &mut |_| {},
        );
        assert!(error.unwrap_err().to_string().contains("`no-such-program`"));
    }
}
