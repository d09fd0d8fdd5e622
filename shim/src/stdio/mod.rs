//! The standard streams of a process: between what containerd names and what the guest dials.

mod fifo;
mod logger;
mod pump;

use std::{collections::HashMap, io, path::PathBuf, sync::Arc, time::Duration};

use bulkhead_agent_api::messages::Stdio;
use thiserror::Error;
use tokio::{task::JoinHandle, time::timeout_at};

use crate::{
    child::Reaper,
    deadline,
    stdio::{
        fifo::{InputKeeper, Sink},
        logger::Logger,
    },
    streams::{Expected, Streams},
};

/// How long the last output may take to reach its reader once the process has ended.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// Failures with standard streams.
#[derive(Debug, Error)]
pub enum StdioError {
    /// A FIFO or file cannot be opened.
    #[error("Cannot open {path} for {stream}")]
    Open {
        /// Which stream.
        stream: &'static str,
        /// Its path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A scheme that is not known.
    #[error("Cannot use {uri:?} for {stream}: use a FIFO, file:// or binary://")]
    Scheme {
        /// Which stream.
        stream: &'static str,
        /// What was asked for.
        uri: String,
    },
    /// A logger cannot be started.
    #[error("Cannot start the logger {path}")]
    Logger {
        /// The executable.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A logger ended or stayed silent before it was ready.
    #[error("The logger {0} did not become ready")]
    LoggerSilent(PathBuf),
    /// No token for a stream.
    #[error("Cannot prepare a stream")]
    Token(#[source] io::Error),
}

/// What containerd names for the streams of a process; empty for none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// The process has a terminal.
    pub terminal: bool,
    /// Input.
    pub stdin: String,
    /// Output; with a terminal, the terminal's.
    pub stdout: String,
    /// Error output; not used with a terminal.
    pub stderr: String,
}

/// Whose streams they are, for loggers.
#[derive(Debug, Clone)]
pub struct Owner<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The container's id.
    pub container: &'a str,
}

/// Where an input is in its life.
#[derive(Debug)]
enum Input {
    /// There is none, or it is done with.
    None,
    /// Not opened yet.
    Prepared { path: String, expected: Expected },
    /// Being copied.
    Open {
        keeper: InputKeeper,
        pump: JoinHandle<()>,
    },
}

impl Input {
    fn stop(&mut self) {
        if let Self::Open { pump, .. } = std::mem::replace(self, Self::None) {
            pump.abort();
        }
    }
}

/// The streams of one process, open on the host's side. Dropping this closes them.
#[derive(Debug)]
pub struct Streaming {
    input: Input,
    /// The input has been closed by containerd, perhaps before it was opened.
    input_closed: bool,
    outputs: Vec<JoinHandle<()>>,
    loggers: Vec<Logger>,
}

impl Streaming {
    /// Opens what `paths` names. Returns what the agent has to know.
    pub async fn open(
        paths: &Paths,
        owner: Owner<'_>,
        streams: &Arc<Streams>,
        reaper: &Reaper,
    ) -> Result<(Self, Stdio), StdioError> {
        let mut streaming = Self {
            input: Input::None,
            input_closed: false,
            outputs: Vec::new(),
            loggers: Vec::new(),
        };
        let mut stdio = Stdio {
            terminal: paths.terminal,
            ..Stdio::default()
        };
        let mut outputs = Outputs {
            owner,
            reaper,
            opened: HashMap::new(),
            loggers: Vec::new(),
        };
        if let Some(sink) = outputs.open("stdout", &paths.stdout).await? {
            stdio.stdout = streaming.add_output(streams, sink)?;
        }
        if !paths.terminal
            && let Some(sink) = outputs.open("stderr", &paths.stderr).await?
        {
            stdio.stderr = streaming.add_output(streams, sink)?;
        }
        streaming.loggers = outputs.loggers;
        if !paths.stdin.is_empty() {
            let expected = streams.expect().map_err(StdioError::Token)?;
            stdio.stdin = expected.token();
            let path = paths.stdin.clone();
            streaming.input = Input::Prepared { path, expected };
        }
        Ok((streaming, stdio))
    }

    fn add_output(&mut self, streams: &Arc<Streams>, sink: Sink) -> Result<Vec<u8>, StdioError> {
        let expected = streams.expect().map_err(StdioError::Token)?;
        let token = expected.token();
        self.outputs
            .push(tokio::spawn(pump::output(expected, sink)));
        Ok(token)
    }

    /// Opens the input, when the process is about to start. Not before: a client that finds its
    /// FIFO open may be done with it, and say so, while the process is still being created.
    pub fn open_input(&mut self) -> Result<(), StdioError> {
        match std::mem::replace(&mut self.input, Input::None) {
            Input::Prepared { path, expected } => {
                let (input, keeper) = fifo::open_input(&path)?;
                if self.input_closed {
                    keeper.close();
                }
                let pump = tokio::spawn(pump::input(input, expected));
                self.input = Input::Open { keeper, pump };
            }
            other => self.input = other,
        }
        Ok(())
    }

    /// Lets the input end once its writers have closed it and it is read.
    pub fn close_input(&mut self) {
        self.input_closed = true;
        if let Input::Open { keeper, .. } = &self.input {
            keeper.close();
        }
    }

    /// Waits until the last output has reached its reader, within a deadline, and closes
    /// everything.
    pub async fn drain(mut self) {
        self.input.stop();
        let deadline = deadline::after(DRAIN_DEADLINE);
        for mut output in self.outputs.drain(..) {
            if timeout_at(deadline, &mut output).await.is_err() {
                tracing::warn!("Output that nobody reads is dropped");
                output.abort();
            }
        }
        for logger in self.loggers.drain(..) {
            tokio::spawn(logger.finish());
        }
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        self.input.stop();
        for output in &self.outputs {
            output.abort();
        }
    }
}

/// Opens outputs; one logger may take both.
struct Outputs<'a> {
    owner: Owner<'a>,
    reaper: &'a Reaper,
    /// The other end of a logger that takes both outputs, by its URI.
    opened: HashMap<String, Sink>,
    loggers: Vec<Logger>,
}

impl Outputs<'_> {
    async fn open(&mut self, stream: &'static str, uri: &str) -> Result<Option<Sink>, StdioError> {
        if uri.is_empty() {
            return Ok(None);
        }
        if let Some(sink) = self.opened.remove(uri) {
            return Ok(Some(sink));
        }
        if let Some(path) = uri.strip_prefix("file://") {
            return fifo::open_log_file(stream, path).map(Some);
        }
        if uri.starts_with("binary://") {
            let (logger, stdout, stderr) = Logger::start(uri, &self.owner, self.reaper).await?;
            self.loggers.push(logger);
            self.opened.insert(uri.to_owned(), stderr);
            return Ok(Some(stdout));
        }
        let path = uri.strip_prefix("fifo://").unwrap_or(uri);
        if !path.starts_with('/') {
            return Err(StdioError::Scheme {
                stream,
                uri: uri.to_owned(),
            });
        }
        fifo::open_output(stream, path).map(Some)
    }
}
