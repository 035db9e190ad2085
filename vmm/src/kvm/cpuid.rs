//! What `CPUID` answers: what KVM supports, changed as a template says, with one package in it.
//!
//! Leaf numbers: Intel SDM vol. 2A, `CPUID`; AMD APM vol. 3, appendix E.

use std::arch::x86_64::__cpuid;

use bedplate_api::vmm::{CpuidModifier, CpuidRegister};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::KvmError;

/// How many vCPUs there are, and how they share cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// vCPUs of the VM, which are one package.
    pub vcpus: u8,
    /// 1, or 2 where `vcpus` is even.
    pub threads_per_core: u8,
}

const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_HTT: u32 = 1 << 28;
const EXTENDED_1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXTENDED_1_ECX_TOPOLOGY: u32 = 1 << 22;
/// Counters of a core, of the memory controller, of time, of the last cache.
const EXTENDED_1_ECX_PERF_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 27 | 1 << 28;
/// 64-bit debug store; capabilities of performance counters.
const LEAF_1_ECX_PERF_COUNTERS: u32 = 1 << 2 | 1 << 15;
const LEAF_1_EDX_DEBUG_STORE: u32 = 1 << 21;
const LEAF_7_EDX_LAST_BRANCHES: u32 = 1 << 19;
/// Where leaf 0x80000008 is missing.
const DEFAULT_ADDRESS_BITS: u8 = 36;

pub(super) fn address_bits(supported: &CpuId) -> u8 {
    let leaf = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    leaf.map_or(DEFAULT_ADDRESS_BITS, |entry| entry.eax as u8)
}

/// Fills in what KVM leaves empty although it is the processor's as it stands: its name, and AMD's caches of level 1.
pub(super) fn complete(supported: &mut CpuId) {
    for entry in supported.as_mut_slice() {
        let is_empty = [entry.eax, entry.ebx, entry.ecx, entry.edx] == [0; 4];
        if is_empty && matches!(entry.function, 0x8000_0002..=0x8000_0005) {
            let host = __cpuid(entry.function);
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (host.eax, host.ebx, host.ecx, host.edx);
        }
    }
}

/// What is supported, with the changes of a template.
pub(super) fn templated(supported: &CpuId, modifiers: &[CpuidModifier]) -> Result<CpuId, KvmError> {
    let mut cpuid = supported.clone();
    for modifier in modifiers {
        let (leaf, subleaf) = (modifier.leaf.0, modifier.subleaf.0);
        let mut entries = cpuid.as_mut_slice().iter_mut();
        let entry = entries.find(|entry| (entry.function, entry.index) == (leaf, subleaf));
        let entry = entry.ok_or(KvmError::NoLeaf { leaf, subleaf })?;
        entry.flags = modifier.flags;
        for change in &modifier.modifiers {
            let register = match change.register {
                CpuidRegister::Eax => &mut entry.eax,
                CpuidRegister::Ebx => &mut entry.ebx,
                CpuidRegister::Ecx => &mut entry.ecx,
                CpuidRegister::Edx => &mut entry.edx,
            };
            // A bitmap of 32 bits changes none above.
            *register = change.bitmap.apply(u64::from(*register)) as u32;
        }
    }
    Ok(cpuid)
}

/// The answers of vCPU `index`.
pub(super) fn for_vcpu(supported: &CpuId, index: u8, topology: Topology) -> Result<CpuId, KvmError> {
    let mut entries: Vec<_> =
        supported.as_slice().iter().filter(|e| !matches!(e.function, 0xb | 0x1f)).copied().collect();
    if topology.threads_per_core > 1 && is_amd(&entries) {
        offer_threads(&mut entries);
    }
    for entry in &mut entries {
        adapt(entry, index, topology);
    }
    entries.extend(levels(index, topology));
    CpuId::from_entries(&entries).map_err(|e| KvmError::Call {
        what: "take this many processor features",
        source: std::io::Error::other(format!("{e:?}")),
    })
}

/// The vendor's name is in three registers; this is the first part of it.
fn is_amd(entries: &[kvm_cpuid_entry2]) -> bool {
    entries.iter().any(|entry| entry.function == 0 && entry.ebx == u32::from_le_bytes(*b"Auth"))
}

/// AMD says which threads share a core in a leaf of its own, that a host without them need not have.
fn offer_threads(entries: &mut Vec<kvm_cpuid_entry2>) {
    const LEAF: u32 = 0x8000_001e;
    if !entries.iter().any(|entry| entry.function == LEAF) {
        entries.push(kvm_cpuid_entry2 { function: LEAF, ..Default::default() });
    }
    for entry in entries {
        match entry.function {
            0x8000_0000 => entry.eax = entry.eax.max(LEAF),
            0x8000_0001 => entry.ecx |= EXTENDED_1_ECX_TOPOLOGY,
            _ => {}
        }
    }
}

