//! The DHCP client of PID 1: an address for the interface that the machine booted from, and its renewal.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use dhcproto::v4::{Message, MessageType};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

use super::exchange::{self, Grant};
use super::{CLIENT_PORT, MAX_MESSAGE, SERVER_PORT, decode, encode, socket_on};

/// How long to wait for answers to one message.
const ANSWER: Duration = Duration::from_secs(3);

/// A client on one interface.
#[derive(Debug)]
pub struct Client {
    socket: UdpSocket,
    mac: [u8; 6],
}

impl Client {
    /// A client on the interface `link`, which has the address `mac` and is up.
    ///
    /// # Errors
    /// The interface is gone, or another client has the port.
    pub fn open(link: &str, mac: [u8; 6]) -> io::Result<Self> {
        Ok(Self { socket: socket_on(link, CLIENT_PORT)?, mac })
    }

    /// One try to get an address. `None`: nobody answered, or nobody granted one.
    ///
    /// # Errors
    /// The interface cannot send.
    pub async fn acquire(&self) -> io::Result<Option<Grant>> {
        let xid = random()?;
        let discover = exchange::discover(self.mac, xid);
        let Some(offer) = self.ask(&discover, Ipv4Addr::BROADCAST, MessageType::Offer, xid).await? else {
            return Ok(None);
        };
        let xid = random()?;
        let request = exchange::request(self.mac, xid, &offer);
        self.ask(&request, Ipv4Addr::BROADCAST, MessageType::Ack, xid).await
    }

    /// One try to keep `held`: of its server, else of anybody if `anybody`. `None`: no answer, or a refusal.
    ///
    /// # Errors
    /// The interface cannot send.
    pub async fn renew(&self, held: &Grant, anybody: bool) -> io::Result<Option<Grant>> {
        let xid = random()?;
        let to = if anybody { Ipv4Addr::BROADCAST } else { held.server };
        self.ask(&exchange::renewal(self.mac, xid, held), to, MessageType::Ack, xid).await
    }

    async fn ask(&self, message: &Message, to: Ipv4Addr, kind: MessageType, xid: u32) -> io::Result<Option<Grant>> {
        self.socket.send_to(&encode(message)?, SocketAddrV4::new(to, SERVER_PORT)).await?;
        let deadline = Instant::now() + ANSWER;
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let Ok(received) = timeout_at(deadline, self.socket.recv_from(&mut buffer)).await else { return Ok(None) };
            let (len, _) = received?;
            let Some((reply, got, mac)) = decode(&buffer[..len]) else { continue };
            if mac != self.mac || reply.xid() != xid {
                continue;
            }
            if got == MessageType::Nak {
                return Ok(None);
            }
            if let Some(grant) = exchange::understand(&reply, kind, xid) {
                return Ok(Some(grant));
            }
        }
    }
}

fn random() -> io::Result<u32> {
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(u32::from_ne_bytes(bytes))
}
