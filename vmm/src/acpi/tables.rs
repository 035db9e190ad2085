//! The tables with a fixed form (ACPI 6.4, chapter 5.2; PCI firmware spec 3.3, 4.1.2).

use acpi_tables::Aml;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use bedplate_devices::platform::{
    AcpiPm, GPE_OFFSET, PM_TIMER_OFFSET, PM1_CONTROL_OFFSET, PM1_EVENT_OFFSET, RESET_OFFSET,
};

use super::{PM_PORT, SCI};
use crate::kvm::INTX_PINS;
use crate::memory::layout;

pub(super) const OEM: [u8; 6] = *b"BEDPLT";
pub(super) const OEM_TABLE: [u8; 8] = *b"BEDPLATE";
pub(super) const OEM_REVISION: u32 = 1;

/// There is a legacy device: the serial port.
const BOOT_LEGACY_DEVICES: u16 = 1;
/// There is no VGA. That the bit for a keyboard controller is off spares Linux a second of probing.
const BOOT_NO_VGA: u16 = 1 << 2;
/// Index of the century in the clock's RAM.
const RTC_CENTURY: u8 = 0x32;

fn port(offset: u64) -> u16 {
    // Offsets inside of the block are below 16.
    PM_PORT + offset as u16
}

fn register(offset: u64, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port(offset).into())
}

pub(super) fn fadt(dsdt: u64, facs: u64, timer: bool) -> FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_64(facs)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // There is neither a sleep button nor a wake-up by the clock.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    // Firmware looks at nothing but the old field; ours are below 4 GiB always, and systems prefer the new one.
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = (SCI as u16).into();
    fadt.pm1a_evt_blk = u32::from(port(PM1_EVENT_OFFSET)).into();
    fadt.pm1a_cnt_blk = u32::from(port(PM1_CONTROL_OFFSET)).into();
    fadt.gpe0_blk = u32::from(port(GPE_OFFSET)).into();
    fadt.gpe0_blk_len = 2;
    (fadt.pm1_evt_len, fadt.pm1_cnt_len) = (4, 2);
    fadt.x_pm1a_evt_blk = register(PM1_EVENT_OFFSET, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = register(PM1_CONTROL_OFFSET, 16, AccessSize::WordAccess);
    fadt.x_gpe0_blk = register(GPE_OFFSET, 16, AccessSize::ByteAccess);
    fadt.reset_reg = register(RESET_OFFSET, 8, AccessSize::ByteAccess);
    fadt.reset_value = AcpiPm::RESET_VALUE;
    fadt.century = RTC_CENTURY;
    fadt.iapc_boot_arch = (BOOT_LEGACY_DEVICES | BOOT_NO_VGA).into();
    // No C2 and C3: latencies beyond the limits say so.
    (fadt.p_lvl2_lat, fadt.p_lvl3_lat) = (0xfff.into(), 0xfff.into());
    if timer {
        // Firmware waits by it. A kernel has better clocks, and Linux takes seven milliseconds to see whether this is one.
        fadt = fadt.flag(Flags::TmrValExt);
        fadt.pm_tmr_len = 4;
        fadt.pm_tmr_blk = u32::from(port(PM_TIMER_OFFSET)).into();
        fadt.x_pm_tmr_blk = register(PM_TIMER_OFFSET, 32, AccessSize::DwordAccess);
    }
    fadt.finalize()
}

/// The processor is there;
const ENABLED: u8 = 1;
/// or it may come.
const ONLINE_CAPABLE: u8 = 1 << 1;

/// Local APIC: processor id, APIC id, flags.
const fn local_apic(id: u8, flags: u8) -> [u8; 8] {
    [0, 8, id, id, flags, 0, 0, 0]
}

/// What the MADT would say of a processor that has come.
pub(super) fn present_processor(id: u8) -> Vec<u8> {
    local_apic(id, ENABLED).into()
}

/// Local APICs, I/O APIC, and how the SCI, the pins of PCI devices and the NMI are wired.
pub(super) fn madt(vcpus: u8, present: u8) -> Sdt {
    const HEADER_LEN: u32 = 44;
    const HAS_PICS: u32 = 1;
    const ACTIVE_HIGH_LEVEL: u16 = 1 | 3 << 2;
    const ACTIVE_LOW_LEVEL: u16 = 3 | 3 << 2;
    const ALL_PROCESSORS: u8 = 0xff;
    let mut madt = Sdt::new(*b"APIC", HEADER_LEN, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.write_u32(36, layout::LOCAL_APIC);
    madt.write_u32(40, HAS_PICS);
    for id in 0..vcpus {
        madt.append_slice(&local_apic(id, if id < present { ENABLED } else { ONLINE_CAPABLE }));
    }
    // I/O APIC: its id (above those of the processors), address, first interrupt.
    madt.append_slice(&[1, 12, vcpus, 0]);
    madt.append_slice(&layout::IO_APIC.to_le_bytes());
    madt.append_slice(&0u32.to_le_bytes());
    // PCI's are told here, too, for a kernel that takes no word of ACPI's about PCI.
    let pci = INTX_PINS.map(|pin| (pin, ACTIVE_LOW_LEVEL));
    for (pin, flags) in [(SCI, ACTIVE_HIGH_LEVEL)].into_iter().chain(pci) {
        // Interrupt source override: ISA bus, source, interrupt, flags.
        madt.append_slice(&[2, 10, 0, pin as u8]);
        madt.append_slice(&pin.to_le_bytes());
        madt.append_slice(&flags.to_le_bytes());
    }
    // Local APIC NMI: processor, flags, pin LINT1.
    madt.append_slice(&[4, 6, ALL_PROCESSORS, 0, 0, 1]);
    madt
}

pub(super) fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    mcfg
}

pub(super) fn xsdt(tables: &[u64]) -> impl Aml + use<> {
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    tables.iter().for_each(|table| xsdt.add_entry(*table));
    xsdt
}

pub(super) fn rsdp(xsdt: u64) -> Rsdp {
    Rsdp::new(OEM, xsdt)
}
