//! Bringing blank machines up on the VMM image: DHCP gives an address and says what to boot, TFTP hands over iPXE to
//! firmware that is not iPXE already, and HTTP does the rest ([`crate::http`]).
//!
//! A few sockets, one task for all. What to answer is decided in [`dhcp`] and [`tftp`], which know no socket; this module
//! reads, remembers and sends.

pub mod dhcp;
pub mod files;
pub mod lease;
pub mod router;
pub mod script;
#[cfg(test)]
mod tests;
pub mod tftp;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::sync::Arc;

use bedplate_api::control::NodeState;
use dhcproto::v4::Message;
use dhcproto::{Decodable, Decoder, Encodable, Encoder};
use rtnetlink::packet_route::address::AddressAttribute;
use socket2::{Domain, Protocol, Type};
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;

use crate::control::{Control, now};
use crate::records::NodeNumber;
use crate::store::StoreError;
use dhcp::{Client, Server};
use tftp::Files;

const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
const TFTP: u16 = 69;

/// Where Debian's package `ipxe` puts its files.
const IPXE: &str = "/usr/lib/ipxe";

/// Why machines cannot be booted from here.
#[derive(Debug, thiserror::Error)]
pub enum NetbootError {
    /// No such interface, or nothing that could be used as its address.
    #[error(
        "cannot boot machines on {interface}: it has no address in {network}/{prefix}; give it one (ip address add … dev {interface}) or another --node-network"
    )]
    NoAddress {
        /// As named.
        interface: String,
        /// The provisioning network.
        network: Ipv4Addr,
        /// Its prefix length.
        prefix: u8,
    },
    /// The kernel does not tell its addresses.
    #[error("cannot read this machine's network addresses: {0}")]
    Addresses(String),
    /// A socket that needs privileges, or that another server has.
    #[error("cannot serve {what} on {interface}: {source}; run as root, and stop any other {what} server there")]
    Socket {
        /// Protocol.
        what: &'static str,
        /// Where.
        interface: String,
        /// Cause.
        source: io::Error,
    },
    /// Firmware needs these before it can fetch anything by HTTP.
    #[error("cannot read {path}: {source}; install the package ipxe")]
    Ipxe {
        /// Which file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// The boot service, with its sockets open.
pub struct Netboot {
    control: Arc<Control>,
    server: Server,
    dhcp: UdpSocket,
    tftp: UdpSocket,
    files: Arc<Files>,
    /// Where this machine has IPv6; with the interface's index.
    router: Option<(UdpSocket, u32)>,
}

impl Netboot {
    /// Opens everything, where the control node was asked to boot machines.
    pub async fn open(control: &Arc<Control>) -> Result<Option<Self>, NetbootError> {
        let Some(interface) = control.options.netboot.clone() else { return Ok(None) };
        let network = control.options.node_network;
        let address = address_of(&interface, network.address, network.prefix).await?;
        let socket = |what, ip, port| {
            udp(&interface, SocketAddrV4::new(ip, port)).map_err(|source| NetbootError::Socket {
                what,
                interface: interface.clone(),
                source,
            })
        };
        let http = control.options.node_listen.map_or(0, |listen| listen.port());
        let server = Server { address, http: SocketAddr::from((address, http)), network };
        // Machines boot from one interface of one control node: the address is set once.
        let _ = control.boot_address.set(server.http);
        Ok(Some(Self {
            control: Arc::clone(control),
            // Requests come from machines without an address, to all.
            dhcp: socket("DHCP", Ipv4Addr::UNSPECIFIED, DHCP_SERVER)?,
            tftp: socket("TFTP", address, TFTP)?,
            files: Arc::new(ipxe()?),
            router: router::open(&interface)
                .inspect_err(|e| tracing::info!("machines boot slower without IPv6: {e}"))
                .ok(),
            server,
        }))
    }

    /// Serves until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let router = self.router.take();
        let no_router = async {
            match router {
                Some(socket) => router::serve(socket).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.serve_dhcp() => {}
            () = tftp::serve(&self.tftp, self.server.address, Arc::clone(&self.files)) => {}
            () = no_router => {}
        }
    }

    async fn serve_dhcp(&self) {
        let mut buffer = [0; 1500];
        loop {
            let length = match self.dhcp.recv_from(&mut buffer).await {
                Ok((length, _)) => length,
                // The interface is down, or was taken away and will come back.
                Err(error) => {
                    tracing::warn!("DHCP: {error}");
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                    continue;
                }
            };
            let Ok(request) = Message::decode(&mut Decoder::new(&buffer[..length])) else { continue };
            if let Err(error) = self.answer(&request).await {
                tracing::error!("a DHCP request got no answer: {error}");
            }
        }
    }

    async fn answer(&self, request: &Message) -> Result<(), StoreError> {
        let Some((mac, client)) = dhcp::client(request) else { return Ok(()) };
        let (server, asked) = (self.server, mac.clone());
        let found = self.control.change(move |change| lease::lease(change, &server, &asked, client)).await?;
        let Some((record, address)) = found else { return Ok(()) };
        let node = record.number;
        // A node that boots over and over must still become lost: only its reports count as its word.
        if record.state != NodeState::Ready {
            self.control.observed.heard(node);
        }
        let Some(reply) = dhcp::reply(request, &self.server, &mac, client, address) else { return Ok(()) };
        let mut bytes = Vec::new();
        if let Err(error) = reply.encode(&mut Encoder::new(&mut bytes)) {
            tracing::error!("a DHCP reply cannot be written: {error}");
            return Ok(());
        }
        // To all: the machine has no address yet, and finds its own by its MAC and transaction.
        let to = (Ipv4Addr::BROADCAST, DHCP_CLIENT);
        if let Err(error) = self.dhcp.send_to(&bytes, to).await {
            tracing::warn!("a DHCP reply for {mac} was not sent: {error}");
        }
        if dhcp::is_acknowledgement(&reply) {
            self.tell(node, client, address).await;
        }
        Ok(())
    }

    /// Progress of a boot, for people.
    async fn tell(&self, node: NodeNumber, client: Client, address: Ipv4Addr) {
        let message = match client {
            Client::Bios => format!("BIOS firmware took {address} and is given iPXE ({})", tftp::BIOS),
            Client::Uefi => format!("UEFI firmware took {address} and is given iPXE ({})", tftp::UEFI),
            Client::Ipxe => format!("iPXE took {address} and is given its boot script"),
            Client::Plain => format!("its system took {address}"),
        };
        // A machine that cannot boot asks for ever.
        self.control.event_once(node, message).await;
    }
}

/// The address of `interface` in the provisioning network.
async fn address_of(interface: &str, network: Ipv4Addr, prefix: u8) -> Result<Ipv4Addr, NetbootError> {
    use futures_util::TryStreamExt;
    let unreadable = |e: &dyn std::fmt::Display| NetbootError::Addresses(e.to_string());
    let none = || NetbootError::NoAddress { interface: interface.into(), network, prefix };
    let (connection, handle, _) = rtnetlink::new_connection().map_err(|e| unreadable(&e))?;
    let connection = tokio::spawn(connection);
    let link = handle.link().get().match_name(interface).execute().try_next().await;
    let index = link.ok().flatten().ok_or_else(none)?.header.index;
    let mut addresses = handle.address().get().set_link_index_filter(index).execute();
    let shift = 32 - u32::from(prefix);
    let mut found = None;
    while let Some(message) = addresses.try_next().await.map_err(|e| unreadable(&e))? {
        for attribute in message.attributes {
            if let AddressAttribute::Address(std::net::IpAddr::V4(address)) = attribute
                && u32::from(address) >> shift == u32::from(network) >> shift
            {
                found = Some(address);
            }
        }
    }
    connection.abort();
    found.ok_or_else(none)
}

fn udp(interface: &str, address: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = socket2::Socket::new(Domain::IPV4, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    // Another server may serve other interfaces of this machine.
    socket.set_reuse_address(true)?;
    socket.bind_device(Some(interface.as_bytes()))?;
    socket.set_broadcast(true)?;
    socket.bind(&SocketAddr::V4(address).into())?;
    UdpSocket::from_std(socket.into())
}

fn ipxe() -> Result<Files, NetbootError> {
    let read = |name| {
        let path = PathBuf::from(IPXE).join(name);
        std::fs::read(&path).map(Into::into).map_err(|source| NetbootError::Ipxe { path, source })
    };
    Ok(Files { bios: read(tftp::BIOS)?, uefi: read(tftp::UEFI)? })
}

/// A machine that fetches its boot script is booting, whoever told it where the script is.
pub async fn booting(control: &Arc<Control>, mac: String) -> Result<NodeNumber, StoreError> {
    let (number, ready) = control
        .change(move |change| {
            let mut node = match change.node_by_mac(&mac)? {
                Some(node) => node,
                None => change.new_node()?,
            };
            node.mac = Some(mac);
            // One that reports keeps its VMs until its silence says otherwise: it may be a stray request.
            let ready = node.state == NodeState::Ready;
            if !ready {
                node.state = NodeState::Booting;
                node.booting_since = Some(now());
            }
            change.put_node(&node)?;
            Ok::<_, StoreError>((node.number, ready))
        })
        .await?;
    if !ready {
        control.observed.heard(number);
    }
    control.wake_planner();
    Ok(number)
}
