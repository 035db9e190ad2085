//! Sockets between node and guest.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use bedplate_tests::inside::guest::{Guest, GuestSpec};
use serde_json::json;

const TIMEOUT: Duration = Duration::from_secs(60);

pub fn both_ways() -> Result<()> {
    let uds = "/run/guest-vsock";
    let _ = std::fs::remove_file(uds);
    let spec = GuestSpec::new("vsock").section("vsock", json!({"guest_cid": 3, "uds_path": uds}));
    let guest = spec.boot()?;
    guest_calls(&guest, uds)?;
    host_calls(&guest, uds)
}

/// A connection to host port 5000 arrives at the Unix socket with that suffix.
fn guest_calls(guest: &Guest, uds: &str) -> Result<()> {
    let path = format!("{uds}_5000");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path)?;
    guest.begin("probe vsock-connect 5000 hello")?;
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    ensure!(line == "hello\n", "the guest said {line:?}");
    stream.write_all(b"welcome\n")?;
    let (printed, code) = guest.finish()?;
    ensure!(printed == "welcome" && code == "0", "the guest got {printed:?}, code {code}");
    // Nobody listens there: the guest is told at once.
    let (said, code) = guest.try_run("probe vsock-connect 5001 hello")?;
    ensure!(code == "1", "a port where nobody listens: {said}");
    Ok(())
}

/// `CONNECT port` on the Unix socket reaches the guest's listener.
fn host_calls(guest: &Guest, uds: &str) -> Result<()> {
    guest.begin("probe vsock-serve 6000")?;
    guest.console().wait_for("listening", TIMEOUT)?;
    let mut stream = UnixStream::connect(uds)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"CONNECT 6000\n")?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let mut next = || lines.next().unwrap_or_else(|| Err(std::io::ErrorKind::UnexpectedEof.into()));
    let answer = next()?;
    ensure!(answer.starts_with("OK "), "the VMM answered {answer:?}");
    let text = "many words ".repeat(2000);
    writeln!(stream, "{text}")?;
    ensure!(next()? == text.to_uppercase(), "other bytes came back");
    stream.shutdown(std::net::Shutdown::Both)?;
    guest.console().wait_for("TINY end 0", TIMEOUT)?;
    Ok(())
}
