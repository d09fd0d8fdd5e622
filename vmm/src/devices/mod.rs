//! Everything that the guest finds in its machine.

pub mod crash_console;
pub mod event_loop;
pub mod ioapic;
pub mod uart;
pub mod virtio;
