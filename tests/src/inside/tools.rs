//! What scenarios need of the node: busybox, taps, big files.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use bedplate_lab::process::output;

/// Runs a busybox applet in the node; its output.
pub fn busybox(words: &[&str]) -> Result<String> {
    Ok(output(Command::new("/bin/busybox").args(words))?)
}

/// The device through which taps are made.
pub fn tun() -> Result<()> {
    busybox(&["mkdir", "-p", "/dev/net"])?;
    if !Path::new("/dev/net/tun").exists() {
        busybox(&["mknod", "/dev/net/tun", "c", "10", "200"])?;
    }
    Ok(())
}

/// A tap device, up, for whoever opens it; `address` such as `10.5.0.1/24`, or none.
pub fn tap(name: &str, address: Option<&str>) -> Result<()> {
    tun()?;
    busybox(&["tunctl", "-t", name])?;
    if let Some(address) = address {
        busybox(&["ip", "addr", "add", address, "dev", name])?;
    }
    busybox(&["ip", "link", "set", name, "up"])?;
    Ok(())
}

/// Takes a tap away, with its addresses.
pub fn remove_tap(name: &str) -> Result<()> {
    busybox(&["ip", "link", "del", name])?;
    Ok(())
}

/// Does `work` while there is a tap of this name and address.
pub fn with_tap(name: &str, address: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    tap(name, Some(address))?;
    let result = work();
    remove_tap(name)?;
    result
}

/// Writes a file of `mib` MiB in which every 8 bytes are different.
pub fn numbered_file(path: &Path, mib: u64) -> Result<()> {
    let mut file = std::io::BufWriter::new(File::create(path)?);
    for number in 0..mib << 17 {
        // An odd factor: distinct for distinct numbers, and no run of zeros.
        file.write_all(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())?;
    }
    Ok(file.flush()?)
}

/// Fails unless both files have the same bytes.
pub fn same_bytes(left: &Path, right: &Path) -> Result<()> {
    let (mut left_file, mut right_file) = (File::open(left)?, File::open(right)?);
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut position = 0;
    loop {
        let n = left_file.read(&mut a)?;
        if n == 0 {
            ensure!(right_file.read(&mut b)? == 0, "{} is longer than {}", right.display(), left.display());
            return Ok(());
        }
        right_file.read_exact(&mut b[..n])?;
        if let Some(at) = (0..n).find(|&i| a[i] != b[i]) {
            anyhow::bail!("{} and {} differ at byte {}", left.display(), right.display(), position + at);
        }
        position += n;
    }
}
