//! DHCP: served to guests on the bridge, and used by PID 1 on the interface that the machine booted from.

pub mod client;
pub mod exchange;
pub mod leases;
pub mod server;

use std::io;
use std::net::Ipv4Addr;

use dhcproto::v4::{Message, MessageType};
use dhcproto::{Decodable, Decoder, Encodable};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

/// Port of servers.
pub const SERVER_PORT: u16 = 67;
/// Port of clients.
pub const CLIENT_PORT: u16 = 68;
/// Larger than any message of ours or of a sane peer.
const MAX_MESSAGE: usize = 1500;
/// Length of an Ethernet address.
const MAC_LEN: u8 = 6;

/// A socket that sees and reaches only what is on the interface `link`, broadcasts included.
fn socket_on(link: &str, port: u16) -> io::Result<tokio::net::UdpSocket> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    sockopt::set_socket_broadcast(&fd, true)?;
    let socket = tokio::net::UdpSocket::from_std(fd.into())?;
    // First the interface, then the port: that port may be in use on another one.
    socket.bind_device(Some(link.as_bytes()))?;
    rustix::net::bind(&socket, &std::net::SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
    Ok(socket)
}

/// A message with an Ethernet address and a type; anything else is of no use, and asking it for its address could panic.
fn decode(bytes: &[u8]) -> Option<(Message, MessageType, [u8; 6])> {
    let message = Message::decode(&mut Decoder::new(bytes)).ok()?;
    if message.hlen() != MAC_LEN {
        return None;
    }
    let mac = message.chaddr().try_into().ok()?;
    let kind = message.opts().msg_type()?;
    Some((message, kind, mac))
}

fn encode(message: &Message) -> io::Result<Vec<u8>> {
    let mut bytes = message.to_vec().map_err(io::Error::other)?;
    // Some clients drop what is shorter than the BOOTP messages of old.
    bytes.resize(bytes.len().max(300), 0);
    Ok(bytes)
}
