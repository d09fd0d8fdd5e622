//! What the build machine and the agent in the lab say to each other on one session.
//!
//! A session is one byte stream (see [`crate::mux`]). The build machine sends one
//! [`Frame::Request`], then input; the agent sends output and ends with [`Frame::Exit`] or
//! [`Frame::Failed`]. A frame is one byte of kind, the payload's length as a big-endian `u32`, and
//! the payload. Closing the stream early kills what the session runs.

use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// How many bytes of input or output one frame carries at most.
pub const CHUNK: usize = 64 * 1024;

/// The longest payload that is accepted; a request carries a whole environment.
const MAX_PAYLOAD: usize = 4 * 1024 * 1024;

/// What a session is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Wait until the lab is ready, after starting containerd if asked to.
    Boot {
        /// Which containerd to start, and to import the images in `/var/lib/bulkhead-images/boot`
        /// into.
        containerd: Option<Containerd>,
        /// Whether instructions are counted.
        metered: bool,
    },
    /// Run a command.
    Exec(ExecRequest),
}

/// A containerd of the lab's, with its `ctr` and the runc of its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Containerd {
    /// 1.7, with runc 1.1: Debian 13's.
    V1,
    /// 2.1, with runc 1.3: Debian unstable's.
    V2,
}

/// A command to run in the lab.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The program, searched in `PATH`, and its arguments.
    pub argv: Vec<String>,
    /// Variables added to the agent's environment.
    pub env: Vec<(String, String)>,
    /// The working directory; `/root` when there is none.
    pub cwd: Option<PathBuf>,
    /// Run on a terminal of this size: output and error output are then one stream.
    pub tty: Option<WindowSize>,
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

/// One message of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// The first frame: what to do.
    Request(Request),
    /// Input for the command; empty at its end.
    Stdin(Vec<u8>),
    /// The user's terminal changed its size.
    Resize(WindowSize),
    /// Standard output of the command.
    Stdout(Vec<u8>),
    /// Standard error of the command.
    Stderr(Vec<u8>),
    /// The command ended: its exit code, or 128 + the signal that killed it.
    Exit(i32),
    /// The request could not be carried out.
    Failed(String),
}

impl Frame {
    fn encode(&self) -> io::Result<Vec<u8>> {
        let (kind, payload) = match self {
            Frame::Request(request) => (b'R', serde_json::to_vec(request)?),
            Frame::Stdin(data) => (b'I', data.clone()),
            Frame::Resize(size) => (b'W', serde_json::to_vec(size)?),
            Frame::Stdout(data) => (b'O', data.clone()),
            Frame::Stderr(data) => (b'E', data.clone()),
            Frame::Exit(status) => (b'X', status.to_be_bytes().to_vec()),
            Frame::Failed(message) => (b'F', message.clone().into_bytes()),
        };
        let length = u32::try_from(payload.len()).map_err(invalid)?;
        let mut bytes = vec![kind];
        bytes.extend(length.to_be_bytes());
        bytes.extend(payload);
        Ok(bytes)
    }

    fn decode(kind: u8, payload: Vec<u8>) -> io::Result<Self> {
        Ok(match kind {
            b'R' => Frame::Request(serde_json::from_slice(&payload)?),
            b'I' => Frame::Stdin(payload),
            b'W' => Frame::Resize(serde_json::from_slice(&payload)?),
            b'O' => Frame::Stdout(payload),
            b'E' => Frame::Stderr(payload),
            b'X' => Frame::Exit(i32::from_be_bytes(
                payload.as_slice().try_into().map_err(invalid)?,
            )),
            b'F' => Frame::Failed(String::from_utf8(payload).map_err(invalid)?),
            other => return Err(invalid(format!("unknown frame kind {other:#x}"))),
        })
    }

    /// Writes the frame to a blocking stream.
    pub fn write(&self, stream: &mut impl Write) -> io::Result<()> {
        stream.write_all(&self.encode()?)?;
        stream.flush()
    }

    /// Reads one frame from a blocking stream; `None` when it ended between two frames.
    pub fn read(stream: &mut impl Read) -> io::Result<Option<Self>> {
        let mut kind = [0];
        if stream.read(&mut kind)? == 0 {
            return Ok(None);
        }
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let mut payload = vec![0; payload_length(length)?];
        stream.read_exact(&mut payload)?;
        Self::decode(kind[0], payload).map(Some)
    }

    /// Writes the frame to an async stream.
    pub async fn write_async(&self, stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        stream.write_all(&self.encode()?).await?;
        stream.flush().await
    }

    /// Reads one frame from an async stream; `None` when it ended between two frames.
    pub async fn read_async(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let mut kind = [0];
        if stream.read(&mut kind).await? == 0 {
            return Ok(None);
        }
        let mut length = [0; 4];
        stream.read_exact(&mut length).await?;
        let mut payload = vec![0; payload_length(length)?];
        stream.read_exact(&mut payload).await?;
        Self::decode(kind[0], payload).map(Some)
    }
}

fn payload_length(bytes: [u8; 4]) -> io::Result<usize> {
    let length = usize::try_from(u32::from_be_bytes(bytes)).map_err(invalid)?;
    if length > MAX_PAYLOAD {
        return Err(invalid(format!("a frame of {length} bytes is too long")));
    }
    Ok(length)
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_survives_the_stream() {
        let frames = [
            Frame::Request(Request::Boot {
                containerd: Some(Containerd::V2),
                metered: true,
            }),
            Frame::Request(Request::Exec(ExecRequest {
                argv: vec!["sh".into(), "-c".into(), "exit 3".into()],
                env: vec![("A".into(), "b".into())],
                cwd: Some("/tmp".into()),
                tty: Some(WindowSize {
                    rows: 24,
                    columns: 80,
                }),
            })),
            Frame::Stdin(Vec::new()),
            Frame::Stdout(vec![0, 255, b'\n']),
            Frame::Stderr(vec![1; CHUNK]),
            Frame::Resize(WindowSize {
                rows: 1,
                columns: 2,
            }),
            Frame::Exit(-1),
            Frame::Failed("no such file".into()),
        ];
        let mut stream = Vec::new();
        for frame in &frames {
            frame.write(&mut stream).unwrap();
        }
        let mut stream = stream.as_slice();
        for frame in frames {
            assert_eq!(Frame::read(&mut stream).unwrap(), Some(frame));
        }
        assert_eq!(Frame::read(&mut stream).unwrap(), None);
    }

    #[test]
    fn a_cut_or_oversized_frame_is_an_error() {
        assert!(Frame::read(&mut [b'O', 0, 0].as_slice()).is_err());
        assert!(Frame::read(&mut [b'O', 0xff, 0, 0, 0].as_slice()).is_err());
        assert!(Frame::read(&mut [b'?', 0, 0, 0, 0].as_slice()).is_err());
    }
}
