//! Files as persistent memory that come and go while the guest runs. Nothing is typed in the guest to make it see them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::inside::tools::{busybox, numbered_file, remove_tap, same_bytes, tap, with_tap};
use bedplate_tests::inside::{FIRMWARE, GRUB_DISK};
use bedplate_tests::patience::until;
use serde_json::json;

use crate::network::in_bulk;
use crate::plug::{appears, closes, delete, disappears, ids, is_gone, json_of, open_files, threads};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
const VISIBLE: [&str; 2] = ["--visible", "/run/pmem-plug"];

/// An empty directory for the files of one scenario.
fn dir(name: &str) -> Result<PathBuf> {
    let dir = Path::new(VISIBLE[1]).join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// A file of so many MiB of numbers.
fn file(dir: &Path, name: &str, mib: u64) -> Result<PathBuf> {
    let path = dir.join(name);
    numbered_file(&path, mib)?;
    Ok(path)
}

fn put(guest: &Guest, id: &str, path: &Path, read_only: bool, status: u16) -> Result<String> {
    let body = json!({"id": id, "path_on_host": path, "read_only": read_only});
    guest.api("PUT", &format!("/pmem/{id}"), &body.to_string(), status)
}

fn remove(guest: &Guest, id: &str) -> Result<()> {
    delete(guest, &format!("/pmem/{id}"), 204)?;
    is_gone(guest, &format!("pmem_{id}"))
}

/// Where the guest has the only such device that it has.
fn place(guest: &Guest) -> Result<String> {
    guest.run("cat /sys/bus/nd/devices/region*/resource")
}

/// Whether the VMM has a file mapped.
fn is_mapped(guest: &mut Guest, path: &Path) -> Result<bool> {
    let maps = fs::read_to_string(Path::new("/proc").join(guest.process().pid().to_string()).join("maps"))?;
    Ok(maps.contains(&*path.to_string_lossy()))
}

fn same_sum(guest: &Guest, path: &Path, mib: u64) -> Result<()> {
    let theirs = guest.run(&format!("dd if=/dev/pmem0 bs=1M count={mib} 2>/dev/null | md5sum"))?;
    let ours = busybox(&["md5sum", &path.to_string_lossy()])?;
    ensure!(theirs.split_whitespace().next() == ours.split_whitespace().next(), "{theirs} and not {ours}");
    Ok(())
}

pub fn come_and_go() -> Result<()> {
    let dir = dir("come-and-go")?;
    let (one, two) = (file(&dir, "one", 24)?, file(&dir, "two", 6)?);
    let mut guest = GuestSpec::new("pmem-plug").cpus(2).options(&VISIBLE).boot()?;
    let (before, threads_before) = (open_files(&mut guest)?, threads(&mut guest)?);

    // Read, and written through a file system with DAX.
    put(&guest, "data", &one, false, 204)?;
    appears(&guest, "/dev/pmem0")?;
    ensure!(guest.run("cat /sys/block/pmem0/size")? == (24 * MIB / 512).to_string());
    same_sum(&guest, &one, 24)?;
    guest.run("mke2fs -b 4096 /dev/pmem0 > /dev/null 2>&1 && mount -t ext4 -o dax /dev/pmem0 /mnt")?;
    ensure!(guest.run("grep pmem0 /proc/mounts")?.contains("dax"), "mounted without dax");
    guest.run("echo a word from the guest > /mnt/word && cp /bin/busybox /mnt/busybox && sync")?;
    ensure!(guest.run("/mnt/busybox cat /mnt/word")? == "a word from the guest");
    ensure!(fs::read(&one)?.windows(21).any(|window| window == b"a word from the guest"), "it is not in the file");
    ensure!(guest.count("pmem_data", "flush_count")? > 0);
    let limit = r#"{"id": "data", "rate_limiter": {"ops": {"size": 1000, "refill_time": 1000}}}"#;
    guest.api("PATCH", "/pmem/data", limit, 204)?;
    ensure!(ids(&guest, "pmem", "id")? == ["data"]);
    let first = place(&guest)?;
    refusals(&guest, &dir, &one)?;

    // It goes, with all that it had.
    guest.run("umount /mnt")?;
    ensure!(is_mapped(&mut guest, &one)?);
    remove(&guest, "data")?;
    disappears(&guest, "/dev/pmem0")?;
    ensure!(!is_mapped(&mut guest, &one)?, "the file is still mapped");
    ensure!(guest.run(&format!("devmem {first} 64"))? == "0xFFFFFFFFFFFFFFFF", "there is memory at {first}");
    ensure!(json_of(&guest, "/bedplate/status")?["exits"]["unknown_mmio"] != 0);
    ensure!(ids(&guest, "pmem", "id")?.is_empty());
    closes(&mut guest, &before)?;
    ensure!(threads(&mut guest)? == threads_before, "threads are left");
    ensure!(delete(&guest, "/pmem/data", 400)?.contains("Device not found"));

    // Others come to the same place: one that may only be read, and after it one that may be written.
    let copy = dir.join("copy");
    fs::copy(&two, &copy)?;
    put(&guest, "data", &two, true, 204)?;
    appears(&guest, "/dev/pmem0")?;
    same_sum(&guest, &two, 6)?;
    ensure!(place(&guest)? == first, "{} and not {first}", place(&guest)?);
    guest.try_run("dd if=/dev/zero of=/dev/pmem0 bs=4k count=4 conv=fsync 2>/dev/null")?;
    ensure!(guest.count("pmem_data", "refused_writes")? > 0);
    same_bytes(&two, &copy)?;
    remove(&guest, "data")?;
    disappears(&guest, "/dev/pmem0")?;
    put(&guest, "again", &one, false, 204)?;
    appears(&guest, "/dev/pmem0")?;
    ensure!(place(&guest)? == first);
    guest.run("mount -t ext4 -o dax /dev/pmem0 /mnt && echo another word > /mnt/word && umount /mnt")?;
    for counter in ["guest_faults", "host_faults", "refused_writes"] {
        ensure!(guest.count("pmem_again", counter)? == 0, "{counter}: {}", json_of(&guest, "/bedplate/status")?);
    }

    // One that is in use goes all the same: whoever asks has to see to that.
    guest.run("mount -t ext4 -o dax /dev/pmem0 /mnt")?;
    guest.run("/mnt/busybox sleep 1000 < /dev/pmem0 > /dev/null 2>&1 &")?;
    remove(&guest, "again")?;
    disappears(&guest, "/dev/pmem0")?;
    guest.try_run("umount /mnt")?;
    ensure!(guest.run("echo still here")? == "still here");
    closes(&mut guest, &before)?;
    ensure!(
        guest.run("dmesg | grep -c -e 'ACPI.*Error' -e 'ACPI BIOS' || true")? == "0",
        "the kernel dislikes our tables"
    );
    // Not by its own power: its kernel may have stumbled over a file system that lies nowhere any more, and wait for it for ever.
    guest.api("PUT", "/bedplate/stop", "", 204)?;
    guest.ended_well("stopped")
}

/// What cannot be, while `one` is there as `data`. Nothing of it leaves a trace.
fn refusals(guest: &Guest, dir: &Path, one: &Path) -> Result<()> {
    let (empty, huge, hidden) = (dir.join("empty"), dir.join("huge"), Path::new("/run/hidden-pmem"));
    fs::write(&empty, "")?;
    fs::File::create(&huge)?.set_len(1 << 40)?;
    fs::write(hidden, "hidden")?;
    let root = json!({"id": "root", "path_on_host": empty, "root_device": true}).to_string();
    for (said, words) in [
        (put(guest, "data", &empty, false, 400)?, "Device ID in use"),
        (put(guest, "same", one, false, 400)?, "are the same file"),
        (put(guest, "none", &dir.join("none"), false, 400)?, "No such file or directory"),
        (put(guest, "none", &dir.join("none"), false, 400)?, "--visible"),
        (put(guest, "hidden", hidden, false, 400)?, "--visible"),
        (put(guest, "dir", dir, false, 400)?, "is a directory; give a regular file"),
        (put(guest, "empty", &empty, false, 400)?, "has 0 bytes"),
        (put(guest, "huge", &huge, true, 400)?, "no room for 1048576 MiB"),
        (guest.api("PUT", "/pmem/root", &root, 400)?, "Attempt to add pmem as a root device"),
        (delete(guest, "/pmem/none", 400)?, "Device not found"),
    ] {
        ensure!(said.contains(words), "{words:?} is missing in {said}");
    }
    ensure!(ids(guest, "pmem", "id")? == ["data"]);
    Ok(())
}

/// One that was there from the start goes, another takes its place, and is watched as the first was.
pub fn one_for_another() -> Result<()> {
    let dir = dir("one-for-another")?;
    let (one, root, next) = (file(&dir, "one", 4)?, file(&dir, "root", 4)?, file(&dir, "next", 16)?);
    let pmems = json!([{"id": "one", "path_on_host": one}, {"id": "root", "path_on_host": root, "root_device": true}]);
    let mut guest = GuestSpec::new("pmem-other").options(&VISIBLE).section("pmem", pmems).boot()?;
    let resource = "cat /sys/bus/nd/devices/region0/resource";
    let first = guest.run(resource)?;
    ensure!(delete(&guest, "/pmem/root", 400)?.contains("Cannot unplug root device"));

    guest.api("PATCH", "/vm", r#"{"state": "Paused"}"#, 204)?;
    for _ in 0..2 {
        delete(&guest, "/pmem/one", 204)?;
        let status = json_of(&guest, "/bedplate/status")?;
        ensure!(status["devices"]["pmem_one"]["unplugging"] == true, "{status}");
        ensure!(ids(&guest, "pmem", "id")? == ["one", "root"]);
    }
    ensure!(put(&guest, "one", &next, false, 400)?.contains("has not yet"));
    ensure!(is_mapped(&mut guest, &one)?);
    guest.api("PATCH", "/vm", r#"{"state": "Resumed"}"#, 204)?;
    is_gone(&guest, "pmem_one")?;
    ensure!(!is_mapped(&mut guest, &one)? && is_mapped(&mut guest, &root)?);
    // It is nobody's any more.
    fs::File::options().write(true).open(&one)?.set_len(0)?;

    put(&guest, "next", &next, false, 204)?;
    appears(&guest, "/dev/pmem0")?;
    ensure!(guest.run(resource)? == first, "it is elsewhere");
    same_sum(&guest, &next, 16)?;
    guest.begin("while dd if=/dev/pmem0 of=/dev/null bs=1M 2>/dev/null; do :; done")?;
    fs::File::options().write(true).open(&next)?.set_len(4 * MIB)?;
    let (status, reason) = guest.ended()?;
    ensure!(status.code() == Some(1) && reason == "host_fault", "ended with {status}, {reason}");
    let exit = fs::read_to_string(guest.file("exit.json"))?;
    let words = format!("pmem next: {} has become shorter, from {} to {} bytes", next.display(), 16 * MIB, 4 * MIB);
    ensure!(exit.contains(&words), "{exit}");
    Ok(())
}

/// As many as there are slots, of one file, and all of them away at once; the first ones before the guest has a driver.
pub fn fill_the_bus() -> Result<()> {
    let path = file(&dir("fill")?, "one", 2)?;
    let guest = GuestSpec::new("pmem-fill").cpus(2).options(&VISIBLE).start()?;
    until("the API", PATIENCE, || Ok(guest.file("api.sock").exists().then_some(())))?;
    put(&guest, "p0", &path, true, 204)?;
    guest.ready()?;
    // 31 slots, one of which the balloon has.
    const FREE: usize = 30;
    for number in 1..FREE {
        put(&guest, &format!("p{number}"), &path, true, 204).with_context(|| format!("device {number}"))?;
    }
    ensure!(put(&guest, "more", &path, true, 400)?.contains("no free PCI slot"));
    guest.run(&format!("until [ $(ls /sys/block | grep -c pmem) = {FREE} ]; do usleep 100000; done"))?;
    guest.run("for d in /dev/pmem*; do cmp /dev/pmem0 $d || exit 1; done")?;
    for number in 0..FREE {
        delete(&guest, &format!("/pmem/p{number}"), 204)?;
    }
    until("all devices to be gone", PATIENCE, || Ok(ids(&guest, "pmem", "id")?.is_empty().then_some(())))?;
    guest.run("while ls /sys/block | grep -q pmem; do usleep 100000; done")?;
    put(&guest, "p0", &path, false, 204)?;
    appears(&guest, "/dev/pmem0")?;
    same_sum(&guest, &path, 2)
}

/// The node's kernel carries frames meanwhile, and is told.
pub fn beside_vhost() -> Result<()> {
    with_tap("tap-v", "10.9.0.1/24", with_vhost)
}

fn with_vhost() -> Result<()> {
    let dir = dir("vhost")?;
    let (start, later) = (file(&dir, "start", 2)?, file(&dir, "later", 4)?);
    let guest = GuestSpec::new("pmem-vhost").cpus(2).options(&VISIBLE).network("tap-v", "02:00:00:00:09:02");
    let guest = guest.network_option("vhost", json!(true)).cmdline("tiny.ip=10.9.0.2/24");
    let mut guest = guest.section("pmem", json!([{"id": "start", "path_on_host": start}])).boot()?;
    let ping = "ping -c 2 -W 10 10.9.0.1 > /dev/null";
    guest.run(ping)?;
    put(&guest, "later", &later, false, 204)?;
    appears(&guest, "/dev/pmem1")?;
    in_bulk(&guest, 9, &["wget"])?;
    for (id, path) in [("start", &start), ("later", &later)] {
        remove(&guest, id)?;
        ensure!(!is_mapped(&mut guest, path)?, "vhost keeps {id} mapped");
        guest.run(ping)?;
    }
    in_bulk(&guest, 9, &["wget"])?;
    for counter in ["guest_faults", "host_faults"] {
        ensure!(guest.count("net_eth0", counter)? == 0, "{counter}: {}", json_of(&guest, "/bedplate/status")?);
    }
    Ok(())
}

/// The node's kernel has no room for one more file in its table: it is refused, and everything goes on as before.
pub fn too_many_for_vhost() -> Result<()> {
    tap("tap-v", Some("10.9.0.1/24"))?;
    let result = with_places_in_vhost(2).and_then(|()| with_a_full_table());
    let as_before = with_places_in_vhost(64);
    remove_tap("tap-v")?;
    result.and(as_before)
}

/// Loads the node's vhost anew.
fn with_places_in_vhost(count: u8) -> Result<()> {
    ["vhost_net", "vhost_vsock", "vhost"].iter().try_for_each(|name| busybox(&["rmmod", name]).map(drop))?;
    // As the node's init loads them: their names begin with a number.
    let module = |name: &str| -> Result<String> {
        let all = fs::read_dir("/modules")?.flatten().map(|entry| entry.path().to_string_lossy().into_owned());
        all.into_iter().find(|path| path.ends_with(&format!("-{name}.ko"))).with_context(|| format!("no {name}"))
    };
    busybox(&["insmod", &module("vhost")?, &format!("max_mem_regions={count}")])?;
    busybox(&["insmod", &module("vhost_net")?])?;
    busybox(&["insmod", &module("vhost_vsock")?]).map(drop)
}

fn with_a_full_table() -> Result<()> {
    let dir = dir("full")?;
    let (one, two) = (file(&dir, "one", 2)?, file(&dir, "two", 2)?);
    let guest = GuestSpec::new("pmem-full").options(&VISIBLE).network("tap-v", "02:00:00:00:09:02");
    let mut guest = guest.network_option("vhost", json!(true)).cmdline("tiny.ip=10.9.0.2/24").boot()?;
    let ping = "ping -c 2 -W 10 10.9.0.1 > /dev/null";
    guest.run(ping)?;
    put(&guest, "one", &one, false, 204)?;
    appears(&guest, "/dev/pmem0")?;
    let before = open_files(&mut guest)?;
    let said = put(&guest, "two", &two, false, 400)?;
    ensure!(said.contains("network interface eth0") && said.contains("Argument list too long"), "{said}");
    ensure!(ids(&guest, "pmem", "id")? == ["one"] && !is_mapped(&mut guest, &two)?);
    closes(&mut guest, &before)?;
    guest.run(ping)?;
    remove(&guest, "one")?;
    put(&guest, "two", &two, false, 204)?;
    appears(&guest, "/dev/pmem0")?;
    same_sum(&guest, &two, 2)?;
    guest.run(ping)?;
    ensure!(guest.count("net_eth0", "guest_faults")? + guest.count("net_eth0", "host_faults")? == 0);
    Ok(())
}

/// The room is elsewhere then: between what firmware and system may use for BARs.
pub fn with_firmware() -> Result<()> {
    let path = file(&dir("firmware")?, "one", 4)?;
    let guest = GuestSpec::new("pmem-firmware").firmware(FIRMWARE).options(&VISIBLE);
    let guest = guest.drive(GRUB_DISK.as_ref(), true).boot()?;
    for _ in 0..2 {
        put(&guest, "data", &path, false, 204)?;
        appears(&guest, "/dev/pmem0")?;
        same_sum(&guest, &path, 4)?;
        remove(&guest, "data")?;
        disappears(&guest, "/dev/pmem0")?;
    }
    Ok(())
}
