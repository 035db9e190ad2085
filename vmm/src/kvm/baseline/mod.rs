//! Processors by name, so that a VM can move between hosts: what a guest sees of one depends on the name and on who made
//! the host's processor, and on nothing else.
//!
//! The answers of `CPUID` are built from nothing; the host's are only looked at for whether it has everything. What is not
//! in the lists of [`features`] is hidden, leaves that are not named below are not there. Model-specific registers go with
//! it: see [`super::msrs::allow_only_listed`].

mod features;
#[cfg(test)]
mod tests;

use bedplate_api::vmm::{CpuBaseline, CpuidRegister};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use self::features::{LEAF_1_EDX, Place, Vendor};
use super::KvmError;

/// Bits of a guest-physical address: as many as the smallest processors have that run VMs today.
const ADDRESS_BITS: u32 = 39;
/// Bits of a virtual address: four levels of page tables.
const VIRTUAL_BITS: u32 = 48;
/// The last leaf: `XSAVE`. Those of topology are before it.
const LAST_LEAF: u32 = 0xd;
/// The last extended leaf: sizes of addresses; and AMD's, which threads share a core.
const LAST_EXTENDED: u32 = 0x8000_0008;
const LAST_EXTENDED_AMD: u32 = 0x8000_001e;
/// KVM's own last leaf: which of its features there are.
const LAST_PARAVIRTUAL: u32 = 0x4000_0001;
/// The interrupt of the local timer goes on in every idle state: it is KVM's.
const LEAF_6_ARAT: u32 = 1 << 2;
/// Of `CLFLUSH`, in units of 8 bytes.
const CACHE_LINE: u32 = 8;
/// AMD says in leaves of its own how caches and cores are shared.
const EXTENDED_1_ECX_TOPOLOGY: u32 = 1 << 22;
/// Bits of leaf 1 that AMD repeats in leaf 0x80000001.
const REPEATED_BY_AMD: u32 = 0x0183_f3ff;
/// State of x87 and SSE, and the header behind it.
const LEGACY_STATE: (u32, u32) = (0b11, 512 + 64);

/// What the host lacks of a baseline, in words; nothing if it has all of it.
pub(super) fn missing(host: &CpuId, baseline: CpuBaseline) -> Vec<String> {
    let Some(vendor) = vendor(host) else { return vec!["a processor of Intel or AMD".into()] };
    let lacks = |(place, bit, name): (Place, u8, &'static str)| {
        let is_there = register(host, place) >> bit & 1 == 1;
        (!is_there).then(|| name.to_owned())
    };
    let mut missing: Vec<_> = features::of(baseline).filter_map(lacks).collect();
    if u32::from(super::cpuid::address_bits(host)) < ADDRESS_BITS {
        missing.push(format!("{ADDRESS_BITS} bits of a physical address"));
    }
    let state = |component: u32, what| register(host, Place { leaf: 0xd, subleaf: component, register: what });
    for &(component, size, offset) in vendor.components(baseline) {
        let is_enabled = state(0, CpuidRegister::Eax) >> component & 1 == 1;
        if !is_enabled || (state(component, CpuidRegister::Eax), state(component, CpuidRegister::Ebx)) != (size, offset)
        {
            missing.push(format!("xsave component {component} of {size} bytes at {offset}"));
        }
    }
    missing
}

/// The answers of a baseline, on this host.
pub(super) fn apply(host: &CpuId, baseline: CpuBaseline) -> Result<CpuId, KvmError> {
    let missing = missing(host, baseline);
    let Some(vendor) = vendor(host).filter(|_| missing.is_empty()) else {
        let best = CpuBaseline::ALL.into_iter().rfind(|other| self::missing(host, *other).is_empty());
        return Err(KvmError::Baseline { baseline, missing: missing.join(", "), best });
    };
    CpuId::from_entries(&leaves(host, vendor, baseline)).map_err(|e| KvmError::Call {
        what: "take the processor features of a baseline",
        source: std::io::Error::other(format!("{e:?}")),
    })
}

