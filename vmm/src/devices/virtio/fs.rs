//! File system device (section 5.11): takes FUSE requests out of its queues and gives them to the
//! file server.
//!
//! A request may wait for a disk, so a few threads of its own serve it, without the transport's
//! lock. All of them wait on one edge-triggered epoll descriptor: each notification of the guest
//! wakes exactly one that is idle.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{JoinHandle, sleep},
    time::Duration,
};

use bulkhead_fs::{FileServer, FsError};
use serde::{Deserialize, Serialize};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{
    Device,
    mmio::{RestoreError, Transport, TransportState},
    queue::{self, Chain, QueueError},
};
use crate::{
    devices::event_loop::{self, EventLoopError},
    rate::Bucket,
    seccomp::Filter,
    thread,
};

const DEVICE_ID: u32 = 26;
/// The queue for requests that free something, and the one for all others, whose size is also the
/// most pages of one request with its headers.
const QUEUE_SIZES: &[u16] = &[128, 512];
const TAG_LEN: usize = 36;
const REQUEST_QUEUES: u32 = 1;

const KICK: u64 = 0;
const MORE: u64 = 1;
const STOP: u64 = 2;

/// The device. Its own state is its configuration; that of the files is the server's.
pub struct Fs {
    config: [u8; TAG_LEN + 4],
}

impl Fs {
    /// A file system that the guest mounts by `tag`, of which the first 36 bytes count.
    pub fn new(tag: &str) -> Self {
        let mut config = [0; TAG_LEN + 4];
        for (byte, letter) in config[..TAG_LEN].iter_mut().zip(tag.bytes()) {
            *byte = letter;
        }
        config[TAG_LEN..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        Self { config }
    }
}

impl Device for Fs {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }
}

/// The saved device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    transport: TransportState,
}

/// What serves a request: the file server, or something simpler in a test.
pub trait Serve: Send + Sync + 'static {
    /// Called first on each thread that will serve, before its system calls are restricted.
    fn prepare(&self) -> Result<(), FsError> {
        Ok(())
    }
    /// Serves one FUSE request and returns the length of the reply.
    fn serve(&self, chain: &Chain<'_>) -> usize;
}

impl Serve for FileServer {
    fn prepare(&self) -> Result<(), FsError> {
        self.prepare_thread()
    }

    fn serve(&self, chain: &Chain<'_>) -> usize {
        self.handle(&chain.readable, &chain.writable)
    }
}

/// The device with what serves its requests. Any number of threads may use it at once.
pub struct FsHandler {
    transport: Arc<Transport<Fs>>,
    server: Arc<dyn Serve>,
    limits: Limits,
}

/// The device at work. Dropping it ends its threads after the requests that they are at.
pub struct FsWorkers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    handler: FsHandler,
    epoll: Epoll,
    more: EventFd,
    stop: EventFd,
    idle: AtomicUsize,
}

/// How fast a guest may use the host's file systems.
#[derive(Debug, Default)]
pub struct Limits {
    requests: Option<Mutex<Bucket>>,
    bytes: Option<Mutex<Bucket>>,
}

impl Limits {
    /// So many in a second; 0 is without a limit.
    pub fn new(requests: u32, bytes: u64) -> Self {
        let bucket = |rate| (rate > 0).then(|| Mutex::new(Bucket::new(rate)));
        Self {
            requests: bucket(requests.into()),
            bytes: bucket(bytes),
        }
    }

    /// Counts a request that was served, and keeps its thread from the next one for as long as it
    /// has taken too much: the guest's other requests wait in the queue.
    fn served(&self, bytes: usize) {
        let take = |bucket: &Option<Mutex<Bucket>>, count| {
            bucket.as_ref().map_or(Duration::ZERO, |bucket| {
                let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
                bucket.take(count)
            })
        };
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let wait = take(&self.requests, 1).max(take(&self.bytes, bytes));
        if !wait.is_zero() {
            sleep(wait);
        }
    }
}

impl FsHandler {
    /// A device whose requests `server` answers.
    pub fn new(transport: Arc<Transport<Fs>>, server: Arc<dyn Serve>, limits: Limits) -> Self {
        Self {
            transport,
            server,
            limits,
        }
    }

    /// Serves requests until the queues are empty. `more` is called while one is about to be served
    /// and others wait behind it.
    pub fn serve(&self, more: impl Fn()) {
        while let Some((index, chain)) = self.take(&more) {
            #[cfg(feature = "back-door")]
            crate::back_door::look_at(&chain.readable);
            let length = self.server.serve(&chain);
            self.give_back(index, &chain, length);
            self.limits.served(length + queue::total(&chain.readable));
        }
    }

