//! Listening.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use axum::Router;
use rustix::fs::Mode;
use tokio::net::{TcpListener, UnixListener};

use crate::files;

/// Nobody can reach the agent.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// On TCP.
    #[error(
        "cannot listen on {address}: {source}; is another bedplate-node running, or the address not this machine's?"
    )]
    Tcp {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// On a Unix socket.
    #[error("cannot listen on {}: {source}", path.display())]
    Unix {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Listens on TCP.
///
/// # Errors
/// See [`ListenError`].
pub async fn bind_tcp(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).await.map_err(|source| ListenError::Tcp { address, source })
}

/// Listens on a Unix socket that its owner alone may open. One that an agent left behind is replaced: the state
/// directory's lock says that no agent is alive.
///
/// # Errors
/// See [`ListenError`].
pub fn bind_unix(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::Unix { path: path.to_owned(), source };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed)?;
    }
    files::remove(path).map_err(|e| failed(io::Error::other(e)))?;
    // The mode is right from the first moment on, not changed after the socket is there.
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    bound.map_err(failed)
}

/// Serves on TCP for as long as the process lives.
///
/// # Errors
/// None that is known: errors of single connections end those.
pub async fn serve_tcp(listener: TcpListener, router: Router) -> io::Result<()> {
    axum::serve(listener, router).await
}

/// Serves on a Unix socket for as long as the process lives.
///
/// # Errors
/// See [`serve_tcp`].
pub async fn serve_unix(listener: UnixListener, router: Router) -> io::Result<()> {
    axum::serve(listener, router).await
}
