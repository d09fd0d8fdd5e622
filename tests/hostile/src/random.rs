//! Random numbers that a seed repeats, and values that are more likely than others to hit a limit.

/// A generator (splitmix64).
pub struct Random(u64);

impl Random {
    /// The generator of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.any() % limit
    }

    /// The lower half of any number.
    pub fn word(&mut self) -> u32 {
        low(self.any())
    }

    /// A size or count below `limit`, which is not 0.
    pub fn index(&mut self, limit: usize) -> usize {
        // It was a usize before.
        usize::try_from(self.below(limit as u64)).unwrap_or(0)
    }

    /// True once in `count` times.
    pub fn once_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// One of several.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }

    /// A number at or near a limit of something, or a small one, or any.
    pub fn number(&mut self) -> u64 {
        let shift = self.below(64);
        let power = 1 << shift;
        match self.below(8) {
            0 => 0,
            1 => power,
            2 => power - 1,
            3 => u64::MAX - self.below(64),
            4 | 5 => self.below(64),
            6 => self.below(1 << 16),
            _ => self.any(),
        }
    }
}

/// The lower 32 bits.
#[allow(clippy::cast_possible_truncation, reason = "that is its purpose")]
pub fn low(value: u64) -> u32 {
    value as u32
}

/// The lower 16 bits.
#[allow(clippy::cast_possible_truncation, reason = "that is its purpose")]
pub fn low16(value: u64) -> u16 {
    value as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_and_another_differs() {
        let mut numbers = [7, 7, 8].map(|seed| {
            let mut random = Random::new(seed);
            [(); 20].map(|()| random.number())
        });
        assert_eq!(numbers[0], numbers[1]);
        assert_ne!(numbers[1], numbers[2]);
        numbers[2].sort_unstable();
        assert!(numbers[2][0] < 64 && numbers[2][19] > 1 << 32);
    }
}
