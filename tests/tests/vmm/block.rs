//! Disks: raw files and copy-on-write children of images.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use bedplate_api::Digest;
use bedplate_images::Store;
use bedplate_images::disk::{Disk, Mode};
use bedplate_images::import::{self, Options};
use bedplate_tests::inside::guest::GuestSpec;
use bedplate_tests::inside::tools::{numbered_file, same_bytes};
use bedplate_tests::inside::{DISK, guest::Guest};

const MIB: u64 = 48;

fn dir(name: &str) -> Result<PathBuf> {
    let dir = Path::new("/run/disks").join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

fn blank_file(path: &Path) -> Result<()> {
    Ok(fs::File::create(path)?.set_len(MIB << 20)?)
}

/// Everything is read from one disk and written to another; the node compares.
pub fn raw() -> Result<()> {
    let dir = dir("raw")?;
    let (from, to) = (dir.join("from"), dir.join("to"));
    numbered_file(&from, MIB)?;
    blank_file(&to)?;
    let guest = GuestSpec::new("raw").drive(&from, true).drive(&to, false).boot()?;
    ensure!(guest.run("cat /sys/block/vda/size /sys/block/vdb/size")? == format!("{0}\n{0}", MIB << 11));
    guest.run("dd if=/dev/vda of=/dev/vdb bs=1M conv=fsync 2>/dev/null")?;
    same_bytes(&from, &to)?;
    let (_, code) = guest.try_run(&format!("dd if=/dev/vda of=/dev/vdb bs=1M seek={MIB} count=1 conv=fsync"))?;
    ensure!(code != "0", "a write past the end succeeded");
    ensure!(fs::metadata(&to)?.len() == MIB << 20, "the file has grown");
    // Small, unaligned to anything but sectors, from several processes at once.
    guest.run("for i in 1 2 3 4; do (dd if=/dev/vda of=/dev/null bs=512 skip=$((i * 777)) count=3000 2>/dev/null) & done; wait")?;
    // A file system, as guests use disks.
    guest.run(
        "mke2fs /dev/vdb > /dev/null 2>&1 && mount /dev/vdb /mnt && cp /bin/busybox /mnt/a && sync && umount /mnt",
    )?;
    guest.run("mount /dev/vdb /mnt && cmp /bin/busybox /mnt/a && umount /mnt")?;
    Ok(())
}

pub fn read_only() -> Result<()> {
    let dir = dir("read-only")?;
    let (file, copy) = (dir.join("file"), dir.join("copy"));
    numbered_file(&file, 1)?;
    fs::copy(&file, &copy)?;
    let guest = GuestSpec::new("read-only").drive(&file, true).boot()?;
    ensure!(guest.run("cat /sys/block/vda/ro")? == "1");
    let (said, code) = guest.try_run("dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync")?;
    ensure!(code != "0", "the guest could write: {said}");
    same_bytes(&file, &copy)
}

/// A store with the tiny image's disk in it, and a child of it.
fn child(dir: &Path, mode: Mode) -> Result<(Store, Digest, PathBuf)> {
    let store = Store::create(dir.join("store"))?;
    let mut quiet = |_: u64, _: u64| ControlFlow::Continue(());
    let imported = import::import_disk(&store, Path::new(DISK), Options::default(), &mut quiet)?;
    let disk = dir.join("disk");
    drop(Disk::create(&disk, &store, &imported.digest, mode)?);
    Ok((store, imported.digest, disk))
}

/// Writes in the middle of the disk; the sum of what is there then.
fn overwrite(guest: &Guest) -> Result<String> {
    guest.run("dd if=/bin/busybox of=/dev/vda bs=4k seek=100 conv=fsync 2>/dev/null")?;
    guest.run("dd if=/dev/vda bs=4k skip=100 count=200 2>/dev/null | md5sum")
}

pub fn copy_on_write() -> Result<()> {
    let dir = dir("cow")?;
    let (store, digest, disk) = child(&dir, Mode::Persistent)?;
    let mut guest = GuestSpec::new("cow").drive(&disk, false).drive(Path::new(DISK), true).boot()?;
    // What was never written reads as the image.
    guest.run("cmp /dev/vda /dev/vdb")?;
    let sum = overwrite(&guest)?;
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")?;
    ensure!(Disk::open(&disk)?.written() > 0, "nothing was kept apart from the image");
    store.verify(&digest)?;
    let copy = dir.join("image.raw");
    store.materialise(&digest, "disk", &copy)?;
    same_bytes(&copy, Path::new(DISK))?;
    // Persistent: it is there after a restart.
    let guest = GuestSpec::new("cow").drive(&disk, false).boot()?;
    ensure!(guest.run("dd if=/dev/vda bs=4k skip=100 count=200 2>/dev/null | md5sum")? == sum, "the write is lost");
    Ok(())
}

pub fn survives_kill() -> Result<()> {
    let dir = dir("kill")?;
    let (_store, _, disk) = child(&dir, Mode::Persistent)?;
    let mut guest = GuestSpec::new("kill").drive(&disk, false).boot()?;
    let sum = overwrite(&guest)?;
    guest.process().kill()?;
    drop(guest);
    let guest = GuestSpec::new("kill").drive(&disk, false).boot()?;
    ensure!(guest.run("dd if=/dev/vda bs=4k skip=100 count=200 2>/dev/null | md5sum")? == sum, "synced data is lost");
    Ok(())
}
