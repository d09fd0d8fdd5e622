//! Bytes that look random and can be made again for comparison, on either side of a stream.

use std::io::{self, Read};

use anyhow::{Result, ensure};

/// A stream of `left` bytes; the same for the same seed (xorshift64*, all 256 values, no period
/// that a buffer's size divides).
pub struct Pattern {
    state: u64,
    left: u64,
    word: [u8; 8],
    used: usize,
}

impl Pattern {
    /// `length` bytes from this seed.
    pub fn new(seed: u64, length: u64) -> Self {
        Self {
            // The state must not be zero.
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            left: length,
            word: [0; 8],
            used: 8,
        }
    }

    fn next(&mut self) -> [u8; 8] {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    }

    /// All of it.
    pub fn bytes(mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl Read for Pattern {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = u64::try_from(buffer.len())
            .unwrap_or(u64::MAX)
            .min(self.left);
        let count = usize::try_from(room).map_err(io::Error::other)?;
        let mut rest = &mut buffer[..count];
        while !rest.is_empty() {
            if self.used == self.word.len() {
                self.word = self.next();
                self.used = 0;
            }
            let part = rest.len().min(self.word.len() - self.used);
            let (now, later) = rest.split_at_mut(part);
            now.copy_from_slice(&self.word[self.used..self.used + part]);
            self.used += part;
            rest = later;
        }
        self.left -= room;
        Ok(count)
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
        Pattern::new(seed, length).bytes().unwrap()
    }

    #[test]
    fn the_bytes_do_not_depend_on_how_they_are_read() {
        let whole = bytes(3, 1000);
        let mut pattern = Pattern::new(3, 1000);
        let mut pieces = Vec::new();
        for size in [1, 7, 8, 9, 0, 3, 500, 1000] {
            let mut piece = vec![0; size];
            let count = pattern.read(&mut piece).unwrap();
            pieces.extend_from_slice(&piece[..count]);
        }
        assert_eq!(pieces, whole);
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
