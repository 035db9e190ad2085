//! The serial console in its other shapes.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bedplate_tests::inside::guest::{BOOT, GuestSpec};
use bedplate_tests::patience::until;

const SOCKET: &str = "/run/serial.sock";

/// Reads until `pattern` has come.
fn expect(stream: &mut UnixStream, pattern: &str) -> Result<()> {
    let (mut seen, mut buffer) = (String::new(), [0; 4096]);
    while !seen.contains(pattern) {
        match stream.read(&mut buffer).with_context(|| format!("waiting for {pattern:?}; came: {seen:?}"))? {
            0 => bail!("closed before {pattern:?}; came: {seen:?}"),
            n => seen.push_str(&String::from_utf8_lossy(&buffer[..n])),
        }
    }
    Ok(())
}

fn connect() -> Result<UnixStream> {
    let stream = UnixStream::connect(SOCKET).context("connect to the serial socket")?;
    stream.set_read_timeout(Some(BOOT))?;
    Ok(stream)
}

pub fn socket() -> Result<()> {
    let mut guest = GuestSpec::new("serial").options(&["--serial", &format!("socket:{SOCKET}")]).start()?;
    until("the serial socket", Duration::from_secs(60), || Ok(Path::new(SOCKET).exists().then_some(())))?;
    let mut first = connect()?;
    expect(&mut first, "TINY ready")?;
    // Who comes later gets what was said before.
    let mut second = connect()?;
    expect(&mut second, "TINY ready")?;
    first.write_all(b"echo from the first\n")?;
    expect(&mut first, "from the first\nTINY end 0")?;
    expect(&mut second, "from the first\nTINY end 0")?;
    drop(first);
    second.write_all(b"poweroff -f\n")?;
    guest.ended_well("guest_power_off")
}

pub fn log() -> Result<()> {
    let log = "/run/serial-of-guest.log";
    let _ = fs::remove_file(log);
    let mut guest = GuestSpec::new("log").options(&["--serial-log", log]).boot()?;
    guest.run("echo to be kept")?;
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")?;
    // That it never outgrows its limit is tested where a byte costs no exit: vmm/src/console/tests.rs.
    let text = fs::read_to_string(log)?;
    anyhow::ensure!(text.contains("TINY ready") && text.contains("to be kept"), "the log has {text:?}");
    Ok(())
}
