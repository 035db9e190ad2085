//! A kernel as a distribution ships it.

use std::fs::File;

use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::{KernelLoader, bootparam};
use vm_memory::GuestAddress;

use super::contents::{Contents, Noting};
use super::{BootError, LoadedKernel, Protocol, no_room};
use crate::memory::Ram;
use crate::memory::layout::FIRST_MIB;

/// The 64-bit entry point is this far into the protected-mode code.
const ENTRY_64: u64 = 0x200;
/// Protocol that says where the kernel wants to lie, and how much room it needs there.
const MIN_VERSION: u16 = 0x20a;
/// Protocol that has `xloadflags`.
const FLAGS_VERSION: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
const SECTOR: u64 = 512;

/// Loads the kernel that `source` of `contents` is.
pub(super) fn load(contents: &mut Contents, source: usize, ram: &Ram) -> Result<LoadedKernel, BootError> {
    let (file, path, len) = contents.file(source);
    let path = path.to_owned();
    let damaged = |damage: String| BootError::Damaged { path: path.clone(), damage };
    let header =
        read_header(file, len).ok_or_else(|| damaged(format!("it ends after {len} bytes, inside its header")))?;
    let (version, flags) = (header.version, header.xloadflags);
    if version < MIN_VERSION {
        return Err(BootError::Format {
            path,
            found: "a bzImage that does not say where it wants to lie",
            remedy: "give Linux 2.6.31 or newer; what needs a BIOS starts from a disk, with firmware_path",
        });
    }
    let is_64 = version >= FLAGS_VERSION && flags & XLF_KERNEL_64 != 0;
    let setup = (u64::from(if header.setup_sects == 0 { 4 } else { header.setup_sects }) + 1) * SECTOR;
    let expected = setup + u64::from(header.syssize) * 16;
    // The header counts in units of 16 bytes, and not every linker fills the last one.
    if len < setup || len.div_ceil(16) < expected / 16 {
        return Err(damaged(format!("it has {len} bytes and its header promises {expected}")));
    }
    let (address, init_size, initrd_max) =
        (header.pref_address, u64::from(header.init_size), u64::from(header.initrd_addr_max));
    // It decompresses in place and says how much room it needs for that.
    let size = init_size.max(len - setup);
    let end = address.checked_add(size).filter(|_| address >= FIRST_MIB);
    let end = end.ok_or_else(|| damaged(format!("its header wants it at {address:#x}")))?;
    if end > ram.low_end() {
        return Err(no_room("kernel", &path, ram));
    }
    let load = |file: &mut Noting<'_>| BzImage::load(&*ram.memory, Some(GuestAddress(address)), file, None);
    let loaded = contents.note(source, ram, load).map_err(|e| damaged(e.to_string()))?;
    let header = loaded.setup_header.ok_or_else(|| damaged("it has no header".into()))?;
    let protocol = match u32::try_from(address) {
        _ if is_64 => Protocol::Linux64 { rip: address + ENTRY_64, header },
        Ok(rip) => Protocol::Linux32 { rip, header },
        Err(_) => return Err(damaged(format!("its header wants it at {address:#x}"))),
    };
    Ok(LoadedKernel { protocol, end, initrd_max, cmdline_limit: header.cmdline_size as usize })
}

fn read_header(file: &File, len: u64) -> Option<bootparam::setup_header> {
    use std::os::unix::fs::FileExt;
    use vm_memory::ByteValued;
    let mut header = bootparam::setup_header::default();
    let complete = len >= super::params::HEADER_OFFSET + size_of_val(&header) as u64;
    (complete && file.read_exact_at(header.as_mut_slice(), super::params::HEADER_OFFSET).is_ok()).then_some(header)
}
