//! What the machine is called, for systems that ask (SMBIOS 3.0, DSP0134): structures without a firmware's own, which
//! firmware adds, and the entry point that it completes with their address.

use crate::memory::Ram;

const MAKER: &str = "Bedplate";
const PRODUCT: &str = "Bedplate VM";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Numbers of the structures that others name.
const MEMORY_ARRAY: u16 = 0x1000;
/// There is none, in several fields.
const NO_HANDLE: u16 = 0xffff;
const NO_ERROR_HANDLE: u16 = 0xfffe;
/// A size that stands in the longer field beside it.
const SEE_EXTENDED_MIB: u16 = 0x7fff;
const SEE_EXTENDED_KIB: u32 = 0x8000_0000;
const SEE_EXTENDED_ADDRESS: u32 = 0xffff_ffff;

/// A structure: its formatted part after the header, and its strings, which that names by their number from 1 on.
fn put(table: &mut Vec<u8>, kind: u8, handle: u16, fields: &[&[u8]], strings: &[&str]) {
    let body = fields.concat();
    // At most 48 in all uses.
    table.extend([kind, 4 + body.len() as u8]);
    table.extend(handle.to_le_bytes());
    table.extend(body);
    for string in strings {
        table.extend(string.bytes());
        table.push(0);
    }
    // An empty list ends as well with two zeros.
    table.extend(&[0; 2][..if strings.is_empty() { 2 } else { 1 }]);
}

/// All structures.
pub(super) fn structures(vcpus: u8, ram: &Ram) -> Vec<u8> {
    const UNKNOWN: u8 = 2;
    const SAFE: u8 = 3;
    let mut table = Vec::new();
    // System: maker, product, version, serial number, UUID (absent), woken by its power switch, SKU, family.
    put(&mut table, 1, 0x100, &[&[1, 2, 3, 0], &[0; 16], &[6, 0, 0]], &[MAKER, PRODUCT, VERSION]);
    // Enclosure: maker, of another kind, version and two numbers, three states, security, OEM, height, cords, contents, SKU.
    put(&mut table, 3, 0x300, &[&[1, 1, 2, 0, 0, SAFE, SAFE, SAFE, UNKNOWN], &[0; 4], &[0; 5]], &[MAKER, VERSION]);
    processor(&mut table, vcpus);
    memory(&mut table, ram);
    // How the last start went: well.
    put(&mut table, 32, 0x2000, &[&[0; 7]], &[]);
    put(&mut table, 127, 0x7f00, &[], &[]);
    table
}

/// One package, with the vCPUs in it.
fn processor(table: &mut Vec<u8>, vcpus: u8) {
    const CENTRAL: u8 = 3;
    const OTHER: u8 = 1;
    const POPULATED_AND_ENABLED: u8 = 0x41;
    const RUNS_64_BIT_CODE: u16 = 1 << 2;
    let caches = NO_HANDLE.to_le_bytes().repeat(3);
    let counts = u16::from(vcpus).to_le_bytes().repeat(3);
    let fields: [&[u8]; 8] = [
        // Socket, type, family, maker; id; version, voltage; clock and speeds, unknown.
        &[1, CENTRAL, OTHER, 2],
        &[0; 8],
        &[0, 0, 0, 0, 0, 0, 0, 0],
        &[POPULATED_AND_ENABLED, OTHER],
        &caches,
        // Serial number, tag, part; cores, enabled cores, threads.
        &[0, 0, 0, vcpus, vcpus, vcpus],
        &[RUNS_64_BIT_CODE as u8, 0, OTHER, 0],
        &counts,
    ];
    put(table, 4, 0x400, &fields, &["CPU 0", MAKER]);
}

