//! The threads of all network devices, one for each lane.

use std::{
    mem,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bulkhead_vmm_control::NICS;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{Interface, LaneState, MIN_MTU, NetHandler, NicError};
use crate::{
    devices::event_loop::{self, EventLoopError},
    seccomp::Filter,
    thread,
};

/// Events of a slot: the guest's notification, and those of its tap.
const KICK: u64 = 0;
const TAP: u64 = 1;
/// The threads are to end.
const STOP: u64 = u64::MAX;
const EVENTS_AT_ONCE: usize = 2 * NICS as usize + 1;
/// A tap is watched once and for all.
const TAP_EVENTS: EventSet = EventSet::from_bits_truncate(
    EventSet::IN.bits() | EventSet::OUT.bits() | EventSet::EDGE_TRIGGERED.bits(),
);

/// All network devices of a VM at work. Dropping it ends their threads.
pub struct NetWorkers {
    slots: Arc<[NetHandler]>,
    lanes: Vec<Arc<Epoll>>,
    stop: EventFd,
    threads: Vec<JoinHandle<()>>,
}

impl NetWorkers {
    /// Starts a thread for each of `lanes` lanes, under [`Filter::Net`].
    pub fn spawn(slots: Vec<NetHandler>, lanes: usize) -> Result<Self, EventLoopError> {
        let mut workers = Self {
            slots: slots.into(),
            lanes: Vec::new(),
            stop: EventFd::new(EFD_NONBLOCK).map_err(EventLoopError::Create)?,
            threads: Vec::new(),
        };
        for index in 0..lanes {
            let epoll = Arc::new(Epoll::new().map_err(EventLoopError::Create)?);
            watch(&epoll, workers.stop.as_raw_fd(), EventSet::IN, STOP)?;
            for (slot, handler) in (0..).zip(&*workers.slots) {
                if let Some(kick) = handler.kick(index) {
                    watch(&epoll, kick.as_raw_fd(), EventSet::IN, token(slot, KICK))?;
                }
            }
            workers.lanes.push(epoll.clone());
            let lane = Lane {
                index,
                epoll,
                slots: workers.slots.clone(),
            };
            let work = move || lane.run();
            let thread = thread::start("net".to_owned(), Filter::Net, || Ok(()), work)?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// Makes a slot a network device. On failure everything is as before, and the taps are closed.
    pub fn attach(&self, slot: u8, interface: Interface) -> Result<(), NicError> {
        let handler = self.slot(slot)?;
        let (count, most) = (interface.taps.len(), self.lanes.len());
        if !(1..=most).contains(&count) {
            return Err(NicError::Queues(count, most));
        }
        if interface.mtu < MIN_MTU {
            return Err(NicError::Mtu(interface.mtu));
        }
        // What happens until there is a device is not lost: its thread looks then.
        let watched = self
            .lanes
            .iter()
            .zip(&interface.taps)
            .try_for_each(|(epoll, tap)| {
                watch(epoll, tap.as_raw_fd(), TAP_EVENTS, token(slot, TAP))
            });
        if let Err(error) = watched {
            self.forget(&interface.taps);
            return Err(NicError::Watch(error));
        }
        handler.attach(interface).map_err(|interface| {
            self.forget(&interface.taps);
            NicError::Taken(slot)
        })
    }

    /// Empties a slot and closes the taps.
    pub fn detach(&self, slot: u8) -> Result<(), NicError> {
        let taps = self.slot(slot)?.detach().ok_or(NicError::Empty(slot))?;
        self.forget(&taps);
        Ok(())
    }

    fn slot(&self, slot: u8) -> Result<&NetHandler, NicError> {
        let found = self.slots.get(usize::from(slot));
        found.ok_or(NicError::NoSlot(slot))
    }

    /// Ends the watch of taps, which closing them does not as long as somebody else has them open.
    fn forget(&self, taps: &[OwnedFd]) {
        for (epoll, tap) in self.lanes.iter().zip(taps) {
            // It fails for one that is not watched yet.
            let _ = epoll.ctl(
                ControlOperation::Delete,
                tap.as_raw_fd(),
                EpollEvent::default(),
            );
        }
    }
}

impl Drop for NetWorkers {
    fn drop(&mut self) {
        event_loop::signal(&self.stop);
        for thread in self.threads.drain(..) {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// One lane of all slots, on its thread.
struct Lane {
    index: usize,
    epoll: Arc<Epoll>,
    slots: Arc<[NetHandler]>,
}

/// What the thread knows of a slot.
#[derive(Default)]
struct Slot {
    state: LaneState,
    /// There may be something to do.
    due: bool,
    /// There will be then.
    after: Option<Instant>,
}

impl Lane {
    fn run(&self) {
        let mut slots: Vec<Slot> = self.slots.iter().map(|_| Slot::default()).collect();
        let mut events = [EpollEvent::default(); EVENTS_AT_ONCE];
        loop {
            let timeout = timeout(&slots);
            let Some(count) = event_loop::wait_for(&self.epoll, timeout, &mut events) else {
                return;
            };
            for event in &events[..count] {
                if event.data() == STOP {
                    return;
                }
                self.note(&mut slots, event);
            }
            self.turns(&mut slots);
        }
    }

    /// Takes an event.
    fn note(&self, slots: &mut [Slot], event: &EpollEvent) {
        let index = usize::try_from(event.data() >> 1).unwrap_or(usize::MAX);
        let (Some(handler), Some(slot)) = (self.slots.get(index), slots.get_mut(index)) else {
            return;
        };
        slot.due = true;
        if event.data() & 1 == KICK {
            handler.kicked(self.index);
            return;
        }
        let events = event.event_set();
        let over = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        slot.state.readable |= over || events.contains(EventSet::IN);
        slot.state.full &= !(over || events.contains(EventSet::OUT));
    }

    /// Gives each slot for which there is something to do a turn.
    fn turns(&self, slots: &mut [Slot]) {
        for (index, (handler, slot)) in self.slots.iter().zip(slots).enumerate() {
            let late = slot.after.is_some_and(|after| after <= Instant::now());
            if !mem::take(&mut slot.due) && !late {
                continue;
            }
            let turn = handler.serve(self.index, &mut slot.state, |tap| {
                self.await_room(tap, index);
            });
            slot.due = turn.more;
            slot.after = turn.after;
        }
    }

    /// A tap says that it has room only to those who look after they learned that there is none.
    fn await_room(&self, tap: RawFd, slot: usize) {
        let slot = u8::try_from(slot).unwrap_or(u8::MAX);
        let event = EpollEvent::new(TAP_EVENTS, token(slot, TAP));
        // It fails when the tap is being detached.
        let _ = self.epoll.ctl(ControlOperation::Modify, tap, event);
    }
}

fn token(slot: u8, event: u64) -> u64 {
    u64::from(slot) << 1 | event
}

/// How long to wait for events, as epoll_wait(2) takes it.
fn timeout(slots: &[Slot]) -> i32 {
    if slots.iter().any(|slot| slot.due) {
        return 0;
    }
    let Some(next) = slots.iter().filter_map(|slot| slot.after).min() else {
        return -1;
    };
    let wait = next.saturating_duration_since(Instant::now());
    // Not a moment too early, or the thread would spin.
    let wait = wait + Duration::from_nanos(999_999);
    i32::try_from(wait.as_millis()).unwrap_or(i32::MAX)
}

fn watch(epoll: &Epoll, fd: RawFd, events: EventSet, token: u64) -> Result<(), EventLoopError> {
    let event = EpollEvent::new(events, token);
    epoll
        .ctl(ControlOperation::Add, fd, event)
        .map_err(EventLoopError::Watch)
}
