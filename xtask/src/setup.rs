//! Debian packages that the commands need; installed where they are missing.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Beside those that the image recipes name.
const PACKAGES: [(&str, &str); 13] = [
    ("qemu-system-x86", "emulated machines"),
    ("qemu-system-common", "somebody else's backends of vhost-user devices"),
    ("ipxe", "first stage of network boot"),
    ("ovmf", "UEFI firmware of emulated machines"),
    ("iproute2", "network namespaces"),
    ("nftables", "a guest's way out of its machine"),
    ("gcc", "crates that compile C"),
    ("g++", "libFuzzer"),
    ("libc6-dev", "static programs"),
    ("docker-registry", "somebody else's registry to push images to"),
    ("xz-utils", "packed disk images"),
    ("minisign", "signatures of somebody else's making"),
    ("cpio", "what reads an initramfs that we wrote"),
];

/// Installs what is missing, in one go, and says so in one line.
pub fn run() -> Result<()> {
    let wanted = PACKAGES.iter().map(|(name, _)| *name).chain(bedplate_guest_images::TOOLS);
    let missing: Vec<&str> = wanted.filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("installing {} (apt-get)", missing.join(" "));
    apt(&["update"])?;
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    install.extend(&missing);
    apt(&install).with_context(|| format!("these packages are needed: {}", missing.join(" ")))
}

fn installed(package: &str) -> bool {
    let query = Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status}", package]).output();
    query.is_ok_and(|out| out.stdout == b"installed")
}

fn apt(args: &[&str]) -> Result<()> {
    let out = Command::new("apt-get")
        .arg("-q")
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .context("run apt-get: this needs Debian 12 or a system like it")?;
    if !out.status.success() {
        bail!("apt-get {} failed (as root?): {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}
