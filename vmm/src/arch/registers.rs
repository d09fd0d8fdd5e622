//! The state in which the boot CPU enters the kernel: 64-bit mode, flat segments, the first
//! gigabyte mapped to itself (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
//!
//! Other CPUs start as hardware does: KVM keeps them waiting for INIT and SIPI.

use std::io;

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::layout::{BOOT_PARAMS, GDT, PAGE_DIRECTORY, PDPT, PML4};
use crate::memory::GuestMemory;

const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
/// Null, unused, 64-bit code, data: the selectors that the boot protocol names.
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_HUGE: u64 = 1 << 7;
const RFLAGS_RESERVED: u64 = 2;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, write-back memory.
const MTRR_WRITE_BACK: u64 = (1 << 11) | 6;

/// Failures to bring a vCPU into its first state.
#[derive(Debug, Error)]
pub enum RegistersError {
    /// Guest memory ends too early.
    #[error("Cannot write the boot CPU's tables to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
    /// An ioctl on the vCPU failed.
    #[error("Cannot set the {what} of a vCPU")]
    Set {
        /// Which registers.
        what: &'static str,
        /// What the ioctl said.
        #[source]
        source: io::Error,
    },
    /// KVM stopped at a model-specific register.
    #[error("KVM does not take model-specific register {0:#x}")]
    Msr(u32),
}

/// Writes page tables and descriptor table.
pub fn write_tables(memory: &GuestMemory) -> Result<(), RegistersError> {
    let write = |address: u64, entries: &[u64]| {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.to_le_bytes())
            .collect();
        memory
            .write_slice(&bytes, GuestAddress(address))
            .map_err(RegistersError::Write)
    };
    let directory: Vec<u64> = (0..512)
        .map(|page| page << 21 | PAGE_HUGE | PAGE_PRESENT_WRITABLE)
        .collect();
    write(PML4, &[PDPT | PAGE_PRESENT_WRITABLE])?;
    write(PDPT, &[PAGE_DIRECTORY | PAGE_PRESENT_WRITABLE])?;
    write(PAGE_DIRECTORY, &directory)?;
    write(GDT, &GDT_ENTRIES)
}

/// Puts the boot CPU at the kernel's entry.
pub fn set_boot_cpu(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), RegistersError> {
    let mut sregs = vcpu.get_sregs().map_err(failed("system registers"))?;
    enter_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(failed("system registers"))?;
    vcpu.set_regs(&kvm_regs {
        rip: entry.0,
        rsi: BOOT_PARAMS,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    })
    .map_err(failed("general registers"))?;
    set_floating_point(vcpu)
}

/// What the firmware of a PC sets on every CPU.
pub fn set_common(vcpu: &VcpuFd) -> Result<(), RegistersError> {
    let entries = [
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).map_err(|_| RegistersError::Msr(0))?;
    let set = vcpu
        .set_msrs(&msrs)
        .map_err(failed("model-specific registers"))?;
    match entries.get(set) {
        Some(entry) => Err(RegistersError::Msr(entry.index)),
        None => Ok(()),
    }
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    let segment = |selector: u16, type_: u8, long: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(BOOT_CS, 0xb, 1);
    let data = segment(BOOT_DS, 0x3, 0);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

fn set_floating_point(vcpu: &VcpuFd) -> Result<(), RegistersError> {
    vcpu.set_fpu(&kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    })
    .map_err(failed("floating-point registers"))
}

fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> RegistersError {
    move |error| RegistersError::Set {
        what,
        source: error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_gigabyte_maps_to_itself() {
        let memory = crate::memory::allocate(1).unwrap();
        write_tables(&memory).unwrap();
        let read = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(read(PML4), PDPT | 3);
        assert_eq!(read(PDPT), PAGE_DIRECTORY | 3);
        assert_eq!(read(PAGE_DIRECTORY), 0x83);
        assert_eq!(read(PAGE_DIRECTORY + 511 * 8), (511 << 21) | 0x83);
    }
}
