//! The header of every vsock packet (section 5.10.6).

use bitflags::bitflags;

/// Context identifier of the host.
pub const HOST_CID: u64 = 2;
/// Context identifier of the guest. Each VM has its own muxer, so all may have the same.
pub const GUEST_CID: u64 = 3;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub const TYPE_STREAM: u16 = 1;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Asks for a connection.
    Request,
    /// Grants it.
    Response,
    /// Ends it at once, or refuses it.
    Reset,
    /// Says that its sender will send or receive no more.
    Shutdown,
    /// Carries data.
    ReadWrite,
    /// Tells how much its sender can take.
    CreditUpdate,
    /// Asks for [`Self::CreditUpdate`].
    CreditRequest,
    /// Anything else.
    Unknown,
}

impl Operation {
    const NUMBERS: [(u16, Self); 7] = [
        (1, Self::Request),
        (2, Self::Response),
        (3, Self::Reset),
        (4, Self::Shutdown),
        (5, Self::ReadWrite),
        (6, Self::CreditUpdate),
        (7, Self::CreditRequest),
    ];

    fn from_number(number: u16) -> Self {
        let known = Self::NUMBERS.iter().find(|(known, _)| *known == number);
        known.map_or(Self::Unknown, |(_, operation)| *operation)
    }

    fn number(self) -> u16 {
        let known = Self::NUMBERS.iter().find(|(_, known)| *known == self);
        known.map_or(0, |(number, _)| *number)
    }
}

bitflags! {
    /// Flags of [`Operation::Shutdown`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Shutdown: u32 {
        /// Its sender will receive no more.
        const RECEIVE = 1;
        /// Its sender will send no more.
        const SEND = 2;
    }
}

/// The header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Context identifier of the sender.
    pub src_cid: u64,
    /// Context identifier of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload behind the header.
    pub len: u32,
    /// Type of socket.
    pub kind: u16,
    /// What it is for.
    pub operation: Operation,
    /// Flags of the operation.
    pub flags: u32,
    /// How much the sender of the packet can buffer in all.
    pub buf_alloc: u32,
    /// How much of what it received it has passed on, counted from the start, wrapping.
    pub fwd_cnt: u32,
}

impl Header {
    /// Length in bytes.
    pub const LEN: usize = 44;

    /// Reads a header. Every value is possible in each field.
    pub fn parse(bytes: &[u8; Self::LEN]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            operation: Operation::from_number(u16_at(30)),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Writes the header.
    pub fn bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.number().to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The header of a packet to the guest on the connection `key`.
    pub fn to_guest(key: Key, operation: Operation) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: GUEST_CID,
            src_port: key.host_port,
            dst_port: key.guest_port,
            len: 0,
            kind: TYPE_STREAM,
            operation,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// The connection that a packet from the guest belongs to.
    pub fn key(&self) -> Key {
        Key {
            guest_port: self.src_port,
            host_port: self.dst_port,
        }
    }
}

/// What tells one connection from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Port on the guest's side.
    pub guest_port: u32,
    /// Port on the host's side.
    pub host_port: u32,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_become_a_header_and_the_same_bytes_again(
            mut bytes in proptest::array::uniform32(any::<u8>()),
            tail in proptest::array::uniform12(any::<u8>()),
            operation in 1u8..8,
        ) {
            bytes[30..32].copy_from_slice(&[operation, 0]);
            let mut all = [0; Header::LEN];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::parse(&all).bytes(), all);
        }
    }

    #[test]
    fn operations_that_do_not_exist_are_unknown() {
        for number in [0, 8, 0x105, u16::MAX] {
            assert_eq!(Operation::from_number(number), Operation::Unknown);
        }
    }
}
