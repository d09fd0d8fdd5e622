//! Running a command under a deadline, with everything it prints kept for the failure message.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// For one command: generous, because the lab emulates every instruction.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// For what must follow at once when a process has ended.
const SETTLE: Duration = Duration::from_secs(60);

/// How much of an output a failure message repeats, in bytes.
const SHOWN: usize = 4096;

/// What a command reads.
pub enum Input {
    /// `/dev/null`.
    Null,
    /// A pipe that stays open until [`Running::close_stdin`] or the command's end.
    Open,
    /// All that this yields, then the end of file.
    From(Box<dyn Read + Send>),
}

/// What has been read from a stream so far.
#[derive(Clone)]
pub struct Capture(Arc<(Mutex<Captured>, Condvar)>);

#[derive(Default)]
struct Captured {
    bytes: Vec<u8>,
    ended: bool,
}

impl Capture {
    /// Reads `stream` to its end on a thread of its own. A read error counts as the end: a
    /// terminal's master reports EIO when the last user of the other side is gone.
    pub fn start(mut stream: impl Read + Send + 'static) -> Self {
        let capture = Self(Arc::default());
        let shared = capture.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                shared.update(|captured| captured.bytes.extend_from_slice(&buffer[..count]));
            }
            shared.update(|captured| captured.ended = true);
        });
        capture
    }

    fn update(&self, change: impl FnOnce(&mut Captured)) {
        let (captured, changed) = &*self.0;
        change(&mut captured.lock().unwrap_or_else(PoisonError::into_inner));
        changed.notify_all();
    }

    /// Waits until `found` says so of the bytes read so far; false at the stream's end or when
    /// `limit` has passed.
    fn wait(&self, limit: Duration, mut found: impl FnMut(&Captured) -> bool) -> bool {
        let (captured, changed) = &*self.0;
        let guard = captured.lock().unwrap_or_else(PoisonError::into_inner);
        let (guard, _) = changed
            .wait_timeout_while(guard, limit, |captured| !found(captured) && !captured.ended)
            .unwrap_or_else(PoisonError::into_inner);
        found(&guard)
    }

    /// Waits until `text` has been read.
    pub fn expect(&self, text: &str, limit: Duration) -> Result<()> {
        let needle = text.as_bytes();
        let found = self.wait(limit, |captured| {
            captured
                .bytes
                .windows(needle.len())
                .any(|window| window == needle)
        });
        ensure!(
            found,
            "{text:?} did not appear within {limit:?}; so far: {}",
            shown(&self.bytes())
        );
        Ok(())
    }

    /// Everything read so far.
    pub fn bytes(&self) -> Vec<u8> {
        let (captured, _) = &*self.0;
        let captured = captured.lock().unwrap_or_else(PoisonError::into_inner);
        captured.bytes.clone()
    }

    /// Everything read so far, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    /// Waits for the end of the stream; false when `limit` has passed.
    pub fn ended(&self, limit: Duration) -> bool {
        self.wait(limit, |captured| captured.ended)
    }
}

/// A command that runs; killed when dropped.
pub struct Running {
    name: String,
    child: Child,
    started: Instant,
    stdin: Option<ChildStdin>,
    /// What it has written to its standard output so far.
    pub stdout: Capture,
    /// What it has written to its standard error so far.
    pub stderr: Capture,
}

impl Running {
    /// Starts a command in a process group of its own.
    pub fn spawn(mut command: Command, input: Input) -> Result<Self> {
        let name = describe(&command);
        command
            .process_group(0)
            .stdin(match input {
                Input::Null => Stdio::null(),
                Input::Open | Input::From(_) => Stdio::piped(),
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        let no_pipe = || anyhow!("{name} has no output pipe");
        let stdout = Capture::start(child.stdout.take().ok_or_else(no_pipe)?);
        let stderr = Capture::start(child.stderr.take().ok_or_else(no_pipe)?);
        let mut stdin = child.stdin.take();
        if let Input::From(mut source) = input
            && let Some(mut pipe) = stdin.take()
        {
            // A command may end without reading all: that is its test's business, not an error.
            thread::spawn(move || std::io::copy(&mut source, &mut pipe));
        }
        Ok(Self {
            name,
            child,
            started: Instant::now(),
            stdin,
            stdout,
            stderr,
        })
    }

    /// The process's id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Writes to the command's standard input.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let name = &self.name;
        let pipe = self
            .stdin
            .as_mut()
            .with_context(|| format!("the input of {name} is closed"))?;
        pipe.write_all(bytes)
            .with_context(|| format!("cannot write to {name}"))
    }

    /// Ends the command's standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits until standard output holds `text`; an early end of the command is an error with all
    /// that it printed.
    pub fn expect(&self, text: &str) -> Result<()> {
        self.stdout.expect(text, DEADLINE).with_context(|| {
            format!(
                "{}; its error output: {}",
                self.name,
                shown(&self.stderr.bytes())
            )
        })
    }

    /// Waits for the end of the command.
    pub fn finish(self) -> Result<Finished> {
        self.finish_within(DEADLINE)
    }

    /// As [`Running::finish`], with a limit of its own.
    pub fn finish_within(mut self, limit: Duration) -> Result<Finished> {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty())?;
        let ended = wait_readable(&pidfd, limit)?;
        if !ended {
            self.kill_group();
        }
        let status = self.child.wait()?;
        let closed = self.stdout.ended(SETTLE) && self.stderr.ended(SETTLE);
        let finished = Finished {
            name: self.name.clone(),
            status,
            took: self.started.elapsed(),
            stdout: self.stdout.bytes(),
            stderr: self.stderr.bytes(),
        };
        if !ended {
            bail!("not done within {limit:?} and killed: {finished}");
        }
        if !closed {
            bail!("something still holds the output pipes of {finished}");
        }
        Ok(finished)
    }

    fn kill_group(&self) {
        // It fails only when the group is gone already.
        let _ = kill_process_group(self.pid(), Signal::KILL);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.kill_group();
            // It has been killed, so this returns; there is nobody to tell of an error.
            let _ = self.child.wait();
        }
    }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Finished {
    name: String,
    status: ExitStatus,
    took: Duration,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// The exit code; 128 + n for an end by signal n, as a shell counts.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .or_else(|| self.status.signal().map(|signal| 128 + signal))
            .unwrap_or(-1)
    }

    /// How long the command ran, by `CLOCK_MONOTONIC`.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Fails unless the exit code is `code`.
    pub fn exits_with(self, code: i32) -> Result<Self> {
        ensure!(self.code() == code, "exit code {code} expected: {self}");
        Ok(self)
    }

    /// Fails unless the exit code is 0; gives the standard output.
    pub fn succeeds(self) -> Result<String> {
        Ok(self.exits_with(0)?.out())
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "`{}` ended with {} after {:.1} s\n  stdout: {}\n  stderr: {}",
            self.name,
            self.code(),
            self.took.as_secs_f32(),
            shown(&self.stdout),
            shown(&self.stderr)
        )
    }
}

/// Waits until a descriptor is readable: for a pidfd, until the process has ended.
pub fn wait_readable(fd: &impl std::os::fd::AsFd, limit: Duration) -> Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left)?;
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// An output for a failure message: its end, when it is long.
pub fn shown(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "(nothing)".into();
    }
    let mut text = String::new();
    let from = bytes.len().saturating_sub(SHOWN);
    if from > 0 {
        // Writing to a string does not fail.
        let _ = write!(text, "({} bytes, the last are) ", bytes.len());
    }
    text.push_str(String::from_utf8_lossy(&bytes[from..]).trim_end());
    text
}

fn describe(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
