//! One stream between the guest and a socket on the host.
//!
//! Credit works in both directions (section 5.10.6.3): either side may have at most `buf_alloc`
//! bytes on the way that the other has not passed on. What the host's socket does not take is kept
//! here, never more than [`BUF_ALLOC`], and the guest gets no new credit for it. What the guest
//! cannot take stays in the socket.

use std::{
    collections::VecDeque,
    io::{self, Write},
    net,
    num::Wrapping,
    os::unix::net::UnixStream,
};

use bitflags::bitflags;
use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};

use super::header::{Header, Key, Operation, Shutdown};
use crate::{devices::virtio::queue, memory::VolatileSlice};

/// How much the guest may send beyond what the host's socket has taken, in bytes.
pub const BUF_ALLOC: u32 = 128 * 1024;
/// The guest hears of new credit when it is at least this much.
const CREDIT_STEP: u32 = BUF_ALLOC / 2;

bitflags! {
    /// Packets without data that the guest is to get.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Pending: u8 {
        const RESPONSE = 1;
        const RESET = 2;
        const SHUTDOWN = 4;
        const CREDIT_UPDATE = 8;
        const CREDIT_REQUEST = 16;
    }
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    key: Key,
    host: UnixStream,
    /// The host's end is closed, not only shut down.
    host_closed: bool,
    /// The guest's end is gone; only the rest for the host is left.
    guest_gone: bool,
    pending: Pending,

    // Guest to host.
    buffered: VecDeque<u8>,
    forwarded: Wrapping<u32>,
    forwarded_told: Wrapping<u32>,
    guest_sent_all: bool,
    host_refuses: bool,

    // Host to guest.
    host_readable: bool,
    host_sent_all: bool,
    guest_refuses: bool,
    sent: Wrapping<u32>,
    guest_buf_alloc: u32,
    guest_forwarded: Wrapping<u32>,
}

impl Connection {
    /// A connection that the guest has asked for with `request`. `host` does not block.
    pub fn new(request: &Header, host: UnixStream) -> Self {
        Self {
            key: request.key(),
            host,
            host_closed: false,
            guest_gone: false,
            pending: Pending::RESPONSE,
            buffered: VecDeque::new(),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            guest_sent_all: false,
            host_refuses: false,
            host_readable: false,
            host_sent_all: false,
            guest_refuses: false,
            sent: Wrapping(0),
            guest_buf_alloc: request.buf_alloc,
            guest_forwarded: Wrapping(request.fwd_cnt),
        }
    }

    /// Its ports.
    pub fn key(&self) -> Key {
        self.key
    }

    /// The guest no longer knows of this connection, so its ports are free.
    pub fn guest_gone(&self) -> bool {
        self.guest_gone
    }

    /// Nothing is left to do, and the host's socket can be closed.
    pub fn is_finished(&self) -> bool {
        self.guest_gone && self.buffered.is_empty()
    }

    /// There is a packet for the guest.
    pub fn has_packet(&self) -> bool {
        !self.guest_gone && (!self.pending.is_empty() || self.can_read())
    }

