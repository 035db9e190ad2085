//! An uncompressed kernel.

use std::fs::File;
use std::path::Path;

use linux_loader::loader::Error as LoaderError;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, Error as ElfError, PvhBootCapability};
use vm_memory::{Address, GuestAddress};

use super::contents::{Contents, Noting};
use super::{BootError, LoadedKernel, Protocol, cmdline, no_room, params};
use crate::memory::Ram;
use crate::memory::layout::{FIRST_MIB, HIGH_RAM};

/// Loads the kernel that `source` of `contents` is.
pub(super) fn load(contents: &mut Contents, source: usize, ram: &Ram) -> Result<LoadedKernel, BootError> {
    let (file, path, len) = contents.file(source);
    check(file, path, len, ram)?;
    let path = path.to_owned();
    let damaged = |damage: String| BootError::Damaged { path: path.clone(), damage };
    let load = |file: &mut Noting<'_>| Elf::load(&*ram.memory, None, file, Some(GuestAddress(FIRST_MIB)));
    let loaded = contents.note(source, ram, load).map_err(|e| match e {
        LoaderError::Elf(ElfError::ReadKernelImage) => damaged("a segment lies outside of guest memory".into()),
        e => damaged(e.to_string()),
    })?;
    let protocol = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => {
            let rip =
                u32::try_from(entry.raw_value()).map_err(|_| damaged("its PVH entry lies beyond 4 GiB".into()))?;
            Protocol::Pvh { rip }
        }
        _ => Protocol::Linux64 { rip: loaded.kernel_load.raw_value(), header: params::header_for_elf() },
    };
    // The page tables of the 64-bit protocol reach to 4 GiB, and initrds of ELF kernels lie below 2 GiB by custom.
    Ok(LoadedKernel { protocol, end: loaded.kernel_end, initrd_max: 0x7fff_ffff, cmdline_limit: cmdline::MAX_LEN })
}

/// Linux has 5. Each may be as large as RAM, and lie where another one lies.
const MOST_SEGMENTS: usize = 64;

/// What the loader does not look at: the machine, how many segments there are, and those that end outside of the file or of RAM.
fn check(file: &File, path: &Path, len: u64, ram: &Ram) -> Result<(), BootError> {
    use std::os::unix::fs::FileExt;
    const HEADER_LEN: usize = 64;
    const ENTRY_LEN: usize = 56;
    const CLASS_32: u8 = 1;
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const X86_64: u16 = 62;
    const PT_LOAD: u32 = 1;
    let damaged = |damage: String| BootError::Damaged { path: path.into(), damage };
    let ends = |_| damaged(format!("it ends after {len} bytes, inside its headers"));
    let u16_at = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u64_at = |bytes: &[u8], at: usize| (0..8).rev().fold(0, |n, i| n << 8 | u64::from(bytes[at + i]));

    let mut header = [0; HEADER_LEN];
    file.read_exact_at(&mut header, 0).map_err(ends)?;
    if (header[4], header[5], u16_at(&header, 18)) != (CLASS_64, LITTLE_ENDIAN, X86_64) {
        return Err(BootError::Format {
            path: path.into(),
            found: if header[4] == CLASS_32 { "an ELF file of 32 bits" } else { "an ELF file for another machine" },
            remedy: "give a vmlinux built for x86-64, or a bzImage; what is started by a boot loader starts from a disk, with \
                     firmware_path",
        });
    }
    let (table, count) = (u64_at(&header, 32), u16_at(&header, 56));
    let mut loadable = 0;
    for n in 0..u64::from(count) {
        let mut entry = [0; ENTRY_LEN];
        let at = table.checked_add(n * ENTRY_LEN as u64).ok_or_else(|| damaged("its headers lie nowhere".into()))?;
        file.read_exact_at(&mut entry, at).map_err(ends)?;
        if u32::from(u16_at(&entry, 0)) | u32::from(u16_at(&entry, 2)) << 16 != PT_LOAD {
            continue;
        }
        loadable += 1;
        if loadable > MOST_SEGMENTS {
            return Err(damaged(format!("it has more than {MOST_SEGMENTS} segments")));
        }
        let (offset, address, in_file, in_memory) =
            (u64_at(&entry, 8), u64_at(&entry, 24), u64_at(&entry, 32), u64_at(&entry, 40));
        if offset.checked_add(in_file).is_none_or(|end| end > len) {
            return Err(damaged(format!("it has {len} bytes and segment {n} ends beyond that")));
        }
        if !(FIRST_MIB..HIGH_RAM).contains(&address) {
            return Err(damaged(format!("segment {n} wants to lie at {address:#x}")));
        }
        let size = in_memory.max(in_file);
        match address.checked_add(size).filter(|end| *end <= HIGH_RAM) {
            None => return Err(damaged(format!("segment {n} at {address:#x} wants {size} bytes of memory"))),
            Some(end) if end > ram.low_end() => return Err(no_room("kernel", path, ram)),
            Some(_) => {}
        }
    }
    if loadable == 0 { Err(damaged("it has nothing to load".into())) } else { Ok(()) }
}
