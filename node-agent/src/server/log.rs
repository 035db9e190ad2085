//! The end of a VM's console log.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use super::error::{Refusal, internal};
use crate::files;
use crate::vm::dir::VmDir;

/// Bytes that are shown.
const TAIL: u64 = 64 << 10;

/// The last bytes of the log. Nothing yet is an empty answer.
pub(super) async fn tail(dir: VmDir) -> Result<Response, Refusal> {
    let read = tokio::task::spawn_blocking(move || read_tail(&dir.serial_log())).await;
    let bytes = read.map_err(|e| internal(e.to_string()))?;
    let bytes = bytes.map_err(|e| internal(format!("the console log cannot be read: {e}")))?;
    Ok(([(CONTENT_TYPE, "text/plain; charset=utf-8")], bytes).into_response())
}

/// The VMM begins a new file when this one is full and keeps the one before, so the end may lie in both.
fn read_tail(path: &Path) -> io::Result<Vec<u8>> {
    let new = end_of(path, TAIL)?;
    let mut old = end_of(&path.with_added_extension("old"), TAIL - new.len() as u64)?;
    old.extend(new);
    Ok(old)
}

fn end_of(path: &Path, at_most: u64) -> io::Result<Vec<u8>> {
    let mut file = match files::open_plain(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(at_most)))?;
    let mut bytes = Vec::new();
    file.take(at_most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_end_is_put_together_from_two_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial.log");
        assert!(read_tail(&path).unwrap().is_empty());
        fs::write(&path, "new").unwrap();
        fs::write(dir.path().join("serial.log.old"), "x".repeat(100_000)).unwrap();
        let tail = read_tail(&path).unwrap();
        assert_eq!(tail.len() as u64, TAIL);
        assert!(tail.ends_with(b"xnew"));
    }
}
