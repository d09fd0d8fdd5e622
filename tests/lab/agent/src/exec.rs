//! Running one command for a session.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use bulkhead_lab::mux::Session;
use bulkhead_lab::protocol::{CHUNK, ExecRequest, Frame, WindowSize};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, ioctl_tiocsctty, kill_process_group, setsid};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};

use crate::stream::FileStream;

/// A command and the streams that connect it to its session.
struct Running {
    child: Child,
    input: FileStream,
    output: Vec<Source>,
}

/// One stream of output and the kind of frame it goes into.
struct Source {
    stream: FileStream,
    frame: fn(Vec<u8>) -> Frame,
}

/// Runs a command to its end, or until the session is closed, which kills its process group.
pub async fn run(request: ExecRequest, session: &mut Session) -> io::Result<()> {
    let Running {
        mut child,
        input,
        output,
    } = match start(&request) {
        Ok(running) => running,
        Err(error) => {
            let message = format!("run {:?}: {error}", request.argv);
            return Frame::Failed(message).write_async(session).await;
        }
    };
    let group = child.id().and_then(|id| i32::try_from(id).ok());
    let (from_client, mut to_client) = tokio::io::split(session);
    let (has_exited, exited) = watch::channel(false);
    let (frames, mut outgoing) = mpsc::channel(4);
    for source in output {
        tokio::spawn(pump(source, exited.clone(), frames.clone()));
    }
    drop(frames);

    let exit = async {
        let status = child.wait().await;
        // Without receivers all output has ended already.
        let _ = has_exited.send(true);
        status
    };
    let send = async {
        while let Some(frame) = outgoing.recv().await {
            frame.write_async(&mut to_client).await?;
        }
        io::Result::Ok(())
    };
    let status = tokio::select! {
        (status, sent) = async { tokio::join!(exit, send) } => sent.and(status),
        error = feed(from_client, input) => Err(error),
    };
    match status {
        Ok(status) => {
            let code = status.code().or(status.signal().map(|signal| 128 + signal));
            let code = code.ok_or(io::ErrorKind::InvalidData)?;
            Frame::Exit(code).write_async(&mut to_client).await
        }
        Err(error) => {
            if let Some(group) = group.and_then(Pid::from_raw) {
                // It may have ended by itself.
                let _ = kill_process_group(group, Signal::KILL);
            }
            child.wait().await?;
            Err(error)
        }
    }
}

fn start(request: &ExecRequest) -> io::Result<Running> {
    let [program, arguments @ ..] = request.argv.as_slice() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no program"));
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(request.env.iter().map(|(name, value)| (name, value)));
    if let Some(dir) = &request.cwd {
        command.current_dir(dir);
    }
    match request.tty {
        Some(size) => start_on_terminal(command, size),
        None => start_on_pipes(command),
    }
}

fn start_on_pipes(mut command: Command) -> io::Result<Running> {
    let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC);
    let (input_reader, input) = pipe()?;
    let (output, output_writer) = pipe()?;
    let (error, error_writer) = pipe()?;
    command
        .stdin(Stdio::from(input_reader))
        .stdout(Stdio::from(output_writer))
        .stderr(Stdio::from(error_writer))
        .process_group(0);
    Ok(Running {
        child: command.spawn()?,
        input: FileStream::new(input)?,
        output: vec![
            Source {
                stream: FileStream::new(output)?,
                frame: Frame::Stdout,
            },
            Source {
                stream: FileStream::new(error)?,
                frame: Frame::Stderr,
            },
        ],
    })
}

fn start_on_terminal(mut command: Command, size: WindowSize) -> io::Result<Running> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = openpt(flags)?;
    unlockpt(&terminal)?;
    let peer = ioctl_tiocgptpeer(&terminal, flags)?;
    resize(&terminal, size)?;
    command
        .env("TERM", "xterm")
        .stdin(Stdio::from(peer.try_clone()?))
        .stdout(Stdio::from(peer.try_clone()?))
        .stderr(Stdio::from(peer));
    // SAFETY: between fork and exec only system calls are made that are async-signal-safe and
    // allocate nothing.
    unsafe {
        command.pre_exec(|| {
            setsid()?;
            ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        });
    }
    Ok(Running {
        child: command.spawn()?,
        input: FileStream::new(terminal.try_clone()?)?,
        output: vec![Source {
            stream: FileStream::new(terminal)?,
            frame: Frame::Stdout,
        }],
    })
}

fn resize(terminal: impl AsFd, size: WindowSize) -> io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(tcsetwinsize(terminal, size)?)
}

/// Sends what the command prints, until the end of the stream or, once the command has exited, of
/// what is in the stream at that moment: a process it left behind may keep the stream open.
async fn pump(mut source: Source, mut exited: watch::Receiver<bool>, frames: mpsc::Sender<Frame>) {
    let mut buffer = vec![0; CHUNK];
    let mut left = None;
    while left != Some(0) {
        let read = tokio::select! {
            biased;
            read = source.stream.read(&mut buffer) => read,
            _ = exited.wait_for(|exited| *exited), if left.is_none() => {
                left = Some(source.stream.readable().unwrap_or(0));
                continue;
            }
        };
        // A terminal that nobody has open any more reports EIO for its end.
        let count = read.unwrap_or(0);
        if count == 0
            || frames
                .send((source.frame)(buffer[..count].to_vec()))
                .await
                .is_err()
        {
            break;
        }
        left = left.map(|left| left.saturating_sub(count as u64));
    }
}

/// Passes input on until the build machine closes the session; returns why it ended.
async fn feed(mut client: impl AsyncRead + Unpin, input: FileStream) -> io::Error {
    let mut input = Some(input);
    loop {
        match Frame::read_async(&mut client).await {
            Ok(Some(Frame::Stdin(data))) if data.is_empty() => input = None,
            Ok(Some(Frame::Stdin(data))) => {
                if let Some(stream) = &mut input
                    && stream.write_all(&data).await.is_err()
                {
                    // The command reads no more; what follows is dropped as a pipe would.
                    input = None;
                }
            }
            Ok(Some(Frame::Resize(size))) => {
                if let Some(stream) = &input {
                    // A command without a terminal has no size to change.
                    let _ = resize(stream, size);
                }
            }
            Ok(Some(_)) => return io::ErrorKind::InvalidData.into(),
            Ok(None) => return io::ErrorKind::BrokenPipe.into(),
            Err(error) => return error,
        }
    }
}
