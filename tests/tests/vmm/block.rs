//! Disks: raw files and copy-on-write children of images.

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bedplate_api::Digest;
use bedplate_images::Store;
use bedplate_images::disk::{Disk, Holder, Mode};
use bedplate_images::import::{self, Options};
use bedplate_tests::inside::guest::GuestSpec;
use bedplate_tests::inside::tools::{numbered_file, same_bytes};
use bedplate_tests::inside::{DISK, guest::Guest};
use bedplate_tests::patience::until;
use serde_json::json;

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

/// Everything is read from one disk and written to another, by 2 vCPUs with a queue each; the node compares.
pub fn raw(engine: &str) -> Result<()> {
    let name = format!("raw-{}", engine.to_lowercase());
    let dir = dir(&name)?;
    let (from, to) = (dir.join("from"), dir.join("to"));
    numbered_file(&from, MIB)?;
    blank_file(&to)?;
    let (guest, engine) = (GuestSpec::new(&name).cpus(2), json!(engine));
    let guest = guest.drive(&from, true).drive_option("io_engine", engine.clone());
    let guest = guest.drive(&to, false).drive_option("io_engine", engine).boot()?;
    ensure!(guest.run("ls /sys/block/vda/mq | wc -l")? == "2", "a queue for each vCPU");
    ensure!(fs::read_to_string(guest.file("stderr"))?.is_empty(), "a warning: {}", guest.last_words());
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
    for (device, counters) in [
        ("block_disk0", &["read_count", "read_bytes"][..]),
        ("block_disk1", &["write_count", "write_bytes", "flush_count", "interrupts", "notifications"][..]),
    ] {
        for counter in counters {
            ensure!(guest.count(device, counter)? > 0, "{device} has no {counter}");
        }
        ensure!(guest.count(device, "guest_faults")? + guest.count(device, "host_faults")? == 0, "{device} has faults");
    }
    Ok(())
}

/// Linux that was told not to believe ACPI about the host bridge puts BARs elsewhere, and finds its devices there. It has no
/// interrupts for them then.
pub fn elsewhere() -> Result<()> {
    let file = dir("elsewhere")?.join("file");
    numbered_file(&file, MIB)?;
    let guest = GuestSpec::new("elsewhere").cmdline("pci=noacpi").drive(&file, true).boot()?;
    let place = guest.run("grep -m 1 0000:00:01.0 /proc/iomem")?;
    ensure!(place.trim_start().starts_with("100000000-"), "the disk is at {place}, where it was");
    let kind = guest.run("cat /sys/bus/pci/devices/0000:00:01.0/virtio0/device")?;
    ensure!(kind == "0x0002", "in the disk's registers there is a {kind}");
    Ok(())
}

/// What a guest discards or zeroes is a hole in the file, and reads as zeroes.
pub fn discard() -> Result<()> {
    let dir = dir("discard")?;
    let (file, zeroes) = (dir.join("file"), dir.join("zeroes"));
    numbered_file(&file, 16)?;
    fs::File::create(&zeroes)?.set_len(16 << 20)?;
    let held = || fs::metadata(&file).map(|metadata| metadata.blocks() * 512);
    ensure!(held()? == 16 << 20);
    let guest = GuestSpec::new("discard").drive(&file, false).boot()?;
    ensure!(guest.run("cat /sys/block/vda/queue/discard_max_bytes")? != "0", "discard is not offered");
    guest.run("blkdiscard -o 4194304 -l 8388608 /dev/vda")?;
    ensure!(held()? == 8 << 20, "{} bytes are left of 16 MiB, of which 8 were discarded", held()?);
    ensure!(guest.run("dd if=/dev/vda bs=1M skip=4 count=8 2>/dev/null | tr -d '\\0' | wc -c")? == "0");
    // What is beside it is there.
    ensure!(guest.run("dd if=/dev/vda bs=1M count=4 2>/dev/null | tr -d '\\0' | wc -c")? != "0");
    guest.run("blkdiscard /dev/vda")?;
    ensure!(held()? == 0, "{} bytes are left", held()?);
    same_bytes(&file, &zeroes)
}