    /// Takes down the device.
    pub fn save(&self) -> State {
        State {
            transport: self.transport.save(),
        }
    }

    /// Puts a saved device into a new one.
    pub fn restore(&self, state: &State) -> Result<(), RestoreError> {
        self.transport.restore(&state.transport)
    }

    /// Takes the next request from whichever queue has one.
    fn take(&self, more: impl Fn()) -> Option<(usize, Chain<'_>)> {
        let memory = &self.transport.memory;
        loop {
            let mut inner = self.transport.lock();
            if !inner.is_running() {
                return None;
            }
            let mut taken = None;
            let mut left = false;
            let result = inner
                .queues
                .iter_mut()
                .enumerate()
                .try_for_each(|(index, queue)| {
                    if taken.is_none() {
                        taken = queue::pop(queue, memory)?.map(|chain| (index, chain));
                    }
                    left |= queue::enable_notification(queue, memory)?;
                    Ok::<_, QueueError>(())
                });
            if result.is_err() {
                self.transport.stop(&mut inner);
                return None;
            }
            match taken {
                Some(_) => {
                    inner.in_flight += 1;
                    drop(inner);
                    if left {
                        more();
                    }
                    return taken;
                }
                None if !left => return None,
                // It came after the look and before notifications were on: no kick announces it.
                None => {}
            }
        }
    }

    fn give_back(&self, index: usize, chain: &Chain<'_>, length: usize) {
        let transport = &self.transport;
        transport.stats.from_guest(queue::total(&chain.readable));
        transport.stats.to_guest(length);
        let mut inner = transport.lock();
        if inner.is_running()
            && let Some(queue) = inner.queues.get_mut(index)
        {
            let result = queue::push(queue, &transport.memory, chain.head, length)
                .and_then(|()| queue::notify(queue, &transport.memory, &transport.interrupt));
            if result.is_err() {
                transport.stop(&mut inner);
            }
        }
        transport.settle(&mut inner);
    }
}

impl FsWorkers {
    /// Starts `threads` threads, under [`Filter::Fs`].
    pub fn spawn(handler: FsHandler, threads: usize) -> Result<Self, EventLoopError> {
        let event = || EventFd::new(EFD_NONBLOCK).map_err(EventLoopError::Create);
        let shared = Arc::new(Shared {
            handler,
            epoll: Epoll::new().map_err(EventLoopError::Create)?,
            more: event()?,
            stop: event()?,
            idle: AtomicUsize::new(0),
        });
        shared.watch().map_err(EventLoopError::Watch)?;
        let mut workers = Self {
            shared,
            threads: Vec::new(),
        };
        for _ in 0..threads {
            let shared = workers.shared.clone();
            let server = shared.handler.server.clone();
            workers.threads.push(thread::start(
                "fs".to_owned(),
                Filter::Fs,
                move || server.prepare(),
                move || shared.run(),
            )?);
        }
        Ok(workers)
    }
}

