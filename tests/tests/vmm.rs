//! `bedplate-vmm` with real guests, in an emulated node. Each scenario is both halves: what the node does, and what is
//! typed in the guest.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bedplate_images::Store;
use bedplate_images::disk::{Disk, Mode};
use bedplate_images::import::{Options, import_disk};
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::inside::{BZIMAGE, DISK, ELF};
use bedplate_tests::suite::{self, NodeSpec, Scenario};
use rustix::process::Signal;
use serde_json::json;

/// For a guest that is up to do a thing, in an emulated node.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let node = NodeSpec { memory_mib: 3072, programs: &["bedplate-vmm"], patience: Duration::from_secs(300) };
    suite::main(
        "vmm",
        &node,
        &[
            Scenario { name: "boots_the_bzimage_as_shipped", run: || boots(BZIMAGE) },
            Scenario { name: "boots_the_elf_kernel", run: || boots(ELF) },
            Scenario { name: "runs_2_vcpus", run: || vcpus(2) },
            Scenario { name: "runs_8_vcpus", run: || vcpus(8) },
            Scenario { name: "ends_when_the_guest_reboots", run: ends_when_the_guest_reboots },
            Scenario { name: "sigterm_presses_the_power_button", run: sigterm_presses_the_power_button },
            Scenario { name: "pauses_resumes_and_stops_by_request", run: pauses_resumes_and_stops_by_request },
            Scenario { name: "writes_to_a_raw_disk_reach_the_file", run: writes_to_a_raw_disk_reach_the_file },
            Scenario { name: "a_disk_of_an_image_keeps_its_changes", run: a_disk_of_an_image_keeps_its_changes },
            Scenario { name: "entropy_comes_from_the_host", run: entropy_comes_from_the_host },
            Scenario { name: "vsock_connects_both_ways", run: vsock_connects_both_ways },
        ],
    )
}

fn boots(kernel: &str) -> Result<()> {
    let mut guest = GuestSpec::new("boots").kernel(kernel).cmdline("systemd.hostname=named").start()?;
    let facts = guest.ready()?;
    ensure!(facts.contains("name=named cpus=1"), "the guest says {facts:?}");
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}

fn vcpus(count: u8) -> Result<()> {
    let guest = GuestSpec::new("vcpus").cpus(count).boot()?;
    let online = guest.run("nproc")?;
    ensure!(online == count.to_string(), "{online} of {count} vCPUs are online");
    Ok(())
}

fn ends_when_the_guest_reboots() -> Result<()> {
    let mut guest = GuestSpec::new("reboots").boot()?;
    guest.begin("reboot -f")?;
    guest.ended_well("guest_reset")
}

/// The guest's init waits for the button's input event and powers off.
fn sigterm_presses_the_power_button() -> Result<()> {
    let mut guest = GuestSpec::new("button").boot()?;
    guest.process().signal(Signal::TERM);
    guest.console().wait_for("TINY power button", PATIENCE).with_context(|| guest.last_words())?;
    guest.ended_well("guest_power_off")
}

