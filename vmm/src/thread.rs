//! Threads of a VM, each under the system call filter that it works with.

use std::{
    io,
    sync::mpsc,
    thread::{Builder, JoinHandle},
};

use bulkhead_fs::FsError;
use thiserror::Error;

use crate::seccomp::{Filter, SeccompError};

/// Failures to start a thread.
#[derive(Debug, Error)]
pub enum ThreadError {
    /// The system has no thread for us.
    #[error("Cannot start the thread {0}")]
    Spawn(String, #[source] io::Error),
    /// Its system calls could not be restricted.
    #[error("Cannot confine the thread {0}")]
    Confine(String, #[source] SeccompError),
    /// A thread for files could not be made ready.
    #[error("Cannot start the thread {0}")]
    Prepare(String, #[source] FsError),
    /// It ended instead.
    #[error("The thread {0} ended before it was ready")]
    Ended(String),
}

/// Starts a thread that calls `prepare`, installs `filter` and then does `work`. Returns when the
/// filter is in place; where that fails, the thread has ended without doing any work.
pub fn start(
    name: String,
    filter: Filter,
    prepare: impl FnOnce() -> Result<(), FsError> + Send + 'static,
    work: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, ThreadError> {
    let (ready, answer) = mpsc::sync_channel(1);
    let thread_name = name.clone();
    let body = move || {
        let confine = |name: &String| {
            prepare().map_err(|source| ThreadError::Prepare(name.clone(), source))?;
            filter
                .install()
                .map_err(|source| ThreadError::Confine(name.clone(), source))
        };
        let result = confine(&thread_name);
        let confined = result.is_ok();
        // The caller waits for it.
        let _ = ready.send(result);
        if confined {
            work();
        }
    };
    let thread = Builder::new()
        .name(name.clone())
        .spawn(body)
        .map_err(|source| ThreadError::Spawn(name.clone(), source))?;
    match answer.recv().unwrap_or(Err(ThreadError::Ended(name))) {
        Ok(()) => Ok(thread),
        Err(error) => {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn a_thread_that_is_not_ready_does_no_work() {
        let worked = Arc::new(Mutex::new(false));
        let start = |prepared: Result<(), FsError>| {
            let worked = worked.clone();
            let work = move || *worked.lock().unwrap() = true;
            start("test".to_owned(), Filter::Fs, || prepared, work)
        };
        let error = start(Err(FsError::Unknown(String::new()))).unwrap_err();
        assert!(matches!(error, ThreadError::Prepare(..)), "{error}");
        assert!(!*worked.lock().unwrap());
        start(Ok(())).unwrap().join().unwrap();
        assert!(*worked.lock().unwrap());
    }
}
