//! Files as persistent memory: `/dev/pmem0`, with and without `dax`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::inside::tools::{busybox, numbered_file, same_bytes};
use bedplate_tests::patience::until;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// An empty directory, and the path of a file in it.
fn place(name: &str) -> Result<PathBuf> {
    let dir = Path::new("/run/pmem").join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    Ok(dir.join("file"))
}

fn section(path: &Path, read_only: bool) -> Value {
    json!([{"id": "p", "path_on_host": path, "read_only": read_only}])
}

fn boot(name: &str, path: &Path, read_only: bool) -> Result<Guest> {
    GuestSpec::new(name).section("pmem", section(path, read_only)).boot()
}

fn contains(path: &Path, words: &[u8]) -> Result<bool> {
    Ok(fs::read(path)?.windows(words.len()).any(|window| window == words))
}

/// Reads, writes and syncs with `dax`; what is synced is in the host's file. Then two VMs share it, and change nothing.
pub fn keeps_what_is_synced() -> Result<()> {
    let file = place("keeps")?;
    // A page more than whole huge pages: the guest is told of the next one.
    numbered_file(&file, 24)?;
    fs::File::options().write(true).open(&file)?.set_len(24 * MIB + 4096)?;
    let mut guest = boot("pmem", &file, false)?;
    ensure!(guest.run("cat /sys/block/pmem0/size")? == (26 * MIB / 512).to_string());
    let sum = |guest: &Guest| guest.run("dd if=/dev/pmem0 bs=1M count=24 2>/dev/null | md5sum");
    // All of the file, and no more.
    let theirs = guest.run("dd if=/dev/pmem0 bs=4k count=6145 2>/dev/null | md5sum")?;
    let ours = busybox(&["md5sum", &file.to_string_lossy()])?;
    ensure!(theirs.split_whitespace().next() == ours.split_whitespace().next(), "{theirs} and not {ours}");
    // The file system leaves alone what is beyond the file's end.
    guest.run("mke2fs -b 4096 /dev/pmem0 6144 > /dev/null 2>&1 && mount -t ext4 -o dax /dev/pmem0 /mnt")?;
    let mounted = guest.run("grep pmem0 /proc/mounts")?;
    ensure!(mounted.contains("dax"), "mounted without dax: {mounted}");
    guest.run("echo a word from the guest > /mnt/word && cp /bin/busybox /mnt/busybox && sync && umount /mnt")?;
    ensure!(contains(&file, b"a word from the guest\n")?, "the file has not what was synced");
    ensure!(guest.count("pmem_p", "flush_count")? > 0 && guest.count("pmem_p", "flush_fails")? == 0);
    ensure!(guest.count("pmem_p", "guest_faults")? + guest.count("pmem_p", "host_faults")? == 0);
    api(&guest)?;
    let written = sum(&guest)?;
    guest.api("PUT", "/bedplate/stop", "", 204)?;
    guest.ended_well("stopped")?;

    let copy = file.with_extension("copy");
    fs::copy(&file, &copy)?;
    let guests = [boot("pmem-one", &file, true)?, boot("pmem-two", &file, true)?];
    for guest in &guests {
        ensure!(sum(guest)? == written, "another VM reads something else");
        guest.run("mount -t ext4 -o dax,ro /dev/pmem0 /mnt && cmp /bin/busybox /mnt/busybox")?;
        // A program whose code is the host's page cache.
        ensure!(guest.run("/mnt/busybox cat /mnt/word")? == "a word from the guest");
        guest.run("umount /mnt")?;
        ensure!(guest.count("pmem_p", "refused_writes")? == 0);
    }
    // The guest believes that it has written; the file stays as it is, and the VM goes on.
    guests[0].try_run("dd if=/dev/zero of=/dev/pmem0 bs=4k count=4 conv=fsync 2>/dev/null")?;
    ensure!(guests[0].count("pmem_p", "refused_writes")? > 0);
    ensure!(guests[0].run("echo alive")? == "alive");
    same_bytes(&file, &copy)
}

