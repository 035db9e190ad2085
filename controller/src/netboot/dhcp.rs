//! DHCP without a socket: who asks, and what the answer is (RFC 2131, 2132; PXE: RFC 4578).

use std::net::{Ipv4Addr, SocketAddr};

use bedplate_api::node::Ipv4Net;
use dhcproto::v4::{Architecture, DhcpOption, HType, Message, MessageType, Opcode, OptionCode, UnknownOption};

use super::tftp;

/// A day: leases are kept for good, so this only says how often a machine asks again.
const LEASE_SECONDS: u32 = 86_400;

/// iPXE's own options, and in them: do not wait for another boot server.
const IPXE_OPTIONS: u8 = 175;
const IPXE_NO_PROXY: [u8; 3] = [0xb0, 1, 1];

/// This machine, as those that boot see it.
#[derive(Debug, Clone, Copy)]
pub struct Server {
    /// Its address on the provisioning network.
    pub address: Ipv4Addr,
    /// Where scripts, kernels and images are.
    pub http: SocketAddr,
    /// The provisioning network.
    pub network: Ipv4Net,
}

/// What asks for an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// Firmware of a PC.
    Bios,
    /// Firmware, 64-bit UEFI.
    Uefi,
    /// iPXE, from a ROM or handed over by us.
    Ipxe,
    /// An operating system, or firmware that we have nothing for.
    Plain,
}

/// Who asks: the MAC, lower case with colons, and what it is. `None` for what is no request of a client on this network.
pub fn client(request: &Message) -> Option<(String, Client)> {
    // The length is checked before the address is looked at: the packet may claim more than there is room for.
    let ethernet = request.htype() == HType::Eth && request.hlen() == 6;
    let ours = request.opcode() == Opcode::BootRequest && request.giaddr().is_unspecified();
    if !ethernet || !ours {
        return None;
    }
    let mac: Vec<String> = request.chaddr().iter().map(|byte| format!("{byte:02x}")).collect();
    Some((mac.join(":"), kind(request)))
}

fn kind(request: &Message) -> Client {
    let options = request.opts();
    if let Some(DhcpOption::UserClass(class)) = options.get(OptionCode::UserClass)
        && class.windows(4).any(|w| w == b"iPXE")
    {
        return Client::Ipxe;
    }
    let pxe = matches!(options.get(OptionCode::ClassIdentifier),
        Some(DhcpOption::ClassIdentifier(class)) if class.starts_with(b"PXEClient"));
    match options.get(OptionCode::ClientSystemArchitecture) {
        Some(DhcpOption::ClientSystemArchitecture(Architecture::X86_Bios)) if pxe => Client::Bios,
        // Firmware says 7 or 9 for the same thing; the standard's list was corrected later.
        Some(DhcpOption::ClientSystemArchitecture(Architecture::X64 | Architecture::BC)) if pxe => Client::Uefi,
        _ => Client::Plain,
    }
}

/// The answer, if there is one: `address` is the one leased to this client.
pub fn reply(request: &Message, server: &Server, mac: &str, client: Client, address: Ipv4Addr) -> Option<Message> {
    let options = request.opts();
    let kind = match options.msg_type()? {
        MessageType::Discover => MessageType::Offer,
        MessageType::Request => {
            if let Some(DhcpOption::ServerIdentifier(chosen)) = options.get(OptionCode::ServerIdentifier)
                && *chosen != server.address
            {
                // It took another server's offer.
                return None;
            }
            let wanted = match options.get(OptionCode::RequestedIpAddress) {
                Some(DhcpOption::RequestedIpAddress(wanted)) => *wanted,
                _ => request.ciaddr(),
            };
            if wanted == address { MessageType::Ack } else { MessageType::Nak }
        }
        _ => return None,
    };
    let mut reply = Message::default();
    reply.set_opcode(Opcode::BootReply).set_xid(request.xid()).set_flags(request.flags()).set_chaddr(request.chaddr());
    reply.opts_mut().insert(DhcpOption::MessageType(kind));
    reply.opts_mut().insert(DhcpOption::ServerIdentifier(server.address));
    if kind != MessageType::Nak {
        offer(&mut reply, server, address);
        boot(&mut reply, server, mac, client);
    }
    Some(reply)
}

fn offer(reply: &mut Message, server: &Server, address: Ipv4Addr) {
    reply.set_yiaddr(address).set_siaddr(server.address);
    let mask = u32::MAX.checked_shl(32 - u32::from(server.network.prefix)).unwrap_or(0);
    let options = reply.opts_mut();
    options.insert(DhcpOption::AddressLeaseTime(LEASE_SECONDS));
    options.insert(DhcpOption::SubnetMask(mask.into()));
    // The way to the VMs of other nodes.
    options.insert(DhcpOption::Router(vec![server.address]));
}

fn boot(reply: &mut Message, server: &Server, mac: &str, client: Client) {
    let file = match client {
        Client::Bios => tftp::BIOS.to_owned(),
        Client::Uefi => tftp::UEFI.to_owned(),
        Client::Ipxe => super::script::url(server.http, mac),
        Client::Plain => return,
    };
    // Both the old field and the option: firmware reads one or the other.
    reply.set_fname_str(&file);
    let options = reply.opts_mut();
    options.insert(DhcpOption::BootfileName(file.into_bytes()));
    if client == Client::Ipxe {
        let unknown = UnknownOption::new(OptionCode::Unknown(IPXE_OPTIONS), IPXE_NO_PROXY.to_vec());
        options.insert(DhcpOption::Unknown(unknown));
    } else {
        options.insert(DhcpOption::TFTPServerName(server.address.to_string().into_bytes()));
    }
}

/// The client has its address now.
pub fn is_acknowledgement(reply: &Message) -> bool {
    reply.opts().has_msg_type(MessageType::Ack)
}
