//! Guest RAM, always a file in memory, and the map of the guest's physical addresses.
//!
//! ```text
//! 0            low RAM, up to 3 GiB (what `boot::start`, `acpi` and `mp_table` write lies in its first MiB)
//! 3 GiB        boot timer, where there is one
//! 3 GiB + 4K   windows of virtio-mmio, 64 KiB, for a kernel that is booted directly
//! 3 GiB + 1M   window for 32-bit BARs, 511 MiB
//! 3.5 GiB      ECAM, 1 MiB per bus
//! 4 GiB - 20M  I/O APIC, local APICs, Intel's identity map and task segment
//! up to 4 GiB  firmware, where there is any
//! 4 GiB        RAM beyond 3 GiB
//! above        region for memory that is added later, if there is one
//! above        files as persistent memory, if there are any
//! above        window for 64-bit BARs, 16 GiB
//! above        room for files that come while the VM runs
//! above        nothing, up to the last address
//! ```
//! Firmware chooses places for BARs itself, by rules that change with its version. With it BARs may be wherever nothing else
//! is: see [`layout::MMIO32_FIRMWARE`] and [`Above::rest`]. So may they where the guest puts them itself and shall not believe
//! what it is told of windows. That is why the room for files is not the lowest: there Linux puts BARs then.

mod absent;
mod file;
mod room;

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use bedplate_devices::Memory;
use rustix::mm::{Advice, madvise};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

pub use absent::Absent;
pub use room::Room;

/// Fixed addresses.
pub mod layout {
    /// Where RAM ends below 4 GiB, at most.
    pub const LOW_RAM_END: u64 = 0xc000_0000;
    /// The boot timer: where Firecracker has it.
    pub const BOOT_TIMER: u64 = LOW_RAM_END;
    /// Windows of virtio devices for a guest without PCI: where Firecracker has them.
    pub const VIRTIO: u64 = LOW_RAM_END + (1 << 12);
    /// Window for 32-bit BARs.
    pub const MMIO32: std::ops::Range<u64> = LOW_RAM_END + (1 << 20)..ECAM;
    /// PCI configuration space.
    pub const ECAM: u64 = 0xe000_0000;
    /// Where 32-bit BARs may be with firmware: what lies between ECAM and I/O APIC, too.
    pub const MMIO32_FIRMWARE: [std::ops::Range<u64>; 2] = [MMIO32, ECAM + (1 << 20)..IO_APIC as u64];
    /// I/O APIC.
    pub const IO_APIC: u32 = 0xfec0_0000;
    /// Local APICs.
    pub const LOCAL_APIC: u32 = 0xfee0_0000;
    /// One page for Intel's real-mode emulation.
    pub const IDENTITY_MAP: u64 = 0xfeff_c000;
    /// Three pages for the same.
    pub const TSS: u64 = 0xfeff_d000;
    /// Where firmware ends: its last 16 bytes are where a processor begins.
    pub const FIRMWARE_END: u64 = HIGH_RAM;
    /// Where RAM goes on.
    pub const HIGH_RAM: u64 = 1 << 32;
    /// Alignment of the region for memory that is added: Linux adds no less than 128 MiB at once, and 2 GiB on large
    /// machines.
    pub const HOTPLUG_ALIGN: u64 = 1 << 31;
    /// Alignment of other memory above all that: a section of Linux on x86, so that no two kinds of memory share one.
    pub const SECTION: u64 = 1 << 27;
    /// Size of the window for 64-bit BARs, and its alignment.
    pub const MMIO64_LEN: u64 = 1 << 34;
    /// Its alignment with firmware, which may want one that lies as low as it can.
    pub const MMIO64_ALIGN_FIRMWARE: u64 = 1 << 30;
    /// Size of the room for files that come while the VM runs, at most: 17 GiB for each slot of the bus.
    pub const ROOM_LEN: u64 = 1 << 39;
    /// RAM below this belongs to the PC's own: interrupt table, our boot structures, the EBDA, option ROMs.
    pub const FIRST_MIB: u64 = 1 << 20;
    /// Where the EBDA would begin: the end of conventional memory.
    pub const EBDA: u64 = 0x9_fc00;
}

