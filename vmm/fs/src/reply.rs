//! What goes back to the guest.

use rustix::io::Errno;
use vm_memory::VolatileSlice;

use crate::{
    abi::{OUT_HEADER, Writer},
    chain,
};

/// The outcome of a request that went well.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The guest expects no reply.
    None,
    /// A reply of just a header.
    Empty,
    /// The records behind the header.
    Body(Vec<u8>),
    /// As many bytes are behind the place of the header already.
    InPlace(usize),
}

impl From<Writer> for Answer {
    fn from(writer: Writer) -> Self {
        Self::Body(writer.finish())
    }
}

/// Writes the reply to the request `unique`, and returns its length. Where the guest's buffers
/// cannot hold a header, there is no reply; where they cannot hold the body, it is `ERANGE`.
pub(crate) fn send(
    reply: &[VolatileSlice<'_>],
    unique: u64,
    outcome: Result<Answer, Errno>,
) -> usize {
    let room = match chain::length(reply).checked_sub(OUT_HEADER) {
        _ if matches!(outcome, Ok(Answer::None)) => return 0,
        None => return 0,
        Some(room) => room,
    };
    let (error, body) = match outcome {
        Ok(Answer::None | Answer::Empty) => (0, 0),
        Ok(Answer::InPlace(length)) => (0, length.min(room)),
        Ok(Answer::Body(body)) if body.len() > room => (error_code(Errno::RANGE), 0),
        Ok(Answer::Body(body)) => (0, chain::write(reply, OUT_HEADER, &body)),
        Err(errno) => (error_code(errno), 0),
    };
    let length = OUT_HEADER + body;
    let header = Writer::with_capacity(OUT_HEADER)
        .u32(u32::try_from(length).unwrap_or(u32::MAX))
        .u32(error.cast_unsigned())
        .u64(unique)
        .finish();
    chain::write(reply, 0, &header);
    length
}

/// The negative error number of a reply. Those from 512 on are the kernel's own business and
/// nothing a guest would take.
fn error_code(errno: Errno) -> i32 {
    match errno.raw_os_error() {
        code @ 1..512 => -code,
        _ => -Errno::IO.raw_os_error(),
    }
}
