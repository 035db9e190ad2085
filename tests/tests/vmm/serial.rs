//! The serial console in its other shapes.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bedplate_tests::inside::guest::{BOOT, GuestSpec};
use bedplate_tests::patience::until;

const SOCKET: &str = "/run/serial.sock";

/// Reads until `pattern` has come.
pub fn expect(stream: &mut UnixStream, pattern: &str) -> Result<()> {
    let (mut seen, mut buffer) = (String::new(), [0; 4096]);
    while !seen.contains(pattern) {
        match stream.read(&mut buffer).with_context(|| format!("waiting for {pattern:?}; came: {seen:?}"))? {
            0 => bail!("closed before {pattern:?}; came: {seen:?}"),
            n => seen.push_str(&String::from_utf8_lossy(&buffer[..n])),
        }
    }
    Ok(())
}

/// A client of the console at `socket`, which may still have to come.
pub fn connect(socket: &str) -> Result<UnixStream> {
    let stream = until(socket, Duration::from_secs(60), || Ok(UnixStream::connect(socket).ok()))?;
    stream.set_read_timeout(Some(BOOT))?;
    Ok(stream)
}

pub fn socket() -> Result<()> {
    let mut guest = GuestSpec::new("serial").options(&["--serial", &format!("socket:{SOCKET}")]).start()?;
    let mut first = connect(SOCKET)?;
    expect(&mut first, "TINY ready")?;
    // Who comes later gets what was said before.
    let mut second = connect(SOCKET)?;
    expect(&mut second, "TINY ready")?;
    first.write_all(b"echo from the first\n")?;
    expect(&mut first, "from the first\nTINY end 0")?;
    expect(&mut second, "from the first\nTINY end 0")?;
    drop(first);
    second.write_all(b"poweroff -f\n")?;
    guest.ended_well("guest_power_off")
}

pub fn log() -> Result<()> {
    const LIMIT: usize = 1 << 20;
    let (log, old) = ("/run/serial-of-guest.log", "/run/serial-of-guest.log.old");
    let _ = fs::remove_file(old);
    // What earlier guests said is kept, and counts: soon the file is full, is moved to one side and begins again.
    fs::write(log, vec![b'.'; LIMIT - 256])?;
    let mut guest = GuestSpec::new("log").options(&["--serial-log", log]).boot()?;
    guest.run("seq 1 100")?;
    guest.begin("poweroff -f")?;
    guest.ended_well("guest_power_off")?;
    let (before, after) = (fs::read_to_string(old)?, fs::read_to_string(log)?);
    ensure!(before.len() <= LIMIT && after.len() <= LIMIT, "{} and {} bytes of log", before.len(), after.len());
    let said = before.trim_start_matches('.').to_owned() + &after;
    ensure!(said.contains("TINY ready") && said.contains("\n99\n100\n"), "the log has {said:?}");
    Ok(())
}