/// Bits of the longest address of a processor.
const MAX_BITS: u8 = 52;
/// The smallest BAR's.
const PAGE: u64 = 4096;

/// Why RAM cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host has less.
    #[error("{asked_mib} MiB of guest memory are more than this host has ({host_mib} MiB): ask for less")]
    BeyondHost {
        /// As asked.
        asked_mib: u64,
        /// All RAM of the host.
        host_mib: u64,
    },
    /// The host refuses.
    #[error("{asked_mib} MiB of guest memory cannot be had: {source}; free some memory or ask for less")]
    Refused {
        /// As asked.
        asked_mib: u64,
        /// Its reason.
        source: std::io::Error,
    },
    /// The host has not put enough huge pages aside.
    #[error(
        "{asked_mib} MiB of guest memory in huge pages of 2 MiB cannot be had: {source}; put aside {} of them \
         (/proc/sys/vm/nr_hugepages), or leave huge_pages out",
        asked_mib / 2
    )]
    HugePages {
        /// As asked.
        asked_mib: u64,
        /// Its reason.
        source: std::io::Error,
    },
    /// The processor cannot address so much.
    #[error(
        "{asked_mib} MiB of guest memory, files in it and the window for devices do not fit into {bits} address bits: ask \
         for less"
    )]
    Unaddressable {
        /// All memory that was placed.
        asked_mib: u64,
        /// Of a guest-physical address.
        bits: u8,
    },
    /// Too many or too large files have come.
    #[error(
        "no room for {asked_mib} MiB in the guest's address space: {free_mib} MiB are the most that a file can have that comes \
         while the VM runs; remove another one, or configure it before the start"
    )]
    NoRoom {
        /// As asked.
        asked_mib: u64,
        /// The longest place that is free.
        free_mib: u64,
    },
}

/// What pages of the host RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pages {
    /// As the host gives memory to programs that do not ask: 2 MiB or 4 KiB.
    #[default]
    Host,
    /// 4 KiB.
    Normal,
    /// 2 MiB where the host has some to spare.
    Transparent,
    /// 2 MiB, put aside by the host for this.
    Huge,
}

/// Who else gets RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// Nobody.
    #[default]
    Nobody,
    /// Backends of devices, other processes. They can change what is in it, and not how long it is: one that made it shorter
    /// would have every touch of the rest be a signal for us.
    Backends,
}

/// RAM of one VM.
pub struct Ram {
    /// Mapped.
    pub memory: Memory,
    /// Behind the mapping, all of it in order of guest address.
    pub file: Arc<File>,
    len: u64,
    sharing: Sharing,
    hotplug: Option<Range<u64>>,
    /// Where what was reserved beyond that ends.
    reserved_end: u64,
}

/// The addresses above all memory, from bottom to top.
pub struct Above {
    /// What is left over below the window.
    pub gap: Range<u64>,
    /// The window for 64-bit BARs.
    pub mmio64: Range<u64>,
    /// For files that come while the VM runs. No BAR is ever there.
    pub room: Range<u64>,
    /// The rest, to the last address.
    pub rest: Range<u64>,
}

impl Ram {
    /// `mib` MiB of zeros, shared with nobody.
    ///
    /// # Errors
    /// The host has less, or refuses.
    pub fn new(mib: u64, pages: Pages) -> Result<Self, MemoryError> {
        Self::with_sharing(mib, pages, Sharing::Nobody)
    }

