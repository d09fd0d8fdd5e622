//! The thread that works for the devices that never wait: it sleeps in epoll_wait(2) until the
//! guest has notified one of them or a descriptor of theirs is ready.

use std::{io, os::fd::AsRawFd, sync::Arc, thread::JoinHandle};

use thiserror::Error;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use crate::{
    seccomp::Filter,
    thread::{self, ThreadError},
};

/// Handler index of the loop's own event.
const STOP: u64 = u64::MAX;
const EVENTS_AT_ONCE: usize = 64;

/// Failures of an event loop.
#[derive(Debug, Error)]
pub enum EventLoopError {
    /// epoll or eventfd could not be made.
    #[error("Cannot create an event loop")]
    Create(#[source] io::Error),
    /// A descriptor could not be watched.
    #[error("Cannot watch a descriptor")]
    Watch(#[source] io::Error),
    /// The thread could not be started.
    #[error(transparent)]
    Thread(#[from] ThreadError),
}

/// What is called when something happened to a watched descriptor.
pub trait EventHandler: Send + Sync {
    /// `token` is what the descriptor was watched with.
    fn handle(&self, token: u32, events: EventSet);
}

/// Lets one handler watch descriptors. Closing a descriptor ends the watch.
#[derive(Clone)]
pub struct Watcher {
    epoll: Arc<Epoll>,
    handler: u32,
}

impl Watcher {
    /// Watches `descriptor`. An event for one that was closed may still arrive once.
    pub fn watch(
        &self,
        descriptor: &impl AsRawFd,
        token: u32,
        events: EventSet,
    ) -> Result<(), EventLoopError> {
        let data = u64::from(self.handler) << 32 | u64::from(token);
        self.epoll
            .ctl(
                ControlOperation::Add,
                descriptor.as_raw_fd(),
                EpollEvent::new(events, data),
            )
            .map_err(EventLoopError::Watch)
    }
}

/// An event loop without its thread.
pub struct EventLoopBuilder {
    epoll: Arc<Epoll>,
    stop: EventFd,
    handlers: Vec<Arc<dyn EventHandler>>,
}

impl EventLoopBuilder {
    /// A loop that watches nothing yet.
    pub fn new() -> Result<Self, EventLoopError> {
        let epoll = Epoll::new().map_err(EventLoopError::Create)?;
        let stop = EventFd::new(EFD_NONBLOCK).map_err(EventLoopError::Create)?;
        epoll
            .ctl(
                ControlOperation::Add,
                stop.as_raw_fd(),
                EpollEvent::new(EventSet::IN, STOP),
            )
            .map_err(EventLoopError::Watch)?;
        Ok(Self {
            epoll: Arc::new(epoll),
            stop,
            handlers: Vec::new(),
        })
    }

    /// The watcher of the handler that [`Self::add`] is given next.
    pub fn next_watcher(&self) -> Watcher {
        Watcher {
            epoll: self.epoll.clone(),
            handler: u32::try_from(self.handlers.len()).unwrap_or(u32::MAX),
        }
    }

    /// Adds a handler.
    pub fn add(&mut self, handler: Arc<dyn EventHandler>) {
        self.handlers.push(handler);
    }

    /// Starts the thread, under [`Filter::Devices`].
    pub fn spawn(self, name: &'static str) -> Result<EventLoop, EventLoopError> {
        let Self {
            epoll,
            stop,
            handlers,
        } = self;
        let work = move || run(&epoll, &handlers);
        let thread = thread::start(name.to_owned(), Filter::Devices, || Ok(()), work)?;
        Ok(EventLoop {
            stop,
            thread: Some(thread),
        })
    }
}

/// A running event loop. Dropping it ends the thread.
pub struct EventLoop {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        // The counter cannot overflow: it is written once.
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
        {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

fn run(epoll: &Epoll, handlers: &[Arc<dyn EventHandler>]) {
    let mut events = [EpollEvent::default(); EVENTS_AT_ONCE];
    while let Some(count) = wait(epoll, &mut events) {
        for event in &events[..count] {
            let data = event.data();
            if data == STOP {
                return;
            }
            let handler = usize::try_from(data >> 32).ok();
            let token = u32::try_from(data & u64::from(u32::MAX)).unwrap_or(0);
            if let Some(handler) = handler.and_then(|index| handlers.get(index)) {
                handler.handle(token, event.event_set());
            }
        }
    }
}

/// Waits without a limit, or returns nothing when the epoll descriptor is no longer usable.
pub fn wait(epoll: &Epoll, events: &mut [EpollEvent]) -> Option<usize> {
    wait_for(epoll, -1, events)
}

/// Waits for so many milliseconds, or without a limit if they are negative. A signal makes it longer.
pub fn wait_for(epoll: &Epoll, milliseconds: i32, events: &mut [EpollEvent]) -> Option<usize> {
    loop {
        match epoll.wait(milliseconds, events) {
            Ok(count) => {
                #[cfg(feature = "back-door")]
                crate::back_door::visit();
                return Some(count);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

/// Adds to an eventfd that something has happened; one that is full already says so.
pub fn signal(event: &EventFd) {
    let _ = event.write(1);
}

/// How often an eventfd was signalled since the last call; 0 when it was not.
pub fn take(event: &EventFd) -> u64 {
    event.read().unwrap_or(0)
}
