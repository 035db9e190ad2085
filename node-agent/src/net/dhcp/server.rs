//! The DHCP server on the bridge: one socket, one task, no state of its own.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

use dhcproto::v4::{Message, MessageType};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};

use super::leases::{Leases, answer};
use super::{CLIENT_PORT, MAX_MESSAGE, SERVER_PORT, decode, encode, socket_on};

/// Binds to the interface `link`.
///
/// # Errors
/// Another DHCP server has the port on this interface, or the interface is gone.
pub fn bind(link: &str) -> io::Result<UdpSocket> {
    socket_on(link, SERVER_PORT)
}

/// Serves what `leases` holds, and tells `taken` the MAC address of each guest that has taken its address. Ends when
/// nobody listens to that any more.
pub async fn serve(socket: UdpSocket, leases: watch::Receiver<Option<Leases>>, taken: mpsc::Sender<[u8; 6]>) {
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let len = match socket.recv_from(&mut buffer).await {
            Ok((len, _)) => len,
            Err(e) => {
                tracing::warn!("the DHCP server cannot receive: {e}");
                // The interface is down or gone; the agent brings it back.
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                continue;
            }
        };
        let Some((request, kind, mac)) = decode(&buffer[..len]) else { continue };
        let answer = leases.borrow().as_ref().and_then(|leases| answer(leases, &request, kind, mac));
        let Some(answer) = answer else { continue };
        let sent = match encode(&answer.message) {
            Ok(bytes) => socket.send_to(&bytes, destination(&request, &answer.message)).await,
            Err(e) => Err(e),
        };
        match sent {
            Ok(_) if answer.taken && taken.send(mac).await.is_err() => return,
            Ok(_) => {}
            Err(e) => tracing::warn!("a DHCP answer could not be sent: {e}"),
        }
    }
}

/// Where the answer goes (RFC 2131, section 4.1): to the address the guest has, to everybody where it asks for that or
/// is refused, else to the address it is being given, which the bridge knows the MAC address of already.
fn destination(request: &Message, answer: &Message) -> SocketAddrV4 {
    let refused = answer.opts().has_msg_type(MessageType::Nak);
    let address = if refused {
        Ipv4Addr::BROADCAST
    } else if !request.ciaddr().is_unspecified() {
        request.ciaddr()
    } else if request.flags().broadcast() || answer.yiaddr().is_unspecified() {
        Ipv4Addr::BROADCAST
    } else {
        answer.yiaddr()
    };
    SocketAddrV4::new(address, CLIENT_PORT)
}
