//! Listening on a Unix socket, as each of our programs does.

use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};

/// `sun_path` has 108 bytes, and the last ends it.
const MAX_PATH: usize = 107;
/// Connections that may wait to be accepted: the kernel's own limit is lower on most machines.
const BACKLOG: i32 = 4096;

/// Listens, without blocking, at `path`, for the owner only. A socket file that a dead process left behind is replaced;
/// one that somebody answers is not.
///
/// # Errors
/// Somebody else listens there, or the host refuses.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let len = path.as_os_str().len();
    if len > MAX_PATH {
        let message = format!("a socket's path has at most {MAX_PATH} bytes, and this one has {len}");
        return Err(io::Error::new(ErrorKind::InvalidFilename, message));
    }
    remove_dead(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux makes the file with the mode of the socket: nobody else finds it open for a moment.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Removes the socket file `path`, if it is one.
pub fn remove(path: &Path) {
    if is_socket(path) {
        // Somebody else has done it.
        let _gone = std::fs::remove_file(path);
    }
}

/// Removes a socket file that nobody listens on. What is no socket stays, and is in the way.
///
/// # Errors
/// Somebody listens there.
pub fn remove_dead(path: &Path) -> io::Result<()> {
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(ErrorKind::AddrInUse, "another process listens there")),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused && is_socket(path) => std::fs::remove_file(path),
        Err(_) => Ok(()),
    }
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = listen(&path).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        assert!(listen(&path).unwrap_err().to_string().contains("another process"));
        drop(first);
        assert!(path.exists());
        listen(&path).unwrap();

        let file = dir.path().join("f");
        std::fs::write(&file, "precious").unwrap();
        assert!(listen(&file).is_err());
        assert!(file.exists());
        assert_eq!(listen(&dir.path().join("x".repeat(150))).unwrap_err().kind(), ErrorKind::InvalidFilename);
    }
}
