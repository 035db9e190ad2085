//! Firecracker's processors by name, `cpu_template` of `machine-config`: what is changed of what the host's processor and KVM
//! offer, on the models that the name is for. Only the bits below are changed, and everything else is the host's: models look
//! nearly alike under a template, and under a [`baseline`](super::baseline) alike.
//!
//! Names of bits are those that Linux shows in `/proc/cpuinfo`.

use std::arch::x86_64::__cpuid;

use bedplate_api::vmm::{
    Bitmap, CpuConfig, CpuTemplate, CpuidModifier, CpuidRegister, Hex, MsrModifier, RegisterModifier,
};
use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

use super::KvmError;

/// A model: its maker's name, its family, model and stepping as leaf 1 has them, its name.
type Model = (&'static [u8; 12], u32, &'static str);

const SKYLAKE: Model = (b"GenuineIntel", 0x5_0654, "Skylake-SP");
const CASCADE_LAKE: Model = (b"GenuineIntel", 0x5_0657, "Cascade Lake");
const ICE_LAKE: Model = (b"GenuineIntel", 0x6_06a6, "Ice Lake-SP");
const MILAN: Model = (b"AuthenticAMD", 0xa0_0f11, "Milan");

/// Family, model and stepping of Haswell and of Ivy Bridge, and where they are in `eax` of leaf 1.
const HASWELL: u32 = 0x3_06f2;
const IVY_BRIDGE: u32 = 0x3_06e4;
const SIGNATURE: u32 = 0x0fff_3fff;

/// What the processor says of its own faults.
const ARCH_CAPABILITIES: u32 = 0x10a;

/// Bits of one register of one answer: those that are hidden, and those that are there.
struct Change(u32, u32, CpuidRegister, u32, u32);

/// Of all but C3.
const T2: [Change; 8] = [
    Change(1, 0, CpuidRegister::Eax, SIGNATURE & !HASWELL, HASWELL),
    // dtes64 monitor ds_cpl vmx smx est tm2, cid sdbg, xtpr pdcm, dca
    Change(1, 0, CpuidRegister::Ecx, 0x0004_cdfc, 0),
    // pn, ds acpi, ss, tm ia64 pbe; mce mtrr
    Change(1, 0, CpuidRegister::Edx, 0xe864_0000, 0x1080),
    // sgx hle, rtm cqm, mpx rdt_a avx512f avx512dq rdseed adx, avx512ifma pcommit clflushopt clwb intel_pt, all of avx512 and
    // sha to the end; erms
    Change(7, 0, CpuidRegister::Ebx, 0xffef_d814, 0x200),
    // avx512vbmi umip pku ospke, avx512_vbmi2, gfni vaes vpclmulqdq avx512_vnni avx512_bitalg, avx512_vpopcntdq, la57, rdpid, sgx_lc
    Change(7, 0, CpuidRegister::Ecx, 0x4041_5f5e, 0),
    // avx512_4vnniw avx512_4fmaps fsrm, avx512_vp2intersect
    Change(7, 0, CpuidRegister::Edx, 0x0000_011c, 0),
    // State of MPX, AVX-512 and protection keys; xsavec xgetbv1 xsaves
    Change(0xd, 0, CpuidRegister::Eax, 0x0000_02f8, 0),
    Change(0xd, 1, CpuidRegister::Eax, 0x0000_000e, 0),
];

/// 3dnowprefetch, mwaitx; pdpe1gb; wbnoinvd.
const T2_EXTENDED: [Change; 3] = [
    Change(0x8000_0001, 0, CpuidRegister::Ecx, 0x2000_0100, 0),
    Change(0x8000_0001, 0, CpuidRegister::Edx, 0x0400_0000, 0),
    Change(0x8000_0008, 0, CpuidRegister::Ebx, 0x0000_0200, 0),
];

/// So that a guest finds what it would find with T2A: besides sse4a misalignsse; mmxext fxsr_opt, and what AMD repeats of leaf 1.
const T2CL_EXTENDED: [Change; 3] = [
    Change(0x8000_0001, 0, CpuidRegister::Ecx, 0x2000_01c0, 0),
    Change(0x8000_0001, 0, CpuidRegister::Edx, 0x07c0_0000, 0),
    Change(0x8000_0008, 0, CpuidRegister::Ebx, 0x0000_0200, 0),
];

