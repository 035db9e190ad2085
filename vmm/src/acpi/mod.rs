//! The machine's description for the guest: ACPI tables in the BIOS area, where Linux looks for the root.

mod dsdt;
mod tables;

use std::ops::Range;

use acpi_tables::Aml;
use bedplate_devices::Memory;
use bedplate_devices::pci;
use vm_memory::{Bytes, GuestAddress};

/// Length of the memory-mapped PCI configuration space.
pub const ECAM_LEN: u64 = pci::ECAM_LEN;
/// First port of the ACPI register block (`devices::platform::AcpiPm`).
pub const PM_PORT: u16 = 0x600;
/// The system control interrupt, a level.
pub const SCI: u32 = 9;

/// The tables begin here, 16 bytes aligned as the root must be.
const AREA: Range<u64> = 0xe_0000..0x10_0000;

/// What the tables tell.
pub struct Description {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Windows for BARs, for `_CRS`.
    pub mmio32: Range<u64>,
    /// As above.
    pub mmio64: Range<u64>,
}

/// The tables do not fit where they must lie: our bug.
#[derive(Debug, thiserror::Error)]
#[error("ACPI tables cannot be placed in the BIOS area: {0}")]
pub struct AcpiError(String);

/// Writes all tables; returns the address of the root pointer (RSDP).
///
/// # Errors
/// They do not fit.
pub fn write(memory: &Memory, description: &Description) -> Result<u64, AcpiError> {
    // The root pointer comes first and is written last: it points at what follows.
    let mut area = Area { memory, next: AREA.start + acpi_tables::rsdp::Rsdp::len() as u64 };
    let dsdt = area.put(&dsdt::dsdt(description))?;
    let facs = area.put(&acpi_tables::facs::FACS::new())?;
    let fadt = area.put(&tables::fadt(dsdt, facs))?;
    let madt = area.put(&tables::madt(description.vcpus))?;
    let mcfg = area.put(&tables::mcfg())?;
    let xsdt = area.put(&tables::xsdt(&[fadt, madt, mcfg]))?;
    area.next = AREA.start;
    area.put(&tables::rsdp(xsdt))
}

struct Area<'a> {
    memory: &'a Memory,
    next: u64,
}

impl Area<'_> {
    fn put(&mut self, table: &dyn Aml) -> Result<u64, AcpiError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        // 64 bytes is the alignment that the FACS needs.
        let address = if self.next == AREA.start { AREA.start } else { self.next.next_multiple_of(64) };
        let end = address + bytes.len() as u64;
        if end > AREA.end {
            return Err(AcpiError(format!("{} bytes too many", end - AREA.end)));
        }
        self.memory.write_slice(&bytes, GuestAddress(address)).map_err(|e| AcpiError(e.to_string()))?;
        self.next = end;
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Pages, Ram};

    fn table(ram: &Ram, address: u64) -> Vec<u8> {
        let len: u32 = ram.memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; len as usize];
        ram.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// APIC ids of the local APICs, by walking the structures.
    fn local_apics(madt: &[u8]) -> Vec<u8> {
        let (mut ids, mut rest) = (Vec::new(), &madt[44..]);
        while let [kind, len, _, id, ..] = rest {
            if *kind == 0 {
                ids.push(*id);
            }
            rest = &rest[usize::from(*len)..];
        }
        ids
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_sums_to_zero() {
        let ram = Ram::new(8, Pages::Normal).unwrap();
        let description = Description { vcpus: 8, mmio32: 0xc000_0000..0xe000_0000, mmio64: 1 << 34..1 << 35 };
        let rsdp = write(&ram.memory, &description).unwrap();
        let mut root = [0; 36];
        ram.memory.read_slice(&mut root, GuestAddress(rsdp)).unwrap();
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));

        let xsdt = table(&ram, u64::from_le_bytes(root[24..32].try_into().unwrap()));
        assert_eq!(sum(&xsdt), 0);
        let mut names = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let table = table(&ram, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(sum(&table), 0);
            names.push(String::from_utf8(table[..4].to_vec()).unwrap());
            if names.last().unwrap() == "FACP" {
                let dsdt = u64::from_le_bytes(table[140..148].try_into().unwrap());
                let dsdt = self::table(&ram, dsdt);
                assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
            }
            if names.last().unwrap() == "APIC" {
                assert_eq!(local_apics(&table), (0..8).collect::<Vec<_>>());
            }
        }
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);
    }
}
