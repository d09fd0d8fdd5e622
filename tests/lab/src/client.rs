//! Running commands in a lab and copying files in and out.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Context, Error};
use crate::lab::LabState;
use crate::protocol::{CHUNK, ExecRequest, Frame, Request, WindowSize};

/// How long a command may run unless it is given another limit.
const DEFAULT_LIMIT: Duration = Duration::from_secs(600);

/// The way to a running lab; every call opens its own session.
#[derive(Debug, Clone)]
pub struct Client {
    state: LabState,
}

impl Client {
    pub(crate) fn of(state: LabState) -> Self {
        Client { state }
    }

    /// The way to a lab that must be up, in this process or another.
    pub fn connect(state: LabState) -> Result<Self, Error> {
        if !state.is_up()? {
            return Err(Error::NotUp {
                name: state.name().into(),
            });
        }
        Ok(Client { state })
    }

    /// Prepares a command; `argv[0]` is searched in the lab's `PATH`.
    pub fn exec<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> Exec {
        Exec {
            state: self.state.clone(),
            request: ExecRequest {
                argv: argv.into_iter().map(Into::into).collect(),
                ..ExecRequest::default()
            },
            input: Input::Empty,
            limit: DEFAULT_LIMIT,
            resizes: None,
        }
    }

    /// Copies a file or a directory's content, with modes, to exactly `to` in the lab.
    ///
    /// Everything belongs to root there. A file replaces its destination in one step, so a
    /// running program can be replaced.
    pub fn push(&self, from: &Path, to: &str) -> Result<(), Error> {
        let metadata = fs::metadata(from).context(|| format!("read {}", from.display()))?;
        if metadata.is_dir() {
            return self.push_directory(from, to);
        }
        let file = File::open(from).context(|| format!("open {}", from.display()))?;
        let script = r#"mkdir -p "$(dirname "$1")" && t=$(mktemp "$1.XXXXXX") && cat >"$t" && chmod "$2" "$t" && mv -T "$t" "$1""#;
        let mode = format!("{:o}", metadata.permissions().mode() & 0o7777);
        self.exec(["sh", "-ec", script, "push", to, &mode])
            .stdin(Input::Reader(Box::new(file)))
            .succeed(&format!("write {to}"))
    }

    fn push_directory(&self, from: &Path, to: &str) -> Result<(), Error> {
        let mut tar = Command::new("tar")
            .args([
                "--create",
                "--owner=0",
                "--group=0",
                "--numeric-owner",
                "--directory",
            ])
            .arg(from)
            .arg(".")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context(|| "run tar")?;
        let Some(stream) = tar.stdout.take() else {
            unreachable!("tar's output was asked to be a pipe");
        };
        let unpack = r#"mkdir -p "$1" && tar -x --no-overwrite-dir -C "$1""#;
        let unpacked = self
            .exec(["sh", "-ec", unpack, "push", to])
            .stdin(Input::Reader(Box::new(stream)))
            .succeed(&format!("unpack into {to}"));
        // The pipe's reader is gone by now, so tar has ended or is about to.
        let status = tar.wait().context(|| "wait for tar")?;
        unpacked?;
        if !status.success() {
            return Err(Error::Failed {
                command: format!("tar of {}", from.display()),
                status,
            });
        }
        Ok(())
    }

    /// Copies a file or a directory's content from the lab to exactly `to`.
    pub fn pull(&self, from: &str, to: &Path) -> Result<(), Error> {
        let is_directory = self.exec(["test", "-d", from]).run()?.status == 0;
        if !is_directory {
            let mut file = File::create(to).context(|| format!("create {}", to.display()))?;
            return self
                .exec(["cat", "--", from])
                .succeed_into(&mut file, &format!("read {from}"));
        }
        fs::create_dir_all(to).context(|| format!("create {}", to.display()))?;
        let mut tar = Command::new("tar")
            .args(["--extract", "--directory"])
            .arg(to)
            .stdin(Stdio::piped())
            .spawn()
            .context(|| "run tar")?;
        let Some(mut stream) = tar.stdin.take() else {
            unreachable!("tar's input was asked to be a pipe");
        };
        let pulled = self
            .exec(["tar", "-c", "-C", from, "."])
            .succeed_into(&mut stream, &format!("read {from}"));
        drop(stream);
        let status = tar.wait().context(|| "wait for tar")?;
        pulled?;
        if !status.success() {
            return Err(Error::Failed {
                command: format!("tar into {}", to.display()),
                status,
            });
        }
        Ok(())
    }
}

/// Where a command's input comes from.
pub enum Input {
    /// There is none.
    Empty,
    /// These bytes.
    Bytes(Vec<u8>),
    /// What this reader gives until its end. A thread reads it and stays in a blocked read when
    /// the command ends first.
    Reader(Box<dyn Read + Send>),
}

/// What a command printed and how it ended.
#[derive(Debug, Clone)]
pub struct ExecOutput {
    /// The exit code, or 128 + the signal that killed it.
    pub status: i32,
    /// Standard output; with a terminal, all output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// A command to run in a lab.
pub struct Exec {
    state: LabState,
    request: ExecRequest,
    input: Input,
    limit: Duration,
    resizes: Option<Box<dyn Iterator<Item = WindowSize> + Send>>,
}

impl Exec {
    /// Adds an environment variable.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.env.push((name.into(), value.into()));
        self
    }