/// Besides svm sse4a misalignsse; mmxext fxsr_opt; clzero. There are xsaveerptr, two bits about IBRS, and the one by which EFER has no
/// LMSLE.
const T2A_EXTENDED: [Change; 3] = [
    Change(0x8000_0001, 0, CpuidRegister::Ecx, 0x2000_01c4, 0),
    Change(0x8000_0001, 0, CpuidRegister::Edx, 0x0640_0000, 0),
    Change(0x8000_0008, 0, CpuidRegister::Ebx, 0x0000_0201, 0x001c_0004),
];

const C3: [Change; 10] = [
    Change(1, 0, CpuidRegister::Eax, SIGNATURE & !IVY_BRIDGE, IVY_BRIDGE),
    // dtes64 monitor ds_cpl vmx, tm2, cid sdbg fma, xtpr pdcm, movbe
    Change(1, 0, CpuidRegister::Ecx, 0x0040_dd3c, 0),
    // pn, ds acpi, ss, tm pbe; mce mtrr
    Change(1, 0, CpuidRegister::Edx, 0xa864_0000, 0x1080),
    // sgx bmi1 hle avx2, bmi2, invpcid rtm cqm, mpx rdt_a avx512f avx512dq rdseed adx, avx512ifma and all to the end
    Change(7, 0, CpuidRegister::Ebx, 0xffaf_dd3c, 0),
    // avx512vbmi umip pku ospke, avx512_vnni avx512_vpopcntdq, la57, rdpid, sgx_lc
    Change(7, 0, CpuidRegister::Ecx, 0x4041_481e, 0),
    // avx512_4vnniw avx512_4fmaps
    Change(7, 0, CpuidRegister::Edx, 0x0000_000c, 0),
    // As T2.
    Change(0xd, 0, CpuidRegister::Eax, 0x0000_02f8, 0),
    Change(0xd, 1, CpuidRegister::Eax, 0x0000_000e, 0),
    // abm 3dnowprefetch; pdpe1gb
    Change(0x8000_0001, 0, CpuidRegister::Ecx, 0x0000_0120, 0),
    Change(0x8000_0001, 0, CpuidRegister::Edx, 0x0400_0000, 0),
];

/// What a template changes.
pub fn changes(template: CpuTemplate) -> CpuConfig {
    let (all, extended, register): (&[Change], &[Change], _) = match template {
        CpuTemplate::None => (&[], &[], None),
        CpuTemplate::C3 => (&C3, &[], None),
        CpuTemplate::T2 => (&T2, &T2_EXTENDED, None),
        // The faults that both of its models have, and no others.
        CpuTemplate::T2S => (&T2, &T2_EXTENDED, Some((!0, 0x0c0a_0c4c))),
        CpuTemplate::T2CL => (&T2, &T2CL_EXTENDED, Some((0xffff_ffff_e2f5_1e00, 0))),
        CpuTemplate::T2A => (&T2, &T2A_EXTENDED, None),
    };
    let msr_modifiers =
        register.map(|(mask, value)| MsrModifier { addr: Hex(ARCH_CAPABILITIES), bitmap: Bitmap { mask, value } });
    CpuConfig {
        kvm_capabilities: Vec::new(),
        cpuid_modifiers: all.iter().chain(extended).map(Change::modifier).collect(),
        msr_modifiers: msr_modifiers.into_iter().collect(),
    }
}

impl Change {
    fn modifier(&self) -> CpuidModifier {
        let &Self(leaf, subleaf, register, hidden, there) = self;
        let bitmap = Bitmap { mask: (hidden | there).into(), value: there.into() };
        CpuidModifier {
            leaf: Hex(leaf),
            subleaf: Hex(subleaf),
            flags: if matches!(leaf, 7 | 0xd) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            modifiers: vec![RegisterModifier { register, bitmap }],
        }
    }
}

/// Models that a template is for.
const fn models(template: CpuTemplate) -> &'static [Model] {
    match template {
        CpuTemplate::None => &[],
        CpuTemplate::C3 | CpuTemplate::T2 => &[SKYLAKE, CASCADE_LAKE, ICE_LAKE],
        CpuTemplate::T2S => &[SKYLAKE, CASCADE_LAKE],
        CpuTemplate::T2CL => &[CASCADE_LAKE, ICE_LAKE],
        CpuTemplate::T2A => &[MILAN],
    }
}

/// Whether a template is for the processor that this runs on.
pub(super) fn check(template: CpuTemplate) -> Result<(), KvmError> {
    let (name, signature) = (__cpuid(0), __cpuid(1).eax & SIGNATURE);
    let maker = [name.ebx, name.edx, name.ecx].map(u32::to_le_bytes);
    check_for(template, maker.as_flattened(), signature)
}

