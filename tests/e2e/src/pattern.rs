//! Bytes that look random and can be made again for comparison, on either side of a stream.

use std::io::{self, Read};

use anyhow::{Result, ensure};

/// A stream of `left` bytes; the same for the same seed (xorshift64*, all 256 values, no period
/// that a buffer's size divides).
pub struct Pattern {
    state: u64,
    left: u64,
}

impl Pattern {
    /// `length` bytes from this seed.
    pub fn new(seed: u64, length: u64) -> Self {
        // The state must not be zero.
        Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            left: length,
        }
    }

    fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

impl Read for Pattern {
    /// Whole words, whatever the buffer, so that the bytes do not depend on how they are read:
    /// the buffer must have room for eight.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        for word in buffer.chunks_exact_mut(8) {
            if self.left == 0 {
                break;
            }
            word.copy_from_slice(&self.next().to_le_bytes());
            let count = self.left.min(8);
            self.left -= count;
            filled += usize::try_from(count).map_err(io::Error::other)?;
        }
        Ok(filled)
    }
}

/// Fails, with the first offset that differs, unless `received` is this pattern.
pub fn compare(what: &str, received: &[u8], seed: u64, length: u64) -> Result<()> {
    let mut expected = Pattern::new(seed, length);
    let mut block = vec![0; 64 * 1024];
    let mut offset = 0;
    loop {
        let count = expected.read(&mut block)?;
        if count == 0 {
            break;
        }
        let end = received.len().min(offset + count);
        let part = received.get(offset..end).unwrap_or_default();
        if part != &block[..count] {
            let same = part.iter().zip(&block).take_while(|(a, b)| a == b).count();
            anyhow::bail!(
                "{what}: {} of {length} bytes arrived; the first difference is at byte {}",
                received.len(),
                offset + same
            );
        }
        offset += count;
    }
    ensure!(
        received.len() == offset,
        "{what}: {} bytes arrived, {length} were sent",
        received.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(seed: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(length).unwrap().next_multiple_of(8)];
        let count = Pattern::new(seed, length).read(&mut bytes).unwrap();
        bytes.truncate(count);
        bytes
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes() {
        assert_eq!(bytes(1, 1000), bytes(1, 1000));
        assert_ne!(bytes(1, 1000), bytes(2, 1000));
        assert_eq!(bytes(1, 13).len(), 13);
        assert!(compare("x", &bytes(1, 200_001), 1, 200_001).is_ok());
    }

    #[test]
    fn a_change_a_loss_and_an_addition_are_found() {
        let mut changed = bytes(1, 1000);
        changed[700] ^= 1;
        let error = compare("x", &changed, 1, 1000).unwrap_err().to_string();
        assert!(error.contains("at byte 700"), "{error}");
        assert!(compare("x", &bytes(1, 999), 1, 1000).is_err());
        let mut longer = bytes(1, 1000);
        longer.push(0);
        assert!(compare("x", &longer, 1, 1000).is_err());
    }
}