/// What the API has for it after the start.
fn api(guest: &Guest) -> Result<()> {
    let config: Value = serde_json::from_str(&guest.api("GET", "/vm/config", "", 200)?)?;
    ensure!(config["pmem"][0]["id"] == "p" && config["pmem"][0]["root_device"] == false, "{config}");
    let limit = r#"{"id": "p", "rate_limiter": {"ops": {"size": 1, "refill_time": 3000}}}"#;
    guest.api("PATCH", "/pmem/p", limit, 204)?;
    let said = guest.api("PATCH", "/pmem/q", r#"{"id": "q"}"#, 400)?;
    ensure!(said.contains(r#"no pmem device \"q\""#), "{said}");
    // One is let through, the other waits three seconds.
    guest.run("for i in 1 2; do dd if=/dev/pmem0 of=/dev/pmem0 bs=4k count=1 conv=notrunc,fsync 2>/dev/null; done")?;
    ensure!(guest.count("pmem_p", "rate_limiter_throttled_events")? > 0);
    guest.api("PATCH", "/pmem/p", &limit.replace(r#""size": 1"#, r#""size": 0"#), 204).map(drop)
}

/// The VM ends before the guest touches what is not there any more, and says which file it was. The VMM does not crash.
pub fn shrinks() -> Result<()> {
    let file = place("shrinks")?;
    numbered_file(&file, 16)?;
    let mut guest = boot("pmem-shrinks", &file, false)?;
    guest.run("dd if=/dev/pmem0 of=/dev/null bs=1M count=16 2>/dev/null")?;
    // To be written to, and to grow, is no reason.
    fs::File::options().write(true).open(&file)?.set_len(20 * MIB)?;
    fs::File::options().append(true).open(&file)?.write_all(b"more")?;
    guest.run("dd if=/dev/pmem0 of=/dev/null bs=1M count=16 2>/dev/null")?;
    // Readers of what will be gone.
    guest.begin("while dd if=/dev/pmem0 of=/dev/null bs=1M 2>/dev/null; do :; done")?;
    fs::File::options().write(true).open(&file)?.set_len(4 * MIB)?;
    let (status, reason) = guest.ended()?;
    ensure!(status.code() == Some(1) && reason == "host_fault", "ended with {status}, {reason}");
    let exit = fs::read_to_string(guest.file("exit.json"))?;
    let words = format!("pmem p: {} has become shorter, from {} to {} bytes", file.display(), 16 * MIB, 4 * MIB);
    ensure!(exit.contains(&words), "{exit}");
    Ok(())
}

/// The root device is named on the command line, by its number, and a program runs from it.
pub fn is_the_root_device() -> Result<()> {
    let (first, root) = (place("root")?, place("root-too")?);
    numbered_file(&first, 2)?;
    fs::File::create(&root)?.set_len(16 * MIB)?;
    let pmems = |read_only: bool| {
        json!([{"id": "data", "path_on_host": first},
               {"id": "root", "path_on_host": root, "root_device": true, "read_only": read_only}])
    };
    let guest = GuestSpec::new("pmem-root").section("pmem", pmems(false)).boot()?;
    ensure!(guest.run("cat /proc/cmdline")?.ends_with("root=/dev/pmem1 rw"));
    guest.run("mke2fs -b 4096 /dev/pmem1 > /dev/null 2>&1 && mount -t ext4 -o dax /dev/pmem1 /mnt")?;
    guest.run("mkdir /mnt/bin && cp /bin/busybox /mnt/bin/sh && sync && umount /mnt")?;
    drop(guest);
    let guest = GuestSpec::new("pmem-root").section("pmem", pmems(true)).boot()?;
    ensure!(guest.run("cat /proc/cmdline")?.ends_with("root=/dev/pmem1 ro"));
    let mount = "root=$(sed 's/.*root=\\([^ ]*\\) ro/\\1/' /proc/cmdline); mount -t ext4 -o dax,ro $root /mnt";
    let said = guest.run(&format!("{mount} && chroot /mnt /bin/sh -c 'echo from its root'"))?;
    ensure!(said == "from its root", "{said}");
    Ok(())
}

/// A buffer in such memory is none that another device reaches: an I/O error, and everything goes on.
pub fn is_no_buffer_for_other_devices() -> Result<()> {
    let (file, disk) = (place("buffer")?, place("buffer-disk")?);
    fs::File::create(&file)?.set_len(16 * MIB)?;
    numbered_file(&disk, 1)?;
    let copy = disk.with_extension("copy");
    fs::copy(&disk, &copy)?;
    let spec = GuestSpec::new("pmem-buffer").section("pmem", section(&file, false));
    let guest = spec.drive(&disk, false).boot()?;
    guest.run("mke2fs -b 4096 /dev/pmem0 > /dev/null 2>&1 && mount -t ext4 -o dax /dev/pmem0 /mnt")?;
    guest.run("cp /bin/busybox /mnt/file && sync")?;
    let said = guest.run("probe direct-from /mnt/file /dev/vda")?;
    ensure!(said.contains("refused: Input/output error"), "{said}");
    until("the disk's count", PATIENCE, || Ok((guest.count("block_disk0", "guest_faults")? > 0).then_some(())))?;
    guest.run("dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null")?;
    same_bytes(&disk, &copy).context("the disk was written to")
}
