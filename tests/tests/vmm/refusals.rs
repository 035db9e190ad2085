//! Bad input: one line that names the thing and the cause, code 1, an exit file, and nothing half-made.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use bedplate_tests::inside::BZIMAGE;
use bedplate_tests::inside::guest::GuestSpec;
use serde_json::json;

/// Fails unless the VMM refuses, and says all of `words`.
fn refuses(spec: GuestSpec, words: &[&str]) -> Result<()> {
    let said = spec.refused()?;
    for word in words {
        ensure!(said.contains(word), "{word:?} is missing in {said:?}");
    }
    Ok(())
}

pub fn kernels() -> Result<()> {
    let kernel = fs::read(BZIMAGE)?;
    for (name, content) in [
        ("empty", &[][..]),
        ("short", &kernel[..100]),
        ("truncated", &kernel[..kernel.len() / 2]),
        ("text", b"#!/bin/sh\necho no kernel\n"),
        ("elf-of-nothing", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0"),
    ] {
        let path = format!("/run/kernel-{name}");
        fs::write(&path, content)?;
        refuses(GuestSpec::new("kernel").kernel(&path), &[&path])?;
        fs::remove_file(&path)?;
    }
    refuses(GuestSpec::new("kernel").kernel("/run/not-there"), &["/run/not-there"])
}

pub fn configurations() -> Result<()> {
    let machine = |cpus: u32, mib: u64| {
        GuestSpec::new("machine").section("machine-config", json!({"vcpu_count": cpus, "mem_size_mib": mib}))
    };
    refuses(machine(0, 256), &["vcpu"])?;
    refuses(machine(200, 256), &["vcpu"])?;
    refuses(machine(1, 0), &["mem"])?;
    refuses(machine(1, 1 << 30), &["mem"])?;
    refuses(GuestSpec::new("json").config("{"), &["config.json"])?;
    refuses(GuestSpec::new("json").config(r#"{"boot-source": {"kernel": "x"}}"#), &["config.json", "kernel"])?;
    let long = "x".repeat(5000);
    refuses(GuestSpec::new("cmdline").cmdline(&long), &["boot_args", "command line", "2047"])?;
    let twice = GuestSpec::new("twice").section(
        "drives",
        json!([{"drive_id": "a", "path_on_host": "/images/disk.raw", "is_root_device": false, "is_read_only": true},
               {"drive_id": "a", "path_on_host": "/images/disk.raw", "is_root_device": false, "is_read_only": true}]),
    );
    refuses(twice, &["\"a\""])
}

pub fn host_things() -> Result<()> {
    refuses(GuestSpec::new("disk").drive(Path::new("/run/no-disk"), false), &["/run/no-disk"])?;
    refuses(GuestSpec::new("disk").drive(Path::new("/run"), false), &["/run"])?;
    // Not refused, as Firecracker does not: whole sectors of it are the disk, and the loss is said.
    fs::write("/run/odd-disk", [0; 1000])?;
    let mut guest = GuestSpec::new("odd-disk").drive(Path::new("/run/odd-disk"), false).boot()?;
    ensure!(guest.run("cat /sys/block/vda/size")? == "1");
    let said = fs::read_to_string(guest.file("stderr"))?;
    ensure!(said.contains("/run/odd-disk has 1000 bytes") && said.contains("512"), "{said:?}");
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")?;
    refuses(GuestSpec::new("tap").network("no-such-tap-name", "02:00:00:00:00:01"), &["no-such-tap-name"])?;
    // Without KVM: as on a machine that has none.
    fs::rename("/dev/kvm", "/dev/kvm.away")?;
    let result = refuses(GuestSpec::new("kvm"), &["/dev/kvm"]);
    fs::rename("/dev/kvm.away", "/dev/kvm")?;
    result
}
