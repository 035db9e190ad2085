//! What a DHCP client says and understands: pure.

use std::net::Ipv4Addr;

use bedplate_api::node::Ipv4Net;
use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, Opcode, OptionCode};

/// What a client has been given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Address and length of its network's prefix.
    pub address: Ipv4Net,
    /// Who gave it.
    pub server: Ipv4Addr,
    /// Where everything else goes.
    pub gateway: Option<Ipv4Addr>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Seconds for which it may be used.
    pub seconds: u32,
    /// Seconds after which to ask for more.
    pub renew_seconds: u32,
}

/// Asks who can give an address.
pub fn discover(mac: [u8; 6], xid: u32) -> Message {
    message(mac, xid, MessageType::Discover)
}

/// Takes an offer.
pub fn request(mac: [u8; 6], xid: u32, offer: &Grant) -> Message {
    let mut request = message(mac, xid, MessageType::Request);
    request.opts_mut().insert(DhcpOption::RequestedIpAddress(offer.address.address));
    request.opts_mut().insert(DhcpOption::ServerIdentifier(offer.server));
    request
}

/// Asks for more time.
pub fn renewal(mac: [u8; 6], xid: u32, held: &Grant) -> Message {
    let mut renewal = message(mac, xid, MessageType::Request);
    renewal.set_ciaddr(held.address.address).set_flags(Flags::default());
    renewal
}

fn message(mac: [u8; 6], xid: u32, kind: MessageType) -> Message {
    let mut message = Message::default();
    // Without an address of our own only a broadcast reaches us.
    message.set_flags(Flags::default().set_broadcast()).set_chaddr(&mac).set_xid(xid);
    let options = message.opts_mut();
    options.insert(DhcpOption::MessageType(kind));
    options.insert(DhcpOption::ParameterRequestList(vec![
        OptionCode::SubnetMask,
        OptionCode::Router,
        OptionCode::DomainNameServer,
        OptionCode::AddressLeaseTime,
    ]));
    message
}

/// What `reply` gives, if it is an answer of type `kind` to our message `xid` and makes sense.
pub fn understand(reply: &Message, kind: MessageType, xid: u32) -> Option<Grant> {
    let options = reply.opts();
    if reply.opcode() != Opcode::BootReply || reply.xid() != xid || options.msg_type() != Some(kind) {
        return None;
    }
    let DhcpOption::ServerIdentifier(server) = options.get(OptionCode::ServerIdentifier)? else { return None };
    let DhcpOption::SubnetMask(mask) = options.get(OptionCode::SubnetMask)? else { return None };
    let mask = u32::from(*mask);
    let prefix = mask.leading_ones();
    if prefix + mask.trailing_zeros() != 32 || reply.yiaddr().is_unspecified() {
        return None;
    }
    let gateway = match options.get(OptionCode::Router) {
        Some(DhcpOption::Router(routers)) => routers.first().copied(),
        _ => None,
    };
    let dns = match options.get(OptionCode::DomainNameServer) {
        Some(DhcpOption::DomainNameServer(servers)) => servers.clone(),
        _ => Vec::new(),
    };
    // A server that names no time grants a day; a minute at least keeps a strange one from being asked without end.
    let seconds = match options.get(OptionCode::AddressLeaseTime) {
        Some(DhcpOption::AddressLeaseTime(seconds)) => (*seconds).max(60),
        _ => 86_400,
    };
    let renew_seconds = match options.get(OptionCode::Renewal) {
        Some(DhcpOption::Renewal(renew)) if *renew >= 30 && *renew < seconds => *renew,
        _ => seconds / 2,
    };
    let address = Ipv4Net { address: reply.yiaddr(), prefix: u8::try_from(prefix).ok()? };
    Some(Grant { address, server: *server, gateway, dns, seconds, renew_seconds })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::addresses;
    use crate::net::dhcp::leases::{Lease, Leases, answer};

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

    /// Our client against our server, without a network.
    #[test]
    fn client_and_server_understand_each_other() {
        let address = Ipv4Addr::new(10, 77, 0, 20);
        let leases = Leases {
            network: addresses::parse("10.77.0.0/24").unwrap(),
            dns: vec![],
            by_mac: [(MAC, Lease { address, hostname: "n".into() })].into(),
        };
        let offer = answer(&leases, &discover(MAC, 1), MessageType::Discover, MAC).unwrap();
        let offer = understand(&offer.message, MessageType::Offer, 1).unwrap();
        assert_eq!(offer.address, Ipv4Net { address, prefix: 24 });
        assert_eq!(offer.gateway, Some(Ipv4Addr::new(10, 77, 0, 1)));
        assert_eq!(offer.renew_seconds * 2, offer.seconds);
        let ack = answer(&leases, &request(MAC, 2, &offer), MessageType::Request, MAC).unwrap();
        assert!(ack.taken);
        assert!(understand(&ack.message, MessageType::Ack, 3).is_none(), "an answer to somebody else");
        let held = understand(&ack.message, MessageType::Ack, 2).unwrap();
        assert!(answer(&leases, &renewal(MAC, 4, &held), MessageType::Request, MAC).unwrap().taken);
    }

    #[test]
    fn a_mask_with_holes_is_refused() {
        let mut reply = Message::default();
        reply.set_opcode(Opcode::BootReply).set_xid(1).set_yiaddr([10, 0, 0, 2]);
        let options = reply.opts_mut();
        options.insert(DhcpOption::MessageType(MessageType::Ack));
        options.insert(DhcpOption::ServerIdentifier(Ipv4Addr::new(10, 0, 0, 1)));
        options.insert(DhcpOption::SubnetMask(Ipv4Addr::new(255, 0, 255, 0)));
        assert!(understand(&reply, MessageType::Ack, 1).is_none());
    }
}
