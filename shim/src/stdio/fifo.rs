//! The FIFOs and files that containerd names.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
    sync::Mutex,
    sync::PoisonError,
};

use tokio::net::unix::pipe;

use super::StdioError;

/// Where output goes.
#[derive(Debug)]
pub enum Sink {
    /// A FIFO or pipe.
    Pipe(pipe::Sender),
    /// A regular file or a device, which does not keep its writer waiting.
    File(File),
}

/// Where input comes from.
#[derive(Debug)]
pub enum Source {
    /// A FIFO.
    Pipe(pipe::Receiver),
    /// A regular file or a device.
    File(File),
}

/// Keeps an input from ending while its clients come and go.
#[derive(Debug)]
pub struct InputKeeper {
    writer: Mutex<Option<OwnedFd>>,
}

impl InputKeeper {
    /// From now on the input ends when its last client closes it. May be repeated.
    pub fn close(&self) {
        self.writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }
}

fn failed(stream: &'static str, path: &str) -> impl Fn(io::Error) -> StdioError {
    move |source| StdioError::Open {
        stream,
        path: path.into(),
        source,
    }
}

fn is_fifo(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.file_type().is_fifo())
}

/// Opens an output. A FIFO is opened for reading too: a reader that is late or lost makes neither
/// the opening wait nor the writing fail.
pub fn open_output(stream: &'static str, path: &str) -> Result<Sink, StdioError> {
    let failed = failed(stream, path);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(&failed)?;
    if is_fifo(&file).map_err(&failed)? {
        return pipe::Sender::from_file_unchecked(file)
            .map(Sink::Pipe)
            .map_err(&failed);
    }
    let file = OpenOptions::new()
        .append(true)
        .open(path)
        .map_err(&failed)?;
    Ok(Sink::File(file))
}

/// Opens a log file to append to, and makes it with its directories.
pub fn open_log_file(stream: &'static str, path: &str) -> Result<Sink, StdioError> {
    // Opening a FIFO to write waits for its reader.
    if fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo()) {
        return open_output(stream, path);
    }
    let failed = failed(stream, path);
    if let Some(directory) = Path::new(path).parent() {
        fs::create_dir_all(directory).map_err(&failed)?;
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(path)
        .map(Sink::File)
        .map_err(&failed)
}

/// Opens an input, with a writer that keeps it from ending.
pub fn open_input(path: &str) -> Result<(Source, InputKeeper), StdioError> {
    let failed = failed("stdin", path);
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(&failed)?;
    if !is_fifo(&file).map_err(&failed)? {
        let nothing = InputKeeper {
            writer: Mutex::new(None),
        };
        return Ok((Source::File(file), nothing));
    }
    let writer = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(&failed)?;
    let source = pipe::Receiver::from_file_unchecked(file).map_err(&failed)?;
    let keeper = InputKeeper {
        writer: Mutex::new(Some(writer.into())),
    };
    Ok((Source::Pipe(source), keeper))
}

/// The writing end of a new pipe, and the other end for a child.
pub fn pipe_to_child() -> io::Result<(Sink, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    let reader = OwnedFd::from(reader);
    let writer = OwnedFd::from(writer);
    Ok((Sink::Pipe(pipe::Sender::from_owned_fd(writer)?), reader))
}
