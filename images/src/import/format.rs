//! What a file is, by its content. Names and extensions are not looked at.

use std::fmt;
use std::path::Path;

/// Bytes from the front that [`detect`] wants to see, if there are as many.
pub const HEAD_LEN: usize = 4096;

/// What a file turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A disk, byte for byte. Everything that is nothing else.
    Raw,
    /// QEMU's format, version 2 or 3.
    Qcow2,
    /// QEMU's old format.
    Qed,
    /// VMware's, as a text that names flat files.
    VmdkText,
    /// VMware's sparse kinds.
    Vmdk,
    /// Microsoft's old format.
    Vhd,
    /// Microsoft's new format.
    Vhdx,
    /// VirtualBox's.
    Vdi,
    /// Compressed.
    Xz,
    /// Compressed.
    Gzip,
    /// Compressed.
    Bzip2,
    /// Compressed.
    Zstd,
    /// An archive.
    Zip,
    /// An archive.
    Tar,
    /// A kernel, not a disk.
    LinuxKernel,
    /// A program or a kernel.
    Elf,
    /// A web page, probably an error message that was saved by mistake.
    Html,
}

/// Signature, where it stands, and what it means; the first that fits counts.
const SIGNATURES: &[(usize, &[u8], Format)] = &[
    (0, b"QFI\xfb", Format::Qcow2),
    (0, b"QED\0", Format::Qed),
    (0, b"KDMV", Format::Vmdk),
    (0, b"COWD", Format::Vmdk),
    (0, b"# Disk DescriptorFile", Format::VmdkText),
    (0, b"conectix", Format::Vhd),
    (0, b"vhdxfile", Format::Vhdx),
    (0x40, &0xbeda_107f_u32.to_le_bytes(), Format::Vdi),
    (0, b"\xfd7zXZ\0", Format::Xz),
    (0, b"\x1f\x8b", Format::Gzip),
    (0, b"BZh", Format::Bzip2),
    (0, b"\x28\xb5\x2f\xfd", Format::Zstd),
    (0, b"PK\x03\x04", Format::Zip),
    (257, b"ustar", Format::Tar),
    (0x202, b"HdrS", Format::LinuxKernel),
    (0, b"\x7fELF", Format::Elf),
    (0, b"<!DOCTYPE", Format::Html),
    (0, b"<!doctype", Format::Html),
    (0, b"<html", Format::Html),
];

/// Tells the format of a file from its first bytes (see [`HEAD_LEN`]) and its last 512.
pub fn detect(head: &[u8], tail: &[u8]) -> Format {
    let fits =
        |(at, signature, _): &&(usize, &[u8], Format)| head.get(*at..).is_some_and(|rest| rest.starts_with(signature));
    match SIGNATURES.iter().find(fits) {
        Some((_, _, format)) => *format,
        // A fixed VHD is a raw disk with a footer.
        None if tail.starts_with(b"conectix") => Format::Vhd,
        None => Format::Raw,
    }
}

impl Format {
    /// A stream that has to be unpacked, and can be unpacked here.
    pub const fn is_packed(self) -> bool {
        matches!(self, Self::Xz | Self::Gzip | Self::Zstd)
    }

    /// What to do about a file of this format.
    pub(super) fn remedy(self, path: &Path) -> String {
        let path = path.display();
        match self {
            Self::Raw | Self::Qcow2 | Self::VmdkText => "it can be imported as it is".to_owned(),
            Self::Qed | Self::Vmdk | Self::Vhd | Self::Vhdx | Self::Vdi => {
                format!("convert it with `qemu-img convert -O raw {path} {path}.raw`, then import {path}.raw")
            }
            Self::Xz => format!("unpack it with `xz -dk {path}`, then import what that writes"),
            Self::Gzip => format!("unpack it with `gzip -dk {path}`, then import what that writes"),
            Self::Bzip2 => format!("unpack it with `bzip2 -dk {path}`, then import what that writes"),
            Self::Zstd => format!("unpack it with `zstd -d {path}`, then import what that writes"),
            Self::Zip => format!("unpack it with `unzip {path}`, then import the disk image in it"),
            Self::Tar => format!("unpack it with `tar -xf {path}`, then import the disk image in it"),
            Self::LinuxKernel | Self::Elf => "give it as a kernel, beside a disk or an initial RAM disk".to_owned(),
            Self::Html => "the download was probably refused; look into the file and get it again".to_owned(),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::VmdkText => "vmdk",
            Self::Qed => "a QED disk image",
            Self::Vmdk => "a sparse VMDK disk image",
            Self::Vhd => "a VHD disk image",
            Self::Vhdx => "a VHDX disk image",
            Self::Vdi => "a VDI disk image",
            Self::Xz => "compressed with xz",
            Self::Gzip => "compressed with gzip",
            Self::Bzip2 => "compressed with bzip2",
            Self::Zstd => "compressed with zstd",
            Self::Zip => "a zip archive",
            Self::Tar => "a tar archive",
            Self::LinuxKernel => "a Linux kernel",
            Self::Elf => "an ELF file",
            Self::Html => "a web page",
        })
    }
}
