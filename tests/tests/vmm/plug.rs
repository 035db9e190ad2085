//! Devices that come and go while the guest runs. Nothing is typed in the guest to make it see them.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bedplate_images::Store;
use bedplate_images::disk::{Disk, Mode};
use bedplate_images::import::{self, Options};
use bedplate_tests::inside::DISK;
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::inside::tools::{busybox, remove_tap, tap};
use bedplate_tests::patience::until;
use serde_json::{Value, json};

use crate::network::tap_of_several;

/// For a guest to take or to let go of a device, in an emulated node.
const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 8;

/// An empty directory for the files of one scenario.
pub fn dir(name: &str) -> Result<PathBuf> {
    let dir = Path::new("/run/plug").join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// A file of [`MIB`] that begins with its name.
pub fn file(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    fs::write(&path, name)?;
    fs::File::options().write(true).open(&path)?.set_len(MIB << 20)?;
    Ok(path)
}

pub fn put_drive(guest: &Guest, id: &str, path: &Path, status: u16) -> Result<String> {
    let body = json!({"drive_id": id, "path_on_host": path, "is_root_device": false});
    guest.api("PUT", &format!("/drives/{id}"), &body.to_string(), status)
}

fn put_net(guest: &Guest, id: &str, tap: &str, status: u16) -> Result<String> {
    let body = json!({"iface_id": id, "host_dev_name": tap, "guest_mac": "02:00:00:00:07:02"});
    guest.api("PUT", &format!("/network-interfaces/{id}"), &body.to_string(), status)
}

pub fn delete(guest: &Guest, path: &str, status: u16) -> Result<String> {
    guest.api("DELETE", path, "", status)
}

/// Waits, in the guest, until a path is there.
pub fn appears(guest: &Guest, path: &str) -> Result<()> {
    guest.run(&format!("until [ -e {path} ]; do usleep 50000; done")).map(drop)
}

/// Waits, in the guest, until it is not.
pub fn disappears(guest: &Guest, path: &str) -> Result<()> {
    guest.run(&format!("while [ -e {path} ]; do usleep 50000; done")).map(drop)
}

pub fn json_of(guest: &Guest, path: &str) -> Result<Value> {
    Ok(serde_json::from_str(&guest.api("GET", path, "", 200)?)?)
}

/// Names of the devices that the VMM has.
fn devices(guest: &Guest) -> Result<Vec<String>> {
    let status = json_of(guest, "/bedplate/status")?;
    Ok(status["devices"].as_object().context("no devices")?.keys().cloned().collect())
}

pub fn ids(guest: &Guest, section: &str, id: &str) -> Result<Vec<String>> {
    let config = json_of(guest, "/vm/config")?;
    let entries = config[section].as_array().cloned().unwrap_or_default();
    Ok(entries.iter().filter_map(|entry| entry[id].as_str().map(str::to_owned)).collect())
}

pub fn is_gone(guest: &Guest, name: &str) -> Result<()> {
    until(&format!("{name} to be gone"), PATIENCE, || Ok((!devices(guest)?.iter().any(|n| n == name)).then_some(())))
}

/// What the VMM has open, by kind, in a form that two moments can be compared by.
pub fn open_files(guest: &mut Guest) -> Result<Vec<String>> {
    let dir = Path::new("/proc").join(guest.process().pid().to_string()).join("fd");
    // One that is closed meanwhile is none of them.
    let targets = fs::read_dir(dir)?.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let kind = |target: PathBuf| target.to_string_lossy().split(":[").next().unwrap_or_default().to_owned();
    let mut all: Vec<_> = targets.map(kind).collect();
    all.sort();
    Ok(all)
}

/// Waits until the VMM has nothing open but what it had. The connection of a request is closed soon after its answer.
pub fn closes(guest: &mut Guest, before: &[String]) -> Result<()> {
    let mut after = Vec::new();
    let closed = until("everything to be closed", PATIENCE, || {
        after = open_files(guest)?;
        Ok((after == before).then_some(()))
    });
    closed.with_context(|| format!("open before: {before:?}, and after: {after:?}"))
}

pub fn threads(guest: &mut Guest) -> Result<usize> {
    Ok(fs::read_dir(Path::new("/proc").join(guest.process().pid().to_string()).join("task"))?.count())
}

/// The device number behind a path in `/sys`.
fn slot(guest: &Guest, path: &str) -> Result<String> {
    guest.run(&format!("readlink -f {path} | grep -o '0000:00:[0-9a-f]*' | head -n 1"))
}

/// Fails unless the guest's interface has so many pairs of queues.
fn has_pairs(guest: &Guest, count: u8) -> Result<()> {
    let last = count - 1;
    guest.run(&format!("cd /sys/class/net/eth0/queues && [ -e tx-{last} ] && [ ! -e tx-{count} ]")).map(drop)
}

pub fn come_and_go() -> Result<()> {
    tap_of_several("tap-plug", "10.7.0.1/24")?;
    tap("tap-other", None)?;
    let result = with_taps();
    remove_tap("tap-plug")?;
    remove_tap("tap-other")?;
    result
}

fn with_taps() -> Result<()> {
    let dir = dir("come-and-go")?;
    let (one, two) = (file(&dir, "one")?, file(&dir, "two")?);
    let guest = GuestSpec::new("plug").cpus(2).drive(&file(&dir, "boot")?, true);
    let mut guest = guest.options(&["--visible", "/run/plug", "--tap", "tap-plug"]).boot()?;
    let (before, threads_before) = (open_files(&mut guest)?, threads(&mut guest)?);

    // A disk, read and written.
    put_drive(&guest, "data", &one, 204)?;
    appears(&guest, "/sys/block/vdb")?;
    ensure!(guest.run("cat /sys/block/vdb/size")? == (MIB << 11).to_string());
    ensure!(guest.run("head -c 3 /dev/vdb")? == "one");
    guest.run("echo written > /tmp/x && dd if=/tmp/x of=/dev/vdb bs=512 seek=8 conv=fsync 2>/dev/null")?;
    ensure!(fs::read(&one)?[4096..].starts_with(b"written"), "what the guest wrote is not in the file");
    let disk_slot = slot(&guest, "/sys/block/vdb")?;
    ensure!(ids(&guest, "drives", "drive_id")? == ["disk0", "data"]);

    // A network interface.
    put_net(&guest, "net", "tap-plug", 204)?;
    appears(&guest, "/sys/class/net/eth0")?;
    let ping = "ip link set eth0 up && ip addr add 10.7.0.2/24 dev eth0 && ping -c 2 -W 10 10.7.0.1 > /dev/null";
    guest.run(ping)?;
    busybox(&["ping", "-c", "2", "-W", "10", "10.7.0.2"])?;
    has_pairs(&guest, 2)?;
    let net_slot = slot(&guest, "/sys/class/net/eth0")?;
    ensure!(disk_slot != net_slot);

    // What cannot be.
    for (said, words) in [
        (put_drive(&guest, "data", &two, 400)?, "Device ID in use"),
        (put_drive(&guest, "same", &one, 400)?, "are the same file"),
        (put_drive(&guest, "none", &dir.join("none"), 400)?, "--visible"),
        (put_drive(&guest, "blind", Path::new(DISK), 400)?, "--visible"),
        (put_net(&guest, "net", "tap-plug", 400)?, "Device ID in use"),
        (put_net(&guest, "more", "tap-plug", 400)?, "tap-plug"),
        (delete(&guest, "/drives/none", 400)?, "Device not found"),
        (delete(&guest, "/network-interfaces/none", 400)?, "Device not found"),
    ] {
        ensure!(said.contains(words), "{words:?} is missing in {said}");
    }
    let other = json!({"iface_id": "other", "host_dev_name": "tap-other"});
    let said = guest.api("PUT", "/network-interfaces/other", &other.to_string(), 400)?;
    ensure!(said.contains("--tap tap-other"), "{said}");

    // Both go.
    delete(&guest, "/drives/data", 204)?;
    disappears(&guest, "/sys/block/vdb")?;
    is_gone(&guest, "block_data")?;
    delete(&guest, "/network-interfaces/net", 204)?;
    disappears(&guest, "/sys/class/net/eth0")?;
    is_gone(&guest, "net_net")?;
    ensure!(delete(&guest, "/drives/data", 400)?.contains("Device not found"));
    ensure!(
        ids(&guest, "drives", "drive_id")? == ["disk0"] && ids(&guest, "network-interfaces", "iface_id")?.is_empty()
    );
    ensure!(guest.run(&format!("ls /sys/bus/pci/devices | grep -c -e {disk_slot} -e {net_slot} || true"))? == "0");
    closes(&mut guest, &before)?;
    ensure!(threads(&mut guest)? == threads_before, "threads are left");

    // And come again, the disk with another file, in the same slots.
    put_drive(&guest, "data", &two, 204)?;
    appears(&guest, "/sys/block/vdb")?;
    ensure!(guest.run("head -c 3 /dev/vdb")? == "two" && slot(&guest, "/sys/block/vdb")? == disk_slot);
    let body = |pairs: u8| json!({"iface_id": "net", "host_dev_name": "tap-plug", "queue_pairs": pairs}).to_string();
    let said = guest.api("PUT", "/network-interfaces/net", &body(3), 400)?;
    ensure!(said.contains("2 of tap tap-plug are kept"), "{said}");
    guest.api("PUT", "/network-interfaces/net", &body(1), 204)?;
    appears(&guest, "/sys/class/net/eth0")?;
    // Several times: all that comes has to come over the only pair that is left.
    (0..4).try_for_each(|_| {
        guest
            .run("ip link set eth0 down")
            .and_then(|_| guest.run(&format!("ip addr flush dev eth0 && {ping}")))
            .map(drop)
    })?;
    has_pairs(&guest, 1)?;
    ensure!(slot(&guest, "/sys/class/net/eth0")? == net_slot);
    for device in ["block_disk0", "block_data", "net_net"] {
        ensure!(guest.count(device, "guest_faults")? + guest.count(device, "host_faults")? == 0, "{device} has faults");
    }
    ensure!(
        guest.run("dmesg | grep -c -e 'ACPI.*Error' -e 'ACPI BIOS' || true")? == "0",
        "the kernel dislikes our tables"
    );
    // The tap goes and is made again: to that one there is no way.
    delete(&guest, "/network-interfaces/net", 204)?;
    is_gone(&guest, "net_net")?;
    remove_tap("tap-plug")?;
    tap_of_several("tap-plug", "10.7.0.1/24")?;
    let said = put_net(&guest, "net", "tap-plug", 400)?;
    ensure!(said.contains("was deleted"), "{said}");
    // A disk that was there from the start goes, too.
    delete(&guest, "/drives/disk0", 204)?;
    disappears(&guest, "/sys/block/vda")?;
    is_gone(&guest, "block_disk0")?;
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}

/// A guest that stands still is asked; and one that lets go of what nobody wants back gets it again.
pub fn is_asked() -> Result<()> {
    let dir = dir("asked")?;
    let guest = GuestSpec::new("asked").drive(&file(&dir, "boot")?, false).options(&["--visible", "/run/plug"]);
    let guest = guest.boot()?;
    put_drive(&guest, "data", &file(&dir, "one")?, 204)?;
    appears(&guest, "/sys/block/vdb")?;
    let number = |path: &str| -> Result<String> {
        let slot = slot(&guest, path)?;
        Ok(u8::from_str_radix(slot.rsplit(':').next().unwrap_or_default(), 16)?.to_string())
    };

    // By itself.
    for path in ["/sys/block/vda", "/sys/block/vdb"] {
        let slot = number(path)?;
        guest.run(&format!("echo 0 > /sys/bus/pci/slots/{slot}/power"))?;
        appears(&guest, path)?;
    }
    ensure!(guest.run("head -c 3 /dev/vdb; head -c 4 /dev/vda")? == "oneboot");
    ensure!(devices(&guest)?.iter().filter(|name| name.starts_with("block_")).count() == 2);

    guest.api("PATCH", "/vm", r#"{"state": "Paused"}"#, 204)?;
    for _ in 0..2 {
        delete(&guest, "/drives/data", 204)?;
        let status = json_of(&guest, "/bedplate/status")?;
        ensure!(status["devices"]["block_data"]["unplugging"] == true, "{status}");
        ensure!(status["devices"]["block_disk0"].get("unplugging").is_none(), "{status}");
        ensure!(ids(&guest, "drives", "drive_id")? == ["disk0", "data"]);
    }
    let said = put_drive(&guest, "data", &dir.join("one"), 400)?;
    ensure!(said.contains("has not yet"), "{said}");
    guest.api("PATCH", "/vm", r#"{"state": "Resumed"}"#, 204)?;
    is_gone(&guest, "block_data")?;
    disappears(&guest, "/sys/block/vdb")?;

    // As Firecracker's clients do it: first the guest, then the VMM.
    put_drive(&guest, "data", &dir.join("one"), 204)?;
    appears(&guest, "/sys/block/vdb")?;
    let address = slot(&guest, "/sys/block/vdb")?;
    guest.run(&format!("echo 1 > /sys/bus/pci/devices/{address}.0/remove"))?;
    disappears(&guest, "/sys/block/vdb")?;
    delete(&guest, "/drives/data", 204)?;
    is_gone(&guest, "block_data")?;

    // A disk that is in use goes all the same: whoever asks has to see to that.
    put_drive(&guest, "data", &dir.join("one"), 204)?;
    appears(&guest, "/sys/block/vdb")?;
    guest
        .run("(dd if=/dev/vdb of=/dev/null bs=4k count=100000 2>/dev/null; sleep 100) < /dev/vdb > /dev/null 2>&1 &")?;
    delete(&guest, "/drives/data", 204)?;
    is_gone(&guest, "block_data")?;
    ensure!(guest.run("echo still here")? == "still here");
    Ok(())
}

/// What comes before the guest has a driver, or even a kernel, is found when it has. Linux hears that something is wanted
/// back before it knows its slots, and mostly forgets it: it has to be asked again.
pub fn before_it_listens() -> Result<()> {
    let dir = dir("early")?;
    let guest = GuestSpec::new("early").drive(&file(&dir, "boot")?, false).options(&["--visible", "/run/plug"]);
    let guest = guest.start()?;
    until("the API", PATIENCE, || Ok(guest.file("api.sock").exists().then_some(())))?;
    put_drive(&guest, "data", &file(&dir, "one")?, 204)?;
    delete(&guest, "/drives/disk0", 204)?;
    ensure!(
        ids(&guest, "drives", "drive_id")? == ["disk0", "data"],
        "the guest was quicker than this test: look at both"
    );
    guest.ready()?;
    until("the disk to go", PATIENCE, || {
        let is_there = ids(&guest, "drives", "drive_id")?.iter().any(|id| id == "disk0");
        // It goes between the two now and then, where the guest has heard the first time.
        if let Some(Err(error)) = is_there.then(|| delete(&guest, "/drives/disk0", 204)) {
            ensure!(format!("{error:#}").contains("Device not found"), "{error:#}");
        }
        Ok((!is_there).then_some(()))
    })?;
    is_gone(&guest, "block_disk0")?;
    guest.run("until [ \"$(head -c 3 /dev/vd? 2>/dev/null)\" = one ]; do usleep 100000; done")?;
    ensure!(guest.count("block_data", "guest_faults")? + guest.count("block_data", "host_faults")? == 0);
    Ok(())
}

/// As many as there are slots, at once, and all of them away at once.
pub fn fill_the_bus() -> Result<()> {
    let dir = dir("fill")?;
    let path = file(&dir, "one")?;
    let mut guest = GuestSpec::new("fill").cpus(2).options(&["--visible", "/run/plug"]).boot()?;
    let before = open_files(&mut guest)?;
    let put = |guest: &Guest, number: usize, status: u16| {
        let id = format!("d{number}");
        let body = json!({"drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": true});
        guest.api("PUT", &format!("/drives/{id}"), &body.to_string(), status)
    };
    // 31 slots, one of which the balloon has.
    const FREE: usize = 30;
    for round in 0..2 {
        for number in 0..FREE {
            put(&guest, number, 204).with_context(|| format!("disk {number} of round {round}"))?;
        }
        ensure!(put(&guest, FREE, 400)?.contains("no free PCI slot"));
        guest.run(&format!("until [ $(ls /sys/block | grep -c vd) = {FREE} ]; do usleep 100000; done"))?;
        guest.run("for d in /dev/vd?*; do [ $(head -c 3 $d) = one ] || exit 1; done")?;
        for number in 0..FREE {
            delete(&guest, &format!("/drives/d{number}"), 204)?;
        }
        guest.run("while ls /sys/block | grep -q vd; do usleep 100000; done")?;
        until("all disks to be gone", PATIENCE, || Ok((devices(&guest)? == ["balloon"]).then_some(())))?;
    }
    closes(&mut guest, &before)?;
    Ok(())
}

/// A copy-on-write disk keeps what was written when it goes, and lets go of its lock.
pub fn copy_on_write() -> Result<()> {
    let dir = dir("cow")?;
    let store = Store::create(dir.join("store"))?;
    let mut quiet = |_: u64, _: u64| ControlFlow::Continue(());
    let imported = import::import_disk(&store, Path::new(DISK), Options::default(), &mut quiet)?;
    let disk = dir.join("disk");
    drop(Disk::create(&disk, &store, &imported.digest, Mode::Persistent)?);
    let guest = GuestSpec::new("plug-cow").options(&["--visible", "/run/plug"]).boot()?;
    for round in ["first", "second"] {
        put_drive(&guest, "cow", &disk, 204)?;
        appears(&guest, "/sys/block/vda")?;
        if round == "second" {
            ensure!(guest.run("dd if=/dev/vda bs=4k skip=100 count=1 2>/dev/null | head -c 5")? == "first");
        }
        guest
            .run(&format!("echo {round} > /tmp/x && dd if=/tmp/x of=/dev/vda bs=4k seek=100 conv=fsync 2>/dev/null"))?;
        delete(&guest, "/drives/cow", 204)?;
        is_gone(&guest, "block_cow")?;
        disappears(&guest, "/sys/block/vda")?;
        ensure!(Disk::open(&disk)?.written() > 0, "nothing was kept");
    }
    Ok(())
}
