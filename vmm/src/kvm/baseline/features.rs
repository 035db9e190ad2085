//! What each baseline has, as bits of `CPUID`. A bit that is on no list is hidden, also one that a later processor brings.
//!
//! User-visible bits are those of the levels of the x86-64 psABI. To them come what an operating system needs, as far as
//! all processors have it that a level is meant for: v2 whatever runs a VM, v3 from Haswell and Zen on, v4 from Skylake-SP
//! and Zen 4 on. Names are those that Linux shows in `/proc/cpuinfo`, so that one can be looked for there; `pni` is SSE 3.

use bedplate_api::vmm::{CpuBaseline, CpuidRegister};

/// One register of one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub leaf: u32,
    pub subleaf: u32,
    pub register: CpuidRegister,
}

const fn place(leaf: u32, subleaf: u32, register: CpuidRegister) -> Place {
    Place { leaf, subleaf, register }
}

const LEAF_1_ECX: Place = place(1, 0, CpuidRegister::Ecx);
pub(super) const LEAF_1_EDX: Place = place(1, 0, CpuidRegister::Edx);
const LEAF_7_EBX: Place = place(7, 0, CpuidRegister::Ebx);
const XSAVE: Place = place(0xd, 1, CpuidRegister::Eax);
const PARAVIRTUAL: Place = place(0x4000_0001, 0, CpuidRegister::Eax);
const EXTENDED_1_ECX: Place = place(0x8000_0001, 0, CpuidRegister::Ecx);
const EXTENDED_1_EDX: Place = place(0x8000_0001, 0, CpuidRegister::Edx);

/// Bits of one register, with their names.
type Bits = (Place, &'static [(u8, &'static str)]);

const V2: &[Bits] = &[
    (
        LEAF_1_EDX,
        &[
            (0, "fpu"),
            (2, "de"),
            (3, "pse"),
            (4, "tsc"),
            (5, "msr"),
            (6, "pae"),
            (7, "mce"),
            (8, "cx8"),
            (9, "apic"),
            (11, "sep"),
            (12, "mtrr"),
            (13, "pge"),
            (14, "mca"),
            (15, "cmov"),
            (16, "pat"),
            (17, "pse36"),
            (19, "clflush"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
        ],
    ),
    // Without VME, which nothing in 64 bits needs and emulators lack. The x2APIC is KVM's own on every host, as is the register that adjusts the time stamp counter.
    (
        LEAF_1_ECX,
        &[(0, "pni"), (9, "ssse3"), (13, "cx16"), (19, "sse4_1"), (20, "sse4_2"), (21, "x2apic"), (23, "popcnt")],
    ),
    (LEAF_7_EBX, &[(1, "tsc_adjust")]),
    (EXTENDED_1_ECX, &[(0, "lahf_lm")]),
    (EXTENDED_1_EDX, &[(11, "syscall"), (20, "nx"), (27, "rdtscp"), (29, "lm")]),
    // What KVM offers beside a processor, as Linux 5.10 has it. Later kernels have more, which is hidden.
    (
        PARAVIRTUAL,
        &[
            (0, "kvmclock (old)"),
            (1, "kvm-nopiodelay"),
            (3, "kvmclock"),
            (4, "kvm-asyncpf"),
            (5, "kvm-steal-time"),
            (6, "kvm-pv-eoi"),
            (7, "kvm-pv-unhalt"),
            (9, "kvm-pv-tlb-flush"),
            (10, "kvm-asyncpf-vmexit"),
            (11, "kvm-pv-ipi"),
            (12, "kvm-poll-control"),
            (13, "kvm-pv-sched-yield"),
            (14, "kvm-asyncpf-int"),
            (24, "kvmclock-stable"),
        ],
    ),
];

/// What v3 has and v2 has not.
const V3: &[Bits] = &[
    (
        LEAF_1_ECX,
        &[
            (1, "pclmulqdq"),
            (12, "fma"),
            (22, "movbe"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    ),
    (LEAF_7_EBX, &[(0, "fsgsbase"), (3, "bmi1"), (5, "avx2"), (7, "smep"), (8, "bmi2")]),
    (XSAVE, &[(0, "xsaveopt")]),
    (EXTENDED_1_ECX, &[(5, "abm")]),
    (EXTENDED_1_EDX, &[(26, "pdpe1gb")]),
];

/// What v4 has and v3 has not.
const V4: &[Bits] = &[
    (LEAF_1_ECX, &[(17, "pcid")]),
    (
        LEAF_7_EBX,
        &[
            (9, "erms"),
            (10, "invpcid"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    (XSAVE, &[(1, "xsavec"), (2, "xgetbv1")]),
    (EXTENDED_1_ECX, &[(8, "3dnowprefetch")]),
];

/// Every bit of a baseline, with its name.
pub(super) fn of(baseline: CpuBaseline) -> impl Iterator<Item = (Place, u8, &'static str)> {
    let levels: &[&[Bits]] = match baseline {
        CpuBaseline::V2 => &[V2],
        CpuBaseline::V3 => &[V2, V3],
        CpuBaseline::V4 => &[V2, V3, V4],
    };
    let registers = levels.iter().flat_map(|level| level.iter());
    registers.flat_map(|(place, bits)| bits.iter().map(|(bit, name)| (*place, *bit, *name)))
}

/// Who made the host's processor. Their instructions differ in what no bit tells, so a guest always sees whose it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vendor {
    Intel,
    Amd,
}

impl Vendor {
    /// Family, model and stepping, as leaf 1 has them: one processor for each level, which are known to systems as having
    /// what the level has. Those of AMD are all of a kind that says in leaf 0x8000001d which processors share a cache.
    pub const fn signature(self, baseline: CpuBaseline) -> u32 {
        match (self, baseline) {
            // Nehalem, Haswell, Skylake-SP.
            (Self::Intel, CpuBaseline::V2) => 0x1_06a3,
            (Self::Intel, CpuBaseline::V3) => 0x3_06c4,
            (Self::Intel, CpuBaseline::V4) => 0x5_0654,
            // Zen 2, Zen 4.
            (Self::Amd, CpuBaseline::V2 | CpuBaseline::V3) => 0x83_0f10,
            (Self::Amd, CpuBaseline::V4) => 0xa1_0f11,
        }
    }

    /// State that `XSAVE` keeps, beyond that of x87 and SSE: which component, its bytes, and where it lies.
    pub const fn components(self, baseline: CpuBaseline) -> &'static [(u32, u32, u32)] {
        match (self, baseline) {
            (_, CpuBaseline::V2) => &[],
            (_, CpuBaseline::V3) => &[(2, 256, 576)],
            // Where AVX-512's state lies is the maker's choice, and the same in all that each has made.
            (Self::Intel, CpuBaseline::V4) => &[(2, 256, 576), (5, 64, 1088), (6, 512, 1152), (7, 1024, 1664)],
            (Self::Amd, CpuBaseline::V4) => &[(2, 256, 576), (5, 64, 832), (6, 512, 896), (7, 1024, 1408)],
        }
    }
}