/// Bits of an APIC id that number `count` processors.
fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

fn adapt(entry: &mut kvm_cpuid_entry2, index: u8, topology: Topology) {
    let (index, count, threads) =
        (u32::from(index), u32::from(topology.vcpus), u32::from(topology.threads_per_core.max(1)));
    // Of a cache, minus one: level 3 is shared by all, the others by the threads of a core.
    let sharers = |eax: u32| if eax >> 5 & 7 >= 3 { count - 1 } else { threads - 1 };
    match entry.function {
        1 => {
            // Initial APIC id, logical processors per package; the cache line size stays.
            entry.ebx = entry.ebx & 0xff00 | index << 24 | count << 16;
            // KVM emulates the deadline timer and leaves it to us to say so.
            entry.ecx |= LEAF_1_ECX_HYPERVISOR | LEAF_1_ECX_TSC_DEADLINE;
            set(&mut entry.ecx, LEAF_1_ECX_PERF_COUNTERS, false);
            set(&mut entry.edx, LEAF_1_EDX_HTT, count > 1);
            set(&mut entry.edx, LEAF_1_EDX_DEBUG_STORE, false);
        }
        // Intel: caches; bits 31:26 are the cores in the package.
        4 if entry.eax & 0x1f != 0 => {
            let cores = count.div_ceil(threads);
            entry.eax = entry.eax & 0x3fff | sharers(entry.eax) << 14 | (cores - 1) << 26;
        }
        7 if entry.index == 0 => set(&mut entry.edx, LEAF_7_EDX_LAST_BRANCHES, false),
        // The performance counters are the host's (Intel: counters, last branches, more counters; AMD: sampling, counters).
        0xa | 0x1c | 0x23 | 0x8000_001b | 0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => {
            // With two threads in a core the processors of the package are not all cores.
            set(&mut entry.ecx, EXTENDED_1_ECX_CMP_LEGACY, count > 1 && threads == 1);
            set(&mut entry.ecx, EXTENDED_1_ECX_PERF_COUNTERS, false);
        }
        // AMD: number of processors and width of their number.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | id_bits(count) << 12 | (count - 1),
        // AMD: caches, as leaf 4.
        0x8000_001d if entry.eax & 0x1f != 0 => entry.eax = entry.eax & !(0xfff << 14) | sharers(entry.eax) << 14,
        // AMD: APIC id; core number and threads per core; one node.
        0x8000_001e => {
            let core = index / threads;
            (entry.eax, entry.ebx, entry.ecx) = (index, (threads - 1) << 8 | core, 0);
        }
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on { *register |= bit } else { *register &= !bit }
}

/// Leaf 0xb: the threads of a core, the processors of the package, and the end of the list.
fn levels(index: u8, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    let (count, threads) = (u32::from(topology.vcpus), u32::from(topology.threads_per_core.max(1)));
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
    [level(0, id_bits(threads), threads, 1), level(1, id_bits(count), count, 2), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use std::fs;

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
        let five = Topology { vcpus: 5, threads_per_core: 1 };
        let cpuid = for_vcpu(&CpuId::from_entries(&supported).unwrap(), 4, five).unwrap();
        assert_eq!(leaf(&cpuid, 1, 0).ebx >> 16, 4 << 8 | 5);
        assert_eq!(leaf(&cpuid, 0xb, 1).eax, 3);
        assert_eq!((leaf(&cpuid, 0xb, 1).ebx, leaf(&cpuid, 0xb, 1).edx), (5, 4));
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx & 0xf0ff, 3 << 12 | 4);
        assert_eq!(leaf(&cpuid, 0x8000_001e, 0).eax, 4);
        assert_eq!(leaf(&cpuid, 4, 0).eax >> 26, 4);
        assert_eq!(cpuid.as_slice().iter().filter(|e| e.function == 0xb).count(), 3);
    }

    #[test]
    fn nothing_tells_of_performance_counters() {
        let functions = [1, 7, 0xa, 0x1c, 0x23, 0x8000_0001, 0x8000_001b, 0x8000_0022];
        let full = |function| kvm_cpuid_entry2 { function, eax: !0, ebx: !0, ecx: !0, edx: !0, ..Default::default() };
        let one = Topology { vcpus: 1, threads_per_core: 1 };
        let cpuid = for_vcpu(&CpuId::from_entries(&functions.map(full)).unwrap(), 0, one).unwrap();
        for function in [0xa, 0x1c, 0x23, 0x8000_001b, 0x8000_0022] {
            let leaf = leaf(&cpuid, function, 0);
            assert_eq!([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx], [0; 4], "{function:#x}");
        }
        assert_eq!((leaf(&cpuid, 1, 0).ecx & 0x8004, leaf(&cpuid, 1, 0).edx >> 21 & 1), (0, 0));
        assert_eq!((leaf(&cpuid, 7, 0).edx >> 19 & 1, leaf(&cpuid, 0x8000_0001, 0).ecx >> 23 & 0b11_0011), (0, 0));
    }

    #[test]
    fn the_processor_has_its_name_unless_kvm_gives_another() {
        let empty = |function| kvm_cpuid_entry2 { function, ..Default::default() };
        let named = kvm_cpuid_entry2 { eax: 1, ..empty(0x8000_0003) };
        let mut cpuid = CpuId::from_entries(&[empty(0x8000_0002), named, empty(0x8000_0006)]).unwrap();
        complete(&mut cpuid);
        let (first, name) = (leaf(&cpuid, 0x8000_0002, 0), fs::read_to_string("/proc/cpuinfo").unwrap());
        let name = name.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap();
        let bytes = [first.eax, first.ebx, first.ecx, first.edx].map(u32::to_le_bytes);
        assert!(
            bytes.as_flattened().trim_ascii_start().starts_with(&name.as_bytes()[..name.len().min(12)]),
            "{bytes:?} of {name}"
        );
        assert_eq!((leaf(&cpuid, 0x8000_0003, 0).eax, leaf(&cpuid, 0x8000_0003, 0).ebx), (1, 0));
        assert_eq!(leaf(&cpuid, 0x8000_0006, 0).eax, 0, "KVM's to say");
    }

    #[test]
    fn two_threads_share_a_core_and_its_caches() {
        let cache = |function, level: u32| kvm_cpuid_entry2 {
            function,
            index: level,
            eax: level << 5 | 1,
            ..Default::default()
        };
        let leaf_of = |function| kvm_cpuid_entry2 { function, ..Default::default() };
        let vendor = kvm_cpuid_entry2 { ebx: u32::from_le_bytes(*b"Auth"), ..Default::default() };
        let (last, features) = (leaf_of(0x8000_0000), leaf_of(0x8000_0001));
        let supported = [vendor, cache(4, 1), cache(4, 3), cache(0x8000_001d, 1), last, features];
        let pairs = Topology { vcpus: 4, threads_per_core: 2 };
        let cpuid = for_vcpu(&CpuId::from_entries(&supported).unwrap(), 3, pairs).unwrap();
        let sharers = |function, index| leaf(&cpuid, function, index).eax >> 14 & 0xfff;
        assert_eq!((sharers(4, 1), sharers(4, 3), sharers(0x8000_001d, 1)), (1, 3, 1));
        assert_eq!(leaf(&cpuid, 4, 1).eax >> 26, 1, "two cores");
        assert_eq!((leaf(&cpuid, 0xb, 0).eax, leaf(&cpuid, 0xb, 0).ebx), (1, 2));
        assert_eq!((leaf(&cpuid, 0xb, 1).eax, leaf(&cpuid, 0xb, 1).ebx), (2, 4));
        assert_eq!(leaf(&cpuid, 0x8000_001e, 0).ebx, 1 << 8 | 1, "the second thread of the second core");
        let features = leaf(&cpuid, 0x8000_0001, 0).ecx;
        assert_eq!(features & (EXTENDED_1_ECX_CMP_LEGACY | EXTENDED_1_ECX_TOPOLOGY), EXTENDED_1_ECX_TOPOLOGY);
        assert_eq!(leaf(&cpuid, 0x8000_0000, 0).eax, 0x8000_001e);
    }

    #[test]
    fn a_template_changes_bits_of_leaves_that_are_there() {
        let supported = [kvm_cpuid_entry2 { function: 7, ebx: 0b1101, edx: !0, ..Default::default() }];
        let supported = CpuId::from_entries(&supported).unwrap();
        let modifiers = |leaf: &str| -> Vec<CpuidModifier> {
            let text = format!(
                r#"[{{"leaf": "{leaf}", "subleaf": "0x0", "flags": 1, "modifiers": [
                    {{"register": "ebx", "bitmap": "0b10x0"}}, {{"register": "edx", "bitmap": "0b0{}"}}]}}]"#,
                "x".repeat(31)
            );
            serde_json::from_str(&text).unwrap()
        };
        let changed = leaf(&templated(&supported, &modifiers("0x7")).unwrap(), 7, 0);
        assert_eq!((changed.ebx, changed.edx, changed.flags), (0b1000, !0 >> 1, 1));
        let missing = templated(&supported, &modifiers("0xd")).unwrap_err().to_string();
        assert!(missing.contains("leaf 0xd, subleaf 0x0"), "{missing}");
    }
}
