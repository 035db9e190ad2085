//! Disks: one ext4 file system without partitions, with a boot loader entry that says how to boot it directly.

use std::fs;
use std::path::Path;
use std::process::Command;

use bedplate_lab::process::output;

use crate::Result;
use crate::error::at;

/// The kernel, its initramfs and its command line, as files of the root file system.
pub(crate) struct BootEntry<'a> {
    pub(crate) title: &'a str,
    /// Path in the file system.
    pub(crate) kernel: &'a str,
    /// Path in the file system.
    pub(crate) initrd: &'a str,
    pub(crate) options: &'a str,
}

/// Writes the entry where boot loaders, and `bedplate image import`, look for it.
pub(crate) fn write_entry(root: &Path, entry: &BootEntry<'_>) -> Result<()> {
    let BootEntry { title, kernel, initrd, options } = entry;
    let dir = root.join("boot/loader/entries");
    fs::create_dir_all(&dir).map_err(at("create", &dir))?;
    let path = dir.join("bedplate.conf");
    let text = format!("title {title}\nlinux {kernel}\ninitrd {initrd}\noptions {options}\n");
    fs::write(&path, text).map_err(at("write", &path))
}

/// Turns a directory into an ext4 image of `size`, named `label`.
pub(crate) fn make_ext4(root: &Path, image: &Path, label: &str, size: &str) -> Result<()> {
    let mut mke2fs = Command::new("mke2fs");
    // A fresh file reads as zeros: the inode tables need not be written, now or in the background of the running VM.
    mke2fs.args(["-q", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=0,assume_storage_prezeroed=1"]);
    output(mke2fs.args(["-L", label]).arg("-d").arg(root).arg(image).arg(size))?;
    Ok(())
}