/// One array with one module in it, and the addresses that it has.
fn memory(table: &mut Vec<u8>, ram: &Ram) {
    const ON_BOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const NO_CORRECTION: u8 = 3;
    const DIMM: u8 = 9;
    const KIND_RAM: u8 = 7;
    const OTHER: u16 = 1 << 1;
    let bytes: u64 = ram.ranges().map(|(start, end)| end - start).sum();
    let kib = u32::try_from(bytes >> 10).ok().filter(|kib| *kib < SEE_EXTENDED_KIB);
    let array: [&[u8]; 5] = [
        &[ON_BOARD, SYSTEM_MEMORY, NO_CORRECTION],
        &kib.unwrap_or(SEE_EXTENDED_KIB).to_le_bytes(),
        &NO_ERROR_HANDLE.to_le_bytes(),
        &1u16.to_le_bytes(),
        &if kib.is_some() { 0 } else { bytes }.to_le_bytes(),
    ];
    put(table, 16, MEMORY_ARRAY, &array, &[]);
    let mib = u16::try_from(bytes >> 20).ok().filter(|mib| *mib < SEE_EXTENDED_MIB);
    let module: [&[u8]; 9] = [
        &MEMORY_ARRAY.to_le_bytes(),
        &NO_ERROR_HANDLE.to_le_bytes(),
        // Widths are unknown.
        &[0xff; 4],
        &mib.unwrap_or(SEE_EXTENDED_MIB).to_le_bytes(),
        &[DIMM, 0, 1, 0, KIND_RAM],
        &OTHER.to_le_bytes(),
        // Speed, unknown; maker and three numbers; rank.
        &[0, 0, 2, 0, 0, 0, 0],
        // A TiB at most has a number of MiB that fits.
        &if mib.is_some() { 0 } else { (bytes >> 20) as u32 }.to_le_bytes(),
        // Speed and voltages, unknown.
        &[0; 8],
    ];
    put(table, 17, 0x1100, &module, &["DIMM 0", MAKER]);
    for ((start, end), number) in ram.ranges().zip(0..) {
        let last = end - 1;
        let low = u32::try_from(last >> 10).ok().filter(|low| *low < SEE_EXTENDED_ADDRESS);
        let short = low.map(|low| ((start >> 10) as u32, low)).unwrap_or((SEE_EXTENDED_ADDRESS, SEE_EXTENDED_ADDRESS));
        let long = if low.is_some() { (0, 0) } else { (start, last) };
        let mapped: [&[u8]; 6] = [
            &short.0.to_le_bytes(),
            &short.1.to_le_bytes(),
            &MEMORY_ARRAY.to_le_bytes(),
            &[1],
            &long.0.to_le_bytes(),
            &long.1.to_le_bytes(),
        ];
        put(table, 19, 0x1300 + number, &mapped, &[]);
    }
}

/// The entry point for `structures`, without address and sum.
pub(super) fn entry_point(structures: &[u8]) -> Vec<u8> {
    const LEN: u8 = 24;
    let mut bytes = b"_SM3_".to_vec();
    // Sum; length; version 3.0 of the specification, 0 of its text; revision 1 of this.
    bytes.extend([0, LEN, 3, 0, 0, 1, 0]);
    bytes.extend((structures.len() as u32).to_le_bytes());
    bytes.extend([0; 8]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Pages;

    #[test]
    fn structures_have_the_lengths_of_their_version_and_can_be_walked() {
        let table = structures(5, &Ram::new(64, Pages::Normal).unwrap());
        let (mut seen, mut rest) = (Vec::new(), &table[..]);
        while let [kind, len, ..] = rest {
            let strings = &rest[usize::from(*len)..];
            let end = strings.windows(2).position(|two| two == [0, 0]).unwrap() + 2;
            if *kind == 1 {
                assert!(strings.starts_with(b"Bedplate\0Bedplate VM\0"));
            }
            seen.push((*kind, *len));
            rest = &strings[end..];
        }
        assert_eq!(seen, [(1, 27), (3, 22), (4, 48), (16, 23), (17, 40), (19, 31), (32, 11), (127, 4)]);
        let entry = entry_point(&table);
        assert_eq!((entry.len(), &entry[..5]), (24, &b"_SM3_"[..]));
        assert_eq!(u32::from_le_bytes(entry[12..16].try_into().unwrap()) as usize, table.len());
    }
}
