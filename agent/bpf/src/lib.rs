//! eBPF programs without a compiler, and bpf(2).
//!
//! The shim leads packets and connections by such programs, the agent lets a container have its devices.
//! They are short, and depend on what is configured.

mod call;
mod program;

pub use call::{Kind, attach, attach_to_cgroup, put_socket, socket_map};
pub use program::{FRAME, Instruction, Program, Size};
