//! A lane at work: a pair of queues and a tap, served a bounded amount at a time.

use std::{
    mem,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    time::Instant,
};

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{
    HEADER_LEN, Kicks, Limits, MAX_PACKET, Net,
    buffers::Buffers,
    tap::{Sent, Tap},
};
use crate::devices::{
    event_loop,
    virtio::{
        Work,
        mmio::{Inner, Transport},
        queue::{self, Chain},
    },
};

/// The most packets in one direction before it is another device's turn.
const PACKETS_AT_ONCE: usize = 128;

/// A slot with its device. Each lane is served by one thread at a time.
pub struct NetHandler {
    pub(super) transport: Arc<Transport<Net>>,
    kicks: Kicks,
    limits: Limits,
}

/// What the thread of a lane knows of its tap.
#[derive(Debug, Default)]
pub struct LaneState {
    /// There may be a packet.
    pub readable: bool,
    /// It had no room for the last packet, and has not said that it has some now.
    pub full: bool,
    pieces: Vec<libc::iovec>,
    used: Vec<(u16, u32)>,
}

/// How the work of a turn has ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// There is more to do.
    pub more: bool,
    /// There is more to do then.
    pub after: Option<Instant>,
}

impl Turn {
    fn wait(&mut self, until: Instant) {
        self.after = Some(self.after.map_or(until, |after| after.min(until)));
    }
}

/// What a thread borrows of the device for a turn.
struct Borrowed {
    tap: Tap,
    from_guest: Queue,
    to_guest: Queue,
    buffers: Buffers,
    /// The lane whose queue brings packets to the guest, which is another one's if the driver does not
    /// use as many as there are.
    target: usize,
}

impl NetHandler {
    /// Works for the device behind `transport`, whose lanes are notified by `kicks`.
    pub fn new(transport: Arc<Transport<Net>>, kicks: Kicks, limits: Limits) -> Self {
        Self {
            transport,
            kicks,
            limits,
        }
    }

    /// What notifies a lane.
    pub fn kick(&self, lane: usize) -> Option<&EventFd> {
        self.kicks.get(lane).map(|kick| &**kick)
    }

    #[cfg(test)]
    pub(super) fn kicks(&self) -> Kicks {
        self.kicks.clone()
    }

    /// Takes the guest's notification of a lane. Commands come with the first one's.
    pub fn kicked(&self, lane: usize) {
        let Some(kick) = self.kick(lane) else {
            return;
        };
        self.transport.stats.kicked(event_loop::take(kick));
        if lane == 0 {
            self.obey();
        }
        let inner = self.transport.lock();
        if let Some(nic) = &inner.device.nic
            && lane < nic.active
        {
            // There may be room for packets of those that have no queue to the guest themselves.
            let others = lane + nic.active..nic.taps.len();
            for other in others.step_by(nic.active) {
                event_loop::signal(&self.kicks[other]);
            }
        }
    }

    /// Moves packets in both directions, as many as may be at once. `await_room` is called with the tap
    /// when that has no room.
    pub fn serve(
        &self,
        lane: usize,
        state: &mut LaneState,
        await_room: impl FnOnce(RawFd),
    ) -> Turn {
        let mut turn = Turn::default();
        let Some(mut borrowed) = self.borrow(lane) else {
            return turn;
        };
        let result = self
            .transmit(&mut borrowed, state, &mut turn, await_room)
            .and_then(|()| self.receive(&mut borrowed, state, &mut turn));
        self.give_back(lane, borrowed, &result);
        turn
    }

    fn borrow(&self, lane: usize) -> Option<Borrowed> {
        let mut inner = self.transport.lock();
        loop {
            if !inner.is_running() {
                return None;
            }
            let Inner { device, queues, .. } = &mut *inner;
            let nic = device.nic.as_mut()?;
            let target = lane % nic.active;
            // There for one thread at a time, and this one.
            let Some(buffers) = nic.buffers.get_mut(target)?.take() else {
                inner = self.transport.wait(inner);
                continue;
            };
            let Some(tap) = nic.taps.get_mut(lane).and_then(Option::take) else {
                nic.buffers[target] = Some(buffers);
                return None;
            };
            let borrowed = Borrowed {
                tap,
                from_guest: lend(&mut queues[2 * lane + 1]),
                to_guest: lend(&mut queues[2 * target]),
                buffers,
                target,
            };
            inner.in_flight += 1;
            return Some(borrowed);
        }
    }

