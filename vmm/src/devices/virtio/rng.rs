//! Entropy device (section 5.4): the host's random numbers.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vmm_sys_util::epoll::EventSet;

use super::{
    Device, Work,
    mmio::{RestoreError, Transport, TransportState},
    queue,
};
use crate::{
    devices::event_loop::{self, EventHandler},
    memory::VolatileSlice,
};

const DEVICE_ID: u32 = 4;
const QUEUE_SIZES: &[u16] = &[8];
/// The most that one request gets; the driver asks for less.
const MAX_BYTES: usize = 4096;

/// The device. It has no state of its own.
pub struct Rng;

impl Device for Rng {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }
}

/// The saved device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    transport: TransportState,
}

/// The device at work.
pub struct RngHandler {
    transport: Arc<Transport<Rng>>,
}

impl RngHandler {
    /// Works for the device behind `transport`.
    pub fn new(transport: Arc<Transport<Rng>>) -> Self {
        Self { transport }
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

    fn work(&self, queues: &mut [Queue]) -> Work {
        let memory = &self.transport.memory;
        let [requests] = queues else { return Ok(()) };
        loop {
            queue::disable_notification(requests, memory)?;
            while let Some(chain) = queue::pop(requests, memory)? {
                let written = fill(&chain.writable);
                self.transport.stats.to_guest(written);
                queue::push(requests, memory, chain.head, written)?;
            }
            if !queue::enable_notification(requests, memory)? {
                break;
            }
        }
        queue::notify(requests, memory, &self.transport.interrupt)
    }
}

impl EventHandler for RngHandler {
    fn handle(&self, _token: u32, _events: EventSet) {
        let transport = &self.transport;
        transport.stats.kicked(event_loop::take(&transport.kick));
        transport.run(|_, queues| self.work(queues));
    }
}

fn fill(buffers: &[VolatileSlice<'_>]) -> usize {
    let mut bytes = [0; MAX_BYTES];
    let wanted = queue::total(buffers).min(MAX_BYTES);
    let mut have = 0;
    while have < wanted {
        // Blocks only before the host's generator is seeded, which is early in the host's boot.
        match rustix::rand::getrandom(
            &mut bytes[have..wanted],
            rustix::rand::GetRandomFlags::empty(),
        ) {
            Ok(count) => have += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    queue::scatter(buffers, &bytes[..have])
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::{
        super::{mmio::tests as mmio, queue::tests::Driver},
        *,
    };
    use crate::memory::GuestMemory;

    fn handler(memory: &GuestMemory) -> RngHandler {
        RngHandler::new(Arc::new(mmio::transport(Rng, memory.clone())))
    }

    #[test]
    fn random_bytes_arrive_before_and_after_a_restore() {
        let memory = crate::memory::allocate(1).unwrap();
        let before = handler(&memory);
        mmio::start(&before.transport, mmio::MODERN, 0x4000);
        let mut driver = Driver::new(&memory, 0x4000);
        let ask = |driver: &mut Driver<'_>, handler: &RngHandler| {
            driver.send(&[(0x8000, 32, true)]);
            handler.handle(0, EventSet::IN);
            assert_eq!(driver.used(), Some(32));
            memory.read_obj::<[u8; 32]>(GuestAddress(0x8000)).unwrap()
        };
        let first = ask(&mut driver, &before);
        assert_ne!(first, [0; 32]);
        let after = handler(&memory);
        after.restore(&before.save()).unwrap();
        assert_ne!(ask(&mut driver, &after), first);
        assert_eq!(after.transport.stats.snapshot().bytes_to_guest, 32);
    }

    #[test]
    fn a_huge_request_gets_a_bounded_answer() {
        let memory = crate::memory::allocate(1).unwrap();
        let handler = handler(&memory);
        mmio::start(&handler.transport, mmio::MODERN, 0x4000);
        let mut driver = Driver::new(&memory, 0x4000);
        driver.send(&[(0x8000, 0x8_0000, true)]);
        handler.handle(0, EventSet::IN);
        assert_eq!(driver.used(), Some(4096));
    }
}
