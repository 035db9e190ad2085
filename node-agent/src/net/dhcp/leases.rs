//! What the DHCP server answers: pure.
//!
//! Leases are not made here: each VM has its address before it starts, and a guest is told that one and no other. A MAC
//! address that is no VM's gets no answer.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use bedplate_api::node::Ipv4Net;
use dhcproto::v4::{DhcpOption, Message, MessageType, Opcode, OptionCode};

use crate::net::addresses;

/// Guests ask again after half of it; a guest that moved away leaves nothing behind, for addresses are VMs' own.
const LEASE_SECONDS: u32 = 3600;

/// What a guest is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Its address.
    pub address: Ipv4Addr,
    /// Its name.
    pub hostname: String,
}

/// Everything that the server knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leases {
    /// The network on the bridge.
    pub network: Ipv4Net,
    /// Name servers to tell guests.
    pub dns: Vec<Ipv4Addr>,
    /// By guest MAC address.
    pub by_mac: BTreeMap<[u8; 6], Lease>,
}

/// An answer, and whether with it the guest has taken its address.
#[derive(Debug)]
pub struct Answer {
    /// What to send.
    pub message: Message,
    /// It is the acknowledgement of a request for the address.
    pub taken: bool,
}

/// The answer to `request`, of type `kind` from `mac`, if it gets one.
pub fn answer(leases: &Leases, request: &Message, kind: MessageType, mac: [u8; 6]) -> Option<Answer> {
    let lease = leases.by_mac.get(&mac).filter(|_| request.opcode() == Opcode::BootRequest)?;
    let server = addresses::gateway(leases.network);
    match kind {
        MessageType::Discover => {
            Some(Answer { message: grant(leases, lease, request, MessageType::Offer), taken: false })
        }
        MessageType::Request => {
            let chosen = match request.opts().get(OptionCode::ServerIdentifier) {
                Some(DhcpOption::ServerIdentifier(chosen)) => Some(*chosen),
                _ => None,
            };
            // The guest has taken another server's offer.
            if chosen.is_some_and(|chosen| chosen != server) {
                return None;
            }
            let wanted = match request.opts().get(OptionCode::RequestedIpAddress) {
                Some(DhcpOption::RequestedIpAddress(wanted)) => *wanted,
                _ => request.ciaddr(),
            };
            if wanted != lease.address {
                return Some(Answer { message: refuse(server, request), taken: false });
            }
            Some(Answer { message: grant(leases, lease, request, MessageType::Ack), taken: true })
        }
        MessageType::Inform => {
            let mut message = grant(leases, lease, request, MessageType::Ack);
            // The guest set its address itself and asks for the rest.
            message.set_yiaddr(Ipv4Addr::UNSPECIFIED).opts_mut().remove(OptionCode::AddressLeaseTime);
            Some(Answer { message, taken: false })
        }
        _ => None,
    }
}

fn reply(server: Ipv4Addr, request: &Message, kind: MessageType) -> Message {
    let mut message = Message::default();
    message
        .set_opcode(Opcode::BootReply)
        .set_htype(request.htype())
        .set_xid(request.xid())
        .set_flags(request.flags())
        .set_giaddr(request.giaddr())
        .set_chaddr(request.chaddr());
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    message.opts_mut().insert(DhcpOption::ServerIdentifier(server));
    message
}

fn refuse(server: Ipv4Addr, request: &Message) -> Message {
    reply(server, request, MessageType::Nak)
}

fn grant(leases: &Leases, lease: &Lease, request: &Message, kind: MessageType) -> Message {
    let server = addresses::gateway(leases.network);
    let mut message = reply(server, request, kind);
    message.set_yiaddr(lease.address).set_siaddr(server).set_ciaddr(request.ciaddr());
    let options = message.opts_mut();
    options.insert(DhcpOption::AddressLeaseTime(LEASE_SECONDS));
    options.insert(DhcpOption::SubnetMask(addresses::mask(leases.network)));
    options.insert(DhcpOption::BroadcastAddr(addresses::broadcast(leases.network)));
    options.insert(DhcpOption::Router(vec![server]));
    options.insert(DhcpOption::Hostname(lease.hostname.clone()));
    if !leases.dns.is_empty() {
        options.insert(DhcpOption::DomainNameServer(leases.dns.clone()));
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 1, 2, 3, 4, 5];
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 78, 1, 2);
    const SERVER: Ipv4Addr = Ipv4Addr::new(10, 78, 1, 1);

    fn leases() -> Leases {
        let lease = Lease { address: ADDRESS, hostname: "web-1".into() };
        Leases {
            network: addresses::parse("10.78.1.0/24").unwrap(),
            dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
            by_mac: [(MAC, lease)].into(),
        }
    }

    fn request(options: &[DhcpOption]) -> Message {
        let mut message = Message::default();
        message.set_chaddr(&MAC).set_xid(7);
        for option in options {
            message.opts_mut().insert(option.clone());
        }
        message
    }

    fn ask(kind: MessageType, options: &[DhcpOption]) -> Option<(MessageType, bool, Ipv4Addr)> {
        let answer = answer(&leases(), &request(options), kind, MAC)?;
        assert_eq!(answer.message.xid(), 7);
        assert_eq!(answer.message.opcode(), Opcode::BootReply);
        Some((answer.message.opts().msg_type().unwrap(), answer.taken, answer.message.yiaddr()))
    }

    #[test]
    fn a_vm_is_offered_and_granted_its_address_and_no_other() {
        use DhcpOption::{RequestedIpAddress, ServerIdentifier};
        assert_eq!(ask(MessageType::Discover, &[]), Some((MessageType::Offer, false, ADDRESS)));
        let wanted = [RequestedIpAddress(ADDRESS), ServerIdentifier(SERVER)];
        assert_eq!(ask(MessageType::Request, &wanted), Some((MessageType::Ack, true, ADDRESS)));
        let other = [RequestedIpAddress(Ipv4Addr::new(10, 78, 1, 3))];
        assert_eq!(ask(MessageType::Request, &other), Some((MessageType::Nak, false, Ipv4Addr::UNSPECIFIED)));
        let elsewhere = [RequestedIpAddress(ADDRESS), ServerIdentifier(Ipv4Addr::new(10, 78, 1, 9))];
        assert_eq!(ask(MessageType::Request, &elsewhere), None);
        assert_eq!(ask(MessageType::Release, &[]), None);
    }

    #[test]
    fn a_renewal_names_its_address_in_the_header() {
        let mut renewal = request(&[]);
        renewal.set_ciaddr(ADDRESS);
        assert!(answer(&leases(), &renewal, MessageType::Request, MAC).unwrap().taken);
    }

    #[test]
    fn a_stranger_gets_no_answer() {
        assert!(answer(&leases(), &request(&[]), MessageType::Discover, [2, 0, 0, 0, 0, 9]).is_none());
    }

    #[test]
    fn the_guest_is_told_all_it_needs() {
        let answer = answer(&leases(), &request(&[]), MessageType::Discover, MAC).unwrap();
        let options = answer.message.opts();
        assert_eq!(options.get(OptionCode::Hostname), Some(&DhcpOption::Hostname("web-1".into())));
        assert_eq!(options.get(OptionCode::Router), Some(&DhcpOption::Router(vec![SERVER])));
        assert_eq!(options.get(OptionCode::SubnetMask), Some(&DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0))));
        assert!(options.get(OptionCode::DomainNameServer).is_some());
    }
}
