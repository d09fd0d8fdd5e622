//! Bulkhead's virtual machine monitor: a Linux guest on KVM with virtio devices, all in one process
//! that has nothing but the descriptors it was handed.
//!
//! [`control::serve`] is what `bulkhead-vmm` does. [`builder::build`] is the boot recipe.
//!
//! | thread | what it does |
//! |---|---|
//! | main | the control socket |
//! | `vcpu0`, … | the guest, and its accesses to registers of devices |
//! | `devices` | vsock, rng, console: never waits for anything outside |
//! | `fs` (a few) | files: may wait for a disk |
//! | `net` (a few) | network interfaces, each a queue pair of all of them |
//!
//! Each thread may make only the system calls of its [`seccomp::Filter`].
//!
//! The guest is hostile. Every address, length and index from it is checked before use; a device
//! whose rules it breaks stops until it is reset.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

pub mod arch;
#[cfg(feature = "back-door")]
pub mod back_door;
pub mod builder;
pub mod bus;
mod command_line;
pub mod control;
pub mod counters;
pub mod devices;
pub mod jail;
pub mod kernel;
pub mod memory;
pub mod rate;
pub mod seccomp;
pub mod thread;
pub mod vcpu;

pub use builder::Vm;
