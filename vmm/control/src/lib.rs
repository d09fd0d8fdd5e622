//! The control socket between the shim and its VMM.
//!
//! A `SOCK_SEQPACKET` pair, made by the shim before it starts `bulkhead-vmm` ([`Launch`]); the VMM's
//! end is its descriptor [`CONTROL_FD`]. Each packet is one JSON message of at most [`MAX_MESSAGE`] bytes,
//! with at most [`MAX_FDS`] descriptors beside it (`SCM_RIGHTS`, unix(7)).
//!
//! The shim sends [`Request`]s and the VMM answers each with one [`Reply`], in order. The first
//! request is [`Request::Boot`], and there is only one. Between replies the VMM sends [`Event`]s.
//! When either end closes, the other side's owner ends the VM.

mod capabilities;
mod channel;
mod launch;
mod message;
mod spawn;
mod user_namespace;

pub use capabilities::NEEDED_CAPABILITIES;
pub use channel::{Channel, ChannelError, MAX_FDS, MAX_MESSAGE, Packet};
pub use launch::{
    CONTROL_FD, FIRST_FREE_FD, IDS_ALONE, Launch, USER_NAMESPACE_FD, needs_core_scheduling,
    spawn_alone, spawn_alone_after,
};
pub use message::{
    Counters, DeviceCounters, Event, FIRST_NIC, FromVmm, JailTimes, MAX_QUEUE_PAIRS, NICS, Reply,
    Request, StopReason, VmConfig, nic_device,
};
pub use spawn::{Spawn, Spawned};
pub use user_namespace::{IdMap, IdRange, UserNamespace, UserNamespaceError, namespace_with};
