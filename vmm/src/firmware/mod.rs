//! Starting through firmware: a BIOS for PCs such as SeaBIOS, as Debian's package `seabios` has it.
//!
//! The file lies below 4 GiB, read-only, and its last part is copied to RAM below 1 MiB, where a chipset would shadow it:
//! all RAM there can be written, so that firmware that knows no chipset of ours finds what it would have had to ask for.
//! The first vCPU begins at the reset vector. What firmware has to know it reads from the configuration device: RAM, number
//! of processors, tables for the system (ACPI, SMBIOS), which disk to start from, and that its screen is the serial port.
//!
//! Used by `machine::builder`, on the control thread.

mod linker;
mod smbios;

use std::io;
use std::path::{Path, PathBuf};

use bedplate_devices::pci::{ECAM_LEN, Slot};
use bedplate_devices::platform::{FwCfgError, FwCfgItems, FwCfgKey};
use vm_memory::{Bytes, GuestAddress};

use crate::acpi::{Description, Tables};
use crate::files;
use crate::machine::ports;
use crate::memory::{Ram, layout};

/// A BIOS has 64 KiB at least, which is what 16-bit code reaches,
const MIN_LEN: u64 = 64 << 10;
/// and 256 KiB at most: what fits between video memory and the end of the first MiB.
const MAX_LEN: u64 = 256 << 10;
/// Of its length: KVM maps whole pages, and BIOS images come in such steps.
const STEP: u64 = 64 << 10;
/// For a person to read that nothing can be started, before the VM resets, which ends it.
const BOOT_FAIL_WAIT_MS: u32 = 1000;

/// Of an entry in the memory map.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Why a VM cannot start through firmware.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// The file cannot be read.
    #[error("firmware {path}: {source}; check the path and who may read it, or install Debian's package seabios")]
    Read {
        /// As given.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// No BIOS.
    #[error(
        "firmware {path} has {len} bytes, and no BIOS for PCs has: give bios-256k.bin of Debian's package seabios; UEFI \
         firmware such as OVMF cannot be used yet"
    )]
    Length {
        /// As given.
        path: PathBuf,
        /// Of the file.
        len: u64,
    },
    /// Our bug.
    #[error("firmware cannot be given what it needs: {0}")]
    Shadow(String),
    /// Our bug.
    #[error(transparent)]
    Items(#[from] FwCfgError),
}

/// What the file at `path` holds: a BIOS, as far as its length tells.
///
/// # Errors
/// It cannot be read, or is too short or too long.
pub fn read(path: &Path) -> Result<Vec<u8>, FirmwareError> {
    let refused = |source| FirmwareError::Read { path: path.into(), source };
    let file = files::read_regular(path).map_err(refused)?;
    let len = file.metadata().map_err(refused)?.len();
    if !(MIN_LEN..=MAX_LEN).contains(&len) || !len.is_multiple_of(STEP) {
        return Err(FirmwareError::Length { path: path.into(), len });
    }
    let rom = files::read_all(path, MAX_LEN).map_err(refused)?;
    // It may have been changed since.
    let now = rom.len() as u64;
    if now == len { Ok(rom) } else { Err(FirmwareError::Length { path: path.into(), len: now }) }
}

/// Where `rom` begins, to end at 4 GiB.
pub fn address(rom: &[u8]) -> u64 {
    layout::FIRMWARE_END - rom.len() as u64
}

/// Copies `rom` to the RAM below 1 MiB.
///
/// # Errors
/// There is none: our bug.
pub fn shadow(ram: &Ram, rom: &[u8]) -> Result<(), FirmwareError> {
    let at = GuestAddress(layout::FIRST_MIB - rom.len() as u64);
    ram.memory.write_slice(rom, at).map_err(|e| FirmwareError::Shadow(e.to_string()))
}

