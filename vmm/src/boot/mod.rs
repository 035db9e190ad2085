//! From files to a first instruction: kernel, initial RAM disk and command line into guest RAM.
//!
//! A bzImage is entered by Linux's boot protocol of 64 bits, or of 32 where the kernel has no more, and decompresses
//! itself; an ELF kernel by its PVH entry, or where it has none, by the 64-bit protocol as well
//! (Documentation/arch/x86/boot.rst, and Xen's pvh.html).

mod bzimage;
mod cmdline;
mod contents;
mod elf;
mod loading;
mod params;
pub mod start;

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bedplate_devices::Memory;
use bedplate_devices::virtio::mmio::Place;
use vm_memory::{Bytes, GuestAddress};

pub use self::loading::{Loader, Loading};
pub use cmdline::{CmdlineError, DEFAULT as DEFAULT_CMDLINE, RootDevice, compose as compose_cmdline, is_without_pci};

use self::contents::Contents;
use crate::memory::Ram;

/// How the first vCPU enters the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Linux's 64-bit protocol.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// `boot_params`.
        zero_page: u64,
    },
    /// Linux's 32-bit protocol: protected mode without paging.
    Linux32 {
        /// First instruction.
        rip: u32,
        /// `boot_params`.
        zero_page: u32,
    },
    /// PVH: 32-bit protected mode without paging.
    Pvh {
        /// First instruction.
        rip: u32,
        /// `hvm_start_info`.
        start_info: u32,
    },
    /// Real mode with all segments at 0: for tests and benchmarks, which have no kernel.
    Real {
        /// First instruction.
        address: u16,
    },
    /// As every processor begins: real mode, 16 bytes below 4 GiB. For firmware.
    Reset,
}

/// What a VM begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// A kernel, by [`load`].
    Kernel(BootConfig),
    /// Firmware, which finds a boot loader on the disks: [`crate::firmware`].
    Firmware(PathBuf),
}

/// A kernel to boot; the files are looked at when it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootConfig {
    /// bzImage or ELF.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Complete and checked: [`compose_cmdline`].
    pub cmdline: String,
}

/// Why the VM cannot boot what it was given.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("{what} {path}: {source}; check the path and who may read it")]
    Read {
        /// Kernel or initial RAM disk.
        what: &'static str,
        /// As given.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// A file did not stay as it was.
    #[error("{what} {path} {how} while it was read for a VM: replace such a file by a rename, not in its place")]
    Changed {
        /// Kernel or initial RAM disk.
        what: &'static str,
        /// As given.
        path: PathBuf,
        /// In words.
        how: &'static str,
    },
    /// Neither of the two formats.
    #[error("kernel {path} is {found}, not a bzImage or an ELF kernel for x86-64: {remedy}")]
    Format {
        /// As given.
        path: PathBuf,
        /// What it looks like.
        found: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// The right format, and damaged.
    #[error("kernel {path} is damaged: {damage}; get an intact copy")]
    Damaged {
        /// As given.
        path: PathBuf,
        /// Where.
        damage: String,
    },
    /// No room.
    #[error("{what} {path} does not fit into {mib} MiB of guest memory: give the VM more")]
    NoRoom {
        /// Kernel or initial RAM disk.
        what: &'static str,
        /// As given.
        path: PathBuf,
        /// Guest memory.
        mib: u64,
    },
    /// The kernel takes less of a command line.
    #[error(
        "the command line has {len} bytes, {virtio} of them to tell of virtio devices, and the kernel {path} takes {limit}: \
         shorten boot_args"
    )]
    Cmdline {
        /// Its length.
        len: usize,
        /// What is ours of it.
        virtio: usize,
        /// The kernel's limit.
        limit: usize,
        /// The kernel.
        path: PathBuf,
    },
    /// The host takes back what it gave ([`Loading`]).
    #[error("the guest cannot have what was read for it: {0}")]
    Present(io::Error),
    /// The boot structures do not fit into the first MiB: our bug, or RAM of less than a MiB.
    #[error("boot structures cannot be written to guest memory: {0}")]
    Structures(String),
}

/// A kernel in guest RAM.
struct LoadedKernel {
    protocol: Protocol,
    /// First byte after the kernel and its bss.
    end: u64,
    /// Last byte where an initial RAM disk may lie.
    initrd_max: u64,
    cmdline_limit: usize,
}

enum Protocol {
    Linux64 { rip: u64, header: params::SetupHeader },
    Linux32 { rip: u32, header: params::SetupHeader },
    Pvh { rip: u32 },
}

impl Protocol {
    /// Where the first instruction is.
    fn rip(&self) -> u64 {
        match *self {
            Self::Linux64 { rip, .. } => rip,
            Self::Linux32 { rip, .. } | Self::Pvh { rip } => rip.into(),
        }
    }
}

/// Address and length of the initial RAM disk.
#[derive(Clone, Copy)]
struct Initrd {
    address: u64,
    len: u64,
}

