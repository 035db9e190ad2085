//! Listening on a Unix socket.

use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// `sun_path` has 108 bytes, and the last ends it.
const MAX_PATH: usize = 107;

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
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
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
    fn the_remedy_fits_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let remedy = |path: &Path| crate::files::remedy(&listen(path).unwrap_err());
        let path = dir.path().join("s");
        let _live = listen(&path).unwrap();
        assert!(remedy(&path).contains("end that process"));
        std::fs::write(dir.path().join("f"), "precious").unwrap();
        assert!(remedy(&dir.path().join("f")).contains("remove what is there"));
        assert!(remedy(&dir.path().join("x".repeat(150))).contains("shorter"));
        assert!(remedy(Path::new("/nowhere/s")).contains("a directory that exists"));
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = listen(&path).unwrap();
        assert!(listen(&path).unwrap_err().to_string().contains("another process"));
        drop(first);
        assert!(path.exists());
        listen(&path).unwrap();

        let file = dir.path().join("f");
        std::fs::write(&file, "precious").unwrap();
        assert!(listen(&file).is_err());
        assert!(file.exists());
    }
}