fn pauses_resumes_and_stops_by_request() -> Result<()> {
    let mut guest = GuestSpec::new("pauses").cpus(2).boot()?;
    guest.api("PATCH", "/vm", r#"{"state": "Paused"}"#, 204)?;
    guest.begin("echo went on")?;
    // That nothing comes cannot be awaited; that it comes after the resume, and the state between, can.
    let state = guest.api("GET", "/", "", 200)?;
    ensure!(state.contains("Paused"), "the API says {state}");
    guest.api("PATCH", "/vm", r#"{"state": "Resumed"}"#, 204)?;
    let (printed, _) = guest.finish()?;
    ensure!(printed == "went on", "the guest printed {printed:?}");
    guest.api("PUT", "/bedplate/stop", "", 204)?;
    guest.ended_well("stopped")
}

fn writes_to_a_raw_disk_reach_the_file() -> Result<()> {
    let raw = Path::new("/tmp/raw.img");
    fs::File::create(raw)?.set_len(8 << 20)?;
    let mut guest = GuestSpec::new("raw").drive(raw, false).boot()?;
    guest.run("yes bedplate | head -c 1048576 | dd of=/dev/vda bs=64k seek=16 conv=fsync")?;
    let bytes = fs::read(raw)?;
    ensure!(bytes.len() == 8 << 20, "the file's length changed to {}", bytes.len());
    let written = &bytes[1 << 20..2 << 20];
    ensure!(written.chunks_exact(9).all(|line| line == b"bedplate\n"), "other bytes than written");
    ensure!(bytes[2 << 20..].iter().all(|byte| *byte == 0), "bytes behind those written changed");
    let (_, code) = guest.try_run("dd if=/dev/zero of=/dev/vda bs=64k seek=128 count=1")?;
    ensure!(code != "0", "a write past the end succeeded");
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")
}

/// The same image as a file and as a copy-on-write disk reads alike; what is written to the disk is there in the next VM,
/// and the image is as it was.
fn a_disk_of_an_image_keeps_its_changes() -> Result<()> {
    let store = Store::create("/tmp/store")?;
    let image = import_disk(&store, Path::new(DISK), Options::default(), &mut |_, _| ControlFlow::Continue(()))?.digest;
    let dir = Path::new("/tmp/disk");
    drop(Disk::create(dir, &store, &image, Mode::Persistent)?);
    let boot = || GuestSpec::new("cow").drive(Path::new(DISK), true).drive(dir, false).boot();
    let end = |mut guest: Guest| {
        guest.begin("poweroff -f")?;
        guest.ended_well("guest_power_off")
    };

    let guest = boot()?;
    guest.run("cmp /dev/vda /dev/vdb")?;
    guest.run("mkdir -p /mnt && mount -t ext4 /dev/vdb /mnt && echo kept > /mnt/change && umount /mnt")?;
    end(guest)?;

    let guest = boot()?;
    let kept = guest.run("mkdir -p /mnt && mount -t ext4 -o ro /dev/vdb /mnt && cat /mnt/change")?;
    ensure!(kept == "kept", "the file holds {kept:?}");
    let (_, code) = guest.try_run("umount /mnt; cmp -s /dev/vda /dev/vdb")?;
    ensure!(code != "0", "the write went into the image");
    end(guest)
}

fn entropy_comes_from_the_host() -> Result<()> {
    let guest = GuestSpec::new("entropy").section("entropy", json!({})).boot()?;
    let name = guest.run("cat /sys/class/misc/hw_random/rng_current")?;
    ensure!(name.starts_with("virtio_rng"), "the guest's source is {name:?}");
    let count = guest.run("head -c 4096 /dev/hwrng | wc -c")?;
    ensure!(count == "4096", "{count} bytes came");
    Ok(())
}

fn vsock_connects_both_ways() -> Result<()> {
    let socket = "/run/vsock";
    let listener = UnixListener::bind(format!("{socket}_1234"))?;
    let section = json!({"guest_cid": 3, "uds_path": socket});
    let guest = GuestSpec::new("vsock").section("vsock", section).boot()?;

    guest.begin("probe vsock-connect 1234 hello")?;
    let (mut client, _) = listener.accept()?;
    let mut line = String::new();
    BufReader::new(client.try_clone()?).read_line(&mut line)?;
    ensure!(line == "hello\n", "the guest sent {line:?}");
    client.write_all(b"welcome\n")?;
    drop(client);
    let (printed, code) = guest.finish()?;
    ensure!(printed == "welcome" && code == "0", "the guest printed {printed:?}, {code}");

    guest.begin("probe vsock-serve 77")?;
    guest.console().wait_for("listening", PATIENCE).with_context(|| guest.last_words())?;
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"CONNECT 77\n")?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let accepted = lines.next().context("the VMM closed")??;
    ensure!(accepted.starts_with("OK "), "the VMM answered {accepted:?}");
    stream.write_all(b"over here\n")?;
    let answer = lines.next().context("the guest closed")??;
    ensure!(answer == "OVER HERE", "the guest answered {answer:?}");
    Ok(())
}
