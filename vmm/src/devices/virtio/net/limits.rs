//! How fast an interface may send and receive.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::rate::Bucket;

/// The limits of one interface, the same in both directions.
#[derive(Debug, Default)]
pub struct Limits {
    /// From the guest.
    pub from_guest: Limit,
    /// To the guest.
    pub to_guest: Limit,
}

/// The limit of one direction, shared by its lanes.
#[derive(Debug, Default)]
pub struct Limit {
    packets: Option<Mutex<Bucket>>,
    bytes: Option<Mutex<Bucket>>,
}

impl Limits {
    /// So many packets and bytes in a second; 0 is without a limit. What is not split into segments
    /// yet is one packet.
    pub fn new(packets: u32, bytes: u64) -> Self {
        let bucket = |rate| (rate > 0).then(|| Mutex::new(Bucket::new(rate)));
        let limit = || Limit {
            packets: bucket(packets.into()),
            bytes: bucket(bytes),
        };
        Self {
            from_guest: limit(),
            to_guest: limit(),
        }
    }
}

impl Limit {
    /// When the next packet may pass, or nothing if it may now.
    pub fn wait(&self) -> Option<Instant> {
        let wait = self.take(0, 0);
        (!wait.is_zero()).then(|| Instant::now() + wait)
    }

    /// Counts a packet that has passed.
    pub fn passed(&self, bytes: usize) {
        self.take(1, u64::try_from(bytes).unwrap_or(u64::MAX));
    }

    fn take(&self, packets: u64, bytes: u64) -> Duration {
        let take = |bucket: &Option<Mutex<Bucket>>, count| {
            bucket.as_ref().map_or(Duration::ZERO, |bucket| {
                let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
                bucket.take(count)
            })
        };
        take(&self.packets, packets).max(take(&self.bytes, bytes))
    }
}
