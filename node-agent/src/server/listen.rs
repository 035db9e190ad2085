//! Listening.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use bedplate_api::client::HEAD_TIMEOUT;
use bedplate_api::node::Ipv4Net;
use bedplate_api::socket;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::sleep;

use crate::net::addresses;

/// Connections of one listener at a time; more wait until one ends. An upgraded one is not counted any more.
const MAX_CONNECTIONS: usize = 256;
/// The wait after a connection could not be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// What a guest is told.
const TURNED_AWAY: &[u8] = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

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

/// Listens on a Unix socket that its owner alone may open. A socket that an agent left behind is replaced; one that
/// somebody answers, or what is no socket, stays and is in the way.
///
/// # Errors
/// See [`ListenError`].
pub fn bind_unix(path: &Path) -> Result<UnixListener, ListenError> {
    let failed = |source| ListenError::Unix { path: path.to_owned(), source };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed)?;
    }
    socket::listen(path).and_then(UnixListener::from_std).map_err(failed)
}

/// Serves on TCP for as long as the process lives. Guests on this node's own `network` are turned away at once: they
/// have no business here, and shall not take anybody's place.
pub async fn serve_tcp(listener: TcpListener, router: Router, network: watch::Receiver<Option<Ipv4Net>>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Ok(place) = places.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, peer)) if network.borrow().is_some_and(|n| is_guest(n, peer.ip())) => {
                tracing::warn!("guest {} was turned away", peer.ip());
                // A new socket has room for so few bytes. Whether they are read is the guest's affair.
                let _told = stream.try_write(TURNED_AWAY);
            }
            Ok((stream, _)) => attend(stream, router.clone(), place),
            Err(e) => not_accepted(&e).await,
        }
    }
}

/// Serves on a Unix socket for as long as the process lives.
pub async fn serve_unix(listener: UnixListener, router: Router) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Ok(place) = places.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => attend(stream, router.clone(), place),
            Err(e) => not_accepted(&e).await,
        }
    }
}

/// Serves one connection, which has its `place` until it ends.
fn attend<S>(stream: S, router: Router, place: OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    tokio::spawn(async move {
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
        let service = TowerToHyperService::new(router);
        if let Err(e) = http.serve_connection(TokioIo::new(stream), service).with_upgrades().await {
            tracing::debug!("a connection broke off: {e}");
        }
        drop(place);
    });
}

async fn not_accepted(error: &io::Error) {
    tracing::warn!("a connection could not be accepted: {error}");
    // Often for want of descriptors, which others have to give back first.
    sleep(ACCEPT_AGAIN).await;
}

fn is_guest(network: Ipv4Net, peer: IpAddr) -> bool {
    matches!(peer.to_canonical(), IpAddr::V4(peer) if addresses::is_for_vm(network, peer))
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[test]
    fn guests_are_told_from_others() {
        let network = addresses::parse("10.78.1.0/24").unwrap();
        let guest = |text: &str| is_guest(network, text.parse().unwrap());
        assert!(guest("10.78.1.7") && guest("::ffff:10.78.1.7"));
        assert!(!guest("10.78.1.1"), "the node itself");
        assert!(!guest("10.77.0.1") && !guest("fd00::1"));
    }

    #[tokio::test]
    async fn a_guest_is_refused_whatever_it_knows() {
        let listener = bind_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_told, network) = watch::channel(addresses::parse("127.0.0.0/29").ok());
        let serving = tokio::spawn(serve_tcp(listener, Router::new(), network));
        // Loopback's own address is that network's gateway, so that another one of loopback plays the guest.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let mut guest = socket.connect(address).await.unwrap();
        let mut answer = String::new();
        guest.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
        serving.abort();
    }
}
