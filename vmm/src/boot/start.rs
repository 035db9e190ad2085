//! Where the boot structures lie in the first MiB, and the descriptors and page tables of the first instruction.

use bedplate_devices::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;

/// Global descriptor table.
pub const GDT_ADDRESS: u64 = 0x500;
/// `hvm_start_info`.
pub const PVH_INFO: u64 = 0x6000;
/// List of PVH modules: one, the initial RAM disk.
pub const PVH_MODULES: u64 = 0x6040;
/// PVH memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6100;
/// `boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of a stack of some KiB, until the kernel has its own.
pub const STACK: u64 = 0x8ff0;
/// PML4, PDPT and four page directories that map the first 4 GiB one to one with 2 MiB pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// The command line.
pub const CMDLINE: u64 = 0x2_0000;

/// Indexes into [`GDT`]. Linux wants code at selector 0x10, of the width in which it is entered, and data at 0x18.
pub const CODE_32: usize = 1;
/// 64-bit code.
pub const CODE_64: usize = 2;
/// Selector of Linux's code.
pub const LINUX_CODE_SELECTOR: u16 = 0x10;
/// Flat data.
pub const DATA: usize = 3;
/// Selector of [`DATA`].
pub const DATA_SELECTOR: u16 = 0x18;
/// Flat segments over 4 GiB, present, accessed.
pub const GDT: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// The same for Linux of 32 bits: both code segments are [`CODE_32`].
pub const GDT_32: [u64; 4] = [0, GDT[CODE_32], GDT[CODE_32], GDT[DATA]];

const PAGE: u64 = 0x1000;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;

/// Writes `descriptors`, and page tables.
pub(super) fn write(memory: &Memory, descriptors: &[u64]) -> Result<(), BootError> {
    let put = |address: u64, values: &[u64]| {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(address)).map_err(|e| BootError::Structures(e.to_string()))
    };
    put(GDT_ADDRESS, descriptors)?;
    let pdpt = PAGE_TABLES + PAGE;
    let directories: Vec<u64> = (1..=4).map(|n| pdpt + n * PAGE).collect();
    put(PAGE_TABLES, &[pdpt | PRESENT_WRITABLE])?;
    put(pdpt, &directories.iter().map(|address| address | PRESENT_WRITABLE).collect::<Vec<_>>())?;
    for (directory, first) in directories.iter().zip((0..).step_by(512)) {
        let pages: Vec<u64> = (first..first + 512).map(|n: u64| n << 21 | LARGE | PRESENT_WRITABLE).collect();
        put(*directory, &pages)?;
    }
    Ok(())
}
