//! Devices whose work another process does: Debian's own backends, in the node.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bedplate_lab::Process;
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::inside::tools::{busybox, numbered_file, remove_tap, same_bytes, tap};
use bedplate_tests::patience::until;
use serde_json::{Value, json};

use crate::net_backend::NetBackend;
use crate::network;

/// Debian 12's, of the package `qemu-system-common`.
pub const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";
/// Likewise: it serves disks, among others over vhost-user.
pub const STORAGE: &str = "/usr/bin/qemu-storage-daemon";

const PATIENCE: Duration = Duration::from_secs(60);

/// An empty directory of this test's own.
fn place(name: &str) -> Result<PathBuf> {
    let dir = Path::new("/run/vhost-user").join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// Starts a backend, and waits for its socket.
fn backend(mut command: Command, socket: &Path) -> Result<Process> {
    let name = command.get_program().to_string_lossy().into_owned();
    let said = socket.with_extension("log");
    let log = fs::File::create(&said)?;
    command.stdout(log.try_clone()?).stderr(log);
    let mut process = Process::start(&name, command)?;
    until("a backend's socket", PATIENCE, || {
        ensure!(process.is_running(), "{name} has ended: {}", fs::read_to_string(&said)?);
        Ok(socket.exists().then_some(()))
    })?;
    Ok(process)
}

/// Shares the directory `shared` of a place.
fn virtiofsd(dir: &Path) -> Result<(Process, PathBuf)> {
    let (socket, shared) = (dir.join("fs.sock"), dir.join("shared"));
    fs::create_dir_all(&shared)?;
    // Where it keeps its lock.
    fs::create_dir_all("/var/run")?;
    let mut command = Command::new(VIRTIOFSD);
    command.arg(format!("--socket-path={}", socket.display())).arg("-o").arg(format!("source={}", shared.display()));
    // The node lives in its initramfs, which nothing can be pivoted away from.
    command.args(["-o", "sandbox=chroot"]);
    Ok((backend(command, &socket)?, shared))
}

fn shares(dir: &Path) -> Value {
    json!([{"tag": "share", "socket": dir.join("fs.sock")}])
}

/// Of a device in `GET /bedplate/status`.
fn status(guest: &Guest, device: &str) -> Result<Value> {
    let status: Value = serde_json::from_str(&guest.api("GET", "/bedplate/status", "", 200)?)?;
    Ok(status["devices"][device].clone())
}

fn without_faults(guest: &Guest, device: &str) -> Result<()> {
    let status = status(guest, device)?;
    ensure!(status["guest_faults"] == 0 && status["host_faults"] == 0, "{status}");
    Ok(())
}

/// Has the driver let go of a device, which is reset, and take it again.
fn rebind(guest: &Guest, driver: &str) -> Result<()> {
    guest
        .run(&format!(
            "cd /sys/bus/virtio/drivers/{driver} && device=$(echo virtio*) && echo $device > unbind && \
             [ ! -e $device ] && echo $device > bind && [ -e $device ]"
        ))
        .map(drop)
}

/// Files go both ways, also after a reset, and by memory that was added.
pub fn file_system() -> Result<()> {
    let dir = place("fs")?;
    let (mut server, shared) = virtiofsd(&dir)?;
    fs::write(shared.join("word"), "from the node\n")?;
    numbered_file(&shared.join("numbers"), 16)?;
    let spec = GuestSpec::new("fs").cpus(2).section("filesystems", shares(&dir));
    let spec = spec.cmdline("memhp_default_state=online_kernel");
    let mut guest = spec.section("memory-hotplug", json!({"total_size_mib": 512})).boot()?;
    guest.run("mount -t virtiofs share /mnt")?;
    ensure!(guest.run("cat /mnt/word")? == "from the node");
    guest.run("echo from the guest > /mnt/answer && cp /mnt/numbers /mnt/copy && sync")?;
    ensure!(fs::read_to_string(shared.join("answer"))? == "from the guest\n");
    same_bytes(&shared.join("numbers"), &shared.join("copy"))?;
    let failed = guest.run("[ ! -e /mnt/none ] && ! cat /mnt/none 2> /dev/null && rm /mnt/copy && ls -1 /mnt")?;
    ensure!(failed == "answer\nnumbers\nword" && !shared.join("copy").exists(), "{failed}");

    guest.run("umount /mnt")?;
    rebind(&guest, "virtiofs")?;
    // What the guest began with is full, so that what it takes now is of the other.
    guest.api("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 256}"#, 204)?;
    until("256 MiB more", PATIENCE, || {
        let status: Value = serde_json::from_str(&guest.api("GET", "/hotplug/memory", "", 200)?)?;
        Ok((status["plugged_size_mib"] == 256).then_some(()))
    })?;
    guest.run("mount -t tmpfs -o size=600m none /run")?;
    for part in 0..5 {
        guest.run(&format!("dd if=/dev/zero of=/run/{part} bs=1M count=50 2>/dev/null"))?;
    }
    guest.run("mount -t virtiofs share /mnt && cp /mnt/numbers /mnt/again && sync && umount /mnt")?;
    same_bytes(&shared.join("numbers"), &shared.join("again"))?;
    without_faults(&guest, "filesystem_share")?;
    ensure!(server.is_running());

    let later = json!({"tag": "other", "socket": "/run/other.sock"}).to_string();
    let said = guest.api("PUT", "/bedplate/filesystems/other", &later, 400)?;
    ensure!(said.contains("a VM that runs cannot get a vhost-user device"), "{said}");
    let config: Value = serde_json::from_str(&guest.api("GET", "/vm/config", "", 200)?)?;
    ensure!(config["filesystems"][0]["tag"] == "share", "{config}");
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")?;
    // It has seen the end of its VM, which is the end of its work.
    server.wait(PATIENCE)?;
    Ok(())
}

/// Who serves a file system is killed: the guest is told, and so is everybody else; the rest goes on.
pub fn dies() -> Result<()> {
    let dir = place("dies")?;
    let (mut server, shared) = virtiofsd(&dir)?;
    fs::write(shared.join("word"), "from the node\n")?;
    let mut guest = GuestSpec::new("dies").section("filesystems", shares(&dir)).section("entropy", json!({})).boot()?;
    guest.run("mount -t virtiofs share /mnt && cat /mnt/word > /dev/null")?;
    server.kill()?;
    let told = until("the backend's end to be known", PATIENCE, || {
        let status = status(&guest, "filesystem_share")?;
        Ok((status["host_faults"] != 0).then_some(status))
    })?;
    let why = told["first_host_fault"].as_str().context("no reason")?;
    let socket = dir.join("fs.sock").display().to_string();
    ensure!(why.contains(&socket) && why.contains("has closed the connection"), "{why}");
    // DEVICE_NEEDS_RESET, beside all that the driver has set.
    let state = guest.run("cat /sys/bus/virtio/drivers/virtiofs/virtio*/status")?;
    ensure!(state == "0x0000004f", "{state}");
    // Whoever waits for a file waits; nobody else does.
    guest.begin("(timeout 5 cat /mnt/other > /dev/null 2>&1 &); head -c 4096 /dev/hwrng | wc -c")?;
    let (printed, code) = guest.finish()?;
    ensure!(printed == "4096" && code == "0", "{printed}");
    let asked = Instant::now();
    guest.api("PATCH", "/vm", r#"{"state": "Paused"}"#, 204)?;
    guest.api("PATCH", "/vm", r#"{"state": "Resumed"}"#, 204)?;
    ensure!(asked.elapsed() < Duration::from_secs(5), "the API took {:?}", asked.elapsed());
    guest.api("PUT", "/bedplate/stop", "", 204)?;
    guest.ended_well("stopped")?;

    // And with nobody there, no VM.
    let said = GuestSpec::new("nobody").section("filesystems", shares(&dir)).refused()?;
    ensure!(said.contains("file system share") && said.contains(&socket) && said.contains("start it before"), "{said}");
    Ok(())
}

/// Serves `disk` over vhost-user.
fn storage(dir: &Path, disk: &Path) -> Result<Process> {
    let socket = dir.join("disk.sock");
    let mut command = Command::new(STORAGE);
    command.arg("--blockdev").arg(format!("driver=file,node-name=file,filename={}", disk.display()));
    command.args(["--blockdev", "driver=raw,node-name=disk,file=file"]);
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,addr.type=unix,addr.path={},node-name=disk,writable=on,num-queues=2",
        socket.display()
    ));
    backend(command, &socket)
}

fn drives(dir: &Path, root: bool) -> Value {
    json!([{"drive_id": "d", "socket": dir.join("disk.sock"), "is_root_device": root}])
}

fn sum(words: &str) -> String {
    words.split(' ').next().unwrap_or_default().to_owned()
}

/// A disk is read, written, flushed, asked about, and gone.
pub fn disk() -> Result<()> {
    disk_of("")
}

/// The same for a guest with `words` on its command line.
pub fn disk_of(words: &str) -> Result<()> {
    let dir = place("disk")?;
    let file = dir.join("disk.raw");
    numbered_file(&file, 16)?;
    let mut server = storage(&dir, &file)?;
    let spec = GuestSpec::new("storage").cpus(2).cmdline(words).section("drives", drives(&dir, false));
    let mut guest = spec.section("entropy", json!({})).boot()?;
    let theirs = |guest: &Guest| Ok::<_, anyhow::Error>(sum(&guest.run("md5sum /dev/vda")?));
    let ours = || Ok::<_, anyhow::Error>(sum(&busybox(&["md5sum", &file.to_string_lossy()])?));
    ensure!(theirs(&guest)? == ours()?, "read");
    ensure!(guest.run("ls -1 /sys/block/vda/mq")? == "0\n1");
    for round in 0..2 {
        guest.run("dd if=/dev/urandom of=/tmp/noise bs=64k count=64 2>/dev/null")?;
        guest
            .run(&format!("dd if=/tmp/noise of=/dev/vda bs=64k seek={} conv=notrunc,fsync 2>/dev/null", 64 * round))?;
        guest.run("echo 3 > /proc/sys/vm/drop_caches")?;
        ensure!(theirs(&guest)? == ours()?, "written, round {round}");
        rebind(&guest, "virtio_blk")?;
    }
    without_faults(&guest, "block_d")?;

    // Debian 12's says what it said at its start, whatever has become of the file: the driver looks, and goes on.
    guest.api("PATCH", "/drives/d", r#"{"drive_id": "d"}"#, 204)?;
    ensure!(theirs(&guest)? == ours()?, "read after a PATCH");
    for (body, word) in [(r#""path_on_host": "p""#, "path_on_host"), (r#""rate_limiter": {}"#, "rate_limiter")] {
        let said = guest.api("PATCH", "/drives/d", &format!(r#"{{"drive_id": "d", {body}}}"#), 400)?;
        ensure!(said.contains(&format!("{word} and socket exclude each other")), "{said}");
    }
    let later = json!({"drive_id": "e", "socket": "/run/e.sock", "is_root_device": false}).to_string();
    let said = guest.api("PUT", "/drives/e", &later, 400)?;
    ensure!(said.contains("drive e: a VM that runs cannot get a vhost-user device"), "{said}");

    server.kill()?;
    until("the backend's end to be known", PATIENCE, || {
        Ok((status(&guest, "block_d")?["host_faults"] != 0).then_some(()))
    })?;
    let said = guest.api("PATCH", "/drives/d", r#"{"drive_id": "d"}"#, 400)?;
    ensure!(said.contains("disk.sock") && said.contains("closed the connection"), "{said}");
    guest.run("head -c 4096 /dev/hwrng > /dev/null")?;
    guest.api("PUT", "/bedplate/stop", "", 204)?;
    guest.ended_well("stopped")
}

/// The root device is another process's, and what asks it for too much is refused.
pub fn root_device() -> Result<()> {
    let dir = place("root")?;
    let file = dir.join("disk.raw");
    fs::copy(bedplate_tests::inside::DISK, &file)?;
    let _server = storage(&dir, &file)?;
    let guest = GuestSpec::new("storage-root").section("drives", drives(&dir, true)).boot()?;
    ensure!(guest.run("cat /proc/cmdline")?.ends_with("root=/dev/vda rw"));
    ensure!(guest.run("mount -t ext4 /dev/vda /mnt && ls -1 /mnt/boot")?.contains("vmlinuz"));
    drop(guest);
    let mut wrong = drives(&dir, false);
    wrong[0]["is_read_only"] = json!(true);
    let said = GuestSpec::new("wrong").section("drives", wrong).refused()?;
    ensure!(said.contains("\"d\": is_read_only and socket exclude each other"), "{said}");
    Ok(())
}

/// Frames go both ways, in bulk, before and after a reset.
pub fn network() -> Result<()> {
    let dir = place("net")?;
    tap("tap-u", Some("10.9.0.1/24"))?;
    let server = NetBackend::start(&dir.join("net.sock"), "tap-u")?;
    let interface = json!([{"iface_id": "eth0", "socket": dir.join("net.sock"), "guest_mac": "02:00:00:00:09:05"}]);
    let guest = GuestSpec::new("net-user").section("network-interfaces", interface);
    let mut guest = guest.cmdline("tiny.ip=10.9.0.2/24").boot()?;
    ensure!(guest.run("cat /sys/class/net/eth0/address")? == "02:00:00:00:09:05");
    network::in_bulk(&guest, 9, &["wget"])?;
    network::rebind(&guest, 9)?;
    network::in_bulk(&guest, 9, &["wget"])?;
    ensure!(server.carried() > 1000, "{} frames", server.carried());
    for counter in ["chains", "notifications", "interrupts", "guest_faults", "host_faults"] {
        ensure!(guest.count("net_eth0", counter)? == 0, "{counter}");
    }
    let limits = json!({"iface_id": "eth0", "rx_rate_limiter": {"ops": {"size": 1, "refill_time": 1000}}});
    let said = guest.api("PATCH", "/network-interfaces/eth0", &limits.to_string(), 400)?;
    ensure!(said.contains("rate limiters and socket exclude each other"), "{said}");
    // It can go, and its backend knows.
    guest.api("DELETE", "/network-interfaces/eth0", "", 204)?;
    server.wait()?;
    ensure!(guest.run("ls /sys/class/net")? == "lo");
    let again = json!({"iface_id": "eth1", "socket": dir.join("net.sock")}).to_string();
    let said = guest.api("PUT", "/network-interfaces/eth1", &again, 400)?;
    ensure!(said.contains("network interface eth1: a VM that runs cannot get a vhost-user device"), "{said}");
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")?;
    remove_tap("tap-u")
}
