//! Listening: the Unix socket with its stale predecessor, and serving a router until it is time to stop.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::Router;
use axum::extract::ConnectInfo;
use axum::serve::Listener;
use bedplate_api::client::HEAD_TIMEOUT;
use bedplate_api::socket;
use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Connections of one listener at a time; more wait to be accepted.
const CONNECTIONS: u32 = 256;

/// Why nobody can be listened to.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process answers there.
    #[error("a control node already serves {0}: stop it first, or give this one another --socket")]
    Taken(PathBuf),
    /// Something that is not ours to remove.
    #[error("{0} is there and is not a socket: remove it, or give another --socket")]
    NotASocket(PathBuf),
    /// The socket cannot be made.
    #[error("cannot listen on {path}: {source}")]
    Unix {
        /// Where.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// A Unix socket that only its owner may open; its file goes when this is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Listens on `path`, making its directory. The socket of a process that was killed is replaced.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Unix { path: path.into(), source };
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(failed)?;
        }
        let listener = socket::listen(path).map_err(|e| match e.kind() {
            // The kernel's own word has a number, and means that something is there that is no socket.
            ErrorKind::AddrInUse if e.raw_os_error().is_none() => ListenError::Taken(path.into()),
            ErrorKind::AddrInUse => ListenError::NotASocket(path.into()),
            _ => failed(e),
        })?;
        Ok(Self { listener: UnixListener::from_std(listener).map_err(failed)?, path: path.into() })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Somebody may have removed it already, which is as good.
        let _ = fs::remove_file(&self.path);
    }
}

impl Listener for Socket {
    type Io = tokio::net::UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        Listener::accept(&mut self.listener).await
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// Where a connection comes from, where that is an address; handlers see it as [`ConnectInfo`].
pub trait Peer {
    /// The address.
    fn address(&self) -> Option<SocketAddr>;
}

impl Peer for SocketAddr {
    fn address(&self) -> Option<SocketAddr> {
        Some(*self)
    }
}

impl Peer for tokio::net::unix::SocketAddr {
    fn address(&self) -> Option<SocketAddr> {
        None
    }
}

/// Serves `router` until `stop`, then lets requests under way end.
pub async fn serve<L: Listener<Addr: Peer>>(listener: L, router: Router, stop: CancellationToken) {
    serve_within(listener, router, stop, (CONNECTIONS, HEAD_TIMEOUT)).await;
}

async fn serve_within<L: Listener<Addr: Peer>>(
    mut listener: L,
    router: Router,
    stop: CancellationToken,
    (connections, head): (u32, Duration),
) {
    let room = Arc::new(Semaphore::new(connections as usize));
    let mut http = Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(head);
    loop {
        let next = async {
            let place = Arc::clone(&room).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, (stream, peer)) = tokio::select! {
            () = stop.cancelled() => break,
            next = next => next,
        };
        let router = match peer.address() {
            Some(address) => router.clone().layer(Extension(ConnectInfo(address))),
            None => router.clone(),
        };
        let service = TowerToHyperService::new(router);
        let connection = http.serve_connection(TokioIo::new(stream), service).with_upgrades();
        let stop = stop.clone();
        tokio::spawn(async move {
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!("a connection ended early: {error}");
            }
            drop(place);
        });
    }
    // All places are free again when the last connection has ended; the semaphore is never closed.
    let _ = room.acquire_many(connections).await;
}

/// Each connection takes a file descriptor, and the usual limit of 1024 is there for programs that cannot count further.
pub fn raise_file_limit() -> io::Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn who_asks_nothing_is_let_go_and_then_others_get_their_turn() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let whoami = |ConnectInfo(peer): ConnectInfo<SocketAddr>| async move { format!("you are {}", peer.ip()) };
        let router = Router::new().route("/", get(whoami));
        let stop = CancellationToken::new();
        let limits = (2, Duration::from_millis(300));
        let server = tokio::spawn(serve_within(listener, router, stop.clone(), limits));
        let mut idle = TcpStream::connect(address).await.unwrap();
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"GET / HT").await.unwrap();
        let mut third = TcpStream::connect(address).await.unwrap();
        third.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let all = async {
            third.read_to_string(&mut answer).await.unwrap();
            let mut rest = Vec::new();
            let _ = idle.read_to_end(&mut rest).await;
            let _ = slow.read_to_end(&mut rest).await;
        };
        tokio::time::timeout(Duration::from_secs(60), all).await.expect("the idle connections are never closed");
        assert!(answer.ends_with("you are 127.0.0.1"), "{answer}");
        stop.cancel();
        server.await.unwrap();
    }

    #[test]
    fn the_limit_of_open_files_is_what_it_may_be() {
        raise_file_limit().unwrap();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/control.sock");
        let first = Socket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Socket::bind(&path), Err(ListenError::Taken(_))));
        drop(first);
        assert!(!path.exists());

        // A killed process leaves its socket behind.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(Socket::bind(&path).unwrap());

        fs::write(&path, "mine").unwrap();
        assert!(matches!(Socket::bind(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }
}
