//! Token buckets: how fast a guest may use what other pods share with it.

use std::time::{Duration, Instant};

/// A bucket that holds up to a second's worth of tokens, and is filled at a steady rate.
#[derive(Debug)]
pub struct Bucket {
    per_second: u64,
    /// Tokens at `at`; negative while what was taken in advance is not paid back.
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// A full bucket.
    pub fn new(per_second: u64) -> Self {
        Self {
            per_second,
            tokens: as_tokens(per_second),
            at: Instant::now(),
        }
    }

    /// Takes a token if there is one.
    pub fn try_take(&mut self) -> bool {
        self.fill(Instant::now());
        let there_is = self.tokens >= 1.0;
        if there_is {
            self.tokens -= 1.0;
        }
        there_is
    }

    /// Takes `count` tokens in any case, and tells how long to wait until they are there.
    pub fn take(&mut self, count: u64) -> Duration {
        self.take_at(count, Instant::now())
    }

    fn take_at(&mut self, count: u64, now: Instant) -> Duration {
        self.fill(now);
        self.tokens -= as_tokens(count);
        Duration::try_from_secs_f64(-self.tokens / as_tokens(self.per_second)).unwrap_or_default()
    }

    fn fill(&mut self, now: Instant) {
        let most = as_tokens(self.per_second);
        let elapsed = now.saturating_duration_since(self.at);
        self.tokens = (self.tokens + elapsed.as_secs_f64() * most).min(most);
        self.at = now;
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "a token more or less in 2^53 is none"
)]
fn as_tokens(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_the_rest_waits() {
        let mut bucket = Bucket::new(100);
        let begin = bucket.at;
        assert_eq!(bucket.take_at(100, begin), Duration::ZERO);
        assert_eq!(bucket.take_at(50, begin), Duration::from_millis(500));
        assert_eq!(bucket.take_at(50, begin), Duration::from_secs(1));
        let later = begin + Duration::from_secs(1);
        assert_eq!(bucket.take_at(0, later), Duration::ZERO);
        assert_eq!(bucket.take_at(10, later), Duration::from_millis(100));
        // However long it is left alone, it holds a second's worth.
        let much_later = later + Duration::from_secs(100);
        assert_eq!(bucket.take_at(200, much_later), Duration::from_secs(1));
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let mut bucket = Bucket::new(2);
        bucket.at += Duration::from_secs(3600);
        assert!(bucket.try_take() && bucket.try_take());
        assert!(!bucket.try_take());
    }
}
