//! Guest memory: anonymous, private to this process, and given to KVM as it is.

use std::io;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    mmap::{MmapRegion, MmapRegionBuilder},
};

use crate::{
    arch::layout::{HIGH_MEMORY_START, MMIO_HOLE_START},
    devices::virtio::registers::Registers,
};

/// All memory of a guest.
pub type GuestMemory = GuestMemoryMmap<()>;

/// A piece of guest memory, checked to lie inside it. The guest may change it at any time.
pub type VolatileSlice<'a> = vm_memory::VolatileSlice<'a, ()>;

/// Failures around guest memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The host does not have it.
    #[error(
        "Cannot allocate {mib} MiB of guest memory: lower memory_mib or free memory on the host"
    )]
    Allocate {
        /// Size asked for, in MiB.
        mib: u32,
        /// What mmap(2) said.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// A guest without memory.
    #[error("Cannot run a guest with no memory: raise memory_mib")]
    Empty,
    /// The regions are not a valid guest memory.
    #[error("Cannot lay out {0} MiB of guest memory")]
    Layout(u32, #[source] vm_memory::GuestRegionCollectionError),
    /// KVM did not take a region.
    #[error("Cannot give {size} bytes of memory at guest address {address:#x} to KVM")]
    Register {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        size: u64,
        /// What the ioctl said.
        #[source]
        source: io::Error,
    },
}

/// Maps `mib` MiB of zeroed memory. It costs the host only what the guest touches.
///
/// What does not fit below the MMIO hole continues at 4 GiB. There is no `MAP_NORESERVE`: under the
/// usual overcommit rules a size that the host could never provide fails here, and not as an
/// out-of-memory kill later.
pub fn allocate(mib: u32) -> Result<GuestMemory, MemoryError> {
    if mib == 0 {
        return Err(MemoryError::Empty);
    }
    let regions = ranges(u64::from(mib) << 20)
        .into_iter()
        .map(|(start, size)| {
            let size = usize::try_from(size).map_err(|_| MemoryError::Empty)?;
            let region = MmapRegionBuilder::new(size)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
                .build()
                .map_err(|source| MemoryError::Allocate { mib, source })?;
            advise_huge_pages(&region);
            // It fails only when the region would end beyond the last address.
            GuestRegionMmap::new(region, GuestAddress(start)).ok_or(MemoryError::Empty)
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemory::from_regions(regions).map_err(|source| MemoryError::Layout(mib, source))
}

/// Asks for transparent huge pages, which many hosts give only on request. A guest's boot touches
/// memory all over, and each page is an exit: with huge ones a small guest boots with a seventh of
/// the exits and holds an eighth more memory.
fn advise_huge_pages(region: &MmapRegion<()>) {
    // SAFETY: the range is a live anonymous mapping, and the advice does not change its content. A
    // kernel without huge pages refuses it, and nothing is lost.
    unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
}

/// Where `bytes` of memory lie in the guest: (start, size).
pub fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= MMIO_HOLE_START {
        vec![(0, bytes)]
    } else {
        vec![
            (0, MMIO_HOLE_START),
            (HIGH_MEMORY_START, bytes - MMIO_HOLE_START),
        ]
    }
}

/// Makes the memory the guest's. `memory` must outlive every `KVM_RUN` of `vm`; the [`crate::Vm`]
/// that owns both sees to it.
pub fn register(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    for (slot, region) in (0..).zip(memory.iter()) {
        // SAFETY: the region is a live mapping of exactly this size, regions do not overlap, each
        // has a slot of its own, and the mapping is dropped after the VM.
        unsafe {
            set_region(
                vm,
                kvm_userspace_memory_region {
                    slot,
                    flags: 0,
                    guest_phys_addr: region.start_addr().raw_value(),
                    memory_size: region.len(),
                    userspace_addr: region.as_ptr().addr() as u64,
                },
            )
        }?;
    }
    Ok(())
}

/// Lets the guest read a device's registers at `address`, in a slot that nothing else uses; its
/// writes stay exits. `registers` must outlive every `KVM_RUN` of `vm`: vCPUs hold the bus, and
/// the bus holds its devices.
pub fn register_readable(
    vm: &VmFd,
    slot: u32,
    address: u64,
    registers: &Registers,
) -> Result<(), MemoryError> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: address,
        memory_size: Registers::SIZE,
        userspace_addr: registers.address(),
    };
    // SAFETY: a page of this process that holds only atomics, which the guest cannot write; it lies
    // in the MMIO hole, where no memory of the guest is, and lives as long as said above.
    unsafe { set_region(vm, region) }
}

/// # Safety
///
/// As for [`VmFd::set_user_memory_region`].
unsafe fn set_region(vm: &VmFd, region: kvm_userspace_memory_region) -> Result<(), MemoryError> {
    // SAFETY: the caller has seen to it.
    unsafe { vm.set_user_memory_region(region) }.map_err(|error| MemoryError::Register {
        address: region.guest_phys_addr,
        size: region.memory_size,
        source: error.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_leaves_the_mmio_hole_free() {
        assert_eq!(ranges(512 << 20), [(0, 512 << 20)]);
        assert_eq!(
            ranges(MMIO_HOLE_START + 4096),
            [(0, MMIO_HOLE_START), (HIGH_MEMORY_START, 4096)]
        );
    }

    #[test]
    fn a_size_beyond_the_host_is_a_clear_error() {
        let error = allocate(u32::MAX).unwrap_err();
        assert!(error.to_string().contains("lower memory_mib"), "{error}");
        assert!(matches!(allocate(0), Err(MemoryError::Empty)));
    }
}