/// Loads `config` into `ram`, beside the ACPI tables that lie there already, with their root at `rsdp`. A kernel
/// that shall do without PCI is told of `virtio`. The guest can begin; what is still to be read then comes with the entry.
///
/// # Errors
/// A file is missing, of a wrong format or damaged, or there is no room for it.
pub fn load(
    ram: &Ram,
    config: &BootConfig,
    rsdp: u64,
    virtio: &[Place],
) -> Result<(Entry, Option<Loading>), BootError> {
    let mut contents = Contents::default();
    let kernel = load_kernel(&mut contents, ram, &config.kernel)?;
    let mut line = config.cmdline.clone();
    if is_without_pci(&line) {
        line = cmdline::with_virtio(&line, virtio);
    }
    let limit = kernel.cmdline_limit.min(cmdline::MAX_LEN);
    if line.len() > limit {
        let (len, given) = (line.len(), config.cmdline.len());
        return Err(BootError::Cmdline { len, virtio: len - given, limit, path: config.kernel.clone() });
    }
    let initrd = config.initrd.as_deref();
    let initrd = initrd.map(|path| place_initrd(&mut contents, ram, path, &kernel)).transpose()?;
    write_cmdline(&ram.memory, &line)?;
    let is_32 = matches!(kernel.protocol, Protocol::Linux32 { .. });
    start::write(&ram.memory, if is_32 { &start::GDT_32 } else { &start::GDT })?;
    let entry = match kernel.protocol {
        Protocol::Linux64 { rip, header } => {
            params::write_zero_page(ram, header, line.len(), initrd, rsdp)?;
            Entry::Linux64 { rip, zero_page: start::ZERO_PAGE }
        }
        Protocol::Linux32 { rip, header } => {
            params::write_zero_page(ram, header, line.len(), initrd, rsdp)?;
            // The address is a constant below 1 MiB.
            Entry::Linux32 { rip, zero_page: start::ZERO_PAGE as u32 }
        }
        Protocol::Pvh { rip } => {
            params::write_start_info(ram, initrd, rsdp)?;
            // The address is a constant below 1 MiB.
            Entry::Pvh { rip, start_info: start::PVH_INFO as u32 }
        }
    };
    let loading = Loading::begin(contents, ram, kernel.protocol.rip())?;
    Ok((entry, loading))
}

fn load_kernel(contents: &mut Contents, ram: &Ram, path: &Path) -> Result<LoadedKernel, BootError> {
    let kernel = contents.open("kernel", path)?;
    let (file, _, len) = contents.file(kernel);
    let mut head = vec![0; 4096.min(usize::try_from(len).unwrap_or(4096))];
    file.read_exact_at(&mut head, 0).map_err(|source| read_error("kernel", path, source))?;
    if head.starts_with(b"\x7fELF") {
        elf::load(contents, kernel, ram)
    } else if head.get(0x202..0x206) == Some(b"HdrS") {
        bzimage::load(contents, kernel, ram)
    } else {
        let (found, remedy) = recognise(&head);
        Err(BootError::Format { path: path.into(), found, remedy })
    }
}

/// What a file that is no kernel may be instead.
fn recognise(head: &[u8]) -> (&'static str, &'static str) {
    const UNPACK: &str = "decompress it first";
    const OTHER: &str = "give the vmlinuz of a distribution, or a vmlinux";
    match head {
        [] => ("empty", OTHER),
        [0x1f, 0x8b, ..] => ("a gzip file", UNPACK),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => ("an xz file", UNPACK),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("a zstd file", UNPACK),
        [b'0', b'7', b'0', b'7', b'0', ..] => ("a cpio archive", "that is an initial RAM disk: give it as initrd_path"),
        [b'M', b'Z', ..] => ("an EFI program", OTHER),
        [b'Q', b'F', b'I', 0xfb, ..] => ("a qcow2 disk image", "give it as a drive"),
        _ => ("something else", OTHER),
    }
}

fn place_initrd(contents: &mut Contents, ram: &Ram, path: &Path, kernel: &LoadedKernel) -> Result<Initrd, BootError> {
    const PAGE: u64 = 4096;
    let initrd = contents.open("initrd", path)?;
    let (_, _, len) = contents.file(initrd);
    let no_room = || no_room("initrd", path, ram);
    // As high as it may lie, so that the kernel has room to grow.
    let top = ram.low_end().min(kernel.initrd_max.saturating_add(1));
    let address = top.checked_sub(len).ok_or_else(no_room)? / PAGE * PAGE;
    if address < kernel.end {
        return Err(no_room());
    }
    contents.add(initrd, address);
    Ok(Initrd { address, len })
}

fn write_cmdline(memory: &Memory, cmdline: &str) -> Result<(), BootError> {
    let bytes = [cmdline.as_bytes(), &[0]].concat();
    memory.write_slice(&bytes, GuestAddress(start::CMDLINE)).map_err(|e| BootError::Structures(e.to_string()))
}

fn read_error(what: &'static str, path: &Path, source: io::Error) -> BootError {
    BootError::Read { what, path: path.into(), source }
}

fn no_room(what: &'static str, path: &Path, ram: &Ram) -> BootError {
    let bytes: u64 = ram.ranges().map(|(start, end)| end - start).sum();
    BootError::NoRoom { what, path: path.into(), mib: bytes >> 20 }
}

#[cfg(test)]
mod tests;
