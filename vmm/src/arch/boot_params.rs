//! `struct boot_params`, the command line and the random seed: what a 64-bit Linux kernel is handed
//! (Documentation/arch/x86/boot.rst, zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::layout::{
    BOOT_PARAMS, COMMAND_LINE, COMMAND_LINE_MAX, HIMEM_START, LOW_MEMORY_END, SETUP_DATA,
};
use crate::memory::{self, GuestMemory};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// A boot loader without a registered number.
const LOADER_UNDEFINED: u8 = 0xff;
/// Protocol 2.15, the one with `setup_data` of every kind.
const PROTOCOL_VERSION: u16 = 0x020f;
/// `setup_data` type of a seed that the kernel credits as entropy and then wipes.
const SETUP_RNG_SEED: u32 = 9;
/// Bytes of the seed: twice the strength of the kernel's generator.
pub const SEED_LEN: usize = 64;

/// Failures of the hand-over.
#[derive(Debug, Error)]
pub enum BootParamsError {
    /// The command line, with what the VMM puts in front, has no room.
    #[error("The kernel command line of {0} bytes is longer than {max}: shorten kernel_args", max = COMMAND_LINE_MAX - 1)]
    CommandLineTooLong(usize),
    /// A zero byte or a line break in the command line.
    #[error("The kernel command line holds a control character: correct kernel_args")]
    CommandLineControl,
    /// The initramfs lies where the boot parameters cannot say.
    #[error("Cannot describe an initramfs of {1} bytes at guest address {0:#x}")]
    Initramfs(u64, u64),
    /// Guest memory ends too early.
    #[error("Cannot write the boot parameters to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// Writes everything that the kernel finds through its `boot_params` pointer.
pub fn write(
    memory: &GuestMemory,
    memory_bytes: u64,
    command_line: &str,
    initramfs: (GuestAddress, u64),
    seed: &[u8; SEED_LEN],
) -> Result<(), BootParamsError> {
    write_command_line(memory, command_line)?;
    write_seed(memory, seed)?;
    let params = params(memory_bytes, command_line, initramfs)?;
    memory
        .write_obj(params, GuestAddress(BOOT_PARAMS))
        .map_err(BootParamsError::Write)
}

fn write_command_line(memory: &GuestMemory, text: &str) -> Result<(), BootParamsError> {
    if text.len() >= COMMAND_LINE_MAX {
        return Err(BootParamsError::CommandLineTooLong(text.len()));
    }
    if text.bytes().any(|byte| byte.is_ascii_control()) {
        return Err(BootParamsError::CommandLineControl);
    }
    // Memory is fresh and zeroed: the final zero is there.
    memory
        .write_slice(text.as_bytes(), GuestAddress(COMMAND_LINE))
        .map_err(BootParamsError::Write)
}

fn write_seed(memory: &GuestMemory, seed: &[u8; SEED_LEN]) -> Result<(), BootParamsError> {
    let length = u32::try_from(SEED_LEN).unwrap_or(0);
    let mut data = Vec::with_capacity(16 + SEED_LEN);
    data.extend(0u64.to_le_bytes());
    data.extend(SETUP_RNG_SEED.to_le_bytes());
    data.extend(length.to_le_bytes());
    data.extend(seed);
    memory
        .write_slice(&data, GuestAddress(SETUP_DATA))
        .map_err(BootParamsError::Write)
}

fn params(
    memory_bytes: u64,
    command_line: &str,
    (initramfs, initramfs_size): (GuestAddress, u64),
) -> Result<boot_params, BootParamsError> {
    let out_of_reach = |_| BootParamsError::Initramfs(initramfs.0, initramfs_size);
    let too_long = |_| BootParamsError::CommandLineTooLong(command_line.len());
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = PROTOCOL_VERSION;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = u32::try_from(COMMAND_LINE).map_err(too_long)?;
    params.hdr.cmdline_size = u32::try_from(command_line.len()).map_err(too_long)?;
    params.hdr.ramdisk_image = u32::try_from(initramfs.0).map_err(out_of_reach)?;
    params.hdr.ramdisk_size = u32::try_from(initramfs_size).map_err(out_of_reach)?;
    params.hdr.setup_data = SETUP_DATA;
    for (entry, (start, end, kind)) in params.e820_table.iter_mut().zip(e820(memory_bytes)) {
        *entry = boot_e820_entry {
            addr: start,
            size: end - start,
            r#type: kind,
        };
        params.e820_entries += 1;
    }
    Ok(params)
}

/// (start, end, type) of each range of the memory map.
fn e820(memory_bytes: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_MEMORY_END, E820_RAM),
        (LOW_MEMORY_END, HIMEM_START, E820_RESERVED),
    ];
    for (start, size) in memory::ranges(memory_bytes) {
        if start + size > HIMEM_START {
            map.push((start.max(HIMEM_START), start + size, E820_RAM));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout::{HIGH_MEMORY_START, MMIO_HOLE_START};

    const INITRAMFS: (GuestAddress, u64) = (GuestAddress(0x100_0000), 0x2345);

    #[test]
    fn the_layout_is_the_kernels() {
        assert_eq!(size_of::<boot_params>(), 4096);
        assert_eq!(std::mem::offset_of!(boot_params, e820_entries), 0x1e8);
        assert_eq!(std::mem::offset_of!(boot_params, hdr), 0x1f1);
        assert_eq!(std::mem::offset_of!(boot_params, e820_table), 0x2d0);
    }

    #[test]
    fn the_kernel_finds_command_line_initramfs_and_seed() {
        let memory = memory::allocate(2).unwrap();
        write(&memory, 2 << 20, "quiet", INITRAMFS, &[7; SEED_LEN]).unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMS)).unwrap();
        let header = params.hdr;
        assert_eq!({ header.ramdisk_image }, 0x100_0000);
        assert_eq!({ header.ramdisk_size }, 0x2345);
        let mut line = [0; 6];
        let at = GuestAddress(u64::from(header.cmd_line_ptr));
        memory.read_slice(&mut line, at).unwrap();
        assert_eq!(&line, b"quiet\0");
        let mut data = [0; 16 + SEED_LEN];
        let at = GuestAddress(header.setup_data);
        memory.read_slice(&mut data, at).unwrap();
        assert_eq!(data[..8], [0; 8]);
        assert_eq!(data[8..16], [9, 0, 0, 0, 64, 0, 0, 0]);
        assert_eq!(data[16..], [7; SEED_LEN]);
    }

    #[test]
    fn the_memory_map_covers_all_memory_but_the_firmwares_place() {
        let bytes = MMIO_HOLE_START + (1 << 30);
        assert_eq!(
            e820(bytes),
            [
                (0, LOW_MEMORY_END, E820_RAM),
                (LOW_MEMORY_END, HIMEM_START, E820_RESERVED),
                (HIMEM_START, MMIO_HOLE_START, E820_RAM),
                (HIGH_MEMORY_START, HIGH_MEMORY_START + (1 << 30), E820_RAM),
            ]
        );
    }

    #[test]
    fn a_bad_command_line_is_refused() {
        let memory = memory::allocate(2).unwrap();
        let long = "x".repeat(COMMAND_LINE_MAX);
        assert!(matches!(
            write(&memory, 2 << 20, &long, INITRAMFS, &[0; SEED_LEN]),
            Err(BootParamsError::CommandLineTooLong(COMMAND_LINE_MAX))
        ));
        assert!(matches!(
            write(&memory, 2 << 20, "a\0b", INITRAMFS, &[0; SEED_LEN]),
            Err(BootParamsError::CommandLineControl)
        ));
    }
}
