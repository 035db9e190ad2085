//! The machine's description for a kernel without ACPI: processors and interrupt controllers, by the MultiProcessor
//! Specification 1.4. Without it such a kernel finds neither a second processor nor the I/O APIC.

use std::ops::Range;

use bedplate_devices::Memory;
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::intx_pins;
use crate::memory::layout;

/// Where it lies: in the part of the BIOS area where kernels look for it.
pub const AREA: Range<u64> = 0xf_0000..0x10_0000;

/// Of the floating pointer.
const POINTER_LEN: usize = 16;
const HEADER_LEN: usize = 44;
/// Revision 1.4.
const REVISION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
const PINS: u8 = 24;
const ENABLED: u8 = 1;
const FIRST: u8 = 2;

/// Kinds of interrupts.
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;
/// Every local APIC.
const ALL: u8 = 0xff;

/// Buses. PCI's has the number by which configuration space knows it.
const PCI: u8 = 0;
const ISA: u8 = 1;

/// The table does not fit where it must lie: our bug, or RAM of less than a MiB.
#[derive(Debug, thiserror::Error)]
#[error("the MP table cannot be placed in the BIOS area: {0}")]
pub struct MpTableError(String);

/// Writes the table of a machine with `vcpus` processors.
///
/// # Errors
/// It cannot be written.
pub fn write(memory: &Memory, vcpus: u8) -> Result<(), MpTableError> {
    let bytes = [pointer().to_vec(), table(vcpus)].concat();
    memory.write_slice(&bytes, GuestAddress(AREA.start)).map_err(|e| MpTableError(e.to_string()))
}

/// The floating pointer, by whose signature the table after it is found.
fn pointer() -> [u8; POINTER_LEN] {
    let mut pointer = [0; POINTER_LEN];
    pointer[..4].copy_from_slice(b"_MP_");
    // Below 1 MiB.
    pointer[4..8].copy_from_slice(&(AREA.start as u32 + POINTER_LEN as u32).to_le_bytes());
    (pointer[8], pointer[9]) = ((POINTER_LEN / 16) as u8, REVISION);
    pointer[10] = remainder(&pointer);
    pointer
}

fn table(vcpus: u8) -> Vec<u8> {
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpus {
        // Its model is left to CPUID.
        let mut processor = vec![0, id, APIC_VERSION, ENABLED | if id == 0 { FIRST } else { 0 }];
        processor.resize(20, 0);
        entries.push(processor);
    }
    entries.push([&[1, PCI], b"PCI   ".as_slice()].concat());
    entries.push([&[1, ISA], b"ISA   ".as_slice()].concat());
    // Its id is above those of the processors.
    let io_apic = vcpus;
    entries.push([&[2, io_apic, IO_APIC_VERSION, ENABLED], layout::IO_APIC.to_le_bytes().as_slice()].concat());
    // Kind, flags as the bus has them, and where from and to. Levels: INTA# of each device, where the interrupt's number is the
    // device's and, in two bits below it, the pin's. Edges: the other pins are the ISA bus's interrupts, and those above are said to be.
    let pci: Vec<_> = intx_pins().map(|(slot, pin)| (slot.number() << 2, pin as u8)).collect();
    let isa = (0..PINS).filter(|pin| !pci.iter().any(|(_, of)| of == pin));
    entries.extend(isa.map(|pin| vec![3, VECTORED, 0, 0, ISA, pin, io_apic, pin]));
    entries.extend(pci.iter().map(|(device, pin)| vec![3, VECTORED, 0, 0, PCI, *device, io_apic, *pin]));
    entries.push(vec![4, EXTERNAL, 0, 0, ISA, 0, 0, 0]);
    entries.push(vec![4, NMI, 0, 0, ISA, 0, ALL, 1]);

    let mut table = vec![0; HEADER_LEN];
    table[..4].copy_from_slice(b"PCMP");
    table[6] = REVISION;
    table[8..16].copy_from_slice(b"BEDPLATE");
    table[16..28].copy_from_slice(b"BEDPLATE    ");
    table[34..36].copy_from_slice(&(entries.len() as u16).to_le_bytes());
    table[36..40].copy_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    table.extend(entries.concat());
    // 255 processors are 5 KiB.
    let len = table.len() as u16;
    table[4..6].copy_from_slice(&len.to_le_bytes());
    table[7] = remainder(&table);
    table
}

/// What makes the sum over `bytes` zero.
fn remainder(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |rest: u8, byte| rest.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Pages, Ram};

    #[test]
    fn a_kernel_finds_what_is_there() {
        let ram = Ram::new(8, Pages::Normal).unwrap();
        write(&ram.memory, 3).unwrap();
        let mut area = vec![0; (AREA.end - AREA.start) as usize];
        ram.memory.read_slice(&mut area, GuestAddress(AREA.start)).unwrap();
        // As a kernel does: a signature at a multiple of 16, and both sums.
        let at = area.chunks(16).position(|line| line.starts_with(b"_MP_")).unwrap() * 16;
        assert_eq!(remainder(&area[at..at + 16]), 0);
        let table = u32::from_le_bytes(area[at + 4..at + 8].try_into().unwrap()) as usize - AREA.start as usize;
        let len = usize::from(u16::from_le_bytes(area[table + 4..table + 6].try_into().unwrap()));
        let table = &area[table..table + len];
        assert_eq!((&table[..4], remainder(table)), (&b"PCMP"[..], 0));
        let mut count = [0; 5];
        let mut interrupts = Vec::new();
        let mut rest = &table[HEADER_LEN..];
        while let Some(kind) = rest.first() {
            count[usize::from(*kind)] += 1;
            if let [3, _, _, _, bus, from, 3, to, ..] = rest {
                interrupts.push((*bus, *from, *to));
            }
            rest = &rest[if *kind == 0 { 20 } else { 8 }..];
        }
        assert_eq!(count, [3, 2, 1, 22 + 31, 2]);
        // Serial port, a window of virtio-mmio, and slots 3 and 4; nothing else is on their pins.
        assert!(
            [(ISA, 4, 4), (ISA, 23, 23), (PCI, 3 << 2, 11), (PCI, 4 << 2, 10)].iter().all(|i| interrupts.contains(i))
        );
        assert!(interrupts.iter().all(|(bus, _, to)| (*bus == PCI) == [10, 11].contains(to)));
        assert_eq!(u16::from_le_bytes(table[34..36].try_into().unwrap()), count.iter().sum::<u16>());
    }
}