/// What firmware is told of a machine that `description` describes to its system, with `disks` in the order in which they
/// are to be tried.
///
/// # Errors
/// Something does not fit: our bug.
pub fn items(ram: &Ram, description: &Description, disks: &[Slot]) -> Result<FwCfgItems, FwCfgError> {
    let mut items = FwCfgItems::new();
    // It waits for those that are there.
    items.number(FwCfgKey::Cpus, description.present.into());
    items.number(FwCfgKey::MaxCpus, description.vcpus.into());
    items.file("etc/e820", memory_map(ram))?;
    // Where BARs may be, if firmware wants them above RAM.
    let above_ram = description.mmio64.first().map_or(0, |window| window.start);
    items.file("etc/reserved-memory-end", above_ram.to_le_bytes().to_vec())?;
    items.file("etc/sercon-port", ports::SERIAL.to_le_bytes().to_vec())?;
    items.file("etc/boot-fail-wait", BOOT_FAIL_WAIT_MS.to_le_bytes().to_vec())?;
    items.file("bootorder", boot_order(disks))?;
    let tables = Tables::new(description, 0);
    items.file(linker::SCRIPT, linker::script(&tables))?;
    items.file(linker::ROOT, tables.root)?;
    items.file(linker::TABLES, tables.bytes)?;
    let smbios = smbios::structures(description.vcpus, ram);
    items.file("etc/smbios/smbios-anchor", smbios::entry_point(&smbios))?;
    items.file("etc/smbios/smbios-tables", smbios)?;
    Ok(items)
}

/// Address, length and kind of every range that is RAM or looks free and is not. What lies below 1 MiB firmware knows.
fn memory_map(ram: &Ram) -> Vec<u8> {
    let ranges = ram.ranges().map(|(start, end)| (start, end - start, E820_RAM));
    let ecam = (layout::ECAM, ECAM_LEN, E820_RESERVED);
    let intel = (layout::IDENTITY_MAP, 4 << 12, E820_RESERVED);
    let entry = |(start, len, kind): (u64, u64, u32)| {
        [&start.to_le_bytes()[..], &len.to_le_bytes(), &kind.to_le_bytes()].concat()
    };
    ranges.chain([ecam, intel]).flat_map(entry).collect()
}

/// Each disk as a path of Open Firmware, one a line.
fn boot_order(disks: &[Slot]) -> Vec<u8> {
    let path = |slot: &Slot| format!("/pci@i0cf8/scsi@{:x}/disk@0,0", slot.number());
    let mut text = disks.iter().map(path).collect::<Vec<_>>().join("\n").into_bytes();
    text.push(0);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Pages;

    #[test]
    fn a_bios_is_known_by_its_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rom");
        for (len, good) in [(0, false), (64 << 10, true), (100_000, false), (256 << 10, true), (4 << 20, false)] {
            std::fs::write(&path, vec![0x90; len]).unwrap();
            match read(&path) {
                Ok(rom) => assert!(good && rom.len() == len && address(&rom) + len as u64 == 1 << 32),
                Err(error) => assert!(!good && error.to_string().contains("seabios"), "{error}"),
            }
        }
        let missing = read(&dir.path().join("none")).unwrap_err().to_string();
        assert!(missing.contains("No such file") && missing.contains("seabios"), "{missing}");
    }

    #[test]
    fn the_last_byte_is_the_last_below_1_mib_too() {
        let ram = Ram::new(16, Pages::Normal).unwrap();
        let mut rom = vec![1; 128 << 10];
        rom[(128 << 10) - 1] = 2;
        shadow(&ram, &rom).unwrap();
        let at = |address: u64| -> u8 { ram.memory.read_obj(GuestAddress(address)).unwrap() };
        assert_eq!([at(0xd_ffff), at(0xe_0000), at(0xf_fffe), at(0xf_ffff), at(0x10_0000)], [0, 1, 1, 2, 0]);
    }

    #[test]
    fn all_ram_is_in_the_map() {
        let ram = Ram::new(16, Pages::Normal).unwrap();
        let map = memory_map(&ram);
        assert_eq!(map[..20], [&[0; 8][..], &(16u64 << 20).to_le_bytes(), &[1, 0, 0, 0]].concat());
        assert_eq!(map.len(), 3 * 20);
        assert_eq!(boot_order(&[]), b"\0");
    }
}
