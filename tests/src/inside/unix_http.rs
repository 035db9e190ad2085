//! HTTP over a Unix socket, as a client of a VM's API that is not ours would speak it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

/// For an answer of a process on the same machine, however busy.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Sends one request; the status and the body of the answer.
pub fn request(socket: &Path, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
    let mut stream = UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("read the answer")?;
    let (head, body) =
        answer.split_once("\r\n\r\n").with_context(|| format!("an answer without a head: {answer:?}"))?;
    let status =
        head.split_whitespace().nth(1).and_then(|word| word.parse().ok()).context("an answer without a status")?;
    Ok((status, body.to_owned()))
}
