//! Where on a disk the file systems are.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use bedplate_api::image::Firmware;
use gpt::disk::LogicalBlockSize;

use super::Shared;
use super::mbr::{self, Mbr, SECTOR};
use crate::import::ImportError;

/// Entries that a GPT may have here; usual are 128.
const MAX_GPT_ENTRIES: u32 = 1024;

/// Bytes that reading a partition table may take, however strange it is.
const TABLE_BUDGET: u64 = 16 << 20;

/// A part of the disk that may hold a file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Number of the partition; `None` for the whole disk.
    pub(crate) number: Option<u32>,
    /// First byte.
    pub(crate) start: u64,
    /// Length in bytes.
    pub(crate) len: u64,
    /// What Linux calls it by.
    pub(crate) partuuid: Option<String>,
}

/// A disk's partitions, or the whole disk as one.
#[derive(Debug)]
pub(crate) struct Layout {
    /// "GPT", "MBR partition table", "no partition table".
    pub(crate) name: &'static str,
    pub(crate) extents: Vec<Extent>,
    /// Which firmware finds a boot loader on it, by what is in its first sector and its partitions' types.
    pub(crate) firmware: Option<Firmware>,
}

/// Reads the partition table of `source`. A table that speaks of more than there is means that the file `path` was cut off.
pub(crate) fn read(source: &Shared, path: &Path) -> Result<Layout, ImportError> {
    let size = source.borrow().size();
    let first = sector(source, 0)?;
    let (name, extents, esp) = match read_gpt(source)? {
        Some((extents, esp)) => ("GPT", extents, esp),
        None => match read_mbr(source)? {
            Some(extents) => ("MBR partition table", extents, mbr::has_esp(&first)),
            None => ("no partition table", vec![Extent { number: None, start: 0, len: size, partuuid: None }], false),
        },
    };
    let firmware = match (mbr::has_code(&first), esp) {
        (true, true) => Some(Firmware::Either),
        (true, false) => Some(Firmware::Bios),
        (false, true) => Some(Firmware::Uefi),
        (false, false) => None,
    };
    let layout = Layout { name, extents, firmware };
    for extent in &layout.extents {
        let end = extent.start.saturating_add(extent.len);
        if end > size {
            let what = format!("partition {}", extent.number.unwrap_or(0));
            return Err(ImportError::Truncated { path: path.to_owned(), what, end, size });
        }
    }
    Ok(layout)
}

fn sector(source: &Shared, number: u64) -> Result<[u8; SECTOR], ImportError> {
    let mut bytes = [0; SECTOR];
    let mut source = source.borrow_mut();
    match number.checked_mul(SECTOR as u64) {
        // What lies behind the end reads as zeros: no table.
        Some(at) if at.checked_add(SECTOR as u64).is_some_and(|end| end <= source.size()) => {
            source.read_at(&mut bytes, at)?;
        }
        _ => {}
    }
    Ok(bytes)
}

fn read_mbr(source: &Shared) -> Result<Option<Vec<Extent>>, ImportError> {
    let Some(mut mbr) = Mbr::parse(&sector(source, 0)?) else { return Ok(None) };
    mbr.follow(|number| sector(source, number))?;
    let extent = |entry: &super::mbr::Entry| Extent {
        number: Some(entry.number),
        // Sums of 32-bit numbers of sectors.
        start: entry.start * SECTOR as u64,
        len: entry.sectors * SECTOR as u64,
        partuuid: Some(format!("{:08x}-{:02x}", mbr.signature, entry.number)),
    };
    Ok(Some(mbr.entries.iter().map(extent).collect()))
}

/// The partitions of a GPT, and whether one of them is an EFI system partition.
fn read_gpt(source: &Shared) -> Result<Option<(Vec<Extent>, bool)>, ImportError> {
    for block in [LogicalBlockSize::Lb512, LogicalBlockSize::Lb4096] {
        if !plausible_gpt(source, block)? {
            continue;
        }
        let device = Device { source: source.clone(), at: 0, budget: TABLE_BUDGET };
        let Ok(disk) = gpt::GptConfig::new().writable(false).logical_block_size(block).open_from_device(device) else {
            continue;
        };
        let (mut extents, mut esp) = (Vec::new(), false);
        for (number, partition) in disk.partitions() {
            // Entries that end before they begin are nobody's partition.
            if let (Ok(start), Ok(len)) = (partition.bytes_start(block), partition.bytes_len(block))
                && len > 0
            {
                esp |= partition.part_type_guid == gpt::partition_types::EFI;
                let partuuid = Some(partition.part_guid.to_string());
                extents.push(Extent { number: Some(*number), start, len, partuuid });
            }
        }
        return Ok(Some((extents, esp)));
    }
    Ok(None)
}

/// Looks at both headers before the library does, which trusts them: it would allocate what they ask for.
fn plausible_gpt(source: &Shared, block: LogicalBlockSize) -> Result<bool, ImportError> {
    let block = u64::from(block);
    let size = source.borrow().size();
    let mut found = false;
    for at in [Some(block), size.checked_sub(block)].into_iter().flatten() {
        // Sizes are whole sectors, and so are both kinds of blocks.
        let header = sector(source, at / SECTOR as u64)?;
        if header.starts_with(b"EFI PART") {
            let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let (entries, entry_len) = (u32_at(80), u32_at(84));
            if entries > MAX_GPT_ENTRIES || entry_len != 128 {
                return Ok(false);
            }
            found = true;
        }
    }
    Ok(found)
}

/// The disk as the library wants it. It reads no more than its budget, so that no table can keep it busy.
struct Device {
    source: Shared,
    at: u64,
    budget: u64,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("at", &self.at).finish_non_exhaustive()
    }
}

impl Read for Device {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut source = self.source.borrow_mut();
        let left = source.size().saturating_sub(self.at).min(bytes.len() as u64);
        self.budget = self.budget.checked_sub(left).ok_or_else(|| io::Error::other("too much to read"))?;
        // No more than bytes.len().
        let now = &mut bytes[..left as usize];
        source.read_at(now, self.at).map_err(|e| io::Error::other(e.to_string()))?;
        self.at += left;
        Ok(now.len())
    }
}

impl Seek for Device {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.source.borrow().size().checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// Demanded by the library's trait; it is told to open the disk for reading.
impl Write for Device {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
