//! Telling the control node: who we are after every start, how things stand after every change.
//!
//! The control node may be away for as long as it likes; VMs go on, and this task tries again.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bedplate_api::client::{Client, ClientError, Endpoint};
use bedplate_api::error::ErrorKind;
use bedplate_api::node::{Ipv4Net, NodeStatus, Register, Registered};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::agent::{AgentHandle, Event};
use crate::files;
use crate::net::vms::local_address;

/// The first wait after a call that failed, doubled with each.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// The longest wait between calls that fail.
const MAX_WAIT: Duration = Duration::from_secs(15);
/// Changes within this time are told together.
const DEBOUNCE: Duration = Duration::from_millis(200);

/// Who reports, and to whom.
#[derive(Debug)]
pub struct Reporter {
    /// The control node.
    pub control: Client,
    /// The agent.
    pub agent: AgentHandle,
    /// MAC address of the interface that the machine booted from.
    pub mac: Option<String>,
    /// Where the agent listens.
    pub listen: SocketAddr,
    /// Keeps the VMs' network for a start without a control node.
    pub network_file: PathBuf,
    /// The VMs' network was given by hand and is not the control node's to choose.
    pub network_fixed: bool,
}

impl Reporter {
    /// Registers and reports for as long as the process lives.
    pub async fn run(self) {
        loop {
            let registered = self.register().await;
            self.report(&registered).await;
        }
    }

    /// Registers, however long it takes.
    async fn register(&self) -> Registered {
        let mut wait = FIRST_WAIT;
        let mut told = String::new();
        loop {
            match self.try_register().await {
                Ok(registered) => {
                    tracing::info!("registered at {} as {}", self.control.endpoint(), registered.name);
                    return registered;
                }
                Err(e) => say_once(&mut told, &format!("not registered yet: {e}")),
            }
            sleep(wait).await;
            wait = (wait * 2).min(MAX_WAIT);
        }
    }

    async fn try_register(&self) -> Result<Registered, ClientError> {
        let peer = self.peer().await;
        let address = match self.listen.ip() {
            ip if !ip.is_unspecified() => ip,
            _ => peer.and_then(local_address).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        };
        let status = NodeStatus::clone(&self.agent.status());
        let register = Register { id: status.id, mac: self.mac.clone(), address, port: self.listen.port(), status };
        let registered = self.control.register(&register).await?;
        self.take_network(registered.vm_network, peer).await;
        Ok(registered)
    }

    async fn take_network(&self, network: Ipv4Net, peer: Option<SocketAddr>) {
        if self.network_fixed {
            return;
        }
        if !crate::net::addresses::usable(network) {
            tracing::error!(
                "the control node names {}/{} for VMs, which has no room for any",
                network.address,
                network.prefix
            );
            return;
        }
        if let Err(e) = files::write_json(&self.network_file, &network) {
            tracing::warn!("{e}");
        }
        self.agent.send(Event::Network(network, peer)).await;
    }

    /// The control node's address.
    async fn peer(&self) -> Option<SocketAddr> {
        match self.control.endpoint() {
            Endpoint::Http(authority) => tokio::net::lookup_host(authority).await.ok()?.next(),
            Endpoint::Unix(_) => None,
        }
    }

    /// Reports until the control node wants a registration.
    async fn report(&self, registered: &Registered) {
        let most = Duration::from_secs(u64::from(registered.report_seconds.clamp(1, 3600)));
        let mut status = self.agent.watch();
        let mut wait = FIRST_WAIT;
        let mut told = String::new();
        loop {
            let now: Arc<NodeStatus> = status.borrow_and_update().clone();
            match self.control.report(now.id, &now).await {
                Ok(()) => {
                    if !told.is_empty() {
                        tracing::info!("the control node is back");
                        told.clear();
                    }
                    wait = FIRST_WAIT;
                    change(&mut status, most).await;
                }
                Err(e) if matches!(e.kind(), Some(ErrorKind::NotFound | ErrorKind::Unauthorized)) => {
                    tracing::info!("the control node does not know this node: {e}; registers again");
                    return;
                }
                Err(e) => {
                    say_once(&mut told, &format!("cannot report: {e}; VMs go on"));
                    sleep(wait).await;
                    wait = (wait * 2).min(MAX_WAIT);
                }
            }
        }
    }
}

/// Waits for a change and what follows on its heels, but no longer than `most`.
async fn change(status: &mut watch::Receiver<Arc<NodeStatus>>, most: Duration) {
    let changed = timeout(most, status.changed()).await;
    match changed {
        Ok(Ok(())) => sleep(DEBOUNCE).await,
        // The agent has ended; the process does so at any moment.
        Ok(Err(_)) => sleep(most).await,
        Err(_) => {}
    }
}

/// The same trouble is said once, not with every try.
fn say_once(told: &mut String, message: &str) {
    if told != message {
        tracing::warn!("{message}");
        message.clone_into(told);
    }
}
