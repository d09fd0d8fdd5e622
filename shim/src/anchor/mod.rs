//! Anchors: for each process of a container, a process on the host that has its PID towards
//! containerd, Docker, conmon and CNI.
//!
//! An anchor is in the container's cgroup and network namespace and sees an empty root. What
//! happens to it happens to the container's process: it passes signals on, its death kills the
//! container's process, and it exits with the exit code of the container's process.
//!
//! The shim and the anchor share a socket. The anchor sends [`READY`], or [`FAILED`] and a text;
//! then the number of each signal it gets. The shim sends one byte, the exit code.

mod handle;
pub mod process;

pub use handle::{Anchor, AnchorError, AnchorEvent, Network};

/// First argument of the executable that makes it an anchor.
pub const ARGUMENT: &str = "anchor";

/// Descriptor of the anchor's end of the socket.
const SOCKET_FD: i32 = 3;

/// First byte of an anchor that is set up.
const READY: u8 = 0;

/// First byte of an anchor that could not be set up; a text follows.
const FAILED: u8 = 1;
