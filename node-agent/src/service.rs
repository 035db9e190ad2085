//! The agent as a process: options, listeners, signals.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use bedplate_api::client::{Client, ClientError, Endpoint};
use bedplate_api::node::{Ipv4Net, MAX_SLOTS};
use bedplate_api::vmm::chunks::DEFAULT_WAIT_SECONDS;
use bedplate_images::{Store, StoreError};
use rustix::process::Resource;
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::{Agent, AgentConfig, AgentHandle, Event, SetupError};
use crate::files::FileError;
use crate::image::{CopyLimits, Images};
use crate::net::addresses;
use crate::report::Reporter;
use crate::server::{self, ListenError, Node, Token};
use crate::{files, host, identity};

/// What PID 1 sends the agent when the machine goes down; `SIGTERM` ends the agent and leaves the VMs running.
pub const LEAVE_SIGNAL: i32 = libc::SIGPWR;

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The state directory cannot be made or used.
    #[error("cannot use the state directory {}: {source}; make it writable, or name another with --state", path.display())]
    State {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The token's file cannot be read.
    #[error("cannot read the token file {}: {source}; name another with --token-file", path.display())]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The token is empty.
    #[error("the token is empty; give the one in the file node.token of the control node's state directory")]
    EmptyToken,
    /// Whoever can reach the port could start VMs.
    #[error("--listen lets the network in, so it needs --token or --token-file")]
    NoToken,
    /// The control node could never hand anything over.
    #[error("--control needs --listen: the control node calls this node back")]
    NoListen,
    /// The control node's client cannot be made.
    #[error("cannot prepare to talk to the control node: {0}; check --control")]
    Control(#[from] ClientError),
    /// The node's id cannot be kept.
    #[error(transparent)]
    Identity(#[from] FileError),
    /// The image store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The agent cannot be brought up.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// A listener cannot be opened.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Signals cannot be received.
    #[error("cannot listen for signals: {0}; raise the limit of open files, then start the agent again")]
    Signals(#[source] io::Error),
    /// The agent's own task was lost.
    #[error("the agent broke off: {0}; start it again, VMs go on meanwhile")]
    Lost(#[from] tokio::task::JoinError),
}

/// Hosts VMs on this machine.
#[derive(Debug, clap::Args)]
pub struct AgentArgs {
    /// Directory of everything that is kept
    #[arg(long, default_value = "/var/lib/bedplate")]
    pub state: PathBuf,
    /// Control node, such as http://10.77.0.1:7070
    #[arg(long)]
    pub control: Option<Endpoint>,
    /// The cluster's token
    #[arg(long, env = "BEDPLATE_TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    pub token: Option<String>,
    /// File with the cluster's token
    #[arg(long)]
    pub token_file: Option<PathBuf>,
    /// Address and port to serve on; needs a token
    #[arg(long)]
    pub listen: Option<SocketAddr>,
    /// Unix socket to serve on [default: STATE/node.sock]
    #[arg(long)]
    pub socket: Option<PathBuf>,
    /// VMM program [default: bedplate-vmm beside this program, else /bin/bedplate-vmm]
    #[arg(long)]
    pub vmm: Option<PathBuf>,
    /// How many VMs to provide
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_SLOTS)))]
    pub slots: u32,
    /// Image store [default: STATE/images]
    #[arg(long)]
    pub store: Option<PathBuf>,
    /// Network of the VMs, such as 10.78.1.0/24 [default: the control node names it; without one VMs have no network]
    #[arg(long, value_parser = addresses::parse)]
    pub vm_network: Option<Ipv4Net>,
    /// MAC address of the interface that this machine booted from
    #[arg(long, value_parser = mac)]
    pub mac: Option<String>,
    /// Seconds that a guest gets to power off before it is stopped
    #[arg(long, default_value_t = 60)]
    pub stop_seconds: u32,
    /// KiB a second that copies of images may take, as they are sent; what guests wait for comes before [default: no limit]
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u32).range(1..))]
    pub copy_rate: Option<u32>,
    /// Requests for chunks that the copy of an image has under way at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub copy_parallel: u8,
    /// Seconds that a guest waits for a chunk that is not here, before its request fails
    #[arg(long, value_name = "N", default_value_t = DEFAULT_WAIT_SECONDS, value_parser = clap::value_parser!(u32).range(1..))]
    pub chunk_wait_seconds: u32,
}

/// A MAC address in the one form that is kept and compared.
fn mac(text: &str) -> Result<String, &'static str> {
    identity::parse_mac(text).map(identity::format_mac).ok_or("expected six pairs of hex digits with colons")
}

impl AgentArgs {
    fn token(&self) -> Result<Option<Token>, ServiceError> {
        let secret = match (&self.token, &self.token_file) {
            (Some(token), _) => token.clone(),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path);
                text.map_err(|source| ServiceError::TokenFile { path: path.clone(), source })?
            }
            (None, None) => return Ok(None),
        };
        Token::new(secret.trim()).map(Some).ok_or(ServiceError::EmptyToken)
    }
}

