//! Gives one guest its one address. Not a server: there is one client, one lease, and nothing to remember.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use dhcproto::v4::{DhcpOption, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable, Encoder};
use socket2::{Domain, Protocol, Socket, Type};

const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// One hour: the address never changes, and a guest that is asked rarely is not woken often.
const LEASE_SECONDS: u32 = 3600;
const MAC_LEN: u8 = 6;

/// What the guest is told.
#[derive(Debug, Clone)]
pub(super) struct Offer {
    /// Our address: server, gateway.
    pub host: Ipv4Addr,
    /// Its address.
    pub guest: Ipv4Addr,
    /// Its MAC address; others are not answered.
    pub mac: [u8; 6],
    /// Its name.
    pub name: String,
    /// Its name servers.
    pub dns: Vec<Ipv4Addr>,
}

/// Answers on `tap` from a thread of its own, which ends with the tap or the process.
pub(super) fn serve(tap: &str, offer: Offer) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_address(true)?;
    socket.set_broadcast(true)?;
    // Nothing but this tap reaches us, and our broadcasts reach nothing else.
    socket.bind_device(Some(tap.as_bytes()))?;
    socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, SERVER_PORT).into())?;
    let socket = UdpSocket::from(socket);
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((len, _)) = socket.recv_from(&mut buffer) {
            if let Some(reply) = answer(&buffer[..len], &offer) {
                // The guest asks again when an answer is lost.
                let _ = socket.send_to(&reply, (Ipv4Addr::BROADCAST, CLIENT_PORT));
            }
        }
    });
    Ok(())
}

/// The answer to one datagram of the guest, if it deserves one.
fn answer(datagram: &[u8], offer: &Offer) -> Option<Vec<u8>> {
    let request = Message::decode(&mut Decoder::new(datagram)).ok()?;
    if request.opcode() != Opcode::BootRequest || request.hlen() != MAC_LEN || request.chaddr() != offer.mac {
        return None;
    }
    let kind = match request.opts().msg_type()? {
        MessageType::Discover => MessageType::Offer,
        MessageType::Request if is_for_another_server(&request, offer) => return None,
        MessageType::Request if asked_address(&request) == offer.guest => MessageType::Ack,
        // Remembered from another network: it must ask anew.
        MessageType::Request => MessageType::Nak,
        _ => return None,
    };
    let mut bytes = Vec::new();
    reply(&request, kind, offer).encode(&mut Encoder::new(&mut bytes)).ok()?;
    Some(bytes)
}

fn is_for_another_server(request: &Message, offer: &Offer) -> bool {
    let server = request.opts().get(OptionCode::ServerIdentifier);
    matches!(server, Some(DhcpOption::ServerIdentifier(server)) if *server != offer.host)
}

fn asked_address(request: &Message) -> Ipv4Addr {
    match request.opts().get(OptionCode::RequestedIpAddress) {
        Some(DhcpOption::RequestedIpAddress(address)) => *address,
        // A renewal.
        _ => request.ciaddr(),
    }
}

fn reply(request: &Message, kind: MessageType, offer: &Offer) -> Message {
    let mut reply = Message::default();
    reply.set_opcode(Opcode::BootReply).set_xid(request.xid()).set_flags(request.flags()).set_chaddr(request.chaddr());
    let options = reply.opts_mut();
    options.insert(DhcpOption::MessageType(kind));
    options.insert(DhcpOption::ServerIdentifier(offer.host));
    if kind == MessageType::Nak {
        return reply;
    }
    options.insert(DhcpOption::AddressLeaseTime(LEASE_SECONDS));
    options.insert(DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 252)));
    options.insert(DhcpOption::Router(vec![offer.host]));
    options.insert(DhcpOption::Hostname(offer.name.clone()));
    if !offer.dns.is_empty() {
        options.insert(DhcpOption::DomainNameServer(offer.dns.clone()));
    }
    reply.set_yiaddr(offer.guest).set_siaddr(offer.host);
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 1, 2, 3, 4, 5];

    fn offer() -> Offer {
        let (host, guest) = (Ipv4Addr::new(10, 79, 1, 1), Ipv4Addr::new(10, 79, 1, 2));
        Offer { host, guest, mac: MAC, name: "web".into(), dns: vec![Ipv4Addr::new(9, 9, 9, 9)] }
    }

    fn ask(kind: MessageType, options: &[DhcpOption]) -> Option<Message> {
        let mut request = Message::default();
        request.set_chaddr(&MAC).set_xid(7);
        request.opts_mut().insert(DhcpOption::MessageType(kind));
        options.iter().for_each(|option| drop(request.opts_mut().insert(option.clone())));
        let mut bytes = Vec::new();
        request.encode(&mut Encoder::new(&mut bytes)).unwrap();
        let reply = answer(&bytes, &offer())?;
        Some(Message::decode(&mut Decoder::new(&reply)).unwrap())
    }

    #[test]
    fn the_guest_gets_its_address_name_and_gateway() {
        let reply = ask(MessageType::Discover, &[]).unwrap();
        assert_eq!(
            (reply.opts().msg_type(), reply.yiaddr(), reply.xid()),
            (Some(MessageType::Offer), offer().guest, 7)
        );
        let router = reply.opts().get(OptionCode::Router);
        assert_eq!(router, Some(&DhcpOption::Router(vec![offer().host])));
        assert_eq!(reply.opts().get(OptionCode::Hostname), Some(&DhcpOption::Hostname("web".into())));
        let ack = ask(MessageType::Request, &[DhcpOption::RequestedIpAddress(offer().guest)]).unwrap();
        assert_eq!(ack.opts().msg_type(), Some(MessageType::Ack));
    }

    #[test]
    fn an_old_address_is_refused_and_other_servers_clients_are_left_alone() {
        let old = DhcpOption::RequestedIpAddress(Ipv4Addr::new(192, 168, 1, 9));
        assert_eq!(ask(MessageType::Request, &[old]).unwrap().opts().msg_type(), Some(MessageType::Nak));
        let other = DhcpOption::ServerIdentifier(Ipv4Addr::new(192, 168, 1, 1));
        assert!(ask(MessageType::Request, &[other]).is_none());
        assert!(ask(MessageType::Decline, &[]).is_none());
    }

    #[test]
    fn hostile_datagrams_are_ignored() {
        assert!(answer(&[], &offer()).is_none());
        let mut request = Message::default();
        request.set_chaddr(&MAC);
        request.opts_mut().insert(DhcpOption::MessageType(MessageType::Discover));
        let mut bytes = Vec::new();
        request.encode(&mut Encoder::new(&mut bytes)).unwrap();
        for cut in 0..bytes.len() {
            // Must not panic; a cut message may still be one.
            let _ = answer(&bytes[..cut], &offer());
        }
        // A claimed hardware address of 255 bytes.
        bytes[2] = 255;
        assert!(answer(&bytes, &offer()).is_none());
    }
}
