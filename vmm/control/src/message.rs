//! What is said over the control socket.

use serde::{Deserialize, Serialize};

/// What the shim asks of the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Request {
    /// Builds the VM and runs it. Descriptors: `/dev/kvm`, the kernel, the initramfs, and with
    /// [`VmConfig::console`] the file that the guest's console is appended to.
    Boot(VmConfig),
    /// Makes a directory or file visible at the root of the shared file system, under `name`.
    /// Descriptor: the directory or file, opened with `O_PATH`.
    Share {
        /// A single path component, unused so far.
        name: String,
        /// The guest can change nothing in it.
        read_only: bool,
        /// Nobody on the host changes it while it is shared, so the guest may cache it for as
        /// long as it likes.
        exclusive: bool,
    },
    /// Takes a share away and closes every descriptor below it before the reply.
    Unshare {
        /// The name given to [`Request::Share`].
        name: String,
    },
    /// Connects a network interface with the guest: the device of `slot` becomes one. Descriptors: a
    /// queue of one tap for each of its queue pairs, from 1 to [`VmConfig::queue_pairs`], that does not
    /// block, with the header of virtio-net before each packet and all offloads of TCP and checksums on.
    AttachNic {
        /// From 0 to [`NICS`] - 1, without an interface so far.
        slot: u8,
        /// The interface's MAC address.
        mac: [u8; 6],
        /// Its MTU in bytes.
        mtu: u16,
    },
    /// Takes an interface away, which the guest's driver has left, and closes its taps before the
    /// reply.
    DetachNic {
        /// The slot given to [`Request::AttachNic`].
        slot: u8,
    },
    /// Asks for the VMM's counters.
    Counters,
}

impl Request {
    /// What is asked, in a word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Boot(_) => "Boot",
            Self::Share { .. } => "Share",
            Self::Unshare { .. } => "Unshare",
            Self::AttachNic { .. } => "AttachNic",
            Self::DetachNic { .. } => "DetachNic",
            Self::Counters => "Counters",
        }
    }
}

/// How many network interfaces a VM can have at a time.
pub const NICS: u8 = 8;

/// The most queue pairs of an interface.
pub const MAX_QUEUE_PAIRS: u8 = 4;

/// The place of the first network device among a VM's virtio devices.
pub const FIRST_NIC: u8 = 3;

/// The name of the platform device in the guest, as in `/sys/bus/platform/devices`, that becomes the
/// interface of a slot.
pub fn nic_device(slot: u8) -> String {
    format!("virtio-mmio.{}", u16::from(FIRST_NIC) + u16::from(slot))
}

/// A VM, complete and immutable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Number of vCPUs, from 1.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Added to the end of the kernel command line; may be empty.
    pub kernel_args: String,
    /// File requests of the guest in a second; 0 is without a limit.
    pub fs_requests_per_second: u32,
    /// Bytes that the guest may read and write of files in a second; 0 is without a limit.
    pub fs_bytes_per_second: u64,
    /// Packets that each network interface may send, and as many that it may receive, in a second; 0
    /// is without a limit.
    pub net_packets_per_second: u32,
    /// Bytes, likewise.
    pub net_bytes_per_second: u64,
    /// Adds a virtio-console, written to the descriptor that comes with the request.
    pub console: bool,
}

impl VmConfig {
    /// Queue pairs of each network interface: one for each vCPU, up to a few.
    pub fn queue_pairs(&self) -> u8 {
        self.vcpus.clamp(1, MAX_QUEUE_PAIRS)
    }
}

/// The VMM's answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Reply {
    /// The request was carried out. For [`Request::Boot`]: the vCPUs are about to run.
    Done,
    /// The answer to [`Request::Counters`].
    Counters(Counters),
    /// The request failed and changed nothing. One line, with its causes.
    Failed(String),
}

/// What the VMM says unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Event {
    /// The guest has dialled this vsock port of the host. Descriptor: a stream socket, the other
    /// end of the connection. Closing it resets the connection.
    Connection {
        /// Port on the host's side.
        port: u32,
    },
    /// The VM has ended, and the VMM exits next.
    Stopped {
        /// Why.
        reason: StopReason,
        /// The last lines of the guest's console, or nothing.
        console: String,
    },
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum StopReason {
    /// The guest reset or shut itself down: a reboot, a panic, or a triple fault.
    Reset,
    /// A vCPU could not go on, or the VMM itself failed. One line, with its causes.
    Failed(String),
}

/// What the VMM has counted since its start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// Exits from guest mode by KVM's own count, over all vCPUs (`exits` of `KVM_GET_STATS_FD`).
    pub exits: u64,
    /// Returns of `KVM_RUN` to the VMM, over all vCPUs.
    pub user_exits: u64,
    /// `CLOCK_MONOTONIC` of the host, in nanoseconds, just before the first `KVM_RUN`.
    pub entered_ns: u64,
    /// When the VMM's process was confined.
    pub jail: JailTimes,
    /// Per device, by name.
    pub devices: std::collections::BTreeMap<String, DeviceCounters>,
}

/// When each part of the jail was done: `CLOCK_MONOTONIC` of the host, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailTimes {
    /// The process began to run.
    pub started_ns: u64,
    /// Resource limits were set.
    pub limited_ns: u64,
    /// It was in namespaces of its own.
    pub separated_ns: u64,
    /// It was in the empty root.
    pub rooted_ns: u64,
    /// It had joined the pod's user namespace.
    pub joined_ns: u64,
    /// Nothing was left to give up.
    pub jailed_ns: u64,
}

/// What one device has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceCounters {
    /// Notifications by the guest.
    pub kicks: u64,
    /// Interrupts sent to the guest.
    pub interrupts: u64,
    /// Payload from the guest, in bytes.
    pub bytes_from_guest: u64,
    /// Payload to the guest, in bytes.
    pub bytes_to_guest: u64,
}

/// Everything the VMM sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum FromVmm {
    /// The answer to the oldest request without one.
    Reply(Reply),
    /// Something that happened.
    Event(Event),
}
