//! What the kernel is told about the machine: `boot_params` or `hvm_start_info`.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::GuestAddress;

use super::{BootError, Initrd, start};
use crate::memory::Ram;
use crate::memory::layout::{EBDA, ECAM, FIRST_MIB};

pub(super) use linux_loader::loader::bootparam::setup_header as SetupHeader;

/// Of the setup header in a bzImage and in the zero page.
pub(super) const HEADER_OFFSET: u64 = 0x1f1;
/// A boot loader without a number of its own.
const LOADER_UNKNOWN: u8 = 0xff;
const PVH_MAGIC: u32 = 0x336e_c578;

/// The header of an ELF kernel that is booted by the 64-bit protocol: it carries none itself.
pub(super) fn header_for_elf() -> SetupHeader {
    SetupHeader {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20c,
        kernel_alignment: 0x100_0000,
        ..Default::default()
    }
}

/// Kind of a range of addresses, with ACPI's numbers.
#[derive(Clone, Copy)]
enum RangeKind {
    Ram = 1,
    Reserved = 2,
}

/// RAM, and what looks like a hole and is not free: the BIOS area, where our ACPI tables lie, and the ECAM.
fn memory_map(ram: &Ram) -> Vec<(u64, u64, RangeKind)> {
    let mut map = vec![(0, EBDA, RangeKind::Ram), (EBDA, FIRST_MIB, RangeKind::Reserved)];
    map.extend(ram.ranges().map(|(start, end)| (start.max(FIRST_MIB), end, RangeKind::Ram)));
    map.push((ECAM, ECAM + crate::acpi::ECAM_LEN, RangeKind::Reserved));
    map
}

/// Truncation is splitting: the header has the low halves, `boot_params` the high ones.
const fn split(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}

pub(super) fn write_zero_page(
    ram: &Ram,
    header: SetupHeader,
    cmdline_len: usize,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> Result<(), BootError> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNKNOWN;
    params.hdr.cmd_line_ptr = start::CMDLINE as u32;
    // Checked against the kernel's limit, a u32.
    params.hdr.cmdline_size = cmdline_len as u32;
    if let Some(initrd) = initrd {
        (params.hdr.ramdisk_image, params.ext_ramdisk_image) = split(initrd.address);
        (params.hdr.ramdisk_size, params.ext_ramdisk_size) = split(initrd.len);
    }
    let mut entries = 0;
    let mut table = params.e820_table;
    for ((start, end, kind), slot) in memory_map(ram).into_iter().zip(&mut table) {
        *slot = boot_e820_entry { addr: start, size: end - start, r#type: kind as u32 };
        entries += 1;
    }
    (params.e820_table, params.e820_entries) = (table, entries);
    let boot = BootParams::new(&params, GuestAddress(start::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&boot, &*ram.memory).map_err(|e| BootError::Structures(e.to_string()))
}

pub(super) fn write_start_info(ram: &Ram, initrd: Option<Initrd>, rsdp: u64) -> Result<(), BootError> {
    let map: Vec<_> = memory_map(ram)
        .into_iter()
        .map(|(start, end, kind)| hvm_memmap_table_entry {
            addr: start,
            size: end - start,
            type_: kind as u32,
            ..Default::default()
        })
        .collect();
    let mut info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        cmdline_paddr: start::CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: start::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let modules = initrd.map(|i| hvm_modlist_entry { paddr: i.address, size: i.len, ..Default::default() });
    if modules.is_some() {
        (info.nr_modules, info.modlist_paddr) = (1, start::PVH_MODULES);
    }
    let mut boot = BootParams::new(&info, GuestAddress(start::PVH_INFO));
    boot.set_sections(&map, GuestAddress(start::PVH_MEMORY_MAP));
    if let Some(module) = modules {
        boot.set_modules(&[module], GuestAddress(start::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&boot, &*ram.memory).map_err(|e| BootError::Structures(e.to_string()))
}
