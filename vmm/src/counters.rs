//! What is counted while the VM runs.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::fs::FileExt,
    },
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use bulkhead_vmm_control::DeviceCounters;
use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::{ioctl::ioctl, ioctl_io_nr};

mod request {
    #![allow(missing_docs, reason = "the macro makes a public function")]
    use super::{KVMIO, ioctl_io_nr};

    ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
}

/// Counters of one device, added to by whichever thread works on it.
#[derive(Debug, Default)]
pub struct DeviceStats {
    kicks: AtomicU64,
    interrupts: AtomicU64,
    bytes_from_guest: AtomicU64,
    bytes_to_guest: AtomicU64,
}

impl DeviceStats {
    /// The guest has notified the device `count` times.
    pub fn kicked(&self, count: u64) {
        self.kicks.fetch_add(count, Relaxed);
    }

    /// The device has interrupted the guest.
    pub fn interrupted(&self) {
        self.interrupts.fetch_add(1, Relaxed);
    }

    /// `bytes` of payload have come from the guest.
    pub fn from_guest(&self, bytes: usize) {
        self.bytes_from_guest.fetch_add(bytes as u64, Relaxed);
    }

    /// `bytes` of payload have gone to the guest.
    pub fn to_guest(&self, bytes: usize) {
        self.bytes_to_guest.fetch_add(bytes as u64, Relaxed);
    }

    /// The counts of this moment.
    pub fn snapshot(&self) -> DeviceCounters {
        DeviceCounters {
            kicks: self.kicks.load(Relaxed),
            interrupts: self.interrupts.load(Relaxed),
            bytes_from_guest: self.bytes_from_guest.load(Relaxed),
            bytes_to_guest: self.bytes_to_guest.load(Relaxed),
        }
    }
}

/// KVM's own count of a vCPU's exits from guest mode, of which most never reach this process
/// (Documentation/virt/kvm/api.rst, `KVM_GET_STATS_FD`).
#[derive(Debug)]
pub struct ExitCounter {
    statistics: File,
    offset: u64,
}

impl ExitCounter {
    /// Finds the counter, or nothing when this host's KVM does not offer it (before Linux 5.14).
    pub fn new(vcpu: &VcpuFd) -> Option<Self> {
        // SAFETY: the ioctl takes no argument and returns a new descriptor or -1.
        let fd = unsafe { ioctl(vcpu, request::KVM_GET_STATS_FD()) };
        if fd < 0 {
            return None;
        }
        // SAFETY: the descriptor is new and nothing else knows it.
        let statistics = unsafe { File::from_raw_fd(fd) };
        debug_assert!(statistics.as_raw_fd() >= 0);
        let offset = find(&statistics, b"exits").ok()??;
        Some(Self { statistics, offset })
    }

    /// Exits so far.
    pub fn read(&self) -> u64 {
        let mut value = [0; 8];
        match self.statistics.read_exact_at(&mut value, self.offset) {
            Ok(()) => u64::from_ne_bytes(value),
            Err(_) => 0,
        }
    }
}

/// Where in the file the value called `name` is: `struct kvm_stats_header` leads to an array of
/// `struct kvm_stats_desc`, each with a name behind it.
fn find(statistics: &File, name: &[u8]) -> io::Result<Option<u64>> {
    let read_u32 = |at: u64| {
        let mut value = [0; 4];
        statistics.read_exact_at(&mut value, at)?;
        Ok::<_, io::Error>(u64::from(u32::from_ne_bytes(value)))
    };
    const DESCRIPTION_LEN: u64 = 16;
    let name_size = read_u32(4)?;
    let count = read_u32(8)?;
    let descriptions = read_u32(16)?;
    let data = read_u32(20)?;
    for index in 0..count {
        let description = descriptions + index * (DESCRIPTION_LEN + name_size);
        let mut text = vec![0; usize::try_from(name_size).unwrap_or(0)];
        statistics.read_exact_at(&mut text, description + DESCRIPTION_LEN)?;
        if text.split(|byte| *byte == 0).next() == Some(name) {
            return Ok(Some(data + read_u32(description + 8)?));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_statistic_is_found_by_its_name() {
        let mut bytes = Vec::new();
        for field in [0u32, 8, 2, 0, 24, 100] {
            bytes.extend(field.to_ne_bytes());
        }
        for (name, offset) in [(b"exits_a\0", 0u32), (b"exits\0\0\0", 8)] {
            bytes.extend([0; 8]);
            bytes.extend(offset.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(name);
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        assert_eq!(find(&file, b"exits").unwrap(), Some(108));
        assert_eq!(find(&file, b"nothing").unwrap(), None);
    }
}
