//! What a vCPU reads with CPUID: all that KVM supports on this host, with the topology of this VM:
//! one package, a core for each vCPU, one thread on each (Intel SDM volume 2A, "CPUID"; AMD APM
//! volume 3, appendix E).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use thiserror::Error;

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPER_THREADING: u32 = 1 << 28;
const CMP_LEGACY: u32 = 1 << 1;
/// A guest that can run guests reaches much more of KVM, and no container needs it.
const INTEL_VIRTUALISATION: u32 = 1 << 5;
const AMD_VIRTUALISATION: u32 = 1 << 2;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// KVM has no room for more leaves.
#[derive(Debug, Error)]
#[error("KVM takes no more than {0} CPUID leaves")]
pub struct TooManyLeaves(usize);

/// Adapts the leaves that KVM supports to vCPU `index` of `count`. The APIC identifier is the
/// index.
pub fn adapt(
    supported: &CpuId,
    index: u8,
    count: u8,
    tsc_deadline: bool,
) -> Result<CpuId, TooManyLeaves> {
    let (index, count) = (u32::from(index), u32::from(count));
    // Bits of an APIC identifier that tell the package's cores apart.
    let width = count.next_power_of_two().trailing_zeros();
    let has_levels = |leaf| leaf == TOPOLOGY || leaf == TOPOLOGY_V2;
    // KVM leaves the topology to the VMM. Leaf 0x1f has nothing to add to 0xb.
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|entry| !has_levels(entry.function))
        .copied()
        .collect();
    let highest = entries.iter().find(|entry| entry.function == 0);
    if highest.is_some_and(|entry| entry.eax >= TOPOLOGY) {
        entries.extend([0, 1].map(|level| topology_level(level, index, count, width)));
    }
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                set_bits(&mut entry.ebx, 24, 8, index);
                set_bits(&mut entry.ebx, 16, 8, (1 << width).min(0xff));
                entry.ecx |= HYPERVISOR;
                entry.ecx &= !INTEL_VIRTUALISATION;
                set_flag(&mut entry.ecx, TSC_DEADLINE, tsc_deadline);
                set_flag(&mut entry.edx, HYPER_THREADING, count > 1);
            }
            // Deterministic caches, Intel and AMD: the last level is shared, the others are not.
            0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level >= 3 { (1 << width) - 1 } else { 0 };
                set_bits(&mut entry.eax, 14, 12, sharing);
                if entry.function == 0x4 {
                    set_bits(&mut entry.eax, 26, 6, ((1u32 << width) - 1).min(63));
                }
            }
            0x8000_0001 => {
                set_flag(&mut entry.ecx, CMP_LEGACY, count > 1);
                entry.ecx &= !AMD_VIRTUALISATION;
            }
            0x8000_0008 => entry.ecx = (width << 12) | (count - 1),
            0x8000_001e => {
                entry.eax = index;
                entry.ebx = index;
                entry.ecx = 0;
                entry.edx = 0;
            }
            _ => {}
        }
    }
    CpuId::from_entries(&entries).map_err(|_| TooManyLeaves(entries.len() - 1))
}

fn topology_level(level: u32, index: u32, count: u32, width: u32) -> kvm_cpuid_entry2 {
    let (shift, logical, kind) = if level == 0 {
        (0, 1, LEVEL_THREAD)
    } else {
        (width, count, LEVEL_CORE)
    };
    kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index: level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: logical,
        ecx: kind | level,
        edx: index,
        ..Default::default()
    }
}

fn set_flag(register: &mut u32, flag: u32, on: bool) {
    if on {
        *register |= flag;
    } else {
        *register &= !flag;
    }
}

fn set_bits(register: &mut u32, shift: u32, width: u32, value: u32) {
    let mask = ((1 << width) - 1) << shift;
    *register = (*register & !mask) | ((value << shift) & mask);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        }
    }

    fn basic() -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            eax: 0x1f,
            ..leaf(0, 0)
        }
    }

    fn adapted(entries: &[kvm_cpuid_entry2], index: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
        let supported = CpuId::from_entries(entries).unwrap();
        let adapted = adapt(&supported, index, count, true).unwrap();
        adapted.as_slice().to_vec()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    #[test]
    fn each_cpu_has_its_own_identifier_in_every_leaf() {
        for index in 0..3 {
            let entries = adapted(&[basic(), leaf(1, 0), leaf(0x8000_001e, 0)], index, 3);
            let id = u32::from(index);
            assert_eq!(find(&entries, 1, 0).ebx >> 24, id);
            assert_eq!(find(&entries, 0xb, 0).edx, id);
            assert_eq!(find(&entries, 0xb, 1).edx, id);
            assert_eq!(find(&entries, 0x8000_001e, 0).eax, id);
        }
    }

    #[test]
    fn three_cpus_are_three_cores_of_one_package() {
        let entries = adapted(
            &[basic(), leaf(1, 0), leaf(0x1f, 0), leaf(0x8000_0008, 0)],
            0,
            3,
        );
        assert_eq!((find(&entries, 1, 0).ebx >> 16) & 0xff, 4);
        assert_ne!(find(&entries, 1, 0).edx & HYPER_THREADING, 0);
        let threads = find(&entries, 0xb, 0);
        assert_eq!((threads.eax, threads.ebx), (0, 1));
        let cores = find(&entries, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (2, 3, LEVEL_CORE | 1));
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, (2 << 12) | 2);
        assert!(entries.iter().all(|entry| entry.function != 0x1f));
    }

    #[test]
    fn a_guest_cannot_run_guests() {
        let all = |function| kvm_cpuid_entry2 {
            ecx: u32::MAX,
            ..leaf(function, 0)
        };
        let entries = adapted(&[all(1), all(0x8000_0001)], 0, 1);
        assert_eq!(find(&entries, 1, 0).ecx & INTEL_VIRTUALISATION, 0);
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx & AMD_VIRTUALISATION, 0);
    }

    #[test]
    fn a_single_cpu_has_no_siblings() {
        let mut l3 = leaf(4, 3);
        l3.eax = 3 << 5 | 3 | (7 << 14) | (7 << 26);
        let entries = adapted(&[leaf(1, 0), l3], 0, 1);
        assert_eq!(entries[0].edx & HYPER_THREADING, 0);
        assert_eq!(entries[1].eax, 3 << 5 | 3);
        assert_ne!(entries[0].ecx & HYPERVISOR, 0);
        assert_ne!(entries[0].ecx & TSC_DEADLINE, 0);
    }
}
