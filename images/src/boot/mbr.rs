//! The partition table of the PC, with its chain of logical partitions.

/// Logical partitions that are followed; Linux makes no more than this usable. A chain may be a loop.
const MAX_LOGICAL: u32 = 60;

/// Length of a table, and the unit in which it counts.
pub const SECTOR: usize = 512;

/// One partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// As Linux numbers it: 1 to 4 are primary, logical ones count from 5.
    pub number: u32,
    /// First sector.
    pub start: u64,
    /// Number of sectors.
    pub sectors: u64,
}

/// A table and the disk's signature, which is part of every PARTUUID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mbr {
    /// The disk's signature.
    pub signature: u32,
    /// Its partitions in the order of their numbers, extended ones left out.
    pub entries: Vec<Entry>,
    /// First sector of the extended partition.
    extended: Option<u64>,
    /// There is an entry of the type that stands for "see the GPT".
    pub protective: bool,
}

/// Type, first sector and number of sectors of the four entries.
type Raw = [(u8, u64, u64); 4];

fn raw_entries(sector: &[u8; SECTOR]) -> Option<Raw> {
    if sector[510..] != [0x55, 0xaa] {
        return None;
    }
    let mut raw = [(0, 0, 0); 4];
    for (entry, bytes) in raw.iter_mut().zip(sector[446..510].as_chunks::<16>().0) {
        // Boot code of a file system without a table has other values here.
        if bytes[0] & 0x7f != 0 {
            return None;
        }
        let u32_at =
            |at: usize| u64::from(u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        *entry = (bytes[4], u32_at(8), u32_at(12));
    }
    Some(raw)
}

/// Whether BIOS firmware would start what is in this first sector.
pub fn has_code(sector: &[u8; SECTOR]) -> bool {
    // A FAT file system has a jump over its fields here, and a message behind it, bootable or not.
    let fat = sector[54..].starts_with(b"FAT") || sector[82..].starts_with(b"FAT");
    sector[510..] == [0x55, 0xaa] && !fat && sector[..440].iter().any(|byte| *byte != 0)
}

/// Whether the table in this sector has an EFI system partition.
pub fn has_esp(sector: &[u8; SECTOR]) -> bool {
    raw_entries(sector).is_some_and(|entries| entries.iter().any(|(kind, ..)| *kind == 0xef))
}

const fn is_extended(kind: u8) -> bool {
    matches!(kind, 0x05 | 0x0f | 0x85)
}

impl Mbr {
    /// Reads the table in the first sector of a disk; `None` when there is none, or it has no partition.
    pub fn parse(sector: &[u8; SECTOR]) -> Option<Self> {
        // A FAT file system on the bare disk has the same mark at its end.
        if sector[54..].starts_with(b"FAT") || sector[82..].starts_with(b"FAT") {
            return None;
        }
        let signature = u32::from_le_bytes([sector[440], sector[441], sector[442], sector[443]]);
        let mut this = Self { signature, entries: Vec::new(), extended: None, protective: false };
        for (number, (kind, start, sectors)) in (1..).zip(raw_entries(sector)?) {
            match kind {
                0 => {}
                _ if sectors == 0 || start == 0 => {}
                0xee => this.protective = true,
                _ if is_extended(kind) => this.extended = this.extended.or(Some(start)),
                _ => this.entries.push(Entry { number, start, sectors }),
            }
        }
        (!this.entries.is_empty() || this.extended.is_some() || this.protective).then_some(this)
    }

    /// Follows the chain of logical partitions; `read` reads a sector. A broken chain ends there.
    pub fn follow<E>(&mut self, mut read: impl FnMut(u64) -> Result<[u8; SECTOR], E>) -> Result<(), E> {
        let Some(base) = self.extended else { return Ok(()) };
        let mut table = base;
        for number in 5..5 + MAX_LOGICAL {
            let Some(raw) = raw_entries(&read(table)?) else { break };
            // The partition is counted from its own table, the next table from the extended partition. Both are sums of
            // 32-bit numbers.
            let partition = raw.iter().find(|(kind, _, sectors)| *kind != 0 && !is_extended(*kind) && *sectors != 0);
            if let Some((_, start, sectors)) = partition {
                self.entries.push(Entry { number, start: table + start, sectors: *sectors });
            }
            match raw.iter().find(|(kind, start, _)| is_extended(*kind) && *start != 0) {
                Some((_, start, _)) => table = base + start,
                None => break,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: &[(u8, u32, u32)]) -> [u8; SECTOR] {
        let mut sector = [0; SECTOR];
        sector[440..444].copy_from_slice(&0x1234_abcd_u32.to_le_bytes());
        for (slot, (kind, start, sectors)) in entries.iter().enumerate() {
            let at = 446 + slot * 16;
            sector[at + 4] = *kind;
            sector[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
            sector[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
        }
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        sector
    }

    #[test]
    fn primary_and_logical_partitions() {
        let mut mbr = Mbr::parse(&table(&[(0x83, 2048, 100), (0x05, 4096, 9000)])).unwrap();
        assert_eq!(mbr.signature, 0x1234_abcd);
        mbr.follow(|sector| {
            Ok::<_, ()>(match sector {
                4096 => table(&[(0x83, 8, 50), (0x05, 1000, 60)]),
                5096 => table(&[(0x83, 8, 51)]),
                _ => unreachable!(),
            })
        })
        .unwrap();
        let found: Vec<_> = mbr.entries.iter().map(|e| (e.number, e.start, e.sectors)).collect();
        assert_eq!(found, [(1, 2048, 100), (5, 4104, 50), (6, 5104, 51)]);
    }

    #[test]
    fn a_chain_that_bites_its_tail_ends() {
        let mut mbr = Mbr::parse(&table(&[(0x05, 1, 9000)])).unwrap();
        mbr.follow(|_| Ok::<_, ()>(table(&[(0x83, 1, 1), (0x05, 1, 1)]))).unwrap();
        assert_eq!(mbr.entries.len(), 60);
    }

    #[test]
    fn what_is_no_table() {
        assert_eq!(Mbr::parse(&[0; SECTOR]), None);
        assert_eq!(Mbr::parse(&table(&[])), None);
        let mut fat = table(&[(0x83, 1, 1)]);
        fat[82..87].copy_from_slice(b"FAT32");
        assert_eq!(Mbr::parse(&fat), None);
        let mut code = table(&[(0x83, 1, 1)]);
        code[446] = 0x31;
        assert_eq!(Mbr::parse(&code), None);
    }

    proptest::proptest! {
        #[test]
        fn random_sectors_never_panic(bytes in proptest::collection::vec(0_u8.., SECTOR * 3), mark: bool) {
            let sector = |n: u64| {
                let mut sector = *bytes[n as usize % 3 * SECTOR..].first_chunk::<SECTOR>().unwrap();
                if mark {
                    sector[510..].copy_from_slice(&[0x55, 0xaa]);
                    for at in [446, 462, 478, 494] {
                        sector[at] &= 0x80;
                    }
                }
                sector
            };
            if let Some(mut mbr) = Mbr::parse(&sector(0)) {
                let _ = mbr.follow(|n| Ok::<_, ()>(sector(n)));
                assert!(mbr.entries.len() <= 64);
            }
        }
    }
}
