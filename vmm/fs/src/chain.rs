//! The guest's buffers of one request or reply: slices that together are one run of bytes.

use rustix::io::Errno;
use vm_memory::{Bytes, VolatileSlice};

/// Buffers handed to one system call. 1 MiB in pages fits; the kernel takes 1024 (`UIO_MAXIOV`).
const BATCH: usize = 260;

/// The length of the chain in bytes.
pub(crate) fn length(chain: &[VolatileSlice<'_>]) -> usize {
    chain
        .iter()
        .fold(0, |sum, slice| sum.saturating_add(slice.len()))
}

/// The part of each slice that lies in `offset..offset + count` of the chain.
fn parts<'a>(
    chain: &'a [VolatileSlice<'a>],
    offset: usize,
    count: usize,
) -> impl Iterator<Item = VolatileSlice<'a>> {
    let mut skip = offset;
    let mut left = count;
    chain.iter().filter_map(move |slice| {
        let from = skip.min(slice.len());
        skip -= from;
        let take = left.min(slice.len() - from);
        left -= take;
        if take == 0 {
            return None;
        }
        slice.subslice(from, take).ok()
    })
}

/// Copies from the chain, from `offset` on, until `buffer` is full or the chain ends. Returns the
/// bytes copied.
pub(crate) fn read(chain: &[VolatileSlice<'_>], offset: usize, buffer: &mut [u8]) -> usize {
    let mut done = 0;
    for part in parts(chain, offset, buffer.len()) {
        let end = done + part.len();
        let Some(target) = buffer.get_mut(done..end) else {
            break;
        };
        if part.read_slice(target, 0).is_err() {
            break;
        }
        done = end;
    }
    done
}

/// Copies `bytes` into the chain from `offset` on. Returns the bytes copied.
pub(crate) fn write(chain: &[VolatileSlice<'_>], offset: usize, bytes: &[u8]) -> usize {
    let mut done = 0;
    for part in parts(chain, offset, bytes.len()) {
        let end = done + part.len();
        let Some(source) = bytes.get(done..end) else {
            break;
        };
        if part.write_slice(source, 0).is_err() {
            break;
        }
        done = end;
    }
    done
}

/// Lets `transfer` move bytes between a file and `offset..offset + count` of the chain, a batch of
/// buffers at a time: it gets the buffers and the bytes moved before, and returns the bytes moved.
/// Ends early where a batch is not moved whole. An error counts only when nothing was moved.
pub(crate) fn transfer(
    chain: &[VolatileSlice<'_>],
    offset: usize,
    count: usize,
    mut transfer: impl FnMut(&[libc::iovec], usize) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    let mut parts = parts(chain, offset, count);
    let mut done = 0;
    loop {
        let mut batch = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; BATCH];
        let mut used = 0;
        let mut bytes = 0;
        for (buffer, part) in batch.iter_mut().zip(parts.by_ref()) {
            buffer.iov_base = part.ptr_guard_mut().as_ptr().cast();
            buffer.iov_len = part.len();
            bytes += part.len();
            used += 1;
        }
        if used == 0 {
            return Ok(done);
        }
        match transfer(&batch[..used], done) {
            Ok(moved) if moved == bytes => done += moved,
            Ok(moved) => return Ok(done + moved),
            Err(errno) if done == 0 => return Err(errno),
            Err(_) => return Ok(done),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_cross_the_borders_of_slices() {
        let mut memory = [0; 10];
        let (a, b) = memory.split_at_mut(3);
        let chain = [VolatileSlice::from(a), VolatileSlice::from(b)];
        assert_eq!(length(&chain), 10);
        assert_eq!(write(&chain, 2, &[1, 2, 3]), 3);
        assert_eq!(write(&chain, 8, &[4, 5, 6]), 2);
        assert_eq!(write(&chain, 11, &[7]), 0);
        let mut copy = [9; 12];
        assert_eq!(read(&chain, 0, &mut copy), 10);
        assert_eq!(copy, [0, 0, 1, 2, 3, 0, 0, 0, 4, 5, 9, 9]);
    }

    #[test]
    fn a_transfer_takes_every_buffer_and_stops_where_the_file_does() {
        let mut memory = vec![0; 1000];
        let chain: Vec<_> = memory.chunks_mut(1).map(VolatileSlice::from).collect();
        let mut calls = Vec::new();
        let moved = transfer(&chain, 10, 600, |buffers, done| {
            calls.push((buffers.len(), done));
            Ok(buffers.len())
        });
        assert_eq!(moved, Ok(600));
        assert_eq!(calls, [(260, 0), (260, 260), (80, 520)]);
        assert_eq!(transfer(&chain, 0, 1000, |_, _| Ok(7)), Ok(7));
        assert_eq!(
            transfer(&chain, 0, 1000, |_, done| if done == 0 {
                Ok(260)
            } else {
                Err(Errno::NOSPC)
            }),
            Ok(260)
        );
    }
}