    /// Takes a packet of the guest with its payload.
    pub fn receive(&mut self, header: &Header, payload: &[VolatileSlice<'_>]) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_forwarded = Wrapping(header.fwd_cnt);
        match header.operation {
            Operation::ReadWrite => self.receive_data(payload),
            Operation::Shutdown => {
                self.receive_shutdown(Shutdown::from_bits_truncate(header.flags))
            }
            Operation::CreditUpdate => {}
            Operation::CreditRequest => self.pending |= Pending::CREDIT_UPDATE,
            Operation::Reset => self.guest_gone = true,
            // The guest has no business sending these on a connection that exists.
            Operation::Request | Operation::Response | Operation::Unknown => self.reset(),
        }
    }

    /// The host's socket has become readable or writable, or its other end is closed.
    pub fn host_ready(&mut self, readable: bool, writable: bool, closed: bool) {
        self.host_readable |= readable || closed;
        if closed {
            self.host_closed = true;
            // Otherwise reading up to the end of the data comes first.
            if self.host_sent_all || self.guest_refuses {
                self.reset();
            }
        }
        if writable || closed {
            self.flush();
        }
    }

    /// Fills a buffer of the guest with the next packet and returns the packet's length, or nothing
    /// if there is none after all. `buffer` has room for at least a header.
    pub fn send(&mut self, buffer: &[VolatileSlice<'_>]) -> Option<usize> {
        if self.guest_gone {
            return None;
        }
        if self.pending.contains(Pending::RESET) {
            self.guest_gone = true;
            return Some(self.write_header(buffer, Operation::Reset, 0));
        }
        if self.pending.contains(Pending::RESPONSE) {
            self.pending -= Pending::RESPONSE;
            return Some(self.write_header(buffer, Operation::Response, 0));
        }
        if self.can_read() {
            let length = self.send_data(buffer);
            if length.is_some() {
                return length;
            }
            // Reading may have ended the connection, or one direction of it.
            if self.pending.contains(Pending::RESET) {
                return self.send(buffer);
            }
        }
        let (flag, operation) = [
            (Pending::SHUTDOWN, Operation::Shutdown),
            (Pending::CREDIT_REQUEST, Operation::CreditRequest),
            (Pending::CREDIT_UPDATE, Operation::CreditUpdate),
        ]
        .into_iter()
        .find(|(flag, _)| self.pending.contains(*flag))?;
        self.pending -= flag;
        Some(self.write_header(buffer, operation, 0))
    }

    /// Ends the connection at the next opportunity to tell the guest.
    fn reset(&mut self) {
        self.pending |= Pending::RESET;
    }

    fn receive_data(&mut self, payload: &[VolatileSlice<'_>]) {
        let length = queue::total(payload);
        let free = usize::try_from(BUF_ALLOC).unwrap_or(0) - self.buffered.len();
        if self.guest_sent_all || length > free {
            self.reset();
            return;
        }
        let mut rest = payload.to_vec();
        if self.buffered.is_empty() && !self.host_refuses {
            rest = self.write_through(rest);
        }
        if self.host_refuses {
            self.forward(queue::total(&rest));
            return;
        }
        let mut bytes = vec![0; queue::total(&rest)];
        queue::gather(&rest, &mut bytes);
        self.buffered.extend(bytes);
    }

    /// Writes straight from guest memory as long as the socket takes it, and returns what it did
    /// not take.
    fn write_through<'m>(&mut self, mut rest: Vec<VolatileSlice<'m>>) -> Vec<VolatileSlice<'m>> {
        while let Some(slice) = rest.first() {
            match (&self.host).write_volatile(slice) {
                Ok(count) => {
                    self.forward(count);
                    rest = queue::skip(&rest, count);
                }
                Err(VolatileMemoryError::IOError(error)) if would_block(&error) => break,
                Err(_) => {
                    self.host_refuses();
                    break;
                }
            }
        }
        rest
    }

    /// Writes what was kept for the host.
    fn flush(&mut self) {
        while !self.buffered.is_empty() {
            match (&self.host).write(self.buffered.as_slices().0) {
                Ok(count) => {
                    self.buffered.drain(..count);
                    self.forward(count);
                }
                Err(error) if would_block(&error) => return,
                Err(_) => self.host_refuses(),
            }
        }
        // An idle connection keeps no memory.
        self.buffered.shrink_to_fit();
        if self.guest_sent_all {
            self.shut_down_host(net::Shutdown::Write);
        }
    }

    /// The host's end reads no more: what the guest sends goes nowhere, and it is told.
    fn host_refuses(&mut self) {
        let lost = self.buffered.len();
        self.buffered.clear();
        self.forward(lost);
        if !self.host_refuses {
            self.host_refuses = true;
            self.pending |= Pending::SHUTDOWN;
        }
    }

    fn forward(&mut self, count: usize) {
        // Bounded by the size of one packet or of the buffer.
        self.forwarded += Wrapping(u32::try_from(count).unwrap_or(0));
        if (self.forwarded - self.forwarded_told).0 >= CREDIT_STEP {
            self.pending |= Pending::CREDIT_UPDATE;
        }
    }

    fn receive_shutdown(&mut self, flags: Shutdown) {
        if flags.contains(Shutdown::SEND) && !self.guest_sent_all {
            self.guest_sent_all = true;
            if self.buffered.is_empty() {
                self.shut_down_host(net::Shutdown::Write);
            }
        }
        if flags.contains(Shutdown::RECEIVE) && !self.guest_refuses {
            self.guest_refuses = true;
            self.shut_down_host(net::Shutdown::Read);
        }
        if self.guest_refuses && (self.guest_sent_all || self.host_closed) {
            self.reset();
        }
    }

    fn shut_down_host(&self, how: net::Shutdown) {
        // It fails only when the other end is already closed.
        let _ = self.host.shutdown(how);
    }

    /// Bytes that the guest can take now. A guest that claims to have passed on more than it was
    /// sent gets nothing.
    fn credit(&self) -> usize {
        let on_the_way = (self.sent - self.guest_forwarded).0;
        usize::try_from(self.guest_buf_alloc.saturating_sub(on_the_way)).unwrap_or(0)
    }

    fn can_read(&self) -> bool {
        self.host_readable && !self.host_sent_all && !self.guest_refuses && self.credit() > 0
    }

    fn send_data(&mut self, buffer: &[VolatileSlice<'_>]) -> Option<usize> {
        let room = queue::skip(buffer, Header::LEN);
        let mut length = 0;
        for mut slice in queue::first(&room, self.credit()) {
            match self.host.read_volatile(&mut slice) {
                Ok(0) => {
                    self.host_sent_all();
                    break;
                }
                Ok(count) => {
                    length += count;
                    if count < slice.len() {
                        break;
                    }
                }
                Err(VolatileMemoryError::IOError(error)) if would_block(&error) => {
                    self.host_readable = false;
                    break;
                }
                // A reset by the other end comes after all its data.
                Err(_) => {
                    self.host_closed = true;
                    self.host_sent_all();
                    break;
                }
            }
        }
        if length == 0 {
            return None;
        }
        self.sent += Wrapping(u32::try_from(length).unwrap_or(0));
        if self.credit() == 0 {
            self.pending |= Pending::CREDIT_REQUEST;
        }
        Some(self.write_header(buffer, Operation::ReadWrite, length))
    }

    fn host_sent_all(&mut self) {
        self.host_sent_all = true;
        if self.host_closed {
            self.reset();
        } else {
            self.pending |= Pending::SHUTDOWN;
        }
    }

    fn write_header(
        &mut self,
        buffer: &[VolatileSlice<'_>],
        operation: Operation,
        payload: usize,
    ) -> usize {
        let mut header = Header::to_guest(self.key, operation);
        header.len = u32::try_from(payload).unwrap_or(0);
        header.buf_alloc = BUF_ALLOC;
        header.fwd_cnt = self.forwarded.0;
        if operation == Operation::Shutdown {
            let mut flags = Shutdown::empty();
            flags.set(Shutdown::SEND, self.host_sent_all);
            flags.set(Shutdown::RECEIVE, self.host_refuses);
            header.flags = flags.bits();
        }
        // Every packet tells the credit.
        self.forwarded_told = self.forwarded;
        self.pending -= Pending::CREDIT_UPDATE;
        queue::scatter(buffer, &header.bytes()) + payload
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
