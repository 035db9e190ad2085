use std::collections::{BTreeSet, HashSet};

use super::*;

/// A host with everything that any baseline has, and with more, the `seed` of which differs from host to host.
fn host(name: &[u8; 12], seed: u32) -> CpuId {
    let vendor = if name == b"GenuineIntel" { Vendor::Intel } else { Vendor::Amd };
    let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    let name = |last| [last, word(0), word(8), word(4)];
    let full = !(seed & 1);
    let mut entries = vec![
        leaf(0, name(0x1f + seed)),
        leaf(1, [0x1234 * seed, seed << 8, !0, !0]),
        leaf(2, [seed; 4]),
        leaf(5, [seed; 4]),
        leaf(6, [4 | seed; 4]),
        subleaf(7, 0, [seed, !0, full, full]),
        subleaf(7, 1, [full; 4]),
        leaf(0xa, [seed; 4]),
        subleaf(0xd, 0, [0x2ff, 0x340, 0xa88, 0]),
        subleaf(0xd, 1, [0xf | seed, 0x999, 0x1800, 0]),
        leaf(0x15, [seed; 4]),
        leaf(0x16, [seed; 4]),
        leaf(0x4000_0000, [0x4000_0001 + seed, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        leaf(0x4000_0001, [!0, 0, 0, seed]),
        leaf(0x8000_0000, name(0x8000_0008 + seed)),
        leaf(0x8000_0001, [seed, seed, !0, !0]),
        leaf(0x8000_0002, [seed; 4]),
        leaf(0x8000_0005, [seed; 4]),
        leaf(0x8000_0006, [seed; 4]),
        leaf(0x8000_0007, [0, 0, 0, 0x100 | seed]),
        leaf(0x8000_0008, [0x3000 | (40 + seed % 8), full, seed, seed]),
        leaf(0x8000_001f, [seed; 4]),
    ];
    entries.extend((0..4).map(|index| subleaf(4, index, [seed << 5 | 1, seed, seed, 0])));
    let components = vendor.components(CpuBaseline::V4);
    entries.extend(components.iter().map(|(number, size, offset)| subleaf(0xd, *number, [*size, *offset, 0, seed])));
    CpuId::from_entries(&entries).unwrap()
}

const VENDORS: [&[u8; 12]; 2] = [b"GenuineIntel", b"AuthenticAMD"];

/// Takes a bit away.
fn without(host: &CpuId, function: u32, index: u32, change: impl Fn(&mut kvm_cpuid_entry2)) -> CpuId {
    let mut host = host.clone();
    let mut entries = host.as_mut_slice().iter_mut();
    change(entries.find(|entry| (entry.function, entry.index) == (function, index)).unwrap());
    host
}

#[test]
fn each_level_has_what_those_before_it_have() {
    let all = CpuBaseline::ALL.map(|baseline| features::of(baseline).collect::<Vec<_>>());
    for (smaller, larger) in [(&all[0], &all[1]), (&all[1], &all[2])] {
        let larger: HashSet<_> = larger.iter().collect();
        assert!(smaller.len() < larger.len() && smaller.iter().all(|bit| larger.contains(bit)));
    }
    let places: HashSet<_> = all[2].iter().map(|(place, bit, _)| (place, bit)).collect();
    let names: BTreeSet<_> = all[2].iter().map(|(.., name)| name).collect();
    assert_eq!((places.len(), names.len()), (all[2].len(), all[2].len()), "a bit or a name is there twice");
}

#[test]
fn what_the_guest_sees_does_not_depend_on_the_host() {
    for vendor in VENDORS {
        let mut seen = Vec::new();
        for baseline in CpuBaseline::ALL {
            let [one, two] = [0x10, 0x7ff1].map(|seed| apply(&host(vendor, seed), baseline).unwrap());
            assert_eq!(one.as_slice(), two.as_slice(), "{baseline}");
            seen.push(one);
        }
        assert!(seen[0].as_slice() != seen[1].as_slice() && seen[1].as_slice() != seen[2].as_slice());
    }
}

#[test]
fn every_bit_of_the_lists_is_there_and_no_other_feature() {
    for (vendor, repeats) in VENDORS.into_iter().zip([0, REPEATED_BY_AMD]) {
        for baseline in CpuBaseline::ALL {
            let cpuid = apply(&host(vendor, 1), baseline).unwrap();
            let mut expected = HashSet::new();
            for (place, bit, name) in features::of(baseline) {
                assert_eq!(register(&cpuid, place) >> bit & 1, 1, "{name}");
                expected.insert((place.leaf, place.register as u8, bit));
            }
            let registers = [CpuidRegister::Eax, CpuidRegister::Ebx, CpuidRegister::Ecx, CpuidRegister::Edx];
            let feature_registers =
                [(1, 2..4), (7, 0..4), (0x4000_0001, 0..4), (0x8000_0001, 2..4), (0x8000_0007, 0..4)];
            for (leaf, indices) in feature_registers {
                for what in registers[indices].iter().copied() {
                    let mut bits = register(&cpuid, Place { leaf, subleaf: 0, register: what });
                    if (leaf, what) == (0x8000_0001, CpuidRegister::Edx) {
                        bits &= !repeats;
                    }
                    if (leaf, what) == (0x8000_0001, CpuidRegister::Ecx) && repeats != 0 {
                        bits &= !EXTENDED_1_ECX_TOPOLOGY;
                    }
                    let here = |bit: &u8| bits >> bit & 1 == 1 && !expected.contains(&(leaf, what as u8, *bit));
                    assert_eq!((0..32).find(here), None, "{baseline}: leaf {leaf:#x}, {what:?}");
                }
            }
            let last = |leaf| register(&cpuid, Place { leaf, subleaf: 0, register: CpuidRegister::Eax });
            let lasts = [last(0), last(0x4000_0000), last(0x8000_0000)];
            let beyond = |entry: &&kvm_cpuid_entry2| {
                !lasts.iter().any(|last| {
                    let block = last & 0xffff_0000;
                    (block..=*last).contains(&entry.function)
                })
            };
            assert_eq!(cpuid.as_slice().iter().find(beyond), None);
        }
    }
}

#[test]
fn saved_state_is_that_of_the_instructions() {
    for (vendor, end) in VENDORS.into_iter().zip([2688, 2432]) {
        let sizes = CpuBaseline::ALL.map(|baseline| {
            let cpuid = apply(&host(vendor, 3), baseline).unwrap();
            let main = cpuid.as_slice().iter().find(|e| (e.function, e.index) == (0xd, 0)).unwrap();
            let components = cpuid.as_slice().iter().filter(|e| e.function == 0xd && e.index > 1).count();
            (main.eax, main.ebx, main.ecx, components)
        });
        assert_eq!(sizes, [(0, 0, 0, 0), (7, 832, 832, 1), (0xe7, end, end, 4)]);
    }
}

#[test]
fn what_a_host_lacks_is_named_with_what_it_has() {
    let full = host(b"GenuineIntel", 5);
    let said = |host: &CpuId, baseline| apply(host, baseline).unwrap_err().to_string();
    let no_avx512 = without(&full, 7, 0, |leaf| leaf.ebx &= !(1 << 16 | 1 << 30));
    assert_eq!(
        said(&no_avx512, CpuBaseline::V4),
        "cpu_baseline x86-64-v4: this host lacks avx512f, avx512bw; give x86-64-v3, the best that it has, or use another \
         host"
    );
    assert!(apply(&no_avx512, CpuBaseline::V3).is_ok());
    let other_layout = without(&full, 0xd, 2, |leaf| leaf.ebx = 832);
    let layout = said(&other_layout, CpuBaseline::V3);
    assert!(layout.contains("xsave component 2 of 256 bytes at 576") && layout.contains("give x86-64-v2"), "{layout}");
    let small = without(&full, 0x8000_0008, 0, |leaf| leaf.eax = 0x3024);
    let small = said(&small, CpuBaseline::V2);
    assert!(small.contains("39 bits of a physical address") && small.contains("none of them"), "{small}");
    let other = without(&full, 0, 0, |leaf| leaf.ebx = 0);
    assert!(said(&other, CpuBaseline::V2).contains("Intel or AMD"));
    assert!(missing(&full, CpuBaseline::V4).is_empty());
}

#[test]
fn its_name_and_caches_can_be_read() {
    for vendor in VENDORS {
        let cpuid = apply(&host(vendor, 9), CpuBaseline::V3).unwrap();
        let words = (0x8000_0002..0x8000_0005).flat_map(|leaf| {
            all(|what| register(&cpuid, Place { leaf, subleaf: 0, register: what })).map(u32::to_le_bytes)
        });
        let name: Vec<u8> = words.flatten().collect();
        assert_eq!(String::from_utf8(name).unwrap().trim_end_matches('\0'), "Virtual x86-64-v3 processor");
        let function = if vendor == VENDORS[0] { 4 } else { 0x8000_001d };
        let kib = |index| {
            let [_, ways_and_line, sets, _] =
                all(|what| register(&cpuid, Place { leaf: function, subleaf: index, register: what }));
            ((ways_and_line >> 22) + 1) * ((ways_and_line & 0xfff) + 1) * (sets + 1) / 1024
        };
        assert_eq!([kib(0), kib(1), kib(2), kib(3)], [32, 32, 512, 8192]);
    }
}
