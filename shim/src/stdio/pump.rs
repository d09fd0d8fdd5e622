//! Copying between a stream of the guest and what is on the host, byte for byte, holding one
//! buffer at most.

use std::io::{self, Read, Write};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
};

use super::fifo::{Sink, Source};
use crate::streams::Expected;

/// Bytes that are copied at a time: what a pipe holds.
const BUFFER: usize = 64 * 1024;

/// Copies a process's output to its end.
pub async fn output(expected: Expected, mut sink: Sink) {
    let Some(mut stream) = expected.arrived().await else {
        return;
    };
    // Nothing is allocated for a process that says nothing.
    if stream.readable().await.is_err() {
        return;
    }
    let mut buffer = vec![0; BUFFER];
    let mut broken = false;
    loop {
        let read = match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        // A process whose logger has died goes on; what it says is lost.
        if !broken && let Err(error) = write(&mut sink, &buffer[..read]).await {
            tracing::warn!(%error, "Cannot write output; the rest is dropped");
            broken = true;
        }
    }
}

async fn write(sink: &mut Sink, bytes: &[u8]) -> io::Result<()> {
    match sink {
        Sink::Pipe(pipe) => pipe.write_all(bytes).await,
        Sink::File(file) => file.write_all(bytes),
    }
}

/// Copies a process's input to its end, and ends the stream then.
pub async fn input(source: Source, expected: Expected) {
    let Some(mut stream) = expected.arrived().await else {
        return;
    };
    let copied = match source {
        Source::Pipe(pipe) => copy_pipe(pipe, &mut stream).await,
        Source::File(file) => copy_file(file, &mut stream).await,
    };
    match copied {
        Ok(()) => {
            // The other side may be gone by now.
            let _ = stream.shutdown().await;
        }
        Err(error) => tracing::debug!(%error, "Input ends early"),
    }
}

async fn copy_pipe(mut pipe: pipe::Receiver, stream: &mut UnixStream) -> io::Result<()> {
    pipe.readable().await?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = pipe.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..read]).await?;
    }
}

async fn copy_file(mut file: std::fs::File, stream: &mut UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..read]).await?;
    }
}
