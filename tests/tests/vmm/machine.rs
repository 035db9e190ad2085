//! What the machine is: threads, processor templates, huge pages, and the boot timer; and what changes while it runs.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use bedplate_tests::patience::until;
use serde_json::json;

pub fn threads() -> Result<()> {
    let machine = json!({"vcpu_count": 4, "mem_size_mib": 256, "smt": true, "track_dirty_pages": true});
    let guest = GuestSpec::new("threads").section("machine-config", machine).boot()?;
    let siblings = guest.run("cat /sys/devices/system/cpu/cpu2/topology/thread_siblings_list")?;
    ensure!(siblings == "2-3", "the threads of the second core are {siblings}");
    ensure!(guest.run("cat /sys/devices/system/cpu/cpu2/topology/core_id")? == "1");
    Ok(())
}

pub fn templates() -> Result<()> {
    let flags = "for f in aes sse4_2; do grep -q -w $f /proc/cpuinfo && echo $f; done; true";
    let plain = GuestSpec::new("no-template").boot()?;
    let all = plain.run(flags)?;
    ensure!(all == "aes\nsse4_2", "this node's processor lacks what the test takes away, it has {all:?}");
    // Leaf 1, ecx: AES is bit 25, SSE 4.2 is bit 20. Of the register, fast strings are bit 0 and on anyway.
    let template = json!({
        "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0,
                             "modifiers": [{"register": "ecx", "bitmap": "0b0x_xxxx_xxxx_xxxx_xxxx_xxxx_xxxx"}]}],
        "msr_modifiers": [{"addr": "0x1a0", "bitmap": "0b1"}]
    });
    let guest = GuestSpec::new("template").section("cpu-config", template.clone()).boot()?;
    let left = guest.run(flags)?;
    ensure!(left == "sse4_2", "with the template there are {left:?}");
    fs::write("/run/template.json", template.to_string())?;
    let from_file = GuestSpec::new("template-file").section("cpu-config", json!("/run/template.json")).boot()?;
    ensure!(from_file.run(flags)? == "sse4_2");
    for (template, word) in [
        (json!({"cpuid_modifiers": [{"leaf": "0x12345", "subleaf": "0x0", "flags": 0, "modifiers": []}]}), "0x12345"),
        (json!({"msr_modifiers": [{"addr": "0xdead0000", "bitmap": "0b1"}]}), "0xdead0000"),
        (json!({"kvm_capabilities": ["99999"]}), "99999"),
        (json!({"reg_modifiers": []}), "reg_modifiers"),
    ] {
        let said = GuestSpec::new("bad-template").section("cpu-config", template).refused()?;
        ensure!(said.contains(word), "{word:?} is missing in {said:?}");
    }
    Ok(())
}

pub fn huge_pages() -> Result<()> {
    let reserve = "/proc/sys/vm/nr_hugepages";
    let huge = |name: &str, kind: &str| {
        let machine = json!({"vcpu_count": 1, "mem_size_mib": 256, "huge_pages": kind});
        GuestSpec::new(name).section("machine-config", machine)
    };
    fs::write(reserve, "0")?;
    let said = huge("no-huge", "2M").refused()?;
    ensure!(said.contains("128 of them"), "{said}");
    fs::write(reserve, "128")?;
    ensure!(free_huge_pages()? == 128, "the node cannot put huge pages aside");
    let guest = huge("huge", "2M").boot()?;
    let free = free_huge_pages()?;
    ensure!(free < 128, "the guest is in no huge page");
    ensure!(guest.run("dd if=/dev/zero of=/tmp/fill bs=1M count=64 2>/dev/null && echo filled")? == "filled");
    ensure!(free_huge_pages()? < free, "nor is what it has touched");
    drop(guest);
    until("all huge pages to be free", Duration::from_secs(60), || Ok((free_huge_pages()? == 128).then_some(())))?;
    fs::write(reserve, "0")?;
    let setting = "/sys/kernel/mm/transparent_hugepage/enabled";
    for (given, kind, expected) in
        [("always", "None", true), ("madvise", "None", false), ("madvise", "Transparent", true)]
    {
        fs::write(setting, given)?;
        let is_huge = in_transparent_ones(&mut huge("thp", kind).boot()?)?;
        ensure!(
            is_huge == expected,
            "the host's setting is {given}, huge_pages {kind}, and RAM is in huge pages: {is_huge}"
        );
    }
    fs::write(setting, "always")?;
    Ok(())
}

