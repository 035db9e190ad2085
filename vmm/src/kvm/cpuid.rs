//! What `CPUID` answers: what KVM supports, with one package of `count` single-threaded cores in it.
//!
//! Leaf numbers: Intel SDM vol. 2A, `CPUID`; AMD APM vol. 3, appendix E.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::KvmError;

const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_HTT: u32 = 1 << 28;
const EXTENDED_1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXTENDED_1_ECX_PERF_COUNTERS: u32 = 1 << 23;
/// Where leaf 0x80000008 is missing.
const DEFAULT_ADDRESS_BITS: u8 = 36;

pub(super) fn address_bits(supported: &CpuId) -> u8 {
    let leaf = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    leaf.map_or(DEFAULT_ADDRESS_BITS, |entry| entry.eax as u8)
}

/// The answers of vCPU `index` of `count`.
pub(super) fn for_vcpu(supported: &CpuId, index: u8, count: u8) -> Result<CpuId, KvmError> {
    let mut entries: Vec<_> =
        supported.as_slice().iter().filter(|e| !matches!(e.function, 0xb | 0x1f)).copied().collect();
    for entry in &mut entries {
        adapt(entry, index, count);
    }
    entries.extend(topology(index, count));
    CpuId::from_entries(&entries).map_err(|e| KvmError::Call {
        what: "take this many processor features",
        source: std::io::Error::other(format!("{e:?}")),
    })
}

/// Bits of an APIC id that number the cores of a package.
fn core_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

fn adapt(entry: &mut kvm_cpuid_entry2, index: u8, count: u8) {
    let (index, count) = (u32::from(index), u32::from(count));
    match entry.function {
        1 => {
            // Initial APIC id, logical processors per package; the cache line size stays.
            entry.ebx = entry.ebx & 0xff00 | index << 24 | count << 16;
            // KVM emulates the deadline timer and leaves it to us to say so.
            entry.ecx |= LEAF_1_ECX_HYPERVISOR | LEAF_1_ECX_TSC_DEADLINE;
            set(&mut entry.edx, LEAF_1_EDX_HTT, count > 1);
        }
        // Intel: caches. Level 3 is shared by all, the others by none; bits 31:26 are the cores in the package.
        4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharers = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharers << 14 | (count - 1) << 26;
        }
        // The performance counters are the host's.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => {
            set(&mut entry.ecx, EXTENDED_1_ECX_CMP_LEGACY, count > 1);
            set(&mut entry.ecx, EXTENDED_1_ECX_PERF_COUNTERS, false);
        }
        // AMD: number of cores and width of the core number.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | core_bits(count as u8) << 12 | (count - 1),
        // AMD: caches, as leaf 4.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharers = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | sharers << 14;
        }
        // AMD: APIC id; core number and one thread per core; one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (index, index, 0),
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on { *register |= bit } else { *register &= !bit }
}

/// Leaf 0xb: one thread per core, `count` cores per package, and the end of the list.
fn topology(index: u8, count: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |subleaf: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index: subleaf,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: kind << 8 | subleaf,
        edx: index.into(),
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, core_bits(count), count.into(), 2), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| (e.function, e.index) == (function, index)).unwrap()
    }

    #[test]
    fn five_cores_have_apic_ids_below_eight_and_agree_in_every_leaf() {
        let supported = [1, 4, 0xb, 0x8000_0001, 0x8000_0008, 0x8000_001e].map(|function| kvm_cpuid_entry2 {
            function,
            eax: 0x0028 | 0x40,
            ..Default::default()
        });
        let cpuid = for_vcpu(&CpuId::from_entries(&supported).unwrap(), 4, 5).unwrap();
        assert_eq!(leaf(&cpuid, 1, 0).ebx >> 16, 4 << 8 | 5);
        assert_eq!(leaf(&cpuid, 0xb, 1).eax, 3);
        assert_eq!((leaf(&cpuid, 0xb, 1).ebx, leaf(&cpuid, 0xb, 1).edx), (5, 4));
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx & 0xf0ff, 3 << 12 | 4);
        assert_eq!(leaf(&cpuid, 0x8000_001e, 0).eax, 4);
        assert_eq!(leaf(&cpuid, 4, 0).eax >> 26, 4);
        assert_eq!(cpuid.as_slice().iter().filter(|e| e.function == 0xb).count(), 3);
    }
}
