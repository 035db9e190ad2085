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
pub const BASE: u32 = 0x10_0000;
const LEN: usize = 2048;
const CODE: usize = 0x100;
/// Where it is entered.
pub const ENTRY: u32 = BASE + CODE as u32;

/// Writes [`SMALL`]'s kernel.
pub fn write_small() -> Result<()> {
    let mut code = Vec::new();
    say(&mut code, SMALL.says);
    Ok(fs::write(Path::new(SMALL.kernel), kernel(&code))?)
}

/// It leaves the guest over and over, in each of these ways between two of its words.
pub const EXITS: Guest = Guest { kernel: "/run/exits", initrd: None, cmdline: "quiet", says: "port write" };
/// What it does between its words, and the last of them.
pub const WAYS: [&str; 4] = [EXITS.says, "memory write", "memory read", "done"];
/// How often it does each.
pub const REPEAT: u32 = 20_000;
/// Where nothing is, in any of the VMMs.
const NOBODYS_PORT: u16 = 0x5f0;
const NOBODYS_ADDRESS: u32 = 0xf000_0000;

/// [`EXITS`]'s kernel.
pub fn exits() -> Vec<u8> {
    let mut code = vec![0xbf]; // mov edi, address
    code.extend(NOBODYS_ADDRESS.to_le_bytes());
    let steps: [&[u8]; 3] = [&[0xee], &[0x89, 0x07], &[0x8b, 0x07]]; // out dx, al; mov [edi], eax; mov eax, [edi]
    for (word, step) in WAYS.iter().zip(steps) {
        say(&mut code, word);
        code.extend([0x66, 0xba]); // mov dx, port
        code.extend(NOBODYS_PORT.to_le_bytes());
        code.push(0xb9); // mov ecx, count
        code.extend(REPEAT.to_le_bytes());
        code.extend(step);
        code.extend([0x49, 0x75, (-(step.len() as i8 + 3)) as u8]); // dec ecx; jnz
    }
    say(&mut code, WAYS[3]);
    kernel(&code)
}

/// Code that prints a line.
fn say(code: &mut Vec<u8>, word: &str) {
    code.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    for letter in word.bytes().chain(*b"\n") {
        code.extend([0xb0, letter, 0xee]); // mov al, letter; out dx, al
    }
}

/// An ELF file with `code`, after which the processor halts. It is entered in 32-bit protected mode, by PVH.
fn kernel(code: &[u8]) -> Vec<u8> {
    let mut elf = vec![0u8; LEN];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    // ELF64, little-endian, executable, x86-64; two program headers behind the header of 64 bytes.
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &u64::from(ENTRY).to_le_bytes());
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
    put(200, &ENTRY.to_le_bytes());
    put(CODE, code);
    put(CODE + code.len(), &[0xf4, 0xeb, 0xfd]); // hlt; jmp to the hlt
    elf
}