fn vendor(host: &CpuId) -> Option<Vendor> {
    let name = host.as_slice().iter().find(|entry| entry.function == 0)?;
    match [name.ebx, name.edx, name.ecx].map(u32::to_le_bytes).as_flattened() {
        b"GenuineIntel" => Some(Vendor::Intel),
        b"AuthenticAMD" => Some(Vendor::Amd),
        _ => None,
    }
}

fn register(cpuid: &CpuId, place: Place) -> u32 {
    let mut entries = cpuid.as_slice().iter();
    let entry = entries.find(|entry| (entry.function, entry.index) == (place.leaf, place.subleaf));
    entry.map_or(0, |entry| match place.register {
        CpuidRegister::Eax => entry.eax,
        CpuidRegister::Ebx => entry.ebx,
        CpuidRegister::Ecx => entry.ecx,
        CpuidRegister::Edx => entry.edx,
    })
}

/// `eax`, `ebx`, `ecx`, `edx`.
type Registers = [u32; 4];

fn leaf(function: u32, [eax, ebx, ecx, edx]: Registers) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
}

fn subleaf(function: u32, index: u32, registers: Registers) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { index, flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..leaf(function, registers) }
}

/// Everything but what differs from vCPU to vCPU. Of the host's only what every host of the vendor has: its name, KVM's.
fn leaves(host: &CpuId, vendor: Vendor, baseline: CpuBaseline) -> Vec<kvm_cpuid_entry2> {
    let has = |leaf, subleaf| {
        move |register| {
            let place = Place { leaf, subleaf, register };
            features::of(baseline).filter(|(at, ..)| *at == place).fold(0, |bits, (_, bit, _)| bits | 1 << bit)
        }
    };
    let of_host = |leaf| move |register| self::register(host, Place { leaf, subleaf: 0, register });
    let [_, b, c, d] = all(of_host(0));
    let mut leaves = vec![leaf(0, [LAST_LEAF, b, c, d])];
    let [_, _, c, d] = all(has(1, 0));
    leaves.push(leaf(1, [vendor.signature(baseline), CACHE_LINE << 8, c, d]));
    leaves.push(leaf(6, [LEAF_6_ARAT, 0, 0, 0]));
    leaves.push(subleaf(7, 0, all(has(7, 0))));
    leaves.extend(saved_state(vendor, baseline, has(0xd, 1)(CpuidRegister::Eax)));

    let [_, b, c, d] = all(of_host(0x4000_0000));
    leaves.push(leaf(0x4000_0000, [LAST_PARAVIRTUAL, b, c, d]));
    leaves.push(leaf(LAST_PARAVIRTUAL, all(has(LAST_PARAVIRTUAL, 0))));

    let [_, _, mut c, mut d] = all(has(0x8000_0001, 0));
    let ([_, name_b, name_c, name_d], signature) = match vendor {
        Vendor::Intel => ([0; 4], 0),
        Vendor::Amd => (all(of_host(0)), vendor.signature(baseline)),
    };
    if vendor == Vendor::Amd {
        c |= EXTENDED_1_ECX_TOPOLOGY;
        d |= has(1, 0)(LEAF_1_EDX.register) & REPEATED_BY_AMD;
    }
    let last = if vendor == Vendor::Amd { LAST_EXTENDED_AMD } else { LAST_EXTENDED };
    leaves.push(leaf(0x8000_0000, [last, name_b, name_c, name_d]));
    leaves.push(leaf(0x8000_0001, [signature, 0, c, d]));
    leaves.extend(brand(baseline));
    leaves.push(leaf(0x8000_0007, [0; 4]));
    leaves.push(leaf(0x8000_0008, [VIRTUAL_BITS << 8 | ADDRESS_BITS, 0, 0, 0]));
    leaves.extend(caches(vendor));
    leaves
}

fn all(register: impl Fn(CpuidRegister) -> u32) -> Registers {
    [CpuidRegister::Eax, CpuidRegister::Ebx, CpuidRegister::Ecx, CpuidRegister::Edx].map(register)
}