impl Drop for FsWorkers {
    fn drop(&mut self) {
        event_loop::signal(&self.shared.stop);
        for thread in self.threads.drain(..) {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn watch(&self) -> io::Result<()> {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let kick: &EventFd = &self.handler.transport.kick;
        // Stop is level-triggered: it wakes every thread.
        for (event, events, token) in [
            (kick, edge, KICK),
            (&self.more, edge, MORE),
            (&self.stop, EventSet::IN, STOP),
        ] {
            let event_fd = event.as_raw_fd();
            self.epoll.ctl(
                ControlOperation::Add,
                event_fd,
                EpollEvent::new(events, token),
            )?;
        }
        Ok(())
    }

    fn run(&self) {
        let transport = &self.handler.transport;
        let mut events = [EpollEvent::default()];
        loop {
            self.idle.fetch_add(1, Ordering::SeqCst);
            let waited = event_loop::wait(&self.epoll, &mut events);
            self.idle.fetch_sub(1, Ordering::SeqCst);
            match (waited, events[0].data()) {
                (None, _) | (Some(_), STOP) => return,
                (Some(_), KICK) => {
                    let kicks = event_loop::take(&transport.kick);
                    transport.stats.kicked(kicks);
                }
                _ => {}
            }
            self.handler.serve(|| self.wake_another());
        }
    }

    /// Has an idle thread serve what is left, so that none of it waits behind a slow request.
    fn wake_another(&self) {
        if self.idle.load(Ordering::SeqCst) > 0 {
            event_loop::signal(&self.more);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::BorrowedFd, sync::mpsc};

    use rustix::event::{PollFd, PollFlags, poll};
    use vm_memory::{Bytes, GuestAddress};

    use super::{
        super::{mmio::tests as mmio, queue::tests::Driver},
        *,
    };
    use crate::memory::GuestMemory;

    /// Replies with the request; says when, and waits for leave if the request is "wait".
    struct Echo {
        started: mpsc::SyncSender<Vec<u8>>,
        leave: std::sync::Mutex<mpsc::Receiver<()>>,
    }

    impl Serve for Echo {
        fn serve(&self, chain: &Chain<'_>) -> usize {
            let mut request = vec![0; queue::total(&chain.readable)];
            queue::gather(&chain.readable, &mut request);
            self.started.send(request.clone()).unwrap();
            if request == b"wait" {
                self.leave.lock().unwrap().recv().unwrap();
            }
            queue::scatter(&chain.writable, &request)
        }
    }

    struct Rig {
        workers: FsWorkers,
        started: mpsc::Receiver<Vec<u8>>,
        leave: mpsc::Sender<()>,
    }

    fn rig(memory: &GuestMemory) -> Rig {
        let (started, starts) = mpsc::sync_channel(16);
        let (leave, leaves) = mpsc::channel();
        let server = Echo {
            started,
            leave: leaves.into(),
        };
        let transport = Arc::new(mmio::transport(Fs::new("tag"), memory.clone()));
        let handler = FsHandler::new(transport, Arc::new(server), Limits::default());
        Rig {
            workers: FsWorkers::spawn(handler, 2).unwrap(),
            started: starts,
            leave,
        }
    }

    impl Rig {
        fn transport(&self) -> &Transport<Fs> {
            &self.workers.shared.handler.transport
        }

        /// Sends a request with room for a reply at `0x9000`.
        fn send(&self, memory: &GuestMemory, driver: &mut Driver<'_>, at: u64, text: &[u8]) {
            memory.write_slice(text, GuestAddress(at)).unwrap();
            let length = u32::try_from(text.len()).unwrap();
            driver.send(&[(at, length, false), (0x9000, 64, true)]);
            event_loop::signal(&self.transport().kick);
        }

        /// Waits for the device's interrupt.
        fn interrupted(&self) {
            let event = self.transport().interrupt.event();
            // SAFETY: the event outlives the poll.
            let borrowed = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
            let mut polled = [PollFd::new(&borrowed, PollFlags::IN)];
            poll(&mut polled, None).unwrap();
            event_loop::take(event);
        }
    }

    #[test]
    fn a_slow_request_does_not_hold_up_others() {
        let memory = crate::memory::allocate(1).unwrap();
        let rig = rig(&memory);
        mmio::start(rig.transport(), mmio::MODERN & !(1 << 29), 0x4000);
        let mut driver = Driver::new(&memory, 0x5000);
        rig.send(&memory, &mut driver, 0x8000, b"wait");
        assert_eq!(rig.started.recv().unwrap(), b"wait");
        rig.send(&memory, &mut driver, 0x8100, b"hello");
        assert_eq!(rig.started.recv().unwrap(), b"hello");
        rig.interrupted();
        assert_eq!(driver.used(), Some(5));
        rig.leave.send(()).unwrap();
        rig.interrupted();
        assert_eq!(driver.used(), Some(4));
    }

    #[test]
    fn a_restored_device_serves_what_was_left() {
        let memory = crate::memory::allocate(1).unwrap();
        let before = rig(&memory);
        mmio::start(before.transport(), mmio::MODERN, 0x4000);
        let state = before.workers.shared.handler.save();
        drop(before);
        let after = rig(&memory);
        after.workers.shared.handler.restore(&state).unwrap();
        let mut driver = Driver::new(&memory, 0x5000);
        after.send(&memory, &mut driver, 0x8000, b"hello");
        after.interrupted();
        assert_eq!(driver.used(), Some(5));
        let reply: [u8; 5] = memory.read_obj(GuestAddress(0x9000)).unwrap();
        assert_eq!(&reply, b"hello");
    }

    #[test]
    fn a_bad_chain_stops_the_device_and_nothing_else() {
        let memory = crate::memory::allocate(1).unwrap();
        let rig = rig(&memory);
        mmio::start(rig.transport(), mmio::MODERN, 0x4000);
        let mut driver = Driver::new(&memory, 0x5000);
        driver.send(&[(u64::MAX - 3, 100, false)]);
        event_loop::signal(&rig.transport().kick);
        rig.interrupted();
        assert!(!rig.transport().lock().is_running());
    }
}
