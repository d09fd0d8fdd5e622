//! The part of this program that runs inside a container and reports what it finds there.
//!
//! The tests start it under runc and under the runtime under test, and compare the reports.

mod abi;
mod data;
mod identity;
mod intruder;
mod metadata;
mod names;
mod protection;
mod scheduling;
mod spec;
mod stream;
mod syscalls;
mod talk;
pub mod tree;
mod volume;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;

/// What to look at.
#[derive(Debug, clap::Subcommand)]
pub enum Probe {
    /// Everything that a container's specification sets up, as a report.
    Spec,
    /// What happens to files, below this directory, as a report.
    Files {
        /// A directory that is made for it.
        directory: PathBuf,
    },
    /// The metadata and contents of every file below a directory, one line each.
    Tree {
        /// Where to start.
        directory: PathBuf,
    },
    /// Patterns of this length to standard output (seed 1) and standard error (seed 2) at once.
    Stream {
        /// Bytes to each.
        length: u64,
    },
    /// Until its input ends, tries to get at processes that come into the container.
    Watch,
    /// Until its input ends, swaps two names in the current directory.
    Swap {
        /// A name.
        one: PathBuf,
        /// The other.
        other: PathBuf,
    },
    /// Answers everything that is sent to this port with itself, until its input ends.
    Serve {
        /// Of TCP and of UDP.
        port: u16,
    },
    /// Is the other end of a measurement at this TCP port, until its input ends.
    Measured {
        /// Of TCP.
        port: u16,
    },
    /// Sends bytes to a [`Probe::Serve`] and compares what comes back.
    Ask {
        /// HOST:PORT
        partner: String,
        /// How many bytes over TCP.
        length: u64,
    },
    /// What happens to a file or in a directory.
    Events {
        /// What to watch.
        path: PathBuf,
    },
    /// Locks a file and changes it in memory until another process does.
    Call {
        /// The file, which is made.
        file: PathBuf,
    },
    /// Is the other process.
    Answer {
        /// The file.
        file: PathBuf,
    },
    /// Tries to lock a file as another process does.
    #[command(hide = true)]
    Lock {
        /// The file.
        file: PathBuf,
    },
    /// Tries to open a file for reading and then for writing.
    #[command(hide = true)]
    Access {
        /// The file.
        file: PathBuf,
    },
    /// Overwrites the first bytes of a file.
    #[command(hide = true)]
    Overwrite {
        /// The file.
        file: PathBuf,
    },
}

/// What was found, by the name of the question.
pub type Report = BTreeMap<String, String>;

/// Answers on standard output.
pub fn run(probe: &Probe) -> Result<()> {
    match probe {
        Probe::Spec => print(&spec::report()?),
        Probe::Files { directory } => print(&files(directory)?),
        Probe::Tree { directory } => {
            print!("{}", tree::describe(directory)?);
            Ok(())
        }
        Probe::Stream { length } => stream::write(*length),
        Probe::Watch => print(&intruder::watch()?),
        Probe::Swap { one, other } => intruder::swap(one, other),
        Probe::Serve { port } => talk::serve(*port),
        Probe::Measured { port } => talk::measured(*port),
        Probe::Ask { partner, length } => talk::ask(partner, *length),
        Probe::Events { path } => volume::events(path),
        Probe::Call { file } => volume::call(file),
        Probe::Answer { file } => volume::answer(file),
        Probe::Lock { file } => data::lock_as_another(file),
        Probe::Access { file } => metadata::access_as_another(file),
        Probe::Overwrite { file } => data::overwrite_as_another(file),
    }
}

/// Asks every question about files, each in a directory of its own.
fn files(top: &Path) -> Result<Report> {
    let questions = names::QUESTIONS
        .iter()
        .chain(&metadata::QUESTIONS)
        .chain(&data::QUESTIONS);
    let mut report = Report::new();
    for (question, answer) in questions {
        let directory = top.join(question.replace(' ', "-"));
        std::fs::create_dir_all(&directory)?;
        // Should an answer never come, the failed test shows to which question.
        eprintln!("{question}");
        // A failure is an answer as well.
        let answer = answer(&directory).unwrap_or_else(|error| format!("error: {error:#}"));
        report.insert((*question).to_owned(), answer);
    }
    Ok(report)
}

fn print(report: &Report) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(report)?);
    Ok(())
}

/// Finds out what happens to files in an empty directory of its own.
type Answer = fn(&Path) -> Result<String>;

/// A result of a system call as an answer: "ok", or the error's name.
fn outcome<T, E: Into<std::io::Error>>(result: Result<T, E>) -> String {
    match result {
        Ok(_) => "ok".into(),
        Err(error) => errno_name(&error.into()),
    }
}

/// What a file says, or why it cannot be read.
fn text(path: impl AsRef<Path>) -> String {
    match std::fs::read_to_string(path) {
        Ok(text) => text.trim_end().to_owned(),
        Err(error) => errno_name(&error),
    }
}

/// `EPERM` and so on.
fn errno_name(error: &std::io::Error) -> String {
    error.raw_os_error().map_or_else(
        || error.to_string(),
        |number| format!("{:?}", nix::errno::Errno::from_raw(number)),
    )
}
