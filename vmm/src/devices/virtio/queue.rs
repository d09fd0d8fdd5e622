//! What every device does with a virtqueue (section 2.7): take a chain of buffers with every
//! address checked, and give it back.

use std::{
    num::Wrapping,
    sync::atomic::{Ordering, fence},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT, desc::split::Descriptor};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use super::Interrupt;
use crate::memory::{GuestMemory, VolatileSlice};

/// The ways in which a driver can break the rules of a queue.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The rings are not usable.
    #[error("Cannot use the rings of a virtqueue")]
    Ring(#[source] virtio_queue::Error),
    /// A buffer that is not in guest memory.
    #[error("A buffer of {length} bytes at guest address {address:#x} is not in guest memory")]
    Address {
        /// Start of the buffer.
        address: u64,
        /// Its length in bytes.
        length: u32,
    },
    /// A buffer for the device to read comes after one for it to write (section 2.7.4.2).
    #[error("A readable buffer follows a writable one")]
    Order,
    /// A chain with more buffers than the queue has (section 2.7.5.3.1).
    #[error("A chain of buffers is longer than its queue")]
    TooLong,
    /// The buffers are too small for what every request of this device has.
    #[error("A chain of buffers is too small for its request")]
    TooSmall,
}

/// A chain of buffers that the driver has made available.
#[derive(Debug, Default)]
pub struct Chain<'m> {
    /// What it is given back by.
    pub head: u16,
    /// The buffers with the driver's data.
    pub readable: Vec<VolatileSlice<'m>>,
    /// The buffers for the device's data.
    pub writable: Vec<VolatileSlice<'m>>,
}

/// Takes the next available chain.
pub fn pop<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
) -> Result<Option<Chain<'m>>, QueueError> {
    let mut chain = Chain::default();
    Ok(pop_into(queue, memory, &mut chain)?.then_some(chain))
}

/// Takes the next available chain in the place of another one, whose memory it uses. False if there is
/// none.
pub fn pop_into<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    chain: &mut Chain<'m>,
) -> Result<bool, QueueError> {
    let size = usize::from(queue.size());
    let Some(descriptors) = queue.iter(memory).map_err(QueueError::Ring)?.next() else {
        return Ok(false);
    };
    chain.head = descriptors.head_index();
    chain.readable.clear();
    chain.writable.clear();
    for (index, descriptor) in descriptors.enumerate() {
        if index >= size {
            return Err(QueueError::TooLong);
        }
        add(chain, &descriptor, memory)?;
    }
    Ok(true)
}

fn add<'m>(
    chain: &mut Chain<'m>,
    descriptor: &Descriptor,
    memory: &'m GuestMemory,
) -> Result<(), QueueError> {
    let length = descriptor.len();
    let wrong = |_| QueueError::Address {
        address: descriptor.addr().0,
        length,
    };
    let (buffers, access) = if descriptor.is_write_only() {
        (&mut chain.writable, Permissions::Write)
    } else if chain.writable.is_empty() {
        (&mut chain.readable, Permissions::Read)
    } else {
        return Err(QueueError::Order);
    };
    let bytes = usize::try_from(length).map_err(|_| QueueError::TooLong)?;
    let slices = memory
        .get_slices(GuestAddress(descriptor.addr().0), bytes, access)
        .map_err(wrong)?;
    for slice in slices {
        buffers.push(slice.map_err(wrong)?);
    }
    Ok(())
}

/// Puts back what [`pop`] has taken last, unused.
pub fn unpop(queue: &mut Queue) {
    queue.set_next_avail((Wrapping(queue.next_avail()) - Wrapping(1)).0);
}

/// Gives a chain back with `written` bytes in its writable buffers.
pub fn push(
    queue: &mut Queue,
    memory: &GuestMemory,
    head: u16,
    written: usize,
) -> Result<(), QueueError> {
    // A chain is never longer than 4 GiB (section 2.7.5.2).
    let written = u32::try_from(written).unwrap_or(u32::MAX);
    queue
        .add_used(memory, head, written)
        .map_err(QueueError::Ring)
}

