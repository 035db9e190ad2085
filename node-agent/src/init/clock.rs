//! The time of day. A machine without a battery wakes in 1970; the control node knows better.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bedplate_api::client::Endpoint;
use rustix::time::{ClockId, Timespec, clock_settime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::console::say;

/// A clock that is off by less is left alone: the answer's date has whole seconds and took a moment.
const TOLERANCE: Duration = Duration::from_secs(5);
/// How long the question may take.
const LIMIT: Duration = Duration::from_secs(5);

/// Asks the control node for the time once and sets the clock if it is far off. Says whether there was an answer.
pub(super) async fn set_from(control: &Endpoint) -> bool {
    let Endpoint::Http(authority) = control else { return true };
    let Ok(Ok(Some(there))) = timeout(LIMIT, ask(authority)).await else { return false };
    let here = SystemTime::now();
    let off = here.duration_since(there).or_else(|_| there.duration_since(here)).unwrap_or_default();
    if off > TOLERANCE {
        match set(there) {
            Ok(()) => say(&format!("the clock was off by {} s and was set from the control node's", off.as_secs())),
            Err(e) => say(&format!("the clock is off by {} s and could not be set: {e}", off.as_secs())),
        }
    }
    true
}

/// The date in the answer to any request: a refusal has one too.
async fn ask(authority: &str) -> std::io::Result<Option<SystemTime>> {
    let mut stream = TcpStream::connect(authority).await?;
    stream.write_all(format!("HEAD / HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut head = Vec::new();
    stream.take(8192).read_to_end(&mut head).await?;
    Ok(date(&String::from_utf8_lossy(&head)))
}

fn date(head: &str) -> Option<SystemTime> {
    let value = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("date").then(|| value.trim())
    })?;
    httpdate::parse_http_date(value).ok()
}

fn set(time: SystemTime) -> std::io::Result<()> {
    let since = time.duration_since(UNIX_EPOCH).map_err(std::io::Error::other)?;
    let seconds = i64::try_from(since.as_secs()).map_err(std::io::Error::other)?;
    Ok(clock_settime(ClockId::Realtime, Timespec { tv_sec: seconds, tv_nsec: 0 })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_is_found_in_any_answer() {
        let head = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\ndate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n";
        assert_eq!(date(head), Some(UNIX_EPOCH + Duration::from_secs(784_111_777)));
        assert_eq!(date("HTTP/1.1 200 OK\r\ndate: yesterday\r\n\r\n"), None);
        assert_eq!(date(""), None);
    }
}
