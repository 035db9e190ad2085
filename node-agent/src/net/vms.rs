//! The network of this node's VMs: one bridge, one tap per VM, one DHCP server.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use bedplate_api::node::Ipv4Net;
use bedplate_api::{NodeId, VmId};
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::dhcp::leases::{Lease, Leases};
use super::dhcp::server;
use super::link::{Link, Links, NetError, forward_from};
use super::{addresses, tap};

/// The bridge.
pub const BRIDGE: &str = "bp0";

/// A VM's place on the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Its tap.
    pub tap: String,
    /// Its guest's MAC address.
    pub mac: [u8; 6],
}

/// The network, set up. Dropping it ends the DHCP server and leaves bridge and taps, which VMs go on using.
#[derive(Debug)]
pub struct VmNetwork {
    links: Links,
    bridge: Link,
    network: Ipv4Net,
    leases: watch::Sender<Option<Leases>>,
    _server: AbortOnDropHandle<()>,
}

impl VmNetwork {
    /// Sets up the bridge with the first host address of `network`, or takes over the one that is there. `taken` is told
    /// the MAC address of each guest that has taken its address.
    ///
    /// # Errors
    /// The kernel refuses, or another DHCP server serves on the bridge.
    pub async fn open(node: NodeId, network: Ipv4Net, taken: mpsc::Sender<[u8; 6]>) -> Result<Self, NetError> {
        let network = addresses::base(network);
        let links = Links::open().map_err(|e| NetError::new("open", "a netlink socket", &e))?;
        let bridge = links.bridge(BRIDGE, bridge_mac(node)).await?;
        let gateway = addresses::gateway(network);
        links.set_address(&bridge, Ipv4Net { address: gateway, ..network }).await?;
        forward_from(BRIDGE)?;
        let socket = server::bind(BRIDGE).map_err(|e| NetError::new("serve DHCP on", BRIDGE, &e))?;
        let (leases, known) = watch::channel(None);
        let serve = AbortOnDropHandle::new(tokio::spawn(server::serve(socket, known, taken)));
        Ok(Self { links, bridge, network, leases, _server: serve })
    }

    /// The network that it was opened with.
    pub const fn network(&self) -> Ipv4Net {
        self.network
    }

    /// Makes VM `id`'s tap, for `cpus` vCPUs, or finds it there, and puts it on the bridge; notes where `address` is.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn attach(&self, id: VmId, cpus: u8, address: Ipv4Addr) -> Result<Nic, NetError> {
        let nic = Nic { tap: tap::name(id), mac: tap::guest_mac(id) };
        tap::create(&nic.tap, cpus > 1)?;
        let link = self.links.find(&nic.tap).await?;
        let link = link.ok_or_else(|| NetError::new("use", &nic.tap, &"it was removed at once"))?;
        self.links.join(&link, &self.bridge).await?;
        self.links.set_neighbour(&self.bridge, address, nic.mac).await?;
        Ok(nic)
    }

    /// Removes VM `id`'s tap.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn detach(&self, id: VmId, address: Option<Ipv4Addr>) -> Result<(), NetError> {
        if let Some(address) = address {
            self.links.remove_neighbour(&self.bridge, address).await?;
        }
        self.links.remove(&tap::name(id)).await
    }

    /// Removes the taps of VMs that `keep` does not hold.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn sweep(&self, keep: &BTreeSet<VmId>) -> Result<(), NetError> {
        let keep: BTreeSet<String> = keep.iter().map(|id| tap::name(*id)).collect();
        for link in self.links.all().await? {
            if is_tap_name(&link.name) && !keep.contains(&link.name) {
                tracing::info!("removes tap {}, whose VM is gone", link.name);
                self.links.remove(&link.name).await?;
            }
        }
        Ok(())
    }

    /// Lets the DHCP server tell these VMs, by id, name and address, and no others.
    pub fn serve(&self, vms: impl Iterator<Item = (VmId, String, Ipv4Addr)>) {
        let by_mac: BTreeMap<_, _> =
            vms.map(|(id, hostname, address)| (tap::guest_mac(id), Lease { address, hostname })).collect();
        let leases = Leases { network: self.network, dns: name_servers(), by_mac };
        self.leases.send_if_modified(|held| {
            let changed = held.as_ref() != Some(&leases);
            *held = Some(leases);
            changed
        });
    }

    /// Lets packets for VMs that arrive where `peer` is reached from go on to the bridge.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn forward_from_peer(&self, peer: SocketAddr) -> Result<(), NetError> {
        let Some(IpAddr::V4(local)) = local_address(peer) else { return Ok(()) };
        for link in self.links.all().await? {
            if self.links.addresses(&link).await?.iter().any(|a| a.address == local) {
                forward_from(&link.name)?;
            }
        }
        Ok(())
    }
}

/// The address of this machine that `peer` sees.
pub fn local_address(peer: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr =
        if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    // Connecting a datagram socket sends nothing: it only chooses the route.
    socket.connect(peer).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Only names that we give: others may have taps that begin like ours.
fn is_tap_name(name: &str) -> bool {
    name.strip_prefix(tap::PREFIX)
        .is_some_and(|hex| hex.len() == 8 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)))
}

/// Locally administered like the guests', and never one of theirs.
fn bridge_mac(node: NodeId) -> [u8; 6] {
    let [.., a, b, c, d, e] = *node.as_uuid().as_bytes();
    [0x06, a, b, c, d, e]
}

/// The name servers of this machine that a guest can reach too.
fn name_servers() -> Vec<Ipv4Addr> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = text.lines().filter_map(|l| l.strip_prefix("nameserver")?.trim().parse::<Ipv4Addr>().ok());
    servers.filter(|a| !a.is_loopback()).collect()
}