fn check_for(template: CpuTemplate, maker: &[u8], signature: u32) -> Result<(), KvmError> {
    let models = models(template);
    if models.is_empty() || models.iter().any(|model| model.0 == maker && model.1 == signature) {
        return Ok(());
    }
    let names: Vec<_> = models.iter().map(|(.., name)| *name).collect();
    Err(KvmError::Template { template, models: names.join(", ") })
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{CpuId, kvm_cpuid_entry2};

    use super::super::cpuid;
    use super::*;

    const TEMPLATES: [CpuTemplate; 5] =
        [CpuTemplate::C3, CpuTemplate::T2, CpuTemplate::T2S, CpuTemplate::T2CL, CpuTemplate::T2A];

    /// Where some features are that templates differ in, and what of them each template leaves.
    const FEATURES: [(&str, u32, CpuidRegister, u32, &[CpuTemplate]); 12] = {
        use CpuTemplate::{C3, T2, T2A, T2CL, T2S};
        use CpuidRegister::{Ebx, Ecx, Edx};
        const NOT_C3: &[CpuTemplate] = &[T2, T2S, T2CL, T2A];
        [
            ("avx", 1, Ecx, 28, &TEMPLATES),
            ("smep", 7, Ebx, 7, &TEMPLATES),
            ("erms", 7, Ebx, 9, &TEMPLATES),
            ("avx2", 7, Ebx, 5, NOT_C3),
            ("movbe", 1, Ecx, 22, NOT_C3),
            ("abm", 0x8000_0001, Ecx, 5, NOT_C3),
            ("smx", 1, Ecx, 6, &[C3]),
            ("vmx", 1, Ecx, 5, &[]),
            ("avx512f", 7, Ebx, 16, &[]),
            ("pdpe1gb", 0x8000_0001, Edx, 26, &[]),
            ("sse4a", 0x8000_0001, Ecx, 6, &[C3, T2, T2S]),
            ("clzero", 0x8000_0008, Ebx, 0, &[C3, T2, T2S, T2CL]),
        ]
    };

    /// A host that has everything.
    fn full() -> CpuId {
        let places = [(1, 0), (7, 0), (0xd, 0), (0xd, 1), (0x8000_0001, 0), (0x8000_0008, 0)];
        let full = |(function, index)| kvm_cpuid_entry2 {
            function,
            index,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        };
        CpuId::from_entries(&places.map(full)).unwrap()
    }

    #[test]
    fn each_leaves_its_features() {
        for template in TEMPLATES {
            let changed = cpuid::templated(&full(), &changes(template).cpuid_modifiers).unwrap();
            for (name, leaf, register, bit, templates) in FEATURES {
                let entry = changed.as_slice().iter().find(|entry| entry.function == leaf).unwrap();
                let value = match register {
                    CpuidRegister::Eax => entry.eax,
                    CpuidRegister::Ebx => entry.ebx,
                    CpuidRegister::Ecx => entry.ecx,
                    CpuidRegister::Edx => entry.edx,
                };
                assert_eq!(value >> bit & 1 == 1, templates.contains(&template), "{name} of {template:?}");
            }
            let signature = changed.as_slice()[0].eax & SIGNATURE;
            assert_eq!(signature, if template == CpuTemplate::C3 { IVY_BRIDGE } else { HASWELL }, "{template:?}");
        }
        assert_eq!(changes(CpuTemplate::None), CpuConfig::default());
    }

    #[test]
    fn two_say_what_faults_the_processor_has() {
        let faults =
            |template| changes(template).msr_modifiers.first().map(|modifier| modifier.bitmap.apply(1 << 3 | 1 << 40));
        assert_eq!(TEMPLATES.map(faults), [None, None, Some(0x0c0a_0c4c), Some(1 << 3), None]);
    }

    #[test]
    fn each_is_for_its_models() {
        let fits = |model: Model| TEMPLATES.map(|template| check_for(template, model.0, model.1).is_ok());
        assert_eq!(fits(SKYLAKE), [true, true, true, false, false]);
        assert_eq!(fits(CASCADE_LAKE), [true, true, true, true, false]);
        assert_eq!(fits(ICE_LAKE), [true, true, false, true, false]);
        assert_eq!(fits(MILAN), [false, false, false, false, true]);
        assert!(check_for(CpuTemplate::None, b"SomebodyElse", 0).is_ok());
        let other = check_for(CpuTemplate::T2CL, MILAN.0, ICE_LAKE.1).unwrap_err().to_string();
        assert!(other.contains("cpu_template T2CL is for Cascade Lake, Ice Lake-SP"), "{other}");
    }
}