/// Leaf 0xd: which state `XSAVE` keeps, and where. How much of it is enabled KVM fills in while the guest runs.
fn saved_state(vendor: Vendor, baseline: CpuBaseline, instructions: u32) -> Vec<kvm_cpuid_entry2> {
    let components = vendor.components(baseline);
    let (legacy_bits, legacy_end) = LEGACY_STATE;
    if components.is_empty() {
        return vec![subleaf(0xd, 0, [0; 4]), subleaf(0xd, 1, [0; 4])];
    }
    let mask = components.iter().fold(legacy_bits, |mask, (component, ..)| mask | 1 << component);
    let end = components.iter().fold(legacy_end, |end, (_, size, offset)| end.max(size + offset));
    let mut leaves = vec![subleaf(0xd, 0, [mask, end, end, 0]), subleaf(0xd, 1, [instructions, 0, 0, 0])];
    leaves.extend(components.iter().map(|&(component, size, offset)| subleaf(0xd, component, [size, offset, 0, 0])));
    leaves
}

/// The name in words, 48 bytes in three leaves.
fn brand(baseline: CpuBaseline) -> impl Iterator<Item = kvm_cpuid_entry2> {
    let mut name = format!("Virtual {baseline} processor").into_bytes();
    name.resize(48, 0);
    (0u32..3).map(move |number| {
        let word = |at: u32| {
            let bytes = name.iter().skip((16 * number + 4 * at) as usize).take(4);
            bytes.rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
        };
        leaf(0x8000_0002 + number, [word(0), word(1), word(2), word(3)])
    })
}

/// Kind (1 data, 2 instructions, 3 both), level, KiB, ways. What real ones have differs between hosts, and nobody has to
/// know; but some libraries ask, and take none for very little.
const CACHES: [(u32, u32, u32, u32); 4] = [(1, 1, 32, 8), (2, 1, 32, 8), (3, 2, 512, 8), (3, 3, 8192, 16)];

/// What is told of caches: by Intel in leaves 2 and 4, by AMD in 0x80000005, 0x80000006 and 0x8000001d. Who shares one is
/// filled in with the topology.
fn caches(vendor: Vendor) -> Vec<kvm_cpuid_entry2> {
    const LINE: u32 = 64;
    const SELF_INITIALISING: u32 = 1 << 8;
    let each = |function| {
        let cache = move |(index, (kind, level, kib, ways)): (usize, (u32, u32, u32, u32))| {
            let (eax, sets) = (kind | level << 5 | SELF_INITIALISING, kib * 1024 / LINE / ways);
            subleaf(function, index as u32, [eax, (ways - 1) << 22 | (LINE - 1), sets - 1, 0])
        };
        let end = subleaf(function, CACHES.len() as u32, [0; 4]);
        CACHES.into_iter().enumerate().map(cache).chain([end])
    };
    // One line in a tag; associativity as ways at level 1, as a code above it.
    let first = |kib: u32, ways: u32| kib << 24 | ways << 16 | 1 << 8 | LINE;
    const EIGHT_WAYS: u32 = 6 << 12;
    const SIXTEEN_WAYS: u32 = 8 << 12;
    let ([(.., one, ways), _, (_, _, two, _), (_, _, three, _)], per_half_mib) = (CACHES, 512);
    let second = two << 16 | EIGHT_WAYS | 1 << 8 | LINE;
    match vendor {
        Vendor::Intel => {
            const SEE_LEAF_4: u32 = 0xff << 8;
            // The lowest byte says how often to ask: once.
            let mut leaves = vec![leaf(2, [SEE_LEAF_4 | 1, 0, 0, 0]), leaf(0x8000_0006, [0, 0, second, 0])];
            leaves.extend(each(4));
            leaves
        }
        Vendor::Amd => {
            let third = (three / per_half_mib) << 18 | SIXTEEN_WAYS | 1 << 8 | LINE;
            // 64 entries, all of them anywhere, for data and for instructions.
            const TLB: u32 = 0xff40_ff40;
            let first = first(one, ways);
            let mut leaves = vec![
                leaf(0x8000_0005, [TLB, TLB, first, first]),
                leaf(0x8000_0006, [0, 0, second, third]),
                // Filled in for each vCPU.
                leaf(0x8000_001e, [0; 4]),
            ];
            leaves.extend(each(0x8000_001d));
            leaves
        }
    }
}
