//! Who is at the other end of a connection to the node listener. What a machine boots carries the cluster's token and is
//! given without one, so where the machine stands is all that speaks for it; guests, whose networks are routed to here,
//! have no business with this listener at all.

use std::net::{IpAddr, SocketAddr};

use axum::extract::{ConnectInfo, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bedplate_api::error::ErrorKind;
use bedplate_api::node::Ipv4Net;

use super::Shared;
use super::answer::Refusal;
use crate::control::Options;

/// Refuses guests.
pub async fn no_guest(State(control): Shared, request: Request, next: Next) -> Response {
    match peer(&request) {
        Some(peer) if !is_guest(&control.options, peer) => next.run(request).await,
        Some(peer) => {
            refuse(format!("{peer} is an address of a VM: this listener is for nodes, VMs have no business with it"))
        }
        None => nobody(),
    }
}

/// Lets machines through that may boot from here.
pub async fn machine(State(control): Shared, request: Request, next: Next) -> Response {
    let options = &control.options;
    let Ipv4Net { address, prefix } = options.node_network;
    match peer(&request) {
        Some(peer) if may_boot(options, peer) => next.run(request).await,
        Some(peer) => refuse(format!(
            "{peer} is not in the node network {address}/{prefix}, and only machines there are booted from here; \
             if it should be one, start the control node with another --node-network"
        )),
        None => nobody(),
    }
}

/// Where the request comes from; an IPv4 address that came in through an IPv6 socket is taken for what it is.
fn peer(request: &Request) -> Option<IpAddr> {
    let ConnectInfo(peer) = request.extensions().get::<ConnectInfo<SocketAddr>>()?;
    Some(peer.ip().to_canonical())
}

fn is_guest(options: &Options, peer: IpAddr) -> bool {
    contains(options.vm_network, peer)
}

/// On the node network; or on this machine, where a boot server of the site's own may pass on what it fetches here.
fn may_boot(options: &Options, peer: IpAddr) -> bool {
    let relayed = options.netboot.is_none() && peer.is_loopback();
    (contains(options.node_network, peer) || relayed) && !is_guest(options, peer)
}

fn contains(network: Ipv4Net, address: IpAddr) -> bool {
    let IpAddr::V4(address) = address.to_canonical() else { return false };
    // A prefix of 0 holds everything.
    let shift = 32 - u32::from(network.prefix.min(32));
    let number = |address: std::net::Ipv4Addr| u32::from(address).checked_shr(shift).unwrap_or(0);
    number(address) == number(network.address)
}

fn refuse(message: String) -> Response {
    Refusal::new(ErrorKind::Unauthorized, message).into_response()
}

/// Only a listener that does not say where its connections come from leads here.
fn nobody() -> Response {
    refuse("it is not known where this request comes from".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::options;

    #[test]
    fn machines_boot_from_the_node_network_and_guests_get_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = options(&dir);
        options.netboot = Some("bp".into());
        // (peer, is a guest, may boot, may boot where a site's own boot server passes things on)
        for (peer, guest, boots, relayed) in [
            ("10.77.0.10", false, true, true),
            ("::ffff:10.77.0.10", false, true, true),
            ("10.77.1.10", false, false, false),
            ("10.78.1.2", true, false, false),
            ("::ffff:10.78.200.2", true, false, false),
            ("127.0.0.1", false, false, true),
            ("::1", false, false, true),
            ("192.168.1.1", false, false, false),
            ("fe80::1", false, false, false),
        ] {
            let peer: IpAddr = peer.parse().unwrap();
            options.netboot = Some("bp".into());
            assert_eq!((is_guest(&options, peer), may_boot(&options, peer)), (guest, boots), "{peer}");
            options.netboot = None;
            assert_eq!(may_boot(&options, peer), relayed, "{peer}");
        }
    }
}
