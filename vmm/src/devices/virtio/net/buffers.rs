//! Buffers that the guest has offered for packets, taken out of their queue and not used yet.
//!
//! How long the next packet is cannot be known before it is received, so there is always room for the
//! longest. What it leaves is for the packets after it.

use std::collections::VecDeque;

use virtio_queue::Queue;

use super::{HEADER_LEN, MAX_PACKET, tap};
use crate::{
    devices::virtio::queue::{self, Chain, QueueError},
    memory::{GuestMemory, VolatileSlice},
};

/// The most pieces of memory that the kernel takes at once (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;
/// Where the header says in how many chains the packet is.
const NUM_BUFFERS: usize = 10;

/// Chains in the order in which the guest has offered them.
#[derive(Debug, Default)]
pub struct Buffers {
    chains: VecDeque<Held>,
    pieces: Vec<libc::iovec>,
    bytes: usize,
}

#[derive(Debug)]
struct Held {
    head: u16,
    pieces: usize,
    bytes: usize,
}

// SAFETY: the pieces are addresses in the guest's memory, which are the same in every thread.
unsafe impl Send for Buffers {}

impl Buffers {
    /// What to receive a packet into. It is memory of the guest's: whoever has a queue's buffers has
    /// the transport too, which keeps it mapped.
    pub fn pieces(&self) -> &[libc::iovec] {
        &self.pieces
    }

    /// Takes chains out of `queue` until there is room for any packet. False if there are too few; the
    /// driver then notifies with the next one.
    pub fn fill<'m>(
        &mut self,
        queue: &mut Queue,
        memory: &'m GuestMemory,
        chain: &mut Chain<'m>,
    ) -> Result<bool, QueueError> {
        while self.bytes < MAX_PACKET {
            if !queue::pop_into(queue, memory, chain)? {
                if queue::enable_notification(queue, memory)? {
                    continue;
                }
                return Ok(false);
            }
            let bytes = queue::total(&chain.writable);
            // Section 5.1.6.3.1.
            if bytes < HEADER_LEN {
                return Err(QueueError::TooSmall);
            }
            if self.pieces.len() + chain.writable.len() > MAX_PIECES {
                return Err(QueueError::TooLong);
            }
            self.pieces.extend(chain.writable.iter().map(tap::piece));
            self.bytes += bytes;
            self.chains.push_back(Held {
                head: chain.head,
                pieces: chain.writable.len(),
                bytes,
            });
        }
        Ok(true)
    }

    /// Gives back the chains with a packet of `length` bytes, at least a header, that was received into
    /// them. `used` is room for their heads.
    pub fn give_back(
        &mut self,
        length: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
        used: &mut Vec<(u16, u32)>,
    ) -> Result<(), QueueError> {
        used.clear();
        let (mut left, mut pieces) = (length, 0);
        while left > 0
            && let Some(chain) = self.chains.pop_front()
        {
            let part = left.min(chain.bytes);
            left -= part;
            pieces += chain.pieces;
            self.bytes -= chain.bytes;
            used.push((chain.head, u32::try_from(part).unwrap_or(u32::MAX)));
        }
        let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
        write(&self.pieces, NUM_BUFFERS, count.to_le_bytes());
        self.pieces.drain(..pieces);
        queue::push_together(queue, memory, used)
    }

    /// Puts everything back into the queue.
    pub fn give_up(&mut self, queue: &mut Queue) {
        self.chains.iter().for_each(|_| queue::unpop(queue));
        self.clear();
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Writes two bytes at an offset.
fn write(pieces: &[libc::iovec], offset: usize, bytes: [u8; 2]) {
    let mut skip = offset;
    let mut bytes = bytes.as_slice();
    for piece in pieces {
        if skip >= piece.iov_len {
            skip -= piece.iov_len;
            continue;
        }
        // SAFETY: a piece of the guest's memory, which is mapped, see `Buffers::pieces`.
        let slice = unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) };
        let Ok(rest) = slice.offset(skip) else { return };
        let count = rest.len().min(bytes.len());
        rest.copy_from(&bytes[..count]);
        bytes = &bytes[count..];
        if bytes.is_empty() {
            return;
        }
        skip = 0;
    }
}
