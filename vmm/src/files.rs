//! Opening what somebody named. The path may lead to a FIFO or a device, and neither may keep us waiting.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use bedplate_devices::files::kind;

/// Opens a regular file for reading.
///
/// # Errors
/// The host refuses, or it is something else; the message says what.
pub fn read_regular(path: &Path) -> io::Result<File> {
    // Before it is opened, because that does things to some devices, and of what was opened, because paths change.
    regular(&fs::metadata(path)?)?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    regular(&file.metadata()?)?;
    Ok(file)
}

/// All of a regular file of at most `limit` bytes.
///
/// # Errors
/// The host refuses, it is something else, or it is longer.
pub fn read_all(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    read_regular(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::other(format!("this file has more than {limit} bytes")));
    }
    Ok(bytes)
}

fn regular(metadata: &fs::Metadata) -> io::Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    Err(io::Error::other(format!("this is {}, not a regular file", kind(metadata.file_type()))))
}

/// Opens a disk's file as it is going to be used, and closes it again. Of what is no regular file it only looks whether it
/// is there: opening does things to some devices.
///
/// # Errors
/// It is not there, or the host refuses.
pub fn try_disk(path: &Path, write: bool) -> io::Result<()> {
    if fs::metadata(path)?.is_file() {
        OpenOptions::new().read(true).write(write).custom_flags(libc::O_NONBLOCK).open(path)?;
    }
    Ok(())
}

/// Opens, without blocking, a file to append messages or counters to. A FIFO may have its reader later: it keeps what fits,
/// and what does not is lost, the end of a long line among it.
///
/// # Errors
/// The host refuses.
pub fn append_messages_to(path: &Path) -> io::Result<File> {
    // Open for reading, too, it has a reader always.
    let is_fifo = fs::metadata(path).is_ok_and(|there| there.file_type().is_fifo());
    OpenOptions::new().read(is_fifo).append(true).create(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// Opens, without blocking, a file to append to, or a FIFO that somebody reads: one that nobody reads must not stop us.
///
/// # Errors
/// The host refuses, or nobody reads the FIFO.
pub fn append_to(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().append(true).create(true).custom_flags(libc::O_NONBLOCK).open(path);
    file.map_err(|error| match fs::metadata(path) {
        Ok(there) if error.raw_os_error() == Some(libc::ENXIO) && there.file_type().is_fifo() => {
            io::Error::new(ErrorKind::BrokenPipe, "nobody reads this FIFO")
        }
        _ => error,
    })
}

/// What to do when a place to write to, or a socket to listen on, cannot be had.
pub fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::BrokenPipe => "start its reader first, or give a file",
        // `socket::listen` found a live one; from the host, something else is in the way.
        ErrorKind::AddrInUse if error.raw_os_error().is_none() => "end that process, or choose another path",
        ErrorKind::AddrInUse => "remove what is there, or choose another path",
        ErrorKind::InvalidFilename => "choose a shorter path",
        _ if error.raw_os_error() == Some(libc::EMFILE) => "permit more open files (`ulimit -n`)",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "make room there, or choose another place",
        _ => "give a path in a directory that exists and that you may write",
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use bedplate_api::socket::listen;

    use super::*;

    #[test]
    fn the_remedy_fits_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let remedy = |path: &Path| super::remedy(&listen(path).unwrap_err());
        let path = dir.path().join("s");
        let _live = listen(&path).unwrap();
        assert!(remedy(&path).contains("end that process"));
        std::fs::write(dir.path().join("f"), "precious").unwrap();
        assert!(remedy(&dir.path().join("f")).contains("remove what is there"));
        assert!(remedy(&dir.path().join("x".repeat(150))).contains("shorter"));
        assert!(remedy(Path::new("/nowhere/s")).contains("a directory that exists"));
    }

    #[test]
    fn a_fifo_is_written_to_only_while_somebody_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
        let error = append_to(&fifo).unwrap_err();
        assert_eq!(error.to_string(), "nobody reads this FIFO");
        assert!(remedy(&error).contains("reader"));
        let _reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&fifo).unwrap();
        append_to(&fifo).unwrap();
    }

    #[test]
    fn messages_wait_in_a_fifo_for_a_reader_and_the_rest_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        let mut fifo = append_messages_to(&path).unwrap();
        let lines = (0..100_000).take_while(|_| fifo.write_all(b"a line\n").is_ok()).count();
        assert!((100..100_000).contains(&lines), "{lines}");
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let mut text = [0; 14];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"a line\na line\n");
        let file = dir.path().join("file");
        append_messages_to(&file).unwrap().write_all(b"1").unwrap();
        append_messages_to(&file).unwrap().write_all(b"2").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"12");
    }

    #[test]
    fn a_disk_is_tried_as_it_is_used() {
        let dir = tempfile::tempdir().unwrap();
        assert!(try_disk(&dir.path().join("none"), false).is_err());
        assert!(try_disk(dir.path(), true).is_ok());
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
        assert!(try_disk(&fifo, true).is_ok(), "the start says what is wrong with it");
        fs::write(dir.path().join("disk"), "bytes").unwrap();
        try_disk(&dir.path().join("disk"), true).unwrap();
        assert_eq!(fs::read(dir.path().join("disk")).unwrap(), b"bytes");
    }

    #[test]
    fn only_regular_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
        let words = |path: &Path| read_regular(path).unwrap_err().to_string();
        assert_eq!(words(&fifo), "this is a FIFO, not a regular file");
        assert_eq!(words(dir.path()), "this is a directory, not a regular file");
        assert_eq!(words(Path::new("/dev/null")), "this is a character device, not a regular file");
    }
}
