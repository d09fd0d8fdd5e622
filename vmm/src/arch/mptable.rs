//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4): one entry per CPU, one ISA
//! bus, one I/O APIC and those of its interrupts that are used. The kernel writes to the I/O APIC
//! for each one listed, and each write is an exit.

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::layout::{IOAPIC, LOCAL_APIC, MP_TABLE, MP_TABLE_MAX};
use crate::{devices::ioapic, memory::GuestMemory};

/// CPUs with 8-bit APIC identifiers, one of which is the I/O APIC's and one the broadcast.
pub const MAX_CPUS: u8 = 254;

const FLOATING_POINTER_LEN: usize = 16;
const HEADER_LEN: usize = 44;
const SPEC_1_4: u8 = 4;
/// Version of KVM's local and I/O APICs: an integrated APIC.
const APIC_VERSION: u8 = 0x14;
const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
/// Family 6 in the CPU signature; Linux reads the truth from CPUID.
const CPU_SIGNATURE: u32 = 0x600;
/// CPUID.1:EDX as far as it matters here: FPU and APIC on chip.
const CPU_FEATURES: u32 = 0x201;
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;
const ALL_LOCAL_APICS: u8 = 0xff;

/// Failures of the MP table.
#[derive(Debug, Error)]
pub enum MpTableError {
    /// More CPUs than the table can describe.
    #[error("Cannot describe {0} CPUs to the guest: at most {MAX_CPUS}")]
    TooManyCpus(u8),
    /// More devices than the I/O APIC has pins.
    #[error("The I/O APIC has no pin for interrupt {0}")]
    NoPin(u32),
    /// Guest memory ends before the table's place.
    #[error("Cannot write the MP table to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// Writes the table for CPUs with APIC identifiers 0 to `cpus - 1` and devices with the interrupts
/// `irqs`.
pub fn write(memory: &GuestMemory, cpus: u8, irqs: &[u32]) -> Result<(), MpTableError> {
    if cpus > MAX_CPUS {
        return Err(MpTableError::TooManyCpus(cpus));
    }
    let pins = irqs
        .iter()
        .map(|irq| match u8::try_from(*irq) {
            Ok(pin) if pin < ioapic::MAX_PINS => Ok(pin),
            _ => Err(MpTableError::NoPin(*irq)),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let table = table(cpus, &pins);
    debug_assert!(table.len() <= MP_TABLE_MAX);
    memory
        .write_slice(&table, GuestAddress(MP_TABLE))
        .map_err(MpTableError::Write)
}

fn table(cpus: u8, pins: &[u8]) -> Vec<u8> {
    let (entries, count) = entries(cpus, pins);
    let mut table = floating_pointer();
    let header = header(&entries, count);
    table.extend(header);
    table.extend(entries);
    table
}

fn floating_pointer() -> Vec<u8> {
    let configuration = u32::try_from(MP_TABLE).unwrap_or(0) + 16;
    let mut pointer = Vec::with_capacity(FLOATING_POINTER_LEN);
    pointer.extend(b"_MP_");
    pointer.extend(configuration.to_le_bytes());
    pointer.extend([1, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer
}

fn header(entries: &[u8], count: u16) -> Vec<u8> {
    let length = u16::try_from(HEADER_LEN + entries.len()).unwrap_or(u16::MAX);
    let mut header = Vec::with_capacity(HEADER_LEN);
    header.extend(b"PCMP");
    header.extend(length.to_le_bytes());
    header.extend([SPEC_1_4, 0]);
    header.extend(b"BULKHEAD");
    header.extend(b"MICROVM     ");
    header.extend([0; 6]);
    header.extend(count.to_le_bytes());
    header.extend(LOCAL_APIC.to_le_bytes());
    header.extend([0; 4]);
    header[7] = checksum(&[&header, entries].concat());
    header
}

fn entries(cpus: u8, pins: &[u8]) -> (Vec<u8>, u16) {
    let ioapic_id = cpus;
    let mut entries = Vec::new();
    let mut count = 0u16;
    let mut push = |entry: &[u8]| {
        entries.extend(entry);
        count += 1;
    };
    for apic_id in 0..cpus {
        let bootstrap = if apic_id == 0 { CPU_BOOTSTRAP } else { 0 };
        let mut entry = vec![0, apic_id, APIC_VERSION, CPU_ENABLED | bootstrap];
        entry.extend(CPU_SIGNATURE.to_le_bytes());
        entry.extend(CPU_FEATURES.to_le_bytes());
        entry.extend([0; 8]);
        push(&entry);
    }
    push(b"\x01\x00ISA   ");
    let mut entry = vec![2, ioapic_id, APIC_VERSION, 1];
    entry.extend(IOAPIC.to_le_bytes());
    push(&entry);
    // Polarity and trigger "as the bus says": for ISA active high and edge-triggered, as an irqfd
    // raises them.
    for pin in pins {
        push(&[3, INTERRUPT_VECTORED, 0, 0, 0, *pin, ioapic_id, *pin]);
    }
    push(&[4, INTERRUPT_EXTERNAL, 0, 0, 0, 0, 0, 0]);
    push(&[4, INTERRUPT_NMI, 0, 0, 0, 0, ALL_LOCAL_APICS, 1]);
    (entries, count)
}

/// The byte that makes the sum of all zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    proptest! {
        #[test]
        fn every_table_adds_up(cpus in 1..=MAX_CPUS, pins in 0..ioapic::MAX_PINS) {
            let table = table(cpus, &(0..pins).collect::<Vec<_>>());
            prop_assert!(table.len() <= MP_TABLE_MAX);
            let (pointer, configuration) = table.split_at(FLOATING_POINTER_LEN);
            prop_assert_eq!(sum(pointer), 0);
            prop_assert_eq!(sum(configuration), 0);
            prop_assert_eq!(&configuration[..4], b"PCMP");
            let length = u16::from_le_bytes([configuration[4], configuration[5]]);
            prop_assert_eq!(usize::from(length), configuration.len());

            let count = u16::from_le_bytes([configuration[34], configuration[35]]);
            let mut rest = &configuration[HEADER_LEN..];
            let mut seen = 0;
            let mut enabled = 0;
            while let Some(kind) = rest.first() {
                if *kind == 0 {
                    enabled += u16::from(rest[3] & CPU_ENABLED);
                    prop_assert_eq!(rest[3] & CPU_BOOTSTRAP != 0, rest[1] == 0);
                }
                rest = &rest[if *kind == 0 { 20 } else { 8 }..];
                seen += 1;
            }
            prop_assert_eq!(seen, count);
            prop_assert_eq!(enabled, u16::from(cpus));
        }
    }

    #[test]
    fn too_many_cpus_or_interrupts_are_refused() {
        let memory = crate::memory::allocate(1).unwrap();
        assert!(matches!(
            write(&memory, 255, &[]),
            Err(MpTableError::TooManyCpus(255))
        ));
        write(&memory, MAX_CPUS, &[5, 119]).unwrap();
        let error = write(&memory, 1, &[120]).unwrap_err();
        assert!(matches!(error, MpTableError::NoPin(120)));
    }
}