/// Whether some of the guest's RAM is mapped by 2 MiB.
fn in_transparent_ones(guest: &mut Guest) -> Result<bool> {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", guest.process().pid()))?;
    let mapped = smaps.lines().filter_map(|line| line.strip_prefix("ShmemPmdMapped:"));
    Ok(mapped
        .map(|size| size.trim().trim_end_matches(" kB").parse::<u64>())
        .sum::<Result<u64, std::num::ParseIntError>>()?
        > 0)
}

fn free_huge_pages() -> Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("HugePages_Free:")).context("no HugePages_Free")?;
    Ok(line.trim().parse()?)
}

pub fn boot_timer() -> Result<()> {
    let log = "/run/boot-timer.log";
    let options = ["--boot-timer", "--log-path", log, "--level", "Info", "--show-level"];
    let guest = GuestSpec::new("boot-timer").options(&options).boot()?;
    guest.run("devmem 0xc0000000 8 123")?;
    guest.run("devmem 0xc0000000 8 123")?;
    let text = fs::read_to_string(log)?;
    let times: Vec<_> = text.lines().filter(|line| line.contains("Guest-boot-time = ")).collect();
    ensure!(times.len() == 1 && times[0].contains(":vcpu0:INFO]"), "the log says {text:?}");
    let us: u64 = times[0].split_whitespace().nth(4).unwrap_or_default().parse()?;
    ensure!((1000..600_000_000).contains(&us), "{}", times[0]);
    Ok(())
}

/// A disk that grows, then is another file.
pub fn disks() -> Result<()> {
    fs::create_dir_all("/run/disks")?;
    for (name, mib) in [("one", 8), ("two", 24)] {
        fs::write(format!("/run/disks/{name}"), name.repeat(100))?;
        fs::File::options().write(true).open(format!("/run/disks/{name}"))?.set_len(mib << 20)?;
    }
    let guest = GuestSpec::new("patched").drive(Path::new("/run/disks/one"), false);
    let guest = guest.options(&["--visible", "/run/disks"]).boot()?;
    let sectors = |mib: u64| format!("until [ $(cat /sys/block/vda/size) = {} ]; do usleep 100000; done", mib << 11);
    let first = "dd if=/dev/vda bs=512 count=1 2>/dev/null | head -c 6";
    guest.run(&sectors(8))?;
    ensure!(guest.run(first)? == "oneone");
    fs::File::options().write(true).open("/run/disks/one")?.set_len(16 << 20)?;
    guest.api("PATCH", "/drives/disk0", r#"{"drive_id": "disk0", "path_on_host": "/run/disks/one"}"#, 204)?;
    guest.run(&sectors(16))?;
    guest.api("PATCH", "/drives/disk0", r#"{"drive_id": "disk0", "path_on_host": "/run/disks/two"}"#, 204)?;
    guest.run(&sectors(24))?;
    guest.run("echo 3 > /proc/sys/vm/drop_caches")?;
    ensure!(guest.run(first)? == "twotwo");
    guest.run("echo new > /tmp/new; dd if=/tmp/new of=/dev/vda bs=512 seek=100 conv=fsync 2>/dev/null")?;
    ensure!(fs::read("/run/disks/two")?[51200..51203] == *b"new", "what the guest wrote is not in the new file");
    let said = guest.api("PATCH", "/drives/disk0", r#"{"drive_id": "disk0", "path_on_host": "/run/none"}"#, 400)?;
    ensure!(said.contains("/run/none") && said.contains("--visible"), "{said}");
    Ok(())
}