/// Runs the agent until it is told to end.
///
/// # Errors
/// It cannot begin: each error names what is missing.
pub async fn run(args: AgentArgs) -> Result<(), ServiceError> {
    raise_file_limit();
    let unusable = |source| ServiceError::State { path: args.state.clone(), source };
    std::fs::create_dir_all(&args.state).map_err(unusable)?;
    // Paths in processes' arguments say whose they are, so there must be one way to write them.
    let state = args.state.canonicalize().map_err(unusable)?;
    let token = args.token()?;
    // Before anything is touched.
    match (&args.control, args.listen) {
        (_, Some(_)) if token.is_none() => return Err(ServiceError::NoToken),
        (Some(_), None) => return Err(ServiceError::NoListen),
        _ => {}
    }
    let id = identity::load_or_make(&state, args.mac.as_deref())?;
    let store = Store::create(args.store.clone().unwrap_or_else(|| state.join("images")))?;
    let control = match &args.control {
        Some(endpoint) => Some(Client::new(endpoint.clone(), token.as_ref().map(|t| t.reveal().to_owned()))?),
        None => None,
    };
    let config = AgentConfig {
        state: state.clone(),
        id,
        vmm: args.vmm.clone().unwrap_or_else(host::default_vmm),
        slots: args.slots,
        network_follows: control.is_some() || args.vm_network.is_some(),
        button_millis: u64::from(args.stop_seconds) * 1000,
        chunk_wait_seconds: args.chunk_wait_seconds,
    };
    let limits = CopyLimits {
        parallel: args.copy_parallel.into(),
        bytes_per_second: args.copy_rate.map(|rate| u64::from(rate) << 10),
    };
    // Before anything listens: who sends one has seen us, and expects it to count.
    let mut end = EndSignals::listen().map_err(ServiceError::Signals)?;
    let mut images = Images::new(store, &state, control.clone(), limits);
    if let Some(token) = &token {
        images = images.share(id, token.reveal().to_owned());
    }
    let (agent, handle) = Agent::open(config, images.clone())?;
    let listen = listen(&args, &state, token, Node { agent: handle.clone(), images }).await?;
    tracing::info!("node {id} keeps its state in {}", state.display());
    networks(&args, &state, control, &handle, listen).await?;
    let mut running = tokio::spawn(agent.run());
    tokio::select! {
        ended = &mut running => Ok(ended?),
        end = end.next() => match end {
            End::Leave => {
                handle.send(Event::Leave).await;
                Ok(running.await?)
            }
            End::Quit => {
                tracing::info!("the agent ends; VMs go on");
                Ok(())
            }
        }
    }
}

/// Opens the listeners and serves on them. Returns where TCP is served, if it is.
async fn listen(
    args: &AgentArgs,
    state: &Path,
    token: Option<Token>,
    node: Node,
) -> Result<Option<SocketAddr>, ServiceError> {
    let socket = args.socket.clone().unwrap_or_else(|| state.join("node.sock"));
    let unix = server::bind_unix(&socket)?;
    tracing::info!("serves on {}", socket.display());
    tokio::spawn(server::serve_unix(unix, server::router(node.clone(), None)));
    let Some(address) = args.listen else { return Ok(None) };
    let token = token.ok_or(ServiceError::NoToken)?;
    let tcp = server::bind_tcp(address).await?;
    let network = node.agent.network();
    let bound = tcp.local_addr().map_err(|source| ListenError::Tcp { address, source })?;
    tracing::info!("serves on {bound}");
    tokio::spawn(server::serve_tcp(tcp, server::router(node, Some(token)), network));
    Ok(Some(bound))
}

/// Begins with the network of VMs that is known, and with the control node, if there is one.
async fn networks(
    args: &AgentArgs,
    state: &Path,
    control: Option<Client>,
    agent: &AgentHandle,
    listen: Option<SocketAddr>,
) -> Result<(), ServiceError> {
    let network_file = state.join("network.json");
    let known = match args.vm_network {
        Some(network) => Some(network),
        // What the control node said last holds until it says something else.
        None if control.is_some() => files::read_json(&network_file).unwrap_or_default(),
        None => None,
    };
    if let Some(network) = known {
        agent.send(Event::Network(network, None)).await;
    }
    if let Some(control) = control {
        let listen = listen.ok_or(ServiceError::NoListen)?;
        let (mac, network_fixed) = (args.mac.clone(), args.vm_network.is_some());
        let reporter = Reporter { control, agent: agent.clone(), mac, listen, network_file, network_fixed };
        tokio::spawn(reporter.run());
    }
    Ok(())
}

/// Every VM takes descriptors of ours, and so does every connection: as many as may be had without asking anybody.
fn raise_file_limit() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(e) = rustix::process::setrlimit(Resource::Nofile, limit) {
        tracing::warn!("the limit of open files stays as it was: {e}");
    }
}

/// How the agent is told to end.
enum End {
    /// Alone.
    Quit,
    /// With every VM.
    Leave,
}

struct EndSignals {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
    leave: tokio::signal::unix::Signal,
}

impl EndSignals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            leave: signal(SignalKind::from_raw(LEAVE_SIGNAL))?,
        })
    }

    async fn next(&mut self) -> End {
        tokio::select! {
            _ = self.term.recv() => End::Quit,
            _ = self.int.recv() => End::Quit,
            _ = self.leave.recv() => End::Leave,
        }
    }
}
