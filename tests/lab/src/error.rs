//! What can go wrong with the lab.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// Why the lab could not be built, started or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a file, socket or process failed.
    #[error("cannot {action}")]
    Io {
        /// What was tried on what, to follow "cannot".
        action: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A command on the build machine failed.
    #[error("{command} failed ({status}); its last output:\n{output}")]
    Command {
        /// The program and its arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines it printed.
        output: String,
    },
    /// A command on the build machine failed after it told the user why.
    #[error("{command} failed ({status})")]
    Failed {
        /// The program and its arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// A command on the build machine did not end in time.
    #[error("{command} did not end within {limit:?}; its last output:\n{output}")]
    CommandTimeout {
        /// The program and its arguments.
        command: String,
        /// How long it was given.
        limit: Duration,
        /// The last lines it printed.
        output: String,
    },
    /// Something the lab needs is not there and cannot be installed.
    #[error("{what} is missing: {hint}")]
    Missing {
        /// The missing thing.
        what: String,
        /// What the user can do about it.
        hint: String,
    },
    /// No lab of this name is running.
    #[error("no lab named {name:?} is up (start one with: cargo xtask lab up --name {name})")]
    NotUp {
        /// The lab's name.
        name: String,
    },
    /// A lab of this name is already running.
    #[error("a lab named {name:?} is already up")]
    AlreadyUp {
        /// The lab's name.
        name: String,
    },
    /// The lab itself ended: its kernel, its QEMU, or its agent.
    #[error("the lab died while {doing} (not a test failure); the end of its console:\n{console}")]
    Died {
        /// What was going on.
        doing: String,
        /// The last lines of the lab's serial console.
        console: String,
    },
    /// The lab did not answer in time.
    #[error("{doing} took longer than {limit:?}; the end of the lab's console:\n{console}")]
    Timeout {
        /// What was going on.
        doing: String,
        /// How long it was given.
        limit: Duration,
        /// The last lines of the lab's serial console.
        console: String,
    },
    /// The agent in the lab could not do what it was asked.
    #[error("the lab could not {doing}: {message}")]
    Refused {
        /// What was asked.
        doing: String,
        /// The agent's reason.
        message: String,
    },
    /// The supervising process of a background lab failed.
    #[error("the lab did not come up: {message}")]
    Supervisor {
        /// What it said last.
        message: String,
    },
    /// A path has a form the lab cannot use.
    #[error("cannot use the path {path}: {reason}")]
    Path {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// Turns an I/O error into an [`Error::Io`] that says what was tried.
pub(crate) trait Context<T> {
    /// Adds what was tried; `action` is only called on failure.
    fn context<S: Into<String>>(self, action: impl FnOnce() -> S) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context<S: Into<String>>(self, action: impl FnOnce() -> S) -> Result<T, Error> {
        self.map_err(|source| Error::Io {
            action: action().into(),
            source: source.into(),
        })
    }
}
