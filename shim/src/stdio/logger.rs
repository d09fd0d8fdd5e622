//! Logger programs (`binary://`): they get the output of a process through pipes.
//!
//! The program's descriptors are 3 for standard output, 4 for standard error and 5 to say that it
//! is ready, by a byte or by closing it. Its arguments are the keys and values of the URI's query.

use std::{
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};

use super::{
    Owner, StdioError,
    fifo::{Sink, pipe_to_child},
};
use crate::child::{Child, Reaper};

/// How long a logger may take to become ready.
const READY_DEADLINE: Duration = Duration::from_secs(30);

/// How long a logger may take to see the end of its input before it gets SIGTERM.
const END_DEADLINE: Duration = Duration::from_secs(2);

/// And how long after that before it gets SIGKILL.
const TERM_DEADLINE: Duration = Duration::from_secs(10);

/// The logger's first descriptor.
const FIRST_FD: i32 = 3;

/// A running logger, killed when this is dropped.
#[derive(Debug)]
pub struct Logger {
    child: Child,
}

impl Logger {
    /// Starts the program of a `binary://` URI and waits until it is ready. Returns the sinks for
    /// standard output and standard error.
    pub async fn start(
        uri: &str,
        owner: &Owner<'_>,
        reaper: &Reaper,
    ) -> Result<(Self, Sink, Sink), StdioError> {
        let (path, arguments) = parse(uri);
        let failed = |source| StdioError::Logger {
            path: path.clone(),
            source,
        };
        let (stdout, their_stdout) = pipe_to_child().map_err(failed)?;
        let (stderr, their_stderr) = pipe_to_child().map_err(failed)?;
        let (ready, their_ready) = io::pipe().map_err(failed)?;
        let mut command = Command::new(&path);
        command
            .args(arguments)
            .env_clear()
            .env("CONTAINER_ID", owner.container)
            .env("CONTAINER_NAMESPACE", owner.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let theirs = [their_stdout, their_stderr, their_ready.into()];
        // SAFETY: the closure makes only system calls, and allocates nothing.
        unsafe { command.pre_exec(move || place(&theirs)) };
        let child = reaper.spawn(&mut command).map_err(failed)?;
        // The command holds the child's ends.
        drop(command);
        let logger = Self { child };
        let mut ready = pipe::Receiver::from_owned_fd(ready.into()).map_err(failed)?;
        let mut byte = [0];
        match timeout(READY_DEADLINE, ready.read(&mut byte)).await {
            Ok(Ok(_)) => Ok((logger, stdout, stderr)),
            _ => Err(StdioError::LoggerSilent(path)),
        }
    }

    /// Waits until the logger has seen the end of its input, or makes it end.
    pub async fn finish(self) {
        if timeout(END_DEADLINE, self.child.exited()).await.is_ok() {
            return;
        }
        self.child.signal(Signal::TERM);
        // Dropping it kills it.
        let _ = timeout(TERM_DEADLINE, self.child.exited()).await;
    }
}

/// Gives the descriptors the numbers from [`FIRST_FD`] on, in the child.
fn place(theirs: &[OwnedFd; 3]) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, fcntl};
    // Out of the way first: one may have another's number. The copies go with execve.
    let mut moved = [0; 3];
    for (number, fd) in moved.iter_mut().zip(theirs) {
        *number = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(FIRST_FD + 3))?;
    }
    for (number, fd) in (FIRST_FD..).zip(moved) {
        // SAFETY: plain integers; whatever had the number is the shim's copy in this child.
        if unsafe { libc::dup2(fd, number) } != number {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The program and its arguments: for each key of the query the key, and its value if it has one.
fn parse(uri: &str) -> (PathBuf, Vec<String>) {
    let rest = uri.strip_prefix("binary://").unwrap_or(uri);
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(decode(key, true));
        if !value.is_empty() {
            arguments.push(decode(value, true));
        }
    }
    (decode(path, false).into(), arguments)
}

/// Percent-decoding (RFC 3986, section 2.1); in a query a plus is a space.
fn decode(text: &str, query: bool) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match (first, tail) {
            (b'%', [high, low, ..]) => std::str::from_utf8(&[*high, *low])
                .ok()
                .and_then(|digits| u8::from_str_radix(digits, 16).ok()),
            _ => None,
        };
        match escaped {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(if query && *first == b'+' {
                    b' '
                } else {
                    *first
                });
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_query_becomes_arguments() {
        let (path, arguments) = parse("binary:///usr/bin/log%20it?a=b&flag&c=d%2Fe+f");
        assert_eq!(path, PathBuf::from("/usr/bin/log it"));
        assert_eq!(arguments, ["a", "b", "flag", "c", "d/e f"]);
    }

    #[tokio::test]
    async fn a_logger_gets_its_pipes_and_says_when_it_is_ready() {
        use tokio::io::AsyncWriteExt;
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("logger");
        let log = directory.path().join("log");
        std::fs::write(
            &program,
            format!(
                "#!/bin/sh\nexec 5>&-\n/bin/cat <&3 >{0}\n/bin/cat <&4 >>{0}\necho $CONTAINER_ID $1 $2 >>{0}\n",
                log.display()
            ),
        )
        .unwrap();
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let reaper = Reaper::start().unwrap();
        let owner = Owner {
            namespace: "ns",
            container: "c1",
        };
        let uri = format!("binary://{}?key=value", program.display());
        let (logger, stdout, stderr) = Logger::start(&uri, &owner, &reaper).await.unwrap();
        for (sink, text) in [(stdout, "out\n"), (stderr, "err\n")] {
            let Sink::Pipe(mut pipe) = sink else {
                panic!("not a pipe");
            };
            pipe.write_all(text.as_bytes()).await.unwrap();
        }
        assert_eq!(logger.child.exited().await, 0);
        let logged = std::fs::read_to_string(log).unwrap();
        assert_eq!(logged, "out\nerr\nc1 key value\n");
    }
}
