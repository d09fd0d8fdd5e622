//! Socket device (section 5.10) with its muxer in this process: each connection that the guest
//! dials becomes a pair of sockets, of which the host gets one.
//!
//! Nothing on the host can dial the guest.

#[cfg(test)]
mod confined;
mod connection;
mod header;
mod muxer;
#[cfg(test)]
mod tests;

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;

use self::{
    header::{GUEST_CID, Header},
    muxer::{Dial, Muxer},
};
use super::{
    Device, Work,
    mmio::{RestoreError, Transport, TransportState},
    queue::{self, QueueError},
};
use crate::devices::event_loop::{self, EventHandler, EventLoopError, Watcher};

const DEVICE_ID: u32 = 19;
/// Packets to the guest, packets from the guest, events. The guest fills the first with buffers of
/// 4 KiB, so its size is guest memory; that of the last is fixed by Linux's driver.
const QUEUE_SIZES: &[u16] = &[64, 64, 8];
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone (section 5.10.6.7).
const EVENT_TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Token of the guest's notifications; other tokens are connections.
const KICK: u32 = u32::MAX;

/// The device.
pub struct Vsock {
    config: [u8; 8],
    muxer: Muxer,
    /// The guest does not know yet that its connections did not survive a restore.
    reset_guest: bool,
}

impl Vsock {
    /// A device whose connections are handed to `accept`, each with its port. It refuses a
    /// connection by returning false, and must not block.
    pub fn new(
        watcher: Watcher,
        accept: impl FnMut(u32, OwnedFd) -> bool + Send + 'static,
    ) -> Self {
        Self::with_dial(Box::new(Dialler { watcher, accept }))
    }

    fn with_dial(dial: Box<dyn Dial>) -> Self {
        Self {
            config: GUEST_CID.to_le_bytes(),
            muxer: Muxer::new(dial),
            reset_guest: false,
        }
    }

    fn work(&mut self, queues: &mut [Queue], context: &Transport<Self>) -> Work {
        let [to_guest, from_guest, events] = queues else {
            return Ok(());
        };
        self.send_event(events, context)?;
        queue::disable_notification(from_guest, &context.memory)?;
        loop {
            self.send_packets(to_guest, context)?;
            if !self.receive_packets(from_guest, context)? {
                break;
            }
        }
        Ok(())
    }

    fn send_event(&mut self, events: &mut Queue, context: &Transport<Self>) -> Work {
        if !self.reset_guest {
            return Ok(());
        }
        let memory = &context.memory;
        if let Some(chain) = queue::pop(events, memory)? {
            let length = queue::scatter(&chain.writable, &EVENT_TRANSPORT_RESET);
            queue::push(events, memory, chain.head, length)?;
            queue::notify(events, memory, &context.interrupt)?;
            self.reset_guest = false;
        }
        Ok(())
    }

    fn send_packets(&mut self, queue: &mut Queue, context: &Transport<Self>) -> Work {
        let memory = &context.memory;
        queue::disable_notification(queue, memory)?;
        while self.muxer.has_packet() {
            let Some(chain) = queue::pop(queue, memory)? else {
                // The guest is to say when it has room again.
                if queue::enable_notification(queue, memory)? {
                    continue;
                }
                break;
            };
            if queue::total(&chain.writable) < Header::LEN {
                return Err(QueueError::TooSmall);
            }
            if let Some(length) = self.muxer.send(&chain.writable) {
                context.stats.to_guest(length - Header::LEN);
                queue::push(queue, memory, chain.head, length)?;
            } else {
                queue::unpop(queue);
            }
        }
        queue::notify(queue, memory, &context.interrupt)
    }

    /// Returns whether it did anything.
    fn receive_packets(
        &mut self,
        queue: &mut Queue,
        context: &Transport<Self>,
    ) -> Result<bool, QueueError> {
        let memory = &context.memory;
        let mut received = false;
        // When it cannot go on, room for packets to the guest is missing, and the guest's word of
        // new room brings us here again.
        while self.muxer.can_receive() {
            if let Some(chain) = queue::pop(queue, memory)? {
                let length = self.muxer.receive(&chain.readable);
                context.stats.from_guest(length);
                queue::push(queue, memory, chain.head, 0)?;
                received = true;
            } else if !queue::enable_notification(queue, memory)? {
                break;
            }
        }
        queue::notify(queue, memory, &context.interrupt)?;
        Ok(received)
    }
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn reset(&mut self) {
        self.muxer.clear();
        self.reset_guest = false;
    }
}

/// The saved device. Connections end with the process that holds the host's sockets, so they are
/// not part of it: after a restore the guest is told that they are gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    transport: TransportState,
}

/// The device at work.
pub struct VsockHandler {
    transport: Arc<Transport<Vsock>>,
}

impl VsockHandler {
    /// Works for the device behind `transport`.
    pub fn new(transport: Arc<Transport<Vsock>>) -> Self {
        Self { transport }
    }

    /// Watches the guest's notifications.
    pub fn watch(&self, watcher: &Watcher) -> Result<(), EventLoopError> {
        watcher.watch(&self.transport.kick, KICK, EventSet::IN)
    }

    /// Takes down the device.
    pub fn save(&self) -> State {
        State {
            transport: self.transport.save(),
        }
    }

    /// Puts a saved device into a new one, and tells the guest that its connections are gone.
    pub fn restore(&self, state: &State) -> Result<(), RestoreError> {
        self.transport.restore(&state.transport)?;
        self.transport.lock().device.reset_guest = true;
        self.transport
            .run(|device, queues| device.work(queues, &self.transport));
        Ok(())
    }
}

impl EventHandler for VsockHandler {
    fn handle(&self, token: u32, events: EventSet) {
        let transport = &self.transport;
        if token == KICK {
            transport.stats.kicked(event_loop::take(&transport.kick));
        }
        transport.run(|device, queues| {
            if token != KICK {
                let closed = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
                let readable = events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
                let writable = events.contains(EventSet::OUT);
                device.muxer.host_ready(token, readable, writable, closed);
            }
            device.work(queues, transport)
        });
    }
}

/// Makes socket pairs.
struct Dialler<A> {
    watcher: Watcher,
    accept: A,
}

impl<A: FnMut(u32, OwnedFd) -> bool + Send> Dial for Dialler<A> {
    fn dial(&mut self, port: u32, id: u32) -> Option<UnixStream> {
        let (ours, theirs) = UnixStream::pair().ok()?;
        ours.set_nonblocking(true).ok()?;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP;
        self.watcher
            .watch(&ours, id, events | EventSet::EDGE_TRIGGERED)
            .ok()?;
        (self.accept)(port, theirs.into()).then_some(ours)
    }
}
