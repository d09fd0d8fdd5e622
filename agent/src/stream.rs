//! The streams of a process: pipes or a terminal on one side, connections to the host on the
//! other, and the copying between them.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use bulkhead_agent_api::{STREAM_PORT, TOKEN_LEN, messages::Stdio};
use rustix::{
    fs::{Mode, OFlags},
    pipe::{PipeFlags, pipe_with},
};
use tokio::time::timeout;

use crate::{
    error::ServiceError,
    reaper::{ExitReceiver, ended},
    transport::{Stream, Transport, connected},
};

/// Bytes under way in one direction of one stream.
const BUFFER_LEN: usize = 64 * 1024;

/// For the host to accept a stream.
const DIAL_DEADLINE: Duration = Duration::from_secs(30);

/// A connection for a stream that the host waits for.
struct Dialled {
    socket: OwnedFd,
    token: Vec<u8>,
}

impl Dialled {
    /// Begins to dial, or does nothing for an absent stream.
    fn begin(transport: &Transport, token: &[u8]) -> Result<Option<Self>, ServiceError> {
        match token.len() {
            0 => Ok(None),
            TOKEN_LEN => {
                let socket = transport.dial(STREAM_PORT);
                let socket = socket.map_err(ServiceError::system("dial a stream"))?;
                let token = token.to_vec();
                Ok(Some(Self { socket, token }))
            }
            length => Err(ServiceError::BadRequest {
                what: "length of a stream's token",
                value: length.to_string(),
            }),
        }
    }

    async fn finish(self) -> Result<Stream, ServiceError> {
        let connect = async {
            let stream = connected(self.socket).await?;
            stream.write_all(&self.token).await?;
            Ok(stream)
        };
        timeout(DIAL_DEADLINE, connect)
            .await
            .map_err(|_| ServiceError::Deadline("connecting a stream to the host"))?
            .map_err(ServiceError::system::<io::Error>(
                "connect a stream to the host",
            ))
    }
}

/// Connects to the host for a stream that it waits for.
pub async fn dial(transport: &Transport, token: &[u8]) -> Result<Stream, ServiceError> {
    match Dialled::begin(transport, token)? {
        Some(dialled) => dialled.finish().await,
        None => Err(ServiceError::BadRequest {
            what: "length of a stream's token",
            value: "0".to_owned(),
        }),
    }
}

/// The agent's ends of a process's streams, before the process exists.
pub struct Streams {
    host: [Option<Dialled>; 3],
    /// Ends of pipes: what the process reads, what it writes, its errors.
    pipes: [Option<OwnedFd>; 3],
}

impl Streams {
    /// Begins to dial the host for every stream that it waits for, and makes the pipes for them.
    /// Returns the process's ends as well, unless it gets a terminal.
    pub fn prepare(
        transport: &Transport,
        stdio: &Stdio,
    ) -> Result<(Self, Option<[OwnedFd; 3]>), ServiceError> {
        let host = [
            Dialled::begin(transport, &stdio.stdin)?,
            Dialled::begin(transport, &stdio.stdout)?,
            Dialled::begin(transport, &stdio.stderr)?,
        ];
        let mut pipes = [None, None, None];
        if stdio.terminal {
            if !stdio.stderr.is_empty() {
                return Err(ServiceError::BadRequest {
                    what: "streams: stderr beside a terminal",
                    value: String::new(),
                });
            }
            return Ok((Self { host, pipes }, None));
        }
        let mut ends = Vec::new();
        for (index, dialled) in host.iter().enumerate() {
            let made = if dialled.is_none() {
                open_null()?
            } else {
                let made = pipe_with(PipeFlags::CLOEXEC);
                let (read, write) = made.map_err(ServiceError::system("make a pipe"))?;
                let (own, other) = if index == 0 {
                    (write, read)
                } else {
                    (read, write)
                };
                pipes[index] = Some(own);
                other
            };
            ends.push(made);
        }
        let ends = <[OwnedFd; 3]>::try_from(ends).ok();
        Ok((Self { host, pipes }, ends))
    }

    /// Connects to the host and copies from here on, until the streams end.
    pub async fn run(
        self,
        terminal: Option<&Arc<Stream>>,
        exit: &ExitReceiver,
    ) -> Result<(), ServiceError> {
        let watch = ServiceError::system::<io::Error>;
        let [stdin, stdout, stderr] = self.host;
        let [stdin_pipe, stdout_pipe, stderr_pipe] = self.pipes;
        for (dialled, pipe) in [(stdout, stdout_pipe), (stderr, stderr_pipe)] {
            let Some(dialled) = dialled else { continue };
            let sink = dialled.finish().await?;
            let source = match (pipe, terminal) {
                (Some(pipe), _) => Arc::new(Stream::new(pipe).map_err(watch("watch a pipe"))?),
                (None, Some(terminal)) => Arc::clone(terminal),
                (None, None) => continue,
            };
            tokio::spawn(async move {
                // The host hears of the end in any case; a lost host is the connection's matter.
                let _ = copy(&source, &sink).await;
                let _ = sink.end();
            });
        }
        if let Some(stdin) = stdin {
            let source = stdin.finish().await?;
            let sink = match (stdin_pipe, terminal) {
                (Some(pipe), _) => Arc::new(Stream::new(pipe).map_err(watch("watch a pipe"))?),
                (None, Some(terminal)) => Arc::clone(terminal),
                (None, None) => return Ok(()),
            };
            let exit = exit.clone();
            tokio::spawn(async move {
                tokio::select! {
                    _ = copy(&source, &sink) => {}
                    _ = sink.reader_gone() => {}
                    _ = ended(&exit) => {}
                }
            });
        }
        Ok(())
    }
}

/// Copies until the end of the source. A slow sink holds the source back.
async fn copy(source: &Stream, sink: &Stream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        match source.read(&mut buffer).await {
            Ok(0) => return Ok(()),
            Ok(length) => sink.write_all(&buffer[..length]).await?,
            // How a terminal's master says that no process has the terminal open any more.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Copies between two sockets until both have ended their own direction, or one is broken.
pub async fn both_ways(one: &Stream, other: &Stream) -> io::Result<()> {
    let way = async |source, sink: &Stream| {
        copy(source, sink).await?;
        sink.end()
    };
    tokio::try_join!(way(one, other), way(other, one)).map(drop)
}

fn open_null() -> Result<OwnedFd, ServiceError> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(ServiceError::system("open /dev/null"))
}

/// Changes the size of a terminal by its master.
pub fn resize(terminal: &Stream, columns: u16, rows: u16) -> Result<(), ServiceError> {
    let window = rustix::termios::Winsize {
        ws_col: columns,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(terminal.as_fd(), window)
        .map_err(ServiceError::system("resize the terminal"))
}