    fn give_back(&self, lane: usize, borrowed: Borrowed, result: &Work) {
        let mut inner = self.transport.lock();
        let Inner { device, queues, .. } = &mut *inner;
        // What is lent keeps the device and its queues from being exchanged or reset.
        queues[2 * lane + 1] = borrowed.from_guest;
        queues[2 * borrowed.target] = borrowed.to_guest;
        if let Some(nic) = &mut device.nic {
            nic.taps[lane] = Some(borrowed.tap);
            nic.buffers[borrowed.target] = Some(borrowed.buffers);
        }
        if result.is_err() {
            self.transport.stop(&mut inner);
        }
        self.transport.settle(&mut inner);
    }

    fn transmit(
        &self,
        borrowed: &mut Borrowed,
        state: &mut LaneState,
        turn: &mut Turn,
        await_room: impl FnOnce(RawFd),
    ) -> Work {
        let (tap, queue) = (&borrowed.tap, &mut borrowed.from_guest);
        if !queue.ready() || state.full {
            return Ok(());
        }
        let memory = &self.transport.memory;
        let before = queue.next_used();
        let mut chain = Chain::default();
        queue::disable_notification(queue, memory)?;
        turn.more = true;
        for _ in 0..PACKETS_AT_ONCE {
            if let Some(until) = self.limits.from_guest.wait() {
                turn.more = false;
                turn.wait(until);
                break;
            }
            if !queue::pop_into(queue, memory, &mut chain)? {
                if queue::enable_notification(queue, memory)? {
                    continue;
                }
                turn.more = false;
                break;
            }
            let length = queue::total(&chain.readable);
            // No packet is shorter than its header, and no tap takes one that is longer.
            if (HEADER_LEN + 1..=MAX_PACKET).contains(&length) {
                if tap.send(&chain.readable, &mut state.pieces) == Sent::Full {
                    queue::unpop(queue);
                    state.full = true;
                    turn.more = false;
                    await_room(tap.as_raw_fd());
                    break;
                }
                self.transport.stats.from_guest(length - HEADER_LEN);
            }
            self.limits.from_guest.passed(length);
            queue::push(queue, memory, chain.head, 0)?;
        }
        queue::notify_since(queue, memory, &self.transport.interrupt, before)
    }

    fn receive(&self, borrowed: &mut Borrowed, state: &mut LaneState, turn: &mut Turn) -> Work {
        let (tap, queue) = (&borrowed.tap, &mut borrowed.to_guest);
        let buffers = &mut borrowed.buffers;
        if !queue.ready() || !state.readable {
            return Ok(());
        }
        let memory = &self.transport.memory;
        let before = queue.next_used();
        let mut chain = Chain::default();
        let mut left = PACKETS_AT_ONCE;
        queue::disable_notification(queue, memory)?;
        while state.readable {
            if let Some(until) = self.limits.to_guest.wait() {
                turn.wait(until);
                break;
            }
            if left == 0 {
                turn.more = true;
                break;
            }
            left -= 1;
            if !buffers.fill(queue, memory, &mut chain)? {
                break;
            }
            // SAFETY: pieces of the guest's memory, which the transport keeps mapped.
            let Some(length) = (unsafe { tap.receive(buffers.pieces()) }) else {
                state.readable = false;
                break;
            };
            // What is shorter than its header is no packet of a tap's.
            if length > HEADER_LEN {
                self.transport.stats.to_guest(length - HEADER_LEN);
                self.limits.to_guest.passed(length);
                buffers.give_back(length, queue, memory, &mut state.used)?;
            }
        }
        queue::notify_since(queue, memory, &self.transport.interrupt, before)
    }
}

/// Takes a queue out. What stays in its place looks like it to the guest.
fn lend(queue: &mut Queue) -> Queue {
    let stays = Queue::try_from(queue.state()).unwrap_or_default();
    mem::replace(queue, stays)
}