    /// `mib` MiB of zeros. Pages are taken from the host when they are first touched; huge ones are reserved here, so
    /// that the host cannot run out of them later, which would kill the process.
    ///
    /// # Errors
    /// The host has less, or refuses.
    pub fn with_sharing(mib: u64, pages: Pages, sharing: Sharing) -> Result<Self, MemoryError> {
        let host_mib = host_mib();
        if mib > host_mib {
            return Err(MemoryError::BeyondHost { asked_mib: mib, host_mib });
        }
        let refused = |source| match pages {
            Pages::Huge => MemoryError::HugePages { asked_mib: mib, source },
            Pages::Host | Pages::Normal | Pages::Transparent => MemoryError::Refused { asked_mib: mib, source },
        };
        let mmap_flags = match pages {
            Pages::Huge => libc::MAP_SHARED,
            Pages::Host | Pages::Normal | Pages::Transparent => libc::MAP_SHARED | libc::MAP_NORESERVE,
        };
        // Cannot overflow: the host has that much.
        let len = mib << 20;
        let pages = if pages == Pages::Host { file::host_gives() } else { pages };
        let file = Arc::new(file::create(len, pages, sharing).map_err(refused)?);
        let mut offset = 0;
        let mut regions = Vec::with_capacity(2);
        for (start, end) in ram_ranges(len) {
            let region = MmapRegionBuilder::new((end - start) as usize)
                .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(mmap_flags)
                .build();
            let region = region.map_err(|e| refused(why(e)))?;
            let region = GuestRegionMmap::new(region, GuestAddress(start));
            regions.extend(region);
            offset += end - start;
        }
        let memory = GuestMemoryMmap::from_regions(regions);
        let memory = memory.map_err(|e| refused(std::io::Error::other(e.to_string())))?;
        if pages == Pages::Transparent {
            advise_huge(&memory);
        }
        Ok(Self { memory: Arc::new(memory), file, len, sharing, hotplug: None, reserved_end: 0 })
    }

    /// Adds a region of `mib` MiB of normal pages, in a memfd of its own, that is not RAM for the guest until a device
    /// says so.
    ///
    /// # Errors
    /// The host has less, or refuses.
    pub fn with_hotplug(mut self, mib: u64) -> Result<Self, MemoryError> {
        let host_mib = host_mib();
        if mib > host_mib {
            return Err(MemoryError::BeyondHost { asked_mib: mib, host_mib });
        }
        let refused = |source: std::io::Error| MemoryError::Refused { asked_mib: mib, source };
        let other = |error: &dyn std::fmt::Display| refused(std::io::Error::other(error.to_string()));
        let (start, len) = (self.end().next_multiple_of(layout::HOTPLUG_ALIGN), mib << 20);
        let memfd = file::create(len, Pages::Normal, self.sharing).map_err(refused)?;
        let mapping = MmapRegion::from_file(FileOffset::new(memfd, 0), len as usize).map_err(|e| other(&e))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start))
            .ok_or_else(|| other(&"the region reaches past the end of all addresses"))?;
        self.memory = Arc::new(self.memory.insert_region(Arc::new(region)).map_err(|e| other(&e))?);
        self.hotplug = Some(start..start + len);
        Ok(self)
    }

    /// Has `parts` of what lies below 4 GiB be filled later. They are whole pages, and nobody has touched them.
    ///
    /// # Errors
    /// The kernel cannot do it, or others have this memory: their touch would not wait.
    pub fn without(&self, parts: &[Range<u64>]) -> std::io::Result<Absent> {
        if self.sharing != Sharing::Nobody {
            return Err(std::io::ErrorKind::Unsupported.into());
        }
        let low = self.memory.iter().next().ok_or(std::io::ErrorKind::Unsupported)?;
        Absent::new(low.as_ptr() as usize, &self.file, self.low_end() as usize, parts)
    }

    /// A place for `len` bytes of memory of another kind, above all that there is.
    ///
    /// # Errors
    /// No processor can address it.
    pub fn reserve(&mut self, len: u64) -> Result<Range<u64>, MemoryError> {
        let start = self.last_end().next_multiple_of(layout::SECTION);
        let end = start.checked_add(len).filter(|end| *end <= 1 << MAX_BITS);
        let bits = MAX_BITS;
        let end = end.ok_or(MemoryError::Unaddressable { asked_mib: start.saturating_add(len) >> 20, bits })?;
        // What is taken away again leaves whole sections ([`Room::give`]).
        self.reserved_end = end.next_multiple_of(layout::SECTION);
        Ok(start..end)
    }

    /// The region for memory that is added later.
    pub fn hotplug(&self) -> Option<Range<u64>> {
        self.hotplug.clone()
    }

    /// Where RAM ends, and everything below 4 GiB.
    fn end(&self) -> u64 {
        self.ranges().last().map_or(0, |(_, end)| end).max(layout::HIGH_RAM)
    }

    /// Guest-physical ranges of RAM, low first.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        ram_ranges(self.len)
    }

    /// Where RAM below 4 GiB ends.
    pub fn low_end(&self) -> u64 {
        self.len.min(layout::LOW_RAM_END)
    }

    /// Which address below 4 GiB the guest has for `pointer`, if it leads there.
    pub fn low_address(&self, pointer: *const u8) -> Option<u64> {
        let low = self.memory.iter().next()?;
        let address = (pointer as usize).checked_sub(low.as_ptr() as usize)? as u64;
        (address < self.low_end()).then_some(address)
    }

    /// What lies above all memory, for a processor of `bits` address bits. The window for BARs is at a multiple of `align`.
    ///
    /// # Errors
    /// There is no room for the window.
    pub fn above(&self, bits: u8, align: u64) -> Result<Above, MemoryError> {
        let (memory_end, end) = (self.last_end(), 1u64 << bits.min(MAX_BITS));
        let start = memory_end.next_multiple_of(align);
        let mmio64 = start..start + layout::MMIO64_LEN;
        let Some(left) = end.checked_sub(mmio64.end) else {
            return Err(MemoryError::Unaddressable { asked_mib: memory_end >> 20, bits });
        };
        // Half of what is left at most: newer firmware puts BARs at the very top.
        let room_len = (left / 2).min(layout::ROOM_LEN) / layout::SECTION * layout::SECTION;
        let room = mmio64.end..mmio64.end + room_len;
        Ok(Above { gap: memory_end.next_multiple_of(PAGE)..mmio64.start, rest: room.end..end, mmio64, room })
    }

    /// Where all memory ends, also what may be added.
    fn last_end(&self) -> u64 {
        self.hotplug.as_ref().map_or_else(|| self.end(), |region| region.end).max(self.reserved_end)
    }
}