/// Gives chains back, each with the bytes written to it, so that the driver sees all or none of them.
/// The interrupt is up to [`notify_since`].
pub fn push_together(
    queue: &mut Queue,
    memory: &GuestMemory,
    chains: &[(u16, u32)],
) -> Result<(), QueueError> {
    let Some((last, others)) = chains.split_last() else {
        return Ok(());
    };
    let (ring, size) = (queue.used_ring(), queue.size());
    let mut next = Wrapping(queue.next_used());
    for (head, written) in others {
        // `struct virtq_used_elem`, behind flags and index.
        let element = u64::from(*head) | u64::from(*written) << 32;
        let slot = next.0.checked_rem(size).unwrap_or(0);
        let at = ring.saturating_add(4 + u64::from(slot) * 8);
        memory
            .write_obj(element.to_le(), GuestAddress(at))
            .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
        next += 1;
    }
    queue.set_next_used(next.0);
    // This moves the index past all of them.
    queue
        .add_used(memory, last.0, last.1)
        .map_err(QueueError::Ring)
}

/// Interrupts the guest when chains were given back since the queue's `next_used` was `before` and its
/// driver wants to know of one of them.
pub fn notify_since(
    queue: &Queue,
    memory: &GuestMemory,
    interrupt: &Interrupt,
    before: u16,
) -> Result<(), QueueError> {
    let now = Wrapping(queue.next_used());
    if now.0 == before {
        return Ok(());
    }
    // The driver first says what it wants to know of and then looks into the ring.
    fence(Ordering::SeqCst);
    if queue.event_idx_enabled() {
        // Behind flags, index and ring (section 2.7.6).
        let at = queue
            .avail_ring()
            .saturating_add(4 + u64::from(queue.size()) * 2);
        let event: u16 = memory
            .load(GuestAddress(at), Ordering::Relaxed)
            .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
        // Section 2.7.7.1.
        if now - Wrapping(u16::from_le(event)) - Wrapping(1) >= now - Wrapping(before) {
            return Ok(());
        }
    }
    interrupt.used_buffer();
    Ok(())
}

/// Interrupts the guest when chains were given back since the last call and its driver wants to
/// know.
pub fn notify(
    queue: &mut Queue,
    memory: &GuestMemory,
    interrupt: &Interrupt,
) -> Result<(), QueueError> {
    if queue.needs_notification(memory).map_err(QueueError::Ring)? {
        interrupt.used_buffer();
    }
    Ok(())
}

/// Asks the driver for a notification with its next chain. True when one has come in meanwhile, for
/// which there may be none.
pub fn enable_notification(queue: &mut Queue, memory: &GuestMemory) -> Result<bool, QueueError> {
    queue.enable_notification(memory).map_err(QueueError::Ring)
}

/// Lets the driver do without notifications.
pub fn disable_notification(queue: &mut Queue, memory: &GuestMemory) -> Result<(), QueueError> {
    queue.disable_notification(memory).map_err(QueueError::Ring)
}

/// Length of buffers in bytes.
pub fn total(slices: &[VolatileSlice<'_>]) -> usize {
    slices.iter().map(VolatileSlice::len).sum()
}

/// Copies from the start of `slices` to `bytes` and returns how much it was.
pub fn gather(slices: &[VolatileSlice<'_>], bytes: &mut [u8]) -> usize {
    let mut done = 0;
    for slice in slices {
        done += slice.copy_to(&mut bytes[done..]);
    }
    done
}

/// Copies `bytes` to the start of `slices` and returns how much it was.
pub fn scatter(slices: &[VolatileSlice<'_>], bytes: &[u8]) -> usize {
    let mut done = 0;
    for slice in slices {
        let count = slice.len().min(bytes.len() - done);
        slice.copy_from(&bytes[done..done + count]);
        done += count;
    }
    done
}

/// What is left of `slices` behind `count` bytes.
pub fn skip<'m>(slices: &[VolatileSlice<'m>], mut count: usize) -> Vec<VolatileSlice<'m>> {
    let mut rest = Vec::with_capacity(slices.len());
    for slice in slices {
        if count >= slice.len() {
            count -= slice.len();
        } else if let Ok(tail) = slice.offset(count) {
            rest.push(tail);
            count = 0;
        }
    }
    rest
}

