//! The least HTTP client: one GET, as a visitor of a page on a private network.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bedplate_lab::Network;

/// For a page of a few hundred bytes, also in an emulated VM in an emulated machine.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The body of the page `/` at `address` inside `network`.
pub fn get(network: &Network, address: SocketAddr) -> Result<String> {
    let mut stream = network.connect(address, TIMEOUT).with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET / HTTP/1.0\r\nHost: {}\r\nConnection: close\r\n\r\n", address.ip())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).with_context(|| format!("read the page at {address}"))?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a head")?;
    if head.split_whitespace().nth(1) != Some("200") {
        bail!("{address} answered {}", head.lines().next().unwrap_or_default());
    }
    Ok(body.to_owned())
}
