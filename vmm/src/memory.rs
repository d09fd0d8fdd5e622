//! Guest memory: anonymous, private to this process, and given to KVM as it is.
//!
//! Nothing else of the process lies close to it: an access that runs past its first or last byte is
//! a fault and not a change of something else.

use std::{io, ptr};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    bitmap::{Bitmap, WithBitmapSlice},
    mmap::MmapRegionBuilder,
};

use crate::{
    arch::layout::{HIGH_MEMORY_START, MMIO_HOLE_START},
    devices::virtio::registers::Registers,
};

/// Guest memory starts at a multiple of this, so that the host can use huge pages for it.
const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4096;

/// All memory of a guest.
pub type GuestMemory = GuestMemoryMmap<Reservation>;

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
        /// What mmap(2) or mprotect(2) said.
        #[source]
        source: io::Error,
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
        .map(|(address, size)| {
            let size = usize::try_from(size).map_err(|_| MemoryError::Empty)?;
            let failed = |source| MemoryError::Allocate { mib, source };
            let reservation = Reservation::new(size).map_err(failed)?;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let start = reservation.open(size, protection).map_err(failed)?;
            advise_huge_pages(start, size);
            let builder = MmapRegionBuilder::new_with_bitmap(size, reservation);
            // SAFETY: these bytes were mapped for the region alone, which keeps the reservation.
            let builder = unsafe { builder.with_raw_mmap_pointer(start) };
            let region = builder
                .with_mmap_prot(protection)
                .build()
                .map_err(|error| failed(io::Error::other(error)))?;
            // It fails only when the region would end beyond the last address.
            GuestRegionMmap::new(region, GuestAddress(address)).ok_or(MemoryError::Empty)
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemory::from_regions(regions).map_err(|source| MemoryError::Layout(mib, source))
}

/// Asks for transparent huge pages, which many hosts give only on request. A guest's boot touches
/// memory all over, and each page is an exit: with huge ones a small guest boots with a seventh of
/// the exits and holds an eighth more memory.
fn advise_huge_pages(start: *mut u8, size: usize) {
    // SAFETY: the range is a live anonymous mapping, and the advice does not change its content. A
    // kernel without huge pages refuses it, and nothing is lost.
    unsafe { libc::madvise(start.cast(), size, libc::MADV_HUGEPAGE) };
}

/// Addresses of this process that belong to one region of guest memory, with at least a page before
/// and behind the region that cannot be accessed.
///
/// It goes with the region in the place of a bitmap of written pages, which nobody asks for.
#[derive(Debug)]
pub struct Reservation {
    start: *mut u8,
    size: usize,
}

// SAFETY: only addresses, which are the same in every thread.
unsafe impl Send for Reservation {}
// SAFETY: as above.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves as much as a region of `size` bytes needs. It costs nothing.
    fn new(size: usize) -> io::Result<Self> {
        let size = size
            .checked_add(2 * HUGE_PAGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: start.cast(),
            size,
        })
    }

    /// Makes the region accessible and returns its start.
    fn open(&self, size: usize, protection: libc::c_int) -> io::Result<*mut u8> {
        // From one page to a huge page before the region, and so at least a huge page behind it.
        let first = self.start.wrapping_add(PAGE);
        let start = first.wrapping_add(first.align_offset(HUGE_PAGE));
        // SAFETY: the range lies inside the reservation, which nothing uses yet.
        match unsafe { libc::mprotect(start.cast(), size, protection) } {
            0 => Ok(start),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`. The region that has the reservation is being dropped, and
        // whatever uses guest memory holds its regions.
        unsafe { libc::munmap(self.start.cast(), self.size) };
    }
}

impl WithBitmapSlice<'_> for Reservation {
    type S = ();
}

impl Bitmap for Reservation {
    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, _offset: usize) {}
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

/// Lets the guest read a page of devices' registers at `address`, in a slot that nothing else uses; its
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
        memory_size: Registers::PAGE_SIZE,
        userspace_addr: registers.page(),
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

    /// What /proc/self/maps says of the byte at an address: "rw-p", or nothing.
    fn access(address: usize) -> Option<String> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().find_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            (number(start)..number(end))
                .contains(&address)
                .then(|| rest[..4].to_owned())
        })
    }

    #[test]
    fn the_pages_around_memory_cannot_be_accessed() {
        let memory = allocate(3).unwrap();
        let region = memory.iter().next().unwrap();
        let start = region.as_ptr().addr();
        let end = start + (3 << 20);
        assert_eq!(start % HUGE_PAGE, 0);
        let around = [start - 1, start, end - 1, end].map(access);
        let expected = ["---p", "rw-p", "rw-p", "---p"].map(|text| Some(text.to_owned()));
        assert_eq!(around, expected);
    }

    #[test]
    fn addresses_are_given_back() {
        // All of them together are more than a process has.
        for _ in 0..10_000 {
            Reservation::new(64 << 30).unwrap();
        }
    }

    #[test]
    fn a_size_beyond_the_host_is_a_clear_error() {
        let error = allocate(u32::MAX).unwrap_err();
        assert!(error.to_string().contains("lower memory_mib"), "{error}");
        assert!(matches!(allocate(0), Err(MemoryError::Empty)));
    }
}
