//! One process of a container: the container's own or one that was exec'd.
//!
//! ```text
//! Created ──start──▶ Starting ──▶ Running ──▶ Stopped
//!    └── killed or start failed ────────────────▲
//! ```

use std::sync::{
    Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::watch;

use crate::{
    agent_client::Exit,
    spec::ConsoleSize,
    stdio::{Paths, StdioError, Streaming},
};

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Set up, or only registered, and not started.
    Created,
    /// Being started.
    Starting,
    /// Started.
    Running,
    /// Ended, with its streams perhaps still being read.
    Stopped(Exit),
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Empty for the container's own.
    pub exec_id: String,
    /// What containerd named for its streams.
    pub paths: Paths,
    pid: OnceLock<u32>,
    phase: watch::Sender<Phase>,
    size: Mutex<ConsoleSize>,
    streaming: Mutex<Option<Streaming>>,
    /// containerd may close the input of an exec before its streams are open.
    input_closed: AtomicBool,
}

impl Process {
    /// A created process.
    pub fn new(exec_id: String, paths: Paths, size: ConsoleSize) -> Self {
        Self {
            exec_id,
            paths,
            pid: OnceLock::new(),
            phase: watch::Sender::new(Phase::Created),
            size: Mutex::new(size),
            streaming: Mutex::default(),
            input_closed: AtomicBool::new(false),
        }
    }

    /// The anchor's process id; 0 as long as there is none.
    pub fn pid(&self) -> u32 {
        self.pid.get().copied().unwrap_or(0)
    }

    /// Notes the anchor's process id, once.
    pub fn set_pid(&self, pid: u32) {
        let _ = self.pid.set(pid);
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Its end, if it has ended.
    pub fn exit(&self) -> Option<Exit> {
        match self.phase() {
            Phase::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// Goes from Created to Starting. Returns the phase in which that is not possible.
    pub fn begin_start(&self) -> Result<(), Phase> {
        let mut refused = None;
        self.phase.send_if_modified(|phase| match phase {
            Phase::Created => {
                *phase = Phase::Starting;
                true
            }
            other => {
                refused = Some(*other);
                false
            }
        });
        refused.map_or(Ok(()), Err)
    }

    /// Goes from Starting to Running. What is published before this comes before the exit.
    pub fn started(&self) {
        self.leave_starting(Phase::Running);
    }

    /// Goes from Starting back to Created, because the start failed.
    pub fn not_started(&self) {
        self.leave_starting(Phase::Created);
    }

    fn leave_starting(&self, next: Phase) {
        self.phase.send_if_modified(|phase| {
            let starting = *phase == Phase::Starting;
            if starting {
                *phase = next;
            }
            starting
        });
    }

    /// Waits until no start is in progress.
    pub async fn settled(&self) {
        let mut phase = self.phase.subscribe();
        // The sender is part of this.
        let _ = phase.wait_for(|phase| *phase != Phase::Starting).await;
    }

    /// Goes to Stopped, and releases whoever waits. The first end counts; returns whether this was
    /// it.
    pub fn stopped(&self, exit: Exit) -> bool {
        self.phase.send_if_modified(|phase| {
            let running = !matches!(phase, Phase::Stopped(_));
            if running {
                *phase = Phase::Stopped(exit);
            }
            running
        })
    }

    /// Waits for the end.
    pub async fn wait(&self) -> Exit {
        let mut phase = self.phase.subscribe();
        loop {
            if let Phase::Stopped(exit) = *phase.borrow_and_update() {
                return exit;
            }
            if phase.changed().await.is_err() {
                return Exit::now(crate::child::KILLED);
            }
        }
    }

    /// Size of the terminal.
    pub fn size(&self) -> ConsoleSize {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers the size of the terminal.
    pub fn set_size(&self, size: ConsoleSize) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = size;
    }

    fn streaming(&self) -> MutexGuard<'_, Option<Streaming>> {
        self.streaming
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over the open streams.
    pub fn set_streaming(&self, mut streaming: Streaming) {
        if self.input_closed.load(Ordering::Relaxed) {
            streaming.close_input();
        }
        *self.streaming() = Some(streaming);
    }

    /// Opens the input, when the process is about to start.
    pub fn open_input(&self) -> Result<(), StdioError> {
        match &mut *self.streaming() {
            Some(streaming) => streaming.open_input(),
            None => Ok(()),
        }
    }

    /// Lets the input end, also one that is opened later.
    pub fn close_input(&self) {
        self.input_closed.store(true, Ordering::Relaxed);
        if let Some(streaming) = &mut *self.streaming() {
            streaming.close_input();
        }
    }

    /// Closes the streams at once.
    pub fn drop_streaming(&self) {
        self.streaming().take();
    }

    /// Waits for the last output, within a deadline, and closes the streams.
    pub async fn drain(&self) {
        let streaming = self.streaming().take();
        if let Some(streaming) = streaming {
            streaming.drain().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Process {
        Process::new(String::new(), Paths::default(), ConsoleSize::default())
    }

    #[test]
    fn a_process_starts_once() {
        let process = process();
        assert_eq!(process.begin_start(), Ok(()));
        assert_eq!(process.begin_start(), Err(Phase::Starting));
        process.started();
        assert_eq!(process.phase(), Phase::Running);
        process.not_started();
        assert_eq!(process.phase(), Phase::Running);
    }

    #[tokio::test]
    async fn the_first_end_counts_and_releases_every_waiter() {
        let process = process();
        let (first, second) = (Exit::now(3), Exit::now(4));
        let waiters = async { tokio::join!(process.wait(), process.wait()) };
        let end = async {
            assert!(process.stopped(first));
            assert!(!process.stopped(second));
        };
        let (exits, ()) = tokio::join!(waiters, end);
        assert_eq!(exits, (first, first));
        assert_eq!(process.begin_start(), Err(Phase::Stopped(first)));
    }

    #[tokio::test]
    async fn an_end_during_the_start_waits_for_it() {
        let process = process();
        process.begin_start().unwrap();
        let order = std::cell::RefCell::new(Vec::new());
        tokio::join!(
            async {
                process.settled().await;
                order.borrow_mut().push("settled");
            },
            async {
                order.borrow_mut().push("started");
                process.started();
            }
        );
        assert_eq!(*order.borrow(), ["started", "settled"]);
    }
}
