//! Brings kernel and initramfs into guest memory: read(2) straight into the place where they run.

use std::{
    fs::File,
    io::{self, Seek},
};

use linux_loader::loader::{Elf, KernelLoader};
use thiserror::Error;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::{arch::layout::HIMEM_START, memory::GuestMemory};

const PAGE: u64 = 4096;
/// What the kernel needs beside its image and the initramfs before it can say so itself.
const WORKING_MEMORY: u64 = 16 << 20;

/// Failures to load the guest.
#[derive(Debug, Error)]
pub enum KernelError {
    /// Not an uncompressed 64-bit ELF kernel, or larger than the guest.
    #[error(
        "Cannot load the guest kernel: is it an uncompressed vmlinux, and memory_mib large enough?"
    )]
    Kernel(#[source] linux_loader::loader::Error),
    /// The initramfs is no regular file.
    #[error("Cannot find the start and end of the initramfs")]
    InitramfsSize(#[source] io::Error),
    /// An initramfs without a byte.
    #[error("The initramfs is empty")]
    InitramfsEmpty,
    /// Kernel and initramfs do not leave enough.
    #[error("Guest memory has no room for kernel and initramfs: memory_mib must be at least {0}")]
    MemoryTooSmall(u64),
    /// Reading the initramfs failed.
    #[error("Cannot read the initramfs into guest memory")]
    Initramfs(#[source] vm_memory::GuestMemoryError),
}

/// What was loaded where.
#[derive(Debug, Clone, Copy)]
pub struct Loaded {
    /// The kernel's first instruction.
    pub entry: GuestAddress,
    /// The initramfs: start and length.
    pub initramfs: (GuestAddress, u64),
}

/// Loads the kernel where its program headers say, and the initramfs at the top of the memory below
/// the MMIO hole, out of the kernel's way.
pub fn load(
    memory: &GuestMemory,
    kernel: &mut File,
    initramfs: &mut File,
) -> Result<Loaded, KernelError> {
    // Whoever checked the file has left it somewhere else.
    let size = initramfs
        .rewind()
        .and_then(|()| initramfs.metadata())
        .map_err(KernelError::InitramfsSize)?
        .len();
    if size == 0 {
        return Err(KernelError::InitramfsEmpty);
    }
    let elf = Elf::load(memory, None, kernel, Some(GuestAddress(HIMEM_START)))
        .map_err(KernelError::Kernel)?;

    let low_end = memory
        .iter()
        .next()
        .map_or(0, |region| region.last_addr().raw_value() + 1);
    let needed = [size, PAGE, WORKING_MEMORY]
        .iter()
        .try_fold(elf.kernel_end, |sum, part| sum.checked_add(*part));
    let needed = needed.unwrap_or(u64::MAX);
    if needed > low_end {
        return Err(KernelError::MemoryTooSmall(needed.div_ceil(1 << 20)));
    }
    let start = GuestAddress((low_end - size) & !(PAGE - 1));
    let length = usize::try_from(size).map_err(|_| KernelError::MemoryTooSmall(size >> 20))?;
    memory
        .read_exact_volatile_from(start, initramfs, length)
        .map_err(KernelError::Initramfs)?;
    Ok(Loaded {
        entry: elf.kernel_load,
        initramfs: (start, size),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A 64-bit ELF with one loadable segment at 16 MiB.
    fn elf(code: &[u8], memory_size: u64) -> Vec<u8> {
        let mut elf = vec![0; 120];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[24..32].copy_from_slice(&0x100_0000u64.to_le_bytes());
        elf[32..40].copy_from_slice(&64u64.to_le_bytes());
        elf[54..58].copy_from_slice(&[56, 0, 1, 0]);
        elf[64..68].copy_from_slice(&1u32.to_le_bytes());
        elf[72..80].copy_from_slice(&120u64.to_le_bytes());
        elf[88..96].copy_from_slice(&0x100_0000u64.to_le_bytes());
        elf[96..104].copy_from_slice(&(code.len() as u64).to_le_bytes());
        elf[104..112].copy_from_slice(&memory_size.to_le_bytes());
        elf.extend(code);
        elf
    }

    #[test]
    fn kernel_and_initramfs_are_where_they_should_be() {
        let memory = crate::memory::allocate(64).unwrap();
        let mut initramfs = file(&[9; 5000]);
        let loaded = load(&memory, &mut file(&elf(b"code", 4096)), &mut initramfs).unwrap();
        assert_eq!(loaded.entry, GuestAddress(0x100_0000));
        let mut code = [0; 4];
        memory.read_slice(&mut code, loaded.entry).unwrap();
        assert_eq!(&code, b"code");
        let (start, size) = loaded.initramfs;
        assert_eq!((start.0, size), ((64 << 20) - 8192, 5000));
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(start.0 + 4999)).unwrap(),
            9
        );
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let memory = crate::memory::allocate(32).unwrap();
        let error = load(&memory, &mut file(b"#!/bin/sh\n"), &mut file(b"x")).unwrap_err();
        assert!(matches!(error, KernelError::Kernel(_)));
    }

    #[test]
    fn a_guest_that_is_too_small_says_what_it_needs() {
        let memory = crate::memory::allocate(32).unwrap();
        let kernel = elf(b"code", 20 << 20);
        let error = load(&memory, &mut file(&kernel), &mut file(b"x")).unwrap_err();
        assert!(matches!(error, KernelError::MemoryTooSmall(53)), "{error}");
        let error = load(&memory, &mut file(&elf(b"code", 1)), &mut file(b"")).unwrap_err();
        assert!(matches!(error, KernelError::InitramfsEmpty));
    }
}