    /// Sets the working directory.
    pub fn cwd(mut self, dir: impl AsRef<Path>) -> Self {
        self.request.cwd = Some(dir.as_ref().to_path_buf());
        self
    }

    /// Sets the input.
    pub fn stdin(mut self, input: Input) -> Self {
        self.input = input;
        self
    }

    /// Runs it on a terminal; `resizes` blocks until the next change of the terminal's size.
    pub fn tty(
        mut self,
        size: WindowSize,
        resizes: impl Iterator<Item = WindowSize> + Send + 'static,
    ) -> Self {
        self.request.tty = Some(size);
        self.resizes = Some(Box::new(resizes));
        self
    }

    /// Sets how long it may run (10 minutes unless set); it is killed then.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it and collects its output.
    pub fn run(self) -> Result<ExecOutput, Error> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let status = self.stream(&mut stdout, &mut stderr)?;
        Ok(ExecOutput {
            status,
            stdout,
            stderr,
        })
    }

    /// Runs it, passing on its output as it comes; returns its exit code.
    pub fn stream(self, stdout: &mut dyn Write, stderr: &mut dyn Write) -> Result<i32, Error> {
        let doing = format!("running {:?}", self.request.argv);
        let deadline = Instant::now() + self.limit;
        let stream = self.state.connect()?;
        let writer = stream.try_clone().context(|| "duplicate a socket")?;
        let writer = Arc::new(Mutex::new(writer));
        send(&writer, &Frame::Request(Request::Exec(self.request)))
            .map_err(|_| self.state.died(&doing))?;
        feed(self.input, Arc::clone(&writer));
        if let Some(resizes) = self.resizes {
            let writer = Arc::clone(&writer);
            std::thread::spawn(move || {
                for size in resizes {
                    if send(&writer, &Frame::Resize(size)).is_err() {
                        break;
                    }
                }
            });
        }
        let result = receive(
            &self.state,
            &stream,
            &doing,
            deadline,
            self.limit,
            stdout,
            stderr,
        );
        // Wakes the thread that writes input; the agent kills what still runs.
        let _ = stream.shutdown(Shutdown::Both);
        result
    }

    fn succeed(self, doing: &str) -> Result<(), Error> {
        self.succeed_into(&mut std::io::sink(), doing)
    }

    fn succeed_into(self, stdout: &mut dyn Write, doing: &str) -> Result<(), Error> {
        let mut stderr = Vec::new();
        match self.stream(stdout, &mut stderr)? {
            0 => Ok(()),
            status => Err(Error::Refused {
                doing: doing.into(),
                message: format!("status {status}: {}", String::from_utf8_lossy(&stderr)),
            }),
        }
    }
}

fn receive(
    state: &LabState,
    mut stream: &UnixStream,
    doing: &str,
    deadline: Instant,
    limit: Duration,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> Result<i32, Error> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(state.timed_out(doing, limit));
        }
        stream
            .set_read_timeout(Some(left))
            .context(|| "set a socket's timeout")?;
        match Frame::read(&mut stream) {
            Ok(Some(Frame::Stdout(data))) => stdout
                .write_all(&data)
                .and_then(|()| stdout.flush())
                .context(|| "pass on the command's output")?,
            Ok(Some(Frame::Stderr(data))) => stderr
                .write_all(&data)
                .context(|| "pass on the command's error output")?,
            Ok(Some(Frame::Exit(status))) => return Ok(status),
            Ok(Some(Frame::Failed(message))) => {
                return Err(Error::Refused {
                    doing: "do what it was asked".into(),
                    message,
                });
            }
            Ok(Some(Frame::Request(_) | Frame::Stdin(_) | Frame::Resize(_)) | None) => {
                return Err(state.died(doing));
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return Err(state.timed_out(doing, limit));
            }
            Err(_) => return Err(state.died(doing)),
        }
    }
}

/// Sends the input from a thread of its own, so that output is read meanwhile.
fn feed(input: Input, writer: Arc<Mutex<UnixStream>>) {
    std::thread::spawn(move || {
        let mut reader: Box<dyn Read + Send> = match input {
            Input::Empty => Box::new(std::io::empty()),
            Input::Bytes(bytes) => Box::new(std::io::Cursor::new(bytes)),
            Input::Reader(reader) => reader,
        };
        let mut buffer = vec![0; CHUNK];
        loop {
            // An input that cannot be read any further ends there.
            let count = reader.read(&mut buffer).unwrap_or(0);
            let sent = send(&writer, &Frame::Stdin(buffer[..count].to_vec()));
            if sent.is_err() || count == 0 {
                break;
            }
        }
    });
}

fn send(writer: &Mutex<UnixStream>, frame: &Frame) -> std::io::Result<()> {
    let mut stream = writer.lock().unwrap_or_else(PoisonError::into_inner);
    frame.write(&mut *stream)
}