/// The file of a running VM becomes shorter: its reads fail, and everything else goes on.
pub fn shrinks() -> Result<()> {
    let dir = dir("shrinks")?;
    let (file, other) = (dir.join("file"), dir.join("other"));
    numbered_file(&file, 16)?;
    numbered_file(&other, 1)?;
    let guest = GuestSpec::new("shrinks").drive(&file, false).drive(&other, false).boot()?;
    fs::File::options().write(true).open(&file)?.set_len(4 << 20)?;
    guest.run("dd if=/dev/vda of=/dev/null bs=1M count=4 2>/dev/null")?;
    let (_, code) = guest.try_run("dd if=/dev/vda of=/dev/null bs=4k skip=2048 count=1 2>/dev/null")?;
    ensure!(code != "0", "a read of what is gone succeeded");
    ensure!(guest.count("block_disk0", "execute_fails")? > 0 && guest.count("block_disk0", "host_faults")? > 0);
    guest.run("dd if=/dev/vdb of=/dev/null bs=1M 2>/dev/null")?;
    ensure!(guest.count("block_disk1", "host_faults")? == 0);
    Ok(())
}

/// 1 MiB a second, of which the first is there: reading 4 takes at least 3 seconds.
pub fn limited() -> Result<()> {
    let file = dir("limited")?.join("file");
    numbered_file(&file, 8)?;
    let limit = json!({"bandwidth": {"size": 1 << 20, "refill_time": 1000}});
    let guest = GuestSpec::new("limited").drive(&file, false).drive_option("rate_limiter", limit).boot()?;
    let start = Instant::now();
    guest.run("dd if=/dev/vda of=/dev/null bs=64k skip=32 count=64 iflag=direct 2>/dev/null || dd if=/dev/vda of=/dev/null bs=64k skip=32 count=64 2>/dev/null")?;
    ensure!(start.elapsed() > Duration::from_millis(2500), "4 MiB in {:?}", start.elapsed());
    ensure!(guest.count("block_disk0", "rate_limiter_throttled_events")? > 0);
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
    // What is discarded reads as zeroes, and not as the image.
    guest.run("blkdiscard -o 409600 -l 819200 /dev/vda && sync")?;
    ensure!(guest.run("dd if=/dev/vda bs=4k skip=100 count=200 2>/dev/null | tr -d '\\0' | wc -c")? == "0");
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

/// A disk in a directory that several nodes could mount: held while its guest runs, idle or not, and free after it.
pub fn shared() -> Result<()> {
    let dir = dir("shared")?;
    let (store, digest, _) = child(&dir, Mode::Persistent)?;
    let disk = dir.join("held");
    drop(Disk::create_shared(&disk, &store, &digest, &Holder::this_host()?)?);
    let lease = || -> Result<String> {
        let names =
            fs::read_dir(&disk)?.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
        let names: Vec<String> = names.collect::<Result<_, _>>()?;
        names.into_iter().find(|name| name.starts_with("lease.")).context("the disk has no lease")
    };
    let mut guest = GuestSpec::new("shared").drive(&disk, false).boot()?;
    let sum = overwrite(&guest)?;
    let idle = lease()?;
    until("an idle guest's lease to be renewed", Duration::from_secs(120), || Ok((lease()? != idle).then_some(())))?;
    let elsewhere = Holder::named("another-host")?;
    for refused in [Disk::open_shared(&disk, &elsewhere), Disk::take_over(&disk, &elsewhere)] {
        let said = refused.err().context("two hosts have one disk")?.to_string();
        ensure!(said.contains("is held by") || said.contains("sign of life"), "{said}");
    }
    ensure!(guest.run("dd if=/dev/vda bs=4k skip=100 count=200 2>/dev/null | md5sum")? == sum);
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")?;
    ensure!(lease()?.ends_with(".free"), "the lease is {} after the guest has ended", lease()?);
    ensure!(Disk::open_shared(&disk, &elsewhere)?.written() > 0, "nothing was kept");
    Ok(())
}