/// The host's own words, where a mapping failed in it.
fn why(error: MmapRegionError) -> std::io::Error {
    match error {
        MmapRegionError::Mmap(error) => error,
        other => std::io::Error::other(other.to_string()),
    }
}

fn advise_huge(memory: &GuestMemoryMmap) {
    for region in memory.iter() {
        let len = region.len() as usize;
        // SAFETY: the mapping is as long as its region says; advice on huge pages changes no content.
        // Refused where the kernel has no transparent huge pages: then the normal ones are what is meant.
        let _ = unsafe { madvise(region.as_ptr().cast(), len, Advice::LinuxHugepage) };
    }
}

fn ram_ranges(len: u64) -> impl Iterator<Item = (u64, u64)> {
    let low = len.min(layout::LOW_RAM_END);
    [(0, low), (layout::HIGH_RAM, layout::HIGH_RAM + (len - low))].into_iter().filter(|(start, end)| end > start)
}

fn host_mib() -> u64 {
    let info = rustix::system::sysinfo();
    u64::from(info.mem_unit).saturating_mul(info.totalram) >> 20
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn ram_splits_around_the_hole_and_the_windows_lie_outside_of_it() {
        assert_eq!(ram_ranges(1 << 30).collect::<Vec<_>>(), [(0, 1 << 30)]);
        assert_eq!(ram_ranges(3 << 30).collect::<Vec<_>>(), [(0, 3 << 30)]);
        assert_eq!(ram_ranges(5 << 30).collect::<Vec<_>>(), [(0, 3 << 30), (4 << 30, 6 << 30)]);
    }

    #[test]
    fn above_memory_are_bars_then_files_and_nothing_is_lost() {
        const GIB: u64 = 1 << 30;
        let ram = Ram::new(16, Pages::Normal).unwrap();
        let above = |bits, align| ram.above(bits, align).unwrap();
        for (bits, align, room) in [
            (40, layout::MMIO64_LEN, 32 * GIB..528 * GIB),
            (36, layout::MMIO64_LEN, 32 * GIB..48 * GIB),
            (52, layout::MMIO64_LEN, 32 * GIB..544 * GIB),
            (35, layout::MMIO64_LEN, 32 * GIB..32 * GIB),
            (36, layout::MMIO64_ALIGN_FIRMWARE, 20 * GIB..42 * GIB),
        ] {
            let Above { gap, mmio64, room: found, rest } = above(bits, align);
            assert_eq!(found, room, "{bits} {align:#x}");
            assert_eq!((gap.start, gap.end, mmio64.end), (4 * GIB, mmio64.start, room.start));
            assert_eq!(rest, room.end..1 << bits);
        }
    }

    #[test]
    fn more_than_the_host_has_is_refused_by_name() {
        let error = Ram::new(host_mib() + 1, Pages::Normal).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("more than this host has"), "{error}");
        assert!(Ram::new(u64::MAX, Pages::Normal).is_err());
    }

    #[test]
    fn nobody_makes_memory_shorter_that_is_shared() {
        for pages in [Pages::Host, Pages::Normal, Pages::Transparent] {
            let ram = Ram::with_sharing(16, pages, Sharing::Backends).unwrap().with_hotplug(128).unwrap();
            for region in ram.memory.iter() {
                let file = region.file_offset().unwrap().file();
                for len in [0, 4096, 1 << 30] {
                    let error = file.set_len(len).unwrap_err();
                    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{pages:?}, {len}");
                }
                // Nor forbids us to change it, which is a seal, too.
                assert!(rustix::fs::fcntl_add_seals(file, rustix::fs::SealFlags::FUTURE_WRITE).is_err());
            }
            ram.memory.write_slice(b"hello", GuestAddress(0x1234)).unwrap();
        }
    }

    #[test]
    fn ram_is_the_file() {
        use std::os::unix::fs::FileExt;
        let ram = Ram::new(16, Pages::Transparent).unwrap();
        ram.memory.write_slice(b"hello", GuestAddress(0x1234)).unwrap();
        let mut bytes = [0; 5];
        ram.file.read_exact_at(&mut bytes, 0x1234).unwrap();
        assert_eq!(&bytes, b"hello");
        assert!(!ram.memory.address_in_range(GuestAddress(16 << 20)));
        for align in [layout::MMIO64_LEN, layout::MMIO64_ALIGN_FIRMWARE] {
            assert!(matches!(ram.above(34, align), Err(MemoryError::Unaddressable { .. })));
            assert!(ram.above(20, align).is_err());
        }

        let more = ram.with_hotplug(128).unwrap();
        let region = more.hotplug().unwrap();
        assert_eq!((region.start, region.end), (1 << 32, (1 << 32) + (128 << 20)));
        assert!(more.memory.address_in_range(GuestAddress(region.end - 1)));
        assert!(!more.memory.address_in_range(GuestAddress(region.end)));
        assert_eq!(more.ranges().collect::<Vec<_>>(), [(0, 16 << 20)], "it is no RAM");
        let above = more.above(40, layout::MMIO64_LEN).unwrap();
        assert!(above.mmio64.start >= region.end);
        assert_eq!(above.gap.start, region.end, "no GiB is lost");
        let mut more = more;
        let (one, two) = (more.reserve(2 << 20).unwrap(), more.reserve(300 << 20).unwrap());
        assert!(one.start >= region.end && two.start >= one.end && two.start.is_multiple_of(layout::SECTION));
        assert_eq!(two.end - two.start, 300 << 20);
        let above = more.above(40, layout::MMIO64_ALIGN_FIRMWARE).unwrap();
        assert!(above.gap.start >= two.end && above.gap.start.is_multiple_of(layout::SECTION));
        assert!(matches!(more.reserve(1 << 52), Err(MemoryError::Unaddressable { bits: 52, .. })));
        assert!(more.reserve(u64::MAX).is_err());
    }
}