/// The first `count` bytes of `slices`.
pub fn first<'m>(slices: &[VolatileSlice<'m>], mut count: usize) -> Vec<VolatileSlice<'m>> {
    let mut head = Vec::with_capacity(slices.len());
    for slice in slices {
        if count == 0 {
            break;
        }
        let part = slice.len().min(count);
        if let Ok(piece) = slice.subslice(0, part) {
            head.push(piece);
            count -= part;
        }
    }
    head
}

/// A queue as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    size: u16,
    ready: bool,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

/// Takes down a queue.
pub fn save(queue: &Queue) -> QueueState {
    let state = queue.state();
    QueueState {
        size: state.size,
        ready: state.ready,
        event_idx: state.event_idx_enabled,
        next_avail: state.next_avail,
        next_used: state.next_used,
        desc_table: state.desc_table,
        avail_ring: state.avail_ring,
        used_ring: state.used_ring,
    }
}

/// Makes a queue of at most `max_size` entries that goes on where the saved one was.
pub fn restore(state: &QueueState, max_size: u16) -> Result<Queue, QueueError> {
    Queue::try_from(virtio_queue::QueueState {
        max_size,
        next_avail: state.next_avail,
        next_used: state.next_used,
        event_idx_enabled: state.event_idx,
        size: state.size,
        ready: state.ready,
        desc_table: state.desc_table,
        avail_ring: state.avail_ring,
        used_ring: state.used_ring,
    })
    .map_err(QueueError::Ring)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use virtio_queue::{
        desc::{RawDescriptor, split::Descriptor as SplitDescriptor},
        mock::MockSplitQueue,
    };
    use vm_memory::Bytes;

    use super::*;

    const WRITE: u16 = 2;

    /// The driver's side of a queue of 16 at the place where `mmio::tests::start` puts it.
    pub struct Driver<'m> {
        memory: &'m GuestMemory,
        base: u64,
        sent: u16,
        seen: u16,
    }

    impl<'m> Driver<'m> {
        pub fn new(memory: &'m GuestMemory, base: u64) -> Self {
            Self {
                memory,
                base,
                sent: 0,
                seen: 0,
            }
        }

        /// Makes one chain available: (address, length, writable) of each buffer.
        pub fn send(&mut self, buffers: &[(u64, u32, bool)]) {
            let head = self.sent % 4 * 4;
            for (index, (address, length, writable)) in (head..).zip(buffers) {
                let last = usize::from(index - head) + 1 == buffers.len();
                let flags = u16::from(!last) | if *writable { WRITE } else { 0 };
                let descriptor =
                    RawDescriptor::from(SplitDescriptor::new(*address, *length, flags, index + 1));
                let at = GuestAddress(self.base + u64::from(index) * 16);
                self.memory.write_obj(descriptor, at).unwrap();
            }
            let avail = self.base + 0x400;
            let slot = avail + 4 + u64::from(self.sent % 16) * 2;
            self.memory.write_obj(head, GuestAddress(slot)).unwrap();
            self.sent = self.sent.wrapping_add(1);
            let index = GuestAddress(avail + 2);
            self.memory.write_obj(self.sent, index).unwrap();
        }

        /// The length of the next chain that the device has given back.
        pub fn used(&mut self) -> Option<u32> {
            let used = self.base + 0x800;
            let index: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
            if index == self.seen {
                return None;
            }
            let element = used + 4 + u64::from(self.seen % 16) * 8;
            self.seen = self.seen.wrapping_add(1);
            Some(self.memory.read_obj(GuestAddress(element + 4)).unwrap())
        }
    }

    fn queue(memory: &GuestMemory, descriptors: &[(u64, u32, u16)]) -> Queue {
        let mock = MockSplitQueue::new(memory, 16);
        let last = descriptors.len() - 1;
        let chain: Vec<RawDescriptor> = descriptors
            .iter()
            .enumerate()
            .map(|(index, (address, length, flags))| {
                let next = u16::from(index < last);
                let index = u16::try_from(index).unwrap();
                SplitDescriptor::new(*address, *length, flags | next, index + 1).into()
            })
            .collect();
        mock.build_desc_chain(&chain).unwrap();
        mock.create_queue().unwrap()
    }

    #[test]
    fn buffers_are_sorted_and_checked() {
        let memory = crate::memory::allocate(1).unwrap();
        let mut good = queue(&memory, &[(0x8000, 10, 0), (0x9000, 20, WRITE)]);
        let chain = pop(&mut good, &memory).unwrap().unwrap();
        assert_eq!((total(&chain.readable), total(&chain.writable)), (10, 20));
        assert!(pop(&mut good, &memory).unwrap().is_none());

        let mut outside = queue(&memory, &[(0xf_ffff, 2, 0)]);
        let error = pop(&mut outside, &memory).unwrap_err();
        assert!(matches!(error, QueueError::Address { length: 2, .. }));
        let mut order = queue(&memory, &[(0x8000, 1, WRITE), (0x9000, 1, 0)]);
        assert!(matches!(pop(&mut order, &memory), Err(QueueError::Order)));
    }

    #[test]
    fn a_ring_that_claims_too_much_is_an_error() {
        let memory = crate::memory::allocate(1).unwrap();
        let mut queue = queue(&memory, &[(0x8000, 10, 0)]);
        let index = GuestAddress(queue.avail_ring() + 2);
        memory.write_obj(1000u16, index).unwrap();
        assert!(matches!(pop(&mut queue, &memory), Err(QueueError::Ring(_))));
    }

    #[test]
    fn a_saved_queue_goes_on_where_it_was() {
        let memory = crate::memory::allocate(1).unwrap();
        let mut before = queue(&memory, &[(0x8000, 10, 0)]);
        let chain = pop(&mut before, &memory).unwrap().unwrap();
        push(&mut before, &memory, chain.head, 0).unwrap();
        let mut after = restore(&save(&before), 16).unwrap();
        assert!(pop(&mut after, &memory).unwrap().is_none());
        assert_eq!(save(&after), save(&before));
        unpop(&mut after);
        assert!(pop(&mut after, &memory).unwrap().is_some());
        assert!(restore(&save(&before), 8).is_err());
    }

    proptest! {
        #[test]
        fn no_descriptors_lead_out_of_memory(
            descriptors in proptest::collection::vec((any::<u64>(), any::<u32>(), 0u16..4), 1..8),
        ) {
            let memory = crate::memory::allocate(1).unwrap();
            let mut queue = queue(&memory, &descriptors);
            if let Ok(Some(chain)) = pop(&mut queue, &memory) {
                prop_assert!(total(&chain.readable) + total(&chain.writable) <= 8 << 20);
            }
        }

        #[test]
        fn pieces_add_up(bytes in proptest::collection::vec(any::<u8>(), 0..300), at in 0usize..400) {
            let mut storage = vec![0; 300];
            let (a, b) = storage.split_at_mut(100);
            let slices = [VolatileSlice::from(a), VolatileSlice::from(b)];
            prop_assert_eq!(scatter(&slices, &bytes), bytes.len());
            let mut all = first(&slices, at);
            prop_assert_eq!(total(&all), at.min(300));
            all.extend(skip(&slices, at));
            let mut back = vec![0; bytes.len()];
            prop_assert_eq!(gather(&all, &mut back), bytes.len());
            prop_assert_eq!(back, bytes);
        }
    }
}
