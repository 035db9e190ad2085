//! An answer to "is there an IPv6 router?": no. iPXE asks at each boot and, where nobody says anything, waits some 15
//! seconds before it goes on with the IPv4 address that it has long had. The answer (RFC 4861, 4.2) has a lifetime of 0 and no
//! prefix, so it makes nobody take this machine for a router.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};

use socket2::{Domain, Protocol, Type};
use tokio::net::UdpSocket;

/// Type of a router solicitation; the kernel has checked its sum.
const SOLICITATION: u8 = 133;
/// A router advertisement of no router: type, code, sum (the kernel's), hop limit (unspecified), no flags, lifetime 0, and
/// two timers left unspecified.
const NO_ROUTER: [u8; 16] = [134, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

/// Listens for solicitations on `interface`. An error where this machine has no IPv6: boots are slower then, no more.
pub fn open(interface: &str) -> io::Result<(UdpSocket, u32)> {
    let socket = socket2::Socket::new(Domain::IPV6, Type::RAW.nonblocking(), Some(Protocol::ICMPV6))?;
    socket.bind_device(Some(interface.as_bytes()))?;
    let index = rustix::net::netdevice::name_to_index(&socket, interface)?;
    socket.join_multicast_v6(&ALL_ROUTERS, index)?;
    // What came through a router is no neighbour's word: the receiver wants to see the full 255.
    socket.set_multicast_hops_v6(255)?;
    socket.set_unicast_hops_v6(255)?;
    // A datagram socket to tokio: it reads and sends packets, whatever the protocol below.
    Ok((UdpSocket::from_std(socket.into())?, index))
}

/// Answers for ever.
pub async fn serve((socket, index): (UdpSocket, u32)) {
    let mut packet = [0; 256];
    loop {
        match socket.recv_from(&mut packet).await {
            Ok((1.., _)) if packet[0] == SOLICITATION => {
                let to = SocketAddrV6::new(ALL_NODES, 0, 0, index);
                if let Err(error) = socket.send_to(&NO_ROUTER, to).await {
                    tracing::debug!("no router advertisement was sent: {error}");
                }
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!("IPv6: {error}");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            }
        }
    }
}
