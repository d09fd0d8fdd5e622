//! What the shim and the guest's agent must agree on: the ttrpc service, the vsock ports, the
//! form of a stream and the place of the shared file system.
//!
//! The guest only dials and the host only accepts, so nothing in the guest can be reached over
//! vsock by another process of the guest:
//!
//! 1. The agent dials [`HOST_CID`]:[`AGENT_PORT`] when it is ready, and serves [`Agent`] on that
//!    connection. The shim accepts exactly one such connection in the life of a VM.
//! 2. For each stream of a process the shim puts a random token into its request. The agent dials
//!    [`STREAM_PORT`] and sends the token first; a connection with no token that the shim waits
//!    for is closed.
//!
//! A stream is plain bytes in one direction. The writer ends it with `shutdown(SHUT_WR)`.
//!
//! [`Agent`]: service::Agent

use std::time::Duration;

/// vsock context identifier of the host (`VMADDR_CID_HOST`, vsock(7)).
pub const HOST_CID: u32 = 2;

/// vsock context identifier of the guest. Every VM has a muxer of its own, so all may share one.
pub const GUEST_CID: u32 = 3;

/// Host port on which the agent reports for duty.
pub const AGENT_PORT: u32 = 1024;

/// Host port for the streams of processes.
pub const STREAM_PORT: u32 = 1025;

/// Bytes in a stream's token.
pub const TOKEN_LEN: usize = 16;

/// Bytes before each message on a resolver's stream, in both directions: what carries it
/// ([`RESOLVER_UDP`] or [`RESOLVER_TCP`]), a number by which the asker finds the answer (two bytes), and
/// the length of the message (two bytes); numbers are big-endian. Answers come in any order, and a
/// question may stay without one.
pub const RESOLVER_HEADER: usize = 5;

/// A datagram.
pub const RESOLVER_UDP: u8 = 0;

/// A message of a TCP connection, without its length (RFC 1035, 4.2.2).
pub const RESOLVER_TCP: u8 = 1;

/// How long a hook may take that names this timeout in seconds, or none: one that hangs must not
/// hang containerd for ever.
pub fn hook_time(timeout: Option<u64>) -> Duration {
    const DEFAULT: u64 = 120;
    const LONGEST: u64 = 24 * 60 * 60;
    Duration::from_secs(timeout.unwrap_or(DEFAULT).min(LONGEST))
}

/// Shares of CPU time, which are 2 to 262,144 and 1,024 by default, as a weight of cgroup v2, which is 1 to
/// 10,000 and 100 by default. The curve goes through these three points, and is that of runc since 1.3.2.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the numbers are small and positive"
)]
pub fn cpu_weight(shares: u64) -> u64 {
    // Rounded up, the ends would not be what they are.
    match shares {
        ..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let power = (shares as f64).log2();
            let exponent = (power * power + 125.0 * power) / 612.0 - 7.0 / 34.0;
            10_f64.powf(exponent).ceil() as u64
        }
    }
}

/// Tag of the virtio-fs device with one directory or file per share at its root.
pub const SHARED_FS_TAG: &str = "bulkhead";

#[allow(
    missing_docs,
    unused_imports,
    non_upper_case_globals,
    unused_mut,
    clippy::all,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "generated code"
)]
mod generated {
    pub mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }

    pub mod agent_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
}

/// Messages of the agent's protocol.
pub use generated::agent as messages;
/// Client and server of the agent's ttrpc service.
pub use generated::agent_ttrpc as service;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_weights() {
        // The last but one and the others between as `runc run` writes them.
        for (shares, weight) in [
            (0, 1),
            (2, 1),
            (3, 2),
            (102, 17),
            (512, 59),
            (1024, 100),
            (262_144, 10_000),
            (u64::MAX, 10_000),
        ] {
            assert_eq!(cpu_weight(shares), weight, "{shares}");
        }
    }
}
