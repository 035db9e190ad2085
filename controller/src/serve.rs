//! A whole control node: opens what it needs, starts its tasks, and ends them in order.
//!
//! Tasks and what each owns: the executor (plans and transactions), the pushes (connections to nodes), the routes (the
//! kernel's table), netboot (two sockets), and one per listener. They share [`Control`] and wake each other through it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FlockOperation;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::control::{Control, Options};
use crate::listen::{ListenError, Peer, Socket, serve};
use crate::netboot::{Netboot, NetbootError};
use crate::store::{Store, StoreError};
use crate::{executor, http, push, routes};

/// Requests under way get this long when the control node stops; consoles would go on for ever.
const GRACE: Duration = Duration::from_secs(2);

/// Why a control node cannot start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The state directory cannot be used.
    #[error("cannot use the state directory {path}: {source}")]
    State {
        /// Where.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Another process has it.
    #[error(
        "the state directory {0} belongs to a control node that is running: stop that one, or give another --state"
    )]
    Locked(PathBuf),
    /// The control node's memory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The repository.
    #[error("cannot open the image repository: {0}")]
    Images(#[from] bedplate_images::StoreError),
    /// The socket for people.
    #[error(transparent)]
    Socket(#[from] ListenError),
    /// An address for nodes or for the page.
    #[error("cannot listen on {address}: {source}")]
    Tcp {
        /// Where.
        address: SocketAddr,
        /// Cause.
        source: io::Error,
    },
    /// The page has no login.
    #[error("the page may be served on this machine only: {0} is not a loopback address")]
    PageNotLocal(SocketAddr),
    /// The boot service.
    #[error(transparent)]
    Netboot(#[from] NetbootError),
    /// A part has ended that should have gone on.
    #[error("{0} has ended unexpectedly; the control node stops, so that it is started again whole")]
    PartEnded(&'static str),
}

/// Where to listen, beside what is in [`Options`].
#[derive(Debug, Clone)]
pub struct Listen {
    /// For people.
    pub socket: PathBuf,
    /// For browsers on this machine.
    pub page: Option<SocketAddr>,
}

/// A control node whose listeners are open and whose tasks run.
pub struct Serving {
    /// The shared parts.
    pub control: Arc<Control>,
    /// Where nodes reach it: with the port that was chosen where 0 was asked for.
    pub node_address: Option<SocketAddr>,
    /// Where the page is.
    pub page_address: Option<SocketAddr>,
    tasks: JoinSet<&'static str>,
    stop: CancellationToken,
    // Kept last: nobody else may have the directory before all of the above is gone.
    _lock: File,
}

impl Serving {
    /// Opens everything, then starts everything.
    pub async fn start(mut options: Options, listen: Listen) -> Result<Self, ServeError> {
        let lock = lock_state(&options.state)?;
        let store = Store::open(&options.state.join("control.redb"))?;
        let images = bedplate_images::Store::create(options.state.join("images"))?;
        let nodes = bind(options.node_listen).await?;
        let page = match listen.page {
            Some(address) if !address.ip().is_loopback() => return Err(ServeError::PageNotLocal(address)),
            address => bind(address).await?,
        };
        let node_address = nodes.as_ref().map(|(_, address)| *address);
        let page_address = page.as_ref().map(|(_, address)| *address);
        options.node_listen = node_address;
        let socket = Socket::bind(&listen.socket)?;
        let control = Control::new(options, store, images)?;
        write_token(&control)?;
        let shelf = control.shelf.clone();
        // All of it can be made again, so what is in its way is said and no more.
        if let Err(error) = crate::control::blocking(move || shelf.tidy()).await {
            tracing::error!("the registry's files could not be tidied: {error}");
        }
        let netboot = Netboot::open(&control).await?;

        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let mut start = |name, task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
            tasks.spawn(async move {
                task.await;
                name
            });
        };
        start("the executor", Box::pin(executor::run(Arc::clone(&control), stop.clone())));
        start("pushing to nodes", Box::pin(push::run(Arc::clone(&control), stop.clone())));
        start("routing", Box::pin(routes::run(Arc::clone(&control), stop.clone())));
        start("the socket for people", listener(socket, http::people(Arc::clone(&control)), &stop));
        if let Some((nodes, _)) = nodes {
            start("the listener for nodes", listener(nodes, http::nodes(Arc::clone(&control)), &stop));
        }
        if let Some((page, _)) = page {
            start("the page", listener(page, http::page(Arc::clone(&control)), &stop));
        }
        if let Some(netboot) = netboot {
            start("netboot", Box::pin(netboot.run(stop.clone())));
        }
        Ok(Self { control, node_address, page_address, tasks, stop, _lock: lock })
    }

    /// Completes only when a part has ended that should not.
    pub async fn failed(&mut self) -> ServeError {
        match self.tasks.join_next().await {
            Some(Ok(name)) => ServeError::PartEnded(name),
            Some(Err(error)) if error.is_panic() => ServeError::PartEnded("a part of it (see above)"),
            Some(Err(_)) | None => ServeError::PartEnded("all of it"),
        }
    }

    /// Stops everything and waits until it has.
    pub async fn stop(mut self) {
        self.stop.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(GRACE, all).await.is_err() {
            self.tasks.shutdown().await;
        }
    }
}

fn listener<L: axum::serve::Listener<Addr: Peer>>(
    listener: L,
    router: axum::Router,
    stop: &CancellationToken,
) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(serve(listener, router, stop.clone()))
}

async fn bind(address: Option<SocketAddr>) -> Result<Option<(TcpListener, SocketAddr)>, ServeError> {
    let Some(address) = address else { return Ok(None) };
    let failed = |source| ServeError::Tcp { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok(Some((listener, bound)))
}

fn lock_state(path: &Path) -> Result<File, ServeError> {
    let failed = |source| ServeError::State { path: path.into(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    let open = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path.join("lock"));
    let file = open.map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ServeError::Locked(path.into())),
        Err(error) => Err(failed(error.into())),
    }
}

/// For agents that are services on this or another machine: machines that boot from here are told on their command line.
fn write_token(control: &Control) -> Result<(), ServeError> {
    let path = control.options.state.join("node.token");
    let draft = path.with_extension("new");
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
        file.write_all(control.token.as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, &path)
    };
    write().map_err(|source| ServeError::State { path: path.clone(), source })
}
