//! The machine's description for the guest: ACPI tables in the BIOS area, where Linux looks for the root.

mod dsdt;
mod hotplug;
mod tables;

use std::ops::Range;

use acpi_tables::Aml;
use bedplate_devices::Memory;
use bedplate_devices::pci;
use bedplate_devices::virtio::mmio::Place;
use vm_memory::{Bytes, GuestAddress};

/// Length of the memory-mapped PCI configuration space.
pub const ECAM_LEN: u64 = pci::ECAM_LEN;
/// First port of the ACPI register block (`devices::platform::AcpiPm`).
pub const PM_PORT: u16 = 0x600;
/// First port of the registers for devices that come and go (`devices::platform::HotplugPort`).
pub const HOTPLUG_PORT: u16 = 0x610;
/// The system control interrupt, a level.
pub const SCI: u32 = 9;

/// Where they lie for a kernel that is booted directly: 16 bytes aligned, as the root must be.
const AREA: Range<u64> = 0xe_0000..crate::mp_table::AREA.start;

/// What the tables tell.
pub struct Description {
    /// Number of vCPUs, those included that may come later.
    pub vcpus: u8,
    /// How many of them are there from the start, the first ones.
    pub present: u8,
    /// Windows for BARs below 4 GiB, for `_CRS`.
    pub mmio32: Vec<Range<u64>>,
    /// Those above.
    pub mmio64: Vec<Range<u64>>,
    /// The PM timer is told of.
    pub timer: bool,
    /// Virtio devices for a guest without PCI.
    pub virtio: Vec<Place>,
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
    let base = AREA.start + ALIGNMENT;
    let tables = Tables::new(description, base);
    let end = base + tables.bytes.len() as u64;
    if end > AREA.end {
        return Err(AcpiError(format!("{} bytes too many", end - AREA.end)));
    }
    for (bytes, address) in [(&tables.bytes, base), (&tables.root, AREA.start)] {
        memory.write_slice(bytes, GuestAddress(address)).map_err(|e| AcpiError(e.to_string()))?;
    }
    Ok(AREA.start)
}

/// What the FACS needs, and more than the root pointer has bytes.
pub const ALIGNMENT: u64 = 64;

/// All tables, linked and summed for one address; and where the links and sums are, for firmware that moves them.
pub struct Tables {
    /// The root pointer (RSDP), which names the XSDT at `ROOT_LINK`.
    pub root: Vec<u8>,
    /// The others, one after the other.
    pub bytes: Vec<u8>,
    /// Where in `bytes` those lie that have a sum over all of them.
    pub summed: Vec<Range<usize>>,
    /// Where in `bytes` an address stands, and how many bytes it has.
    pub links: Vec<(usize, u8)>,
}

/// Of the sum over a table.
pub const SUM_OFFSET: usize = 9;
/// Of the XSDT's address in the root pointer, which has 8 bytes.
pub const ROOT_LINK: usize = 24;
/// Of the sum over all of the root pointer; another one is over its first 20 bytes, which name no address.
pub const ROOT_SUM: usize = 32;
/// Of the addresses in the FADT: DSDT in 4 bytes and in 8, FACS.
const FADT_LINKS: [(usize, u8); 3] = [(40, 4), (132, 8), (140, 8)];
/// Of the first address in the XSDT.
const XSDT_LINKS: usize = 36;

impl Tables {
    /// For the address `base`, a multiple of [`ALIGNMENT`].
    pub fn new(description: &Description, base: u64) -> Self {
        let mut tables = Self { root: Vec::new(), bytes: Vec::new(), summed: Vec::new(), links: Vec::new() };
        let dsdt = tables.put(&dsdt::dsdt(description));
        // It has no sum.
        let facs = tables.put(&acpi_tables::facs::FACS::new());
        tables.summed.pop();
        let at = |table: usize| base + table as u64;
        let fadt = tables.put(&tables::fadt(at(dsdt), at(facs), description.timer));
        tables.links.extend(FADT_LINKS.map(|(offset, len)| (fadt + offset, len)));
        let named =
            [fadt, tables.put(&tables::madt(description.vcpus, description.present)), tables.put(&tables::mcfg())];
        let xsdt = tables.put(&tables::xsdt(&named.map(at)));
        tables.links.extend((0..named.len()).map(|index| (xsdt + XSDT_LINKS + 8 * index, 8)));
        tables::rsdp(at(xsdt)).to_aml_bytes(&mut tables.root);
        tables
    }

    /// Appends a table; says where it begins.
    fn put(&mut self, table: &dyn Aml) -> usize {
        let start = self.bytes.len().next_multiple_of(ALIGNMENT as usize);
        self.bytes.resize(start, 0);
        table.to_aml_bytes(&mut self.bytes);
        self.summed.push(start..self.bytes.len());
        start
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

    /// APIC ids and flags of the local APICs, by walking the structures.
    fn local_apics(madt: &[u8]) -> Vec<(u8, u8)> {
        let (mut ids, mut rest) = (Vec::new(), &madt[44..]);
        while let [kind, len, _, id, flags, ..] = rest {
            if *kind == 0 {
                ids.push((*id, *flags));
            }
            rest = &rest[usize::from(*len)..];
        }
        ids
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_sums_to_zero() {
        let ram = Ram::new(8, Pages::Normal).unwrap();
        let description = Description {
            vcpus: 8,
            present: 6,
            mmio32: vec![0xc000_0000..0xd000_0000, 0xd000_0000..0xe000_0000],
            mmio64: vec![1 << 34..1 << 35, 1 << 38..1 << 39],
            timer: false,
            virtio: crate::machine::ports::virtio_places().take(3).collect(),
        };
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
                let count = |name: &[u8]| dsdt.windows(name.len()).filter(|bytes| *bytes == name).count();
                assert_eq!((count(b"ACPI0007"), count(b"_MAT"), count(b"_STA")), (8, 2, 2), "two come later");
                assert_eq!((count(b"LNRO0005"), count(b"_PRT")), (3, 1));
                // INTA# of slot 3: its address as a double word, pin 0, nobody's, and the number as a byte.
                assert_eq!(count(&[0x0c, 0xff, 0xff, 3, 0, 0, 0, 0x0a, 11]), 1);
            }
            if names.last().unwrap() == "APIC" {
                // Enabled; or, of those that come later, online capable.
                assert_eq!(local_apics(&table), (0..8).map(|id| (id, if id < 6 { 1 } else { 2 })).collect::<Vec<_>>());
            }
        }
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);
    }

    #[test]
    fn the_timer_is_told_of_or_not() {
        for timer in [false, true] {
            let description = Description {
                vcpus: 1,
                present: 1,
                mmio32: vec![0xc000_0000..0xd000_0000, 0xd000_0000..0xe000_0000],
                mmio64: vec![1 << 34..1 << 35, 1 << 38..1 << 39],
                timer,
                virtio: Vec::new(),
            };
            let Tables { bytes, summed, .. } = Tables::new(&description, 0);
            let mut tables = summed.iter().map(|range| &bytes[range.clone()]);
            let fadt = tables.find(|table| table.starts_with(b"FACP")).unwrap();
            // PM_TMR_BLK, PM_TMR_LEN, the flag for 32 bits, and X_PM_TMR_BLK (ACPI 6.4, table 5.9).
            let told = [fadt[76..80] != [0; 4], fadt[91] != 0, fadt[113] & 1 != 0, fadt[208..220] != [0; 12]];
            assert_eq!(told, [timer; 4]);
        }
    }
}
