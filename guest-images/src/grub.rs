//! The disk that starts by itself: the tiny image behind GRUB, in a partition, as a PC of any maker would start it; and the
//! firmware of a PC that does so. Made by writing files: no loop device, no mount, nothing of GRUB on this machine.
//!
//! ```text
//! sector 0       GRUB's boot.img with the partition table in it: loads sector 1
//!        1..     core.img: loads the rest of itself, knows partitions and ext4
//!        2048..  partition 1, ext4: /boot/grub/grub.cfg, kernel, initramfs
//! ```

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use bedplate_lab::process::output;

use crate::cache::Key;
use crate::disk::make_ext4;
use crate::error::at;
use crate::packages::{PINS, section};
use crate::{Result, TinyImage, Workshop};

const MENU: &str = include_str!("../files/grub/grub.cfg");
/// In core.img: to find the menu, to read it, and to start what it says.
const MODULES: [&str; 6] = ["biosdisk", "part_msdos", "ext2", "normal", "linux", "echo"];

const SECTOR: u64 = 512;
/// Where partitions begin since disks have larger sectors: at 1 MiB.
const FIRST_SECTOR: u32 = 2048;
/// Kernel and initramfs have some 17 MiB.
const PARTITION_MIB: u32 = 24;

/// In the first sector: where boot.img decides whether it trusts the drive's number, and the table of partitions.
const DRIVE_CHECK: usize = 0x66;
const TABLE: usize = 0x1be;
/// What GRUB's own installer puts there for hard disks: two instructions that do nothing.
const NO_CHECK: [u8; 2] = [0x90; 2];

/// Files of a machine that starts by itself.
#[derive(Debug, Clone)]
pub struct GrubImage {
    /// The disk, raw.
    pub disk: PathBuf,
    /// A BIOS for it: SeaBIOS.
    pub firmware: PathBuf,
}

impl Workshop<'_> {
    /// The GRUB disk with `tiny` on it, and SeaBIOS.
    pub fn grub(&self, tiny: &TinyImage) -> Result<GrubImage> {
        let pins = section(PINS, "grub")?;
        let key = Key::default().text(include_str!("grub.rs")).text(include_str!("disk.rs")).text(MENU);
        let key =
            key.text(&format!("{pins:?}")).text(&tiny.kernel.to_string_lossy()).text(&tiny.initrd.to_string_lossy());
        let dir = self.cached("grub", key, |dir| {
            self.say("grub: making a disk that starts by itself");
            let tools = dir.join("tools");
            self.unpack(&pins, dir, &tools)?;
            let bios = tools.join("usr/share/seabios/bios-256k.bin");
            fs::copy(&bios, dir.join("bios.bin")).map_err(at("copy", &bios))?;
            let core = make_core(dir, &tools)?;
            let partition = make_partition(dir, tiny)?;
            let boot = tools.join("usr/lib/grub/i386-pc/boot.img");
            let boot = fs::read(&boot).map_err(at("read", &boot))?;
            let disk = dir.join("disk.raw");
            write_disk(&disk, &boot, &core, &partition).map_err(at("write", &disk))?;
            fs::remove_file(&partition).map_err(at("remove", &partition))?;
            fs::remove_dir_all(&tools).map_err(at("remove", &tools))
        })?;
        Ok(GrubImage { disk: dir.join("disk.raw"), firmware: dir.join("bios.bin") })
    }
}

/// The part of GRUB that lies before the first partition, with all that it needs.
fn make_core(dir: &Path, tools: &Path) -> Result<Vec<u8>> {
    let core = dir.join("core.img");
    let mut mkimage = Command::new(tools.join("usr/bin/grub-mkimage"));
    // One of its libraries is not on every machine.
    mkimage.env("LD_LIBRARY_PATH", tools.join("lib/x86_64-linux-gnu"));
    mkimage.args(["--format", "i386-pc", "--prefix", "(hd0,msdos1)/boot/grub"]);
    mkimage.arg("--directory").arg(tools.join("usr/lib/grub/i386-pc")).arg("--output").arg(&core).args(MODULES);
    output(&mut mkimage)?;
    let bytes = fs::read(&core).map_err(at("read", &core))?;
    fs::remove_file(&core).map_err(at("remove", &core))?;
    Ok(bytes)
}

fn make_partition(dir: &Path, tiny: &TinyImage) -> Result<PathBuf> {
    let root = dir.join("root");
    let grub = root.join("boot/grub");
    fs::create_dir_all(&grub).map_err(at("create", &grub))?;
    for (from, name) in [(&tiny.kernel, "boot/vmlinuz"), (&tiny.initrd, "boot/initrd.img")] {
        fs::copy(from, root.join(name)).map_err(at("copy", from))?;
    }
    let menu = grub.join("grub.cfg");
    fs::write(&menu, MENU).map_err(at("write", &menu))?;
    let partition = dir.join("partition");
    make_ext4(&root, &partition, "grub", &format!("{PARTITION_MIB}M"))?;
    fs::remove_dir_all(&root).map_err(at("remove", &root))?;
    Ok(partition)
}

fn write_disk(path: &Path, boot: &[u8], core: &[u8], partition: &Path) -> io::Result<()> {
    let gap = u64::from(FIRST_SECTOR - 1) * SECTOR;
    if core.len() as u64 > gap {
        return Err(io::Error::other("GRUB's core does not fit before the first partition"));
    }
    let mut disk = File::create(path)?;
    disk.write_all(&first_sector(boot).ok_or_else(|| io::Error::other("boot.img has not one sector"))?)?;
    disk.write_all(core)?;
    disk.seek(SeekFrom::Start(u64::from(FIRST_SECTOR) * SECTOR))?;
    io::copy(&mut File::open(partition)?, &mut disk)?;
    Ok(())
}

/// `boot` as it stands on a hard disk with one partition.
fn first_sector(boot: &[u8]) -> Option<[u8; SECTOR as usize]> {
    const ACTIVE: u8 = 0x80;
    const LINUX: u8 = 0x83;
    /// Cylinder, head and sector of what lies beyond all cylinders.
    const BEYOND: [u8; 3] = [0xfe, 0xff, 0xff];
    let mut sector: [u8; SECTOR as usize] = boot.try_into().ok()?;
    sector[DRIVE_CHECK..DRIVE_CHECK + 2].copy_from_slice(&NO_CHECK);
    let sectors = PARTITION_MIB << 11;
    let entry =
        [&[ACTIVE][..], &BEYOND, &[LINUX], &BEYOND, &FIRST_SECTOR.to_le_bytes(), &sectors.to_le_bytes()].concat();
    sector[TABLE..510].fill(0);
    sector[TABLE..TABLE + entry.len()].copy_from_slice(&entry);
    Some(sector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_sector_has_code_one_partition_and_its_mark() {
        let mut boot = [7; 512];
        boot[510..].copy_from_slice(&[0x55, 0xaa]);
        let sector = first_sector(&boot).unwrap();
        assert_eq!((sector[0], &sector[DRIVE_CHECK..DRIVE_CHECK + 3]), (7, &[0x90, 0x90, 7][..]));
        assert_eq!((sector[TABLE], sector[TABLE + 4]), (0x80, 0x83));
        assert_eq!(sector[TABLE + 8..TABLE + 16], [0, 8, 0, 0, 0, 0xc0, 0, 0], "from 1 MiB on, 24 MiB");
        assert_eq!((&sector[TABLE + 16..510], &sector[510..]), (&[0; 48][..], &[0x55, 0xaa][..]));
        assert!(first_sector(&boot[1..]).is_none());
    }
}
