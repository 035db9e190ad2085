//! What the VMMs run: a kernel, and almost nothing.

use std::fs;
use std::path::Path;

use anyhow::Result;
use bedplate_tests::inside::{ELF, INITRD};

/// A guest with one vCPU and 256 MiB.
#[derive(Debug, Clone, Copy)]
pub struct Guest {
    pub kernel: &'static str,
    pub initrd: Option<&'static str>,
    pub cmdline: &'static str,
    /// What it prints first of all.
    pub says: &'static str,
}

/// Debian's kernel, uncompressed, with the tiny image's init.
pub const DEBIAN: Guest =
    Guest { kernel: ELF, initrd: Some(INITRD), cmdline: "console=ttyS0 reboot=k panic=-1 quiet", says: "TINY init" };

/// 2 KiB that print a word and halt: all the rest of its start is the VMM's.
pub const SMALL: Guest = Guest { kernel: "/run/small", initrd: None, cmdline: "quiet", says: "small" };

/// Where it is loaded.
const BASE: u32 = 0x10_0000;
const LEN: usize = 2048;
const CODE: usize = 0x100;

/// Writes [`SMALL`]'s kernel: an ELF file with a PVH entry, which is entered in 32-bit protected mode.
pub fn write_small() -> Result<()> {
    let entry = BASE + CODE as u32;
    let mut elf = vec![0u8; LEN];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    // ELF64, little-endian, executable, x86-64; two program headers behind the header of 64 bytes.
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &u64::from(entry).to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0]);
    // The whole file is loaded (PT_LOAD, readable, writable and executable).
    put(64, &[1, 0, 0, 0, 7, 0, 0, 0]);
    put(80, &u64::from(BASE).to_le_bytes());
    put(88, &u64::from(BASE).to_le_bytes());
    put(96, &(LEN as u64).to_le_bytes());
    put(104, &(LEN as u64).to_le_bytes());
    put(112, &0x1000u64.to_le_bytes());
    // A note (PT_NOTE): XEN_ELFNOTE_PHYS32_ENTRY, number 18, is the PVH entry.
    put(120, &[4, 0, 0, 0, 4, 0, 0, 0]);
    put(128, &184u64.to_le_bytes());
    put(152, &20u64.to_le_bytes());
    put(160, &20u64.to_le_bytes());
    put(168, &4u64.to_le_bytes());
    put(184, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(196, b"Xen\0");
    put(200, &entry.to_le_bytes());
    // mov dx, 0x3f8; then for each letter: mov al, letter; out dx, al; at last: hlt; jmp to the hlt
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    SMALL.says.bytes().chain(*b"\n").for_each(|letter| code.extend([0xb0, letter, 0xee]));
    code.extend([0xf4, 0xeb, 0xfd]);
    put(CODE, &code);
    fs::write(Path::new(SMALL.kernel), elf)?;
    Ok(())
}
