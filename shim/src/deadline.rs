//! Deadlines for whoever does not answer: a guest, a VMM, a process of the shim's own.
//!
//! In debug builds `BULKHEAD_TEST_HASTE` says how many times shorter they are, so that tests can wait
//! for their end. Release builds do not read it.

use std::{future::Future, time::Duration};

use tokio::time::{self, Instant, Timeout};

#[cfg(debug_assertions)]
fn shortened(limit: Duration) -> Duration {
    use std::{env, sync::LazyLock};
    static HASTE: LazyLock<u32> = LazyLock::new(|| {
        let set = env::var("BULKHEAD_TEST_HASTE").ok();
        let set = set.and_then(|text| text.parse().ok());
        set.filter(|haste| *haste > 0).unwrap_or(1)
    });
    limit / *HASTE
}

#[cfg(not(debug_assertions))]
fn shortened(limit: Duration) -> Duration {
    limit
}

/// The end of a wait that begins now and may take `limit`.
pub fn after(limit: Duration) -> Instant {
    Instant::now() + shortened(limit)
}

/// Waits for `work`, for as long as `limit` at most.
pub fn timeout<F: Future>(limit: Duration, work: F) -> Timeout<F> {
    time::timeout(shortened(limit), work)
}
