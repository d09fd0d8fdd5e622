//! All connections of a guest.
//!
//! Everything that a guest can make this grow is bounded: connections by [`MAX_CONNECTIONS`], each
//! with one bounded buffer, and refusals by [`MAX_RESETS`], beyond which the guest's packets wait
//! until it has taken the refusals. Connections come at a bounded rate, [`DIALS_PER_SECOND`], since
//! each is work for the shim.

use std::{
    collections::{HashMap, VecDeque},
    os::unix::net::UnixStream,
};

use super::{
    connection::Connection,
    header::{GUEST_CID, HOST_CID, Header, Key, Operation, TYPE_STREAM},
};
use crate::{devices::virtio::queue, memory::VolatileSlice, rate::Bucket};

/// Connections at a time, including those that the guest has closed and whose last bytes the host
/// has not taken yet.
pub const MAX_CONNECTIONS: usize = 1024;
/// Refusals that wait for the guest to take them.
pub const MAX_RESETS: usize = 64;

/// New connections in a second, beyond which the guest is refused. A process has three.
pub const DIALS_PER_SECOND: u64 = 1024;

/// The host's side of new connections.
pub trait Dial: Send {
    /// Makes a connection to `port` of the host that is known by `id` in events, or refuses.
    fn dial(&mut self, port: u32, id: u32) -> Option<UnixStream>;
}

/// The connections.
pub struct Muxer {
    dial: Box<dyn Dial>,
    dials: Bucket,
    slots: Vec<Option<Connection>>,
    free: Vec<u32>,
    ids: HashMap<Key, u32>,
    /// Connections that have a packet for the guest, each once.
    ready: VecDeque<u32>,
    is_ready: Vec<bool>,
    resets: VecDeque<Key>,
}

impl Muxer {
    /// No connections yet.
    pub fn new(dial: Box<dyn Dial>) -> Self {
        Self {
            dial,
            dials: Bucket::new(DIALS_PER_SECOND),
            slots: Vec::new(),
            free: Vec::new(),
            ids: HashMap::new(),
            ready: VecDeque::new(),
            is_ready: Vec::new(),
            resets: VecDeque::new(),
        }
    }

    /// Closes all connections. The host's ends see the end of the stream.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.free.clear();
        self.ids.clear();
        self.ready.clear();
        self.is_ready.clear();
        self.resets.clear();
    }

    /// A packet of the guest can be taken.
    pub fn can_receive(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// There may be a packet for the guest.
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Takes a packet of the guest and returns the length of its payload. Packets that are no
    /// packets, or not for the host, are ignored.
    pub fn receive(&mut self, packet: &[VolatileSlice<'_>]) -> usize {
        let mut bytes = [0; Header::LEN];
        if queue::gather(packet, &mut bytes) < Header::LEN {
            return 0;
        }
        let header = Header::parse(&bytes);
        let payload = queue::skip(packet, Header::LEN);
        let length = usize::try_from(header.len).unwrap_or(usize::MAX);
        if header.src_cid != GUEST_CID
            || header.dst_cid != HOST_CID
            || length > queue::total(&payload)
        {
            return 0;
        }
        self.dispatch(&header, &queue::first(&payload, length));
        length
    }

    fn dispatch(&mut self, header: &Header, payload: &[VolatileSlice<'_>]) {
        let key = header.key();
        match self.ids.get(&key).copied() {
            // A reset is never answered with another.
            None if header.operation == Operation::Reset => {}
            _ if header.kind != TYPE_STREAM => self.resets.push_back(key),
            None if header.operation == Operation::Request => self.connect(header),
            None => self.resets.push_back(key),
            Some(id) => self.with(id, |connection| connection.receive(header, payload)),
        }
    }

    fn connect(&mut self, request: &Header) {
        let key = request.key();
        let Some((id, host)) = self.new_host(key.host_port) else {
            self.resets.push_back(key);
            return;
        };
        if let Some(slot) = usize::try_from(id)
            .ok()
            .and_then(|id| self.slots.get_mut(id))
        {
            *slot = Some(Connection::new(request, host));
            self.ids.insert(key, id);
            self.with(id, |_| ());
        }
    }

    fn new_host(&mut self, port: u32) -> Option<(u32, UnixStream)> {
        if !self.dials.try_take() {
            return None;
        }
        if self.free.is_empty() && self.slots.len() < MAX_CONNECTIONS {
            self.free.push(u32::try_from(self.slots.len()).ok()?);
            self.slots.push(None);
            self.is_ready.push(false);
        }
        let id = *self.free.last()?;
        let host = self.dial.dial(port, id)?;
        self.free.pop();
        Some((id, host))
    }

    /// Something happened to the host's socket of connection `id`, which may be gone by now.
    pub fn host_ready(&mut self, id: u32, readable: bool, writable: bool, closed: bool) {
        self.with(id, |connection| {
            connection.host_ready(readable, writable, closed);
        });
    }

    /// Fills a buffer of the guest with the next packet and returns its length, or nothing if there
    /// is none. Connections take turns. `buffer` has room for at least a header.
    pub fn send(&mut self, buffer: &[VolatileSlice<'_>]) -> Option<usize> {
        if let Some(key) = self.resets.pop_front() {
            let header = Header::to_guest(key, Operation::Reset);
            return Some(queue::scatter(buffer, &header.bytes()));
        }
        while let Some(id) = self.ready.pop_front() {
            if let Some(flag) = usize::try_from(id)
                .ok()
                .and_then(|id| self.is_ready.get_mut(id))
            {
                *flag = false;
            }
            let mut sent = None;
            self.with(id, |connection| sent = connection.send(buffer));
            if sent.is_some() {
                return sent;
            }
        }
        None
    }

    /// Changes a connection, and then puts it where it belongs: among the ready ones, or out.
    fn with(&mut self, id: u32, change: impl FnOnce(&mut Connection)) {
        let Ok(index) = usize::try_from(id) else {
            return;
        };
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        let Some(connection) = slot else { return };
        change(connection);
        if connection.guest_gone() && self.ids.get(&connection.key()) == Some(&id) {
            self.ids.remove(&connection.key());
        }
        if connection.is_finished() {
            *slot = None;
            self.free.push(id);
        } else if connection.has_packet() && !self.is_ready[index] {
            self.is_ready[index] = true;
            self.ready.push_back(id);
        }
    }
}
