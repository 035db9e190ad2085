//! How firmware is told to put the ACPI tables into RAM: a script of commands of 128 bytes (QEMU's table loader). It
//! allocates each file, adds addresses where tables name each other, and corrects the sums that this made wrong.

use crate::acpi::{ALIGNMENT, ROOT_LINK, ROOT_SUM, SUM_OFFSET, Tables};

/// The script.
pub(super) const SCRIPT: &str = "etc/table-loader";
/// The root pointer, which must lie where systems look for it.
pub(super) const ROOT: &str = "etc/acpi/rsdp";
/// All tables.
pub(super) const TABLES: &str = "etc/acpi/tables";

const COMMAND_LEN: usize = 128;
const NAME_LEN: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Anywhere below 4 GiB.
const ZONE_HIGH: u8 = 1;
/// Between 0xf0000 and 1 MiB.
const ZONE_F_SEGMENT: u8 = 2;

#[derive(Default)]
struct Script(Vec<u8>);

impl Script {
    fn command(&mut self, kind: u32, fields: &[&[u8]]) {
        let end = self.0.len() + COMMAND_LEN;
        self.0.extend(kind.to_le_bytes());
        fields.iter().for_each(|field| self.0.extend(*field));
        self.0.resize(end, 0);
    }

    fn allocate(&mut self, file: &str, align: u32, zone: u8) {
        self.command(ALLOCATE, &[&name(file), &align.to_le_bytes(), &[zone]]);
    }

    /// Adds the address of [`TABLES`] to `len` bytes at `offset` of `file`.
    fn add_address(&mut self, file: &str, offset: u32, len: u8) {
        self.command(ADD_POINTER, &[&name(file), &name(TABLES), &offset.to_le_bytes(), &[len]]);
    }

    /// Makes the sum over `len` bytes from `start` zero again, by the byte at `at`.
    fn sum(&mut self, file: &str, at: u32, start: u32, len: u32) {
        self.command(ADD_CHECKSUM, &[&name(file), &at.to_le_bytes(), &start.to_le_bytes(), &len.to_le_bytes()]);
    }
}

/// A file's name as commands have it; those used here are short.
fn name(file: &str) -> [u8; NAME_LEN] {
    let mut field = [0; NAME_LEN];
    for (to, from) in field.iter_mut().zip(file.bytes()) {
        *to = from;
    }
    field
}

/// The script that places `tables`, which were made for address 0.
pub(super) fn script(tables: &Tables) -> Vec<u8> {
    let mut script = Script::default();
    // Offsets fit: all tables together have some KiB.
    script.allocate(ROOT, 16, ZONE_F_SEGMENT);
    script.allocate(TABLES, ALIGNMENT as u32, ZONE_HIGH);
    for (offset, len) in &tables.links {
        script.add_address(TABLES, *offset as u32, *len);
    }
    for table in &tables.summed {
        script.sum(TABLES, (table.start + SUM_OFFSET) as u32, table.start as u32, table.len() as u32);
    }
    script.add_address(ROOT, ROOT_LINK as u32, 8);
    script.sum(ROOT, ROOT_SUM as u32, 0, tables.root.len() as u32);
    script.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::Description;

    /// Does what firmware does, at this address.
    fn load(script: &[u8], tables: &Tables, base: u64) -> (Vec<u8>, Vec<u8>) {
        let (mut root, mut bytes) = (tables.root.clone(), tables.bytes.clone());
        for command in script.chunks(COMMAND_LEN) {
            let word = |at: usize| u32::from_le_bytes(command[at..at + 4].try_into().unwrap()) as usize;
            let file = if command[4..].starts_with(ROOT.as_bytes()) { &mut root } else { &mut bytes };
            match word(0) as u32 {
                ALLOCATE => assert!(word(60).is_power_of_two() && [1, 2].contains(&command[64])),
                ADD_POINTER => {
                    let (at, len) = (word(116), usize::from(command[120]));
                    let mut value = [0; 8];
                    value[..len].copy_from_slice(&file[at..at + len]);
                    let value = u64::from_le_bytes(value) + base;
                    file[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
                }
                ADD_CHECKSUM => {
                    let (at, start, len) = (word(60), word(64), word(68));
                    let sum = file[start..start + len].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                    file[at] = file[at].wrapping_sub(sum);
                }
                other => panic!("command {other}"),
            }
        }
        (root, bytes)
    }

    #[test]
    fn loaded_tables_are_those_that_were_made_for_their_address() {
        let description = Description {
            vcpus: 3,
            present: 2,
            mmio32: vec![0xc000_0000..0xd000_0000, 0xd000_0000..0xe000_0000],
            mmio64: vec![1 << 34..1 << 35, 1 << 38..1 << 39],
            timer: true,
            virtio: Vec::new(),
        };
        let tables = Tables::new(&description, 0);
        let script = script(&tables);
        assert_eq!(script.len() % COMMAND_LEN, 0);
        let base = 0x3ffe_1000;
        let there = Tables::new(&description, base);
        assert!(load(&script, &tables, base) == (there.root, there.bytes));
    }
}
